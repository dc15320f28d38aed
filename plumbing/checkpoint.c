#include <math.h>   // defines: pow, isfinite
#include <stdarg.h> // defines: va_list
#include <stdlib.h> // defines: free
#include <string.h> // defines: strcmp, strstr
#include "plumbing.h"

enum { PIECE = 1 << 16 }; // elements in the buffers that everything streams through
static const StType REAL = sizeof(real) == sizeof(double) ? ST_F64 : ST_F32;

// The tensors of a file to be written, or wanted of one to be read; and the model's own.
typedef struct {
    StTensor *list;
    int n, room;
    Tensor *params;
    int num_params;
    size_t size; // of all parameters
} Layout;

__attribute__((format(printf, 2, 3))) static bool fail(char *err, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(err, ST_ERR, format, args);
    va_end(args);
    return false;
}

// Appends a tensor called prefix + name, its shape to be filled in.
static StTensor *add(Layout *a, StType type, int ndim, const char *prefix, const char *name) {
    char full[256];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    if (a->n == a->room) a->list = realloc(a->list, (size_t)(a->room = a->room * 2 + 64) * sizeof *a->list);
    char *copy = strdup(full);
    if (a->list == NULL || copy == NULL) fatal("out of memory");
    a->list[a->n] = (StTensor){.name = copy, .type = type, .ndim = ndim};
    return &a->list[a->n++];
}

static void add_param(Layout *a, StType type, const char *prefix, const Tensor *param) {
    StTensor *t = add(a, type, param->ndim, prefix, param->name);
    for (int i = 0; i < param->ndim; i++) t->shape[i] = param->shape[i];
}

static Layout new_layout(const Config *c) {
    Layout a = {0};
    a.params = megalodon_tensors(c, &a.num_params, &a.size);
    if (a.params == NULL) fatal("out of memory");
    return a;
}

static void free_layout(Layout *a) {
    for (int i = 0; i < a->n; i++) free(a->list[i].name);
    free(a->list);
    free(a->params);
}

static bool write_block(StWriter *w, Model *m, Block block, size_t first, size_t n, char *err) {
    static real values[PIECE];
    static float floats[PIECE];
    for (size_t done = 0; done < n; done += PIECE) {
        size_t piece = n - done < PIECE ? n - done : PIECE;
        megalodon_read(m, block, first + done, piece, values);
        for (size_t i = 0; i < piece; i++) {
            floats[i] = (float)values[i];
            if (!isfinite(floats[i]))
                return fail(err, "%.200s: not written: a number of the model is %g", w->path, values[i]);
        }
        if (!st_write(w, floats, piece * sizeof *floats, err)) return false;
    }
    return true;
}

static bool read_block(StFile *f, const StTensor *t, Model *m, Block block, size_t first, char *err) {
    static real values[PIECE];
    const int64_t n = st_count(t);
    for (int64_t done = 0; done < n; done += PIECE) {
        int64_t piece = n - done < PIECE ? n - done : PIECE;
        if (!st_read(f, t, done, piece, values, REAL, err)) return false;
        for (int64_t i = 0; i < piece; i++) {
            if (!isfinite(values[i]))
                return fail(err, "%.200s: tensor '%s' is not finite at element %lld", f->path, t->name,
                            (long long)(done + i));
        }
        megalodon_write(m, block, first + (size_t)done, (size_t)piece, values);
    }
    return true;
}

static const char *shape_text(const StTensor *t, char text[ST_DIMS * 24]) {
    int n = snprintf(text, 2, "(");
    for (int i = 0; i < t->ndim; i++) n += sprintf(text + n, "%s%lld", i > 0 ? ", " : "", (long long)t->shape[i]);
    sprintf(text + n, ")");
    return text;
}

// Refuses a tensor that is missing (NULL) or has another shape than wanted.
static bool check_shape(const StFile *f, const StTensor *t, const StTensor *wanted, char *err) {
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
        if (t == a.params) add(&a, ST_F32, 1, "", "rope.freqs")->shape[0] = c->z_dim / c->num_heads / 2;
        if (strstr(t->name, "timenorm.bias") == NULL && strstr(t->name, "final_norm.bias") == NULL) continue;
        snprintf(stem, sizeof stem, "%.*s", (int)(strlen(t->name) - strlen("bias")), t->name);
        add(&a, ST_I64, 0, stem, "prior_count");
        add(&a, ST_F32, 1, stem, "prior_mean")->shape[0] = c->norm_num_groups;
        add(&a, ST_F32, 1, stem, "prior_logv")->shape[0] = c->norm_num_groups;
    }
    if (!c->share_emb) return a;
    StTensor *tied = add(&a, ST_F32, 2, "", "output.output.weight");
    memcpy(tied->shape, a.list[0].shape, sizeof tied->shape);
    return a;
}

