/*
norms.cuh: RMSNorm and LayerNorm with rows in registers, and sums over rows. Replaces rmsnorm_forward() and
rmsnorm_backward() if they have a weight, layernorm_forward(), layernorm_backward(), sum_rows() if its x is NULL, and
silu_bias_backward().

The idea: the plain kernels read a row once for its statistics and again to normalize it, and the backward pass reads
everything a third time for dweight and dbias. Here whole rows are in registers, so that x and dy are read once.

Forward, a warp has a row, and no thread waits for another warp:

              columns (V vectors of VEC elements for each lane)
            +--------+--------+- - -+--------+
    row r   | lane 0 | lane 1 |     |        |  1. load  2. sum over the row by shuffles  3. normalize and store
            +--------+--------+- - -+--------+

Backward, a thread block has ROWS rows, and a barrier serves them all. A thread owns the same columns of all rows: weight
is read once, and the sums for dweight and dbias stay in registers until the end, when they become one part for each
thread block (sum_parts_fast()).

            +--------+--------+- - -+--------+
    row r   |thread 0|thread 1|     |        |  1. load  2. sum over the row by warps, then in shared memory  3. store
    row r+1 |        |        |     |        |
            +--------+--------+- - -+--------+
    dweight |   sum over this thread block's rows: r, r + ROWS gridDim.x, ...

Requires: bfloat16; D a multiple of VEC, at most MAX_COLUMNS.
Measured: see dev/notes/kernels.md
*/
#pragma once

enum {
    ROWS = 2,          // rows that a thread block has at a time
    ROW_THREADS = 512, // threads of a thread block, at most
    MAX_COLUMNS = 16 * WARP * VEC
};

static int norms_fast_supports(int D) { return D % VEC == 0 && D <= MAX_COLUMNS; }

// A row of up to 256 vectors has 128 threads, with V = 1 or 2 vectors each; a longer one has up to 512 threads.
static int row_threads(int D) {
    int vectors = D / VEC;
    return min_int(ceil_div(vectors, WARP) * WARP, vectors <= 256 ? 128 : ROW_THREADS);
}
static int row_vectors(int D) { return ceil_div(D / VEC, row_threads(D)); }

// The number of thread blocks that share R rows, where each leaves a part of a sum over them.
static int row_parts(int R) { return min_int(ceil_div(R, ROWS), MAX_PARTS); }

// Bytes: the parts of dweight and dbias, or of sum_rows_wide().
static size_t norms_fast_workspace(Dims d) {
    int widest = max_int(max_int(2 * d.D, d.E), max_int(d.F, d.Z));
    return (size_t)max_parts(d.B * d.L) * widest * sizeof(float);
}

// ----------------------------------------------------------------------------
// what a thread owns of ROWS rows: V vectors, ROW_THREADS or fewer threads apart

template <int V> static __device__ void load_rows(float x[ROWS][V][VEC], const floatX *src, size_t r, int R, int D) {
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
#pragma unroll
        for (int u = 0; u < V; u++) {
            int c = (u * blockDim.x + threadIdx.x) * VEC;
#pragma unroll
            for (int i = 0; i < VEC; i++) x[k][u][i] = 0; // outside of the matrix
            if (c < D && r + k < (size_t)R) load<VEC>(x[k][u], src + (r + k) * D + c);
        }
    }
}
template <int V> static __device__ void store_rows(floatX *dst, const float x[ROWS][V][VEC], size_t r, int R, int D) {
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
#pragma unroll
        for (int u = 0; u < V; u++) {
            int c = (u * blockDim.x + threadIdx.x) * VEC;
            if (c < D && r + k < (size_t)R) store<VEC>(dst + (r + k) * D + c, x[k][u]);
        }
    }
}

