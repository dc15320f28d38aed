// Every layer of megalodon.c by itself, in double precision: its backward pass against central differences of
// its forward pass, for every input, parameter and incoming state; and its forward pass against the
// definition written plainly. Build: -DMEGALODON_DOUBLE, with plumbing/params.c; megalodon.c is included,
// since layers are static.
#include "../megalodon.c"
#include "check.h"

static const double EPS = 1e-5;
enum { SLOTS = 8, ELEMENTS = 200 };

// A layer at work on numbers of ours. The loss is the sum of all outputs, each times a random weight; dout
// holds these weights, since they are the gradients by the outputs. An outgoing state is an output like
// others.
typedef struct Case Case;
struct Case {
    void (*forward)(Case *c), (*backward)(Case *c);
    int B, L, D, N, G, C, H, Z, E, R, K, M, V, nq, nk, add;
    size_t elements; // whose gradient is checked; 0: ELEMENTS
    int64_t *count;
    int32_t *tokens;
    Mask mask;
    int num_in, num_out, num_kept;
    const char *name[SLOTS];
    real *in[SLOTS], *din[SLOTS], *out[SLOTS], *dout[SLOTS], *kept[SLOTS]; // NULL: of no elements, left out
    size_t in_size[SLOTS], out_size[SLOTS], kept_size[SLOTS];
    int added[SLOTS]; // the gradient by this input is added to what is there, not set
};

static real *numbers(size_t n, double scale, double shift) {
    static uint64_t seed = 1;
    real *x = n ? malloc(n * sizeof *x) : NULL;
    random_fill(x, n, seed++, scale, shift);
    return x;
}

static void poison(real *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = NAN;
}

enum { SET, ADDED };
static void input(Case *c, const char *name, size_t n, int added, double scale, double shift) {
    int i = c->num_in++;
    c->name[i] = name, c->in_size[i] = n, c->added[i] = added;
    c->in[i] = numbers(n, scale, shift);
    c->din[i] = numbers(n, 1, 0);
}
static void output(Case *c, size_t n) {
    int i = c->num_out++;
    c->out_size[i] = n;
    c->out[i] = numbers(n, 1, 0);
    c->dout[i] = numbers(n, 1, 0);
}
static void keep(Case *c, size_t n) { // what the forward pass leaves for the backward pass
    int i = c->num_kept++;
    c->kept_size[i] = n;
    c->kept[i] = numbers(n, 1, 0);
}

static void run_forward(Case *c) {
    for (int i = 0; i < c->num_out; i++) poison(c->out[i], c->out_size[i]);
    for (int i = 0; i < c->num_kept; i++) poison(c->kept[i], c->kept_size[i]);
    c->forward(c);
}

static double loss(void *context) {
    Case *c = context;
    double sum = 0;
    run_forward(c);
    for (int i = 0; i < c->num_out; i++) {
        for (size_t k = 0; k < c->out_size[i]; k++) sum += c->dout[i][k] * c->out[i][k];
    }
    return sum;
}

static void gradcheck(Case *c, const char *title) {
    char name[96];
    real *before[SLOTS];
    for (int i = 0; i < c->num_in; i++) {
        if (!c->added[i]) poison(c->din[i], c->in_size[i]);
        before[i] = numbers(c->in_size[i], 0, 0);
        if (c->added[i] && c->in[i]) memcpy(before[i], c->din[i], c->in_size[i] * sizeof(real));
    }
    run_forward(c);
    c->backward(c);
    for (int i = 0; i < c->num_in; i++) {
        for (size_t k = 0; k < c->in_size[i]; k++) c->din[i][k] -= before[i][k];
        snprintf(name, sizeof name, "%s: %s", title, c->name[i]);
        if (c->in[i])
            check_gradient(name, loss, c, c->in[i], c->din[i], c->in_size[i], c->elements ? c->elements : ELEMENTS,
                           1e-7);
    }
    for (int i = 0; i < c->num_in; i++) free(before[i]), free(c->in[i]), free(c->din[i]);
    for (int i = 0; i < c->num_out; i++) free(c->out[i]), free(c->dout[i]);
    for (int i = 0; i < c->num_kept; i++) free(c->kept[i]);
}

