// The tokenizer against SentencePiece, whose tokens of tests/data/tokenizer.txt dev/make_tokenizer_fixture.py has kept;
// any bytes, there and back; and files that must be refused.
//     build/test_tokenizer FILE COUNT < TEXT > IDS    encodes with another tokenizer.bin of COUNT tokens: int32
#define _GNU_SOURCE // string.h: memmem
#include "../plumbing/plumbing.h"
#include "check.h"
#include "data/tokenizer.h"

static char err[ST_ERR];

typedef struct {
    unsigned char *bytes;
    size_t size;
} Bytes;

static Bytes read_all(FILE *f) {
    Bytes b = {NULL, 0};
    for (size_t room = 1 << 16, n = 1; n > 0; b.size += n, room *= 2) {
        b.bytes = realloc(b.bytes, room);
        if (b.bytes == NULL) fatal("out of memory");
        n = fread(b.bytes + b.size, 1, room - b.size, f);
    }
    return b;
}

static Bytes read_data(const char *path) {
    FILE *f = fopen(path, "rb");
    if (f == NULL) fatal("%s: not found; tests run in the repository's root", path);
    Bytes b = read_all(f);
    fclose(f);
    return b;
}

// ----------------------------------------------------------------------------
// encoding and decoding

static bool same_tokens(const Tokenizer *t, const unsigned char *text, size_t n, const Tokens *expected, size_t *at) {
    size_t count, i = 0;
    int32_t *ids = tokenizer_encode(t, text, n, true, &count);
    while (i < count && *at + i < expected->count && ids[i] == token_at(expected, *at + i)) i++;
    if (i < count) printf("    token %zu of %.40s is %d\n", i, (const char *)text, ids[i]);
    *at += i;
    free(ids);
    return i == count;
}

// The tokens of the whole text, then </s> and a line's tokens for each of its lines.
static void test_ids(const Tokenizer *t, Bytes text) {
    const Tokens expected = tokens_open("tests/data/tokenizer.ids.bin", VOCAB_SIZE);
    size_t at = 0, lines = 0, same = 0;
    check_true("a text's tokens are SentencePiece's", same_tokens(t, text.bytes, text.size, &expected, &at));
    for (size_t start = 0, end; start <= text.size; start = end + 1, lines++) {
        for (end = start; end < text.size && text.bytes[end] != '\n';) end++;
        same += at < expected.count && token_at(&expected, at++) == 2 &&
                same_tokens(t, text.bytes + start, end - start, &expected, &at);
    }
    check_true("each of its lines' tokens, too", lines == same && lines > 20 && at == expected.count);
}

// The tokens' bytes put together are the text, but for U+2581, which is a space to SentencePiece.
static bool survives(const Tokenizer *t, const unsigned char *text, size_t n) {
    size_t count, length, at = 0;
    int32_t *ids = tokenizer_encode(t, text, n, true, &count);
    bool ok = true;
    for (size_t i = 0; ok && i < count; i++) {
        const unsigned char *piece = tokenizer_piece(t, ids[i], i == 0, &length);
        for (size_t j = 0; ok && j < length; j++) {
            const bool mark = n - at >= 3 && memcmp(text + at, "\xE2\x96\x81", 3) == 0;
            ok = at < n && piece[j] == (mark ? ' ' : text[at]);
            at += mark ? 3 : 1;
        }
    }
    free(ids);
    return ok && at == n;
}

static void test_bytes(const Tokenizer *t, Bytes text) {
    enum { RANDOM = 100000 };
    static unsigned char random[RANDOM];
    int single = 0, pairs = 0, cut = 0;
    for (int i = 0; i < 65536; i++) {
        const unsigned char pair[2] = {(unsigned char)i, (unsigned char)(i >> 8)};
        pairs += survives(t, pair, 2);
        if (i < 256) single += survives(t, pair, 1);
    }
    for (size_t n = 0; n <= text.size; n++) cut += survives(t, text.bytes, n);
    for (size_t i = 0; i < RANDOM; i++) random[i] = (unsigned char)(128 + 128 * random_real(3, i));
    check_true("a text, there and back", survives(t, text.bytes, text.size));
    check_true("the text cut at any byte", cut == (int)text.size + 1);
    check_true("each byte, and each two of them", single == 256 && pairs == 65536);
    check_true("random bytes", survives(t, random, RANDOM));
}

