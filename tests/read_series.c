// Checks a run's log against what another program's run gave: ./read_series EXPECT.safetensors LOG.csv
// The columns loss and grad_norm must be the file's train.losses and train.grad_norms, within 2e-6.
#include "check.h"
#include "../plumbing/safetensors.h"

enum { MAX_STEPS = 64, LINE = 512 };

// The column of that name of a log, a number for every row; 0 where there is none. Returns the number of
// rows.
static int read_column(double values[MAX_STEPS], const char *path, const char *name) {
    char line[LINE], *cell;
    int column = -1, rows = -1; // the first row has the names
    FILE *log = fopen(path, "r");
    while (log && rows < MAX_STEPS && fgets(line, sizeof line, log)) {
        char *rest = line;
        if (rows >= 0) values[rows] = 0;
        for (int i = 0; (cell = strsep(&rest, ",\n")) != NULL; i++) {
            if (rows < 0 && strcmp(cell, name) == 0) column = i;
            if (rows >= 0 && i == column) values[rows] = strtod(cell, NULL);
        }
        rows++;
    }
    if (log) fclose(log);
    return rows;
}

int main(int argc, char **argv) {
    static const char *const series[2][2] = {{"train.losses", "loss"}, {"train.grad_norms", "grad_norm"}};
    char err[ST_ERR];
    StFile file;
    if (argc != 3 || !st_open(&file, argv[1], err)) {
        fprintf(stderr, "error: %s\n", argc != 3 ? "usage: ./read_series EXPECT.safetensors LOG.csv" : err);
        return 2;
    }
    for (int i = 0; i < 2; i++) {
        double expected[MAX_STEPS], values[MAX_STEPS] = {0};
        const StTensor *t = st_find(&file, series[i][0]);
        int64_t steps = t ? st_count(t) : 0;
        int good = steps > 0 && steps <= MAX_STEPS && st_read(&file, t, 0, steps, expected, ST_F64, err);
        if (!good || read_column(values, argv[2], series[i][1]) != steps) {
            check_true(series[i][0], 0);
        } else {
            check(series[i][0], values, expected, (size_t)steps, 2e-6);
        }
    }
    st_close(&file);
    return check_done();
}
