/*
megalodon.c: the Megalodon language model on the CPU. Every layer's forward pass with its backward pass next
to it, in the order in which data flows; then the blocks, the model, the optimizer. megalodon.h says what the
model is and what the letters mean.

How to read it
- Arguments: results first, then what the forward pass kept, inputs, parameters, sizes. The backward pass of
  f(out, inp, weight) is f(dinp, dweight, dout, inp, weight); dX is the gradient of the loss by X.
- Gradients of activations are set (=), those of parameters are added to (+=).
- Tensors are row-major: (B,L,D) lies as B*L rows of D numbers; R = B*L counts rows. Weights are (out, in).

Easy to get wrong
- Scales of all norms, and gamma of q and k, are stored as an offset from one: used as weight + 1.
- CEMA's gamma and omega, and the FFN's alpha, are not: used as stored.
- v comes from TimestepNorm's output; q, k, r come from RMSNorm's, after CEMA.
- The FFN's residual is the block's input, not its own input.
- q and k both carry 1/sqrt(dz); the scores get no further scale.
- Rotary positions count from the chunk's start and turn adjacent pairs (2j, 2j+1).
- TimestepNorm's n counts scalars, g = D/G for every token; its running mean and squares are double.
*/
#include <assert.h>
#include <complex.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef MEGALODON_BLAS
#include <cblas.h>
#endif

#include "megalodon.h"

enum {
    CEMA_BLOCK = 64,  // tokens between two stored states of CEMA
    QUERY_TILE = 64,  // queries whose scores exist at a time
    LOGITS = 1 << 22, // that exist at a time, in whole positions; at least LOGIT_ROWS of these
    LOGIT_ROWS = 128,
    COLUMNS = 16,      // columns a task sums over all rows, for parameter gradients
    NORM_PART = 65536, // elements a thread sums for the gradient norm
    PARALLEL_MIN = 32768, // operations below which a loop runs serially, see is_large()
};

static const double PI = 3.14159265358979323846;

static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How many threads a parallel loop would have here: inside another one, none of its own.
static int threads_here(void) {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}
// Does a loop of so many operations (iterations of its innermost loop) pay for waking the other threads? That takes tens
// of microseconds if they sleep, and far longer if other processes have the cores. So everything about a small model, or
// about a token of a medium one, runs on one thread.
static int is_large(double operations) { return operations > PARALLEL_MIN && threads_here() > 1; }

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// ----------------------------------------------------------------------------
// vectors: LANES numbers that one instruction handles

#ifdef __AVX512F__
#define VEC_BYTES 64
#else
#define VEC_BYTES 32
#endif
typedef real vec __attribute__((vector_size(VEC_BYTES)));
enum { LANES = VEC_BYTES / sizeof(real) };

// exp(x). The library's expf keeps a loop from being vectorised, so float has its own: e^x = 2^n e^r with
// |r| <= ln(2)/2, and e^r by its series. Relative error below 2e-7. What would overflow is infinity, what would be
// less than the smallest normal number is 0 (denormal numbers are a hundred times slower on some processors), and NaN
// stays NaN. A finite bound instead would be wrong: -1e30 sigmoid(-1e30) is 0, but -1e30 e^-64 is -160.
#ifdef MEGALODON_DOUBLE
static inline real exp_real(real x) { return exp(x); }
#else
static inline real exp_real(real x) {
    float shifted = x * 1.44269504f + 12582912.0f; // 1.5 * 2^23: the sum's last bits are n, rounded
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693145752f) - n * 1.42860677e-6f; // ln(2) in two parts
    float p = 1.0f / 720 + r * (1.0f / 5040);
    p = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * p)))));
    uint32_t bits, exponent;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23; // times 2^n
    memcpy(&p, &bits, sizeof p);
    p = x <= 88.7228317f ? p : x * 1e38f; // infinity, or NaN
    return x < -87.3365402f ? 0 : p;
}
#endif

static inline real sigmoid(real x) { return 1 / (1 + exp_real(-x)); }

// ----------------------------------------------------------------------------
// matrix product: C (M,N) = op(A) op(B), added to C if `add`; op(A) is (M,K), op(B) is (K,N); ta, tb: stored
// transposed. lda, ldb, ldc are the lengths of stored rows.

#ifdef MEGALODON_BLAS

// By the library, which has one thread: ours share the work.
static void matmul_serial(int ta, int tb, int M, int N, int K, const real *A, int lda, const real *B, int ldb, int add,
                        real *C, int ldc) {
#ifdef MEGALODON_DOUBLE
#define cblas_gemm cblas_dgemm
#else
#define cblas_gemm cblas_sgemm
#endif
    cblas_gemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, M, N, K, 1, A, lda, B,
               ldb, (real)add, C, ldc);
}

enum { THREAD_BYTES = 137 << 20 }; // of address space: OpenBLAS's buffer, and a stack

void openblas_set_num_threads(int) __attribute__((weak)); // OpenBLAS has threads of its own; ours do instead
void *blas_memory_alloc(int) __attribute__((weak));       // its buffers
void blas_memory_free(void *) __attribute__((weak));

// OpenBLAS needs a buffer for every thread that multiplies. It keeps them, but retries forever if it cannot get one, so
// all of them are taken before the first product. Returns 0 if there is no room for them.
static int take_buffers(int threads) {
    static int taken = 0;
    size_t bytes = (size_t)threads * THREAD_BYTES;
    if (!blas_memory_alloc || !blas_memory_free || threads <= taken) return 1;
    void *room = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return 0;
    munmap(room, bytes);
    void *buffers[threads];
    for (int i = 0; i < threads; i++) buffers[i] = blas_memory_alloc(0);
    for (int i = 0; i < threads; i++) blas_memory_free(buffers[i]);
    taken = threads;
    return 1;
}

#else

enum { THREAD_BYTES = 8 << 20 }; // of address space: a stack
static int take_buffers(int threads) { return threads > 0; }

// Without a library: for GEMM_K of K at a time, pieces of A's rows and B's columns are packed into the order in
// which the inner loop reads them, so that every read there is contiguous, whatever was transposed. The inner loop
// keeps a TILE_M x TILE_N piece of C in registers.
enum { TILE_M = 6, TILE_N = 2 * LANES, GEMM_M = 24 * TILE_M, GEMM_N = 16 * TILE_N, GEMM_K = 256 };

static void matmul_tile(real *C, int ldc, const real *a, const real *b, int K, int rows, int columns, int add) {
    // a is (K, TILE_M), b is (K, TILE_N)
    vec sum[TILE_M][2] = {0};
    for (int k = 0; k < K; k++, a += TILE_M, b += TILE_N) {
        vec b0, b1;
        memcpy(&b0, b, sizeof b0);
        memcpy(&b1, b + LANES, sizeof b1);
        for (int i = 0; i < TILE_M; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
        }
    }
    real tile[TILE_M][TILE_N];
    memcpy(tile, sum, sizeof tile);
    for (int i = 0; i < rows; i++) {
        real *c = C + (size_t)i * ldc;
        if (add) {
            for (int j = 0; j < columns; j++) c[j] += tile[i][j];
        } else {
            for (int j = 0; j < columns; j++) c[j] = tile[i][j];
        }
    }
}

// Packs `count` rows (or columns) of a matrix, K long, into panels of `width`: out (panels, K, width), zero
// where the last panel has no more. Element (i,k) lies at A[i*si + k*sk]; one of the strides is 1.
static void matmul_pack(real *out, const real *A, size_t si, size_t sk, int count, int K, int width) {
    for (int i0 = 0; i0 < count; i0 += width, out += (size_t)K * width) {
        const real *panel = A + (size_t)i0 * si;
        int inside = min(width, count - i0);
        if (inside < width) memset(out, 0, (size_t)K * width * sizeof *out);
        if (si == 1) { // in the order in which A lies in memory
            for (int k = 0; k < K; k++) {
                for (int i = 0; i < inside; i++) out[(size_t)k * width + i] = panel[(size_t)k * sk + i];
            }
        } else {
            for (int i = 0; i < inside; i++) {
                for (int k = 0; k < K; k++) out[(size_t)k * width + i] = panel[i * si + k];
            }
        }
    }
}

static void matmul_serial(int ta, int tb, int M, int N, int K, const real *A, int lda, const real *B, int ldb, int add,
                        real *C, int ldc) {
    static _Thread_local real a[GEMM_M * GEMM_K], b[GEMM_N * GEMM_K];
    size_t ai = ta ? 1 : (size_t)lda, ak = ta ? (size_t)lda : 1; // A's element (i,k) is A[i*ai + k*ak]
    size_t bj = tb ? (size_t)ldb : 1, bk = tb ? 1 : (size_t)ldb; // B's element (k,j) is B[j*bj + k*bk]
    for (int j0 = 0; j0 < N; j0 += GEMM_N) {
        for (int k0 = 0; k0 < K; k0 += GEMM_K) {
            int n = min(GEMM_N, N - j0), depth = min(GEMM_K, K - k0);
            matmul_pack(b, B + j0 * bj + k0 * bk, bj, bk, n, depth, TILE_N);
            for (int i0 = 0; i0 < M; i0 += GEMM_M) {
                int m = min(GEMM_M, M - i0);
                matmul_pack(a, A + i0 * ai + k0 * ak, ai, ak, m, depth, TILE_M);
                for (int j = 0; j < n; j += TILE_N) {
                    for (int i = 0; i < m; i += TILE_M) {
                        matmul_tile(C + (size_t)(i0 + i) * ldc + j0 + j, ldc, a + (size_t)i * depth,
                                  b + (size_t)j * depth, depth, min(TILE_M, m - i), min(TILE_N, n - j), k0 > 0 || add);
                    }
                }
            }
        }
    }
}

#endif

// One row times a matrix: every number of B is used once, so it is read as it lies.
static void matmul_row(int tb, int N, int K, const real *a, const real *B, int ldb, int add, real *c) {
    for (int j = 0; j < N; j++) {
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int k = 0; k < (tb ? K : 0); k++) sum += a[k] * B[(size_t)j * ldb + k];
        c[j] = add ? c[j] + sum : sum;
    }
    for (int k = 0; k < (tb ? 0 : K); k++) {
        for (int j = 0; j < N; j++) c[j] += a[k] * B[(size_t)k * ldb + j];
    }
}

// The threads share C out in a grid of nearly equal pieces, near squares, for which least of A and B is read. Without
// a library an element's sum runs over k in the same order whatever the grid. bias (N), or NULL: added to every row.
static void matmul(int ta, int tb, int M, int N, int K, const real *A, int lda, const real *B, int ldb, int add,
                 const real *bias, real *C, int ldc) {
    double macs = (double)M * N * K; // multiply-adds; those of a single row wait for memory
    int threads = is_large(macs / (M == 1 ? 4 : 16)) ? threads_here() : 1, rows = M, columns = N;
    double least = INFINITY;
    for (int down = 1; down <= threads; down++) {
        int r = ceil_div(ceil_div(M, down), 8) * 8, c = ceil_div(ceil_div(N, threads / down), 16) * 16;
        double cost = (double)r * c + 64.0 * (r + c);
        if (cost < least) least = cost, rows = r, columns = c;
    }
#pragma omp parallel for collapse(2) schedule(static) if (threads > 1)
    for (int i0 = 0; i0 < M; i0 += rows) {
        for (int j0 = 0; j0 < N; j0 += columns) {
            int m = min(rows, M - i0), n = min(columns, N - j0);
            const real *a = A + (ta ? (size_t)i0 : (size_t)i0 * lda), *b = B + (tb ? (size_t)j0 * ldb : (size_t)j0);
            real *c = C + (size_t)i0 * ldc + j0;
            for (int i = 0; bias && i < m; i++) {
                for (int j = 0; j < n; j++) c[(size_t)i * ldc + j] = bias[j0 + j] + (add ? c[(size_t)i * ldc + j] : 0);
            }
            if (M == 1 && !ta) {
                matmul_row(tb, n, K, a, b, ldb, add || bias, c);
            } else {
                matmul_serial(ta, tb, m, n, K, a, lda, b, ldb, add || bias, c, ldc);
            }
        }
    }
}

// ----------------------------------------------------------------------------
// sums over rows, for the gradients of biases, out (D) += sum_r dy (R,D), and of norms' scales,
// out += sum_r dy (x - mean) rstd, with mean, rstd (R,G) for G groups of columns; NULL: mean 0, rstd 1, a bias.
// A thread owns columns, so the order of the sum does not depend on the number of threads.

static void sum_rows(real *out, const real *dy, const real *x, const double *mean, const real *rstd, int R, int D,
                     int G) {
    int g = D / G, strips = ceil_div(g, COLUMNS);
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int task = 0; task < G * strips; task++) {
        int j = task / strips, from = task % strips * COLUMNS, width = min(COLUMNS, g - from);
        size_t at = (size_t)j * g + from;
        double sum[COLUMNS] = {0};
        for (int r = 0; r < R; r++) {
            const real *dyr = dy + (size_t)r * D + at, *xr = x ? x + (size_t)r * D + at : NULL;
            double m = mean ? mean[(size_t)r * G + j] : 0, s = rstd ? rstd[(size_t)r * G + j] : 1;
            for (int c = 0; c < width; c++) sum[c] += x ? dyr[c] * ((xr[c] - m) * s) : dyr[c];
        }
        for (int c = 0; c < width; c++) out[at + c] += (real)sum[c];
    }
}

// ----------------------------------------------------------------------------
// embedding: out (R,D) = scale * embed[token]; scale is sqrt(D) with scale_emb, else 1
// backward: a row's gradient goes to its token's row, as often as the token occurs

