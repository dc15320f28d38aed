// Ranks: processes that train one model together, over MPI. Compiled without MEGALODON_MPI, and in a program that was
// not started by mpirun or the like, there is one rank, for which the functions below do nothing or copy.
//
// Communication has two levels. The ranks of a node are GPUs of one machine that map each other's memory; they read it
// directly (peers.cu). Nodes exchange messages through MPI. Where ranks cannot map each other's memory, as on the CPU,
// every rank is a node of its own.
#include <stdlib.h> // defines: atexit, exit, free, getenv, strtol
#include <string.h> // defines: memcpy
#include <unistd.h> // defines: usleep
#include "plumbing.h"

Ranks ranks = {.size = 1, .local_size = 1, .node_size = 1, .dp_size = 1, .cp_size = 1, .num_rows = 1};

// The number of processes according to the launcher's environment variables, 0 if there is no launcher; before
// MPI_Init.
static long launched_processes(void) {
    const char *size = getenv("OMPI_COMM_WORLD_SIZE"); // Open MPI
    if (size == NULL) size = getenv("PMI_SIZE");       // MPICH, Intel MPI
    if (size == NULL) return getenv("PMIX_RANK") != NULL;
    return strtol(size, NULL, 10);
}

#ifdef MEGALODON_MPI
#include <mpi.h> // defines: MPI_Allreduce, ..

static MPI_Comm machine;    // ranks of this machine
static MPI_Comm intra_node; // ranks of this node
static MPI_Comm inter_node; // ranks with this node_rank, one of each node
static MPI_Comm cp_group;   // the chunk-parallel ranks that share this rank's sequences
static int num_nodes;
static int node;      // index of this rank's node
static int node_rank; // index of this rank in its node

static MPI_Datatype real_type(void) { return sizeof(real) == sizeof(double) ? MPI_DOUBLE : MPI_FLOAT; }

static void count_collective(size_t bytes) { ranks.collectives++, ranks.bytes_sent += (int64_t)bytes; }

// On the CPU no rank maps another's memory, and messages lie in main memory.
#ifdef MEGALODON_PEERS
#include "peers.h" // defines: peers_all_gather, peers_can_map, ..
#else
static int peers_can_map(MPI_Comm comm) { return comm == MPI_COMM_NULL; }
static void peers_open(MPI_Comm comm, Model *model) { (void)comm, (void)model; }
static void peers_close(void) {}
static void peers_reduce_grads(Shard shard) { (void)shard; }
static void peers_finish(void) {}
static void peers_all_gather_params(Model *model, Shard *const *shards, int n) { (void)model, (void)shards, (void)n; }
static void peers_read_grads(Model *model, Shard r, real *dst) { megalodon_read(model, GRADS, r.first, r.count, dst); }
static void peers_write_grads(Model *model, Shard r, const real *src) {
    megalodon_write(model, GRADS, r.first, r.count, src);
}
static int peers_add(const real *sum, int others, size_t n) { return (void)sum, (void)others, (void)n, 0; }
static void peers_synchronize(void) {}
static real *peers_alloc(size_t n) { return allocate(n, sizeof(real)); }
static void peers_free(real *memory) { free(memory); }
static void peers_all_gather(MPI_Comm comm, int mapped, const void *local, void *all, size_t bytes) {
    (void)mapped;
    MPI_Allgather(local, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, comm);
}
#endif

// ----------------------------------------------------------------------------
// start, end, errors

// An error that all ranks find is reported by rank 0, which ends the others while they wait here. Ranks that find an
// error alone report it after at most 3 seconds, one after another.
static void wait_for_rank_0(void) {
    if (ranks.rank > 0) usleep(1000000 + (unsigned)(ranks.rank < 20 ? ranks.rank : 20) * 100000);
}

static void abort_all(int status) { MPI_Abort(MPI_COMM_WORLD, status); }

static void finish(void) { MPI_Finalize(); }

