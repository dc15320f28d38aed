// CPU benchmark: the time of each part of a training step, or of decoding a token, beside the rates of this machine for
// a large matrix product, a large copy and a large read with the same threads.
//     make bench        or   build/bench --preset mega200M --decode --threads 2
// megalodon.c is included because its layers are static functions. Each part runs on the buffers of a real step, for
// all layers in order. The last line of the table compares the sum of the parts with the whole step. Each round runs
// every part once. So a slower phase of the machine affects all parts alike, and no part finds its own data in the
// caches.
#include "../megalodon.c"
#include "../plumbing/plumbing.h"

enum { MAX_REPEATS = 1000 };
static const char *preset = "enwik8";
static int batch_size = 4, seq_len = 512, threads, repeats = 7, decode, brief;
static int64_t max_tokens; // decode after 4096, 16384, .. tokens, up to this many; 0: not at all
static double dropout_p;   // probability of all three dropouts
static Option options[] = {
    {OPT_TEXT, "preset", &preset, .arg = "NAME", .help = "configuration of the model"},
    {OPT_INT, "batch-size", &batch_size, 1, 1 << 16, .help = "sequences per batch"},
    {OPT_INT, "seq-len", &seq_len, 1, 1 << 28, .help = "tokens per sequence"},
    {OPT_REAL, "dropout", &dropout_p, 0, 0.999, .help = "probability of all three dropouts"},
    {OPT_INT, "threads", &threads, 0, 1024, .help = "CPU threads; 0: all cores"},
    {OPT_INT, "repeats", &repeats, 3, MAX_REPEATS, .help = "measured rounds, after one warm-up round"},
    {OPT_SWITCH, "decode", &decode, .help = "measure decoding, one token at a time; --batch-size: 1 by default"},
    {OPT_INT64, "max-tokens", &max_tokens, 4096, 1e9, .help = "measure decoding after 4096, 16384, .. tokens, up to N"},
    {OPT_SWITCH, "brief", &brief, .help = "only the whole step, without its parts"},
    {OPT_END, .help = NULL},
};

static Config config;
static MemoryPlan plan;
static Model *m;
static int32_t *tokens, *targets;

typedef struct {
    const char *name;
    void (*run)(void);
    double operations;      // of its matrix products, 2 per multiply-add; 0 if it has none
    double bytes;           // read and written, if it has no matrix products
    double median, fastest; // seconds
} Part;

static int compare_doubles(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Sets the median and the fastest time of each part, over `repeats` rounds after one warm-up round.
static void time_parts(Part *parts, int count) {
    double *times = allocate((size_t)count * (size_t)repeats, sizeof *times);
    for (int r = -1; r < repeats; r++) {
        for (int i = 0; i < count; i++) {
            const double start = seconds();
            parts[i].run();
            if (r >= 0) times[i * repeats + r] = seconds() - start;
        }
    }
    for (int i = 0; i < count; i++) {
        double *t = times + i * repeats;
        qsort(t, (size_t)repeats, sizeof *t, compare_doubles);
        parts[i].fastest = t[0], parts[i].median = t[repeats / 2];
    }
    free(times);
}

// ----------------------------------------------------------------------------
// rates of the machine

enum {
    SIDE = 3072,       // rows and columns of the matrices
    COPIED = 64 << 20, // elements to copy or read, more than fit the caches
};
static real *large[3]; // (COPIED) each
static double sink;    // uses results, so that the compiler keeps the computation

static void run_matmul(void) {
    matmul(large[2], SIDE, NULL, matrix(large[0], SIDE), transposed(large[1], SIDE), NULL, SIDE, SIDE, SIDE);
}
static void run_copy(void) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < COPIED; i++) large[1][i] = large[0][i];
}
static void run_read(void) {
    double sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (size_t start = 0; start < COPIED; start += 4096) {
        real partial = 0;
#pragma omp simd reduction(+ : partial)
        for (size_t i = 0; i < 4096; i++) partial += large[0][start + i];
        sum += partial;
    }
    sink += sum;
}

