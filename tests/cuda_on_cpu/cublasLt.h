/*
cublasLt.h: cuBLASLt's matrix products for kernels/matmul.cuh on a CPU, see cublas_api.h of this folder. A pointer that is
less aligned than promised is an error, too.
*/
#ifndef CUDA_ON_CPU_CUBLASLT_H
#define CUDA_ON_CPU_CUBLASLT_H

#include "cublas_api.h"

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

typedef struct cublasLtContext : EmuBlas{} * cublasLtHandle_t;

typedef struct EmuDescription {
    EmuProduct product;
    cublasLtEpilogue_t epilogue;
} * cublasLtMatmulDesc_t;

typedef EmuLayout *cublasLtMatrixLayout_t;

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

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    return emu_new(handle, cublasLtContext{{EMU_BLAS_OPEN, NULL, 0}});
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return emu_delete(handle); }

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *description, cublasComputeType_t,
                                               cudaDataType_t scale) {
    if (scale != CUDA_R_32F) return emu_blas_fail(CUBLAS_STATUS_NOT_SUPPORTED, "alpha and beta must be float");
    return emu_new(description, EmuDescription{{CUBLAS_OP_N, CUBLAS_OP_N, false, NULL}, CUBLASLT_EPILOGUE_DEFAULT});
}
inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) { return emu_delete(description); }
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                                     cublasLtMatmulDescAttributes_t which, const void *value,
                                                     size_t bytes) {
    switch (which) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
        return emu_set(&description->product.transa, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
        return emu_set(&description->product.transb, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
        return emu_set(&description->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
        return emu_set(&description->product.bias, value, bytes);
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

inline bool emu_epilogue(const EmuDescription *description, EmuProduct *product) {
    *product = description->product;
    product->has_bias = description->epilogue == CUBLASLT_EPILOGUE_BIAS;
    return product->has_bias || description->epilogue == CUBLASLT_EPILOGUE_DEFAULT;
}

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int requested,
                                                     cublasLtMatmulHeuristicResult_t *results, int *found) {
    *found = 0;
    EmuProduct product;
    if (!emu_blas_open(handle) || !description || !a || !b || !c || !d || !preference || requested < 1)
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "a null pointer");
    if (!emu_epilogue(description, &product)) return emu_blas_fail(CUBLAS_STATUS_NOT_SUPPORTED, "an unknown epilogue");
    const char *wrong = emu_wrong_product(&product, a, b, c, d);
    if (wrong) return emu_blas_fail(CUBLAS_STATUS_NOT_SUPPORTED, wrong);
    *found = 1;
    results[0].workspaceSize = 0, results[0].state = CUBLAS_STATUS_SUCCESS, results[0].wavesCount = 1;
    memcpy(results[0].algo.align, preference->align, sizeof preference->align);
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void *alpha,
                                     const void *A, cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b,
                                     const void *beta, const void *C, cublasLtMatrixLayout_t c, void *D,
                                     cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                                     size_t workspace_bytes, cudaStream_t stream) {
    EmuProduct product;
    if (!emu_blas_open(handle) || !description || !alpha || !a || !b || !beta || !c || !d)
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "a null pointer");
    if (!emu_epilogue(description, &product)) return emu_blas_fail(CUBLAS_STATUS_NOT_SUPPORTED, "an unknown epilogue");
    if (workspace_bytes > 0 && !emu_on_device(workspace, workspace_bytes))
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "the workspace goes beyond device memory");
    const void *pointers[4] = {A, B, C ? C : D, D};
    for (int i = 0; algorithm && i < 4; i++) {
        if ((uintptr_t)pointers[i] % algorithm->align[i] != 0)
            return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "a pointer is less aligned than promised");
    }
    return emu_matmul(&product, *(const float *)alpha, *(const float *)beta, EmuOperands{A, B, C, D, a, b, c, d},
                      stream);
}

#endif
