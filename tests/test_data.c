// Data files: format, fingerprint, truncation. Rows of training and validation: their starts, their targets, documents,
// carried streams. How sequences are divided into segments and among ranks.
#include <sys/wait.h> // defines: waitpid
#include <unistd.h>   // defines: dup2, fork, truncate, unlink
#include "../plumbing/plumbing.h"
#include "check.h"

enum { B = 4, L = 10, MOST = 64 };
static char path[] = "build/test_data.bytes";
static int32_t inputs[MOST * L], targets[MOST * L], other[MOST * L], unused[MOST * L];
static bool fresh[MOST];

static void write_file(const void *bytes, size_t n) {
    unlink(path); // a file that an earlier test has mapped stays valid
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(bytes, 1, n, f) != n || fclose(f) != 0) exit(1);
}

static Tokens tokens_of(const void *bytes, size_t n) {
    write_file(bytes, n);
    return tokens_open(path, 256);
}

// Runs the function in a child process and returns its exit status, 0 if the function returns. message gets its stderr.
static char message[4096];
static int status_of(void (*function)(const void *), const void *argument) {
    int status, ends[2];
    fflush(stdout);
    if (pipe(ends) != 0) exit(1);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        function(argument);
        _exit(0);
    }
    close(ends[1]);
    size_t length = 0;
    for (ssize_t n; (n = read(ends[0], message + length, sizeof message - 1 - length)) > 0;) length += (size_t)n;
    message[length] = 0;
    close(ends[0]);
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void check_refused(const char *name, void (*function)(const void *), const void *argument, const char *text) {
    const int ok = status_of(function, argument) == 1 && strstr(message, text) != NULL;
    check_true(name, ok);
    if (!ok) printf("    expected '%s', got '%s'\n", text, message);
}

// ----------------------------------------------------------------------------
// files

typedef struct {
    int vocab_size;
    DataFormat format;
} Opening;
static void open_file(const void *argument) {
    const Opening *o = argument;
    tokens_open_as(path, o->vocab_size, o->format);
}

static const int vocabularies[] = {256, 257, 1000, 4096, 32000, 50257, 65535, 1 << 20};
enum { VOCABULARIES = sizeof vocabularies / sizeof vocabularies[0], LONGEST = 1 << 19 };
static unsigned char content[LONGEST];

// The number of vocabulary sizes, from the n-th on, for which this content is refused as uint16 tokens.
static int refusals(size_t size, int n) {
    int count = 0;
    write_file(content, size);
    for (; n < VOCABULARIES; n++)
        count += status_of(open_file, &(Opening){vocabularies[n], FORMAT_AUTO}) == 1 &&
                 strstr(message, "--data-format uint16") != NULL;
    return count;
}

// Repeats a text, each code point in this encoding: 8 for UTF-8, 16 for UTF-16 with byte order mark, 1 for one byte
// each.
static size_t fill_text(const char *text, int encoding, size_t size) {
    size_t n = 0;
    if (encoding == 16) content[n++] = 0xFF, content[n++] = 0xFE;
    for (const char *p = text; n + 4 < size; p++) {
        if (*p == 0) p = text;
        const unsigned char c = (unsigned char)*p;
        if (encoding == 8) {
            content[n++] = c;
            continue;
        }
        if ((c & 0xC0) == 0x80) continue;
        uint32_t code = c < 0x80 ? c : c < 0xE0 ? c & 0x1F : c < 0xF0 ? c & 0xF : c & 7;
        for (int i = 1; i < (c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4); i++)
            code = code << 6 | ((unsigned char)p[i] & 0x3F);
        content[n++] = (unsigned char)(encoding == 1 && code > 255 ? 0x80 | code : code);
        if (encoding == 16) content[n++] = (unsigned char)(code >> 8);
    }
    return n / 2 * 2;
}

static size_t read_into_content(const char *file) {
    FILE *f = fopen(file, "rb");
    const size_t n = f != NULL ? fread(content, 1, LONGEST, f) : 0;
    if (f != NULL) fclose(f);
    return n / 2 * 2;
}

