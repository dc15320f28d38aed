// ./compare A B: compares the tensors that two safetensors files share, in the order in which the model computes them,
// so that the first one over tolerance shows where an error arises. A is the reference.
#include <fnmatch.h> // defines: fnmatch
#include <math.h>    // defines: fabs, fmax, isfinite, isnan, sqrtl
#include <stdbool.h> // defines: bool
#include <stdlib.h>  // defines: qsort, calloc, strtod, strtol, getenv
#include <string.h>  // defines: strcmp, strncmp, strlen
#include <unistd.h>  // defines: isatty
#include "../megalodon.h"
#include "safetensors.h"

static const char help[] = "usage: ./compare A.safetensors B.safetensors [--tolerance X] [--only PATTERN] [--top N]\n"
                           "Compares the tensors that A and B share, in data-flow order. A tensor passes\n"
                           "if |A - B| / |A|, L2 norms, is at most 5e-6 (grad.*: 2e-5, train.*: 2e-6), or X;\n"
                           "integers must be equal. NaN fails; so does act.*, grad.* or loss that B lacks.\n"
                           "F64, F32, F16, BF16, I64 and I32 are compared, other types are listed.\n"
                           "--only 'grad.*'   compares the tensors whose names match; * is any text, ? any character\n"
                           "--top 10          prints the 10 worst tensors only, by |A - B| / |A|; all are compared\n"
                           "Exit status: 0 all passed, 1 some failed, 2 wrong usage or an unreadable file.\n";

// The order of the data flow. A name belongs to the first entry that it starts with; "*" stands for "layers.i.". Layers
// stay together. Names of one entry, or of none, keep the file's order.
static const char *const input_order[] = {"tokens", "targets", NULL};
static const char *const act_order[] = {"final_norm", "logits", NULL}; // after those of the layers, see entry()
static const char *const grad_order[] = {
    "output.output.", "output.final_norm.", "*nffn.alpha",     "*nffn.fc2.", "*nffn.fc3.",  "*nffn.fc1.", "*nffn.norm.",
    "*mega.wh2.",     "*mega.wh1.",         "*mega.wr.",       "*mega.wv.",  "*mega.gamma", "*mega.beta", "*mega.wz.",
    "*mega.rmsnorm.", "*mega.cema.",        "*mega.timenorm.", "embed.",     NULL};
static const char *const no_order[] = {NULL};

typedef enum { INPUT, ACT, LOSS, TRAIN, GRAD, OTHER, KINDS } Kind;
static const struct {
    const char *prefix, *title;
    double tolerance;
    const char *const *order;
} kinds[KINDS] = {
    {"input.", "input", 5e-6, input_order},  {"act.", "activation", 5e-6, act_order},
    {"loss", "loss", 5e-6, no_order},        {"train.", "training step", 2e-6, no_order},
    {"grad.", "gradient", 2e-5, grad_order}, {"", "parameter", 5e-6, no_order},
};

typedef struct {
    const StTensor *a, *b; // b is NULL if B lacks the tensor
    Kind kind;
    int layer;               // -1 if in none; for gradients counted from the last layer
    int place;               // index in the kind's order
    double max_abs;          // max |a - b| over the elements
    double relative;         // |A - B| / |A|, L2 norms
    double cosine;           // of the angle between A and B
    int64_t worst;           // the element that differs most, or the first NaN
    double worst_a, worst_b; // its values
    double tolerance;        // for relative
    bool measured;           // B has the tensor with the same shape and a type that can be read
    bool passed;
    char note[256]; // replaces the measures if there are none; otherwise ""
} Row;

static double tolerance = -1; // for all tensors; negative: the default of each kind
static const char *only;      // pattern of the names to compare; NULL: all
static long top;              // number of worst tensors to print; 0: all tensors in data-flow order

static const char *red = "", *green = "", *bold = "", *plain = "";

