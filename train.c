// ./train: trains a Megalodon language model, or only measures one (--eval). Without arguments: a small byte-level
// model on the text in dev/data/shakespeare.txt.
//
// In this order: settings; the phases of main before the first step; a step; validation, samples and checkpoints; the
// loop over the steps; main.
#include <math.h>   // defines: NAN, cos, fmax, fmin, isfinite, log, pow, sqrt
#include <signal.h> // defines: sigaction
#include <stdlib.h> // defines: free, strtoll
#include <string.h> // defines: memmove, strcmp, strerror
#include <errno.h>  // defines: errno
#include <unistd.h> // defines: access
#include "plumbing/plumbing.h"

// ----------------------------------------------------------------------------
// settings

enum { MAX_SKIPPED = 3 }; // the run ends after so many steps in a row whose loss or gradient is not finite

// clang-format off
typedef struct {
    Config config; // fields that model options set
    const char *preset, *config_file, *init, *resume, *data, *val_data, *batch, *schedule, *out, *log, *dump;
    const char *data_format, *tokenizer, *segment_len;
    const char *data_print, *val_data_print; // tokens_fingerprint() of both files, to detect changes
    int batch_size, grad_accum, eot, carry_state, recompute, threads, chunk_parallel, eval, overwrite;
    int64_t seq_len, steps, warmup, seed, print_every, val_every, val_batches, sample_every, save_every;
    double lr, lr_init_ratio, lr_end_ratio, grad_clip;
    AdamW adamw;
} Settings;

static Settings s = {
    .batch_size = 4, .seq_len = 256, .grad_accum = 1, .eot = -1, .seed = 1, .chunk_parallel = 1, .data_format = "auto",
    .steps = 700, .lr = 3e-3, .schedule = "cosine", .warmup = 20, .lr_init_ratio = 1e-4, .lr_end_ratio = 0.1,
    .adamw = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1}, .grad_clip = 1,
    .val_every = 100, .val_batches = 20, .sample_every = 100, .save_every = 1000,
};
static Settings recorded; // those of the run that --resume continues, without the options of this command