static const char *const texts[] = {
    "The quick brown fox jumps over the lazy dog; it's 12:30, said \"Mr. O'Neil\".\n\tIndented (twice)\r\n",
    "Zw\u00f6lf Boxk\u00e4mpfer jagen Viktor quer \u00fcber den gro\u00dfen Sylter Deich. \u201eDas ist alles\u201c, "
    "sagte er.\n",
    "\u0421\u044a\u0435\u0448\u044c \u0436\u0435 \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 "
    "\u043c\u044f\u0433\u043a\u0438\u0445 \u0444\u0440\u0430\u043d\u0446\u0443\u0437\u0441\u043a\u0438\u0445 "
    "\u0431\u0443\u043b\u043e\u043a, \u0434\u0430 \u0432\u044b\u043f\u0435\u0439 \u0447\u0430\u044e.\n",
    "\u0393\u03b1\u03b6\u03ad\u03b5\u03c2 \u03ba\u03b1\u1f76 \u03bc\u03c5\u03c1\u03c4\u03b9\u1f72\u03c2 "
    "\u03b4\u1f72\u03bd \u03b8\u1f70 \u03b2\u03c1\u1ff6 \u03c0\u03b9\u1f70\n",
    "\u05d3\u05d2 \u05e1\u05e7\u05e8\u05df \u05e9\u05d8 \u05d1\u05d9\u05dd \u05de\u05d0\u05d5\u05db\u05d6\u05d1 "
    "\u05d5\u05dc\u05e4\u05ea\u05e2 \u05de\u05e6\u05d0 \u05d7\u05d1\u05e8\u05d4.\n",
    "\u0646\u0635 \u062d\u0643\u064a\u0645 \u0644\u0647 \u0633\u0631 \u0642\u0627\u0637\u0639 \u0648\u0630\u0648 "
    "\u0634\u0623\u0646 \u0639\u0638\u064a\u0645\n",
    "\u090b\u0937\u093f\u092f\u094b\u0902 \u0915\u094b \u0938\u0924\u093e\u0928\u0947 \u0935\u093e\u0932\u0947 "
    "\u0926\u0941\u0937\u094d\u091f \u0930\u093e\u0915\u094d\u0937\u0938\u094b\u0902 \u0915\u0947 "
    "\u0930\u093e\u091c\u093e\n",
    "\u0e40\u0e1b\u0e47\u0e19\u0e21\u0e19\u0e38\u0e29\u0e22\u0e4c\u0e2a\u0e38\u0e14\u0e1b\u0e23\u0e30\u0e40\u0e2a\u0e23"
    "\u0e34\u0e10\u0e40\u0e25\u0e34\u0e28\u0e04\u0e38\u0e13\u0e04\u0e48\u0e32\n",
    "\u8996\u91ce\u7121\u9650\u5ee3\uff0c\u7a97\u5916\u6709\u85cd\u5929\u3002\u5fae\u98a8\u8fce\u5ba2\uff0c\u8edf\u8a9e"
    "\u4f34\u8336\u3002",
    "\u3044\u308d\u306f\u306b\u307b\u3078\u3068 "
    "\u3061\u308a\u306c\u308b\u3092\u3000\u8272\u306f\u5302\u3078\u3069\u6563\u308a\u306c\u308b\u3092\n",
    "\ud0a4\uc2a4\uc758 \uace0\uc720\uc870\uac74\uc740 \uc785\uc220\ub07c\ub9ac \ub9cc\ub098\uc57c \ud558\uace0\n",
    "emoji \U0001f600\U0001f680 \u2764\ufe0f and \u2200x\u2208\u211d: \u2308x\u2309 = \u2212\u230a\u2212x\u230b\n",
    "<?xml version=\"1.0\"?>\n<page id=\"12\"><title>A &amp; B</title><text "
    "xml:space=\"preserve\">[[Link|x]]</text></page>\n",
    "1\n2\n10\n3\n",
    "\x1b[1mbold\x1b[0m and _\b_u\b\f\n",
};
enum { TEXTS = sizeof texts / sizeof texts[0] };

// A token of a distribution over V: number^-exponent (Zipf), with the bulk at small numbers.
static void fill_tokens(size_t count, int V, double exponent) {
    for (size_t i = 0; i < count; i++) {
        uint32_t r[4];
        megalodon_philox(r, 5, 0, 0, 0, (uint32_t)i);
        const double u = (r[0] + 0.5) / 4294967296.0;
        const double x = exponent == 1 ? pow(V, u) : pow(1 + u * (pow(V, 1 - exponent) - 1), 1 / (1 - exponent));
        const unsigned token = x < V ? (unsigned)x : (unsigned)V - 1;
        content[2 * i] = (unsigned char)token, content[2 * i + 1] = (unsigned char)(token >> 8);
    }
}

static void test_formats(void) {
    static const size_t sizes[] = {100, 5000, LONGEST};
    static const char *const files[] = {"dev/data/shakespeare.txt", "README.md", "megalodon.c",
                                        "tests/data/tokenizer.txt"};
    static const double exponents[] = {0, 0.5, 1, 1.2};
    int alarms = 0, alarms16 = 0, alarms1 = 0, in_files = 0, missed = 0, tried = 0, small = 0;
    for (int i = 0; i < TEXTS; i++) {
        for (int n = 0; n < 3; n++) {
            alarms += refusals(fill_text(texts[i], 8, sizes[n]), 0);
            alarms16 += refusals(fill_text(texts[i], 16, sizes[n]), 0);
            alarms1 += refusals(fill_text(texts[i], 1, sizes[n]), 0);
        }
    }
    printf("    %d texts of %d sizes, %d vocabulary sizes\n", TEXTS, 3, VOCABULARIES);
    check_true("formats: text in UTF-8 is never taken for uint16 tokens", alarms == 0);
    check_true("formats: nor in UTF-16 with a byte order mark", alarms16 == 0);
    check_true("formats: nor in encodings of one byte", alarms1 == 0);
    for (int i = 0; i < 4; i++) in_files += refusals(read_into_content(files[i]), 0);
    check_true("formats: nor are sources and texts of this project", in_files == 0);
    for (int v = 1; v < 6; v++) { // 257 .. 50257
        for (int e = 0; e < 4; e++) {
            for (int n = 0; n < 3; n++, tried++) {
                fill_tokens(sizes[n] / 2, vocabularies[v], exponents[e]);
                const int count = refusals(sizes[n], v);
                missed += count != VOCABULARIES - v;
                if (count != VOCABULARIES - v)
                    printf("    V %d, exponent %g, %zu bytes: %d of %d\n", vocabularies[v], exponents[e], sizes[n],
                           count, VOCABULARIES - v);
                small += n == 2 && status_of(open_file, &(Opening){256, FORMAT_AUTO}) != 0;
            }
        }
    }
    printf("    %d files of tokens\n", tried);
    check_true("formats: uint16 tokens, Zipf and uniform, are refused", missed == 0);
    check_true("formats: but not where the vocabulary has 256 tokens", small == 0);
    for (size_t i = 0; i < LONGEST / 16; i++) {
        uint32_t r[4];
        megalodon_philox(r, 9, 0, 0, 0, (uint32_t)i);
        memcpy(content + 16 * i, r, sizeof r);
    }
    check_true("formats: random bytes, such as compressed data, are not", refusals(LONGEST, 0) == 0);

    static const unsigned char five[] = {1, 0, 44, 1, 7};
    write_file(five, 4);
    const Tokens as_uint16 = tokens_open_as(path, 301, FORMAT_UINT16),
                 as_bytes = tokens_open_as(path, 301, FORMAT_BYTES);
    check_true("formats: uint16 tokens are read as such", as_uint16.count == 2 && as_uint16.width == 2 &&
                                                              token_at(&as_uint16, 0) == 1 &&
                                                              token_at(&as_uint16, 1) == 300);
    check_true("formats: and as bytes if asked for", as_bytes.count == 4 && token_at(&as_bytes, 2) == 44);
    check_refused("formats: every token is checked", open_file, &(Opening){300, FORMAT_UINT16},
                  "token 1 is 300, but the vocabulary has 300: use --vocab-size 301");
    write_file(five, 5);
    check_refused("formats: an odd size", open_file, &(Opening){301, FORMAT_UINT16},
                  "5 bytes are not a whole number of uint16 tokens");
    static const int32_t header[256] = {20240520, 1, 2};
    memcpy(content, header, sizeof header), memcpy(content + sizeof header, five, 4);
    write_file(content, sizeof header + 4);
    const Tokens bin = tokens_open_as(path, 301, FORMAT_UINT16), bin_auto = tokens_open(path, 301);
    check_true("formats: the header of a .bin file is none of its tokens",
               bin.count == 2 && token_at(&bin, 1) == 300 && bin_auto.count == 2 && token_at(&bin_auto, 1) == 300);
    DataFormat format = FORMAT_AUTO;
    check_true("formats: names", find_data_format("uint16", &format) && format == FORMAT_UINT16 &&
                                     find_data_format("bytes", &format) && format == FORMAT_BYTES &&
                                     find_data_format("auto", &format) && format == FORMAT_AUTO &&
                                     !find_data_format("int8", &format));
}