enum { MATMUL, COPY, READ, NUM_RATES }; // the first parts of every table
static const Part rates[NUM_RATES] = {
    {"matmul", run_matmul, .operations = 2.0 * (double)SIDE * SIDE * SIDE},
    {"copy", run_copy, .bytes = 2.0 * COPIED * sizeof(real)},
    {"read", run_read, .bytes = 1.0 * COPIED * sizeof(real)},
};

static void rates_open(void) {
    for (int i = 0; i < 3; i++) {
        large[i] = allocate(COPIED, sizeof(real));
        for (size_t k = 0; k < COPIED; k++) large[i][k] = (real)(k % 7) * (real)0.1;
    }
}

static void print_rates(const Part *parts) {
    const Part *product = &parts[MATMUL], *copy = &parts[COPY], *read = &parts[READ];
    printf("%s; medians of %d rounds, the best in brackets\n", megalodon_backend(), repeats);
    printf("matmul %d x %d: %.0f (%.0f) GFLOP/s; copy of %zu MiB: %.1f (%.1f) GB/s read and written; read: "
           "%.1f (%.1f) GB/s\n\n",
           SIDE, SIDE, product->operations / product->median / 1e9, product->operations / product->fastest / 1e9,
           (size_t)COPIED * sizeof(real) >> 20, copy->bytes / copy->median / 1e9, copy->bytes / copy->fastest / 1e9,
           read->bytes / read->median / 1e9, read->bytes / read->fastest / 1e9);
}

// ----------------------------------------------------------------------------
// a training step and its parts

static const AdamW adamw = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
static int64_t counted;

static void run_step(void) {
    const DropoutKey draw = {.seed = 1};
    megalodon_dropout(m, dropout_p > 0 ? &draw : NULL);
    megalodon_zero_grad(m);
    megalodon_forward(m, NULL, tokens, batch_size, seq_len);
    megalodon_loss(m, targets, 1.0 / (m->dims.B * m->dims.L), &counted, NULL);
    megalodon_backward(m, NULL);
    sink += megalodon_grad_norm(m);
    megalodon_update(m, &adamw, 1e-6, 1, 0);
}

#define EACH_LAYER                                                                                                     \
    const Config *c = &m->config;                                                                                      \
    const Dims d = m->dims;                                                                                            \
    const int R = d.B * d.L, D = d.D, Z = d.Z, E = d.E, F = d.F;                                                       \
    Scratch *s = &m->scratch;                                                                                          \
    (void)R, (void)D, (void)Z, (void)E, (void)F, (void)s;                                                              \
    for (int l = 0; l < c->num_layers; l++)
#define LAYER                                                                                                          \
    LayerActs *a = &m->acts[l];                                                                                        \
    LayerParams *w = &m->params.layers[l], *dw = &m->grads.layers[l];                                                  \
    (void)a, (void)w, (void)dw;

