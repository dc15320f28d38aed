// See safetensors.h.
#define _FILE_OFFSET_BITS 64
#include <errno.h>    // defines: errno
#include <fcntl.h>    // defines: open
#include <inttypes.h> // defines: PRIu64, PRId64
#include <stdarg.h>   // defines: va_list
#include <stdlib.h>   // defines: malloc, realloc, free, qsort, bsearch
#include <string.h>   // defines: memcpy, strcmp, strdup, strerror
#include <sys/stat.h> // defines: fstat
#include <unistd.h>   // defines: fsync, close, unlink
#include "json.h"
#include "safetensors.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "safetensors.c works on little-endian hosts only");

enum { MAX_HEADER = 100000000, MAX_NAME = 256, PART = 8192 };
static const char *const type_names[] = {"F64", "F32", "BF16", "F16", "I64", "I32"};
static const size_t type_sizes[] = {8, 4, 2, 2, 8, 4, 0};

// Types that cannot be read, with the bytes of an element. Types of less than a byte, F4 and F6, count as unknown.
static const struct {
    const char *name;
    int size;
} other_types[] = {{"BOOL", 1},    {"U8", 1},        {"I8", 1},          {"U16", 2},        {"I16", 2},
                   {"U32", 4},     {"U64", 8},       {"C64", 8},         {"F8_E5M2", 1},    {"F8_E4M3", 1},
                   {"F8_E8M0", 1}, {"F8_E4M3FN", 1}, {"F8_E4M3FNUZ", 1}, {"F8_E5M2FNUZ", 1}};

// Puts "PATH: tensor 'NAME': ..." into err; t may be NULL.
__attribute__((format(printf, 4, 5))) static bool fail(char *err, const char *path, const StTensor *t,
                                                       const char *format, ...) {
    size_t n = (size_t)snprintf(err, ST_ERR, "%.200s: ", path);
    if (t != NULL) n += (size_t)snprintf(err + n, ST_ERR - n, "tensor '%.200s': ", t->name);
    va_list args;
    va_start(args, format);
    vsnprintf(err + n, ST_ERR - n, format, args);
    va_end(args);
    for (char *p = err; *p != 0; p++) { // names come from files and are printed
        if ((unsigned char)*p < 0x20 || *p == 0x7F) *p = '?';
    }
    return false;
}

bool st_is_integer(StType type) { return type == ST_I64 || type == ST_I32; }

