// Shared by the numeric tests: comparison, central differences, random numbers. A test prints a line for each check and
// ends with check_done().
#pragma once
#include <math.h>   // defines: sqrt
#include <stdio.h>  // defines: printf
#include <stdlib.h> // defines: malloc, exit
#include <string.h> // defines: memcmp
#include "../megalodon.h"

static int checks_passed, checks_failed;

static inline int check_done(void) {
    printf("%d passed, %d failed\n", checks_passed, checks_failed);
    return checks_failed > 0;
}

static inline void check_count(int ok) {
    *(ok ? &checks_passed : &checks_failed) += 1;
#ifdef STOP_AT_FAILURE // tests/mutants.sh only needs the first failure
    if (!ok) exit(check_done());
#endif
}

static inline void check_true(const char *name, int ok) {
    printf("%-66s %s\n", name, ok ? "ok" : "FAIL");
    check_count(ok);
}

// Compares a with b: the relative L2 difference |a - b| / |b| must be at most tol. NaN and infinity fail, since they
// compare false. A reference that is all zero fails, too, since the relative difference is undefined.
static inline int within(double *relative, const double *a, const double *b, size_t n, double tol) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    *relative = sqrt(difference) / sqrt(norm);
    return norm > 0 && *relative <= tol;
}

// The model being tested. What it does not use, by the name of the comparison, must be zero on both sides: gradients and
// states of CEMA and TimestepNorm, if they are replaced.
static const Config *tested;
static inline int is_unused(const char *name) {
    const char *colon = strrchr(name, ':'), *what = colon ? colon + 2 : name;
    int moments = !strcmp(what, "mean") || !strcmp(what, "m2") || !strcmp(what, "U, V, W");
    if (!tested) return 0;
    if (tested->cema == CEMA_REAL && strstr(name, "mega.cema.theta")) return 1;
    if (tested->cema == CEMA_NONE && (strstr(name, "mega.cema.") || !strcmp(what, "h"))) return 1;
    return tested->timestep_norm == NORM_LAYER && moments;
}
static inline int all_zero(const double *a, size_t n) {
    while (n > 0 && a[n - 1] == 0) n--;
    return n == 0;
}

static inline void check(const char *name, const double *a, const double *reference, size_t n, double tol) {
    double relative = 0;
    int zero = is_unused(name);
    int ok = zero ? all_zero(a, n) && all_zero(reference, n) : within(&relative, a, reference, n, tol);
    printf("%-48s %9.2e  %6.0e  %s\n", name, relative, tol, ok ? "ok" : "FAIL");
    check_count(ok);
}

static inline void check_real(const char *name, const real *a, const real *reference, size_t n, double tol) {
    double *wide = malloc((2 * n + 1) * sizeof *wide);
    for (size_t i = 0; i < n; i++) wide[i] = a[i], wide[n + i] = reference[i];
    check(name, wide, wide + n, n, tol);
    free(wide);
}

static inline void check_same(const char *name, const void *a, const void *b, size_t bytes) { // bit for bit
    check_true(name, memcmp(a, b, bytes) == 0);
}

// ----------------------------------------------------------------------------
// random numbers from -1 to 1, times scale, plus shift; the same for the same seed

static inline double random_real(uint64_t seed, size_t i) {
    uint32_t r[4];
    megalodon_philox(r, seed, 0, 0, 0, (uint32_t)i);
    return (r[0] + 0.5) / 2147483648.0 - 1;
}

static inline void random_fill(real *x, size_t n, uint64_t seed, double scale, double shift) {
    for (size_t i = 0; i < n; i++) x[i] = (real)(scale * random_real(seed, i) + shift);
}

// ----------------------------------------------------------------------------
// Compares a gradient with central differences of the loss (four points, fourth order). At most `elements` elements are
// checked, spread over the tensor, and last the derivative along a random direction through all elements.

typedef double Loss(void *context); // the loss for the present values

static inline void check_gradient(const char *name, Loss *loss, void *context, real *value, const real *grad, size_t n,
                                  size_t elements, double tol) {
    static const int point[4] = {1, -1, 2, -2}, factor[4] = {8, -8, -1, 1};
    const double h = 4e-4;
    size_t count = n < elements ? n : elements;
    double *measured = calloc(2 * (count + 1), sizeof *measured), *given = measured + count + 1;
    real *kept = malloc(n * sizeof *kept);
    memcpy(kept, value, n * sizeof *kept);
    for (size_t k = 0; k <= count; k++) {
        size_t at = k * n / count; // n: the random direction
        for (int p = 0; p < 4; p++) {
            for (size_t i = 0; i < n; i++) {
                double along = at == n ? random_real(n, i) / sqrt((double)n) : i == at;
                value[i] = (real)(kept[i] + h * point[p] * along);
                if (p == 0) given[k] += along * (double)grad[i];
            }
            measured[k] += factor[p] * loss(context) / (12 * h);
        }
    }
    memcpy(value, kept, n * sizeof *kept);
    check(name, given, measured, count + 1, tol);
    free(measured), free(kept);
}
