/*
attention_hopper.cuh: attention of whole chunks with products of hopper.cuh, instead of those of attention.cuh.

The idea: scores are computed for whole chunks, but only in tiles of 256 x 256 that are not wholly above the diagonal.
The softmax is part of the products where it can be. A product's epilogue has a tile of 256 keys in registers, from
which it leaves e^(S - m), and for each row the maximum m and the sum. The probabilities need the maximum of the whole
row, so a kernel of its own scales the tiles of a row:

    keys      256    256    256              forward
    queries +------+                         1. S = q k', left as E = e^(S - m_tile), m_tile and sum_tile
        256 |      |                         2. P_ij = E_ij e^(m_tile - lse_i)
            +------+------+                  3. o = P v, from the keys up to the last query of a tile
        256 |      |      |                  backward
            +------+------+------+           1. P = e^(q k' - lse)
        256 |      |      |      |           2. W = P dP, with dP = do v', and the sums of P and W over a tile's rows
            +------+------+------+           3. dS_ij = W_ij - P_ij sum_j W_ij
                                             4. dq = dS k   5. dk = dS' q   6. dv = P' do, from a tile's first key

So S and dP are never written, and of 8 x 8 tiles 36 are computed. Where |lse| is large, its rounding changes P: the
backward pass then divides P and W by the sum of P.
Requires: hopper.cuh; heads of 256 values or more, chunks of 256 tokens or more, no dropout.
Measured: see dev/notes/kernels.md.
*/
#pragma once

enum { HOPPER_SCORES = 1 << 25 }; // elements of the score matrices that exist at a time, but at least those of a chunk

static int hopper_chunks(Dims d) { return max_int((int)(HOPPER_SCORES / ((int64_t)d.C * d.C)), 1); }

static bool attention_hopper_supports(Mask mask, Dims d) {
    return attention_fast_supports(NULL, d) && min_int(d.C, d.L) >= 256 && d.E / d.H >= 256 && d.E / d.H % VEC == 0 &&
           d.Z / d.H % VEC == 0 && mask.p == 0;
}

static size_t attention_hopper_scores(Dims d) {
    if (!gpu.hopper || !attention_hopper_supports(Mask{}, d)) return 0;
    return (size_t)min_int(hopper_chunks(d), d.B * ceil_div(d.L, d.C)) * d.C * d.C;
}

// Bytes: a maximum and a sum for each row of a tile.
static size_t attention_hopper_workspace(Dims d) {
    return attention_hopper_scores(d) / d.C * ceil_div(d.C, TILE_N) * sizeof(float2);
}

// One head of some chunks of a run, at most hopper_chunks().
typedef struct {
    Run run;
    int h, tiles; // tiles of 256 keys
} HopperPart;

// All runs have the same number of chunks.
static int parts_of_run(Dims d) { return ceil_div(run_number(0, d).chunks, hopper_chunks(d)); }
static int hopper_parts(Dims d) { return run_count(d) * parts_of_run(d) * d.H; }
static HopperPart hopper_part(int i, Dims d) {
    Run run = run_number(i / d.H / parts_of_run(d), d);
    int first = i / d.H % parts_of_run(d) * hopper_chunks(d);
    run.row += (size_t)first * run.step, run.chunks = min_int(run.chunks - first, hopper_chunks(d));
    return HopperPart{run, i % d.H, ceil_div(d.C, TILE_N)};
}

// Row i of a part: the row of the call.
static __host__ __device__ size_t part_row(const HopperPart *part, int layer, int i) {
    return part->run.row + (size_t)layer * part->run.step + i;
}

// The index of what row `row` leaves for tile n of its keys. (chunks,C,tiles)
static __device__ size_t tile_index(const HopperPart *part, ClusterTile t, int row, int C) {
    return ((size_t)t.layer * C + row) * part->tiles + t.n;
}

// What an epilogue knows of the two rows of a thread, `row` and 8 below: a number of each, and a sum over the tile.
struct TwoRows {
    int row;
    float value[2], sum[2];
};

