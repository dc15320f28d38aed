/*
hopper.cuh: matrix products of Hopper GPUs (compute capability 9.0) whose result is worked on before it is written.

The idea: cuBLAS writes a product, and a second kernel reads it to apply silu, a gate or a softmax. Here the kernel that
computes a tile of the product applies them while the tile is in registers. Such a function of a tile is an *epilogue*.

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
      +----+        +----------------+          it is full. The producer so runs ahead, into the next tile, too.

What an epilogue reads (say r of the gate o silu(r)) goes through the same ring, in boxes of 128 x 64 elements, after the
tile's last step. What it writes goes through boxes of 64 x 64 in shared memory, from which the copy engine stores.

Boxes have rows of 128 bytes, of which the copy engine permutes the eight vectors of 16 bytes: vector v of row r lies at
v ^ (r % 8) (the 128-byte swizzle), so that neither tensor cores nor threads meet bank conflicts.

Requires: compute capability 9.0, bfloat16, rows that begin at multiples of 16 bytes. Sizes need not be multiples of a
tile: the copy engine reads zeros outside of a matrix, and does not write there.
Measured: see dev/notes/kernels.md.
*/
#pragma once
#include <cuda.h> // CUtensorMap

enum {
    TILE_M = 128, // rows of the result that a thread block has; a cluster of two has 256
    TILE_N = 256, // columns
    TILE_K = 64,  // columns of A and rows of B in one step
    BOX = 64,     // columns of a box: 128 bytes
    STAGES = 4,   // slots of the ring
    CONSUMERS = 2,
    SLOT_A = TILE_M * TILE_K,            // elements of A in a slot
    SLOT = SLOT_A + TILE_N * TILE_K,     // elements of a slot
    OUT_BOX = 64 * BOX,                  // elements of a box that a consumer writes
    OUT_BOXES = 2,                       // of each consumer
    MAX_PIECES = 3,                      // pieces of a matrix product, see Product
    MAX_INPUTS = 2,                      // matrices that an epilogue reads
    HOPPER_THREADS = (1 + CONSUMERS) * 128,
    HOPPER_SHARED = (STAGES * SLOT + CONSUMERS * OUT_BOXES * OUT_BOX) * 2 + 2 * STAGES * 8 + 1024, // bytes
};

// Which tiles and steps a product of attention's square matrices (queries x keys) needs.
typedef enum {
    ALL,
    BELOW,      // the result is such a matrix: only tiles with keys at or before the last query
    UP_TO_ROW,  // A is such a matrix: keys up to the last query of the tile
    FROM_ROW,   // A is the transpose of such a matrix: queries from the first key of the tile on
} Causal;

