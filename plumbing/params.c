// The parameter table put to use: tensors with sizes and places, pointers, initial values. Host code, the
// same for every backend.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "../megalodon.h"

// ----------------------------------------------------------------------------
// presets: fields that are not named are 0

#define COMMON .cema_ndim = 16, .chunk_size = 2048, .vocab_size = 32000, .norm_affine = 1, .norm_eps = 1e-5
const Preset megalodon_presets[NUM_PRESETS] = {
    {.name = "mega200M",
     .config = {.num_layers = 12, .model_dim = 1024, .z_dim = 256, .value_dim = 2048, .num_heads = 1,
                .ffn_hidden_dim = 2560, .norm_num_groups = 32, .rope_base = 1e4, COMMON},
     .num_parameters = 220627968},
    {.name = "mega1.3B",
     .config = {.num_layers = 24, .model_dim = 2048, .z_dim = 512, .value_dim = 4096, .num_heads = 2,
                .ffn_hidden_dim = 4864, .norm_num_groups = 64, .rope_base = 1e4, COMMON},
     .num_parameters = 1342832640},
    {.name = "mega1.3B_pg19",
     .config = {.num_layers = 24, .model_dim = 2048, .z_dim = 512, .value_dim = 4096, .num_heads = 2,
                .ffn_hidden_dim = 3584, .norm_num_groups = 64, .rope_base = 1e4, .swiglu = 1, .scale_emb = 1,
                .share_emb = 1, COMMON},
     .num_parameters = 1327628288},
    {.name = "mega7.1B",
     .config = {.num_layers = 32, .model_dim = 4096, .z_dim = 1024, .value_dim = 8192, .num_heads = 4,
                .ffn_hidden_dim = 11264, .norm_num_groups = 64, .rope_base = 1e4, COMMON},
     .num_parameters = 7117381632},
    {.name = "mega7.3B",
     .config = {.num_layers = 32, .model_dim = 4096, .z_dim = 1024, .value_dim = 8192, .num_heads = 4,
                .ffn_hidden_dim = 8192, .norm_num_groups = 64, .rope_base = 1e4, .swiglu = 1, COMMON},
     .num_parameters = 7385817088},
    {.name = "paper7B",
     .config = {.num_layers = 32, .model_dim = 4096, .z_dim = 1024, .value_dim = 8192, .num_heads = 4,
                .ffn_hidden_dim = 8192, .norm_num_groups = 64, .rope_base = 1e5, .swiglu = 1, .cema_ndim = 16,
                .chunk_size = 4096, .vocab_size = 32000, .norm_affine = 1, .norm_eps = 1e-5},
     .num_parameters = 7385817088},
    {.name = "enwik8",
     .config = {.num_layers = 6, .model_dim = 384, .z_dim = 192, .value_dim = 384, .num_heads = 3,
                .ffn_hidden_dim = 1024, .cema_ndim = 8, .chunk_size = 256, .vocab_size = 256, .norm_num_groups = 32,
                .swiglu = 1, .norm_affine = 1, .norm_eps = 1e-5, .rope_base = 1e4},
     .num_parameters = 11359104},
    {.name = "demo",
     .config = {.num_layers = 4, .model_dim = 128, .z_dim = 64, .value_dim = 256, .num_heads = 1,
                .ffn_hidden_dim = 256, .cema_ndim = 8, .chunk_size = 64, .vocab_size = 256, .norm_num_groups = 16,
                .swiglu = 1, .norm_affine = 1, .norm_eps = 1e-5, .rope_base = 1e4},
     .num_parameters = 974336},
};
#undef COMMON


#include "../megalodon.h"

static int dimension(const Config *c, char letter) {
    switch (letter) {
    case 'V':
        return c->vocab_size;
    case 'D':
        return c->model_dim;
    case 'N':
        return c->cema_ndim;
    case 'Z':
        return c->z_dim;
    case 'E':
        return c->value_dim;
    case 'F':
        return c->ffn_hidden_dim;
    default:
        return letter - '0';
    }
}

static int exists(const Config *c, Condition condition) {
    switch (condition) {
    case IF_SWIGLU:
        return c->swiglu;
    case IF_RESCALE:
        return c->rescale_nffn;
    case IF_AFFINE:
        return c->norm_affine;
    case IF_UNTIED:
        return !c->share_emb;
    default:
        return 1;
    }
}

