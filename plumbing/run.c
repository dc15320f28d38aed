// A run's directory: its lock, its options, its checkpoints.
#include <dirent.h>   // defines: opendir, readdir
#include <errno.h>    // defines: errno, EEXIST
#include <fcntl.h>    // defines: open
#include <math.h>     // defines: isfinite
#include <stdlib.h>   // defines: free, qsort
#include <string.h>   // defines: strcmp, strerror, strlen, strstr
#include <sys/file.h> // defines: flock
#include <sys/stat.h> // defines: mkdir
#include <unistd.h>   // defines: access, close, fsync, unlink
#include "plumbing.h"

// The name of an empty file in a checkpoint that only a signal caused. An uninterrupted run does not have such a
// checkpoint, so it does not count among the newest two, and the next one replaces it.
static const char STOPPED[] = "stopped";

// Writes DIR/step-XXXXXXXX followed by `rest` to path.
static void step_path(char path[PATH_SIZE], const char *dir, int64_t step, const char *rest) {
    if (snprintf(path, PATH_SIZE, "%s/step-%08lld%s", dir, (long long)step, rest) >= PATH_SIZE)
        fatal("%s: name too long", dir);
}

static int newest_first(const void *x, const void *y) {
    const int64_t a = *(const int64_t *)x, b = *(const int64_t *)y;
    return (a < b) - (a > b);
}

// The steps of all entries step-XXXXXXXX + suffix of a directory, newest first; freed by the caller.
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

static bool opens(const char *path, char *err) {
    StFile f;
    if (!st_open(&f, path, err)) return false;
    st_close(&f);
    return true;
}

static int64_t *damaged; // (num_damaged) steps whose checkpoints open but did not load in run_load
static int num_damaged;

// Returns whether a checkpoint is intact: both files open, and the optimizer is of that step.
static bool is_intact(const char *dir, int64_t step, char *err) {
    StFile f;
    int64_t stored = -1;
    char path[PATH_SIZE];
    for (int i = 0; i < num_damaged; i++) {
        if (damaged[i] == step)
            return snprintf(err, ST_ERR, "%.200s: step %lld did not load", dir, (long long)step), false;
    }
    step_path(path, dir, step, "/model.safetensors");
    if (!opens(path, err)) return false;
    step_path(path, dir, step, "/optimizer.safetensors");
    if (!st_open(&f, path, err)) return false;
    const StTensor *t = st_find(&f, "step");
    const bool right = t != NULL && st_count(t) == 1 && st_read(&f, t, 0, 1, &stored, ST_I64, err) && stored == step;
    if (!right) snprintf(err, ST_ERR, "%.200s: is no optimizer of step %lld", path, (long long)step);
    st_close(&f);
    return right;
}

int64_t run_newest(const char *dir, bool *is_run) {
    char err[ST_ERR];
    int count;
    int64_t *steps = list_steps(dir, "", &count), newest = -1;
    for (int i = 0; i < count && newest < 0; i++) {
        if (is_intact(dir, steps[i], err))
            newest = steps[i];
        else
            fprintf(stderr, "warning: skipped a damaged checkpoint: %s\n", err);
    }
    *is_run = count > 0;
    free(steps);
    return newest;
}

void run_model_path(char path[PATH_SIZE], const char *dir, int64_t step) {
    step_path(path, dir, step, "/model.safetensors");
}

bool run_open_model(StFile *f, Config *config, const char *path) {
    char file[PATH_SIZE], err[ST_ERR];
    bool is_run, ok;
    const int64_t step = run_newest(path, &is_run);
    if (is_run && step < 0) fatal("%s: every checkpoint is damaged", path);
    if (is_run) {
        run_model_path(file, path, step);
        ok = st_open(f, file, err);
    } else { // a checkpoint directory, or a file
        snprintf(file, sizeof file, "%s/model.safetensors", path);
        ok = st_open(f, file, err) || st_open(f, path, err);
    }
    if (!ok) fatal("%s", err);
    if (f->config == NULL) return false;
    *config = config_defaults();
    if (!config_from_json(config, f->config, err) || !config_check(config, err))
        fatal("%s: its configuration: %s", f->path, err);
    return true;
}

// Removes the directory step-XXXXXXXX + suffix with the files that run_save writes there. Other files stay, and with
// them the directory.
static void remove_step(const char *dir, int64_t step, const char *suffix) {
    char path[PATH_SIZE];
    step_path(path, dir, step, suffix);
    DIR *d = opendir(path);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        char rest[512];
        if (strstr(e->d_name, ".safetensors") == NULL && strcmp(e->d_name, STOPPED) != 0) continue;
        snprintf(rest, sizeof rest, "%s/%s", suffix, e->d_name);
        step_path(path, dir, step, rest);
        if (remove(path) != 0) fprintf(stderr, "warning: cannot remove %s: %s\n", path, strerror(errno));
    }
    if (d == NULL) return;
    closedir(d);
    step_path(path, dir, step, suffix);
    if (remove(path) != 0) fprintf(stderr, "warning: cannot remove %s: %s\n", path, strerror(errno));
}