// This thread's columns of src (D), plus `plus`; src NULL: `otherwise`.
template <int V>
static __device__ void load_columns(float x[V][VEC], const float *src, float plus, float otherwise, int D) {
#pragma unroll
    for (int u = 0; u < V; u++) {
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            int c = (u * blockDim.x + threadIdx.x) * VEC + i;
            x[u][i] = src && c < D ? src[c] + plus : otherwise;
        }
    }
}
template <int V> static __device__ void store_columns(float *dst, const float x[V][VEC], int D) {
#pragma unroll
    for (int u = 0; u < V; u++) {
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            int c = (u * blockDim.x + threadIdx.x) * VEC + i;
            if (c < D) dst[c] = x[u][i];
        }
    }
}

// Sums over the threads of the thread block, one for each row; every thread gets the results.
typedef struct {
    float x[ROWS];
} RowSums;
static __device__ RowSums block_sum(RowSums sums) {
    __shared__ float shared[ROWS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
    for (int k = 0; k < ROWS; k++) sums.x[k] = warp_sum(sums.x[k]);
    __syncthreads(); // all threads have read the sums of the last call
    if (lane == 0) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) shared[k][warp] = sums.x[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < ROWS; k++) sums.x[k] = warp_sum(lane < warps ? shared[k][lane] : 0);
    return sums;
}

// ----------------------------------------------------------------------------
// what a lane owns of a row: V vectors, WARP lanes apart. In the second attempt at a row it is in the smaller unit.

template <int V> static __device__ void load_row(float x[V][VEC], const floatX *row, int attempt, int D) {
#pragma unroll
    for (int u = 0; u < V; u++) {
        int c = (u * WARP + threadIdx.x) * VEC;
#pragma unroll
        for (int i = 0; i < VEC; i++) x[u][i] = 0; // outside of the row
        if (c < D) load<VEC>(x[u], row + c);
#pragma unroll
        for (int i = 0; i < VEC && attempt > 0; i++) x[u][i] *= SMALL_UNIT;
    }
}

// The kernel with the least V for which a warp has D columns.
#define ROW_KERNEL(kernel, D)                                                                                          \
    ((D) <= 1 * WARP * VEC   ? kernel<1>                                                                               \
     : (D) <= 2 * WARP * VEC ? kernel<2>                                                                               \
     : (D) <= 4 * WARP * VEC ? kernel<4>                                                                               \
     : (D) <= 8 * WARP * VEC ? kernel<8>                                                                               \
                             : kernel<16>)

// ----------------------------------------------------------------------------
// RMSNorm

// Formula: see rmsnorm_forward() in megalodon.cu; in a smaller unit where squares overflow.
// Mapping: a warp has a row, a lane V vectors of it.
// Memory: reads and writes R*D.
// Passes: 1. load, sum of squares; seldom twice. 2. normalize.
template <int V>
static __global__ void __launch_bounds__(THREADS)
    rmsnorm_fast_forward_kernel(floatX *out, float *rstd, const floatX *inp, const float *weight, int R, int D,
                                float eps) {
    size_t r = warp_row();
    float x[V][VEC], w[VEC], squares = 0, unit = 1;
    if (r >= (size_t)R) return;
    // 1.
    for (int attempt = 0; attempt < 2; attempt++, unit = SMALL_UNIT) {
        load_row<V>(x, inp + r * D, attempt, D);
        squares = 0;
#pragma unroll
        for (int u = 0; u < V; u++) {
#pragma unroll
            for (int i = 0; i < VEC; i++) squares += x[u][i] * x[u][i];
        }
        squares = warp_sum(squares);
        if (squares <= LARGE) break;
    }
    // 2.
    float s = 1 / sqrtf(squares / D + eps * unit * unit);
#pragma unroll
    for (int u = 0; u < V; u++) {
        int c = (u * WARP + threadIdx.x) * VEC;
        if (c >= D) break;
        load_floats(w, weight + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) x[u][i] = x[u][i] * s * (w[i] + 1);
        store<VEC>(out + r * D + c, x[u]);
    }
    if (threadIdx.x == 0) rstd[r] = s * unit;
}

static void rmsnorm_fast_forward(floatX *out, float *rstd, const floatX *inp, const float *weight, int R, int D,
                                 double eps) {
    auto kernel = ROW_KERNEL(rmsnorm_fast_forward_kernel, D);
    kernel<<<ROW_GRID(R)>>>(out, rstd, inp, weight, R, D, (float)eps);
}