// Values of the reference implementation (python: xxhash.xxh64_hexdigest).
static void test_fingerprint(void) {
    static const struct {
        size_t size;
        const char *text;
    } known[] = {
        {1, "1 bytes, xxh64 e934a84adb052768"},       {3, "3 bytes, xxh64 9ff70a635a6209ab"},
        {14, "14 bytes, xxh64 8b3c6f96512c86a1"},     {32, "32 bytes, xxh64 91b0cb0931a8c629"},
        {1003, "1003 bytes, xxh64 648377bda30f9738"},
    };
    char text[FINGERPRINT_SIZE], other_text[FINGERPRINT_SIZE];
    int right = 1, noticed = 1;
    for (int i = 0; i < 1004; i++) content[i] = (unsigned char)(i * 7 + i / 256);
    for (int i = 0; i < 5; i++) {
        Tokens t = tokens_of(content, known[i].size), part = tokens_part(&t, known[i].size / 2, 0);
        tokens_fingerprint(&part, text);
        right &= strcmp(text, known[i].text) == 0;
    }
    check_true("fingerprint: size and XXH64 of the whole file", right);
    for (int i = 0; i < 1003; i += 17) { // the text has 1003 bytes
        content[i] ^= 1;
        Tokens t = tokens_of(content, 1003);
        tokens_fingerprint(&t, other_text);
        content[i] ^= 1;
        noticed &= strcmp(text, other_text) != 0;
    }
    Tokens t = tokens_of(content, 1004);
    tokens_fingerprint(&t, other_text);
    check_true("fingerprint: another one after any changed bit", noticed);
    check_true("fingerprint: and after an added byte", strcmp(text, other_text) != 0);
}

enum { WHOLE = 100000, CUT = 30000, A_LITTLE = 99999 };
static void read_cut(const void *argument) {
    (void)argument;
    Tokens t = tokens_open(path, 256);
    volatile int32_t sum = 0;
    if (truncate(path, CUT) != 0) _exit(9);
    for (size_t i = 0; i < t.count; i++) sum += token_at(&t, i);
    printf("%d", sum);
}
static void step_cut(const void *size) {
    Tokens t = tokens_open(path, 256);
    Reader r = reader_new(&t, "a test", 5, B, L, -1, false);
    reader_step(&r, 0, inputs, targets, fresh);
    if (truncate(path, *(const off_t *)size) != 0) _exit(9);
    reader_step(&r, 1, inputs, targets, fresh);
}
static void windows_cut(const void *argument) {
    (void)argument;
    Tokens t = tokens_open(path, 256);
    Reader r = reader_new(&t, "a test", 5, B, L, -1, false);
    Cursor c = {0};
    read_windows(&r, &c, B, inputs, targets);
    if (truncate(path, A_LITTLE) != 0) _exit(9);
    read_windows(&r, &c, B, inputs, targets);
}

static void test_truncation(void) {
    write_file(content, WHOLE);
    check_refused(
        "truncated: reading a token beyond the end", read_cut, NULL,
        "error: build/test_data.bytes: truncated while it was read: 100000 bytes when it was opened, 30000 now\n");
    write_file(content, WHOLE);
    check_refused("truncated: a step", step_cut, &(off_t){0}, "100000 bytes when it was opened, 0 now");
    write_file(content, WHOLE);
    check_refused("truncated: a step, within the last page", step_cut, &(off_t){A_LITTLE},
                  "100000 bytes when it was opened, 99999 now");
    write_file(content, WHOLE);
    check_refused("truncated: validation", windows_cut, NULL, "100000 bytes when it was opened, 99999 now");
    write_file(content, WHOLE);
    check_true("a file that grows is read on", status_of(step_cut, &(off_t){WHOLE + 1}) == 0);
}