// Writes DIR/options.txt atomically: an older one is replaced when the new one is complete.
static void write_options(const char *dir, const Option *options) {
    char tmp[PATH_SIZE], path[PATH_SIZE];
    if (snprintf(tmp, sizeof tmp, "%s/options.txt.tmp", dir) >= PATH_SIZE) fatal("--out %s: name too long", dir);
    snprintf(path, sizeof path, "%s/options.txt", dir);
    unlink(tmp); // left by a killed run, or a symbolic link
    FILE *f = fopen(tmp, "wx");
    if (f != NULL) options_write(options, f);
    bool ok = f != NULL && fflush(f) == 0 && !ferror(f) && fsync(fileno(f)) == 0;
    if (f != NULL) ok = fclose(f) == 0 && ok;
    if (ok && rename(tmp, path) == 0) return;
    const int reason = errno;
    unlink(tmp);
    fatal("%s: cannot write: %s", path, strerror(reason));
}

// Creates DIR and its parents. Those that did not exist are removed again if the command fails.
static void make_directories(const char *dir) {
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s/", dir);
    for (char *p = path + 1; *p != 0; p++) {
        if (*p != '/') continue;
        *p = 0;
        if (mkdir(path, 0777) == 0)
            remove_if_refused(path);
        else if (errno != EEXIST)
            fatal("--out %s: %s: %s", dir, path, strerror(errno));
        *p = '/';
    }
}

// Locks DIR until the program ends. On a file system without locks it only prints a warning.
static void lock_directory(const char *dir) {
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s/lock", dir);
    int lock = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (lock >= 0)
        remove_if_refused(path);
    else if (errno == EEXIST)
        lock = open(path, O_RDWR | O_CLOEXEC);
    if (lock < 0) fatal("--out %s: %s", path, strerror(errno));
    if (flock(lock, LOCK_EX | LOCK_NB) == 0) return;
    if (errno == EWOULDBLOCK) fatal("--out %s: another run is writing there now", dir);
    fprintf(stderr, "warning: %s: this file system has no locks (%s); nothing prevents a second run in %s\n", path,
            strerror(errno), dir);
}

// Returns whether a directory holds files, other than hidden ones and a lock, but no options of a run.
static bool is_foreign(const char *dir) {
    char path[PATH_SIZE], err[ST_ERR];
    int files = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;)
        files += e->d_name[0] != '.' && strcmp(e->d_name, "lock") != 0;
    if (d != NULL) closedir(d);
    snprintf(path, sizeof path, "%s/options.txt", dir);
    char *text = read_text(path, err);
    const bool ours = text != NULL && strstr(text, "batch-size ") != NULL;
    free(text);
    return files > 0 && !ours;
}

// Usage error if this command reads a file of step-XXXXXXXX + suffix, which run_begin would delete.
static void refuse_to_delete_inputs(const char *dir, int64_t step, const char *suffix) {
    char folder[PATH_SIZE], path[PATH_SIZE];
    step_path(folder, dir, step, suffix);
    DIR *d = opendir(folder);
    for (struct dirent *e; d != NULL && (e = readdir(d)) != NULL;) {
        if (e->d_name[0] == '.' || snprintf(path, sizeof path, "%s/%s", folder, e->d_name) >= PATH_SIZE) continue;
        const char *flag = claimed_as_input(path);
        if (flag != NULL)
            usage_error("--out %s: would delete %s, which --%s reads; choose another --out", dir, path, flag);
    }
    if (d != NULL) closedir(d);
}

void run_claim(const char *dir, bool resume, bool overwrite) {
    static const char *const names[] = {"lock", "options.txt", "options.txt.tmp"};
    char path[PATH_SIZE];
    int count;
    if (strlen(dir) > PATH_SIZE - 100) fatal("--out %s: name too long", dir);
    int64_t *steps = list_steps(dir, "", &count);
    if (count == 0 && is_foreign(dir))
        fatal("--out %s: holds files but no run; choose a directory that is new, empty or holds a run", dir);
    if (count > 0 && !resume && !overwrite)
        fatal("--out %s: holds a run, at step %lld. Continue it with --resume %s, replace it with --overwrite, or "
              "choose another --out",
              dir, (long long)steps[0], dir);
    for (int i = 0; i < count && overwrite; i++) refuse_to_delete_inputs(dir, steps[i], "");
    free(steps);
    steps = list_steps(dir, ".tmp", &count);
    for (int i = 0; i < count; i++) refuse_to_delete_inputs(dir, steps[i], ".tmp");
    free(steps);
    make_directories(dir);
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        claim_name("out", path);
    }
    lock_directory(dir);
}

