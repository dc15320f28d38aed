/*
timestep_norm.cuh: TimestepNorm in three kernels forward and three backward. Replaces timestep_norm_forward() and
timestep_norm_backward() of megalodon.cu, which says what is computed.

The idea: the plain kernels write the moments of each token as doubles and scan all of time with one warp for each
group. Here time is cut into token blocks of NORM_BLOCK tokens. Inside a token block the moments are float and relative
to the token block's first scalar, so that a large mean costs no digits. Only the moments of whole token blocks are
double, and scanned over time.

                  block 0              block 1              block 2
    group j   | t0 t1 ... t31 |  | t32 t33 ... t63 |  | t64 ...         |
    1. own      scan in a warp     scan in a warp       scan in a warp       each token: moments of t0:t, of t32:t, ...
    2. scan     state              state + block 0      state + blocks 0, 1  each block: moments before it, in double
    3. apply    y0 y1 ... y31      y32 y33 ... y63      y64 ...              each token: 2. merged with 1., then y

The apply kernel reads weight and bias once for each token block: a thread owns W columns and goes through the token
block's tokens. The backward pass is the same, from the last token to the first, with sums instead of moments. Its third
kernel also sums dweight and dbias and adds the residual gradients, so that inp and dout are read twice in all.
Requires: bfloat16; D/G a multiple of 4: vectors of W = 4 or 8 elements must not cross groups.
Measured: see dev/notes/kernels.md
*/
#pragma once

enum { NORM_BLOCK = WARP }; // tokens of a token block: each lane has one

static int norm_width(Dims d) { return d.D / d.G % VEC == 0 ? VEC : 4; }
static int timestep_norm_fast_supports(Dims d) { return d.D / d.G % 4 == 0; }
static __host__ __device__ int norm_blocks(Dims d) { return ceil_div(d.L, NORM_BLOCK); } // of a sequence

// Thread blocks of the last backward kernel. Each leaves threads_down() parts of the sums for dweight and dbias,
// however few rows there are.
static int norm_backward_blocks(Dims d) {
    return min_int(d.B * norm_blocks(d), MAX_PARTS / threads_down(norm_width(d), d.D));
}

// Bytes, forward and backward: blocks and prefix, or blocks, suffix and parts.
static size_t timestep_norm_fast_workspace(Dims d) {
    size_t sums = ((size_t)d.B * norm_blocks(d) + (size_t)d.B * d.L) * d.G * 3 * sizeof(double);
    size_t parts = (size_t)norm_backward_blocks(d) * threads_down(norm_width(d), d.D);
    return sums + parts * 2 * d.D * sizeof(float);
}

// Moments of a token block up to one of its tokens.
typedef struct {
    float mean;      // minus the token block's first scalar
    float deviation; // sqrt(m2/n), since m2 may be too large for float
} Prefix;

// Moments of n scalars. m2: sum of squared deviations from the mean.
typedef struct {
    double n, mean, m2;
} CountedMoments;

// Those of both sets of scalars together: merge() of megalodon.cu.
static __device__ CountedMoments merge(CountedMoments a, CountedMoments b) {
    double n = a.n + b.n, d = b.mean - a.mean;
    if (n == 0) return a;
    return CountedMoments{n, a.mean + d * (b.n / n), a.m2 + b.m2 + d * d * (a.n * (b.n / n))};
}

