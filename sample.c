// ./sample: generates text with a trained model. Reads the prompt in forward passes of up to pass_len tokens, then
// decodes token by token; the state has constant size. Several samples are the rows of one batch. With --score it reads
// a file of any length the same way and prints how well the model predicts it. With --interactive it reads a line and
// continues the text, again and again.
#include <errno.h>    // defines: errno
#include <inttypes.h> // defines: PRId64
#include <math.h>     // defines: INFINITY, exp, fmax, isfinite, log
#include <signal.h>   // defines: sigaction
#include <stdlib.h>   // defines: free, realloc
#include <string.h>   // defines: memcmp, memcpy, strcmp, strlen, strerror
#include <sys/stat.h> // defines: fstat
#include <unistd.h>   // defines: isatty
#include "plumbing/plumbing.h"

enum { MIN_PASS = 2048, MAX_PASS = 16384 };
static size_t pass_len = MIN_PASS; // maximum number of tokens in a forward pass, all rows together; see plan_memory

static const char *model_path, *prompt, *prompt_path, *score_path, *state_in, *state_out, *tokenizer_path;
static const char *color = "never";
static int num_tokens = 256, num_samples = 1, threads, eot = -1, bos = -1, interactive;
static int64_t seed = 1337;
static Sampling sampling = {.temperature = 0.8, .top_p = 0.95};

static Option options[] = {
    {OPT_PATH, "model", &model_path, .arg = "FILE",
     .help = "a model file, or a run's directory: its newest checkpoint (dev/models/plays: a model of Shakespeare's plays)"},
    {OPT_PATH, "tokenizer", &tokenizer_path, .arg = "FILE",
     .help = "tokenizer.bin, for models whose tokens are not bytes"},
    {OPT_TEXT, "prompt", &prompt, .arg = "TEXT", .help = "the text to continue"},
    {OPT_PATH, "prompt-file", &prompt_path, .arg = "FILE", .help = "the same from a file; -: standard input"},
    {OPT_SWITCH, "interactive", &interactive,
     .help = "read a line, continue the text, and so on; Ctrl-C stops a continuation, Ctrl-D leaves"},
    {OPT_INT, "eot", &eot, -1, MAX_DIM,
     .help = "token between documents: a text begins with it, and ends when it is drawn; -1: none"},
    {OPT_INT, "bos", &bos, -1, MAX_DIM,
     .help = "begin texts with this token instead (with a tokenizer, no prompt and no --eot: 1); -1: none"},
    {OPT_INT, "num-tokens", &num_tokens, 0, INT32_MAX, .help = "number of tokens to write"},
    {OPT_INT, "num-samples", &num_samples, 1, MIN_PASS,
     .help = "number of samples, generated as one batch; each under a line '---- sample 2 of 8'"},
    {OPT_REAL, "temperature", &sampling.temperature, 0, 100,
     .help = "divides the logits; 0: always the most likely token"},
    {OPT_INT, "top-k", &sampling.top_k, 0, INT32_MAX, .help = "only the N most likely tokens; 0: all"},
    {OPT_REAL, "top-p", &sampling.top_p, 0, 1, .help = "of these, only the fewest whose probabilities sum to X"},
    {OPT_REAL, "min-p", &sampling.min_p, 0, 1,
     .help = "of these, only those at least X times as likely as the most likely"},
    {OPT_TEXT, "color", &color, .arg = "WHEN",
     .help = "colour text by its probability, from red (unlikely) to green: never, always, auto (on a terminal)"},
    {OPT_INT64, "seed", &seed, 0, (double)INT64_MAX,
     .help = "of the random numbers; the same seed gives the same text"},
    {OPT_PATH, "state-out", &state_out, .arg = "FILE",
     .help = "write the state after the last token, also after a signal"},
    {OPT_PATH, "state-in", &state_in, .arg = "FILE",
     .help = "continue from such a state, its seed and samples; a prompt is read after it"},
    {OPT_PATH, "score", &score_path, .arg = "FILE",
     .help = "print how well the model predicts this text or .bin file: bits per byte or token"},
    {OPT_INT, "threads", &threads, 0, 1024, .help = "CPU threads; 0: one per core"},
    {OPT_END, .help = NULL},
};

