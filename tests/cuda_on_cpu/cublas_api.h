/*
cublas_api.h: matrix products on a CPU, for cublas_v2.h and cublasLt.h of this folder. Matrices are stored by columns:
D (m,n) = alpha op(A) op(B) + beta C, in float, with the sum over k in order. Types are CUDA_R_32F and CUDA_R_16BF. What
CUDA would refuse, or read wrongly, is an error: null pointers, shapes that do not fit, an ld that is too small, pointers
that are not in device memory.
*/
#ifndef CUDA_ON_CPU_CUBLAS_API_H
#define CUDA_ON_CPU_CUBLAS_API_H

#include "cuda_bf16.h"
#include "cuda_runtime.h"

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0,
    CUBLAS_STATUS_NOT_INITIALIZED = 1,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };

// A handle of cuBLAS is one of cuBLASLt, too, after a cast. Both point to this.
enum { EMU_BLAS_OPEN = 0x626c6173 };
struct EmuBlas {
    int open; // EMU_BLAS_OPEN
    void *workspace;
    size_t workspace_bytes;
};

inline cublasStatus_t emu_blas_fail(cublasStatus_t status, const char *what) {
    fprintf(stderr, "cuBLAS on the CPU: %s\n", what);
    return status;
}
inline bool emu_blas_open(const void *handle) {
    return handle != NULL && ((const EmuBlas *)handle)->open == EMU_BLAS_OPEN;
}

// A matrix, or `batch` of them, `stride` elements apart.
typedef struct EmuLayout {
    cudaDataType_t type;
    uint64_t rows, columns;
    int64_t ld, stride;
    int batch;
} EmuLayout;

struct EmuProduct {
    cublasOperation_t transa, transb;
    bool has_bias;
    const void *bias; // (m), added to each column; of D's type
};

// ----------------------------------------------------------------------------
// products

inline size_t emu_size(int type) { return type == CUDA_R_32F ? 4 : 2; }
inline float emu_get(const void *matrix, int type, int64_t i) {
    return type == CUDA_R_32F ? ((const float *)matrix)[i] : __bfloat162float(((const __nv_bfloat16 *)matrix)[i]);
}
inline void emu_put(void *matrix, int type, int64_t i, float x) {
    if (type == CUDA_R_32F) {
        ((float *)matrix)[i] = x;
    } else {
        ((__nv_bfloat16 *)matrix)[i] = __float2bfloat16(x);
    }
}

// NULL if the product can be computed, otherwise what is wrong.
inline const char *emu_wrong_product(const EmuProduct *p, const EmuLayout *a, const EmuLayout *b, const EmuLayout *c,
                                     const EmuLayout *d) {
    bool ta = p->transa == CUBLAS_OP_T, tb = p->transb == CUBLAS_OP_T;
    for (const EmuLayout *x : {a, b, c, d}) {
        if (x->type != CUDA_R_32F && x->type != CUDA_R_16BF) return "a type that is neither float nor bfloat16";
        if (x->rows == 0 || x->columns == 0) return "an empty matrix";
        if (x->ld < (int64_t)x->rows) return "ld is less than the rows";
        if (x->batch < 1 || x->batch != d->batch) return "batches of different sizes";
    }
    if ((ta ? a->columns : a->rows) != d->rows) return "op(A) and D have different rows";
    if ((tb ? b->rows : b->columns) != d->columns) return "op(B) and D have different columns";
    if ((ta ? a->rows : a->columns) != (tb ? b->columns : b->rows)) return "op(A)'s columns are not op(B)'s rows";
    if (c->rows != d->rows || c->columns != d->columns || c->type != d->type) return "C and D have different forms";
    if (a->type != b->type) return "A and B have different types";
    return NULL;
}

// Whether all of a batch of matrices is device memory.
inline bool emu_matrix_on_device(const void *matrix, const EmuLayout *x) {
    int64_t last = (int64_t)(x->batch - 1) * x->stride, first = last < 0 ? last : 0;
    int64_t end = (last > 0 ? last : 0) + (int64_t)(x->columns - 1) * x->ld + (int64_t)x->rows;
    int64_t size = (int64_t)emu_size(x->type);
    return emu_on_device((const char *)matrix + first * size, (size_t)((end - first) * size));
}

