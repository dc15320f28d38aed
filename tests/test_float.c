// What single precision costs where it could cost much: the moments of a long stream, exp, and every layer for numbers
// that are large, small or far from zero, against its definition in double. Results must be near or not finite, never
// finite and wrong. Build: float, with plumbing/params.c; megalodon.c is included, since its functions are static.
#include "../megalodon.c"
#include "check.h"
#include <float.h>

// TimestepNorm's moments after a million tokens whose mean is 1000 times their deviation, read in pieces
// through its state, against two passes in double over the same numbers. The last piece's output likewise.
static void test_moments(void) {
    enum { PIECE = 4096, PIECES = 245, D = 8, G = 2, g = D / G };
    static real x[PIECE * D], y[PIECE * D], expected[PIECE * D], row_rstd[PIECE * G];
    static double row_mean[PIECE * G];
    double mean[G] = {0}, m2[G] = {0}, sum[G] = {0}, squares[G] = {0}, seen[G], n = (double)PIECE * PIECES * g;
    real weight[D] = {0}, bias[D] = {0};
    int64_t count = 0;
    const NormState state = {&count, mean, m2};
    const Dims d = {.B = 1, .L = PIECE, .D = D, .G = G};
    for (int p = 0; p < PIECES; p++, count += PIECE) {
        random_fill(x, PIECE * D, (uint64_t)p, sqrt(3), 1000); // deviation 1
        timestep_norm_forward(y, row_mean, row_rstd, state, x, weight, bias, state, d, 1e-5);
        for (int i = 0; i < PIECE * D; i++) sum[i % D / g] += x[i];
    }
    for (int j = 0; j < G; j++) sum[j] /= n;
    for (int p = 0; p < PIECES; p++) {
        random_fill(x, PIECE * D, (uint64_t)p, sqrt(3), 1000);
        for (int i = 0; i < PIECE * D; i++) squares[i % D / g] += pow(x[i] - sum[i % D / g], 2);
    }
    for (int j = 0; j < G; j++) seen[j] = mean[j] - 1000, sum[j] -= 1000; // what is left of them when centered
    check("mean of 1003520 tokens around 1000, less 1000", seen, sum, G, 1e-7);
    check("their squared deviations", m2, squares, G, 1e-10);
    for (int i = (PIECE - 1) * D; i < PIECE * D; i++) {
        int j = i % D / g;
        expected[i] = (real)((x[i] - 1000 - sum[j]) / sqrt(squares[j] / n + 1e-5));
    }
    check_real("the last one's output", y + (PIECE - 1) * D, expected + (PIECE - 1) * D, D, 1e-6);
}

// Whether exp_real is right for x and its neighbours, of which some are beyond the bound.
static int edge_of_exp(float x) {
    int right = 1;
    for (int i = 0; i < 200; i++) x = nextafterf(x, 0);
    for (int i = 0; i < 400; i++, x = nextafterf(x, x < 0 ? -INFINITY : INFINITY)) {
        float y = exp_real(x);
        double expected = exp((double)x);
        int outside = expected > FLT_MAX * (1 - 1e-5) ? isinf(y) : expected < FLT_MIN * (1 + 1e-5) && y == 0;
        right &= outside || fabs(y / expected - 1) < 2e-7;
    }
    return right;
}

static void test_exp(void) {
    double worst = 0, last = 0;
    int rising = 1;
    for (int i = -8733650; i <= 8872280; i++) {
        float x = (float)i * 1e-5f, y = exp_real(x);
        double error = fabs(y / exp((double)x) - 1);
        worst = error > worst ? error : worst;
        rising &= y >= last * (1 - 2e-7);
        last = y;
    }
    printf("exp_real from -87.3365 to 88.7228: largest relative error %.2e\n", worst);
    check_true("exp_real errs by less than 2e-7",
               worst < 2e-7); // if it were NaN somewhere, rising would be false
    check_true("exp_real rises", rising);
    check_true("exp_real(0) = 1", exp_real(0) == 1);
    check_true("exp_real keeps NaN", isnan(exp_real(NAN)) && isnan(exp_real(-NAN)));
    static const float far[] = {88.75f, 89, 128, 1e4f, 1e30f, FLT_MAX, INFINITY}; // the bits of n wrap at some
    int above = 1, below = 1;
    for (int i = 0; i < 7; i++) above &= isinf(exp_real(far[i])), below &= exp_real(-far[i]) == 0;
    check_true("exp_real overflows to infinity", above && exp_real(88.7228f) < INFINITY);
    check_true("exp_real underflows to 0", below && exp_real(-87.3365f) > 0);
    check_true("exp_real of the numbers around its bounds", edge_of_exp(88.72283f) && edge_of_exp(-87.33654f));
    check_true("sigmoid's ends", sigmoid(-1000) == 0 && sigmoid(1000) == 1 && isnan(sigmoid(NAN)));
}