// ----------------------------------------------------------------------------
// the comparing function itself

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

static void test_gemm(void) {
    static const int sizes[][3] = {{1, 1, 1},     {7, 5, 3},   {6, 16, 64}, {13, 17, 1},
                                   {151, 19, 11}, {5, 141, 9}, {9, 7, 523}};
    for (int s = 0; s < (int)(sizeof sizes / sizeof *sizes); s++) {
        int M = sizes[s][0], N = sizes[s][1], K = sizes[s][2], ldc = N + 3;
        for (int form = 0; form < 16; form++) {
            int ta = form & 1, tb = form >> 1 & 1, add = form >> 2 & 1, lda = (ta ? M : K) + 2, ldb = (tb ? K : N) + 1;
            real *A = numbers((size_t)(ta ? K : M) * lda, 1, 0);
            real *B = numbers((size_t)(tb ? N : K) * ldb, 1, 0);
            real *bias = form >> 3 ? numbers((size_t)N, 1, 0) : NULL;
            real *C = numbers((size_t)M * ldc, 1, 0), *expected = malloc((size_t)M * ldc * sizeof *C);
            memcpy(expected, C, (size_t)M * ldc * sizeof *C);
            for (int i = 0; i < M; i++) {
                for (int j = 0; j < N; j++) {
                    double sum = 0;
                    for (int k = 0; k < K; k++) {
                        sum += A[ta ? k * lda + i : i * lda + k] * B[tb ? j * ldb + k : k * ldb + j];
                    }
                    expected[i * ldc + j] = sum + (add ? expected[i * ldc + j] : 0) + (bias ? bias[j] : 0);
                    if (!add) C[i * ldc + j] = NAN; // must not be read
                }
            }
            matmul(ta, tb, M, N, K, A, lda, B, ldb, add, bias, C, ldc);
            char name[96];
            snprintf(name, sizeof name, "matmul %dx%dx%d, A%s B%s%s%s", M, N, K, ta ? "'" : "", tb ? "'" : "",
                     add ? ", added" : "", bias ? ", bias" : "");
            check(name, C, expected, (size_t)M * ldc, 1e-14);
            free(A), free(B), free(C), free(expected), free(bias);
        }
    }
}

// ----------------------------------------------------------------------------
// layers, in the order of megalodon.c: forward, backward, cases

static void embedding_f(Case *c) { embedding_forward(c->out[0], c->tokens, c->in[0], 3, c->R, c->D); }
static void embedding_b(Case *c) { embedding_backward(c->din[0], c->dout[0], c->tokens, 3, c->R, c->D); }
static void test_embedding(void) {
    int32_t tokens[9] = {3, 1, 3, 0, 6, 3, 1, 2, 6}; // 4 and 5 do not occur
    Case c = {.forward = embedding_f, .backward = embedding_b, .tokens = tokens, .R = 9, .D = 67};
    input(&c, "embed", 7 * 67, ADDED, 1, 0);
    output(&c, 9 * 67);
    gradcheck(&c, "embedding");
}

