/*
elementwise.cuh: replaces the plain kernels of silu and of the gate out = a silu(b).

Idea. These kernels only move memory, so the number of memory instructions is what matters. A thread loads, computes and
stores VEC = 8 bfloat16 elements with one instruction of 16 bytes each:

    thread       0          1          2                    THREADS - 1
    inp     | 8 elements | 8 elements | 8 elements |  ...  | 8 elements |   one thread block: 2048 elements
    out     | 8 elements | 8 elements | 8 elements |  ...  | 8 elements |

Requires: bfloat16. Arrays begin at multiples of 16 bytes and have room for whole vectors. This holds for all buffers
of a model (see take() in plumbing/model.h), so n can be any number.
Measured: see dev/notes/kernels.md.
*/
#pragma once

// First of the VEC elements of this thread.
static __device__ size_t first_element(void) { return thread_index() * VEC; }

// Formula: out = x sigmoid(x). Mapping: a thread has VEC elements. Memory: reads and writes n. Passes: one.
static __global__ void silu_fast_forward_kernel(floatX *out, const floatX *inp, size_t n) {
    size_t i = first_element();
    float x[VEC];
    if (i >= n) return;
    load<VEC>(x, inp + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) x[k] *= sigmoid_fast(x[k]);
    store<VEC>(out + i, x);
}

static void silu_fast_forward(floatX *out, const floatX *inp, size_t n) {
    silu_fast_forward_kernel<<<blocks_for(n, THREADS * VEC), THREADS, 0, gpu.stream>>>(out, inp, n);
}

// Forward line: out = x s with s = sigmoid(x).
// Formula: dx = dout s (1 + x (1 - s)), and out again unless it is NULL. dinp may be dout.
// Mapping: a thread has VEC elements. Memory: reads 2 n, writes n or 2 n. Passes: one.
static __global__ void silu_fast_backward_kernel(floatX *out, floatX *dinp, const floatX *dout, const floatX *inp,
                                                 size_t n) {
    size_t i = first_element();
    float x[VEC], d[VEC];
    if (i >= n) return;
    load<VEC>(x, inp + i), load<VEC>(d, dout + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        float s = sigmoid_fast(x[k]);
        d[k] *= s * (1 + x[k] * (1 - s));
        x[k] *= s;
    }
    store<VEC>(dinp + i, d);
    if (out) store<VEC>(out + i, x);
}

static void silu_fast_backward(floatX *out, floatX *dinp, const floatX *dout, const floatX *inp, size_t n) {
    silu_fast_backward_kernel<<<blocks_for(n, THREADS * VEC), THREADS>>>(out, dinp, dout, inp, n);
}

// Formula: out = a b sigmoid(b). Mapping: a thread has VEC elements. Memory: reads 2 n, writes n. Passes: one.
static __global__ void gate_fast_forward_kernel(floatX *out, const floatX *a, const floatX *b, size_t n) {
    size_t i = first_element();
    float x[VEC], y[VEC];
    if (i >= n) return;
    load<VEC>(x, a + i), load<VEC>(y, b + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) x[k] *= y[k] * sigmoid_fast(y[k]);
    store<VEC>(out + i, x);
}

static void gate_fast_forward(floatX *out, const floatX *a, const floatX *b, size_t n) {
    gate_fast_forward_kernel<<<blocks_for(n, THREADS * VEC), THREADS>>>(out, a, b, n);
}

// Forward line: out = a b s with s = sigmoid(b).
// Formula: da = dout b s, db = dout a s (1 + b (1 - s)), and out again unless it is NULL. da may be dout.
// Mapping: a thread has VEC elements. Memory: reads 3 n, writes 3 n. Passes: one.
static __global__ void gate_fast_backward_kernel(floatX *out, floatX *da, floatX *db, const floatX *dout,
                                                 const floatX *a, const floatX *b, size_t n) {
    size_t i = first_element();
    float x[VEC], y[VEC], d[VEC];
    if (i >= n) return;
    load<VEC>(x, a + i), load<VEC>(y, b + i), load<VEC>(d, dout + i);
#pragma unroll
    for (int k = 0; k < VEC; k++) {
        float s = sigmoid_fast(y[k]), silu = y[k] * s, dy = d[k] * (x[k] * (s * (1 + y[k] * (1 - s))));
        x[k] *= silu, d[k] *= silu, y[k] = dy;
    }
    if (out) store<VEC>(out + i, x);
    store<VEC>(da + i, d), store<VEC>(db + i, y);
}

static void gate_fast_backward(floatX *out, floatX *da, floatX *db, const floatX *dout, const floatX *a,
                               const floatX *b, size_t n) {
    gate_fast_backward_kernel<<<blocks_for(n, THREADS * VEC), THREADS>>>(out, da, db, dout, a, b, n);
}
