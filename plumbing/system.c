// The lowest file of plumbing/: errors that end the program, memory, time, limits of the system, threads.
#include <errno.h>        // defines: errno
#include <math.h>         // defines: INFINITY, ceil, fmin, isfinite
#include <fcntl.h>        // defines: open, fcntl
#include <signal.h>       // defines: signal
#include <stdarg.h>       // defines: va_list
#include <stdlib.h>       // defines: calloc, exit, free, getenv, realpath, setenv, strtod, strtol
#include <string.h>       // defines: strcmp, strcspn, strdup, strerror, strlen, strrchr, strtok
#include <sys/resource.h> // defines: getrlimit
#include <time.h>         // defines: clock_gettime
#include <unistd.h>       // defines: execv, readlink, rmdir, sysconf, unlink
#ifdef _OPENMP
#include <omp.h> // defines: omp_get_num_procs
#endif
#ifdef __APPLE__
#include <mach-o/dyld.h> // defines: _NSGetExecutablePath
#endif
#include "plumbing.h"

// ----------------------------------------------------------------------------
// errors that end the program

static char **created; // paths to remove on failure, in the order of their creation
static int num_created;

void remove_if_refused(const char *path) {
    char **longer = realloc(created, (size_t)(num_created + 1) * sizeof *created), *name = strdup(path);
    if (longer == NULL || name == NULL) fatal("out of memory");
    created = longer;
    created[num_created++] = name;
}

void keep_created(void) {
    for (int i = 0; i < num_created; i++) free(created[i]);
    free(created);
    created = NULL, num_created = 0;
}

static void remove_created(void) {
    for (int i = num_created - 1; i >= 0; i--) {
        if (unlink(created[i]) != 0) rmdir(created[i]); // rmdir fails unless the directory is empty
    }
    keep_created();
}

static void do_nothing(void) {}
static void (*before_message)(void) = do_nothing;
static void (*end_program)(int status) = exit;

void set_failure_hooks(void (*before)(void), void (*end)(int status)) {
    before_message = before != NULL ? before : do_nothing;
    end_program = end != NULL ? end : exit;
}

static void print_error(const char *format, va_list args) {
    progress_end();
    fflush(stdout);
    before_message();
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
    end_program(1);
    exit(1);
}

void usage_error(const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_error(format, args);
    va_end(args);
    fputs("       --help lists all options\n", stderr);
    end_program(2);
    exit(2);
}

void guard_streams(void) {
    for (int fd = 0; fd < 3; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDONLY) != fd) exit(1);
    }
    signal(SIGXFSZ, SIG_IGN);
}

// ----------------------------------------------------------------------------
// memory, text files, time

void *allocate(size_t count, size_t size) {
    void *memory = calloc(count > 0 ? count : 1, size);
    if (memory == NULL) fatal("out of memory: could not get %zu x %zu bytes", count, size);
    return memory;
}

char *read_text(const char *path, char *err) {
    enum { MAX_TEXT = 1 << 20 };
    char *text = allocate(MAX_TEXT + 2, 1);
    FILE *f = fopen(path, "rb");
    size_t n = f != NULL ? fread(text, 1, MAX_TEXT + 1, f) : 0;
    bool failed = f == NULL || ferror(f);
    if (failed)
        snprintf(err, ST_ERR, "%.250s: %s", path, strerror(errno));
    else if (n > MAX_TEXT || strlen(text) < n)
        snprintf(err, ST_ERR, "%.250s: longer than 1 MiB, or not a text file", path);
    if (f != NULL) fclose(f);
    if (!failed && n <= MAX_TEXT && strlen(text) == n) return text;
    free(text);
    return NULL;
}

double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// ----------------------------------------------------------------------------
// limits that the system sets

// The number in column `field` (from 0, separated by spaces) of the first line of dir/name. INFINITY if there is no
// such file or column, or if it holds "max", a negative number, or one of 2^60 or more, which cgroups write for "no
// limit".
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

// The smallest limit that the cgroup of this process and its ancestors set for one controller. In a container often
// only the outermost one is visible. v1 and v2 read the limit in a cgroup's directory, for cgroups of version 1 and 2.
// Returns INFINITY if there is no limit.
static double cgroup_limit(const char *root, const char *controller, double (*v1)(const char *),
                           double (*v2)(const char *)) {
    char line[2048], dir[4096];
    double limit = INFINITY;
    snprintf(dir, sizeof dir, "%s/proc/self/cgroup", root);
    FILE *f = fopen(dir, "r");
    // Lines of /proc/self/cgroup are "ID:CONTROLLER,CONTROLLER:/PATH" in version 1, "0::/PATH" in version 2.
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
            limit = fmin(limit, second ? v2(dir) : v1(dir)); // fmin ignores NaN, which is INFINITY / INFINITY: no quota
        }
    }
    if (f != NULL) fclose(f);
    return limit;
}

