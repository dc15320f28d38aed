// Dumps: inputs, activations, logits, loss and gradients of one step in a safetensors file, for ./compare.
#include <stdlib.h> // defines: free
#include <string.h> // defines: memcpy
#include "layout.h"
#include "plumbing.h"

enum {
    PART = 1 << 16,   // elements of the gradients that are written at a time
    DUMP_TOKENS = 256 // tokens whose rows are collected and written at a time
};

// The widest activation, in elements for each token.
static size_t widest_activation(const Config *c) {
    int widest = c->model_dim; // of the final norm
    for (int i = 0; megalodon_activation_name(i) != NULL; i++) {
        const int width = megalodon_activation_width(c, megalodon_activation_name(i));
        if (width > widest) widest = width;
    }
    return (size_t)widest;
}

double dump_bytes(const Config *c) {
    const size_t widest = widest_activation(c), V = (size_t)c->vocab_size;
    return (double)(PART + (size_t)DUMP_TOKENS * (V > widest ? V : widest)) * sizeof(real);
}

double dump_bytes_per_token(const Config *c) { return (double)widest_activation(c) * sizeof(real); }

bool is_dump(const char *path) {
    StFile f;
    char err[ST_ERR];
    if (!st_open(&f, path, err)) return false;
    const bool ok = st_find(&f, "input.tokens") != NULL && st_find(&f, "loss") != NULL;
    st_close(&f);
    return ok;
}

// Appends a tensor of the shape (B, L, width), or (B, L) for width 0.
static void add_rows(Layout *a, StType type, int B, int64_t L, int width, const char *prefix, const char *name) {
    StTensor *t = layout_add(a, 0, type, width > 0 ? 3 : 2, prefix, name);
    t->shape[0] = B, t->shape[1] = L, t->shape[2] = width;
}

static int activations_per_layer(void) {
    int n = 0;
    while (megalodon_activation_name(n) != NULL) n++;
    return n;
}
static int num_activations(const Config *c) { return c->num_layers * activations_per_layer() + 1; }

// Name and layer of activation i in data-flow order; the last one is the final norm's.
static const char *activation(const Config *c, int i, int *layer) {
    const int n = activations_per_layer();
    const bool last = n == 0 || i == c->num_layers * n;
    *layer = last ? -1 : i / n;
    return last ? "final_norm" : megalodon_activation_name(i % n);
}

// Elements for each token. A dump is laid out before the first forward pass, so the model is not asked.
static int activation_width(const Config *c, int layer, const char *name) {
    return layer < 0 ? c->model_dim : megalodon_activation_width(c, name);
}

// The tensors of a dump of the whole batch, B x L tokens; *size gets the number of gradients.
static Layout dump_layout(const Config *c, int B, int64_t L, size_t *size) {
    Layout a = {0};
    int count;
    add_rows(&a, ST_I32, B, L, 0, "input.", "tokens");
    add_rows(&a, ST_I32, B, L, 0, "input.", "targets");
    for (int i = 0, layer; i < num_activations(c); i++) {
        char prefix[64] = "act.";
        const char *name = activation(c, i, &layer);
        if (layer >= 0) snprintf(prefix, sizeof prefix, "act.layers.%d.", layer);
        add_rows(&a, REAL, B, L, activation_width(c, layer, name), prefix, name);
    }
    add_rows(&a, REAL, B, L, c->vocab_size, "act.", "logits");
    layout_add(&a, 0, REAL, 1, "", "loss")->shape[0] = 1;
    Tensor *params = megalodon_tensors(c, &count, size);
    if (params == NULL) fatal("out of memory");
    for (int i = 0; i < count; i++) layout_add_param(&a, 0, REAL, "grad.", &params[i]);
    free(params);
    return a;
}

// All ranks go through a dump together. Only rank 0 writes; the others send their part. When writing fails, rank 0 goes
// on receiving, so that no rank waits forever, and writes nothing more.
struct Dump {
    Model *model;
    const Config *config;
    Split split;
    Layout layout; // of the whole batch
    StWriter file; // of rank 0
    size_t size;   // elements of all gradients
    real *values;  // one activation of this rank's part of a segment, or a part of the gradients
    char err[ST_ERR];
};