// ----------------------------------------------------------------------------
// layers

// Relative difference below 1e-6; not finite where the result is beyond float; what underflows, times `factor`, may be 0.
static int near(float got, double expected, double factor) {
    if (fabs(expected) > FLT_MAX) return !isfinite(got);
    return fabs(got - expected) <= 1e-6 * fabs(expected) + 1e-36 * factor;
}
static int close_to(float got, double expected) { return near(got, expected, 1); }

static void test_gates(void) {
    static const float points[] = {0,     1e-30f, 0.1f,  1,   20,  64,   65,    80,    87.3f,
                                   87.4f, 88.7f,  88.8f, 100, 104, 1e4f, 1e20f, 1e30f, FLT_MAX};
    static const float factors[] = {1, -0.3f, 1e20f, 1e-20f, 3e38f};
    enum { POINTS = sizeof points / sizeof *points, FACTORS = sizeof factors / sizeof *factors };
    int silu = 1, dsilu = 1, gate = 1, da_near = 1, db_near = 1;
    for (int i = 0; i < 2 * POINTS * FACTORS; i++) {
        float x = i % 2 ? points[i / 2 % POINTS] : -points[i / 2 % POINTS], a = factors[i / 2 / POINTS], one = 1;
        float y, dx, out, da, db;
        double s = 1 / (1 + exp(-(double)x)), slope = s * (1 + x * (1 / (1 + exp((double)x))));
        silu_forward(&y, &x, 1), silu_backward(NULL, &dx, &one, &x, 1);
        gate_forward(&out, &a, &x, 1), gate_backward(NULL, &da, &db, &one, &a, &x, 1);
        silu &= close_to(y, x * s), dsilu &= close_to(dx, slope), gate &= near(out, a * (x * s), fmax(fabs(a), 1));
        da_near &= close_to(da, x * s), db_near &= near(db, a * slope, fmax(fabs(a), 1));
    }
    check_true("silu of pre-activations up to 3.4e38", silu);
    check_true("  its derivative", dsilu);
    check_true("gate, times factors from 1e-20 to 3e38", gate);
    check_true("  its gradients", da_near && db_near);
}

// RMSNorm and LayerNorm by their definitions. dweight and dbias are set.
static void row_norm(int centered, double *y, double *dx, double *dweight, double *dbias, const float *x,
                     const float *w, const float *b, const float *dy, int R, int D, double eps) {
    for (int c = 0; c < D; c++) dweight[c] = dbias[c] = 0;
    for (int r = 0; r < R; r++, x += D, y += D, dx += D, dy += D) {
        double mean = 0, square = 0, da = 0, dan = 0;
        for (int c = 0; c < D && centered; c++) mean += (double)x[c] / D;
        for (int c = 0; c < D; c++) square += (x[c] - mean) * (x[c] - mean) / D;
        double s = 1 / sqrt(square + eps);
        for (int c = 0; c < D; c++) {
            double n = (x[c] - mean) * s, a = dy[c] * (w[c] + 1.0);
            y[c] = n * (w[c] + 1.0) + (centered ? b[c] : 0);
            dweight[c] += dy[c] * n, dbias[c] += dy[c];
            da += centered ? a / D : 0, dan += a * n / D;
        }
        for (int c = 0; c < D; c++) dx[c] = s * (dy[c] * (w[c] + 1.0) - da - (x[c] - mean) * s * dan);
    }
}

