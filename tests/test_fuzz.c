// Every reader of files, fed with bytes that are no valid file: it may refuse them, nothing else. Built with
// -DLIBFUZZER (make fuzz) it looks for such bytes; otherwise, in make test, it reads all those kept in tests/corpus/.
//     FUZZ_TARGET=model build/fuzz tests/corpus/model
#define _GNU_SOURCE   // string.h: memfd_create
#include <dirent.h>   // defines: opendir, readdir
#include <setjmp.h>   // defines: setjmp, longjmp
#include <stdarg.h>   // defines: va_list
#include <stdlib.h>   // defines: exit, getenv
#include <string.h>   // defines: strcmp
#include <sys/mman.h> // defines: memfd_create, mmap
#include <unistd.h>   // defines: close, write

// What ends the program elsewhere comes back here; what a reader had open by then is closed here.
#define fatal system_fatal
#define usage_error system_usage_error
#include "../plumbing/system.c"
#undef fatal
#undef usage_error

static jmp_buf back;
static void *mapped[8];
static size_t mapped_size[8];
static int mappings;

static void *remember_mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
    void *memory = mmap(at, size, protection, flags, fd, offset);
    if (memory != MAP_FAILED && mappings < 8) mapped[mappings] = memory, mapped_size[mappings++] = size;
    return memory;
}
void fatal(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
void usage_error(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
static void formatted(const char *format, va_list args) { // reads the arguments as a message would
    char text[2048];
    vsnprintf(text, sizeof text, format, args);
}
void fatal(const char *format, ...) {
    va_list args;
    va_start(args, format);
    formatted(format, args);
    va_end(args);
    longjmp(back, 1);
}
void usage_error(const char *format, ...) {
    va_list args;
    va_start(args, format);
    formatted(format, args);
    va_end(args);
    longjmp(back, 1);
}
#define mmap remember_mmap
#include "../plumbing/data.c"
#undef mmap
#undef MAGIC
#include "../plumbing/json.h"

static const Config tiny = {1, 4, 2, 4, 1, 4, 2, 4, 6, 2, 1, 1, 0, 0, 1, 1e-5, 1e4, 0, 0, 0, HE};
enum { TOKENS = 270 }; // of the tokenizers
static Model *model;
static State *state;
static char path[64], err[ST_ERR];

// ----------------------------------------------------------------------------
// the readers: path holds the bytes as a file, text the same with a 0 behind

static void read_json(char *text, size_t size) {
    Json j;
    json_begin(&j, text, size);
    json_skip(&j);
    json_end(&j);
}
static void read_config(char *text, size_t size) {
    Config c = config_defaults();
    (void)size;
    if (!config_from_json(&c, text, err) || !config_check(&c, err)) return;
    int count;
    size_t elements;
    if (c.num_layers <= 64) free(megalodon_tensors(&c, &count, &elements));
    free(config_to_json(&c));
}
static void read_options(char *text, size_t size) {
    static const char *name;
    static int number, flag;
    static double real_number;
    Option options[] = {{OPT_HEADING, .help = "", .kept = true},
                        {OPT_TEXT, "data", &name, .arg = "", .help = ""},
                        {OPT_INT, "batch-size", &number, 1, 100, .help = ""},
                        {OPT_REAL, "lr", &real_number, 0, 1, .help = ""},
                        {OPT_SWITCH, "recompute", &flag, .help = ""},
                        {OPT_END, .help = NULL}};
    (void)size;
    options[1].kept = options[2].kept = options[3].kept = options[4].kept = true;
    options_read(options, text, err);
}
static void read_safetensors(char *text, size_t size) {
    StFile f;
    double values[16];
    (void)text, (void)size;
    if (!st_open(&f, path, err)) return;
    for (int i = 0; i < f.count; i++) {
        const int64_t n = st_count(&f.tensors[i]);
        st_read(&f, &f.tensors[i], n > 16 ? n - 16 : 0, n > 16 ? 16 : n, values, ST_F64, err);
        if (st_find(&f, f.tensors[i].name) == NULL) abort();
    }
    st_close(&f);
}
static void read_checkpoint(char *text, size_t size) {
    StFile f;
    (void)text, (void)size;
    if (!st_open(&f, path, err)) return;
    load_model(&f, model, &tiny, err);
    load_optimizer(&f, model, &tiny, 1, 1, err);
    st_close(&f);
}
static void read_state(char *text, size_t size) {
    real logits[6];
    int64_t seed;
    (void)text, (void)size;
    if (state_rows(path, err) == 1) load_state(path, state, &tiny, &seed, logits, err);
}
static void read_tokens(char *text, size_t size) {
    (void)text, (void)size;
    Tokens t = tokens_open(path, 300);
    int32_t inputs[8], targets[8];
    bool fresh[2];
    for (int eot = -1; eot < 300; eot += 100) {
        for (int carry = 0; carry < 2; carry++) {
            Reader r = reader_new(&t, "a test", 1, 2, 4, eot, carry);
            for (int step = 0; step < 5; step++) reader_step(&r, step, inputs, targets, fresh);
            Cursor c = {0};
            for (int i = 0; i < 5; i++) read_windows(&r, &c, 2, inputs, targets);
            reader_free(&r);
        }
    }
}
static void read_dump(char *text, size_t size) {
    int rows, length;
    int32_t *inputs, *targets;
    (void)text, (void)size;
    read_batch(path, 300, &rows, &length, &inputs, &targets);
    free(inputs), free(targets);
}
static void read_tokenizer(char *text, size_t size) {
    size_t count, length;
    Tokenizer *t = tokenizer_read((const unsigned char *)text, size, TOKENS, err);
    if (t == NULL) return;
    int32_t *tokens = tokenizer_encode(t, (const unsigned char *)text, size, &count);
    for (size_t i = 0; i < count; i++) tokenizer_piece(t, tokens[i], i == 0, &length);
    free(tokens);
    tokenizer_free(t);
}

static const struct {
    const char *name;
    void (*read)(char *text, size_t size);
} targets[] = {
    {"json", read_json},          {"config", read_config}, {"options", read_options}, {"safetensors", read_safetensors},
    {"model", read_checkpoint},   {"state", read_state},   {"tokens", read_tokens},   {"batch", read_dump},
    {"tokenizer", read_tokenizer}};
enum { TARGETS = sizeof targets / sizeof targets[0] };

// ----------------------------------------------------------------------------

static void feed(int target, const unsigned char *data, size_t size) {
    static int file = -1;
    if (model == NULL) {
        megalodon_threads(1);
        model = megalodon_new(&tiny, MEGALODON_TRAIN, 1, 4);
        state = state_new(&tiny, 1, 0);
        file = memfd_create("fuzz", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    if (ftruncate(file, 0) != 0 || pwrite(file, data, size, 0) != (ssize_t)size) abort();
    char *text = allocate(size + 1, 1);
    memcpy(text, data, size);
    const int next = dup(file); // the lowest descriptor that a reader can get
    close(next);
    if (setjmp(back) == 0) targets[target].read(text, size);
    for (int fd = next; fd < next + 4; fd++) close(fd);
    while (mappings > 0) mappings--, munmap(mapped[mappings], mapped_size[mappings]);
    free(text);
}

#ifdef LIBFUZZER

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
    static int target = -1;
    const char *name = getenv("FUZZ_TARGET");
    for (int i = 0; target < 0 && name != NULL && i < TARGETS; i++) {
        if (strcmp(name, targets[i].name) == 0) target = i;
    }
    if (target < 0) exit(2);
    feed(target, data, size);
    return 0;
}

#else

int main(void) {
    int passed = 0, failed = 0;
    for (int i = 0; i < TARGETS; i++) {
        char name[512];
        int count = 0;
        snprintf(name, sizeof name, "tests/corpus/%s", targets[i].name);
        DIR *folder = opendir(name);
        for (struct dirent *e; folder != NULL && (e = readdir(folder)) != NULL;) {
            static unsigned char data[1 << 16];
            if (e->d_name[0] == '.') continue;
            snprintf(name, sizeof name, "tests/corpus/%s/%s", targets[i].name, e->d_name);
            FILE *f = fopen(name, "rb");
            if (f == NULL) continue;
            size_t size = fread(data, 1, sizeof data, f);
            fclose(f);
            feed(i, data, size);
            count++;
        }
        if (folder != NULL) closedir(folder);
        const bool ok = count > 0;
        printf("%-4s  %s: survived %d files that fuzzing found\n", ok ? "ok" : "FAIL", targets[i].name, count);
        *(ok ? &passed : &failed) += 1;
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

#endif
