/*
gemv.cuh: replaces linear_forward, with the norm before it and the silu, gate, scale and residual after it, for up to
GEMV_ROWS = 8 rows (rows of a matrix times a vector: "gemv"). decode.cuh is built from it.

Idea. With so few rows, time goes into reading each weight once, at the speed of memory, and into waiting for the kernel
before. So there are no tiles: `split` warps share an output's row of weights, and all of them read at once:

    weight (M,K)                                        16 warps of a thread block, split = 4
    row m     | w0 | w1 | w2 | w3 | w0 | w1 | ...       warp w reads vectors of 32 lanes * 8 elements
    row m+1   | w4 | w5 | w6 | w7 | w4 | w5 | ...
      x       |    inp (B,K), from cache                sum over lanes, then over the 4 warps of a row
    out (B,M) at m, m+1, m+2, m+3 of this thread block

- A launch has up to four linear maps that share K, one after another in the grid, so that small ones do not leave the
  GPU half empty.
- With programmatic dependent launch a kernel starts while the one before it ends. Before pdl_wait() it loads what no
  kernel of this token writes: the first weights, biases and scales. So these loads overlap with the wait.
- Each thread block normalizes its input again, in shared memory: cheaper than one more kernel.

Requires: bfloat16, K divisible by 8, weights that begin at multiples of 16 bytes; with a norm, 2 B K bytes of shared
memory. Programmatic dependent launch needs sm_90; older GPUs run the kernels one after another.
Measured: see dev/notes/kernels.md.
*/
#pragma once

enum {
    GEMV_ROWS = 8, // rows, at most
    GEMV_WARPS = 16,
    GEMV_THREADS = GEMV_WARPS * WARP,
    GEMV_LOADS = 4,       // vectors of weights that a thread loads at once
    GEMV_ALL_WARPS = 4096 // warps that keep a large GPU's memory busy
};

// ----------------------------------------------------------------------------
// programmatic dependent launch

// Waits until the kernels before this one have ended, since what they wrote can be read only then. Then lets the next
// kernel start.
static __device__ void pdl_wait(void) {
#if defined __CUDA_ARCH__ && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Launches a kernel that calls pdl_wait() and may start before the kernel before it has ended.
template <typename... Parameters, typename... Arguments>
static void launch_pdl(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
    cudaLaunchAttribute overlap;
    cudaLaunchConfig_t config = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
    config.attrs = &overlap, config.numAttrs = gpu.has_pdl;
    cudaCheck(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// ----------------------------------------------------------------------------
// products

enum { NO_NORM, RMS_NORM, LAYER_NORM };

// out (B,M) = scale y + residual, where y = x = norm(inp) weight' + bias, or y = silu(x), or with gate (M,K)
// y = silu(x) * (norm(inp) gate'). weight (M,K), bias, scale (M), residual (B,M). What is NULL is left out.
typedef struct {
    floatX *out;
    const floatX *inp, *weight, *bias, *gate, *residual;
    const float *scale, *norm_weight, *norm_bias;
    int M, silu, norm; // norm: NO_NORM, ..
} Linear;
typedef struct {
    Linear of[4]; // unused ones have M = 0
} Linears;

// The next vectors of a row of weights, still packed: unpacked they would need twice the registers.
static __device__ void gemv_load(uint4 w[GEMV_LOADS], const floatX *weight, int k0, int step, int K) {
#pragma unroll
    for (int i = 0; i < GEMV_LOADS; i++) {
        if (k0 + i * step < K) w[i] = *(const uint4 *)(weight + k0 + i * step);
    }
}

// R rows of x (B,K) times a row of weights, whose first vectors are in w, over columns k0, k0 + step, ..., VEC at each.
template <int R>
static __device__ void gemv_dots(float sum[R], uint4 w[GEMV_LOADS], const floatX *weight, const floatX *x, int k0,
                                 int step, int B, int K) {
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = 0;
#pragma unroll 1
    for (; k0 < K; k0 += GEMV_LOADS * step) {
#pragma unroll
        for (int i = 0; i < GEMV_LOADS; i++) {
            if (k0 + i * step >= K) break;
            float unpacked[VEC], y[VEC];
            load<VEC>(unpacked, (const floatX *)&w[i]);
#pragma unroll
            for (int r = 0; r < R; r++) {
                load<VEC>(y, x + (size_t)min_int(r, B - 1) * K + k0 + i * step);
#pragma unroll
                for (int u = 0; u < VEC; u++) sum[r] += unpacked[u] * y[u];
            }
        }
        gemv_load(w, weight, k0 + GEMV_LOADS * step, step, K);
    }
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] = warp_sum(sum[r]);
}

// Sums of two numbers over a thread block of GEMV_THREADS threads; every thread gets them.
static __device__ float2 gemv_sum(float2 x) {
    __shared__ float shared[2][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x.x = warp_sum(x.x), x.y = warp_sum(x.y);
    __syncthreads(); // the sums of the last call have been read
    if (lane == 0) shared[0][warp] = x.x, shared[1][warp] = x.y;
    __syncthreads();
    x.x = warp_sum(lane < GEMV_WARPS ? shared[0][lane] : 0);
    x.y = warp_sum(lane < GEMV_WARPS ? shared[1][lane] : 0);
    return x;
}

static __device__ float norm_scale(const Linear &l, int k, int K) {
    return l.norm_weight && k < K ? l.norm_weight[k] + 1 : 1;
}
static __device__ float norm_shift(const Linear &l, int k, int K) { return l.norm_bias && k < K ? l.norm_bias[k] : 0; }

// rows (B,K) in shared memory: RMSNorm or LayerNorm of inp, see megalodon.c. A thread has every GEMV_THREADS-th column.
// The scales and shifts of its first AHEAD columns are loaded before pdl_wait(). LayerNorm's sums are relative to a
// row's first element, so that a large mean costs no digits.
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
        float first = l.norm == LAYER_NORM ? to_float(inp[0]) : 0;
        float2 sums = {0, 0}; // of the differences to `first`, and of their squares
#pragma unroll 2
        for (int k = threadIdx.x; k < K; k += GEMV_THREADS) {
            float d = to_float(inp[k]) - first;
            sums.x += d, sums.y += d * d;
        }
        sums = gemv_sum(sums);
        float mean = l.norm == LAYER_NORM ? sums.x / K : 0, square = sums.y / K;
        float s = square <= LARGE ? 1 / sqrtf(fmaxf(square - mean * mean, 0) + eps) : NAN; // NaN if it overflowed
#pragma unroll 1
        for (int k0 = threadIdx.x; k0 < K; k0 += AHEAD * GEMV_THREADS) {
#pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                int k = k0 + u * GEMV_THREADS;
                if (k >= K) break;
                if (K > AHEAD * GEMV_THREADS) scale[u] = norm_scale(l, k, K), shift[u] = norm_shift(l, k, K);
                rows[(size_t)r * K + k] = to_floatX((to_float(inp[k]) - first - mean) * s * scale[u] + shift[u]);
            }
        }
    }
    __syncthreads();
}

