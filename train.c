// ./train: trains a Megalodon language model, or only measures one (--eval). Without arguments: a small model
// of bytes on the text in dev/data/demo.txt. In this order: settings; what is read before the first step; a step,
// validation, a sample; states and the log; memory plan and outputs; the loop over the steps; main.
#include <math.h>   // defines: NAN, cos, fmax, fmin, isfinite, log, pow, sqrt
#include <signal.h> // defines: sigaction
#include <stdlib.h> // defines: free, strtoll
#include <string.h> // defines: memmove, strcmp, strerror
#include <errno.h>  // defines: errno
#include <unistd.h> // defines: access
#include "plumbing/plumbing.h"

// ----------------------------------------------------------------------------
// settings

enum { MOST_SKIPPED = 3 }; // steps in a row whose loss or gradient is not finite; then the run ends

// clang-format off
typedef struct {
    Config config; // what the model flags say
    const char *preset, *config_file, *init, *resume, *data, *val_data, *batch, *schedule, *out, *log, *dump;
    const char *init_mode, *data_format, *tokenizer;
    const char *data_print, *val_data_print; // tokens_fingerprint() of both files, to notice that one has changed
    int batch_size, seq_len, grad_accum, eot, carry_state, recompute, threads, chunk_parallel, eval, overwrite;
    int64_t steps, warmup, seed, print_every, val_every, val_batches, sample_every, save_every;
    double lr, lr_init_ratio, lr_end_ratio, grad_clip;
    AdamW adamw;
} Settings;

static Settings s = {
    .batch_size = 8, .seq_len = 256, .grad_accum = 1, .eot = -1, .seed = 1, .chunk_parallel = 1, .data_format = "auto",
    .steps = 300, .lr = 3e-3, .schedule = "cosine", .warmup = 20, .lr_init_ratio = 1e-4, .lr_end_ratio = 0.1,
    .adamw = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1}, .grad_clip = 1,
    .print_every = 1, .val_every = 100, .val_batches = 20, .save_every = 1000,
};
static Settings recorded; // those of the run that --resume continues, before this command's flags

static Option options[] = {
    {OPT_HEADING, .help = "Model (a checkpoint brings its own)"},
    {OPT_TEXT, "preset", &s.preset, .arg = "NAME",
     .help = "demo, enwik8, mega200M, mega1.3B, mega1.3B_pg19, mega7.1B, mega7.3B, paper7B"},
    {OPT_PATH, "config", &s.config_file, .arg = "FILE.json", .help = "configuration, released field names"},
    {OPT_INT, "num-layers", &s.config.num_layers, 1, MAX_LAYERS, .help = "blocks"},
    {OPT_INT, "vocab-size", &s.config.vocab_size, 1, MAX_DIM, .help = "vocabulary size"},
    {OPT_INT, "model-dim", &s.config.model_dim, 1, MAX_DIM, .help = "width of the residual stream"},
    {OPT_INT, "num-heads", &s.config.num_heads, 1, MAX_DIM, .help = "attention heads"},
    {OPT_INT, "z-dim", &s.config.z_dim, 1, MAX_DIM, .help = "width of queries and keys, all heads together"},
    {OPT_INT, "value-dim", &s.config.value_dim, 1, MAX_DIM, .help = "width of values, all heads together"},
    {OPT_INT, "ffn-hidden-dim", &s.config.ffn_hidden_dim, 1, MAX_DIM, .help = "width inside the FFN"},
    {OPT_INT, "cema-ndim", &s.config.cema_ndim, 1, MAX_NDIM, .help = "modes of a channel's moving average"},
    {OPT_INT, "chunk-size", &s.config.chunk_size, 1, MAX_DIM, .help = "tokens of an attention chunk"},
    {OPT_INT, "norm-num-groups", &s.config.norm_num_groups, 1, MAX_DIM, .help = "groups of TimestepNorm"},
    {OPT_REAL, "norm-eps", &s.config.norm_eps, 1e-30, 1e30, .help = "added to variances"},
    {OPT_REAL, "rope-base", &s.config.rope_base, 1e-30, 1e30, .help = "base of the rotary frequencies"},
    {OPT_BOOL, "swiglu", &s.config.swiglu, .help = "gated FFN"},
    {OPT_BOOL, "rescale-nffn", &s.config.rescale_nffn, .help = "a scale on each channel of the FFN's output"},
    {OPT_BOOL, "scale-emb", &s.config.scale_emb, .help = "embedding times sqrt(model-dim)"},
    {OPT_BOOL, "share-emb", &s.config.share_emb, .help = "the output's weights are the embedding"},
    {OPT_BOOL, "norm-affine", &s.config.norm_affine, .help = "weights in RMSNorm and LayerNorm"},

    {OPT_REAL, "dropout", &s.config.dropout, 0, 0.999, .help = "of the embedding and of each sub-layer's output"},
    {OPT_REAL, "hidden-dropout", &s.config.hidden_dropout, 0, 0.999, .help = "inside the sub-layers"},
    {OPT_REAL, "attention-dropout", &s.config.attention_dropout, 0, 0.999, .help = "of the attention's probabilities"},
    {OPT_TEXT, "init-mode", &s.init_mode, .arg = "NAME", .help = "of linear weights: he, gaussian, xavier, bert (he)"},

    {OPT_HEADING, .help = "Data", .kept = true},
    {OPT_PATH, "data", &s.data, .arg = "FILE", .help = "raw bytes, or a .bin token file (dev/data/demo.txt)"},
    {OPT_PATH, "val-data", &s.val_data, .arg = "FILE", .help = "to validate on (the last tenth of --data)"},
    {OPT_TEXT, "data-format", &s.data_format, .arg = "NAME",
     .help = "of --data and --val-data: bytes; uint16, tokens without a header; auto: bytes, or .bin by its header"},
    {OPT_TEXT, "data-fingerprint", &s.data_print, .help = NULL},
    {OPT_TEXT, "val-data-fingerprint", &s.val_data_print, .help = NULL},
    {OPT_PATH, "batch", &s.batch, .arg = "FILE", .help = "train every step on the batch in this dump"},
    {OPT_INT, "batch-size", &s.batch_size, 1, 1 << 16, .help = "sequences of a batch"},
    {OPT_INT, "seq-len", &s.seq_len, 1, 1 << 28, .help = "tokens of a sequence"},
    {OPT_INT, "grad-accum", &s.grad_accum, 1, 1 << 14, .help = "batches of a step"},
    {OPT_INT, "eot", &s.eot, -1, MAX_DIM, .help = "token that ends a document: rows start where one starts; -1: none"},
    {OPT_SWITCH, "carry-state", &s.carry_state, .help = "rows continue where they ended in the step before"},

    {OPT_HEADING, .help = "Optimization", .kept = true},
    {OPT_INT64, "steps", &s.steps, 0, 1e9, .help = "updates in all, those before --resume included; 0: save at once"},
    {OPT_REAL, "lr", &s.lr, 0, 1e6, .help = "peak learning rate"},
    {OPT_TEXT, "schedule", &s.schedule, .arg = "NAME", .help = "after warm-up: constant, linear, cosine"},
    {OPT_INT64, "warmup", &s.warmup, 0, 1e9, .help = "steps of rising rate"},
    {OPT_REAL, "lr-init-ratio", &s.lr_init_ratio, 0, 1, .help = "rate of the first step, a multiple of --lr"},
    {OPT_REAL, "lr-end-ratio", &s.lr_end_ratio, 0, 1, .help = "rate after the last step, a multiple of --lr"},
    {OPT_REAL, "weight-decay", &s.adamw.weight_decay, 0, 1e6, .help = "of every parameter, times the rate"},
    {OPT_REAL, "beta1", &s.adamw.beta1, 0, 0.999999, .help = "AdamW's decay of the mean gradient"},
    {OPT_REAL, "beta2", &s.adamw.beta2, 0, 0.999999, .help = "AdamW's decay of the mean square"},
    {OPT_REAL, "eps", &s.adamw.eps, 1e-30, 1, .help = "AdamW's, added to the root of the mean square"},
    {OPT_REAL, "grad-clip", &s.grad_clip, 0, 1e30, .help = "clip the gradient's norm to this; 0: no clipping"},
    {OPT_INT64, "seed", &s.seed, 0, (double)INT64_MAX, .help = "of initial values, data order and samples"},
    {OPT_SWITCH, "recompute", &s.recompute, .help = "keep block inputs only: less memory, more time"},

    {OPT_HEADING, .help = "Reports", .kept = true},
    {OPT_INT64, "print-every", &s.print_every, 1, 1e9, .help = "steps between lines of progress"},
    {OPT_INT64, "val-every", &s.val_every, 0, 1e9, .help = "steps between validations (and at saves); 0: no"},
    {OPT_INT64, "val-batches", &s.val_batches, 0, 1e9, .help = "batches to validate on; 0: all"},
    {OPT_INT64, "sample-every", &s.sample_every, 0, 1e9, .help = "steps between samples; 0: one at the end"},
    {OPT_INT64, "save-every", &s.save_every, 0, 1e9, .help = "steps between checkpoints; 0: one at the end"},
    {OPT_PATH, "tokenizer", &s.tokenizer, .arg = "FILE", .help = "tokenizer.bin, to print samples as text"},
    {OPT_PATH, "log", &s.log, .arg = "FILE.csv", .help = "a row for every step"},

    {OPT_HEADING, .help = "This run"},
    {OPT_PATH, "init", &s.init, .arg = "FILE", .help = "start from a checkpoint, or a run's newest"},
    {OPT_PATH, "out", &s.out, .arg = "DIR", .help = "save here (out; nowhere with --batch or --dump)"},
    {OPT_SWITCH, "overwrite", &s.overwrite, .help = "replace the run that --out holds"},
    {OPT_PATH, "resume", &s.resume, .arg = "DIR", .help = "continue the run in DIR, with its own settings"},
    {OPT_SWITCH, "eval", &s.eval, .help = "only validate; writes nothing"},
    {OPT_PATH, "dump", &s.dump, .arg = "FILE", .help = "tensors of the last step, for ./compare"},
    {OPT_INT, "threads", &s.threads, 0, 1024, .help = "CPU threads; 0: one per core"},
    {OPT_INT, "chunk-parallel", &s.chunk_parallel, 1, 1 << 16, .help = "processes (mpirun's) that share each sequence"},
    {OPT_END, .help = NULL},
};
// clang-format on

