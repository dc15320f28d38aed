// Configurations, the sampler, checkpoints and state files, and those of them that must not load.
#define _GNU_SOURCE   // string.h: memmem
#include <sys/stat.h> // defines: mkdir
#include <unistd.h>   // defines: unlink, rmdir
#include "../plumbing/plumbing.h"
#include "check.h"

static char folder[] = "/tmp/test_plumbing_XXXXXX", path[64], err[ST_ERR];

static void write_file(const void *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(bytes, 1, size, f) != size || fclose(f) != 0) fatal("%s: cannot write", path);
}

// ----------------------------------------------------------------------------

static void refuse_config(const char *json, const char *reason) {
    char line[128];
    Config c = config_defaults();
    err[0] = 0;
    bool ok = config_from_json(&c, json, err) && config_check(&c, err);
    snprintf(line, sizeof line, "refused: %s", json);
    check_true(line, !ok && strstr(err, reason) != NULL);
    if (ok || strstr(err, reason) == NULL) printf("    said '%s', expected '%s'\n", err, reason);
}

static void test_config(void) {
    for (int i = 0; i < NUM_PRESETS; i++) {
        Config c = config_defaults();
        char *json = config_to_json(&megalodon_presets[i].config);
        bool ok = config_from_json(&c, json, err) && config_check(&c, err);
        check_true("a preset's configuration, to JSON and back", ok && config_equal(&c, &megalodon_presets[i].config));
        free(json);
    }
    Config c = config_defaults();
    bool ok = config_from_json(&c,
                               "{\"vocab_size\": 300, \"output_size\": 300, \"rope_base\": null, \"dropout\": 0, "
                               "\"init_mode\": \"he\", \"efficient_attn\": \"x\", \"layerwise_ckpt\": true}",
                               err);
    check_true("defaults, and fields that change nothing",
               ok && config_check(&c, err) && c.num_layers == 8 && c.rope_base == 1e4 && c.vocab_size == 300);
    c = config_defaults();
    ok = config_from_json(&c, "{\"vocab_size\": 9, \"hidden_dropout\": 0.25, \"init_mode\": \"bert\"}", err);
    char *json = config_to_json(&c);
    Config again = config_defaults();
    ok &= config_from_json(&again, json, err) && config_equal(&c, &again);
    check_true("dropout and init_mode, to JSON and back", ok && c.hidden_dropout == 0.25 && c.init_mode == BERT);
    free(json);
    c = config_defaults(), again = c;
    json = config_to_json(&c);
    check_true("parts that are not replaced are not written", !strstr(json, "cema\"") && !strstr(json, "two_hop"));
    free(json);
    c.vocab_size = 9, c.cema = CEMA_NONE, c.timestep_norm = NORM_LAYER, c.attention = ATTENTION_STANDARD;
    c.two_hop = ONE_HOP;
    json = config_to_json(&c);
    check_true("parts that are replaced, to JSON and back",
               strstr(json,
                      "\"cema\": \"none\", \"timestep_norm\": \"layer\", \"attention\": \"standard\", \"two_hop\": "
                      "\"off\"") &&
                   config_from_json(&again, json, err) && config_equal(&c, &again));
    free(json);
    refuse_config("{}", "vocab_size");
    refuse_config("{\"vocab_size\": 9, \"layers\": 3}", "'layers'");
    refuse_config("{\"vocab_size\": 9, \"vocab_size\": 9}", "'vocab_size' twice");
    refuse_config("{\"vocab_size\": 9, \"dropout\": 1}", "dropout 1 is not in");
    refuse_config("{\"vocab_size\": 9, \"attention_dropout\": -0.1}", "attention_dropout -0.1 is not in");
    refuse_config("{\"vocab_size\": 9, \"init_mode\": \"zero\"}", "init_mode \"zero\" is none of: he");
    refuse_config("{\"vocab_size\": 9, \"cema\": \"rea\"}", "cema \"rea\" is none of: complex real none");
    refuse_config("{\"vocab_size\": 9, \"two_hop\": false}", "");
    refuse_config("{\"vocab_size\": 9, \"output_size\": 8}", "output_size 8 is not supported");
    refuse_config("{\"vocab_size\": 9, \"num_heads\": 3}", "num_heads 3");
    refuse_config("{\"vocab_size\": 9, \"num_heads\": 256}", "odd");
    refuse_config("{\"vocab_size\": 9, \"norm_num_groups\": 3}", "norm_num_groups 3");
    refuse_config("{\"vocab_size\": 9, \"norm_num_groups\": 1024}", "norm_num_groups 1024");
    refuse_config("{\"vocab_size\": 9, \"norm_eps\": 0}", "norm_eps");
    refuse_config("{\"vocab_size\": 9, \"rope_base\": -1}", "rope_base");
    refuse_config("{\"vocab_size\": 9, \"model_dim\": 0}", "model_dim");
    refuse_config("{\"vocab_size\": 9, \"model_dim\": 4294967300}", "model_dim");
    refuse_config("{\"vocab_size\": 9, \"swiglu\": 1}", "true or false");
    refuse_config("{\"vocab_size\": 9", "expected");
}

