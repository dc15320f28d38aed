#include <inttypes.h> // defines: PRId64
#include <math.h>     // defines: pow, isfinite
#include <stdarg.h>   // defines: va_list
#include <stdlib.h>   // defines: free
#include <string.h>   // defines: strcmp, strstr
#include "layout.h"
#include "plumbing.h"

enum { PIECE = 1 << 16 }; // elements in the buffers that everything streams through

bool fail(char *err, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err, ST_ERR, format, args);
    va_end(args);
    return false;
}

StTensor *layout_add(Layout *a, StType type, int ndim, const char *prefix, const char *name) {
    char full[256];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    if (a->n == a->room) a->list = realloc(a->list, (size_t)(a->room = a->room * 2 + 64) * sizeof *a->list);
    char *copy = strdup(full);
    if (a->list == NULL || copy == NULL) fatal("out of memory");
    a->list[a->n] = (StTensor){.name = copy, .type = type, .ndim = ndim};
    return &a->list[a->n++];
}

static void add_param(Layout *a, StType type, const char *prefix, const Tensor *param) {
    StTensor *t = layout_add(a, type, param->ndim, prefix, param->name);
    for (int i = 0; i < param->ndim; i++) t->shape[i] = param->shape[i];
}

static Layout new_layout(const Config *c) {
    Layout a = {0};
    a.params = megalodon_tensors(c, &a.num_params, &a.size);
    if (a.params == NULL) fatal("out of memory");
    return a;
}

void layout_free(Layout *a) {
    for (int i = 0; i < a->n; i++) free(a->list[i].name);
    free(a->list);
    free(a->params);
}

static bool write_block(StWriter *w, Model *m, Buffer buffer, size_t first, size_t n, char *err) {
    static real values[PIECE];
    static float floats[PIECE];
    for (size_t done = 0; done < n; done += PIECE) {
        size_t piece = n - done < PIECE ? n - done : PIECE;
        if (buffer == PARAMS)
            megalodon_read(m, buffer, first + done, piece, values);
        else
            ranks_read(m, buffer, first + done, piece, values);
        for (size_t i = 0; i < piece; i++) {
            floats[i] = (float)values[i];
            if (!isfinite(floats[i]))
                return fail(err, "%.200s: not written: a number of the model is %g", w->path, values[i]);
        }
        if (!st_write(w, floats, piece * sizeof *floats, err)) return false;
    }
    return true;
}

static bool read_block(StFile *f, const StTensor *t, Model *m, Buffer buffer, size_t first, char *err) {
    static real values[PIECE];
    const int64_t n = st_count(t);
    for (int64_t done = 0; done < n; done += PIECE) {
        int64_t piece = n - done < PIECE ? n - done : PIECE;
        if (!st_read(f, t, done, piece, values, REAL, err)) return false;
        for (int64_t i = 0; i < piece; i++) {
            const bool negative = buffer == MOMENT2 && values[i] < 0; // its root would be no number
            if (negative || !isfinite(values[i]))
                return fail(err, "%.200s: tensor '%s' is %s at element %" PRId64, f->path, t->name,
                            negative ? "negative" : "not finite", done + i);
        }
        megalodon_write(m, buffer, first + (size_t)done, (size_t)piece, values);
    }
    return true;
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
    return fail(err, "%.200s: tensor '%s' has shape %s, the configuration makes it %s", f->path, t->name,
                shape_text(t, is), shape_text(wanted, should));
}

// ----------------------------------------------------------------------------
// models: the parameters and, for others who read the file, what the configuration makes of it

typedef enum { PARAM, ROPE_FREQS, PRIOR, TIED } Kind; // TIED: the output's copy of the embedding

static Kind kind_of(const char *name, const Config *c) {
    if (strcmp(name, "rope.freqs") == 0) return ROPE_FREQS;
    if (strstr(name, ".prior_") != NULL) return PRIOR;
    return c->share_emb && strcmp(name, "output.output.weight") == 0 ? TIED : PARAM;
}

// All tensors in checkpoint order.
static Layout model_layout(const Config *c) {
    Layout a = new_layout(c);
    for (const Tensor *t = a.params; t < a.params + a.num_params; t++) {
        char stem[64];
        add_param(&a, ST_F32, "", t);
        if (t == a.params) layout_add(&a, ST_F32, 1, "", "rope.freqs")->shape[0] = c->z_dim / c->num_heads / 2;
        if (strstr(t->name, "timenorm.bias") == NULL && strstr(t->name, "final_norm.bias") == NULL) continue;
        snprintf(stem, sizeof stem, "%.*s", (int)(strlen(t->name) - strlen("bias")), t->name);
        layout_add(&a, ST_I64, 0, stem, "prior_count");
        layout_add(&a, ST_F32, 1, stem, "prior_mean")->shape[0] = c->norm_num_groups;
        layout_add(&a, ST_F32, 1, stem, "prior_logv")->shape[0] = c->norm_num_groups;
    }
    if (!c->share_emb) return a;
    StTensor *tied = layout_add(&a, ST_F32, 2, "", "output.output.weight");
    memcpy(tied->shape, a.list[0].shape, sizeof tied->shape);
    return a;
}