// e^(S - m), with m the maximum of a row in this tile; 0 above the diagonal.
struct ScoresEpilogue : Epilogue {
    enum { INPUTS = 0, OUTPUTS = 1 };
    typedef TwoRows Rows;
    HopperPart part;
    float2 *tiles; // maximum and sum
    int C;
    __device__ TwoRows begin(const float *x, ClusterTile, int row, int c) const {
        TwoRows rows = {row, {-INFINITY, -INFINITY}, {0, 0}};
#pragma unroll
        for (int j = 0; j < 32; j++) {
#pragma unroll
            for (int u = 0; u < 4; u++) {
                int half = u / 2;
                if (c + 8 * j + u % 2 <= row + 8 * half) rows.value[half] = fmaxf(rows.value[half], x[4 * j + u]);
            }
        }
        rows.value[0] = quad_max(rows.value[0]), rows.value[1] = quad_max(rows.value[1]);
        return rows;
    }
    // 0 x is NaN where a score overflowed: -infinity would become a probability of 0
    __device__ float one(float x, TwoRows *rows, int half, int c) const {
        float e = c <= rows->row + 8 * half ? fmaf(0, x, __expf(x - rows->value[half])) : 0;
        rows->sum[half] += e;
        return e;
    }
    __device__ void apply(float2 *out, float2 x, const float2 *, float2, TwoRows *rows, int half, int c) const {
        out[0].x = one(x.x, rows, half, c), out[0].y = one(x.y, rows, half, c + 1);
    }
    __device__ void end(const TwoRows *rows, ClusterTile t) const {
        for (int half = 0; half < 2; half++) {
            float sum = quad_sum(rows->sum[half]);
            int row = rows->row + 8 * half;
            if (threadIdx.x % 4 == 0 && row < part.run.n)
                tiles[tile_index(&part, t, row, C)] = make_float2(rows->value[half], sum);
        }
    }
};

// P = e^(S - lse)
struct ProbabilitiesEpilogue : Epilogue {
    enum { INPUTS = 0, OUTPUTS = 1 };
    typedef TwoRows Rows;
    HopperPart part;
    const float *lse;
    int H;
    __device__ TwoRows begin(const float *, ClusterTile t, int row, int) const {
        TwoRows rows = {row, {0, 0}, {0, 0}};
        for (int half = 0; half < 2; half++) {
            if (row + 8 * half < part.run.n)
                rows.value[half] = lse[part_row(&part, t.layer, row + 8 * half) * H + part.h];
        }
        return rows;
    }
    __device__ void apply(float2 *out, float2 x, const float2 *, float2, TwoRows *rows, int half, int c) const {
        int row = rows->row + 8 * half;
        out[0].x = c <= row ? __expf(x.x - rows->value[half]) : 0;
        out[0].y = c < row ? __expf(x.y - rows->value[half]) : 0;
    }
};

// W = P dP; tiles: the sums of P (value) and of W over a row of a tile. P is 0 above the diagonal.
struct WeightedEpilogue : Epilogue {
    enum { INPUTS = 1, OUTPUTS = 1 };
    typedef TwoRows Rows;
    HopperPart part;
    float2 *tiles;
    int C;
    __device__ TwoRows begin(const float *, ClusterTile, int row, int) const { return TwoRows{row, {0, 0}, {0, 0}}; }
    __device__ void apply(float2 *out, float2 x, const float2 *p, float2, TwoRows *rows, int half, int c) const {
        int row = rows->row + 8 * half;
        out[0].x = c <= row ? p[0].x * x.x : 0, out[0].y = c < row ? p[0].y * x.y : 0;
        rows->value[half] += p[0].x + p[0].y, rows->sum[half] += out[0].x + out[0].y;
    }
    __device__ void end(const TwoRows *rows, ClusterTile t) const {
        for (int half = 0; half < 2; half++) {
            float p = quad_sum(rows->value[half]), sum = quad_sum(rows->sum[half]);
            int row = rows->row + 8 * half;
            if (threadIdx.x % 4 == 0 && row < part.run.n) tiles[tile_index(&part, t, row, C)] = make_float2(p, sum);
        }
    }
};