static void timestep_norm_f(Case *c) {
    timestep_norm_forward(c->out[0], c->kept[0], c->kept[1], c->out[1], c->out[2], c->in[0], c->in[1], c->in[2],
                          c->in[3], c->in[4], c->count, c->B, c->L, c->D, c->G, EPS);
}
static void timestep_norm_b(Case *c) {
    double sums[2]
               [2 * 4 * 3]; // of these tokens alone; of later ones, as if gradients by the outgoing state were theirs
    const int64_t lengths[2] = {c->L, 0};
    const ChunkParallel pieces = {.cp_rank = 0, .cp_size = 2, .lengths = lengths};
    int rows = c->B * c->G, g = c->D / c->G;
    timestep_norm_backward(c->din[0], c->din[1], c->din[2], sums[0], c->dout[0], c->in[0], c->in[1], c->kept[0],
                           c->kept[1], c->count, c->B, c->L, c->D, c->G);
    for (int i = 0; i < rows && c->in[3]; i++) {
        double *later = sums[1] + 3 * i, before = (double)g * (double)c->count[i / c->G];
        later[0] = c->dout[1][i] / (before + g * c->L);
        later[1] = c->dout[2][i];
        later[2] = c->dout[2][i] * c->out[1][i];
        double U = sums[0][3 * i] + later[0], V = sums[0][3 * i + 1] + later[1], W = sums[0][3 * i + 2] + later[2];
        c->din[3][i] = before * (U + 2 * (c->in[3][i] * V - W));
        c->din[4][i] = V;
    }
    if (c->in[3]) timestep_norm_combine_backward(c->din[0], c->in[0], sums[0], &pieces, c->B, c->L, c->D, c->G);
}
static void test_timestep_norm(void) {
    int64_t count[2] = {5, 1000};
    for (int state = 0; state < 2; state++) {
        Case c = {.forward = timestep_norm_f, .backward = timestep_norm_b, .B = 2, .L = 9, .D = 12, .G = 4};
        size_t moments = state ? 2 * 4 : 0;
        if (state) c.count = count;
        input(&c, "inp", 2 * 9 * 12, SET, 1, 0.5);
        input(&c, "weight", 12, ADDED, 1, 0);
        input(&c, "bias", 12, ADDED, 1, 0);
        input(&c, "incoming mean", moments, SET, 1, 0.5);
        input(&c, "incoming m2", moments, SET, 4, 12);
        output(&c, 2 * 9 * 12);
        output(&c, moments), output(&c, moments);
        keep(&c, 2 * 9 * 4), keep(&c, 2 * 9 * 4);
        gradcheck(&c, state ? "timestep_norm, continued" : "timestep_norm");
    }
}

static Coeffs coeffs_in(real *memory, int D, int N) { // five arrays one after the other
    size_t n = (size_t)N * strip_channels(D);
    return (Coeffs){memory, memory + n, memory + 2 * n, memory + 3 * n, memory + 4 * n};
}
static void cema_f(Case *c) { // inp, alpha, delta, theta, gamma, omega, h
    Coeffs coeffs = coeffs_in(c->kept[0], c->D, c->N);
    cema_coeffs_forward(&coeffs, c->in[1], c->in[2], c->in[3], c->in[4], c->D, c->N);
    cema_forward(c->out[0], c->kept[2], c->out[1], c->in[0], &coeffs, c->in[5], c->in[6], c->B, c->L, c->D, c->N);
}
static void cema_b(Case *c) {
    Coeffs coeffs = coeffs_in(c->kept[0], c->D, c->N), dcoeffs = coeffs_in(c->kept[1], c->D, c->N);
    if (c->in[6]) memcpy(c->din[6], c->dout[1], c->out_size[1] * sizeof(real));
    cema_backward(c->din[0], &dcoeffs, c->din[5], c->din[6], c->dout[0], c->in[0], c->kept[2], &coeffs, c->in[5], c->B,
                  c->L, c->D, c->N);
    cema_coeffs_backward(c->din[1], c->din[2], c->din[3], c->din[4], &dcoeffs, c->in[1], c->in[2], c->in[3], c->D, c->N);
}
static void cema_case(int L, int D, int N, int state) {
    Case c = {.forward = cema_f, .backward = cema_b, .B = 2, .L = L, .D = D, .N = N};
    size_t modes = (size_t)D * N, coeffs = 5 * (size_t)N * strip_channels(D), h = state ? 2 * 2 * modes : 0;
    input(&c, "inp", 2 * (size_t)L * D, SET, 1, 0);
    input(&c, "alpha", modes, ADDED, 1, 0), input(&c, "delta", modes, ADDED, 1, 0);
    input(&c, "theta", (size_t)D, ADDED, 1, -1), input(&c, "gamma", 2 * modes, ADDED, 1, 0);
    input(&c, "omega", (size_t)D, ADDED, 1, 0);
    input(&c, "incoming h", h, SET, 1, 0);
    output(&c, 2 * (size_t)L * D), output(&c, h);
    keep(&c, coeffs), keep(&c, coeffs), keep(&c, 2 * (size_t)ceil_div(L, CEMA_BLOCK) * 2 * modes);
    char title[64];
    snprintf(title, sizeof title, "cema, L %d D %d N %d%s", L, D, N, state ? ", continued" : "");
    gradcheck(&c, title);
}
static void test_cema(void) {
    cema_case(5, STRIP + 3, 1, 1);
    cema_case(CEMA_BLOCK, 3, 4, 1);
    cema_case(CEMA_BLOCK + 1, STRIP, 4, 0);
    cema_case(2 * CEMA_BLOCK + 11, 3, 16, 1);
}

