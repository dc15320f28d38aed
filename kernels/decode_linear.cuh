/*
decode_linear.cuh: linear maps of up to DECODE_ROWS = 64 rows (one token of each text), with the norm before them and the
silu, gate, scale and residual after them, as a stage of the kernel in decode.cuh.

Idea. With so few rows time goes into reading each weight once. Tensor cores multiply 8 rows of weights with up to 16 rows
of x at once (mma.cuh), so that no lane adds up products of its own, and 16 texts cost as much as one. A sum over k has no
order, so a lane may read 8 neighbours of a row of weights with one instruction, and call them whatever columns of the
tile the tensor core expects of it:

    weight (M,K): 8 rows of a group, 32 columns of a step                        x (16,K)
    row 0 | lane 0: 8 numbers | lane 1 | lane 2 | lane 3 |                       text 0 | lane 0 | lane 1 | ...
    row 1 | lane 4            | ...                                              text 1 | lane 4 | ...

- Thread block i has outputs i*each, ..., so that all blocks read the same number of bytes. Its 8 warps are teams of
  `split` warps. Each team has a group of 8 outputs at a time, and its warps share the columns.
- A warp works on a batch of LOADS = 16 vectors of weights a lane: 8 steps of two groups, or 8 steps of one group's weights
  and gates, or 16 steps of a group. The first batch of a stage is loaded before the barrier that the stage waits for, see
  decode.cuh. In models of up to 200 million parameters that is most of a block's share.
- Each thread block computes the norm again, in shared memory: cheaper than one more barrier. Its weight and bias are
  loaded before the barrier, too.

Requires: bfloat16, sm_80, K divisible by 32, weights that begin at multiples of 16 bytes.
Measured: see dev/notes/kernels.md.
*/
#pragma once

enum {
    DECODE_ROWS = 64, // rows, at most
    DECODE_WARPS_LOG = 3, // few: each one has instructions beside its loads
    DECODE_WARPS = 1 << DECODE_WARPS_LOG,
    DECODE_THREADS = DECODE_WARPS * WARP,
    LOADS = 16,                 // vectors that a thread loads at once
    STEPS = LOADS / 2,          // of them in a row of weights
    NORM_PAIRS = 4,             // pairs of columns of a norm that a thread has
    TILE_ROWS = 16, GROUP = 8,  // texts and outputs of a tile
    STEP_COLUMNS = 4 * VEC,     // columns of a tile and of the next one
    PLACES = TILE_ROWS * GROUP, // numbers in a tile of results
    MAPS = 3
};

// ----------------------------------------------------------------------------
// norms

enum { NO_NORM, RMS_NORM, LAYER_NORM, TIMESTEP_NORM };

// norm(x) = (x - mean) rstd (weight + 1) + bias, where mean and rstd are those of a row's group. What is NULL is left out.
typedef struct {
    int kind, groups;          // NO_NORM, ..; 1 but for TIMESTEP_NORM
    const float *weight, *bias; // (K)
    const double *mean, *m2;   // (B,groups) moments of the tokens before, for TIMESTEP_NORM
    const int64_t *count;      // (B) how many these are
} Norm;
typedef struct {
    float mean, rstd;
} GroupStats;

// A warp's sum of x - first and of its square, over n elements.
static __device__ float2 decode_sums(const floatX *x, int n, float first) {
    float2 sums = {0, 0};
#pragma unroll 4
    for (int i = threadIdx.x % WARP; i < n; i += WARP) {
        float v = to_float(x[i]) - first;
        sums.x += v, sums.y += v * v;
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        sums.x += __shfl_xor_sync(~0u, sums.x, step), sums.y += __shfl_xor_sync(~0u, sums.y, step);
    }
    return sums;
}

// Moments of group i of B*groups, merged with those of the tokens before, and `stats` of both. sums: decode_sums of the
// group. NaN if a sum of squares overflows.
static __device__ Moments decode_moments(GroupStats *stats, const Norm &norm, float2 sums, float first, int i, int g,
                                         float eps) {
    float mean = norm.kind == RMS_NORM ? 0 : sums.x / g, m2 = sums.y <= LARGE ? fmaxf(sums.y - sums.x * mean, 0) : NAN;
    Moments all = {(double)first + mean, m2};
    float variance = m2 / g;
    if (norm.kind == TIMESTEP_NORM) {
        double before = (double)g * (double)norm.count[i / norm.groups];
        all = merge(before, Moments{norm.mean[i], norm.m2[i]}, g, all);
        variance = (float)(all.m2 / (before + g));
    }
    stats->mean = (float)all.mean, stats->rstd = 1 / sqrtf(variance + eps);
    return all;
}
// What a group's sums are relative to, so that a large mean costs no digits: its first element.
static __device__ float decode_first(const Norm &norm, const floatX *x) {
    return norm.kind == RMS_NORM ? 0 : to_float(x[0]);
}

