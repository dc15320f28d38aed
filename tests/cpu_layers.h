// The layers of megalodon.c under names of their own, for tests/test_cuda.cu, which has megalodon.cu's in the same
// program. Arguments are those of megalodon.c, without what is scratch there: see cpu_layers.c. All numbers are float.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// tests/check.h
void cpu_check(const char *name, const double *a, const double *reference, size_t n, double tol);
void cpu_check_true(const char *name, int ok);
int cpu_check_done(void);
void cpu_random(float *x, size_t n, uint64_t seed, double scale, double shift);

void cpu_embedding_forward(float *out, const int32_t *tokens, const float *embed, float scale, int R, int D);
void cpu_embedding_backward(float *dembed, const float *dout, const int32_t *tokens, float scale, int R, int D);

void cpu_dropout(float *out, const float *inp, double p, uint64_t seed, uint32_t stream, uint32_t step, uint32_t layer,
                 uint64_t first, size_t n);

void cpu_timestep_norm_forward(float *out, double *mean, float *rstd, double *mean_out, double *m2_out,
                               const float *inp, const float *weight, const float *bias, const double *prev_mean,
                               const double *prev_m2, const int64_t *count, int B, int L, int D, int G, double eps);
void cpu_timestep_norm_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp,
                                const float *weight, const double *mean, const float *rstd, const int64_t *count, int B,
                                int L, int D, int G);

// coeffs, dcoeffs (5,N,D): p, q_re, q_im, g_re, g_im
void cpu_cema_coeffs_forward(float *coeffs, const float *alpha, const float *delta, const float *theta,
                            const float *gamma, int D, int N);
void cpu_cema_coeffs_backward(float *dalpha, float *ddelta, float *dtheta, float *dgamma, const float *dcoeffs,
                             const float *alpha, const float *delta, const float *theta, int D, int N);
void cpu_cema_forward(float *out, float *h_out, const float *inp, const float *coeffs, const float *omega,
                      const float *h_in, int B, int L, int D, int N);
void cpu_cema_backward(float *dinp, float *dcoeffs, float *domega, const float *dout, const float *inp,
                       const float *coeffs, const float *omega, const float *h_in, int B, int L, int D, int N);

void cpu_rmsnorm_forward(float *out, float *rstd, const float *inp, const float *weight, int R, int D, double eps);
void cpu_rmsnorm_backward(float *dinp, float *dweight, const float *dout, const float *inp, const float *weight,
                          const float *rstd, int R, int D);

void cpu_linear_forward(float *out, int add, const float *inp, const float *weight, const float *bias, int R, int K,
                        int M);
void cpu_linear_backward(float *dinp, int add, float *dweight, float *dbias, const float *dout, const float *inp,
                         const float *weight, int R, int K, int M);

// RMSNorm of every head of z, scale, and with base > 0 the rotation
void cpu_qk_forward(float *q, float *k, const float *z, const float *gamma, const float *beta, const int64_t *count,
                    int B, int L, int Z, int dz, int C, double base, double eps);
void cpu_qk_backward(float *dz_out, float *dgamma, float *dbeta, const float *dq, const float *dk, const float *z,
                     const float *gamma, int B, int L, int Z, int dz, int C, double base, double eps);

void cpu_silu_forward(float *out, const float *inp, size_t n);
void cpu_silu_backward(float *dinp, const float *dout, const float *inp, size_t n);
void cpu_gate_forward(float *out, const float *a, const float *b, size_t n);
void cpu_gate_backward(float *da, float *db, const float *dout, const float *a, const float *b, size_t n);

// attention's dropout has probability p and cpu_dropout's other numbers
void cpu_attention_forward(float *o, float *lse, float *cache_k, float *cache_v, const float *q, const float *k,
                           const float *v, const int64_t *count, double p, uint64_t seed, uint32_t stream,
                           uint32_t step, uint32_t layer, uint64_t first, int B, int L, int C, int H, int Z, int E);
void cpu_attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *o, const float *lse,
                            const float *q, const float *k, const float *v, double p, uint64_t seed, uint32_t stream,
                            uint32_t step, uint32_t layer, uint64_t first, int B, int L, int C, int H, int Z, int E);

void cpu_layernorm_forward(float *out, double *mean, float *rstd, const float *inp, const float *weight,
                           const float *bias, int R, int D, double eps);
void cpu_layernorm_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp,
                            const float *weight, const double *mean, const float *rstd, int R, int D);

void cpu_rescale_forward(float *out, const float *inp, const float *alpha, int R, int D);
void cpu_rescale_backward(float *dinp, float *dalpha, const float *dout, const float *inp, const float *alpha, int R,
                          int D);
void cpu_add(float *out, const float *inp, size_t n);

void cpu_output_loss(double *losses, float *dx, float *doutput, const float *x, const float *output,
                     const int32_t *targets, double grad_scale, int R, int D, int V);

double cpu_grad_norm(const float *grads, size_t n);
void cpu_update(float *params, float *moment1, float *moment2, const float *grads, size_t n, double beta1, double beta2,
                double eps, double weight_decay, double lr, double grad_scale, int64_t update);

#ifdef __cplusplus
}
#endif
