/*
qk.cuh: replaces rmsnorm_*, qk_* and rope_* between z and the rotated queries and keys.

The idea: the plain functions are four kernels (norm of each head, affine map, two rotations), with zn, q and k in memory
between them. Here neighbouring lanes have one head of one token in registers, VEC elements each: z is read once, and q
and k are written once. A thread stays with the same columns, row after row, so gamma and beta are read once, too.

    a warp, dz = 64, 8 lanes to a head:    | row 0          | row 1          | row 2          | row 3          |
                                           | 0 1 2 ... lane 7 | 8 ...                                          |
    a pair of elements    n = z rstd/sqrt(dz) --+--> q = rotate(n (gamma0 + 1) + beta0)
                                                +--> k = rotate(n (gamma1 + 1) + beta1)

Backward, the sums over rows for gamma and beta are in registers, too. zn is not kept: it is z rstd.
Requires: bfloat16; dz a multiple of VEC, at most 32 VEC, so that a warp has a head.
Measured: see dev/notes/kernels.md.
*/
#pragma once

static __device__ float2 load_pair(const floatX *src) {
    float x[2];
    load<2>(x, src);
    return make_float2(x[0], x[1]);
}

// The complex product of a pair with turn = (cos, sin), or with its conjugate if sign is -1.
static __device__ float2 rotate(float2 x, float2 turn, int sign) {
    return make_float2(x.x * turn.x - x.y * sign * turn.y, x.x * sign * turn.y + x.y * turn.x);
}

// The position of a row's token in its chunk. count (B): tokens before these, or NULL.
static __device__ int chunk_position(const int64_t *count, int row, int L, int C) {
    int past = count ? (int)(count[row / L] % C) : 0;
    return (past + row % L) % C;
}

// ----------------------------------------------------------------------------
// heads in registers

enum { QK_BLOCKS = 512 }; // thread blocks of all heads together, at most

static bool qk_fast_supports(Dims d) {
    return d.attention == ATTENTION_NORMALIZED && d.Z / d.H % VEC == 0 && d.Z / d.H <= WARP * VEC;
}

// Lanes of a head: a power of two. A thread block has THREADS / lanes rows at a time.
static __host__ __device__ int qk_lanes(Dims d) {
    int lanes = 1;
    while (lanes * VEC < d.Z / d.H) lanes *= 2;
    return lanes;
}
static int qk_blocks(Dims d) {
    return min_int(ceil_div(d.B * d.L, THREADS / qk_lanes(d)), max_int(QK_BLOCKS / d.H, 1));
}

