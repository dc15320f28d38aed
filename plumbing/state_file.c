// State files and copies of a state's rows. A state is up to gigabytes large and lies in the backend's memory, so all
// of this goes through a small buffer.
#include <math.h>   // defines: isfinite
#include <stdlib.h> // defines: free
#include <string.h> // defines: memcpy, strcmp
#include "layout.h"
#include "plumbing.h"

enum { BUFFER_BYTES = 1 << 18 };

// A tensor's role in a state file: its index in state_tensors(), or one of these.
enum { SEED = NUM_STATE_TENSORS, LOGITS };

static void tensors_of(StateTensor list[NUM_STATE_TENSORS], const State *s, const Config *c) {
    state_tensors(list, c, s->B, s->k == NULL);
}

static Layout state_layout(const StateTensor list[NUM_STATE_TENSORS], const State *s, const Config *c, bool logits) {
    Layout a = {0};
    for (int i = 0; i < NUM_STATE_TENSORS; i++) {
        if (list[i].slices == 0) continue;
        StTensor *t = layout_add(&a, i, list[i].type, list[i].ndim, "", list[i].name);
        memcpy(t->shape, list[i].shape, sizeof t->shape);
    }
    layout_add(&a, SEED, ST_I64, 0, "", "state.seed");
    if (!logits) return a;
    StTensor *t = layout_add(&a, LOGITS, REAL, 2, "", "state.logits");
    t->shape[0] = s->B, t->shape[1] = c->vocab_size;
    return a;
}

void state_counts(const State *state, const Config *c, int64_t *counts) {
    StateTensor list[NUM_STATE_TENSORS];
    tensors_of(list, state, c);
    for (const StateTensor *t = list; t < list + NUM_STATE_TENSORS; t++) {
        if (t->pointer == offsetof(State, count)) state_read(state, t->offset, t->bytes, counts);
    }
}

bool save_state(const char *path, const State *state, const Config *c, int64_t seed, const real *logits, char *err) {
    StateTensor list[NUM_STATE_TENSORS];
    char *json = config_to_json(c);
    char *buffer = allocate(BUFFER_BYTES, 1);
    StWriter w;
    tensors_of(list, state, c);
    Layout a = state_layout(list, state, c, logits != NULL);
    bool ok = st_create(&w, path, json, a.list, a.n, err);
    for (int i = 0; i < a.n && ok; i++) {
        if (a.roles[i] == SEED) {
            ok = st_write(&w, &seed, sizeof seed, err);
        } else if (a.roles[i] == LOGITS) {
            ok = st_write(&w, logits, (size_t)st_count(&a.list[i]) * sizeof *logits, err);
        } else {
            const StateTensor *t = &list[a.roles[i]];
            for (size_t done = 0; done < t->bytes && ok; done += BUFFER_BYTES) {
                const size_t n = t->bytes - done < BUFFER_BYTES ? t->bytes - done : BUFFER_BYTES;
                state_read(state, t->offset + done, n, buffer);
                ok = st_write(&w, buffer, n, err);
            }
        }
    }
    free(buffer);
    ok = ok && st_finish(&w, err);
    layout_free(&a);
    free(json);
    return ok;
}

// Returns whether no model could have left this number in a tensor of a state: it is not finite, or a sum of squares, a
// seed or a count is negative, or a count is above 2^53 or, without k and v, within a chunk.
static bool impossible(const char *name, double value, const State *s, const Config *c) {
    if (!isfinite(value)) return true;
    if (strcmp(name, "state.m2") == 0 || strcmp(name, "state.seed") == 0) return value < 0;
    if (strcmp(name, "state.count") != 0) return false;
    return value < 0 || value > 0x1p53 || (s->k == NULL && (int64_t)value % c->chunk_size != 0);
}

static double element(const void *values, StType type, int64_t i) {
    if (type == ST_I64) return (double)((const int64_t *)values)[i];
    return type == ST_F64 ? ((const double *)values)[i] : (double)((const float *)values)[i];
}

