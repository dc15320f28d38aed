// Chunk parallelism: the parts of a sequence on several ranks, each a model in its own thread, against the whole
// sequence on one: logits, gradients, states, dropout; also in two segments, with the gradient of the state between. ZeRO-1: an update by two ranks with a shard each, against one
// rank. Built for double and for float.
#include <pthread.h> // defines: pthread_cond_wait, pthread_create
#include "check.h"

#ifdef MEGALODON_DOUBLE
static const double ROUNDING = 1e-11;
#else
static const double ROUNDING = 1e-5;
#endif

// clang-format off
static Config config = {
    .num_layers = 2, .model_dim = 19, .z_dim = 6, .value_dim = 9, .num_heads = 3, .ffn_hidden_dim = 7,
     .cema_ndim = 3, .chunk_size = 8, .vocab_size = 11, .norm_num_groups = 1, .swiglu = 1, .rescale_nffn = 1,
     .share_emb = 1, .norm_affine = 1, .norm_eps = 1e-3, .rope_base = 1e4, .dropout = 0.1, .hidden_dropout = 0.2,
     .attention_dropout = 0.3};
// clang-format on
enum { B = 2, MAX_RANKS = 4, MAX_L = 240, STEPS = 2 };

static size_t size; // of all parameters
static int32_t tokens[STEPS][B * MAX_L], targets[STEPS][B * MAX_L];

// One rank's two steps. The second continues from the state after the first. They are two batches, or the two segments
// of one sequence, through which the gradient flows back.
typedef struct {
    ChunkParallel cp;
    Mode mode;
    int segments; // 1: the second step's gradient reaches the first
    int start, L; // first token and number of tokens of this rank's part
    int whole;    // tokens of the whole sequence
    double loss;
    real *logits; // (B,L,V) of the last step
    real *grads;  // of all parameters
    State *state;
    StateGrad *dstate; // with segments: the gradient w.r.t. the state before the first one
} Run;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t all_arrived = PTHREAD_COND_INITIALIZER;
static int arrived, rounds;
static const void *sent[MAX_RANKS];

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
    sent[run->cp.cp_rank] = mine;
    barrier(run->cp.cp_size);
    for (int r = 0; r < run->cp.cp_size; r++) memcpy((char *)all + (size_t)r * bytes, sent[r], bytes);
    barrier(run->cp.cp_size);
}

static void *run_rank(void *context) {
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
    r->dstate = r->segments ? state_grad_new(&config, B) : NULL;
    int ok = megalodon_chunk_parallel(m, &r->cp);
    // step -1: with segments, a forward pass of step 0, for the state before step 1; step 1 is then followed by step 0
    for (int i = r->segments ? -1 : 0; i < STEPS && ok; i++) {
        int step = i < 0 || !r->segments ? i < 0 ? 0 : i : STEPS - 1 - i;
        const DropoutKey draw = {.seed = 3, .step = step, .row = 5};
        for (int b = 0; b < B; b++) {
            memcpy(in + b * r->L, tokens[step] + b * r->whole + r->start, (size_t)r->L * sizeof *in);
            memcpy(out + b * r->L, targets[step] + b * r->whole + r->start, (size_t)r->L * sizeof *out);
            if (r->segments && step == 0) state_reset(r->state, b);
        }
        megalodon_dropout(m, &draw);
        megalodon_forward(m, r->state, in, B, r->L);
        if (i < 0) continue;
        r->loss += megalodon_loss(m, out, 0.3, &counted, NULL);
        megalodon_backward(m, r->dstate);
    }
    megalodon_logits(m, 0, (size_t)B * r->L, r->logits);
    megalodon_read(m, GRADS, 0, size, r->grads);
    megalodon_free(m), free(params);
    return NULL;
}

static void run_free(Run *r) { free(r->logits), free(r->grads), state_free(r->state), state_grad_free(r->dstate); }