static double rope_frequency(const Config *c, int64_t j) {
    const int dz = c->z_dim / c->num_heads;
    return pow(c->rope_base, -2.0 * (double)j / dz);
}

bool save_model(const char *path, Model *m, const Config *c, char *err) {
    StWriter w;
    const int64_t zero = 0;
    Layout a = model_layout(c);
    const Tensor *param = a.params;
    char *json = config_to_json(c);
    bool ok = st_create(&w, path, json, a.list, a.n, err);
    for (const StTensor *t = a.list; t < a.list + a.n && ok; t++) {
        const Kind kind = kind_of(t->name, c);
        if (kind == PARAM) {
            ok = write_block(&w, m, PARAMS, param->offset, param->size, err);
            param++;
        } else if (kind == TIED) {
            ok = write_block(&w, m, PARAMS, a.params[0].offset, a.params[0].size, err);
        } else if (t->type == ST_I64) {
            ok = st_write(&w, &zero, sizeof zero, err);
        }
        for (int64_t i = 0; (kind == ROPE_FREQS || kind == PRIOR) && t->type == ST_F32 && i < t->shape[0]; i++) {
            const float value = kind == PRIOR ? 0 : (float)rope_frequency(c, i);
            ok = ok && st_write(&w, &value, sizeof value, err);
        }
    }
    ok = ok && st_finish(&w, err);
    free(json);
    layout_free(&a);
    return ok;
}

// Checks what is no parameter: PRIOR is 0, ROPE_FREQS what the configuration makes it, TIED the embedding.
static bool check_derived(StFile *f, const StTensor *t, Kind kind, const Config *c, char *err) {
    static double values[PIECE], embed[PIECE];
    const bool half = t->type == ST_BF16 || t->type == ST_F16;
    const double tolerance = kind != ROPE_FREQS ? 0 : half ? 0x1p-8 : 2e-6;
    const double subnormal = kind == ROPE_FREQS && t->type == ST_F16 ? 0x1p-25 : 0; // half of F16's smallest step
    for (int64_t done = 0; done < st_count(t); done += PIECE) {
        int64_t piece = st_count(t) - done < PIECE ? st_count(t) - done : PIECE;
        if (!st_read(f, t, done, piece, values, ST_F64, err)) return false;
        if (kind == TIED && !st_read(f, st_find(f, "embed.weight"), done, piece, embed, ST_F64, err)) return false;
        for (int64_t i = 0; i < piece; i++) {
            double wanted = kind == PRIOR ? 0 : kind == TIED ? embed[i] : rope_frequency(c, done + i);
            if (!(fabs(values[i] - wanted) <= tolerance * wanted + subnormal))
                return fail(err, "%.200s: tensor '%s' is %g at element %" PRId64 " and should be %g%s", f->path,
                            t->name, values[i], done + i, wanted, kind == TIED ? " as embed.weight is" : "");
        }
    }
    return true;
}

bool layout_refuse_extra(const StFile *f, const Layout *a, char *err) {
    for (int i = 0; i < f->count; i++) {
        int j = 0;
        while (j < a->n && strcmp(a->list[j].name, f->tensors[i].name) != 0) j++;
        if (j == a->n)
            return fail(err, "%.200s: tensor '%s' is none that the configuration has", f->path, f->tensors[i].name);
    }
    return true;
}

bool load_model(StFile *f, Model *m, const Config *c, char *err) {
    int found = 0;
    bool ok = true;
    Layout a = model_layout(c);
    const Tensor *param = a.params;
    for (int i = 0; i < a.n && ok; i++) {
        const Kind kind = kind_of(a.list[i].name, c);
        const StTensor *t = st_find(f, a.list[i].name);
        found += t != NULL;
        if (t == NULL && (kind == PRIOR || kind == ROPE_FREQS)) continue;
        ok = layout_check(f, t, &a.list[i], err);
        if (ok)
            ok = kind == PARAM ? read_block(f, t, m, PARAMS, param->offset, err) : check_derived(f, t, kind, c, err);
        param += kind == PARAM;
    }
    if (ok && found < f->count) ok = layout_refuse_extra(f, &a, err);
    layout_free(&a);
    return ok;
}

