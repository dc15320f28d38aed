#pragma once
#include <cuda_pipeline_primitives.h>

enum {
    SMALL_ROWS = 64,                               // rows of a thread block: queries, or keys
    SMALL_WARPS = SMALL_ROWS / 16,                 // each has the 16 rows of an mma
    SMALL_Z = 64,                                  // largest dz
    SMALL_E = 256,                                 // largest dv
    SMALL_CHUNK = 32,                              // tokens of a chunk, at least: fewer leave most of a tile empty
    OTHERS = 32,                                   // rows of the other tiles: accumulators must fit in registers
};

// Shared memory of a thread block: the rows that it owns, and the tile it multiplies them with, twice, since the next
// one is copied meanwhile. z: rows of q or k. e: rows of v or dout. Rows are padded to avoid bank conflicts.
template <int DV> struct SmallTiles {
    floatX z[SMALL_ROWS][SMALL_Z + VEC], other_z[2][OTHERS][SMALL_Z + VEC], other_e[2][OTHERS][DV + VEC];
    float4 other_stats[2][OTHERS];  // backward
    floatX e[SMALL_ROWS][DV + VEC]; // backward
};

// The rows of a thread block: tokens `first` to first + SMALL_ROWS - 1 of a chunk of n tokens, of head h. row: row of
// the chunk's first token. z, e: where the chunk's rows of this head begin in q or k, and in v or o.
typedef struct {
    size_t row, z, e;
    int n, first, h, dz, dv;
} SmallPlace;

// Thread blocks with most work are first: those of the last queries, if `reverse`, or of the first keys.
static __device__ SmallPlace small_place(bool reverse, Dims d) {
    int tiles = ceil_div(min_int(d.C, d.L), SMALL_ROWS), chunks = ceil_div(d.L, d.C), dz = d.Z / d.H, dv = d.E / d.H;
    int tile = blockIdx.x % tiles, h = blockIdx.x / tiles % d.H, i = blockIdx.x / tiles / d.H, t = i % chunks * d.C;
    size_t row = (size_t)(i / chunks) * d.L + t;
    return SmallPlace{row,
                      row * d.Z + h * dz,
                      row * d.E + h * dv,
                      min_int(d.C, d.L - t),
                      (reverse ? tiles - 1 - tile : tile) * SMALL_ROWS,
                      h,
                      dz,
                      dv};
}

// Copies `rows` rows of `columns` columns to a tile, asynchronously. The rest of the tile becomes 0.
// Mapping: a thread has a vector of every STEP-th row.
template <int ROWS, int COLUMNS>
static __device__ void small_copy(floatX (*tile)[COLUMNS + VEC], const floatX *x, int stride, int rows, int columns) {
    enum { ACROSS_ROW = COLUMNS / VEC, STEP = WARP * SMALL_WARPS / ACROSS_ROW };
    const int thread = threadIdx.y * WARP + threadIdx.x, first = thread / ACROSS_ROW, c = thread % ACROSS_ROW * VEC;
    if (c >= columns) rows = 0;
    x += (ptrdiff_t)first * stride + c;
#pragma unroll
    for (int r = 0; r < ROWS; r += STEP, x += (ptrdiff_t)STEP * stride) // what is replaced by zeros is not read
        __pipeline_memcpy_async(&tile[first + r][c], x, sizeof(Vec<VEC>), first + r < rows ? 0 : sizeof(Vec<VEC>));
}

