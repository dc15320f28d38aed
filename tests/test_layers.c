// Every layer of megalodon.c by itself, in double precision: its forward pass against the definition written plainly,
// and its backward pass against central differences of its forward pass, for every input, parameter and incoming state.
// Build: -DMEGALODON_DOUBLE, with plumbing/params.c; megalodon.c is included, since layers are static.
#include "../megalodon.c"
#include "check.h"

static const double EPS = 1e-5;

// A new tensor of n random numbers, different in each call. NULL if n is 0.
static real *numbers(size_t n, double scale, double shift) {
    static uint64_t seed = 1;
    real *x = n ? malloc(n * sizeof *x) : NULL;
    random_fill(x, n, seed++, scale, shift);
    return x;
}

static Coeffs coeffs_in(real *memory, int D, int N) { // five contiguous arrays
    size_t n = (size_t)N * coeffs_stride(D);
    return (Coeffs){memory, memory + n, memory + 2 * n, memory + 3 * n, memory + 4 * n};
}

// ----------------------------------------------------------------------------
// the comparison itself

static void test_comparing(void) {
    const double one[3] = {1, 2, 2}, near[3] = {1, 2, 2.003}, none[3] = {0}, nan[3] = {1, NAN, 2};
    const double infinite[3] = {1, INFINITY, 2};
    double relative;
    check_true("comparing: equal passes", within(&relative, one, one, 3, 0));
    check_true("comparing: relative to the reference", within(&relative, near, one, 3, 1.001e-3));
    check_true("comparing: over tolerance fails", !within(&relative, near, one, 3, 0.999e-3));
    check_true("comparing: NaN fails", !within(&relative, nan, one, 3, 1) && !within(&relative, one, nan, 3, 1));
    check_true("comparing: NaN fails, even if in both", !within(&relative, nan, nan, 3, 1));
    check_true("comparing: infinity fails",
               !within(&relative, infinite, one, 3, 1) && !within(&relative, one, infinite, 3, 1));
    check_true("comparing: zero fails", !within(&relative, none, one, 3, 0.5));
    check_true("comparing: an all-zero reference fails",
               !within(&relative, none, none, 3, 1) && !within(&relative, one, none, 3, 1));
    check_true("comparing: nothing fails", !within(&relative, one, one, 0, 1));
}

// ----------------------------------------------------------------------------
// matrix product against its definition, for all four ways of storing and odd sizes, inside larger rows

static void test_matmul(void) {
    static const int sizes[][3] = {{1, 1, 1},     {7, 5, 3},   {6, 16, 64}, {13, 17, 1},
                                   {151, 19, 11}, {5, 141, 9}, {9, 7, 523}};
    static const char *const names[3] = {"", ", added", ", residual"};
    for (int s = 0; s < (int)(sizeof sizes / sizeof *sizes); s++) {
        int M = sizes[s][0], N = sizes[s][1], K = sizes[s][2], ldc = N + 3;
        size_t size = (size_t)M * ldc;
        for (int form = 0; form < 24; form++) {
            int ta = form & 1, tb = form >> 1 & 1, with_bias = form >> 2 & 1, kind = form >> 3; // of residual
            int lda = (ta ? M : K) + 2, ldb = (tb ? K : N) + 1;
            real *A = numbers((size_t)(ta ? K : M) * lda, 1, 0), *B = numbers((size_t)(tb ? N : K) * ldb, 1, 0);
            real *bias = with_bias ? numbers((size_t)N, 1, 0) : NULL;
            real *C = numbers(size, 1, 0), *other = numbers(size, 1, 0), *expected = malloc(size * sizeof *C);
            real *residual = kind == 0 ? NULL : kind == 1 ? C : other;
            memcpy(expected, C, size * sizeof *C);
            for (int i = 0; i < M; i++) {
                for (int j = 0; j < N; j++) {
                    double sum = bias ? bias[j] : 0;
                    for (int k = 0; k < K; k++) {
                        sum += A[ta ? k * lda + i : i * lda + k] * B[tb ? j * ldb + k : k * ldb + j];
                    }
                    expected[i * ldc + j] = sum + (residual ? residual[i * ldc + j] : 0);
                    if (kind != 1) C[i * ldc + j] = NAN; // must not be read
                }
            }
            matmul(C, ldc, residual, ta ? transposed(A, lda) : matrix(A, lda), tb ? transposed(B, ldb) : matrix(B, ldb),
                   bias, M, N, K);
            char name[96];
            snprintf(name, sizeof name, "matmul %dx%dx%d, A%s B%s%s%s", M, N, K, ta ? "'" : "", tb ? "'" : "",
                     names[kind], bias ? ", bias" : "");
            check(name, C, expected, size, 1e-14);
            free(A), free(B), free(C), free(other), free(expected), free(bias);
        }
    }
}

// The product for few rows, in parts: those of one thread, of a parallel loop and of a team. All have the same bits,
// and so has a row by itself.
static void matvec_threads(const char *name, const Matvec *p) {
    size_t size = (size_t)p->M * p->ldc;
    real *expected = calloc(size, sizeof *expected); // nothing is written between rows
    for (int i = 0; i < p->M; i++) {
        for (int j = 0; j < p->N; j++) {
            double sum = p->bias[j] + p->residual[i * p->ldc + j];
            for (int k = 0; k < p->K; k++) {
                sum += p->A.at[i * p->A.ld + k] * p->B.at[p->B.transposed ? j * p->B.ld + k : k * p->B.ld + j];
            }
            expected[i * p->ldc + j] = sum;
        }
    }
    static const int threads[] = {1, 2, 3, 3, 3};
    for (int form = 0; form < 5; form++) {
        char text[128];
        Matvec q = *p;
        memset(p->C, 0, size * sizeof(real));
        megalodon_threads(threads[form]);
        snprintf(text, sizeof text, "%s, %d threads%s", name, threads[form],
                 form < 3    ? ""
                 : form == 3 ? " in a team"
                             : " in a team, row by row");
        if (form < 3) matvec(p);
        if (form == 3) WITH_TEAM(1, matvec(p));
        for (int i = 0; form == 4 && i < p->M; i++) {
            q.M = 1, q.C = p->C + i * p->ldc, q.residual = p->residual + i * p->ldc, q.A = submatrix(p->A, i, 0);
            WITH_TEAM(1, matvec(&q));
        }
        if (form == 0) check(text, p->C, expected, size, 1e-14), memcpy(expected, p->C, size * sizeof(real));
        if (form > 0) check_true(text, memcmp(p->C, expected, size * sizeof(real)) == 0);
    }
    free(expected);
}

static void test_matvec(void) {
    static const int sizes[][3] = {{1, 531, 301}, {2, 1024, 64}, {3, 77, 1031}, {4, 5, 8191}, {8, 533, 157}};
    for (int s = 0; s < 2 * (int)(sizeof sizes / sizeof *sizes); s++) {
        int M = sizes[s / 2][0], N = sizes[s / 2][1], K = sizes[s / 2][2], tb = s % 2;
        int lda = K + 2, ldb = (tb ? K : N) + 1;
        real *A = numbers((size_t)M * lda, 1, 0), *B = numbers((size_t)(tb ? N : K) * ldb, 1, 0);
        int ldc = N + 3;
        real *C = numbers((size_t)M * ldc, 1, 0), *bias = numbers((size_t)N, 1, 0);
        real *residual = numbers((size_t)M * ldc, 1, 0);
        char name[64];
        snprintf(name, sizeof name, "matvec %dx%dx%d, B%s", M, N, K, tb ? "'" : "");
        matvec_threads(
            name, &(Matvec){C, residual, bias, matrix(A, lda), tb ? transposed(B, ldb) : matrix(B, ldb), ldc, M, N, K});
        free(A), free(B), free(C), free(bias), free(residual);
    }
}

