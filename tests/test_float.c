// What single precision costs where it could cost much: the moments of a long stream, and exp. Build: float,
// with plumbing/params.c; megalodon.c is included, since its functions are static.
#include "../megalodon.c"
#include "check.h"

// TimestepNorm's moments after a million tokens whose mean is 1000 times their deviation, read in pieces
// through its state, against two passes in double over the same numbers. The last piece's output likewise.
static void test_moments(void) {
    enum { PIECE = 4096, PIECES = 245, D = 8, G = 2, g = D / G };
    static real x[PIECE * D], y[PIECE * D], expected[PIECE * D], row_rstd[PIECE * G];
    static double row_mean[PIECE * G];
    double mean[G] = {0}, m2[G] = {0}, sum[G] = {0}, squares[G] = {0}, seen[G], n = (double)PIECE * PIECES * g;
    real weight[D] = {0}, bias[D] = {0};
    int64_t count = 0;
    for (int p = 0; p < PIECES; p++, count += PIECE) {
        random_fill(x, PIECE * D, (uint64_t)p, sqrt(3), 1000); // deviation 1
        timestep_norm_forward(y, row_mean, row_rstd, mean, m2, x, weight, bias, mean, m2, &count, 1, PIECE, D, G, 1e-5);
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

static void test_exp(void) {
    double worst = 0, last = 0;
    int rising = 1;
    for (int i = -6400000; i <= 6400000; i++) {
        float x = (float)i * 1e-5f, y = exp_real(x);
        double error = fabs(y / exp((double)x) - 1);
        worst = error > worst ? error : worst;
        rising &= y >= last * (1 - 2e-7);
        last = y;
    }
    printf("exp_real from -64 to 64: largest relative error %.2e\n", worst);
    check_true("exp_real errs by less than 2e-7",
               worst < 2e-7); // if it were NaN somewhere, rising would be false
    check_true("exp_real rises", rising);
    check_true("exp_real(0) = 1", exp_real(0) == 1);
    check_true("exp_real keeps NaN", isnan(exp_real(NAN)) && isnan(exp_real(-NAN)));
    int held = 1; // to rounding: what a compiler works out itself it may round otherwise
    for (int i = 0; i < 2; i++) {
        float far = i ? 1e30f : INFINITY;
        held &= fabs((double)exp_real(far) / exp(64) - 1) < 2e-7 && fabs((double)exp_real(-far) / exp(-64) - 1) < 2e-7;
    }
    check_true("exp_real holds x between -64 and 64", held);
    check_true("exp_real(64) is finite", isfinite(exp_real(64)));
    check_true("sigmoid's ends",
               sigmoid(-1000) < 1e-27f && sigmoid(-1000) >= 0 && sigmoid(1000) == 1 && isnan(sigmoid(NAN)));
}

int main(void) {
    megalodon_threads(1);
    printf("%-48s %9s  %6s\n", "", "rel. L2", "tol");
    test_moments();
    test_exp();
    return check_done();
}
