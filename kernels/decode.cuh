/*
decode.cuh: replaces megalodon_forward for one token of each of up to GEMV_ROWS = 8 sequences that continue from a
state, and megalodon_logits for as few rows.

Idea. Decoding is latency-bound: time goes into reading every weight and the unfinished chunk once, and into waiting for
one kernel after another. So each layer is fused into seven kernels. A new one begins only where a sum over a whole row
(a norm, a product, a softmax) must be complete:

    x (B,D)
    |
    +-- 1 decode_norm_kernel      xt = TimestepNorm(x), ema = CEMA(xt)          updates moments and h
    |   2 gemv_kernel, four maps  v = silu(xt Wv' + bv), and with mx = RMSNorm(ema)
    |                             z = mx Wz' + bz, r = mx Wr' + br, y = mx Wh1' + bh1 + x
    |   3 decode_scores_kernel    q, k from z; scores = q . keys                adds k to the keys
    |   4 decode_values_kernel    gated = (softmax(scores) values) silu(r)      adds v to the values
    |   5 gemv_kernel             y += gated Wh2'
    |   6 gemv_kernel             hidden = silu(u W1') [* (u W3')], u = LayerNorm(y)
    +-- 7 gemv_kernel             next layer's x = [alpha *] hidden W2' + x

Positions are read from the state on the device, so the host waits for nothing. All kernels use programmatic dependent
launch, see gemv.cuh: before pdl_wait() they load weights and what the token before left in the state.

Requires: bfloat16; D, Z, E and F divisible by 8, so that all matrices begin at multiples of 16 bytes; a state with keys
and values; no dropout, no chunk-parallel ranks; sm_80, faster from sm_90 on.
Measured: see dev/notes/kernels.md.
*/
#pragma once

// Warps of a thread block in kernels 1 and 4, and columns of values of a thread block in kernel 4.
enum { VALUE_COLUMNS = 16 };

// ----------------------------------------------------------------------------
// 1. TimestepNorm, and CEMA if there is h

typedef struct {
    floatX *xt, *ema;                   // (B,D) results
    double *mean, *m2;                  // (B,G) state, updated
    float *h;                           // (B,2,N,D) state, updated; NULL: no CEMA
    const floatX *x;                    // (B,D)
    const float *weight, *bias, *omega; // (D)
    Coeffs coeffs;                      // (N,D)
    const int64_t *count;               // (B) tokens before this one
} DecodeNorm;

// The coefficients and the state of one of a channel's N complex numbers.
typedef struct {
    float p, q_re, q_im, g_re, g_im, re, im;
} DecodeMode;
static __device__ DecodeMode decode_mode(Coeffs c, const float *h, size_t at, size_t modes) {
    return DecodeMode{c.p[at], c.q_re[at], c.q_im[at], c.g_re[at], c.g_im[at], h[at], h[modes + at]};
}

