// Times a training step on a GPU and its parts, next to what this GPU can do: a large copy, a large matrix product.
//     build/gpu/bench_cuda --preset mega200M --batch-size 8 --seq-len 2048
// --decode times one more token of --batch-size texts (default 1). --read N times the reading of a prompt of N tokens,
// in forward passes of --seq-len tokens (2048, as in ./sample). --plain uses the plain kernels.
// megalodon.cu is included, since its layers are static. Parts are timed on the buffers of a real step, all layers one
// after another. The last line compares the sum of the parts with the step. Each round times every line once, so that a
// GPU that slows down does so for all of them.
#include "../megalodon.cu"

#include <algorithm>
#include <chrono>
#include <functional>
#include <string>
#include <vector>

static const char *preset = "enwik8";
static int batch_size, seq_len, prompt_len, repeats = 20, brief, decoding, plain;

static void stop(int status, const char *what, const char *which) {
    fprintf(stderr, "error: %s%s\n", what, which);
    exit(status);
}

static void read_options(int argc, char **argv) { // plumbing.h is C
    for (int i = 1; i < argc; i++) {
        const std::string flag = argv[i];
        int *number = flag == "--batch-size" ? &batch_size
                      : flag == "--seq-len"  ? &seq_len
                      : flag == "--read"     ? &prompt_len
                                             : &repeats;
        if (flag == "--brief") {
            brief = 1;
        } else if (flag == "--decode") {
            decoding = 1;
        } else if (flag == "--plain") {
            plain = 1;
        } else if (i + 1 == argc || (number == &repeats && flag != "--repeats" && flag != "--preset")) {
            stop(2,
                 "flags: --preset NAME --batch-size N --seq-len N --repeats N --brief --decode --read N --plain, not ",
                 argv[i]);
        } else if (flag == "--preset") {
            preset = argv[++i];
        } else if ((*number = atoi(argv[++i])) < 1 || *number > (number == &prompt_len ? 1 << 30 : 1 << 20)) {
            stop(2, "too small, too large or no number: ", argv[i]);
        }
    }
    if (batch_size == 0) batch_size = decoding || prompt_len > 0 ? 1 : 64;
    if (seq_len == 0) seq_len = prompt_len > 0 ? 2048 : 512;
    if ((int64_t)batch_size * seq_len > 1 << 28) stop(2, "--batch-size times --seq-len is at most 2^28", "");
}

// ----------------------------------------------------------------------------
// lines of the table

typedef std::function<void()> Call;
typedef struct {
    std::string name;
    std::vector<Call> calls;  // all calls of this part in a step
    double operations, bytes; // of matrix products; or moved, if every input is read once and every output written once
    std::vector<float> ms;    // milliseconds of each round, sorted at the end
} Line;
static std::vector<Line> lines;

// Adds a call to the line of that name, the first time a line.
static void part(const std::string &name, double operations, double bytes, const Call &call) {
    auto at = std::find_if(lines.begin(), lines.end(), [&](const Line &l) { return l.name == name; });
    if (at == lines.end()) at = lines.insert(at, Line{name, {}, 0, 0, {}});
    at->calls.push_back(call);
    at->operations += operations, at->bytes += bytes;
}

static double median(const Line &l) { return l.ms[l.ms.size() / 2] / 1e3; } // seconds

// ----------------------------------------------------------------------------
// what the GPU can do

enum { SIDE = 8192 };                         // of the matrices
static const size_t COPIED = (size_t)1 << 30; // bytes, well beyond the caches
static floatX *large[2];                      // COPIED bytes each

static void run_copy(void) { cudaCheck(cudaMemcpyAsync(large[1], large[0], COPIED, cudaMemcpyDeviceToDevice)); }
static void run_product(void) {
    const floatX *A = large[0], *B = A + (size_t)SIDE * SIDE;
    matmul(large[1], CUBLAS_TYPE, SIDE, matrix(A, SIDE), transposed(B, SIDE), SIDE, SIDE, SIDE, 0);
}

static void list_machine(void) {
    const size_t n = COPIED / sizeof(floatX);
    for (floatX *&memory : large) {
        memory = (floatX *)memory_new(COPIED);
        if (memory == NULL) stop(1, "out of GPU memory for the arrays to copy: ", "a smaller --batch-size may help");
        random_kernel<<<blocks_for(n / 4, THREADS), THREADS>>>(memory, n);
    }
    part("copy", 0, 2.0 * COPIED, run_copy);
    part("product", 2.0 * SIDE * SIDE * SIDE, 0, run_product);
}