static Tokenizer *tokenizer; // NULL: tokens 0 to 255 are bytes, the others are special

// Returns whether tokens are bytes, and those from 256 on special. Without --tokenizer they are if the vocabulary is
// too small for a tokenizer, which has 256 bytes and <unk>, <s> and </s>, or if --eot is a token above the bytes.
enum { MIN_TOKENIZER = 259, MAX_BYTES = 512 };
static bool tokens_are_bytes(const Config *c) {
    return !tokenizer_path && (c->vocab_size < MIN_TOKENIZER || (eot >= 256 && c->vocab_size <= MAX_BYTES));
}

// Number of tokens that may be drawn. Of the tokens above, which are padding, only the EOT is drawn.
static int text_tokens(const Config *c) {
    const int count = tokenizer_count(tokenizer);
    return count < c->vocab_size ? count : c->vocab_size;
}

static volatile sig_atomic_t stop_signal; // number of the signal that asked to stop; 0: none
static void on_signal(int number) { stop_signal = number; }
// From here on a signal ends the text. flags: those of sigaction(). With SA_RESTART the call that a signal interrupts
// goes on, so no output is lost.
static void catch_signals(int flags) {
    const struct sigaction action = {.sa_handler = on_signal, .sa_flags = flags};
    sigaction(SIGINT, &action, NULL), sigaction(SIGTERM, &action, NULL);
}

typedef struct {
    State *state; // of B rows
    real *logits; // (B,V) after the last token of each row
    bool ended;   // the last row to be generated has drawn the EOT
} Texts;

static Texts texts_new(const Config *c, int B) {
    Texts t = {state_new(c, B, 0), allocate((size_t)B * (size_t)c->vocab_size, sizeof *t.logits), false};
    if (!t.state) fatal("out of memory for the state");
    return t;
}

static void texts_free(Texts *t) { state_free(t->state), free(t->logits); }

static void copy_text(const Texts *from, int i, Texts *to, int j, const Config *c) {
    const size_t V = (size_t)c->vocab_size;
    state_copy(from->state, i, to->state, j, c);
    memcpy(to->logits + (size_t)j * V, from->logits + (size_t)i * V, V * sizeof *to->logits);
}

// All rows read the same n tokens.
static void read_tokens(Model *model, const Config *c, Texts *t, const int32_t *tokens, size_t n) {
    const size_t B = (size_t)t->state->B, V = (size_t)c->vocab_size, max = pass_len / (size_t)num_samples;
    int32_t *rows = allocate(B * max, sizeof *rows);
    for (size_t i = 0, L; i < n; i += L) {
        L = n - i < max ? n - i : max;
        for (size_t b = 0; b < B; b++) memcpy(rows + b * L, tokens + i, L * sizeof *rows);
        megalodon_forward(model, t->state, rows, (int)B, (int)L);
        for (size_t b = 0; i + L == n && b < B; b++) megalodon_logits(model, b * L + L - 1, 1, t->logits + b * V);
    }
    free(rows);
}

// The token before the text, with which rows begin in training; -1: none.
static int32_t start_token(void) {
    if (option_given(options, &bos) || state_in) return bos;
    return eot >= 0 ? eot : tokenizer && !prompt && !prompt_path ? 1 : -1; // <s> of llama2.c's tokenizers
}