// ----------------------------------------------------------------------------

// Draws at DRAWS evenly spaced numbers must share the tokens out as the definition does, taken literally.
static void check_draws(const real *logits, int V, Sampling how) {
    enum { DRAWS = 4000 };
    char line[128];
    double largest = 0, sum_k = 0, sum = 0, *p = calloc((size_t)V, sizeof *p), *before = calloc((size_t)V, sizeof *p);
    int *rank = calloc((size_t)V, sizeof *rank), *counts = calloc((size_t)V, sizeof *counts), close = 1;
    for (int i = 0; i < V; i++) p[i] = exp((double)logits[i] / how.temperature);
    for (int i = 0; i < V; i++) {
        largest = fmax(largest, p[i]);
        for (int j = 0; j < V; j++) {
            if (p[j] > p[i] || (p[j] == p[i] && j < i)) rank[i]++, before[i] += p[j];
        }
        if (how.top_k == 0 || rank[i] < how.top_k) sum_k += p[i];
    }
    for (int i = 0; i < V; i++) {
        const bool in_k = how.top_k == 0 || rank[i] < how.top_k, in_p = rank[i] == 0 || before[i] < how.top_p * sum_k;
        if (!in_k || (how.top_p < 1 && !in_p) || p[i] < how.min_p * largest) p[i] = 0;
        sum += p[i];
    }
    for (int n = 0; n < DRAWS; n++) counts[sample_token(logits, V, &how, (n + 0.5) / DRAWS)]++;
    for (int i = 0; i < V; i++) close &= fabs(counts[i] - DRAWS * p[i] / sum) <= (p[i] > 0 ? 1.001 : 0);
    snprintf(line, sizeof line, "sampler: %d tokens, temperature %g, top-k %d, top-p %g, min-p %g", V, how.temperature,
             how.top_k, how.top_p, how.min_p);
    check_true(line, close);
    free(p), free(before), free(rank), free(counts);
}