static void embedding_forward(real *out, const int32_t *tokens, const real *embed, real scale, int R, int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        const real *e = embed + (size_t)tokens[r] * D;
        for (int c = 0; c < D; c++) out[(size_t)r * D + c] = scale * e[c];
    }
}

static void embedding_backward(real *dembed, const real *dout, const int32_t *tokens, real scale, int R, int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int c0 = 0; c0 < D; c0 += COLUMNS) { // columns, since two rows may have the same token
        for (int r = 0; r < R; r++) {
            real *de = dembed + (size_t)tokens[r] * D;
            for (int c = c0; c < min(c0 + COLUMNS, D); c++) de[c] += scale * dout[(size_t)r * D + c];
        }
    }
}

// ----------------------------------------------------------------------------
// dropout: out = mask inp/(1 - p), the mask 0 with probability p, otherwise 1. The backward pass is the same with
// gradients. Masks are not kept but drawn again: element i of the step's whole batch has word i % 4 of Philox's
// counter (STREAM_DROPOUT + place, step, layer, i/4), whichever thread, rank or backend asks. out may be inp.

enum { DROP_EMBED, DROP_MX, DROP_ATTENTION, DROP_GATED, DROP_MEGA, DROP_HIDDEN, DROP_NFFN }; // places

typedef struct {
    double p; // 0: no dropout
    uint64_t seed;
    uint32_t stream, step, layer;
    uint64_t first; // i of inp[0]
    uint64_t row;   // numbers of a whole sequence (of attention's, of each head), of which
    size_t run;     // there are so many here; 0: what is here lies without a gap in the step's batch
} Mask;

// The mask of what begins `rows` rows of `width` elements later.
static Mask mask_row(Mask mask, size_t rows, int width) {
    mask.first += (uint64_t)rows * (uint64_t)width;
    return mask;
}

static void dropout(real *out, const real *inp, Mask mask, size_t n) {
    enum { PART = 256 };
    uint32_t limit = (uint32_t)(mask.p * 4294967296.0);
    real scale = (real)(1 / (1 - mask.p));
    size_t run = mask.run > 0 ? mask.run : n;
    if (mask.p == 0) return;
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)n))
    for (size_t start = 0; start < n; start += run) {
        for (size_t from = 0; from < run; from += PART) {
            uint32_t words[PART + 8]; // of whole fours
            uint64_t first = mask.first + start / run * mask.row + from, four = first / 4, skip = first % 4;
            size_t at = start + from, count = run - from < PART ? run - from : PART;
            for (uint64_t f = 0; 4 * f < skip + count; f++) {
                // indices beyond 32 bits go above the layer's 16
                megalodon_philox(words + 4 * f, mask.seed, mask.stream, mask.step,
                                 mask.layer + (uint32_t)((four + f) >> 32 << 16), (uint32_t)(four + f));
            }
            for (size_t i = 0; i < count; i++) { out[at + i] = words[skip + i] >= limit ? inp[at + i] * scale : 0; }
        }
    }
}

// ----------------------------------------------------------------------------
// TimestepNorm: group normalization made causal. Per sequence and group, mean and variance of ALL scalars of
// the group's g = D/G features at ALL tokens up to and including t, n_t = g * (tokens so far) of them:
//
//     y_t = (x_t - mean_t) * rstd_t * (weight + 1) + bias,    rstd_t = 1/sqrt(M2_t/n_t + eps)
//
// M2 is the sum of squared deviations from the mean. A token's g scalars join the moments by their deviations
// from the old mean, s1 = sum (x - mean), s2 = sum (x - mean)^2:
//
//     mean += s1/n_t,    M2 += s2 - s1^2/n_t
//
// which loses nothing when the mean is large, as sum x^2 - n mean^2 would. State: count, mean, M2.
// inp, out (B,L,D); mean, rstd (B,L,G); *_in, *_out (B,G) and count (B) may be NULL: fresh start, end not kept. The
// mean stays double for the backward pass: where it is 10,000 times the deviation, a rounded one is off by 5e-4 of that.

static void timestep_norm_forward(real *out, double *mean, real *rstd, double *mean_out, double *m2_out,
                                  const real *inp, const real *weight, const real *bias, const double *prev_mean,
                                  const double *prev_m2, const int64_t *count, int B, int L, int D, int G, double eps) {
    int g = D / G;
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)B * L * D))
    for (int b = 0; b < B; b++) {
        for (int j = 0; j < G; j++) {
            const real *w = weight + (size_t)j * g, *bs = bias + (size_t)j * g;
            double m = prev_mean ? prev_mean[b * G + j] : 0, m2 = prev_m2 ? prev_m2[b * G + j] : 0;
            double n = count ? (double)g * (double)count[b] : 0;
            for (int t = 0; t < L; t++) {
                size_t row = (size_t)b * L + t;
                const real *x = inp + row * D + (size_t)j * g;
                real *y = out + row * D + (size_t)j * g;
                double from = n > 0 ? m : x[0], s1 = 0, s2 = 0; // nothing seen: any value serves as mean
#pragma omp simd reduction(+ : s1, s2)
                for (int i = 0; i < g; i++) {
                    double d = x[i] - from;
                    s1 += d;
                    s2 += d * d;
                }
                n += g;
                m = from + s1 / n;
                m2 += s2 - s1 * s1 / n;
                double r = 1 / sqrt(m2 / n + eps);
                for (int i = 0; i < g; i++) y[i] = (real)((x[i] - m) * r) * (w[i] + 1) + bs[i];
                mean[row * G + j] = m;
                rstd[row * G + j] = (real)r;
            }
            if (mean_out) mean_out[b * G + j] = m;
            if (m2_out) m2_out[b * G + j] = m2;
        }
    }
}

// x_s is in the moments of every t >= s: d mean_t/d x_s = 1/n_t, d var_t/d x_s = 2 (x_s - mean_t)/n_t. With
// dmean_t = -rstd_t sum_group w dy and dvar_t = -1/2 rstd_t^3 sum_group w dy (x - mean_t), three sums that
// grow from the last token to the first carry all of that:
//
//     U_s = sum_{t>=s} dmean_t/n_t,   V_s = sum_{t>=s} dvar_t/n_t,   W_s = sum_{t>=s} dvar_t mean_t/n_t
//     dx_s = rstd_s w dy_s + U_s + 2 (x_s V_s - W_s)
//          = rstd_s w dy_s + U_s - 2 (W_s - mean_s V_s) + 2 V_s (x_s - mean_s)
//
// The last form subtracts large numbers once a token, not in every element.
// sums (B,G,3), or NULL: U, V, W at the first token, of these tokens alone.

static void timestep_norm_backward(real *dinp, real *dweight, real *dbias, double *sums, const real *dout,
                                   const real *inp, const real *weight, const double *mean, const real *rstd,
                                   const int64_t *count, int B, int L, int D, int G) {
    int g = D / G;
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)B * L * D))
    for (int b = 0; b < B; b++) {
        for (int j = 0; j < G; j++) {
            const real *w = weight + (size_t)j * g;
            double n = (count ? (double)g * (double)count[b] : 0) + (double)g * L, U = 0, V = 0, W = 0;
            for (int t = L - 1; t >= 0; t--, n -= g) {
                size_t row = (size_t)b * L + t;
                const real *x = inp + row * D + (size_t)j * g, *dy = dout + row * D + (size_t)j * g;
                real *dx = dinp + row * D + (size_t)j * g;
                double m = mean[row * G + j], r = rstd[row * G + j], s = 0, d = 0;
#pragma omp simd reduction(+ : s, d)
                for (int i = 0; i < g; i++) {
                    double wdy = (w[i] + 1) * dy[i];
                    s += wdy;
                    d += wdy * (x[i] - m);
                }
                double dvar = -0.5 * r * r * r * d;
                U += -r * s / n;
                V += dvar / n;
                W += dvar / n * m;
                double shift = U - 2 * (W - m * V);
                for (int i = 0; i < g; i++) { dx[i] = (real)(r * (w[i] + 1) * dy[i] + shift + 2 * V * (x[i] - m)); }
            }
            double uvw[3] = {U, V, W};
            if (sums) memcpy(sums + 3 * ((size_t)b * G + j), uvw, sizeof uvw);
        }
    }
    sum_rows(dweight, dout, inp, mean, rstd, B * L, D, G);
    sum_rows(dbias, dout, NULL, NULL, NULL, B * L, D, 1);
}

// ChunkParallel of one sequence. The moments (mean, M2) of n and n' scalars, d = mean' - mean apart, are together
//
//     mean + d n'/(n + n'),    M2 + M2' + d^2 n n'/(n + n')
//
// all (pieces,2,B,G): the moments of each piece alone. mean, m2 (B,G): those before the whole sequence, where count
// (B) tokens were, replaced by those before this piece. mean_end, m2_end (B,G), or NULL, get those after the last.

static void timestep_norm_combine(double *mean, double *m2, double *mean_end, double *m2_end, const double *all,
                               const int64_t *count, const ChunkParallel *p, int B, int D, int G) {
    size_t rows = (size_t)B * G;
    for (size_t i = 0; i < rows; i++, all++) {
        double n = count ? (double)(D / G) * (double)count[i / G] : 0, m = mean[i], s = m2[i];
        for (int k = 0; k < p->cp_size; k++) {
            double there = (double)(D / G) * (double)p->lengths[k], d = all[2 * k * rows] - m;
            if (k == p->cp_rank) mean[i] = m, m2[i] = s;
            m += d * there / (n + there);
            s += all[(2 * k + 1) * rows] + d * d * n * there / (n + there);
            n += there;
        }
        if (mean_end) mean_end[i] = m, m2_end[i] = s;
    }
}

// all (pieces,B,G,3): U, V, W of each piece alone. Those of the later ones are added to every token's here:
// dx_s += U + 2 (x_s V - W).
static void timestep_norm_combine_backward(real *dinp, const real *inp, const double *all, const ChunkParallel *p, int B, int L,
                                        int D, int G) {
    int g = D / G;
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)B * L * D))
    for (int b = 0; b < B; b++) {
        for (int j = 0; j < G; j++) {
            double U = 0, V = 0, W = 0;
            for (int k = p->cp_rank + 1; k < p->cp_size; k++) {
                const double *uvw = all + 3 * (((size_t)k * B + b) * G + j);
                U += uvw[0], V += uvw[1], W += uvw[2];
            }
            for (size_t at = (size_t)b * L * D + (size_t)j * g; at < (size_t)(b + 1) * L * D; at += (size_t)D) {
                for (int i = 0; i < g; i++) dinp[at + i] += (real)(U + 2 * (inp[at + i] * V - W));
            }
        }
    }
}

// ----------------------------------------------------------------------------
// CEMA, the complex exponential moving average. Per channel d, N complex numbers h that decay and turn:
//
//     phi_n = sigmoid(theta) 2 pi n/N,  n = 1..N      p_n = sigmoid(alpha_n)
//     q_n = (1 - sigmoid(alpha_n) sigmoid(delta_n)) e^(i phi_n)
//     h_t = q h_(t-1) + p x_t                         y_t = Re sum_n (gamma_n/sqrt(N)) h_t,n + omega x_t
//
// Coefficients: from the parameters, once an update. They are complex numbers kept as real and imaginary
// parts, each (N, D rounded up to whole strips): channels lie side by side, since they are what is vectorised.

enum { STRIP = 2 * LANES }; // channels a task handles: two vectors, so that two chains of products overlap

static int strip_channels(int D) { return ceil_div(D, STRIP) * STRIP; }

typedef struct {
    real *p, *q_re, *q_im, *g_re, *g_im;
} Coeffs; // g is gamma/sqrt(N)

static void cema_coeffs_forward(Coeffs *c, const real *alpha, const real *delta, const real *theta, const real *gamma,
                               int D, int N) {
#pragma omp parallel for schedule(static) if (is_large(64.0 * D * N))
    for (int d = 0; d < D; d++) {
        for (int n = 0; n < N; n++) {
            size_t in = (size_t)d * N + n, out = (size_t)n * strip_channels(D) + d;
            double a = 1 / (1 + exp(-(double)alpha[in])), b = 1 / (1 + exp(-(double)delta[in]));
            double phi = 2 * PI * (n + 1) / N / (1 + exp(-(double)theta[d]));
            c->p[out] = (real)a;
            c->q_re[out] = (real)((1 - a * b) * cos(phi));
            c->q_im[out] = (real)((1 - a * b) * sin(phi));
            c->g_re[out] = (real)(gamma[2 * in] / sqrt(N));
            c->g_im[out] = (real)(gamma[2 * in + 1] / sqrt(N));
        }
    }
}

// The gradient G of a complex number c is kept so that dLoss = Re(conj(G) dc) = G_re dc_re + G_im dc_im. Hence
// d|q| = Re(conj(G_q) e^(i phi)) and dphi = Re(conj(G_q) i q).
static void cema_coeffs_backward(real *dalpha, real *ddelta, real *dtheta, real *dgamma, const Coeffs *dc,
                                const real *alpha, const real *delta, const real *theta, int D, int N) {
#pragma omp parallel for schedule(static) if (is_large(64.0 * D * N))
    for (int d = 0; d < D; d++) {
        double turn = 1 / (1 + exp(-(double)theta[d])), dturn = 0;
        for (int n = 0; n < N; n++) {
            size_t in = (size_t)d * N + n, out = (size_t)n * strip_channels(D) + d;
            double a = 1 / (1 + exp(-(double)alpha[in])), b = 1 / (1 + exp(-(double)delta[in]));
            double phi = 2 * PI * (n + 1) / N * turn, re = cos(phi), im = sin(phi);
            double dabs = dc->q_re[out] * re + dc->q_im[out] * im;
            double dphi = (1 - a * b) * (dc->q_im[out] * re - dc->q_re[out] * im);
            dalpha[in] += (real)((dc->p[out] - b * dabs) * a * (1 - a));
            ddelta[in] += (real)(-a * dabs * b * (1 - b));
            dturn += dphi * 2 * PI * (n + 1) / N;
            dgamma[2 * in] += (real)(dc->g_re[out] / sqrt(N));
            dgamma[2 * in + 1] += (real)(dc->g_im[out] / sqrt(N));
        }
        dtheta[d] += (real)(dturn * turn * (1 - turn));
    }
}

