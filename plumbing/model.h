/*
model.h: what a model keeps in memory, and the functions about it that do not depend on the backend. megalodon.c and
megalodon.cu each include it once, so both backends have the same tensors in the same order.

The backend defines before it includes this file:
    floatX          element type of activations and of the rounded weights: real, or bfloat16
    CEMA_BLOCK      tokens of a token block of CEMA; the state before each one is kept for the backward pass
and after it the functions under "provided by the backend" below.
*/
#pragma once
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../megalodon.h"

// Whether no part of the model is replaced.
static inline int is_megalodon(const Config *c) {
    return c->cema == CEMA_COMPLEX && c->timestep_norm == NORM_TIMESTEP && c->attention == ATTENTION_NORMALIZED &&
           c->two_hop == TWO_HOPS;
}

// The letters of megalodon.h. B and L are those of the call.
typedef struct {
    int B, L, D, N, H, Z, E, F, C, G, V;
    AttentionKind attention; // how q and k are computed
} Dims;

static Dims dims_of(const Config *c, int B, int L) {
    Dims d;
    d.B = B, d.L = L, d.D = c->model_dim, d.N = c->cema_ndim, d.H = c->num_heads, d.Z = c->z_dim, d.E = c->value_dim;
    d.F = c->ffn_hidden_dim, d.C = c->chunk_size, d.G = c->norm_num_groups, d.V = c->vocab_size;
    d.attention = c->attention;
    return d;
}

// The number whose root divides queries and keys: dz. Without a norm of z it is sqrt(dz), so that scores are divided by
// sqrt(dz) once.
static double key_width(Dims d) {
    double dz = d.Z / d.H;
    return d.attention == ATTENTION_STANDARD ? sqrt(dz) : dz;
}

// TimestepNorm's state for one norm: count (B) tokens; mean (B,G); m2 (B,G) sum of squared deviations from the mean.
// All NULL: as input a fresh state, as output not kept.
typedef struct {
    int64_t *count;
    double *mean, *m2;
} NormState;

// CEMA's coefficients, each (N, coeffs_stride(D)): p, q = q_re + i q_im, g = gamma/sqrt(N) = g_re + i g_im.
typedef struct {
    real *p, *q_re, *q_im, *g_re, *g_im;
} Coeffs;

// A dropout mask: which random words decide about which elements. Element i of the whole step's batch (all batches and
// ranks) has word i % 4 of Philox's counter (stream, step, layer, i/4), on every thread, rank and backend. This call's
// tensor has `run` elements of each sequence: element j has i = first + j/run * row + j % run.
typedef struct {
    double p; // probability that an element is dropped; 0: no dropout
    uint64_t seed;
    uint32_t stream, step, layer;
    uint64_t first; // i of this call's element 0
    uint64_t row;   // elements of a whole sequence, of all ranks; in attention: of a sequence and head
    size_t run;     // elements of a sequence that this rank has; 0: all elements are contiguous in the batch
} Mask;

enum { DROP_EMBED, DROP_MX, DROP_ATTENTION, DROP_GATED, DROP_MEGA, DROP_HIDDEN, DROP_NFFN }; // places of a mask

// ----------------------------------------------------------------------------
// activations

// One layer's activations: what its backward pass reads.
typedef struct {
    double *norm_mean; // (B,L,G) TimestepNorm's mean
    real *norm_rstd;   // (B,L,G) TimestepNorm's 1/sqrt(var + eps)
    floatX *xt;        // (B,L,D) TimestepNorm(x)
    real *h;           // (B, L/CEMA_BLOCK, 2, N, D) CEMA's state before each token block
    floatX *ema;       // (B,L,D) CEMA(xt)
    real *ema_rstd;    // (B,L) RMSNorm's 1/sqrt(mean square + eps)
    floatX *mx;        // (B,L,D) RMSNorm(CEMA(xt))
    floatX *z;         // (B,L,Z) mx Wz' + bz, before its norm
    floatX *v_pre;     // (B,L,E) xt Wv' + bv, before silu
    floatX *r_pre;     // (B,L,E) mx Wr' + br, before silu
    floatX *o;         // (B,L,E) attention's output
    real *lse;         // (B,L,H) log of the softmax's sum
    floatX *y;         // (B,L,D) output of the attention sub-layer, residual included
    double *ffn_mean;  // (B,L) LayerNorm's mean
    real *ffn_rstd;    // (B,L) LayerNorm's 1/sqrt(var + eps)
    floatX *u;         // (B,L,D) LayerNorm(y)
    floatX *f1;        // (B,L,F) u W1'
    floatX *f3;        // (B,L,F) u W3', with swiglu
    floatX *f2;        // (B,L,D) hidden W2' before alpha, with rescale_nffn
} LayerActs;

