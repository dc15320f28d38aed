/*
megalodon.cu: the Megalodon language model on one GPU: megalodon.c again, function by function in the same order, with
a kernel or a library's matrix product behind each. megalodon.h says what the model is and what the letters mean;
megalodon.c has the derivations, which are not repeated. Every kernel says what a block and a thread own, and how many
bytes it moves for R = B*L rows.

Numbers
- floatX is what activations and matrices are kept in: bfloat16, or float with -DMEGALODON_FP32. Every kernel computes in
  float; matrix products add up in float (no TF32). CEMA multiplies floats as sums of two or three bfloat16.
- Parameters, gradients and moments are float. Matrices are multiplied as rounded copies of the parameters, which an
  update writes anew; the parameters of norms and of CEMA are used as they are.
- Statistics, CEMA's coefficients and states, softmax and loss are float; TimestepNorm's moments over whole blocks of
  tokens are double, as in megalodon.c.

Same numbers every time: no atomics. A sum over rows is made of parts, each summed by one thread block in a fixed
order, and the parts are added in a fixed order. cuBLASLt repeats itself as long as shapes and workspace do.

What differs from megalodon.c, to move fewer bytes: qk_* are RMSNorm, scale and rotation in one kernel, so that neither
z's norm nor q and k before the rotation are kept; gates and silu compute their own output again in the backward pass;
residuals are added by the product or kernel before them; timestep_norm_* and cema_* work on blocks of tokens at once;
a single token of a few sequences has kernels of its own (decoding).
*/
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

extern "C" {
#include "megalodon.h"
}

#ifdef MEGALODON_FP32
typedef float floatX;
static const cudaDataType_t CUBLAS_TYPE = CUDA_R_32F;
static __host__ __device__ float to_float(floatX x) { return x; }
static __device__ void set(floatX *dst, float x) { *dst = x; }
#else
typedef __nv_bfloat16 floatX;
static const cudaDataType_t CUBLAS_TYPE = CUDA_R_16BF;
static __host__ __device__ float to_float(floatX x) { return __bfloat162float(x); }
static __device__ void set(floatX *dst, float x) { *dst = __float2bfloat16(x); } // to nearest
#endif

enum {
    WARP = 32,
    VEC = 16 / sizeof(floatX),                    // numbers in a load of 16 bytes
    THREADS = 256,                             // of a block, where nothing else is said
    ROW_WARPS = 8,                             // of a block whose warps have rows
    NORM_BLOCK = 32,                           // tokens of TimestepNorm that a warp scans
    ACROSS = 128,                              // threads side by side in a row, where threads own columns
    CEMA_BLOCK = 64,                           // tokens between two stored states of CEMA
    CEMA_COLUMNS = sizeof(floatX) == 4 ? 16 : 32, // blocks of tokens that a thread block has,
    CEMA_CHANNELS = 16,                        // channels,
    CEMA_WARPS = 8,                            // and warps
    CEMA_PAIRS = CEMA_BLOCK / 2 + 4,           // pairs of numbers of a block in shared memory, and
    CEMA_TILE = CEMA_COLUMNS * CEMA_PAIRS + 2, // of a channel: so many that threads meet in few banks
    QUERY_TILE = 512,                          // queries of a chunk whose scores exist at a time
    GEMV_ROWS = 8,                              // rows that are decoded at once
    VALUE_COLUMNS = 16,                        // columns of values that a block of decode_values_kernel owns
    SCORES = 1 << 24,                          // scores that exist at a time
    LOGITS = 1 << 27, // logits that exist at a time, in whole positions; at least LOGIT_ROWS of these
    LOGIT_ROWS = 128,
    EMBED_ROWS = 64,     // rows with the same token that a thread block sums
    MOST_PARTS = 1024,   // parts of a sum over rows
    NORM_PARTS = 1024,   // parts of the gradient norm
    WORKSPACE = 1 << 25, // bytes that cuBLASLt may use
    // Shared memory per thread block, in bytes
    SHARED_NEEDED = 99 << 10,  // what the device must allow: compute capability 8.6, 8.9, 12.0; 8.0 has 163 KB, 9.0 227
    SHARED_DECLARED = 2 << 10, // at most this much is declared in a kernel that has dynamic shared memory, too
    SHARED_DEFAULT = 48 << 10  // what a kernel may have without cudaFuncSetAttribute
};

static const double PI = 3.14159265358979323846;

static __host__ __device__ int min_int(int a, int b) { return a < b ? a : b; }
static __host__ __device__ int max_int(int a, int b) { return a > b ? a : b; }
static __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ----------------------------------------------------------------------------
// the device

static struct {
    int open, devices; // devices of this machine
    int has_pdl;       // a kernel can start before the one before it has ended
    int max_shared;    // bytes of dynamic shared memory that a thread block can have
    char name[300];
    size_t used, peak; // bytes of device memory
    cublasLtHandle_t lt;
    void *workspace;
} gpu;

static void check_cuda(cudaError_t status, const char *file, int line) {
    if (status == cudaSuccess) return;
    fprintf(stderr, "error: %s:%d: CUDA: %s\n", file, line, cudaGetErrorString(status));
    exit(1);
}
static void check_blas(cublasStatus_t status, const char *file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fprintf(stderr, "error: %s:%d: cuBLASLt: status %d\n", file, line, (int)status);
    exit(1);
}
#define cudaCheck(call) check_cuda((call), __FILE__, __LINE__)
#define cublasCheck(call) check_blas((call), __FILE__, __LINE__)

// NULL when the device has no such room. bytes() long blocks begin where everything may begin.
static void *device_new(size_t bytes) {
    void *memory = NULL;
    cudaError_t status = cudaMalloc(&memory, bytes > 0 ? bytes : 1);
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError(); // forgotten
        return NULL;
    }
    cudaCheck(status);
    gpu.used += bytes;
    gpu.peak = gpu.peak > gpu.used ? gpu.peak : gpu.used;
    return memory;
}
static void device_free(void *memory, size_t bytes) {
    if (memory == NULL) return;
    cudaCheck(cudaFree(memory));
    gpu.used -= bytes;
}

static __global__ void advance_kernel(int64_t *count, int B, int64_t L);

// Ends the program where its kernels cannot run on the device.
static void check_device(const cudaDeviceProp *properties, int shared) {
    int major = properties->major, minor = properties->minor;
    if (major < 8 || shared < SHARED_NEEDED) {
        fprintf(stderr,
                "error: %s has compute capability %d.%d and %d bytes of shared memory per thread block; compute "
                "capability 8.0 and %d bytes are needed. ./train and ./sample run on the CPU\n",
                properties->name, major, minor, shared, SHARED_NEEDED);
        exit(1);
    }
    cudaFuncAttributes attributes;
    cudaError_t status = cudaFuncGetAttributes(&attributes, advance_kernel);
    if (status == cudaSuccess) return;
    fprintf(stderr,
            "error: %s has compute capability %d.%d, for which this program has no code (CUDA: %s). Build it for this "
            "GPU: make cuda CUARCH=%d%d\n",
            properties->name, major, minor, cudaGetErrorString(status), major, minor);
    exit(1);
}

static void gpu_open(void) {
    int count = 0, shared = 0;
    cudaDeviceProp properties;
    if (gpu.open) return;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0) {
        fprintf(stderr, "error: no CUDA GPU: %s. ./train and ./sample run without one\n",
                status == cudaSuccess ? "none found" : cudaGetErrorString(status));
        exit(1);
    }
    // processes of one machine take its devices in turn; MPI's launchers number them
    const char *numbers[3] = {getenv("OMPI_COMM_WORLD_LOCAL_RANK"), getenv("MPI_LOCALRANKID"), getenv("SLURM_LOCALID")};
    int number = 0;
    for (int i = 2; i >= 0; i--) number = numbers[i] ? atoi(numbers[i]) : number;
    gpu.devices = count;
    cudaCheck(cudaSetDevice(number % count));
    cudaCheck(cudaGetDeviceProperties(&properties, number % count));
    cudaCheck(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, number % count));
    check_device(&properties, shared);
    gpu.max_shared = shared - SHARED_DECLARED;
    snprintf(gpu.name, sizeof gpu.name, "CUDA, %s (sm_%d%d), %s", properties.name, properties.major, properties.minor,
             sizeof(floatX) == 4 ? "float32" : "bfloat16");
    gpu.has_pdl = properties.major >= 9;
    cublasCheck(cublasLtCreate(&gpu.lt));
    gpu.workspace = device_new(WORKSPACE);
    if (gpu.workspace == NULL) {
        fprintf(stderr, "error: %s: no memory is left on the GPU\n", gpu.name);
        exit(1);
    }
    gpu.open = 1;
}

// ----------------------------------------------------------------------------
// numbers and vectors of them: W at a time, all kernels compute in float

template <int W> struct alignas(W * sizeof(floatX)) Vec { floatX v[W]; };
template <int W> static __device__ void load(float x[W], const floatX *src) {
    Vec<W> vec = *(const Vec<W> *)src;
#pragma unroll
    for (int i = 0; i < W; i++) x[i] = to_float(vec.v[i]);
}
template <int W> static __device__ void store(floatX *dst, const float x[W]) {
    Vec<W> vec;
#pragma unroll
    for (int i = 0; i < W; i++) set(&vec.v[i], x[i]);
    *(Vec<W> *)dst = vec;
}

// exp(x) and sigmoid: bfloat16 hides the error of the fast ones
static __device__ float exp_fast(float x) { return sizeof(floatX) == 4 ? expf(x) : __expf(x); }
static __device__ float sigmoid(float x) { return 1 / (1 + exp_fast(-x)); }

template <typename T> static __device__ T warp_sum(T x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Sums of squares above LARGE may have overflowed. They are computed again, of numbers times SMALL_UNIT, whose squares
// cannot overflow, and with which those that count in such a sum do not underflow.
static const float LARGE = 1e37f, SMALL_UNIT = 0x1p-80f;

// Blocks of `threads` threads for n things.
static unsigned blocks_for(size_t n, int threads) { return (unsigned)((n + (size_t)threads - 1) / (size_t)threads); }

// Raises a kernel's limit of dynamic shared memory where the default is too low. The default includes what the kernel
// declares.
template <typename Kernel> static void allow_shared(Kernel kernel, size_t bytes) {
    if (bytes > SHARED_DEFAULT - SHARED_DECLARED)
        cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// ----------------------------------------------------------------------------
// matrix product: C (M,N) = op(A) op(B), op(A) is (M,K), op(B) is (K,N); ta, tb: stored transposed; rows are lda, ldb,
// ldc long. By cuBLASLt, whose matrices are stored by columns: it computes C' = op(B)' op(A)'.

typedef struct { // all that cuBLASLt's choice of an algorithm depends on
    int ta, tb, M, N, K, lda, ldb, ldc, batch, add, epilogue, align_a, align_b, align_add, align_c, align_bias;
    cudaDataType_t type; // of C
    int64_t stride_a, stride_b, stride_c;
} MatmulKey;

typedef struct {
    MatmulKey form;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
} MatmulPlan;

static cublasLtMatrixLayout_t matrix_layout(cudaDataType_t type, int rows, int columns, int ld, int batch,
                                            int64_t stride) {
    cublasLtMatrixLayout_t layout;
    cublasCheck(cublasLtMatrixLayoutCreate(&layout, type, (uint64_t)columns, (uint64_t)rows, ld));
    cublasCheck(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch));
    cublasCheck(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
    return layout;
}

static void set_alignment(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t which,
                          int bytes) {
    uint32_t align = (uint32_t)bytes;
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, which, &align, sizeof align));
}

static MatmulPlan plan_new(const MatmulKey *f, const floatX *bias) {
    MatmulPlan p;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t best;
    cublasOperation_t first = f->tb ? CUBLAS_OP_T : CUBLAS_OP_N, second = f->ta ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = (cublasLtEpilogue_t)f->epilogue;
    size_t workspace = WORKSPACE;
    int found = 0;
    p.form = *f;
    cublasCheck(cublasLtMatmulDescCreate(&p.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cublasCheck(cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first));
    cublasCheck(cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second));
    cublasCheck(cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    if (bias) // whose alignment matters, too
        cublasCheck(cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    p.a = matrix_layout(CUBLAS_TYPE, f->ta ? f->K : f->M, f->ta ? f->M : f->K, f->lda, f->batch, f->stride_a);
    p.b = matrix_layout(CUBLAS_TYPE, f->tb ? f->N : f->K, f->tb ? f->K : f->N, f->ldb, f->batch, f->stride_b);
    p.c = matrix_layout(f->type, f->M, f->N, f->ldc, f->batch, f->stride_c);
    cublasCheck(cublasLtMatmulPreferenceCreate(&preference));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                              sizeof workspace));
    set_alignment(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, f->align_b);
    set_alignment(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, f->align_a);
    set_alignment(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, f->align_add);
    set_alignment(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, f->align_c);
    cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(gpu.lt, p.product, p.b, p.a, p.c, p.c, preference, 1, &best, &found);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0) {
        fprintf(stderr, "error: cuBLASLt has no product of %d x %d by %d x %d (%s)\n", f->M, f->K, f->K, f->N,
                gpu.name);
        exit(1);
    }
    cublasCheck(cublasLtMatmulPreferenceDestroy(preference));
    p.algorithm = best.algo;
    return p;
}

// Plans are made once for every form, since choosing takes longer than a small product.
static const MatmulPlan *plan_for(const MatmulKey *form, const floatX *bias) {
    static MatmulPlan *plans;
    static int count, room, last;
    for (int i = 0; i < count; i++) { // products come in the same order step after step
        int at = (last + 1 + i) % count;
        if (memcmp(&plans[at].form, form, sizeof *form) == 0) return &plans[last = at];
    }
    if (count == room) {
        plans = (MatmulPlan *)realloc(plans, (size_t)(room = 2 * room + 64) * sizeof *plans);
        if (plans == NULL) {
            fprintf(stderr, "error: out of memory\n");
            exit(1);
        }
    }
    plans[last = count++] = plan_new(form, bias);
    return &plans[last];
}

static int alignment(const void *pointer) {
    uintptr_t bits = (uintptr_t)pointer | 256;
    return (int)(bits & -bits);
}

// add: what is added, of C's form, NULL for nothing, may be C. bias (N), added to every row, or NULL.
static void matmul(MatmulKey form, const floatX *A, const floatX *B, const void *add, const floatX *bias, void *C) {
    const float one = 1, beta = add ? 1 : 0;
    form.add = add != NULL;
    form.align_a = alignment(A), form.align_b = alignment(B), form.align_c = alignment(C);
    form.align_add = add ? alignment(add) : form.align_c;
    form.align_bias = alignment(bias);
    const MatmulPlan *p = plan_for(&form, bias);
    if (bias) cublasCheck(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    cublasCheck(cublasLtMatmul(gpu.lt, p->product, &one, B, p->b, A, p->a, &beta, add ? add : C, p->c, C, p->c, &p->algorithm,
                        gpu.workspace, WORKSPACE, 0));
}

static MatmulKey matmul_key(int ta, int tb, int M, int N, int K, int lda, int ldb, int ldc) {
    MatmulKey f;
    memset(&f, 0, sizeof f); // also between the fields: forms are compared as bytes
    f.ta = ta, f.tb = tb, f.M = M, f.N = N, f.K = K, f.lda = lda, f.ldb = ldb, f.ldc = ldc, f.batch = 1;
    f.type = CUBLAS_TYPE, f.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    return f;
}

// ----------------------------------------------------------------------------
// sums over rows are made of parts (P, stride), whose first `width` columns are summed into out (width), and `width2`
// more, if there are, into out2 (width2); added to what is there if `add`. A block owns 32 columns, its 32 rows of
// threads share the parts. Reads P*(width + width2) floats.

static __global__ void sum_parts_kernel(float *out, float *out2, int add, const float *parts, int P, size_t stride,
                                        size_t width, size_t width2) {
    enum { AT_ONCE = 8 };
    __shared__ float sums[WARP][WARP + 1];
    size_t c = (size_t)blockIdx.x * WARP + threadIdx.x;
    float sum = 0;
    for (int p0 = threadIdx.y; p0 < P && c < width + width2; p0 += AT_ONCE * WARP) {
        float some[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int p = p0 + i * WARP;
            some[i] = p < P ? parts[(size_t)p * stride + c] : 0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) sum += some[i];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = warp_sum(sums[threadIdx.x][threadIdx.y]); // the other way round: a warp has a column
    if (threadIdx.x == 0) sums[0][threadIdx.y] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= width + width2) return;
    float *to = c < width ? out + c : out2 + (c - width);
    *to = sums[0][threadIdx.x] + (add ? *to : 0);
}

static void sum_parts(float *out, float *out2, int add, const float *parts, int P, size_t stride, size_t width,
                      size_t width2) {
    sum_parts_kernel<<<blocks_for(width + width2, WARP), dim3(WARP, WARP)>>>(out, out2, add, parts, P, stride, width,
                                                                             width2);
    cudaCheck(cudaGetLastError());
}

// Where a thread stands in a block whose threads own W columns each, in `down` rows of threads.
typedef struct {
    int c, row, down; // row < 0: it has nothing to do
} Place;
template <int W> static __device__ Place place(int D) {
    int across = min_int(ACROSS, ceil_div(D, W)), down = blockDim.x / across;
    Place p = {(int)(blockIdx.y * across + threadIdx.x % across) * W, (int)threadIdx.x / across, down};
    if (p.row >= down || p.c >= D) p.row = -1;
    return p;
}
static dim3 grid_of(int W, int blocks, int D) { return dim3(blocks, ceil_div(ceil_div(D, W), ACROSS)); }
// How many blocks share R rows when each leaves `down` parts of a sum over them.
static int column_parts(int W, int R, int D) {
    int down = THREADS / min_int(ACROSS, ceil_div(D, W));
    return max_int(min_int(ceil_div(R, down), MOST_PARTS / down), 1);
}

// For gradients of biases: out (D) += sum_r dy (R,D). Reads R*D.
template <int W> static __global__ void sum_rows_kernel(float *parts, const floatX *dy, int R, int D) {
    Place p = place<W>(D);
    float x[W], sum[W] = {};
    if (p.row < 0) return;
    for (size_t r = (size_t)blockIdx.x * p.down + p.row; r < (size_t)R; r += (size_t)gridDim.x * p.down) {
        load<W>(x, dy + r * D + p.c);
#pragma unroll
        for (int i = 0; i < W; i++) sum[i] += x[i];
    }
    for (int i = 0; i < W; i++) parts[((size_t)blockIdx.x * p.down + p.row) * D + p.c + i] = sum[i];
}

static void sum_rows(float *out, const floatX *dy, float *parts, int R, int D) {
    int W = D % VEC == 0 ? VEC : 1, P = column_parts(W, R, D), down = THREADS / min_int(ACROSS, ceil_div(D, W));
    auto kernel = W == VEC ? sum_rows_kernel<VEC> : sum_rows_kernel<1>;
    kernel<<<grid_of(W, P, D), THREADS>>>(parts, dy, R, D);
    cudaCheck(cudaGetLastError());
    sum_parts(out, NULL, 1, parts, P * down, D, D, 0);
}

// ----------------------------------------------------------------------------
// embedding: out (R,D) = scale * embed[token]
// forward: a thread has VEC numbers; reads and writes R*D.
// backward: the host has sorted the rows by token into segments of up to EMBED_ROWS rows of one token. A block sums a
// segment, a thread a column; a token of several segments gets these sums in a second step. Reads R*D.

typedef struct {
    int from, to, token, part; // rows order[from..to); part: where the sum goes, -1: to the token
} Segment;

template <int W>
static __global__ void embedding_forward_kernel(floatX *out, const int32_t *tokens, const floatX *embed, float scale, int R,
                                                int D) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W, r = i / D;
    float x[W];
    if (r >= (size_t)R) return;
    load<W>(x, embed + (size_t)tokens[r] * D + i % D);
#pragma unroll
    for (int k = 0; k < W; k++) x[k] *= scale;
    store<W>(out + i, x);
}

static void embedding_forward(floatX *out, const int32_t *tokens, const floatX *embed, float scale, int R, int D) {
    auto kernel = D % VEC == 0 ? embedding_forward_kernel<VEC> : embedding_forward_kernel<1>;
    kernel<<<blocks_for((size_t)R * D / (D % VEC == 0 ? VEC : 1), THREADS), THREADS>>>(out, tokens, embed, scale, R, D);
    cudaCheck(cudaGetLastError());
}

static __global__ void embedding_segments_kernel(float *dembed, float *parts, const floatX *dout, const Segment *segments,
                                                 const int *order, float scale, int D) {
    Segment s = segments[blockIdx.x];
    for (int c = threadIdx.x; c < D; c += blockDim.x) {
        float sum = 0;
        for (int i = s.from; i < s.to; i++) sum += to_float(dout[(size_t)order[i] * D + c]);
        if (s.part < 0) {
            dembed[(size_t)s.token * D + c] += scale * sum;
        } else {
            parts[(size_t)s.part * D + c] = sum;
        }
    }
}

// A block has a token and some columns, a thread a column.
static __global__ void embedding_tokens_kernel(float *dembed, const float *parts, const Segment *tokens, float scale,
                                               int D) {
    Segment s = tokens[blockIdx.x]; // from, to: its parts
    int c = blockIdx.y * blockDim.x + threadIdx.x;
    float sum = 0;
    if (c >= D) return;
    for (int p = s.from; p < s.to; p++) sum += parts[(size_t)p * D + c];
    dembed[(size_t)s.token * D + c] += scale * sum;
}

// Sorts R tokens: order (R), segments (R) and, behind them, the tokens with parts. first (V+1) is scratch.
typedef struct {
    int segments, tokens, parts;
} Sorted;
static Sorted sort_tokens(int *order, Segment *segments, int *first, const int32_t *tokens, int R, int V) {
    Sorted n = {0, 0, 0};
    memset(first, 0, ((size_t)V + 1) * sizeof *first);
    for (int r = 0; r < R; r++) first[tokens[r] + 1]++;
    for (int v = 0; v < V; v++) first[v + 1] += first[v];
    for (int r = 0; r < R; r++) order[first[tokens[r]]++] = r; // first[v] is now where v ends
    for (int v = 0, from = 0; v < V; from = first[v++]) {
        int to = first[v], pieces = ceil_div(to - from, EMBED_ROWS);
        for (int i = 0; i < pieces; i++) {
            int begin = from + i * EMBED_ROWS;
            segments[n.segments++] = Segment{begin, min_int(begin + EMBED_ROWS, to), v, pieces > 1 ? n.parts++ : -1};
        }
    }
    for (int i = 0; i < n.segments; i++) { // a token's parts are neighbours
        const Segment *s = &segments[i];
        if (s->part < 0) continue;
        Segment *last = n.tokens > 0 ? &segments[n.segments + n.tokens - 1] : NULL;
        if (last && last->token == s->token) {
            last->to = s->part + 1;
        } else {
            segments[n.segments + n.tokens++] = Segment{s->part, s->part + 1, s->token, -1};
        }
    }
    return n;
}

static void embedding_backward(float *dembed, float *parts, const floatX *dout, const int *order, const Segment *segments,
                               Sorted n, float scale, int D) {
    embedding_segments_kernel<<<n.segments, THREADS>>>(dembed, parts, dout, segments, order, scale, D);
    cudaCheck(cudaGetLastError());
    if (n.tokens == 0) return;
    embedding_tokens_kernel<<<dim3(n.tokens, ceil_div(D, THREADS)), THREADS>>>(dembed, parts, segments + n.segments,
                                                                               scale, D);
    cudaCheck(cudaGetLastError());
}

// ----------------------------------------------------------------------------
// dropout: out = mask inp/(1 - p). Element i of the step's whole batch has word i % 4 of Philox's counter
// (STREAM_DROPOUT + place, step, layer, i/4), here as in megalodon.c. A thread has the elements of one i/4; reads and
// writes n. out may be inp.

enum { DROP_EMBED, DROP_MX, DROP_ATTENTION, DROP_GATED, DROP_MEGA, DROP_HIDDEN, DROP_NFFN }; // places

typedef struct {
    double p; // 0: no dropout
    uint64_t seed;
    uint32_t stream, step, layer;
    uint64_t first; // i of inp[0]
    uint64_t row;   // numbers of a whole sequence (of attention's, of each head), of which
    size_t run;     // there are so many here; 0: what is here lies without a gap in the step's batch
} Mask;

static __device__ void mask_words(uint32_t words[4], const Mask *mask, uint64_t four) {
    // indices beyond 32 bits go above the layer's 16
    megalodon_philox(words, mask->seed, mask->stream, mask->step, mask->layer + (uint32_t)(four >> 32 << 16),
                     (uint32_t)four);
}

// What element i of inp is multiplied with.
static __device__ float mask_at(const Mask *mask, uint64_t i) {
    uint32_t words[4], which = (uint32_t)((mask->first + i) % 4);
    mask_words(words, mask, (mask->first + i) / 4);
    uint32_t word = which == 0 ? words[0] : which == 1 ? words[1] : which == 2 ? words[2] : words[3];
    return word >= (uint32_t)(mask->p * 4294967296.0) ? (float)(1 / (1 - mask->p)) : 0;
}

static __global__ void dropout_kernel(floatX *out, const floatX *inp, Mask mask, size_t run, unsigned blocks) {
    size_t row = blockIdx.x / blocks, start = row * run;
    uint64_t first = mask.first + row * mask.row, four = first / 4 + (uint64_t)(blockIdx.x % blocks) * THREADS;
    uint32_t words[4], limit = (uint32_t)(mask.p * 4294967296.0);
    float scale = (float)(1 / (1 - mask.p));
    four += threadIdx.x;
    mask_words(words, &mask, four);
#pragma unroll
    for (int w = 0; w < 4; w++) {
        uint64_t i = 4 * four + w - first; // wraps below 0: too large
        if (i < run) set(&out[start + i], words[w] >= limit ? to_float(inp[start + i]) * scale : 0);
    }
}

static void dropout(floatX *out, const floatX *inp, Mask mask, size_t n) {
    size_t run = mask.run > 0 ? mask.run : n;
    unsigned blocks = blocks_for(run / 4 + 2, THREADS); // of a run
    if (mask.p == 0) return;
    dropout_kernel<<<blocks *(unsigned)(n / run), THREADS>>>(out, inp, mask, run, blocks);
    cudaCheck(cudaGetLastError());
}

// ----------------------------------------------------------------------------
// TimestepNorm: y_t = (x_t - mean_t) rstd_t (weight + 1) + bias, mean and variance over a group's scalars at all tokens
// up to t. Three kernels, since moments of sets of scalars can be merged in any grouping:
// 1. moments: a warp owns NORM_BLOCK tokens of a group, a lane a token. The lane sums its token's g scalars, the warp
//    scans the tokens. In float, relative to the first scalar there, so that a large mean costs no digits; again in a
//    smaller unit where squares overflow. Reads R*D.
// 2. scan: a warp owns a sequence's group and merges its blocks, in double, from the incoming state on.
// 3. apply: a block owns NORM_BLOCK tokens; its threads own columns, so that scales are read once. Reads and writes R*D.

typedef struct {
    float mean, deviation; // mean relative to the block's first scalar; deviation, since M2 may be too large for float
} Prefix;                  // of a token: moments of its block up to it
typedef struct {
    double mean, m2;
} Moments; // of a whole block, then of all before it

