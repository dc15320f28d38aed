/*
decode.cuh: replaces megalodon_forward for one token of each of up to DECODE_ROWS = 64 sequences that continue from a
state, and megalodon_logits for as few rows.

Idea. Decoding is latency-bound: time goes into reading every weight and the unfinished chunk once, and into waiting for
one result after another. So all layers are one kernel, a thread block to a multiprocessor. It works through a list of
stages, in the order of the formula. A new one begins only where a sum over a whole row (a norm, a product, a softmax)
must be complete. Then all thread blocks wait for each other: a barrier takes about a microsecond.

    x (B,D)
    |
    +-- 1 linear_stage            v = silu(xt Wv' + bv), xt = TimestepNorm(x)
    |     cema_stage              ema = CEMA(xt)                                  updates h
    |   2 linear_stage            with mx = RMSNorm(ema):
    |                             r = mx Wr' + br, y = mx Wh1' + bh1 + x, z = mx Wz' + bz
    |     moments_stage           the moments of x                                updates mean and m2
    |   3 scores_stage            q, k from z; scores = q . keys                  adds k to the keys
    |   4 values_stage            gated = (softmax(scores) values) silu(r)        adds v to the values
    |   5 linear_stage            y += gated Wh2'
    |   6 linear_stage            hidden = silu(u W1') [* (u W3')], u = LayerNorm(y)
    +-- 7 linear_stage            next layer's x = [alpha *] hidden W2' + x

Between the arrival at a barrier and its end a thread block loads what no stage of this token writes: its first weights,
keys or values, into registers. So memory is read while blocks wait. Positions are read from the state on the device, so
the host waits for nothing.

Requires: bfloat16; D, E and F divisible by 32, so that all matrices begin at multiples of 16 bytes, heads of keys and
values divisible by 4; a state with keys and values; no dropout, no chunk-parallel ranks; sm_80.
Measured: see dev/notes/kernels.md.
*/
#pragma once
#include "decode_linear.cuh"

enum { MAX_STAGES = 1024, QUAD = 4, WARP_LOG = 5 }; // QUAD floats in 16 bytes

// ----------------------------------------------------------------------------
// 1. CEMA of a token

typedef struct {
    floatX *ema;                        // (B,D) result; NULL: nothing to do
    float *h;                           // (B,2,N,D) state, updated
    const float *omega;                 // (D)
    Coeffs coeffs;                      // (N,D)
    int N;
} Cema;

enum { CHANNELS = 8, DOWN = WARP / CHANNELS, MODES = 4 };

// MODES of the modes of a channel, DOWN apart, and their state.
typedef struct {
    float p[MODES], q_re[MODES], q_im[MODES], g_re[MODES], g_im[MODES], re[MODES], im[MODES];
} CemaModes;

// A warp's first channels, 8 of a text.
static __device__ int cema_unit(void) { return blockIdx.x + threadIdx.x / WARP * gridDim.x; }

// The modes n, n + DOWN, ... of a lane of a unit; of the last one more than once.
static __device__ void cema_load(CemaModes *m, const Cema &a, int unit, int n, int D) {
    int sets = ceil_div(D, CHANNELS), modes = a.N * D, c = unit % sets * CHANNELS + (int)threadIdx.x % CHANNELS;
    const float *h = a.h + unit / sets * 2 * (size_t)modes;
#pragma unroll
    for (int i = 0; i < MODES; i++, n += DOWN) {
        int at = min_int(n, a.N - 1) * D + c;
        m->p[i] = a.coeffs.p[at], m->q_re[i] = a.coeffs.q_re[at], m->q_im[i] = a.coeffs.q_im[at];
        m->g_re[i] = a.coeffs.g_re[at], m->g_im[i] = a.coeffs.g_im[at], m->re[i] = h[at], m->im[i] = h[modes + at];
    }
}

