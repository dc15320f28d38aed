/*
attention.cuh: replaces attention of whole chunks, with a state or without. A call that begins inside a chunk is left to
the plain functions.

Idea. The plain functions compute the chunks of a sequence one after another. But chunks do not depend on each other.
So chunks that lie a constant number of rows apart, a *run*, are one batch of matrix products. If C divides L, all
chunks of all sequences are one run. Otherwise the first chunks of all sequences are a run, then the second ones, etc.:

    C divides L:    | chunk | chunk | chunk | chunk |  a run of 4: step C
                    |   sequence 0  |   sequence 1  |
    otherwise:      | chunk |ch| chunk |ch|            two runs of 2: step L
                      run 0  1  run 0   1

Scores exist for QUERY_TILE queries at a time, against the keys up to the last of them, so few products are above the
diagonal. A run is divided so that SCORES scores exist at a time:

    keys      0        512       1024       of one head of one chunk
    queries   +---------+                   tile 0: 512 x 512
       512    | tile 0  |
              +---------+---------+         tile 1: 512 x 1024
      1024    |      tile 1       |
              +---------+---------+

A row of scores is C elements long, so rows begin at multiples of 16 bytes, and the softmax kernels read vectors of
VEC = 8 elements. They keep a running maximum and sum ("online softmax") and so read the scores twice, not three times.

Requires: bfloat16, C divisible by 8, no sequence that begins inside a chunk.
attention_hopper.cuh and attention_small.cuh come first where they support a shape.
Measured: see dev/notes/kernels.md.
*/
#pragma once

// Defined in megalodon.cu.
static __device__ float mask_at(const Mask *mask, uint64_t i);
static void cache_chunk(float *cache_k, float *cache_v, const floatX *k, const floatX *v, int b, int t, int at, int n,
                        Dims d);

// `chunks` chunks of n tokens. Their first tokens are `step` rows apart, from `row` on.
typedef struct {
    size_t row;
    int step, chunks, n;
} Run;

// nq consecutive queries of head h, in each of `batch` chunks of a run. row: row of the first query of the first chunk.
// They see nk keys, of which the last nq are at their own positions. scores (batch,nq,C), of which nk columns are used.
typedef struct {
    size_t row;
    int step, batch, nq, nk, h;
} RunTile;

// attention_small.cuh
static bool attention_small_supports(Mask mask, Dims d);
static void attention_small_forward(floatX *o, float *lse, const floatX *q, const floatX *k, const floatX *v, Dims d);
static void attention_small_backward(floatX *dq, floatX *dk, floatX *dv_out, const floatX *dout, const float *lse,
                                     const floatX *q, const floatX *k, const floatX *v, Dims d);

#ifdef HOPPER_KERNELS // attention_hopper.cuh
static bool attention_hopper_supports(Mask mask, Dims d);
static size_t attention_hopper_scores(Dims d);
static void attention_hopper_forward(floatX *o, float *lse, floatX *scores, const floatX *q, const floatX *k,
                                     const floatX *v, Dims d);
static void attention_hopper_backward(floatX *dq, floatX *dk, floatX *dv, floatX *scores, const floatX *dout,
                                      const float *lse, const floatX *q, const floatX *k, const floatX *v, Dims d);
#endif

static int run_count(Dims d) { return d.L % d.C == 0 ? 1 : ceil_div(d.L, d.C); }
static Run run_number(int i, Dims d) {
    if (d.L % d.C == 0) return Run{0, d.C, d.B * (d.L / d.C), d.C};
    return Run{(size_t)i * d.C, d.L, d.B, min_int(d.C, d.L - i * d.C)};
}

// Chunks whose scores exist at a time, and a part of a run with that many, from chunk `first` on.
static size_t chunk_scores(Dims d) { return (size_t)min_int(QUERY_TILE, d.C) * d.C; }
static int chunks_at_once(Dims d) { return max_int((int)(SCORES / chunk_scores(d)), 1); }
static Run run_part(Run run, int first, Dims d) {
    return Run{run.row + (size_t)first * run.step, run.step, min_int(run.chunks - first, chunks_at_once(d)), run.n};
}