int64_t st_count(const StTensor *t) {
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

// ---------------------------------------------------------------- reading

// Reads t->dtype and sets t->type.
static bool parse_type(Json *j, StTensor *t) {
    if (!json_string(j, t->dtype, sizeof t->dtype)) return false;
    for (const char *p = t->dtype; *p != 0; p++) { // types are printed
        if ((unsigned char)*p < 0x20 || *p == 0x7F) return json_fail(j, "control character in a dtype");
    }
    int i = 0;
    while (i < ST_OTHER && strcmp(t->dtype, type_names[i]) != 0) i++;
    t->type = (StType)i;
    return true;
}

// Bytes of an element, 0 if the type is unknown.
static int64_t element_size(const StTensor *t) {
    for (size_t i = 0; t->type == ST_OTHER && i < sizeof other_types / sizeof *other_types; i++) {
        if (strcmp(t->dtype, other_types[i].name) == 0) return other_types[i].size;
    }
    return (int64_t)type_sizes[t->type];
}

// Reads an array of at most max integers, none of them negative.
static bool parse_sizes(Json *j, int64_t *out, int max, int *count) {
    int64_t value;
    *count = 0;
    json_array(j);
    while (json_array_next(j) && json_int(j, &value)) {
        if (value < 0) return json_fail(j, "negative size %" PRId64, value);
        if (*count == max) return json_fail(j, "more than %d sizes", max);
        out[(*count)++] = value;
    }
    return j->error[0] == 0;
}

// {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}: the three must agree.
static bool parse_tensor(Json *j, StTensor *t) {
    static const char *const fields[] = {"dtype", "shape", "data_offsets"};
    bool seen[3] = {false};
    char key[32];
    int64_t range[2], bytes;
    int two = 0;
    json_object(j);
    while (json_object_next(j, key, sizeof key)) {
        int i = 0;
        while (i < 3 && strcmp(key, fields[i]) != 0) i++;
        if (i == 3 || seen[i]) return json_fail(j, i == 3 ? "unknown field '%s'" : "field '%s' twice", key);
        seen[i] = true;
        if (i == 0) parse_type(j, t);
        if (i == 1) parse_sizes(j, t->shape, ST_DIMS, &t->ndim);
        if (i == 2) parse_sizes(j, range, 2, &two);
    }
    if (j->error[0] != 0) return false;
    for (int i = 0; i < 3; i++) {
        if (!seen[i]) return json_fail(j, "field '%s' is missing", fields[i]);
    }
    if (two != 2 || range[0] > range[1]) return json_fail(j, "data_offsets is not [begin, end]");
    const int64_t size = element_size(t);
    bytes = size > 0 ? size : 1; // for an unknown type this computes the number of elements
    for (int i = 0; i < t->ndim; i++) {
        if (__builtin_mul_overflow(bytes, t->shape[i], &bytes)) return json_fail(j, "shape overflows");
    }
    t->begin = (uint64_t)range[0];
    t->end = (uint64_t)range[1];
    if (size == 0 || bytes == range[1] - range[0]) return true;
    return json_fail(j, "shape makes %" PRId64 " bytes, data_offsets %" PRId64, bytes, range[1] - range[0]);
}

// Reads the metadata, which are strings, and keeps "config".
static bool parse_metadata(Json *j, char **config) {
    char key[MAX_NAME];
    json_object(j);
    while (json_object_next(j, key, sizeof key)) {
        bool kept = strcmp(key, "config") == 0;
        size_t capacity = (size_t)(j->end - j->at) + 1; // no string is longer than the rest of the text
        if (kept && *config != NULL) return json_fail(j, "config twice");
        if (kept && (*config = malloc(capacity)) == NULL) return json_fail(j, "out of memory");
        json_string(j, kept ? *config : NULL, capacity);
    }
    return j->error[0] == 0;
}

// Reads all entries into f->tensors. name gets that of the current entry, for messages.
static bool parse_header(StFile *f, Json *j, char name[MAX_NAME]) {
    bool metadata = false;
    int capacity = 0;
    json_object(j);
    while (json_object_next(j, name, MAX_NAME)) {
        if (strcmp(name, "__metadata__") == 0) {
            if (metadata) return json_fail(j, "metadata twice");
            metadata = true;
            parse_metadata(j, &f->config);
            continue;
        }
        for (const char *p = name; *p != 0; p++) { // names are printed
            if ((unsigned char)*p < 0x20 || *p == 0x7F) return json_fail(j, "control character in a name");
        }
        if (f->count == capacity) {
            capacity = capacity * 2 + 64;
            StTensor *more = realloc(f->tensors, (size_t)capacity * sizeof *more);
            if (more == NULL) return json_fail(j, "out of memory");
            f->tensors = more;
        }
        StTensor *t = &f->tensors[f->count];
        if (!parse_tensor(j, t)) return false;
        if ((t->name = strdup(name)) == NULL) return json_fail(j, "out of memory");
        f->count++;
    }
    return json_end(j);
}

static int by_offset(const void *x, const void *y) {
    const StTensor *a = x, *b = y;
    if (a->begin != b->begin) return a->begin < b->begin ? -1 : 1;
    return (a->end > b->end) - (a->end < b->end); // empty tensors first
}

static int by_name(const void *x, const void *y) {
    return strcmp((*(StTensor *const *)x)->name, (*(StTensor *const *)y)->name);
}

// Sorts the tensors by position and indexes them by name. Together they must cover the data exactly once.
static bool check_layout(StFile *f, char *err) {
    const size_t n = (size_t)f->count;
    uint64_t at = 0;
    f->by_name = malloc((n + 1) * sizeof *f->by_name);
    if (f->tensors == NULL) f->tensors = malloc(sizeof *f->tensors); // not NULL, so that loops may compute tensors + 0
    if (f->by_name == NULL || f->tensors == NULL) return fail(err, f->path, NULL, "out of memory");
    if (n > 0) qsort(f->tensors, n, sizeof *f->tensors, by_offset);
    for (size_t i = 0; i < n; i++) f->by_name[i] = &f->tensors[i];
    qsort(f->by_name, n, sizeof *f->by_name, by_name);
    for (size_t i = 1; i < n; i++) {
        if (by_name(&f->by_name[i - 1], &f->by_name[i]) == 0) {
            return fail(err, f->path, f->by_name[i], "occurs twice");
        }
    }
    for (StTensor *t = f->tensors; t < f->tensors + n; at = t->end, t++) {
        if (t->begin < at) return fail(err, f->path, t, "overlaps '%.200s'", t[-1].name);
        if (t->begin > at) return fail(err, f->path, t, "a gap before it, from byte %" PRIu64, at);
        if (t->end > f->data_size) return fail(err, f->path, t, "ends after the file does: truncated?");
    }
    if (at == f->data_size) return true;
    return fail(err, f->path, NULL, "%" PRIu64 " bytes after the last tensor", f->data_size - at);
}

// Reads and checks the header. *text gets a copy of it, freed by the caller.
static bool read_header(StFile *f, char **text, char *err) {
    char name[MAX_NAME] = "";
    struct stat info;
    Json j;
    uint64_t n = 0, size; // bytes of the header, of the file
    const int fd =
        open(f->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC); // O_NONBLOCK: do not wait for a FIFO, which is refused
    if (fd < 0 || fstat(fd, &info) != 0 || (f->file = fdopen(fd, "rb")) == NULL) {
        fail(err, f->path, NULL, "%s", strerror(errno));
        if (fd >= 0) close(fd);
        return false;
    }
    size = (uint64_t)info.st_size;
    if (!S_ISREG(info.st_mode)) return fail(err, f->path, NULL, "not a regular file");
    if (size < sizeof n || fread(&n, sizeof n, 1, f->file) != 1)
        return fail(err, f->path, NULL, "truncated: under 8 bytes");
    if (n > MAX_HEADER || n > size - sizeof n) {
        const char *problem = n > MAX_HEADER ? "is above the limit of 100 MB" : "is cut short";
        return fail(err, f->path, NULL, "damaged? its header of %" PRIu64 " bytes %s", n, problem);
    }
    f->data_start = n + sizeof n;
    f->data_size = size - f->data_start;
    if ((*text = malloc(n + 1)) == NULL) return fail(err, f->path, NULL, "out of memory");
    if (fread(*text, 1, n, f->file) != n) return fail(err, f->path, NULL, "cannot read the header");
    (*text)[n] = 0;
    json_begin(&j, *text, n);
    if (parse_header(f, &j, name)) return check_layout(f, err);
    const StTensor named = {.name = name};
    return fail(err, f->path, name[0] != 0 ? &named : NULL, "header, %s", j.error);
}

bool st_open(StFile *f, const char *path, char *err) {
    char *text = NULL;
    *f = (StFile){.path = strdup(path)};
    bool ok = f->path != NULL ? read_header(f, &text, err) : fail(err, path, NULL, "out of memory");
    free(text);
    if (!ok) st_close(f);
    return ok;
}

void st_close(StFile *f) {
    if (f->file != NULL) fclose(f->file);
    for (int i = 0; i < f->count; i++) free(f->tensors[i].name);
    free(f->tensors);
    free(f->by_name);
    free(f->config);
    free(f->path);
    *f = (StFile){0};
}

const StTensor *st_find(const StFile *f, const char *name) {
    StTensor key = {.name = (char *)name}, *wanted = &key;
    StTensor **found = bsearch(&wanted, f->by_name, (size_t)f->count, sizeof *f->by_name, by_name);
    return found == NULL ? NULL : *found;
}

// IEEE binary16: a sign bit, 5 bits of exponent with bias 15, 10 bits of mantissa. Exact; a NaN keeps its sign and
// payload.
static float from_f16(uint32_t half) {
    const uint32_t sign = half >> 15 << 31, exponent = half >> 10 & 0x1F, mantissa = half & 0x3FF;
    uint32_t bits = sign | (exponent + 127 - 15) << 23 | mantissa << 13;
    float value = (float)mantissa * 0x1p-24f; // a subnormal number's magnitude, or zero
    if (exponent == 0x1F) bits = sign | 0x7F800000 | mantissa << 13;
    if (exponent > 0) memcpy(&value, &bits, sizeof value);
    return exponent == 0 && sign != 0 ? -value : value;
}

// Converts the element at p, which need not be aligned, to dst[i]; returns false if it does not fit.
static bool convert(void *dst, size_t i, StType to, const unsigned char *p, StType from) {
    int64_t bits = 0; // shorter types fill the low bytes
    double f64;
    float f32;
    memcpy(&bits, p, type_sizes[from]);
    if (from == ST_BF16) bits <<= 16; // the upper half of an F32
    memcpy(&f64, &bits, sizeof f64);
    memcpy(&f32, &bits, sizeof f32);
    if (from == ST_F16) f32 = from_f16((uint32_t)bits);
    const int64_t whole = from == ST_I32 ? (int32_t)bits : bits;
    const double real = st_is_integer(from) ? (double)whole : from == ST_F64 ? f64 : (double)f32;
    if (to == ST_F64) ((double *)dst)[i] = real;
    if (to == ST_F32) ((float *)dst)[i] = (float)real;
    if (to == ST_I64) ((int64_t *)dst)[i] = whole;
    if (to == ST_I32) ((int32_t *)dst)[i] = (int32_t)whole;
    return to != ST_I32 || whole == (int32_t)whole;
}

bool st_read(StFile *f, const StTensor *t, int64_t first, int64_t n, void *dst, StType as, char *err) {
    unsigned char raw[PART * 8];
    const StType from = t->type;
    const size_t size = type_sizes[from];
    const off_t start = (off_t)(f->data_start + t->begin + (uint64_t)first * size);
    const bool alike = st_is_integer(from) == st_is_integer(as) && as != ST_BF16 && as != ST_F16;
    if (from == ST_OTHER || !(as == ST_F64 || alike))
        return fail(err, f->path, t, "is %s, not %s", t->dtype, type_names[as]);
    if (first < 0 || n < 0 || first > st_count(t) - n)
        return fail(err, f->path, t, "has fewer elements than requested");
    if (fseeko(f->file, start, SEEK_SET) != 0) return fail(err, f->path, t, "%s", strerror(errno));
    for (int64_t done = 0; done < n; done += PART) {
        const size_t part = n - done < PART ? (size_t)(n - done) : PART;
        char *to = (char *)dst + (size_t)done * type_sizes[as];
        void *target = from == as ? (void *)to : raw;
        if (fread(target, size, part, f->file) != part) return fail(err, f->path, t, "cannot be read");
        for (size_t i = 0; from != as && i < part; i++) {
            if (!convert(to, i, as, raw + i * size, from)) return fail(err, f->path, t, "a value exceeds I32");
        }
    }
    return true;
}

// ---------------------------------------------------------------- writing

void st_abort(StWriter *w) {
    if (w->file == NULL) return;
    fclose(w->file);
    unlink(w->tmp);
    w->file = NULL;
}

static bool give_up(StWriter *w, char *err, const char *reason) {
    fail(err, w->path, NULL, "cannot write: %s", reason);
    st_abort(w);
    return false;
}

static void print_header(FILE *out, const char *config, const StTensor *tensors, int count) {
    fputs("{\"__metadata__\":{", out);
    if (config != NULL) {
        fputs("\"config\":", out);
        json_write_string(out, config);
    }
    fputc('}', out);
    for (const StTensor *t = tensors; t < tensors + count; t++) {
        fputc(',', out);
        json_write_string(out, t->name);
        fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", type_names[t->type]);
        for (int i = 0; i < t->ndim; i++) fprintf(out, "%s%" PRId64, i > 0 ? "," : "", t->shape[i]);
        fprintf(out, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", t->begin, t->end);
    }
    fputc('}', out);
    for (off_t at = ftello(out); at % 8 > 0; at++) fputc(' ', out);
}

bool st_create(StWriter *w, const char *path, const char *config, StTensor *tensors, int count, char *err) {
    uint64_t length = 0;
    struct stat info;
    *w = (StWriter){.path = path};
    for (StTensor *t = tensors; t < tensors + count; t++) {
        t->begin = w->left;
        t->end = w->left += (uint64_t)st_count(t) * type_sizes[t->type];
    }
    if (strlen(path) + sizeof ".tmp" > sizeof w->tmp) return fail(err, path, NULL, "name too long");
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode)) // renaming onto a device such as /dev/null would replace it
        return fail(err, path, NULL, "cannot write: not a regular file");
    snprintf(w->tmp, sizeof w->tmp, "%s.tmp", path);
    if ((w->file = fopen(w->tmp, "wb")) == NULL) return give_up(w, err, strerror(errno));
    fwrite(&length, sizeof length, 1, w->file); // 0 makes the file invalid until the header is complete
    print_header(w->file, config, tensors, count);
    length = (uint64_t)ftello(w->file) - sizeof length;
    rewind(w->file);
    fwrite(&length, sizeof length, 1, w->file);
    w->start = length + sizeof length;
    if (ferror(w->file)) return give_up(w, err, strerror(errno));
    return st_seek(w, 0, err);
}