// Formula: h = q h + p xt, ema = Re sum_n g_n h_n + omega xt, xt = TimestepNorm(x).
// Mapping: a warp has 8 channels of a text; lanes c, c + 8, ... share the modes of channel c, MODES at a time.
// Memory: reads and writes 2 N*D floats of h for each text, reads 5 N*D of coefficients. m: the first modes.
static __device__ void cema_stage(const Cema &a, CemaModes m, int D, const DecodeShared &shared, int B) {
    int sets = ceil_div(D, CHANNELS), lane = threadIdx.x % WARP;
#pragma unroll 1
    for (int unit = cema_unit(); unit < B * sets; unit += DECODE_WARPS * gridDim.x) {
        int b = unit / sets, c = unit % sets * CHANNELS + lane % CHANNELS;
        float *h = a.h + b * 2 * (size_t)a.N * D, *imaginary = h + (size_t)a.N * D;
        float xt = to_float(shared.rows[b * (D + VEC) + c]), omega = a.omega[c], y = 0;
#pragma unroll 1
        for (int n0 = lane / CHANNELS; n0 < a.N; n0 += MODES * DOWN) {
            if (unit != cema_unit() || n0 >= DOWN) cema_load(&m, a, unit, n0, D);
#pragma unroll
            for (int i = 0; i < MODES; i++) {
                int n = n0 + i * DOWN, at = n * D + c;
                float re = m.q_re[i] * m.re[i] - m.q_im[i] * m.im[i] + m.p[i] * xt;
                float im = m.q_re[i] * m.im[i] + m.q_im[i] * m.re[i];
                if (n >= a.N) continue;
                h[at] = re, imaginary[at] = im;
                y += m.g_re[i] * re - m.g_im[i] * im;
            }
        }
        for (int step = CHANNELS; step < WARP; step *= 2) y += __shfl_xor_sync(~0u, y, step);
        if (lane < CHANNELS) a.ema[(size_t)b * D + c] = to_floatX(y + omega * xt);
    }
}

// ----------------------------------------------------------------------------
// 2. the moments of TimestepNorm after this token

typedef struct {
    Norm norm;        // of which mean and m2 are updated
    double *mean, *m2; // the same
    const floatX *x;  // (B,D); NULL: nothing to do
    floatX *out;      // (B,D) norm(x), or NULL
    int D;
} MomentsUpdate;

// Formula: the group's moments are merged with this token's; out = (x - mean) rstd (weight + 1) + bias.
// Mapping: a warp has a group of a text. Memory: reads B*D, writes 2 B*G doubles. Passes: one.
static __device__ void moments_stage(const MomentsUpdate &a, int B, float eps) {
    int g = a.D / a.norm.groups;
#pragma unroll 1
    for (int i = blockIdx.x + threadIdx.x / WARP * gridDim.x; i < B * a.norm.groups; i += DECODE_WARPS * gridDim.x) {
        GroupStats s;
        const floatX *x = a.x + (size_t)i * g;
        float first = decode_first(a.norm, x);
        Moments moments = decode_moments(&s, a.norm, decode_sums(x, g, first), first, i, g, eps);
#pragma unroll 1
        for (int c = threadIdx.x % WARP; a.out && c < g; c += WARP) {
            int d = i % a.norm.groups * g + c;
            float xt = (to_float(x[c]) - s.mean) * s.rstd;
            a.out[(size_t)i * g + c] = to_floatX(xt * (a.norm.weight[d] + 1) + a.norm.bias[d]);
        }
        __syncwarp(); // all lanes have read the moments
        if (threadIdx.x % WARP == 0) a.mean[i] = moments.mean, a.m2[i] = moments.m2;
    }
}

// ----------------------------------------------------------------------------
// 3. and 4. attention of one query to its chunk so far

typedef struct {
    floatX *gated;                     // (B,E) result
    float *scores;                     // (B,H,C) scratch
    float *cache_k, *cache_v;          // (B,C,Z), (B,C,E) state, updated
    const floatX *z, *v, *r_pre;       // (B,Z), (B,E), (B,E)
    const float *gamma, *beta, *table; // (2,Z), (2,Z), (C,dz/2,2)
    int Z, E, H, C;
    // what attention_plan computes
    int blocks, pairs;           // thread blocks that share a head's keys; heads of which all blocks have one
    int each_log, per_log;       // log2 of the lanes that read a key, and of the vectors that each of them reads
    int quads_log, slabs, units; // log2 of the vectors of values in a slab; slabs of a head, of all heads
} Attention;

// The keys of a warp are first, first + stride, ..., of heads pair, pair + a.pairs, ...
typedef struct {
    int pair, first, stride;
} KeyShare;
static __device__ KeyShare key_share(const Attention &a) {
    int together_log = WARP_LOG - a.each_log, part = blockIdx.x % a.blocks * DECODE_WARPS + threadIdx.x / WARP;
    return KeyShare{(int)blockIdx.x / a.blocks, (part << together_log) + ((int)threadIdx.x % WARP >> a.each_log),
                    a.blocks * DECODE_WARPS << together_log};
}
// The key of a lane's vector number t, and the vector's first column in its head.
static __device__ int key_of(const Attention &a, const KeyShare &s, int t) {
    return s.first + (t >> a.per_log) * s.stride;
}
static __device__ int key_column(const Attention &a, int t) {
    return (((t & ((1 << a.per_log) - 1)) << a.each_log) + (threadIdx.x & ((1 << a.each_log) - 1))) * QUAD;
}

