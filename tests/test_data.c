// The rows that training and validation read: where they start, what follows, documents, streams that are carried on.
#include <unistd.h> // defines: unlink
#include "../plumbing/plumbing.h"
#include "check.h"

enum { B = 4, L = 10, MOST = 64 };
static char path[] = "build/test_data.bytes";
static int32_t inputs[MOST * L], targets[MOST * L], other[MOST * L], unused[MOST * L];
static bool fresh[MOST];

static Tokens tokens_of(const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    if (f == NULL || fwrite(bytes, 1, n, f) != n || fclose(f) != 0) exit(1);
    return tokens_open(path, 256);
}

static void test_rows(void) {
    enum { N = 1000, STEPS = 4000 };
    unsigned char bytes[N];
    int seen[N] = {0}, first = 1, last = 0, successors = 1, starts = 0;
    for (int i = 0; i < N; i++) bytes[i] = (unsigned char)(i / 4); // a token and its place: t = 4 * token + ...
    Tokens t = tokens_of(bytes, N), tail = tokens_part(&t, 900, 100);
    Reader r = reader_new(&t, "a test", 5, B, L, -1, false), two = reader_new(&t, "a test", 5, 2, L, -1, false);
    Reader six = reader_new(&t, "a test", 6, B, L, -1, false),
           windows = reader_new(&tail, "a test", 1, B, L, -1, false);
    for (int step = 0; step < STEPS; step++) {
        reader_step(&r, step, inputs, targets, fresh);
        for (int b = 0; b < B; b++) {
            seen[4 * inputs[b * L]]++;
            first &= inputs[b * L] <= (N - L - 1) / 4 && fresh[b];
            last |= targets[b * L + L - 1] == bytes[N - 1];
            for (int i = 1; i < L; i++) successors &= inputs[b * L + i] == targets[b * L + i - 1];
        }
    }
    for (int i = 0; i < N; i++) starts += seen[i] > 0;
    check_true("rows: targets are the next tokens", successors);
    check_true("rows: start everywhere, end within the data", first && last && starts == (N - L - 1) / 4 + 1);
    reader_step(&r, 9, inputs, targets, fresh);
    reader_step(&two, 9, other, unused, fresh);
    check_same("rows: the same whatever the number of rows", inputs, other, 2 * L * sizeof *other);
    reader_step(&six, 9, other, unused, fresh);
    check_true("rows: another seed gives others", memcmp(inputs, other, B * L * sizeof *other) != 0);
    Cursor c = {0};
    int count = read_windows(&windows, &c, B, inputs, targets);
    check_true("windows: first ones", count == B && inputs[0] == 225 && inputs[L] == bytes[910]);
    read_windows(&windows, &c, B, inputs, targets);
    count = read_windows(&windows, &c, B, inputs, targets);
    check_true("windows: only one that has a token behind it is left", count == 1 && targets[L - 1] == bytes[990]);
    check_true("windows: then none", read_windows(&windows, &c, B, inputs, targets) == 0);
    reader_free(&r), reader_free(&two), reader_free(&six), reader_free(&windows);
}

// Is it row `row` of the arrays: these tokens, after each the next one as target, then '|' without target?
static int is_row(int row, const char *text) {
    int n = (int)strlen(text) - 1;
    for (int i = 0; i < L; i++) {
        if (inputs[row * L + i] != (i < n ? text[i] : '|') || targets[row * L + i] != (i < n ? text[i + 1] : -1))
            return 0;
    }
    return 1;
}

