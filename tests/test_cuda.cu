// Every layer of megalodon.cu against that of megalodon.c on random inputs: results, what the layer keeps for the
// backward pass, states and gradients. megalodon.cu is included, since its layers are static. The CPU's layers have the
// prefix cpu_ and the same arguments: tests/cpu_layers.sh generates them. An argument selects the tests whose names
// contain it.
//
// In bfloat16 each test runs three times, and the name of a check says which: with the plain kernels, with the fast
// ones of kernels/, whose shapes must be supported by them, and with what the layers choose for shapes of both kinds.
//
// Activations are rounded to floatX on the host first, so that both sides get the same numbers. Gradients of parameters
// begin with random numbers, to which both sides add. Everything that the device must write is NaN before.
#include "../megalodon.cu"
#include "../build/cpu_layers.h"

#include <stdarg.h>

#include <vector>

// Relative L2 differences. Results that are floats computed from exact inputs have float32's tolerance in both builds.
static const double FLOAT_FORWARD = 2e-6, FLOAT_BACKWARD = 5e-6;
static const double FORWARD = sizeof(floatX) == 4 ? FLOAT_FORWARD : 5e-3;
static const double BACKWARD = sizeof(floatX) == 4 ? FLOAT_BACKWARD : 5e-3;
static const double EPS = 1e-5;

// ----------------------------------------------------------------------------
// a case: its name, its sizes, its arrays on both sides. All arrays are freed at its end, and the bytes after each
// array of the device must still have their first value.

#ifdef __SANITIZE_ADDRESS__ // sees what is touched there, reads too
enum { GUARD = 0 };
#else
enum { GUARD = 256 };
#endif
enum { MAX_ARRAYS = 200 };
static struct {
    char title[100];
    int fast; // the layer uses its fast kernel
    int devices, hosts;
    void *device[MAX_ARRAYS], *host[MAX_ARRAYS];
    size_t bytes[MAX_ARRAYS]; // of those on the device
    char *workspace;
    size_t workspace_bytes;
} now;

// With which kernels a test runs. DISPATCH: layers choose, as in a model. In this pass and in PLAIN there are odd
// shapes, too, which no fast kernel supports. ONCE: the test itself sets gpu.plain.
enum { PLAIN = 1, FAST = 2, DISPATCH = 4, ONCE = 8 };
static int pass, odd_shapes;

static const char *kernels_used(void) {
    return sizeof(floatX) == 4 ? "" : pass == PLAIN ? ", plain" : pass == FAST ? ", fast" : ", dispatch";
}

static void check_true(const char *what, int ok) {
    char name[200];
    snprintf(name, sizeof name, "%s: %s", now.title, what);
    cpu_check_true(name, ok);
}

template <typename T> static T *on_host(size_t n) {
    T *memory = (T *)malloc(n * sizeof(T) + 1);
    if (memory == NULL || now.hosts == MAX_ARRAYS) {
        fprintf(stderr, "error: out of memory\n");
        exit(1);
    }
    memset((void *)memory, 0xff, n * sizeof(T));
    now.host[now.hosts++] = memory;
    return memory;
}

// Whole vectors of 16 bytes, as every array of the model has.
template <typename T> static T *on_device(size_t n) {
    size_t bytes = (n * sizeof(T) + 15) / 16 * 16;
    void *memory = NULL;
    cudaCheck(cudaMalloc(&memory, bytes + GUARD + 1));
    cudaCheck(cudaMemset(memory, 0xff, bytes + GUARD));
    if (now.devices == MAX_ARRAYS) {
        fprintf(stderr, "error: too many arrays\n");
        exit(1);
    }
    now.bytes[now.devices] = bytes;
    now.device[now.devices++] = memory;
    return (T *)memory;
}

template <typename T> static T *copied(const T *host, size_t n) {
    T *device = on_device<T>(n);
    memory_copy(device, host, n * sizeof(T));
    return device;
}

static Dims sizes(int B, int L, int D) {
    Dims d = {B, L, D, 1, 1, 1, 1, 1, 1, 1, 1, ATTENTION_NORMALIZED};
    return d;
}

// A model of which only the mode is set, for functions that say how much memory a layer needs.
static Model training(void) {
    Model m;
    memset((void *)&m, 0, sizeof m);
    m.mode = MEGALODON_TRAIN, m.cp.cp_size = 1;
    return m;
}

// The workspace is as large as a model's with these sizes. Random numbers depend on the title, so they are the same for
// plain and fast kernels, and do not depend on which tests run.
static uint64_t random_seed;
static void begin(Dims d, const char *format, ...) {
    va_list arguments;
    Model m = training();
    va_start(arguments, format);
    vsnprintf(now.title, sizeof now.title - 12, format, arguments);
    va_end(arguments);
    random_seed = 14695981039346656037u;
    for (const char *c = now.title; *c; c++) random_seed = (random_seed ^ (uint64_t)*c) * 1099511628211u; // FNV-1a
    strcat(now.title, kernels_used());
    gpu.workspace_bytes = workspace_size(&m, d);
    gpu.workspace = on_device<char>(gpu.workspace_bytes);
    gpu.workspace_asked = 0;
    now.workspace = gpu.workspace, now.workspace_bytes = gpu.workspace_bytes;
}

static void finish(void) {
    int touched = 0;
    cudaCheck(cudaGetLastError());
    // Of its workspace, a layer may write what it has asked for. A whole model has its own.
    size_t asked = gpu.workspace == now.workspace ? gpu.workspace_asked : 0;
    std::vector<unsigned char> rest(now.workspace_bytes - asked);
    cudaCheck(cudaMemcpy(rest.data(), now.workspace + asked, rest.size(), cudaMemcpyDeviceToHost));
    for (unsigned char byte : rest) touched += byte != 0xff;
    for (int i = 0; i < now.devices; i++) {
        unsigned char guard[GUARD + 1];
        cudaCheck(cudaMemcpy(guard, (char *)now.device[i] + now.bytes[i], GUARD, cudaMemcpyDeviceToHost));
        for (int k = 0; k < GUARD; k++) touched += guard[k] != 0xff;
        cudaCheck(cudaFree(now.device[i]));
    }
    for (int i = 0; i < now.hosts; i++) free(now.host[i]);
    now.devices = now.hosts = 0;
    check_true("nothing else is written", touched == 0);
}

// The condition under which a layer uses its fast kernel. In pass FAST it must be met: otherwise the case would check
// the plain kernel a second time.
static void supports(int condition) {
    now.fast = !gpu.plain && condition;
    if (pass == FAST) check_true("supported by the fast kernel", condition);
}
#ifdef FAST_KERNELS
enum { HAS_FAST = 1 };
#define SUPPORTS(condition) supports((condition) != 0)
#else
enum { HAS_FAST = 0 };
#define SUPPORTS(condition) supports(0)
#endif

// ----------------------------------------------------------------------------
// the same numbers twice: what the CPU's function gets, and the device's. {}: NULL for both.

template <typename T, typename Host> struct Twice {
    Host *host;
    T *device;
    size_t n;
};
typedef Twice<floatX, float> Acts;
typedef Twice<float, float> Floats;
typedef Twice<double, double> Doubles;
typedef Twice<int64_t, int64_t> Counts;

static float *random_numbers(size_t n, double scale, double shift) {
    float *x = on_host<float>(n);
    cpu_random(x, n, random_seed++, scale, shift);
    return x;
}
#ifndef MEGALODON_FP32
static double number(floatX x) { return to_float(x); }
#endif
static double number(float x) { return x; }
static double number(double x) { return x; }

static Acts acts_from(float *host, size_t n) { // rounds them
    floatX *narrow = on_host<floatX>(n);
    for (size_t i = 0; i < n; i++) narrow[i] = to_floatX(host[i]), host[i] = to_float(narrow[i]);
    return Acts{host, copied(narrow, n), n};
}
static Acts acts(size_t n, double scale, double shift) { return acts_from(random_numbers(n, scale, shift), n); }
// The same as R rows, of which every second one, or the only one, is multiplied by `size`.
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
// All but the first: they do not begin at a multiple of 16 bytes.
static Floats but_first(Floats a) { return Floats{a.host + 1, a.device + 1, a.n - 1}; }
static Acts acts_out(size_t n) { return Acts{on_host<float>(n), on_device<floatX>(n), n}; }
static Floats floats_out(size_t n) { return Floats{on_host<float>(n), on_device<float>(n), n}; }
static Doubles doubles_out(size_t n) { return Doubles{on_host<double>(n), on_device<double>(n), n}; }

// So that the next function of both sides gets the same numbers.
template <typename T> static void upload(Twice<T, T> a) { memory_copy(a.device, a.host, a.n * sizeof(T)); }

static Acts copy_of(Acts a) { // in memory of its own
    float *host = on_host<float>(a.n);
    memcpy(host, a.host, a.n * sizeof *host);
    return acts_from(host, a.n);
}