static void test_sampler(void) {
    enum { V = 300, DRAWS = 20000 };
    real logits[V], tail[V];
    random_fill(logits, V, 1, 5, 0);
    // 0.5, 0.3, 0.06, 0.05, and a tail of 0.09, none of which is among the fewest that make up 0.9
    const double first[4] = {0.5, 0.3, 0.06, 0.05};
    for (int i = 0; i < V; i++) tail[V - 1 - i] = (real)log(i < 4 ? first[i] : 0.09 / (V - 4));
    static const Sampling ways[] = {{1, 1, 0, 0, 0},   {0.5, 1, 0, 0, 0},   {1, 1, 0, 1, 0},   {1, 1, 0, 2, 0},
                                    {1, 1, 0, 7, 0},   {1, 1, 0, V, 0},     {1, 0, 0, 0, 0},   {1, 0.3, 0, 0, 0},
                                    {1, 0.9, 0, 0, 0}, {2, 0.99, 0, 0, 0},  {1, 1, 0.1, 0, 0}, {1, 1, 1, 0, 0},
                                    {1, 0.9, 0, 5, 0}, {1, 0.9, 0.2, 0, 0}, {1, 1, 0.3, 9, 0}, {1, 0.8, 0.4, 9, 0}};
    for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) check_draws(logits, V, ways[i]);
    check_draws(tail, V, (Sampling){1, 0.9, 0, 0, 0});
    const Sampling all = {.temperature = 1, .top_p = 1}, greedy = {.temperature = 0};
    int best = 0, same = 1;
    for (int i = 0; i < V; i++) best = logits[i] > logits[best] ? i : best;
    for (int n = 0; n < 100; n++) same &= sample_token(logits, V, &greedy, n / 100.0) == best;
    check_true("sampler: temperature 0 gives the likeliest", same);
    check_true("sampler: the ends of [0,1)",
               sample_token(logits, V, &all, 0) == 0 && sample_token(logits, V, &all, 1 - 0x1p-53) == V - 1);
    // of a padded vocabulary the tokens from 256 on are never drawn, NaN or not, but for the EOT, as often as it should be
    enum { TEXT = 256, EOT = 280 };
    const Sampling ends = {.temperature = 1, .top_p = 1, .eot = EOT}, ends_greedy = {.temperature = 0, .eot = EOT};
    int drawn[V] = {0}, padding = 0;
    double sum = 0, exact = 0;
    for (int i = TEXT; i < V; i++) tail[i] = i == EOT ? logits[7] : (real)NAN;
    for (int i = 0; i < TEXT; i++) tail[i] = logits[i];
    for (int i = 0; i < TEXT; i++) sum += exp((double)tail[i]);
    exact = exp((double)tail[EOT]) / (sum + exp((double)tail[EOT]));
    for (int n = 0; n < DRAWS; n++) drawn[sample_token(tail, TEXT, &ends, (n + 0.5) / DRAWS)]++;
    for (int i = TEXT; i < V; i++) padding += i != EOT ? drawn[i] : 0;
    check_true("sampler: padding is never drawn, the EOT is",
               padding == 0 && fabs(drawn[EOT] - DRAWS * exact) <= 1.001);
    tail[EOT] = 100;
    check_true("sampler: an EOT beyond the text's tokens can be the likeliest",
               sample_token(tail, TEXT, &ends_greedy, 0.5) == EOT && sample_token(tail, TEXT, &ends, 0.5) == EOT);
    double mean = 0, together = 0;
    for (int64_t i = 0; i < DRAWS; i++) {
        const double u = sample_uniform(3, i, 0), other_row = sample_uniform(3, i, 1);
        mean += u / DRAWS, together += (u - 0.5) * (other_row - 0.5) * 12 / DRAWS;
    }
    check_true("sampler: random numbers of mean 1/2, of two rows independent",
               fabs(mean - 0.5) < 4 / sqrt(12.0 * DRAWS) && fabs(together) < 4 / sqrt(DRAWS));
}

// ----------------------------------------------------------------------------

// clang-format off
static const Config config = {.num_layers = 2, .model_dim = 8, .z_dim = 4, .value_dim = 6, .num_heads = 1,
                              .ffn_hidden_dim = 5, .cema_ndim = 2, .chunk_size = 8, .vocab_size = 11,
                              .norm_num_groups = 2, .swiglu = 1, .rescale_nffn = 1, .share_emb = 1, .norm_affine = 1,
                              .norm_eps = 1e-5, .rope_base = 1e4};
// clang-format on

static bool load(Model *model, const Config *c) {
    StFile f;
    err[0] = 0;
    bool ok = st_open(&f, path, err) && load_model(&f, model, c, err);
    if (f.file != NULL) st_close(&f);
    return ok;
}

static char *read_file(size_t *size) {
    enum { MOST = 1 << 20 };
    FILE *f = fopen(path, "rb");
    char *bytes = malloc(MOST);
    if (f == NULL || bytes == NULL) fatal("%s: cannot read", path);
    *size = fread(bytes, 1, MOST - 1, f);
    fclose(f);
    return bytes;
}

