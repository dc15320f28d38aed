// device.cuh: what megalodon.cu needs beside the layers: how functions hand over to kernels/, error checks, device memory,
// cuBLAS, sums over threads, and what plumbing/model.h asks of a backend. Included by megalodon.cu after model.h.
#pragma once

enum { BLAS_WORKSPACE = 1 << 25 }; // bytes of cuBLAS's workspace

// Thread blocks of `threads` threads for n elements.
static unsigned blocks_for(size_t n, int threads) { return (unsigned)((n + (size_t)threads - 1) / (size_t)threads); }

// Index of this thread in the grid, and the number of threads of the grid.
static __device__ size_t thread_index(void) { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }
static __device__ size_t grid_threads(void) { return (size_t)gridDim.x * blockDim.x; }
// A grid for n elements. With more than MAX_BLOCKS thread blocks a thread has several elements.
#define ELEMENT_GRID(n) ((n) / THREADS < MAX_BLOCKS ? (unsigned)((n) / THREADS + 1) : (unsigned)MAX_BLOCKS), THREADS

// The column of this thread, in kernels whose blockIdx.x is a row or a token block, and whose blockIdx.y counts thread
// blocks along the columns. It may be D or more.
static __device__ int channel(void) { return blockIdx.y * blockDim.x + threadIdx.x; }
#define COLUMN_GRID(R, D) dim3((unsigned)(R), ceil_div(D, THREADS)), THREADS

// The row of this warp, in kernels whose thread blocks have ROW_WARPS warps with a row each. It may be R or more.
static __device__ size_t warp_row(void) { return (size_t)blockIdx.x * ROW_WARPS + threadIdx.y; }
#define ROW_GRID(R) blocks_for((size_t)(R), ROW_WARPS), dim3(WARP, ROW_WARPS)

// FAST(supported, call): if a fast version in kernels/ supports this case, returns by calling it. There are no fast
// versions for float32, and none with `make cuda PLAIN=1`.
// BESIDE(call): nothing needs what the call computes before the next JOIN(). Kernels of both may run at the same time, in
// a step that is a graph: see kernels/beside.cuh.
#if defined MEGALODON_FP32 || defined MEGALODON_PLAIN
#define FAST(supported, call)
#define BESIDE(call) call
#define JOIN()
#else
#define FAST_KERNELS
#define FAST(supported, call)                                                                                          \
    if (!gpu.plain && (supported)) return call
#define BESIDE(call) (beside_begin(), call, beside_end())
#define JOIN() beside_join()
#endif

// HOPPER(supported, call): if the GPU is a Hopper (compute capability 9.0) and one of its own kernels supports this case,
// returns by calling it.
#if defined FAST_KERNELS && defined __CUDACC__ && CUDART_VERSION >= 12050
#define HOPPER_KERNELS
#define HOPPER(supported, call)                                                                                        \
    if (gpu.hopper && !gpu.plain && (supported)) return call
static int has_hopper_code(void);
#else
#define HOPPER(supported, call)
#endif

static struct {
    int open;          // the fields below are set
    int devices;       // GPUs of this machine
    int plain;         // no kernel of kernels/ is used: there are none, or MEGALODON_PLAIN is set
    int hopper;        // kernels for compute capability 9.0 can be used
    int processors;    // multiprocessors
    size_t max_shared; // bytes of shared memory that a thread block can have
    char name[300];    // for megalodon_backend()
    size_t used, peak; // bytes of device memory allocated by this program
    cublasHandle_t blas;
    void *blas_workspace; // BLAS_WORKSPACE bytes, see "Results Reproducibility" in cuBLAS's documentation
    cudaStream_t stream;  // of products and of sums of parts: stream 0, or the one of kernels/beside.cuh
    char *workspace;      // scratch.workspace of the model that is running, see workspace()
    size_t workspace_bytes, workspace_asked; // its size, and the most that a layer has asked for
} gpu;

