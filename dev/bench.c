// Where the time of a training step goes, or of a token's decoding, beside what this machine can do: a large matrix
// product, a large copy and a large read, measured in the same run with the same threads.
//     make bench        or   build/bench --preset mega200M --decode --threads 2
// megalodon.c is included, since layers are static. Parts are timed on the buffers of a real step, all layers one
// after another, as in the step; what the parts do not add up to is said in the last line.
#include "../megalodon.c"
#include "../plumbing/plumbing.h"

static const char *preset = "enwik8";
static int batch_size = 4, seq_len = 512, threads, repeats = 7, decode, brief;
static Option options[] = {
    {OPT_TEXT, "preset", &preset, .arg = "NAME", .help = "the model"},
    {OPT_INT, "batch-size", &batch_size, 1, 1 << 16, .help = "sequences"},
    {OPT_INT, "seq-len", &seq_len, 1, 1 << 28, .help = "tokens of each"},
    {OPT_INT, "threads", &threads, 0, 1024, .help = "of the CPU; 0: all"},
    {OPT_INT, "repeats", &repeats, 3, 1000, .help = "of everything that is timed"},
    {OPT_SWITCH, "decode", &decode, .help = "decode single tokens instead"},
    {OPT_SWITCH, "brief", &brief, .help = "only the whole step, without its parts"},
    {OPT_END, .help = NULL},
};

static Model *m;
static int32_t *tokens, *targets;

// The median of the seconds that run() takes; the first time does not count.
static double timed(void (*run)(void)) {
    double times[1000];
    run();
    for (int i = 0; i < repeats; i++) {
        double start = seconds(), time;
        run();
        time = seconds() - start;
        int j = i;
        for (; j > 0 && times[j - 1] > time; j--) times[j] = times[j - 1];
        times[j] = time;
    }
    return times[repeats / 2];
}

// ----------------------------------------------------------------------------
// what the machine can do

enum { SIDE = 3072 };                          // of the matrices
static const size_t COPIED = (size_t)64 << 20; // numbers: well beyond the caches
static real *large[3];
static double sink;

static void run_product(void) { gemm(0, 1, SIDE, SIDE, SIDE, large[0], SIDE, large[1], SIDE, 0, NULL, large[2], SIDE); }
static void run_copy(void) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < COPIED; i++) large[1][i] = large[0][i];
}
static void run_read(void) {
    double sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
    for (size_t part = 0; part < COPIED; part += 4096) {
        real some = 0;
#pragma omp simd reduction(+ : some)
        for (size_t i = 0; i < 4096; i++) some += large[0][part + i];
        sum += some;
    }
    sink += sum;
}

static double product_rate, copy_rate, read_rate; // operations and bytes a second

static void measure_machine(void) {
    for (int i = 0; i < 3; i++) {
        large[i] = allocate(COPIED, sizeof(real));
        for (size_t k = 0; k < COPIED; k++) large[i][k] = (real)(k % 7) * (real)0.1;
    }
    product_rate = 2.0 * SIDE * SIDE * SIDE / timed(run_product);
    copy_rate = 2.0 * (double)COPIED * sizeof(real) / timed(run_copy);
    read_rate = (double)COPIED * sizeof(real) / timed(run_read);
    for (int i = 0; i < 3; i++) free(large[i]);
    printf("%s\n", megalodon_backend());
    printf("a product of %d x %d: %.0f GFLOP/s; a copy of %zu MiB: %.1f GB/s, read and write; a read: %.1f GB/s\n\n",
           SIDE, SIDE, product_rate / 1e9, COPIED * sizeof(real) >> 20, copy_rate / 1e9, read_rate / 1e9);
}

// ----------------------------------------------------------------------------
// a step, and its parts

static const AdamW adamw = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
static int64_t counted;

static void run_step(void) {
    megalodon_zero_grad(m);
    megalodon_forward(m, NULL, tokens, m->B, m->L);
    megalodon_loss(m, targets, 1.0 / (m->B * m->L), &counted, NULL);
    megalodon_backward(m);
    sink += megalodon_grad_norm(m);
    megalodon_update(m, &adamw, 1e-6, 1, 0);
}

