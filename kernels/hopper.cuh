/*
hopper.cuh: matrix products of Hopper GPUs (compute capability 9.0) whose result is worked on before it is written.

The idea: cuBLAS writes a product, and a second kernel reads it to apply silu, a gate or a softmax. Here one kernel does
both: it applies them to a tile of the product while the tile is in registers. What it applies is the *epilogue*.

    A cluster of two thread blocks has 256 x 256 of the result, each block 128 x 256. Along K it goes in steps of 64:

                      B  64 x 256, a half loaded by each thread block, for both
                    +----------------+
         A 64       |                |          thread block: 3 warpgroups of 128 threads
      +----+        +----------------+          producer    one thread loads steps with the copy engine (TMA)
      |  0 | 128    |  consumer 0    |          consumer 0  multiplies rows 0 to 63 on tensor cores (wgmma)
      |    |        |  consumer 1    |          consumer 1  rows 64 to 127
      +----+        +----------------+
      |  1 | 128    |  thread block  |          The steps go through a ring of STAGES slots in shared memory. The
      |    |        |       1        |          producer fills a slot when it is empty; the consumers empty a slot when
      +----+        +----------------+          it is full. So the producer runs ahead, into the next tile, too.

What an epilogue reads (say r of the gate o silu(r)) goes through the same ring, in boxes of 128 x 64 elements, after
the tile's last step. What it writes goes through boxes of 64 x 64 in shared memory, from which the copy engine stores.

Boxes have rows of 128 bytes, of which the copy engine permutes the eight vectors of 16 bytes: vector v of row r lies at
v ^ (r % 8) (the 128-byte swizzle), so that neither tensor cores nor threads meet bank conflicts.

Requires: compute capability 9.0, bfloat16, rows that begin at multiples of 16 bytes. Sizes need not be multiples of a
tile: the copy engine reads zeros outside of a matrix, and does not write there.
Measured: see dev/notes/kernels.md.
*/
#pragma once
#include "wgmma.cuh"

enum {
    TILE_M = 128, // rows of the result that a thread block has; a cluster of two has 256
    TILE_N = 256, // columns
    TILE_K = 64,  // columns of A and rows of B in one step
    BOX = 64,     // columns of a box: 128 bytes
    STAGES = 4,   // slots of the ring
    CONSUMERS = 2,
    SLOT_A = TILE_M * TILE_K,        // elements of A in a slot
    SLOT = SLOT_A + TILE_N * TILE_K, // elements of a slot
    OUT_BOX = 64 * BOX,              // elements of a box that a consumer writes
    OUT_BOXES = 2,                   // of each consumer
    MAX_INPUTS = 2,                  // matrices that an epilogue reads
    MAX_OUTPUTS = 3,                 // and writes
    HOPPER_THREADS = (1 + CONSUMERS) * 128,
    HOPPER_SHARED = (STAGES * SLOT + CONSUMERS * OUT_BOXES * OUT_BOX) * 2 + 2 * STAGES * 8 + 1024, // bytes
};

// Which tiles and steps a product of attention's square matrices (queries x keys) needs.
typedef enum {
    ALL,
    BELOW,     // the result is such a matrix: only tiles with keys at or before the last query
    UP_TO_ROW, // A is such a matrix: keys up to the last query of the tile
    FROM_ROW,  // A is the transpose of such a matrix: queries from the first key of the tile on
} Causal;

// C = op(A) op(B), in `batch` layers; inputs and outputs of the epilogue have the layout of C.
typedef struct {
    CUtensorMap a, b, inputs[MAX_INPUTS], outputs[MAX_OUTPUTS];
    int tiles_m, tiles_n, steps, batch; // tiles of a cluster, steps of TILE_K
    Causal causal;
} Product;

typedef struct {
    int m, n, layer; // in tiles of a cluster
    int begin, end;  // steps
} ClusterTile;

static __host__ __device__ int tile_count(const Product *p) {
    int square = p->causal == BELOW ? p->tiles_m * (p->tiles_m + 1) / 2 : p->tiles_m * p->tiles_n;
    return square * p->batch;
}

