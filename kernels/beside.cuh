/*
beside.cuh: two branches in a recorded step (graph.cuh), whose kernels run at the same time.

The idea: a kernel of a small model uses a part of the GPU, and many kernels do not need each other's results. v does
not need CEMA, and neither r nor the product with Wh1 needs attention. Only the optimizer waits for the gradients of
parameters. So some calls go into a second branch, until JOIN() makes the first one wait for it:

    xt ---+---> CEMA ---> norm ---> z ---> q, k ---+---> attention ---> ...       stream 0
           \                                      /
            +---> v = silu(xt Wv') ------------- JOIN                             beside: BESIDE(call)

    dy ---+---> dx = dy W ---> norm backward --+---> ... ---> JOIN                stream 0
           \                                    \           /
            +---> dW += dy' x, sums ------------ +--> sum of parts                beside: weights, sums of parts

Both branches share scratch buffers. So there is a JOIN() before a buffer is overwritten that the second branch reads.
The second branch has memory of its own: for cuBLAS's workspace, and for parts of sums, since workspace() belongs to the
function that runs next. In the emulator the second branch runs as late as it may, so a missing JOIN() fails a test.
A kernel that reads what the same call has computed must be launched in gpu.stream, too: products, silu_forward(),
qk_layer_forward(), sums of parts. Where no step is recorded, all is in stream 0.
*/
#pragma once

enum { PARTS_MEMORY = 1 << 25 }; // bytes

static struct {
    cudaStream_t stream;
    cudaEvent_t fork, join;
    void *blas_workspace; // BLAS_WORKSPACE bytes
    char *parts;          // PARTS_MEMORY bytes, of which `used` hold parts that have not been summed
    size_t used;
    int depth;  // of beside_begin()
    int forked; // work has begun that stream 0 has not waited for
} beside;

// Before a step is recorded. Returns whether there is memory for a second branch; it is allocated the first time.
static int beside_open(void) {
    if (beside.parts != NULL) return 1;
    char *memory = (char *)memory_new(BLAS_WORKSPACE + PARTS_MEMORY);
    if (memory == NULL) return 0;
    beside.blas_workspace = memory, beside.parts = memory + BLAS_WORKSPACE;
    cudaCheck(cudaStreamCreateWithFlags(&beside.stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&beside.fork, cudaEventDisableTiming));
    cudaCheck(cudaEventCreateWithFlags(&beside.join, cudaEventDisableTiming));
    return 1;
}

static void beside_swap(void) {
    void *workspace = gpu.blas_workspace;
    gpu.blas_workspace = beside.blas_workspace, beside.blas_workspace = workspace;
}

static void beside_fork(void) {
    cudaCheck(cudaEventRecord(beside.fork, cudaStreamPerThread));
    cudaCheck(cudaStreamWaitEvent(beside.stream, beside.fork, 0));
    beside.forked = 1;
}

// What is launched in gpu.stream until beside_end() needs what has been launched before, and nothing needs it before
// beside_join(). Calls may be nested.
static void beside_begin(void) {
    if (!branching || beside.depth++ > 0) return;
    beside_fork();
    gpu.stream = beside.stream;
    beside_swap();
}

static void beside_end(void) {
    if (!branching || --beside.depth > 0) return;
    gpu.stream = cudaStreamPerThread;
    beside_swap();
}

static void beside_join(void) {
    beside.used = 0;
    if (!beside.forked) return;
    cudaCheck(cudaEventRecord(beside.join, beside.stream));
    cudaCheck(cudaStreamWaitEvent(cudaStreamPerThread, beside.join, 0));
    beside.forked = 0;
}

// Memory for parts of sums that sum_parts_fast() will add; `otherwise` where there are no branches.
static float *parts_memory(size_t bytes, void *otherwise) {
    if (!branching || bytes > PARTS_MEMORY) return (float *)otherwise;
    if (beside.used + bytes > PARTS_MEMORY) {
        beside_join();
        if (beside.depth > 0) beside_fork();
    }
    char *parts = beside.parts + beside.used;
    beside.used += (bytes + 255) / 256 * 256;
    return (float *)(void *)parts;
}
static bool in_parts_memory(const float *parts) {
    return (const char *)parts >= beside.parts && (const char *)parts < beside.parts + PARTS_MEMORY;
}
