// Fuzzing of every reader of files: whatever the bytes, a reader must not crash, hang or read out of bounds, and what
// it accepts must be consistent. Built with -DLIBFUZZER (make fuzz), libFuzzer generates the bytes for the reader that
// FUZZ_TARGET names. In make test the readers get the files of tests/corpus, and a valid file of each kind: complete,
// cut short at every length, and with every byte changed; SANITIZE=1 finds the most. `test_fuzz --seeds DIR` writes the
// valid files to DIR.
#define _GNU_SOURCE   // system.c needs it
#include <dirent.h>   // defines: opendir, readdir
#include <fcntl.h>    // defines: open
#include <setjmp.h>   // defines: setjmp, longjmp
#include <stdlib.h>   // defines: abort, free, malloc
#include <string.h>   // defines: memchr, memcpy, strcmp
#include <sys/mman.h> // defines: mmap
#include <sys/stat.h> // defines: mkdir
#include <unistd.h>   // defines: ftruncate, pread, pwrite
#include "../plumbing/json.h"
#include "../plumbing/plumbing.h"

// ----------------------------------------------------------------------------
// Some readers end the program when they refuse a file. Here fatal() jumps back to the target instead, and open files
// are closed. Files are copied instead of mapped, since AddressSanitizer detects reads beyond an allocation, not a
// mapping.

static jmp_buf refused;
static StFile *opened;
static void *copy;
static int file_of_copy = -1;
static FILE *quiet;

__attribute__((noreturn)) static void leave(int status) {
    if (opened != NULL) st_close(opened);
    if (file_of_copy >= 0) close(file_of_copy);
    longjmp(refused, status);
}

static bool open_noted(StFile *f, const char *path, char *err) { return st_open(opened = f, path, err); }

static int open_file(const char *path, int flags) { return file_of_copy = open(path, flags); }
static int close_file(int fd) { return file_of_copy = -1, close(fd); }

static void *map_copy(size_t size, int fd) {
    free(copy);
    copy = malloc(size);
    return copy != NULL && pread(fd, copy, size, 0) == (ssize_t)size ? copy : MAP_FAILED;
}

#undef stderr
#define stderr quiet
#include "../plumbing/system.c"
#define open open_file
#define close close_file
#define st_open open_noted
#define mmap(at, size, protection, flags, fd, from) map_copy(size, fd)
#include "../plumbing/data.c"
#undef stderr
#undef open
#undef close
#undef st_open
#undef mmap

// ----------------------------------------------------------------------------
// targets

typedef void Target(const char *path, const uint8_t *bytes, size_t size); // path and contents of a file

static const Config tiny = {.num_layers = 1,
                            .model_dim = 4,
                            .z_dim = 2,
                            .value_dim = 2,
                            .num_heads = 1,
                            .ffn_hidden_dim = 2,
                            .cema_ndim = 1,
                            .chunk_size = 2,
                            .vocab_size = 3,
                            .norm_num_groups = 2,
                            .swiglu = 1,
                            .rescale_nffn = 1,
                            .share_emb = 1,
                            .norm_affine = 1,
                            .norm_eps = 1e-5,
                            .rope_base = 1e4};
enum { TOKENS = 264, ROWS = 2 }; // vocabulary size of the tokenizer; rows of states

static void demand(bool ok) {
    if (!ok) abort();
}

static char *text_of(const uint8_t *bytes, size_t size) { // NUL-terminated, in an allocation of size + 1 bytes
    char *text = malloc(size + 1);
    demand(text != NULL);
    memcpy(text, bytes, size);
    text[size] = 0;
    return text;
}

