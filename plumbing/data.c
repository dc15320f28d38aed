// Token files and the rows that training and validation read from them.
#include <errno.h>    // defines: errno
#include <fcntl.h>    // defines: open
#include <signal.h>   // defines: sigaction
#include <stdlib.h>   // defines: free
#include <string.h>   // defines: memcpy, strcmp, strerror, strlen
#include <sys/mman.h> // defines: mmap
#include <sys/stat.h> // defines: fstat
#include <unistd.h>   // defines: _exit, close, read, write
#include "plumbing.h"

// llm.c's token files: a header of 256 int32, magic, version, number of tokens; then uint16 tokens.
enum { HEADER = 256 * 4, MAGIC = 20240520, MAGIC_UINT32 = 20240801, VERSION = 1 };

bool find_data_format(const char *name, DataFormat *format) {
    static const char *const names[] = {[FORMAT_AUTO] = "auto", [FORMAT_BYTES] = "bytes", [FORMAT_UINT16] = "uint16"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *format = (DataFormat)i;
        return true;
    }
    return false;
}

// ----------------------------------------------------------------------------
// Truncation of a mapped file. file_check() detects it by the file's size. A read beyond the new end before that raises
// SIGBUS, whose handler prints a message and ends the program; it may call async-signal-safe functions only.

enum { MAX_MAPPED = 4 }; // watch the files opened last; ./train opens two
static Tokens mapped[MAX_MAPPED];

static void put_text(const char *text) {
    if (write(STDERR_FILENO, text, strlen(text)) < 0) return; // nothing can be done if stderr fails
}

static void put_number(size_t n) {
    char digits[24] = "", *p = digits + sizeof digits - 1;
    for (; p > digits && (n > 0 || digits[sizeof digits - 2] == 0); n /= 10) *--p = (char)('0' + n % 10);
    put_text(p);
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    (void)context;
    const uintptr_t address = (uintptr_t)info->si_addr;
    for (const Tokens *t = mapped; t < mapped + MAX_MAPPED; t++) {
        struct stat now;
        const uintptr_t first = (uintptr_t)t->memory;
        if (address < first || address - first >= t->size) continue;
        progress_end();
        put_text("error: "), put_text(t->path);
        if (fstat(t->file, &now) == 0 && (size_t)now.st_size < t->size) {
            put_text(": truncated while it was read: "), put_number(t->size), put_text(" bytes when it was opened, ");
            put_number((size_t)now.st_size), put_text(" now\n");
        } else {
            put_text(": cannot be read any more (a disk or network error)\n");
        }
        _exit(1);
    }
    signal(number, SIG_DFL); // another address: the instruction is executed again and ends the program
}

static void watch_truncation(const Tokens *t) {
    static int count;
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
    mapped[count++ % MAX_MAPPED] = *t;
    sigaction(SIGBUS, &action, NULL);
}

// Ends the program if the file is shorter than when it was opened.
static void file_check(const Tokens *t) {
    struct stat now;
    if (t->file < 0 || fstat(t->file, &now) != 0 || (size_t)now.st_size >= t->size) return;
    fatal("%s: truncated while it was read: %zu bytes when it was opened, %zu now. Saved checkpoints stay; restore "
          "the file, then continue with --resume",
          t->path, t->size, (size_t)now.st_size);
}

// ----------------------------------------------------------------------------
// opening