// A row of the activation table. The table is in data-flow order. It is used to allocate LayerActs, and to find the
// activations that a dump contains.
typedef struct {
    const char *name;    // in a dump, after "act.layers.i."; NULL: not dumped
    size_t field, size;  // offset of the pointer in LayerActs, bytes of an element; size 0: not stored, see COMPUTED
    char width;          // elements for each token: a letter of Dims, '1', or 'h' for CEMA's states
    Condition condition; // when it exists
} ActivationRow;

#define STORED(field, type) offsetof(LayerActs, field), sizeof(type)
#define COMPUTED 0, 0 // megalodon_activation() computes it again for a dump
static const ActivationRow activation_table[] = {
    {NULL, STORED(norm_mean, double), 'G', ALWAYS},
    {NULL, STORED(norm_rstd, real), 'G', ALWAYS},
    {"mega.timenorm", STORED(xt, floatX), 'D', ALWAYS},
    {NULL, STORED(h, real), 'h', ALWAYS},
    {"mega.cema", STORED(ema, floatX), 'D', ALWAYS},
    {NULL, STORED(ema_rstd, real), '1', ALWAYS},
    {"mega.rmsnorm", STORED(mx, floatX), 'D', ALWAYS},
    {NULL, STORED(z, floatX), 'Z', ALWAYS},
    {"mega.q", COMPUTED, 'Z', ALWAYS}, // before the rotation
    {"mega.k", COMPUTED, 'Z', ALWAYS},
    {NULL, STORED(v_pre, floatX), 'E', ALWAYS},
    {"mega.v", COMPUTED, 'E', ALWAYS}, // after silu
    {NULL, STORED(r_pre, floatX), 'E', ALWAYS},
    {"mega.r", COMPUTED, 'E', ALWAYS},
    {"mega.attn", STORED(o, floatX), 'E', ALWAYS},
    {NULL, STORED(lse, real), 'H', ALWAYS},
    {"mega.out", STORED(y, floatX), 'D', ALWAYS},
    {NULL, STORED(ffn_mean, double), '1', ALWAYS},
    {NULL, STORED(ffn_rstd, real), '1', ALWAYS},
    {"nffn.norm", STORED(u, floatX), 'D', ALWAYS},
    {NULL, STORED(f1, floatX), 'F', ALWAYS},
    {NULL, STORED(f3, floatX), 'F', IF_SWIGLU},
    {NULL, STORED(f2, floatX), 'D', IF_RESCALE},
    {"nffn.out", COMPUTED, 'D', ALWAYS}, // the next layer's input
};
#undef STORED
#undef COMPUTED
enum { NUM_ACTIVATION_ROWS = sizeof activation_table / sizeof activation_table[0] };

static int width_of(const Dims *d, char letter) {
    switch (letter) {
    case 'D': return d->D;
    case 'Z': return d->Z;
    case 'E': return d->E;
    case 'F': return d->F;
    case 'G': return d->G;
    case 'H': return d->H;
    default: return 1;
    }
}

// Buffers that all layers share, one layer after another. Names that begin with d are gradients, and are allocated only
// if there is a backward pass. do_ is dL/do, since `do` is a keyword.
typedef struct {
    floatX *logits; // (logit_rows(V), V)
    floatX *dx;     // (B,L,D) gradient w.r.t. a block's output, then w.r.t. its input
    floatX *dy;     // (B,L,D) gradient w.r.t. the attention sub-layer's output
    floatX *dxt;    // (B,L,D)
    floatX *dmx;    // (B,L,D)
    // used by the attention sub-layer
    floatX *zn;                // (B,L,Z) z after its norm
    real *z_rstd;              // (B,L,H)
    floatX *q, *k;             // (B,L,Z) rotated
    floatX *v;                 // (B,L,E) silu(v_pre)
    floatX *gated;             // (B,L,E) o * r
    floatX *scores;            // (scores_size()) attention's scores, and their gradients
    floatX *dema;              // (B,L,D)
    floatX *dq, *dk, *dz;      // (B,L,Z)
    floatX *do_, *dr_pre, *dv; // (B,L,E)
    Coeffs dcoeffs;
    // used by the FFN sub-layer, in the same memory as those of the attention sub-layer
    floatX *hidden;    // (B,L,F)
    floatX *df1, *df3; // (B,L,F)
    char *workspace;   // (workspace_size()) bytes that one layer function uses while it runs
} Scratch;

struct Model {
    Config config;
    Mode mode;
    int max_B, max_L; // largest batch and length
    Dims dims;        // of the last forward
    int threads;      // CPU: threads that scratch.scores was allocated for

    Tensor *tensors; // (num_tensors) the parameter table
    int num_tensors;
    size_t num_params;
    Shard *shards; // (num_shards) ranges of parameters that this rank updates
    int num_shards;
    size_t shard_size; // elements in them
    MemoryPlan plan;
    real *memory[4]; // PARAMS, GRADS (num_params); MOMENT1, MOMENT2 (shard_size)
    floatX *rounded; // (num_params) copy of PARAMS that matrix products read; PARAMS itself if floatX is real
    Params params, grads;

