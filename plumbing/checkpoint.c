// Model files and optimizer files.
#include <inttypes.h> // defines: PRId64
#include <math.h>     // defines: fabs, isfinite, pow
#include <stddef.h>   // defines: offsetof
#include <stdlib.h>   // defines: free
#include <string.h>   // defines: memcpy, strlen
#include "layout.h"
#include "plumbing.h"

enum { PART = 1 << 16 }; // elements that are copied at a time between a file and a model

static Tensor *tensors_of(const Config *c, int *count, size_t *size) {
    Tensor *params = megalodon_tensors(c, count, size);
    if (params == NULL) fatal("out of memory");
    return params;
}

// Writes n elements of a buffer from element `first` on, as F32. Gradients and moments come from the ranks that hold
// them.
static bool write_buffer(StWriter *w, Model *m, Buffer buffer, size_t first, size_t n, char *err) {
    static real values[PART];
    static float floats[PART];
    for (size_t done = 0; done < n; done += PART) {
        const size_t part = n - done < PART ? n - done : PART;
        if (buffer == PARAMS)
            megalodon_read(m, buffer, first + done, part, values);
        else
            ranks_read(m, buffer, first + done, part, values);
        for (size_t i = 0; i < part; i++) {
            floats[i] = (float)values[i];
            if (!isfinite(floats[i]))
                return fail(err, "%.200s: not written: a number of the model is %g", w->path, values[i]);
        }
        if (!st_write(w, floats, part * sizeof *floats, err)) return false;
    }
    return true;
}

// Reads a tensor of a file into a buffer from element `first` on.
static bool read_buffer(StFile *f, const StTensor *t, Model *m, Buffer buffer, size_t first, char *err) {
    static real values[PART];
    const int64_t n = st_count(t);
    for (int64_t done = 0; done < n; done += PART) {
        const int64_t part = n - done < PART ? n - done : PART;
        if (!st_read(f, t, done, part, values, REAL, err)) return false;
        for (int64_t i = 0; i < part; i++) {
            const bool negative = buffer == MOMENT2 && values[i] < 0; // AdamW takes its square root
            if (negative || !isfinite(values[i]))
                return fail(err, "%.200s: tensor '%s' is %s at element %" PRId64, f->path, t->name,
                            negative ? "negative" : "not finite", done + i);
        }
        megalodon_write(m, buffer, first + (size_t)done, (size_t)part, values);
    }
    return true;
}

// ----------------------------------------------------------------------------
// model files: the parameters, and tensors that the released code expects and that follow from the configuration

// A tensor's role in a model file: its index in megalodon_tensors() for a parameter, or one of these.
enum {
    ROPE_FREQS = -1,  // rotary frequencies, (dz/2)
    PRIOR = -2,       // moments of a TimestepNorm before the first token: always zero
    TIED_OUTPUT = -3, // with share_emb, a copy of the embedding
};

// Every TimestepNorm has a bias, which the released code's prior tensors follow.
static bool is_timestep_norm_bias(const ParamRow *row) {
    return row->field == (row->per_layer ? offsetof(LayerParams, timenorm_bias) : offsetof(Params, final_norm_bias));
}

// All tensors of a model file in checkpoint order.
static Layout model_layout(const Config *c, const Tensor *params, int count) {
    Layout a = {0};
    for (int i = 0; i < count; i++) {
        char stem[64];
        layout_add_param(&a, i, ST_F32, "", &params[i]);
        if (i == 0) layout_add(&a, ROPE_FREQS, ST_F32, 1, "", "rope.freqs")->shape[0] = c->z_dim / c->num_heads / 2;
        if (!is_timestep_norm_bias(params[i].row)) continue;
        snprintf(stem, sizeof stem, "%.*s", (int)(strlen(params[i].name) - strlen("bias")), params[i].name);
        layout_add(&a, PRIOR, ST_I64, 0, stem, "prior_count");
        layout_add(&a, PRIOR, ST_F32, 1, stem, "prior_mean")->shape[0] = c->norm_num_groups;
        layout_add(&a, PRIOR, ST_F32, 1, stem, "prior_logv")->shape[0] = c->norm_num_groups;
    }
    if (!c->share_emb) return a;
    StTensor *tied = layout_add(&a, TIED_OUTPUT, ST_F32, 2, "", "output.output.weight");
    memcpy(tied->shape, a.list[0].shape, sizeof tied->shape);
    return a;
}

