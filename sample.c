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
    {OPT_INT, "bos", &bos, -1, MAX_DIM, .help = "a token to put before the prompt; -1: none"},
    {OPT_INT, "eot", &eot, -1, MAX_DIM, .help = "a sample ends where it would write this token; -1: none"},
    {OPT_INT, "num-tokens", &num_tokens, 0, INT32_MAX, .help = "tokens to write"},
    {OPT_INT, "num-samples", &num_samples, 1, PIECE, .help = "samples, at once; a line '---- sample 2 of 8' between"},
    {OPT_REAL, "temperature", &sampling.temperature, 0, 100,
     .help = "logits are divided by it; 0: always the likeliest token"},
    {OPT_INT, "top-k", &sampling.top_k, 0, INT32_MAX, .help = "only the N likeliest tokens; 0: all"},
    {OPT_REAL, "top-p", &sampling.top_p, 0, 1, .help = "only the likeliest of these that make up this probability"},
    {OPT_REAL, "min-p", &sampling.min_p, 0, 1,
     .help = "only those of these at least X times as likely as the likeliest"},
    {OPT_INT64, "seed", &seed, 0, (double)INT64_MAX, .help = "of the random numbers: same seed, same text"},
    {OPT_TEXT, "state-out", &state_out, .arg = "FILE", .help = "write the state after the last token"},
    {OPT_TEXT, "state-in", &state_in, .arg = "FILE",
     .help = "go on from such a state, its seed and samples; a prompt is read after it"},
    {OPT_TEXT, "score", &score_path, .arg = "FILE", .help = "write nothing, predict this file: bits per byte"},
    {OPT_INT, "threads", &threads, 0, 1024, .help = "of the CPU; 0: all"},
    {OPT_END, .help = NULL},
};

static Tokenizer *tokenizer; // NULL: tokens are bytes

static volatile sig_atomic_t stopped; // the signal that asks to finish, 0 until then
static void on_signal(int number) { stopped = number; }

// Every row reads the same n tokens. Leaves the logits after the last one in logits (B,V).
static void read_tokens(Model *model, const Config *c, State *state, const int32_t *tokens, size_t n, real *logits) {
    const size_t B = (size_t)state->B, V = (size_t)c->vocab_size, longest = PIECE / B;
    int32_t *rows = allocate(PIECE, sizeof *rows);
    for (size_t i = 0, L; i < n; i += L) {
        L = n - i < longest ? n - i : longest;
        for (size_t b = 0; b < B; b++) memcpy(rows + b * L, tokens + i, L * sizeof *rows);
        megalodon_forward(model, state, rows, (int)B, (int)L);
        for (size_t b = 0; i + L == n && b < B; b++) megalodon_logits(model, b * L + L - 1, 1, logits + b * V);
    }
    free(rows);
}

// Copies one part of a state of one row, (layers,1,size), into all rows of another, (layers,B,size).
static void spread_part(const State *one, const void *from, State *all, const void *to, size_t layers, size_t size) {
    const size_t first = (size_t)((const char *)from - (const char *)one->memory);
    const size_t target = (size_t)((const char *)to - (const char *)all->memory), B = (size_t)all->B;
    char *bytes = allocate(size, 1);
    for (size_t l = 0; l < layers; l++) {
        state_read(one, first + l * size, size, bytes);
        for (size_t b = 0; b < B; b++) state_write(all, target + (l * B + b) * size, size, bytes);
    }
    free(bytes);
}

static void spread(const State *one, State *all, const Config *c) {
    const size_t layers = (size_t)c->num_layers, G = (size_t)c->norm_num_groups, C = (size_t)c->chunk_size;
    spread_part(one, one->count, all, all->count, 1, sizeof *one->count);
    spread_part(one, one->mean, all, all->mean, layers + 1, G * sizeof *one->mean);
    spread_part(one, one->m2, all, all->m2, layers + 1, G * sizeof *one->m2);
    spread_part(one, one->h, all, all->h, layers, one->modes * sizeof *one->h);
    spread_part(one, one->k, all, all->k, layers, C * (size_t)c->z_dim * sizeof *one->k);
    spread_part(one, one->v, all, all->v, layers, C * (size_t)c->value_dim * sizeof *one->v);
}

static State *new_state(const Config *c, int B) {
    State *state = state_new(c, B, 0);
    if (!state) fatal("out of memory for the state");
    return state;
}

