// The memory plan: what a model, its states and the program's buffers will take, checked before anything large is
// allocated.
#include <math.h> // defines: INFINITY, fmin
#include "plumbing.h"

static const double MIB = 1048576;

static size_t plan_total(const MemoryPlan *p) {
    return p->params + p->grads + p->moments + p->activations + p->scratch;
}

// A lower bound in bytes on the activations of B x L tokens, in double, which cannot overflow. They grow in proportion
// to the number of tokens; half of the small plan's share per token allows for its rounding.
static double least_activations(const Config *c, Mode mode, int B, double L) {
    const int few = L < 64 ? (int)L : 64;
    return (double)megalodon_memory(c, mode, 1, few).activations / 2 * B * (L / few);
}

// Tokens of a segment that this rank has. Splits with fewer chunks than ranks are tried, too.
static int64_t part_length(const Demand *d) {
    const int64_t count = split_part(&d->split, 0, d->split.cp_rank).count;
    return count > 0 ? count : 1;
}

// The backends count in int: tokens of a pass times heads, and tokens rounded up to whole chunks.
static bool too_many_tokens(const Demand *d) {
    const double tokens = (double)part_length(d);
    return tokens > 1 << 28 || d->B * tokens * d->config->num_heads > INT32_MAX;
}

// Bytes beside the model, in main memory, and in the backend's memory.
static double host_bytes(const Demand *d) {
    return d->host + d->batch_per_token * d->B * (double)split_own(&d->split) +
           d->host_per_token * d->B * (double)part_length(d) + segments_host_bytes(d->config, d->mode, d->B, &d->split);
}
static double extra_bytes(const Demand *d) {
    const double device = d->states + segments_device_bytes(d->config, d->mode, d->B, &d->split);
    return megalodon_on_gpu() ? device : device + host_bytes(d);
}

// MiB of the plan *p and what is beside it. If it exceeds `available` MiB by so much that its size in bytes might
// overflow, *p is zero and the result is a lower bound above `available`.
static double plan_mib(MemoryPlan *p, const Demand *d, double available) {
    *p = (MemoryPlan){0};
    const double least = least_activations(d->config, d->mode, d->B, (double)part_length(d)) / MIB;
    if (least > available) return least;
    if (too_many_tokens(d)) return 2 * available;
    *p = megalodon_memory(d->config, d->mode, d->B, (int)part_length(d));
    if (p->params == 0) return 2 * available; // megalodon_memory itself ran out of memory
    return ((double)plan_total(p) + extra_bytes(d)) / MIB;
}

// Main memory for what host_bytes() counts, where the model is elsewhere.
static double host_available(void) {
    return megalodon_on_gpu() ? (double)host_memory(ranks.local_size, 0) : INFINITY;
}
static double available_mib(void) { return (double)megalodon_available_memory(ranks.local_size) / MIB; }

static bool fits(Demand d, Mode mode, int B, int64_t length, int64_t segment_len) {
    MemoryPlan plan;
    const double available = available_mib();
    d.mode = mode, d.B = B, d.split.length = length, d.split.segment_len = segment_len;
    return host_bytes(&d) <= host_available() && plan_mib(&plan, &d, available) <= available;
}

// Activations grow with the length of a segment, and the states between segments with their number, so that the lengths
// that fit are an interval. This tries ever shorter ones, by a sixteenth each time, until one fits; then it searches by
// bisection between that and the one before, and takes the largest valid length up to there.
int64_t longest_segment(const Demand *d) {
    const int64_t L = d->split.length, C = d->split.chunk_size, fewest = d->split.cp_size; // chunks
    int64_t most = (L - 1) / C + 1, least;
    if (fits(*d, d->mode, d->B, L, L)) return L;
    for (;; most = least) {
        if (most <= fewest) return 0;
        least = most - most / 16 - 1;
        if (least < fewest) least = fewest;
        if (fits(*d, d->mode, d->B, L, least * C)) break;
    }
    while (most - least > 1) {
        const int64_t middle = least + (most - least) / 2;
        *(fits(*d, d->mode, d->B, L, middle * C) ? &least : &most) = middle;
    }
    for (Split s = d->split; least >= fewest; least--) {
        s.segment_len = least * C;
        if (split_error(&s) == NULL) return fits(*d, d->mode, d->B, L, s.segment_len) ? s.segment_len : 0;
    }
    return 0;
}