static Kind kind_of(const char *name) {
    for (int k = 0; k < OTHER; k++) {
        size_t n = strlen(kinds[k].prefix) + (k == LOSS); // "loss" is a whole name
        if (strncmp(name, kinds[k].prefix, n) == 0) return (Kind)k;
    }
    return OTHER;
}

// printf prints some NaNs as "-nan"; their sign has no meaning.
static double shown(double value) { return isnan(value) ? (double)NAN : value; }

static bool readable(const StTensor *t) { return t->type != ST_OTHER; }

static bool required(Kind kind) { return kind == ACT || kind == LOSS || kind == GRAD; }

// Entry i of a kind's order, NULL after the last. Activations of layers are in the order of the model's table.
static const char *entry(Kind kind, int i, bool *in_layer) {
    const char *const *order = kinds[kind].order;
    for (int n = 0; kind == ACT; n++) {
        const char *name = megalodon_activation_name(n);
        *in_layer = name != NULL;
        if (name == NULL) return order[i - n];
        if (n == i) return name;
    }
    *in_layer = order[i] != NULL && order[i][0] == '*';
    return *in_layer ? order[i] + 1 : order[i];
}

static Row make_row(const StTensor *a, const StTensor *b) {
    Row r = {.a = a, .b = b, .kind = kind_of(a->name), .layer = -1};
    const char *rest = a->name + strlen(kinds[r.kind].prefix), *e;
    int layer = 0, used = 0;
    bool in_layer;
    sscanf(rest, "layers.%9d.%n", &layer, &used);
    for (; (e = entry(r.kind, r.place, &in_layer)) != NULL; r.place++) {
        if ((used > 0) == in_layer && strncmp(e, rest + used, strlen(e)) == 0) break;
    }
    if (used > 0 && e != NULL) r.layer = r.kind == GRAD ? 999999999 - layer : layer;
    return r;
}

static int by_data_flow(const void *x, const void *y) {
    const Row *r = x, *s = y;
    if (r->kind != s->kind) return r->kind < s->kind ? -1 : 1;
    if (r->layer >= 0 && s->layer >= 0 && r->layer != s->layer) return r->layer < s->layer ? -1 : 1;
    if (r->place != s->place) return r->place < s->place ? -1 : 1;
    return (r->a > s->a) - (r->a < s->a);
}

// What could not be measured comes first, then NaN, then the largest relative error.
static int by_error(const void *x, const void *y) {
    const Row *r = x, *s = y;
    if (r->measured != s->measured) return r->measured ? 1 : -1;
    if (isnan(r->relative) != isnan(s->relative)) return isnan(r->relative) ? -1 : 1;
    if (r->relative != s->relative && !isnan(r->relative)) return r->relative > s->relative ? -1 : 1;
    return by_data_flow(x, y);
}

static bool exact(const Row *r) { return st_is_integer(r->a->type) && st_is_integer(r->b->type); }

// Compares two tensors of one shape, a part at a time, so that memory is constant.
static bool measure(StFile *fa, StFile *fb, Row *r, char *err) {
    enum { PART = 8192 };
    static union {
        double real;
        int64_t whole;
    } a[PART], b[PART];
    const bool whole = exact(r);
    const StType as = whole ? ST_I64 : ST_F64;
    if (whole) r->tolerance = 0;
    long double xx = 0, yy = 0, xy = 0, dd = 0; // where long double is longer than double, squares do not overflow
    bool a_zero = true, b_zero = true;
    r->max_abs = -1;
    for (int64_t n = st_count(r->a), start = 0; start < n; start += PART) {
        const int64_t part = n - start < PART ? n - start : PART;
        if (!st_read(fa, r->a, start, part, a, as, err)) return false;
        if (!st_read(fb, r->b, start, part, b, as, err)) return false;
        for (int64_t i = 0; i < part; i++) {
            double x = whole ? (double)a[i].whole : a[i].real, y = whole ? (double)b[i].whole : b[i].real;
            double diff = fabs(x - y);
            if (whole && a[i].whole != b[i].whole) diff = fmax(diff, 1); // the integers may round to the same double
            xx += (long double)x * x;
            yy += (long double)y * y;
            xy += (long double)x * y;
            dd += (long double)diff * diff;
            a_zero = a_zero && x == 0;
            b_zero = b_zero && y == 0;
            if (isnan(r->max_abs) || diff <= r->max_abs) continue;
            r->max_abs = diff;
            r->worst = start + i;
            r->worst_a = x;
            r->worst_b = y;
        }
    }
    r->relative = r->max_abs == 0 ? 0 : (double)(sqrtl(dd) / sqrtl(xx));
    r->cosine = xx > 0 && yy > 0 ? (double)(xy / (sqrtl(xx) * sqrtl(yy))) : NAN;
    if (a_zero) snprintf(r->note, sizeof r->note, "all zero in %s", b_zero ? "both" : "A, but not in B");
    r->passed = a_zero ? b_zero : r->relative <= r->tolerance; // false for NaN
    return true;
}

