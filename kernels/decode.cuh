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

Requires: bfloat16; D, Z, E and F divisible by 8, so that all matrices begin at multiples of 16 bytes, heads of keys and
values divisible by 4; a state with keys and values; no dropout, no chunk-parallel ranks; sm_80.
Measured: see dev/notes/kernels.md.
*/
#pragma once
#include "decode_linear.cuh"

enum { MAX_STAGES = 1024, QUAD = 4 }; // QUAD floats in 16 bytes

// ----------------------------------------------------------------------------
// 1. CEMA of a token

typedef struct {
    floatX *ema;                        // (B,D) result; NULL: nothing to do
    float *h;                           // (B,2,N,D) state, updated
    const float *weight, *bias, *omega; // (D)
    Coeffs coeffs;                      // (N,D)
    int N;
} Cema;

// Formula: h = q h + p xt, ema = Re sum_n g_n h_n + omega xt, xt = TimestepNorm(x).
// Mapping: a warp has 8 channels of a text; lanes c, c + 8, ... share the modes of channel c.
// Memory: reads and writes 2 N*D floats of h for each text, reads 5 N*D of coefficients.
// Passes: 1. load MODES modes of each lane. 2. their new state. 3. the sum of four lanes.
static __device__ void cema_stage(const Cema &a, const Linears &l, const GroupStats *stats, int B) {
    enum { CHANNELS = 8, DOWN = WARP / CHANNELS, MODES = 4 };
    int D = l.K, sets = ceil_div(D, CHANNELS), groups = l.norm.groups, lane = threadIdx.x % WARP;
    size_t modes = (size_t)a.N * D;
    for (int unit = blockIdx.x + threadIdx.x / WARP * gridDim.x; unit < B * sets; unit += DECODE_WARPS * gridDim.x) {
        int b = unit / sets, c = unit % sets * CHANNELS + lane % CHANNELS, inside = c < D;
        if (!inside) c = D - 1;
        GroupStats s = stats[b * groups + c / (D / groups)];
        float *h = a.h + b * 2 * modes, y = 0;
        float xt = (to_float(l.inp[(size_t)b * D + c]) - s.mean) * s.rstd * (a.weight[c] + 1) + a.bias[c];
        xt = to_float(to_floatX(xt));
        for (int n0 = lane / CHANNELS; n0 < a.N; n0 += MODES * DOWN) {
            float p[MODES], q_re[MODES], q_im[MODES], g_re[MODES], g_im[MODES], re[MODES], im[MODES];
            // 1.
#pragma unroll
            for (int i = 0; i < MODES; i++) {
                int n = min_int(n0 + i * DOWN, a.N - 1);
                size_t at = (size_t)n * D + c;
                p[i] = a.coeffs.p[at], q_re[i] = a.coeffs.q_re[at], q_im[i] = a.coeffs.q_im[at];
                g_re[i] = a.coeffs.g_re[at], g_im[i] = a.coeffs.g_im[at];
                re[i] = h[at], im[i] = h[modes + at];
            }
            // 2.
#pragma unroll
            for (int i = 0; i < MODES; i++) {
                int n = n0 + i * DOWN;
                if (n >= a.N || !inside) break;
                size_t at = (size_t)n * D + c;
                float new_re = q_re[i] * re[i] - q_im[i] * im[i] + p[i] * xt;
                float new_im = q_re[i] * im[i] + q_im[i] * re[i];
                h[at] = new_re, h[modes + at] = new_im;
                y += g_re[i] * new_re - g_im[i] * new_im;
            }
        }
        // 3.
        for (int step = CHANNELS; step < WARP; step *= 2) y += __shfl_xor_sync(~0u, y, step);
        if (lane < CHANNELS && inside) a.ema[(size_t)b * D + c] = to_floatX(y + a.omega[c] * xt);
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
    for (int i = blockIdx.x + threadIdx.x / WARP * gridDim.x; i < B * a.norm.groups; i += DECODE_WARPS * gridDim.x) {
        Moments moments = decode_moments(a.norm, a.x, i, g);
        GroupStats s = decode_stats_of(a.norm, moments, i, g, eps);
        for (int c = threadIdx.x % WARP; a.out && c < g; c += WARP) {
            int d = i % a.norm.groups * g + c;
            float x = (to_float(a.x[(size_t)i * g + c]) - s.mean) * s.rstd;
            a.out[(size_t)i * g + c] = to_floatX(x * (a.norm.weight[d] + 1) + a.norm.bias[d]);
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
    const int64_t *count;              // (B) tokens before this one
    int Z, E, H, C;
} Attention;

// Which keys a warp has. Thread blocks share the heads of all texts: `blocks` of them have a head, `pair` is the first
// one of this block, `pairs` apart from the next one. In a warp `each` lanes read a key, 1 << per_log vectors each.
typedef struct {
    int blocks, pair, pairs, each, per_log, first, stride; // keys first, first + stride, ...
} KeyShare;
static __device__ KeyShare key_share(const Attention &a, int B) {
    KeyShare s;
    int quads = a.Z / a.H / QUAD;
    s.blocks = max_int((int)gridDim.x / (B * a.H), 1);
    s.pair = blockIdx.x / s.blocks, s.pairs = (int)gridDim.x / s.blocks;
    for (s.each = 1; s.each < WARP && s.each < quads;) s.each *= 2;
    for (s.per_log = 0; s.each << s.per_log < quads;) s.per_log++;
    s.first = (blockIdx.x % s.blocks * DECODE_WARPS + threadIdx.x / WARP) * (WARP / s.each) + threadIdx.x % WARP / s.each;
    s.stride = s.blocks * DECODE_WARPS * (WARP / s.each);
    return s;
}
// The key of a lane's vector number t, and the vector's first column in its head.
static __device__ int key_of(const KeyShare &s, int t) { return s.first + (t >> s.per_log) * s.stride; }
static __device__ int key_column(const KeyShare &s, int t) {
    return ((t & ((1 << s.per_log) - 1)) * s.each + (threadIdx.x & (s.each - 1))) * QUAD;
}

// The lane's vectors t, ..., t + LOADS - 1 of its keys of a head.
static __device__ void keys_load(uint4 w[LOADS], const Attention &a, const KeyShare &s, int pair, int t, int last) {
    int dz = a.Z / a.H;
    const float *keys = a.cache_k + (size_t)(pair / a.H) * a.C * a.Z + pair % a.H * dz;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        int j = key_of(s, t + i), k = key_column(s, t + i);
        w[i] = j < last && k < dz ? *(const uint4 *)(keys + (size_t)j * a.Z + k) : make_uint4(0, 0, 0, 0);
    }
}

// Formula: scores (B,H,C): q . k_j. q and the key of this token come from z; that key is added to the cache.
// Memory: reads Z floats for each key. w: the first vectors of the first head.
// Passes, for each head: 1. a warp computes q and this token's key, in shared memory. 2. dot products.
static __device__ void scores_stage(const Attention &a, uint4 w[LOADS], float *shared, int B, float eps) {
    const KeyShare s = key_share(a, B);
    int dz = a.Z / a.H, lane = threadIdx.x % WARP, warp_first = s.first - lane / s.each;
    floatX *q = (floatX *)shared, *k = q + dz;
    for (int pair = s.pair; pair < B * a.H; pair += s.pairs) {
        int b = pair / a.H, c = pair % a.H * dz, last = chunk_position(a.count, b, 1, a.C);
        float *scores = a.scores + (size_t)pair * a.C, sum = 0;
        // 1.
        if (threadIdx.x < WARP) {
            const float2 *turns = (const float2 *)a.table + (size_t)last * (dz / 2);
            qk_head(q, k, a.z + (size_t)b * a.Z + c, a.gamma + c, a.beta + c, turns, a.Z, dz, eps);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < dz && blockIdx.x % s.blocks == 0; i += DECODE_THREADS)
            a.cache_k[((size_t)b * a.C + last) * a.Z + c + i] = to_float(k[i]);
        // 2.
        if (pair != s.pair) keys_load(w, a, s, pair, 0, last);
        for (int t = 0; warp_first + (t >> s.per_log) * s.stride <= last; t += LOADS) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                int j = key_of(s, t + i), at = key_column(s, t + i);
                float query[QUAD] = {}, key[QUAD];
                memcpy(key, &w[i], sizeof key);
                if (at < dz) load<QUAD>(query, q + at);
                if (j == last && at < dz) load<QUAD>(key, k + at);
#pragma unroll
                for (int u = 0; u < QUAD; u++) sum += query[u] * key[u];
                if ((t + i + 1) & ((1 << s.per_log) - 1)) continue; // the key goes on
                for (int step = s.each / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
                // NaN if it overflowed: -infinity would become a probability of 0
                if (j <= last && (lane & (s.each - 1)) == 0) scores[j] = sum + (sum - sum);
                sum = 0;
            }
            keys_load(w, a, s, pair, t + LOADS, last);
        }
        __syncthreads(); // q and k have been read
    }
}

// Columns of values are dealt out in slabs of `quads` vectors: 4, or 2 if there would be too few for all thread blocks.
// A thread has a vector of every `slices`-th key.
typedef struct {
    int quads, slabs, units, quad, slice, slices;
} ValueShare;
static __device__ ValueShare value_share(const Attention &a, int B) {
    ValueShare s;
    int quads = a.E / a.H / QUAD;
    s.quads = B * a.H * ceil_div(quads, 4) * 2 > (int)gridDim.x ? 4 : 2;
    s.slabs = ceil_div(quads, s.quads), s.units = B * a.H * s.slabs, s.slices = DECODE_THREADS / s.quads;
    s.quad = threadIdx.x % s.quads, s.slice = threadIdx.x / s.quads;
    return s;
}
// The column of E of a thread's vector; -1: there is none.
static __device__ int value_column(const Attention &a, const ValueShare &s, int unit) {
    int dv = a.E / a.H, i = (unit % s.slabs * s.quads + s.quad) * QUAD;
    return i < dv ? unit / s.slabs % a.H * dv + i : -1;
}
static __device__ void values_load(uint4 w[LOADS], const Attention &a, const ValueShare &s, int unit, int j0, int last) {
    int column = value_column(a, s, unit), b = unit / s.slabs / a.H;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        int j = j0 + i * s.slices;
        const float *value = a.cache_v + ((size_t)b * a.C + j) * a.E + column;
        w[i] = j < last && column >= 0 ? *(const uint4 *)value : make_uint4(0, 0, 0, 0);
    }
}