// CEMA of one token against the general function, which runs if the states before and after are different arrays.
static void test_cema_token(void) {
    enum { B = 3, D = 2 * RUN + 37, N = 3, H = B * 2 * N * D };
    real *x = numbers(B * D, 1, 0), *omega = numbers(D, 1, 0), *h0 = numbers(H, 1, 0), *h = numbers(H, 1, 0);
    real *h1 = numbers(H, 1, 0), *memory = numbers(5 * N * coeffs_stride(D), 1, 0), y[B * D], expected[B * D];
    Coeffs coeffs = coeffs_in(memory, D, N);
    Dims dims = {.B = B, .L = 1, .D = D, .N = N};
    cema_forward(expected, NULL, h1, x, &coeffs, omega, h0, dims);
    for (int threads = 1; threads <= 3; threads++) {
        char text[64];
        memcpy(h, h0, H * sizeof *h);
        megalodon_threads(threads);
        WITH_TEAM(threads > 1, cema_forward(y, NULL, h, x, &coeffs, omega, h, dims));
        snprintf(text, sizeof text, "cema of a token, %d threads", threads);
        check(text, y, expected, B * D, 1e-14);
        snprintf(text, sizeof text, "cema of a token, %d threads: h", threads);
        check(text, h, h1, H, 1e-14);
    }
    free(x), free(omega), free(h0), free(h), free(h1), free(memory);
}

// ----------------------------------------------------------------------------
// definitions, written plainly

// CEMA as a convolution: y_t = sum_j k_j x_(t-j) + omega x_t with k_j = Re sum_n gamma/sqrt(N) p q^j. In the
// paper's Eq. 2 the input also gets a factor e^(i phi): the same model, when gamma is rotated by e^(-i phi).
static void test_cema_definition(int paper) {
    enum { L = CEMA_BLOCK + 13, D = 3, N = 4 };
    real *x = numbers(L * D, 1, 0), *alpha = numbers(D * N, 1, 0), *delta = numbers(D * N, 1, 0);
    real *theta = numbers(D, 1, -1), *gamma = numbers(2 * D * N, 1, 0), *omega = numbers(D, 1, 0);
    real *memory = numbers(5 * N * coeffs_stride(D), 1, 0), *rotated = numbers(2 * D * N, 1, 0);
    real y[L * D], expected[L * D];
    memcpy(rotated, gamma, 2 * D * N * sizeof *gamma);
    for (int t = 0; t < L; t++) {
        for (int d = 0; d < D; d++) {
            expected[t * D + d] = omega[d] * x[t * D + d];
            for (int j = 0; j <= t; j++) {
                double k = 0;
                for (int n = 0; n < N; n++) {
                    double p = 1 / (1 + exp(-alpha[d * N + n])), phi = 2 * PI * (n + 1) / N / (1 + exp(-theta[d]));
                    double decay = pow(1 - p / (1 + exp(-delta[d * N + n])), j), angle = phi * (j + paper);
                    double re = gamma[2 * (d * N + n)], im = gamma[2 * (d * N + n) + 1];
                    k += p * decay * (re * cos(angle) - im * sin(angle)) / sqrt(N);
                    rotated[2 * (d * N + n)] = re * cos(paper * phi) - im * sin(paper * phi);
                    rotated[2 * (d * N + n) + 1] = re * sin(paper * phi) + im * cos(paper * phi);
                }
                expected[t * D + d] += k * x[(t - j) * D + d];
            }
        }
    }
    Coeffs coeffs = coeffs_in(memory, D, N);
    cema_coeffs_forward(&coeffs, alpha, delta, theta, rotated, CEMA_COMPLEX, D, N);
    cema_forward(y, NULL, NULL, x, &coeffs, omega, NULL, (Dims){.B = 1, .L = L, .D = D, .N = N});
    check(paper ? "cema = paper's Eq. 2, gamma rotated" : "cema = its convolution", y, expected, L * D, 1e-12);
    free(x), free(alpha), free(delta), free(theta), free(gamma), free(omega), free(memory), free(rotated);
}

// Without rotation (phi = 0) and with a real gamma it is a plain exponential moving average.
static void test_cema_real(void) {
    enum { L = 2 * CEMA_BLOCK, D = 2 };
    real *x = numbers(L * D, 1, 0), *memory = numbers(5 * coeffs_stride(D), 1, 0);
    real alpha[D] = {0.3, -0.7}, delta[D] = {-1, 0.5}, theta[D] = {-800, -800}, gamma[2 * D] = {1.5, 0, -0.5, 0};
    real omega[D] = {0}, y[L * D], expected[L * D], average[D] = {0};
    for (int t = 0; t < L; t++) {
        for (int d = 0; d < D; d++) {
            double a = 1 / (1 + exp(-alpha[d])), b = 1 / (1 + exp(-delta[d]));
            average[d] = a * x[t * D + d] + (1 - a * b) * average[d];
            expected[t * D + d] = gamma[2 * d] * average[d];
        }
    }
    Coeffs coeffs = coeffs_in(memory, D, 1);
    cema_coeffs_forward(&coeffs, alpha, delta, theta, gamma, CEMA_COMPLEX, D, 1);
    cema_forward(y, NULL, NULL, x, &coeffs, omega, NULL, (Dims){.B = 1, .L = L, .D = D, .N = 1});
    check("cema, real = plain moving average", y, expected, L * D, 1e-13);
    theta[0] = 1, theta[1] = -1, gamma[1] = 2, gamma[3] = 3; // which the choice `real` does not use
    cema_coeffs_forward(&coeffs, alpha, delta, theta, gamma, CEMA_REAL, D, 1);
    cema_forward(y, NULL, NULL, x, &coeffs, omega, NULL, (Dims){.B = 1, .L = L, .D = D, .N = 1});
    check("cema real = plain moving average", y, expected, L * D, 1e-13);
    free(x), free(memory);
}

// TimestepNorm against moments by two passes over all tokens so far. Later tokens change no bit of the output.
static void test_timestep_norm_definition(void) {
    enum { L = 13, D = 12, G = 3, g = D / G };
    real *x = numbers(L * D, 1, 2), *w = numbers(D, 1, 0), *b = numbers(D, 1, 0);
    real y[L * D], later[L * D], expected[L * D], mean[L * G], rstd[L * G];
    const NormState none = {NULL, NULL, NULL};
    const Dims d = {.B = 1, .L = L, .D = D, .G = G};
    for (int t = 0; t < L; t++) {
        for (int j = 0; j < G; j++) {
            double sum = 0, squares = 0, n = (t + 1) * g;
            for (int s = 0; s <= t; s++) {
                for (int i = 0; i < g; i++) sum += x[s * D + j * g + i];
            }
            for (int s = 0; s <= t; s++) {
                for (int i = 0; i < g; i++) squares += pow(x[s * D + j * g + i] - sum / n, 2);
            }
            for (int c = j * g; c < (j + 1) * g; c++) {
                expected[t * D + c] = (x[t * D + c] - sum / n) / sqrt(squares / n + EPS) * (w[c] + 1) + b[c];
            }
        }
    }
    timestep_norm_forward(y, mean, rstd, none, x, w, b, none, d, EPS);
    check("timestep_norm = its definition", y, expected, L * D, 1e-13);
    random_fill(x + 7 * D, (L - 7) * D, 99, 50, -3);
    timestep_norm_forward(later, mean, rstd, none, x, w, b, none, d, EPS);
    check_same("timestep_norm is causal", later, y, 7 * D * sizeof *y);
    check_true("timestep_norm sees its own token", later[7 * D] != y[7 * D]);
    free(x), free(w), free(b);
}

