/*
matmul_cpu.h: the matrix product of megalodon.c, which includes this file.

    C (M,N) = A (M,K) B (K,N) [+ bias (N) to every row] [+ residual (M,N)]

Most of a model's arithmetic is here. The threads divide C into a grid of tiles. Each thread computes its tile by a
single-threaded product: that of a BLAS library where the build has one, otherwise the one below.
*/
#pragma once

// An operand of a product. Element (i,j) is at[i*ld + j], or at[j*ld + i] if it is stored transposed.
typedef struct {
    const real *at;
    int ld; // leading dimension: elements from one stored row to the next
    int transposed;
} Matrix;

static Matrix matrix(const real *at, int ld) { return (Matrix){at, ld, 0}; }
static Matrix transposed(const real *at, int ld) { return (Matrix){at, ld, 1}; }

// The part of a matrix that begins at row i and column j.
static Matrix submatrix(Matrix A, size_t i, size_t j) {
    A.at += A.transposed ? j * A.ld + i : i * A.ld + j;
    return A;
}

// ----------------------------------------------------------------------------
// the single-threaded product: C (M,N) = A B, added to what C holds if `add`; rows of C are ldc elements apart

#ifdef MEGALODON_BLAS

static void matmul_serial(real *C, int ldc, int add, Matrix A, Matrix B, int M, int N, int K) {
#ifdef MEGALODON_DOUBLE
#define cblas_gemm cblas_dgemm
#else
#define cblas_gemm cblas_sgemm
#endif
    cblas_gemm(CblasRowMajor, A.transposed ? CblasTrans : CblasNoTrans, B.transposed ? CblasTrans : CblasNoTrans, M, N,
               K, 1, A.at, A.ld, B.at, B.ld, (real)add, C, ldc);
}

enum { THREAD_BYTES = 137 << 20 }; // address space for each thread: OpenBLAS's buffer, and a stack

// Functions of OpenBLAS, NULL with another BLAS.
void openblas_set_num_threads(int) __attribute__((weak));
void *blas_memory_alloc(int) __attribute__((weak));
void blas_memory_free(void *) __attribute__((weak));

// Calls of the library are single-threaded, since matmul() has distributed the work already.
static void blas_threads(int threads) {
#ifdef _OPENMP
    threads = 1;
#endif
    if (openblas_set_num_threads) openblas_set_num_threads(threads);
}

// OpenBLAS needs a buffer for every thread that multiplies. It keeps them, but retries forever if it cannot get one.
// So all of them are allocated before the first product. Returns 0 if out of memory.
static int blas_buffers(int threads) {
    static int allocated = 0;
    size_t bytes = (size_t)threads * THREAD_BYTES;
    if (!blas_memory_alloc || !blas_memory_free || threads <= allocated) return 1;
    void *probe = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (probe == MAP_FAILED) return 0;
    munmap(probe, bytes);
    void *buffers[threads];
    for (int i = 0; i < threads; i++) buffers[i] = blas_memory_alloc(0);
    for (int i = 0; i < threads; i++) blas_memory_free(buffers[i]);
    allocated = threads;
    return 1;
}

#else

enum { THREAD_BYTES = 8 << 20 }; // address space for each thread: a stack
static void blas_threads(int threads) { (void)threads; }
static int blas_buffers(int threads) { return threads > 0; }

// Without a library. The idea is that of every fast product: bring a part of A and a part of B into the caches once, in
// the order in which the inner loop reads them, and use each loaded element many times.
//
//     for parts of GEMM_N columns of B and GEMM_K of K:   pack B's part          b: panels (GEMM_K, TILE_N)
//         for parts of GEMM_M rows of A:                  pack A's part          a: panels (GEMM_K, TILE_M)
//             for each TILE_M x TILE_N tile of C:         matmul_tile, with the tile in registers
enum { TILE_M = 6, TILE_N = 2 * LANES, GEMM_M = 24 * TILE_M, GEMM_N = 16 * TILE_N, GEMM_K = 256 };