// Copies rows from token t on, (L,Z) and (L,E), to the other tiles of number b.
template <int DV>
static __device__ void small_copy_others(SmallTiles<DV> *tiles, int b, const floatX *z, const floatX *e, int t,
                                         SmallPlace at, Dims d) {
    small_copy<OTHERS, SMALL_Z>(tiles->other_z[b], z + at.z + (size_t)t * d.Z, d.Z, at.n - t, at.dz);
    small_copy<OTHERS, DV>(tiles->other_e[b], e + at.e + (size_t)t * d.E, d.E, at.n - t, at.dv);
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

// Writes a warp's c (16,N), of which `rows` rows and `columns` columns exist, by way of a tile in shared memory that no
// other warp reads, in vectors.
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

template <int DV>
static __global__ void __launch_bounds__(WARP *SMALL_WARPS, DV > 128 ? 2 : 3)
    attention_small_forward_kernel(floatX *o, float *lse, const floatX *q, const floatX *k, const floatX *v, Dims d) {
    extern __shared__ float4 small_shared[];
    SmallTiles<DV> *tiles = (SmallTiles<DV> *)small_shared;
    const SmallPlace at = small_place(true, d);
    if (at.first >= at.n) return;
    const int own = threadIdx.y * 16, query = at.first + own + threadIdx.x / 4, pair = threadIdx.x % 4;
    const int end = min_int(at.first + SMALL_ROWS, at.n); // of the keys
    float out[1][DV / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    // 1.
    small_copy<SMALL_ROWS, SMALL_Z>(tiles->z, q + at.z + (size_t)at.first * d.Z, d.Z, at.n - at.first, at.dz);
    small_copy_others<DV>(tiles, 0, k, v, 0, at, d), __pipeline_commit();
    for (int j0 = 0, b = 0; j0 < end; j0 += OTHERS, b ^= 1) {
        __pipeline_wait_prior(0);
        __syncthreads(); // all threads' copies have ended, and nobody reads the other buffer
        if (j0 + OTHERS < end) small_copy_others<DV>(tiles, b ^ 1, k, v, j0 + OTHERS, at, d), __pipeline_commit();
        if (j0 > at.first + own + 15) continue; // all keys are after this warp's queries
        // 2.
        float s[OTHERS / 8][4] = {};
        uint32_t p[1][OTHERS / 16][4][1];
        small_product<OTHERS, SMALL_Z>(s, tiles->z + own, tiles->other_z[b]);
        // 3.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int last = query + 8 * half - j0 - 2 * pair; // of a lane's columns 8 n + u, the last that the query sees
            float new_max = max[half];
#pragma unroll
            for (int i = 0; i < OTHERS / 4; i++) {
                float x = s[i / 2][2 * half + i % 2];
                if (i / 2 * 8 + i % 2 <= last) new_max = fmaxf(new_max, x);
            }
            new_max = quad_max(new_max);
            float scale = exp_fast(max[half] - new_max);
            max[half] = new_max, sum[half] *= scale;
            // 0 x is NaN where a score overflowed: -infinity would become a probability of 0
#pragma unroll
            for (int i = 0; i < OTHERS / 4; i++) {
                float *x = &s[i / 2][2 * half + i % 2];
                *x = i / 2 * 8 + i % 2 <= last ? fmaf(0, *x, exp_fast(*x - new_max)) : 0;
                sum[half] += *x;
            }
#pragma unroll
            for (int i = 0; i < DV / 4; i++) out[0][i / 2][2 * half + i % 2] *= scale;
        }
        small_fragments<OTHERS>(p[0], s);
        // 4.
        small_product_of<1, DV, OTHERS>(out, p, tiles->other_e[b]);
    }
    // 5.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = quad_sum(sum[half]), scale = 1 / all;
        int i = query + 8 * half;
        if (pair == 0 && i < at.n) lse[(at.row + i) * d.H + at.h] = max[half] + logf(all);
#pragma unroll
        for (int n = 0; n < DV / 4; n++) out[0][n / 2][2 * half + n % 2] *= scale;
    }
    __syncthreads(); // nobody reads the values
    static_assert(2 * OTHERS >= SMALL_ROWS, "the output fits");
    int first = at.first + own;
    small_store<DV>(o + at.e + (size_t)first * d.E, d.E, at.n - first, at.dv, out[0], tiles->other_e[0] + own);
}