// ----------------------------------------------------------------------------
// the whole step

static Model *m;
static Scratch *s;
static int layers, B, L, R, D, N, Z, E, C, F, G, V;
static double eps, sink;
static Dims d;
static std::vector<int32_t> tokens, targets;

static void run_loss(void) {
    int64_t counted;
    sink += megalodon_loss(m, targets.data(), 1.0 / R, &counted, NULL);
}
static void run_update(void) {
    const AdamW adamw = {0.9, 0.95, 1e-8, 0.1};
    megalodon_update(m, &adamw, 1e-6, 1, 0);
}
static void run_step(void) {
    megalodon_zero_grad(m);
    megalodon_forward(m, NULL, tokens.data(), B, L);
    run_loss();
    megalodon_backward(m, NULL);
    sink += megalodon_grad_norm(m);
    run_update();
}

// Operations of products: of a linear map, of one layer's attention, and of the whole step.
static const NormState none = {NULL, NULL, NULL};
static double linear(double K, double M) { return 2.0 * R * K * M; }
static double attention(void) { return B * megalodon_forward_operations(&m->config, L).attention / layers; }
static double step_operations(void) { return B * megalodon_step_operations(&m->config, L); }

// ----------------------------------------------------------------------------
// parts of a step. The calls are those of mega_*, nffn_* and megalodon_*. But functions that these call in place write
// to another buffer where one is free: calls are repeated, and numbers that vanish or grow would change the time.

static double acts(double width) { return (double)sizeof(floatX) * R * width; } // bytes of an array (R, width)
static const floatX *weight(const float *param) { return param ? rounded(m, param) : NULL; }

static void forward(const char *name, floatX *out, const floatX *add, const floatX *inp, const float *w,
                    const float *bias, int K, int M) {
    part(name, linear(K, M), 0, [=] { linear_forward(out, add, inp, weight(w), weight(bias), R, K, M); });
}
static void backward_input(const char *name, floatX *dinp, int add, const floatX *dout, const float *w, int K, int M) {
    part(std::string(name) + " dinp", linear(K, M), 0,
         [=] { linear_backward_input(dinp, add, dout, weight(w), R, K, M); });
}
static void backward_weight(const char *name, float *dw, float *dbias, const floatX *dout, const floatX *inp, int K,
                            int M) {
    part(std::string(name) + " dweight", linear(K, M), 0,
         [=] { linear_backward_weight(dw, dbias, dout, inp, R, K, M); });
}

static void list_qk(const LayerActs *a, const LayerParams *w, const char *again) {
    part(std::string("q, k") + again, 0, acts(3 * Z),
         [=] { qk_layer_forward(s->q, s->k, s->zn, s->z_rstd, a->z, w->gamma, w->beta, m->rope, NULL, d, eps); });
}

static void list_forward(int l, double states) {
    const LayerParams *w = &m->params.layers[l];
    LayerActs *a = &m->acts[l];
    const floatX *x = m->x[l];
    part("TimestepNorm", 0, acts(2 * D) + 12.0 * R * G, [=] {
        timestep_norm_forward(a->xt, a->norm_mean, a->norm_rstd, none, x, w->timenorm_weight, w->timenorm_bias, none, d,
                              eps);
    });
    part("CEMA", 0, acts(2 * D) + states,
         [=] { cema_forward(a->ema, a->h, NULL, a->xt, &m->coeffs[l], w->cema_omega, NULL, d); });
    part("RMSNorm", 0, acts(2 * D), [=] { rmsnorm_forward(a->mx, a->ema_rstd, a->ema, w->rmsnorm_weight, R, D, eps); });
    forward("wz", a->z, NULL, a->mx, w->wz, w->wz_bias, D, Z);
    part("wv, silu", linear(D, E), 0,
         [=] { linear_silu_forward(s->v, a->v_pre, a->xt, rounded(m, w->wv), rounded(m, w->wv_bias), R, D, E); });
    list_qk(a, w, "");
    part("attention", attention(), 0,
         [=] { attention_forward(a->o, a->lse, NULL, NULL, s->scores, s->q, s->k, s->v, NULL, Mask{}, d); });
    forward("wr", a->r_pre, NULL, a->mx, w->wr, w->wr_bias, D, E);
    part("gate", 0, acts(3 * E), [=] { gate_forward(s->gated, a->o, a->r_pre, (size_t)R * E); });
    forward("wh1", a->y, x, a->mx, w->wh1, w->wh1_bias, D, D);
    forward("wh2", a->y, a->y, s->gated, w->wh2, NULL, E, D);
    part("LayerNorm", 0, acts(2 * D),
         [=] { layernorm_forward(a->u, a->ffn_mean, a->ffn_rstd, a->y, w->norm_weight, w->norm_bias, R, D, eps); });
    if (w->fc3) {
        forward("fc1", a->f1, NULL, a->u, w->fc1, NULL, D, F);
        forward("fc3", a->f3, NULL, a->u, w->fc3, NULL, D, F);
        part("gate of fc3", 0, acts(3 * F), [=] { gate_forward(s->hidden, a->f3, a->f1, (size_t)R * F); });
    } else {
        part("fc1, silu", linear(D, F), 0,
             [=] { linear_silu_forward(s->hidden, a->f1, a->u, rounded(m, w->fc1), NULL, R, D, F); });
    }
    forward("fc2", m->x[l + 1], x, s->hidden, w->fc2, NULL, F, D);
}