// Formula: see rmsnorm_backward() in megalodon.cu. Here x becomes n, and dy becomes a.
// Mapping: a thread block has every gridDim.x-th set of ROWS rows, a thread V vectors of each.
// Memory: reads 2*R*D, writes R*D. parts (gridDim.x, D): dweight.
// Passes, for each set of rows: 1. load, sum of a n, and the sums for dweight. 2. dx.
template <int V>
static __global__ void __launch_bounds__(ROW_THREADS)
    rmsnorm_fast_backward_kernel(floatX *dinp, float *parts, const floatX *dout, const floatX *inp, const float *weight,
                                 const float *rstd, int R, int D) {
    float x[ROWS][V][VEC], dy[ROWS][V][VEC], w[V][VEC], dw[V][VEC] = {};
    load_columns<V>(w, weight, 1, 1, D);
    for (size_t r = (size_t)blockIdx.x * ROWS; r < (size_t)R; r += (size_t)gridDim.x * ROWS) {
        // 1.
        RowSums dot = {};
        load_rows<V>(x, inp, r, R, D), load_rows<V>(dy, dout, r, R, D);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            float s = r + k < (size_t)R ? rstd[r + k] : 0;
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    x[k][u][i] *= s;
                    dw[u][i] += dy[k][u][i] * x[k][u][i];
                    dy[k][u][i] *= w[u][i];
                    dot.x[k] += dy[k][u][i] * x[k][u][i];
                }
            }
        }
        dot = block_sum(dot);
        // 2.
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            float s = r + k < (size_t)R ? rstd[r + k] : 0, mean = dot.x[k] / D;
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < VEC; i++) x[k][u][i] = s * (dy[k][u][i] - x[k][u][i] * mean);
            }
        }
        store_rows<V>(dinp, x, r, R, D);
    }
    store_columns<V>(parts + (size_t)blockIdx.x * D, dw, D);
}

static void rmsnorm_fast_backward(floatX *dinp, float *dweight, const floatX *dout, const floatX *inp,
                                  const float *weight, const float *rstd, int R, int D) {
    size_t bytes = (size_t)row_parts(R) * D * sizeof(float);
    float *parts = parts_memory(bytes, workspace(bytes));
    auto kernel = row_vectors(D) == 1 ? rmsnorm_fast_backward_kernel<1> : rmsnorm_fast_backward_kernel<2>;
    kernel<<<row_parts(R), row_threads(D)>>>(dinp, parts, dout, inp, weight, rstd, R, D);
    if (dweight) sum_parts_fast(dweight, NULL, parts, row_parts(R), D, 0, 1);
}

// ----------------------------------------------------------------------------
// LayerNorm

// Formula: see layernorm_forward() in megalodon.cu; in a smaller unit where squares overflow.
// Mapping: a warp has a row, a lane V vectors of it.
// Memory: reads and writes R*D.
// Passes: 1. load, mean, sum of squared deviations; seldom twice. 2. normalize.
template <int V>
static __global__ void __launch_bounds__(THREADS)
    layernorm_fast_forward_kernel(floatX *out, double *mean, float *rstd, const floatX *inp, const float *weight,
                                  const float *bias, int R, int D, float eps) {
    size_t r = warp_row();
    float x[V][VEC], w[VEC] = {}, b[VEC] = {}, m, squares, unit = 1;
    if (r >= (size_t)R) return;
    // 1.
    for (int attempt = 0;; attempt++, unit = SMALL_UNIT) {
        load_row<V>(x, inp + r * D, attempt, D);
        m = squares = 0;
#pragma unroll
        for (int u = 0; u < V; u++) {
#pragma unroll
            for (int i = 0; i < VEC; i++) m += x[u][i];
        }
        m = warp_sum(m) / D;
#pragma unroll
        for (int u = 0; u < V; u++) {
            if ((int)(u * WARP + threadIdx.x) * VEC >= D) break;
#pragma unroll
            for (int i = 0; i < VEC; i++) x[u][i] -= m, squares += x[u][i] * x[u][i];
        }
        squares = warp_sum(squares);
        if (squares <= LARGE || attempt == 1) break;
    }
    // 2.
    float s = 1 / sqrtf(squares / D + eps * unit * unit);
#pragma unroll
    for (int u = 0; u < V; u++) {
        int c = (u * WARP + threadIdx.x) * VEC;
        if (c >= D) break;
        if (weight) load_floats(w, weight + c);
        if (bias) load_floats(b, bias + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) x[u][i] = x[u][i] * s * (w[i] + 1) + b[i];
        store<VEC>(out + r * D + c, x[u]);
    }
    if (threadIdx.x == 0) mean[r] = (double)m / unit, rstd[r] = s * unit;
}

