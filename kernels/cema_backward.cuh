/*
cema_backward.cuh: the backward pass of CEMA on tensor cores. Replaces cema_backward() of megalodon.cu. dx is computed
by the kernels of cema.cuh, this file has the gradients of the coefficients.

The idea: the plain kernel runs both recurrences through every token, for every mode. Here tokens are summed before q is
used. With h0 the state before a token block, f the conjugate of dL/dh after it, and polynomials summed over all token
blocks,
    K(z) = sum_(t>=s) dy_t x_s z^(t-s)    A(z) = sum_t dy_t h0 z^t    E(z) = sum_s f x_s z^(T-1-s)
the coefficients' part of the loss is Re (g p K(q) + g q A(q) + p E(q) + sum q^T f h0), omega apart. The coefficients of
these polynomials are matrix products whose inner index is the token block:

           columns        s            columns     n           columns     n
        +----------+   +-----+       +--------+  +----+      +--------+  +----+
      t |    dy    | c |  x  |     t |   dy   |c | h0 |    s |   x    |c | f  |
        |          |   |     |       |        |  |    |      |        |  |    |
        +----------+   +-----+       +--------+  +----+      +--------+  +----+
        K: summed along diagonals    A: (t,n)                E: (T-1-s,n)

The gradients follow from the polynomials' values and slopes at q, by Horner's rule, once for each tile of token blocks
instead of once for each token.
Requires: as cema.cuh.
Measured: see dev/notes/kernels.md
*/
#pragma once

// Elements of `futures` and of `parts`, the scratch of the backward pass.
static size_t cema_futures_size(Dims d) { return (size_t)d.B * ceil_div(d.L, CEMA_BLOCK) * 2 * d.N * d.D; }
static size_t cema_parts_size(Dims d) { return (size_t)cema_grid(CEMA_CHANNELS, d).y * (5 * d.N + 1) * d.D; }
static size_t cema_fast_workspace(Dims d) { return (cema_futures_size(d) + cema_parts_size(d)) * sizeof(float); }

// Two words of A = x with columns as inner index, columns 16 k to 16 k + 15: token t of each, or with `last` token
// last[.] - t. near: columns 2 pair, 2 pair + 1; far: 8 more.
static __device__ void cema_across(uint32_t near[1], uint32_t far[1], const Pair *x, int k, int t, const int last[4]) {
    for (int v = 0; v < 2; v++) {
        Pair two = {};
        for (int u = 0; u < 2; u++) {
            int at = last ? last[2 * v + u] - t : t, column = 16 * k + 8 * v + 2 * (threadIdx.x % 4) + u;
            if (at >= 0) two.v[u] = ((const floatX *)x)[column * 2 * CEMA_PAIRS + at];
        }
        (v == 0 ? near : far)[0] = word_of(two);
    }
}

// A lane's terms of c(q) = sum_t c_t q^t and its slope, from c[m] = c_(row + 8 m): by Horner's rule, value in z = q^8
// and slope with respect to z, both still to be multiplied by q^row.
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

