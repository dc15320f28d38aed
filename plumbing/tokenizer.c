// llama2.c's tokenizer.bin: reading it, and encoding text by byte pair encoding.
#include <fcntl.h>    // defines: open
#include <errno.h>    // defines: errno
#include <math.h>     // defines: isfinite
#include <stdlib.h>   // defines: free, malloc
#include <string.h>   // defines: memcmp, memcpy, strerror
#include <sys/mman.h> // defines: mmap
#include <sys/stat.h> // defines: fstat
#include <unistd.h>   // defines: close
#include "plumbing.h"

// The file: int32 length of the longest piece; then for each token float32 score, int32 length, and its bytes, in which
// SentencePiece's word mark U+2581 is a space. All little-endian. The number of tokens is not stored.
enum { MAX_PIECE = 1 << 16, FIRST_BYTE = 3 }; // <unk> <s> </s>, then <0x00> .. <0xFF>
enum { MAX_PADDING = 1023 };                  // vocabularies are padded to a multiple of 64, 128, ..., at most 1024

typedef struct {
    const unsigned char *bytes;
    int length;
    float score;
} Piece;

struct Tokenizer {
    Piece *pieces;
    int count;
    size_t longest; // bytes of the longest piece
    int32_t *table; // (slots) hash table of tokens by their bytes, open addressing; -1: empty
    size_t slots;   // a power of 2
    void *mapped;   // the file, if tokenizer_open mapped it
    size_t size;    // bytes of the file
};

static size_t slot_of(const Tokenizer *t, const unsigned char *bytes, size_t length) { // FNV-1a
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < length; i++) hash = (hash ^ bytes[i]) * 1099511628211u;
    return (size_t)(hash ^ hash >> 32) & (t->slots - 1);
}

// The first token with these bytes; -1 if there is none.
static int32_t find(const Tokenizer *t, const unsigned char *bytes, size_t length) {
    if (length > t->longest) return -1;
    for (size_t s = slot_of(t, bytes, length);; s = (s + 1) & (t->slots - 1)) {
        const int32_t token = t->table[s];
        if (token < 0) return -1;
        const Piece *p = &t->pieces[token];
        if ((size_t)p->length == length && memcmp(p->bytes, bytes, length) == 0) return token;
    }
}

static void insert(Tokenizer *t, int32_t token) {
    const Piece *p = &t->pieces[token];
    if (find(t, p->bytes, (size_t)p->length) >= 0) return;
    size_t s = slot_of(t, p->bytes, (size_t)p->length);
    while (t->table[s] >= 0) s = (s + 1) & (t->slots - 1);
    t->table[s] = token;
}

static bool read_pieces(Tokenizer *t, const unsigned char *bytes, size_t size, char *err) {
    int32_t longest = 0, seen = 0;
    size_t at = sizeof longest, count = 0;
    if (size >= at) memcpy(&longest, bytes, sizeof longest);
    if (longest < 1 || longest > MAX_PIECE)
        return snprintf(err, ST_ERR, "its header says that the longest piece has %d bytes: not a tokenizer of llama2.c",
                        longest),
               false;
    for (; at < size; count++) {
        Piece p;
        if (size - at < 8) return snprintf(err, ST_ERR, "ends within token %zu: truncated", count), false;
        memcpy(&p.score, bytes + at, 4);
        memcpy(&p.length, bytes + at + 4, 4);
        at += 8;
        if (!isfinite(p.score))
            return snprintf(err, ST_ERR, "token %zu: its score is %g", count, (double)p.score), false;
        if (p.length < 0 || p.length > longest || (size_t)p.length > size - at)
            return snprintf(err, ST_ERR, "token %zu: has %d bytes, but the maximum is %d and %zu are left", count,
                            p.length, longest, size - at),
                   false;
        p.bytes = bytes + at;
        at += (size_t)p.length;
        seen = p.length > seen ? p.length : seen;
        if (count < (size_t)t->count) t->pieces[count] = p;
    }
    if (count > (size_t)t->count)
        return snprintf(err, ST_ERR, "holds %zu tokens, but the model has %d", count, t->count), false;
    if ((size_t)t->count - count > MAX_PADDING)
        return snprintf(err, ST_ERR,
                        "holds %zu tokens, but the model has %d: %zu more; at most %d are taken for padding", count,
                        t->count, (size_t)t->count - count, MAX_PADDING),
               false;
    t->count = (int)count;
    if (seen != longest)
        return snprintf(err, ST_ERR, "its longest piece has %d bytes, but its header says %d", seen, longest), false;
    t->longest = (size_t)longest;
    return true;
}

