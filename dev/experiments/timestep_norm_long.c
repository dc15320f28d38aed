// TimestepNorm and other ways to normalize: which of them see the future, and which of them stay exact over ten million
// tokens. dev/experiments/timestep_norm_long.py builds and runs this program, and draws its output:
//     build/timestep_norm_long 1 2 3 > FILE.csv          the numbers are seeds
// timestep_norm_forward and layernorm_forward are those of megalodon.c, which is included, since layers are static.
// There is one group of 8 features and no affine map. Output: CSV, see the columns in main().
#include "../../megalodon.c"

enum {
    FEATURES = 8,
    PIECE = 4096, // most tokens in one call
    CAUSAL = 64,  // tokens of the causality test
    CHANGED = 32, // the token that it changes
    TOKENS = 10000000,
    PERIOD = 1000000, // of the drift, in tokens
};
static const double EPS = 1e-5;
static const real zeros[FEATURES]; // weight and bias: no affine map

// What a method has kept of the tokens before: their number, and two numbers whose meaning is the method's.
typedef struct {
    int64_t tokens;
    double first, second;
    double mean, variance; // of all tokens so far, as the method sees them
} History;

// ----------------------------------------------------------------------------
// the methods: y (tokens,8) from x (tokens,8), which come after the history

// Ours. first, second: mean and M2.
static void ours(History *h, real *y, const real *x, int tokens) {
    double means[PIECE];
    real rstd[PIECE];
    Dims d = {.B = 1, .L = tokens, .D = FEATURES, .G = 1};
    NormState state = {&h->tokens, &h->first, &h->second};
    timestep_norm_forward(y, means, rstd, state, x, zeros, zeros, state, d, EPS);
    h->mean = h->first, h->variance = h->second / ((double)(h->tokens + tokens) * FEATURES);
}

// The same update with float numbers.
static void update_float(History *h, real *y, const real *x, int tokens) {
    float mean = (float)h->first, m2 = (float)h->second, n = 0;
    for (int t = 0; t < tokens; t++, x += FEATURES, y += FEATURES) {
        if (h->tokens + t == 0) mean = x[0];
        n = (float)((h->tokens + t + 1) * FEATURES);
        float s1 = 0, s2 = 0;
        for (int i = 0; i < FEATURES; i++) {
            s1 += x[i] - mean;
            s2 += (x[i] - mean) * (x[i] - mean);
        }
        mean += s1 / n;
        m2 += s2 - s1 * s1 / n;
        for (int i = 0; i < FEATURES; i++) y[i] = (x[i] - mean) / sqrtf(m2 / n + (float)EPS);
    }
    h->first = mean, h->second = m2;
    h->mean = mean, h->variance = m2 / n;
}

// var = S2/n - mean^2, from the sums S1 of x and S2 of x^2, with float numbers. first, second: S1 and S2.
static void sums_float(History *h, real *y, const real *x, int tokens) {
    float sum = (float)h->first, squares = (float)h->second, mean = 0, variance = 0;
    for (int t = 0; t < tokens; t++, x += FEATURES, y += FEATURES) {
        float n = (float)((h->tokens + t + 1) * FEATURES), s1 = 0, s2 = 0;
        for (int i = 0; i < FEATURES; i++) {
            s1 += x[i];
            s2 += x[i] * x[i];
        }
        sum += s1;
        squares += s2;
        mean = sum / n;
        variance = squares / n - mean * mean;
        for (int i = 0; i < FEATURES; i++) y[i] = (x[i] - mean) / sqrtf(variance + (float)EPS);
    }
    h->first = sum, h->second = squares;
    h->mean = mean, h->variance = variance;
}

// The same with double numbers.
static void sums_double(History *h, real *y, const real *x, int tokens) {
    double sum = h->first, squares = h->second, mean = 0, variance = 0;
    for (int t = 0; t < tokens; t++, x += FEATURES, y += FEATURES) {
        double n = (double)(h->tokens + t + 1) * FEATURES;
        for (int i = 0; i < FEATURES; i++) {
            sum += x[i];
            squares += (double)x[i] * x[i];
        }
        mean = sum / n;
        variance = squares / n - mean * mean;
        for (int i = 0; i < FEATURES; i++) y[i] = (real)((x[i] - mean) / sqrt(variance + EPS));
    }
    h->first = sum, h->second = squares;
    h->mean = mean, h->variance = variance;
}

// LayerNorm of each token: no history.
static void layer(History *h, real *y, const real *x, int tokens) {
    double means[PIECE];
    real rstd[PIECE];
    layernorm_forward(y, means, rstd, x, NULL, NULL, tokens, FEATURES, EPS);
    h->mean = means[tokens - 1];
    h->variance = 1 / ((double)rstd[tokens - 1] * rstd[tokens - 1]) - EPS;
}

typedef struct {
    const char *name;
    void (*forward)(History *h, real *y, const real *x, int tokens);
} Method;
static const Method methods[] = {{"megalodon.c", ours},
                                 {"update in float", update_float},
                                 {"sums in float", sums_float},
                                 {"sums in double", sums_double},
                                 {"LayerNorm", layer}};
enum { METHODS = sizeof methods / sizeof methods[0] };

// ----------------------------------------------------------------------------
// input, and the exact result

// x (8): token t. Normally distributed with standard deviation 1 around a level that drifts by +-1.
static void token(real *x, int64_t t, double level, uint64_t seed) {
    level += sin(2 * M_PI * (double)t / PERIOD);
    for (int i = 0; i < FEATURES; i += 4) {
        uint32_t words[4];
        megalodon_philox(words, seed, 0, (uint32_t)t, (uint32_t)i, 0);
        for (int pair = 0; pair < 4; pair += 2) { // Box and Muller's method
            double radius = sqrt(-2 * log((words[pair] + 0.5) / 4294967296.0));
            double angle = 2 * M_PI * words[pair + 1] / 4294967296.0;
            x[i + pair] = (real)(level + radius * cos(angle));
            x[i + pair + 1] = (real)(level + radius * sin(angle));
        }
    }
}

