// The parameter table, random numbers and initial values: what does not depend on the backend.
#include "check.h"

static void test_counts(void) {
    char line[128];
    for (int i = 0; i < NUM_PRESETS; i++) {
        const Preset *p = &megalodon_presets[i];
        size_t size, sum = 0;
        int count;
        Tensor *tensors = megalodon_tensors(&p->config, &count, &size);
        for (int t = 0; t < count; t++) sum += tensors[t].size;
        snprintf(line, sizeof line, "preset %s: %zu parameters", p->name, size);
        check_true(line, (p->num_parameters == 0 || (int64_t)size == p->num_parameters) && sum == size);
        free(tensors);
    }
}

// Operations of matrix products, counted by hand. A sequence of 10 tokens in chunks of 4 has 10 + 10 + 3 = 23 pairs of a
// query and a key.
static void test_operations(void) {
    Config c = {.num_layers = 2,
                .model_dim = 6,
                .z_dim = 4,
                .value_dim = 8,
                .num_heads = 2,
                .ffn_hidden_dim = 5,
                .cema_ndim = 3,
                .chunk_size = 4,
                .vocab_size = 11,
                .norm_num_groups = 2,
                .swiglu = 1};
    const ForwardOperations gated = megalodon_forward_operations(&c, 10);
    const double step = megalodon_step_operations(&c, 10);
    // a token and layer: wz 6 x 4, wv, wr and wh2 6 x 8 each, wh1 6 x 6: 204 multiply-adds
    check_true("operations of the projections", gated.projections == 2 * 2 * 10 * 204);
    check_true("operations of attention", gated.attention == 2 * 2 * 23 * (4 + 8));
    check_true("operations of the FFN with swiglu", gated.ffn == 2 * 2 * 10 * 90);
    check_true("operations of the output", gated.output == 2 * 10 * 66);
    check_true("operations of a step", step == 3 * (8160 + 1104 + 3600 + 1320));
    c.swiglu = 0;
    check_true("operations of the FFN without swiglu", megalodon_forward_operations(&c, 10).ffn == 2 * 2 * 10 * 60);
    check_true("operations of a step without swiglu", megalodon_step_operations(&c, 10) == step - 3 * 1200);
}

// Names and shapes of all tensors of one model, in order.
static void test_names(void) {
    static const char *const expected[] = {"embed.weight (11,6)",
                                           "layers.0.mega.gamma (2,4)",
                                           "layers.0.mega.beta (2,4)",
                                           "layers.0.mega.timenorm.weight (6)",
                                           "layers.0.mega.timenorm.bias (6)",
                                           "layers.0.mega.cema.alpha (6,3,1)",
                                           "layers.0.mega.cema.delta (6,3,1)",
                                           "layers.0.mega.cema.theta (6,1,1)",
                                           "layers.0.mega.cema.gamma (6,3,2)",
                                           "layers.0.mega.cema.omega (6,1)",
                                           "layers.0.mega.rmsnorm.weight (6)",
                                           "layers.0.mega.wv.weight (8,6)",
                                           "layers.0.mega.wv.bias (8)",
                                           "layers.0.mega.wz.weight (4,6)",
                                           "layers.0.mega.wz.bias (4)",
                                           "layers.0.mega.wr.weight (8,6)",
                                           "layers.0.mega.wr.bias (8)",
                                           "layers.0.mega.wh1.weight (6,6)",
                                           "layers.0.mega.wh1.bias (6)",
                                           "layers.0.mega.wh2.weight (6,8)",
                                           "layers.0.nffn.alpha (6)",
                                           "layers.0.nffn.norm.weight (6)",
                                           "layers.0.nffn.norm.bias (6)",
                                           "layers.0.nffn.fc1.weight (5,6)",
                                           "layers.0.nffn.fc2.weight (6,5)",
                                           "layers.0.nffn.fc3.weight (5,6)",
                                           "output.final_norm.weight (6)",
                                           "output.final_norm.bias (6)",
                                           "output.output.weight (11,6)"};
    enum { EXPECTED = sizeof expected / sizeof expected[0] };
    // clang-format off
    Config c = {.num_layers = 1, .model_dim = 6, .z_dim = 4, .value_dim = 8, .num_heads = 1, .ffn_hidden_dim = 5,
                      .cema_ndim = 3, .chunk_size = 8, .vocab_size = 11, .norm_num_groups = 2, .swiglu = 1,
                      .rescale_nffn = 1, .norm_affine = 1, .norm_eps = 1e-5, .rope_base = 1e4};
    // clang-format on
    int count, same = 0;
    Tensor *tensors = megalodon_tensors(&c, &count, NULL);
    for (int i = 0; i < count && i < EXPECTED; i++) {
        const Tensor *t = &tensors[i];
        char text[128];
        int n = snprintf(text, sizeof text, "%s (%d", t->name, t->shape[0]);
        for (int d = 1; d < t->ndim; d++) n += snprintf(text + n, sizeof text - (size_t)n, ",%d", t->shape[d]);
        snprintf(text + n, sizeof text - (size_t)n, ")");
        if (strcmp(text, expected[i]) == 0)
            same++;
        else
            printf("%s, expected %s\n", text, expected[i]);
    }
    check_true("names, shapes and order of all tensors of a layer", count == EXPECTED && same == EXPECTED);
    free(tensors);
    c.swiglu = c.rescale_nffn = c.norm_affine = 0;
    c.share_emb = 1;
    tensors = megalodon_tensors(&c, &count, NULL);
    check_true("fc3, alpha, output.output and three norm tensors are left out when off", count == EXPECTED - 6);
    free(tensors);
}

