#include <errno.h>        // defines: errno
#include <math.h>         // defines: INFINITY, ceil, fmin, isfinite
#include <fcntl.h>        // defines: open, fcntl
#include <signal.h>       // defines: signal
#include <stdarg.h>       // defines: va_list
#include <stdlib.h>       // defines: calloc, exit, free, getenv, realpath, setenv, strtod
#include <string.h>       // defines: strcmp, strcspn, strerror, strlen, strrchr, strtok
#include <sys/resource.h> // defines: getrlimit
#include <time.h>         // defines: clock_gettime
#include <unistd.h>       // defines: execv, readlink, sysconf
#ifdef _OPENMP
#include <omp.h> // defines: omp_get_num_procs
#endif
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
    remove_created();
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

// ----------------------------------------------------------------------------
// limits that the system sets

// Number `field` of a file below dir; INFINITY if it is not there, is "max", is negative or too large to be meant.
static double limit_in(const char *dir, const char *name, int field) {
    char path[4096], text[128] = "", *at = text, *end = text;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "r");
    if (f == NULL) return INFINITY;
    if (fgets(text, sizeof text, f) == NULL) text[0] = 0;
    fclose(f);
    for (int i = 0; i < field; i++) at += strcspn(at, " "), at += strspn(at, " ");
    const double value = strtod(at, &end);
    return end > at && value >= 0 && value < 0x1p60 ? value : INFINITY;
}

static double memory_v1(const char *dir) { return limit_in(dir, "memory.limit_in_bytes", 0); }
static double memory_v2(const char *dir) { return limit_in(dir, "memory.max", 0); }
static double cpu_v1(const char *dir) {
    return limit_in(dir, "cpu.cfs_quota_us", 0) / limit_in(dir, "cpu.cfs_period_us", 0);
}
static double cpu_v2(const char *dir) { return limit_in(dir, "cpu.max", 0) / limit_in(dir, "cpu.max", 1); }

// The least limit of this process's cgroup of one controller and of all that contain it, as far as they can be seen:
// in a container often only the outermost can. v1, v2: read the limit in a cgroup's folder. INFINITY: none.
static double cgroup_limit(const char *root, const char *controller, double (*v1)(const char *),
                           double (*v2)(const char *)) {
    char line[2048], dir[4096];
    double least = INFINITY;
    snprintf(dir, sizeof dir, "%s/proc/self/cgroup", root);
    FILE *f = fopen(dir, "r");
    // lines "ID:CONTROLLER,CONTROLLER:/PATH", of version 2 "0::/PATH"
    while (f != NULL && fgets(line, sizeof line, f) != NULL) {
        char *names = strchr(line, ':'), *path = names != NULL ? strchr(names + 1, ':') : NULL;
        if (path == NULL) continue;
        *names++ = 0, *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        const bool second = *names == 0;
        bool listed = second;
        for (char *name = strtok(names, ","); name != NULL; name = strtok(NULL, ","))
            listed |= strcmp(name, controller) == 0;
        for (char *end = path + strlen(path); listed && end != NULL; end = strrchr(path, '/')) {
            *end = 0;
            snprintf(dir, sizeof dir, "%s/sys/fs/cgroup%s%s%s", root, second ? "" : "/", second ? "" : controller,
                     path);
            least = fmin(least, second ? v2(dir) : v1(dir)); // fmin ignores NaN: no quota and no period
        }
    }
    if (f != NULL) fclose(f);
    return least;
}

size_t memory_limit(const char *root) {
    const double bytes = cgroup_limit(root, "memory", memory_v1, memory_v2);
    return isfinite(bytes) ? (size_t)bytes : SIZE_MAX;
}

int cpu_limit(const char *root) {
    const double cores = ceil(cgroup_limit(root, "cpu", cpu_v1, cpu_v2));
    return cores >= 1 && cores < 1e6 ? (int)cores : 0;
}