// Token FIRST_BYTE + b must be <0xBB>, B being hexadecimal digits: then any text can be encoded.
static bool check_bytes(const Tokenizer *t, char *err) {
    char name[8];
    if (t->count < FIRST_BYTE + 256) return snprintf(err, ST_ERR, "%d tokens: too few for all bytes", t->count), false;
    for (int b = 0; b < 256; b++) {
        const Piece *p = &t->pieces[FIRST_BYTE + b];
        snprintf(name, sizeof name, "<0x%02X>", b);
        if (p->length != 6 || memcmp(p->bytes, name, 6) != 0)
            return snprintf(err, ST_ERR, "token %d is not %s: no byte fallback", FIRST_BYTE + b, name), false;
    }
    return true;
}

Tokenizer *tokenizer_read(const unsigned char *bytes, size_t size, int vocab_size, char *err) {
    Tokenizer *t = allocate(1, sizeof *t);
    t->count = vocab_size;
    t->pieces = allocate((size_t)vocab_size, sizeof *t->pieces);
    for (t->slots = 16; t->slots < 2 * (size_t)vocab_size;) t->slots *= 2;
    t->table = allocate(t->slots, sizeof *t->table);
    for (size_t s = 0; s < t->slots; s++) t->table[s] = -1;
    if (!read_pieces(t, bytes, size, err) || !check_bytes(t, err)) {
        tokenizer_free(t);
        return NULL;
    }
    for (int i = FIRST_BYTE + 256; i < t->count; i++) insert(t, i); // special and byte tokens do not match text
    return t;
}

Tokenizer *tokenizer_open(const char *path, int vocab_size) {
    char err[ST_ERR];
    struct stat info;
    int fd = open(path, O_RDONLY | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &info) != 0) fatal("--tokenizer %s: %s", path, strerror(errno));
    if (!S_ISREG(info.st_mode) || info.st_size == 0) fatal("--tokenizer %s: empty, or not a regular file", path);
    void *memory = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (memory == MAP_FAILED) fatal("--tokenizer %s: %s", path, strerror(errno));
    close(fd);
    Tokenizer *t = tokenizer_read(memory, (size_t)info.st_size, vocab_size, err);
    if (t == NULL) fatal("--tokenizer %s: %s", path, err);
    t->mapped = memory, t->size = (size_t)info.st_size;
    return t;
}

int tokenizer_count(const Tokenizer *t) { return t != NULL ? t->count : 256; }

void tokenizer_free(Tokenizer *t) {
    if (t->mapped != NULL) munmap(t->mapped, t->size);
    free(t->pieces), free(t->table), free(t);
}

// ----------------------------------------------------------------------------
// encoding. At first each character is a symbol. Then, while two neighbours together are a token, the pair with the
// highest score is merged, the leftmost one of equals. A symbol that is no token in the end becomes byte tokens.

typedef struct {
    size_t start, length; // position in the text; length 0: merged into its left neighbour
    size_t left, right;   // indices of the neighbours, or NONE
} Symbol;
static const size_t NONE = SIZE_MAX;

typedef struct {
    float score;
    size_t left, right; // indices of the symbols
    size_t length;      // bytes of both when the pair was pushed
} Pair;

typedef struct {
    const Tokenizer *t;
    const unsigned char *text;
    Symbol *symbols;
    Pair *heap; // (pairs) binary heap, the best pair first
    size_t pairs;
    size_t capacity; // pairs that the heap has space for
    size_t max;      // pairs that it can ever hold
} Encoder;

