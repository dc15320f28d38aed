/*
mma.cuh: matrix products of 16 x 8 tiles on tensor cores, C (16,8) += A (16,16) B (16,8), by a warp. For cema.cuh and
attention_small.cuh.

A, B and C are spread over the lanes' registers in fragments: mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16
with floating point type"). A word has two neighbours of a row of A, or of a column of B. With row = lane/4 and pair =
lane%4, a lane has
    A   word 0: (row, 2 pair), (row, 2 pair + 1)   1: row + 8   2: columns + 8   3: row + 8, columns + 8
    B   word 0: (2 pair, row), (2 pair + 1, row)   1: rows + 8
    C   0, 1: (row, 2 pair), (row, 2 pair + 1)     2, 3: row + 8

Tensor cores multiply bfloat16 and add in float. A float has 24 bits, a bfloat16 has 8, so a float is a sum of up to
three bfloat16 terms, and a product of floats a sum of products of terms.
Requires: bfloat16, sm_80.
*/
#pragma once

typedef Vec<2> Pair; // two neighbours

static __device__ uint32_t word_of(Pair pair) {
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
}

// Splits two neighbours into P terms each: word p has term p of both. Loops of constant length are unrolled, here and
// below, so that arrays are kept in registers.
template <int P> static __device__ void split(uint32_t words[P], float x, float y) {
    for (int p = 0; p < P; p++) {
        __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
        memcpy(&words[p], &two, sizeof two);
        x -= __uint_as_float(words[p] << 16), y -= __uint_as_float(words[p] & 0xffff0000);
    }
}

// C += A B. Products of term i of A and term j of B with i + j >= max(P, Q) are left out: they are below the last bit
// that max(P, Q) terms represent.
template <int P, int Q> static __device__ void multiply(float c[4], const uint32_t a[4][P], const uint32_t b[2][Q]) {
    for (int i = 0; i < P; i++) {
        for (int j = 0; j < Q && i + j < (P > Q ? P : Q); j++) {
            asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                "{%0,%1,%2,%3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0][i]), "r"(a[1][i]), "r"(a[2][i]), "r"(a[3][i]), "r"(b[0][j]), "r"(b[1][j]));
        }
    }
}

// ldmatrix.x4 (PTX ISA): the four 8 x 8 blocks of a 16 x 16 tile in shared memory, whose rows are `stride` elements
// apart and begin at multiples of 16 bytes. Word 0 is of rows and columns 0 to 7, 1: rows + 8, 2: columns + 8, 3: both.
// So the words are a fragment of A. If the tile is the transpose of B, words 0, 2 and 1, 3 are two fragments of B.
// TRANSPOSED: each block is transposed. If the tile is B, words 0, 1 and 2, 3 are two fragments of B.
template <bool TRANSPOSED> static __device__ void load_fragment(uint32_t words[4][1], const floatX *tile, int stride) {
    uint32_t row = (uint32_t)__cvta_generic_to_shared(tile + threadIdx.x % 16 * stride + threadIdx.x / 16 * 8);
    if (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(words[0][0]), "=r"(words[1][0]), "=r"(words[2][0]), "=r"(words[3][0])
                     : "r"(row));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(words[0][0]), "=r"(words[1][0]), "=r"(words[2][0]), "=r"(words[3][0])
                     : "r"(row));
    }
}

// Sum and maximum over the four lanes that have a row of C; each gets the result.
static __device__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
static __device__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