static double rope_frequency(const Config *c, int64_t j) {
    return pow(c->rope_base, -2.0 * (double)j / (c->z_dim / c->num_heads));
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
    free_layout(&a);
    return ok;
}

// Checks what is no parameter: PRIOR is 0, ROPE_FREQS what the configuration makes it, TIED the embedding.
static bool check_derived(StFile *f, const StTensor *t, Kind kind, const Config *c, char *err) {
    static double values[PIECE], embed[PIECE];
    const double tolerance = kind != ROPE_FREQS ? 0 : t->type == ST_BF16 ? 0x1p-8 : 2e-6;
    for (int64_t done = 0; done < st_count(t); done += PIECE) {
        int64_t piece = st_count(t) - done < PIECE ? st_count(t) - done : PIECE;
        if (!st_read(f, t, done, piece, values, ST_F64, err)) return false;
        if (kind == TIED && !st_read(f, st_find(f, "embed.weight"), done, piece, embed, ST_F64, err)) return false;
        for (int64_t i = 0; i < piece; i++) {
            double wanted = kind == PRIOR ? 0 : kind == TIED ? embed[i] : rope_frequency(c, done + i);
            if (!(fabs(values[i] - wanted) <= tolerance * wanted))
                return fail(err, "%.200s: tensor '%s' is %g at element %lld and should be %g%s", f->path, t->name,
                            values[i], (long long)(done + i), wanted, kind == TIED ? " as embed.weight is" : "");
        }
    }
    return true;
}

// The first tensor of the file that is not in the layout is at fault.
static bool refuse_extra(const StFile *f, const Layout *a, char *err) {
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
        ok = check_shape(f, t, &a.list[i], err);
        if (ok)
            ok = kind == PARAM ? read_block(f, t, m, PARAMS, param->offset, err) : check_derived(f, t, kind, c, err);
        param += kind == PARAM;
    }
    if (ok && found < f->count) ok = refuse_extra(f, &a, err);
    free_layout(&a);
    return ok;
}