// Formula: for each token t of a token block, the moments of its tokens 0..t, and those of the whole token block.
// Mapping: a warp has a token block of a group, a lane a token.
// Memory: reads R*D, writes 2*R*G floats.
// Passes: 1. each lane: the moments of its token's g scalars, from deviations from the first of them. 2. inclusive scan
//   over the lanes. Where squares overflow, both are repeated in a unit in which they do not.
template <int W>
static __global__ void __launch_bounds__(WARP *ROW_WARPS, 8)
    timestep_norm_fast_moments_kernel(Prefix *prefix, CountedMoments *blocks, const floatX *inp, Dims d) {
    int g = d.D / d.G, lane = threadIdx.x, j = blockIdx.y * blockDim.y + threadIdx.y, num_blocks = norm_blocks(d);
    int t0 = blockIdx.x % num_blocks * NORM_BLOCK, T = min_int(NORM_BLOCK, d.L - t0);
    size_t first_row = (size_t)(blockIdx.x / num_blocks) * d.L + t0;
    if (j >= d.G) return;
    const floatX *x = inp + first_row * d.D + (size_t)j * g;
    float anchor = to_float(x[0]), k, mean, m2; // mean and m2 of k tokens, in this unit
    for (float unit = 1;; unit = SMALL_UNIT) {
        k = mean = m2 = 0;
        // 1.
        if (lane < T) {
            const floatX *row = x + (size_t)lane * d.D;
            float first = to_float(row[0]) * unit, s1 = 0, s2 = 0;
            for (int c = 0; c < g; c += W) {
                float v[W];
                load<W>(v, row + c);
#pragma unroll
                for (int i = 0; i < W; i++) {
                    float deviation = v[i] * unit - first;
                    s1 += deviation;
                    s2 += deviation * deviation;
                }
            }
            k = 1, mean = (first - anchor * unit) + s1 / g, m2 = s2 - s1 * (s1 / g);
            m2 = m2 < 0 ? 0 : m2; // NaN stays NaN
        }
        // 2.
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            float k0 = __shfl_up_sync(~0u, k, step), mean0 = __shfl_up_sync(~0u, mean, step);
            float m20 = __shfl_up_sync(~0u, m2, step);
            if (lane >= step && k > 0) {
                float difference = mean - mean0, share = k / (k0 + k);
                mean = mean0 + difference * share;
                m2 += m20 + g * difference * difference * k0 * share;
                k += k0;
            }
        }
        if (unit < 1 || __shfl_sync(~0u, m2, T - 1) <= LARGE) {
            if (lane < T) prefix[(first_row + lane) * d.G + j] = Prefix{mean / unit, sqrtf(m2 / (k * g)) / unit};
            if (lane == T - 1) // here k is T
                blocks[(size_t)blockIdx.x * d.G + j] =
                    CountedMoments{(double)(k * g), anchor + (double)mean / unit, (double)m2 / unit / unit};
            return;
        }
    }
}

// Formula: the moments of everything before each token block: the state merged with all earlier token blocks.
// Mapping: a warp has a sequence's group, a lane a run of consecutive token blocks.
// Memory: reads and writes 3*R*G/NORM_BLOCK doubles.
// Passes: 1. each lane merges its token blocks. 2. inclusive scan over the lanes. 3. each lane merges its token blocks
//   again, now from the moments before them, which replace the token blocks' own.
static __global__ void timestep_norm_fast_scan_kernel(CountedMoments *blocks, NormState end, NormState start, Dims d) {
    int pair = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x, num_blocks = norm_blocks(d);
    if (pair >= d.B * d.G) return;
    int b = pair / d.G, j = pair % d.G, run = ceil_div(num_blocks, WARP), from = lane * run;
    int to = min_int(from + run, num_blocks);
    CountedMoments *mine = blocks + (size_t)b * num_blocks * d.G + j, all = {0, 0, 0}, state = {0, 0, 0};
    if (start.count) state.n = (double)(d.D / d.G) * (double)start.count[b];
    if (start.mean) state.mean = start.mean[pair], state.m2 = start.m2[pair];
    // 1.
    for (int i = from; i < to; i++) all = merge(all, mine[(size_t)i * d.G]);
    // 2.
    for (int step = 1; step < WARP; step *= 2) {
        CountedMoments left = {__shfl_up_sync(~0u, all.n, step), __shfl_up_sync(~0u, all.mean, step),
                               __shfl_up_sync(~0u, all.m2, step)};
        if (lane >= step) all = merge(left, all);
    }
    CountedMoments before = {__shfl_up_sync(~0u, all.n, 1), __shfl_up_sync(~0u, all.mean, 1),
                             __shfl_up_sync(~0u, all.m2, 1)};
    if (lane == 0) before = CountedMoments{0, 0, 0};
    if (lane == WARP - 1 && end.mean) {
        CountedMoments sum = merge(state, all);
        end.mean[pair] = sum.mean, end.m2[pair] = sum.m2;
    }
    // 3.
    before = merge(state, before);
    for (int i = from; i < to; i++) {
        CountedMoments own = mine[(size_t)i * d.G];
        mine[(size_t)i * d.G] = before;
        before = merge(before, own);
    }
}

