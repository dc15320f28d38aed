/*
sample.c: the generating program. Reads a prompt in forward passes of up to PIECE tokens, then writes one token
after another, each from the logits after the one before; the state that is carried along does not grow. Several
samples are the rows of one batch. --score reads a file of any length the same way and says how well the model
predicts it. Works on any backend: only megalodon.h and the plumbing are used.
*/
#include <errno.h>    // defines: errno
#include <inttypes.h> // defines: PRId64
#include <math.h>     // defines: isfinite, log
#include <signal.h>   // defines: sigaction
#include <stdlib.h>   // defines: free
#include <string.h>   // defines: memcpy, strlen, strerror
#include "plumbing/plumbing.h"

enum { PIECE = 2048 }; // tokens a forward pass reads at most, all rows together

static const char *model_path, *prompt, *prompt_path, *score_path, *state_in, *state_out, *tokenizer_path;
static int num_tokens = 256, num_samples = 1, threads, eot = -1, bos = -1;
static int64_t seed = 1337;
static Sampling sampling = {.temperature = 0.8, .top_p = 0.95};

static Option options[] = {
    {OPT_TEXT, "model", &model_path, .arg = "FILE", .help = "a checkpoint, or a run's folder: its newest"},
    {OPT_TEXT, "tokenizer", &tokenizer_path, .arg = "FILE",
     .help = "tokenizer.bin, for models whose tokens are not bytes"},
    {OPT_TEXT, "prompt", &prompt, .arg = "TEXT", .help = "the text to go on from"},
    {OPT_TEXT, "prompt-file", &prompt_path, .arg = "FILE", .help = "the same from a file"},
    {OPT_INT, "bos", &bos, -1, MAX_DIM,
     .help = "a token to put before the prompt; -1: none. Without a prompt: --eot, or 1 with a tokenizer"},
    {OPT_INT, "eot", &eot, -1, MAX_DIM, .help = "a sample ends where it would write this token; -1: none"},
    {OPT_INT, "num-tokens", &num_tokens, 0, INT32_MAX, .help = "tokens to write"},
    {OPT_INT, "num-samples", &num_samples, 1, PIECE,
     .help = "samples, at once; each under a line '---- sample 2 of 8'"},
    {OPT_REAL, "temperature", &sampling.temperature, 0, 100,
     .help = "logits are divided by it; 0: always the likeliest token"},
    {OPT_INT, "top-k", &sampling.top_k, 0, INT32_MAX, .help = "only the N likeliest tokens; 0: all"},
    {OPT_REAL, "top-p", &sampling.top_p, 0, 1, .help = "only the likeliest of these that make up this probability"},
    {OPT_REAL, "min-p", &sampling.min_p, 0, 1,
     .help = "only those of these at least X times as likely as the likeliest"},
    {OPT_INT64, "seed", &seed, 0, (double)INT64_MAX, .help = "of the random numbers: same seed, same text"},
    {OPT_TEXT, "state-out", &state_out, .arg = "FILE",
     .help = "write the state after the last token, also when interrupted"},
    {OPT_TEXT, "state-in", &state_in, .arg = "FILE",
     .help = "go on from such a state, its seed and samples; a prompt is read after it"},
    {OPT_TEXT, "score", &score_path, .arg = "FILE",
     .help = "write nothing, predict this text or .bin file: bits per byte or token"},
    {OPT_INT, "threads", &threads, 0, 1024, .help = "of the CPU; 0: all"},
    {OPT_END, .help = NULL},
};

static Tokenizer *tokenizer; // NULL: tokens are bytes

static volatile sig_atomic_t stopped; // the signal that asks to finish, 0 until then
static void on_signal(int number) { stopped = number; }

// What is carried along: all that the rows have read, and the logits after the last token of each, (B,V).
typedef struct {
    State *state;
    real *logits;
} Texts;

static Texts texts_new(const Config *c, int B) {
    Texts t = {state_new(c, B, 0), allocate((size_t)B * (size_t)c->vocab_size, sizeof *t.logits)};
    if (!t.state) fatal("out of memory for the state");
    return t;
}

// Of all that are needed at once: num_samples, and one more that reads the prompt, or as many that are put aside.
static size_t texts_bytes(const Config *c) {
    State *one = state_new(c, 1, 0);
    if (!one) fatal("out of memory for the state");
    const size_t bytes = one->bytes + (size_t)c->vocab_size * sizeof(real), samples = (size_t)num_samples;
    state_free(one);
    return bytes * (samples == 1 ? 1 : state_out && eot >= 0 ? 2 * samples : samples + 1);
}

static void texts_free(Texts *t) { state_free(t->state), free(t->logits); }

