// What many processes do together, for GPUs of one machine; see peers.h.
//
// A process exports what others shall read (cudaIpcGetMemHandle), they open it and have a pointer that kernels and copies
// use like one of their own, through NVLink or PCIe, or on the same GPU. No process writes into another's memory.
//
// Before reading, others must have written. They meet: each records an event behind what it has queued, a barrier of MPI
// says that all have, and each lets its stream wait for everyone's event. No host waits for a GPU, so GPUs have work
// queued while processes meet. Two events take turns: when one is recorded anew, everyone has passed the meeting in
// between, and so has called the wait for its last record.
#include <stdio.h>
#include <stdlib.h>

#include <cuda_runtime.h>

#define OMPI_SKIP_MPICXX // C++ functions of MPI, of which there is no need
extern "C" {
#include "peers.h"
#include "plumbing.h"
}
#ifdef OPEN_MPI
#include <mpi-ext.h> // defines: MPIX_CUDA_AWARE_SUPPORT, MPIX_Query_cuda_support
#endif

enum { BLOCK = 256 }; // threads

static void check(cudaError_t status, int line) {
    if (status != cudaSuccess) fatal("%s:%d: CUDA: %s", __FILE__, line, cudaGetErrorString(status));
}
#define cudaCheck(call) check((call), __LINE__)

typedef struct {
    MPI_Comm comm;
    int me, n;
    cudaEvent_t events[MOST_PEERS][2]; // everyone's
    int turn;                          // of the two, the next meeting's
} Circle;

static Circle near_ones, group;                       // group: of chunk parallelism
static float *params[MOST_PEERS], *grads[MOST_PEERS]; // of near_ones
static cudaStream_t aside;                            // sums go on there
static cudaEvent_t summed;

// ----------------------------------------------------------------------------
// opening, meeting

// Everyone's pointer to what each one shows; his own is his own.
static void open_memory(const Circle *c, void *mine, void **all) {
    cudaIpcMemHandle_t handle, handles[MOST_PEERS];
    all[c->me] = mine;
    if (c->n == 1) return;
    cudaCheck(cudaIpcGetMemHandle(&handle, mine));
    MPI_Allgather(&handle, sizeof handle, MPI_BYTE, handles, sizeof handle, MPI_BYTE, c->comm);
    for (int p = 0; p < c->n; p++) {
        if (p != c->me) cudaCheck(cudaIpcOpenMemHandle(&all[p], handles[p], cudaIpcMemLazyEnablePeerAccess));
    }
}

// Behind this the owner may free it.
static void close_memory(const Circle *c, void **all) {
    cudaCheck(cudaDeviceSynchronize());
    for (int p = 0; p < c->n; p++) {
        if (p != c->me) cudaCheck(cudaIpcCloseMemHandle(all[p]));
    }
    MPI_Barrier(c->comm);
}

static void circle_open(Circle *c, MPI_Comm comm) {
    cudaIpcEventHandle_t handle, handles[MOST_PEERS];
    c->comm = comm, c->turn = 0;
    MPI_Comm_rank(comm, &c->me);
    MPI_Comm_size(comm, &c->n);
    for (int turn = 0; turn < 2; turn++) {
        cudaEvent_t *mine = &c->events[c->me][turn];
        cudaCheck(cudaEventCreateWithFlags(mine, cudaEventDisableTiming | (c->n > 1 ? cudaEventInterprocess : 0)));
        if (c->n == 1) continue;
        cudaCheck(cudaIpcGetEventHandle(&handle, *mine));
        MPI_Allgather(&handle, sizeof handle, MPI_BYTE, handles, sizeof handle, MPI_BYTE, comm);
        for (int p = 0; p < c->n; p++) {
            if (p != c->me) cudaCheck(cudaIpcOpenEventHandle(&c->events[p][turn], handles[p]));
        }
    }
}

static void circle_close(Circle *c) {
    for (int p = 0; p < c->n; p++) {
        cudaCheck(cudaEventDestroy(c->events[p][0]));
        cudaCheck(cudaEventDestroy(c->events[p][1]));
    }
    c->n = 0;
}

// The stream goes on when stream 0 of everyone has come to where he calls this.
static void meet(Circle *c, cudaStream_t stream) {
    cudaCheck(cudaEventRecord(c->events[c->me][c->turn], 0));
    MPI_Barrier(c->comm);
    for (int p = 0; p < c->n; p++) cudaCheck(cudaStreamWaitEvent(stream, c->events[p][c->turn], 0));
    c->turn = 1 - c->turn;
}

