/*
team_cpu.h: threads for decoding. kernels/matvec_cpu.h and kernels/cema_cpu.h use them; megalodon.c includes this file.

A token of a large model has a hundred matrix-vector products, of 10 to 100 microseconds each on 16 cores. A parallel
region for each of them costs as much again: it begins and ends with a barrier, which waits until every thread has
woken, even one that the system has preempted. So a token has one parallel region. Thread 0 runs the model. The other
threads, its team, wait for parts of a job without sleeping:

    thread 0                                            the team
    team_open()                                         team_work():
    |  computes what is small
    |  team_share(): left = parts              -->      | take parts until left is 0
    |      takes parts, too                             | done += 1 after each
    |      waits until done = parts            <--
    |  computes what is small ..
    team_close()                               -->      leave the region

Thread 0 waits for parts that were taken, not for threads. So a thread that is late costs nothing. A part has at least
PART_BYTES, so that small jobs use fewer threads. Parts divide a result, never a sum, so the results do not depend on
their number.
*/
#pragma once
#include <sched.h>     // defines: sched_yield
#include <stdatomic.h> // defines: atomic_int, atomic_load, atomic_store, atomic_fetch_add, atomic_fetch_sub

enum {
    PART_BYTES = 1 << 16, // bytes that a part reads, at least
    LOOP_PARTS = 16,      // parts for which a parallel loop pays where there is no team, at least
    SPINS = 2000,         // turns of a waiting loop before it offers its core to other processes
};

// A job of n items. run() computes items `from` to `end` - 1 of what `arguments` describes.
typedef struct {
    void (*run)(const void *arguments, int from, int end);
    const void *arguments;
    int n;
} Job;

static struct {
    int threads;                  // in the team, with thread 0; 0: there is no team
    Job job;                      // the job that has parts left
    int items;                    // in a part of it
    _Alignas(64) atomic_int left; // parts that no thread has taken; each counter has its own cache line
    _Alignas(64) atomic_int done; // parts that are complete
    _Alignas(64) atomic_int is_open;
} team;

static void team_wait(int turn) {
    if (turn > SPINS) sched_yield();
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

// Takes and computes parts until none is left. A thread may subtract late: then it takes a part of the next job, or
// leaves a negative number, which the next job overwrites.
static void team_parts(void) {
    while (atomic_load(&team.left) > 0) {
        int part = atomic_fetch_sub(&team.left, 1) - 1, from = part * team.items;
        if (part < 0) return;
        team.job.run(team.job.arguments, from, min(from + team.items, team.job.n));
        atomic_fetch_add(&team.done, 1);
    }
}

// What the threads of a team do, except thread 0.
static void team_work(void) {
    for (int turn = 0; atomic_load(&team.is_open); turn = min(turn + 1, SPINS + 1)) {
        if (atomic_load(&team.left) > 0) team_parts(), turn = 0;
        team_wait(turn);
    }
}

static void team_open(void) { team.threads = threads_here(), atomic_store(&team.is_open, 1); }
static void team_close(void) { team.threads = 0, atomic_store(&team.is_open, 0); }

// Calls a function on this thread, with the other threads as its team if `condition` holds.
#define WITH_TEAM(condition, call)                                                                                     \
    do {                                                                                                               \
        if (condition) {                                                                                               \
            team_open();                                                                                               \
            _Pragma("omp parallel") {                                                                                  \
                if (thread_number() > 0)                                                                               \
                    team_work();                                                                                       \
                else                                                                                                   \
                    call, team_close();                                                                                \
            }                                                                                                          \
        } else {                                                                                                       \
            call;                                                                                                      \
        }                                                                                                              \
    } while (0)

// Runs a job of n items on the team, or in a parallel loop if there is no team. Parts are multiples of `unit` items.
// bytes: what the whole job reads.
static void team_share(Job job, int unit, double bytes) {
    int threads = team.threads > 0 ? team.threads : threads_here();
    int parts = (int)(bytes / PART_BYTES);
    if (threads == 1 || parts < (team.threads > 0 ? 2 : LOOP_PARTS)) {
        job.run(job.arguments, 0, job.n);
        return;
    }
    parts = min(parts, 2 * threads); // two for each thread: the fast ones take more
    int items = ceil_div(ceil_div(job.n, parts), unit) * unit;
    if (team.threads > 0) {
        parts = ceil_div(job.n, items);
        team.job = job, team.items = items;
        atomic_store(&team.done, 0);
        atomic_store(&team.left, parts);
        team_parts();
        for (int turn = 0; atomic_load(&team.done) < parts; turn = min(turn + 1, SPINS + 1)) team_wait(turn);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int from = 0; from < job.n; from += items) job.run(job.arguments, from, min(from + items, job.n));
}