// Sums of x - level and of its square in long double: nothing cancels, since the level is known.
typedef struct {
    long double sum, squares;
    int64_t tokens;
    double mean, variance;
} Exact;

static void exact_forward(Exact *e, double *y, const real *x, int tokens, double level) {
    for (int t = 0; t < tokens; t++, x += FEATURES, y += FEATURES) {
        for (int i = 0; i < FEATURES; i++) {
            long double deviation = (long double)x[i] - level;
            e->sum += deviation;
            e->squares += deviation * deviation;
        }
        long double n = (long double)++e->tokens * FEATURES, mean = e->sum / n;
        e->mean = (double)(level + mean);
        e->variance = (double)(e->squares / n - mean * mean);
        for (int i = 0; i < FEATURES; i++) y[i] = (x[i] - e->mean) / sqrt(e->variance + EPS);
    }
}

static void exact_layernorm(double *y, const real *x, int tokens) {
    for (int t = 0; t < tokens; t++, x += FEATURES, y += FEATURES) {
        long double mean = 0, variance = 0;
        for (int i = 0; i < FEATURES; i++) mean += (long double)x[i] / FEATURES;
        for (int i = 0; i < FEATURES; i++) variance += (x[i] - mean) * (x[i] - mean) / FEATURES;
        for (int i = 0; i < FEATURES; i++) y[i] = (double)((x[i] - mean) / sqrtl(variance + EPS));
    }
}

// ----------------------------------------------------------------------------
// the two experiments

// Ten million tokens, with 4 rows of each method per decade: its moments and, of its outputs since the row before, the
// root mean square error of those that are finite and the number of those that are not.
static void long_run(double level, uint64_t seed) {
    static real x[PIECE * FEATURES], y[PIECE * FEATURES];
    static double right[2][PIECE * FEATURES]; // of all tokens so far; of LayerNorm
    History h[METHODS] = {0};
    Exact e = {0};
    int64_t done = 0;
    for (int row = 0; done < TOKENS; row++) {
        int64_t end = llround(pow(10, row / 4.0));
        double squares[METHODS] = {0};
        int64_t finite[METHODS] = {0}, outputs = (end - done) * FEATURES;
        while (done < end) {
            int tokens = (int)(end - done < PIECE ? end - done : PIECE);
            for (int t = 0; t < tokens; t++) token(x + (size_t)t * FEATURES, done + t, level, seed);
            exact_forward(&e, right[0], x, tokens, level);
            exact_layernorm(right[1], x, tokens);
            for (int m = 0; m < METHODS; m++) {
                methods[m].forward(&h[m], y, x, tokens);
                h[m].tokens += tokens;
                const double *reference = right[methods[m].forward == layer];
                for (int i = 0; i < tokens * FEATURES; i++) {
                    if (!isfinite(y[i])) continue;
                    squares[m] += (y[i] - reference[i]) * (y[i] - reference[i]);
                    finite[m]++;
                }
            }
            done += tokens;
        }
        printf("long,%g,%d,exact,%lld,%.9g,%.9g,0,0\n", level, (int)seed, (long long)done, e.mean, e.variance);
        for (int m = 0; m < METHODS; m++) {
            printf("long,%g,%d,%s,%lld,%.9g,%.9g,%.3g,%lld\n", level, (int)seed, methods[m].name, (long long)done,
                   h[m].mean, h[m].variance, finite[m] ? sqrt(squares[m] / (double)finite[m]) : NAN,
                   (long long)(outputs - finite[m]));
        }
        fflush(stdout);
    }
}

// One token is changed: by how much does each output change?
static void causality(uint64_t seed) {
    static real x[CAUSAL * FEATURES], y[2][3][CAUSAL * FEATURES];
    const char *names[3] = {"megalodon.c", "LayerNorm", "all tokens"};
    for (int t = 0; t < CAUSAL; t++) token(x + (size_t)t * FEATURES, t, 0, seed);
    for (int changed = 0; changed < 2; changed++) {
        for (int i = 0; i < FEATURES; i++) x[CHANGED * FEATURES + i] += (real)(3 * changed);
        History fresh[2] = {0};
        ours(&fresh[0], y[changed][0], x, CAUSAL);
        layer(&fresh[1], y[changed][1], x, CAUSAL);
        // group normalization of the whole sequence: LayerNorm of all its numbers as one token
        double mean;
        real rstd;
        layernorm_forward(y[changed][2], &mean, &rstd, x, NULL, NULL, 1, CAUSAL * FEATURES, EPS);
    }
    for (int m = 0; m < 3; m++) {
        for (int t = 0; t < CAUSAL; t++) {
            double largest = 0;
            for (int i = t * FEATURES; i < (t + 1) * FEATURES; i++) {
                largest = fmax(largest, fabs((double)y[1][m][i] - y[0][m][i]));
            }
            printf("causality,0,%d,%s,%d,0,0,%.3g,0\n", (int)seed, names[m], t + 1, largest);
        }
    }
}

int main(int argc, char *argv[]) {
    const double levels[] = {0, 100, 1000};
    printf("experiment,level,seed,method,token,mean,variance,error,not_finite\n");
    for (int i = 1; i < argc; i++) {
        uint64_t seed = (uint64_t)atoll(argv[i]);
        causality(seed);
        for (int k = 0; k < 3; k++) long_run(levels[k], seed);
    }
    return 0;
}
