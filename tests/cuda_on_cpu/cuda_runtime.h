/*
cuda_runtime.h: enough of CUDA to run megalodon.cu on a CPU, where there is no GPU to test it on. translate.awk turns
the source into C++ that includes this folder's headers in place of CUDA's; see there.

- A launch runs its blocks one after another, with -fopenmp on several cores.
- A block's threads are fibers on one core, each with its own stack. A fiber runs until it has to wait for others: at
  __syncthreads, __syncwarp and shuffles. If all threads wait, the program ends with a message.
- Device memory and dynamic shared memory are full of bytes 0xff at first: floats that have not been written are NaN.
  AddressSanitizer sees overruns, since both are exactly as large as asked for.
- A CPU reads whatever it can reach. What a GPU cannot read is found for pointers that are arguments of a kernel.

With CUDA_ON_CPU_SHARED=1 in the environment other processes can open device memory, as cudaIpcOpenMemHandle does.
AddressSanitizer then sees no overruns of it.

The device is one of compute capability 9.0. Environment variables make it another one: CUDA_ON_CPU_CAPABILITY=86 is 8.6,
CUDA_ON_CPU_OPTIN=101376 are the bytes of shared memory of a thread block (if not given, those of that capability), and
with CUDA_ON_CPU_NO_CODE=1 the program has no code for it. What a kernel has declared with __shared__ is known once it has run.

Left out: streams and events (all calls wait), atomics, masks of some lanes, a look-out for races between two barriers. With
CUDA_ON_CPU_REVERSE=1 in the environment threads take turns the other way round, which makes some races visible.
*/
#ifndef CUDA_ON_CPU_RUNTIME_H
#define CUDA_ON_CPU_RUNTIME_H

#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cxxabi.h>

#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined __SANITIZE_ADDRESS__
#define EMU_ASAN
#elif defined __has_feature
#if __has_feature(address_sanitizer)
#define EMU_ASAN
#endif
#endif
#ifdef EMU_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#define EMU_UCONTEXT
#endif
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif

// ----------------------------------------------------------------------------
// the language

