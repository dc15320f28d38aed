// Checks of the file formats: ./test_files [path of compare]
// JSON; safetensors round trips and refusals; and, if its path is given, output and exit status of ./compare.
#include <math.h>     // defines: NAN
#include <stdarg.h>   // defines: va_list
#include <stdlib.h>   // defines: mkdtemp
#include <string.h>   // defines: strstr, memcmp
#include <sys/wait.h> // defines: WEXITSTATUS
#include <unistd.h>   // defines: access, unlink, rmdir
#include "../plumbing/json.h"
#include "../plumbing/safetensors.h"

static int passed, failed;
static char folder[] = "/tmp/test_files_XXXXXX", file_a[64], file_b[64], err[ST_ERR];

static void check(bool ok, const char *format, ...) {
    va_list args;
    va_start(args, format);
    printf("%s  ", ok ? "ok  " : "FAIL");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    *(ok ? &passed : &failed) += 1;
}

// ---------------------------------------------------------------- JSON

static void check_json(bool valid, const char *text, size_t size) {
    Json j;
    json_begin(&j, text, size);
    json_skip(&j);
    check(json_end(&j) == valid, "JSON %s: %.40s%s%s", valid ? "read" : "refused", text, valid ? "" : "   ", j.error);
}

static void test_json(void) {
    static const char *const good[] = {"{}", " [1, -0.5e+3, true, false, null, \"x\"] ", "{\"a\": {\"b\": [[]]}}", "0"};
    static const char *const bad[] = {
        "",      "{",      "[1,]", "{\"a\":1,}", "[1 2]",   "{\"a\" 1}", "{a: 1}",      "01",         "1.",
        ".5",    "+1",     "-",    "1e",         "0x10",    "1e999",     "NaN",         "nul",        "truefalse",
        "[] []", "/**/ 1", "\"a",  "\"\t\"",     "\"\\x\"", "\"\\u12\"", "\"\\u0000\"", "\"\\ud800\""};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) check_json(true, good[i], strlen(good[i]));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) check_json(false, bad[i], strlen(bad[i]));
    check_json(false, "1\0 2", 4); // a NUL inside

    char deep[2001], text[32];
    memset(deep, '[', 1000);
    memset(deep + 1000, ']', 1000);
    deep[2000] = 0;
    check_json(false, deep, 2000);
    Json j;
    const char *escapes = "\"\\u00e9\\ud83d\\ude00\\n\\\"\"", *decoded = "\xC3\xA9\xF0\x9F\x98\x80\n\"";
    json_begin(&j, escapes, strlen(escapes));
    check(json_string(&j, text, sizeof text) && json_end(&j) && strcmp(text, decoded) == 0,
          "JSON escapes become UTF-8");
    json_begin(&j, escapes, strlen(escapes));
    check(!json_string(&j, text, 8) && strstr(j.error, "longer than 7 bytes"), "JSON string too long: %s", j.error);
    int64_t value;
    json_begin(&j, "9223372036854775808", 19);
    check(!json_int(&j, &value), "JSON integer too large: %s", j.error);
    json_begin(&j, "1.0", 3);
    check(!json_int(&j, &value), "JSON integer with a fraction: %s", j.error);
}

// ---------------------------------------------------------------- safetensors

// Writes one tensor called x (and a config) in two parts.
static bool write_tensor(const char *path, const char *name, StType type, int64_t rows, const void *data,
                         size_t bytes) {
    StWriter w;
    StTensor t = {.name = (char *)name, .type = type, .ndim = rows > 0 ? 2 : 0, .shape = {rows, 2}};
    st_create(&w, path, "{\"a\": \"\\\\\n\"}", &t, 1, err);
    st_write(&w, data, bytes / 2, err);
    st_write(&w, (const char *)data + bytes / 2, bytes - bytes / 2, err);
    return st_finish(&w, err);
}

static void test_round_trip(const char *label, StType type, StType as, const void *data, size_t bytes,
                            const void *expected, size_t size) {
    StFile f = {0};
    char back[64];
    bool ok = write_tensor(file_a, "x", type, 2, data, bytes) && st_open(&f, file_a, err) && f.count == 1;
    const StTensor *t = ok ? st_find(&f, "x") : NULL;
    ok = t != NULL && t->type == type && st_count(t) == 4 && f.data_start % 8 == 0 && st_find(&f, "y") == NULL;
    ok = ok && strcmp(f.config, "{\"a\": \"\\\\\n\"}") == 0 && st_read(&f, t, 1, 3, back, as, err);
    check(ok && memcmp(back, (const char *)expected + size, 3 * size) == 0, "round trip %s", label);
    st_close(&f);
}

