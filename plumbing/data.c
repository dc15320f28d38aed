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
    int fd = open(path, O_RDONLY | O_NONBLOCK);
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

// ----------------------------------------------------------------------------
// rows of a batch

// Without --eot all is one document. With it each EOT ends a document, and the next one begins there, too, so that a
// model learns how documents begin. Those without any other token are left out.
static void find_documents(Reader *r) {
    const Tokens *t = &r->tokens;
    size_t room = 0;
    if (r->eot < 0) {
        r->documents = allocate(1, sizeof *r->documents);
        r->documents[r->count++] = (Document){0, t->count - 1};
        return;
    }
    for (size_t start = 0, i = 1; i < t->count; i++) {
        const bool ends = token_at(t, i) == r->eot;
        if (!ends && i + 1 < t->count) continue;
        if (i > start + 1 || token_at(t, start) != r->eot || !ends) {
            if (r->count == room) {
                r->documents = realloc(r->documents, (room = 2 * room + 1024) * sizeof *r->documents);
                if (r->documents == NULL) fatal("out of memory for the documents of %s", t->path);
            }
            r->documents[r->count++] = (Document){start, i};
        }
        start = i;
    }
    if (r->count == 0) fatal("--eot %d: %s has no document, nothing but that token", r->eot, t->path);
}

Reader reader_new(const Tokens *t, const char *purpose, uint64_t seed, int rows, int L, int eot, bool carry) {
    Reader r = {.tokens = *t, .seed = seed, .rows = rows, .L = L, .eot = eot, .carry = carry};
    r.batch = r.here = rows, r.length = L;
    const size_t need = eot < 0 ? (size_t)L + 1 : 2;
    if (t->count < need)
        fatal("%s: %zu tokens for %s, but --seq-len %d needs %zu: use a smaller --seq-len or %s", t->path, t->count,
              purpose, L, need, t->first > 0 ? "--val-data FILE" : "a longer file");
    find_documents(&r);
    r.places = allocate((size_t)rows, sizeof *r.places);
    return r;
}

void reader_free(Reader *r) { free(r->documents), free(r->places); }

// 64 random bits as a fraction of 2^64, times n: 0 .. n-1, with a bias below n / 2^64.
static size_t draw(const Reader *r, int64_t number, uint32_t purpose, int row, size_t n) {
    uint32_t words[4];
    megalodon_philox(words, r->seed, STREAM_DATA, (uint32_t)number, purpose, (uint32_t)row);
    uint64_t random = (uint64_t)words[1] << 32 | words[0];
    return (size_t)((unsigned __int128)random * n >> 64);
}

static bool is_here(const Reader *r, int row) {
    const int place = row % r->batch;
    return place >= r->row && place < r->row + r->here;
}

// Row n of this process: tokens from start on, and after each the next one as target, as far as `end`; then nothing:
// EOT without target.
static void fill_row(const Reader *r, size_t start, size_t end, int n, int32_t *inputs, int32_t *targets) {
    const size_t length = (size_t)r->length, at = (size_t)n * length;
    start += (size_t)r->from;
    for (size_t i = 0; i < length; i++) {
        const bool inside = start + i < end;
        inputs[at + i] = inside ? token_at(&r->tokens, start + i) : r->eot;
        targets[at + i] = inside ? token_at(&r->tokens, start + i + 1) : -1;
    }
}

// A stream of documents in a row: the piece after the one of the step before, or a newly drawn document's first.
static void move_on(const Reader *r, Place *p, int row) {
    if (p->at + (size_t)r->L < p->end) {
        p->at += (size_t)r->L;
        return;
    }
    const Document d = r->documents[draw(r, p->drawn++, 1, row, r->count)];
    p->start = p->at = d.start, p->end = d.end;
}

void reader_step(Reader *r, int64_t step, int32_t *inputs, int32_t *targets, bool *fresh) {
    const size_t L = (size_t)r->L, windows = (r->tokens.count - 1) / L;
    for (int row = 0, n = 0; row < r->rows; row++) {
        size_t start, end = r->tokens.count - 1;
        if (!is_here(r, row)) continue;
        fresh[n] = true;
        if (r->eot < 0 && !r->carry) { // anywhere; the last start still has a token after its row
            start = draw(r, step, 0, row, r->tokens.count - L);
        } else if (r->eot < 0) { // window after window, from a drawn one on, round and round
            size_t window = (draw(r, 0, 0, row, windows) + (size_t)step) % windows;
            start = window * L;
            fresh[n] = step == 0 || window == 0;
        } else if (!r->carry) {
            const Document d = r->documents[draw(r, step, 0, row, r->count)];
            start = d.start, end = d.end;
        } else {
            Place *p = &r->places[row];
            for (; p->next <= step; p->next++) move_on(r, p, row);
            start = p->at, end = p->end;
            fresh[n] = start == p->start;
        }
        fill_row(r, start, end, n++, inputs, targets);
    }
}

int read_windows(const Reader *r, Cursor *c, int B, int32_t *inputs, int32_t *targets) {
    const size_t L = (size_t)r->L;
    int b = 0;
    while (b < B && c->document < r->count) {
        const Document d = r->documents[c->document];
        const size_t start = d.start + c->piece++ * L;
        if (start < d.end && (r->eot >= 0 || start + L <= d.end)) {
            if (is_here(r, b)) fill_row(r, start, d.end, b - r->row, inputs, targets);
            b++;
        } else {
            c->document++, c->piece = 0;
        }
    }
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