// Known answers of Philox from Random123: (counter, key) -> numbers.
static void test_philox(void) {
    static const uint32_t answers[][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1}};
    for (int i = 0; i < 3; i++) {
        const uint32_t *a = answers[i];
        uint32_t out[4];
        megalodon_philox(out, (uint64_t)a[5] << 32 | a[4], a[0], a[1], a[2], a[3]);
        check_same("Philox4x32-10 gives its known answers", out, a + 6, sizeof out);
    }
}

// Mean and standard deviation of initial values of the enwik8 preset against those of their distributions.
static void test_init(void) {
    const Config *c = &megalodon_presets[6].config;
    static const struct {
        const char *name;
        double deviation, limit;
    } rows[] = {{"embed.weight", 0.05033, 3 / 19.5959}, // 0.9866 of 1/sqrt(384): cut at three deviations
                {"layers.1.mega.wv.weight", 0.029463, INFINITY},
                {"layers.1.nffn.fc2.weight", 0.018042, INFINITY},
                {"layers.1.mega.cema.alpha", 0.2, INFINITY},
                {"layers.1.mega.cema.omega", 0.25, 1},
                {"layers.1.mega.wv.bias", 0, 0},
                {"layers.1.mega.timenorm.weight", 0, 0}};
    int count;
    Tensor *tensors = megalodon_tensors(c, &count, NULL);
    for (int i = 0; i < count; i++) {
        const Tensor *t = &tensors[i];
        real *x = malloc(t->size * sizeof *x), *again = malloc(t->size * sizeof *x);
        megalodon_init(x, t, c, 7);
        megalodon_init(again, t, c, 7);
        double mean = 0, square = 0, most = 0;
        for (size_t n = 0; n < t->size; n++) {
            mean += (double)x[n] / (double)t->size;
            square += (double)x[n] * (double)x[n] / (double)t->size;
            most = fmax(most, fabs((double)x[n]));
        }
        for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
            double s = rows[r].deviation,
                   allowed = 4 / sqrt((double)t->size); // four standard errors
            if (strcmp(t->name, rows[r].name) != 0) continue;
            check_true(t->name, fabs(mean) <= s * allowed && fabs(sqrt(square) - s) <= s * allowed &&
                                    most <= rows[r].limit * (1 + 1e-6) && memcmp(x, again, t->size * sizeof *x) == 0);
        }
        if (strcmp(t->name, "layers.1.mega.cema.theta") == 0) { // every f = D^(-i/D) once
            int found = 0, D = c->model_dim;
            for (int f = 1; f <= D; f++) {
                double power = pow(D, -(double)f / D), theta = log(power / (1 - power));
                for (int n = 0; n < D; n++) found += fabs((double)x[n] - theta) < 1e-5 * (1 + fabs(theta));
            }
            check_true("layers.1.mega.cema.theta is a permutation", found == D);
        }
        free(x), free(again);
    }
    free(tensors);
}

// The other init modes of linear weights; other tensors must be as with he.
static void test_init_modes(void) {
    static const struct {
        InitMode mode;
        const char *tensor, *line;
        double deviation, limit;
    } rows[] = {
        {XAVIER, "layers.1.nffn.fc2.weight", "xavier", 0.037689, 0.065280}, // sqrt(6/(384 + 1024)), over sqrt(3)
        {BERT, "layers.1.nffn.fc2.weight", "bert", 0.02, INFINITY},
        {GAUSSIAN, "layers.1.nffn.fc2.weight", "gaussian", 0.98658, 3},
        {GAUSSIAN, "embed.weight", "  the embedding", 0.05033, 3 / 19.5959},
        {XAVIER, "layers.1.mega.cema.alpha", "  CEMA", 0.2, INFINITY}};
    for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
        Config c = megalodon_presets[6].config;
        c.init_mode = rows[r].mode;
        int count, i = 0;
        Tensor *tensors = megalodon_tensors(&c, &count, NULL);
        while (strcmp(tensors[i].name, rows[r].tensor) != 0) i++;
        const size_t size = tensors[i].size;
        real *x = malloc(size * sizeof *x);
        double mean = 0, square = 0, most = 0;
        megalodon_init(x, &tensors[i], &c, 7);
        for (size_t n = 0; n < size; n++) {
            mean += (double)x[n] / (double)size, square += (double)x[n] * (double)x[n] / (double)size;
            most = fmax(most, fabs((double)x[n]));
        }
        const double s = rows[r].deviation, allowed = 4 * s / sqrt((double)size);
        check_true(rows[r].line, fabs(mean) <= allowed && fabs(sqrt(square) - s) <= allowed && most <= rows[r].limit);
        free(x), free(tensors);
    }
}

int main(void) {
    test_init_modes();
    test_counts();
    test_operations();
    test_names();
    test_philox();
    test_init();
    return check_done();
}
