/*
cublasLt.h: matrix products for megalodon.cu on a CPU, see cuda_runtime.h of this folder. Matrices are stored by columns:
D (m,n) = alpha op(A) op(B) + beta C, in float, the sum over k in order. Types are CUDA_R_32F and CUDA_R_16BF. What CUDA
would refuse, or read wrongly, is an error: null pointers, shapes that do not fit, ld too small, pointers less aligned
than promised or not on the device.
*/
#ifndef CUDA_ON_CPU_CUBLASLT_H
#define CUDA_ON_CPU_CUBLASLT_H

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
enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4 };

enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_TRANSB = 4,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8
};
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8
};

typedef struct EmuBlas {
    int unused;
} * cublasLtHandle_t;

typedef struct EmuProduct {
    cublasOperation_t transa, transb;
    cublasLtEpilogue_t epilogue;
    void *bias;
} * cublasLtMatmulDesc_t;

typedef struct EmuLayout {
    cudaDataType_t type;
    uint64_t rows, columns;
    int64_t ld, stride; // stride: between the matrices of a batch
    int batch;
} * cublasLtMatrixLayout_t;

typedef struct EmuPreference {
    size_t workspace;
    uint32_t align[4]; // of A, B, C, D
} * cublasLtMatmulPreference_t;

typedef struct {
    uint32_t align[4]; // that this algorithm was chosen for
} cublasLtMatmulAlgo_t;

typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
} cublasLtMatmulHeuristicResult_t;

inline cublasStatus_t emu_blas_fail(cublasStatus_t status, const char *what) {
    fprintf(stderr, "cuBLASLt on the CPU: %s\n", what);
    return status;
}

// ----------------------------------------------------------------------------
// descriptions

template <typename T> inline cublasStatus_t emu_new(T **pointer, T value) {
    *pointer = new T(value);
    return CUBLAS_STATUS_SUCCESS;
}
template <typename T> inline cublasStatus_t emu_delete(T *pointer) {
    delete pointer;
    return CUBLAS_STATUS_SUCCESS;
}
// Sets an attribute that takes sizeof(T) bytes.
template <typename T> inline cublasStatus_t emu_set(T *attribute, const void *value, size_t bytes) {
    if (value == NULL || bytes != sizeof(T))
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "an attribute's value has another size");
    memcpy(attribute, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { return emu_new(handle, EmuBlas{0}); }
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return emu_delete(handle); }

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *product, cublasComputeType_t,
                                               cudaDataType_t scale) {
    if (scale != CUDA_R_32F) return emu_blas_fail(CUBLAS_STATUS_NOT_SUPPORTED, "alpha and beta must be float");
    return emu_new(product, EmuProduct{CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, NULL});
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product) { return emu_delete(product); }
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t which,
                                                     const void *value, size_t bytes) {
    switch (which) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return emu_set(&product->transa, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return emu_set(&product->transb, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return emu_set(&product->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return emu_set(&product->bias, value, bytes);
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}

inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType_t type, uint64_t rows,
                                                 uint64_t columns, int64_t ld) {
    return emu_new(layout, EmuLayout{type, rows, columns, ld, 0, 1});
}
inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return emu_delete(layout); }
inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                       cublasLtMatrixLayoutAttribute_t which, const void *value,
                                                       size_t bytes) {
    switch (which) {
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
        return emu_set(&layout->batch, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
        return emu_set(&layout->stride, value, bytes);
    }
    return CUBLAS_STATUS_NOT_SUPPORTED;
}

inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    return emu_new(preference, EmuPreference{0, {256, 256, 256, 256}});
}
inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return emu_delete(preference);
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t which,
                                                           const void *value, size_t bytes) {
    if (which == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return emu_set(&preference->workspace, value, bytes);
    return emu_set(&preference->align[which - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
}

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
    if (p->epilogue != CUBLASLT_EPILOGUE_DEFAULT && p->epilogue != CUBLASLT_EPILOGUE_BIAS)
        return "an unknown epilogue";
    return NULL;
}

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int requested,
                                                     cublasLtMatmulHeuristicResult_t *results, int *found) {
    *found = 0;
    if (!handle || !product || !a || !b || !c || !d || !preference || requested < 1)
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "a null pointer");
    const char *wrong = emu_wrong_product(product, a, b, c, d);
    if (wrong) return emu_blas_fail(CUBLAS_STATUS_NOT_SUPPORTED, wrong);
    *found = 1;
    results[0].workspaceSize = 0, results[0].state = CUBLAS_STATUS_SUCCESS, results[0].wavesCount = 1;
    memcpy(results[0].algo.align, preference->align, sizeof preference->align);
    return CUBLAS_STATUS_SUCCESS;
}

