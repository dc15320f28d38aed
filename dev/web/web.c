// The functions of the page in a browser, dev/web/index.html: a model in memory that reads bytes, draws the next one, and
// shows what it remembers. Compiled to WebAssembly by `make web`, with megalodon.c, without files, threads and signals.
// The text is that of ./sample for the same seed and options.
#include <math.h>   // defines: cos, exp, fabs, log, pow, sin, sqrt
#include <stdarg.h> // defines: va_list
#include <stdlib.h> // defines: calloc, free
#include <string.h> // defines: memcpy, strlen
#include "../../plumbing/plumbing.h"

#define EXPORT(name) __attribute__((export_name(#name)))

enum { PASS = 256 }; // tokens that are read at a time, at most

static struct {
    Config config;
    Model *model;
    State *state;
    Tensor *tensors;
    int count;        // of tensors
    size_t size;      // of all parameters
    real *params;     // filled by the page, then copied to the model
    real *logits;     // (V) after the last token
    real *attention;  // (C) probabilities of the last query
    real *scratch;    // one row of the widest activation
} web;
static char message[ST_ERR];

// What the linked files need from the rest of plumbing/. A fatal error stops the module; the page shows the message.
void fatal(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    __builtin_trap();
}
void usage_error(const char *format, ...) {
    (void)format;
    __builtin_trap();
}
void *allocate(size_t count, size_t size) {
    void *memory = calloc(count > 0 ? count : 1, size);
    if (memory == NULL) fatal("out of memory");
    return memory;
}
size_t host_memory(int processes, size_t reserved) { return processes > 0 ? SIZE_MAX / 2 - reserved : 0; }
int local_rank(void) { return 0; }
double seconds(void) { return 0; }

// ----------------------------------------------------------------------------
// loading

EXPORT(web_new) void *web_new(int bytes) { return allocate((size_t)bytes, 1); }
EXPORT(web_message) const char *web_message(void) { return message; }

// Takes a configuration as JSON. Returns the number of tensors that the page must fill, or 0: see web_message().
EXPORT(web_open) int web_open(const char *json) {
    message[0] = 0;
    web.config = config_defaults();
    if (!config_from_json(&web.config, json, message) || !config_check(&web.config, message)) return 0;
    const Config *c = &web.config;
    if (c->vocab_size != 256) {
        snprintf(message, sizeof message, "the vocabulary has %d tokens; this page needs one of 256 bytes", c->vocab_size);
        return 0;
    }
    web.tensors = megalodon_tensors(c, &web.count, &web.size);
    web.params = allocate(web.size, sizeof *web.params);
    web.logits = allocate((size_t)c->vocab_size, sizeof *web.logits);
    web.attention = allocate((size_t)c->chunk_size, sizeof *web.attention);
    web.scratch = allocate((size_t)PASS * (size_t)c->z_dim, sizeof *web.scratch);
    return web.count;
}
EXPORT(web_tensor_name) const char *web_tensor_name(int i) { return web.tensors[i].name; }
EXPORT(web_tensor_size) int web_tensor_size(int i) { return (int)web.tensors[i].size; }
EXPORT(web_tensor) real *web_tensor(int i) { return web.params + web.tensors[i].offset; }

// To be called when all tensors are filled. Returns 1, or 0: see web_message().
EXPORT(web_ready) int web_ready(void) {
    for (size_t i = 0; i < web.size; i++) {
        if (!isfinite(web.params[i])) {
            snprintf(message, sizeof message, "a number of the model is not finite");
            return 0;
        }
    }
    web.model = megalodon_new(&web.config, MEGALODON_TRAIN, 1, PASS); // all layers keep their activations
    web.state = state_new(&web.config, 1, 0);
    if (web.model == NULL || web.state == NULL) fatal("out of memory");
    megalodon_write(web.model, PARAMS, 0, web.size, web.params);
    free(web.params);
    return 1;
}

// ----------------------------------------------------------------------------
// reading and writing

EXPORT(web_reset) void web_reset(void) { state_reset(web.state, 0); }

EXPORT(web_read) void web_read(const unsigned char *bytes, int n) {
    static int32_t tokens[PASS];
    for (int done = 0; done < n;) {
        const int some = n - done < PASS ? n - done : PASS;
        for (int i = 0; i < some; i++) tokens[i] = bytes[done + i];
        megalodon_forward(web.model, web.state, tokens, 1, some);
        megalodon_logits(web.model, (size_t)some - 1, 1, web.logits);
        done += some;
    }
}