static void copy_text(const Texts *from, int i, Texts *to, int j, const Config *c) {
    const size_t V = (size_t)c->vocab_size;
    state_copy(from->state, i, to->state, j, c);
    memcpy(to->logits + (size_t)j * V, from->logits + (size_t)i * V, V * sizeof *to->logits);
}

// Every row reads the same n tokens.
static void read_tokens(Model *model, const Config *c, Texts *t, const int32_t *tokens, size_t n) {
    const size_t B = (size_t)t->state->B, V = (size_t)c->vocab_size, longest = PIECE / (size_t)num_samples;
    int32_t *rows = allocate(B * longest, sizeof *rows);
    for (size_t i = 0, L; i < n; i += L) {
        L = n - i < longest ? n - i : longest;
        for (size_t b = 0; b < B; b++) memcpy(rows + b * L, tokens + i, L * sizeof *rows);
        megalodon_forward(model, t->state, rows, (int)B, (int)L);
        for (size_t b = 0; i + L == n && b < B; b++) megalodon_logits(model, b * L + L - 1, 1, t->logits + b * V);
    }
    free(rows);
}

// The token before the text, -1 if there is none.
static int32_t start_token(void) {
    if (bos >= 0 || prompt || prompt_path || state_in) return bos;
    return eot >= 0 ? eot : tokenizer ? 1 : -1; // llama2.c's tokenizers begin a text with 1
}

// The start token and the text of --prompt or --prompt-file; if there is nothing at all, a line break.
static int32_t *get_prompt(const Config *c, size_t *count) {
    const int32_t start = start_token();
    const bool nothing = !prompt && !prompt_path && !state_in && start < 0;
    const unsigned char *bytes = (const unsigned char *)(prompt ? prompt : nothing ? "\n" : "");
    size_t n = strlen((const char *)bytes);
    if (prompt_path) {
        Tokens file = tokens_open(prompt_path, 256);
        if (file.width != 1) fatal("--prompt-file %s: holds token numbers, not text", prompt_path);
        bytes = file.bytes, n = file.count;
    }
    int32_t *text = tokenizer ? tokenizer_encode(tokenizer, bytes, n, count) : allocate(n + 1, sizeof *text);
    for (size_t i = 0; i < n && !tokenizer; i++) {
        text[i] = bytes[i];
        if (bytes[i] >= c->vocab_size)
            fatal("the prompt's byte %d is not among the model's %d tokens", bytes[i], c->vocab_size);
    }
    if (!tokenizer) *count = n;
    int32_t *tokens = allocate(*count + 1, sizeof *tokens);
    memcpy(tokens + (start >= 0), text, *count * sizeof *tokens);
    if (start >= 0) tokens[0] = start, ++*count;
    free(text);
    if (*count == 0 && !state_in) fatal("--prompt is empty: the model needs at least one token to start from");
    return tokens;
}

static void write_bytes(FILE *out, const void *bytes, size_t n) {
    if (fwrite(bytes, 1, n, out) != n || fflush(out) == EOF) fatal("stdout: %s", strerror(errno));
}

// first: it begins a text.
static void write_token(FILE *out, int32_t token, bool first) {
    const unsigned char byte = (unsigned char)token, *bytes = &byte;
    size_t length = 1;
    if (tokenizer) bytes = tokenizer_piece(tokenizer, token, first, &length);
    write_bytes(out, bytes, length);
}

// Draws the next token of every row that goes on, each at its place in the row's stream.
static void draw_tokens(const Texts *t, const Config *c, const bool *ended, int32_t *tokens) {
    const size_t B = (size_t)t->state->B, V = (size_t)c->vocab_size;
    int64_t *positions = allocate(B, sizeof *positions);
    state_read(t->state, (size_t)((const char *)t->state->count - (const char *)t->state->memory),
               B * sizeof *positions, positions);
    for (size_t b = 0; b < B; b++) {
        if (!ended[b])
            tokens[b] = sample_token(t->logits + b * V, c->vocab_size, &sampling,
                                     sample_uniform((uint64_t)seed, positions[b], (int)b));
    }
    free(positions);
}

