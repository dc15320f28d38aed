// Every layer of megalodon.cu by itself against that of megalodon.c, on random numbers: its results, what it leaves for
// the backward pass, states and gradients. Build: with tests/cpu_layers.c, see there, and build/library.a; megalodon.cu
// is included, since layers are static. An argument selects the tests whose names contain it.
//
// Inputs that are acts on the device are rounded on the host first, so that both sides get the same numbers; gradients of
// parameters begin with random ones, to which both add. Whatever the device has to write is NaN before.
#include "../megalodon.cu"
#include "cpu_layers.h"

#include <stdarg.h>

// Relative L2 differences. Results that are floats computed from exact inputs are held to float32 in both builds.
static const double FLOAT_FORWARD = 2e-6, FLOAT_BACKWARD = 5e-6;
static const double FORWARD = sizeof(floatX) == 4 ? FLOAT_FORWARD : 5e-3;
static const double BACKWARD = sizeof(floatX) == 4 ? FLOAT_BACKWARD : 5e-3;
static const double EPS = 1e-5;

// ----------------------------------------------------------------------------
// arrays on both sides. All of a case's are freed at its end, when the bytes behind those on the device must still be
// what they were.

#ifdef __SANITIZE_ADDRESS__ // which sees what is touched there, reads too
enum { GUARD = 0 };
#else
enum { GUARD = 256 };
#endif
enum { MOST = 100 };
static struct {
    char title[80];
    int devices, hosts;
    void *device[MOST], *host[MOST];
    size_t bytes[MOST]; // of those on the device
} now;

static void begin(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(now.title, sizeof now.title, format, arguments);
    va_end(arguments);
}

static void finish(void) {
    char name[120];
    int touched = 0;
    for (int i = 0; i < now.devices; i++) {
        unsigned char guard[GUARD + 1];
        cudaCheck(cudaMemcpy(guard, (char *)now.device[i] + now.bytes[i], GUARD, cudaMemcpyDeviceToHost));
        for (int k = 0; k < GUARD; k++) touched += guard[k] != 0xff;
        cudaCheck(cudaFree(now.device[i]));
    }
    for (int i = 0; i < now.hosts; i++) free(now.host[i]);
    now.devices = now.hosts = 0;
    snprintf(name, sizeof name, "%s: nothing else is written", now.title);
    if (GUARD > 0) cpu_check_true(name, touched == 0);
}

template <typename T> static T *on_host(size_t n) {
    T *memory = (T *)malloc(n * sizeof(T) + 1);
    if (memory == NULL || now.hosts == MOST) {
        fprintf(stderr, "error: out of memory\n");
        exit(1);
    }
    memset((void *)memory, 0xff, n * sizeof(T));
    now.host[now.hosts++] = memory;
    return memory;
}

// Room for whole vectors, as every array of the model has.
template <typename T> static T *on_device(size_t n) {
    size_t bytes = (n * sizeof(T) + 15) / 16 * 16;
    void *memory = NULL;
    cudaCheck(cudaMalloc(&memory, bytes + GUARD));
    cudaCheck(cudaMemset(memory, 0xff, bytes + GUARD));
    if (now.devices == MOST) {
        fprintf(stderr, "error: too many arrays\n");
        exit(1);
    }
    now.bytes[now.devices] = bytes;
    now.device[now.devices++] = memory;
    return (T *)memory;
}

template <typename T> static T *copied(const T *host, size_t n) {
    T *device = on_device<T>(n);
    upload(device, host, n * sizeof(T));
    return device;
}

// The same numbers twice: what the CPU's function gets, and the device's. {}: NULL for both.
template <typename T, typename Host> struct Twice {
    Host *host;
    T *device;
    size_t n;
};
typedef Twice<floatX, float> Acts;
typedef Twice<float, float> Floats;
typedef Twice<double, double> Doubles;
typedef Twice<Mean, double> SplitMeans;
typedef Twice<float, double> Means;

static float *random_numbers(size_t n, double scale, double shift) {
    static uint64_t seed = 1;
    float *x = on_host<float>(n);
    cpu_random(x, n, seed++, scale, shift);
    return x;
}
#ifdef MEGALODON_FP32
static floatX act_of(float x) { return x; }
#else
static floatX act_of(float x) { return __float2bfloat16(x); }
static double number(floatX x) { return to_float(x); }
#endif
static double number(float x) { return x; }
static double number(double x) { return x; }
#ifdef MEGALODON_FP32
static double number(Mean x) { return whole_mean(x); }
#endif

static Acts acts_from(float *host, size_t n) { // which are rounded
    floatX *narrow = on_host<floatX>(n);
    for (size_t i = 0; i < n; i++) narrow[i] = act_of(host[i]), host[i] = to_float(narrow[i]);
    return Acts{host, copied(narrow, n), n};
}
static Acts acts(size_t n, double scale, double shift) { return acts_from(random_numbers(n, scale, shift), n); }
// The same as R rows, of which every second one, or the only one, is multiplied with `size`.
static Acts acts_rows(int R, int D, double scale, double shift, double size) {
    float *x = random_numbers((size_t)R * D, scale, shift);
    for (size_t i = 0; i < (size_t)R * D; i++) x[i] *= R == 1 || i / D % 2 ? (float)size : 1;
    return acts_from(x, (size_t)R * D);
}
static Floats floats_from(float *host, size_t n) { return Floats{host, copied(host, n), n}; }
static Floats floats(size_t n, double scale, double shift) { return floats_from(random_numbers(n, scale, shift), n); }
static Floats rounded_floats(size_t n, double scale, double shift) {
    return floats_from(acts(n, scale, shift).host, n);
}
static Acts acts_out(size_t n) { return Acts{on_host<float>(n), on_device<floatX>(n), n}; }
static Floats floats_out(size_t n) { return Floats{on_host<float>(n), on_device<float>(n), n}; }
static Doubles doubles_out(size_t n) { return Doubles{on_host<double>(n), on_device<double>(n), n}; }
template <typename T> static Twice<T, double> means_out(size_t n) {
    return Twice<T, double>{on_host<double>(n), on_device<T>(n), n};
}
static void narrow_mean(float *narrow, double mean) { *narrow = (float)mean; }
#ifdef MEGALODON_FP32
static void narrow_mean(Mean *narrow, double mean) { *narrow = split_mean(mean); }
#endif
template <typename T> static void upload_means(Twice<T, double> means) { // so that the backward passes get the same
    T *narrow = on_host<T>(means.n);
    for (size_t i = 0; i < means.n; i++) narrow_mean(&narrow[i], means.host[i]);
    upload(means.device, narrow, means.n * sizeof *narrow);
}
static Acts copy_of(Acts a) { // in memory of its own
    float *host = on_host<float>(a.n);
    memcpy(host, a.host, a.n * sizeof *host);
    return acts_from(host, a.n);
}

