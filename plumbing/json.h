// A small strict JSON reader: a cursor that walks over a text once and builds nothing, so that 100 MB take a
// second. RFC 8259 without extensions: no comments, no trailing commas, no NaN; and no NUL in a string. Bytes
// above 0x7F in a string are taken as they are.
//
//     json_begin(&j, text, size);
//     json_object(&j);
//     while (json_object_next(&j, key, sizeof key)) {
//         if (strcmp(key, "model_dim") == 0) json_int(&j, &model_dim);   every value must be read, or skipped
//         else json_skip(&j);
//     }
//     if (!json_end(&j)) fprintf(stderr, "%s: %s\n", path, j.error);
//
// The first error stays, with its byte offset, and later calls return false: one check at the end will do.
// A key that occurs twice is returned twice; the caller decides.
#pragma once
#include <stdbool.h> // defines: bool
#include <stdint.h>  // defines: int64_t
#include <stdio.h>   // defines: FILE, size_t

typedef struct {
    const char *start, *at, *end;
    int depth;       // objects and arrays that are open
    bool first;      // nothing of the innermost one has been read yet
    char error[192]; // empty while all is well
} Json;

void json_begin(Json *j, const char *text, size_t size); // text[size] must be 0; the text must outlive j
bool json_end(Json *j);                                  // true if all went well and only blanks are left
bool json_object(Json *j);                               // enters an object
bool json_object_next(Json *j, char *key, size_t size);  // true: got a key, its value is next; false: left
bool json_array(Json *j);                                // enters an array
bool json_array_next(Json *j);                           // true: an element is next; false: left
bool json_string(Json *j, char *out, size_t size);       // decoded; refused if longer; out may be NULL
bool json_int(Json *j, int64_t *value);                  // no fraction, no exponent
bool json_number(Json *j, double *value);                // finite
bool json_bool(Json *j, bool *value);
bool json_null_follows(Json *j); // if the value is null: steps over it and returns true
bool json_skip(Json *j);         // steps over a value of any kind, checking it

// Records an error at the cursor unless there is one already, and returns false. Callers may use it too.
bool json_fail(Json *j, const char *format, ...) __attribute__((format(printf, 2, 3)));

void json_write_string(FILE *out, const char *text); // quoted and escaped
