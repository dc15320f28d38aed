/*
wgmma.cuh: the instructions of Hopper GPUs that hopper.cuh uses, as functions: barriers in shared memory (mbarrier),
the copy engine (TMA), which moves boxes of a matrix (cp.async.bulk.tensor), and the tensor cores of a warpgroup
(wgmma). The names in brackets are those of the PTX ISA, which describes them.

A barrier counts arrivals, and the bytes that the copy engine still has to bring. When both are complete, its phase is
over, and the next one begins; phases have parities 0, 1, 0, ... A fresh barrier is in phase 0, and the phase before it,
of parity 1, counts as over.
Requires: sm_90a.
*/
#pragma once
#include <cuda.h> // CUtensorMap

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

// Loads the box at (column, row, layer) to shared memory of this thread block, or of both of the cluster.
static __device__ void load_box(void *dst, const CUtensorMap *map, uint64_t *barrier, int column, int row, int layer) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
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
template <int LEFT>
static __device__ void wait_stores_read(void) { // all but the last LEFT stores have read their boxes
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

// d (64,256) = A (64,16) B (16,256), added to d if `add`. A_T, B_T: a row of the box in shared memory is not along K.
// A thread has rows warp 16 + lane/4 (+ 8) and columns 8 j + lane%4 2 (+ 1), as d[4 j + {0, 1}] (d[4 j + {2, 3}]).
template <int A_T, int B_T> static __device__ void multiply_add(float d[128], uint64_t a, uint64_t b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
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
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                   "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                   "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),
                   "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),
                   "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]),
                   "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
                   "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]),
                   "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]),
                   "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),
                   "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
                   "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]),
                   "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]),
                   "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]),
                   "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]),
                   "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]),
                   "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]),
                   "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]),
                   "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
                 : "l"(a), "l"(b), "r"(add), "n"(A_T), "n"(B_T));
}
#endif