// The lane's vectors t, ..., t + LOADS - 1 of its keys of a head.
static __device__ void keys_load(uint4 w[LOADS], const Attention &a, const KeyShare &s, int pair, int t, int last) {
    int dz = a.Z / a.H;
    const float *keys = a.cache_k + (size_t)(pair / a.H) * a.C * a.Z + pair % a.H * dz;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        int j = key_of(a, s, t + i), k = key_column(a, t + i);
        w[i] = make_uint4(0, 0, 0, 0);
        if (j < last && k < dz) w[i] = __ldcs((const uint4 *)(keys + j * a.Z + k));
    }
}

// gamma, beta and rotation of a head in shared memory: (5 dz), as qk_token() wants them.
static __device__ void qk_prepare(const Attention &a, float *shared, int pair, int position) {
    int dz = a.Z / a.H, c = pair % a.H * dz;
#pragma unroll 1
    for (int i = threadIdx.x; i < dz; i += DECODE_THREADS) {
        shared[i] = a.gamma[c + i] + 1, shared[dz + i] = a.gamma[a.Z + c + i] + 1;
        shared[2 * dz + i] = a.beta[c + i], shared[3 * dz + i] = a.beta[a.Z + c + i];
        shared[4 * dz + i] = a.table[(size_t)position * dz + i];
    }
}

// q and k of this token, rounded, in the place of gamma. Each warp computes the norm. See qk.cuh for the formula.
static __device__ void qk_token(float *shared, const floatX *z, int dz, float eps) {
    float squares = 0;
#pragma unroll 4
    for (int i = threadIdx.x % WARP * QUAD; i < dz; i += WARP * QUAD) {
        float x[QUAD];
        load<QUAD>(x, z + i);
        squares += x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3];
    }
    squares = warp_sum(squares);
    float s = squares <= LARGE ? 1 / sqrtf(squares / dz + eps) / sqrtf((float)dz) : NAN;
#pragma unroll 1
    for (int i = threadIdx.x; i < dz; i += DECODE_THREADS) { // pairs of q, then those of k
        int c = i * 2 % dz;
        float *gamma = shared + 2 * i, *beta = gamma + 2 * dz;
        float2 n = load_pair(z + c), turn = *(const float2 *)(shared + 4 * dz + c);
        float2 x = rotate(make_float2(n.x * s * gamma[0] + beta[0], n.y * s * gamma[1] + beta[1]), turn, 1);
        gamma[0] = to_float(to_floatX(x.x)), gamma[1] = to_float(to_floatX(x.y));
    }
}

// NaN if it overflowed: -infinity would become a probability of 0.
static __device__ float finite_or_nan(float x) { return x + (x - x); }

// Formula: scores (B,H,C): q . k_j. q and the key of this token come from z; that key is added to the cache.
// Memory: reads Z floats for each key. w: the first vectors of the first head. shared: qk_prepare's, of the first head.
// Passes, for each head: 1. q and this token's key, in shared memory. 2. dot products.
static __device__ void scores_stage(const Attention &a, uint4 w[LOADS], const DecodeShared &all, int B, float eps) {
    const KeyShare s = key_share(a);
    int dz = a.Z / a.H, lane = threadIdx.x % WARP, warp_first = s.first - (lane >> a.each_log);
    float *q = all.dots, *k = q + dz;
#pragma unroll 1
    for (int pair = s.pair; pair < B * a.H; pair += a.pairs) {
        int b = pair / a.H, c = pair % a.H * dz, last = all.positions[b];
        float *scores = a.scores + (size_t)pair * a.C, sum = 0;
        if (pair != s.pair) {
            qk_prepare(a, q, pair, last);
            __syncthreads();
        }
        // 1.
        qk_token(q, a.z + (size_t)b * a.Z + c, dz, eps);
        __syncthreads();
        if (threadIdx.x < WARP && blockIdx.x % a.blocks == 0) {
            float own = 0;
#pragma unroll 2
            for (int i = lane; i < dz; i += WARP) {
                own += q[i] * k[i];
                a.cache_k[((size_t)b * a.C + last) * a.Z + c + i] = k[i];
            }
            own = warp_sum(own);
            if (lane == 0) scores[last] = finite_or_nan(own);
        }
        // 2.
#pragma unroll 1
        for (int t = 0; warp_first + (t >> a.per_log) * s.stride < last; t += LOADS) {
            float sums[LOADS];
            if (pair != s.pair || t > 0) keys_load(w, a, s, pair, t, last);
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                int at = min_int(key_column(a, t + i), dz - QUAD); // zeros in w beyond dz
                float4 key, query = *(const float4 *)(q + at);
                memcpy(&key, &w[i], sizeof key);
                sums[i] = query.x * key.x + query.y * key.y + query.z * key.z + query.w * key.w;
            }
#pragma unroll
            for (int step = WARP / 2; step > 0; step /= 2) {
                if (step >> a.each_log) continue;
#pragma unroll
                for (int i = 0; i < LOADS; i++) sums[i] += __shfl_xor_sync(~0u, sums[i], step);
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                int j = key_of(a, s, t + i);
                sum += sums[i];
                if ((t + i + 1) & ((1 << a.per_log) - 1)) continue; // the key goes on
                if (j < last && (lane & ((1 << a.each_log) - 1)) == 0) scores[j] = finite_or_nan(sum);
                sum = 0;
            }
        }
        __syncthreads(); // q and k have been read
    }
}