// Formula: the group's moments are merged with this token's; xt = (x - mean) rstd (weight + 1) + bias;
//   h = q h + p xt, ema = Re sum_n g_n h_n + omega xt.
// Mapping: a thread block has a group of a sequence. Each warp computes the moments. A lane has a channel, and its N
//   complex numbers are divided among the warps.
// Memory: reads and writes 2 N*D floats of h for each sequence, reads 5 N*D of coefficients.
// Passes: 1. load coefficients and state. 2. moments, with sums in float relative to the group's first element. 3. xt
//   and h. 4. the first warp adds the sums of all warps.
static __global__ void decode_norm_kernel(const __grid_constant__ DecodeNorm a, Dims d, double eps) {
    __shared__ float sums[VALUE_COLUMNS][WARP];
    int g = d.D / d.G, lane = threadIdx.x, b = blockIdx.y, pair = b * d.G + blockIdx.x, d0 = blockIdx.x * g;
    size_t row = (size_t)b * d.D, modes = (size_t)d.N * d.D, mine = (size_t)threadIdx.y * d.D + d0 + lane;
    const floatX *x = a.x + row + d0;
    float *h = a.h;
    // 1.
    DecodeMode mode = {};
    if (h) h += b * 2 * modes;
    if (h && lane < g && (int)threadIdx.y < d.N) mode = decode_mode(a.coeffs, h, mine, modes);
    double n = (double)g * (double)a.count[b];
    Moments before = {a.mean[pair], a.m2[pair]};
    pdl_wait();
    // 2.
    float first = to_float(x[0]), s1 = 0, s2 = 0;
    for (int i = lane; i < g; i += WARP) {
        float c = to_float(x[i]) - first;
        s1 += c, s2 += c * c;
    }
    s1 = warp_sum(s1), s2 = warp_sum(s2);
    Moments own = {(double)first + s1 / g, s2 <= LARGE ? fmaxf(s2 - s1 * s1 / g, 0) : NAN}; // NaN if it overflowed
    Moments all = merge(n, before, g, own);
    float mean = (float)all.mean, rstd = (float)(1 / sqrt(all.m2 / (n + g) + eps));
    for (int i = lane; i - lane < g; i += WARP) {
        // 3.
        floatX xt = {};
        if (i < g) xt = to_floatX((to_float(x[i]) - mean) * rstd * (a.weight[d0 + i] + 1) + a.bias[d0 + i]);
        float v = to_float(xt), y = 0;
        for (int k = threadIdx.y; h && i < g && k < d.N; k += blockDim.y) {
            size_t at = (size_t)k * d.D + d0 + i;
            if (at != mine) mode = decode_mode(a.coeffs, h, at, modes); // the first one was loaded in 1.
            float re = mode.q_re * mode.re - mode.q_im * mode.im + mode.p * v;
            float im = mode.q_re * mode.im + mode.q_im * mode.re;
            h[at] = re, h[modes + at] = im;
            y += mode.g_re * re - mode.g_im * im;
        }
        sums[threadIdx.y][lane] = y;
        __syncthreads(); // all warps have read the moments of the state, too
        // 4.
        if (threadIdx.y == 0 && i < g) {
            a.xt[row + d0 + i] = xt;
            for (int w = 1; w < VALUE_COLUMNS; w++) y += sums[w][lane];
            if (h) a.ema[row + d0 + i] = to_floatX(y + a.omega[d0 + i] * v);
        }
        __syncthreads(); // the sums have been read
    }
    if (lane == 0 && threadIdx.y == 0) a.mean[pair] = all.mean, a.m2[pair] = all.m2;
}

static void decode_norm(DecodeNorm a, Dims d, double eps) {
    launch_pdl(decode_norm_kernel, dim3(d.G, d.B), dim3(WARP, VALUE_COLUMNS), 0, a, d, eps);
}

// ----------------------------------------------------------------------------
// 3. and 4. attention of one query to its chunk so far

enum { KEY_LOADS = 8 }; // elements of a key that a lane loads at once
static __device__ void key_load(float x[KEY_LOADS], const float *key, int i0, int dz) {
#pragma unroll
    for (int u = 0; u < KEY_LOADS; u++) x[u] = i0 + u * WARP < dz ? key[i0 + u * WARP] : 0;
}

// Formula: scores (B,H,C): q . k_j. q and the key of this token come from z; that key is added to the cache.
// Mapping: a thread block has ROW_WARPS keys of a head, a warp has a key; the grid is for a whole chunk.
// Memory: reads Z floats for each key.
// Passes: 1. load the key. 2. one warp computes q and this token's key, in shared memory. 3. dot product.
static __global__ void decode_scores_kernel(float *scores, float *cache_k, const floatX *z, const float *gamma,
                                            const float *beta, const float2 *table, const int64_t *count, int Z, int dz,
                                            int C, float eps) {
    extern __shared__ float4 decode_shared[];
    int h = blockIdx.y, b = blockIdx.z, c = h * dz, last = chunk_position(count, b, 1, C);
    floatX *q = (floatX *)decode_shared, *k = q + dz;
    int first = blockIdx.x * ROW_WARPS, j = min_int(first + threadIdx.y, last); // the last one more than once
    if (first > last) return;
    float *key = cache_k + ((size_t)b * C + j) * Z + c, x[KEY_LOADS], sum = 0;
    // 1.
    key_load(x, key, threadIdx.x, dz);
    pdl_wait();
    // 2.
    if (threadIdx.y == 0) {
        const float2 *turns = table + (size_t)last * (dz / 2);
        qk_head(q, k, z + (size_t)b * Z + c, gamma + c, beta + c, turns, Z, dz, eps);
    }
    __syncthreads();
    // 3.
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
    // NaN if it overflowed: -infinity would become a probability of 0
    if (threadIdx.x == 0) scores[((size_t)b * gridDim.y + h) * C + j] = sum + (sum - sum);
}