static void list_backward(int l, double states) {
    const LayerParams *w = &m->params.layers[l], *dw = &m->grads.layers[l];
    const LayerActs *a = &m->acts[l];
    part(w->fc3 ? "fc2 dinp, gate backward" : "fc2 dinp, silu backward", linear(F, D), 0, [=] {
        if (w->fc3)
            linear_gate_backward(s->hidden, s->df3, s->df1, NULL, s->dx, rounded(m, w->fc2), a->f3, a->f1, Mask{}, R, F,
                                 D);
        else
            linear_silu_backward(s->hidden, s->df1, s->dx, rounded(m, w->fc2), a->f1, Mask{}, R, F, D);
    });
    if (w->fc3) backward_input("fc3", s->dxt, 0, s->df3, w->fc3, D, F);
    if (w->fc3) backward_weight("fc3", dw->fc3, NULL, s->df3, a->u, D, F);
    backward_weight("fc2", dw->fc2, NULL, s->dx, s->hidden, F, D);
    backward_input("fc1", s->dxt, w->fc3 != NULL, s->df1, w->fc1, D, F);
    backward_weight("fc1", dw->fc1, NULL, s->df1, a->u, D, F);
    part("LayerNorm backward", 0, acts(3 * D), [=] {
        layernorm_backward(s->dy, dw->norm_weight, dw->norm_bias, s->dxt, a->y, w->norm_weight, a->ffn_mean,
                           a->ffn_rstd, R, D);
    });
    part("wh2 dinp, gate backward", linear(E, D), 0, [=] {
        linear_gate_backward(s->gated, s->do_, s->dr_pre, dw->wr_bias, s->dy, rounded(m, w->wh2), a->o, a->r_pre,
                             Mask{}, R, E, D);
    });
    backward_weight("wh2", dw->wh2, NULL, s->dy, s->gated, E, D);
    backward_input("wh1", s->dmx, 0, s->dy, w->wh1, D, D);
    backward_weight("wh1", dw->wh1, dw->wh1_bias, s->dy, a->mx, D, D);
    backward_input("wr", s->dmx, 1, s->dr_pre, w->wr, D, E);
    backward_weight("wr", dw->wr, NULL, s->dr_pre, a->mx, D, E);
    list_qk(a, w, " again");
    part("silu of v again", 0, acts(2 * E), [=] { silu_forward(s->v, a->v_pre, (size_t)R * E); });
    part("attention backward", 2 * attention(), 0,
         [=] { attention_backward(s->dq, s->dk, s->dv, s->scores, s->do_, a->lse, s->q, s->k, s->v, Mask{}, d); });
    part("q, k backward", 0, acts(4 * Z), [=] {
        qk_layer_backward(s->dz, dw->gamma, dw->beta, s->dq, s->dk, s->zn, s->z_rstd, a->z, w->gamma, m->rope, d);
    });
    backward_input("wz", s->dmx, 1, s->dz, w->wz, D, Z);
    backward_weight("wz", dw->wz, dw->wz_bias, s->dz, a->mx, D, Z);
    part("RMSNorm backward", 0, acts(3 * D),
         [=] { rmsnorm_backward(s->dema, dw->rmsnorm_weight, s->dmx, a->ema, w->rmsnorm_weight, a->ema_rstd, R, D); });
    part("CEMA backward", 0, acts(3 * D) + states, [=] {
        cema_backward(s->dxt, &s->dcoeffs, dw->cema_omega, NULL, s->dema, a->xt, a->h, &m->coeffs[l], w->cema_omega, d);
        cema_coeffs_backward(dw->cema_alpha, dw->cema_delta, dw->cema_theta, dw->cema_gamma, &s->dcoeffs, w->cema_alpha,
                             w->cema_delta, w->cema_theta, CEMA_COMPLEX, D, N);
    });
    part("silu of v backward, wv's dbias", 0, acts(3 * E),
         [=] { silu_bias_backward(s->do_, dw->wv_bias, s->dv, a->v_pre, R, E); });
    backward_input("wv", s->dxt, 1, s->dv, w->wv, D, E);
    backward_weight("wv", dw->wv, NULL, s->dv, a->xt, D, E);
    part("TimestepNorm backward", 0, acts(5 * D) + 12.0 * R * G, [=] {
        const floatX *residuals[2] = {s->dy, s->dx};
        timestep_norm_backward(s->dmx, dw->timenorm_weight, dw->timenorm_bias, NULL, s->dxt, residuals, m->x[l],
                               w->timenorm_weight, a->norm_mean, a->norm_rstd, NULL, d);
    });
}