#define __global__
#define __device__
#define __noinline__ __attribute__((noinline))
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
inline int2 make_int2(int x, int y) { return int2{x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return uint2{x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return int4{x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }
inline float2 make_float2(float x, float y) { return float2{x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }
inline double2 make_double2(double x, double y) { return double2{x, y}; }

inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __logf(float x) { return logf(x); }
inline float __uint_as_float(unsigned x) {
    float f;
    memcpy(&f, &x, sizeof f);
    return f;
}
inline int __ffs(int x) { return __builtin_ffs(x); } // number of the lowest bit, from 1; 0: none
template <typename T> inline T __ldcs(const T *x) { return *x; }
inline double rsqrt(double x) { return 1 / sqrt(x); }

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
enum { warpSize = 32 };

// ----------------------------------------------------------------------------
// fibers

enum { EMU_STACK = 256 << 10, EMU_GUARD = 4096, EMU_THREADS = 1024, EMU_WARPS = EMU_THREADS / warpSize };

struct EmuFiber {
    void *sp;          // where it stopped
    char *stack;       // lowest address
    size_t stack_size; // bytes
    void *fake_stack;  // AddressSanitizer's
    uint3 thread;
    int warp, lane;
#ifdef EMU_UCONTEXT
    ucontext_t context;
#endif
};

// Fibers that wait for each other. `live` of them have not returned.
struct EmuBarrier {
    int live, arrived;
    unsigned turn; // how often they have met
    EmuFiber *waiting[EMU_THREADS];
};

struct EmuTiles {              // of a matrix product
    float a[16][16], b[8][16]; // rows, columns
};

struct EmuWarp {
    EmuBarrier barrier;
    struct {
        unsigned turn; // at which it was written, + 1
        uint64_t bits;
    } slots[2][warpSize]; // of this shuffle and the one before, whose readers may be late
    EmuTiles tiles[2];    // in the same way
};

// All that a core needs to run a block.
struct EmuWorker {
    EmuFiber main, fibers[EMU_THREADS], *current, *ready[EMU_THREADS];
    int num_fibers, num_ready, reverse;
    EmuBarrier block;
    struct {
        unsigned turn; // at which it was begun, + 1
        int any;
    } votes[2]; // of this __syncthreads_or and the one before, whose readers may be late
    EmuWarp warps[EMU_WARPS];
    void (*run)(const void *arguments);
    const void *arguments;
    char *shared;             // the block's dynamic shared memory
    const void *declared[16]; // arrays declared with __shared__, that this launch has reached
    int num_declared;
    size_t declared_bytes;
    const char *kernel;
    int line;
};

inline thread_local EmuWorker *emu_worker;

[[noreturn]] inline void emu_fatal(const char *what) {
    const EmuWorker *w = emu_worker;
    fflush(stdout);
    fprintf(stderr, "error: CUDA on the CPU: %s", what);
    if (w && w->kernel) {
        fprintf(stderr, ": %s, launched in line %d, block (%u,%u,%u)", w->kernel, w->line, blockIdx.x, blockIdx.y,
                blockIdx.z);
    }
    fprintf(stderr, "\n");
    abort();
}

#ifndef EMU_UCONTEXT
// Keeps on the stack what a function must leave as it was, and its address in *save; goes on from another stack.
#ifdef __clang__
__attribute__((naked, noinline))
#else
__attribute__((naked, noinline, noipa)) // noipa: callers may assume nothing about registers
#endif
static void
emu_switch_stacks(void **, void *) {
    asm volatile("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
                 "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
                 "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}
#endif

inline void emu_switch(EmuFiber *from, EmuFiber *to) {
    emu_worker->current = to;
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_size);
#endif
#ifdef EMU_UCONTEXT
    swapcontext(&from->context, &to->context);
#else
    emu_switch_stacks(&from->sp, to->sp);
#endif
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(from->fake_stack, NULL, NULL);
#endif
    threadIdx = from->thread;
}

// Somebody else's turn, the last one's that became ready: its stack is still in the cache.
inline void emu_switch_to_next(void) {
    EmuWorker *w = emu_worker;
    if (w->num_ready == 0) {
        char text[200];
        snprintf(text, sizeof text, "deadlock: of %d threads %d wait in __syncthreads, the others for their warps",
                 w->block.live, w->block.arrived);
        emu_fatal(text);
    }
    emu_switch(w->current, w->ready[--w->num_ready]);
}

inline void emu_make_ready(EmuFiber *const *fibers, int n) {
    EmuWorker *w = emu_worker;
    for (int i = 0; i < n; i++) w->ready[w->num_ready++] = fibers[w->reverse ? i : n - 1 - i];
}

inline void emu_release(EmuBarrier *barrier) {
    emu_make_ready(barrier->waiting, barrier->arrived);
    barrier->arrived = 0;
    barrier->turn++;
}

// Returns when all live fibers of the barrier have come. The last one just goes on.
inline void emu_wait(EmuBarrier *barrier) {
    if (barrier->arrived + 1 == barrier->live) return emu_release(barrier);
    barrier->waiting[barrier->arrived++] = emu_worker->current;
    emu_switch_to_next();
}

// One fewer to wait for.
inline void emu_leave(EmuBarrier *barrier) {
    if (barrier->arrived == --barrier->live) emu_release(barrier);
}

// A fiber's life: a thread of every block.
inline void emu_fiber_main(void) {
#ifdef EMU_ASAN
    __sanitizer_finish_switch_fiber(NULL, NULL, NULL);
#endif
    EmuWorker *w = emu_worker;
    EmuFiber *self = w->current;
    for (;;) {
        threadIdx = self->thread;
        w->run(w->arguments);
        emu_leave(&w->warps[self->warp].barrier);
        emu_leave(&w->block);
        if (w->block.live == 0) {
            emu_switch(self, &w->main);
        } else {
            emu_switch_to_next();
        }
    }
}

// Guard pages between stacks make an overflow a segmentation fault.
inline void emu_fiber_new(EmuFiber *f, int number) {
    void *memory =
        mmap(NULL, EMU_GUARD + EMU_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, EMU_GUARD, PROT_NONE) != 0) emu_fatal("no memory for stacks");
    f->stack = (char *)memory + EMU_GUARD;
    f->stack_size = EMU_STACK - (size_t)(number % 64) * 192; // tops in different cache sets
    f->stack_size -= f->stack_size % 64;
    f->warp = number / warpSize, f->lane = number % warpSize;
#ifdef EMU_UCONTEXT
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = f->stack_size;
    makecontext(&f->context, emu_fiber_main, 0);
#else
    void **top = (void **)(void *)(f->stack + f->stack_size); // 6 registers, where to begin, no return address
    top[-2] = (void *)emu_fiber_main;
    f->sp = top - 8;
#endif
}

// A core's worker lives as long as the program.
inline EmuWorker *emu_worker_here(void) {
    if (emu_worker) return emu_worker;
    emu_worker = (EmuWorker *)calloc(1, sizeof *emu_worker);
    if (emu_worker == NULL) emu_fatal("out of memory");
    const char *reverse = getenv("CUDA_ON_CPU_REVERSE");
    emu_worker->reverse = reverse && atoi(reverse);
#ifdef EMU_ASAN
    pthread_attr_t attributes; // where the core's own stack lies
    void *stack;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &emu_worker->main.stack_size);
    emu_worker->main.stack = (char *)stack;
    pthread_attr_destroy(&attributes);
#endif
    return emu_worker;
}

inline void emu_run_block(EmuWorker *w) {
    int n = (int)(blockDim.x * blockDim.y * blockDim.z);
    EmuFiber *all[EMU_THREADS];
    while (w->num_fibers < n) {
        emu_fiber_new(&w->fibers[w->num_fibers], w->num_fibers);
        w->num_fibers++;
    }
    for (int i = 0; i < n; i++) {
        unsigned u = (unsigned)i;
        w->fibers[i].thread = uint3{u % blockDim.x, u / blockDim.x % blockDim.y, u / (blockDim.x * blockDim.y)};
        all[i] = &w->fibers[i];
    }
    w->block.live = n, w->block.arrived = 0;
    for (int i = 0; i * warpSize < n; i++) {
        EmuWarp *warp = &w->warps[i];
        warp->barrier.live = n - i * warpSize < warpSize ? n - i * warpSize : (int)warpSize;
        warp->barrier.arrived = 0;
    }
    emu_make_ready(all, n);
    emu_switch(&w->main, w->ready[--w->num_ready]);
}

// ----------------------------------------------------------------------------
// barriers and shuffles

inline void *emu_shared(void) { return emu_worker->shared; }

// Behind every declaration of shared memory: counts it once a launch.
inline void emu_declared(const void *array, size_t bytes) {
    EmuWorker *w = emu_worker;
    for (int i = 0; i < w->num_declared; i++) {
        if (w->declared[i] == array) return;
    }
    if (w->num_declared == sizeof w->declared / sizeof *w->declared) emu_fatal("too many arrays in shared memory");
    w->declared[w->num_declared++] = array;
    w->declared_bytes += bytes;
}

inline void __syncthreads(void) { emu_wait(&emu_worker->block); }
// Whether any thread of the block passes something other than 0.
inline int __syncthreads_or(int x) {
    EmuWorker *w = emu_worker;
    unsigned turn = w->block.turn;
    auto *vote = &w->votes[turn % 2];
    if (vote->turn != turn + 1) vote->turn = turn + 1, vote->any = 0;
    vote->any |= x != 0;
    emu_wait(&w->block);
    return vote->any;
}

inline EmuWarp *emu_whole_warp(unsigned mask) {
    if (mask != ~0u) emu_fatal("only masks of all lanes can be emulated");
    return &emu_worker->warps[emu_worker->current->warp];
}
inline void __syncwarp(unsigned mask = ~0u) { emu_wait(&emu_whole_warp(mask)->barrier); }

// Lane `from`'s x; bytes 0xff if it has returned.
template <typename T> inline T emu_shuffle(unsigned mask, T x, int from) {
    static_assert(std::is_arithmetic<T>::value && sizeof(T) <= 8, "only numbers can be shuffled");
    EmuWarp *warp = emu_whole_warp(mask);
    unsigned turn = warp->barrier.turn;
    auto *slots = warp->slots[turn % 2];
    int lane = emu_worker->current->lane;
    slots[lane].turn = turn + 1;
    memcpy(&slots[lane].bits, &x, sizeof x);
    emu_wait(&warp->barrier);
    memset(&x, 0xff, sizeof x);
    if (slots[from].turn == turn + 1) memcpy(&x, &slots[from].bits, sizeof x);
    return x;
}
inline int emu_lane(void) { return emu_worker->current->lane; }
template <typename T> inline T __shfl_sync(unsigned mask, T x, int lane) { return emu_shuffle(mask, x, lane & 31); }
template <typename T> inline T __shfl_xor_sync(unsigned mask, T x, int bits) {
    return emu_shuffle(mask, x, (emu_lane() ^ bits) & 31);
}
template <typename T> inline T __shfl_up_sync(unsigned mask, T x, unsigned step) {
    int from = emu_lane() - (int)step;
    return emu_shuffle(mask, x, from >= 0 ? from : emu_lane());
}
template <typename T> inline T __shfl_down_sync(unsigned mask, T x, unsigned step) {
    int from = emu_lane() + (int)step;
    return emu_shuffle(mask, x, from < warpSize ? from : emu_lane());
}

// A bit for each lane whose predicate is not 0.
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned bits = 0;
    EmuWarp *warp = emu_whole_warp(mask);
    unsigned turn = warp->barrier.turn;
    auto *slots = warp->slots[turn % 2];
    slots[emu_lane()].turn = turn + 1;
    slots[emu_lane()].bits = predicate != 0;
    emu_wait(&warp->barrier);
    for (int lane = 0; lane < warpSize; lane++) {
        if (slots[lane].turn == turn + 1 && slots[lane].bits) bits |= 1u << lane;
    }
    return bits;
}

typedef float EmuFloats __attribute__((vector_size(16)));
typedef double EmuDoubles __attribute__((vector_size(32)));

// mma.m16n8k16 of bfloat16: C (16,8) += A (16,16) B (16,8), of which a lane has the numbers that the PTX manual says. In
// double, rounded once; a tensor core keeps fewer bits.
inline void emu_mma(float &c0, float &c1, float &c2, float &c3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                    uint32_t b0, uint32_t b1) {
    EmuWarp *warp = emu_whole_warp(~0u);
    EmuTiles *tiles = &warp->tiles[warp->barrier.turn % 2];
    const int row = emu_lane() / 4, column = emu_lane() % 4 * 2;
    auto put = [](float *two, uint32_t word) {
        const uint32_t bits[2] = {word << 16, word & 0xffff0000};
        memcpy(two, bits, sizeof bits);
    };
    put(&tiles->a[row][column], a0), put(&tiles->a[row + 8][column], a1);
    put(&tiles->a[row][column + 8], a2), put(&tiles->a[row + 8][column + 8], a3);
    put(&tiles->b[row][column], b0), put(&tiles->b[row][column + 8], b1);
    emu_wait(&warp->barrier);
    float *c[4] = {&c0, &c1, &c2, &c3};
    for (int i = 0; i < 4; i++) {
        const float *x = tiles->a[row + i / 2 * 8], *y = tiles->b[column + i % 2];
        EmuDoubles sums = {*c[i], 0, 0, 0};
        for (int k = 0; k < 16; k += 4) {
            EmuFloats four[2];
            memcpy(&four[0], x + k, sizeof *four), memcpy(&four[1], y + k, sizeof *four);
            sums += __builtin_convertvector(four[0], EmuDoubles) * __builtin_convertvector(four[1], EmuDoubles);
        }
        *c[i] = (float)(sums[0] + sums[1] + (sums[2] + sums[3]));
    }
}

// ----------------------------------------------------------------------------
// errors

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
typedef struct CUstream_st *cudaStream_t;

inline cudaError_t emu_error;
inline cudaError_t cudaGetLastError(void) {
    cudaError_t error = emu_error;
    emu_error = cudaSuccess;
    return error;
}
inline const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess                         ? "no error"
           : error == cudaErrorMemoryAllocation         ? "out of memory"
           : error == cudaErrorInvalidConfiguration     ? "invalid configuration argument"
           : error == cudaErrorNoKernelImageForDevice   ? "no kernel image is available for execution on the device"
           : error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
                                                        : "invalid argument";
}
// As CUDA does, says it at once and keeps it for cudaGetLastError; the message is ours.
inline cudaError_t emu_fail(cudaError_t error, const char *what) {
    fprintf(stderr, "CUDA on the CPU: %s\n", what);
    return emu_error = error;
}

// ----------------------------------------------------------------------------
// graphs: while stream 0 is captured, launches, products and memsets are kept as calls for later. Another stream that
// waits for an event of stream 0 is captured, too. Its calls are kept as late as they may run: where stream 0 waits for
// it. So if stream 0 overwrites before that what they read, results are wrong. What cannot be captured fails.

typedef std::vector<std::function<void()>> EmuCalls;
typedef EmuCalls *cudaGraph_t, *cudaGraphExec_t;
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal };
#define cudaStreamPerThread ((cudaStream_t)2)
inline cudaGraph_t emu_recording;
inline EmuCalls emu_beside; // calls of the other stream
inline bool emu_forked;     // the other stream is captured
inline size_t emu_graphs;   // that exist

