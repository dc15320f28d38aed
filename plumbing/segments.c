// Training on sequences that are longer than memory: exact gradients, a segment at a time.
//
// Attention stays within a chunk. All that crosses from one chunk to the next is a State: CEMA's h and TimestepNorm's
// moments. So if a sequence is divided into segments of whole chunks,
//     state_1 = segment_0(state_0),  state_2 = segment_1(state_1),  ..    loss = loss_0 + loss_1 + ..
// then the gradient of a segment's part of the loss follows from its tokens, the state before it, and the gradient of
// all later losses with respect to the state after it (StateGrad in megalodon.h). A step has two passes:
//
//     segment        0          1          2          3
//     pass 1    s0 ----> s1 ------> s2 ------> s3                forward, keeping only the states
//     pass 2                                      [forward, loss, backward] from s3
//                                      [forward, loss, backward] from s2, with dL/ds3
//                           [forward, loss, backward] from s1, with dL/ds2
//               [forward, loss, backward] from s0, with dL/ds1
//
// This is full backpropagation through time, not truncated: the gradient equals that of the whole sequence at once.
// Activations exist for one segment only. The cost is one more forward pass of all segments but the last. States wait
// in main memory, so that the backend's memory does not depend on the length of the sequence.
#include <stdlib.h> // defines: free
#include "plumbing.h"

// ----------------------------------------------------------------------------
// memory

double segments_device_bytes(const Config *c, Mode mode, int B, const Split *split) {
    if (split_segments(split) == 1) return 0;
    return (double)state_bytes(c, B, 1) + (mode == MEGALODON_INFER ? 0 : (double)state_grad_bytes(c, B));
}

double segments_host_bytes(const Config *c, Mode mode, int B, const Split *split) {
    const int64_t n = split_segments(split);
    return n == 1 || mode == MEGALODON_INFER ? 0 : (double)n * (double)state_bytes(c, B, 1);
}

void segments_open(Segments *s, Model *model, const Config *c, Mode mode, int B, const Split *split) {
    *s = (Segments){.model = model, .config = c, .B = B, .split = *split, .num_segments = split_segments(split)};
    s->lengths = allocate((size_t)split->cp_size, sizeof *s->lengths);
    if (s->num_segments == 1) return;
    s->state = state_new(c, B, 1);
    if (s->state == NULL) fatal("out of memory for the state of a segment");
    if (mode == MEGALODON_INFER) return;
    s->grad = state_grad_new(c, B);
    if (s->grad == NULL) fatal("out of memory for the gradient of a state");
    s->kept = allocate((size_t)s->num_segments, s->state->bytes);
}

void segments_close(Segments *s) {
    state_free(s->state), state_grad_free(s->grad);
    free(s->kept), free(s->lengths);
}

// ----------------------------------------------------------------------------
// chunk parallelism: the ranks share every segment

void segments_pause_ranks(Segments *s) {
    s->parallel = false;
    megalodon_chunk_parallel(s->model, NULL);
}

// Tells the model how the ranks share a segment, unless they share it like the one before.
static void share(Segments *s, int64_t segment) {
    bool same = s->parallel;
    for (int r = 0; r < s->split.cp_size; r++) {
        const int64_t count = split_part(&s->split, segment, r).count;
        same &= s->lengths[r] == count;
        s->lengths[r] = count;
    }
    if (s->split.cp_size == 1 || same) return;
    const ChunkParallel cp = {
        .cp_rank = s->split.cp_rank, .cp_size = s->split.cp_size, .lengths = s->lengths, .gather = ranks_all_gather};
    if (!megalodon_chunk_parallel(s->model, &cp))
        fatal("out of memory for the states of %d chunk-parallel ranks", cp.cp_size);
    s->parallel = true;
}

// ----------------------------------------------------------------------------
// passes

// Long passes show on a terminal, once a second, which segment is next.
static void show_progress(const Segments *s, const char *pass, int64_t segment) {
    static double last;
    if (s->num_segments == 1 || seconds() - last < 1) return;
    if (last > 0) progress_line("%s: segment %lld of %lld", pass, (long long)segment + 1, (long long)s->num_segments);
    last = seconds();
}

static void forward(Segments *s, State *state, int64_t segment, const int32_t *inputs, int rows) {
    share(s, segment);
    megalodon_forward(s->model, state, inputs + s->B * split_offset(&s->split, segment), rows,
                      (int)split_part(&s->split, segment, s->split.cp_rank).count);
}

double segments_loss(Segments *s, const int32_t *inputs, const int32_t *targets, int rows, int64_t *counted) {
    State first = {0}; // of the first `rows` sequences, in the memory of s->state
    if (s->state != NULL) first = state_point(s->state->memory, s->config, rows, 1);
    for (int b = 0; b < first.B; b++) state_reset(&first, b);
    double sum = 0;
    *counted = 0;
    for (int64_t i = 0; i < s->num_segments; i++) {
        int64_t some;
        show_progress(s, "loss", i);
        forward(s, s->state != NULL ? &first : NULL, i, inputs, rows);
        sum += megalodon_loss(s->model, targets + s->B * split_offset(&s->split, i), 0, &some, NULL);
        *counted += some;
    }
    return sum;
}

// The memory of the state before a segment.
static char *kept_state(Segments *s, int64_t segment) { return s->kept + (size_t)segment * s->state->bytes; }

// Forward pass of a segment with the dropout masks of its place in the sequence.
static void forward_train(Segments *s, const Pass *p, State *state, int64_t segment) {
    DropoutKey key = p->key;
    key.start = segment * s->split.segment_len, key.length = s->split.length;
    megalodon_dropout(s->model, &key);
    forward(s, state, segment, p->inputs, s->B);
}

// Pass 1: the state before each segment.
static void keep_states(Segments *s, const Pass *p) {
    for (int b = 0; b < s->B && p->carried == NULL; b++) state_reset(s->state, b);
    if (p->carried != NULL) state_write(s->state, 0, s->state->bytes, p->carried->memory);
    for (int64_t i = 0; i < s->num_segments; i++) {
        show_progress(s, "pass 1 of 2", i);
        if (i > 0) forward_train(s, p, s->state, i - 1);
        state_read(s->state, 0, s->state->bytes, kept_state(s, i));
    }
}

double segments_train(Segments *s, const Pass *p) {
    const int64_t last = s->num_segments - 1;
    State *state = last > 0 ? s->state : p->carried;
    double sum = 0;
    if (last > 0) keep_states(s, p);
    if (last > 0) state_grad_zero(s->grad); // no loss depends on the state after the last segment
    // Pass 2: from the last segment to the first. s->grad: in: dL/d(state after the segment); out: before it
    for (int64_t i = last; i >= 0; i--) {
        const int64_t at = s->B * split_offset(&s->split, i);
        int64_t counted;
        show_progress(s, "pass 2 of 2, backwards", i);
        if (i < last) state_write(state, 0, state->bytes, kept_state(s, i));
        forward_train(s, p, state, i);
        if (i == last && last > 0 && p->carried != NULL) state_write(p->carried, 0, state->bytes, state->memory);
        sum += megalodon_loss(s->model, p->targets + at, p->grad_scale, &counted, NULL);
        megalodon_on_grad_ready(s->model, i == 0 ? p->on_grad_ready : NULL);
        megalodon_backward(s->model, s->grad);
        if (p->dump != NULL) dump_segment(p->dump, i, p->inputs + at, p->targets + at);
    }
    megalodon_dropout(s->model, NULL);
    return sum;
}
