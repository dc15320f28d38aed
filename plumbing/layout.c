// See layout.h.
#include <stdarg.h> // defines: va_list
#include <stdlib.h> // defines: free, realloc
#include <string.h> // defines: memcmp, strcmp, strdup
#include "layout.h"
#include "plumbing.h"

bool fail(char *err, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err, ST_ERR, format, args);
    va_end(args);
    return false;
}

StTensor *layout_add(Layout *a, int role, StType type, int ndim, const char *prefix, const char *name) {
    char full[256];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    if (a->n == a->capacity) {
        a->capacity = a->capacity * 2 + 64;
        a->list = realloc(a->list, (size_t)a->capacity * sizeof *a->list);
        a->roles = realloc(a->roles, (size_t)a->capacity * sizeof *a->roles);
    }
    char *copy = strdup(full);
    if (a->list == NULL || a->roles == NULL || copy == NULL) fatal("out of memory");
    a->roles[a->n] = role;
    a->list[a->n] = (StTensor){.name = copy, .type = type, .ndim = ndim};
    return &a->list[a->n++];
}

void layout_add_param(Layout *a, int role, StType type, const char *prefix, const Tensor *param) {
    StTensor *t = layout_add(a, role, type, param->ndim, prefix, param->name);
    for (int i = 0; i < param->ndim; i++) t->shape[i] = param->shape[i];
}

void layout_free(Layout *a) {
    for (int i = 0; i < a->n; i++) free(a->list[i].name);
    free(a->list);
    free(a->roles);
}

static const char *shape_text(const StTensor *t, char text[ST_DIMS * 24]) {
    int n = snprintf(text, 2, "(");
    for (int i = 0; i < t->ndim; i++) n += sprintf(text + n, "%s%lld", i > 0 ? ", " : "", (long long)t->shape[i]);
    sprintf(text + n, ")");
    return text;
}

bool layout_check(const StFile *f, const StTensor *t, const StTensor *wanted, char *err) {
    char is[ST_DIMS * 24], should[ST_DIMS * 24];
    if (t == NULL) return fail(err, "%.200s: tensor '%s' is missing", f->path, wanted->name);
    const size_t dims = (size_t)wanted->ndim;
    if (t->ndim == wanted->ndim && memcmp(t->shape, wanted->shape, dims * sizeof *t->shape) == 0) return true;
    return fail(err, "%.200s: tensor '%s' has shape %s, but the configuration requires %s", f->path, t->name,
                shape_text(t, is), shape_text(wanted, should));
}

bool layout_refuse_extra(const StFile *f, const Layout *a, char *err) {
    for (int i = 0; i < f->count; i++) {
        int j = 0;
        while (j < a->n && strcmp(a->list[j].name, f->tensors[i].name) != 0) j++;
        if (j == a->n)
            return fail(err, "%.200s: tensor '%s' does not belong to this configuration", f->path, f->tensors[i].name);
    }
    return true;
}