// Formats the shape, "2x48x64", or the indices of an element, "0,40,12", if element is not negative.
static char *tuple(char text[200], const StTensor *t, int64_t element) {
    int at = snprintf(text, 200, "%s", t->ndim == 0 ? "scalar" : "");
    int64_t stride = st_count(t);
    for (int i = 0; i < t->ndim; i++) {
        if (element >= 0) stride /= t->shape[i];
        long long value = element >= 0 ? element / stride % t->shape[i] : t->shape[i];
        at += snprintf(text + at, 200 - (size_t)at, "%s%lld", i == 0 ? "" : element >= 0 ? "," : "x", value);
    }
    return text;
}

// A scalar equals a vector of one element: programs differ in how they write the loss.
static bool same_shape(const StTensor *a, const StTensor *b) {
    if (a->ndim <= 1 && b->ndim <= 1) return st_count(a) == st_count(b);
    bool same = a->ndim == b->ndim;
    for (int i = 0; same && i < a->ndim; i++) same = a->shape[i] == b->shape[i];
    return same;
}

static void print_row(const Row *r, int name_width, int shape_width) {
    char shape[200], place[200];
    printf("%-*s  %-*s  ", name_width, r->a->name, shape_width, tuple(shape, r->a, -1));
    if (r->note[0] != 0) {
        printf("%7s  %7s  %9s  %-*s", "-", "-", "-", shape_width + 32, r->note);
    } else {
        printf("%7.1e  %7.1e  %9.7f  %-*s", shown(r->max_abs), shown(r->relative), shown(r->cosine), shape_width,
               tuple(place, r->a, r->worst));
        printf("  %14.8g  %14.8g", shown(r->worst_a), shown(r->worst_b));
    }
    printf("  %s%s%s\n", r->passed ? green : red, r->passed ? "ok" : "FAIL", plain);
}

typedef struct {
    int compared;   // tensors that were compared
    int failed;     // of these, those over tolerance
    int unmeasured; // tensors that B lacks or has with another shape or type; they fail, too
} Counts;

// Compares a row's tensors if they can be compared. Returns false if a file cannot be read.
static bool compare_row(StFile *fa, StFile *fb, Row *r, char *err) {
    char shape[200];
    r->measured = r->b != NULL && readable(r->b) && same_shape(r->a, r->b);
    r->tolerance = tolerance >= 0 ? tolerance : kinds[r->kind].tolerance;
    if (r->b == NULL)
        snprintf(r->note, sizeof r->note, "not in B");
    else if (!readable(r->b))
        snprintf(r->note, sizeof r->note, "B has type %s", r->b->dtype);
    else if (!r->measured)
        snprintf(r->note, sizeof r->note, "B has shape %s", tuple(shape, r->b, -1));
    return !r->measured || measure(fa, fb, r, err);
}

// The mark of the first row that fails. With --top it stands after the table, and names the tensor.
static void print_first(const Row *r) {
    printf("%s%sfirst %s%s in data-flow order: ", red, top > 0 ? "" : "<-- ",
           r->measured ? "over tolerance" : "failure", plain);
    if (top > 0) printf("%s: ", r->a->name);
    if (r->measured)
        printf("%.2g is not <= %.2g\n", shown(r->relative), r->tolerance);
    else
        printf("%s\n", r->note);
}