typedef struct {
    Reader train, val;         // not with --batch
    int B, L;                  // of a batch; here and below, what this process has of it
    int32_t *inputs, *targets; // (grad_accum,B,L): a step's
    bool *fresh;               // (grad_accum,B): rows that begin without a past
    State **states;            // (grad_accum), with --carry-state
    double counted;            // positions of a step that have a target, of all processes
} Data;

static double count_targets(const int32_t *targets, int64_t n) {
    double counted = 0;
    for (int64_t i = 0; i < n; i++) counted += targets[i] >= 0;
    ranks_sum(&counted, 1);
    return counted;
}

// Cuts this process's part out of a whole batch (B,L), in place.
static void cut(int32_t *values) {
    const int64_t length = ranks.lengths[ranks.cp_rank];
    for (int64_t b = 0; b < ranks.rows; b++)
        memmove(values + b * length, values + (ranks.row + b) * s.seq_len + ranks.start,
                (size_t)length * sizeof *values);
}

static Reader open_reader(const Tokens *tokens, const char *purpose, int rows, bool carry) {
    Reader r = reader_new(tokens, purpose, (uint64_t)s.seed, rows, s.seq_len, s.eot, carry);
    r.batch = s.batch_size, r.row = ranks.row, r.here = ranks.rows;
    r.from = (int)ranks.start, r.length = (int)ranks.lengths[ranks.cp_rank];
    return r;
}

// ----------------------------------------------------------------------------
// before the first step, in the order of main(): everything that can be refused is refused before anything changes

static char resumed[PATH_SIZE]; // with --resume: the newest whole checkpoint's model

// Parses the command line. With --resume the run's own settings come first and those of the command line over them.
static void read_settings(int argc, char **argv) {
    static const char about[] =
        "usage: ./train [options]\n\nTrains a Megalodon language model. Without options: a small "
        "model of bytes on dev/data/demo.txt.\nDefaults in parentheses.\n";
    char err[ST_ERR];
    bool is_run;
    s.config = *find_preset("demo");
    options_parse(options, argc, argv, about);
    recorded = s;
    if (s.resume == NULL) return;
    const int64_t newest = run_newest(s.resume, &is_run);
    if (!is_run) fatal("--resume %s: holds no run", s.resume);
    if (newest < 0) fatal("--resume %s: every checkpoint is damaged", s.resume);
    run_model(resumed, s.resume, newest);
    char *text = run_read_options(s.resume);
    if (text == NULL) return;
    if (!options_read(options, text, err)) fatal("%s/options.txt: %s", s.resume, err);
    recorded = s;
    options_parse(options, argc, argv, about);
}