// Draws the next byte, and reads it.
EXPORT(web_next) int web_next(int seed, double temperature, double top_p) {
    const Sampling how = {.temperature = temperature, .top_p = top_p};
    const double random = sample_uniform((uint64_t)seed, web.state->count[0], 0);
    const unsigned char byte = (unsigned char)sample_token(web.logits, web.config.vocab_size, &how, random);
    web_read(&byte, 1);
    return byte;
}

// ----------------------------------------------------------------------------
// what the model remembers

EXPORT(web_logits) const real *web_logits(void) { return web.logits; } // (256)
EXPORT(web_layers) int web_layers(void) { return web.config.num_layers; }
EXPORT(web_dim) int web_dim(void) { return web.config.model_dim; }
EXPORT(web_modes) int web_modes(void) { return web.config.cema_ndim; }
EXPORT(web_groups) int web_groups(void) { return web.config.norm_num_groups; }
EXPORT(web_chunk) int web_chunk(void) { return web.config.chunk_size; }
EXPORT(web_count) double web_count(void) { return (double)web.state->count[0]; }

// TimestepNorm's mean and sum of squared deviations, (G) each. layer = num_layers: the final norm.
EXPORT(web_mean) const double *web_mean(int layer) { return web.state->mean + layer * web.config.norm_num_groups; }
EXPORT(web_m2) const double *web_m2(int layer) { return web.state->m2 + layer * web.config.norm_num_groups; }

// CEMA's state h of a layer, (2,N,D): real parts, then imaginary parts.
EXPORT(web_h) const real *web_h(int layer) { return web.state->h + (size_t)layer * web.state->modes; }

static const real *parameter(const char *name, int layer) {
    char whole[64];
    static real values[1 << 16];
    snprintf(whole, sizeof whole, "layers.%d.mega.cema.%s", layer, name);
    for (int i = 0; i < web.count; i++) {
        const Tensor *t = &web.tensors[i];
        if (strcmp(t->name, whole) != 0 || t->size > sizeof values / sizeof *values) continue;
        megalodon_read(web.model, PARAMS, t->offset, t->size, values);
        return values;
    }
    fatal("no tensor %s", whole);
}

// The time constant of each mode of a layer in tokens, (N,D), into out: |q|^t falls to 1/e after that many.
// |q| = 1 - sigmoid(alpha) sigmoid(delta).
EXPORT(web_time_constants) void web_time_constants(int layer, real *out) {
    const int N = web.config.cema_ndim, D = web.config.model_dim;
    const real *alpha = parameter("alpha", layer); // (D,N)
    for (int c = 0; c < D; c++) {
        for (int n = 0; n < N; n++) out[n * D + c] = 1 / (1 + (real)exp(-alpha[c * N + n]));
    }
    const real *delta = parameter("delta", layer);
    for (int c = 0; c < D; c++) {
        for (int n = 0; n < N; n++) {
            const double q = 1 - out[n * D + c] / (1 + exp(-delta[c * N + n]));
            out[n * D + c] = (real)(-1 / log(q));
        }
    }
}

// The last query's probabilities over the keys of its chunk, of the first head of a layer. Returns their number, which is
// 0 where a chunk has just ended: then the state has no keys. Valid after web_next().
EXPORT(web_attention) int web_attention(int layer) {
    const Config *c = &web.config;
    const int keys = (int)(web.state->count[0] % c->chunk_size), Z = c->z_dim, dz = Z / c->num_heads;
    const real *k = web.state->k + (size_t)layer * (size_t)c->chunk_size * (size_t)Z;
    double max = -INFINITY, sum = 0;
    real *q = web.scratch;
    if (keys == 0) return 0;
    megalodon_activation(web.model, layer, "mega.q", q);
    for (int j = 0; j < dz / 2; j++) { // the rotation of the last position
        const double angle = (keys - 1) * pow(c->rope_base, -2.0 * j / dz), re = q[2 * j], im = q[2 * j + 1];
        q[2 * j] = (real)(re * cos(angle) - im * sin(angle)), q[2 * j + 1] = (real)(re * sin(angle) + im * cos(angle));
    }
    for (int i = 0; i < keys; i++) {
        double score = 0;
        for (int j = 0; j < dz; j++) score += q[j] * k[(size_t)i * (size_t)Z + (size_t)j];
        web.attention[i] = (real)score;
        if (score > max) max = score;
    }
    for (int i = 0; i < keys; i++) sum += web.attention[i] = (real)exp(web.attention[i] - max);
    for (int i = 0; i < keys; i++) web.attention[i] = (real)(web.attention[i] / sum);
    return keys;
}
EXPORT(web_probabilities) const real *web_probabilities(void) { return web.attention; }