// Writes the good file with the last number of a tensor replaced.
static void write_value(const char *good, size_t size, const char *name, const void *value, size_t n) {
    char *bad = malloc(size);
    StFile f;
    write_file(good, size);
    if (!st_open(&f, path, err)) fatal("%s", err);
    const StTensor *t = st_find(&f, name);
    memcpy(bad, good, size);
    if (t != NULL) memcpy(bad + f.data_start + t->end - n, value, n);
    st_close(&f);
    write_file(bad, size);
    free(bad);
}

// The same with text of the header replaced by other text of the same length.
static void write_header(const char *good, size_t size, const char *from, const char *to) {
    char *bad = malloc(size), *at;
    memcpy(bad, good, size);
    at = memmem(bad, size, from, strlen(from));
    if (at == NULL) fatal("no %s in the header", from);
    memcpy(at, to, strlen(to));
    write_file(bad, size);
    free(bad);
}

// What has just been tried must have been refused for this reason.
static void check_refused(const char *kind, const char *what, bool loaded, const char *reason) {
    char line[160];
    const bool ok = !loaded && strstr(err, reason) != NULL;
    snprintf(line, sizeof line, "refused: %s with %s", kind, what);
    check_true(line, ok);
    if (!ok) printf("    said '%s', expected '%s'\n", loaded ? "" : err, reason);
}

static void refuse_value(Model *model, const char *good, size_t size, const char *name, const void *value, size_t n) {
    char what[128];
    write_value(good, size, name, value, n);
    snprintf(what, sizeof what, "another value in %s", name);
    check_refused("checkpoint", what, load(model, &config), name);
}

static void refuse_header(Model *model, const char *good, size_t size, const char *from, const char *to,
                          const char *reason) {
    char what[128];
    write_header(good, size, from, to);
    snprintf(what, sizeof what, "%s for %s", to, from);
    check_refused("checkpoint", what, load(model, &config), reason);
}

// Writes the model at `path` with all floats in F16. The nearest F16 of a number of magnitude below 65504: its mantissa
// rounded to 11 bits, or to a multiple of 2^-24.
static void write_halves(void) {
    StFile f;
    StWriter w;
    char copy[sizeof path + 4];
    snprintf(copy, sizeof copy, "%s.f16", path);
    if (!st_open(&f, path, err)) fatal("%s", err);
    StTensor *list = allocate((size_t)f.count, sizeof *list);
    for (int i = 0; i < f.count; i++) {
        list[i] = f.tensors[i];
        if (list[i].type == ST_F32) list[i].type = ST_F16;
    }
    st_create(&w, copy, f.config, list, f.count, err);
    for (int i = 0; i < f.count; i++) {
        const int64_t n = st_count(&f.tensors[i]);
        double *values = allocate((size_t)n, sizeof *values);
        uint16_t *halves = allocate((size_t)n, sizeof *halves);
        st_read(&f, &f.tensors[i], 0, n, values, ST_F64, err);
        for (int64_t k = 0; k < n; k++) {
            int exponent;
            frexp(values[k], &exponent);
            exponent = exponent < -13 ? -13 : exponent;                          // the least one of a normal number
            const int steps = (int)lrint(ldexp(fabs(values[k]), 11 - exponent)); // a carry goes into the exponent
            halves[k] = (uint16_t)((values[k] < 0) << 15 | (steps + (steps >= 1024 ? (exponent + 13) * 1024 : 0)));
        }
        const bool whole = f.tensors[i].type == ST_I64; // zeros
        st_write(&w, whole ? (void *)values : halves, (size_t)n * (whole ? 8 : 2), err);
        free(values), free(halves);
    }
    if (!st_finish(&w, err)) fatal("%s", err);
    st_close(&f);
    rename(copy, path);
    free(list);
}