static Option options[] = {
    {OPT_HEADING, .help = "Model (a checkpoint brings its own)"},
    {OPT_TEXT, "preset", &s.preset, .arg = "NAME",
     .help = "demo, enwik8, mega200M, mega1.3B, mega1.3B_pg19, mega7.1B, mega7.3B, paper7B"},
    {OPT_PATH, "config", &s.config_file, .arg = "FILE.json", .help = "configuration, released field names"},
    {OPT_INT, "num-layers", &s.config.num_layers, 1, MAX_LAYERS, .help = "number of layers"},
    {OPT_INT, "vocab-size", &s.config.vocab_size, 1, MAX_DIM, .help = "vocabulary size"},
    {OPT_INT, "model-dim", &s.config.model_dim, 1, MAX_DIM, .help = "width of the residual stream"},
    {OPT_INT, "num-heads", &s.config.num_heads, 1, MAX_DIM, .help = "number of attention heads"},
    {OPT_INT, "z-dim", &s.config.z_dim, 1, MAX_DIM, .help = "width of queries and keys, summed over heads"},
    {OPT_INT, "value-dim", &s.config.value_dim, 1, MAX_DIM, .help = "width of values, summed over heads"},
    {OPT_INT, "ffn-hidden-dim", &s.config.ffn_hidden_dim, 1, MAX_DIM, .help = "width inside the FFN"},
    {OPT_INT, "cema-ndim", &s.config.cema_ndim, 1, MAX_NDIM, .help = "CEMA modes of each channel"},
    {OPT_INT, "chunk-size", &s.config.chunk_size, 1, MAX_DIM, .help = "tokens in an attention chunk"},
    {OPT_INT, "norm-num-groups", &s.config.norm_num_groups, 1, MAX_DIM, .help = "channel groups of TimestepNorm"},
    {OPT_REAL, "norm-eps", &s.config.norm_eps, 1e-30, 1e30, .help = "epsilon, added to variances"},
    {OPT_REAL, "rope-base", &s.config.rope_base, 1e-30, 1e30, .help = "base of the rotary frequencies"},
    {OPT_BOOL, "swiglu", &s.config.swiglu, .help = "gated FFN"},
    {OPT_BOOL, "rescale-nffn", &s.config.rescale_nffn, .help = "learned scale for each channel of the FFN's output"},
    {OPT_BOOL, "scale-emb", &s.config.scale_emb, .help = "multiply the embedding by sqrt(model-dim)"},
    {OPT_BOOL, "share-emb", &s.config.share_emb, .help = "tie the output weights to the embedding"},
    {OPT_BOOL, "norm-affine", &s.config.norm_affine, .help = "learned weights in RMSNorm and LayerNorm"},

    {OPT_REAL, "dropout", &s.config.dropout, 0, 0.999, .help = "of the embedding and of the output of each sub-layer"},
    {OPT_REAL, "hidden-dropout", &s.config.hidden_dropout, 0, 0.999, .help = "inside the sub-layers"},
    {OPT_REAL, "attention-dropout", &s.config.attention_dropout, 0, 0.999, .help = "of the attention probabilities"},
    {OPT_CHOICE, "init-mode", &s.config.init_mode, .arg = INIT_MODES,
     .help = "linear weights: he, gaussian, xavier, bert"},
    {OPT_CHOICE, "cema", &s.config.cema, .arg = CEMA_KINDS, .help = "complex; real: an average that only decays; none"},
    {OPT_CHOICE, "timestep-norm", &s.config.timestep_norm, .arg = NORM_KINDS,
     .help = "timestep; layer: LayerNorm of each token instead"},
    {OPT_CHOICE, "attention", &s.config.attention, .arg = ATTENTION_KINDS,
     .help = "normalized; standard: queries and keys have no norm"},
    {OPT_CHOICE, "two-hop", &s.config.two_hop, .arg = TWO_HOP_KINDS,
     .help = "on; off: the FFN's residual is its own input"},

    {OPT_HEADING, .help = "Data", .kept = true},
    {OPT_PATH, "data", &s.data, .arg = "FILE", .help = "raw bytes, or a .bin token file (dev/data/shakespeare.txt)"},
    {OPT_PATH, "val-data", &s.val_data, .arg = "FILE", .help = "validation data (the last tenth of --data)"},
    {OPT_TEXT, "data-format", &s.data_format, .arg = "NAME",
     .help = "of --data and --val-data: bytes; uint16 tokens without a header; auto: .bin by its header, else bytes"},
    {OPT_TEXT, "data-fingerprint", &s.data_print, .help = NULL},
    {OPT_TEXT, "val-data-fingerprint", &s.val_data_print, .help = NULL},
    {OPT_PATH, "batch", &s.batch, .arg = "FILE", .help = "train every step on the batch in this dump"},
    {OPT_INT, "batch-size", &s.batch_size, 1, 1 << 16, .help = "sequences per batch"},
    {OPT_INT64, "seq-len", &s.seq_len, 1, (double)((int64_t)1 << 40), .help = "tokens per sequence"},
    {OPT_INT, "grad-accum", &s.grad_accum, 1, 1 << 14, .help = "batches per step"},
    {OPT_INT, "eot", &s.eot, -1, MAX_DIM, .help = "token that ends a document; rows start at documents; -1: none"},
    {OPT_SWITCH, "carry-state", &s.carry_state, .help = "rows continue where they ended in the previous step"},

    {OPT_HEADING, .help = "Optimization", .kept = true},
    {OPT_INT64, "steps", &s.steps, 0, 1e9,
     .help = "total number of updates, including those before --resume; 0: save the initial model"},
    {OPT_REAL, "lr", &s.lr, 0, 1e6, .help = "peak learning rate"},
    {OPT_TEXT, "schedule", &s.schedule, .arg = "NAME", .help = "after warm-up: constant, linear, cosine"},
    {OPT_INT64, "warmup", &s.warmup, 0, 1e9, .help = "steps of linear warm-up"},
    {OPT_REAL, "lr-init-ratio", &s.lr_init_ratio, 0, 1, .help = "learning rate of the first step, relative to --lr"},
    {OPT_REAL, "lr-end-ratio", &s.lr_end_ratio, 0, 1, .help = "learning rate after the last step, relative to --lr"},
    {OPT_REAL, "weight-decay", &s.adamw.weight_decay, 0, 1e6, .help = "of every parameter, times the learning rate"},
    {OPT_REAL, "beta1", &s.adamw.beta1, 0, 0.999999, .help = "AdamW, decay of the first moment"},
    {OPT_REAL, "beta2", &s.adamw.beta2, 0, 0.999999, .help = "AdamW, decay of the second moment"},
    {OPT_REAL, "eps", &s.adamw.eps, 1e-30, 1, .help = "AdamW, added to the root of the second moment"},
    {OPT_REAL, "grad-clip", &s.grad_clip, 0, 1e30, .help = "maximum L2 norm of the gradient; 0: no clipping"},
    {OPT_INT64, "seed", &s.seed, 0, (double)INT64_MAX, .help = "of initial values, data order, dropout and samples"},
    {OPT_SWITCH, "recompute", &s.recompute, .help = "keep only the inputs of layers: less memory, more time"},
    {OPT_TEXT, "segment-len", &s.segment_len, .arg = "N",
     .help = "process sequences in segments of N tokens: same gradients, less memory; auto: the most that fits"},

    {OPT_HEADING, .help = "Reports", .kept = true},
    {OPT_INT64, "print-every", &s.print_every, 0, 1e9,
     .help = "steps between lines; 0: on a terminal, where a progress line shows every step, about 20 lines, else 1"},
    {OPT_INT64, "val-every", &s.val_every, 0, 1e9,
     .help = "steps between validations, in addition to those at checkpoints; 0: none"},
    {OPT_INT64, "val-batches", &s.val_batches, 0, 1e9, .help = "batches per validation; 0: all"},
    {OPT_INT64, "sample-every", &s.sample_every, 0, 1e9, .help = "steps between samples; 0: only at the end"},
    {OPT_INT64, "save-every", &s.save_every, 0, 1e9, .help = "steps between checkpoints; 0: only at the end"},
    {OPT_PATH, "tokenizer", &s.tokenizer, .arg = "FILE", .help = "tokenizer.bin, to print samples as text"},
    {OPT_PATH, "log", &s.log, .arg = "FILE.csv", .help = "CSV file with a row for every step"},

    {OPT_HEADING, .help = "This run"},
    {OPT_PATH, "init", &s.init, .arg = "FILE", .help = "start from a model file, or a run's newest checkpoint"},
    {OPT_PATH, "out", &s.out, .arg = "DIR", .help = "save here (out; with --batch or --dump nowhere)"},
    {OPT_SWITCH, "overwrite", &s.overwrite, .help = "replace an older run in --out"},
    {OPT_PATH, "resume", &s.resume, .arg = "DIR", .help = "continue the run in DIR with its own settings"},
    {OPT_SWITCH, "eval", &s.eval, .help = "only validate; write nothing"},
    {OPT_PATH, "dump", &s.dump, .arg = "FILE", .help = "write the tensors of the last step, for ./compare"},
    {OPT_INT, "threads", &s.threads, 0, 1024, .help = "CPU threads; 0: one per core"},
    {OPT_INT, "chunk-parallel", &s.chunk_parallel, 1, 1 << 16, .help = "processes that share each sequence"},
    {OPT_END, .help = NULL},
};
// clang-format on

// A rank's part of the data: B sequences, and `tokens` tokens of each, in each of grad_accum batches.
typedef struct {
    Reader train, val; // unused with --batch
    Split split;       // of a sequence
    int B;
    int64_t tokens;
    int32_t *inputs, *targets; // (grad_accum) batches of a step, one with --batch; split_offset() describes a batch
    bool *fresh;               // (grad_accum,B): the row starts from a fresh state
    State **states;            // (grad_accum), only with --carry-state
    double num_targets;        // targets of a step that are not ignored, of all ranks
} Data;

typedef struct {
    Config config;
    StFile init;          // model file of --init or --resume, open until it is loaded
    Tokenizer *tokenizer; // NULL without --tokenizer
    Data data;
    Mode mode;             // of the model
    MemoryPlan plan;       // of the model
    double extra_bytes;    // planned for states and buffers
    const char *out;       // the run's directory; NULL: nothing is saved
    const char *log_path;  // --log, or the file that it links to; NULL: no log, or not rank 0
    const char *dump_path; // likewise for --dump, in all ranks
    Model *model;
    State *sample_state; // of one row; NULL if no samples are written
    Segments segments;   // passes over sequences, in one segment or in several
    FILE *log;           // NULL: no log
    int64_t step;        // number of updates done
    bool nothing_left;   // the resumed run has done all its steps
    bool failed;         // the log or the dump could not be written
    double product_rate; // operations/s of a large matrix product, of all ranks together; 0: unknown
} Run;

static volatile sig_atomic_t stop_signal; // number of the signal that asked to stop; 0: none
static void on_signal(int number) { stop_signal = number; }

// ----------------------------------------------------------------------------
// start of the process; the command line