// The column of E of a thread's vector of values; -1: there is none.
static __device__ int value_column(const Attention &a, int unit) {
    int dv = a.E / a.H, i = ((unit % a.slabs << a.quads_log) + (threadIdx.x & ((1 << a.quads_log) - 1))) * QUAD;
    return i < dv ? unit / a.slabs % a.H * dv + i : -1;
}
// Its vectors of every `slices`-th key from j on.
static __device__ void values_load(uint4 w[LOADS], const Attention &a, int unit, int j, int last) {
    int column = value_column(a, unit), b = unit / a.slabs / a.H, slices = DECODE_THREADS >> a.quads_log;
    const float *value = a.cache_v + (size_t)b * a.C * a.E + (size_t)j * a.E + max_int(column, 0);
#pragma unroll
    for (int i = 0; i < LOADS; i++, j += slices, value += slices * a.E) {
        w[i] = make_uint4(0, 0, 0, 0);
        if (j < last) w[i] = __ldcs((const uint4 *)value);
    }
}

// Formula: gated = o silu(r), o = softmax(scores) values. This token's value is added to the cache.
// Mapping: columns are dealt out in slabs of 2 or 4 vectors; a thread has a vector of every `slices`-th key.
// Memory: reads E floats for each key. w: the first vectors of the first unit, which is a slab of a head of a text.
// Passes, for each unit: 1. sums over a thread's keys, relative to the largest score of its warp so far. 2. this token.
//   3. sums over the warp. 4. over the thread block: a lane for each warp adds what it has of a column.
static __device__ void values_stage(const Attention &a, uint4 w[LOADS], const DecodeShared &all) {
    enum { NUMBERS = QUAD + 1 }; // of a vector: its sums and that of the probabilities
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, dv = a.E / a.H, quads = 1 << a.quads_log;
    int slices = DECODE_THREADS >> a.quads_log, slice = threadIdx.x >> a.quads_log;
    float *shared = all.dots, *maxima = shared + DECODE_WARPS * 4 * NUMBERS;
#pragma unroll 1
    for (int unit = blockIdx.x; unit < a.units; unit += gridDim.x) {
        int pair = unit / a.slabs, b = pair / a.H, last = all.positions[b], column = value_column(a, unit);
        int item = threadIdx.x / DECODE_WARPS, out = unit % a.slabs * quads * QUAD + item; // in 4.
        const float *scores = a.scores + (size_t)pair * a.C;
        float max = -INFINITY, sums[NUMBERS] = {}, own[QUAD] = {}, r = 0, own_score = scores[last];
        size_t at = (size_t)b * a.E + pair % a.H * dv + out;
        bool writes = item < quads * QUAD && out < dv;
        if (writes) r = to_float(a.r_pre[at]);
        if (column >= 0) load<QUAD>(own, a.v + (size_t)b * a.E + column);
        // 1.
#pragma unroll 1
        for (int j = slice; j - (lane >> a.quads_log) < last; j += LOADS * slices) {
            float score[LOADS], new_max = max;
            if (unit != (int)blockIdx.x || j != slice) values_load(w, a, unit, j, last);
#pragma unroll
            for (int i = 0; i < LOADS; i++) score[i] = j + i * slices < last ? scores[j + i * slices] : -INFINITY;
#pragma unroll
            for (int i = 0; i < LOADS; i++) new_max = fmaxf(new_max, score[i]);
            new_max = warp_max(new_max);
            float old = exp_fast(max - new_max);
            max = new_max;
#pragma unroll
            for (int u = 0; u < NUMBERS; u++) sums[u] *= old;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                float p = exp_fast(score[i] - max), value[QUAD];
                memcpy(value, &w[i], sizeof value);
#pragma unroll
                for (int u = 0; u < QUAD; u++) sums[u] += p * value[u];
                sums[QUAD] += p;
            }
        }
        // 2.
        float old = max;
        max = fmaxf(max, own_score);
        float share = old > -INFINITY ? exp_fast(old - max) : 0, p = slice == last % slices ? exp_fast(own_score - max) : 0;
#pragma unroll
        for (int u = 0; u < NUMBERS; u++) sums[u] = sums[u] * share + p * (u < QUAD ? own[u % QUAD] : 1);
        if (slice == last % slices && column >= 0)
            *(float4 *)(a.cache_v + ((size_t)b * a.C + last) * a.E + column) = make_float4(own[0], own[1], own[2], own[3]);
        // 3.
#pragma unroll 1
        for (int step = quads; step < WARP; step *= 2) {
#pragma unroll
            for (int u = 0; u < NUMBERS; u++) sums[u] += __shfl_xor_sync(~0u, sums[u], step);
        }
#pragma unroll
        for (int u = 0; u < NUMBERS; u++) {
            if (lane < quads) shared[(warp * quads + lane) * NUMBERS + u] = sums[u];
        }
        if (lane == 0) maxima[warp] = max;
        __syncthreads();
        // 4.
        int from = threadIdx.x % DECODE_WARPS;
        const float *numbers = shared + (from * quads + item / QUAD % quads) * NUMBERS;
        share = exp_fast(maxima[from] - warp_max(maxima[from]));
        float sum = split_sum(share * numbers[QUAD], DECODE_WARPS);
        float o = split_sum(share * numbers[item % QUAD], DECODE_WARPS);
        if (writes && from == 0) a.gated[at] = to_floatX(o / sum * r * sigmoid_fast(r));
        __syncthreads(); // the sums have been read
    }
}