Dump *dump_new(const char *path, Model *m, const Config *c, const Split *split) {
    Dump *d = allocate(1, sizeof *d);
    d->model = m, d->config = c, d->split = *split;
    d->layout = dump_layout(c, ranks.num_rows * ranks.dp_size, split->length, &d->size);
    const size_t part = (size_t)ranks.num_rows * (size_t)split_part(split, 0, split->cp_rank).count;
    const size_t activation = part * widest_activation(c);
    d->values = allocate(activation > PART ? activation : PART, sizeof *d->values);
    if (ranks.rank == 0) st_create(&d->file, path, NULL, d->layout.list, d->layout.n, d->err);
    return d;
}

// Writes bytes from this position of the data on. The writer keeps the first error.
static void put(Dump *d, uint64_t position, const void *data, size_t bytes) {
    if (ranks.rank == 0 && st_seek(&d->file, position, d->err)) st_write(&d->file, data, bytes, d->err);
}

// Writes a segment's rows of tensor t, `bytes` for each token. local: this rank's rows of the segment, (num_rows, its
// tokens), or NULL for the logits, which are computed a part at a time.
static void put_rows(Dump *d, const StTensor *t, int64_t segment, const void *local, size_t bytes) {
    void *values = allocate(DUMP_TOKENS, bytes);
    for (int b = 0; b < ranks.num_rows * ranks.dp_size; b++) {
        for (int p = 0; p < ranks.cp_size; p++) {
            const TokenRange part = split_part(&d->split, segment, p);
            const int owner = b / ranks.num_rows * ranks.cp_size + p;
            for (int64_t at = 0; at < part.count; at += DUMP_TOKENS) {
                const size_t n = (size_t)(part.count - at < DUMP_TOKENS ? part.count - at : DUMP_TOKENS);
                const size_t first = (size_t)(b % ranks.num_rows * part.count + at);
                if (owner == ranks.rank && local != NULL)
                    memcpy(values, (const char *)local + first * bytes, n * bytes);
                if (owner == ranks.rank && local == NULL) megalodon_logits(d->model, first, n, values);
                ranks_send_to_0(values, values, n * bytes, owner);
                put(d, t->begin + (uint64_t)(b * d->split.length + part.first + at) * bytes, values, n * bytes);
            }
        }
    }
    free(values);
}

void dump_segment(Dump *d, int64_t segment, const int32_t *inputs, const int32_t *targets) {
    const StTensor *t = d->layout.list;
    put_rows(d, t++, segment, inputs, sizeof *inputs);
    put_rows(d, t++, segment, targets, sizeof *targets);
    for (int i = 0, layer; i < num_activations(d->config); i++) {
        const char *name = activation(d->config, i, &layer);
        const size_t width = (size_t)activation_width(d->config, layer, name);
        megalodon_activation(d->model, layer, name, d->values);
        put_rows(d, t++, segment, d->values, width * sizeof *d->values);
    }
    put_rows(d, t, segment, NULL, (size_t)d->config->vocab_size * sizeof *d->values);
}

bool dump_finish(Dump *d, double loss, char *err) {
    const real loss_value = (real)loss;
    const StTensor *t = d->layout.list + num_activations(d->config) + 3; // after inputs, activations and logits
    put(d, t->begin, &loss_value, sizeof loss_value);
    for (size_t first = 0; first < d->size; first += PART) { // all gradients follow, in the order of the parameters
        const size_t part = d->size - first < PART ? d->size - first : PART;
        ranks_read(d->model, GRADS, first, part, d->values);
        put(d, t->end + first * sizeof *d->values, d->values, part * sizeof *d->values);
    }
    const bool ok = ranks.rank > 0 || st_finish(&d->file, d->err);
    memcpy(err, d->err, ST_ERR);
    layout_free(&d->layout);
    free(d->values), free(d);
    return ok;
}
