// The log of a run: a CSV file with a row for every step.
#include <errno.h>  // defines: errno
#include <math.h>   // defines: isnan
#include <stdlib.h> // defines: strtoll
#include <string.h> // defines: strchr, strcmp, strerror
#include "plumbing.h"

static const char header[] = "step,loss,grad_norm,lr,ms,tokens_per_s,val_loss\n";

bool is_log(const char *path) {
    char line[512] = "";
    FILE *f = fopen(path, "r");
    const bool ok = f != NULL && fgets(line, sizeof line, f) != NULL && strcmp(line, header) == 0;
    if (f != NULL) fclose(f);
    return ok;
}

FILE *log_open(const char *path, int64_t step) {
    char line[512] = "", tmp[PATH_SIZE];
    FILE *old = step > 0 ? fopen(path, "r") : NULL;
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    FILE *file = fopen(tmp, "w");
    if (file == NULL) fatal("--log %s: cannot write: %s", tmp, strerror(errno));
    remove_if_refused(tmp);
    fputs(header, file);
    if (old != NULL && fgets(line, sizeof line, old) == NULL) line[0] = 0; // skips the old header
    while (old != NULL && fgets(line, sizeof line, old) != NULL) {
        const bool complete = strchr(line, '\n') != NULL;
        if (strtoll(line, NULL, 10) <= step && complete) fputs(line, file);
    }
    if (fflush(file) != 0 || ferror(file)) fatal("--log %s: %s", tmp, strerror(errno));
    if (old != NULL) fclose(old);
    return file;
}

void log_replace(const char *path) {
    char tmp[PATH_SIZE];
    snprintf(tmp, sizeof tmp, "%s.tmp", path);
    if (rename(tmp, path) != 0) fatal("--log %s: %s", path, strerror(errno));
}

bool log_write(FILE *file, const LogRow *row) {
    fprintf(file, "%lld,%.9g,%.9g,%.9g,%.9g,%.9g,", (long long)row->step, row->loss, row->grad_norm, row->lr,
            row->seconds * 1e3, row->tokens_per_s);
    if (!isnan(row->val_loss)) fprintf(file, "%.9g", row->val_loss);
    return fputc('\n', file) != EOF && fflush(file) == 0;
}