// Names the largest item of a plan and what makes it smaller.
static void name_largest(const MemoryPlan *p, Mode mode, double extra, const char **item, const char **remedy) {
    const double fixed = (double)(p->params + p->grads + p->moments);
    const double activations = (double)p->activations, scratch = (double)p->scratch;
    *item = mode == MEGALODON_INFER ? "the parameters" : "parameters, gradients and moments";
    *remedy = "a smaller model (--seq-len and --batch-size do not change them)";
    if (fixed >= activations && fixed >= scratch && fixed >= extra) return;
    if (activations >= scratch && activations >= extra) {
        *item = "activations", *remedy = "a smaller --batch-size or --seq-len, or --recompute";
    } else if (scratch >= extra) {
        *item = "scratch", *remedy = "a smaller --batch-size, --seq-len or --chunk-size, or fewer --threads";
    } else {
        *item = "states and buffers",
        *remedy = "a smaller --batch-size, --grad-accum, --seq-len or --chunk-size, or fewer samples";
    }
}

// Writes to help what would fit instead: the same batch in segments; or with --recompute, or else half, a quarter, ..
// of the batch, then of the length, also with --recompute; or what is too large even for one token.
static void suggest(char help[224], const Demand *demand) {
    MemoryPlan plan;
    const char *largest, *remedy;
    Demand d = *demand;
    const Mode mode = d.mode, less = mode == MEGALODON_TRAIN ? MEGALODON_RECOMPUTE : mode;
    const int64_t segment_len = d.segments ? longest_segment(&d) : 0;
    int B = d.B;
    int64_t L = d.split.length, N = d.split.segment_len;
    if (segment_len > 0) {
        snprintf(help, 224, "What fits: the same with --segment-len %lld", (long long)segment_len);
        return;
    }
    if (less != mode && fits(d, less, B, L, N)) {
        snprintf(help, 224, "What fits: the same with --recompute");
        return;
    }
    while (B > 1 || L > 1) {
        if (B > 1)
            B /= 2;
        else
            L /= 2;
        if (!fits(d, less, B, L, N)) continue;
        snprintf(help, 224, "What fits: a batch of %d x %lld tokens%s", B, (long long)L,
                 fits(d, mode, B, L, N) ? "" : " with --recompute");
        return;
    }
    d.mode = less, d.B = 1, d.split.length = d.split.segment_len = 1, d.split.cp_size = 1, d.split.cp_rank = 0;
    plan_mib(&plan, &d, INFINITY);
    name_largest(&plan, mode, extra_bytes(&d), &largest, &remedy);
    snprintf(help, 224, "Even 1 x 1 tokens do not fit, mostly because of %s: use %s", largest, remedy);
}

MemoryPlan check_memory(const Demand *d, double *extra) {
    const Split *split = &d->split;
    const bool segments = split_segments(split) > 1;
    char size[128], among[48] = "", of[48] = "";
    if (split->cp_size > 1) snprintf(among, sizeof among, " among %d chunk-parallel ranks", split->cp_size);
    if (segments) snprintf(of, sizeof of, " in segments of %lld", (long long)split->segment_len);
    snprintf(size, sizeof size, "%d x %lld tokens%s%s", d->B, (long long)split->length, among, of);
    if (host_bytes(d) > host_available())
        fatal("buffers for %s in main memory need %.0f MiB; %.0f MiB are available%s: use a smaller --batch-size, "
              "--seq-len or --grad-accum%s",
              size, host_bytes(d) / MIB, host_available() / MIB, host_memory_limit(),
              segments ? ", or a larger --segment-len" : "");
    const double available = available_mib();
    const char *limit = megalodon_on_gpu() ? "" : host_memory_limit();
    MemoryPlan plan;
    const double need = plan_mib(&plan, d, available);
    if (extra != NULL) *extra = extra_bytes(d) + (megalodon_on_gpu() ? host_bytes(d) : 0);
    if (need <= available) return plan;
    if (available == 0)
        fatal("%s: its threads reserve more address space than ulimit -v or -d leaves; raise that limit, use fewer "
              "--threads, or build with NO_BLAS=1",
              megalodon_backend());
    char help[224], items[192] = "";
    suggest(help, d);
    if (plan.params > 0)
        snprintf(items, sizeof items,
                 " (parameters, gradients and moments %.0f, activations %.0f, scratch %.0f, states and buffers %.0f)",
                 (double)(plan.params + plan.grads + plan.moments) / MIB, (double)plan.activations / MIB,
                 (double)plan.scratch / MIB, extra_bytes(d) / MIB);
    if (too_many_tokens(d))
        fatal("%s: --batch-size x --seq-len x --num-heads must be below 2^31, and --seq-len at most 2^28%s. %s", size,
              d->segments ? "; with --segment-len, that counts instead of --seq-len" : "", help);
    fatal("%s need %.0f MiB or more%s; %.0f MiB are available%s for %s. %s", size, need, items, available, limit,
          megalodon_backend(), help);
}