inline bool emu_stream0(cudaStream_t stream) { return stream == NULL || stream == cudaStreamPerThread; }
inline bool emu_records(cudaStream_t stream, const std::function<void()> &call) { // whether the call is kept for later
    if (!emu_recording || (!emu_stream0(stream) && !emu_forked)) return false;
    (emu_stream0(stream) ? *emu_recording : emu_beside).push_back(call);
    return true;
}
inline bool emu_not_while_recording(const char *what) {
    if (emu_recording) emu_fail(cudaErrorStreamCaptureUnsupported, what);
    return emu_recording == NULL;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (emu_recording || stream != cudaStreamPerThread)
        return emu_fail(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture");
    emu_recording = new EmuCalls;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
    if (!emu_recording || emu_forked) return emu_fail(cudaErrorInvalidValue, "cudaStreamEndCapture");
    *graph = emu_recording, emu_recording = NULL;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long) {
    *made = new EmuCalls(*graph);
    emu_graphs++;
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete graph;
    emu_graphs--;
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    for (const std::function<void()> &call : *graph) call();
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// memory

// What is allocated: begin -> bytes.
const size_t EMU_MEMORY = (size_t)4 << 30;
inline std::map<const char *, size_t> emu_memory;
inline size_t emu_used;

// Whether all `bytes` bytes, or if 0 the first, are device memory.
inline bool emu_on_device(const void *pointer, size_t bytes) {
    const char *p = (const char *)pointer;
    auto block = emu_memory.upper_bound(p);
    if (block == emu_memory.begin()) return false;
    --block;
    size_t at = (size_t)(p - block->first);
    return at <= block->second && bytes <= block->second - at;
}

// Launches, products and copies are checked, but nothing is computed and device memory stays empty: so large models
// take no memory. For tests, which set it.
inline bool emu_dry;

inline std::map<const void *, int> emu_files; // begin -> the file that it is, if it can be shared; -1: emu_dry's

inline void *emu_shared_memory(size_t bytes) {
    int file = memfd_create("device memory", 0);
    if (file < 0 || ftruncate(file, (off_t)bytes) != 0) return NULL;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return NULL;
    emu_files[memory] = file;
    return memory;
}
template <typename T> inline cudaError_t cudaMalloc(T **pointer, size_t bytes) {
    void *memory = NULL;
    if (!emu_not_while_recording("cudaMalloc")) return emu_error;
    if (emu_dry) {
        memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return emu_error = cudaErrorMemoryAllocation;
        emu_files[memory] = -1, emu_memory[(char *)memory] = bytes;
        *pointer = (T *)memory;
        return cudaSuccess;
    }
    if (bytes <= EMU_MEMORY - emu_used && getenv("CUDA_ON_CPU_SHARED") != NULL)
        memory = emu_shared_memory(bytes);
    else if (bytes <= EMU_MEMORY - emu_used && posix_memalign(&memory, 256, bytes) != 0)
        memory = NULL;
    if (memory == NULL) return emu_error = cudaErrorMemoryAllocation;
    memset(memory, 0xff, bytes);
    emu_memory[(char *)memory] = bytes;
    emu_used += bytes;
    *pointer = (T *)memory;
    return cudaSuccess;
}
inline cudaError_t cudaFree(void *pointer) {
    if (pointer == NULL) return cudaSuccess;
    if (!emu_not_while_recording("cudaFree")) return emu_error;
    auto block = emu_memory.find((char *)pointer);
    if (block == emu_memory.end()) return emu_fail(cudaErrorInvalidValue, "cudaFree: not from cudaMalloc");
    auto file = emu_files.find(pointer);
    if (file == emu_files.end()) {
        free(pointer);
    } else {
        munmap(pointer, block->second);
        if (file->second >= 0) close(file->second);
    }
    if (file == emu_files.end() || file->second >= 0) emu_used -= block->second;
    if (file != emu_files.end()) emu_files.erase(file);
    emu_memory.erase(block);
    return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void **pointer, size_t bytes) {
    *pointer = malloc(bytes);
    return *pointer != NULL ? cudaSuccess : emu_error = cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFreeHost(void *pointer) {
    free(pointer);
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *unused = EMU_MEMORY - emu_used, *total = EMU_MEMORY;
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind) {
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (bytes == 0) return cudaSuccess;
    if (!emu_not_while_recording("cudaMemcpy")) return emu_error;
    if (kind != cudaMemcpyDefault &&
        (emu_on_device(dst, bytes) != to_device || emu_on_device(src, bytes) != from_device))
        return emu_fail(cudaErrorInvalidValue, "cudaMemcpy: not the memory that `kind` says");
    if (!emu_dry) memmove(dst, src, bytes);
    if (emu_dry && kind == cudaMemcpyDeviceToHost) memset(dst, 0, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void *dst, int byte, size_t bytes) {
    if (bytes > 0 && !emu_on_device(dst, bytes))
        return emu_fail(cudaErrorInvalidValue, "cudaMemset: not device memory");
    if (emu_records(NULL, [=] { cudaMemset(dst, byte, bytes); })) return cudaSuccess;
    if (!emu_dry) memset(dst, byte, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = 0) {
    if (emu_records(stream, [=] { cudaMemcpy(dst, src, bytes, kind); })) return cudaSuccess;
    return cudaMemcpy(dst, src, bytes, kind);
}
template <typename T>
inline cudaError_t cudaMemcpyToSymbolAsync(T &symbol, const void *src, size_t bytes, size_t offset, cudaMemcpyKind,
                                           cudaStream_t = 0) {
    if (!emu_not_while_recording("cudaMemcpyToSymbolAsync")) return emu_error;
    if (offset + bytes > sizeof symbol) return emu_fail(cudaErrorInvalidValue, "cudaMemcpyToSymbolAsync: too much");
    memcpy((char *)&symbol + offset, src, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *dst, int byte, size_t bytes, cudaStream_t = 0) {
    return cudaMemset(dst, byte, bytes);
}

// ----------------------------------------------------------------------------
// other processes' memory: a handle says which file of which process it is

struct cudaIpcMemHandle_t {
    int process, file;
    size_t bytes;
};
enum { cudaIpcMemLazyEnablePeerAccess = 1 };
inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *pointer) {
    auto file = emu_files.find(pointer);
    if (file == emu_files.end()) return emu_error = cudaErrorInvalidValue;
    *handle = cudaIpcMemHandle_t{(int)getpid(), file->second, emu_memory[(char *)pointer]};
    return cudaSuccess;
}
inline cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t handle, unsigned) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.process, handle.file);
    int file = open(path, O_RDWR);
    void *memory = file < 0 ? MAP_FAILED : mmap(NULL, handle.bytes, PROT_READ, MAP_SHARED, file, 0);
    if (file >= 0) close(file);
    if (memory == MAP_FAILED) return emu_fail(cudaErrorInvalidValue, "cudaIpcOpenMemHandle: no such memory");
    emu_memory[(char *)memory] = handle.bytes;
    *pointer = memory;
    return cudaSuccess;
}
inline cudaError_t cudaIpcCloseMemHandle(void *pointer) {
    auto block = emu_memory.find((char *)pointer);
    if (block == emu_memory.end()) return emu_fail(cudaErrorInvalidValue, "cudaIpcCloseMemHandle: not opened");
    munmap(pointer, block->second);
    emu_memory.erase(block);
    return cudaSuccess;
}

typedef int cudaEvent_t;
typedef int cudaIpcEventHandle_t;
enum { cudaEventDisableTiming = 2, cudaEventInterprocess = 4, cudaStreamNonBlocking = 1 };
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *, cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *, cudaIpcEventHandle_t) { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = (cudaStream_t)3;
    return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned) {
    if (!emu_recording) return cudaSuccess;
    if (emu_stream0(stream)) {
        emu_recording->insert(emu_recording->end(), emu_beside.begin(), emu_beside.end());
        emu_beside.clear();
    }
    emu_forked = !emu_stream0(stream);
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }

// ----------------------------------------------------------------------------
// the device

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t totalGlobalMem, sharedMemPerBlockOptin;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
    int maxDynamicSharedSizeBytes;
};
const size_t EMU_SHARED = 48 << 10; // bytes that a kernel may have without cudaFuncSetAttribute

