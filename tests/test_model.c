// The whole model through megalodon.h: gradients, recomputation, accumulation, states, optimizer. Built twice: for
// double, where gradients are compared with central differences, too, and for float.
#include "../plumbing/plumbing.h"
#include "check.h"

#ifdef MEGALODON_DOUBLE
enum { DOUBLE = 1 };
#else
enum { DOUBLE = 0 };
#endif
enum { ELEMENTS = 30, MAX_TOKENS = 1024 };

static const double ROUNDING = DOUBLE ? 1e-12 : 1e-5; // differences between orders of summation

typedef struct {
    const char *name;
    Config config;
    int B, L;
} Case;

// Fields that are not named are 0.
// clang-format off
#define REPLACED /* the sizes of the models with parts replaced */                                                     \
    .num_layers = 2, .model_dim = 12, .z_dim = 8, .value_dim = 6, .num_heads = 2, .ffn_hidden_dim = 9, .cema_ndim = 3, \
    .chunk_size = 8, .vocab_size = 11, .norm_num_groups = 3, .norm_affine = 1, .norm_eps = 1e-3, .rope_base = 1e3,
static const Case cases[] = {
    {"L below C, N 1",
     {.num_layers = 2, .model_dim = 8, .z_dim = 4, .value_dim = 6, .num_heads = 1, .ffn_hidden_dim = 10,
      .cema_ndim = 1, .chunk_size = 16, .vocab_size = 11, .norm_num_groups = 2, .norm_affine = 1, .norm_eps = 1e-5,
      .rope_base = 1e4}, 2, 7},
    {"L = C, 3 heads, N 16, swiglu",
     {.num_layers = 2, .model_dim = 12, .z_dim = 12, .value_dim = 9, .num_heads = 3, .ffn_hidden_dim = 7,
      .cema_ndim = 16, .chunk_size = 8, .vocab_size = 11, .norm_num_groups = 3, .swiglu = 1, .norm_affine = 1,
      .norm_eps = 1e-5, .rope_base = 100}, 2, 8},
    {"L = 2 C, rescale, scaled, tied",
     {.num_layers = 2, .model_dim = 10, .z_dim = 6, .value_dim = 5, .num_heads = 1, .ffn_hidden_dim = 9,
      .cema_ndim = 4, .chunk_size = 8, .vocab_size = 13, .norm_num_groups = 5, .rescale_nffn = 1, .scale_emb = 1,
      .share_emb = 1, .norm_affine = 1, .norm_eps = 1e-3, .rope_base = 1e4}, 2, 16},
    {"L ragged, 3 heads, swiglu, rescale, no affine",
     {.num_layers = 2, .model_dim = 12, .z_dim = 6, .value_dim = 6, .num_heads = 3, .ffn_hidden_dim = 8,
      .cema_ndim = 2, .chunk_size = 8, .vocab_size = 7, .norm_num_groups = 6, .swiglu = 1, .rescale_nffn = 1,
      .norm_eps = 1e-2, .rope_base = 50}, 2, 19},
    {"C odd, one group, tied, no affine",
     {.num_layers = 3, .model_dim = 8, .z_dim = 8, .value_dim = 8, .num_heads = 2, .ffn_hidden_dim = 12,
      .cema_ndim = 3, .chunk_size = 5, .vocab_size = 9, .norm_num_groups = 1, .share_emb = 1, .norm_eps = 1e-5,
      .rope_base = 1e4}, 3, 13},
    {"real CEMA", {REPLACED .cema = CEMA_REAL}, 2, 21},
    {"no CEMA", {REPLACED .cema = CEMA_NONE}, 2, 21},
    {"LayerNorm for TimestepNorm", {REPLACED .timestep_norm = NORM_LAYER}, 2, 21},
    {"standard attention", {REPLACED .attention = ATTENTION_STANDARD}, 2, 21},
    {"one hop", {REPLACED .two_hop = ONE_HOP}, 2, 21},
    {"all parts replaced", {REPLACED .cema = CEMA_REAL, .timestep_norm = NORM_LAYER,
      .attention = ATTENTION_STANDARD, .two_hop = ONE_HOP}, 2, 21},
    {"L above a block of CEMA, N 16, scaled",
     {.num_layers = 1, .model_dim = 19, .z_dim = 4, .value_dim = 7, .num_heads = 1, .ffn_hidden_dim = 6,
      .cema_ndim = 16, .chunk_size = 32, .vocab_size = 17, .norm_num_groups = 1, .swiglu = 1, .scale_emb = 1,
      .norm_affine = 1, .norm_eps = 1e-5, .rope_base = 1e4}, 1, 75},
};
// clang-format on
enum { NUM_CASES = sizeof cases / sizeof *cases };

// A model with random parameters, not near their initial values, and a batch with every fifth target ignored.
typedef struct {
    const Case *c;
    Model *model;
    size_t size; // number of parameters
    int num_tensors;
    Tensor *tensors;
    real *params, *grads;
    int32_t tokens[MAX_TOKENS], targets[MAX_TOKENS];
} Setup;

