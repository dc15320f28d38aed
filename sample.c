/*
sample.c: the generating program. Reads a prompt in forward passes of up to PIECE tokens, then writes one token
after another, each from the logits after the one before; the state that is carried along does not grow. Several
samples are the rows of one batch. --score reads a file of any length the same way and says how well the model
predicts it. Works on any backend: only megalodon.h and the plumbing are used.
*/
#include <errno.h>    // defines: errno
#include <inttypes.h> // defines: PRId64
#include <math.h>     // defines: INFINITY, isfinite, log
#include <signal.h>   // defines: sigaction
#include <stdlib.h>   // defines: free, realloc
#include <string.h>   // defines: memcmp, memcpy, strcmp, strlen, strerror
#include <sys/stat.h> // defines: fstat
#include "plumbing/plumbing.h"

enum { PIECE = 2048 }; // tokens a forward pass reads at most, all rows together

static const char *model_path, *prompt, *prompt_path, *score_path, *state_in, *state_out, *tokenizer_path;
static int num_tokens = 256, num_samples = 1, threads, eot = -1, bos = -1;
static int64_t seed = 1337;
static Sampling sampling = {.temperature = 0.8, .top_p = 0.95};

static Option options[] = {
    {OPT_PATH, "model", &model_path, .arg = "FILE", .help = "a checkpoint, or a run's folder: its newest"},
    {OPT_PATH, "tokenizer", &tokenizer_path, .arg = "FILE",
     .help = "tokenizer.bin, for models whose tokens are not bytes"},
    {OPT_TEXT, "prompt", &prompt, .arg = "TEXT", .help = "the text to go on from"},
    {OPT_PATH, "prompt-file", &prompt_path, .arg = "FILE", .help = "the same from a file; -: from standard input"},
    {OPT_INT, "eot", &eot, -1, MAX_DIM,
     .help = "the token between documents: a text begins with it, and ends where it would be written; -1: none"},
    {OPT_INT, "bos", &bos, -1, MAX_DIM,
     .help = "begin texts with this token instead (with a tokenizer, no prompt and no --eot: 1); given as -1: none"},
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
    {OPT_PATH, "state-out", &state_out, .arg = "FILE",
     .help = "write the state after the last token, also when interrupted"},
    {OPT_PATH, "state-in", &state_in, .arg = "FILE",
     .help = "go on from such a state, its seed and samples; a prompt is read after it"},
    {OPT_PATH, "score", &score_path, .arg = "FILE",
     .help = "write nothing, predict this text or .bin file: bits per byte or token"},
    {OPT_INT, "threads", &threads, 0, 1024, .help = "of the CPU; 0: all"},
    {OPT_END, .help = NULL},
};

static Tokenizer *tokenizer; // NULL: tokens 0 to 255 are bytes, if there are more these are special

// Without a tokenizer, are the tokens bytes, and those from 256 on special? They are if the vocabulary is too small for
// a tokenizer, which has 256 bytes and <unk>, <s> and </s>, or if --eot says so, of a padded vocabulary perhaps.
enum { MIN_TOKENIZER = 259, MAX_BYTES = 512 };
static bool tokens_are_bytes(const Config *c) {
    return !tokenizer_path && (c->vocab_size < MIN_TOKENIZER || (eot >= 256 && c->vocab_size <= MAX_BYTES));
}

// The first tokens of the vocabulary, which have a text; of the others only the EOT is ever drawn.
static int text_tokens(const Config *c) {
    const int count = tokenizer_count(tokenizer);
    return count < c->vocab_size ? count : c->vocab_size;
}

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

// The token before the text, -1 if there is none: what rows begin with in training.
static int32_t start_token(void) {
    if (option_given(options, &bos) || state_in) return bos;
    return eot >= 0 ? eot : tokenizer && !prompt && !prompt_path ? 1 : -1; // llama2.c's tokenizers begin a text with 1
}

