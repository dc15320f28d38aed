/*
matvec_cpu.h: the matrix product of megalodon.c where A has few rows, as in decoding. matmul_cpu.h includes this file.

    C (M,N) = A (M,K) B (K,N) [+ bias (N) to every row] [+ residual (M,N)],    M <= FEW_ROWS

An element of B is used M times only. So the time is that of reading B from memory, and packing B as matmul_serial does
would double it. B is read in place and once. The threads (team_cpu.h) divide the columns of C among them.
*/
#pragma once

enum {
    FEW_ROWS = 8,            // rows of A, at most
    SHARED_ROWS = 4,         // rows of A that share a row of B', which they have in registers
    FEW_COLUMNS = 4 * LANES, // columns of C that a strip has
};

typedef struct {
    real *C;
    const real *residual, *bias; // may be NULL; residual may be C
    Matrix A, B;                 // A is not transposed
    int ldc, M, N, K;
} Matvec;

static void matvec_write(const Matvec *p, int i, int j, real product) {
    size_t at = (size_t)i * p->ldc + j;
    p->C[at] = product + (p->bias ? p->bias[j] : 0) + (p->residual ? p->residual[at] : 0);
}

// B is stored transposed, as weights are. C (i,j) is the dot product of row i of A and row j of B', for `rows` rows
// from i0 on. The order of summation does not depend on `rows`, so a text does not depend on the texts beside it.
static inline __attribute__((always_inline)) void matvec_dot(const Matvec *p, int i0, int j, int rows) {
    const real *b = p->B.at + (size_t)j * p->B.ld, *a = p->A.at + (size_t)i0 * p->A.ld;
    int k = 0;
    vec sum[SHARED_ROWS][2] = {0};
    for (; k + 2 * LANES <= p->K; k += 2 * LANES) {
        vec x0, x1, y0, y1;
        memcpy(&y0, b + k, sizeof y0);
        memcpy(&y1, b + k + LANES, sizeof y1);
        for (int i = 0; i < rows; i++) {
            memcpy(&x0, a + (size_t)i * p->A.ld + k, sizeof x0);
            memcpy(&x1, a + (size_t)i * p->A.ld + k + LANES, sizeof x1);
            sum[i][0] += x0 * y0;
            sum[i][1] += x1 * y1;
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
        matvec_write(p, i0 + i, j, lanes[0] + rest);
    }
}

// B is stored as it is, as the values of attention are. A strip of C's row i, from column j0 on, stays in registers:
// C (i,:) = sum over k of A (i,k) B (k,:).
static void matvec_strip(const Matvec *p, int i, int j0) {
    const real *a = p->A.at + (size_t)i * p->A.ld, *b = p->B.at + j0;
    int width = min(FEW_COLUMNS, p->N - j0);
    real strip[FEW_COLUMNS] = {0};
    if (width == FEW_COLUMNS) {
        vec sum[4] = {0};
        for (int k = 0; k < p->K; k++, b += p->B.ld) {
            __builtin_prefetch(b + 8 * (size_t)p->B.ld);
            for (int u = 0; u < 4; u++) {
                vec y;
                memcpy(&y, b + u * LANES, sizeof y);
                sum[u] += a[k] * y;
            }
        }
        memcpy(strip, sum, sizeof strip);
    } else {
        for (int k = 0; k < p->K; k++, b += p->B.ld) {
            for (int c = 0; c < width; c++) strip[c] += a[k] * b[c];
        }
    }
    for (int c = 0; c < width; c++) matvec_write(p, i, j0 + c, strip[c]);
}

// Columns `from` to `end` - 1 of C.
static void matvec_columns(const void *arguments, int from, int end) {
    const Matvec *p = arguments;
    for (int j = from; p->B.transposed && j < end; j++) {
        int i = 0;
        for (; i + SHARED_ROWS <= p->M; i += SHARED_ROWS) matvec_dot(p, i, j, SHARED_ROWS);
        for (; i < p->M; i++) matvec_dot(p, i, j, 1);
    }
    for (int j = from; !p->B.transposed && j < end; j += FEW_COLUMNS) {
        for (int i = 0; i < p->M; i++) matvec_strip(p, i, j);
    }
}

static void matvec(const Matvec *p) {
    team_share((Job){matvec_columns, p, p->N}, p->B.transposed ? 1 : FEW_COLUMNS, (double)p->N * p->K * sizeof(real));
}