static Setup setup(const Case *c, Mode mode) {
    Setup s = {.c = c, .model = megalodon_new(&c->config, mode, c->B, c->L)};
    s.tensors = megalodon_tensors(&c->config, &s.num_tensors, &s.size);
    s.params = calloc(s.size, sizeof *s.params);
    s.grads = calloc(s.size, sizeof *s.grads);
    for (int i = 0; i < s.num_tensors; i++) {
        const Tensor *t = &s.tensors[i];
        megalodon_init(s.params + t->offset, t, &c->config, 1);
        for (size_t k = t->offset; k < t->offset + t->size; k++) s.params[k] += (real)(0.3 * random_real(2, k));
    }
    megalodon_write(s.model, PARAMS, 0, s.size, s.params);
    for (int i = 0; i < c->B * c->L; i++) {
        s.tokens[i] = (int32_t)((random_real(3, (size_t)i) + 1) / 2 * c->config.vocab_size);
        s.targets[i] = i % 5 == 3 ? -1 : (int32_t)((random_real(4, (size_t)i) + 1) / 2 * c->config.vocab_size);
    }
    return s;
}

static void setup_free(Setup *s) {
    megalodon_free(s->model);
    free(s->tensors), free(s->params), free(s->grads);
}

// Adds the gradients of one batch. Returns the sum of its losses.
static double train(Setup *s, const int32_t *tokens, const int32_t *targets, int B, double grad_scale) {
    int64_t counted;
    megalodon_forward(s->model, NULL, tokens, B, s->c->L);
    double sum = megalodon_loss(s->model, targets, grad_scale, &counted, NULL);
    megalodon_backward(s->model, NULL);
    megalodon_read(s->model, GRADS, 0, s->size, s->grads);
    return sum;
}

static const char *named(const char *name, const char *what) {
    static char text[160];
    snprintf(text, sizeof text, "%s: %s", name, what);
    return text;
}

// ----------------------------------------------------------------------------
// gradients

#ifdef MEGALODON_DOUBLE
static double loss(void *context) {
    Setup *s = context;
    int64_t counted;
    megalodon_write(s->model, PARAMS, 0, s->size, s->params);
    megalodon_forward(s->model, NULL, s->tokens, s->c->B, s->c->L);
    return 0.37 * megalodon_loss(s->model, s->targets, 0, &counted, NULL);
}

static void test_gradients(const Case *c) {
    Setup s = setup(c, MEGALODON_TRAIN);
    train(&s, s.tokens, s.targets, c->B, 0.37);
    for (int i = 0; i < s.num_tensors; i++) {
        const Tensor *t = &s.tensors[i];
        check_gradient(t->name, loss, &s, s.params + t->offset, s.grads + t->offset, t->size, ELEMENTS, 1e-7);
    }
    setup_free(&s);
}
#endif

// With a state and with dropout. The state is the one after the first chunk. Each pass starts from a copy of it, and
// gradients stop there.
typedef struct {
    Setup s;
    State *before, *state;
    char *bytes;
    DropoutKey draw;
    int L; // tokens after the state
} Carried;

static Carried carried(const Case *c, Mode mode) {
    const Config *g = &c->config;
    Carried x = {.s = setup(c, mode), .draw = {.seed = 4, .step = 9, .row = 5}};
    int C = g->chunk_size < c->L ? g->chunk_size : 0; // 0: a fresh state
    int32_t first[MAX_TOKENS];
    x.L = c->L - C;
    x.before = state_new(g, c->B, 1), x.state = state_new(g, c->B, 0);
    x.bytes = malloc(x.before->bytes);
    for (int b = 0; b < c->B; b++) memcpy(first + b * C, x.s.tokens + b * c->L, (size_t)C * sizeof *first);
    if (C > 0) megalodon_forward(x.s.model, x.before, first, c->B, C);
    state_read(x.before, 0, x.before->bytes, x.bytes);
    return x;
}

static double carried_forward(Carried *x, double grad_scale) {
    int64_t counted;
    state_write(x->state, 0, x->before->bytes, x->bytes); // k and v, which come last, are not needed
    megalodon_dropout(x->s.model, &x->draw);
    megalodon_forward(x->s.model, x->state, x->s.tokens, x->s.c->B, x->L);
    return megalodon_loss(x->s.model, x->s.targets, grad_scale, &counted, NULL);
}

static void carried_free(Carried *x) { setup_free(&x->s), state_free(x->before), state_free(x->state), free(x->bytes); }

#ifdef MEGALODON_DOUBLE
static double carried_loss(void *context) {
    Carried *x = context;
    megalodon_write(x->s.model, PARAMS, 0, x->s.size, x->s.params);
    return 0.37 * carried_forward(x, 0);
}
#endif