// ----------------------------------------------------------------------------
// linear maps

// out (B,M) = scale y + residual, where y = x = norm(inp) weight' + bias, or y = silu(x), or with a gate (M,K)
// y = silu(x) * (norm(inp) gate'). weight (M,K), bias, scale (M), residual (B,M). What is NULL is left out.
typedef struct {
    floatX *out;
    const floatX *weight, *bias, *residual;
    const float *scale;
    int M, silu;
} Linear;
typedef struct {
    Norm norm;
    const floatX *inp, *gate; // (B,K); with a gate there is one map
    Linear of[MAPS];          // unused ones have M = 0
    int K;
    // what linear_plan computes
    int halves; // of a batch: TWO_GROUPS, ..
    int outputs, each, split_log; // of all maps; of a thread block; log2(split)
    int batches, chunks, apart;   // batches of a team; chunks of columns; columns from a lane's vector to its next one
} Linears;
enum { TWO_GROUPS, WITH_GATE, TWO_CHUNKS };

// What a thread block has in shared memory. width: the columns of the widest norm.
typedef struct {
    float *dots;       // (DECODE_WARPS, 2, PLACES) sums; scores_stage and values_stage use it for other numbers
    floatX *rows;      // (B, width + VEC) the norm's result; the padding avoids bank conflicts
    GroupStats *stats; // (B, groups)
    int *positions;    // (B) of this token in its chunk
} DecodeShared;

// weight + 1 and bias of the pairs of columns that a thread normalizes.
typedef struct {
    float2 weight[NORM_PAIRS], bias[NORM_PAIRS];
} NormPairs;
static __device__ int norm_column(int pair) { return 2 * (pair * DECODE_THREADS + (int)threadIdx.x); }
static __device__ void norm_load(NormPairs *pairs, const Norm &norm, int K) {
#pragma unroll
    for (int i = 0; i < NORM_PAIRS; i++) {
        int k = norm_column(i);
        pairs->weight[i] = make_float2(0, 0), pairs->bias[i] = make_float2(0, 0);
        if (norm.weight && k < K) pairs->weight[i] = make_float2(norm.weight[k], norm.weight[k + 1]);
        if (norm.bias && k < K) pairs->bias[i] = make_float2(norm.bias[k], norm.bias[k + 1]);
    }
}

// The norm of B rows, in shared memory. Passes: 1. copy the rows. 2. a warp computes the sums of every DECODE_WARPS-th group.
// 3. a thread computes a group's moments. 4. a thread has NORM_PAIRS pairs of columns.
static __device__ void norm_run(const Norm &norm, const NormPairs &pairs, const DecodeShared &shared, const floatX *inp,
                                int B, int K, float eps) {
    int g = K / norm.groups, stride = K + VEC;
    // 1.
    for (int b = 0; b < B; b++) {
#pragma unroll
        for (int i = 0; i < NORM_PAIRS; i++) {
            int k = norm_column(i);
            if (k < K) *(Pair *)(shared.rows + b * stride + k) = *(const Pair *)(inp + b * K + k);
        }
    }
    __syncthreads();
    // 2.
#pragma unroll 2
    for (int i = threadIdx.x / WARP; i < B * norm.groups; i += DECODE_WARPS) {
        const floatX *x = shared.rows + i / norm.groups * stride + i % norm.groups * g;
        float2 sums = decode_sums(x, g, decode_first(norm, x));
        if (threadIdx.x % WARP == 0) shared.stats[i] = GroupStats{sums.x, sums.y};
    }
    __syncthreads();
    // 3.
#pragma unroll 1
    for (int i = threadIdx.x; i < B * norm.groups; i += DECODE_THREADS) {
        GroupStats own = shared.stats[i];
        float first = decode_first(norm, shared.rows + i / norm.groups * stride + i % norm.groups * g);
        decode_moments(&own, norm, make_float2(own.mean, own.rstd), first, i, g, eps);
        shared.stats[i] = own;
    }
    __syncthreads();
    // 4.
#pragma unroll 1
    for (int b = 0; b < B; b++) {
        const GroupStats *stats = shared.stats + b * norm.groups;
        GroupStats s = stats[0], t = s;
#pragma unroll
        for (int i = 0; i < NORM_PAIRS; i++) {
            int k = norm_column(i);
            if (k >= K) break;
            float x[2];
            load<2>(x, shared.rows + b * stride + k);
            if (norm.groups > 1) s = stats[k / g], t = stats[(k + 1) / g];
            x[0] = (x[0] - s.mean) * s.rstd * (pairs.weight[i].x + 1) + pairs.bias[i].x;
            x[1] = (x[1] - t.mean) * t.rstd * (pairs.weight[i].y + 1) + pairs.bias[i].y;
            store<2>(shared.rows + b * stride + k, x);
        }
    }
    __syncthreads();
}

