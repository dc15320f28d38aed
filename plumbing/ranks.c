// Processes that train one model together, over MPI. Compiled without MEGALODON_MPI, and where a program was not
// started by mpirun or the like, there is one, and what is below does nothing or copies.
#include <stdlib.h> // defines: atexit, exit, free, getenv, strtol
#include <string.h> // defines: memcpy
#include <unistd.h> // defines: usleep
#include "plumbing.h"

Ranks ranks = {.size = 1, .here = 1, .near = 1, .dp_size = 1, .cp_size = 1, .rows = 1};

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

static MPI_Comm machine;          // processes of this machine
static MPI_Comm near;             // of them, this one alone or all that reach each other's memory
static MPI_Comm far;              // one of each such circle
static MPI_Comm group;            // the pieces of this process's sequences
static int circles, circle, seat; // of those that reach each other, this one's, and its place there

static MPI_Datatype real_type(void) { return sizeof(real) == sizeof(double) ? MPI_DOUBLE : MPI_FLOAT; }

static void count(size_t bytes) { ranks.exchanges++, ranks.bytes += (int64_t)bytes; }

// What peers.cu does for GPUs: on the CPU nobody reaches another's memory.
#ifdef MEGALODON_PEERS
#include "peers.h" // defines: peers_gather, peers_reach, ..
#else
static int peers_reach(MPI_Comm comm) { return comm == MPI_COMM_NULL; }
static void peers_open(MPI_Comm comm, Model *model) { (void)comm, (void)model; }
static void peers_close(void) {}
static void peers_sum(Shard range) { (void)range; }
static void peers_finish(void) {}
static void peers_share(Model *model, Shard *const *of, int n) { (void)model, (void)of, (void)n; }
static void peers_read(Model *model, Shard r, real *dst) { megalodon_read(model, GRADS, r.first, r.count, dst); }
static void peers_write(Model *model, Shard r, const real *src) {
    megalodon_write(model, GRADS, r.first, r.count, src);
}
static int peers_add(const real *sum, int others, size_t n) { return (void)sum, (void)others, (void)n, 0; }
static void peers_wait(void) {}
static real *peers_memory(size_t n) { return allocate(n, sizeof(real)); }
static void peers_release(real *memory) { free(memory); }
static void peers_gather(MPI_Comm comm, int reached, const void *mine, void *all, size_t bytes) {
    (void)reached;
    MPI_Allgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, comm);
}
#endif

static void finish(void) { MPI_Finalize(); }

void ranks_start(void) {
    const char *name = getenv("MEGALODON_MACHINE"); // a number: as if on that one of several, to try that on one
    MPI_Comm shared;
    if (announced() < 1) return;
    MPI_Init(NULL, NULL);
    atexit(finish);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks.size);
    MPI_Comm_rank(MPI_COMM_WORLD, &ranks.rank);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &shared);
    MPI_Comm_split(shared, name ? (int)strtol(name, NULL, 10) : 0, 0, &machine);
    MPI_Comm_size(shared, &ranks.here);
    ranks.started = true;
    if (ranks.rank > 0 && freopen("/dev/null", "w", stdout) == NULL) fatal("/dev/null: cannot be opened");
}