    char *acts_memory, *work_memory; // one allocation for the activations, one for all other buffers
    LayerActs *acts;                 // (num_layers), all in the same memory unless mode is MEGALODON_TRAIN
    floatX **x;                      // (num_layers+1) of (B,L,D): the blocks' inputs, and the last one's output
    double *final_mean;              // (B,L,G) of the final norm
    real *final_rstd;                // (B,L,G)
    floatX *final;                   // (B,L,D) the final norm's output
    double *losses;                  // (B,L)
    double *sums;                    // (NUM_SUMS) partial sums of megalodon_grad_norm and of the loss
    int32_t *tokens, *targets;       // (B,L)
    real *rope;                      // (C, dz/2, 2) cos and sin
    Coeffs *coeffs;                  // (num_layers)
    int coeffs_valid;                // they belong to the present parameters
    Scratch scratch;
    int acts_layer; // layer whose activations the shared acts_memory holds; -1: none. Not used in mode MEGALODON_TRAIN

    DropoutKey dropout_key;
    int dropout_on;
    State before;                // copy of the last forward's incoming state, without k and v
    int has_before;              // `before` is in use: there was a state, or this is a chunk-parallel rank
    int *past;                   // (B) tokens of the unfinished chunk before the last forward; in host memory
    ChunkParallel cp;            // cp_size 1: none; lengths in the backend's memory
    int64_t cp_start, cp_length; // this rank's first token, and tokens of the whole sequence
    char *exchange;              // of an all-gather: this rank's result, all ranks' results, the combined result
    size_t exchange_bytes;
    int combining; // 1 in megalodon_forward() of a chunk-parallel rank: each layer combines the ranks' states. 0 in
                   // block_again(): `before` has this rank's states by then
    void (*on_grad_ready)(Model *, int bucket); // or NULL
};

// ----------------------------------------------------------------------------
// provided by the backend

static void *memory_new(size_t bytes); // zeroed; NULL if out of memory
static void memory_free(void *memory, size_t bytes);
static void memory_copy(void *dst, const void *src, size_t bytes); // from and to host memory, too
static void memory_clear(void *memory, size_t bytes);
static size_t coeffs_stride(int D);                           // channels, rounded up to whole vectors
static size_t scores_size(const Model *m, Dims d);            // elements of scratch.scores
static size_t workspace_size(const Model *m, Dims d);         // bytes of scratch.workspace
static int logit_rows(int V);                                 // rows of logits that exist at a time
static void params_written(Model *m, size_t first, size_t n); // called after elements of PARAMS have changed
static int backend_open(int allocate); // before a model is planned (0) or allocated (1); returns 0 if out of memory
static int backend_threads(void);      // see Model.threads
static void begin_layers(Model *m);    // called before a public function runs layers
// Seconds of a product of two matrices (side,side), measured PRODUCTS times; 0 if out of memory.
static double product_seconds(int side);
static void read_floatX(real *dst, const floatX *src, size_t n); // copies to host memory
static void block_again(Model *m, int layer); // computes a block's activations, unless they are in memory
static void rope_table(real *table, int C, int dz, double base);
static void cema_coeffs_forward(Coeffs *c, const real *alpha, const real *delta, const real *theta, const real *gamma,
                                CemaKind kind, int D, int N);
static void qk_layer_forward(floatX *q, floatX *k, floatX *zn, real *z_rstd, const floatX *z, const real *gamma,
                             const real *beta, const real *table, const int64_t *count, Dims d, double eps);
static void silu_forward(floatX *out, const floatX *inp, size_t n);
static void layernorm_backward(floatX *dinp, real *dweight, real *dbias, const floatX *dout, const floatX *inp,
                               const real *weight, const double *mean, const real *rstd, int R, int D);
static void copy(floatX *out, const floatX *inp, size_t n);
static void add(floatX *out, const floatX *inp, size_t n);
enum { NUM_SUMS = 1024, PRODUCTS = 10 };

// ----------------------------------------------------------------------------
// memory

// Bump allocator: hands out slices of `memory`, at multiples of 256 bytes. memory NULL: only counts.
typedef struct {
    char *memory;
    size_t used; // bytes
} Arena;

static void *take(Arena *arena, size_t n, size_t size) {
    char *slice = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += (n * size + 255) / 256 * 256;
    return slice;
}
static floatX *take_floatX(Arena *arena, size_t n) { return (floatX *)take(arena, n, sizeof(floatX)); }
static real *take_real(Arena *arena, size_t n) { return (real *)take(arena, n, sizeof(real)); }
static double *take_double(Arena *arena, size_t n) { return (double *)take(arena, n, sizeof(double)); }

static Coeffs take_coeffs(Arena *arena, Dims d) {
    size_t n = (size_t)d.N * coeffs_stride(d.D);
    real *at = take_real(arena, 5 * n);
    Coeffs c = {NULL, NULL, NULL, NULL, NULL};
    if (at) c.p = at, c.q_re = at + n, c.q_im = at + 2 * n, c.g_re = at + 3 * n, c.g_im = at + 4 * n; // contiguous
    return c;
}

