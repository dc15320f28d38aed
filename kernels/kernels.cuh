/*
kernels.cuh: the list of the fast kernels. megalodon.cu includes it in bfloat16 builds, unless PLAIN=1. Each file
replaces plain functions of megalodon.cu, which call it in a line FAST(supported, call), or HOPPER(supported, call):

    matmul.cuh         linear_*: cuBLASLt, which adds biases and residuals in the same kernel
    elementwise.cuh    silu_*, gate_*: a thread loads 16 bytes with one instruction
    timestep_norm.cuh  timestep_norm_*: token blocks in a warp, columns in registers
    cema.cuh           cema_forward: token blocks as matrix products on tensor cores (mma.cuh)
    cema_backward.cuh  cema_backward: the same for the gradients
    norms.cuh          rmsnorm_*, layernorm_*: rows in registers; sum_rows of biases
    qk.cuh             qk_layer_*: norm, affine map and rotation in one kernel
    attention.cuh      attention_*: all chunks in one batch, softmax on vectors
    hopper.cuh         for Hopper GPUs: products whose result is worked on while it is in registers (wgmma.cuh)
    linear_hopper.cuh  linear_silu_* and linear_gate_* with them
    attention_hopper.cuh  attention_* with them
    loss.cuh           cross_entropy: softmax on vectors
    decode.cuh         megalodon_forward for one token: all layers in one kernel (decode_linear.cuh)
    graph.cuh          megalodon_forward, _loss, _backward in training: all launches as one CUDA graph
    beside.cuh         BESIDE(call), JOIN(): two branches in such a graph
*/
#pragma once
#include "graph.cuh"
#include "beside.cuh"
#include "common.cuh"
#include "matmul.cuh"
#include "elementwise.cuh"
#include "timestep_norm.cuh"
#include "mma.cuh"
#include "cema.cuh"
#include "cema_backward.cuh"
#include "norms.cuh"
#include "qk.cuh"
#include "attention.cuh"
#ifdef HOPPER_KERNELS
#include "hopper.cuh"
#include "linear_hopper.cuh"
#include "attention_hopper.cuh"
#endif
#include "loss.cuh"

static size_t decode_workspace(Dims d); // decode.cuh is included later, since it uses the model

// Bytes of workspace() that the fast kernels use at most.
static size_t fast_workspace(Dims d) {
    const size_t sizes[] = {timestep_norm_fast_workspace(d), cema_fast_workspace(d), norms_fast_workspace(d),
                            qk_fast_workspace(d), decode_workspace(d)};
    size_t max = 0;
#ifdef HOPPER_KERNELS
    const size_t attention = attention_hopper_workspace(d), linear = linear_hopper_workspace(d);
    max = attention > linear ? attention : linear;
#endif
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) max = sizes[i] > max ? sizes[i] : max;
    return max;
}