// All 16-bit patterns: finite ones exactly, infinities, NaN with its sign. F16 cannot be written, so the file is
// written as BF16 and its header is changed.
static void test_f16(void) {
    static uint16_t halves[65536];
    static double values[65536];
    int same = 0;
    StFile f = {0};
    for (int i = 0; i < 65536; i++) halves[i] = (uint16_t)i;
    bool ok = write_tensor(file_a, "x", ST_BF16, 32768, halves, sizeof halves);
    FILE *file = fopen(file_a, "r+b");
    char header[200] = "", *type;
    ok = ok && fread(header + 1, 1, sizeof header - 2, file) > 0;
    for (int i = 0; i < 9; i++) header[i] = ' '; // overwrites the length, whose bytes may be zero
    type = ok ? strstr(header, "\"BF16\"") : NULL;
    ok = type != NULL && fseek(file, type - header - 1, SEEK_SET) == 0 && fputs("\"F16\" ", file) >= 0;
    fclose(file);
    ok = ok && st_open(&f, file_a, err) && f.tensors->type == ST_F16 &&
         st_read(&f, f.tensors, 0, 65536, values, ST_F64, err);
    for (int i = 0; i < 65536 && ok; i++) {
        const int exponent = i >> 10 & 31, mantissa = i & 1023;
        const double size = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
        const double wanted = exponent < 31 ? size : mantissa == 0 ? INFINITY : NAN;
        same += (i < 32768) == !signbit(values[i]) && (isnan(wanted) ? isnan(values[i]) : fabs(values[i]) == wanted);
    }
    check(ok && same == 65536, "all 65536 numbers of F16: %d as they should be", same);
    float as_float[4];
    ok = ok && st_read(&f, f.tensors, 0x3C00, 4, as_float, ST_F32, err) && as_float[0] == 1 &&
         as_float[3] == 1 + 0x3p-10f;
    check(ok, "F16 as F32");
    st_close(&f);
}

// A file of other types opens, and reading such a tensor fails with its name.
static void test_other_types(void) {
    static const char *const types[] = {"BOOL", "U8",      "I8",      "U16", "I16", "U32",
                                        "U64",  "F8_E4M3", "F8_E5M2", "F4",  "Q3_K"};
    static const int sizes[] = {4, 4, 4, 8, 8, 16, 32, 4, 4, 2, 7}; // of 4 elements
    char header[200];
    double values[4];
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        StFile f = {0};
        const uint64_t length =
            (uint64_t)snprintf(header, sizeof header,
                               "{\"x\":{\"dtype\":\"%s\",\"shape\":[4],\"data_offsets\":[0,%d]}}", types[i], sizes[i]);
        FILE *out = fopen(file_b, "wb");
        fwrite(&length, sizeof length, 1, out);
        fprintf(out, "%s%.*s", header, sizes[i], "................................");
        fclose(out);
        const bool ok = st_open(&f, file_b, err) && f.tensors->type == ST_OTHER && st_count(f.tensors) == 4 &&
                        !st_read(&f, f.tensors, 0, 4, values, ST_F64, err) && strstr(err, "'x'") &&
                        strstr(err, types[i]);
        check(ok, "a tensor of type %s: %s", types[i], err);
        st_close(&f);
    }
}