// Fails unless the model, the states and the buffers fit in memory. text: bytes of the prompt or of a file to encode.
static void plan_memory(const Config *c, size_t text) {
    const size_t samples = (size_t)num_samples, V = (size_t)c->vocab_size, max = SIZE_MAX / 16;
    // a second copy of all texts if ended ones are set aside; one more row if one row reads the prompt for all others
    const bool aside = state_out && eot >= 0 && samples > 1, reader = samples > 1 && !state_in && !aside;
    const size_t all = state_bytes(c, num_samples, 0), one = state_bytes(c, 1, 0);
    const size_t logits = (samples * (aside ? 2 : 1) + reader) * V * sizeof(real);
    const size_t states = all < max ? all * (aside ? 2 : 1) + (reader ? one : 0) + logits : max;
    const size_t written = samples > 1 ? samples * (size_t)num_tokens * sizeof(int32_t) : 0;
    const size_t vocabulary = tokenizer_path ? 32 * V : 0; // pieces and their hash table
    const size_t prompts = text + (text + 2) * sizeof(int32_t) + (tokenizer_path ? tokenizer_encode_bytes(text) : 0);
    const size_t others = sample_bytes(c->vocab_size) + vocabulary + 4 * MAX_PASS * sizeof(real);
    const double mib = 1048576, memory = (double)megalodon_available_memory(1) / mib;
    const double available = memory > 0 ? memory : INFINITY; // if there is none, check_memory prints the reason
    if ((double)states / mib > available)
        fatal(
            "%d samples: their states need %.0f MiB, %.0f MiB for each text with its chunk of %d tokens; %.0f MiB are "
            "available for %s: use %s",
            num_samples, (double)states / mib, (double)one / mib, c->chunk_size, available, megalodon_backend(),
            samples > 1 ? "a smaller --num-samples" : "a smaller model");
    if ((double)written / mib > available)
        fatal("--num-samples %d --num-tokens %d: several texts are kept until all have ended, which needs %.0f MiB; "
              "%.0f MiB are available: use smaller numbers",
              num_samples, num_tokens, (double)written / mib, available);
    if ((double)prompts / mib > available)
        fatal("--%s: %zu bytes of text need %.0f MiB as tokens; %.0f MiB are available: use a shorter text",
              score_path    ? "score"
              : prompt_path ? "prompt-file"
                            : "prompt",
              text, (double)prompts / mib, available);
    Demand demand = {.config = c,
                     .mode = MEGALODON_INFER,
                     .B = num_samples,
                     .split = split_none(MAX_PASS / num_samples, c->chunk_size),
                     .states = (double)states,
                     .host = (double)(written + prompts + others)};
    if (megalodon_on_gpu() && (text > MIN_PASS || score_path)) { // a GPU needs long passes to be busy
        const size_t longest = (size_t)longest_segment(&demand) * samples;
        pass_len = longest > MIN_PASS ? longest : MIN_PASS;
    }
    demand.split = split_none((int64_t)(pass_len / samples), c->chunk_size);
    check_memory(&demand, NULL);
}

typedef struct {
    FILE *file;           // of --prompt-file, or NULL
    unsigned char *bytes; // of the text
    size_t count;         // number of bytes
} Prompt;

static Prompt prompt_open(void) {
    Prompt p = {0};
    if (prompt) p.bytes = (unsigned char *)(uintptr_t)prompt, p.count = strlen(prompt);
    if (prompt_path) p.file = strcmp(prompt_path, "-") == 0 ? stdin : fopen(prompt_path, "rb");
    if (prompt_path && p.file == NULL) fatal("--prompt-file %s: %s", prompt_path, strerror(errno));
    return p;
}

// Reads the prompt's file, which may be a pipe, to its end. Checks the memory plan again whenever the buffer grows.
static void prompt_read(Prompt *p, const Config *c) {
    static const unsigned char token_file[4] = {0x88, 0xD8, 0x34, 0x01}; // the magic number 20240520
    struct stat info = {0};
    if (p->file == NULL) return;
    const bool regular = fstat(fileno(p->file), &info) == 0 && S_ISREG(info.st_mode);
    size_t capacity = regular ? (size_t)info.st_size + 1 : 1 << 16;
    for (size_t n = 1; n > 0; p->count += n) {
        if (p->count == capacity) capacity *= 2;
        plan_memory(c, capacity);
        unsigned char *bytes = realloc(p->bytes, capacity);
        if (bytes == NULL) fatal("--prompt-file %s: out of memory after %zu bytes", prompt_path, p->count);
        p->bytes = bytes;
        n = fread(bytes + p->count, 1, capacity - p->count, p->file);
    }
    if (ferror(p->file)) fatal("--prompt-file %s: %s", prompt_path, strerror(errno));
    if (p->count >= sizeof token_file && memcmp(p->bytes, token_file, sizeof token_file) == 0)
        fatal("--prompt-file %s: holds token numbers, not text", prompt_path);
    if (p->file != stdin) fclose(p->file);
}