static void check_cuda(cudaError_t status, const char *file, int line) {
    if (status == cudaSuccess) return;
    fprintf(stderr, "error: %s:%d: CUDA: %s\n", file, line, cudaGetErrorString(status));
    exit(1);
}
static void check_blas(cublasStatus_t status, const char *file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fprintf(stderr, "error: %s:%d: cuBLAS: status %d\n", file, line, (int)status);
    exit(1);
}
#define cudaCheck(call) check_cuda((call), __FILE__, __LINE__)
#define cublasCheck(call) check_blas((call), __FILE__, __LINE__)

// Device memory, zeroed. Returns NULL if the device has not enough.
static void *memory_new(size_t bytes) {
    void *memory = NULL;
    cudaError_t status = cudaMalloc(&memory, bytes > 0 ? bytes : 1);
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError(); // clear the sticky error
        return NULL;
    }
    cudaCheck(status);
    cudaCheck(cudaMemset(memory, 0, bytes));
    gpu.used += bytes;
    gpu.peak = gpu.peak > gpu.used ? gpu.peak : gpu.used;
    return memory;
}
#ifdef FAST_KERNELS
static void graphs_drop(void); // in kernels/graph.cuh: graphs may refer to memory
#else
static void graphs_drop(void) {}
#endif
static void memory_free(void *memory, size_t bytes) {
    if (memory == NULL) return;
    graphs_drop();
    cudaCheck(cudaFree(memory));
    gpu.used -= bytes;
}
static void memory_copy(void *dst, const void *src, size_t bytes) {
    cudaCheck(cudaGetLastError()); // reports errors of kernel launches since the last copy
    cudaCheck(cudaMemcpy(dst, src, bytes, cudaMemcpyDefault));
}
static void copy(floatX *dst, const floatX *src, size_t n) { // within device memory
    cudaCheck(cudaMemcpyAsync(dst, src, n * sizeof *dst, cudaMemcpyDeviceToDevice, 0));
}
static void memory_clear(void *memory, size_t bytes) { cudaCheck(cudaMemsetAsync(memory, 0, bytes)); }

// Scratch memory of the layer function that is running: the next one overwrites it. See workspace_size().
static void *workspace(size_t bytes) {
    assert(bytes <= gpu.workspace_bytes);
    if (bytes > gpu.workspace_asked) gpu.workspace_asked = bytes;
    return gpu.workspace;
}

// floatX and float. Mapping of both kernels: a thread has an element.
static __global__ void to_float_kernel(float *out, const floatX *inp, size_t n) {
    size_t i = thread_index();
    if (i < n) out[i] = to_float(inp[i]);
}
static __global__ void to_floatX_kernel(floatX *out, const float *inp, size_t n) {
    size_t i = thread_index();
    if (i < n) out[i] = to_floatX(inp[i]);
}
static void copy_to_float(float *out, const floatX *inp, size_t n) {
    if (n > 0) to_float_kernel<<<blocks_for(n, THREADS), THREADS>>>(out, inp, n);
}
static void copy_to_floatX(floatX *out, const float *inp, size_t n) {
    if (n > 0) to_floatX_kernel<<<blocks_for(n, THREADS), THREADS>>>(out, inp, n);
}

// The token counts of a state are in device memory, so that in decoding the host does not wait for the device.
// Formula: count (B) += L. Mapping: a thread block has a sequence.
static __global__ void advance_kernel(int64_t *count, int64_t L) { count[blockIdx.x] += L; }
static void advance(int64_t *count, int B, int64_t L) { advance_kernel<<<B, 1>>>(count, L); }