// The map of output o of all maps, which becomes the output of that map.
static __device__ const Linear *map_of(const Linears &l, int *o) {
    const Linear *map = l.of;
    for (; *o >= map->M; map++) *o -= map->M;
    return map;
}

// The first output of a group. A team has every `teams`-th group of its thread block.
static __device__ int group_of(const Linears &l, int batch, int half, int team) {
    int group = l.halves == TWO_GROUPS ? 2 * batch + half : batch;
    return blockIdx.x * l.each + ((group << (DECODE_WARPS_LOG - l.split_log)) + team) * GROUP;
}
static __device__ int group_end(const Linears &l) { return (blockIdx.x + 1) * l.each; }
// The first column of a lane's vectors in half a batch.
static __device__ int column_of(const Linears &l, int chunk, int half) {
    int part = threadIdx.x / WARP & ((1 << l.split_log) - 1);
    if (l.halves == TWO_CHUNKS) chunk = 2 * chunk + half;
    return ((chunk * STEPS << l.split_log) + part) * STEP_COLUMNS + threadIdx.x % 4 * VEC;
}

// The weights of a batch, of the columns of a chunk. Rows that the thread block does not have are those of its last one;
// vectors outside the matrix are those before.
static __device__ void linear_load(uint4 w[LOADS], const Linears &l, int batch, int chunk) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int o = group_of(l, batch, half, threadIdx.x / WARP >> l.split_log) + threadIdx.x % WARP / 4;
        int k = column_of(l, chunk, half);
        o = min_int(o, min_int(group_end(l), l.outputs) - 1);
        const Linear *map = map_of(l, &o);
        const floatX *row = (half && l.gate ? l.gate : map->weight) + (size_t)o * l.K + k;
#pragma unroll
        for (int step = 0; step < STEPS; step++, k += l.apart, row += l.apart) {
            if (k < l.K) w[half * STEPS + step] = __ldcs((const uint4 *)row);
        }
    }
}

// What an output is made of beside its sum, and where the sums of its team's first warp are.
typedef struct {
    floatX *out;
    float bias, scale, residual;
    int silu, place;
} Output;
// Output number i of a batch and a tile of texts. GROUP outputs of a group come first, then other groups, then texts.
static __device__ Output output_of(const Linears &l, int batch, int tile, int i, int B) {
    Output output = {};
    int teams_log = DECODE_WARPS_LOG - l.split_log, halves_log = l.halves == TWO_GROUPS, rest = i / GROUP;
    int team = rest & ((1 << teams_log) - 1), half = rest >> teams_log & ((1 << halves_log) - 1);
    int text = rest >> (teams_log + halves_log), b = tile * TILE_ROWS + text;
    int o = group_of(l, batch, half, team) + i % GROUP;
    const Linear *map = text < TILE_ROWS && b < B && o < min_int(group_end(l), l.outputs) ? map_of(l, &o) : NULL;
    if (map == NULL) return output;
    size_t at = (size_t)b * map->M + o;
    output.place = ((team << l.split_log) * 2 + half) * PLACES + text * GROUP + i % GROUP;
    output.out = map->out + at, output.silu = map->silu, output.scale = 1;
    if (map->bias) output.bias = to_float(map->bias[o]);
    if (map->scale) output.scale = map->scale[o];
    if (map->residual) output.residual = to_float(map->residual[at]);
    return output;
}

