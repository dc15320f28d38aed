/*
qk.cuh: replaces rmsnorm_*, qk_* and rope_* between z and the rotated queries and keys. decode.cuh uses qk_head(), too.

Idea. The plain functions are four kernels (norm of each head, affine, two rotations), with zn, q and k in memory
between them. Here a warp does all of it for one head of one token. A lane has pairs (2j, 2j+1), since the rotation
mixes the two elements of a pair. z is read for its sum of squares and again, from cache, to be normalized:

    z of one token (Z)   | head 0 (dz)           | head 1            | ...       a warp has a head
                         | 0 1 | 2 3 | 4 5 | ... |                               a lane has every 32nd pair
                            |
    per pair    n = z rstd/sqrt(dz) --+--> q = rotate(n (gamma0 + 1) + beta0)
                                      +--> k = rotate(n (gamma1 + 1) + beta1)

Backward, a warp goes through many tokens of one head, so that its sums for gamma and beta stay in shared memory. zn is
not kept: it is z rstd.

Requires: bfloat16, and shared memory for one warp's sums: 16 dz bytes.
Measured: see dev/notes/kernels.md.
*/
#pragma once

static __device__ float2 load_pair(const floatX *src) {
    float x[2];
    load<2>(x, src);
    return make_float2(x[0], x[1]);
}
static __device__ void store_pair(floatX *dst, float2 pair) {
    const float x[2] = {pair.x, pair.y};
    store<2>(dst, x);
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

// rstd of a warp's head whose sum of squares overflows.
static __device__ float large_head_rstd(const floatX *z, int dz) {
    float squares = 0;
    for (int j = threadIdx.x; j < dz / 2; j += WARP) {
        float2 x = load_pair(z + 2 * j);
        x.x *= SMALL_UNIT, x.y *= SMALL_UNIT;
        squares += x.x * x.x + x.y * x.y;
    }
    return SMALL_UNIT / sqrtf(warp_sum(squares) / dz);
}

// One head, by one warp. q, k, z, gamma and beta point to the head; the gamma and beta of k are Z elements further on.
// turns (dz/2): the rotation of this token's position, or NULL. Returns rstd.
static __device__ float qk_head(floatX *q, floatX *k, const floatX *z, const float *gamma, const float *beta,
                                const float2 *turns, int Z, int dz, float eps) {
    const float *gamma1 = gamma + Z, *beta1 = beta + Z;
    float squares = 0, scale = 1 / sqrtf((float)dz);
    // 1.
    for (int j = threadIdx.x; j < dz / 2; j += WARP) {
        float2 x = load_pair(z + 2 * j);
        squares += x.x * x.x + x.y * x.y;
    }
    squares = warp_sum(squares);
    float s = squares <= LARGE ? 1 / sqrtf(squares / dz + eps) : large_head_rstd(z, dz);
    // 2.
    for (int j = threadIdx.x; j < dz / 2; j += WARP) {
        int c = 2 * j;
        float2 n = load_pair(z + c), turn = turns ? turns[j] : make_float2(1, 0);
        n.x = n.x * s * scale, n.y = n.y * s * scale;
        float2 qj = make_float2(n.x * (gamma[c] + 1) + beta[c], n.y * (gamma[c + 1] + 1) + beta[c + 1]);
        float2 kj = make_float2(n.x * (gamma1[c] + 1) + beta1[c], n.y * (gamma1[c + 1] + 1) + beta1[c + 1]);
        store_pair(q + c, rotate(qj, turn, 1));
        store_pair(k + c, rotate(kj, turn, 1));
    }
    return s;
}

// Formula: n = z rstd/sqrt(dz), q = rotate(n (gamma0 + 1) + beta0), k = rotate(n (gamma1 + 1) + beta1).
// Mapping: a warp has a head of a token. Memory: reads R*Z (twice, the second time from cache), writes 2 R*Z and R*H.
// Passes: 1. rstd. 2. q and k.
static __global__ void qk_fast_forward_kernel(floatX *q, floatX *k, float *z_rstd, const floatX *z, const float *gamma,
                                              const float *beta, const float2 *table, const int64_t *count, Dims d,
                                              float eps) {
    int task = blockIdx.x * ROW_WARPS + threadIdx.y, row = task / d.H, h = task % d.H, dz = d.Z / d.H;
    if (row >= d.B * d.L) return;
    size_t at = (size_t)row * d.Z + h * dz;
    const float2 *turns = table ? table + (size_t)chunk_position(count, row, d.L, d.C) * (dz / 2) : NULL;
    float s = qk_head(q + at, k + at, z + at, gamma + h * dz, beta + h * dz, turns, d.Z, dz, eps);
    if (threadIdx.x == 0) z_rstd[task] = s;
}

// zn is not written: qk_fast_backward does not read it.
static void qk_fast_forward(floatX *q, floatX *k, floatX *zn, float *z_rstd, const floatX *z, const float *gamma,
                            const float *beta, const float *table, const int64_t *count, Dims d, double eps) {
    (void)zn;
    qk_fast_forward_kernel<<<ROW_GRID((size_t)d.B * d.L * d.H)>>>(q, k, z_rstd, z, gamma, beta, (const float2 *)table,
                                                                  count, d, (float)eps);
}

// Forward lines: n = z rstd/sqrt(dz), q = rotate(n (gamma0 + 1) + beta0), k = rotate(n (gamma1 + 1) + beta1).
// Formula: with dq and dk rotated back, a = (dq (gamma0 + 1) + dk (gamma1 + 1))/sqrt(dz) is dL/d(z rstd), and
//   dz = rstd (a - z rstd^2 mean(a z)); dgamma0 = sum over rows of dq n, dbeta0 = sum over rows of dq, likewise of k.
// Mapping: a warp has head blockIdx.y and every (gridDim.x * warps)-th row; a lane has pairs. parts (gridDim.x,4,Z):
//   dgamma0, dgamma1, dbeta0, dbeta1. qk_sums (warps,8,dz/2) in shared memory: a lane reads and writes its own pairs.
// Memory: reads 3 R*Z (twice, the second time from cache), writes R*Z.
// Passes: for each row 1. mean(a z), 2. dz and the sums of this warp; after all rows 3. the sums of the thread block.
static __global__ void qk_fast_backward_kernel(floatX *dz_out, float *parts, const floatX *dq, const floatX *dk,
                                               const float *z_rstd, const floatX *z, const float *gamma,
                                               const float2 *table, Dims d) {
    extern __shared__ float qk_sums[];
    int dz = d.Z / d.H, pairs = dz / 2, h = blockIdx.y;
    const float *gamma0 = gamma + h * dz, *gamma1 = gamma0 + d.Z;
    float *sums = qk_sums + (size_t)threadIdx.y * 4 * dz, scale = 1 / sqrtf((float)dz);
    for (int j = threadIdx.x; j < pairs; j += WARP) {
        for (int i = 0; i < 8; i++) sums[i * pairs + j] = 0;
    }
    for (int row = blockIdx.x * blockDim.y + threadIdx.y; row < d.B * d.L; row += gridDim.x * blockDim.y) {
        const float2 *turns = table + (size_t)chunk_position(NULL, row, d.L, d.C) * pairs;
        size_t at = (size_t)row * d.Z + h * dz;
        float s = z_rstd[(size_t)row * d.H + h], dot = 0;
        // 1.
        for (int j = threadIdx.x; j < pairs; j += WARP) {
            int c = 2 * j;
            float2 zj = load_pair(z + at + c);
            float2 q = rotate(load_pair(dq + at + c), turns[j], -1), k = rotate(load_pair(dk + at + c), turns[j], -1);
            dot += (q.x * (gamma0[c] + 1) + k.x * (gamma1[c] + 1)) * zj.x +
                   (q.y * (gamma0[c + 1] + 1) + k.y * (gamma1[c + 1] + 1)) * zj.y;
        }
        float mean = warp_sum(dot) * scale / dz * s * s;
        // 2.
        for (int j = threadIdx.x; j < pairs; j += WARP) {
            int c = 2 * j;
            float2 zj = load_pair(z + at + c), n = make_float2(zj.x * s * scale, zj.y * s * scale);
            float2 q = rotate(load_pair(dq + at + c), turns[j], -1), k = rotate(load_pair(dk + at + c), turns[j], -1);
            float2 a = make_float2((q.x * (gamma0[c] + 1) + k.x * (gamma1[c] + 1)) * scale,
                                   (q.y * (gamma0[c + 1] + 1) + k.y * (gamma1[c + 1] + 1)) * scale);
            store_pair(dz_out + at + c, make_float2(s * (a.x - zj.x * mean), s * (a.y - zj.y * mean)));
            const float terms[8] = {q.x * n.x, q.y * n.y, k.x * n.x, k.y * n.y, q.x, q.y, k.x, k.y};
#pragma unroll
            for (int i = 0; i < 8; i++) sums[i * pairs + j] += terms[i];
        }
    }
    __syncthreads();
    // 3.
    for (int j = threadIdx.y * WARP + threadIdx.x; j < 4 * dz; j += WARP * blockDim.y) {
        int i = j / pairs, pair = j % pairs;
        float sum = 0;
        for (int w = 0; w < (int)blockDim.y; w++) sum += qk_sums[(size_t)w * 4 * dz + j];
        parts[((size_t)blockIdx.x * 4 + i / 2) * d.Z + h * dz + 2 * pair + i % 2] = sum;
    }
}

static size_t qk_warp_shared(Dims d) { return 4 * (size_t)(d.Z / d.H) * sizeof(float); } // bytes of a warp's sums

static bool qk_fast_supports(Dims d) { return qk_warp_shared(d) <= SHARED_TOTAL - SHARED_DECLARED; }

static size_t qk_fast_workspace(Dims d) { return (size_t)MAX_PARTS * 4 * d.Z * sizeof(float); }

static void qk_fast_backward(floatX *dz_out, float *dgamma, float *dbeta, floatX *dq, floatX *dk, floatX *zn,
                             const float *z_rstd, const floatX *z, const float *gamma, const float *table, Dims d) {
    (void)zn;
    size_t shared = qk_warp_shared(d);
    int warps = max_int(min_int((int)(SHARED_DEFAULT / shared), ROW_WARPS / 2), 1);
    int blocks = min_int(ceil_div(d.B * d.L, warps), MAX_PARTS);
    float *parts = (float *)workspace(qk_fast_workspace(d));
    allow_shared(qk_fast_backward_kernel, warps * shared);
    qk_fast_backward_kernel<<<dim3(blocks, d.H), dim3(WARP, warps), warps * shared>>>(dz_out, parts, dq, dk, z_rstd, z,
                                                                                      gamma, (const float2 *)table, d);
    sum_parts_fast(dgamma, dbeta, parts, blocks, 2 * (size_t)d.Z, 2 * (size_t)d.Z, 1);
}