void run_refuse_inside(const char *dir, const char *flag, const char *path) {
    char at[PATH_SIZE], folder[PATH_SIZE];
    snprintf(at, sizeof at, "%s", path);
    for (;;) { // the file, then its directories upwards
        const char *name = split_path(at, folder);
        if (strncmp(name, "step-", 5) == 0 && same_file(folder, dir))
            usage_error("--%s %s: lies where the run in %s keeps its checkpoints; give another name", flag, path, dir);
        if (name == at || strcmp(at, folder) == 0) return;
        memcpy(at, folder, sizeof at);
    }
}

void run_begin(const char *dir, const Option *options, bool overwrite) {
    int count;
    write_options(dir, options);
    int64_t *steps = list_steps(dir, ".tmp", &count); // left by killed runs
    for (int i = 0; i < count; i++) remove_step(dir, steps[i], ".tmp");
    free(steps);
    steps = list_steps(dir, "", &count);
    for (int i = 0; i < count && overwrite; i++) remove_step(dir, steps[i], "");
    free(steps);
}

// The validation loss stored in an intact checkpoint; infinite if there is none.
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

static bool is_stopped(const char *dir, int64_t step) {
    char path[PATH_SIZE], rest[16];
    snprintf(rest, sizeof rest, "/%s", STOPPED);
    step_path(path, dir, step, rest);
    return access(path, F_OK) == 0;
}

// Removes all checkpoints but the newest two intact ones, the one with the lowest validation loss, and, if only a
// signal caused it, that of `step`. A damaged checkpoint is removed once there are two newer intact ones.
static void prune(const char *dir, int64_t step) {
    char err[ST_ERR];
    int count, newest = 0, best = -1;
    int64_t *steps = list_steps(dir, "", &count);
    bool *keep = allocate((size_t)count, sizeof *keep);
    double lowest = INFINITY;
    for (int i = 0; i < count; i++) {
        const bool stopped = is_stopped(dir, steps[i]), intact = !stopped && is_intact(dir, steps[i], err);
        const double loss = intact ? step_loss(dir, steps[i]) : INFINITY;
        keep[i] = stopped ? steps[i] == step : newest < 2;
        newest += intact;
        if (loss < lowest) best = i, lowest = loss;
    }
    for (int i = 0; i < count; i++) {
        if (!keep[i] && i != best) remove_step(dir, steps[i], "");
    }
    free(keep);
    free(steps);
}

// ----------------------------------------------------------------------------
// states of --carry-state. Each rank has those of its rows; files have those of the whole batch.

static void free_states(State **states, int n) {
    for (int i = 0; i < n; i++) state_free(states[i]);
    free(states);
}

// The states of the whole batch in rank 0, (n) of dp_size * num_rows rows; freed by the caller. In the other ranks, and
// in all of them if `send` is false, the states are fresh. The chunk-parallel ranks of a sequence have the same state,
// so the first of them sends it.
static State **batch_states(State *const *states, int n, const Config *c, bool send) {
    State **all = allocate((size_t)n, sizeof *all);
    State *received = state_new(c, ranks.num_rows, 1);
    for (int i = 0; i < n; i++) {
        all[i] = state_new(c, ranks.num_rows * ranks.dp_size, 1);
        if (all[i] == NULL || received == NULL) fatal("out of memory for the states");
        void *memory = allocate(states[i]->bytes, 1);
        for (int g = 0; g < ranks.dp_size && send; g++) {
            state_read(states[i], 0, states[i]->bytes, memory);
            ranks_send_to_0(memory, memory, states[i]->bytes, g * ranks.cp_size);
            state_write(received, 0, states[i]->bytes, memory);
            for (int b = 0; b < ranks.num_rows; b++) state_copy(received, b, all[i], g * ranks.num_rows + b, c);
        }
        free(memory);
    }
    state_free(received);
    return all;
}

double run_state_bytes(const Config *c, int n) {
    const double own = (double)state_bytes(c, ranks.num_rows, 1);
    const double batch = (double)state_bytes(c, ranks.num_rows * ranks.dp_size, 1);
    return n * own + (ranks.size > 1 && n > 0 ? n * batch + 2 * own : 0); // 2: `received` and `memory` of batch_states
}

// ----------------------------------------------------------------------------
// saving and loading

