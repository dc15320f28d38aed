// Claims of inputs and outputs, made before the work begins: no output may be an input, another output, or a file that
// this program would not have written.
#include <errno.h>    // defines: errno, ENOENT
#include <fcntl.h>    // defines: open
#include <stdlib.h>   // defines: free, realloc, realpath
#include <string.h>   // defines: strcmp, strdup, strerror, strrchr
#include <sys/stat.h> // defines: lstat, stat
#include <unistd.h>   // defines: access, close, unlink
#include "plumbing.h"

// Two paths are compared by device and inode, or, for files that do not exist yet, by those of the directory and the
// last component: see same_file().
typedef struct {
    const char *flag; // without the dashes
    char *path;
    bool output; // or else an input
} Claim;

static Claim *claims;
static int num_claims;

static void remember(const char *flag, const char *path, bool output) {
    Claim *longer = realloc(claims, (size_t)(num_claims + 1) * sizeof *claims);
    if (longer == NULL) fatal("out of memory");
    claims = longer;
    claims[num_claims] = (Claim){flag, strdup(path), output};
    if (claims[num_claims++].path == NULL) fatal("out of memory");
}

const char *split_path(const char *path, char folder[PATH_SIZE]) {
    const char *slash = strrchr(path, '/');
    const int length = slash == NULL || slash == path ? 1 : (int)(slash - path);
    snprintf(folder, PATH_SIZE, "%.*s", length, slash == NULL ? "." : path);
    return slash == NULL ? path : slash + 1;
}

static bool same_inode(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

bool same_file(const char *a, const char *b) {
    char a_folder[PATH_SIZE], b_folder[PATH_SIZE];
    if (same_inode(a, b)) return true;
    return strcmp(split_path(a, a_folder), split_path(b, b_folder)) == 0 && same_inode(a_folder, b_folder);
}

static const Claim *find_claim(const char *path) {
    for (const Claim *c = claims; c < claims + num_claims; c++) {
        if (same_file(c->path, path)) return c;
    }
    return NULL;
}

void claim_input(const char *flag, const char *path) {
    const Claim *c = find_claim(path);
    if (c != NULL && c->output) usage_error("--%s %s: --%s writes this file", flag, path, c->flag);
    remember(flag, path, false);
}

const char *claimed_as_input(const char *path) {
    const Claim *c = find_claim(path);
    return c != NULL && !c->output ? c->flag : NULL;
}

void claim_name(const char *flag, const char *path) {
    const Claim *c = find_claim(path);
    if (c != NULL)
        usage_error("--%s %s: is the file that --%s %s; give another name", flag, path, c->flag,
                    c->output ? "writes" : "reads");
    remember(flag, path, true);
}

const char *claim_output(const char *flag, const char *path, const char *what, bool (*is_ours)(const char *path)) {
    struct stat info;
    char tmp[PATH_SIZE], folder[PATH_SIZE];
    const bool link = lstat(path, &info) == 0 && S_ISLNK(info.st_mode);
    char *linked = link ? realpath(path, NULL) : NULL;
    if (link && linked == NULL) fatal("--%s %s: a symbolic link to no file; remove it", flag, path);
    const char *target = link ? linked : path;
    if (snprintf(tmp, sizeof tmp, "%s.tmp", target) >= PATH_SIZE) fatal("--%s %s: name too long", flag, path);
    claim_name(flag, path);
    claim_name(flag, tmp);
    if (link) { // the caller gets the copy that the claims own
        remember(flag, linked, true);
        target = claims[num_claims - 1].path;
        free(linked);
    }
    const bool exists = stat(path, &info) == 0;
    if (!exists && errno != ENOENT) fatal("--%s %s: %s", flag, path, strerror(errno));
    if (exists && strcmp(split_path(target, folder), "lock") == 0)
        fatal("--%s %s: exists and is not %s; it may be the lock of a run; give another name", flag, path, what);
    if (exists && !S_ISREG(info.st_mode)) fatal("--%s %s: cannot write: not a regular file", flag, path);
    if (exists && info.st_size > 0 && !is_ours(path))
        fatal("--%s %s: exists and is not %s; give another name or remove it", flag, path, what);
    if (exists && access(path, W_OK) != 0) fatal("--%s %s: %s", flag, path, strerror(errno));
    const bool left = lstat(tmp, &info) == 0 && S_ISREG(info.st_mode) && (info.st_size == 0 || is_ours(tmp));
    if (left) return target; // left by a killed command; will be replaced
    const int fd = open(tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0 && errno == EEXIST)
        fatal("--%s %s: %s exists; it may be left by a killed command: remove it", flag, path, tmp);
    if (fd < 0) fatal("--%s %s: cannot write: %s", flag, path, strerror(errno));
    close(fd);
    unlink(tmp);
    return target;
}