static void list_output(void) {
    const Params *w = &m->params, *dw = &m->grads;
    part("final TimestepNorm", 0, acts(2 * D) + 12.0 * R * G, [=] {
        timestep_norm_forward(m->final, m->final_mean, m->final_rstd, none, m->x[layers], w->final_norm_weight,
                              w->final_norm_bias, none, d, eps);
    });
    part("output, loss, backward", 3 * linear(D, V), 0, run_loss);
    part("final TimestepNorm backward", 0, acts(3 * D) + 12.0 * R * G, [=] {
        timestep_norm_backward(s->dx, dw->final_norm_weight, dw->final_norm_bias, NULL, s->dxt, NULL, m->x[layers],
                               w->final_norm_weight, m->final_mean, m->final_rstd, NULL, d);
    });
}

static void list_step(void) {
    const double P = (double)m->num_params, states = 8.0 * N * D * B * ceil_div(L, CEMA_BLOCK);
    part("zero_grad", 0, 4 * P, [] { megalodon_zero_grad(m); });
    for (int l = 0; l < layers; l++) {
        const LayerParams *w = &m->params.layers[l];
        part("CEMA's coefficients", 0, 4.0 * (11.0 * N * D + D), [=] {
            cema_coeffs_forward(&m->coeffs[l], w->cema_alpha, w->cema_delta, w->cema_theta, w->cema_gamma, CEMA_COMPLEX,
                                D, N);
        });
    }
    part("embedding", 0, acts(2 * D),
         [] { embedding_forward(m->x[0], m->tokens, weight(m->params.embed), embedding_scale(&m->config), R, D); });
    for (int l = 0; l < layers; l++) list_forward(l, states);
    list_output();
    for (int l = layers - 1; l >= 0; l--) list_backward(l, states);
    part("embedding backward", 0, acts(D) + 8.0 * D * V,
         [] { embedding_backward(m->grads.embed, s->dx, m->tokens, embedding_scale(&m->config), R, D, V); });
    part("grad_norm", 0, 4 * P, [] { sink += megalodon_grad_norm(m); });
    part("AdamW", 0, P * (28 + (sizeof(floatX) < 4 ? sizeof(floatX) : 0)), run_update);
}

// ----------------------------------------------------------------------------
// times

// A copy goes before a part: meanwhile the host makes the calls, whose kernels then follow each other as in a step, and
// nothing is in the caches. The whole step waits for the host several times and gets none.
static void time_lines(void) {
    enum { WARM_UPS = 2 };
    cudaEvent_t from, to;
    cudaCheck(cudaEventCreate(&from));
    cudaCheck(cudaEventCreate(&to));
    for (int round = -WARM_UPS; round < repeats; round++) {
        for (Line &l : lines) {
            float ms;
            if (l.name != "step") run_copy();
            cudaCheck(cudaEventRecord(from));
            for (const Call &call : l.calls) call();
            cudaCheck(cudaEventRecord(to));
            cudaCheck(cudaEventSynchronize(to));
            cudaCheck(cudaEventElapsedTime(&ms, from, to));
            if (round >= 0) l.ms.push_back(ms);
        }
    }
    for (Line &l : lines) std::sort(l.ms.begin(), l.ms.end());
    cudaCheck(cudaEventDestroy(from));
    cudaCheck(cudaEventDestroy(to));
}