static void take_layer_acts(LayerActs *acts, Arena *arena, const Config *c, Dims d) {
    size_t tokens = (size_t)d.B * d.L, blocks = (size_t)d.B * ((d.L + CEMA_BLOCK - 1) / CEMA_BLOCK);
    for (int i = 0; i < NUM_ACTIVATION_ROWS; i++) {
        const ActivationRow *row = &activation_table[i];
        size_t n = row->width == 'h' ? blocks * 2 * d.N * d.D : tokens * (size_t)width_of(&d, row->width);
        if (row->size == 0) continue;
        if ((row->condition == IF_SWIGLU && !c->swiglu) || (row->condition == IF_RESCALE && !c->rescale_nffn)) n = 0;
        void *slice = take(arena, n, row->size);
        memcpy((char *)acts + row->field, &slice, sizeof slice);
    }
}

static void take_acts(Model *m, Arena *arena, Dims d) {
    int layers = m->config.num_layers;
    size_t R = (size_t)d.B * d.L, kept = arena->used;
    for (int l = 0; l < layers; l++) {
        if (m->mode != MEGALODON_TRAIN) arena->used = kept; // every layer gets the same memory
        take_layer_acts(&m->acts[l], arena, &m->config, d);
    }
    for (int l = 0; l <= layers; l++) { // without a backward pass two buffers alternate
        m->x[l] = m->mode != MEGALODON_INFER || l < 2 ? take_floatX(arena, R * d.D) : m->x[l - 2];
    }
    m->final_mean = take_double(arena, R * d.G), m->final_rstd = take_real(arena, R * d.G);
    m->final = take_floatX(arena, R * d.D);
}

// The two sub-layers run one after the other, so their buffers share memory.
static void take_scratch(Model *m, Arena *arena, Dims d) {
    Scratch *s = &m->scratch;
    size_t R = (size_t)d.B * d.L, rows = (size_t)logit_rows(d.V) < R ? (size_t)logit_rows(d.V) : R;
    int backward = m->mode != MEGALODON_INFER;
    size_t start = arena->used;
    s->zn = take_floatX(arena, R * d.Z), s->z_rstd = take_real(arena, R * d.H);
    s->q = take_floatX(arena, R * d.Z), s->k = take_floatX(arena, R * d.Z);
    s->v = take_floatX(arena, R * d.E), s->gated = take_floatX(arena, R * d.E);
    s->scores = take_floatX(arena, scores_size(m, d));
    if (backward) {
        s->dema = take_floatX(arena, R * d.D);
        s->dq = take_floatX(arena, R * d.Z), s->dk = take_floatX(arena, R * d.Z), s->dz = take_floatX(arena, R * d.Z);
        s->do_ = take_floatX(arena, R * d.E), s->dr_pre = take_floatX(arena, R * d.E);
        s->dv = take_floatX(arena, R * d.E);
        s->dcoeffs = take_coeffs(arena, d);
    }
    size_t end = arena->used;
    arena->used = start;
    s->hidden = take_floatX(arena, R * d.F);
    if (backward) s->df1 = take_floatX(arena, R * d.F), s->df3 = take_floatX(arena, R * d.F);
    if (arena->used < end) arena->used = end;
    s->logits = take_floatX(arena, rows * d.V);
    s->workspace = (char *)take(arena, workspace_size(m, d), 1);
    if (!backward) return;
    s->dx = take_floatX(arena, R * d.D), s->dy = take_floatX(arena, R * d.D);
    s->dxt = take_floatX(arena, R * d.D), s->dmx = take_floatX(arena, R * d.D);
}

static void take_work(Model *m, Arena *arena, Dims d) {
    size_t R = (size_t)d.B * d.L, layers = m->config.num_layers;
    take_scratch(m, arena, d);
    m->rope = take_real(arena, (size_t)d.C * (d.Z / d.H));
    for (size_t l = 0; l < layers; l++) m->coeffs[l] = take_coeffs(arena, d);
    m->losses = take_double(arena, R), m->sums = take_double(arena, NUM_SUMS);
    m->tokens = (int32_t *)take(arena, R, sizeof(int32_t)), m->targets = (int32_t *)take(arena, R, sizeof(int32_t));
    void *before = take(arena, state_bytes(&m->config, d.B, 1), 1);
    if (before) m->before = state_point(before, &m->config, d.B, 1);
}

static int shard_rank = 0, shard_ranks = 1;

void megalodon_set_shard(int rank, int ranks) { shard_rank = rank, shard_ranks = ranks; }