static void start_process(char **argv) {
    guard_streams();
    ranks_start();
    if (!ranks.started) settle_threads(argv); // mpirun itself binds its processes to cores
    signal(SIGPIPE, SIG_IGN);                 // a closed progress pipe must not end the run
}

static char resumed_model[PATH_SIZE]; // with --resume: the model file of the newest intact checkpoint

// Parses the command line. With --resume the run's own options are set first, and the command line overrides them.
static void read_settings(int argc, char **argv) {
    static const char about[] =
        "usage: ./train [options]\n\nTrains a Megalodon language model. Without options: a small byte-level "
        "model on dev/data/shakespeare.txt.\nDefaults in parentheses.\n";
    char err[ST_ERR];
    bool is_run;
    s.config = *find_preset("demo");
    options_parse(options, argc, argv, about);
    recorded = s;
    if (s.resume == NULL) return;
    const int64_t newest = run_newest(s.resume, &is_run);
    if (!is_run) fatal("--resume %s: holds no run", s.resume);
    if (newest < 0) fatal("--resume %s: every checkpoint is damaged", s.resume);
    run_model_path(resumed_model, s.resume, newest);
    char *text = run_read_options(s.resume);
    if (text == NULL) return;
    if (!options_read(options, text, err)) fatal("%s/options.txt: %s", s.resume, err);
    recorded = s;
    options_parse(options, argc, argv, about);
}

// A resumed run must keep the settings that its state depends on.
static void check_resumed_settings(void) {
    if (s.seed != recorded.seed)
        usage_error("--seed %lld: the run in %s has seed %lld, on which its data order and dropout masks depend; leave "
                    "it out",
                    (long long)s.seed, s.resume, (long long)recorded.seed);
    if (s.carry_state != recorded.carry_state)
        usage_error("--carry-state: the run in %s was begun without it; start another one with --init %s --out DIR",
                    s.resume, s.resume);
    if (s.carry_state && (s.seq_len != recorded.seq_len || s.eot != recorded.eot))
        usage_error(
            "--seq-len %lld --eot %d: the run in %s carries states with --seq-len %lld --eot %d; leave them out",
            (long long)s.seq_len, s.eot, s.resume, (long long)recorded.seq_len, recorded.eot);
    if (s.carry_state && (s.batch_size != recorded.batch_size || s.grad_accum != recorded.grad_accum))
        usage_error("--batch-size %d --grad-accum %d: the run in %s carries the states of %d x %d rows; leave them out",
                    s.batch_size, s.grad_accum, s.resume, recorded.batch_size, recorded.grad_accum);
}

static bool segment_len_is_auto(void) { return s.segment_len && strcmp(s.segment_len, "auto") == 0; }

// The number of --segment-len; 0 if it is none.
static int64_t parse_segment_len(void) {
    char *end;
    const long long number = strtoll(s.segment_len, &end, 10);
    const bool digit = *s.segment_len >= '0' && *s.segment_len <= '9'; // no white space, which options.txt would get
    return digit && *end == 0 ? number : 0;
}

// Checks the options as far as they alone show an error.
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
    if (s.segment_len && !segment_len_is_auto() && parse_segment_len() < 1)
        usage_error("--segment-len %s: it is a number of tokens, or auto", s.segment_len);
    if (!s.eval && s.resume) check_resumed_settings();
    if (s.threads > 0) megalodon_threads(s.threads);
}

// ----------------------------------------------------------------------------
// headers of input files: configuration, tokenizer, data

// Returns the configuration. --resume and --init take that of the model file, left open in *file, and options must not
// contradict it. Otherwise the preset's fields are overridden by those of --config, and these by single options.
static Config configure(StFile *file) {
    char err[ST_ERR];
    const char *owner = s.resume ? s.resume : s.init;
    const bool named = s.preset != NULL || s.config_file != NULL;
    Config asked = s.config_file && !s.preset ? config_defaults() : *find_preset(s.preset ? s.preset : "demo");
    if (s.config_file) claim_input("config", s.config_file), config_from_file(&asked, s.config_file);
    Config config = asked;
    if (owner != NULL && !run_open_model(file, &config, s.resume ? resumed_model : s.init)) {
        if (s.resume || !named)
            fatal("%s: has no configuration; %s", file->path,
                  s.resume ? "it is not a checkpoint of ./train" : "give it with --config or --preset");
        owner = NULL;
    }
    if (s.init) claim_input("init", file->path);
    if (owner != NULL && named && !config_equal(&asked, &config))
        usage_error("--%s contradicts the configuration in %s; leave it out", s.preset ? "preset" : "config", owner);
    config_apply(&config, &s.config, options, owner);
    if (!config_check(&config, err)) usage_error("the model's configuration: %s", err);
    if (s.eot >= config.vocab_size) usage_error("--eot %d: the vocabulary has %d tokens", s.eot, config.vocab_size);
    if (s.carry_state && s.seq_len % config.chunk_size != 0)
        usage_error("--carry-state: --seq-len %lld is no multiple of --chunk-size %d", (long long)s.seq_len,
                    config.chunk_size);
    return config;
}

// Opens a token file; *print gets its fingerprint. A resumed run refuses a file that differs from the recorded
// fingerprint, unless the option is given again.
static Tokens open_tokens(const char *flag, const char **path, const char **print, const char *recorded_print, int V) {
    DataFormat format;
    find_data_format(s.data_format, &format);
    claim_input(flag, *path);
    if (s.resume && !option_given(options, path) && access(*path, R_OK) != 0)
        fatal("%s: %s; the run was trained on it: restore it, or name it with --%s", *path, strerror(errno), flag);
    const Tokens tokens = tokens_open_as(*path, V, format);
    char *now = allocate(FINGERPRINT_SIZE, 1);
    tokens_fingerprint(&tokens, now);
    if (s.resume && !s.eval && s.carry_state && recorded_print && strcmp(now, recorded_print) != 0)
        fatal("%s: is not the file of the states that the run in %s carries (that had %s, this has %s)", *path,
              s.resume, recorded_print, now);
    if (s.resume && recorded_print && !option_given(options, path) && strcmp(now, recorded_print) != 0)
        fatal("%s: has changed since the run began (it had %s, it has %s); restore the old file, or give --%s again to "
              "continue with this one",
              *path, recorded_print, now, flag);
    *print = now;
    return tokens;
}

// A reader of this rank's part of `rows` rows a step.
static Reader open_reader(const Tokens *tokens, const char *purpose, int rows, bool carry) {
    Reader r = reader_new(tokens, purpose, (uint64_t)s.seed, rows, s.seq_len, s.eot, carry);
    r.batch_size = s.batch_size, r.first_row = ranks.first_row, r.num_rows = ranks.num_rows;
    return r;
}