// ----------------------------------------------------------------------------
// decoding: a token of each text read, their logits on the host, over and over

// Milliseconds a token for `count` tokens from place `from` of a chunk on, whose keys and values are all there.
static std::vector<float> time_tokens(State *state, int64_t from, int count) {
    static std::vector<float> logits((size_t)B * V);
    std::vector<int64_t> counts(B, from);
    std::vector<float> ms;
    for (int round = -1; round < repeats; round++) {
        state_write(state, 0, B * sizeof(int64_t), counts.data());
        for (int i = 0; i < count; i++) {
            const auto start = std::chrono::steady_clock::now();
            megalodon_forward(m, state, &tokens[(size_t)i * B], B, 1);
            megalodon_logits(m, 0, B, logits.data());
            const std::chrono::duration<float, std::milli> time = std::chrono::steady_clock::now() - start;
            if (round >= 0) ms.push_back(time.count());
        }
    }
    std::sort(ms.begin(), ms.end());
    return ms;
}

// Floor: the layers' and the output's weights and the chunk's keys and values, read once at the rate of a copy.
static void bench_decode(void) {
    const int count = min_int(256, C / 4);
    State *state = state_new(&m->config, B, 0);
    if (state == NULL) stop(1, "out of GPU memory for the state: ", "a smaller --batch-size may help");
    for (int t = 0; t < C; t += seq_len) megalodon_forward(m, state, tokens.data(), B, min_int(seq_len, C - t));
    list_machine();
    time_lines();
    const double rate = lines[0].bytes / median(lines[0]);
    const double layer = D * (3.0 * E + Z + D + (2.0 + m->config.swiglu) * F);
    const double weights = sizeof(floatX) * (layers * layer + (double)D * V);
    printf("%s\na copy of %zu MiB: %.0f GB/s, read and write\n", megalodon_backend(), COPIED >> 20, rate / 1e9);
    printf("decoding, %s, %d texts, medians of %d rounds of %d tokens\n", preset, B, repeats, count);
    const struct {
        const char *what;
        int64_t from;
    } places[] = {{"a chunk's start", 0},
                  {"its middle", C / 2 - count / 2},
                  {"its end", C - count},
                  {"the end of chunk 1000", (int64_t)1000 * C - count}};
    for (const auto &place : places) {
        const std::vector<float> ms = time_tokens(state, place.from, count);
        const double token = ms[ms.size() / 2] / 1e3;
        const double cache = sizeof(float) * B * layers * (place.from % C + count / 2.0) * (Z + E);
        const double floor = (weights + cache) / rate;
        printf("    %-22s %.3f ms, %.0f tokens/s; floor %.3f ms (%.1f MB of weights, %.1f MB of keys and values)\n",
               place.what, token * 1e3, B / token, floor * 1e3, weights / 1e6, cache / 1e6);
    }
    state_free(state);
}

// ----------------------------------------------------------------------------
// reading a prompt: passes over a state, then the logits of the last token on the host

static void read_prompt(State *state, int length) {
    static std::vector<float> logits((size_t)B * V);
    for (int b = 0; b < B; b++) state_reset(state, b);
    for (int t = 0, n; t < length; t += n) {
        n = min_int(L, length - t);
        megalodon_forward(m, state, tokens.data(), B, n);
        if (t + n == length) megalodon_logits(m, (size_t)n - 1, 1, logits.data());
    }
}

static void bench_read(void) {
    std::vector<double> ms;
    State *state = state_new(&m->config, B, 0);
    if (state == NULL) stop(1, "out of GPU memory for the state: ", "a smaller --batch-size may help");
    read_prompt(state, min_int(prompt_len, 2 * L)); // warm-up
    for (int round = 0; round < repeats; round++) {
        const auto start = std::chrono::steady_clock::now();
        read_prompt(state, prompt_len);
        const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
        ms.push_back(time.count());
    }
    std::sort(ms.begin(), ms.end());
    const double median = ms[ms.size() / 2];
    printf("%s\nreading %d x %d tokens, %s, in passes of %d, median of %d: %.3f ms, %.0f tokens/s; peak memory %.0f "
           "MiB\n",
           megalodon_backend(), B, prompt_len, preset, L, repeats, median, 1e3 * B * prompt_len / median,
           (double)megalodon_peak_memory() / 1048576);
    state_free(state);
}

