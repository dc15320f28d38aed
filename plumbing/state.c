// State files: all that a model remembers of what it read; the seed that the text goes on with; of sampled texts also
// the logits behind their last tokens.
#include <math.h>   // defines: isfinite
#include <stdlib.h> // defines: free
#include <string.h> // defines: memcpy, strcmp
#include "layout.h"
#include "plumbing.h"

// Tensors are copied in pieces through a buffer of this many bytes: a state is up to gigabytes large.
enum { PIECE = 1 << 18 };

static Layout state_layout(const Config *c, const State *s, bool logits) {
    const int64_t norms = c->num_layers + 1, layers = c->num_layers, C = c->chunk_size, B = s->B;
    const struct {
        const char *name;
        StType type;
        int ndim;
        int64_t shape[ST_DIMS];
    } wanted[] = {
        {"state.count", ST_I64, 1, {B}},
        {"state.mean", ST_F64, 3, {norms, B, c->norm_num_groups}},
        {"state.m2", ST_F64, 3, {norms, B, c->norm_num_groups}},
        {"state.h", REAL, 5, {layers, B, 2, c->cema_ndim, c->model_dim}},
        {"state.k", REAL, 4, {layers, B, C, c->z_dim}},
        {"state.v", REAL, 4, {layers, B, C, c->value_dim}},
        {"state.seed", ST_I64, 0, {0}},
        {"state.logits", REAL, 2, {B, c->vocab_size}},
    };
    const bool present[] = {true, true, true, true, s->k != NULL, s->v != NULL, true, logits};
    Layout a = {0};
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        if (!present[i]) continue;
        StTensor *t = layout_add(&a, wanted[i].type, wanted[i].ndim, "", wanted[i].name);
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
    char *piece = allocate(PIECE, 1);
    StWriter w;
    Layout a = state_layout(c, state, logits != NULL);
    bool ok = st_create(&w, path, json, a.list, a.n, err);
    for (const StTensor *t = a.list; t < a.list + a.n && ok; t++) {
        const Where where = state_where(state, t->name, &seed, (real *)(uintptr_t)logits);
        const size_t bytes = tensor_bytes(t);
        if (where.ours != NULL) ok = st_write(&w, where.ours, bytes, err);
        for (size_t done = 0; where.ours == NULL && done < bytes && ok; done += PIECE) {
            const size_t n = bytes - done < PIECE ? bytes - done : PIECE;
            state_read(state, where.offset + done, n, piece);
            ok = st_write(&w, piece, n, err);
        }
    }
    free(piece);
    ok = ok && st_finish(&w, err);
    layout_free(&a);
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
    const size_t size = t->type == ST_F32 ? sizeof(float) : sizeof(double); // of F32, F64 and I64
    const int64_t count = st_count(t), most = (int64_t)(PIECE / size);
    void *values = allocate(PIECE, 1);
    bool ok = true;
    for (int64_t done = 0; done < count && ok; done += most) {
        const int64_t n = count - done < most ? count - done : most;
        ok = st_read(f, t, done, n, values, t->type, err);
        for (int64_t i = 0; i < n && ok; i++) {
            const double value = t->type == ST_I64   ? (double)((int64_t *)values)[i]
                                 : t->type == ST_F64 ? ((double *)values)[i]
                                                     : (double)((float *)values)[i];
            if (impossible(t->name, value, state, c))
                ok = fail(err, "%.200s: tensor '%s' is %g at element %lld", f->path, t->name, value,
                          (long long)done + i);
        }
        const size_t at = (size_t)done * size, bytes = (size_t)n * size;
        if (ok && where.ours != NULL) memcpy((char *)where.ours + at, values, bytes);
        if (ok && where.ours == NULL) state_write(state, where.offset + at, bytes, values);
    }
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
    bool ok = same_model(&f, c, err) && layout_refuse_extra(&f, &a, err);
    for (int i = 0; i < a.n && ok; i++) {
        const StTensor *t = st_find(&f, a.list[i].name);
        ok = layout_check(&f, t, &a.list[i], err);
        if (ok && t->type != a.list[i].type) ok = fail(err, "%.200s: tensor '%s' has another type", path, t->name);
        ok = ok && read_state_tensor(&f, t, state_where(state, t->name, seed, logits), state, c, err);
    }
    st_close(&f);
    layout_free(&a);
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

void state_copy(const State *from, int i, State *to, int j, const Config *c) {
    const size_t layers = (size_t)c->num_layers, C = (size_t)c->chunk_size, moments = (size_t)from->G * sizeof(double);
    const struct {
        const void *from, *to; // (layers, B, bytes)
        size_t layers, bytes;
    } parts[] = {{from->count, to->count, 1, sizeof *from->count},
                 {from->mean, to->mean, layers + 1, moments},
                 {from->m2, to->m2, layers + 1, moments},
                 {from->h, to->h, layers, from->modes * sizeof(real)},
                 {from->k, to->k, from->k ? layers : 0, C * (size_t)c->z_dim * sizeof(real)},
                 {from->v, to->v, from->v ? layers : 0, C * (size_t)c->value_dim * sizeof(real)}};
    char *piece = allocate(PIECE, 1);
    for (size_t p = 0; p < sizeof parts / sizeof parts[0]; p++) {
        const size_t bytes = parts[p].bytes;
        const size_t first = (size_t)((const char *)parts[p].from - (const char *)from->memory);
        const size_t target = (size_t)((const char *)parts[p].to - (const char *)to->memory);
        for (size_t l = 0; l < parts[p].layers; l++) {
            const size_t source = first + (l * (size_t)from->B + (size_t)i) * bytes;
            const size_t place = target + (l * (size_t)to->B + (size_t)j) * bytes;
            for (size_t done = 0; done < bytes; done += PIECE) {
                const size_t n = bytes - done < PIECE ? bytes - done : PIECE;
                state_read(from, source + done, n, piece);
                state_write(to, place + done, n, piece);
            }
        }
    }
    free(piece);
}