// One row's channels of a strip; beyond the last channel zeros are read and nothing is written.
static void strip_read(vec v[2], const real *src, int width) {
    real lanes[STRIP] = {0};
    if (width == STRIP) {
        memcpy(v, src, sizeof lanes);
        return;
    }
    memcpy(lanes, src, (size_t)width * sizeof *src);
    memcpy(v, lanes, sizeof lanes);
}
static void strip_write(real *dst, const vec v[2], int width) { memcpy(dst, v, (size_t)width * sizeof *dst); }
static void strip_add(real *dst, const vec v[2], int width) {
    real lanes[STRIP];
    memcpy(lanes, v, sizeof lanes);
    for (int c = 0; c < width; c++) dst[c] += lanes[c];
}

typedef struct {
    vec p[2], q_re[2], q_im[2], g_re[2], g_im[2];
} StripCoeffs; // of one mode n
static StripCoeffs strip_coeffs(const Coeffs *c, int n, int D, int d0) {
    StripCoeffs s;
    size_t at = (size_t)n * strip_channels(D) + d0;
    memcpy(s.p, c->p + at, sizeof s.p);
    memcpy(s.q_re, c->q_re + at, sizeof s.p);
    memcpy(s.q_im, c->q_im + at, sizeof s.p);
    memcpy(s.g_re, c->g_re + at, sizeof s.p);
    memcpy(s.g_im, c->g_im + at, sizeof s.p);
    return s;
}

// The recurrence, token by token. A task owns a strip of channels of one sequence and goes through it in blocks
// of CEMA_BLOCK tokens, within a block mode by mode, so that h stays in registers. inp, out (B,L,D).
// h_blocks (B, blocks, 2, N, D): h before each block, for the backward pass; h_in, h_out (B,2,N,D); any may be
// NULL. h_in and h_out may be the same.

static void cema_forward(real *out, real *h_blocks, real *h_out, const real *inp, const Coeffs *coeffs, const real *omega,
                         const real *h_in, int B, int L, int D, int N) {
    int blocks = ceil_div(L, CEMA_BLOCK);
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)B * L * D * N))
    for (int b = 0; b < B; b++) {
        for (int d0 = 0; d0 < D; d0 += STRIP) {
            int width = min(STRIP, D - d0);
            vec h[2 * N][2], x[CEMA_BLOCK][2], y[CEMA_BLOCK][2], om[2]; // h: N real parts, N imaginary parts
            memset(h, 0, sizeof h);
            for (int i = 0; h_in && i < 2 * N; i++) strip_read(h[i], h_in + ((size_t)b * 2 * N + i) * D + d0, width);
            strip_read(om, omega + d0, width);
            for (int block = 0; block < blocks; block++) {
                int t0 = block * CEMA_BLOCK, T = min(CEMA_BLOCK, L - t0);
                for (int i = 0; h_blocks && i < 2 * N; i++) {
                    strip_write(h_blocks + (((size_t)b * blocks + block) * 2 * N + i) * D + d0, h[i], width);
                }
                for (int t = 0; t < T; t++) {
                    strip_read(x[t], inp + ((size_t)b * L + t0 + t) * D + d0, width);
                    for (int u = 0; u < 2; u++) y[t][u] = om[u] * x[t][u];
                }
                for (int n = 0; n < N; n++) {
                    StripCoeffs c = strip_coeffs(coeffs, n, D, d0);
                    vec re[2] = {h[n][0], h[n][1]}, im[2] = {h[N + n][0], h[N + n][1]};
                    for (int t = 0; t < T; t++) {
                        for (int u = 0; u < 2; u++) {
                            vec old = re[u];
                            re[u] = c.q_re[u] * old - c.q_im[u] * im[u] + c.p[u] * x[t][u];
                            im[u] = c.q_re[u] * im[u] + c.q_im[u] * old;
                            y[t][u] += c.g_re[u] * re[u] - c.g_im[u] * im[u];
                        }
                    }
                    for (int u = 0; u < 2; u++) h[n][u] = re[u], h[N + n][u] = im[u];
                }
                for (int t = 0; t < T; t++) strip_write(out + ((size_t)b * L + t0 + t) * D + d0, y[t], width);
            }
            for (int i = 0; h_out && i < 2 * N; i++) {
                strip_write(h_out + ((size_t)b * 2 * N + i) * D + d0, h[i], width);
            }
        }
    }
}

// The recurrence reversed: with g = gamma/sqrt(N), the gradient by h_t is
//
//     G_t = conj(g) dy_t + conj(q) G_(t+1)            dx_t = omega dy_t + sum_n p Re G_t
//     dg = sum dy conj(h_t)    dq = sum G_t conj(h_(t-1))    dp = sum x Re G_t    domega = sum x dy
//     by the incoming state: conj(q) G_1
//
// A block's h are computed again from the one kept at its start. A task owns a strip of channels of all
// sequences, so the parameters' sums need nothing shared. dcoeffs is set. dh (B,2,N,D), or NULL: gradient by the
// outgoing state, replaced by that by the incoming one.

static void cema_backward(real *dinp, Coeffs *dcoeffs, real *domega, real *dh, const real *dout, const real *inp,
                          const real *h_blocks, const Coeffs *coeffs, const real *omega, int B, int L, int D, int N) {
    int blocks = ceil_div(L, CEMA_BLOCK);
#pragma omp parallel for schedule(static) if (is_large((double)B * L * D * N))
    for (int d0 = 0; d0 < D; d0 += STRIP) {
        int width = min(STRIP, D - d0);
        vec x[CEMA_BLOCK][2], dy[CEMA_BLOCK][2], dx[CEMA_BLOCK][2];
        vec h_re[CEMA_BLOCK + 1][2], h_im[CEMA_BLOCK + 1][2]; // of one mode, [t] is before token t
        vec future[2 * N][2];                                 // conj(q) G_(t+1): gradient by h_t from later tokens
        StripCoeffs grad[N];
        vec om[2], dom[2] = {0};
        memset(grad, 0, sizeof grad);
        strip_read(om, omega + d0, width);
        for (int b = 0; b < B; b++) {
            memset(future, 0, sizeof future);
            for (int i = 0; dh && i < 2 * N; i++) strip_read(future[i], dh + ((size_t)b * 2 * N + i) * D + d0, width);
            for (int block = blocks - 1; block >= 0; block--) {
                int t0 = block * CEMA_BLOCK, T = min(CEMA_BLOCK, L - t0);
                for (int t = 0; t < T; t++) {
                    strip_read(x[t], inp + ((size_t)b * L + t0 + t) * D + d0, width);
                    strip_read(dy[t], dout + ((size_t)b * L + t0 + t) * D + d0, width);
                    for (int u = 0; u < 2; u++) {
                        dx[t][u] = om[u] * dy[t][u];
                        dom[u] += x[t][u] * dy[t][u];
                    }
                }
                const real *h0 = h_blocks + ((size_t)b * blocks + block) * 2 * N * D + d0;
                for (int n = 0; n < N; n++) {
                    StripCoeffs c = strip_coeffs(coeffs, n, D, d0), s = {0}; // s: this block's sums
                    strip_read(h_re[0], h0 + (size_t)n * D, width);
                    strip_read(h_im[0], h0 + ((size_t)N + n) * D, width);
                    for (int t = 0; t < T; t++) {
                        for (int u = 0; u < 2; u++) {
                            vec re = h_re[t][u], im = h_im[t][u];
                            h_re[t + 1][u] = c.q_re[u] * re - c.q_im[u] * im + c.p[u] * x[t][u];
                            h_im[t + 1][u] = c.q_re[u] * im + c.q_im[u] * re;
                        }
                    }
                    for (int u = 0; u < 2; u++) {
                        vec f_re = future[n][u], f_im = future[N + n][u];
                        for (int t = T - 1; t >= 0; t--) {
                            vec G_re = c.g_re[u] * dy[t][u] + f_re, G_im = f_im - c.g_im[u] * dy[t][u];
                            dx[t][u] += c.p[u] * G_re;
                            s.p[u] += x[t][u] * G_re;
                            s.q_re[u] += G_re * h_re[t][u] + G_im * h_im[t][u];
                            s.q_im[u] += G_im * h_re[t][u] - G_re * h_im[t][u];
                            s.g_re[u] += dy[t][u] * h_re[t + 1][u];
                            s.g_im[u] -= dy[t][u] * h_im[t + 1][u];
                            f_re = c.q_re[u] * G_re + c.q_im[u] * G_im;
                            f_im = c.q_re[u] * G_im - c.q_im[u] * G_re;
                        }
                        future[n][u] = f_re, future[N + n][u] = f_im;
                        grad[n].p[u] += s.p[u];
                        grad[n].q_re[u] += s.q_re[u], grad[n].q_im[u] += s.q_im[u];
                        grad[n].g_re[u] += s.g_re[u], grad[n].g_im[u] += s.g_im[u];
                    }
                }
                for (int t = 0; t < T; t++) strip_write(dinp + ((size_t)b * L + t0 + t) * D + d0, dx[t], width);
            }
            for (int i = 0; dh && i < 2 * N; i++) strip_write(dh + ((size_t)b * 2 * N + i) * D + d0, future[i], width);
        }
        for (int n = 0; n < N; n++) {
            size_t at = (size_t)n * strip_channels(D) + d0;
            strip_write(dcoeffs->p + at, grad[n].p, STRIP);
            strip_write(dcoeffs->q_re + at, grad[n].q_re, STRIP);
            strip_write(dcoeffs->q_im + at, grad[n].q_im, STRIP);
            strip_write(dcoeffs->g_re + at, grad[n].g_re, STRIP);
            strip_write(dcoeffs->g_im + at, grad[n].g_im, STRIP);
        }
        strip_add(domega + d0, dom, width);
    }
}

// ChunkParallel of one sequence. h behind a piece of l tokens is q^l times h before it, plus what the piece gives alone; the
// gradient by h before it is conj(q)^l times that by h behind it, plus what the piece gives alone. So pieces are to
// these sums what tokens are to h. First the piece alone, from a zero start: forward, h (B,2,N,D) from inp (B,L,D);
// backward, sum_t conj(q)^t conj(g) dy_t from dout, last token first.

static void cema_reduce(real *h, const real *inp, const Coeffs *coeffs, int backward, int B, int L, int D, int N) {
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)B * L * D * N))
    for (int b = 0; b < B; b++) {
        for (int d0 = 0; d0 < D; d0 += STRIP) {
            int width = min(STRIP, D - d0);
            vec sum[2 * N][2], x[CEMA_BLOCK][2];
            memset(sum, 0, sizeof sum);
            for (int t0 = 0; t0 < L; t0 += CEMA_BLOCK) {
                int T = min(CEMA_BLOCK, L - t0);
                for (int t = 0; t < T; t++) {
                    int token = backward ? L - 1 - t0 - t : t0 + t;
                    strip_read(x[t], inp + ((size_t)b * L + token) * D + d0, width);
                }
                for (int n = 0; n < N; n++) {
                    StripCoeffs c = strip_coeffs(coeffs, n, D, d0);
                    for (int u = 0; u < 2; u++) {
                        vec re = sum[n][u], im = sum[N + n][u], q_re = c.q_re[u], q_im = c.q_im[u];
                        vec in_re = c.p[u], in_im = {0}; // what x is multiplied by: p, backward conj(q g)
                        if (backward) {
                            in_re = q_re * c.g_re[u] - q_im * c.g_im[u];
                            in_im = -(q_re * c.g_im[u] + q_im * c.g_re[u]);
                            q_im = -q_im;
                        }
                        for (int t = 0; t < T; t++) {
                            vec old = re;
                            re = q_re * old - q_im * im + in_re * x[t][u];
                            im = q_re * im + q_im * old + in_im * x[t][u];
                        }
                        sum[n][u] = re, sum[N + n][u] = im;
                    }
                }
            }
            for (int i = 0; i < 2 * N; i++) strip_write(h + ((size_t)b * 2 * N + i) * D + d0, sum[i], width);
        }
    }
}

static double complex power(double complex q, int64_t n) {
    double complex product = 1;
    for (; n > 0; n /= 2, q *= q) {
        if (n % 2 == 1) product *= q;
    }
    return product;
}

// all (pieces,B,2,N,D): each piece alone. h (B,2,N,D): h before the whole sequence, backward the gradient behind it;
// replaced by that before, or behind, this piece. end (B,2,N,D), or NULL, gets what is at the other end of it all.
static void cema_combine(real *h, real *end, const real *all, const Coeffs *coeffs, int backward, const ChunkParallel *p, int B,
                      int D, int N) {
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)p->cp_size * B * D * N))
    for (int n = 0; n < N; n++) {
        for (int d = 0; d < D; d++) {
            size_t coef = (size_t)n * strip_channels(D) + d;
            double complex q = coeffs->q_re[coef] + coeffs->q_im[coef] * I, decay = 1;
            int64_t length = 0; // that decay is for
            if (backward) q = conj(q);
            for (int b = 0; b < B; b++) {
                size_t re = ((size_t)b * 2 * N + n) * D + d, im = re + (size_t)N * D;
                double complex sum = h[re] + h[im] * I;
                for (int i = 0; i < p->cp_size; i++) {
                    int k = backward ? p->cp_size - 1 - i : i;
                    const real *alone = all + (size_t)k * B * 2 * N * D;
                    if (k == p->cp_rank) h[re] = (real)creal(sum), h[im] = (real)cimag(sum);
                    if (p->lengths[k] != length) decay = power(q, length = p->lengths[k]);
                    sum = decay * sum + alone[re] + alone[im] * I;
                }
                if (end) end[re] = (real)creal(sum), end[im] = (real)cimag(sum);
            }
        }
    }
}