static bool attention_fast_supports(const int *past, Dims d) {
    for (int b = 0; past && b < d.B; b++) {
        if (past[b] > 0) return false;
    }
    return d.C % VEC == 0;
}

// Elements of the scores that exist at a time; 0 if no call is supported.
static size_t attention_fast_scores(Dims d) {
    if (!attention_fast_supports(NULL, d)) return 0;
    size_t most = min_int(chunks_at_once(d), d.B * ceil_div(d.L, d.C)) * chunk_scores(d);
#ifdef HOPPER_KERNELS
    if (attention_hopper_scores(d) > most) most = attention_hopper_scores(d);
#endif
    return most;
}

// The row of query i of the tile, and the mask's index of its first key.
static __device__ size_t run_query_row(const RunTile *tile, size_t i) {
    return tile->row + i / tile->nq * tile->step + i % tile->nq;
}
static __device__ uint64_t run_query_mask(const Mask *mask, size_t row, int h, const Dims *d) {
    return (row / d->L * d->H + h) * mask->row + row % d->L * d->C;
}

// Formula: P = softmax(S), with the mask of dropout; lse = log sum_j e^(S_j). scores: S, replaced by P.
// Mapping: a warp has a query, a lane every 32nd vector.
// Memory: reads the scores twice (they are in the L2 cache), writes them once.
// Passes: 1. running maximum and sum of a lane. 2. of the warp. 3. probabilities, zero above the diagonal.
static __global__ void attention_fast_forward_kernel(floatX *scores, float *lse, RunTile tile, Mask mask, Dims d) {
    size_t i = warp_row();
    if (i >= (size_t)tile.batch * tile.nq) return;
    size_t row = run_query_row(&tile, i);
    floatX *s = scores + i * d.C;
    int seen = tile.nk - tile.nq + (int)(i % tile.nq) + 1; // keys at or before this query
    float x[VEC], max = -INFINITY, sum = 0;                // sum of e^(S - max) over what this lane has seen
    // 1. x - x is NaN where a score overflowed: -infinity would become a probability of 0
    for (int j = threadIdx.x * VEC; j < seen; j += WARP * VEC) {
        load<VEC>(x, s + j);
        float new_max = max;
#pragma unroll
        for (int u = 0; u < VEC; u++) new_max = j + u < seen ? fmaxf(new_max, x[u]) : new_max;
        if (new_max > max) sum *= exp_fast(max - new_max), max = new_max;
#pragma unroll
        for (int u = 0; u < VEC; u++) sum += j + u < seen ? exp_fast(x[u] - max) + (x[u] - x[u]) : 0;
    }
    // 2. a lane without keys has sum 0
    float all = warp_max(max);
    sum = warp_sum(sum != 0 ? sum * exp_fast(max - all) : 0);
    float scale = 1 / sum;
    // 3.
    for (int j = threadIdx.x * VEC; j < tile.nk; j += WARP * VEC) {
        load<VEC>(x, s + j);
#pragma unroll
        for (int u = 0; u < VEC; u++) {
            x[u] = j + u < seen ? exp_fast(x[u] - all) * scale : 0;
            if (mask.p > 0) x[u] *= mask_at(&mask, run_query_mask(&mask, row, tile.h, &d) + j + u);
        }
        store<VEC>(s + j, x);
    }
    if (threadIdx.x == 0) lse[row * d.H + tile.h] = all + logf(sum);
}

