// The tensors of a State: one table, from which memory, state files and copies of rows follow.
#include <stddef.h> // defines: offsetof
#include "layout.h"
#include "plumbing.h"

// Every tensor has the shape (slices, B, row...): one slice, one for each layer, or one for each TimestepNorm, that is
// num_layers + 1. A tensor with one slice has the shape (B, row...) in files.
typedef enum { ONE_SLICE, PER_LAYER, PER_NORM } Slices;

static const struct {
    const char *name; // in a state file
    StType type;
    Slices slices;
    const char *row;   // shape of one row of one slice: letters of megalodon.h, a digit for itself
    size_t pointer;    // offset of the pointer in State
    bool within_chunk; // exists only if a call may end within a chunk
} rows[NUM_STATE_TENSORS] = {
    {"state.count", ST_I64, ONE_SLICE, "", offsetof(State, count), false},
    {"state.mean", ST_F64, PER_NORM, "G", offsetof(State, mean), false},
    {"state.m2", ST_F64, PER_NORM, "G", offsetof(State, m2), false},
    {"state.h", REAL, PER_LAYER, "2ND", offsetof(State, h), false},
    {"state.k", REAL, PER_LAYER, "CZ", offsetof(State, k), true},
    {"state.v", REAL, PER_LAYER, "CE", offsetof(State, v), true},
};
enum { ALIGNMENT = 64 }; // bytes: each tensor starts at a multiple of it

static int64_t dimension(const Config *c, char letter) {
    switch (letter) {
    case 'C':
        return c->chunk_size;
    case 'D':
        return c->model_dim;
    case 'E':
        return c->value_dim;
    case 'G':
        return c->norm_num_groups;
    case 'N':
        return c->cema_ndim;
    case 'Z':
        return c->z_dim;
    default:
        return letter - '0';
    }
}

static size_t type_size(StType type) { return type == ST_F32 ? sizeof(float) : sizeof(double); } // F32, F64, I64

void state_tensors(StateTensor list[NUM_STATE_TENSORS], const Config *c, int B, bool whole_chunks) {
    size_t offset = 0;
    for (int i = 0; i < NUM_STATE_TENSORS; i++) {
        const int slices = rows[i].slices == ONE_SLICE ? 1 : c->num_layers + (rows[i].slices == PER_NORM);
        StateTensor t = {.name = rows[i].name, .type = rows[i].type, .offset = offset, .pointer = rows[i].pointer};
        t.element_size = t.row_bytes = type_size(rows[i].type);
        if (rows[i].slices != ONE_SLICE) t.shape[t.ndim++] = slices;
        t.shape[t.ndim++] = B;
        for (const char *letter = rows[i].row; *letter != 0; letter++) {
            t.shape[t.ndim++] = dimension(c, *letter);
            t.row_bytes *= (size_t)dimension(c, *letter);
        }
        t.slices = rows[i].within_chunk && whole_chunks ? 0 : (size_t)slices;
        t.bytes = t.slices * (size_t)B * t.row_bytes;
        offset += (t.bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        list[i] = t;
    }
}

// In double, where sizes cannot overflow.
static double approximate_bytes(const Config *c, int B, bool whole_chunks) {
    double bytes = 0;
    for (int i = 0; i < NUM_STATE_TENSORS; i++) {
        if (rows[i].within_chunk && whole_chunks) continue;
        double row = (double)type_size(rows[i].type) * B * (rows[i].slices == ONE_SLICE ? 1 : c->num_layers + 1.0);
        for (const char *letter = rows[i].row; *letter != 0; letter++) row *= (double)dimension(c, *letter);
        bytes += row;
    }
    return bytes;
}

size_t state_bytes(const Config *c, int B, int whole_chunks) {
    if (approximate_bytes(c, B, whole_chunks) > (double)(SIZE_MAX / 2)) return SIZE_MAX;
    return state_point(NULL, c, B, whole_chunks).bytes;
}

State state_point(void *memory, const Config *c, int B, int whole_chunks) {
    StateTensor list[NUM_STATE_TENSORS];
    State s = {.B = B, .layers = c->num_layers, .G = c->norm_num_groups, .memory = memory};
    s.modes = (size_t)2 * (size_t)c->cema_ndim * (size_t)c->model_dim;
    state_tensors(list, c, B, whole_chunks);
    for (const StateTensor *t = list; t < list + NUM_STATE_TENSORS; t++) {
        s.bytes = t->offset + t->bytes;
        if (memory != NULL && t->slices > 0) *(void **)(void *)((char *)&s + t->pointer) = (char *)memory + t->offset;
    }
    return s;
}