static void rmsnorm_f(Case *c) { rmsnorm_forward(c->out[0], c->kept[0], c->in[0], c->in[1], c->R, c->D, EPS); }
static void rmsnorm_b(Case *c) {
    rmsnorm_backward(c->din[0], c->din[1], c->dout[0], c->in[0], c->in[1], c->kept[0], c->R, c->D);
}
static void test_rmsnorm(void) {
    for (int weight = 0; weight < 2; weight++) {
        Case c = {.forward = rmsnorm_f, .backward = rmsnorm_b, .R = 5, .D = COLUMNS + 3};
        input(&c, "inp", (size_t)c.R * c.D, SET, 1, 0.3);
        input(&c, "weight", weight ? (size_t)c.D : 0, ADDED, 1, 0);
        output(&c, (size_t)c.R * c.D);
        keep(&c, (size_t)c.R);
        gradcheck(&c, weight ? "rmsnorm" : "rmsnorm without weight");
    }
}

static void linear_f(Case *c) { // with add, what is in out counts too, and is an input: the last
    if (c->add) memcpy(c->out[0], c->in[3], c->out_size[0] * sizeof(real));
    linear_forward(c->out[0], c->add, c->in[0], c->in[1], c->in[2], c->R, c->K, c->M);
}
static void linear_b(Case *c) {
    linear_backward(c->din[0], c->add, c->din[1], c->din[2], c->dout[0], c->in[0], c->in[1], c->R, c->K, c->M);
    if (c->add) memcpy(c->din[3], c->dout[0], c->out_size[0] * sizeof(real));
}
static void test_linear(void) {
    for (int form = 0; form < 8; form++) {
        int bias = form & 1, add = form >> 1 & 1, R = form & 4 ? 1 : 7;
        Case c = {.forward = linear_f, .backward = linear_b, .R = R, .K = 13, .M = 11, .add = add};
        input(&c, "inp", (size_t)R * 13, add ? ADDED : SET, 1, 0);
        input(&c, "weight", 11 * 13, ADDED, 1, 0);
        input(&c, "bias", bias ? 11 : 0, ADDED, 1, 0);
        input(&c, "what is added to", add ? (size_t)R * 11 : 0, SET, 1, 0);
        output(&c, (size_t)R * 11);
        char title[64];
        snprintf(title, sizeof title, "linear, R %d%s%s", R, bias ? ", bias" : "", add ? ", add" : "");
        gradcheck(&c, title);
    }
}

static void qk_f(Case *c) { qk_forward(c->out[0], c->out[1], c->in[0], c->in[1], c->in[2], c->R, c->Z, c->Z / c->H); }
static void qk_b(Case *c) {
    qk_backward(c->din[0], c->din[1], c->din[2], c->dout[0], c->dout[1], c->in[0], c->in[1], c->R, c->Z, c->Z / c->H);
}
static void test_qk(void) {
    Case c = {.forward = qk_f, .backward = qk_b, .R = 5, .Z = COLUMNS + 2, .H = 3};
    input(&c, "z", 5 * (size_t)c.Z, SET, 1, 0);
    input(&c, "gamma", 2 * (size_t)c.Z, ADDED, 1, 0), input(&c, "beta", 2 * (size_t)c.Z, ADDED, 1, 0);
    output(&c, 5 * (size_t)c.Z), output(&c, 5 * (size_t)c.Z);
    gradcheck(&c, "qk");
}