static void add_tensor(Tensor *list, int *count, size_t *size, const Config *c, const ParamRow *row, int layer) {
    if (!exists(c, row->condition)) return;
    Tensor t = {.row = row, .layer = layer, .offset = *size, .size = 1};
    if (row->per_layer) {
        snprintf(t.name, sizeof t.name, "layers.%d.%s", layer, row->name);
    } else {
        snprintf(t.name, sizeof t.name, "%s", row->name);
    }
    for (const char *s = row->shape; *s; s++) {
        t.shape[t.ndim++] = dimension(c, *s);
        t.size *= (size_t)dimension(c, *s);
    }
    list[(*count)++] = t;
    *size += t.size;
}

Tensor *megalodon_tensors(const Config *config, int *count, size_t *size) {
    Tensor *list = malloc(((size_t)config->num_layers + 1) * NUM_PARAM_ROWS * sizeof *list);
    if (!list) return NULL;
    int n = 0;
    size_t total = 0;
    // model rows, and where the table comes to the rows of a layer, those once per layer
    for (int i = 0; i < NUM_PARAM_ROWS;) {
        int end = i;
        while (end < NUM_PARAM_ROWS && megalodon_params[end].per_layer) end++;
        if (end == i) {
            add_tensor(list, &n, &total, config, &megalodon_params[i++], -1);
            continue;
        }
        for (int layer = 0; layer < config->num_layers; layer++) {
            for (int r = i; r < end; r++) add_tensor(list, &n, &total, config, &megalodon_params[r], layer);
        }
        i = end;
    }
    if (count) *count = n;
    if (size) *size = total;
    return list;
}

// Part `part` of `parts` of the elements from first to end.
static Shard cut(size_t first, size_t end, int part, int parts) {
    const size_t size = end - first, each = ((size + (size_t)parts - 1) / (size_t)parts + 3) / 4 * 4;
    const size_t at = each * (size_t)part < size ? each * (size_t)part : size;
    return (Shard){first + at, size - at < each ? size - at : each};
}

Shard *megalodon_shards(const Config *config, int part, int parts, int *count) {
    int tensors;
    size_t size, end;
    Tensor *list = megalodon_tensors(config, &tensors, &size);
    Shard *ranges = malloc(((size_t)config->num_layers + 2) * sizeof *ranges);
    if (list == NULL || ranges == NULL) {
        free(list), free(ranges);
        return NULL;
    }
    *count = 0;
    for (int i = 0, next; i < tensors; i = next) {
        for (next = i + 1; next < tensors && (parts == 1 || list[next].layer == list[i].layer);) next++;
        end = next < tensors ? (list[next].offset + 3) / 4 * 4 : size;
        const size_t first = (list[i].offset + 3) / 4 * 4;
        ranges[(*count)++] = cut(first < size ? first : size, end < size ? end : size, part, parts);
    }
    free(list);
    return ranges;
}

void megalodon_point(Params *params, real *memory, const Config *config, const Tensor *tensors, int count) {
    memset(params->layers, 0, (size_t)config->num_layers * sizeof *params->layers);
    for (int i = 0; i < count; i++) {
        const Tensor *t = &tensors[i];
        char *base = t->layer < 0 ? (char *)params : (char *)&params->layers[t->layer];
        *(real **)(void *)(base + t->row->field) = memory + t->offset;
    }
    if (config->share_emb) params->output = params->embed;
}

// ----------------------------------------------------------------------------
// operations of matrix products

ForwardOperations megalodon_forward_operations(const Config *c, int64_t L) {
    const double D = c->model_dim, Z = c->z_dim, E = c->value_dim, F = c->ffn_hidden_dim, C = c->chunk_size;
    const int64_t chunks = L / c->chunk_size; // whole ones
    const double whole = (double)chunks, rest = (double)(L % c->chunk_size);
    const double pairs = whole * C * (C + 1) / 2 + rest * (rest + 1) / 2; // of a query and a key that it attends to
    const double tokens = (double)L, layers = c->num_layers;
    return (ForwardOperations){.projections = 2 * layers * tokens * D * (3 * E + Z + D),
                               .attention = 2 * layers * pairs * (Z + E),
                               .ffn = 2 * layers * tokens * D * F * (c->swiglu ? 3 : 2),
                               .output = 2 * tokens * D * c->vocab_size};
}

