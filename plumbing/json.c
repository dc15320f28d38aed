// See json.h.
#include <ctype.h>  // defines: isxdigit
#include <errno.h>  // defines: errno, ERANGE
#include <math.h>   // defines: isfinite
#include <stdarg.h> // defines: va_list
#include <stdlib.h> // defines: strtod, strtoll, strtoul
#include <string.h> // defines: memcpy, strchr, strcspn, strlen, strncmp
#include "json.h"

enum { MAX_DEPTH = 64 }; // json_skip recurses

bool json_fail(Json *j, const char *format, ...) {
    if (j->error[0] != 0) return false;
    int n = snprintf(j->error, sizeof j->error, "byte %td: ", j->at - j->start);
    va_list args;
    va_start(args, format);
    vsnprintf(j->error + n, sizeof j->error - (size_t)n, format, args);
    va_end(args);
    for (char *p = j->error; *p != 0; p++) { // messages may contain parts of the text and are printed
        if ((unsigned char)*p < 0x20 || *p == 0x7F) *p = '?';
    }
    return false;
}

// Passes over white space and returns the next character; 0 at the end of the text and after an error.
static char peek(Json *j) {
    if (j->error[0] != 0) return 0;
    while (*j->at == ' ' || *j->at == '\t' || *j->at == '\n' || *j->at == '\r') j->at++;
    return *j->at;
}

static bool expect(Json *j, char c) {
    if (peek(j) != c) return json_fail(j, "expected '%c'", c);
    j->at++;
    return true;
}

void json_begin(Json *j, const char *text, size_t size) { *j = (Json){.start = text, .at = text, .end = text + size}; }

bool json_end(Json *j) {
    peek(j);
    return j->at == j->end ? j->error[0] == 0 : json_fail(j, "expected nothing more");
}

static bool enter(Json *j, char open) {
    if (!expect(j, open)) return false;
    if (++j->depth > MAX_DEPTH) return json_fail(j, "nested more than %d deep", MAX_DEPTH);
    return j->first = true;
}

static bool next(Json *j, char close) {
    if (peek(j) == close) {
        j->at++;
        j->depth--;
        return j->first = false;
    }
    if (!j->first && peek(j) != ',') return json_fail(j, "expected ',' or '%c'", close);
    j->at += !j->first;
    j->first = false;
    return j->error[0] == 0;
}

bool json_object(Json *j) { return enter(j, '{'); }
bool json_array(Json *j) { return enter(j, '['); }
bool json_array_next(Json *j) { return next(j, ']'); }
bool json_object_next(Json *j, char *key, size_t size) {
    return next(j, '}') && json_string(j, key, size) && expect(j, ':');
}

static uint32_t hex4(Json *j) {
    char digits[5] = "";
    for (int i = 0; i < 4 && isxdigit((unsigned char)*j->at); i++) digits[i] = *j->at++;
    if (digits[3] == 0) json_fail(j, "expected four hexadecimal digits");
    return (uint32_t)strtoul(digits, NULL, 16);
}

// Reads an escape sequence after its backslash and returns its character; 0 on an error.
static uint32_t escape(Json *j) {
    const char *codes = "\"\\/bfnrt", *code = *j->at != 0 ? strchr(codes, *j->at) : NULL;
    if (code == NULL && *j->at != 'u') return json_fail(j, "unknown escape");
    j->at++;
    if (code != NULL) return (uint32_t) "\"\\/\b\f\n\r\t"[code - codes];
    uint32_t c = hex4(j), low = 0;
    if (c >= 0xD800 && c < 0xDC00 && strncmp(j->at, "\\u", 2) == 0) { // the first of a surrogate pair
        j->at += 2;
        low = hex4(j);
        if (low >= 0xDC00 && low < 0xE000) c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
    }
    if (c == 0 || (c >= 0xD800 && c < 0xE000)) json_fail(j, "NUL or half a surrogate pair");
    return j->error[0] != 0 ? 0 : c;
}

// Writes a character as UTF-8 and returns its number of bytes.
static size_t encode(uint32_t c, char out[4]) {
    static const uint32_t lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)(lead[n] | c);
    return n;
}