static void open_batch(const void *argument) {
    int batch, length;
    int32_t *in, *out;
    (void)argument;
    read_batch(path, 9, &batch, &length, &in, &out);
}

static void write_batch(const int32_t in[4], const int32_t out[4]) {
    char err[ST_ERR];
    StTensor t[] = {{.name = "input.tokens", .type = ST_I32, .ndim = 2, .shape = {2, 2}},
                    {.name = "input.targets", .type = ST_I32, .ndim = 2, .shape = {2, 2}}};
    StWriter w;
    st_create(&w, path, NULL, t, 2, err);
    st_write(&w, in, 4 * sizeof *in, err), st_write(&w, out, 4 * sizeof *out, err);
    if (!st_finish(&w, err)) exit(1);
}

static void test_batch(void) {
    static const int32_t in[4] = {0, 8, 2, 3}, out[4] = {8, -100, -1, 0}, bad[4] = {8, -2, -1, 0};
    int batch, length;
    int32_t *in2 = NULL, *out2 = NULL;
    write_batch(in, out);
    const int accepted = status_of(open_batch, NULL) == 0;
    if (accepted) read_batch(path, 9, &batch, &length, &in2, &out2);
    check_true("--batch: targets of -1 and -100 are ignored", accepted && batch == 2 && length == 2 &&
                                                                  memcmp(in, in2, sizeof in) == 0 &&
                                                                  memcmp(out, out2, sizeof out) == 0);
    free(in2), free(out2);
    write_batch(in, bad);
    check_refused("--batch: other negative targets", open_batch, NULL, "'input.targets' has -2 at row 0, position 1");
    write_batch(out, in);
    check_refused("--batch: negative inputs", open_batch, NULL, "'input.tokens' has -100 at row 0, position 1");
}

// ----------------------------------------------------------------------------
// rows

static void test_rows(void) {
    enum { N = 1000, STEPS = 4000 };
    unsigned char bytes[N];
    int seen[N] = {0}, first = 1, last = 0, successors = 1, starts = 0;
    for (int i = 0; i < N; i++) bytes[i] = (unsigned char)(i / 4); // a token and its place: t = 4 * token + ...
    Tokens t = tokens_of(bytes, N), tail = tokens_part(&t, 900, 100);
    Reader r = reader_new(&t, "a test", 5, B, L, -1, false), two = reader_new(&t, "a test", 5, 2, L, -1, false);
    Reader six = reader_new(&t, "a test", 6, B, L, -1, false),
           windows = reader_new(&tail, "a test", 1, B, L, -1, false);
    for (int step = 0; step < STEPS; step++) {
        reader_step(&r, step, inputs, targets, fresh);
        for (int b = 0; b < B; b++) {
            seen[4 * inputs[b * L]]++;
            first &= inputs[b * L] <= (N - L - 1) / 4 && fresh[b];
            last |= targets[b * L + L - 1] == bytes[N - 1];
            for (int i = 1; i < L; i++) successors &= inputs[b * L + i] == targets[b * L + i - 1];
        }
    }
    for (int i = 0; i < N; i++) starts += seen[i] > 0;
    check_true("rows: targets are the next tokens", successors);
    check_true("rows: start everywhere, end within the data", first && last && starts == (N - L - 1) / 4 + 1);
    reader_step(&r, 9, inputs, targets, fresh);
    reader_step(&two, 9, other, unused, fresh);
    check_same("rows: the same whatever the number of rows", inputs, other, 2 * L * sizeof *other);
    reader_step(&six, 9, other, unused, fresh);
    check_true("rows: another seed gives others", memcmp(inputs, other, B * L * sizeof *other) != 0);
    Cursor c = {0};
    int count = read_windows(&windows, &c, B, inputs, targets);
    check_true("windows: first ones", count == B && inputs[0] == 225 && inputs[L] == bytes[910]);
    read_windows(&windows, &c, B, inputs, targets);
    count = read_windows(&windows, &c, B, inputs, targets);
    check_true("windows: only one that is followed by a token is left", count == 1 && targets[L - 1] == bytes[990]);
    check_true("windows: then none", read_windows(&windows, &c, B, inputs, targets) == 0);
    reader_free(&r), reader_free(&two), reader_free(&six), reader_free(&windows);
}

// Returns whether row `row` has these tokens, each with the next one as target; tokens after '|' have no target.
static int is_row(int row, const char *text) {
    int n = (int)strlen(text) - 1;
    for (int i = 0; i < L; i++) {
        if (inputs[row * L + i] != (i < n ? text[i] : '|') || targets[row * L + i] != (i < n ? text[i + 1] : -1))
            return 0;
    }
    return 1;
}

// Documents: abc, 12 letters in two rows, one letter, an empty one, and one that the end of the data cuts off.
static void test_documents(void) {
    static const char text[] = "abc|defghijklmno|p||qrs", *const rows[] = {"abc|", "|defghijklm", "mno|", "|p|",
                                                                           "|qrs"};
    int drawn[5] = {0}, right = 1, even = 1;
    Tokens t = tokens_of(text, strlen(text));
    Reader r = reader_new(&t, "a test", 3, MOST, L, '|', false);
    check_true("documents: counted without the empty one", r.count == 4);
    for (int step = 0; step < 5; step++) {
        reader_step(&r, step, inputs, targets, fresh);
        for (int b = 0; b < MOST; b++) {
            int d = 0;
            while (d < 5 && !is_row(b, rows[d])) d++;
            drawn[d % 5]++;
            right &= d < 5 && fresh[b];
        }
    }
    check_true("documents: a row is a document or a part of one; nothing after its end is a target", right);
    for (int d = 0; d < 5; d++) even &= drawn[d] > 40 && drawn[d] < 90; // 64 each, with a standard deviation of 7
    check_true("documents: all rows are drawn alike", even);
    Cursor c = {0};
    int count = read_windows(&r, &c, MOST, inputs, targets), whole = count == 5;
    for (int d = 0; d < 5; d++) whole &= is_row(d, rows[d]);
    check_true("windows: every document from its start, cut into rows", whole);
    reader_free(&r);
}