static void rope_f(Case *c) {
    rope_table(c->kept[0], c->C, c->Z / c->H, 100);
    rope_forward(c->out[0], c->in[0], c->kept[0], c->count, c->B, c->L, c->Z, c->Z / c->H, c->C);
}
static void rope_b(Case *c) { // in place, as the model does
    memcpy(c->din[0], c->dout[0], c->out_size[0] * sizeof(real));
    rope_backward(c->din[0], c->din[0], c->kept[0], c->count, c->B, c->L, c->Z, c->Z / c->H, c->C);
}
static void test_rope(void) {
    int64_t count[2] = {3, 1000000000007};
    for (int state = 0; state < 2; state++) {
        Case c = {.forward = rope_f, .backward = rope_b, .B = 2, .L = 11, .C = 5, .H = 2, .Z = 12};
        if (state) c.count = count;
        input(&c, "inp", 2 * 11 * 12, SET, 1, 0);
        output(&c, 2 * 11 * 12);
        keep(&c, 5 * 6);
        gradcheck(&c, state ? "rope, continued" : "rope");
    }
}

// silu and gate: the gradient may take the place of dout, as the model has it
static void silu_f(Case *c) { silu_forward(c->out[0], c->in[0], c->in_size[0]); }
static void silu_b(Case *c) {
    memcpy(c->din[0], c->dout[0], c->out_size[0] * sizeof(real));
    silu_backward(c->din[0], c->din[0], c->in[0], c->in_size[0]);
}
static void gate_f(Case *c) { gate_forward(c->out[0], c->in[0], c->in[1], c->in_size[0]); }
static void gate_b(Case *c) {
    memcpy(c->din[0], c->dout[0], c->out_size[0] * sizeof(real));
    gate_backward(c->din[0], c->din[1], c->din[0], c->in[0], c->in[1], c->in_size[0]);
}
static void test_gates(void) {
    Case s = {.forward = silu_f, .backward = silu_b}, g = {.forward = gate_f, .backward = gate_b};
    input(&s, "inp", 37, SET, 4, 0);
    output(&s, 37);
    gradcheck(&s, "silu");
    input(&g, "a", 37, SET, 1, 0), input(&g, "b", 37, SET, 4, 0);
    output(&g, 37);
    gradcheck(&g, "gate");
}

// One head in a chunk, of heads of 2 and 3 numbers beside one more each: rows are longer than a head.
static void attention_chunk_f(Case *c) {
    memset(c->out[0], 0, c->out_size[0] * sizeof(real)); // the other column is not the head's to write
    attention_chunk_forward(c->out[0], c->kept[0], c->kept[1], c->in[0], c->in[1], c->in[2], c->mask, c->nq, c->nk, 2, 3, 3, 4,
                   2, 64);
}
static void attention_chunk_b(Case *c) {
    memset(c->din[0], 0, c->in_size[0] * sizeof(real));
    attention_chunk_backward(c->din[0], c->din[1], c->din[2], c->kept[1], c->kept[2], 1, c->dout[0], c->out[0], c->kept[0],
                    c->in[0], c->in[1], c->in[2], c->mask, c->nq, c->nk, 2, 3, 3, 4, 2, 64);
}
static void attention_chunk_case(int nq, int nk, double p) {
    Case c = {.forward = attention_chunk_f, .backward = attention_chunk_b, .nq = nq, .nk = nk, .mask = {.p = p, .seed = 5, .first = 7}};
    input(&c, "q", (size_t)nq * 3, SET, 2, 0);
    input(&c, "k, cached ones too", (size_t)nk * 3, ADDED, 2, 0);
    input(&c, "v, cached ones too", (size_t)nk * 4, ADDED, 1, 0);
    output(&c, (size_t)nq * 4);
    keep(&c, (size_t)nq * 2);
    for (int i = 0; i < 2; i++) keep(&c, (size_t)nq * nk);
    char title[64];
    snprintf(title, sizeof title, "attend, %d queries, %d keys, dropout %g", nq, nk, p);
    gradcheck(&c, title);
}