// Ends the program if its kernels cannot run on the device.
static void check_device(const cudaDeviceProp *properties) {
    int major = properties->major, minor = properties->minor, is_float = sizeof(floatX) == sizeof(float);
    int needed = is_float ? 75 : 80;
    if (10 * major + minor < needed) {
        fprintf(stderr, "error: %s has compute capability %d.%d; this program needs %d.%d%s\n", properties->name, major,
                minor, needed / 10, needed % 10,
                is_float ? ". ./train and ./sample run on the CPU" : ". The float32 programs (_fp32) need 7.5");
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

static int backend_open(int allocate) {
    int count = 0, shared = 0;
    cudaDeviceProp properties;
    (void)allocate;
    if (gpu.open) return 1;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0) {
        fprintf(stderr, "error: no CUDA GPU: %s. ./train and ./sample run without one\n",
                status == cudaSuccess ? "none found" : cudaGetErrorString(status));
        exit(1);
    }
    int number = local_rank() % count; // consecutive processes of a machine get different GPUs
    gpu.devices = count;
    cudaCheck(cudaSetDevice(number));
    cudaCheck(cudaGetDeviceProperties(&properties, number));
    cudaCheck(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, number));
    check_device(&properties);
    const char *plain = getenv("MEGALODON_PLAIN");
    gpu.plain = plain != NULL && strcmp(plain, "0") != 0;
#ifndef FAST_KERNELS
    gpu.plain = 1;
#endif
    gpu.processors = properties.multiProcessorCount;
#ifdef HOPPER_KERNELS
    gpu.hopper = properties.major == 9 && has_hopper_code();
#endif
    gpu.max_shared = (size_t)shared;
    snprintf(gpu.name, sizeof gpu.name, "CUDA, %s (sm_%d%d), %s%s", properties.name, properties.major, properties.minor,
             sizeof(floatX) == 4 ? "float32" : "bfloat16", gpu.plain ? ", plain kernels" : "");
    cublasCheck(cublasCreate(&gpu.blas));
    gpu.stream = cudaStreamPerThread; // stream 0, see -default-stream in Makefile
    cublasCheck(cublasSetStream(gpu.blas, gpu.stream));
    gpu.blas_workspace = memory_new(BLAS_WORKSPACE);
    if (gpu.blas_workspace == NULL) {
        fprintf(stderr, "error: %s: out of memory on the GPU\n", gpu.name);
        exit(1);
    }
    cublasCheck(cublasSetWorkspace(gpu.blas, gpu.blas_workspace, BLAS_WORKSPACE));
    cublasCheck(cublasSetMathMode(gpu.blas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    gpu.open = 1;
    return 1;
}

// ----------------------------------------------------------------------------
// sums and maxima over the threads of a warp or of a thread block

// Sum and maximum over the lanes of a warp; every lane gets the result.
static __device__ float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
static __device__ double warp_sum(double x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
static __device__ float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// The sum, or the maximum, over a thread block of THREADS threads; every thread gets the result.
static __device__ double block_sum(double x) {
    __shared__ double sums[WARP];
    x = warp_sum(x);
    __syncthreads(); // all threads have read the results of the last call
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % WARP < THREADS / WARP ? sums[threadIdx.x % WARP] : 0.0);
}
static __device__ float block_max(float x) {
    __shared__ float maxima[WARP];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) maxima[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_max(threadIdx.x % WARP < THREADS / WARP ? maxima[threadIdx.x % WARP] : -INFINITY);
}

// ----------------------------------------------------------------------------
// memory that the layers use while they run, see "provided by the backend" in model.h

static int tile_batch(Dims d);
static size_t tile_scores(int C);
static size_t timestep_norm_workspace(Dims d);
static size_t cema_workspace(Dims d);
static size_t attention_workspace(Dims d);
static size_t embedding_workspace(Dims d);
#ifdef FAST_KERNELS
static size_t attention_fast_scores(Dims d);
static size_t fast_workspace(Dims d);
#endif

static size_t coeffs_stride(int D) { return (size_t)D; }

static size_t scores_size(const Model *m, Dims d) {
    size_t plain = tile_batch(d) * tile_scores(d.C), most = plain;
#ifdef FAST_KERNELS
    size_t fast = attention_fast_scores(d);
    most = fast > most ? fast : most;
#endif
    return m->mode == MEGALODON_INFER ? most : 2 * most;
}

static size_t workspace_size(const Model *m, Dims d) {
    size_t widest = (size_t)max_int(max_int(d.D, d.E), max_int(2 * d.Z, d.F)), embedding = 0;
    if (m->mode != MEGALODON_INFER) embedding = embedding_workspace(d);
    size_t sizes[] = {timestep_norm_workspace(d), cema_workspace(d), attention_workspace(d),
                      SUM_PARTS * widest * sizeof(float), embedding},
           most = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) most = sizes[i] > most ? sizes[i] : most;
#ifdef FAST_KERNELS
    size_t fast = fast_workspace(d);
    most = fast > most ? fast : most;
#endif
    return most;
}

// Selects the model's workspace. The public functions that run layers call this first.
static void begin_layers(Model *m) {
    gpu.workspace = m->scratch.workspace;
    gpu.workspace_bytes = workspace_size(m, dims_of(&m->config, m->max_B, m->max_L));
}

static float to_float(double x) { return (float)x; }

// Copies n elements from the device to floats in host memory.
template <typename T> static void read_numbers(float *dst, const T *src, size_t n) {
    enum { BUFFER = 1 << 16 };
    static T buffer[BUFFER];
    for (size_t done = 0; done < n; done += BUFFER) {
        size_t some = n - done < BUFFER ? n - done : (size_t)BUFFER;
        memory_copy(buffer, src + done, some * sizeof *buffer);
        for (size_t i = 0; i < some; i++) dst[done + i] = to_float(buffer[i]);
    }
}
static void read_floatX(float *dst, const floatX *src, size_t n) { read_numbers(dst, src, n); }

static void params_written(Model *m, size_t first, size_t n) {
    if (sizeof(floatX) < sizeof(float)) copy_to_floatX(m->rounded + first, m->memory[PARAMS] + first, n);
}

// ----------------------------------------------------------------------------
// the machine's functions of megalodon.h

static int backend_threads(void) { return 1; }

float *megalodon_device_ptr(Model *m, Buffer buffer) { return m->memory[buffer]; }

void megalodon_threads(int threads) { (void)threads; }

int megalodon_on_gpu(void) { return 1; }

size_t megalodon_available_memory(int processes) {
    size_t free_bytes, total;
    backend_open(0);
    cudaCheck(cudaMemGetInfo(&free_bytes, &total));
    return free_bytes / ceil_div(processes, gpu.devices);
}

size_t megalodon_peak_memory(void) { return gpu.peak; }

// Random numbers in -1..1: products of zeros would take less power, and so less time. Mapping: a thread has 4 elements.
static __global__ void random_kernel(floatX *out, size_t n) {
    size_t i = thread_index();
    uint32_t words[4];
    if (4 * i >= n) return;
    megalodon_philox(words, 1, 0, 0, 0, (uint32_t)i);
    for (int k = 0; k < 4; k++) out[4 * i + k] = to_floatX((float)words[k] * (2.0f / 4294967296.0f) - 1);
}

// The mean of PRODUCTS products that are queued one after another, after one more. Their memory does not count as used.
static double product_seconds(int side) {
    const float alpha = 1, beta = 0;
    double start = 0;
    if (!backend_open(1)) return 0;
    size_t n = (size_t)side * side, bytes = 3 * n * sizeof(floatX), peak = gpu.peak;
    floatX *A = (floatX *)memory_new(bytes);
    if (A == NULL) return 0;
    floatX *B = A + n, *C = B + n;
    random_kernel<<<blocks_for(2 * n / 4, THREADS), THREADS>>>(A, 2 * n);
    for (int i = -1; i < PRODUCTS; i++) {
        if (i == 0) {
            cudaCheck(cudaDeviceSynchronize());
            start = seconds();
        }
        cublasCheck(cublasGemmEx(gpu.blas, CUBLAS_OP_T, CUBLAS_OP_N, side, side, side, &alpha, B, CUBLAS_TYPE, side, A,
                                 CUBLAS_TYPE, side, &beta, C, CUBLAS_TYPE, side, CUBLAS_COMPUTE_32F,
                                 CUBLAS_GEMM_DEFAULT));
    }
    cudaCheck(cudaDeviceSynchronize());
    double time = (seconds() - start) / PRODUCTS;
    memory_free(A, bytes);
    gpu.peak = peak;
    return time;
}

const char *megalodon_backend(void) {
    backend_open(0);
    return gpu.name;
}