inline long emu_setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}
inline int emu_capability(void) { return (int)emu_setting("CUDA_ON_CPU_CAPABILITY", 90); }
inline size_t emu_optin(void) { // bytes that it may have with cudaFuncSetAttribute
    int capability = emu_capability();
    long kb = capability < 80 ? 64 : capability == 80 ? 163 : capability < 90 || capability >= 120 ? 99 : 227;
    return (size_t)emu_setting("CUDA_ON_CPU_OPTIN", kb << 10);
}

inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
    int capability = emu_capability();
    *properties = cudaDeviceProp{"CPU", capability / 10, capability % 10, 4, EMU_MEMORY, emu_optin()};
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
    *value = (int)emu_optin();
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

// Shared memory of a kernel, in bytes.
struct EmuKernel {
    bool launched, executed;
    size_t declared; // with __shared__, if executed
    size_t dynamic;  // most of all launches
    size_t allowed;  // cudaFuncSetAttribute's; 0: none
};
inline std::map<const void *, EmuKernel> emu_kernels;

// As in the source, "f<8, true>": for programs linked with -rdynamic, since kernels are not static here.
inline std::string emu_kernel_name(const void *kernel) {
    Dl_info info;
    if (dladdr(kernel, &info) == 0 || info.dli_sname == NULL) return "?";
    char *text = abi::__cxa_demangle(info.dli_sname, NULL, NULL, NULL);
    std::string name = text ? text : info.dli_sname;
    free(text);
    name = name.substr(0, name.find('('));
    return name.compare(0, 5, "void ") == 0 ? name.substr(5) : name;
}