// Writes up to num_tokens a row into the row's file; first: they begin the text. Returns how many. A row that has ended
// reads on with the others; for --state-out it is put aside, and comes back as it was.
static int64_t decode(Model *model, const Config *c, Texts *t, FILE **files, bool first) {
    const int B = t->state->B;
    const bool keeps = state_out && eot >= 0 && B > 1;
    int64_t written = 0;
    bool *ended = allocate((size_t)B, sizeof *ended);
    int32_t *tokens = allocate((size_t)B, sizeof *tokens);
    Texts aside = keeps ? texts_new(c, B) : (Texts){0};
    for (int i = 0, going = B; i < num_tokens && !stopped; i++) {
        draw_tokens(t, c, ended, tokens);
        for (int b = 0; b < B; b++) {
            if (ended[b]) continue;
            ended[b] = tokens[b] == eot;
            going -= ended[b], written += !ended[b];
            if (!ended[b]) write_token(files[b], tokens[b], first && i == 0);
            if (ended[b] && keeps) copy_text(t, b, &aside, b, c);
        }
        if (going == 0) break;
        megalodon_forward(model, t->state, tokens, B, 1);
        megalodon_logits(model, 0, (size_t)B, t->logits);
    }
    for (int b = 0; b < B && keeps; b++) {
        if (ended[b]) copy_text(&aside, b, t, b, c);
    }
    texts_free(&aside);
    free(ended), free(tokens);
    return written;
}

// The rows after the prompt: it is read once, for all; after a state by each.
static Texts read_prompt(Model *model, const Config *c, const int32_t *tokens, size_t count) {
    char err[ST_ERR];
    int64_t stored;
    Texts all = texts_new(c, num_samples);
    if (state_in) {
        if (!load_state(state_in, all.state, c, &stored, all.logits, err)) fatal("--state-in %s", err);
        if (!option_given(options, &seed)) seed = stored;
    }
    if (state_in || num_samples == 1) {
        read_tokens(model, c, &all, tokens, count);
        return all;
    }
    Texts one = texts_new(c, 1);
    read_tokens(model, c, &one, tokens, count);
    for (int b = 0; b < num_samples; b++) copy_text(&one, 0, &all, b, c);
    texts_free(&one);
    return all;
}

// A single sample goes out token by token; several are kept until all have ended.
static void generate(Model *model, const Config *c) {
    char err[ST_ERR];
    size_t count;
    const size_t hidden = start_token() >= 0, text = state_in ? SIZE_MAX : hidden; // text: where one begins
    const size_t samples = (size_t)num_samples;
    int32_t *tokens = get_prompt(c, &count);
    const double start = seconds();
    Texts all = read_prompt(model, c, tokens, count);
    const double read = seconds();

    char **written = allocate(samples, sizeof *written);
    size_t *sizes = allocate(samples, sizeof *sizes);
    FILE **files = allocate(samples, sizeof(FILE *));
    for (size_t b = 0; b < samples; b++) {
        files[b] = samples == 1 ? stdout : open_memstream(&written[b], &sizes[b]);
        if (files[b] == NULL) fatal("out of memory for the samples");
        for (size_t i = hidden; i < count; i++) write_token(files[b], tokens[i], i == text);
    }
    const int64_t n = decode(model, c, &all, files, count == text);
    const double end = seconds();
    for (size_t b = 0; b < samples && samples > 1; b++) {
        fclose(files[b]);
        printf("%s---- sample %zu of %zu\n", b > 0 ? "\n" : "", b + 1, samples);
        write_bytes(stdout, written[b], sizes[b]);
        free(written[b]);
    }
    if (state_out && !save_state(state_out, all.state, c, seed, all.logits, err)) fatal("--state-out %s", err);
    fprintf(stderr, "\n# read %zu tokens, %.0f tokens/s; wrote %" PRId64 ", %.0f tokens/s; seed %" PRId64 "\n", count,
            (double)count / (read - start + 1e-9), n, (double)n / (end - read + 1e-9), seed);
    texts_free(&all);
    free(tokens), free(written), free(sizes), free(files);
}

// Token i of what is scored: --bos if given, then the file's, which `encoded` has if they are not its bytes.
static int32_t scored_token(const Tokens *file, const int32_t *encoded, size_t i) {
    if (bos >= 0 && i-- == 0) return bos;
    return encoded ? encoded[i] : token_at(file, i);
}