static void test_carried(const Case *plain) {
    Case c = *plain;
    c.config.dropout = 0.2, c.config.hidden_dropout = 0.1, c.config.attention_dropout = 0.3;
    Carried a = carried(&c, MEGALODON_TRAIN), b = carried(&c, MEGALODON_RECOMPUTE);
    Setup *s = &a.s;
    size_t n = (size_t)a.L * c.config.vocab_size;
    real *logits = malloc((size_t)c.B * n * sizeof *logits), *alone = malloc(n * sizeof *alone);
    double loss_a = carried_forward(&a, 0.37), loss_b = carried_forward(&b, 0.37);
    megalodon_logits(s->model, 0, (size_t)c.B * a.L, logits);
    megalodon_backward(s->model, NULL), megalodon_backward(b.s.model, NULL);
    megalodon_read(s->model, GRADS, 0, s->size, s->grads);
    megalodon_read(b.s.model, GRADS, 0, s->size, b.s.grads);
    check_true(named(c.name, "state, dropout: same loss with recompute"), loss_a == loss_b);
    check_same("  same gradients with recompute", b.s.grads, s->grads, s->size * sizeof(real));
#ifdef MEGALODON_DOUBLE
    for (int i = 0; i < s->num_tensors; i++) {
        const Tensor *t = &s->tensors[i];
        check_gradient(t->name, carried_loss, &a, s->params + t->offset, s->grads + t->offset, t->size, ELEMENTS, 1e-7);
    }
    megalodon_write(s->model, PARAMS, 0, s->size, s->params);
#endif
    a.draw.step++;
    check_true("  another step, other masks", carried_forward(&a, 0) != loss_a);
    megalodon_dropout(s->model, NULL);
    Setup p = setup(plain, MEGALODON_INFER);
    int64_t counted;
    megalodon_forward(p.model, NULL, p.tokens, c.B, c.L);
    megalodon_forward(s->model, NULL, p.tokens, c.B, c.L);
    check_true("  switched off: none", megalodon_loss(p.model, p.targets, 0, &counted, NULL) ==
                                           megalodon_loss(s->model, p.targets, 0, &counted, NULL));
    // the second row of the batch as a batch of its own
    if (c.L <= c.config.chunk_size) {
        const DropoutKey draw = {.seed = 4, .step = 9, .row = 6};
        megalodon_dropout(s->model, &draw);
        megalodon_forward(s->model, NULL, s->tokens + a.L, 1, a.L);
        megalodon_logits(s->model, 0, (size_t)a.L, alone);
        check_real("  a row by itself has the same masks", alone, logits + n, n, ROUNDING);
    }
    carried_free(&a), carried_free(&b), setup_free(&p);
    free(logits), free(alone);
}

// ----------------------------------------------------------------------------
// segments: the gradient of a state

// What follows the first `start` tokens of a batch, in segments of N tokens (plumbing/segments.c), with dropout.
typedef struct {
    Setup s;
    Segments segments;
    int32_t tokens[MAX_TOKENS], targets[MAX_TOKENS]; // what follows, segment after segment
    State *carried;                                  // the incoming state, then the outgoing one
    char *first;                                     // the incoming state in host memory
} Segmented;

static Segmented segmented(const Case *c, Mode mode, int start, int N) {
    Segmented x = {.s = setup(c, mode), .carried = state_new(&c->config, c->B, 1)};
    Split split = split_none(c->L - start, c->config.chunk_size);
    split.segment_len = N;
    int32_t first[MAX_TOKENS];
    for (int b = 0; b < c->B; b++) memcpy(first + b * start, x.s.tokens + b * c->L, (size_t)start * sizeof *first);
    if (start > 0) megalodon_forward(x.s.model, x.carried, first, c->B, start);
    x.first = malloc(x.carried->bytes);
    state_read(x.carried, 0, x.carried->bytes, x.first);
    for (int64_t i = 0, at = 0; i < split_segments(&split); i++) {
        const TokenRange part = split_part(&split, i, 0);
        for (int b = 0; b < c->B; b++, at += part.count) {
            const int64_t from = b * c->L + start + part.first;
            memcpy(x.tokens + at, x.s.tokens + from, (size_t)part.count * sizeof *x.tokens);
            memcpy(x.targets + at, x.s.targets + from, (size_t)part.count * sizeof *x.targets);
        }
    }
    segments_open(&x.segments, x.s.model, &c->config, mode, c->B, &split);
    return x;
}

// Adds the gradients. Returns the sum of the losses.
static double segmented_train(Segmented *x) {
    const Pass pass = {.inputs = x->tokens,
                       .targets = x->targets,
                       .carried = x->carried,
                       .key = {.seed = 4, .step = 9, .row = 5},
                       .grad_scale = 0.37};
    state_write(x->carried, 0, x->carried->bytes, x->first);
    return segments_train(&x->segments, &pass);
}

static void segmented_free(Segmented *x) {
    segments_close(&x->segments), setup_free(&x->s), state_free(x->carried), free(x->first);
}

#ifdef MEGALODON_DOUBLE
static double segmented_loss(void *context) { return 0.37 * segmented_train(context); }

// The gradient with respect to the state after the first chunk, against central differences over what follows.
static void test_state_gradient(const Case *c, int start, int N) {
    const Config *g = &c->config;
    Segmented x = segmented(c, MEGALODON_TRAIN, start, N);
    State values = state_point(x.first, g, c->B, 1); // the numbers that are varied
    size_t norms = (size_t)(g->num_layers + 1) * c->B * g->norm_num_groups;
    size_t h = (size_t)g->num_layers * c->B * values.modes;
    double *dmean = malloc(norms * sizeof *dmean), *dm2 = malloc(norms * sizeof *dm2), *dh = malloc(h * sizeof *dh);
    segmented_train(&x);
    for (size_t i = 0; i < norms; i++) {
        const double *sums = x.segments.grad->sums + 3 * i, n = (double)start * (g->model_dim / g->norm_num_groups);
        dmean[i] = n * (sums[0] - 2 * (sums[2] - values.mean[i] * sums[1])), dm2[i] = sums[1];
    }
    memcpy(dh, x.segments.grad->h, h * sizeof *dh);
    check_gradient(named(c->name, "state: mean"), segmented_loss, &x, values.mean, dmean, norms, ELEMENTS, 1e-7);
    check_gradient("  state: m2", segmented_loss, &x, values.m2, dm2, norms, ELEMENTS, 1e-7);
    check_gradient("  state: h", segmented_loss, &x, values.h, dh, h, ELEMENTS, 1e-7);
    segmented_free(&x), free(dmean), free(dm2), free(dh);
}
#endif