static void run_timestep_norm_forward(void) {
    EACH_LAYER {
        LAYER const NormState none = {NULL, NULL, NULL};
        timestep_norm_forward(a->xt, a->norm_mean, a->norm_rstd, none, m->x[l], w->timenorm_weight, w->timenorm_bias,
                              none, d, c->norm_eps);
    }
}
static void run_timestep_norm_backward(void) {
    EACH_LAYER {
        LAYER const real *const residuals[2] = {s->dy, s->dx};
        timestep_norm_backward(s->dmx, dw->timenorm_weight, dw->timenorm_bias, NULL, s->dxt, residuals, m->x[l],
                               w->timenorm_weight, a->norm_mean, a->norm_rstd, NULL, d);
    }
}
static void run_cema_forward(void) {
    EACH_LAYER { LAYER cema_forward(a->ema, a->h, NULL, a->xt, &m->coeffs[l], w->cema_omega, NULL, d); }
}
static void run_cema_backward(void) {
    EACH_LAYER {
        LAYER cema_backward(s->dxt, &s->dcoeffs, dw->cema_omega, NULL, s->dema, a->xt, a->h, &m->coeffs[l],
                            w->cema_omega, d);
        cema_coeffs_backward(dw->cema_alpha, dw->cema_delta, dw->cema_theta, dw->cema_gamma, &s->dcoeffs, w->cema_alpha,
                             w->cema_delta, w->cema_theta, CEMA_COMPLEX, D, d.N);
    }
}
static void run_row_norms_forward(void) {
    EACH_LAYER {
        LAYER rmsnorm_forward(a->mx, a->ema_rstd, a->ema, w->rmsnorm_weight, R, D, c->norm_eps);
        layernorm_forward(a->u, a->ffn_mean, a->ffn_rstd, a->y, w->norm_weight, w->norm_bias, R, D, c->norm_eps);
    }
}
static void run_row_norms_backward(void) {
    EACH_LAYER {
        LAYER rmsnorm_backward(s->dema, dw->rmsnorm_weight, s->dmx, a->ema, w->rmsnorm_weight, a->ema_rstd, R, D);
        layernorm_backward(s->dy, dw->norm_weight, dw->norm_bias, s->dxt, a->y, w->norm_weight, a->ffn_mean,
                           a->ffn_rstd, R, D);
    }
}
static void run_projections_forward(void) {
    EACH_LAYER {
        LAYER linear_forward(a->z, NULL, a->mx, w->wz, w->wz_bias, R, D, Z);
        linear_forward(a->v_pre, NULL, a->xt, w->wv, w->wv_bias, R, D, E);
        linear_forward(a->r_pre, NULL, a->mx, w->wr, w->wr_bias, R, D, E);
        linear_forward(a->y, m->x[l], a->mx, w->wh1, w->wh1_bias, R, D, D);
        linear_forward(a->y, a->y, s->gated, w->wh2, NULL, R, E, D);
    }
}
static void run_projections_dx(void) {
    EACH_LAYER {
        LAYER linear_backward_input(s->do_, 0, s->dy, w->wh2, R, E, D);
        linear_backward_input(s->dmx, 0, s->dy, w->wh1, R, D, D);
        linear_backward_input(s->dmx, 1, s->dr_pre, w->wr, R, D, E);
        linear_backward_input(s->dmx, 1, s->dz, w->wz, R, D, Z);
        linear_backward_input(s->dxt, 1, s->dv, w->wv, R, D, E);
    }
}
static void run_projections_dw(void) {
    EACH_LAYER {
        LAYER linear_backward_weight(dw->wh2, NULL, s->dy, s->gated, R, E, D);
        linear_backward_weight(dw->wh1, NULL, s->dy, a->mx, R, D, D);
        linear_backward_weight(dw->wr, NULL, s->dr_pre, a->mx, R, D, E);
        linear_backward_weight(dw->wz, NULL, s->dz, a->mx, R, D, Z);
        linear_backward_weight(dw->wv, NULL, s->dv, a->xt, R, D, E);
    }
}
static void run_bias_gradients(void) {
    EACH_LAYER {
        LAYER sum_rows(dw->wh1_bias, s->dy, NULL, NULL, NULL, R, D, 1),
            sum_rows(dw->wr_bias, s->dr_pre, NULL, NULL, NULL, R, E, 1);
        sum_rows(dw->wz_bias, s->dz, NULL, NULL, NULL, R, Z, 1),
            sum_rows(dw->wv_bias, s->dv, NULL, NULL, NULL, R, E, 1);
    }
}
static void run_ffn_forward(void) {
    EACH_LAYER {
        LAYER linear_forward(a->f1, NULL, a->u, w->fc1, NULL, R, D, F);
        if (c->swiglu) linear_forward(a->f3, NULL, a->u, w->fc3, NULL, R, D, F);
        linear_forward(s->dy, m->x[l], s->hidden, w->fc2, NULL, R, F, D);
    }
}
static void run_ffn_dx(void) {
    EACH_LAYER {
        LAYER linear_backward_input(s->df3, 0, s->dx, w->fc2, R, F, D);
        if (c->swiglu) linear_backward_input(s->dxt, 0, s->df3, w->fc3, R, D, F);
        linear_backward_input(s->dxt, c->swiglu, s->df1, w->fc1, R, D, F);
    }
}
static void run_ffn_dw(void) {
    EACH_LAYER {
        LAYER linear_backward_weight(dw->fc2, NULL, s->dx, s->hidden, R, F, D);
        if (c->swiglu) linear_backward_weight(dw->fc3, NULL, s->df3, a->u, R, D, F);
        linear_backward_weight(dw->fc1, NULL, s->df1, a->u, R, D, F);
    }
}
static void run_attention_forward(void) {
    EACH_LAYER {
        LAYER attention_forward(a->o, a->lse, NULL, NULL, s->scores, s->q, s->k, s->v, NULL, mask_of_attention(m, l), d,
                                m->threads);
    }
}
static void run_attention_backward(void) {
    EACH_LAYER {
        LAYER attention_backward(s->dq, s->dk, s->dv, s->scores, s->do_, a->lse, s->q, s->k, s->v,
                                 mask_of_attention(m, l), d, m->threads);
    }
}
// The forward pass, what the backward pass recomputes (norm and rotation), and the backward pass.
static void run_qk(void) {
    EACH_LAYER {
        LAYER for (int again = 0; again < 2; again++) {
            qk_layer_forward(s->q, s->k, s->zn, s->z_rstd, a->z, w->gamma, w->beta, m->rope, NULL, d, c->norm_eps);
        }
        qk_layer_backward(s->dz, dw->gamma, dw->beta, s->dq, s->dk, s->zn, s->z_rstd, a->z, w->gamma, m->rope, d);
    }
}
// The forward pass, and the backward pass with its recomputation. Not in place: repeated in place, the values would
// become denormal, which is slow.
static void run_gates(void) {
    EACH_LAYER {
        LAYER for (int again = 0; again < 2; again++) silu_forward(s->v, a->v_pre, (size_t)R * E);
        gate_forward(s->gated, a->o, a->r_pre, (size_t)R * E);
        if (c->swiglu) gate_forward(s->hidden, a->f3, a->f1, (size_t)R * F);
        if (!c->swiglu) silu_forward(s->hidden, a->f1, (size_t)R * F);
        silu_backward(NULL, s->v, s->dv, a->v_pre, (size_t)R * E);
        gate_backward(s->gated, s->v, s->dr_pre, s->do_, a->o, a->r_pre, (size_t)R * E);
        if (c->swiglu) gate_forward(s->hidden, a->f3, a->f1, (size_t)R * F);
        if (c->swiglu) gate_backward(NULL, s->hidden, s->df1, s->df3, a->f3, a->f1, (size_t)R * F);
        if (!c->swiglu) silu_backward(s->hidden, s->df1, s->df3, a->f1, (size_t)R * F);
    }
}
// The masks of the forward pass, of the gradients, and of what the backward pass recomputes.
static void run_dropout(void) {
    EACH_LAYER {
        const Mask mx = mask_of(m, l, DROP_MX, c->hidden_dropout, D), mega = mask_of(m, l, DROP_MEGA, c->dropout, D);
        const Mask gated = mask_of(m, l, DROP_GATED, c->hidden_dropout, E);
        const Mask hidden = mask_of(m, l, DROP_HIDDEN, c->hidden_dropout, F);
        for (int i = 0; i < 2; i++) dropout(s->dmx, s->dmx, mx, (size_t)R * D);
        for (int i = 0; i < 4; i++) dropout(s->dmx, s->dxt, mega, (size_t)R * D); // and the same after the FFN
        for (int i = 0; i < 3; i++) dropout(s->gated, s->gated, gated, (size_t)R * E);
        for (int i = 0; i < 3; i++) dropout(s->hidden, s->hidden, hidden, (size_t)R * F);
    }
}
static void run_output(void) { megalodon_loss(m, targets, 1.0 / (m->dims.B * m->dims.L), &counted, NULL); }
static void run_embedding(void) {
    const Config *c = &m->config;
    embedding_forward(m->x[0], tokens, m->params.embed, 1, m->dims.B * m->dims.L, c->model_dim);
    embedding_backward(m->grads.embed, m->scratch.dx, tokens, 1, m->dims.B * m->dims.L, c->model_dim);
}
static void run_grad_norm(void) { sink += megalodon_grad_norm(m); }
static void run_zero_grad(void) { megalodon_zero_grad(m); }
static void run_update(void) { megalodon_update(m, &adamw, 1e-6, 1, 0); }