static void test_halves(Model *model, const real *values, size_t n) {
    real *loaded = allocate(n, sizeof *loaded);
    double worst = 0;
    write_halves();
    const bool ok = load(model, &config);
    megalodon_read(model, PARAMS, 0, n, loaded);
    for (size_t i = 0; i < n; i++)
        worst = fmax(worst, fabs((double)loaded[i] - (double)values[i]) / (fabs((double)values[i]) + 0x1p-14));
    check_true("checkpoint: F16 is read", ok && worst > 0 && worst <= 0x1p-11);
    if (!ok) printf("    %s\n", err);
    free(loaded);
}

static void test_checkpoint(void) {
    const float nan = NAN, one = 1;
    const int64_t count = 1;
    size_t n, size;
    Tensor *tensors = megalodon_tensors(&config, NULL, &n);
    Model *a = megalodon_new(&config, MEGALODON_INFER, 1, 1), *b = megalodon_new(&config, MEGALODON_INFER, 1, 1);
    real *values = malloc(n * sizeof *values), *loaded = malloc(n * sizeof *loaded);
    random_fill(values, n, 1, 1, 0);
    megalodon_write(a, PARAMS, 0, n, values);
    check_true("checkpoint: written", save_model(path, a, &config, err));
    check_true("checkpoint: read", load(b, &config));
    megalodon_read(b, PARAMS, 0, n, loaded);
    check_same("checkpoint: the same numbers", values, loaded, n * sizeof *values);

    char *good = read_file(&size);
    refuse_value(b, good, size, "layers.1.mega.wv.weight", &nan, sizeof nan);
    refuse_value(b, good, size, "layers.0.mega.timenorm.prior_count", &count, sizeof count);
    refuse_value(b, good, size, "output.final_norm.prior_mean", &one, sizeof one);
    refuse_value(b, good, size, "layers.1.mega.timenorm.prior_logv", &one, sizeof one);
    refuse_value(b, good, size, "rope.freqs", &one, sizeof one);
    refuse_value(b, good, size, "output.output.weight", &one, sizeof one); // tied, but unlike the embedding
    refuse_header(b, good, size, "layers.1.mega.wr.bias", "layers.1.mega.wr.biaz",
                  "'layers.1.mega.wr.bias' is missing");
    refuse_header(b, good, size, "rope.freqs", "rope.fraqs", "'rope.fraqs' does not belong");
    refuse_header(b, good, size, "\"shape\":[8,6]", "\"shape\":[6,8]", "'layers.0.mega.wh2.weight' has shape (6, 8)");
    refuse_header(b, good, size, "F32", "U32", "'embed.weight': is U32, not F32");
    refuse_header(b, good, size, "F32", "Q_1", "'embed.weight': is Q_1, not F32");
    write_file(good, size);
    test_halves(b, values, n);
    write_file(good, size - 1);
    check_true("refused: truncated checkpoint", !load(b, &config) && strstr(err, "truncated") != NULL);
    good[size] = 0;
    write_file(good, size + 1);
    check_true("refused: over-long checkpoint", !load(b, &config) && strstr(err, "after the last tensor") != NULL);
    Config other = config;
    other.rope_base = 1e5;
    write_file(good, size);
    check_true("refused: another rope_base", !load(b, &other) && strstr(err, "rope.freqs") != NULL);
    megalodon_free(a), megalodon_free(b);
    free(values), free(loaded), free(good), free(tensors);
    unlink(path);
}

// ----------------------------------------------------------------------------

// A state of B rows that the model has read L random tokens into.
static State *used_state(Model *model, int B, int L, int whole_chunks) {
    int32_t tokens[64];
    State *s = state_new(&config, B, whole_chunks);
    for (int i = 0; i < B * L; i++) tokens[i] = (i * i + 3 * i) % config.vocab_size;
    megalodon_forward(model, s, tokens, B, L);
    return s;
}

static bool load_it(State *s, const Config *c, int64_t *seed, real *logits) {
    err[0] = 0;
    return load_state(path, s, c, seed, logits, err);
}

static void refuse_state_value(State *s, const char *good, size_t size, const char *name, const void *value,
                               const char *what) {
    int64_t seed;
    real logits[2 * 11];
    write_value(good, size, name, value, strcmp(name, "state.h") == 0 ? sizeof(float) : 8);
    check_refused("state", what, load_it(s, &config, &seed, logits), name);
}