// Writes a file of 16-bit tokens. Each is its position plus 1, so that its value identifies its position; 0 is EOT.
// Documents have 0 to `longest` tokens; the last token is an EOT. longest 0: no EOT.
enum { N = 3000 };
static int32_t token[N];
static struct {
    int start, end; // index of its first input and of its last target
} documents[N];
static int num_documents;
static int document_at[N]; // index of the document of which the token is a target

static Tokens numbered(int count, int longest) {
    static unsigned char bytes[2 * N];
    int left = longest, others = 0; // tokens other than EOT
    num_documents = 0;
    for (int i = 0, start = 0; i < count; i++) {
        const bool eot = longest > 0 && i > 0 && (left-- == 0 || i == count - 1);
        if (eot) left = i * 7919 % (longest + 1);
        token[i] = eot ? 0 : i + 1;
        bytes[2 * i] = (unsigned char)token[i], bytes[2 * i + 1] = (unsigned char)(token[i] >> 8);
        document_at[i] = num_documents;
        others += !eot;
        if (i == 0 || (!eot && i < count - 1)) continue;
        if (others > 0) documents[num_documents].start = start, documents[num_documents++].end = i;
        start = i, others = !eot;
    }
    write_file(bytes, 2 * (size_t)count);
    return tokens_open_as(path, 65536, FORMAT_UINT16);
}

// Streams must not overlap, must cover the data, and must begin again with a fresh state. Then the parts of all ranks.
static void test_streams(void) {
    static const struct {
        int count, rows, length;
    } cases[] = {{105, 4, 10}, {41, 4, 10}, {1000, 7, 9}, {1001, 1, 10}, {17, 16, 1}, {2000, 16, 8}, {50, 3, 10}};
    int right = 1, covered = 1, again = 1, inside = 1, alone = 1;
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        const int rows = cases[k].rows, length = cases[k].length, T = cases[k].count - 1;
        int seen[N] = {0};
        Tokens t = numbered(cases[k].count, 0);
        Reader r = reader_new(&t, "a test", 8, rows, length, -1, true);
        Reader other_seed = reader_new(&t, "a test", 9, rows, length, -1, true);
        for (int step = 0; step < 2 * (T / rows + 2); step++) {
            reader_step(&r, step, inputs, targets, fresh);
            reader_step(&other_seed, step, other, unused, fresh);
            alone &= memcmp(inputs, other, (size_t)(rows * length) * sizeof *other) == 0;
            for (int b = 0; b < rows; b++) {
                const int begin = (int)((int64_t)T * b / rows), end = (int)((int64_t)T * (b + 1) / rows);
                const int windows = (end - begin + length - 1) / length, w = step % windows;
                right &= fresh[b] == (w == 0);
                for (int i = 0; i < length; i++) {
                    const int at = begin + w * length + i, here = b * length + i;
                    right &= targets[here] == (at < end ? at + 2 : -1) && (at >= end || inputs[here] == at + 1);
                    inside &= inputs[here] >= 0;
                    if (step < windows && targets[here] >= 0) seen[targets[here] - 1]++;
                    if (step >= windows && step < 2 * windows && targets[here] >= 0) seen[targets[here] - 1] += 100;
                }
            }
        }
        for (int i = 0; i < cases[k].count; i++) covered &= seen[i] % 100 == (i > 0), again &= seen[i] / 100 == (i > 0);
        reader_free(&r), reader_free(&other_seed);
    }
    check_true("streams: window after window, from the start again, fresh, at the end", right);
    check_true("streams: a pass has every token but the first as target once", covered);
    check_true("streams: so has the next pass", again);
    check_true("streams: padded with tokens of the vocabulary", inside);
    check_true("streams: whatever the seed", alone);
}

typedef struct {
    int count, rows, length, eot;
} Asked;
static void open_reader(const void *argument) {
    const Asked *a = argument;
    Tokens t = numbered(a->count, a->eot < 0 ? 0 : 10);
    reader_new(&t, "training", 1, a->rows, a->length, a->eot, true);
}

// ----------------------------------------------------------------------------
// segments, and the chunk-parallel ranks' parts of them

