// See cpu_layers.h. megalodon.c is included, since layers are static; afterwards only cpu_* stay global:
//     objcopy --wildcard --keep-global-symbol='cpu_*' cpu_layers.o
#include "../megalodon.c"
#include "check.h"
#include "cpu_layers.h"

static real *scratch(size_t n) {
    real *memory = calloc(n ? n : 1, sizeof *memory);
    if (memory) return memory;
    fprintf(stderr, "error: out of memory\n");
    exit(1);
}

void cpu_check(const char *name, const double *a, const double *reference, size_t n, double tol) {
    check(name, a, reference, n, tol);
}
void cpu_check_true(const char *name, int ok) { check_true(name, ok); }
int cpu_check_done(void) { return check_done(); }
void cpu_random(float *x, size_t n, uint64_t seed, double scale, double shift) {
    random_fill(x, n, seed, scale, shift);
}

void cpu_embedding_forward(float *out, const int32_t *tokens, const float *embed, float scale, int R, int D) {
    embedding_forward(out, tokens, embed, scale, R, D);
}
void cpu_embedding_backward(float *dembed, const float *dout, const int32_t *tokens, float scale, int R, int D) {
    embedding_backward(dembed, dout, tokens, scale, R, D);
}

static Mask mask_from(double p, uint64_t seed, uint32_t stream, uint32_t step, uint32_t layer, uint64_t first) {
    return (Mask){.p = p, .seed = seed, .stream = stream, .step = step, .layer = layer, .first = first};
}
void cpu_dropout(float *out, const float *inp, double p, uint64_t seed, uint32_t stream, uint32_t step, uint32_t layer,
                 uint64_t first, size_t n) {
    dropout(out, inp, mask_from(p, seed, stream, step, layer, first), n);
}

void cpu_timestep_norm_forward(float *out, double *mean, float *rstd, double *mean_out, double *m2_out,
                               const float *inp, const float *weight, const float *bias, const double *prev_mean,
                               const double *prev_m2, const int64_t *count, int B, int L, int D, int G, double eps) {
    timestep_norm_forward(out, mean, rstd, mean_out, m2_out, inp, weight, bias, prev_mean, prev_m2, count, B, L, D, G, eps);
}
void cpu_timestep_norm_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp,
                                const float *weight, const double *mean, const float *rstd, const int64_t *count, int B,
                                int L, int D, int G) {
    timestep_norm_backward(dinp, dweight, dbias, NULL, dout, inp, weight, mean, rstd, count, B, L, D, G);
}

// ----------------------------------------------------------------------------
// CEMA, whose coefficients are padded to whole strips here

static Coeffs coeffs_new(int D, int N) { // five arrays one behind the other, freed by c.p
    size_t n = (size_t)N * strip_channels(D);
    real *all = scratch(5 * n);
    return (Coeffs){all, all + n, all + 2 * n, all + 3 * n, all + 4 * n};
}
static Coeffs coeffs_padded(const float *coeffs, int D, int N) {
    Coeffs c = coeffs_new(D, N);
    for (size_t i = 0; i < 5 * (size_t)N; i++) {
        memcpy(c.p + i * strip_channels(D), coeffs + i * D, (size_t)D * sizeof *coeffs);
    }
    return c;
}
static void coeffs_take_back(float *coeffs, Coeffs c, int D, int N) {
    for (size_t i = 0; i < 5 * (size_t)N; i++) {
        memcpy(coeffs + i * D, c.p + i * strip_channels(D), (size_t)D * sizeof *coeffs);
    }
    free(c.p);
}