static void bench_step(void) {
    const Config *c = &config;
    const double R = (double)batch_size * seq_len, l = c->num_layers, b = sizeof(real), D = c->model_dim;
    const double E = c->value_dim, Z = c->z_dim, F = c->ffn_hidden_dim, P = (double)m->num_params;
    const ForwardOperations of = megalodon_forward_operations(c, seq_len); // of a sequence
    const double attention = batch_size * of.attention, output = batch_size * of.output;
    const double projections = batch_size * of.projections, ffn = batch_size * of.ffn, gates = c->swiglu ? 3 : 2;
    enum { STEP = NUM_RATES, FIRST_PART, MAX_PARTS = 40 };
    Part parts[MAX_PARTS] = {
        rates[MATMUL],
        rates[COPY],
        rates[READ],
        {"step", run_step, batch_size * megalodon_step_operations(c, seq_len), 0, 0, 0},
        {"TimestepNorm forward", run_timestep_norm_forward, 0, b * R * l * 2 * D, 0, 0},
        {"TimestepNorm backward", run_timestep_norm_backward, 0, b * R * l * 5 * D, 0, 0},
        {"CEMA forward", run_cema_forward, 0, b * R * l * 2 * D, 0, 0},
        {"CEMA backward", run_cema_backward, 0, b * R * l * 3 * D, 0, 0},
        {"RMSNorm, LayerNorm forward", run_row_norms_forward, 0, b * R * l * 4 * D, 0, 0},
        {"RMSNorm, LayerNorm backward", run_row_norms_backward, 0, b * R * l * 6 * D, 0, 0},
        {"projections forward", run_projections_forward, projections, 0, 0, 0},
        {"projections dx", run_projections_dx, projections, 0, 0, 0},
        {"projections dw", run_projections_dw, projections, 0, 0, 0},
        {"bias gradients", run_bias_gradients, 0, b * R * l * (D + 2 * E + Z), 0, 0},
        {"q, k, rotary embedding", run_qk, 0, b * R * l * 20 * Z, 0, 0},
        {"attention forward", run_attention_forward, attention, 0, 0, 0},
        {"attention backward", run_attention_backward, 2 * attention, 0, 0, 0},
        {"FFN forward", run_ffn_forward, ffn, 0, 0, 0},
        {"FFN dx", run_ffn_dx, ffn, 0, 0, 0},
        {"FFN dw", run_ffn_dw, ffn, 0, 0, 0},
        {"silu and gates", run_gates, 0, b * R * l * (16 * E + (4 * gates - 1) * F), 0, 0},
        {"output and loss", run_output, 3 * output, 0, 0, 0},
        {"embedding", run_embedding, 0, b * R * 5 * D, 0, 0},
        {"zero gradients", run_zero_grad, 0, b * P, 0, 0},
        {"gradient norm", run_grad_norm, 0, b * P, 0, 0},
        {"AdamW", run_update, 0, b * P * 7, 0, 0},
        {dropout_p > 0 ? "dropout" : NULL, run_dropout, 0, b * R * l * (12 * D + 6 * E + 6 * F), 0, 0},
    };
    int count = FIRST_PART;
    while (!brief && parts[count].name != NULL) count++;
    run_step();
    const double peak = (double)megalodon_peak_memory() / 1048576; // before the arrays of the rates are allocated
    rates_open();
    time_parts(parts, count);
    print_rates(parts);
    const Part *step = &parts[STEP], *product = &parts[MATMUL], *copy = &parts[COPY];
    const double matmul_rate = product->operations / product->median, copy_rate = copy->bytes / copy->median;
    printf("step of %d x %d tokens, %s: %.1f (%.1f) ms, %.0f (%.0f) tokens/s\n", batch_size, seq_len, preset,
           step->median * 1e3, step->fastest * 1e3, R / step->median, R / step->fastest);
    printf("    floor: %.1f MFLOP of matrix products per token at the rate above, %.1f ms: %.0f %% of the step "
           "(best of both: %.0f %%)\n",
           step->operations / R / 1e6, step->operations / matmul_rate * 1e3,
           100 * step->operations / matmul_rate / step->median,
           100 * step->operations * product->fastest / product->operations / step->fastest);
    printf("    memory: %.0f MiB planned, %.0f MiB at peak\n",
           (double)(plan.params + plan.grads + plan.moments + plan.activations + plan.scratch) / 1048576, peak);
    if (brief) return;
    double sum = 0, best = 0;
    printf("\n%-28s %9s %9s %7s %9s %7s %18s\n", "part", "ms", "best ms", "share", "GFLOP/s", "GB/s", "of matmul/copy");
    for (const Part *q = parts + FIRST_PART; q < parts + count; q++) {
        const double flops = q->operations / q->median, bandwidth = q->bytes / q->median; // per second
        sum += q->median, best += q->fastest;
        printf("%-28s %9.2f %9.2f %6.1f%%", q->name, q->median * 1e3, q->fastest * 1e3, 100 * q->median / step->median);
        if (flops > 0) printf(" %9.1f %7s %17.0f%%\n", flops / 1e9, "", 100 * flops / matmul_rate);
        if (flops == 0) printf(" %9s %7.1f %17.0f%%\n", "", bandwidth / 1e9, 100 * bandwidth / copy_rate);
    }
    printf("%-28s %9.2f %9.2f %6.1f%%\n", "sum of all parts", sum * 1e3, best * 1e3, 100 * sum / step->median);
}