static void test_ranks(int ranks, const int64_t *lengths, Mode mode, int segments) {
    Run whole = {.mode = mode, .segments = segments, .cp = {.cp_size = 1}}, runs[MAX_RANKS];
    pthread_t threads[MAX_RANKS];
    char name[64];
    for (int r = 0; r < ranks; r++) whole.L += (int)lengths[r];
    whole.whole = whole.L;
    run_rank(&whole);
    for (int r = 0, start = 0; r < ranks; start += (int)lengths[r++]) {
        runs[r] = (Run){.mode = mode, .segments = segments, .start = start, .L = (int)lengths[r], .whole = whole.L};
        runs[r].cp = (ChunkParallel){r, ranks, lengths, gather, &runs[r]};
        pthread_create(&threads[r], NULL, run_rank, &runs[r]);
    }
    for (int r = 0; r < ranks; r++) pthread_join(threads[r], NULL);

    size_t V = (size_t)config.vocab_size, norms = (size_t)(config.num_layers + 1) * B * config.norm_num_groups;
    size_t h = (size_t)config.num_layers * B * 2 * config.cema_ndim * config.model_dim;
    real *logits = malloc((size_t)B * whole.L * V * sizeof *logits), *grads = calloc(size, sizeof *grads);
    double loss = 0;
    for (int r = 0; r < ranks; r++) {
        for (int b = 0; b < B; b++)
            memcpy(logits + ((size_t)b * whole.L + runs[r].start) * V, runs[r].logits + (size_t)b * runs[r].L * V,
                   (size_t)runs[r].L * V * sizeof *logits);
        for (size_t i = 0; i < size; i++) grads[i] += runs[r].grads[i];
        loss += runs[r].loss;
    }
    snprintf(name, sizeof name, "%d ranks, %d tokens%s%s: loss", ranks, whole.L,
             mode == MEGALODON_RECOMPUTE ? ", recomputing" : "", segments ? ", 2 segments" : "");
    check(name, &loss, &whole.loss, 1, ROUNDING);
    check_real("  logits", logits, whole.logits, (size_t)B * whole.L * V, ROUNDING);
    int count;
    Tensor *tensors = megalodon_tensors(&config, &count, NULL);
    for (Tensor *t = tensors; t < tensors + count; t++) {
        snprintf(name, sizeof name, "  gradient of %s", t->name);
        check_real(name, grads + t->offset, whole.grads + t->offset, t->size, ROUNDING);
    }
    for (int r = 0; r < ranks; r += ranks - 1) { // of the first and the last rank: the state after the whole sequence
        check_same("  state: count", runs[r].state->count, whole.state->count, B * sizeof(int64_t));
        check("  state: mean", runs[r].state->mean, whole.state->mean, norms, ROUNDING);
        check("  state: m2", runs[r].state->m2, whole.state->m2, norms, ROUNDING);
        check_real("  state: h", runs[r].state->h, whole.state->h, h, ROUNDING);
        if (!segments) continue;
        check("  gradient of the state: U, V, W", runs[r].dstate->sums, whole.dstate->sums, 3 * norms, ROUNDING);
        check_real("  gradient of the state: h", runs[r].dstate->h, whole.dstate->h, h, ROUNDING);
    }
    for (int r = 0; r < ranks; r++) run_free(&runs[r]);
    run_free(&whole), free(logits), free(grads), free(tensors);
}

// Two AdamW steps by one rank, and by two ranks with a shard each, which have no moments of the other shard.
static void test_shards(void) {
    const AdamW adamw = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
    real *values = malloc(2 * size * sizeof *values), *expected[3], norm[3];
    const Buffer buffers[3] = {PARAMS, MOMENT1, MOMENT2};
    static const char *const names[3] = {"  parameters", "  moment1", "  moment2"};
    random_fill(values, 2 * size, 6, 1, 0);
    for (int rank = -1; rank < 2; rank++) {
        int single = rank < 0;
        megalodon_set_shard(single ? 0 : rank, single ? 1 : 2);
        int num_shards;
        Shard *shards = megalodon_shards(&config, single ? 0 : rank, single ? 1 : 2, &num_shards);
        Model *m = megalodon_new(&config, MEGALODON_TRAIN, 1, 8);
        megalodon_write(m, PARAMS, 0, size, values);
        for (int i = 1; i < 3; i++) { // moments of all parameters are written, only those of the shard kept
            for (size_t k = 0; k < size; k++) values[size + k] = (real)fabs(values[size + k]);
            megalodon_write(m, buffers[i], 0, size, values + size);
        }
        for (int update = 0; update < 2; update++) {
            megalodon_write(m, GRADS, 0, size, values + size * (size_t)update);
            megalodon_update(m, &adamw, 0.01, 0.5, update);
        }
        norm[rank + 1] = (real)megalodon_grad_norm(m);
        for (int i = 0; i < 3; i++) {
            if (single) expected[i] = malloc(size * sizeof(real));
            for (int s = 0; s < num_shards; s++) {
                real *got = single ? expected[i] : malloc((shards[s].count + 1) * sizeof *got);
                megalodon_read(m, buffers[i], shards[s].first, shards[s].count, got);
                if (single) continue;
                check_same(names[i], got, expected[i] + shards[s].first, shards[s].count * sizeof *got);
                free(got);
            }
        }
        megalodon_free(m), free(shards);
    }
    norm[1] = (real)sqrt(norm[1] * norm[1] + norm[2] * norm[2]);
    check_real("  norm", &norm[1], &norm[0], 1, 1e-6);
    megalodon_set_shard(0, 1);
    MemoryPlan one = megalodon_memory(&config, MEGALODON_TRAIN, B, 8);
    megalodon_set_shard(1, 4);
    MemoryPlan quarter = megalodon_memory(&config, MEGALODON_TRAIN, B, 8);
    megalodon_set_shard(0, 1);
    // shards are rounded to 4 elements, and each of the two buffers to 256 bytes
    check_true("  moments of a quarter",
               quarter.moments < one.moments / 4 + 2 * (4 * 4 * sizeof(real) + 256) && quarter.params == one.params);
    for (int i = 0; i < 3; i++) free(expected[i]);
    free(values);
}