// Returns a model with its tables, but without memory for parameters and activations; NULL if out of memory.
static Model *model_outline(const Config *config, Mode mode, int B, int L) {
    size_t layers = (size_t)config->num_layers;
    Model *m = (Model *)calloc(1, sizeof *m);
    if (!m) return NULL;
    m->config = *config, m->mode = mode, m->max_B = B, m->max_L = L, m->acts_layer = -1, m->cp.cp_size = 1;
    m->threads = backend_threads();
    m->tensors = megalodon_tensors(config, &m->num_tensors, &m->num_params);
    m->shards = megalodon_shards(config, shard_rank, shard_ranks, &m->num_shards);
    for (int s = 0; m->shards && s < m->num_shards; s++) m->shard_size += m->shards[s].count;
    m->params.layers = (LayerParams *)calloc(layers, sizeof *m->params.layers);
    m->grads.layers = (LayerParams *)calloc(layers, sizeof *m->grads.layers);
    m->acts = (LayerActs *)calloc(layers, sizeof *m->acts);
    m->x = (floatX **)calloc(layers + 1, sizeof *m->x);
    m->coeffs = (Coeffs *)calloc(layers, sizeof *m->coeffs);
    m->past = (int *)calloc((size_t)B, sizeof *m->past);
    if (m->tensors && m->shards && m->params.layers && m->grads.layers && m->acts && m->x && m->coeffs && m->past)
        return m;
    megalodon_free(m);
    return NULL;
}

// Bytes of n parameters, gradients or moments, rounded up to whole vectors; and of n rounded parameters.
static size_t buffer_bytes(size_t n) { return (n * sizeof(real) + 255) / 256 * 256; }
static size_t rounded_bytes(size_t n) { return sizeof(floatX) < sizeof(real) ? buffer_bytes(n) / 2 : 0; }

// Points the model's tables into its memory. If acts_memory and work_memory are NULL, only computes the plan's sizes.
static void model_layout(Model *m) {
    Dims d = dims_of(&m->config, m->max_B, m->max_L);
    Arena acts = {m->acts_memory, 0}, work = {m->work_memory, 0};
    take_acts(m, &acts, d);
    take_work(m, &work, d);
    m->plan.params = buffer_bytes(m->num_params) + rounded_bytes(m->num_params);
    m->plan.activations = acts.used, m->plan.scratch = work.used;
    if (m->mode == MEGALODON_INFER) return;
    m->plan.grads = buffer_bytes(m->num_params), m->plan.moments = 2 * buffer_bytes(m->shard_size);
}

// Allocates all of the model's memory. Returns 0 if out of memory.
static int model_allocate(Model *m) {
    model_layout(m);
    m->memory[PARAMS] = (real *)memory_new(m->plan.params);
    m->acts_memory = (char *)memory_new(m->plan.activations);
    m->work_memory = (char *)memory_new(m->plan.scratch);
    if (!m->memory[PARAMS] || !m->acts_memory || !m->work_memory) return 0;
    m->rounded = (floatX *)(void *)m->memory[PARAMS];
    if (rounded_bytes(1) > 0) m->rounded = (floatX *)(void *)((char *)m->rounded + buffer_bytes(m->num_params));
    megalodon_point(&m->params, m->memory[PARAMS], &m->config, m->tensors, m->num_tensors);
    if (m->mode != MEGALODON_INFER) {
        m->memory[GRADS] = (real *)memory_new(m->plan.grads);
        m->memory[MOMENT1] = (real *)memory_new(m->plan.moments);
        if (!m->memory[GRADS] || !m->memory[MOMENT1]) return 0;
        m->memory[MOMENT2] = m->memory[MOMENT1] + buffer_bytes(m->shard_size) / sizeof(real);
        megalodon_point(&m->grads, m->memory[GRADS], &m->config, m->tensors, m->num_tensors);
    }
    model_layout(m);
    return 1;
}

void megalodon_free(Model *m) {
    if (!m) return;
    megalodon_chunk_parallel(m, NULL);
    memory_free(m->memory[PARAMS], m->plan.params), memory_free(m->memory[GRADS], m->plan.grads);
    memory_free(m->memory[MOMENT1], m->plan.moments);
    memory_free(m->acts_memory, m->plan.activations), memory_free(m->work_memory, m->plan.scratch);
    free(m->tensors), free(m->shards), free(m->params.layers), free(m->grads.layers), free(m->acts), free(m->x);
    free(m->coeffs), free(m->past);
    free(m);
}

// Copies the elements first .. first + n - 1 that this rank holds to dst, or from src. Returns their number.
static size_t buffer_copy(Model *m, Buffer buffer, size_t first, size_t n, real *dst, const real *src) {
    Shard all = {0, m->num_params}, *held = buffer < MOMENT1 ? &all : m->shards;
    int count = buffer < MOMENT1 ? 1 : m->num_shards;
    size_t copied = 0;
    real *at = m->memory[buffer]; // of the shard
    assert(at && first + n <= m->num_params);
    for (int s = 0; s < count; at += held[s++].count) {
        size_t from = first > held[s].first ? first : held[s].first, to = held[s].first + held[s].count;
        if (first + n < to) to = first + n;
        if (from >= to) continue;
        real *here = at + (from - held[s].first);
        if (dst) memory_copy(dst + (from - first), here, (to - from) * sizeof *dst);
        if (src) memory_copy(here, src + (from - first), (to - from) * sizeof *src);
        copied += to - from;
    }
    return copied;
}