static void test_row_norms(void) {
    enum { R = 3, D = 19 };
    real *x = numbers(R * D, 1, 0.5), *w = numbers(D, 1, 0), *b = numbers(D, 1, 0);
    real y[R * D], rms[R * D], layer[R * D], mean[R], rstd[R];
    for (int r = 0; r < R; r++) {
        double sum = 0, squares = 0;
        for (int c = 0; c < D; c++) sum += x[r * D + c], squares += x[r * D + c] * x[r * D + c];
        double variance = squares / D - sum / D * sum / D;
        for (int c = 0; c < D; c++) {
            rms[r * D + c] = x[r * D + c] / sqrt(squares / D + EPS) * (1 + w[c]);
            layer[r * D + c] = (x[r * D + c] - sum / D) / sqrt(variance + EPS) * (1 + w[c]) + b[c];
        }
    }
    rmsnorm_forward(y, rstd, x, w, R, D, EPS);
    check("rmsnorm = its definition", y, rms, R * D, 1e-13);
    layernorm_forward(y, mean, rstd, x, w, b, R, D, EPS);
    check("layernorm = its definition", y, layer, R * D, 1e-13);
    free(x), free(w), free(b);
}

// Rotary embedding and attention: each score computed alone, for each pair of positions.
static void test_attention_definition(void) {
    enum { L = 19, C = 8, H = 3, Z = 4 * H, E = 5 * H, dz = 4, dv = 5 };
    real *q = numbers(L * Z, 1, 0), *k = numbers(L * Z, 1, 0), *v = numbers(L * E, 1, 0);
    real o[L * E], expected[L * E], lse[L * H], scores[QUERY_TILE * C], table[C * dz];
    real q_rotated[L * Z], k_rotated[L * Z];
    for (int t = 0; t < L; t++) {
        for (int h = 0; h < H; h++) {
            double e[C], sum = 0;
            int first = t / C * C;
            for (int s = first; s <= t; s++) { // rotating both by their positions equals rotating one by the distance
                double score = 0;
                for (int j = 0; j < dz; j += 2) {
                    const real *a = q + t * Z + h * dz + j, *b = k + s * Z + h * dz + j;
                    double angle = (t - s) * pow(10, -(double)j / dz);
                    score += (a[0] * b[0] + a[1] * b[1]) * cos(angle) + (a[0] * b[1] - a[1] * b[0]) * sin(angle);
                }
                e[s - first] = exp(score);
                sum += e[s - first];
            }
            for (int i = 0; i < dv; i++) {
                double value = 0;
                for (int s = first; s <= t; s++) value += e[s - first] / sum * v[s * E + h * dv + i];
                expected[t * E + h * dv + i] = value;
            }
        }
    }
    rope_table(table, C, dz, 10);
    const Dims d = {.B = 1, .L = L, .C = C, .H = H, .Z = Z, .E = E};
    rope_forward(q_rotated, q, table, NULL, d);
    rope_forward(k_rotated, k, table, NULL, d);
    attention_forward(o, lse, NULL, NULL, scores, q_rotated, k_rotated, v, NULL, (Mask){0}, d, 1);
    check("rope and attention = their definition", o, expected, L * E, 1e-13);
    free(q), free(k), free(v);
}

// Dropout: word i of Philox decides about element i, wherever a call begins and ends.
static void test_dropout_definition(void) {
    enum { SIZE = 1000, FIRST = 3 };
    const uint64_t far = ((uint64_t)5 << 34) - 14; // the counter's last word overflows within SIZE elements
    real *x = numbers(SIZE, 1, 3), y[SIZE], parts[SIZE], expected[SIZE];
    for (int i = 0; i < 2; i++) {
        const Mask m = {
            .p = 0.3, .seed = 77, .stream = STREAM_DROPOUT + 2, .step = 6, .layer = 4, .first = i ? far : FIRST};
        for (uint64_t k = 0; k < SIZE; k++) {
            uint64_t at = m.first + k;
            uint32_t words[4];
            megalodon_philox(words, 77, STREAM_DROPOUT + 2, 6, 4 + (uint32_t)(at / 4 >> 32) * 65536,
                             (uint32_t)(at / 4));
            expected[k] = words[at % 4] < 0.3 * 4294967296.0 ? 0 : x[k] / 0.7;
        }
        dropout(y, x, m, SIZE);
        check(i ? "dropout beyond 2^34 elements = its definition" : "dropout = its definition", y, expected, SIZE,
              1e-15);
        for (int from = 0, n = 1; from < SIZE; from += n, n = min(n + 1, SIZE - from)) {
            dropout(parts + from, x + from, mask_row(m, 1, from), (size_t)n);
        }
        check_same("  in parts: the same", parts, y, sizeof y);
    }
    memcpy(y, x, sizeof y);
    dropout(y, y, (Mask){.p = 0}, SIZE);
    check_same("dropout of probability 0 does nothing", y, x, sizeof y);
    free(x);
}

// ----------------------------------------------------------------------------
// Gradients against central differences. A layer works on the tensors below, under the names that megalodon.c has for
// them. The loss is the sum of all outputs, each element times a random weight; these weights are the gradients w.r.t.
// the outputs (dout). An outgoing state is an output like others. A test
//     - declares its tensors: INPUT, OUTPUT, KEEP. Tensors of no elements are NULL: left out;
//     - calls gradcheck with the layer's forward and backward pass.

static real *inp, *weight, *bias, *out, *rstd, *mean, *residual, *table, *scores, *lse;
static real *dinp, *dweight, *dbias, *dout, *dresidual;
static real *prev_mean, *prev_m2, *next_mean, *next_m2, *residual0, *residual1;
static real *dprev_mean, *dprev_m2, *dnext_mean, *dnext_m2, *dresidual0, *dresidual1;
static real *alpha, *delta, *theta, *gamma_, *beta, *omega, *h_in, *h_out, *h_blocks, *coeffs_memory, *dcoeffs_memory;
static real *dalpha, *ddelta, *dtheta, *dgamma_, *dbeta, *domega, *dh_in, *dh_out;
static real *z, *z_rstd, *zn, *q, *k, *v, *a, *b;
static real *dz, *dzn, *dq, *dk, *dv, *da, *db;
static Dims d;
static int R, add_to;
static int64_t *count;
static int32_t *ids;
static Mask mask;

enum { SLOTS = 8, ELEMENTS = 200 };
typedef struct {
    const char *name;
    real **value, **grad; // the two pointers above
    size_t n;
    int added; // its gradient is added to what is there, not set
} Slot;
static Slot inputs[SLOTS], outputs[SLOTS], kept[SLOTS];
static int num_inputs, num_outputs, num_kept;

