// One sequence in pieces, each with a model in a thread of its own, against the whole: what it gives, gradients, states,
// dropout; and an update of which each of two models does its part. Built for doubles and for floats.
#include <pthread.h> // defines: pthread_cond_wait, pthread_create
#include "check.h"

#ifdef MEGALODON_DOUBLE
static const double ROUNDING = 1e-11;
#else
static const double ROUNDING = 1e-5;
#endif

// layers D Z E H F N C | V G | swiglu rescale_nffn scale_emb share_emb norm_affine | norm_eps rope_base | dropouts
static const Config config = {2, 19, 6, 9, 3, 7, 3, 8, 11, 1, 1, 1, 0, 1, 1, 1e-3, 1e4, 0.1, 0.2, 0.3, HE};
enum { B = 2, MAX_PIECES = 4, MAX_L = 240, STEPS = 2 };

static size_t size; // of all parameters
static int32_t tokens[STEPS][B * MAX_L], targets[STEPS][B * MAX_L];

// A run of two steps, the second going on where the first ended.
typedef struct {
    ChunkParallel cp;
    Mode mode;
    int start, L, whole; // of this piece
    double loss;
    real *logits, *grads; // (B,L,V), all parameters
    State *state;
} Run;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t all_arrived = PTHREAD_COND_INITIALIZER;
static int arrived, rounds;
static const void *given[MAX_PIECES];

// Returns once all `threads` have called it. POSIX's own barriers are missing on macOS.
static void barrier(int threads) {
    pthread_mutex_lock(&mutex);
    const int round = rounds;
    if (++arrived == threads) {
        arrived = 0, rounds++;
        pthread_cond_broadcast(&all_arrived);
    }
    while (round == rounds) pthread_cond_wait(&all_arrived, &mutex);
    pthread_mutex_unlock(&mutex);
}

static void gather(void *context, const void *mine, void *all, size_t bytes) {
    const Run *run = context;
    given[run->cp.cp_rank] = mine;
    barrier(run->cp.cp_size);
    for (int p = 0; p < run->cp.cp_size; p++) memcpy((char *)all + (size_t)p * bytes, given[p], bytes);
    barrier(run->cp.cp_size);
}

static void *go(void *context) {
    Run *r = context;
    int32_t in[B * MAX_L], out[B * MAX_L];
    int64_t counted;
    megalodon_threads(1);
    Model *m = megalodon_new(&config, r->mode, B, r->L);
    real *params = malloc(size * sizeof *params);
    for (size_t i = 0; i < size; i++) params[i] = (real)(0.5 * random_real(1, i));
    megalodon_write(m, PARAMS, 0, size, params);
    r->logits = malloc((size_t)B * r->L * config.vocab_size * sizeof(real)), r->grads = malloc(size * sizeof(real));
    r->state = state_new(&config, B, 1);
    int ok = megalodon_chunk_parallel(m, &r->cp);
    for (int step = 0; step < STEPS && ok; step++) {
        const DropoutKey draw = {.seed = 3, .step = step, .row = 5};
        for (int b = 0; b < B; b++) {
            memcpy(in + b * r->L, tokens[step] + b * r->whole + r->start, (size_t)r->L * sizeof *in);
            memcpy(out + b * r->L, targets[step] + b * r->whole + r->start, (size_t)r->L * sizeof *out);
        }
        megalodon_dropout(m, &draw);
        megalodon_forward(m, r->state, in, B, r->L);
        r->loss += megalodon_loss(m, out, 0.3, &counted, NULL);
        megalodon_backward(m);
    }
    megalodon_logits(m, 0, (size_t)B * r->L, r->logits);
    megalodon_read(m, GRADS, 0, size, r->grads);
    megalodon_free(m), free(params);
    return NULL;
}

static void run_free(Run *r) { free(r->logits), free(r->grads), state_free(r->state); }

