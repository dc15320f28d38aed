/*
cema.cuh: CEMA on tensor cores. Replaces cema_forward() of megalodon.cu, which says what is computed. The backward pass
is in cema_backward.cuh.

The idea: inside a token block of T = CEMA_BLOCK tokens, with h0 the state before it, everything is a product of
matrices that are the same for all token blocks of a channel:
    y = K x + Re S h0       K_(t,s) = k_(t-s) for s <= t, k_j = Re sum_n g p q^j, omega added to k_0
                            S_(t,n) = g q^(t+1)
    h_end = q^T h0 + P x    P_(n,s) = p q^(T-1-s)
A channel's token blocks, of all sequences, are the columns of x, h0, y and h_end, so tensor cores can be used. A warp
has a channel and computes the channel's matrices from q in registers; they are never in memory.

             s           columns             n         columns                   s           columns
        +----------+   +---------+       +------+   +-----------+            +-------+     +---------+
      t |k0        | s | x  x  x |     t | Re S | n | h0 h0 h0  |          n |   P   |   s | x  x  x |
        |k1 k0     |   |         |  +    |      |   +-----------+            +-------+     |         |
        |k2 k1 k0  |   |         |       +------+                                          +---------+
        +----------+   +---------+       3. tokens: y                        1. ends: the states from zero

Kernels: 1. ends: P x. 2. scan over token blocks: h_end = q^T h0 + P x, which is the next h0. 3. tokens: y.
Backward, G_t = conj(g) dy_t + conj(q) G_(t+1) and dx_t = omega dy_t + sum_n p Re G_t are the same system run from the
last token to the first, for the conjugates, with g q instead of p, and p instead of g q. So the same kernels run both.

States are (D, columns, N) complex numbers. A thread block has CEMA_CHANNELS channels of CEMA_COLUMNS columns, whose
tokens it copies to shared memory; modes are taken eight at a time.
Requires: bfloat16, sm_80 (mma.m16n8k16), D a multiple of VEC.
Measured: see dev/notes/kernels.md
*/
#pragma once
#include "mma.cuh"

enum {
    CEMA_COLUMNS = 32,                         // token blocks of a thread block's tile
    CEMA_CHANNELS = 16,                        // channels of a thread block's tile
    CEMA_WARPS = 8,                            // warps of a thread block
    CEMA_PAIRS = CEMA_BLOCK / 2 + 4,           // pairs of tokens of a column in shared memory, padded (bank conflicts)
    CEMA_TILE = CEMA_COLUMNS * CEMA_PAIRS + 2, // pairs of tokens of a channel in shared memory, padded
    OUT_TERMS = 2,                             // terms of a float operand (mma.cuh) for results rounded to bfloat16
    STATE_TERMS = 3                            // terms of a float operand for results in float
};

static size_t cema_tile_bytes(int channels) { return (size_t)channels * CEMA_TILE * sizeof(Pair); }
static dim3 cema_grid(int channels, Dims d) {
    return dim3(ceil_div(d.D, channels), ceil_div(d.B * ceil_div(d.L, CEMA_BLOCK), CEMA_COLUMNS));
}

static int cema_fast_supports(Dims d) { return d.D % VEC == 0; }

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
// which token a column begins with: its first one, its last one, or the one that would be the last if the column were
// whole.

enum { FROM_FIRST, FROM_LAST, FROM_END };

static __device__ const uint32_t cema_zeros[4] = {0, 0, 0, 0}; // read instead of tokens outside of a column

// Copies the tokens of a thread block of COUNT threads to its tiles, or from them to x if `write`.
// Mapping: a thread has VEC channels of two tokens. It issues the loads of AT_ONCE such pairs before it uses them.
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
// Mapping: a thread block has a tile, a warp two channels. A is P, of eight modes: their real parts, then their
//   imaginary ones.
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

// Formula: the state before each column, h_(k+1) = q^T h_k + end_k, which replaces the ends. Backward: the conjugate of
//   dL/dh after each column, from the last one, which may have fewer tokens, to the first. start (B,2,N,D), or NULL:
//   zero.
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

// words[m]: the pair k_j, k_(j-1) with j = row - 2 pair + 8 m, and 0 for negative indices. So the fragment of tile
// (i,j) of K, i >= j, is the words [m], [m + 1], [m - 1], [m] with m = 2 (i - j).
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
// Passes: 1. tokens to shared memory. 2. y = K x. For eight modes: 3. y += Re S h0. 4. y replaces x in shared memory,
//   and is copied to out.
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

// Formula: the state after the last token, from that before the last column; backward dL/dh before the first token,
//   from that after the first column. Mapping: a thread has a mode of a channel of a sequence.
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

// Kernels 1, 2 and 3, and the last state. start, end (B,2,N,D) may be NULL or equal. out NULL: without kernel 3.
static void cema_fast_run(floatX *out, float2 *states, float *end, const floatX *inp, const Coeffs *coeffs,
                          const float *omega, const float *start, int backward, Dims d) {
    size_t modes = (size_t)d.B * d.N * d.D, tiles = cema_tile_bytes(CEMA_CHANNELS);
    dim3 grid = cema_grid(CEMA_CHANNELS, d), block(WARP, CEMA_WARPS);
    allow_shared(cema_fast_ends_kernel, tiles), allow_shared(cema_fast_tokens_kernel, tiles);
    if (d.L > CEMA_BLOCK) cema_fast_ends_kernel<<<grid, block, tiles>>>(states, inp, *coeffs, backward, d);
    cema_fast_scan_kernel<<<blocks_for(modes, THREADS), THREADS>>>(states, start, *coeffs, backward, d);
    if (out) cema_fast_tokens_kernel<<<grid, block, tiles>>>(out, states, inp, *coeffs, omega, backward, d);
    if (end) cema_fast_end_kernel<<<blocks_for(modes, THREADS), THREADS>>>(end, states, inp, *coeffs, backward, d);
}

static void cema_fast_forward(floatX *out, float *h_blocks, float *h_out, const floatX *inp, const Coeffs *coeffs,
                              const float *omega, const float *h_in, Dims d) {
    cema_fast_run(out, (float2 *)(void *)h_blocks, h_out, inp, coeffs, omega, h_in, 0, d);
}