// Segments of N tokens have the gradients of the whole sequence, with dropout, and with recomputed activations.
static void test_segments(const Case *plain, int N) {
    Case c = *plain;
    c.config.dropout = 0.2, c.config.hidden_dropout = 0.1, c.config.attention_dropout = 0.3;
    const DropoutKey draw = {.seed = 4, .step = 9, .row = 5};
    Setup whole = setup(&c, MEGALODON_TRAIN);
    megalodon_dropout(whole.model, &draw);
    double sum = train(&whole, whole.tokens, whole.targets, c.B, 0.37);
    for (int recompute = 0; recompute < 2; recompute++) {
        Segmented x = segmented(&c, recompute ? MEGALODON_RECOMPUTE : MEGALODON_TRAIN, 0, N);
        char name[96];
        double in_segments = segmented_train(&x);
        megalodon_read(x.s.model, GRADS, 0, x.s.size, x.s.grads);
        snprintf(name, sizeof name, "%s: segments of %d%s", c.name, N, recompute ? ", recompute" : "");
        check(name, &in_segments, &sum, 1, ROUNDING);
        for (int i = 0; i < x.s.num_tensors; i++) {
            const Tensor *t = &x.s.tensors[i];
            snprintf(name, sizeof name, "  %s", t->name);
            check_real(name, x.s.grads + t->offset, whole.grads + t->offset, t->size, DOUBLE ? 1e-11 : 1e-5);
        }
        segmented_free(&x);
    }
    setup_free(&whole);
}

// Recomputing activations gives the same bits, gradients accumulate, and two micro-batches equal one batch.
static void test_modes(const Case *c) {
    Setup a = setup(c, MEGALODON_TRAIN), b = setup(c, MEGALODON_RECOMPUTE);
    const Config *g = &c->config;
    size_t R = (size_t)c->B * c->L, widest = (size_t)(g->model_dim + g->z_dim + g->value_dim);
    real *kept = malloc(a.size * sizeof *kept), *act_a = malloc(R * widest * sizeof *act_a);
    real *act_b = malloc(R * widest * sizeof *act_b);
    double sum = train(&a, a.tokens, a.targets, c->B, 0.5), again = train(&b, b.tokens, b.targets, c->B, 0.5);
    check_true(named(c->name, "same loss with recompute"), sum == again && sum > 0);
    check_same(named(c->name, "same gradients with recompute"), b.grads, a.grads, a.size * sizeof *kept);

    int same = 1;
    for (int layer = 0; layer < g->num_layers; layer++) {
        const char *name;
        for (int i = 0; (name = megalodon_activation_name(i)) != NULL; i++) {
            size_t width = (size_t)megalodon_activation(a.model, layer, name, act_a);
            same &= width > 0 && (size_t)megalodon_activation(b.model, layer, name, act_b) == width;
            same &= memcmp(act_a, act_b, R * width * sizeof *act_a) == 0;
        }
    }
    check_true(named(c->name, "same activations with recompute"), same);
    check_true(named(c->name, "unknown activations"), megalodon_activation(a.model, 0, "nffn.in", NULL) == 0 &&
                                                          megalodon_activation(a.model, -1, "nffn.out", NULL) == 0);

    memcpy(kept, a.grads, a.size * sizeof *kept);
    train(&a, a.tokens, a.targets, c->B, 0.5);
    for (size_t i = 0; i < a.size; i++) kept[i] *= 2;
    check_real(named(c->name, "gradients add up"), a.grads, kept, a.size, ROUNDING);
    megalodon_zero_grad(a.model);
    for (int row = 0; row < c->B; row++) { train(&a, a.tokens + row * c->L, a.targets + row * c->L, 1, 1); }
    check_real(named(c->name, "row by row = the batch"), a.grads, kept, a.size, ROUNDING);
    setup_free(&a), setup_free(&b);
    free(kept), free(act_a), free(act_b);
}

