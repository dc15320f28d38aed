/*
attention_small.cuh: replaces attention.cuh for small heads, dz <= 64 and dv <= 256, such as those of enwik8 and the
demo. One kernel forward, two backward.

The idea: a product of a small head has few operations for each element of its result, so S, P, dP and dS cost more
time in memory than in tensor cores. Here they stay in registers. A thread block has 64 queries of one head of one
chunk, 16 for each of its four warps: the rows of an mma (mma.cuh). It goes through tiles of 32 keys, up to its last
query. Two buffers in shared memory hold keys and values: while one tile is used, the next is copied to the other one.

    keys      0    32   64   96   128       one head of one chunk
    queries   +----+----+
         0    | 0  | 1  |                   first thread block: tiles 0, 1. Its warps 0 and 1, queries 0 to 31, skip
              |    |    |                   tile 1, which is above the diagonal
        64    +----+----+----+----+
              | 0  | 1  | 2  | 3  |         second thread block: tiles 0 to 3
       128    +----+----+----+----+

Forward, the softmax is online: m is the maximum so far. A tile changes it to m', and multiplies the sums so far by
e^(m - m'). The fragments of C that hold S become the fragments of A that hold P, rounded to bfloat16.

Backward, dS_ij = P_ij (dP_ij - mean_i), and mean_i = sum_j P_ij dP_ij is known after the last tile only. So the mean is
online, too: with c the mean so far, W = sum_j P_ij (dP_ij - c) k_j. A tile changes c to c', and adds (c - c') sum_j
P_ij k_j to W, which is dq_i after the last tile. P (dP - c) is rounded to bfloat16, and P dP is not, so differences
between nearly equal dP are not lost.

    queries kernel: 64 queries, tiles of 32 keys       keys kernel: 64 keys, tiles of 32 queries from the first key on
        P = e^(q k' - lse), dP = dout v'                   P' = e^(k q' - lse)/sum, dP' = v dout'
        dq = W; for the keys kernel: 1/sum of P, mean      dv += P' dout, dk += dS' q

lse is rounded (see attention.cuh), so P is divided by its sum. No two thread blocks add to the same number, so results
have the same bits in every run.

Prediction for enwik8, 64 x 512 tokens, one layer, on an H100. 14.2 million pairs of a query and a key are computed. A
pair has 2 dz operations in a product with q or k, 2 dv in one with v or dout:

    kernel    operations for a pair    products           memory           reads of shared memory
    forward   2 dz + 2 dv = 384        5.4 GFLOP, 11 us    76 MB, 25 us    0.4 GB, 14 us
    queries   6 dz + 2 dv = 640        9.1 GFLOP, 19 us    90 MB, 30 us    0.6 GB, 22 us
    keys      4 dz + 4 dv = 768       10.9 GFLOP, 23 us   115 MB, 38 us    0.9 GB, 30 us

by 480 TFLOP/s (60 % of what wgmma reaches), 3.0 TB/s and 29 TB/s. They overlap, but not wholly: 40, 45 and 60 us.

Requires: bfloat16, sm_80; dz and dv multiples of VEC; chunks of 32 tokens or more; no dropout. dz is filled up with
zeros to 64, dv to 128 or 256. attention_hopper.cuh comes first where it supports a shape, too.
Measured: see dev/notes/kernels.md
*/
#pragma once
#include <cuda_pipeline_primitives.h>
#include <stddef.h>

enum {
    SMALL_ROWS = 64,               // rows of a thread block: queries, or keys
    SMALL_WARPS = SMALL_ROWS / 16, // warps of a thread block
    SMALL_TILE = 32,               // rows of a tile that the thread block goes through: keys, or queries
    SMALL_Z = 64,                  // largest dz
    SMALL_E = 256,                 // largest dv
    SMALL_CHUNK = 32               // fewest tokens of a chunk
};