#define EACH_LAYER                                                                                                     \
    const Config *c = &m->config;                                                                                      \
    const int B = m->B, L = m->L, R = B * L, D = c->model_dim, N = c->cema_ndim, H = c->num_heads, Z = c->z_dim;       \
    const int E = c->value_dim, C = c->chunk_size, F = c->ffn_hidden_dim, G = c->norm_num_groups;                      \
    Scratch *s = &m->scratch;                                                                                          \
    (void)B, (void)L, (void)R, (void)D, (void)N, (void)H, (void)Z, (void)E, (void)C, (void)F, (void)G, (void)s;        \
    for (int l = 0; l < c->num_layers; l++)
#define LAYER                                                                                                          \
    LayerActs *a = &m->acts[l];                                                                                        \
    LayerParams *w = &m->params.layers[l], *dw = &m->grads.layers[l];                                                  \
    (void)a, (void)w, (void)dw;

static void norm_forward(void) {
    EACH_LAYER {
        LAYER timestep_norm_forward(a->xt, a->norm_mean, a->norm_rstd, NULL, NULL, m->x[l], w->timenorm_weight,
                                    w->timenorm_bias, NULL, NULL, NULL, B, L, D, G, c->norm_eps);
    }
}
static void norm_backward(void) {
    EACH_LAYER {
        LAYER timestep_norm_backward(s->dmega, dw->timenorm_weight, dw->timenorm_bias, NULL, NULL, s->dxt, m->x[l],
                                     w->timenorm_weight, a->norm_mean, a->norm_rstd, NULL, NULL, B, L, D, G);
    }
}
static void run_cema_forward(void) {
    EACH_LAYER { LAYER cema_forward(a->ema, a->h, NULL, a->xt, &m->coefs[l], w->cema_omega, NULL, B, L, D, N); }
}
static void run_cema_backward(void) {
    EACH_LAYER {
        LAYER cema_backward(s->dxt, &s->dcoefs, dw->cema_omega, NULL, s->dema, a->xt, a->h, &m->coefs[l], w->cema_omega,
                            B, L, D, N);
        cema_coefs_backward(dw->cema_alpha, dw->cema_delta, dw->cema_theta, dw->cema_gamma, &s->dcoefs, w->cema_alpha,
                            w->cema_delta, w->cema_theta, D, N);
    }
}
static void rows_forward(void) {
    EACH_LAYER {
        LAYER rmsnorm_forward(a->mx, a->ema_rstd, a->ema, w->rmsnorm_weight, R, D, c->norm_eps);
        layernorm_forward(a->u, a->ffn_mean, a->ffn_rstd, a->y, w->norm_weight, w->norm_bias, R, D, c->norm_eps);
    }
}
static void rows_backward(void) {
    EACH_LAYER {
        LAYER rmsnorm_backward(s->dema, dw->rmsnorm_weight, s->dmx, a->ema, w->rmsnorm_weight, a->ema_rstd, R, D);
        layernorm_backward(s->dy, dw->norm_weight, dw->norm_bias, s->dxt, a->y, w->norm_weight, a->ffn_mean,
                           a->ffn_rstd, R, D);
    }
}
static void projections_forward(void) {
    EACH_LAYER {
        LAYER linear_forward(a->z, 0, a->mx, w->wz, w->wz_bias, R, D, Z);
        linear_forward(a->v_in, 0, a->xt, w->wv, w->wv_bias, R, D, E);
        linear_forward(a->r_in, 0, a->mx, w->wr, w->wr_bias, R, D, E);
        linear_forward(a->y, 0, a->mx, w->wh1, w->wh1_bias, R, D, D);
        linear_forward(a->y, 1, s->gated, w->wh2, NULL, R, E, D);
    }
}
static void projections_backward(void) {
    EACH_LAYER {
        LAYER linear_backward(s->do_, 0, dw->wh2, NULL, s->dy, s->gated, w->wh2, R, E, D);
        linear_backward(s->dmx, 0, dw->wh1, dw->wh1_bias, s->dy, a->mx, w->wh1, R, D, D);
        linear_backward(s->dmx, 1, dw->wr, dw->wr_bias, s->dr_in, a->mx, w->wr, R, D, E);
        linear_backward(s->dmx, 1, dw->wz, dw->wz_bias, s->dz, a->mx, w->wz, R, D, Z);
        linear_backward(s->dxt, 1, dw->wv, dw->wv_bias, s->dv, a->xt, w->wv, R, D, E);
    }
}
static void ffn_forward(void) {
    EACH_LAYER {
        LAYER linear_forward(a->f1, 0, a->u, w->fc1, NULL, R, D, F);
        if (c->swiglu) linear_forward(a->f3, 0, a->u, w->fc3, NULL, R, D, F);
        linear_forward(s->dy, 0, s->hidden, w->fc2, NULL, R, F, D);
    }
}
static void ffn_backward(void) {
    EACH_LAYER {
        LAYER linear_backward(s->dhidden, 0, dw->fc2, NULL, s->dx, s->hidden, w->fc2, R, F, D);
        if (c->swiglu) linear_backward(s->dxt, 0, dw->fc3, NULL, s->dhidden, a->u, w->fc3, R, D, F);
        linear_backward(s->dxt, c->swiglu, dw->fc1, NULL, s->df1, a->u, w->fc1, R, D, F);
    }
}
static void run_attention_forward(void) {
    EACH_LAYER {
        LAYER attention_forward(a->o, a->lse, NULL, NULL, s->scores, s->q_turned, s->k_turned, s->v, NULL, (Mask){0}, B,
                                L, C, H, Z, E, m->threads);
    }
}
static void run_attention_backward(void) {
    EACH_LAYER {
        LAYER attention_backward(s->dq, s->dk, s->dv, s->scores, s->dscores, s->do_, a->o, a->lse, s->q_turned,
                                 s->k_turned, s->v, (Mask){0}, B, L, C, H, Z, E, m->threads);
    }
}
static void qk_both(void) { // forward, the rotation again, and backward
    EACH_LAYER {
        LAYER for (int again = 0; again < 2; again++) {
            rmsnorm_forward(s->zn, a->z_rstd, a->z, NULL, R * H, Z / H, c->norm_eps);
            rope_forward(s->q_turned, a->q, m->rope, NULL, B, L, Z, Z / H, C);
            rope_forward(s->k_turned, a->k, m->rope, NULL, B, L, Z, Z / H, C);
        }
        qk_forward(a->q, a->k, s->zn, w->gamma, w->beta, R, Z, Z / H);
        rope_backward(s->dq, s->dq, m->rope, NULL, B, L, Z, Z / H, C);
        rope_backward(s->dk, s->dk, m->rope, NULL, B, L, Z, Z / H, C);
        qk_backward(s->dzn, dw->gamma, dw->beta, s->dq, s->dk, s->zn, w->gamma, R, Z, Z / H);
        rmsnorm_backward(s->dz, NULL, s->dzn, a->z, NULL, a->z_rstd, R * H, Z / H);
    }
}
static void gates_both(void) { // forward, again, and backward, not in place: numbers would vanish, which is slow
    EACH_LAYER {
        LAYER for (int again = 0; again < 2; again++) {
            silu_forward(s->v, a->v_in, (size_t)R * E);
            gate_forward(s->gated, a->o, a->r_in, (size_t)R * E);
            if (c->swiglu) gate_forward(s->hidden, a->f3, a->f1, (size_t)R * F);
            if (!c->swiglu) silu_forward(s->hidden, a->f1, (size_t)R * F);
        }
        silu_backward(s->v, s->dv, a->v_in, (size_t)R * E);
        gate_backward(s->gated, s->dr_in, s->do_, a->o, a->r_in, (size_t)R * E);
        if (c->swiglu) gate_backward(s->hidden, s->df1, s->dhidden, a->f3, a->f1, (size_t)R * F);
        if (!c->swiglu) silu_backward(s->df1, s->dhidden, a->f1, (size_t)R * F);
    }
}
static void residuals(void) {
    EACH_LAYER {
        for (int i = 0; i < 4; i++) add(s->dx, s->dmega, (size_t)R * D);
    }
}
static void run_output(void) { megalodon_loss(m, targets, 1.0 / (m->B * m->L), &counted, NULL); }
static void run_embedding(void) {
    const Config *c = &m->config;
    embedding_forward(m->x[0], tokens, m->params.embed, 1, m->B * m->L, c->model_dim);
    embedding_backward(m->grads.embed, m->scratch.dx, tokens, 1, m->B * m->L, c->model_dim);
}
static void run_norm(void) { sink += megalodon_grad_norm(m); }
static void run_zero(void) { megalodon_zero_grad(m); }
static void run_update(void) { megalodon_update(m, &adamw, 1e-6, 1, 0); }