bool json_string(Json *j, char *out, size_t size) {
    size_t length = 0;
    if (out != NULL) out[0] = 0;
    if (!expect(j, '"')) return false;
    while (*j->at != '"') {
        char bytes[4] = {*j->at};
        size_t n = 1;
        if ((unsigned char)*j->at < 0x20) return json_fail(j, "control character or end of text in a string");
        if (*j->at++ == '\\') n = encode(escape(j), bytes);
        if (j->error[0] != 0) return false;
        if (out == NULL) continue;
        if (length + n >= size) return json_fail(j, "string longer than %zu bytes", size - 1);
        memcpy(out + length, bytes, n);
        out[length += n] = 0;
    }
    j->at++;
    return true;
}

// Passes over digits; returns false if there are none.
static bool digits(const char **p) {
    const char *start = *p;
    while (**p >= '0' && **p <= '9') (*p)++;
    return *p > start;
}

// The end of the number at the cursor; NULL, with an error, if there is none or if an integer is required and it is not
// one.
static const char *number_end(Json *j, bool integer) {
    peek(j);
    const char *p = j->at + (*j->at == '-'), *start = p;
    bool ok = j->error[0] == 0 && digits(&p) && (*start != '0' || p == start + 1); // no leading zeros
    if (ok && *p == '.') ok = !integer && (p++, digits(&p));
    if (ok && (*p == 'e' || *p == 'E')) ok = !integer && (p += p[1] == '+' || p[1] == '-' ? 2 : 1, digits(&p));
    if (!ok) json_fail(j, integer ? "expected an integer" : "expected a number");
    return ok ? p : NULL;
}

bool json_int(Json *j, int64_t *value) {
    const char *end = number_end(j, true);
    if (end == NULL) return false;
    errno = 0;
    *value = strtoll(j->at, NULL, 10);
    if (errno == ERANGE) return json_fail(j, "integer out of range");
    j->at = end;
    return true;
}

bool json_number(Json *j, double *value) {
    const char *end = number_end(j, false);
    if (end == NULL) return false;
    *value = strtod(j->at, NULL); // strtod also accepts "0x1", but then the next call refuses the x
    if (!isfinite(*value)) return json_fail(j, "number out of range");
    j->at = end;
    return true;
}

static bool word(Json *j, const char *text) {
    if (peek(j) != *text || strncmp(j->at, text, strlen(text)) != 0) return false;
    j->at += strlen(text);
    return true;
}

bool json_null_follows(Json *j) { return word(j, "null"); }
bool json_bool(Json *j, bool *value) {
    *value = word(j, "true");
    return *value || word(j, "false") || json_fail(j, "expected true or false");
}

bool json_skip(Json *j) {
    char c = peek(j);
    double number;
    if (c == '{') {
        for (json_object(j); json_object_next(j, NULL, 0);) json_skip(j);
    } else if (c == '[') {
        for (json_array(j); json_array_next(j);) json_skip(j);
    } else if (c == '"') {
        json_string(j, NULL, 0);
    } else if (!word(j, "true") && !word(j, "false") && !word(j, "null")) {
        json_number(j, &number);
    }
    return j->error[0] == 0;
}

void json_write_string(FILE *out, const char *text) {
    fputc('"', out);
    for (const char *p = text; *p != 0; p++) {
        if (*p == '"' || *p == '\\') fputc('\\', out);
        if ((unsigned char)*p < 0x20)
            fprintf(out, "\\u%04x", (unsigned)*p);
        else
            fputc(*p, out);
    }
    fputc('"', out);
}

// ----------------------------------------------------------------------------
// strings of which only some are allowed

int choice_index(const char *words, const char *word) {
    const size_t length = strlen(word);
    int index = 0;
    for (const char *at = words; length > 0; index++) {
        const size_t n = strcspn(at, " ");
        if (n == length && strncmp(at, word, n) == 0) return index;
        if (at[n] == 0) break;
        at += n + 1;
    }
    return -1;
}

void write_choice(FILE *out, const char *words, int index) {
    for (; index > 0; index--) words = strchr(words, ' ') + 1;
    fprintf(out, "%.*s", (int)strcspn(words, " "), words);
}