// What the flags alone show to be wrong.
static void check_settings(void) {
    DataFormat format;
    if (s.resume && (s.init || s.overwrite)) usage_error("--resume does not go with --init or --overwrite");
    if (s.resume && s.out && !same_file(s.out, s.resume)) usage_error("--out: --resume DIR saves to the same DIR");
    if (s.eval && s.resume && s.batch && !option_given(options, &s.batch)) {
        if (s.data == NULL && s.val_data == NULL)
            usage_error("--eval: the run in %s was trained on --batch %s; name a text with --data", s.resume, s.batch);
        s.batch = NULL;
    }
    if (s.eval && (s.out || s.overwrite || s.dump || option_given(options, &s.log)))
        usage_error("--eval does not go with --out, --overwrite, --dump, --log");
    if (strcmp(s.schedule, "constant") != 0 && strcmp(s.schedule, "linear") != 0 && strcmp(s.schedule, "cosine") != 0)
        usage_error("--schedule %s: it is constant, linear or cosine", s.schedule);
    if (!find_data_format(s.data_format, &format))
        usage_error("--data-format %s: it is auto, bytes or uint16", s.data_format);
    if (s.batch && (s.eval || s.data || s.val_data || s.eot >= 0 || s.carry_state))
        usage_error("--batch does not go with --data, --val-data, --eval, --eot, --carry-state");
    if (s.dump && s.steps == 0) usage_error("--dump: with --steps 0 there is no step to dump");
    if (s.eval || s.resume == NULL) return;
    if (s.seed != recorded.seed)
        usage_error("--seed %lld: the run in %s has seed %lld, and data and dropout masks follow from it; leave it out",
                    (long long)s.seed, s.resume, (long long)recorded.seed);
    if (s.carry_state != recorded.carry_state)
        usage_error("--carry-state: the run in %s was begun without it; start another one with --init %s --out DIR",
                    s.resume, s.resume);
    if (s.carry_state && (s.seq_len != recorded.seq_len || s.eot != recorded.eot))
        usage_error("--seq-len %d --eot %d: the run in %s carries states with --seq-len %d --eot %d; leave them out",
                    s.seq_len, s.eot, s.resume, recorded.seq_len, recorded.eot);
    if (s.carry_state && (s.batch_size != recorded.batch_size || s.grad_accum != recorded.grad_accum))
        usage_error("--batch-size %d --grad-accum %d: the run in %s carries the states of %d x %d rows; leave them out",
                    s.batch_size, s.grad_accum, s.resume, recorded.batch_size, recorded.grad_accum);
}

// The configuration: that of the checkpoint which --resume or --init names (left open in *file), and flags may not
// contradict it; otherwise the preset's, then --config's fields, then single flags.
static Config configure(StFile *file) {
    char err[ST_ERR];
    const char *owner = s.resume ? s.resume : s.init;
    const bool named = s.preset != NULL || s.config_file != NULL;
    Config asked = s.config_file && !s.preset ? config_defaults() : *find_preset(s.preset ? s.preset : "demo");
    if (s.config_file) claim_input("config", s.config_file), config_from_file(&asked, s.config_file);
    Config config = asked;
    if (owner != NULL && !checkpoint_open(file, &config, s.resume ? resumed : s.init)) {
        if (s.resume || !named)
            fatal("%s: says no configuration; %s", file->path,
                  s.resume ? "it is no checkpoint of ./train" : "give it with --config or --preset");
        owner = NULL;
    }
    if (s.init) claim_input("init", file->path);
    if (owner != NULL && named && !config_equal(&asked, &config))
        usage_error("--%s contradicts the configuration in %s; leave it out", s.preset ? "preset" : "config", owner);
    config_apply(&config, &s.config, options, owner);
    InitMode mode = config.init_mode;
    if (s.init_mode && !find_init_mode(s.init_mode, &mode))
        usage_error("--init-mode %s: it is he, gaussian, xavier or bert", s.init_mode);
    if (owner != NULL && mode != config.init_mode)
        usage_error("--init-mode contradicts the configuration in %s; leave it out", owner);
    config.init_mode = mode;
    if (!config_check(&config, err)) usage_error("the model's configuration: %s", err);
    if (s.eot >= config.vocab_size) usage_error("--eot %d: the vocabulary has %d tokens", s.eot, config.vocab_size);
    if (s.carry_state && s.seq_len % config.chunk_size != 0)
        usage_error("--carry-state: --seq-len %d is no multiple of --chunk-size %d", s.seq_len, config.chunk_size);
    return config;
}

// Opens a token file and notes its fingerprint. A run goes on with the data that it began with, unless the flag is
// given again.
static Tokens open_tokens(const char *flag, const char **path, const char **print, const char *recorded_print, int V) {
    DataFormat format;
    find_data_format(s.data_format, &format);
    claim_input(flag, *path);
    if (s.resume && !option_given(options, path) && access(*path, R_OK) != 0)
        fatal("%s: %s; the run was trained on it: bring it back, or name it with --%s", *path, strerror(errno), flag);
    const Tokens tokens = tokens_open_as(*path, V, format);
    char *now = allocate(FINGERPRINT_SIZE, 1);
    tokens_fingerprint(&tokens, now);
    if (s.resume && !s.eval && s.carry_state && recorded_print && strcmp(now, recorded_print) != 0)
        fatal("%s: is not the file that the run in %s carries states of (it had %s, this has %s)", *path, s.resume,
              recorded_print, now);
    if (s.resume && recorded_print && !option_given(options, path) && strcmp(now, recorded_print) != 0)
        fatal("%s: has changed since the run began (it had %s, it has %s); bring the old file back, or give --%s again "
              "to go on with this one",
              *path, recorded_print, now, flag);
    *print = now;
    return tokens;
}