typedef struct {
    const char *name;
    void (*run)(void);
    double operations, bytes; // that must be done and moved, in all layers; those of products, and those of the rest
} Part;

// Multiply-adds that the matrix products of a token's forward pass need; in attention the causal half of a chunk.
static double attention_macs(const Config *c, int L) {
    const double whole = L / c->chunk_size, rest = L % c->chunk_size, C = c->chunk_size;
    return (whole * C * (C + 1) / 2 + rest * (rest + 1) / 2) / L * (c->z_dim + c->value_dim) * c->num_layers;
}
static double projection_macs(const Config *c) {
    return (double)c->num_layers * c->model_dim * (3.0 * c->value_dim + c->z_dim + c->model_dim);
}
static double ffn_macs(const Config *c) {
    return (double)c->num_layers * c->model_dim * c->ffn_hidden_dim * (2 + c->swiglu);
}
static double output_macs(const Config *c) { return (double)c->vocab_size * c->model_dim; }
static double step_flop(const Config *c, int L) { // a token's
    return 6 * (attention_macs(c, L) + projection_macs(c) + ffn_macs(c) + output_macs(c));
}

static void print_parts(double step) {
    const Config *c = &m->config;
    const double R = (double)m->B * m->L, l = c->num_layers, b = sizeof(real), D = c->model_dim, E = c->value_dim;
    const double Z = c->z_dim, F = c->ffn_hidden_dim, P = (double)m->num_params, gates = c->swiglu ? 3 : 2;
    const double attention = attention_macs(c, m->L), projections = projection_macs(c), ffn = ffn_macs(c);
    const Part parts[] = {
        {"TimestepNorm forward", norm_forward, 0, b * R * l * 2 * D},
        {"TimestepNorm backward", norm_backward, 0, b * R * l * 3 * D},
        {"CEMA forward", run_cema_forward, 0, b * R * l * 2 * D},
        {"CEMA backward", run_cema_backward, 0, b * R * l * 3 * D},
        {"RMSNorm, LayerNorm forward", rows_forward, 0, b * R * l * 4 * D},
        {"RMSNorm, LayerNorm backward", rows_backward, 0, b * R * l * 6 * D},
        {"projections forward", projections_forward, 2 * R * projections, 0},
        {"projections backward", projections_backward, 4 * R * projections, 0},
        {"queries, keys, rotation", qk_both, 0, b * R * l * 20 * Z},
        {"attention forward", run_attention_forward, 2 * R * attention, 0},
        {"attention backward", run_attention_backward, 4 * R * attention, 0},
        {"FFN forward", ffn_forward, 2 * R * ffn, 0},
        {"FFN backward", ffn_backward, 4 * R * ffn, 0},
        {"silu, gates", gates_both, 0, b * R * l * (18 * E + (2 * gates + 2 * gates - 1) * F)},
        {"residuals", residuals, 0, b * R * l * 12 * D},
        {"output and loss", run_output, 6 * R * output_macs(c), 0},
        {"embedding", run_embedding, 0, b * R * 5 * D},
        {"gradients cleared", run_zero, 0, b * P},
        {"gradient norm", run_norm, 0, b * P},
        {"AdamW", run_update, 0, b * P * 7},
    };
    double sum = 0;
    printf("%-28s %9s %7s %10s %9s %22s\n", "part", "ms", "share", "GFLOP/s", "GB/s", "of the machine's rate");
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        const double time = timed(parts[i].run), done = parts[i].operations, moved = parts[i].bytes;
        sum += time;
        printf("%-28s %9.2f %6.1f%%", parts[i].name, time * 1e3, 100 * time / step);
        if (done > 0) printf(" %10.1f %9s %21.0f%%\n", done / time / 1e9, "", 100 * done / time / product_rate);
        if (done == 0) printf(" %10s %9.1f %21.0f%%\n", "", moved / time / 1e9, 100 * moved / time / copy_rate);
    }
    printf("%-28s %9.2f %6.1f%%\n", "all parts", sum * 1e3, 100 * sum / step);
}