// Formula: gated = o silu(r), o = softmax(scores) values. This token's value is added to the cache.
// Memory: reads E floats for each key. w: the first vectors of the first unit.
// Passes, for each slab: 1. sums over a thread's keys, relative to the largest score of its warp so far. 2. over the warp.
//   3. over the thread block: 16 lanes add what 16 warps have of a column.
static __device__ void values_stage(const Attention &a, uint4 w[LOADS], float *shared, int B) {
    enum { NUMBERS = QUAD + 1 }; // of a vector: its sums and that of the probabilities
    const ValueShare s = value_share(a, B);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, dv = a.E / a.H;
    for (int unit = blockIdx.x; unit < s.units; unit += gridDim.x) {
        int pair = unit / s.slabs, b = pair / a.H, last = chunk_position(a.count, b, 1, a.C);
        int column = value_column(a, s, unit), out = unit % s.slabs * s.quads * QUAD + (int)threadIdx.x / DECODE_WARPS;
        const float *scores = a.scores + (size_t)pair * a.C;
        float max = -INFINITY, sums[NUMBERS] = {}, own[QUAD] = {}, r = 0;
        size_t at = (size_t)b * a.E + pair % a.H * dv + out; // in 3.
        bool writes = (int)threadIdx.x / DECODE_WARPS < s.quads * QUAD && out < dv;
        if (writes) r = to_float(a.r_pre[at]);
        if (column >= 0) load<QUAD>(own, a.v + (size_t)b * a.E + column);
        if (unit != (int)blockIdx.x) values_load(w, a, s, unit, s.slice, last);
        // 1.
        for (int j0 = s.slice; j0 - lane / s.quads <= last; j0 += LOADS * s.slices) {
            float score[LOADS], new_max = max;
#pragma unroll
            for (int i = 0; i < LOADS; i++) score[i] = j0 + i * s.slices <= last ? scores[j0 + i * s.slices] : -INFINITY;
#pragma unroll
            for (int i = 0; i < LOADS; i++) new_max = fmaxf(new_max, score[i]);
            new_max = warp_max(new_max);
            float old = exp_fast(max - new_max);
            max = new_max;
#pragma unroll
            for (int u = 0; u < NUMBERS; u++) sums[u] *= old;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                int j = j0 + i * s.slices;
                float p = exp_fast(score[i] - max), value[QUAD];
                memcpy(value, &w[i], sizeof value);
                if (j == last && column >= 0) {
                    memcpy(value, own, sizeof value);
                    memcpy(a.cache_v + ((size_t)b * a.C + j) * a.E + column, own, sizeof own);
                }
#pragma unroll
                for (int u = 0; u < QUAD; u++) sums[u] += p * value[u];
                sums[QUAD] += p;
            }
            values_load(w, a, s, unit, j0 + LOADS * s.slices, last);
        }
        // 2.
#pragma unroll
        for (int u = 0; u < NUMBERS; u++) {
            for (int step = s.quads; step < WARP; step *= 2) sums[u] += __shfl_xor_sync(~0u, sums[u], step);
        }
        float *maxima = shared + DECODE_WARPS * 4 * NUMBERS;
#pragma unroll
        for (int u = 0; u < NUMBERS; u++) {
            if (lane < s.quads) shared[(warp * s.quads + lane) * NUMBERS + u] = sums[u];
        }
        if (lane == 0) maxima[warp] = max;
        __syncthreads();
        // 3.
        int from = threadIdx.x % DECODE_WARPS, i = (int)threadIdx.x / DECODE_WARPS;
        const float *numbers = shared + (from * s.quads + i / QUAD % s.quads) * NUMBERS;
        float share = exp_fast(maxima[from] - warp_max(maxima[from]));
        float sum = split_sum(share * numbers[QUAD], DECODE_WARPS);
        float o = split_sum(share * numbers[i % QUAD], DECODE_WARPS) / sum;
        if (writes && from == 0) a.gated[at] = to_floatX(o * (r * sigmoid(r)));
        __syncthreads(); // the sums have been read
    }
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