static void run_json(const char *path, const uint8_t *bytes, size_t size) {
    (void)path;
    char *text = text_of(bytes, size), word[6];
    Json j;
    int64_t whole;
    double number;
    bool boolean;
    json_begin(&j, text, size);
    json_skip(&j);
    demand(json_end(&j) == (j.error[0] == 0));
    json_begin(&j, text, size); // again, reading each value as the type that the first letter of its key selects
    json_object(&j);
    while (json_object_next(&j, word, sizeof word)) {
        if (word[0] == 'i') json_int(&j, &whole);
        if (word[0] == 'n') json_number(&j, &number);
        if (word[0] == 'b') json_bool(&j, &boolean);
        if (word[0] == 's') json_string(&j, word, sizeof word);
        if (word[0] == 'a')
            for (json_array(&j); json_array_next(&j);) json_int(&j, &whole);
        if (strchr("inbsa", word[0]) == NULL && !json_null_follows(&j)) json_skip(&j);
    }
    json_end(&j);
    free(text);
}

static void run_config(const char *path, const uint8_t *bytes, size_t size) {
    (void)path;
    char *text = text_of(bytes, size), err[ST_ERR];
    Config c = config_defaults(), back = config_defaults();
    if (config_from_json(&c, text, err) && config_check(&c, err)) {
        char *again = config_to_json(&c);
        demand(config_from_json(&back, again, err) && config_equal(&c, &back));
        free(again);
        const Demand demand = {
            .config = &c, .mode = MEGALODON_TRAIN, .B = 2, .split = split_none(3, c.chunk_size), .segments = true};
        if (c.num_layers <= 64) check_memory(&demand, NULL);
    }
    free(text);
}

static void run_options(const char *path, const uint8_t *bytes, size_t size) {
    (void)path;
    int on = 0, count = 3;
    int64_t steps = 0;
    double rate = 1;
    const char *name = NULL;
    char *text = text_of(bytes, size), err[ST_ERR];
    Option options[] = {{OPT_HEADING, .help = "Some", .kept = true},
                        {OPT_SWITCH, "recompute", &on, .kept = true},
                        {OPT_BOOL, "swiglu", &on, .kept = true},
                        {OPT_INT, "count", &count, 1, 9, .kept = true},
                        {OPT_INT64, "steps", &steps, 0, 1e9, .kept = true},
                        {OPT_REAL, "rate", &rate, 0, 1, .kept = true},
                        {OPT_TEXT, "data", &name, .kept = true},
                        {OPT_TEXT, "out", &name, .kept = false},
                        {OPT_END, .help = NULL}};
    if (memchr(bytes, 0, size) == NULL) options_read(options, text, err);
    demand(count >= 1 && count <= 9 && steps >= 0 && rate >= 0 && rate <= 1 && (on == 0 || on == 1));
    if (name != NULL) demand(strlen(name) < size);
    free(text);
}

static void run_safetensors(const char *path, const uint8_t *bytes, size_t size) {
    (void)bytes;
    StFile f;
    char err[ST_ERR];
    static double values[64];
    if (!st_open(&f, path, err)) return;
    for (int i = 0; i < f.count; i++) {
        const StTensor *t = &f.tensors[i];
        demand(st_find(&f, t->name) == t && t->end <= size);
        const int64_t n = st_count(t), some = n < 64 ? n : 64;
        for (int as = ST_F64; as <= ST_I32; as++) {
            bool ok = st_read(&f, t, n - some, some, values, (StType)as, err);
            demand(ok || as != (int)t->type || as == ST_BF16 || as == ST_F16);
            demand(!ok || t->type != ST_OTHER);
            demand(!st_read(&f, t, n, 1, values, (StType)as, err));
        }
    }
    st_close(&f);
}

static Model *tiny_model(void) {
    static Model *model;
    if (model == NULL) model = megalodon_new(&tiny, MEGALODON_TRAIN, 1, 1);
    demand(model != NULL);
    return model;
}

static State *tiny_state(void) {
    static State *state;
    if (state == NULL) state = state_new(&tiny, ROWS, 0);
    demand(state != NULL);
    return state;
}