// The device's numbers against the host's: n elements of both, from element `from` on.
template <typename T, typename Host>
static void compare_part(const char *what, Twice<T, Host> a, size_t from, size_t n, double tol) {
    char name[200];
    T *got = (T *)malloc(n * sizeof(T));
    double *wide = (double *)malloc(2 * n * sizeof(double));
    cudaCheck(cudaMemcpy(got, a.device + from, n * sizeof(T), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) wide[i] = number(got[i]), wide[n + i] = number(a.host[from + i]);
    snprintf(name, sizeof name, "%s: %s", now.title, what);
    cpu_check(name, wide, wide + n, n, tol);
    free(got), free(wide);
}
template <typename T, typename Host> static void compare(const char *what, Twice<T, Host> a, double tol) {
    if (a.n > 0) compare_part(what, a, 0, a.n, tol);
}
// Element by element: relative differences, except for what underflows; where the host's is not finite, neither is the
// device's.
static void compare_each(const char *what, Acts a) {
    const double tol = sizeof(floatX) == 4 ? 2e-6 : 1e-2;
    floatX *got = on_host<floatX>(a.n);
    int same = 1;
    cudaCheck(cudaMemcpy(got, a.device, a.n * sizeof *got, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < a.n; i++) {
        double x = to_float(got[i]), y = a.host[i];
        same &= isfinite(y) ? fabs(x - y) <= tol * fabs(y) + 1e-36 : !isfinite(x);
    }
    check_true(what, same);
}

// Where numbers overflowed, the results are NaN: n elements of the device, from element `from` on.
template <typename T, typename Host>
static void compare_nan(const char *what, Twice<T, Host> a, size_t from, size_t n) {
    char name[80];
    T *got = on_host<T>(n);
    int nans = 1;
    cudaCheck(cudaMemcpy(got, a.device + from, n * sizeof(T), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) nans &= isnan(number(got[i])) != 0;
    snprintf(name, sizeof name, "%s is NaN", what);
    check_true(name, nans);
}

// ----------------------------------------------------------------------------
// sums over rows and of parts

static void sum_parts_case(int P, int n, int stride, int add) {
    begin(sizes(1, 1, 1), "sum_parts, %d of %d%s", P, n, add ? ", added" : "");
    Floats parts = floats((size_t)P * stride, 1, 1), out = add ? floats(n, 1, 0) : floats_out(n);
    for (int c = 0; c < n; c++) {
        double sum = add ? out.host[c] : 0;
        for (int p = 0; p < P; p++) sum += parts.host[(size_t)p * stride + c];
        out.host[c] = (float)sum;
    }
    sum_parts(out.device, parts.device, P, stride, n, add);
    compare("out", out, FLOAT_FORWARD);
    finish();
}
static void sum_rows_case(int R, int D, int G, int norm) { // norm: of x, of (x - mean) rstd, of x rstd, or of dy alone
    enum { BIAS, PRODUCT, MEAN_RSTD, RSTD };
    static const char *const names[] = {"a bias", "products", "mean and rstd", "rstd"};
    begin(sizes(1, R, D), "sum_rows, R %d D %d G %d, %s", R, D, G, names[norm]);
    const float scale = norm == BIAS ? 1 : 0.7f;
    size_t n = (size_t)R * D, groups = (size_t)R * G;
    Acts dy = acts(n, 1, 0.2), x = {};
    Floats rstd = {}, out = floats(D, 1, 0), sums = floats(D, 0, 0);
    Doubles mean = {};
    if (norm != BIAS) x = acts(n, 1, 0.5);
    if (norm == MEAN_RSTD || norm == RSTD) rstd = floats(groups, 0.5, 1);
    if (norm == MEAN_RSTD) {
        float *numbers = random_numbers(groups, 0.3, 0.5);
        mean = doubles_out(groups);
        for (size_t i = 0; i < groups; i++) mean.host[i] = numbers[i];
        upload(mean);
    }
    SUPPORTS(x.device == NULL && D % VEC == 0);
    cpu_sum_rows(sums.host, dy.host, x.host, mean.host, rstd.host, R, D, G);
    for (int c = 0; c < D; c++) out.host[c] += scale * sums.host[c];
    sum_rows(out.device, dy.device, x.device, mean.device, rstd.device, scale, R, D, G);
    compare("out", out, FLOAT_BACKWARD);
    finish();
}
static void test_sums(void) {
    for (int add = 0; add < 2 && odd_shapes; add++) {
        sum_parts_case(1, 1, 1, add), sum_parts_case(5, 7, 14, add), sum_parts_case(33, 100, 131, add);
        sum_parts_case(1024, 33, 64, add), sum_parts_case(257, 64, 128, add);
    }
    for (int norm = 0; norm < 4 && odd_shapes; norm++) {
        sum_rows_case(1, 1, 1, norm), sum_rows_case(9, 35, 5, norm), sum_rows_case(2051, 3, 1, norm);
        sum_rows_case(9, 12, 1, norm);
    }
    sum_rows_case(1, 8, 1, 0), sum_rows_case(300, 72, 1, 0), sum_rows_case(5000, 8, 1, 0), sum_rows_case(7, 2560, 1, 0);
}

// ----------------------------------------------------------------------------
// layers, in the order of megalodon.cu

// Token 0 is frequent, the last of the vocabulary does not occur.
static void embedding_case(int R, int D, int V, float scale) {
    Dims d = sizes(1, R, D);
    d.V = V;
    begin(d, "embedding, R %d D %d V %d", R, D, V);
    int32_t *tokens = on_host<int32_t>(R);
    for (int r = 0; r < R; r++) tokens[r] = (r * r + r / 3) % (r % 2 ? V : 2) % (V - 1);
    int32_t *device_tokens = copied(tokens, R);
    Acts embed = acts((size_t)V * D, 1, 0), out = acts_out((size_t)R * D), dout = acts((size_t)R * D, 1, 0.2);
    Floats dembed = floats((size_t)V * D, 1, 0);
    cpu_embedding_forward(out.host, tokens, embed.host, scale, R, D);
    embedding_forward(out.device, device_tokens, embed.device, scale, R, D);
    compare("out", out, FORWARD);
    cpu_embedding_backward(dembed.host, dout.host, tokens, scale, R, D);
    embedding_backward(dembed.device, dout.device, device_tokens, scale, R, D, V);
    compare("dembed", dembed, FLOAT_BACKWARD);
    finish();
}
static void test_embedding(void) {
    embedding_case(1, 5, 3, 1), embedding_case(9, 67, 7, 3), embedding_case(130, 24, 3, 1);
    embedding_case(300, 13, 5, 2), embedding_case(700, 16, 300, 1), embedding_case(7, 1024, 32, 32);
    embedding_case(2 * THREADS, 8, 6, 1), embedding_case(5 * THREADS + 1, 300, 2, 1);
    embedding_case(600, 5, EMBED_PARTS / 2, 1), embedding_case(300, 7, EMBED_PARTS, 2);
    embedding_case(600, 9, EMBED_PARTS + 904, 1), embedding_case(4500, 2 * THREADS + 5, 9000, 1);
    embedding_case(5000, 3, EMBED_PARTS / 2, 1);
}

static Mask mask_from(double p, uint64_t first) {
    Mask mask;
    mask.p = p, mask.seed = 0x123456789abcdef, mask.stream = STREAM_DROPOUT + 2, mask.step = 6, mask.layer = 4;
    mask.first = first, mask.row = 0, mask.run = 0;
    return mask;
}
static void dropout_case(int rows, size_t run, uint64_t first) {
    size_t n = rows * run;
    Mask m = mask_from(n < 4 ? 0.001 : 0.3, first);
    if (rows > 1) m.run = run, m.row = 3 * run + 1;
    begin(sizes(1, 1, 1), "dropout, %d runs of %d from %llu", rows, (int)run, (unsigned long long)first);
    Acts inp = acts(n, 1, 3), out = acts_out(n), same = copy_of(inp);
    cpu_dropout(out.host, inp.host, m, n);
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
static void test_dropout(void) {
    static const uint64_t first[] = {0, 3, ((uint64_t)5 << 34) - 14}; // after the last one the counter overflows
    static const size_t lengths[] = {1, 2, 5, 1000, 4096};
    for (int i = 0; i < 15; i++) dropout_case(1, lengths[i / 3], first[i % 3]);
    for (int i = 0; i < 3; i++)
        dropout_case(3, 1, first[i]), dropout_case(2, 7, first[i]), dropout_case(3, 1030, first[i]);
    // as many elements as a thread block has, but the first counter and the last one have fewer than four of them
    dropout_case(1, 4 * THREADS - 2, 3), dropout_case(2, 4 * THREADS - 2, 3);
}

// Count, mean and M2 of the tokens before, for rows in turn; the deviation is 0.6 scale.
typedef struct {
    Counts count;
    Doubles mean, m2;
} Past;
static Past past_of(int B, int D, int G, double mean, double scale) {
    static const int64_t counts[3] = {3, 0, 1000};
    int64_t *count = on_host<int64_t>(B);
    float *shift = random_numbers((size_t)B * G, 0.3, 0);
    for (int b = 0; b < B; b++) count[b] = counts[b % 3];
    Past p = {{count, copied(count, B), (size_t)B}, doubles_out((size_t)B * G), doubles_out((size_t)B * G)};
    for (int i = 0; i < B * G; i++) {
        double n = (double)count[i / G] * (D / G);
        p.mean.host[i] = n > 0 ? mean + scale * shift[i] : 0;
        p.m2.host[i] = n * (0.36 + 0.3 * shift[i]) * scale * scale;
    }
    upload(p.mean), upload(p.m2);
    return p;
}
static NormState host_state(Past p) { return NormState{p.count.host, p.mean.host, p.m2.host}; }
static NormState device_state(Past p) { return NormState{p.count.device, p.mean.device, p.m2.device}; }

// U, V, W (B,G,3) of later tokens, for inputs of this mean and scale.
static Doubles later_sums(int pairs, double mean, double scale) {
    Doubles sums = doubles_out((size_t)pairs * 3);
    float *x = random_numbers(sums.n, 1, 0);
    for (int i = 0; i < pairs; i++) {
        sums.host[3 * i] = 0.1 * x[3 * i] / scale;
        sums.host[3 * i + 1] = 0.1 * x[3 * i + 1] / scale / scale;
        sums.host[3 * i + 2] = sums.host[3 * i + 1] * (mean + 0.3 * scale * x[3 * i + 2]);
    }
    upload(sums);
    return sums;
}

enum { NO_STATE, STATE, STATE_IN_PLACE };
static void timestep_norm_case(int B, int L, int D, int G, int state, double shift, double scale = 1) {
    Dims d = sizes(B, L, D);
    d.G = G;
    begin(d, "timestep_norm, B %d L %d D %d G %d%s, mean %g, x %g", B, L, D, G, state ? ", state" : "", shift, scale);
    SUPPORTS(timestep_norm_fast_supports(d));
    size_t R = (size_t)B * L;
    Acts inp = acts(R * D, 1.7 * scale, shift), out = acts_out(R * D);
    Floats weight = floats(D, 1, 0), bias = floats(D, 1, 0), rstd = floats_out(R * G);
    Doubles mean = doubles_out(R * G);
    Past in = state ? past_of(B, D, G, shift, scale) : Past{}, end = {};
    if (state) end.mean = doubles_out((size_t)B * G), end.m2 = doubles_out((size_t)B * G);
    if (state == STATE_IN_PLACE) end.mean.device = in.mean.device, end.m2.device = in.m2.device;
    cpu_timestep_norm_forward(out.host, mean.host, rstd.host, host_state(end), inp.host, weight.host, bias.host,
                              host_state(in), d, EPS);
    timestep_norm_forward(out.device, mean.device, rstd.device, device_state(end), inp.device, weight.device,
                          bias.device, device_state(in), d, EPS);
    compare("out", out, FORWARD);
    compare("mean", mean, FLOAT_FORWARD), compare("rstd", rstd, FLOAT_FORWARD);
    compare("mean of the state", end.mean, FLOAT_FORWARD), compare("m2 of the state", end.m2, FLOAT_FORWARD);

    upload(mean), upload(rstd);
    Acts dout = acts(R * D, 1, 0.1), residual = acts(R * D, 1, 0), residual2 = acts(R * D, 1, 0),
         dinp = acts_out(R * D);
    Floats dweight = floats(D, 1, 0), dbias = floats(D, 1, 0);
    Doubles none = {}, dstate = later_sums(B * G, shift, scale);
    auto backward = [&](Acts dx, Doubles ds, Acts residual0, Acts residual1) {
        const float *host_residuals[2] = {residual0.host, residual1.host};
        const floatX *device_residuals[2] = {residual0.device, residual1.device};
        bool any = residual0.host || residual1.host;
        cpu_timestep_norm_backward(dx.host, dweight.host, dbias.host, ds.host, dout.host, any ? host_residuals : NULL,
                                   inp.host, weight.host, mean.host, rstd.host, in.count.host, d);
        timestep_norm_backward(dx.device, dweight.device, dbias.device, ds.device, dout.device,
                               any ? device_residuals : NULL, inp.device, weight.device, mean.device, rstd.device,
                               in.count.device, d);
    };
    backward(dinp, none, Acts{}, Acts{});
    compare("dinp", dinp, BACKWARD);
    compare("dweight", dweight, FLOAT_BACKWARD), compare("dbias", dbias, FLOAT_BACKWARD);
    backward(dinp, dstate, Acts{}, Acts{});
    compare("dinp with later tokens", dinp, BACKWARD), compare("dstate", dstate, FLOAT_BACKWARD);
    backward(dinp, none, residual, Acts{});
    compare("dinp and a residual", dinp, BACKWARD);
    backward(dinp, none, Acts{}, residual);
    compare("dinp and the other one", dinp, BACKWARD);
    backward(residual2, none, residual, residual2);
    compare("dinp and two, in place", residual2, BACKWARD);
    compare("dweight of all", dweight, FLOAT_BACKWARD), compare("dbias of all", dbias, FLOAT_BACKWARD);
    finish();
}
static void test_timestep_norm(void) {
    static const int lengths[] = {1, 31, 32, 33, 64, 65, 130, 300};
    static const int shapes[][2] = {{64, 8}, {48, 2}, {36, 3}, {6, 3}, {30, 2}}; // D, G; the last two are odd
    for (int i = 0; i < 8; i++) {
        for (int s = 0; s < (odd_shapes ? 5 : 3); s++)
            timestep_norm_case(1 + (i + s) % 3, lengths[i], shapes[s][0], shapes[s][1], (i + 2 * s + 1) % 3, 0.5);
    }
    timestep_norm_case(3, 300, 8, 1, STATE, 0.5), timestep_norm_case(1, 1100, 8, 1, STATE, 0.5);
    timestep_norm_case(5, 3, 8, 2, STATE, 0.5);      // more parts of dweight than rows
    timestep_norm_case(2, 40, 1024, 32, STATE, 0.5); // mega200M's
    timestep_norm_case(3, 300, 64, 8, STATE, 30);
    if (odd_shapes) {
        timestep_norm_case(3, 300, 6, 3, STATE, 0.5), timestep_norm_case(2, 35, 390, 3, STATE_IN_PLACE, 0.5);
        timestep_norm_case(1, 33, 132, 132, NO_STATE, 0.5), timestep_norm_case(2, 130, 30, 2, NO_STATE, 30);
    }
    timestep_norm_case(2, 35, 1584, 12, STATE_IN_PLACE, 0.5); // groups that lie in two thread blocks
    timestep_norm_case(1, 33, 2048, 32, STATE, 0.5);          // mega1.3B's: a group begins where a thread block does
    timestep_norm_case(2, 33, 540, 45, STATE, 0.5), timestep_norm_case(2, 33, 132, 33, STATE, 0.5);
    timestep_norm_case(1, 33, 300, 1, NO_STATE, 0.5), timestep_norm_case(1, 33, 1160, 1, NO_STATE, 0.5);
    int D = odd_shapes ? 30 : 48;
    for (int i = 0; i < 3; i++) { // means far from zero, in bfloat16 as many deviations as it can tell apart
        double mean = i == 0 ? 1e4 : i == 1 ? 1e5 : -1e6, scale = sizeof(floatX) == 4 ? 1 : fabs(mean) / 30;
        timestep_norm_case(2, 130, D, 2, STATE, mean, scale), timestep_norm_case(1, 300, 64, 2, NO_STATE, mean, scale);
    }
    for (int i = 0; i < 3; i++) { // squares that overflow, of some token blocks or of all
        double scale = i == 0 ? 1e17 : i == 1 ? 1e20 : 1e37;
        timestep_norm_case(2, 130, D, 2, STATE, scale / 2, scale), timestep_norm_case(1, 70, 64, 2, NO_STATE, 0, scale);
    }
}

// ----------------------------------------------------------------------------
// chunk parallelism: this rank's own tokens, then what an all-gather has collected from all ranks

enum { RANKS = 3 };
static const int64_t rank_lengths[RANKS] = {70, 1, 200000};
static ChunkParallel ranks_on(const int64_t *lengths, int rank) {
    ChunkParallel cp;
    memset((void *)&cp, 0, sizeof cp);
    cp.cp_rank = rank, cp.cp_size = RANKS, cp.lengths = lengths;
    return cp;
}

static void timestep_norm_ranks_case(int B, int L, int D, int G, int state) {
    Dims d = sizes(B, L, D);
    d.G = G;
    begin(d, "timestep_norm of ranks, B %d L %d D %d G %d%s", B, L, D, G, state ? ", state" : "");
    SUPPORTS(timestep_norm_fast_supports(d));
    size_t R = (size_t)B * L, pairs = (size_t)B * G;
    Acts inp = acts(R * D, 1.7, 0.5), dout = acts(R * D, 1, 0.1);
    Floats weight = floats(D, 1, 0), rstd = floats(R * G, 0.3, 0.7);
    Doubles mean = doubles_out(R * G), sums = doubles_out(pairs * 3), dstate = doubles_out(pairs * 3);
    Past own = {{}, doubles_out(pairs), doubles_out(pairs)}, end = {{}, doubles_out(pairs), doubles_out(pairs)};
    cpu_timestep_norm_reduce(host_state(own), inp.host, d);
    timestep_norm_reduce(device_state(own), inp.device, d);
    compare("mean", own.mean, FLOAT_FORWARD), compare("m2", own.m2, FLOAT_FORWARD);

    float *numbers = random_numbers(R * G, 0.2, 0.5);
    for (size_t i = 0; i < R * G; i++) mean.host[i] = numbers[i];
    upload(mean);
    Past in = past_of(B, D, G, 0.5, 1);
    if (!state) in.count = Counts{};
    cpu_timestep_norm_reduce_backward(sums.host, dout.host, inp.host, weight.host, mean.host, rstd.host, in.count.host,
                                      d);
    timestep_norm_reduce_backward(sums.device, dout.device, inp.device, weight.device, mean.device, rstd.device,
                                  in.count.device, d);
    compare("U, V, W", sums, FLOAT_BACKWARD);

    Doubles all = doubles_out(RANKS * 2 * pairs), all_sums = doubles_out(RANKS * 3 * pairs);
    float *x = random_numbers(all.n, 0.4, 0.5), *y = random_numbers(all_sums.n, 1, 0.1);
    for (size_t i = 0; i < all.n; i++) all.host[i] = i / pairs % 2 ? 1000 * fabs(x[i]) : x[i];
    for (size_t i = 0; i < all_sums.n; i++) all_sums.host[i] = y[i];
    upload(all), upload(all_sums);
    const int64_t *lengths = copied(rank_lengths, RANKS);
    for (int rank = 0; rank < RANKS; rank++) {
        ChunkParallel host_cp = ranks_on(rank_lengths, rank), cp = ranks_on(lengths, rank);
        Past start = in;
        start.mean = doubles_out(pairs), start.m2 = doubles_out(pairs);
        for (size_t i = 0; i < pairs; i++) {
            start.mean.host[i] = state ? in.mean.host[i] : 0, start.m2.host[i] = state ? in.m2.host[i] : 0;
        }
        upload(start.mean), upload(start.m2);
        bool ends = rank != 1; // rank 1 does not keep the state after the sequence
        cpu_timestep_norm_combine(host_state(start), host_state(ends ? end : Past{}), all.host, in.count.host, &host_cp,
                                  d);
        timestep_norm_combine(device_state(start), device_state(ends ? end : Past{}), all.device, in.count.device, &cp,
                              d);
        if (rank > 0 || state)
            compare("mean before", start.mean, FLOAT_FORWARD), compare("m2 before", start.m2, FLOAT_FORWARD);
        if (ends) compare("mean after", end.mean, FLOAT_FORWARD), compare("m2 after", end.m2, FLOAT_FORWARD);
        for (size_t i = 0; i < dstate.n; i++) dstate.host[i] = 0.1 * all_sums.host[i] - 0.02; // after the sequence
        upload(dstate);
        cpu_timestep_norm_combine_backward(dstate.host, ends ? sums.host : NULL, all_sums.host, &host_cp, d);
        timestep_norm_combine_backward(dstate.device, ends ? sums.device : NULL, all_sums.device, &cp, d);
        compare("U, V, W after the rank", dstate, FLOAT_BACKWARD);
        if (ends) compare("U, V, W from the first token on", sums, FLOAT_BACKWARD);
    }
    finish();
}

// CEMA's coefficients: five arrays (N, coeffs_stride(D)), contiguous; the CPU's rows are padded with zeros.
typedef struct {
    Coeffs host, device;
    int D, N;
} CoeffsTwice;
static Coeffs coeffs_at(float *all, size_t n) { return Coeffs{all, all + n, all + 2 * n, all + 3 * n, all + 4 * n}; }
static CoeffsTwice coeffs_out(int D, int N) {
    size_t padded = cpu_coeffs_stride(D) * N;
    float *host = on_host<float>(5 * padded);
    memset(host, 0, 5 * padded * sizeof *host);
    return CoeffsTwice{coeffs_at(host, padded), coeffs_at(on_device<float>((size_t)5 * D * N), (size_t)D * N), D, N};
}
static CoeffsTwice coeffs_random(int D, int N, double scale) {
    CoeffsTwice c = coeffs_out(D, N);
    float *x = random_numbers((size_t)5 * D * N, scale, 0);
    for (int i = 0; i < 5 * N; i++) memcpy(c.host.p + i * cpu_coeffs_stride(D), x + (size_t)i * D, D * sizeof *x);
    memory_copy(c.device.p, x, (size_t)5 * D * N * sizeof *x);
    return c;
}
static void compare_coeffs(const char *const names[5], CoeffsTwice c, double tol) {
    size_t n = (size_t)c.D * c.N;
    float *x = on_host<float>(5 * n);
    for (int i = 0; i < 5 * c.N; i++)
        memcpy(x + (size_t)i * c.D, c.host.p + i * cpu_coeffs_stride(c.D), c.D * sizeof *x);
    for (int i = 0; i < 5; i++) compare_part(names[i], Floats{x, c.device.p, 5 * n}, i * n, n, tol);
}

static void cema_coeffs_case(int D, int N) {
    static const char *const names[5] = {"p", "q_re", "q_im", "g_re", "g_im"};
    begin(sizes(1, 1, D), "cema_coeffs, D %d N %d", D, N);
    size_t n = (size_t)D * N;
    Floats alpha = floats(n, 2, 0), delta = floats(n, 2, 0), theta = floats(D, 2, -1), gamma = floats(2 * n, 1, 0);
    CoeffsTwice c = coeffs_out(D, N), dc = coeffs_random(D, N, 1);
    cpu_cema_coeffs_forward(&c.host, alpha.host, delta.host, theta.host, gamma.host, CEMA_COMPLEX, D, N);
    cema_coeffs_forward(&c.device, alpha.device, delta.device, theta.device, gamma.device, CEMA_COMPLEX, D, N);
    compare_coeffs(names, c, 2e-7);
    Floats dalpha = floats(n, 1, 0), ddelta = floats(n, 1, 0), dtheta = floats(D, 1, 0), dgamma = floats(2 * n, 1, 0);
    cpu_cema_coeffs_backward(dalpha.host, ddelta.host, dtheta.host, dgamma.host, &dc.host, alpha.host, delta.host,
                             theta.host, CEMA_COMPLEX, D, N);
    cema_coeffs_backward(dalpha.device, ddelta.device, dtheta.device, dgamma.device, &dc.device, alpha.device,
                         delta.device, theta.device, CEMA_COMPLEX, D, N);
    compare("dalpha", dalpha, 2e-7), compare("ddelta", ddelta, 2e-7);
    compare("dtheta", dtheta, 2e-7), compare("dgamma", dgamma, 2e-7);
    finish();
}

static CoeffsTwice random_cema(int D, int N, int slow) { // slow: a state decays in hundreds of tokens
    size_t n = (size_t)D * N;
    Floats alpha = floats(n, 1, slow ? -3 : 0), delta = floats(n, 1, slow ? -3 : 0), theta = floats(D, 1, -1);
    Floats gamma = floats(2 * n, 1, 0);
    CoeffsTwice c = coeffs_out(D, N);
    cpu_cema_coeffs_forward(&c.host, alpha.host, delta.host, theta.host, gamma.host, CEMA_COMPLEX, D, N);
    cema_coeffs_forward(&c.device, alpha.device, delta.device, theta.device, gamma.device, CEMA_COMPLEX, D, N);
    return c;
}

// With slow decay, over token blocks the device uses the rounded power of q where the CPU takes powers of the rounded
// q, and over 1000 tokens the last digit of q becomes three digits.
static void cema_case(int B, int L, int D, int N, int state, int slow) {
    static const char *const names[5] = {"dp", "dq_re", "dq_im", "dg_re", "dg_im"};
    Dims d = sizes(B, L, D);
    d.N = N;
    begin(d, "cema, B %d L %d D %d N %d%s%s", B, L, D, N, state ? ", state" : "", slow ? ", slow" : "");
    SUPPORTS(cema_fast_supports(d));
    const double looser = slow ? 15 : 1, act = sizeof(floatX) == 4 ? looser : 1;
    size_t R = (size_t)B * L, states = (size_t)B * 2 * N * D, blocks = ceil_div(L, CEMA_BLOCK);
    CoeffsTwice c = random_cema(D, N, slow), dc = coeffs_out(D, N);
    Acts inp = acts(R * D, 1, 0.2), out = acts_out(R * D), dout = acts(R * D, 1, 0.2), dinp = acts_out(R * D);
    Floats omega = floats(D, 1, 0), h_in = {}, h_out = {}, domega = floats(D, 1, 0), dh = {};
    Floats h_blocks = floats_out(blocks * states);
    if (state) h_in = floats(states, 1, 0), h_out = floats_out(states);
    if (state == STATE_IN_PLACE) h_out.device = h_in.device;
    cpu_cema_forward(out.host, h_blocks.host, h_out.host, inp.host, &c.host, omega.host, h_in.host, d);
    cema_forward(out.device, h_blocks.device, h_out.device, inp.device, &c.device, omega.device, h_in.device, d);
    compare("out", out, act * FORWARD), compare("h_out", h_out, looser * FLOAT_FORWARD);

    for (int later = 0; later < 2; later++) { // then with the gradient w.r.t. the outgoing state
        if (later) dh = floats(states, 1, 0);
        cpu_cema_backward(dinp.host, &dc.host, domega.host, dh.host, dout.host, inp.host, h_blocks.host, &c.host,
                          omega.host, d);
        cema_backward(dinp.device, &dc.device, domega.device, dh.device, dout.device, inp.device, h_blocks.device,
                      &c.device, omega.device, d);
        compare(later ? "dinp with dh" : "dinp", dinp, act * BACKWARD), compare("domega", domega, FLOAT_BACKWARD);
        compare_coeffs(names, dc, looser * FLOAT_BACKWARD), compare("dh", dh, looser * FLOAT_BACKWARD);
    }
    finish();
}
static void test_cema(void) {
    static const int lengths[] = {1, 31, 32, 33, 64, 65, 130, 300};
    if (odd_shapes) cema_coeffs_case(5, 3), cema_coeffs_case(33, 1), cema_coeffs_case(1024, 16);
    for (int i = 0; i < 8; i++) {
        cema_case(1 + (i + 2) % 3, lengths[i], 64, 1, i > 0 ? i % 3 : STATE, 0);
        cema_case(1 + i % 3, lengths[i], odd_shapes ? 5 : 8, 3, (i + 1) % 3, 0);
        cema_case(1 + (i + 1) % 3, lengths[i], odd_shapes ? 33 : 40, 2, i > 0 ? (i + 2) % 3 : STATE_IN_PLACE, 0);
    }
    cema_case(2, 600, odd_shapes ? 7 : 8, 4, STATE, 1), cema_case(1, 1100, odd_shapes ? 5 : 24, 2, STATE_IN_PLACE, 1);
    if (odd_shapes) cema_case(2, 130, 36, 3, STATE, 0); // a multiple of 4, but not of VEC
    cema_case(264, 1, 1000, 1, STATE, 0);               // more token blocks than parts
    cema_case(1, 70, 1024, 16, STATE, 0);               // mega200M's
}

static void cema_ranks_case(int B, int L, int D, int N) {
    Dims d = sizes(B, L, D);
    d.N = N;
    begin(d, "cema of ranks, B %d L %d D %d N %d", B, L, D, N);
    SUPPORTS(cema_fast_supports(d));
    size_t states = (size_t)B * 2 * N * D;
    CoeffsTwice c = random_cema(D, N, 1);
    Acts inp = acts((size_t)B * L * D, 1, 0.2);
    Floats h = floats_out(states), end = floats_out(states), all = floats(RANKS * states, 1, 0);
    const int64_t *lengths = copied(rank_lengths, RANKS);
    for (int backward = 0; backward < 2; backward++) {
        cpu_cema_reduce(h.host, inp.host, &c.host, backward, d);
        cema_reduce(h.device, inp.device, &c.device, backward, d);
        compare(backward ? "gradient before own tokens" : "state after own tokens", h, 15 * FLOAT_FORWARD);
        for (int rank = 0; rank < RANKS; rank++) {
            ChunkParallel host_cp = ranks_on(rank_lengths, rank), cp = ranks_on(lengths, rank);
            Floats sum = floats(states, 1, 0);
            bool ends = rank != 1;
            cpu_cema_combine(sum.host, ends ? end.host : NULL, all.host, &c.host, backward, &host_cp, d);
            cema_combine(sum.device, ends ? end.device : NULL, all.device, &c.device, backward, &cp, d);
            compare(backward ? "gradient after" : "state before", sum, 15 * FLOAT_FORWARD);
            if (ends) compare("at the end", end, 15 * FLOAT_FORWARD);
        }
    }
    finish();
}
static void test_ranks(void) {
    if (odd_shapes) timestep_norm_ranks_case(1, 1, 5, 1, 0), timestep_norm_ranks_case(2, 65, 30, 3, 1);
    timestep_norm_ranks_case(1, 1, 8, 2, 0), timestep_norm_ranks_case(3, 130, 64, 8, 1);
    timestep_norm_ranks_case(2, 33, 1024, 32, 0), timestep_norm_ranks_case(2, 65, 96, 8, 1); // groups of 32 and 12
    if (odd_shapes) cema_ranks_case(1, 1, 5, 1), cema_ranks_case(2, 65, 33, 3);
    cema_ranks_case(1, 1, 8, 1), cema_ranks_case(2, 65, 40, 3), cema_ranks_case(3, 130, 64, 2);
}

static void rmsnorm_case(int R, int D, int affine, double size = 1) {
    begin(sizes(1, R, D), "rmsnorm, R %d D %d%s, x %g", R, D, affine ? "" : ", no weight", size);
    SUPPORTS(norms_fast_supports(D) && affine);
    Acts inp = acts_rows(R, D, 1, 0.3, size), out = acts_out(inp.n), dout = acts(inp.n, 1, 0), dinp = acts_out(inp.n);
    Floats weight = {}, dweight = {}, rstd = floats_out(R);
    if (affine) weight = floats(D, 1, 0), dweight = floats(D, 1, 0);
    if (affine && R == 9) weight = but_first(floats(D + 1, 1, 0));
    cpu_rmsnorm_forward(out.host, rstd.host, inp.host, weight.host, R, D, EPS);
    rmsnorm_forward(out.device, rstd.device, inp.device, weight.device, R, D, EPS);
    compare("out", out, FORWARD), compare("rstd", rstd, FLOAT_FORWARD);
    upload(rstd);
    cpu_rmsnorm_backward(dinp.host, dweight.host, dout.host, inp.host, weight.host, rstd.host, R, D);
    rmsnorm_backward(dinp.device, dweight.device, dout.device, inp.device, weight.device, rstd.device, R, D);
    compare("dinp", dinp, BACKWARD), compare("dweight", dweight, FLOAT_BACKWARD);
    finish();
}
static void test_rmsnorm(void) {
    for (int affine = 0; affine < 2; affine++) {
        if (!odd_shapes && !affine) continue;
        rmsnorm_case(9, 64, affine), rmsnorm_case(2051, 8, affine); // more rows than parts
        rmsnorm_case(11, 1024, affine);                             // mega200M's
        if (odd_shapes) rmsnorm_case(1, 2, affine), rmsnorm_case(5, 19, affine), rmsnorm_case(2051, 3, affine);
        if (odd_shapes) rmsnorm_case(5, 12, affine); // a multiple of 4, but not of VEC
    }
    rmsnorm_case(3, 128, 1), rmsnorm_case(3, 512, 1), rmsnorm_case(3, 1544, 1), rmsnorm_case(3, 2560, 1),
        rmsnorm_case(3, 4096, 1);
    if (odd_shapes) rmsnorm_case(3, 8191, 1), rmsnorm_case(3, 8192, 1), rmsnorm_case(2, 20000, 1);
    for (int i = 0; i < 4; i++) { // squares that overflow, of some rows and of all
        double size = i == 0 ? 1e18 : i == 1 ? 1e20 : i == 2 ? 1e25 : 1e38;
        rmsnorm_case(1, 1024, 1, size), rmsnorm_case(9, 64, 1, size);
        if (odd_shapes) rmsnorm_case(9, 64, 0, size), rmsnorm_case(5, 19, 1, size);
    }
}

// On a GPU products of bfloat16 add up in another order and keep fewer guard bits.
static const double PRODUCT_BACKWARD = sizeof(floatX) == 4 ? FLOAT_BACKWARD : 2e-5;

static void linear_case(int R, int K, int M) {
    enum { NO_RESIDUAL, RESIDUAL, IN_PLACE };
    for (int form = 0; form < 6; form++) {
        int with_bias = form & 1, residual = form / 2;
        begin(sizes(1, R, M), "linear, R %d K %d M %d%s%s", R, K, M, with_bias ? ", bias" : "",
              residual == IN_PLACE   ? ", residual in place"
              : residual == RESIDUAL ? ", residual"
                                     : "");
        Acts inp = acts((size_t)R * K, 1, 0), weight = acts((size_t)M * K, 1, 0), bias = {}, added = {};
        Acts out = acts_out((size_t)R * M), dout = acts(out.n, 1, 0.1);
        Acts dinp = residual ? acts(inp.n, 1, 0) : acts_out(inp.n);
        Floats dweight = floats(weight.n, 1, 0), dbias = {};
        if (with_bias) bias = acts(M, 1, 0), dbias = floats(M, 1, 0);
        if (residual) added = acts(out.n, 1, 0);
        if (residual == IN_PLACE) out = added;
        cpu_linear_forward(out.host, added.host, inp.host, weight.host, bias.host, R, K, M);
        linear_forward(out.device, added.device, inp.device, weight.device, bias.device, R, K, M);
        compare("out", out, FORWARD);
        if (residual == RESIDUAL) compare("the residual stays", added, 1e-30);
        cpu_linear_backward(dinp.host, residual > 0, dweight.host, dbias.host, dout.host, inp.host, weight.host, R, K,
                            M);
        linear_backward(dinp.device, residual > 0, dweight.device, dbias.device, dout.device, inp.device, weight.device,
                        R, K, M);
        compare("dinp", dinp, BACKWARD), compare("dweight", dweight, PRODUCT_BACKWARD);
        compare("dbias", dbias, PRODUCT_BACKWARD);
        finish();
    }
}
static void test_linear(void) {
    linear_case(1, 1, 1), linear_case(7, 13, 11), linear_case(300, 9, 5), linear_case(64, 16, 24);
    linear_case(3, 1024, 256), linear_case(2, 1024, 2560), linear_case(3, 2048, 1024); // mega200M's
}

// pre = inp W' + bias, out = silu(pre), and the backward passes of y = out W' through silu and through a gate. The
// Hopper kernels need many rows, and no dropout.
static void linear_silu_case(int R, int K, int M, int with_bias, double p) {
    begin(sizes(1, R, max_int(K, M)), "linear with silu or gate, R %d K %d M %d%s%s", R, K, M,
          with_bias ? ", bias" : "", p > 0 ? ", dropout" : "");
    Acts inp = acts((size_t)R * K, 1, 0), weight = acts((size_t)M * K, 1 / sqrt((double)K), 0), bias = {};
    Acts pre = acts_out((size_t)R * M), out = acts_out(pre.n);
    if (with_bias) bias = acts(M, 1, 0);
    cpu_linear_silu_forward(out.host, pre.host, inp.host, weight.host, bias.host, R, K, M);
    linear_silu_forward(out.device, pre.device, inp.device, weight.device, bias.device, R, K, M);
    compare("pre", pre, FORWARD), compare("out", out, FORWARD);

    Mask mask = mask_from(p, 77);
    Acts dy = acts(pre.n, 1, 0.1), x = acts(inp.n, 2, 0), dx = acts_out(inp.n), again = acts_out(inp.n);
    cpu_linear_silu_backward(again.host, dx.host, dy.host, weight.host, x.host, mask, R, K, M);
    linear_silu_backward(again.device, dx.device, dy.device, weight.device, x.device, mask, R, K, M);
    compare("dpre", dx, BACKWARD), compare("silu again", again, FORWARD);

    Acts a = acts(inp.n, 1, 0), da = acts_out(inp.n), db = acts_out(inp.n), gated = acts_out(inp.n);
    Floats dbias = {};
    if (with_bias) dbias = floats(K, 1, 0);
    cpu_linear_gate_backward(gated.host, da.host, db.host, dbias.host, dy.host, weight.host, a.host, x.host, mask, R, K,
                             M);
    linear_gate_backward(gated.device, da.device, db.device, dbias.device, dy.device, weight.device, a.device, x.device,
                         mask, R, K, M);
    compare("da", da, BACKWARD), compare("db", db, BACKWARD), compare("gate again", gated, FORWARD);
    if (with_bias) compare("dbias", dbias, BACKWARD);
    if (with_bias) { // in place, as the model has it
        cpu_silu_bias_backward(da.host, dbias.host, a.host, x.host, R, K);
        silu_bias_backward(a.device, dbias.device, a.device, x.device, R, K);
        da.device = a.device;
        compare("silu alone: dpre", da, BACKWARD), compare("silu alone: dbias", dbias, BACKWARD);
    }
    finish();
}
static void test_linear_silu(void) {
    for (int with_bias = 0; with_bias < 2; with_bias++) {
        linear_silu_case(7, 13, 11, with_bias, 0), linear_silu_case(64, 16, 24, with_bias, 0.3);
        linear_silu_case(300, 9, 5, with_bias, 0.3), linear_silu_case(2048, 72, 40, with_bias, 0.3);
        linear_silu_case(2048, 64, 256, with_bias, 0), linear_silu_case(2121, 264, 328, with_bias, 0);
        if (gpu.hopper) linear_silu_case(4100, 520, 1096, with_bias, 0);
    }
}

// The affine map alone.
static void qk_case(int R, int Z, int dz) {
    begin(sizes(1, R, Z), "qk, R %d Z %d dz %d", R, Z, dz);
    size_t n = (size_t)R * Z;
    Acts zn = acts(n, 1, 0.2), q = acts_out(n), k = acts_out(n), dq = acts(n, 1, 0.1), dk = acts(n, 1, 0);
    Acts dzn = acts_out(n);
    Floats gamma = floats(2 * Z, 1, 0), beta = floats(2 * Z, 1, 0), dgamma = floats(2 * Z, 1, 0);
    Floats dbeta = floats(2 * Z, 1, 0);
    cpu_qk_forward(q.host, k.host, zn.host, gamma.host, beta.host, R, Z, dz);
    qk_forward(q.device, k.device, zn.device, gamma.device, beta.device, R, Z, dz);
    compare("q", q, FORWARD), compare("k", k, FORWARD);
    cpu_qk_backward(dzn.host, dgamma.host, dbeta.host, dq.host, dk.host, zn.host, gamma.host, R, Z, dz);
    qk_backward(dzn.device, dgamma.device, dbeta.device, dq.device, dk.device, zn.device, gamma.device, R, Z, dz);
    compare("dzn", dzn, BACKWARD), compare("dgamma", dgamma, FLOAT_BACKWARD), compare("dbeta", dbeta, FLOAT_BACKWARD);
    finish();
}

static Dims qk_sizes(int B, int L, int Z, int dz, int C) {
    Dims d = sizes(B, L, Z);
    d.Z = Z, d.H = Z / dz, d.C = C;
    return d;
}
// Some tokens before these ones; the last of the counts is beyond 32 bits.
static Counts counts_before(int B) {
    int64_t *count = on_host<int64_t>(B);
    for (int b = 0; b < B; b++) count[b] = b ? 1000000000007 : 3;
    return Counts{count, copied(count, B), (size_t)B};
}
static Floats rotations(int C, int dz) {
    Floats table = floats_out((size_t)C * dz);
    cpu_rope_table(table.host, C, dz, 1e4);
    rope_table(table.device, C, dz, 1e4);
    return table;
}

static void rope_case(int B, int L, int Z, int dz, int C, int state) {
    Dims d = qk_sizes(B, L, Z, dz, C);
    begin(d, "rope, B %d L %d Z %d dz %d C %d%s", B, L, Z, dz, C, state ? ", state" : "");
    size_t n = (size_t)B * L * Z;
    Floats table = rotations(C, dz);
    Counts count = state ? counts_before(B) : Counts{};
    Acts inp = acts(n, 1, 0.2), out = acts_out(n), same = copy_of(inp);
    compare("table", table, 2e-7);
    cpu_rope_forward(out.host, inp.host, table.host, count.host, d);
    rope_forward(out.device, inp.device, table.device, count.device, d);
    compare("out", out, FORWARD);
    memcpy(same.host, out.host, n * sizeof *out.host);
    rope_forward(same.device, same.device, table.device, count.device, d);
    compare("in place", same, FORWARD);
    cpu_rope_backward(out.host, inp.host, table.host, count.host, d);
    rope_backward(out.device, inp.device, table.device, count.device, d);
    compare("dinp", out, BACKWARD);
    finish();
}

// From z to the rotated q and k. The plain kernels round zn, dq and dk between their steps, which tests of these steps
// do without: so here gradients of gamma and beta have the tolerance of activations.
static void qk_layer_case(int B, int L, int Z, int dz, int C, int state, double size = 1) {
    Dims d = qk_sizes(B, L, Z, dz, C);
    begin(d, "qk_layer, B %d L %d Z %d dz %d C %d%s, x %g", B, L, Z, dz, C, state ? ", state" : "", size);
    SUPPORTS(qk_fast_supports(d));
    const double float_backward = now.fast ? FLOAT_BACKWARD : BACKWARD;
    size_t n = (size_t)B * L * Z;
    Acts z = acts_rows(B * L, Z, 1, 0.2, size), q = acts_out(n), k = acts_out(n), zn = acts_out(n);
    Floats gamma = floats(2 * Z, 1, 0), beta = floats(2 * Z, 1, 0), table = rotations(C, dz);
    if (B == 3) gamma = but_first(floats(2 * Z + 1, 1, 0)), beta = but_first(floats(2 * Z + 1, 1, 0));
    Floats z_rstd = floats_out((size_t)B * L * d.H);
    Counts count = state ? counts_before(B) : Counts{};
    cpu_qk_layer_forward(q.host, k.host, zn.host, z_rstd.host, z.host, gamma.host, beta.host, table.host, count.host, d,
                         EPS);
    qk_layer_forward(q.device, k.device, zn.device, z_rstd.device, z.device, gamma.device, beta.device, table.device,
                     count.device, d, EPS);
    compare("q", q, FORWARD), compare("k", k, FORWARD), compare("z_rstd", z_rstd, FLOAT_FORWARD);
    cpu_qk_layer_forward(q.host, k.host, zn.host, z_rstd.host, z.host, gamma.host, beta.host, NULL, NULL, d, EPS);
    qk_layer_forward(q.device, k.device, zn.device, z_rstd.device, z.device, gamma.device, beta.device, NULL, NULL, d,
                     EPS);
    compare("q, not rotated", q, FORWARD), compare("k, not rotated", k, FORWARD);

    Acts dq = acts(n, 1, 0.1), dk = acts(n, 1, 0), dz_out = acts_out(n);
    Floats dgamma = floats(2 * Z, 1, 0), dbeta = floats(2 * Z, 1, 0);
    cpu_qk_layer_backward(dz_out.host, dgamma.host, dbeta.host, dq.host, dk.host, zn.host, z_rstd.host, z.host,
                          gamma.host, table.host, d);
    qk_layer_backward(dz_out.device, dgamma.device, dbeta.device, dq.device, dk.device, zn.device, z_rstd.device,
                      z.device, gamma.device, table.device, d);
    compare("dz", dz_out, BACKWARD), compare("dgamma", dgamma, float_backward);
    compare("dbeta", dbeta, float_backward);
    finish();
}
static void test_qk(void) {
    if (odd_shapes) {
        qk_case(1, 2, 2), qk_case(22, 18, 6), qk_case(27, 64, 32), qk_case(1100, 4, 2), qk_case(10, 256, 256);
        for (int state = 0; state < 2; state++) {
            rope_case(1, 1, 2, 2, 1, state), rope_case(2, 11, 18, 6, 5, state), rope_case(3, 9, 64, 32, 4, state);
            rope_case(2, 5, 256, 256, 2048, state);
        }
    }
    for (int state = 0; state < 2; state++) {
        qk_layer_case(3, 9, 64, 32, 4, state), qk_layer_case(2, 11, 16, 8, 5, state);
        qk_layer_case(1, 4500, 8, 8, 64, state); // more rows than all thread blocks have at a time
        qk_layer_case(2, 5, 256, 256, 2048, state), qk_layer_case(2, 70, 384, 128, 64, state); // mega200M's
        qk_layer_case(2, 7, 192, 96, 5, state);                                                // 12 of 16 lanes
        if (!odd_shapes) continue;
        qk_layer_case(5, 1, 2, 2, 1, state), qk_layer_case(2, 11, 18, 6, 5, state);
        qk_layer_case(1, 1100, 4, 2, 64, state);
    }
    for (int i = 0; i < 3; i++) { // squares that overflow, of some rows and of all
        qk_layer_case(2, 5, 64, 32, 8, 0, i == 0 ? 1e19 : i == 1 ? 1e25 : 1e37);
        qk_layer_case(1, 1, 256, 256, 8, 1, 1e20);
    }
    if (odd_shapes) qk_layer_case(1, 3, 3200, 3200, 2, 0);
}

static void test_gates(void) {
    static const size_t lengths[] = {1, 37, 4096, 5 * 2048 + 3};
    for (size_t n : lengths) {
        begin(sizes(1, 1, 1), "silu, %d", (int)n);
        Acts x = acts(n, 6, 0), y = acts_out(n), dout = acts(n, 1, 0), dx = acts_out(n), again = acts_out(n);
        cpu_silu_forward(y.host, x.host, n), cpu_silu_backward(again.host, dx.host, dout.host, x.host, n);
        silu_forward(y.device, x.device, n);
        compare("out", y, FORWARD);
        silu_backward(again.device, dx.device, dout.device, x.device, n);
        compare("dinp", dx, BACKWARD), compare("out again", again, FORWARD);
        dx.device = dout.device;
        silu_backward(NULL, dx.device, dout.device, x.device, n);
        compare("dinp in place", dx, BACKWARD);
        finish();

        begin(sizes(1, 1, 1), "gate, %d", (int)n);
        Acts a = acts(n, 1, 0), b = acts(n, 6, 0), out = acts_out(n), dgate = acts(n, 1, 0), same = copy_of(dgate);
        Acts da = acts_out(n), db = acts_out(n), recomputed = acts_out(n);
        cpu_gate_forward(out.host, a.host, b.host, n);
        cpu_gate_backward(recomputed.host, da.host, db.host, dgate.host, a.host, b.host, n);
        gate_forward(out.device, a.device, b.device, n);
        compare("out", out, FORWARD);
        gate_backward(recomputed.device, da.device, db.device, dgate.device, a.device, b.device, n);
        compare("da", da, BACKWARD), compare("db", db, BACKWARD), compare("out again", recomputed, FORWARD);
        da.device = same.device;
        gate_backward(NULL, da.device, db.device, same.device, a.device, b.device, n);
        compare("da in place", da, BACKWARD), compare("db then", db, BACKWARD);
        finish();
    }
}

// Pre-activations at which e^-x overflows or underflows, with factors that are large themselves.
static void test_far_gates(void) {
    static const float points[] = {0, 1, 20, 64, 65, 87, 89, 100, 104, 1e4f, 1e30f, 3e38f},
                       factors[] = {1, -1e20f, 3e38f};
    enum { POINTS = 12, COUNT = 2 * POINTS * 3 };
    begin(sizes(1, 1, 1), "gates, far from zero");
    float *x = on_host<float>(COUNT), *factor = on_host<float>(COUNT), *ones = on_host<float>(COUNT);
    for (int i = 0; i < COUNT; i++) {
        x[i] = (i % 2 ? 1 : -1) * points[i / 2 % POINTS], factor[i] = factors[i / 2 / POINTS], ones[i] = 1;
        if (fabsf(factor[i]) > 1 && x[i] < -64 && x[i] > -200) x[i] = -1e30f; // silu is below float's range
    }
    Acts inp = acts_from(x, COUNT), a = acts_from(factor, COUNT), dout = acts_from(ones, COUNT), y = acts_out(COUNT);
    Acts dinp = acts_out(COUNT), again = acts_out(COUNT), out = acts_out(COUNT), da = acts_out(COUNT);
    Acts db = acts_out(COUNT), recomputed = acts_out(COUNT);
    cpu_silu_forward(y.host, inp.host, COUNT);
    cpu_silu_backward(again.host, dinp.host, dout.host, inp.host, COUNT);
    cpu_gate_forward(out.host, a.host, inp.host, COUNT);
    cpu_gate_backward(recomputed.host, da.host, db.host, dout.host, a.host, inp.host, COUNT);
    silu_forward(y.device, inp.device, COUNT);
    silu_backward(again.device, dinp.device, dout.device, inp.device, COUNT);
    gate_forward(out.device, a.device, inp.device, COUNT);
    gate_backward(recomputed.device, da.device, db.device, dout.device, a.device, inp.device, COUNT);
    compare_each("silu", y), compare_each("silu's derivative", dinp), compare_each("silu again", again);
    compare_each("gate", out), compare_each("da", da), compare_each("db", db), compare_each("gate again", recomputed);
    finish();
}

// past: NULL, or tokens of the unfinished chunk before these, for each sequence. state 1 begins with the first of
// `before`.
static int *past_tokens(int B, int C, int state) {
    static const int64_t before[4] = {3, 0, 1, 1000003};
    int *past = on_host<int>(B);
    for (int b = 0; b < B; b++) past[b] = (int)(before[(b + state + 3) % 4] % C);
    return state ? past : NULL;
}
static float *host_scores(int C) { return on_host<float>((size_t)2 * CPU_QUERY_TILE * C); } // for one thread

// Scores have a deviation of about one.
static void attention_case(int B, int L, int C, int H, int dz, int dv, double p, int state) {
    Dims d = sizes(B, L, 1);
    d.C = C, d.H = H, d.Z = H * dz, d.E = H * dv;
    begin(d, "attention, B %d L %d C %d H %d dz %d dv %d%s, state %d", B, L, C, H, dz, dv, p > 0 ? ", dropout" : "",
          state);
    const int *past = past_tokens(B, C, state);
    SUPPORTS(attention_fast_supports(past, d));
    const Model m = training();
    const size_t R = (size_t)B * L, Z = d.Z, E = d.E;
    const double size = sqrt(3 / sqrt((double)dz));
    // S, P, dP and dS are floatX: each is rounded, and the errors of few keys do not average out.
    const double forward = sizeof(floatX) < 4 && min_int(L, C) < 10 ? 1e-2 : FORWARD;
    const double backward = sizeof(floatX) < 4 && min_int(L, C) < 10 ? 1e-2 : BACKWARD;
    Mask mask = mask_from(p, ((uint64_t)1 << 33) + 5);
    mask.row = (uint64_t)L * C;
    Acts q = acts(R * Z, size, 0), k = acts(R * Z, size, 0), v = acts(R * E, 1, 0.1), o = acts_out(R * E);
    Floats lse = floats_out(R * H), cache_k = {}, cache_v = {};
    floatX *scores = on_device<floatX>(scores_size(&m, d));
    float *cpu_scores = host_scores(C);
    if (state) cache_k = rounded_floats(B * C * Z, size, 0), cache_v = rounded_floats(B * C * E, 1, 0);
    cpu_attention_forward(o.host, lse.host, cache_k.host, cache_v.host, cpu_scores, q.host, k.host, v.host, past, mask,
                          d, 1);
    attention_forward(o.device, lse.device, cache_k.device, cache_v.device, scores, q.device, k.device, v.device, past,
                      mask, d);
    compare("o", o, forward), compare("lse", lse, forward);
    compare("cached k", cache_k, 1e-30), compare("cached v", cache_v, 1e-30);
    if (!state) {
        Acts dout = acts(R * E, 1, 0), dq = acts_out(R * Z), dk = acts_out(R * Z), dv_out = acts_out(R * E);
        cpu_attention_backward(dq.host, dk.host, dv_out.host, cpu_scores, dout.host, lse.host, q.host, k.host, v.host,
                               mask, d, 1);
        attention_backward(dq.device, dk.device, dv_out.device, scores, dout.device, lse.device, q.device, k.device,
                           v.device, mask, d);
        compare("dq", dq, backward), compare("dk", dk, backward), compare("dv", dv_out, backward);
    }
    finish();
}
static void test_attention(void) {
    for (int dropping = 0; dropping < 2; dropping++) {
        double p = dropping ? 0.3 : 0;
        attention_case(2, 16, 8, 1, 8, 8, p, 0), attention_case(3, 40, 16, 2, 8, 16, p, 0);
        attention_case(1, 24, 2048, 1, 256, 2048, p, 0); // mega200M's
        attention_case(1, 700, 1032, 1, 8, 8, p, 0);     // more queries than exist at a time, not all of a chunk
        attention_case(2, 560, 528, 2, 8, 8, p, 0), attention_case(2, 96, 32, 3, 8, 8, p, 0);
        attention_case(2, 5, 8, 3, 2, 3, p, 0), attention_case(2, 16, 8, 1, 4, 8, p, 0);
        attention_case(3, 19, 8, 3, 2, 3, p, 0);
        attention_case(1, 23, 8, 1, 8, 8, p, 2), attention_case(1, 16, 8, 2, 4, 8, p, 2); // at the start of a chunk
        if (gpu.hopper) { // several chunks, heads, parts of a tile, unfinished chunks
            attention_case(2, 1024, 512, 1, 64, 256, p, 0), attention_case(1, 2348, 2048, 1, 256, 2048, p, 0);
            attention_case(3, 600, 256, 2, 40, 264, p, 0), attention_case(1, 900, 1032, 2, 128, 512, p, 0);
            attention_case(1, 700, 296, 1, 256, 512, p, 2);
        }
        if (!odd_shapes) continue;
        attention_case(1, 7, 7, 1, 3, 5, p, 0), attention_case(2, 33, 11, 2, 3, 5, p, 0);
        attention_case(1, 700, 1030, 1, 4, 3, p, 0), attention_case(2, 30, 12, 1, 8, 8, p, 0);
        attention_case(2, 560, 530, 2, 2, 4, p, 0);
        for (int state = 1; state < 5; state++) {
            attention_case(1, 1, 8, 1, 4, 8, p, state), attention_case(4, 1, 5, 2, 3, 3, p, state);
            attention_case(4, 4, 5, 2, 3, 3, p, state), attention_case(3, 23, 8, 1, 8, 8, p, state);
            attention_case(2, 5, 8, 3, 2, 5, p, state), attention_case(1, 2, 5, 1, 3, 2, p, state);
        }
        attention_case(2, 16, 8, 2, 4, 8, p, 2), attention_case(2, 1100, 1030, 1, 2, 3, p, 1);
    }
    // more chunks than there is room for scores of
    if (odd_shapes) attention_case(65, 512, 512, 1, 2, 1, 0, 0);
    if (!odd_shapes) attention_case(1, 65 * 512, 512, 1, 8, 8, 0, 0);
}

// Scores 0 for the first key, and 2^28 for the others, whose log-sum-exp rounds to themselves: they must share the
// probability, and the first value must not count. Then a score that overflows to -infinity, which must not pass for a
// probability of 0.
static void far_attention_case(int L, int C, int dz, int dv) {
    for (int overflow = 0; overflow < 2; overflow++) {
        Dims d = sizes(1, L, 1);
        d.C = C, d.Z = dz, d.E = dv;
        begin(d, "attention, L %d, %s", L, overflow ? "a score that overflows" : "equal scores of 2^28");
        SUPPORTS(attention_fast_supports(NULL, d));
        const Model m = training();
        float *q = random_numbers(L * dz, 0, 0), *k = random_numbers(L * dz, 0, 0), *v = random_numbers(L * dv, 0, 1);
        float *last = random_numbers(L * dv, 0, 0), large = overflow ? 1e30f : 0x1p14f;
        for (int t = 0; t < L; t++) q[t * dz] = large, k[t * dz] = overflow ? (t ? 0 : -large) : (t ? large : 0);
        v[0] = 1e38f, v[2 * dv] = 3, last[2 * dv] = 1;
        Acts qs = acts_from(q, L * dz), ks = acts_from(k, L * dz), vs = acts_from(v, L * dv), o = acts_out(L * dv);
        Acts dout = acts_from(last, L * dv), dq = acts_out(qs.n), dk = acts_out(qs.n), dv_out = acts_out(L * dv);
        Floats lse = floats_out(L);
        floatX *scores = on_device<floatX>(scores_size(&m, d));
        float *cpu_scores = host_scores(C);
        Mask none = mask_from(0, 0);
        cpu_attention_forward(o.host, lse.host, NULL, NULL, cpu_scores, qs.host, ks.host, vs.host, NULL, none, d, 1);
        cpu_attention_backward(dq.host, dk.host, dv_out.host, cpu_scores, dout.host, lse.host, qs.host, ks.host,
                               vs.host, none, d, 1);
        attention_forward(o.device, lse.device, NULL, NULL, scores, qs.device, ks.device, vs.device, NULL, none, d);
        attention_backward(dq.device, dk.device, dv_out.device, scores, dout.device, lse.device, qs.device, ks.device,
                           vs.device, none, d);
        compare_each("o", o);
        if (!overflow) compare_each("dq", dq), compare_each("dk", dk), compare_each("dv", dv_out);
        finish();
    }
}
static void test_far_attention(void) {
    if (odd_shapes) far_attention_case(3, 3, 2, 1);
    if (!odd_shapes) far_attention_case(3, 8, 8, 8);
    if (gpu.hopper) far_attention_case(300, 512, 8, 256);
}

#ifdef HOPPER_KERNELS
static void test_hopper(void) {
    int major = 0;
    begin(sizes(1, 1, 1), "kernels for Hopper GPUs");
    cudaCheck(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    check_true("used if this is one", gpu.hopper == (major == 9));
    finish();
}
#endif

static void layernorm_case(int R, int D, int affine, double size = 1) {
    begin(sizes(1, R, D), "layernorm, R %d D %d%s, x %g", R, D, affine ? "" : ", no affine", size);
    SUPPORTS(norms_fast_supports(D));
    Acts inp = acts_rows(R, D, 1, 0.3, size), out = acts_out(inp.n), dout = acts(inp.n, 1, 0), dinp = acts_out(inp.n);
    Floats weight = {}, bias = {}, dweight = {}, dbias = {}, rstd = floats_out(R);
    Doubles mean = doubles_out(R);
    if (affine) weight = floats(D, 1, 0), bias = floats(D, 1, 0), dweight = floats(D, 1, 0), dbias = floats(D, 1, 0);
    if (affine && R == 9) weight = but_first(floats(D + 1, 1, 0)), bias = but_first(floats(D + 1, 1, 0));
    cpu_layernorm_forward(out.host, mean.host, rstd.host, inp.host, weight.host, bias.host, R, D, EPS);
    layernorm_forward(out.device, mean.device, rstd.device, inp.device, weight.device, bias.device, R, D, EPS);
    compare("out", out, FORWARD), compare("mean", mean, FLOAT_FORWARD), compare("rstd", rstd, FLOAT_FORWARD);
    upload(mean), upload(rstd);
    cpu_layernorm_backward(dinp.host, dweight.host, dbias.host, dout.host, inp.host, weight.host, mean.host, rstd.host,
                           R, D);
    layernorm_backward(dinp.device, dweight.device, dbias.device, dout.device, inp.device, weight.device, mean.device,
                       rstd.device, R, D);
    compare("dinp", dinp, BACKWARD);
    compare("dweight", dweight, FLOAT_BACKWARD), compare("dbias", dbias, FLOAT_BACKWARD);
    finish();
}
static void test_layernorm(void) {
    for (int affine = 0; affine < 2; affine++) {
        layernorm_case(9, 64, affine), layernorm_case(2051, 8, affine); // more rows than parts
        layernorm_case(11, 1024, affine);                               // mega200M's
        if (odd_shapes) layernorm_case(1, 5, affine), layernorm_case(5, 19, affine), layernorm_case(2051, 7, affine);
        if (odd_shapes) layernorm_case(5, 12, affine);
    }
    layernorm_case(3, 128, 1), layernorm_case(3, 512, 1), layernorm_case(3, 1544, 1), layernorm_case(3, 2560, 1),
        layernorm_case(3, 4096, 1);
    if (odd_shapes) layernorm_case(3, 8191, 1), layernorm_case(3, 8192, 1), layernorm_case(2, 20000, 1);
    for (int i = 0; i < 4; i++) { // squares, or their sum, that overflow, of some rows and of all
        double size = i == 0 ? 1e18 : i == 1 ? 1e20 : i == 2 ? 1e25 : 1e38;
        layernorm_case(1, 1024, 1, size), layernorm_case(9, 64, 0, size);
        if (odd_shapes) layernorm_case(5, 19, 1, size);
    }
}

static void rescale_case(int R, int D) {
    begin(sizes(1, R, D), "rescale, R %d D %d", R, D);
    Acts inp = acts((size_t)R * D, 1, 0), out = acts_out(inp.n), dout = acts(inp.n, 1, 0), dinp = acts_out(inp.n);
    Floats alpha = floats(D, 1, 0), dalpha = floats(D, 1, 0);
    cpu_rescale_forward(out.host, inp.host, alpha.host, R, D);
    rescale_forward(out.device, inp.device, alpha.device, R, D);
    compare("out", out, FORWARD);
    cpu_rescale_backward(dinp.host, dalpha.host, dout.host, inp.host, alpha.host, R, D);
    rescale_backward(dinp.device, dalpha.device, dout.device, inp.device, alpha.device, R, D);
    compare("dinp", dinp, BACKWARD), compare("dalpha", dalpha, FLOAT_BACKWARD);
    finish();
}
static void test_rescale(void) {
    rescale_case(1, 1), rescale_case(5, 13), rescale_case(2051, 3), rescale_case(7, 1024);
}

static void test_add(void) {
    static const size_t lengths[] = {1, 37, 4096, 5 * 2048 + 3};
    for (size_t n : lengths) {
        begin(sizes(1, 1, 1), "add, %d", (int)n);
        Acts out = acts(n, 1, 0), inp = acts(n, 1, 0);
        cpu_add(out.host, inp.host, n), add(out.device, inp.device, n);
        compare("out", out, FORWARD);
        finish();
    }
}

static void output_loss_case(int R, int D, int V) {
    Dims d = sizes(1, R, D);
    d.V = V;
    begin(d, "output_loss, R %d D %d V %d", R, D, V);
    SUPPORTS(loss_fast_supports(V));
    const double grad_scale = 0.37;
    Acts x = acts((size_t)R * D, 1.7, 0), output = acts((size_t)V * D, 3 / sqrt((double)D), 0), dx = acts_out(x.n);
    Floats doutput = floats(output.n, 0.001, 0);
    Doubles losses = doubles_out(R), total = doubles_out(1);
    floatX *logits = on_device<floatX>((size_t)min_int(logit_rows(V), R) * V);
    float *cpu_logits = on_host<float>((size_t)min_int(cpu_logit_rows(V), R) * V);
    int32_t *targets = on_host<int32_t>(R);
    for (int r = 0; r < R; r++) targets[r] = r % 3 == 1 ? -1 : (7 * r + V - 1) % V;
    int32_t *device_targets = copied(targets, R);
    cpu_output_loss(losses.host, dx.host, doutput.host, cpu_logits, x.host, output.host, targets, grad_scale, R, D, V);
    output_loss(losses.device, NULL, NULL, logits, x.device, output.device, device_targets, 0, R, D, V);
    compare("losses alone", losses, FORWARD);
    memory_copy(losses.device, on_host<double>(R), R * sizeof(double)); // NaN again
    output_loss(losses.device, dx.device, doutput.device, logits, x.device, output.device, device_targets, grad_scale,
                R, D, V);
    compare("losses", losses, FORWARD);
    compare("dx", dx, V > 1 << 20 ? 2e-2 : BACKWARD); // a sum of a million floats, which cancel
    compare("doutput", doutput, BACKWARD);            // through the logits' gradients, which are floatX
    total.host[0] = 0;
    for (int r = 0; r < R; r++) total.host[0] += losses.host[r];
    sum_kernel<<<1, THREADS>>>(total.device, losses.device, R);
    compare("their sum", total, FORWARD);
    finish();
}
static void test_output_loss(void) {
    output_loss_case(300, 8, 16), output_loss_case(9, 24, 64), output_loss_case(4, 16, 32000);
    output_loss_case(5, 8, 4104);
    if (!odd_shapes) return;
    if (pass == PLAIN) output_loss_case(LOGIT_ROWS + 3, 1, LOGITS / LOGIT_ROWS + 3); // in two slices
    output_loss_case(20, 3, 5), output_loss_case(7, 5, 11), output_loss_case(6, 5, 12), output_loss_case(5, 3, 4099);
}

// x is 1, so that logits are the output matrix: two of 1e20; one far above the others, so that the loss is small and
// softmax - 1 cancels; one that overflows to -infinity, which must not pass for a probability of 0.
static void test_far_loss(void) {
    static const char *const names[3] = {"two logits of 1e20", "a logit 20 above the others", "a logit that overflows"};
    for (int i = 0; i < 6; i++) {
        int kind = i / 2, V = i % 2 ? 64 : 5, target = kind == 2 ? 1 : V - 2;
        if (!odd_shapes && V == 5) continue;
        Dims d = sizes(1, 1, 1);
        d.V = V;
        begin(d, "output_loss, V %d, %s", V, names[kind]);
        SUPPORTS(loss_fast_supports(V));
        float *row = random_numbers(V, 1, -20), *one = random_numbers(1, 0, kind == 2 ? 1e20 : 1);
        row[target] = kind == 0 ? 1e20f : kind == 1 ? 0 : 1, row[V - 1] = kind == 0 ? 1e20f : kind == 1 ? -20 : -1e30f;
        Acts x = acts_from(one, 1), output = acts_from(row, V), dx = acts_out(1);
        Floats doutput = floats(V, 0, 0);
        Doubles losses = doubles_out(1);
        int32_t *targets = on_host<int32_t>(1);
        targets[0] = target;
        cpu_output_loss(losses.host, dx.host, doutput.host, on_host<float>(V), x.host, output.host, targets, 1, 1, 1,
                        V);
        output_loss(losses.device, dx.device, doutput.device, on_device<floatX>(V), x.device, output.device,
                    copied(targets, 1), 1, 1, 1, V);
        double loss;
        memory_copy(&loss, losses.device, sizeof loss);
        if (kind == 2) check_true("the loss is NaN", isnan(loss));
        if (kind < 2) compare("loss", losses, FLOAT_FORWARD), compare("gradient of the logits", doutput, BACKWARD);
        finish();
    }
}

#ifdef FAST_KERNELS
// ----------------------------------------------------------------------------
// functions that only the fast kernels have

static void sum_parts_fast_case(int P, int n, int n2, int add) {
    begin(sizes(1, 1, 1), "sum_parts_fast, %d of %d + %d%s", P, n, n2, add ? ", added" : "");
    const int stride = n + n2;
    Floats parts = floats((size_t)P * stride, 1, 1), out = add ? floats(n, 1, 0) : floats_out(n), out2 = {};
    if (n2) out2 = add ? floats(n2, 1, 0) : floats_out(n2);
    for (int c = 0; c < stride; c++) {
        float *to = c < n ? out.host + c : out2.host + (c - n);
        double sum = add ? *to : 0;
        for (int p = 0; p < P; p++) sum += parts.host[(size_t)p * stride + c];
        *to = (float)sum;
    }
    sum_parts_fast(out.device, out2.device, parts.device, P, n, n2, add);
    compare("out", out, FLOAT_FORWARD), compare("out2", out2, FLOAT_FORWARD);
    finish();
}
static void test_sum_parts_fast(void) {
    for (int add = 0; add < 2; add++) {
        sum_parts_fast_case(1, 1, 0, add), sum_parts_fast_case(5, 7, 7, add), sum_parts_fast_case(33, 100, 3, add);
        sum_parts_fast_case(1024, 33, 0, add), sum_parts_fast_case(257, 64, 64, add);
    }
}

// CEMA's gradients with half of the channels in a thread block, for devices with 99 KB: equal bits, since channels are
// independent.
static void tiles_case(int B, int L, int D, int N, int partial) {
    Dims d = sizes(B, L, D);
    d.N = N;
    begin(d, "cema's tiles, B %d L %d D %d N %d%s", B, L, D, N, partial ? ", dh" : "");
    SUPPORTS(cema_fast_supports(d));
    const size_t R = (size_t)B * L, states = (size_t)B * 2 * N * D, blocks = ceil_div(L, CEMA_BLOCK);
    const size_t n = (size_t)5 * N * D + D, max_shared = gpu.max_shared;
    CoeffsTwice c = random_cema(D, N, 0);
    Acts inp = acts(R * D, 1, 0.2), dout = acts(R * D, 1, 0.2), out = acts_out(R * D), dinp = acts_out(R * D);
    Floats omega = floats(D, 1, 0), later = floats(states, 1, 0);
    float *h_blocks = on_device<float>(blocks * states), *bits[2];
    cema_forward(out.device, h_blocks, NULL, inp.device, &c.device, omega.device, NULL, d);
    for (int i = 0; i < 2; i++) {
        CoeffsTwice dc = coeffs_out(D, N);
        float *domega = copied(omega.host, D), *dh = partial ? copied(later.host, states) : NULL;
        if (i == 1) gpu.max_shared = SHARED_TOTAL;
        cema_backward(dinp.device, &dc.device, domega, dh, dout.device, inp.device, h_blocks, &c.device, omega.device,
                      d);
        bits[i] = on_host<float>(n);
        memory_copy(bits[i], dc.device.p, (n - D) * sizeof(float));
        memory_copy(bits[i] + (n - D), domega, D * sizeof(float));
    }
    gpu.max_shared = max_shared;
    check_true("the same bits with smaller tiles", memcmp(bits[0], bits[1], n * sizeof(float)) == 0);
    finish();
}
static void test_tiles(void) {
    const size_t max_shared = gpu.max_shared;
    for (int partial = 0; partial < 2; partial++) {
        tiles_case(2, 130, 24, 3, partial), tiles_case(1, 64, 64, 9, partial), tiles_case(3, 70, 8, 1, partial);
    }
    gpu.max_shared = SHARED_TOTAL;
    cema_case(2, 130, 40, 2, STATE, 0), cema_case(1, 70, 24, 9, NO_STATE, 0), cema_case(2, 64, 64, 1, STATE, 0);
    gpu.max_shared = max_shared;
}

// ----------------------------------------------------------------------------
// decoding: a token of each of B sequences

static void decode_norm_case(int B, int D, int G, int N, double shift = 0.5, double scale = 1) {
    Dims d = sizes(B, 1, D);
    d.G = G, d.N = N;
    begin(d, "decode_norm, B %d D %d G %d N %d, mean %g, x %g", B, D, G, N, shift, scale);
    size_t width = (size_t)B * D, pairs = (size_t)B * G, states = (size_t)B * 2 * N * D;
    Acts x = acts(width, 1.7 * scale, shift), xt = acts_out(width), ema = acts_out(width);
    Floats weight = floats(D, 1, 0), bias = floats(D, 1, 0), omega = floats(D, 1, 0), h = floats(states, 1, 0);
    Floats rstd = floats_out(pairs), h_blocks = floats_out(states);
    Doubles mean = doubles_out(pairs);
    CoeffsTwice c = random_cema(D, N, 0);
    Past in = past_of(B, D, G, shift, scale), end = {{}, doubles_out(pairs), doubles_out(pairs)};
    cpu_timestep_norm_forward(xt.host, mean.host, rstd.host, host_state(end), x.host, weight.host, bias.host,
                              host_state(in), d, EPS);
    cpu_cema_forward(ema.host, h_blocks.host, h.host, xt.host, &c.host, omega.host, h.host, d);
    Stage stages[2] = {linear_stage_new(x.device, D, TIMESTEP_NORM, NULL, NULL),
                       linear_stage_new(x.device, D, NO_NORM, NULL, NULL)};
    Norm norm = timestep_norm_of(weight.device, bias.device, device_state(in), G);
    stages[0].linear.norm = norm;
    stages[0].cema = Cema{ema.device, h.device, omega.device, c.device, N};
    stages[1].moments = moments_of(norm, device_state(in), x.device, xt.device, D);
    decode_run(stages, 0, 2, NULL, 1, B, EPS);
    end.mean.device = in.mean.device, end.m2.device = in.m2.device;
    const bool overflows = scale > 1e18;
    if (overflows) {
        compare_nan("xt", xt, 0, width), compare_nan("ema", ema, 0, width);
    } else {
        compare("xt", xt, FORWARD), compare("ema", ema, FORWARD), compare("h", h, FORWARD);
        compare("mean", end.mean, FLOAT_FORWARD), compare("m2", end.m2, FLOAT_FORWARD);
    }
    finish();
}
static void test_decode_norm(void) {
    decode_norm_case(1, 8, 1, 1), decode_norm_case(3, 32, 2, 3), decode_norm_case(2, 136, 136, 16);
    decode_norm_case(4, 200, 2, 33); // groups of more channels than lanes, more modes than warps
    decode_norm_case(1, 1024, 32, 16), decode_norm_case(8, 384, 32, 8); // mega200M's, enwik8's
    decode_norm_case(40, 136, 2, 5);
    decode_norm_case(3, 64, 2, 3, 1e5, 1e5 / 30);                       // as in timestep_norm's cases
    decode_norm_case(3, 64, 2, 3, 0, 1e20);                             // float sums of squares overflow
    decode_norm_case(2, 64, 1, 2, 1e36, 1e37);
}

// Everything, with one kind of norm; nothing but a bias, and silu alone, as two maps of a stage.
static void decode_linear_case(int B, int K, int M, int M2, int norm, int affine, double size = 1) {
    static const char *const names[] = {"", ", RMSNorm", ", LayerNorm"};
    begin(sizes(1, B, K), "decode_linear, B %d K %d M %d and %d%s%s, x %g", B, K, M, M2, names[norm], affine ? ", affine" : "",
          size);
    size_t n = (size_t)B * M, n2 = (size_t)B * M2;
    double deviation = 1 / sqrt((double)K);
    Acts inp = acts_rows(B, K, 1, 0.3, size), weight = acts((size_t)M * K, deviation, 0), bias = acts(M, 1, 0);
    Acts gate = acts(weight.n, deviation, 0), residual = acts(n, 1, 0), out = copy_of(residual), bias2 = acts(M2, 1, 0);
    Acts weight2 = acts((size_t)M2 * K, deviation, 0), out2 = acts_out(n2), out3 = acts_out(n2);
    Floats scale = floats(M, 1, 0), norm_weight = {}, norm_bias = {}, rstd = floats_out(B);
    double *mean = on_host<double>(B);
    float *x = on_host<float>(inp.n), *times = on_host<float>(n);
    if (affine) norm_weight = floats(K, 1, 0);
    if (affine && norm == LAYER_NORM) norm_bias = floats(K, 1, 0);
    memcpy(x, inp.host, inp.n * sizeof *x);
    if (norm == RMS_NORM) cpu_rmsnorm_forward(x, rstd.host, inp.host, norm_weight.host, B, K, EPS);
    if (norm == LAYER_NORM)
        cpu_layernorm_forward(x, mean, rstd.host, inp.host, norm_weight.host, norm_bias.host, B, K, EPS);
    cpu_linear_forward(out.host, NULL, x, weight.host, bias.host, B, K, M);
    cpu_linear_forward(times, NULL, x, gate.host, NULL, B, K, M);
    cpu_linear_forward(out2.host, NULL, inp.host, weight2.host, bias2.host, B, K, M2);
    cpu_linear_forward(out3.host, NULL, inp.host, weight2.host, NULL, B, K, M2);
    for (size_t i = 0; i < n2; i++) out3.host[i] /= 1 + expf(-out3.host[i]);
    for (size_t i = 0; i < n; i++) {
        float y = out.host[i] / (1 + expf(-out.host[i])) * times[i];
        out.host[i] = y * scale.host[i % M] + residual.host[i];
    }
    Stage stages[2] = {linear_stage_new(inp.device, K, norm, norm_weight.device, norm_bias.device),
                       linear_stage_new(inp.device, K, NO_NORM, NULL, NULL)};
    stages[0].linear.gate = gate.device;
    stages[0].linear.of[0] = Linear{out.device, weight.device, bias.device, out.device, scale.device, M, 1}; // in place
    stages[1].linear.of[0] = Linear{out2.device, weight2.device, bias2.device, NULL, NULL, M2, 0};
    stages[1].linear.of[1] = Linear{out3.device, weight2.device, NULL, NULL, NULL, M2, 1};
    decode_run(stages, 0, 2, NULL, 1, B, EPS);
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
static void test_decode_linear(void) {
    for (int i = 0; i < 6; i++) {
        int norm = i % 3, affine = i / 3;
        decode_linear_case(1, 32, 5, 1, norm, affine), decode_linear_case(3, 64, 37, 5, norm, affine);
        decode_linear_case(2, 96, 9, 33, norm, affine), decode_linear_case(8, 384, 100, 7, norm, affine);
        decode_linear_case(16, 128, 100, 300, norm, affine), decode_linear_case(17, 96, 30, 9, norm, affine);
        decode_linear_case(64, 224, 50, 70, norm, affine);
        decode_linear_case(1, 32, 5000, 3, norm, affine);  // several batches
        decode_linear_case(1, 2048, 1024, 3, norm, affine); // the widest norm
        if (norm == NO_NORM) {
            decode_linear_case(1, 2560, 1024, 3, norm, affine), decode_linear_case(4, 4992, 3, 2, norm, affine);
            continue;
        }
        decode_linear_case(1, 384, 100, 7, norm, affine, 1e20), decode_linear_case(3, 64, 9, 5, norm, affine, 1e36);
    }
}

// overflow: a score of the first sequence's first head overflows to -infinity.
static void decode_attention_case(int B, int C, int H, int dz, int dv, int shift, int overflow = 0) {
    Dims d = sizes(B, 1, 1);
    d.C = C, d.H = H, d.Z = H * dz, d.E = H * dv;
    begin(d, "decode_attention, B %d C %d H %d dz %d dv %d, %d%s", B, C, H, dz, dv, shift,
          overflow ? ", a score that overflows" : "");
    const double forward = 1e-2; // q and k are rounded
    const int64_t before[4] = {C - 1, 0, C / 2, 1000003};
    const size_t Z = d.Z, E = d.E;
    const double size = sqrt(3 / sqrt((double)dz));
    Acts z = acts(B * Z, 1, 0.2), v = acts(B * E, 1, 0.1), r = acts(B * E, 3, 0), gated = acts_out(B * E);
    Floats gamma = floats(2 * Z, sqrt((double)dz), 0), beta = floats(2 * Z, 0.5, 0), lse = floats_out((size_t)B * H);
    Floats cache_k = rounded_floats(B * C * Z, size, 0), cache_v = rounded_floats(B * C * E, 1, 0);
    Floats table = rotations(C, dz);
    float *q = on_host<float>(B * Z), *k = on_host<float>(B * Z), *zn = on_host<float>(B * Z);
    float *z_rstd = on_host<float>((size_t)B * H), *o = on_host<float>(B * E);
    int64_t *count = on_host<int64_t>(B);
    int *past = on_host<int>(B);
    for (int b = 0; b < B; b++) count[b] = before[(b + shift) % 4], past[b] = (int)(count[b] % C);
    cpu_qk_layer_forward(q, k, zn, z_rstd, z.host, gamma.host, beta.host, table.host, count, d, EPS);
    for (int i = 0; overflow && i < dz; i++) cache_k.host[i] = q[i] > 0 ? -3e38f : 3e38f;
    if (overflow) memory_copy(cache_k.device, cache_k.host, dz * sizeof(float));
    cpu_attention_forward(o, lse.host, cache_k.host, cache_v.host, host_scores(C), q, k, v.host, past, mask_from(0, 0),
                          d, 1);
    cpu_gate_forward(gated.host, o, r.host, B * E);
    float *scores = copied(on_host<float>((size_t)B * H * C), (size_t)B * H * C);
    Stage stages[2] = {stage_new(SCORES_STAGE), stage_new(VALUES_STAGE)};
    stages[0].attention = stages[1].attention =
        Attention{gated.device, scores, cache_k.device, cache_v.device, z.device, v.device, r.device, gamma.device,
                  beta.device, table.device, d.Z, d.E, d.H, d.C, 0, 0, 0, 0, 0, 0, 0};
    decode_run(stages, 0, 2, copied(count, B), C, B, EPS);
    if (overflow) compare_nan("gated", gated, 0, dv);
    if (!overflow) compare("gated", gated, forward);
    if (C > 1) compare("cached k", cache_k, FORWARD), compare("cached v", cache_v, 1e-30); // else there is no need
    finish();
}
static void test_decode_attention(void) {
    for (int shift = 0; shift < 4; shift++) {
        decode_attention_case(1, 1, 1, 4, 4, shift), decode_attention_case(4, 5, 3, 8, 4, shift);
        decode_attention_case(3, 70, 2, 36, 32, shift), decode_attention_case(2, 600, 1, 4, 16, shift);
        decode_attention_case(1, 40, 2, 300, 20, shift); // keys of three vectors a lane
    }
    decode_attention_case(1, 2048, 1, 256, 100, 0), decode_attention_case(8, 256, 3, 64, 128, 0);
    decode_attention_case(1, 700, 2, 4, 48, 0), decode_attention_case(64, 40, 3, 16, 8, 1); // more heads than blocks
    decode_attention_case(2, 40, 2, 16, 8, 0, 1);
}

// A model of random parameters continues B sequences token by token with plain and with fast kernels: logits and
// states. Both round activations to bfloat16, each within what CPU against GPU allows (tests/cuda.sh).
static void decode_model_case(int B, int more, int D = 64, int Z = 32, int E = 96, int F = 32) {
    enum { BEFORE = 13, AFTER = 6, V = 43 };
    const double tolerance = 3e-2;
    const bool logits_fast = B <= DECODE_ROWS && D % 32 == 0, fast = logits_fast && Z % 8 == 0 && E % 32 == 0 && F % 32 == 0;
    Config c = megalodon_presets[0].config;
    c.num_layers = 2, c.model_dim = D, c.z_dim = Z, c.value_dim = E, c.num_heads = 2, c.ffn_hidden_dim = F;
    c.cema_ndim = 3, c.chunk_size = 16, c.vocab_size = V, c.norm_num_groups = 4;
    c.swiglu = c.rescale_nffn = c.scale_emb = more;
    c.share_emb = D % 8 != 0; // so that the output matrix is aligned, if its rows are not
    begin(dims_of(&c, B, 1), "decoding, B %d D %d Z %d E %d F %d%s", B, D, Z, E, F,
          more ? ", swiglu, rescale_nffn" : "");
    Model *m = megalodon_new(&c, MEGALODON_INFER, B, BEFORE);
    State *states[2] = {state_new(&c, B, 0), state_new(&c, B, 0)};
    int32_t *tokens = on_host<int32_t>((size_t)B * BEFORE);
    Floats logits = floats_out((size_t)B * V);
    for (int i = 0; i < m->num_tensors; i++) {
        size_t size = i + 1 < m->num_tensors ? m->tensors[i + 1].offset : m->num_params;
        size_t n = size - m->tensors[i].offset;
        megalodon_write(m, PARAMS, m->tensors[i].offset, n, random_numbers(n, 0.3, 0));
    }
    for (int plain = 0; plain < 2; plain++) {
        gpu.plain = plain;
        for (int i = 0; i < B * BEFORE; i++) tokens[i] = (i * i + 3) % V;
        megalodon_forward(m, states[plain], tokens, B, BEFORE);
    }
    for (int t = 0; t < AFTER; t++) { // over the end of a chunk
        for (int b = 0; b < B; b++) tokens[b] = (7 * t + b) % V;
        for (int plain = 0; plain < 2; plain++) {
            gpu.plain = plain;
            megalodon_forward(m, states[plain], tokens, B, 1);
            if (!plain) {
                check_true(fast ? "supported by the fast kernels" : "not supported by the fast kernels",
                           decode_fast_supports(m, states[0]) == fast);
                check_true("logits, too", decode_logits_supports(m, B) == logits_fast);
            }
            float *row = on_host<float>((size_t)B * V);
            megalodon_logits(m, 0, B, row);
            if (plain) memcpy(logits.host, row, logits.n * sizeof *row);
            if (!plain) memory_copy(logits.device, row, logits.n * sizeof *row);
        }
        compare("logits", logits, tolerance);
    }
    gpu.plain = 0;
    const State *first = states[0], *second = states[1];
    Floats h = {on_host<float>((size_t)c.num_layers * B * first->modes), first->h,
                (size_t)c.num_layers * B * first->modes};
    Doubles mean = {on_host<double>((size_t)(c.num_layers + 1) * B * first->G), first->mean,
                    (size_t)(c.num_layers + 1) * B * first->G};
    memory_copy(h.host, second->h, h.n * sizeof(float)), memory_copy(mean.host, second->mean, mean.n * sizeof(double));
    compare("h", h, tolerance), compare("mean", mean, tolerance);
    int64_t counts[2][DECODE_ROWS + 1];
    for (int i = 0; i < 2; i++) memory_copy(counts[i], states[i]->count, B * sizeof(int64_t));
    check_true("count", memcmp(counts[0], counts[1], B * sizeof(int64_t)) == 0 && counts[0][0] == BEFORE + AFTER);
    State *whole = state_new(&c, B, 1);
    check_true("not from a state of whole chunks", !decode_fast_supports(m, whole) && !decode_fast_supports(m, NULL));
    m->cp.cp_size = 2, check_true("not for a chunk-parallel rank", !decode_fast_supports(m, states[0])),
    m->cp.cp_size = 1;
    m->dropout_on = 1, check_true("not with dropout", !decode_fast_supports(m, states[0])), m->dropout_on = 0;
    m->mode = MEGALODON_TRAIN, check_true("not in training", !decode_fast_supports(m, states[0]));
    m->mode = MEGALODON_INFER;
    state_free(states[0]), state_free(states[1]), state_free(whole), megalodon_free(m);
    finish();
}
static void test_decode(void) {
    decode_model_case(1, 0), decode_model_case(3, 1), decode_model_case(16, 1), decode_model_case(17, 0);
    decode_model_case(64, 1), decode_model_case(65, 1);
    decode_model_case(2, 1, 48), decode_model_case(2, 1, 64, 36), decode_model_case(2, 1, 64, 32, 80);
    decode_model_case(2, 0, 64, 32, 96, 48);
}

// Steps of a small model from one seed. Their tokens differ; two steps have other lengths, one validates in between, one
// accumulates two gradients, one has a state, one dropout. `record` false: graphs are dropped before each pass, so that
// none is ever launched. Returns the parameters after the last step, to be freed.
typedef enum { USUAL, MORE, DROPOUT, ODD, REPLACED, WITHOUT } GraphCase;
static void drop_graphs(int record) {
    if (!record) graphs_drop();
}
static float *graph_steps(int record, GraphCase kind, double losses[], size_t *n) {
    enum { B = 2, L = 40, STEPS = 9, V = 43 };
    const AdamW adamw = {0.9, 0.95, 1e-8, 0.1};
    const DropoutKey key = {5, 6, 0, 0, 0};
    Config c = megalodon_presets[0].config;
    c.num_layers = 2, c.model_dim = 64, c.z_dim = 32, c.value_dim = 48, c.num_heads = 2, c.ffn_hidden_dim = 96;
    c.cema_ndim = 3, c.chunk_size = 16, c.vocab_size = V, c.norm_num_groups = 4, c.dropout = kind == DROPOUT ? 0.1 : 0;
    c.swiglu = c.rescale_nffn = c.share_emb = kind == MORE, c.norm_affine = kind != MORE;
    if (kind == REPLACED) c.cema = CEMA_REAL, c.attention = ATTENTION_STANDARD, c.two_hop = ONE_HOP;
    if (kind == WITHOUT) c.cema = CEMA_NONE, c.timestep_norm = NORM_LAYER;
    if (kind == ODD) c.swiglu = 1, c.model_dim = 60, c.z_dim = 36, c.value_dim = 50, c.ffn_hidden_dim = 44;
    Model *m = megalodon_new(&c, MEGALODON_TRAIN, B, L);
    State *state = state_new(&c, B, 1);
    for (int i = 0; i < m->num_tensors; i++) {
        float *values = (float *)malloc(m->tensors[i].size * sizeof *values);
        megalodon_init(values, &m->tensors[i], &c, 7);
        megalodon_write(m, PARAMS, m->tensors[i].offset, m->tensors[i].size, values);
        free(values);
    }
    int32_t tokens[B * L], targets[B * L];
    int64_t counted;
    if (kind == DROPOUT) megalodon_dropout(m, &key);
    for (int step = 0; step < STEPS; step++) {
        const int length = step == 3 || step == 4 ? L - 7 : L;
        megalodon_zero_grad(m);
        losses[step] = 0;
        for (int part = 0; part < 1 + (step == 6); part++) {
            for (int i = 0; i < B * length; i++) tokens[i] = (i * i + 5 * step + part) % V, targets[i] = (i + step) % V;
            drop_graphs(record), megalodon_forward(m, step == 7 ? state : NULL, tokens, B, length);
            if (step == 5) drop_graphs(record), losses[step] += megalodon_loss(m, targets, 0, &counted, NULL);
            drop_graphs(record), losses[step] += megalodon_loss(m, targets, 0.01, &counted, NULL);
            drop_graphs(record), megalodon_backward(m, NULL);
        }
        losses[step] += megalodon_grad_norm(m);
        megalodon_update(m, &adamw, 1e-2, 1, step);
        const int made = (passes[FORWARD_PASS].graph != NULL) + (passes[LOSS_PASS].graph != NULL) +
                         (passes[BACKWARD_PASS].graph != NULL);
        if (step == 2) check_true("graphs after three steps", made == (record && kind != DROPOUT ? 3 : 0));
    }
    float *params = (float *)malloc(m->num_params * sizeof *params);
    megalodon_read(m, PARAMS, 0, m->num_params, params);
    state_free(state);
    check_true("no graph is left when memory has been freed", !passes[FORWARD_PASS].graph && !passes[LOSS_PASS].graph);
    *n = m->num_params;
    megalodon_free(m);
    return params;
}
static void graph_case(GraphCase kind, const char *what) {
    double losses[2][9];
    size_t n;
    begin(sizes(2, 40, 64), "steps as CUDA graphs%s", what);
    float *without = graph_steps(0, kind, losses[0], &n), *with = graph_steps(1, kind, losses[1], &n);
    for (int step = 0; step < 9; step++) check_true("the loss and norm are positive numbers", losses[0][step] > 0);
    check_true("graphs had two branches", beside.parts != NULL);
    check_true("the same losses and norms", memcmp(losses[0], losses[1], sizeof losses[0]) == 0);
    check_true("the same parameters", memcmp(without, with, n * sizeof *with) == 0);
    free(without), free(with);
    finish();
}
static void test_graph(void) {
    graph_case(USUAL, ""), graph_case(MORE, ", swiglu, rescale_nffn"), graph_case(DROPOUT, ", dropout");
    graph_case(ODD, ", odd sizes"), graph_case(REPLACED, ", parts replaced");
    graph_case(WITHOUT, ", without CEMA and TimestepNorm");
}
#endif

// ----------------------------------------------------------------------------
// the optimizer, on a model that has nothing else

static Model optimizer_model(Shard *shards, int num_shards, size_t n, float *memory[4], double *sums) {
    Model m = training();
    m.num_params = n, m.shards = shards, m.num_shards = num_shards, m.coeffs_valid = 1, m.sums = sums;
    for (int i = 0; i < 4; i++) m.memory[i] = memory[i];
    return m;
}
static void optimizer_case(size_t n, int sharded) {
    begin(sizes(1, 1, 1), "optimizer, %d%s", (int)n, sharded ? ", two shards" : "");
    const AdamW adamw = {0.9, 0.95, 1e-8, 0.1};
    Floats params = floats(n, 1, 0), grads = floats(n, 1, 0.1), moment1 = floats(n, 0.1, 0),
           moment2 = floats(n, 0.1, 0.1);
    Acts narrow = acts_from(random_numbers(n, 0, 0), n);
    Doubles sums = doubles_out(NUM_SUMS), norm = doubles_out(1);
    Shard whole[1] = {{0, n}}, parts[2] = {{4, n / 8 * 4}, {n / 4 * 3, n - n / 4 * 3}};
    Shard *shards = sharded ? parts : whole;
    float *host[4] = {params.host, grads.host, moment1.host, moment2.host};
    float *device[4] = {params.device, grads.device, moment1.device, moment2.device};
    Model c = optimizer_model(shards, 1 + sharded, n, host, sums.host);
    Model m = optimizer_model(shards, 1 + sharded, n, device, sums.device);
    m.rounded = sizeof(floatX) < 4 ? narrow.device : (floatX *)(void *)params.device;
    double got = megalodon_grad_norm(&m);
    norm.host[0] = cpu_megalodon_grad_norm(&c);
    memory_copy(norm.device, &got, sizeof got);
    compare("norm of gradients", norm, 1e-12);
    for (int64_t update = 0; update < 3; update++) {
        cpu_megalodon_update(&c, &adamw, 0.01, 0.7, 4 * update);
        megalodon_update(&m, &adamw, 0.01, 0.7, 4 * update);
    }
    compare("parameters", params, FLOAT_FORWARD), compare("moment 1", moment1, FLOAT_FORWARD);
    compare("moment 2", moment2, FLOAT_FORWARD), compare("gradients stay", grads, 1e-30);
    check_true("coefficients are no longer valid", m.coeffs_valid == 0);
    if (sizeof(floatX) < 4) {
        for (int s = 0; s < m.num_shards; s++)
            memcpy(narrow.host + shards[s].first, params.host + shards[s].first, shards[s].count * sizeof(float));
        compare("rounded parameters", narrow, FORWARD);
    }
    megalodon_zero_grad(&m);
    check_true("gradients are zero", megalodon_grad_norm(&m) == 0);
    finish();
}
// A gradient whose square overflows: without NaN the parameter would silently stay as it is.
static void test_far_optimizer(void) {
    begin(sizes(1, 1, 1), "optimizer, gradients of 1e30");
    const AdamW adamw = {0.9, 0.95, 1e-8, 0.1};
    const size_t n = 5;
    Floats params = floats(n, 1, 0), grads = floats(n, 1e29, 1e30), moment1 = floats(n, 0, 0),
           moment2 = floats(n, 0, 0);
    Acts narrow = acts_out(n);
    Shard whole[1] = {{0, n}};
    float *device[4] = {params.device, grads.device, moment1.device, moment2.device};
    Model m = optimizer_model(whole, 1, n, device, NULL);
    m.rounded = sizeof(floatX) < 4 ? narrow.device : (floatX *)(void *)params.device;
    megalodon_update(&m, &adamw, 0.01, 1, 0);
    compare_nan("parameters", params, 0, n);
    if (sizeof(floatX) < 4) compare_nan("rounded parameters", narrow, 0, n);
    finish();
}
static void test_optimizer(void) {
    optimizer_case(1, 0), optimizer_case(1003, 0), optimizer_case(300001, 0), optimizer_case(1003, 1);
}

#ifdef CUDA_ON_CPU_RUNTIME_H
// ----------------------------------------------------------------------------
// What the emulator knows of shared memory: a table of all kernels, for all presets and for dimensions that need most,
// with the devices on which they fit. Their launches are those of training and decoding, with one layer; nothing is
// computed. What kernels declare is known from runs of small models.

enum { NUM_LIMITS = 3, OTHER = NUM_PRESETS };
static const int limits[NUM_LIMITS] = {sizeof(floatX) == 4 ? 64 << 10 : 99 << 10, 163 << 10, 227 << 10};

static void set_device(int limit) {
    char text[20];
    snprintf(text, sizeof text, "%d", limit);
    setenv("CUDA_ON_CPU_OPTIN", text, 1);
    gpu.max_shared = limit;
}

static void gather_nothing(void *context, const void *mine, void *all, size_t bytes) {
    (void)context, (void)mine;
    cudaCheck(cudaMemset(all, 0, 2 * bytes));
}

// A training step, with `ranks` another one as the first of two chunk-parallel ranks; then inference: L tokens at once
// and one token, for 1 up to max_rows sequences.
static void launch_everything(Config config, int L, bool ranks, int max_rows) {
    enum { B = 2 };
    config.num_layers = 1;
    const int V = config.vocab_size;
    const AdamW adamw = {0.9, 0.95, 1e-8, 0.1};
    const int64_t lengths[2] = {L, L};
    ChunkParallel cp = ranks_on(lengths, 0);
    cp.cp_size = 2, cp.gather = gather_nothing;
    int32_t *tokens = on_host<int32_t>((size_t)8 * L);
    float *logits = on_host<float>((size_t)8 * V);
    int64_t counted;
    memset(tokens, 0, (size_t)8 * L * sizeof *tokens);
    Model *m = megalodon_new(&config, MEGALODON_TRAIN, B, L);
    for (int rank = 0; m && rank <= ranks; rank++) {
        if (rank) megalodon_chunk_parallel(m, &cp);
        megalodon_forward(m, NULL, tokens, B, L);
        megalodon_loss(m, tokens, 1, &counted, NULL);
        megalodon_backward(m, NULL);
        megalodon_grad_norm(m), megalodon_update(m, &adamw, 1e-3, 1, 0);
    }
    if (m == NULL) cpu_check_true("memory for a model", 0);
    megalodon_free(m);
    for (int b = 1; b <= max_rows; b += emu_dry ? 1 : b) { // 1, 2, 4, 8 use all kernels
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
        "Shared memory in bytes: declared, dynamic (--preset, with batches of 1 to 8 when decoding; other: dimensions "
        "that need most),\nand the sum on devices with %d, %d, %d KB per thread block, -: not launched there\n%-36s "
        "%8s",
        limits[0] >> 10, limits[1] >> 10, limits[2] >> 10, sizeof(floatX) == 4 ? "float32" : "bfloat16", "declared");
    for (const Preset &p : megalodon_presets) printf(" %7.7s", strncmp(p.name, "mega", 4) ? p.name : p.name + 4);
    printf(" %7s", "other");
    for (int limit : limits) printf(" %4d KB", limit >> 10);
    printf("\n");
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
    const std::string optin = before ? before : "";
    const size_t max_shared = gpu.max_shared;
    const int num_configs = OTHER + (int)(sizeof odd / sizeof *odd);
    std::map<std::string, SharedRow> rows;
    for (int plain = 0; plain < 2; plain++) {
        gpu.plain = plain;
        for (const Config &c : small) {
            set_device(limits[NUM_LIMITS - 1]);
            launch_everything(c, 66, true, 8);
            set_device(limits[0]); // smaller tiles
            launch_everything(c, 66, true, 0);
        }
    }
    gpu.plain = 0;
    for (int D : {4104, 4112}) rmsnorm_case(2, D, 1), layernorm_case(2, D, 1); // their kernels for long rows
    emu_dry = true;
    for (int at = 0; at < NUM_LIMITS; at++) {
        set_device(limits[at]);
        for (int i = 0; i < num_configs; i++) {
            const int column = i < OTHER ? i : OTHER;
            size_t most = 0, kernels = 0, unknown = 0;
            const Config config = i < OTHER ? megalodon_presets[i].config : odd[i - OTHER];
            for (auto &kernel : emu_kernels) kernel.second.launched = false, kernel.second.dynamic = 0;
            for (int plain = 0; plain < 2; plain++) {
                gpu.plain = plain;
                launch_everything(config, 130, true, 8);
            }
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
#ifdef FAST_KERNELS
    for (const auto &row : rows) {
        size_t dynamic = 0;
        for (size_t bytes : row.second.dynamic) dynamic += bytes;
        if (dynamic > 0 && row.second.declared > SHARED_DECLARED) cpu_check_true("SHARED_DECLARED is too small", 0);
    }
#endif
    setenv("CUDA_ON_CPU_OPTIN", optin.c_str(), 1);
    if (optin.empty()) unsetenv("CUDA_ON_CPU_OPTIN");
    gpu.max_shared = max_shared;
}

// ----------------------------------------------------------------------------
// the emulator itself: its limits are CUDA's

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

// out (2,THREADS): whether any thread's number is 1, then whether any is 2.
static __global__ void voting_kernel(int *out, const int *numbers) {
    out[threadIdx.x] = __syncthreads_or(numbers[threadIdx.x] == 1);
    out[THREADS + threadIdx.x] = __syncthreads_or(numbers[threadIdx.x] == 2);
}
static void check_votes(int *out, int *numbers, int at, int number) {
    for (int i = 0; i < THREADS; i++) numbers[i] = i == at ? number : 0;
    voting_kernel<<<1, THREADS>>>(out, numbers);
    int good = 1;
    for (int i = 0; i < 2 * THREADS; i++) good &= (out[i] != 0) == (i / THREADS + 1 == number);
    check_true("__syncthreads_or", good);
}

static cublasStatus_t multiply(float *C, const float *A, const float *B, int lda, int batch) {
    const float one = 1, zero = 0;
    return cublasGemmStridedBatchedEx(gpu.blas, CUBLAS_OP_N, CUBLAS_OP_T, 5, 3, 2, &one, A, CUDA_R_32F, lda, 10, B,
                                      CUDA_R_32F, 3, 6, &zero, C, CUDA_R_32F, 5, 15, batch, CUBLAS_COMPUTE_32F,
                                      CUBLAS_GEMM_DEFAULT);
}

static void test_emulator(void) {
    begin(sizes(1, 1, 1), "emulator");
    float *out = on_device<float>(1);
    const int kb = 1 << 10, most = (int)emu_optin() - kb;
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    printf("Eight messages follow that are part of the test.\n");
    check_true("47 KB beside 1 KB that is declared", launch_declaring(out, 47 * kb) == cudaSuccess);
    check_true("a byte more", launch_declaring(out, 47 * kb + 1) == cudaErrorInvalidValue);
    check_true("more than the device has",
               cudaFuncSetAttribute(declaring_kernel, attribute, most + 1) == cudaErrorInvalidValue);
    cudaGetLastError();
    check_true("all that it has", cudaFuncSetAttribute(declaring_kernel, attribute, most) == cudaSuccess &&
                                      launch_declaring(out, most) == cudaSuccess);
    check_true("a byte more than that", launch_declaring(out, most + 1) == cudaErrorInvalidValue);
    check_true("less", cudaFuncSetAttribute(declaring_kernel, attribute, 50 * kb) == cudaSuccess &&
                           launch_declaring(out, 50 * kb) == cudaSuccess);
    check_true("more than was asked for", launch_declaring(out, 50 * kb + 1) == cudaErrorInvalidValue);

    int *votes = on_device<int>(2 * THREADS), *numbers = on_device<int>(THREADS);
    check_votes(votes, numbers, 3, 1), check_votes(votes, numbers, THREADS - 1, 2), check_votes(votes, numbers, 0, 0);

    float *A = on_device<float>(20), *B = on_device<float>(12), *C = on_device<float>(32);
    check_true("a product", multiply(C, A, B, 5, 2) == CUBLAS_STATUS_SUCCESS);
    check_true("ld is less than the rows", multiply(C, A, B, 4, 2) == CUBLAS_STATUS_INVALID_VALUE);
    check_true("a matrix of the host", multiply(C, on_host<float>(20), B, 5, 2) == CUBLAS_STATUS_INVALID_VALUE);
    check_true("a batch that is too large", multiply(C, A, B, 5, 30) == CUBLAS_STATUS_INVALID_VALUE);
    check_true("a null pointer", multiply(C, NULL, B, 5, 2) == CUBLAS_STATUS_INVALID_VALUE);
    finish();
}
#endif

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(void);
        int passes;
    } tests[] = {
        {"sums", test_sums, PLAIN | FAST | DISPATCH},
        {"embedding", test_embedding, PLAIN},
        {"dropout", test_dropout, PLAIN},
        {"timestep_norm", test_timestep_norm, PLAIN | FAST | DISPATCH},
        {"cema", test_cema, PLAIN | FAST | DISPATCH},
        {"ranks", test_ranks, PLAIN | FAST | DISPATCH},
        {"rmsnorm", test_rmsnorm, PLAIN | FAST | DISPATCH},
        {"linear", test_linear, PLAIN | FAST},
        {"qk", test_qk, PLAIN | FAST | DISPATCH},
        {"linear with silu or gate", test_linear_silu, PLAIN | FAST | DISPATCH},
        {"gates", test_gates, PLAIN | FAST},
        {"far gates", test_far_gates, PLAIN | FAST},
        {"attention", test_attention, PLAIN | FAST | DISPATCH},
        {"far attention", test_far_attention, PLAIN | FAST | DISPATCH},
        {"layernorm", test_layernorm, PLAIN | FAST | DISPATCH},
        {"rescale", test_rescale, PLAIN},
        {"add", test_add, PLAIN},
        {"output_loss", test_output_loss, PLAIN | FAST | DISPATCH},
        {"far output_loss", test_far_loss, PLAIN | FAST | DISPATCH},
        {"optimizer", test_optimizer, PLAIN},
        {"far optimizer", test_far_optimizer, PLAIN},
#ifdef HOPPER_KERNELS
        {"hopper", test_hopper, FAST},
#endif
#ifdef FAST_KERNELS
        {"sum_parts_fast", test_sum_parts_fast, FAST},
        {"decode_norm", test_decode_norm, FAST},
        {"decode_linear", test_decode_linear, FAST},
        {"decode_attention", test_decode_attention, FAST},
        {"decode", test_decode, FAST},
        {"graph", test_graph, FAST},
        {"tiles", test_tiles, FAST},
#endif
#ifdef CUDA_ON_CPU_RUNTIME_H
        {"shared_memory", test_shared_memory, ONCE},
        {"emulator", test_emulator, ONCE},
#endif
    };
    printf("%s\n%-48s %9s  %6s\n", megalodon_backend(), "", "rel. L2", "tol");
    for (pass = PLAIN; pass <= ONCE; pass *= 2) {
        gpu.plain = pass == PLAIN || !HAS_FAST, odd_shapes = pass != FAST;
        for (const auto &test : tests) {
            if (!(test.passes & pass) || ((pass == FAST || pass == DISPATCH) && !HAS_FAST)) continue;
            if (argc < 2 || strstr(test.name, argv[1])) test.run();
        }
    }
    return cpu_check_done();
}