// Deals keys and values out to thread blocks. Slabs have 4 vectors, or 2 if there would be too few.
static void attention_plan(Attention *a, int B, int blocks) {
    int pairs = B * a->H, key = a->Z / a->H / QUAD, value = a->E / a->H / QUAD;
    a->blocks = max_int(blocks / pairs, 1), a->pairs = blocks / a->blocks;
    for (a->each_log = 0; a->each_log < WARP_LOG && 1 << a->each_log < key;) a->each_log++;
    for (a->per_log = 0; 1 << (a->each_log + a->per_log) < key;) a->per_log++;
    a->quads_log = pairs * ceil_div(value, 4) * 2 > blocks ? 2 : 1;
    a->slabs = ceil_div(value, 1 << a->quads_log), a->units = pairs * a->slabs;
}

// ----------------------------------------------------------------------------
// the kernel

typedef enum { LINEAR_STAGE, SCORES_STAGE, VALUES_STAGE } StageKind;
typedef struct {
    int kind;
    Linears linear;        // LINEAR_STAGE
    Cema cema;             // beside it
    MomentsUpdate moments; // beside it
    Attention attention;   // SCORES_STAGE, VALUES_STAGE
} Stage;

static __device__ Stage decode_stages[MAX_STAGES]; // of this token

// What a thread has loaded before a stage begins.
typedef struct {
    uint4 w[LOADS];
    Output output;
    NormPairs norm;
    CemaModes modes;
} Ahead;

// Loads what no stage since the one before the last writes.
static __device__ void stage_prepare(Ahead *ahead, const Stage &a, const DecodeShared &shared, int B) {
    const Attention &at = a.attention;
    if (a.kind == LINEAR_STAGE && (int)blockIdx.x * a.linear.each < a.linear.outputs) {
        linear_load(ahead->w, a.linear, 0, 0);
        ahead->output = output_of(a.linear, 0, 0, threadIdx.x >> a.linear.split_log, B);
    }
    if (a.kind == LINEAR_STAGE) norm_load(&ahead->norm, a.linear.norm, a.linear.K);
    int unit = cema_unit();
    if (a.cema.ema && unit < B * ceil_div(a.linear.K, CHANNELS))
        cema_load(&ahead->modes, a.cema, unit, threadIdx.x % WARP / CHANNELS, a.linear.K);
    if (a.kind == SCORES_STAGE) {
        const KeyShare s = key_share(at);
        if (s.pair < B * at.H) {
            int last = shared.positions[s.pair / at.H];
            keys_load(ahead->w, at, s, s.pair, 0, last), qk_prepare(at, shared.dots, s.pair, last);
        }
    }
    if (a.kind == VALUES_STAGE && (int)blockIdx.x < at.units) {
        int last = shared.positions[blockIdx.x / at.slabs / at.H];
        values_load(ahead->w, at, blockIdx.x, threadIdx.x >> at.quads_log, last);
    }
}