// --prompt, --prompt-file, or, with neither and no state, a start of the model's kind: --bos, --eot or a line break.
static int32_t *get_prompt(const Config *c, size_t *count) {
    const bool bare = !prompt && !prompt_path && !state_in && bos < 0;
    const unsigned char *bytes = (const unsigned char *)(prompt ? prompt : bare && eot < 0 ? "\n" : "");
    size_t n = strlen((const char *)bytes);
    if (prompt_path) {
        Tokens file = tokens_open(prompt_path, 256);
        if (file.width != 1) fatal("--prompt-file %s: holds token numbers, not text", prompt_path);
        bytes = file.bytes, n = file.count;
    }
    int32_t *text = tokenizer ? tokenizer_encode(tokenizer, bytes, n, count) : allocate(n + 1, sizeof *text);
    for (size_t i = 0; i < n && !tokenizer; i++) text[i] = bytes[i];
    if (!tokenizer) *count = n;
    const int32_t first = bare && eot >= 0 ? eot : bos;
    int32_t *tokens = allocate(*count + 1, sizeof *tokens);
    memcpy(tokens + (first >= 0), text, *count * sizeof *tokens);
    if (first >= 0) tokens[0] = first, ++*count;
    free(text);
    if (*count == 0 && !state_in) fatal("--prompt is empty: the model needs at least one token to start from");
    for (size_t i = 0; i < *count; i++) {
        if (tokens[i] >= c->vocab_size)
            fatal("the prompt's byte %d is not among the model's %d tokens", tokens[i], c->vocab_size);
    }
    return tokens;
}

static void write_token(FILE *out, int32_t token, bool first) {
    const unsigned char byte = (unsigned char)token, *bytes = &byte;
    size_t length = 1;
    if (token == eot || token == bos) return;
    if (tokenizer) bytes = tokenizer_piece(tokenizer, token, first, &length);
    if (fwrite(bytes, 1, length, out) != length || fflush(out) == EOF) fatal("stdout: %s", strerror(errno));
}

// Draws a row's next token, at its place in the row's stream.
static int32_t draw_token(const State *state, const Config *c, const real *logits, int row) {
    int64_t position;
    const size_t count = (size_t)((const char *)state->count - (const char *)state->memory);
    state_read(state, count + (size_t)row * sizeof position, sizeof position, &position);
    return sample_token(logits + (size_t)row * (size_t)c->vocab_size, c->vocab_size, &sampling,
                        sample_uniform((uint64_t)seed, position, row));
}

// Writes up to num_tokens a row; a single row's go out at once, those of several are kept in texts. Returns how many.
static int64_t decode(Model *model, const Config *c, State *state, real *logits, FILE **texts, bool first) {
    const int B = state->B;
    int64_t written = 0;
    bool *done = allocate((size_t)B, sizeof *done);
    int32_t *tokens = allocate((size_t)B, sizeof *tokens);
    for (int i = 0, going = B; i < num_tokens && going > 0 && !stopped; i++) {
        for (int b = 0; b < B; b++) {
            if (done[b]) continue; // goes on reading its last token, which nobody sees
            tokens[b] = draw_token(state, c, logits, b);
            done[b] = tokens[b] == eot;
            going -= done[b], written += !done[b];
            if (!done[b]) write_token(texts[b], tokens[b], first && i == 0);
        }
        if (going == 0) break;
        megalodon_forward(model, state, tokens, B, 1);
        megalodon_logits(model, 0, (size_t)B, logits);
    }
    free(done), free(tokens);
    return written;
}

