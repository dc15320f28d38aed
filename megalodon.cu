/*
megalodon.cu: the Megalodon language model on one GPU. It has the layer functions of megalodon.c, in the same order and
with the same arguments, so that the two files can be read side by side: megalodon.c derives each formula, this file
says how it is mapped to threads. megalodon.h says what the model is and what the letters mean.

How to read it
- Each layer has one plain kernel, or a few, for any shape. The comment of a kernel has up to four parts.
  Formula: what is computed, or "see megalodon.c".
  Mapping: what a thread block, a warp and a thread own.
  Memory: elements read and written. R = B*L is the number of rows; vectors such as weights are not counted.
  Passes: the kernels or loops in order; the code repeats their numbers.
- The comment above a section says what each argument means. Where it says nothing, megalodon.c does.
- Arguments differ from those of megalodon.c in few functions: matmul() calls cuBLAS, sum_rows() can scale,
  embedding_backward() needs V, attention_forward() and _backward() do not choose their threads, and one call of
  attention_chunk_forward() or _backward() is for several sequences.
- Faster versions are in kernels/, one idea a file. A plain function hands over to one in a line FAST or HOPPER.
  `make cuda PLAIN=1` builds without kernels/. MEGALODON_PLAIN=1 in the environment turns them off at run time.
- BESIDE(call) says that what follows, up to JOIN(), does not need the call's results. Both may run at the same time.

Numbers
- floatX is the type of activations and of the weights that are multiplied: bfloat16, or float with -DMEGALODON_FP32.
  Kernels compute in float, except as stated below. Matrix products accumulate in float (no TF32).
- Parameters, their gradients, and the optimizer's moments are float. After each step the optimizer rounds a copy of the
  parameters to floatX, which the matrix products read: see rounded().
- TimestepNorm's moments, and the means and sums of squares of all norms, are double.

Two runs give the same numbers: there are no atomics. A thread block sums some rows in a fixed order, which makes a part
of a sum over rows, and a second kernel adds the parts in a fixed order.
*/
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

extern "C" {
#include "megalodon.h"
}

#ifdef MEGALODON_FP32
typedef float floatX;
static const cudaDataType_t CUBLAS_TYPE = CUDA_R_32F;
static __host__ __device__ float to_float(floatX x) { return x; }
static __host__ __device__ floatX to_floatX(float x) { return x; }
#else
typedef __nv_bfloat16 floatX;
static const cudaDataType_t CUBLAS_TYPE = CUDA_R_16BF;
static __host__ __device__ float to_float(floatX x) { return __bfloat162float(x); }
static __host__ __device__ floatX to_floatX(float x) { return __float2bfloat16(x); } // rounds to nearest
#endif

enum {
    WARP = 32,
    THREADS = 256,      // per thread block, unless a kernel says otherwise
    ROW_WARPS = 8,      // warps of a thread block in which each warp has a row
    CEMA_BLOCK = 64,    // tokens of a token block of CEMA
    CEMA_PARTS = 32,    // parts of the sums for the gradients of CEMA's coefficients
    QUERY_TILE = 512,   // rows of the score matrix computed at once
    SCORES = 1 << 24,   // elements of the score matrices computed at once, at most, but at least those of one sequence
    LOGITS = 1 << 27,   // elements of logits that exist at a time, at most
    LOGIT_ROWS = 128,   // but at least so many rows of them
    SUM_PARTS = 256,    // parts of a sum over rows, at most
    MAX_BLOCKS = 8192,  // thread blocks of a kernel whose threads may have several elements, at most
    EMBED_PARTS = 8192, // if V is smaller, a token's rows are divided among up to EMBED_PARTS/V thread blocks
};

static __host__ __device__ int min_int(int a, int b) { return a < b ? a : b; }
static __host__ __device__ int max_int(int a, int b) { return a > b ? a : b; }
static __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

extern "C" {
#include "plumbing/model.h"
}

static const double PI = 3.14159265358979323846;

#include "plumbing/device.cuh"

// ----------------------------------------------------------------------------
// device functions that several kernels use

static __device__ float exp_fast(float x) { // the error of __expf is below that of rounding to bfloat16
    return sizeof(floatX) == 4 ? expf(x) : __expf(x);
}
static __device__ float sigmoid(float x) { return 1 / (1 + exp_fast(-x)); }

// ----------------------------------------------------------------------------
// matrix product: C (M,N) = op(A) op(B), added to C if `add`. op(A) is (M,K), op(B) is (K,N).
// cuBLAS stores matrices by columns. A row-major C is the column-major C' = op(B)' op(A)', so A and B change places.
// The three products of a linear map y = x W', with x (R,K), W (M,K), y (R,M), all row-major:
//     forward          y  = x W'         matmul(y,  matrix(x),      transposed(W), R, M, K)
//     input gradient   dx = dy W         matmul(dx, matrix(dy),     matrix(W),     R, K, M)
//     weight gradient  dW += dy' x       matmul(dW, transposed(dy), matrix(x),     M, K, R)

// An operand in device memory. ld: elements from one stored row to the next. transposed: it is stored as (K,M) or (N,K).
typedef struct {
    const floatX *at;
    int ld, transposed;
    int64_t stride; // elements between the matrices of a batch
} Matrix;

static Matrix matrix(const floatX *at, int ld) { return Matrix{at, ld, 0, 0}; }
static Matrix transposed(const floatX *at, int ld) { return Matrix{at, ld, 1, 0}; }