void megalodon_read(Model *m, Buffer buffer, size_t first, size_t n, real *dst) {
    size_t copied = buffer_copy(m, buffer, first, n, dst, NULL);
    assert(copied == n);
    (void)copied;
}

void megalodon_write(Model *m, Buffer buffer, size_t first, size_t n, const real *src) {
    buffer_copy(m, buffer, first, n, NULL, src);
    if (buffer != PARAMS) return;
    params_written(m, first, n);
    m->coeffs_valid = 0;
}

// ----------------------------------------------------------------------------
// states

State *state_new(const Config *c, int B, int whole_chunks) {
    size_t bytes = state_bytes(c, B, whole_chunks);
    State *s = (State *)calloc(1, sizeof *s);
    void *memory = s ? memory_new(bytes) : NULL;
    if (!memory) {
        free(s);
        return NULL;
    }
    *s = state_point(memory, c, B, whole_chunks);
    return s;
}

void state_free(State *s) {
    if (!s) return;
    memory_free(s->memory, s->bytes);
    free(s);
}

// k and v need not be cleared: of them only the first count % C tokens are read.
void state_reset(State *s, int row) {
    size_t moments = (size_t)s->G * sizeof *s->mean, modes = s->modes * sizeof *s->h;
    memory_clear(s->count + row, sizeof *s->count);
    for (size_t i = (size_t)row; i < (size_t)(s->layers + 1) * s->B; i += (size_t)s->B) {
        memory_clear(s->mean + i * s->G, moments), memory_clear(s->m2 + i * s->G, moments);
        if (i < (size_t)s->layers * s->B) memory_clear(s->h + i * s->modes, modes);
    }
}

void state_read(const State *s, size_t first, size_t bytes, void *dst) {
    assert(first + bytes <= s->bytes);
    memory_copy(dst, (char *)s->memory + first, bytes);
}

void state_write(State *s, size_t first, size_t bytes, const void *src) {
    assert(first + bytes <= s->bytes);
    memory_copy((char *)s->memory + first, src, bytes);
}

// TimestepNorm's sums come first, then CEMA's dL/dh. memory NULL: only computes the sizes.
static StateGrad state_grad_point(void *memory, const Config *c, int B) {
    size_t sums = (size_t)(c->num_layers + 1) * B * c->norm_num_groups * 3 * sizeof(double);
    size_t h = (size_t)c->num_layers * B * 2 * c->cema_ndim * c->model_dim * sizeof(real);
    StateGrad g = {B, sums + h, memory, NULL, NULL};
    if (memory) g.sums = (double *)memory, g.h = (real *)(void *)((char *)memory + sums);
    return g;
}

size_t state_grad_bytes(const Config *c, int B) { return state_grad_point(NULL, c, B).bytes; }

StateGrad *state_grad_new(const Config *c, int B) {
    size_t bytes = state_grad_bytes(c, B);
    StateGrad *g = (StateGrad *)calloc(1, sizeof *g);
    void *memory = g ? memory_new(bytes) : NULL;
    if (!memory) {
        free(g);
        return NULL;
    }
    *g = state_grad_point(memory, c, B);
    return g;
}

void state_grad_free(StateGrad *g) {
    if (!g) return;
    memory_free(g->memory, g->bytes);
    free(g);
}

void state_grad_zero(StateGrad *g) { memory_clear(g->memory, g->bytes); }

// The part of a state that belongs to norm number `layer`; num_layers is the final one.
static NormState norm_state(const State *s, int layer) {
    NormState none = {NULL, NULL, NULL};
    if (!s) return none;
    size_t at = (size_t)layer * s->B * s->G;
    NormState state = {s->count, s->mean + at, s->m2 + at};
    return state;
}

// Keeps the incoming state for the backward pass, and for a block's second forward pass. The state of a chunk-parallel
// rank is that before the whole sequence; each layer replaces its slice by the state before this rank's part.
static void keep_state(Model *m, const State *state) {
    State *s = &m->before;
    m->has_before = state != NULL || m->cp.cp_size > 1;
    s->B = m->dims.B;
    if (m->has_before) *s = state_point(s->memory, &m->config, m->dims.B, 1);
    if (state) { // k and v come last in a state's memory
        memory_copy(s->memory, state->memory, s->bytes);
    } else if (m->has_before) {
        memory_clear(s->memory, s->bytes);
    }
}

// Reads from the state how many tokens each sequence's unfinished chunk has: none where all chunks are whole.
static void read_past(Model *m, const State *state) {
    size_t B = (size_t)m->dims.B;
    int64_t *counts = (int64_t *)calloc(B, sizeof *counts);
    assert(counts);
    if (state && state->k) memory_copy(counts, state->count, B * sizeof *counts);
    for (size_t b = 0; b < B; b++) m->past[b] = (int)(counts[b] % m->dims.C);
    free(counts);
}