static void attention_f(Case *c) {
    attention_forward(c->out[0], c->kept[0], NULL, NULL, c->kept[1], c->in[0], c->in[1], c->in[2], NULL, c->mask, c->B,
                      c->L, c->C, c->H, c->Z, c->E, 1);
}
static void attention_b(Case *c) {
    attention_backward(c->din[0], c->din[1], c->din[2], c->kept[1], c->kept[2], c->dout[0], c->out[0], c->kept[0],
                       c->in[0], c->in[1], c->in[2], c->mask, c->B, c->L, c->C, c->H, c->Z, c->E, 1);
}
static void attention_case(int L, int C, int H, double p) {
    Case c = {.forward = attention_f, .backward = attention_b, .B = 2, .L = L, .C = C, .H = H, .Z = 2 * H, .E = 3 * H};
    c.mask = (Mask){.p = p, .seed = 3, .layer = 1, .row = (uint64_t)c.L * (uint64_t)c.C};
    c.elements = L > QUERY_TILE ? 12 : 0;
    size_t R = 2 * (size_t)L;
    input(&c, "q", R * c.Z, SET, 2, 0), input(&c, "k", R * c.Z, SET, 2, 0);
    input(&c, "v", R * c.E, SET, 1, 0);
    output(&c, R * c.E);
    keep(&c, R * H);
    for (int i = 0; i < 2; i++) keep(&c, (size_t)QUERY_TILE * C);
    char title[64];
    snprintf(title, sizeof title, "attention, L %d C %d, %d heads, dropout %g", L, C, H, p);
    gradcheck(&c, title);
}
static void test_attention(void) {
    attention_chunk_case(1, 7, 0), attention_chunk_case(6, 6, 0), attention_chunk_case(5, 11, 0), attention_chunk_case(5, 11, 0.3);
    for (int H = 1; H <= 3; H += 2) {
        attention_case(5, 8, H, 0), attention_case(8, 8, H, 0), attention_case(16, 8, H, 0.5);
        attention_case(19, 8, H, 0), attention_case(QUERY_TILE + 13, QUERY_TILE + 10, H, 0.1);
    }
}

// Dropout: each word of Philox says whether its element stays, wherever a call begins and ends.
static void dropout_f(Case *c) { dropout(c->out[0], c->in[0], c->mask, c->in_size[0]); }
static void dropout_b(Case *c) { dropout(c->din[0], c->dout[0], c->mask, c->in_size[0]); }
static void test_dropout(void) {
    enum { SIZE = 1000, FIRST = 3 };
    const uint64_t far = ((uint64_t)5 << 34) - 14; // on the way there the counter's last word overflows
    Case c = {.forward = dropout_f, .backward = dropout_b, .mask = {.p = 0.3, .seed = 9, .first = FIRST}};
    input(&c, "inp", 37, SET, 1, 0);
    output(&c, 37);
    gradcheck(&c, "dropout");
    real *x = numbers(SIZE, 1, 3), y[SIZE], parts[SIZE], expected[SIZE];
    for (int i = 0; i < 2; i++) {
        const Mask mask = {
            .p = 0.3, .seed = 77, .stream = STREAM_DROPOUT + 2, .step = 6, .layer = 4, .first = i ? far : FIRST};
        for (uint64_t k = 0; k < SIZE; k++) {
            uint64_t at = mask.first + k;
            uint32_t words[4];
            megalodon_philox(words, 77, STREAM_DROPOUT + 2, 6, 4 + (uint32_t)(at / 4 >> 32) * 65536,
                             (uint32_t)(at / 4));
            expected[k] = words[at % 4] < 0.3 * 4294967296.0 ? 0 : x[k] / 0.7;
        }
        dropout(y, x, mask, SIZE);
        check(i ? "dropout beyond 2^34 elements = its definition" : "dropout = its definition", y, expected, SIZE,
              1e-15);
        for (int from = 0, n = 1; from < SIZE; from += n, n = min(n + 1, SIZE - from)) {
            dropout(parts + from, x + from, mask_row(mask, 1, from), (size_t)n);
        }
        check_same("  in parts: the same", parts, y, sizeof y);
    }
    memcpy(y, x, sizeof y);
    dropout(y, y, (Mask){.p = 0}, SIZE);
    check_same("dropout of probability 0 does nothing", y, x, sizeof y);
    free(x);
}

