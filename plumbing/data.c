#include <errno.h>    // defines: errno
#include <fcntl.h>    // defines: open
#include <stdlib.h>   // defines: free
#include <string.h>   // defines: memcpy, strerror
#include <sys/mman.h> // defines: mmap
#include <sys/stat.h> // defines: fstat
#include <unistd.h>   // defines: close
#include "plumbing.h"

// llm.c's token files: a header of 256 int32, magic, version, number of tokens; then uint16 tokens.
enum { HEADER = 256 * 4, MAGIC = 20240520, MAGIC_UINT32 = 20240801, VERSION = 1 };

// Turns t, so far the whole file as bytes, into the tokens of a .bin file if it is one.
static void read_header(Tokens *t) {
    int32_t header[3] = {0};
    if (t->count >= sizeof header) memcpy(header, t->bytes, sizeof header);
    if (header[0] == MAGIC_UINT32)
        fatal("%s: a .bin file of 32-bit tokens (magic %d); only 16-bit ones are read (magic %d)", t->path,
              MAGIC_UINT32, MAGIC);
    if (header[0] != MAGIC) return;
    if (header[1] != VERSION)
        fatal("%s: a .bin token file of version %d; only version %d is read", t->path, header[1], VERSION);
    size_t size = t->count;
    if (header[2] < 0 || size < HEADER || size - HEADER != 2 * (size_t)header[2])
        fatal("%s: its header says %d tokens of 2 bytes, but %zu bytes follow it: truncated or damaged", t->path,
              header[2], size < HEADER ? 0 : size - HEADER);
    t->bytes += HEADER;
    t->width = 2;
    t->count = (size_t)header[2];
}

Tokens tokens_open(const char *path, int vocab_size) {
    struct stat info;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &info) != 0) fatal("%s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) fatal("%s: not a regular file", path);
    if (info.st_size == 0) fatal("%s: empty", path);
    Tokens t = {.path = path, .width = 1, .count = (size_t)info.st_size};
    void *memory = mmap(NULL, t.count, PROT_READ, MAP_PRIVATE, fd, 0);
    if (memory == MAP_FAILED) fatal("%s: %s", path, strerror(errno));
    close(fd);
    t.bytes = memory;
    read_header(&t);
    if (t.width == 1 && vocab_size >= 256) return t;
    for (size_t i = 0; i < t.count; i++) {
        if (token_at(&t, i) >= vocab_size)
            fatal("%s: token %zu is %d, but the vocabulary has %d: use --vocab-size %d or more, or other data", path, i,
                  token_at(&t, i), vocab_size, t.width == 1 ? 256 : token_at(&t, i) + 1);
    }
    return t;
}

Tokens tokens_part(const Tokens *t, size_t first, size_t count) {
    Tokens part = *t;
    part.bytes += first * (size_t)t->width;
    part.first += first;
    part.count = count;
    return part;
}

void tokens_need(const Tokens *t, int seq_len, const char *purpose) {
    if (t->count > (size_t)seq_len) return;
    fatal("%s: %zu tokens for %s, but --seq-len %d needs %d: use a smaller --seq-len or %s", t->path, t->count, purpose,
          seq_len, seq_len + 1, t->first > 0 ? "--val-data FILE" : "a longer file");
}

static void copy_row(const Tokens *t, size_t start, int L, int32_t *inputs, int32_t *targets) {
    for (size_t i = 0; i < (size_t)L; i++) {
        inputs[i] = token_at(t, start + i);
        targets[i] = token_at(t, start + i + 1);
    }
}

void draw_rows(const Tokens *t, uint64_t seed, int64_t step, int first_row, int B, int L, int32_t *inputs,
               int32_t *targets) {
    const uint64_t starts = t->count - (size_t)L; // the last one still has a token after its row
    for (int b = 0; b < B; b++) {
        uint32_t r[4];
        megalodon_philox(r, seed, STREAM_DATA, (uint32_t)step, 0, (uint32_t)(first_row + b));
        // 64 random bits as a fraction of 2^64, times starts: bias below starts / 2^64
        uint64_t random = (uint64_t)r[1] << 32 | r[0];
        uint64_t start = (uint64_t)((unsigned __int128)random * starts >> 64);
        copy_row(t, start, L, inputs + (size_t)b * (size_t)L, targets + (size_t)b * (size_t)L);
    }
}

int read_windows(const Tokens *t, size_t first, int B, int L, int32_t *inputs, int32_t *targets) {
    const size_t all = (t->count - 1) / (size_t)L;
    int b = 0;
    for (; b < B && first + (size_t)b < all; b++)
        copy_row(t, (first + (size_t)b) * (size_t)L, L, inputs + (size_t)b * (size_t)L,
                 targets + (size_t)b * (size_t)L);
    return b;
}

void read_batch(const char *path, int vocab_size, int *B, int *L, int32_t **inputs, int32_t **targets) {
    static const char *const names[] = {"input.tokens", "input.targets"};
    StFile f;
    char err[ST_ERR];
    if (!st_open(&f, path, err)) fatal("--batch %s", err);
    for (int i = 0; i < 2; i++) {
        const StTensor *t = st_find(&f, names[i]);
        if (t == NULL) fatal("--batch %s: no tensor '%s'", path, names[i]);
        if (i == 0 && (t->ndim != 2 || st_count(t) < 1 || st_count(t) > INT32_MAX))
            fatal("--batch %s: '%s' is not (B, L)", path, names[i]);
        if (i == 0) *B = (int)t->shape[0], *L = (int)t->shape[1];
        if (t->ndim != 2 || t->shape[0] != *B || t->shape[1] != *L)
            fatal("--batch %s: '%s' is not (%d, %d) as '%s' is", path, names[i], *B, *L, names[0]);
        int32_t *values = allocate((size_t)st_count(t), sizeof *values);
        if (!st_read(&f, t, 0, st_count(t), values, ST_I32, err)) fatal("--batch %s", err);
        for (int64_t n = 0; n < st_count(t); n++) {
            if (values[n] < -i || values[n] >= vocab_size) // a target may be -1: not counted
                fatal("--batch %s: '%s' has %d at row %d, position %d; the vocabulary has %d", path, names[i],
                      values[n], (int)(n / *L), (int)(n % *L), vocab_size);
        }
        *(i == 0 ? inputs : targets) = values;
    }
    st_close(&f);
}