static void bench_step(const Config *c) {
    const size_t R = (size_t)batch_size * (size_t)seq_len;
    const MemoryPlan p = check_memory(c, MEGALODON_TRAIN, batch_size, seq_len, 0);
    m->B = batch_size, m->L = seq_len;
    const double time = timed(run_step), peak = peak_memory();
    measure_machine();
    const double flop = (double)R * step_flop(c, seq_len), floor = flop / product_rate;
    printf("a step of %d x %d tokens, %s: %.1f ms, %.0f tokens/s, %.0f %% of the floor\n", batch_size, seq_len, preset,
           time * 1e3, (double)R / time, 100 * floor / time);
    printf("    floor: %.1f MFLOP of products a token at the rate above, %.1f ms\n", flop / (double)R / 1e6,
           floor * 1e3);
    printf("    memory: %.0f MiB planned, %.0f MiB at peak\n\n",
           (double)(p.params + p.grads + p.moments + p.activations + p.scratch) / 1048576, peak);
    if (!brief) print_parts(time);
}

// ----------------------------------------------------------------------------
// decoding: one token after another. A chunk's tokens see from 1 to C keys: the mean is over whole chunks.

static State *state;
static void run_token(void) { megalodon_forward(m, state, tokens, 1, 1), megalodon_logits(m, 0, 1, m->scratch.logits); }