static __host__ __device__ Moments merge(double n0, Moments a, double n1, Moments b) {
    double n = n0 + n1, d = b.mean - a.mean;
    if (n == 0) return a;
    return Moments{a.mean + d * (n1 / n), a.m2 + b.m2 + d * d * (n0 * (n1 / n))};
}

#ifdef MEGALODON_FP32
// A mean as the sum of two floats: x - mean is (x - high) - low, which keeps the digits of x where the mean is large.
typedef float2 Mean;
static __host__ __device__ Mean split_mean(double mean) {
    float high = (float)mean;
    return make_float2(high, (float)(mean - high));
}
static __host__ __device__ double whole_mean(Mean mean) { return (double)mean.x + mean.y; }
static __device__ float centered(float x, Mean mean) { return x - mean.x - mean.y; }
#else
// One float: x has the 8 bits of a bfloat16, to which more digits of the mean would add nothing but memory traffic.
typedef float Mean;
static __host__ __device__ Mean split_mean(double mean) { return (float)mean; }
static __host__ __device__ double whole_mean(Mean mean) { return mean; }
static __device__ float centered(float x, Mean mean) { return x - mean; }
#endif

// Numbers that a thread loads at once: they must be of one group.
static int norm_width(int D, int G) { return D / G % VEC == 0 ? VEC : D / G % 4 == 0 ? 4 : 1; }
#define NORM_KERNEL(kernel, W) ((W) == VEC ? kernel<VEC> : (W) == 4 ? kernel<4> : kernel<1>)

template <int W>
static __global__ void timestep_norm_moments_kernel(Prefix *prefix, Moments *blocks, const floatX *inp, int L, int D,
                                                    int G) {
    int g = D / G, num_blocks = ceil_div(L, NORM_BLOCK), lane = threadIdx.x;
    int j = blockIdx.y * blockDim.y + threadIdx.y, t0 = blockIdx.x % num_blocks * NORM_BLOCK;
    size_t first_row = (size_t)(blockIdx.x / num_blocks) * L + t0;
    int T = min_int(NORM_BLOCK, L - t0);
    if (j >= G) return;
    const floatX *x = inp + first_row * D + (size_t)j * g;
    float anchor = to_float(x[0]), k, mean, m2; // of k tokens; mean and m2 in this unit
    for (float unit = 1;; unit = SMALL_UNIT) {
        k = mean = m2 = 0;
        if (lane < T) {
            const floatX *row = x + (size_t)lane * D;
            float from = to_float(row[0]) * unit, s1 = 0, s2 = 0;
            for (int c = 0; c < g; c += W) {
                float v[W];
                load<W>(v, row + c);
#pragma unroll
                for (int i = 0; i < W; i++) {
                    float d = v[i] * unit - from;
                    s1 += d;
                    s2 += d * d;
                }
            }
            k = 1, mean = (from - anchor * unit) + s1 / g, m2 = s2 - s1 * (s1 / g);
            m2 = m2 < 0 ? 0 : m2; // NaN stays
        }
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            float k0 = __shfl_up_sync(~0u, k, step), mean0 = __shfl_up_sync(~0u, mean, step);
            float m20 = __shfl_up_sync(~0u, m2, step);
            if (lane >= step && k > 0) {
                float d = mean - mean0, share = k / (k0 + k);
                mean = mean0 + d * share;
                m2 += m20 + g * d * d * k0 * share;
                k += k0;
            }
        }
        if (unit < 1 || __shfl_sync(~0u, m2, T - 1) <= LARGE) {
            if (lane < T) prefix[(first_row + lane) * G + j] = Prefix{mean / unit, sqrtf(m2 / (k * g)) / unit};
            if (lane == T - 1)
                blocks[(size_t)blockIdx.x * G + j] = Moments{anchor + (double)mean / unit, (double)m2 / unit / unit};
            return;
        }
    }
}

// Replaces blocks' own moments by those of all tokens before them. mean_out may be prev_mean.
static __global__ void timestep_norm_scan_kernel(Moments *blocks, double *mean_out, double *m2_out,
                                                 const double *prev_mean, const double *prev_m2, const int64_t *count,
                                                 int B, int L, int D, int G) {
    int pair = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x, num_blocks = ceil_div(L, NORM_BLOCK);
    if (pair >= B * G) return;
    int b = pair / G, j = pair % G, share = ceil_div(num_blocks, WARP), from = lane * share;
    int to = min_int(from + share, num_blocks), g = D / G;
    Moments *mine = blocks + (size_t)b * num_blocks * G + j, all = {0, 0}, in = {0, 0};
    double n = 0, n_in = count ? (double)g * (double)count[b] : 0;
    if (prev_mean) in = Moments{prev_mean[pair], prev_m2[pair]};
    for (int i = from; i < to; i++) {
        double m = (double)g * min_int(NORM_BLOCK, L - i * NORM_BLOCK);
        all = merge(n, all, m, mine[(size_t)i * G]);
        n += m;
    }
    for (int step = 1; step < WARP; step *= 2) {
        double n0 = __shfl_up_sync(~0u, n, step);
        Moments a = {__shfl_up_sync(~0u, all.mean, step), __shfl_up_sync(~0u, all.m2, step)};
        if (lane >= step) all = merge(n0, a, n, all), n += n0;
    }
    Moments before = {__shfl_up_sync(~0u, all.mean, 1), __shfl_up_sync(~0u, all.m2, 1)};
    double n_before = __shfl_up_sync(~0u, n, 1);
    if (lane == 0) before = Moments{0, 0}, n_before = 0;
    if (lane == WARP - 1 && mean_out) {
        Moments end = merge(n_in, in, n, all);
        mean_out[pair] = end.mean, m2_out[pair] = end.m2;
    }
    before = merge(n_in, in, n_before, before);
    n_before += n_in;
    for (int i = from; i < to; i++) {
        Moments own = mine[(size_t)i * G];
        double m = (double)g * min_int(NORM_BLOCK, L - i * NORM_BLOCK);
        mine[(size_t)i * G] = before;
        before = merge(n_before, before, m, own);
        n_before += m;
    }
}

// The groups that such a block's columns touch.
typedef struct {
    int first, count;
} Groups;
template <int W> static __device__ Groups groups_here(int D, int G) {
    int across = min_int(ACROSS, ceil_div(D, W)), g = D / G, from = blockIdx.y * across * W;
    int to = min_int(from + across * W, D);
    return Groups{from / g, (to - 1) / g - from / g + 1};
}
static int most_groups(int W, int D, int G) { return min_int(ACROSS * W / (D / G) + 2, G); }

typedef struct {
    Mean mean;
    float rstd;
} Stats; // of a token's group

template <int W>
static __global__ void timestep_norm_apply_kernel(floatX *out, Mean *mean, float *rstd, const Prefix *prefix,
                                                  const Moments *blocks, const floatX *inp, const float *weight,
                                                  const float *bias, const int64_t *count, int L, int D, int G,
                                                  double eps) {
    extern __shared__ Stats stats[]; // (NORM_BLOCK, groups)
    int g = D / G, num_blocks = ceil_div(L, NORM_BLOCK), b = blockIdx.x / num_blocks;
    int t0 = blockIdx.x % num_blocks * NORM_BLOCK, T = min_int(NORM_BLOCK, L - t0);
    size_t first_row = (size_t)b * L + t0;
    Groups groups = groups_here<W>(D, G);
    double before = (double)g * ((count ? (double)count[b] : 0) + t0);
    for (int i = threadIdx.x; i < T * groups.count; i += blockDim.x) {
        int t = i / groups.count, j = groups.first + i % groups.count;
        size_t at = (first_row + t) * G + j;
        double anchor = to_float(inp[first_row * D + (size_t)j * g]), n = (double)g * (t + 1);
        Moments own = {anchor + prefix[at].mean, (double)prefix[at].deviation * prefix[at].deviation * n};
        Moments m = merge(before, blocks[(size_t)blockIdx.x * G + j], n, own);
        stats[i] = Stats{split_mean(m.mean), (float)(1 / sqrt(m.m2 / (before + n) + eps))};
        if (i % groups.count > 0 || groups.first * g == (int)blockIdx.y * ACROSS * W) // not the neighbour's group
            mean[at] = stats[i].mean, rstd[at] = stats[i].rstd;
    }
    __syncthreads();
    Place p = place<W>(D);
    if (p.row < 0) return;
    float w[W], bs[W], x[W];
#pragma unroll
    for (int i = 0; i < W; i++) w[i] = weight[p.c + i] + 1, bs[i] = bias[p.c + i];
    for (int t = p.row; t < T; t += p.down) {
        Stats s = stats[t * groups.count + p.c / g - groups.first];
        size_t at = (first_row + t) * D + p.c;
        load<W>(x, inp + at);
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = centered(x[i], s.mean) * s.rstd * w[i] + bs[i];
        store<W>(out + at, x);
    }
}

// prefix (R,G) and blocks (B, L/NORM_BLOCK, G) are scratch. out NULL: only the outgoing state.
static void timestep_norm_forward(floatX *out, Mean *mean, float *rstd, double *mean_out, double *m2_out, const floatX *inp,
                                  const float *weight, const float *bias, const double *prev_mean, const double *prev_m2,
                                  const int64_t *count, Prefix *prefix, Moments *blocks, int B, int L, int D, int G,
                                  double eps) {
    int num_blocks = B * ceil_div(L, NORM_BLOCK), W = norm_width(D, G);
    const int warps = 8;
    auto moments = NORM_KERNEL(timestep_norm_moments_kernel, W);
    moments<<<dim3(num_blocks, ceil_div(G, warps)), dim3(WARP, warps)>>>(prefix, blocks, inp, L, D, G);
    cudaCheck(cudaGetLastError());
    timestep_norm_scan_kernel<<<ceil_div(B * G, warps), dim3(WARP, warps)>>>(blocks, mean_out, m2_out, prev_mean, prev_m2,
                                                                             count, B, L, D, G);
    cudaCheck(cudaGetLastError());
    if (out == NULL) return;
    size_t shared = (size_t)NORM_BLOCK * most_groups(W, D, G) * sizeof(Stats);
    auto apply = NORM_KERNEL(timestep_norm_apply_kernel, W);
    allow_shared(apply, shared);
    apply<<<grid_of(W, num_blocks, D), THREADS, shared>>>(out, mean, rstd, prefix, blocks, inp, weight, bias, count, L,
                                                          D, G, eps);
    cudaCheck(cudaGetLastError());
}

// Backward: dx_s = rstd_s w dy_s + U_s + 2 (x_s V_s - W_s) with three sums over t >= s, see megalodon.c. The same three
// kernels, from the last token to the first, and simple sums instead of merges. In the last one
// x_s V_s - W_s = (x_s - mean_s) V_s - (W_s - mean_s V_s), so that a large mean costs no digits in float. It also sums
// dweight and dbias, and adds the residuals' gradients (NULL: none); dinp may be one of them.
// Reads 2 R*D, then 2 to 4 R*D; writes R*D.

typedef struct {
    double U, V, W;
} Sums;

template <int W>
static __global__ void timestep_norm_sums_kernel(Sums *suffix, Sums *blocks, const floatX *dout, const floatX *inp,
                                                 const float *weight, const Mean *mean, const float *rstd,
                                                 const int64_t *count, int L, int D, int G) {
    int g = D / G, num_blocks = ceil_div(L, NORM_BLOCK), b = blockIdx.x / num_blocks, lane = threadIdx.x;
    int j = blockIdx.y * blockDim.y + threadIdx.y, t0 = blockIdx.x % num_blocks * NORM_BLOCK;
    int T = min_int(NORM_BLOCK, L - t0);
    size_t row = (size_t)b * L + t0 + lane;
    Sums sum = {0, 0, 0};
    extern __shared__ float4 norm_scales[]; // (groups of this block, g): weight + 1, which all lanes need
    float *scales = (float *)norm_scales;
    for (int i = threadIdx.y * WARP + lane; i < (int)blockDim.y * g; i += WARP * blockDim.y) {
        int c = blockIdx.y * blockDim.y * g + i;
        scales[i] = c < D ? weight[c] + 1 : 0;
    }
    __syncthreads();
    if (j >= G) return;
    if (lane < T) {
        const floatX *x = inp + row * D + (size_t)j * g, *dy = dout + row * D + (size_t)j * g;
        Mean m = mean[row * G + j];
        float r = rstd[row * G + j], s = 0, d = 0; // d: of what is normalised, so that it does not overflow
        for (int c = 0; c < g; c += W) {
            float v[W], dv[W];
            load<W>(v, x + c), load<W>(dv, dy + c);
#pragma unroll
            for (int i = 0; i < W; i++) {
                float wdy = scales[threadIdx.y * g + c + i] * dv[i];
                s += wdy;
                d += wdy * (centered(v[i], m) * r);
            }
        }
        double n = (double)g * ((count ? (double)count[b] : 0) + t0 + lane + 1), dvar = -0.5 * r * r * d;
        sum = Sums{-(double)r * s / n, dvar / n, dvar / n * whole_mean(m)};
    }
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        double U = __shfl_down_sync(~0u, sum.U, step), V = __shfl_down_sync(~0u, sum.V, step);
        double later = __shfl_down_sync(~0u, sum.W, step);
        if (lane + step < WARP) sum.U += U, sum.V += V, sum.W += later;
    }
    if (lane < T) suffix[row * G + j] = sum;
    if (lane == 0) blocks[(size_t)blockIdx.x * G + j] = sum;
}

// Replaces blocks' own sums by those of all blocks after them. total (B,G), or NULL, gets those of all.
static __global__ void timestep_norm_sums_scan_kernel(Sums *blocks, Sums *total, int B, int L, int G) {
    int pair = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x, num_blocks = ceil_div(L, NORM_BLOCK);
    if (pair >= B * G) return;
    int b = pair / G, j = pair % G, share = ceil_div(num_blocks, WARP), from = lane * share;
    int to = min_int(from + share, num_blocks);
    Sums *mine = blocks + (size_t)b * num_blocks * G + j, own = {0, 0, 0}, sum;
    for (int i = from; i < to; i++) {
        Sums s = mine[(size_t)i * G];
        own.U += s.U, own.V += s.V, own.W += s.W;
    }
    sum = own;
    for (int step = 1; step < WARP; step *= 2) {
        double U = __shfl_down_sync(~0u, sum.U, step), V = __shfl_down_sync(~0u, sum.V, step);
        double later = __shfl_down_sync(~0u, sum.W, step);
        if (lane + step < WARP) sum.U += U, sum.V += V, sum.W += later;
    }
    if (lane == 0 && total) total[pair] = sum;
    sum.U -= own.U, sum.V -= own.V, sum.W -= own.W; // of the lanes behind
    for (int i = to - 1; i >= from; i--) {
        Sums s = mine[(size_t)i * G];
        mine[(size_t)i * G] = sum;
        sum.U += s.U, sum.V += s.V, sum.W += s.W;
    }
}

// What a token's group is computed with: dx = rstd w dy + shift + slope n, n = (x - mean) rstd.
struct alignas(sizeof(Mean) == sizeof(float) ? 16 : 8) NormGrad { // 16 bytes are read at once
    Mean mean;
    float rstd, shift, slope;
};

// parts (blocks*down, 2, D): dweight, dbias.
template <int W>
static __global__ void
timestep_norm_backward_kernel(floatX *dinp, float *parts, const floatX *dout, const floatX *residual, const floatX *residual2,
                              const floatX *inp, const float *weight, const Mean *mean, const float *rstd,
                              const Sums *suffix, const Sums *blocks, const Sums *later, int B, int L, int D, int G) {
    extern __shared__ NormGrad factors[]; // (NORM_BLOCK, groups)
    int g = D / G, num_blocks = ceil_div(L, NORM_BLOCK);
    Groups groups = groups_here<W>(D, G);
    Place p = place<W>(D);
    float w[W], dw[W], db[W], x[W], dy[W], more[W];
#pragma unroll
    for (int i = 0; i < W; i++) w[i] = p.row < 0 ? 0 : weight[p.c + i] + 1, dw[i] = db[i] = 0;
    for (int block = blockIdx.x; block < B * num_blocks; block += gridDim.x) {
        int t0 = block % num_blocks * NORM_BLOCK, T = min_int(NORM_BLOCK, L - t0);
        size_t first_row = (size_t)(block / num_blocks) * L + t0;
        __syncthreads(); // the last block's factors have been read
        for (int i = threadIdx.x; i < T * groups.count; i += blockDim.x) {
            int j = groups.first + i % groups.count;
            size_t at = (first_row + i / groups.count) * G + j;
            Sums s = suffix[at], after = blocks[(size_t)block * G + j];
            if (later) {
                Sums more = later[(size_t)(block / num_blocks) * G + j];
                after.U += more.U, after.V += more.V, after.W += more.W;
            }
            Mean m = mean[at];
            float r = rstd[at];
            double V = s.V + after.V, shift = s.U + after.U - 2 * (s.W + after.W - whole_mean(m) * V);
            factors[i] = NormGrad{m, r, (float)shift, (float)(2 * V / r)};
        }
        __syncthreads();
        for (int t = p.row; t >= 0 && t < T; t += p.down) {
            NormGrad f = factors[t * groups.count + p.c / g - groups.first];
            size_t at = (first_row + t) * D + p.c;
            load<W>(x, inp + at), load<W>(dy, dout + at);
#pragma unroll
            for (int i = 0; i < W; i++) {
                float n = centered(x[i], f.mean) * f.rstd;
                dw[i] += dy[i] * n, db[i] += dy[i];
                x[i] = f.rstd * w[i] * dy[i] + f.shift + n * f.slope;
            }
            if (residual) {
                load<W>(more, residual + at);
#pragma unroll
                for (int i = 0; i < W; i++) x[i] += more[i];
            }
            if (residual2) {
                load<W>(more, residual2 + at);
#pragma unroll
                for (int i = 0; i < W; i++) x[i] += more[i];
            }
            store<W>(dinp + at, x);
        }
    }
    float *part = parts + ((size_t)blockIdx.x * p.down + p.row) * 2 * D + p.c;
    for (int i = 0; i < W && p.row >= 0; i++) part[i] = dw[i], part[D + i] = db[i];
}

// The first two kernels. total (B,G), or NULL: the sums over all these tokens.
static void timestep_norm_sums(Sums *total, Sums *suffix, Sums *blocks, const floatX *dout, const floatX *inp,
                               const float *weight, const Mean *mean, const float *rstd, const int64_t *count, int B,
                               int L, int D, int G) {
    int num_blocks = B * ceil_div(L, NORM_BLOCK);
    const int warps = min_int(8, G); // that share the scales of so many groups
    size_t scales = (size_t)warps * (D / G) * sizeof(float);
    auto sums = NORM_KERNEL(timestep_norm_sums_kernel, norm_width(D, G));
    allow_shared(sums, scales);
    sums<<<dim3(num_blocks, ceil_div(G, warps)), dim3(WARP, warps), scales>>>(suffix, blocks, dout, inp, weight, mean,
                                                                              rstd, count, L, D, G);
    cudaCheck(cudaGetLastError());
    timestep_norm_sums_scan_kernel<<<ceil_div(B * G, warps), dim3(WARP, warps)>>>(blocks, total, B, L, G);
    cudaCheck(cudaGetLastError());
}

// The third. later (B,G), or NULL: sums over tokens behind these.
static void timestep_norm_backward(floatX *dinp, float *dweight, float *dbias, const floatX *dout, const floatX *residual,
                                   const floatX *residual2, const floatX *inp, const float *weight, const Mean *mean,
                                   const float *rstd, const Sums *suffix, const Sums *blocks, const Sums *later,
                                   float *parts, int B, int L, int D, int G) {
    int num_blocks = B * ceil_div(L, NORM_BLOCK), W = norm_width(D, G);
    int down = THREADS / min_int(ACROSS, ceil_div(D, W)), P = min_int(num_blocks, MOST_PARTS / down);
    size_t shared = (size_t)NORM_BLOCK * most_groups(W, D, G) * sizeof(NormGrad);
    auto kernel = NORM_KERNEL(timestep_norm_backward_kernel, W);
    allow_shared(kernel, shared);
    kernel<<<grid_of(W, P, D), THREADS, shared>>>(dinp, parts, dout, residual, residual2, inp, weight, mean, rstd,
                                                  suffix, blocks, later, B, L, D, G);
    cudaCheck(cudaGetLastError());
    sum_parts(dweight, dbias, 1, parts, P * down, 2 * (size_t)D, D, D);
}

// ChunkParallel of one sequence: what this one found alone is joined with what the others did, see megalodon.c. A thread has a
// sequence's group.
// all (pieces,2,B,G): mean, M2 of each piece. mean, m2 (B,G): those before the whole sequence, replaced by those before this
// piece; mean_end, m2_end, or NULL, get those after the last. count (B), or NULL: tokens before the whole sequence.
static __global__ void timestep_norm_combine_kernel(double *mean, double *m2, double *mean_end, double *m2_end,
                                                 const double *all, const int64_t *count, const int64_t *lengths,
                                                 int piece, int pieces, int B, int D, int G) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= B * G) return;
    double n = count ? (double)(D / G) * (double)count[i / G] : 0;
    Moments sum = {mean[i], m2[i]};
    for (int k = 0; k < pieces; k++) {
        if (k == piece) mean[i] = sum.mean, m2[i] = sum.m2;
        double there = (double)(D / G) * (double)lengths[k];
        const double *alone = all + (size_t)k * 2 * B * G + i;
        sum = merge(n, sum, there, Moments{alone[0], alone[B * G]});
        n += there;
    }
    if (mean_end) mean_end[i] = sum.mean, m2_end[i] = sum.m2;
}

// later (B,G): the sums of all pieces behind this one.
static __global__ void timestep_norm_combine_backward_kernel(Sums *later, const Sums *all, int piece, int pieces,
                                                          int rows) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    Sums sum = {0, 0, 0};
    if (i >= rows) return;
    for (int k = piece + 1; k < pieces; k++) {
        Sums s = all[(size_t)k * rows + i];
        sum.U += s.U, sum.V += s.V, sum.W += s.W;
    }
    later[i] = sum;
}

// ----------------------------------------------------------------------------
// CEMA: h_t = q h_(t-1) + p x_t, y_t = Re sum_n (gamma_n/sqrt(N)) h_t,n + omega x_t, for N complex h per channel.
// Coefficients (N,D) each: those of megalodon.c, and t = q^CEMA_BLOCK, with which a state passes over a block of tokens.
// A thread has one channel's mode.

typedef struct {
    float *p, *q_re, *q_im, *g_re, *g_im; // g is gamma/sqrt(N)
    float *t_re, *t_im;                   // none in a gradient
} Coeffs;

static __global__ void cema_coeffs_forward_kernel(Coeffs c, const float *alpha, const float *delta, const float *theta,
                                                 const float *gamma, int D, int N) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= D * N) return;
    int n = i / D, d = i % D, in = d * N + n;
    double a = 1 / (1 + exp(-(double)alpha[in])), b = 1 / (1 + exp(-(double)delta[in]));
    double phi = 2 * PI * (n + 1) / N / (1 + exp(-(double)theta[d])), size = 1 - a * b;
    double over = pow(size, (double)CEMA_BLOCK);
    c.p[i] = (float)a;
    c.q_re[i] = (float)(size * cos(phi)), c.q_im[i] = (float)(size * sin(phi));
    c.g_re[i] = (float)(gamma[2 * in] / sqrt((double)N)), c.g_im[i] = (float)(gamma[2 * in + 1] / sqrt((double)N));
    c.t_re[i] = (float)(over * cos(CEMA_BLOCK * phi)), c.t_im[i] = (float)(over * sin(CEMA_BLOCK * phi));
}

static void cema_coeffs_forward(Coeffs *c, const float *alpha, const float *delta, const float *theta, const float *gamma,
                               int D, int N) {
    cema_coeffs_forward_kernel<<<blocks_for((size_t)D * N, THREADS), THREADS>>>(*c, alpha, delta, theta, gamma, D, N);
    cudaCheck(cudaGetLastError());
}

// A block has 32 channels, threadIdx.y their modes in turn.
static __global__ void cema_coeffs_backward_kernel(float *dalpha, float *ddelta, float *dtheta, float *dgamma, Coeffs dc,
                                                  const float *alpha, const float *delta, const float *theta, int D,
                                                  int N) {
    __shared__ double turns[8][WARP];
    int d = blockIdx.x * WARP + threadIdx.x;
    double turn = d < D ? 1 / (1 + exp(-(double)theta[d])) : 0, dturn = 0;
    for (int n = threadIdx.y; n < N && d < D; n += blockDim.y) {
        size_t in = (size_t)d * N + n, out = (size_t)n * D + d;
        double a = 1 / (1 + exp(-(double)alpha[in])), b = 1 / (1 + exp(-(double)delta[in]));
        double phi = 2 * PI * (n + 1) / N * turn, re = cos(phi), im = sin(phi);
        double dabs = dc.q_re[out] * re + dc.q_im[out] * im;
        double dphi = (1 - a * b) * (dc.q_im[out] * re - dc.q_re[out] * im);
        dalpha[in] += (float)((dc.p[out] - b * dabs) * a * (1 - a));
        ddelta[in] += (float)(-a * dabs * b * (1 - b));
        dturn += dphi * 2 * PI * (n + 1) / N;
        dgamma[2 * in] += (float)(dc.g_re[out] / sqrt((double)N));
        dgamma[2 * in + 1] += (float)(dc.g_im[out] / sqrt((double)N));
    }
    turns[threadIdx.y][threadIdx.x] = dturn;
    __syncthreads();
    if (threadIdx.y > 0 || d >= D) return;
    dturn = 0;
    for (int i = 0; i < (int)blockDim.y; i++) dturn += turns[i][threadIdx.x];
    dtheta[d] += (float)(dturn * turn * (1 - turn));
}

static void cema_coeffs_backward(float *dalpha, float *ddelta, float *dtheta, float *dgamma, const Coeffs *dc,
                                const float *alpha, const float *delta, const float *theta, int D, int N) {
    cema_coeffs_backward_kernel<<<ceil_div(D, WARP), dim3(WARP, 8)>>>(dalpha, ddelta, dtheta, dgamma, *dc, alpha, delta,
                                                                     theta, D, N);
    cudaCheck(cudaGetLastError());
}

// Within a block of T = CEMA_BLOCK tokens, with h0 the state before it, everything is a product of matrices that are the
// same for all blocks of a channel:
//     y_t = sum_(s<=t) k_(t-s) x_s + Re sum_n S_t h0,    k_j = Re sum_n g p q^j, omega added to k_0,    S_t = g q^(t+1)
//     h_end = q^T h0 + sum_s P_s x_s,                    P_s = p q^(T-1-s)
// So blocks are the columns of a matrix, and tensor cores multiply. A warp has a channel and makes its matrices from q
// in registers. Three kernels:
// 1. ends: P x, every block's end state from zero. Reads R*D, writes 2*N*R*D/T floats.
// 2. scan: from block to block, h = q^T h + end; a thread has a mode of a channel of a sequence. The state before every
//    block takes the place of its end state, and stays for the backward pass. Reads and writes 2*N*R*D/T floats.
// 3. tokens: y. Reads and writes R*D, reads 2*N*R*D/T floats.
//
// Backward, G_t = conj(g) dy_t + conj(q) G_(t+1) and dx_t = omega dy_t + sum_n p Re G_t are the same system run from the
// last token to the first, for the conjugates, with g q and p in each other's place. So are the kernels. With f, the
// conjugate of the gradient by h behind a block, and polynomials, sums over all blocks,
//     K(z) = sum_(t>=s) dy_t x_s z^(t-s)    A(z) = sum_t dy_t h0 z^t    E(z) = sum_s f x_s z^(T-1-s)
// the coefficients' gradients are those of Re (g p K(q) + g q A(q) + p E(q) + q^T f h0):
// 4. sums: the polynomials' coefficients, products with blocks as inner index, then values and slopes at q. Reads 2 R*D
//    and 4*N*R*D/T floats.
//
// A tensor core multiplies bfloat16 and adds up in float. A float is a sum of bfloat16: two have 16 bits, three all 24.
// Of products of parts the largest are computed. In tiles of 16 x 8 for C, 16 x 16 for A, 16 x 8 for B lane 4 row + pair
// has of C (row, 2 pair), (row, 2 pair + 1), the same of row + 8; a word holds two neighbours of a row of A or of a
// column of B: (row, 2 pair), of row + 8, then both of 8 further on; (2 pair, column `row`), then 8 further on. Loops of
// a constant length are unrolled, so that arrays are registers.

