// Reading and writing .safetensors files: 8 bytes of header length, a JSON header, the tensors' data. What
// can fail returns false and puts a message that names the file and the tensor into err[ST_ERR].
#pragma once
#include <stdbool.h> // defines: bool
#include <stdint.h>  // defines: int64_t, uint64_t
#include <stdio.h>   // defines: FILE, size_t

enum { ST_ERR = 512, ST_DIMS = 8 };
// Values of type ST_OTHER (BOOL, U8, F8_E4M3, ...) cannot be read. Their files can be opened: of types with a known size
// offsets and shape must agree; of unknown types, the range must lie within the file.
typedef enum { ST_F64, ST_F32, ST_BF16, ST_F16, ST_I64, ST_I32, ST_OTHER } StType;

typedef struct {
    char *name;
    StType type;
    int ndim; // 0: a scalar
    int64_t shape[ST_DIMS];
    uint64_t begin, end; // in bytes from the start of the data
    char dtype[32];      // the type's name in a file that was read
} StTensor;

typedef struct {
    FILE *file;
    char *path;
    StTensor *tensors; // in the order of their data
    StTensor **by_name;
    int count;
    char *config; // metadata "config", NULL if absent; other metadata are dropped
    uint64_t data_start, data_size;
} StFile;

// Opens a file and checks its header against its size; nothing is allocated on the header's word alone.
bool st_open(StFile *f, const char *path, char *err);
void st_close(StFile *f);

const StTensor *st_find(const StFile *f, const char *name); // binary search; NULL if there is none
int64_t st_count(const StTensor *t);                        // number of elements, 1 for a scalar
bool st_is_integer(StType type);

// Reads n elements from element first on, converted: floats to F32 or F64; integers to I64, F64, or I32
// (refused if one does not fit). BF16 and F16 are read only. Values are not judged: NaN and infinity come through.
bool st_read(StFile *f, const StTensor *t, int64_t first, int64_t n, void *dst, StType as, char *err);

typedef struct {
    FILE *file;       // NULL once finished, failed or aborted
    const char *path; // the caller's, to stay until st_finish
    char tmp[4096];   // path + ".tmp": the name until st_finish
    uint64_t left;    // bytes of data still to come
} StWriter;

// Starts a file of these tensors: name, type and shape are given, begin and end computed. config may be NULL.
// A failure, here and below, removes the temporary file and leaves an older file at path as it was; later
// calls return false and leave the first message in err, so that one check at the end will do.
bool st_create(StWriter *w, const char *path, const char *config, StTensor *tensors, int count, char *err);
bool st_write(StWriter *w, const void *data, size_t bytes,
              char *err); // tensor after tensor, in pieces of any size
bool st_finish(StWriter *w,
               char *err); // checks that all data came; flushes, syncs, renames, syncs the folder
void st_abort(StWriter *w);

// Makes it durable that path was created in its folder, or renamed.
bool st_sync_folder(const char *path, char *err);
