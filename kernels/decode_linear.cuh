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

- Thread block i has outputs i*each, ..., so that all blocks read the same number of bytes. Its 16 warps are teams of
  `split` warps. Each team has a group of 8 outputs at a time, and its warps share the columns.
- A warp works on a batch of LOADS = 8 vectors of weights a lane: 4 steps of two groups, or of one group's weights and
  gates. The next batch is loaded meanwhile; the first one of a stage is loaded before the barrier that the stage waits
  for, see decode.cuh. In models of up to 200 million parameters that is most of a block's share.
- Each thread block computes the norm again: cheaper than one more barrier. Its weight and bias are copied to shared
  memory before the barrier, too.

Requires: bfloat16, sm_80, K divisible by 8, weights that begin at multiples of 16 bytes.
Measured: see dev/notes/kernels.md.
*/
#pragma once

enum {
    DECODE_ROWS = 64, // rows, at most
    DECODE_WARPS = 16,
    DECODE_THREADS = DECODE_WARPS * WARP,
    LOADS = 8,                  // vectors that a thread loads at once
    STEPS = 4,                  // of them in a row of weights
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

// A warp's sums of x - first and of their squares, of n elements.
template <int W> static __device__ float2 decode_sums(const floatX *x, int n, float first) {
    float2 sums = {0, 0};
    for (int i = threadIdx.x % WARP * W; i < n; i += WARP * W) {
        float v[W];
        load<W>(v, x + i);
#pragma unroll
        for (int u = 0; u < W; u++) sums.x += v[u] - first, sums.y += (v[u] - first) * (v[u] - first);
    }
    return make_float2(warp_sum(sums.x), warp_sum(sums.y));
}

// Moments of one of the B*groups groups, merged with those of the tokens before. By a warp. Sums are relative to the
// group's first element, so that a large mean costs no digits. NaN if a sum of squares overflows.
static __device__ Moments decode_moments(const Norm &norm, const floatX *inp, int i, int g) {
    const floatX *x = inp + (size_t)i * g;
    float first = norm.kind == RMS_NORM ? 0 : to_float(x[0]);
    float2 sums = g % VEC == 0 ? decode_sums<VEC>(x, g, first) : decode_sums<1>(x, g, first);
    float mean = norm.kind == RMS_NORM ? 0 : sums.x / g;
    Moments own = {(double)first + mean, sums.y <= LARGE ? fmaxf(sums.y - sums.x * mean, 0) : NAN};
    if (norm.kind != TIMESTEP_NORM) return own;
    return merge((double)g * (double)norm.count[i / norm.groups], Moments{norm.mean[i], norm.m2[i]}, g, own);
}
static __device__ GroupStats decode_stats_of(const Norm &norm, Moments moments, int i, int g, float eps) {
    double n = g;
    if (norm.kind == TIMESTEP_NORM) n += (double)g * (double)norm.count[i / norm.groups];
    return GroupStats{(float)moments.mean, 1 / sqrtf((float)(moments.m2 / n) + eps)};
}

// Of all groups of B rows, in shared memory. A warp has every 16th group.
static __device__ void decode_stats(GroupStats *stats, const Norm &norm, const floatX *inp, int B, int K, float eps) {
    int g = K / norm.groups;
    for (int i = threadIdx.x / WARP; i < B * norm.groups; i += DECODE_WARPS) {
        GroupStats own = decode_stats_of(norm, decode_moments(norm, inp, i, g), i, g, eps);
        if (threadIdx.x % WARP == 0) stats[i] = own;
    }
    __syncthreads();
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
    int K, split;
} Linears;

// What the thread blocks of a stage have in shared memory. `weight` and `bias` (K) are the norm's, `stats` (B,groups).
typedef struct {
    float *weight, *bias, *dots;
    GroupStats *stats;
} DecodeShared;

// The map of output o of all maps, which becomes the output of that map; NULL: there is none.
static __device__ const Linear *map_of(const Linears &l, int *o) {
    for (int i = 0; i < MAPS; i++) {
        if (*o < l.of[i].M) return &l.of[i];
        *o -= l.of[i].M;
    }
    return NULL;
}

// The outputs of a thread block are first, ..., end - 1, in groups of 8. A team has every `teams`-th group: one of them
// in a batch if there is a gate, or else two.
typedef struct {
    int first, end, teams, team, part, halves, batches, chunks;
} Share;
static __device__ Share share_of(const Linears &l) {
    Share s;
    int outputs = l.of[0].M + l.of[1].M + l.of[2].M, each = ceil_div(outputs, gridDim.x), warp = threadIdx.x / WARP;
    s.first = min_int(blockIdx.x * each, outputs), s.end = min_int(s.first + each, outputs);
    s.teams = DECODE_WARPS / l.split, s.team = warp / l.split, s.part = warp % l.split;
    s.halves = l.gate ? 1 : 2;
    s.batches = ceil_div(ceil_div(s.end - s.first, GROUP), s.teams * s.halves);
    s.chunks = ceil_div(l.K, l.split * STEPS * STEP_COLUMNS);
    return s;
}
// The first output of a group of a batch.
static __device__ int group_of(const Share &s, int batch, int half, int team) {
    return s.first + ((batch * s.halves + half) * s.teams + team) * GROUP;
}
static __device__ int column_of(const Linears &l, const Share &s, int chunk, int step) {
    return ((chunk * STEPS + step) * l.split + s.part) * STEP_COLUMNS + threadIdx.x % 4 * VEC;
}

// The weights of a batch, of the columns of a chunk; zeros outside the matrix.
static __device__ void linear_load(uint4 w[LOADS], const Linears &l, const Share &s, int batch, int chunk) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int o = group_of(s, batch, l.gate ? 0 : half, s.team) + threadIdx.x % WARP / 4, in_map = o;
        const Linear *map = batch < s.batches && o < s.end ? map_of(l, &in_map) : NULL;
        const floatX *row = map ? (l.gate && half ? l.gate : map->weight) + (size_t)in_map * l.K : NULL;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            int k = column_of(l, s, chunk, step);
            w[half * STEPS + step] = row && k < l.K ? *(const uint4 *)(row + k) : make_uint4(0, 0, 0, 0);
        }
    }
}