// op(X) (length, depth) as floats, in panels of `width` of its rows, a panel (depth, width) contiguous; the last
// panel is padded with zeros. transposed: of X'.
inline void emu_pack(float *out, int width, const void *x, const EmuLayout *layout, int64_t batch, bool transposed) {
    int64_t length = (int64_t)(transposed ? layout->columns : layout->rows);
    int64_t depth = (int64_t)(transposed ? layout->rows : layout->columns), panels = (length + width - 1) / width;
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (int64_t panel = 0; panel < panels; panel++) {
        for (int64_t k = 0; k < depth; k++) {
            for (int64_t i = 0; i < width; i++) {
                int64_t row = panel * width + i, at = transposed ? k + row * layout->ld : row + k * layout->ld;
                out[(panel * depth + k) * width + i] =
                    row < length ? emu_get(x, layout->type, batch * layout->stride + at) : 0;
            }
        }
    }
}

// A, B, C, D with their layouts. C may be NULL if beta is 0.
struct EmuOperands {
    const void *A, *B, *C;
    void *D;
    const EmuLayout *a, *b, *c, *d;
};

inline cublasStatus_t emu_matmul(const EmuProduct *product, float alpha, float beta, EmuOperands x,
                                 cudaStream_t stream = 0) {
    enum { M = 16, N = 4 }; // elements of D whose sums are in registers
    const EmuLayout *a = x.a, *b = x.b, *c = x.c, *d = x.d;
    if (!x.A || !x.B || !x.D) return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "a null pointer");
    const char *wrong = emu_wrong_product(product, a, b, c, d);
    if (wrong) return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, wrong);
    if (beta != 0 && x.C == NULL) return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "beta needs C");
    if (x.C == x.D && (c->ld != d->ld || c->stride != d->stride))
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "C is D but has another layout");
    if (!emu_matrix_on_device(x.A, a) || !emu_matrix_on_device(x.B, b) || !emu_matrix_on_device(x.D, d) ||
        (beta != 0 && !emu_matrix_on_device(x.C, c)))
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "a matrix goes beyond device memory");
    const int64_t m = (int64_t)d->rows, n = (int64_t)d->columns, panels = (m + M - 1) / M;
    const bool ta = product->transa == CUBLAS_OP_T, tb = product->transb == CUBLAS_OP_T;
    const int64_t K = (int64_t)(ta ? a->rows : a->columns);
    if (product->has_bias && !emu_on_device(product->bias, (size_t)m * emu_size(d->type)))
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "the bias is not in device memory");
    if (emu_records(stream, [product = *product, alpha, beta, x, a = *a, b = *b, c = *c, d = *d] {
            emu_matmul(&product, alpha, beta, EmuOperands{x.A, x.B, x.C, x.D, &a, &b, &c, &d});
        }))
        return CUBLAS_STATUS_SUCCESS;
    if (emu_dry) return CUBLAS_STATUS_SUCCESS;

    std::vector<float> left((size_t)(panels * M * K)), right((size_t)((n + N - 1) / N * N * K));
    for (int64_t batch = 0; batch < d->batch; batch++) {
        emu_pack(left.data(), M, x.A, a, batch, ta);
        emu_pack(right.data(), N, x.B, b, batch, !tb);
#ifdef _OPENMP
#pragma omp parallel for
#endif
        for (int64_t j = 0; j < n; j += N) {
            for (int64_t panel = 0; panel < panels; panel++) {
                const float *u = left.data() + panel * K * M, *v = right.data() + j * K;
                float sums[N][M] = {};
                for (int64_t k = 0; k < K; k++, u += M, v += N) {
                    for (int column = 0; column < N; column++) {
                        for (int row = 0; row < M; row++) sums[column][row] += u[row] * v[column];
                    }
                }
                for (int64_t column = 0; column < N && j + column < n; column++) {
                    for (int64_t i = 0, row = panel * M; i < M && row < m; i++, row++) {
                        float sum = alpha * sums[column][i];
                        if (beta != 0)
                            sum += beta * emu_get(x.C, c->type, batch * c->stride + row + (j + column) * c->ld);
                        if (product->has_bias) sum += emu_get(product->bias, d->type, row);
                        emu_put(x.D, d->type, batch * d->stride + row + (j + column) * d->ld, sum);
                    }
                }
            }
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

#endif
