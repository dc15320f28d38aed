// Communication between GPUs of one machine that map each other's memory; see peers.h.
//
// A rank exports an allocation (cudaIpcGetMemHandle), and the others map it (cudaIpcOpenMemHandle). Kernels and copies
// then use the mapped pointer like a local one; the data go through NVLink or PCIe, or stay on the GPU if both ranks
// share it. No rank writes to another's memory.
//
// Before a rank reads, the others must have written. They synchronise so: each records an event after the work that it
// has queued in stream 0, an MPI barrier makes sure that all have recorded, and each makes its stream wait for
// everyone's event. No host waits for a GPU, so GPUs have work queued meanwhile. Two events alternate: when a rank
// records one of them again, all ranks have passed the barrier in between, so they have already queued the wait for its
// previous record.
#include <stdio.h>
#include <stdlib.h>

#include <cuda_runtime.h>

#define OMPI_SKIP_MPICXX // leave out the C++ bindings
extern "C" {
#include "peers.h"
#include "plumbing.h"
}
#ifdef OPEN_MPI
#include <mpi-ext.h> // defines: MPIX_CUDA_AWARE_SUPPORT, MPIX_Query_cuda_support
#endif

enum { BLOCK = 256 }; // threads of a thread block

static void check(cudaError_t status, int line) {
    if (status != cudaSuccess) fatal("%s:%d: CUDA: %s", __FILE__, line, cudaGetErrorString(status));
}
#define cudaCheck(call) check((call), __LINE__)

// Ranks that synchronise their streams.
typedef struct {
    MPI_Comm comm;
    int rank, size;
    cudaEvent_t events[MAX_PEERS][2]; // of every rank
    int turn;                         // which of the two events the next synchronisation uses
} PeerGroup;

static PeerGroup node;                              // ranks that map each other's parameters and gradients
static PeerGroup cp_group;                          // chunk-parallel ranks, if they belong to one node
static float *params[MAX_PEERS], *grads[MAX_PEERS]; // of every rank of the node, mapped
static cudaStream_t reduce_stream;                  // sums of gradients run here, beside stream 0
static cudaEvent_t reduced;                         // recorded after the last sum of a step

// ----------------------------------------------------------------------------
// mapping and synchronisation

// Maps every rank's allocation: all[p] becomes a pointer to that of rank p; all[rank] is the local pointer.
static void map_memory(const PeerGroup *g, void *local, void **all) {
    cudaIpcMemHandle_t handle, handles[MAX_PEERS];
    all[g->rank] = local;
    if (g->size == 1) return;
    cudaCheck(cudaIpcGetMemHandle(&handle, local));
    MPI_Allgather(&handle, sizeof handle, MPI_BYTE, handles, sizeof handle, MPI_BYTE, g->comm);
    for (int p = 0; p < g->size; p++) {
        if (p != g->rank) cudaCheck(cudaIpcOpenMemHandle(&all[p], handles[p], cudaIpcMemLazyEnablePeerAccess));
    }
}

// After this call the owner may free its allocation.
static void unmap_memory(const PeerGroup *g, void **all) {
    cudaCheck(cudaDeviceSynchronize());
    for (int p = 0; p < g->size; p++) {
        if (p != g->rank) cudaCheck(cudaIpcCloseMemHandle(all[p]));
    }
    MPI_Barrier(g->comm);
}

static void group_open(PeerGroup *g, MPI_Comm comm) {
    cudaIpcEventHandle_t handle, handles[MAX_PEERS];
    g->comm = comm, g->turn = 0;
    MPI_Comm_rank(comm, &g->rank);
    MPI_Comm_size(comm, &g->size);
    for (int turn = 0; turn < 2; turn++) {
        cudaEvent_t *local = &g->events[g->rank][turn];
        cudaCheck(cudaEventCreateWithFlags(local, cudaEventDisableTiming | (g->size > 1 ? cudaEventInterprocess : 0)));
        if (g->size == 1) continue;
        cudaCheck(cudaIpcGetEventHandle(&handle, *local));
        MPI_Allgather(&handle, sizeof handle, MPI_BYTE, handles, sizeof handle, MPI_BYTE, comm);
        for (int p = 0; p < g->size; p++) {
            if (p != g->rank) cudaCheck(cudaIpcOpenEventHandle(&g->events[p][turn], handles[p]));
        }
    }
}

static void group_close(PeerGroup *g) {
    for (int p = 0; p < g->size; p++) {
        cudaCheck(cudaEventDestroy(g->events[p][0]));
        cudaCheck(cudaEventDestroy(g->events[p][1]));
    }
    g->size = 0;
}

// Makes the stream wait until stream 0 of every rank has finished what it had queued before that rank called this
// function.
static void synchronize(PeerGroup *g, cudaStream_t stream) {
    cudaCheck(cudaEventRecord(g->events[g->rank][g->turn], 0));
    MPI_Barrier(g->comm);
    for (int p = 0; p < g->size; p++) cudaCheck(cudaStreamWaitEvent(stream, g->events[p][g->turn], 0));
    g->turn = 1 - g->turn;
}