// Formula: see Linear.
// Mapping: a thread block has GEMV_WARPS/split outputs of one of the linear maps, for all rows; `split` warps share an
//   output's row of weights. R is B rounded up to 1, 2, 4 or 8, so that sums are in registers.
// Memory: reads M*K for each weight and gate once; inp (B,K) in each thread block, from cache.
// Passes: 1. prefetch the first vectors of weights. 2. wait for the kernels before; the norm. 3. dot products. 4. one
//   thread for each output and row adds the sums of `split` warps and applies silu, gate, scale and residual.
template <int R>
static __global__ void __launch_bounds__(GEMV_THREADS, R < 3 ? 4 - R : 1) // so many thread blocks find registers
    gemv_kernel(const __grid_constant__ Linears all, int split, int B, int K, float eps) {
    extern __shared__ float4 gemv_shared[]; // (B,K) of type floatX, if there is a norm
    __shared__ float dots[2][GEMV_WARPS][R];
    int block = blockIdx.x, each = GEMV_WARPS / split, warp = threadIdx.x / WARP; // each: outputs of a thread block
    const Linear *l = all.of;
    while (block >= ceil_div(l->M, each)) block -= ceil_div(l++->M, each); // whose thread blocks come one after another
    int k0 = (warp % split * WARP + threadIdx.x % WARP) * VEC, step = split * WARP * VEC;
    size_t at = (size_t)min_int(block * each + warp / split, l->M - 1) * K; // the last output more than once
    // 1.
    uint4 w[GEMV_LOADS];
    gemv_load(w, l->weight + at, k0, step, K);
    int r = threadIdx.x % R, o = threadIdx.x / R, m = block * each + o; // what the thread writes in 4.
    bool writes = o < each && m < l->M && r < B;
    float bias = writes && l->bias ? to_float(l->bias[m]) : 0, scale = writes && l->scale ? l->scale[m] : 1;
    float sum[R], gate[R] = {};
    floatX *rows = (floatX *)gemv_shared;
    // 2.
    if (l->norm)
        gemv_norms(rows, *l, B, K, eps);
    else
        pdl_wait();
    float residual = writes && l->residual ? to_float(l->residual[(size_t)r * l->M + m]) : 0;
    const floatX *x = l->norm ? rows : l->inp;
    // 3.
    gemv_dots<R>(sum, w, l->weight + at, x, k0, step, B, K);
    if (l->gate) {
        gemv_load(w, l->gate + at, k0, step, K);
        gemv_dots<R>(gate, w, l->gate + at, x, k0, step, B, K);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        if (threadIdx.x % WARP == 0) dots[0][warp][i] = sum[i], dots[1][warp][i] = gate[i];
    }
    __syncthreads();
    // 4.
    if (!writes) return;
    float y = bias, times = 0;
    for (int i = o * split; i < (o + 1) * split; i++) y += dots[0][i][r], times += dots[1][i][r];
    if (l->silu) y *= sigmoid(y);
    if (l->gate) y *= times;
    l->out[(size_t)r * l->M + m] = to_floatX(y * scale + residual);
}

static size_t gemv_shared_bytes(int B, int K) { return (size_t)B * K * sizeof(floatX); }

// Up to four linear maps of K columns, for B rows.
static void gemv(Linears all, int B, int K, double eps) {
    int blocks = 0, norm = 0, outputs = 0, split = 1;
    for (const Linear &l : all.of) {
        assert(alignment(l.weight) >= 16 && alignment(l.gate) >= 16); // NULL is aligned
        outputs += l.M, norm |= l.norm;
    }
    while (split < GEMV_WARPS && outputs * split < GEMV_ALL_WARPS) split *= 2;
    for (const Linear &l : all.of) blocks += ceil_div(l.M, GEMV_WARPS / split);
    auto kernel = B == 1 ? gemv_kernel<1> : B == 2 ? gemv_kernel<2> : B <= 4 ? gemv_kernel<4> : gemv_kernel<GEMV_ROWS>;
    size_t shared = norm ? gemv_shared_bytes(B, K) : 0;
    allow_shared(kernel, shared);
    launch_pdl(kernel, blocks, GEMV_THREADS, shared, all, split, B, K, (float)eps);
}