static void test_round_trips(void) {
    const double f64[4] = {0.5, -1.5, 1e300, 0x1p-1074}, small[4] = {0.5, -1.5, 3, -0.25}, whole[4] = {0, -1, 5, 7};
    const float f32[4] = {0.5f, -1.5f, 3, -0.25f};
    const uint16_t bf16[4] = {0x3F00, 0xBFC0, 0x4040, 0xBE80};
    const int64_t i64[4] = {0, -1, 5, 7}, wide[4] = {0, INT64_MIN, INT64_MAX, 1};
    const int32_t i32[4] = {0, -1, 5, 7};
    test_round_trip("F64", ST_F64, ST_F64, f64, sizeof f64, f64, 8);
    test_round_trip("F64 as F32", ST_F64, ST_F32, small, sizeof small, f32, 4);
    test_round_trip("F32", ST_F32, ST_F32, f32, sizeof f32, f32, 4);
    test_round_trip("F32 as F64", ST_F32, ST_F64, f32, sizeof f32, small, 8);
    test_round_trip("BF16 as F32", ST_BF16, ST_F32, bf16, sizeof bf16, f32, 4);
    test_round_trip("BF16 as F64", ST_BF16, ST_F64, bf16, sizeof bf16, small, 8);
    test_round_trip("I64", ST_I64, ST_I64, wide, sizeof wide, wide, 8);
    test_round_trip("I64 as I32", ST_I64, ST_I32, i64, sizeof i64, i32, 4);
    test_round_trip("I64 as F64", ST_I64, ST_F64, i64, sizeof i64, whole, 8);
    test_round_trip("I32", ST_I32, ST_I32, i32, sizeof i32, i32, 4);
    test_round_trip("I32 as I64", ST_I32, ST_I64, i32, sizeof i32, i64, 8);

    StFile f;
    int32_t narrow[4];
    float real[4];
    bool ok = write_tensor(file_a, "x", ST_I64, 2, wide, sizeof wide) && st_open(&f, file_a, err);
    ok = ok && !st_read(&f, f.tensors, 0, 4, narrow, ST_I32, err) && strstr(err, "'x'") && strstr(err, "I32");
    check(ok, "I64 that does not fit I32: %s", err);
    check(ok && !st_read(&f, f.tensors, 0, 4, real, ST_F32, err) && strstr(err, "is I64, not F32"), "wrong type: %s",
          err);
    check(ok && !st_read(&f, f.tensors, 2, 3, narrow, ST_I64, err) && strstr(err, "fewer elements"), "past its end: %s",
          err);
    st_close(&f);
    ok = write_tensor(file_a, "n", ST_I64, 0, i64 + 2, 8) && st_open(&f, file_a, err);
    check(ok && f.tensors->ndim == 0 && st_count(f.tensors) == 1, "a scalar");
    st_close(&f);

    // a failed writer leaves the old file unchanged, and no other file
    char tmp[80];
    snprintf(tmp, sizeof tmp, "%s.tmp", file_a);
    check(!write_tensor(file_a, "x", ST_I64, 2, wide, 24) && strstr(err, "incomplete"), "too little data: %s", err);
    check(!write_tensor(file_a, "x", ST_I64, 2, wide, 24 + 16) && strstr(err, "more data"), "too much data: %s", err);
    ok = access(tmp, F_OK) != 0 && st_open(&f, file_a, err) && st_find(&f, "n") != NULL;
    check(ok, "the old file is still there, the temporary one is not");
    if (ok) st_close(&f);
    check(!write_tensor("/nonexistent/x", "x", ST_I64, 0, i64, 8) && strstr(err, "/nonexistent/x"), "no folder: %s",
          err);
}

// A file with this header and this many bytes of data must be refused; the message must have the file's name and
// `words`.
static void test_refusal(const char *header, uint64_t length, size_t data, const char *words) {
    FILE *out = fopen(file_b, "wb");
    StFile f;
    fwrite(&length, sizeof length, 1, out);
    fputs(header, out);
    for (size_t i = 0; i < data; i++) fputc(1, out);
    fclose(out);
    bool refused = !st_open(&f, file_b, err);
    if (!refused) st_close(&f);
    check(refused && strstr(err, file_b) && strstr(err, words), "refused: %s", refused ? err : header);
}

#define ENTRY(name, type, shape, begin, end)                                                                           \
    "\"" name "\":{\"dtype\":\"" type "\",\"shape\":[" shape "],\"data_offsets\":[" begin "," end "]}"