// The groups that the columns of this thread block touch.
typedef struct {
    int first, count;
} Groups;
template <int W> static __device__ Groups groups_here(Dims d) {
    int across = threads_across(W, d.D), g = d.D / d.G, from = blockIdx.y * across * W;
    int to = min_int(from + across * W, d.D);
    return Groups{from / g, (to - 1) / g - from / g + 1};
}
static int max_groups(int W, Dims d) { return min_int(ACROSS * W / (d.D / d.G) + 2, d.G); }

// The statistics that normalize one group of one token.
typedef struct {
    float mean, rstd;
} Stats;

// Formula: mean_t and rstd_t from the moments before the token block and those of its tokens up to t; y = (x - mean)
//   rstd (weight + 1) + bias.
// Mapping: a thread block has a token block and ACROSS*W columns; a thread has W columns.
// Memory: reads and writes R*D, reads 2*R*G floats, writes R*G doubles and R*G floats.
// Passes: 1. the statistics of all tokens and groups, into shared memory. 2. normalize.
template <int W>
static __global__ void timestep_norm_fast_apply_kernel(floatX *out, double *mean, float *rstd, const Prefix *prefix,
                                                       const CountedMoments *blocks, const floatX *inp,
                                                       const float *weight, const float *bias, Dims d, double eps) {
    extern __shared__ Stats norm_stats[]; // (NORM_BLOCK, groups.count)
    int g = d.D / d.G, t0 = blockIdx.x % norm_blocks(d) * NORM_BLOCK, T = min_int(NORM_BLOCK, d.L - t0);
    size_t first_row = (size_t)(blockIdx.x / norm_blocks(d)) * d.L + t0;
    Groups groups = groups_here<W>(d);
    // 1.
    for (int i = threadIdx.x; i < T * groups.count; i += blockDim.x) {
        int t = i / groups.count, j = groups.first + i % groups.count;
        size_t at = (first_row + t) * d.G + j;
        double anchor = to_float(inp[first_row * d.D + (size_t)j * g]), n = (double)g * (t + 1);
        double deviation = prefix[at].deviation;
        CountedMoments own = {n, anchor + prefix[at].mean, deviation * deviation * n};
        CountedMoments m = merge(blocks[(size_t)blockIdx.x * d.G + j], own);
        norm_stats[i] = Stats{(float)m.mean, (float)(1 / sqrt(m.m2 / m.n + eps))};
        if (j * g >= (int)blockIdx.y * ACROSS * W) // a group that begins in another thread block is written there
            mean[at] = m.mean, rstd[at] = norm_stats[i].rstd;
    }
    __syncthreads();
    // 2.
    Place p = place<W>(d.D);
    if (p.row < 0) return;
    float w[W], b[W], x[W];
#pragma unroll
    for (int i = 0; i < W; i++) w[i] = weight[p.c + i] + 1, b[i] = bias[p.c + i];
    for (int t = p.row; t < T; t += p.down) {
        Stats s = norm_stats[t * groups.count + p.c / g - groups.first];
        size_t at = (first_row + t) * d.D + p.c;
        load<W>(x, inp + at);
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = (x[i] - s.mean) * s.rstd * w[i] + b[i];
        store<W>(out + at, x);
    }
}

// out NULL: only the state after the last token.
static void timestep_norm_fast_forward(floatX *out, double *mean, float *rstd, NormState end, const floatX *inp,
                                       const float *weight, const float *bias, NormState start, Dims d, double eps) {
    int num_blocks = d.B * norm_blocks(d), W = norm_width(d), pairs = d.B * d.G;
    CountedMoments *blocks = (CountedMoments *)workspace(timestep_norm_fast_workspace(d)); // (B, norm_blocks, G)
    Prefix *prefix = (Prefix *)(blocks + (size_t)num_blocks * d.G);                        // (B,L,G)
    dim3 warps(WARP, ROW_WARPS);
    auto moments = W == VEC ? timestep_norm_fast_moments_kernel<VEC> : timestep_norm_fast_moments_kernel<4>;
    moments<<<dim3(num_blocks, ceil_div(d.G, ROW_WARPS)), warps>>>(prefix, blocks, inp, d);
    timestep_norm_fast_scan_kernel<<<ceil_div(pairs, ROW_WARPS), warps>>>(blocks, end, start, d);
    if (out == NULL) return;
    size_t shared = (size_t)NORM_BLOCK * max_groups(W, d) * sizeof(Stats);
    auto apply = W == VEC ? timestep_norm_fast_apply_kernel<VEC> : timestep_norm_fast_apply_kernel<4>;
    allow_shared(apply, shared);
    apply<<<column_grid(W, num_blocks, d.D), THREADS, shared>>>(out, mean, rstd, prefix, blocks, inp, weight, bias, d,
                                                                eps);
}