template <int ROWS>
static __device__ void stage_run(const Stage &a, Ahead *ahead, const DecodeShared &shared, int B, float eps) {
    if (a.kind == SCORES_STAGE) return scores_stage(a.attention, ahead->w, shared, B, eps);
    if (a.kind == VALUES_STAGE) return values_stage(a.attention, ahead->w, shared);
    if (a.linear.norm.kind != NO_NORM) norm_run(a.linear.norm, ahead->norm, shared, a.linear.inp, B, a.linear.K, eps);
    if (a.cema.ema) cema_stage(a.cema, ahead->modes, a.linear.K, shared, B);
    linear_stage<ROWS>(a.linear, ahead->w, ahead->output, shared, B);
    if (a.moments.x) moments_stage(a.moments, B, eps);
}

// Barrier of all thread blocks: one says that it has written its results, and waits until all have said so.
static __device__ unsigned decode_arrivals; // of thread blocks, since the program's start
static __device__ void barrier_arrive(void) {
#ifdef __CUDA_ARCH__
    asm volatile("fence.acq_rel.gpu; red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(&decode_arrivals) : "memory");
#endif
}
static __device__ void barrier_wait(unsigned arrivals) {
#ifdef __CUDA_ARCH__
    unsigned now;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(&decode_arrivals) : "memory");
    } while ((int)(now - arrivals) < 0);
#else // the emulator runs a stage at a time
    (void)arrivals, (void)decode_arrivals;
#endif
}

// Stages first, ..., end - 1. count (B): tokens before this one. arrivals: before the first barrier. width: the columns of the
// widest norm. A thread has a word of the next stage's description.
template <int ROWS>
static __global__ void __launch_bounds__(DECODE_THREADS, 1)
    decode_kernel(int first, int end, const int64_t *count, int C, unsigned arrivals, int width, int B, float eps) {
    const int words = sizeof(Stage) / sizeof(uint32_t);
    static_assert(words <= (int)DECODE_THREADS, "a thread has a word of a description");
    extern __shared__ float4 decode_shared[];
    __shared__ Stage stages[2]; // this stage's description and the next one's
    __shared__ int positions[DECODE_ROWS];
    DecodeShared shared;
    shared.dots = (float *)decode_shared, shared.rows = (floatX *)(shared.dots + DECODE_WARPS * 2 * PLACES);
    shared.stats = (GroupStats *)(shared.rows + B * (width + VEC)), shared.positions = positions;
    Ahead ahead = {};
    int word = min_int(threadIdx.x, words - 1);
    ((uint32_t *)&stages[first % 2])[word] = ((const uint32_t *)&decode_stages[first])[word];
    if (count && (int)threadIdx.x < B) positions[threadIdx.x] = (int)(count[threadIdx.x] % C);
    __syncthreads();
#pragma unroll 1
    for (int stage = first;; stage++, arrivals += gridDim.x) {
        stage_prepare(&ahead, stages[stage % 2], shared, B);
        if (threadIdx.x == 0 && stage > first) barrier_wait(arrivals);
        uint32_t next = ((const uint32_t *)&decode_stages[min_int(stage + 1, end - 1)])[word];
        __syncthreads();
        stage_run<ROWS>(stages[stage % 2], &ahead, shared, B, eps);
        if (stage + 1 == end) return;
        ((uint32_t *)&stages[(stage + 1) % 2])[word] = next;
        __syncthreads(); // the thread block has done its part
        if (threadIdx.x == 0) barrier_arrive();
    }
}

// ----------------------------------------------------------------------------
// launches

// Bytes of shared memory for norms of `width` columns and `groups` groups in each of B rows.
static size_t decode_shared_bytes(int width, int groups, int B) {
    return sizeof(float) * (DECODE_WARPS * 2 * PLACES) + B * sizeof(floatX) * (width + VEC) +
           (size_t)B * groups * sizeof(GroupStats);
}

static unsigned decode_arrived; // as decode_arrivals, when what has been launched has run
template <int ROWS>
static void decode_launch(int first, int end, const int64_t *count, int C, int width, size_t shared, int B, double eps) {
    allow_shared(decode_kernel<ROWS>, shared);
#ifdef __CUDACC__
    cudaLaunchAttribute together;
    cudaLaunchConfig_t config = {};
    together.id = cudaLaunchAttributeCooperative, together.val.cooperative = 1;
    config.gridDim = gpu.processors, config.blockDim = DECODE_THREADS, config.dynamicSmemBytes = shared;
    config.attrs = &together, config.numAttrs = 1;
    cudaCheck(cudaLaunchKernelEx(&config, decode_kernel<ROWS>, first, end, count, C,
                                 decode_arrived, width, B, (float)eps));
    decode_arrived += (unsigned)(gpu.processors * (end - first - 1));
#else // the emulator runs thread blocks one after another
    for (int i = first; i < end; i++)
        decode_kernel<ROWS><<<gpu.processors, DECODE_THREADS, shared>>>(i, i + 1, count, C, decode_arrived, width, B,
                                                                    (float)eps);
#endif
}

