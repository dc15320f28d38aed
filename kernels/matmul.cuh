/*
matmul.cuh: matrix products by cuBLASLt, instead of cublasGemmEx and the separate kernels for bias and residual.

The idea: a linear map's bias and residual need no pass of their own over the output. cuBLASLt adds both while a tile of
the result is still in registers: the bias as its "epilogue", the residual as the matrix C of D = A B + C.

         K          M              M        M
      +-----+    +-----+        +-----+   +-----+
    R | inp |  K |  w' |  +   R | res | + |bias |   ->  out, written once, one rounding to bfloat16
      +-----+    +-----+        +-----+   +-----+

Choosing an algorithm takes cuBLASLt longer than a small product does. So a plan (description, layouts and algorithm) is
made once for each key: sizes, strides, alignments and epilogue. A model has a few dozen keys, used in the same order
step after step, so the search for a plan begins after the one used last.
Requires: bfloat16. Any sizes. The handle and its workspace are those of cuBLAS: a cublasHandle_t is a cublasLtHandle_t.
Measured: see dev/notes/kernels.md
*/
#pragma once
#include <cublasLt.h>

typedef struct { // everything that cuBLASLt's choice of an algorithm depends on
    int M, N, K, batch, residual, bias;
    int lda, ldb, ldc, transposed_a, transposed_b;
    int align_a, align_b, align_c, align_residual, align_bias; // bytes
    int64_t stride_a, stride_b, stride_c;
    cudaDataType_t type; // of C
} MatmulKey;

typedef struct {
    MatmulKey key;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
} MatmulPlan;

static cublasLtMatrixLayout_t matrix_layout(cudaDataType_t type, int rows, int columns, int ld, int batch,
                                            int64_t stride) {
    cublasLtMatrixLayout_t layout;
    cublasCheck(cublasLtMatrixLayoutCreate(&layout, type, (uint64_t)columns, (uint64_t)rows, ld));
    cublasCheck(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch));
    cublasCheck(
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
    return layout;
}

static void set_alignment(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t which,
                          int bytes) {
    uint32_t align = (uint32_t)bytes;
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, which, &align, sizeof align));
}

// As in matmul(), the row-major C is cuBLAS's column-major C' = op(B)' op(A)', so A and B change places.
static MatmulPlan plan_new(const MatmulKey *k, const floatX *bias) {
    MatmulPlan p;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t best;
    cublasOperation_t first = k->transposed_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t second = k->transposed_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = k->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    size_t bytes = BLAS_WORKSPACE;
    int found = 0;
    p.key = *k;
    cublasCheck(cublasLtMatmulDescCreate(&p.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cublasCheck(cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first));
    cublasCheck(cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second));
    cublasCheck(cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    if (bias) // its alignment matters, too
        cublasCheck(cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    int rows_a = k->transposed_a ? k->K : k->M, rows_b = k->transposed_b ? k->N : k->K;
    p.a = matrix_layout(CUBLAS_TYPE, rows_a, k->M + k->K - rows_a, k->lda, k->batch, k->stride_a);
    p.b = matrix_layout(CUBLAS_TYPE, rows_b, k->K + k->N - rows_b, k->ldb, k->batch, k->stride_b);
    p.c = matrix_layout(k->type, k->M, k->N, k->ldc, k->batch, k->stride_c);
    cublasCheck(cublasLtMatmulPreferenceCreate(&preference));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                                     sizeof bytes));
    set_alignment(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, k->align_b);
    set_alignment(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, k->align_a);
    set_alignment(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, k->align_residual);
    set_alignment(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, k->align_c);
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic((cublasLtHandle_t)gpu.blas, p.product, p.b, p.a, p.c, p.c,
                                                           preference, 1, &best, &found);
    if (status != CUBLAS_STATUS_SUCCESS || found == 0) {
        fprintf(stderr, "error: %s: cuBLASLt has no algorithm for the product of (%d,%d) and (%d,%d)\n", gpu.name, k->M,
                k->K, k->K, k->N);
        exit(1);
    }
    cublasCheck(cublasLtMatmulPreferenceDestroy(preference));
    p.algorithm = best.algo;
    return p;
}