static void test_pieces(int pieces, const int64_t *lengths, Mode mode) {
    Run whole = {.mode = mode, .cp = {.cp_size = 1}}, runs[MAX_PIECES];
    pthread_t threads[MAX_PIECES];
    char name[64];
    for (int p = 0; p < pieces; p++) whole.L += (int)lengths[p];
    whole.whole = whole.L;
    go(&whole);
    for (int p = 0, start = 0; p < pieces; start += (int)lengths[p++]) {
        runs[p] = (Run){.mode = mode, .start = start, .L = (int)lengths[p], .whole = whole.L};
        runs[p].cp = (ChunkParallel){p, pieces, lengths, gather, &runs[p]};
        pthread_create(&threads[p], NULL, go, &runs[p]);
    }
    for (int p = 0; p < pieces; p++) pthread_join(threads[p], NULL);

    size_t V = (size_t)config.vocab_size, norms = (size_t)(config.num_layers + 1) * B * config.norm_num_groups;
    size_t h = (size_t)config.num_layers * B * 2 * config.cema_ndim * config.model_dim;
    real *logits = malloc((size_t)B * whole.L * V * sizeof *logits), *grads = calloc(size, sizeof *grads);
    double loss = 0;
    for (int p = 0; p < pieces; p++) {
        for (int b = 0; b < B; b++)
            memcpy(logits + ((size_t)b * whole.L + runs[p].start) * V, runs[p].logits + (size_t)b * runs[p].L * V,
                   (size_t)runs[p].L * V * sizeof *logits);
        for (size_t i = 0; i < size; i++) grads[i] += runs[p].grads[i];
        loss += runs[p].loss;
    }
    snprintf(name, sizeof name, "%d pieces of %d tokens%s: loss", pieces, whole.L,
             mode == MEGALODON_RECOMPUTE ? ", recomputing" : "");
    check(name, &loss, &whole.loss, 1, ROUNDING);
    check_real("  logits", logits, whole.logits, (size_t)B * whole.L * V, ROUNDING);
    int count;
    Tensor *tensors = megalodon_tensors(&config, &count, NULL);
    for (Tensor *t = tensors; t < tensors + count; t++) {
        snprintf(name, sizeof name, "  gradient of %s", t->name);
        check_real(name, grads + t->offset, whole.grads + t->offset, t->size, ROUNDING);
    }
    for (int p = 0; p < pieces; p += pieces - 1) { // the first one and the last have the whole sequence's
        check_same("  state: count", runs[p].state->count, whole.state->count, B * sizeof(int64_t));
        check("  state: mean", runs[p].state->mean, whole.state->mean, norms, ROUNDING);
        check("  state: m2", runs[p].state->m2, whole.state->m2, norms, ROUNDING);
        check_real("  state: h", runs[p].state->h, whole.state->h, h, ROUNDING);
    }
    for (int p = 0; p < pieces; p++) run_free(&runs[p]);
    run_free(&whole), free(logits), free(grads), free(tensors);
}

// Two steps of AdamW by one model, and by two which each do their part and do not know the other's.
static void test_shards(void) {
    const AdamW adamw = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
    real *values = malloc(2 * size * sizeof *values), *wanted[3], norm[3];
    const Buffer blocks[3] = {PARAMS, MOMENT1, MOMENT2};
    static const char *const names[3] = {"  parameters", "  moment1", "  moment2"};
    random_fill(values, 2 * size, 6, 1, 0);
    for (int part = -1; part < 2; part++) {
        int first_is_whole = part < 0;
        megalodon_set_shard(first_is_whole ? 0 : part, first_is_whole ? 1 : 2);
        int ranges;
        Shard *own = megalodon_shards(&config, first_is_whole ? 0 : part, first_is_whole ? 1 : 2, &ranges);
        Model *m = megalodon_new(&config, MEGALODON_TRAIN, 1, 8);
        megalodon_write(m, PARAMS, 0, size, values);
        for (int i = 1; i < 3; i++) { // moments of all are offered, its own taken
            for (size_t k = 0; k < size; k++) values[size + k] = (real)fabs(values[size + k]);
            megalodon_write(m, blocks[i], 0, size, values + size);
        }
        for (int update = 0; update < 2; update++) {
            megalodon_write(m, GRADS, 0, size, values + size * (size_t)update);
            megalodon_update(m, &adamw, 0.01, 0.5, update);
        }
        norm[part + 1] = (real)megalodon_grad_norm(m);
        for (int i = 0; i < 3; i++) {
            if (first_is_whole) wanted[i] = malloc(size * sizeof(real));
            for (int s = 0; s < ranges; s++) {
                real *got = first_is_whole ? wanted[i] : malloc((own[s].count + 1) * sizeof *got);
                megalodon_read(m, blocks[i], own[s].first, own[s].count, got);
                if (first_is_whole) continue;
                check_same(names[i], got, wanted[i] + own[s].first, own[s].count * sizeof *got);
                free(got);
            }
        }
        megalodon_free(m), free(own);
    }
    norm[1] = (real)sqrt(norm[1] * norm[1] + norm[2] * norm[2]);
    check_real("  norm", &norm[1], &norm[0], 1, 1e-6);
    megalodon_set_shard(0, 1);
    MemoryPlan one = megalodon_memory(&config, MEGALODON_TRAIN, B, 8);
    megalodon_set_shard(1, 4);
    MemoryPlan quarter = megalodon_memory(&config, MEGALODON_TRAIN, B, 8);
    megalodon_set_shard(0, 1);
    check_true("  moments of a quarter",
               quarter.moments < one.moments / 4 + 2 * (4 * 4 * sizeof(real) + 256) && quarter.params == one.params);
    for (int i = 0; i < 3; i++) free(wanted[i]);
    free(values);
}

