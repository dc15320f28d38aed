/*
common.cuh: what several fast kernels use. megalodon.cu includes kernels/ in bfloat16 builds only, so a floatX is a
bfloat16 here, and needs compute capability 8.0 or more.

1. Vectors. Memory is read fastest in words of 16 bytes a thread: VEC elements of type floatX. A kernel loads VEC
   elements, computes in float, and stores VEC elements. Hence rows must be a multiple of VEC elements long, and begin
   at a multiple of 16 bytes.
2. Shared memory. All kernels together need no more than the 99 KB of a thread block that GPUs of compute capability
   8.6, 8.9 and 12.0 have (8.0 has 163 KB, 9.0 has 227 KB).
3. Columns. In kernels that need one number for each column (a weight, or a sum over rows), a thread owns a few columns
   and goes through rows, so that this number stays in registers:

               ACROSS * W columns (blockIdx.y)
            +------+------+- - -+------+
    row 0   |thread|thread|     |thread|  a thread owns W neighbouring columns and every `down`-th row of this
    row 1   |      |      |     |      |  thread block's rows; it leaves one part of each of its sums in `parts`,
    ...     +------+------+- - -+------+  and sum_parts_fast() adds the parts in a fixed order

Measured: see dev/notes/kernels.md
*/
#pragma once
#include <stdint.h>

enum {
    VEC = 8,          // elements of type floatX in 16 bytes
    ACROSS = 128,     // threads side by side in a row, where threads own columns
    MAX_PARTS = 1024, // parts of a sum over rows, at most
    // shared memory of a thread block, in bytes
    SHARED_TOTAL = 99 << 10,   // what every supported device allows
    SHARED_DECLARED = 2 << 10, // at most this much is declared in a kernel that has dynamic shared memory, too
    SHARED_DEFAULT = 48 << 10  // what a kernel may use without cudaFuncSetAttribute
};

// ----------------------------------------------------------------------------
// vectors of W elements: 1, 2, 4 or VEC

template <int W> struct alignas(W * sizeof(floatX)) Vec { floatX v[W]; };
template <int W> static __device__ void load(float x[W], const floatX *src) {
    Vec<W> vec = *(const Vec<W> *)src;
#pragma unroll
    for (int i = 0; i < W; i++) x[i] = to_float(vec.v[i]);
}
template <int W> static __device__ void store(floatX *dst, const float x[W]) {
    Vec<W> vec;
#pragma unroll
    for (int i = 0; i < W; i++) vec.v[i] = to_floatX(x[i]);
    *(Vec<W> *)dst = vec;
}

// VEC floats, in two words of 16 bytes if they begin at a multiple of 16 bytes. Parameters may begin anywhere.
static __device__ void load_floats(float x[VEC], const float *src) {
    if ((uintptr_t)src % 16 == 0) {
        float4 low = *(const float4 *)src, high = *((const float4 *)src + 1);
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z,
        x[7] = high.w;
        return;
    }
    for (int i = 0; i < VEC; i++) x[i] = src[i];
}

// Sums of squares above LARGE may have overflowed. They are computed again, of numbers times SMALL_UNIT: then squares
// cannot overflow, and those that matter in such a sum do not underflow.
static const float LARGE = 1e37f, SMALL_UNIT = 0x1p-80f;

// By the instructions for e^x and 1/x, which err by a few units in the last place of a float.
static __device__ float sigmoid_fast(float x) { return __fdividef(1, 1 + __expf(-x)); }

// Raises a kernel's limit of dynamic shared memory, if it is too low. The default includes what the kernel declares.
template <typename Kernel> static void allow_shared(Kernel kernel, size_t bytes) {
    if (bytes > SHARED_DEFAULT - SHARED_DECLARED)
        cudaCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// ----------------------------------------------------------------------------
// threads that own columns, see 3. above

typedef struct {
    int c;    // first of this thread's W columns
    int row;  // its first row, of `down`; -1: this thread has no columns
    int down; // rows of threads in the thread block
} Place;

static __host__ __device__ int threads_across(int W, int D) { return min_int(ACROSS, ceil_div(D, W)); }

template <int W> static __device__ Place place(int D) {
    int across = threads_across(W, D), down = blockDim.x / across;
    Place p = {(int)(blockIdx.y * across + threadIdx.x % across) * W, (int)threadIdx.x / across, down};
    if (p.row >= down || p.c >= D) p.row = -1;
    return p;
}

// Rows of threads in a thread block of THREADS threads, and the grid in which `blocks` thread blocks share the rows.
static int threads_down(int W, int D) { return THREADS / threads_across(W, D); }
static dim3 column_grid(int W, int blocks, int D) { return dim3(blocks, ceil_div(ceil_div(D, W), ACROSS)); }

// Parts of a sum over R rows, at most.
static int max_parts(int R) { return min_int(R + THREADS, MAX_PARTS); }

// The number of thread blocks that share R rows, where each leaves threads_down(W, D) parts.
static int column_blocks(int W, int R, int D) {
    int down = threads_down(W, D);
    return max_int(min_int(ceil_div(R, down), MAX_PARTS / down), 1);
}

// Formula: as sum_parts() of megalodon.cu, of the first n columns into out; the n2 columns after them are summed into
//   out2. Mapping: a thread block has 32 columns; warp threadIdx.y has every 32nd part.
// Memory: reads P*(n + n2) floats, AT_ONCE of them in flight in each thread.
// Passes: 1. each thread sums its parts. 2. transposed in shared memory, each warp adds the sums of one column.
static __global__ void sum_parts_fast_kernel(float *out, float *out2, const float *parts, int P, size_t n, size_t n2,
                                             int add) {
    enum { AT_ONCE = MAX_PARTS / WARP };
    __shared__ float sums[WARP][WARP + 1]; // padded to avoid shared-memory bank conflicts
    size_t c = (size_t)blockIdx.x * WARP + threadIdx.x, stride = n + n2;
    float sum = 0;
    // 1.
    for (int p0 = threadIdx.y; p0 < P && c < stride; p0 += AT_ONCE * WARP) {
        float x[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int p = p0 + i * WARP;
            x[i] = p < P ? parts[(size_t)p * stride + c] : 0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) sum += x[i];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    // 2.
    sum = warp_sum(sums[threadIdx.x][threadIdx.y]);
    if (threadIdx.x == 0) sums[0][threadIdx.y] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || c >= stride) return;
    float *to = c < n ? out + c : out2 + (c - n);
    *to = sums[0][threadIdx.x] + (add ? *to : 0);
}

// parts (P, n + n2). out2 may be NULL if n2 is 0. add: the sums are added to what is in out and out2.
static void sum_parts_fast(float *out, float *out2, const float *parts, int P, size_t n, size_t n2, int add) {
    if (in_parts_memory(parts)) beside_begin();
    sum_parts_fast_kernel<<<blocks_for(n + n2, WARP), dim3(WARP, WARP), 0, gpu.stream>>>(out, out2, parts, P, n, n2,
                                                                                         add);
    if (in_parts_memory(parts)) beside_end();
}
