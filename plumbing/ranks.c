// Processes that train one model together, over MPI. Compiled without MEGALODON_MPI, and where a program was not
// started by mpirun or the like, there is one, and what is below does nothing or copies.
#include <stdlib.h> // defines: atexit, exit, free, getenv, strtol
#include <string.h> // defines: memcpy
#include <unistd.h> // defines: usleep
#include "plumbing.h"

Ranks ranks = {.size = 1, .here = 1, .groups = 1, .pieces = 1, .rows = 1};

// How many processes mpirun says there are, before MPI itself is asked: Open MPI's and PMIx's, MPICH's and Intel's.
static long announced(void) {
    const char *size = getenv("OMPI_COMM_WORLD_SIZE");
    if (size == NULL) size = getenv("PMI_SIZE");
    if (size == NULL) return getenv("PMIX_RANK") != NULL;
    return strtol(size, NULL, 10);
}

// ----------------------------------------------------------------------------
// what MPI does

#ifdef MEGALODON_MPI
#include <mpi.h> // defines: MPI_Allreduce, ..

static MPI_Comm group; // the pieces of this process's sequences

static MPI_Datatype real_type(void) { return sizeof(real) == sizeof(double) ? MPI_DOUBLE : MPI_FLOAT; }

static void count(size_t bytes) { ranks.exchanges++, ranks.bytes += (int64_t)bytes; }

static void finish(void) { MPI_Finalize(); }

void ranks_start(void) {
    MPI_Comm machine;
    if (announced() < 1) return;
    MPI_Init(NULL, NULL);
    atexit(finish);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks.size);
    MPI_Comm_rank(MPI_COMM_WORLD, &ranks.rank);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_size(machine, &ranks.here);
    MPI_Comm_free(&machine);
    ranks.started = true;
    if (ranks.rank > 0 && freopen("/dev/null", "w", stdout) == NULL) fatal("/dev/null: cannot be opened");
}

static void make_groups(void) {
    if (ranks.started) MPI_Comm_split(MPI_COMM_WORLD, ranks.group, ranks.piece, &group);
}

void ranks_exit(int status) {
    if (ranks.started) MPI_Abort(MPI_COMM_WORLD, status);
    exit(status);
}

void ranks_sum(double *values, int n) {
    if (ranks.size == 1) return;
    count((size_t)n * sizeof *values);
    MPI_Allreduce(MPI_IN_PLACE, values, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
}

void ranks_gather(void *context, const void *mine, void *all, size_t bytes) {
    (void)context;
    count(bytes);
    MPI_Allgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, group);
}