// Documents abc, 12 letters, one letter, none, and one that the data's end cuts off.
static void test_documents(void) {
    static const char text[] = "abc|defghijklmno|p||qrs", *const rows[] = {"abc|", "|defghijklmno|", "|p|", "|qrs"};
    int drawn[4] = {0}, right = 1;
    Tokens t = tokens_of(text, strlen(text));
    Reader r = reader_new(&t, "a test", 3, MOST, L, '|', false);
    check_true("documents: counted without the empty one", r.count == 4);
    for (int step = 0; step < 4; step++) {
        reader_step(&r, step, inputs, targets, fresh);
        for (int b = 0; b < MOST; b++) {
            int d = 0;
            while (d < 4 && inputs[b * L] + 256 * inputs[b * L + 1] != rows[d][0] + 256 * rows[d][1]) d++;
            drawn[d % 4]++;
            right &= d < 4 && fresh[b] && is_row(b, d == 1 ? "|defghijklm" : rows[d % 4]);
        }
    }
    check_true("documents: a row starts with one; behind its end nothing is a target", right);
    int even = 1;
    for (int d = 0; d < 4; d++) even &= drawn[d] > 40 && drawn[d] < 90; // 64 each, 7 the deviation
    check_true("documents: all are drawn alike", even);
    Cursor c = {0};
    int count = read_windows(&r, &c, MOST, inputs, targets);
    check_true("windows: every document from its start, in pieces", count == 5 && is_row(0, rows[0]) &&
                                                                        is_row(1, "|defghijklm") && is_row(2, "mno|") &&
                                                                        is_row(3, rows[2]) && is_row(4, rows[3]));
    reader_free(&r);
}

// A row is a stream: put together, its pieces are documents, each whole and fresh at its start only.
static void test_carried_documents(void) {
    enum { STEPS = 60 };
    static const char text[] = "abc|defghijklmnopqrstuvwxyzabcdef|p|qrs|";
    Tokens t = tokens_of(text, strlen(text));
    Reader r = reader_new(&t, "a test", 3, 2, L, '|', true), late = reader_new(&t, "a test", 3, 2, L, '|', true);
    int right = 1, whole = 0, long_ones = 0;
    for (int b = 0; b < 2; b++) {
        char read[MOST * L] = "";
        size_t n = 0;
        reader_free(&r);
        r = reader_new(&t, "a test", 3, 2, L, '|', true);
        for (int step = 0; step < STEPS; step++) {
            reader_step(&r, step, inputs, targets, fresh);
            if (fresh[b]) { // what was read before must be the end of a document
                right &= step == 0 || read[n - 1] == '|';
                n = 0;
                read[n++] = (char)inputs[b * L];
            }
            for (int i = 0; i < L && targets[b * L + i] >= 0; i++) {
                right &= inputs[b * L + i] == read[n - 1];
                read[n++] = (char)targets[b * L + i];
            }
            read[n] = 0;
            if (read[n - 1] == '|') whole++, right &= strstr(text, read) != NULL, long_ones += n == 31;
        }
    }
    check_true("carried documents: whole, one after another", right && whole > 30 && long_ones > 3);
    reader_step(&r, STEPS, inputs, targets, fresh);
    reader_step(&late, STEPS, other, unused, fresh);
    check_same("carried documents: a resumed run reads on the same", inputs, other, 2 * L * sizeof *other);
    reader_free(&r), reader_free(&late);
}

static void test_carried(void) {
    unsigned char bytes[105]; // 10 windows and something
    for (int i = 0; i < 105; i++) bytes[i] = (unsigned char)i;
    Tokens t = tokens_of(bytes, sizeof bytes);
    Reader r = reader_new(&t, "a test", 8, B, L, -1, true);
    int right = 1, begun = 0, different = 0, place[B];
    for (int step = 0; step < 25; step++) {
        reader_step(&r, step, inputs, targets, fresh);
        for (int b = 0; b < B; b++) {
            const int at = inputs[b * L];
            right &= fresh[b] == (step == 0 || at == 0) && at % L == 0;
            if (step > 0) right &= at == (place[b] + L) % 100;
            begun += step > 0 && fresh[b];
            place[b] = at;
            for (int i = 0; i < L; i++) right &= inputs[b * L + i] == at + i && targets[b * L + i] == at + i + 1;
        }
    }
    for (int b = 1; b < B; b++) different |= place[b] != place[0];
    check_true("carried: window after window, from the start again at the end", right && begun >= 2 * B);
    check_true("carried: rows stand at different places", different);
    reader_free(&r);
}

int main(void) {
    test_rows();
    test_documents();
    test_carried_documents();
    test_carried();
    unlink(path);
    return check_done();
}