static double count_targets(const int32_t *targets, int64_t n) {
    double counted = 0;
    for (int64_t i = 0; i < n; i++) counted += targets[i] >= 0;
    ranks_sum(&counted, 1);
    return counted;
}

// Replaces the whole batch (batch_size, seq_len) by this rank's part of it, in the order that split_offset() describes.
static void keep_own_part(const Data *d, int32_t **values) {
    int32_t *own = allocate((size_t)d->B * (size_t)d->tokens, sizeof *own), *to = own;
    for (int64_t i = 0; i < split_segments(&d->split); i++) {
        const TokenRange part = split_part(&d->split, i, d->split.cp_rank);
        for (int64_t b = 0; b < d->B; b++, to += part.count)
            memcpy(to, *values + (ranks.first_row + b) * s.seq_len + part.first, (size_t)part.count * sizeof *to);
    }
    free(*values);
    *values = own;
}

// Reads the batch of --batch.
static void open_batch(Data *d, const Config *c) {
    int B, L;
    claim_input("batch", s.batch);
    read_batch(s.batch, c->vocab_size, &B, &L, &d->inputs, &d->targets);
    if ((option_given(options, &s.batch_size) && s.batch_size != B) ||
        (option_given(options, &s.seq_len) && s.seq_len != L))
        usage_error("--batch-size or --seq-len contradicts --batch %s, which is %d x %d", s.batch, B, L);
    s.batch_size = B, s.seq_len = L;
}

// Opens --data and --val-data, or takes the last tenth of --data for validation.
static void open_texts(Data *d, const Config *c) {
    static char plays[PATH_SIZE];
    Tokens train = {0}, val = {0};
    beside_executable(plays, sizeof plays, "dev/data/shakespeare.txt");
    if (!s.eval || s.val_data == NULL) {
        if (s.data == NULL) s.data = plays;
        train = open_tokens("data", &s.data, &s.data_print, recorded.data_print, c->vocab_size);
        const size_t tenth = s.val_data ? 0 : train.count / 10;
        val = tokens_part(&train, train.count - tenth, tenth);
        train.count -= tenth;
    }
    if (s.val_data != NULL)
        val = open_tokens("val-data", &s.val_data, &s.val_data_print, recorded.val_data_print, c->vocab_size);
    d->train.tokens = train;
    if (!s.eval) d->train = open_reader(&train, "training", s.batch_size * s.grad_accum, s.carry_state);
    if (s.eval || s.val_every > 0) d->val = open_reader(&val, "validation", s.batch_size, false);
}

// Opens the data and divides each batch among the ranks.
static Data open_data(const Config *c) {
    Data d = {0};
    if (s.batch) open_batch(&d, c);
    ranks_split(s.chunk_parallel, s.batch_size, s.seq_len, c->chunk_size);
    d.B = ranks.num_rows;
    d.split = split_none(s.seq_len, c->chunk_size);
    d.split.cp_size = ranks.cp_size, d.split.cp_rank = ranks.cp_rank;
    if (s.segment_len && !segment_len_is_auto()) {
        const int64_t N = parse_segment_len();
        d.split.segment_len = N < s.seq_len ? N : s.seq_len;
        if (split_error(&d.split) != NULL) usage_error("%s", split_error(&d.split));
    }
    if (!s.batch) open_texts(&d, c);
    return d;
}

static size_t count_parameters(const Config *c) {
    size_t n = 0;
    free(megalodon_tensors(c, NULL, &n));
    return n;
}

// Fails unless all ranks have the same settings, configuration and data, and, if there is a model, the same step and
// parameters. Compares a hash of them, for which 1000 tokens and parameters are sampled.
static void check_ranks_agree(const Run *run) {
    enum { SAMPLES = 1000 };
    if (ranks.size == 1) return;
    uint64_t hash = 14695981039346656037u; // FNV-1a
    char *text, *json = config_to_json(&run->config);
    size_t length, size = count_parameters(&run->config);
    FILE *f = open_memstream(&text, &length);
    if (f == NULL) fatal("out of memory");
    options_write(options, f);
    fprintf(f, "%s %d %d %d %d %d %lld", json, s.chunk_parallel, s.eval, s.dump != NULL, s.out != NULL,
            s.resume != NULL, (long long)run->step);
    for (int i = 0; i < 2; i++) {
        const Tokens *t = i == 0 ? &run->data.train.tokens : &run->data.val.tokens;
        fprintf(f, " %zu", t->count);
        for (size_t n = 0; n < SAMPLES && t->count > 0; n++)
            fprintf(f, " %d", token_at(t, n * (t->count - 1) / SAMPLES));
    }
    for (size_t n = 0; n < SAMPLES && run->model != NULL; n++) {
        real value;
        megalodon_read(run->model, PARAMS, n * (size - 1) / SAMPLES, 1, &value);
        fprintf(f, " %.9g", value);
    }
    if (fclose(f) != 0) fatal("out of memory");
    for (size_t i = 0; i < length; i++) hash = (hash ^ (unsigned char)text[i]) * 1099511628211u;
    if (!ranks_agree(hash))
        fatal("process %d of %d has other %s than the others", ranks.rank, ranks.size,
              run->model ? "parameters or another step" : "settings, configuration or data");
    free(text), free(json);
}

static void open_inputs(Run *run) {
    run->config = configure(&run->init);
    if (s.tokenizer) run->tokenizer = tokenizer_open(s.tokenizer, run->config.vocab_size);
    run->data = open_data(&run->config);
    check_ranks_agree(run);
}

// ----------------------------------------------------------------------------
// the memory plan, outputs, the model

static bool writes_samples(void) { return !s.eval && !s.batch; }

static int num_carried_states(void) { return s.carry_state && !s.eval ? s.grad_accum : 0; }

// The memory that the run needs beside the model.
static Demand memory_demand(const Run *run) {
    const Config *c = &run->config;
    const Data *d = &run->data;
    const double V = c->vocab_size, rows = (double)d->B * s.grad_accum;
    const double fresh = rows * sizeof(bool);
    // one of these buffers exists at a time: a sample's, the largest tensor's initial values, a dump's
    const double sample = writes_samples() ? V * sizeof(real) + (double)sample_bytes(c->vocab_size) : 0;
    const double initial = s.init || s.resume ? 0 : V * c->model_dim * sizeof(real);
    const double buffer = fmax(fmax(sample, initial), s.dump ? dump_bytes(c) : 0);
    return (Demand){
        .config = c,
        .mode = run->mode,
        .B = d->B,
        .split = d->split,
        .states = run_state_bytes(c, num_carried_states()) + (writes_samples() ? (double)state_bytes(c, 1, 0) : 0),
        .host = fresh + (double)reader_bytes(&d->train) + (double)reader_bytes(&d->val) + buffer,
        .batch_per_token = s.grad_accum * 2.0 * sizeof(int32_t), // inputs and targets
        .host_per_token = s.dump ? dump_bytes_per_token(c) : 0,
        .segments = true,
    };
}