// The loss against its definition from the logits. Targets of -1 give neither loss nor gradient.
static void test_loss(const Case *c) {
    Setup s = setup(c, MEGALODON_TRAIN);
    int R = c->B * c->L, V = c->config.vocab_size;
    real *logits = malloc((size_t)R * V * sizeof *logits), *losses = malloc((size_t)R * sizeof *losses);
    real *expected = calloc((size_t)R, sizeof *expected);
    double total = 0;
    int64_t counted, count = 0;
    megalodon_forward(s.model, NULL, s.tokens, c->B, c->L);
    megalodon_logits(s.model, 0, 3, logits); // in two calls
    megalodon_logits(s.model, 3, (size_t)R - 3, logits + 3 * V);
    for (int r = 0; r < R; r++) {
        double sum = 0;
        for (int v = 0; v < V; v++) sum += exp(logits[r * V + v]);
        if (s.targets[r] < 0) continue;
        expected[r] = (real)(log(sum) - logits[r * V + s.targets[r]]);
        total += expected[r];
        count++;
    }
    double sum = megalodon_loss(s.model, s.targets, 0, &counted, losses);
    check(named(c->name, "loss"), &sum, &total, 1, ROUNDING);
    check_real(named(c->name, "losses"), losses, expected, (size_t)R, ROUNDING);
    check_true(named(c->name, "positions counted"), counted == count);
    for (int r = 0; r < R; r++) s.targets[r] = -1;
    sum = train(&s, s.tokens, s.targets, c->B, 1);
    int none = sum == 0;
    for (size_t i = 0; i < s.size; i++) none &= s.grads[i] == 0;
    check_true(named(c->name, "no targets, no loss, no gradient"), none);
    setup_free(&s);
    free(logits), free(losses), free(expected);
}

// ----------------------------------------------------------------------------
// state

// Feeds the sequences in calls of n tokens (n = 0: 1, 2, 3, ... tokens) and keeps all logits.
static void read_in_calls(Setup *s, State *state, int n, real *logits) {
    int B = s->c->B, L = s->c->L, V = s->c->config.vocab_size;
    int32_t part[MAX_TOKENS];
    for (int t = 0, size = n ? n : 1; t < L; t += size, size += n == 0) {
        size = size < L - t ? size : L - t;
        for (int b = 0; b < B; b++) memcpy(part + b * size, s->tokens + b * L + t, (size_t)size * sizeof *part);
        megalodon_forward(s->model, state, part, B, size);
        for (int b = 0; b < B; b++) {
            megalodon_logits(s->model, (size_t)b * size, (size_t)size, logits + ((size_t)b * L + t) * V);
        }
    }
}

// A copy of a state in host memory.
static State on_host(const State *state) {
    State host = *state;
    char *memory = malloc(state->bytes);
    const char *theirs = state->memory;
    state_read(state, 0, state->bytes, memory);
    host.memory = memory;
    host.count = (int64_t *)(void *)(memory + ((const char *)state->count - theirs));
    host.mean = (double *)(void *)(memory + ((const char *)state->mean - theirs));
    host.m2 = (double *)(void *)(memory + ((const char *)state->m2 - theirs));
    host.h = (real *)(void *)(memory + ((const char *)state->h - theirs));
    host.k = (real *)(void *)(memory + ((const char *)state->k - theirs));
    host.v = (real *)(void *)(memory + ((const char *)state->v - theirs));
    return host;
}

// Compares the tensors of two states. Of the cached keys and values only those of the unfinished chunk count.
static void check_state(const char *name, const Config *c, const State *state, const State *expected) {
    State copies[2] = {on_host(state), on_host(expected)}, *a = &copies[0], *b = &copies[1];
    size_t rows = (size_t)c->num_layers * a->B, moments = rows + (size_t)a->B;
    size_t h = rows * 2 * c->cema_ndim * c->model_dim;
    int past = (int)(b->count[0] % c->chunk_size);
    check_same(named(name, "count"), a->count, b->count, (size_t)a->B * sizeof *a->count);
    check(named(name, "mean"), a->mean, b->mean, moments * c->norm_num_groups, ROUNDING);
    check(named(name, "m2"), a->m2, b->m2, moments * c->norm_num_groups, ROUNDING);
    check_real(named(name, "h"), a->h, b->h, h, ROUNDING);
    for (size_t r = 0; r < rows && past > 0; r++) {
        size_t k = r * c->chunk_size * c->z_dim, v = r * c->chunk_size * c->value_dim;
        check_real(named(name, "k"), a->k + k, b->k + k, (size_t)past * c->z_dim, ROUNDING);
        check_real(named(name, "v"), a->v + v, b->v + v, (size_t)past * c->value_dim, ROUNDING);
    }
    free(a->memory), free(b->memory);
}

static void test_state(const Case *c) {
    Setup s = setup(c, MEGALODON_INFER);
    const Config *g = &c->config;
    const int lengths[] = {c->L, 1, 2, g->chunk_size - 1, g->chunk_size, g->chunk_size + 1, 7, 0};
    size_t n = (size_t)c->B * c->L * g->vocab_size;
    real *whole = malloc(n * sizeof *whole), *logits = malloc(n * sizeof *logits);
    State *first = state_new(g, c->B, 0), *state = state_new(g, c->B, 0);
    char name[80];
    read_in_calls(&s, NULL, c->L, whole);
    read_in_calls(&s, first, 1, logits);
    check_real(named(c->name, "token by token = whole"), logits, whole, n, ROUNDING);
    for (int i = 0; i < (int)(sizeof lengths / sizeof *lengths); i++) {
        if (lengths[i] > c->L) continue;
        for (int b = 0; b < c->B; b++) state_reset(state, b);
        read_in_calls(&s, state, lengths[i], logits);
        snprintf(name, sizeof name, "%.24s, %d tokens a call", c->name, lengths[i]);
        check_real(named(name, "logits"), logits, whole, n, ROUNDING);
        check_state(name, g, state, first);
    }

    // read and written, also in two halves, it continues bit for bit
    State *copy = state_new(g, c->B, 0);
    size_t half = state->bytes / 2;
    char *bytes = malloc(state->bytes);
    state_read(state, half, state->bytes - half, bytes + half);
    state_read(state, 0, half, bytes);
    state_write(copy, 0, half, bytes);
    state_write(copy, half, state->bytes - half, bytes + half);
    read_in_calls(&s, state, 3, whole);
    read_in_calls(&s, copy, 3, logits);
    check_same(named(c->name, "a written state continues the same"), logits, whole, n * sizeof *whole);

    // one row is reset, the others continue
    int last = c->B - 1;
    size_t row = (size_t)last * c->L * g->vocab_size, one = (size_t)c->L * g->vocab_size;
    state_reset(state, last);
    read_in_calls(&s, state, 3, logits);
    read_in_calls(&s, copy, 3, whole);
    // equal up to rounding, since rows at the same position may share a product
    if (last > 0) check_real(named(c->name, "rows that are not reset go on"), logits, whole, row, ROUNDING);
    for (int b = 0; b < c->B; b++) state_reset(first, b);
    read_in_calls(&s, first, 3, whole);
    check_real(named(c->name, "a row that is reset begins again"), logits + row, whole + row, one, ROUNDING);
    state_free(first), state_free(state), state_free(copy), setup_free(&s);
    free(whole), free(logits), free(bytes);
}