static void run_model_file(const char *path, const uint8_t *bytes, size_t size) {
    (void)bytes, (void)size;
    StFile f;
    char err[ST_ERR];
    if (!st_open(&f, path, err)) return;
    load_model(&f, tiny_model(), &tiny, err);
    load_optimizer(&f, tiny_model(), &tiny, 1, 2, err);
    st_close(&f);
}

static void run_state(const char *path, const uint8_t *bytes, size_t size) {
    (void)bytes, (void)size;
    char err[ST_ERR];
    int64_t seed;
    real logits[ROWS * 3];
    state_rows(path, err);
    load_state(path, tiny_state(), &tiny, &seed, logits, err);
}

static void run_batch(const char *path, const uint8_t *bytes, size_t size) {
    (void)bytes, (void)size;
    int B, L;
    int32_t *inputs, *targets;
    read_batch(path, 9, &B, &L, &inputs, &targets);
    for (int64_t i = 0; i < (int64_t)B * L; i++) demand(inputs[i] >= 0 && inputs[i] < 9 && targets[i] < 9);
    free(inputs), free(targets);
}

// In every format. A vocabulary of 300 refuses some uint16 tokens and no bytes.
static void run_tokens(const char *path, const uint8_t *bytes, size_t size) {
    (void)bytes;
    enum { L = 4 };
    int32_t inputs[2 * L], targets[2 * L];
    bool fresh[2];
    const Tokens t = tokens_open_as(path, 300, (DataFormat)(size / 4 % 3));
    const int eot = size % 2 == 0 ? 0 : -1;
    Reader r = reader_new(&t, "fuzzing", 1, 2, L, eot, size % 4 < 2);
    for (int step = 0; step < 5; step++) {
        reader_step(&r, step, inputs, targets, fresh);
        for (int i = 0; i < 2 * L; i++) demand(inputs[i] >= 0 && inputs[i] < 300 && targets[i] < 300);
    }
    Cursor cursor = {0};
    for (int i = 0; i < 1000 && read_windows(&r, &cursor, 2, inputs, targets) > 0; i++) {}
    reader_free(&r);
    close_file(t.file);
}

static void run_tokenizer(const char *path, const uint8_t *bytes, size_t size) {
    (void)path;
    char err[ST_ERR];
    size_t count, length;
    Tokenizer *t = tokenizer_read(bytes, size, TOKENS, err);
    if (t == NULL) return;
    int32_t *tokens = tokenizer_encode(t, bytes, size < 500 ? size : 500, size % 2 == 0, &count);
    for (size_t i = 0; i < count; i++) {
        demand(tokens[i] >= 0 && tokens[i] < TOKENS);
        const unsigned char *piece = tokenizer_piece(t, tokens[i], i == 0, &length);
        demand(length == 0 || piece[length - 1] + 1 > 0);
    }
    free(tokens);
    tokenizer_free(t);
}

static const struct {
    const char *name;
    Target *run;
} targets[] = {
    {"json", run_json},        {"config", run_config}, {"options", run_options}, {"safetensors", run_safetensors},
    {"model", run_model_file}, // and optimizers
    {"state", run_state},      {"batch", run_batch},   {"tokens", run_tokens},   {"tokenizer", run_tokenizer}};
enum { NUM_TARGETS = sizeof targets / sizeof targets[0] };

// Runs a target on these bytes. They are written to one file that stays open, which is much faster than a new file.
static char scratch[] = "build/fuzz_XXXXXX";
static void run_target(Target *run, const uint8_t *bytes, size_t size) {
    static int file = -1;
    if (file < 0) file = mkstemp(scratch), quiet = fopen("/dev/null", "w");
    demand(ftruncate(file, (off_t)size) == 0 && pwrite(file, bytes, size, 0) == (ssize_t)size && quiet != NULL);
    opened = NULL, file_of_copy = -1;
    set_failure_hooks(NULL, leave);
    if (setjmp(refused) == 0) run(scratch, bytes, size);
}

// longjmp leaks memory, which is not an error here.
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; }