// Computes CEMA's coefficients, if the parameters have changed since the last forward pass.
static void update_coeffs(Model *m) {
    for (int l = 0; l < m->config.num_layers && !m->coeffs_valid; l++) {
        const LayerParams *w = &m->params.layers[l];
        cema_coeffs_forward(&m->coeffs[l], w->cema_alpha, w->cema_delta, w->cema_theta, w->cema_gamma,
                            m->config.cema, m->config.model_dim, m->config.cema_ndim);
    }
    m->coeffs_valid = 1;
}

// ----------------------------------------------------------------------------
// the variant NORM_LAYER

// timestep_norm_layer_backward() where LayerNorm is in TimestepNorm's place. residuals[1] is dx or NULL.
static void layer_instead_of_timestep_backward(Model *m, floatX *dx, real *dweight, real *dbias, const floatX *dy,
                                               const floatX *const residuals[2], const floatX *x, const real *weight,
                                               const double *mean, const real *rstd) {
    int R = m->dims.B * m->dims.L, D = m->dims.D;
    size_t n = (size_t)R * D;
    layernorm_backward(residuals ? m->scratch.dmx : dx, dweight, dbias, dy, x, weight, mean, rstd, R, D);
    if (!residuals) return;
    if (residuals[1] == dx) add(dx, residuals[0], n);
    if (residuals[1] != dx) copy(dx, residuals[0], n);
    add(dx, m->scratch.dmx, n);
}

// ----------------------------------------------------------------------------
// dropout

void megalodon_dropout(Model *m, const DropoutKey *key) {
    m->dropout_on = key != NULL;
    if (key) m->dropout_key = *key;
}

// The mask of one place in one layer (-1: outside of the layers), for an activation of `width` elements per token.
static Mask mask_of(const Model *m, int layer, int place, double p, int width) {
    uint64_t length = (uint64_t)m->dropout_key.length, start = (uint64_t)(m->dropout_key.start + m->cp_start);
    if (length == 0) length = m->cp.cp_size > 1 ? (uint64_t)m->cp_length : (uint64_t)m->dims.L;
    Mask mask;
    mask.p = m->dropout_on ? p : 0;
    mask.seed = m->dropout_key.seed;
    mask.stream = STREAM_DROPOUT + (uint32_t)place;
    mask.step = (uint32_t)m->dropout_key.step;
    mask.layer = (uint32_t)(layer + 1);
    mask.first = ((uint64_t)m->dropout_key.row * length + start) * (uint64_t)width;
    mask.row = length * (uint64_t)width;
    mask.run = (size_t)m->dims.L * (size_t)width;
    return mask;
}

// The mask of the attention's probabilities, which lie as (B, H, L, C): C for each query of a head.
static Mask mask_of_attention(const Model *m, int layer) {
    Mask mask = mask_of(m, layer, DROP_ATTENTION, m->config.attention_dropout, m->config.chunk_size);
    mask.first += (uint64_t)m->dropout_key.row * (uint64_t)(m->config.num_heads - 1) * mask.row;
    mask.run = 0;
    return mask;
}

// ----------------------------------------------------------------------------
// chunk parallelism and gradient buckets

void megalodon_on_grad_ready(Model *m, void (*callback)(Model *, int bucket)) { m->on_grad_ready = callback; }

// A layer's all-gather moves TimestepNorm's moments (2 doubles per group), its gradient sums (3), or CEMA's states.
int megalodon_chunk_parallel(Model *m, const ChunkParallel *cp) {
    Dims d = dims_of(&m->config, m->max_B, m->max_L);
    size_t lengths = (size_t)m->cp.cp_size * sizeof(int64_t);
    if (m->cp.cp_size > 1) memory_free((void *)m->cp.lengths, lengths), memory_free(m->exchange, m->exchange_bytes);
    memset(&m->cp, 0, sizeof m->cp);
    m->cp.cp_size = 1, m->cp_start = m->cp_length = 0, m->exchange = NULL;
    if (!cp || cp->cp_size == 1) return 1;
    size_t sums = (size_t)d.B * d.G * 3 * sizeof(double), states = (size_t)d.B * 2 * d.N * d.D * sizeof(real);
    m->exchange_bytes = ((size_t)cp->cp_size + 2) * (sums > states ? sums : states);
    lengths = (size_t)cp->cp_size * sizeof(int64_t);
    m->exchange = (char *)memory_new(m->exchange_bytes);
    void *copy = memory_new(lengths);
    if (!m->exchange || !copy) {
        memory_free(m->exchange, m->exchange_bytes), memory_free(copy, lengths);
        m->exchange = NULL;
        return 0;
    }
    memory_copy(copy, cp->lengths, lengths);
    m->cp = *cp, m->cp.lengths = (const int64_t *)copy;
    for (int r = 0; r < cp->cp_size; r++) {
        m->cp_start += r < cp->cp_rank ? cp->lengths[r] : 0;
        m->cp_length += cp->lengths[r];
    }
    return 1;
}