template <typename Kernel> inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, Kernel *kernel) {
    if (emu_setting("CUDA_ON_CPU_NO_CODE", 0)) return emu_error = cudaErrorNoKernelImageForDevice;
    const EmuKernel &k = emu_kernels[(const void *)kernel];
    attributes->sharedSizeBytes = k.declared;
    attributes->maxDynamicSharedSizeBytes = (int)(k.allowed ? k.allowed : EMU_SHARED - k.declared);
    return cudaSuccess;
}
template <typename Kernel> inline cudaError_t cudaFuncSetAttribute(Kernel *kernel, cudaFuncAttribute, int bytes) {
    EmuKernel &k = emu_kernels[(const void *)kernel];
    if (bytes < 0 || (size_t)bytes + k.declared > emu_optin()) {
        char text[200];
        snprintf(text, sizeof text, "cudaFuncSetAttribute: %s: %d + %zu bytes of shared memory, allowed are %zu",
                 emu_kernel_name((const void *)kernel).c_str(), bytes, k.declared, emu_optin());
        return emu_fail(cudaErrorInvalidValue, text);
    }
    k.allowed = (size_t)bytes;
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// launches: emu_launch("kernel", __LINE__, kernel, grid, block, shared)(arguments)

template <typename T> inline bool emu_readable(T) { return true; }
template <typename T> inline bool emu_readable(T *pointer) { return pointer == NULL || emu_on_device(pointer, 0); }

template <typename... Parameters> struct EmuLaunch {
    typedef void (*Kernel)(Parameters...);
    typedef std::tuple<Kernel, Parameters...> Call;
    const char *name;
    int line;
    Kernel kernel;
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;

    static void run(const void *arguments) { // a thread
        std::apply([](Kernel k, Parameters... parameters) { k(parameters...); }, *(const Call *)arguments);
    }

    // Bytes of dynamic shared memory that are available beside what is declared.
    static size_t most_dynamic(const EmuKernel &k) {
        size_t limit = k.allowed ? emu_optin() : EMU_SHARED, rest = limit > k.declared ? limit - k.declared : 0;
        return k.allowed && k.allowed < rest ? k.allowed : rest;
    }

    bool possible(void) const {
        cudaError_t error = cudaErrorInvalidConfiguration;
        const char *what = NULL;
        if ((uint64_t)block.x * block.y * block.z == 0 || (uint64_t)block.x * block.y * block.z > EMU_THREADS) {
            what = "a block must have 1 to 1024 threads";
        } else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 ||
                   grid.z > 65535) {
            what = "no such grid";
        } else if (shared > most_dynamic(emu_kernels[(const void *)kernel])) {
            what = "more dynamic shared memory than allowed", error = cudaErrorInvalidValue;
        }
        if (what == NULL) return true;
        fprintf(stderr, "CUDA on the CPU: %s, launched in line %d: %s: grid (%u,%u,%u), block (%u,%u,%u), %zu bytes\n",
                name, line, what, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
        emu_error = error;
        return false;
    }

    void operator()(Parameters... parameters) const {
        const Call call(kernel, parameters...);
        if (!possible()) return;
        const bool readable[] = {true, emu_readable(parameters)...};
        for (size_t i = 1; i < sizeof readable; i++) {
            if (readable[i]) continue;
            fprintf(stderr, "error: CUDA on the CPU: %s, launched in line %d: argument %zu is not device memory\n",
                    name, line, i);
            abort();
        }
        if (emu_records(stream, [launch = *this, call] {
                std::apply([&](Kernel, Parameters... later) { launch(later...); }, call);
            }))
            return;
        EmuKernel &k = emu_kernels[(const void *)kernel];
        k.launched = true;
        if (shared > k.dynamic) k.dynamic = shared;
        if (emu_dry) return;
        k.executed = true;
        int64_t blocks = (int64_t)grid.x * grid.y * grid.z;
        size_t declared = 0;
#ifdef _OPENMP
#pragma omp parallel reduction(max : declared) if (blocks > 1)
#endif
        {
            EmuWorker *w = emu_worker_here();
            void *memory = NULL;
            w->run = run, w->arguments = &call, w->kernel = name, w->line = line;
            gridDim = grid, blockDim = block;
            if (posix_memalign(&memory, 256, shared) != 0) emu_fatal("out of memory");
            w->shared = (char *)memory;
            w->num_declared = 0, w->declared_bytes = 0;
#ifdef _OPENMP
#pragma omp for schedule(dynamic)
#endif
            for (int64_t i = 0; i < blocks; i++) {
                blockIdx =
                    uint3{(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y)};
                memset(memory, 0xff, shared);
                emu_run_block(w);
            }
            free(memory);
            w->kernel = NULL;
            declared = w->declared_bytes;
        }
        if (declared > k.declared) k.declared = declared;
        if (shared <= most_dynamic(k)) return;
        fprintf(stderr,
                "CUDA on the CPU: %s, launched in line %d: %zu bytes of dynamic and %zu of declared shared memory\n",
                name, line, shared, k.declared);
        emu_error = cudaErrorInvalidValue;
    }
};

template <typename... Parameters>
inline EmuLaunch<Parameters...> emu_launch(const char *name, int line, void (*kernel)(Parameters...), dim3 grid,
                                           dim3 block, size_t shared = 0, cudaStream_t stream = 0) {
    return EmuLaunch<Parameters...>{name, line, kernel, grid, block, shared, stream};
}

#endif