// C has type CUBLAS_TYPE (activations) or CUDA_R_32F (gradients of weights).
static void matmul(void *C, cudaDataType_t type, int ldc, Matrix A, Matrix B, int M, int N, int K, int add) {
    const float alpha = 1, beta = add ? 1 : 0;
    cublasCheck(cublasGemmEx(gpu.blas, B.transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                             A.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, N, M, K, &alpha, B.at, CUBLAS_TYPE, B.ld, A.at,
                             CUBLAS_TYPE, A.ld, &beta, C, type, ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// The same for `batch` matrices each; stride_c elements lie between the results.
static void matmul_batched(floatX *C, int ldc, int64_t stride_c, Matrix A, Matrix B, int M, int N, int K, int add,
                           int batch) {
    const float alpha = 1, beta = add ? 1 : 0;
    cublasCheck(cublasGemmStridedBatchedEx(gpu.blas, B.transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                                           A.transposed ? CUBLAS_OP_T : CUBLAS_OP_N, N, M, K, &alpha, B.at, CUBLAS_TYPE,
                                           B.ld, B.stride, A.at, CUBLAS_TYPE, A.ld, A.stride, &beta, C, CUBLAS_TYPE,
                                           ldc, stride_c, batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// ----------------------------------------------------------------------------
// the fast kernels, and what they use of this file

static void sum_parts(float *out, const float *parts, int P, size_t stride, size_t n, int add);

#ifdef FAST_KERNELS
#include "kernels/kernels.cuh"
#endif

// ----------------------------------------------------------------------------
// sums over rows, in two kernels, so that their order is fixed
//
// A gradient of a bias or of a norm's scale is a sum over all R rows for each column. One thread for each column would
// leave most of the GPU idle, and the order of atomic additions would differ from run to run. So there are P parts:
//     1. parts (P,D): part p is the sum of rows p s to (p + 1) s - 1, with s = R/P rounded up
//     2. out (D) += the sum of the parts, in an order that depends on P only

// Formula: out (n) = sum over p of parts (P,stride), of the first n columns, added to out if `add`.
// Mapping: a thread block has 32 columns; warp threadIdx.y has every 32nd part. Memory: reads P*n floats.
// Passes: 1. each thread sums its parts. 2. transposed in shared memory, each warp adds the sums of one column.
static __global__ void sum_parts_kernel(float *out, const float *parts, int P, size_t stride, size_t n, int add) {
    __shared__ float sums[WARP][WARP + 1]; // padded to avoid shared-memory bank conflicts
    size_t c = (size_t)blockIdx.x * WARP + threadIdx.x;
    float sum = 0;
    // 1.
    for (int p = threadIdx.y; p < P && c < n; p += WARP) sum += parts[(size_t)p * stride + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    // 2.
    sum = warp_sum(sums[threadIdx.x][threadIdx.y]);
    c = (size_t)blockIdx.x * WARP + threadIdx.y;
    if (threadIdx.x == 0 && c < n) out[c] = add ? out[c] + sum : sum;
}

static void sum_parts(float *out, const float *parts, int P, size_t stride, size_t n, int add) {
    sum_parts_kernel<<<blocks_for(n, WARP), dim3(WARP, WARP)>>>(out, parts, P, stride, n, add);
}

// Formula: out (D) += sum_r dy (R,D) for a bias, or scale sum_r dy (x - mean) rstd for the scale of a norm, with mean
//   and rstd (R,G) of G groups of columns. mean, rstd NULL: 0, 1.
// Mapping: a thread block has 32 columns and the rows of part blockIdx.y; threadIdx.y counts rows.
// Memory: reads R*D (bias) or 2 R*D (scale), writes P*D floats.
// Passes: 1. each thread sums its rows. 2. the thread block adds these sums. Then sum_parts() adds the parts.
static __global__ void sum_rows_kernel(float *parts, const floatX *dy, const floatX *x, const double *mean,
                                       const float *rstd, float scale, int R, int D, int G) {
    __shared__ float sums[ROW_WARPS][WARP];
    int c = blockIdx.x * WARP + threadIdx.x, rows = ceil_div(R, gridDim.y), end = min_int((blockIdx.y + 1) * rows, R);
    float sum = 0;
    // 1.
    for (int r = blockIdx.y * rows + threadIdx.y; c < D && r < end; r += ROW_WARPS) {
        size_t at = (size_t)r * D + c, group = (size_t)r * G + c / (D / G);
        float n = x ? (float)(to_float(x[at]) - (mean ? mean[group] : 0)) * (rstd ? rstd[group] : 1) * scale : 1;
        sum += to_float(dy[at]) * n;
    }
    // 2.
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= D) return;
    for (int w = 1; w < ROW_WARPS; w++) sum += sums[w][threadIdx.x];
    parts[(size_t)blockIdx.y * D + c] = sum;
}

static void sum_rows(float *out, const floatX *dy, const floatX *x, const double *mean, const float *rstd, float scale,
                     int R, int D, int G) {
    FAST(x == NULL && D % VEC == 0, sum_rows_wide(out, dy, R, D));
    int P = min_int(SUM_PARTS, ceil_div(R, ROW_WARPS));
    float *parts = (float *)workspace((size_t)P * D * sizeof(float));
    sum_rows_kernel<<<dim3(ceil_div(D, WARP), P), dim3(WARP, ROW_WARPS)>>>(parts, dy, x, mean, rstd, scale, R, D, G);
    sum_parts(out, parts, P, D, D, 1);
}

// ----------------------------------------------------------------------------
// embedding: out (R,D) = scale * embed[token], embed (V,D). The scale is sqrt(D) with scale_emb, otherwise 1. Backward,
// the gradient of a token's row is the sum over all rows of the batch that have this token.

// Mapping: a thread has an element of row blockIdx.x. Memory: reads and writes R*D.
static __global__ void embedding_forward_kernel(floatX *out, const int32_t *tokens, const floatX *embed, float scale,
                                                int D) {
    size_t r = blockIdx.x;
    int c = channel();
    if (c < D) out[r * D + c] = to_floatX(scale * to_float(embed[(size_t)tokens[r] * D + c]));
}

static void embedding_forward(floatX *out, const int32_t *tokens, const floatX *embed, float scale, int R, int D) {
    embedding_forward_kernel<<<COLUMN_GRID(R, D)>>>(out, tokens, embed, scale, D);
}

// Formula: dembed[token] += scale * sum of dout over the rows with that token.
// Mapping: a thread block has token blockIdx.x and the rows of part blockIdx.y. In a small vocabulary tokens are
//   frequent, so there are more parts. With one part the sums are added to dembed, otherwise to parts (P,V,D).
// Memory: reads R*D of dout, and R tokens in V thread blocks, mostly from cache.
// Passes, for EMBED_ROWS rows at a time: 1. each thread compares several rows' tokens with its own; __ballot_sync()
//   collects the results of a warp in a word of 32 bits. 2. the first thread lists the matching rows in order. 3. each
//   thread sums its columns over these rows.
static __global__ void embedding_backward_kernel(float *dembed, float *parts, const floatX *dout, const int32_t *tokens,
                                                 float scale, int R, int D) {
    enum { EMBED_ROWS = 2048, WORDS = EMBED_ROWS / WARP };
    __shared__ unsigned words[WORDS];
    __shared__ int rows[EMBED_ROWS], count;
    int token = blockIdx.x, share = ceil_div(R, gridDim.y), begin = blockIdx.y * share;
    int end = min_int(begin + share, R);
    float *out = gridDim.y == 1 ? dembed : parts + (size_t)blockIdx.y * gridDim.x * D;
    for (int r0 = begin; r0 < end; r0 += EMBED_ROWS) {
        // 1.
        unsigned any = 0;
#pragma unroll
        for (int i = 0; i < EMBED_ROWS; i += THREADS) {
            int r = r0 + i + threadIdx.x;
            unsigned word = __ballot_sync(~0u, r < end && tokens[r] == token);
            if (threadIdx.x % WARP == 0) words[(i + threadIdx.x) / WARP] = word;
            any |= word;
        }
        if (!__syncthreads_or(any != 0)) continue;
        // 2.
        if (threadIdx.x == 0) {
            count = 0;
            for (int w = 0; w < WORDS; w++) {
                for (unsigned word = words[w]; word != 0; word &= word - 1)
                    rows[count++] = r0 + w * WARP + __ffs(word) - 1;
            }
        }
        __syncthreads();
        // 3.
        for (int c = threadIdx.x; c < D; c += THREADS) {
            float sum = 0;
#pragma unroll 8
            for (int i = 0; i < count; i++) sum += to_float(dout[(size_t)rows[i] * D + c]);
            out[(size_t)token * D + c] += scale * sum;
        }
        __syncthreads(); // all threads have read the rows
    }
}

static int embedding_parts(int R, int V) { return max_int(1, min_int(EMBED_PARTS / V, ceil_div(R, THREADS))); }
static size_t embedding_workspace(Dims d) {
    int P = embedding_parts(d.B * d.L, d.V);
    return P > 1 ? (size_t)P * d.V * d.D * sizeof(float) : 0; // a single part is added to the gradient at once
}

static void embedding_backward(float *dembed, const floatX *dout, const int32_t *tokens, float scale, int R, int D,
                               int V) {
    int P = embedding_parts(R, V);
    size_t n = (size_t)V * D, bytes = P > 1 ? P * n * sizeof(float) : 0;
    float *parts = (float *)workspace(bytes);
    memory_clear(parts, bytes);
    embedding_backward_kernel<<<dim3(V, P), THREADS>>>(dembed, parts, dout, tokens, scale, R, D);
    if (P > 1) sum_parts(dembed, parts, P, n, n, 1);
}

// ----------------------------------------------------------------------------
// dropout: out = mask inp/(1 - p); out may be inp. The backward pass applies the same function to the gradient. Masks
// are not kept: Philox computes an element's random word from its index, so the backward pass, another rank or the CPU
// computes the same mask. See Mask in plumbing/model.h.

// The random words of elements 4 `four` to 4 `four` + 3 of the whole step's batch.
static __device__ void mask_words(uint32_t words[4], const Mask *mask, uint64_t four) {
    // indices beyond 32 bits go above the layer's 16 bits
    megalodon_philox(words, mask->seed, mask->stream, mask->step, mask->layer + (uint32_t)(four >> 32 << 16),
                     (uint32_t)four);
}

// The factor of element i of this call's tensor: 0 or 1/(1 - p).
static __device__ float mask_at(const Mask *mask, uint64_t i) {
    uint32_t words[4], which = (uint32_t)((mask->first + i) % 4);
    mask_words(words, mask, (mask->first + i) / 4);
    uint32_t word = which == 0 ? words[0] : which == 1 ? words[1] : which == 2 ? words[2] : words[3];
    return word >= (uint32_t)(mask->p * 4294967296.0) ? (float)(1 / (1 - mask->p)) : 0;
}

// Mapping: a thread has the four elements of one Philox counter, in one sequence. Memory: reads and writes n.
static __global__ void dropout_kernel(floatX *out, const floatX *inp, Mask mask, size_t run, unsigned blocks) {
    size_t row = blockIdx.x / blocks, start = row * run;
    uint64_t first = mask.first + row * mask.row, four = first / 4 + (uint64_t)(blockIdx.x % blocks) * THREADS;
    uint32_t words[4], limit = (uint32_t)(mask.p * 4294967296.0);
    float scale = (float)(1 / (1 - mask.p));
    four += threadIdx.x;
    mask_words(words, &mask, four);
    for (int w = 0; w < 4; w++) {
        uint64_t i = 4 * four + w - first; // before the first element it wraps around, to a large number
        if (i < run) out[start + i] = to_floatX(words[w] >= limit ? to_float(inp[start + i]) * scale : 0);
    }
}

static void dropout(floatX *out, const floatX *inp, Mask mask, size_t n) {
    size_t run = mask.run > 0 ? mask.run : n;
    unsigned blocks = blocks_for(run / 4 + 2, THREADS); // for each sequence
    if (mask.p == 0) return;
    dropout_kernel<<<blocks *(unsigned)(n / run), THREADS>>>(out, inp, mask, run, blocks);
}

// ----------------------------------------------------------------------------
// TimestepNorm: y_t = (x_t - mean_t) rstd_t (weight + 1) + bias, with the mean and variance of a group's scalars at all
// tokens up to t. The moments of two sets of scalars can be merged (Chan et al.), in any grouping, so time is scanned
// in parallel: a warp takes 32 tokens at a time.
//
//     token             0      1      2    ...   31  |  32     33    ...
//     1. own moments    m0     m1     m2         m31 |  m32    m33          a thread each
//     2. scan           m0    m0:1   m0:2       m0:31|  m32   m32:33        log2(32) steps inside a warp
//        merged with    state  state  state    state |  0:31   0:31         what came before, carried on by the warp
//     3. normalize      y0     y1     y2         y31 |  y32    y33          a thread for each element
//
// Moments are double: the millionth token changes the mean by a millionth of its deviation, which float would lose.

typedef struct {
    double mean, m2; // m2: sum of squared deviations from the mean
} Moments;

// The moments of n0 scalars with moments a and n1 scalars with moments b together.
static __host__ __device__ Moments merge(double n0, Moments a, double n1, Moments b) {
    double n = n0 + n1, d = b.mean - a.mean;
    if (n == 0) return a;
    return Moments{a.mean + d * (n1 / n), a.m2 + b.m2 + d * d * (n0 * (n1 / n))};
}

// Formula: the moments of one token's g scalars in a group, from the deviations from the first of them.
// Mapping: a thread has a token and a group. Memory: reads R*D, writes 2 R*G doubles. Passes: one.
static __global__ void timestep_norm_moments_kernel(Moments *moments, const floatX *inp, size_t R, int D, int G) {
    size_t i = thread_index();
    int g = D / G;
    if (i >= R * G) return;
    const floatX *x = inp + i / G * D + i % G * g;
    double first = to_float(x[0]), s1 = 0, s2 = 0;
    for (int c = 0; c < g; c++) {
        double d = to_float(x[c]) - first;
        s1 += d;
        s2 += d * d;
    }
    double m2 = s2 - s1 * s1 / g;
    moments[i] = Moments{first + s1 / g, m2 < 0 ? 0 : m2}; // NaN stays NaN
}

// Formula: mean_t and rstd_t from the merged moments of tokens 0..t and of the state.
// Mapping: a warp has a group of a sequence, a lane one of 32 consecutive tokens.
// Memory: reads 2 R*G doubles, writes R*G doubles and R*G floats.
// Passes, for 32 tokens at a time: 1. inclusive scan over the lanes: after step s a lane has merged 2s tokens. 2. merge
//   with all tokens before these. 3. the last lane's result is carried on.
static __global__ void timestep_norm_scan_kernel(double *mean, float *rstd, NormState end, const Moments *moments,
                                                 NormState start, Dims d, double eps) {
    int i = blockIdx.x * ROW_WARPS + threadIdx.y, lane = threadIdx.x, g = d.D / d.G, b = i / d.G, j = i % d.G;
    if (i >= d.B * d.G) return;
    double n = start.count ? (double)g * (double)start.count[b] : 0; // scalars before these tokens
    Moments before = {0, 0};
    if (start.mean) before = Moments{start.mean[i], start.m2[i]};
    for (int t0 = 0; t0 < d.L; t0 += WARP) {
        int T = min_int(WARP, d.L - t0);
        size_t at = ((size_t)b * d.L + t0 + lane) * d.G + j;
        // 1.
        Moments sum = {0, 0};
        double k = lane < T ? g : 0; // scalars in sum
        if (lane < T) sum = moments[at];
        for (int step = 1; step < WARP; step *= 2) {
            double k0 = __shfl_up_sync(~0u, k, step);
            Moments left = {__shfl_up_sync(~0u, sum.mean, step), __shfl_up_sync(~0u, sum.m2, step)};
            if (lane >= step && lane < T) sum = merge(k0, left, k, sum), k += k0;
        }
        // 2.
        sum = merge(n, before, k, sum);
        if (lane < T && mean) mean[at] = sum.mean, rstd[at] = (float)(1 / sqrt(sum.m2 / (n + k) + eps));
        // 3.
        before = Moments{__shfl_sync(~0u, sum.mean, T - 1), __shfl_sync(~0u, sum.m2, T - 1)};
        n += (double)g * T;
    }
    if (lane == 0 && end.mean) end.mean[i] = before.mean, end.m2[i] = before.m2;
}

// Formula: y = (x - mean) rstd (weight + 1) + bias. Mapping: a thread has an element of row blockIdx.x.
// Memory: reads and writes R*D.
static __global__ void timestep_norm_apply_kernel(floatX *out, const double *mean, const float *rstd, const floatX *inp,
                                                  const float *weight, const float *bias, int D, int G) {
    int c = channel();
    size_t i = (size_t)blockIdx.x * D + c, group = (size_t)blockIdx.x * G + c / (D / G);
    if (c < D) out[i] = to_floatX((float)(to_float(inp[i]) - mean[group]) * rstd[group] * (weight[c] + 1) + bias[c]);
}

static size_t timestep_norm_workspace(Dims d) { return (size_t)d.B * d.L * d.G * 3 * sizeof(double); }

// Passes (kernels): 1. moments of each token. 2. scan over time. 3. normalize.
static void timestep_norm_forward(floatX *out, double *mean, float *rstd, NormState end, const floatX *inp,
                                  const float *weight, const float *bias, NormState start, Dims d, double eps) {
    FAST(timestep_norm_fast_supports(d),
         timestep_norm_fast_forward(out, mean, rstd, end, inp, weight, bias, start, d, eps));
    size_t R = (size_t)d.B * d.L;
    Moments *moments = (Moments *)workspace(timestep_norm_workspace(d));
    timestep_norm_moments_kernel<<<blocks_for(R * d.G, THREADS), THREADS>>>(moments, inp, R, d.D, d.G);
    timestep_norm_scan_kernel<<<ROW_GRID(d.B * d.G)>>>(mean, rstd, end, moments, start, d, eps);
    timestep_norm_apply_kernel<<<COLUMN_GRID(R, d.D)>>>(out, mean, rstd, inp, weight, bias, d.D, d.G);
}

// Forward line: y_t = (x_t - mean_t) rstd_t w + bias. x_s is in the moments of every t >= s, so with
// dmean_t = -rstd_t sum_group w dy and dvar_t = -1/2 rstd_t^3 sum_group w dy (x - mean_t), see megalodon.c,
//     U_s = sum_{t>=s} dmean_t/n_t,   V_s = sum_{t>=s} dvar_t/n_t,   W_s = sum_{t>=s} dvar_t mean_t/n_t
//     dx_s = rstd_s w dy_s + shift_s + slope_s (x_s - mean_s),   shift = U - 2 (W - mean V),   slope = 2 V

typedef struct {
    double U, V, W;
} Sums;

// Formula: the terms of U, V and W for one token. Mapping: a thread has a token and a group. Memory: reads 2 R*D.
static __global__ void timestep_norm_terms_kernel(Sums *sums, const floatX *dout, const floatX *inp,
                                                  const float *weight, const double *mean, const float *rstd,
                                                  const int64_t *count, Dims d) {
    size_t i = thread_index(), row = i / d.G;
    int g = d.D / d.G, j = i % d.G;
    if (i >= (size_t)d.B * d.L * d.G) return;
    const floatX *x = inp + row * d.D + j * g, *dy = dout + row * d.D + j * g;
    double m = mean[i];
    float r = rstd[i], dmean = 0, dvar = 0;
    for (int c = 0; c < g; c++) {
        float wdy = (weight[j * g + c] + 1) * to_float(dy[c]);
        dmean += wdy;
        dvar += wdy * ((float)(to_float(x[c]) - m) * r); // of the normalized x, so that it does not overflow
    }
    double n = (double)g * (double)((count ? count[row / d.L] : 0) + (int64_t)(row % d.L) + 1);
    double U = -(double)r * dmean / n, V = -0.5 * (double)r * r * dvar / n;
    sums[i] = Sums{U, V, V * m};
}

// Formula: U, V, W of each token: the sum of its terms and those of all later ones. mean not NULL: sums then gets shift
//   = U - 2 (W - mean V) as its U, and slope = 2 V as its V. dstate (B,G,3), or NULL: in: U, V, W after these tokens;
//   out: those from the first of these tokens on.
// Mapping: as timestep_norm_scan_kernel, from the last token to the first.
// Memory: reads 4 R*G and writes 3 R*G doubles.
static __global__ void timestep_norm_scan_backward_kernel(Sums *sums, double *dstate, const double *mean, Dims d) {
    int i = blockIdx.x * ROW_WARPS + threadIdx.y, lane = threadIdx.x, b = i / d.G, j = i % d.G;
    if (i >= d.B * d.G) return;
    Sums later = {0, 0, 0};
    if (dstate) later = Sums{dstate[3 * i], dstate[3 * i + 1], dstate[3 * i + 2]};
    for (int t0 = (d.L - 1) / WARP * WARP; t0 >= 0; t0 -= WARP) {
        size_t at = ((size_t)b * d.L + t0 + lane) * d.G + j;
        Sums sum = {0, 0, 0};
        if (t0 + lane < d.L) sum = sums[at];
        for (int step = 1; step < WARP; step *= 2) {
            double U = __shfl_down_sync(~0u, sum.U, step), V = __shfl_down_sync(~0u, sum.V, step);
            double W = __shfl_down_sync(~0u, sum.W, step);
            if (lane + step < WARP) sum.U += U, sum.V += V, sum.W += W;
        }
        sum.U += later.U, sum.V += later.V, sum.W += later.W;
        if (t0 + lane < d.L && mean) sums[at] = Sums{sum.U - 2 * (sum.W - mean[at] * sum.V), 2 * sum.V, 0};
        later = Sums{__shfl_sync(~0u, sum.U, 0), __shfl_sync(~0u, sum.V, 0), __shfl_sync(~0u, sum.W, 0)};
    }
    if (lane == 0 && dstate) dstate[3 * i] = later.U, dstate[3 * i + 1] = later.V, dstate[3 * i + 2] = later.W;
}

// Formula: dx = rstd w dy + shift + slope (x - mean) + residual gradients. Mapping: a thread has an element.
// Memory: reads 2 to 4 R*D, writes R*D.
static __global__ void timestep_norm_backward_kernel(floatX *dinp, const floatX *dout, const floatX *residual0,
                                                     const floatX *residual1, const floatX *inp, const float *weight,
                                                     const double *mean, const float *rstd, const Sums *sums, int D,
                                                     int G) {
    int c = channel();
    size_t i = (size_t)blockIdx.x * D + c, group = (size_t)blockIdx.x * G + c / (D / G);
    if (c >= D) return;
    // through the moments of this token and all later ones: shift + slope (x - mean); a float slope could underflow
    double later = sums[group].U + sums[group].V * (to_float(inp[i]) - mean[group]);
    float dx = rstd[group] * (weight[c] + 1) * to_float(dout[i]) + (float)later;
    if (residual0) dx += to_float(residual0[i]);
    if (residual1) dx += to_float(residual1[i]);
    dinp[i] = to_floatX(dx);
}

// Passes (kernels): 1. terms of each token. 2. scan over time, from the last token. 3. dx. 4. dweight and dbias.
static void timestep_norm_backward(floatX *dinp, float *dweight, float *dbias, double *dstate, const floatX *dout,
                                   const floatX *const residuals[2], const floatX *inp, const float *weight,
                                   const double *mean, const float *rstd, const int64_t *count, Dims d) {
    FAST(timestep_norm_fast_supports(d),
         timestep_norm_fast_backward(dinp, dweight, dbias, dstate, dout, residuals, inp, weight, mean, rstd, count, d));
    size_t R = (size_t)d.B * d.L;
    Sums *sums = (Sums *)workspace(timestep_norm_workspace(d));
    timestep_norm_terms_kernel<<<blocks_for(R * d.G, THREADS), THREADS>>>(sums, dout, inp, weight, mean, rstd, count,
                                                                          d);
    timestep_norm_scan_backward_kernel<<<ROW_GRID(d.B * d.G)>>>(sums, dstate, mean, d);
    const floatX *residual0 = residuals ? residuals[0] : NULL, *residual1 = residuals ? residuals[1] : NULL;
    timestep_norm_backward_kernel<<<COLUMN_GRID(R, d.D)>>>(dinp, dout, residual0, residual1, inp, weight, mean, rstd,
                                                           sums, d.D, d.G);
    sum_rows(dweight, dout, inp, mean, rstd, 1, (int)R, d.D, d.G);
    sum_rows(dbias, dout, NULL, NULL, NULL, 1, (int)R, d.D, 1);
}

// Chunk parallelism: each rank reduces its own tokens, an all-gather exchanges the results, and each rank combines
// them; see timestep_norm_layer_forward(). Moments can be merged in any grouping, so no rank waits for the ranks before
// it. The sums U, V and W of the backward pass are plain sums over tokens, so those of later ranks are added.

// sum.mean, sum.m2 (B,G): the moments of these tokens alone.
static void timestep_norm_reduce(NormState sum, const floatX *inp, Dims d) {
    FAST(timestep_norm_fast_supports(d), timestep_norm_fast_reduce(sum, inp, d));
    size_t R = (size_t)d.B * d.L;
    Moments *moments = (Moments *)workspace(timestep_norm_workspace(d));
    timestep_norm_moments_kernel<<<blocks_for(R * d.G, THREADS), THREADS>>>(moments, inp, R, d.D, d.G);
    timestep_norm_scan_kernel<<<ROW_GRID(d.B * d.G)>>>(NULL, NULL, sum, moments, NormState{}, d, 0);
}

// dstate (B,G,3): U, V, W of these tokens alone.
static void timestep_norm_reduce_backward(double *dstate, const floatX *dout, const floatX *inp, const float *weight,
                                          const double *mean, const float *rstd, const int64_t *count, Dims d) {
    FAST(timestep_norm_fast_supports(d),
         timestep_norm_fast_reduce_backward(dstate, dout, inp, weight, mean, rstd, count, d));
    size_t pairs = (size_t)d.B * d.G;
    Sums *sums = (Sums *)workspace(timestep_norm_workspace(d));
    timestep_norm_terms_kernel<<<blocks_for(pairs * d.L, THREADS), THREADS>>>(sums, dout, inp, weight, mean, rstd,
                                                                              count, d);
    memory_clear(dstate, pairs * 3 * sizeof *dstate);
    timestep_norm_scan_backward_kernel<<<ROW_GRID(pairs)>>>(sums, dstate, NULL, d);
}

// Formula: merge the moments of all ranks in order, see megalodon.c. all (cp_size,2,B,G): mean and m2 of each rank's
//   tokens alone. start: the moments before the whole sequence, replaced by those before this rank's tokens. end: those
//   after the whole sequence. count (B), or NULL: tokens before the whole sequence.
// Mapping: a thread has a group of a sequence.
static __global__ void timestep_norm_combine_kernel(NormState start, NormState end, const double *all,
                                                    const int64_t *count, ChunkParallel cp, Dims d) {
    int i = thread_index(), pairs = d.B * d.G, g = d.D / d.G;
    if (i >= pairs) return;
    double n = count ? (double)g * (double)count[i / d.G] : 0;
    Moments sum = {start.mean[i], start.m2[i]};
    for (int r = 0; r < cp.cp_size; r++) {
        if (r == cp.cp_rank) start.mean[i] = sum.mean, start.m2[i] = sum.m2;
        double scalars = (double)g * (double)cp.lengths[r];
        sum = merge(n, sum, scalars, Moments{all[2 * r * pairs + i], all[(2 * r + 1) * pairs + i]});
        n += scalars;
    }
    if (end.mean) end.mean[i] = sum.mean, end.m2[i] = sum.m2;
}

static void timestep_norm_combine(NormState start, NormState end, const double *all, const int64_t *count,
                                  const ChunkParallel *cp, Dims d) {
    timestep_norm_combine_kernel<<<blocks_for((size_t)d.B * d.G, THREADS), THREADS>>>(start, end, all, count, *cp, d);
}

// Formula: U, V, W after this rank's tokens: those after the whole sequence plus the sums of all later ranks.
//   all (cp_size,n): each rank's sums, n = B*G*3. dstate (n): in: after the whole sequence; out: after this rank. end
//   (n), or NULL: gets those from the first token on. Mapping: a thread has one sum.
static __global__ void timestep_norm_combine_backward_kernel(double *dstate, double *end, const double *all,
                                                             ChunkParallel cp, size_t n) {
    size_t i = thread_index();
    if (i >= n) return;
    double sum = dstate[i];
    for (int r = cp.cp_size - 1; r >= 0; r--) {
        if (r == cp.cp_rank) dstate[i] = sum;
        sum += all[r * n + i];
    }
    if (end) end[i] = sum;
}

static void timestep_norm_combine_backward(double *dstate, double *end, const double *all, const ChunkParallel *cp,
                                           Dims d) {
    size_t n = (size_t)d.B * d.G * 3;
    timestep_norm_combine_backward_kernel<<<blocks_for(n, THREADS), THREADS>>>(dstate, end, all, *cp, n);
}

// ----------------------------------------------------------------------------
// CEMA, the complex exponential moving average: h_t = q h_(t-1) + p x_t, y_t = Re sum_n g_n h_t,n + omega x_t for N
// complex numbers h per channel, see megalodon.c. Each coefficient is (N,D). All numbers are float.

// Formula: coefficients from parameters, see megalodon.c. Mapping: a thread has one of the N*D.
static __global__ void cema_coeffs_forward_kernel(Coeffs c, const float *alpha, const float *delta, const float *theta,
                                                  const float *gamma, CemaKind kind, int D, int N) {
    int i = thread_index();
    if (i >= D * N) return;
    int n = i / D, d = i % D, in = d * N + n;
    double a = 1 / (1 + exp(-(double)alpha[in])), b = 1 / (1 + exp(-(double)delta[in]));
    double phi = kind == CEMA_REAL ? 0 : 2 * PI * (n + 1) / N / (1 + exp(-(double)theta[d])), size = 1 - a * b;
    c.p[i] = (float)a;
    c.q_re[i] = (float)(size * cos(phi)), c.q_im[i] = (float)(size * sin(phi));
    c.g_re[i] = (float)(gamma[2 * in] / sqrt((double)N)), c.g_im[i] = (float)(gamma[2 * in + 1] / sqrt((double)N));
}

static void cema_coeffs_forward(Coeffs *c, const float *alpha, const float *delta, const float *theta,
                                const float *gamma, CemaKind kind, int D, int N) {
    unsigned blocks = blocks_for((size_t)D * N, THREADS);
    cema_coeffs_forward_kernel<<<blocks, THREADS>>>(*c, alpha, delta, theta, gamma, kind, D, N);
}

// Forward lines: p = sigmoid(alpha), q = (1 - p sigmoid(delta)) e^(i phi), phi_n = sigmoid(theta) 2 pi n/N for n = 1..N
// (in the code n begins at 0), g = gamma/sqrt(N). Derivatives: see megalodon.c.
// Mapping: a thread block has 32 channels; threadIdx.y has every 8th mode. The modes of a channel share theta, so their
//   gradients w.r.t. it are added in shared memory.
static __global__ void cema_coeffs_backward_kernel(float *dalpha, float *ddelta, float *dtheta, float *dgamma,
                                                   Coeffs dc, const float *alpha, const float *delta,
                                                   const float *theta, CemaKind kind, int D, int N) {
    __shared__ double dangles[ROW_WARPS][WARP];
    int d = blockIdx.x * WARP + threadIdx.x;
    double angle = d < D && kind == CEMA_COMPLEX ? 1 / (1 + exp(-(double)theta[d])) : 0, dangle = 0;
    for (int n = threadIdx.y; n < N && d < D; n += ROW_WARPS) {
        size_t in = (size_t)d * N + n, i = (size_t)n * D + d;
        double a = 1 / (1 + exp(-(double)alpha[in])), b = 1 / (1 + exp(-(double)delta[in]));
        double phi = 2 * PI * (n + 1) / N * angle, re = cos(phi), im = sin(phi);
        double dabs = dc.q_re[i] * re + dc.q_im[i] * im;
        double dphi = (1 - a * b) * (dc.q_im[i] * re - dc.q_re[i] * im);
        dalpha[in] += (float)((dc.p[i] - b * dabs) * a * (1 - a));
        ddelta[in] += (float)(-a * dabs * b * (1 - b));
        dangle += dphi * 2 * PI * (n + 1) / N;
        dgamma[2 * in] += (float)(dc.g_re[i] / sqrt((double)N));
        dgamma[2 * in + 1] += (float)(dc.g_im[i] / sqrt((double)N));
    }
    dangles[threadIdx.y][threadIdx.x] = dangle;
    __syncthreads();
    if (threadIdx.y > 0 || d >= D) return;
    for (int w = 1; w < ROW_WARPS; w++) dangle += dangles[w][threadIdx.x];
    dtheta[d] += (float)(dangle * angle * (1 - angle));
}

static void cema_coeffs_backward(float *dalpha, float *ddelta, float *dtheta, float *dgamma, const Coeffs *dc,
                                 const float *alpha, const float *delta, const float *theta, CemaKind kind, int D,
                                 int N) {
    cema_coeffs_backward_kernel<<<ceil_div(D, WARP), dim3(WARP, ROW_WARPS), 0, gpu.stream>>>(
        dalpha, ddelta, dtheta, dgamma, *dc, alpha, delta, theta, kind, D, N);
}

static __device__ float2 times(float2 a, float2 b) { return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x); }
static __device__ float2 conjugate(float2 a) { return make_float2(a.x, -a.y); }

// q^n by repeated squaring, in double, since n may be large.
static __device__ float2 power(float2 base, int64_t n) {
    double re = 1, im = 0, q_re = base.x, q_im = base.y;
    for (; n > 0; n /= 2) {
        double old = re, square = q_re * q_re - q_im * q_im;
        if (n % 2 == 1) re = old * q_re - im * q_im, im = old * q_im + im * q_re;
        q_im = 2 * q_re * q_im, q_re = square;
    }
    return make_float2((float)re, (float)im);
}

// The recurrence is linear, so time is cut into token blocks of T = CEMA_BLOCK tokens, which are computed in parallel:
//     1. block-local recurrence: each token block's end state, from a zero state at its start
//     2. scan over token blocks: the state before each one, h_(k+1) = q^T h_k + end_k
//     3. recurrence again, from these states, which yields y
// The backward pass is the same recurrence from the last token to the first. With F the gradient w.r.t. the state after
// a token, which already includes the factor conj(q):
//     G_t = conj(g) dy_t + F_t,   F_(t-1) = conj(q) G_t,   so for a token block  F_before = conj(q)^T F_after + end
// States and gradients are (B, blocks, 2, N, D).
//
//     token block      0               1               2
//     1. ends       0 -> end_0      0 -> end_1      0 -> end_2       in parallel
//     2. scan      h_0 = h_in   h_1 = q^T h_0 + end_0   h_2 = ..     in order, N*D numbers a step
//     3. outputs   h_0 -> y        h_1 -> y        h_2 -> y          in parallel
//
// Work: 1 and 3 both compute the recurrence, so each token costs two steps for each mode instead of one. In return the
// longest chain of dependent steps has T + L/T + T steps instead of L.

static size_t cema_states_bytes(Dims d) {
    return (size_t)d.B * ceil_div(d.L, CEMA_BLOCK) * 2 * d.N * d.D * sizeof(float);
}

// Index of the real part of mode n, channel c in token block `block`; the imaginary part is N*D elements later.
static __device__ size_t state_index(int block, int n, int c, Dims d) {
    return ((size_t)block * 2 * d.N + n) * d.D + c;
}

static __device__ float2 coeff(const float *re, const float *im, int n, int c, Dims d) {
    return make_float2(re[n * d.D + c], im[n * d.D + c]);
}

// 1. Formula: forward end = sum_t q^(T-1-t) p x_t; backward end = sum_t conj(q)^(t+1) conj(g) dy_t; t = 0 .. T-1.
// Mapping: a thread has a channel and a mode of a token block; neighbouring threads have neighbouring channels.
// Memory: reads R*D N times, mostly from cache; writes 2*N*D floats for each token block.
static __global__ void cema_ends_kernel(float *ends, const floatX *inp, Coeffs coeffs, int backward, Dims d) {
    int c = channel(), n = blockIdx.z, blocks = ceil_div(d.L, CEMA_BLOCK), b = blockIdx.x / blocks;
    int t0 = blockIdx.x % blocks * CEMA_BLOCK, T = min_int(CEMA_BLOCK, d.L - t0);
    if (c >= d.D) return;
    const floatX *x = inp + ((size_t)b * d.L + t0) * d.D + c;
    float2 q = coeff(coeffs.q_re, coeffs.q_im, n, c, d), g = coeff(coeffs.g_re, coeffs.g_im, n, c, d);
    float2 h = make_float2(0, 0);
    if (backward) {
        for (int t = T - 1; t >= 0; t--) {
            float dy = to_float(x[(size_t)t * d.D]);
            h = times(conjugate(q), make_float2(g.x * dy + h.x, -g.y * dy + h.y));
        }
    } else {
        float p = coeffs.p[n * d.D + c];
        for (int t = 0; t < T; t++) {
            h = times(q, h);
            h.x += p * to_float(x[(size_t)t * d.D]);
        }
    }
    size_t at = state_index(blockIdx.x, n, c, d);
    ends[at] = h.x, ends[at + d.N * d.D] = h.y;
}

// 2. Formula: h_(k+1) = q^T h_k + end_k; backward F_(k-1) = conj(q)^T F_k + end_k. states: in: the ends; out: the state
//   before each token block, backward F after it. start (B,2,N,D), or NULL for zeros: the state before all tokens,
//   backward F after them. final (B,2,N,D), or NULL: gets the state after all tokens, backward F before them.
// Mapping: a thread has a channel and a mode of a sequence. Memory: reads and writes the states.
static __global__ void cema_scan_kernel(float *states, float *final, const float *start, Coeffs coeffs, int backward,
                                        Dims d) {
    int c = channel(), n = blockIdx.z, b = blockIdx.x, blocks = ceil_div(d.L, CEMA_BLOCK);
    size_t im = (size_t)d.N * d.D, first = state_index(b, n, c, d);
    if (c >= d.D) return;
    float2 q = coeff(coeffs.q_re, coeffs.q_im, n, c, d), h = make_float2(0, 0);
    if (backward) q = conjugate(q);
    if (start) h = make_float2(start[first], start[first + im]);
    float2 whole = power(q, CEMA_BLOCK), partial = power(q, d.L - (blocks - 1) * CEMA_BLOCK);
    for (int i = 0; i < blocks; i++) {
        int k = backward ? blocks - 1 - i : i;
        size_t at = state_index(b * blocks + k, n, c, d);
        float2 end = make_float2(states[at], states[at + im]);
        states[at] = h.x, states[at + im] = h.y;
        h = times(k == blocks - 1 ? partial : whole, h);
        h.x += end.x, h.y += end.y;
    }
    if (final) final[first] = h.x, final[first + im] = h.y;
}

// Kernels 1 and 2.
static void cema_states(float *states, float *final, const float *start, const floatX *inp, const Coeffs *coeffs,
                        int backward, Dims d) {
    int blocks = ceil_div(d.L, CEMA_BLOCK), columns = ceil_div(d.D, THREADS);
    dim3 grid(d.B * blocks, columns, d.N), sequences(d.B, columns, d.N);
    cema_ends_kernel<<<grid, THREADS>>>(states, inp, *coeffs, backward, d);
    cema_scan_kernel<<<sequences, THREADS>>>(states, final, start, *coeffs, backward, d);
}

// 3. Formula: h_t = q h_(t-1) + p x_t, y_t = Re sum_n g_n h_t,n + omega x_t.
// Mapping: a thread has a channel of a token block. Its outputs y stay in registers while it goes through the modes.
// Memory: reads R*D N times, mostly from cache, and the states; writes R*D.
static __global__ void cema_forward_kernel(floatX *out, const floatX *inp, const float *states, Coeffs coeffs,
                                           const float *omega, Dims d) {
    int c = channel(), blocks = ceil_div(d.L, CEMA_BLOCK), b = blockIdx.x / blocks;
    int t0 = blockIdx.x % blocks * CEMA_BLOCK, T = min_int(CEMA_BLOCK, d.L - t0);
    if (c >= d.D) return;
    size_t first = ((size_t)b * d.L + t0) * d.D + c;
    float y[CEMA_BLOCK];
#pragma unroll
    for (int t = 0; t < CEMA_BLOCK; t++) y[t] = t < T ? omega[c] * to_float(inp[first + (size_t)t * d.D]) : 0;
    for (int n = 0; n < d.N; n++) {
        size_t at = state_index(blockIdx.x, n, c, d);
        float2 h = make_float2(states[at], states[at + d.N * d.D]);
        float2 q = coeff(coeffs.q_re, coeffs.q_im, n, c, d), g = coeff(coeffs.g_re, coeffs.g_im, n, c, d);
        float p = coeffs.p[n * d.D + c];
#pragma unroll
        for (int t = 0; t < CEMA_BLOCK; t++) {
            if (t >= T) break;
            h = times(q, h);
            h.x += p * to_float(inp[first + (size_t)t * d.D]);
            y[t] += g.x * h.x - g.y * h.y;
        }
    }
#pragma unroll
    for (int t = 0; t < CEMA_BLOCK; t++) {
        if (t < T) out[first + (size_t)t * d.D] = to_floatX(y[t]);
    }
}

// h_blocks (B, blocks, 2, N, D): the state before each token block, for the backward pass. The fast version has another
// layout, so forward and backward must choose alike.
static void cema_forward(floatX *out, float *h_blocks, float *h_out, const floatX *inp, const Coeffs *coeffs,
                         const float *omega, const float *h_in, Dims d) {
    FAST(cema_fast_supports(d), cema_fast_forward(out, h_blocks, h_out, inp, coeffs, omega, h_in, d));
    cema_states(h_blocks, h_out, h_in, inp, coeffs, 0, d);
    dim3 grid(d.B * ceil_div(d.L, CEMA_BLOCK), ceil_div(d.D, WARP));
    cema_forward_kernel<<<grid, WARP>>>(out, inp, h_blocks, *coeffs, omega, d);
}

// Forward lines: h_t = q h_(t-1) + p x_t, y_t = Re sum_n g_n h_t,n + omega x_t. Derivatives, from megalodon.c:
//     G_t = conj(g) dy_t + F_t,  F_(t-1) = conj(q) G_t,  dx_t = omega dy_t + sum_n p Re G_t
//     dp = sum_t x_t Re G_t,  dq = sum_t G_t conj(h_(t-1)),  dg = sum_t dy_t conj(h_t),  domega = sum_t x_t dy_t
// futures: F after each token block, from kernels 1 and 2 with `backward`.

// 4. Formula: dx, see above. Mapping and memory: as cema_forward_kernel, from the last token to the first.
static __global__ void cema_backward_kernel(floatX *dinp, const floatX *dout, const float *futures, Coeffs coeffs,
                                            const float *omega, Dims d) {
    int c = channel(), blocks = ceil_div(d.L, CEMA_BLOCK), b = blockIdx.x / blocks;
    int t0 = blockIdx.x % blocks * CEMA_BLOCK, T = min_int(CEMA_BLOCK, d.L - t0);
    if (c >= d.D) return;
    size_t first = ((size_t)b * d.L + t0) * d.D + c;
    float dx[CEMA_BLOCK];
#pragma unroll
    for (int t = 0; t < CEMA_BLOCK; t++) dx[t] = t < T ? omega[c] * to_float(dout[first + (size_t)t * d.D]) : 0;
    for (int n = 0; n < d.N; n++) {
        size_t at = state_index(blockIdx.x, n, c, d);
        float2 F = make_float2(futures[at], futures[at + d.N * d.D]);
        float2 q = coeff(coeffs.q_re, coeffs.q_im, n, c, d), g = coeff(coeffs.g_re, coeffs.g_im, n, c, d);
        float p = coeffs.p[n * d.D + c];
#pragma unroll
        for (int t = CEMA_BLOCK - 1; t >= 0; t--) {
            if (t >= T) continue;
            float dy = to_float(dout[first + (size_t)t * d.D]);
            float2 G = make_float2(g.x * dy + F.x, -g.y * dy + F.y);
            dx[t] += p * G.x;
            F = times(conjugate(q), G);
        }
    }
#pragma unroll
    for (int t = 0; t < CEMA_BLOCK; t++) {
        if (t < T) dinp[first + (size_t)t * d.D] = to_floatX(dx[t]);
    }
}

// 5. Formula: dp, dq and dg, see above, of one part of the token blocks.
// Mapping: a thread has a channel and a mode, and every gridDim.x-th token block.
// Memory: reads R*D of dout N times and of inp 3 N times, mostly from cache, and the states and gradients.
// Passes, for each token block: dq needs G_t and h_(t-1) of the same token, but G is computed from the last token to
//   the first and h from the first to the last. So: 1. compute h, and keep it before every STEPS tokens. Then for STEPS
//   tokens at a time, from the last to the first: 2. compute h again, and keep it before each of them. 3. compute G,
//   and add the terms of dp, dq and dg.
// parts (gridDim.x, 5, N, D): dp, dq_re, dq_im, dg_re, dg_im.
static __global__ void cema_sums_kernel(float *parts, const floatX *dout, const floatX *inp, const float *states,
                                        const float *futures, Coeffs coeffs, Dims d) {
    enum { STEPS = 8, GROUPS = CEMA_BLOCK / STEPS };
    __shared__ float2 starts[GROUPS][THREADS]; // a thread has a column of its own
    int c = channel(), n = blockIdx.z, blocks = ceil_div(d.L, CEMA_BLOCK);
    if (c >= d.D) return;
    float2 q = coeff(coeffs.q_re, coeffs.q_im, n, c, d), g = coeff(coeffs.g_re, coeffs.g_im, n, c, d);
    float2 dq = make_float2(0, 0), dg = make_float2(0, 0);
    float p = coeffs.p[n * d.D + c], dp = 0;
    for (int block = blockIdx.x; block < d.B * blocks; block += gridDim.x) {
        int t0 = block % blocks * CEMA_BLOCK, T = min_int(CEMA_BLOCK, d.L - t0);
        size_t first = ((size_t)(block / blocks) * d.L + t0) * d.D + c, at = state_index(block, n, c, d);
        float2 state = make_float2(states[at], states[at + d.N * d.D]);
        float2 F = make_float2(futures[at], futures[at + d.N * d.D]), h[STEPS];
        // 1.
        for (int t = 0; t < T; t++) {
            if (t % STEPS == 0) starts[t / STEPS][threadIdx.x] = state;
            state = times(q, state);
            state.x += p * to_float(inp[first + (size_t)t * d.D]);
        }
        for (int group = ceil_div(T, STEPS) - 1; group >= 0; group--) {
            const floatX *x = inp + first + (size_t)group * STEPS * d.D, *dy = dout + (x - inp);
            // 2.
            state = starts[group][threadIdx.x];
#pragma unroll
            for (int t = 0; t < STEPS; t++) {
                h[t] = state;
                state = times(q, state);
                if (group * STEPS + t < T) state.x += p * to_float(x[(size_t)t * d.D]);
            }
            // 3.
#pragma unroll
            for (int t = STEPS - 1; t >= 0; t--) {
                if (group * STEPS + t >= T) continue;
                float xt = to_float(x[(size_t)t * d.D]), dyt = to_float(dy[(size_t)t * d.D]);
                float2 after = times(q, h[t]), G = make_float2(g.x * dyt + F.x, -g.y * dyt + F.y); // after: h_t
                after.x += p * xt;
                dp += xt * G.x;
                dq.x += G.x * h[t].x + G.y * h[t].y, dq.y += G.y * h[t].x - G.x * h[t].y;
                dg.x += dyt * after.x, dg.y -= dyt * after.y;
                F = times(conjugate(q), G);
            }
        }
    }
    const float sums[5] = {dp, dq.x, dq.y, dg.x, dg.y};
    for (int i = 0; i < 5; i++) parts[(((size_t)blockIdx.x * 5 + i) * d.N + n) * d.D + c] = sums[i];
}

static int cema_parts(Dims d) { return min_int(CEMA_PARTS, d.B * ceil_div(d.L, CEMA_BLOCK)); }
static size_t cema_workspace(Dims d) {
    return cema_states_bytes(d) + (size_t)cema_parts(d) * 5 * d.N * d.D * sizeof(float);
}

// dcoeffs, whose five arrays are contiguous, is set. dh (B,2,N,D), or NULL: in: dL/d(outgoing state), out: (incoming).
static void cema_backward(floatX *dinp, Coeffs *dcoeffs, float *domega, float *dh, const floatX *dout,
                          const floatX *inp, const float *h_blocks, const Coeffs *coeffs, const float *omega, Dims d) {
    FAST(cema_fast_supports(d), cema_fast_backward(dinp, dcoeffs, domega, dh, dout, inp, h_blocks, coeffs, omega, d));
    int P = cema_parts(d);
    size_t width = (size_t)5 * d.N * d.D;
    float *futures = (float *)workspace(cema_workspace(d)), *parts = futures + cema_states_bytes(d) / sizeof(float);
    cema_states(futures, dh, dh, dout, coeffs, 1, d);
    dim3 grid(d.B * ceil_div(d.L, CEMA_BLOCK), ceil_div(d.D, WARP)), modes(P, ceil_div(d.D, THREADS), d.N);
    cema_backward_kernel<<<grid, WARP>>>(dinp, dout, futures, *coeffs, omega, d);
    cema_sums_kernel<<<modes, THREADS>>>(parts, dout, inp, h_blocks, futures, *coeffs, d);
    sum_parts(dcoeffs->p, parts, P, width, width, 0);
    sum_rows(domega, dout, inp, NULL, NULL, 1, d.B * d.L, d.D, 1);
}

// Chunk parallelism: the same three steps, with ranks instead of token blocks. cema_reduce() is step 1: h
// (B,2,N,D) is the state after these tokens from a zero state; backward, the gradient w.r.t. the state before them if
// nothing follows. The all-gather is next, then cema_combine(), which is step 2, then cema_forward() or _backward().
static void cema_reduce(float *h, const floatX *inp, const Coeffs *coeffs, int backward, Dims d) {
    FAST(cema_fast_supports(d), cema_fast_reduce(h, inp, coeffs, backward, d));
    cema_states((float *)workspace(cema_states_bytes(d)), h, NULL, inp, coeffs, backward, d);
}

// Formula: h_after = q^length h_before + h_alone, rank by rank; backward from the last rank to the first, with conj(q).
//   all (cp_size,B,2,N,D): each rank's result of cema_reduce(). h (B,2,N,D): in: the state before the whole sequence
//   (backward: the gradient after it); out: the state before this rank's tokens (backward: the gradient after them).
//   end (B,2,N,D), or NULL: gets the state after the last rank (backward: the gradient before the first).
// Mapping: a thread has a channel and a mode of a sequence.
static __global__ void cema_combine_kernel(float *h, float *end, const float *all, Coeffs coeffs, int backward,
                                           ChunkParallel cp, Dims d) {
    int c = channel(), n = blockIdx.z, b = blockIdx.x;
    size_t im = (size_t)d.N * d.D, at = state_index(b, n, c, d);
    if (c >= d.D) return;
    float2 q = coeff(coeffs.q_re, coeffs.q_im, n, c, d), sum = make_float2(h[at], h[at + im]);
    if (backward) q = conjugate(q);
    for (int i = 0; i < cp.cp_size; i++) {
        int r = backward ? cp.cp_size - 1 - i : i;
        const float *alone = all + (size_t)r * d.B * 2 * im;
        if (r == cp.cp_rank) h[at] = sum.x, h[at + im] = sum.y;
        sum = times(power(q, cp.lengths[r]), sum);
        sum.x += alone[at], sum.y += alone[at + im];
    }
    if (end) end[at] = sum.x, end[at + im] = sum.y;
}

static void cema_combine(float *h, float *end, const float *all, const Coeffs *coeffs, int backward,
                         const ChunkParallel *cp, Dims d) {
    dim3 grid(d.B, ceil_div(d.D, THREADS), d.N);
    cema_combine_kernel<<<grid, THREADS>>>(h, end, all, *coeffs, backward, *cp, d);
}

// ----------------------------------------------------------------------------
// RMSNorm: y = x rstd (weight + 1), rstd = 1/sqrt(mean(x^2) + eps); weight NULL: no scale. rstd (R).
// Sums of squares are double, so that they do not overflow while x itself does not. A row is read by one warp: its
// lanes read neighbouring elements, and no shared memory or barrier is needed for the sum.

// Mapping: a warp has a row. Memory: reads R*D twice (the second time from cache), writes R*D.
static __global__ void rmsnorm_forward_kernel(floatX *out, float *rstd, const floatX *inp, const float *weight, int R,
                                              int D, double eps) {
    size_t r = warp_row();
    if (r >= (size_t)R) return;
    const floatX *x = inp + r * D;
    double squares = 0;
    for (int c = threadIdx.x; c < D; c += WARP) squares += (double)to_float(x[c]) * to_float(x[c]);
    float s = (float)(1 / sqrt(warp_sum(squares) / D + eps));
    for (int c = threadIdx.x; c < D; c += WARP)
        out[r * D + c] = to_floatX(to_float(x[c]) * s * (weight ? weight[c] + 1 : 1));
    if (threadIdx.x == 0) rstd[r] = s;
}

static void rmsnorm_forward(floatX *out, float *rstd, const floatX *inp, const float *weight, int R, int D,
                            double eps) {
    FAST(norms_fast_supports(D) && weight, rmsnorm_fast_forward(out, rstd, inp, weight, R, D, eps));
    rmsnorm_forward_kernel<<<ROW_GRID(R)>>>(out, rstd, inp, weight, R, D, eps);
}

// Forward line: y = x rstd (weight + 1). With n = x rstd, a = (weight + 1) dy: dx = rstd (a - n mean(a n)), and
// dweight = sum over rows of dy n.
// Mapping: a warp has a row. Memory: reads 2 R*D twice (the second time from cache), writes R*D.
static __global__ void rmsnorm_backward_kernel(floatX *dinp, const floatX *dout, const floatX *inp, const float *weight,
                                               const float *rstd, int R, int D) {
    size_t r = warp_row();
    if (r >= (size_t)R) return;
    const floatX *x = inp + r * D, *dy = dout + r * D;
    float s = rstd[r], dot = 0;
    for (int c = threadIdx.x; c < D; c += WARP)
        dot += to_float(dy[c]) * (weight ? weight[c] + 1 : 1) * (to_float(x[c]) * s);
    dot = warp_sum(dot) / D;
    for (int c = threadIdx.x; c < D; c += WARP) {
        float a = to_float(dy[c]) * (weight ? weight[c] + 1 : 1), n = to_float(x[c]) * s;
        dinp[r * D + c] = to_floatX(s * (a - n * dot));
    }
}

static void rmsnorm_backward(floatX *dinp, float *dweight, const floatX *dout, const floatX *inp, const float *weight,
                             const float *rstd, int R, int D) {
    FAST(norms_fast_supports(D) && weight, rmsnorm_fast_backward(dinp, dweight, dout, inp, weight, rstd, R, D));
    rmsnorm_backward_kernel<<<ROW_GRID(R)>>>(dinp, dout, inp, weight, rstd, R, D);
    if (dweight) sum_rows(dweight, dout, inp, NULL, rstd, 1, R, D, 1);
}

// ----------------------------------------------------------------------------
// linear: out (R,M) = inp (R,K) weight' (M,K) + bias (M) + residual (R,M); bias and residual may be NULL

// Formula: out = bias + residual, to which the product is then added.
// Mapping: a thread has an element of row blockIdx.x. Memory: reads (residual) and writes R*M.
static __global__ void linear_start_kernel(floatX *out, const floatX *residual, const floatX *bias, int M) {
    int c = channel();
    size_t i = (size_t)blockIdx.x * M + c;
    if (c < M) out[i] = to_floatX((residual ? to_float(residual[i]) : 0) + (bias ? to_float(bias[c]) : 0));
}

static void linear_forward(floatX *out, const floatX *residual, const floatX *inp, const floatX *weight,
                           const floatX *bias, int R, int K, int M) {
    FAST(1, linear_fast_forward(out, residual, inp, weight, bias, R, K, M));
    int start = bias || (residual && residual != out);
    if (start) linear_start_kernel<<<COLUMN_GRID(R, M)>>>(out, residual, bias, M);
    matmul(out, CUBLAS_TYPE, M, matrix(inp, K), transposed(weight, K), R, M, K, bias || residual);
}

// Forward line: out = inp weight' + bias. dinp = dout weight, added to dinp if `add`, since several linear maps read
// the same input; dweight += dout' inp, a float matrix; dbias += sum over rows of dout.
static void linear_backward_input(floatX *dinp, int add, const floatX *dout, const floatX *weight, int R, int K,
                                  int M) {
    FAST(1, linear_fast_backward_input(dinp, add, dout, weight, R, K, M));
    matmul(dinp, CUBLAS_TYPE, K, matrix(dout, M), matrix(weight, K), R, K, M, add);
}

static void linear_backward_weight(float *dweight, float *dbias, const floatX *dout, const floatX *inp, int R, int K,
                                   int M) {
    FAST(1, linear_fast_backward_weight(dweight, dbias, dout, inp, R, K, M));
    matmul(dweight, CUDA_R_32F, K, transposed(dout, M), matrix(inp, K), M, K, R, 1);
    if (dbias) sum_rows(dbias, dout, NULL, NULL, NULL, 1, R, M, 1);
}

static void linear_backward(floatX *dinp, int add, float *dweight, float *dbias, const floatX *dout, const floatX *inp,
                            const floatX *weight, int R, int K, int M) {
    linear_backward_input(dinp, add, dout, weight, R, K, M);
    BESIDE(linear_backward_weight(dweight, dbias, dout, inp, R, K, M));
}

// ----------------------------------------------------------------------------
// queries and keys from the shared zn (R,Z), the normalized z:
//     q = zn (gamma0 + 1)/sqrt(dz) + beta0,   k = zn (gamma1 + 1)/sqrt(dz) + beta1;   gamma, beta (2,Z)

// Mapping: a thread has an element of row blockIdx.x. Memory: reads R*Z, writes 2 R*Z.
static __global__ void qk_forward_kernel(floatX *q, floatX *k, const floatX *zn, const float *gamma, const float *beta,
                                         int Z, float scale) {
    int c = channel();
    size_t i = (size_t)blockIdx.x * Z + c;
    if (c >= Z) return;
    float z = to_float(zn[i]) * scale;
    q[i] = to_floatX(z * (gamma[c] + 1) + beta[c]);
    k[i] = to_floatX(z * (gamma[Z + c] + 1) + beta[Z + c]);
}

static void qk_forward(floatX *q, floatX *k, const floatX *zn, const float *gamma, const float *beta, int R, int Z,
                       double dz) {
    qk_forward_kernel<<<COLUMN_GRID(R, Z)>>>(q, k, zn, gamma, beta, Z, 1 / sqrtf((float)dz));
}

// Forward lines: q = zn (gamma0 + 1) scale + beta0, likewise k. dzn = (dq (gamma0 + 1) + dk (gamma1 + 1)) scale;
// dgamma0 = sum over rows of dq zn scale, dbeta0 = sum over rows of dq.
// Mapping: a thread has an element of row blockIdx.x. Memory: reads 2 R*Z, writes R*Z.
static __global__ void qk_backward_kernel(floatX *dzn, const floatX *dq, const floatX *dk, const float *gamma, int Z,
                                          float scale) {
    int c = channel();
    size_t i = (size_t)blockIdx.x * Z + c;
    if (c < Z) dzn[i] = to_floatX((to_float(dq[i]) * (gamma[c] + 1) + to_float(dk[i]) * (gamma[Z + c] + 1)) * scale);
}

static void qk_backward(floatX *dzn, float *dgamma, float *dbeta, const floatX *dq, const floatX *dk, const floatX *zn,
                        const float *gamma, int R, int Z, double dz) {
    float scale = 1 / sqrtf((float)dz);
    qk_backward_kernel<<<COLUMN_GRID(R, Z)>>>(dzn, dq, dk, gamma, Z, scale);
    sum_rows(dgamma, dq, zn, NULL, NULL, scale, R, Z, 1);
    sum_rows(dgamma + Z, dk, zn, NULL, NULL, scale, R, Z, 1);
    sum_rows(dbeta, dq, NULL, NULL, NULL, 1, R, Z, 1);
    sum_rows(dbeta + Z, dk, NULL, NULL, NULL, 1, R, Z, 1);
}

// ----------------------------------------------------------------------------
// rotary embedding: in each head the pair (2j, 2j+1), taken as a complex number, is multiplied by
//     e^(i pos base^(-2j/dz)),    pos counted from the chunk's start
// table (C, dz/2, 2): cos, sin. count (B), or NULL for zeros: tokens before these.

// Mapping: a thread has a pair at a position. Memory: writes C*dz floats.
static __global__ void rope_table_kernel(float *table, int C, int dz, double base) {
    int i = thread_index(), pairs = dz / 2;
    if (i >= C * pairs) return;
    double angle = i / pairs * pow(base, -2.0 * (i % pairs) / dz);
    table[2 * i] = (float)cos(angle), table[2 * i + 1] = (float)sin(angle);
}

static void rope_table(float *table, int C, int dz, double base) {
    rope_table_kernel<<<blocks_for((size_t)C * (dz / 2), THREADS), THREADS>>>(table, C, dz, base);
}

// Formula: sign 1: see above; sign -1: rotates by the opposite angles, as the backward pass does (see megalodon.c).
// Mapping: a thread has a pair of row blockIdx.x. Memory: reads and writes R*Z.
static __global__ void rope_kernel(floatX *out, const floatX *inp, const float *table, const int64_t *count, int sign,
                                   Dims d) {
    int b = blockIdx.x / d.L, t = blockIdx.x % d.L, c = 2 * channel(), dz = d.Z / d.H;
    if (c >= d.Z) return;
    const float *angle = table + ((count ? count[b] : 0) + t) % d.C * dz + c % dz;
    size_t i = (size_t)blockIdx.x * d.Z + c;
    float re = to_float(inp[i]), im = to_float(inp[i + 1]), s = sign * angle[1];
    out[i] = to_floatX(re * angle[0] - im * s);
    out[i + 1] = to_floatX(re * s + im * angle[0]);
}

static void rope_forward(floatX *out, const floatX *inp, const float *table, const int64_t *count, Dims d) {
    rope_kernel<<<COLUMN_GRID((size_t)d.B * d.L, d.Z / 2)>>>(out, inp, table, count, 1, d);
}

static void rope_backward(floatX *dinp, const floatX *dout, const float *table, const int64_t *count, Dims d) {
    rope_kernel<<<COLUMN_GRID((size_t)d.B * d.L, d.Z / 2)>>>(dinp, dout, table, count, -1, d);
}

// From z (B,L,Z) to the rotated q and k: RMSNorm of each head, the affine map, the rotation (table NULL: none).
// zn (B,L,Z) and z_rstd (B,L,H) are needed by qk_layer_backward(). They are not kept: mega_backward() calls this again.
static void qk_layer_forward(floatX *q, floatX *k, floatX *zn, float *z_rstd, const floatX *z, const float *gamma,
                             const float *beta, const float *table, const int64_t *count, Dims d, double eps) {
    FAST(qk_fast_supports(d), qk_fast_forward(q, k, zn, z_rstd, z, gamma, beta, table, count, d, eps));
    int R = d.B * d.L, head = d.Z / d.H, standard = d.attention == ATTENTION_STANDARD; // then z has no norm
    if (!standard) rmsnorm_forward(zn, z_rstd, z, NULL, R * d.H, head, eps);
    qk_forward(q, k, standard ? z : zn, gamma, beta, R, d.Z, key_width(d));
    if (table == NULL) return;
    rope_forward(q, q, table, count, d);
    rope_forward(k, k, table, count, d);
}

// The same three steps in reverse order, with the gradient w.r.t. zn in dz. dq and dk are overwritten.
static void qk_layer_backward(floatX *dz, float *dgamma, float *dbeta, floatX *dq, floatX *dk, floatX *zn,
                              const float *z_rstd, const floatX *z, const float *gamma, const float *table, Dims d) {
    FAST(qk_fast_supports(d), qk_fast_backward(dz, dgamma, dbeta, dq, dk, zn, z_rstd, z, gamma, table, d));
    int R = d.B * d.L, head = d.Z / d.H, standard = d.attention == ATTENTION_STANDARD;
    rope_backward(dq, dq, table, NULL, d);
    rope_backward(dk, dk, table, NULL, d);
    qk_backward(dz, dgamma, dbeta, dq, dk, standard ? z : zn, gamma, R, d.Z, key_width(d));
    if (!standard) rmsnorm_backward(dz, NULL, dz, z, NULL, z_rstd, R * d.H, head);
}

// ----------------------------------------------------------------------------
// silu(x) = x sigmoid(x), and the gate out = a silu(b). The attention sub-layer gates o with b = r_pre, swiglu gates f3
// with b = f1. Mapping: a thread has several elements, grid_threads() apart. The backward pass has read all inputs of
// the forward pass, so it also computes the forward output again, for the gradient of the next weight matrix.

// Memory: reads and writes n.
static __global__ void silu_forward_kernel(floatX *out, const floatX *inp, size_t n) {
    for (size_t i = thread_index(); i < n; i += grid_threads()) {
        float x = to_float(inp[i]);
        out[i] = to_floatX(x * sigmoid(x));
    }
}

static void silu_forward(floatX *out, const floatX *inp, size_t n) {
    FAST(1, silu_fast_forward(out, inp, n));
    silu_forward_kernel<<<ELEMENT_GRID(n)>>>(out, inp, n);
}

// Forward line: out = x s, s = sigmoid(x). dx = dout s (1 + x (1 - s)). out, or NULL, gets the forward output again.
// dinp may be dout. Memory: reads 2 n, writes n or 2 n.
static __global__ void silu_backward_kernel(floatX *out, floatX *dinp, const floatX *dout, const floatX *inp,
                                            size_t n) {
    for (size_t i = thread_index(); i < n; i += grid_threads()) {
        float x = to_float(inp[i]), s = sigmoid(x);
        dinp[i] = to_floatX(to_float(dout[i]) * (s * (1 + x * (1 - s))));
        if (out) out[i] = to_floatX(x * s);
    }
}

static void silu_backward(floatX *out, floatX *dinp, const floatX *dout, const floatX *inp, size_t n) {
    FAST(1, silu_fast_backward(out, dinp, dout, inp, n));
    silu_backward_kernel<<<ELEMENT_GRID(n)>>>(out, dinp, dout, inp, n);
}

// Memory: reads 2 n, writes n.
static __global__ void gate_forward_kernel(floatX *out, const floatX *a, const floatX *b, size_t n) {
    for (size_t i = thread_index(); i < n; i += grid_threads()) {
        float x = to_float(b[i]);
        out[i] = to_floatX(to_float(a[i]) * (x * sigmoid(x)));
    }
}

static void gate_forward(floatX *out, const floatX *a, const floatX *b, size_t n) {
    FAST(1, gate_fast_forward(out, a, b, n));
    gate_forward_kernel<<<ELEMENT_GRID(n)>>>(out, a, b, n);
}

// Forward line: out = a silu(b). da = dout silu(b), db = dout a silu'(b). out, or NULL, gets the forward output again.
// da may be dout. Memory: reads 3 n, writes 2 n or 3 n.
static __global__ void gate_backward_kernel(floatX *out, floatX *da, floatX *db, const floatX *dout, const floatX *a,
                                            const floatX *b, size_t n) {
    for (size_t i = thread_index(); i < n; i += grid_threads()) {
        float x = to_float(b[i]), s = sigmoid(x), dy = to_float(dout[i]), y = to_float(a[i]);
        if (out) out[i] = to_floatX(y * (x * s));
        db[i] = to_floatX(dy * (y * (s * (1 + x * (1 - s)))));
        da[i] = to_floatX(dy * (x * s));
    }
}

static void gate_backward(floatX *out, floatX *da, floatX *db, const floatX *dout, const floatX *a, const floatX *b,
                          size_t n) {
    FAST(1, gate_fast_backward(out, da, db, dout, a, b, n));
    gate_backward_kernel<<<ELEMENT_GRID(n)>>>(out, da, db, dout, a, b, n);
}

// ----------------------------------------------------------------------------
// a linear map together with the silu or gate next to it

// pre = inp W' + bias, out = silu(pre); inp (R,K), pre, out (R,M)
static void linear_silu_forward(floatX *out, floatX *pre, const floatX *inp, const floatX *weight, const floatX *bias,
                                int R, int K, int M) {
    HOPPER(linear_hopper_supports(R, K, M), linear_silu_hopper_forward(out, pre, inp, weight, bias, R, K, M));
    linear_forward(pre, NULL, inp, weight, bias, R, K, M);
    silu_forward(out, pre, (size_t)R * M);
}

// forward: y = out W',    out = dropout(silu(pre));    out, pre (R,K), y (R,M)
// dpre from dy, and out again, which the gradient w.r.t. W needs.
static void linear_silu_backward(floatX *out, floatX *dpre, const floatX *dy, const floatX *weight, const floatX *pre,
                                 Mask mask, int R, int K, int M) {
    HOPPER(linear_hopper_supports(R, K, M) && mask.p == 0,
           linear_silu_hopper_backward(out, dpre, dy, weight, pre, R, K, M));
    linear_backward_input(dpre, 0, dy, weight, R, K, M);
    dropout(dpre, dpre, mask, (size_t)R * K);
    silu_backward(out, dpre, dpre, pre, (size_t)R * K);
    dropout(out, out, mask, (size_t)R * K);
}

// forward: y = out W',    out = dropout(a silu(b));    out, a, b (R,K), y (R,M)
// da and db from dy, out again, and dbias (K) += sum over rows of db, if not NULL.
static void linear_gate_backward(floatX *out, floatX *da, floatX *db, float *dbias, const floatX *dy,
                                 const floatX *weight, const floatX *a, const floatX *b, Mask mask, int R, int K,
                                 int M) {
    HOPPER(linear_hopper_supports(R, K, M) && mask.p == 0,
           linear_gate_hopper_backward(out, da, db, dbias, dy, weight, a, b, R, K, M));
    linear_backward_input(da, 0, dy, weight, R, K, M);
    dropout(da, da, mask, (size_t)R * K);
    gate_backward(out, da, db, da, a, b, (size_t)R * K);
    dropout(out, out, mask, (size_t)R * K);
    if (dbias) sum_rows(dbias, db, NULL, NULL, NULL, 1, R, K, 1);
}

// forward: out = silu(pre), pre = .. + bias;    dpre from dout, which may be dpre, and dbias (D) += sum over rows of dpre
static void silu_bias_backward(floatX *dpre, float *dbias, const floatX *dout, const floatX *pre, int R, int D) {
    FAST(D % VEC == 0, silu_bias_fast_backward(dpre, dbias, dout, pre, R, D));
    silu_backward(NULL, dpre, dout, pre, (size_t)R * D);
    sum_rows(dbias, dpre, NULL, NULL, NULL, 1, R, D, 1);
}

// ----------------------------------------------------------------------------
// attention of one head inside chunks:
//     S_ij = q_i . k_j for j <= i        P = softmax over j        o_i = sum_j P_ij v_j
// Scores are computed for QUERY_TILE queries at a time, against the keys up to the last of them, so that few products
// are above the diagonal. The same chunk of all sequences is one batch of matrix products. Of P only lse_i = log sum_j
// e^(S_ij) is kept. S, P and their gradients are stored as floatX. attention.cuh has a drawing of the tiles.

// A tile of queries: nq consecutive queries of head h, in each of `batch` sequences from sequence b0 on. The first of
// them is token t. They see nk keys, of which the last nq are at their own positions.
typedef struct {
    int b0, batch, t, nq, nk, h;
} QueryTile;

// The row of query i of the tile, and the mask's index of its first key.
static __device__ size_t query_row(QueryTile tile, size_t i, Dims d) {
    return (tile.b0 + i / tile.nq) * d.L + tile.t + i % tile.nq;
}
static __device__ uint64_t query_mask(const Mask *mask, size_t row, int h, Dims d) {
    return (row / d.L * d.H + h) * mask->row + row % d.L * d.C;
}

// Formula: P = softmax(S), with the mask of dropout. scores (batch,nq,nk): S, replaced by P.
// Mapping: a warp has a query. Memory: reads the scores three times, mostly from cache, writes them once.
// Passes: 1. maximum. 2. sum of e^(S - max). 3. probabilities.
static __global__ void attention_forward_kernel(floatX *scores, float *lse, QueryTile tile, Mask mask, Dims d) {
    size_t i = warp_row(), row = query_row(tile, i, d);
    if (i >= (size_t)tile.batch * tile.nq) return;
    floatX *s = scores + i * tile.nk;
    int seen = tile.nk - tile.nq + (int)(i % tile.nq) + 1; // keys at or before this query
    float max = -INFINITY, sum = 0;
    // 1.
    for (int j = threadIdx.x; j < seen; j += WARP) max = fmaxf(max, to_float(s[j]));
    max = warp_max(max);
    // 2. x - x is NaN where a score overflowed: -infinity would become a probability of 0
    for (int j = threadIdx.x; j < seen; j += WARP) {
        float x = to_float(s[j]);
        sum += exp_fast(x - max) + (x - x);
    }
    sum = warp_sum(sum);
    // 3.
    for (int j = threadIdx.x; j < tile.nk; j += WARP) {
        float p = j < seen ? exp_fast(to_float(s[j]) - max) / sum : 0;
        if (mask.p > 0) p *= mask_at(&mask, query_mask(&mask, row, tile.h, d) + j);
        s[j] = to_floatX(p);
    }
    if (threadIdx.x == 0) lse[row * d.H + tile.h] = max + logf(sum);
}

// q and o begin at the tile's first query, k and v at the first key of its chunk. Rows of q and k are Z elements apart,
// those of v and o E. stride: rows from the keys of one sequence to those of the next.
static void attention_chunk_forward(floatX *o, float *lse, floatX *scores, const floatX *q, const floatX *k,
                                    const floatX *v, QueryTile tile, int stride, Mask mask, Dims d) {
    int key_dim = d.Z / d.H, value_dim = d.E / d.H, nq = tile.nq, nk = tile.nk;
    int64_t rows = d.L, all = (int64_t)nq * nk;
    Matrix Q = {q, d.Z, 0, rows * d.Z}, K = {k, d.Z, 1, (int64_t)stride * d.Z}, V = {v, d.E, 0, (int64_t)stride * d.E};
    Matrix P = {scores, nk, 0, all};
    matmul_batched(scores, nk, all, Q, K, nq, nk, key_dim, 0, tile.batch);
    attention_forward_kernel<<<ROW_GRID((size_t)tile.batch * nq)>>>(scores, lse, tile, mask, d);
    matmul_batched(o, d.E, rows * d.E, P, V, nq, value_dim, nk, 0, tile.batch);
}

// Forward lines: P = softmax(S), o = P v. P_ij = e^(S_ij - lse_i) again, divided by its sum, since lse_i is rounded;
// dP_ij = do_i . v_j; dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij). With dropout, o = (mask P) v: dP is multiplied by the
// mask, and scores gets mask P, from which dv is computed.
// Mapping: a warp has a query. Memory: reads S and dP twice, writes P over S and dS over dP.
static __global__ void attention_backward_kernel(floatX *scores, floatX *dscores, const float *lse, QueryTile tile,
                                                 Mask mask, Dims d) {
    size_t i = warp_row(), row = query_row(tile, i, d);
    if (i >= (size_t)tile.batch * tile.nq) return;
    floatX *s = scores + i * tile.nk, *ds = dscores + i * tile.nk;
    int seen = tile.nk - tile.nq + (int)(i % tile.nq) + 1;
    float l = lse[row * d.H + tile.h], sum = 0, dot = 0;
    for (int j = threadIdx.x; j < seen; j += WARP) {
        float keep = mask.p > 0 ? mask_at(&mask, query_mask(&mask, row, tile.h, d) + j) : 1;
        float p = exp_fast(to_float(s[j]) - l);
        sum += p, dot += p * to_float(ds[j]) * keep;
    }
    sum = warp_sum(sum), dot = warp_sum(dot) / sum;
    for (int j = threadIdx.x; j < tile.nk; j += WARP) {
        float keep = mask.p > 0 && j < seen ? mask_at(&mask, query_mask(&mask, row, tile.h, d) + j) : 1;
        float p = j < seen ? exp_fast(to_float(s[j]) - l) / sum : 0;
        ds[j] = to_floatX(j < seen ? p * (to_float(ds[j]) * keep - dot) : 0);
        s[j] = to_floatX(p * keep);
    }
}

// Forward lines: o_i = sum_j P_ij v_j, S_ij = q_i . k_j. dq_i = sum_j dS_ij k_j is set; dk_j = sum_i dS_ij q_i and
// dv_j = sum_i P_ij do_i are set, or added to if `add`. dq, dout and q begin at the tile's first query, the other
// tensors at the first key of its chunk.
typedef struct {
    floatX *dq, *dk, *dv, *scores, *dscores;
    const floatX *dout, *q, *k, *v;
} AttentionTensors;

static void attention_chunk_backward(AttentionTensors a, const float *lse, QueryTile tile, int add, Mask mask, Dims d) {
    int key_dim = d.Z / d.H, value_dim = d.E / d.H, nq = tile.nq, nk = tile.nk;
    int64_t z = (int64_t)d.L * d.Z, e = (int64_t)d.L * d.E, all = (int64_t)nq * nk;
    Matrix Q = {a.q, d.Z, 0, z}, K = {a.k, d.Z, 0, z}, V = {a.v, d.E, 0, e}, dO = {a.dout, d.E, 0, e};
    Matrix Kt = {a.k, d.Z, 1, z}, Vt = V, P = {a.scores, nk, 1, all}, dS = {a.dscores, nk, 0, all}, dSt = dS;
    Vt.transposed = dSt.transposed = 1;
    matmul_batched(a.scores, nk, all, Q, Kt, nq, nk, key_dim, 0, tile.batch);
    matmul_batched(a.dscores, nk, all, dO, Vt, nq, nk, value_dim, 0, tile.batch);
    attention_backward_kernel<<<ROW_GRID((size_t)tile.batch * nq)>>>(a.scores, a.dscores, lse, tile, mask, d);
    matmul_batched(a.dq, d.Z, z, dS, K, nq, key_dim, nk, 0, tile.batch);
    matmul_batched(a.dk, d.Z, z, dSt, Q, nk, key_dim, nq, add, tile.batch);
    matmul_batched(a.dv, d.E, e, P, dO, nk, value_dim, nq, add, tile.batch);
}

// Elements of one tile's scores, and the number of sequences whose tiles are computed at once.
static size_t tile_scores(int C) { return (size_t)min_int(QUERY_TILE, C) * C; }
static int tile_batch(Dims d) { return min_int(d.B, max_int(1, (int)(SCORES / tile_scores(d.C)))); }

// Copies the keys and values of n tokens of row b, from token t on, into the cache, from position `at` on.
static void cache_chunk(float *cache_k, float *cache_v, const floatX *k, const floatX *v, int b, int t, int at, int n,
                        Dims d) {
    size_t from = (size_t)b * d.L + t, to = (size_t)b * d.C + at;
    copy_to_float(cache_k + to * d.Z, k + from * d.Z, (size_t)n * d.Z);
    copy_to_float(cache_v + to * d.E, v + from * d.E, (size_t)n * d.E);
}

static size_t attention_workspace(Dims d) { return (size_t)d.C * (d.Z + d.E) * sizeof(floatX); }

// All heads and chunks. q, k (B,L,Z) are rotated; v, o (B,L,E); lse (B,L,H). past (B), in host memory, or NULL for
// zeros: number of tokens that the first chunk had before this call. Their keys and values are in cache_k (B,C,Z) and
// cache_v (B,C,E). The keys and values of the chunk that this call leaves unfinished are written there.
static void attention_forward(floatX *o, float *lse, float *cache_k, float *cache_v, floatX *scores, const floatX *q,
                              const floatX *k, const floatX *v, const int *past, Mask mask, Dims d) {
    FAST(attention_fast_supports(past, d),
         attention_fast_forward(o, lse, cache_k, cache_v, scores, q, k, v, past, mask, d));
    int key_dim = d.Z / d.H, value_dim = d.E / d.H, some_past = 0;
    for (int b = 0; past && b < d.B; b++) some_past |= past[b];
    int step = some_past ? 1 : tile_batch(d); // sequences that are inside a chunk are computed one by one
    for (int b0 = 0; b0 < d.B; b0 += step) {
        int batch = min_int(step, d.B - b0), before = some_past ? past[b0] : 0;
        for (int t0 = 0, n; t0 < d.L; t0 += n, before = 0) {
            n = min_int(d.C - before, d.L - t0); // tokens of this chunk
            size_t first = (size_t)b0 * d.L + t0;
            const floatX *keys = k + first * d.Z, *values = v + first * d.E;
            if (before > 0) { // the chunk's keys and values are those of the cache and these
                floatX *chunk_k = (floatX *)workspace(attention_workspace(d)), *chunk_v = chunk_k + (size_t)d.C * d.Z;
                cache_chunk(cache_k, cache_v, k, v, b0, 0, before, n, d);
                copy_to_floatX(chunk_k, cache_k + (size_t)b0 * d.C * d.Z, (size_t)(before + n) * d.Z);
                copy_to_floatX(chunk_v, cache_v + (size_t)b0 * d.C * d.E, (size_t)(before + n) * d.E);
                keys = chunk_k, values = chunk_v;
            }
            for (int i = 0; i < n; i += QUERY_TILE) {
                for (int h = 0; h < d.H; h++) {
                    QueryTile tile = {b0, batch, t0 + i, min_int(QUERY_TILE, n - i), 0, h};
                    tile.nk = before + i + tile.nq;
                    attention_chunk_forward(o + (first + i) * d.E + h * value_dim, lse, scores,
                                            q + (first + i) * d.Z + h * key_dim, keys + h * key_dim,
                                            values + h * value_dim, tile, d.L, mask, d);
                }
            }
        }
    }
    for (int b = 0; cache_k && b < d.B; b++) {
        int before = past ? past[b] : 0, left = (before + d.L) % d.C; // tokens of the last chunk, if it is unfinished
        if (before == 0 || before + d.L > d.C) cache_chunk(cache_k, cache_v, k, v, b, d.L - left, 0, left, d);
    }
}

// The first half of `scores` holds the scores, the second half their gradients.
static void attention_backward(floatX *dq, floatX *dk, floatX *dv, floatX *scores, const floatX *dout, const float *lse,
                               const floatX *q, const floatX *k, const floatX *v, Mask mask, Dims d) {
    FAST(attention_fast_supports(NULL, d), attention_fast_backward(dq, dk, dv, scores, dout, lse, q, k, v, mask, d));
    int key_dim = d.Z / d.H, value_dim = d.E / d.H, step = tile_batch(d);
    floatX *dscores = scores + step * tile_scores(d.C);
    for (int b0 = 0; b0 < d.B; b0 += step) {
        for (int t0 = 0; t0 < d.L; t0 += d.C) {
            int n = min_int(d.C, d.L - t0), last = (n - 1) / QUERY_TILE * QUERY_TILE;
            for (int h = 0; h < d.H; h++) {
                size_t z = ((size_t)b0 * d.L + t0) * d.Z + h * key_dim,
                       e = ((size_t)b0 * d.L + t0) * d.E + h * value_dim;
                for (int i = last; i >= 0; i -= QUERY_TILE) { // the last tile sees all keys: it sets dk and dv
                    QueryTile tile = {b0, min_int(step, d.B - b0), t0 + i, min_int(QUERY_TILE, n - i), 0, h};
                    tile.nk = i + tile.nq;
                    size_t zi = z + (size_t)i * d.Z, ei = e + (size_t)i * d.E;
                    AttentionTensors a = {dq + zi, dk + z, dv + e, scores, dscores, dout + ei, q + zi, k + z, v + e};
                    attention_chunk_backward(a, lse, tile, i < last, mask, d);
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------
// LayerNorm: y = (x - mean) rstd (weight + 1) + bias over the D elements of a row; weight, bias NULL: neither.
// mean, rstd (R). The mean is computed first, and the squares are those of x - mean: the sum of x^2 minus the square of
// the sum would lose its digits where the mean is large.

// Mapping: a warp has a row. Memory: reads R*D three times (the second and third time from cache), writes R*D.
static __global__ void layernorm_forward_kernel(floatX *out, double *mean, float *rstd, const floatX *inp,
                                                const float *weight, const float *bias, int R, int D, double eps) {
    size_t r = warp_row();
    if (r >= (size_t)R) return;
    const floatX *x = inp + r * D;
    double sum = 0, squares = 0;
    for (int c = threadIdx.x; c < D; c += WARP) sum += to_float(x[c]);
    double m = warp_sum(sum) / D;
    for (int c = threadIdx.x; c < D; c += WARP) squares += (to_float(x[c]) - m) * (to_float(x[c]) - m);
    float s = (float)(1 / sqrt(warp_sum(squares) / D + eps));
    for (int c = threadIdx.x; c < D; c += WARP) {
        float n = (float)(to_float(x[c]) - m) * s;
        out[r * D + c] = to_floatX(n * (weight ? weight[c] + 1 : 1) + (bias ? bias[c] : 0));
    }
    if (threadIdx.x == 0) mean[r] = m, rstd[r] = s;
}

static void layernorm_forward(floatX *out, double *mean, float *rstd, const floatX *inp, const float *weight,
                              const float *bias, int R, int D, double eps) {
    FAST(norms_fast_supports(D), layernorm_fast_forward(out, mean, rstd, inp, weight, bias, R, D, eps));
    layernorm_forward_kernel<<<ROW_GRID(R)>>>(out, mean, rstd, inp, weight, bias, R, D, eps);
}

// Forward line: y = n (weight + 1) + bias, n = (x - mean) rstd. With a = (weight + 1) dy:
// dx = rstd (a - mean(a) - n mean(a n)).
// Mapping: a warp has a row. Memory: reads 2 R*D twice (the second time from cache), writes R*D.
static __global__ void layernorm_backward_kernel(floatX *dinp, const floatX *dout, const floatX *inp,
                                                 const float *weight, const double *mean, const float *rstd, int R,
                                                 int D) {
    size_t r = warp_row();
    if (r >= (size_t)R) return;
    const floatX *x = inp + r * D, *dy = dout + r * D;
    double m = mean[r];
    float s = rstd[r], sum = 0, dot = 0;
    for (int c = threadIdx.x; c < D; c += WARP) {
        float a = to_float(dy[c]) * (weight ? weight[c] + 1 : 1);
        sum += a, dot += a * ((float)(to_float(x[c]) - m) * s);
    }
    sum = warp_sum(sum) / D, dot = warp_sum(dot) / D;
    for (int c = threadIdx.x; c < D; c += WARP) {
        float a = to_float(dy[c]) * (weight ? weight[c] + 1 : 1), n = (float)(to_float(x[c]) - m) * s;
        dinp[r * D + c] = to_floatX(s * (a - sum - n * dot));
    }
}

static void layernorm_backward(floatX *dinp, float *dweight, float *dbias, const floatX *dout, const floatX *inp,
                               const float *weight, const double *mean, const float *rstd, int R, int D) {
    FAST(norms_fast_supports(D), layernorm_fast_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, R, D));
    layernorm_backward_kernel<<<ROW_GRID(R)>>>(dinp, dout, inp, weight, mean, rstd, R, D);
    if (dweight == NULL) return;
    sum_rows(dweight, dout, inp, mean, rstd, 1, R, D, 1);
    sum_rows(dbias, dout, NULL, NULL, NULL, 1, R, D, 1);
}

// ----------------------------------------------------------------------------
// rescale: out = alpha inp, alpha (D). Mapping: a thread has an element of row blockIdx.x. Memory: reads, writes R*D.

static __global__ void rescale_kernel(floatX *out, const floatX *inp, const float *alpha, int D) {
    int c = channel();
    size_t i = (size_t)blockIdx.x * D + c;
    if (c < D) out[i] = to_floatX(alpha[c] * to_float(inp[i]));
}

static void rescale_forward(floatX *out, const floatX *inp, const float *alpha, int R, int D) {
    rescale_kernel<<<COLUMN_GRID(R, D)>>>(out, inp, alpha, D);
}

// Forward line: out = alpha inp. dinp = alpha dout; dalpha += sum over rows of dout inp.
static void rescale_backward(floatX *dinp, float *dalpha, const floatX *dout, const floatX *inp, const float *alpha,
                             int R, int D) {
    rescale_forward(dinp, dout, alpha, R, D);
    sum_rows(dalpha, dout, inp, NULL, NULL, 1, R, D, 1);
}

// A residual: out += inp. Mapping: a thread has an element. Memory: reads 2 n, writes n.
static __global__ void add_kernel(floatX *out, const floatX *inp, size_t n) {
    size_t i = thread_index();
    if (i < n) out[i] = to_floatX(to_float(out[i]) + to_float(inp[i]));
}

static void add(floatX *out, const floatX *inp, size_t n) {
    add_kernel<<<blocks_for(n, THREADS), THREADS>>>(out, inp, n);
}

// ----------------------------------------------------------------------------
// output and loss: logits (R,V) = x output', loss = log sum_v e^logit_v - logit_target, in nats. A target of -1 gives
// no loss and no gradient. The logits are the largest activation: V numbers for each token. So they only exist for
// logit_rows(V) rows at a time. The backward pass of these rows follows before the next rows are computed:
//     logits = x output' -> loss, and dlogits, which overwrite the logits -> dx = dlogits output, doutput += dlogits' x

static int logit_rows(int V) { return max_int(LOGITS / V, LOGIT_ROWS); }

// Formula: loss = log(sum + own) - (target's logit - max), with own = e^(target's logit - max) and sum that of the
//   other tokens. Keeping them apart preserves a small loss, and softmax - 1 at the target. Then with `grad`
//   dlogit = grad_scale (softmax - onehot(target)), which overwrites the logits.
// Mapping: a thread block has a row. Memory: reads the logits three times, mostly from cache, writes them once.
// Passes: 1. maximum. 2. sum, NaN where a logit overflowed. 3. gradient.
static __global__ void loss_kernel(double *losses, floatX *logits, const int32_t *targets, float grad_scale, int grad,
                                   int V) {
    size_t r = blockIdx.x;
    floatX *l = logits + r * V;
    int target = targets[r];
    float max = -INFINITY, sum = 0, at_target = target < 0 ? 0 : to_float(l[target]);
    // 1.
    for (int v = threadIdx.x; v < V; v += THREADS) max = fmaxf(max, to_float(l[v]));
    max = block_max(max);
    // 2.
    for (int v = threadIdx.x; v < V; v += THREADS) {
        float x = to_float(l[v]);
        sum += (v == target ? 0 : exp_fast(x - max)) + (x - x);
    }
    sum = (float)block_sum((double)sum);
    float own = exp_fast(at_target - max), scale = target < 0 ? 0 : grad_scale / (sum + own);
    if (threadIdx.x == 0) losses[r] = target < 0 ? 0 : log1p(sum + (own - 1.0)) + ((double)max - at_target);
    // 3.
    for (int v = threadIdx.x; grad && v < V; v += THREADS)
        l[v] = to_floatX(v == target ? -scale * sum : scale * exp_fast(to_float(l[v]) - max));
}

static void cross_entropy(double *losses, floatX *logits, const int32_t *targets, float grad_scale, int grad, int R,
                          int V) {
    FAST(loss_fast_supports(V), loss_fast(losses, logits, targets, grad_scale, grad, R, V));
    loss_kernel<<<R, THREADS>>>(losses, logits, targets, grad_scale, grad, V);
}

// Formula: total = sum of x (n). Mapping: one thread block; a thread has every THREADS-th element. Memory: reads n.
static __global__ void sum_kernel(double *total, const double *x, size_t n) {
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += THREADS) sum += x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total = sum;
}

static void output_loss(double *losses, floatX *dx, float *doutput, floatX *logits, const floatX *x,
                        const floatX *output, const int32_t *targets, double grad_scale, int R, int D, int V) {
    for (int r0 = 0; r0 < R; r0 += logit_rows(V)) {
        int rows = min_int(logit_rows(V), R - r0);
        const floatX *xr = x + (size_t)r0 * D;
        linear_forward(logits, NULL, xr, output, NULL, rows, D, V);
        cross_entropy(losses + r0, logits, targets + r0, (float)grad_scale, dx != NULL, rows, V);
        if (dx) linear_backward(dx + (size_t)r0 * D, 0, doutput, NULL, logits, xr, output, rows, D, V);
    }
}

// The copy of a parameter in the type that matrix products read.
static const floatX *rounded(const Model *m, const float *param) { return m->rounded + (param - m->memory[PARAMS]); }

// ----------------------------------------------------------------------------
// TimestepNorm and CEMA in the model, with their states. With chunk parallelism, each rank reduces its tokens from a
// zero state, an all-gather exchanges the results, and each rank combines those of the ranks before it.

// TimestepNorm number `layer`; num_layers is the final one. in, out: the state before and after, or NULL.
static void timestep_norm_layer_forward(Model *m, int layer, floatX *y, double *mean, float *rstd, const floatX *x,
                                        const float *weight, const float *bias, const State *in, State *out) {
    NormState start = norm_state(in, layer), end = norm_state(out, layer);
    if (m->config.timestep_norm == NORM_LAYER)
        return layernorm_forward(y, mean, rstd, x, weight, bias, m->dims.B * m->dims.L, m->dims.D, m->config.norm_eps);
    if (m->combining) {
        size_t pairs = (size_t)m->dims.B * m->dims.G, bytes = 2 * pairs * sizeof(double);
        NormState mine = {NULL, (double *)m->exchange, (double *)m->exchange + pairs};
        timestep_norm_reduce(mine, x, m->dims);
        timestep_norm_combine(start, end, (double *)all_gather(m, bytes), end.count, &m->cp, m->dims);
        end.mean = end.m2 = NULL;
    }
    timestep_norm_forward(y, mean, rstd, end, x, weight, bias, start, m->dims, m->config.norm_eps);
}

static void timestep_norm_layer_backward(Model *m, int layer, floatX *dx, float *dweight, float *dbias,
                                         StateGrad *dstate, const floatX *dy, const floatX *const residuals[2],
                                         const floatX *x, const float *weight, const double *mean, const float *rstd) {
    const int64_t *count = m->has_before ? m->before.count : NULL;
    size_t sums = (size_t)m->dims.B * m->dims.G * 3, bytes = sums * sizeof(double);
    double *later = dstate ? dstate->sums + layer * sums : NULL; // U, V, W of the tokens after these
    if (m->config.timestep_norm == NORM_LAYER)
        return layer_instead_of_timestep_backward(m, dx, dweight, dbias, dy, residuals, x, weight, mean, rstd);
    if (m->cp.cp_size > 1) {
        double *whole = later;
        timestep_norm_reduce_backward((double *)m->exchange, dy, x, weight, mean, rstd, count, m->dims);
        later = (double *)combined(m, whole, bytes);
        timestep_norm_combine_backward(later, whole, (double *)all_gather(m, bytes), &m->cp, m->dims);
    }
    timestep_norm_backward(dx, dweight, dbias, later, dy, residuals, x, weight, mean, rstd, count, m->dims);
}

static void cema_layer_forward(Model *m, int layer, const State *in, State *out) {
    LayerActs *a = &m->acts[layer];
    const Coeffs *coeffs = &m->coeffs[layer];
    size_t states = (size_t)m->dims.B * 2 * m->dims.N * m->dims.D;
    float *h_in = in ? in->h + layer * states : NULL, *h_out = out ? out->h + layer * states : NULL;
    if (m->config.cema == CEMA_NONE) return copy(a->ema, a->xt, (size_t)m->dims.B * m->dims.L * m->dims.D);
    if (m->combining) {
        cema_reduce((float *)m->exchange, a->xt, coeffs, 0, m->dims);
        cema_combine(h_in, h_out, (float *)all_gather(m, states * sizeof(float)), coeffs, 0, &m->cp, m->dims);
        h_out = NULL;
    }
    cema_forward(a->ema, a->h, h_out, a->xt, coeffs, m->params.layers[layer].cema_omega, h_in, m->dims);
}

static void cema_layer_backward(Model *m, int layer, floatX *dx, StateGrad *dstate, const floatX *dy) {
    const LayerActs *a = &m->acts[layer];
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    Coeffs *coeffs = &m->coeffs[layer], *dcoeffs = &m->scratch.dcoeffs;
    size_t states = (size_t)m->dims.B * 2 * m->dims.N * m->dims.D, bytes = states * sizeof(float);
    float *dh = dstate ? dstate->h + layer * states : NULL; // gradient w.r.t. the outgoing state
    if (m->config.cema == CEMA_NONE) return copy(dx, dy, (size_t)m->dims.B * m->dims.L * m->dims.D);
    if (m->cp.cp_size > 1) {
        float *whole = dh;
        cema_reduce((float *)m->exchange, dy, coeffs, 1, m->dims);
        dh = (float *)combined(m, whole, bytes);
        cema_combine(dh, whole, (float *)all_gather(m, bytes), coeffs, 1, &m->cp, m->dims);
    }
    cema_backward(dx, dcoeffs, dw->cema_omega, dh, dy, a->xt, a->h, coeffs, w->cema_omega, m->dims);
    BESIDE(cema_coeffs_backward(dw->cema_alpha, dw->cema_delta, dw->cema_theta, dw->cema_gamma, dcoeffs, w->cema_alpha,
                                w->cema_delta, w->cema_theta, m->config.cema, m->dims.D, m->dims.N));
}

// ----------------------------------------------------------------------------
// the attention sub-layer: y = mega(x), see megalodon.h. in: the incoming state, or NULL: a fresh start. out: receives
// the outgoing state, or NULL: not kept. out may be in.
//
//     x --+-- TimestepNorm -- xt --+-- CEMA -- RMSNorm -- mx --+-- wz -- norm -- q, k ----+
//         |                        |                           |                         attention -- o
//         |                        +-- wv -- silu -- v --------|--------------------------+          |
//         |                                                    +-- wr -- silu -- r ------------------ * -- wh2 --+
//         |                                                    +-- wh1 ---------------------------------------- + -- y
//         +---------------------------------------------------------------------------------------------------- +
//
// Widths: x, xt, mx, y D; z, q, k Z; v, r, o E.

static void mega_forward(Model *m, int layer, const State *in, State *out, const floatX *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const Dims d = m->dims;
    int R = d.B * d.L;
    size_t chunk = (size_t)layer * d.B * d.C; // rows of the caches before this layer's
    float *cache_k = out && out->k ? out->k + chunk * d.Z : NULL,
          *cache_v = out && out->v ? out->v + chunk * d.E : NULL;

    // xt = TimestepNorm(x), v = silu(xt Wv' + bv), mx = RMSNorm(CEMA(xt))
    timestep_norm_layer_forward(m, layer, a->xt, a->norm_mean, a->norm_rstd, x, w->timenorm_weight, w->timenorm_bias,
                                in, out);
    BESIDE(linear_silu_forward(s->v, a->v_pre, a->xt, rounded(m, w->wv), rounded(m, w->wv_bias), R, d.D, d.E));
    cema_layer_forward(m, layer, in, out);
    rmsnorm_forward(a->mx, a->ema_rstd, a->ema, w->rmsnorm_weight, R, d.D, c->norm_eps);
    dropout(a->mx, a->mx, mask_of(m, layer, DROP_MX, c->hidden_dropout, d.D), (size_t)R * d.D);
    // z = mx Wz' + bz, q, k: RMSNorm of each head of z, an affine map, a rotation
    linear_forward(a->z, NULL, a->mx, rounded(m, w->wz), rounded(m, w->wz_bias), R, d.D, d.Z);
    qk_layer_forward(s->q, s->k, s->zn, s->z_rstd, a->z, w->gamma, w->beta, m->rope, in ? in->count : NULL, d,
                     c->norm_eps);
    JOIN();
    // o = attention(q, k, v), y = (mx Wh1' + bh1) + (o * r) Wh2' + x, r = silu(mx Wr' + br)
    // x is added with the first product, unless a dropout comes between. Plain products would round x three times.
    Mask mask = mask_of(m, layer, DROP_MEGA, c->dropout, d.D);
    const floatX *residual = mask.p > 0 || gpu.plain ? NULL : x;
    BESIDE(linear_forward(a->r_pre, NULL, a->mx, rounded(m, w->wr), rounded(m, w->wr_bias), R, d.D, d.E));
    BESIDE(linear_forward(a->y, residual, a->mx, rounded(m, w->wh1), rounded(m, w->wh1_bias), R, d.D, d.D));
    attention_forward(a->o, a->lse, cache_k, cache_v, s->scores, s->q, s->k, s->v, in ? m->past : NULL,
                      mask_of_attention(m, layer), d);
    JOIN();
    gate_forward(s->gated, a->o, a->r_pre, (size_t)R * d.E);
    dropout(s->gated, s->gated, mask_of(m, layer, DROP_GATED, c->hidden_dropout, d.E), (size_t)R * d.E);
    linear_forward(a->y, a->y, s->gated, rounded(m, w->wh2), NULL, R, d.E, d.D);
    dropout(a->y, a->y, mask, (size_t)R * d.D);
    if (residual == NULL) add(a->y, x, (size_t)R * d.D);
}

// dx = gradient w.r.t. x through this sub-layer, plus `residual`, the gradient through the block's other residual (it
// may be dx itself). dy = gradient w.r.t. y. The steps are those of mega_forward in reverse order.
static void mega_backward(Model *m, int layer, floatX *dx, StateGrad *dstate, const floatX *dy, const floatX *residual,
                          const floatX *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const Dims d = m->dims;
    int R = d.B * d.L;

    // y = dropout(mx Wh1' + bh1 + gated Wh2') + x, gated = dropout(o * r)
    const Mask mega_mask = mask_of(m, layer, DROP_MEGA, c->dropout, d.D);
    const Mask gated_mask = mask_of(m, layer, DROP_GATED, c->hidden_dropout, d.E);
    const floatX *dsum = mega_mask.p > 0 ? s->dxt : dy; // gradient w.r.t. the sum inside the dropout
    dropout(s->dxt, dy, mega_mask, (size_t)R * d.D);
    BESIDE(silu_forward(s->v, a->v_pre, (size_t)R * d.E)); // v, q and k are computed again
    BESIDE(qk_layer_forward(s->q, s->k, s->zn, s->z_rstd, a->z, w->gamma, w->beta, m->rope, NULL, d, c->norm_eps));
    linear_gate_backward(s->gated, s->do_, s->dr_pre, dw->wr_bias, dsum, rounded(m, w->wh2), a->o, a->r_pre, gated_mask,
                         R, d.E, d.D);
    JOIN();
    BESIDE(linear_backward_weight(dw->wh2, NULL, dsum, s->gated, R, d.E, d.D));
    BESIDE(linear_backward(s->dmx, 0, dw->wh1, dw->wh1_bias, dsum, a->mx, rounded(m, w->wh1), R, d.D, d.D));
    BESIDE(linear_backward(s->dmx, 1, dw->wr, NULL, s->dr_pre, a->mx, rounded(m, w->wr), R, d.D, d.E));
    // o = attention(q, k, v)
    attention_backward(s->dq, s->dk, s->dv, s->scores, s->do_, a->lse, s->q, s->k, s->v, mask_of_attention(m, layer),
                       d);
    qk_layer_backward(s->dz, dw->gamma, dw->beta, s->dq, s->dk, s->zn, s->z_rstd, a->z, w->gamma, m->rope, d);
    JOIN();
    linear_backward(s->dmx, 1, dw->wz, dw->wz_bias, s->dz, a->mx, rounded(m, w->wz), R, d.D, d.Z);
    // mx = dropout(RMSNorm(CEMA(xt)))
    dropout(s->dmx, s->dmx, mask_of(m, layer, DROP_MX, c->hidden_dropout, d.D), (size_t)R * d.D);
    rmsnorm_backward(s->dema, dw->rmsnorm_weight, s->dmx, a->ema, w->rmsnorm_weight, a->ema_rstd, R, d.D);
    cema_layer_backward(m, layer, s->dxt, dstate, s->dema);
    // v = silu(xt Wv' + bv)
    silu_bias_backward(s->dv, dw->wv_bias, s->dv, a->v_pre, R, d.E);
    linear_backward(s->dxt, 1, dw->wv, NULL, s->dv, a->xt, rounded(m, w->wv), R, d.D, d.E);
    // xt = TimestepNorm(x), and both residuals
    const floatX *residuals[2] = {dy, residual};
    timestep_norm_layer_backward(m, layer, dx, dw->timenorm_weight, dw->timenorm_bias, dstate, s->dxt, residuals, x,
                                 w->timenorm_weight, a->norm_mean, a->norm_rstd);
}

// ----------------------------------------------------------------------------
// the FFN sub-layer with the block's residual: out = [alpha *] hidden W2' + x,
// hidden = silu(u W1') [* (u W3')], u = LayerNorm(y). [..]: with rescale_nffn, with swiglu.

static void nffn_forward(Model *m, int layer, floatX *out, const floatX *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int R = m->dims.B * m->dims.L, D = m->dims.D, F = m->dims.F;

    layernorm_forward(a->u, a->ffn_mean, a->ffn_rstd, a->y, w->norm_weight, w->norm_bias, R, D, c->norm_eps);
    if (c->swiglu) {
        BESIDE(linear_forward(a->f3, NULL, a->u, rounded(m, w->fc3), NULL, R, D, F));
        linear_forward(a->f1, NULL, a->u, rounded(m, w->fc1), NULL, R, D, F);
        JOIN();
        gate_forward(s->hidden, a->f3, a->f1, (size_t)R * F);
    } else {
        linear_silu_forward(s->hidden, a->f1, a->u, rounded(m, w->fc1), NULL, R, D, F);
    }
    dropout(s->hidden, s->hidden, mask_of(m, layer, DROP_HIDDEN, c->hidden_dropout, F), (size_t)R * F);
    Mask mask = mask_of(m, layer, DROP_NFFN, c->dropout, D);
    const floatX *residual = mask.p > 0 || c->rescale_nffn ? NULL : x; // the product adds it, if nothing comes between
    floatX *f2 = c->rescale_nffn ? a->f2 : out;
    linear_forward(f2, residual, s->hidden, rounded(m, w->fc2), NULL, R, F, D);
    dropout(f2, f2, mask, (size_t)R * D);
    if (c->rescale_nffn) rescale_forward(out, f2, w->alpha, R, D);
    if (residual == NULL) add(out, x, (size_t)R * D);
}

// dy = gradient w.r.t. y, from dout. The gradient w.r.t. the residual x is dout itself: block_backward adds it.
static void nffn_backward(Model *m, int layer, floatX *dy, const floatX *dout) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int R = m->dims.B * m->dims.L, D = m->dims.D, F = m->dims.F;

    // out = [alpha *] dropout(hidden W2') + x
    const Mask hidden_mask = mask_of(m, layer, DROP_HIDDEN, c->hidden_dropout, F);
    const Mask nffn_mask = mask_of(m, layer, DROP_NFFN, c->dropout, D);
    const floatX *df2 = dout;
    if (c->rescale_nffn) {
        rescale_backward(s->dmx, dw->alpha, dout, a->f2, w->alpha, R, D);
        df2 = s->dmx;
    }
    dropout(s->dmx, df2, nffn_mask, (size_t)R * D);
    if (nffn_mask.p > 0) df2 = s->dmx;
    // hidden = dropout(silu(u W1') [* (u W3')])
    floatX *du = s->dxt;
    if (c->swiglu) {
        linear_gate_backward(s->hidden, s->df3, s->df1, NULL, df2, rounded(m, w->fc2), a->f3, a->f1, hidden_mask, R, F,
                             D);
        linear_backward(du, 0, dw->fc3, NULL, s->df3, a->u, rounded(m, w->fc3), R, D, F);
    } else {
        linear_silu_backward(s->hidden, s->df1, df2, rounded(m, w->fc2), a->f1, hidden_mask, R, F, D);
    }
    BESIDE(linear_backward_weight(dw->fc2, NULL, df2, s->hidden, R, F, D));
    linear_backward(du, c->swiglu, dw->fc1, NULL, s->df1, a->u, rounded(m, w->fc1), R, D, F);
    // u = LayerNorm(y)
    layernorm_backward(dy, dw->norm_weight, dw->norm_bias, du, a->y, w->norm_weight, a->ffn_mean, a->ffn_rstd, R, D);
}

// ----------------------------------------------------------------------------
// the block: y = mega(x), out = nffn(y) + x. The second residual skips both sub-layers: the FFN reads y, but x is added
// to its output. So dout reaches x on three paths: through both sub-layers, through the FFN alone, and directly.

static void block_forward(Model *m, int layer, const State *in, State *out) {
    mega_forward(m, layer, in, out, m->x[layer]);
    nffn_forward(m, layer, m->x[layer + 1], m->config.two_hop == ONE_HOP ? m->acts[layer].y : m->x[layer]);
    m->acts_layer = layer;
}

// Computes the activations of a block again from its kept input, if another block has overwritten them.
static void block_again(Model *m, int layer) {
    if (m->mode != MEGALODON_TRAIN && m->acts_layer != layer)
        block_forward(m, layer, m->has_before ? &m->before : NULL, NULL);
}

// forward: y = mega(x), out = nffn(y) + x
// scratch.dx: in: dout; out: dx, the gradient through both sub-layers plus dout itself.
static void block_backward(Model *m, int layer, StateGrad *dstate) {
    Scratch *s = &m->scratch;
    int one_hop = m->config.two_hop == ONE_HOP; // then dout reaches y
    block_again(m, layer);
    nffn_backward(m, layer, s->dy, s->dx);
    JOIN();
    if (one_hop) add(s->dy, s->dx, (size_t)m->dims.B * m->dims.L * m->dims.D);
    mega_backward(m, layer, s->dx, dstate, s->dy, one_hop ? NULL : s->dx, m->x[layer]);
    JOIN();
}

// ----------------------------------------------------------------------------
// the model: tokens -> embedding -> blocks -> TimestepNorm -> output
//
// The public functions return before the GPU has finished, unless they return results to the host: the loss, the
// gradient norm, logits, activations. All kernels and copies are in stream 0, one after another.

static float embedding_scale(const Config *c) { return c->scale_emb ? (float)sqrt((double)c->model_dim) : 1; }

#ifdef FAST_KERNELS
#include "kernels/decode.cuh"
#endif

// Keeps what the layers and the backward pass need of the incoming state.
static void begin_forward(Model *m, const State *state) {
    int parallel = m->cp.cp_size > 1;
    read_past(m, state);
    if (m->mode != MEGALODON_INFER || parallel) keep_state(m, state);
    if (parallel) advance(m->before.count, m->dims.B, m->cp_start);
}

static void layers_forward(Model *m, const State *in, State *out) {
    int layers = m->config.num_layers;
    for (int l = 0; l < layers; l++) block_forward(m, l, in, out);
    timestep_norm_layer_forward(m, layers, m->final, m->final_mean, m->final_rstd, m->x[layers],
                                m->params.final_norm_weight, m->params.final_norm_bias, in, out);
}

void megalodon_forward(Model *m, State *state, const int32_t *tokens, int B, int L) {
    const Config *c = &m->config;
    int parallel = m->cp.cp_size > 1;
    size_t R = (size_t)B * L;
    assert(B > 0 && L > 0 && B <= m->max_B && L <= m->max_L && (!state || state->B == B));
    for (size_t i = 0; i < R; i++) assert(tokens[i] >= 0 && tokens[i] < c->vocab_size);
    m->dims = dims_of(c, B, L), m->acts_layer = -1;
    begin_layers(m);
    memory_copy(m->tokens, tokens, R * sizeof *tokens);
    update_coeffs(m);
    FAST(decode_fast_supports(m, state), decode_token(m, state));
    begin_forward(m, state);
    FAST(graph_ready(m, FORWARD_PASS, state == NULL, 0), graph_launch(FORWARD_PASS));
    m->combining = parallel;
    embedding_forward(m->x[0], m->tokens, rounded(m, m->params.embed), embedding_scale(c), B * L, c->model_dim);
    dropout(m->x[0], m->x[0], mask_of(m, -1, DROP_EMBED, c->dropout, c->model_dim), R * c->model_dim);
    layers_forward(m, parallel ? &m->before : state, state);
    m->combining = 0;
    if (state) advance(state->count, B, parallel ? m->cp_length : L);
    FAST(graph_records(), graph_finish());
}

// m->losses, and their sum in m->sums[0].
static void sum_losses(Model *m, double grad_scale) {
    int R = m->dims.B * m->dims.L, grad = grad_scale > 0 && m->mode != MEGALODON_INFER;
    FAST(graph_ready(m, LOSS_PASS, 1, grad_scale), graph_launch(LOSS_PASS));
    output_loss(m->losses, grad ? m->scratch.dxt : NULL, grad ? m->grads.output : NULL, m->scratch.logits, m->final,
                rounded(m, m->params.output), m->targets, grad_scale, R, m->dims.D, m->dims.V);
    sum_kernel<<<1, THREADS>>>(m->sums, m->losses, R);
    FAST(graph_records(), graph_finish());
}

double megalodon_loss(Model *m, const int32_t *targets, double grad_scale, int64_t *counted, real *losses) {
    int R = m->dims.B * m->dims.L;
    double sum;
    begin_layers(m);
    memory_copy(m->targets, targets, (size_t)R * sizeof *targets);
    sum_losses(m, grad_scale);
    *counted = 0;
    for (int r = 0; r < R; r++) *counted += targets[r] >= 0;
    memory_copy(&sum, m->sums, sizeof sum);
    if (losses) read_numbers(losses, m->losses, R);
    return sum;
}

void megalodon_backward(Model *m, StateGrad *dstate) {
    int layers = m->config.num_layers;
    const Dims d = m->dims;
    Scratch *s = &m->scratch;
    assert(m->mode != MEGALODON_INFER && (!dstate || dstate->B == d.B));
    for (int b = 0; b < d.B; b++) assert(m->past[b] == 0);
    begin_layers(m);
    FAST(graph_ready(m, BACKWARD_PASS, !m->has_before && !dstate && !m->on_grad_ready, 0), graph_launch(BACKWARD_PASS));
    timestep_norm_layer_backward(m, layers, s->dx, m->grads.final_norm_weight, m->grads.final_norm_bias, dstate, s->dxt,
                                 NULL, m->x[layers], m->params.final_norm_weight, m->final_mean, m->final_rstd);
    if (m->on_grad_ready) m->on_grad_ready(m, layers + 1);
    for (int l = layers - 1; l >= 0; l--) {
        block_backward(m, l, dstate);
        if (m->on_grad_ready) m->on_grad_ready(m, l + 1);
    }
    dropout(s->dx, s->dx, mask_of(m, -1, DROP_EMBED, m->config.dropout, d.D), (size_t)d.B * d.L * d.D);
    embedding_backward(m->grads.embed, s->dx, m->tokens, embedding_scale(&m->config), d.B * d.L, d.D, d.V);
    if (m->on_grad_ready) m->on_grad_ready(m, 0);
    FAST(graph_records(), graph_finish());
}

// Logits of `rows` positions, from `first` on, in scratch.logits.
static void output_logits(Model *m, size_t first, int rows) {
    FAST(decode_logits_supports(m, rows), decode_logits(m, first, rows));
    linear_forward(m->scratch.logits, NULL, m->final + first * m->dims.D, rounded(m, m->params.output), NULL, rows,
                   m->dims.D, m->dims.V);
}

void megalodon_logits(Model *m, size_t first, size_t rows, real *dst) {
    int V = m->dims.V, most = logit_rows(V);
    assert(first + rows <= (size_t)m->dims.B * m->dims.L);
    begin_layers(m);
    for (size_t r = 0; r < rows; r += most) {
        int some = rows - r < (size_t)most ? (int)(rows - r) : most;
        output_logits(m, first + r, some);
        read_floatX(dst + r * V, m->scratch.logits, (size_t)some * V);
    }
}

// ----------------------------------------------------------------------------
// optimizer

void megalodon_zero_grad(Model *m) { memory_clear(m->memory[GRADS], m->num_params * sizeof(float)); }

// Formula: sums[block] = sum of x^2 over the elements of this thread block, added to sums[block] if `add`.
// Mapping: a thread has every (gridDim.x * THREADS)-th element. Memory: reads n.
static __global__ void square_kernel(double *sums, const float *x, size_t n, int add) {
    enum { LOADS = 8 };
    double sum = 0;
    for (size_t i = thread_index(); i < n; i += LOADS * grid_threads()) {
        float some[LOADS]; // loaded at once, so that the latencies of memory overlap
        for (int k = 0; k < LOADS; k++) some[k] = i + k * grid_threads() < n ? x[i + k * grid_threads()] : 0;
        for (int k = 0; k < LOADS; k++) sum += (double)some[k] * some[k];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum + (add ? sums[blockIdx.x] : 0);
}

// Each thread block of square_kernel leaves one sum; the host adds them in order.
double megalodon_grad_norm(Model *m) {
    double sums[NUM_SUMS], total = 0;
    for (int s = 0; s < m->num_shards; s++) {
        square_kernel<<<NUM_SUMS, THREADS>>>(m->sums, m->memory[GRADS] + m->shards[s].first, m->shards[s].count, s > 0);
    }
    memory_copy(sums, m->sums, sizeof sums);
    for (int i = 0; i < NUM_SUMS; i++) total += sums[i];
    return sqrt(total);
}

// AdamW, with g the scaled gradient and k = update + 1: m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
// p = p (1 - lr weight_decay) - lr (m/(1 - beta1^k)) / (sqrt(v/(1 - beta2^k)) + eps). All parameters decay. Where v
// overflows, p becomes NaN, see megalodon.c. Then the parameter is rounded to floatX for the matrix products.
// Mapping: a thread has a parameter. Memory: reads 4 n floats, writes 3 n floats and n of type floatX.
typedef struct {
    float beta1, beta2, eps, grad_scale, step, root, keep;
} AdamWFactors;

static __global__ void adamw_kernel(float *params, floatX *rounded, float *moment1, float *moment2, const float *grads,
                                    AdamWFactors f, size_t n) {
    size_t i = thread_index();
    if (i >= n) return;
    float g = grads[i] * f.grad_scale;
    float m = f.beta1 * moment1[i] + (1 - f.beta1) * g, v = f.beta2 * moment2[i] + (1 - f.beta2) * g * g;
    float p = params[i] * f.keep - f.step * m / (sqrtf(v) * f.root + f.eps) + (v - v);
    moment1[i] = m, moment2[i] = v, params[i] = p;
    if (sizeof(floatX) < sizeof(float)) rounded[i] = to_floatX(p);
}

void megalodon_update(Model *m, const AdamW *o, double lr, double grad_scale, int64_t update) {
    double k = (double)update + 1;
    AdamWFactors f;
    f.beta1 = (float)o->beta1, f.beta2 = (float)o->beta2, f.eps = (float)o->eps, f.grad_scale = (float)grad_scale;
    f.step = (float)(lr / (1 - pow(o->beta1, k))), f.root = (float)(1 / sqrt(1 - pow(o->beta2, k)));
    f.keep = (float)(1 - lr * o->weight_decay);
    float *moment1 = m->memory[MOMENT1], *moment2 = m->memory[MOMENT2];
    for (int s = 0; s < m->num_shards; s++) {
        size_t first = m->shards[s].first, n = m->shards[s].count;
        if (n == 0) continue;
        adamw_kernel<<<blocks_for(n, THREADS), THREADS>>>(m->memory[PARAMS] + first, m->rounded + first, moment1,
                                                          moment2, m->memory[GRADS] + first, f, n);
        moment1 += n, moment2 += n;
    }
    m->coeffs_valid = 0;
}