// Shared memory of a thread block: its own rows and two buffers for the other rows. z: rows of q or k. e: rows of v or
// dout. Rows are padded to avoid shared-memory bank conflicts. The forward kernel has only what is before other_stats.
template <int DV> struct SmallTiles {
    floatX z[SMALL_ROWS][SMALL_Z + VEC], other_z[2][SMALL_TILE][SMALL_Z + VEC], other_e[2][SMALL_TILE][DV + VEC];
    float4 other_stats[2][SMALL_TILE];
    floatX e[SMALL_ROWS][DV + VEC];
};

// The work of a thread block: head h of SMALL_ROWS tokens of a chunk.
typedef struct {
    size_t row, z, e; // the chunk's first row; its first element of head h in (R,Z); in (R,E)
    int n, first;     // tokens of the chunk; the first token of this thread block
    int h, dz, dv;    // columns of head h: dz in (R,Z), dv in (R,E)
    int own, token;   // first row of this warp, of SMALL_ROWS; the lane's first token (the other one is 8 after it)
    int pair;         // number of the lane's pair of columns in a fragment of C
} SmallPlace;

// Thread blocks with most work start first: those of the last queries, if `queries`, or of the first keys.
static __device__ SmallPlace small_place(bool queries, Dims d) {
    int tiles = ceil_div(min_int(d.C, d.L), SMALL_ROWS), chunks = ceil_div(d.L, d.C);
    int tile = blockIdx.x % tiles, chunk = blockIdx.x / tiles / d.H;
    SmallPlace at;
    at.h = blockIdx.x / tiles % d.H, at.dz = d.Z / d.H, at.dv = d.E / d.H;
    at.row = (size_t)(chunk / chunks) * d.L + chunk % chunks * d.C;
    at.z = at.row * d.Z + at.h * at.dz, at.e = at.row * d.E + at.h * at.dv;
    at.n = min_int(d.C, d.L - chunk % chunks * d.C), at.first = (queries ? tiles - 1 - tile : tile) * SMALL_ROWS;
    at.own = threadIdx.y * 16, at.token = at.first + at.own + threadIdx.x / 4, at.pair = threadIdx.x % 4;
    return at;
}

// ----------------------------------------------------------------------------
// tiles: copies, products, results. c, a: as fragments, see mma.cuh.

// Copies `rows` rows of `columns` columns to a tile, asynchronously. The rest of the tile becomes 0.
// Mapping: a thread has a vector of every STEP-th row. The caller must __pipeline_wait_prior(0) and __syncthreads()
//   before it reads the tile.
template <int ROWS, int COLUMNS>
static __device__ void small_copy(floatX (*tile)[COLUMNS + VEC], const floatX *x, int stride, int rows, int columns) {
    enum { ACROSS_ROW = COLUMNS / VEC, STEP = WARP * SMALL_WARPS / ACROSS_ROW };
    const int thread = threadIdx.y * WARP + threadIdx.x, first = thread / ACROSS_ROW, c = thread % ACROSS_ROW * VEC;
    if (c >= columns) rows = 0;
    x += (ptrdiff_t)first * stride + c;
#pragma unroll
    for (int r = 0; r < ROWS; r += STEP, x += (ptrdiff_t)STEP * stride) // where zeros are written, x is not read
        __pipeline_memcpy_async(&tile[first + r][c], x, sizeof(Vec<VEC>), first + r < rows ? 0 : sizeof(Vec<VEC>));
}

// Copies the thread block's own rows of z (R,Z) and, in the backward pass, of e (R,E).
template <int DV>
static __device__ void small_copy_own(SmallTiles<DV> *tiles, const floatX *z, const floatX *e, SmallPlace at, Dims d) {
    const int rows = at.n - at.first;
    small_copy<SMALL_ROWS, SMALL_Z>(tiles->z, z + at.z + (size_t)at.first * d.Z, d.Z, rows, at.dz);
    if (e) small_copy<SMALL_ROWS, DV>(tiles->e, e + at.e + (size_t)at.first * d.E, d.E, rows, at.dv);
}