static void test_row_norms(void) {
    enum { R = 7, D = 37, SIZE = R * D };
    static const double scales[R] = {1, 1e-3, 1e16, 1e20, 1e25, 1e30, 3e37}; // of rows; in dx the first is the largest
    float x[SIZE], dy[SIZE], w[D], b[D], y[SIZE], dx[SIZE], dweight[D] = {0}, dbias[D] = {0}, rstd[R];
    double mean[R], expected_y[SIZE], expected_dx[SIZE], expected_dw[D], expected_db[D];
    random_fill(x, SIZE, 1, 3, 0.7), random_fill(dy, SIZE, 2, 1, 0.1);
    random_fill(w, D, 3, 1, 0), random_fill(b, D, 4, 1, 0);
    for (int i = 0; i < SIZE; i++) x[i] *= (float)scales[i / D], dy[i] *= (float)scales[i / D];
    for (int centered = 0; centered < 2; centered++) {
        char name[64];
        for (int r = 0; r < R; r++) { // gradients of parameters sum over rows, so row by row
            float *xr = x + r * D, *dyr = dy + r * D;
            memset(dweight, 0, sizeof dweight), memset(dbias, 0, sizeof dbias);
            row_norm(centered, expected_y, expected_dx, expected_dw, expected_db, xr, w, b, dyr, 1, D, 1e-5);
            if (centered) {
                layernorm_forward(y, mean, rstd, xr, w, b, 1, D, 1e-5);
                layernorm_backward(dx, dweight, dbias, dyr, xr, w, mean, rstd, 1, D);
            } else {
                rmsnorm_forward(y, rstd, xr, w, 1, D, 1e-5);
                rmsnorm_backward(dx, dweight, dyr, xr, w, rstd, 1, D);
            }
            const struct {
                const char *what;
                const float *got;
                const double *expected;
            } parts[4] = {{"y", y, expected_y},
                          {"dx", dx, expected_dx},
                          {"dweight", dweight, expected_dw},
                          {"dbias", dbias, expected_db}};
            for (int i = 0; i < 3 + centered; i++) {
                double got[D];
                for (int c = 0; c < D; c++) got[c] = parts[i].got[c];
                snprintf(name, sizeof name, "%s of %g: %s", centered ? "LayerNorm" : "RMSNorm", scales[r],
                         parts[i].what);
                check(name, got, parts[i].expected, D, 2e-6);
            }
        }
    }
}

// TimestepNorm by its definition: every token's moments from all scalars up to it, every token's gradient from all later
// tokens. x, y, dy (L,D) of one sequence.
static void timestep_norm(double *y, double *dx, double *dweight, double *dbias, const float *x, const float *w,
                          const float *b, const float *dy, int L, int D, int G, double eps) {
    int g = D / G;
    for (int c = 0; c < D; c++) dweight[c] = dbias[c] = 0;
    for (int i = 0; i < L * D; i++) dx[i] = 0;
    for (int t = 0; t < L; t++) {
        for (int j = 0; j < G; j++) {
            double n = (t + 1.0) * g, mean = 0, square = 0, dmean = 0, dvar = 0;
            for (int i = 0; i < (t + 1) * g; i++) mean += x[i / g * D + j * g + i % g] / n;
            for (int i = 0; i < (t + 1) * g; i++) square += pow(x[i / g * D + j * g + i % g] - mean, 2) / n;
            double r = 1 / sqrt(square + eps);
            for (int c = j * g, at = t * D + j * g; c < (j + 1) * g; c++, at++) {
                double a = dy[at] * (w[c] + 1.0);
                y[at] = (x[at] - mean) * r * (w[c] + 1.0) + b[c];
                dweight[c] += dy[at] * ((x[at] - mean) * r), dbias[c] += dy[at];
                dx[at] += r * a, dmean -= r * a, dvar -= 0.5 * r * r * (a * ((x[at] - mean) * r));
            }
            for (int i = 0; i < (t + 1) * g; i++) {
                int at = i / g * D + j * g + i % g;
                dx[at] += dmean / n + 2 * dvar / n * (x[at] - mean);
            }
        }
    }
}

