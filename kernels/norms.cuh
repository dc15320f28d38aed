/*
norms.cuh: RMSNorm and LayerNorm with rows in registers, and sums over rows. Replaces rmsnorm_forward() and
rmsnorm_backward() if they have a weight, layernorm_forward(), layernorm_backward(), and sum_rows() if its x is NULL.

The idea: the plain kernels read a row once for its statistics and again to normalize it, and the backward pass reads
everything a third time for dweight and dbias. Here a thread block keeps ROWS whole rows in registers, so that x and dy
are read once. A barrier serves ROWS rows. A thread owns the same columns of all rows: weight is read once, and the sums
for dweight and dbias stay in registers until the end, when they become one part for each thread block
(sum_parts_fast()).

              columns (V vectors of VEC elements for each thread)
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
    MAX_COLUMNS = 2 * ROW_THREADS * VEC
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

// Whether the squares of some row overflowed; such a row gets the smaller unit. All threads get the same answer.
static __device__ bool overflowed(float unit[ROWS], RowSums squares) {
    bool any = false;
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (!(squares.x[k] <= LARGE)) unit[k] = SMALL_UNIT, any = true;
    }
    return any;
}

// ----------------------------------------------------------------------------
// RMSNorm

// Formula: see rmsnorm_forward() in megalodon.cu; in a smaller unit where squares overflow.
// Mapping: a thread block has ROWS rows, a thread V vectors of each.
// Memory: reads and writes R*D.
// Passes: 1. load, sum of squares; seldom twice. 2. normalize.
template <int V>
static __global__ void __launch_bounds__(ROW_THREADS)
    rmsnorm_fast_forward_kernel(floatX *out, float *rstd, const floatX *inp, const float *weight, int R, int D,
                                float eps) {
    float x[ROWS][V][VEC], w[V][VEC];
    load_columns<V>(w, weight, 1, 1, D);
    size_t r = (size_t)blockIdx.x * ROWS;
    RowSums squares;
    float unit[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) unit[k] = 1;
    // 1.
    for (int attempt = 0; attempt < 2; attempt++) {
        load_rows<V>(x, inp, r, R, D);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            squares.x[k] = 0;
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    x[k][u][i] *= unit[k];
                    squares.x[k] += x[k][u][i] * x[k][u][i];
                }
            }
        }
        squares = block_sum(squares);
        if (!overflowed(unit, squares)) break;
    }
    // 2.
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        float s = 1 / sqrtf(squares.x[k] / D + eps * unit[k] * unit[k]);
#pragma unroll
        for (int u = 0; u < V; u++) {
#pragma unroll
            for (int i = 0; i < VEC; i++) x[k][u][i] = x[k][u][i] * s * w[u][i];
        }
        if (threadIdx.x == 0 && r + k < (size_t)R) rstd[r + k] = s * unit[k];
    }
    store_rows<V>(out, x, r, R, D);
}

static void rmsnorm_fast_forward(floatX *out, float *rstd, const floatX *inp, const float *weight, int R, int D,
                                 double eps) {
    auto kernel = row_vectors(D) == 1 ? rmsnorm_fast_forward_kernel<1> : rmsnorm_fast_forward_kernel<2>;
    kernel<<<ceil_div(R, ROWS), row_threads(D)>>>(out, rstd, inp, weight, R, D, (float)eps);
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
    float *parts = (float *)workspace((size_t)row_parts(R) * D * sizeof(float));
    auto kernel = row_vectors(D) == 1 ? rmsnorm_fast_backward_kernel<1> : rmsnorm_fast_backward_kernel<2>;
    kernel<<<row_parts(R), row_threads(D)>>>(dinp, parts, dout, inp, weight, rstd, R, D);
    if (dweight) sum_parts_fast(dweight, NULL, parts, row_parts(R), D, 0, 1);
}

// ----------------------------------------------------------------------------
// LayerNorm

// Formula: see layernorm_forward() in megalodon.cu; in a smaller unit where squares overflow.
// Mapping: a thread block has ROWS rows, a thread V vectors of each.
// Memory: reads and writes R*D.
// Passes: 1. load, mean, sum of squared deviations; seldom twice. 2. normalize.
template <int V>
static __global__ void __launch_bounds__(ROW_THREADS)
    layernorm_fast_forward_kernel(floatX *out, double *mean, float *rstd, const floatX *inp, const float *weight,
                                  const float *bias, int R, int D, float eps) {
    float x[ROWS][V][VEC], w[V][VEC], b[V][VEC];
    load_columns<V>(w, weight, 1, 1, D), load_columns<V>(b, bias, 0, 0, D);
    size_t r = (size_t)blockIdx.x * ROWS;
    RowSums sum, squares;
    float unit[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) unit[k] = 1;
    // 1.
    for (int attempt = 0; attempt < 2; attempt++) {
        load_rows<V>(x, inp, r, R, D);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            sum.x[k] = squares.x[k] = 0;
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < VEC; i++) x[k][u][i] *= unit[k], sum.x[k] += x[k][u][i];
            }
        }
        sum = block_sum(sum);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
#pragma unroll
            for (int u = 0; u < V; u++) {
                bool inside = (int)(u * blockDim.x + threadIdx.x) * VEC < D;
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    x[k][u][i] -= sum.x[k] / D;
                    squares.x[k] += inside ? x[k][u][i] * x[k][u][i] : 0;
                }
            }
        }
        squares = block_sum(squares);
        if (!overflowed(unit, squares)) break;
    }
    // 2.
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        float s = 1 / sqrtf(squares.x[k] / D + eps * unit[k] * unit[k]);
#pragma unroll
        for (int u = 0; u < V; u++) {
#pragma unroll
            for (int i = 0; i < VEC; i++) x[k][u][i] = x[k][u][i] * s * w[u][i] + b[u][i];
        }
        if (threadIdx.x == 0 && r + k < (size_t)R)
            mean[r + k] = (double)(sum.x[k] / D) / unit[k], rstd[r + k] = s * unit[k];
    }
    store_rows<V>(out, x, r, R, D);
}

static void layernorm_fast_forward(floatX *out, double *mean, float *rstd, const floatX *inp, const float *weight,
                                   const float *bias, int R, int D, double eps) {
    auto kernel = row_vectors(D) == 1 ? layernorm_fast_forward_kernel<1> : layernorm_fast_forward_kernel<2>;
    kernel<<<ceil_div(R, ROWS), row_threads(D)>>>(out, mean, rstd, inp, weight, bias, R, D, (float)eps);
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
    float *parts = (float *)workspace((size_t)row_parts(R) * 2 * D * sizeof(float));
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
    float *parts = (float *)workspace((size_t)P * D * sizeof(float));
    sum_rows_wide_kernel<<<column_grid(VEC, blocks, D), THREADS>>>(parts, dy, R, D);
    sum_parts_fast(out, NULL, parts, P, D, 0, 1);
}