// Opens the data and finds out which part of each batch this process has.
static Data open_data(const Config *c) {
    static char demo[PATH_SIZE];
    Data d = {0};
    if (s.batch != NULL) {
        claim_input("batch", s.batch);
        read_batch(s.batch, c->vocab_size, &d.B, &d.L, &d.inputs, &d.targets);
        if ((option_given(options, &s.batch_size) && s.batch_size != d.B) ||
            (option_given(options, &s.seq_len) && s.seq_len != d.L))
            usage_error("--batch-size or --seq-len contradicts --batch %s, which is %d x %d", s.batch, d.B, d.L);
        s.batch_size = d.B, s.seq_len = d.L;
    }
    ranks_deal(s.chunk_parallel, s.batch_size, s.seq_len, c->chunk_size);
    d.B = ranks.rows, d.L = (int)ranks.lengths[ranks.cp_rank];
    if (s.batch != NULL) {
        cut(d.inputs), cut(d.targets);
        d.counted = count_targets(d.targets, (int64_t)d.B * d.L) * s.grad_accum;
        if (d.counted == 0) fatal("--batch %s: every target is -1", s.batch);
        return d;
    }
    beside_executable(demo, sizeof demo, "dev/data/demo.txt");
    Tokens train = {0}, val = {0};
    if (!s.eval || s.val_data == NULL) {
        if (s.data == NULL) s.data = demo;
        train = open_tokens("data", &s.data, &s.data_print, recorded.data_print, c->vocab_size);
        size_t tenth = s.val_data ? 0 : train.count / 10;
        val = tokens_part(&train, train.count - tenth, tenth);
        train.count -= tenth;
    }
    if (s.val_data != NULL)
        val = open_tokens("val-data", &s.val_data, &s.val_data_print, recorded.val_data_print, c->vocab_size);
    d.train.tokens = train;
    if (!s.eval) d.train = open_reader(&train, "training", s.batch_size * s.grad_accum, s.carry_state);
    if (s.eval || s.val_every > 0) d.val = open_reader(&val, "validation", s.batch_size, false);
    return d;
}

static size_t batch_bytes(const Data *d) { // inputs, targets, fresh
    const size_t rows = (size_t)d->B * (size_t)s.grad_accum;
    return rows * ((size_t)d->L * 2 * sizeof(int32_t) + sizeof(bool));
}

static void allocate_batches(Data *d, const Config *c) {
    const size_t rows = (size_t)d->B * (size_t)s.grad_accum;
    if (s.batch != NULL) return;
    d->inputs = allocate(rows * (size_t)d->L, sizeof *d->inputs);
    d->targets = allocate(rows * (size_t)d->L, sizeof *d->targets);
    d->fresh = allocate(rows, sizeof *d->fresh);
    if (!s.carry_state || s.eval) return;
    d->states = allocate((size_t)s.grad_accum, sizeof(State *));
    for (int a = 0; a < s.grad_accum; a++) {
        if ((d->states[a] = state_new(c, d->B, 1)) == NULL) fatal("out of memory for the states of --carry-state");
    }
}

static size_t count_parameters(const Config *c) {
    size_t n = 0;
    free(megalodon_tensors(c, NULL, &n));
    return n;
}

// Have all processes the same settings, configuration, data and, once there is one, model? A thousand tokens and
// parameters stand for all of them.
static void agree(const Config *c, const Data *d, Model *model, int64_t step) {
    enum { SAMPLES = 1000 };
    if (ranks.size == 1) return;
    uint64_t hash = 14695981039346656037u; // FNV-1a
    char *text, *json = config_to_json(c);
    size_t length, size = count_parameters(c);
    FILE *f = open_memstream(&text, &length);
    if (f == NULL) fatal("out of memory");
    options_write(options, f);
    fprintf(f, "%s %d %d %d %d %d %lld", json, s.chunk_parallel, s.eval, s.dump != NULL, s.out != NULL,
            s.resume != NULL, (long long)step);
    for (int i = 0; i < 2; i++) {
        const Tokens *t = i == 0 ? &d->train.tokens : &d->val.tokens;
        fprintf(f, " %zu", t->count);
        for (size_t n = 0; n < SAMPLES && t->count > 0; n++)
            fprintf(f, " %d", token_at(t, n * (t->count - 1) / SAMPLES));
    }
    for (size_t n = 0; n < SAMPLES && model != NULL; n++) {
        real value;
        megalodon_read(model, PARAMS, n * (size - 1) / SAMPLES, 1, &value);
        fprintf(f, " %.9g", value);
    }
    if (fclose(f) != 0) fatal("out of memory");
    for (size_t i = 0; i < length; i++) hash = (hash ^ (unsigned char)text[i]) * 1099511628211u;
    if (!ranks_agree(hash))
        fatal("process %d of %d has other %s than the others", ranks.rank, ranks.size,
              model ? "parameters or another step" : "settings, configuration or data");
    free(text), free(json);
}

static void fill_model(Model *model, const Config *config) {
    int count;
    Tensor *tensors = megalodon_tensors(config, &count, NULL);
    if (tensors == NULL) fatal("out of memory");
    for (const Tensor *t = tensors; t < tensors + count; t++) {
        real *values = allocate(t->size, sizeof *values);
        megalodon_init(values, t, config, (uint64_t)s.seed);
        megalodon_write(model, PARAMS, t->offset, t->size, values);
        free(values);
    }
    free(tensors);
}

static double extra_bytes; // states and buffers, what a run takes besides the model

static void print_header(const Config *c, const Data *d, const MemoryPlan *p) {
    const double mib = 1048576, model = (double)p->params + (double)p->grads + (double)p->moments +
                                        (double)p->activations + (double)p->scratch;
    printf("backend     %s\n", megalodon_backend());
    printf("model       %d layers, model_dim %d, %d heads, z_dim %d, value_dim %d, ffn_hidden_dim %d%s, "
           "cema_ndim %d,\n"
           "            chunk_size %d, vocab_size %d, norm_num_groups %d%s%s%s%s\n",
           c->num_layers, c->model_dim, c->num_heads, c->z_dim, c->value_dim, c->ffn_hidden_dim,
           c->swiglu ? " swiglu" : "", c->cema_ndim, c->chunk_size, c->vocab_size, c->norm_num_groups,
           c->rescale_nffn ? ", rescale_nffn" : "", c->scale_emb ? ", scale_emb" : "",
           c->share_emb ? ", share_emb" : "", c->norm_affine ? "" : ", no norm_affine");
    printf("parameters  %zu\n", count_parameters(c));
    printf(
        "memory      %.1f MiB: parameters %.1f, gradients %.1f, moments %.1f, activations %.1f, scratch %.1f, states "
        "and buffers %.1f\n",
        (model + extra_bytes) / mib, (double)p->params / mib, (double)p->grads / mib, (double)p->moments / mib,
        (double)p->activations / mib, (double)p->scratch / mib, extra_bytes / mib);
    const Tokens *train = &d->train.tokens, *val = &d->val.tokens;
    if (s.batch)
        printf("data        %s, %d x %d tokens\n", s.batch, s.batch_size, s.seq_len);
    else
        printf("data        %s: %zu tokens to train on, %zu to validate\n", train->path ? train->path : val->path,
               train->count, val->count);
    if (s.eot >= 0) printf("documents   %zu to train on, %zu to validate\n", d->train.count, d->val.count);
    if (c->dropout > 0 || c->hidden_dropout > 0 || c->attention_dropout > 0)
        printf("dropout     %g, hidden %g, attention %g\n", c->dropout, c->hidden_dropout, c->attention_dropout);
    if (ranks.started)
        printf("processes   %d: %d groups of %d pieces; this one has %d sequences, %d tokens of each; %s\n", ranks.size,
               ranks.dp_size, ranks.cp_size, d->B, d->L,
               ranks.near == 1            ? "all goes through MPI"
               : ranks.near == ranks.size ? "all read each other's memory"
                                          : "those of a machine read each other's memory");
    printf("step        %d x %d x %d tokens, lr %g %s, seed %lld\n\n", s.grad_accum, s.batch_size, s.seq_len, s.lr,
           s.schedule, (long long)s.seed);
}

