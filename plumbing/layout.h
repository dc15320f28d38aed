// What checkpoint.c and state.c share: the tensors of a file of ours, and judging another's by them.
#pragma once
#include "../megalodon.h"
#include "safetensors.h"

static const StType REAL = sizeof(real) == sizeof(double) ? ST_F64 : ST_F32;

// The tensors of a file to be written, or wanted of one to be read; and the model's own.
typedef struct {
    StTensor *list;
    int n, room;
    Tensor *params;
    int num_params;
    size_t size; // of all parameters
} Layout;

// Appends a tensor called prefix + name, its shape to be filled in.
StTensor *layout_add(Layout *layout, StType type, int ndim, const char *prefix, const char *name);
void layout_free(Layout *layout);

// The first tensor of the file that is not in the layout is at fault.
bool layout_refuse_extra(const StFile *file, const Layout *layout, char *err);
// Refuses a tensor that is missing (NULL) or has another shape than wanted.
bool layout_check(const StFile *file, const StTensor *tensor, const StTensor *wanted, char *err);

bool fail(char *err, const char *format, ...) __attribute__((format(printf, 2, 3))); // err gets it; false