// Returns the start token and the tokens of the prompt, or a line break if there is neither; *count gets their number.
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

static int last_byte = '\n'; // of the text so far

// first: the token begins a text.
static void write_token(int32_t token, bool first) {
    size_t length;
    const unsigned char *bytes = tokenizer_piece(tokenizer, token, first, &length);
    if (length > 0) last_byte = bytes[length - 1];
    if (fwrite(bytes, 1, length, stdout) != length) fatal("stdout: %s", strerror(errno));
}

static bool colored; // --color, and that it is possible
static const struct {
    double from; // least probability
    const char *code, *range;
} colors[] = {{0.8, "\033[38;5;35m", "80 % or more"}, {0.5, "\033[38;5;71m", "50 %"},  {0.2, "\033[38;5;142m", "20 %"},
              {0.05, "\033[38;5;178m", "5 %"},        {0.01, "\033[38;5;208m", "1 %"}, {0, "\033[38;5;196m", "less"}};
static const char plain[] = "\033[0m";

// Selects the colour of the token's probability by the model, without temperature and restrictions. A character's bytes
// after the first one keep its colour, because a code between them would destroy it.
static void set_color(const real *logits, int V, int32_t token) {
    size_t length, i = 0;
    const unsigned char *bytes = tokenizer_piece(tokenizer, token, false, &length);
    double max = logits[0], sum = 0;
    if (!colored || (length > 0 && (bytes[0] & 0xC0) == 0x80)) return;
    for (int v = 0; v < V; v++) max = fmax(max, logits[v]);
    for (int v = 0; v < V; v++) sum += exp(logits[v] - max);
    while (exp(logits[token] - max) / sum < colors[i].from) i++;
    fputs(colors[i].code, stdout);
}

static void end_color(void) {
    if (colored) fputs(plain, stdout);
}

static void print_colors(void) {
    const bool on = colored && isatty(STDERR_FILENO);
    fputs("# probability of each token: ", stderr);
    for (size_t i = 0; i < sizeof colors / sizeof *colors; i++)
        fprintf(stderr, "%s%s%s%s", i > 0 ? ", " : "", on ? colors[i].code : "", colors[i].range, on ? plain : "");
    fputc('\n', stderr);
}

// Draws the next token of every row that has not ended. A row's random numbers depend on its number of tokens so far.
static void draw_tokens(const Texts *t, const Config *c, const bool *ended, int32_t *tokens) {
    const size_t B = (size_t)t->state->B, V = (size_t)c->vocab_size;
    int64_t *positions = allocate(B, sizeof *positions);
    state_counts(t->state, c, positions);
    for (size_t b = 0; b < B; b++) {
        if (!ended[b])
            tokens[b] = sample_token(t->logits + b * V, text_tokens(c), &sampling,
                                     sample_uniform((uint64_t)seed, positions[b], (int)b));
    }
    free(positions);
}