static void test_pieces(const Tokenizer *t) {
    size_t count, length, control = 0;
    for (int i = 0; i < 3; i++) tokenizer_piece(t, i, false, &length), control += length;
    check_true("control tokens print nothing", control == 0);
    check_true("<0x0A> prints a line break", *tokenizer_piece(t, 3 + 10, true, &length) == '\n' && length == 1);
    int32_t *ids = tokenizer_encode(t, (const unsigned char *)"the the", 7, true, &count);
    const bool ok =
        count == 2 && ids[0] == ids[1] && memcmp(tokenizer_piece(t, ids[0], false, &length), " the", 4) == 0;
    check_true("' the' is a token", ok && length == 4);
    check_true("without its space at a text's beginning",
               ok && memcmp(tokenizer_piece(t, ids[0], true, &length), "the", 3) == 0 && length == 3);
    free(ids);
    ids = tokenizer_encode(t, (const unsigned char *)"\xC3 the\xE4 the", 10, true, &count);
    check_true("broken UTF-8 leaves its neighbours alone",
               count == 5 && ids[1] == 3 + 0xC3 && ids[2] == ids[4] && ids[3] == 3 + 0xE4);
    free(ids);
    ids = tokenizer_encode(t, (const unsigned char *)"----------------", 16, true, &count);
    check_true("the longest token is found", count == 2 && tokenizer_piece(t, ids[1], false, &length) && length == 16);
    free(ids);
    // going on with a text: no space of SentencePiece's before it, so that a word can go on
    ids = tokenizer_encode(t, (const unsigned char *)"the the", 7, false, &count);
    const unsigned char *first = tokenizer_piece(t, ids[0], false, &length);
    check_true("a text that goes on begins without a space",
               count > 2 && length > 0 && first[0] == 't' &&
                   memcmp(tokenizer_piece(t, ids[count - 1], false, &length), " the", 4) == 0);
    free(ids);
    ids = tokenizer_encode(t, (const unsigned char *)" the the", 8, false, &count);
    check_true("  and its own space is enough", count == 2 && ids[0] == ids[1]);
    free(ids);
    // padding, and bytes where there is no tokenizer
    const unsigned char *byte = tokenizer_piece(NULL, 200, true, &length);
    check_true("without a tokenizer tokens are bytes", *byte == 200 && length == 1 && tokenizer_count(NULL) == 256);
    tokenizer_piece(NULL, 256, true, &control), tokenizer_piece(t, VOCAB_SIZE, true, &length);
    check_true("tokens beyond a vocabulary have no text",
               control == 0 && length == 0 && tokenizer_count(t) == VOCAB_SIZE);
    free(tokenizer_encode(t, NULL, 0, true, &count));
    check_true("an empty text has no tokens", count == 0);
}

// As in dev/make_tokenizer_fixture.py.
static Bytes longer(Bytes text) {
    Bytes b = {allocate(LONG + 128, 1), 0};
    for (uint64_t random = 1; b.size < LONG;) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        size_t start = (random >> 32) % text.size, end = start + 1 + (random >> 26) % 64;
        if (end > text.size) end = text.size;
        while (start < text.size && (text.bytes[start] & 0xC0) == 0x80) start++;
        while (end < text.size && (text.bytes[end] & 0xC0) == 0x80) end++;
        for (; start < end; start++) b.bytes[b.size++] = text.bytes[start];
    }
    return b;
}