static double rope_frequency(const Config *c, int64_t j) {
    const int dz = c->z_dim / c->num_heads;
    return pow(c->rope_base, -2.0 * (double)j / dz);
}

// Writes a tensor that is no parameter.
static bool write_derived(StWriter *w, const StTensor *t, int role, const Config *c, char *err) {
    const int64_t zero = 0;
    bool ok = true;
    if (t->type == ST_I64) return st_write(w, &zero, sizeof zero, err);
    for (int64_t i = 0; i < t->shape[0] && ok; i++) {
        const float value = role == PRIOR ? 0 : (float)rope_frequency(c, i);
        ok = st_write(w, &value, sizeof value, err);
    }
    return ok;
}

bool save_model(const char *path, Model *m, const Config *c, char *err) {
    StWriter w;
    int count;
    Tensor *params = tensors_of(c, &count, NULL);
    Layout a = model_layout(c, params, count);
    char *json = config_to_json(c);
    bool ok = st_create(&w, path, json, a.list, a.n, err);
    for (int i = 0; i < a.n && ok; i++) {
        const int role = a.roles[i];
        const Tensor *param = &params[role < 0 ? 0 : role]; // TIED_OUTPUT: the embedding, which is the first
        ok = role == ROPE_FREQS || role == PRIOR ? write_derived(&w, &a.list[i], role, c, err)
                                                 : write_buffer(&w, m, PARAMS, param->offset, param->size, err);
    }
    ok = ok && st_finish(&w, err);
    free(json);
    layout_free(&a);
    free(params);
    return ok;
}

// Checks a tensor that is no parameter: PRIOR must be 0, ROPE_FREQS those of the configuration, TIED_OUTPUT the
// embedding.
static bool check_derived(StFile *f, const StTensor *t, int role, const char *embedding, const Config *c, char *err) {
    static double values[PART], embed[PART];
    const bool half = t->type == ST_BF16 || t->type == ST_F16;
    const double tolerance = role != ROPE_FREQS ? 0 : half ? 0x1p-8 : 2e-6;
    const double subnormal = role == ROPE_FREQS && t->type == ST_F16 ? 0x1p-25 : 0; // half of F16's smallest step
    for (int64_t done = 0; done < st_count(t); done += PART) {
        const int64_t part = st_count(t) - done < PART ? st_count(t) - done : PART;
        if (!st_read(f, t, done, part, values, ST_F64, err)) return false;
        if (role == TIED_OUTPUT && !st_read(f, st_find(f, embedding), done, part, embed, ST_F64, err)) return false;
        for (int64_t i = 0; i < part; i++) {
            const double wanted = role == PRIOR ? 0 : role == TIED_OUTPUT ? embed[i] : rope_frequency(c, done + i);
            if (fabs(values[i] - wanted) <= tolerance * wanted + subnormal) continue;
            return fail(err, "%.200s: tensor '%s' is %g at element %" PRId64 " and should be %g%s%s", f->path, t->name,
                        values[i], done + i, wanted, role == TIED_OUTPUT ? ", as in " : "",
                        role == TIED_OUTPUT ? embedding : "");
        }
    }
    return true;
}