// For every combination of length, segment and number of ranks: the parts of all segments and ranks, one after another,
// are the sequence. They begin at whole chunks. The number of a rank's tokens before a segment, and in all, is right.
static void test_split(void) {
    enum { CHUNK = 4, LONG = 53, RANKS = 9 };
    int covered = 1, whole = 1, offsets = 1, even = 1, first_longest = 1, combinations = 0;
    for (int64_t length = 1; length <= LONG; length++) {
        for (int64_t segment_len = CHUNK; segment_len < length + CHUNK; segment_len += CHUNK) {
            for (int size = 1; size <= RANKS; size++) {
                Split s = {length, segment_len < length ? segment_len : length, CHUNK, size, 0};
                const int64_t chunks = (length - 1) / CHUNK + 1;
                int64_t next = 0, before[RANKS] = {0};
                if (split_error(&s) != NULL || chunks < size) continue;
                combinations++;
                for (int64_t i = 0; i < split_segments(&s); i++) {
                    int64_t least = INT64_MAX, most = 0; // chunks of a rank
                    for (int r = 0; r < size; r++) {
                        const TokenRange part = split_part(&s, i, r);
                        s.cp_rank = r;
                        covered &= part.first == next && part.count > 0;
                        whole &= part.first % CHUNK == 0;
                        offsets &= split_offset(&s, i) == before[r];
                        first_longest &= part.count <= split_part(&s, 0, r).count;
                        next += part.count, before[r] += part.count;
                        const int64_t n = (part.count - 1) / CHUNK + 1;
                        least = n < least ? n : least, most = n > most ? n : most;
                    }
                    covered &= next == (i + 1) * s.segment_len || next == length;
                    even &= most - least <= 1;
                }
                covered &= next == length;
                for (s.cp_rank = 0; s.cp_rank < size; s.cp_rank++) offsets &= split_own(&s) == before[s.cp_rank];
            }
        }
    }
    printf("    %d lengths, segments and numbers of ranks\n", combinations);
    check_true("split: segments and parts cover a sequence once, in order", covered && combinations > 1000);
    check_true("split: parts begin at whole chunks", whole);
    check_true("split: tokens before each segment, and of a rank", offsets);
    check_true("split: ranks have equally many chunks of a segment, or one more", even);
    check_true("split: no part is longer than that of the first segment", first_longest);

    const int64_t length = ((int64_t)1 << 40) + 3, segment_len = 1 << 20;
    Split s = {length, segment_len, 64, 4, 3};
    const TokenRange last = split_part(&s, split_segments(&s) - 1, 3);
    check_true("split: a sequence of 2^40 tokens and 3",
               split_segments(&s) == (1 << 20) + 1 && split_offset(&s, 1 << 20) == (int64_t)1 << 38 &&
                   split_part(&s, 1 << 19, 1).first == ((int64_t)1 << 39) + segment_len / 4 &&
                   last.first + last.count == length);
    s = split_none(1000, 64);
    check_true("split: none is one segment of everything", split_segments(&s) == 1 && split_own(&s) == 1000 &&
                                                               split_part(&s, 0, 0).count == 1000 &&
                                                               split_error(&s) == NULL);
}

static void refuse_split(Split s, const char *text) {
    const char *said = split_error(&s);
    const bool ok = text == NULL ? said == NULL : said != NULL && strcmp(said, text) == 0;
    char line[96];
    snprintf(line, sizeof line, "%s: %d tokens in segments of %d, %d ranks", text == NULL ? "accepted" : "refused",
             (int)s.length, (int)s.segment_len, s.cp_size);
    check_true(line, ok);
    if (!ok) printf("    said '%s', expected '%s'\n", said == NULL ? "" : said, text == NULL ? "" : text);
}

static void test_split_errors(void) {
    refuse_split((Split){100, 20, 8, 1, 0}, "--segment-len 20 is no multiple of --chunk-size 8");
    refuse_split((Split){100, 4, 8, 1, 0}, "--segment-len 4 is no multiple of --chunk-size 8");
    refuse_split((Split){100, 8, 8, 1, 0}, NULL);
    refuse_split((Split){100, 100, 8, 1, 0}, NULL); // the whole sequence need not be whole chunks
    refuse_split((Split){100, 8, 8, 2, 1},
                 "--segment-len 8 has 1 chunk of 8 tokens; each of 2 chunk-parallel ranks needs one");
    refuse_split((Split){100, 24, 8, 4, 0},
                 "--segment-len 24 has 3 chunks of 8 tokens; each of 4 chunk-parallel ranks needs one");
    refuse_split((Split){100, 96, 8, 2, 0}, "--segment-len 96 leaves a last segment of 1 chunk of --seq-len 100; each "
                                            "of 2 chunk-parallel ranks needs one");
    refuse_split((Split){100, 80, 8, 4, 0}, "--segment-len 80 leaves a last segment of 3 chunks of --seq-len 100; each "
                                            "of 4 chunk-parallel ranks needs one");
    refuse_split((Split){100, 72, 8, 4, 0}, NULL); // the last segment has 3 chunks and a half
    refuse_split((Split){96, 48, 8, 6, 5}, NULL);
}

// Memory for k = 4, 5, .. of 41 chunks: longest_segment must choose a length that 4 ranks can share, in which the last
// segment has 4 chunks, too. Segments of 10 chunks leave one.
static void test_longest_segment(void) {
    Config config = *find_preset("demo");
    const int C = config.chunk_size;
    int chosen = 0;
    bool valid = true;
    for (int k = 4; k <= 40; k++) {
        const MemoryPlan p = megalodon_memory(&config, MEGALODON_TRAIN, 16, (k + 3) / 4 * C);
        Demand d = {
            .config = &config, .mode = MEGALODON_TRAIN, .B = 16, .split = split_none(41 * C, C), .segments = true};
        d.split.cp_size = 4;
        d.states = (double)megalodon_available_memory(1) -
                   (double)(p.params + p.grads + p.moments + p.activations + p.scratch) - (1 << 20);
        d.split.segment_len = longest_segment(&d);
        if (d.split.segment_len == 0) continue;
        valid &= d.split.segment_len <= 41 * C && split_error(&d.split) == NULL;
        chosen += d.split.segment_len < 41 * C;
    }
    printf("    %d of 37 lengths chosen\n", chosen);
    check_true("longest segment: each of 4 ranks has a chunk of every segment", valid && chosen > 0);
}