void ranks_start(void) {
    // Tests set MEGALODON_MACHINE to a number to treat the processes of one machine as those of several.
    const char *name = getenv("MEGALODON_MACHINE");
    MPI_Comm shared;
    if (launched_processes() < 1) return;
    MPI_Init(NULL, NULL);
    atexit(finish);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks.size);
    MPI_Comm_rank(MPI_COMM_WORLD, &ranks.rank);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &shared);
    MPI_Comm_split(shared, name ? (int)strtol(name, NULL, 10) : 0, 0, &machine);
    MPI_Comm_size(shared, &ranks.local_size);
    ranks.started = true;
    terminal_off(); // Open MPI gives its processes a terminal, whatever its own standard output is
    set_failure_hooks(wait_for_rank_0, abort_all);
    if (ranks.rank > 0 && freopen("/dev/null", "w", stdout) == NULL) fatal("/dev/null: cannot be opened");
}

// Forms the nodes. The ranks of a machine are a node if they map each other's memory, and if all machines have equally
// many ranks, numbered consecutively. Shards are numbered so that those of one node_rank in all nodes are adjacent.
static void make_groups(void) {
    int n, index;
    if (!ranks.started) return;
    MPI_Comm_split(MPI_COMM_WORLD, ranks.dp_rank, ranks.cp_rank, &cp_group);
    MPI_Comm_size(machine, &n);
    MPI_Comm_rank(machine, &index);
    int minima[3] = {peers_can_map(machine) && ranks.rank % n == index, n, -n}; // the last one: minus the maximum of n
    MPI_Allreduce(MPI_IN_PLACE, minima, 3, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    ranks.node_size = minima[0] && minima[1] == -minima[2] ? n : 1;
    num_nodes = ranks.size / ranks.node_size;
    node = ranks.rank / ranks.node_size, node_rank = ranks.rank % ranks.node_size;
    MPI_Comm_split(MPI_COMM_WORLD, node, ranks.rank, &intra_node);
    MPI_Comm_split(MPI_COMM_WORLD, node_rank, ranks.rank, &inter_node);
    ranks.shard = node_rank * num_nodes + node;
}

// ----------------------------------------------------------------------------
// small collectives and messages

void ranks_sum(double *values, int n) {
    if (ranks.size == 1) return;
    count_collective((size_t)n * sizeof *values);
    MPI_Allreduce(MPI_IN_PLACE, values, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
}

double ranks_min(double value) {
    if (ranks.size == 1) return value;
    count_collective(sizeof value);
    MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_DOUBLE, MPI_MIN, MPI_COMM_WORLD);
    return value;
}

void ranks_all_gather(void *context, const void *local, void *all, size_t bytes) {
    (void)context;
    count_collective(bytes);
    peers_all_gather(cp_group, ranks.node_size % ranks.cp_size == 0, local, all, bytes);
}

void ranks_send_to_0(void *dst, const void *src, size_t bytes, int owner) {
    enum { MAX_MESSAGE = 1 << 30 }; // MPI counts in int
    if (owner == 0 && ranks.rank == 0 && dst != src) memcpy(dst, src, bytes);
    for (size_t done = 0; done < bytes && owner > 0; done += MAX_MESSAGE) {
        const int n = (int)(bytes - done < MAX_MESSAGE ? bytes - done : MAX_MESSAGE);
        if (ranks.rank == owner) MPI_Send((const char *)src + done, n, MPI_BYTE, 0, 0, MPI_COMM_WORLD);
        if (ranks.rank == 0) MPI_Recv((char *)dst + done, n, MPI_BYTE, owner, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    }
}

// ----------------------------------------------------------------------------
// gradients and parameters (ZeRO-1), bucket by bucket. megalodon_shards() cuts each bucket into `size` shards. Rank r
// of node f, with F nodes, updates shard r F + f. So the shards of all ranks with the same node_rank r are adjacent;
// together they are the node shard r. The sum of a bucket's gradients has two steps:
//   1. intra-node reduce-scatter: each rank adds up its node shard over the ranks of its node;
//   2. inter-node reduce-scatter: among the ranks with the same node_rank, each adds up its shard over the nodes.
// For updated parameters the same steps go backwards, as all-gathers.

enum { MESSAGE = 1 << 18 }; // elements of each shard in one message

static Shard **shards;      // (size, num_buckets) of every shard number
static Shard **node_shards; // (node_size, num_buckets)
static int num_buckets;
static real *send, *receive;    // (num_nodes, MESSAGE): messages to and from each node
static int pending_bucket = -1; // bucket after step 1 and before step 2; -1: none

void ranks_open(Model *model, const Config *config) {
    if (ranks.size == 1) return;
    shards = allocate((size_t)ranks.size, sizeof *shards);
    node_shards = allocate((size_t)ranks.node_size, sizeof *node_shards);
    for (int i = 0; i < ranks.size; i++) {
        if ((shards[i] = megalodon_shards(config, i, ranks.size, &num_buckets)) == NULL) fatal("out of memory");
    }
    for (int r = 0; r < ranks.node_size; r++) {
        node_shards[r] = allocate((size_t)num_buckets, sizeof *node_shards[r]);
        for (int b = 0; b < num_buckets; b++) {
            const Shard first = shards[r * num_nodes][b], last = shards[(r + 1) * num_nodes - 1][b];
            node_shards[r][b] = (Shard){first.first, last.first + last.count - first.first};
        }
    }
    peers_open(intra_node, model);
    if (num_nodes == 1) return;
    send = peers_alloc((size_t)num_nodes * MESSAGE);
    receive = peers_alloc((size_t)num_nodes * MESSAGE);
}

void ranks_close(void) {
    if (ranks.size == 1) return;
    peers_free(send), peers_free(receive);
    peers_close();
    for (int i = 0; i < ranks.size; i++) free(shards[i]);
    for (int r = 0; r < ranks.node_size; r++) free(node_shards[r]);
    free(shards), free(node_shards);
}

// The part of a bucket's shard that one message carries: at most MESSAGE elements from element `done` on, of the shard
// of this node_rank in node f. Shard 0 is the longest, so it determines the number of messages.
static Shard message_part(int f, int bucket, size_t done) {
    Shard r = shards[node_rank * num_nodes + f][bucket];
    r.first += done;
    r.count = r.count < done ? 0 : r.count - done < MESSAGE ? r.count - done : MESSAGE;
    return r;
}

// Each rank sends every node its part and adds up what it receives. This is a reduce-scatter; MPI_Reduce_scatter was
// two to three times slower where it was measured.
static void reduce_scatter_inter_node(Model *model, int bucket) {
    size_t n;
    for (size_t done = 0; num_nodes > 1 && (n = message_part(0, bucket, done).count) > 0; done += MESSAGE) {
        for (int f = 0; f < num_nodes; f++) {
            const Shard r = message_part(f, bucket, done);
            if (r.count > 0) peers_read_grads(model, r, send + (size_t)f * n);
        }
        count_collective((size_t)num_nodes * n * sizeof *send);
        MPI_Alltoall(send, (int)n, real_type(), receive, (int)n, real_type(), inter_node);
        const int on_host = !peers_add(receive, num_nodes - 1, n);
        for (int f = 1; f < num_nodes && on_host; f++) {
#pragma omp parallel for simd schedule(static) if (parallel : n > 32768) // PARALLEL_MIN of megalodon.c
            for (size_t i = 0; i < n; i++) receive[i] += receive[(size_t)f * n + i];
        }
        const Shard r = message_part(node, bucket, done);
        if (r.count > 0) peers_write_grads(model, r, receive);
    }
}

// The host runs ahead of its GPU. So that it need not wait, step 2 is done for the bucket of the call before.
void ranks_reduce_scatter_grads(Model *model, int bucket) {
    if (pending_bucket >= 0) reduce_scatter_inter_node(model, pending_bucket);
    size_t n = 0;
    for (int r = 0; r < ranks.node_size; r++) n += node_shards[r][bucket].count;
    if (ranks.node_size > 1) count_collective(n * sizeof *send);
    peers_reduce_grads(node_shards[node_rank][bucket]);
    pending_bucket = bucket;
    if (bucket > 0) return; // bucket 0 is the last one
    reduce_scatter_inter_node(model, bucket);
    pending_bucket = -1;
    peers_finish();
}

void ranks_all_gather_params(Model *model) {
    size_t n, sent = 0;
    if (ranks.size == 1) return;
    for (int b = 0; b < num_buckets; b++) {
        for (size_t done = 0; num_nodes > 1 && (n = message_part(0, b, done).count) > 0; done += MESSAGE) {
            const Shard r = message_part(node, b, done);
            if (r.count > 0) megalodon_read(model, PARAMS, r.first, r.count, send);
            count_collective(n * sizeof *send);
            peers_synchronize();
            MPI_Allgather(send, (int)n, real_type(), receive, (int)n, real_type(), inter_node);
            for (int f = 0; f < num_nodes; f++) {
                const Shard other = message_part(f, b, done);
                if (f != node && other.count > 0)
                    megalodon_write(model, PARAMS, other.first, other.count, receive + (size_t)f * n);
            }
        }
        sent += node_shards[node_rank][b].count;
    }
    if (ranks.node_size > 1) count_collective(sent * sizeof *send);
    peers_all_gather_params(model, node_shards, num_buckets);
}

void ranks_read(Model *model, Buffer buffer, size_t first, size_t n, real *dst) {
    if (ranks.size == 1) megalodon_read(model, buffer, first, n, dst);
    for (int i = 0; i < ranks.size * num_buckets; i++) { // the overlap of first .. first + n - 1 with each shard
        const int shard = i / num_buckets;
        const Shard s = shards[shard][i % num_buckets];
        const size_t from = first > s.first ? first : s.first, end = s.first + s.count;
        const size_t to = first + n < end ? first + n : end;
        if (from >= to) continue;
        const int owner = shard % num_nodes * ranks.node_size + shard / num_nodes;
        real *at = dst + (from - first);
        if (owner == ranks.rank) megalodon_read(model, buffer, from, to - from, at);
        ranks_send_to_0(at, at, (to - from) * sizeof *dst, owner);
    }
}

#else // without MPI

void ranks_start(void) {
    if (launched_processes() > 1)
        usage_error("started as one of %ld processes, but built without MPI: make, with mpicc", launched_processes());
}
static void make_groups(void) {}
void ranks_sum(double *values, int n) { (void)values, (void)n; }
double ranks_min(double value) { return value; }
void ranks_all_gather(void *context, const void *local, void *all, size_t bytes) {
    (void)context, memcpy(all, local, bytes);
}
void ranks_send_to_0(void *dst, const void *src, size_t bytes, int owner) {
    (void)owner;
    if (dst != src) memcpy(dst, src, bytes);
}
void ranks_open(Model *model, const Config *config) { (void)model, (void)config; }
void ranks_close(void) {}
void ranks_reduce_scatter_grads(Model *model, int bucket) { (void)model, (void)bucket; }
void ranks_all_gather_params(Model *model) { (void)model; }
void ranks_read(Model *model, Buffer buffer, size_t first, size_t n, real *dst) {
    megalodon_read(model, buffer, first, n, dst);
}

#endif

// ----------------------------------------------------------------------------
// the same for one rank and for many

void ranks_split(int cp_size, int B, int64_t L, int C) {
    const int64_t chunks = (L - 1) / C + 1;
    if (ranks.size % cp_size != 0)
        usage_error("--chunk-parallel %d does not divide the number of processes, %d", cp_size, ranks.size);
    ranks.cp_size = cp_size, ranks.dp_size = ranks.size / cp_size;
    ranks.dp_rank = ranks.rank / cp_size, ranks.cp_rank = ranks.rank % cp_size;
    if (B % ranks.dp_size != 0)
        usage_error("--batch-size %d cannot be divided evenly among %d data-parallel ranks: give a multiple of %d", B,
                    ranks.dp_size, ranks.dp_size);
    if (chunks < cp_size)
        usage_error("--chunk-parallel %d: --seq-len %lld has %lld chunk%s of %d tokens, and each process needs one",
                    cp_size, (long long)L, (long long)chunks, chunks > 1 ? "s" : "", C);
    ranks.num_rows = B / ranks.dp_size, ranks.first_row = ranks.num_rows * ranks.dp_rank;
    make_groups();
}

bool ranks_agree(uint64_t number) {
    double halves[2] = {(double)(uint32_t)number, (double)(uint32_t)(number >> 32)};
    const double mine[2] = {halves[0] * ranks.size, halves[1] * ranks.size};
    ranks_sum(halves, 2); // unless all numbers are equal, one of them differs from the mean
    return halves[0] == mine[0] && halves[1] == mine[1];
}