// Draws up to num_tokens tokens for each row and returns their number. Those of a single row are printed; those of
// several rows go to `written` (B, num_tokens), their numbers to `counts` (B). first: they begin the text. A row that
// has ended is still computed with the others, so for --state-out its state is set aside and restored at the end.
static int64_t decode(Model *model, const Config *c, Texts *t, int32_t *written, size_t *counts, bool first) {
    const int B = t->state->B;
    const bool sets_aside = state_out && eot >= 0 && B > 1;
    int64_t total = 0;
    bool *ended = allocate((size_t)B, sizeof *ended);
    int32_t *tokens = allocate((size_t)B, sizeof *tokens);
    Texts aside = sets_aside ? texts_new(c, B) : (Texts){0};
    for (int i = 0, active = B; i < num_tokens && !stop_signal; i++) {
        draw_tokens(t, c, ended, tokens);
        for (int b = 0; b < B; b++) {
            if (ended[b]) continue;
            ended[b] = tokens[b] == eot;
            active -= ended[b], total += !ended[b];
            if (!ended[b] && B == 1) {
                set_color(t->logits, c->vocab_size, tokens[b]);
                write_token(tokens[b], first && i == 0), flush_output();
            }
            if (!ended[b] && B > 1) written[(size_t)b * (size_t)num_tokens + counts[b]++] = tokens[b];
            if (ended[b] && sets_aside) copy_text(t, b, &aside, b, c);
        }
        t->ended = active == 0;
        if (t->ended) break;
        megalodon_forward(model, t->state, tokens, B, 1);
        megalodon_logits(model, 0, (size_t)B, t->logits);
    }
    for (int b = 0; b < B && sets_aside; b++) {
        if (ended[b]) copy_text(&aside, b, t, b, c);
    }
    texts_free(&aside);
    free(ended), free(tokens);
    end_color();
    return total;
}

// Reads the prompt and returns all rows after it. Fresh rows are equal, so one reads the prompt and is copied.
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

// Reads more of a single text: n bytes, or the EOT after which the next text begins.
static size_t read_more(Model *model, const Config *c, Texts *t, const char *bytes, size_t n, bool first) {
    size_t count = n;
    int32_t *tokens = tokenizer ? tokenizer_encode(tokenizer, (const unsigned char *)bytes, n, first, &count)
                                : allocate(n, sizeof *tokens);
    for (size_t i = 0; i < n && !tokenizer; i++) {
        tokens[i] = (unsigned char)bytes[i];
        if (tokens[i] >= c->vocab_size) tokens[i] = '?' < c->vocab_size ? '?' : 0;
    }
    read_tokens(model, c, t, tokens, count);
    free(tokens);
    return count;
}

// --interactive: reads lines to the end of standard input and continues the text after each. The state is kept, and the
// model reads all that the terminal shows but "> ". *read and *wrote get the numbers of tokens. first: no text so far.
static void converse(Model *model, const Config *c, Texts *t, bool first, size_t *read, int64_t *wrote) {
    const bool typed = isatty(STDIN_FILENO); // the terminal shows the line itself
    char *line = NULL;
    size_t capacity = 0;
    while (stop_signal == 0 || stop_signal == SIGINT) {
        const bool stopped = stop_signal != 0; // so the terminal shows ^C
        stop_signal = 0;
        if (t->ended) read_tokens(model, c, t, &(int32_t){eot}, 1);
        if (stopped || last_byte != '\n') putchar('\n');
        if (typed && on_terminal()) fputs("> ", stdout);
        flush_output();
        errno = 0;
        catch_signals(0); // a signal interrupts only the wait for a line
        const ssize_t n = getline(&line, &capacity, stdin);
        const int error = errno;
        catch_signals(SA_RESTART);
        if (n < 0 && error != EINTR) break;
        clearerr(stdin);
        if (n < 0) continue;
        // An empty line continues the text where it was stopped.
        if (n > 1 && last_byte != '\n' && !t->ended) *read += read_more(model, c, t, "\n", 1, false);
        if (n > 1 && !typed) fwrite(line, 1, (size_t)n, stdout);
        if (n > 1) *read += read_more(model, c, t, line, (size_t)n, first || t->ended), last_byte = '\n';
        first = false;
        *wrote += decode(model, c, t, NULL, NULL, false);
    }
    free(line);
}