double megalodon_step_operations(const Config *config, int64_t L) {
    const ForwardOperations f = megalodon_forward_operations(config, L);
    return 3 * (f.projections + f.attention + f.ffn + f.output);
}

// ----------------------------------------------------------------------------
// initial values

enum { PARALLEL_MIN = 4096 }; // draws up to which one thread makes them

static double uniform(uint64_t seed, const Tensor *t, size_t element) { // in (0,1)
    uint32_t r[4];
    megalodon_philox(r, seed, STREAM_INIT + (uint32_t)(t->row - megalodon_params), 0, (uint32_t)(t->layer + 1),
                     (uint32_t)element);
    return (r[0] + 0.5) / 4294967296.0;
}

// One draw of N(0,1) by Box-Muller, redrawn (the counter's step) until it lies within the limit.
static double normal(uint64_t seed, const Tensor *t, size_t element, double limit) {
    uint32_t stream = STREAM_INIT + (uint32_t)(t->row - megalodon_params), r[4];
    for (uint32_t attempt = 0;; attempt++) {
        megalodon_philox(r, seed, stream, attempt, (uint32_t)(t->layer + 1), (uint32_t)element);
        double u = (r[0] + 0.5) / 4294967296.0, v = (r[1] + 0.5) / 4294967296.0;
        double z = sqrt(-2 * log(u)) * cos(2 * 3.14159265358979323846 * v);
        if (fabs(z) <= limit) return z;
    }
}

static void init_linear(real *values, const Tensor *t, InitMode mode, uint64_t seed) {
    const double deviation = mode == HE ? 1 / sqrt(3.0 * t->shape[1]) : mode == BERT ? 0.02 : 1;
    const double bound = sqrt(6.0 / (t->shape[0] + t->shape[1])); // of XAVIER
#pragma omp parallel for schedule(static) if (t->size > PARALLEL_MIN)
    for (size_t i = 0; i < t->size; i++) {
        values[i] = (real)(mode == XAVIER ? bound * (2 * uniform(seed, t, i) - 1)
                                          : deviation * normal(seed, t, i, mode == GAUSSIAN ? 3 : INFINITY));
    }
}

void megalodon_init(real *values, const Tensor *t, const Config *config, uint64_t seed) {
    size_t n = t->size, D = (size_t)config->model_dim;
    switch (t->row->init) {
    case INIT_ZERO:
        memset(values, 0, n * sizeof *values);
        break;
    case INIT_LINEAR:
        init_linear(values, t, config->init_mode, seed);
        break;
    case INIT_EMBED:
#pragma omp parallel for schedule(static) if (n > PARALLEL_MIN)
        for (size_t i = 0; i < n; i++) values[i] = (real)(normal(seed, t, i, 3) / sqrt((double)D));
        break;
    case INIT_CEMA_LOGIT:
        for (size_t i = 0; i < n; i++) values[i] = (real)(0.2 * normal(seed, t, i, INFINITY));
        break;
    case INIT_CEMA_THETA:
        for (size_t i = 0; i < n; i++) {
            double f = pow((double)D, -(double)(i + 1) / (double)D);
            values[i] = (real)log(f / (1 - f));
        }
        for (size_t i = n - 1; i > 0; i--) { // Fisher-Yates
            uint32_t r[4], stream = STREAM_INIT + (uint32_t)(t->row - megalodon_params);
            megalodon_philox(r, seed, stream, 0, (uint32_t)(t->layer + 1), (uint32_t)i);
            size_t j = (size_t)(((uint64_t)r[0] * (i + 1)) >> 32);
            real swap = values[i];
            values[i] = values[j], values[j] = swap;
        }
        break;
    case INIT_CEMA_GAMMA:
        for (size_t i = 0; i < n; i++) values[i] = i % 2 ? 0 : (real)normal(seed, t, i, INFINITY);
        break;
    case INIT_CEMA_OMEGA:
        for (size_t i = 0; i < n; i++) values[i] = (real)(0.25 * normal(seed, t, i, 4));
        break;
    case INIT_NFFN_ALPHA:
        for (size_t i = 0; i < n; i++) values[i] = (real)(0.1 * pow(0.5, t->layer));
        break;
    }
}