static void bench_decode(const Config *c) {
    enum { PLACES = 16 };
    const int C = c->chunk_size;
    const double weights = (double)(m->num_params - (size_t)c->vocab_size * (size_t)c->model_dim * !c->share_emb);
    const double cache = (double)c->num_layers * (C + 1) / 2 * (c->z_dim + c->value_dim);
    measure_machine();
    const double floor = (weights + cache) * sizeof(real) / read_rate;
    double sum = 0;
    state = state_new(c, 1, 0);
    if (state == NULL) fatal("out of memory for the state");
    for (int i = 0; i < PLACES; i++) { // the middle of each sixteenth of a chunk
        double times = 0;
        for (int r = 0; r <= repeats; r++) {
            state->count[0] = (int64_t)C * 10 + (2 * i + 1) * C / (2 * PLACES);
            const double start = seconds();
            run_token();
            if (r > 0) times += seconds() - start;
        }
        sum += times / repeats / PLACES;
    }
    printf("decoding, %s: %.2f ms a token, %.1f tokens/s, mean over a chunk (%d places, %d times each)\n", preset,
           sum * 1e3, 1 / sum, PLACES, repeats);
    printf("    floor: %.0f MB of weights, %.1f MB of a mean chunk's keys and values, once: %.2f ms; ours is %.2f "
           "times that\n",
           weights * sizeof(real) / 1e6, cache * sizeof(real) / 1e6, floor * 1e3, sum / floor);
    state_free(state);
}

int main(int argc, char **argv) {
    options_parse(options, argc, argv, "Where the time of a training step goes.\n\n");
    settle_threads(argv, threads);
    if (threads > 0) megalodon_threads(threads);
    const Config *c = find_preset(preset);
    if (decode) batch_size = seq_len = 1;
    m = megalodon_new(c, decode ? MEGALODON_INFER : MEGALODON_TRAIN, batch_size, seq_len);
    if (m == NULL) fatal("out of memory");
    for (int i = 0; i < m->num_tensors; i++) {
        const Tensor *t = &m->tensors[i];
        megalodon_init(m->memory[PARAMS] + t->offset, t, c, 1);
    }
    tokens = allocate((size_t)batch_size * (size_t)seq_len, sizeof *tokens);
    targets = allocate((size_t)batch_size * (size_t)seq_len, sizeof *targets);
    for (int i = 0; i < batch_size * seq_len; i++)
        tokens[i] = i * 7 % c->vocab_size, targets[i] = i * 5 % c->vocab_size;
    if (decode)
        bench_decode(c);
    else
        bench_step(c);
    megalodon_free(m);
    free(tokens), free(targets);
    return 0;
}