// ----------------------------------------------------------------------------
// libFuzzer

#ifdef LIBFUZZER
size_t LLVMFuzzerMutate(uint8_t *bytes, size_t size, size_t most);

// A safetensors file begins with the length of its header. Mutations would almost always make it invalid, so it is
// recomputed.
size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t size, size_t most, unsigned seed) {
    uint64_t length = 0;
    const bool header = size > 9 && bytes[8] == '{';
    size = LLVMFuzzerMutate(bytes, size, most);
    if (!header || size < 9 || seed % 8 == 0) return size;
    while (8 + length < size && bytes[8 + length] >= ' ') length++; // the data are assumed to begin with a 0 byte
    memcpy(bytes, &length, sizeof length);
    return size;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static Target *run;
    const char *name = getenv("FUZZ_TARGET");
    for (int i = 0; i < NUM_TARGETS && run == NULL; i++)
        run = name && strcmp(name, targets[i].name) == 0 ? targets[i].run : NULL;
    demand(run != NULL);
    run_target(run, bytes, size);
    return 0;
}
#else

// ----------------------------------------------------------------------------
// make test

static uint8_t file_bytes[1 << 20];

static size_t read_file(const char *path) {
    FILE *f = fopen(path, "rb");
    const size_t size = f != NULL ? fread(file_bytes, 1, sizeof file_bytes, f) : 0;
    if (f != NULL) fclose(f);
    return size;
}

static void write_file(const char *path, const void *bytes, size_t size) {
    FILE *f = fopen(path, "wb");
    demand(f != NULL && fwrite(bytes, 1, size, f) == size && fclose(f) == 0);
}

static void write_batch(const char *path, char *err) {
    static const int32_t tokens[8] = {0, 1, 2, 3, 4, 5, 6, 8};
    StTensor t[] = {{.name = "input.tokens", .type = ST_I32, .ndim = 2, .shape = {2, 4}},
                    {.name = "input.targets", .type = ST_I32, .ndim = 2, .shape = {2, 4}}};
    StWriter w;
    st_create(&w, path, NULL, t, 2, err);
    st_write(&w, tokens, sizeof tokens, err), st_write(&w, tokens, sizeof tokens, err);
    demand(st_finish(&w, err));
}

static void write_tokenizer(const char *path) {
    static const char *const words[] = {"a", "b", "c", "ab", "abc"};
    char bytes[8192];
    size_t at = 4;
    const int32_t longest = 6;
    memcpy(bytes, &longest, 4);
    for (int i = 0; i < TOKENS; i++) {
        char piece[8] = "<s>";
        if (i >= 3) snprintf(piece, sizeof piece, "<0x%02X>", i - 3);
        if (i >= 259) snprintf(piece, sizeof piece, "%s", words[i - 259]);
        const float score = (float)-i;
        const int32_t length = (int32_t)strlen(piece);
        memcpy(bytes + at, &score, 4), memcpy(bytes + at + 4, &length, 4), memcpy(bytes + at + 8, piece, 8);
        at += 8 + (size_t)length;
    }
    write_file(path, bytes, at);
}

// Writes a valid file to path.
static void write_seed(const char *target, const char *path) {
    static const char json[] =
        "{\"i\": -12, \"n\": 1.5e3, \"b\": true, \"s\": \"\\u00e9\\n\", \"a\": [1, 2], \"z\": null}";
    static const char options[] = "recompute 1\nswiglu 0\ncount 4\nsteps 100\nrate 0.25\ndata some file\n";
    static const uint8_t tokens[1040] = {0x88, 0xd8, 0x34, 1, 1, 0, 0, 0, 8, 0, 0, 0, [1024] = 7, 0, 0, 0, 43, 1};
    char err[ST_ERR];
    if (strcmp(target, "json") == 0) write_file(path, json, sizeof json - 1);
    if (strcmp(target, "options") == 0) write_file(path, options, sizeof options - 1);
    if (strcmp(target, "tokens") == 0) write_file(path, tokens, sizeof tokens);
    if (strcmp(target, "batch") == 0 || strcmp(target, "safetensors") == 0) write_batch(path, err);
    if (strcmp(target, "tokenizer") == 0) write_tokenizer(path);
    if (strcmp(target, "config") == 0) {
        char *text = config_to_json(&tiny);
        write_file(path, text, strlen(text));
        free(text);
    }
    if (strcmp(target, "model") == 0) demand(save_model(path, tiny_model(), &tiny, err));
    if (strcmp(target, "state") == 0) {
        const real logits[ROWS * 3] = {0};
        state_reset(tiny_state(), 0), state_reset(tiny_state(), 1);
        demand(save_state(path, tiny_state(), &tiny, 7, logits, err));
    }
}