// ----------------------------------------------------------------------------
// training

// Of update k = 0, 1, ..: up from lr_init_ratio * lr during the warm-up, then down to lr_end_ratio * lr, which it has
// after the last step.
static double learning_rate(const Settings *x, int64_t k) {
    const double W = (double)x->warmup, i = x->lr_init_ratio, e = x->lr_end_ratio, pi = 3.14159265358979323846;
    if (k < x->warmup) return x->lr * (i + (double)k * (1 - i) / W);
    const double t = k < x->steps ? ((double)k - W) / ((double)x->steps - W) : 1;
    if (strcmp(x->schedule, "linear") == 0) return x->lr * (t * e + 1 - t);
    if (strcmp(x->schedule, "cosine") == 0) return x->lr * (e + (1 - e) * (1 + cos(pi * t)) / 2);
    return x->lr;
}

static ChunkParallel pieces; // of the sequences, see ranks_deal

static void join_pieces(Model *model, bool joined) {
    if (!megalodon_chunk_parallel(model, joined ? &pieces : NULL))
        fatal("out of memory for the states of %d pieces", pieces.cp_size);
}

// Gradients of the step's mean loss, summed over its batches and all processes. Returns the loss: this process's share.
static double accumulate(Model *model, Data *d, int64_t step) {
    const size_t batch = (size_t)d->B * (size_t)d->L;
    double sum = 0;
    int64_t counted;
    megalodon_zero_grad(model);
    if (s.batch == NULL) {
        reader_step(&d->train, step, d->inputs, d->targets, d->fresh);
        d->counted = count_targets(d->targets, (int64_t)batch * s.grad_accum);
    }
    for (int a = 0; a < s.grad_accum; a++) {
        const size_t first = s.batch == NULL ? (size_t)a * batch : 0;
        State *state = d->states ? d->states[a] : NULL;
        const DropoutKey draw = {.seed = (uint64_t)s.seed, .step = step, .row = (int64_t)a * s.batch_size + ranks.row};
        for (int b = 0; b < d->B && state != NULL; b++) {
            if (d->fresh[a * d->B + b]) state_reset(state, b);
        }
        megalodon_dropout(model, &draw);
        megalodon_forward(model, state, d->inputs + first, d->B, d->L);
        sum += megalodon_loss(model, d->targets + first, 1 / d->counted, &counted, NULL);
        megalodon_on_grad_ready(model, ranks.size > 1 && a == s.grad_accum - 1 ? ranks_sum_gradients : NULL);
        megalodon_backward(model);
    }
    megalodon_dropout(model, NULL);
    return sum / d->counted;
}

// The loss of the model as it is now, after the update, on the last batch that was read, from fresh states; not finite
// if the model has diverged.
static double loss_now(Model *model, const Data *d) {
    const size_t first = s.batch == NULL ? (size_t)(s.grad_accum - 1) * (size_t)d->B * (size_t)d->L : 0;
    int64_t counted;
    megalodon_forward(model, NULL, d->inputs + first, d->B, d->L);
    double loss = megalodon_loss(model, d->targets + first, 0, &counted, NULL);
    ranks_sum(&loss, 1);
    return isnan(loss) ? NAN : loss; // without the sign that a NaN may have
}

// After a step that was not finite its states may not be, either: rows begin anew.
static void forget(Data *d) {
    for (int a = 0; a < s.grad_accum && d->states != NULL; a++) {
        for (int b = 0; b < d->B; b++) state_reset(d->states[a], b);
    }
}

// The mean loss of the validation windows, printed.
static double validate(Model *model, const Data *d) {
    double sums[2] = {0}; // of losses, of positions
    int64_t counted;
    size_t windows = 0;
    Cursor cursor = {0};
    for (int64_t i = 0; i < s.val_batches || s.val_batches == 0; i++) {
        const int all = read_windows(&d->val, &cursor, s.batch_size, d->inputs, d->targets);
        const int rows = all - ranks.row < d->B ? all - ranks.row : d->B; // the last batch may have none for this one
        if (all == 0) break;
        windows += (size_t)all;
        if (rows <= 0) continue;
        megalodon_forward(model, NULL, d->inputs, rows, d->L);
        sums[0] += megalodon_loss(model, d->targets, 0, &counted, NULL);
        sums[1] += (double)counted;
    }
    ranks_sum(sums, 2);
    const double loss = sums[0] / sums[1];
    printf("val loss %.6f nats = %.6f bits per %s | %zu windows of %d\n", loss, loss / log(2),
           d->val.tokens.width == 1 ? "byte" : "token", windows, s.seq_len);
    return loss;
}