// Tile i in the order in which they are begun, those with most steps first.
static __device__ ClusterTile tile_number(const Product *p, int i) {
    const int per_tile = 2 * TILE_M / TILE_K;
    ClusterTile t = {0, 0, 0, 0, p->steps};
    if (p->causal == BELOW) {
        int tiles = p->tiles_m * (p->tiles_m + 1) / 2;
        t.layer = i / tiles, i %= tiles;
        while ((t.m + 1) * (t.m + 2) / 2 <= i) t.m++;
        t.n = i - t.m * (t.m + 1) / 2;
        return t;
    }
    t.n = i % p->tiles_n, i /= p->tiles_n;
    t.layer = i % p->batch, t.m = i / p->batch;
    if (p->causal == UP_TO_ROW) t.m = p->tiles_m - 1 - t.m, t.end = min_int(p->steps, (t.m + 1) * per_tile);
    if (p->causal == FROM_ROW) t.begin = t.m * per_tile;
    return t;
}

static __device__ float2 unpack(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
}
static __device__ uint32_t pack(float x, float y) {
    __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
    uint32_t word;
    memcpy(&word, &two, sizeof word);
    return word;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// ----------------------------------------------------------------------------
// the kernel

// Where a thread block is in the ring: the slot, and how often the ring has been around.
typedef struct {
    int slot;
    uint32_t round;
} Ring;
static __device__ void ring_next(Ring *ring) {
    if (++ring->slot == STAGES) ring->slot = 0, ring->round++;
}

typedef struct {
    floatX *slots, *boxes; // boxes: of all consumers
    uint64_t *full, *empty;
    int block; // of the cluster
} Shared;

// One step of both operands: A of this thread block, and its half of B for both.
template <int A_T, int B_T>
static __device__ void load_step(const Product *p, const Shared *s, int slot, ClusterTile t, int step) {
    floatX *a = s->slots + slot * SLOT, *b = a + SLOT_A + s->block * (TILE_N / 2) * TILE_K;
    uint64_t *full = s->full + slot;
    int k = step * TILE_K, row = (2 * t.m + s->block) * TILE_M, column = t.n * TILE_N + s->block * (TILE_N / 2);
    barrier_expect(full, SLOT * (int)sizeof(floatX));
    if (A_T) {
        load_box(a, &p->a, full, row, k, t.layer);
        load_box(a + BOX * TILE_K, &p->a, full, row + BOX, k, t.layer);
    } else {
        load_box(a, &p->a, full, k, row, t.layer);
    }
    if (B_T) {
        load_box_for_cluster(b, &p->b, full, column, k, t.layer);
        load_box_for_cluster(b + BOX * TILE_K, &p->b, full, column + BOX, k, t.layer);
    } else {
        load_box_for_cluster(b, &p->b, full, k, column, t.layer);
    }
}

// Where box i of what an epilogue reads comes from: the inputs take turns, for each group of BOX columns.
typedef struct {
    const CUtensorMap *map;
    int column, row;
} InputBox;
template <int INPUTS> static __device__ InputBox input_box(const Product *p, const Shared *s, ClusterTile t, int i) {
    return InputBox{&p->inputs[i % INPUTS], t.n * TILE_N + i / INPUTS * BOX, (2 * t.m + s->block) * TILE_M};
}

// Two boxes to a slot.
template <int INPUTS>
static __device__ void load_inputs(const Product *p, const Shared *s, int slot, ClusterTile t, int i) {
    barrier_expect(s->full + slot, 2 * TILE_M * BOX * (int)sizeof(floatX));
    for (int j = 0; j < 2; j++) {
        InputBox box = input_box<INPUTS>(p, s, t, 2 * i + j);
        load_box(s->slots + slot * SLOT + j * TILE_M * BOX, box.map, s->full + slot, box.column, box.row, t.layer);
    }
}

template <int A_T, int B_T, int INPUTS> static __device__ void produce(const Product *p, const Shared *s) {
    Ring ring = {0, 0};
    for (int i = blockIdx.x / 2; i < tile_count(p); i += gridDim.x / 2) {
        ClusterTile t = tile_number(p, i);
        for (int step = t.begin; step < t.end; step++, ring_next(&ring)) {
            barrier_wait(s->empty + ring.slot, (ring.round & 1) ^ 1);
            load_step<A_T, B_T>(p, s, ring.slot, t, step);
            if constexpr (INPUTS > 0) { // they come from memory while steps are multiplied
                InputBox box = input_box<INPUTS>(p, s, t, step - t.begin);
                if (step - t.begin < INPUTS * TILE_N / BOX) prefetch_box(box.map, box.column, box.row, t.layer);
            }
        }
        if constexpr (INPUTS > 0) {
            for (int j = 0; j < INPUTS * TILE_N / BOX / 2; j++, ring_next(&ring)) {
                barrier_wait(s->empty + ring.slot, (ring.round & 1) ^ 1);
                load_inputs<INPUTS>(p, s, ring.slot, t, j);
            }
        }
    }
}

// Tells the producers of both thread blocks that this consumer has read a slot.
static __device__ void release(const Shared *s, int slot) {
    if (threadIdx.x % 128 < 2) barrier_arrive(s->empty + slot, threadIdx.x % 128);
}

// d = the steps of a tile, of the 64 rows of this consumer. A slot is released when the next step's products are begun.
template <int A_T, int B_T>
static __device__ void multiply_tile(float d[128], const Shared *s, Ring *ring, int steps, int consumer) {
    int before = -1;
    for (int step = 0; step < steps; step++, ring_next(ring)) {
        const floatX *slot = s->slots + ring->slot * SLOT;
        barrier_wait(s->full + ring->slot, ring->round & 1);
        uint64_t a = operand(slot + consumer * 64 * TILE_K, 0), b = operand(slot + SLOT_A, TILE_K * BOX * 2);
        products_begin();
#pragma unroll
        for (int k = 0; k < TILE_K / 16; k++) // 16 along K: 32 bytes of a row, or 16 rows of 128 bytes; in units of 16
            multiply_add<A_T, B_T>(d, a + k * (A_T ? 128 : 2), b + k * (B_T ? 128 : 2), step > 0 || k > 0);
        products_commit();
        products_wait<1>();
        if (before >= 0) release(s, before);
        before = ring->slot;
    }
    products_wait<0>();
    if (before >= 0) release(s, before);
}

// The word of columns 8 j + lane%4 2 and the one after, in row r of a box.
static __device__ uint32_t *box_word(floatX *box, int r, int j) {
    return (uint32_t *)(box + r * BOX + (j ^ r % 8) * 8 + threadIdx.x % 4 * 2);
}

// Writes words (2,8), rows r and r + 8, through the next of the consumer's boxes.
static __device__ const floatX *write_box(const Shared *s, int consumer, int *box, const uint32_t words[16],
                                          const CUtensorMap *map, int column, int row, int layer) {
    floatX *to = s->boxes + (consumer * OUT_BOXES + *box) * OUT_BOX;
    int r = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    *box = (*box + 1) % OUT_BOXES;
    if (threadIdx.x % 128 == 0) wait_stores_read<OUT_BOXES - 1>();
    consumer_sync(consumer);
#pragma unroll
    for (int j = 0; j < 8; j++) *box_word(to, r, j) = words[j], *box_word(to, r + 8, j) = words[8 + j];
    fence_for_copy_engine();
    consumer_sync(consumer);
    if (threadIdx.x % 128 == 0) store_box(map, to, column, row, layer);
    return to;
}

// Parts of sums over rows: each warp leaves those of 16 rows of a box, a thread those of two columns. sums (R/16,D).
static __device__ void sum_columns(float *sums, const floatX *box, int row, int column, int D) {
    int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, c = column + 2 * lane;
    float2 sum = make_float2(0, 0);
#pragma unroll
    for (int r = 16 * warp; r < 16 * warp + 16; r++) {
        float2 x = unpack(*(const uint32_t *)(box + r * BOX + (lane / 4 ^ r % 8) * 8 + lane % 4 * 2));
        sum.x += x.x, sum.y += x.y;
    }
    if (c < D) *(float2 *)(sums + (size_t)(row / 16 + warp) * D + c) = sum;
}

template <int A_T, int B_T, class E>
static __device__ void consume(const Product *p, const Shared *s, const E &e, int consumer) {
    Ring ring = {0, 0};
    int lane = threadIdx.x % 32, r = threadIdx.x % 128 / 32 * 16 + lane / 4, box = 0;
    float d[128];
    for (int i = blockIdx.x / 2; i < tile_count(p); i += gridDim.x / 2) {
        ClusterTile t = tile_number(p, i);
        multiply_tile<A_T, B_T>(d, s, &ring, t.end - t.begin, consumer);
        int row = (2 * t.m + s->block) * TILE_M + consumer * 64, column = t.n * TILE_N;
        int c = column + lane % 4 * 2; // this thread's first column
        typename E::Rows rows = e.begin(d, t, row + r, c);
#pragma unroll
        for (int g = 0; g < TILE_N / BOX; g++) {
            const int boxes = E::INPUTS == 1 ? 2 : 1; // groups of columns in a slot
            floatX *in = s->slots + ring.slot * SLOT + g % boxes * TILE_M * BOX;
            uint32_t words[E::OUTPUTS][16];
            if (E::INPUTS && g % boxes == 0) barrier_wait(s->full + ring.slot, ring.round & 1);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 of_columns = e.columns(c + g * BOX + 8 * j);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float *x = d + 4 * (8 * g + j) + 2 * half;
                    float2 inputs[E::INPUTS + 1], outputs[E::OUTPUTS];
#pragma unroll
                    for (int k = 0; k < E::INPUTS; k++)
                        inputs[k] = unpack(*box_word(in + k * TILE_M * BOX, consumer * 64 + r + 8 * half, j));
                    e.apply(outputs, make_float2(x[0], x[1]), inputs, of_columns, &rows, half, c + g * BOX + 8 * j);
#pragma unroll
                    for (int k = 0; k < E::OUTPUTS; k++) words[k][8 * half + j] = pack(outputs[k].x, outputs[k].y);
                }
            }
            if (E::INPUTS && g % boxes == boxes - 1) release(s, ring.slot), ring_next(&ring);
#pragma unroll
            for (int k = 0; k < E::OUTPUTS; k++) {
                const floatX *written =
                    write_box(s, consumer, &box, words[k], &p->outputs[k], column + g * BOX, row, t.layer);
                if (k == E::SUMMED && e.sums) sum_columns(e.sums, written, row, column + g * BOX, e.columns_of_sums);
            }
        }
        e.end(&rows, t);
    }
    if (threadIdx.x % 128 == 0) wait_stores_read<0>();
}
#endif