// Returns whether the target's reader accepts the file.
static bool accepted(const char *target, const char *path) {
    char err[ST_ERR];
    StFile f = {0};
    bool ok = false;
    int64_t seed;
    real logits[ROWS * 3];
    if (strcmp(target, "model") == 0) {
        ok = st_open(&f, path, err) && load_model(&f, tiny_model(), &tiny, err);
        st_close(&f);
    } else if (strcmp(target, "state") == 0) {
        ok = state_rows(path, err) == ROWS && load_state(path, tiny_state(), &tiny, &seed, logits, err) && seed == 7;
    } else if (strcmp(target, "tokens") == 0) {
        ok = tokens_open(path, 300).count == 8;
    } else if (strcmp(target, "tokenizer") == 0) {
        Tokenizer *t = tokenizer_read(file_bytes, read_file(path), TOKENS, err);
        ok = t != NULL;
        if (ok) tokenizer_free(t);
    } else {
        ok = true; // the other readers return nothing, or are tested in test_files.c
    }
    return ok;
}

static bool valid(const char *target, const char *path) {
    opened = NULL, file_of_copy = -1;
    set_failure_hooks(NULL, leave);
    return setjmp(refused) == 0 && accepted(target, path);
}

// Runs the target on the file cut short at every length, and with each byte changed.
static int damage(Target *run, const char *path) {
    const size_t size = read_file(path);
    for (size_t i = 0; i < size; i++) {
        run_target(run, file_bytes, i);
        file_bytes[i] ^= (uint8_t)(1 << i % 8);
        run_target(run, file_bytes, size);
        file_bytes[i] ^= (uint8_t)(1 << i % 8);
    }
    return 2 * (int)size;
}

static int replay(const char *target, Target *run) {
    char path[512];
    int count = 0;
    snprintf(path, sizeof path, "tests/corpus/%s", target);
    DIR *d = opendir(path);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        if (e->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "tests/corpus/%s/%.200s", target, e->d_name);
        const size_t size = read_file(path);
        run_target(run, file_bytes, size);
        count++;
    }
    if (d != NULL) closedir(d);
    return count;
}

int main(int argc, char **argv) {
    const char *seeds = argc == 3 && strcmp(argv[1], "--seeds") == 0 ? argv[2] : NULL;
    int passed = 0, failed = 0;
    char path[512];
    for (int i = 0; i < NUM_TARGETS; i++) {
        const char *name = targets[i].name;
        snprintf(path, sizeof path, "%s/%s", seeds ? seeds : "build", seeds ? name : "seed");
        if (seeds) mkdir(path, 0777), strcat(path, "/seed");
        write_seed(name, path);
        if (seeds) continue;
        const bool ok = valid(name, path);
        const int damaged = damage(targets[i].run, path), files = replay(name, targets[i].run);
        *(ok && files > 0 ? &passed : &failed) += 1;
        printf("%s  %-12s a valid file%s, %d damaged ones, %d of tests/corpus\n", ok && files > 0 ? "ok  " : "FAIL",
               name, ok ? "" : " that is refused", damaged, files);
    }
    if (!seeds) unlink(scratch), printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

#endif