// ----------------------------------------------------------------------------
// RMSNorm: y = x rstd (weight + 1), rstd = 1/sqrt(mean(x^2) + eps), over the D numbers of a row; weight NULL: no
// scale. rstd (R). backward, with a = (weight + 1) dy and n = x rstd: dx = rstd (a - n mean(a n)). Squares are double,
// and nothing is multiplied with x before rstd: neither overflows while x itself does not.

static void rmsnorm_forward(real *out, real *rstd, const real *inp, const real *weight, int R, int D, double eps) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        const real *x = inp + (size_t)r * D;
        real *y = out + (size_t)r * D;
        double squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int c = 0; c < D; c++) squares += (double)x[c] * x[c];
        real s = (real)(1 / sqrt(squares / D + eps));
        for (int c = 0; c < D; c++) y[c] = x[c] * s * (weight ? weight[c] + 1 : 1);
        rstd[r] = s;
    }
}

static void rmsnorm_backward(real *dinp, real *dweight, const real *dout, const real *inp, const real *weight,
                             const real *rstd, int R, int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        const real *x = inp + (size_t)r * D, *dy = dout + (size_t)r * D;
        real *dx = dinp + (size_t)r * D, s = rstd[r], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < D; c++) dot += dy[c] * (weight ? weight[c] + 1 : 1) * (x[c] * s);
        dot /= D;
        for (int c = 0; c < D; c++) dx[c] = s * (dy[c] * (weight ? weight[c] + 1 : 1) - x[c] * s * dot);
    }
    if (dweight) sum_rows(dweight, dout, inp, NULL, rstd, R, D, 1);
}

// ----------------------------------------------------------------------------
// linear: out (R,M) = inp (R,K) weight' (M,K) + bias (M); bias may be NULL. forward adds to out if `add`.
// backward: dinp = dout weight (added to what is there if `add`), dweight += dout' inp, dbias += sum of rows

static void linear_forward(real *out, int add, const real *inp, const real *weight, const real *bias, int R, int K,
                           int M) {
    matmul(0, 1, R, M, K, inp, K, weight, K, add, bias, out, M);
}

static void linear_backward(real *dinp, int add, real *dweight, real *dbias, const real *dout, const real *inp,
                            const real *weight, int R, int K, int M) {
    matmul(0, 0, R, K, M, dout, M, weight, K, add, NULL, dinp, K);
    matmul(1, 0, M, K, R, dout, M, inp, K, 1, NULL, dweight, K);
    if (dbias) sum_rows(dbias, dout, NULL, NULL, NULL, R, M, 1);
}

// ----------------------------------------------------------------------------
// queries and keys from the shared z (R,Z), normalized per head:
//     q = z (gamma0 + 1)/sqrt(dz) + beta0,    k = z (gamma1 + 1)/sqrt(dz) + beta1;    gamma, beta (2,Z)
// backward: dz = (dq (gamma0 + 1) + dk (gamma1 + 1))/sqrt(dz); gamma's and beta's gradients are sums over rows

static void qk_forward(real *q, real *k, const real *z, const real *gamma, const real *beta, int R, int Z, int dz) {
    real scale = (real)(1 / sqrt(dz));
#pragma omp parallel for schedule(static) if (is_large((double)R * Z))
    for (int r = 0; r < R; r++) {
        size_t at = (size_t)r * Z;
        for (int c = 0; c < Z; c++) {
            q[at + c] = z[at + c] * (gamma[c] + 1) * scale + beta[c];
            k[at + c] = z[at + c] * (gamma[Z + c] + 1) * scale + beta[Z + c];
        }
    }
}

static void qk_backward(real *dz_out, real *dgamma, real *dbeta, const real *dq, const real *dk, const real *z,
                        const real *gamma, int R, int Z, int dz) {
    real scale = (real)(1 / sqrt(dz));
#pragma omp parallel for schedule(static) if (is_large((double)R * Z))
    for (int r = 0; r < R; r++) {
        size_t at = (size_t)r * Z;
        for (int c = 0; c < Z; c++) {
            dz_out[at + c] = (dq[at + c] * (gamma[c] + 1) + dk[at + c] * (gamma[Z + c] + 1)) * scale;
        }
    }
#pragma omp parallel for schedule(static) if (is_large((double)R * Z))
    for (int c0 = 0; c0 < Z; c0 += COLUMNS) {
        int width = min(COLUMNS, Z - c0);
        double sum[4][COLUMNS] = {0};
        for (size_t at = (size_t)c0; at < (size_t)R * Z; at += (size_t)Z) {
            for (int c = 0; c < width; c++) {
                sum[0][c] += dq[at + c] * z[at + c], sum[1][c] += dk[at + c] * z[at + c];
                sum[2][c] += dq[at + c], sum[3][c] += dk[at + c];
            }
        }
        for (int c = 0; c < width; c++) {
            dgamma[c0 + c] += (real)sum[0][c] * scale, dgamma[Z + c0 + c] += (real)sum[1][c] * scale;
            dbeta[c0 + c] += (real)sum[2][c], dbeta[Z + c0 + c] += (real)sum[3][c];
        }
    }
}

// ----------------------------------------------------------------------------
// rotary embedding: in each head the pair (2j, 2j+1), taken as a complex number, is turned by
// e^(i pos base^(-2j/dz)), pos counted from the chunk's start. A rotation's transpose turns the other way, which
// is the backward pass. table (C, dz/2, 2): cos, sin. count (B): tokens before these, or NULL.

static void rope_table(real *table, int C, int dz, double base) {
    for (int pos = 0; pos < C; pos++) {
        for (int j = 0; j < dz / 2; j++, table += 2) {
            double angle = pos * pow(base, -2.0 * j / dz);
            table[0] = (real)cos(angle), table[1] = (real)sin(angle);
        }
    }
}

static void rope_turn(real *out, const real *inp, const real *table, const int64_t *count, int sign, int B, int L,
                      int Z, int dz, int C) {
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)B * L * Z))
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < L; t++) {
            int pos = (int)(((count ? count[b] : 0) + t) % C);
            const real *x = inp + ((size_t)b * L + t) * Z;
            real *y = out + ((size_t)b * L + t) * Z;
            for (int c = 0; c < Z; c += 2) {
                const real *turn = table + (size_t)pos * dz + c % dz;
                real re = x[c], im = x[c + 1], s = sign * turn[1];
                y[c] = re * turn[0] - im * s;
                y[c + 1] = re * s + im * turn[0];
            }
        }
    }
}

static void rope_forward(real *out, const real *inp, const real *table, const int64_t *count, int B, int L, int Z,
                         int dz, int C) {
    rope_turn(out, inp, table, count, 1, B, L, Z, dz, C);
}

static void rope_backward(real *dinp, const real *dout, const real *table, const int64_t *count, int B, int L, int Z,
                          int dz, int C) {
    rope_turn(dinp, dout, table, count, -1, B, L, Z, dz, C);
}

// ----------------------------------------------------------------------------
// silu(x) = x sigmoid(x), and the gate out = a silu(b): the attention's (o, r) and the FFN's (f3, f1)
// backward: silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x))). In backward, da may be dout. sigmoid is multiplied with its
// own x first, so that a b does not overflow where sigmoid(b) is 0. (A bare `if` would also apply to `simd`.)

static void silu_forward(real *out, const real *inp, size_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
    for (size_t i = 0; i < n; i++) out[i] = inp[i] * sigmoid(inp[i]);
}

static void silu_backward(real *dinp, const real *dout, const real *inp, size_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
    for (size_t i = 0; i < n; i++) {
        real s = sigmoid(inp[i]);
        dinp[i] = dout[i] * (s * (1 + inp[i] * (1 - s)));
    }
}

static void gate_forward(real *out, const real *a, const real *b, size_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
    for (size_t i = 0; i < n; i++) out[i] = a[i] * (b[i] * sigmoid(b[i]));
}

static void gate_backward(real *da, real *db, const real *dout, const real *a, const real *b, size_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
    for (size_t i = 0; i < n; i++) {
        real s = sigmoid(b[i]), d = dout[i];
        db[i] = d * (a[i] * (s * (1 + b[i] * (1 - s))));
        da[i] = d * (b[i] * s);
    }
}

// ----------------------------------------------------------------------------
// attention of one head inside one chunk: nq queries, which are the last nq of nk keys' positions
//
//     S_ij = q_i . k_j for j <= i        P = softmax over j        o_i = sum_j P_ij v_j
//
// QUERY_TILE queries at a time, against the keys up to the last of them: scores above the diagonal are few.
// Of P only lse_i = log sum_j e^(S_ij) is kept. Rows of q, k are ldz long, of v, o lde, of lse ldh.
// scores (QUERY_TILE, nk) is scratch. mask: the dropout of P, C elements apart from query to query.

static void attention_chunk_forward(real *o, real *lse, real *scores, const real *q, const real *k, const real *v, Mask mask,
                           int nq, int nk, int dz, int dv, int ldz, int lde, int ldh, int C) {
    matmul(0, 1, nq, nk, dz, q, ldz, k, ldz, 0, NULL, scores, nk);
#pragma omp parallel for schedule(static) if (is_large((double)nq * nk))
    for (int i = 0; i < nq; i++) {
        real *s = scores + (size_t)i * nk, top = -INFINITY, sum = 0, overflow = 0;
        int seen = nk - nq + i + 1; // keys at or before this query
#pragma omp simd reduction(max : top)
        for (int j = 0; j < seen; j++) top = s[j] > top ? s[j] : top;
#pragma omp simd reduction(+ : sum, overflow)
        for (int j = 0; j < seen; j++) {
            overflow += s[j] - s[j]; // NaN if it did: -infinity would pass for a probability of 0
            s[j] = exp_real(s[j] - top);
            sum += s[j];
        }
        sum += overflow;
        for (int j = 0; j < seen; j++) s[j] /= sum;
        for (int j = seen; j < nk; j++) s[j] = 0;
        lse[(size_t)i * ldh] = top + (real)log(sum);
        dropout(s, s, mask_row(mask, i, C), (size_t)seen);
    }
    matmul(0, 0, nq, dv, nk, scores, nk, v, lde, 0, NULL, o, lde);
}

// P_ij = e^(S_ij - lse_i) again, divided by its sum, since lse_i is rounded: at S = 1e8 by up to 4. Then
// dv_j = sum_i P_ij do_i; dP_ij = do_i . v_j; through the softmax
// dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij), whose sum is do_i . o_i; dq_i = sum_j dS_ij k_j, dk_j = sum_i dS_ij q_i.
// With dropout, v meets P under the mask, and so does dP. dq is set, dk and dv are added to if `add`. scores, dscores
// (QUERY_TILE, nk) are scratch.

static void attention_chunk_backward(real *dq, real *dk, real *dv_out, real *scores, real *dscores, int add, const real *dout,
                            const real *o, const real *lse, const real *q, const real *k, const real *v, Mask mask,
                            int nq, int nk, int dz, int dv, int ldz, int lde, int ldh, int C) {
    matmul(0, 1, nq, nk, dz, q, ldz, k, ldz, 0, NULL, scores, nk);
    matmul(0, 1, nq, nk, dv, dout, lde, v, lde, 0, NULL, dscores, nk);
#pragma omp parallel for schedule(static) if (is_large((double)nq * nk))
    for (int i = 0; i < nq; i++) {
        real *s = scores + (size_t)i * nk, *ds = dscores + (size_t)i * nk, dot = 0, sum = 0, l = lse[(size_t)i * ldh];
        int seen = nk - nq + i + 1;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < dv; c++) dot += dout[(size_t)i * lde + c] * o[(size_t)i * lde + c];
        dropout(ds, ds, mask_row(mask, i, C), (size_t)seen);
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < seen; j++) {
            s[j] = exp_real(s[j] - l);
            sum += s[j];
        }
#pragma omp simd
        for (int j = 0; j < seen; j++) {
            s[j] /= sum;
            ds[j] = s[j] * (ds[j] - dot);
        }
        for (int j = seen; j < nk; j++) s[j] = ds[j] = 0;
        dropout(s, s, mask_row(mask, i, C), (size_t)seen);
    }
    matmul(0, 0, nq, dz, nk, dscores, nk, k, ldz, 0, NULL, dq, ldz);
    matmul(1, 0, nk, dz, nq, dscores, nk, q, ldz, add, NULL, dk, ldz);
    matmul(1, 0, nk, dv, nq, scores, nk, dout, lde, add, NULL, dv_out, lde);
}

// Chunked attention: sequences are cut into chunks of C tokens; a token sees its own chunk up to itself, nothing
// else. q, k (B,L,Z) are rotated, v, o (B,L,E), lse (B,L,H). With a state, count (B) tokens went before: the
// first count % C keys and values of the unfinished chunk are in cache_k (B,C,Z), cache_v (B,C,E), and this
// call's go there too, as far as their chunk stays unfinished. Without: NULL.
//
// A task is a block of queries of one head; where there are fewer tasks than threads, these share each product
// instead. scores (threads, QUERY_TILE, C) is scratch.

