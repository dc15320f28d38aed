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
static double least_activations(const Config *c, Mode mode, int B, int L) {
    const int few = L < 64 ? L : 64;
    return (double)megalodon_memory(c, mode, 1, few).activations / 2 * B * ((double)L / few);
}

// MiB of the plan *p for B x L tokens, `extra` bytes included. If it exceeds `available` MiB by so much that its size
// in bytes might overflow, *p is zero and the result is a lower bound above `available`.
static double plan_mib(MemoryPlan *p, const Config *c, Mode mode, int B, int L, size_t extra, double available) {
    *p = (MemoryPlan){0};
    const double least = least_activations(c, mode, B, L) / MIB;
    if (least > available) return least;
    if ((double)B * L * c->num_heads > INT32_MAX) return 2 * available;
    *p = megalodon_memory(c, mode, B, L);
    if (p->params == 0) return 2 * available; // megalodon_memory itself ran out of memory
    return ((double)plan_total(p) + (double)extra) / MIB;
}

// Names the largest item of a plan and what makes it smaller.
static void name_largest(const MemoryPlan *p, Mode mode, size_t extra, const char **item, const char **remedy) {
    const size_t fixed = p->params + p->grads + p->moments;
    *item = mode == MEGALODON_INFER ? "the parameters" : "parameters, gradients and moments";
    *remedy = "a smaller model (--seq-len and --batch-size do not change them)";
    if (fixed >= p->activations && fixed >= p->scratch && fixed >= extra) return;
    if (p->activations >= p->scratch && p->activations >= extra) {
        *item = "activations", *remedy = "a smaller --batch-size or --seq-len, or --recompute";
    } else if (p->scratch >= extra) {
        *item = "scratch", *remedy = "a smaller --batch-size, --seq-len or --chunk-size, or fewer --threads";
    } else {
        *item = "states and buffers",
        *remedy = "a smaller --batch-size, --grad-accum, --seq-len or --chunk-size, or fewer samples";
    }
}

// Writes to help what would fit instead: the same batch with --recompute, or else half, a quarter, .. of the batch,
// then of the length, also with --recompute; or what is too large even for one token.
static void suggest(char help[224], const Config *c, Mode mode, int B, int L, size_t extra, double available) {
    MemoryPlan plan;
    const char *largest, *remedy;
    const Mode less = mode == MEGALODON_TRAIN ? MEGALODON_RECOMPUTE : mode;
    if (less != mode && plan_mib(&plan, c, less, B, L, extra, available) <= available) {
        snprintf(help, 224, "What fits: the same with --recompute");
        return;
    }
    while (B > 1 || L > 1) {
        if (B > 1)
            B /= 2;
        else
            L /= 2;
        if (plan_mib(&plan, c, less, B, L, extra, available) > available) continue;
        const bool plain = plan_mib(&plan, c, mode, B, L, extra, available) <= available;
        snprintf(help, 224, "What fits: a batch of %d x %d tokens%s", B, L, plain ? "" : " with --recompute");
        return;
    }
    plan_mib(&plan, c, less, 1, 1, extra, INFINITY);
    name_largest(&plan, mode, extra, &largest, &remedy);
    snprintf(help, 224, "Even 1 x 1 tokens do not fit, mostly because of %s: use %s", largest, remedy);
}

MemoryPlan check_memory(const Config *c, Mode mode, int B, int L, size_t states, size_t host) {
    const size_t extra = states + (megalodon_on_gpu() ? 0 : host);
    const size_t host_available = megalodon_on_gpu() ? host_memory(ranks.local_size, 0) : SIZE_MAX;
    if (host > host_available)
        fatal("buffers for %d x %d tokens in main memory need %zu MiB; %zu MiB are available%s: use a smaller "
              "--batch-size, --seq-len or --grad-accum",
              B, L, host >> 20, host_available >> 20, host_memory_limit());
    const double available = (double)megalodon_available_memory(ranks.local_size) / MIB;
    const char *limit = megalodon_on_gpu() ? "" : host_memory_limit();
    MemoryPlan plan;
    const double need = plan_mib(&plan, c, mode, B, L, extra, available);
    if (need <= available) return plan;
    if (available == 0)
        fatal("%s: its threads reserve more address space than ulimit -v or -d leaves; raise that limit, use fewer "
              "--threads, or build with NO_BLAS=1",
              megalodon_backend());
    char help[224], items[192] = "";
    suggest(help, c, mode, B, L, extra, available);
    if (plan.params > 0)
        snprintf(items, sizeof items,
                 " (parameters, gradients and moments %.0f, activations %.0f, scratch %.0f, states and buffers %.0f)",
                 (double)(plan.params + plan.grads + plan.moments) / MIB, (double)plan.activations / MIB,
                 (double)plan.scratch / MIB, (double)extra / MIB);
    if ((double)B * L * c->num_heads > INT32_MAX)
        fatal("%d x %d tokens: --batch-size x --seq-len x --num-heads must be below 2^31. %s", B, L, help);
    fatal("%d x %d tokens need %.0f MiB or more%s; %.0f MiB are available%s for %s. %s", B, L, need, items, available,
          limit, megalodon_backend(), help);
}