void cpu_cema_coeffs_forward(float *coeffs, const float *alpha, const float *delta, const float *theta,
                            const float *gamma, int D, int N) {
    Coeffs c = coeffs_new(D, N);
    cema_coeffs_forward(&c, alpha, delta, theta, gamma, D, N);
    coeffs_take_back(coeffs, c, D, N);
}
void cpu_cema_coeffs_backward(float *dalpha, float *ddelta, float *dtheta, float *dgamma, const float *dcoeffs,
                             const float *alpha, const float *delta, const float *theta, int D, int N) {
    Coeffs dc = coeffs_padded(dcoeffs, D, N);
    cema_coeffs_backward(dalpha, ddelta, dtheta, dgamma, &dc, alpha, delta, theta, D, N);
    free(dc.p);
}
void cpu_cema_forward(float *out, float *h_out, const float *inp, const float *coeffs, const float *omega,
                      const float *h_in, int B, int L, int D, int N) {
    Coeffs c = coeffs_padded(coeffs, D, N);
    cema_forward(out, NULL, h_out, inp, &c, omega, h_in, B, L, D, N);
    free(c.p);
}
void cpu_cema_backward(float *dinp, float *dcoeffs, float *domega, const float *dout, const float *inp,
                       const float *coeffs, const float *omega, const float *h_in, int B, int L, int D, int N) {
    Coeffs c = coeffs_padded(coeffs, D, N), dc = coeffs_new(D, N);
    real *h_blocks = scratch((size_t)B * ceil_div(L, CEMA_BLOCK) * 2 * N * D), *out = scratch((size_t)B * L * D);
    cema_forward(out, h_blocks, NULL, inp, &c, omega, h_in, B, L, D, N);
    cema_backward(dinp, &dc, domega, NULL, dout, inp, h_blocks, &c, omega, B, L, D, N);
    coeffs_take_back(dcoeffs, dc, D, N);
    free(c.p), free(h_blocks), free(out);
}

// ----------------------------------------------------------------------------

void cpu_rmsnorm_forward(float *out, float *rstd, const float *inp, const float *weight, int R, int D, double eps) {
    rmsnorm_forward(out, rstd, inp, weight, R, D, eps);
}
void cpu_rmsnorm_backward(float *dinp, float *dweight, const float *dout, const float *inp, const float *weight,
                          const float *rstd, int R, int D) {
    rmsnorm_backward(dinp, dweight, dout, inp, weight, rstd, R, D);
}

void cpu_linear_forward(float *out, int add, const float *inp, const float *weight, const float *bias, int R, int K,
                        int M) {
    linear_forward(out, add, inp, weight, bias, R, K, M);
}
void cpu_linear_backward(float *dinp, int add, float *dweight, float *dbias, const float *dout, const float *inp,
                         const float *weight, int R, int K, int M) {
    linear_backward(dinp, add, dweight, dbias, dout, inp, weight, R, K, M);
}

void cpu_qk_forward(float *q, float *k, const float *z, const float *gamma, const float *beta, const int64_t *count,
                    int B, int L, int Z, int dz, int C, double base, double eps) {
    int R = B * L, H = Z / dz;
    real *zn = scratch((size_t)R * Z), *rstd = scratch((size_t)R * H), *table = scratch((size_t)C * dz);
    rmsnorm_forward(zn, rstd, z, NULL, R * H, dz, eps);
    qk_forward(q, k, zn, gamma, beta, R, Z, dz);
    if (base > 0) {
        rope_table(table, C, dz, base);
        rope_forward(q, q, table, count, B, L, Z, dz, C);
        rope_forward(k, k, table, count, B, L, Z, dz, C);
    }
    free(zn), free(rstd), free(table);
}
void cpu_qk_backward(float *dz_out, float *dgamma, float *dbeta, const float *dq, const float *dk, const float *z,
                     const float *gamma, int B, int L, int Z, int dz, int C, double base, double eps) {
    int R = B * L, H = Z / dz;
    size_t n = (size_t)R * Z;
    real *zn = scratch(n), *rstd = scratch((size_t)R * H), *table = scratch((size_t)C * dz);
    real *turned = scratch(3 * n), *dzn = turned + 2 * n; // dq, dk, and the gradient by zn
    rmsnorm_forward(zn, rstd, z, NULL, R * H, dz, eps);
    rope_table(table, C, dz, base);
    rope_backward(turned, dq, table, NULL, B, L, Z, dz, C);
    rope_backward(turned + n, dk, table, NULL, B, L, Z, dz, C);
    qk_backward(dzn, dgamma, dbeta, turned, turned + n, zn, gamma, R, Z, dz);
    rmsnorm_backward(dz_out, NULL, dzn, z, NULL, rstd, R * H, dz);
    free(zn), free(rstd), free(table), free(turned);
}