// ----------------------------------------------------------------------------
// backward: the formulas are before timestep_norm_backward() in megalodon.cu

typedef struct {
    double U, V, W;
} NormSums;
static __device__ NormSums plus(NormSums a, NormSums b) { return NormSums{a.U + b.U, a.V + b.V, a.W + b.W}; }

// The sum over this lane and all lanes after it.
static __device__ NormSums sum_later_lanes(NormSums sum) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        NormSums right = {__shfl_down_sync(~0u, sum.U, step), __shfl_down_sync(~0u, sum.V, step),
                          __shfl_down_sync(~0u, sum.W, step)};
        if (threadIdx.x + step < WARP) sum = plus(sum, right);
    }
    return sum;
}

// Formula: U, V and W summed from each token to the last of its token block, and over each whole token block.
// Mapping: a warp has a token block of a group, a lane a token.
// Memory: reads 2*R*D, R*G doubles and R*G floats; writes 3*R*G doubles.
// Passes: 1. weight + 1 of the thread block's groups, into shared memory. 2. each lane: its token's terms. 3. scan over
//   the lanes.
template <int W>
static __global__ void timestep_norm_fast_sums_kernel(NormSums *suffix, NormSums *blocks, const floatX *dout,
                                                      const floatX *inp, const float *weight, const double *mean,
                                                      const float *rstd, const int64_t *count, Dims d) {
    extern __shared__ float norm_scales[]; // (groups of this thread block, g)
    int g = d.D / d.G, lane = threadIdx.x, j = blockIdx.y * blockDim.y + threadIdx.y;
    int b = blockIdx.x / norm_blocks(d), t = blockIdx.x % norm_blocks(d) * NORM_BLOCK + lane;
    size_t row = (size_t)b * d.L + t;
    // 1.
    for (int i = threadIdx.y * WARP + lane; i < (int)blockDim.y * g; i += WARP * blockDim.y) {
        int c = blockIdx.y * blockDim.y * g + i;
        norm_scales[i] = c < d.D ? weight[c] + 1 : 0;
    }
    __syncthreads();
    if (j >= d.G) return;
    // 2.
    NormSums sum = {0, 0, 0};
    if (t < d.L) {
        const floatX *x = inp + row * d.D + (size_t)j * g, *dy = dout + row * d.D + (size_t)j * g;
        double m = mean[row * d.G + j];
        float center = (float)m, r = rstd[row * d.G + j], dmean = 0, dvar = 0;
        for (int c = 0; c < g; c += W) {
            float v[W], dv[W];
            load<W>(v, x + c), load<W>(dv, dy + c);
#pragma unroll
            for (int i = 0; i < W; i++) {
                float wdy = norm_scales[threadIdx.y * g + c + i] * dv[i];
                dmean += wdy;
                dvar += wdy * ((v[i] - center) * r); // of the normalized x, so that it does not overflow
            }
        }
        double n = (double)g * ((count ? (double)count[b] : 0) + t + 1), V = -0.5 * r * r * dvar / n;
        sum = NormSums{-(double)r * dmean / n, V, V * m};
    }
    // 3.
    sum = sum_later_lanes(sum);
    if (t < d.L) suffix[row * d.G + j] = sum;
    if (lane == 0) blocks[(size_t)blockIdx.x * d.G + j] = sum;
}