enum {
    ACT_PARTS = sizeof(floatX) == 4 ? 3 : 1, // of an floatX
    OUT_PARTS = sizeof(floatX) == 4 ? 3 : 2, // of numbers that end in an floatX
    SUM_PARTS = 3                         // of numbers that end in a float
};

typedef Vec<2> Pair;

// Words of x and y's parts.
template <int P> static __device__ void split(uint32_t words[P], float x, float y) {
    for (int p = 0; p < P; p++) {
        __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
        memcpy(&words[p], &two, sizeof two);
        x -= __uint_as_float(words[p] << 16), y -= __uint_as_float(words[p] & 0xffff0000);
    }
}

// The same of a pair.
static __device__ void split(uint32_t words[ACT_PARTS], Pair two) {
    if (ACT_PARTS > 1) return split<ACT_PARTS>(words, to_float(two.v[0]), to_float(two.v[1]));
    memcpy(words, &two, sizeof *words);
}

// C += A B
template <int P, int Q> static __device__ void multiply(float c[4], const uint32_t a[4][P], const uint32_t b[2][Q]) {
    for (int i = 0; i < P; i++) {
        for (int j = 0; j < Q && i + j < (P > Q ? P : Q); j++) {
            asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0][i]), "r"(a[1][i]), "r"(a[2][i]), "r"(a[3][i]), "r"(b[0][j]), "r"(b[1][j]));
        }
    }
}

static __device__ float2 times(float2 a, float2 b) { return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x); }
static __device__ float2 times(float a, float2 b) { return make_float2(a * b.x, a * b.y); }
static __device__ float2 plus(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
static __device__ float2 plus_times(float2 sum, float2 a, float2 b) { // a b added, by fused operations
    return make_float2(sum.x + a.x * b.x - a.y * b.y, sum.y + a.x * b.y + a.y * b.x);
}

// q^n, in double: n may be large
static __device__ float2 power(float2 base, int64_t n) {
    double re = 1, im = 0, q_re = base.x, q_im = base.y;
    for (; n > 0; n /= 2) {
        double old = re, square = q_re * q_re - q_im * q_im;
        if (n % 2 == 1) re = old * q_re - im * q_im, im = old * q_im + im * q_re;
        q_im = 2 * q_re * q_im, q_re = square;
    }
    return make_float2((float)re, (float)im);
}
// q^n for n below 8
static __device__ float2 low_power(float2 q, int n) {
    float2 result = make_float2(1, 0);
    for (int bit = 1; bit < 8; bit *= 2, q = times(q, q)) result = n & bit ? times(result, q) : result;
    return result;
}
static __device__ float2 power8(float2 q) {
    float2 q2 = times(q, q), q4 = times(q2, q2);
    return times(q4, q4);
}

typedef struct {
    float p;
    float2 q, g;
} CemaMode;
static __device__ CemaMode cema_mode(const Coeffs &c, int n, int d, int D, int N) { // zeros behind the last
    size_t i = (size_t)n * D + d;
    if (n >= N) return CemaMode{0, make_float2(0, 0), make_float2(0, 0)};
    return CemaMode{c.p[i], make_float2(c.q_re[i], c.q_im[i]), make_float2(c.g_re[i], c.g_im[i])};
}

// Tiles in shared memory, (CEMA_CHANNELS, CEMA_TILE): a channel's blocks one behind the other, two numbers at a time.
// The first number of a block is that of its first token, its last one, or where it would end if it were whole.
enum { FROM_FIRST, FROM_LAST, FROM_END };

static __device__ const uint32_t cema_nothing[4] = {0, 0, 0, 0}; // what is read where there is no token

// Copies a thread block's tokens into its tiles, or with `write` back from them. W channels of two tokens at a time;
// COUNT threads. Ends before the tiles are complete.
template <int W, int COUNT, int CHANNELS = CEMA_CHANNELS>
static __device__ void cema_copy(floatX *x, Pair *tiles, bool write, int order, int B, int L, int D) {
    enum { PIECES = CHANNELS / W, PAIRS = CEMA_BLOCK / 2, AT_ONCE = 4 };
    static_assert(CEMA_COLUMNS * PAIRS * PIECES % (AT_ONCE * COUNT) == 0, "all threads have work in every round");
    __shared__ int first[CEMA_COLUMNS], tokens[CEMA_COLUMNS]; // rows
    const unsigned thread = threadIdx.y * WARP + threadIdx.x;
    if (thread < CEMA_COLUMNS) {
        int blocks = ceil_div(L, CEMA_BLOCK), at = blockIdx.y * CEMA_COLUMNS + thread, t0 = at % blocks * CEMA_BLOCK;
        first[thread] = at / blocks * L + t0, tokens[thread] = at < B * blocks ? min_int(CEMA_BLOCK, L - t0) : 0;
    }
    __syncthreads();
    for (unsigned i0 = thread; i0 < CEMA_COLUMNS * PAIRS * PIECES; i0 += AT_ONCE * COUNT) {
        Vec<W> two[AT_ONCE][2];
        Pair *tile[AT_ONCE];
        for (int k = 0; k < AT_ONCE; k++) {
            unsigned i = i0 + k * COUNT, c = i % PIECES * W, pair = i / PIECES % PAIRS, column = i / PIECES / PAIRS;
            int d = blockIdx.x * CHANNELS + c, T = d < D ? tokens[column] : 0;
            tile[k] = tiles + c * CEMA_TILE + column * CEMA_PAIRS + pair;
            if (write) {
                for (int j = 0; j < W; j++) {
                    Pair numbers = tile[k][j * CEMA_TILE];
                    two[k][0].v[j] = numbers.v[0], two[k][1].v[j] = numbers.v[1];
                }
            }
            for (int u = 0; u < 2; u++) {
                int t = order == FROM_FIRST ? 2 * pair + u : (order == FROM_LAST ? T : CEMA_BLOCK) - 1 - 2 * pair - u;
                Vec<W> *at = (Vec<W> *)(x + (size_t)(unsigned)(first[column] + t) * (unsigned)D + d);
                if (!write) two[k][u] = *(t >= 0 && t < T ? at : (const Vec<W> *)cema_nothing);
                if (write && t >= 0 && t < T) *at = two[k][u];
            }
        }
        for (int k = 0; k < AT_ONCE && !write; k++) {
            for (int j = 0; j < W; j++) tile[k][j * CEMA_TILE] = Pair{{two[k][0].v[j], two[k][1].v[j]}};
        }
    }
}

// Of B = x, columns 8 j to 8 j + 7, rows 16 k to 16 k + 15.
static __device__ void cema_tokens_tile(uint32_t b[2][ACT_PARTS], const Pair *x, int j, int k) {
    const Pair *at = x + (8 * j + threadIdx.x / 4) * CEMA_PAIRS + 8 * k + threadIdx.x % 4;
    split(b[0], at[0]), split(b[1], at[4]);
}

// states (D, columns, N), a column being a block of tokens of a sequence. A thread block has CEMA_CHANNELS channels of
// CEMA_COLUMNS columns, here and below; modes are taken eight at a time: C has their real parts, then their imaginary ones.
template <int W>
static __global__ void __launch_bounds__(WARP *CEMA_WARPS, 2)
    cema_ends_kernel(float2 *states, const floatX *inp, Coeffs coeffs, int back, int B, int L, int D, int N) {
    extern __shared__ Pair cema_tiles[];
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4, columns = B * ceil_div(L, CEMA_BLOCK);
    cema_copy<W, WARP * CEMA_WARPS>((floatX *)inp, cema_tiles, false, back ? FROM_END : FROM_FIRST, B, L, D);
    __syncthreads();
    for (int i = 0; i < CEMA_CHANNELS / CEMA_WARPS; i++) {
        int c = threadIdx.y * (CEMA_CHANNELS / CEMA_WARPS) + i, d = blockIdx.x * CEMA_CHANNELS + c;
        if (d >= D) break;
        const Pair *x = cema_tiles + c * CEMA_TILE;
        for (int n0 = 0; n0 < N; n0 += 8) {
            int n = n0 + row;
            CemaMode m = cema_mode(coeffs, n, d, D, N);
            uint32_t P[CEMA_BLOCK / 16][4][SUM_PARTS];
            float2 q8 = power8(m.q), in = back ? times(m.g, m.q) : make_float2(m.p, 0);
            float2 second = times(in, low_power(m.q, 6 - 2 * pair)); // of two neighbours, from the block's end
            for (int k = CEMA_BLOCK / 8 - 1; k >= 0; k--) {
                float2 first = times(second, m.q);
                split<SUM_PARTS>(P[k / 2][k % 2 * 2], first.x, second.x);
                split<SUM_PARTS>(P[k / 2][k % 2 * 2 + 1], first.y, second.y);
                second = times(second, q8);
            }
            float ends[CEMA_COLUMNS / 8][4] = {};
            for (int k = 0; k < CEMA_BLOCK / 16; k++) {
                for (int j = 0; j < CEMA_COLUMNS / 8; j++) {
                    uint32_t b[2][ACT_PARTS];
                    cema_tokens_tile(b, x, j, k);
                    multiply<SUM_PARTS, ACT_PARTS>(ends[j], P[k], b);
                }
            }
            for (int j = 0; j < CEMA_COLUMNS / 4; j++) {
                int column = blockIdx.y * CEMA_COLUMNS + j / 2 * 8 + 2 * pair + j % 2;
                if (n < N && column < columns)
                    states[((size_t)d * columns + column) * N + n] =
                        make_float2(ends[j / 2][j % 2], ends[j / 2][2 + j % 2]);
            }
        }
    }
}

// From ends to states; start (B,2,N,D) or NULL: before the first block. back: the same from the last block, which has
// `tail` tokens, to the first, for conjugates.
static __global__ void cema_scan_kernel(float2 *states, const float *start, Coeffs coeffs, int back, int tail, int B,
                                        int blocks, int D, int N) {
    enum { AHEAD = 8 }; // blocks whose numbers are on their way
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = i % N, b = i / N % B, d = i / N / B;
    if (d >= (size_t)D) return;
    size_t mode = n * D + d, re = b * 2 * N * D + mode, im = re + (size_t)N * D;
    float2 q = make_float2(coeffs.t_re[mode], coeffs.t_im[mode]), h = make_float2(0, 0);
    if (start) h = make_float2(start[re], back ? -start[im] : start[im]);
    float2 *first = states + (d * B + b) * blocks * N + n;
    for (int k0 = 0; k0 < blocks; k0 += AHEAD) {
        float2 end[AHEAD];
        for (int k = 0; k < AHEAD; k++) {
            if (k0 + k >= blocks - 1) break; // behind the last block nothing comes
            end[k] = first[(size_t)(back ? blocks - 1 - k0 - k : k0 + k) * N];
        }
        for (int k = 0; k < AHEAD; k++) {
            if (k0 + k >= blocks) break;
            first[(size_t)(back ? blocks - 1 - k0 - k : k0 + k) * N] = h;
            if (k0 + k == blocks - 1) break;
            bool short_one = back && k0 + k == 0 && tail < CEMA_BLOCK; // not a whole block's power
            h = plus(times(short_one ? power(make_float2(coeffs.q_re[mode], coeffs.q_im[mode]), tail) : q, h), end[k]);
        }
    }
}

// words[m]: k of row - 2 pair + 8 m and of one less, zero where that is negative. So tile (i,j) of the matrix k_(t-s), i >= j,
// has the words [m], [m + 1], [m - 1], [m], m = 2 (i - j).
static __device__ void cema_kernel_words(uint32_t words[CEMA_BLOCK / 8][OUT_PARTS], const Coeffs &coeffs, float omega,
                                         int d, int D, int N) {
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4;
    float k[CEMA_BLOCK / 8] = {}; // k of row + 8 m, first of every fourth mode
#pragma unroll 4
    for (int n0 = 0; n0 < N; n0 += 4) {
        CemaMode m = cema_mode(coeffs, n0 + pair, d, D, N);
        float2 q8 = power8(m.q), v = times(times(m.p, m.g), low_power(m.q, row));
        for (int i = 0; i < CEMA_BLOCK / 8; i++, v = times(v, q8)) k[i] += v.x;
    }
    float last[2] = {0, 0}; // of m - 1
    for (int i = 0; i < CEMA_BLOCK / 8; i++) {
        float lag[2];
        k[i] += __shfl_xor_sync(~0u, k[i], 1);
        k[i] += __shfl_xor_sync(~0u, k[i], 2);
        if (i == 0 && row == 0) k[i] += omega;
        for (int u = 0; u < 2; u++) {
            int at = row - 2 * pair - u;
            float here = __shfl_sync(~0u, k[i], (at & 7) * 4);
            lag[u] = at < 0 ? last[u] : here, last[u] = here;
        }
        split<OUT_PARTS>(words[i], lag[0], lag[1]);
    }
}

// Two products, k x and S h0, added up in y, then written over x. Modes as for ends.
template <int W>
static __global__ void __launch_bounds__(WARP *CEMA_WARPS, 2)
    cema_tokens_kernel(floatX *out, const float2 *states, const floatX *inp, Coeffs coeffs, const float *omega, int back, int B,
                       int L, int D, int N) {
    extern __shared__ Pair cema_tiles[];
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4, columns = B * ceil_div(L, CEMA_BLOCK);
    cema_copy<W, WARP * CEMA_WARPS>((floatX *)inp, cema_tiles, false, back ? FROM_LAST : FROM_FIRST, B, L, D);
    __syncthreads();
    for (int i = 0; i < CEMA_CHANNELS / CEMA_WARPS; i++) {
        int c = threadIdx.y * (CEMA_CHANNELS / CEMA_WARPS) + i, d = blockIdx.x * CEMA_CHANNELS + c;
        if (d >= D) break;
        Pair *x = cema_tiles + c * CEMA_TILE;
        float y[CEMA_COLUMNS / 8][CEMA_BLOCK / 16][4] = {};
        uint32_t k[CEMA_BLOCK / 8][OUT_PARTS];
        cema_kernel_words(k, coeffs, omega[d], d, D, N);
        for (int difference = 0; difference < CEMA_BLOCK / 16; difference++) { // of tiles' rows and columns
            uint32_t a[4][OUT_PARTS];
            for (int p = 0; p < OUT_PARTS; p++) {
                a[0][p] = a[3][p] = k[2 * difference][p], a[1][p] = k[2 * difference + 1][p];
                a[2][p] = difference > 0 ? k[2 * difference - 1][p] : 0;
            }
            for (int j = 0; j < CEMA_COLUMNS / 8; j++) {
                for (int i = difference; i < CEMA_BLOCK / 16; i++) {
                    uint32_t b[2][ACT_PARTS];
                    cema_tokens_tile(b, x, j, i - difference);
                    multiply<OUT_PARTS, ACT_PARTS>(y[j][i], a, b);
                }
            }
        }
        for (int n0 = 0; n0 < N; n0 += 8) { // a word of S is a mode's: real part, minus the imaginary one
            int n = n0 + pair;
            float2 h[CEMA_COLUMNS / 8][2]; // asked for early
            for (int j = 0; j < CEMA_COLUMNS / 4; j++) {
                int column = blockIdx.y * CEMA_COLUMNS + j / 2 * 8 + row, at = n + j % 2 * 4;
                h[j / 2][j % 2] = make_float2(0, 0);
                if (column < columns && at < N) h[j / 2][j % 2] = states[((size_t)d * columns + column) * N + at];
            }
            uint32_t S[CEMA_BLOCK / 16][4][OUT_PARTS];
            for (int u = 0; u < 2; u++) {
                CemaMode m = cema_mode(coeffs, n + 4 * u, d, D, N);
                float2 q8 = power8(m.q), from = back ? make_float2(m.p, 0) : times(m.g, m.q);
                float2 v = times(from, low_power(m.q, row));
                for (int i = 0; i < CEMA_BLOCK / 8; i++, v = times(v, q8))
                    split<OUT_PARTS>(S[i / 2][i % 2 + 2 * u], v.x, -v.y);
            }
            for (int j = 0; j < CEMA_COLUMNS / 8; j++) {
                uint32_t b[2][OUT_PARTS];
                split<OUT_PARTS>(b[0], h[j][0].x, h[j][0].y), split<OUT_PARTS>(b[1], h[j][1].x, h[j][1].y);
                for (int i = 0; i < CEMA_BLOCK / 16; i++) multiply<OUT_PARTS, OUT_PARTS>(y[j][i], S[i], b);
            }
        }
        __syncwarp(); // all have read x, whose place y takes
        for (int j = 0; j < CEMA_COLUMNS / 8; j++) {
            for (int i = 0; i < CEMA_BLOCK / 16; i++) {
                for (int u = 0; u < 4; u++) {
                    int t = 16 * i + row + u / 2 * 8, column = 8 * j + 2 * pair + u % 2;
                    set(&x[column * CEMA_PAIRS + t / 2].v[t % 2], y[j][i][u]);
                }
            }
        }
    }
    __syncthreads();
    cema_copy<W, WARP * CEMA_WARPS>(out, cema_tiles, true, back ? FROM_LAST : FROM_FIRST, B, L, D);
}

// The state after the last token. A thread has a mode of a channel of a sequence.
static __global__ void cema_end_kernel(float *h_out, const float2 *states, const floatX *inp, Coeffs coeffs, int B, int L,
                                       int D, int N) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, modes = (size_t)N * D, b = i / modes, mode = i % modes;
    int blocks = ceil_div(L, CEMA_BLOCK);
    if (b >= (size_t)B) return;
    float2 h = states[((mode % D * B + b) * blocks + blocks - 1) * N + mode / D];
    float2 q = make_float2(coeffs.q_re[mode], coeffs.q_im[mode]);
    for (int t = (blocks - 1) * CEMA_BLOCK; t < L; t++) {
        h = times(q, h);
        h.x += coeffs.p[mode] * to_float(inp[(b * L + t) * D + mode % D]);
    }
    h_out[b * 2 * modes + mode] = h.x, h_out[(b * 2 + 1) * modes + mode] = h.y;
}

static dim3 cema_grid(int B, int L, int D, int channels = CEMA_CHANNELS) {
    return dim3(ceil_div(D, channels), ceil_div(B * ceil_div(L, CEMA_BLOCK), CEMA_COLUMNS));
}
static const size_t CEMA_TILES = CEMA_CHANNELS * CEMA_TILE * sizeof(Pair); // bytes

// States before each block, or behind it. start (B,2,N,D), or NULL: before the first, or behind the last.
static void cema_states(float2 *states, const float *start, const floatX *x, const Coeffs *coeffs, int back, int B, int L,
                        int D, int N) {
    int blocks = ceil_div(L, CEMA_BLOCK);
    if (blocks > 1) {
        auto kernel = D % VEC == 0 ? cema_ends_kernel<VEC> : cema_ends_kernel<1>;
        allow_shared(kernel, CEMA_TILES);
        kernel<<<cema_grid(B, L, D), dim3(WARP, CEMA_WARPS), CEMA_TILES>>>(states, x, *coeffs, back, B, L, D, N);
        cudaCheck(cudaGetLastError());
    }
    cema_scan_kernel<<<blocks_for((size_t)B * N * D, THREADS), THREADS>>>(
        states, start, *coeffs, back, L - (blocks - 1) * CEMA_BLOCK, B, blocks, D, N);
    cudaCheck(cudaGetLastError());
}

static void cema_tokens(floatX *out, const float2 *states, const floatX *x, const Coeffs *coeffs, const float *omega, int back,
                        int B, int L, int D, int N) {
    auto kernel = D % VEC == 0 ? cema_tokens_kernel<VEC> : cema_tokens_kernel<1>;
    allow_shared(kernel, CEMA_TILES);
    kernel<<<cema_grid(B, L, D), dim3(WARP, CEMA_WARPS), CEMA_TILES>>>(out, states, x, *coeffs, omega, back, B, L, D, N);
    cudaCheck(cudaGetLastError());
}

// h_blocks (D,B,blocks,N,2): h before each block. h_in, h_out (B,2,N,D), or NULL; they may be the same. out NULL: only
// the outgoing state.
static void cema_forward(floatX *out, float *h_blocks, float *h_out, const floatX *inp, const Coeffs *coeffs,
                         const float *omega, const float *h_in, int B, int L, int D, int N) {
    float2 *states = (float2 *)(void *)h_blocks;
    cema_states(states, h_in, inp, coeffs, 0, B, L, D, N);
    if (out) cema_tokens(out, states, inp, coeffs, omega, 0, B, L, D, N);
    if (h_out == NULL) return;
    cema_end_kernel<<<blocks_for((size_t)B * N * D, THREADS), THREADS>>>(h_out, states, inp, *coeffs, B, L, D, N);
    cudaCheck(cudaGetLastError());
}

// Of A = x with columns as inner index, columns 16 k to 16 k + 15: number t of each, or with `last` number last[.] - t.
static __device__ void cema_across(uint32_t near[ACT_PARTS], uint32_t far[ACT_PARTS], const Pair *x, int k, int t,
                                   const int last[4]) {
    for (int v = 0; v < 2; v++) {
        Pair two = {};
        for (int u = 0; u < 2; u++) {
            int at = last ? last[2 * v + u] - t : t, column = 16 * k + 8 * v + 2 * (threadIdx.x % 4) + u;
            if (at >= 0) two.v[u] = ((const floatX *)x)[column * 2 * CEMA_PAIRS + at];
        }
        split(v == 0 ? near : far, two);
    }
}

// What a lane adds to c(q) = sum_t c_t q^t, with c[m] = c_(row + 8 m), and to its slope: by Horner's rule value in z = q^8
// and slope by z, which are still to be multiplied by q^row.
typedef struct {
    float2 value, slope;
} Series;
static __device__ Series evaluate(const float2 c[CEMA_BLOCK / 8], float2 z) {
    Series s = {make_float2(0, 0), make_float2(0, 0)};
    for (int m = CEMA_BLOCK / 8 - 1; m >= 0; m--) {
        s.slope = plus_times(s.value, s.slope, z);
        s.value = plus_times(c[m], s.value, z);
    }
    return s;
}

// parts (gridDim.y, 5*N*D + D): p, q_re, q_im, g_re, g_im of the coefficients' gradients, then domega. A warp has a
// channel, a thread block CHANNELS. CUT: last blocks have fewer tokens, and something behind them.
template <int W, bool CUT, int CHANNELS>
static __global__ void __launch_bounds__(WARP *CHANNELS, 1)
    cema_sums_kernel(float *parts, const floatX *dout, const floatX *inp, const float2 *states, const float2 *futures,
                     Coeffs coeffs, int B, int L, int D, int N) {
    extern __shared__ Pair cema_tiles[];
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4, blocks = ceil_div(L, CEMA_BLOCK), columns = B * blocks;
    const int d = blockIdx.x * CHANNELS + threadIdx.y, tail = L - (blocks - 1) * CEMA_BLOCK;
    const Pair *x = cema_tiles + threadIdx.y * CEMA_TILE, *dy = x + CHANNELS * CEMA_TILE;
    float *part = parts + (size_t)blockIdx.y * (5 * N + 1) * D + d;
    cema_copy<W, WARP * CHANNELS, CHANNELS>((floatX *)inp, cema_tiles, false, FROM_FIRST, B, L, D);
    __syncthreads(); // cema_copy writes its table of rows anew
    cema_copy<W, WARP * CHANNELS, CHANNELS>((floatX *)dout, cema_tiles + CHANNELS * CEMA_TILE, false, FROM_FIRST, B, L, D);
    __syncthreads();
    if (d >= D) return;

    // K: the matrix dy x', tiles of 16 x 8, those with the same lags added up
    float tiles[CEMA_BLOCK / 8][4] = {};
    for (int k = 0; k < CEMA_COLUMNS / 16; k++) {
        uint32_t b[CEMA_BLOCK / 8][2][ACT_PARTS];
        for (int j = 0; j < CEMA_BLOCK / 8; j++) cema_across(b[j][0], b[j][1], x, k, 8 * j + row, NULL);
        for (int i = 0; i < CEMA_BLOCK / 16; i++) {
            uint32_t a[4][ACT_PARTS];
            cema_across(a[0], a[2], dy, k, 16 * i + row, NULL);
            cema_across(a[1], a[3], dy, k, 16 * i + row + 8, NULL);
            for (int j = 0; j <= 2 * i + 1; j++) multiply<ACT_PARTS, ACT_PARTS>(tiles[2 * i - j + 1], a, b[j]);
        }
    }
    float2 lags[CEMA_BLOCK / 8]; // row + 8 m, from where that is row - 2 pair - u
    for (int m = 0; m < CEMA_BLOCK / 8; m++) {
        float sum = 0;
        for (int u = 0; u < 2; u++) {
            float here = tiles[m][2 + u] + (m < CEMA_BLOCK / 8 - 1 ? tiles[m + 1][u] : 0), next = 0;
            if (m < CEMA_BLOCK / 8 - 1) next = tiles[m + 1][2 + u] + (m < CEMA_BLOCK / 8 - 2 ? tiles[m + 2][u] : 0);
            sum += __shfl_sync(~0u, row - 2 * pair - u < 0 ? next : here, ((row + 2 * pair + u) & 7) * 4 + pair);
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        lags[m] = make_float2(sum, 0);
    }
    if (threadIdx.x == 0) part[(size_t)5 * N * D] = lags[0].x;

    for (int n0 = 0; n0 < N; n0 += 8) {
        float A[2][CEMA_BLOCK / 16][4] = {}, E[2][CEMA_BLOCK / 16][4] = {}; // real, imaginary parts; C has (t, mode)
        float2 over = make_float2(0, 0), q = cema_mode(coeffs, n0 + row, d, D, N).q; // over: of q^T, slope included
        float2 whole = times(CEMA_BLOCK, times(low_power(q, 7), low_power(power8(q), 7))), cut = whole;
        if (CUT) cut = times(tail, power(q, tail - 1));
        for (int k = 0; k < CEMA_COLUMNS / 16; k++) {
            int last[4]; // a column's last token
            float2 h[4], f[4];
            for (int v = 0; v < 4; v++) {
                int column = blockIdx.y * CEMA_COLUMNS + 16 * k + v / 2 * 8 + 2 * pair + v % 2;
                size_t at = ((size_t)d * columns + column) * N + n0 + row;
                bool inside = column < columns && n0 + row < N, is_cut = CUT && (column + 1) % blocks == 0;
                last[v] = is_cut ? tail - 1 : CEMA_BLOCK - 1;
                h[v] = inside ? states[at] : make_float2(0, 0), f[v] = inside ? futures[at] : make_float2(0, 0);
                over = plus_times(over, is_cut ? cut : whole, times(h[v], f[v]));
            }
            uint32_t h_re[2][SUM_PARTS], h_im[2][SUM_PARTS], f_re[2][SUM_PARTS], f_im[2][SUM_PARTS];
            for (int v = 0; v < 2; v++) {
                split<SUM_PARTS>(h_re[v], h[2 * v].x, h[2 * v + 1].x);
                split<SUM_PARTS>(h_im[v], h[2 * v].y, h[2 * v + 1].y);
                split<SUM_PARTS>(f_re[v], f[2 * v].x, f[2 * v + 1].x);
                split<SUM_PARTS>(f_im[v], f[2 * v].y, f[2 * v + 1].y);
            }
            for (int i = 0; i < CEMA_BLOCK / 16; i++) {
                uint32_t a[4][ACT_PARTS];
                cema_across(a[0], a[2], dy, k, 16 * i + row, NULL);
                cema_across(a[1], a[3], dy, k, 16 * i + row + 8, NULL);
                multiply<ACT_PARTS, SUM_PARTS>(A[0][i], a, h_re), multiply<ACT_PARTS, SUM_PARTS>(A[1][i], a, h_im);
                cema_across(a[0], a[2], x, k, 16 * i + row, last);
                cema_across(a[1], a[3], x, k, 16 * i + row + 8, last);
                multiply<ACT_PARTS, SUM_PARTS>(E[0][i], a, f_re), multiply<ACT_PARTS, SUM_PARTS>(E[1][i], a, f_im);
            }
        }
        over = plus(over, make_float2(__shfl_xor_sync(~0u, over.x, 1), __shfl_xor_sync(~0u, over.y, 1)));
        over = plus(over, make_float2(__shfl_xor_sync(~0u, over.x, 2), __shfl_xor_sync(~0u, over.y, 2)));
        for (int u = 0; u < 2; u++) {
            int n = n0 + 2 * pair + u;
            CemaMode m = cema_mode(coeffs, n, d, D, N);
            float2 c[2][CEMA_BLOCK / 8];
            for (int i = 0; i < CEMA_BLOCK / 8; i++) {
                c[0][i] = make_float2(A[0][i / 2][i % 2 * 2 + u], A[1][i / 2][i % 2 * 2 + u]);
                c[1][i] = make_float2(E[0][i / 2][i % 2 * 2 + u], E[1][i / 2][i % 2 * 2 + u]);
            }
            float2 z = power8(m.q), gp = times(m.p, m.g), gq = times(m.g, m.q);
            Series K = evaluate(lags, z), a = evaluate(c[0], z), e = evaluate(c[1], z);
            float2 to_row = low_power(m.q, row),
                   before = row > 0 ? times(row, low_power(m.q, row - 1)) : make_float2(0, 0);
            float2 value = plus(plus(times(gp, K.value), times(gq, a.value)), times(m.p, e.value));
            float2 slope = plus(plus(times(gp, K.slope), times(gq, a.slope)), times(m.p, e.slope));
            float2 dp = times(to_row, plus(times(m.g, K.value), e.value));
            float2 dg = times(to_row, plus(times(m.p, K.value), times(m.q, a.value)));
            float2 dq = plus(times(before, value), times(to_row, times(times(8, low_power(m.q, 7)), slope)));
            dq = plus(dq, times(to_row, times(m.g, a.value)));
            float sums[5] = {dp.x, dq.x, -dq.y, dg.x, -dg.y};
            float from[5] = {0, __shfl_sync(~0u, over.x, 4 * (2 * pair + u)),
                             -__shfl_sync(~0u, over.y, 4 * (2 * pair + u)), 0, 0};
            for (int i = 0; i < 5; i++) {
                for (int step = 4; step < WARP; step *= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], step);
                if (row == 0 && n < N) part[((size_t)i * N + n) * D] = sums[i] + from[i];
            }
        }
    }
}

