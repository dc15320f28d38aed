// A small strict JSON reader: a cursor that passes over a text once and builds no tree; it reads 100 MB in a second.
// RFC 8259 without extensions: no comments, no trailing commas, no NaN; and no NUL in a string. Bytes above 0x7F in a
// string are copied unchanged.
//
//     json_begin(&j, text, size);
//     json_object(&j);
//     while (json_object_next(&j, key, sizeof key)) {
//         if (strcmp(key, "model_dim") == 0) json_int(&j, &model_dim);   every value must be read or skipped
//         else json_skip(&j);
//     }
//     if (!json_end(&j)) fprintf(stderr, "%s: %s\n", path, j.error);
//
// The first error is kept, with its byte offset, and later calls return false, so one check at the end suffices. A key
// that occurs twice is returned twice.
#pragma once
#include <stdbool.h> // defines: bool
#include <stdint.h>  // defines: int64_t
#include <stdio.h>   // defines: FILE, size_t

typedef struct {
    const char *start; // of the text
    const char *at;    // cursor
    const char *end;   // of the text
    int depth;         // number of open objects and arrays
    bool first;        // no element of the innermost one has been read yet
    char error[192];   // the first error; empty if there is none
} Json;

void json_begin(Json *j, const char *text, size_t size); // text[size] must be 0; the text must outlive j
bool json_end(Json *j);    // returns whether there was no error and only white space is left
bool json_object(Json *j); // enters an object
bool json_object_next(Json *j, char *key,
                      size_t size);                // true: read a key, its value is next; false: the object has ended
bool json_array(Json *j);                          // enters an array
bool json_array_next(Json *j);                     // true: an element is next; false: the array has ended
bool json_string(Json *j, char *out, size_t size); // decoded; an error if longer than size - 1 bytes; out may be NULL
bool json_int(Json *j, int64_t *value);            // no fraction, no exponent
bool json_number(Json *j, double *value);          // finite
bool json_bool(Json *j, bool *value);
bool json_null_follows(Json *j); // if the value is null, passes over it and returns true
bool json_skip(Json *j);         // passes over a value of any kind and checks it

// Records an error at the cursor unless there is one already, and returns false.
bool json_fail(Json *j, const char *format, ...) __attribute__((format(printf, 2, 3)));

void json_write_string(FILE *out, const char *text); // quoted and escaped

// The index of a word in a list of words that are separated by spaces, -1 if it is not in it; and the word of an index.
int choice_index(const char *words, const char *word);
void write_choice(FILE *out, const char *words, int index);