// Copies rows of z (R,Z) and e (R,E), from token t of the chunk on, to buffer b.
template <int DV>
static __device__ void small_copy_others(SmallTiles<DV> *tiles, int b, const floatX *z, const floatX *e, int t,
                                         SmallPlace at, Dims d) {
    small_copy<SMALL_TILE, SMALL_Z>(tiles->other_z[b], z + at.z + (size_t)t * d.Z, d.Z, at.n - t, at.dz);
    small_copy<SMALL_TILE, DV>(tiles->other_e[b], e + at.e + (size_t)t * d.E, d.E, at.n - t, at.dv);
}

// c (16,N) += A (16,K) B', with A and B (N,K) in shared memory.
template <int N, int K>
static __device__ void small_product(float (*c)[4], const floatX (*A)[K + VEC], const floatX (*B)[K + VEC]) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t a[4][1];
        load_fragment<false>(a, &A[0][k], K + VEC);
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t w[4][1];
            load_fragment<false>(w, &B[n][k], K + VEC);
            const uint32_t b[2][2][1] = {{{w[0][0]}, {w[2][0]}}, {{w[1][0]}, {w[3][0]}}};
            multiply<1, 1>(c[n / 8], a, b[0]), multiply<1, 1>(c[n / 8 + 1], a, b[1]);
        }
    }
}

// c[i] (16,N) += a[i] (16,K) B for i < COUNT, with a in registers and B (K,N) in shared memory.
template <int COUNT, int N, int K>
static __device__ void small_product_of(float (*c)[N / 8][4], const uint32_t (*a)[K / 16][4][1],
                                        const floatX (*B)[N + VEC]) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t w[4][1];
            load_fragment<true>(w, &B[k][n], N + VEC);
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                multiply<1, 1>(c[i][n / 8], a[i][k / 16], w), multiply<1, 1>(c[i][n / 8 + 1], a[i][k / 16], w + 2);
            }
        }
    }
}

// Rounds x (16,K), in the layout of C, to the fragments of A: two fragments of C that are side by side are one of A.
template <int K> static __device__ void small_fragments(uint32_t (*a)[4][1], const float (*x)[4]) {
#pragma unroll
    for (int n = 0; n < K / 8; n++) {
        split<1>(a[n / 2][n % 2 * 2], x[n][0], x[n][1]);
        split<1>(a[n / 2][n % 2 * 2 + 1], x[n][2], x[n][3]);
    }
}

// Writes a warp's c (16,N), of which `rows` rows and `columns` columns exist, in vectors, by way of 16 rows of shared
// memory that no other warp reads.
template <int N>
static __device__ void small_store(floatX *out, int stride, int rows, int columns, const float (*c)[4],
                                   floatX (*tile)[N + VEC]) {
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4;
    __syncwarp(); // all lanes have read what was in the tile
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
        *(Pair *)&tile[row][8 * n + 2 * pair] = Pair{{to_floatX(c[n][0]), to_floatX(c[n][1])}};
        *(Pair *)&tile[row + 8][8 * n + 2 * pair] = Pair{{to_floatX(c[n][2]), to_floatX(c[n][3])}};
    }
    __syncwarp();
#pragma unroll
    for (int i0 = 0; i0 < 16 * N / VEC; i0 += WARP) {
        int i = i0 + threadIdx.x, r = i / (N / VEC), column = i % (N / VEC) * VEC;
        if (r < rows && column < columns)
            *(Vec<VEC> *)(out + (size_t)r * stride + column) = *(const Vec<VEC> *)&tile[r][column];
    }
}

// ----------------------------------------------------------------------------
// forward