// Reads a tensor of a state file and checks its values. Its data go to `state` from byte `offset` on, or to `host` if
// that is not NULL.
static bool read_state_tensor(StFile *f, const StTensor *t, State *state, size_t offset, void *host, const Config *c,
                              char *err) {
    const size_t size = t->type == ST_F32 ? sizeof(float) : sizeof(double); // F32, F64 and I64 occur
    const int64_t count = st_count(t), capacity = (int64_t)(BUFFER_BYTES / size);
    void *values = allocate(BUFFER_BYTES, 1);
    bool ok = true;
    for (int64_t done = 0; done < count && ok; done += capacity) {
        const int64_t n = count - done < capacity ? count - done : capacity;
        ok = st_read(f, t, done, n, values, t->type, err);
        for (int64_t i = 0; i < n && ok; i++) {
            const double value = element(values, t->type, i);
            if (impossible(t->name, value, state, c))
                ok = fail(err, "%.200s: tensor '%s' is %g at element %lld", f->path, t->name, value,
                          (long long)done + i);
        }
        const size_t at = (size_t)done * size, bytes = (size_t)n * size;
        if (ok && host != NULL) memcpy((char *)host + at, values, bytes);
        if (ok && host == NULL) state_write(state, offset + at, bytes, values);
    }
    free(values);
    return ok;
}

// Returns whether the file's configuration is *c, apart from fields that only training uses.
static bool same_model(const StFile *f, const Config *c, char *err) {
    Config theirs = config_defaults();
    if (f->config == NULL || !config_from_json(&theirs, f->config, err))
        return fail(err, "%.200s: no configuration", f->path);
    theirs.dropout = c->dropout, theirs.hidden_dropout = c->hidden_dropout;
    theirs.attention_dropout = c->attention_dropout, theirs.init_mode = c->init_mode;
    return config_equal(&theirs, c) || fail(err, "%.200s: is the state of a model with another configuration", f->path);
}

bool load_state(const char *path, State *state, const Config *c, int64_t *seed, real *logits, char *err) {
    StateTensor list[NUM_STATE_TENSORS];
    StFile f;
    if (!st_open(&f, path, err)) return false;
    tensors_of(list, state, c);
    Layout a = state_layout(list, state, c, logits != NULL);
    bool ok = same_model(&f, c, err) && layout_refuse_extra(&f, &a, err);
    for (int i = 0; i < a.n && ok; i++) {
        const StTensor *t = st_find(&f, a.list[i].name);
        const int role = a.roles[i];
        void *host = role == SEED ? (void *)seed : role == LOGITS ? (void *)logits : NULL;
        ok = layout_check(&f, t, &a.list[i], err);
        if (ok && t->type != a.list[i].type) ok = fail(err, "%.200s: tensor '%s' has another type", path, t->name);
        ok = ok && read_state_tensor(&f, t, state, host == NULL ? list[role].offset : 0, host, c, err);
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
    if (!ok) fail(err, "%.200s: is not a state file: it needs a tensor 'state.count' of 1 to %d rows", path, MAX_ROWS);
    st_close(&f);
    return rows;
}

void state_copy(const State *from, int i, State *to, int j, const Config *c) {
    StateTensor source[NUM_STATE_TENSORS], target[NUM_STATE_TENSORS];
    char *buffer = allocate(BUFFER_BYTES, 1);
    tensors_of(source, from, c), tensors_of(target, to, c);
    for (int n = 0; n < NUM_STATE_TENSORS; n++) {
        const size_t bytes = source[n].row_bytes;
        for (size_t slice = 0; slice < source[n].slices; slice++) {
            const size_t read = source[n].offset + (slice * (size_t)from->B + (size_t)i) * bytes;
            const size_t write = target[n].offset + (slice * (size_t)to->B + (size_t)j) * bytes;
            for (size_t done = 0; done < bytes; done += BUFFER_BYTES) {
                const size_t part = bytes - done < BUFFER_BYTES ? bytes - done : BUFFER_BYTES;
                state_read(from, read + done, part, buffer);
                state_write(to, write + done, part, buffer);
            }
        }
    }
    free(buffer);
}