template <int DV>
static __global__ void __launch_bounds__(WARP *SMALL_WARPS, DV > 128 ? 2 : 3)
    attention_small_queries_kernel(floatX *dq, float4 *stats, const floatX *dout, const float *lse, const floatX *q,
                                   const floatX *k, const floatX *v, Dims d) {
    extern __shared__ float4 small_shared[];
    SmallTiles<DV> *tiles = (SmallTiles<DV> *)small_shared;
    const SmallPlace at = small_place(true, d);
    if (at.first >= at.n) return;
    const int own = threadIdx.y * 16, query = at.first + own + threadIdx.x / 4, pair = threadIdx.x % 4;
    const int end = min_int(at.first + SMALL_ROWS, at.n);
    float sums[2][SMALL_Z / 8][4] = {}; // of P k and of W k
    float l[2], p_sum[2] = {0, 0}, w_sum[2] = {0, 0}, mean[2] = {0, 0};
    // 1.
    small_copy<SMALL_ROWS, SMALL_Z>(tiles->z, q + at.z + (size_t)at.first * d.Z, d.Z, at.n - at.first, at.dz);
    small_copy<SMALL_ROWS, DV>(tiles->e, dout + at.e + (size_t)at.first * d.E, d.E, at.n - at.first, at.dv);
    small_copy_others<DV>(tiles, 0, k, v, 0, at, d), __pipeline_commit();
    for (int half = 0; half < 2; half++) {
        int i = query + 8 * half;
        l[half] = i < at.n ? lse[(at.row + i) * d.H + at.h] : 0;
    }
    for (int j0 = 0, b = 0; j0 < end; j0 += OTHERS, b ^= 1) {
        __pipeline_wait_prior(0);
        __syncthreads();
        if (j0 + OTHERS < end) small_copy_others<DV>(tiles, b ^ 1, k, v, j0 + OTHERS, at, d), __pipeline_commit();
        if (j0 > at.first + own + 15) continue;
        // 2.
        float p[OTHERS / 8][4] = {}, w[OTHERS / 8][4] = {};
        uint32_t pw[2][OTHERS / 16][4][1];
        small_product<OTHERS, SMALL_Z>(p, tiles->z + own, tiles->other_z[b]);
        small_product<OTHERS, DV>(w, tiles->e + own, tiles->other_e[b]);
        // 3.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int last = query + 8 * half - j0 - 2 * pair;
            float p_tile = 0, w_tile = 0;
#pragma unroll
            for (int i = 0; i < OTHERS / 4; i++) {
                float *x = &p[i / 2][2 * half + i % 2], *dp = &w[i / 2][2 * half + i % 2];
                bool sees = i / 2 * 8 + i % 2 <= last;
                *x = sees ? exp_fast(*x - l[half]) : 0, *dp = sees ? *dp : 0;
                p_tile += *x, w_tile += *x * *dp;
            }
            p_sum[half] += quad_sum(p_tile), w_sum[half] += quad_sum(w_tile);
            float new_mean = p_sum[half] > 0 ? w_sum[half] / p_sum[half] : 0, less = mean[half] - new_mean;
            mean[half] = new_mean;
#pragma unroll
            for (int i = 0; i < OTHERS / 4; i++)
                w[i / 2][2 * half + i % 2] = p[i / 2][2 * half + i % 2] * (w[i / 2][2 * half + i % 2] - new_mean);
#pragma unroll
            for (int i = 0; i < SMALL_Z / 4; i++)
                sums[1][i / 2][2 * half + i % 2] += less * sums[0][i / 2][2 * half + i % 2];
        }
        small_fragments<OTHERS>(pw[0], p), small_fragments<OTHERS>(pw[1], w);
        // 4.
        small_product_of<2, SMALL_Z, OTHERS>(sums, pw, tiles->other_z[b]);
    }
    // 5.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float scale = 1 / p_sum[half];
        int i = query + 8 * half;
        if (pair == 0 && i < at.n) stats[(at.row + i) * d.H + at.h] = make_float4(l[half], scale, mean[half], 0);
#pragma unroll
        for (int n = 0; n < SMALL_Z / 4; n++) sums[1][n / 2][2 * half + n % 2] *= scale;
    }
    int first = at.first + own;
    small_store<SMALL_Z>(dq + at.z + (size_t)first * d.Z, d.Z, at.n - first, at.dz, sums[1], tiles->z + own);
}

// Copies the stats of the queries from token i on to the other tiles of number b.
template <int DV>
static __device__ void small_copy_stats(SmallTiles<DV> *tiles, int b, const float4 *stats, int i, SmallPlace at,
                                        Dims d) {
    int thread = threadIdx.y * WARP + threadIdx.x;
    bool inside = i + thread < at.n;
    if (thread < OTHERS)
        __pipeline_memcpy_async(&tiles->other_stats[b][thread],
                                stats + (at.row + (inside ? i + thread : 0)) * d.H + at.h, sizeof(float4),
                                inside ? 0 : sizeof(float4));
}