// Puts n tokens' keys and values, from t on, into the cache of row b, from place `at` on.
static void cache_chunk(real *cache_k, real *cache_v, const real *k, const real *v, int b, int t, int at, int n, int L,
                        int C, int Z, int E) {
    size_t from = (size_t)b * L + t, to = (size_t)b * C + at;
    memcpy(cache_k + to * Z, k + from * Z, (size_t)n * Z * sizeof *k);
    memcpy(cache_v + to * E, v + from * E, (size_t)n * E * sizeof *v);
}

// The mask of head h of row b, from its query t on.
static Mask mask_query(Mask mask, int b, int h, int H, int t, int C) {
    mask.first += ((uint64_t)b * H + h) * mask.row + (uint64_t)t * C;
    return mask;
}

static void attention_forward(real *o, real *lse, real *cache_k, real *cache_v, real *scores, const real *q,
                              const real *k, const real *v, const int64_t *count, Mask mask, int B, int L, int C, int H,
                              int Z, int E, int threads) {
    int dz = Z / H, dv = E / H, blocks = ceil_div(min(C, L), QUERY_TILE);
    int chunks = count ? ceil_div(L - 1, C) + 1 : ceil_div(L, C); // that L tokens may touch
    int shared = B * chunks * H * blocks >= threads && is_large((double)B * L * C * (Z + E) / 16);
    (void)threads, (void)shared; // without OpenMP
    for (int b = 0; cache_k && b < B; b++) {
        int past = (int)(count[b] % C);
        if (past > 0) cache_chunk(cache_k, cache_v, k, v, b, 0, past, min(C - past, L), L, C, Z, E);
    }
#pragma omp parallel for collapse(4) schedule(dynamic) num_threads(threads) if (shared)
    for (int b = 0; b < B; b++) {
        for (int chunk = 0; chunk < chunks; chunk++) {
            for (int h = 0; h < H; h++) {
                for (int block = 0; block < blocks; block++) {
                    int past = count ? (int)(count[b] % C) : 0, cached = past > 0 && chunk == 0;
                    int from = max(chunk * C - past, 0), end = min((chunk + 1) * C - past, L); // of the chunk here
                    int t = from + block * QUERY_TILE, nq = min(QUERY_TILE, end - t);
                    if (nq <= 0) continue;
                    size_t query = (size_t)b * L + t, key = (size_t)b * L + from, cache = (size_t)b * C;
                    attention_chunk_forward(
                        o + query * E + h * dv, lse + query * H + h, scores + (size_t)thread_number() * QUERY_TILE * C,
                        q + query * Z + h * dz, (cached ? cache_k + cache * Z : k + key * Z) + h * dz,
                        (cached ? cache_v + cache * E : v + key * E) + h * dv, mask_query(mask, b, h, H, t, C), nq,
                        (cached ? past : 0) + t - from + nq, dz, dv, Z, E, H, C);
                }
            }
        }
    }
    for (int b = 0; cache_k && b < B; b++) {
        int past = (int)(count[b] % C), left = (past + L) % C; // tokens of the last chunk, if it stays unfinished
        if (past == 0 || past + L > C) cache_chunk(cache_k, cache_v, k, v, b, L - left, 0, left, L, C, Z, E);
    }
}

static void attention_backward(real *dq, real *dk, real *dv_out, real *scores, real *dscores, const real *dout,
                               const real *o, const real *lse, const real *q, const real *k, const real *v, Mask mask,
                               int B, int L, int C, int H, int Z, int E, int threads) {
    int dz = Z / H, dv = E / H;
    int shared = B * ceil_div(L, C) * H >= threads && is_large((double)B * L * C * (Z + E) / 16);
    (void)threads, (void)shared;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads) if (shared)
    for (int b = 0; b < B; b++) {
        for (int t0 = 0; t0 < L; t0 += C) {
            for (int h = 0; h < H; h++) {
                size_t z = ((size_t)b * L + t0) * Z + h * dz, e = ((size_t)b * L + t0) * E + h * dv;
                size_t scratch = (size_t)thread_number() * QUERY_TILE * C;
                int n = min(C, L - t0), last = (n - 1) / QUERY_TILE * QUERY_TILE;
                for (int i = last; i >= 0; i -= QUERY_TILE) { // the last block sees all keys: it sets dk and dv
                    int nq = min(QUERY_TILE, n - i);
                    size_t zi = z + (size_t)i * Z, ei = e + (size_t)i * E;
                    attention_chunk_backward(dq + zi, dk + z, dv_out + e, scores + scratch, dscores + scratch, i < last,
                                    dout + ei, o + ei, lse + ((size_t)b * L + t0 + i) * H + h, q + zi, k + z, v + e,
                                    mask_query(mask, b, h, H, t0 + i, C), nq, i + nq, dz, dv, Z, E, H, C);
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------
// LayerNorm: y = (x - mean) rstd (weight + 1) + bias over the D numbers of a row; weight, bias NULL: neither.
// mean, rstd (R). backward, with a = (weight + 1) dy and n = (x - mean) rstd: dx = rstd (a - mean(a) - n mean(a n)).
// Sums and mean are double, as in TimestepNorm and RMSNorm.

static void layernorm_forward(real *out, double *mean, real *rstd, const real *inp, const real *weight,
                              const real *bias, int R, int D, double eps) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        const real *x = inp + (size_t)r * D;
        real *y = out + (size_t)r * D;
        double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < D; c++) sum += x[c];
        double m = sum / D;
#pragma omp simd reduction(+ : squares)
        for (int c = 0; c < D; c++) squares += (x[c] - m) * (x[c] - m);
        double s = 1 / sqrt(squares / D + eps);
        for (int c = 0; c < D; c++) {
            y[c] = (real)((x[c] - m) * s) * (weight ? weight[c] + 1 : 1) + (bias ? bias[c] : 0);
        }
        mean[r] = m;
        rstd[r] = (real)s;
    }
}

static void layernorm_backward(real *dinp, real *dweight, real *dbias, const real *dout, const real *inp,
                               const real *weight, const double *mean, const real *rstd, int R, int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        const real *x = inp + (size_t)r * D, *dy = dout + (size_t)r * D;
        real *dx = dinp + (size_t)r * D, sum = 0, dot = 0;
        double m = mean[r], s = rstd[r];
#pragma omp simd reduction(+ : sum, dot)
        for (int c = 0; c < D; c++) {
            real a = dy[c] * (weight ? weight[c] + 1 : 1);
            sum += a;
            dot += a * (real)((x[c] - m) * s);
        }
        sum /= D, dot /= D;
        for (int c = 0; c < D; c++) {
            real a = dy[c] * (weight ? weight[c] + 1 : 1), n = (real)((x[c] - m) * s);
            dx[c] = (real)s * (a - sum - n * dot);
        }
    }
    if (dweight) {
        sum_rows(dweight, dout, inp, mean, rstd, R, D, 1);
        sum_rows(dbias, dout, NULL, NULL, NULL, R, D, 1);
    }
}

// ----------------------------------------------------------------------------
// rescale: out = alpha inp, alpha (D); backward: dinp = alpha dout, dalpha += sum of rows of dout inp

static void rescale_forward(real *out, const real *inp, const real *alpha, int R, int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < D; c++) out[(size_t)r * D + c] = alpha[c] * inp[(size_t)r * D + c];
    }
}

static void rescale_backward(real *dinp, real *dalpha, const real *dout, const real *inp, const real *alpha, int R,
                             int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < D; c++) dinp[(size_t)r * D + c] = alpha[c] * dout[(size_t)r * D + c];
    }
    sum_rows(dalpha, dout, inp, NULL, NULL, R, D, 1);
}

// a residual: out += inp
static void add(real *out, const real *inp, size_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
    for (size_t i = 0; i < n; i++) out[i] += inp[i];
}

// ----------------------------------------------------------------------------
// output and loss: logits (R,V) = x output', loss = log sum_v e^logit - logit of the target, in nats
//
// A block of positions at a time, so that the logits of a long sequence never exist whole. Since the block is
// at hand, forward and backward are one: with dx not NULL, dlogit = grad_scale (softmax - onehot(target)),
// dx = dlogit output, doutput += dlogit' x. losses (R); a target of -1 gives no loss and no gradient.

static int logit_rows(int V) { return max(LOGITS / V, LOGIT_ROWS); }

static void output_loss(double *losses, real *dx, real *doutput, real *logits, const real *x, const real *output,
                        const int32_t *targets, double grad_scale, int R, int D, int V) {
    for (int r0 = 0; r0 < R; r0 += logit_rows(V)) {
        int rows = min(logit_rows(V), R - r0);
        const real *xr = x + (size_t)r0 * D;
        linear_forward(logits, 0, xr, output, NULL, rows, D, V);
#pragma omp parallel for schedule(static) if (is_large((double)rows * V))
        for (int r = 0; r < rows; r++) {
            real *l = logits + (size_t)r * V, top = -INFINITY;
            int target = targets[r0 + r];
#pragma omp simd reduction(max : top)
            for (int v = 0; v < V; v++) top = l[v] > top ? l[v] : top;
            double sum = 0, at_target = target < 0 ? 0 : l[target];
            real overflow = 0; // as in attention
#pragma omp simd reduction(+ : sum, overflow)
            for (int v = 0; v < V; v++) {
                overflow += l[v] - l[v];
                l[v] = exp_real(l[v] - top);
                sum += l[v];
            }
            sum += overflow;
            losses[r0 + r] = target < 0 ? 0 : log(sum) + (top - at_target); // top may be 1e20
            real scale = target < 0 ? 0 : (real)(grad_scale / sum);
            // softmax - 1 at the target, of which nothing is left in float where softmax is almost 1
            double dtarget = target < 0 ? 0 : grad_scale * (l[target] - sum) / sum;
            for (int v = 0; dx && v < V; v++) l[v] *= scale;
            if (dx && target >= 0) l[target] = (real)dtarget;
        }
        if (dx) linear_backward(dx + (size_t)r0 * D, 0, doutput, NULL, logits, xr, output, rows, D, V);
    }
}

// ----------------------------------------------------------------------------
// activations

typedef struct {          // of one layer: what its backward pass reads
    double *norm_mean;    // (B,L,G) TimestepNorm's
    real *norm_rstd;      // (B,L,G)
    real *xt;             // (B,L,D) TimestepNorm(x)
    real *h;              // (B, L/CEMA_BLOCK, 2, N, D) CEMA's state before each block
    real *ema, *ema_rstd; // (B,L,D), (B,L) CEMA(xt), and its RMSNorm's
    real *mx;             // (B,L,D) RMSNorm(CEMA(xt))
    real *z, *z_rstd;     // (B,L,Z), (B,L,H) before its norm
    real *q, *k;          // (B,L,Z) before the rotation
    real *v_pre, *r_pre;    // (B,L,E) before silu
    real *o, *lse;        // (B,L,E), (B,L,H)
    real *y;              // (B,L,D) the sub-layer's output
    double *ffn_mean;     // (B,L) LayerNorm's
    real *ffn_rstd;       // (B,L)
    real *u;              // (B,L,D) LayerNorm(y)
    real *f1, *f3;        // (B,L,F) u W1', u W3' (swiglu only)
    real *f2;             // (B,L,D) before alpha (rescale_nffn only)
} LayerActs;

typedef struct {                    // used by every layer in turn; what begins with d, for backward only
    real *logits;                   // (logit_rows,V)
    real *dx, *dy, *dxt, *dmx;      // (B,L,D)
    real *zn, *q_rotated, *k_rotated; // (B,L,Z) of the attention sub-layer, here and below
    real *v, *gated;                // (B,L,E)
    real *scores;                   // (threads,QUERY_TILE,C)
    real *dmega, *dema;             // (B,L,D)
    real *dq, *dk, *dzn, *dz;       // (B,L,Z)
    real *do_, *dr_pre, *dv;         // (B,L,E)
    real *dscores;                  // (threads,QUERY_TILE,C)
    Coeffs dcoeffs;
    real *hidden, *dhidden, *df1; // (B,L,F) of the FFN sub-layer
} Scratch;

struct Model {
    Config config;
    Mode mode;
    int max_B, max_L;
    Tensor *tensors;
    int num_tensors;
    size_t num_params;
    Shard *own;      // (num_own) of them, that this process updates,
    int num_own;     // in all
    size_t owned;    // so many
    real *memory[4]; // PARAMS, GRADS; MOMENT1, MOMENT2 (owned)
    Params params, grads;
    real *acts_memory, *work_memory;
    LayerActs *acts;          // (num_layers), all in the same memory unless mode is TRAIN
    real **x;                 // (num_layers+1) of (B,L,D): blocks' inputs, the last one's output
    double *final_mean;       // (B,L,G) final norm's
    real *final_rstd, *final; // (B,L,G), and its output (B,L,D)
    double *losses;           // (B,L)
    double *norm_parts;       // of megalodon_grad_norm
    int32_t *tokens;          // (B,L)
    real *rope;               // (C, dz/2, 2)
    Coeffs *coeffs;             // (num_layers)
    int coeffs_valid;
    Scratch scratch;
    int threads;                         // that scratch has room for
    DropoutKey draw;                           // of dropout, if
    int dropping;                        // it is on
    ChunkParallel cp;                       // the sequences' others; pieces.cp_size 1: none
    int64_t start;                       // place of this piece in them,
    int64_t whole;                       // of so many tokens
    real *exchange;                      // memory of theirs: mine, all, and a gradient by CEMA's state, or NULL
    int joining;                         // in a forward of a piece: its incoming state is not yet known
    void (*ready)(Model *, int segment); // or NULL
    State before;   // the last forward's incoming state without k and v, for the backward pass; of a piece, its own
    int B, L;       // of the last forward
    int acts_layer; // the layer whose activations the shared memory holds, -1: none; not in mode TRAIN
};