static void layernorm_fast_forward(floatX *out, double *mean, float *rstd, const floatX *inp, const float *weight,
                                   const float *bias, int R, int D, double eps) {
    auto kernel = ROW_KERNEL(layernorm_fast_forward_kernel, D);
    kernel<<<ROW_GRID(R)>>>(out, mean, rstd, inp, weight, bias, R, D, (float)eps);
}

// Formula: see layernorm_backward() in megalodon.cu. Here dy becomes a.
// Mapping: a thread block has every gridDim.x-th set of ROWS rows, a thread V vectors of each.
// Memory: reads 2*R*D, writes R*D. parts (gridDim.x, 2, D): dweight, dbias.
// Passes, for each set of rows: 1. load, sums of a and a n, and the sums for dweight and dbias. 2. dx.
template <int V>
static __global__ void __launch_bounds__(ROW_THREADS)
    layernorm_fast_backward_kernel(floatX *dinp, float *parts, const floatX *dout, const floatX *inp,
                                   const float *weight, const double *mean, const float *rstd, int R, int D) {
    float n[ROWS][V][VEC], dy[ROWS][V][VEC], w[V][VEC], dw[V][VEC] = {}, db[V][VEC] = {};
    load_columns<V>(w, weight, 1, 1, D);
    for (size_t r = (size_t)blockIdx.x * ROWS; r < (size_t)R; r += (size_t)gridDim.x * ROWS) {
        // 1.
        RowSums sum = {}, dot = {};
        load_rows<V>(n, inp, r, R, D), load_rows<V>(dy, dout, r, R, D);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            float m = r + k < (size_t)R ? (float)mean[r + k] : 0, s = r + k < (size_t)R ? rstd[r + k] : 0;
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    n[k][u][i] = (n[k][u][i] - m) * s;
                    dw[u][i] += dy[k][u][i] * n[k][u][i], db[u][i] += dy[k][u][i];
                    dy[k][u][i] *= w[u][i];
                    sum.x[k] += dy[k][u][i], dot.x[k] += dy[k][u][i] * n[k][u][i];
                }
            }
        }
        sum = block_sum(sum), dot = block_sum(dot);
        // 2.
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            float s = r + k < (size_t)R ? rstd[r + k] : 0;
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    n[k][u][i] = s * (dy[k][u][i] - sum.x[k] / D - n[k][u][i] * (dot.x[k] / D));
                }
            }
        }
        store_rows<V>(dinp, n, r, R, D);
    }
    store_columns<V>(parts + (size_t)blockIdx.x * 2 * D, dw, D);
    store_columns<V>(parts + ((size_t)blockIdx.x * 2 + 1) * D, db, D);
}

static void layernorm_fast_backward(floatX *dinp, float *dweight, float *dbias, const floatX *dout, const floatX *inp,
                                    const float *weight, const double *mean, const float *rstd, int R, int D) {
    size_t bytes = (size_t)row_parts(R) * 2 * D * sizeof(float);
    float *parts = parts_memory(bytes, workspace(bytes));
    auto kernel = row_vectors(D) == 1 ? layernorm_fast_backward_kernel<1> : layernorm_fast_backward_kernel<2>;
    kernel<<<row_parts(R), row_threads(D)>>>(dinp, parts, dout, inp, weight, mean, rstd, R, D);
    if (dweight) sum_parts_fast(dweight, dbias, parts, row_parts(R), D, D, 1);
}

