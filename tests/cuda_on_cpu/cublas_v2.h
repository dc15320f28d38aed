/*
cublas_v2.h: cuBLAS's matrix products for megalodon.cu on a CPU, see cublas_api.h of this folder.
*/
#ifndef CUDA_ON_CPU_CUBLAS_V2_H
#define CUDA_ON_CPU_CUBLAS_V2_H

#include "cublas_api.h"

typedef struct cublasContext : EmuBlas{} * cublasHandle_t;
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1 };
enum cublasMath_t { CUBLAS_DEFAULT_MATH = 0, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16 };

inline cublasStatus_t cublasCreate(cublasHandle_t *handle) {
    *handle = new cublasContext{{EMU_BLAS_OPEN, NULL, 0}};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasDestroy(cublasHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetWorkspace(cublasHandle_t handle, void *workspace, size_t bytes) {
    if (!emu_blas_open(handle)) return emu_blas_fail(CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
    if ((uintptr_t)workspace % 256 != 0 || !emu_on_device(workspace, bytes))
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "the workspace is not aligned device memory");
    handle->workspace = workspace, handle->workspace_bytes = bytes;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t) {
    if (!emu_blas_open(handle)) return emu_blas_fail(CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t) {
    return emu_blas_open(handle) ? CUBLAS_STATUS_SUCCESS : emu_blas_fail(CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
}

// C (m,n) = alpha op(A) op(B) + beta C for `batch` matrices each.
inline cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa,
                                                 cublasOperation_t transb, int m, int n, int k, const void *alpha,
                                                 const void *A, cudaDataType_t a_type, int lda, long long stride_a,
                                                 const void *B, cudaDataType_t b_type, int ldb, long long stride_b,
                                                 const void *beta, void *C, cudaDataType_t c_type, int ldc,
                                                 long long stride_c, int batch, cublasComputeType_t, cublasGemmAlgo_t) {
    if (!emu_blas_open(handle)) return emu_blas_fail(CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
    if (!alpha || !beta || m < 0 || n < 0 || k < 0 || batch < 0)
        return emu_blas_fail(CUBLAS_STATUS_INVALID_VALUE, "a null pointer or a negative size");
    uint64_t M = (uint64_t)m, N = (uint64_t)n, K = (uint64_t)k;
    bool ta = transa == CUBLAS_OP_T, tb = transb == CUBLAS_OP_T;
    const EmuLayout a = {a_type, ta ? K : M, ta ? M : K, lda, stride_a, batch};
    const EmuLayout b = {b_type, tb ? N : K, tb ? K : N, ldb, stride_b, batch};
    const EmuLayout c = {c_type, M, N, ldc, stride_c, batch};
    const EmuProduct product = {transa, transb, false, NULL};
    return emu_matmul(&product, *(const float *)alpha, *(const float *)beta, EmuOperands{A, B, C, C, &a, &b, &c, &c});
}

inline cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m,
                                   int n, int k, const void *alpha, const void *A, cudaDataType_t a_type, int lda,
                                   const void *B, cudaDataType_t b_type, int ldb, const void *beta, void *C,
                                   cudaDataType_t c_type, int ldc, cublasComputeType_t compute, cublasGemmAlgo_t how) {
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, a_type, lda, 0, B, b_type, ldb, 0,
                                      beta, C, c_type, ldc, 0, 1, compute, how);
}

#endif