// Forward lines: P = softmax(S), o = P v.
// Formula: P_ij = e^(S_ij - lse_i) again, divided by its sum, since lse_i is rounded; dS_ij = P_ij (dP_ij - sum_j P_ij
//   dP_ij). With dropout, o = (mask P) v: dP is multiplied by the mask, and scores gets mask P, from which dv is
//   computed. scores: S, replaced by P; dscores: dP, replaced by dS.
// Mapping: a warp has a query, a lane every 32nd vector.
// Memory: reads both twice (they are in the L2 cache), writes both once.
// Passes: 1. sum of P and of P dP. 2. P and dS, zero above the diagonal.
static __global__ void attention_fast_backward_kernel(floatX *scores, floatX *dscores, const float *lse, RunTile tile,
                                                      Mask mask, Dims d) {
    size_t i = warp_row();
    if (i >= (size_t)tile.batch * tile.nq) return;
    size_t row = run_query_row(&tile, i);
    floatX *s = scores + i * d.C, *ds = dscores + i * d.C;
    int seen = tile.nk - tile.nq + (int)(i % tile.nq) + 1;
    float x[VEC], dx[VEC], l = lse[row * d.H + tile.h], dot = 0, sum = 0;
    // 1.
    for (int j = threadIdx.x * VEC; j < seen; j += WARP * VEC) {
        load<VEC>(x, s + j), load<VEC>(dx, ds + j);
#pragma unroll
        for (int u = 0; u < VEC; u++) {
            if (j + u >= seen) continue;
            if (mask.p > 0) dx[u] *= mask_at(&mask, run_query_mask(&mask, row, tile.h, &d) + j + u);
            x[u] = exp_fast(x[u] - l);
            dot += x[u] * dx[u], sum += x[u];
        }
    }
    float scale = 1 / warp_sum(sum);
    dot = warp_sum(dot) * scale;
    // 2.
    for (int j = threadIdx.x * VEC; j < tile.nk; j += WARP * VEC) {
        load<VEC>(x, s + j), load<VEC>(dx, ds + j);
#pragma unroll
        for (int u = 0; u < VEC; u++) {
            bool sees = j + u < seen;
            float keep = mask.p > 0 && sees ? mask_at(&mask, run_query_mask(&mask, row, tile.h, &d) + j + u) : 1;
            x[u] = sees ? exp_fast(x[u] - l) * scale : 0;
            dx[u] = sees ? x[u] * (dx[u] * keep - dot) : 0;
            x[u] *= keep;
        }
        store<VEC>(s + j, x), store<VEC>(ds + j, dx);
    }
}

// q, o begin with the tile's first query, k, v with the first key of its chunk.
static void attention_fast_tile(floatX *o, float *lse, floatX *scores, const floatX *q, const floatX *k,
                                const floatX *v, RunTile tile, Mask mask, Dims d) {
    int dz = d.Z / d.H, dv = d.E / d.H, nq = tile.nq, nk = tile.nk;
    int64_t z = (int64_t)tile.step * d.Z, e = (int64_t)tile.step * d.E, all = (int64_t)nq * d.C;
    Matrix Q = {q, d.Z, 0, z}, Kt = {k, d.Z, 1, z}, V = {v, d.E, 0, e}, P = {scores, d.C, 0, all};
    matmul_fast_batched(scores, d.C, all, Q, Kt, nq, nk, dz, 0, tile.batch);
    attention_fast_forward_kernel<<<ROW_GRID((size_t)tile.batch * nq)>>>(scores, lse, tile, mask, d);
    matmul_fast_batched(o, d.E, e, P, V, nq, dv, nk, 0, tile.batch);
}

static void attention_runs(floatX *o, float *lse, floatX *scores, const floatX *q, const floatX *k, const floatX *v,
                           Mask mask, Dims d) {
    HOPPER(attention_hopper_supports(mask, d), attention_hopper_forward(o, lse, scores, q, k, v, d));
    if (attention_small_supports(mask, d)) return attention_small_forward(o, lse, q, k, v, d);
    int dz = d.Z / d.H, dv = d.E / d.H;
    for (int r = 0; r < run_count(d); r++) {
        Run run = run_number(r, d);
        for (int first = 0; first < run.chunks; first += chunks_at_once(d)) {
            Run part = run_part(run, first, d);
            for (int h = 0; h < d.H; h++) {
                const floatX *keys = k + part.row * d.Z + h * dz, *values = v + part.row * d.E + h * dv;
                for (int i = 0; i < part.n; i += QUERY_TILE) {
                    size_t row = part.row + i;
                    RunTile tile = {row, part.step, part.chunks, min_int(QUERY_TILE, part.n - i), 0, h};
                    tile.nk = i + tile.nq;
                    attention_fast_tile(o + row * d.E + h * dv, lse, scores, q + row * d.Z + h * dz, keys, values, tile,
                                        mask, d);
                }
            }
        }
    }
}