// Whether row n of 2 rows of the batch that starts at element `batch` of other and unused, which lies as (segments, 2,
// tokens of this rank), has this rank's tokens of a row of inputs and targets.
static int has_parts(const Split *s, int64_t batch, int n, int row) {
    int right = 1;
    for (int64_t i = 0; i < split_segments(s); i++) {
        const TokenRange part = split_part(s, i, s->cp_rank);
        const int64_t here = batch + 2 * split_offset(s, i) + n * part.count, there = row * L + part.first;
        right &= memcmp(other + here, inputs + there, (size_t)part.count * sizeof *inputs) == 0;
        right &= memcmp(unused + here, targets + there, (size_t)part.count * sizeof *targets) == 0;
    }
    return right;
}

// One reader of everything against readers of the parts of 6 ranks, 3 data-parallel x 2 chunk-parallel, with sequences
// of L tokens in segments of this length.
static void check_parts(const char *name, int eot, bool carry, int segment_len, int chunk_size) {
    enum { ROWS = 12, ACCUM = 2 };
    int right = 1;
    Tokens t = numbered(N, eot < 0 ? 0 : 25);
    Reader r = reader_new(&t, "a test", 4, ROWS, L, eot, carry);
    for (int group = 0; group < 3; group++) {
        for (int part = 0; part < 2; part++) {
            Reader mine = reader_new(&t, "a test", 4, ROWS, L, eot, carry);
            bool fresh_here[ROWS];
            mine.batch_size = ROWS / ACCUM, mine.num_rows = 2, mine.first_row = 2 * group;
            mine.split = (Split){L, segment_len, chunk_size, 2, part};
            const int64_t own = split_own(&mine.split);
            for (int step = 50; step < 60; step++) {
                reader_step(&mine, step, other, unused, fresh_here);
                reader_free(&r);
                r = reader_new(&t, "a test", 4, ROWS, L, eot, carry);
                reader_step(&r, step, inputs, targets, fresh);
                for (int n = 0; n < 2 * ACCUM; n++) {
                    const int row = n / 2 * (ROWS / ACCUM) + 2 * group + n % 2;
                    right &= fresh_here[n] == fresh[row];
                    right &= has_parts(&mine.split, n / 2 * 2 * own, n % 2, row);
                }
            }
            reader_free(&mine);
        }
    }
    reader_free(&r);
    check_true(name, right);
}

// The same for validation, with an incomplete last batch.
static void check_window_parts(const char *name, int eot, int segment_len, int chunk_size) {
    enum { ROWS = 6 };
    int right = 1, batches = 0, incomplete = 0;
    Tokens t = numbered(200, eot < 0 ? 0 : 25);
    for (int group = 0; group < 3; group++) {
        for (int part = 0; part < 2; part++) {
            Reader all = reader_new(&t, "a test", 4, ROWS, L, eot, false);
            Reader mine = reader_new(&t, "a test", 4, ROWS, L, eot, false);
            Cursor at = {0}, mine_at = {0};
            mine.num_rows = 2, mine.first_row = 2 * group;
            mine.split = (Split){L, segment_len, chunk_size, 2, part};
            for (int count = ROWS; count > 0;) {
                count = read_windows(&all, &at, ROWS, inputs, targets);
                right &= read_windows(&mine, &mine_at, ROWS, other, unused) == count;
                for (int n = 0; n < 2 && 2 * group + n < count; n++)
                    right &= has_parts(&mine.split, 0, n, 2 * group + n);
                batches++, incomplete += count > 0 && count < ROWS;
            }
            reader_free(&all), reader_free(&mine);
        }
    }
    check_true(name, right && incomplete == 6 && batches > 2 * incomplete);
}

// Carried documents: a row reads a document from start to end, and each document is started once before any is started
// again, in the order of steps and rows.
static void test_carried_documents(void) {
    static const struct {
        int count, longest, rows, length;
    } cases[] = {{N, 25, 5, 10}, {N, 60, 3, 10}, {N, 5, 20, 10}, {N, 9, 4, 1}, {30, 1000, 1, 10}, {N, 300, 10, 10}};
    enum { STEPS = 3000 };
    int counted = 1, whole = 1, once = 1, orders = 1, seeds = 1, resumed = 1;
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        const int rows = cases[k].rows, length = cases[k].length;
        const size_t size = (size_t)(rows * length) * sizeof *inputs;
        static int begun[N], order[2][N];
        int drawn = 0, at[MOST] = {0}, end[MOST] = {0}; // at: the next input of each row
        bool other_fresh[MOST], seed_matters = false;
        memset(begun, 0, sizeof begun), memset(order, 0, sizeof order);
        Tokens t = numbered(cases[k].count, cases[k].longest);
        Reader r = reader_new(&t, "a test", 3, rows, length, 0, true);
        Reader six = reader_new(&t, "a test", 6, rows, length, 0, true);
        Reader late = reader_new(&t, "a test", 3, rows, length, 0, true);
        counted &= (int)r.count == num_documents && reader_bytes(&r) >= r.count * sizeof(Document);
        for (int step = 0; step < STEPS; step++) {
            reader_step(&six, step, inputs, targets, fresh);
            reader_step(&r, step, other, unused, fresh);
            seed_matters |= memcmp(inputs, other, size) != 0;
            reader_step(&r, step, inputs, targets, fresh); // the same step again
            whole &= memcmp(inputs, other, size) == 0;
            for (int b = 0; b < rows; b++) {
                const int32_t *in = inputs + b * length, *out = targets + b * length;
                whole &= fresh[b] == (at[b] >= end[b]);
                if (fresh[b]) {
                    const int d = in[0] == 1 ? 0 : document_at[out[0] - 1];
                    if (drawn < 2 * num_documents) order[drawn / num_documents][drawn % num_documents] = d;
                    once &= begun[d]++ == drawn++ / num_documents;
                    at[b] = documents[d].start, end[b] = documents[d].end;
                }
                for (int i = 0; i < length; i++, at[b]++)
                    whole &= at[b] < end[b] ? in[i] == token[at[b]] && out[i] == token[at[b] + 1]
                                            : in[i] == 0 && out[i] == -1;
            }
        }
        once &= drawn > 2 * num_documents;
        orders &= num_documents < 5 || memcmp(order[0], order[1], sizeof order[0]) != 0;
        seeds &= num_documents < 5 || seed_matters;
        reader_step(&late, STEPS - 1, other, unused, other_fresh);
        resumed &= memcmp(inputs, other, size) == 0 && memcmp(fresh, other_fresh, (size_t)rows * sizeof *fresh) == 0;
        reader_free(&r), reader_free(&six), reader_free(&late);
    }
    check_true("carried documents: counted without empty ones", counted);
    check_true("carried documents: whole, one after another, every token a target once", whole);
    check_true("carried documents: each is read once before any is read again", once);
    check_true("carried documents: every pass has an order of its own", orders);
    check_true("carried documents: so has every seed", seeds);
    check_true("carried documents: a resumed run reads on the same", resumed);

    enum { ROWS = 64 };
    Tokens t = numbered(N, 1);
    Reader r = reader_new(&t, "a test", 3, ROWS, L, 0, true);
    const double start = seconds();
    reader_step(&r, 1000000, inputs, targets, fresh);
    const double took = seconds() - start;
    printf("    a million steps of %d rows, each a document: %.2f s\n", ROWS, took);
    check_true("carried documents: a late step is reached within seconds",
               took < 20); // allows for a slow build and a busy machine
    reader_free(&r);
}