bool checkpoint_open(StFile *f, Config *config, const char *path) {
    char file[PATH_SIZE], err[ST_ERR];
    bool ok = false;
    int i = 0;
    while (!ok && run_model(file, path, i)) ok = st_open(f, file, err), i++;
    if (i == 0) { // no run: one of a run's own directories, or a file
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
    add(&a, ST_I64, 0, "", "seed");
    add(&a, ST_I64, 0, "", "step");
    add(&a, ST_F64, 0, "", "val_loss");
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
    free_layout(&a);
    return ok;
}

bool load_optimizer(StFile *f, Model *m, const Config *c, int64_t seed, int64_t step, char *err) {
    int64_t stored[2] = {-1, -1};
    Layout a = optimizer_layout(c);
    const int count = a.num_params;
    bool ok = refuse_extra(f, &a, err);
    for (int i = 0; i < a.n && ok; i++) {
        const StTensor *t = st_find(f, a.list[i].name);
        ok = check_shape(f, t, &a.list[i], err);
        if (ok && i < 2 * count)
            ok = read_block(f, t, m, i < count ? MOMENT1 : MOMENT2, a.params[i % count].offset, err);
        else if (ok && i < 2 * count + 2)
            ok = st_read(f, t, 0, 1, &stored[i - 2 * count], ST_I64, err);
    }
    if (ok && (stored[0] != seed || stored[1] != step))
        ok = fail(err, "%.200s: is of seed %lld and step %lld, not of --seed %lld and step %lld", f->path,
                  (long long)stored[0], (long long)stored[1], (long long)seed, (long long)step);
    free_layout(&a);
    return ok;
}

// ----------------------------------------------------------------------------
// dumps

static void add_rows(Layout *a, StType type, int B, int L, int width, const char *prefix, const char *name) {
    StTensor *t = add(a, type, width > 0 ? 3 : 2, prefix, name);
    t->shape[0] = B, t->shape[1] = L, t->shape[2] = width;
}

// Activation i in data-flow order, the final norm's being the last: its name, and its layer.
static const char *activation(const Config *c, int i, int *layer) {
    const bool last = i == c->num_layers * NUM_ACTIVATIONS;
    *layer = last ? -1 : i / NUM_ACTIVATIONS;
    return last ? "final_norm" : megalodon_activations[i % NUM_ACTIVATIONS];
}

static Layout dump_layout(Model *m, const Config *c, int B, int L) {
    Layout a = new_layout(c);
    add_rows(&a, ST_I32, B, L, 0, "input.", "tokens");
    add_rows(&a, ST_I32, B, L, 0, "input.", "targets");
    for (int i = 0, layer; i <= c->num_layers * NUM_ACTIVATIONS; i++) {
        char prefix[64] = "act.";
        const char *name = activation(c, i, &layer);
        if (layer >= 0) snprintf(prefix, sizeof prefix, "act.layers.%d.", layer);
        add_rows(&a, REAL, B, L, megalodon_activation(m, layer, name, NULL), prefix, name);
    }
    add_rows(&a, REAL, B, L, c->vocab_size, "act.", "logits");
    add(&a, REAL, 1, "", "loss")->shape[0] = 1;
    for (int i = 0; i < a.num_params; i++) add_param(&a, REAL, "grad.", &a.params[i]);
    return a;
}

void write_dump(const char *path, Model *m, const Config *c, const int32_t *inputs, const int32_t *targets, int B,
                int L, double loss) {
    const size_t R = (size_t)B * (size_t)L, V = (size_t)c->vocab_size;
    const size_t room = R * (size_t)(c->model_dim + c->z_dim + c->value_dim) + V; // any activation, a row of logits
    const real loss_value = (real)loss;
    char err[ST_ERR];
    StWriter w;
    Layout a = dump_layout(m, c, B, L);
    real *values = allocate(room, sizeof *values);
    bool ok = st_create(&w, path, NULL, a.list, a.n, err) && st_write(&w, inputs, R * sizeof *inputs, err) &&
              st_write(&w, targets, R * sizeof *targets, err);
    for (int i = 0, layer; i <= c->num_layers * NUM_ACTIVATIONS && ok; i++) {
        const char *name = activation(c, i, &layer);
        size_t width = (size_t)megalodon_activation(m, layer, name, values);
        ok = st_write(&w, values, R * width * sizeof *values, err);
    }
    for (size_t row = 0, rows = room / V; row < R && ok; row += rows) {
        if (rows > R - row) rows = R - row;
        megalodon_logits(m, row, rows, values);
        ok = st_write(&w, values, rows * V * sizeof *values, err);
    }
    ok = ok && st_write(&w, &loss_value, sizeof loss_value, err);
    for (size_t first = 0; first < a.size && ok; first += room) {
        size_t piece = a.size - first < room ? a.size - first : room;
        megalodon_read(m, GRADS, first, piece, values);
        ok = st_write(&w, values, piece * sizeof *values, err);
    }
    if (!ok || !st_finish(&w, err)) fatal("--dump %s", err);
    free(values);
    free_layout(&a);
}

// ----------------------------------------------------------------------------
// states: all that a model remembers of what it read; of a sampled text also its seed and the logits that follow

static Layout state_layout(const Config *c, const State *s, bool logits) {
    const int64_t norms = c->num_layers + 1, layers = c->num_layers, C = c->chunk_size, B = s->B;
    const StTensor wanted[] = {
        {"state.count", ST_I64, 1, {B}, 0, 0},
        {"state.mean", ST_F64, 3, {norms, B, c->norm_num_groups}, 0, 0},
        {"state.m2", ST_F64, 3, {norms, B, c->norm_num_groups}, 0, 0},
        {"state.h", REAL, 5, {layers, B, 2, c->cema_ndim, c->model_dim}, 0, 0},
        {"state.k", REAL, 4, {layers, B, C, c->z_dim}, 0, 0},
        {"state.v", REAL, 4, {layers, B, C, c->value_dim}, 0, 0},
        {"state.seed", ST_I64, 0, {0}, 0, 0},
        {"state.logits", REAL, 2, {B, c->vocab_size}, 0, 0},
    };
    const bool present[] = {true, true, true, true, s->k != NULL, s->v != NULL, true, logits};
    Layout a = {0};
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        if (!present[i]) continue;
        StTensor *t = add(&a, wanted[i].type, wanted[i].ndim, "", wanted[i].name);
        memcpy(t->shape, wanted[i].shape, sizeof t->shape);
    }
    return a;
}

// Where a tensor's numbers lie: in the state's memory at an offset, or in ours.
typedef struct {
    size_t offset;
    void *ours; // NULL: in the state
} Where;

static Where state_where(const State *s, const char *name, int64_t *seed, real *logits) {
    const struct {
        const char *name;
        const void *at;
    } parts[] = {{"state.count", s->count}, {"state.mean", s->mean}, {"state.m2", s->m2},
                 {"state.h", s->h},         {"state.k", s->k},       {"state.v", s->v}};
    for (int i = 0; i < 6; i++) {
        if (strcmp(name, parts[i].name) == 0)
            return (Where){(size_t)((const char *)parts[i].at - (const char *)s->memory), NULL};
    }
    return (Where){0, strcmp(name, "state.seed") == 0 ? (void *)seed : (void *)logits};
}