// The device's numbers against the host's, elements from.. of both.
template <typename T, typename Host>
static void compare_part(const char *what, Twice<T, Host> a, size_t from, size_t n, double tol) {
    char name[120];
    T *got = on_host<T>(n);
    double *wide = on_host<double>(2 * n);
    cudaCheck(cudaMemcpy(got, a.device + from, n * sizeof(T), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) wide[i] = number(got[i]), wide[n + i] = number(a.host[from + i]);
    snprintf(name, sizeof name, "%s: %s", now.title, what);
    cpu_check(name, wide, wide + n, n, tol);
}
// Number by number: relative, but for what underflows, and not finite where the host's is not.
static void compare_each(const char *what, Acts a) {
    const double tol = sizeof(floatX) == 4 ? 2e-6 : 1e-2;
    char name[120];
    floatX *got = on_host<floatX>(a.n);
    int same = 1;
    cudaCheck(cudaMemcpy(got, a.device, a.n * sizeof *got, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < a.n; i++) {
        double x = to_float(got[i]), y = a.host[i];
        same &= isfinite(y) ? fabs(x - y) <= tol * fabs(y) + 1e-36 : !isfinite(x);
    }
    snprintf(name, sizeof name, "%s: %s", now.title, what);
    cpu_check_true(name, same);
}
template <typename T, typename Host> static void compare(const char *what, Twice<T, Host> a, double tol) {
    if (a.n > 0) compare_part(what, a, 0, a.n, tol);
}

// Where decoding's float sums overflow, its results are NaN: all numbers of rows from to from + n.
template <typename T, typename Host>
static void compare_nan(const char *what, Twice<T, Host> a, size_t from, size_t n) {
    char name[120];
    T *got = on_host<T>(n);
    int nans = 1;
    cudaCheck(cudaMemcpy(got, a.device + from, n * sizeof(T), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) nans &= isnan(number(got[i])) != 0;
    snprintf(name, sizeof name, "%s: %s is NaN", now.title, what);
    cpu_check_true(name, nans);
}

// ----------------------------------------------------------------------------
// sums of parts

static void sum_parts_case(int P, int width, int width2, int stride, int added) {
    begin("sum_parts, %d of %d + %d%s", P, width, width2, added ? ", added" : "");
    Floats parts = floats((size_t)P * stride, 1, 1), out = added ? floats(width, 1, 0) : floats_out(width), out2 = {};
    if (width2) out2 = added ? floats(width2, 1, 0) : floats_out(width2);
    for (int c = 0; c < width + width2; c++) {
        float *to = c < width ? out.host + c : out2.host + (c - width);
        double sum = added ? *to : 0;
        for (int p = 0; p < P; p++) sum += parts.host[(size_t)p * stride + c];
        *to = (float)sum;
    }
    sum_parts(out.device, out2.device, added, parts.device, P, stride, width, width2);
    compare("out", out, FLOAT_FORWARD), compare("out2", out2, FLOAT_FORWARD);
    finish();
}
static void test_sum_parts(void) {
    for (int added = 0; added < 2; added++) {
        sum_parts_case(1, 1, 0, 1, added), sum_parts_case(5, 7, 7, 14, added), sum_parts_case(33, 100, 3, 131, added);
        sum_parts_case(1024, 33, 0, 64, added), sum_parts_case(257, 64, 64, 128, added);
    }
}

// ----------------------------------------------------------------------------
// layers, in the order of megalodon.cu

static void embedding_case(int R, int D, int V, float scale) {
    begin("embedding, R %d D %d V %d", R, D, V);
    int32_t *tokens = on_host<int32_t>(R);
    for (int r = 0; r < R; r++)
        tokens[r] = (r * r + r / 3) % (r % 2 ? V : 2) % (V - 1); // V - 1 does not occur, 0 often
    Acts embed = acts((size_t)V * D, 1, 0), out = acts_out((size_t)R * D), dout = acts((size_t)R * D, 1, 0.2);
    Floats dembed = floats((size_t)V * D, 1, 0);
    cpu_embedding_forward(out.host, tokens, embed.host, scale, R, D);
    embedding_forward(out.device, copied(tokens, R), embed.device, scale, R, D);
    compare("out", out, FORWARD);

    int *order = on_host<int>(R), *first = on_host<int>(V + 1);
    Segment *segments = on_host<Segment>(2 * (size_t)R);
    Sorted sorted = sort_tokens(order, segments, first, tokens, R, V);
    cpu_embedding_backward(dembed.host, dout.host, tokens, scale, R, D);
    embedding_backward(dembed.device, on_device<float>((size_t)sorted.parts * D), dout.device, copied(order, R),
                       copied(segments, sorted.segments + sorted.tokens), sorted, scale, D);
    compare("dembed", dembed, FLOAT_BACKWARD);
    finish();
}
static void test_embedding(void) {
    embedding_case(1, 5, 3, 1), embedding_case(9, 67, 7, 3), embedding_case(130, 24, 3, 1);
    embedding_case(300, 13, 5, 2), embedding_case(700, 16, 300, 1), embedding_case(7, 1024, 32, 32);
}

static Mask mask_from(double p, uint64_t first) {
    Mask mask;
    mask.p = p, mask.seed = 0x123456789abcdef, mask.stream = STREAM_DROPOUT + 2, mask.step = 6, mask.layer = 4;
    mask.first = first, mask.row = 0, mask.run = 0;
    return mask;
}
static void test_dropout(void) {
    static const uint64_t first[] = {0, 3, ((uint64_t)5 << 34) - 14}; // on the way there the counter overflows
    static const size_t sizes[] = {1, 2, 5, 1000, 4096};
    for (int i = 0; i < 15; i++) {
        size_t n = sizes[i / 3];
        Mask m = mask_from(n < 3 ? 0.001 : 0.3, first[i % 3]);
        begin("dropout, %d from %llu", (int)n, (unsigned long long)m.first);
        Acts inp = acts(n, 1, 3), out = acts_out(n), same = copy_of(inp);
        cpu_dropout(out.host, inp.host, m.p, m.seed, m.stream, m.step, m.layer, m.first, n);
        dropout(out.device, inp.device, m, n);
        compare("out", out, FORWARD);
        memcpy(same.host, out.host, n * sizeof *out.host);
        dropout(same.device, same.device, m, n);
        compare("in place", same, FORWARD);
        m.p = 0;
        dropout(inp.device, out.device, m, n);
        compare("probability 0 does nothing", inp, 1e-30);
        finish();
    }
}

// count, mean and M2 of what came before, of rows in turn; deviation 0.6 scale
typedef struct {
    int64_t *count, *device_count;
    Doubles mean, m2;
} Past;
static Past past_of(int B, int D, int G, double mean, double scale) {
    static const int64_t counts[3] = {3, 0, 1000};
    Past p = {on_host<int64_t>(B), NULL, doubles_out((size_t)B * G), doubles_out((size_t)B * G)};
    float *shift = random_numbers((size_t)B * G, 0.3, 0);
    for (int i = 0; i < B * G; i++) {
        double n = (double)counts[i / G % 3] * (D / G);
        p.count[i / G] = counts[i / G % 3];
        p.mean.host[i] = n > 0 ? mean + scale * shift[i] : 0;
        p.m2.host[i] = n * (0.36 + 0.3 * shift[i]) * scale * scale;
    }
    p.device_count = copied(p.count, B);
    upload(p.mean.device, p.mean.host, p.mean.n * sizeof(double));
    upload(p.m2.device, p.m2.host, p.m2.n * sizeof(double));
    return p;
}

enum { NO_STATE, STATE, STATE_IN_PLACE };
static void timestep_norm_case(int B, int L, int D, int G, int state, double shift, double scale = 1) {
    begin("timestep_norm, B %d L %d D %d G %d%s, mean %g, x %g", B, L, D, G, state ? ", state" : "", shift, scale);
    size_t R = (size_t)B * L, blocks = (size_t)B * ceil_div(L, NORM_BLOCK);
    Acts inp = acts(R * D, 1.7 * scale, shift), out = acts_out(R * D);
    Floats weight = floats(D, 1, 0), bias = floats(D, 1, 0), rstd = floats_out(R * G);
    SplitMeans mean = means_out<Mean>(R * G);
    Past in = state ? past_of(B, D, G, shift, scale) : Past{};
    Doubles mean_out = {}, m2_out = {};
    if (state) mean_out = doubles_out((size_t)B * G), m2_out = doubles_out((size_t)B * G);
    if (state == STATE_IN_PLACE) mean_out.device = in.mean.device, m2_out.device = in.m2.device;
    cpu_timestep_norm_forward(out.host, mean.host, rstd.host, mean_out.host, m2_out.host, inp.host, weight.host,
                              bias.host, in.mean.host, in.m2.host, in.count, B, L, D, G, EPS);
    timestep_norm_forward(out.device, mean.device, rstd.device, mean_out.device, m2_out.device, inp.device,
                          weight.device, bias.device, in.mean.device, in.m2.device, in.device_count,
                          on_device<Prefix>(R * G), on_device<Moments>(blocks * G), B, L, D, G, EPS);
    compare("out", out, FORWARD);
    compare("mean", mean, FLOAT_FORWARD), compare("rstd", rstd, FLOAT_FORWARD);
    compare("mean_out", mean_out, FLOAT_FORWARD), compare("m2_out", m2_out, FLOAT_FORWARD);

    upload_means(mean);
    upload(rstd.device, rstd.host, R * G * sizeof(float));
    Acts dout = acts(R * D, 1, 0.1), residual = acts(R * D, 1, 0), residual2 = acts(R * D, 1, 0);
    Acts dinp = acts_out(R * D), both = acts_out(R * D), one = acts_out(R * D);
    Floats dweight = floats(D, 1, 0), dbias = floats(D, 1, 0);
    Sums *suffix = on_device<Sums>(R * G), *sums = on_device<Sums>(blocks * G);
    float *parts = on_device<float>(MOST_PARTS * 2 * (size_t)D);
    cpu_timestep_norm_backward(dinp.host, dweight.host, dbias.host, dout.host, inp.host, weight.host, mean.host,
                               rstd.host, in.count, B, L, D, G);
    timestep_norm_sums(NULL, suffix, sums, dout.device, inp.device, weight.device, mean.device, rstd.device,
                       in.device_count, B, L, D, G);
    timestep_norm_backward(dinp.device, dweight.device, dbias.device, dout.device, NULL, NULL, inp.device,
                           weight.device, mean.device, rstd.device, suffix, sums, NULL, parts, B, L, D, G);
    compare("dinp", dinp, BACKWARD);
    compare("dweight", dweight, FLOAT_BACKWARD), compare("dbias", dbias, FLOAT_BACKWARD);

    for (size_t i = 0; i < R * D; i++) { // residuals' gradients join; the second one's place is taken
        one.host[i] = dinp.host[i] + residual.host[i];
        both.host[i] = one.host[i] + residual2.host[i];
    }
    both.device = residual2.device;
    timestep_norm_backward(one.device, dweight.device, dbias.device, dout.device, residual.device, NULL, inp.device,
                           weight.device, mean.device, rstd.device, suffix, sums, NULL, parts, B, L, D, G);
    timestep_norm_backward(both.device, dweight.device, dbias.device, dout.device, residual.device, residual2.device,
                           inp.device, weight.device, mean.device, rstd.device, suffix, sums, NULL, parts, B, L, D, G);
    compare("dinp and a residual", one, BACKWARD), compare("dinp and two, in place", both, BACKWARD);
    finish();
}
static void test_timestep_norm(void) {
    static const int lengths[] = {1, 31, 32, 33, 64, 65, 130, 300};
    static const int sizes[][2] = {{6, 3}, {30, 2}, {36, 3}, {64, 8}}; // D, G
    for (int i = 0; i < 8; i++) {
        for (int s = 0; s < 4; s++)
            timestep_norm_case(1 + (i + s) % 3, lengths[i], sizes[s][0], sizes[s][1], (i + 2 * s + 1) % 3, 0.5);
    }
    timestep_norm_case(3, 300, 6, 3, STATE, 0.5);           // more blocks than parts
    timestep_norm_case(2, 35, 390, 3, STATE_IN_PLACE, 0.5); // groups that lie in two blocks of threads
    timestep_norm_case(2, 33, 540, 45, STATE, 0.5);         // the same, of four numbers a thread
    timestep_norm_case(1, 33, 300, 1, NO_STATE, 0.5);       // a group that all blocks share
    timestep_norm_case(1, 33, 132, 132, NO_STATE, 0.5);     // groups of one number
    timestep_norm_case(1, 1100, 8, 1, STATE, 0.5);          // more blocks than lanes
    timestep_norm_case(2, 40, 1024, 32, STATE, 0.5);        // mega200M's
    timestep_norm_case(2, 130, 30, 2, NO_STATE, 30), timestep_norm_case(3, 300, 64, 8, STATE, 30);
    for (int i = 0; i < 3; i++) { // numbers far from zero, a bfloat16's as many deviations as it can tell apart
        double mean = i == 0 ? 1e4 : i == 1 ? 1e5 : -1e6, scale = sizeof(floatX) == 4 ? 1 : fabs(mean) / 30;
        timestep_norm_case(2, 130, 30, 2, STATE, mean, scale), timestep_norm_case(1, 300, 64, 2, NO_STATE, mean, scale);
    }
    for (int i = 0; i < 3; i++) { // squares that overflow, in some blocks or in all
        double scale = i == 0 ? 1e17 : i == 1 ? 1e20 : 1e37;
        timestep_norm_case(2, 130, 30, 2, STATE, scale / 2, scale),
            timestep_norm_case(1, 70, 64, 2, NO_STATE, 0, scale);
    }
}

// CEMA's coefficients, seven arrays one behind the other on the device, five on the host.
static Coeffs coeffs_at(float *all, size_t n, int seven) {
    Coeffs c = {all, all + n, all + 2 * n, all + 3 * n, all + 4 * n, NULL, NULL};
    if (seven) c.t_re = all + 5 * n, c.t_im = all + 6 * n;
    return c;
}

static void cema_coeffs_case(int D, int N) {
    begin("cema_coeffs, D %d N %d", D, N);
    size_t n = (size_t)D * N;
    Floats alpha = floats(n, 2, 0), delta = floats(n, 2, 0), theta = floats(D, 2, -1), gamma = floats(2 * n, 1, 0);
    Floats all = floats_out(7 * n), dall = floats(5 * n, 1, 0);
    Coeffs c = coeffs_at(all.device, n, 1), dc = coeffs_at(dall.device, n, 0);
    cpu_cema_coeffs_forward(all.host, alpha.host, delta.host, theta.host, gamma.host, D, N);
    for (size_t i = 0; i < n; i++) {
        size_t in = i % D * N + i / D;
        double a = 1 / (1 + exp(-(double)alpha.host[in])), b = 1 / (1 + exp(-(double)delta.host[in]));
        double re = 1, im = 0, phi = 2 * PI * (double)(i / D + 1) / N / (1 + exp(-(double)theta.host[i % D]));
        for (int t = 0; t < CEMA_BLOCK; t++) { // over a block of tokens, token by token
            double old = re;
            re = (1 - a * b) * (old * cos(phi) - im * sin(phi));
            im = (1 - a * b) * (old * sin(phi) + im * cos(phi));
        }
        all.host[5 * n + i] = (float)re, all.host[6 * n + i] = (float)im;
    }
    cema_coeffs_forward(&c, alpha.device, delta.device, theta.device, gamma.device, D, N);
    static const char *const names[7] = {"p", "q_re", "q_im", "g_re", "g_im", "t_re", "t_im"};
    for (int i = 0; i < 7; i++) compare_part(names[i], all, i * n, n, 2e-7);

    Floats dalpha = floats(n, 1, 0), ddelta = floats(n, 1, 0), dtheta = floats(D, 1, 0), dgamma = floats(2 * n, 1, 0);
    cpu_cema_coeffs_backward(dalpha.host, ddelta.host, dtheta.host, dgamma.host, dall.host, alpha.host, delta.host,
                            theta.host, D, N);
    cema_coeffs_backward(dalpha.device, ddelta.device, dtheta.device, dgamma.device, &dc, alpha.device, delta.device,
                        theta.device, D, N);
    compare("dalpha", dalpha, 2e-7), compare("ddelta", ddelta, 2e-7);
    compare("dtheta", dtheta, 2e-7), compare("dgamma", dgamma, 2e-7);
    finish();
}

// slow: what is remembered decays in hundreds of tokens. Over blocks the device uses the rounded power of q where the
// CPU takes powers of the rounded q, and over 1000 tokens q's last digit becomes three digits.
static void cema_case(int B, int L, int D, int N, int state, int slow) {
    begin("cema, B %d L %d D %d N %d%s%s", B, L, D, N, state ? ", state" : "", slow ? ", slow" : "");
    double looser = slow ? 15 : 1;
    size_t R = (size_t)B * L, n = (size_t)D * N, states = (size_t)B * 2 * n, blocks = ceil_div(L, CEMA_BLOCK);
    Floats alpha = floats(n, 1, slow ? -3 : 0), delta = floats(n, 1, slow ? -3 : 0), theta = floats(D, 1, -1);
    Floats gamma = floats(2 * n, 1, 0), omega = floats(D, 1, 0), all = floats_out(7 * n), dall = floats_out(5 * n);
    Coeffs c = coeffs_at(all.device, n, 1), dc = coeffs_at(dall.device, n, 0);
    cpu_cema_coeffs_forward(all.host, alpha.host, delta.host, theta.host, gamma.host, D, N);
    cema_coeffs_forward(&c, alpha.device, delta.device, theta.device, gamma.device, D, N);

    Acts inp = acts(R * D, 1, 0.2), out = acts_out(R * D), dout = acts(R * D, 1, 0.2), dinp = acts_out(R * D);
    Floats h_in = {}, h_out = {}, domega = floats(D, 1, 0);
    if (state) h_in = floats(states, 1, 0), h_out = floats_out(states);
    if (state == STATE_IN_PLACE) h_out.device = h_in.device;
    float *h_blocks = on_device<float>(blocks * states), *futures = on_device<float>(blocks * states);
    cpu_cema_forward(out.host, h_out.host, inp.host, all.host, omega.host, h_in.host, B, L, D, N);
    cema_forward(out.device, h_blocks, h_out.device, inp.device, &c, omega.device, h_in.device, B, L, D, N);
    compare("out", out, sizeof(floatX) == 4 ? looser * FORWARD : FORWARD), compare("h_out", h_out, looser * FLOAT_FORWARD);

    float *parts = on_device<float>((size_t)cema_parts(B, L, D) * (5 * N + 1) * D);
    cpu_cema_backward(dinp.host, dall.host, domega.host, dout.host, inp.host, all.host, omega.host, h_in.host, B, L, D,
                      N);
    cema_backward(dinp.device, &dc, domega.device, NULL, dout.device, inp.device, h_blocks, &c, omega.device, futures,
                  parts, B, L, D, N);
    compare("dinp", dinp, sizeof(floatX) == 4 ? looser * BACKWARD : BACKWARD), compare("domega", domega, FLOAT_BACKWARD);
    static const char *const names[5] = {"dp", "dq_re", "dq_im", "dg_re", "dg_im"};
    for (int i = 0; i < 5; i++) compare_part(names[i], dall, i * n, n, looser * FLOAT_BACKWARD);
    finish();
}
static void test_cema(void) {
    static const int lengths[] = {1, 31, 32, 33, 64, 65, 130, 300};
    cema_coeffs_case(5, 3), cema_coeffs_case(33, 1), cema_coeffs_case(1024, 16);
    for (int i = 0; i < 8; i++) {
        cema_case(1 + i % 3, lengths[i], 5, 3, (i + 1) % 3, 0);
        cema_case(1 + (i + 1) % 3, lengths[i], 33, 2, i > 0 ? (i + 2) % 3 : STATE_IN_PLACE, 0);
        cema_case(1 + (i + 2) % 3, lengths[i], 64, 1, i > 0 ? i % 3 : STATE, 0);
    }
    cema_case(2, 600, 7, 4, STATE, 1),
        cema_case(1, 1100, 5, 2, STATE_IN_PLACE, 1); // scans of more blocks than go ahead
    cema_case(264, 1, 1000, 1, STATE, 0);            // more blocks than parts
    cema_case(1, 70, 1024, 16, STATE, 0);            // mega200M's
}

static void rmsnorm_case(int R, int D, int affine, double size = 1) {
    begin("rmsnorm, R %d D %d%s, x %g", R, D, affine ? "" : ", no weight", size);
    Acts inp = acts_rows(R, D, 1, 0.3, size), out = acts_out(inp.n), dout = acts(inp.n, 1, 0), dinp = acts_out(inp.n);
    Floats weight = {}, dweight = {}, rstd = floats_out(R);
    if (affine) weight = floats(D, 1, 0), dweight = floats(D, 1, 0);
    cpu_rmsnorm_forward(out.host, rstd.host, inp.host, weight.host, R, D, EPS);
    rmsnorm_forward(out.device, rstd.device, inp.device, weight.device, R, D, EPS);
    compare("out", out, FORWARD), compare("rstd", rstd, FLOAT_FORWARD);
    upload(rstd.device, rstd.host, R * sizeof(float));
    cpu_rmsnorm_backward(dinp.host, dweight.host, dout.host, inp.host, weight.host, rstd.host, R, D);
    rmsnorm_backward(dinp.device, dweight.device, dout.device, inp.device, weight.device, rstd.device,
                     on_device<float>((size_t)row_parts(R) * D), R, D);
    compare("dinp", dinp, BACKWARD), compare("dweight", dweight, FLOAT_BACKWARD);
    finish();
}
static void test_rmsnorm(void) {
    for (int affine = 0; affine < 2; affine++) {
        rmsnorm_case(1, 2, affine), rmsnorm_case(5, 19, affine), rmsnorm_case(9, 64, affine);
        rmsnorm_case(2051, 3, affine), rmsnorm_case(11, 1024, affine); // more rows than parts; mega200M's
    }
    rmsnorm_case(3, 2560, 1), rmsnorm_case(3, 5000, 1), rmsnorm_case(3, 8191, 1), rmsnorm_case(3, 8192, 1);
    for (int i = 0; i < 4; i++) { // squares that overflow, of some rows and of all
        double size = i == 0 ? 1e18 : i == 1 ? 1e20 : i == 2 ? 1e25 : 1e38;
        rmsnorm_case(1, 1024, 1, size), rmsnorm_case(9, 64, 0, size), rmsnorm_case(5, 19, 1, size);
    }
}

// On a GPU products of bfloat16 add up in another order and keep fewer guard bits.
static const double PRODUCT_BACKWARD = sizeof(floatX) == 4 ? FLOAT_BACKWARD : 2e-5;

static void linear_case(int R, int K, int M) {
    for (int form = 0; form < 6; form++) {
        int with_bias = form & 1, added = form / 2; // 1: what is added lies elsewhere, 2: in out
        begin("linear, R %d K %d M %d%s%s", R, K, M, with_bias ? ", bias" : "",
              added == 2 ? ", added in place"
              : added    ? ", added"
                         : "");
        Acts inp = acts((size_t)R * K, 1, 0), weight = acts((size_t)M * K, 1, 0), bias = {}, summand = {};
        Acts out = acts_out((size_t)R * M), dout = acts(out.n, 1, 0.1);
        Acts dinp = added ? acts(inp.n, 1, 0) : acts_out(inp.n);
        Floats dweight = floats(weight.n, 1, 0), dbias = {};
        if (with_bias) bias = acts(M, 1, 0), dbias = floats(M, 1, 0);
        if (added) {
            summand = acts(out.n, 1, 0);
            memcpy(out.host, summand.host, out.n * sizeof *out.host);
        }
        if (added == 2) out.device = summand.device;
        cpu_linear_forward(out.host, added > 0, inp.host, weight.host, bias.host, R, K, M);
        linear_forward(out.device, summand.device, inp.device, weight.device, bias.device, R, K, M);
        compare("out", out, FORWARD);
        float *parts = on_device<float>((size_t)MOST_PARTS * M);
        cpu_linear_backward(dinp.host, added > 0, dweight.host, dbias.host, dout.host, inp.host, weight.host, R, K, M);
        linear_backward(dinp.device, added > 0, dweight.device, dbias.device, dout.device, inp.device, weight.device,
                        parts, R, K, M);
        compare("dinp", dinp, BACKWARD), compare("dweight", dweight, PRODUCT_BACKWARD);
        compare("dbias", dbias, PRODUCT_BACKWARD);
        finish();
    }
}
static void test_linear(void) {
    linear_case(1, 1, 1), linear_case(7, 13, 11), linear_case(300, 9, 5), linear_case(64, 16, 24);
    linear_case(3, 1024, 256), linear_case(2, 1024, 2560), linear_case(3, 2048, 1024); // mega200M's
}

static void qk_case(int B, int L, int Z, int dz, int C, int state, double size = 1) {
    begin("qk, B %d L %d Z %d dz %d C %d%s, x %g", B, L, Z, dz, C, state ? ", state" : "", size);
    const double base = 1e4;
    int R = B * L;
    int64_t *count = NULL, *device_count = NULL;
    Acts z = acts_rows(R, Z, 1, 0.2, size), q = acts_out(z.n), k = acts_out(z.n);
    Floats gamma = floats(2 * Z, 1, 0), beta = floats(2 * Z, 1, 0);
    float2 *table = on_device<float2>((size_t)C * (dz / 2));
    if (state) {
        count = on_host<int64_t>(B);
        for (int b = 0; b < B; b++) count[b] = b ? 1000000000007 : 3;
        device_count = copied(count, B);
    }
    rope_table(table, C, dz, base);
    cpu_qk_forward(q.host, k.host, z.host, gamma.host, beta.host, count, B, L, Z, dz, C, base, EPS);
    qk_forward(q.device, k.device, z.device, gamma.device, beta.device, table, device_count, R, L, Z, dz, C, EPS);
    compare("q", q, FORWARD), compare("k", k, FORWARD);
    cpu_qk_forward(q.host, k.host, z.host, gamma.host, beta.host, NULL, B, L, Z, dz, C, 0, EPS);
    qk_forward(q.device, k.device, z.device, gamma.device, beta.device, NULL, NULL, R, L, Z, dz, C, EPS);
    compare("q, not turned", q, FORWARD), compare("k, not turned", k, FORWARD);

    Acts dq = acts(z.n, 1, 0.1), dk = acts(z.n, 1, 0), dz_out = acts_out(z.n);
    Floats dgamma = floats(2 * Z, 1, 0), dbeta = floats(2 * Z, 1, 0);
    cpu_qk_backward(dz_out.host, dgamma.host, dbeta.host, dq.host, dk.host, z.host, gamma.host, B, L, Z, dz, C, base,
                    EPS);
    qk_backward(dz_out.device, dgamma.device, dbeta.device, dq.device, dk.device, z.device, gamma.device, table,
                on_device<float>(MOST_PARTS * 4 * (size_t)Z), R, L, Z, dz, C, EPS);
    compare("dz", dz_out, BACKWARD), compare("dgamma", dgamma, FLOAT_BACKWARD);
    compare("dbeta", dbeta, FLOAT_BACKWARD);
    finish();
}
static void test_qk(void) {
    for (int state = 0; state < 2; state++) {
        qk_case(1, 1, 2, 2, 1, state), qk_case(2, 11, 18, 6, 5, state), qk_case(3, 9, 64, 32, 4, state);
        qk_case(1, 1100, 4, 2, 64, state), qk_case(2, 5, 256, 256, 2048, state); // more rows than parts; mega200M's
    }
    for (int i = 0; i < 3; i++) // squares that overflow, of some rows and of all
        qk_case(2, 5, 64, 32, 8, 0, i == 0 ? 1e19 : i == 1 ? 1e25 : 1e37), qk_case(1, 1, 256, 256, 8, 1, 1e20);
    qk_case(1, 3, 3200, 3200, 2, 0); // one warp's sums alone need shared memory that must be asked for
}

static void test_gates(void) {
    static const size_t sizes[] = {1, 37, 4096, 5 * 2048 + 3};
    for (size_t n : sizes) {
        begin("silu, %d", (int)n);
        Acts x = acts(n, 6, 0), y = acts_out(n), dout = acts(n, 1, 0), dx = acts_out(n), again = acts_out(n);
        cpu_silu_forward(y.host, x.host, n), cpu_silu_backward(dx.host, dout.host, x.host, n);
        memcpy(again.host, y.host, n * sizeof *y.host);
        silu_forward(y.device, x.device, n);
        compare("out", y, FORWARD);
        silu_backward(again.device, dx.device, dout.device, x.device, n);
        compare("dinp", dx, BACKWARD), compare("out again", again, FORWARD);
        dx.device = dout.device;
        silu_backward(NULL, dx.device, dout.device, x.device, n);
        compare("dinp in place", dx, BACKWARD);
        finish();

        begin("gate, %d", (int)n);
        Acts a = acts(n, 1, 0), b = acts(n, 6, 0), out = acts_out(n), dgate = acts(n, 1, 0), same = copy_of(dgate);
        Acts da = acts_out(n), db = acts_out(n), recomputed = acts_out(n);
        cpu_gate_forward(out.host, a.host, b.host, n);
        cpu_gate_backward(da.host, db.host, dgate.host, a.host, b.host, n);
        memcpy(recomputed.host, out.host, n * sizeof *out.host);
        gate_forward(out.device, a.device, b.device, n);
        compare("out", out, FORWARD);
        gate_backward(recomputed.device, da.device, db.device, dgate.device, a.device, b.device, n);
        compare("da", da, BACKWARD), compare("db", db, BACKWARD), compare("out again", recomputed, FORWARD);
        da.device = same.device;
        gate_backward(recomputed.device, da.device, db.device, same.device, a.device, b.device, n);
        compare("da in place", da, BACKWARD), compare("db then", db, BACKWARD);
        finish();
    }
}

// Pre-activations at which e^-x overflows, or underflows, with factors that are large themselves.
static void test_far_gates(void) {
    static const float points[] = {0, 1, 20, 64, 65, 87, 89, 100, 104, 1e4f, 1e30f, 3e38f},
                       factors[] = {1, -1e20f, 3e38f};
    enum { POINTS = 12, COUNT = 2 * POINTS * 3 };
    begin("gates, far from zero");
    float *x = on_host<float>(COUNT), *factor = on_host<float>(COUNT), *ones = on_host<float>(COUNT);
    for (int i = 0; i < COUNT; i++) {
        x[i] = (i % 2 ? 1 : -1) * points[i / 2 % POINTS], factor[i] = factors[i / 2 / POINTS], ones[i] = 1;
        if (fabsf(factor[i]) > 1 && x[i] < -64 && x[i] > -200) x[i] = -1e30f; // silu is below float's range
    }
    Acts inp = acts_from(x, COUNT), a = acts_from(factor, COUNT), dout = acts_from(ones, COUNT), y = acts_out(COUNT);
    Acts dinp = acts_out(COUNT), again = acts_out(COUNT), out = acts_out(COUNT), da = acts_out(COUNT);
    Acts db = acts_out(COUNT), recomputed = acts_out(COUNT);
    cpu_silu_forward(y.host, inp.host, COUNT), cpu_silu_backward(dinp.host, dout.host, inp.host, COUNT);
    cpu_gate_forward(out.host, a.host, inp.host, COUNT);
    cpu_gate_backward(da.host, db.host, dout.host, a.host, inp.host, COUNT);
    memcpy(again.host, y.host, COUNT * sizeof(float)), memcpy(recomputed.host, out.host, COUNT * sizeof(float));
    silu_forward(y.device, inp.device, COUNT);
    silu_backward(again.device, dinp.device, dout.device, inp.device, COUNT);
    gate_forward(out.device, a.device, inp.device, COUNT);
    gate_backward(recomputed.device, da.device, db.device, dout.device, a.device, inp.device, COUNT);
    compare_each("silu", y), compare_each("silu's derivative", dinp), compare_each("silu again", again);
    compare_each("gate", out), compare_each("da", da), compare_each("db", db), compare_each("gate again", recomputed);
    finish();
}

// Scores have a deviation of about one.
static void attention_case(int B, int L, int C, int H, int dz, int dv, double p, int state) {
    begin("attention, B %d L %d C %d H %d dz %d dv %d%s%s", B, L, C, H, dz, dv, p > 0 ? ", dropout" : "",
          state ? ", state" : "");
    static const int64_t before[4] = {3, 0, 1, 1000003};
    size_t R = (size_t)B * L, Z = (size_t)H * dz, E = (size_t)H * dv;
    size_t scores_size = (size_t)min_int(chunks_at_once(C), B * ceil_div(L, C)) * score_rows(C) * score_columns(C);
    double size = sqrt(3 / sqrt((double)dz));
    // S, P, dP and dS are acts, each rounded, which few keys do not average out.
    double forward = sizeof(floatX) < 4 && min_int(L, C) < 10 ? 1e-2 : FORWARD;
    double backward = sizeof(floatX) < 4 && min_int(L, C) < 10 ? 1e-2 : BACKWARD;
    Mask m = mask_from(p, ((uint64_t)1 << 33) + 5);
    m.row = (uint64_t)L * C;
    Acts q = acts(R * Z, size, 0), k = acts(R * Z, size, 0), v = acts(R * E, 1, 0.1), o = acts_out(R * E);
    Floats lse = floats_out(R * H), cache_k = {}, cache_v = {};
    floatX *scores = on_device<floatX>(scores_size), *dscores = on_device<floatX>(scores_size);
    floatX *chunk_k = on_device<floatX>(C * Z), *chunk_v = on_device<floatX>(C * E);
    int64_t *count = on_host<int64_t>(B);
    int *past = on_host<int>(B);
    for (int b = 0; b < B; b++) {
        count[b] = before[(b + state + 3) % 4]; // state 1 begins with the first
        past[b] = (int)(count[b] % C);
    }
    if (state) cache_k = rounded_floats(B * C * Z, size, 0), cache_v = rounded_floats(B * C * E, 1, 0);
    cpu_attention_forward(o.host, lse.host, cache_k.host, cache_v.host, q.host, k.host, v.host, state ? count : NULL,
                          m.p, m.seed, m.stream, m.step, m.layer, m.first, B, L, C, H, (int)Z, (int)E);
    attention_forward(o.device, lse.device, cache_k.device, cache_v.device, scores, chunk_k, chunk_v, q.device,
                      k.device, v.device, state ? past : NULL, m, B, L, C, H, (int)Z, (int)E);
    compare("o", o, forward), compare("lse", lse, forward);
    compare("cached k", cache_k, 1e-30), compare("cached v", cache_v, 1e-30);
    if (!state) {
        Acts dout = acts(R * E, 1, 0), dq = acts_out(R * Z), dk = acts_out(R * Z), dv_out = acts_out(R * E);
        cpu_attention_backward(dq.host, dk.host, dv_out.host, dout.host, o.host, lse.host, q.host, k.host, v.host, m.p,
                               m.seed, m.stream, m.step, m.layer, m.first, B, L, C, H, (int)Z, (int)E);
        attention_backward(dq.device, dk.device, dv_out.device, scores, dscores, dout.device, lse.device, q.device,
                           k.device, v.device, m, B, L, C, H, (int)Z, (int)E);
        compare("dq", dq, backward), compare("dk", dk, backward), compare("dv", dv_out, backward);
    }
    finish();
}
static void test_attention(void) {
    for (int dropping = 0; dropping < 2; dropping++) {
        double p = dropping ? 0.3 : 0;
        attention_case(1, 7, 7, 1, 3, 5, p, 0), attention_case(2, 5, 8, 3, 2, 3, p, 0);
        attention_case(2, 16, 8, 1, 4, 8, p, 0), attention_case(3, 19, 8, 3, 2, 3, p, 0);
        attention_case(3, 40, 16, 2, 8, 16, p, 0), attention_case(2, 33, 11, 2, 3, 5, p, 0);
        attention_case(1, 700, 1030, 1, 4, 3, p, 0); // more queries than exist at a time, not all of a chunk
        attention_case(2, 560, 530, 2, 2, 4, p, 0);
        attention_case(1, 24, 2048, 1, 256, 2048, p, 0); // mega200M's
        for (int state = 1; state < 5; state++) {
            attention_case(1, 1, 8, 1, 4, 8, p, state), attention_case(4, 1, 5, 2, 3, 3, p, state);
            attention_case(4, 4, 5, 2, 3, 3, p, state), attention_case(3, 23, 8, 1, 8, 8, p, state);
            attention_case(2, 5, 8, 3, 2, 5, p, state), attention_case(1, 2, 5, 1, 3, 2, p, state);
        }
        attention_case(2, 16, 8, 2, 4, 8, p, 2), attention_case(2, 1100, 1030, 1, 2, 3, p, 1);
    }
    attention_case(1, 65 * 512, 512, 1, 2, 1, 0, 0); // more chunks than there is room for scores of
}

// Three tokens. Scores 0, and 2^28 twice, whose log-sum-exp rounds to themselves: they must share the probability, and the
// first value must not count. Then a score that overflows to -infinity, which must not pass for a probability of 0.
static void test_far_attention(void) {
    enum { L = 3, DZ = 2 };
    for (int overflow = 0; overflow < 2; overflow++) {
        begin("attention, %s", overflow ? "a score that overflows" : "equal scores of 2^28");
        float *q = random_numbers(L * DZ, 0, 0), *k = random_numbers(L * DZ, 0, 0), *v = random_numbers(L, 0, 1);
        float *last = random_numbers(L, 0, 0), large = overflow ? 1e30f : 0x1p14f;
        for (int t = 0; t < L; t++) q[t * DZ] = large, k[t * DZ] = overflow ? (t ? 0 : -large) : (t ? large : 0);
        v[0] = 1e38f, v[2] = 3, last[2] = 1;
        Acts qs = acts_from(q, L * DZ), ks = acts_from(k, L * DZ), vs = acts_from(v, L), o = acts_out(L);
        Acts dout = acts_from(last, L), dq = acts_out(qs.n), dk = acts_out(qs.n), dv = acts_out(L);
        Floats lse = floats_out(L);
        floatX *scores = on_device<floatX>(L * VEC), *dscores = on_device<floatX>(L * VEC);
        Mask none = mask_from(0, 0);
        cpu_attention_forward(o.host, lse.host, NULL, NULL, qs.host, ks.host, vs.host, NULL, 0, 0, 0, 0, 0, 0, 1, L, L,
                              1, DZ, 1);
        cpu_attention_backward(dq.host, dk.host, dv.host, dout.host, o.host, lse.host, qs.host, ks.host, vs.host, 0, 0,
                               0, 0, 0, 0, 1, L, L, 1, DZ, 1);
        attention_forward(o.device, lse.device, NULL, NULL, scores, on_device<floatX>(L * DZ), on_device<floatX>(L),
                          qs.device, ks.device, vs.device, NULL, none, 1, L, L, 1, DZ, 1);
        attention_backward(dq.device, dk.device, dv.device, scores, dscores, dout.device, lse.device, qs.device,
                           ks.device, vs.device, none, 1, L, L, 1, DZ, 1);
        compare_each("o", o);
        if (!overflow) compare_each("dq", dq), compare_each("dk", dk), compare_each("dv", dv);
        finish();
    }
}

static void layernorm_case(int R, int D, int affine, double size = 1) {
    begin("layernorm, R %d D %d%s, x %g", R, D, affine ? "" : ", no affine", size);
    Acts inp = acts_rows(R, D, 1, 0.3, size), out = acts_out(inp.n), dout = acts(inp.n, 1, 0), dinp = acts_out(inp.n);
    Floats weight = {}, bias = {}, dweight = {}, dbias = {}, rstd = floats_out(R);
    Means mean = means_out<float>(R);
    if (affine) weight = floats(D, 1, 0), bias = floats(D, 1, 0), dweight = floats(D, 1, 0), dbias = floats(D, 1, 0);
    cpu_layernorm_forward(out.host, mean.host, rstd.host, inp.host, weight.host, bias.host, R, D, EPS);
    layernorm_forward(out.device, mean.device, rstd.device, inp.device, weight.device, bias.device, R, D, EPS);
    compare("out", out, FORWARD), compare("mean", mean, FLOAT_FORWARD), compare("rstd", rstd, FLOAT_FORWARD);
    upload_means(mean), upload(rstd.device, rstd.host, R * sizeof(float));
    cpu_layernorm_backward(dinp.host, dweight.host, dbias.host, dout.host, inp.host, weight.host, mean.host, rstd.host,
                           R, D);
    layernorm_backward(dinp.device, dweight.device, dbias.device, dout.device, inp.device, weight.device, mean.device,
                       rstd.device, on_device<float>((size_t)row_parts(R) * 2 * D), R, D);
    compare("dinp", dinp, BACKWARD);
    compare("dweight", dweight, FLOAT_BACKWARD), compare("dbias", dbias, FLOAT_BACKWARD);
    finish();
}
static void test_layernorm(void) {
    for (int affine = 0; affine < 2; affine++) {
        layernorm_case(1, 5, affine), layernorm_case(5, 19, affine), layernorm_case(9, 64, affine);
        layernorm_case(2051, 7, affine), layernorm_case(11, 1024, affine); // more rows than parts; mega200M's
    }
    layernorm_case(3, 2560, 1), layernorm_case(3, 5000, 1), layernorm_case(3, 8191, 1), layernorm_case(3, 8192, 1);
    for (int i = 0; i < 4; i++) { // squares, or their sum, that overflow, of some rows and of all
        double size = i == 0 ? 1e18 : i == 1 ? 1e20 : i == 2 ? 1e25 : 1e38;
        layernorm_case(1, 1024, 1, size), layernorm_case(9, 64, 0, size), layernorm_case(5, 19, 1, size);
    }
}

static void rescale_case(int R, int D) {
    begin("rescale, R %d D %d", R, D);
    Acts inp = acts((size_t)R * D, 1, 0), out = acts_out(inp.n), dout = acts(inp.n, 1, 0), dinp = acts_out(inp.n);
    Floats alpha = floats(D, 1, 0), dalpha = floats(D, 1, 0);
    cpu_rescale_forward(out.host, inp.host, alpha.host, R, D);
    rescale_forward(out.device, inp.device, alpha.device, R, D);
    compare("out", out, FORWARD);
    cpu_rescale_backward(dinp.host, dalpha.host, dout.host, inp.host, alpha.host, R, D);
    rescale_backward(dinp.device, dalpha.device, dout.device, inp.device, alpha.device,
                     on_device<float>((size_t)row_parts(R) * D), R, D);
    compare("dinp", dinp, BACKWARD), compare("dalpha", dalpha, FLOAT_BACKWARD);
    finish();
}
static void test_rescale(void) {
    rescale_case(1, 1), rescale_case(5, 13), rescale_case(2051, 3), rescale_case(7, 1024);
}

static void test_add(void) {
    static const size_t sizes[] = {1, 37, 4096, 5 * 2048 + 3};
    for (size_t n : sizes) {
        begin("add, %d", (int)n);
        Acts out = acts(n, 1, 0), inp = acts(n, 1, 0);
        cpu_add(out.host, inp.host, n), add(out.device, inp.device, n);
        compare("out", out, FORWARD);
        finish();
    }
}

static void output_loss_case(int R, int D, int V) {
    begin("output_loss, R %d D %d V %d", R, D, V);
    const double grad_scale = 0.37;
    Acts x = acts((size_t)R * D, 1.7, 0), output = acts((size_t)V * D, 3 / sqrt((double)D), 0), dx = acts_out(x.n);
    Floats doutput = floats(output.n, 0.001, 0), losses = floats_out(R);
    Doubles total = doubles_out(1);
    double *host_losses = on_host<double>(R);
    int32_t *targets = on_host<int32_t>(R);
    for (int r = 0; r < R; r++) targets[r] = r % 3 == 1 ? -1 : (7 * r + V - 1) % V;
    cpu_output_loss(host_losses, dx.host, doutput.host, x.host, output.host, targets, grad_scale, R, D, V);
    total.host[0] = 0;
    for (int r = 0; r < R; r++) losses.host[r] = (float)host_losses[r], total.host[0] += host_losses[r];
    floatX *logits = on_device<floatX>((size_t)min_int(logit_rows(V), R) * V);
    int32_t *device_targets = copied(targets, R);
    output_loss(total.device, losses.device, NULL, NULL, logits, x.device, output.device, device_targets, 0, R, D, V);
    compare("losses alone", losses, FORWARD), compare("their sum", total, FORWARD);
    cudaCheck(cudaMemset(losses.device, 0xff, R * sizeof(float)));
    output_loss(total.device, losses.device, dx.device, doutput.device, logits, x.device, output.device, device_targets,
                grad_scale, R, D, V);
    compare("losses", losses, FORWARD), compare("sum", total, FORWARD);
    compare("dx", dx, BACKWARD), compare("doutput", doutput, BACKWARD); // through logits' gradients, which are acts
    finish();
}
static void test_output_loss(void) {
    output_loss_case(2, 3, 5), output_loss_case(7, 5, 11), output_loss_case(300, 8, 16), output_loss_case(9, 24, 64);
    output_loss_case(5, 3, 4099), output_loss_case(4, 16, 32000);
}

// x is 1, so that logits are the output matrix: two of 1e20; one far above the others, so that the loss is small and
// softmax - 1 cancels; one that overflows to -infinity, which must not pass for a probability of 0.
static void test_far_loss(void) {
    static const char *const names[3] = {"two logits of 1e20", "a logit 20 above the others", "a logit that overflows"};
    for (int i = 0; i < 6; i++) {
        int kind = i / 2, V = i % 2 ? 64 : 5, target = kind == 2 ? 1 : V - 2;
        begin("output_loss, V %d, %s", V, names[kind]);
        float *row = random_numbers(V, 1, -20), *one = random_numbers(1, 0, kind == 2 ? 1e20 : 1);
        row[target] = kind == 0 ? 1e20f : kind == 1 ? 0 : 1, row[V - 1] = kind == 0 ? 1e20f : kind == 1 ? -20 : -1e30f;
        Acts x = acts_from(one, 1), output = acts_from(row, V), dx = acts_out(1);
        Floats doutput = floats(V, 0, 0), losses = floats_out(1);
        Doubles total = doubles_out(1);
        int32_t *targets = on_host<int32_t>(1);
        targets[0] = target;
        cpu_output_loss(total.host, dx.host, doutput.host, x.host, output.host, targets, 1, 1, 1, V);
        output_loss(total.device, losses.device, dx.device, doutput.device, on_device<floatX>(V), x.device, output.device,
                    copied(targets, 1), 1, 1, 1, V);
        float loss;
        cudaCheck(cudaMemcpy(&loss, losses.device, sizeof loss, cudaMemcpyDeviceToHost));
        if (kind == 2) cpu_check_true("output_loss: a logit that overflows: the loss is NaN", isnan(loss));
        if (kind < 2) compare("loss", total, FLOAT_FORWARD), compare("gradient of the logits", doutput, BACKWARD);
        finish();
    }
}

// ----------------------------------------------------------------------------
// decoding: a token of each of B sequences

static void decode_norm_case(int B, int D, int G, int N, double shift = 0.5, double scale = 1) {
    begin("decode_norm, B %d D %d G %d N %d, mean %g, x %g", B, D, G, N, shift, scale);
    size_t n = (size_t)D * N, width = (size_t)B * D;
    Acts x = acts(width, 1.7 * scale, shift), xt = acts_out(width), ema = acts_out(width), alone = acts_out(width);
    Floats weight = floats(D, 1, 0), bias = floats(D, 1, 0), omega = floats(D, 1, 0), h = floats(2 * n * B, 1, 0);
    Floats alpha = floats(n, 1, 0), delta = floats(n, 1, 0), theta = floats(D, 1, -1), gamma = floats(2 * n, 1, 0);
    Floats all = floats_out(7 * n), rstds = floats_out((size_t)B * G);
    double *means = on_host<double>((size_t)B * G);
    Past in = past_of(B, D, G, shift, scale);
    Doubles mean = doubles_out((size_t)B * G), m2 = doubles_out((size_t)B * G);
    double *same_mean = copied(in.mean.host, mean.n), *same_m2 = copied(in.m2.host, m2.n);
    Coeffs c = coeffs_at(all.device, n, 1);
    cpu_cema_coeffs_forward(all.host, alpha.host, delta.host, theta.host, gamma.host, D, N);
    cema_coeffs_forward(&c, alpha.device, delta.device, theta.device, gamma.device, D, N);
    cpu_timestep_norm_forward(xt.host, means, rstds.host, mean.host, m2.host, x.host, weight.host, bias.host,
                              in.mean.host, in.m2.host, in.count, B, 1, D, G, EPS);
    memcpy(alone.host, xt.host, width * sizeof *xt.host);
    cpu_cema_forward(ema.host, h.host, xt.host, all.host, omega.host, h.host, B, 1, D, N);
    decode_norm(xt.device, ema.device, in.mean.device, in.m2.device, h.device, x.device, weight.device, bias.device, c,
                omega.device, in.device_count, B, D, G, N, EPS);
    mean.device = in.mean.device, m2.device = in.m2.device;
    const bool overflows = scale > 1e18;
    if (overflows) {
        compare_nan("xt", xt, 0, width), compare_nan("ema", ema, 0, width);
    } else {
        compare("xt", xt, FORWARD), compare("ema", ema, FORWARD), compare("h", h, FORWARD);
        compare("mean", mean, FLOAT_FORWARD), compare("m2", m2, FLOAT_FORWARD);
    }
    decode_norm(alone.device, NULL, same_mean, same_m2, NULL, x.device, weight.device, bias.device, Coeffs{}, NULL,
                in.device_count, B, D, G, 0, EPS);
    mean.device = same_mean;
    if (overflows)
        compare_nan("without CEMA", alone, 0, width);
    else
        compare("without CEMA", alone, FORWARD), compare("its mean", mean, FLOAT_FORWARD);
    finish();
}
static void test_decode_norm(void) {
    decode_norm_case(1, 1, 1, 1), decode_norm_case(3, 30, 2, 3), decode_norm_case(2, 132, 132, 16);
    decode_norm_case(4, 200, 2, 33); // groups of more channels than lanes, more modes than warps
    decode_norm_case(1, 1024, 32, 16), decode_norm_case(8, 384, 32, 8); // mega200M's, enwik8's
    const double spread = sizeof(floatX) == 4 ? 1 : 1e5 / 30;              // as in timestep_norm's cases
    decode_norm_case(3, 60, 2, 3, 1e5, spread);
    decode_norm_case(3, 60, 2, 3, 0, 1e20); // its float sums overflow
    decode_norm_case(2, 64, 1, 2, 1e36, 1e37);
}

// A launch of three: everything, of one kind of norm; nothing but a bias; silu alone.
static void gemv_rows_case(int B, int K, int M, int M2, int norm, int affine, double size = 1) {
    begin("gemv_rows, B %d K %d M %d and %d%s%s, x %g", B, K, M, M2,
          norm == NO_NORM    ? ""
          : norm == RMS_NORM ? ", RMS"
                             : ", LN",
          affine ? ", affine" : "", size);
    size_t n = (size_t)B * M, n2 = (size_t)B * M2;
    Acts inp = acts_rows(B, K, 1, 0.3, size), weight = acts((size_t)M * K, 1 / sqrt((double)K), 0),
         bias = acts(M, 1, 0);
    Acts gate = acts(weight.n, 1 / sqrt((double)K), 0), add = acts(n, 1, 0), out = copy_of(add), bias2 = acts(M2, 1, 0);
    Acts weight2 = acts((size_t)M2 * K, 1 / sqrt((double)K), 0), out2 = acts_out(n2), out3 = acts_out(n2);
    Floats scale = floats(M, 1, 0), norm_weight = {}, norm_bias = {}, rstd = floats_out(B);
    double *mean = on_host<double>(B);
    float *x = on_host<float>(inp.n), *times = on_host<float>(n);
    if (affine) norm_weight = floats(K, 1, 0);
    if (affine && norm == LAYER_NORM) norm_bias = floats(K, 1, 0);
    memcpy(x, inp.host, inp.n * sizeof *x);
    if (norm == RMS_NORM) cpu_rmsnorm_forward(x, rstd.host, inp.host, norm_weight.host, B, K, EPS);
    if (norm == LAYER_NORM)
        cpu_layernorm_forward(x, mean, rstd.host, inp.host, norm_weight.host, norm_bias.host, B, K, EPS);
    cpu_linear_forward(out.host, 0, x, weight.host, bias.host, B, K, M);
    cpu_linear_forward(times, 0, x, gate.host, NULL, B, K, M);
    cpu_linear_forward(out2.host, 0, inp.host, weight2.host, bias2.host, B, K, M2);
    cpu_linear_forward(out3.host, 0, inp.host, weight2.host, NULL, B, K, M2);
    for (size_t i = 0; i < n2; i++) out3.host[i] /= 1 + expf(-out3.host[i]);
    for (size_t i = 0; i < n; i++) {
        float y = out.host[i] / (1 + expf(-out.host[i])) * times[i];
        out.host[i] = y * scale.host[i % M] + add.host[i];
    }
    Linears all;
    memset((void *)&all, 0, sizeof all);
    Linear *l = all.of;
    for (int i = 0; i < 3; i++) l[i].inp = inp.device, l[i].M = i ? M2 : M;
    l[0].out = out.device, l[0].add = out.device, l[0].weight = weight.device, l[0].bias = bias.device; // in place
    l[0].gate = gate.device, l[0].scale = scale.device, l[0].silu = 1, l[0].norm = norm;
    l[0].norm_weight = norm_weight.device, l[0].norm_bias = norm_bias.device;
    l[1].out = out2.device, l[1].weight = l[2].weight = weight2.device, l[1].bias = bias2.device;
    l[2].out = out3.device, l[2].silu = 1;
    gemv_rows(all, B, K, EPS);
    for (int r = 0; r < B && size > 1; r++) { // acts_rows has multiplied every second row, or the only one
        if (B == 1 || r % 2)
            compare_nan("everything, a large row", out, (size_t)r * M, M);
        else
            compare_part("everything, an ordinary row", out, (size_t)r * M, M, FORWARD);
    }
    if (size == 1) compare("everything", out, FORWARD);
    compare("a bias", out2, FORWARD), compare("silu", out3, FORWARD);
    finish();
}
static void test_few_rows(void) {
    for (int i = 0; i < 6; i++) {
        int norm = i % 3, affine = i / 3;
        gemv_rows_case(1, 1, 1, 1, norm, affine), gemv_rows_case(3, 45, 37, 5, norm, affine);
        gemv_rows_case(2, 64, 9, 33, norm, affine), gemv_rows_case(8, 384, 100, 7, norm, affine);
        gemv_rows_case(5, 1000, 11, 13, norm, affine); // two rounds of loads
        gemv_rows_case(1, 2560, 1024, 3, norm, affine), gemv_rows_case(4, 5000, 3, 2, norm, affine); // and of columns
        gemv_rows_case(1, 40, 5000, 3, norm, affine);                                               // a warp an output
        if (norm == NO_NORM) continue;
        gemv_rows_case(1, 384, 100, 7, norm, affine, 1e20), gemv_rows_case(3, 64, 9, 5, norm, affine, 1e36);
    }
}

static void decode_attention_case(int B, int C, int H, int dz, int dv, int shift) {
    begin("decode_attention, B %d C %d H %d dz %d dv %d, %d", B, C, H, dz, dv, shift);
    const double base = 1e4, forward = sizeof(floatX) < 4 ? 1e-2 : FORWARD; // q and k are rounded
    const int64_t before[4] = {C - 1, 0, C / 2, 1000003};
    size_t Z = (size_t)H * dz, E = (size_t)H * dv;
    double size = sqrt(3 / sqrt((double)dz));
    Acts z = acts(B * Z, 1, 0.2), v = acts(B * E, 1, 0.1), r = acts(B * E, 3, 0), gated = acts_out(B * E);
    Floats gamma = floats(2 * Z, sqrt((double)dz), 0), beta = floats(2 * Z, 0.5, 0), lse = floats_out((size_t)B * H);
    Floats cache_k = rounded_floats(B * C * Z, size, 0), cache_v = rounded_floats(B * C * E, 1, 0);
    float *q = on_host<float>(B * Z), *k = on_host<float>(B * Z), *o = on_host<float>(B * E);
    float2 *table = on_device<float2>((size_t)C * (dz / 2));
    int64_t *count = on_host<int64_t>(B);
    for (int b = 0; b < B; b++) count[b] = before[(b + shift) % 4];
    rope_table(table, C, dz, base);
    cpu_qk_forward(q, k, z.host, gamma.host, beta.host, count, B, 1, (int)Z, dz, C, base, EPS);
    cpu_attention_forward(o, lse.host, cache_k.host, cache_v.host, q, k, v.host, count, 0, 0, 0, 0, 0, 0, B, 1, C, H,
                          (int)Z, (int)E);
    cpu_gate_forward(gated.host, o, r.host, B * E);
    decode_attention(gated.device, cache_k.device, cache_v.device, on_device<float>((size_t)B * H * C), z.device,
                     v.device, r.device, gamma.device, beta.device, table, copied(count, B), B, C, H, (int)Z, (int)E,
                     EPS);
    compare("gated", gated, forward);
    if (C > 1) compare("cached k", cache_k, FORWARD), compare("cached v", cache_v, 1e-30); // else there is no need
    finish();
}
static void test_decode_attention(void) {
    for (int shift = 0; shift < 4; shift++) {
        decode_attention_case(1, 1, 1, 2, 1, shift), decode_attention_case(4, 5, 3, 6, 3, shift);
        decode_attention_case(3, 70, 2, 34, 33, shift), decode_attention_case(2, 600, 1, 4, 16, shift);
        decode_attention_case(1, 40, 2, 300, 17, shift); // more of a key than is loaded at once
    }
    decode_attention_case(1, 2048, 1, 256, 100, 0), decode_attention_case(8, 256, 3, 64, 128, 0);
}

// ----------------------------------------------------------------------------
// the optimizer, on a model that has nothing else

static void optimizer_case(size_t n) {
    begin("optimizer, %d", (int)n);
    const AdamW adamw = {0.9, 0.95, 1e-8, 0.1};
    Floats params = floats(n, 1, 0), grads = floats(n, 1, 0.1), moment1 = floats(n, 0.1, 0),
           moment2 = floats(n, 0.1, 0.1);
    Acts narrow = acts_out(n);
    Doubles norm = doubles_out(1);
    Model m;
    memset((void *)&m, 0, sizeof m);
    Shard whole = {0, n};
    m.num_params = n, m.own = &whole, m.num_own = 1, m.coeffs_valid = 1, m.totals = on_device<double>(NORM_PARTS);
    m.memory[PARAMS] = params.device, m.memory[GRADS] = grads.device;
    m.memory[MOMENT1] = moment1.device, m.memory[MOMENT2] = moment2.device;
    m.rounded = sizeof(floatX) < 4 ? narrow.device : (floatX *)(void *)params.device;
    norm.host[0] = cpu_grad_norm(grads.host, n);
    double got = megalodon_grad_norm(&m);
    upload(norm.device, &got, sizeof got);
    compare("norm of gradients", norm, 1e-12);
    for (int64_t update = 0; update < 3; update++) {
        cpu_update(params.host, moment1.host, moment2.host, grads.host, n, adamw.beta1, adamw.beta2, adamw.eps,
                   adamw.weight_decay, 0.01, 0.7, 4 * update);
        megalodon_update(&m, &adamw, 0.01, 0.7, 4 * update);
    }
    compare("parameters", params, FLOAT_FORWARD), compare("moment 1", moment1, FLOAT_FORWARD);
    compare("moment 2", moment2, FLOAT_FORWARD), compare("gradients stay", grads, 1e-30);
    cpu_check_true("optimizer: coefficients are no longer valid", m.coeffs_valid == 0);
    if (sizeof(floatX) < 4) {
        memcpy(narrow.host, params.host, n * sizeof *params.host);
        compare("rounded parameters", narrow, FORWARD);
    }
    megalodon_zero_grad(&m);
    cpu_check_true("optimizer: gradients are zero", megalodon_grad_norm(&m) == 0);
    finish();
}
static void test_optimizer(void) { optimizer_case(1), optimizer_case(1003), optimizer_case(300001); }

// ----------------------------------------------------------------------------
// shared memory: the tiles of devices that allow 99 KB per thread block, on devices that allow more, too

// The sums of CEMA's backward pass with both sizes of thread blocks: equal bits, since channels are independent.
static void tiles_case(int B, int L, int D, int N, bool cut) {
    begin("cema_sums, B %d L %d D %d N %d%s", B, L, D, N, cut ? ", cut" : "");
    const size_t R = (size_t)B * L, n = (size_t)D * N, states = (size_t)B * ceil_div(L, CEMA_BLOCK) * n;
    const size_t parts = (size_t)cema_parts(B, L, D) * (5 * N + 1) * D;
    const int device = gpu.max_shared;
    Acts inp = acts(R * D, 1, 0.2), dout = acts(R * D, 1, 0.2);
    Floats all = floats(7 * n, 0.5, 0), h = floats(2 * states, 1, 0), futures = floats(2 * states, 1, 0);
    Coeffs coeffs = coeffs_at(all.device, n, 1);
    float *bits[2];
    for (int i = 0; i < 2; i++) {
        float *out = on_device<float>(parts);
        if (i == 1) gpu.max_shared = SHARED_NEEDED - SHARED_DECLARED;
        cema_sums(out, dout.device, inp.device, (const float2 *)(const void *)h.device,
                  (const float2 *)(const void *)futures.device, &coeffs, cut, B, L, D, N);
        bits[i] = on_host<float>(parts);
        cudaCheck(cudaMemcpy(bits[i], out, parts * sizeof(float), cudaMemcpyDeviceToHost));
    }
    gpu.max_shared = device;
    char name[120];
    snprintf(name, sizeof name, "%s: the same bits with smaller tiles", now.title);
    cpu_check_true(name, memcmp(bits[0], bits[1], parts * sizeof(float)) == 0);
    finish();
}
static void test_tiles(void) {
    const int device = gpu.max_shared;
    for (int cut = 0; cut < 2; cut++) {
        tiles_case(2, 130, 24, 3, cut), tiles_case(1, 64, 64, 9, cut), tiles_case(3, 70, 5, 1, cut);
    }
    gpu.max_shared = SHARED_NEEDED - SHARED_DECLARED;
    cema_case(2, 130, 40, 2, STATE, 0), cema_case(1, 70, 33, 9, NO_STATE, 0), cema_case(2, 64, 64, 1, STATE, 0);
    gpu.max_shared = device;
}

#ifdef CUDA_ON_CPU_RUNTIME_H
// ----------------------------------------------------------------------------
// What the emulator knows of shared memory: a table of all kernels, for all presets and for dimensions that need most,
// with the devices on which they fit. Their launches are those of training and decoding, with one layer; nothing is
// computed. What kernels declare is known from runs of small models.

enum { NUM_LIMITS = 3, OTHER = NUM_PRESETS };
static const int limits[NUM_LIMITS] = {99 << 10, 163 << 10, 227 << 10};

static void set_device(int limit) {
    char text[20];
    snprintf(text, sizeof text, "%d", limit);
    setenv("CUDA_ON_CPU_OPTIN", text, 1);
    gpu.open = 0, gpu_open();
}

static void gather_nothing(void *context, const void *mine, void *all, size_t bytes) {
    (void)context, (void)mine;
    cudaCheck(cudaMemset(all, 0, 2 * bytes));
}

// A training step, then with `joined` one as the first of two pieces; L tokens at once, then one, of up to `rows`
// sequences.
static void launch_everything(Config config, int L, bool joined, int rows) {
    enum { B = 2 };
    config.num_layers = 1;
    const int V = config.vocab_size;
    const AdamW adamw = {0.9, 0.95, 1e-8, 0.1};
    const int64_t lengths[2] = {L, L};
    const ChunkParallel pieces = {0, 2, lengths, gather_nothing, NULL};
    int32_t *tokens = on_host<int32_t>((size_t)GEMV_ROWS * L);
    float *logits = on_host<float>((size_t)GEMV_ROWS * V);
    int64_t counted;
    memset(tokens, 0, (size_t)GEMV_ROWS * L * sizeof *tokens);
    Model *m = megalodon_new(&config, MEGALODON_TRAIN, B, L);
    for (int piece = 0; m && piece <= joined; piece++) {
        if (piece) megalodon_chunk_parallel(m, &pieces);
        megalodon_forward(m, NULL, tokens, B, L);
        megalodon_loss(m, tokens, 1, &counted, NULL);
        megalodon_backward(m);
        megalodon_grad_norm(m), megalodon_update(m, &adamw, 1e-3, 1, 0);
    }
    if (m == NULL) cpu_check_true("room for a model", 0);
    megalodon_free(m);
    for (int b = 1; b <= rows; b += emu_dry ? 1 : b) { // 1, 2, 4, 8 have all kernels
        m = megalodon_new(&config, MEGALODON_INFER, b, L);
        State *state = state_new(&config, b, 0);
        if (b == 1) megalodon_forward(m, state, tokens, b, L);
        megalodon_forward(m, state, tokens, b, 1);
        megalodon_logits(m, 0, (size_t)b, logits);
        state_free(state), megalodon_free(m);
    }
    now.devices = now.hosts = 0;
    free(tokens), free(logits);
}

typedef struct {
    size_t declared, dynamic[NUM_PRESETS + 1], most[NUM_LIMITS]; // bytes; most: with what is declared
} SharedRow;

static Config dimensions(int D, int Z, int E, int H, int F, int N, int C, int V, int G, int more) {
    Config c = megalodon_presets[0].config;
    c.model_dim = D, c.z_dim = Z, c.value_dim = E, c.num_heads = H, c.ffn_hidden_dim = F, c.cema_ndim = N;
    c.chunk_size = C, c.vocab_size = V, c.norm_num_groups = G, c.swiglu = c.rescale_nffn = c.scale_emb = more;
    return c;
}

static void print_number(size_t bytes) {
    if (bytes > 0)
        printf(" %7zu", bytes);
    else
        printf(" %7s", "-");
}

static void print_table(const std::map<std::string, SharedRow> &rows) {
    int none = 0;
    printf(
        "Shared memory in bytes: declared, dynamic (--preset, with batches of 1 to %d when decoding; other: dimensions "
        "that need most),\nand the sum on devices with 99, 163, 227 KB per thread block, -: not launched there\n%-36s "
        "%8s",
        GEMV_ROWS, sizeof(floatX) == 4 ? "float32" : "bfloat16", "declared");
    for (const Preset &p : megalodon_presets) printf(" %7.7s", strncmp(p.name, "mega", 4) ? p.name : p.name + 4);
    printf(" %7s %7s %7s %7s\n", "other", "99 KB", "163 KB", "227 KB");
    for (const auto &row : rows) {
        size_t all = row.second.declared;
        for (size_t dynamic : row.second.dynamic) all += dynamic;
        if (all == 0) none++;
        if (all == 0) continue;
        printf("%-36s", row.first.c_str());
        printf(" "), print_number(row.second.declared);
        for (size_t dynamic : row.second.dynamic) print_number(dynamic);
        for (size_t most : row.second.most) print_number(most);
        printf("\n");
    }
    printf("%d other kernels have none\n", none);
}

static void test_shared_memory(void) {
    const Config odd[] = {dimensions(8192, 6208, 4, 1, 4, 64, 4, 8, 1, 1),
                          dimensions(8192, 2, 3, 1, 5, 1, 4, 7, 4096, 0),
                          dimensions(8191, 64, 32, 2, 9, 1, 70, 9, 1, 1),
                          dimensions(1000, 9000, 4500, 3, 3000, 33, 130, 5001, 500, 0),
                          dimensions(520, 3106, 8, 1, 8, 16, 2048, 8, 65, 1),
                          dimensions(24, 256, 64, 32, 8, 16, 64, 8, 8, 0),
                          dimensions(4096, 2, 8, 1, 8, 1, 64, 8, 4096 / 8, 1),
                          dimensions(4096, 2, 8, 1, 8, 1, 64, 8, 4096 / 4, 1)};
    const Config small[] = {dimensions(16, 8, 8, 2, 8, 2, 16, 16, 2, 1), dimensions(9, 6, 5, 1, 7, 2, 40, 11, 3, 0),
                            dimensions(24, 8, 8, 1, 8, 1, 64, 16, 6, 0)};
    const char *before = getenv("CUDA_ON_CPU_OPTIN");
    const std::string device = before ? before : "";
    std::map<std::string, SharedRow> rows;
    for (const Config &c : small) {
        set_device(limits[NUM_LIMITS - 1]);
        launch_everything(c, 66, true, GEMV_ROWS);
        set_device(limits[0]); // smaller tiles
        launch_everything(c, 66, true, 0);
    }
    for (int D : {(512 + 1) * VEC, 4100 + VEC}) rmsnorm_case(2, D, 1), layernorm_case(2, D, 1); // their other kernels
    emu_dry = true;
    for (int at = 0; at < NUM_LIMITS; at++) {
        set_device(limits[at]);
        for (int i = 0; i < OTHER + (int)(sizeof odd / sizeof *odd); i++) {
            const int column = i < OTHER ? i : OTHER;
            size_t most = 0, kernels = 0, unknown = 0;
            const Config config = i < OTHER ? megalodon_presets[i].config : odd[i - OTHER];
            for (auto &kernel : emu_kernels) kernel.second.launched = false, kernel.second.dynamic = 0;
            launch_everything(config, 130, true, GEMV_ROWS);
            for (const auto &kernel : emu_kernels) {
                const EmuKernel &k = kernel.second;
                const size_t bytes = k.declared + k.dynamic;
                if (!k.launched) continue;
                kernels++, unknown += !k.executed;
                if (!k.executed) printf("not run: %s\n", emu_kernel_name(kernel.first).c_str());
                SharedRow &row = rows[emu_kernel_name(kernel.first)];
                row.declared = k.declared;
                row.dynamic[column] = k.dynamic > row.dynamic[column] ? k.dynamic : row.dynamic[column];
                row.most[at] = bytes > row.most[at] ? bytes : row.most[at];
                most = bytes > most ? bytes : most;
            }
            char name[120];
            snprintf(name, sizeof name, "%d KB, %s: %zu kernels have at most %zu bytes", limits[at] >> 10,
                     i < OTHER ? megalodon_presets[i].name : "other dimensions", kernels, most);
            cpu_check_true(name, kernels > 20 && unknown == 0 && most <= (size_t)limits[at]);
        }
    }
    emu_dry = false;
    print_table(rows);
    for (const auto &row : rows) {
        size_t dynamic = 0;
        for (size_t bytes : row.second.dynamic) dynamic += bytes;
        if (dynamic > 0 && row.second.declared > SHARED_DECLARED) cpu_check_true("SHARED_DECLARED is too small", 0);
    }
    setenv("CUDA_ON_CPU_OPTIN", device.c_str(), 1);
    if (device.empty()) unsetenv("CUDA_ON_CPU_OPTIN");
    gpu.open = 0, gpu_open();
}

static __global__ void declaring_kernel(float *out) {
    extern __shared__ float dynamic[];
    __shared__ float declared[256];
    dynamic[0] = declared[threadIdx.x] = 1;
    *out = dynamic[0] + declared[0];
}
static cudaError_t launch_declaring(float *out, size_t bytes) {
    declaring_kernel<<<1, 1, bytes>>>(out);
    return cudaGetLastError();
}
// The emulator's own limits, which are CUDA's.
static void test_emulator(void) {
    begin("emulator");
    float *out = on_device<float>(1);
    const int kb = 1 << 10, most = (int)emu_optin() - kb;
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    printf("Four messages follow that are part of the test.\n");
    cpu_check_true("47 KB beside 1 KB that is declared", launch_declaring(out, 47 * kb) == cudaSuccess);
    cpu_check_true("a byte more", launch_declaring(out, 47 * kb + 1) == cudaErrorInvalidValue);
    cpu_check_true("more than the device has",
                   cudaFuncSetAttribute(declaring_kernel, attribute, most + 1) == cudaErrorInvalidValue);
    cudaGetLastError();
    cpu_check_true("all that it has", cudaFuncSetAttribute(declaring_kernel, attribute, most) == cudaSuccess &&
                                          launch_declaring(out, most) == cudaSuccess);
    cpu_check_true("a byte more than that", launch_declaring(out, most + 1) == cudaErrorInvalidValue);
    cpu_check_true("less", cudaFuncSetAttribute(declaring_kernel, attribute, 50 * kb) == cudaSuccess &&
                               launch_declaring(out, 50 * kb) == cudaSuccess);
    cpu_check_true("more than was asked for", launch_declaring(out, 50 * kb + 1) == cudaErrorInvalidValue);
    finish();
}
#endif

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {{"sum_parts", test_sum_parts},
                 {"embedding", test_embedding},
                 {"dropout", test_dropout},
                 {"timestep_norm", test_timestep_norm},
                 {"cema", test_cema},
                 {"rmsnorm", test_rmsnorm},
                 {"linear", test_linear},
                 {"qk", test_qk},
                 {"gates", test_gates},
                 {"far gates", test_far_gates},
                 {"attention", test_attention},
                 {"far attention", test_far_attention},
                 {"layernorm", test_layernorm},
                 {"rescale", test_rescale},
                 {"add", test_add},
                 {"output_loss", test_output_loss},
                 {"far output_loss", test_far_loss},
                 {"decode_norm", test_decode_norm},
                 {"gemv_rows", test_few_rows},
                 {"decode_attention", test_decode_attention},
                 {"optimizer", test_optimizer},
#ifdef CUDA_ON_CPU_RUNTIME_H
                 {"shared_memory", test_shared_memory},
                 {"emulator", test_emulator},
#endif
                 {"tiles", test_tiles}};
    printf("%s\n%-48s %9s  %6s\n", megalodon_backend(), "", "rel. L2", "tol");
    for (const auto &test : tests) {
        if (argc < 2 || strstr(test.name, argv[1])) test.run();
    }
    return cpu_check_done();
}