// Predicts each token of a file from all before it, in constant memory. The first has nothing before it, unless --bos
// is, and is not counted. Ranges of positions double: a model that uses its context does better in the later ones.
static void score(Model *model, const Config *c) {
    enum { FIRST = 64, RANGES = 64 };
    Tokens file = tokens_open(score_path, tokenizer ? 65536 : c->vocab_size);
    size_t n = file.count, bytes = file.count, unpredicted;
    if (tokenizer && file.width != 1) fatal("--score %s: holds token numbers; leave out --tokenizer", score_path);
    int32_t *encoded = tokenizer ? tokenizer_encode(tokenizer, file.bytes, file.count, &n) : NULL;
    if (tokenizer && bos < 0) tokenizer_piece(tokenizer, encoded[0], true, &unpredicted), bytes -= unpredicted;
    if (bos < 0) n--;
    if (n == 0) fatal("--score %s: one token; nothing to predict", score_path);
    State *state = state_new(c, 1, 0);
    if (!state) fatal("out of memory for the state");
    int32_t *tokens = allocate(PIECE, sizeof *tokens), *targets = allocate(PIECE, sizeof *targets);
    real *losses = allocate(PIECE, sizeof *losses);
    double bits[RANGES] = {0}, total = 0, start = seconds();
    size_t counts[RANGES] = {0};
    const char *unit = file.width == 1 && !tokenizer ? "byte" : "token";
    for (size_t i = 0; i < n; i += PIECE) {
        int L = n - i < PIECE ? (int)(n - i) : PIECE;
        int64_t counted;
        for (int t = 0; t < L; t++) {
            tokens[t] = scored_token(&file, encoded, i + (size_t)t);
            targets[t] = scored_token(&file, encoded, i + (size_t)t + 1);
        }
        megalodon_forward(model, state, tokens, 1, L);
        megalodon_loss(model, targets, 0, &counted, losses);
        for (int t = 0; t < L; t++) {
            int range = 0;
            for (size_t p = (i + (size_t)t + 1) / FIRST; p > 0; p >>= 1) range++;
            bits[range] += losses[t] / log(2), counts[range]++;
        }
    }
    printf("%-25s %12s %9s %s\n", "positions", "predicted", "bits per", unit);
    for (int r = 0; r < RANGES && counts[r] > 0; r++) {
        size_t from = r == 0 ? 1 : (size_t)FIRST << (r - 1), to = from + counts[r] - 1;
        printf("%11zu .. %-11zu %12zu %14.4f\n", from, to, counts[r], bits[r] / (double)counts[r]);
        total += bits[r];
    }
    printf("%-25s %12zu %14.4f", "all", n, total / (double)n);
    if (tokenizer) printf(" = %.4f bits per byte of %zu", total / (double)bytes, bytes);
    write_bytes(stdout, "\n", 1);
    if (!isfinite(total)) fatal("--score %s: the loss is not finite", score_path);
    fprintf(stderr, "# %zu %ss in %.1f s, %.0f tokens/s\n", n, unit, seconds() - start,
            (double)n / (seconds() - start));
    state_free(state);
    free(tokens), free(targets), free(losses), free(encoded);
}

int main(int argc, char **argv) {
    guard_streams();
    options_parse(options, argc, argv,
                  "Writes text with a trained model, or scores a file with it.\n"
                  "  ./sample --model out --prompt \"Once\" --num-tokens 500\n");
    settle_threads(argv, threads);
    if (!model_path) usage_error("--model is needed: a checkpoint file or a run's folder");
    if (prompt && prompt_path) usage_error("--prompt and --prompt-file exclude each other");
    if (score_path && (prompt || prompt_path || state_in || state_out || option_given(options, &num_samples)))
        usage_error("--score reads its file only: no prompt, no state, no samples");
    if (threads > 0) megalodon_threads(threads);
    // a second one ends it at once; what is being written is not cut short
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)(SA_RESETHAND | SA_RESTART)};
    if (state_out) sigaction(SIGINT, &action, NULL), sigaction(SIGTERM, &action, NULL);

    StFile file;
    char err[ST_ERR];
    Config config = config_defaults();
    if (!checkpoint_open(&file, &config, model_path))
        fatal("%s: no configuration under the metadata key 'config'", model_path);
    if (tokenizer_path) tokenizer = tokenizer_open(tokenizer_path, config.vocab_size);
    if (!tokenizer && config.vocab_size > 256 && !score_path)
        fatal("%s: its %d tokens are not bytes; give the tokenizer that they are of with --tokenizer FILE", model_path,
              config.vocab_size);
    if (eot >= config.vocab_size || bos >= config.vocab_size)
        usage_error("--eot %d, --bos %d: the model has %d tokens", eot, bos, config.vocab_size);
    if (state_in) {
        const int rows = state_rows(state_in, err);
        if (rows == 0) fatal("--state-in %s", err);
        if (rows > PIECE) fatal("--state-in %s: %d samples; at most %d go on at once", state_in, rows, PIECE);
        if (option_given(options, &num_samples) && num_samples != rows)
            usage_error("--num-samples %d contradicts --state-in %s, which has %d", num_samples, state_in, rows);
        num_samples = rows;
    }
    check_memory(&config, MEGALODON_INFER, num_samples, PIECE / num_samples, texts_bytes(&config));
    Model *model = megalodon_new(&config, MEGALODON_INFER, num_samples, PIECE / num_samples);
    if (!model) fatal("out of memory for the model");
    checkpoint_load(&file, model, &config);
    if (score_path) {
        score(model, &config);
    } else {
        generate(model, &config);
    }
    megalodon_free(model);
    if (tokenizer) tokenizer_free(tokenizer);
    return stopped ? 128 + stopped : 0;
}