// The sum over the lanes that have the parts of an output; all of them get it.
static __device__ float split_sum(float x, int split) {
#pragma unroll 1
    for (int step = split / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Formula: see Linear. w: the first batch. output: the thread's first one. ROWS: texts, at most.
// Passes: 1. tiles of products, in registers. 2. for each tile of texts, the sums of all warps in shared memory; `split`
//   lanes add those of an output, and apply silu, gate, scale and residual.
template <int ROWS>
static __device__ void linear_stage(const Linears &l, uint4 w[LOADS], Output output, const DecodeShared &shared, int B) {
    enum { TILES = (ROWS + TILE_ROWS - 1) / TILE_ROWS };
    int row = threadIdx.x % WARP / 4, pair = threadIdx.x % 4, warp = threadIdx.x / WARP, split = 1 << l.split_log;
    int stride = l.norm.kind == NO_NORM ? l.K : l.K + VEC;
    const floatX *x = l.norm.kind == NO_NORM ? l.inp : shared.rows;
    if ((int)blockIdx.x * l.each >= l.outputs) return; // all threads of the block
#pragma unroll 1
    for (int batch = 0; batch < l.batches; batch++) {
        float c[TILES][2][4] = {};
        // 1.
#pragma unroll 1
        for (int chunk = 0; chunk < l.chunks; chunk++) {
            if (batch + chunk > 0) linear_load(w, l, batch, chunk);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int k = column_of(l, chunk, half);
                    const floatX *next = x + min_int(tile * TILE_ROWS + row, B - 1) * stride + k; // of text b
                    const floatX *next8 = x + min_int(tile * TILE_ROWS + row + 8, B - 1) * stride + k;
                    uint4 low[STEPS], high[STEPS] = {};
#pragma unroll
                    for (int i = 0; i < STEPS; i++) {
                        if (k + i * l.apart >= l.K) break;
                        low[i] = *(const uint4 *)(next + i * l.apart);
                        if (ROWS > 8) high[i] = *(const uint4 *)(next8 + i * l.apart);
                    }
#pragma unroll
                    for (int i = 0; i < STEPS; i++) {
                        if (k + i * l.apart >= l.K) break;
                        const uint4 v = w[half * STEPS + i];
                        const uint32_t a[2][4][1] = {{{low[i].x}, {high[i].x}, {low[i].y}, {high[i].y}},
                                                     {{low[i].z}, {high[i].z}, {low[i].w}, {high[i].w}}};
                        const uint32_t weights[2][2][1] = {{{v.x}, {v.y}}, {{v.z}, {v.w}}};
                        multiply<1, 1>(c[tile][half], a[0], weights[0]), multiply<1, 1>(c[tile][half], a[1], weights[1]);
                    }
                }
            }
        }
        // 2.
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            int texts = min_int(B - tile * TILE_ROWS, TILE_ROWS);
            if (texts <= 0) break;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float2 *to = (float2 *)(shared.dots + (warp * 2 + half) * PLACES + row * GROUP + 2 * pair);
                const float *sums = c[tile][half];
                if (row < texts) to[0] = make_float2(sums[0], sums[1]);
                if (row + 8 < texts) to[PLACES / 4] = make_float2(sums[2], sums[3]);
            }
            __syncthreads();
            // Lanes of a warp have outputs of their own, or shares of them, so all of them take part.
            int items = (texts * GROUP * (l.halves == TWO_GROUPS ? 2 : 1)) << DECODE_WARPS_LOG;
#pragma unroll 1
            for (int i = threadIdx.x; i < items; i += DECODE_THREADS) {
                if (batch + tile > 0 || i >= DECODE_THREADS) output = output_of(l, batch, tile, i >> l.split_log, B);
                const float *dot = shared.dots + output.place + (i & (split - 1)) * 2 * PLACES;
                float y = output.out ? dot[0] : 0, other = output.out && l.halves != TWO_GROUPS ? dot[PLACES] : 0;
                y = split_sum(l.halves == TWO_CHUNKS ? y + other : y, split) + output.bias;
                if (output.silu) y *= sigmoid_fast(y);
                if (l.halves == WITH_GATE) y *= split_sum(other, split);
                if (output.out && (i & (split - 1)) == 0)
                    *output.out = to_floatX(y * output.scale + output.residual);
            }
            __syncthreads(); // the sums have been read
        }
    }
}

// Deals the outputs out to thread blocks, and each row's columns to the largest `split` for which they fill a batch.
static void linear_plan(Linears *l, int blocks) {
    l->outputs = 0;
    for (const Linear &map : l->of) {
        assert(alignment(map.weight) >= 16); // NULL is aligned
        l->outputs += map.M;
    }
    assert(alignment(l->gate) >= 16 && (l->outputs == 0 || l->K % STEP_COLUMNS == 0));
    l->split_log = 0, l->each = max_int(ceil_div(l->outputs, blocks), 1);
    while (l->split_log < DECODE_WARPS_LOG && (STEPS * STEP_COLUMNS << l->split_log) < l->K) l->split_log++;
    int groups = ceil_div(l->each, GROUP), teams = DECODE_WARPS >> l->split_log;
    l->halves = l->gate ? WITH_GATE : groups > teams ? TWO_GROUPS : TWO_CHUNKS;
    l->batches = ceil_div(groups, l->halves == TWO_GROUPS ? 2 * teams : teams);
    l->chunks = ceil_div(l->K, (l->halves == TWO_CHUNKS ? 2 : 1) * STEPS * STEP_COLUMNS << l->split_log);
    l->apart = STEP_COLUMNS << l->split_log;
}