static real *zeros(size_t bytes) { // aligned for vectors
    real *memory = aligned_alloc(64, (bytes / 64 + 1) * 64);
    if (memory) memset(memory, 0, bytes);
    return memory;
}

// Hands out the next n numbers behind *at; with *at NULL it only counts them. Slices begin at multiples of 16.
typedef struct {
    real *at;
    size_t used;
} Arena;
static void take(real **pointer, Arena *arena, size_t n) {
    *pointer = arena->at ? arena->at + arena->used : NULL;
    arena->used += (n + 15) / 16 * 16;
}

// Double, at most two numbers of ours for each.
static void take_double(double **pointer, Arena *arena, size_t n) {
    real *at;
    take(&at, arena, n * sizeof(double) / sizeof(real));
    *pointer = (double *)(void *)at;
}

static void layer_acts_take(LayerActs *a, Arena *arena, const Config *c, int B, int L) {
    size_t R = (size_t)B * L, D = c->model_dim, Z = c->z_dim, E = c->value_dim, F = c->ffn_hidden_dim;
    size_t H = c->num_heads, G = c->norm_num_groups, blocks = (size_t)B * ceil_div(L, CEMA_BLOCK);
    take_double(&a->norm_mean, arena, R * G), take(&a->norm_rstd, arena, R * G);
    take(&a->xt, arena, R * D);
    take(&a->h, arena, blocks * 2 * c->cema_ndim * D);
    take(&a->ema, arena, R * D), take(&a->ema_rstd, arena, R);
    take(&a->mx, arena, R * D);
    take(&a->z, arena, R * Z), take(&a->z_rstd, arena, R * H);
    take(&a->q, arena, R * Z), take(&a->k, arena, R * Z);
    take(&a->v_pre, arena, R * E), take(&a->r_pre, arena, R * E);
    take(&a->o, arena, R * E), take(&a->lse, arena, R * H);
    take(&a->y, arena, R * D);
    take_double(&a->ffn_mean, arena, R), take(&a->ffn_rstd, arena, R);
    take(&a->u, arena, R * D);
    take(&a->f1, arena, R * F), take(&a->f3, arena, c->swiglu ? R * F : 0);
    take(&a->f2, arena, c->rescale_nffn ? R * D : 0);
}

static void coeffs_take(Coeffs *coeffs, Arena *arena, const Config *c) {
    size_t n = (size_t)c->cema_ndim * strip_channels(c->model_dim);
    take(&coeffs->p, arena, n), take(&coeffs->q_re, arena, n), take(&coeffs->q_im, arena, n);
    take(&coeffs->g_re, arena, n), take(&coeffs->g_im, arena, n);
}

// The two sub-layers take turns, so theirs lie in the same place.
static void scratch_take(Scratch *s, Arena *arena, const Config *c, Mode mode, int B, int L, int threads) {
    size_t R = (size_t)B * L, D = c->model_dim, Z = c->z_dim, E = c->value_dim, F = c->ffn_hidden_dim;
    size_t scores = (size_t)threads * QUERY_TILE * c->chunk_size, start = arena->used;
    int backward = mode != MEGALODON_INFER;
    take(&s->zn, arena, R * Z), take(&s->q_rotated, arena, R * Z), take(&s->k_rotated, arena, R * Z);
    take(&s->v, arena, R * E), take(&s->gated, arena, R * E);
    take(&s->scores, arena, scores);
    if (backward) {
        take(&s->dmega, arena, R * D), take(&s->dema, arena, R * D);
        take(&s->dq, arena, R * Z), take(&s->dk, arena, R * Z);
        take(&s->dzn, arena, R * Z), take(&s->dz, arena, R * Z);
        take(&s->do_, arena, R * E), take(&s->dr_pre, arena, R * E), take(&s->dv, arena, R * E);
        take(&s->dscores, arena, scores);
        coeffs_take(&s->dcoeffs, arena, c);
    }
    size_t end = arena->used;
    arena->used = start;
    take(&s->hidden, arena, R * F);
    if (backward) take(&s->dhidden, arena, R * F), take(&s->df1, arena, R * F);
    arena->used = end > arena->used ? end : arena->used;
    take(&s->logits, arena, min(logit_rows(c->vocab_size), B * L) * (size_t)c->vocab_size);
    if (!backward) return;
    take(&s->dx, arena, R * D), take(&s->dy, arena, R * D);
    take(&s->dxt, arena, R * D), take(&s->dmx, arena, R * D);
}

// ----------------------------------------------------------------------------
// the attention sub-layer: y = mega(x), see megalodon.h. It goes on from the state `in` and leaves its own in
// `out`, which may be the same; NULL: a fresh start, the end not kept.

// The dropout of one place in one layer (-1: none of them), for an activation of `width` numbers a token.
static Mask mask_of(const Model *m, int layer, int place, double p, int width) {
    uint64_t whole = m->cp.cp_size > 1 ? (uint64_t)m->whole : (uint64_t)m->L; // tokens of a row
    return (Mask){.p = m->dropping ? p : 0,
                  .seed = m->draw.seed,
                  .stream = STREAM_DROPOUT + (uint32_t)place,
                  .step = (uint32_t)m->draw.step,
                  .layer = (uint32_t)(layer + 1),
                  .first = ((uint64_t)m->draw.row * whole + (uint64_t)m->start) * (uint64_t)width,
                  .row = whole * (uint64_t)width,
                  .run = (size_t)m->L * width};
}

// Of the attention's probabilities: a head's queries lie side by side, C numbers each.
static Mask mask_of_attention(const Model *m, int layer) {
    int C = m->config.chunk_size;
    Mask mask = mask_of(m, layer, DROP_ATTENTION, m->config.attention_dropout, C);
    mask.first += (uint64_t)m->draw.row * (uint64_t)(m->config.num_heads - 1) * mask.row;
    mask.run = 0;
    return mask;
}

// ----------------------------------------------------------------------------
// TimestepNorm and CEMA in the model: a piece of a sequence joins the others

int megalodon_chunk_parallel(Model *m, const ChunkParallel *pieces) {
    const Config *c = &m->config;
    free(m->exchange);
    m->exchange = NULL, m->cp = (ChunkParallel){.cp_size = 1}, m->start = m->whole = 0;
    if (!pieces || pieces->cp_size == 1) return 1;
    size_t sums = 2 * (size_t)m->max_B * 3 * c->norm_num_groups; // double
    size_t h = (size_t)m->max_B * 2 * c->cema_ndim * c->model_dim;
    m->exchange = zeros(((size_t)pieces->cp_size + 1) * (sums > h ? sums : h) * sizeof(real) + h * sizeof(real));
    if (!m->exchange) return 0;
    m->cp = *pieces;
    for (int i = 0; i < pieces->cp_size; i++) {
        m->start += i < pieces->cp_rank ? pieces->lengths[i] : 0;
        m->whole += pieces->lengths[i];
    }
    return 1;
}

// What all pieces have found out alone, one behind the other: m->exchange has this one's at its start.
static void *gather(Model *m, size_t bytes) {
    char *mine = (char *)m->exchange;
    m->cp.gather(m->cp.context, mine, mine + bytes, bytes);
    return mine + bytes;
}

// TimestepNorm number `layer`; that behind all layers is the final one. in, out: see mega_forward.
static void timestep_norm_layer_forward(Model *m, int layer, real *y, double *mean, real *rstd, const real *x, const real *weight,
                              const real *bias, const State *in, State *out) {
    int B = m->B, L = m->L, D = m->config.model_dim, G = m->config.norm_num_groups;
    size_t at = (size_t)layer * B * G, rows = (size_t)B * G;
    double eps = m->config.norm_eps, *mean_out = out ? out->mean + at : NULL, *m2_out = out ? out->m2 + at : NULL;
    if (m->joining) {
        double *mine = (double *)(void *)m->exchange;
        timestep_norm_forward(y, mean, rstd, mine, mine + rows, x, weight, bias, NULL, NULL, NULL, B, L, D, G, eps);
        double *all = gather(m, 2 * rows * sizeof *mine);
        timestep_norm_combine(in->mean + at, in->m2 + at, mean_out, m2_out, all, out ? out->count : NULL, &m->cp, B, D,
                           G);
        mean_out = m2_out = NULL;
    }
    timestep_norm_forward(y, mean, rstd, mean_out, m2_out, x, weight, bias, in ? in->mean + at : NULL,
                          in ? in->m2 + at : NULL, in ? in->count : NULL, B, L, D, G, eps);
}

static void timestep_norm_layer_backward(Model *m, real *dx, real *dweight, real *dbias, const real *dy, const real *x,
                               const real *weight, const double *mean, const real *rstd) {
    int B = m->B, L = m->L, D = m->config.model_dim, G = m->config.norm_num_groups;
    double *mine = (double *)(void *)m->exchange;
    timestep_norm_backward(dx, dweight, dbias, mine, dy, x, weight, mean, rstd, m->before.count, B, L, D, G);
    if (m->cp.cp_size == 1) return;
    double *all = gather(m, (size_t)B * G * 3 * sizeof *mine);
    timestep_norm_combine_backward(dx, x, all, &m->cp, B, L, D, G);
}

static void cema_layer_forward(Model *m, int layer, const State *in, State *out) {
    int B = m->B, L = m->L, D = m->config.model_dim, N = m->config.cema_ndim;
    size_t modes = (size_t)B * 2 * N * D, at = layer * modes;
    LayerActs *a = &m->acts[layer];
    real *h_out = out ? out->h + at : NULL;
    if (m->joining) {
        cema_reduce(m->exchange, a->xt, &m->coeffs[layer], 0, B, L, D, N);
        real *all = gather(m, modes * sizeof *all);
        cema_combine(in->h + at, h_out, all, &m->coeffs[layer], 0, &m->cp, B, D, N);
        h_out = NULL;
    }
    cema_forward(a->ema, a->h, h_out, a->xt, &m->coeffs[layer], m->params.layers[layer].cema_omega,
                 in ? in->h + at : NULL, B, L, D, N);
}

static void cema_layer_backward(Model *m, int layer, real *dx, const real *dy) {
    int B = m->B, L = m->L, D = m->config.model_dim, N = m->config.cema_ndim;
    size_t modes = (size_t)B * 2 * N * D;
    const LayerActs *a = &m->acts[layer];
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    Coeffs *dcoeffs = &m->scratch.dcoeffs;
    real *dh = NULL;
    if (m->cp.cp_size > 1) {
        cema_reduce(m->exchange, dy, &m->coeffs[layer], 1, B, L, D, N);
        real *all = gather(m, modes * sizeof *all);
        dh = memset(all + m->cp.cp_size * modes, 0, modes * sizeof *dh);
        cema_combine(dh, NULL, all, &m->coeffs[layer], 1, &m->cp, B, D, N);
    }
    cema_backward(dx, dcoeffs, dw->cema_omega, dh, dy, a->xt, a->h, &m->coeffs[layer], w->cema_omega, B, L, D, N);
    cema_coeffs_backward(dw->cema_alpha, dw->cema_delta, dw->cema_theta, dw->cema_gamma, dcoeffs, w->cema_alpha,
                        w->cema_delta, w->cema_theta, D, N);
}

static void mega_forward(Model *m, int layer, const State *in, State *out, const real *x, int B, int L) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int D = c->model_dim, H = c->num_heads, Z = c->z_dim, E = c->value_dim, C = c->chunk_size;
    int R = B * L, dz = Z / H;
    size_t chunk = (size_t)layer * B * C;
    const int64_t *count = in ? in->count : NULL;
    real *cache_k = out && out->k ? out->k + chunk * Z : NULL, *cache_v = out && out->v ? out->v + chunk * E : NULL;

    // xt = TimestepNorm(x), mx = RMSNorm(CEMA(xt))
    timestep_norm_layer_forward(m, layer, a->xt, a->norm_mean, a->norm_rstd, x, w->timenorm_weight, w->timenorm_bias, in, out);
    cema_layer_forward(m, layer, in, out);
    rmsnorm_forward(a->mx, a->ema_rstd, a->ema, w->rmsnorm_weight, R, D, c->norm_eps);
    dropout(a->mx, a->mx, mask_of(m, layer, DROP_MX, c->hidden_dropout, D), (size_t)R * D);
    // z = RMSNorm_per_head(mx Wz' + bz), and from it q and k
    linear_forward(a->z, 0, a->mx, w->wz, w->wz_bias, R, D, Z);
    rmsnorm_forward(s->zn, a->z_rstd, a->z, NULL, R * H, dz, c->norm_eps);
    qk_forward(a->q, a->k, s->zn, w->gamma, w->beta, R, Z, dz);
    rope_forward(s->q_rotated, a->q, m->rope, count, B, L, Z, dz, C);
    rope_forward(s->k_rotated, a->k, m->rope, count, B, L, Z, dz, C);
    // v = silu(xt Wv' + bv)
    linear_forward(a->v_pre, 0, a->xt, w->wv, w->wv_bias, R, D, E);
    silu_forward(s->v, a->v_pre, (size_t)R * E);
    attention_forward(a->o, a->lse, cache_k, cache_v, s->scores, s->q_rotated, s->k_rotated, s->v, count,
                      mask_of_attention(m, layer), B, L, C, H, Z, E, m->threads);
    // y = (mx Wh1' + bh1) + (o * r) Wh2' + x, r = silu(mx Wr' + br)
    linear_forward(a->r_pre, 0, a->mx, w->wr, w->wr_bias, R, D, E);
    gate_forward(s->gated, a->o, a->r_pre, (size_t)R * E);
    dropout(s->gated, s->gated, mask_of(m, layer, DROP_GATED, c->hidden_dropout, E), (size_t)R * E);
    linear_forward(a->y, 0, a->mx, w->wh1, w->wh1_bias, R, D, D);
    linear_forward(a->y, 1, s->gated, w->wh2, NULL, R, E, D);
    dropout(a->y, a->y, mask_of(m, layer, DROP_MEGA, c->dropout, D), (size_t)R * D);
    add(a->y, x, (size_t)R * D);
}