// Mapping: see the drawing above. The registers that the producer does not need go to the consumers.
template <int A_T, int B_T, class E>
static __global__ __launch_bounds__(HOPPER_THREADS, 1) void hopper_kernel(const __grid_constant__ Product p,
                                                                          const E e) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ char shared[];
    Shared s;
    s.slots = (floatX *)(((uintptr_t)shared + 1023) / 1024 * 1024), s.boxes = s.slots + STAGES * SLOT;
    s.full = (uint64_t *)(s.boxes + CONSUMERS * OUT_BOXES * OUT_BOX), s.empty = s.full + STAGES;
    s.block = blockIdx.x % 2;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(s.full + i, 1), barrier_init(s.empty + i, 2 * CONSUMERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    int group = threadIdx.x / 128;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) produce<A_T, B_T, E::INPUTS>(&p, &s);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        consume<A_T, B_T>(&p, &s, e, group - 1);
    }
    cluster_sync(); // no thread block ends while the other may still arrive at its barriers
#endif
}

// ----------------------------------------------------------------------------
// epilogues: INPUTS matrices read, OUTPUTS written, all with the layout of the result
//
// begin()    before the tile is worked on: what the thread's rows r and r + 8 need (Rows)
// columns()  what columns c and c + 1 need
// apply()    the outputs of two neighbours, columns c and c + 1 of row r + 8 half, from their product x and the inputs
// end()      after the tile: what the rows leave
// SUMMED     the output whose sums over rows are left in sums (R/16,D); -1: none