// 8 neighbours of a row of norm(inp), rounded; zeros outside the matrix.
static __device__ uint4 linear_input(const Linears &l, const DecodeShared &shared, int b, int k, int B) {
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (b >= B || k >= l.K) return packed;
    packed = *(const uint4 *)(l.inp + (size_t)b * l.K + k);
    if (l.norm.kind == NO_NORM) return packed;
    float x[VEC];
    load<VEC>(x, (const floatX *)&packed);
    int g = l.K / l.norm.groups;
    GroupStats s = shared.stats[b * l.norm.groups + k / g];
#pragma unroll
    for (int u = 0; u < VEC; u++) {
        if (g % VEC != 0) s = shared.stats[b * l.norm.groups + (k + u) / g];
        x[u] = (x[u] - s.mean) * s.rstd * shared.weight[k + u] + shared.bias[k + u];
    }
    store<VEC>((floatX *)&packed, x);
    return packed;
}

// What an output is made of beside its sum, and where the sums of its team's first warp are.
typedef struct {
    floatX *out;
    float bias, scale, residual;
    int silu, place;
} Output;
// Output number i of a batch and a tile, of GROUP outputs of each text of each group.
static __device__ Output output_of(const Linears &l, const Share &s, int batch, int tile, int i, int B) {
    Output output = {};
    int texts = min_int(B - tile * TILE_ROWS, TILE_ROWS), b = i / GROUP % texts, group = i / GROUP / texts;
    int team = group / s.halves, half = group % s.halves, o = group_of(s, batch, half, team) + i % GROUP;
    output.place = (team * l.split * 2 + half) * PLACES + b * GROUP + i % GROUP;
    const Linear *map = team < s.teams && o < s.end ? map_of(l, &o) : NULL;
    if (map == NULL) return output;
    size_t at = (size_t)(tile * TILE_ROWS + b) * map->M + o;
    output.out = map->out + at, output.silu = map->silu, output.scale = 1;
    if (map->bias) output.bias = to_float(map->bias[o]);
    if (map->scale) output.scale = map->scale[o];
    if (map->residual) output.residual = to_float(map->residual[at]);
    return output;
}