// dx = gradient by x, from dy that by y. Cheap intermediates (zn, the rotation, v, the gate) are computed again.
static void mega_backward(Model *m, int layer, real *dx, const real *dy, const real *x, int B, int L) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int D = c->model_dim, H = c->num_heads, Z = c->z_dim, E = c->value_dim, C = c->chunk_size;
    int R = B * L, dz = Z / H;

    const Mask mega_mask = mask_of(m, layer, DROP_MEGA, c->dropout, D);
    const Mask gated_mask = mask_of(m, layer, DROP_GATED, c->hidden_dropout, E);
    const real *dsum = mega_mask.p > 0 ? s->dxt : dy; // gradient by wh1's and wh2's sum
    dropout(s->dxt, dy, mega_mask, (size_t)R * D);
    gate_forward(s->gated, a->o, a->r_pre, (size_t)R * E);
    dropout(s->gated, s->gated, gated_mask, (size_t)R * E);
    linear_backward(s->do_, 0, dw->wh2, NULL, dsum, s->gated, w->wh2, R, E, D);
    dropout(s->do_, s->do_, gated_mask, (size_t)R * E);
    gate_backward(s->do_, s->dr_pre, s->do_, a->o, a->r_pre, (size_t)R * E);
    linear_backward(s->dmx, 0, dw->wh1, dw->wh1_bias, dsum, a->mx, w->wh1, R, D, D);
    linear_backward(s->dmx, 1, dw->wr, dw->wr_bias, s->dr_pre, a->mx, w->wr, R, D, E);

    silu_forward(s->v, a->v_pre, (size_t)R * E);
    rope_forward(s->q_rotated, a->q, m->rope, NULL, B, L, Z, dz, C);
    rope_forward(s->k_rotated, a->k, m->rope, NULL, B, L, Z, dz, C);
    attention_backward(s->dq, s->dk, s->dv, s->scores, s->dscores, s->do_, a->o, a->lse, s->q_rotated, s->k_rotated, s->v,
                       mask_of_attention(m, layer), B, L, C, H, Z, E, m->threads);
    rope_backward(s->dq, s->dq, m->rope, NULL, B, L, Z, dz, C);
    rope_backward(s->dk, s->dk, m->rope, NULL, B, L, Z, dz, C);
    rmsnorm_forward(s->zn, a->z_rstd, a->z, NULL, R * H, dz, c->norm_eps);
    qk_backward(s->dzn, dw->gamma, dw->beta, s->dq, s->dk, s->zn, w->gamma, R, Z, dz);
    rmsnorm_backward(s->dz, NULL, s->dzn, a->z, NULL, a->z_rstd, R * H, dz);
    linear_backward(s->dmx, 1, dw->wz, dw->wz_bias, s->dz, a->mx, w->wz, R, D, Z);

    dropout(s->dmx, s->dmx, mask_of(m, layer, DROP_MX, c->hidden_dropout, D), (size_t)R * D);
    rmsnorm_backward(s->dema, dw->rmsnorm_weight, s->dmx, a->ema, w->rmsnorm_weight, a->ema_rstd, R, D);
    cema_layer_backward(m, layer, s->dxt, s->dema);
    silu_backward(s->dv, s->dv, a->v_pre, (size_t)R * E);
    linear_backward(s->dxt, 1, dw->wv, dw->wv_bias, s->dv, a->xt, w->wv, R, D, E);
    timestep_norm_layer_backward(m, dx, dw->timenorm_weight, dw->timenorm_bias, s->dxt, x, w->timenorm_weight, a->norm_mean,
                       a->norm_rstd);
    add(dx, dy, (size_t)R * D); // y = ... + x
}

// ----------------------------------------------------------------------------
// the FFN sub-layer with the block's residual: out = [alpha *] hidden W2' + x,
// hidden = silu(u W1') [* (u W3')], u = LayerNorm(y)

static void nffn_forward(Model *m, int layer, real *out, const real *x, int R) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int D = c->model_dim, F = c->ffn_hidden_dim;

    layernorm_forward(a->u, a->ffn_mean, a->ffn_rstd, a->y, w->norm_weight, w->norm_bias, R, D, c->norm_eps);
    linear_forward(a->f1, 0, a->u, w->fc1, NULL, R, D, F);
    if (c->swiglu) {
        linear_forward(a->f3, 0, a->u, w->fc3, NULL, R, D, F);
        gate_forward(s->hidden, a->f3, a->f1, (size_t)R * F);
    } else {
        silu_forward(s->hidden, a->f1, (size_t)R * F);
    }
    dropout(s->hidden, s->hidden, mask_of(m, layer, DROP_HIDDEN, c->hidden_dropout, F), (size_t)R * F);
    real *f2 = c->rescale_nffn ? a->f2 : out;
    linear_forward(f2, 0, s->hidden, w->fc2, NULL, R, F, D);
    dropout(f2, f2, mask_of(m, layer, DROP_NFFN, c->dropout, D), (size_t)R * D);
    if (c->rescale_nffn) rescale_forward(out, f2, w->alpha, R, D);
    add(out, x, (size_t)R * D);
}

// dy = gradient by y, from dout. The residual's share, dout itself, is the block's to add.
static void nffn_backward(Model *m, int layer, real *dy, const real *dout, int R) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int D = c->model_dim, F = c->ffn_hidden_dim;

    if (c->swiglu) {
        gate_forward(s->hidden, a->f3, a->f1, (size_t)R * F);
    } else {
        silu_forward(s->hidden, a->f1, (size_t)R * F);
    }
    const Mask hidden_mask = mask_of(m, layer, DROP_HIDDEN, c->hidden_dropout, F);
    const Mask nffn_mask = mask_of(m, layer, DROP_NFFN, c->dropout, D);
    const real *df2 = dout;
    if (c->rescale_nffn) {
        rescale_backward(s->dmx, dw->alpha, dout, a->f2, w->alpha, R, D);
        df2 = s->dmx;
    }
    dropout(s->dmx, df2, nffn_mask, (size_t)R * D);
    if (nffn_mask.p > 0) df2 = s->dmx;
    dropout(s->hidden, s->hidden, hidden_mask, (size_t)R * F);
    linear_backward(s->dhidden, 0, dw->fc2, NULL, df2, s->hidden, w->fc2, R, F, D);
    dropout(s->dhidden, s->dhidden, hidden_mask, (size_t)R * F);
    real *du = s->dxt;
    if (c->swiglu) {
        gate_backward(s->dhidden, s->df1, s->dhidden, a->f3, a->f1, (size_t)R * F); // dhidden is now df3
        linear_backward(du, 0, dw->fc3, NULL, s->dhidden, a->u, w->fc3, R, D, F);
    } else {
        silu_backward(s->df1, s->dhidden, a->f1, (size_t)R * F);
    }
    linear_backward(du, c->swiglu, dw->fc1, NULL, s->df1, a->u, w->fc1, R, D, F);
    layernorm_backward(dy, dw->norm_weight, dw->norm_bias, du, a->y, w->norm_weight, a->ffn_mean, a->ffn_rstd, R, D);
}

// ----------------------------------------------------------------------------
// the block: y = mega(x), out = nffn(y) + x. The second residual skips both sub-layers.

static void block_forward(Model *m, int layer, const State *in, State *out, int B, int L) {
    mega_forward(m, layer, in, out, m->x[layer], B, L);
    nffn_forward(m, layer, m->x[layer + 1], m->x[layer], B * L);
    m->acts_layer = layer;
}

// Replaces scratch.dx, the gradient by the block's output, by that by its input.
static void block_backward(Model *m, int layer, int B, int L) {
    Scratch *s = &m->scratch;
    if (m->mode == MEGALODON_RECOMPUTE && m->acts_layer != layer) block_forward(m, layer, &m->before, NULL, B, L);
    nffn_backward(m, layer, s->dy, s->dx, B * L);
    mega_backward(m, layer, s->dmega, s->dy, m->x[layer], B, L);
    add(s->dx, s->dmega, (size_t)B * L * m->config.model_dim);
}

// ----------------------------------------------------------------------------
// the model: tokens -> embedding -> blocks -> TimestepNorm -> output

static real embedding_scale(const Config *c) { return c->scale_emb ? (real)sqrt(c->model_dim) : 1; }

void megalodon_dropout(Model *m, const DropoutKey *draw) {
    m->dropping = draw != NULL;
    if (draw) m->draw = *draw;
}

// Keeps what the backward pass, or a block's forward again, needs of the incoming state. Of a piece, layer after layer
// makes its own of it.
static void remember(Model *m, const State *state, int B) {
    const Config *c = &m->config;
    size_t layers = c->num_layers, moments = (layers + 1) * B * c->norm_num_groups;
    size_t h = layers * B * 2 * c->cema_ndim * c->model_dim;
    State *s = &m->before;
    memset(s->count, 0, (size_t)B * sizeof *s->count);
    memset(s->mean, 0, moments * sizeof *s->mean), memset(s->m2, 0, moments * sizeof *s->m2);
    memset(s->h, 0, h * sizeof *s->h);
    if (state) {
        memcpy(s->count, state->count, (size_t)B * sizeof *s->count);
        memcpy(s->mean, state->mean, moments * sizeof *s->mean), memcpy(s->m2, state->m2, moments * sizeof *s->m2);
        memcpy(s->h, state->h, h * sizeof *s->h);
    }
    for (int b = 0; b < B; b++) s->count[b] += m->start;
}

void megalodon_forward(Model *m, State *state, const int32_t *tokens, int B, int L) {
    const Config *c = &m->config;
    int D = c->model_dim, layers = c->num_layers, piece = m->cp.cp_size > 1;
    assert(B > 0 && L > 0 && B <= m->max_B && L <= m->max_L && (!state || state->B == B));
    assert(!piece || (L == m->cp.lengths[m->cp.cp_rank] && !(state && state->k)));
    for (size_t i = 0; i < (size_t)B * L; i++) assert(tokens[i] >= 0 && tokens[i] < c->vocab_size);
    m->B = B, m->L = L, m->acts_layer = -1;
    memcpy(m->tokens, tokens, (size_t)B * L * sizeof *tokens);
    for (int l = 0; l < layers && !m->coeffs_valid; l++) {
        const LayerParams *w = &m->params.layers[l];
        cema_coeffs_forward(&m->coeffs[l], w->cema_alpha, w->cema_delta, w->cema_theta, w->cema_gamma, D, c->cema_ndim);
    }
    m->coeffs_valid = 1;
    if (m->mode != MEGALODON_INFER || piece) remember(m, state, B);
    const State *in = piece ? &m->before : state;
    m->joining = piece;

    embedding_forward(m->x[0], tokens, m->params.embed, embedding_scale(c), B * L, D);
    dropout(m->x[0], m->x[0], mask_of(m, -1, DROP_EMBED, c->dropout, D), (size_t)B * L * D);
    for (int l = 0; l < layers; l++) block_forward(m, l, in, state, B, L);
    timestep_norm_layer_forward(m, layers, m->final, m->final_mean, m->final_rstd, m->x[layers], m->params.final_norm_weight,
                      m->params.final_norm_bias, in, state);
    m->joining = 0;
    for (int b = 0; state && b < B; b++) state->count[b] += piece ? m->whole : L;
}

double megalodon_loss(Model *m, const int32_t *targets, double grad_scale, int64_t *counted, real *losses) {
    int R = m->B * m->L, D = m->config.model_dim, V = m->config.vocab_size;
    int grad = grad_scale > 0 && m->mode != MEGALODON_INFER;
    output_loss(m->losses, grad ? m->scratch.dxt : NULL, grad ? m->grads.output : NULL, m->scratch.logits, m->final,
                m->params.output, targets, grad_scale, R, D, V);
    double sum = 0;
    *counted = 0;
    for (int r = 0; r < R; r++) {
        sum += m->losses[r];
        *counted += targets[r] >= 0;
        if (losses) losses[r] = (real)m->losses[r];
    }
    return sum;
}

void megalodon_backward(Model *m) {
    const Config *c = &m->config;
    int B = m->B, L = m->L, D = c->model_dim;
    Scratch *s = &m->scratch;
    assert(m->mode != MEGALODON_INFER);
    for (int b = 0; b < B; b++) assert(m->before.count[b] % c->chunk_size == 0);
    timestep_norm_layer_backward(m, s->dx, m->grads.final_norm_weight, m->grads.final_norm_bias, s->dxt, m->x[c->num_layers],
                       m->params.final_norm_weight, m->final_mean, m->final_rstd);
    if (m->ready) m->ready(m, c->num_layers + 1);
    for (int l = c->num_layers - 1; l >= 0; l--) {
        block_backward(m, l, B, L);
        if (m->ready) m->ready(m, l + 1);
    }
    dropout(s->dx, s->dx, mask_of(m, -1, DROP_EMBED, c->dropout, D), (size_t)B * L * D);
    embedding_backward(m->grads.embed, s->dx, m->tokens, embedding_scale(c), B * L, D);
    if (m->ready) m->ready(m, 0);
}

void megalodon_on_grad_ready(Model *m, void (*ready)(Model *, int segment)) { m->ready = ready; }

void megalodon_logits(Model *m, size_t first, size_t rows, real *dst) {
    int D = m->config.model_dim, V = m->config.vocab_size;
    assert(first + rows <= (size_t)m->B * m->L);
    linear_forward(dst, 0, m->final + first * D, m->params.output, NULL, (int)rows, D, V);
}