static void state_path(char path[PATH_SIZE], const char *dir, int64_t step, const char *suffix, int i) {
    char rest[64];
    snprintf(rest, sizeof rest, "%s/state-%d.safetensors", suffix, i);
    step_path(path, dir, step, rest);
}

// Writes the checkpoint's files to DIR/step-XXXXXXXX.tmp.
static bool write_files(const char *dir, Model *model, State *const *states, int num_states, const Config *config,
                        int64_t seed, int64_t step, double val_loss, bool stopped, char *err) {
    char path[PATH_SIZE], rest[32];
    step_path(path, dir, step, ".tmp/model.safetensors");
    bool ok = save_model(path, model, config, err);
    step_path(path, dir, step, ".tmp/optimizer.safetensors");
    ok = ok && save_optimizer(path, model, config, seed, step, val_loss, err);
    for (int i = 0; i < num_states && ok; i++) {
        state_path(path, dir, step, ".tmp", i);
        ok = save_state(path, states[i], config, seed, NULL, err);
    }
    if (!ok || !stopped) return ok;
    snprintf(rest, sizeof rest, ".tmp/%s", STOPPED);
    step_path(path, dir, step, rest);
    const int mark = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (mark < 0) return snprintf(err, ST_ERR, "%.200s: %s", path, strerror(errno)), false;
    close(mark);
    return true;
}

// In rank 0; states are those of the whole batch. The files are written under a temporary name, synced and then
// renamed.
static void save_checkpoint(const char *dir, Model *model, State *const *states, int num_states, const Config *config,
                            int64_t seed, int64_t step, double val_loss, bool stopped) {
    char tmp[PATH_SIZE], path[PATH_SIZE], err[ST_ERR];
    step_path(tmp, dir, step, ".tmp");
    remove_step(dir, step, ".tmp");
    if (mkdir(tmp, 0777) != 0) fatal("%s: %s", tmp, strerror(errno));
    if (!write_files(dir, model, states, num_states, config, seed, step, val_loss, stopped, err)) {
        remove_step(dir, step, ".tmp"); // frees the space if the disk is full
        fatal("%s", err);
    }
    remove_step(dir, step, ""); // a damaged one
    for (int i = 0; i < num_damaged; i++) damaged[i] = damaged[i] == step ? -1 : damaged[i];
    step_path(path, dir, step, "");
    if (rename(tmp, path) != 0) fatal("%s: cannot rename it: %s", tmp, strerror(errno));
    if (!st_sync_directory(path, err)) fatal("%s", err);
    prune(dir, step);
}

void run_save(const char *dir, Model *model, State *const *states, int num_states, const Config *config, int64_t seed,
              int64_t step, double val_loss, bool stopped) {
    State **gathered = ranks.size > 1 && num_states > 0 ? batch_states(states, num_states, config, true) : NULL;
    if (ranks.rank > 0)
        send_optimizer(model, config);
    else
        save_checkpoint(dir, model, gathered ? gathered : states, num_states, config, seed, step, val_loss, stopped);
    if (gathered) free_states(gathered, num_states);
}

static bool read_files(const char *dir, int64_t step, Model *m, State *const *states, int num_states, const Config *c,
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

char *run_read_options(const char *dir) {
    char path[PATH_SIZE], err[ST_ERR];
    snprintf(path, sizeof path, "%s/options.txt", dir);
    char *text = read_text(path, err);
    if (text == NULL)
        fprintf(stderr, "warning: the run's own options cannot be read; only the command line's hold: %s\n", err);
    return text;
}

int64_t run_load(const char *dir, Model *model, State *const *states, int num_states, const Config *config,
                 int64_t seed) {
    char err[ST_ERR];
    int count;
    State **batch = ranks.size > 1 && num_states > 0 ? batch_states(states, num_states, config, false) : NULL;
    int64_t *steps = list_steps(dir, "", &count), step = -1;
    damaged = allocate((size_t)count, sizeof *damaged);
    for (int i = 0; i < count && step < 0; i++) {
        if (!is_intact(dir, steps[i], err)) continue; // run_newest has printed a warning
        if (read_files(dir, steps[i], model, batch ? batch : states, num_states, config, seed, err)) {
            step = steps[i];
        } else {
            fprintf(stderr, "warning: skipped a damaged checkpoint: %s\n", err);
            damaged[num_damaged++] = steps[i];
        }
    }
    if (step < 0) fatal("--resume %s: no checkpoint loads", dir);
    free(steps);
    if (batch == NULL) return step;
    for (int i = 0; i < num_states; i++) {
        for (int b = 0; b < ranks.num_rows; b++) state_copy(batch[i], ranks.first_row + b, states[i], b, config);
    }
    free_states(batch, num_states);
    return step;
}