bool checkpoint_open(StFile *f, Config *config, const char *path) {
    char file[PATH_SIZE], err[ST_ERR];
    bool is_run, ok;
    const int64_t step = run_newest(path, &is_run);
    if (is_run && step < 0) fatal("%s: every checkpoint is damaged", path);
    if (is_run) {
        run_model(file, path, step);
        ok = st_open(f, file, err);
    } else { // one of a run's own directories, or a file
        snprintf(file, sizeof file, "%s/model.safetensors", path);
        ok = st_open(f, file, err) || st_open(f, path, err);
    }
    if (!ok) fatal("%s", err);
    if (f->config == NULL) return false;
    *config = config_defaults();
    if (!config_from_json(config, f->config, err) || !config_check(config, err))
        fatal("%s: its configuration: %s", f->path, err);
    return true;
}

void checkpoint_load(StFile *f, Model *model, const Config *config) {
    char err[ST_ERR];
    if (!load_model(f, model, config, err)) fatal("%s", err);
    st_close(f);
}

// ----------------------------------------------------------------------------
// optimizers: AdamW's moments; seed and step, which random numbers and data position follow from; and the
// validation loss there

static Layout optimizer_layout(const Config *c) {
    Layout a = new_layout(c);
    for (int i = 0; i < a.num_params; i++) add_param(&a, ST_F32, "moment1.", &a.params[i]);
    for (int i = 0; i < a.num_params; i++) add_param(&a, ST_F32, "moment2.", &a.params[i]);
    layout_add(&a, ST_I64, 0, "", "seed");
    layout_add(&a, ST_I64, 0, "", "step");
    layout_add(&a, ST_F64, 0, "", "val_loss");
    return a;
}

bool save_optimizer(const char *path, Model *m, const Config *c, int64_t seed, int64_t step, double val_loss,
                    char *err) {
    StWriter w;
    Layout a = optimizer_layout(c);
    bool ok = st_create(&w, path, NULL, a.list, a.n, err) && write_block(&w, m, MOMENT1, 0, a.size, err) &&
              write_block(&w, m, MOMENT2, 0, a.size, err) && st_write(&w, &seed, sizeof seed, err) &&
              st_write(&w, &step, sizeof step, err) && st_write(&w, &val_loss, sizeof val_loss, err) &&
              st_finish(&w, err);
    layout_free(&a);
    return ok;
}

void lend_optimizer(Model *m, const Config *c) {
    static real values[PIECE];
    Layout a = new_layout(c);
    for (Buffer buffer = MOMENT1; buffer <= MOMENT2; buffer++) {
        for (size_t done = 0; done < a.size; done += PIECE)
            ranks_read(m, buffer, done, a.size - done < PIECE ? a.size - done : PIECE, values);
    }
    layout_free(&a);
}

bool load_optimizer(StFile *f, Model *m, const Config *c, int64_t seed, int64_t step, char *err) {
    int64_t stored[2] = {-1, -1};
    Layout a = optimizer_layout(c);
    const int count = a.num_params;
    bool ok = layout_refuse_extra(f, &a, err);
    for (int i = 0; i < a.n && ok; i++) {
        const StTensor *t = st_find(f, a.list[i].name);
        ok = layout_check(f, t, &a.list[i], err);
        if (ok && i < 2 * count)
            ok = read_block(f, t, m, i < count ? MOMENT1 : MOMENT2, a.params[i % count].offset, err);
        else if (ok && i < 2 * count + 2)
            ok = st_read(f, t, 0, 1, &stored[i - 2 * count], ST_I64, err);
    }
    if (ok && (stored[0] != seed || stored[1] != step))
        ok = fail(err, "%.200s: is of seed %lld and step %lld, not of --seed %lld and step %lld", f->path,
                  (long long)stored[0], (long long)stored[1], (long long)seed, (long long)step);
    layout_free(&a);
    return ok;
}

// ----------------------------------------------------------------------------
// dumps

static void add_rows(Layout *a, StType type, int B, int L, int width, const char *prefix, const char *name) {
    StTensor *t = layout_add(a, type, width > 0 ? 3 : 2, prefix, name);
    t->shape[0] = B, t->shape[1] = L, t->shape[2] = width;
}

// Number of a layer's activations.
static int num_activations(void) {
    int n = 0;
    while (megalodon_activation_name(n)) n++;
    return n;
}

// Activation i in data-flow order, the final norm's being the last: its name, and its layer.
static const char *activation(const Config *c, int i, int *layer) {
    const int n = num_activations();
    const bool last = i == c->num_layers * n;
    *layer = last ? -1 : i / n;
    return last ? "final_norm" : megalodon_activation_name(i % n);
}