// Formula: the sums of U, V, W over everything after each token block. dstate, or NULL for zeros: in: the sums over the
//   tokens after this call's; out: those from this call's first token on.
// Mapping: a warp has a sequence's group, a lane a run of consecutive token blocks.
// Memory: reads and writes 3*R*G/NORM_BLOCK doubles.
// Passes: 1. each lane sums its token blocks. 2. scan over the lanes. 3. each lane sums its token blocks again, from
//   the last one.
static __global__ void timestep_norm_fast_scan_backward_kernel(NormSums *blocks, double *dstate, Dims d) {
    int pair = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x, num_blocks = norm_blocks(d);
    if (pair >= d.B * d.G) return;
    int b = pair / d.G, run = ceil_div(num_blocks, WARP), from = lane * run, to = min_int(from + run, num_blocks);
    NormSums *mine = blocks + (size_t)b * num_blocks * d.G + pair % d.G, own = {0, 0, 0}, later = {0, 0, 0};
    if (dstate) later = NormSums{dstate[3 * pair], dstate[3 * pair + 1], dstate[3 * pair + 2]};
    // 1.
    for (int i = from; i < to; i++) own = plus(own, mine[(size_t)i * d.G]);
    // 2.
    NormSums sum = sum_later_lanes(own);
    if (lane == 0 && dstate) {
        NormSums all = plus(sum, later);
        dstate[3 * pair] = all.U, dstate[3 * pair + 1] = all.V, dstate[3 * pair + 2] = all.W;
    }
    // 3.
    sum = plus(NormSums{sum.U - own.U, sum.V - own.V, sum.W - own.W}, later);
    for (int i = to - 1; i >= from; i--) {
        NormSums block = mine[(size_t)i * d.G];
        mine[(size_t)i * d.G] = sum;
        sum = plus(sum, block);
    }
}

// The numbers from which dx of one group of one token is computed, aligned so that one load reads them:
// dx = rstd w dy + shift + slope n with n = (x - mean) rstd.
struct alignas(16) NormFactors {
    float mean, rstd, shift, slope;
};

// Formula: dx = rstd w dy + shift + slope (x - mean) + residual gradients; dweight = sum dy n, dbias = sum dy, with
//   n = (x - mean) rstd. Here slope is divided by rstd.
// Mapping: a thread block has every gridDim.x-th token block and ACROSS*W columns; a thread has W columns.
// Memory: reads 2*R*D to 4*R*D, 4*R*G doubles and R*G floats; writes R*D. parts (gridDim.x * down, 2, D): dweight,
//   dbias.
// Passes, for each token block: 1. the factors of all tokens and groups, into shared memory. 2. dx, and the sums.
template <int W>
static __global__ void
timestep_norm_fast_backward_kernel(floatX *dinp, float *parts, const floatX *dout, const floatX *residual0,
                                   const floatX *residual1, const floatX *inp, const float *weight, const double *mean,
                                   const float *rstd, const NormSums *suffix, const NormSums *blocks, Dims d) {
    extern __shared__ NormFactors norm_factors[]; // (NORM_BLOCK, groups.count)
    int g = d.D / d.G;
    Groups groups = groups_here<W>(d);
    Place p = place<W>(d.D);
    float w[W], dw[W], db[W], x[W], dy[W], residual[W];
#pragma unroll
    for (int i = 0; i < W; i++) w[i] = p.row < 0 ? 0 : weight[p.c + i] + 1, dw[i] = db[i] = 0;
    for (int block = blockIdx.x; block < d.B * norm_blocks(d); block += gridDim.x) {
        int t0 = block % norm_blocks(d) * NORM_BLOCK, T = min_int(NORM_BLOCK, d.L - t0);
        size_t first_row = (size_t)(block / norm_blocks(d)) * d.L + t0;
        __syncthreads(); // all threads have read the factors of the token block before
        // 1.
        for (int i = threadIdx.x; i < T * groups.count; i += blockDim.x) {
            int j = groups.first + i % groups.count;
            size_t at = (first_row + i / groups.count) * d.G + j;
            NormSums s = plus(suffix[at], blocks[(size_t)block * d.G + j]);
            float m = (float)mean[at], r = rstd[at]; // the float with which x is centered below
            norm_factors[i] = NormFactors{m, r, (float)(s.U - 2 * (s.W - m * s.V)), (float)(2 * s.V / r)};
        }
        __syncthreads();
        // 2.
        for (int t = p.row; t >= 0 && t < T; t += p.down) {
            NormFactors f = norm_factors[t * groups.count + p.c / g - groups.first];
            size_t at = (first_row + t) * d.D + p.c;
            load<W>(x, inp + at), load<W>(dy, dout + at);
#pragma unroll
            for (int i = 0; i < W; i++) {
                float n = (x[i] - f.mean) * f.rstd;
                dw[i] += dy[i] * n, db[i] += dy[i];
                x[i] = f.rstd * w[i] * dy[i] + f.shift + n * f.slope;
            }
            if (residual0) {
                load<W>(residual, residual0 + at);
#pragma unroll
                for (int i = 0; i < W; i++) x[i] += residual[i];
            }
            if (residual1) {
                load<W>(residual, residual1 + at);
#pragma unroll
                for (int i = 0; i < W; i++) x[i] += residual[i];
            }
            store<W>(dinp + at, x);
        }
    }
    float *part = parts + ((size_t)blockIdx.x * p.down + p.row) * 2 * d.D + p.c;
    for (int i = 0; i < W && p.row >= 0; i++) part[i] = dw[i], part[d.D + i] = db[i];
}