// Writes what the model makes of the EOT, of a newline, or of the first token of the data. Tokens are bytes, text of the
// tokenizer, or else numbers.
static void write_sample(Model *model, State *state, const Data *d, int V, const Tokenizer *tokenizer) {
    enum { LENGTH = 256 };
    const Sampling how = {.temperature = 0.9, .top_p = 0.95};
    const bool bytes = d->train.tokens.width == 1 || (V <= 512 && s.eot >= 256), text = tokenizer || bytes;
    const int drawn = text && tokenizer_count(tokenizer) < V ? tokenizer_count(tokenizer) : V; // not the padding
    const int start = s.eot >= 0 ? s.eot : bytes ? '\n' : token_at(&d->train.tokens, 0);
    int32_t token = start < V ? start : 0;
    real *logits = allocate((size_t)V, sizeof *logits);
    state_reset(state, 0);
    join_pieces(model, false); // one token is whole
    printf("----\n");
    for (int64_t i = 0; i < LENGTH; i++) {
        size_t length;
        megalodon_forward(model, state, &token, 1, 1);
        megalodon_logits(model, 0, 1, logits);
        token = sample_token(logits, drawn, &how, sample_uniform((uint64_t)s.seed, i, 0));
        const unsigned char *piece = text ? tokenizer_piece(tokenizer, token, i == 0, &length) : NULL;
        const bool control = !tokenizer && (token < 32 || token == 127) && token != '\n' && token != '\t';
        if (!text)
            printf("%d ", token);
        else if (control)
            putchar('?');
        else
            fwrite(piece, 1, length, stdout);
    }
    printf("\n----\n");
    join_pieces(model, true);
    free(logits);
}

// ----------------------------------------------------------------------------
// states and the log

// With --carry-state, the states of all processes together, in the first one: (grad_accum), of batch_size rows. All
// pieces of a sequence have the same state, so a group's first one speaks for it. A process alone has them already.
static State **gather_states(const Data *d, const Config *c) {
    if (ranks.size == 1) return d->states;
    State **all = allocate((size_t)s.grad_accum, sizeof *all);
    for (int a = 0; a < s.grad_accum; a++) {
        const size_t bytes = d->states[a]->bytes;
        void *memory = allocate(bytes, 1);
        State *part = state_new(c, d->B, 1);
        if ((all[a] = state_new(c, s.batch_size, 1)) == NULL || part == NULL) fatal("out of memory for the states");
        for (int g = 0; g < ranks.dp_size; g++) {
            state_read(d->states[a], 0, bytes, memory);
            ranks_fetch(memory, memory, bytes, g * ranks.cp_size);
            state_write(part, 0, bytes, memory);
            for (int b = 0; b < d->B; b++) state_copy(part, b, all[a], g * d->B + b, c);
        }
        state_free(part);
        free(memory);
    }
    return all;
}

static void free_states(State **states) {
    for (int a = 0; a < s.grad_accum && states != NULL; a++) state_free(states[a]);
    free(states);
}

// Bytes of the states of --carry-state, with the copies that gather_states makes.
static double carried_bytes(const Data *d, const Config *c) {
    if (!s.carry_state || s.eval) return 0;
    const double own = (double)state_bytes(c, d->B, 1), all = (double)state_bytes(c, s.batch_size, 1);
    return s.grad_accum * own + (ranks.size > 1 ? s.grad_accum * all + 2 * own : 0);
}

static void save(const char *out, Model *model, const Data *d, const Config *c, int64_t step, double val_loss,
                 bool stopped_here) {
    State **states = d->states ? gather_states(d, c) : NULL;
    run_save(out, model, states, states ? s.grad_accum : 0, c, s.seed, step, val_loss, stopped_here);
    if (states != d->states) free_states(states);
}

// Takes up the run in DIR; each process its rows of the states.
static int64_t load(const char *dir, Model *model, const Data *d, const Config *c) {
    State **states = d->states ? gather_states(d, c) : NULL;
    const int64_t step = run_load(dir, model, states, states ? s.grad_accum : 0, c, s.seed);
    if (states == d->states) return step;
    for (int a = 0; a < s.grad_accum; a++) {
        for (int b = 0; b < d->B; b++) state_copy(states[a], ranks.row + b, d->states[a], b, c);
    }
    free_states(states);
    return step;
}

static const char log_header[] = "step,loss,grad_norm,lr,ms,tokens_per_s,val_loss\n";

static bool is_log(const char *path) {
    char line[512] = "";
    FILE *f = fopen(path, "r");
    const bool ok = f != NULL && fgets(line, sizeof line, f) != NULL && strcmp(line, log_header) == 0;
    if (f != NULL) fclose(f);
    return ok;
}

static const char *log_path; // s.log, or the file that it links to

// The log, under its temporary name, with the rows of the steps before `step` that an earlier part of this run wrote.
static FILE *prepare_log(int64_t step) {
    char line[512] = "", tmp[PATH_SIZE];
    FILE *old = step > 0 ? fopen(log_path, "r") : NULL;
    snprintf(tmp, sizeof tmp, "%s.tmp", log_path);
    FILE *file = fopen(tmp, "w");
    if (file == NULL) fatal("--log %s: cannot write: %s", tmp, strerror(errno));
    remove_if_refused(tmp);
    fputs(log_header, file);
    if (old != NULL && fgets(line, sizeof line, old) == NULL) line[0] = 0; // its header
    while (old != NULL && fgets(line, sizeof line, old) != NULL) {
        if (strtoll(line, NULL, 10) <= step && strchr(line, '\n') != NULL) fputs(line, file); // whole rows only
    }
    if (fflush(file) != 0 || ferror(file)) fatal("--log %s: %s", tmp, strerror(errno)); // the old one is as it was
    if (old != NULL) fclose(old);
    return file;
}

static void begin_log(void) {
    char tmp[PATH_SIZE];
    snprintf(tmp, sizeof tmp, "%s.tmp", log_path);
    if (rename(tmp, log_path) != 0) fatal("--log %s: %s", log_path, strerror(errno));
}

// A whole step in the log. False if it could not be written.
static bool log_step(FILE *file, int64_t step, double loss, double norm, double lr, double time, double speed,
                     double val_loss) {
    fprintf(file, "%lld,%.9g,%.9g,%.9g,%.9g,%.9g,", (long long)step, loss, norm, lr, time * 1e3, speed);
    if (!isnan(val_loss)) fprintf(file, "%.9g", val_loss);
    return fputc('\n', file) != EOF && fflush(file) == 0;
}

// ----------------------------------------------------------------------------
// memory plan and outputs, then the loop over the steps

static volatile sig_atomic_t stopped; // the signal that asks to finish, 0 until then
static void on_signal(int number) { stopped = number; }

// What the run will take, refused if there is less memory: nothing large is allocated before.
static MemoryPlan plan_memory(const Config *c, Mode mode, const Data *d) {
    const bool samples = !s.eval && !s.batch;
    const double V = c->vocab_size, largest = V * c->model_dim; // initial values are drawn a tensor at a time
    const double states = carried_bytes(d, c) + (samples ? (double)state_bytes(c, 1, 0) : 0);
    const double host = (double)batch_bytes(d) + (double)reader_bytes(&d->train) + (double)reader_bytes(&d->val) +
                        fmax(fmax(samples ? V * sizeof(real) + (double)sample_bytes(c->vocab_size) : 0,
                                  s.init || s.resume ? 0 : largest * sizeof(real)),
                             s.dump ? (double)dump_bytes(c, d->B, d->L) : 0);
    const double most = (double)(SIZE_MAX / 4);
    extra_bytes = states + host;
    return check_memory(c, mode, d->B, d->L, (size_t)fmin(states, most), (size_t)fmin(host, most));
}