// Compares all rows and prints them, or the worst ones. Returns false if a file cannot be read.
static bool print_table(StFile *fa, StFile *fb, Row *rows, int count, Counts *n, char *err) {
    int names = 4, shapes = 8; // widths
    char shape[200];
    const Row *first = NULL; // that fails
    for (const Row *r = rows; r < rows + count; r++) {
        int name = (int)strlen(r->a->name), length = (int)strlen(tuple(shape, r->a, -1));
        names = name > names ? name : names;
        shapes = length > shapes ? length : shapes;
    }
    printf("%s%-*s  %-*s  max abs   rel L2     cosine  ", bold, names, "name", shapes, "shape");
    printf("%-*s  %14s  %14s%s\n", shapes, "worst at", "A", "B", plain);
    for (Row *r = rows; r < rows + count; r++) {
        if (!compare_row(fa, fb, r, err)) return false;
        *(r->measured ? &n->compared : &n->unmeasured) += 1;
        n->failed += r->measured && !r->passed;
        const bool mark = first == NULL && !r->passed;
        if (mark) first = r;
        if (top > 0) continue;
        if (r == rows || r[-1].kind != r->kind) printf("\n");
        print_row(r, names, shapes);
        if (mark) print_first(r);
    }
    if (top == 0) return true;
    const Row marked = first != NULL ? *first : (Row){0};
    qsort(rows, (size_t)count, sizeof *rows, by_error);
    printf("\n");
    for (const Row *r = rows; r < rows + count && r < rows + top; r++) print_row(r, names, shapes);
    qsort(rows, (size_t)count, sizeof *rows, by_data_flow);
    if (first != NULL) print_first(&marked);
    return true;
}

// Returns whether a tensor of A is in the table: it can be read, and B must have it, or has it and it can be read there
// too.
static bool in_table(const StTensor *a, const StTensor *b) {
    return readable(a) && (required(kind_of(a->name)) || (b != NULL && readable(b)));
}

static bool selected(const StTensor *t) { return only == NULL || fnmatch(only, t->name, 0) == 0; }

// Lists the tensors of A that are not in the table, then those of B that A lacks.
static void list_others(const StFile *fa, const StFile *fb) {
    for (const StTensor *a = fa->tensors; a < fa->tensors + fa->count; a++) {
        const StTensor *b = st_find(fb, a->name);
        if (in_table(a, b) || !selected(a)) continue;
        if (b == NULL)
            printf("not compared, only in %s: %s\n", fa->path, a->name);
        else
            printf("not compared, of type %s in %s: %s\n", readable(a) ? b->dtype : a->dtype,
                   readable(a) ? fb->path : fa->path, a->name);
    }
    for (const StTensor *b = fb->tensors; b < fb->tensors + fb->count; b++) {
        if (st_find(fa, b->name) == NULL && selected(b)) printf("not compared, only in %s: %s\n", fb->path, b->name);
    }
}

static void print_summary(const Row *rows, int count, const Counts *n) {
    for (int k = 0; k < KINDS; k++) {
        const Row *worst = NULL; // the first NaN, if there is one
        for (const Row *r = rows; r < rows + count; r++) {
            if ((int)r->kind != k || r->note[0] != 0 || exact(r)) continue;
            if (worst == NULL || (!isnan(worst->relative) && !(r->relative <= worst->relative))) worst = r;
        }
        if (worst == NULL) continue;
        printf("worst %-13s  %.1e at %s\n", kinds[k].title, shown(worst->relative), worst->a->name);
    }
    const bool good = n->compared > 0 && n->failed + n->unmeasured == 0;
    printf("%s%d tensors compared, %d passed, %d failed%s", good ? green : red, n->compared, n->compared - n->failed,
           n->failed, plain);
    if (n->unmeasured > 0) printf("; %s%d not in B, or with another shape or type there%s", red, n->unmeasured, plain);
    printf("\n");
    if (n->compared == 0)
        printf("nothing was compared: the files share no tensor that can be compared%s%s\n",
               only != NULL ? " and whose name matches --only " : "", only != NULL ? only : "");
}

