#include <dirent.h>   // defines: opendir, readdir
#include <errno.h>    // defines: errno, EEXIST
#include <fcntl.h>    // defines: open
#include <math.h>     // defines: isfinite
#include <stdlib.h>   // defines: free, qsort
#include <string.h>   // defines: strcmp, strerror
#include <sys/file.h> // defines: flock
#include <sys/stat.h> // defines: mkdir
#include <unistd.h>   // defines: unlink, rmdir
#include "plumbing.h"

// DIR/step-XXXXXXXX and what follows it.
static void step_path(char path[PATH_SIZE], const char *dir, int64_t step, const char *rest) {
    if (snprintf(path, PATH_SIZE, "%s/step-%08lld%s", dir, (long long)step, rest) >= PATH_SIZE)
        fatal("%s: name too long", dir);
}

static int newest_first(const void *x, const void *y) {
    const int64_t a = *(const int64_t *)x, b = *(const int64_t *)y;
    return (a < b) - (a > b);
}

// The steps of all step-XXXXXXXX with this suffix in a directory, newest first; freed by the caller.
static int64_t *list_steps(const char *dir, const char *suffix, int *count) {
    int64_t *steps = NULL;
    DIR *d = opendir(dir);
    *count = 0;
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        long long step;
        char name[64];
        if (sscanf(e->d_name, "step-%lld", &step) != 1 || step < 0) continue;
        snprintf(name, sizeof name, "step-%08lld%s", step, suffix);
        if (strcmp(name, e->d_name) != 0) continue;
        steps = realloc(steps, (size_t)(*count + 1) * sizeof *steps);
        if (steps == NULL) fatal("out of memory");
        steps[(*count)++] = step;
    }
    if (d != NULL) closedir(d);
    if (*count > 0) qsort(steps, (size_t)*count, sizeof *steps, newest_first);
    return steps;
}

bool run_model(char path[PATH_SIZE], const char *dir, int i) {
    int count;
    int64_t *steps = list_steps(dir, "", &count);
    if (i < count) step_path(path, dir, steps[i], "/model.safetensors");
    free(steps);
    return i < count;
}

// Removes step-XXXXXXXX, or step-XXXXXXXX.tmp, with what we write there: model, optimizer, states, and their .tmp.
static void remove_step(const char *dir, int64_t step, const char *suffix) {
    char path[PATH_SIZE];
    step_path(path, dir, step, suffix);
    DIR *d = opendir(path);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        char rest[512];
        if (strstr(e->d_name, ".safetensors") == NULL) continue;
        snprintf(rest, sizeof rest, "%s/%s", suffix, e->d_name);
        step_path(path, dir, step, rest);
        if (remove(path) != 0) fprintf(stderr, "warning: cannot remove %s: %s\n", path, strerror(errno));
    }
    if (d == NULL) return;
    closedir(d);
    step_path(path, dir, step, suffix);
    if (remove(path) != 0) fprintf(stderr, "warning: cannot remove %s: %s\n", path, strerror(errno));
}

// Writes DIR/options.txt; whatever happens meanwhile, there is a whole one.
static void keep_options(const char *dir, const Option *options) {
    char tmp[PATH_SIZE], path[PATH_SIZE];
    if (snprintf(tmp, sizeof tmp, "%s/options.txt.tmp", dir) >= PATH_SIZE) fatal("--out %s: name too long", dir);
    snprintf(path, sizeof path, "%s/options.txt", dir);
    FILE *f = fopen(tmp, "w");
    if (f != NULL) options_write(options, f);
    bool ok = f != NULL && fflush(f) == 0 && !ferror(f) && fsync(fileno(f)) == 0;
    if (f != NULL) ok = fclose(f) == 0 && ok;
    if (ok && rename(tmp, path) == 0) return;
    const int reason = errno;
    unlink(tmp);
    fatal("%s: cannot write: %s", path, strerror(reason));
}

void run_claim(const char *dir, const Option *options, bool resume, bool overwrite) {
    char path[PATH_SIZE];
    if (snprintf(path, sizeof path, "%s/lock", dir) >= PATH_SIZE) fatal("--out %s: name too long", dir);
    for (char *p = path + 1; *p != 0; p++) { // its parents, then itself
        if (*p != '/') continue;
        *p = 0;
        if (mkdir(path, 0777) != 0 && errno != EEXIST) fatal("--out %s: %s: %s", dir, path, strerror(errno));
        *p = '/';
    }
    int lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666); // stays open, and locked, until the program ends
    if (lock < 0) fatal("--out %s: %s", path, strerror(errno));
    if (flock(lock, LOCK_EX | LOCK_NB) != 0)
        fatal("--out %s: %s", dir, errno == EWOULDBLOCK ? "another run is writing there now" : strerror(errno));
    int count;
    int64_t *steps = list_steps(dir, ".tmp", &count); // what a run that was killed had not finished
    for (int i = 0; i < count; i++) remove_step(dir, steps[i], ".tmp");
    free(steps);
    steps = list_steps(dir, "", &count);
    if (count > 0 && !resume && !overwrite)
        fatal("--out %s: holds a run, at step %lld. Continue it with --resume %s, replace it with "
              "--overwrite, or "
              "choose another --out",
              dir, (long long)steps[0], dir);
    for (int i = 0; i < count && overwrite; i++) remove_step(dir, steps[i], "");
    free(steps);
    keep_options(dir, options);
}

