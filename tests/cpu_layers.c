// The layers of megalodon.c as functions cpu_*, for tests/test_cuda.cu: build/cpu_layers.h declares and here defines
// them. megalodon.c is included, since layers are static. Afterwards only cpu_* stay global, so that the program may
// have megalodon.cu, too:
//     objcopy --wildcard --keep-global-symbol='cpu_*' cpu_layers.o
#include "../megalodon.c"
#include "check.h"
#define CPU_LAYERS_DEFINE
#include "../build/cpu_layers.h"

void cpu_check(const char *name, const double *a, const double *reference, size_t n, double tol) {
    check(name, a, reference, n, tol);
}
void cpu_check_true(const char *name, int ok) { check_true(name, ok); }
int cpu_check_done(void) { return check_done(); }
void cpu_random(real *x, size_t n, uint64_t seed, double scale, double shift) {
    random_fill(x, n, seed, scale, shift);
}
