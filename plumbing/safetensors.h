// Reading and writing .safetensors files: 8 bytes with the length of the header, a JSON header, the tensors' data.
// Functions that can fail return false and put a message that names the file and the tensor into err (ST_ERR bytes).
#pragma once
#include <stdbool.h> // defines: bool
#include <stdint.h>  // defines: int64_t, uint64_t
#include <stdio.h>   // defines: FILE, size_t

enum { ST_ERR = 512, ST_DIMS = 8 };
// Tensors of type ST_OTHER (BOOL, U8, F8_E4M3, ...) cannot be read, but files that have them can be opened. For types of
// known size, offsets and shape must agree; for others, the data must lie within the file.
typedef enum { ST_F64, ST_F32, ST_BF16, ST_F16, ST_I64, ST_I32, ST_OTHER } StType;

typedef struct {
    char *name;
    StType type;
    int ndim; // 0: a scalar
    int64_t shape[ST_DIMS];
    uint64_t begin, end; // position of its data: bytes from the start of all data
    char dtype[32];      // name of the type in a file that was read
} StTensor;

typedef struct {
    FILE *file;
    char *path;
    StTensor *tensors;   // in the order of their data
    StTensor **by_name;  // (count) sorted by name
    int count;           // number of tensors
    char *config;        // metadata "config", NULL if absent; other metadata are dropped
    uint64_t data_start; // position of the data in the file, bytes
    uint64_t data_size;  // bytes of the data
} StFile;

// Opens a file and checks its header against its size. Sizes in the header are checked before memory is allocated.
bool st_open(StFile *f, const char *path, char *err);
void st_close(StFile *f);

const StTensor *st_find(const StFile *f, const char *name); // binary search; NULL if there is none
int64_t st_count(const StTensor *t);                        // number of elements, 1 for a scalar
bool st_is_integer(StType type);

// Reads n elements from element `first` on, converted to type `as`: floats to F32 or F64; integers to I64, F64, or I32,
// where a value that does not fit is an error. BF16 and F16 can be read but not written. NaN and infinity are passed
// on.
bool st_read(StFile *f, const StTensor *t, int64_t first, int64_t n, void *dst, StType as, char *err);

typedef struct {
    FILE *file;       // NULL once finished, failed or aborted
    const char *path; // as passed to st_create; must stay until st_finish
    char tmp[4096];   // path + ".tmp", the name until st_finish
    uint64_t start;   // position of the data in the file, bytes
    uint64_t left;    // bytes of data that are still to be written
} StWriter;

// Starts a file of these tensors, whose name, type and shape are set; begin and end are computed. config may be NULL. A
// failure of this or of the next functions removes the temporary file and leaves an older file at path unchanged. Later
// calls return false and keep the first message in err, so one check at the end suffices.
bool st_create(StWriter *w, const char *path, const char *config, StTensor *tensors, int count, char *err);
// Writes data of the tensors, in their order, in parts of any size. Every byte must be written once.
bool st_write(StWriter *w, const void *data, size_t bytes, char *err);
// The next st_write begins at this position: bytes from the start of all data, as StTensor.begin.
bool st_seek(StWriter *w, uint64_t position, char *err);
// Checks that all data have been written; flushes, syncs and renames the file, and syncs its directory.
bool st_finish(StWriter *w, char *err);
void st_abort(StWriter *w);

// Syncs the directory of path, so that its creation or renaming is durable.
bool st_sync_directory(const char *path, char *err);