static void print_lines(double step, double product_rate, double copy_rate) {
    double sum = 0;
    printf("\n%-28s %9s %7s %15s %16s %13s\n", "part, all layers", "us", "share", "it must do", "so it does",
           "of measured");
    for (size_t i = 3; i < lines.size(); i++) {
        const Line &l = lines[i];
        const double time = median(l), work = l.operations + l.bytes;
        const bool product = l.operations > 0;
        sum += time;
        printf("%-28s %9.1f %6.1f%%", l.name.c_str(), time * 1e6, 100 * time / step);
        if (work > 0)
            printf(" %9.1f %-5s %8.1f %-7s %12.0f%%", work / (product ? 1e9 : 1e6), product ? "GFLOP" : "MB",
                   work / time / (product ? 1e12 : 1e9), product ? "TFLOP/s" : "GB/s",
                   100 * work / time / (product ? product_rate : copy_rate));
        printf("\n");
    }
    printf("%-28s %9.1f %6.1f%%  of the step's %.1f us\n", "all parts", sum * 1e6, 100 * sum / step, step * 1e6);
}

int main(int argc, char **argv) {
    const Config *c = NULL;
    const double GiB = 1 << 30;
    read_options(argc, argv);
    if (plain) setenv("MEGALODON_PLAIN", "1", 1);
    for (const Preset &p : megalodon_presets) c = strcmp(p.name, preset) == 0 ? &p.config : c;
    if (c == NULL) stop(2, "no preset has the name ", preset);
    layers = c->num_layers, B = batch_size, L = seq_len, R = B * L, D = c->model_dim, N = c->cema_ndim;
    Z = c->z_dim, E = c->value_dim, C = c->chunk_size, F = c->ffn_hidden_dim, G = c->norm_num_groups, V = c->vocab_size;
    eps = c->norm_eps, d = dims_of(c, B, L);
    const double available = (double)megalodon_available_memory(1);
    const Mode mode = decoding || prompt_len > 0 ? MEGALODON_INFER : MEGALODON_TRAIN;
    const MemoryPlan p = megalodon_memory(c, mode, B, L);
    m = megalodon_new(c, mode, B, L);
    if (m == NULL) stop(1, "out of GPU memory for the model: ", "a smaller --batch-size may help");
    s = &m->scratch;
    for (int i = 0; i < m->num_tensors; i++) {
        std::vector<float> values(m->tensors[i].size);
        megalodon_init(values.data(), &m->tensors[i], c, 1);
        megalodon_write(m, PARAMS, m->tensors[i].offset, m->tensors[i].size, values.data());
    }
    for (int i = 0; i < max_int(R, 256 * B); i++) {
        uint32_t words[4];
        megalodon_philox(words, 1, STREAM_DATA, 0, 0, (uint32_t)i);
        tokens.push_back((int32_t)(words[0] % V)), targets.push_back((int32_t)(words[1] % V));
    }
    if (decoding || prompt_len > 0) {
        decoding ? bench_decode() : bench_read();
        megalodon_free(m);
        return 0;
    }
    run_step(); // leaves the model's workspace in use
    const double taken = available - (double)megalodon_available_memory(1);
    list_machine();
    part("step", step_operations(), 0, run_step);
    if (!brief) list_step();
    time_lines();
    const double copy_rate = lines[0].bytes / median(lines[0]), product_rate = lines[1].operations / median(lines[1]);
    const double step = median(lines[2]), floor = step_operations() / product_rate;
    printf("%s; medians of %d rounds\n", megalodon_backend(), repeats);
    printf("a copy of %zu MiB: %.0f GB/s, read and write; a product of %d x %d: %.1f TFLOP/s\n\n", COPIED >> 20,
           copy_rate / 1e9, (int)SIDE, (int)SIDE, product_rate / 1e12);
    printf("a step of %d x %d tokens, %s: %.3f ms, %.0f tokens/s\n", B, L, preset, step * 1e3, R / step);
    printf("    floor: %.1f MFLOP of products a token at the rate above, %.3f ms: %.0f %% of the step's\n",
           step_operations() / R / 1e6, floor * 1e3, 100 * floor / step);
    printf("    memory: %.3f GiB planned, %.3f GiB taken from the GPU\n",
           (double)(p.params + p.grads + p.moments + p.activations + p.scratch) / GiB, taken / GiB);
    if (!brief) print_lines(step, product_rate, copy_rate);
    megalodon_free(m);
    for (floatX *memory : large) memory_free(memory, COPIED);
    return 0;
}
