/*
matvec_cpu.h: the matrix product of megalodon.c where A has few rows, as in decoding. matmul_cpu.h includes this file.

Each element of B is used once for each row of A, so the time is that of reading B from memory, and all threads must
read. But a token of a model has a hundred such products, of 10 to 100 microseconds each. A parallel region for each of
them costs as much again with 16 threads: its barriers wait until every thread has woken, whether it has work or not.

So a token has one parallel region, the team. Thread 0 runs the model. The other threads wait in team_work(), which does
not sleep, for parts of products:

    thread 0                                      other threads
    team_open()
    |  norms, CEMA, ..: alone
    |  a product: left = number of parts    -->   take parts until left is 0
    |  takes parts, too                           done += 1 for each
    |  waits until done = number of parts   <--
    |  ..
    team_close()                            -->   leave the region

Thread 0 waits for parts that were taken, not for threads. A thread that the system has put aside delays nothing. Parts
are rows of B (columns of C), at least PART_BYTES each, so that small products and small models use fewer threads.
*/
#pragma once
#include <sched.h>     // defines: sched_yield
#include <stdatomic.h> // defines: atomic_int

enum {
    FEW_ROWS = 8,         // rows of A, at most
    PART_BYTES = 1 << 16, // bytes of B in a part, at least
    SPINS = 2000,         // turns of a waiting loop before it offers its core to other processes
};

// ----------------------------------------------------------------------------
// one thread: columns `from` to `end` of C (M,N) = A (M,K) B (K,N) [+ bias (N)] [+ residual (M,N)]

typedef struct {
    real *C;
    const real *residual, *bias; // may be NULL
    Matrix A, B;
    int ldc, M, N, K;
} FewRows;

static void few_rows_write(const FewRows *p, int i, int j, real product) {
    size_t at = (size_t)i * p->ldc + j;
    p->C[at] = product + (p->bias ? p->bias[j] : 0) + (p->residual ? p->residual[at] : 0);
}

// B is stored transposed, as weights are: C (i,j) is the dot product of row i of A and row j of B'. `rows` rows of A
// share what is read of B. An element is summed in the same order whatever `rows`.
static inline __attribute__((always_inline)) void few_rows_dot(const FewRows *p, int i0, int j, int rows) {
    const real *b = p->B.at + (size_t)j * p->B.ld, *a = p->A.at + (size_t)i0 * p->A.ld;
    int k = 0;
    vec sum[4][2] = {0};
    for (; k + 2 * LANES <= p->K; k += 2 * LANES) {
        vec b0, b1, a0, a1;
        memcpy(&b0, b + k, sizeof b0);
        memcpy(&b1, b + k + LANES, sizeof b1);
        for (int i = 0; i < rows; i++) {
            memcpy(&a0, a + (size_t)i * p->A.ld + k, sizeof a0);
            memcpy(&a1, a + (size_t)i * p->A.ld + k + LANES, sizeof a1);
            sum[i][0] += a0 * b0;
            sum[i][1] += a1 * b1;
        }
    }
    for (int i = 0; i < rows; i++) {
        real lanes[LANES], rest = 0;
        vec both = sum[i][0] + sum[i][1];
        memcpy(lanes, &both, sizeof lanes);
        for (int half = LANES / 2; half > 0; half /= 2) {
            for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
        }
        for (int r = k; r < p->K; r++) rest += a[(size_t)i * p->A.ld + r] * b[r];
        few_rows_write(p, i0 + i, j, lanes[0] + rest);
    }
}