int megalodon_activation(Model *m, int layer, const char *name, real *dst) {
    const Config *c = &m->config;
    size_t R = (size_t)m->B * m->L;
    const real *src = m->final;
    int width = c->model_dim, silu = 0;
    assert(m->mode != MEGALODON_INFER);
    if (layer >= 0) {
        LayerActs *a = &m->acts[layer];
        struct {
            const real *src;
            int width, silu;
        } table[NUM_ACTIVATIONS] = {{a->xt, c->model_dim, 0},
                                    {a->ema, c->model_dim, 0},
                                    {a->mx, c->model_dim, 0},
                                    {a->q, c->z_dim, 0},
                                    {a->k, c->z_dim, 0},
                                    {a->v_pre, c->value_dim, 1},
                                    {a->r_pre, c->value_dim, 1},
                                    {a->o, c->value_dim, 0},
                                    {a->y, c->model_dim, 0},
                                    {a->u, c->model_dim, 0},
                                    {m->x[layer + 1], c->model_dim, 0}};
        int i = 0;
        while (i < NUM_ACTIVATIONS && strcmp(name, megalodon_activations[i])) i++;
        if (i == NUM_ACTIVATIONS) return 0;
        src = table[i].src, width = table[i].width, silu = table[i].silu;
        if (dst && m->mode != MEGALODON_TRAIN && m->acts_layer != layer)
            block_forward(m, layer, &m->before, NULL, m->B, m->L);
    } else if (strcmp(name, "final_norm")) {
        return 0;
    }
    if (dst && silu) silu_forward(dst, src, R * width);
    if (dst && !silu) memcpy(dst, src, R * width * sizeof *dst);
    return width;
}

// ----------------------------------------------------------------------------
// optimizer

void megalodon_zero_grad(Model *m) {
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)m->num_params))
    for (size_t i = 0; i < m->num_params; i++) m->memory[GRADS][i] = 0;
}

// Parts of fixed size are summed in order, so that the threads' number does not show.
double megalodon_grad_norm(Model *m) {
    double *sums = m->norm_parts, total = 0;
    for (int s = 0; s < m->num_own; s++) {
        size_t n = m->own[s].count;
        int parts = (int)((n + NORM_PART - 1) / NORM_PART);
        const real *g = m->memory[GRADS] + m->own[s].first;
#pragma omp parallel for schedule(static) if (is_large((double)n))
        for (int p = 0; p < parts; p++) {
            size_t from = (size_t)p * NORM_PART, to = from + NORM_PART < n ? from + NORM_PART : n;
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (size_t i = from; i < to; i++) sum += (double)g[i] * g[i];
            sums[p] = sum;
        }
        for (int p = 0; p < parts; p++) total += sums[p];
    }
    return sqrt(total);
}

// AdamW, with g the scaled gradient and k = update + 1: m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
// p = p (1 - lr weight_decay) - lr (m/(1 - beta1^k)) / (sqrt(v/(1 - beta2^k)) + eps). All parameters decay. Where v
// overflows (|g| above about 1e20, so only without clipping) p becomes NaN; otherwise it would silently stay as it is.
void megalodon_update(Model *m, const AdamW *o, double lr, double grad_scale, int64_t update) {
    double k = (double)update + 1;
    real b1 = (real)o->beta1, b2 = (real)o->beta2, eps = (real)o->eps, gs = (real)grad_scale;
    real step = (real)(lr / (1 - pow(o->beta1, k))), root = (real)(1 / sqrt(1 - pow(o->beta2, k)));
    real keep = (real)(1 - lr * o->weight_decay), c1 = (real)(1 - o->beta1), c2 = (real)(1 - o->beta2);
    real *m1 = m->memory[MOMENT1], *m2 = m->memory[MOMENT2];
    for (int s = 0; s < m->num_own; s++) {
        size_t n = m->own[s].count;
        real *p = m->memory[PARAMS] + m->own[s].first;
        const real *grad = m->memory[GRADS] + m->own[s].first;
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
        for (size_t i = 0; i < n; i++) {
            real g = grad[i] * gs;
            m1[i] = b1 * m1[i] + c1 * g;
            m2[i] = b2 * m2[i] + c2 * g * g;
            p[i] = p[i] * keep - step * m1[i] / ((real)sqrt(m2[i]) * root + eps) + (m2[i] - m2[i]);
        }
        m1 += n, m2 += n;
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
    real *in = NULL, *out = NULL;
    for (int l = 0; l <= layers; l++) {
        real **x = l % 2 ? &out : &in; // without a backward pass two take turns
        if (m->mode != MEGALODON_INFER || l < 2) take(x, arena, R * D);
        m->x[l] = *x;
    }
    take_double(&m->final_mean, arena, R * G), take(&m->final_rstd, arena, R * G), take(&m->final, arena, R * D);
}

static void work_take(Model *m, Arena *arena) {
    const Config *c = &m->config;
    scratch_take(&m->scratch, arena, c, m->mode, m->max_B, m->max_L, m->threads);
    take(&m->rope, arena, (size_t)c->chunk_size * (c->z_dim / c->num_heads));
    for (int l = 0; l < c->num_layers; l++) coeffs_take(&m->coeffs[l], arena, c);
    // double and int32_t arrays in the same block: at most two numbers of ours for each of theirs
    real *at;
    take(&at, arena, 2 * (size_t)m->max_B * m->max_L), m->losses = (double *)(void *)at;
    take(&at, arena, 2 * (m->num_params / NORM_PART + 1)), m->norm_parts = (double *)(void *)at;
    take(&at, arena, (size_t)m->max_B * m->max_L), m->tokens = (int32_t *)(void *)at;
    size_t rows = (size_t)m->max_B * c->num_layers, moments = 2 * (rows + m->max_B) * c->norm_num_groups;
    take(&at, arena, 2 * (size_t)m->max_B), m->before.count = (int64_t *)(void *)at;
    take(&at, arena, moments), m->before.mean = (double *)(void *)at;
    take(&at, arena, moments), m->before.m2 = (double *)(void *)at;
    take(&m->before.h, arena, rows * 2 * c->cema_ndim * c->model_dim);
}

static int shard_part = 0, shard_parts = 1;

void megalodon_set_shard(int part, int parts) { shard_part = part, shard_parts = parts; }

// A model with its tables but no memory for numbers.
static Model *model_outline(const Config *config, Mode mode, int B, int L) {
    size_t layers = (size_t)config->num_layers;
    Model *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    *m = (Model){.config = *config, .mode = mode, .max_B = B, .max_L = L, .threads = threads_here(), .acts_layer = -1};
    m->cp.cp_size = 1;
    m->tensors = megalodon_tensors(config, &m->num_tensors, &m->num_params);
    m->own = megalodon_shards(config, shard_part, shard_parts, &m->num_own);
    for (int s = 0; m->own && s < m->num_own; s++) m->owned += m->own[s].count;
    m->params.layers = calloc(layers, sizeof *m->params.layers);
    m->grads.layers = calloc(layers, sizeof *m->grads.layers);
    m->acts = calloc(layers, sizeof *m->acts);
    m->x = calloc(layers + 1, sizeof *m->x);
    m->coeffs = calloc(layers, sizeof *m->coeffs);
    if (m->tensors && m->own && m->params.layers && m->grads.layers && m->acts && m->x && m->coeffs) return m;
    megalodon_free(m);
    return NULL;
}

MemoryPlan megalodon_memory(const Config *config, Mode mode, int B, int L) {
    MemoryPlan plan = {0};
    Model *m = model_outline(config, mode, B, L);
    if (!m) return plan;
    Arena acts = {0}, work = {0};
    acts_take(m, &acts);
    work_take(m, &work);
    plan.params = m->num_params * sizeof(real);
    if (mode != MEGALODON_INFER) plan.grads = plan.params, plan.moments = 2 * m->owned * sizeof(real);
    plan.activations = acts.used * sizeof(real);
    plan.scratch = work.used * sizeof(real);
    megalodon_free(m);
    return plan;
}

Model *megalodon_new(const Config *config, Mode mode, int B, int L) {
#ifdef _OPENMP
    megalodon_threads(omp_get_max_threads());
#endif
    if (!take_buffers(threads_here())) return NULL;
    Model *m = model_outline(config, mode, B, L);
    if (!m) return NULL;
    MemoryPlan plan = megalodon_memory(config, mode, B, L);
    m->acts_memory = zeros(plan.activations);
    m->work_memory = zeros(plan.scratch);
    int blocks = mode == MEGALODON_INFER ? 1 : 4, complete = m->acts_memory && m->work_memory;
    for (int i = 0; i < blocks; i++) {
        complete &= (m->memory[i] = zeros(i < MOMENT1 ? plan.params : plan.moments / 2)) != NULL;
    }
    if (!complete) {
        megalodon_free(m);
        return NULL;
    }
    Arena acts = {.at = m->acts_memory}, work = {.at = m->work_memory};
    acts_take(m, &acts);
    work_take(m, &work);
    megalodon_point(&m->params, m->memory[PARAMS], config, m->tensors, m->num_tensors);
    if (mode != MEGALODON_INFER) megalodon_point(&m->grads, m->memory[GRADS], config, m->tensors, m->num_tensors);
    rope_table(m->rope, config->chunk_size, config->z_dim / config->num_heads, config->rope_base);
    return m;
}

void megalodon_free(Model *m) {
    if (!m) return;
    for (int i = 0; i < 4; i++) free(m->memory[i]);
    free(m->acts_memory), free(m->work_memory), free(m->exchange);
    free(m->tensors), free(m->own), free(m->params.layers), free(m->grads.layers), free(m->acts), free(m->x),
        free(m->coeffs);
    free(m);
}

// Copies what this process has of elements first .. first + n - 1, to dst or from src. Returns how many these are.
static size_t buffer_copy(Model *m, Buffer buffer, size_t first, size_t n, real *dst, const real *src) {
    Shard whole = {0, m->num_params}, *held = buffer < MOMENT1 ? &whole : m->own;
    int ranges = buffer < MOMENT1 ? 1 : m->num_own;
    size_t copied = 0;
    real *at = m->memory[buffer]; // of a range
    assert(at && first + n <= m->num_params);
    for (int s = 0; s < ranges; at += held[s++].count) {
        size_t from = first > held[s].first ? first : held[s].first, to = held[s].first + held[s].count;
        if (first + n < to) to = first + n;
        if (from >= to) continue;
        if (dst) memcpy(dst + (from - first), at + (from - held[s].first), (to - from) * sizeof *dst);
        if (src) memcpy(at + (from - held[s].first), src + (from - first), (to - from) * sizeof *src);
        copied += to - from;
    }
    return copied;
}

void megalodon_read(Model *m, Buffer buffer, size_t first, size_t n, real *dst) {
    size_t copied = buffer_copy(m, buffer, first, n, dst, NULL);
    assert(copied == n);
    (void)copied;
}

void megalodon_write(Model *m, Buffer buffer, size_t first, size_t n, const real *src) {
    buffer_copy(m, buffer, first, n, NULL, src);
    if (buffer == PARAMS) m->coeffs_valid = 0;
}

State *state_new(const Config *c, int B, int whole_chunks) {
    State *s = calloc(1, sizeof *s);
    void *memory = zeros(state_bytes(c, B, whole_chunks));
    if (!s || !memory) {
        free(s), free(memory);
        return NULL;
    }
    *s = state_point(memory, c, B, whole_chunks);
    return s;
}

void state_free(State *s) {
    if (!s) return;
    free(s->memory);
    free(s);
}

// k and v need not be cleared: what lies beyond count % C is not read.
void state_reset(State *s, int row) {
    s->count[row] = 0;
    for (size_t i = (size_t)row; i < (size_t)(s->layers + 1) * s->B; i += (size_t)s->B) {
        memset(s->mean + i * s->G, 0, (size_t)s->G * sizeof *s->mean);
        memset(s->m2 + i * s->G, 0, (size_t)s->G * sizeof *s->m2);
        if (i < (size_t)s->layers * s->B) memset(s->h + i * s->modes, 0, s->modes * sizeof *s->h);
    }
}

void state_read(const State *s, size_t first, size_t bytes, void *dst) {
    assert(first + bytes <= s->bytes);
    memcpy(dst, (char *)s->memory + first, bytes);
}

void state_write(State *s, size_t first, size_t bytes, const void *src) {
    assert(first + bytes <= s->bytes);
    memcpy((char *)s->memory + first, src, bytes);
}

// ----------------------------------------------------------------------------
// the machine

void megalodon_threads(int threads) {
#ifdef MEGALODON_BLAS
#ifdef _OPENMP
    if (openblas_set_num_threads) openblas_set_num_threads(1); // may set OpenMP's, so first
#else
    if (openblas_set_num_threads) openblas_set_num_threads(threads);
#endif
#endif
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
    (void)threads;
}

int megalodon_on_gpu(void) { return 0; }

size_t megalodon_available_memory(int processes) {
    return host_memory(processes, (size_t)threads_here() * THREAD_BYTES);
}

size_t megalodon_peak_memory(void) { // of the whole program
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (size_t)usage.ru_maxrss; // bytes there, KiB elsewhere
#else
    return (size_t)usage.ru_maxrss << 10;
#endif
}

const char *megalodon_backend(void) {
    static char text[96];
    int threads = 1;
    const char *blas = "own matrix product", *width = sizeof(real) == 4 ? "float32" : "float64";
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
#ifdef MEGALODON_BLAS
    blas = "BLAS";
#endif
    snprintf(text, sizeof text, "CPU, %s, %d thread%s, %s", width, threads, threads > 1 ? "s" : "", blas);
    return text;
}