// Documents cut into rows: every token is a target of exactly one row, and all rows are equally likely.
static void test_cut_documents(void) {
    enum { STEPS = 400 };
    int right = 1;
    static int seen[N];
    Tokens t = numbered(1000, 50);
    Reader r = reader_new(&t, "a test", 3, MOST, L, 0, false);
    memset(seen, 0, sizeof seen);
    for (int step = 0; step < STEPS; step++) {
        reader_step(&r, step, inputs, targets, fresh);
        for (int b = 0; b < MOST; b++) {
            const int32_t *in = inputs + b * L, *out = targets + b * L;
            // the position: the value of the token minus 1, or, for an EOT, one before that of its target
            const int first = in[0] > 0 ? in[0] - 1 : out[0] - 2, d = document_at[first + 1];
            right &= fresh[b] && (first - documents[d].start) % L == 0;
            for (int i = 0; i < L; i++) {
                const int at = first + i;
                const bool inside = at < documents[d].end;
                right &= inside ? in[i] == token[at] && out[i] == token[at + 1] : in[i] == 0 && out[i] == -1;
                if (inside) seen[at + 1]++;
            }
        }
    }
    int rows = 0, least = INT32_MAX, most = 0;
    for (int d = 0; d < num_documents; d++) {
        rows += (documents[d].end - documents[d].start + L - 1) / L;
        for (int i = documents[d].start + 1; i <= documents[d].end; i++) {
            least = seen[i] < least ? seen[i] : least;
            most = seen[i] > most ? seen[i] : most;
        }
    }
    const double mean = (double)STEPS * MOST / rows, deviation = sqrt(mean);
    printf("    %d documents, %d rows; a token is drawn %d to %d times, expected %.0f\n", num_documents, rows, least,
           most, mean);
    check_true("documents in rows: a document's consecutive parts", right);
    check_true("documents in rows: every token is equally likely to be trained on",
               least > mean - 5 * deviation && most < mean + 5 * deviation);
    reader_free(&r);
}

static void test_readers(void) {
    static const struct {
        int segment_len, chunk_size;
    } cases[] = {{L, 4}, {4, 1}, {6, 2}, {2, 1}}; // the last segment of 4 has 2 tokens, that of 6 has 4
    for (int i = 0; i < 4; i++) {
        const int segment_len = cases[i].segment_len, chunk_size = cases[i].chunk_size;
        printf("    segments of %d of %d tokens\n", segment_len, L);
        check_parts("parts: rows anywhere, the same for all ranks", -1, false, segment_len, chunk_size);
        check_parts("parts: streams, the same for all ranks", -1, true, segment_len, chunk_size);
        check_parts("parts: documents in rows, the same for all ranks", 0, false, segment_len, chunk_size);
        check_parts("parts: carried documents, the same for all ranks", 0, true, segment_len, chunk_size);
        check_window_parts("parts: validation windows, the same for all ranks", -1, segment_len, chunk_size);
        check_window_parts("parts: windows of documents, the same for all ranks", 0, segment_len, chunk_size);
    }
    check_refused("refused: a text too short for its streams", open_reader, &(Asked){40, 4, 10, -1},
                  "build/test_data.bytes: 40 tokens for training, but --carry-state divides them into 4 streams "
                  "(--batch-size x --grad-accum) of --seq-len 10 or more, which needs 41");
    check_true("  one token more is enough", status_of(open_reader, &(Asked){41, 4, 10, -1}) == 0);
    check_refused("refused: fewer documents than rows", open_reader, &(Asked){30, 20, 10, 0},
                  "--carry-state reads 20 at a time");
}

int main(void) {
    test_formats();
    test_fingerprint();
    test_truncation();
    test_batch();
    test_rows();
    test_documents();
    test_cut_documents();
    test_carried_documents();
    test_streams();
    test_split();
    test_split_errors();
    test_longest_segment();
    test_readers();
    unlink(path);
    return check_done();
}