static void refuse_state_header(State *s, const char *good, size_t size, const char *from, const char *to,
                                const char *reason) {
    char what[128];
    int64_t seed;
    real logits[2 * 11];
    write_header(good, size, from, to);
    snprintf(what, sizeof what, "%s for %s", to, from);
    check_refused("state", what, load_it(s, &config, &seed, logits), reason);
}

static void test_damaged_states(State *s, const char *good, size_t size) {
    const int64_t minus = -1, most = (int64_t)1 << 53, too_many = most + 2;
    const double nan = NAN, negative = -1e-9;
    const float infinite = INFINITY;
    int64_t seed;
    real logits[2 * 11];
    refuse_state_value(s, good, size, "state.count", &minus, "a count of -1");
    refuse_state_value(s, good, size, "state.count", &too_many, "a count of 2^53 + 2");
    write_value(good, size, "state.count", &most, sizeof most);
    check_true("state: a count of 2^53", load_it(s, &config, &seed, logits));
    refuse_state_value(s, good, size, "state.seed", &minus, "a seed of -1");
    refuse_state_value(s, good, size, "state.mean", &nan, "a mean that is no number");
    refuse_state_value(s, good, size, "state.m2", &negative, "a negative m2");
    refuse_state_value(s, good, size, "state.h", &infinite, "an infinite h");
    refuse_state_header(s, good, size, "state.m2", "state.mx", "'state.mx' does not belong");
    refuse_state_header(s, good, size, "[3,2,2]", "[2,3,2]", "'state.m");
    refuse_state_header(s, good, size, "\"I64\",\"shape\":[2]", "\"F64\",\"shape\":[2]",
                        "'state.count' has another type");
    refuse_state_header(s, good, size, "\"F64\"", "\"U64\"", "'state.mean' has another type");
    refuse_state_header(s, good, size, "\\\"model_dim\\\": 8", "\\\"model_dim\\\": 4", "another configuration");
    write_file(good, size - 1);
    check_refused("state", "its end cut off", load_it(s, &config, &seed, logits), "truncated");
}

static void test_state(void) {
    enum { B = 2, L = 11, V = 11 };
    Model *model = megalodon_new(&config, MEGALODON_INFER, 3, 16);
    size_t n, size;
    int64_t seed = 0;
    real logits[B * V], loaded[B * V];
    Tensor *list = megalodon_tensors(&config, NULL, &n);
    real *values = malloc(n * sizeof *values);
    random_fill(values, n, 2, 0.3, 0), random_fill(logits, B * V, 3, 1, 0);
    megalodon_write(model, PARAMS, 0, n, values);
    State *a = used_state(model, B, L, 0), *b = state_new(&config, B, 0), *three = used_state(model, 3, 5, 0);

    check_true("state: written", save_state(path, a, &config, INT64_MAX, logits, err));
    check_true("state: its rows", state_rows(path, err) == B);
    Config c = config;
    c.dropout = c.hidden_dropout = c.attention_dropout = 0.5, c.init_mode = BERT;
    check_true("state: read, also if dropout and init_mode differ", load_it(b, &c, &seed, loaded));
    check_same("state: the same numbers", a->memory, b->memory, a->bytes);
    check_true("state: the same seed and logits", seed == INT64_MAX && memcmp(logits, loaded, sizeof logits) == 0);
    c.rope_base = 1e5;
    check_refused("state", "another rope_base", load_it(b, &c, &seed, loaded), "another configuration");
    check_refused("state", "2 rows for 3", load_it(three, &config, &seed, loaded), "'state.count' has shape (2)");
    check_refused("state", "logits not asked for", load_it(b, &config, &seed, NULL), "'state.logits' does not belong");
    char *good = read_file(&size);
    test_damaged_states(b, good, size);

    State *whole = used_state(model, B, 16, 1), *again = state_new(&config, B, 1);
    check_true("state of whole chunks: written, without logits", save_state(path, whole, &config, 7, NULL, err));
    check_true("state of whole chunks: read", load_it(again, &config, &seed, NULL) && seed == 7);
    check_same("state of whole chunks: the same numbers", whole->memory, again->memory, whole->bytes);
    check_refused("state", "no k for one that needs it", load_it(b, &config, &seed, NULL), "'state.k' is missing");
    whole->count[1] = 12;
    save_state(path, whole, &config, 7, NULL, err);
    check_refused("state", "a chunk unfinished for one without k", load_it(again, &config, &seed, NULL),
                  "'state.count' is 12");
    check_true("refused: nowhere to write a state", !save_state("/nowhere/state", a, &config, 7, NULL, err));
    check_true("refused: rows of no state", save_model(path, model, &config, err) && state_rows(path, err) == 0);

    // row 1 of a, into row 2 of three: it goes on as it would have there, and the other rows stay
    int32_t next[3] = {4, 9, 1};
    real before[3 * V], after[3 * V];
    State *kept = used_state(model, 3, 5, 0);
    state_copy(a, 1, three, 2, &config);
    megalodon_forward(model, a, next + 1, 2, 1), megalodon_logits(model, 0, 2, before);
    megalodon_forward(model, three, next, 3, 1), megalodon_logits(model, 0, 3, after);
    check_real("state_copy: the row goes on in another batch", after + 2 * V, before + V, V, 1e-5);
    megalodon_forward(model, kept, next, 3, 1), megalodon_logits(model, 0, 3, before);
    check_real("state_copy: the others stay", after, before, 2 * V, 1e-5);
    state_free(a), state_free(b), state_free(three), state_free(whole), state_free(again), state_free(kept);
    megalodon_free(model);
    free(values), free(list), free(good);
    unlink(path);
}