// Processes of a machine work as one towards other machines if they reach each other's memory, and if every machine has
// as many, one behind the other. Of what they update, those of one machine have parts that follow each other.
static void make_groups(void) {
    int n, place;
    if (!ranks.started) return;
    MPI_Comm_split(MPI_COMM_WORLD, ranks.dp_rank, ranks.cp_rank, &group);
    MPI_Comm_size(machine, &n);
    MPI_Comm_rank(machine, &place);
    int least[3] = {peers_reach(machine) && ranks.rank % n == place, n, -n};
    MPI_Allreduce(MPI_IN_PLACE, least, 3, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    ranks.near = least[0] && least[1] == -least[2] ? n : 1;
    MPI_Comm_split(MPI_COMM_WORLD, ranks.rank / ranks.near, ranks.rank, &near);
    MPI_Comm_split(MPI_COMM_WORLD, ranks.rank % ranks.near, ranks.rank, &far);
    circles = ranks.size / ranks.near, circle = ranks.rank / ranks.near, seat = ranks.rank % ranks.near;
    ranks.part = seat * circles + circle;
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
    peers_gather(group, ranks.near % ranks.cp_size == 0, mine, all, bytes);
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

// ----------------------------------------------------------------------------
// gradients and parameters, segment by segment, see megalodon_shards. Within a circle others' numbers come from their
// memory, between circles by messages. Process l of circle f, of F, updates part l F + f. So those with the same l have
// parts that follow each other: l's stretch, which it sums for its circle, and then they do among themselves.

enum { PART = 1 << 18 }; // numbers of each part that go into a message

static Shard **parts;     // (size) of (segments)
static Shard **stretches; // (near) of (segments)
static int segments;
static real *out, *in;      // messages: (circles, PART) to and from each circle
static int unfinished = -1; // segment whose gradients are summed within circles and not yet between them

void ranks_open(Model *model, const Config *config) {
    if (ranks.size == 1) return;
    parts = allocate((size_t)ranks.size, sizeof *parts);
    stretches = allocate((size_t)ranks.near, sizeof *stretches);
    for (int p = 0; p < ranks.size; p++) {
        if ((parts[p] = megalodon_shards(config, p, ranks.size, &segments)) == NULL) fatal("out of memory");
    }
    for (int l = 0; l < ranks.near; l++) {
        stretches[l] = allocate((size_t)segments, sizeof *stretches[l]);
        for (int s = 0; s < segments; s++) {
            const Shard first = parts[l * circles][s], last = parts[(l + 1) * circles - 1][s];
            stretches[l][s] = (Shard){first.first, last.first + last.count - first.first};
        }
    }
    peers_open(near, model);
    if (circles > 1) out = peers_memory((size_t)circles * PART), in = peers_memory((size_t)circles * PART);
}

void ranks_close(void) {
    if (ranks.size == 1) return;
    peers_release(out), peers_release(in);
    peers_close();
    for (int p = 0; p < ranks.size; p++) free(parts[p]);
    for (int l = 0; l < ranks.near; l++) free(stretches[l]);
    free(parts), free(stretches);
}

// Of circle f's part in this process's stretch, what follows the first `done`, at most PART.
static Shard piece_of(int f, int segment, size_t done) {
    Shard r = parts[seat * circles + f][segment];
    r.first += done;
    r.count = r.count < done ? 0 : r.count - done < PART ? r.count - done : PART;
    return r;
}

// Everyone sends each his piece and adds up what comes: that is a reduce-scatter, and MPI's own was two to three times
// slower where it was tried.
static void sum_between_circles(Model *model, int segment) {
    size_t n; // of the first part, which is the longest
    for (size_t done = 0; circles > 1 && (n = piece_of(0, segment, done).count) > 0; done += PART) {
        for (int f = 0; f < circles; f++) {
            const Shard r = piece_of(f, segment, done);
            if (r.count > 0) peers_read(model, r, out + (size_t)f * n);
        }
        count((size_t)circles * n * sizeof *out);
        MPI_Alltoall(out, (int)n, real_type(), in, (int)n, real_type(), far);
        const int host = !peers_add(in, circles - 1, n);
        for (int f = 1; f < circles && host; f++) {
#pragma omp parallel for simd schedule(static) if (parallel : n > 32768) // as in megalodon.c
            for (size_t i = 0; i < n; i++) in[i] += in[(size_t)f * n + i];
        }
        const Shard own = piece_of(circle, segment, done);
        if (own.count > 0) peers_write(model, own, in);
    }
}

// The host is ahead of its GPU. So that this need not wait, sums between circles are those of the segment before.
void ranks_sum_gradients(Model *model, int segment) {
    if (unfinished >= 0) sum_between_circles(model, unfinished);
    size_t n = 0;
    for (int l = 0; l < ranks.near; l++) n += stretches[l][segment].count;
    if (ranks.near > 1) count(n * sizeof *out);
    peers_sum(stretches[seat][segment]);
    unfinished = segment;
    if (segment > 0) return;
    sum_between_circles(model, segment);
    unfinished = -1;
    peers_finish();
}

void ranks_share_params(Model *model) {
    size_t n, own = 0;
    if (ranks.size == 1) return;
    for (int s = 0; s < segments; s++) {
        for (size_t done = 0; circles > 1 && (n = piece_of(0, s, done).count) > 0; done += PART) {
            const Shard r = piece_of(circle, s, done);
            if (r.count > 0) megalodon_read(model, PARAMS, r.first, r.count, out);
            count(n * sizeof *out);
            peers_wait();
            MPI_Allgather(out, (int)n, real_type(), in, (int)n, real_type(), far);
            for (int f = 0; f < circles; f++) {
                const Shard there = piece_of(f, s, done);
                if (f != circle && there.count > 0)
                    megalodon_write(model, PARAMS, there.first, there.count, in + (size_t)f * n);
            }
        }
        own += stretches[seat][s].count;
    }
    if (ranks.near > 1) count(own * sizeof *out);
    peers_share(model, stretches, segments);
}

void ranks_read(Model *model, Buffer buffer, size_t first, size_t n, real *dst) {
    if (ranks.size == 1) megalodon_read(model, buffer, first, n, dst);
    for (int i = 0; i < ranks.size * segments; i++) {
        const Shard own = parts[i / segments][i % segments];
        const size_t from = first > own.first ? first : own.first, end = own.first + own.count;
        const size_t to = first + n < end ? first + n : end;
        if (from >= to) continue;
        const int owner = i / segments % circles * ranks.near + i / segments / circles;
        real *place = dst + (from - first);
        if (owner == ranks.rank) megalodon_read(model, buffer, from, to - from, place);
        ranks_fetch(place, place, (to - from) * sizeof *dst, owner);
    }
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
void ranks_open(Model *model, const Config *config) { (void)model, (void)config; }
void ranks_close(void) {}
void ranks_sum_gradients(Model *model, int segment) { (void)model, (void)segment; }
void ranks_share_params(Model *model) { (void)model; }
void ranks_read(Model *model, Buffer buffer, size_t first, size_t n, real *dst) {
    megalodon_read(model, buffer, first, n, dst);
}

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
    ranks.cp_size = pieces, ranks.dp_size = ranks.size / pieces;
    ranks.dp_rank = ranks.rank / pieces, ranks.cp_rank = ranks.rank % pieces;
    if (B % ranks.dp_size != 0)
        usage_error("--batch-size %d cannot be divided evenly among %d groups of processes: give a multiple of %d", B,
                    ranks.dp_size, ranks.dp_size);
    if (chunks < pieces)
        usage_error("--chunk-parallel %d: --seq-len %d has %d chunk%s of %d tokens, and each process needs one", pieces,
                    L, chunks, chunks > 1 ? "s" : "", C);
    ranks.rows = B / ranks.dp_size, ranks.row = ranks.rows * ranks.dp_rank;
    ranks.lengths = allocate((size_t)pieces, sizeof *ranks.lengths);
    for (int64_t p = 0; p < pieces; p++) {
        const int64_t from = p * chunks / pieces * C, to = (p + 1) * chunks / pieces * C;
        ranks.lengths[p] = (to < L ? to : L) - from;
        if (p == ranks.cp_rank) ranks.start = from;
    }
    make_groups();
}

bool ranks_agree(uint64_t number) {
    double halves[2] = {(double)(uint32_t)number, (double)(uint32_t)(number >> 32)};
    const double mine[2] = {halves[0] * ranks.size, halves[1] * ranks.size};
    ranks_sum(halves, 2); // if not all are the same, some differ from the mean
    return halves[0] == mine[0] && halves[1] == mine[1];
}