// The rows of a state may be at different positions: two sequences, one 3 tokens ahead, continue as each would alone.
static void test_rows(const Case *c) {
    Setup s = setup(c, MEGALODON_INFER);
    const Config *g = &c->config;
    int L = 4;
    size_t n = (size_t)L * g->vocab_size;
    real *alone = malloc(2 * n * sizeof *alone), *together = malloc(2 * n * sizeof *together);
    State *both = state_new(g, 2, 0);
    for (int b = 0; b < 2; b++) {
        State *one = state_new(g, 1, 0);
        megalodon_forward(s.model, one, s.tokens, 1, 2 + 3 * b);
        state_copy(one, 0, both, b, g);
        megalodon_forward(s.model, one, s.tokens + b * L, 1, L);
        megalodon_logits(s.model, 0, (size_t)L, alone + b * n);
        state_free(one);
    }
    megalodon_forward(s.model, both, s.tokens, 2, L);
    megalodon_logits(s.model, 0, 2 * (size_t)L, together);
    check_real(named(c->name, "rows at different places"), together, alone, 2 * n, ROUNDING);
    state_free(both), setup_free(&s);
    free(alone), free(together);
}

// ----------------------------------------------------------------------------
// optimizer, threads, learning

// The first two are large enough that loops are divided among threads.
// clang-format off
static const Case large = {
    "large",
    {.num_layers = 2, .model_dim = 40, .z_dim = 24, .value_dim = 56, .num_heads = 2, .ffn_hidden_dim = 72,
     .cema_ndim = 4, .chunk_size = 32, .vocab_size = 3000, .norm_num_groups = 4, .swiglu = 1, .rescale_nffn = 1,
     .norm_affine = 1, .norm_eps = 1e-5, .rope_base = 1e4}, 2, 70};
static const Case shared = {
    "shared",
    {.num_layers = 2, .model_dim = 64, .z_dim = 40, .value_dim = 96, .num_heads = 2, .ffn_hidden_dim = 96,
     .cema_ndim = 4, .chunk_size = 64, .vocab_size = 50, .norm_num_groups = 4, .swiglu = 1, .rescale_nffn = 1,
     .norm_affine = 1, .norm_eps = 1e-5, .rope_base = 1e4}, 3, 300};
static const Case learning = {
    "learning",
    {.num_layers = 2, .model_dim = 16, .z_dim = 8, .value_dim = 24, .num_heads = 1, .ffn_hidden_dim = 24,
     .cema_ndim = 4, .chunk_size = 8, .vocab_size = 11, .norm_num_groups = 4, .swiglu = 1, .norm_affine = 1,
     .norm_eps = 1e-5, .rope_base = 1e4}, 2, 20};
// clang-format on

static void test_optimizer(void) {
    Setup s = setup(&large, MEGALODON_TRAIN);
    AdamW o = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-3, .weight_decay = 0.1};
    double *p = malloc(s.size * sizeof *p), *m = calloc(s.size, sizeof *m), *v = calloc(s.size, sizeof *v), squares = 0;
    for (size_t i = 0; i < s.size; i++) p[i] = s.params[i];
    for (int k = 0; k < 3; k++) {
        double lr = 0.01 * (k + 1);
        random_fill(s.grads, s.size, 5 + (uint64_t)k, 0.1, 0.01);
        megalodon_write(s.model, GRADS, 0, s.size, s.grads);
        megalodon_update(s.model, &o, lr, 0.7, k);
        for (size_t i = 0; i < s.size; i++) {
            double g = 0.7 * s.grads[i];
            m[i] = 0.9 * m[i] + (1 - 0.9) * g;
            v[i] = 0.95 * v[i] + (1 - 0.95) * g * g;
            p[i] -= lr * 0.1 * p[i] + lr * m[i] / (1 - pow(0.9, k + 1)) / (sqrt(v[i] / (1 - pow(0.95, k + 1))) + 1e-3);
        }
    }
    for (size_t i = 0; i < s.size; i++) squares += (double)s.grads[i] * s.grads[i];
    double norm = megalodon_grad_norm(s.model), expected = sqrt(squares);
    check("norm of the gradients", &norm, &expected, 1, 1e-12);
    const struct {
        const char *name;
        Buffer buffer;
        const double *expected;
    } blocks[] = {
        {"AdamW, three steps: parameters", PARAMS, p}, {"first moments", MOMENT1, m}, {"second moments", MOMENT2, v}};
    for (int i = 0; i < 3; i++) {
        double *wide = malloc(s.size * sizeof *wide);
        megalodon_read(s.model, blocks[i].buffer, 0, s.size, s.params);
        for (size_t k = 0; k < s.size; k++) wide[k] = s.params[k];
        check(blocks[i].name, wide, blocks[i].expected, s.size, DOUBLE ? 1e-13 : 1e-6);
        free(wide);
    }
    setup_free(&s);
    free(p), free(m), free(v);
}

