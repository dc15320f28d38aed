// The loss of a model by position in long texts, with the state carried through the whole text and without:
//     make build/position_loss          (build/gpu/position_loss for a GPU)
//     build/position_loss --model out --data a.txt,b.txt --tokens 1048576 --fresh 2048,32768
// Each reading predicts the token after each of the first N tokens of every text; the texts are the rows of a batch.
// The first reading carries the state from token 0 to the end. --fresh K adds a reading that resets the state every K
// tokens. --reset-norm K and --reset-cema K reset only a part of the state, TimestepNorm's running moments or CEMA's h,
// to show which part a change of the loss depends on.
// Output: CSV with a row for each reading, text and range of positions: [0,1024), [1024,2048), [2048,4096), ...
#include <math.h>   // defines: isfinite
#include <stdlib.h> // defines: free, strtoll
#include <string.h> // defines: memcpy, memset, strcmp, strcspn, strspn
#include "../plumbing/plumbing.h"

enum {
    MAX_TEXTS = 64,
    MAX_READINGS = 64,
    FIRST_RANGE = 1024, // tokens in the first range
    MAX_RANGES = 32,
};

static const char *model_path, *data, *fresh, *reset_norm, *reset_cema;
static int64_t num_tokens = 1 << 20;
static int piece = 8192, threads;
static Option options[] = {
    {OPT_PATH, "model", &model_path, .arg = "FILE|DIR", .help = "a model file, or a run's directory"},
    {OPT_TEXT, "data", &data, .arg = "FILE,..", .help = "texts, separated by commas"},
    {OPT_INT64, "tokens", &num_tokens, 1, 1 << 30, .help = "tokens to read of each text, whole chunks"},
    {OPT_INT, "piece", &piece, 1, 1 << 24, .help = "most tokens of each text per forward pass, whole chunks"},
    {OPT_TEXT, "fresh", &fresh, .arg = "K,..", .help = "also reset the state every K tokens; 0: never"},
    {OPT_TEXT, "reset-norm", &reset_norm, .arg = "K,..", .help = "also reset TimestepNorm's moments every K tokens"},
    {OPT_TEXT, "reset-cema", &reset_cema, .arg = "K,..", .help = "also reset CEMA's h every K tokens"},
    {OPT_INT, "threads", &threads, 0, 1024, .help = "CPU threads; 0: all cores"},
    {OPT_END, .help = NULL},
};

typedef struct {
    const char *reset; // part of the state that is reset: none, all, norm, cema
    int64_t every;     // tokens between resets; 0 if there are none
} Reading;
static Reading readings[MAX_READINGS] = {{"none", 0}};
static int num_readings = 1;

static char *paths[MAX_TEXTS];
static Tokens texts[MAX_TEXTS];
static int num_texts;

static Config config;
static Model *model;
static State *state;
static int32_t *inputs, *targets; // (num_texts, tokens of a piece)
static real *losses;              // the same
static double sums[MAX_TEXTS][MAX_RANGES];
static int64_t counts[MAX_TEXTS][MAX_RANGES];

// Adds a reading for each number of --flag's list.
static void add_readings(const char *flag, const char *list, const char *reset) {
    while (list != NULL && *list != 0) {
        char *end;
        const int64_t every = strtoll(list, &end, 10);
        if (end == list || (*end != 0 && *end != ',') || every < 0 || every % config.chunk_size != 0)
            usage_error("--%s %s: needs multiples of the chunk size %d, separated by commas", flag, list,
                        config.chunk_size);
        if (num_readings == MAX_READINGS) usage_error("--%s: more than %d readings", flag, MAX_READINGS);
        if (every > 0) readings[num_readings++] = (Reading){reset, every};
        list = end + strspn(end, ",");
    }
}

static void open_texts(void) {
    const char *list = data;
    while (*list != 0) {
        const size_t length = strcspn(list, ",");
        if (num_texts == MAX_TEXTS) usage_error("--data: more than %d texts", MAX_TEXTS);
        paths[num_texts] = allocate(length + 1, 1);
        memcpy(paths[num_texts], list, length);
        const Tokens *t = &texts[num_texts];
        texts[num_texts] = tokens_open(paths[num_texts], config.vocab_size);
        if (t->count <= (size_t)num_tokens)
            fatal("%s: has %zu tokens; --tokens %lld needs %lld", t->path, t->count, (long long)num_tokens,
                  (long long)num_tokens + 1);
        num_texts++;
        list += length + strspn(list + length, ",");
    }
    if (num_texts == 0) usage_error("--data: names no text");
}

