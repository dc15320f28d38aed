#define _GNU_SOURCE // sched.h: CPU_COUNT
#include <errno.h>  // defines: errno
#include <math.h>   // defines: INFINITY
#include <fcntl.h>  // defines: open, fcntl
#include <sched.h>  // defines: sched_getaffinity, on Linux
#include <signal.h> // defines: signal
#include <stdarg.h> // defines: va_list
#include <stdlib.h> // defines: calloc, exit, free, getenv, realpath, setenv
#include <string.h> // defines: strerror, strlen, strrchr
#include <time.h>   // defines: clock_gettime
#include <unistd.h> // defines: execv, readlink, sysconf
#ifdef __APPLE__
#include <mach-o/dyld.h> // defines: _NSGetExecutablePath
#endif
#include "plumbing.h"

static void print_error(const char *format, va_list args) {
    fflush(stdout);
    ranks_wait();
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
}

void fatal(const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_error(format, args);
    va_end(args);
    ranks_exit(1);
}

void usage_error(const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_error(format, args);
    va_end(args);
    fputs("       --help lists all options\n", stderr);
    ranks_exit(2);
}

void guard_streams(void) {
    for (int fd = 0; fd < 3; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) != fd) exit(1);
    }
    signal(SIGXFSZ, SIG_IGN);
}

void *allocate(size_t count, size_t size) {
    void *memory = calloc(count > 0 ? count : 1, size);
    if (memory == NULL) fatal("out of memory: could not get %zu x %zu bytes", count, size);
    return memory;
}

char *read_text(const char *path, char *err) {
    enum { MOST = 1 << 20 };
    char *text = allocate(MOST + 2, 1);
    FILE *f = fopen(path, "rb");
    size_t n = f != NULL ? fread(text, 1, MOST + 1, f) : 0;
    bool failed = f == NULL || ferror(f);
    if (failed)
        snprintf(err, ST_ERR, "%.250s: %s", path, strerror(errno));
    else if (n > MOST || strlen(text) < n)
        snprintf(err, ST_ERR, "%.250s: too long, or not a text", path);
    if (f != NULL) fclose(f);
    if (!failed && n <= MOST && strlen(text) == n) return text;
    free(text);
    return NULL;
}

double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// MiB of a plan; of no less than that, more than there is room for, if the plan itself might overflow.
static double plan_mib(MemoryPlan *p, const Config *c, Mode mode, int B, int L, size_t extra, double room) {
    const double mib = 1048576, rows = (double)B * L;
    // The layers' outputs and one layer's widest tensors, at two bytes a number at least: more is not worth planning.
    const double least =
        rows *
        ((mode == MEGALODON_TRAIN ? c->num_layers : 1) * (double)c->model_dim + c->value_dim + c->ffn_hidden_dim) * 2 /
        mib;
    *p = (MemoryPlan){0};
    if (least > room) return least;
    if (rows * c->num_heads > INT32_MAX) return 2 * room;
    *p = megalodon_memory(c, mode, B, L);
    if (p->params == 0) return 2 * room; // no memory for the plan
    return ((double)p->params + (double)p->grads + (double)p->moments + (double)p->activations + (double)p->scratch +
            (double)extra) /
           mib;
}

MemoryPlan check_memory(const Config *c, Mode mode, int B, int L, size_t extra) {
    const double mib = 1048576, room = (double)megalodon_room(ranks.here) / mib;
    MemoryPlan plan, other;
    const double need = plan_mib(&plan, c, mode, B, L, extra, room);
    if (need <= room) return plan;
    // --recompute, or else the largest of half, a quarter, .. of the batch, also with --recompute
    char help[96] = "a smaller --seq-len or model";
    const Mode less = mode == MEGALODON_TRAIN ? MEGALODON_RECOMPUTE : mode;
    const bool recompute = less != mode && plan_mib(&other, c, less, B, L, extra, room) <= room;
    if (recompute) snprintf(help, sizeof help, "the same with --recompute");
    for (int b = B / 2, found = recompute; b > 0 && !found; b /= 2) {
        found = plan_mib(&other, c, less, b, L, extra, room) <= room;
        const bool plain = found && plan_mib(&other, c, mode, b, L, extra, room) <= room;
        if (found) snprintf(help, sizeof help, "a batch of %d x %d tokens%s", b, L, plain ? "" : " with --recompute");
    }
    char parts[128] = "";
    if (plan.params > 0)
        snprintf(parts, sizeof parts, " (parameters, gradients and moments %.0f, activations %.0f, scratch %.0f)",
                 (double)(plan.params + plan.grads + plan.moments) / mib, (double)plan.activations / mib,
                 (double)plan.scratch / mib);
    fatal("%d x %d tokens need %.0f MiB or more%s; there are %.0f MiB for %s, and B x L x num_heads must be below "
          "2^31. What fits: %s",
          B, L, need, parts, room, megalodon_backend(), help);
}

// Programs that run now or wait for a core, this one left out.
static int others_running(void) {
    int running = 1;
    FILE *f = fopen("/proc/loadavg", "r");
    if (f != NULL && fscanf(f, "%*f %*f %*f %d/", &running) != 1) running = 1;
    if (f != NULL) fclose(f);
    return running - 1;
}

// Cores that this process may use.
static int available_cores(void) {
#ifdef __linux__
    cpu_set_t ours;
    if (sched_getaffinity(0, sizeof ours, &ours) == 0) return CPU_COUNT(&ours);
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

void settle_threads(char **argv, int threads) {
#ifndef __linux__
    return; // no /proc/loadavg to tell how busy the machine is, and on macOS no threads that stay on one core
#endif
    const int cores = available_cores();
    if (threads == 1 || getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY") || getenv("OMP_PROC_BIND")) return;
    if (others_running() >= cores / 4 + (cores % 4 != 0)) {
        setenv("KMP_BLOCKTIME", "1", 0); // of LLVM's OpenMP, in ms
        setenv("GOMP_SPINCOUNT", "10000", 1);
    } else if (threads == 0 || threads == cores) {
        setenv("OMP_PROC_BIND", "close", 1);
    } else {
        return;
    }
    execv("/proc/self/exe", argv);
    // these are only read when a program starts; where there is no /proc, all stays as it was
}

// The path of this program's file, of at most 4095 bytes; "" if the system does not tell.
static void executable_path(char path[4096]) {
#ifdef __APPLE__
    char linked[4096];
    uint32_t size = sizeof linked;
    if (_NSGetExecutablePath(linked, &size) != 0 || realpath(linked, path) == NULL) path[0] = 0;
#else
    const ssize_t n = readlink("/proc/self/exe", path, 4095);
    path[n > 0 ? n : 0] = 0;
#endif
}

void beside_executable(char *path, size_t size, const char *name) {
    char exe[4096];
    executable_path(exe);
    char *slash = strrchr(exe, '/');
    // an unknown path: the working directory
    if (slash == NULL)
        snprintf(path, size, "%s", name);
    else
        snprintf(path, size, "%.*s/%s", (int)(slash - exe), exe, name);
}