// The forward pass after an update or a write uses the new parameters: nothing derived from the old ones is reused.
static void test_fresh(void) {
    Setup a = setup(&cases[1], MEGALODON_TRAIN), b = setup(&cases[1], MEGALODON_TRAIN);
    AdamW o = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8};
    train(&a, a.tokens, a.targets, 2, 1);
    train(&b, a.tokens, a.targets, 2, 1);
    megalodon_update(a.model, &o, 0.1, 1, 0);
    megalodon_read(a.model, PARAMS, 0, a.size, a.params);
    megalodon_write(b.model, PARAMS, 0, a.size, a.params);
    Model *fresh = a.model;
    double after_update = train(&a, a.tokens, a.targets, 2, 1), after_write = train(&b, a.tokens, a.targets, 2, 1);
    a.model = megalodon_new(&cases[1].config, MEGALODON_TRAIN, 2, cases[1].L);
    megalodon_write(a.model, PARAMS, 0, a.size, a.params);
    double expected = train(&a, a.tokens, a.targets, 2, 1);
    check_true("an update shows at once", after_update == expected);
    check_true("a write shows at once", after_write == expected);
    megalodon_free(fresh), setup_free(&a), setup_free(&b);
}

// scale_emb equals an embedding that is sqrt(D) times as large.
static void test_scale(void) {
    Setup s = setup(&cases[NUM_CASES - 1], MEGALODON_INFER);
    Case plain = cases[NUM_CASES - 1];
    plain.config.scale_emb = 0;
    Setup p = setup(&plain, MEGALODON_INFER);
    size_t rows = (size_t)plain.L, n = rows * plain.config.vocab_size;
    real *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b);
    for (size_t i = 0; i < p.tensors[0].size; i++)
        p.params[i] *= (real)sqrt(plain.config.model_dim); // the first tensor
    megalodon_write(p.model, PARAMS, 0, p.size, p.params);
    megalodon_forward(s.model, NULL, s.tokens, 1, plain.L);
    megalodon_forward(p.model, NULL, s.tokens, 1, plain.L);
    megalodon_logits(s.model, 0, rows, a);
    megalodon_logits(p.model, 0, rows, b);
    check_real("scale_emb = a larger embedding", a, b, n, ROUNDING);
    setup_free(&s), setup_free(&p);
    free(a), free(b);
}

// One and two threads give the same bits, except with a BLAS library, which may sum in another order. The loops of this
// model are large enough for two threads.
static void test_threads(void) {
    int blas = strstr(megalodon_backend(), "BLAS") != NULL;
    Setup s[2];
    double sum[2];
    for (int i = 0; i < 2; i++) {
        megalodon_threads(i + 1);
        s[i] = setup(&shared, MEGALODON_TRAIN);
        sum[i] = train(&s[i], s[i].tokens, s[i].targets, shared.B, 1);
    }
    check_real("two threads = one, gradients", s[1].grads, s[0].grads, s[0].size, blas ? 1e-1 * ROUNDING : 0);
    check("two threads = one, loss", &sum[1], &sum[0], 1, blas ? 1e-1 * ROUNDING : 0);
    megalodon_threads(1);
    setup_free(&s[0]), setup_free(&s[1]);
}

// ----------------------------------------------------------------------------
// Weights for which squares or products overflow float32, against smaller weights that define the same model.

static void scale_tensors(Setup *s, const char *const names[2], double factor) {
    for (int i = 0; i < s->num_tensors; i++) {
        const Tensor *t = &s->tensors[i];
        for (int k = 0; k < 2; k++) {
            if (names[k] && strstr(t->name, names[k])) {
                for (size_t e = 0; e < t->size; e++) s->params[t->offset + e] *= (real)factor;
            }
        }
    }
    megalodon_write(s->model, PARAMS, 0, s->size, s->params);
}