// Formula: S = q k', o_i = sum_j P_ij v_j, P = softmax(S), over j <= i; lse_i = log sum_j e^(S_ij).
// Mapping: a thread block has 64 queries of a head of a chunk, a warp 16. Four lanes share two queries: each has every
//   fourth pair of keys.
// Memory: reads q, k, v, writes o, lse. k and v are read by all thread blocks of a chunk, mostly from the L2 cache.
// Passes: 1. the first tile's copy begins. For each tile: 2. S. 3. online softmax. 4. o += P v. Then: 5. store.
template <int DV>
static __global__ void __launch_bounds__(WARP *SMALL_WARPS, DV > 128 ? 2 : 3)
    attention_small_forward_kernel(floatX *o, float *lse, const floatX *q, const floatX *k, const floatX *v, Dims d) {
    extern __shared__ float4 small_shared[];
    SmallTiles<DV> *tiles = (SmallTiles<DV> *)small_shared;
    const SmallPlace at = small_place(true, d);
    if (at.first >= at.n) return;
    const int end = min_int(at.first + SMALL_ROWS, at.n); // of the keys
    float out[1][DV / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    // 1.
    small_copy_own<DV>(tiles, q, NULL, at, d);
    small_copy_others<DV>(tiles, 0, k, v, 0, at, d), __pipeline_commit();
    for (int j0 = 0, b = 0; j0 < end; j0 += SMALL_TILE, b ^= 1) {
        __pipeline_wait_prior(0);
        __syncthreads(); // all threads' copies are complete, and no warp reads the other buffer
        if (j0 + SMALL_TILE < end)
            small_copy_others<DV>(tiles, b ^ 1, k, v, j0 + SMALL_TILE, at, d), __pipeline_commit();
        if (j0 > at.first + at.own + 15) continue; // all keys are after this warp's queries
        // 2.
        float s[SMALL_TILE / 8][4] = {};
        uint32_t p[1][SMALL_TILE / 16][4][1];
        small_product<SMALL_TILE, SMALL_Z>(s, tiles->z + at.own, tiles->other_z[b]);
        // 3.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Of the lane's columns, 8 n and 8 n + 1 from 2 pair on, the last that the query sees.
            int last = at.token + 8 * half - j0 - 2 * at.pair;
            float new_max = max[half];
#pragma unroll
            for (int i = 0; i < SMALL_TILE / 4; i++) {
                float x = s[i / 2][2 * half + i % 2];
                if (i / 2 * 8 + i % 2 <= last) new_max = fmaxf(new_max, x);
            }
            new_max = quad_max(new_max);
            float scale = exp_fast(max[half] - new_max);
            max[half] = new_max, sum[half] *= scale;
            // 0 x is NaN where a score overflowed: -infinity would become a probability of 0
#pragma unroll
            for (int i = 0; i < SMALL_TILE / 4; i++) {
                float *x = &s[i / 2][2 * half + i % 2];
                *x = i / 2 * 8 + i % 2 <= last ? fmaf(0, *x, exp_fast(*x - new_max)) : 0;
                sum[half] += *x;
            }
#pragma unroll
            for (int i = 0; i < DV / 4; i++) out[0][i / 2][2 * half + i % 2] *= scale;
        }
        small_fragments<SMALL_TILE>(p[0], s);
        // 4.
        small_product_of<1, DV, SMALL_TILE>(out, p, tiles->other_e[b]);
    }
    // 5.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = quad_sum(sum[half]), scale = 1 / all;
        int i = at.token + 8 * half;
        if (at.pair == 0 && i < at.n) lse[(at.row + i) * d.H + at.h] = max[half] + logf(all);
#pragma unroll
        for (int n = 0; n < DV / 4; n++) out[0][n / 2][2 * half + n % 2] *= scale;
    }
    __syncthreads(); // no warp reads the values any more; their buffers are used for o
    static_assert(2 * SMALL_TILE >= SMALL_ROWS, "both buffers hold SMALL_ROWS rows");
    int first = at.first + at.own;
    small_store<DV>(o + at.e + (size_t)first * d.E, d.E, at.n - first, at.dv, out[0], tiles->other_e[0] + at.own);
}

// ----------------------------------------------------------------------------
// backward