// Formula: gated = o silu(r), o = softmax(scores) values. This token's value is added to the cache.
// Mapping: a thread block has VALUE_COLUMNS columns of a head. In pass 1 a thread has a column and every 32nd key, in
//   pass 2 a warp has a column and a lane the result of one of its threads.
// Memory: reads E floats for each key.
// Passes: 1. softmax and weighted sum of a thread's keys, with a running maximum of its own. 2. combine 32 of them.
static __global__ void __launch_bounds__(WARP *VALUE_COLUMNS)
    decode_values_kernel(floatX *gated, float *cache_v, const float *scores, const floatX *v, const floatX *r_pre,
                         const int64_t *count, int E, int C) {
    enum { AT_ONCE = 16 };
    __shared__ float maxima[WARP], sums[WARP], values[VALUE_COLUMNS][WARP + 1];
    int h = blockIdx.y, b = blockIdx.z, H = gridDim.y, dv = E / H, last = chunk_position(count, b, 1, C);
    int column = threadIdx.x % VALUE_COLUMNS, turn = (threadIdx.y * WARP + threadIdx.x) / VALUE_COLUMNS;
    int c = h * dv + min_int(blockIdx.x * VALUE_COLUMNS + column, dv - 1); // the last one more than once
    float *cached = cache_v + (size_t)b * C * E + c, max = -INFINITY, sum = 0, o = 0;
    scores += ((size_t)b * H + h) * C;
    pdl_wait();
    int mine = min_int(blockIdx.x * VALUE_COLUMNS + threadIdx.y, dv - 1); // the column that this warp has in 2.
    float r = to_float(r_pre[(size_t)b * E + h * dv + mine]);
    if (last % WARP == turn) cached[(size_t)last * E] = to_float(v[(size_t)b * E + c]);
    // 1.
    for (int j0 = turn; j0 <= last; j0 += AT_ONCE * WARP) {
        float s[AT_ONCE], x[AT_ONCE], new_max = max;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int j = j0 + i * WARP;
            s[i] = j <= last ? scores[j] : -INFINITY, x[i] = j <= last ? cached[(size_t)j * E] : 0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) new_max = fmaxf(new_max, s[i]);
        float old = exp_fast(max - new_max);
        sum *= old, o *= old, max = new_max;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float p = exp_fast(s[i] - max);
            sum += p, o += p * x[i];
        }
    }
    maxima[turn] = max, sums[turn] = sum, values[column][turn] = o;
    __syncthreads();
    // 2.
    max = maxima[threadIdx.x];
    float share = exp_fast(max - warp_max(max));
    sum = warp_sum(share * sums[threadIdx.x]);
    o = warp_sum(share * values[mine - blockIdx.x * VALUE_COLUMNS][threadIdx.x]) / sum;
    if (threadIdx.x == 0) gated[(size_t)b * E + h * dv + mine] = to_floatX(o * (r * sigmoid(r)));
}

static size_t decode_workspace(Dims d) { return (size_t)min_int(d.B, GEMV_ROWS) * d.H * d.C * sizeof(float); }

typedef struct {
    floatX *gated;                     // (B,E) result
    float *cache_k, *cache_v;          // (B,C,Z), (B,C,E) state, updated
    const floatX *z, *v, *r_pre;       // (B,Z), (B,E), (B,E)
    const float *gamma, *beta, *table; // (2,Z), (2,Z), (C,dz/2,2)
    const int64_t *count;              // (B) tokens before this one
} DecodeAttention;

static void decode_attention(DecodeAttention a, Dims d, double eps) {
    float *scores = (float *)workspace(decode_workspace(d));
    size_t shared = 2 * (size_t)(d.Z / d.H) * sizeof(floatX);
    launch_pdl(decode_scores_kernel, dim3(ceil_div(d.C, ROW_WARPS), d.H, d.B), dim3(WARP, ROW_WARPS), shared, scores,
               a.cache_k, a.z, a.gamma, a.beta, (const float2 *)a.table, a.count, d.Z, d.Z / d.H, d.C, (float)eps);
    launch_pdl(decode_values_kernel, dim3(ceil_div(d.E / d.H, VALUE_COLUMNS), d.H, d.B), dim3(WARP, VALUE_COLUMNS), 0,
               a.gated, a.cache_v, scores, a.v, a.r_pre, a.count, d.E, d.C);
}

// ----------------------------------------------------------------------------
// the model

static Linear linear_of(const Model *m, floatX *out, const floatX *inp, const float *weight, const float *bias, int M) {
    Linear l;
    memset(&l, 0, sizeof l);
    l.out = out, l.inp = inp, l.weight = rounded(m, weight), l.bias = bias ? rounded(m, bias) : NULL, l.M = M;
    return l;
}