// Generates and prints the samples: a single one token by token, several after all have ended.
static void generate(Model *model, const Config *c, const int32_t *tokens, size_t count) {
    char err[ST_ERR];
    const size_t hidden = start_token() >= 0, text = state_in ? SIZE_MAX : hidden; // text: where one begins
    const size_t samples = (size_t)num_samples;
    const bool prompted = !interactive || prompt || prompt_path; // else the user writes first
    const double start = seconds();
    Texts all = read_prompt(model, c, tokens, count);
    const double read = seconds();

    int32_t *written = allocate(samples > 1 ? samples * (size_t)num_tokens : 0, sizeof *written);
    size_t *counts = allocate(samples, sizeof *counts);
    for (size_t i = hidden; i < count && samples == 1 && prompted; i++) write_token(tokens[i], i == text);
    flush_output();
    int64_t n = prompted ? decode(model, c, &all, written, counts, count == text) : 0;
    if (interactive) converse(model, c, &all, tokenizer && count == text, &count, &n);
    const double end = seconds();
    for (size_t b = 0; b < samples && samples > 1; b++) {
        printf("%s---- sample %zu of %zu\n", b > 0 ? "\n" : "", b + 1, samples);
        for (size_t i = hidden; i < count; i++) write_token(tokens[i], i == text);
        for (size_t i = 0; i < counts[b]; i++)
            write_token(written[b * (size_t)num_tokens + i], count == text && i == 0);
    }
    flush_output();
    if (state_out && !save_state(state_out, all.state, c, seed, all.logits, err)) fatal("--state-out %s", err);
    if (interactive)
        fprintf(stderr, "\n# read %zu tokens, wrote %" PRId64 "; seed %" PRId64 "\n", count, n, seed);
    else
        fprintf(stderr, "\n# read %zu tokens, %.0f tokens/s; wrote %" PRId64 ", %.0f tokens/s; seed %" PRId64 "\n",
                count, (double)count / (read - start + 1e-9), n, (double)n / (end - read + 1e-9), seed);
    if (colored) print_colors();
    texts_free(&all);
    free(written), free(counts);
}

// Token i of the scored text: the start token, unless it is negative, and then those of the file. encoded: the file's
// tokens by the tokenizer; NULL: those that it contains.
static int32_t scored_token(const Tokens *file, const int32_t *encoded, int32_t start, size_t i) {
    if (start >= 0 && i-- == 0) return start;
    return encoded ? encoded[i] : token_at(file, i);
}

// Scores are grouped by position in ranges that double: 1 .. 63, 64 .. 127, 128 .. 255, ... A model that uses long
// context does better in the later ranges.
enum { FIRST_RANGE = 64, MAX_RANGES = 64 };

typedef struct {
    double bits[MAX_RANGES];   // sum of -log2 p over the predicted tokens of each range
    size_t counts[MAX_RANGES]; // number of them
    size_t bytes;              // bytes of text that the predicted tokens stand for; 0: unknown
} Scores;

static int range_of(size_t position) {
    int range = 0;
    for (size_t p = position / FIRST_RANGE; p > 0; p >>= 1) range++;
    return range;
}

// Predicts tokens 1 .. n of the scored text, each from all before it, in constant memory.
static void add_scores(Scores *scores, Model *model, const Config *c, const Tokens *file, const int32_t *encoded,
                       int32_t start, size_t n) {
    State *state = state_new(c, 1, 0);
    if (!state) fatal("out of memory for the state");
    int32_t *tokens = allocate(pass_len, sizeof *tokens), *targets = allocate(pass_len, sizeof *targets);
    real *losses = allocate(pass_len, sizeof *losses);
    for (size_t i = 0; i < n; i += pass_len) {
        const int L = (int)(n - i < pass_len ? n - i : pass_len);
        int64_t counted;
        for (int t = 0; t < L; t++) {
            tokens[t] = scored_token(file, encoded, start, i + (size_t)t);
            targets[t] = scored_token(file, encoded, start, i + (size_t)t + 1);
            scores->bytes += tokens_are_bytes(c) && targets[t] < 256;
        }
        megalodon_forward(model, state, tokens, 1, L);
        megalodon_loss(model, targets, 0, &counted, losses);
        for (int t = 0; t < L; t++) {
            const int range = range_of(i + (size_t)t + 1);
            scores->bits[range] += losses[t] / log(2), scores->counts[range]++;
        }
    }
    state_free(state);
    free(tokens), free(targets), free(losses);
}