void ranks_fetch(void *dst, const void *mine, size_t bytes, int owner) {
    enum { MOST = 1 << 30 };
    if (owner == 0 && ranks.rank == 0 && dst != mine) memcpy(dst, mine, bytes);
    for (size_t done = 0; done < bytes && owner > 0; done += MOST) {
        const int n = (int)(bytes - done < MOST ? bytes - done : MOST);
        if (ranks.rank == owner) MPI_Send((const char *)mine + done, n, MPI_BYTE, 0, 0, MPI_COMM_WORLD);
        if (ranks.rank == 0) MPI_Recv((char *)dst + done, n, MPI_BYTE, owner, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    }
}

// all (size, n): what this process has for each. mine (n): the sum of what all have for this one.
static void reduce_scatter(real *mine, const real *all, size_t n) {
    count((size_t)ranks.size * n * sizeof *mine);
    MPI_Reduce_scatter_block(all, mine, (int)n, real_type(), MPI_SUM, MPI_COMM_WORLD);
}

static void all_gather(real *all, const real *mine, size_t n) {
    count(n * sizeof *mine);
    MPI_Allgather(mine, (int)n, real_type(), all, (int)n, real_type(), MPI_COMM_WORLD);
}

#else

void ranks_start(void) {
    if (announced() > 1)
        usage_error("started as one of %ld processes, but built without MPI: make, with mpicc", announced());
}
static void make_groups(void) {}
void ranks_exit(int status) { exit(status); }
void ranks_sum(double *values, int n) { (void)values, (void)n; }
void ranks_gather(void *context, const void *mine, void *all, size_t bytes) { (void)context, memcpy(all, mine, bytes); }
void ranks_fetch(void *dst, const void *mine, size_t bytes, int owner) {
    (void)owner;
    if (dst != mine) memcpy(dst, mine, bytes);
}
static void reduce_scatter(real *mine, const real *all, size_t n) { memcpy(mine, all, n * sizeof *mine); }
static void all_gather(real *all, const real *mine, size_t n) { memcpy(all, mine, n * sizeof *mine); }

#endif

// ----------------------------------------------------------------------------
// what is the same for one process and for many

void ranks_wait(void) {
    if (ranks.rank > 0) usleep(1000000 + (unsigned)(ranks.rank < 20 ? ranks.rank : 20) * 100000);
}

void ranks_deal(int pieces, int B, int L, int C) {
    const int chunks = (L - 1) / C + 1;
    if (ranks.size % pieces != 0)
        usage_error("--chunk-parallel %d does not divide the number of processes, %d", pieces, ranks.size);
    ranks.pieces = pieces, ranks.groups = ranks.size / pieces;
    ranks.group = ranks.rank / pieces, ranks.piece = ranks.rank % pieces;
    if (B % ranks.groups != 0)
        usage_error("--batch-size %d cannot be divided evenly among %d groups of processes: give a multiple of %d", B,
                    ranks.groups, ranks.groups);
    if (chunks < pieces)
        usage_error("--chunk-parallel %d: --seq-len %d has %d chunk%s of %d tokens, and each process needs one", pieces,
                    L, chunks, chunks > 1 ? "s" : "", C);
    ranks.rows = B / ranks.groups, ranks.row = ranks.rows * ranks.group;
    ranks.lengths = allocate((size_t)pieces, sizeof *ranks.lengths);
    for (int64_t p = 0; p < pieces; p++) {
        const int64_t from = p * chunks / pieces * C, to = (p + 1) * chunks / pieces * C;
        ranks.lengths[p] = (to < L ? to : L) - from;
        if (p == ranks.piece) ranks.start = from;
    }
    make_groups();
}

bool ranks_agree(uint64_t number) {
    double halves[2] = {(double)(uint32_t)number, (double)(uint32_t)(number >> 32)};
    const double mine[2] = {halves[0] * ranks.size, halves[1] * ranks.size};
    ranks_sum(halves, 2); // if not all are the same, some differ from the mean
    return halves[0] == mine[0] && halves[1] == mine[1];
}

// The ranges of all processes are gone through at once, PART numbers of each at a time.
enum { PART = 1 << 18 };

// Those of process r that follow the first `done`.
static Range part_of(size_t size, int r, size_t done) {
    Range range = megalodon_range(size, r, ranks.size);
    range.first += done;
    range.count = range.count < done ? 0 : range.count - done < PART ? range.count - done : PART;
    return range;
}

void ranks_sum_gradients(Model *model, size_t size) {
    if (ranks.size == 1) return;
    size_t n = part_of(size, 0, 0).count; // the first one has most
    real *all = allocate((size_t)ranks.size * n, sizeof *all), *mine = allocate(n, sizeof *mine);
    for (size_t done = 0; (n = part_of(size, 0, done).count) > 0; done += PART) {
        for (int r = 0; r < ranks.size; r++) {
            const Range part = part_of(size, r, done);
            if (part.count > 0) megalodon_read(model, GRADS, part.first, part.count, all + (size_t)r * n);
        }
        reduce_scatter(mine, all, n);
        const Range own = part_of(size, ranks.rank, done);
        if (own.count > 0) megalodon_write(model, GRADS, own.first, own.count, mine);
    }
    free(all), free(mine);
}

void ranks_share_params(Model *model, size_t size) {
    if (ranks.size == 1) return;
    size_t n = part_of(size, 0, 0).count;
    real *all = allocate((size_t)ranks.size * n, sizeof *all), *mine = allocate(n, sizeof *mine);
    for (size_t done = 0; (n = part_of(size, 0, done).count) > 0; done += PART) {
        const Range own = part_of(size, ranks.rank, done);
        if (own.count > 0) megalodon_read(model, PARAMS, own.first, own.count, mine);
        all_gather(all, mine, n);
        for (int r = 0; r < ranks.size; r++) {
            const Range part = part_of(size, r, done);
            if (r != ranks.rank && part.count > 0)
                megalodon_write(model, PARAMS, part.first, part.count, all + (size_t)r * n);
        }
    }
    free(all), free(mine);
}

void ranks_read(Model *model, Block block, size_t size, size_t first, size_t n, real *dst) {
    for (int r = 0; r < ranks.size; r++) {
        const Range own = megalodon_range(size, r, ranks.size);
        const size_t from = first > own.first ? first : own.first, end = own.first + own.count;
        const size_t to = first + n < end ? first + n : end;
        if (from >= to) continue;
        real *place = dst + (from - first);
        if (r == ranks.rank) megalodon_read(model, block, from, to - from, place);
        ranks_fetch(place, place, (to - from) * sizeof *dst, r);
    }
}