// All-gather of the first `bytes` of m->exchange. Returns (cp_size, bytes): every rank's partial result, in rank order.
static void *all_gather(Model *m, size_t bytes) {
    m->cp.gather(m->cp.context, m->exchange, m->exchange + bytes, bytes);
    return m->exchange + bytes;
}

// Memory for the combined result, after the gathered ones. It starts as a copy of `start`; NULL: as zeros.
static void *combined(Model *m, const void *start, size_t bytes) {
    void *memory = m->exchange + ((size_t)m->cp.cp_size + 1) * bytes;
    if (start) {
        memory_copy(memory, start, bytes);
    } else {
        memory_clear(memory, bytes);
    }
    return memory;
}

static const ActivationRow *activation_row(const char *name) {
    for (int i = 0; i < NUM_ACTIVATION_ROWS; i++) {
        if (activation_table[i].name && strcmp(activation_table[i].name, name) == 0) return &activation_table[i];
    }
    return NULL;
}

int megalodon_activation_width(const Config *config, const char *name) {
    const ActivationRow *row = activation_row(name);
    Dims d = dims_of(config, 1, 1);
    return row ? width_of(&d, row->width) : 0;
}

// Where an activation is in memory; NULL if it is computed when it is dumped.
static const void *stored_activation(const LayerActs *acts, const ActivationRow *row) {
    const void *at = NULL;
    if (row->size > 0) memcpy(&at, (const char *)acts + row->field, sizeof at);
    return at;
}

const char *megalodon_activation_name(int i) {
    for (int row = 0; row < NUM_ACTIVATION_ROWS; row++) {
        if (activation_table[row].name && i-- == 0) return activation_table[row].name;
    }
    return NULL;
}

int megalodon_activation(Model *m, int layer, const char *name, real *dst) {
    size_t n = (size_t)m->dims.B * m->dims.L;
    assert(m->mode != MEGALODON_INFER);
    if (layer < 0) {
        if (strcmp(name, "final_norm") != 0) return 0;
        if (dst) read_floatX(dst, m->final, n * m->dims.D);
        return m->dims.D;
    }
    const ActivationRow *row = activation_row(name);
    if (row == NULL) return 0;
    int width = width_of(&m->dims, row->width);
    if (dst == NULL) return width;
    LayerActs *a = &m->acts[layer];
    LayerParams *w = &m->params.layers[layer];
    Scratch *s = &m->scratch;
    begin_layers(m);
    block_again(m, layer);
    const floatX *src = (const floatX *)stored_activation(a, row);
    if (strcmp(name, "mega.q") == 0 || strcmp(name, "mega.k") == 0) {
        qk_layer_forward(s->q, s->k, s->zn, s->z_rstd, a->z, w->gamma, w->beta, NULL, NULL, m->dims,
                         m->config.norm_eps);
        src = strcmp(name, "mega.q") == 0 ? s->q : s->k;
    } else if (strcmp(name, "mega.v") == 0 || strcmp(name, "mega.r") == 0) {
        silu_forward(s->v, strcmp(name, "mega.v") == 0 ? a->v_pre : a->r_pre, n * width);
        src = s->v;
    } else if (strcmp(name, "nffn.out") == 0) {
        src = m->x[layer + 1];
    }
    read_floatX(dst, src, n * width);
    return width;
}

// ----------------------------------------------------------------------------
// creating a model

MemoryPlan megalodon_memory(const Config *config, Mode mode, int B, int L) {
    MemoryPlan plan = {0, 0, 0, 0, 0};
    Model *m = backend_open(0) ? model_outline(config, mode, B, L) : NULL;
    if (!m) return plan;
    model_layout(m);
    plan = m->plan;
    megalodon_free(m);
    return plan;
}

Model *megalodon_new(const Config *config, Mode mode, int B, int L) {
    Model *m = backend_open(1) ? model_outline(config, mode, B, L) : NULL;
    if (!m) return NULL;
    if (!model_allocate(m)) {
        megalodon_free(m);
        return NULL;
    }
    rope_table(m->rope, config->chunk_size, config->z_dim / config->num_heads, config->rope_base);
    return m;
}

// ----------------------------------------------------------------------------
// the rate of the machine

// Small products do not use the whole machine, so they become larger until the next one would take too long.
double megalodon_product_rate(void) {
    const double most_seconds = 0.1;
    const int largest = megalodon_on_gpu() ? 8192 : 512; // 3 MiB on a CPU, in no memory plan
    double rate = 0, time = 0;
    for (int side = 128; side <= largest && 8 * PRODUCTS * time <= most_seconds; side *= 2) {
        time = product_seconds(side);
        if (time == 0) break;
        rate = 2.0 * side * side * side / time;
    }
    return rate;
}