// ----------------------------------------------------------------------------
// decoding, token by token. A token of a chunk attends to 1 to C keys, so the time is the mean over a chunk. Chunks
// longer than 256 tokens are sampled at POSITIONS positions, the middle of each sixteenth.

enum {
    POSITIONS = 16,
    PREFILL = 2048, // tokens per forward pass that reads the text
    MAX_STATES = 12,
};
static State *states[MAX_STATES]; // each at the start of a chunk
static int current;               // index of the state that run_chunk() continues

static int num_positions(void) { return config.chunk_size <= 256 ? config.chunk_size : POSITIONS; }
static void run_chunk(void) {
    State *s = states[current];
    const int64_t start = s->count[0], C = config.chunk_size, n = num_positions();
    for (int64_t i = 0; i < n; i++) {
        for (int b = 0; n < C && b < batch_size; b++) s->count[b] = start + (2 * i + 1) * C / (2 * n);
        megalodon_forward(m, s, tokens + i, batch_size, 1);
        megalodon_logits(m, 0, (size_t)batch_size, m->scratch.logits);
    }
    for (int b = 0; b < batch_size; b++) s->count[b] = start + C;
}

static void bench_decode(void) {
    const Config *c = &config;
    const double weights = (double)(m->num_params - (size_t)c->vocab_size * (size_t)c->model_dim * !c->share_emb);
    const double cache = (double)batch_size * c->num_layers * (c->chunk_size + 1) / 2 * (c->z_dim + c->value_dim);
    enum { CHUNK = NUM_RATES };
    Part parts[] = {rates[MATMUL], rates[COPY], rates[READ], {"chunk", run_chunk, 0, 0, 0, 0}};
    rates_open();
    time_parts(parts, CHUNK + 1);
    print_rates(parts);
    const double token = parts[CHUNK].median / num_positions(), best = parts[CHUNK].fastest / num_positions();
    const double bytes = (weights + cache) * sizeof(real), floor = bytes * parts[READ].median / parts[READ].bytes;
    printf("decoding, %s: %.3f (%.3f) ms/token, %.1f GB/s, mean over a chunk (%d of its %d positions)", preset,
           token * 1e3, best * 1e3, bytes / token / 1e9, num_positions(), c->chunk_size);
    if (batch_size > 1) printf(", %d texts at once", batch_size);
    printf("\n    floor: reading %.1f MB of weights and %.1f MB of keys and values (mean of a chunk) once: %.3f ms\n"
           "    measured: %.2f times the floor (best of both: %.2f)\n",
           weights * sizeof(real) / 1e6, cache * sizeof(real) / 1e6, floor * 1e3, token / floor,
           best * parts[READ].bytes / bytes / parts[READ].fastest);
}