// The shards of all ranks are the parameters, bucket by bucket.
static void test_shard_sizes(void) {
    for (int ranks = 2; ranks < 6; ranks++) {
        int buckets[5], aligned = 1, even = 1;
        size_t end = 0;
        Shard *shards[5];
        for (int r = 0; r < ranks; r++) shards[r] = megalodon_shards(&config, r, ranks, &buckets[r]);
        check_true("buckets are the embedding, the layers and the rest", buckets[0] == config.num_layers + 2);
        for (int i = 0; i < buckets[0]; i++) {
            for (int r = 0; r < ranks; r++) {
                const Shard s = shards[r][i];
                aligned &= s.first == end && (s.first % 4 == 0 || s.count == 0);
                even &= s.count <= shards[0][i].count && shards[0][i].count < s.count + 4 * (size_t)ranks;
                end = s.first + s.count;
            }
        }
        check_true("  shards are contiguous and begin at multiples of 4", aligned && end == size);
        check_true("  a bucket's shards are nearly equal", even);
        for (int r = 0; r < ranks; r++) free(shards[r]);
    }
    int count;
    Shard *whole = megalodon_shards(&config, 0, 1, &count);
    check_true("one rank has one shard, all parameters", count == 1 && whole->first == 0 && whole->count == size);
    free(whole);
}

// What the callback of a backward pass saw: the buckets in order, and each bucket's gradients at that time.
static int seen[8], num_seen;
static real *grads_then;

static void on_grad_ready(Model *m, int bucket) {
    int count, ranks = 2; // shards of one rank would not be divided into buckets
    seen[num_seen++] = bucket;
    for (int r = 0; r < ranks; r++) {
        Shard *shards = megalodon_shards(&config, r, ranks, &count), s = shards[bucket];
        megalodon_read(m, GRADS, s.first, s.count, grads_then + s.first);
        free(shards);
    }
}

static void test_grad_ready(void) {
    real *values = malloc(size * sizeof *values), *grads = malloc(size * sizeof *grads);
    int64_t counted;
    random_fill(values, size, 8, 1, 0);
    grads_then = calloc(size, sizeof *grads_then);
    Model *m = megalodon_new(&config, MEGALODON_TRAIN, 1, 24);
    megalodon_write(m, PARAMS, 0, size, values);
    megalodon_on_grad_ready(m, on_grad_ready);
    megalodon_forward(m, NULL, tokens[0], 1, 24);
    megalodon_loss(m, targets[0], 0.1, &counted, NULL);
    megalodon_backward(m, NULL);
    megalodon_read(m, GRADS, 0, size, grads);
    int descending = num_seen == config.num_layers + 2;
    for (int i = 0; i < num_seen; i++) descending &= seen[i] == num_seen - 1 - i;
    check_true("buckets are ready from the last to the first", descending);
    check_same("  and complete by then", grads_then, grads, size * sizeof *grads);
    megalodon_free(m), free(values), free(grads), free(grads_then);
}

int main(void) {
    free(megalodon_tensors(&config, NULL, &size));
    for (int step = 0; step < STEPS; step++) {
        for (size_t i = 0; i < B * MAX_L; i++) {
            tokens[step][i] = (int32_t)((random_real(7 + (uint64_t)step, i) + 1) / 2 * config.vocab_size);
            targets[step][i] = i % 5 == 3 ? -1 : (int32_t)((random_real(9, i) + 1) / 2 * config.vocab_size);
        }
    }
    test_ranks(2, (const int64_t[]){8, 16}, MEGALODON_TRAIN, 0);
    test_ranks(3, (const int64_t[]){16, 72, 8}, MEGALODON_RECOMPUTE, 0);
    test_ranks(4, (const int64_t[]){8, 8, 136, 80}, MEGALODON_TRAIN, 0);
    test_ranks(2, (const int64_t[]){16, 8}, MEGALODON_TRAIN, 1);
    test_ranks(3, (const int64_t[]){8, 72, 16}, MEGALODON_RECOMPUTE, 1);
    tested = &config;
    config.cema = CEMA_REAL, config.timestep_norm = NORM_LAYER; // variants that change what ranks exchange
    test_ranks(2, (const int64_t[]){16, 8}, MEGALODON_TRAIN, 1);
    config.cema = CEMA_NONE, config.timestep_norm = NORM_TIMESTEP;
    config.attention = ATTENTION_STANDARD, config.two_hop = ONE_HOP;
    test_ranks(2, (const int64_t[]){8, 16}, MEGALODON_TRAIN, 0);
    test_shards();
    test_shard_sizes();
    test_grad_ready();
    return check_done();
}