// Whole, and as two parts: the second starts from the state after the first, and the first's backward pass from the
// gradient sums of the second.
static void timestep_norm_case(double mean, double deviation, double tol) {
    enum { L = 60, CUT = 23, D = 12, G = 3, SIZE = L * D };
    static float x[SIZE], dy[SIZE], y[SIZE], dx[SIZE], rstd[L * G];
    static double means[L * G], expected_y[SIZE], expected_dx[SIZE], got[SIZE];
    float w[D], b[D], dweight[D] = {0}, dbias[D] = {0};
    double expected_dw[D], expected_db[D], cut_mean[G], cut_m2[G];
    const Dims whole = {.B = 1, .L = L, .D = D, .G = G}, first = {.B = 1, .L = CUT, .D = D, .G = G};
    const Dims second = {.B = 1, .L = L - CUT, .D = D, .G = G};
    const NormState none = {NULL, NULL, NULL};
    char name[96];
    random_fill(x, SIZE, 1, sqrt(3) * deviation, mean), random_fill(dy, SIZE, 2, 1, 0.1);
    random_fill(w, D, 3, 1, 0), random_fill(b, D, 4, 1, 0);
    if (deviation > 1) random_fill(dy, SIZE, 2, 1e10, 0); // so that dx does not underflow
    timestep_norm(expected_y, expected_dx, expected_dw, expected_db, x, w, b, dy, L, D, G, 1e-5);
    for (int cut = 0; cut < 2; cut++) {
        memset(dweight, 0, sizeof dweight), memset(dbias, 0, sizeof dbias);
        if (cut) {
            const float *x2 = x + CUT * D, *dy2 = dy + CUT * D;
            float *rstd2 = rstd + CUT * G;
            double *means2 = means + CUT * G, dstate[G * 3] = {0}; // no later tokens
            int64_t count = CUT;
            const NormState at_cut = {NULL, cut_mean, cut_m2}, counted = {&count, cut_mean, cut_m2};
            timestep_norm_forward(y, means, rstd, at_cut, x, w, b, none, first, 1e-5);
            timestep_norm_forward(y + CUT * D, means2, rstd2, none, x2, w, b, counted, second, 1e-5);
            timestep_norm_backward(dx + CUT * D, dweight, dbias, dstate, dy2, NULL, x2, w, means2, rstd2, &count,
                                   second);
            timestep_norm_backward(dx, dweight, dbias, dstate, dy, NULL, x, w, means, rstd, NULL, first);
        } else {
            timestep_norm_forward(y, means, rstd, none, x, w, b, none, whole, 1e-5);
            timestep_norm_backward(dx, dweight, dbias, NULL, dy, NULL, x, w, means, rstd, NULL, whole);
        }
        const struct {
            const char *what;
            const float *got;
            const double *expected;
            int size;
        } parts[4] = {{"y", y, expected_y, SIZE},
                      {"dx", dx, expected_dx, SIZE},
                      {"dweight", dweight, expected_dw, D},
                      {"dbias", dbias, expected_db, D}};
        for (int i = 0; i < 4; i++) {
            for (int k = 0; k < parts[i].size; k++) got[k] = parts[i].got[k];
            snprintf(name, sizeof name, "TimestepNorm, %g +- %g%s: %s", mean, deviation, cut ? ", cut" : "",
                     parts[i].what);
            check(name, got, parts[i].expected, (size_t)parts[i].size, tol);
        }
    }
}

static void test_timestep_norm(void) {
    timestep_norm_case(0, 1, 1e-6), timestep_norm_case(1e4, 1, 1e-6), timestep_norm_case(1e5, 1, 1e-6);
    timestep_norm_case(-1e6, 1, 1e-6), timestep_norm_case(0, 1e20, 1e-6), timestep_norm_case(1e29, 1e25, 1e-6);
}