enum { SET, ADDED };
static void add_slot(Slot *slots, int *number, Slot slot, double scale, double shift) {
    slots[(*number)++] = slot;
    *slot.value = numbers(slot.n, scale, shift);
    if (slot.grad) *slot.grad = numbers(slot.n, 1, 0);
}
// An input or a parameter of n random numbers, and its gradient, which the backward pass sets or adds to.
#define INPUT(tensor, n, added, scale, shift)                                                                          \
    add_slot(inputs, &num_inputs, (Slot){#tensor, &tensor, &d##tensor, (size_t)(n), added}, scale, shift)
#define OUTPUT(tensor, n) add_slot(outputs, &num_outputs, (Slot){#tensor, &tensor, &d##tensor, (size_t)(n), 0}, 1, 0)
// What the forward pass leaves for the backward pass, and scratch.
#define KEEP(tensor, n) add_slot(kept, &num_kept, (Slot){#tensor, &tensor, NULL, (size_t)(n), 0}, 1, 0)

static void poison(real *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = NAN;
}

static void run(void (*forward)(void)) {
    for (int i = 0; i < num_outputs; i++) poison(*outputs[i].value, outputs[i].n);
    for (int i = 0; i < num_kept; i++) poison(*kept[i].value, kept[i].n);
    forward();
}

typedef struct {
    void (*forward)(void);
} Layer;
static double loss(void *context) {
    double sum = 0;
    run(((Layer *)context)->forward);
    for (int i = 0; i < num_outputs; i++) {
        for (size_t e = 0; e < outputs[i].n; e++) sum += (*outputs[i].grad)[e] * (*outputs[i].value)[e];
    }
    return sum;
}

static void free_slots(Slot *slots, int *number) {
    for (Slot *s = slots; s < slots + *number; s++) {
        free(*s->value), *s->value = NULL;
        if (s->grad) free(*s->grad), *s->grad = NULL;
    }
    *number = 0;
}

// Checks the gradient of every input, of at most `elements` elements of each, and frees all tensors.
static void gradcheck_some(const char *title, void (*forward)(void), void (*backward)(void), size_t elements) {
    char name[96];
    Layer layer = {forward};
    real *before[SLOTS];
    for (int i = 0; i < num_inputs; i++) {
        Slot *s = &inputs[i];
        if (!s->added) poison(*s->grad, s->n);
        before[i] = numbers(s->n, 0, 0);
        if (s->added && *s->value) memcpy(before[i], *s->grad, s->n * sizeof(real));
    }
    run(forward);
    backward();
    for (int i = 0; i < num_inputs; i++) {
        Slot *s = &inputs[i];
        for (size_t e = 0; e < s->n; e++) (*s->grad)[e] -= before[i][e];
        snprintf(name, sizeof name, "%s: %s", title, s->name);
        if (*s->value) check_gradient(name, loss, &layer, *s->value, *s->grad, s->n, elements, 1e-7);
        free(before[i]);
    }
    free_slots(inputs, &num_inputs), free_slots(outputs, &num_outputs), free_slots(kept, &num_kept);
}
static void gradcheck(const char *title, void (*forward)(void), void (*backward)(void)) {
    gradcheck_some(title, forward, backward, ELEMENTS);
}

// Copies n numbers, unless src is NULL.
static void copy_given(real *dst, const real *src, int n) {
    if (src) memcpy(dst, src, (size_t)n * sizeof *dst);
}
// A copy, to be freed. Backward passes that overwrite dout get one: loss() needs the weights in dout.
static real *copy_of(const real *src, int n) {
    real *x = numbers((size_t)n, 0, 0);
    copy_given(x, src, n);
    return x;
}

// ----------------------------------------------------------------------------
// layers, in the order of megalodon.c: forward, backward, cases

static void embedding_f(void) { embedding_forward(out, ids, weight, 3, R, d.D); }
static void embedding_b(void) { embedding_backward(dweight, dout, ids, 3, R, d.D); }
static void test_embedding(void) {
    int32_t tokens[9] = {3, 1, 3, 0, 6, 3, 1, 2, 6}; // 4 and 5 do not occur
    ids = tokens, R = 9, d = (Dims){.D = 67};
    INPUT(weight, 7 * d.D, ADDED, 1, 0);
    OUTPUT(out, R * d.D);
    gradcheck("embedding", embedding_f, embedding_b);
}

static void dropout_f(void) { dropout(out, inp, mask, (size_t)R); }
static void dropout_b(void) { dropout(dinp, dout, mask, (size_t)R); }
static void test_dropout(void) {
    R = 37, mask = (Mask){.p = 0.3, .seed = 9, .first = 3};
    INPUT(inp, R, SET, 1, 0);
    OUTPUT(out, R);
    gradcheck("dropout", dropout_f, dropout_b);
}

// The gradient w.r.t. the outgoing state enters as the sums U, V, W that later tokens would leave.
static NormState start(void) { return (NormState){count, prev_mean, prev_m2}; }
static void timestep_norm_f(void) {
    timestep_norm_forward(out, mean, rstd, (NormState){NULL, next_mean, next_m2}, inp, weight, bias, start(), d, EPS);
}
static void timestep_norm_b(void) {
    int groups = d.B * d.G, g = d.D / d.G;
    double *dstate = prev_mean ? numbers(3 * (size_t)groups, 0, 0) : NULL;
    for (int i = 0; i < groups && dstate; i++) {
        double before = (double)g * (double)count[i / d.G];
        dstate[3 * i] = dnext_mean[i] / (before + g * d.L);
        dstate[3 * i + 1] = dnext_m2[i];
        dstate[3 * i + 2] = dnext_m2[i] * next_mean[i];
    }
    timestep_norm_backward(dinp, dweight, dbias, dstate, dout, NULL, inp, weight, mean, rstd, count, d);
    for (int i = 0; i < groups && dstate; i++) { // the gradient w.r.t. the incoming state from these sums
        double before = (double)g * (double)count[i / d.G], U = dstate[3 * i], V = dstate[3 * i + 1];
        dprev_mean[i] = before * (U + 2 * (prev_mean[i] * V - dstate[3 * i + 2]));
        dprev_m2[i] = V;
    }
    free(dstate);
}
// Two more paths from inp to the loss, by factors 2 and -3: their gradients are the residuals, one of them dinp itself.
static void residuals_f(void) {
    timestep_norm_f();
    for (int i = 0; i < d.B * d.L * d.D; i++) residual0[i] = 2 * inp[i], residual1[i] = -3 * inp[i];
}
static void residuals_b(void) {
    real *first = numbers((size_t)d.B * d.L * d.D, 0, 0);
    for (int i = 0; i < d.B * d.L * d.D; i++) first[i] = 2 * dresidual0[i], dinp[i] = -3 * dresidual1[i];
    const real *const residuals[2] = {first, dinp};
    timestep_norm_backward(dinp, dweight, dbias, NULL, dout, residuals, inp, weight, mean, rstd, NULL, d);
    free(first);
}
static void test_timestep_norm(void) {
    static const char *const titles[3] = {"timestep_norm", "timestep_norm, continued", "timestep_norm, residuals"};
    int64_t counts[2] = {5, 1000};
    d = (Dims){.B = 2, .L = 9, .D = 12, .G = 4};
    for (int kind = 0; kind < 3; kind++) {
        int size = d.B * d.L * d.D, moments = kind == 1 ? d.B * d.G : 0;
        count = kind == 1 ? counts : NULL;
        INPUT(inp, size, SET, 1, 0.5);
        INPUT(weight, d.D, ADDED, 1, 0), INPUT(bias, d.D, ADDED, 1, 0);
        INPUT(prev_mean, moments, SET, 1, 0.5), INPUT(prev_m2, moments, SET, 4, 12);
        OUTPUT(out, size), OUTPUT(next_mean, moments), OUTPUT(next_m2, moments);
        if (kind == 2) OUTPUT(residual0, size), OUTPUT(residual1, size);
        KEEP(mean, d.B * d.L * d.G), KEEP(rstd, d.B * d.L * d.G);
        gradcheck(titles[kind], kind == 2 ? residuals_f : timestep_norm_f, kind == 2 ? residuals_b : timestep_norm_b);
    }
    count = NULL;
}

static void cema_f(void) {
    Coeffs coeffs = coeffs_in(coeffs_memory, d.D, d.N);
    cema_coeffs_forward(&coeffs, alpha, delta, theta, gamma_, CEMA_COMPLEX, d.D, d.N);
    cema_forward(out, h_blocks, h_out, inp, &coeffs, omega, h_in, d);
}
static void cema_b(void) {
    Coeffs coeffs = coeffs_in(coeffs_memory, d.D, d.N), dcoeffs = coeffs_in(dcoeffs_memory, d.D, d.N);
    copy_given(dh_in, dh_out, d.B * 2 * d.N * d.D);
    cema_backward(dinp, &dcoeffs, domega, dh_in, dout, inp, h_blocks, &coeffs, omega, d);
    cema_coeffs_backward(dalpha, ddelta, dtheta, dgamma_, &dcoeffs, alpha, delta, theta, CEMA_COMPLEX, d.D, d.N);
}
static void cema_case(int L, int D, int N, int state) {
    d = (Dims){.B = 2, .L = L, .D = D, .N = N};
    int h = state ? d.B * 2 * N * D : 0;
    size_t coeffs = 5 * N * coeffs_stride(D);
    INPUT(inp, d.B * L * D, SET, 1, 0);
    INPUT(alpha, D * N, ADDED, 1, 0), INPUT(delta, D * N, ADDED, 1, 0);
    INPUT(theta, D, ADDED, 1, -1), INPUT(gamma_, 2 * D * N, ADDED, 1, 0), INPUT(omega, D, ADDED, 1, 0);
    INPUT(h_in, h, SET, 1, 0);
    OUTPUT(out, d.B * L * D), OUTPUT(h_out, h);
    KEEP(coeffs_memory, coeffs), KEEP(dcoeffs_memory, coeffs);
    KEEP(h_blocks, d.B * ceil_div(L, CEMA_BLOCK) * 2 * N * D);
    char title[64];
    snprintf(title, sizeof title, "cema, L %d D %d N %d%s", L, D, N, state ? ", continued" : "");
    gradcheck(title, cema_f, cema_b);
}
static void test_cema(void) {
    cema_case(5, STRIP + 3, 1, 1);
    cema_case(CEMA_BLOCK, 3, 4, 1);
    cema_case(CEMA_BLOCK + 1, STRIP, 4, 0);
    cema_case(2 * CEMA_BLOCK + 11, 3, 16, 1);
}

static void rmsnorm_f(void) { rmsnorm_forward(out, rstd, inp, weight, R, d.D, EPS); }
static void rmsnorm_b(void) { rmsnorm_backward(dinp, dweight, dout, inp, weight, rstd, R, d.D); }
static void test_rmsnorm(void) {
    R = 5, d = (Dims){.D = COLUMNS + 3};
    for (int affine = 0; affine < 2; affine++) {
        INPUT(inp, R * d.D, SET, 1, 0.3);
        INPUT(weight, affine ? d.D : 0, ADDED, 1, 0);
        OUTPUT(out, R * d.D);
        KEEP(rstd, R);
        gradcheck(affine ? "rmsnorm" : "rmsnorm without weight", rmsnorm_f, rmsnorm_b);
    }
}

// residual: none; another tensor; or out itself, whose elements are an input then. With one, dinp is added to, too.
enum { K = 13, M = 11 };
static void linear_f(void) {
    if (add_to) memcpy(out, residual, (size_t)R * M * sizeof *out);
    linear_forward(out, add_to ? out : residual, inp, weight, bias, R, K, M);
}
static void linear_b(void) {
    linear_backward(dinp, residual != NULL, dweight, dbias, dout, inp, weight, R, K, M);
    copy_given(dresidual, residual ? dout : NULL, R * M);
}
static void test_linear(void) {
    static const char *const residuals[3] = {"", ", residual", ", residual is out"};
    for (int form = 0; form < 12; form++) {
        int kind = form / 4;
        R = form & 1 ? 1 : 7, add_to = kind == 2;
        INPUT(inp, R * K, kind > 0 ? ADDED : SET, 1, 0);
        INPUT(weight, M * K, ADDED, 1, 0), INPUT(bias, form & 2 ? M : 0, ADDED, 1, 0);
        INPUT(residual, kind > 0 ? R * M : 0, SET, 1, 0);
        OUTPUT(out, R * M);
        char title[64];
        snprintf(title, sizeof title, "linear, R %d%s%s", R, bias ? ", bias" : "", residuals[kind]);
        gradcheck(title, linear_f, linear_b);
    }
}

static void qk_f(void) { qk_forward(q, k, zn, gamma_, beta, R, d.Z, d.Z / d.H); }
static void qk_b(void) { qk_backward(dzn, dgamma_, dbeta, dq, dk, zn, gamma_, R, d.Z, d.Z / d.H); }
static void qk_in_place_b(void) { // dzn in the place of dq, as the model has it
    copy_given(dzn, dq, R * d.Z);
    qk_backward(dzn, dgamma_, dbeta, dzn, dk, zn, gamma_, R, d.Z, d.Z / d.H);
}
static void test_qk(void) {
    R = 5, d = (Dims){.Z = COLUMNS + 2, .H = 3};
    for (int in_place = 0; in_place < 2; in_place++) {
        INPUT(gamma_, 2 * d.Z, ADDED, 1, 0), INPUT(beta, 2 * d.Z, ADDED, 1, 0);
        INPUT(zn, R * d.Z, SET, 1, 0);
        OUTPUT(q, R * d.Z), OUTPUT(k, R * d.Z);
        gradcheck(in_place ? "qk, in place" : "qk", qk_f, in_place ? qk_in_place_b : qk_b);
    }
}

static void rope_f(void) {
    rope_table(table, d.C, d.Z / d.H, 100);
    rope_forward(out, inp, table, count, d);
}
static void rope_b(void) { // in place, as the model does
    copy_given(dinp, dout, d.B * d.L * d.Z);
    rope_backward(dinp, dinp, table, count, d);
}
static void test_rope(void) {
    int64_t counts[2] = {3, 1000000000007};
    d = (Dims){.B = 2, .L = 11, .C = 5, .H = 2, .Z = 12};
    for (int state = 0; state < 2; state++) {
        count = state ? counts : NULL;
        INPUT(inp, d.B * d.L * d.Z, SET, 1, 0);
        OUTPUT(out, d.B * d.L * d.Z);
        KEEP(table, d.C * d.Z / d.H);
        gradcheck(state ? "rope, continued" : "rope", rope_f, rope_b);
    }
    count = NULL;
}

static void qk_layer_f(void) {
    if (table) rope_table(table, d.C, d.Z / d.H, 100);
    qk_layer_forward(q, k, zn, z_rstd, z, gamma_, beta, table, NULL, d, EPS);
}
static void qk_layer_b(void) {
    real *dq_copy = copy_of(dq, d.B * d.L * d.Z), *dk_copy = copy_of(dk, d.B * d.L * d.Z);
    qk_layer_backward(dz, dgamma_, dbeta, dq_copy, dk_copy, zn, z_rstd, z, gamma_, table, d);
    free(dq_copy), free(dk_copy);
}
// Standard attention: q . k = (z (gamma0+1)) . (z (gamma1+1))/sqrt(dz) in each head, without beta.
static void test_standard_attention(void) {
    enum { Z = 32, H = 2, DZ = Z / H };
    const Dims dims = {.B = 1, .L = 1, .H = H, .Z = Z, .attention = ATTENTION_STANDARD};
    real *x = numbers(Z, 1, 0), *scales = numbers(2 * Z, 1, 0), shifts[2 * Z] = {0}, both[2][Z];
    qk_layer_forward(both[0], both[1], NULL, NULL, x, scales, shifts, NULL, NULL, dims, EPS);
    for (int h = 0; h < H; h++) {
        double score = 0, expected = 0;
        for (int c = h * DZ; c < (h + 1) * DZ; c++) {
            score += both[0][c] * both[1][c];
            expected += x[c] * (scales[c] + 1) * x[c] * (scales[Z + c] + 1) / sqrt(DZ);
        }
        check("a score of standard attention = its definition", &score, &expected, 1, 1e-13);
    }
    free(x), free(scales);
}

static void test_qk_layer(void) {
    d = (Dims){.B = 2, .L = 7, .C = 5, .H = 3, .Z = 12};
    for (int rotated = 0; rotated < 2; rotated++) {
        int size = d.B * d.L * d.Z;
        INPUT(z, size, SET, 1, 0);
        INPUT(gamma_, 2 * d.Z, ADDED, 1, 0), INPUT(beta, 2 * d.Z, ADDED, 1, 0);
        OUTPUT(q, size), OUTPUT(k, size);
        KEEP(zn, size), KEEP(z_rstd, d.B * d.L * d.H), KEEP(table, rotated ? d.C * d.Z / d.H : 0);
        gradcheck(rotated ? "qk_layer" : "qk_layer, not rotated", qk_layer_f, qk_layer_b);
    }
}

// silu and gate: the gradient may take the place of dout, as the model has it. out is also computed again.
static void silu_f(void) { silu_forward(out, inp, (size_t)R); }
static void silu_b(void) {
    copy_given(dinp, dout, R);
    silu_backward(NULL, dinp, dinp, inp, (size_t)R);
}
static void gate_f(void) { gate_forward(out, a, b, (size_t)R); }
static void gate_b(void) {
    copy_given(da, dout, R);
    gate_backward(NULL, da, db, da, a, b, (size_t)R);
}
static void silu_again_b(void) { silu_backward(out, dinp, dout, inp, (size_t)R); }
static void gate_again_b(void) { gate_backward(out, da, db, dout, a, b, (size_t)R); }
static void test_gates(void) {
    R = 37;
    for (int again = 0; again < 2; again++) {
        INPUT(inp, R, SET, 4, 0);
        OUTPUT(out, R);
        gradcheck(again ? "silu, out again" : "silu", silu_f, again ? silu_again_b : silu_b);
        INPUT(a, R, SET, 1, 0), INPUT(b, R, SET, 4, 0);
        OUTPUT(out, R);
        gradcheck(again ? "gate, out again" : "gate", gate_f, again ? gate_again_b : gate_b);
    }
    real *x = numbers(37, 4, 0), *y = numbers(37, 1, 0), *forward = numbers(37, 0, 0), *again = numbers(37, 0, 0);
    real *dx = numbers(37, 0, 0), *dy = numbers(37, 0, 0);
    silu_forward(forward, x, 37), silu_backward(again, dx, y, x, 37);
    check("silu_backward's out = silu_forward's", again, forward, 37, 1e-15);
    gate_forward(forward, y, x, 37), gate_backward(again, dx, dy, y, y, x, 37);
    check("gate_backward's out = gate_forward's", again, forward, 37, 1e-15);
    free(x), free(y), free(forward), free(again), free(dx), free(dy);
}

// One head of two in a chunk: rows are longer than a head.
static int nq, nk;
static QueryTile tile(void) { return (QueryTile){.q = q, .k = k, .v = v, .nq = nq, .nk = nk, .mask = mask}; }
static void attention_chunk_f(void) {
    const QueryTile t = tile();
    memset(out, 0, (size_t)nq * d.E * sizeof *out); // the other head's columns are not written
    attention_chunk_forward(out, lse, scores, &t, d);
}
static void attention_chunk_b(void) {
    const QueryTile t = tile();
    memset(dq, 0, (size_t)nq * d.Z * sizeof *dq);
    attention_chunk_backward(dq, dk, dv, scores, scores + nq * nk, 1, dout, lse, &t, d);
}
static void attention_chunk_case(int queries, int keys, double p) {
    nq = queries, nk = keys, d = (Dims){.H = 2, .Z = 4, .E = 6, .C = 64};
    mask = (Mask){.p = p, .seed = 5, .first = 7};
    INPUT(q, nq * d.Z, SET, 2, 0);
    INPUT(k, nk * d.Z, ADDED, 2, 0), INPUT(v, nk * d.E, ADDED, 1, 0); // cached ones, too
    OUTPUT(out, nq * d.E);
    KEEP(lse, nq * d.H), KEEP(scores, 2 * nq * nk);
    char title[64];
    snprintf(title, sizeof title, "attention_chunk, %d queries, %d keys, dropout %g", nq, nk, p);
    gradcheck(title, attention_chunk_f, attention_chunk_b);
}

static void attention_f(void) { attention_forward(out, lse, NULL, NULL, scores, q, k, v, NULL, mask, d, 1); }
static void attention_b(void) { attention_backward(dq, dk, dv, scores, dout, lse, q, k, v, mask, d, 1); }
static void attention_case(int L, int C, int H, double p) {
    d = (Dims){.B = 2, .L = L, .C = C, .H = H, .Z = 2 * H, .E = 3 * H};
    mask = (Mask){.p = p, .seed = 3, .layer = 1, .row = (uint64_t)L * (uint64_t)C};
    R = d.B * L;
    INPUT(q, R * d.Z, SET, 2, 0), INPUT(k, R * d.Z, SET, 2, 0), INPUT(v, R * d.E, SET, 1, 0);
    OUTPUT(out, R * d.E);
    KEEP(lse, R * H), KEEP(scores, 2 * QUERY_TILE * C);
    char title[64];
    snprintf(title, sizeof title, "attention, L %d C %d, %d heads, dropout %g", L, C, H, p);
    gradcheck_some(title, attention_f, attention_b, L > QUERY_TILE ? 12 : ELEMENTS);
}
static void test_attention(void) {
    attention_chunk_case(1, 7, 0), attention_chunk_case(6, 6, 0), attention_chunk_case(5, 11, 0);
    attention_chunk_case(5, 11, 0.3);
    for (int H = 1; H <= 3; H += 2) {
        attention_case(5, 8, H, 0), attention_case(8, 8, H, 0), attention_case(16, 8, H, 0.5);
        attention_case(19, 8, H, 0), attention_case(QUERY_TILE + 13, QUERY_TILE + 10, H, 0.1);
    }
}

static void layernorm_f(void) { layernorm_forward(out, mean, rstd, inp, weight, bias, R, d.D, EPS); }
static void layernorm_b(void) { layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, R, d.D); }
static void test_layernorm(void) {
    R = 5, d = (Dims){.D = COLUMNS + 3};
    for (int affine = 0; affine < 2; affine++) {
        INPUT(inp, R * d.D, SET, 1, 0.3);
        INPUT(weight, affine ? d.D : 0, ADDED, 1, 0), INPUT(bias, affine ? d.D : 0, ADDED, 1, 0);
        OUTPUT(out, R * d.D);
        KEEP(mean, R), KEEP(rstd, R);
        gradcheck(affine ? "layernorm" : "layernorm without affine", layernorm_f, layernorm_b);
    }
}

static void rescale_f(void) { rescale_forward(out, inp, alpha, R, d.D); }
static void rescale_b(void) { rescale_backward(dinp, dalpha, dout, inp, alpha, R, d.D); }
static void test_rescale(void) {
    R = 5, d = (Dims){.D = 13};
    INPUT(inp, R * d.D, SET, 1, 0), INPUT(alpha, d.D, ADDED, 1, 0);
    OUTPUT(out, R * d.D);
    gradcheck("rescale", rescale_f, rescale_b);
}

// The loss is itself the sum that the gradient is of, so there is one output, and grad_scale is its weight.
static void output_loss_f(void) {
    double losses[LOGIT_ROWS + 9];
    output_loss(losses, NULL, NULL, scores, inp, weight, ids, 0, R, d.D, d.V);
    out[0] = 0;
    for (int r = 0; r < R; r++) out[0] += losses[r];
}
static void output_loss_b(void) {
    double losses[LOGIT_ROWS + 9];
    output_loss(losses, dinp, dweight, scores, inp, weight, ids, dout[0], R, d.D, d.V);
}
static void test_output_loss(void) {
    static const int rows[3] = {1, 7, LOGIT_ROWS + 9};
    int32_t targets[LOGIT_ROWS + 9];
    for (int i = 0; i < 3; i++) {
        d = (Dims){.D = 5, .V = i < 2 ? 11 : LOGITS / LOGIT_ROWS}; // the third has more rows than a block of logits
        R = rows[i], ids = targets;
        for (int r = 0; r < R; r++) targets[r] = r % 3 == 1 ? -1 : (7 * r + 2) % d.V;
        INPUT(inp, R * d.D, SET, 2, 0), INPUT(weight, d.V * d.D, ADDED, 1, 0);
        OUTPUT(out, 1);
        KEEP(scores, (size_t)min(logit_rows(d.V), R) * d.V);
        char title[64];
        snprintf(title, sizeof title, "output_loss, R %d", R);
        gradcheck_some(title, output_loss_f, output_loss_b, i < 2 ? ELEMENTS : 12);
    }
}

// ----------------------------------------------------------------------------
// The worked examples of dev/notes: timestep-norm.md, cema.md, attention.md, block.md, parallel-in-time.md. The numbers
// are those of the pages. Exact fractions are compared to 1e-12, numbers that the pages round to 1e-4.

#define SAME(name, a, tol, ...)                                                                                        \
    check("worked examples of dev/notes, " name, a, (const double[]){__VA_ARGS__},                                     \
          sizeof((const double[]){__VA_ARGS__}) / sizeof(double), tol)

static void test_page_timestep_norm(void) {
    const real x[4] = {0, 4, 3, 3}, w[2] = {0, 0}, bs[2] = {0, 0}, dy[4] = {1, 0, 0, 3};
    const NormState none = {NULL, NULL, NULL};
    const Dims size = {.B = 1, .L = 2, .D = 2, .G = 1};
    real y[4], r[2], dx[4], dw[2] = {0}, dbs[2] = {0};
    double m[2], m_end, m2_end, sums[3] = {0};
    timestep_norm_forward(y, m, r, (NormState){NULL, &m_end, &m2_end}, x, w, bs, none, size, 0);
    SAME("timestep_norm: y", y, 1e-12, -1, 1, 1. / 3, 1. / 3);
    SAME("timestep_norm: mean", m, 1e-12, 2, 2.5);
    SAME("timestep_norm: rstd", r, 1e-12, 1. / 2, 2. / 3);
    SAME("timestep_norm: M2", &m2_end, 1e-12, 9);
    timestep_norm_backward(dx, dw, dbs, sums, dy, NULL, x, w, m, r, NULL, size);
    SAME("timestep_norm: dx", dx, 1e-12, -2. / 9, -2. / 3, -5. / 9, 13. / 9);
    SAME("timestep_norm: U, V, W", sums, 1e-12, -3. / 4, 1. / 144, -1. / 72);
    SAME("timestep_norm: dweight", dw, 1e-12, -1, 1);
    SAME("timestep_norm: dbias", dbs, 1e-12, 1, 3);
}

static void test_page_cema(void) {
    enum { L = 3 };
    const real x[L] = {4, 8, 0}, dy[L] = {1, 0, 2}, om[1] = {0.5}, g[2] = {1, -1}, zero[1] = {0}, th[1] = {-log(3)};
    const Dims size = {.B = 1, .L = L, .D = 1, .N = 1};
    const size_t n = coeffs_stride(1);
    real *memory = calloc(10 * n, sizeof *memory), y[L], h[2], h_start[2], dx[L], dh[2] = {0}, dom[1] = {0};
    Coeffs c = coeffs_in(memory, 1, 1), dc = coeffs_in(memory + 5 * n, 1, 1);
    cema_coeffs_forward(&c, zero, zero, th, g, CEMA_COMPLEX, 1, 1);
    const real pqg[5] = {c.p[0], c.q_re[0], c.q_im[0], c.g_re[0], c.g_im[0]};
    SAME("cema: p, q, g", pqg, 1e-12, 0.5, 0, 0.75, 1, -1);
    cema_forward(y, h_start, h, x, &c, om, NULL, size);
    SAME("cema: y", y, 1e-12, 4, 9.5, 1.875);
    SAME("cema: h_3", h, 1e-12, -1.125, 3);
    cema_backward(dx, &dc, dom, dh, dy, x, h_start, &c, om, size);
    SAME("cema: dx", dx, 1e-12, 0.4375, 0.75, 2);
    const real dpqg[6] = {dc.p[0], dc.q_re[0], dc.q_im[0], dc.g_re[0], dc.g_im[0], dom[0]};
    SAME("cema: dp, dq, dg, domega", dpqg, 1e-12, 11.5, 14, 2, -0.25, -6, 4);
    SAME("cema: dL/dh_0", dh, 1e-12, -0.09375, 0.09375);
    real grads[5] = {0};
    cema_coeffs_backward(grads, grads + 1, grads + 2, grads + 3, &dc, zero, zero, th, CEMA_COMPLEX, 1, 1);
    SAME("cema: dalpha, ddelta, dtheta, dgamma", grads, 1e-5, 2.625, -0.25, -12.3700, -0.25, -6);
    free(memory);
}

// RMSNorm, q and k, the rotation and attention of one head: two tokens, dz 2, dv 1.
static void test_page_attention(void) {
    enum { L = 2, Z = 2 };
    const real z_in[L * Z] = {3, 4, 0, 1}, gamma[2 * Z] = {1, 1, 0, 0}, zero[2 * Z] = {0}, value[L] = {3, 1};
    const real do_[L] = {1, 2};
    const Dims size = {.B = 1, .L = L, .C = L, .H = 1, .Z = Z, .E = 1};
    real q_[L * Z], k_[L * Z], zn_[L * Z], r[L], turns[L * Z], o[L], l[L], s[2 * QUERY_TILE * L];
    real dq_[L * Z], dk_[L * Z], dv_[L], dz_[L * Z], dg[2 * Z] = {0}, db_[2 * Z] = {0};
    rope_table(turns, L, Z, 10000);
    qk_layer_forward(q_, k_, zn_, r, z_in, gamma, zero, turns, NULL, size, 0);
    SAME("attention: q'", q_, 1e-4, 1.2, 1.6, -1.6829, 1.0806);
    SAME("attention: k'", k_, 1e-4, 0.6, 0.8, -0.8415, 0.5403);
    attention_forward(o, l, NULL, NULL, s, q_, k_, value, NULL, (Mask){0}, size, 1);
    SAME("attention: P of query 2", s + L, 1e-3, 0.1048, 0.8952);
    SAME("attention: o", o, 1e-4, 3, 1.2095);
    SAME("attention: lse", l, 1e-4, 2, 2.1107);
    attention_backward(dq_, dk_, dv_, s, do_, l, q_, k_, value, (Mask){0}, size, 1);
    SAME("attention: dv", dv_, 1e-4, 1.2095, 1.7905);
    SAME("attention: dq'", dq_, 1e-4, 0, 0, 0.5408, 0.0974);
    SAME("attention: dk'", dk_, 1e-4, -0.6314, 0.4054, 0.6314, -0.4054);
    qk_layer_backward(dz_, dg, db_, dq_, dk_, zn_, r, z_in, gamma, turns, size);
    SAME("attention: dz", dz_, 1e-4, -0.1197, 0.0898, 0.7484, 0);
    SAME("attention: dgamma", dg, 1e-4, 0, -0.4024, -0.3788, -0.4260);
    SAME("attention: dbeta", db_, 1e-4, 0.3742, -0.4024, -0.6314, -0.3449);
}

// LayerNorm, swiglu and the second product of an FFN: one token, D 4, F 1.
static void test_page_block(void) {
    enum { D = 4 };
    const real x[D] = {1, 0, 2, 1}, y[D] = {1, 1, 3, 3}, w1[D] = {0, 0, log(3), 0}, w3[D] = {1, 0, 1, 2};
    const real w2[D] = {1, 0, 0, -1}, dy_out[D] = {1, 0, 0, 2};
    double m[1];
    real u[D], r[1], f1[1], f3[1], hidden[1], o[D], df1[1], df3[1], du[D], dy[D];
    real dw1[D] = {0}, dw2[D] = {0}, dw3[D] = {0};
    layernorm_forward(u, m, r, y, NULL, NULL, 1, D, 0);
    SAME("block: u", u, 1e-12, -1, -1, 1, 1);
    linear_forward(f1, NULL, u, w1, NULL, 1, D, 1);
    linear_forward(f3, NULL, u, w3, NULL, 1, D, 1);
    gate_forward(hidden, f3, f1, 1);
    linear_forward(o, x, hidden, w2, NULL, 1, 1, D);
    SAME("block: f1", f1, 1e-4, 1.0986);
    SAME("block: f3", f3, 1e-12, 2);
    SAME("block: out", o, 1e-4, 2.6479, 0, 2, -0.6479);
    linear_gate_backward(hidden, df3, df1, NULL, dy_out, w2, f3, f1, (Mask){0}, 1, 1, D);
    SAME("block: hidden", hidden, 1e-4, 1.6479);
    SAME("block: df1", df1, 1e-4, -1.9120);
    SAME("block: df3", df3, 1e-4, -0.8240);
    linear_backward(du, 0, dw3, NULL, df3, u, w3, 1, D, 1);
    linear_backward(du, 1, dw1, NULL, df1, u, w1, 1, D, 1);
    linear_backward_weight(dw2, NULL, dy_out, hidden, 1, 1, D);
    SAME("block: du", du, 1e-4, -0.8240, 0, -2.9245, -1.6479);
    SAME("block: dW1", dw1, 1e-4, 1.9120, 1.9120, -1.9120, -1.9120);
    SAME("block: dW2", dw2, 1e-4, 1.6479, 0, 0, 3.2958);
    SAME("block: dW3", dw3, 1e-4, 0.8240, 0.8240, -0.8240, -0.8240);
    layernorm_backward(dy, NULL, NULL, du, y, NULL, m, r, 1, D);
    SAME("block: dy", dy, 1e-3, -0.4120, 0.4120, -0.6383, 0.6383);
}

// Two parts of a sequence: TimestepNorm's tokens (0,4) and (3,3); CEMA's x = (4,8) and (4,0).
static void test_page_parallel(void) {
    const int64_t one[2] = {1, 1}, two[2] = {2, 2};
    ChunkParallel cp = {.cp_rank = 1, .cp_size = 2, .lengths = one};
    const real x_norm[2][2] = {{0, 4}, {3, 3}}, dy_norm[2] = {0, 3}, w[2] = {0, 0};
    const Dims token = {.B = 1, .L = 1, .D = 2, .G = 1};
    double all[4], start[2] = {0}, end[2], m[1] = {2.5};
    for (int i = 0; i < 2; i++) timestep_norm_reduce((NormState){NULL, all + 2 * i, all + 2 * i + 1}, x_norm[i], token);
    SAME("parallel: moments of each part", all, 1e-12, 2, 8, 3, 0);
    timestep_norm_combine((NormState){NULL, start, start + 1}, (NormState){NULL, end, end + 1}, all, NULL, &cp, token);
    SAME("parallel: moments before B", start, 1e-12, 2, 8);
    SAME("parallel: moments after B", end, 1e-12, 2.5, 9);
    double sums[3];
    const real r[1] = {2. / 3};
    const int64_t before[1] = {1};
    timestep_norm_reduce_backward(sums, dy_norm, x_norm[1], w, m, r, before, token);
    SAME("parallel: U, V, W of B", sums, 1e-12, -1. / 2, -1. / 18, -5. / 36);

    const real x[2][2] = {{4, 8}, {4, 0}}, dy[2][2] = {{1, 0}, {2, 0}}, g[2] = {1, -1}, zero[1] = {0};
    const real th[1] = {-log(3)}, om[1] = {0.5};
    const Dims part = {.B = 1, .L = 2, .D = 1, .N = 1};
    real *memory = calloc(5 * coeffs_stride(1), sizeof *memory), alone[4], h[2] = {0}, h_end[2], y[2];
    Coeffs c = coeffs_in(memory, 1, 1);
    cema_coeffs_forward(&c, zero, zero, th, g, CEMA_COMPLEX, 1, 1);
    cp.lengths = two;
    for (int i = 0; i < 2; i++) cema_reduce(alone + 2 * i, x[i], &c, 0, part);
    SAME("parallel: h_alone", alone, 1e-12, 4, 1.5, 0, 1.5);
    cema_combine(h, h_end, alone, &c, 0, &cp, part);
    SAME("parallel: h before B", h, 1e-12, 4, 1.5);
    SAME("parallel: h after B", h_end, 1e-12, -2.25, 0.65625);
    cema_forward(y, NULL, NULL, x[1], &c, om, h, part);
    SAME("parallel: y of B", y, 1e-12, 5.875, -1.59375);
    for (int i = 0; i < 2; i++) cema_reduce(alone + 2 * i, dy[i], &c, 1, part);
    SAME("parallel: F_alone", alone, 1e-12, 0.75, -0.75, 1.5, -1.5);
    cp.cp_rank = 0, h[0] = h[1] = 0;
    cema_combine(h, h_end, alone, &c, 1, &cp, part);
    SAME("parallel: dL/dh after A", h, 1e-12, 1.5, -1.5);
    SAME("parallel: dL/dh_0", h_end, 1e-12, -0.09375, 0.09375);
    free(memory);
}

static void test_pages(void) {
    test_page_timestep_norm();
    test_page_cema();
    test_page_attention();
    test_page_block();
    test_page_parallel();
}

int main(void) {
    megalodon_threads(1); // such small layers are slower with more threads
    printf("%-48s %9s  %6s\n", "", "rel. L2", "tol");
    test_comparing();
    test_matmul();
    test_cema_definition(0);
    test_cema_definition(1);
    test_cema_real();
    test_timestep_norm_definition();
    test_row_norms();
    test_attention_definition();
    test_dropout_definition();
    test_embedding();
    test_dropout();
    test_timestep_norm();
    test_cema();
    test_rmsnorm();
    test_linear();
    test_qk();
    test_rope();
    test_standard_attention();
    test_qk_layer();
    test_gates();
    test_attention();
    test_layernorm();
    test_rescale();
    test_output_loss();
    test_pages();
    test_matvec(); // these two last, since they set the number of threads
    test_cema_token();
    return check_done();
}