template <int DV>
static __global__ void __launch_bounds__(WARP *SMALL_WARPS, DV > 128 ? 2 : 3)
    attention_small_keys_kernel(floatX *dk, floatX *dv, const floatX *dout, const float4 *stats, const floatX *q,
                                const floatX *k, const floatX *v, Dims d) {
    extern __shared__ float4 small_shared[];
    SmallTiles<DV> *tiles = (SmallTiles<DV> *)small_shared;
    const SmallPlace at = small_place(false, d);
    if (at.first >= at.n) return;
    const int own = threadIdx.y * 16, key = at.first + own + threadIdx.x / 4, pair = threadIdx.x % 4;
    float k_sums[1][SMALL_Z / 8][4] = {}, v_sums[1][DV / 8][4] = {};
    // 1.
    small_copy<SMALL_ROWS, SMALL_Z>(tiles->z, k + at.z + (size_t)at.first * d.Z, d.Z, at.n - at.first, at.dz);
    small_copy<SMALL_ROWS, DV>(tiles->e, v + at.e + (size_t)at.first * d.E, d.E, at.n - at.first, at.dv);
    small_copy_others<DV>(tiles, 0, q, dout, at.first, at, d);
    small_copy_stats<DV>(tiles, 0, stats, at.first, at, d), __pipeline_commit();
    for (int i0 = at.first, b = 0; i0 < at.n; i0 += OTHERS, b ^= 1) {
        __pipeline_wait_prior(0);
        __syncthreads();
        if (i0 + OTHERS < at.n) {
            small_copy_others<DV>(tiles, b ^ 1, q, dout, i0 + OTHERS, at, d);
            small_copy_stats<DV>(tiles, b ^ 1, stats, i0 + OTHERS, at, d), __pipeline_commit();
        }
        if (i0 + OTHERS <= at.first + own) continue; // all queries are before this warp's keys
        // 2.
        float p[OTHERS / 8][4] = {}, ds[OTHERS / 8][4] = {};
        uint32_t a[1][OTHERS / 16][4][1];
        small_product<OTHERS, SMALL_Z>(p, tiles->z + own, tiles->other_z[b]);
        small_product<OTHERS, DV>(ds, tiles->e + own, tiles->other_e[b]);
        // 3.
#pragma unroll
        for (int i = 0; i < OTHERS / 4; i++) {
            int n = i / 2, column = 8 * n + 2 * pair + i % 2;
            float4 query = tiles->other_stats[b][column];
#pragma unroll
            for (int u = i % 2; u < 4; u += 2) {
                bool sees = key + u / 2 * 8 <= i0 + column;
                p[n][u] = sees ? exp_fast(p[n][u] - query.x) * query.y : 0;
                ds[n][u] = sees ? p[n][u] * (ds[n][u] - query.z) : 0;
            }
        }
        // 4.
        small_fragments<OTHERS>(a[0], p);
        small_product_of<1, DV, OTHERS>(v_sums, a, tiles->other_e[b]);
        small_fragments<OTHERS>(a[0], ds);
        small_product_of<1, SMALL_Z, OTHERS>(k_sums, a, tiles->other_z[b]);
    }
    // 5.
    int first = at.first + own;
    small_store<SMALL_Z>(dk + at.z + (size_t)first * d.Z, d.Z, at.n - first, at.dz, k_sums[0], tiles->z + own);
    small_store<DV>(dv + at.e + (size_t)first * d.E, d.E, at.n - first, at.dv, v_sums[0], tiles->e + own);
}

static bool attention_small_supports(Mask mask, Dims d) {
    int dz = d.Z / d.H, dv = d.E / d.H;
    return dz % VEC == 0 && dz <= SMALL_Z && dv % VEC == 0 && dv <= SMALL_E && min_int(d.C, d.L) >= SMALL_CHUNK &&
           mask.p == 0;
}

static size_t attention_small_workspace(Dims d) { return (size_t)d.B * d.L * d.H * sizeof(float4); }

static int small_blocks(Dims d) {
    return d.B * ceil_div(d.L, d.C) * d.H * ceil_div(min_int(d.C, d.L), SMALL_ROWS);
}
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
    static_assert(sizeof(SmallTiles<DV>) <= SHARED_TOTAL - SHARED_DECLARED, "fits");
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
