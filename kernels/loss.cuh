/*
loss.cuh: replaces the plain kernel of the loss, log sum_v e^logit - logit of the target, and its gradient.

Idea. The plain kernel reads a row of logits for its maximum, again for the sum, and again for the gradient. Here each
thread keeps a running maximum and a sum relative to it ("online softmax"), so one reading gives both:

    row of V logits   | 8 | 8 | 8 | ... | 8 | 8 | 8 | ... |     vector i belongs to thread i mod threads
                        |   |   |         |                     each thread: max, sum of e^(logit - max)
                        +---+---+--- warp, then thread block    sum = sum_i e^(max_i - max) sum_i

The logits are then read once more, from cache, and replaced by their gradients. A vector is VEC = 8 elements, 16 bytes.

Requires: bfloat16, V divisible by 8.
Measured: see dev/notes/kernels.md.
*/
#pragma once

static bool loss_fast_supports(int V) { return V % VEC == 0; }

// A running sum relative to new_max instead of max. Nothing seen: max is -infinity and sum 0. NaN stays NaN.
static __device__ float rescaled_sum(float sum, float max, float new_max) {
    return sum != 0 ? sum * exp_fast(max - new_max) : 0;
}

// Formula: loss = log(sum + own) - (target's logit - max), where own = e^(target's logit - max) and sum is that of the
//   other tokens. Keeping them apart preserves a small loss, and softmax - 1 at the target. Then with `grad`
//   dlogit = grad_scale (softmax - onehot(target)), which overwrites the logits.
// Mapping: a thread block has a row, a thread every blockDim.x-th vector.
// Memory: reads the logits twice (the second time from cache), writes them once.
// Passes: 1. running maximum and sum of a thread. 2. of the thread block. 3. loss. 4. gradient.
static __global__ void loss_fast_kernel(double *losses, floatX *logits, const int32_t *targets, float grad_scale,
                                        int grad, int V) {
    __shared__ float maxima[WARP], sums[WARP];
    size_t r = blockIdx.x;
    floatX *l = logits + r * V;
    int target = targets[r], lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    float x[VEC], max = -INFINITY, sum = 0, at_target = target < 0 ? 0 : to_float(l[target]);
    // 1. x - x is NaN where a logit overflowed
    for (int v = threadIdx.x * VEC; v < V; v += blockDim.x * VEC) {
        load<VEC>(x, l + v);
        float new_max = max;
#pragma unroll
        for (int i = 0; i < VEC; i++) new_max = fmaxf(new_max, x[i]);
        if (new_max > max) sum *= exp_fast(max - new_max), max = new_max;
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += (v + i == target ? 0 : exp_fast(x[i] - max)) + (x[i] - x[i]);
    }
    // 2.
    float all = warp_max(max);
    sum = warp_sum(rescaled_sum(sum, max, all));
    if (lane == 0) maxima[warp] = all, sums[warp] = sum;
    __syncthreads(); // all threads have read the target's logit, too
    max = lane < warps ? maxima[lane] : -INFINITY, sum = lane < warps ? sums[lane] : 0;
    all = warp_max(max);
    sum = warp_sum(rescaled_sum(sum, max, all));
    // 3.
    float own = exp_fast(at_target - all), scale = target < 0 ? 0 : grad_scale / (sum + own);
    if (threadIdx.x == 0) losses[r] = target < 0 ? 0 : log1p(sum + (own - 1.0)) + ((double)all - at_target);
    // 4.
    for (int v = threadIdx.x * VEC; grad && v < V; v += blockDim.x * VEC) {
        load<VEC>(x, l + v);
#pragma unroll
        for (int i = 0; i < VEC; i++) x[i] = v + i == target ? -scale * sum : scale * exp_fast(x[i] - all);
        store<VEC>(l + v, x);
    }
}

static void loss_fast(double *losses, floatX *logits, const int32_t *targets, float grad_scale, int grad, int R,
                      int V) {
    int threads = V > 4096 ? 512 : 64; // a small vocabulary has few vectors per row
    loss_fast_kernel<<<R, threads>>>(losses, logits, targets, grad_scale, grad, V);
}