// Formula: lse_i = log of the sum over tiles of sum_tile e^m_tile; P_ij = E_ij e^(m_tile - lse_i), E replaced by P,
//   which is computed from the sum, not from lse, which is rounded.
// Mapping: a warp has a query, a lane every 32nd vector, that is one of each tile.
// Memory: reads and writes the scores once.
// Passes: 1. the maximum and sum of all tiles. 2. the probabilities.
static __global__ void attention_scale_kernel(floatX *scores, float *lse, const float2 *tiles, HopperPart part, int C,
                                              int H) {
    int i = (int)warp_row(), layer = blockIdx.y, lane = threadIdx.x, last = i / TILE_N;
    if (i >= part.run.n) return;
    const float2 *mine = tiles + ((size_t)layer * C + i) * part.tiles;
    float max = -INFINITY, sum = 0, x[VEC];
    // 1.
    for (int n = lane; n <= last; n += WARP) max = fmaxf(max, mine[n].x);
    max = warp_max(max);
    for (int n = lane; n <= last; n += WARP) sum += mine[n].y * exp_fast(mine[n].x - max);
    sum = warp_sum(sum);
    if (lane == 0) lse[part_row(&part, layer, i) * H + part.h] = max + logf(sum);
    // 2.
    floatX *row = scores + ((size_t)layer * C + i) * C;
    for (int n = 0; n <= last; n++) {
        int j = n * TILE_N + lane * VEC;
        if (j >= C) return;
        float scale = exp_fast(mine[n].x - max) / sum;
        load<VEC>(x, row + j);
#pragma unroll
        for (int u = 0; u < VEC; u++) x[u] *= scale;
        store<VEC>(row + j, x);
    }
}

// Formula: dS_ij = W_ij - P_ij sum_j W_ij, W replaced by dS. Where |lse| is so large that its rounding matters, P and W
//   are divided by the sum of P, which otherwise is 1.
// Mapping: as above. Memory: reads the scores and W once, writes dS, and P where it is divided.
// Passes: 1. the sums of all tiles. 2. dS.
static __global__ void attention_subtract_kernel(floatX *dscores, floatX *scores, const float2 *tiles, HopperPart part,
                                                 int C) {
    int i = (int)warp_row(), layer = blockIdx.y, lane = threadIdx.x, last = i / TILE_N;
    if (i >= part.run.n) return;
    size_t row = (size_t)layer * C + i;
    float p_sum = 0, w_sum = 0, p[VEC], w[VEC];
    // 1.
    for (int n = lane; n <= last; n += WARP) {
        float2 tile = tiles[row * part.tiles + n];
        p_sum += tile.x, w_sum += tile.y;
    }
    float scale = 1 / warp_sum(p_sum);
    float mean = warp_sum(w_sum) * scale;
    bool divide = !(fabsf(scale - 1) < 0x1p-8f); // more than rounding P to bfloat16 explains
    // 2.
    for (int n = 0; n <= last; n++) {
        int j = n * TILE_N + lane * VEC;
        if (j >= C) return;
        load<VEC>(w, dscores + row * C + j), load<VEC>(p, scores + row * C + j);
#pragma unroll
        for (int u = 0; u < VEC; u++) w[u] = (w[u] - p[u] * mean) * scale, p[u] *= scale;
        store<VEC>(dscores + row * C + j, w);
        if (divide) store<VEC>(scores + row * C + j, p);
    }
}
#define PART_GRID(part) dim3(ceil_div((part).run.n, ROW_WARPS), (part).run.chunks), dim3(WARP, ROW_WARPS)

// The square matrices of a part, (chunks,C,C), and the rows of some (R,D) of which a part has `columns` columns.
static Matrix square(const floatX *scores, int C) { return Matrix{scores, C, 0, (int64_t)C * C}; }
static Matrix part_rows(const HopperPart *part, const floatX *at, int D, int columns) {
    return Matrix{at + part->run.row * D + (size_t)part->h * columns, D, 0, (int64_t)part->run.step * D};
}
static Matrix flip(Matrix a) {
    a.transposed = !a.transposed;
    return a;
}

