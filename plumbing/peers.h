// Communication between GPUs of one machine that map each other's memory (CUDA IPC), for plumbing/ranks.c where it is
// linked with megalodon.cu. A node is a set of such ranks. Unless a comment says otherwise, all ranks of the
// communicator must call a function at the same point.
#pragma once
#include <mpi.h> // defines: MPI_Comm
#include "../megalodon.h"

enum { MAX_PEERS = 16 }; // ranks of a node

// Returns whether all ranks of this machine can map each other's device memory: 1 or 0, the same in all of them.
int peers_can_map(MPI_Comm machine);

// Maps the parameters and gradients of all ranks of the node, until peers_close. `node` may hold this rank alone.
void peers_open(MPI_Comm node, Model *model);
void peers_close(void);

// Adds the other ranks' gradients of `shard` to this rank's. Every rank must pass another shard. Runs on a stream of
// its own, beside what stream 0 does from now on and in the order of calls; peers_finish makes stream 0 wait for it.
void peers_reduce_grads(Shard shard);
void peers_finish(void);
// All-gather of parameters: copies from each rank p of the node its n shards shards[p]. In the order of stream 0.
void peers_all_gather_params(Model *model, Shard *const *shards, int n);

// For messages between nodes; each rank may call these on its own.
// Allocates n floats for messages: in the device's memory if MPI is CUDA-aware, otherwise in pinned host memory.
float *peers_alloc(size_t n);
void peers_free(float *memory);
// Copy gradients to and from such memory, in the order of peers_reduce_grads.
void peers_read_grads(Model *model, Shard shard, float *dst);
void peers_write_grads(Model *model, Shard shard, const float *src);
// Adds rows 1 .. others of sum (1 + others, n) to row 0 on the device. Returns 0, having done nothing, if the memory is
// the host's.
int peers_add(float *sum, int others, size_t n);
void peers_synchronize(void); // waits until stream 0 has finished

// ranks_all_gather for the chunk-parallel ranks `group`. mapped: all of them belong to one node, so that they copy from
// each other's memory; otherwise messages go through MPI.
void peers_all_gather(MPI_Comm group, int mapped, const void *local, void *all, size_t bytes);