// Compares logits, and the gradients of all tensors whose name is not in `except`. Each gradient is divided by its
// norm: the gradient w.r.t. a weight that is s times as large is 1/s times as large.
static void same_model(const char *what, Setup *a, Setup *b, const char *const except[2]) {
    size_t n = (size_t)a->c->B * a->c->L, V = (size_t)a->c->config.vocab_size;
    real *logits = malloc(2 * n * V * sizeof *logits);
    double *got = malloc(2 * a->size * sizeof *got), *expected = got + a->size;
    size_t count = 0;
    train(a, a->tokens, a->targets, a->c->B, 0.37), train(b, b->tokens, b->targets, b->c->B, 0.37);
    megalodon_logits(a->model, 0, n, logits), megalodon_logits(b->model, 0, n, logits + n * V);
    check_real(named(a->c->name, what), logits, logits + n * V, n * V, ROUNDING);
    for (int i = 0; i < a->num_tensors; i++) {
        const Tensor *t = &a->tensors[i];
        double norm_a = 0, norm_b = 0;
        if ((except[0] && strstr(t->name, except[0])) || (except[1] && strstr(t->name, except[1]))) continue;
        for (size_t k = t->offset; k < t->offset + t->size; k++) {
            norm_a += (double)a->grads[k] * a->grads[k], norm_b += (double)b->grads[k] * b->grads[k];
        }
        for (size_t k = t->offset; k < t->offset + t->size; k++, count++) {
            got[count] = a->grads[k] / sqrt(norm_a), expected[count] = b->grads[k] / sqrt(norm_b);
        }
    }
    check("  gradients", got, expected, count, ROUNDING);
    free(logits), free(got);
}

static void test_hostile(const Case *c) {
    static const struct {
        const char *what, *names[2], *except[2];
    } scaled[] = {{"wh1 x 2^66 = wh1 x 2^50", {"wh1.weight", "wh1.bias"}, {0}},     // before the FFN's LayerNorm
                  {"CEMA x 2^66 = CEMA x 2^50", {"cema.gamma", "cema.omega"}, {0}}, // before RMSNorm
                  {"wz x 2^66 = wz x 2^50", {"wz.weight", "wz.bias"}, {0}},         // before the norm of the heads
                  {"embed x 2^66 = embed x 2^50", {"embed.weight", NULL}, {"mega", "nffn"}}}; // before TimestepNorm
    for (int i = 0; i < 4; i++) {
        Setup a = setup(c, MEGALODON_TRAIN), b = setup(c, MEGALODON_TRAIN);
        scale_tensors(&a, scaled[i].names, 0x1p66), scale_tensors(&b, scaled[i].names, 0x1p50);
        same_model(scaled[i].what, &a, &b, scaled[i].except);
        setup_free(&a), setup_free(&b);
    }
    // silu(-1e30) = silu(0) = 0: every second row of wv or wr has a bias of -1e30, or is all zero
    static const char *const gates[2][2] = {{"wv.weight", "wv.bias"}, {"wr.weight", "wr.bias"}};
    for (int g = 0; g < 2; g++) {
        Setup a = setup(c, MEGALODON_TRAIN), b = setup(c, MEGALODON_TRAIN);
        for (int i = 0; i < a.num_tensors; i++) {
            const Tensor *t = &a.tensors[i];
            int bias = strstr(t->name, gates[g][1]) != NULL, width = bias ? 1 : c->config.model_dim;
            if (!bias && !strstr(t->name, gates[g][0])) continue;
            for (size_t k = 0; k < t->size; k++) {
                if (k / (size_t)width % 2) continue;
                if (bias) a.params[t->offset + k] = (real)-1e30;
                b.params[t->offset + k] = 0;
            }
        }
        megalodon_write(a.model, PARAMS, 0, a.size, a.params), megalodon_write(b.model, PARAMS, 0, b.size, b.params);
        same_model(g ? "wr's bias -1e30 = r of 0" : "wv's bias -1e30 = v of 0", &a, &b, gates[g]);
        setup_free(&a), setup_free(&b);
    }
}

static void test_learning(void) {
    Setup s = setup(&learning, MEGALODON_TRAIN);
    AdamW o = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.01};
    double mean = 0;
    for (int k = 0; k < 120; k++) {
        megalodon_zero_grad(s.model);
        mean = train(&s, s.tokens, s.targets, learning.B, 1.0 / 32) / 32; // 40 targets, a fifth of them ignored
        double norm = megalodon_grad_norm(s.model);
        megalodon_update(s.model, &o, 1e-2, norm > 1 ? 1 / norm : 1, k);
    }
    printf("loss of one batch after 120 steps: %.4f\n", mean);
    check_true("one batch is learnt by heart", mean < 0.05);
    setup_free(&s);
}

int main(void) {
    megalodon_threads(1); // such small models are slower with more threads
    printf("%s\n%-48s %9s  %6s\n", megalodon_backend(), "", "rel. L2", "tol");
    test_optimizer();
    test_fresh();
    test_scale();
    test_threads();
    for (int i = 0; i < NUM_CASES; i++) {
        tested = &cases[i].config;
        test_modes(&cases[i]);
        test_carried(&cases[i]);
        test_loss(&cases[i]);
        test_state(&cases[i]);
        if (cases[i].B > 1) test_rows(&cases[i]);
        for (int N = cases[i].config.chunk_size; N < cases[i].L; N *= 2) {
            test_segments(&cases[i], N);
#ifdef MEGALODON_DOUBLE
            if (cases[i].config.chunk_size + N < cases[i].L)
                test_state_gradient(&cases[i], cases[i].config.chunk_size, N);
#endif
        }
#ifdef MEGALODON_DOUBLE
        printf("%s, gradients:\n", cases[i].name);
        test_gradients(&cases[i]);
#endif
    }
    tested = NULL;
    test_hostile(&cases[1]), test_hostile(&cases[3]);
    test_learning();
    return check_done();
}