static size_t cema_sums_shared(int channels) { return 2 * (size_t)channels * CEMA_TILE * sizeof(Pair); } // bytes

template <int CHANNELS>
static void cema_sums_launch(float *parts, const floatX *dout, const floatX *inp, const float2 *states, const float2 *futures,
                             const Coeffs *coeffs, bool cut, int B, int L, int D, int N) {
    const size_t shared = cema_sums_shared(CHANNELS);
    auto kernel = D % VEC > 0 ? cema_sums_kernel<1, true, CHANNELS>
                  : cut       ? cema_sums_kernel<VEC, true, CHANNELS>
                              : cema_sums_kernel<VEC, false, CHANNELS>;
    allow_shared(kernel, shared);
    kernel<<<cema_grid(B, L, D, CHANNELS), dim3(WARP, CHANNELS), shared>>>(parts, dout, inp, states, futures, *coeffs, B,
                                                                           L, D, N);
    cudaCheck(cudaGetLastError());
}

// A thread block needs 147,968 bytes for all channels: more than 99 KB, so there it has half of them. Channels are
// independent, so the results are equal bit for bit.
static void cema_sums(float *parts, const floatX *dout, const floatX *inp, const float2 *states, const float2 *futures,
                      const Coeffs *coeffs, bool cut, int B, int L, int D, int N) {
    static_assert(CEMA_CHANNELS * CEMA_TILE * sizeof(Pair) <= SHARED_NEEDED - SHARED_DECLARED,
                  "half of cema_sums' tiles, all of the other kernels'");
    if (cema_sums_shared(CEMA_CHANNELS) <= (size_t)gpu.max_shared)
        return cema_sums_launch<CEMA_CHANNELS>(parts, dout, inp, states, futures, coeffs, cut, B, L, D, N);
    cema_sums_launch<CEMA_CHANNELS / 2>(parts, dout, inp, states, futures, coeffs, cut, B, L, D, N);
}

// How many parts the sums over blocks of tokens have.
static int cema_parts(int B, int L, int D) { return cema_grid(B, L, D).y; }

// The gradient by h before the first token, from that behind the first block. A thread has a mode of a channel of a
// sequence.
static __global__ void cema_start_kernel(float *dh, const float2 *futures, const floatX *dout, Coeffs coeffs, int B, int L,
                                         int D, int N) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, modes = (size_t)N * D, b = i / modes, mode = i % modes;
    if (b >= (size_t)B) return;
    float2 f = futures[(mode % D * B + b) * ceil_div(L, CEMA_BLOCK) * N + mode / D];
    float2 q = make_float2(coeffs.q_re[mode], coeffs.q_im[mode]), g = make_float2(coeffs.g_re[mode], coeffs.g_im[mode]);
    for (int t = min_int(CEMA_BLOCK, L) - 1; t >= 0; t--)
        f = times(q, plus(times(to_float(dout[(b * L + t) * D + mode % D]), g), f));
    dh[b * 2 * modes + mode] = f.x, dh[(b * 2 + 1) * modes + mode] = -f.y;
}

// The first two kernels. futures (D,B,blocks,N,2): the conjugate of the gradient by h behind each block; dh (B,2,N,D), or
// NULL: by h behind the last token. dh_in, or NULL, gets that by h before the first.
static void cema_futures(float *futures, float *dh_in, const floatX *dout, const float *dh, const Coeffs *coeffs, int B,
                         int L, int D, int N) {
    float2 *states = (float2 *)(void *)futures;
    cema_states(states, dh, dout, coeffs, 1, B, L, D, N);
    if (dh_in == NULL) return;
    cema_start_kernel<<<blocks_for((size_t)B * N * D, THREADS), THREADS>>>(dh_in, states, dout, *coeffs, B, L, D, N);
    cudaCheck(cudaGetLastError());
}

// All four. dcoeffs, whose arrays lie one behind the other, is set. futures and parts are scratch.
static void cema_backward(floatX *dinp, Coeffs *dcoeffs, float *domega, const float *dh, const floatX *dout, const floatX *inp,
                          const float *h_blocks, const Coeffs *coeffs, const float *omega, float *futures, float *parts,
                          int B, int L, int D, int N) {
    const float2 *states = (const float2 *)(const void *)h_blocks, *behind = (const float2 *)(const void *)futures;
    const int count = cema_parts(B, L, D);
    size_t width = (size_t)(5 * N + 1) * D;
    cema_futures(futures, NULL, dout, dh, coeffs, B, L, D, N);
    cema_tokens(dinp, behind, dout, coeffs, omega, 1, B, L, D, N);
    cema_sums(parts, dout, inp, states, behind, coeffs, dh && L % CEMA_BLOCK > 0, B, L, D, N);
    sum_parts(dcoeffs->p, NULL, 0, parts, count, width, (size_t)5 * N * D, 0);
    sum_parts(domega, NULL, 1, parts + (size_t)5 * N * D, count, width, D, 0);
}

// ChunkParallel of one sequence, see megalodon.c. all (pieces,B,2,N,D): each piece alone. h (B,2,N,D): h before the whole
// sequence, back: the gradient behind it; replaced by that before, or behind, this piece. end, or NULL, gets what is at
// the other end of it all. A thread has a mode of a channel of a sequence.
static __global__ void cema_combine_kernel(float *h, float *end, const float *all, Coeffs coeffs, int back,
                                        const int64_t *lengths, int piece, int pieces, int B, int D, int N) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, modes = (size_t)N * D, b = i / modes, mode = i % modes;
    size_t re = b * 2 * modes + mode, im = re + modes;
    if (b >= (size_t)B) return;
    float2 q = make_float2(coeffs.q_re[mode], back ? -coeffs.q_im[mode] : coeffs.q_im[mode]),
           sum = make_float2(h[re], h[im]);
    for (int n = 0; n < pieces; n++) {
        int k = back ? pieces - 1 - n : n;
        const float *alone = all + (size_t)k * B * 2 * modes;
        if (k == piece) h[re] = sum.x, h[im] = sum.y;
        float2 decay = power(q, lengths[k]);
        sum = make_float2(decay.x * sum.x - decay.y * sum.y + alone[re], decay.x * sum.y + decay.y * sum.x + alone[im]);
    }
    if (end) end[re] = sum.x, end[im] = sum.y;
}

// ----------------------------------------------------------------------------
// RMSNorm: y = x rstd (weight + 1), rstd = 1/sqrt(mean(x^2) + eps); weight NULL: no scale. rstd (R).
// backward, with a = (weight + 1) dy and n = x rstd: dx = rstd (a - n mean(a n)).
// A block goes through rows, ROWS at a time, so that a barrier serves them all. Its threads own columns, V times W of
// them, which stay in registers between the sums and their use; so do, backward, the columns' sums for dweight.
// Reads and writes R*D; backward reads 2 R*D, writes R*D.

enum { ROWS = 2, ROW_THREADS = 512, MOST_VECTORS = 16, MOST_COLUMNS = ROW_THREADS * MOST_VECTORS };

// Sums over the block's threads, of ROWS numbers, for all of them.
typedef struct {
    float x[ROWS];
} RowSums;
static __device__ RowSums block_sum(RowSums sums) {
    __shared__ float shared[ROWS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
    for (int k = 0; k < ROWS; k++) sums.x[k] = warp_sum(sums.x[k]);
    __syncthreads(); // the last call's numbers have been read
    if (lane == 0) {
#pragma unroll
        for (int k = 0; k < ROWS; k++) shared[k][warp] = sums.x[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < ROWS; k++) sums.x[k] = warp_sum(lane < warps ? shared[k][lane] : 0);
    return sums;
}

// Numbers in a thread's vectors, threads, and vectors of a thread, for rows of D.
static int row_width(int D) { return D % VEC == 0 && D <= 2 * ROW_THREADS * VEC ? VEC : 1; }
static int row_threads(int D) {
    int vectors = ceil_div(D, row_width(D));
    return min_int(ceil_div(vectors, WARP) * WARP, vectors <= 256 ? 128 : ROW_THREADS);
}
static int row_vectors(int D) { return ceil_div(ceil_div(D, row_width(D)), row_threads(D)); }
#define ROW_KERNEL(kernel, D)                                                                                          \
    (row_width(D) == 1 ? kernel<1, MOST_VECTORS> : row_vectors(D) == 1 ? kernel<VEC, 1> : kernel<VEC, 2>)

// How many blocks share R rows when each leaves a part of a sum over them.
static int row_parts(int R) { return min_int(ceil_div(R, ROWS), MOST_PARTS); }

// What a thread owns of ROWS rows from r on; zeros where there is nothing.
template <int W, int V> static __device__ void load_rows(float x[ROWS][V][W], const floatX *src, size_t r, int R, int D) {
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
#pragma unroll
        for (int u = 0; u < V; u++) {
            int c = (u * blockDim.x + threadIdx.x) * W;
#pragma unroll
            for (int i = 0; i < W; i++) x[k][u][i] = 0;
            if (c < D && r + k < (size_t)R) load<W>(x[k][u], src + (r + k) * D + c);
        }
    }
}
template <int W, int V> static __device__ void store_rows(floatX *dst, const float x[ROWS][V][W], size_t r, int R, int D) {
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
#pragma unroll
        for (int u = 0; u < V; u++) {
            int c = (u * blockDim.x + threadIdx.x) * W;
            if (c < D && r + k < (size_t)R) store<W>(dst + (r + k) * D + c, x[k][u]);
        }
    }
}
// Its columns of a vector of D floats, `other` where there is none.
template <int W, int V>
static __device__ void load_columns(float x[V][W], const float *src, float plus, float other, int D) {
#pragma unroll
    for (int u = 0; u < V; u++) {
#pragma unroll
        for (int i = 0; i < W; i++) {
            int c = (u * blockDim.x + threadIdx.x) * W + i;
            x[u][i] = src && c < D ? src[c] + plus : other;
        }
    }
}
template <int W, int V> static __device__ void store_columns(float *dst, const float x[V][W], int D) {
#pragma unroll
    for (int u = 0; u < V; u++) {
#pragma unroll
        for (int i = 0; i < W; i++) {
            int c = (u * blockDim.x + threadIdx.x) * W + i;
            if (c < D) dst[c] = x[u][i];
        }
    }
}

// Chooses the smaller unit for rows whose squares overflowed. Whether there is any; all threads get the same answer.
static __device__ bool overflowed(float unit[ROWS], RowSums squares) {
    bool any = false;
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (!(squares.x[k] <= LARGE)) unit[k] = SMALL_UNIT, any = true;
    }
    return any;
}

template <int W, int V>
static __global__ void __launch_bounds__(ROW_THREADS)
    rmsnorm_forward_kernel(floatX *out, float *rstd, const floatX *inp, const float *weight, int R, int D, float eps) {
    float x[ROWS][V][W], w[V][W];
    load_columns<W, V>(w, weight, 1, 1, D);
    for (size_t r = (size_t)blockIdx.x * ROWS; r < (size_t)R; r += (size_t)gridDim.x * ROWS) {
        RowSums squares;
        float unit[ROWS];
#pragma unroll
        for (int k = 0; k < ROWS; k++) unit[k] = 1;
        for (int turn = 0; turn < 2; turn++) { // the second one seldom
            load_rows<W, V>(x, inp, r, R, D);
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                squares.x[k] = 0;
#pragma unroll
                for (int u = 0; u < V; u++) {
#pragma unroll
                    for (int i = 0; i < W; i++) {
                        x[k][u][i] *= unit[k];
                        squares.x[k] += x[k][u][i] * x[k][u][i];
                    }
                }
            }
            squares = block_sum(squares);
            if (!overflowed(unit, squares)) break;
        }
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            float s = 1 / sqrtf(squares.x[k] / D + eps * unit[k] * unit[k]);
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < W; i++) x[k][u][i] = x[k][u][i] * s * w[u][i];
            }
            if (threadIdx.x == 0 && r + k < (size_t)R) rstd[r + k] = s * unit[k];
        }
        store_rows<W, V>(out, x, r, R, D);
    }
}

static void rmsnorm_forward(floatX *out, float *rstd, const floatX *inp, const float *weight, int R, int D, double eps) {
    auto kernel = ROW_KERNEL(rmsnorm_forward_kernel, D);
    kernel<<<ceil_div(R, ROWS), row_threads(D)>>>(out, rstd, inp, weight, R, D, (float)eps);
    cudaCheck(cudaGetLastError());
}

template <int W, int V>
static __global__ void __launch_bounds__(ROW_THREADS)
    rmsnorm_backward_kernel(floatX *dinp, float *parts, const floatX *dout, const floatX *inp, const float *weight,
                            const float *rstd, int R, int D) {
    float x[ROWS][V][W], dy[ROWS][V][W], w[V][W], dw[V][W] = {};
    load_columns<W, V>(w, weight, 1, 1, D);
    for (size_t r = (size_t)blockIdx.x * ROWS; r < (size_t)R; r += (size_t)gridDim.x * ROWS) {
        RowSums dot = {};
        load_rows<W, V>(x, inp, r, R, D), load_rows<W, V>(dy, dout, r, R, D);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            float s = r + k < (size_t)R ? rstd[r + k] : 0;
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < W; i++) {
                    x[k][u][i] *= s;
                    dw[u][i] += dy[k][u][i] * x[k][u][i];
                    dy[k][u][i] *= w[u][i];
                    dot.x[k] += dy[k][u][i] * x[k][u][i];
                }
            }
        }
        dot = block_sum(dot);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            float s = r + k < (size_t)R ? rstd[r + k] : 0, back = dot.x[k] / D;
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < W; i++) x[k][u][i] = s * (dy[k][u][i] - x[k][u][i] * back);
            }
        }
        store_rows<W, V>(dinp, x, r, R, D);
    }
    store_columns<W, V>(parts + (size_t)blockIdx.x * D, dw, D);
}

static void rmsnorm_backward(floatX *dinp, float *dweight, const floatX *dout, const floatX *inp, const float *weight,
                             const float *rstd, float *parts, int R, int D) {
    auto kernel = ROW_KERNEL(rmsnorm_backward_kernel, D);
    kernel<<<row_parts(R), row_threads(D)>>>(dinp, parts, dout, inp, weight, rstd, R, D);
    cudaCheck(cudaGetLastError());
    if (dweight) sum_parts(dweight, NULL, 1, parts, row_parts(R), D, D, 0);
}

// ----------------------------------------------------------------------------
// linear: out (R,M) = inp (R,K) weight' (M,K) + bias (M) + add (R,M); bias, add may be NULL, add may be out
// backward: dinp = dout weight (added to what is there if `add`), dweight += dout' inp, dbias += sum of rows (the
// library's epilogue for it is slower, and does not add)

static void linear_forward(floatX *out, const floatX *add, const floatX *inp, const floatX *weight, const floatX *bias, int R, int K,
                           int M) {
    MatmulKey f = matmul_key(0, 1, R, M, K, K, K, M);
    if (bias) f.epilogue = CUBLASLT_EPILOGUE_BIAS;
    matmul(f, inp, weight, add, bias, out);
}

static void linear_backward_inp(floatX *dinp, int add, const floatX *dout, const floatX *weight, int R, int K, int M) {
    matmul(matmul_key(0, 0, R, K, M, M, K, K), dout, weight, add ? dinp : NULL, NULL, dinp);
}

static void linear_backward_weight(float *dweight, float *dbias, const floatX *dout, const floatX *inp, float *parts, int R,
                                   int K, int M) {
    MatmulKey f = matmul_key(1, 0, M, K, R, M, K, K);
    f.type = CUDA_R_32F;
    matmul(f, dout, inp, dweight, NULL, dweight);
    if (dbias) sum_rows(dbias, dout, parts, R, M);
}

static void linear_backward(floatX *dinp, int add, float *dweight, float *dbias, const floatX *dout, const floatX *inp,
                            const floatX *weight, float *parts, int R, int K, int M) {
    linear_backward_inp(dinp, add, dout, weight, R, K, M);
    linear_backward_weight(dweight, dbias, dout, inp, parts, R, K, M);
}

// ----------------------------------------------------------------------------
// queries and keys from the shared z (R,Z): per head n = RMSNorm(z) over dz, then
//     q = n (gamma0 + 1)/sqrt(dz) + beta0,    k = n (gamma1 + 1)/sqrt(dz) + beta1;    gamma, beta (2,Z)
// and the rotary embedding: the pair (2j, 2j+1), taken as a complex number, is turned by e^(i pos base^(-2j/dz)).
// table (C, dz/2): cos, sin; NULL: no rotation. count (B): tokens before these, or NULL.
// A warp has a head of a row. Reads R*Z, writes 2 R*Z.

// A thread has a pair of a position.
static __global__ void rope_table_kernel(float2 *table, int C, int dz, double base) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, pairs = dz / 2;
    if (i >= C * pairs) return;
    double angle = i / pairs * pow(base, -2.0 * (i % pairs) / dz);
    table[i] = make_float2((float)cos(angle), (float)sin(angle));
}

static void rope_table(float2 *table, int C, int dz, double base) {
    rope_table_kernel<<<blocks_for((size_t)C * (dz / 2), THREADS), THREADS>>>(table, C, dz, base);
    cudaCheck(cudaGetLastError());
}

static __device__ float2 turn(float2 x, float2 by, int sign) {
    return make_float2(x.x * by.x - x.y * sign * by.y, x.x * sign * by.y + x.y * by.x);
}
static __device__ float2 load_pair(const floatX *src) {
    float x[2];
    load<2>(x, src);
    return make_float2(x[0], x[1]);
}
static __device__ void store_pair(floatX *dst, float2 pair) {
    const float x[2] = {pair.x, pair.y};
    store<2>(dst, x);
}
static __device__ int position(const int64_t *count, int row, int L, int C) {
    int past = count ? (int)(count[row / L] % C) : 0;
    return (past + row % L) % C;
}

// rstd of a warp's head where its squares overflow
static __device__ float large_head_rstd(const floatX *z, int dz) {
    float squares = 0;
    for (int j = threadIdx.x; j < dz / 2; j += WARP) {
        float2 x = load_pair(z + 2 * j);
        x.x *= SMALL_UNIT, x.y *= SMALL_UNIT;
        squares += x.x * x.x + x.y * x.y;
    }
    return SMALL_UNIT / sqrtf(warp_sum(squares) / dz);
}

// A warp's head: q, k, z, gamma and beta begin there; k's gamma and beta are Z further on.
static __device__ void qk_head(floatX *q, floatX *k, const floatX *z, const float *gamma, const float *beta, const float2 *turns,
                               int Z, int dz, float eps) {
    const float *gamma1 = gamma + Z, *beta1 = beta + Z;
    float squares = 0, scale = 1 / sqrtf((float)dz);
    for (int j = threadIdx.x; j < dz / 2; j += WARP) {
        float2 x = load_pair(z + 2 * j);
        squares += x.x * x.x + x.y * x.y;
    }
    squares = warp_sum(squares);
    float s = squares <= LARGE ? 1 / sqrtf(squares / dz + eps) : large_head_rstd(z, dz);
    for (int j = threadIdx.x; j < dz / 2; j += WARP) {
        int c = 2 * j;
        float2 n = load_pair(z + c), by = turns ? turns[j] : make_float2(1, 0);
        n.x = n.x * s * scale, n.y = n.y * s * scale;
        float2 qj = make_float2(n.x * (gamma[c] + 1) + beta[c], n.y * (gamma[c + 1] + 1) + beta[c + 1]);
        float2 kj = make_float2(n.x * (gamma1[c] + 1) + beta1[c], n.y * (gamma1[c + 1] + 1) + beta1[c + 1]);
        store_pair(q + c, turn(qj, by, 1));
        store_pair(k + c, turn(kj, by, 1));
    }
}

static __global__ void qk_forward_kernel(floatX *q, floatX *k, const floatX *z, const float *gamma, const float *beta,
                                         const float2 *table, const int64_t *count, int R, int L, int Z, int dz, int C,
                                         float eps) {
    int H = Z / dz, task = blockIdx.x * ROW_WARPS + threadIdx.y, row = task / H, h = task % H;
    if (row >= R) return;
    size_t at = (size_t)row * Z + h * dz;
    const float2 *turns = table ? table + (size_t)position(count, row, L, C) * (dz / 2) : NULL;
    qk_head(q + at, k + at, z + at, gamma + h * dz, beta + h * dz, turns, Z, dz, eps);
}

static void qk_forward(floatX *q, floatX *k, const floatX *z, const float *gamma, const float *beta, const float2 *table,
                       const int64_t *count, int R, int L, int Z, int dz, int C, double eps) {
    qk_forward_kernel<<<blocks_for((size_t)R * (Z / dz), ROW_WARPS), dim3(WARP, ROW_WARPS)>>>(
        q, k, z, gamma, beta, table, count, R, L, Z, dz, C, (float)eps);
    cudaCheck(cudaGetLastError());
}

// Backward: the rotation turned back, then a = (dq (gamma0 + 1) + dk (gamma1 + 1))/sqrt(dz) is the gradient by n, and
// dz = rstd (a - z rstd^2 mean(a z)). A warp goes through rows of a head and adds up its own sums for gamma and beta.
// parts (gridDim.x, 4, Z): dgamma0, dgamma1, dbeta0, dbeta1. Reads 3 R*Z, writes R*Z.

static __global__ void qk_backward_kernel(floatX *dz_out, float *parts, const floatX *dq, const floatX *dk, const floatX *z,
                                          const float *gamma, const float2 *table, int R, int L, int Z, int dz, int C,
                                          float eps) {
    extern __shared__ float qk_sums[]; // (warps, 8, dz/2): a thread reads and writes its own
    int pairs = dz / 2, h = blockIdx.y;
    float *sums = qk_sums + (size_t)threadIdx.y * 4 * dz, scale = 1 / sqrtf((float)dz);
    for (int j = threadIdx.x; j < pairs; j += WARP) {
        for (int i = 0; i < 8; i++) sums[i * pairs + j] = 0;
    }
    for (int row = blockIdx.x * blockDim.y + threadIdx.y; row < R; row += gridDim.x * blockDim.y) {
        const float2 *turns = table + (size_t)position(NULL, row, L, C) * pairs;
        size_t at = (size_t)row * Z + h * dz;
        float squares = 0, dot = 0;
        for (int j = threadIdx.x; j < pairs; j += WARP) {
            int c = h * dz + 2 * j;
            float2 zj = load_pair(z + at + 2 * j);
            float2 q = turn(load_pair(dq + at + 2 * j), turns[j], -1),
                   k = turn(load_pair(dk + at + 2 * j), turns[j], -1);
            squares += zj.x * zj.x + zj.y * zj.y;
            dot += (q.x * (gamma[c] + 1) + k.x * (gamma[Z + c] + 1)) * zj.x +
                   (q.y * (gamma[c + 1] + 1) + k.y * (gamma[Z + c + 1] + 1)) * zj.y;
        }
        squares = warp_sum(squares);
        float s = squares <= LARGE ? 1 / sqrtf(squares / dz + eps) : large_head_rstd(z + at, dz);
        float back = warp_sum(dot) * scale / dz * s * s;
        for (int j = threadIdx.x; j < pairs; j += WARP) {
            int c = h * dz + 2 * j;
            float2 zj = load_pair(z + at + 2 * j), n = make_float2(zj.x * s * scale, zj.y * s * scale);
            float2 q = turn(load_pair(dq + at + 2 * j), turns[j], -1),
                   k = turn(load_pair(dk + at + 2 * j), turns[j], -1);
            float2 a = make_float2((q.x * (gamma[c] + 1) + k.x * (gamma[Z + c] + 1)) * scale,
                                   (q.y * (gamma[c + 1] + 1) + k.y * (gamma[Z + c + 1] + 1)) * scale);
            store_pair(dz_out + at + 2 * j, make_float2(s * (a.x - zj.x * back), s * (a.y - zj.y * back)));
            const float terms[8] = {q.x * n.x, q.y * n.y, k.x * n.x, k.y * n.y, q.x, q.y, k.x, k.y};
#pragma unroll
            for (int i = 0; i < 8; i++) sums[i * pairs + j] += terms[i];
        }
    }
    __syncthreads();
    for (int j = threadIdx.y * WARP + threadIdx.x; j < 4 * dz; j += WARP * blockDim.y) {
        int i = j / pairs, pair = j % pairs;
        float sum = 0;
        for (int w = 0; w < (int)blockDim.y; w++) sum += qk_sums[(size_t)w * 4 * dz + j];
        parts[((size_t)blockIdx.x * 4 + i / 2) * Z + h * dz + 2 * pair + i % 2] = sum;
    }
}