// Where a thread is: lane `lane` of `lanes`, with the VEC columns from c on. The thread block begins with
// row `row`, and goes on `step` rows further.
typedef struct {
    int lanes, lane, c, row, step;
    bool inside; // c is in the head
} QkPlace;
static __device__ QkPlace qk_place(Dims d) {
    int lanes = qk_lanes(d), rows = THREADS / lanes, lane = threadIdx.x % lanes, dz = d.Z / d.H;
    return QkPlace{
        lanes, lane, (int)blockIdx.y * dz + lane * VEC, (int)blockIdx.x * rows, (int)gridDim.x * rows, lane * VEC < dz};
}
static __device__ float lanes_sum(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Of gamma or beta, plus `plus`, this thread's columns.
static __device__ void qk_columns(float x[VEC], const float *src, QkPlace p, float plus) {
    load_floats(x, src + (p.inside ? p.c : 0));
#pragma unroll
    for (int i = 0; i < VEC; i++) x[i] += plus;
}
static __device__ void load_inside(float x[VEC], const floatX *src, bool inside) {
#pragma unroll
    for (int i = 0; i < VEC; i++) x[i] = 0;
    if (inside) load<VEC>(x, src);
}

// Rotates the pairs of x. turns (dz/2): those of this token, or NULL: no rotation.
static __device__ void rotate_pairs(float x[VEC], const float2 *turns, QkPlace p, int sign) {
    if (turns == NULL || !p.inside) return;
    float turn[VEC];
    load_floats(turn, (const float *)(turns + p.lane * (VEC / 2)));
#pragma unroll
    for (int i = 0; i < VEC / 2; i++) {
        float2 pair = make_float2(x[2 * i], x[2 * i + 1]);
        pair = rotate(pair, make_float2(turn[2 * i], turn[2 * i + 1]), sign);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
}
static __device__ const float2 *turns_of(const float2 *table, const int64_t *count, int row, Dims d) {
    return table ? table + (size_t)chunk_position(count, row, d.L, d.C) * (d.Z / d.H / 2) : NULL;
}

// Formula: n = z rstd/sqrt(dz), q = rotate(n (gamma0 + 1) + beta0), k = rotate(n (gamma1 + 1) + beta1).
// Mapping: a thread block has head blockIdx.y and every gridDim.x-th set of rows, a thread VEC columns.
// Memory: reads R*Z, writes 2 R*Z and R*H.
static __global__ void __launch_bounds__(THREADS)
    qk_fast_forward_kernel(floatX *q, floatX *k, float *z_rstd, const floatX *z, const float *gamma, const float *beta,
                           const float2 *table, const int64_t *count, Dims d, float eps) {
    QkPlace p = qk_place(d);
    int R = d.B * d.L, dz = d.Z / d.H;
    float gamma0[VEC], gamma1[VEC], beta0[VEC], beta1[VEC], x[VEC], y[VEC], scale = 1 / sqrtf((float)dz);
    qk_columns(gamma0, gamma, p, 1), qk_columns(gamma1, gamma + d.Z, p, 1);
    qk_columns(beta0, beta, p, 0), qk_columns(beta1, beta + d.Z, p, 0);
    for (int row0 = p.row; row0 < R; row0 += p.step) { // all lanes of a warp stay together
        int row = row0 + (int)threadIdx.x / p.lanes;
        bool inside = p.inside && row < R;
        size_t at = (size_t)row * d.Z + p.c;
        float squares = 0, unit = 1;
        load_inside(x, z + at, inside);
#pragma unroll
        for (int i = 0; i < VEC; i++) squares += x[i] * x[i];
        squares = lanes_sum(squares, p.lanes);
        if (__ballot_sync(~0u, !(squares <= LARGE)) != 0) {
            unit = squares <= LARGE ? 1 : SMALL_UNIT, squares = 0;
#pragma unroll
            for (int i = 0; i < VEC; i++) x[i] *= unit, squares += x[i] * x[i];
            squares = lanes_sum(squares, p.lanes);
        }
        if (row >= R) continue;
        float s = 1 / sqrtf(squares / dz + eps * unit * unit);
        const float2 *turns = turns_of(table, count, row, d);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            float n = x[i] * s * scale;
            x[i] = n * gamma0[i] + beta0[i], y[i] = n * gamma1[i] + beta1[i];
        }
        rotate_pairs(x, turns, p, 1), rotate_pairs(y, turns, p, 1);
        if (inside) store<VEC>(q + at, x), store<VEC>(k + at, y);
        if (p.lane == 0) z_rstd[(size_t)row * d.H + blockIdx.y] = s * unit;
    }
}

// zn is not written: qk_fast_backward does not read it.
static void qk_fast_forward(floatX *q, floatX *k, floatX *zn, float *z_rstd, const floatX *z, const float *gamma,
                            const float *beta, const float *table, const int64_t *count, Dims d, double eps) {
    (void)zn;
    qk_fast_forward_kernel<<<dim3(qk_blocks(d), d.H), THREADS, 0, gpu.stream>>>(
        q, k, z_rstd, z, gamma, beta, (const float2 *)table, count, d, (float)eps);
}

// Forward lines: n = z rstd/sqrt(dz), q = rotate(n (gamma0 + 1) + beta0), k = rotate(n (gamma1 + 1) + beta1).
// Formula: with dq and dk rotated back, a = (dq (gamma0 + 1) + dk (gamma1 + 1))/sqrt(dz) is dL/d(z rstd), and
//   dz = rstd (a - z rstd^2 mean(a z)); dgamma0 = sum over rows of dq n, dbeta0 = sum over rows of dq, likewise of k.
// Mapping: as the forward pass. parts (gridDim.x,4,Z): dgamma0, dgamma1, dbeta0, dbeta1.
// Memory: reads 3 R*Z, writes R*Z.
// Passes: for each row 1. mean(a z), 2. dz and the sums of this thread; after all rows 3. the sums of the thread block.
static __global__ void __launch_bounds__(THREADS, 2)
    qk_fast_backward_kernel(floatX *dz_out, float *parts, const floatX *dq, const floatX *dk, const float *z_rstd,
                            const floatX *z, const float *gamma, const float2 *table, Dims d) {
    __shared__ float qk_sums[4][THREADS * VEC]; // (4, rows at a time, lanes VEC)
    QkPlace p = qk_place(d);
    int R = d.B * d.L, dz = d.Z / d.H;
    float gamma0[VEC], gamma1[VEC], x[VEC], q[VEC], k[VEC], sums[4][VEC] = {}, scale = 1 / sqrtf((float)dz);
    qk_columns(gamma0, gamma, p, 1), qk_columns(gamma1, gamma + d.Z, p, 1);
    for (int row0 = p.row; row0 < R; row0 += p.step) {
        int row = row0 + (int)threadIdx.x / p.lanes;
        bool inside = p.inside && row < R;
        size_t at = (size_t)row * d.Z + p.c;
        float s = row < R ? z_rstd[(size_t)row * d.H + blockIdx.y] : 0, dot = 0;
        const float2 *turns = turns_of(table, NULL, min_int(row, R - 1), d);
        // 1.
        load_inside(x, z + at, inside), load_inside(q, dq + at, inside), load_inside(k, dk + at, inside);
        rotate_pairs(q, turns, p, -1), rotate_pairs(k, turns, p, -1);
#pragma unroll
        for (int i = 0; i < VEC; i++) dot += (q[i] * gamma0[i] + k[i] * gamma1[i]) * x[i];
        float mean = lanes_sum(dot, p.lanes) * scale / dz * s * s;
        // 2.
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            float n = x[i] * s * scale, a = (q[i] * gamma0[i] + k[i] * gamma1[i]) * scale;
            sums[0][i] += q[i] * n, sums[1][i] += k[i] * n, sums[2][i] += q[i], sums[3][i] += k[i];
            x[i] = s * (a - x[i] * mean);
        }
        if (inside) store<VEC>(dz_out + at, x);
    }
    // 3.
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int u = 0; u < VEC; u++) qk_sums[i][threadIdx.x * VEC + u] = sums[i][u];
    }
    __syncthreads();
    for (int j = threadIdx.x; j < 4 * dz; j += THREADS) {
        int i = j / dz, c = j % dz;
        float sum = 0;
        for (int at = c; at < THREADS * VEC; at += p.lanes * VEC) sum += qk_sums[i][at];
        parts[((size_t)blockIdx.x * 4 + i) * d.Z + blockIdx.y * dz + c] = sum;
    }
}

static size_t qk_fast_workspace(Dims d) { return (size_t)QK_BLOCKS * 4 * d.Z * sizeof(float); }

static void qk_fast_backward(floatX *dz_out, float *dgamma, float *dbeta, floatX *dq, floatX *dk, floatX *zn,
                             const float *z_rstd, const floatX *z, const float *gamma, const float *table, Dims d) {
    (void)zn;
    size_t bytes = qk_fast_workspace(d);
    float *parts = parts_memory(bytes, workspace(bytes));
    qk_fast_backward_kernel<<<dim3(qk_blocks(d), d.H), THREADS>>>(dz_out, parts, dq, dk, z_rstd, z, gamma,
                                                                  (const float2 *)table, d);
    sum_parts_fast(dgamma, dbeta, parts, qk_blocks(d), 2 * (size_t)d.Z, 2 * (size_t)d.Z, 1);
}
