// Lists of the tensors of a file: those to be written, or those that a file to be read must have.
#pragma once
#include "../megalodon.h"
#include "safetensors.h"

static const StType REAL = sizeof(real) == sizeof(double) ? ST_F64 : ST_F32; // the type `real` in a file

typedef struct {
    StTensor *list;
    int *roles;   // for each tensor of the list, what it is to the caller of layout_add
    int n;        // tensors in the list
    int capacity; // tensors that `list` and `roles` have space for
} Layout;

// Appends a tensor named prefix + name and returns it; the caller fills in its shape (ndim).
StTensor *layout_add(Layout *layout, int role, StType type, int ndim, const char *prefix, const char *name);
// Appends a tensor of the model's shape, named prefix + the tensor's name.
void layout_add_param(Layout *layout, int role, StType type, const char *prefix, const Tensor *param);
void layout_free(Layout *layout);

// Returns false, with err naming the tensor, if the file has a tensor that the layout does not have.
bool layout_refuse_extra(const StFile *file, const Layout *layout, char *err);
// Returns false, with err naming the tensor, if `tensor` is missing (NULL) or its shape is not that of `wanted`.
bool layout_check(const StFile *file, const StTensor *tensor, const StTensor *wanted, char *err);

// Formats a message into err (ST_ERR bytes) and returns false.
bool fail(char *err, const char *format, ...) __attribute__((format(printf, 2, 3)));