// Replaces --segment-len auto by the longest segments that fit on all ranks, or by none if whole sequences do.
// options.txt gets the number, so that a resumed run has the same rounding.
static void choose_segment_len(Run *run) {
    static char text[24];
    Split *split = &run->data.split;
    if (!segment_len_is_auto()) return;
    const Demand demand = memory_demand(run);
    const int64_t longest = (int64_t)ranks_min((double)longest_segment(&demand));
    s.segment_len = NULL;
    if (longest == 0 || longest == split->length) return; // if nothing fits, check_memory says what is missing
    split->segment_len = longest;
    snprintf(text, sizeof text, "%lld", (long long)longest);
    s.segment_len = text;
}

// Fails if the run needs more memory than there is. Nothing large has been allocated before.
static void plan_memory(Run *run) {
    Data *d = &run->data;
    run->mode = s.eval ? MEGALODON_INFER : s.recompute ? MEGALODON_RECOMPUTE : MEGALODON_TRAIN;
    megalodon_set_shard(ranks.shard, ranks.size);
    choose_segment_len(run);
    d->tokens = split_own(&d->split);
    d->train.split = d->val.split = d->split;
    const Demand demand = memory_demand(run);
    run->plan = check_memory(&demand, &run->extra_bytes);
}

// Locks the run's directory and checks that all outputs can be written. None is changed yet.
static void claim_outputs(Run *run) {
    run->out = s.eval ? NULL : s.resume ? s.resume : s.out ? s.out : s.batch || s.dump ? NULL : "out";
    run->dump_path = s.dump;
    if (s.tokenizer) claim_input("tokenizer", s.tokenizer);
    if (ranks.rank > 0) return;
    if (run->out) run_claim(run->out, s.resume != NULL, s.overwrite);
    if (run->out && s.log) run_refuse_inside(run->out, "log", s.log);
    if (run->out && s.dump) run_refuse_inside(run->out, "dump", s.dump);
    if (s.log && !s.eval) run->log_path = claim_output("log", s.log, "a log of ./train", is_log);
    if (s.dump) run->dump_path = claim_output("dump", s.dump, "a dump of ./train", is_dump);
    if (run->out) options_refuse_lines(options);
}

static void allocate_batches(Data *d, const Config *c) {
    const size_t rows = (size_t)d->B * (size_t)s.grad_accum;
    if (s.batch) {
        keep_own_part(d, &d->inputs), keep_own_part(d, &d->targets);
        d->num_targets = count_targets(d->targets, d->B * d->tokens) * s.grad_accum;
        if (d->num_targets == 0) fatal("--batch %s: every target is -1", s.batch);
        return;
    }
    d->inputs = allocate(rows * (size_t)d->tokens, sizeof *d->inputs);
    d->targets = allocate(rows * (size_t)d->tokens, sizeof *d->targets);
    d->fresh = allocate(rows, sizeof *d->fresh);
    if (num_carried_states() > 0) d->states = allocate((size_t)num_carried_states(), sizeof(State *));
    for (int a = 0; a < num_carried_states(); a++) {
        if ((d->states[a] = state_new(c, d->B, 1)) == NULL) fatal("out of memory for the states of --carry-state");
    }
}

static void create_model(Run *run) {
    Data *d = &run->data;
    allocate_batches(d, &run->config);
    run->model = megalodon_new(&run->config, run->mode, d->B, (int)split_part(&d->split, 0, ranks.cp_rank).count);
    if (writes_samples()) run->sample_state = state_new(&run->config, 1, 0);
    if (run->model == NULL || (run->sample_state == NULL && writes_samples())) fatal("out of memory");
    ranks_open(run->model, &run->config);
    segments_open(&run->segments, run->model, &run->config, run->mode, d->B, &d->split);
}

static void print_header(const Run *run) {
    const Config *c = &run->config;
    const MemoryPlan *p = &run->plan;
    const Data *d = &run->data;
    const double mib = 1048576, model = (double)p->params + (double)p->grads + (double)p->moments +
                                        (double)p->activations + (double)p->scratch;
    printf("backend     %s\n", megalodon_backend());
    printf("model       %d layers, model_dim %d, %d heads, z_dim %d, value_dim %d, ffn_hidden_dim %d%s, "
           "cema_ndim %d,\n"
           "            chunk_size %d, vocab_size %d, norm_num_groups %d%s%s%s%s",
           c->num_layers, c->model_dim, c->num_heads, c->z_dim, c->value_dim, c->ffn_hidden_dim,
           c->swiglu ? " swiglu" : "", c->cema_ndim, c->chunk_size, c->vocab_size, c->norm_num_groups,
           c->rescale_nffn ? ", rescale_nffn" : "", c->scale_emb ? ", scale_emb" : "",
           c->share_emb ? ", share_emb" : "", c->norm_affine ? "" : ", no norm_affine");
    config_write_replaced(stdout, c);
    printf("\n");
    printf("parameters  %zu\n", count_parameters(c));
    printf(
        "memory      %.1f MiB: parameters %.1f, gradients %.1f, moments %.1f, activations %.1f, scratch %.1f, states "
        "and buffers %.1f\n",
        (model + run->extra_bytes) / mib, (double)p->params / mib, (double)p->grads / mib, (double)p->moments / mib,
        (double)p->activations / mib, (double)p->scratch / mib, run->extra_bytes / mib);
    const Tokens *train = &d->train.tokens, *val = &d->val.tokens;
    if (s.batch)
        printf("data        %s, %d x %lld tokens\n", s.batch, s.batch_size, (long long)s.seq_len);
    else
        printf("data        %s: %zu tokens to train on, %zu to validate\n", train->path ? train->path : val->path,
               train->count, val->count);
    if (s.eot >= 0) printf("documents   %zu to train on, %zu to validate\n", d->train.count, d->val.count);
    if (c->dropout > 0 || c->hidden_dropout > 0 || c->attention_dropout > 0)
        printf("dropout     %g, hidden %g, attention %g\n", c->dropout, c->hidden_dropout, c->attention_dropout);
    if (ranks.started)
        printf(
            "ranks       %d: %d data-parallel x %d chunk-parallel; rank 0 has %d sequences, %lld tokens of each; %s\n",
            ranks.size, ranks.dp_size, ranks.cp_size, d->B, (long long)d->tokens,
            ranks.node_size == 1            ? "communication through MPI"
            : ranks.node_size == ranks.size ? "GPUs map each other's memory"
                                            : "GPUs of a machine map each other's memory");
    char segments[80] = "";
    if (run->segments.num_segments > 1)
        snprintf(segments, sizeof segments, " in %lld segments of %lld", (long long)run->segments.num_segments,
                 (long long)d->split.segment_len);
    printf("step        %d x %d x %lld tokens%s, lr %g %s, seed %lld\n\n", s.grad_accum, s.batch_size,
           (long long)s.seq_len, segments, s.lr, s.schedule, (long long)s.seed);
}

