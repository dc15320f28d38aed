#define _GNU_SOURCE       // sched.h: CPU_COUNT
#include <errno.h>        // defines: errno
#include <fcntl.h>        // defines: open, fcntl
#include <sched.h>        // defines: sched_getaffinity
#include <signal.h>       // defines: signal
#include <stdarg.h>       // defines: va_list
#include <stdlib.h>       // defines: calloc, exit, free, getenv, setenv
#include <string.h>       // defines: strerror, strlen, strrchr
#include <sys/resource.h> // defines: getrusage
#include <time.h>         // defines: clock_gettime
#include <unistd.h>       // defines: execv, readlink, sysconf
#include "plumbing.h"

static void print_error(const char *format, va_list args) {
    fflush(stdout);
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
}

void fatal(const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_error(format, args);
    va_end(args);
    exit(1);
}

void usage_error(const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_error(format, args);
    va_end(args);
    fputs("       --help lists all options\n", stderr);
    exit(2);
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

double peak_memory(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (double)usage.ru_maxrss / 1048576; // bytes there, KiB elsewhere
#else
    return (double)usage.ru_maxrss / 1024;
#endif
}

MemoryPlan check_memory(const Config *c, Mode mode, int B, int L, size_t extra) {
    const double mib = 1048576, rows = (double)B * L;
    const double physical = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / mib;
    // The layers' outputs and one layer's widest tensors. If these are too much, the plan might overflow.
    double need =
        rows *
        ((mode == MEGALODON_INFER ? 1 : c->num_layers) * (double)c->model_dim + c->value_dim + c->ffn_hidden_dim) *
        sizeof(real) / mib;
    MemoryPlan p = {0};
    if (need <= physical && rows * c->num_heads <= INT32_MAX) {
        p = megalodon_memory(c, mode, B, L);
        need = ((double)p.params + (double)p.grads + (double)p.moments + (double)p.activations + (double)p.scratch +
                (double)extra) /
               mib;
    }
    if (p.params > 0 && need <= physical) return p;
    fatal("%d x %d tokens need %.0f MiB or more (parameters, gradients and moments %.0f, activations %.0f); "
          "this machine "
          "has %.0f MiB, and B x L x num_heads must be below 2^31. What helps: %sa smaller --batch-size, "
          "--seq-len or "
          "model",
          B, L, need, (double)(p.params + p.grads + p.moments) / mib, (double)p.activations / mib, physical,
          mode == MEGALODON_TRAIN ? "--recompute, " : "");
}

// Programs that run now or wait for a core, this one left out.
static int others_running(void) {
    int running = 1;
    FILE *f = fopen("/proc/loadavg", "r");
    if (f != NULL && fscanf(f, "%*f %*f %*f %d/", &running) != 1) running = 1;
    if (f != NULL) fclose(f);
    return running - 1;
}

void settle_threads(char **argv, int threads) {
    cpu_set_t ours;
    const int cores = sched_getaffinity(0, sizeof ours, &ours) == 0 ? CPU_COUNT(&ours) : 1;
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

void beside_executable(char *path, size_t size, const char *name) {
    char exe[4096];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    exe[n > 0 ? n : 0] = 0;
    char *slash = strrchr(exe, '/');
    // without /proc: the working directory
    if (slash == NULL)
        snprintf(path, size, "%s", name);
    else
        snprintf(path, size, "%.*s/%s", (int)(slash - exe), exe, name);
}