// dinp NULL: only dstate.
static void timestep_norm_fast_backward(floatX *dinp, float *dweight, float *dbias, double *dstate, const floatX *dout,
                                        const floatX *const residuals[2], const floatX *inp, const float *weight,
                                        const double *mean, const float *rstd, const int64_t *count, Dims d) {
    int num_blocks = d.B * norm_blocks(d), W = norm_width(d), down = threads_down(W, d.D);
    int P = norm_backward_blocks(d), warps = min_int(ROW_WARPS, d.G);
    NormSums *blocks = (NormSums *)workspace(timestep_norm_fast_workspace(d)); // (B, norm_blocks, G)
    NormSums *suffix = blocks + (size_t)num_blocks * d.G;                      // (B,L,G)
    float *parts = parts_memory((size_t)P * down * 2 * d.D * sizeof(float), suffix + (size_t)d.B * d.L * d.G);
    size_t scales = (size_t)warps * (d.D / d.G) * sizeof(float);
    auto sums = W == VEC ? timestep_norm_fast_sums_kernel<VEC> : timestep_norm_fast_sums_kernel<4>;
    allow_shared(sums, scales);
    sums<<<dim3(num_blocks, ceil_div(d.G, warps)), dim3(WARP, warps), scales>>>(suffix, blocks, dout, inp, weight, mean,
                                                                                rstd, count, d);
    timestep_norm_fast_scan_backward_kernel<<<ceil_div(d.B * d.G, warps), dim3(WARP, warps)>>>(blocks, dstate, d);
    if (dinp == NULL) return;
    size_t shared = (size_t)NORM_BLOCK * max_groups(W, d) * sizeof(NormFactors);
    auto kernel = W == VEC ? timestep_norm_fast_backward_kernel<VEC> : timestep_norm_fast_backward_kernel<4>;
    allow_shared(kernel, shared);
    const floatX *residual0 = residuals ? residuals[0] : NULL, *residual1 = residuals ? residuals[1] : NULL;
    kernel<<<column_grid(W, P, d.D), THREADS, shared>>>(dinp, parts, dout, residual0, residual1, inp, weight, mean,
                                                        rstd, suffix, blocks, d);
    sum_parts_fast(dweight, dbias, parts, P * down, d.D, d.D, 1);
}

// Chunk parallelism: the moments, or the sums, of these tokens alone.
static void timestep_norm_fast_reduce(NormState sum, const floatX *inp, Dims d) {
    NormState none = {NULL, NULL, NULL};
    timestep_norm_fast_forward(NULL, NULL, NULL, sum, inp, NULL, NULL, none, d, 0);
}

static void timestep_norm_fast_reduce_backward(double *dstate, const floatX *dout, const floatX *inp,
                                               const float *weight, const double *mean, const float *rstd,
                                               const int64_t *count, Dims d) {
    memory_clear(dstate, (size_t)d.B * d.G * 3 * sizeof *dstate);
    timestep_norm_fast_backward(NULL, NULL, NULL, dstate, dout, NULL, inp, weight, mean, rstd, count, d);
}