// Prints a line for each range and one for all n tokens. Returns the sum of all bits.
static double print_scores(const Scores *scores, size_t n, const char *unit) {
    double total = 0;
    printf("%-25s %12s %9s %s\n", "positions", "predicted", "bits per", unit);
    for (int r = 0; r < MAX_RANGES && scores->counts[r] > 0; r++) {
        const size_t from = r == 0 ? 1 : (size_t)FIRST_RANGE << (r - 1), to = from + scores->counts[r] - 1;
        printf("%11zu .. %-11zu %12zu %14.4f\n", from, to, scores->counts[r],
               scores->bits[r] / (double)scores->counts[r]);
        total += scores->bits[r];
    }
    printf("%-25s %12zu %14.4f", "all", n, total / (double)n);
    // the bits of all tokens, special ones included, for each byte of text
    if (scores->bytes > 0 && strcmp(unit, "token") == 0)
        printf(" = %.4f bits per byte of %zu", total / (double)scores->bytes, scores->bytes);
    printf("\n");
    flush_output();
    return total;
}

// --score. The text begins as training rows do, with the token of --eot, unless the file begins with it or --bos is
// given. A first token with nothing before it is not predicted.
static void score(Model *model, const Config *c, const Tokens *file) {
    Scores scores = {0};
    int32_t start = start_token();
    if (!option_given(options, &bos) && (eot < 0 || (!tokenizer && token_at(file, 0) == eot))) start = -1;
    size_t n = file->count, length;
    int32_t *encoded = tokenizer ? tokenizer_encode(tokenizer, file->bytes, file->count, true, &n) : NULL;
    if (start < 0) n--;
    if (n == 0) fatal("--score %s: one token; nothing to predict", score_path);
    if (tokenizer) scores.bytes = file->count;
    if (tokenizer && start < 0) tokenizer_piece(tokenizer, encoded[0], true, &length), scores.bytes -= length;
    const double begun = seconds();
    add_scores(&scores, model, c, file, encoded, start, n);
    const char *unit = tokens_are_bytes(c) && scores.bytes == n ? "byte" : "token";
    const double total = print_scores(&scores, n, unit);
    if (!isfinite(total)) fatal("--score %s: the loss is not finite", score_path);
    fprintf(stderr, "# %zu %ss in %.1f s, %.0f tokens/s\n", n, unit, seconds() - begun,
            (double)n / (seconds() - begun));
    free(encoded);
}

// Returns whether the file is a state of ./sample; those of ./train, which are parts of checkpoints, have no logits.
static bool is_state(const char *path) {
    StFile f;
    char err[ST_ERR];
    if (!st_open(&f, path, err)) return false;
    const bool ok = st_find(&f, "state.count") != NULL && st_find(&f, "state.logits") != NULL;
    st_close(&f);
    return ok;
}

// Claims the input files and checks the options as far as the configuration and the headers of files allow.
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
        if (rows > MIN_PASS)
            fatal("--state-in %s: has %d samples; at most %d can be continued", state_in, rows, MIN_PASS);
        if (option_given(options, &num_samples) && num_samples != rows)
            usage_error("--num-samples %d contradicts --state-in %s, which has %d", num_samples, state_in, rows);
        if (rows > 1 && (interactive || colored))
            usage_error("--state-in %s: has %d samples; --%s continues one text", state_in, rows,
                        interactive ? "interactive" : "color");
        num_samples = rows;
    }
}