static void test_long(const Tokenizer *t, Bytes text) {
    size_t count, m;
    uint64_t hash = 14695981039346656037u;
    Bytes b = longer(text);
    const double begun = seconds();
    int32_t *ids = tokenizer_encode(t, b.bytes, b.size, true, &count);
    const double took = seconds() - begun;
    memset(b.bytes, '-', b.size); // neighbours that merge everywhere
    const double again = seconds();
    free(tokenizer_encode(t, b.bytes, b.size, true, &m));
    const double one = seconds() - again;
    for (size_t i = 0; i < count; i++) hash = (hash ^ (uint64_t)ids[i]) * 1099511628211u;
    printf("%zu bytes to %zu tokens in %.3f s; one character again and again in %.3f s\n", b.size, count, took, one);
    check_true("a long text's tokens are SentencePiece's", count == LONG_TOKENS && hash == LONG_HASH);
    // merging by search after search would take minutes; a loaded machine with a sanitizer still does not take seconds
    check_true("in a time that does not grow with its square", took < 3 && one < 3);
    free(ids), free(b.bytes);
}

// ----------------------------------------------------------------------------
// files

// Reads a copy of exactly these bytes, so that a sanitizer sees a step beyond them.
static bool refused(const unsigned char *bytes, size_t size, int vocab_size) {
    unsigned char *copy = malloc(size > 0 ? size : 1);
    memcpy(copy, bytes, size);
    snprintf(err, sizeof err, "nothing");
    Tokenizer *t = tokenizer_read(copy, size, vocab_size, err);
    if (t != NULL) tokenizer_free(t);
    free(copy);
    return t == NULL;
}

static void refuse(Bytes file, int vocab_size, const char *reason) {
    char line[80];
    snprintf(line, sizeof line, "refused: %s", reason);
    const bool ok = refused(file.bytes, file.size, vocab_size) && strstr(err, reason) != NULL;
    check_true(line, ok);
    if (!ok) printf("    said '%s'\n", err);
}

static size_t offset_of(Bytes file, int token) { // of its score; its length and its bytes follow
    size_t at = 4;
    for (int32_t length; token > 0; token--, at += 8 + (size_t)length) memcpy(&length, file.bytes + at + 4, 4);
    return at;
}

// The file with other bytes at an offset must be refused for that reason.
static void damage(Bytes file, size_t at, const void *bytes, size_t size, const char *reason) {
    unsigned char kept[8];
    memcpy(kept, file.bytes + at, size);
    memcpy(file.bytes + at, bytes, size);
    refuse(file, VOCAB_SIZE, reason);
    memcpy(file.bytes + at, kept, size);
}

static void test_refusals(Bytes file) {
    const int32_t zero = 0, large = 1 << 30, short_by_one = -1, one_more = 1;
    const float nan = NAN, infinite = -INFINITY;
    int truncated = 0;
    int32_t longest;
    // Cut between two tokens, a file is one of fewer tokens for a padded vocabulary, unless its longest piece is lost.
    for (size_t n = 0; n < file.size; n++) truncated += refused(file.bytes, n, VOCAB_SIZE);
    int whole = 0;
    for (int i = 0; i < VOCAB_SIZE; i++) whole += !refused(file.bytes, offset_of(file, i), VOCAB_SIZE);
    check_true("refused: truncated anywhere but between tokens", truncated == (int)file.size - whole && whole < 300);
    refuse((Bytes){file.bytes, 0}, VOCAB_SIZE, "not a tokenizer of llama2.c");
    refuse((Bytes){file.bytes, file.size - 1}, VOCAB_SIZE, "token 575: ");
    refuse((Bytes){file.bytes, offset_of(file, 575) + 7}, VOCAB_SIZE, "ends within token 575");
    refuse(file, VOCAB_SIZE + 1024,
           "holds 576 tokens, but the model has 1600: 1024 more; at most 1023 are taken for padding");
    check_true("padded by 1 and by 1023",
               !refused(file.bytes, file.size, VOCAB_SIZE + 1) && !refused(file.bytes, file.size, VOCAB_SIZE + 1023));
    refuse(file, VOCAB_SIZE - 1, "holds 576 tokens, but the model has 575");
    refuse((Bytes){file.bytes, file.size + 1}, VOCAB_SIZE, "ends within token 576"); // read_data allocates a byte more
    damage(file, 0, &zero, 4, "the longest piece has 0 bytes");
    damage(file, 0, &large, 4, "the longest piece has 1073741824 bytes");
    memcpy(&longest, file.bytes, 4);
    damage(file, 0, &(int32_t){longest + one_more}, 4, "its longest piece has");
    damage(file, 0, &(int32_t){longest + short_by_one}, 4, "bytes, but the maximum is");
    damage(file, offset_of(file, 300), &nan, 4, "token 300: its score is nan");
    damage(file, offset_of(file, 0), &infinite, 4, "token 0: its score is -inf");
    damage(file, offset_of(file, 300) + 4, &short_by_one, 4, "token 300: has -1 bytes");
    damage(file, offset_of(file, 300) + 4, &large, 4, "token 300: has 1073741824 bytes");
    damage(file, offset_of(file, 3 + 65) + 8, "<0x42>", 6, "token 68 is not <0x41>: no byte fallback");
    // a file that is whole, but of too few tokens to have all bytes
    unsigned char *few = malloc(offset_of(file, 100));
    memcpy(few, file.bytes, offset_of(file, 100));
    memcpy(few, &(int32_t){6}, 4);
    refuse((Bytes){few, offset_of(file, 100)}, 100, "100 tokens: too few for all bytes");
    free(few);
}

