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

// Elements of the buffer that holds one activation of B x L tokens, or a part of the gradients.
static size_t buffer_elements(const Config *c, int B, int L) {
    const size_t activation = (size_t)B * (size_t)L * widest_activation(c);
    return activation > PART ? activation : PART;
}

size_t dump_bytes(const Config *c, int B, int L) {
    const size_t widest = widest_activation(c), V = (size_t)c->vocab_size;
    return (buffer_elements(c, B, L) + (size_t)DUMP_TOKENS * (V > widest ? V : widest)) * sizeof(real);
}

bool is_dump(const char *path) {
    StFile f;
    char err[ST_ERR];
    if (!st_open(&f, path, err)) return false;
    const bool ok = st_find(&f, "input.tokens") != NULL && st_find(&f, "loss") != NULL;
    st_close(&f);
    return ok;
}

// Appends a tensor of the shape (B, L, width), or (B, L) for width 0.
static void add_rows(Layout *a, StType type, int B, int L, int width, const char *prefix, const char *name) {
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

// The tensors of a dump of the whole batch, B x L tokens; *size gets the number of gradients.
static Layout dump_layout(Model *m, const Config *c, int B, int L, size_t *size) {
    Layout a = {0};
    int count;
    add_rows(&a, ST_I32, B, L, 0, "input.", "tokens");
    add_rows(&a, ST_I32, B, L, 0, "input.", "targets");
    for (int i = 0, layer; i < num_activations(c); i++) {
        char prefix[64] = "act.";
        const char *name = activation(c, i, &layer);
        if (layer >= 0) snprintf(prefix, sizeof prefix, "act.layers.%d.", layer);
        add_rows(&a, REAL, B, L, megalodon_activation(m, layer, name, NULL), prefix, name);
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
// on receiving, so that no rank waits forever: `ok` says whether everything has been written so far, and a function
// that takes it returns its new value.

static bool put(StWriter *w, const void *data, size_t bytes, bool ok, char *err) {
    return ok && (ranks.rank > 0 || st_write(w, data, bytes, err));
}

// Writes a tensor of the whole batch, `bytes` for each token. local: this rank's rows of it, (num_rows, length) tokens,
// or NULL for the logits, which are computed a part at a time.
static bool put_rows(StWriter *w, Model *m, const void *local, size_t bytes, bool ok, char *err) {
    void *values = allocate(DUMP_TOKENS, bytes);
    for (int b = 0; b < ranks.num_rows * ranks.dp_size; b++) {
        for (int p = 0; p < ranks.cp_size; p++) {
            const size_t length = (size_t)ranks.lengths[p];
            const int owner = b / ranks.num_rows * ranks.cp_size + p;
            for (size_t t = 0; t < length; t += DUMP_TOKENS) {
                const size_t n = length - t < DUMP_TOKENS ? length - t : DUMP_TOKENS;
                const size_t first = (size_t)(b % ranks.num_rows) * length + t;
                if (owner == ranks.rank && local != NULL)
                    memcpy(values, (const char *)local + first * bytes, n * bytes);
                if (owner == ranks.rank && local == NULL) megalodon_logits(m, first, n, values);
                ranks_send_to_0(values, values, n * bytes, owner);
                ok = put(w, values, n * bytes, ok, err);
            }
        }
    }
    free(values);
    return ok;
}

bool write_dump(const char *path, Model *m, const Config *c, const int32_t *inputs, const int32_t *targets, int B,
                int L, double loss, char *err) {
    const real loss_value = (real)loss;
    StWriter w;
    size_t size;
    int length = 0; // of a whole sequence
    for (int p = 0; p < ranks.cp_size; p++) length += (int)ranks.lengths[p];
    Layout a = dump_layout(m, c, ranks.num_rows * ranks.dp_size, length, &size);
    real *values = allocate(buffer_elements(c, B, L), sizeof *values);
    bool ok = ranks.rank > 0 || st_create(&w, path, NULL, a.list, a.n, err);
    ok = put_rows(&w, m, inputs, sizeof *inputs, ok, err);
    ok = put_rows(&w, m, targets, sizeof *targets, ok, err);
    for (int i = 0, layer; i < num_activations(c); i++) {
        const char *name = activation(c, i, &layer);
        const size_t width = (size_t)megalodon_activation(m, layer, name, NULL);
        megalodon_activation(m, layer, name, values);
        ok = put_rows(&w, m, values, width * sizeof *values, ok, err);
    }
    ok = put_rows(&w, m, NULL, (size_t)c->vocab_size * sizeof *values, ok, err);
    ok = put(&w, &loss_value, sizeof loss_value, ok, err);
    for (size_t first = 0; first < size; first += PART) {
        const size_t part = size - first < PART ? size - first : PART;
        ranks_read(m, GRADS, first, part, values);
        ok = put(&w, values, part * sizeof *values, ok, err);
    }
    ok = ok && (ranks.rank > 0 || st_finish(&w, err));
    free(values);
    layout_free(&a);
    return ok;
}
