#include <math.h>   // defines: exp, isfinite
#include <stdlib.h> // defines: qsort, free
#include "plumbing.h"

typedef struct {
    double probability; // not normalized
    int token;
} Candidate;

static int by_probability(const void *x, const void *y) {
    const Candidate *a = x, *b = y;
    if (a->probability != b->probability) return a->probability > b->probability ? -1 : 1;
    return a->token - b->token; // a fixed order, so that a seed gives the same text everywhere
}

double sample_uniform(uint64_t seed, int64_t position, int row) {
    uint32_t r[4];
    megalodon_philox(r, seed, STREAM_SAMPLE, (uint32_t)position, (uint32_t)((uint64_t)position >> 32), (uint32_t)row);
    return (double)((uint64_t)r[1] << 21 ^ r[0] >> 11) * 0x1p-53;
}

int sample_token(const real *logits, int V, double temperature, int top_k, double top_p, double random) {
    int best = 0, n = V;
    for (int i = 0; i < V; i++) {
        if (!isfinite(logits[i])) fatal("the model's logit of token %d is not finite", i);
        if (logits[i] > logits[best]) best = i;
    }
    if (temperature == 0) return best;
    Candidate *c = allocate((size_t)V, sizeof *c);
    double sum = 0, part = 0;
    for (int i = 0; i < V; i++) c[i] = (Candidate){exp((logits[i] - logits[best]) / temperature), i};
    if (top_k > 0 || top_p < 1) qsort(c, (size_t)V, sizeof *c, by_probability);
    if (top_k > 0 && top_k < n) n = top_k;
    for (int i = 0; i < n; i++) sum += c[i].probability;
    if (top_p < 1) { // the fewest that reach top_p of the sum, at least one
        int kept = 0;
        while (kept < n && (kept == 0 || part < top_p * sum)) part += c[kept++].probability;
        n = kept;
        sum = part;
    }
    // the first one where the running sum passes random's share
    int i = 0;
    for (part = c[0].probability; i < n - 1 && part <= random * sum;) part += c[++i].probability;
    int token = c[i].token;
    free(c);
    return token;
}