// ----------------------------------------------------------------------------
// sums over rows

// Formula: out (D) += sum_r dy (R,D). Mapping: a thread owns VEC columns, see common.cuh.
// Memory: reads R*D. parts (gridDim.x * down, D). Passes: 1. this kernel. 2. sum_parts_fast() adds the parts.
static __global__ void sum_rows_wide_kernel(float *parts, const floatX *dy, int R, int D) {
    Place p = place<VEC>(D);
    float x[VEC], sum[VEC] = {};
    if (p.row < 0) return;
    for (size_t r = (size_t)blockIdx.x * p.down + p.row; r < (size_t)R; r += (size_t)gridDim.x * p.down) {
        load<VEC>(x, dy + r * D + p.c);
#pragma unroll
        for (int i = 0; i < VEC; i++) sum[i] += x[i];
    }
    for (int i = 0; i < VEC; i++) parts[((size_t)blockIdx.x * p.down + p.row) * D + p.c + i] = sum[i];
}

static void sum_rows_wide(float *out, const floatX *dy, int R, int D) {
    int blocks = column_blocks(VEC, R, D), P = blocks * threads_down(VEC, D);
    size_t bytes = (size_t)P * D * sizeof(float);
    float *parts = parts_memory(bytes, workspace(bytes));
    sum_rows_wide_kernel<<<column_grid(VEC, blocks, D), THREADS, 0, gpu.stream>>>(parts, dy, R, D);
    sum_parts_fast(out, NULL, parts, P, D, 0, 1);
}

// Formula: dx = dout s (1 + x (1 - s)) with s = sigmoid(x), and its sums over rows. dinp may be dout.
// Mapping: a thread owns VEC columns, see common.cuh, and has ROWS rows at a time.
// Memory: reads 2*R*D, writes R*D. parts (gridDim.x * down, D). Passes: 1. this kernel. 2. sum_parts_fast().
static __global__ void __launch_bounds__(THREADS, 4)
    silu_bias_kernel(floatX *dinp, float *parts, const floatX *dout, const floatX *inp, int R, int D) {
    Place p = place<VEC>(D);
    Vec<VEC> x[ROWS], dy[ROWS];
    float sum[VEC] = {};
    if (p.row < 0) return;
    size_t step = (size_t)gridDim.x * p.down;
    for (size_t r = (size_t)blockIdx.x * p.down + p.row; r < (size_t)R; r += ROWS * step) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            size_t at = (r + k * step) * D + p.c;
            if (r + k * step < (size_t)R) x[k] = *(const Vec<VEC> *)(inp + at), dy[k] = *(const Vec<VEC> *)(dout + at);
        }
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            if (r + k * step >= (size_t)R) break;
            float dx[VEC];
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float a = to_float(x[k].v[i]), s = sigmoid_fast(a);
                dx[i] = to_float(dy[k].v[i]) * (s * (1 + a * (1 - s)));
                sum[i] += dx[i];
            }
            store<VEC>(dinp + (r + k * step) * D + p.c, dx);
        }
    }
    for (int i = 0; i < VEC; i++) parts[((size_t)blockIdx.x * p.down + p.row) * D + p.c + i] = sum[i];
}

static void silu_bias_fast_backward(floatX *dinp, float *dbias, const floatX *dout, const floatX *inp, int R, int D) {
    int blocks = column_blocks(VEC, R, D), P = blocks * threads_down(VEC, D);
    size_t bytes = (size_t)P * D * sizeof(float);
    float *parts = parts_memory(bytes, workspace(bytes));
    silu_bias_kernel<<<column_grid(VEC, blocks, D), THREADS>>>(dinp, parts, dout, inp, R, D);
    sum_parts_fast(dbias, NULL, parts, P, D, 0, 1);
}