int peers_reach(MPI_Comm machine) {
    enum { SOME = 1 << 21 }; // bytes
    void *mine = NULL, *theirs;
    int n, me, good;
    megalodon_backend(); // chooses this process's device
    MPI_Comm_size(machine, &n);
    MPI_Comm_rank(machine, &me);
    if (n == 1 || n > MOST_PEERS) return 0;
    cudaIpcMemHandle_t handle = {}, handles[MOST_PEERS];
    good = cudaMalloc(&mine, SOME) == cudaSuccess && cudaIpcGetMemHandle(&handle, mine) == cudaSuccess;
    MPI_Allgather(&handle, sizeof handle, MPI_BYTE, handles, sizeof handle, MPI_BYTE, machine);
    MPI_Allreduce(MPI_IN_PLACE, &good, 1, MPI_INT, MPI_MIN, machine);
    for (int p = 0; p < n && good; p++) {
        if (p == me) continue;
        good = cudaIpcOpenMemHandle(&theirs, handles[p], cudaIpcMemLazyEnablePeerAccess) == cudaSuccess;
        if (good) good = cudaIpcCloseMemHandle(theirs) == cudaSuccess;
    }
    MPI_Allreduce(MPI_IN_PLACE, &good, 1, MPI_INT, MPI_MIN, machine);
    cudaFree(mine);
    cudaGetLastError(); // forgotten: then it goes through the hosts
    return good;
}

void peers_open(MPI_Comm near, Model *model) {
    cudaCheck(cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&summed, cudaEventDisableTiming));
    circle_open(&near_ones, near);
    open_memory(&near_ones, megalodon_device_ptr(model, PARAMS), (void **)params);
    if (megalodon_device_ptr(model, GRADS)) open_memory(&near_ones, megalodon_device_ptr(model, GRADS), (void **)grads);
}

// ----------------------------------------------------------------------------
// gradients

typedef struct {
    const float4 *at[MOST_PEERS];
} Others;

// A thread has four numbers. Reads 16 bytes of each process, all others' over their links at once; writes 16.
static __global__ void sum_kernel(float4 *sum, Others others, int n, size_t fours) {
    size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
    if (i >= fours) return;
    float4 s = sum[i];
    for (int p = 0; p < n; p++) {
        float4 x = others.at[p][i];
        s.x += x.x, s.y += x.y, s.z += x.z, s.w += x.w;
    }
    sum[i] = s;
}

void peers_sum(Shard range) {
    const int n = near_ones.n, me = near_ones.me;
    const size_t fours = (range.count + 3) / 4; // at a block's end there is room for whole ones
    Others others;
    meet(&near_ones, aside);
    if (n == 1 || fours == 0) return;
    for (int p = 1; p < n; p++) others.at[p - 1] = (const float4 *)(grads[(me + p) % n] + range.first);
    float4 *sum = (float4 *)(grads[me] + range.first);
    sum_kernel<<<(unsigned)((fours + BLOCK - 1) / BLOCK), BLOCK, 0, aside>>>(sum, others, n - 1, fours);
    cudaCheck(cudaGetLastError());
}

// Does MPI take pointers to device memory? It may say so, or the environment does.
static int cuda_aware(void) {
    const char *said = getenv("MEGALODON_CUDA_AWARE");
    if (said != NULL) return atoi(said);
#if defined(MPIX_CUDA_AWARE_SUPPORT) && MPIX_CUDA_AWARE_SUPPORT
    return MPIX_Query_cuda_support();
#else
    return 0;
#endif
}

float *peers_memory(size_t n) {
    void *memory = NULL;
    const size_t bytes = n * sizeof(float);
    if ((cuda_aware() ? cudaMalloc(&memory, bytes) : cudaMallocHost(&memory, bytes)) != cudaSuccess)
        fatal("out of memory for messages of %zu bytes", bytes);
    return (float *)memory;
}

void peers_release(float *memory) { cudaCheck(cuda_aware() ? cudaFree(memory) : cudaFreeHost(memory)); }

void peers_read(Model *model, Shard r, float *dst) {
    const float *src = megalodon_device_ptr(model, GRADS) + r.first;
    cudaCheck(cudaMemcpyAsync(dst, src, r.count * sizeof *dst, cudaMemcpyDefault, aside));
    cudaCheck(cudaStreamSynchronize(aside));
}