// Runs n stages, whose descriptions are kept on the device from `first` on: those of a token rarely change. count (B): the
// tokens before this one, in chunks of C, or NULL if no stage needs them.
static void decode_run(Stage *stages, int first, int n, const int64_t *count, int C, int B, double eps) {
    static Stage kept[MAX_STAGES];
    int width = 0, groups = 0;
    assert(first + n <= MAX_STAGES && B <= DECODE_ROWS);
    for (int i = 0; i < n; i++) {
        if (stages[i].kind == LINEAR_STAGE) linear_plan(&stages[i].linear, gpu.processors);
        if (stages[i].kind != LINEAR_STAGE) attention_plan(&stages[i].attention, B, gpu.processors);
    }
    if (memcmp(kept + first, stages, n * sizeof *stages) != 0) {
        memcpy((void *)(kept + first), stages, n * sizeof *stages);
        cudaCheck(cudaMemcpyToSymbolAsync(decode_stages, kept + first, n * sizeof *stages, first * sizeof *stages,
                                          cudaMemcpyHostToDevice, 0));
    }
    for (int i = 0; i < n; i++) {
        const Norm *norm = &stages[i].linear.norm;
        if (norm->kind != NO_NORM) width = max_int(width, stages[i].linear.K), groups = max_int(groups, norm->groups);
    }
    size_t shared = decode_shared_bytes(width, groups, B);
    if (B <= 8)
        decode_launch<8>(first, first + n, count, C, width, shared, B, eps);
    else if (B <= 16)
        decode_launch<16>(first, first + n, count, C, width, shared, B, eps);
    else
        decode_launch<DECODE_ROWS>(first, first + n, count, C, width, shared, B, eps);
}

// ----------------------------------------------------------------------------
// the model

static size_t decode_workspace(Dims d) { return (size_t)min_int(d.B, DECODE_ROWS) * d.H * d.C * sizeof(float); }

static Stage stage_new(StageKind kind) {
    Stage stage;
    memset((void *)&stage, 0, sizeof stage); // padding, too: descriptions are compared
    stage.kind = kind;
    return stage;
}
static Stage linear_stage_new(const floatX *inp, int K, int norm, const float *weight, const float *bias) {
    Stage stage = stage_new(LINEAR_STAGE);
    stage.linear.inp = inp, stage.linear.K = K;
    stage.linear.norm.kind = norm, stage.linear.norm.groups = 1;
    stage.linear.norm.weight = weight, stage.linear.norm.bias = bias;
    return stage;
}
static Linear linear_of(const Model *m, floatX *out, const float *weight, const float *bias, int M) {
    Linear l;
    memset((void *)&l, 0, sizeof l);
    l.out = out, l.weight = rounded(m, weight), l.bias = bias ? rounded(m, bias) : NULL, l.M = M;
    return l;
}
static Norm timestep_norm_of(const float *weight, const float *bias, NormState state, int groups) {
    Norm norm;
    memset((void *)&norm, 0, sizeof norm);
    norm.kind = TIMESTEP_NORM, norm.groups = groups, norm.weight = weight, norm.bias = bias;
    norm.mean = state.mean, norm.m2 = state.m2, norm.count = state.count;
    return norm;
}
static MomentsUpdate moments_of(Norm norm, NormState state, const floatX *x, floatX *out, int D) {
    MomentsUpdate a;
    memset((void *)&a, 0, sizeof a);
    a.norm = norm, a.mean = state.mean, a.m2 = state.m2, a.x = x, a.out = out, a.D = D;
    return a;
}

enum { LAYER_STAGES = 7 };