// out (n,N) = the epilogue e of A B, for all chunks of a part. in: what the epilogue reads, if it reads something.
template <int A_T, int B_T, class E>
static void part_product(Matrix out, Matrix A, Matrix B, int N, int K, const HopperPart *part, Causal causal, Matrix in,
                         const E &e) {
    int n = part->run.n, batch = part->run.chunks;
    assert(A.transposed == A_T && B.transposed == !B_T);
    Product p = product(A, B, n, N, K, batch, causal);
    p.outputs[0] = output_map(out, n, N, batch);
    if (E::INPUTS) p.inputs[0] = input_map(in, n, N, batch);
    hopper_launch<A_T, B_T>(&p, e);
}

static void attention_hopper_forward(floatX *o, float *lse, floatX *scores, const floatX *q, const floatX *k,
                                     const floatX *v, Dims d) {
    int dz = d.Z / d.H, dv = d.E / d.H;
    float2 *tiles = (float2 *)workspace(attention_hopper_workspace(d));
    for (int i = 0; i < hopper_parts(d); i++) {
        HopperPart part = hopper_part(i, d);
        Matrix Q = part_rows(&part, q, d.Z, dz), K = part_rows(&part, k, d.Z, dz), V = part_rows(&part, v, d.E, dv);
        Matrix P = square(scores, d.C), O = part_rows(&part, o, d.E, dv);
        ScoresEpilogue e;
        e.part = part, e.tiles = tiles, e.C = d.C;
        part_product<0, 0>(P, Q, flip(K), part.run.n, dz, &part, BELOW, P, e);
        attention_scale_kernel<<<PART_GRID(part)>>>(scores, lse, tiles, part, d.C, d.H);
        part_product<0, 1>(O, P, V, dv, part.run.n, &part, UP_TO_ROW, P, Plain());
    }
}

static void attention_hopper_backward(floatX *dq, floatX *dk, floatX *dv_out, floatX *scores, const floatX *dout,
                                      const float *lse, const floatX *q, const floatX *k, const floatX *v, Dims d) {
    int dz = d.Z / d.H, dv = d.E / d.H;
    floatX *dscores = scores + attention_hopper_scores(d);
    float2 *tiles = (float2 *)workspace(attention_hopper_workspace(d));
    for (int i = 0; i < hopper_parts(d); i++) {
        HopperPart part = hopper_part(i, d);
        Matrix Q = part_rows(&part, q, d.Z, dz), K = part_rows(&part, k, d.Z, dz), V = part_rows(&part, v, d.E, dv);
        Matrix dQ = part_rows(&part, dq, d.Z, dz), dK = part_rows(&part, dk, d.Z, dz);
        Matrix dV = part_rows(&part, dv_out, d.E, dv), dO = part_rows(&part, dout, d.E, dv);
        Matrix P = square(scores, d.C), dS = square(dscores, d.C);
        int n = part.run.n;
        ProbabilitiesEpilogue probabilities;
        probabilities.part = part, probabilities.lse = lse, probabilities.H = d.H;
        part_product<0, 0>(P, Q, flip(K), n, dz, &part, BELOW, P, probabilities);
        WeightedEpilogue weighted;
        weighted.part = part, weighted.tiles = tiles, weighted.C = d.C;
        part_product<0, 0>(dS, dO, flip(V), n, dv, &part, BELOW, P, weighted);
        attention_subtract_kernel<<<PART_GRID(part)>>>(dscores, scores, tiles, part, d.C);
        part_product<0, 1>(dQ, dS, K, dz, n, &part, UP_TO_ROW, P, Plain());
        part_product<1, 1>(dK, flip(dS), Q, dz, n, &part, FROM_ROW, P, Plain());
        part_product<1, 1>(dV, flip(P), dO, dv, n, &part, FROM_ROW, P, Plain());
    }
}