// The validation loss that a checkpoint remembers; infinite if it has none.
static double step_loss(const char *dir, int64_t step) {
    StFile f;
    char path[PATH_SIZE], err[ST_ERR];
    double loss = INFINITY;
    step_path(path, dir, step, "/optimizer.safetensors");
    if (!st_open(&f, path, err)) return INFINITY;
    const StTensor *t = st_find(&f, "val_loss");
    if (t != NULL && st_count(t) == 1) st_read(&f, t, 0, 1, &loss, ST_F64, err);
    st_close(&f);
    return isfinite(loss) ? loss : INFINITY;
}

static void prune(const char *dir) {
    int count, best = 0;
    double lowest = INFINITY, loss;
    int64_t *steps = list_steps(dir, "", &count);
    for (int i = 0; i < count; i++) {
        if ((loss = step_loss(dir, steps[i])) < lowest) best = i, lowest = loss;
    }
    for (int i = 2; i < count; i++) {
        if (i != best) remove_step(dir, steps[i], "");
    }
    free(steps);
}

static void state_path(char path[PATH_SIZE], const char *dir, int64_t step, const char *suffix, int i) {
    char rest[64];
    snprintf(rest, sizeof rest, "%s/state-%d.safetensors", suffix, i);
    step_path(path, dir, step, rest);
}

void run_save(const char *dir, Model *model, State *const *states, int num_states, const Config *config, int64_t seed,
              int64_t step, double val_loss) {
    char tmp[PATH_SIZE], path[PATH_SIZE], err[ST_ERR];
    if (ranks.rank > 0) {
        lend_optimizer(model, config);
        return;
    }
    step_path(tmp, dir, step, ".tmp");
    remove_step(dir, step, ".tmp");
    if (mkdir(tmp, 0777) != 0) fatal("%s: %s", tmp, strerror(errno));
    step_path(path, dir, step, ".tmp/model.safetensors");
    bool ok = save_model(path, model, config, err);
    step_path(path, dir, step, ".tmp/optimizer.safetensors");
    ok = ok && save_optimizer(path, model, config, seed, step, val_loss, err);
    for (int i = 0; i < num_states && ok; i++) {
        state_path(path, dir, step, ".tmp", i);
        ok = save_state(path, states[i], config, seed, NULL, err);
    }
    if (!ok) { // a disk that is full: what is there already must not stay
        remove_step(dir, step, ".tmp");
        fatal("%s", err);
    }
    remove_step(dir, step, ""); // one that did not load
    step_path(path, dir, step, "");
    if (rename(tmp, path) != 0) fatal("%s: cannot rename it: %s", tmp, strerror(errno));
    if (!st_sync_folder(path, err)) fatal("%s", err);
    prune(dir);
}

static bool read_model(const char *dir, int64_t step, Model *m, State *const *states, int num_states, const Config *c,
                       int64_t seed, char *err) {
    StFile f;
    char path[PATH_SIZE];
    step_path(path, dir, step, "/model.safetensors");
    if (!st_open(&f, path, err)) return false;
    bool ok = load_model(&f, m, c, err);
    st_close(&f);
    step_path(path, dir, step, "/optimizer.safetensors");
    if (!ok || !st_open(&f, path, err)) return false;
    ok = load_optimizer(&f, m, c, seed, step, err);
    st_close(&f);
    for (int i = 0; i < num_states && ok; i++) {
        int64_t stored;
        state_path(path, dir, step, "", i);
        ok = load_state(path, states[i], c, &stored, NULL, err);
    }
    return ok;
}

void run_open(const char *dir, Option *options, Config *config) {
    char path[PATH_SIZE], err[ST_ERR], *text;
    StFile f;
    if (!run_model(path, dir, 0)) fatal("--resume %s: holds no run", dir);
    if (!checkpoint_open(&f, config, dir)) fatal("%s: says no configuration", f.path);
    st_close(&f);
    snprintf(path, sizeof path, "%s/options.txt", dir);
    if ((text = read_text(path, err)) == NULL)
        fprintf(stderr, "warning: no settings but the command line's: %s\n", err);
    else if (!options_read(options, text, err))
        fatal("%s: %s", path, err);
}

int64_t run_load(const char *dir, Model *model, State *const *states, int num_states, const Config *config,
                 int64_t seed) {
    char err[ST_ERR];
    int count, i = 0;
    int64_t *steps = list_steps(dir, "", &count), step = 0;
    for (; i < count && !read_model(dir, steps[i], model, states, num_states, config, seed, err); i++)
        fprintf(stderr, "warning: passed over a checkpoint: %s\n", err);
    if (i == count) fatal("--resume %s: no checkpoint loads", dir);
    step = steps[i];
    free(steps);
    return step;
}