// ----------------------------------------------------------------------------
// loading

static void initialize_parameters(Model *model, const Config *config) {
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

// The learning rate of update k = 0, 1, ..: rises from lr_init_ratio * lr during the warm-up, then falls to
// lr_end_ratio * lr, which it would reach after the last step.
static double learning_rate(const Settings *x, int64_t k) {
    const double W = (double)x->warmup, i = x->lr_init_ratio, e = x->lr_end_ratio, pi = 3.14159265358979323846;
    if (k < x->warmup) return x->lr * (i + (double)k * (1 - i) / W);
    const double t = k < x->steps ? ((double)k - W) / ((double)x->steps - W) : 1;
    if (strcmp(x->schedule, "linear") == 0) return x->lr * (t * e + 1 - t);
    if (strcmp(x->schedule, "cosine") == 0) return x->lr * (e + (1 - e) * (1 + cos(pi * t)) / 2);
    return x->lr;
}

// If the command line changes the learning rate of a resumed run: prints the old and the new rate, and which options
// differ.
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
    printf("schedule    the next learning rate is %.2e; with the run's previous settings it would be %.2e (", now,
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

// Index of the first token of the last batch in a step's inputs and targets.
static size_t last_batch(const Data *d) {
    return s.batch ? 0 : (size_t)(s.grad_accum - 1) * (size_t)d->B * (size_t)d->tokens;
}

// The loss of the current parameters on the last batch that was read, from fresh states. Not finite if the model has
// diverged.
static double current_loss(Run *run) {
    const Data *d = &run->data;
    int64_t counted;
    double loss = segments_loss(&run->segments, d->inputs + last_batch(d), d->targets + last_batch(d), d->B, &counted);
    ranks_sum(&loss, 1);
    return isnan(loss) ? NAN : loss; // removes the sign that printf would print
}

// Fails if the model's loss on the first tokens of the data is not finite.
static void refuse_diverged(Run *run) {
    Data *d = &run->data;
    const size_t n = (size_t)d->B * (size_t)d->tokens * (size_t)s.grad_accum, count = d->train.tokens.count;
    for (size_t i = 0; i < n && !s.batch; i++) {
        d->inputs[i] = token_at(&d->train.tokens, i % count);
        d->targets[i] = token_at(&d->train.tokens, (i + 1) % count);
    }
    const double loss = current_loss(run);
    if (!isfinite(loss))
        fatal("%s%s: the model's loss is %g; start from another checkpoint or --init-mode", s.init ? "--init " : "",
              s.init ? s.init : "the initial values", loss);
}

// Loads or initializes the parameters and, with --resume, the optimizer, states and step. Then makes the last checks
// that can refuse the command.
static void load_model_and_step(Run *run) {
    const bool resumed = s.resume && !s.eval;
    if (resumed) {
        st_close(&run->init);
        run->step = run_load(s.resume, run->model, run->data.states, num_carried_states(), &run->config, s.seed);
    } else if (s.resume || s.init) {
        checkpoint_load(&run->init, run->model, &run->config);
    } else {
        initialize_parameters(run->model, &run->config);
    }
    check_ranks_agree(run);
    if (resumed) print_new_rate(run->step);
    run->nothing_left = resumed && run->step >= s.steps;
    if (run->nothing_left && s.dump) usage_error("--dump: --steps %lld leaves no step to dump", (long long)s.steps);
    if (!s.eval && !run->nothing_left && (s.init || s.steps == 0)) refuse_diverged(run);
    if (run->nothing_left)
        printf("step %lld of %lld: nothing left to do; --steps is the total\n", (long long)run->step,
               (long long)s.steps);
}

// The command is accepted: changes the run's directory and the log. From here on a signal ends the run after a step,
// and a second one at once.
static void begin_outputs(Run *run) {
    const struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)(SA_RESETHAND | SA_RESTART)};
    if (!s.eval) sigaction(SIGINT, &action, NULL), sigaction(SIGTERM, &action, NULL);
    if (run->log_path && !run->nothing_left) run->log = log_open(run->log_path, run->step);
    if (run->out && ranks.rank == 0 && !run->nothing_left) run_begin(run->out, options, s.overwrite);
    keep_created();
    if (run->log) log_replace(run->log_path);
}

// ----------------------------------------------------------------------------
// a step

typedef struct {
    double loss;      // nats, mean over the step's targets
    double grad_norm; // L2 norm before clipping
    double lr;        // learning rate
    double seconds;   // duration
    double speed;     // tokens/s, ignored targets included
    double share;     // of the step's duration that its matrix products alone would take at run->product_rate; or 0
    bool finite;      // loss and grad_norm are; otherwise the update is skipped
    bool stop;        // a rank has received a signal, or failed to write
} Step;

static double tokens_per_step(void) { return (double)s.batch_size * (double)s.seq_len * s.grad_accum; }

// The least seconds of a step: its matrix products without anything else, and without what is computed again.
static double floor_seconds(const Run *run) {
    const double sequences = (double)s.batch_size * s.grad_accum;
    return sequences * megalodon_step_operations(&run->config, s.seq_len) / run->product_rate;
}

// Accumulates the gradients of the mean loss over the targets of all batches and ranks. Returns this rank's part of
// that loss. dump, unless NULL, gets the last batch.
static double accumulate(Run *run, Dump *dump) {
    Data *d = &run->data;
    const size_t batch = (size_t)d->B * (size_t)d->tokens;
    double sum = 0;
    megalodon_zero_grad(run->model);
    if (!s.batch) {
        reader_step(&d->train, run->step, d->inputs, d->targets, d->fresh);
        d->num_targets = count_targets(d->targets, (int64_t)batch * s.grad_accum);
    }
    for (int a = 0; a < s.grad_accum; a++) {
        const size_t first = s.batch ? 0 : (size_t)a * batch;
        const bool last = a == s.grad_accum - 1;
        const Pass pass = {
            .inputs = d->inputs + first,
            .targets = d->targets + first,
            .carried = d->states ? d->states[a] : NULL,
            .key = {.seed = (uint64_t)s.seed, .step = run->step, .row = (int64_t)a * s.batch_size + ranks.first_row},
            .grad_scale = 1 / d->num_targets,
            .on_grad_ready = ranks.size > 1 && last ? ranks_reduce_scatter_grads : NULL,
            .dump = last ? dump : NULL};
        for (int b = 0; b < d->B && pass.carried != NULL; b++) {
            if (d->fresh[a * d->B + b]) state_reset(pass.carried, b);
        }
        sum += segments_train(&run->segments, &pass);
    }
    return sum / d->num_targets;
}