static void layernorm_f(Case *c) {
    layernorm_forward(c->out[0], c->kept[0], c->kept[1], c->in[0], c->in[1], c->in[2], c->R, c->D, EPS);
}
static void layernorm_b(Case *c) {
    layernorm_backward(c->din[0], c->din[1], c->din[2], c->dout[0], c->in[0], c->in[1], c->kept[0], c->kept[1], c->R,
                       c->D);
}
static void test_layernorm(void) {
    for (int affine = 0; affine < 2; affine++) {
        Case c = {.forward = layernorm_f, .backward = layernorm_b, .R = 5, .D = COLUMNS + 3};
        input(&c, "inp", (size_t)c.R * c.D, SET, 1, 0.3);
        input(&c, "weight", affine ? (size_t)c.D : 0, ADDED, 1, 0);
        input(&c, "bias", affine ? (size_t)c.D : 0, ADDED, 1, 0);
        output(&c, (size_t)c.R * c.D);
        keep(&c, (size_t)c.R), keep(&c, (size_t)c.R);
        gradcheck(&c, affine ? "layernorm" : "layernorm without affine");
    }
}

static void rescale_f(Case *c) { rescale_forward(c->out[0], c->in[0], c->in[1], c->R, c->D); }
static void rescale_b(Case *c) { rescale_backward(c->din[0], c->din[1], c->dout[0], c->in[0], c->in[1], c->R, c->D); }
static void test_rescale(void) {
    Case c = {.forward = rescale_f, .backward = rescale_b, .R = 5, .D = 13};
    input(&c, "inp", 5 * 13, SET, 1, 0), input(&c, "alpha", 13, ADDED, 1, 0);
    output(&c, 5 * 13);
    gradcheck(&c, "rescale");
}

// The loss is itself the sum that the gradient is of, so there is one output, and grad_scale is its weight.
static void output_loss_f(Case *c) {
    double losses[LOGIT_ROWS + 9];
    output_loss(losses, NULL, NULL, c->kept[0], c->in[0], c->in[1], c->tokens, 0, c->R, c->D, c->V);
    c->out[0][0] = 0;
    for (int r = 0; r < c->R; r++) c->out[0][0] += losses[r];
}
static void output_loss_b(Case *c) {
    double losses[LOGIT_ROWS + 9];
    output_loss(losses, c->din[0], c->din[1], c->kept[0], c->in[0], c->in[1], c->tokens, c->dout[0][0], c->R, c->D,
                c->V);
}
static void test_output_loss(void) {
    static const int rows[3] = {1, 7, LOGIT_ROWS + 9};
    int32_t targets[LOGIT_ROWS + 9];
    for (int i = 0; i < 3; i++) {
        int V = i < 2 ? 11 : LOGITS / LOGIT_ROWS; // the third has more rows than a block
        Case c = {.forward = output_loss_f, .backward = output_loss_b, .tokens = targets, .R = rows[i], .D = 5, .V = V};
        for (int r = 0; r < c.R; r++) targets[r] = r % 3 == 1 ? -1 : (7 * r + 2) % c.V;
        input(&c, "x", (size_t)c.R * 5, SET, 2, 0);
        input(&c, "output", (size_t)V * 5, ADDED, 1, 0);
        output(&c, 1);
        keep(&c, (size_t)min(logit_rows(V), c.R) * V);
        char title[64];
        snprintf(title, sizeof title, "output_loss, R %d", c.R);
        c.elements = i < 2 ? 0 : 12;
        gradcheck(&c, title);
    }
}

// ----------------------------------------------------------------------------
// definitions, written plainly

// CEMA as a convolution: y_t = sum_j k_j x_(t-j) + omega x_t with k_j = Re sum_n gamma/sqrt(N) p q^j. In the
// paper's Eq. 2 the input also gets a factor e^(i phi): the same model, when gamma is turned by e^(-i phi).
static void test_cema_definition(int paper) {
    enum { L = CEMA_BLOCK + 13, D = 3, N = 4 };
    real *x = numbers(L * D, 1, 0), *alpha = numbers(D * N, 1, 0), *delta = numbers(D * N, 1, 0);
    real *theta = numbers(D, 1, -1), *gamma = numbers(2 * D * N, 1, 0), *omega = numbers(D, 1, 0);
    real *memory = numbers((size_t)5 * N * strip_channels(D), 1, 0), *turned = numbers(2 * D * N, 1, 0);
    real y[L * D], expected[L * D];
    memcpy(turned, gamma, 2 * D * N * sizeof *gamma);
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
                    turned[2 * (d * N + n)] = re * cos(paper * phi) - im * sin(paper * phi);
                    turned[2 * (d * N + n) + 1] = re * sin(paper * phi) + im * cos(paper * phi);
                }
                expected[t * D + d] += k * x[(t - j) * D + d];
            }
        }
    }
    Coeffs coeffs = coeffs_in(memory, D, N);
    cema_coeffs_forward(&coeffs, alpha, delta, theta, turned, D, N);
    cema_forward(y, NULL, NULL, x, &coeffs, omega, NULL, 1, L, D, N);
    check(paper ? "cema = paper's Eq. 2, gamma turned" : "cema = its convolution", y, expected, L * D, 1e-12);
    free(x), free(alpha), free(delta), free(theta), free(gamma), free(omega), free(memory), free(turned);
}