// block_forward for one token of each sequence.
static void decode_block(Model *m, int layer, const State *state) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    const Dims d = m->dims;
    const floatX *x = m->x[layer];
    NormState norm = norm_state(state, layer);
    size_t row = (size_t)layer * d.B;
    float *h = state->h + row * 2 * d.N * d.D, *cache_k = state->k + row * d.C * d.Z,
          *cache_v = state->v + row * d.C * d.E;
    // 1.
    decode_norm(DecodeNorm{a->xt, a->ema, norm.mean, norm.m2, h, x, w->timenorm_weight, w->timenorm_bias, w->cema_omega,
                           m->coeffs[layer], norm.count},
                d, c->norm_eps);
    // 2.
    Linears maps = {
        {linear_of(m, s->v, a->xt, w->wv, w->wv_bias, d.E), linear_of(m, a->r_pre, a->ema, w->wr, w->wr_bias, d.E),
         linear_of(m, a->y, a->ema, w->wh1, w->wh1_bias, d.D), linear_of(m, a->z, a->ema, w->wz, w->wz_bias, d.Z)}};
    maps.of[0].silu = 1, maps.of[2].residual = x;
    for (int i = 1; i < 4; i++) maps.of[i].norm = RMS_NORM, maps.of[i].norm_weight = w->rmsnorm_weight;
    gemv(maps, d.B, d.D, c->norm_eps);
    // 3. and 4.
    decode_attention(
        DecodeAttention{s->gated, cache_k, cache_v, a->z, s->v, a->r_pre, w->gamma, w->beta, m->rope, state->count}, d,
        c->norm_eps);
    // 5.
    Linears wh2 = {{linear_of(m, a->y, s->gated, w->wh2, NULL, d.D)}};
    wh2.of[0].residual = a->y;
    gemv(wh2, d.B, d.E, c->norm_eps);
    // 6.
    Linears fc1 = {{linear_of(m, s->hidden, a->y, w->fc1, NULL, d.F)}};
    fc1.of[0].norm = LAYER_NORM, fc1.of[0].norm_weight = w->norm_weight, fc1.of[0].norm_bias = w->norm_bias;
    fc1.of[0].silu = 1, fc1.of[0].gate = w->fc3 ? rounded(m, w->fc3) : NULL;
    gemv(fc1, d.B, d.D, c->norm_eps);
    // 7.
    Linears fc2 = {{linear_of(m, m->x[layer + 1], s->hidden, w->fc2, NULL, d.D)}};
    fc2.of[0].residual = x, fc2.of[0].scale = w->alpha;
    gemv(fc2, d.B, d.F, c->norm_eps);
}

// A state of whole chunks has no keys and values.
static bool decode_fast_supports(const Model *m, const State *state) {
    const Dims d = m->dims;
    return d.L == 1 && d.B <= GEMV_ROWS && state && state->k && m->mode == MEGALODON_INFER && m->cp.cp_size == 1 &&
           !m->dropout_on && is_megalodon(&m->config) && d.D % VEC == 0 && d.Z % VEC == 0 && d.E % VEC == 0 &&
           d.F % VEC == 0 && gemv_shared_bytes(d.B, d.D) <= gpu.max_shared - SHARED_DECLARED &&
           gemv_shared_bytes(2, d.Z) <= SHARED_DEFAULT;
}

static void decode_token(Model *m, State *state) {
    const Config *c = &m->config;
    const Dims d = m->dims;
    int layers = c->num_layers;
    NormState norm = norm_state(state, layers);
    embedding_forward(m->x[0], m->tokens, rounded(m, m->params.embed), embedding_scale(c), d.B, d.D);
    for (int l = 0; l < layers; l++) decode_block(m, l, state);
    decode_norm(DecodeNorm{m->final, NULL, norm.mean, norm.m2, NULL, m->x[layers], m->params.final_norm_weight,
                           m->params.final_norm_bias, NULL, Coeffs{}, norm.count},
                d, c->norm_eps);
    advance(state->count, d.B, 1);
}

static bool decode_logits_supports(const Model *m, int rows) {
    return rows <= GEMV_ROWS && m->dims.D % VEC == 0 && alignment(rounded(m, m->params.output)) >= 16;
}

// logits (rows,V) in scratch.logits, of the rows from `first` on.
static void decode_logits(Model *m, size_t first, int rows) {
    const Dims d = m->dims;
    gemv(Linears{{linear_of(m, m->scratch.logits, m->final + first * d.D, m->params.output, NULL, d.V)}}, rows, d.D, 0);
}
