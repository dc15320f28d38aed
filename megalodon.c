/*
megalodon.c: the Megalodon language model on the CPU. Every layer's forward pass has its backward pass next to it, and
the layers come in the order in which data flows. After them: the blocks, the model, the optimizer. megalodon.h says
what the model is, why it has these parts, and what the letters mean. megalodon.cu has the same functions for a GPU.

How to read it
- Arguments: results first, then what the forward pass kept, inputs, parameters, sizes. The backward pass of
  f_forward(out, inp, weight) is f_backward(dinp, dweight, dout, inp, weight). dX is the gradient of the loss w.r.t. X.
  Only in sizes, dz = Z/H and dv = E/H are the widths of a head's key and value.
- In comments, W' is the transpose of W, and brackets are parts that a configuration may omit.
- Gradients of activations are set (=), gradients of parameters are added to (+=): several backward passes may
  accumulate the gradient of one update, and a shared parameter has several uses.
- Tensors are row-major: (B,L,D) is B*L rows of D elements. R = B*L is the number of rows. Weights are (out, in).
- A backward function quotes the forward line that it differentiates, then gives the derivative. It is always the chain
  rule: dL/dx is the sum of dL/dy dy/dx over all y that are computed from x.
- Threads divide rows, channels or heads among them, never a sum. So results do not depend on their number (except for
  the order of summation in a BLAS library).

Easy to get wrong
- Scales of all norms, and gamma of q and k, are stored as an offset from one: used as weight + 1.
- CEMA's gamma and omega, and the FFN's alpha, are not: used as stored.
- v comes from TimestepNorm's output. q, k and r come from RMSNorm's output, after CEMA.
- The FFN's residual is the block's input, not its own input.
- q and k both carry 1/sqrt(dz). The scores get no further scale.
- Rotary positions count from the start of the chunk, and rotate adjacent pairs (2j, 2j+1).
- TimestepNorm's n counts scalars, g = D/G for every token. Its running mean and sum of squared deviations are double.
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

typedef real floatX;      // element type of activations
enum { CEMA_BLOCK = 64 }; // tokens of a token block, see cema_forward
#include "plumbing/model.h"

enum {
    QUERY_TILE = 64,      // rows of the score matrix computed at once
    LOGITS = 1 << 22,     // elements of logits that exist at a time, at most
    LOGIT_ROWS = 128,     // but at least so many rows of them
    COLUMNS = 16,         // columns that one task sums over all rows, for gradients of parameters
    PARALLEL_MIN = 32768, // below this many operations, run serially; see is_large()
};

static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Number of threads that a parallel loop gets here. A loop inside another parallel loop gets one.
static int threads_here(void) {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Whether a loop of this many operations (iterations of its innermost loop) is worth waking the other threads. That
// takes tens of microseconds if they sleep, and far longer if other processes have the cores. So a small model, or one
// token of a medium one, runs on one thread.
static int is_large(double operations) { return operations > PARALLEL_MIN && threads_here() > 1; }

// A vector: LANES elements that one instruction handles.
#ifdef __AVX512F__
#define VEC_BYTES 64
#else
#define VEC_BYTES 32
#endif
typedef real vec __attribute__((vector_size(VEC_BYTES)));
enum { LANES = VEC_BYTES / sizeof(real) };

#include "kernels/team_cpu.h" // threads for decoding

#include "kernels/matmul_cpu.h"

// ----------------------------------------------------------------------------
// sums over rows, for gradients of parameters that every row uses
//
//     a bias,  forward: y = n + b                out = db += sum_r dy       (argument x is NULL)
//     a scale, forward: y = n (w + 1)            out = dw += sum_r dy n     with n = (x - mean) rstd
//
// out (D); dy, x (R,D); mean, rstd (R,G), one for each group of D/G columns; NULL: mean 0, rstd 1. A task owns columns,
// so the order of summation does not depend on the number of threads. Sums are double, since there may be many rows.

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
// embedding: out (R,D) = scale * embed[token], embed (V,D). scale is sqrt(D) with scale_emb, else 1.

static void embedding_forward(real *out, const int32_t *tokens, const real *embed, real scale, int R, int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        const real *e = embed + (size_t)tokens[r] * D;
        for (int c = 0; c < D; c++) out[(size_t)r * D + c] = scale * e[c];
    }
}

// forward: out_r = scale * embed[token_r]
// A token's row of dembed collects the gradients of all rows r in which the token occurs. Two threads must not add to
// the same row of dembed at once, so a task owns columns.
static void embedding_backward(real *dembed, const real *dout, const int32_t *tokens, real scale, int R, int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int c0 = 0; c0 < D; c0 += COLUMNS) {
        for (int r = 0; r < R; r++) {
            real *de = dembed + (size_t)tokens[r] * D;
            for (int c = c0; c < min(c0 + COLUMNS, D); c++) de[c] += scale * dout[(size_t)r * D + c];
        }
    }
}

// ----------------------------------------------------------------------------
// dropout: out = mask inp/(1 - p), where the mask is 0 with probability p, otherwise 1. Dividing by 1 - p keeps the
// expected value. The derivative of out w.r.t. inp is mask/(1 - p), so the backward pass applies the same function to
// the gradient. Masks are not stored but drawn again: Mask in plumbing/model.h says which random word decides about
// which element. out may be inp.

// The mask for a tensor that begins `rows` rows of `width` elements after the one that `mask` is for.
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
            uint32_t words[PART + 8]; // four for each counter, so up to 3 too many at either end
            uint64_t first = mask.first + start / run * mask.row + from, four = first / 4, skip = first % 4;
            size_t at = start + from, count = run - from < PART ? run - from : PART;
            for (uint64_t f = 0; 4 * f < skip + count; f++) {
                // bits of the index beyond 32 go above the 16 bits of the layer
                megalodon_philox(words + 4 * f, mask.seed, mask.stream, mask.step,
                                 mask.layer + (uint32_t)((four + f) >> 32 << 16), (uint32_t)(four + f));
            }
            for (size_t i = 0; i < count; i++) out[at + i] = words[skip + i] >= limit ? inp[at + i] * scale : 0;
        }
    }
}

// ----------------------------------------------------------------------------
// TimestepNorm: group normalization over time. For each sequence and group, mean and variance are those of ALL scalars
// of the group's g = D/G features at ALL tokens up to and including t. These are n_t = g * (tokens so far) scalars:
//
//     y_t = (x_t - mean_t) rstd_t (weight + 1) + bias,    rstd_t = 1/sqrt(M2_t/n_t + eps)
//
// M2 is the sum of squared deviations from the mean.
//
// Why the statistics end at t: ordinary group normalization over a whole sequence would let token t see later tokens by
// their mean and variance, and the model could learn to read the answer from them. With running statistics nothing
// leaks, and training (all tokens at once) equals generation (one token at a time from the state).
//
// Why deviations: the textbook form, sum x^2 - n mean^2, subtracts two nearly equal numbers where the mean is large,
// and loses all digits of the variance. Chan's update only adds deviations from the mean so far. A token's g scalars
// are added to the moments through s1 = sum (x - mean) and s2 = sum (x - mean)^2:
//
//     mean += s1/n_t,    M2 += s2 - s1^2/n_t
//
// inp, out (B,L,D); mean, rstd (B,L,G). start, end: the state before the first token and after the last one. The kept
// mean is double: where it is 10,000 times the deviation, rounding it to float costs 5e-4 of the deviation.
// With numbers, step by step: dev/notes/timestep-norm.md.

// out NULL: only `end` is computed.
static void timestep_norm_forward(real *out, double *mean, real *rstd, NormState end, const real *inp,
                                  const real *weight, const real *bias, NormState start, Dims d, double eps) {
    int B = d.B, L = d.L, D = d.D, G = d.G, g = D / G;
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)B * L * D))
    for (int b = 0; b < B; b++) {
        for (int j = 0; j < G; j++) {
            const real *w = out ? weight + (size_t)j * g : NULL, *bs = out ? bias + (size_t)j * g : NULL;
            double m = start.mean ? start.mean[b * G + j] : 0, m2 = start.m2 ? start.m2[b * G + j] : 0;
            double n = start.count ? (double)g * (double)start.count[b] : 0;
            for (int t = 0; t < L; t++) {
                size_t row = (size_t)b * L + t;
                const real *x = inp + row * D + (size_t)j * g;
                double from = n > 0 ? m : x[0], s1 = 0, s2 = 0; // before the first token any value serves as mean
#pragma omp simd reduction(+ : s1, s2)
                for (int i = 0; i < g; i++) {
                    double deviation = x[i] - from;
                    s1 += deviation;
                    s2 += deviation * deviation;
                }
                n += g;
                m = from + s1 / n;
                m2 += s2 - s1 * s1 / n;
                if (!out) continue;
                real *y = out + row * D + (size_t)j * g;
                double r = 1 / sqrt(m2 / n + eps);
                for (int i = 0; i < g; i++) y[i] = (real)((x[i] - m) * r) * (w[i] + 1) + bs[i];
                mean[row * G + j] = m;
                rstd[row * G + j] = (real)r;
            }
            if (end.mean) end.mean[b * G + j] = m;
            if (end.m2) end.m2[b * G + j] = m2;
        }
    }
}

// forward: mean_t = 1/n_t sum_(s<=t) x_s,    var_t = 1/n_t sum_(s<=t) (x_s - mean_t)^2
// x_s is in the moments of every token t >= s: d mean_t/d x_s = 1/n_t and d var_t/d x_s = 2 (x_s - mean_t)/n_t. Summed
// over t these are three running sums, which grow from the last token to the first as the moments grow forward:
//
//     U_s = sum_(t>=s) dmean_t/n_t,    V_s = sum_(t>=s) dvar_t/n_t,    W_s = sum_(t>=s) dvar_t mean_t/n_t
//
// forward: y_t = (x_t - mean_t) rstd_t w + bias, with w = weight + 1
// gives dmean_t = -rstd_t sum_group w dy_t and dvar_t = -1/2 rstd_t^3 sum_group w dy_t (x_t - mean_t).
//
// The gradient w.r.t. a token is the sum of the path through its own y_s and of the paths through all later moments:
//
//     dx_s = rstd_s w dy_s + U_s + 2 (x_s V_s - W_s)
//          = rstd_s w dy_s + U_s - 2 (W_s - mean_s V_s) + 2 V_s (x_s - mean_s)
//
// If the mean is large, W_s and mean_s V_s are large and nearly equal. The last form subtracts them once for each
// token, not for each element.

// out (n) = sum of those residuals that are not NULL, from element `at` on. out may be part of one of them. The cases
// are separate loops: a vectorised `a ? a[i] : 0` would become a masked load, which is very slow where a is NULL.
static inline void residual_sum(real *out, const real *const residuals[2], size_t at, int n) {
    const real *a = residuals ? residuals[0] : NULL, *b = residuals ? residuals[1] : NULL;
    if (a && b) {
#pragma omp simd
        for (int i = 0; i < n; i++) out[i] = a[at + i] + b[at + i];
    } else if (a || b) {
        memmove(out, (a ? a : b) + at, (size_t)n * sizeof *out);
    } else {
        memset(out, 0, (size_t)n * sizeof *out);
    }
}

// dstate (B,G,3), or NULL for zeros: in: U, V, W of all later tokens; out: those from the first of these tokens on. The
// two residuals are gradients of other paths from x to the loss, and are added to dinp; each may be NULL. dinp may be
// one of them. dinp NULL: only dstate is computed.
static void timestep_norm_backward(real *dinp, real *dweight, real *dbias, double *dstate, const real *dout,
                                   const real *const residuals[2], const real *inp, const real *weight,
                                   const double *mean, const real *rstd, const int64_t *count, Dims d) {
    int B = d.B, L = d.L, D = d.D, G = d.G, g = D / G;
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)B * L * D))
    for (int b = 0; b < B; b++) {
        for (int j = 0; j < G; j++) {
            const real *w = weight + (size_t)j * g;
            double n = (count ? (double)g * (double)count[b] : 0) + (double)g * L, sums[3] = {0};
            if (dstate) memcpy(sums, dstate + 3 * ((size_t)b * G + j), sizeof sums);
            double U = sums[0], V = sums[1], W = sums[2];
            for (int t = L - 1; t >= 0; t--, n -= g) {
                size_t row = (size_t)b * L + t, at = row * D + (size_t)j * g;
                const real *x = inp + at, *dy = dout + at;
                double m = mean[row * G + j], r = rstd[row * G + j], s = 0, dot = 0;
#pragma omp simd reduction(+ : s, dot)
                for (int i = 0; i < g; i++) {
                    double wdy = (w[i] + 1) * dy[i];
                    s += wdy;
                    dot += wdy * (x[i] - m);
                }
                double dmean = -r * s, dvar = -0.5 * r * r * r * dot;
                U += dmean / n;
                V += dvar / n;
                W += dvar / n * m;
                if (!dinp) continue;
                real *dx = dinp + at;
                double shift = U - 2 * (W - m * V);
                residual_sum(dx, residuals, at, g);
                for (int i = 0; i < g; i++) dx[i] += (real)(r * (w[i] + 1) * dy[i] + shift + 2 * V * (x[i] - m));
            }
            sums[0] = U, sums[1] = V, sums[2] = W;
            if (dstate) memcpy(dstate + 3 * ((size_t)b * G + j), sums, sizeof sums);
        }
    }
    if (!dinp) return;
    sum_rows(dweight, dout, inp, mean, rstd, B * L, D, G);
    sum_rows(dbias, dout, NULL, NULL, NULL, B * L, D, 1);
}

// Chunk parallelism: several ranks have consecutive parts of one sequence. A rank reduces its part to moments of these
// tokens alone, an all-gather exchanges them, and each rank combines those of the ranks before it. Chan's formula for
// the moments (mean, M2) of n and (mean', M2') of n' scalars, with d = mean' - mean:
//
//     mean + d n'/(n + n'),    M2 + M2' + d^2 n n'/(n + n')

// sum.mean, sum.m2 (B,G) get the moments of these tokens alone.
static void timestep_norm_reduce(NormState sum, const real *inp, Dims d) {
    const NormState fresh = {NULL, NULL, NULL};
    timestep_norm_forward(NULL, NULL, NULL, sum, inp, NULL, NULL, fresh, d, 0);
}

// The same for the backward pass: dstate (B,G,3) gets U, V, W of these tokens alone.
static void timestep_norm_reduce_backward(double *dstate, const real *dout, const real *inp, const real *weight,
                                          const double *mean, const real *rstd, const int64_t *count, Dims d) {
    memset(dstate, 0, (size_t)d.B * d.G * 3 * sizeof *dstate);
    timestep_norm_backward(NULL, NULL, NULL, dstate, dout, NULL, inp, weight, mean, rstd, count, d);
}

// all (cp_size,2,B,G): every rank's moments. start.mean, start.m2 (B,G): in: the moments before the whole sequence;
// out: those before this rank. count (B), or NULL for zeros: tokens before the whole sequence. end.mean, end.m2, or
// NULL: get the moments after the last rank.
static void timestep_norm_combine(NormState start, NormState end, const double *all, const int64_t *count,
                                  const ChunkParallel *cp, Dims d) {
    size_t groups = (size_t)d.B * d.G;
    double g = d.D / d.G;
    for (size_t i = 0; i < groups; i++, all++) {
        double n = count ? g * (double)count[i / d.G] : 0, m = start.mean[i], m2 = start.m2[i];
        for (int k = 0; k < cp->cp_size; k++) {
            double more = g * (double)cp->lengths[k], delta = all[2 * k * groups] - m;
            if (k == cp->cp_rank) start.mean[i] = m, start.m2[i] = m2;
            m += delta * more / (n + more);
            m2 += all[(2 * k + 1) * groups] + delta * delta * n * more / (n + more);
            n += more;
        }
        if (end.mean) end.mean[i] = m, end.m2[i] = m2;
    }
}

// all (cp_size,B,G,3): every rank's U, V, W, which are sums over its tokens. dstate (B,G,3): in: those after the whole
// sequence; out: those after this rank. end (B,G,3), or NULL: gets those from the first token of the sequence on.
static void timestep_norm_combine_backward(double *dstate, double *end, const double *all, const ChunkParallel *cp,
                                           Dims d) {
    size_t n = (size_t)d.B * d.G * 3;
    for (size_t i = 0; i < n; i++) {
        double sum = dstate[i];
        for (int k = cp->cp_size - 1; k >= 0; k--) {
            if (k == cp->cp_rank) dstate[i] = sum;
            sum += all[k * n + i];
        }
        if (end) end[i] = sum;
    }
}

// ----------------------------------------------------------------------------
// CEMA, the complex exponential moving average. Each channel has N complex numbers h (modes) that decay and rotate:
//
//     phi_n = sigmoid(theta) 2 pi n/N,  n = 1..N          p_n = sigmoid(alpha_n)
//     q_n = (1 - sigmoid(alpha_n) sigmoid(delta_n)) e^(i phi_n)
//     h_t = q h_(t-1) + p x_t                             y_t = Re sum_n gamma_n/sqrt(N) h_t,n + omega x_t
//
// Unrolled, y is a convolution of x with the kernel k_j = Re sum_n gamma_n/sqrt(N) p_n q_n^j, which reaches back to the
// first token. |q| < 1 says how fast a mode forgets: after about 1/(1 - |q|) tokens. The angle says what it listens to:
// a real q sees only the mean of the recent past, while a mode that rotates by phi each token adds up what repeats with
// a period of 2 pi/phi tokens and cancels the rest, as one term of a Fourier transform does. N modes of different
// angles and decays are a small filter bank for each channel, and gamma says how to combine them.
//
// So h is all that a layer knows of tokens before the present chunk, apart from TimestepNorm's moments. Its size is
// fixed, and it summarises an unlimited past. Attention, afterwards, adds the exact content of the present chunk.
//
// In the paper's Eq. 2 the input has the factor e^(i phi), too, which the released code leaves out. Both are the same
// model: the released code with gamma is the paper with gamma e^(-i phi), since the factor is the same for all tokens.
// With numbers, step by step: dev/notes/cema.md.

static const double PI = 3.14159265358979323846;

enum { STRIP = 2 * LANES }; // channels of one task: two vectors, so that two chains of dependent products overlap

static size_t coeffs_stride(int D) { return (size_t)ceil_div(D, STRIP) * STRIP; }

// Coefficients from the parameters, once for each update. They are complex numbers kept as real and imaginary parts,
// each (N, coeffs_stride(D)). Channels are contiguous, since they are what is vectorised.
static void cema_coeffs_forward(Coeffs *c, const real *alpha, const real *delta, const real *theta, const real *gamma,
                                CemaKind kind, int D, int N) {
#pragma omp parallel for schedule(static) if (is_large(64.0 * D * N))
    for (int d = 0; d < D; d++) {
        for (int n = 0; n < N; n++) {
            size_t in = (size_t)d * N + n, out = (size_t)n * coeffs_stride(D) + d;
            double a = 1 / (1 + exp(-(double)alpha[in])), b = 1 / (1 + exp(-(double)delta[in]));
            double phi = kind == CEMA_REAL ? 0 : 2 * PI * (n + 1) / N / (1 + exp(-(double)theta[d]));
            c->p[out] = (real)a;
            c->q_re[out] = (real)((1 - a * b) * cos(phi));
            c->q_im[out] = (real)((1 - a * b) * sin(phi));
            c->g_re[out] = (real)(gamma[2 * in] / sqrt(N));
            c->g_im[out] = (real)(gamma[2 * in + 1] / sqrt(N));
        }
    }
}

// The gradient G of a complex number c is the complex number for which dL = Re(conj(G) dc) = G_re dc_re + G_im dc_im.
//
// forward: q = |q| e^(i phi), |q| = 1 - a b        dL/d|q| = Re(conj(G_q) e^(i phi)),    dL/dphi = Re(conj(G_q) i q)
// forward: p = a = sigmoid(alpha), b = sigmoid(delta)     dalpha = (dp - b d|q|) a (1 - a),  ddelta = -a d|q| b (1 - b)
// forward: phi_n = sigmoid(theta) 2 pi n/N         dtheta = sum_n dphi_n 2 pi n/N sigmoid'(theta)
// forward: g = gamma/sqrt(N)                       dgamma = G_g/sqrt(N)
static void cema_coeffs_backward(real *dalpha, real *ddelta, real *dtheta, real *dgamma, const Coeffs *dc,
                                 const real *alpha, const real *delta, const real *theta, CemaKind kind, int D, int N) {
#pragma omp parallel for schedule(static) if (is_large(64.0 * D * N))
    for (int d = 0; d < D; d++) {
        double angle = kind == CEMA_REAL ? 0 : 1 / (1 + exp(-(double)theta[d])), dangle = 0; // sigmoid(theta)
        for (int n = 0; n < N; n++) {
            size_t in = (size_t)d * N + n, out = (size_t)n * coeffs_stride(D) + d;
            double a = 1 / (1 + exp(-(double)alpha[in])), b = 1 / (1 + exp(-(double)delta[in]));
            double phi = 2 * PI * (n + 1) / N * angle, re = cos(phi), im = sin(phi);
            double dabs = dc->q_re[out] * re + dc->q_im[out] * im;
            double dphi = (1 - a * b) * (dc->q_im[out] * re - dc->q_re[out] * im);
            dalpha[in] += (real)((dc->p[out] - b * dabs) * a * (1 - a));
            ddelta[in] += (real)(-a * dabs * b * (1 - b));
            dangle += dphi * 2 * PI * (n + 1) / N;
            dgamma[2 * in] += (real)(dc->g_re[out] / sqrt(N));
            dgamma[2 * in + 1] += (real)(dc->g_im[out] / sqrt(N));
        }
        dtheta[d] += (real)(dangle * angle * (1 - angle));
    }
}

// A strip is STRIP neighbouring channels, `width` of which exist. These functions read, write or add to one row of it.
// Beyond the last channel zeros are read and nothing is written.
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

// A strip's coefficients of mode n.
typedef struct {
    vec p[2], q_re[2], q_im[2], g_re[2], g_im[2];
} StripCoeffs;
static StripCoeffs strip_coeffs(const Coeffs *c, int n, int D, int d0) {
    StripCoeffs s;
    size_t at = (size_t)n * coeffs_stride(D) + d0;
    memcpy(s.p, c->p + at, sizeof s.p);
    memcpy(s.q_re, c->q_re + at, sizeof s.p);
    memcpy(s.q_im, c->q_im + at, sizeof s.p);
    memcpy(s.g_re, c->g_re + at, sizeof s.p);
    memcpy(s.g_im, c->g_im + at, sizeof s.p);
    return s;
}

#include "kernels/cema_cpu.h"

// The recurrence, token by token. A task owns a strip of channels of one sequence. It goes through token blocks of
// CEMA_BLOCK tokens, and within a token block mode by mode, so that h stays in registers. inp, out (B,L,D).
// h_blocks (B, blocks, 2, N, D): h before each token block, for the backward pass. h_in, h_out (B,2,N,D): the state
// before the first token and after the last one, N real parts before N imaginary parts. h_blocks and h_out may be NULL:
// not kept; h_in may be NULL: zero. h_in may be h_out.
static void cema_forward(real *out, real *h_blocks, real *h_out, const real *inp, const Coeffs *coeffs,
                         const real *omega, const real *h_in, Dims d) {
    int B = d.B, L = d.L, D = d.D, N = d.N, blocks = ceil_div(L, CEMA_BLOCK);
    if (L == 1 && h_in && h_in == h_out && !h_blocks) { // decoding
        cema_token(&(CemaToken){out, h_out, inp, omega, coeffs, B, D, N});
        return;
    }
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)B * L * D * N))
    for (int b = 0; b < B; b++) {
        for (int d0 = 0; d0 < D; d0 += STRIP) {
            int width = min(STRIP, D - d0);
            vec h[2 * N][2], x[CEMA_BLOCK][2], y[CEMA_BLOCK][2], om[2];
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
                            // h = q h + p x,    y += Re(g h)
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

// forward: h_t = q h_(t-1) + p x_t,    y_t = Re(g h_t) + omega x_t,    with g = gamma/sqrt(N)
// h_t reaches the loss by y_t and by h_(t+1), so its gradient G follows the same recurrence, run from the last token to
// the first with the conjugate coefficients:
//
//     G_t = conj(g) dy_t + conj(q) G_(t+1)            dx_t = omega dy_t + sum_n p Re G_t
//     dg = sum dy conj(h_t)    dq = sum G_t conj(h_(t-1))    dp = sum x Re G_t    domega = sum x dy
//
// The h of a token block are computed again from the one kept at its start: storing all of them would take 2 N times
// the memory of x. A task owns a strip of channels of all sequences, so no two tasks add to the same parameter. dcoeffs
// is set. dh (B,2,N,D), or NULL: in: gradient w.r.t. the outgoing state; out: w.r.t. the incoming one, conj(q) G_1.
static void cema_backward(real *dinp, Coeffs *dcoeffs, real *domega, real *dh, const real *dout, const real *inp,
                          const real *h_blocks, const Coeffs *coeffs, const real *omega, Dims d) {
    int B = d.B, L = d.L, D = d.D, N = d.N, blocks = ceil_div(L, CEMA_BLOCK);
#pragma omp parallel for schedule(static) if (is_large((double)B * L * D * N))
    for (int d0 = 0; d0 < D; d0 += STRIP) {
        int width = min(STRIP, D - d0);
        vec x[CEMA_BLOCK][2], dy[CEMA_BLOCK][2], dx[CEMA_BLOCK][2];
        vec h_re[CEMA_BLOCK + 1][2], h_im[CEMA_BLOCK + 1][2]; // of one mode; [t] is before token t
        vec later[2 * N][2];                                  // conj(q) G_(t+1): what later tokens contribute to G_t
        StripCoeffs grad[N];
        vec om[2], dom[2] = {0};
        memset(grad, 0, sizeof grad);
        strip_read(om, omega + d0, width);
        for (int b = 0; b < B; b++) {
            memset(later, 0, sizeof later);
            for (int i = 0; dh && i < 2 * N; i++) strip_read(later[i], dh + ((size_t)b * 2 * N + i) * D + d0, width);
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
                    StripCoeffs c = strip_coeffs(coeffs, n, D, d0), s = {0}; // s: sums of this token block
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
                        vec l_re = later[n][u], l_im = later[N + n][u];
                        for (int t = T - 1; t >= 0; t--) {
                            vec G_re = c.g_re[u] * dy[t][u] + l_re, G_im = l_im - c.g_im[u] * dy[t][u];
                            dx[t][u] += c.p[u] * G_re;
                            s.p[u] += x[t][u] * G_re;
                            s.q_re[u] += G_re * h_re[t][u] + G_im * h_im[t][u];
                            s.q_im[u] += G_im * h_re[t][u] - G_re * h_im[t][u];
                            s.g_re[u] += dy[t][u] * h_re[t + 1][u];
                            s.g_im[u] -= dy[t][u] * h_im[t + 1][u];
                            l_re = c.q_re[u] * G_re + c.q_im[u] * G_im;
                            l_im = c.q_re[u] * G_im - c.q_im[u] * G_re;
                        }
                        later[n][u] = l_re, later[N + n][u] = l_im;
                        grad[n].p[u] += s.p[u];
                        grad[n].q_re[u] += s.q_re[u], grad[n].q_im[u] += s.q_im[u];
                        grad[n].g_re[u] += s.g_re[u], grad[n].g_im[u] += s.g_im[u];
                    }
                }
                for (int t = 0; t < T; t++) strip_write(dinp + ((size_t)b * L + t0 + t) * D + d0, dx[t], width);
            }
            for (int i = 0; dh && i < 2 * N; i++) strip_write(dh + ((size_t)b * 2 * N + i) * D + d0, later[i], width);
        }
        for (int n = 0; n < N; n++) {
            size_t at = (size_t)n * coeffs_stride(D) + d0;
            strip_write(dcoeffs->p + at, grad[n].p, STRIP);
            strip_write(dcoeffs->q_re + at, grad[n].q_re, STRIP);
            strip_write(dcoeffs->q_im + at, grad[n].q_im, STRIP);
            strip_write(dcoeffs->g_re + at, grad[n].g_re, STRIP);
            strip_write(dcoeffs->g_im + at, grad[n].g_im, STRIP);
        }
        strip_add(domega + d0, dom, width);
    }
}

// Chunk parallelism. The recurrence is linear, so a part of l tokens maps the state before it to the state after it by
//
//     h_after = q^l h_before + h_alone,    h_alone: the state after the part if h_before is zero
//
// and backward dh_before = conj(q)^l dh_after + dh_alone. So each rank reduces its part to one h, and combines those of
// the other ranks by the same recurrence, with q^l instead of q.

// h (B,2,N,D) gets the result of these tokens alone. Forward: h_alone, from inp (B,L,D). Backward, with inp = dout:
// dh_alone = sum_(t>=1) conj(q)^t conj(g) dy_t, summed from the last token to the first.
static void cema_reduce(real *h, const real *inp, const Coeffs *coeffs, int backward, Dims d) {
    int B = d.B, L = d.L, D = d.D, N = d.N;
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
                        vec in_re = c.p[u], in_im = {0}; // factor of x: p, or backward conj(q g)
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

// all (cp_size,B,2,N,D): every rank's cema_reduce. h (B,2,N,D): in: the state before the whole sequence (backward: the
// gradient w.r.t. the state after it); out: the state before this rank (backward: the gradient w.r.t. that after it).
// end (B,2,N,D), or NULL, receives the state after the last rank (backward: the gradient w.r.t. that before the first).
static void cema_combine(real *h, real *end, const real *all, const Coeffs *coeffs, int backward,
                         const ChunkParallel *cp, Dims d) {
    int B = d.B, D = d.D, N = d.N, size = cp->cp_size;
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)size * B * D * N))
    for (int n = 0; n < N; n++) {
        for (int c = 0; c < D; c++) {
            size_t at = (size_t)n * coeffs_stride(D) + c;
            double complex q = coeffs->q_re[at] + coeffs->q_im[at] * I, decay = 1;
            int64_t length = 0; // decay is q^length
            if (backward) q = conj(q);
            for (int b = 0; b < B; b++) {
                size_t re = ((size_t)b * 2 * N + n) * D + c, im = re + (size_t)N * D;
                double complex sum = h[re] + h[im] * I;
                for (int i = 0; i < size; i++) {
                    int k = backward ? size - 1 - i : i;
                    const real *alone = all + (size_t)k * B * 2 * N * D;
                    if (k == cp->cp_rank) h[re] = (real)creal(sum), h[im] = (real)cimag(sum);
                    if (cp->lengths[k] != length) decay = power(q, length = cp->lengths[k]);
                    sum = decay * sum + alone[re] + alone[im] * I;
                }
                if (end) end[re] = (real)creal(sum), end[im] = (real)cimag(sum);
            }
        }
    }
}

// ----------------------------------------------------------------------------
// RMSNorm: y = x rstd (weight + 1), rstd = 1/sqrt(mean(x^2) + eps), over the D elements of a row. inp, out (R,D); rstd
// (R); weight (D), or NULL: no scale. Squares are summed in double, and x is multiplied with rstd before anything else:
// neither overflows while x itself does not.

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

// a (D) = dy (weight + 1), the gradient w.r.t. the normalized row n in y = n (weight + 1). weight NULL: a = dy.
static inline void normalized_gradient(real *a, const real *dy, const real *weight, int D) {
    if (!weight) {
        memcpy(a, dy, (size_t)D * sizeof *a);
        return;
    }
#pragma omp simd
    for (int c = 0; c < D; c++) a[c] = dy[c] * (weight[c] + 1);
}

// forward: y_c = n_c (weight_c + 1), n_c = x_c rstd, d rstd/d x_c = -rstd^2 n_c/D
// Let a = (weight + 1) dy, the gradient w.r.t. n. x_c reaches the loss by n_c, and by rstd in every n of the row:
// dx = rstd (a - n mean(a n)). The second term removes the component of a along x: y does not change with x's length.
static void rmsnorm_backward(real *dinp, real *dweight, const real *dout, const real *inp, const real *weight,
                             const real *rstd, int R, int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        const real *x = inp + (size_t)r * D, *dy = dout + (size_t)r * D;
        real *a = dinp + (size_t)r * D, *dx = a, s = rstd[r], dot = 0; // a is kept where dx will be
        normalized_gradient(a, dy, weight, D);
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < D; c++) dot += a[c] * (x[c] * s);
        dot /= D;
#pragma omp simd
        for (int c = 0; c < D; c++) dx[c] = s * (a[c] - x[c] * s * dot);
    }
    if (dweight) sum_rows(dweight, dout, inp, NULL, rstd, R, D, 1);
}

// ----------------------------------------------------------------------------
// linear: out (R,M) = inp (R,K) weight' + bias + residual; weight (M,K); bias (M), or NULL; residual (R,M), or NULL,
// may be out itself. matmul() is in kernels/matmul_cpu.h.

static void linear_forward(real *out, const real *residual, const real *inp, const real *weight, const real *bias,
                           int R, int K, int M) {
    matmul(out, M, residual, matrix(inp, K), transposed(weight, K), bias, R, M, K);
}

// forward: out = inp weight' + bias
// A product's derivative is two products: dinp = dout weight, dweight = dout' inp. dbias = sum over rows of dout.

// dinp (R,K) is set, or added to if `add`.
static void linear_backward_input(real *dinp, int add, const real *dout, const real *weight, int R, int K, int M) {
    matmul(dinp, K, add ? dinp : NULL, matrix(dout, M), matrix(weight, K), NULL, R, K, M);
}

static void linear_backward_weight(real *dweight, real *dbias, const real *dout, const real *inp, int R, int K, int M) {
    matmul(dweight, K, dweight, transposed(dout, M), matrix(inp, K), NULL, M, K, R);
    if (dbias) sum_rows(dbias, dout, NULL, NULL, NULL, R, M, 1);
}

static void linear_backward(real *dinp, int add, real *dweight, real *dbias, const real *dout, const real *inp,
                            const real *weight, int R, int K, int M) {
    linear_backward_input(dinp, add, dout, weight, R, K, M);
    linear_backward_weight(dweight, dbias, dout, inp, R, K, M);
}

// ----------------------------------------------------------------------------
// queries and keys: two affine functions of the same zn (R,Z), which is z after RMSNorm of every head
//
//     q = zn (gamma0 + 1)/sqrt(dz) + beta0,    k = zn (gamma1 + 1)/sqrt(dz) + beta1;    gamma, beta (2,Z)
//
// RMSNorm makes each head's vector sqrt(dz) long, so zn/sqrt(dz) has length 1, as Z/|Z| in the paper. Without gamma and
// beta a score would be the cosine of the angle between two such vectors, whatever the size of the activations. gamma
// lets the model learn the temperature of the softmax. That is why both carry 1/sqrt(dz), and the scores have no scale.
// (With standard attention zn is z itself, and dz below is the number that key_width() returns.)

static void qk_forward(real *q, real *k, const real *zn, const real *gamma, const real *beta, int R, int Z, double dz) {
    real scale = (real)(1 / sqrt(dz));
#pragma omp parallel for schedule(static) if (is_large((double)R * Z))
    for (int r = 0; r < R; r++) {
        size_t at = (size_t)r * Z;
#pragma omp simd
        for (int c = 0; c < Z; c++) {
            q[at + c] = zn[at + c] * (gamma[c] + 1) * scale + beta[c];
            k[at + c] = zn[at + c] * (gamma[Z + c] + 1) * scale + beta[Z + c];
        }
    }
}

// forward: q = zn (gamma0 + 1) scale + beta0, and k with row 1
// dgamma0 = sum over rows of dq zn scale, dbeta0 = sum over rows of dq; zn has two uses, so
// dzn = (dq (gamma0 + 1) + dk (gamma1 + 1)) scale. dzn may be dq or dk, since the sums are computed first.
static void qk_backward(real *dzn, real *dgamma, real *dbeta, const real *dq, const real *dk, const real *zn,
                        const real *gamma, int R, int Z, double dz) {
    real scale = (real)(1 / sqrt(dz));
#pragma omp parallel for schedule(static) if (is_large((double)R * Z))
    for (int c0 = 0; c0 < Z; c0 += COLUMNS) {
        int width = min(COLUMNS, Z - c0);
        double sum[4][COLUMNS] = {0};
        for (size_t at = (size_t)c0; at < (size_t)R * Z; at += (size_t)Z) {
            for (int c = 0; c < width; c++) {
                sum[0][c] += dq[at + c] * zn[at + c], sum[1][c] += dk[at + c] * zn[at + c];
                sum[2][c] += dq[at + c], sum[3][c] += dk[at + c];
            }
        }
        for (int c = 0; c < width; c++) {
            dgamma[c0 + c] += (real)sum[0][c] * scale, dgamma[Z + c0 + c] += (real)sum[1][c] * scale;
            dbeta[c0 + c] += (real)sum[2][c], dbeta[Z + c0 + c] += (real)sum[3][c];
        }
    }
#pragma omp parallel for schedule(static) if (is_large((double)R * Z))
    for (int r = 0; r < R; r++) {
        size_t at = (size_t)r * Z;
#pragma omp simd
        for (int c = 0; c < Z; c++) {
            dzn[at + c] = (dq[at + c] * (gamma[c] + 1) + dk[at + c] * (gamma[Z + c] + 1)) * scale;
        }
    }
}

// ----------------------------------------------------------------------------
// rotary embedding: in each head the pair (2j, 2j+1), taken as a complex number, is rotated by
//
//     e^(i pos base^(-2j/dz)),    pos counted from the start of the chunk
//
// The dot product of a rotated query and a rotated key depends on the difference of their positions only. Counting from
// the chunk's start is enough, since attention never leaves the chunk. So positions stay below C in any sequence.
// inp, out (B,L,Z), out may be inp; table (C, dz/2, 2): cos and sin; count (B), or NULL for zeros: tokens before these.

static void rope_table(real *table, int C, int dz, double base) {
    for (int pos = 0; pos < C; pos++) {
        for (int j = 0; j < dz / 2; j++, table += 2) {
            double angle = pos * pow(base, -2.0 * j / dz);
            table[0] = (real)cos(angle), table[1] = (real)sin(angle);
        }
    }
}

// sign 1: rotates by the angles; -1: by the opposite angles.
static void rope_rotate(real *out, const real *inp, const real *table, const int64_t *count, int sign, Dims d) {
    int B = d.B, L = d.L, Z = d.Z, dz = d.Z / d.H;
#pragma omp parallel for collapse(2) schedule(static) if (is_large((double)B * L * Z))
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < L; t++) {
            int pos = (int)(((count ? count[b] : 0) + t) % d.C);
            const real *x = inp + ((size_t)b * L + t) * Z;
            real *y = out + ((size_t)b * L + t) * Z;
            for (int c = 0; c < Z; c += 2) {
                const real *angle = table + (size_t)pos * dz + c % dz;
                real re = x[c], im = x[c + 1], s = sign * angle[1];
                y[c] = re * angle[0] - im * s;
                y[c + 1] = re * s + im * angle[0];
            }
        }
    }
}

static void rope_forward(real *out, const real *inp, const real *table, const int64_t *count, Dims d) {
    rope_rotate(out, inp, table, count, 1, d);
}

// forward: y = M x, with a rotation matrix M. dx = M' dy, and M' is the rotation by the opposite angle.
static void rope_backward(real *dinp, const real *dout, const real *table, const int64_t *count, Dims d) {
    rope_rotate(dinp, dout, table, count, -1, d);
}

// ----------------------------------------------------------------------------
// from z to rotated queries and keys: RMSNorm of every head, qk, rotary embedding. The results are cheap to compute but
// large, so they are not kept: the backward pass computes them again from z.
// q, k, zn, z (B,L,Z); z_rstd (B,L,H); table NULL: no rotation.

static void qk_layer_forward(real *q, real *k, real *zn, real *z_rstd, const real *z, const real *gamma,
                             const real *beta, const real *table, const int64_t *count, Dims d, double eps) {
    int R = d.B * d.L, head = d.Z / d.H, standard = d.attention == ATTENTION_STANDARD; // then z has no norm
    if (!standard) rmsnorm_forward(zn, z_rstd, z, NULL, R * d.H, head, eps);
    qk_forward(q, k, standard ? z : zn, gamma, beta, R, d.Z, key_width(d));
    if (!table) return;
    rope_forward(q, q, table, count, d);
    rope_forward(k, k, table, count, d);
}

// The same three steps in reverse order. dq and dk are overwritten. dz must not be dq or dk.
static void qk_layer_backward(real *dz, real *dgamma, real *dbeta, real *dq, real *dk, const real *zn,
                              const real *z_rstd, const real *z, const real *gamma, const real *table, Dims d) {
    int R = d.B * d.L, head = d.Z / d.H, standard = d.attention == ATTENTION_STANDARD;
    if (table) {
        rope_backward(dq, dq, table, NULL, d);
        rope_backward(dk, dk, table, NULL, d);
    }
    real *dzn = standard ? dz : dq;
    qk_backward(dzn, dgamma, dbeta, dq, dk, standard ? z : zn, gamma, R, d.Z, key_width(d));
    if (!standard) rmsnorm_backward(dz, NULL, dzn, z, NULL, z_rstd, R * d.H, head);
}

// ----------------------------------------------------------------------------
// silu(x) = x sigmoid(x), and the gate out = a silu(b). The attention sub-layer gates o with b = r_pre, swiglu gates f3
// with b = f1.

// exp(x). The library's expf keeps a loop from being vectorised, so float has its own: e^x = 2^n e^r with |r| <=
// ln(2)/2, and e^r by its series. Relative error below 2e-7. Above the range of float the result is infinity. Below the
// smallest normal number it is 0, since denormal numbers are a hundred times slower on some processors. NaN stays NaN.
// Clamping x instead, say to -64, would be wrong: -1e30 sigmoid(-1e30) is 0, but -1e30 e^-64 is -160.
#ifdef MEGALODON_DOUBLE
static inline real exp_real(real x) { return exp(x); }
#else
static inline real exp_real(real x) {
    float shifted = x * 1.44269504f + 12582912.0f; // 1.5 * 2^23: the last bits of the sum are n, rounded
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

// A bare `if` in the pragmas below would also apply to `simd`.
static void silu_forward(real *out, const real *inp, size_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
    for (size_t i = 0; i < n; i++) out[i] = inp[i] * sigmoid(inp[i]);
}

// forward: y = x s, s = sigmoid(x), s' = s (1 - s). So dx = dy (s + x s (1 - s)) = dy s (1 + x (1 - s)).
// out, or NULL, gets the forward pass again. dinp may be dout.
static void silu_backward(real *out, real *dinp, const real *dout, const real *inp, size_t n) {
    if (out) silu_forward(out, inp, n);
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
    for (size_t i = 0; i < n; i++) {
        real s = sigmoid(inp[i]);
        dinp[i] = dout[i] * (s * (1 + inp[i] * (1 - s)));
    }
}

// sigmoid(b) is multiplied with b first: a b would overflow where sigmoid(b) is 0.
static void gate_forward(real *out, const real *a, const real *b, size_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
    for (size_t i = 0; i < n; i++) out[i] = a[i] * (b[i] * sigmoid(b[i]));
}

// forward: y = a silu(b). So da = dy silu(b), db = dy a silu'(b). out, or NULL, gets y again. da may be dout.
static void gate_backward(real *out, real *da, real *db, const real *dout, const real *a, const real *b, size_t n) {
    if (out) gate_forward(out, a, b, n);
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
    for (size_t i = 0; i < n; i++) {
        real s = sigmoid(b[i]), dy = dout[i];
        db[i] = dy * (a[i] * (s * (1 + b[i] * (1 - s))));
        da[i] = dy * (b[i] * s);
    }
}

// ----------------------------------------------------------------------------
// a linear map together with the silu or gate next to it, which one kernel of a GPU computes at once

// pre = inp W' + bias, out = silu(pre); inp (R,K), pre, out (R,M)
static void linear_silu_forward(real *out, real *pre, const real *inp, const real *weight, const real *bias, int R,
                                int K, int M) {
    linear_forward(pre, NULL, inp, weight, bias, R, K, M);
    silu_forward(out, pre, (size_t)R * M);
}

// forward: y = out W',    out = dropout(silu(pre));    out, pre (R,K), y (R,M)
// dpre from dy, and out again, which the gradient w.r.t. W needs.
static void linear_silu_backward(real *out, real *dpre, const real *dy, const real *weight, const real *pre, Mask mask,
                                 int R, int K, int M) {
    linear_backward_input(dpre, 0, dy, weight, R, K, M);
    dropout(dpre, dpre, mask, (size_t)R * K);
    silu_backward(out, dpre, dpre, pre, (size_t)R * K);
    dropout(out, out, mask, (size_t)R * K);
}

// forward: y = out W',    out = dropout(a silu(b));    out, a, b (R,K), y (R,M)
// da and db from dy, out again, and dbias (K) += sum over rows of db; dbias NULL: no bias in b.
static void linear_gate_backward(real *out, real *da, real *db, real *dbias, const real *dy, const real *weight,
                                 const real *a, const real *b, Mask mask, int R, int K, int M) {
    linear_backward_input(da, 0, dy, weight, R, K, M);
    dropout(da, da, mask, (size_t)R * K);
    gate_backward(out, da, db, da, a, b, (size_t)R * K);
    dropout(out, out, mask, (size_t)R * K);
    if (dbias) sum_rows(dbias, db, NULL, NULL, NULL, R, K, 1);
}

// forward: out = silu(pre), pre = .. + bias;    dpre from dout, which may be dpre, and dbias (D) += sum over rows of dpre
static void silu_bias_backward(real *dpre, real *dbias, const real *dout, const real *pre, int R, int D) {
    silu_backward(NULL, dpre, dout, pre, (size_t)R * D);
    sum_rows(dbias, dpre, NULL, NULL, NULL, R, D, 1);
}

// ----------------------------------------------------------------------------
// attention inside a chunk. Query i of a head sees the keys j <= i of its chunk:
//
//     S_ij = q_i . k_j        P_ij = e^(S_ij)/sum_j e^(S_ij)        o_i = sum_j P_ij v_j
//
// The sequence is cut into chunks of C tokens, and a token sees nothing outside of its own, so the cost grows with L C
// and not with L^2. What was before the chunk is in q, k and v themselves: they are computed from CEMA's and
// TimestepNorm's output. A query can therefore find any token of its chunk exactly, and knows a summary of all the
// tokens before. What it finds reaches later chunks through the CEMA of the next layer.
//
// QUERY_TILE rows of S are computed at once, against the keys up to the last of them, so few scores above the diagonal
// are computed. Of P only lse_i = log sum_j e^(S_ij) is kept, from which the backward pass computes P again.
// With numbers, step by step: dev/notes/attention.md.

// One head in one chunk: nq queries, which are the last nq of nk positions. q, k, v point to the head's part of the
// first query, key and value. Rows of q and k are Z elements apart, of v and o E, of lse H.
typedef struct {
    const real *q, *k, *v;
    int nq, nk;
    Mask mask; // dropout of P, from the first query on; C elements apart from query to query
} QueryTile;

// scores (QUERY_TILE, nk) is scratch.
static void attention_chunk_forward(real *o, real *lse, real *scores, const QueryTile *tile, Dims d) {
    int nq = tile->nq, nk = tile->nk, key_dim = d.Z / d.H, value_dim = d.E / d.H;
    matmul(scores, nk, NULL, matrix(tile->q, d.Z), transposed(tile->k, d.Z), NULL, nq, nk, key_dim);
#pragma omp parallel for schedule(static) if (is_large((double)nq * nk))
    for (int i = 0; i < nq; i++) {
        real *s = scores + (size_t)i * nk, largest = -INFINITY, sum = 0, overflow = 0;
        int seen = nk - nq + i + 1; // keys at or before this query
#pragma omp simd reduction(max : largest)
        for (int j = 0; j < seen; j++) largest = s[j] > largest ? s[j] : largest;
#pragma omp simd reduction(+ : sum, overflow)
        for (int j = 0; j < seen; j++) {
            overflow += s[j] - s[j]; // NaN if s is infinite: -infinity would pass for a probability of 0
            s[j] = exp_real(s[j] - largest);
            sum += s[j];
        }
        sum += overflow;
        for (int j = 0; j < seen; j++) s[j] /= sum;
        for (int j = seen; j < nk; j++) s[j] = 0;
        lse[(size_t)i * d.H] = largest + (real)log(sum);
        dropout(s, s, mask_row(tile->mask, i, d.C), (size_t)seen);
    }
    matmul(o, d.E, NULL, matrix(scores, nk), matrix(tile->v, d.E), NULL, nq, value_dim, nk);
}

// forward: o_i = sum_j P_ij v_j        gives dP_ij = do_i . v_j,    dv_j = sum_i P_ij do_i
// forward: P_ij = e^(S_ij - lse_i)     gives dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij), since lse_i has all S_ij in it
// forward: S_ij = q_i . k_j            gives dq_i = sum_j dS_ij k_j,    dk_j = sum_i dS_ij q_i
//
// With dropout, o = (mask P) v: dv is computed from mask P, and dP is multiplied by the mask. P is computed again from
// lse_i, which is rounded: at S = 1e8 its error is up to 4. So P is divided by its sum once more. dq is set; dk and dv
// are set, or added to if `add`. scores, dscores (QUERY_TILE, nk) are scratch.
static void attention_chunk_backward(real *dq, real *dk, real *dv, real *scores, real *dscores, int add,
                                     const real *dout, const real *lse, const QueryTile *tile, Dims d) {
    int nq = tile->nq, nk = tile->nk, key_dim = d.Z / d.H, value_dim = d.E / d.H;
    matmul(scores, nk, NULL, matrix(tile->q, d.Z), transposed(tile->k, d.Z), NULL, nq, nk, key_dim);
    matmul(dscores, nk, NULL, matrix(dout, d.E), transposed(tile->v, d.E), NULL, nq, nk, value_dim);
#pragma omp parallel for schedule(static) if (is_large((double)nq * nk))
    for (int i = 0; i < nq; i++) {
        real *s = scores + (size_t)i * nk, *ds = dscores + (size_t)i * nk, l = lse[(size_t)i * d.H], sum = 0, dot = 0;
        int seen = nk - nq + i + 1;
        dropout(ds, ds, mask_row(tile->mask, i, d.C), (size_t)seen);
#pragma omp simd reduction(+ : sum, dot)
        for (int j = 0; j < seen; j++) {
            s[j] = exp_real(s[j] - l);
            sum += s[j];
            dot += s[j] * ds[j];
        }
        dot /= sum;
#pragma omp simd
        for (int j = 0; j < seen; j++) {
            s[j] /= sum;
            ds[j] = s[j] * (ds[j] - dot);
        }
        for (int j = seen; j < nk; j++) s[j] = ds[j] = 0;
        dropout(s, s, mask_row(tile->mask, i, d.C), (size_t)seen);
    }
    matmul(dq, d.Z, NULL, matrix(dscores, nk), matrix(tile->k, d.Z), NULL, nq, key_dim, nk);
    matmul(dk, d.Z, add ? dk : NULL, transposed(dscores, nk), matrix(tile->q, d.Z), NULL, nk, key_dim, nq);
    matmul(dv, d.E, add ? dv : NULL, transposed(scores, nk), matrix(dout, d.E), NULL, nk, value_dim, nq);
}

// Copies the keys and values of n tokens of row b, from token t on, into the cache, from position `at` on.
static void cache_chunk(real *cache_k, real *cache_v, const real *k, const real *v, int b, int t, int at, int n,
                        Dims d) {
    size_t from = (size_t)b * d.L + t, to = (size_t)b * d.C + at;
    memcpy(cache_k + to * d.Z, k + from * d.Z, (size_t)n * d.Z * sizeof *k);
    memcpy(cache_v + to * d.E, v + from * d.E, (size_t)n * d.E * sizeof *v);
}

// The mask of head h of row b, from its query t on.
static Mask mask_query(Mask mask, int b, int h, int t, Dims d) {
    mask.first += ((uint64_t)b * d.H + h) * mask.row + (uint64_t)t * d.C;
    return mask;
}

// All heads and chunks. q, k (B,L,Z) are rotated; v, o (B,L,E); lse (B,L,H). past (B), or NULL for zeros: number of
// tokens that the first chunk had before this call. Their keys and values are in cache_k (B,C,Z) and cache_v (B,C,E).
// The keys and values of the chunk that this call leaves unfinished are written there. Caches are NULL without a state.
//
// A task is a query tile of one head. Where there are fewer tasks than threads, the threads share each product instead.
// scores (threads, QUERY_TILE, C) is scratch, for the backward pass twice that.
static void attention_forward(real *o, real *lse, real *cache_k, real *cache_v, real *scores, const real *q,
                              const real *k, const real *v, const int *past, Mask mask, Dims d, int threads) {
    int B = d.B, L = d.L, C = d.C, H = d.H, tiles = ceil_div(min(C, L), QUERY_TILE);
    int chunks = past ? ceil_div(L - 1, C) + 1 : ceil_div(L, C); // chunks that L tokens may touch
    int shared = B * chunks * H * tiles >= threads && is_large((double)B * L * C * (d.Z + d.E) / 16);
    (void)threads, (void)shared; // without OpenMP
    for (int b = 0; cache_k && past && b < B; b++) {
        if (past[b] > 0) cache_chunk(cache_k, cache_v, k, v, b, 0, past[b], min(C - past[b], L), d);
    }
#pragma omp parallel for collapse(4) schedule(dynamic) num_threads(threads) if (shared)
    for (int b = 0; b < B; b++) {
        for (int chunk = 0; chunk < chunks; chunk++) {
            for (int h = 0; h < H; h++) {
                for (int i = 0; i < tiles; i++) {
                    int before = past ? past[b] : 0, cached = before > 0 && chunk == 0;
                    int from = max(chunk * C - before, 0), end = min((chunk + 1) * C - before, L); // of the chunk here
                    int t = from + i * QUERY_TILE, nq = min(QUERY_TILE, end - t);
                    if (nq <= 0) continue;
                    size_t query = (size_t)b * L + t, key = (size_t)b * L + from, cache = (size_t)b * C;
                    int z = h * (d.Z / H), e = h * (d.E / H); // the head's first columns
                    QueryTile tile = {.q = q + query * d.Z + z,
                                      .k = (cached ? cache_k + cache * d.Z : k + key * d.Z) + z,
                                      .v = (cached ? cache_v + cache * d.E : v + key * d.E) + e,
                                      .nq = nq,
                                      .nk = (cached ? before : 0) + t - from + nq,
                                      .mask = mask_query(mask, b, h, t, d)};
                    attention_chunk_forward(o + query * d.E + e, lse + query * H + h,
                                            scores + (size_t)thread_number() * QUERY_TILE * C, &tile, d);
                }
            }
        }
    }
    for (int b = 0; cache_k && b < B; b++) {
        int before = past ? past[b] : 0, left = (before + L) % C; // tokens of the last chunk, if it stays unfinished
        if (before == 0 || before + L > C) cache_chunk(cache_k, cache_v, k, v, b, L - left, 0, left, d);
    }
}

// Every row must have begun at the start of a chunk. A task is a head in a chunk: dk and dv sum over its query tiles.
static void attention_backward(real *dq, real *dk, real *dv, real *scores, const real *dout, const real *lse,
                               const real *q, const real *k, const real *v, Mask mask, Dims d, int threads) {
    int B = d.B, L = d.L, C = d.C, H = d.H;
    int shared = B * ceil_div(L, C) * H >= threads && is_large((double)B * L * C * (d.Z + d.E) / 16);
    real *dscores = scores + (size_t)threads * QUERY_TILE * C;
    (void)shared;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads) if (shared)
    for (int b = 0; b < B; b++) {
        for (int t0 = 0; t0 < L; t0 += C) {
            for (int h = 0; h < H; h++) {
                size_t row = (size_t)b * L + t0, z = row * d.Z + h * (d.Z / H), e = row * d.E + h * (d.E / H);
                size_t scratch = (size_t)thread_number() * QUERY_TILE * C;
                int n = min(C, L - t0), last = (n - 1) / QUERY_TILE * QUERY_TILE;
                for (int i = last; i >= 0; i -= QUERY_TILE) { // the last tile sees all keys: it sets dk and dv
                    int nq = min(QUERY_TILE, n - i);
                    size_t zi = z + (size_t)i * d.Z, ei = e + (size_t)i * d.E;
                    QueryTile tile = {q + zi, k + z, v + e, nq, i + nq, mask_query(mask, b, h, t0 + i, d)};
                    attention_chunk_backward(dq + zi, dk + z, dv + e, scores + scratch, dscores + scratch, i < last,
                                             dout + ei, lse + (row + i) * H + h, &tile, d);
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------
// LayerNorm: y = (x - mean) rstd (weight + 1) + bias over the D elements of a row. inp, out (R,D); mean, rstd (R);
// weight, bias (D), or NULL: neither. Sums and mean are double, as in TimestepNorm and RMSNorm.

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

// forward: y = n (weight + 1) + bias, n = (x - mean) rstd
// As for RMSNorm, with a = (weight + 1) dy. The mean depends on each x_c, too: this subtracts the mean of a from the
// gradient. dx = rstd (a - mean(a) - n mean(a n)).
static void layernorm_backward(real *dinp, real *dweight, real *dbias, const real *dout, const real *inp,
                               const real *weight, const double *mean, const real *rstd, int R, int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        const real *x = inp + (size_t)r * D, *dy = dout + (size_t)r * D;
        real *a = dinp + (size_t)r * D, *dx = a, sum = 0, dot = 0; // a is kept where dx will be
        double m = mean[r], s = rstd[r];
        normalized_gradient(a, dy, weight, D);
#pragma omp simd reduction(+ : sum, dot)
        for (int c = 0; c < D; c++) {
            sum += a[c];
            dot += a[c] * (real)((x[c] - m) * s);
        }
        sum /= D, dot /= D;
#pragma omp simd
        for (int c = 0; c < D; c++) {
            real n = (real)((x[c] - m) * s);
            dx[c] = (real)s * (a[c] - sum - n * dot);
        }
    }
    if (dweight) {
        sum_rows(dweight, dout, inp, mean, rstd, R, D, 1);
        sum_rows(dbias, dout, NULL, NULL, NULL, R, D, 1);
    }
}

// ----------------------------------------------------------------------------
// rescale: out (R,D) = alpha (D) inp. alpha begins small, so that at first the FFN hardly changes the residual stream.

static void rescale_forward(real *out, const real *inp, const real *alpha, int R, int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < D; c++) out[(size_t)r * D + c] = alpha[c] * inp[(size_t)r * D + c];
    }
}

// forward: out = alpha inp. So dinp = alpha dout, dalpha = sum over rows of dout inp.
static void rescale_backward(real *dinp, real *dalpha, const real *dout, const real *inp, const real *alpha, int R,
                             int D) {
#pragma omp parallel for schedule(static) if (is_large((double)R * D))
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < D; c++) dinp[(size_t)r * D + c] = alpha[c] * dout[(size_t)r * D + c];
    }
    sum_rows(dalpha, dout, inp, NULL, NULL, R, D, 1);
}

static void copy(real *out, const real *inp, size_t n) { memcpy(out, inp, n * sizeof *out); }

// A residual: out += inp.
static void add(real *out, const real *inp, size_t n) {
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
    for (size_t i = 0; i < n; i++) out[i] += inp[i];
}

// ----------------------------------------------------------------------------
// output and loss: logits (R,V) = x output', x (R,D), output (V,D); losses (R) = log sum_v e^logit_v - logit_target, in
// nats; a target of -1 gives no loss and no gradient.
//
// The logits of a long sequence are often the largest tensor of all, so only logit_rows(V) rows of them exist at a
// time. If dx is not NULL, the backward pass of these rows follows before the next rows are computed:
//
//     dlogit = grad_scale (softmax - onehot(target)),    dx = dlogit output,    doutput += dlogit' x

static int logit_rows(int V) { return max(LOGITS / V, LOGIT_ROWS); }

static void output_loss(double *losses, real *dx, real *doutput, real *logits, const real *x, const real *output,
                        const int32_t *targets, double grad_scale, int R, int D, int V) {
    for (int r0 = 0; r0 < R; r0 += logit_rows(V)) {
        int rows = min(logit_rows(V), R - r0);
        const real *xr = x + (size_t)r0 * D;
        linear_forward(logits, NULL, xr, output, NULL, rows, D, V);
#pragma omp parallel for schedule(static) if (is_large((double)rows * V))
        for (int r = 0; r < rows; r++) {
            real *l = logits + (size_t)r * V, largest = -INFINITY;
            int target = targets[r0 + r];
#pragma omp simd reduction(max : largest)
            for (int v = 0; v < V; v++) largest = l[v] > largest ? l[v] : largest;
            double sum = 0, at_target = target < 0 ? 0 : l[target];
            real overflow = 0; // as in attention
#pragma omp simd reduction(+ : sum, overflow)
            for (int v = 0; v < V; v++) {
                overflow += l[v] - l[v];
                l[v] = exp_real(l[v] - largest);
                sum += l[v];
            }
            sum += overflow;
            losses[r0 + r] = target < 0 ? 0 : log(sum) + (largest - at_target); // largest may be 1e20
            real scale = target < 0 ? 0 : (real)(grad_scale / sum);
            // softmax - 1 at the target in double: where softmax is almost 1, float would leave nothing of it
            double dtarget = target < 0 ? 0 : grad_scale * (l[target] - sum) / sum;
            for (int v = 0; dx && v < V; v++) l[v] *= scale;
            if (dx && target >= 0) l[target] = (real)dtarget;
        }
        if (dx) linear_backward(dx + (size_t)r0 * D, 0, doutput, NULL, logits, xr, output, rows, D, V);
    }
}

// ----------------------------------------------------------------------------
// TimestepNorm and CEMA in the model. These two carry information from one chunk to the next, so they have a state. in:
// the incoming state, or NULL: a fresh start. out: receives the outgoing state, or NULL: not kept.
//
// Only these four functions know of chunk-parallel ranks. A rank reduces its own tokens, an all-gather exchanges the
// results, and the rank combines those of the ranks before it (backward: after it) to the state that its layer starts
// from. With several ranks, `in` is the state before the whole sequence; each of these functions replaces its own slice
// of it by the state before this rank's part. `out` receives the state after the whole sequence, the same on every
// rank. dstate is described at megalodon_backward in megalodon.h; each backward function replaces its own slice.
// With numbers, step by step: dev/notes/parallel-in-time.md.

// TimestepNorm number `layer`. Number num_layers is the final norm.
static void timestep_norm_layer_forward(Model *m, int layer, real *y, double *mean, real *rstd, const real *x,
                                        const real *weight, const real *bias, const State *in, State *out) {
    Dims d = m->dims;
    NormState start = norm_state(in, layer), end = norm_state(out, layer);
    if (m->config.timestep_norm == NORM_LAYER) {
        layernorm_forward(y, mean, rstd, x, weight, bias, d.B * d.L, d.D, m->config.norm_eps);
        return;
    }
    if (m->combining) {
        size_t groups = (size_t)d.B * d.G;
        double *mine = (double *)(void *)m->exchange;
        timestep_norm_reduce((NormState){NULL, mine, mine + groups}, x, d);
        const double *all = all_gather(m, 2 * groups * sizeof *all);
        timestep_norm_combine(start, end, all, end.count, &m->cp, d);
        end.mean = end.m2 = NULL; // timestep_norm_combine has set them
    }
    timestep_norm_forward(y, mean, rstd, end, x, weight, bias, start, d, m->config.norm_eps);
}

static void timestep_norm_layer_backward(Model *m, int layer, real *dx, real *dweight, real *dbias, StateGrad *dstate,
                                         const real *dy, const real *const residuals[2], const real *x,
                                         const real *weight, const double *mean, const real *rstd) {
    Dims d = m->dims;
    const int64_t *count = m->has_before ? m->before.count : NULL;
    size_t sums = (size_t)d.B * d.G * 3;
    if (m->config.timestep_norm == NORM_LAYER) {
        layer_instead_of_timestep_backward(m, dx, dweight, dbias, dy, residuals, x, weight, mean, rstd);
        return;
    }
    double *later = dstate ? dstate->sums + layer * sums : NULL; // U, V, W of the tokens after these
    if (m->cp.cp_size > 1) {
        timestep_norm_reduce_backward((double *)(void *)m->exchange, dy, x, weight, mean, rstd, count, d);
        const double *all = all_gather(m, sums * sizeof *all);
        double *whole = later;
        later = combined(m, whole, sums * sizeof *later);
        timestep_norm_combine_backward(later, whole, all, &m->cp, d);
    }
    timestep_norm_backward(dx, dweight, dbias, later, dy, residuals, x, weight, mean, rstd, count, d);
}

static void cema_layer_forward(Model *m, int layer, const State *in, State *out) {
    Dims d = m->dims;
    LayerActs *a = &m->acts[layer];
    const Coeffs *coeffs = &m->coeffs[layer];
    size_t modes = (size_t)d.B * 2 * d.N * d.D, at = layer * modes;
    if (m->config.cema == CEMA_NONE) {
        copy(a->ema, a->xt, (size_t)d.B * d.L * d.D);
        return;
    }
    real *h_in = in ? in->h + at : NULL, *h_out = out ? out->h + at : NULL;
    if (m->combining) {
        cema_reduce((real *)(void *)m->exchange, a->xt, coeffs, 0, d);
        const real *all = all_gather(m, modes * sizeof *all);
        cema_combine(h_in, h_out, all, coeffs, 0, &m->cp, d);
        h_out = NULL; // cema_combine has set it
    }
    real *h_blocks = m->mode == MEGALODON_INFER ? NULL : a->h; // for the backward pass
    cema_forward(a->ema, h_blocks, h_out, a->xt, coeffs, m->params.layers[layer].cema_omega, h_in, d);
}

static void cema_layer_backward(Model *m, int layer, real *dx, StateGrad *dstate, const real *dy) {
    Dims d = m->dims;
    const LayerActs *a = &m->acts[layer];
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    const Coeffs *coeffs = &m->coeffs[layer];
    Coeffs *dcoeffs = &m->scratch.dcoeffs;
    size_t modes = (size_t)d.B * 2 * d.N * d.D;
    real *dh = dstate ? dstate->h + layer * modes : NULL; // gradient w.r.t. the outgoing state
    if (m->config.cema == CEMA_NONE) {
        copy(dx, dy, (size_t)d.B * d.L * d.D);
        return;
    }
    if (m->cp.cp_size > 1) {
        cema_reduce((real *)(void *)m->exchange, dy, coeffs, 1, d);
        const real *all = all_gather(m, modes * sizeof *all);
        real *whole = dh;
        dh = combined(m, whole, modes * sizeof *dh);
        cema_combine(dh, whole, all, coeffs, 1, &m->cp, d);
    }
    cema_backward(dx, dcoeffs, dw->cema_omega, dh, dy, a->xt, a->h, coeffs, w->cema_omega, d);
    cema_coeffs_backward(dw->cema_alpha, dw->cema_delta, dw->cema_theta, dw->cema_gamma, dcoeffs, w->cema_alpha,
                         w->cema_delta, w->cema_theta, m->config.cema, d.D, d.N);
}

// ----------------------------------------------------------------------------
// the attention sub-layer, y = mega(x), with its own residual: see megalodon.h, and the drawing in megalodon.cu. in and
// out as above; out may be in.
//
// TimestepNorm normalizes a token by the statistics of its past, and CEMA mixes the past into it. Queries, keys and the
// gate r are computed from this mixture. The values are computed from the token itself (xt), so that attention copies
// content that is not blurred. The output is gated element by element. Wh1 is a path past attention, for what CEMA
// alone can predict.

static void mega_forward(Model *m, int layer, const State *in, State *out, const real *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    Dims d = m->dims;
    int R = d.B * d.L, D = d.D, Z = d.Z, E = d.E;
    size_t chunk = (size_t)layer * d.B * d.C; // the layer's first row in the caches
    real *cache_k = out && out->k ? out->k + chunk * Z : NULL, *cache_v = out && out->v ? out->v + chunk * E : NULL;

    // xt = TimestepNorm(x),    v = silu(xt Wv' + bv),    mx = RMSNorm(CEMA(xt))
    timestep_norm_layer_forward(m, layer, a->xt, a->norm_mean, a->norm_rstd, x, w->timenorm_weight, w->timenorm_bias,
                                in, out);
    linear_silu_forward(s->v, a->v_pre, a->xt, w->wv, w->wv_bias, R, D, E);
    cema_layer_forward(m, layer, in, out);
    rmsnorm_forward(a->mx, a->ema_rstd, a->ema, w->rmsnorm_weight, R, D, c->norm_eps);
    dropout(a->mx, a->mx, mask_of(m, layer, DROP_MX, c->hidden_dropout, D), (size_t)R * D);
    // z = mx Wz' + bz,    q, k: RMSNorm of each head of z, an affine map, a rotation
    linear_forward(a->z, NULL, a->mx, w->wz, w->wz_bias, R, D, Z);
    qk_layer_forward(s->q, s->k, s->zn, s->z_rstd, a->z, w->gamma, w->beta, m->rope, in ? in->count : NULL, d,
                     c->norm_eps);
    // o = attention(q, k, v),    y = (mx Wh1' + bh1) + (o * r) Wh2' + x,    r = silu(mx Wr' + br)
    const Mask mask = mask_of(m, layer, DROP_MEGA, c->dropout, D);
    const real *residual = mask.p > 0 ? NULL : x; // the product adds it, unless a dropout comes between
    linear_forward(a->r_pre, NULL, a->mx, w->wr, w->wr_bias, R, D, E);
    linear_forward(a->y, residual, a->mx, w->wh1, w->wh1_bias, R, D, D);
    attention_forward(a->o, a->lse, cache_k, cache_v, s->scores, s->q, s->k, s->v, in ? m->past : NULL,
                      mask_of_attention(m, layer), d, m->threads);
    gate_forward(s->gated, a->o, a->r_pre, (size_t)R * E);
    dropout(s->gated, s->gated, mask_of(m, layer, DROP_GATED, c->hidden_dropout, E), (size_t)R * E);
    linear_forward(a->y, a->y, s->gated, w->wh2, NULL, R, E, D);
    dropout(a->y, a->y, mask, (size_t)R * D);
    if (!residual) add(a->y, x, (size_t)R * D);
}

// dx = gradient w.r.t. x through this sub-layer, plus `residual`. dy = gradient w.r.t. y. residual is the gradient that
// reaches x through the block's other residual; it may be dx itself. Activations that are cheap to compute (gated, v,
// q, k) are not kept but computed again. mx is used three times, so dmx sums the gradients through Wh1, Wr and Wz. xt
// is used twice, so dxt sums those through CEMA and Wv.
static void mega_backward(Model *m, int layer, real *dx, StateGrad *dstate, const real *dy, const real *residual,
                          const real *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    Dims d = m->dims;
    int R = d.B * d.L, D = d.D, Z = d.Z, E = d.E;

    // forward: y = dropout((mx Wh1' + bh1) + gated Wh2') + x,    gated = dropout(o * silu(mx Wr' + br))
    const Mask mega_mask = mask_of(m, layer, DROP_MEGA, c->dropout, D);
    const Mask gated_mask = mask_of(m, layer, DROP_GATED, c->hidden_dropout, E);
    const real *dsum = mega_mask.p > 0 ? s->dxt : dy; // gradient w.r.t. the sum of the two products
    dropout(s->dxt, dy, mega_mask, (size_t)R * D);
    silu_forward(s->v, a->v_pre, (size_t)R * E); // v, q and k are computed again
    qk_layer_forward(s->q, s->k, s->zn, s->z_rstd, a->z, w->gamma, w->beta, m->rope, NULL, d, c->norm_eps);
    linear_gate_backward(s->gated, s->do_, s->dr_pre, dw->wr_bias, dsum, w->wh2, a->o, a->r_pre, gated_mask, R, E, D);
    linear_backward_weight(dw->wh2, NULL, dsum, s->gated, R, E, D);
    linear_backward(s->dmx, 0, dw->wh1, dw->wh1_bias, dsum, a->mx, w->wh1, R, D, D);
    linear_backward(s->dmx, 1, dw->wr, NULL, s->dr_pre, a->mx, w->wr, R, D, E);

    // forward: o = attention(q, k, v),    v = silu(v_pre),    q, k from z = mx Wz' + bz
    attention_backward(s->dq, s->dk, s->dv, s->scores, s->do_, a->lse, s->q, s->k, s->v, mask_of_attention(m, layer), d,
                       m->threads);
    qk_layer_backward(s->dz, dw->gamma, dw->beta, s->dq, s->dk, s->zn, s->z_rstd, a->z, w->gamma, m->rope, d);
    linear_backward(s->dmx, 1, dw->wz, dw->wz_bias, s->dz, a->mx, w->wz, R, D, Z);

    // forward: mx = dropout(RMSNorm(CEMA(xt))),    v_pre = xt Wv' + bv,    xt = TimestepNorm(x)
    dropout(s->dmx, s->dmx, mask_of(m, layer, DROP_MX, c->hidden_dropout, D), (size_t)R * D);
    rmsnorm_backward(s->dema, dw->rmsnorm_weight, s->dmx, a->ema, w->rmsnorm_weight, a->ema_rstd, R, D);
    cema_layer_backward(m, layer, s->dxt, dstate, s->dema);
    silu_bias_backward(s->dv, dw->wv_bias, s->dv, a->v_pre, R, E);
    linear_backward(s->dxt, 1, dw->wv, NULL, s->dv, a->xt, w->wv, R, D, E);
    const real *const residuals[2] = {dy, residual};
    timestep_norm_layer_backward(m, layer, dx, dw->timenorm_weight, dw->timenorm_bias, dstate, s->dxt, residuals, x,
                                 w->timenorm_weight, a->norm_mean, a->norm_rstd);
}

// ----------------------------------------------------------------------------
// the FFN sub-layer with the block's residual x:
//
//     out = [alpha *] hidden W2' + x,    hidden = silu(u W1') [* (u W3')],    u = LayerNorm(y)

static void nffn_forward(Model *m, int layer, real *out, const real *x) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int R = m->dims.B * m->dims.L, D = m->dims.D, F = m->dims.F;

    // u = LayerNorm(y),    hidden = silu(u W1') [* (u W3')]
    layernorm_forward(a->u, a->ffn_mean, a->ffn_rstd, a->y, w->norm_weight, w->norm_bias, R, D, c->norm_eps);
    if (c->swiglu) {
        linear_forward(a->f3, NULL, a->u, w->fc3, NULL, R, D, F);
        linear_forward(a->f1, NULL, a->u, w->fc1, NULL, R, D, F);
        gate_forward(s->hidden, a->f3, a->f1, (size_t)R * F);
    } else {
        linear_silu_forward(s->hidden, a->f1, a->u, w->fc1, NULL, R, D, F);
    }
    dropout(s->hidden, s->hidden, mask_of(m, layer, DROP_HIDDEN, c->hidden_dropout, F), (size_t)R * F);
    // out = [alpha *] hidden W2' + x
    const Mask mask = mask_of(m, layer, DROP_NFFN, c->dropout, D);
    const real *residual = mask.p > 0 || c->rescale_nffn ? NULL : x; // the product adds it, if nothing comes between
    real *f2 = c->rescale_nffn ? a->f2 : out;
    linear_forward(f2, residual, s->hidden, w->fc2, NULL, R, F, D);
    dropout(f2, f2, mask, (size_t)R * D);
    if (c->rescale_nffn) rescale_forward(out, f2, w->alpha, R, D);
    if (!residual) add(out, x, (size_t)R * D);
}

// dy = gradient w.r.t. y, from dout. The gradient w.r.t. the residual x is dout itself: block_backward adds it.
static void nffn_backward(Model *m, int layer, real *dy, const real *dout) {
    const Config *c = &m->config;
    const LayerParams *w = &m->params.layers[layer];
    LayerParams *dw = &m->grads.layers[layer];
    LayerActs *a = &m->acts[layer];
    Scratch *s = &m->scratch;
    int R = m->dims.B * m->dims.L, D = m->dims.D, F = m->dims.F;

    // forward: out = [alpha *] f2 + x,    f2 = dropout(hidden W2')
    const Mask hidden_mask = mask_of(m, layer, DROP_HIDDEN, c->hidden_dropout, F);
    const Mask nffn_mask = mask_of(m, layer, DROP_NFFN, c->dropout, D);
    const real *df2 = dout;
    if (c->rescale_nffn) {
        rescale_backward(s->dmx, dw->alpha, dout, a->f2, w->alpha, R, D);
        df2 = s->dmx;
    }
    dropout(s->dmx, df2, nffn_mask, (size_t)R * D);
    if (nffn_mask.p > 0) df2 = s->dmx;
    // forward: hidden = dropout(silu(f1) [* f3]),    f1 = u W1',    f3 = u W3',    u = LayerNorm(y)
    real *du = s->dxt;
    if (c->swiglu) {
        linear_gate_backward(s->hidden, s->df3, s->df1, NULL, df2, w->fc2, a->f3, a->f1, hidden_mask, R, F, D);
        linear_backward(du, 0, dw->fc3, NULL, s->df3, a->u, w->fc3, R, D, F);
    } else {
        linear_silu_backward(s->hidden, s->df1, df2, w->fc2, a->f1, hidden_mask, R, F, D);
    }
    linear_backward_weight(dw->fc2, NULL, df2, s->hidden, R, F, D);
    linear_backward(du, c->swiglu, dw->fc1, NULL, s->df1, a->u, w->fc1, R, D, F);
    layernorm_backward(dy, dw->norm_weight, dw->norm_bias, du, a->y, w->norm_weight, a->ffn_mean, a->ffn_rstd, R, D);
}

// ----------------------------------------------------------------------------
// the block: y = mega(x), out = nffn(y) + x
//
// In a pre-norm Transformer block each sub-layer has its own residual: y = x + f(x), out = y + g(y). So every block
// adds two branches to the residual stream, and the variance of the stream grows with their number. Here the second
// residual is x again, two hops back: out = x + g(y). y has its own residual inside mega, so that the FFN reads x
// together with what attention has found. But y itself is not added to out, so a block adds only one branch, g(y). In
// the backward pass dout is added to dx, past both sub-layers.
// With numbers, step by step: dev/notes/block.md.

static void block_forward(Model *m, int layer, const State *in, State *out) {
    mega_forward(m, layer, in, out, m->x[layer]);
    nffn_forward(m, layer, m->x[layer + 1], m->config.two_hop == ONE_HOP ? m->acts[layer].y : m->x[layer]);
    m->acts_layer = layer;
}

// Computes the activations of a block again from its kept input, if another block has overwritten them.
static void block_again(Model *m, int layer) {
    if (m->mode == MEGALODON_TRAIN || m->acts_layer == layer) return;
    block_forward(m, layer, m->has_before ? &m->before : NULL, NULL);
}

// forward: y = mega(x), out = nffn(y) + x
// scratch.dx: in: dout; out: dx, the gradient through both sub-layers plus dout itself.
static void block_backward(Model *m, int layer, StateGrad *dstate) {
    Scratch *s = &m->scratch;
    int one_hop = m->config.two_hop == ONE_HOP; // then dout reaches y
    block_again(m, layer);
    nffn_backward(m, layer, s->dy, s->dx);
    if (one_hop) add(s->dy, s->dx, (size_t)m->dims.B * m->dims.L * m->dims.D);
    mega_backward(m, layer, s->dx, dstate, s->dy, one_hop ? NULL : s->dx, m->x[layer]);
}

// ----------------------------------------------------------------------------
// the model: tokens -> embedding -> blocks -> TimestepNorm -> output

static real embedding_scale(const Config *c) { return c->scale_emb ? (real)sqrt(c->model_dim) : 1; }

// Keeps what the layers and the backward pass need of the incoming state.
static void begin_forward(Model *m, const State *state) {
    int parallel = m->cp.cp_size > 1;
    read_past(m, state);
    if (m->mode != MEGALODON_INFER || parallel) keep_state(m, state);
    for (int b = 0; parallel && b < m->dims.B; b++) m->before.count[b] += m->cp_start;
}

static void layers_forward(Model *m, const State *in, State *out) {
    int layers = m->config.num_layers;
    for (int l = 0; l < layers; l++) block_forward(m, l, in, out);
    timestep_norm_layer_forward(m, layers, m->final, m->final_mean, m->final_rstd, m->x[layers],
                                m->params.final_norm_weight, m->params.final_norm_bias, in, out);
}

void megalodon_forward(Model *m, State *state, const int32_t *tokens, int B, int L) {
    const Config *c = &m->config;
    int parallel = m->cp.cp_size > 1;
    size_t R = (size_t)B * L;
    assert(B > 0 && L > 0 && B <= m->max_B && L <= m->max_L && (!state || state->B == B));
    assert(!parallel || (L == m->cp.lengths[m->cp.cp_rank] && !(state && state->k)));
    for (size_t i = 0; i < R; i++) assert(tokens[i] >= 0 && tokens[i] < c->vocab_size);
    m->dims = dims_of(c, B, L), m->acts_layer = -1;
    memcpy(m->tokens, tokens, R * sizeof *tokens);
    update_coeffs(m);
    begin_forward(m, state);
    const State *in = parallel ? &m->before : state;

    m->combining = parallel;
    embedding_forward(m->x[0], tokens, m->params.embed, embedding_scale(c), B * L, c->model_dim);
    dropout(m->x[0], m->x[0], mask_of(m, -1, DROP_EMBED, c->dropout, c->model_dim), R * c->model_dim);
    // decoding: this thread runs the layers, the others take parts of the products; a small model gains nothing
    WITH_TEAM(R <= FEW_ROWS && is_large((double)m->num_params / 64), layers_forward(m, in, state));
    m->combining = 0;
    for (int b = 0; state && b < B; b++) state->count[b] += parallel ? m->cp_length : L;
}

double megalodon_loss(Model *m, const int32_t *targets, double grad_scale, int64_t *counted, real *losses) {
    int R = m->dims.B * m->dims.L, grad = grad_scale > 0 && m->mode != MEGALODON_INFER;
    output_loss(m->losses, grad ? m->scratch.dxt : NULL, grad ? m->grads.output : NULL, m->scratch.logits, m->final,
                m->params.output, targets, grad_scale, R, m->dims.D, m->dims.V);
    double sum = 0;
    *counted = 0;
    for (int r = 0; r < R; r++) {
        sum += m->losses[r];
        *counted += targets[r] >= 0;
        if (losses) losses[r] = (real)m->losses[r];
    }
    return sum;
}

// The layers in reverse order. scratch.dxt holds the gradient w.r.t. the final norm's output, from megalodon_loss.
void megalodon_backward(Model *m, StateGrad *dstate) {
    const Config *c = &m->config;
    Scratch *s = &m->scratch;
    int R = m->dims.B * m->dims.L, D = c->model_dim, layers = c->num_layers;
    assert(m->mode != MEGALODON_INFER && (!dstate || dstate->B == m->dims.B));
    for (int b = 0; b < m->dims.B; b++) assert(m->past[b] == 0);
    timestep_norm_layer_backward(m, layers, s->dx, m->grads.final_norm_weight, m->grads.final_norm_bias, dstate, s->dxt,
                                 NULL, m->x[layers], m->params.final_norm_weight, m->final_mean, m->final_rstd);
    if (m->on_grad_ready) m->on_grad_ready(m, layers + 1);
    for (int l = layers - 1; l >= 0; l--) {
        block_backward(m, l, dstate);
        if (m->on_grad_ready) m->on_grad_ready(m, l + 1);
    }
    dropout(s->dx, s->dx, mask_of(m, -1, DROP_EMBED, c->dropout, D), (size_t)R * D);
    embedding_backward(m->grads.embed, s->dx, m->tokens, embedding_scale(c), R, D);
    if (m->on_grad_ready) m->on_grad_ready(m, 0);
}

void megalodon_logits(Model *m, size_t first, size_t rows, real *dst) {
    assert(first + rows <= (size_t)m->dims.B * m->dims.L);
    linear_forward(dst, NULL, m->final + first * m->dims.D, m->params.output, NULL, (int)rows, m->dims.D, m->dims.V);
}

// ----------------------------------------------------------------------------
// optimizer

void megalodon_zero_grad(Model *m) {
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)m->num_params))
    for (size_t i = 0; i < m->num_params; i++) m->memory[GRADS][i] = 0;
}

// Each shard is summed in NUM_SUMS parts, which are then summed in order, so that the result does not depend on the
// number of threads.
double megalodon_grad_norm(Model *m) {
    double total = 0;
    for (int s = 0; s < m->num_shards; s++) {
        size_t n = m->shards[s].count, part = n / NUM_SUMS + 1;
        const real *g = m->memory[GRADS] + m->shards[s].first;
#pragma omp parallel for schedule(static) if (is_large((double)n))
        for (int p = 0; p < NUM_SUMS; p++) {
            size_t from = p * part, to = from + part < n ? from + part : n;
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (size_t i = from; i < to; i++) sum += (double)g[i] * g[i];
            m->sums[p] = sum;
        }
        for (int p = 0; p < NUM_SUMS; p++) total += m->sums[p];
    }
    return sqrt(total);
}

// AdamW, with k the number of this step, from 1:
//
//     m = beta1 m + (1 - beta1) g,    v = beta2 v + (1 - beta2) g^2
//     m_hat = m/(1 - beta1^k),        v_hat = v/(1 - beta2^k)          moments begin at zero; this removes the bias
//     p = p - lr (m_hat/(sqrt(v_hat) + eps) + weight_decay p)          all parameters decay
//
// Where v overflows (|g| above about 1e20, so only without clipping) p becomes NaN. Otherwise it would silently stay as
// it is, since m_hat/infinity is 0.
void megalodon_update(Model *m, const AdamW *o, double lr, double grad_scale, int64_t update) {
    double k = (double)update + 1;
    real beta1 = (real)o->beta1, beta2 = (real)o->beta2, rest1 = (real)(1 - o->beta1), rest2 = (real)(1 - o->beta2);
    real unbias1 = (real)(1 / (1 - pow(o->beta1, k))), unbias2 = (real)(1 / sqrt(1 - pow(o->beta2, k)));
    real rate = (real)lr, decay = (real)(1 - lr * o->weight_decay), eps = (real)o->eps, scale = (real)grad_scale;
    real *m1 = m->memory[MOMENT1], *v = m->memory[MOMENT2];
    for (int s = 0; s < m->num_shards; s++) {
        size_t n = m->shards[s].count;
        real *p = m->memory[PARAMS] + m->shards[s].first;
        const real *grad = m->memory[GRADS] + m->shards[s].first;
#pragma omp parallel for simd schedule(static) if (parallel : is_large((double)n))
        for (size_t i = 0; i < n; i++) {
            real g = grad[i] * scale;
            m1[i] = beta1 * m1[i] + rest1 * g;
            v[i] = beta2 * v[i] + rest2 * g * g;
            real m_hat = m1[i] * unbias1, root = (real)sqrt(v[i]) * unbias2; // root: sqrt(v_hat)
            p[i] = p[i] * decay - rate * m_hat / (root + eps) + (v[i] - v[i]);
        }
        m1 += n, v += n;
    }
    m->coeffs_valid = 0;
}

// ----------------------------------------------------------------------------
// memory: what plumbing/model.h asks of a backend

static void *memory_new(size_t bytes) { // aligned for vectors
    void *memory = aligned_alloc(64, (bytes / 64 + 1) * 64);
    return memory ? memset(memory, 0, bytes) : NULL;
}
static void memory_free(void *memory, size_t bytes) { (void)bytes, free(memory); }
static void memory_copy(void *dst, const void *src, size_t bytes) { memcpy(dst, src, bytes); }
static void memory_clear(void *memory, size_t bytes) { memset(memory, 0, bytes); }

static size_t scores_size(const Model *m, Dims d) {
    return (size_t)m->threads * QUERY_TILE * d.C * (m->mode == MEGALODON_INFER ? 1 : 2);
}
static size_t workspace_size(const Model *m, Dims d) { return (void)m, (void)d, 0; }
static void params_written(Model *m, size_t first, size_t n) { (void)m, (void)first, (void)n; }

static void begin_layers(Model *m) { (void)m; }
static void read_floatX(real *dst, const floatX *src, size_t n) { memcpy(dst, src, n * sizeof *dst); }
static int backend_threads(void) { return threads_here(); }

// The buffers of the BLAS library are allocated before the model, so that too little memory for them is reported, too.
static int backend_open(int allocate) {
    if (!allocate) return 1;
#ifdef _OPENMP
    megalodon_threads(omp_get_max_threads());
#endif
    return blas_buffers(threads_here());
}

// ----------------------------------------------------------------------------
// threads, memory and name of the machine

void megalodon_threads(int threads) {
    blas_threads(threads); // first, since it may set the number of OpenMP's threads
#ifdef _OPENMP
    omp_set_num_threads(threads);
#endif
}

int megalodon_on_gpu(void) { return 0; }

size_t megalodon_available_memory(int processes) {
    return host_memory(processes, (size_t)threads_here() * THREAD_BYTES);
}

// The fastest of PRODUCTS products.
static double product_seconds(int side) {
    size_t n = (size_t)side * side;
    double least = INFINITY;
    real *A = backend_open(1) ? memory_new(3 * n * sizeof *A) : NULL;
    if (!A) return 0;
    real *B = A + n, *C = B + n;
    for (size_t i = 0; i < 2 * n; i++) A[i] = (real)(i % 7) * (real)0.1;
    for (int i = 0; i < PRODUCTS; i++) {
        double start = seconds();
        matmul(C, side, NULL, matrix(A, side), transposed(B, side), NULL, side, side, side);
        least = fmin(least, seconds() - start);
    }
    memory_free(A, 3 * n * sizeof *A);
    return least;
}

size_t megalodon_peak_memory(void) { // of the whole program
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#if defined __wasm__ // WASI does not say
    return 0;
#elif defined __APPLE__
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