// Returns the exit status.
static int compare_files(StFile *fa, StFile *fb, char *err) {
    Row *rows = calloc((size_t)fa->count + 1, sizeof *rows);
    int count = 0;
    Counts n = {0};
    if (rows == NULL) return snprintf(err, ST_ERR, "out of memory"), 2;
    for (const StTensor *t = fa->tensors; t < fa->tensors + fa->count; t++) {
        const StTensor *other = st_find(fb, t->name);
        if (in_table(t, other) && selected(t)) rows[count++] = make_row(t, other);
    }
    qsort(rows, (size_t)count, sizeof *rows, by_data_flow);
    const bool read = print_table(fa, fb, rows, count, &n, err);
    if (read) {
        printf("\n");
        list_others(fa, fb);
        print_summary(rows, count, &n);
    }
    free(rows);
    return !read ? 2 : n.failed + n.unmeasured > 0 || n.compared == 0;
}

static int usage(const char *problem, const char *what) {
    fprintf(stderr, "compare: %s%s\n%s", problem, what, help);
    return 2;
}

// If `arg` is the option, returns its value: what follows a '=', or the next argument. Otherwise returns NULL.
static const char *option_value(const char *option, const char *arg, const char *next) {
    const size_t length = strlen(option);
    if (strncmp(arg, option, length) != 0 || (arg[length] != 0 && arg[length] != '=')) return NULL;
    return arg[length] == '=' ? arg + length + 1 : next;
}

int main(int argc, char **argv) {
    const char *paths[2];
    int given = 0;
    for (int i = 1; i < argc && argv[i] != NULL; i++) {
        const char *arg = argv[i], *next = i + 1 < argc ? argv[i + 1] : "", *value;
        char *end = "";
        if (strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0) {
            fputs(help, stdout);
            return 0;
        } else if ((value = option_value("--tolerance", arg, next)) != NULL) {
            tolerance = strtod(value, &end);
            if (end == value || *end != 0 || !(tolerance >= 0 && isfinite(tolerance)))
                return usage("--tolerance needs a number, 0 or more, not ", value[0] != 0 ? value : "nothing");
        } else if ((value = option_value("--only", arg, next)) != NULL) {
            only = value;
            if (value[0] == 0) return usage("--only needs a name or a pattern, such as 'grad.*'", "");
        } else if ((value = option_value("--top", arg, next)) != NULL) {
            top = strtol(value, &end, 10);
            if (end == value || *end != 0 || top < 1 || top > 1000000)
                return usage("--top needs a whole number from 1 to 1000000, not ", value[0] != 0 ? value : "nothing");
        } else if (arg[0] == '-' || given == 2) {
            return usage(arg[0] == '-' ? "unknown option " : "more than two files: ", arg);
        } else {
            paths[given++] = arg;
        }
        i += value == next;
    }
    if (given < 2) return usage("two files are needed", "");
    const char *no_color = getenv("NO_COLOR");
    if (isatty(STDOUT_FILENO) && (no_color == NULL || no_color[0] == 0)) {
        red = "\033[31m", green = "\033[32m", bold = "\033[1m", plain = "\033[0m";
    }
    char err[ST_ERR];
    StFile a = {0}, b = {0};
    bool opened = st_open(&a, paths[0], err) && st_open(&b, paths[1], err);
    int status = opened ? compare_files(&a, &b, err) : 2;
    if ((fflush(stdout) != 0 || ferror(stdout)) && status < 2) {
        snprintf(err, sizeof err, "stdout: the result could not be written");
        status = 2;
    }
    if (status == 2) fprintf(stderr, "compare: %s\n", err);
    st_close(&a);
    st_close(&b);
    return status;
}