// The coefficients of K(z): lags[m] = sum of dy_t x_s with t - s = row + 8 m, over the tile's columns. The matrix dy x'
// is computed in tiles of 16 x 8; those with the same lags are added.
static __device__ void cema_lags(float2 lags[CEMA_BLOCK / 8], const Pair *dy, const Pair *x) {
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4;
    float tiles[CEMA_BLOCK / 8][4] = {};
    for (int k = 0; k < CEMA_COLUMNS / 16; k++) {
        uint32_t b[CEMA_BLOCK / 8][2][1];
        for (int j = 0; j < CEMA_BLOCK / 8; j++) cema_across(b[j][0], b[j][1], x, k, 8 * j + row, NULL);
        for (int i = 0; i < CEMA_BLOCK / 16; i++) {
            uint32_t a[4][1];
            cema_across(a[0], a[2], dy, k, 16 * i + row, NULL);
            cema_across(a[1], a[3], dy, k, 16 * i + row + 8, NULL);
            for (int j = 0; j <= 2 * i + 1; j++) multiply<1, 1>(tiles[2 * i - j + 1], a, b[j]);
        }
    }
    for (int m = 0; m < CEMA_BLOCK / 8; m++) { // a lane has lags row - 2 pair - u, and gathers those equal to row
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
}

// Formula: the gradients of the coefficients, see the top of this file. PARTIAL: sequences end with columns of fewer
//   tokens, after which there is a gradient dh. Otherwise f is 0 there, and T is the same everywhere.
// Mapping: a thread block has CHANNELS channels of CEMA_COLUMNS columns, a warp a channel.
// Memory: reads 2*R*D and 4*N*R*D/CEMA_BLOCK floats. parts (gridDim.y, 5*N*D + D): p, q_re, q_im, g_re, g_im, omega.
// Passes: 1. tokens to shared memory. 2. K. For eight modes: 3. A, E and sum f h0, with h0 and f of 16 columns as B.
//   4. values and slopes at q, and from them the gradients.
template <bool PARTIAL, int CHANNELS>
static __global__ void __launch_bounds__(WARP *CHANNELS, 1)
    cema_fast_sums_kernel(float *parts, const floatX *dout, const floatX *inp, const float2 *states,
                          const float2 *futures, Coeffs coeffs, Dims d) {
    extern __shared__ Pair cema_tiles[];
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4, blocks = ceil_div(d.L, CEMA_BLOCK), columns = d.B * blocks;
    const int c = blockIdx.x * CHANNELS + threadIdx.y, tail = d.L - (blocks - 1) * CEMA_BLOCK;
    const Pair *x = cema_tiles + threadIdx.y * CEMA_TILE, *dy = x + CHANNELS * CEMA_TILE;
    float *part = parts + (size_t)blockIdx.y * (5 * d.N + 1) * d.D + c;
    // 1.
    cema_copy<CHANNELS, WARP * CHANNELS>((floatX *)inp, cema_tiles, false, FROM_FIRST, d);
    __syncthreads(); // cema_copy writes its table of columns again
    cema_copy<CHANNELS, WARP * CHANNELS>((floatX *)dout, cema_tiles + CHANNELS * CEMA_TILE, false, FROM_FIRST, d);
    __syncthreads();
    if (c >= d.D) return;
    // 2.
    float2 lags[CEMA_BLOCK / 8];
    cema_lags(lags, dy, x);
    if (threadIdx.x == 0) part[(size_t)5 * d.N * d.D] = lags[0].x;

    for (int n0 = 0; n0 < d.N; n0 += 8) {
        // 3. A, E: real and imaginary parts, in which C has (t, mode); over: sum of the slopes of q^T f h0
        float A[2][CEMA_BLOCK / 16][4] = {}, E[2][CEMA_BLOCK / 16][4] = {};
        float2 over = make_float2(0, 0), q = cema_mode(coeffs, n0 + row, c, d).q;
        float2 whole = times(CEMA_BLOCK, times(low_power(q, 7), low_power(power8(q), 7))), partial = whole;
        if (PARTIAL) partial = times(tail, power(q, tail - 1));
        for (int k = 0; k < CEMA_COLUMNS / 16; k++) {
            int last[4]; // a column's last token
            float2 h[4], f[4];
            for (int v = 0; v < 4; v++) {
                int column = blockIdx.y * CEMA_COLUMNS + 16 * k + v / 2 * 8 + 2 * pair + v % 2;
                size_t at = ((size_t)c * columns + column) * d.N + n0 + row;
                bool inside = column < columns && n0 + row < d.N, is_partial = PARTIAL && (column + 1) % blocks == 0;
                last[v] = is_partial ? tail - 1 : CEMA_BLOCK - 1;
                h[v] = inside ? states[at] : make_float2(0, 0), f[v] = inside ? futures[at] : make_float2(0, 0);
                over = plus_times(over, is_partial ? partial : whole, times(h[v], f[v]));
            }
            uint32_t h_re[2][STATE_TERMS], h_im[2][STATE_TERMS], f_re[2][STATE_TERMS], f_im[2][STATE_TERMS];
            for (int v = 0; v < 2; v++) {
                split<STATE_TERMS>(h_re[v], h[2 * v].x, h[2 * v + 1].x);
                split<STATE_TERMS>(h_im[v], h[2 * v].y, h[2 * v + 1].y);
                split<STATE_TERMS>(f_re[v], f[2 * v].x, f[2 * v + 1].x);
                split<STATE_TERMS>(f_im[v], f[2 * v].y, f[2 * v + 1].y);
            }
            for (int i = 0; i < CEMA_BLOCK / 16; i++) {
                uint32_t a[4][1];
                cema_across(a[0], a[2], dy, k, 16 * i + row, NULL);
                cema_across(a[1], a[3], dy, k, 16 * i + row + 8, NULL);
                multiply<1, STATE_TERMS>(A[0][i], a, h_re), multiply<1, STATE_TERMS>(A[1][i], a, h_im);
                cema_across(a[0], a[2], x, k, 16 * i + row, last);
                cema_across(a[1], a[3], x, k, 16 * i + row + 8, last);
                multiply<1, STATE_TERMS>(E[0][i], a, f_re), multiply<1, STATE_TERMS>(E[1][i], a, f_im);
            }
        }
        over = plus(over, make_float2(__shfl_xor_sync(~0u, over.x, 1), __shfl_xor_sync(~0u, over.y, 1)));
        over = plus(over, make_float2(__shfl_xor_sync(~0u, over.x, 2), __shfl_xor_sync(~0u, over.y, 2)));
        // 4.
        for (int u = 0; u < 2; u++) {
            int n = n0 + 2 * pair + u;
            CemaMode m = cema_mode(coeffs, n, c, d);
            float2 terms[2][CEMA_BLOCK / 8];
            for (int i = 0; i < CEMA_BLOCK / 8; i++) {
                terms[0][i] = make_float2(A[0][i / 2][i % 2 * 2 + u], A[1][i / 2][i % 2 * 2 + u]);
                terms[1][i] = make_float2(E[0][i / 2][i % 2 * 2 + u], E[1][i / 2][i % 2 * 2 + u]);
            }
            float2 z = power8(m.q), gp = times(m.p, m.g), gq = times(m.g, m.q);
            Series K = evaluate(lags, z), a = evaluate(terms[0], z), e = evaluate(terms[1], z);
            float2 to_row = low_power(m.q, row), to_row_slope = make_float2(0, 0); // q^row, row q^(row-1)
            if (row > 0) to_row_slope = times(row, low_power(m.q, row - 1));
            float2 value = plus(plus(times(gp, K.value), times(gq, a.value)), times(m.p, e.value));
            float2 slope = plus(plus(times(gp, K.slope), times(gq, a.slope)), times(m.p, e.slope));
            float2 dp = times(to_row, plus(times(m.g, K.value), e.value));
            float2 dg = times(to_row, plus(times(m.p, K.value), times(m.q, a.value)));
            float2 dq = plus(times(to_row_slope, value), times(to_row, times(times(8, low_power(m.q, 7)), slope)));
            dq = plus(dq, times(to_row, times(m.g, a.value)));
            float sums[5] = {dp.x, dq.x, -dq.y, dg.x, -dg.y};
            float from[5] = {0, __shfl_sync(~0u, over.x, 4 * (2 * pair + u)),
                             -__shfl_sync(~0u, over.y, 4 * (2 * pair + u)), 0, 0};
            for (int i = 0; i < 5; i++) {
                for (int step = 4; step < WARP; step *= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], step);
                if (row == 0 && n < d.N) part[((size_t)i * d.N + n) * d.D] = sums[i] + from[i];
            }
        }
    }
}