void peers_write(Model *model, Shard r, const float *src) {
    float *dst = megalodon_device_ptr(model, GRADS) + r.first;
    cudaCheck(cudaMemcpyAsync(dst, src, r.count * sizeof *dst, cudaMemcpyDefault, aside));
    cudaCheck(cudaStreamSynchronize(aside));
}

// A thread has a number.
static __global__ void add_kernel(float *sum, int others, size_t n) {
    size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
    if (i >= n) return;
    float s = sum[i];
    for (int f = 1; f <= others; f++) s += sum[(size_t)f * n + i];
    sum[i] = s;
}

int peers_add(float *sum, int others, size_t n) {
    if (!cuda_aware()) return 0;
    add_kernel<<<(unsigned)((n + BLOCK - 1) / BLOCK), BLOCK, 0, aside>>>(sum, others, n);
    cudaCheck(cudaGetLastError());
    return 1;
}

void peers_wait(void) { cudaCheck(cudaStreamSynchronize(0)); }

void peers_finish(void) {
    cudaCheck(cudaEventRecord(summed, aside));
    cudaCheck(cudaStreamWaitEvent(0, summed, 0));
}

// ----------------------------------------------------------------------------
// parameters. Nobody overwrites his before others have copied them: an update comes behind the next step's meetings.

void peers_share(Model *model, Shard *const *of, int n) {
    meet(&near_ones, 0);
    for (int i = 1; i < near_ones.n; i++) {
        const int p = (near_ones.me + i) % near_ones.n; // everyone begins with another one
        for (const Shard *r = of[p]; r < of[p] + n; r++)
            if (r->count > 0) megalodon_write(model, PARAMS, r->first, r->count, params[p] + r->first);
    }
}

// ----------------------------------------------------------------------------
// states of pieces. Everyone shows what he gives in one of two slots that take turns: in the one that he writes into,
// others have read what stood there before they came to the meeting in between.

static char *windows[MOST_PEERS]; // everyone's two slots
static size_t room;               // bytes of a slot
static char *host;                // this one's and all, on the host
static size_t host_bytes;

static void windows_close(void) {
    if (room == 0) return;
    close_memory(&group, (void **)windows);
    cudaCheck(cudaFree(windows[group.me]));
    room = 0;
}

static void gather_by_mpi(MPI_Comm comm, const void *mine, void *all, size_t bytes) {
    int n;
    if (cuda_aware()) {
        cudaCheck(cudaStreamSynchronize(0));
        MPI_Allgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, comm);
        return;
    }
    MPI_Comm_size(comm, &n);
    if (host_bytes < bytes * (size_t)(n + 1)) {
        cudaCheck(cudaFreeHost(host));
        host_bytes = bytes * (size_t)(n + 1);
        cudaCheck(cudaMallocHost((void **)&host, host_bytes));
    }
    cudaCheck(cudaMemcpy(host, mine, bytes, cudaMemcpyDeviceToHost));
    MPI_Allgather(host, (int)bytes, MPI_BYTE, host + bytes, (int)bytes, MPI_BYTE, comm);
    cudaCheck(cudaMemcpy(all, host + bytes, bytes * (size_t)n, cudaMemcpyHostToDevice));
}

void peers_gather(MPI_Comm comm, int near, const void *mine, void *all, size_t bytes) {
    if (!near) {
        gather_by_mpi(comm, mine, all, bytes);
        return;
    }
    if (group.n == 0) circle_open(&group, comm);
    if (room < bytes) {
        void *window = NULL;
        windows_close();
        room = (bytes + 255) / 256 * 256;
        cudaCheck(cudaMalloc(&window, 2 * room));
        open_memory(&group, window, (void **)windows);
    }
    const size_t slot = (size_t)group.turn * room;
    cudaCheck(cudaMemcpyAsync(windows[group.me] + slot, mine, bytes, cudaMemcpyDeviceToDevice, 0));
    meet(&group, 0);
    for (int p = 0; p < group.n; p++)
        cudaCheck(cudaMemcpyAsync((char *)all + (size_t)p * bytes, windows[p] + slot, bytes, cudaMemcpyDefault, 0));
}

void peers_close(void) {
    windows_close();
    if (group.n > 0) circle_close(&group);
    close_memory(&near_ones, (void **)params);
    if (grads[near_ones.me] != NULL) close_memory(&near_ones, (void **)grads);
    circle_close(&near_ones);
    cudaCheck(cudaEventDestroy(summed));
    cudaCheck(cudaStreamDestroy(aside));
    cudaCheck(cudaFreeHost(host));
}