// One tile of C from a (K, TILE_M) and b (K, TILE_N): K outer products. Only rows x columns of it are inside C.
static void matmul_tile(real *C, int ldc, const real *a, const real *b, int K, int rows, int columns, int add) {
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

// Packs `count` rows (or columns) of a matrix, K long, into panels of `width`: out (panels, K, width), zero where the
// last panel has no more. Element (i,k) is A[i*si + k*sk]; one of the strides is 1.
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

static void matmul_serial(real *C, int ldc, int add, Matrix A, Matrix B, int M, int N, int K) {
    static _Thread_local real a[GEMM_M * GEMM_K], b[GEMM_N * GEMM_K];
    size_t ai = A.transposed ? 1 : (size_t)A.ld, ak = A.transposed ? (size_t)A.ld : 1; // strides of A (i,k)
    size_t bj = B.transposed ? (size_t)B.ld : 1, bk = B.transposed ? 1 : (size_t)B.ld; // strides of B (k,j)
    for (int j0 = 0; j0 < N; j0 += GEMM_N) {
        for (int k0 = 0; k0 < K; k0 += GEMM_K) {
            int n = min(GEMM_N, N - j0), depth = min(GEMM_K, K - k0);
            matmul_pack(b, B.at + j0 * bj + k0 * bk, bj, bk, n, depth, TILE_N);
            for (int i0 = 0; i0 < M; i0 += GEMM_M) {
                int m = min(GEMM_M, M - i0);
                matmul_pack(a, A.at + i0 * ai + k0 * ak, ai, ak, m, depth, TILE_M);
                for (int j = 0; j < n; j += TILE_N) {
                    for (int i = 0; i < m; i += TILE_M) {
                        matmul_tile(C + (size_t)(i0 + i) * ldc + j0 + j, ldc, a + (size_t)i * depth,
                                    b + (size_t)j * depth, depth, min(TILE_M, m - i), min(TILE_N, n - j),
                                    k0 > 0 || add);
                    }
                }
            }
        }
    }
}

#endif

#include "matvec_cpu.h"

// ----------------------------------------------------------------------------
// the product for all threads. bias (N) and residual (M,N) may be NULL. residual may be C itself: then the product is
// added to C. Rows of C and of residual are ldc elements apart.

// Sets a tile of C (rows, columns) to bias + residual, before the product is added to it.
static void matmul_init(real *C, int ldc, const real *residual, const real *bias, int rows, int columns) {
    for (int i = 0; i < rows; i++) {
        real *c = C + (size_t)i * ldc;
        const real *first = residual ? residual + (size_t)i * ldc : bias;
        if (c != first) memcpy(c, first, (size_t)columns * sizeof *c);
        if (!residual || !bias) continue;
        for (int j = 0; j < columns; j++) c[j] += bias[j];
    }
}

// The grid is the one for which the threads together read least of A and B: tiles of nearly equal size, near squares.
// Without a library an element's sum runs over k in the same order whatever the grid, so that the result does not
// depend on the number of threads.
static void matmul(real *C, int ldc, const real *residual, Matrix A, Matrix B, const real *bias, int M, int N, int K) {
    if (M <= FEW_ROWS && !A.transposed) {
        matvec(&(Matvec){C, residual, bias, A, B, ldc, M, N, K});
        return;
    }
    int threads = is_large((double)M * N * K / 16) ? threads_here() : 1, rows = M, columns = N;
    double least = INFINITY;
    for (int down = 1; down <= threads; down++) {
        int r = ceil_div(ceil_div(M, down), 8) * 8, c = ceil_div(ceil_div(N, threads / down), 16) * 16;
        double cost = (double)r * c + 64.0 * (r + c);
        if (cost < least) least = cost, rows = r, columns = c;
    }
    int add = bias || residual;
#pragma omp parallel for collapse(2) schedule(static) if (threads > 1)
    for (int i0 = 0; i0 < M; i0 += rows) {
        for (int j0 = 0; j0 < N; j0 += columns) {
            int m = min(rows, M - i0), n = min(columns, N - j0);
            size_t at = (size_t)i0 * ldc + j0;
            Matrix a = submatrix(A, i0, 0), b = submatrix(B, 0, j0);
            if (add) matmul_init(C + at, ldc, residual ? residual + at : NULL, bias ? bias + j0 : NULL, m, n);
            matmul_serial(C + at, ldc, add, a, b, m, n, K);
        }
    }
}
