/*
cema.cuh: CEMA on tensor cores. Replaces cema_forward() and cema_backward() of megalodon.cu, which say what is computed.

The idea: inside a token block of T = CEMA_BLOCK tokens, with h0 the state before it, everything is a product of matrices
that are the same for all token blocks of a channel:
    y = K x + Re S h0        K_(t,s) = k_(t-s), s <= t,   k_j = Re sum_n g p q^j, omega added to k_0,   S_(t,n) = g q^(t+1)
    h_end = q^T h0 + P x     P_(n,s) = p q^(T-1-s)
So each token block is one column of a matrix, and tensor cores multiply. A warp has a channel and makes the channel's
matrices from q in registers; they are never in memory.

    a channel's tokens         0..63 | 64..127 | ...              as matrix: a column for each token block of all sequences
                                                       columns
         +---------------+   +-------------+   +-------+   +-------------+       +-------+   +-------------+
       t | K, triangular | s | x  x  x ... | + | Re S  | n | h0 h0 h0 ...|     n |   P   | s | x  x  x ... |  ->  ends
         +---------------+   +-------------+   +-------+   +-------------+       +-------+   +-------------+

Kernels: 1. ends: P x, each token block's state from zero. 2. scan over token blocks: h = q^T h + end. 3. tokens: y.
The backward pass G_t = conj(g) dy_t + conj(q) G_(t+1), dx_t = omega dy_t + sum_n p Re G_t is the same system run from the
last token to the first, for the conjugates, with g q and p in each other's place. So are its kernels. With f the
conjugate of dL/dh after a token block, and polynomials summed over all token blocks,
    K(z) = sum_(t>=s) dy_t x_s z^(t-s)    A(z) = sum_t dy_t h0 z^t    E(z) = sum_s f x_s z^(T-1-s)
the gradients of the coefficients are those of Re (g p K(q) + g q A(q) + p E(q) + q^T f h0):
4. sums: the coefficients of these polynomials, by products whose inner index is the token block; values and slopes at q.

States are (D, columns, N) complex numbers; a column is a token block of a sequence. A thread block has CEMA_CHANNELS channels
of CEMA_COLUMNS columns, whose tokens it copies to shared memory; modes are taken eight at a time.
Requires: bfloat16, sm_80 (mma.m16n8k16), D a multiple of VEC.
Measured: see dev/notes/kernels.md
*/
#pragma once
#include "mma.cuh"

enum {
    CEMA_COLUMNS = 32,  // token blocks,
    CEMA_CHANNELS = 16, // channels,
    CEMA_WARPS = 8,     // and warps of a thread block
    // pairs of tokens of a column in shared memory, and of a channel: padded to avoid shared-memory bank conflicts
    CEMA_PAIRS = CEMA_BLOCK / 2 + 4,
    CEMA_TILE = CEMA_COLUMNS * CEMA_PAIRS + 2,
    // bfloat16 terms of a float operand, see mma.cuh
    OUT_TERMS = 2,  // where the result is rounded to bfloat16
    STATE_TERMS = 3 // where the result is a float
};

static size_t cema_tile_bytes(int channels) { return (size_t)channels * CEMA_TILE * sizeof(Pair); }
static dim3 cema_grid(int channels, Dims d) {
    return dim3(ceil_div(d.D, channels), ceil_div(d.B * ceil_div(d.L, CEMA_BLOCK), CEMA_COLUMNS));
}

static int cema_fast_supports(Dims d) { return d.D % VEC == 0; }

// Elements of `futures` and of `parts`, the scratch of the backward pass.
static size_t cema_futures_size(Dims d) { return (size_t)d.B * ceil_div(d.L, CEMA_BLOCK) * 2 * d.N * d.D; }
static size_t cema_parts_size(Dims d) { return (size_t)cema_grid(CEMA_CHANNELS, d).y * (5 * d.N + 1) * d.D; }
static size_t cema_fast_workspace(Dims d) { return (cema_futures_size(d) + cema_parts_size(d)) * sizeof(float); }

// ----------------------------------------------------------------------------
// complex numbers

