/*
sample.c: the generating program. Reads a prompt as one forward pass, then writes one token after another,
each from the logits after the one before; the state that is carried along does not grow. --score reads a file
of any length the same way and says how well the model predicts it. Works on any backend: only megalodon.h and
the plumbing are used.
*/
#include <errno.h>    // defines: errno
#include <inttypes.h> // defines: PRId64
#include <math.h>     // defines: isfinite, log
#include <stdlib.h>   // defines: free
#include <string.h>   // defines: strlen, strerror
#include "plumbing/plumbing.h"

enum { PIECE = 2048 }; // tokens a forward pass reads at most

static const char *model_path, *prompt, *prompt_path, *score_path, *state_in, *state_out;
static int num_tokens = 256, top_k, threads;
static int64_t seed = 1337;
static double temperature = 0.8, top_p = 0.95;

static Option options[] = {
    {OPT_TEXT, "model", &model_path, .arg = "FILE", .help = "a checkpoint, or a run's folder: its newest"},
    {OPT_TEXT, "prompt", &prompt, .arg = "TEXT", .help = "the text to go on from"},
    {OPT_TEXT, "prompt-file", &prompt_path, .arg = "FILE", .help = "the same from a file"},
    {OPT_INT, "num-tokens", &num_tokens, 0, INT32_MAX, .arg = "N", .help = "tokens to write"},
    {OPT_REAL, "temperature", &temperature, 0, 100, .arg = "X",
     .help = "logits are divided by it; 0: always the likeliest token"},
    {OPT_INT, "top-k", &top_k, 0, INT32_MAX, .arg = "N", .help = "only the N likeliest tokens; 0: all"},
    {OPT_REAL, "top-p", &top_p, 0, 1, .arg = "X", .help = "only the likeliest tokens that make up this probability"},
    {OPT_INT64, "seed", &seed, 0, (double)INT64_MAX, .arg = "N", .help = "of the random numbers: same seed, same text"},
    {OPT_TEXT, "state-out", &state_out, .arg = "FILE", .help = "write the state after the last token"},
    {OPT_TEXT, "state-in", &state_in, .arg = "FILE", .help = "go on from such a state; a prompt is read after it"},
    {OPT_TEXT, "score", &score_path, .arg = "FILE", .help = "write nothing, predict this file: bits per byte"},
    {OPT_INT, "threads", &threads, 1, 1024, .arg = "N", .help = "threads; as many as there are cores if not given"},
    {OPT_END, .help = NULL},
};

// Reads tokens, however many, and leaves the logits after the last one in logits (V).
static void read_tokens(Model *model, State *state, const int32_t *tokens, size_t n, real *logits) {
    for (size_t i = 0; i < n; i += PIECE) {
        int L = n - i < PIECE ? (int)(n - i) : PIECE;
        megalodon_forward(model, state, tokens + i, 1, L);
        if (i + (size_t)L == n) megalodon_logits(model, (size_t)L - 1, 1, logits);
    }
}

// The prompt's bytes as tokens: --prompt, --prompt-file, or, with neither and no state, a line break.
static int32_t *get_prompt(const Config *c, size_t *count) {
    const unsigned char *bytes = (const unsigned char *)(prompt ? prompt : state_in ? "" : "\n");
    *count = strlen((const char *)bytes);
    if (prompt_path) {
        Tokens file = tokens_open(prompt_path, c->vocab_size);
        if (file.width != 1) fatal("--prompt-file %s: holds token numbers, not text", prompt_path);
        bytes = file.bytes, *count = file.count;
    }
    if (*count == 0 && !state_in) fatal("--prompt is empty: the model needs at least one byte to start from");
    int32_t *tokens = allocate(*count, sizeof *tokens);
    for (size_t i = 0; i < *count; i++) {
        tokens[i] = bytes[i];
        if (bytes[i] >= c->vocab_size)
            fatal("the prompt's byte %d is not among the model's %d tokens", bytes[i], c->vocab_size);
    }
    return tokens;
}

static void write_byte(int32_t token) {
    if (putchar(token) == EOF || fflush(stdout) == EOF) fatal("stdout: %s", strerror(errno));
}

