// Drawing a token from logits.
#include <math.h>   // defines: exp, isfinite
#include <stdlib.h> // defines: qsort, free
#include "plumbing.h"

typedef struct {
    double probability; // not normalized: that of the most likely token is 1
    int token;
} Candidate;

static int by_probability(const void *x, const void *y) {
    const Candidate *a = x, *b = y;
    if (a->probability != b->probability) return a->probability > b->probability ? -1 : 1;
    return a->token - b->token; // breaks ties, so that a seed gives the same text on every machine
}

double sample_uniform(uint64_t seed, int64_t position, int row) {
    uint32_t r[4];
    megalodon_philox(r, seed, STREAM_SAMPLE, (uint32_t)position, (uint32_t)((uint64_t)position >> 32), (uint32_t)row);
    return (double)((uint64_t)r[1] << 21 ^ r[0] >> 11) * 0x1p-53;
}

static double total(const Candidate *c, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += c[i].probability;
    return sum;
}

// Moves the k most likely of n candidates to the front, in no particular order (quickselect, Hoare).
static void keep_first(Candidate *c, int n, int k) {
    for (int low = 0, high = n - 1; low < high;) {
        const Candidate pivot = c[low + (high - low) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (by_probability(&c[i], &pivot) < 0) i++;
            while (by_probability(&c[j], &pivot) > 0) j--;
            if (i > j) break;
            const Candidate swapped = c[i];
            c[i++] = c[j], c[j--] = swapped;
        }
        if (k > j && k <= i) return; // only the pivot lies between j and i
        if (k <= j) high = j;
        if (k > i) low = i;
    }
}

// Moves the candidates with at least this probability to the front; returns their number.
static int keep_likely(Candidate *c, int n, double min) {
    int kept = 0;
    for (int i = 0; i < n; i++) {
        if (c[i].probability >= min) c[kept++] = c[i];
    }
    return kept;
}

// Moves the fewest candidates whose probabilities sum to top_p of the total to the front, at least one, sorted; returns
// their number. All candidates below (1 - top_p) / n of the total sum to less than the part that is cut off, so they
// can be removed first, which leaves few to sort.
static int keep_nucleus(Candidate *c, int n, double top_p) {
    const double sum = total(c, n);
    double partial = 0;
    int kept = 0;
    n = keep_likely(c, n, (1 - top_p) * sum / n * (1 - 1e-9));
    qsort(c, (size_t)n, sizeof *c, by_probability);
    while (kept < n && (kept == 0 || partial < top_p * sum)) partial += c[kept++].probability;
    return kept;
}

size_t sample_bytes(int V) { return ((size_t)V + 1) * sizeof(Candidate); }

int sample_token(const real *logits, int V, const Sampling *s, double random) {
    static Candidate *c; // kept allocated from token to token
    static int capacity;
    const int count = V + (s->eot >= V); // number of candidates; an EOT at V or above is the last one
    int best = 0, n = count;
    for (int i = 0; i < count; i++) {
        const int token = i < V ? i : s->eot;
        if (!isfinite(logits[token])) fatal("the model's logit of token %d is not finite", token);
        if (logits[token] > logits[best]) best = token;
    }
    if (s->temperature == 0) return best;
    if (c == NULL || capacity < count) free(c), c = allocate((size_t)count, sizeof *c), capacity = count;
    for (int i = 0; i < count; i++) {
        const int token = i < V ? i : s->eot;
        c[i] = (Candidate){exp((logits[token] - logits[best]) / s->temperature), token};
    }
    if (s->top_k > 0 && s->top_k < n) {
        keep_first(c, n, s->top_k);
        n = s->top_k;
        qsort(c, (size_t)n, sizeof *c, by_probability);
    }
    if (s->top_p < 1) n = keep_nucleus(c, n, s->top_p);
    if (s->min_p > 0) n = keep_likely(c, n, s->min_p);
    // inverse transform sampling: the first candidate whose cumulative probability exceeds random * total
    const double threshold = random * total(c, n);
    int i = 0;
    for (double cumulative = c[0].probability; i < n - 1 && cumulative <= threshold;) cumulative += c[++i].probability;
    return c[i].token;
}