// Resets all carried states, which may not be finite after a step that was not.
static void reset_states(Data *d) {
    for (int a = 0; a < s.grad_accum && d->states != NULL; a++) {
        for (int b = 0; b < d->B; b++) state_reset(d->states[a], b);
    }
}

static void finish_dump(Run *run, Dump *dump, double loss) {
    char err[ST_ERR];
    if (dump == NULL || dump_finish(dump, loss, err)) return;
    progress_end();
    fprintf(stderr, "error: --dump %s\n", err); // not fatal: the step is still to be saved
    run->failed = true;
}

// Forward and backward pass, clipping and update of step run->step + 1.
static Step train_step(Run *run) {
    const double start = seconds();
    Step step = {.lr = learning_rate(&s, run->step)};
    Dump *dump = NULL;
    double sums[3]; // over all ranks: loss, squared norm, wishes to stop
    if (run->dump_path && run->step + 1 == s.steps)
        dump = dump_new(run->dump_path, run->model, &run->config, &run->data.split);
    sums[0] = accumulate(run, dump);
    sums[1] = pow(megalodon_grad_norm(run->model), 2);
    sums[2] = stop_signal != 0 || run->failed;
    ranks_sum(sums, 3);
    step.loss = isnan(sums[0]) ? NAN : sums[0], step.grad_norm = isnan(sums[1]) ? NAN : sqrt(sums[1]);
    step.finite = isfinite(step.loss) && isfinite(step.grad_norm);
    step.stop = sums[2] > 0;
    finish_dump(run, dump, step.loss);
    if (step.finite) {
        const double scale = s.grad_clip > 0 ? fmin(1, s.grad_clip / (step.grad_norm + 1e-6)) : 1;
        megalodon_update(run->model, &s.adamw, step.lr, scale, run->step);
        ranks_all_gather_params(run->model);
    } else {
        reset_states(&run->data);
    }
    run->step++;
    step.seconds = seconds() - start;
    step.speed = tokens_per_step() / step.seconds;
    // measured after the first step, so that a run which is stopped again and again goes on
    if (run->product_rate == 0) run->product_rate = ranks.size * megalodon_product_rate();
    if (run->product_rate > 0) step.share = floor_seconds(run) / step.seconds;
    return step;
}

// Steps between lines. On a terminal, unless --print-every says otherwise: 1, 2, 5, 10, 20, 50 or 100.
static int64_t line_interval(void) {
    int64_t n = 1;
    if (s.print_every > 0) return s.print_every;
    for (int i = 1; on_terminal() && n < 100 && 20 * n < s.steps; i++) n = i % 3 == 2 ? n / 2 * 5 : 2 * n;
    return n;
}

// Shows the latest step on the terminal's progress line, ten times a second at most. elapsed: seconds since step
// `begun`, validation, samples and checkpoints included.
static void show_step(const Run *run, const Step *step, int64_t begun, double elapsed) {
    static double last;
    const double left = elapsed / (double)(run->step - begun) * (double)(s.steps - run->step);
    const long long rest = (long long)fmin(left, 1e9);
    char hours[24] = "";
    if (seconds() - last < 0.1) return;
    last = seconds();
    if (rest >= 3600) snprintf(hours, sizeof hours, "%lld h ", rest / 3600);
    progress_line("step %5lld/%lld | loss %.4f | %.1f ms | %.1fk tok/s | %s%lld min %02lld s left",
                  (long long)run->step, (long long)s.steps, step->loss, step->seconds * 1e3, step->speed / 1e3, hours,
                  rest / 60 % 60, rest % 60);
}

// skipped: number of steps so far whose update was skipped.
static void print_step(const Run *run, const Step *step, int64_t skipped) {
    progress_end();
    printf("step %5lld/%lld | loss %.4f | norm %.3f | lr %.2e | %.1f ms | %.1fk tok/s", (long long)run->step,
           (long long)s.steps, step->loss, step->grad_norm, step->lr, step->seconds * 1e3, step->speed / 1e3);
    if (s.eot >= 0 || s.carry_state) printf(" | %.0f%% ignored", 100 - 100 * run->data.num_targets / tokens_per_step());
    if (!step->finite) printf(" | not finite: skipped, %lld so far", (long long)skipped);
    if (step->share > 0) printf(" | %.1f%% of floor", 100 * step->share);
    printf("\n");
}

// ----------------------------------------------------------------------------
// validation, samples, checkpoints

// Prints and returns the mean loss over the validation windows.
static double validate(Run *run) {
    const Data *d = &run->data;
    double sums[2] = {0}; // of losses, and of targets
    int64_t counted;
    size_t windows = 0;
    Cursor cursor = {0};
    for (int64_t i = 0; i < s.val_batches || s.val_batches == 0; i++) {
        const int all = read_windows(&d->val, &cursor, s.batch_size, d->inputs, d->targets);
        const int rest = all - ranks.first_row, rows = rest < d->B ? rest : d->B; // none in an incomplete last batch
        if (all == 0) break;
        windows += (size_t)all;
        if (rows <= 0) continue;
        sums[0] += segments_loss(&run->segments, d->inputs, d->targets, rows, &counted);
        sums[1] += (double)counted;
    }
    ranks_sum(sums, 2);
    const double loss = sums[0] / sums[1];
    progress_end();
    printf("val loss %.6f nats = %.6f bits per %s | %zu windows of %lld\n", loss, loss / log(2),
           d->val.tokens.width == 1 ? "byte" : "token", windows, (long long)s.seq_len);
    return loss;
}

