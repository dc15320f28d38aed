// Configurations: presets, JSON, validity, flags.
#include <math.h>   // defines: isfinite
#include <stddef.h> // defines: offsetof
#include <stdlib.h> // defines: free
#include <string.h> // defines: memcmp, memcpy, strcmp
#include "json.h"
#include "plumbing.h"

typedef enum { INTEGER, BOOLEAN, NUMBER, PROBABILITY, CHOICE, VARIANT } FieldKind;
typedef struct {
    const char *name;
    FieldKind kind;
    size_t offset;
    const char *choices; // of a CHOICE or VARIANT, see choice_index(). The first choice of a VARIANT is not written,
                         // since the released code does not know the field
} Field;

static const Field fields[] = {
    {"num_layers", INTEGER, offsetof(Config, num_layers), NULL},
    {"model_dim", INTEGER, offsetof(Config, model_dim), NULL},
    {"z_dim", INTEGER, offsetof(Config, z_dim), NULL},
    {"value_dim", INTEGER, offsetof(Config, value_dim), NULL},
    {"num_heads", INTEGER, offsetof(Config, num_heads), NULL},
    {"ffn_hidden_dim", INTEGER, offsetof(Config, ffn_hidden_dim), NULL},
    {"cema_ndim", INTEGER, offsetof(Config, cema_ndim), NULL},
    {"chunk_size", INTEGER, offsetof(Config, chunk_size), NULL},
    {"vocab_size", INTEGER, offsetof(Config, vocab_size), NULL},
    {"norm_num_groups", INTEGER, offsetof(Config, norm_num_groups), NULL},
    {"swiglu", BOOLEAN, offsetof(Config, swiglu), NULL},
    {"rescale_nffn", BOOLEAN, offsetof(Config, rescale_nffn), NULL},
    {"scale_emb", BOOLEAN, offsetof(Config, scale_emb), NULL},
    {"share_emb", BOOLEAN, offsetof(Config, share_emb), NULL},
    {"norm_affine", BOOLEAN, offsetof(Config, norm_affine), NULL},
    {"norm_eps", NUMBER, offsetof(Config, norm_eps), NULL},
    {"rope_base", NUMBER, offsetof(Config, rope_base), NULL},
    {"dropout", PROBABILITY, offsetof(Config, dropout), NULL},
    {"hidden_dropout", PROBABILITY, offsetof(Config, hidden_dropout), NULL},
    {"attention_dropout", PROBABILITY, offsetof(Config, attention_dropout), NULL},
    {"init_mode", CHOICE, offsetof(Config, init_mode), INIT_MODES},
    {"cema", VARIANT, offsetof(Config, cema), CEMA_KINDS},
    {"timestep_norm", VARIANT, offsetof(Config, timestep_norm), NORM_KINDS},
    {"attention", VARIANT, offsetof(Config, attention), ATTENTION_KINDS},
    {"two_hop", VARIANT, offsetof(Config, two_hop), TWO_HOP_KINDS},
};
enum { NUM_FIELDS = sizeof fields / sizeof fields[0] };

static size_t field_size(const Field *f) {
    return f->kind == NUMBER || f->kind == PROBABILITY ? sizeof(double) : sizeof(int);
}

const Config *find_preset(const char *name) {
    char list[256] = "";
    for (int i = 0; i < NUM_PRESETS; i++) {
        if (strcmp(megalodon_presets[i].name, name) == 0) return &megalodon_presets[i].config;
        size_t n = strlen(list);
        snprintf(list + n, sizeof list - n, " %s", megalodon_presets[i].name);
    }
    usage_error("--preset %s: no such preset; there are%s", name, list);
}

Config config_defaults(void) {
    // clang-format off
    return (Config){.num_layers = 8, .model_dim = 1024, .z_dim = 256, .value_dim = 2048, .num_heads = 1,
                    .ffn_hidden_dim = 2048, .cema_ndim = 16, .chunk_size = 2048, .norm_num_groups = 32,
                    .norm_affine = 1, .norm_eps = 1e-5, .rope_base = 1e4};
    // clang-format on
}

// ----------------------------------------------------------------------------
// JSON

static void read_field(Json *j, Config *c, const Field *f) {
    char *at = (char *)c + f->offset;
    int64_t whole;
    bool boolean;
    char name[32];
    if (f->choices != NULL) {
        if (!json_string(j, name, sizeof name)) return;
        const int index = choice_index(f->choices, name);
        if (index < 0) json_fail(j, "%s \"%s\" is none of: %s", f->name, name, f->choices);
        if (index >= 0) *(int *)(void *)at = index;
    } else if (f->kind == NUMBER || f->kind == PROBABILITY) {
        const bool null = strcmp(f->name, "rope_base") == 0 && json_null_follows(j);
        if (null) *(double *)(void *)at = 1e4;
        if (!null) json_number(j, (double *)(void *)at);
    } else if (f->kind == BOOLEAN) {
        if (json_bool(j, &boolean)) *(int *)(void *)at = boolean;
    } else if (json_int(j, &whole)) {
        *(int *)(void *)at = (int)whole;
        if (whole != (int)whole) json_fail(j, "%s %lld is out of range", f->name, (long long)whole);
    }
}

// Reads a field of the released configuration that Config lacks. It is accepted if it does not change the model.
static void read_foreign(Json *j, const char *key, int64_t *output_size) {
    if (strcmp(key, "efficient_attn") == 0 || strcmp(key, "layerwise_ckpt") == 0) {
        json_skip(j);
    } else if (strcmp(key, "output_size") == 0) {
        json_int(j, output_size);
    } else {
        json_fail(j, "unknown field '%s'", key);
    }
}