static void append(Bytes *file, float score, const void *piece, int32_t length) {
    memcpy(file->bytes + file->size, &score, 4);
    memcpy(file->bytes + file->size + 4, &length, 4);
    memcpy(file->bytes + file->size + 8, piece, (size_t)length);
    file->size += 8 + (size_t)length;
}

// More tokens, of the highest scores, that must change nothing: one more ' the', an empty one, and what leads to the
// characters of a control token and of a byte, in a text that has them as characters.
static void test_more_tokens(Bytes file) {
    static const char text[] = "the the <unk> <0x41>";
    static const char *const more[] = {" the", "", "<u", "<un", "<0", "<0x", "<0x4", "<unk", "<0x41"};
    enum { MORE = sizeof more / sizeof more[0] };
    size_t n, m;
    Bytes copy = {allocate(file.size + 16 * MORE, 1), file.size};
    memcpy(copy.bytes, file.bytes, file.size);
    for (int i = 0; i < MORE; i++) append(&copy, 100, more[i], (int32_t)strlen(more[i]));
    Tokenizer *plain = tokenizer_read(file.bytes, file.size, VOCAB_SIZE, err);
    Tokenizer *larger = tokenizer_read(copy.bytes, copy.size, VOCAB_SIZE + MORE, err);
    if (plain == NULL || larger == NULL) fatal("test_more_tokens: %s", err);
    int32_t *a = tokenizer_encode(plain, (const unsigned char *)text, 7, true, &n);
    int32_t *b = tokenizer_encode(larger, (const unsigned char *)text, sizeof text - 1, true, &m);
    check_true("of tokens with equal bytes the first one counts", n == 2 && m > n && memcmp(a, b, n * sizeof *a) == 0);
    bool special = false;
    for (size_t i = 0; i < m; i++) special |= b[i] < 3 + 256;
    check_true("control tokens and bytes have no text", !special && b[m - 2] == VOCAB_SIZE + MORE - 1);
    free(a), free(b), free(copy.bytes);
    tokenizer_free(plain), tokenizer_free(larger);
}

static int encode_input(const char *path, int count) {
    size_t n;
    Tokenizer *t = tokenizer_open(path, count);
    Bytes text = read_all(stdin);
    int32_t *ids = tokenizer_encode(t, text.bytes, text.size, true, &n);
    const bool ok = fwrite(ids, sizeof *ids, n, stdout) == n && fflush(stdout) == 0;
    free(ids), free(text.bytes);
    tokenizer_free(t);
    return !ok;
}

int main(int argc, char **argv) {
    if (argc == 3) return encode_input(argv[1], atoi(argv[2]));
    Bytes text = read_data("tests/data/tokenizer.txt"), file = read_data("tests/data/tokenizer.bin");
    Tokenizer *t = tokenizer_open("tests/data/tokenizer.bin", VOCAB_SIZE);
    test_ids(t, text);
    test_bytes(t, text);
    test_pieces(t);
    test_long(t, text);
    test_refusals(file);
    test_more_tokens(file);
    tokenizer_free(t);
    free(text.bytes), free(file.bytes);
    return check_done();
}