// Refuses what does not fit: the model, and what a command takes besides, with a prompt, or a file to encode, of `text`
// bytes.
static void plan_memory(const Config *c, size_t text) {
    const size_t samples = (size_t)num_samples, V = (size_t)c->vocab_size, most = SIZE_MAX / 16;
    // two of all texts if those that have ended are put aside, one more if one reads the prompt for the others
    const bool aside = state_out && eot >= 0 && samples > 1, reader = samples > 1 && !state_in && !aside;
    const size_t all = state_bytes(c, num_samples, 0), one = state_bytes(c, 1, 0);
    const size_t logits = (samples * (aside ? 2 : 1) + reader) * V * sizeof(real);
    const size_t states = all < most ? all * (aside ? 2 : 1) + (reader ? one : 0) + logits : most;
    const size_t written = samples > 1 ? samples * (size_t)num_tokens * sizeof(int32_t) : 0;
    const size_t vocabulary = tokenizer_path ? 32 * V : 0; // pieces and their table
    const size_t prompts = text + (text + 2) * sizeof(int32_t) + (tokenizer_path ? tokenizer_encode_bytes(text) : 0);
    const size_t others = sample_bytes(c->vocab_size) + vocabulary + 4 * PIECE * sizeof(real);
    const double mib = 1048576, available = (double)megalodon_available_memory(1) / mib;
    const double room = available > 0 ? available : INFINITY; // check_memory says why there is none
    if ((double)states / mib > room)
        fatal(
            "%d samples: what the model remembers of their texts needs %.0f MiB, %.0f MiB a text with its chunk of %d "
            "tokens; there are %.0f MiB for %s: use %s",
            num_samples, (double)states / mib, (double)one / mib, c->chunk_size, room, megalodon_backend(),
            samples > 1 ? "a smaller --num-samples" : "a smaller model");
    if ((double)written / mib > room)
        fatal("--num-samples %d --num-tokens %d: several texts are kept until all have ended, which needs %.0f MiB; "
              "there are %.0f MiB: use smaller numbers",
              num_samples, num_tokens, (double)written / mib, room);
    if ((double)prompts / mib > room)
        fatal("--%s: %zu bytes of text need %.0f MiB as tokens; there are %.0f MiB: use a shorter text",
              score_path    ? "score"
              : prompt_path ? "prompt-file"
                            : "prompt",
              text, (double)prompts / mib, room);
    check_memory(c, MEGALODON_INFER, num_samples, PIECE / num_samples, states, written + prompts + others);
}

typedef struct {
    FILE *file; // NULL: there is none
    unsigned char *bytes;
    size_t count;
} Prompt;

static Prompt prompt_open(void) {
    Prompt p = {0};
    if (prompt) p.bytes = (unsigned char *)(uintptr_t)prompt, p.count = strlen(prompt);
    if (prompt_path) p.file = strcmp(prompt_path, "-") == 0 ? stdin : fopen(prompt_path, "rb");
    if (prompt_path && p.file == NULL) fatal("--prompt-file %s: %s", prompt_path, strerror(errno));
    return p;
}

// Reads a prompt's file, a pipe perhaps, to its end. Memory is planned anew whenever more is needed.
static void prompt_read(Prompt *p, const Config *c) {
    static const unsigned char token_file[4] = {0x88, 0xD8, 0x34, 0x01}; // the magic number 20240520
    struct stat info = {0};
    if (p->file == NULL) return;
    const bool regular = fstat(fileno(p->file), &info) == 0 && S_ISREG(info.st_mode);
    size_t room = regular ? (size_t)info.st_size + 1 : 1 << 16;
    for (size_t n = 1; n > 0; p->count += n) {
        if (p->count == room) room *= 2;
        plan_memory(c, room);
        unsigned char *bytes = realloc(p->bytes, room);
        if (bytes == NULL) fatal("--prompt-file %s: out of memory after %zu bytes", prompt_path, p->count);
        p->bytes = bytes;
        n = fread(bytes + p->count, 1, room - p->count, p->file);
    }
    if (ferror(p->file)) fatal("--prompt-file %s: %s", prompt_path, strerror(errno));
    if (p->count >= sizeof token_file && memcmp(p->bytes, token_file, sizeof token_file) == 0)
        fatal("--prompt-file %s: holds token numbers, not text", prompt_path);
    if (p->file != stdin) fclose(p->file);
}