static Layout dump_layout(Model *m, const Config *c, int B, int L) {
    Layout a = new_layout(c);
    add_rows(&a, ST_I32, B, L, 0, "input.", "tokens");
    add_rows(&a, ST_I32, B, L, 0, "input.", "targets");
    for (int i = 0, layer; i <= c->num_layers * num_activations(); i++) {
        char prefix[64] = "act.";
        const char *name = activation(c, i, &layer);
        if (layer >= 0) snprintf(prefix, sizeof prefix, "act.layers.%d.", layer);
        add_rows(&a, REAL, B, L, megalodon_activation(m, layer, name, NULL), prefix, name);
    }
    add_rows(&a, REAL, B, L, c->vocab_size, "act.", "logits");
    layout_add(&a, REAL, 1, "", "loss")->shape[0] = 1;
    for (int i = 0; i < a.num_params; i++) add_param(&a, REAL, "grad.", &a.params[i]);
    return a;
}

// All processes walk through a dump together: process 0 writes it, the others give what they have.
static bool put(StWriter *w, const void *data, size_t bytes, char *err) {
    return ranks.rank > 0 || st_write(w, data, bytes, err);
}

enum { DUMP_TOKENS = 256 }; // whose numbers are fetched and written at a time

// The rows of the whole batch, `bytes` a token; this process's own are in mine. NULL: logits, made as they are needed.
// Nothing is written once `ok` is false. Returns whether all was written so far.
static bool put_rows(StWriter *w, Model *m, const void *mine, size_t bytes, bool ok, char *err) {
    void *values = allocate(DUMP_TOKENS, bytes);
    for (int b = 0; b < ranks.rows * ranks.dp_size; b++) {
        for (int p = 0; p < ranks.cp_size; p++) {
            const size_t length = (size_t)ranks.lengths[p];
            const int owner = b / ranks.rows * ranks.cp_size + p;
            for (size_t t = 0; t < length; t += DUMP_TOKENS) {
                const size_t n = length - t < DUMP_TOKENS ? length - t : DUMP_TOKENS,
                             at = (size_t)(b % ranks.rows) * length + t;
                if (owner == ranks.rank && mine != NULL) memcpy(values, (const char *)mine + at * bytes, n * bytes);
                if (owner == ranks.rank && mine == NULL) megalodon_logits(m, at, n, values);
                ranks_fetch(values, values, n * bytes, owner);
                ok = ok && put(w, values, n * bytes, err);
            }
        }
    }
    free(values);
    return ok;
}

// Elements of the buffer that holds any activation, or a piece of the gradients.
static size_t dump_room(const Config *c, int B, int L) {
    return (size_t)B * (size_t)L * (size_t)(c->model_dim + c->z_dim + c->value_dim) + PIECE;
}

size_t dump_bytes(const Config *c, int B, int L) {
    return (dump_room(c, B, L) + (size_t)DUMP_TOKENS * (size_t)(c->vocab_size + c->value_dim)) * sizeof(real);
}

bool is_dump(const char *path) {
    StFile f;
    char err[ST_ERR];
    if (!st_open(&f, path, err)) return false;
    const bool ok = st_find(&f, "input.tokens") != NULL && st_find(&f, "loss") != NULL;
    st_close(&f);
    return ok;
}

bool write_dump(const char *path, Model *m, const Config *c, const int32_t *inputs, const int32_t *targets, int B,
                int L, double loss, char *err) {
    const real loss_value = (real)loss;
    StWriter w;
    int whole = 0; // tokens of a row
    for (int p = 0; p < ranks.cp_size; p++) whole += (int)ranks.lengths[p];
    Layout a = dump_layout(m, c, ranks.rows * ranks.dp_size, whole);
    real *values = allocate(dump_room(c, B, L), sizeof *values);
    bool ok = ranks.rank > 0 || st_create(&w, path, NULL, a.list, a.n, err);
    // after a failure process 0 goes on with the others, without writing
    ok = put_rows(&w, m, inputs, sizeof *inputs, ok, err);
    ok = put_rows(&w, m, targets, sizeof *targets, ok, err);
    for (int i = 0, layer; i <= c->num_layers * num_activations(); i++) {
        const char *name = activation(c, i, &layer);
        size_t width = (size_t)megalodon_activation(m, layer, name, values);
        ok = put_rows(&w, m, values, width * sizeof *values, ok, err);
    }
    ok = put_rows(&w, m, NULL, (size_t)c->vocab_size * sizeof *values, ok, err);
    ok = ok && put(&w, &loss_value, sizeof loss_value, err);
    for (size_t first = 0; first < a.size; first += PIECE) {
        size_t piece = a.size - first < PIECE ? a.size - first : PIECE;
        ranks_read(m, GRADS, first, piece, values);
        ok = ok && put(&w, values, piece * sizeof *values, err);
    }
    ok = ok && (ranks.rank > 0 || st_finish(&w, err));
    free(values);
    layout_free(&a);
    return ok;
}
