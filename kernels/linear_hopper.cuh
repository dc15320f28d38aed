/*
linear_hopper.cuh: a linear map together with the silu or gate next to it, as one product of hopper.cuh.

The idea: silu(x W' + b) costs a kernel of its own 4 bytes of memory traffic an element, and the gradient of a gate 12.
The product writes and reads those elements anyway, or has them in registers. So they become epilogues:

    linear_silu_forward     tile of pre -> + bias -> pre, silu(pre)                 writes 2
    linear_silu_backward    tile of d = dy W, reads pre -> d silu'(pre), silu(pre)  reads 1, writes 2
    linear_gate_backward    tile of d = dy W, reads a, b -> da, db, a silu(b)       reads 2, writes 3, and sums of db

The sums over rows, for the gradient of a bias, are taken from the boxes in shared memory through which db is written:
each warp leaves the sum of 16 rows, and sum_parts_fast() adds those in a fixed order.
Requires: hopper.cuh; R of at least HOPPER_ROWS, so that there are tiles for all multiprocessors; no dropout between.
Measured: see dev/notes/kernels.md.
*/
#pragma once

enum { HOPPER_ROWS = 2048 };

static bool linear_hopper_supports(int R, int K, int M) { return R >= HOPPER_ROWS && K % VEC == 0 && M % VEC == 0; }

static __device__ float2 rounded_pair(float2 x) { return unpack(pack(x.x, x.y)); }

// pre = product + bias, out = silu(pre)
struct Silu : Epilogue {
    enum { INPUTS = 0, OUTPUTS = 2 };
    const floatX *bias; // or NULL
    int D;
    __device__ float2 columns(int c) const {
        return bias && c < D ? unpack(*(const uint32_t *)(bias + c)) : make_float2(0, 0);
    }
    __device__ void apply(float2 *out, float2 x, const float2 *, float2 b, NoRows *, int, int) const {
        out[0] = x = rounded_pair(make_float2(x.x + b.x, x.y + b.y));
        out[1] = make_float2(x.x * sigmoid_fast(x.x), x.y * sigmoid_fast(x.y));
    }
};

// The product is the gradient d w.r.t. silu(x), x the input. With s = sigmoid(x): dx = d s (1 + x (1 - s)), and x s.
struct SiluBackward : Epilogue {
    enum { INPUTS = 1, OUTPUTS = 2 };
    static __device__ void one(float *dx, float *out, float d, float x) {
        float s = sigmoid_fast(x);
        *dx = d * (s * (1 + x * (1 - s))), *out = x * s;
    }
    __device__ void apply(float2 *out, float2 d, const float2 *x, float2, NoRows *, int, int) const {
        one(&out[0].x, &out[1].x, d.x, x[0].x), one(&out[0].y, &out[1].y, d.y, x[0].y);
    }
};

// The product is the gradient d w.r.t. a silu(b), a and b the inputs. With s = sigmoid(b): da = d b s,
// db = d a s (1 + b (1 - s)), and a b s. The sums of db over rows are the gradient of a bias in b.
struct GateBackward : Epilogue {
    enum { INPUTS = 2, OUTPUTS = 3, SUMMED = 1 };
    float *sums;
    int columns_of_sums;
    static __device__ void one(float *da, float *db, float *out, float d, float a, float b) {
        float s = sigmoid_fast(b), silu = b * s;
        *da = d * silu, *db = d * (a * (s * (1 + b * (1 - s)))), *out = a * silu;
    }
    __device__ void apply(float2 *out, float2 d, const float2 *x, float2, NoRows *, int, int) const {
        one(&out[0].x, &out[1].x, &out[2].x, d.x, x[0].x, x[1].x);
        one(&out[0].y, &out[1].y, &out[2].y, d.y, x[0].y, x[1].y);
    }
};

// ----------------------------------------------------------------------------
// the functions of megalodon.cu, with the same arguments

static void linear_silu_hopper_forward(floatX *out, floatX *pre, const floatX *inp, const floatX *weight,
                                       const floatX *bias, int R, int K, int M) {
    Product p = product(matrix(inp, K), transposed(weight, K), R, M, K, 1, ALL);
    p.outputs[0] = output_map(matrix(pre, M), R, M, 1), p.outputs[1] = output_map(matrix(out, M), R, M, 1);
    Silu e;
    e.bias = bias, e.D = M;
    hopper_launch<0, 0>(&p, e);
}

static void linear_silu_hopper_backward(floatX *out, floatX *dpre, const floatX *dy, const floatX *weight,
                                        const floatX *pre, int R, int K, int M) {
    Product p = product(matrix(dy, M), matrix(weight, K), R, K, M, 1, ALL);
    p.inputs[0] = input_map(matrix(pre, K), R, K, 1);
    p.outputs[0] = output_map(matrix(dpre, K), R, K, 1), p.outputs[1] = output_map(matrix(out, K), R, K, 1);
    hopper_launch<0, 1>(&p, SiluBackward());
}

// Rows of sums that GateBackward leaves.
static int gate_sums(int R) { return ceil_div(R, 2 * TILE_M) * 2 * TILE_M / 16; }
static size_t linear_hopper_workspace(Dims d) {
    return gpu.hopper ? (size_t)gate_sums(d.B * d.L) * d.E * sizeof(float) : 0;
}

static void linear_gate_hopper_backward(floatX *out, floatX *da, floatX *db, float *dbias, const floatX *dy,
                                        const floatX *weight, const floatX *a, const floatX *b, int R, int K, int M) {
    Product p = product(matrix(dy, M), matrix(weight, K), R, K, M, 1, ALL);
    p.inputs[0] = input_map(matrix(a, K), R, K, 1), p.inputs[1] = input_map(matrix(b, K), R, K, 1);
    p.outputs[0] = output_map(matrix(da, K), R, K, 1), p.outputs[1] = output_map(matrix(db, K), R, K, 1);
    p.outputs[2] = output_map(matrix(out, K), R, K, 1);
    GateBackward e;
    size_t bytes = (size_t)gate_sums(R) * K * sizeof(float);
    e.sums = dbias ? parts_memory(bytes, workspace(bytes)) : NULL, e.columns_of_sums = K;
    hopper_launch<0, 1>(&p, e);
    if (dbias) sum_parts_fast(dbias, NULL, e.sums, gate_sums(R), K, 0, 1);
}