// The start token and the tokens of the prompt; if there is nothing at all, a line break.
static int32_t *prompt_tokens(const Prompt *p, const Config *c, size_t *count) {
    const int32_t start = start_token();
    const bool nothing = !prompt && !prompt_path && !state_in && start < 0;
    const unsigned char *bytes = nothing ? (const unsigned char *)"\n" : p->bytes;
    const size_t n = nothing ? 1 : p->count, hidden = start >= 0;
    int32_t *text = tokenizer ? tokenizer_encode(tokenizer, bytes, n, !state_in, count) : NULL;
    if (!tokenizer) *count = n;
    int32_t *tokens = allocate(hidden + *count + 1, sizeof *tokens);
    if (hidden) tokens[0] = start;
    for (size_t i = 0; i < *count; i++) {
        tokens[hidden + i] = tokenizer ? text[i] : bytes[i];
        if (!tokenizer && bytes[i] >= c->vocab_size)
            fatal("the prompt's byte %d is not among the model's %d tokens", bytes[i], c->vocab_size);
    }
    free(text);
    *count += hidden;
    if (*count == 0 && !state_in)
        fatal("--prompt%s is empty: the model needs at least one token to start from", prompt ? "" : "-file");
    return tokens;
}

static void flush_output(void) {
    if (fflush(stdout) == EOF || ferror(stdout)) fatal("stdout: %s", strerror(errno));
}

// first: it begins a text.
static void write_token(int32_t token, bool first) {
    size_t length;
    const unsigned char *bytes = tokenizer_piece(tokenizer, token, first, &length);
    if (fwrite(bytes, 1, length, stdout) != length) fatal("stdout: %s", strerror(errno));
}

// Draws the next token of every row that goes on, each at its place in the row's stream.
static void draw_tokens(const Texts *t, const Config *c, const bool *ended, int32_t *tokens) {
    const size_t B = (size_t)t->state->B, V = (size_t)c->vocab_size;
    int64_t *positions = allocate(B, sizeof *positions);
    state_read(t->state, (size_t)((const char *)t->state->count - (const char *)t->state->memory),
               B * sizeof *positions, positions);
    for (size_t b = 0; b < B; b++) {
        if (!ended[b])
            tokens[b] = sample_token(t->logits + b * V, text_tokens(c), &sampling,
                                     sample_uniform((uint64_t)seed, positions[b], (int)b));
    }
    free(positions);
}