size_t memory_limit(const char *root) {
    const double bytes = cgroup_limit(root, "memory", memory_v1, memory_v2);
    return isfinite(bytes) ? (size_t)bytes : SIZE_MAX;
}

int cpu_limit(const char *root) {
    const double cores = ceil(cgroup_limit(root, "cpu", cpu_v1, cpu_v2));
    return cores >= 1 && cores < 1e6 ? (int)cores : 0;
}

// Bytes of RLIMIT_AS or RLIMIT_DATA that are left. Column `field` of /proc/self/statm says how many pages this process
// uses already. INFINITY if there is no limit.
static double ulimit_left(int resource, int field) {
    struct rlimit limit;
    if (getrlimit((__typeof__(RLIMIT_AS))resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return INFINITY;
    const double used = limit_in("/proc/self", "statm", field);
    return (double)limit.rlim_cur - (isfinite(used) ? used * (double)sysconf(_SC_PAGESIZE) : 0);
}

static const char *limit_name = "";

size_t host_memory(int processes, size_t reserved) {
    const struct {
        const char *name;
        double bytes;
    } limits[] = {
        {"", (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / processes},
        {" within the memory limit of this container (cgroup)", (double)memory_limit("") / processes},
        {" within ulimit -v", ulimit_left(RLIMIT_AS, 0) - (double)reserved},
        {" within ulimit -d", ulimit_left(RLIMIT_DATA, 5) - (double)reserved},
    };
    size_t smallest = 0;
    for (size_t i = 1; i < sizeof limits / sizeof *limits; i++) {
        if (limits[i].bytes < limits[smallest].bytes) smallest = i;
    }
    limit_name = limits[smallest].name;
    return limits[smallest].bytes > 0 ? (size_t)limits[smallest].bytes : 0;
}

const char *host_memory_limit(void) { return limit_name; }

// ----------------------------------------------------------------------------
// processes and threads

int local_rank(void) {
    // Open MPI and PMIx, MPICH and Intel MPI, Slurm
    static const char *const names[] = {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const char *value = getenv(names[i]);
        if (value != NULL) return (int)strtol(value, NULL, 10);
    }
    return 0;
}

#ifdef _OPENMP
// CPU time in seconds that all cores have spent on processes other than this one. -1 where there is no /proc/stat.
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

// Returns whether other processes use half a core or more. Measures for 50 ms; /proc/stat counts in steps of 10 ms.
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
    if (waits && blas != NULL && strcmp(blas, "1") == 0) return; // already arranged, by the first start
    bool single = threads != NULL && strcmp(threads, "1") == 0;
    for (char **arg = argv; *arg != NULL; arg++) {
        single |=
            strcmp(*arg, "--threads=1") == 0 || (arg[1] && strcmp(*arg, "--threads") == 0 && strcmp(arg[1], "1") == 0);
    }
    // One spin takes about 30 ns, so threads wait actively for 0.03 ms or 1.3 ms before they sleep.
    if (!waits) setenv("GOMP_SPINCOUNT", single || is_machine_busy() ? "1000" : "40000", 1);
    if (!waits) setenv("KMP_BLOCKTIME", "1", 0); // the same for LLVM's OpenMP, in ms
    setenv("OPENBLAS_NUM_THREADS", "1", 1);
    snprintf(text, sizeof text, "%d", quota);
    if (quota > 0 && quota < omp_get_num_procs()) setenv("OMP_NUM_THREADS", text, 0);
    // The OpenMP and BLAS libraries read these variables when a program starts. Without /proc execv fails, and the
    // program goes on with the libraries' defaults.
    execv("/proc/self/exe", argv);
#endif
    (void)argv;
}

// Writes the path of the running executable, "" if it is unknown or longer than 4095 bytes.
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
    // If the executable's path is unknown, use the working directory.
    if (slash == NULL)
        snprintf(path, size, "%s", name);
    else
        snprintf(path, size, "%.*s/%s", (int)(slash - exe), exe, name);
}