// B is stored as it is, as the values of attention are: C (i,:) = sum over k of A (i,k) B (k,:). A strip of C stays in
// registers.
enum { FEW_COLUMNS = 4 * LANES };
static void few_rows_strip(const FewRows *p, int i, int j0) {
    const real *a = p->A.at + (size_t)i * p->A.ld, *b = p->B.at + j0;
    int width = min(FEW_COLUMNS, p->N - j0);
    vec sum[4] = {0};
    real strip[FEW_COLUMNS] = {0};
    if (width == FEW_COLUMNS) {
        for (int k = 0; k < p->K; k++, b += p->B.ld) {
            __builtin_prefetch(b + 8 * (size_t)p->B.ld);
            for (int u = 0; u < 4; u++) {
                vec x;
                memcpy(&x, b + u * LANES, sizeof x);
                sum[u] += a[k] * x;
            }
        }
        memcpy(strip, sum, sizeof strip);
    } else {
        for (int k = 0; k < p->K; k++, b += p->B.ld) {
            for (int c = 0; c < width; c++) strip[c] += a[k] * b[c];
        }
    }
    for (int c = 0; c < width; c++) few_rows_write(p, i, j0 + c, strip[c]);
}

static void few_rows_columns(const FewRows *p, int from, int end) {
    for (int j = from; p->B.transposed && j < end; j++) {
        int i = 0;
        for (; i + 4 <= p->M; i += 4) few_rows_dot(p, i, j, 4);
        for (; i < p->M; i++) few_rows_dot(p, i, j, 1);
    }
    for (int j = from; !p->B.transposed && j < end; j += FEW_COLUMNS) {
        for (int i = 0; i < p->M; i++) few_rows_strip(p, i, j);
    }
}

// ----------------------------------------------------------------------------
// the team

static struct {
    int threads;     // 0: no team
    FewRows product; // the one that has parts left
    int columns;     // in a part of it
    _Alignas(64) atomic_int left;
    _Alignas(64) atomic_int done;
    _Alignas(64) atomic_int open;
} team;

static void wait_a_moment(int turn) {
    if (turn > SPINS) sched_yield();
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

// Computes parts of the present product until none is left. An atomic_fetch_sub of a late thread is harmless: it takes
// a part of the next product, or leaves a negative number, which the next product overwrites.
static void team_parts(void) {
    for (int part; atomic_load(&team.left) > 0 && (part = atomic_fetch_sub(&team.left, 1) - 1) >= 0;) {
        int from = part * team.columns;
        few_rows_columns(&team.product, from, min(from + team.columns, team.product.N));
        atomic_fetch_add(&team.done, 1);
    }
}

static void team_open(int threads) { team.threads = threads, atomic_store(&team.open, 1); }
static void team_close(void) { team.threads = 0, atomic_store(&team.open, 0); }
static void team_work(void) {
    for (int turn = 0; atomic_load(&team.open); turn++) {
        if (atomic_load(&team.left) > 0) team_parts(), turn = 0;
        wait_a_moment(turn);
    }
}

// Runs `call` on this thread, with the other threads in a team if `shared`.
#define WITH_TEAM(shared, call)                                                                                        \
    do {                                                                                                               \
        if (shared) {                                                                                                  \
            team_open(threads_here());                                                                                 \
            _Pragma("omp parallel") {                                                                                  \
                if (thread_number() > 0) team_work();                                                                  \
                else call, team_close();                                                                               \
            }                                                                                                          \
        } else {                                                                                                       \
            call;                                                                                                      \
        }                                                                                                              \
    } while (0)

// C (M,N) = A (M,K) B (K,N) [+ bias] [+ residual], with M <= FEW_ROWS; see matmul().
static void matvec(const FewRows *p) {
    int threads = team.threads > 0 ? team.threads : threads_here(), unit = p->B.transposed ? 4 : FEW_COLUMNS;
    double bytes = (double)p->N * p->K * sizeof(real);
    int parts = (int)fmin(bytes / PART_BYTES, 2.0 * threads);
    if (threads == 1 || parts < 2) {
        few_rows_columns(p, 0, p->N);
        return;
    }
    int columns = ceil_div(ceil_div(p->N, parts), unit) * unit;
    parts = ceil_div(p->N, columns);
    if (team.threads > 0) {
        team.product = *p, team.columns = columns;
        atomic_store(&team.done, 0);
        atomic_store(&team.left, parts);
        team_parts();
        for (int turn = 0; atomic_load(&team.done) < parts; turn++) wait_a_moment(turn);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int from = 0; from < p->N; from += columns) few_rows_columns(p, from, min(from + columns, p->N));
}