// Decodes a chunk after 4096, 16384, .. tokens in turn, to show whether the time depends on the number of tokens read.
static void bench_positions(void) {
    static double times[MAX_STATES][MAX_REPEATS];
    const size_t C = (size_t)config.chunk_size, step = PREFILL / C > 0 ? PREFILL / C * C : C;
    int count = 0;
    size_t at[MAX_STATES], read = 0;
    for (size_t next = 4096; next <= (size_t)max_tokens; next *= 4, count++) {
        for (; read < next; read += step) megalodon_forward(m, states[0], tokens, batch_size, (int)step);
        at[count] = read;
        states[count + 1] = state_new(&config, batch_size, 0);
        if (states[count + 1] == NULL) fatal("--max-tokens: out of memory for the states");
        state_write(states[count + 1], 0, states[0]->bytes, states[0]->memory);
    }
    for (int r = -1; r < repeats; r++) {
        for (current = 1; current <= count; current++) {
            const double start = seconds();
            run_chunk();
            if (r >= 0) times[current - 1][r] = (seconds() - start) / num_positions();
        }
    }
    printf("%s; medians of %d chunks in turn, the best in brackets\n", megalodon_backend(), repeats);
    for (int i = 0; i < count; i++) {
        qsort(times[i], (size_t)repeats, sizeof *times[i], compare_doubles);
        printf("decoding after %zu tokens, %s: %.4f (%.4f) ms/token\n", at[i], preset, times[i][repeats / 2] * 1e3,
               times[i][0] * 1e3);
    }
}