static void test_refusals(void) {
    static const struct {
        const char *header;
        size_t data;
        const char *words;
    } bad[] = {
        {"{" ENTRY("x", "F32", "2", "0", "8") "}", 7, "'x': ends after the file does: truncated?"},
        {"{" ENTRY("x", "F32", "2", "0", "8") "}", 9, "1 bytes after the last tensor"},
        {"{" ENTRY("x", "F32", "3", "0", "8") "}", 8, "'x': header, byte"},
        {"{" ENTRY("x", "F32", "-2", "0", "8") "}", 8, "negative size -2"},
        {"{" ENTRY("x", "F32", "4294967296,4294967296", "0", "0") "}", 0, "shape overflows"},
        {"{" ENTRY("x", "F32", "1,1,1,1,1,1,1,1,1", "0", "4") "}", 4, "more than 8 sizes"},
        {"{" ENTRY("x", "F32", "2305843009213693951", "0", "9223372036854775804") "}", 8, "ends after the file does"},
        {"{" ENTRY("x", "F32", "2", "9223372036854775800", "9223372036854775808") "}", 8, "integer out of range"},
        {"{" ENTRY("x", "F32", "2", "9223372036854775799", "9223372036854775807") "}", 8, "'x': a gap before it"},
        {"{" ENTRY("x", "F32", "2", "-8", "0") "}", 8, "negative size -8"},
        {"{" ENTRY("x", "F32", "2", "0", "4,8") "}", 8, "more than 2 sizes"},
        {"{" ENTRY("x", "F32", "0,9223372036854775807,9223372036854775807", "0", "8") "}", 8, "shape makes 0 bytes"},
        {"{" ENTRY("x", "BOOL", "4", "0", "8") "}", 8, "shape makes 4 bytes"},
        {"{" ENTRY("x", "U16", "4", "0", "9") "}", 9, "shape makes 8 bytes"},
        {"{" ENTRY("x", "F8_E4M3", "4", "0", "5") "}", 5, "shape makes 4 bytes"},
        {"{" ENTRY("x", "Q3", "4", "8", "0") "}", 8, "data_offsets is not"},
        {"{" ENTRY("x", "Q3", "4", "0", "9") "}", 8, "ends after the file does"},
        {"{" ENTRY("x", "Q3", "4294967296,4294967296", "0", "8") "}", 8, "shape overflows"},
        {"{" ENTRY("x", "Q\\u001b", "4", "0", "8") "}", 8, "control character in a dtype"},
        {"{\"x\":{\"dtype\":[[[[[[[[]]]]]]]]}}", 0, "expected '\"'"},
        {"{" ENTRY("x", "F32", "2", "8", "0") "}", 8, "data_offsets is not"},
        {"{" ENTRY("x", "F32", "2", "0", "8") "," ENTRY("y", "F32", "2", "4", "12") "}", 12, "'y': overlaps 'x'"},
        {"{" ENTRY("x", "F32", "2", "0", "8") "," ENTRY("y", "F32", "2", "12", "20") "}", 20, "'y': a gap before it"},
        {"{" ENTRY("x", "F32", "2", "0", "8") "," ENTRY("x", "F32", "2", "8", "16") "}", 16, "'x': occurs twice"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"more\":1}}", 8, "unknown field 'more'"},
        {"{\"x\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 8, "field 'dtype' twice"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "field 'data_offsets' is missing"},
        {"{\"x\\u001b\":1}", 8, "'x?': header, byte 11: control character in a name"},
        {"{\"x\":{\"\\u001b[31m\":1}}", 8, "unknown field '?[31m'"},
        {"{\"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
         "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
         "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\":1}",
         8, "string longer than 255 bytes"},
        {"{\"__metadata__\":{\"config\":1}}", 0, "expected"},
        {"{\"__metadata__\":{\"config\":\"\",\"config\":\"\"}}", 0, "config twice"},
        {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "metadata twice"},
        {"{\"__metadata__\":{\"config\":", 0, "expected"},
        {"{" ENTRY("x", "F32", "2", "0", "8") ",}", 8, "expected"},
        {"{} {}", 0, "expected nothing more"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        test_refusal(bad[i].header, strlen(bad[i].header), bad[i].data, bad[i].words);
    }
    test_refusal("{}", 3, 0, "is cut short");
    test_refusal("{}", UINT64_MAX, 0, "above the limit of 100 MB");
    StFile f;
    check(!st_open(&f, folder, err) && strstr(err, "regular"), "refused: %s", err);
    check(!st_open(&f, "/nonexistent", err), "refused: %s", err);
    fclose(fopen(file_b, "wb"));
    check(!st_open(&f, file_b, err) && strstr(err, "truncated"), "refused: %s", err);
    check(!write_tensor(folder, "x", ST_F64, 0, &f, 8) && strstr(err, "not a regular file"), "not written: %s", err);
}

// Whether two files have the same bytes.
static bool same_bytes(const char *a, const char *b) {
    FILE *x = fopen(a, "rb"), *y = fopen(b, "rb");
    int c = 0, d = 0;
    while (x != NULL && y != NULL && c != EOF && c == d) c = fgetc(x), d = fgetc(y);
    const bool same = x != NULL && y != NULL && c == d;
    if (x != NULL) fclose(x);
    if (y != NULL) fclose(y);
    return same;
}

// Two tensors whose data are written out of order, against the same in order.
static void test_seek(void) {
    static float x[2000], y[3000];
    StTensor t[2] = {{.name = "x", .type = ST_F32, .ndim = 2, .shape = {1000, 2}},
                     {.name = "y", .type = ST_F32, .ndim = 2, .shape = {1500, 2}}};
    StWriter w;
    for (int i = 0; i < 2000; i++) x[i] = (float)i;
    for (int i = 0; i < 3000; i++) y[i] = -(float)i;
    st_create(&w, file_b, NULL, t, 2, err), st_write(&w, x, sizeof x, err), st_write(&w, y, sizeof y, err);
    check(st_finish(&w, err), "two tensors, written in order");

    bool ok = st_create(&w, file_a, NULL, t, 2, err) && st_seek(&w, t[1].begin + 4 * 1000, err);
    ok = ok && st_write(&w, y + 1000, 4 * 1000, err) && st_write(&w, y + 2000, 4 * 1000, err); // to the end
    ok = ok && st_seek(&w, t[0].begin, err) && st_write(&w, x, 4 * 7, err);
    ok = ok && st_seek(&w, t[1].begin, err) && st_write(&w, y, 4 * 1000, err);
    check(ok && access(file_a, F_OK) == 0 && w.left == 4 * 1993, "  out of order, incomplete");
    ok = ok && st_seek(&w, t[0].begin + 4 * 7, err) && st_write(&w, x + 7, 4 * 1993, err) && st_finish(&w, err);
    check(ok && same_bytes(file_a, file_b), "  out of order: the same file");

    ok = st_create(&w, file_a, NULL, t, 2, err) && st_seek(&w, t[1].begin, err) && st_write(&w, y, sizeof y, err);
    check(ok && !st_finish(&w, err) && strstr(err, "incomplete"), "  without the first tensor: refused: %s", err);
    check(access(w.tmp, F_OK) != 0 && same_bytes(file_a, file_b), "    the older file stays, the other one does not");
    check(!st_seek(&w, 0, err) && !st_write(&w, x, 4, err) && strstr(err, "incomplete"),
          "    later calls fail and keep the first message");

    ok = st_create(&w, file_a, NULL, t, 2, err) && st_write(&w, x, sizeof x, err) && st_write(&w, y, sizeof y, err);
    ok = ok && st_seek(&w, 0, err);
    check(ok && !st_write(&w, x, 4, err) && strstr(err, "more data"), "  a byte twice: refused: %s", err);
    check(!st_seek(&w, 0, err) && !st_finish(&w, err) && access(w.tmp, F_OK) != 0 && strstr(err, "more data"),
          "    later calls fail and keep the first message");
    ok = st_create(&w, file_a, NULL, t, 2, err);
    check(ok && !st_seek(&w, UINT64_MAX / 2, err) && strstr(err, "cannot write"), "  an impossible position: %s", err);
}

// The last two of 750 million numbers in a sparse file of 3 GB.
static void test_large(void) {
    static const char header[] = "{" ENTRY("x", "F32", "750000000", "0", "3000000000") "}";
    const uint64_t length = sizeof header - 1;
    const float last[2] = {1.5f, -2};
    float back[2] = {0};
    StFile f = {0};
    FILE *out = fopen(file_b, "wb");
    fwrite(&length, sizeof length, 1, out);
    fputs(header, out);
    bool ok = fseeko(out, 3000000000 - 8, SEEK_CUR) == 0 && fwrite(last, 4, 2, out) == 2;
    if (fclose(out) != 0 || !ok) {
        printf("skipped: files of 3 GB cannot be written to %s\n", folder);
        return;
    }
    ok = st_open(&f, file_b, err) && st_count(f.tensors) == 750000000;
    ok = ok && st_read(&f, f.tensors, 750000000 - 2, 2, back, ST_F32, err);
    check(ok && memcmp(back, last, sizeof last) == 0, "a tensor of 3 GB is read to its end");
    check(ok && !st_read(&f, f.tensors, 750000000 - 1, 2, back, ST_F32, err), "  and no further: %s", err);
    st_close(&f);
}

// ---------------------------------------------------------------- compare

// The exit status of a program, -1 if a signal ended it, from the status of wait(). A function, since WEXITSTATUS() of
// an expression does not compile on macOS.
static int exit_status(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : -1; }

// Runs compare on two files of one tensor each; it must return the status and print the words.
static void test_compare(const char *program, const char *options, const char *name_a, const float *a,
                         const char *name_b, const float *b, int status, const char *words) {
    char command[512], output[4096];
    bool ok = write_tensor(file_a, name_a, ST_F32, 2, a, 16) && write_tensor(file_b, name_b, ST_F32, 2, b, 16);
    snprintf(command, sizeof command, "'%s' '%s' '%s' %s 2>&1", program, file_a, file_b, options);
    FILE *pipe = popen(command, "r");
    output[fread(output, 1, sizeof output - 1, pipe)] = 0;
    int got = exit_status(pclose(pipe));
    check(ok && got == status && strstr(output, words), "compare %s %s %s: status %d, '%s'", name_a, name_b, options,
          got, words);
}

// The first failure must be marked in data-flow order, whatever the order in the file.
static void test_order(const char *program) {
    static const char *const names[] = {"embed.weight", "layers.0.mega.wz.weight", "layers.1.mega.wz.weight",
                                        "layers.1.mega.wh2.weight", "output.output.weight"};
    StTensor t[5];
    StWriter w;
    char text[5][40], line[256], before[256] = "", command[512], last[40] = "";
    for (int round = 0; round < 2; round++) { // file_a holds ones, file_b twos
        const float value[1] = {(float)round + 1};
        for (int i = 0; i < 5; i++) {
            snprintf(text[i], sizeof text[i], "grad.%s", names[i]);
            t[i] = (StTensor){.name = text[i], .type = ST_F32};
        }
        st_create(&w, round == 0 ? file_a : file_b, NULL, t, 5, err);
        for (int i = 0; i < 5; i++) st_write(&w, value, sizeof value, err);
        check(st_finish(&w, err), "five gradients written");
    }
    snprintf(command, sizeof command, "'%s' '%s' '%s'", program, file_a, file_b);
    FILE *pipe = popen(command, "r");
    bool marked = false;
    while (fgets(line, sizeof line, pipe) != NULL) {
        if (strstr(line, "first over tolerance")) marked = strstr(before, "grad.output.output.weight") != NULL;
        if (strncmp(line, "grad.", 5) == 0) sscanf(line, "%39s", last);
        strcpy(before, line);
    }
    pclose(pipe);
    check(marked && strcmp(last, "grad.embed.weight") == 0,
          "compare: gradients from output to embedding, first marked");
}

// Doubles whose squares overflow or underflow: then the tensors must not count as equal.
static void test_extremes(const char *program) {
    const double pairs[][2] = {{1.35e154, 1e153}, {1e200, 2e200}, {3e-170, 6e-170}};
    char command[512];
    for (int i = 0; i < 3; i++) {
        for (int round = 0; round < 2; round++) {
            StTensor t = {.name = "loss", .type = ST_F64};
            StWriter w;
            st_create(&w, round == 0 ? file_a : file_b, NULL, &t, 1, err);
            st_write(&w, &pairs[i][round], sizeof(double), err), st_finish(&w, err);
        }
        snprintf(command, sizeof command, "'%s' '%s' '%s' > /dev/null 2>&1", program, file_a, file_b);
        check(exit_status(system(command)) == 1, "compare: %g and %g differ", pairs[i][0], pairs[i][1]);
    }
}

// Writes a file with these header entries and 64 bytes of data: floats 1, 2, 3, ...
static void write_entries(const char *path, const char *entries) {
    const uint64_t length = strlen(entries) + 2;
    FILE *out = fopen(path, "wb");
    fwrite(&length, sizeof length, 1, out);
    fprintf(out, "{%s}", entries);
    for (int i = 1; i <= 16; i++) {
        const float value = (float)i;
        fwrite(&value, sizeof value, 1, out);
    }
    fclose(out);
}

// Compares two such files, and checks the exit status and the words that must be printed, or must not, after a '!'.
static void test_entries(const char *program, const char *a, const char *b, int status, const char *const *words) {
    char command[512], output[8192];
    write_entries(file_a, a), write_entries(file_b, b);
    snprintf(command, sizeof command, "'%s' '%s' '%s' 2>&1", program, file_a, file_b);
    FILE *pipe = popen(command, "r");
    output[fread(output, 1, sizeof output - 1, pipe)] = 0;
    const int got = exit_status(pclose(pipe));
    check(got == status, "compare returns %d: %s", got, words[0]);
    for (; *words != NULL; words++) {
        const bool absent = **words == '!';
        const bool ok = (strstr(output, *words + absent) != NULL) != absent;
        check(ok, "  and prints %s'%s'", absent ? "no " : "", *words + absent);
        if (!ok) printf("%s", output);
    }
}

// Three tensors: "a" differs, "act.b" has another shape, "loss" is equal. --only and --top select what is
// compared and printed; `first` and `second` are the names at the beginning of the first two rows of the table.
static void test_selection(const char *program) {
    static const char *const entries[2] = {
        ENTRY("loss", "F32", "1", "0", "4") "," ENTRY("a", "F32", "13", "4", "56") "," ENTRY("act.b", "F32", "2", "56",
                                                                                             "64"),
        ENTRY("loss", "F32", "1", "0", "4") "," ENTRY("a", "F32", "13", "8", "60") "," ENTRY(
            "act.b", "F32", "1", "60", "64") "," ENTRY("c", "F32", "1", "4", "8")};
    static const struct {
        const char *options, *first, *second, *words, *absent;
        int status;
    } cases[] = {
        {"", "act.b", "loss", "2 tensors compared, 1 passed, 1 failed; 1 not in B", "bla", 1},
        {"--only a", "a", "", "1 tensors compared, 0 passed, 1 failed\n", "only in", 1},
        {"--only 'a*'", "act.b", "a", "1 tensors compared, 0 passed, 1 failed; 1 not in B", "loss", 1},
        {"--only=los?", "loss", "", "1 tensors compared, 1 passed, 0 failed\n", "FAIL", 0},
        {"--only c", "", "", "only in", "FAIL", 1},
        {"--only x.y", "", "", "matches --only x.y", "only in", 1},
        {"--top 1", "act.b", "", "\nfirst failure in data-flow order: act.b: B has shape 1\n", "<--", 1},
        {"--top=2", "act.b", "a", "2 tensors compared, 1 passed, 1 failed; 1 not in B", "<--", 1},
        {"--top 9 --only '[!a]*'", "loss", "", "1 tensors compared, 1 passed, 0 failed\n", "first", 0},
        {"--top 9 --only a --tolerance 1e-5", "a", "", "\nfirst over tolerance in data-flow order: a: ", "loss", 1},
    };
    char command[512], output[8192], names[3][40], *line;
    write_entries(file_a, entries[0]), write_entries(file_b, entries[1]);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        snprintf(command, sizeof command, "'%s' '%s' '%s' %s 2>&1", program, file_a, file_b, cases[i].options);
        FILE *pipe = popen(command, "r");
        output[fread(output, 1, sizeof output - 1, pipe)] = 0;
        const int got = exit_status(pclose(pipe));
        const bool says = strstr(output, cases[i].words) && !strstr(output, cases[i].absent);
        int rows = 0;
        memset(names, 0, sizeof names);
        for (line = strtok(output, "\n"); line != NULL && rows < 3; line = strtok(NULL, "\n")) {
            if (strstr(line, "  ok") || strstr(line, "  FAIL")) sscanf(line, "%39s", names[rows++]);
        }
        check(got == cases[i].status && says && strcmp(names[0], cases[i].first) == 0 &&
                  strcmp(names[1], cases[i].second) == 0,
              "compare %s: status %d, rows %s %s", cases[i].options, got, names[0], names[1]);
    }
}

static void test_types(const char *program) {
    // other types are only listed
    test_entries(
        program, ENTRY("act.a", "F32", "14", "0", "56") "," ENTRY("m", "BOOL", "8", "56", "64"),
        ENTRY("act.a", "F32", "14", "0", "56") "," ENTRY("m", "BOOL", "8", "56", "64"), 0,
        (const char *const[]){"1 tensors compared, 1 passed, 0 failed", "not compared, of type BOOL in ", ": m", NULL});
    test_entries(program, ENTRY("act.a", "F32", "14", "0", "56") "," ENTRY("m", "Q3", "8", "56", "64"),
                 ENTRY("act.a", "F32", "14", "0", "56") "," ENTRY("m", "F32", "2", "56", "64"), 0,
                 (const char *const[]){"1 tensors compared, 1 passed, 0 failed", "not compared, of type Q3 in ", NULL});
    // an activation that the reference has must be readable
    test_entries(program, ENTRY("act.a", "F32", "14", "0", "56") "," ENTRY("act.b", "F32", "2", "56", "64"),
                 ENTRY("act.a", "F32", "14", "0", "56") "," ENTRY("act.b", "I8", "8", "56", "64"), 1,
                 (const char *const[]){"1 tensors compared, 1 passed, 0 failed; 1 not in B", "B has type I8",
                                       "first failure in data-flow order: B has type I8", NULL});
    test_entries(program, ENTRY("a", "U8", "64", "0", "64"), ENTRY("a", "U8", "64", "0", "64"), 1,
                 (const char *const[]){"nothing was compared", "0 tensors compared", NULL});
    // the loss as a scalar and as a vector of one element
    test_entries(program, ENTRY("loss", "F32", "", "0", "4") "," ENTRY("x", "F32", "15", "4", "64"),
                 ENTRY("loss", "F32", "1", "0", "4") "," ENTRY("x", "F32", "15", "4", "64"), 0,
                 (const char *const[]){"2 tensors compared, 2 passed, 0 failed", NULL});
    test_entries(program, ENTRY("loss", "F32", "1", "0", "4") "," ENTRY("x", "F32", "15", "4", "64"),
                 ENTRY("loss", "F32", "", "0", "4") "," ENTRY("x", "F32", "15", "4", "64"), 0,
                 (const char *const[]){"2 tensors compared, 2 passed, 0 failed", NULL});
    // a tensor that B lacks, or has in another shape, is marked as the first failure and not counted as compared
    test_entries(program, ENTRY("act.a", "F32", "15", "0", "60") "," ENTRY("loss", "F32", "1", "60", "64"),
                 ENTRY("z", "F32", "15", "0", "60") "," ENTRY("loss", "F32", "1", "60", "64"), 1,
                 (const char *const[]){"first failure in data-flow order: not in B",
                                       "1 tensors compared, 1 passed, 0 failed; 1 not in B", NULL});
    test_entries(program, ENTRY("act.a", "F32", "15", "0", "60") "," ENTRY("loss", "F32", "1", "60", "64"),
                 ENTRY("act.a", "F32", "3,5", "0", "60") "," ENTRY("loss", "F32", "1", "60", "64"), 1,
                 (const char *const[]){"first failure in data-flow order: B has shape 3x5",
                                       "1 tensors compared, 1 passed, 0 failed; 1 not in B", NULL});
    // -NaN in A and B
    const float minus[4] = {1, -NAN, 3, 4}, zero[4] = {0};
    char command[512], output[4096];
    bool ok = write_tensor(file_a, "act.x", ST_F32, 2, minus, 16) && write_tensor(file_b, "act.x", ST_F32, 2, zero, 16);
    snprintf(command, sizeof command, "'%s' '%s' '%s' 2>&1; '%s' '%s' '%s' 2>&1", program, file_a, file_b, program,
             file_b, file_a);
    FILE *pipe = popen(command, "r");
    output[fread(output, 1, sizeof output - 1, pipe)] = 0;
    pclose(pipe);
    ok = ok && strstr(output, "nan") && !strstr(output, "-nan");
    check(ok, "compare: a NaN has no sign");
    if (!ok) printf("%s", output);
}

static void test_compares(const char *program) {
    const float one[4] = {1, 2, 3, 4}, near[4] = {1, 2, 3, 4.00001f}, far[4] = {1, 2, 3, 4.001f}, none[4] = {0},
                nan[4] = {1, NAN, 3, 4};
    test_compare(program, "", "act.logits", one, "act.logits", near, 0, "1 tensors compared, 1 passed, 0 failed");
    test_compare(program, "", "act.logits", one, "act.logits", far, 1, "first over tolerance");
    test_compare(program, "", "act.logits", one, "act.logits", far, 1, "1,1");
    test_compare(program, "--tolerance 1e-3", "act.logits", one, "act.logits", far, 0, "1 passed");
    test_compare(program, "--tolerance 0", "act.logits", one, "act.logits", near, 1, "first over tolerance");
    test_compare(program, "", "act.logits", one, "act.logits", nan, 1, "nan");
    test_compare(program, "--top 1", "act.logits", one, "act.logits", nan, 1, "nan is not <= 5e-06");
    test_compare(program, "", "act.logits", nan, "act.logits", nan, 1, "FAIL");
    test_compare(program, "", "act.logits", none, "act.logits", one, 1, "all zero in A, but not in B");
    test_compare(program, "", "act.logits", one, "act.logits", none, 1, "FAIL");
    test_compare(program, "", "act.logits", none, "act.logits", none, 0, "all zero in both");
    test_compare(program, "", "grad.x", one, "y", one, 1, "not in B");
    test_compare(program, "", "x", one, "y", one, 1, "nothing was compared");
    test_compare(program, "--tolerance x", "x", one, "x", one, 2, "--tolerance");
    test_compare(program, "third", "x", one, "x", one, 2, "usage");
    test_compare(program, "--tolerance=1e-3", "act.logits", one, "act.logits", far, 0, "1 passed");
    test_compare(program, "--tolerance=", "x", one, "x", one, 2, "usage: ./compare");
    test_compare(program, "--tolerance=-1", "x", one, "x", one, 2, "usage: ./compare");
    test_compare(program, "--tolerance", "x", one, "x", one, 2, "usage: ./compare");
    test_compare(program, "--tolerances=1", "x", one, "x", one, 2, "unknown option");
    test_compare(program, "--only", "x", one, "x", one, 2, "--only needs a name or a pattern");
    test_compare(program, "--only=", "x", one, "x", one, 2, "--only needs a name or a pattern");
    test_compare(program, "--top", "x", one, "x", one, 2, "--top needs a whole number from 1 to 1000000, not nothing");
    test_compare(program, "--top=0", "x", one, "x", one, 2, "--top needs a whole number from 1 to 1000000, not 0");
    test_compare(program, "--top 3.5", "x", one, "x", one, 2, "--top needs a whole number from 1 to 1000000, not 3.5");
    test_compare(program, "--topmost", "x", one, "x", one, 2, "unknown option");
    test_compare(program, "--help", "x", one, "x", one, 0, "usage: ./compare");
    test_compare(program, "-h", "x", one, "x", one, 0, "usage: ./compare");
    char command[512];
    snprintf(command, sizeof command, "'%s' '%s' /nonexistent >/dev/null 2>&1", program, file_a);
    check(exit_status(system(command)) == 2, "compare: an unreadable file");

    test_order(program);
    test_extremes(program);
    test_types(program);
    test_selection(program);
}

int main(int argc, char **argv) {
    if (mkdtemp(folder) == NULL) {
        perror(folder);
        return 1;
    }
    snprintf(file_a, sizeof file_a, "%s/a.safetensors", folder);
    snprintf(file_b, sizeof file_b, "%s/b.safetensors", folder);
    test_json();
    test_round_trips();
    test_f16();
    test_other_types();
    test_refusals();
    test_seek();
    test_large();
    if (argc > 1) test_compares(argv[1]);
    unlink(file_a);
    unlink(file_b);
    rmdir(folder);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