int peers_can_map(MPI_Comm machine) {
    enum { TRIAL_BYTES = 1 << 21 };
    void *local = NULL, *mapped;
    int size, rank, good;
    megalodon_backend(); // selects this rank's device
    MPI_Comm_size(machine, &size);
    MPI_Comm_rank(machine, &rank);
    if (size == 1 || size > MAX_PEERS) return 0;
    cudaIpcMemHandle_t handle = {}, handles[MAX_PEERS];
    good = cudaMalloc(&local, TRIAL_BYTES) == cudaSuccess && cudaIpcGetMemHandle(&handle, local) == cudaSuccess;
    MPI_Allgather(&handle, sizeof handle, MPI_BYTE, handles, sizeof handle, MPI_BYTE, machine);
    MPI_Allreduce(MPI_IN_PLACE, &good, 1, MPI_INT, MPI_MIN, machine);
    for (int p = 0; p < size && good; p++) {
        if (p == rank) continue;
        good = cudaIpcOpenMemHandle(&mapped, handles[p], cudaIpcMemLazyEnablePeerAccess) == cudaSuccess;
        if (good) good = cudaIpcCloseMemHandle(mapped) == cudaSuccess;
    }
    MPI_Allreduce(MPI_IN_PLACE, &good, 1, MPI_INT, MPI_MIN, machine);
    cudaFree(local);
    cudaGetLastError(); // clear the sticky error
    return good;
}

void peers_open(MPI_Comm comm, Model *model) {
    cudaCheck(cudaStreamCreateWithFlags(&reduce_stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&reduced, cudaEventDisableTiming));
    group_open(&node, comm);
    map_memory(&node, megalodon_device_ptr(model, PARAMS), (void **)params);
    if (megalodon_device_ptr(model, GRADS)) map_memory(&node, megalodon_device_ptr(model, GRADS), (void **)grads);
}

// ----------------------------------------------------------------------------
// gradients

typedef struct {
    const float4 *at[MAX_PEERS];
} OtherGrads;

// Formula: sum[i] += others.at[0][i] + .. + others.at[n - 1][i].
// Mapping: a thread owns one float4, a thread block BLOCK consecutive ones.
// Memory: reads 16 (n + 1) bytes and writes 16 for each float4. A thread reads from all other ranks at once, so that
// all links are in use. Passes: one.
static __global__ void sum_kernel(float4 *sum, OtherGrads others, int n, size_t fours) {
    size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
    if (i >= fours) return;
    float4 s = sum[i];
    for (int p = 0; p < n; p++) {
        float4 x = others.at[p][i];
        s.x += x.x, s.y += x.y, s.z += x.z, s.w += x.w;
    }
    sum[i] = s;
}

void peers_reduce_grads(Shard shard) {
    const int n = node.size, rank = node.rank;
    const size_t fours = (shard.count + 3) / 4; // the buffers of gradients are padded to whole float4
    OtherGrads others;
    synchronize(&node, reduce_stream);
    if (n == 1 || fours == 0) return;
    for (int p = 1; p < n; p++) others.at[p - 1] = (const float4 *)(grads[(rank + p) % n] + shard.first);
    float4 *sum = (float4 *)(grads[rank] + shard.first);
    sum_kernel<<<(unsigned)((fours + BLOCK - 1) / BLOCK), BLOCK, 0, reduce_stream>>>(sum, others, n - 1, fours);
    cudaCheck(cudaGetLastError());
}

// Returns whether MPI takes pointers to device memory. MEGALODON_CUDA_AWARE in the environment overrides what MPI says.
static int cuda_aware(void) {
    const char *value = getenv("MEGALODON_CUDA_AWARE");
    if (value != NULL) return atoi(value);
#if defined(MPIX_CUDA_AWARE_SUPPORT) && MPIX_CUDA_AWARE_SUPPORT
    return MPIX_Query_cuda_support();
#else
    return 0;
#endif
}

float *peers_alloc(size_t n) {
    void *memory = NULL;
    const size_t bytes = n * sizeof(float);
    if ((cuda_aware() ? cudaMalloc(&memory, bytes) : cudaMallocHost(&memory, bytes)) != cudaSuccess)
        fatal("out of memory for messages of %zu bytes", bytes);
    return (float *)memory;
}

void peers_free(float *memory) { cudaCheck(cuda_aware() ? cudaFree(memory) : cudaFreeHost(memory)); }

void peers_read_grads(Model *model, Shard shard, float *dst) {
    const float *src = megalodon_device_ptr(model, GRADS) + shard.first;
    cudaCheck(cudaMemcpyAsync(dst, src, shard.count * sizeof *dst, cudaMemcpyDefault, reduce_stream));
    cudaCheck(cudaStreamSynchronize(reduce_stream));
}

void peers_write_grads(Model *model, Shard shard, const float *src) {
    float *dst = megalodon_device_ptr(model, GRADS) + shard.first;
    cudaCheck(cudaMemcpyAsync(dst, src, shard.count * sizeof *dst, cudaMemcpyDefault, reduce_stream));
    cudaCheck(cudaStreamSynchronize(reduce_stream));
}