// Sets the named part of the state of all rows to its value before the first token, which is 0. The number of tokens
// read belongs to TimestepNorm's moments. It also gives the position in the chunk, which stays 0 after whole chunks.
static void reset_state(const char *part) {
    StateTensor tensors[NUM_STATE_TENSORS];
    state_tensors(tensors, &config, num_texts, true);
    for (const StateTensor *t = tensors; t < tensors + NUM_STATE_TENSORS; t++) {
        const char *owner = strcmp(t->name, "state.h") == 0 ? "cema" : "norm";
        if (t->bytes == 0 || (strcmp(part, "all") != 0 && strcmp(part, owner) != 0)) continue;
        char *zeros = allocate(t->bytes, 1);
        state_write(state, t->offset, t->bytes, zeros);
        free(zeros);
    }
}

static int64_t range_end(int range) { return (int64_t)FIRST_RANGE << range; }

// Forward pass of tokens first .. first + n - 1 of every text.
static void read_piece(int64_t first, int n) {
    int64_t counted;
    for (int64_t b = 0; b < num_texts; b++) {
        for (int64_t i = 0; i < n; i++) {
            inputs[b * n + i] = token_at(&texts[b], (size_t)(first + i));
            targets[b * n + i] = token_at(&texts[b], (size_t)(first + i + 1));
        }
    }
    megalodon_forward(model, state, inputs, num_texts, n);
    const double sum = megalodon_loss(model, targets, 0, &counted, losses);
    if (!isfinite(sum)) fatal("the loss of tokens %lld to %lld is not finite", (long long)first, (long long)first + n);
    for (int64_t b = 0; b < num_texts; b++) {
        int range = 0;
        for (int64_t i = 0; i < n; i++) {
            while (first + i >= range_end(range)) range++;
            sums[b][range] += (double)losses[b * n + i];
            counts[b][range]++;
        }
    }
}

static void print_reading(const Reading *r) {
    for (int b = 0; b < num_texts; b++) {
        char folder[PATH_SIZE];
        const char *name = split_path(paths[b], folder);
        for (int range = 0; range < MAX_RANGES && counts[b][range] > 0; range++) {
            const int64_t start = range == 0 ? 0 : range_end(range - 1);
            printf("%s,%s,%lld,%lld,%lld,%.6f,%lld\n", name, r->reset, (long long)r->every, (long long)start,
                   (long long)(start + counts[b][range]), sums[b][range] / (double)counts[b][range],
                   (long long)counts[b][range]);
        }
    }
    fflush(stdout);
}

static void read_texts(const Reading *r) {
    memset(sums, 0, sizeof sums);
    memset(counts, 0, sizeof counts);
    reset_state("all");
    for (int64_t t = 0; t < num_tokens;) {
        if (r->every > 0 && t % r->every == 0) reset_state(r->reset);
        int64_t n = num_tokens - t < piece ? num_tokens - t : piece;
        if (r->every > 0 && r->every - t % r->every < n) n = r->every - t % r->every;
        read_piece(t, (int)n);
        t += n;
    }
    print_reading(r);
}

int main(int argc, char **argv) {
    StFile file;
    guard_streams();
    settle_threads(argv);
    options_parse(options, argc, argv, "Prints the loss of a model by position in long texts.\n\n");
    if (model_path == NULL || data == NULL) usage_error("--model and --data are needed");
    if (threads > 0) megalodon_threads(threads);
    if (!run_open_model(&file, &config, model_path)) fatal("%s: has no configuration", model_path);
    if (num_tokens % config.chunk_size != 0 || piece % config.chunk_size != 0)
        usage_error("--tokens and --piece must be multiples of the chunk size %d", config.chunk_size);
    add_readings("fresh", fresh, "all");
    add_readings("reset-norm", reset_norm, "norm");
    add_readings("reset-cema", reset_cema, "cema");
    open_texts();
    if (piece > num_tokens) piece = (int)num_tokens;
    const size_t n = (size_t)num_texts * (size_t)piece, bytes = state_bytes(&config, num_texts, true);
    const Demand demand = {.config = &config,
                           .mode = MEGALODON_INFER,
                           .B = num_texts,
                           .split = split_none(piece, config.chunk_size),
                           .states = (double)bytes,
                           .host = (double)n * (2 * sizeof(int32_t) + sizeof(real)) + (double)bytes};
    check_memory(&demand, NULL);
    model = megalodon_new(&config, MEGALODON_INFER, num_texts, piece);
    state = state_new(&config, num_texts, true);
    if (model == NULL || state == NULL) fatal("out of memory");
    checkpoint_load(&file, model, &config);
    inputs = allocate(n, sizeof *inputs);
    targets = allocate(n, sizeof *targets);
    losses = allocate(n, sizeof *losses);
    printf("text,reset,every,start,end,loss,tokens\n");
    for (int i = 0; i < num_readings; i++) read_texts(&readings[i]);
    megalodon_free(model);
    state_free(state);
    free(inputs), free(targets), free(losses);
    for (int i = 0; i < num_texts; i++) free(paths[i]);
    return 0;
}