// A thread block needs 147,968 bytes for 16 channels. Where it has less, it has half of the channels; channels are
// independent, so the results are equal bit for bit.
static void cema_fast_backward(floatX *dinp, Coeffs *dcoeffs, float *domega, float *dh, const floatX *dout,
                               const floatX *inp, const float *h_blocks, const Coeffs *coeffs, const float *omega,
                               Dims d) {
    static_assert(CEMA_CHANNELS * CEMA_TILE * sizeof(Pair) <= SHARED_TOTAL - SHARED_DECLARED,
                  "the tiles of half of the channels of the sums, and of all channels of the other kernels");
    const size_t bytes = cema_fast_workspace(d);
    float *futures = parts_memory(bytes, workspace(bytes)), *parts = futures + cema_futures_size(d);
    const float2 *states = (const float2 *)(const void *)h_blocks, *after = (const float2 *)(void *)futures;
    int wide = 2 * cema_tile_bytes(CEMA_CHANNELS) + SHARED_DECLARED <= gpu.max_shared;
    int channels = wide ? CEMA_CHANNELS : CEMA_CHANNELS / 2, partial = dh && d.L % CEMA_BLOCK > 0;
    size_t shared = 2 * cema_tile_bytes(channels);
    cema_fast_run(dinp, (float2 *)(void *)futures, dh, dout, coeffs, omega, dh, 1, d);
    auto sums =
        wide      ? (partial ? cema_fast_sums_kernel<true, CEMA_CHANNELS> : cema_fast_sums_kernel<false, CEMA_CHANNELS>)
        : partial ? cema_fast_sums_kernel<true, CEMA_CHANNELS / 2>
                  : cema_fast_sums_kernel<false, CEMA_CHANNELS / 2>;
    allow_shared(sums, shared);
    size_t modes = (size_t)d.N * d.D;
    memory_clear(dcoeffs->p, 5 * modes * sizeof(float)); // all five
    if (in_parts_memory(futures)) beside_begin();
    sums<<<cema_grid(channels, d), dim3(WARP, channels), shared, gpu.stream>>>(parts, dout, inp, states, after, *coeffs,
                                                                               d);
    int P = cema_grid(channels, d).y;
    sum_parts_fast(dcoeffs->p, domega, parts, P, 5 * modes, d.D, 1);
    if (in_parts_memory(futures)) beside_end();
}

// Chunk parallelism: the state after these tokens from a zero state, or the gradient before them with nothing after them.
static void cema_fast_reduce(float *h, const floatX *inp, const Coeffs *coeffs, int backward, Dims d) {
    float2 *states = (float2 *)workspace(cema_futures_size(d) * sizeof(float));
    cema_fast_run(NULL, states, h, inp, coeffs, NULL, NULL, backward, d);
}