static size_t tensor_bytes(const StTensor *t) {
    return (size_t)st_count(t) * (t->type == ST_F32 ? sizeof(float) : sizeof(double));
}

bool save_state(const char *path, const State *state, const Config *c, int64_t seed, const real *logits, char *err) {
    char *json = config_to_json(c);
    StWriter w;
    Layout a = state_layout(c, state, logits != NULL);
    bool ok = st_create(&w, path, json, a.list, a.n, err);
    for (const StTensor *t = a.list; t < a.list + a.n && ok; t++) {
        const Where where = state_where(state, t->name, &seed, (real *)(uintptr_t)logits);
        void *values = allocate(tensor_bytes(t), 1);
        if (where.ours == NULL) state_read(state, where.offset, tensor_bytes(t), values);
        ok = st_write(&w, where.ours ? where.ours : values, tensor_bytes(t), err);
        free(values);
    }
    ok = ok && st_finish(&w, err);
    free_layout(&a);
    free(json);
    return ok;
}

// A number of a state's tensor that no model could have left there.
static bool impossible(const char *name, double value, const State *s, const Config *c) {
    if (!isfinite(value)) return true;
    if (strcmp(name, "state.m2") == 0 || strcmp(name, "state.seed") == 0) return value < 0;
    if (strcmp(name, "state.count") != 0) return false;
    return value < 0 || value > 0x1p53 || (s->k == NULL && (int64_t)value % c->chunk_size != 0);
}

static bool read_state_tensor(StFile *f, const StTensor *t, Where where, State *state, const Config *c, char *err) {
    const size_t bytes = tensor_bytes(t);
    void *values = allocate(bytes, 1);
    bool ok = st_read(f, t, 0, st_count(t), values, t->type, err);
    for (int64_t n = 0; n < st_count(t) && ok; n++) {
        const double value = t->type == ST_I64   ? (double)((int64_t *)values)[n]
                             : t->type == ST_F64 ? ((double *)values)[n]
                                                 : (double)((float *)values)[n];
        if (impossible(t->name, value, state, c))
            ok = fail(err, "%.200s: tensor '%s' is %g at element %lld", f->path, t->name, value, (long long)n);
    }
    if (ok && where.ours != NULL) memcpy(where.ours, values, bytes);
    if (ok && where.ours == NULL) state_write(state, where.offset, bytes, values);
    free(values);
    return ok;
}

// Is the file's configuration the model's, but for what only training needs?
static bool same_model(const StFile *f, const Config *c, char *err) {
    Config theirs = config_defaults();
    if (f->config == NULL || !config_from_json(&theirs, f->config, err))
        return fail(err, "%.200s: no configuration", f->path);
    theirs.dropout = c->dropout, theirs.hidden_dropout = c->hidden_dropout;
    theirs.attention_dropout = c->attention_dropout, theirs.init_mode = c->init_mode;
    return config_equal(&theirs, c) || fail(err, "%.200s: is the state of a model with another configuration", f->path);
}

bool load_state(const char *path, State *state, const Config *c, int64_t *seed, real *logits, char *err) {
    StFile f;
    if (!st_open(&f, path, err)) return false;
    Layout a = state_layout(c, state, logits != NULL);
    bool ok = same_model(&f, c, err) && refuse_extra(&f, &a, err);
    for (int i = 0; i < a.n && ok; i++) {
        const StTensor *t = st_find(&f, a.list[i].name);
        ok = check_shape(&f, t, &a.list[i], err);
        if (ok && t->type != a.list[i].type) ok = fail(err, "%.200s: tensor '%s' has another type", path, t->name);
        ok = ok && read_state_tensor(&f, t, state_where(state, t->name, seed, logits), state, c, err);
    }
    st_close(&f);
    free_layout(&a);
    return ok;
}

int state_rows(const char *path, char *err) {
    StFile f;
    if (!st_open(&f, path, err)) return 0;
    const StTensor *t = st_find(&f, "state.count");
    const bool ok = t != NULL && t->ndim == 1 && t->shape[0] >= 1 && t->shape[0] <= MAX_ROWS;
    const int rows = ok ? (int)t->shape[0] : 0;
    if (!ok) fail(err, "%.200s: no state of 1 to %d rows: tensor 'state.count' is not one of its kind", path, MAX_ROWS);
    st_close(&f);
    return rows;
}