void cpu_silu_forward(float *out, const float *inp, size_t n) { silu_forward(out, inp, n); }
void cpu_silu_backward(float *dinp, const float *dout, const float *inp, size_t n) {
    silu_backward(dinp, dout, inp, n);
}
void cpu_gate_forward(float *out, const float *a, const float *b, size_t n) { gate_forward(out, a, b, n); }
void cpu_gate_backward(float *da, float *db, const float *dout, const float *a, const float *b, size_t n) {
    gate_backward(da, db, dout, a, b, n);
}

void cpu_attention_forward(float *o, float *lse, float *cache_k, float *cache_v, const float *q, const float *k,
                           const float *v, const int64_t *count, double p, uint64_t seed, uint32_t stream,
                           uint32_t step, uint32_t layer, uint64_t first, int B, int L, int C, int H, int Z, int E) {
    real *scores = scratch((size_t)QUERY_TILE * C);
    Mask mask = mask_from(p, seed, stream, step, layer, first);
    mask.row = (uint64_t)L * (uint64_t)C;
    attention_forward(o, lse, cache_k, cache_v, scores, q, k, v, count, mask, B, L, C, H, Z, E, 1);
    free(scores);
}
void cpu_attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *o, const float *lse,
                            const float *q, const float *k, const float *v, double p, uint64_t seed, uint32_t stream,
                            uint32_t step, uint32_t layer, uint64_t first, int B, int L, int C, int H, int Z, int E) {
    real *scores = scratch(2 * (size_t)QUERY_TILE * C);
    Mask mask = mask_from(p, seed, stream, step, layer, first);
    mask.row = (uint64_t)L * (uint64_t)C;
    attention_backward(dq, dk, dv, scores, scores + (size_t)QUERY_TILE * C, dout, o, lse, q, k, v, mask, B, L, C, H, Z,
                       E, 1);
    free(scores);
}

void cpu_layernorm_forward(float *out, double *mean, float *rstd, const float *inp, const float *weight,
                           const float *bias, int R, int D, double eps) {
    layernorm_forward(out, mean, rstd, inp, weight, bias, R, D, eps);
}
void cpu_layernorm_backward(float *dinp, float *dweight, float *dbias, const float *dout, const float *inp,
                            const float *weight, const double *mean, const float *rstd, int R, int D) {
    layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, R, D);
}

void cpu_rescale_forward(float *out, const float *inp, const float *alpha, int R, int D) {
    rescale_forward(out, inp, alpha, R, D);
}
void cpu_rescale_backward(float *dinp, float *dalpha, const float *dout, const float *inp, const float *alpha, int R,
                          int D) {
    rescale_backward(dinp, dalpha, dout, inp, alpha, R, D);
}
void cpu_add(float *out, const float *inp, size_t n) { add(out, inp, n); }

void cpu_output_loss(double *losses, float *dx, float *doutput, const float *x, const float *output,
                     const int32_t *targets, double grad_scale, int R, int D, int V) {
    real *logits = scratch((size_t)min(logit_rows(V), R) * V);
    output_loss(losses, dx, doutput, logits, x, output, targets, grad_scale, R, D, V);
    free(logits);
}

// ----------------------------------------------------------------------------
// the optimizer, which reads no more of a model than this

double cpu_grad_norm(const float *grads, size_t n) {
    double *parts = calloc(n / NORM_PART + 1, sizeof *parts);
    Shard whole = {0, n};
    Model m = {.own = &whole, .num_own = 1, .memory = {[GRADS] = (real *)grads}, .norm_parts = parts};
    double norm = megalodon_grad_norm(&m);
    free(parts);
    return norm;
}
void cpu_update(float *params, float *moment1, float *moment2, const float *grads, size_t n, double beta1, double beta2,
                double eps, double weight_decay, double lr, double grad_scale, int64_t update) {
    Shard whole = {0, n};
    Model m = {.own = &whole, .num_own = 1, .memory = {params, (real *)grads, moment1, moment2}};
    AdamW adamw = {beta1, beta2, eps, weight_decay};
    megalodon_update(&m, &adamw, lr, grad_scale, update);
}