// Forward lines: P = softmax(S), S = q k', o = P v.
// Formula: dq_i = sum_j P_ij (dP_ij - mean_i) k_j, dP_ij = dout_i . v_j, mean_i = sum_j P_ij dP_ij. stats (R,H): lse,
//   1 / sum of e^(S - lse), and mean of each query.
// Mapping: as forward.
// Memory: reads q, k, v, dout, lse, writes dq, stats.
// Passes: 1. the first tile's copy begins. For each tile: 2. S and dP. 3. P, the mean so far, P (dP - mean). 4. sums of
//   P k and of W. Then: 5. store.
template <int DV>
static __global__ void __launch_bounds__(WARP *SMALL_WARPS, DV > 128 ? 2 : 3)
    attention_small_queries_kernel(floatX *dq, float4 *stats, const floatX *dout, const float *lse, const floatX *q,
                                   const floatX *k, const floatX *v, Dims d) {
    extern __shared__ float4 small_shared[];
    SmallTiles<DV> *tiles = (SmallTiles<DV> *)small_shared;
    const SmallPlace at = small_place(true, d);
    if (at.first >= at.n) return;
    const int end = min_int(at.first + SMALL_ROWS, at.n);
    float sums[2][SMALL_Z / 8][4] = {}; // of P k, and W
    float l[2], p_sum[2] = {0, 0}, w_sum[2] = {0, 0}, mean[2] = {0, 0};
    // 1.
    small_copy_own<DV>(tiles, q, dout, at, d);
    small_copy_others<DV>(tiles, 0, k, v, 0, at, d), __pipeline_commit();
    for (int half = 0; half < 2; half++) {
        int i = at.token + 8 * half;
        l[half] = i < at.n ? lse[(at.row + i) * d.H + at.h] : 0;
    }
    for (int j0 = 0, b = 0; j0 < end; j0 += SMALL_TILE, b ^= 1) {
        __pipeline_wait_prior(0);
        __syncthreads();
        if (j0 + SMALL_TILE < end)
            small_copy_others<DV>(tiles, b ^ 1, k, v, j0 + SMALL_TILE, at, d), __pipeline_commit();
        if (j0 > at.first + at.own + 15) continue;
        // 2.
        float p[SMALL_TILE / 8][4] = {}, w[SMALL_TILE / 8][4] = {};
        uint32_t pw[2][SMALL_TILE / 16][4][1];
        small_product<SMALL_TILE, SMALL_Z>(p, tiles->z + at.own, tiles->other_z[b]);
        small_product<SMALL_TILE, DV>(w, tiles->e + at.own, tiles->other_e[b]);
        // 3.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int last = at.token + 8 * half - j0 - 2 * at.pair;
            float p_tile = 0, w_tile = 0;
#pragma unroll
            for (int i = 0; i < SMALL_TILE / 4; i++) {
                float *x = &p[i / 2][2 * half + i % 2], *dp = &w[i / 2][2 * half + i % 2];
                bool sees = i / 2 * 8 + i % 2 <= last;
                *x = sees ? exp_fast(*x - l[half]) : 0, *dp = sees ? *dp : 0;
                p_tile += *x, w_tile += *x * *dp;
            }
            p_sum[half] += quad_sum(p_tile), w_sum[half] += quad_sum(w_tile);
            float new_mean = p_sum[half] > 0 ? w_sum[half] / p_sum[half] : 0, less = mean[half] - new_mean;
            mean[half] = new_mean;
#pragma unroll
            for (int i = 0; i < SMALL_TILE / 4; i++)
                w[i / 2][2 * half + i % 2] = p[i / 2][2 * half + i % 2] * (w[i / 2][2 * half + i % 2] - new_mean);
#pragma unroll
            for (int i = 0; i < SMALL_Z / 4; i++)
                sums[1][i / 2][2 * half + i % 2] += less * sums[0][i / 2][2 * half + i % 2];
        }
        small_fragments<SMALL_TILE>(pw[0], p), small_fragments<SMALL_TILE>(pw[1], w);
        // 4.
        small_product_of<2, SMALL_Z, SMALL_TILE>(sums, pw, tiles->other_z[b]);
    }
    // 5.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float scale = 1 / p_sum[half];
        int i = at.token + 8 * half;
        if (at.pair == 0 && i < at.n) stats[(at.row + i) * d.H + at.h] = make_float4(l[half], scale, mean[half], 0);