// Draws up to num_tokens a row: a single row's are written, of several `written` (B, num_tokens) and `counts` (B) get
// them. first: they begin the text. Returns how many. A row that has ended reads on with the others; for --state-out it
// is put aside, and comes back as it was.
static int64_t decode(Model *model, const Config *c, Texts *t, int32_t *written, size_t *counts, bool first) {
    const int B = t->state->B;
    const bool keeps = state_out && eot >= 0 && B > 1;
    int64_t total = 0;
    bool *ended = allocate((size_t)B, sizeof *ended);
    int32_t *tokens = allocate((size_t)B, sizeof *tokens);
    Texts aside = keeps ? texts_new(c, B) : (Texts){0};
    for (int i = 0, going = B; i < num_tokens && !stopped; i++) {
        draw_tokens(t, c, ended, tokens);
        for (int b = 0; b < B; b++) {
            if (ended[b]) continue;
            ended[b] = tokens[b] == eot;
            going -= ended[b], total += !ended[b];
            if (!ended[b] && B == 1) write_token(tokens[b], first && i == 0), flush_output();
            if (!ended[b] && B > 1) written[(size_t)b * (size_t)num_tokens + counts[b]++] = tokens[b];
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
    return total;
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
static void generate(Model *model, const Config *c, const int32_t *tokens, size_t count) {
    char err[ST_ERR];
    const size_t hidden = start_token() >= 0, text = state_in ? SIZE_MAX : hidden; // text: where one begins
    const size_t samples = (size_t)num_samples;
    const double start = seconds();
    Texts all = read_prompt(model, c, tokens, count);
    const double read = seconds();

    int32_t *written = allocate(samples > 1 ? samples * (size_t)num_tokens : 0, sizeof *written);
    size_t *counts = allocate(samples, sizeof *counts);
    for (size_t i = hidden; i < count && samples == 1; i++) write_token(tokens[i], i == text);
    flush_output();
    const int64_t n = decode(model, c, &all, written, counts, count == text);
    const double end = seconds();
    for (size_t b = 0; b < samples && samples > 1; b++) {
        printf("%s---- sample %zu of %zu\n", b > 0 ? "\n" : "", b + 1, samples);
        for (size_t i = hidden; i < count; i++) write_token(tokens[i], i == text);
        for (size_t i = 0; i < counts[b]; i++)
            write_token(written[b * (size_t)num_tokens + i], count == text && i == 0);
    }
    flush_output();
    if (state_out && !save_state(state_out, all.state, c, seed, all.logits, err)) fatal("--state-out %s", err);
    fprintf(stderr, "\n# read %zu tokens, %.0f tokens/s; wrote %" PRId64 ", %.0f tokens/s; seed %" PRId64 "\n", count,
            (double)count / (read - start + 1e-9), n, (double)n / (end - read + 1e-9), seed);
    texts_free(&all);
    free(written), free(counts);
}

// Token i of what is scored: the start token if there is one, then the file's, which `encoded` has if they are not its
// bytes.
static int32_t scored_token(const Tokens *file, const int32_t *encoded, int32_t start, size_t i) {
    if (start >= 0 && i-- == 0) return start;
    return encoded ? encoded[i] : token_at(file, i);
}

// Predicts each token of a file from all before it, in constant memory. It begins as training rows do, with --eot's
// token, unless the file does or --bos says otherwise. A first token with nothing before it is not counted. Ranges of
// positions double: a model that uses its context does better in the later ones.
static void score(Model *model, const Config *c, const Tokens *file) {
    enum { FIRST = 64, RANGES = 64 };
    int32_t start = start_token();
    if (!option_given(options, &bos) && (eot < 0 || (!tokenizer && token_at(file, 0) == eot))) start = -1;
    size_t n = file->count, bytes = 0, length;
    int32_t *encoded = tokenizer ? tokenizer_encode(tokenizer, file->bytes, file->count, true, &n) : NULL;
    if (start < 0) n--;
    if (n == 0) fatal("--score %s: one token; nothing to predict", score_path);
    if (tokenizer) bytes = file->count;
    if (tokenizer && start < 0) tokenizer_piece(tokenizer, encoded[0], true, &length), bytes -= length;
    State *state = state_new(c, 1, 0);
    if (!state) fatal("out of memory for the state");
    int32_t *tokens = allocate(PIECE, sizeof *tokens), *targets = allocate(PIECE, sizeof *targets);
    real *losses = allocate(PIECE, sizeof *losses);
    double bits[RANGES] = {0}, total = 0, begun = seconds();
    size_t counts[RANGES] = {0};
    for (size_t i = 0; i < n; i += PIECE) {
        int L = n - i < PIECE ? (int)(n - i) : PIECE;
        int64_t counted;
        for (int t = 0; t < L; t++) {
            tokens[t] = scored_token(file, encoded, start, i + (size_t)t);
            targets[t] = scored_token(file, encoded, start, i + (size_t)t + 1);
            bytes += tokens_are_bytes(c) && targets[t] < 256;
        }
        megalodon_forward(model, state, tokens, 1, L);
        megalodon_loss(model, targets, 0, &counted, losses);
        for (int t = 0; t < L; t++) {
            int range = 0;
            for (size_t p = (i + (size_t)t + 1) / FIRST; p > 0; p >>= 1) range++;
            bits[range] += losses[t] / log(2), counts[range]++;
        }
    }
    const char *unit = tokens_are_bytes(c) && bytes == n ? "byte" : "token";
    printf("%-25s %12s %9s %s\n", "positions", "predicted", "bits per", unit);
    for (int r = 0; r < RANGES && counts[r] > 0; r++) {
        size_t from = r == 0 ? 1 : (size_t)FIRST << (r - 1), to = from + counts[r] - 1;
        printf("%11zu .. %-11zu %12zu %14.4f\n", from, to, counts[r], bits[r] / (double)counts[r]);
        total += bits[r];
    }
    printf("%-25s %12zu %14.4f", "all", n, total / (double)n);
    // all tokens' bits, those of EOTs too, for each byte of text
    if (bytes > 0 && strcmp(unit, "token") == 0) printf(" = %.4f bits per byte of %zu", total / (double)bytes, bytes);
    printf("\n");
    flush_output();
    if (!isfinite(total)) fatal("--score %s: the loss is not finite", score_path);
    fprintf(stderr, "# %zu %ss in %.1f s, %.0f tokens/s\n", n, unit, seconds() - begun,
            (double)n / (seconds() - begun));
    state_free(state);
    free(tokens), free(targets), free(losses), free(encoded);
}

static bool is_state(const char *path) { // one of ./sample's: those of ./train are parts of checkpoints
    StFile f;
    char err[ST_ERR];
    if (!st_open(&f, path, err)) return false;
    const bool ok = st_find(&f, "state.count") != NULL && st_find(&f, "state.logits") != NULL;
    st_close(&f);
    return ok;
}

// Checks what needs no more than the configuration and the headers of files; these are claimed as inputs.
static void check_inputs(const Config *c, const StFile *model) {
    char err[ST_ERR], remedy[160] = "";
    claim_input("model", model->path);
    if (eot >= c->vocab_size || bos >= c->vocab_size)
        usage_error("--%s %d: must be below the vocabulary size, %d", eot >= c->vocab_size ? "eot" : "bos",
                    eot >= c->vocab_size ? eot : bos, c->vocab_size);
    if (c->vocab_size <= MAX_BYTES)
        snprintf(remedy, sizeof remedy,
                 ", or, if its tokens 0 to 255 are bytes, the token between documents with "
                 "--eot N, from 256 to %d",
                 c->vocab_size - 1);
    if (!tokenizer_path && !score_path && !tokens_are_bytes(c))
        fatal("%s: a vocabulary of %d tokens is not bytes; give the model's tokenizer with --tokenizer FILE%s",
              model_path, c->vocab_size, remedy);
    if (tokenizer_path) claim_input("tokenizer", tokenizer_path);
    if (prompt_path && strcmp(prompt_path, "-") != 0) claim_input("prompt-file", prompt_path);
    if (score_path) claim_input("score", score_path);
    if (state_in) {
        claim_input("state-in", state_in);
        const int rows = state_rows(state_in, err);
        if (rows == 0) fatal("--state-in %s", err);
        if (rows > PIECE) fatal("--state-in %s: %d samples; at most %d go on at once", state_in, rows, PIECE);
        if (option_given(options, &num_samples) && num_samples != rows)
            usage_error("--num-samples %d contradicts --state-in %s, which has %d", num_samples, state_in, rows);
        num_samples = rows;
    }
}

int main(int argc, char **argv) {
    guard_streams();
    settle_threads(argv);
    options_parse(options, argc, argv,
                  "Writes text with a trained model, or scores a file with it.\n"
                  "  ./sample --model out --prompt \"Once\" --num-tokens 500\n");
    if (!model_path) usage_error("--model is needed: a checkpoint file or a run's folder");
    if (prompt && prompt_path) usage_error("--prompt and --prompt-file exclude each other");
    if (score_path && (prompt || prompt_path || state_in || state_out || option_given(options, &num_samples)))
        usage_error("--score reads its file only: no prompt, no state, no samples");
    if (threads > 0) megalodon_threads(threads);
    StFile file;
    Config config = config_defaults();
    if (!checkpoint_open(&file, &config, model_path))
        fatal("%s: no configuration under the metadata key 'config'", model_path);
    check_inputs(&config, &file);
    Prompt text = prompt_open();
    Tokens scored = {0};
    if (score_path) scored = tokens_open(score_path, tokenizer_path ? 65536 : config.vocab_size);
    if (tokenizer_path && score_path && scored.width != 1)
        fatal("--score %s: holds token numbers; leave out --tokenizer", score_path);
    plan_memory(&config, tokenizer_path ? scored.count + text.count : text.count);
    if (tokenizer_path) tokenizer = tokenizer_open(tokenizer_path, config.vocab_size);
    if (tokenizer && tokenizer_count(tokenizer) < config.vocab_size)
        fprintf(stderr, "# --tokenizer %s: %d tokens; the model's other %d are taken for padding\n", tokenizer_path,
                tokenizer_count(tokenizer), config.vocab_size - tokenizer_count(tokenizer));
    sampling.eot = eot > 0 ? eot : 0;
    if (state_out) state_out = claim_output("state-out", state_out, "a state of ./sample", is_state);
    keep_created();

    size_t count = 0;
    prompt_read(&text, &config);
    int32_t *tokens = score_path ? NULL : prompt_tokens(&text, &config, &count);
    // from here on a signal ends the text, with its state; a second one ends the program at once
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = (int)(SA_RESETHAND | SA_RESTART)};
    if (state_out) sigaction(SIGINT, &action, NULL), sigaction(SIGTERM, &action, NULL);
    Model *model = megalodon_new(&config, MEGALODON_INFER, num_samples, PIECE / num_samples);
    if (!model) fatal("out of memory for the model");
    checkpoint_load(&file, model, &config);
    if (score_path) {
        score(model, &config, &scored);
    } else {
        generate(model, &config, tokens, count);
    }
    free(tokens);
    if (prompt_path) free(text.bytes);
    megalodon_free(model);
    if (tokenizer) tokenizer_free(tokenizer);
    return stopped ? 128 + stopped : 0;
}