static size_t qk_backward_shared(int dz) { return 4 * (size_t)dz * sizeof(float); } // bytes for a warp

static void qk_backward(floatX *dz_out, float *dgamma, float *dbeta, const floatX *dq, const floatX *dk, const floatX *z,
                        const float *gamma, const float2 *table, float *parts, int R, int L, int Z, int dz, int C,
                        double eps) {
    size_t shared = qk_backward_shared(dz);
    int warps = max_int(min_int((int)(SHARED_DEFAULT / shared), ROW_WARPS / 2), 1);
    int blocks = min_int(ceil_div(R, warps), MOST_PARTS);
    allow_shared(qk_backward_kernel, warps * shared);
    qk_backward_kernel<<<dim3(blocks, Z / dz), dim3(WARP, warps), warps * shared>>>(dz_out, parts, dq, dk, z, gamma,
                                                                                    table, R, L, Z, dz, C, (float)eps);
    cudaCheck(cudaGetLastError());
    sum_parts(dgamma, dbeta, 1, parts, blocks, 4 * (size_t)Z, 2 * (size_t)Z, 2 * (size_t)Z);
}

// ----------------------------------------------------------------------------
// silu(x) = x sigmoid(x), and the gate out = a silu(b): the attention's (o, r) and the FFN's (f3, f1)
// backward: silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x))); out is computed again, since the product after it needs it
// for its weights' gradient; NULL: not. dinp, or da, may be dout.
// A thread has VEC numbers; arrays have room for whole vectors. silu: reads and writes n, backward 2 n, 1 or 2 n;
// gate: reads 2 n, writes n, backward 3 n and 3 n.

static __global__ void silu_forward_kernel(floatX *out, const floatX *inp, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    float x[VEC];
    if (i >= n) return;
    load<VEC>(x, inp + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) x[k] *= sigmoid(x[k]);
    store<VEC>(out + i, x);
}

static void silu_forward(floatX *out, const floatX *inp, size_t n) {
    silu_forward_kernel<<<blocks_for(n, THREADS * VEC), THREADS>>>(out, inp, n);
    cudaCheck(cudaGetLastError());
}

static __global__ void silu_backward_kernel(floatX *out, floatX *dinp, const floatX *dout, const floatX *inp, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    float x[VEC], d[VEC];
    if (i >= n) return;
    load<VEC>(x, inp + i), load<VEC>(d, dout + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        float s = sigmoid(x[k]);
        d[k] *= s * (1 + x[k] * (1 - s));
        x[k] *= s;
    }
    store<VEC>(dinp + i, d);
    if (out) store<VEC>(out + i, x);
}

static void silu_backward(floatX *out, floatX *dinp, const floatX *dout, const floatX *inp, size_t n) {
    silu_backward_kernel<<<blocks_for(n, THREADS * VEC), THREADS>>>(out, dinp, dout, inp, n);
    cudaCheck(cudaGetLastError());
}

static __global__ void gate_forward_kernel(floatX *out, const floatX *a, const floatX *b, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    float x[VEC], y[VEC];
    if (i >= n) return;
    load<VEC>(x, a + i), load<VEC>(y, b + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) x[k] *= y[k] * sigmoid(y[k]);
    store<VEC>(out + i, x);
}

static void gate_forward(floatX *out, const floatX *a, const floatX *b, size_t n) {
    gate_forward_kernel<<<blocks_for(n, THREADS * VEC), THREADS>>>(out, a, b, n);
    cudaCheck(cudaGetLastError());
}

static __global__ void gate_backward_kernel(floatX *out, floatX *da, floatX *db, const floatX *dout, const floatX *a, const floatX *b,
                                            size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    float x[VEC], y[VEC], d[VEC];
    if (i >= n) return;
    load<VEC>(x, a + i), load<VEC>(y, b + i), load<VEC>(d, dout + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        float s = sigmoid(y[k]), silu = y[k] * s, dy = d[k] * (x[k] * (s * (1 + y[k] * (1 - s))));
        x[k] *= silu, d[k] *= silu, y[k] = dy;
    }
    store<VEC>(out + i, x), store<VEC>(da + i, d), store<VEC>(db + i, y);
}

static void gate_backward(floatX *out, floatX *da, floatX *db, const floatX *dout, const floatX *a, const floatX *b, size_t n) {
    gate_backward_kernel<<<blocks_for(n, THREADS * VEC), THREADS>>>(out, da, db, dout, a, b, n);
    cudaCheck(cudaGetLastError());
}

// ----------------------------------------------------------------------------
// attention of one head inside chunks: nq queries, the last nq of nk keys' positions, of `batch` chunks at a time whose
// rows lie `step` rows apart
//
//     S_ij = q_i . k_j for j <= i        P = softmax over j        o_i = sum_j P_ij v_j
//
// Scores exist for QUERY_TILE queries at a time, against the keys up to the last of them, so that those above the
// diagonal are few; S, P and their gradients are acts, softmax is float. Of P only lse_i = log sum_j e^(S_ij) is kept.
// scores (batch, nq, ld). A warp has a query's scores: reads them twice, writes them once; they are in the L2 cache.

typedef struct {
    size_t row;                  // of the first query
    int step, batch, nq, nk, ld; // ld: length of a row of scores
    int h, L, H, C;
} Queries;

static __device__ size_t query_row(const Queries *s, size_t task) {
    return s->row + task / s->nq * s->step + task % s->nq;
}
// The mask's index of query `row`'s first key.
static __device__ uint64_t mask_query(const Mask *mask, const Queries *s, size_t row) {
    return (row / s->L * s->H + s->h) * mask->row + row % s->L * s->C;
}

static __global__ void attention_chunk_forward_kernel(floatX *scores, float *lse, Queries s, Mask mask) {
    size_t task = (size_t)blockIdx.x * ROW_WARPS + threadIdx.y;
    if (task >= (size_t)s.batch * s.nq) return;
    size_t row = query_row(&s, task);
    floatX *p = scores + task * s.ld;
    int seen = s.nk - s.nq + (int)(task % s.nq) + 1; // keys at or before this query
    float x[VEC], top = -INFINITY, sum = 0;          // sum of e^(S - top) over what this lane has seen
    for (int j = threadIdx.x * VEC; j < seen; j += WARP * VEC) {
        load<VEC>(x, p + j);
        float most = top;
#pragma unroll
        for (int i = 0; i < VEC; i++) most = j + i < seen ? fmaxf(most, x[i]) : most;
        if (most > top) sum *= exp_fast(top - most), top = most;
#pragma unroll
        for (int i = 0; i < VEC; i++) { // x - x: NaN if it overflowed, for -infinity would pass for a probability of 0
            sum += j + i < seen ? exp_fast(x[i] - top) + (x[i] - x[i]) : 0;
        }
    }
    float most = top;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    sum = warp_sum(sum != 0 ? sum * exp_fast(top - most) : 0); // 0 of a lane that has no key
    float l = most + logf(sum), scale = 1 / sum;
    for (int j = threadIdx.x * VEC; j < s.nk; j += WARP * VEC) {
        load<VEC>(x, p + j);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            x[i] = j + i < seen ? exp_fast(x[i] - most) * scale : 0;
            if (mask.p > 0) x[i] *= mask_at(&mask, mask_query(&mask, &s, row) + j + i);
        }
        store<VEC>(p + j, x);
    }
    if (threadIdx.x == 0) lse[row * s.H + s.h] = l;
}

// A product of every chunk's matrices; stored rows and their distances are those of Queries.
static void chunk_product(const Queries *s, int ta, int tb, int M, int N, int K, const floatX *A, int lda,
                          int64_t stride_a, const floatX *B, int ldb, int64_t stride_b, int add, floatX *C, int ldc,
                          int64_t stride_c) {
    MatmulKey f = matmul_key(ta, tb, M, N, K, lda, ldb, ldc);
    f.batch = s->batch, f.stride_a = stride_a, f.stride_b = stride_b, f.stride_c = stride_c;
    matmul(f, A, B, add ? C : NULL, NULL, C);
}

// q, o begin with the first query, k, v with the first key; rows of q, k are Z long, of v, o E.
static void attention_chunk_forward(floatX *o, float *lse, floatX *scores, const floatX *q, const floatX *k, const floatX *v, Queries s,
                           Mask mask, int dz, int dv, int Z, int E) {
    int64_t step_z = (int64_t)s.step * Z, step_e = (int64_t)s.step * E, step_s = (int64_t)s.nq * s.ld;
    chunk_product(&s, 0, 1, s.nq, s.nk, dz, q, Z, step_z, k, Z, step_z, 0, scores, s.ld, step_s);
    attention_chunk_forward_kernel<<<blocks_for((size_t)s.batch * s.nq, ROW_WARPS), dim3(WARP, ROW_WARPS)>>>(scores, lse, s,
                                                                                                    mask);
    cudaCheck(cudaGetLastError());
    chunk_product(&s, 0, 0, s.nq, dv, s.nk, scores, s.ld, step_s, v, E, step_e, 0, o, E, step_e);
}

// P_ij = e^(S_ij - lse_i) again, divided by its sum, since lse_i is rounded; dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij).
// With dropout, v meets P under the mask, and so does dP. A warp has a query's scores and their gradients dP: reads
// both twice, writes P and dS in their place.

static __global__ void attention_chunk_backward_kernel(floatX *scores, floatX *dscores, const float *lse, Queries s, Mask mask) {
    size_t task = (size_t)blockIdx.x * ROW_WARPS + threadIdx.y;
    if (task >= (size_t)s.batch * s.nq) return;
    size_t row = query_row(&s, task);
    floatX *p = scores + task * s.ld, *ds = dscores + task * s.ld;
    int seen = s.nk - s.nq + (int)(task % s.nq) + 1;
    float x[VEC], d[VEC], l = lse[row * s.H + s.h], dot = 0, sum = 0;
    for (int j = threadIdx.x * VEC; j < seen; j += WARP * VEC) {
        load<VEC>(x, p + j), load<VEC>(d, ds + j);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            if (j + i >= seen) continue;
            if (mask.p > 0) d[i] *= mask_at(&mask, mask_query(&mask, &s, row) + j + i);
            x[i] = exp_fast(x[i] - l);
            dot += x[i] * d[i], sum += x[i];
        }
    }
    float scale = 1 / warp_sum(sum);
    dot = warp_sum(dot) * scale;
    for (int j = threadIdx.x * VEC; j < s.nk; j += WARP * VEC) {
        load<VEC>(x, p + j), load<VEC>(d, ds + j);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            float keep = mask.p > 0 && j + i < seen ? mask_at(&mask, mask_query(&mask, &s, row) + j + i) : 1;
            x[i] = j + i < seen ? exp_fast(x[i] - l) * scale : 0;
            d[i] = j + i < seen ? x[i] * (d[i] * keep - dot) : 0;
            x[i] *= keep;
        }
        store<VEC>(p + j, x), store<VEC>(ds + j, d);
    }
}

// dq is set; dk and dv are added to if `add`.
static void attention_chunk_backward(floatX *dq, floatX *dk, floatX *dv_out, floatX *scores, floatX *dscores, int add, const floatX *dout,
                            const float *lse, const floatX *q, const floatX *k, const floatX *v, Queries s, Mask mask, int dz,
                            int dv, int Z, int E) {
    int64_t step_z = (int64_t)s.step * Z, step_e = (int64_t)s.step * E, step_s = (int64_t)s.nq * s.ld;
    chunk_product(&s, 0, 1, s.nq, s.nk, dz, q, Z, step_z, k, Z, step_z, 0, scores, s.ld, step_s);
    chunk_product(&s, 0, 1, s.nq, s.nk, dv, dout, E, step_e, v, E, step_e, 0, dscores, s.ld, step_s);
    attention_chunk_backward_kernel<<<blocks_for((size_t)s.batch * s.nq, ROW_WARPS), dim3(WARP, ROW_WARPS)>>>(scores, dscores,
                                                                                                     lse, s, mask);
    cudaCheck(cudaGetLastError());
    chunk_product(&s, 0, 0, s.nq, dz, s.nk, dscores, s.ld, step_s, k, Z, step_z, 0, dq, Z, step_z);
    chunk_product(&s, 1, 0, s.nk, dz, s.nq, dscores, s.ld, step_s, q, Z, step_z, add, dk, Z, step_z);
    chunk_product(&s, 1, 0, s.nk, dv, s.nq, scores, s.ld, step_s, dout, E, step_e, add, dv_out, E, step_e);
}

// Chunked attention: a token sees its own chunk up to itself. Chunks that can be multiplied at once are a run: all of
// the batch if L is a multiple of C, otherwise the sequences' first chunks, their second ones, and so on. A run is
// shared out so that there is room for the scores.

typedef struct {
    size_t row; // of its first chunk's first token
    int step, chunks, n;
} Run; // chunks of n tokens, `step` rows apart

static int score_columns(int C) { return ceil_div(C, VEC) * VEC; }
static int score_rows(int C) { return min_int(QUERY_TILE, C); }
static int chunks_at_once(int C) { return max_int(SCORES / (score_rows(C) * score_columns(C)), 1); }

static Run run_part(Run run, int first, int most) {
    return Run{run.row + (size_t)first * run.step, run.step, min_int(run.chunks - first, most), run.n};
}
static int count_runs(int L, int C) { return L % C == 0 ? 1 : ceil_div(L, C); }
static Run run_number(int i, int B, int L, int C) {
    if (L % C == 0) return Run{0, C, B * (L / C), C};
    return Run{(size_t)i * C, L, B, min_int(C, L - i * C)};
}

// A thread has a number; reads and writes n.
static __global__ void widen_kernel(float *out, const floatX *inp, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = to_float(inp[i]);
}
static __global__ void narrow_kernel(floatX *out, const float *inp, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) set(&out[i], inp[i]);
}
static void widen(float *out, const floatX *inp, size_t n) {
    if (n == 0) return;
    widen_kernel<<<blocks_for(n, THREADS), THREADS>>>(out, inp, n);
    cudaCheck(cudaGetLastError());
}
static void narrow(floatX *out, const float *inp, size_t n) {
    if (n == 0) return;
    narrow_kernel<<<blocks_for(n, THREADS), THREADS>>>(out, inp, n);
    cudaCheck(cudaGetLastError());
}

// Puts n tokens' keys and values, from t on, into the cache of row b, from place `at` on.
static void cache_chunk(float *cache_k, float *cache_v, const floatX *k, const floatX *v, int b, int t, int at, int n, int L,
                        int C, int Z, int E) {
    size_t from = (size_t)b * L + t, to = (size_t)b * C + at;
    widen(cache_k + to * Z, k + from * Z, (size_t)n * Z);
    widen(cache_v + to * E, v + from * E, (size_t)n * E);
}

// One run's queries, block by block, head by head.
static void attention_chunk_run(floatX *o, float *lse, floatX *scores, const floatX *q, const floatX *k, const floatX *v, Run run, int past,
                       Mask mask, int L, int C, int H, int Z, int E) {
    int dz = Z / H, dv = E / H;
    for (int first = 0; first < run.chunks; first += chunks_at_once(C)) {
        Run part = run_part(run, first, chunks_at_once(C));
        size_t keys = (size_t)first * run.step;
        for (int h = 0; h < H; h++) {
            for (int i = 0; i < part.n; i += QUERY_TILE) {
                int nq = min_int(QUERY_TILE, part.n - i);
                size_t row = part.row + i;
                Queries s = {row, part.step, part.chunks, nq, past + i + nq, score_columns(C), h, L, H, C};
                attention_chunk_forward(o + row * E + h * dv, lse, scores, q + row * Z + h * dz, k + keys * Z + h * dz,
                               v + keys * E + h * dv, s, mask, dz, dv, Z, E);
            }
        }
    }
}

// q, k (B,L,Z) are rotated, v, o (B,L,E), lse (B,L,H). past (B), on the host, NULL: all 0: tokens that the chunk at the
// start has already; their keys and values are in cache_k (B,C,Z), cache_v (B,C,E), and this call's go there too, as
// far as their chunk stays unfinished. chunk_k (C,Z), chunk_v (C,E) are scratch.
static void attention_forward(floatX *o, float *lse, float *cache_k, float *cache_v, floatX *scores, floatX *chunk_k,
                              floatX *chunk_v, const floatX *q, const floatX *k, const floatX *v, const int *past, Mask mask, int B,
                              int L, int C, int H, int Z, int E) {
    int some = 0; // whether any sequence goes on inside a chunk
    for (int b = 0; past && b < B; b++) some |= past[b];
    for (int i = 0; !some && i < count_runs(L, C); i++) {
        Run run = run_number(i, B, L, C);
        attention_chunk_run(o, lse, scores, q, k + run.row * Z, v + run.row * E, run, 0, mask, L, C, H, Z, E);
    }
    for (int b = 0; some && b < B; b++) {
        size_t row = (size_t)b * L, cache = (size_t)b * C;
        int n = min_int(C - past[b], L), t = 0;
        if (past[b] > 0) { // the rest of the chunk
            cache_chunk(cache_k, cache_v, k, v, b, 0, past[b], n, L, C, Z, E);
            narrow(chunk_k, cache_k + cache * Z, (size_t)(past[b] + n) * Z);
            narrow(chunk_v, cache_v + cache * E, (size_t)(past[b] + n) * E);
            attention_chunk_run(o, lse, scores, q, chunk_k, chunk_v, Run{row, L, 1, n}, past[b], mask, L, C, H, Z, E);
            t = n;
        }
        for (; t < L; t += C) {
            Run run = {row + t, L, 1, min_int(C, L - t)};
            attention_chunk_run(o, lse, scores, q, k + run.row * Z, v + run.row * E, run, 0, mask, L, C, H, Z, E);
        }
    }
    for (int b = 0; cache_k && b < B; b++) {
        int before = past ? past[b] : 0, left = (before + L) % C; // tokens of the last chunk, if it stays unfinished
        if (before == 0 || before + L > C) cache_chunk(cache_k, cache_v, k, v, b, L - left, 0, left, L, C, Z, E);
    }
}

static void attention_backward(floatX *dq, floatX *dk, floatX *dv_out, floatX *scores, floatX *dscores, const floatX *dout,
                               const float *lse, const floatX *q, const floatX *k, const floatX *v, Mask mask, int B, int L,
                               int C, int H, int Z, int E) {
    int dz = Z / H, dv = E / H;
    for (int r = 0; r < count_runs(L, C); r++) {
        Run run = run_number(r, B, L, C);
        for (int first = 0; first < run.chunks; first += chunks_at_once(C)) {
            Run part = run_part(run, first, chunks_at_once(C));
            int last = (part.n - 1) / QUERY_TILE * QUERY_TILE;
            for (int h = 0; h < H; h++) {
                size_t z = part.row * Z + h * dz, e = part.row * E + h * dv;
                for (int i = last; i >= 0; i -= QUERY_TILE) { // the last block sees all keys: it sets dk and dv
                    int nq = min_int(QUERY_TILE, part.n - i);
                    size_t zi = z + (size_t)i * Z, ei = e + (size_t)i * E;
                    Queries s = {part.row + i, part.step, part.chunks, nq, i + nq, score_columns(C), h, L, H, C};
                    attention_chunk_backward(dq + zi, dk + z, dv_out + e, scores, dscores, i < last, dout + ei, lse, q + zi,
                                    k + z, v + e, s, mask, dz, dv, Z, E);
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------
// LayerNorm: y = (x - mean) rstd (weight + 1) + bias; weight, bias NULL: neither. mean, rstd (R).
// backward, with a = (weight + 1) dy and n = (x - mean) rstd: dx = rstd (a - mean(a) - n mean(a n)).
// Blocks and threads as in RMSNorm. Reads and writes R*D; backward reads 2 R*D, writes R*D.

template <int W, int V>
static __global__ void __launch_bounds__(ROW_THREADS)
    layernorm_forward_kernel(floatX *out, float *mean, float *rstd, const floatX *inp, const float *weight, const float *bias,
                             int R, int D, float eps) {
    float x[ROWS][V][W], w[V][W], b[V][W];
    load_columns<W, V>(w, weight, 1, 1, D), load_columns<W, V>(b, bias, 0, 0, D);
    for (size_t r = (size_t)blockIdx.x * ROWS; r < (size_t)R; r += (size_t)gridDim.x * ROWS) {
        RowSums sum, squares;
        float unit[ROWS];
#pragma unroll
        for (int k = 0; k < ROWS; k++) unit[k] = 1;
        for (int turn = 0; turn < 2; turn++) { // the second one seldom, as in RMSNorm
            load_rows<W, V>(x, inp, r, R, D);
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                sum.x[k] = squares.x[k] = 0;
#pragma unroll
                for (int u = 0; u < V; u++) {
#pragma unroll
                    for (int i = 0; i < W; i++) x[k][u][i] *= unit[k], sum.x[k] += x[k][u][i];
                }
            }
            sum = block_sum(sum);
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
#pragma unroll
                for (int u = 0; u < V; u++) {
#pragma unroll
                    for (int i = 0; i < W; i++) {
                        x[k][u][i] -= sum.x[k] / D;
                        bool inside = (int)((u * blockDim.x + threadIdx.x) * W) < D;
                        squares.x[k] += inside ? x[k][u][i] * x[k][u][i] : 0;
                    }
                }
            }
            squares = block_sum(squares);
            if (!overflowed(unit, squares)) break;
        }
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            float s = 1 / sqrtf(squares.x[k] / D + eps * unit[k] * unit[k]);
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < W; i++) x[k][u][i] = x[k][u][i] * s * w[u][i] + b[u][i];
            }
            if (threadIdx.x == 0 && r + k < (size_t)R) mean[r + k] = sum.x[k] / D / unit[k], rstd[r + k] = s * unit[k];
        }
        store_rows<W, V>(out, x, r, R, D);
    }
}

static void layernorm_forward(floatX *out, float *mean, float *rstd, const floatX *inp, const float *weight,
                              const float *bias, int R, int D, double eps) {
    auto kernel = ROW_KERNEL(layernorm_forward_kernel, D);
    kernel<<<ceil_div(R, ROWS), row_threads(D)>>>(out, mean, rstd, inp, weight, bias, R, D, (float)eps);
    cudaCheck(cudaGetLastError());
}

// parts (gridDim.x, 2, D): dweight, dbias
template <int W, int V>
static __global__ void __launch_bounds__(ROW_THREADS)
    layernorm_backward_kernel(floatX *dinp, float *parts, const floatX *dout, const floatX *inp, const float *weight,
                              const float *mean, const float *rstd, int R, int D) {
    float n[ROWS][V][W], dy[ROWS][V][W], w[V][W], dw[V][W] = {}, db[V][W] = {};
    load_columns<W, V>(w, weight, 1, 1, D);
    for (size_t r = (size_t)blockIdx.x * ROWS; r < (size_t)R; r += (size_t)gridDim.x * ROWS) {
        RowSums sum = {}, dot = {};
        load_rows<W, V>(n, inp, r, R, D), load_rows<W, V>(dy, dout, r, R, D);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            float m = r + k < (size_t)R ? mean[r + k] : 0, s = r + k < (size_t)R ? rstd[r + k] : 0;
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < W; i++) {
                    n[k][u][i] = (n[k][u][i] - m) * s;
                    dw[u][i] += dy[k][u][i] * n[k][u][i], db[u][i] += dy[k][u][i];
                    dy[k][u][i] *= w[u][i];
                    sum.x[k] += dy[k][u][i], dot.x[k] += dy[k][u][i] * n[k][u][i];
                }
            }
        }
        sum = block_sum(sum), dot = block_sum(dot);
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            float s = r + k < (size_t)R ? rstd[r + k] : 0;
#pragma unroll
            for (int u = 0; u < V; u++) {
#pragma unroll
                for (int i = 0; i < W; i++) {
                    n[k][u][i] = s * (dy[k][u][i] - sum.x[k] / D - n[k][u][i] * (dot.x[k] / D));
                }
            }
        }
        store_rows<W, V>(dinp, n, r, R, D);
    }
    store_columns<W, V>(parts + (size_t)blockIdx.x * 2 * D, dw, D);
    store_columns<W, V>(parts + ((size_t)blockIdx.x * 2 + 1) * D, db, D);
}

static void layernorm_backward(floatX *dinp, float *dweight, float *dbias, const floatX *dout, const floatX *inp,
                               const float *weight, const float *mean, const float *rstd, float *parts, int R, int D) {
    auto kernel = ROW_KERNEL(layernorm_backward_kernel, D);
    kernel<<<row_parts(R), row_threads(D)>>>(dinp, parts, dout, inp, weight, mean, rstd, R, D);
    cudaCheck(cudaGetLastError());
    if (dweight) sum_parts(dweight, dbias, 1, parts, row_parts(R), 2 * (size_t)D, D, D);
}

// ----------------------------------------------------------------------------
// rescale: out = alpha inp, alpha (D); backward: dinp = alpha dout, dalpha += sum of rows of dout inp
// A thread has VEC numbers; backward, a block goes through rows and its threads own columns. Reads R*D, backward 2 R*D;
// writes R*D.

static __global__ void rescale_forward_kernel(floatX *out, const floatX *inp, const float *alpha, size_t n, int D) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) set(&out[i], alpha[i % D] * to_float(inp[i]));
}

static void rescale_forward(floatX *out, const floatX *inp, const float *alpha, int R, int D) {
    rescale_forward_kernel<<<blocks_for((size_t)R * D, THREADS), THREADS>>>(out, inp, alpha, (size_t)R * D, D);
    cudaCheck(cudaGetLastError());
}

static __global__ void rescale_backward_kernel(floatX *dinp, float *parts, const floatX *dout, const floatX *inp,
                                               const float *alpha, int R, int D) {
    for (int c = threadIdx.x; c < D; c += blockDim.x) {
        float sum = 0;
        for (size_t at = (size_t)blockIdx.x * D + c; at < (size_t)R * D; at += (size_t)gridDim.x * D) {
            float dy = to_float(dout[at]);
            sum += dy * to_float(inp[at]);
            set(&dinp[at], alpha[c] * dy);
        }
        parts[(size_t)blockIdx.x * D + c] = sum;
    }
}

static void rescale_backward(floatX *dinp, float *dalpha, const floatX *dout, const floatX *inp, const float *alpha,
                             float *parts, int R, int D) {
    rescale_backward_kernel<<<row_parts(R), THREADS>>>(dinp, parts, dout, inp, alpha, R, D);
    cudaCheck(cudaGetLastError());
    sum_parts(dalpha, NULL, 1, parts, row_parts(R), D, D, 0);
}

// a residual: out += inp, where no kernel before it adds it. A thread has VEC numbers; reads 2 n, writes n.
static __global__ void add_kernel(floatX *out, const floatX *inp, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    float x[VEC], y[VEC];
    if (i >= n) return;
    load<VEC>(x, out + i), load<VEC>(y, inp + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) x[k] += y[k];
    store<VEC>(out + i, x);
}