static void attention_fast_forward(floatX *o, float *lse, float *cache_k, float *cache_v, floatX *scores,
                                   const floatX *q, const floatX *k, const floatX *v, const int *past, Mask mask,
                                   Dims d) {
    (void)past; // all 0
    attention_runs(o, lse, scores, q, k, v, mask, d);
    int left = d.L % d.C; // tokens of an unfinished last chunk
    for (int b = 0; cache_k && b < d.B; b++) cache_chunk(cache_k, cache_v, k, v, b, d.L - left, 0, left, d);
}

// dq, dout and q begin with the tile's first query, the others with the first key of its chunk.
typedef struct {
    floatX *dq, *dk, *dv, *scores, *dscores;
    const floatX *dout, *q, *k, *v;
} RunTensors;

// dq_i = sum_j dS_ij k_j is set; dk_j = sum_i dS_ij q_i and dv_j = sum_i P_ij dout_i are added to if `add`.
static void attention_fast_tile_backward(RunTensors a, const float *lse, RunTile tile, int add, Mask mask, Dims d) {
    int dz = d.Z / d.H, dv = d.E / d.H, nq = tile.nq, nk = tile.nk;
    int64_t z = (int64_t)tile.step * d.Z, e = (int64_t)tile.step * d.E, all = (int64_t)nq * d.C;
    Matrix Q = {a.q, d.Z, 0, z}, K = {a.k, d.Z, 0, z}, Kt = {a.k, d.Z, 1, z}, Vt = {a.v, d.E, 1, e};
    Matrix dO = {a.dout, d.E, 0, e}, Pt = {a.scores, d.C, 1, all}, dS = {a.dscores, d.C, 0, all};
    Matrix dSt = {a.dscores, d.C, 1, all};
    matmul_fast_batched(a.scores, d.C, all, Q, Kt, nq, nk, dz, 0, tile.batch);
    matmul_fast_batched(a.dscores, d.C, all, dO, Vt, nq, nk, dv, 0, tile.batch);
    attention_fast_backward_kernel<<<ROW_GRID((size_t)tile.batch * nq)>>>(a.scores, a.dscores, lse, tile, mask, d);
    matmul_fast_batched(a.dq, d.Z, z, dS, K, nq, dz, nk, 0, tile.batch);
    matmul_fast_batched(a.dk, d.Z, z, dSt, Q, nk, dz, nq, add, tile.batch);
    matmul_fast_batched(a.dv, d.E, e, Pt, dO, nk, dv, nq, add, tile.batch);
}

static void attention_fast_backward(floatX *dq, floatX *dk, floatX *dv_out, floatX *scores, const floatX *dout,
                                    const float *lse, const floatX *q, const floatX *k, const floatX *v, Mask mask,
                                    Dims d) {
    HOPPER(attention_hopper_supports(mask, d),
           attention_hopper_backward(dq, dk, dv_out, scores, dout, lse, q, k, v, d));
    if (attention_small_supports(mask, d)) return attention_small_backward(dq, dk, dv_out, dout, lse, q, k, v, d);
    int dz = d.Z / d.H, dv = d.E / d.H;
    floatX *dscores = scores + attention_fast_scores(d);
    for (int r = 0; r < run_count(d); r++) {
        Run run = run_number(r, d);
        for (int first = 0; first < run.chunks; first += chunks_at_once(d)) {
            Run part = run_part(run, first, d);
            int last = (part.n - 1) / QUERY_TILE * QUERY_TILE;
            for (int h = 0; h < d.H; h++) {
                size_t z = part.row * d.Z + h * dz, e = part.row * d.E + h * dv;
                for (int i = last; i >= 0; i -= QUERY_TILE) { // the last tile sees all keys: it sets dk and dv
                    size_t zi = z + (size_t)i * d.Z, ei = e + (size_t)i * d.E;
                    RunTile tile = {part.row + i, part.step, part.chunks, min_int(QUERY_TILE, part.n - i), 0, h};
                    tile.nk = i + tile.nq;
                    RunTensors a = {dq + zi, dk + z, dv_out + e, scores, dscores, dout + ei, q + zi, k + z, v + e};
                    attention_fast_tile_backward(a, lse, tile, i < last, mask, d);
                }
            }
        }
    }
}