// Without rotation (phi = 0) and with a real gamma it is a plain exponential moving average.
static void test_cema_real(void) {
    enum { L = 2 * CEMA_BLOCK, D = 2 };
    real *x = numbers(L * D, 1, 0), *memory = numbers((size_t)5 * strip_channels(D), 1, 0);
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
    cema_coeffs_forward(&coeffs, alpha, delta, theta, gamma, D, 1);
    cema_forward(y, NULL, NULL, x, &coeffs, omega, NULL, 1, L, D, 1);
    check("cema, real = plain moving average", y, expected, L * D, 1e-13);
    free(x), free(memory);
}

// TimestepNorm: the moments of all that came before, by two passes; and what comes later changes no bit.
static void test_timestep_norm_definition(void) {
    enum { L = 13, D = 12, G = 3, g = D / G };
    real *x = numbers(L * D, 1, 2), *w = numbers(D, 1, 0), *b = numbers(D, 1, 0);
    real y[L * D], later[L * D], expected[L * D], mean[L * G], rstd[L * G];
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
    timestep_norm_forward(y, mean, rstd, NULL, NULL, x, w, b, NULL, NULL, NULL, 1, L, D, G, EPS);
    check("timestep_norm = its definition", y, expected, L * D, 1e-13);
    random_fill(x + 7 * D, (L - 7) * D, 99, 50, -3);
    timestep_norm_forward(later, mean, rstd, NULL, NULL, x, w, b, NULL, NULL, NULL, 1, L, D, G, EPS);
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

// Queries and keys, rotated, and attention: every score by itself, position by position.
static void test_attention_definition(void) {
    enum { L = 19, C = 8, H = 3, Z = 4 * H, E = 5 * H, dz = 4, dv = 5 };
    real *q = numbers(L * Z, 1, 0), *k = numbers(L * Z, 1, 0), *v = numbers(L * E, 1, 0);
    real o[L * E], expected[L * E], lse[L * H], scores[QUERY_TILE * C], table[C * dz];
    real q_rotated[L * Z], k_rotated[L * Z];
    for (int t = 0; t < L; t++) {
        for (int h = 0; h < H; h++) {
            double e[C], sum = 0;
            int first = t / C * C;
            for (int s = first; s <= t; s++) { // turning both by their positions is turning by the distance
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
    rope_forward(q_rotated, q, table, NULL, 1, L, Z, dz, C);
    rope_forward(k_rotated, k, table, NULL, 1, L, Z, dz, C);
    attention_forward(o, lse, NULL, NULL, scores, q_rotated, k_rotated, v, NULL, (Mask){0}, 1, L, C, H, Z, E, 1);
    check("rope and attention = their definition", o, expected, L * E, 1e-13);
    free(q), free(k), free(v);
}

int main(void) {
    megalodon_threads(1); // sharing work as small as this takes longer than doing it
    printf("%-48s %9s  %6s\n", "", "rel. L2", "tol");
    test_comparing();
    test_gemm();
    test_embedding();
    test_timestep_norm();
    test_cema();
    test_rmsnorm();
    test_linear();
    test_qk();
    test_rope();
    test_gates();
    test_dropout();
    test_attention();
    test_layernorm();
    test_rescale();
    test_output_loss();
    test_cema_definition(0);
    test_cema_definition(1);
    test_cema_real();
    test_timestep_norm_definition();
    test_row_norms();
    test_attention_definition();
    return check_done();
}