// ----------------------------------------------------------------------------
// limits of cgroups, in made-up trees

static char tree[] = "/tmp/test_cgroups_XXXXXX";

// Writes a file below the tree, with its folders.
static void tree_file(const char *name, const char *text) {
    char full[512];
    snprintf(full, sizeof full, "%s/%s", tree, name);
    for (char *slash = strchr(full + strlen(tree) + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(full, 0700);
        *slash = '/';
    }
    FILE *f = fopen(full, "w");
    if (f == NULL || fputs(text, f) == EOF || fclose(f) != 0) fatal("%s: cannot write", full);
}

static void test_limits(void) {
    if (mkdtemp(tree) == NULL) fatal("/tmp: cannot make a folder");
    check_true("cgroups: no files, no limits", memory_limit(tree) == SIZE_MAX && cpu_limit(tree) == 0);
    tree_file("proc/self/cgroup", "0::/a/b/c\n");
    tree_file("sys/fs/cgroup/a/b/c/memory.max", "max\n");
    tree_file("sys/fs/cgroup/a/b/memory.max", "1000000\n");
    tree_file("sys/fs/cgroup/a/memory.max", "4000000\n");
    tree_file("sys/fs/cgroup/a/b/c/cpu.max", "max 100000\n");
    tree_file("sys/fs/cgroup/a/cpu.max", "150000 100000\n");
    check_true("version 2: the parent's, the least", memory_limit(tree) == 1000000 && cpu_limit(tree) == 2);
    tree_file("sys/fs/cgroup/a/b/c/memory.max", "500000\n");
    check_true("  its own, if that is less", memory_limit(tree) == 500000);
    tree_file("proc/self/cgroup", "0::/\n");
    check_true("  not those of others", memory_limit(tree) == SIZE_MAX && cpu_limit(tree) == 0);
    tree_file("sys/fs/cgroup/memory.max", "700000\n");
    check_true("  a container's, which sees its own as the root", memory_limit(tree) == 700000);
    tree_file("sys/fs/cgroup/memory.max", "max\n");
    tree_file("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/x/y\n3:memoryless:/z\n1:name=systemd:/\n0::/\n");
    tree_file("sys/fs/cgroup/memory/x/y/memory.limit_in_bytes", "9223372036854771712\n");
    tree_file("sys/fs/cgroup/memory/z/memory.limit_in_bytes", "1\n");
    tree_file("sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1\n");
    tree_file("sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n");
    check_true("version 1: a number too large to be meant, and -1, are none",
               memory_limit(tree) == SIZE_MAX && cpu_limit(tree) == 0);
    tree_file("sys/fs/cgroup/memory/memory.limit_in_bytes", "3000000\n");
    tree_file("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "2000000\n");
    tree_file("sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "400000\n");
    check_true("  the least of those above", memory_limit(tree) == 2000000 && cpu_limit(tree) == 4);
    check_true("host_memory: shared by processes", host_memory(4, 0) <= host_memory(1, 0));
    char command[64];
    snprintf(command, sizeof command, "rm -r %s", tree);
    check_true("  the tree is removed", system(command) == 0);
}

// The launchers' variables in their order of precedence: Open MPI, MPICH and Intel MPI, Slurm.
static void test_local_rank(void) {
    unsetenv("OMPI_COMM_WORLD_LOCAL_RANK"), unsetenv("MPI_LOCALRANKID"), unsetenv("SLURM_LOCALID");
    check_true("local_rank: 0 without a launcher", local_rank() == 0);
    setenv("SLURM_LOCALID", "3", 1);
    check_true("local_rank: Slurm's", local_rank() == 3);
    setenv("MPI_LOCALRANKID", "2", 1);
    check_true("  MPICH's first", local_rank() == 2);
    setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1", 1);
    check_true("  Open MPI's before both", local_rank() == 1);
}

// The table of state tensors against the pointers that state_point() sets and the sizes that megalodon.h gives.
static void test_state_tensors(void) {
    enum { B = 3 };
    StateTensor list[NUM_STATE_TENSORS];
    for (int whole_chunks = 0; whole_chunks < 2; whole_chunks++) {
        const size_t bytes = state_bytes(&config, B, whole_chunks);
        char *memory = allocate(bytes, 1);
        const State s = state_point(memory, &config, B, whole_chunks);
        const void *pointers[NUM_STATE_TENSORS] = {s.count, s.mean, s.m2, s.h, s.k, s.v};
        const size_t layers = (size_t)config.num_layers, G = (size_t)config.norm_num_groups;
        const size_t C = whole_chunks ? 0 : (size_t)config.chunk_size;
        const size_t elements[NUM_STATE_TENSORS] = {B,
                                                    (layers + 1) * B * G,
                                                    (layers + 1) * B * G,
                                                    layers * B * s.modes,
                                                    layers * B * C * (size_t)config.z_dim,
                                                    layers * B * C * (size_t)config.value_dim};
        bool placed = true, sized = true, apart = true;
        state_tensors(list, &config, B, whole_chunks);
        for (int i = 0; i < NUM_STATE_TENSORS; i++) {
            const void *wanted = elements[i] > 0 ? memory + list[i].offset : NULL;
            placed &= pointers[i] == wanted;
            sized &= list[i].bytes == elements[i] * list[i].element_size;
            apart &= i == 0 || list[i].offset >= list[i - 1].offset + list[i - 1].bytes;
        }
        const StateTensor *last = &list[NUM_STATE_TENSORS - 1];
        check_true("state_tensors: the pointers of state_point()", placed);
        check_true("  the sizes of megalodon.h", sized);
        check_true("  no overlap, and state_bytes() in all", apart && last->offset + last->bytes == bytes);
        free(memory);
    }
    Config huge = config;
    huge.num_layers = MAX_LAYERS, huge.chunk_size = huge.value_dim = huge.z_dim = MAX_DIM;
    check_true("state_bytes: SIZE_MAX if it overflows", state_bytes(&huge, MAX_ROWS, 0) == SIZE_MAX);
}

int main(void) {
    if (mkdtemp(folder) == NULL) fatal("/tmp: cannot make a folder");
    snprintf(path, sizeof path, "%s/file", folder);
    test_config();
    test_sampler();
    test_checkpoint();
    test_state();
    test_limits();
    test_local_rank();
    test_state_tensors();
    rmdir(folder);
    return check_done();
}