static void add(floatX *out, const floatX *inp, size_t n) {
    add_kernel<<<blocks_for(n, THREADS * VEC), THREADS>>>(out, inp, n);
    cudaCheck(cudaGetLastError());
}

// ----------------------------------------------------------------------------
// output and loss: logits (R,V) = x output', loss = log sum_v e^logit - logit of the target, in nats. A block of
// positions at a time, forward and backward in one, see megalodon.c.
// A block has a position: reads its logits twice (the second time from the cache), writes their gradients over them. The
// target's e^logit is kept out of the sum of the others, which softmax - 1 and a small loss are made of.

static int logit_rows(int V) { return max_int(LOGITS / V, LOGIT_ROWS); }

template <int W>
static __global__ void loss_kernel(float *losses, floatX *logits, const int32_t *targets, float grad_scale, int grad,
                                   int V) {
    __shared__ float tops[WARP], sums[WARP];
    size_t r = blockIdx.x;
    floatX *l = logits + r * V;
    int target = targets[r], lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    float x[W], top = -INFINITY, sum = 0, at_target = target < 0 ? 0 : to_float(l[target]);
    for (int v = threadIdx.x * W; v < V; v += blockDim.x * W) {
        load<W>(x, l + v);
        float most = top;
#pragma unroll
        for (int i = 0; i < W; i++) most = fmaxf(most, x[i]);
        if (most > top) sum *= exp_fast(top - most), top = most;
#pragma unroll
        for (int i = 0; i < W; i++) sum += (v + i == target ? 0 : exp_fast(x[i] - top)) + (x[i] - x[i]);
    }
    float most = top;
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    sum = warp_sum(sum != 0 ? sum * exp_fast(top - most) : 0); // 0 where there is no logit
    if (lane == 0) tops[warp] = most, sums[warp] = sum;
    __syncthreads(); // all have read the target's logit, too
    top = lane < warps ? tops[lane] : -INFINITY, sum = lane < warps ? sums[lane] : 0, most = top;
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    sum = warp_sum(sum != 0 ? sum * exp_fast(top - most) : 0);
    float own = exp_fast(at_target - most), scale = target < 0 ? 0 : grad_scale / (sum + own);
    if (threadIdx.x == 0) losses[r] = target < 0 ? 0 : (float)(log1p(sum + (own - 1.0)) + (most - at_target));
    for (int v = threadIdx.x * W; grad && v < V; v += blockDim.x * W) {
        load<W>(x, l + v);
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = v + i == target ? -scale * sum : scale * exp_fast(x[i] - most);
        store<W>(l + v, x);
    }
}

// One block: every thread sums its own losses, then they add up in pairs. Reads R floats.
static __global__ void sum_losses_kernel(double *total, const float *losses, int R) {
    __shared__ double sums[THREADS];
    double sum = 0;
    for (int r = threadIdx.x; r < R; r += THREADS) sum += losses[r];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *total = sums[0];
}

// total gets the sum of the losses (R)
static void output_loss(double *total, float *losses, floatX *dx, float *doutput, floatX *logits, const floatX *x,
                        const floatX *output, const int32_t *targets, double grad_scale, int R, int D, int V) {
    for (int r0 = 0; r0 < R; r0 += logit_rows(V)) {
        int rows = min_int(logit_rows(V), R - r0), threads = V > 4096 ? 512 : 64;
        const floatX *xr = x + (size_t)r0 * D;
        linear_forward(logits, NULL, xr, output, NULL, rows, D, V);
        auto kernel = V % VEC == 0 ? loss_kernel<VEC> : loss_kernel<1>;
        kernel<<<rows, threads>>>(losses + r0, logits, targets + r0, (float)grad_scale, dx != NULL, V);
        cudaCheck(cudaGetLastError());
        if (dx) linear_backward(dx + (size_t)r0 * D, 0, doutput, NULL, logits, xr, output, NULL, rows, D, V);
    }
    sum_losses_kernel<<<1, THREADS>>>(total, losses, R);
    cudaCheck(cudaGetLastError());
}

// ----------------------------------------------------------------------------
// decoding: one token of each of B sequences, at most GEMV_ROWS, that goes on from a state. Little is to be computed: what
// takes time is reading every weight and the unfinished chunk once, and waiting for one kernel after the other, so these
// are as few as the data's way through a layer allows: seven. Places are read from the state on the device, so that the
// host waits for nothing. A kernel starts while the one before it ends, if the GPU can do that, and loads weights and what
// the token before left in the state; what other kernels of this token wrote is there only behind pdl_wait.

static __device__ void pdl_wait(void) {
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion(); // now the next one may start
#endif
}

template <typename... Parameters, typename... Arguments>
static void launch_pdl(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
    cudaLaunchAttribute early;
    cudaLaunchConfig_t config = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
    config.attrs = &early, config.numAttrs = gpu.has_pdl;
    cudaCheck(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// 1. TimestepNorm and, if h is there, CEMA. A block has a group of a row: every warp finds its moments, then a lane has a
// channel, and the warps take its modes in turns. Reads and writes 2*N*D floats of h (2,N,D) a row, reads 5*N*D of coeffs.

typedef struct {
    float p, q_re, q_im, g_re, g_im, re, im;
} DecodeMode;
static __device__ DecodeMode decode_mode(Coeffs c, const float *h, size_t at, size_t modes) {
    return DecodeMode{c.p[at], c.q_re[at], c.q_im[at], c.g_re[at], c.g_im[at], h[at], h[modes + at]};
}

static __global__ void decode_norm_kernel(floatX *xt, floatX *ema, double *mean, double *m2, float *h, const floatX *inp,
                                          const float *weight, const float *bias, Coeffs coeffs, const float *omega,
                                          const int64_t *count, int D, int G, int N, double eps) {
    __shared__ float sums[VALUE_COLUMNS][WARP];
    int g = D / G, lane = threadIdx.x, b = blockIdx.y, pair = b * G + blockIdx.x, d0 = blockIdx.x * g;
    size_t row = (size_t)b * D, modes = (size_t)N * D, mine = (size_t)threadIdx.y * D + d0 + lane;
    const floatX *x = inp + row + d0;
    DecodeMode mode = {};
    if (h) h += b * 2 * modes;
    if (h && lane < g && (int)threadIdx.y < N) mode = decode_mode(coeffs, h, mine, modes);
    double n = (double)g * (double)count[b];
    Moments before = {mean[pair], m2[pair]};
    pdl_wait();
    float first = to_float(x[0]), s1 = 0, s2 = 0;
    for (int i = lane; i < g; i += WARP) {
        float d = to_float(x[i]) - first;
        s1 += d, s2 += d * d;
    }
    s1 = warp_sum(s1), s2 = warp_sum(s2);
    Moments own = {(double)first + s1 / g, s2 <= LARGE ? fmaxf(s2 - s1 * s1 / g, 0) : NAN}; // NaN if it overflowed
    Moments all = merge(n, before, g, own);
    Mean shift = split_mean(all.mean);
    float rstd = (float)(1 / sqrt(all.m2 / (n + g) + eps));
    for (int i = lane; i - lane < g; i += WARP) {
        floatX rounded = {};
        if (i < g) set(&rounded, centered(to_float(x[i]), shift) * rstd * (weight[d0 + i] + 1) + bias[d0 + i]);
        float v = to_float(rounded), y = 0;
        for (int k = threadIdx.y; h && i < g && k < N; k += blockDim.y) {
            size_t at = (size_t)k * D + d0 + i;
            if (at != mine) mode = decode_mode(coeffs, h, at, modes); // the first one is there
            float re = mode.q_re * mode.re - mode.q_im * mode.im + mode.p * v;
            float im = mode.q_re * mode.im + mode.q_im * mode.re;
            h[at] = re, h[modes + at] = im;
            y += mode.g_re * re - mode.g_im * im;
        }
        sums[threadIdx.y][lane] = y;
        __syncthreads(); // all have read the state, too
        if (threadIdx.y == 0 && i < g) {
            xt[row + d0 + i] = rounded;
            for (int w = 1; w < VALUE_COLUMNS; w++) y += sums[w][lane];
            if (h) set(&ema[row + d0 + i], y + omega[d0 + i] * v);
        }
        __syncthreads(); // the sums have been read
    }
    if (lane == 0 && threadIdx.y == 0) mean[pair] = all.mean, m2[pair] = all.m2;
}

// 2., 5., 6., 7. Products: out (R,M) = inp (R,K) weight' + bias, then silu, then times scale (M), plus add (R,M). What is
// NULL is left out. With gate (M,K): out = silu(inp weight') * inp gate'. norm: inp is normalised first. A launch has up
// to four, which share K. `split` warps have an output of all rows and go through its row of weights together; the first
// numbers of it are on their way before anything is waited for.

typedef struct {
    floatX *out;
    const floatX *inp, *weight, *bias, *gate, *add;
    const float *scale, *norm_weight, *norm_bias;
    int M, silu, norm; // NO_NORM, ..
} Linear;
typedef struct {
    Linear of[4]; // M 0: none
} Linears;
enum { NO_NORM, RMS_NORM, LAYER_NORM };
enum { GEMV_WARPS = 16, GEMV_THREADS = GEMV_WARPS * WARP, GEMV_LOADS = 4 }; // of a block; loads of a thread at once

// A load, kept as it came: unpacked, numbers of 16 bits would take registers of 32.
template <int W> struct Loaded { uint4 bits; };
template <> struct Loaded<1> { floatX bits; };

template <int W> static __device__ void gemv_load(Loaded<W> w[GEMV_LOADS], const floatX *weight, int k0, int step, int K) {
#pragma unroll
    for (int i = 0; i < GEMV_LOADS; i++) {
        if (k0 + i * step < K) w[i] = *(const Loaded<W> *)(weight + k0 + i * step);
    }
}

// Rows of x times a row of weights, whose first numbers are in w: columns k0, k0 + step, .. , W at each.
template <int R, int W>
static __device__ void gemv_dots(float sum[R], Loaded<W> w[GEMV_LOADS], const floatX *weight, const floatX *x, int k0, int step,
                                int B, int K) {
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = 0;
#pragma unroll 1
    for (; k0 < K; k0 += GEMV_LOADS * step) {
#pragma unroll
        for (int i = 0; i < GEMV_LOADS; i++) {
            if (k0 + i * step >= K) break;
            float unpacked[W], y[W];
            load<W>(unpacked, (const floatX *)&w[i]);
#pragma unroll
            for (int r = 0; r < R; r++) {
                load<W>(y, x + (size_t)min_int(r, B - 1) * K + k0 + i * step);
#pragma unroll
                for (int u = 0; u < W; u++) sum[r] += unpacked[u] * y[u];
            }
        }
        gemv_load<W>(w, weight, k0 + GEMV_LOADS * step, step, K);
    }
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = warp_sum(sum[r]);
}

static __device__ float norm_scale(const Linear &l, int k, int K) {
    return l.norm_weight && k < K ? l.norm_weight[k] + 1 : 1;
}
static __device__ float norm_shift(const Linear &l, int k, int K) { return l.norm_bias && k < K ? l.norm_bias[k] : 0; }

// rows (B,K): inp, normalised. Every block does this again; a thread has a column, or several.
static __device__ void gemv_norms(floatX *rows, const Linear &l, int B, int K, float eps) {
    enum { AHEAD = 2 };
    float scale[AHEAD], shift[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
        int k = threadIdx.x + u * GEMV_THREADS;
        scale[u] = norm_scale(l, k, K), shift[u] = norm_shift(l, k, K);
    }
    pdl_wait();
    for (int r = 0; r < B; r++) {
        const floatX *inp = l.inp + (size_t)r * K;
        float from = l.norm == LAYER_NORM ? to_float(inp[0]) : 0;
        RowSums sums = {};
#pragma unroll 2
        for (int k = threadIdx.x; k < K; k += GEMV_THREADS) {
            float d = to_float(inp[k]) - from;
            sums.x[0] += d, sums.x[1] += d * d;
        }
        sums = block_sum(sums);
        float mean = l.norm == LAYER_NORM ? sums.x[0] / K : 0, square = sums.x[1] / K;
        float s = square <= LARGE ? 1 / sqrtf(fmaxf(square - mean * mean, 0) + eps) : NAN; // NaN if it overflowed
#pragma unroll 1
        for (int k0 = threadIdx.x; k0 < K; k0 += AHEAD * GEMV_THREADS) {
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                int k = k0 + u * GEMV_THREADS;
                if (k >= K) break;
                if (K > AHEAD * GEMV_THREADS) scale[u] = norm_scale(l, k, K), shift[u] = norm_shift(l, k, K);
                set(&rows[(size_t)r * K + k], (to_float(inp[k]) - from - mean) * s * scale[u] + shift[u]);
            }
        }
    }
    __syncthreads();
}

template <int R, int W>
static __global__ void __launch_bounds__(GEMV_THREADS, R < 3 ? 4 - R : 1) // so many blocks find registers
    gemv_rows_kernel(const __grid_constant__ Linears all, int split, int B, int K, float eps) {
    extern __shared__ float4 gemv_shared[]; // (B,K) acts, if there is a norm
    __shared__ float dots[2][GEMV_WARPS][R];
    int block = blockIdx.x, each = GEMV_WARPS / split, warp = threadIdx.x / WARP; // each: outputs of a block
    const Linear *l = all.of;
    while (block >= ceil_div(l->M, each)) block -= ceil_div(l++->M, each); // whose blocks come one behind the other
    int k0 = (warp % split * WARP + threadIdx.x % WARP) * W, step = split * WARP * W;
    size_t at = (size_t)min_int(block * each + warp / split, l->M - 1) * K; // the last output more than once
    Loaded<W> w[GEMV_LOADS];
    gemv_load<W>(w, l->weight + at, k0, step, K);
    int r = threadIdx.x % R, o = threadIdx.x / R, m = block * each + o; // what the thread writes in the end
    bool writes = o < each && m < l->M && r < B;
    float bias = writes && l->bias ? to_float(l->bias[m]) : 0, scale = writes && l->scale ? l->scale[m] : 1;
    float sum[R], gate[R] = {};
    floatX *rows = (floatX *)gemv_shared;
    if (l->norm)
        gemv_norms(rows, *l, B, K, eps);
    else
        pdl_wait();
    float more = writes && l->add ? to_float(l->add[(size_t)r * l->M + m]) : 0;
    const floatX *x = l->norm ? rows : l->inp;
    gemv_dots<R, W>(sum, w, l->weight + at, x, k0, step, B, K);
    if (l->gate) {
        gemv_load<W>(w, l->gate + at, k0, step, K);
        gemv_dots<R, W>(gate, w, l->gate + at, x, k0, step, B, K);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        if (threadIdx.x % WARP == 0) dots[0][warp][i] = sum[i], dots[1][warp][i] = gate[i];
    }
    __syncthreads();
    if (!writes) return;
    float y = bias, times = 0;
    for (int i = o * split; i < (o + 1) * split; i++) y += dots[0][i][r], times += dots[1][i][r];
    if (l->silu) y *= sigmoid(y);
    if (l->gate) y *= times;
    set(&l->out[(size_t)r * l->M + m], y * scale + more);
}

static size_t gemv_shared_bytes(int B, int K) { return (size_t)B * K * sizeof(floatX); }

static void gemv_rows(Linears all, int B, int K, double eps) {
    enum { WARPS = 4096 }; // enough to keep a large GPU's memory busy
    int blocks = 0, norm = 0, outputs = 0, split = 1, W = K % VEC == 0 ? VEC : 1;
    for (const Linear &l : all.of) {
        outputs += l.M, norm |= l.norm;
        if (alignment(l.weight) < 16 || alignment(l.gate) < 16) W = 1; // NULL is aligned
    }
    while (split < GEMV_WARPS && outputs * split < WARPS) split *= 2;
    for (const Linear &l : all.of) blocks += ceil_div(l.M, GEMV_WARPS / split);
#define FEW(W)                                                                                                         \
    (B == 1   ? gemv_rows_kernel<1, W>                                                                                  \
     : B == 2 ? gemv_rows_kernel<2, W>                                                                                  \
     : B <= 4 ? gemv_rows_kernel<4, W>                                                                                  \
              : gemv_rows_kernel<GEMV_ROWS, W>)
    auto kernel = W == VEC ? FEW(VEC) : FEW(1);
    size_t shared = norm ? gemv_shared_bytes(B, K) : 0;
    allow_shared(kernel, shared);
    launch_pdl(kernel, blocks, GEMV_THREADS, shared, all, split, B, K, (float)eps);
}

// 3. Scores (B,H,C) of one query against the keys of its chunk so far, cached as floats. A warp has a key. The one of this
// token comes from z, as the query does, and goes to the cache. Reads Z floats a key.

enum { KEY_LOADS = 8 };
static __device__ void key_load(float x[KEY_LOADS], const float *key, int from, int dz) {
#pragma unroll
    for (int i = 0; i < KEY_LOADS; i++) x[i] = from + i * WARP < dz ? key[from + i * WARP] : 0;
}

static __global__ void decode_scores_kernel(float *scores, float *cache_k, const floatX *z, const float *gamma,
                                            const float *beta, const float2 *table, const int64_t *count, int Z, int dz,
                                            int C, float eps) {
    extern __shared__ float4 decode_shared[];
    floatX *q = (floatX *)decode_shared, *k = q + dz;
    int h = blockIdx.y, b = blockIdx.z, c = h * dz, last = position(count, b, 1, C);
    int first = blockIdx.x * ROW_WARPS, j = min_int(first + threadIdx.y, last); // the last one more than once
    if (first > last) return;                                                   // the grid is for a whole chunk
    float *key = cache_k + ((size_t)b * C + j) * Z + c, x[KEY_LOADS], sum = 0;
    key_load(x, key, threadIdx.x, dz);
    pdl_wait();
    if (threadIdx.y == 0)
        qk_head(q, k, z + (size_t)b * Z + c, gamma + c, beta + c, table + (size_t)last * (dz / 2), Z, dz, eps);
    __syncthreads();
    for (int i0 = threadIdx.x; i0 < dz; i0 += KEY_LOADS * WARP) {
        if (i0 >= KEY_LOADS * WARP) key_load(x, key, i0, dz);
#pragma unroll
        for (int u = 0; u < KEY_LOADS; u++) {
            int i = i0 + u * WARP;
            if (i >= dz) break;
            if (j == last) key[i] = x[u] = to_float(k[i]);
            sum += to_float(q[i]) * x[u];
        }
    }
    sum = warp_sum(sum);
    // NaN if it overflowed: -infinity would pass for a probability of 0
    if (threadIdx.x == 0) scores[((size_t)b * gridDim.y + h) * C + j] = sum + (sum - sum);
}

// 4. gated = o silu(r), o = softmax(scores) v. A block has VALUE_COLUMNS columns and as many warps; a lane a column of
// every WARP-th key, with a softmax of its own, which are joined at the end, when a warp has a column. Reads E floats a
// key.
static __global__ void __launch_bounds__(WARP *VALUE_COLUMNS)
    decode_values_kernel(floatX *gated, float *cache_v, const float *scores, const floatX *v, const floatX *r_pre,
                         const int64_t *count, int E, int C) {
    enum { AT_ONCE = 16 };
    __shared__ float tops[WARP], sums[WARP], values[VALUE_COLUMNS][WARP + 1];
    int h = blockIdx.y, b = blockIdx.z, H = gridDim.y, dv = E / H, last = position(count, b, 1, C);
    int column = threadIdx.x % VALUE_COLUMNS, turn = (threadIdx.y * WARP + threadIdx.x) / VALUE_COLUMNS;
    int c = h * dv + min_int(blockIdx.x * VALUE_COLUMNS + column, dv - 1); // the last one more than once
    float *cached = cache_v + (size_t)b * C * E + c, top = -INFINITY, sum = 0, o = 0;
    scores += ((size_t)b * H + h) * C;
    pdl_wait();
    int mine = min_int(blockIdx.x * VALUE_COLUMNS + threadIdx.y, dv - 1); // the column this warp has in the end
    float r = to_float(r_pre[(size_t)b * E + h * dv + mine]);
    if (last % WARP == turn) cached[(size_t)last * E] = to_float(v[(size_t)b * E + c]);
    for (int j0 = turn; j0 <= last; j0 += AT_ONCE * WARP) {
        float s[AT_ONCE], x[AT_ONCE], most = top;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int j = j0 + i * WARP;
            s[i] = j <= last ? scores[j] : -INFINITY, x[i] = j <= last ? cached[(size_t)j * E] : 0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) most = fmaxf(most, s[i]);
        float old = exp_fast(top - most);
        sum *= old, o *= old, top = most;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float p = exp_fast(s[i] - top);
            sum += p, o += p * x[i];
        }
    }
    tops[turn] = top, sums[turn] = sum, values[column][turn] = o;
    __syncthreads();
    top = tops[threadIdx.x];
    float most = top;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    float share = exp_fast(top - most);
    sum = warp_sum(share * sums[threadIdx.x]);
    o = warp_sum(share * values[mine - blockIdx.x * VALUE_COLUMNS][threadIdx.x]) / sum;
    if (threadIdx.x == 0) set(&gated[(size_t)b * E + h * dv + mine], o * (r * sigmoid(r)));
}

static void decode_norm(floatX *xt, floatX *ema, double *mean, double *m2, float *h, const floatX *inp, const float *weight,
                        const float *bias, Coeffs coeffs, const float *omega, const int64_t *count, int B, int D, int G,
                        int N, double eps) {
    launch_pdl(decode_norm_kernel, dim3(G, B), dim3(WARP, VALUE_COLUMNS), 0, xt, ema, mean, m2, h, inp, weight, bias,
                 coeffs, omega, count, D, G, N, eps);
}

static void decode_attention(floatX *gated, float *cache_k, float *cache_v, float *scores, const floatX *z, const floatX *v,
                             const floatX *r_pre, const float *gamma, const float *beta, const float2 *table,
                             const int64_t *count, int B, int C, int H, int Z, int E, double eps) {
    size_t shared = 2 * (size_t)(Z / H) * sizeof(floatX);
    launch_pdl(decode_scores_kernel, dim3(ceil_div(C, ROW_WARPS), H, B), dim3(WARP, ROW_WARPS), shared, scores,
                 cache_k, z, gamma, beta, table, count, Z, Z / H, C, (float)eps);
    launch_pdl(decode_values_kernel, dim3(ceil_div(E / H, VALUE_COLUMNS), H, B), dim3(WARP, VALUE_COLUMNS), 0, gated,
                 cache_v, scores, v, r_pre, count, E, C);
}

// ----------------------------------------------------------------------------
// activations

typedef struct {                // of one layer: what its backward pass reads
    Mean *norm_mean;            // (B,L,G) TimestepNorm's
    float *norm_rstd;           // (B,L,G)
    floatX *xt;                    // (B,L,D) TimestepNorm(x)
    float *h;                   // (B, L/CEMA_BLOCK, 2, N, D) CEMA's state before each block
    floatX *ema;                   // (B,L,D) CEMA(xt)
    float *ema_rstd;            // (B,L) its RMSNorm's
    floatX *mx;                    // (B,L,D) RMSNorm(CEMA(xt))
    floatX *z;                     // (B,L,Z) before its norm
    floatX *v_pre, *r_pre;           // (B,L,E) before silu
    floatX *o;                     // (B,L,E)
    float *lse;                 // (B,L,H)
    floatX *y;                     // (B,L,D) the sub-layer's output
    float *ffn_mean, *ffn_rstd; // (B,L) LayerNorm's
    floatX *u;                     // (B,L,D) LayerNorm(y)
    floatX *f1, *f3;               // (B,L,F) u W1', u W3' (swiglu only)
    floatX *f2;                    // (B,L,D) before alpha (rescale_nffn only)
} LayerActs;

typedef struct {                 // used by every layer in turn; what begins with d, for backward only
    floatX *logits;                 // (logit_rows,V)
    floatX *dx, *dy, *dxt, *dmx;    // (B,L,D)
    Prefix *prefix;              // (B,L,G) TimestepNorm's, forward
    Sums *suffix;                // (B,L,G) and backward
    Moments *moments;            // (B, L/NORM_BLOCK, G) forward
    Sums *sums;                  // (B, L/NORM_BLOCK, G) backward
    floatX *q_rotated, *k_rotated;    // (B,L,Z) of the attention sub-layer, here and below
    floatX *v, *gated;              // (B,L,E)
    floatX *scores;                 // (chunks_at_once, score_rows, score_columns)
    floatX *chunk_k, *chunk_v;      // (C,Z), (C,E) a chunk that began before
    float *decode_scores;        // (B,H,C), B at most GEMV_ROWS
    floatX *dema;                   // (B,L,D)
    floatX *dq, *dk, *dz;           // (B,L,Z)
    floatX *do_, *dr_pre, *dv;       // (B,L,E)
    floatX *dscores;                // as scores
    float *futures;              // (D, B, L/CEMA_BLOCK, N, 2)
    Coeffs dcoeffs;                // one behind the other
    float *parts;                // of sums over rows
    floatX *hidden, *dhidden, *df1; // (B,L,F) of the FFN sub-layer
} Scratch;

struct Model {
    Config config;
    Mode mode;
    int max_B, max_L;
    Tensor *tensors;
    int num_tensors;
    size_t num_params;
    Shard *own;   // (num_own) of them, that this process updates,
    int num_own;  // in all
    size_t owned; // so many
    MemoryPlan plan;
    void *params_memory;  // the parameters, then what they are rounded to
    void *moments_memory; // both
    float *memory[4];     // PARAMS, GRADS; MOMENT1, MOMENT2 (owned)
    floatX *rounded;         // the parameters as acts; themselves in the float32 build
    Params params, grads;
    void *acts_memory, *work_memory;
    LayerActs *acts;           // (num_layers), all in the same memory unless mode is TRAIN
    floatX **x;                   // (num_layers+1) of (B,L,D): blocks' inputs, the last one's output
    Mean *final_mean;          // (B,L,G) final norm's
    float *final_rstd;         // (B,L,G)
    floatX *final;                // (B,L,D) and its output
    float *losses;             // (B,L)
    double *totals;            // (NORM_PARTS) of megalodon_grad_norm; of the loss
    int32_t *tokens, *targets; // (B,L)
    int *order;                // (B,L) rows sorted by token
    Segment *segments;         // (2 B*L) of these
    Sorted sorted;
    int *host_order, *host_first; // the same on the host
    Segment *host_segments;
    int64_t *host_count; // (B) state's count before the last forward
    int *past;           // (B) of it, tokens of an unfinished chunk
    float2 *rope;        // (C, dz/2)
    Coeffs *coeffs;        // (num_layers)
    int coeffs_valid;
    Scratch scratch;
    ChunkParallel cp;    // the sequences' others; pieces.cp_size 1: none
    int64_t start;    // place of this piece in them,
    int64_t whole;    // of so many tokens
    int64_t *lengths; // (pieces) on the device
    char *exchange;   // there: mine, all, what is joined from it; or NULL
    size_t exchange_bytes;
    int joining;                         // in a forward of a piece: its incoming state is not yet known
    void (*ready)(Model *, int segment); // or NULL
    DropoutKey draw;                           // of dropout, if
    int dropping;                        // it is on
    State before;                        // the last forward's incoming state without k and v, for the backward pass
    int with_before;                     // there was one
    int B, L;                            // of the last forward
    int acts_layer; // the layer whose activations the shared memory holds, -1: none; not in mode TRAIN
};