static void test_ranges(void) {
    for (int parts = 2; parts < 6; parts++) {
        int segments[5], fours = 1, even = 1;
        size_t end = 0;
        Shard *ranges[5];
        for (int p = 0; p < parts; p++) ranges[p] = megalodon_shards(&config, p, parts, &segments[p]);
        check_true("the embedding, layers and the rest are segments", segments[0] == config.num_layers + 2);
        for (int s = 0; s < segments[0]; s++) {
            for (int p = 0; p < parts; p++) {
                const Shard r = ranges[p][s];
                fours &= r.first == end && (r.first % 4 == 0 || r.count == 0);
                even &= r.count <= ranges[0][s].count && ranges[0][s].count < r.count + 4 * (size_t)parts;
                end = r.first + r.count;
            }
        }
        check_true("  ranges follow each other and begin at fours", fours && end == size);
        check_true("  a segment's are nearly as long", even);
        for (int p = 0; p < parts; p++) free(ranges[p]);
    }
    int count;
    Shard *whole = megalodon_shards(&config, 0, 1, &count);
    check_true("one process has all of the block", count == 1 && whole->first == 0 && whole->count == size);
    free(whole);
}

// Segments whose gradients are complete, as a backward pass tells; what they were then is what they are at the end.
static int told[8], tellings;
static real *then;

static void ready(Model *m, int segment) {
    int count, parts = 2; // to have segments
    told[tellings++] = segment;
    for (int p = 0; p < parts; p++) {
        Shard *ranges = megalodon_shards(&config, p, parts, &count), r = ranges[segment];
        megalodon_read(m, GRADS, r.first, r.count, then + r.first);
        free(ranges);
    }
}

static void test_ready(void) {
    real *values = malloc(size * sizeof *values), *grads = malloc(size * sizeof *grads);
    int64_t counted;
    random_fill(values, size, 8, 1, 0);
    then = calloc(size, sizeof *then);
    Model *m = megalodon_new(&config, MEGALODON_TRAIN, 1, 24);
    megalodon_write(m, PARAMS, 0, size, values);
    megalodon_on_grad_ready(m, ready);
    megalodon_forward(m, NULL, tokens[0], 1, 24);
    megalodon_loss(m, targets[0], 0.1, &counted, NULL);
    megalodon_backward(m);
    megalodon_read(m, GRADS, 0, size, grads);
    int down = tellings == config.num_layers + 2;
    for (int i = 0; i < tellings; i++) down &= told[i] == tellings - 1 - i;
    check_true("segments are ready from the last one down", down);
    check_same("  and complete then", then, grads, size * sizeof *grads);
    megalodon_free(m), free(values), free(grads), free(then);
}

int main(void) {
    free(megalodon_tensors(&config, NULL, &size));
    for (int step = 0; step < STEPS; step++) {
        for (size_t i = 0; i < B * MAX_L; i++) {
            tokens[step][i] = (int32_t)((random_real(7 + (uint64_t)step, i) + 1) / 2 * config.vocab_size);
            targets[step][i] = i % 5 == 3 ? -1 : (int32_t)((random_real(9, i) + 1) / 2 * config.vocab_size);
        }
    }
    test_pieces(2, (const int64_t[]){8, 16}, MEGALODON_TRAIN);
    test_pieces(3, (const int64_t[]){16, 72, 8}, MEGALODON_RECOMPUTE);
    test_pieces(4, (const int64_t[]){8, 8, 136, 80}, MEGALODON_TRAIN);
    test_shards();
    test_ranges();
    test_ready();
    return check_done();
}
