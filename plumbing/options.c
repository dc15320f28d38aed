// The command line: options in a table.
#include <errno.h>  // defines: errno, ERANGE
#include <math.h>   // defines: isfinite
#include <stdlib.h> // defines: free, realpath, strtod, strtoll
#include <string.h> // defines: strcmp, strncmp, strlen, strcspn, strtok
#include "json.h"
#include "plumbing.h"

static const char *const kind_names[] = {"", "", "", "", "", "an integer", "an integer", "a number", "", ""};

static bool is_text(const Option *o) { return o->kind == OPT_TEXT || o->kind == OPT_PATH; }

void write_number(FILE *out, double value) {
    char text[32];
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    fputs(text, out);
}

// Writes the absolute path, which is valid in another working directory too. The file itself need not exist.
static void write_absolute(FILE *out, const char *path) {
    char folder[PATH_SIZE];
    const char *name = split_path(path, folder);
    char *full = realpath(folder, NULL);
    if (full == NULL)
        fputs(path, out);
    else
        fprintf(out, "%s/%s", strcmp(full, "/") == 0 ? "" : full, name);
    free(full);
}

static void print_value(FILE *out, const Option *o) {
    if (is_text(o))
        fputs(*(const char **)o->value, out);
    else if (o->kind == OPT_CHOICE)
        write_choice(out, o->arg, *(int *)o->value);
    else if (o->kind == OPT_REAL)
        write_number(out, *(double *)o->value);
    else if (o->kind == OPT_INT64)
        fprintf(out, "%lld", (long long)*(int64_t *)o->value);
    else
        fprintf(out, "%d", *(int *)o->value);
}

static bool has_value(const Option *o) {
    return o->kind != OPT_HEADING && (!is_text(o) || *(const char **)o->value != NULL);
}

static void print_help(const Option *options, const char *about) {
    printf("%s", about);
    for (const Option *o = options; o->kind != OPT_END; o++) {
        const char *arg = is_text(o)              ? o->arg
                          : o->kind == OPT_CHOICE ? "NAME"
                          : o->kind == OPT_REAL   ? "X"
                          : o->kind >= OPT_INT    ? "N"
                                                  : "";
        if (o->help == NULL) continue;
        int n = o->kind == OPT_HEADING ? printf("\n%s", o->help)
                                       : printf("  --%s%s %s", o->kind == OPT_BOOL ? "[no-]" : "", o->name, arg);
        if (o->kind != OPT_HEADING) printf("%*s  %s", n < 26 ? 26 - n : 0, "", o->help);
        if (o->kind == OPT_BOOL) printf(*(int *)o->value ? " (on)" : " (off)");
        if (o->kind >= OPT_CHOICE && has_value(o)) {
            printf(" (");
            print_value(stdout, o);
            printf(")");
        }
        printf("\n");
    }
    exit(0);
}

// Levenshtein distance of a and b, both at most 31 characters long.
static int distance(const char *a, const char *b) {
    int row[32], m = (int)strlen(b);
    for (int j = 0; j <= m; j++) row[j] = j;
    for (int i = 0; a[i] != 0; i++) {
        int diagonal = row[0];
        row[0] = i + 1;
        for (int j = 0; j < m; j++) {
            int best = diagonal + (a[i] != b[j]);
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j + 1] + 1 < best) best = row[j + 1] + 1;
            diagonal = row[j + 1];
            row[j + 1] = best;
        }
    }
    return row[m];
}

__attribute__((noreturn)) static void refuse_unknown(const Option *options, const char *arg) {
    char name[32];
    snprintf(name, sizeof name, "%.*s", (int)strcspn(arg, "="), arg + strspn(arg, "-"));
    const char *nearest = "help";
    for (const Option *o = options; o->kind != OPT_END; o++) {
        if (o->kind != OPT_HEADING && o->help != NULL && distance(name, o->name) < distance(name, nearest))
            nearest = o->name;
    }
    usage_error("unknown option '%s'; the nearest is --%s", arg, nearest);
}

// The option that an argument names, given without its dashes; *off is set for "no-...".
static Option *find(Option *options, const char *name, size_t length, bool *off) {
    for (Option *o = options; o->kind != OPT_END; o++) {
        if (o->kind == OPT_HEADING) continue;
        *off = o->kind == OPT_BOOL && strncmp(name, "no-", 3) == 0;
        const char *bare = *off ? name + 3 : name;
        size_t n = *off ? length - 3 : length;
        if (strlen(o->name) == n && strncmp(o->name, bare, n) == 0) return o;
    }
    return NULL;
}