int main(int argc, char **argv) {
    options_parse(options, argc, argv, "Measures the parts of a training step, or decoding, on this CPU.\n\n");
    settle_threads(argv);
    if (threads > 0) megalodon_threads(threads);
    config = *find_preset(preset);
    config.dropout = config.hidden_dropout = config.attention_dropout = dropout_p;
    decode |= max_tokens > 0;
    if (decode && !option_given(options, &batch_size)) batch_size = 1;
    if (decode) seq_len = max_tokens > 0 ? max(PREFILL, config.chunk_size) : 1;
    const size_t n = (size_t)batch_size * (size_t)max(seq_len, config.chunk_size);
    const Mode mode = decode ? MEGALODON_INFER : MEGALODON_TRAIN;
    const Demand demand = {.config = &config,
                           .mode = mode,
                           .B = batch_size,
                           .split = split_none(seq_len, config.chunk_size),
                           .host = 3.0 * COPIED * sizeof(real)};
    plan = check_memory(&demand, NULL);
    m = megalodon_new(&config, mode, batch_size, seq_len);
    states[0] = state_new(&config, batch_size, 0);
    if (m == NULL || states[0] == NULL) fatal("out of memory");
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        megalodon_init(m->memory[PARAMS] + t->offset, t, &config, 1);
    }
    tokens = allocate(n, sizeof *tokens);
    targets = allocate(n, sizeof *targets);
    for (size_t i = 0; i < n; i++)
        tokens[i] = (int32_t)(i * 7 % (size_t)config.vocab_size),
        targets[i] = (int32_t)(i * 5 % (size_t)config.vocab_size);
    if (max_tokens > 0)
        bench_positions();
    else if (decode)
        bench_decode();
    else
        bench_step();
    megalodon_free(m);
    for (int i = 0; i < MAX_STATES; i++) state_free(states[i]);
    for (int i = 0; i < 3; i++) free(large[i]);
    free(tokens), free(targets);
    return 0;
}