#pragma unroll
        for (int n = 0; n < SMALL_Z / 4; n++) sums[1][n / 2][2 * half + n % 2] *= scale;
    }
    int first = at.first + at.own;
    small_store<SMALL_Z>(dq + at.z + (size_t)first * d.Z, d.Z, at.n - first, at.dz, sums[1], tiles->z + at.own);
}

// Copies the stats of the queries from token i of the chunk on to buffer b.
template <int DV>
static __device__ void small_copy_stats(SmallTiles<DV> *tiles, int b, const float4 *stats, int i, SmallPlace at,
                                        Dims d) {
    int thread = threadIdx.y * WARP + threadIdx.x;
    bool inside = i + thread < at.n;
    if (thread < SMALL_TILE)
        __pipeline_memcpy_async(&tiles->other_stats[b][thread],
                                stats + (at.row + (inside ? i + thread : 0)) * d.H + at.h, sizeof(float4),
                                inside ? 0 : sizeof(float4));
}

// Formula: dk_j = sum_i dS_ij q_i, dv_j = sum_i P_ij dout_i, over i >= j. After the chunk's last row there are zeros in
//   q, dout and stats, so P and dS are 0.
// Mapping: a thread block has 64 keys, a warp 16. Four lanes share two keys: each has every fourth pair of queries.
// Memory: reads q, k, v, dout, stats, writes dk, dv.
// Passes: 1. the first tile's copy begins. For each tile: 2. S' and dP'. 3. P' and dS'. 4. dv += P' dout, dk += dS' q.
//   Then: 5. store.
template <int DV>
static __global__ void __launch_bounds__(WARP *SMALL_WARPS, DV > 128 ? 2 : 3)
    attention_small_keys_kernel(floatX *dk, floatX *dv, const floatX *dout, const float4 *stats, const floatX *q,
                                const floatX *k, const floatX *v, Dims d) {
    extern __shared__ float4 small_shared[];
    SmallTiles<DV> *tiles = (SmallTiles<DV> *)small_shared;
    const SmallPlace at = small_place(false, d);
    if (at.first >= at.n) return;
    float k_sums[1][SMALL_Z / 8][4] = {}, v_sums[1][DV / 8][4] = {};
    // 1.
    small_copy_own<DV>(tiles, k, v, at, d);
    small_copy_others<DV>(tiles, 0, q, dout, at.first, at, d);
    small_copy_stats<DV>(tiles, 0, stats, at.first, at, d), __pipeline_commit();
    for (int i0 = at.first, b = 0; i0 < at.n; i0 += SMALL_TILE, b ^= 1) {
        __pipeline_wait_prior(0);
        __syncthreads();
        if (i0 + SMALL_TILE < at.n) {
            small_copy_others<DV>(tiles, b ^ 1, q, dout, i0 + SMALL_TILE, at, d);
            small_copy_stats<DV>(tiles, b ^ 1, stats, i0 + SMALL_TILE, at, d), __pipeline_commit();
        }
        if (i0 + SMALL_TILE <= at.first + at.own) continue; // all queries are before this warp's keys
        // 2.
        float p[SMALL_TILE / 8][4] = {}, ds[SMALL_TILE / 8][4] = {};
        uint32_t a[1][SMALL_TILE / 16][4][1];
        small_product<SMALL_TILE, SMALL_Z>(p, tiles->z + at.own, tiles->other_z[b]);
        small_product<SMALL_TILE, DV>(ds, tiles->e + at.own, tiles->other_e[b]);
        // 3.
#pragma unroll
        for (int i = 0; i < SMALL_TILE / 4; i++) {
            int n = i / 2, column = 8 * n + 2 * at.pair + i % 2;
            float4 query = tiles->other_stats[b][column];
#pragma unroll
            for (int u = i % 2; u < 4; u += 2) {
                bool sees = at.token + u / 2 * 8 <= i0 + column;
                p[n][u] = sees ? exp_fast(p[n][u] - query.x) * query.y : 0;
                ds[n][u] = sees ? p[n][u] * (ds[n][u] - query.z) : 0;
            }
        }
        // 4.
        small_fragments<SMALL_TILE>(a[0], p);
        small_product_of<1, DV, SMALL_TILE>(v_sums, a, tiles->other_e[b]);
        small_fragments<SMALL_TILE>(a[0], ds);
        small_product_of<1, SMALL_Z, SMALL_TILE>(k_sums, a, tiles->other_z[b]);
    }
    // 5.
    int first = at.first + at.own;
    small_store<SMALL_Z>(dk + at.z + (size_t)first * d.Z, d.Z, at.n - first, at.dz, k_sums[0], tiles->z + at.own);
    small_store<DV>(dv + at.e + (size_t)first * d.E, d.E, at.n - first, at.dv, v_sums[0], tiles->e + at.own);
}