bool config_from_json(Config *c, const char *text, char *err) {
    Json j;
    char key[64];
    int64_t output_size = -1;
    bool seen[NUM_FIELDS] = {false};
    json_begin(&j, text, strlen(text));
    json_object(&j);
    while (json_object_next(&j, key, sizeof key)) {
        int i = 0;
        while (i < NUM_FIELDS && strcmp(key, fields[i].name) != 0) i++;
        if (i == NUM_FIELDS) {
            read_foreign(&j, key, &output_size);
            continue;
        }
        if (seen[i]) json_fail(&j, "field '%s' twice", key);
        seen[i] = true;
        read_field(&j, c, &fields[i]);
    }
    json_end(&j);
    if (output_size != -1 && output_size != c->vocab_size)
        json_fail(&j, "output_size %lld is not supported, only -1 or vocab_size", (long long)output_size);
    if (j.error[0] != 0) snprintf(err, ST_ERR, "%s", j.error);
    return j.error[0] == 0;
}

void config_from_file(Config *c, const char *path) {
    char err[ST_ERR], *text = read_text(path, err);
    if (text == NULL) fatal("--config %s", err);
    if (!config_from_json(c, text, err)) fatal("--config %s: %s", path, err);
    free(text);
}

char *config_to_json(const Config *c) {
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL) fatal("out of memory");
    fputs("{", out);
    for (const Field *f = fields; f < fields + NUM_FIELDS; f++) {
        const void *at = (const char *)c + f->offset;
        if (f->kind == VARIANT && *(const int *)at == 0) continue;
        fprintf(out, "\"%s\": ", f->name);
        if (f->kind == NUMBER || f->kind == PROBABILITY)
            write_number(out, *(const double *)at);
        else if (f->choices != NULL)
            fputc('"', out), write_choice(out, f->choices, *(const int *)at), fputc('"', out);
        else if (f->kind == BOOLEAN)
            fputs(*(const int *)at ? "true" : "false", out);
        else
            fprintf(out, "%d", *(const int *)at);
        fputs(", ", out);
    }
    fputs("\"output_size\": -1}", out);
    fclose(out);
    return text;
}

void config_write_replaced(FILE *out, const Config *c) {
    for (const Field *f = fields; f < fields + NUM_FIELDS; f++) {
        const int choice = f->kind == VARIANT ? *(const int *)(const void *)((const char *)c + f->offset) : 0;
        if (choice == 0) continue;
        fprintf(out, ", %s ", f->name);
        write_choice(out, f->choices, choice);
    }
}

// ----------------------------------------------------------------------------
// validity and flags

bool config_equal(const Config *a, const Config *b) {
    for (const Field *f = fields; f < fields + NUM_FIELDS; f++) {
        if (memcmp((const char *)a + f->offset, (const char *)b + f->offset, field_size(f)) != 0) return false;
    }
    return true;
}

bool config_check(const Config *c, char *err) {
    for (const Field *f = fields; f < fields + NUM_FIELDS; f++) {
        const void *at = (const char *)c + f->offset;
        if (f->kind == NUMBER && !(isfinite(*(const double *)at) && *(const double *)at > 0))
            return snprintf(err, ST_ERR, "%s %g is not positive", f->name, *(const double *)at), false;
        if (f->kind == PROBABILITY && !(*(const double *)at >= 0 && *(const double *)at < 1))
            return snprintf(err, ST_ERR, "%s %g is not in 0 <= p < 1", f->name, *(const double *)at), false;
        int max = strcmp(f->name, "num_layers") == 0  ? MAX_LAYERS
                  : strcmp(f->name, "cema_ndim") == 0 ? MAX_NDIM
                                                      : MAX_DIM;
        int value = f->kind == INTEGER ? *(const int *)at : 0;
        if (f->kind == INTEGER && (value < 1 || value > max))
            return snprintf(err, ST_ERR, "%s %d is not in 1..%d", f->name, value, max), false;
    }
    if (c->z_dim % c->num_heads != 0 || c->value_dim % c->num_heads != 0)
        snprintf(err, ST_ERR, "num_heads %d does not divide z_dim %d and value_dim %d", c->num_heads, c->z_dim,
                 c->value_dim);
    else if (c->z_dim / c->num_heads % 2 != 0)
        snprintf(err, ST_ERR, "z_dim / num_heads = %d / %d is odd: rotary embedding needs pairs of channels", c->z_dim,
                 c->num_heads);
    else if (c->model_dim % c->norm_num_groups != 0)
        snprintf(err, ST_ERR, "norm_num_groups %d does not divide model_dim %d", c->norm_num_groups, c->model_dim);
    else if (c->norm_num_groups == c->model_dim)
        snprintf(err, ST_ERR, "norm_num_groups %d: a group needs at least 2 of the %d channels", c->norm_num_groups,
                 c->model_dim);
    else
        return true;
    return false;
}

void config_apply(Config *c, const Config *flags, const Option *options, const char *owner) {
    for (const Field *f = fields; f < fields + NUM_FIELDS; f++) {
        const char *flag = (const char *)flags + f->offset;
        char *at = (char *)c + f->offset;
        const size_t size = field_size(f);
        const Option *o = option_given(options, flag);
        if (o == NULL) continue;
        if (owner != NULL && memcmp(at, flag, size) != 0)
            usage_error("--%s contradicts the configuration in %s; leave it out", o->name, owner);
        memcpy(at, flag, size);
    }
}