static bool before(const Pair *a, const Pair *b) {
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

static void push(Encoder *e, Pair pair) {
    if (e->pairs == e->capacity) {
        e->capacity = 2 * e->capacity + 256 < e->max ? 2 * e->capacity + 256 : e->max;
        e->heap = realloc(e->heap, e->capacity * sizeof *e->heap);
        if (e->heap == NULL) fatal("out of memory for a text's tokens");
    }
    size_t i = e->pairs++;
    for (; i > 0 && before(&pair, &e->heap[(i - 1) / 2]); i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = pair;
}

static Pair pop(Encoder *e) {
    const Pair best = e->heap[0], last = e->heap[--e->pairs];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < e->pairs; i = child) {
        if (child + 1 < e->pairs && before(&e->heap[child + 1], &e->heap[child])) child++;
        if (!before(&e->heap[child], &last)) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = last;
    return best;
}

static void push_if_token(Encoder *e, size_t left, size_t right) {
    if (left == NONE || right == NONE) return;
    const size_t length = e->symbols[left].length + e->symbols[right].length;
    const int32_t token = find(e->t, e->text + e->symbols[left].start, length);
    if (token >= 0) push(e, (Pair){e->t->pieces[token].score, left, right, length});
}

// Bytes of the UTF-8 character at text, of which `left` bytes are left; 1 if it is invalid.
static size_t character_length(const unsigned char *text, size_t left) {
    const size_t length = text[0] < 0xC2 ? 1 : text[0] < 0xE0 ? 2 : text[0] < 0xF0 ? 3 : text[0] < 0xF5 ? 4 : 1;
    for (size_t i = 1; i < length; i++) {
        if (i >= left || (text[i] & 0xC0) != 0x80) return 1;
    }
    return length;
}

static void merge_all(Encoder *e) {
    while (e->pairs > 0) {
        const Pair pair = pop(e);
        Symbol *left = &e->symbols[pair.left], *right = &e->symbols[pair.right];
        // stale: one of the two has been merged with another symbol since
        if (left->right != pair.right || left->length == 0 || right->length == 0 ||
            left->length + right->length != pair.length)
            continue;
        left->length += right->length, right->length = 0;
        left->right = right->right;
        if (left->right != NONE) e->symbols[left->right].left = pair.left;
        push_if_token(e, left->left, pair.left);
        push_if_token(e, pair.left, left->right);
    }
}

// Memory for each of n + 1 characters: the marked text, a symbol, a token, and two pairs. The heap has up to n pairs at
// first; each of at most n merges removes one and adds up to two.
enum { ENCODER_BYTES = 1 + sizeof(Symbol) + sizeof(int32_t) + 2 * sizeof(Pair) };

size_t tokenizer_encode_bytes(size_t n) { return (n + 1) * ENCODER_BYTES; }

int32_t *tokenizer_encode(const Tokenizer *t, const unsigned char *text, size_t n, bool first, size_t *count) {
    *count = 0;
    if (n == 0) return allocate(1, sizeof(int32_t));
    unsigned char *marked = allocate(n + 1, 1);
    size_t size = 0;
    if (first) marked[size++] = ' '; // SentencePiece puts a space before a text
    for (size_t i = 0; i < n; i++) { // in the text, too, SentencePiece's word mark U+2581 becomes a space
        const bool mark = n - i >= 3 && memcmp(text + i, "\xE2\x96\x81", 3) == 0;
        marked[size++] = mark ? ' ' : text[i];
        if (mark) i += 2;
    }
    n = size;
    Encoder e = {.t = t, .text = marked, .symbols = allocate(n, sizeof *e.symbols), .max = 2 * n};
    int32_t *tokens = allocate(n, sizeof *tokens);
    size_t symbols = 0;
    for (size_t at = 0; at < n; at += e.symbols[symbols++].length) {
        e.symbols[symbols] = (Symbol){at, character_length(marked + at, n - at), symbols - 1, symbols + 1};
    }
    e.symbols[0].left = e.symbols[symbols - 1].right = NONE;
    for (size_t i = 0; i + 1 < symbols; i++) push_if_token(&e, i, i + 1);
    merge_all(&e);
    for (size_t i = 0; i != NONE; i = e.symbols[i].right) {
        const Symbol *s = &e.symbols[i];
        const int32_t token = find(t, marked + s->start, s->length);
        if (token >= 0) tokens[(*count)++] = token;
        for (size_t b = 0; token < 0 && b < s->length; b++) tokens[(*count)++] = FIRST_BYTE + marked[s->start + b];
    }
    free(marked), free(e.symbols), free(e.heap);
    return tokens;
}

const unsigned char *tokenizer_piece(const Tokenizer *t, int32_t token, bool first, size_t *length) {
    static unsigned char bytes[256];
    const int first_byte = t != NULL ? FIRST_BYTE : 0;
    if (token >= first_byte && token < first_byte + 256) {
        unsigned char *byte = &bytes[token - first_byte];
        *byte = (unsigned char)(token - first_byte);
        *length = 1;
        return byte;
    }
    *length = 0;
    if (token < first_byte || token >= tokenizer_count(t)) return bytes;
    const Piece *p = &t->pieces[token];
    const bool space = first && p->length > 0 && p->bytes[0] == ' ';
    *length = (size_t)p->length - space;
    return p->bytes + space;
}
