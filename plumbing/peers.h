// Processes that each have a GPU, on one machine: they read each other's device memory, which CUDA lets them open, and
// meet by MPI. For plumbing/ranks.c where it is linked with megalodon.cu. Unless something else is said, all processes
// of the communicator call a function at the same point.
#pragma once
#include <mpi.h> // defines: MPI_Comm
#include "../megalodon.h"

enum { MOST_PEERS = 16 };

// Do these processes reach each other's memory? The same answer to all.
int peers_reach(MPI_Comm machine);

// near: processes that do, or this one alone. They open each other's parameters and gradients until peers_close.
void peers_open(MPI_Comm near, Model *model);
void peers_close(void);

// Adds to this process's gradients in `range`, which is no other's, those of the others. It is done beside what stream 0
// does from now on, in the order of calls; reading and writing wait for it, and after peers_finish stream 0 does.
void peers_sum(Shard range);
void peers_read(Model *model, Shard range, float *dst); // gradients, to and from messages; all below are one's own
void peers_write(Model *model, Shard range, const float *src);
void peers_finish(void);
// Memory for messages of n numbers: the device's where MPI reads and writes that (a CUDA-aware one), else the host's.
float *peers_memory(size_t n);
void peers_release(float *memory);
int peers_add(float *sum, int others, size_t n); // there, adds to n numbers those behind; 0: memory is the host's
void peers_wait(void);                           // until stream 0 is done

// Parameters: takes from process p of `near` its n ranges of[p]. In the order of stream 0.
void peers_share(Model *model, Shard *const *of, int n);

// For ChunkParallel: what the processes of `group` give. near: they reach each other, otherwise through MPI.
void peers_gather(MPI_Comm group, int near, const void *mine, void *all, size_t bytes);