// C = op(A) op(B), where C may be up to three matrices side by side, each with its own B, or where the sum over K may
// be that of up to three products, each with its own A and B. All matrices have `batch` layers.
typedef struct {
    CUtensorMap a[MAX_PIECES], b[MAX_PIECES], inputs[MAX_INPUTS], outputs[MAX_PIECES];
    int tiles_m, tiles_n, steps, batch; // of the whole product: tiles of a cluster, steps of TILE_K
    int column_pieces;                  // pieces lie side by side along N (otherwise along K)
    int end[MAX_PIECES];                // the tile, or step, at which a piece ends
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

// ----------------------------------------------------------------------------
// the instructions: barriers in shared memory, the copy engine, and the tensor cores of a warpgroup

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

static __device__ uint32_t shared_address(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }

static __device__ void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
static __device__ void barrier_expect(uint64_t *barrier, int bytes) { // arrives, and expects bytes of the copy engine
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
static __device__ void barrier_arrive(uint64_t *barrier, int block) { // at the barrier of a thread block of the cluster
    asm volatile("{\n.reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
                 "r"(block)
                 : "memory");
}
static __device__ void barrier_wait(uint64_t *barrier, uint32_t parity) { // until the phase of this parity is over
    asm volatile("{\n.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}
static __device__ void cluster_sync(void) {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
static __device__ void consumer_sync(int consumer) { // the 128 threads of a consumer
    asm volatile("bar.sync %0, 128;" ::"r"(1 + consumer) : "memory");
}

// Loads the box at (column, row, layer) to shared memory of this thread block, or of all those in the mask.
static __device__ void load_box(void *dst, const CUtensorMap *map, uint64_t *barrier, int column, int row, int layer) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
                 "[%2];" ::"r"(shared_address(dst)),
                 "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(layer)
                 : "memory");
}
static __device__ void load_box_for_cluster(void *dst, const CUtensorMap *map, uint64_t *barrier, int column, int row,
                                            int layer) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                 "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(dst)),
                 "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(layer), "h"((uint16_t)3)
                 : "memory");
}
static __device__ void prefetch_box(const CUtensorMap *map, int column, int row, int layer) { // to the L2 cache
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(map), "r"(column), "r"(row),
                 "r"(layer)
                 : "memory");
}
static __device__ void store_box(const CUtensorMap *map, const void *src, int column, int row, int layer) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];\n"
                 "cp.async.bulk.commit_group;" ::"l"(map),
                 "r"(shared_address(src)), "r"(column), "r"(row), "r"(layer)
                 : "memory");
}
template <int LEFT> static __device__ void wait_stores_read(void) { // all but the last LEFT stores have read their boxes
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
static __device__ void fence_for_copy_engine(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Describes an operand in shared memory to the tensor cores: rows of 128 bytes, swizzled, 8 rows are 1024 bytes. If the
// rows are not along K, boxes of 64 rows of K lie `next` bytes apart.
static __device__ uint64_t operand(const void *at, int next) {
    uint64_t address = (shared_address(at) & 0x3ffff) >> 4, swizzle_128 = 1; // without the number of the thread block
    return address | (uint64_t)(next >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | swizzle_128 << 62;
}
static __device__ void products_begin(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ void products_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> static __device__ void products_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// d (64,256) = A (64,16) B (16,256), added to d if `add`. A_T, B_T: rows of the box in shared memory are not along K.
// A thread has rows warp 16 + lane/4 (+ 8) and columns 8 j + lane%4 2 (+ 1), as d[4 j + {0, 1}] (d[4 j + {2, 3}]).
template <int A_T, int B_T> static __device__ void multiply_add(float d[128], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, p, 1, 1, %131, %132;\n}\n"
        :
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(a), "l"(b), "r"(add), "n"(A_T), "n"(B_T));
}

// ----------------------------------------------------------------------------
// the kernel

static __device__ int piece_of(const Product *p, int i) {
    int piece = 0;
    while (piece < MAX_PIECES - 1 && i >= p->end[piece]) piece++;
    return piece;
}

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
    int piece = piece_of(p, p->column_pieces ? t.n : step), first = piece > 0 ? p->end[piece - 1] : 0;
    int k = (step - (p->column_pieces ? 0 : first)) * TILE_K, row = (2 * t.m + s->block) * TILE_M;
    int column = (t.n - (p->column_pieces ? first : 0)) * TILE_N + s->block * (TILE_N / 2);
    const CUtensorMap *map_a = &p->a[p->column_pieces ? 0 : piece], *map_b = &p->b[piece];
    barrier_expect(full, SLOT * (int)sizeof(floatX));
    if (A_T) {
        load_box(a, map_a, full, row, k, t.layer);
        load_box(a + BOX * TILE_K, map_a, full, row + BOX, k, t.layer);
    } else {
        load_box(a, map_a, full, k, row, t.layer);
    }
    if (B_T) {
        load_box_for_cluster(b, map_b, full, column, k, t.layer);
        load_box_for_cluster(b + BOX * TILE_K, map_b, full, column + BOX, k, t.layer);
    } else {
        load_box_for_cluster(b, map_b, full, k, column, t.layer);
    }
}

// Two boxes of what an epilogue reads.
template <int INPUTS> static __device__ void load_inputs(const Product *p, const Shared *s, int slot, ClusterTile t, int i) {
    barrier_expect(s->full + slot, 2 * TILE_M * BOX * (int)sizeof(floatX));
#pragma unroll
    for (int j = 0; j < 2; j++) {
        int group = (2 * i + j) / INPUTS, row = (2 * t.m + s->block) * TILE_M;
        load_box(s->slots + slot * SLOT + j * TILE_M * BOX, &p->inputs[(2 * i + j) % INPUTS], s->full + slot,
                 t.n * TILE_N + group * BOX, row, t.layer);
    }
}

template <int A_T, int B_T, int INPUTS> static __device__ void produce(const Product *p, const Shared *s) {
    Ring ring = {0, 0};
    for (int i = blockIdx.x / 2; i < tile_count(p); i += gridDim.x / 2) {
        ClusterTile t = tile_number(p, i);
        for (int step = t.begin; step < t.end; step++, ring_next(&ring)) {
            barrier_wait(s->empty + ring.slot, (ring.round & 1) ^ 1);
            load_step<A_T, B_T>(p, s, ring.slot, t, step);
            int i = step - t.begin; // what the epilogue reads comes from memory while steps are multiplied
            if (INPUTS > 0 && i < INPUTS * TILE_N / BOX)
                prefetch_box(&p->inputs[i % (INPUTS + !INPUTS)], t.n * TILE_N + i / (INPUTS + !INPUTS) * BOX,
                             (2 * t.m + s->block) * TILE_M, t.layer);
        }
        if constexpr (INPUTS > 0) {
            for (int j = 0; j < 2 * INPUTS; j++, ring_next(&ring)) {
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
        int piece = p->column_pieces ? piece_of(p, t.n) : 0, first = piece > 0 ? p->end[piece - 1] : 0;
        int row = (2 * t.m + s->block) * TILE_M + consumer * 64, column = (t.n - first) * TILE_N;
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
                float2 of_columns = e.columns(piece, c + g * BOX + 8 * j);
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
                const floatX *written = write_box(s, consumer, &box, words[k], &p->outputs[p->column_pieces ? piece : k],
                                                  column + g * BOX, row, t.layer);
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
static __global__ __cluster_dims__(2) __launch_bounds__(HOPPER_THREADS, 1) void hopper_kernel(
    const __grid_constant__ Product p, const E e) {
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
    __device__ float2 columns(int, int) const { return make_float2(0, 0); }
    template <class R> __device__ void end(const R *, ClusterTile) const {}
};

// out = product + bias
struct Plain : Epilogue {
    enum { INPUTS = 0, OUTPUTS = 1 };
    const floatX *bias; // or NULL
    __device__ float2 columns(int, int c) const {
        return bias ? unpack(*(const uint32_t *)(bias + c)) : make_float2(0, 0);
    }
    __device__ void apply(float2 *out, float2 x, const float2 *, float2 b, NoRows *, int, int) const {
        out[0] = make_float2(x.x + b.x, x.y + b.y);
    }
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
static CUtensorMap tensor_map(const floatX *at, int rows, int columns, int ld, int batch, int64_t stride, int box_rows) {
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

// The product of `batch` layers of (M,K) and (K,N), without outputs.
static Product product(Matrix A, Matrix B, int M, int N, int K, int batch, Causal causal) {
    Product p;
    memset(&p, 0, sizeof p);
    p.a[0] = A.transposed ? tensor_map(A.at, K, M, A.ld, batch, A.stride, TILE_K)
                          : tensor_map(A.at, M, K, A.ld, batch, A.stride, TILE_M);
    p.b[0] = B.transposed ? tensor_map(B.at, N, K, B.ld, batch, B.stride, TILE_N / 2)
                          : tensor_map(B.at, K, N, B.ld, batch, B.stride, TILE_K);
    p.tiles_m = ceil_div(M, 2 * TILE_M), p.tiles_n = ceil_div(N, TILE_N), p.steps = ceil_div(K, TILE_K);
    p.batch = batch, p.causal = causal;
    for (int i = 0; i < MAX_PIECES; i++) p.end[i] = INT32_MAX;
    return p;
}

static CUtensorMap output_map(const floatX *at, int M, int N, int ld, int batch, int64_t stride) {
    return tensor_map(at, M, N, ld, batch, stride, 64);
}
static CUtensorMap input_map(const floatX *at, int M, int N, int ld, int batch, int64_t stride) {
    return tensor_map(at, M, N, ld, batch, stride, TILE_M);
}

template <int A_T, int B_T, class E> static void hopper_launch(const Product *p, const E &e) {
    static int clusters;
    if (clusters == 0) {
        cudaLaunchConfig_t config = {};
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = 2, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        cudaCheck(cudaFuncSetAttribute(hopper_kernel<A_T, B_T, E>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       HOPPER_SHARED));
        config.gridDim = dim3(2), config.blockDim = dim3(HOPPER_THREADS), config.dynamicSmemBytes = HOPPER_SHARED;
        config.attrs = &cluster, config.numAttrs = 1;
        cudaCheck(cudaOccupancyMaxActiveClusters(&clusters, hopper_kernel<A_T, B_T, E>, &config));
    }
    hopper_kernel<A_T, B_T, E>
        <<<2 * min_int(clusters, tile_count(p)), HOPPER_THREADS, HOPPER_SHARED>>>(*p, e);
}

template <class E> static void hopper_matmul(Matrix A, Matrix B, const Product *p, const E &e) {
    if (A.transposed && !B.transposed) hopper_launch<1, 1>(p, e);
    else if (!A.transposed && !B.transposed) hopper_launch<0, 1>(p, e);
    else hopper_launch<0, 0>(p, e);
}