// Hands out room for the next n things behind *at; with at NULL it only counts. Slices begin at multiples of 256 bytes.
typedef struct {
    char *at;
    size_t used;
} Arena;
template <typename T> static void take(T **pointer, Arena *arena, size_t n) {
    *pointer = arena->at ? (T *)(void *)(arena->at + arena->used) : NULL;
    arena->used += (n * sizeof(T) + 255) / 256 * 256;
}

static void layer_acts_take(LayerActs *a, Arena *arena, const Config *c, int B, int L) {
    size_t R = (size_t)B * L, D = c->model_dim, Z = c->z_dim, E = c->value_dim, F = c->ffn_hidden_dim;
    size_t H = c->num_heads, G = c->norm_num_groups, blocks = (size_t)B * ceil_div(L, CEMA_BLOCK);
    take(&a->norm_mean, arena, R * G), take(&a->norm_rstd, arena, R * G);
    take(&a->xt, arena, R * D);
    take(&a->h, arena, blocks * 2 * c->cema_ndim * D);
    take(&a->ema, arena, R * D), take(&a->ema_rstd, arena, R);
    take(&a->mx, arena, R * D);
    take(&a->z, arena, R * Z);
    take(&a->v_pre, arena, R * E), take(&a->r_pre, arena, R * E);
    take(&a->o, arena, R * E), take(&a->lse, arena, R * H);
    take(&a->y, arena, R * D);
    take(&a->ffn_mean, arena, R), take(&a->ffn_rstd, arena, R);
    take(&a->u, arena, R * D);
    take(&a->f1, arena, R * F), take(&a->f3, arena, c->swiglu ? R * F : 0);
    take(&a->f2, arena, c->rescale_nffn ? R * D : 0);
}

static void coeffs_take(Coeffs *coeffs, Arena *arena, const Config *c) {
    size_t n = (size_t)c->cema_ndim * c->model_dim;
    float *all;
    take(&all, arena, 7 * n);
    *coeffs = all ? Coeffs{all, all + n, all + 2 * n, all + 3 * n, all + 4 * n, all + 5 * n, all + 6 * n} : Coeffs{};
}

// Floats that the largest sum over rows needs for its parts.
static size_t parts_size(const Config *c, int B, int L) {
    size_t D = c->model_dim;
    size_t rows = (size_t)MOST_PARTS * max_int(max_int(2 * c->model_dim, 4 * c->z_dim), c->value_dim);
    size_t cema = (size_t)cema_parts(B, L, c->model_dim) * (5 * c->cema_ndim + 1) * D;
    size_t embed = ((size_t)B * L / (EMBED_ROWS / 2) + 1) * D;
    size_t most = rows > cema ? rows : cema;
    return most > embed ? most : embed;
}

// The two sub-layers take turns, so theirs lie in the same place.
static void scratch_take(Scratch *s, Arena *arena, const Config *c, Mode mode, int B, int L) {
    size_t R = (size_t)B * L, D = c->model_dim, Z = c->z_dim, E = c->value_dim, F = c->ffn_hidden_dim;
    size_t G = c->norm_num_groups, C = c->chunk_size, blocks = (size_t)B * ceil_div(L, NORM_BLOCK);
    size_t states = (size_t)B * ceil_div(L, CEMA_BLOCK) * 2 * c->cema_ndim * D;
    size_t chunks = min_int(chunks_at_once(C), B * ceil_div(L, C));
    size_t scores = chunks * score_rows(C) * score_columns(C);
    int backward = mode != MEGALODON_INFER;
    take(&s->prefix, arena, R * G), take(&s->moments, arena, blocks * G);
    if (backward) take(&s->suffix, arena, R * G), take(&s->sums, arena, blocks * G);
    size_t start = arena->used;
    take(&s->q_rotated, arena, R * Z), take(&s->k_rotated, arena, R * Z);
    take(&s->v, arena, R * E), take(&s->gated, arena, R * E);
    take(&s->scores, arena, scores);
    take(&s->chunk_k, arena, C * Z), take(&s->chunk_v, arena, C * E);
    take(&s->decode_scores, arena, backward ? 0 : (size_t)min_int(B, GEMV_ROWS) * c->num_heads * C);
    if (backward) {
        take(&s->dema, arena, R * D);
        take(&s->dq, arena, R * Z), take(&s->dk, arena, R * Z), take(&s->dz, arena, R * Z);
        take(&s->do_, arena, R * E), take(&s->dr_pre, arena, R * E), take(&s->dv, arena, R * E);
        take(&s->dscores, arena, scores);
        take(&s->futures, arena, states);
        coeffs_take(&s->dcoeffs, arena, c);
    }
    size_t end = arena->used;
    arena->used = start;
    take(&s->hidden, arena, R * F);
    if (backward) take(&s->dhidden, arena, R * F), take(&s->df1, arena, R * F);
    arena->used = end > arena->used ? end : arena->used;
    take(&s->logits, arena, (size_t)min_int(logit_rows(c->vocab_size), B * L) * c->vocab_size);
    if (!backward) return;
    take(&s->dx, arena, R * D), take(&s->dy, arena, R * D);
    take(&s->dxt, arena, R * D), take(&s->dmx, arena, R * D);
    take(&s->parts, arena, parts_size(c, B, L));
}

// ----------------------------------------------------------------------------
// the attention sub-layer: y = mega(x), see megalodon.h. It goes on from the state `in` and leaves its own in
// `out`, which may be the same; NULL: a fresh start, the end not kept.

// The dropout of one place in one layer (-1: none of them), for an activation of `width` numbers a token.
static Mask mask_of(const Model *m, int layer, int place, double p, int width) {
    uint64_t whole = m->cp.cp_size > 1 ? (uint64_t)m->whole : (uint64_t)m->L; // tokens of a row
    Mask mask;
    mask.p = m->dropping ? p : 0;
    mask.seed = m->draw.seed;
    mask.stream = STREAM_DROPOUT + (uint32_t)place;
    mask.step = (uint32_t)m->draw.step;
    mask.layer = (uint32_t)(layer + 1);
    mask.first = ((uint64_t)m->draw.row * whole + (uint64_t)m->start) * (uint64_t)width;
    mask.row = whole * (uint64_t)width;
    mask.run = (size_t)m->L * width;
    return mask;
}

// Of the attention's probabilities: a head's queries lie side by side, C numbers each.
static Mask mask_of_attention(const Model *m, int layer) {
    Mask mask = mask_of(m, layer, DROP_ATTENTION, m->config.attention_dropout, m->config.chunk_size);
    mask.first += (uint64_t)m->draw.row * (uint64_t)(m->config.num_heads - 1) * mask.row;
    mask.run = 0;
    return mask;
}

// A parameter as products read it.
static const floatX *rounded(const Model *m, const float *param) { return m->rounded + (param - m->memory[PARAMS]); }

// ----------------------------------------------------------------------------
// TimestepNorm and CEMA in the model: a piece of a sequence joins the others

static void pieces_free(Model *m) {
    device_free(m->exchange, m->exchange_bytes);
    device_free(m->lengths, m->cp.cp_size * sizeof *m->lengths);
    m->exchange = NULL, m->lengths = NULL;
}

int megalodon_chunk_parallel(Model *m, const ChunkParallel *pieces) {
    const Config *c = &m->config;
    pieces_free(m);
    memset(&m->cp, 0, sizeof m->cp);
    m->cp.cp_size = 1, m->start = m->whole = 0;
    if (!pieces || pieces->cp_size == 1) return 1;
    size_t sums = (size_t)m->max_B * c->norm_num_groups * sizeof(Sums), lengths = pieces->cp_size * sizeof *m->lengths;
    size_t h = (size_t)m->max_B * 2 * c->cema_ndim * c->model_dim * sizeof(float), most = sums > h ? sums : h;
    m->exchange_bytes = ((size_t)pieces->cp_size + 2) * most;
    m->cp = *pieces;
    m->exchange = (char *)device_new(m->exchange_bytes), m->lengths = (int64_t *)device_new(lengths);
    if (!m->exchange || !m->lengths) {
        pieces_free(m);
        m->cp.cp_size = 1;
        return 0;
    }
    cudaCheck(cudaMemcpy(m->lengths, pieces->lengths, lengths, cudaMemcpyHostToDevice));
    for (int i = 0; i < pieces->cp_size; i++) {
        m->start += i < pieces->cp_rank ? pieces->lengths[i] : 0;
        m->whole += pieces->lengths[i];
    }
    return 1;
}

// What all pieces have found out alone, one behind the other: m->exchange has this one's at its start.
static void *gather(Model *m, size_t bytes) {
    m->cp.gather(m->cp.context, m->exchange, m->exchange + bytes, bytes);
    return m->exchange + bytes;
}

// TimestepNorm number `layer`; that behind all layers is the final one. in, out: see mega_forward.
static void timestep_norm_layer_forward(Model *m, int layer, floatX *y, Mean *mean, float *rstd, const floatX *x, const float *weight,
                              const float *bias, const State *in, State *out) {
    const ChunkParallel *p = &m->cp;
    Scratch *s = &m->scratch;
    int B = m->B, L = m->L, D = m->config.model_dim, G = m->config.norm_num_groups;
    size_t at = (size_t)layer * B * G, rows = (size_t)B * G;
    double eps = m->config.norm_eps, *mean_out = out ? out->mean + at : NULL, *m2_out = out ? out->m2 + at : NULL;
    if (m->joining) {
        double *mine = (double *)(void *)m->exchange;
        timestep_norm_forward(NULL, mean, rstd, mine, mine + rows, x, weight, bias, NULL, NULL, NULL, s->prefix,
                              s->moments, B, L, D, G, eps);
        double *all = (double *)gather(m, 2 * rows * sizeof *mine);
        timestep_norm_combine_kernel<<<blocks_for(rows, THREADS), THREADS>>>(in->mean + at, in->m2 + at, mean_out, m2_out,
                                                                          all, out ? out->count : NULL, m->lengths,
                                                                          p->cp_rank, p->cp_size, B, D, G);
        cudaCheck(cudaGetLastError());
        mean_out = m2_out = NULL;
    }
    timestep_norm_forward(y, mean, rstd, mean_out, m2_out, x, weight, bias, in ? in->mean + at : NULL,
                          in ? in->m2 + at : NULL, in ? in->count : NULL, s->prefix, s->moments, B, L, D, G, eps);
}

static void timestep_norm_layer_backward(Model *m, floatX *dx, float *dweight, float *dbias, const floatX *dy, const floatX *residual,
                               const floatX *residual2, const floatX *x, const float *weight, const Mean *mean,
                               const float *rstd) {
    const ChunkParallel *p = &m->cp;
    Scratch *s = &m->scratch;
    int B = m->B, L = m->L, D = m->config.model_dim, G = m->config.norm_num_groups, rows = B * G;
    Sums *mine = (Sums *)(void *)m->exchange, *later = NULL;
    timestep_norm_sums(mine, s->suffix, s->sums, dy, x, weight, mean, rstd, m->with_before ? m->before.count : NULL, B,
                       L, D, G);
    if (p->cp_size > 1) {
        Sums *all = (Sums *)gather(m, rows * sizeof *mine);
        later = all + (size_t)p->cp_size * rows;
        timestep_norm_combine_backward_kernel<<<blocks_for(rows, THREADS), THREADS>>>(later, all, p->cp_rank, p->cp_size,
                                                                                   rows);
        cudaCheck(cudaGetLastError());
    }
    timestep_norm_backward(dx, dweight, dbias, dy, residual, residual2, x, weight, mean, rstd, s->suffix, s->sums,
                           later, s->parts, B, L, D, G);
}

static void cema_layer_forward(Model *m, int layer, const State *in, State *out) {
    const ChunkParallel *p = &m->cp;
    int B = m->B, L = m->L, D = m->config.model_dim, N = m->config.cema_ndim;
    size_t modes = (size_t)B * 2 * N * D, at = layer * modes;
    LayerActs *a = &m->acts[layer];
    const Coeffs *coeffs = &m->coeffs[layer];
    const float *omega = m->params.layers[layer].cema_omega;
    float *h_out = out ? out->h + at : NULL;
    if (m->joining) {
        cema_forward(NULL, a->h, (float *)(void *)m->exchange, a->xt, coeffs, omega, NULL, B, L, D, N);
        float *all = (float *)gather(m, modes * sizeof *all);
        cema_combine_kernel<<<blocks_for(modes / 2, THREADS), THREADS>>>(in->h + at, h_out, all, *coeffs, 0, m->lengths,
                                                                      p->cp_rank, p->cp_size, B, D, N);
        cudaCheck(cudaGetLastError());
        h_out = NULL;
    }
    cema_forward(a->ema, a->h, h_out, a->xt, coeffs, omega, in ? in->h + at : NULL, B, L, D, N);
}

static void cema_layer_backward(Model *m, int layer, floatX *dx, const floatX *dy) {
    const ChunkParallel *p = &m->cp;
    int B = m->B, L = m->L, D = m->config.model_dim, N = m->config.cema_ndim;
    size_t modes = (size_t)B * 2 * N * D;
    const LayerActs *a = &m->acts[layer];
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    Scratch *s = &m->scratch;
    const Coeffs *coeffs = &m->coeffs[layer];
    float *dh = NULL;
    if (p->cp_size > 1) {
        cema_futures(s->futures, (float *)(void *)m->exchange, dy, NULL, coeffs, B, L, D, N);
        float *all = (float *)gather(m, modes * sizeof *all);
        dh = all + p->cp_size * modes;
        cudaCheck(cudaMemsetAsync(dh, 0, modes * sizeof *dh));
        cema_combine_kernel<<<blocks_for(modes / 2, THREADS), THREADS>>>(dh, NULL, all, *coeffs, 1, m->lengths, p->cp_rank,
                                                                      p->cp_size, B, D, N);
        cudaCheck(cudaGetLastError());
    }
    cema_backward(dx, &s->dcoeffs, dw->cema_omega, dh, dy, a->xt, a->h, coeffs, w->cema_omega, s->futures, s->parts, B, L,
                  D, N);
    cema_coeffs_backward(dw->cema_alpha, dw->cema_delta, dw->cema_theta, dw->cema_gamma, &s->dcoeffs, w->cema_alpha,
                        w->cema_delta, w->cema_theta, D, N);
}

static void mega_forward(Model *m, int layer, const State *in, State *out, const floatX *x, int B, int L) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int D = c->model_dim, H = c->num_heads, Z = c->z_dim, E = c->value_dim, C = c->chunk_size;
    int R = B * L, dz = Z / H;
    size_t chunk = (size_t)layer * B * C;
    const int64_t *count = in ? in->count : NULL;
    float *cache_k = out && out->k ? out->k + chunk * Z : NULL, *cache_v = out && out->v ? out->v + chunk * E : NULL;

    // xt = TimestepNorm(x), mx = RMSNorm(CEMA(xt))
    timestep_norm_layer_forward(m, layer, a->xt, a->norm_mean, a->norm_rstd, x, w->timenorm_weight, w->timenorm_bias, in, out);
    cema_layer_forward(m, layer, in, out);
    rmsnorm_forward(a->mx, a->ema_rstd, a->ema, w->rmsnorm_weight, R, D, c->norm_eps);
    dropout(a->mx, a->mx, mask_of(m, layer, DROP_MX, c->hidden_dropout, D), (size_t)R * D);
    // z = mx Wz' + bz, and from its norm q and k
    linear_forward(a->z, NULL, a->mx, rounded(m, w->wz), rounded(m, w->wz_bias), R, D, Z);
    qk_forward(s->q_rotated, s->k_rotated, a->z, w->gamma, w->beta, m->rope, count, R, L, Z, dz, C, c->norm_eps);
    // v = silu(xt Wv' + bv)
    linear_forward(a->v_pre, NULL, a->xt, rounded(m, w->wv), rounded(m, w->wv_bias), R, D, E);
    silu_forward(s->v, a->v_pre, (size_t)R * E);
    attention_forward(a->o, a->lse, cache_k, cache_v, s->scores, s->chunk_k, s->chunk_v, s->q_rotated, s->k_rotated, s->v,
                      in ? m->past : NULL, mask_of_attention(m, layer), B, L, C, H, Z, E);
    // y = (mx Wh1' + bh1) + (o * r) Wh2' + x, r = silu(mx Wr' + br)
    linear_forward(a->r_pre, NULL, a->mx, rounded(m, w->wr), rounded(m, w->wr_bias), R, D, E);
    gate_forward(s->gated, a->o, a->r_pre, (size_t)R * E);
    dropout(s->gated, s->gated, mask_of(m, layer, DROP_GATED, c->hidden_dropout, E), (size_t)R * E);
    Mask mask = mask_of(m, layer, DROP_MEGA, c->dropout, D);
    const floatX *residual = mask.p > 0 ? NULL : x; // the product adds it, unless a dropout comes between
    linear_forward(a->y, residual, a->mx, rounded(m, w->wh1), rounded(m, w->wh1_bias), R, D, D);
    linear_forward(a->y, a->y, s->gated, rounded(m, w->wh2), NULL, R, E, D);
    dropout(a->y, a->y, mask, (size_t)R * D);
    if (residual == NULL) add(a->y, x, (size_t)R * D);
}

// dx = gradient by x, from dy that by y, and added to it that of the block's other residual, which may be dx itself.
static void mega_backward(Model *m, int layer, floatX *dx, const floatX *dy, const floatX *residual, const floatX *x, int B,
                          int L) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int D = c->model_dim, H = c->num_heads, Z = c->z_dim, E = c->value_dim, C = c->chunk_size;
    int R = B * L, dz = Z / H;

    const Mask mega_mask = mask_of(m, layer, DROP_MEGA, c->dropout, D);
    const Mask gated_mask = mask_of(m, layer, DROP_GATED, c->hidden_dropout, E);
    const floatX *dsum = mega_mask.p > 0 ? s->dxt : dy; // gradient by wh1's and wh2's sum
    dropout(s->dxt, dy, mega_mask, (size_t)R * D);
    linear_backward_inp(s->do_, 0, dsum, rounded(m, w->wh2), R, E, D);
    dropout(s->do_, s->do_, gated_mask, (size_t)R * E);
    gate_backward(s->gated, s->do_, s->dr_pre, s->do_, a->o, a->r_pre, (size_t)R * E);
    dropout(s->gated, s->gated, gated_mask, (size_t)R * E);
    linear_backward_weight(dw->wh2, NULL, dsum, s->gated, s->parts, R, E, D);
    linear_backward(s->dmx, 0, dw->wh1, dw->wh1_bias, dsum, a->mx, rounded(m, w->wh1), s->parts, R, D, D);
    linear_backward(s->dmx, 1, dw->wr, dw->wr_bias, s->dr_pre, a->mx, rounded(m, w->wr), s->parts, R, D, E);

    silu_forward(s->v, a->v_pre, (size_t)R * E);
    qk_forward(s->q_rotated, s->k_rotated, a->z, w->gamma, w->beta, m->rope, NULL, R, L, Z, dz, C, c->norm_eps);
    attention_backward(s->dq, s->dk, s->dv, s->scores, s->dscores, s->do_, a->lse, s->q_rotated, s->k_rotated, s->v,
                       mask_of_attention(m, layer), B, L, C, H, Z, E);
    qk_backward(s->dz, dw->gamma, dw->beta, s->dq, s->dk, a->z, w->gamma, m->rope, s->parts, R, L, Z, dz, C,
                c->norm_eps);
    linear_backward(s->dmx, 1, dw->wz, dw->wz_bias, s->dz, a->mx, rounded(m, w->wz), s->parts, R, D, Z);

    dropout(s->dmx, s->dmx, mask_of(m, layer, DROP_MX, c->hidden_dropout, D), (size_t)R * D);
    rmsnorm_backward(s->dema, dw->rmsnorm_weight, s->dmx, a->ema, w->rmsnorm_weight, a->ema_rstd, s->parts, R, D);
    cema_layer_backward(m, layer, s->dxt, s->dema);
    silu_backward(NULL, s->dv, s->dv, a->v_pre, (size_t)R * E);
    linear_backward(s->dxt, 1, dw->wv, dw->wv_bias, s->dv, a->xt, rounded(m, w->wv), s->parts, R, D, E);
    timestep_norm_layer_backward(m, dx, dw->timenorm_weight, dw->timenorm_bias, s->dxt, dy, residual, x, w->timenorm_weight,
                       a->norm_mean, a->norm_rstd);
}

// ----------------------------------------------------------------------------
// the FFN sub-layer with the block's residual: out = [alpha *] hidden W2' + x,
// hidden = silu(u W1') [* (u W3')], u = LayerNorm(y)

static void nffn_forward(Model *m, int layer, floatX *out, const floatX *x, int R) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int D = c->model_dim, F = c->ffn_hidden_dim;

    layernorm_forward(a->u, a->ffn_mean, a->ffn_rstd, a->y, w->norm_weight, w->norm_bias, R, D, c->norm_eps);
    linear_forward(a->f1, NULL, a->u, rounded(m, w->fc1), NULL, R, D, F);
    if (c->swiglu) {
        linear_forward(a->f3, NULL, a->u, rounded(m, w->fc3), NULL, R, D, F);
        gate_forward(s->hidden, a->f3, a->f1, (size_t)R * F);
    } else {
        silu_forward(s->hidden, a->f1, (size_t)R * F);
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

// dy = gradient by y, from dout. The residual's share, dout itself, is the block's to add.
static void nffn_backward(Model *m, int layer, floatX *dy, const floatX *dout, int R) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int D = c->model_dim, F = c->ffn_hidden_dim;

    const Mask hidden_mask = mask_of(m, layer, DROP_HIDDEN, c->hidden_dropout, F);
    const Mask nffn_mask = mask_of(m, layer, DROP_NFFN, c->dropout, D);
    const floatX *df2 = dout;
    if (c->rescale_nffn) {
        rescale_backward(s->dmx, dw->alpha, dout, a->f2, w->alpha, s->parts, R, D);
        df2 = s->dmx;
    }
    dropout(s->dmx, df2, nffn_mask, (size_t)R * D);
    if (nffn_mask.p > 0) df2 = s->dmx;
    linear_backward_inp(s->dhidden, 0, df2, rounded(m, w->fc2), R, F, D);
    dropout(s->dhidden, s->dhidden, hidden_mask, (size_t)R * F);
    floatX *du = s->dxt;
    if (c->swiglu) { // dhidden becomes df3
        gate_backward(s->hidden, s->dhidden, s->df1, s->dhidden, a->f3, a->f1, (size_t)R * F);
        linear_backward(du, 0, dw->fc3, NULL, s->dhidden, a->u, rounded(m, w->fc3), s->parts, R, D, F);
    } else {
        silu_backward(s->hidden, s->df1, s->dhidden, a->f1, (size_t)R * F);
    }
    dropout(s->hidden, s->hidden, hidden_mask, (size_t)R * F);
    linear_backward_weight(dw->fc2, NULL, df2, s->hidden, s->parts, R, F, D);
    linear_backward(du, c->swiglu, dw->fc1, NULL, s->df1, a->u, rounded(m, w->fc1), s->parts, R, D, F);
    layernorm_backward(dy, dw->norm_weight, dw->norm_bias, du, a->y, w->norm_weight, a->ffn_mean, a->ffn_rstd, s->parts,
                       R, D);
}

// ----------------------------------------------------------------------------
// the block: y = mega(x), out = nffn(y) + x. The second residual skips both sub-layers.

static void block_forward(Model *m, int layer, const State *in, State *out, int B, int L) {
    mega_forward(m, layer, in, out, m->x[layer], B, L);
    nffn_forward(m, layer, m->x[layer + 1], m->x[layer], B * L);
    m->acts_layer = layer;
}

static Linear linear_of(const Model *m, floatX *out, const floatX *inp, const float *weight, const float *bias, int M) {
    Linear l;
    memset(&l, 0, sizeof l);
    l.out = out, l.inp = inp, l.weight = rounded(m, weight), l.bias = bias ? rounded(m, bias) : NULL, l.M = M;
    return l;
}

// The same for a token of each of few sequences, in place of mega_forward and nffn_forward.
static void block_decode(Model *m, int layer, const State *state, int B) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const floatX *x = m->x[layer];
    int D = c->model_dim, Z = c->z_dim, E = c->value_dim, F = c->ffn_hidden_dim, C = c->chunk_size;
    int G = c->norm_num_groups, N = c->cema_ndim;
    size_t row = (size_t)layer * B;
    decode_norm(a->xt, a->ema, state->mean + row * G, state->m2 + row * G, state->h + row * 2 * N * D, x,
                w->timenorm_weight, w->timenorm_bias, m->coeffs[layer], w->cema_omega, state->count, B, D, G, N,
                c->norm_eps);
    Linears first = {
        {linear_of(m, s->v, a->xt, w->wv, w->wv_bias, E), linear_of(m, a->r_pre, a->ema, w->wr, w->wr_bias, E),
         linear_of(m, a->y, a->ema, w->wh1, w->wh1_bias, D), linear_of(m, a->z, a->ema, w->wz, w->wz_bias, Z)}};
    first.of[0].silu = 1, first.of[2].add = x;
    for (int i = 1; i < 4; i++) first.of[i].norm = RMS_NORM, first.of[i].norm_weight = w->rmsnorm_weight;
    gemv_rows(first, B, D, c->norm_eps);
    decode_attention(s->gated, state->k + row * C * Z, state->v + row * C * E, s->decode_scores, a->z, s->v, a->r_pre,
                     w->gamma, w->beta, m->rope, state->count, B, C, c->num_heads, Z, E, c->norm_eps);
    Linears wh2 = {{linear_of(m, a->y, s->gated, w->wh2, NULL, D)}},
            fc1 = {{linear_of(m, s->hidden, a->y, w->fc1, NULL, F)}};
    wh2.of[0].add = a->y;
    gemv_rows(wh2, B, E, c->norm_eps);
    fc1.of[0].norm = LAYER_NORM, fc1.of[0].norm_weight = w->norm_weight, fc1.of[0].norm_bias = w->norm_bias;
    fc1.of[0].silu = 1, fc1.of[0].gate = w->fc3 ? rounded(m, w->fc3) : NULL;
    gemv_rows(fc1, B, D, c->norm_eps);
    Linears fc2 = {{linear_of(m, m->x[layer + 1], s->hidden, w->fc2, NULL, D)}};
    fc2.of[0].add = x, fc2.of[0].scale = w->alpha;
    gemv_rows(fc2, B, F, c->norm_eps);
}

// A block's forward again, for its activations.
static void block_again(Model *m, int layer) {
    if (m->mode != MEGALODON_TRAIN && m->acts_layer != layer)
        block_forward(m, layer, m->with_before ? &m->before : NULL, NULL, m->B, m->L);
}

// Replaces scratch.dx, the gradient by the block's output, by that by its input.
static void block_backward(Model *m, int layer, int B, int L) {
    Scratch *s = &m->scratch;
    block_again(m, layer);
    nffn_backward(m, layer, s->dy, s->dx, B * L);
    mega_backward(m, layer, s->dx, s->dy, s->dx, m->x[layer], B, L);
}

// ----------------------------------------------------------------------------
// the model: tokens -> embedding -> blocks -> TimestepNorm -> output

static float embedding_scale(const Config *c) { return c->scale_emb ? (float)sqrt((double)c->model_dim) : 1; }

static void upload(void *dst, const void *src, size_t bytes) {
    cudaCheck(cudaMemcpy(dst, src, bytes, cudaMemcpyHostToDevice));
}