bool load_model(StFile *f, Model *m, const Config *c, char *err) {
    int found = 0, count;
    bool ok = true;
    Tensor *params = tensors_of(c, &count, NULL);
    Layout a = model_layout(c, params, count);
    for (int i = 0; i < a.n && ok; i++) {
        const int role = a.roles[i];
        const StTensor *t = st_find(f, a.list[i].name);
        found += t != NULL;
        if (t == NULL && (role == PRIOR || role == ROPE_FREQS)) continue;
        ok = layout_check(f, t, &a.list[i], err);
        if (ok && t != NULL)
            ok = role >= 0 ? read_buffer(f, t, m, PARAMS, params[role].offset, err)
                           : check_derived(f, t, role, params[0].name, c, err);
    }
    if (ok && found < f->count) ok = layout_refuse_extra(f, &a, err);
    layout_free(&a);
    free(params);
    return ok;
}

void checkpoint_load(StFile *f, Model *model, const Config *config) {
    char err[ST_ERR];
    if (!load_model(f, model, config, err)) fatal("%s", err);
    st_close(f);
}

// ----------------------------------------------------------------------------
// optimizer files: AdamW's moments; the seed and the step, from which random numbers and the position in the data
// follow; the validation loss of that step

// A tensor's role in an optimizer file: its index in megalodon_tensors() for a first moment, that plus their number for
// a second moment, or one of these.
enum { SEED = -1, STEP = -2, VAL_LOSS = -3 };

static Layout optimizer_layout(const Tensor *params, int count) {
    Layout a = {0};
    for (int i = 0; i < count; i++) layout_add_param(&a, i, ST_F32, "moment1.", &params[i]);
    for (int i = 0; i < count; i++) layout_add_param(&a, count + i, ST_F32, "moment2.", &params[i]);
    layout_add(&a, SEED, ST_I64, 0, "", "seed");
    layout_add(&a, STEP, ST_I64, 0, "", "step");
    layout_add(&a, VAL_LOSS, ST_F64, 0, "", "val_loss");
    return a;
}

bool save_optimizer(const char *path, Model *m, const Config *c, int64_t seed, int64_t step, double val_loss,
                    char *err) {
    StWriter w;
    int count;
    size_t size;
    Tensor *params = tensors_of(c, &count, &size);
    Layout a = optimizer_layout(params, count);
    bool ok = st_create(&w, path, NULL, a.list, a.n, err) && write_buffer(&w, m, MOMENT1, 0, size, err) &&
              write_buffer(&w, m, MOMENT2, 0, size, err) && st_write(&w, &seed, sizeof seed, err) &&
              st_write(&w, &step, sizeof step, err) && st_write(&w, &val_loss, sizeof val_loss, err) &&
              st_finish(&w, err);
    layout_free(&a);
    free(params);
    return ok;
}

void send_optimizer(Model *m, const Config *c) {
    static real values[PART];
    size_t size;
    free(tensors_of(c, NULL, &size));
    for (Buffer buffer = MOMENT1; buffer <= MOMENT2; buffer++) {
        for (size_t done = 0; done < size; done += PART)
            ranks_read(m, buffer, done, size - done < PART ? size - done : PART, values);
    }
}

bool load_optimizer(StFile *f, Model *m, const Config *c, int64_t seed, int64_t step, char *err) {
    int64_t stored_seed = -1, stored_step = -1;
    int count;
    Tensor *params = tensors_of(c, &count, NULL);
    Layout a = optimizer_layout(params, count);
    bool ok = layout_refuse_extra(f, &a, err);
    for (int i = 0; i < a.n && ok; i++) {
        const int role = a.roles[i];
        const StTensor *t = st_find(f, a.list[i].name);
        ok = layout_check(f, t, &a.list[i], err);
        if (ok && role >= 0)
            ok = read_buffer(f, t, m, role < count ? MOMENT1 : MOMENT2, params[role % count].offset, err);
        else if (ok && role != VAL_LOSS)
            ok = st_read(f, t, 0, 1, role == SEED ? &stored_seed : &stored_step, ST_I64, err);
    }
    if (ok && (stored_seed != seed || stored_step != step))
        ok = fail(err, "%.200s: is of seed %lld and step %lld, not of --seed %lld and step %lld", f->path,
                  (long long)stored_seed, (long long)stored_step, (long long)seed, (long long)step);
    layout_free(&a);
    free(params);
    return ok;
}