// The sum over the warps of a team.
static __device__ float team_sum(const float *dots, int split) {
    float sum = 0;
    for (int p = 0; p < split; p++) sum += dots[p * 2 * PLACES];
    return sum;
}

// Formula: see Linear. w: the first batch. TILES: tiles of 16 texts.
// Passes: 1. tiles of products, in registers. 2. for each tile of texts, the sums of all warps in shared memory; a thread
//   for each output and text adds those of its team and applies silu, gate, scale and residual.
template <int TILES>
static __device__ void linear_stage(const Linears &l, uint4 w[LOADS], const DecodeShared &shared, int B) {
    const Share s = share_of(l);
    int row = threadIdx.x % WARP / 4, pair = threadIdx.x % 4, warp = threadIdx.x / WARP;
    for (int batch = 0; batch < s.batches; batch++) {
        float c[TILES][2][4] = {};
        Output output = output_of(l, s, batch, 0, threadIdx.x, B);
        // 1.
        for (int chunk = 0; chunk < s.chunks; chunk++) {
            int last = chunk + 1 == s.chunks;
            uint4 next[LOADS];
            linear_load(next, l, s, batch + last, last ? 0 : chunk + 1);
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                int k = column_of(l, s, chunk, step);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    uint4 x = linear_input(l, shared, tile * TILE_ROWS + row, k, B);
                    uint4 y = linear_input(l, shared, tile * TILE_ROWS + row + TILE_ROWS / 2, k, B);
                    const uint32_t a[2][4][1] = {{{x.x}, {y.x}, {x.y}, {y.y}}, {{x.z}, {y.z}, {x.w}, {y.w}}};
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint4 v = w[half * STEPS + step];
                        const uint32_t b[2][2][1] = {{{v.x}, {v.y}}, {{v.z}, {v.w}}};
                        multiply<1, 1>(c[tile][half], a[0], b[0]), multiply<1, 1>(c[tile][half], a[1], b[1]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++) w[i] = next[i];
        }
        // 2.
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            if (tile * TILE_ROWS >= B) break;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float *to = shared.dots + (warp * 2 + half) * PLACES + row * GROUP + 2 * pair;
                const float *sums = c[tile][half];
                to[0] = sums[0], to[1] = sums[1], to[PLACES / 2] = sums[2], to[PLACES / 2 + 1] = sums[3];
            }
            __syncthreads();
            int texts = min_int(B - tile * TILE_ROWS, TILE_ROWS);
            for (int i = threadIdx.x; i < s.teams * s.halves * texts * GROUP; i += DECODE_THREADS) {
                if (tile > 0 || i >= DECODE_THREADS) output = output_of(l, s, batch, tile, i, B);
                if (output.out == NULL) continue;
                float y = team_sum(shared.dots + output.place, l.split) + output.bias;
                if (output.silu) y *= sigmoid(y);
                if (l.gate) y *= team_sum(shared.dots + output.place + PLACES, l.split);
                *output.out = to_floatX(y * output.scale + output.residual);
            }
            __syncthreads(); // the sums have been read
        }
    }
}

// The largest split for which a warp's columns fill a batch.
static int linear_split(int K) {
    int split = 1;
    while (split < DECODE_WARPS && split * STEPS * STEP_COLUMNS < K) split *= 2;
    return split;
}