// Formula: sum[0][i] += sum[1][i] + .. + sum[others][i]; sum is (1 + others, n).
// Mapping: a thread owns one column i, a thread block BLOCK consecutive ones.
// Memory: reads 4 (others + 1) bytes and writes 4 for each column.
// Passes: one.
static __global__ void add_kernel(float *sum, int others, size_t n) {
    size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
    if (i >= n) return;
    float s = sum[i];
    for (int f = 1; f <= others; f++) s += sum[(size_t)f * n + i];
    sum[i] = s;
}

int peers_add(float *sum, int others, size_t n) {
    if (!cuda_aware()) return 0;
    add_kernel<<<(unsigned)((n + BLOCK - 1) / BLOCK), BLOCK, 0, reduce_stream>>>(sum, others, n);
    cudaCheck(cudaGetLastError());
    return 1;
}

void peers_synchronize(void) { cudaCheck(cudaStreamSynchronize(0)); }

void peers_finish(void) {
    cudaCheck(cudaEventRecord(reduced, reduce_stream));
    cudaCheck(cudaStreamWaitEvent(0, reduced, 0));
}

// ----------------------------------------------------------------------------
// parameters. A rank updates its parameters only after the next step's synchronisations for gradients, and by then the
// others have copied the previous ones.

void peers_all_gather_params(Model *model, Shard *const *shards, int n) {
    synchronize(&node, 0);
    for (int i = 1; i < node.size; i++) {
        const int p = (node.rank + i) % node.size; // each rank starts with another one, so that all links are in use
        for (const Shard *s = shards[p]; s < shards[p] + n; s++)
            if (s->count > 0) megalodon_write(model, PARAMS, s->first, s->count, params[p] + s->first);
    }
}

// ----------------------------------------------------------------------------
// all-gather among chunk-parallel ranks. Each rank copies what it contributes to one of two slots of its window, which
// the others map and read. The slots alternate: when a rank writes to a slot again, the others have read its previous
// contents before the synchronisation in between.

static char *windows[MAX_PEERS]; // of every rank, mapped: two slots each
static size_t slot_bytes;        // capacity of a slot
static char *host;               // for MPI without CUDA support: the local contribution, then all of them
static size_t host_bytes;        // capacity of host

static void windows_close(void) {
    if (slot_bytes == 0) return;
    unmap_memory(&cp_group, (void **)windows);
    cudaCheck(cudaFree(windows[cp_group.rank]));
    slot_bytes = 0;
}

static void all_gather_by_mpi(MPI_Comm comm, const void *local, void *all, size_t bytes) {
    int n;
    if (cuda_aware()) {
        cudaCheck(cudaStreamSynchronize(0));
        MPI_Allgather(local, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, comm);
        return;
    }
    MPI_Comm_size(comm, &n);
    if (host_bytes < bytes * (size_t)(n + 1)) {
        cudaCheck(cudaFreeHost(host));
        host_bytes = bytes * (size_t)(n + 1);
        cudaCheck(cudaMallocHost((void **)&host, host_bytes));
    }
    cudaCheck(cudaMemcpy(host, local, bytes, cudaMemcpyDeviceToHost));
    MPI_Allgather(host, (int)bytes, MPI_BYTE, host + bytes, (int)bytes, MPI_BYTE, comm);
    cudaCheck(cudaMemcpy(all, host + bytes, bytes * (size_t)n, cudaMemcpyHostToDevice));
}

void peers_all_gather(MPI_Comm comm, int mapped, const void *local, void *all, size_t bytes) {
    if (!mapped) {
        all_gather_by_mpi(comm, local, all, bytes);
        return;
    }
    if (cp_group.size == 0) group_open(&cp_group, comm);
    if (slot_bytes < bytes) {
        void *window = NULL;
        windows_close();
        slot_bytes = (bytes + 255) / 256 * 256;
        cudaCheck(cudaMalloc(&window, 2 * slot_bytes));
        map_memory(&cp_group, window, (void **)windows);
    }
    const size_t slot = (size_t)cp_group.turn * slot_bytes;
    cudaCheck(cudaMemcpyAsync(windows[cp_group.rank] + slot, local, bytes, cudaMemcpyDeviceToDevice, 0));
    synchronize(&cp_group, 0);
    for (int p = 0; p < cp_group.size; p++)
        cudaCheck(cudaMemcpyAsync((char *)all + (size_t)p * bytes, windows[p] + slot, bytes, cudaMemcpyDefault, 0));
}

void peers_close(void) {
    windows_close();
    if (cp_group.size > 0) group_close(&cp_group);
    unmap_memory(&node, (void **)params);
    if (grads[node.rank] != NULL) unmap_memory(&node, (void **)grads);
    group_close(&node);
    cudaCheck(cudaEventDestroy(reduced));
    cudaCheck(cudaStreamDestroy(reduce_stream));
    cudaCheck(cudaFreeHost(host));
}