// Scores are q k with dz 1. The first key's value must not count where its probability is below float's range.
static void test_softmax(void) {
    float q = 1, k[3] = {-1000, 0, 0}, v[3] = {1e38f, 1, 3}, o, lse, s[3], ds[3];
    float dq, dk[3], dv[3], one = 1;
    const QueryTile tile = {.q = &q, .k = k, .v = v, .nq = 1, .nk = 3, .mask = {.p = 0}};
    const Dims d = {.H = 1, .Z = 1, .E = 1, .C = 3};
    attention_chunk_forward(&o, &lse, s, &tile, d);
    check_true("a probability of e^-1000 is 0", close_to(o, 2));
    k[0] = -80;
    attention_chunk_forward(&o, &lse, s, &tile, d);
    check_true("one of e^-80 is not", close_to(o, (4 + 1e38 * exp(-80)) / 2));
    q = 0x1p14f, k[0] = 0, k[1] = k[2] = 0x1p14f; // two equal scores of 2^28, whose log-sum-exp rounds to themselves
    attention_chunk_forward(&o, &lse, s, &tile, d);
    attention_chunk_backward(&dq, dk, dv, s, ds, 0, &one, &lse, &tile, d);
    check_true("equal scores of 3e8 share the probability", close_to(o, 2) && close_to(lse, 0x1p28));
    check_true("  backward, too: dv", dv[0] == 0 && close_to(dv[1], 0.5) && close_to(dv[2], 0.5));
    check_true("  dk", dk[0] == 0 && close_to(dk[1], -0x1p13) && close_to(dk[2], 0x1p13));
    q = 1e30f, k[0] = -1e30f, k[1] = k[2] = 0;
    attention_chunk_forward(&o, &lse, s, &tile, d);
    check_true("a score that overflowed is not a probability of 0", isnan(o));
}

// x is 1, so logits are the output matrix.
static void loss_case(const char *what, const float *logits, int target, int V) {
    float l[8], dx, doutput[8] = {0}, one = 1, row[8];
    double loss, top = -INFINITY, others = 0, expected[8], got[8];
    memcpy(row, logits, (size_t)V * sizeof *row);
    for (int v = 0; v < V; v++) top = logits[v] > top ? logits[v] : top;
    for (int v = 0; v < V; v++) others += v == target ? 0 : exp(logits[v] - top);
    double own = exp(logits[target] - top), sum = others + own;
    for (int v = 0; v < V; v++) expected[v] = v == target ? -others / sum : exp(logits[v] - top) / sum;
    output_loss(&loss, &dx, doutput, l, &one, row, (int32_t[]){target}, 1, 1, 1, V);
    for (int v = 0; v < V; v++) got[v] = doutput[v];
    double expected_loss = log1p(others + own - 1) + (top - logits[target]);
    char name[64];
    snprintf(name, sizeof name, "loss, %s", what);
    check(name, &loss, &expected_loss, 1, 1e-6);
    snprintf(name, sizeof name, "  gradient of the logits");
    check(name, got, expected, (size_t)V, 1e-6);
}
static void test_loss(void) {
    loss_case("equal logits of 1e20", (float[]){0, 1e20f, 1e20f}, 1, 3);
    loss_case("a logit 20 above the others", (float[]){-20, 0, -21, -25}, 1, 4);
    loss_case("a logit 1e30 below", (float[]){-1e30f, 0.5f, -0.5f}, 0, 3);
    loss_case("others 100 below", (float[]){-100, 0.5f, -0.5f, -99}, 2, 4);
    double loss;
    output_loss(&loss, NULL, NULL, (float[2]){0}, (float[]){1e30f}, (float[]){-1e30f, 1}, (int32_t[]){1}, 1, 1, 1, 2);
    check_true("loss: a logit that overflowed is not a probability of 0", isnan(loss));
}

// One step of AdamW from zero moments moves a parameter by the learning rate, whatever the gradient.
static void test_update(void) {
    float p[4] = {1, 1, 1, 1}, g[4] = {1e-3f, -1e10f, 1e18f, 1e25f}, m1[4] = {0}, m2[4] = {0};
    Shard whole = {0, 4};
    Model m = {.shards = &whole, .num_shards = 1, .memory = {p, g, m1, m2}};
    megalodon_update(&m, &(AdamW){0.9, 0.95, 1e-12, 0}, 0.125, 1, 0);
    check_true("AdamW: gradients of 1e-3, 1e10, 1e18",
               close_to(p[0], 0.875) && close_to(p[1], 1.125) && close_to(p[2], 0.875));
    check_true("AdamW: where the second moment overflows it is not finite", isnan(p[3]));
}

int main(void) {
    megalodon_threads(1);
    printf("%-48s %9s  %6s\n", "", "rel. L2", "tol");
    test_moments();
    test_exp();
    test_gates();
    test_row_norms();
    test_timestep_norm();
    test_softmax();
    test_loss();
    test_update();
    return check_done();
}