static __device__ float2 times(float2 a, float2 b);     // of megalodon.cu
static __device__ float2 power(float2 base, int64_t n); // of megalodon.cu, in double
static __device__ float2 times(float a, float2 b) { return make_float2(a * b.x, a * b.y); }
static __device__ float2 plus(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
static __device__ float2 plus_times(float2 sum, float2 a, float2 b) { // sum + a b, by fused operations
    return make_float2(sum.x + a.x * b.x - a.y * b.y, sum.y + a.x * b.y + a.y * b.x);
}
static __device__ float2 low_power(float2 q, int n) { // q^n for n < 8
    float2 result = make_float2(1, 0);
    for (int bit = 1; bit < 8; bit *= 2, q = times(q, q)) result = n & bit ? times(result, q) : result;
    return result;
}
static __device__ float2 power8(float2 q) {
    float2 q2 = times(q, q), q4 = times(q2, q2);
    return times(q4, q4);
}

// The coefficients of mode n of channel c; zeros for n >= N.
typedef struct {
    float p;
    float2 q, g;
} CemaMode;
static __device__ CemaMode cema_mode(const Coeffs &coeffs, int n, int c, Dims d) {
    size_t i = (size_t)n * d.D + c;
    if (n >= d.N) return CemaMode{0, make_float2(0, 0), make_float2(0, 0)};
    return CemaMode{coeffs.p[i], make_float2(coeffs.q_re[i], coeffs.q_im[i]),
                    make_float2(coeffs.g_re[i], coeffs.g_im[i])};
}

// ----------------------------------------------------------------------------
// tiles in shared memory, (channels, CEMA_TILE): a channel's columns are contiguous, as pairs of tokens. The order says
// which token a column begins with: its first one, its last one, or the one that would be the last if the column were whole.

enum { FROM_FIRST, FROM_LAST, FROM_END };

static __device__ const uint32_t cema_zeros[4] = {0, 0, 0, 0}; // what is loaded where there is no token

// Copies the tokens of a thread block of COUNT threads to its tiles, or from them to x if `write`.
// Mapping: a thread has VEC channels of two tokens, AT_ONCE times with loads in flight together.
// The caller must __syncthreads() before it reads the tiles.
template <int CHANNELS, int COUNT>
static __device__ void cema_copy(floatX *x, Pair *tiles, bool write, int order, Dims d) {
    enum { VECTORS = CHANNELS / VEC, PAIRS = CEMA_BLOCK / 2, AT_ONCE = 4 };
    static_assert(CEMA_COLUMNS * PAIRS * VECTORS % (AT_ONCE * COUNT) == 0, "all threads have work in every round");
    __shared__ int first[CEMA_COLUMNS], tokens[CEMA_COLUMNS]; // of a column: first row, tokens
    const unsigned thread = threadIdx.y * WARP + threadIdx.x;
    if (thread < CEMA_COLUMNS) {
        int blocks = ceil_div(d.L, CEMA_BLOCK), column = blockIdx.y * CEMA_COLUMNS + thread;
        int t0 = column % blocks * CEMA_BLOCK;
        first[thread] = column / blocks * d.L + t0;
        tokens[thread] = column < d.B * blocks ? min_int(CEMA_BLOCK, d.L - t0) : 0;
    }
    __syncthreads();
    for (unsigned i0 = thread; i0 < CEMA_COLUMNS * PAIRS * VECTORS; i0 += AT_ONCE * COUNT) {
        Vec<VEC> two[AT_ONCE][2];
        Pair *tile[AT_ONCE];
        for (int k = 0; k < AT_ONCE; k++) {
            unsigned i = i0 + k * COUNT, c = i % VECTORS * VEC, pair = i / VECTORS % PAIRS,
                     column = i / VECTORS / PAIRS;
            int channel = blockIdx.x * CHANNELS + c, T = channel < d.D ? tokens[column] : 0;
            tile[k] = tiles + c * CEMA_TILE + column * CEMA_PAIRS + pair;
            if (write) {
                for (int j = 0; j < VEC; j++) {
                    Pair numbers = tile[k][j * CEMA_TILE];
                    two[k][0].v[j] = numbers.v[0], two[k][1].v[j] = numbers.v[1];
                }
            }
            for (int u = 0; u < 2; u++) {
                int t = 2 * pair + u;
                if (order != FROM_FIRST) t = (order == FROM_LAST ? T : CEMA_BLOCK) - 1 - t;
                Vec<VEC> *at = (Vec<VEC> *)(x + (size_t)(unsigned)(first[column] + t) * (unsigned)d.D + channel);
                if (!write) two[k][u] = *(t >= 0 && t < T ? at : (const Vec<VEC> *)cema_zeros);
                if (write && t >= 0 && t < T) *at = two[k][u];
            }
        }
        for (int k = 0; k < AT_ONCE && !write; k++) {
            for (int j = 0; j < VEC; j++) tile[k][j * CEMA_TILE] = Pair{{two[k][0].v[j], two[k][1].v[j]}};
        }
    }
}

// The fragment of B = x with columns 8 j to 8 j + 7, tokens 16 k to 16 k + 15.
static __device__ void cema_tokens_fragment(uint32_t b[2][1], const Pair *x, int j, int k) {
    const Pair *at = x + (8 * j + threadIdx.x / 4) * CEMA_PAIRS + 8 * k + threadIdx.x % 4;
    b[0][0] = word_of(at[0]), b[1][0] = word_of(at[4]);
}

// ----------------------------------------------------------------------------
// 1. ends

// Formula: ends = P x; backward P_(n,s) = g q q^(T-1-s), with x = dy from the last token to the first.
// Mapping: a thread block has a tile, a warp two channels. A is P, of eight modes: their real parts, then their imaginary ones.
// Memory: reads R*D, writes 2*N*R*D/CEMA_BLOCK floats.
// Passes: 1. tokens to shared memory. For eight modes: 2. P into registers. 3. the product. 4. store.
static __global__ void __launch_bounds__(WARP *CEMA_WARPS, 2)
    cema_fast_ends_kernel(float2 *states, const floatX *inp, Coeffs coeffs, int backward, Dims d) {
    extern __shared__ Pair cema_tiles[];
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4, columns = d.B * ceil_div(d.L, CEMA_BLOCK);
    // 1.
    cema_copy<CEMA_CHANNELS, WARP * CEMA_WARPS>((floatX *)inp, cema_tiles, false, backward ? FROM_END : FROM_FIRST, d);
    __syncthreads();
    for (int i = 0; i < CEMA_CHANNELS / CEMA_WARPS; i++) {
        int tile = threadIdx.y * (CEMA_CHANNELS / CEMA_WARPS) + i, c = blockIdx.x * CEMA_CHANNELS + tile;
        if (c >= d.D) break;
        const Pair *x = cema_tiles + tile * CEMA_TILE;
        for (int n0 = 0; n0 < d.N; n0 += 8) {
            int n = n0 + row;
            // 2.
            CemaMode m = cema_mode(coeffs, n, c, d);
            uint32_t P[CEMA_BLOCK / 16][4][STATE_TERMS];
            float2 q8 = power8(m.q), in = backward ? times(m.g, m.q) : make_float2(m.p, 0);
            float2 second = times(in, low_power(m.q, 6 - 2 * pair)); // of two neighbours, from the last token on
            for (int k = CEMA_BLOCK / 8 - 1; k >= 0; k--) {
                float2 first = times(second, m.q);
                split<STATE_TERMS>(P[k / 2][k % 2 * 2], first.x, second.x);
                split<STATE_TERMS>(P[k / 2][k % 2 * 2 + 1], first.y, second.y);
                second = times(second, q8);
            }
            // 3.
            float ends[CEMA_COLUMNS / 8][4] = {};
            for (int k = 0; k < CEMA_BLOCK / 16; k++) {
                for (int j = 0; j < CEMA_COLUMNS / 8; j++) {
                    uint32_t b[2][1];
                    cema_tokens_fragment(b, x, j, k);
                    multiply<STATE_TERMS, 1>(ends[j], P[k], b);
                }
            }
            // 4.
            for (int j = 0; j < CEMA_COLUMNS / 4; j++) {
                int column = blockIdx.y * CEMA_COLUMNS + j / 2 * 8 + 2 * pair + j % 2;
                if (n < d.N && column < columns)
                    states[((size_t)c * columns + column) * d.N + n] =
                        make_float2(ends[j / 2][j % 2], ends[j / 2][2 + j % 2]);
            }
        }
    }
}

// ----------------------------------------------------------------------------
// 2. scan

// Formula: the state before each column, h_(k+1) = q^T h_k + end_k, in the place of the ends. start (B,2,N,D), or NULL: zero.
//   Backward from the last column, which may have fewer tokens, to the first: the conjugate of dL/dh after each column.
// Mapping: a thread has a mode of a channel of a sequence; AHEAD ends are in flight.
// Memory: reads and writes 2*N*R*D/CEMA_BLOCK floats.
static __global__ void cema_fast_scan_kernel(float2 *states, const float *start, Coeffs coeffs, int backward, Dims d) {
    enum { AHEAD = 8 };
    size_t i = thread_index(), n = i % d.N, b = i / d.N % d.B, c = i / d.N / d.B, mode = n * d.D + c;
    size_t re = b * 2 * d.N * d.D + mode, im = re + (size_t)d.N * d.D;
    int blocks = ceil_div(d.L, CEMA_BLOCK), tail = d.L - (blocks - 1) * CEMA_BLOCK;
    if (c >= (size_t)d.D) return;
    float2 q = make_float2(coeffs.q_re[mode], coeffs.q_im[mode]), whole = power(q, CEMA_BLOCK), h = make_float2(0, 0);
    if (start) h = make_float2(start[re], backward ? -start[im] : start[im]);
    float2 *first = states + (c * d.B + b) * blocks * d.N + n;
    for (int k0 = 0; k0 < blocks; k0 += AHEAD) {
        float2 end[AHEAD];
        for (int k = 0; k < AHEAD; k++) {
            if (k0 + k >= blocks - 1) break; // the end of the last column is not needed
            end[k] = first[(size_t)(backward ? blocks - 1 - k0 - k : k0 + k) * d.N];
        }
        for (int k = 0; k < AHEAD; k++) {
            if (k0 + k >= blocks) break;
            first[(size_t)(backward ? blocks - 1 - k0 - k : k0 + k) * d.N] = h;
            if (k0 + k == blocks - 1) break;
            bool partial = backward && k0 + k == 0 && tail < CEMA_BLOCK;
            h = plus(times(partial ? power(q, tail) : whole, h), end[k]);
        }
    }
}

// ----------------------------------------------------------------------------
// 3. tokens

// words[m]: the pair k_j, k_(j-1) with j = row - 2 pair + 8 m, and 0 for negative indices. So the fragment of tile (i,j) of
// K, i >= j, is the words [m], [m + 1], [m - 1], [m] with m = 2 (i - j).
static __device__ void cema_kernel_words(uint32_t words[CEMA_BLOCK / 8][OUT_TERMS], const Coeffs &coeffs, float omega,
                                         int c, Dims d) {
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4;
    float k[CEMA_BLOCK / 8] = {}; // k_(row + 8 m): each lane sums every fourth mode
#pragma unroll 4
    for (int n0 = 0; n0 < d.N; n0 += 4) {
        CemaMode m = cema_mode(coeffs, n0 + pair, c, d);
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
        split<OUT_TERMS>(words[i], lag[0], lag[1]);
    }
}

// Formula: y = K x + Re S h0; backward S_(t,n) = p q^t, with y = dx and x = dy from the last token to the first.
// Mapping: a thread block has a tile, a warp two channels. y stays in registers for all columns.
// Memory: reads and writes R*D, reads 2*N*R*D/CEMA_BLOCK floats.
// Passes: 1. tokens to shared memory. 2. y = K x. For eight modes: 3. y += Re S h0. 4. y over x in shared memory, to out.
static __global__ void __launch_bounds__(WARP *CEMA_WARPS, 2)
    cema_fast_tokens_kernel(floatX *out, const float2 *states, const floatX *inp, Coeffs coeffs, const float *omega,
                            int backward, Dims d) {
    extern __shared__ Pair cema_tiles[];
    const int row = threadIdx.x / 4, pair = threadIdx.x % 4, columns = d.B * ceil_div(d.L, CEMA_BLOCK);
    const int order = backward ? FROM_LAST : FROM_FIRST;
    // 1.
    cema_copy<CEMA_CHANNELS, WARP * CEMA_WARPS>((floatX *)inp, cema_tiles, false, order, d);
    __syncthreads();
    for (int i = 0; i < CEMA_CHANNELS / CEMA_WARPS; i++) {
        int tile = threadIdx.y * (CEMA_CHANNELS / CEMA_WARPS) + i, c = blockIdx.x * CEMA_CHANNELS + tile;
        if (c >= d.D) break;
        Pair *x = cema_tiles + tile * CEMA_TILE;
        // 2. K is a Toeplitz matrix: the same fragment for all tiles with the same difference of row and column
        float y[CEMA_COLUMNS / 8][CEMA_BLOCK / 16][4] = {};
        uint32_t k[CEMA_BLOCK / 8][OUT_TERMS];
        cema_kernel_words(k, coeffs, omega[c], c, d);
        for (int difference = 0; difference < CEMA_BLOCK / 16; difference++) {
            uint32_t a[4][OUT_TERMS];
            for (int p = 0; p < OUT_TERMS; p++) {
                a[0][p] = a[3][p] = k[2 * difference][p], a[1][p] = k[2 * difference + 1][p];
                a[2][p] = difference > 0 ? k[2 * difference - 1][p] : 0;
            }
            for (int j = 0; j < CEMA_COLUMNS / 8; j++) {
                for (int i = difference; i < CEMA_BLOCK / 16; i++) {
                    uint32_t b[2][1];
                    cema_tokens_fragment(b, x, j, i - difference);
                    multiply<OUT_TERMS, 1>(y[j][i], a, b);
                }
            }
        }
        // 3. a pair of S is a mode's real part and its negative imaginary part; a pair of h0 is real and imaginary part
        for (int n0 = 0; n0 < d.N; n0 += 8) {
            int n = n0 + pair;
            float2 h[CEMA_COLUMNS / 8][2]; // prefetched
            for (int j = 0; j < CEMA_COLUMNS / 4; j++) {
                int column = blockIdx.y * CEMA_COLUMNS + j / 2 * 8 + row, at = n + j % 2 * 4;
                h[j / 2][j % 2] = make_float2(0, 0);
                if (column < columns && at < d.N) h[j / 2][j % 2] = states[((size_t)c * columns + column) * d.N + at];
            }
            uint32_t S[CEMA_BLOCK / 16][4][OUT_TERMS];
            for (int u = 0; u < 2; u++) {
                CemaMode m = cema_mode(coeffs, n + 4 * u, c, d);
                float2 q8 = power8(m.q), from = backward ? make_float2(m.p, 0) : times(m.g, m.q);
                float2 v = times(from, low_power(m.q, row));
                for (int i = 0; i < CEMA_BLOCK / 8; i++, v = times(v, q8))
                    split<OUT_TERMS>(S[i / 2][i % 2 + 2 * u], v.x, -v.y);
            }
            for (int j = 0; j < CEMA_COLUMNS / 8; j++) {
                uint32_t b[2][OUT_TERMS];
                split<OUT_TERMS>(b[0], h[j][0].x, h[j][0].y), split<OUT_TERMS>(b[1], h[j][1].x, h[j][1].y);
                for (int i = 0; i < CEMA_BLOCK / 16; i++) multiply<OUT_TERMS, OUT_TERMS>(y[j][i], S[i], b);
            }
        }
        // 4.
        __syncwarp(); // all lanes have read x
        for (int j = 0; j < CEMA_COLUMNS / 8; j++) {
            for (int i = 0; i < CEMA_BLOCK / 16; i++) {
                for (int u = 0; u < 4; u++) {
                    int t = 16 * i + row + u / 2 * 8, column = 8 * j + 2 * pair + u % 2;
                    x[column * CEMA_PAIRS + t / 2].v[t % 2] = to_floatX(y[j][i][u]);
                }
            }
        }
    }
    __syncthreads();
    cema_copy<CEMA_CHANNELS, WARP * CEMA_WARPS>(out, cema_tiles, true, order, d);
}

// Formula: the state after the last token, from that before the last column; backward dL/dh before the first token, from that
//   after the first column. Mapping: a thread has a mode of a channel of a sequence.
// Memory: reads up to CEMA_BLOCK tokens N times, mostly from cache; reads and writes 2*N*D floats for each sequence.
static __global__ void cema_fast_end_kernel(float *end, const float2 *states, const floatX *inp, Coeffs coeffs,
                                            int backward, Dims d) {
    size_t i = thread_index(), modes = (size_t)d.N * d.D, b = i / modes, mode = i % modes, c = mode % d.D;
    int blocks = ceil_div(d.L, CEMA_BLOCK), t0 = backward ? 0 : (blocks - 1) * CEMA_BLOCK;
    if (b >= (size_t)d.B) return;
    float2 h = states[((c * d.B + b) * blocks + t0 / CEMA_BLOCK) * d.N + mode / d.D];
    float2 q = make_float2(coeffs.q_re[mode], coeffs.q_im[mode]), g = make_float2(coeffs.g_re[mode], coeffs.g_im[mode]);
    int T = min_int(CEMA_BLOCK, d.L - t0);
    for (int t = 0; t < T; t++) {
        float x = to_float(inp[(b * d.L + (backward ? T - 1 - t : t0 + t)) * d.D + c]);
        h = backward ? times(q, plus(times(x, g), h)) : plus(times(q, h), make_float2(coeffs.p[mode] * x, 0));
    }
    end[b * 2 * modes + mode] = h.x, end[(b * 2 + 1) * modes + mode] = backward ? -h.y : h.y;
}

// Kernels 1, 2 and 3, and the last state. start, end (B,2,N,D) may be NULL or equal.
static void cema_fast_run(floatX *out, float2 *states, float *end, const floatX *inp, const Coeffs *coeffs,
                          const float *omega, const float *start, int backward, Dims d) {
    size_t modes = (size_t)d.B * d.N * d.D, tiles = cema_tile_bytes(CEMA_CHANNELS);
    dim3 grid = cema_grid(CEMA_CHANNELS, d), block(WARP, CEMA_WARPS);
    allow_shared(cema_fast_ends_kernel, tiles), allow_shared(cema_fast_tokens_kernel, tiles);
    if (d.L > CEMA_BLOCK) cema_fast_ends_kernel<<<grid, block, tiles>>>(states, inp, *coeffs, backward, d);
    cema_fast_scan_kernel<<<blocks_for(modes, THREADS), THREADS>>>(states, start, *coeffs, backward, d);
    cema_fast_tokens_kernel<<<grid, block, tiles>>>(out, states, inp, *coeffs, omega, backward, d);
    if (end) cema_fast_end_kernel<<<blocks_for(modes, THREADS), THREADS>>>(end, states, inp, *coeffs, backward, d);
}

static void cema_fast_forward(floatX *out, float *h_blocks, float *h_out, const floatX *inp, const Coeffs *coeffs,
                              const float *omega, const float *h_in, Dims d) {
    cema_fast_run(out, (float2 *)(void *)h_blocks, h_out, inp, coeffs, omega, h_in, 0, d);
}

// ----------------------------------------------------------------------------
// 4. sums

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

// A lane's terms of c(q) = sum_t c_t q^t and its slope, from c[m] = c_(row + 8 m): by Horner's rule, value in z = q^8 and
// slope with respect to z, both still to be multiplied by q^row.
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

// The coefficients of K(z): lags[m] = sum of dy_t x_s with t - s = row + 8 m, over the tile's columns. The matrix dy x' is
// computed in tiles of 16 x 8; those with the same lags are added.
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

// Formula: the gradients of the coefficients, see the top of this file. PARTIAL: sequences end with columns of fewer tokens,
//   after which there is a gradient dh. Otherwise f is 0 there, and T is the same everywhere.
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
    float *futures = (float *)workspace(cema_fast_workspace(d)), *parts = futures + cema_futures_size(d);
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
    sums<<<cema_grid(channels, d), dim3(WARP, channels), shared>>>(parts, dout, inp, states, after, *coeffs, d);
    size_t modes = (size_t)d.N * d.D, width = 5 * modes + d.D;
    int P = cema_grid(channels, d).y;
    sum_parts(dcoeffs->p, parts, P, width, 5 * modes, 0);
    sum_parts(domega, parts + 5 * modes, P, width, d.D, 1);
}