// Locks the run's directory and claims all that will be written.
static void claim_outputs(const char *out) {
    if (s.tokenizer) claim_input("tokenizer", s.tokenizer);
    if (ranks.rank > 0) return;
    if (out) run_claim(out, s.resume != NULL, s.overwrite);
    if (out && s.log) run_refuse_inside(out, "log", s.log);
    if (out && s.dump) run_refuse_inside(out, "dump", s.dump);
    if (s.log && !s.eval) log_path = claim_output("log", s.log, "a log of ./train", is_log);
    if (s.dump) s.dump = claim_output("dump", s.dump, "a dump of ./train", is_dump);
    if (out) options_refuse_lines(options);
}

// A model that computes no finite loss, on the first tokens of the data, is not worth a run or a checkpoint.
static void refuse_diverged(Model *model, Data *d) {
    const size_t n = (size_t)d->B * (size_t)d->L * (size_t)s.grad_accum, there = d->train.tokens.count;
    for (size_t i = 0; i < n && s.batch == NULL; i++) {
        d->inputs[i] = token_at(&d->train.tokens, i % there);
        d->targets[i] = token_at(&d->train.tokens, (i + 1) % there);
    }
    const double loss = loss_now(model, d);
    if (!isfinite(loss))
        fatal("%s%s: the model's loss is %g; start from another checkpoint or --init-mode", s.init ? "--init " : "",
              s.init ? s.init : "the initial values", loss);
}

// Says how the learning rate differs from what the run's settings so far would give, and which settings changed.
static void print_new_rate(int64_t step) {
    const double before = learning_rate(&recorded, step), now = learning_rate(&s, step);
    const struct {
        const char *name;
        double now, before;
    } settings[] = {{"--steps", (double)s.steps, (double)recorded.steps},
                    {"--lr", s.lr, recorded.lr},
                    {"--warmup", (double)s.warmup, (double)recorded.warmup},
                    {"--lr-init-ratio", s.lr_init_ratio, recorded.lr_init_ratio},
                    {"--lr-end-ratio", s.lr_end_ratio, recorded.lr_end_ratio}};
    if (before == now || step >= s.steps) return;
    printf("schedule    the next learning rate is %.2e; with the run's settings so far it would be %.2e (", now,
           before);
    const char *separator = "";
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++) {
        if (settings[i].now == settings[i].before) continue;
        printf("%s%s %g, was %g", separator, settings[i].name, settings[i].now, settings[i].before);
        separator = "; ";
    }
    if (strcmp(s.schedule, recorded.schedule) != 0)
        printf("%s--schedule %s, was %s", separator, s.schedule, recorded.schedule);
    printf(")\n");
}

static void print_step(int64_t step, double loss, double norm, double lr, double time, double positions, double counted,
                       int64_t skipped) {
    printf("step %5lld/%lld | loss %.4f | norm %.3f | lr %.2e | %.1f ms | %.1fk tok/s", (long long)step,
           (long long)s.steps, loss, norm, lr, time * 1e3, positions / time / 1e3);
    if (s.eot >= 0 || s.carry_state) printf(" | %.0f%% ignored", 100 - 100 * counted / positions);
    if (skipped > 0) printf(" | not finite: skipped, %lld so far", (long long)skipped);
    printf("\n");
}

// The checkpoint of the model as it is now, unless it has diverged: then the older ones stay, and this is an error.
static void save_if_finite(const char *out, Model *model, const Data *d, const Config *c, int64_t step, double val_loss,
                           bool stopped_here) {
    const double loss = loss_now(model, d);
    if (isfinite(loss) && (isnan(val_loss) || isfinite(val_loss))) {
        save(out, model, d, c, step, val_loss, stopped_here);
        return;
    }
    bool is_run;
    const int64_t newest = run_newest(out, &is_run);
    char kept[64] = "no checkpoint was saved before";
    if (newest >= 0) snprintf(kept, sizeof kept, "the newest checkpoint is that of step %lld", (long long)newest);
    fatal(
        "step %lld: the model has diverged (its loss is %g) and is not saved; in %s %s. What helps: a smaller --lr, a "
        "longer --warmup, --grad-clip 1",
        (long long)step, loss, out, kept);
}

// Trains from step `step` on, to the last one or to a signal. Returns the number of steps done. *failed: the log or the
// dump could not be written.
static int64_t train(Model *model, State *state, Data *d, const Config *c, const Tokenizer *tokenizer, const char *out,
                     FILE *log_file, int64_t step, bool *failed) {
    const double positions = (double)s.batch_size * s.seq_len * s.grad_accum;
    const int64_t begun = step;
    int64_t skipped = 0;
    int skipped_now = 0; // in a row
    bool halt = false;   // at the end of this step
    while (step < s.steps && !halt) {
        const double start = seconds(), lr = learning_rate(&s, step);
        double sums[3] = {accumulate(model, d, step)};
        sums[1] = pow(megalodon_grad_norm(model), 2), sums[2] = stopped != 0 || *failed;
        ranks_sum(sums, 3);
        const double loss = isnan(sums[0]) ? NAN : sums[0], norm = isnan(sums[1]) ? NAN : sqrt(sums[1]);
        halt = sums[2] > 0;
        const bool good = isfinite(loss) && isfinite(norm);
        skipped += !good, skipped_now = good ? 0 : skipped_now + 1;
        if (skipped_now == MOST_SKIPPED)
            fatal(
                "step %lld: loss %g, gradient norm %g, and so the %d steps before it: nothing was saved after the last "
                "checkpoint. What helps: a smaller --lr, a longer --warmup, --grad-clip 1",
                (long long)step + 1, loss, norm, MOST_SKIPPED - 1);
        if (s.dump && step + 1 == s.steps) {
            char err[ST_ERR];
            const size_t last = s.batch == NULL ? (size_t)(s.grad_accum - 1) * (size_t)d->B * (size_t)d->L : 0;
            if (!write_dump(s.dump, model, c, d->inputs + last, d->targets + last, d->B, d->L, loss, err)) {
                fprintf(stderr, "error: --dump %s\n", err); // the step is still to be saved
                *failed = true;
            }
        }
        const double scale = s.grad_clip > 0 ? fmin(1, s.grad_clip / (norm + 1e-6)) : 1;
        if (good) {
            megalodon_update(model, &s.adamw, lr, scale, step);
            ranks_share_params(model);
        } else {
            forget(d);
        }
        step++;
        const double time = seconds() - start;
        const bool last = step == s.steps;
        if (step % s.print_every == 0 || step == begun + 1 || last || halt || !good)
            print_step(step, loss, norm, lr, time, positions, d->counted, good ? 0 : skipped);

        // A signal changes nothing of what this step does; it only adds a checkpoint if the step saves none.
        const bool scheduled = last || (good && s.save_every > 0 && step % s.save_every == 0);
        double val_loss = NAN;
        if (!s.batch && s.val_every > 0 && (last || (out && scheduled) || step % s.val_every == 0))
            val_loss = validate(model, d);
        if (log_file != NULL && !*failed &&
            !log_step(log_file, step, loss, norm, lr, time, positions / time, val_loss)) {
            fprintf(stderr, "error: --log %s: %s; the run stops after the next step\n", s.log, strerror(errno));
            *failed = true;
        }
        if (out && (scheduled || halt)) save_if_finite(out, model, d, c, step, val_loss, !scheduled);
        if (!s.batch && !halt && ranks.rank == 0 && (last || (s.sample_every > 0 && step % s.sample_every == 0)))
            write_sample(model, state, d, c->vocab_size, tokenizer);
        fflush(stdout);
    }
    return step;
}