// block_forward for one token of each sequence. Numbers as above.
static void decode_block(Stage *stages, Model *m, int layer, const State *state) {
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const Dims d = m->dims;
    const floatX *x = m->x[layer];
    NormState moments = norm_state(state, layer);
    Norm norm = timestep_norm_of(w->timenorm_weight, w->timenorm_bias, moments, d.G);
    size_t row = (size_t)layer * d.B;
    float *h = state->h + row * 2 * d.N * d.D, *scores = (float *)workspace(decode_workspace(d));
    // 1.
    stages[0] = linear_stage_new(x, d.D, TIMESTEP_NORM, NULL, NULL);
    stages[0].linear.norm = norm;
    stages[0].linear.of[0] = linear_of(m, s->v, w->wv, w->wv_bias, d.E), stages[0].linear.of[0].silu = 1;
    stages[0].cema = Cema{a->ema, h, w->cema_omega, m->coeffs[layer], d.N};
    // 2.
    stages[1] = linear_stage_new(a->ema, d.D, RMS_NORM, w->rmsnorm_weight, NULL);
    stages[1].linear.of[0] = linear_of(m, a->r_pre, w->wr, w->wr_bias, d.E);
    stages[1].linear.of[1] = linear_of(m, a->y, w->wh1, w->wh1_bias, d.D), stages[1].linear.of[1].residual = x;
    stages[1].linear.of[2] = linear_of(m, a->z, w->wz, w->wz_bias, d.Z);
    stages[1].moments = moments_of(norm, moments, x, NULL, d.D);
    // 3. and 4.
    stages[2] = stage_new(SCORES_STAGE), stages[3] = stage_new(VALUES_STAGE);
    stages[2].attention = stages[3].attention = Attention{
        s->gated, scores, state->k + row * d.C * d.Z, state->v + row * d.C * d.E, a->z, s->v, a->r_pre, w->gamma,
        w->beta, m->rope, d.Z, d.E, d.H, d.C, 0, 0, 0, 0, 0, 0, 0};
    // 5.
    stages[4] = linear_stage_new(s->gated, d.E, NO_NORM, NULL, NULL);
    stages[4].linear.of[0] = linear_of(m, a->y, w->wh2, NULL, d.D), stages[4].linear.of[0].residual = a->y;
    // 6.
    stages[5] = linear_stage_new(a->y, d.D, LAYER_NORM, w->norm_weight, w->norm_bias);
    stages[5].linear.of[0] = linear_of(m, s->hidden, w->fc1, NULL, d.F), stages[5].linear.of[0].silu = 1;
    stages[5].linear.gate = w->fc3 ? rounded(m, w->fc3) : NULL;
    // 7.
    stages[6] = linear_stage_new(s->hidden, d.F, NO_NORM, NULL, NULL);
    stages[6].linear.of[0] = linear_of(m, m->x[layer + 1], w->fc2, NULL, d.D);
    stages[6].linear.of[0].residual = x, stages[6].linear.of[0].scale = w->alpha;
}

// A state of whole chunks has no keys and values.
static bool decode_fast_supports(const Model *m, const State *state) {
    const Dims d = m->dims;
    return d.L == 1 && d.B <= DECODE_ROWS && state && state->k && m->mode == MEGALODON_INFER && m->cp.cp_size == 1 &&
           !m->dropout_on && is_megalodon(&m->config) && d.D % STEP_COLUMNS == 0 && d.E % STEP_COLUMNS == 0 &&
           d.F % STEP_COLUMNS == 0 && d.Z / d.H % QUAD == 0 && d.E / d.H % QUAD == 0 &&
           LAYER_STAGES * m->config.num_layers + 2 <= MAX_STAGES &&
           d.D <= 2 * NORM_PAIRS * DECODE_THREADS &&
           decode_shared_bytes(d.D, d.G, d.B) <= gpu.max_shared - SHARED_DECLARED &&
           5 * (d.Z / d.H) * sizeof(float) <= DECODE_WARPS * 2 * PLACES * sizeof(float);
}

static void decode_token(Model *m, State *state) {
    const Dims d = m->dims;
    int layers = m->config.num_layers, n = LAYER_STAGES * layers;
    NormState moments = norm_state(state, layers);
    Stage *stages = (Stage *)malloc((n + 1) * sizeof *stages);
    assert(stages != NULL);
    for (int l = 0; l < layers; l++) decode_block(stages + l * LAYER_STAGES, m, l, state);
    stages[n] = linear_stage_new(m->x[layers], d.D, NO_NORM, NULL, NULL);
    stages[n].moments = moments_of(
        timestep_norm_of(m->params.final_norm_weight, m->params.final_norm_bias, moments, d.G), moments, m->x[layers],
        m->final, d.D);
    embedding_forward(m->x[0], m->tokens, rounded(m, m->params.embed), embedding_scale(&m->config), d.B, d.D);
    decode_run(stages, 0, n + 1, state->count, d.C, d.B, m->config.norm_eps);
    advance(state->count, d.B, 1);
    free(stages);
}

static bool decode_logits_supports(const Model *m, int rows) {
    return rows <= DECODE_ROWS && m->dims.D % STEP_COLUMNS == 0 && alignment(rounded(m, m->params.output)) >= 16;
}

// logits (rows,V) in scratch.logits, of the rows from `first` on.
static void decode_logits(Model *m, size_t first, int rows) {
    Stage stage = linear_stage_new(m->final + first * m->dims.D, m->dims.D, NO_NORM, NULL, NULL);
    stage.linear.of[0] = linear_of(m, m->scratch.logits, m->params.output, NULL, m->dims.V);
    decode_run(&stage, MAX_STAGES - 1, 1, NULL, 1, rows, 0);
}