// ----------------------------------------------------------------------------
// called by attention.cuh

static bool attention_small_supports(Mask mask, Dims d) {
    int dz = d.Z / d.H, dv = d.E / d.H;
    return dz % VEC == 0 && dz <= SMALL_Z && dv % VEC == 0 && dv <= SMALL_E && min_int(d.C, d.L) >= SMALL_CHUNK &&
           mask.p == 0;
}

// Bytes: stats of each query and head.
static size_t attention_small_workspace(Dims d) { return (size_t)d.B * d.L * d.H * sizeof(float4); }

static int small_blocks(Dims d) { return d.B * ceil_div(d.L, d.C) * d.H * ceil_div(min_int(d.C, d.L), SMALL_ROWS); }
#define SMALL_GRID(d) small_blocks(d), dim3(WARP, SMALL_WARPS)

template <int DV>
static void small_forward(floatX *o, float *lse, const floatX *q, const floatX *k, const floatX *v, Dims d) {
    const size_t bytes = offsetof(SmallTiles<DV>, other_stats);
    allow_shared(attention_small_forward_kernel<DV>, bytes);
    attention_small_forward_kernel<DV><<<SMALL_GRID(d), bytes>>>(o, lse, q, k, v, d);
}

template <int DV>
static void small_backward(floatX *dq, floatX *dk, floatX *dv_out, const floatX *dout, const float *lse,
                           const floatX *q, const floatX *k, const floatX *v, Dims d) {
    const size_t bytes = sizeof(SmallTiles<DV>);
    static_assert(sizeof(SmallTiles<DV>) <= SHARED_TOTAL, "every supported device has that much shared memory");
    float4 *stats = (float4 *)workspace(attention_small_workspace(d));
    allow_shared(attention_small_queries_kernel<DV>, bytes), allow_shared(attention_small_keys_kernel<DV>, bytes);
    attention_small_queries_kernel<DV><<<SMALL_GRID(d), bytes>>>(dq, stats, dout, lse, q, k, v, d);
    attention_small_keys_kernel<DV><<<SMALL_GRID(d), bytes>>>(dk, dv_out, dout, stats, q, k, v, d);
}

static void attention_small_forward(floatX *o, float *lse, const floatX *q, const floatX *k, const floatX *v, Dims d) {
    if (d.E / d.H <= 128) return small_forward<128>(o, lse, q, k, v, d);
    small_forward<SMALL_E>(o, lse, q, k, v, d);
}

static void attention_small_backward(floatX *dq, floatX *dk, floatX *dv_out, const floatX *dout, const float *lse,
                                     const floatX *q, const floatX *k, const floatX *v, Dims d) {
    if (d.E / d.H <= 128) return small_backward<128>(dq, dk, dv_out, dout, lse, q, k, v, d);
    small_backward<SMALL_E>(dq, dk, dv_out, dout, lse, q, k, v, d);
}