struct NoRows {};
struct Epilogue { // what most epilogues do not need
    typedef NoRows Rows;
    enum { SUMMED = -1, columns_of_sums = 0 };
    static constexpr float *sums = NULL;
    __device__ NoRows begin(const float *, ClusterTile, int, int) const { return NoRows(); }
    __device__ float2 columns(int) const { return make_float2(0, 0); }
    template <class R> __device__ void end(const R *, ClusterTile) const {}
};

// The product itself.
struct Plain : Epilogue {
    enum { INPUTS = 0, OUTPUTS = 1 };
    __device__ void apply(float2 *out, float2 x, const float2 *, float2, NoRows *, int, int) const { out[0] = x; }
};

// ----------------------------------------------------------------------------
// host: tensor maps and launches

// Was this program compiled for sm_90a, and not only for others?
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
static __device__ int hopper_code = 1;
#else
static __device__ int hopper_code;
#endif
static int has_hopper_code(void) {
    int has = 0;
    cudaCheck(cudaMemcpyFromSymbol(&has, hopper_code, sizeof has));
    return has;
}

typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The boxes of a row-major matrix: `batch` layers of (rows,columns), rows ld elements apart.
static CUtensorMap tensor_map(const floatX *at, int rows, int columns, int ld, int batch, int64_t stride,
                              int box_rows) {
    static EncodeTiled encode;
    CUtensorMap map;
    cuuint64_t sizes[] = {(cuuint64_t)columns, (cuuint64_t)rows, (cuuint64_t)batch};
    cuuint64_t strides[] = {(cuuint64_t)ld * sizeof(floatX), (cuuint64_t)(batch > 1 ? stride : ld) * sizeof(floatX)};
    cuuint32_t box[] = {BOX, (cuuint32_t)box_rows, 1}, steps[] = {1, 1, 1};
    if (encode == NULL) {
        cudaDriverEntryPointQueryResult found;
        cudaCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000, cudaEnableDefault,
                                                   &found));
    }
    CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)at, sizes, strides, box, steps,
                             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        fprintf(stderr, "error: %s: no tensor map for a matrix of (%d,%d) (CUDA: %d)\n", gpu.name, rows, columns,
                (int)status);
        exit(1);
    }
    return map;
}