// Prints 256 tokens that the model generates after the EOT, a newline or the first token of the data: as text if tokens
// are bytes or there is a tokenizer, otherwise as numbers.
static void write_sample(Run *run) {
    enum { LENGTH = 256 };
    const Sampling how = {.temperature = 0.8, .top_p = 0.95};
    const Data *d = &run->data;
    const Tokenizer *tokenizer = run->tokenizer;
    const int V = run->config.vocab_size;
    const bool bytes = d->train.tokens.width == 1 || (V <= 512 && s.eot >= 256), text = tokenizer || bytes;
    const int drawn = text && tokenizer_count(tokenizer) < V ? tokenizer_count(tokenizer) : V; // without padding
    const int start = s.eot >= 0 ? s.eot : bytes ? '\n' : token_at(&d->train.tokens, 0);
    int32_t token = start < V ? start : 0;
    real *logits = allocate((size_t)V, sizeof *logits);
    state_reset(run->sample_state, 0);
    segments_pause_ranks(&run->segments); // rank 0 decodes alone
    progress_end();
    printf("----\n");
    for (int64_t i = 0; i < LENGTH; i++) {
        size_t length;
        megalodon_forward(run->model, run->sample_state, &token, 1, 1);
        megalodon_logits(run->model, 0, 1, logits);
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
    free(logits);
}

// Saves a checkpoint, unless the model has diverged: then older checkpoints stay, and the program ends with an error.
// stopped: only a signal causes this checkpoint.
static void save_if_finite(Run *run, double val_loss, bool stopped) {
    const double loss = current_loss(run);
    progress_end();
    if (isfinite(loss) && (isnan(val_loss) || isfinite(val_loss))) {
        run_save(run->out, run->model, run->data.states, num_carried_states(), &run->config, s.seed, run->step,
                 val_loss, stopped);
        return;
    }
    bool is_run;
    const int64_t newest = run_newest(run->out, &is_run);
    char kept[64] = "no checkpoint was saved before";
    if (newest >= 0) snprintf(kept, sizeof kept, "the newest checkpoint is that of step %lld", (long long)newest);
    fatal("step %lld: the model has diverged (its loss is %g) and is not saved; in %s %s. Try a smaller --lr, a longer "
          "--warmup, --grad-clip 1",
          (long long)run->step, loss, run->out, kept);
}

static void write_log(Run *run, const Step *step, double val_loss) {
    const LogRow row = {.step = run->step,
                        .loss = step->loss,
                        .grad_norm = step->grad_norm,
                        .lr = step->lr,
                        .seconds = step->seconds,
                        .tokens_per_s = step->speed,
                        .val_loss = val_loss};
    if (run->log == NULL || run->failed || log_write(run->log, &row)) return;
    progress_end();
    fprintf(stderr, "error: --log %s: %s; the run stops after the next step\n", s.log, strerror(errno));
    run->failed = true;
}

// ----------------------------------------------------------------------------
// the loop over the steps

// --steps 0: saves the initial model.
static void save_initial(Run *run) {
    const double val_loss = !s.batch && s.val_every > 0 ? validate(run) : NAN;
    if (run->out) save_if_finite(run, val_loss, false);
}

// Trains to the last step, or to a signal, which only adds a checkpoint if the current step saves none.
static void train(Run *run) {
    const int64_t begun = run->step, interval = line_interval();
    const double start = seconds();
    int64_t skipped = 0;
    int skipped_in_a_row = 0;
    bool stop = false;
    while (run->step < s.steps && !stop) {
        const Step step = train_step(run);
        const int64_t k = run->step;
        const bool last = k == s.steps;
        stop = step.stop;
        skipped += !step.finite, skipped_in_a_row = step.finite ? 0 : skipped_in_a_row + 1;
        if (skipped_in_a_row == MAX_SKIPPED)
            fatal("step %lld: loss %g, gradient norm %g, and likewise the %d steps before it: nothing was saved after "
                  "the last checkpoint. Try a smaller --lr, a longer --warmup, --grad-clip 1",
                  (long long)k, step.loss, step.grad_norm, MAX_SKIPPED - 1);
        if (k % interval == 0 || k == begun + 1 || last || stop || !step.finite)
            print_step(run, &step, skipped);
        else
            show_step(run, &step, begun, seconds() - start);

        const bool scheduled = last || (step.finite && s.save_every > 0 && k % s.save_every == 0);
        const bool validated = !s.batch && s.val_every > 0 && (last || (run->out && scheduled) || k % s.val_every == 0);
        const double val_loss = validated ? validate(run) : NAN;
        write_log(run, &step, val_loss);
        if (run->out && (scheduled || stop)) save_if_finite(run, val_loss, !scheduled);
        if (writes_samples() && !stop && ranks.rank == 0 && (last || (s.sample_every > 0 && k % s.sample_every == 0)))
            write_sample(run);
        fflush(stdout);
    }
}

// ----------------------------------------------------------------------------
// end of the run

static bool is_stopped(const Run *run) { return !s.eval && run->step < s.steps; }

static void print_end(const Run *run, double begin) {
    const bool stopped = is_stopped(run);
    const char *out = run->out;
    progress_end();
    if (!s.eval)
        printf("%s at step %lld after %.1f s, peak memory %.0f MiB%s%s%s%s\n", stopped ? "stopped" : "done",
               (long long)run->step, seconds() - begin, (double)megalodon_peak_memory() / 1048576,
               out ? "; saved in " : "", out ? out : "", stopped && out ? "; continue with --resume " : "",
               stopped && out ? out : "");
    if (ranks.started)
        printf("rank 0: %lld collective operations, %lld bytes sent\n", (long long)ranks.collectives,
               (long long)ranks.bytes_sent);
    if ((fflush(stdout) != 0 || ferror(stdout)) && s.eval) fatal("stdout: the result could not be written");
}

static void free_run(Run *run) {
    Data *d = &run->data;
    if (run->log) fclose(run->log);
    for (int a = 0; d->states && a < num_carried_states(); a++) state_free(d->states[a]);
    free(d->states);
    reader_free(&d->train), reader_free(&d->val);
    free(d->inputs), free(d->targets), free(d->fresh);
    ranks_close();
    segments_close(&run->segments);
    megalodon_free(run->model);
    state_free(run->sample_state);
    if (run->tokenizer) tokenizer_free(run->tokenizer);
}

int main(int argc, char **argv) {
    Run run = {0};
    // Until begin_outputs every step may refuse the command, and nothing is changed.
    start_process(argv);
    read_settings(argc, argv);
    check_settings();
    open_inputs(&run);
    plan_memory(&run);
    claim_outputs(&run);
    create_model(&run);
    print_header(&run);
    load_model_and_step(&run);
    begin_outputs(&run);

    const double begin = seconds();
    if (s.eval) {
        if (!isfinite(validate(&run))) fatal("the validation loss is not finite");
    } else if (s.steps == 0 && !run.nothing_left) {
        save_initial(&run);
    } else {
        train(&run);
    }
    print_end(&run, begin);
    free_run(&run);
    if (run.failed) return 1;
    return is_stopped(&run) ? 128 + (stop_signal ? stop_signal : SIGTERM) : 0;
}