// What can be loaded before the stages before this one have ended.
static __device__ void stage_prepare(const Stage &a, uint4 w[LOADS], const DecodeShared &shared, int B) {
    const Attention &at = a.attention;
    if (a.kind == LINEAR_STAGE) {
        if (a.linear.batches > 0) linear_load(w, a.linear, 0, 0);
        norm_prepare(a.linear.norm, shared, a.linear.K);
    } else if (a.kind == SCORES_STAGE) {
        const KeyShare s = key_share(at, B);
        int b = min_int(s.pair / at.H, B - 1);
        if (s.pair < B * at.H) keys_load(w, at, s, s.pair, 0, chunk_position(at.count, b, 1, at.C));
    } else {
        const ValueShare s = value_share(at, B);
        int unit = blockIdx.x, b = min_int(unit / s.slabs / at.H, B - 1);
        if (unit < s.units) values_load(w, at, s, unit, s.slice, chunk_position(at.count, b, 1, at.C));
    }
}

template <int TILES>
static __device__ void stage_run(const Stage &a, uint4 w[LOADS], const DecodeShared &shared, int B, float eps) {
    if (a.kind == SCORES_STAGE) return scores_stage(a.attention, w, shared.dots, B, eps);
    if (a.kind == VALUES_STAGE) return values_stage(a.attention, w, shared.dots, B);
    if (a.linear.norm.kind != NO_NORM) norm_run(a.linear.norm, shared, a.linear.inp, B, a.linear.K, eps);
    if (a.cema.ema) cema_stage(a.cema, a.linear, shared.stats, B);
    linear_stage<TILES>(a.linear, w, shared, B);
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

// Copies a stage's description to shared memory.
static __device__ void stage_load(Stage *to, int stage) {
    const uint32_t *from = (const uint32_t *)&decode_stages[stage];
    for (size_t i = threadIdx.x; i < sizeof(Stage) / sizeof *from; i += DECODE_THREADS) ((uint32_t *)to)[i] = from[i];
}

// Stages first, ..., end - 1. arrivals: at the first barrier. width: most columns of a norm.
template <int TILES>
static __global__ void __launch_bounds__(DECODE_THREADS, 1)
    decode_kernel(int first, int end, unsigned arrivals, int width, int B, float eps) {
    extern __shared__ float4 decode_shared[];
    __shared__ Stage stages[2]; // this stage's description and the next one's
    DecodeShared shared;
    shared.dots = (float *)decode_shared, shared.weight = shared.dots + DECODE_WARPS * 2 * PLACES;
    shared.bias = shared.weight + width, shared.rows = (floatX *)(shared.bias + width);
    shared.stats = (GroupStats *)(shared.rows + B * (width + VEC));
    uint4 w[LOADS];
    stage_load(&stages[first % 2], first);
    __syncthreads();
    stage_prepare(stages[first % 2], w, shared, B);
    __syncthreads();
    for (int stage = first; stage < end; stage++, arrivals += gridDim.x) {
        if (stage + 1 < end) stage_load(&stages[(stage + 1) % 2], stage + 1);
        stage_run<TILES>(stages[stage % 2], w, shared, B, eps);
        if (stage + 1 == end) return;
        __syncthreads(); // the thread block has done its part
        if (threadIdx.x == 0) barrier_arrive();
        stage_prepare(stages[(stage + 1) % 2], w, shared, B);
        if (threadIdx.x == 0) barrier_wait(arrivals);
        __syncthreads();
    }
}

// ----------------------------------------------------------------------------
// launches

// Bytes of shared memory for norms of `width` columns and `groups` groups in each of B rows.
static size_t decode_shared_bytes(int width, int groups, int B) {
    return sizeof(float) * (DECODE_WARPS * 2 * PLACES + 2 * (size_t)width) + B * sizeof(floatX) * (width + VEC) +
           (size_t)B * groups * sizeof(GroupStats);
}

static unsigned decode_arrived; // as decode_arrivals, when what has been launched has run
template <int TILES> static void decode_launch(int first, int end, int width, size_t shared, int B, double eps) {
    allow_shared(decode_kernel<TILES>, shared);
#ifdef __CUDACC__
    cudaLaunchAttribute together;
    cudaLaunchConfig_t config = {};
    together.id = cudaLaunchAttributeCooperative, together.val.cooperative = 1;
    config.gridDim = gpu.processors, config.blockDim = DECODE_THREADS, config.dynamicSmemBytes = shared;
    config.attrs = &together, config.numAttrs = 1;
    cudaCheck(cudaLaunchKernelEx(&config, decode_kernel<TILES>, first, end, decode_arrived + gpu.processors, width,
                                 B,
                                 (float)eps));
    decode_arrived += (unsigned)(gpu.processors * (end - first - 1));
#else // the emulator runs thread blocks one after another
    for (int i = first; i < end; i++)
        decode_kernel<TILES><<<gpu.processors, DECODE_THREADS, shared>>>(i, i + 1, decode_arrived, width, B, (float)eps);
#endif
}

// Runs n stages, whose descriptions are kept on the device from `first` on: those of a token rarely change.
static void decode_run(Stage *stages, int first, int n, int B, double eps) {
    static Stage kept[MAX_STAGES];
    int width = 0, groups = 0;
    assert(first + n <= MAX_STAGES && B <= DECODE_ROWS);
    for (int i = 0; i < n; i++) linear_plan(&stages[i].linear, gpu.processors);
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
    if (B <= TILE_ROWS)
        decode_launch<1>(first, first + n, width, shared, B, eps);
    else
        decode_launch<DECODE_ROWS / TILE_ROWS>(first, first + n, width, shared, B, eps);
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
    stages[0].cema = Cema{a->ema, h, w->timenorm_weight, w->timenorm_bias, w->cema_omega, m->coeffs[layer], d.N};
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
        w->beta, m->rope, state->count, d.Z, d.E, d.H, d.C};
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
           !m->dropout_on && is_megalodon(&m->config) && d.D % VEC == 0 && d.Z % VEC == 0 && d.E % VEC == 0 &&
           d.F % VEC == 0 && d.Z / d.H % QUAD == 0 && d.E / d.H % QUAD == 0 &&
           LAYER_STAGES * m->config.num_layers + 2 <= MAX_STAGES &&
           decode_shared_bytes(d.D, d.G, d.B) <= gpu.max_shared - SHARED_DECLARED &&
           2 * (d.Z / d.H) * sizeof(floatX) <= DECODE_WARPS * 2 * PLACES * sizeof(float);
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
    decode_run(stages, 0, n + 1, d.B, m->config.norm_eps);
    advance(state->count, d.B, 1);
    free(stages);
}

static bool decode_logits_supports(const Model *m, int rows) {
    return rows <= DECODE_ROWS && m->dims.D % VEC == 0 && alignment(rounded(m, m->params.output)) >= 16;
}

// logits (rows,V) in scratch.logits, of the rows from `first` on.
static void decode_logits(Model *m, size_t first, int rows) {
    Stage stage = linear_stage_new(m->final + first * m->dims.D, m->dims.D, NO_NORM, NULL, NULL);
    stage.linear.of[0] = linear_of(m, m->scratch.logits, m->params.output, NULL, m->dims.V);
    decode_run(&stage, MAX_STAGES - 1, 1, rows, 0);
}