int main(int argc, char **argv) {
    guard_streams();
    ranks_start();
    if (!ranks.started) settle_threads(argv); // mpirun says where its processes run
    signal(SIGPIPE, SIG_IGN);                 // nobody reads the progress any more: no reason to lose the run

    // 1. flags
    read_settings(argc, argv);
    check_settings();
    if (s.threads > 0) megalodon_threads(s.threads);

    // 2. headers
    StFile init = {0};
    const Config config = configure(&init);
    Tokenizer *tokenizer = s.tokenizer ? tokenizer_open(s.tokenizer, config.vocab_size) : NULL;
    Data data = open_data(&config);
    agree(&config, &data, NULL, 0);

    // 3. memory
    const Mode mode = s.eval ? MEGALODON_INFER : s.recompute ? MEGALODON_RECOMPUTE : MEGALODON_TRAIN;
    megalodon_set_shard(ranks.part, ranks.size);
    const MemoryPlan plan = plan_memory(&config, mode, &data);

    // 4. outputs: locked, and checked to be writable, but not changed yet
    const char *out = s.eval ? NULL : s.resume ? s.resume : s.out ? s.out : s.batch || s.dump ? NULL : "out";
    claim_outputs(out);

    // 5. the model
    allocate_batches(&data, &config);
    Model *model = megalodon_new(&config, mode, data.B, data.L);
    State *state = s.eval || s.batch ? NULL : state_new(&config, 1, 0); // for samples
    if (model == NULL || (state == NULL && !s.eval && !s.batch)) fatal("out of memory");
    ranks_open(model, &config);
    pieces = (ChunkParallel){.cp_rank = ranks.cp_rank, .cp_size = ranks.cp_size, .lengths = ranks.lengths, .gather = ranks_gather};
    join_pieces(model, true);
    print_header(&config, &data, &plan);
    int64_t step = 0;
    if (s.resume && !s.eval) {
        st_close(&init);
        step = load(s.resume, model, &data, &config);
    } else if (s.resume || s.init) {
        checkpoint_load(&init, model, &config);
    } else {
        fill_model(model, &config);
    }
    agree(&config, &data, model, step);
    if (s.resume && !s.eval) print_new_rate(step);
    const bool nothing_left = !s.eval && s.resume && step >= s.steps;
    if (nothing_left && s.dump) usage_error("--dump: --steps %lld leaves no step to dump", (long long)s.steps);
    if (!s.eval && !nothing_left && (s.init || s.steps == 0)) refuse_diverged(model, &data);
    if (nothing_left)
        printf("step %lld of %lld: nothing left to do; --steps is the total\n", (long long)step, (long long)s.steps);

    // 6. nothing is refused any more; from here on a signal ends the run after a step, and a second one at once
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)(SA_RESETHAND | SA_RESTART)};
    if (!s.eval) sigaction(SIGINT, &action, NULL), sigaction(SIGTERM, &action, NULL);
    FILE *log_file = s.log && !s.eval && !nothing_left && ranks.rank == 0 ? prepare_log(step) : NULL;
    if (out != NULL && ranks.rank == 0 && !nothing_left) run_begin(out, options, s.overwrite);
    keep_created();
    if (log_file != NULL) begin_log();

    const double begin = seconds();
    bool failed = false;
    if (s.eval && !isfinite(validate(model, &data))) fatal("the validation loss is not finite");
    if (!s.eval && s.steps == 0 && !nothing_left) {
        const double val_loss = !s.batch && s.val_every > 0 ? validate(model, &data) : NAN;
        if (out) save_if_finite(out, model, &data, &config, 0, val_loss, false);
    }
    if (!s.eval) step = train(model, state, &data, &config, tokenizer, out, log_file, step, &failed);
    const bool halted = !s.eval && step < s.steps;
    if (!s.eval)
        printf("%s at step %lld after %.1f s, peak memory %.0f MiB%s%s%s%s\n", halted ? "stopped" : "done",
               (long long)step, seconds() - begin, (double)megalodon_peak_memory() / 1048576, out ? "; saved in " : "",
               out ? out : "", halted && out ? "; continue with --resume " : "", halted && out ? out : "");
    if (ranks.started)
        printf("process 0: %lld collective operations, %lld bytes sent\n", (long long)ranks.exchanges,
               (long long)ranks.bytes);
    if (log_file != NULL) fclose(log_file);
    if ((fflush(stdout) != 0 || ferror(stdout)) && s.eval) fatal("stdout: the result could not be written");
    free_states(data.states);
    reader_free(&data.train), reader_free(&data.val);
    free(data.inputs), free(data.targets), free(data.fresh), free(ranks.lengths);
    ranks_close();
    megalodon_free(model);
    state_free(state);
    if (tokenizer) tokenizer_free(tokenizer);
    if (failed) return 1;
    return halted ? 128 + (stopped ? stopped : SIGTERM) : 0;
}