static void generate(Model *model, const Config *c) {
    char err[ST_ERR];
    int64_t stored;
    size_t count;
    State *state = new_state(c, num_samples);
    real *logits = allocate((size_t)num_samples * (size_t)c->vocab_size, sizeof *logits);
    int32_t *tokens = get_prompt(c, &count);
    const double start = seconds();
    if (state_in) {
        if (!load_state(state_in, state, c, &stored, logits, err)) fatal("--state-in %s", err);
        if (!option_given(options, &seed)) seed = stored;
        read_tokens(model, c, state, tokens, count, logits);
    } else { // the prompt once, for all
        State *one = new_state(c, 1);
        read_tokens(model, c, one, tokens, count, logits);
        spread(one, state, c);
        for (int b = 1; b < num_samples; b++)
            memcpy(logits + (size_t)b * (size_t)c->vocab_size, logits, (size_t)c->vocab_size * sizeof *logits);
        state_free(one);
    }
    const double read = seconds();

    const size_t start_of_text = state_in ? SIZE_MAX : count > 0 && (tokens[0] == bos || tokens[0] == eot);
    char **texts = allocate((size_t)num_samples, sizeof *texts);
    size_t *sizes = allocate((size_t)num_samples, sizeof *sizes);
    FILE **files = allocate((size_t)num_samples, sizeof(FILE *));
    for (int b = 0; b < num_samples; b++) {
        files[b] = num_samples == 1 ? stdout : open_memstream(&texts[b], &sizes[b]);
        if (files[b] == NULL) fatal("out of memory for the samples");
        for (size_t i = 0; i < count; i++) write_token(files[b], tokens[i], i == start_of_text);
    }
    const int64_t written = decode(model, c, state, logits, files, count == start_of_text);
    const double end = seconds();
    for (int b = 0; b < num_samples && num_samples > 1; b++) {
        fclose(files[b]);
        printf("%s---- sample %d of %d\n", b > 0 ? "\n" : "", b + 1, num_samples);
        if (fwrite(texts[b], 1, sizes[b], stdout) != sizes[b] || fflush(stdout) == EOF)
            fatal("stdout: %s", strerror(errno));
        free(texts[b]);
    }
    if (state_out && !save_state(state_out, state, c, seed, logits, err)) fatal("--state-out %s", err);
    fprintf(stderr, "\n# read %zu tokens, %.0f tokens/s; wrote %" PRId64 ", %.0f tokens/s; seed %" PRId64 "\n", count,
            (double)count / (read - start + 1e-9), written, (double)written / (end - read + 1e-9), seed);
    state_free(state);
    free(logits), free(tokens), free(texts), free(sizes), free(files);
}

// Predicts each token of a file from all before it, in constant memory. The first has nothing before it and is
// not counted. Ranges of positions double: a model that uses its context does better in the later ones.
static void score(Model *model, const Config *c) {
    enum { FIRST = 64, RANGES = 64 };
    size_t n;
    Tokens file = tokens_open(score_path, tokenizer ? 65536 : c->vocab_size);
    int32_t *encoded = NULL; // the file's text as tokens, if they are not its bytes
    if (tokenizer && file.width != 1) fatal("--score %s: holds token numbers; leave out --tokenizer", score_path);
    if (tokenizer)
        encoded = tokenizer_encode(tokenizer, file.bytes, file.count, &n);
    else
        n = file.count;
    State *state = new_state(c, 1);
    int32_t *tokens = allocate(PIECE, sizeof *tokens), *targets = allocate(PIECE, sizeof *targets);
    real *losses = allocate(PIECE, sizeof *losses);
    double bits[RANGES] = {0}, total = 0, start = seconds();
    size_t counts[RANGES] = {0};
    const char *unit = file.width == 1 && !tokenizer ? "byte" : "token";
    if (--n == 0) fatal("--score %s: one token; nothing to predict", score_path);
    for (size_t i = 0; i < n; i += PIECE) {
        int L = n - i < PIECE ? (int)(n - i) : PIECE;
        int64_t counted;
        for (int t = 0; t < L; t++) {
            const size_t at = i + (size_t)t;
            tokens[t] = encoded ? encoded[at] : token_at(&file, at);
            targets[t] = encoded ? encoded[at + 1] : token_at(&file, at + 1);
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
    printf("%-25s %12zu %14.4f\n", "all", n, total / (double)n);
    if (tokenizer) printf("%-25s %12zu %14.4f\n", "bits per byte", file.count, total / (double)file.count);
    if (!isfinite(total)) fatal("--score %s: the loss is not finite", score_path);
    fprintf(stderr, "# %zu %ss in %.1f s, %.0f tokens/s\n", n, unit, seconds() - start,
            (double)n / (seconds() - start));
    state_free(state);
    free(tokens), free(targets), free(losses), free(encoded);
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
    if (threads > 0) megalodon_threads(threads);
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESETHAND}; // a second one ends it at once
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
        if (rows == 0 || rows > PIECE) fatal("--state-in %s", rows == 0 ? err : state_in);
        if (option_given(options, &num_samples) && num_samples != rows)
            usage_error("--num-samples %d contradicts --state-in %s, which has %d", num_samples, state_in, rows);
        num_samples = rows;
    }
    State *one = new_state(&config, 1);
    check_memory(&config, MEGALODON_INFER, num_samples, PIECE / num_samples, one->bytes * (size_t)num_samples);
    state_free(one);
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