bool st_seek(StWriter *w, uint64_t position, char *err) {
    if (w->file == NULL) return false;
    if (fseeko(w->file, (off_t)(w->start + position), SEEK_SET) != 0) return give_up(w, err, strerror(errno));
    return true;
}

bool st_write(StWriter *w, const void *data, size_t bytes, char *err) {
    if (w->file == NULL) return false;
    if (bytes > w->left) return give_up(w, err, "more data than its tensors hold");
    if (fwrite(data, 1, bytes, w->file) != bytes) return give_up(w, err, strerror(errno));
    w->left -= bytes;
    return true;
}

bool st_finish(StWriter *w, char *err) {
    if (w->file == NULL) return false;
    if (w->left != 0) return give_up(w, err, "its tensors' data are incomplete");
    bool ok = fflush(w->file) == 0 && fsync(fileno(w->file)) == 0 && rename(w->tmp, w->path) == 0;
    if (!ok) return give_up(w, err, strerror(errno));
    fclose(w->file);
    w->file = NULL;
    return st_sync_directory(w->path, err);
}

bool st_sync_directory(const char *path, char *err) {
    static bool warned;
    const char *slash = strrchr(path, '/');
    char *directory = slash == NULL ? strdup(".") : strndup(path, (size_t)(slash - path) + 1);
    int fd = directory == NULL ? -1 : open(directory, O_RDONLY | O_CLOEXEC);
    bool ok = fd >= 0 && fsync(fd) == 0;
    // some network and container file systems cannot sync directories
    const bool unsupported = fd >= 0 && (errno == EINVAL || errno == ENOTSUP || errno == EOPNOTSUPP ||
                                         errno == ENOSYS || errno == ENODEV || errno == EBADF);
    if (!ok && unsupported && !warned)
        fprintf(stderr,
                "warning: %s: its file system cannot sync directories (%s): a power failure may lose what was "
                "saved last\n",
                directory, strerror(errno));
    if (!ok && unsupported) ok = warned = true;
    if (!ok) fail(err, path, NULL, "cannot sync its directory: %s", strerror(errno));
    if (fd >= 0) close(fd);
    free(directory);
    return ok;
}