// Reads the whole file into memory, for file systems that cannot map it.
static unsigned char *read_whole(const char *path, int fd, size_t size) {
    unsigned char *memory = allocate(size, 1);
    for (size_t done = 0; done < size;) {
        const ssize_t n = read(fd, memory + done, size - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fatal("%s: %s", path, strerror(errno));
        if (n == 0) fatal("%s: truncated while it was read: %zu bytes, %zu now", path, size, done);
        done += (size_t)n;
    }
    return memory;
}

static bool cannot_map(int error) {
    return error == ENODEV || error == ENOTSUP || error == EOPNOTSUPP || error == ENOSYS || error == EINVAL ||
           error == EACCES;
}

// If the file is a .bin file, changes t from the bytes of the whole file to its tokens and returns true.
static bool read_header(Tokens *t) {
    int32_t header[3] = {0};
    if (t->count >= sizeof header) memcpy(header, t->bytes, sizeof header);
    if (header[0] == MAGIC_UINT32)
        fatal("%s: a .bin file of 32-bit tokens (magic %d); only 16-bit tokens are supported (magic %d)", t->path,
              MAGIC_UINT32, MAGIC);
    if (header[0] != MAGIC) return false;
    if (header[1] != VERSION)
        fatal("%s: a .bin token file of version %d; only version %d is supported", t->path, header[1], VERSION);
    size_t size = t->count;
    if (header[2] < 0 || size < HEADER || size - HEADER != 2 * (size_t)header[2])
        fatal("%s: its header says %d tokens of 2 bytes, but %zu bytes follow it: truncated or damaged", t->path,
              header[2], size < HEADER ? 0 : size - HEADER);
    t->bytes += HEADER;
    t->width = 2;
    t->count = (size_t)header[2];
    return true;
}

// Control characters that do not occur in text. Backspace, tab, line feed, vertical tab, form feed, carriage return and
// escape do.
static bool is_control(unsigned char byte) {
    return (byte < 32 && !(byte >= 8 && byte <= 13) && byte != 27) || byte == 127;
}

// Returns whether a file looks like uint16 tokens without a header (numpy's tofile, nanoGPT's train.bin). Tokenizers
// give small ids to frequent tokens, so that, in a sample of the file,
//   1. at least 90 % of the values are below the vocabulary size,
//   2. more than 2 % of the bytes are control characters, which occur in text only as UTF-16 or UTF-32,
//   3. the high bytes are smaller on average than the low bytes, unlike in compressed data or sound.
// UTF-16 and UTF-32 are recognized by their byte order mark. With at most 256 tokens, a file can only be bytes.
static bool looks_like_uint16(const Tokens *t, int vocab_size) {
    enum { BLOCKS = 64, BLOCK = 4096 };
    const unsigned char *bytes = t->bytes;
    const size_t step = t->size <= (size_t)BLOCKS * BLOCK ? BLOCK : t->size / BLOCKS / 2 * 2;
    size_t values = 0, valid = 0, controls = 0, low = 0, high = 0;
    if (vocab_size <= 256 || t->size % 2 != 0 || (bytes[0] == 0xFF && bytes[1] == 0xFE)) return false;
    for (size_t at = 0; at < t->size; at += step) {
        for (size_t i = at; i < at + BLOCK && i < t->size; i += 2) {
            values++;
            valid += (bytes[i] | bytes[i + 1] << 8) < vocab_size;
            controls += (size_t)is_control(bytes[i]) + (size_t)is_control(bytes[i + 1]);
            low += bytes[i], high += bytes[i + 1];
        }
    }
    return valid >= values * 9 / 10 && controls > values / 25 && high < low * 7 / 8;
}

Tokens tokens_open_as(const char *path, int vocab_size, DataFormat format) {
    struct stat info;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info) != 0) fatal("%s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode)) fatal("%s: not a regular file", path);
    if (info.st_size == 0) fatal("%s: empty", path);
    Tokens t = {.path = path, .width = 1, .count = (size_t)info.st_size, .size = (size_t)info.st_size, .file = fd};
    void *memory = mmap(NULL, t.size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (memory == MAP_FAILED && !cannot_map(errno)) fatal("%s: %s", path, strerror(errno));
    if (memory == MAP_FAILED) {
        if (ranks.rank == 0)
            fprintf(stderr, "warning: %s: its file system cannot map files (%s); all %zu bytes are read into memory\n",
                    path, strerror(errno), t.size);
        memory = read_whole(path, fd, t.size);
        close(fd);
        t.file = -1;
    }
    t.bytes = t.memory = memory;
    if (t.file >= 0) watch_truncation(&t);
    const bool header = format != FORMAT_BYTES && read_header(&t);
    if (!header && format == FORMAT_AUTO && looks_like_uint16(&t, vocab_size))
        fatal("%s: looks like uint16 tokens without a header. Use --data-format uint16, or --data-format bytes to "
              "read each byte as a token",
              path);
    if (!header && format == FORMAT_UINT16) {
        if (t.size % 2 != 0) fatal("%s: %zu bytes are not a whole number of uint16 tokens", path, t.size);
        t.width = 2, t.count /= 2;
    }
    if (vocab_size >= (t.width == 1 ? 256 : 65536)) return t;
    for (size_t i = 0; i < t.count; i++) {
        if (token_at(&t, i) >= vocab_size)
            fatal("%s: token %zu is %d, but the vocabulary has %d: use --vocab-size %d or more, or other data", path, i,
                  token_at(&t, i), vocab_size, t.width == 1 ? 256 : token_at(&t, i) + 1);
    }
    return t;
}

Tokens tokens_open(const char *path, int vocab_size) { return tokens_open_as(path, vocab_size, FORMAT_AUTO); }

Tokens tokens_part(const Tokens *t, size_t first, size_t count) {
    Tokens part = *t;
    part.bytes += first * (size_t)t->width;
    part.first += first;
    part.count = count;
    return part;
}

// ----------------------------------------------------------------------------
// XXH64 with seed 0 (Collet, xxhash.com): four lanes of 8 bytes, the remaining bytes, a finalizer

static const uint64_t P1 = 0x9E3779B185EBCA87u, P2 = 0xC2B2AE3D27D4EB4Fu, P3 = 0x165667B19E3779F9u,
                      P4 = 0x85EBCA77C2B2AE63u, P5 = 0x27D4EB2F165667C5u;

static uint64_t rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

static uint64_t hash_round(uint64_t lane, const unsigned char *p) {
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return rotate(lane + word * P2, 31) * P1;
}

static uint64_t xxh64(const unsigned char *p, size_t size) {
    const unsigned char *end = p + size;
    uint64_t lanes[4] = {P1 + P2, P2, 0, -P1}, h = P5;
    if (size >= 32) {
        for (; end - p >= 32; p += 32) {
            for (size_t i = 0; i < 4; i++) lanes[i] = hash_round(lanes[i], p + 8 * i);
        }
        h = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
        for (int i = 0; i < 4; i++) h = (h ^ rotate(lanes[i] * P2, 31) * P1) * P1 + P4;
    }
    h += size;
    for (; end - p >= 8; p += 8) h = rotate(h ^ hash_round(0, p), 27) * P1 + P4;
    if (end - p >= 4) {
        uint32_t word;
        memcpy(&word, p, sizeof word);
        h = rotate(h ^ word * P1, 23) * P2 + P3;
        p += 4;
    }
    for (; p < end; p++) h = rotate(h ^ *p * P5, 11) * P1;
    h = (h ^ h >> 33) * P2;
    h = (h ^ h >> 29) * P3;
    return h ^ h >> 32;
}

void tokens_fingerprint(const Tokens *t, char text[FINGERPRINT_SIZE]) {
    const uint64_t hash = xxh64(t->memory, t->size);
    file_check(t);
    snprintf(text, FINGERPRINT_SIZE, "%zu bytes, xxh64 %016llx", t->size, (unsigned long long)hash);
}

// ----------------------------------------------------------------------------
// rows of a batch

// Index of the first `token` from i on; count if there is none.
static size_t find_token(const Tokens *t, size_t i, int token) {
    if (t->width == 1) {
        const void *found = token < 0 || token > 255 ? NULL : memchr(t->bytes + i, token, t->count - i);
        return found == NULL ? t->count : (size_t)((const unsigned char *)found - t->bytes);
    }
    while (i < t->count && token_at(t, i) != token) i++;
    return i;
}

// Finds the documents, writes them to `documents` unless it is NULL, and returns their number. Without --eot there is
// one. With it each EOT ends a document, and the next document starts with that EOT, so that a model learns how
// documents start. Documents of nothing but EOTs are left out.
static size_t find_documents(const Reader *r, Document *documents) {
    const Tokens *t = &r->tokens;
    size_t count = 0, rows = 0;
    for (size_t start = 0, next; start + 1 < t->count; start = next) {
        next = find_token(t, start + 1, r->eot);
        const size_t end = next < t->count ? next : t->count - 1;
        if (next == start + 1 && token_at(t, start) == r->eot) continue;
        if (documents != NULL) documents[count] = (Document){start, end, rows};
        rows += (end - start + (size_t)r->L - 1) / (size_t)r->L;
        count++;
    }
    return count;
}

Reader reader_new(const Tokens *t, const char *purpose, uint64_t seed, int rows, int64_t L, int eot, bool carry) {
    Reader r = {.tokens = *t, .seed = seed, .rows = rows, .L = L, .eot = eot, .carry = carry};
    r.batch_size = r.num_rows = rows, r.split = split_none(L, 1);
    const size_t need = eot >= 0 ? 2 : (carry ? (size_t)rows : 1) * (size_t)L + 1;
    const char *other = t->first > 0 ? "--val-data FILE" : "a longer file";
    if (t->count < need && eot < 0 && carry)
        fatal("%s: %zu tokens for %s, but --carry-state divides them into %d streams (--batch-size x --grad-accum) of "
              "--seq-len %lld or more, which needs %zu: use smaller values or %s",
              t->path, t->count, purpose, rows, (long long)L, need, other);
    if (t->count < need)
        fatal("%s: %zu tokens for %s, but --seq-len %lld needs %zu: use a smaller --seq-len or %s", t->path, t->count,
              purpose, (long long)L, need, other);
    r.count = find_documents(&r, NULL);
    if (r.count == 0) fatal("--eot %d: %s has no document, only that token", eot, t->path);
    if (eot >= 0 && carry && r.count < (size_t)rows)
        fatal("%s: %zu documents for %s, but --carry-state reads %d at a time (--batch-size x --grad-accum): use "
              "smaller values or more documents, or leave out --eot",
              t->path, r.count, purpose, rows);
    if (r.count > host_memory(ranks.local_size, 0) / sizeof *r.documents)
        fatal("%s: the table of its %zu documents needs %zu MiB; %zu MiB are available: use a file with fewer "
              "documents, or "
              "leave out --eot %d",
              t->path, r.count, r.count * sizeof *r.documents >> 20, host_memory(ranks.local_size, 0) >> 20, eot);
    r.documents = allocate(r.count, sizeof *r.documents);
    find_documents(&r, r.documents);
    r.next = r.count; // the first pass is still to be shuffled
    r.places = allocate(eot >= 0 && carry ? (size_t)rows : 0, sizeof *r.places);
    file_check(t);
    return r;
}

void reader_free(Reader *r) { free(r->documents), free(r->places); }

size_t reader_bytes(const Reader *r) {
    const size_t file = r->tokens.file < 0 ? r->tokens.size : 0;
    const size_t places = r->eot >= 0 && r->carry ? (size_t)r->rows : 0;
    return r->count * sizeof *r->documents + places * sizeof *r->places + file;
}

// A random number in 0 .. n-1: n times 64 random bits as a fraction of 2^64. Its bias is below n / 2^64.
static size_t draw(const Reader *r, int64_t number, uint32_t purpose, size_t index, size_t n) {
    uint32_t words[4];
    megalodon_philox(words, r->seed, STREAM_DATA, (uint32_t)number, purpose, (uint32_t)index);
    uint64_t random = (uint64_t)words[1] << 32 | words[0];
    return (size_t)((unsigned __int128)random * n >> 64);
}

static bool is_own_row(const Reader *r, int row) {
    const int index = row % r->batch_size;
    return index >= r->first_row && index < r->first_row + r->num_rows;
}

// Fills this rank's row n, counted over the batches of a step: inputs from index `start` on, each with the next token
// as target, up to index `end`. Beyond it, inputs are EOT (or 0) and targets are -1.
static void fill_row(const Reader *r, size_t start, size_t end, int n, int32_t *inputs, int32_t *targets) {
    const int32_t padding = r->eot >= 0 ? r->eot : 0;
    const int64_t B = r->num_rows, batch = n / B * B * split_own(&r->split), row = n % B;
    for (int64_t segment = 0; segment < split_segments(&r->split); segment++) {
        const TokenRange part = split_part(&r->split, segment, r->split.cp_rank);
        const size_t from = start + (size_t)part.first;
        const size_t at = (size_t)(batch + B * split_offset(&r->split, segment) + row * part.count);
        for (size_t i = 0; i < (size_t)part.count; i++) {
            const bool inside = from + i < end;
            inputs[at + i] = inside ? token_at(&r->tokens, from + i) : padding;
            targets[at + i] = inside ? token_at(&r->tokens, from + i + 1) : -1;
        }
    }
}

// The document of row k, counted over the rows of all documents: the last one whose first row is at most k.
static Document document_of(const Reader *r, size_t k) {
    size_t first = 0, count = r->count;
    while (count > 1) {
        const size_t half = count / 2;
        if (r->documents[first + half].row <= k)
            first += half, count -= half;
        else
            count = half;
    }
    return r->documents[first];
}

// Fisher-Yates shuffle of the documents, starting from the order of the previous pass.
static void shuffle(Reader *r) {
    for (size_t i = r->count; i > 1; i--) {
        const size_t other = draw(r, r->pass, 1, i, i);
        const Document d = r->documents[i - 1];
        r->documents[i - 1] = r->documents[other], r->documents[other] = d;
    }
    r->pass++, r->next = 0;
}

// Moves a row to the next window of its document, or to the next document of the pass.
static void advance(Reader *r, Place *p) {
    if (p->at + (size_t)r->L < p->end) {
        p->at += (size_t)r->L;
        return;
    }
    if (r->next == r->count) shuffle(r);
    const Document d = r->documents[r->next++];
    p->start = p->at = d.start, p->end = d.end;
}

// Index of the first token of stream `row`, which is also the end of stream row - 1.
static size_t stream_start(const Reader *r, size_t row) {
    const unsigned __int128 predicted = r->tokens.count - 1, rows = (unsigned)r->rows;
    return (size_t)(predicted * row / rows);
}

void reader_step(Reader *r, int64_t step, int32_t *inputs, int32_t *targets, bool *fresh) {
    const size_t L = (size_t)r->L;
    file_check(&r->tokens);
    for (; r->eot >= 0 && r->carry && r->step <= step; r->step++) {
        for (int row = 0; row < r->rows; row++) advance(r, &r->places[row]);
    }
    for (int row = 0, n = 0; row < r->rows; row++) {
        size_t start, end = r->tokens.count - 1;
        if (!is_own_row(r, row)) continue;
        fresh[n] = true;
        if (r->eot < 0 && !r->carry) { // any position that leaves L inputs and a target after the last one
            start = draw(r, step, 0, (size_t)row, r->tokens.count - L);
        } else if (r->eot < 0) { // the next window of stream `row`, cyclically
            const size_t begin = stream_start(r, (size_t)row);
            end = stream_start(r, (size_t)row + 1);
            start = begin + (size_t)step % ((end - begin + L - 1) / L) * L;
            fresh[n] = start == begin;
        } else if (!r->carry) { // any row of any document
            const Document last = r->documents[r->count - 1];
            const size_t k = draw(r, step, 0, (size_t)row, last.row + (last.end - last.start + L - 1) / L);
            const Document d = document_of(r, k);
            start = d.start + (k - d.row) * L, end = d.end;
        } else {
            const Place *p = &r->places[row];
            start = p->at, end = p->end;
            fresh[n] = start == p->start;
        }
        fill_row(r, start, end, n++, inputs, targets);
    }
    file_check(&r->tokens); // data read beyond a new end are zeros
}

int read_windows(const Reader *r, Cursor *c, int B, int32_t *inputs, int32_t *targets) {
    const size_t L = (size_t)r->L;
    int b = 0;
    file_check(&r->tokens);
    while (b < B && c->document < r->count) {
        const Document d = r->documents[c->document];
        const size_t start = d.start + c->window++ * L;
        if (start < d.end && (r->eot >= 0 || start + L <= d.end)) {
            if (is_own_row(r, b)) fill_row(r, start, d.end, b - r->first_row, inputs, targets);
            b++;
        } else {
            c->document++, c->window = 0;
        }
    }
    file_check(&r->tokens);
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
            const bool ignored = i == 1 && (values[n] == -1 || values[n] == -100);
            if ((values[n] < 0 && !ignored) || values[n] >= vocab_size)
                fatal("--batch %s: '%s' has %d at row %d, position %d; the vocabulary has %d", path, names[i],
                      values[n], (int)(n / *L), (int)(n % *L), vocab_size);
        }
        *(i == 0 ? inputs : targets) = values;
    }
    st_close(&f);
}