// Parses the command line and checks the options as far as they alone show an error.
static void read_options(int argc, char **argv) {
    options_parse(options, argc, argv,
                  "Writes text with a trained model, or scores a file with it.\n"
                  "  ./sample --model out --prompt \"Once\" --num-tokens 500\n");
    static char plays[PATH_SIZE];
    if (!model_path) beside_executable(plays, sizeof plays, "dev/models/plays"), model_path = plays;
    if (prompt && prompt_path) usage_error("--prompt and --prompt-file exclude each other");
    if (score_path && (prompt || prompt_path || state_in || state_out || option_given(options, &num_samples)))
        usage_error("--score reads its file only: no prompt, no state, no samples");
    if (interactive && (score_path || num_samples > 1))
        usage_error("--interactive continues one text: no --score, no --num-samples");
    if (interactive && prompt_path && strcmp(prompt_path, "-") == 0)
        usage_error("--interactive reads standard input: --prompt-file needs the name of a file");
    const bool never = strcmp(color, "never") == 0, always = strcmp(color, "always") == 0;
    if (!never && !always && strcmp(color, "auto") != 0) usage_error("--color %s: it is never, always or auto", color);
    if (!never && (score_path || num_samples > 1)) usage_error("--color shows one text: no --score, no --num-samples");
    colored = always || (!never && in_color());
    sampling.eot = eot > 0 ? eot : 0;
    if (threads > 0) megalodon_threads(threads);
}

// Opens the model file, which *file gets, and returns its configuration.
static Config open_model(StFile *file) {
    Config config = config_defaults();
    if (!run_open_model(file, &config, model_path))
        fatal("%s: no configuration under the metadata key 'config'", model_path);
    return config;
}

// The file of --score; zero without that option.
static Tokens open_scored(const Config *c) {
    if (!score_path) return (Tokens){0};
    const Tokens file = tokens_open(score_path, tokenizer_path ? 65536 : c->vocab_size);
    if (tokenizer_path && file.width != 1) fatal("--score %s: holds token numbers; leave out --tokenizer", score_path);
    return file;
}

static void open_tokenizer(const Config *c) {
    if (!tokenizer_path) return;
    tokenizer = tokenizer_open(tokenizer_path, c->vocab_size);
    const int count = tokenizer_count(tokenizer);
    if (count < c->vocab_size)
        fprintf(stderr, "# --tokenizer %s: %d tokens; the model's other %d are taken for padding\n", tokenizer_path,
                count, c->vocab_size - count);
}

int main(int argc, char **argv) {
    guard_streams();
    settle_threads(argv);
    read_options(argc, argv);

    // headers of the input files
    StFile file;
    const Config config = open_model(&file);
    check_inputs(&config, &file);
    Prompt text = prompt_open();
    const Tokens scored = open_scored(&config);

    // the memory plan, then what it allows to be read, then the output
    plan_memory(&config, tokenizer_path ? scored.count + text.count : text.count);
    open_tokenizer(&config);
    if (state_out) state_out = claim_output("state-out", state_out, "a state of ./sample", is_state);
    keep_created();

    size_t count = 0;
    prompt_read(&text, &config);
    int32_t *tokens = score_path ? NULL : prompt_tokens(&text, &config, &count);
    // from here on a signal ends the text, so that its state is written; a second one ends the program at once, unless
    // --interactive waits for another line
    if (interactive)
        catch_signals(SA_RESTART);
    else if (state_out || colored)
        catch_signals((int)(SA_RESETHAND | SA_RESTART));
    Model *model = megalodon_new(&config, MEGALODON_INFER, num_samples, (int)pass_len / num_samples);
    if (!model) fatal("out of memory for the model");
    checkpoint_load(&file, model, &config);

    if (score_path)
        score(model, &config, &scored);
    else
        generate(model, &config, tokens, count);
    free(tokens);
    if (prompt_path) free(text.bytes);
    megalodon_free(model);
    if (tokenizer) tokenizer_free(tokenizer);
    return stop_signal ? 128 + stop_signal : 0;
}