// The product of `batch` layers of (M,K) and (K,N), without inputs and outputs.
static Product product(Matrix A, Matrix B, int M, int N, int K, int batch, Causal causal) {
    Product p;
    memset(&p, 0, sizeof p);
    p.a = A.transposed ? tensor_map(A.at, K, M, A.ld, batch, A.stride, TILE_K)
                       : tensor_map(A.at, M, K, A.ld, batch, A.stride, TILE_M);
    p.b = B.transposed ? tensor_map(B.at, N, K, B.ld, batch, B.stride, TILE_N / 2)
                       : tensor_map(B.at, K, N, B.ld, batch, B.stride, TILE_K);
    p.tiles_m = ceil_div(M, 2 * TILE_M), p.tiles_n = ceil_div(N, TILE_N), p.steps = ceil_div(K, TILE_K);
    p.batch = batch, p.causal = causal;
    return p;
}

// What an epilogue reads and writes: `batch` layers of (M,N).
static CUtensorMap input_map(Matrix m, int M, int N, int batch) {
    return tensor_map(m.at, M, N, m.ld, batch, m.stride, TILE_M);
}
static CUtensorMap output_map(Matrix m, int M, int N, int batch) {
    return tensor_map(m.at, M, N, m.ld, batch, m.stride, 64);
}

// A_T: A is transposed; B_T: B is not, so that its rows are not along K.
template <int A_T, int B_T, class E> static void hopper_launch(const Product *p, const E &e) {
    static int clusters; // that the GPU runs at a time
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = 2, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(2), config.blockDim = dim3(HOPPER_THREADS), config.dynamicSmemBytes = HOPPER_SHARED;
    config.stream = gpu.stream;
    config.attrs = &cluster, config.numAttrs = 1;
    if (clusters == 0) {
        cudaCheck(cudaFuncSetAttribute(hopper_kernel<A_T, B_T, E>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       HOPPER_SHARED));
        cudaCheck(cudaOccupancyMaxActiveClusters(&clusters, hopper_kernel<A_T, B_T, E>, &config));
    }
    config.gridDim = dim3(2 * min_int(clusters, tile_count(p)));
    cudaCheck(cudaLaunchKernelEx(&config, hopper_kernel<A_T, B_T, E>, *p, e));
}
