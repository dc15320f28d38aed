// Configurations, data rows, the sampler, and checkpoints that must not load.
#define _GNU_SOURCE // string.h: memmem
#include <unistd.h> // defines: unlink, rmdir
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
    refuse_config("{}", "vocab_size");
    refuse_config("{\"vocab_size\": 9, \"layers\": 3}", "'layers'");
    refuse_config("{\"vocab_size\": 9, \"vocab_size\": 9}", "'vocab_size' twice");
    refuse_config("{\"vocab_size\": 9, \"dropout\": 1}", "dropout 1 is not in");
    refuse_config("{\"vocab_size\": 9, \"attention_dropout\": -0.1}", "attention_dropout -0.1 is not in");
    refuse_config("{\"vocab_size\": 9, \"init_mode\": \"zero\"}", "init_mode \"zero\" is none of he");
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

static void test_sampler(void) {
    const real logits[5] = {0, 1, 3, 2, -1};
    double p[5], sum = 0;
    int counts[5] = {0}, k2[5] = {0}, p9[5] = {0}, greedy = 1, k1 = 1;
    enum { DRAWS = 20000 };
    for (int i = 0; i < 5; i++) sum += p[i] = exp((double)logits[i] / 0.5);
    for (int64_t i = 0; i < DRAWS; i++) {
        double u = sample_uniform(3, i, 0);
        counts[sample_token(logits, 5, 0.5, 0, 1, u)]++;
        k2[sample_token(logits, 5, 1, 2, 1, u)]++;
        p9[sample_token(logits, 5, 1, 0, 0.9, u)]++; // 0.636 + 0.234 + 0.086 reach it
        greedy &= sample_token(logits, 5, 0, 0, 1, u) == 2;
        k1 &= sample_token(logits, 5, 1, 1, 1, u) == 2;
    }
    int close = 1;
    for (int i = 0; i < 5; i++)
        close &= fabs(counts[i] / (double)DRAWS - p[i] / sum) < 4 * sqrt(p[i] / sum / DRAWS) + 1e-9;
    check_true("sampler: draws follow softmax(logits / temperature)", close);
    check_true("sampler: temperature 0 and top-k 1 give the largest", greedy && k1);
    check_true("sampler: top-k 2", k2[2] + k2[3] == DRAWS && k2[3] > 0);
    check_true("sampler: top-p 0.9", p9[2] + p9[3] + p9[1] == DRAWS && p9[1] > 0);
    check_true("sampler: the ends of [0,1)",
               sample_token(logits, 5, 1, 0, 1, 0) == 0 && sample_token(logits, 5, 1, 0, 1, 1 - 0x1p-53) == 4);
}

// ----------------------------------------------------------------------------

// layers D Z E H F N C | V G | swiglu rescale_nffn scale_emb share_emb norm_affine
static const Config config = {2, 8, 4, 6, 1, 5, 2, 8, 11, 2, 1, 1, 0, 1, 1, 1e-5, 1e4, 0, 0, 0, HE};

static bool load(Model *model, const Config *c) {
    StFile f;
    err[0] = 0;
    bool ok = st_open(&f, path, err) && load_model(&f, model, c, err);
    if (f.file != NULL) st_close(&f);
    return ok;
}

// The good file with one number of a tensor replaced must be refused with the tensor's name.
static void refuse_value(Model *model, const char *good, size_t size, const char *name, const void *value, size_t n) {
    char *bad = malloc(size), line[128];
    StFile f;
    write_file(good, size);
    if (!st_open(&f, path, err)) fatal("%s", err);
    const StTensor *t = st_find(&f, name);
    memcpy(bad, good, size);
    if (t != NULL) memcpy(bad + f.data_start + t->end - n, value, n);
    st_close(&f);
    write_file(bad, size);
    snprintf(line, sizeof line, "refused: checkpoint with another value in %s", name);
    check_true(line, !load(model, &config) && strstr(err, name) != NULL);
    free(bad);
}

// The same with text of the header replaced by other text of the same length.
static void refuse_header(Model *model, const char *good, size_t size, const char *from, const char *to,
                          const char *reason) {
    char *bad = malloc(size), line[128], *at;
    memcpy(bad, good, size);
    at = memmem(bad, size, from, strlen(from));
    if (at != NULL) memcpy(at, to, strlen(to));
    write_file(bad, size);
    snprintf(line, sizeof line, "refused: checkpoint with %s for %s", to, from);
    check_true(line, at != NULL && !load(model, &config) && strstr(err, reason) != NULL);
    if (strstr(err, reason) == NULL) printf("    said '%s', expected '%s'\n", err, reason);
    free(bad);
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

    FILE *f = fopen(path, "rb");
    char *good = malloc(1 << 20);
    size = fread(good, 1, 1 << 20, f);
    fclose(f);
    refuse_value(b, good, size, "layers.1.mega.wv.weight", &nan, sizeof nan);
    refuse_value(b, good, size, "layers.0.mega.timenorm.prior_count", &count, sizeof count);
    refuse_value(b, good, size, "output.final_norm.prior_mean", &one, sizeof one);
    refuse_value(b, good, size, "layers.1.mega.timenorm.prior_logv", &one, sizeof one);
    refuse_value(b, good, size, "rope.freqs", &one, sizeof one);
    refuse_value(b, good, size, "output.output.weight", &one, sizeof one); // tied, but unlike the embedding
    refuse_header(b, good, size, "layers.1.mega.wr.bias", "layers.1.mega.wr.biaz",
                  "'layers.1.mega.wr.bias' is missing");
    refuse_header(b, good, size, "rope.freqs", "rope.fraqs", "'rope.fraqs' is none");
    refuse_header(b, good, size, "\"shape\":[8,6]", "\"shape\":[6,8]", "'layers.0.mega.wh2.weight' has shape (6, 8)");
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

int main(void) {
    if (mkdtemp(folder) == NULL) fatal("/tmp: cannot make a folder");
    snprintf(path, sizeof path, "%s/file", folder);
    test_config();
    test_sampler();
    test_checkpoint();
    rmdir(folder);
    return check_done();
}