// Copies n acts to floats of the host.
static void download(float *dst, const floatX *src, size_t n) {
    enum { PIECE = 1 << 16 };
    static floatX piece[PIECE];
    for (size_t done = 0; done < n; done += PIECE) {
        size_t some = n - done < PIECE ? n - done : (size_t)PIECE;
        cudaCheck(cudaMemcpy(piece, src + done, some * sizeof *piece, cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < some; i++) dst[done + i] = to_float(piece[i]);
    }
}

void megalodon_dropout(Model *m, const DropoutKey *draw) {
    m->dropping = draw != NULL;
    if (draw) m->draw = *draw;
}

// A thread has a row.
static __global__ void advance_kernel(int64_t *count, int B, int64_t L) {
    int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b < B) count[b] += L;
}
static void advance(int64_t *count, int B, int64_t L) {
    advance_kernel<<<blocks_for(B, THREADS), THREADS>>>(count, B, L);
    cudaCheck(cudaGetLastError());
}

// Keeps what the backward pass, or a block's forward again, needs of the incoming state. Of a piece, layer after layer
// makes its own of it.
static void remember(Model *m, const State *state, int B) {
    const Config *c = &m->config;
    size_t layers = c->num_layers, moments = (layers + 1) * B * c->norm_num_groups * sizeof(double);
    size_t h = layers * B * 2 * c->cema_ndim * c->model_dim * sizeof(float), count = B * sizeof(int64_t);
    State *s = &m->before;
    m->with_before = state != NULL || m->cp.cp_size > 1;
    if (state) {
        cudaCheck(cudaMemcpyAsync(s->count, state->count, count, cudaMemcpyDeviceToDevice));
        cudaCheck(cudaMemcpyAsync(s->mean, state->mean, moments, cudaMemcpyDeviceToDevice));
        cudaCheck(cudaMemcpyAsync(s->m2, state->m2, moments, cudaMemcpyDeviceToDevice));
        cudaCheck(cudaMemcpyAsync(s->h, state->h, h, cudaMemcpyDeviceToDevice));
    } else if (m->with_before) {
        cudaCheck(cudaMemsetAsync(s->count, 0, count));
        cudaCheck(cudaMemsetAsync(s->mean, 0, moments)), cudaCheck(cudaMemsetAsync(s->m2, 0, moments));
        cudaCheck(cudaMemsetAsync(s->h, 0, h));
    }
    if (m->cp.cp_size == 1) return;
    advance(s->count, B, m->start);
}

// Of whole chunks a state has no keys and values. What shared memory has no room for is left to the general way.
static int can_decode(const Model *m, const State *state, int B, int L) {
    return L == 1 && B <= GEMV_ROWS && state && state->k && m->mode == MEGALODON_INFER && m->cp.cp_size == 1 &&
           !m->dropping && gemv_shared_bytes(B, m->config.model_dim) <= (size_t)gpu.max_shared &&
           gemv_shared_bytes(2, m->config.z_dim) <= SHARED_DEFAULT;
}

static void decode_token(Model *m, const State *state, int B) {
    const Config *c = &m->config;
    int D = c->model_dim, G = c->norm_num_groups, layers = c->num_layers;
    size_t row = (size_t)layers * B;
    embedding_forward(m->x[0], m->tokens, rounded(m, m->params.embed), embedding_scale(c), B, D);
    for (int l = 0; l < layers; l++) block_decode(m, l, state, B);
    decode_norm(m->final, NULL, state->mean + row * G, state->m2 + row * G, NULL, m->x[layers],
                m->params.final_norm_weight, m->params.final_norm_bias, Coeffs{}, NULL, state->count, B, D, G, 0,
                c->norm_eps);
    advance(state->count, B, 1);
}

void megalodon_forward(Model *m, State *state, const int32_t *tokens, int B, int L) {
    const Config *c = &m->config;
    int D = c->model_dim, layers = c->num_layers, piece = m->cp.cp_size > 1;
    size_t R = (size_t)B * L;
    assert(B > 0 && L > 0 && B <= m->max_B && L <= m->max_L && (!state || state->B == B));
    for (size_t i = 0; i < R; i++) assert(tokens[i] >= 0 && tokens[i] < c->vocab_size);
    m->B = B, m->L = L, m->acts_layer = -1;
    upload(m->tokens, tokens, R * sizeof *tokens);
    for (int l = 0; l < layers && !m->coeffs_valid; l++) {
        const LayerParams *w = &m->params.layers[l];
        cema_coeffs_forward(&m->coeffs[l], w->cema_alpha, w->cema_delta, w->cema_theta, w->cema_gamma, D, c->cema_ndim);
    }
    m->coeffs_valid = 1;
    if (can_decode(m, state, B, L)) return decode_token(m, state, B);
    memset(m->host_count, 0, (size_t)B * sizeof *m->host_count);
    if (state) cudaCheck(cudaMemcpy(m->host_count, state->count, B * sizeof *m->host_count, cudaMemcpyDeviceToHost));
    for (int b = 0; b < B; b++) m->past[b] = (int)(m->host_count[b] % c->chunk_size);
    if (m->mode != MEGALODON_INFER || piece) remember(m, state, B);
    const State *in = piece ? &m->before : state;
    m->joining = piece;

    embedding_forward(m->x[0], m->tokens, rounded(m, m->params.embed), embedding_scale(c), B * L, D);
    dropout(m->x[0], m->x[0], mask_of(m, -1, DROP_EMBED, c->dropout, D), R * D);
    for (int l = 0; l < layers; l++) block_forward(m, l, in, state, B, L);
    if (m->mode != MEGALODON_INFER) { // while the GPU works
        m->sorted = sort_tokens(m->host_order, m->host_segments, m->host_first, tokens, (int)R, c->vocab_size);
        upload(m->order, m->host_order, R * sizeof *m->order);
        upload(m->segments, m->host_segments, (size_t)(m->sorted.segments + m->sorted.tokens) * sizeof *m->segments);
    }
    timestep_norm_layer_forward(m, layers, m->final, m->final_mean, m->final_rstd, m->x[layers], m->params.final_norm_weight,
                      m->params.final_norm_bias, in, state);
    m->joining = 0;
    if (!state) return;
    advance(state->count, B, piece ? m->whole : L);
}

double megalodon_loss(Model *m, const int32_t *targets, double grad_scale, int64_t *counted, real *losses) {
    int R = m->B * m->L, D = m->config.model_dim, V = m->config.vocab_size;
    int grad = grad_scale > 0 && m->mode != MEGALODON_INFER;
    double sum;
    upload(m->targets, targets, (size_t)R * sizeof *targets);
    output_loss(m->totals, m->losses, grad ? m->scratch.dxt : NULL, grad ? m->grads.output : NULL, m->scratch.logits,
                m->final, rounded(m, m->params.output), m->targets, grad_scale, R, D, V);
    *counted = 0;
    for (int r = 0; r < R; r++) *counted += targets[r] >= 0;
    cudaCheck(cudaMemcpy(&sum, m->totals, sizeof sum, cudaMemcpyDeviceToHost));
    if (losses) cudaCheck(cudaMemcpy(losses, m->losses, (size_t)R * sizeof *losses, cudaMemcpyDeviceToHost));
    return sum;
}

void megalodon_backward(Model *m) {
    const Config *c = &m->config;
    int B = m->B, L = m->L, D = c->model_dim;
    Scratch *s = &m->scratch;
    assert(m->mode != MEGALODON_INFER);
    for (int b = 0; b < B; b++) assert(m->past[b] == 0);
    timestep_norm_layer_backward(m, s->dx, m->grads.final_norm_weight, m->grads.final_norm_bias, s->dxt, NULL, NULL,
                       m->x[c->num_layers], m->params.final_norm_weight, m->final_mean, m->final_rstd);
    if (m->ready) m->ready(m, c->num_layers + 1);
    for (int l = c->num_layers - 1; l >= 0; l--) {
        block_backward(m, l, B, L);
        if (m->ready) m->ready(m, l + 1);
    }
    dropout(s->dx, s->dx, mask_of(m, -1, DROP_EMBED, c->dropout, D), (size_t)B * L * D);
    embedding_backward(m->grads.embed, s->parts, s->dx, m->order, m->segments, m->sorted, embedding_scale(c), D);
    if (m->ready) m->ready(m, 0);
}

void megalodon_on_grad_ready(Model *m, void (*ready)(Model *, int segment)) { m->ready = ready; }

void megalodon_logits(Model *m, size_t first, size_t rows, real *dst) {
    int D = m->config.model_dim, V = m->config.vocab_size, most = logit_rows(V);
    assert(first + rows <= (size_t)m->B * m->L);
    for (size_t r = 0; r < rows; r += most) {
        int some = rows - r < (size_t)most ? (int)(rows - r) : most;
        const floatX *x = m->final + (first + r) * D;
        if (some <= GEMV_ROWS)
            gemv_rows(Linears{{linear_of(m, m->scratch.logits, x, m->params.output, NULL, V)}}, some, D, 0);
        else
            linear_forward(m->scratch.logits, NULL, x, rounded(m, m->params.output), NULL, some, D, V);
        download(dst + r * V, m->scratch.logits, (size_t)some * V);
    }
}

int megalodon_activation(Model *m, int layer, const char *name, real *dst) {
    const Config *c = &m->config;
    size_t R = (size_t)m->B * m->L;
    const floatX *src = m->final;
    int width = c->model_dim;
    assert(m->mode != MEGALODON_INFER);
    if (layer >= 0) {
        LayerActs *a = &m->acts[layer];
        LayerParams *w = &m->params.layers[layer];
        Scratch *s = &m->scratch;
        const int Z = c->z_dim, E = c->value_dim;
        const struct {
            const floatX *src;
            int width;
        } table[NUM_ACTIVATIONS] = {{a->xt, width},   {a->ema, width}, {a->mx, width},          {s->q_rotated, Z},
                                    {s->k_rotated, Z}, {s->v, E},       {s->gated, E},           {a->o, E},
                                    {a->y, width},    {a->u, width},   {m->x[layer + 1], width}};
        int i = 0;
        while (i < NUM_ACTIVATIONS && strcmp(name, megalodon_activations[i])) i++;
        if (i == NUM_ACTIVATIONS) return 0;
        src = table[i].src, width = table[i].width;
        if (dst) {
            block_again(m, layer);
            qk_forward(s->q_rotated, s->k_rotated, a->z, w->gamma, w->beta, NULL, NULL, (int)R, m->L, Z, Z / c->num_heads,
                       c->chunk_size, c->norm_eps);
            silu_forward(s->v, a->v_pre, R * E), silu_forward(s->gated, a->r_pre, R * E);
        }
    } else if (strcmp(name, "final_norm")) {
        return 0;
    }
    if (dst) download(dst, src, R * width);
    return width;
}

// ----------------------------------------------------------------------------
// optimizer

void megalodon_zero_grad(Model *m) {
    cudaCheck(cudaMemsetAsync(m->memory[GRADS], 0, m->num_params * sizeof *m->memory[GRADS]));
}

// A block sums a part, always the same one; a thread reads four numbers at a time. Reads the gradients.
static __global__ void square_kernel(double *parts, const float4 *x, size_t n, int more) {
    __shared__ double sums[THREADS];
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; 4 * i < n; i += (size_t)gridDim.x * THREADS) {
        float4 v = x[i]; // there is room for whole fours
        v.y = 4 * i + 1 < n ? v.y : 0, v.z = 4 * i + 2 < n ? v.z : 0, v.w = 4 * i + 3 < n ? v.w : 0;
        sum += (double)v.x * v.x + (double)v.y * v.y + ((double)v.z * v.z + (double)v.w * v.w);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) parts[blockIdx.x] = sums[0] + (more ? parts[blockIdx.x] : 0);
}

double megalodon_grad_norm(Model *m) {
    double sums[NORM_PARTS], total = 0;
    for (int s = 0; s < m->num_own; s++) {
        const float4 *grads = (const float4 *)(m->memory[GRADS] + m->own[s].first);
        square_kernel<<<NORM_PARTS, THREADS>>>(m->totals, grads, m->own[s].count, s > 0);
        cudaCheck(cudaGetLastError());
    }
    cudaCheck(cudaMemcpy(sums, m->totals, sizeof sums, cudaMemcpyDeviceToHost));
    for (int p = 0; p < NORM_PARTS; p++) total += sums[p];
    return sqrt(total);
}

// AdamW, see megalodon.c, and the parameters rounded anew. A thread has four parameters; blocks of memory have room for
// whole fours. Reads 16 bytes and writes 12 and an floatX for each parameter.
typedef struct {
    float b1, b2, c1, c2, eps, scale, step, root, keep;
} Factors;

static __global__ void update_kernel(float4 *params, floatX *rounded, float4 *moment1, float4 *moment2,
                                     const float4 *grads, Factors f, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * i >= n) return;
    float4 p4 = params[i], m4 = moment1[i], v4 = moment2[i], g4 = grads[i];
    float p[4] = {p4.x, p4.y, p4.z, p4.w}, m1[4] = {m4.x, m4.y, m4.z, m4.w}, m2[4] = {v4.x, v4.y, v4.z, v4.w};
    const float grad[4] = {g4.x, g4.y, g4.z, g4.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float g = grad[k] * f.scale;
        m1[k] = f.b1 * m1[k] + f.c1 * g;
        m2[k] = f.b2 * m2[k] + f.c2 * g * g;
        p[k] = p[k] * f.keep - f.step * m1[k] / (sqrtf(m2[k]) * f.root + f.eps) + (m2[k] - m2[k]);
    }
    params[i] = make_float4(p[0], p[1], p[2], p[3]);
    moment1[i] = make_float4(m1[0], m1[1], m1[2], m1[3]);
    moment2[i] = make_float4(m2[0], m2[1], m2[2], m2[3]);
    if (sizeof(floatX) < 4) store<4>(rounded + 4 * i, p);
}

void megalodon_update(Model *m, const AdamW *o, double lr, double grad_scale, int64_t update) {
    double k = (double)update + 1;
    Factors f = {(float)o->beta1,
                 (float)o->beta2,
                 (float)(1 - o->beta1),
                 (float)(1 - o->beta2),
                 (float)o->eps,
                 (float)grad_scale,
                 (float)(lr / (1 - pow(o->beta1, k))),
                 (float)(1 / sqrt(1 - pow(o->beta2, k))),
                 (float)(1 - lr * o->weight_decay)};
    float *moment1 = m->memory[MOMENT1], *moment2 = m->memory[MOMENT2];
    for (int s = 0; s < m->num_own; s++) {
        size_t first = m->own[s].first, n = m->own[s].count; // all of whole fours, but for the block's end
        if (n == 0) continue;
        update_kernel<<<blocks_for(n, 4 * THREADS), THREADS>>>((float4 *)(m->memory[PARAMS] + first),
                                                               m->rounded + first, (float4 *)moment1, (float4 *)moment2,
                                                               (const float4 *)(m->memory[GRADS] + first), f, n);
        cudaCheck(cudaGetLastError());
        moment1 += n, moment2 += n;
    }
    m->coeffs_valid = 0;
}

// ----------------------------------------------------------------------------
// memory

static void acts_take(Model *m, Arena *arena) {
    const Config *c = &m->config;
    int layers = c->num_layers, B = m->max_B, L = m->max_L;
    size_t R = (size_t)B * L, D = c->model_dim, G = c->norm_num_groups;
    size_t kept = arena->used;
    for (int l = 0; l < layers; l++) {
        if (m->mode != MEGALODON_TRAIN) arena->used = kept; // every layer gets the same memory
        layer_acts_take(&m->acts[l], arena, c, B, L);
    }
    floatX *in = NULL, *out = NULL;
    for (int l = 0; l <= layers; l++) {
        floatX **x = l % 2 ? &out : &in; // without a backward pass two take turns
        if (m->mode != MEGALODON_INFER || l < 2) take(x, arena, R * D);
        m->x[l] = *x;
    }
    take(&m->final_mean, arena, R * G), take(&m->final_rstd, arena, R * G), take(&m->final, arena, R * D);
}

static void work_take(Model *m, Arena *arena) {
    const Config *c = &m->config;
    size_t R = (size_t)m->max_B * m->max_L, rows = (size_t)m->max_B * c->num_layers;
    scratch_take(&m->scratch, arena, c, m->mode, m->max_B, m->max_L);
    take(&m->rope, arena, (size_t)c->chunk_size * (c->z_dim / c->num_heads / 2));
    for (int l = 0; l < c->num_layers; l++) coeffs_take(&m->coeffs[l], arena, c);
    take(&m->losses, arena, R), take(&m->totals, arena, NORM_PARTS);
    take(&m->tokens, arena, R), take(&m->targets, arena, R);
    size_t moments = (rows + m->max_B) * c->norm_num_groups;
    take(&m->before.count, arena, m->max_B);
    take(&m->before.mean, arena, moments), take(&m->before.m2, arena, moments);
    take(&m->before.h, arena, rows * 2 * c->cema_ndim * c->model_dim);
    if (m->mode == MEGALODON_INFER) return;
    take(&m->order, arena, R), take(&m->segments, arena, 2 * R);
}

static int shard_part = 0, shard_parts = 1;

void megalodon_set_shard(int part, int parts) { shard_part = part, shard_parts = parts; }

// A model with its tables but no memory for numbers.
static Model *model_outline(const Config *config, Mode mode, int B, int L) {
    size_t layers = (size_t)config->num_layers, R = (size_t)B * L;
    Model *m = (Model *)calloc(1, sizeof *m);
    if (!m) return NULL;
    m->config = *config, m->mode = mode, m->max_B = B, m->max_L = L, m->acts_layer = -1;
    m->cp.cp_size = 1;
    m->tensors = megalodon_tensors(config, &m->num_tensors, &m->num_params);
    m->own = megalodon_shards(config, shard_part, shard_parts, &m->num_own);
    for (int s = 0; m->own && s < m->num_own; s++) m->owned += m->own[s].count;
    m->params.layers = (LayerParams *)calloc(layers, sizeof *m->params.layers);
    m->grads.layers = (LayerParams *)calloc(layers, sizeof *m->grads.layers);
    m->acts = (LayerActs *)calloc(layers, sizeof *m->acts);
    m->x = (floatX **)calloc(layers + 1, sizeof *m->x);
    m->coeffs = (Coeffs *)calloc(layers, sizeof *m->coeffs);
    m->host_count = (int64_t *)calloc(B, sizeof *m->host_count);
    m->past = (int *)calloc(B, sizeof *m->past);
    m->host_order = (int *)malloc(R * sizeof *m->host_order);
    m->host_segments = (Segment *)malloc(2 * R * sizeof *m->host_segments);
    m->host_first = (int *)malloc(((size_t)config->vocab_size + 1) * sizeof *m->host_first);
    if (m->tensors && m->own && m->params.layers && m->grads.layers && m->acts && m->x && m->coeffs && m->host_count &&
        m->past && m->host_order && m->host_segments && m->host_first)
        return m;
    megalodon_free(m);
    return NULL;
}

// Bytes of a block of parameters, and of what they are rounded to: of whole vectors.
static size_t block_bytes(size_t n) { return (n * sizeof(float) + 255) / 256 * 256; }
static size_t rounded_bytes(const Model *m) { return sizeof(floatX) < 4 ? block_bytes(m->num_params) / 2 : 0; }

// Ends the program if a kernel cannot run on this device with these dimensions. What else depends on them stays below
// SHARED_NEEDED: TimestepNorm's kernels have at most 32 * (128 + 2) * sizeof(NormGrad) and 4 * model_dim bytes of
// shared memory; decoding leaves to the general path what its kernels have no room for.
static void check_dimensions(const Config *c, Mode mode) {
    int dz = c->z_dim / c->num_heads, most = gpu.max_shared / (int)qk_backward_shared(1);
    if (c->model_dim > MOST_COLUMNS) {
        fprintf(stderr, "error: --model-dim %d: on a GPU it is at most %d\n", c->model_dim, MOST_COLUMNS);
        exit(1);
    }
    if (mode != MEGALODON_INFER && dz > most) {
        fprintf(stderr,
                "error: --z-dim %d with --num-heads %d: training on this GPU allows at most %d numbers per head (%d "
                "bytes of shared memory per thread block), these are %d\n",
                c->z_dim, c->num_heads, most, gpu.max_shared + SHARED_DECLARED, dz);
        exit(1);
    }
}

MemoryPlan megalodon_memory(const Config *config, Mode mode, int B, int L) {
    MemoryPlan plan = {0, 0, 0, 0, 0};
    gpu_open();
    check_dimensions(config, mode);
    Model *m = model_outline(config, mode, B, L);
    if (!m) return plan;
    Arena acts = {NULL, 0}, work = {NULL, 0};
    acts_take(m, &acts);
    work_take(m, &work);
    plan.params = block_bytes(m->num_params) + rounded_bytes(m);
    if (mode != MEGALODON_INFER) plan.grads = block_bytes(m->num_params), plan.moments = 2 * block_bytes(m->owned);
    plan.activations = acts.used;
    plan.scratch = work.used;
    megalodon_free(m);
    return plan;
}

static void *zeros(size_t bytes) {
    void *memory = device_new(bytes);
    if (memory) cudaCheck(cudaMemset(memory, 0, bytes));
    return memory;
}

Model *megalodon_new(const Config *config, Mode mode, int B, int L) {
    Model *m = model_outline(config, mode, B, L);
    if (!m) return NULL;
    MemoryPlan plan = m->plan = megalodon_memory(config, mode, B, L);
    size_t n = block_bytes(m->num_params) / sizeof(float);
    m->params_memory = zeros(plan.params);
    m->acts_memory = zeros(plan.activations);
    m->work_memory = zeros(plan.scratch);
    int complete = m->params_memory && m->acts_memory && m->work_memory;
    m->memory[PARAMS] = (float *)m->params_memory;
    if (complete && mode != MEGALODON_INFER) {
        m->memory[GRADS] = (float *)zeros(plan.grads);
        m->moments_memory = zeros(plan.moments);
        complete = m->memory[GRADS] && m->moments_memory;
        m->memory[MOMENT1] = (float *)m->moments_memory;
        if (complete) m->memory[MOMENT2] = m->memory[MOMENT1] + block_bytes(m->owned) / sizeof(float);
    }
    if (!complete) {
        megalodon_free(m);
        return NULL;
    }
    m->rounded = sizeof(floatX) < 4 ? (floatX *)(void *)(m->memory[PARAMS] + n) : (floatX *)(void *)m->memory[PARAMS];
    Arena acts = {(char *)m->acts_memory, 0}, work = {(char *)m->work_memory, 0};
    acts_take(m, &acts);
    work_take(m, &work);
    megalodon_point(&m->params, m->memory[PARAMS], config, m->tensors, m->num_tensors);
    if (mode != MEGALODON_INFER) megalodon_point(&m->grads, m->memory[GRADS], config, m->tensors, m->num_tensors);
    rope_table(m->rope, config->chunk_size, config->z_dim / config->num_heads, config->rope_base);
    return m;
}

void megalodon_free(Model *m) {
    if (!m) return;
    pieces_free(m);
    device_free(m->params_memory, m->plan.params), device_free(m->memory[GRADS], m->plan.grads);
    device_free(m->moments_memory, m->plan.moments);
    device_free(m->acts_memory, m->plan.activations), device_free(m->work_memory, m->plan.scratch);
    free(m->tensors), free(m->own), free(m->params.layers), free(m->grads.layers), free(m->acts), free(m->x),
        free(m->coeffs);
    free(m->host_count), free(m->past), free(m->host_order), free(m->host_segments), free(m->host_first);
    free(m);
}

// Copies what this process has of elements first .. first + n - 1, to dst or from src. Returns how many these are.
static size_t buffer_copy(Model *m, Buffer buffer, size_t first, size_t n, real *dst, const real *src) {
    Shard whole = {0, m->num_params}, *held = buffer < MOMENT1 ? &whole : m->own;
    int ranges = buffer < MOMENT1 ? 1 : m->num_own;
    size_t copied = 0;
    float *at = m->memory[buffer]; // of a range
    assert(at && first + n <= m->num_params);
    for (int s = 0; s < ranges; at += held[s++].count) {
        size_t from = first > held[s].first ? first : held[s].first, to = held[s].first + held[s].count;
        if (first + n < to) to = first + n;
        if (from >= to) continue;
        float *here = at + (from - held[s].first);
        if (dst) cudaCheck(cudaMemcpy(dst + (from - first), here, (to - from) * sizeof *dst, cudaMemcpyDefault));
        if (src) cudaCheck(cudaMemcpy(here, src + (from - first), (to - from) * sizeof *src, cudaMemcpyDefault));
        copied += to - from;
    }
    return copied;
}

void megalodon_read(Model *m, Buffer buffer, size_t first, size_t n, real *dst) {
    size_t copied = buffer_copy(m, buffer, first, n, dst, NULL);
    assert(copied == n);
    (void)copied;
}

float *megalodon_device_ptr(Model *m, Buffer buffer) { return m->memory[buffer]; }

void megalodon_write(Model *m, Buffer buffer, size_t first, size_t n, const real *src) {
    buffer_copy(m, buffer, first, n, NULL, src);
    if (buffer != PARAMS) return;
    if (sizeof(floatX) < 4) narrow(m->rounded + first, m->memory[PARAMS] + first, n);
    m->coeffs_valid = 0;
}

State *state_new(const Config *c, int B, int whole_chunks) {
    gpu_open();
    const size_t bytes = state_bytes(c, B, whole_chunks);
    State *s = (State *)calloc(1, sizeof *s);
    void *memory = s ? zeros(bytes) : NULL;
    if (!memory) {
        free(s);
        return NULL;
    }
    *s = state_point(memory, c, B, whole_chunks);
    return s;
}

void state_free(State *s) {
    if (!s) return;
    device_free(s->memory, s->bytes);
    free(s);
}

// k and v need not be cleared: what lies beyond count % C is not read.
void state_reset(State *s, int row) {
    size_t moments = (size_t)s->G * sizeof *s->mean, modes = s->modes * sizeof *s->h;
    cudaCheck(cudaMemsetAsync(s->count + row, 0, sizeof *s->count));
    for (size_t i = (size_t)row; i < (size_t)(s->layers + 1) * s->B; i += (size_t)s->B) {
        cudaCheck(cudaMemsetAsync(s->mean + i * s->G, 0, moments));
        cudaCheck(cudaMemsetAsync(s->m2 + i * s->G, 0, moments));
        if (i < (size_t)s->layers * s->B) cudaCheck(cudaMemsetAsync(s->h + i * s->modes, 0, modes));
    }
}

void state_read(const State *s, size_t first, size_t bytes, void *dst) {
    assert(first + bytes <= s->bytes);
    cudaCheck(cudaMemcpy(dst, (char *)s->memory + first, bytes, cudaMemcpyDeviceToHost));
}

void state_write(State *s, size_t first, size_t bytes, const void *src) {
    assert(first + bytes <= s->bytes);
    upload((char *)s->memory + first, src, bytes);
}

// ----------------------------------------------------------------------------
// the machine

void megalodon_threads(int threads) { (void)threads; } // the device has its own

int megalodon_on_gpu(void) { return 1; }

size_t megalodon_available_memory(int processes) {
    size_t free_bytes, total;
    gpu_open();
    cudaCheck(cudaMemGetInfo(&free_bytes, &total));
    return free_bytes / ceil_div(processes, gpu.devices);
}

size_t megalodon_peak_memory(void) { return gpu.peak; }

const char *megalodon_backend(void) {
    gpu_open();
    return gpu.name;
}