// Whether all of a batch of matrices is device memory.
inline bool emu_matrix_on_device(const void *matrix, const EmuLayout *x) {
    int64_t last = (int64_t)(x->batch - 1) * x->stride, first = last < 0 ? last : 0;
    int64_t end = (last > 0 ? last : 0) + (int64_t)(x->columns - 1) * x->ld + (int64_t)x->rows;
    int64_t size = (int64_t)emu_size(x->type);
    return emu_on_device((const char *)matrix + first * size, (size_t)((end - first) * size));
}

// op(X) (length, depth) as floats, in panels of `width` of its rows, a panel's numbers (depth, width) one behind the
// other; zeros fill up the last panel. X' is meant if `turned`.
inline void emu_pack(float *out, int width, const void *x, const EmuLayout *layout, int64_t batch, bool turned) {
    int64_t length = (int64_t)(turned ? layout->columns : layout->rows);
    int64_t depth = (int64_t)(turned ? layout->rows : layout->columns), panels = (length + width - 1) / width;
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (int64_t panel = 0; panel < panels; panel++) {
        for (int64_t k = 0; k < depth; k++) {
            for (int64_t i = 0; i < width; i++) {
                int64_t row = panel * width + i, at = turned ? k + row * layout->ld : row + k * layout->ld;
                out[(panel * depth + k) * width + i] =
                    row < length ? emu_get(x, layout->type, batch * layout->stride + at) : 0;
            }
        }
    }
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t product, const void *alpha,
                                     const void *A, cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b,
                                     const void *beta, const void *C, cublasLtMatrixLayout_t c, void *D,
                                     cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                                     size_t workspace_bytes, cudaStream_t) {
    enum { M = 16, N = 4 }; // of D, whose sums are in registers
    if (!handle || !product || !alpha || !A || !a || !B || !b || !beta || !c || !D || !d)
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "a null pointer");
    const float al = *(const float *)alpha, be = *(const float *)beta;
    const char *wrong = emu_wrong_product(product, a, b, c, d);
    if (wrong) return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, wrong);
    if (be != 0 && C == NULL) return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "beta needs C");
    if (C == D && (c->ld != d->ld || c->stride != d->stride))
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "C is D but has another layout");
    if (!emu_matrix_on_device(A, a) || !emu_matrix_on_device(B, b) || !emu_matrix_on_device(D, d) ||
        (be != 0 && !emu_matrix_on_device(C, c)) || (workspace_bytes > 0 && !emu_on_device(workspace, workspace_bytes)))
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "a matrix goes beyond device memory");
    const void *pointers[4] = {A, B, C ? C : D, D};
    for (int i = 0; algorithm && i < 4; i++) {
        if ((uintptr_t)pointers[i] % algorithm->align[i] != 0)
            return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "a pointer is less aligned than promised");
    }
    const bool bias = product->epilogue == CUBLASLT_EPILOGUE_BIAS;
    const int64_t m = (int64_t)d->rows, n = (int64_t)d->columns, panels = (m + M - 1) / M;
    const bool ta = product->transa == CUBLAS_OP_T, tb = product->transb == CUBLAS_OP_T;
    const int64_t K = (int64_t)(ta ? a->rows : a->columns);
    if (bias && !emu_on_device(product->bias, (size_t)m * emu_size(d->type)))
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "the bias is not in device memory");
    if (emu_dry) return CUBLAS_STATUS_SUCCESS;

    std::vector<float> left((size_t)(panels * M * K)), right((size_t)((n + N - 1) / N * N * K));
    for (int64_t batch = 0; batch < d->batch; batch++) {
        emu_pack(left.data(), M, A, a, batch, ta);
        emu_pack(right.data(), N, B, b, batch, !tb);
#ifdef _OPENMP
#pragma omp parallel for
#endif
        for (int64_t j = 0; j < n; j += N) {
            for (int64_t panel = 0; panel < panels; panel++) {
                const float *x = left.data() + panel * K * M, *y = right.data() + j * K;
                float sums[N][M] = {};
                for (int64_t k = 0; k < K; k++, x += M, y += N) {
                    for (int v = 0; v < N; v++) {
                        for (int u = 0; u < M; u++) sums[v][u] += x[u] * y[v];
                    }
                }
                for (int64_t v = 0; v < N && j + v < n; v++) {
                    for (int64_t u = 0, row = panel * M; u < M && row < m; u++, row++) {
                        float sum = al * sums[v][u];
                        if (be != 0) sum += be * emu_get(C, c->type, batch * c->stride + row + (j + v) * c->ld);
                        if (bias) sum += emu_get(product->bias, d->type, row);
                        emu_put(D, d->type, batch * d->stride + row + (j + v) * d->ld, sum);
                    }
                }
            }
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

#endif