// What RLIMIT_AS or RLIMIT_DATA leaves: this process has `field` of /proc/self/statm, in pages, already.
static double ulimit_left(int resource, int field) {
    struct rlimit limit;
    if (getrlimit((__typeof__(RLIMIT_AS))resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return INFINITY;
    const double used = limit_in("/proc/self", "statm", field);
    return (double)limit.rlim_cur - (isfinite(used) ? used * (double)sysconf(_SC_PAGESIZE) : 0);
}

static const char *least_limit = ""; // what set the last result of host_memory()

size_t host_memory(int processes, size_t reserved) {
    const struct {
        const char *name;
        double bytes;
    } limits[] = {
        {"", (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / processes},
        {", the memory limit of this container (cgroup),", (double)memory_limit("") / processes},
        {", which ulimit -v leaves,", ulimit_left(RLIMIT_AS, 0) - (double)reserved},
        {", which ulimit -d leaves,", ulimit_left(RLIMIT_DATA, 5) - (double)reserved},
    };
    size_t least = 0;
    for (size_t i = 1; i < sizeof limits / sizeof *limits; i++) {
        if (limits[i].bytes < limits[least].bytes) least = i;
    }
    least_limit = limits[least].name;
    return limits[least].bytes > 0 ? (size_t)limits[least].bytes : 0;
}

// ----------------------------------------------------------------------------
// the memory plan

// The part of a plan that takes most, and what makes it smaller.
static void name_largest(const MemoryPlan *p, Mode mode, size_t extra, const char **part, const char **remedy) {
    const size_t fixed = p->params + p->grads + p->moments;
    *part = mode == MEGALODON_INFER ? "the parameters" : "parameters, gradients and moments";
    *remedy = "a smaller model (--seq-len and --batch-size do not change them)";
    if (fixed >= p->activations && fixed >= p->scratch && fixed >= extra) return;
    if (p->activations >= p->scratch && p->activations >= extra) {
        *part = "activations", *remedy = "a smaller --batch-size or --seq-len, or --recompute";
    } else if (p->scratch >= extra) {
        *part = "scratch", *remedy = "a smaller --batch-size, --seq-len or --chunk-size, or fewer --threads";
    } else {
        *part = "states and buffers",
        *remedy = "a smaller --batch-size, --grad-accum, --seq-len or --chunk-size, or fewer samples";
    }
}

MemoryPlan check_memory(const Config *c, Mode mode, int B, int L, size_t states, size_t host) {
    const size_t extra = states + (megalodon_on_gpu() ? 0 : host);
    if (megalodon_on_gpu() && host > host_memory(ranks.here, 0))
        fatal(
            "buffers for %d x %d tokens in main memory need %zu MiB; there are %zu MiB%s: use a smaller --batch-size, "
            "--seq-len or --grad-accum",
            B, L, host >> 20, host_memory(ranks.here, 0) >> 20, least_limit);
    least_limit = "";
    const double mib = 1048576, room = (double)megalodon_available_memory(ranks.here) / mib;
    const char *limit = least_limit, *largest, *remedy;
    MemoryPlan plan, other;
    const double need = plan_mib(&plan, c, mode, B, L, extra, room);
    if (need <= room) return plan;
    if (room == 0)
        fatal("%s: its threads reserve more address space than ulimit -v or -d leaves; raise that limit, use fewer "
              "--threads, or build with NO_BLAS=1",
              megalodon_backend());
    // --recompute, or else the largest of half, a quarter, .. of the batch, then of the length, also with --recompute
    char help[224] = "";
    const Mode less = mode == MEGALODON_TRAIN ? MEGALODON_RECOMPUTE : mode;
    const bool recompute = less != mode && plan_mib(&other, c, less, B, L, extra, room) <= room;
    if (recompute) snprintf(help, sizeof help, "What fits: the same with --recompute");
    bool found = recompute;
    for (int b = B, l = L; !found && (b > 1 || l > 1);) {
        if (b > 1)
            b /= 2;
        else
            l /= 2;
        found = plan_mib(&other, c, less, b, l, extra, room) <= room;
        const bool plain = found && plan_mib(&other, c, mode, b, l, extra, room) <= room;
        if (found)
            snprintf(help, sizeof help, "What fits: a batch of %d x %d tokens%s", b, l,
                     plain ? "" : " with --recompute");
    }
    char parts[192] = "";
    if (plan.params > 0)
        snprintf(parts, sizeof parts,
                 " (parameters, gradients and moments %.0f, activations %.0f, scratch %.0f, states and buffers %.0f)",
                 (double)(plan.params + plan.grads + plan.moments) / mib, (double)plan.activations / mib,
                 (double)plan.scratch / mib, (double)extra / mib);
    // If not even a single token fits: what is too large whatever the batch is
    if (!found) plan_mib(&plan, c, less, 1, 1, extra, INFINITY);
    name_largest(&plan, mode, extra, &largest, &remedy);
    if (!found)
        snprintf(help, sizeof help, "Even 1 x 1 tokens do not fit, mostly because of %s: use %s", largest, remedy);
    if ((double)B * L * c->num_heads > INT32_MAX)
        fatal("%d x %d tokens: --batch-size x --seq-len x --num-heads must be below 2^31. %s", B, L, help);
    fatal("%d x %d tokens need %.0f MiB or more%s; there are %.0f MiB%s for %s. %s", B, L, need, parts, room, limit,
          megalodon_backend(), help);
}

#ifdef _OPENMP
// Seconds that the cores have worked for other processes than this one; negative where there is no /proc/stat.
static double work_of_others(void) {
    double user, nice, system;
    struct timespec own = {0};
    FILE *f = fopen("/proc/stat", "r");
    if (f == NULL) return -1;
    const bool ok = fscanf(f, "cpu %lf %lf %lf", &user, &nice, &system) == 3;
    fclose(f);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own);
    const double ticks = (double)sysconf(_SC_CLK_TCK);
    return ok ? (user + nice + system) / ticks - (double)own.tv_sec - 1e-9 * (double)own.tv_nsec : -1;
}

// Do other processes use half a core or more? Looks for 50 milliseconds, of which the system counts each hundredth.
static bool is_machine_busy(void) {
    const struct timespec pause = {.tv_nsec = 50000000};
    const double before = work_of_others();
    nanosleep(&pause, NULL);
    return work_of_others() - before > 0.025;
}
#endif

void settle_threads(char **argv) {
#ifdef _OPENMP
    char text[16];
    const int quota = cpu_limit("");
    const char *blas = getenv("OPENBLAS_NUM_THREADS"), *threads = getenv("OMP_NUM_THREADS");
    const bool waits = getenv("GOMP_SPINCOUNT") != NULL || getenv("OMP_WAIT_POLICY") != NULL;
    if (waits && blas != NULL && strcmp(blas, "1") == 0) return; // done
    bool alone = threads != NULL && strcmp(threads, "1") == 0;
    for (char **arg = argv; *arg != NULL; arg++) {
        alone |=
            strcmp(*arg, "--threads=1") == 0 || (arg[1] && strcmp(*arg, "--threads") == 0 && strcmp(arg[1], "1") == 0);
    }
    // a spin takes some 30 nanoseconds: 0.03 or 1.3 milliseconds
    if (!waits) setenv("GOMP_SPINCOUNT", alone || is_machine_busy() ? "1000" : "40000", 1);
    if (!waits) setenv("KMP_BLOCKTIME", "1", 0); // LLVM's OpenMP, in milliseconds
    setenv("OPENBLAS_NUM_THREADS", "1", 1);
    snprintf(text, sizeof text, "%d", quota);
    if (quota > 0 && quota < omp_get_num_procs()) setenv("OMP_NUM_THREADS", text, 0);
    execv("/proc/self/exe", argv);
    // these are only read when a program starts; where there is no /proc, all stays as it was
#endif
    (void)argv;
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