static void generate(Model *model, const Config *c) {
    if (c->vocab_size > 256)
        fatal("%s: its %d tokens are not bytes; only byte-level models can write text", model_path, c->vocab_size);
    State *state = state_new(c, 1, 0);
    real *logits = allocate((size_t)c->vocab_size, sizeof *logits);
    size_t count;
    int32_t *tokens = get_prompt(c, &count);
    if (!state) fatal("out of memory for the state");
    if (state_in) load_state(state_in, state, c, logits);

    double start = seconds();
    read_tokens(model, state, tokens, count, logits);
    double read = seconds();
    for (size_t i = 0; i < count; i++) write_byte(tokens[i]);
    for (int i = 0; i < num_tokens; i++) {
        int64_t position;
        state_read(state, 0, sizeof position, &position); // state->count[0], wherever it lies
        int32_t token =
            sample_token(logits, c->vocab_size, temperature, top_k, top_p, sample_uniform((uint64_t)seed, position, 0));
        write_byte(token);
        read_tokens(model, state, &token, 1, logits);
    }
    double written = seconds();
    if (state_out) save_state(state_out, state, c, logits);
    fprintf(stderr, "\n# read %zu tokens, %.0f tokens/s; wrote %d, %.0f tokens/s; seed %" PRId64 "\n", count,
            count / (read - start + 1e-9), num_tokens, num_tokens / (written - read + 1e-9), seed);
    state_free(state);
    free(logits), free(tokens);
}

// Predicts each token of a file from all before it, in constant memory. The first has nothing before it and is
// not counted. Ranges of positions double: a model that uses its context does better in the later ones.
static void score(Model *model, const Config *c) {
    enum { FIRST = 64, RANGES = 64 };
    Tokens file = tokens_open(score_path, c->vocab_size);
    State *state = state_new(c, 1, 0);
    int32_t *tokens = allocate(PIECE, sizeof *tokens), *targets = allocate(PIECE, sizeof *targets);
    real *losses = allocate(PIECE, sizeof *losses);
    double bits[RANGES] = {0}, total = 0, start = seconds();
    size_t counts[RANGES] = {0}, n = file.count - 1;
    const char *unit = file.width == 1 ? "byte" : "token";
    if (!state) fatal("out of memory for the state");
    if (n == 0) fatal("--score %s: one token; nothing to predict", score_path);
    for (size_t i = 0; i < n; i += PIECE) {
        int L = n - i < PIECE ? (int)(n - i) : PIECE;
        int64_t counted;
        for (int t = 0; t < L; t++)
            tokens[t] = token_at(&file, i + (size_t)t), targets[t] = token_at(&file, i + (size_t)t + 1);
        megalodon_forward(model, state, tokens, 1, L);
        megalodon_loss(model, targets, 0, &counted, losses);
        for (int t = 0; t < L; t++) {
            int range = 0;
            for (size_t p = (i + (size_t)t + 1) / FIRST; p > 0; p >>= 1) range++;
            bits[range] += losses[t] / log(2), counts[range]++;
        }
    }
    printf("%-25s %12s %14s\n", "positions", "predicted", file.width == 1 ? "bits per byte" : "bits per token");
    for (int r = 0; r < RANGES && counts[r] > 0; r++) {
        size_t from = r == 0 ? 1 : (size_t)FIRST << (r - 1), to = from + counts[r] - 1;
        printf("%11zu .. %-11zu %12zu %14.4f\n", from, to, counts[r], bits[r] / (double)counts[r]);
        total += bits[r];
    }
    printf("%-25s %12zu %14.4f\n", "all", n, total / (double)n);
    if (!isfinite(total)) fatal("--score %s: the loss is not finite", score_path);
    fprintf(stderr, "# %zu %ss in %.1f s, %.0f tokens/s\n", n, unit, seconds() - start,
            (double)n / (seconds() - start));
    state_free(state);
    free(tokens), free(targets), free(losses);
}

int main(int argc, char **argv) {
    options_parse(options, argc, argv,
                  "Writes text with a trained model, or scores a file with it.\n"
                  "  ./sample --model out --prompt \"Once\" --num-tokens 500\n");
    settle_threads(argv, threads);
    if (!model_path) usage_error("--model is needed: a checkpoint file or a run's folder");
    if (prompt && prompt_path) usage_error("--prompt and --prompt-file exclude each other");
    if (score_path && (prompt || prompt_path || state_in || state_out))
        usage_error("--score reads its file only: no prompt, no state");
    if (threads) megalodon_threads(threads);

    StFile file;
    Config config = config_defaults();
    if (!checkpoint_open(&file, &config, model_path))
        fatal("%s: no configuration under the metadata key 'config'", model_path);
    check_memory(&config, MEGALODON_INFER, 1, PIECE, 0);
    Model *model = megalodon_new(&config, MEGALODON_INFER, 1, PIECE);
    if (!model) fatal("out of memory for the model");
    checkpoint_load(&file, model, &config);
    if (score_path) {
        score(model, &config);
    } else {
        generate(model, &config);
    }
    megalodon_free(model);
    return 0;
}