// Parses text as the value of o; returns false if it is invalid or out of range.
static bool set_value(const Option *o, const char *text) {
    char *end = NULL;
    double number = 0;
    int64_t whole = 0;
    errno = 0;
    if (is_text(o)) {
        *(const char **)o->value = text;
        return true;
    }
    if (o->kind == OPT_CHOICE) {
        const int index = choice_index(o->arg, text);
        if (index >= 0) *(int *)o->value = index;
        return index >= 0;
    }
    if (o->kind == OPT_REAL) {
        number = strtod(text, &end);
    } else {
        whole = strtoll(text, &end, 10);
        number = (double)whole;
    }
    bool overflow = errno == ERANGE && (o->kind != OPT_REAL || !isfinite(number));
    const double min = o->kind < OPT_INT ? 0 : o->min, max = o->kind < OPT_INT ? 1 : o->max; // switches are 0 or 1
    bool in_range = number >= min && number <= max;
    if (end == text || *end != 0 || overflow || !in_range) return false;
    if (o->kind == OPT_REAL)
        *(double *)o->value = number;
    else if (o->kind == OPT_INT64)
        *(int64_t *)o->value = whole;
    else
        *(int *)o->value = (int)whole;
    return true;
}

void options_parse(Option *options, int argc, char **argv, const char *about) {
    bool kept = false;
    for (Option *o = options; o->kind != OPT_END; o++) kept = o->kept = o->kind == OPT_HEADING ? o->kept : kept;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) print_help(options, about);
    }
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *equals = strchr(arg, '=');
        if (strncmp(arg, "--", 2) != 0) usage_error("unexpected argument '%s'", arg);
        bool off;
        size_t length = equals != NULL ? (size_t)(equals - arg) : strlen(arg);
        Option *o = find(options, arg + 2, length - 2, &off);
        if (o == NULL || o->help == NULL) refuse_unknown(options, arg);
        o->given = true;
        if (o->kind == OPT_SWITCH || o->kind == OPT_BOOL) {
            if (equals != NULL) usage_error("--%s takes no value", o->name);
            *(int *)o->value = !off;
            continue;
        }
        const char *value = equals != NULL ? equals + 1 : i + 1 < argc ? argv[++i] : NULL;
        if (value == NULL) usage_error("--%s needs a value", o->name);
        if (o->kind == OPT_PATH && (value[0] == 0 || strchr(value, '\n') != NULL))
            usage_error("--%s '%s': not the name of a file or directory", o->name, value);
        const bool valid = set_value(o, value);
        if (!valid && o->kind == OPT_CHOICE) usage_error("--%s %s: it is one of: %s", o->name, value, o->arg);
        if (!valid)
            usage_error("--%s %s: not %s from %.10g to %.10g", o->name, value, kind_names[o->kind], o->min, o->max);
    }
}

const Option *option_given(const Option *options, const void *value) {
    for (const Option *o = options; o->kind != OPT_END; o++) {
        if (o->value == value && o->given) return o;
    }
    return NULL;
}

void options_refuse_lines(const Option *options) {
    for (const Option *o = options; o->kind != OPT_END; o++) {
        char *text = NULL;
        size_t size;
        if (!o->kept || o->kind != OPT_PATH || !has_value(o)) continue;
        FILE *f = open_memstream(&text, &size);
        if (f == NULL) fatal("out of memory");
        write_absolute(f, *(const char **)o->value);
        fclose(f);
        if (strchr(text, '\n') != NULL)
            usage_error(
                "--%s %s: its full path has a line break, so that the run could not be resumed; rename the directory",
                o->name, text);
        free(text);
    }
}

void options_write(const Option *options, FILE *out) {
    for (const Option *o = options; o->kind != OPT_END; o++) {
        if (!o->kept || !has_value(o)) continue;
        fprintf(out, "%s ", o->name);
        if (o->kind == OPT_PATH)
            write_absolute(out, *(const char **)o->value);
        else
            print_value(out, o);
        fputc('\n', out);
    }
}

bool options_read(Option *options, char *text, char *err) {
    bool off;
    for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        size_t length = strcspn(line, " ");
        Option *o = find(options, line, length, &off);
        bool ok = o != NULL && o->kept && line[length] == ' ' && set_value(o, line + length + 1);
        if (!ok) return snprintf(err, ST_ERR, "'%.100s' is no option", line), false;
    }
    return true;
}