// The plan for a key, made when it is first needed.
static const MatmulPlan *plan_for(const MatmulKey *key, const floatX *bias) {
    static MatmulPlan *plans;
    static int count, capacity, last;
    for (int i = 0; i < count; i++) {
        int at = (last + 1 + i) % count;
        if (memcmp(&plans[at].key, key, sizeof *key) == 0) return &plans[last = at];
    }
    if (count == capacity) {
        capacity = 2 * capacity + 64;
        plans = (MatmulPlan *)realloc(plans, (size_t)capacity * sizeof *plans);
        if (plans == NULL) {
            fprintf(stderr, "error: out of memory\n");
            exit(1);
        }
    }
    plans[last = count++] = plan_new(key, bias);
    return &plans[last];
}

// The largest power of two, up to 256, that divides an address.
static int alignment(const void *pointer) {
    uintptr_t bits = (uintptr_t)pointer | 256;
    return (int)(bits & -bits);
}

static MatmulKey matmul_key(Matrix A, Matrix B, int ldc, int M, int N, int K) {
    MatmulKey k;
    memset(&k, 0, sizeof k); // the padding, too: keys are compared as bytes
    k.M = M, k.N = N, k.K = K, k.batch = 1, k.type = CUBLAS_TYPE;
    k.lda = A.ld, k.ldb = B.ld, k.ldc = ldc, k.transposed_a = A.transposed, k.transposed_b = B.transposed;
    return k;
}

// C = op(A) op(B) + residual + bias. residual has the layout of C and may be C; bias (N) is added to each row. Both may
// be NULL.
static void matmul_run(MatmulKey key, void *C, const void *residual, const floatX *bias, const floatX *A,
                       const floatX *B) {
    const float alpha = 1, beta = residual ? 1 : 0;
    key.residual = residual != NULL, key.bias = bias != NULL;
    key.align_a = alignment(A), key.align_b = alignment(B), key.align_c = alignment(C);
    key.align_residual = residual ? alignment(residual) : key.align_c;
    key.align_bias = alignment(bias);
    const MatmulPlan *p = plan_for(&key, bias);
    if (bias)
        cublasCheck(cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    cublasCheck(cublasLtMatmul((cublasLtHandle_t)gpu.blas, p->product, &alpha, B, p->b, A, p->a, &beta,
                               residual ? residual : C, p->c, C, p->c, &p->algorithm, gpu.blas_workspace,
                               BLAS_WORKSPACE, gpu.stream));
}

// As matmul_batched() of megalodon.cu, with the same arguments.
static void matmul_fast_batched(floatX *C, int ldc, int64_t stride_c, Matrix A, Matrix B, int M, int N, int K, int add,
                                int batch) {
    MatmulKey key = matmul_key(A, B, ldc, M, N, K);
    key.batch = batch, key.stride_a = A.stride, key.stride_b = B.stride, key.stride_c = stride_c;
    matmul_run(key, C, add ? C : NULL, NULL, A.at, B.at);
}

// ----------------------------------------------------------------------------
// linear: the functions of megalodon.cu, with the same arguments

static void linear_fast_forward(floatX *out, const floatX *residual, const floatX *inp, const floatX *weight,
                                const floatX *bias, int R, int K, int M) {
    MatmulKey key = matmul_key(matrix(inp, K), transposed(weight, K), M, R, M, K);
    matmul_run(key, out, residual, bias, inp, weight);
}

static void linear_fast_backward_input(floatX *dinp, int add, const floatX *dout, const floatX *weight, int R, int K,
                                       int M) {
    MatmulKey key = matmul_key(matrix(dout, M), matrix(weight, K), K, R, K, M);
    matmul_run(key, dinp, add ? dinp : NULL, NULL, dout, weight);
}

static void sum_rows(float *out, const floatX *dy, const floatX *x, const double *mean, const float *rstd, float scale,
                     int R, int D, int G);

// dbias is not an epilogue: cuBLASLt's epilogue for it is slower than sum_rows(), and does not add.
static void linear_fast_backward_weight(float *dweight, float *dbias, const floatX *dout, const floatX *inp, int R,
                                        int K, int M) {
    MatmulKey key = matmul_key(transposed(dout, M), matrix(inp, K), K, M, K, R);
    key.type = CUDA_R_32F;
    matmul_run(key, dweight, dweight, NULL, dout, inp);
    if (dbias) sum_rows(dbias, dout, NULL, NULL, NULL, 1, R, M, 1);
}
