/*
megalodon.h: what a Megalodon model is (configuration, parameters, state), and the functions that a backend implements.
megalodon.c implements them for the CPU and megalodon.cu for a GPU. A program is linked with one of the two, and uses
only what this file declares.

The model (arXiv 2404.08801; where the paper and the released code differ, this is the released code):

    tokens -> embedding -> num_layers x block -> TimestepNorm -> output -> logits

    block(x):  y = mega(x)                     attention sub-layer, its own residual inside
               out = nffn(y) + x               the FFN reads y, the residual is the block INPUT x (two hops)

    mega(x):   xt = TimestepNorm(x)            causal group norm over time
               mx = RMSNorm(CEMA(xt))          complex exponential moving average
               z  = RMSNorm_per_head(mx Wz' + bz)
               q  = z (gamma0+1)/sqrt(dz) + beta0        k = z (gamma1+1)/sqrt(dz) + beta1
               v  = silu(xt Wv' + bv)                    from xt, not mx
               r  = silu(mx Wr' + br)
               o  = causal attention(rope(q), rope(k), v) inside chunks of C tokens
               y  = (mx Wh1' + bh1) + (o * r) Wh2' + x

    nffn(y):   u = LayerNorm(y)
               [alpha *] (silu(u W1') [* (u W3')]) W2'

Here W' is the transpose of W, * multiplies element by element, and brackets are parts that a configuration may omit.

Letters used everywhere:
    B batch, L sequence length, V vocab_size, D model_dim, N cema_ndim, C chunk_size,
    H num_heads, Z z_dim, E value_dim, F ffn_hidden_dim, G norm_num_groups
    dz = Z/H and dv = E/H: widths of a head's key and value (in formulas; elsewhere dX is the gradient w.r.t. X)
    g = D/G: channels of a group

Why these parts
- Attention and a moving average complement each other. Attention finds any token exactly, but its cost grows with the
  square of the length. So it only looks inside chunks of C tokens, which makes the cost linear. CEMA has constant cost
  and an unlimited past, but it blurs that past into N numbers per channel. Its output is what queries, keys and gates
  are computed from, so each of them knows its recent context before attention begins.
- Information crosses a chunk border in two ways only: by CEMA's state h, and by TimestepNorm's running moments. What
  the attention of one layer finds in a chunk reaches later chunks through the CEMA of the next layer.
- Why complex: a real average can only decay. A complex coefficient |q| e^(i phi) decays and rotates, so each of the N
  numbers of a channel responds to its own period, like one term of a Fourier series.
- Why normalise over time: LayerNorm removes the mean and scale of every token separately. TimestepNorm keeps the
  differences between tokens and only removes what all tokens so far have in common. It is causal: token t uses the
  statistics of tokens 0 to t.
- Why the residual skips both sub-layers: in a pre-norm block the FFN's residual is its own input y, so every layer adds
  to the attention's output and large models become unstable (the paper, section 3.4). With two hops the FFN's residual
  is the block's input, so each block adds one branch to the residual stream instead of two.

Where the released code differs from the paper, or seems to
- The paper's Eq. 2 multiplies CEMA's input by e^(i phi), too. The released code does not. Rotating gamma by e^(-i phi)
  makes both the same model.
- The paper normalizes z to length 1. The released code has RMSNorm, which makes it sqrt(dz) long, and the factor
  1/sqrt(dz) in both q and k. Apart from norm_eps both are the same. The scores get no further scale.
- The attention sub-layer adds its own residual x. The block adds only the FFN's residual, which is x again.
*/
#ifndef MEGALODON_H
#define MEGALODON_H

#include <stddef.h>
#include <stdint.h>

#if SIZE_MAX < UINT64_MAX && !defined __wasm__
#error "a 64-bit target is needed: sizes in bytes are kept in size_t, and models and data files exceed 4 GiB"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a little-endian target is needed: tensors and tokens are copied from files, which are little-endian"
#endif
#if defined __FAST_MATH__ || __FINITE_MATH_ONLY__
#error "-ffast-math and -Ofast cannot be used: NaN must be recognised, and sums be computed in the order written"
#endif

// Numbers in host memory. The double build (-DMEGALODON_DOUBLE) is for gradient checks.
#ifdef MEGALODON_DOUBLE
typedef double real;
#else
typedef float real;
#endif

// ----------------------------------------------------------------------------
// configuration

typedef enum { HE, GAUSSIAN, XAVIER, BERT } InitMode; // initial values of linear weights, see INIT_LINEAR

// Parts of the model that can be replaced, so that one sees what they do (dev/notes/ablation.md). The first choice of
// each is Megalodon. Parameters that a choice does not use stay in the model, with gradient 0.
//     CEMA_REAL           all phases phi are 0, so that h is real and only gamma's real part counts: the EMA of Mega
//     CEMA_NONE           mx = RMSNorm(xt)
//     NORM_LAYER          LayerNorm of each token in place of TimestepNorm, also as the final norm
//     ATTENTION_STANDARD  z has no norm: q = z (gamma0+1)/dz^(1/4) + beta0, k = z (gamma1+1)/dz^(1/4) + beta1
//     ONE_HOP             out = nffn(y) + y, as in a pre-norm Transformer
typedef enum { CEMA_COMPLEX, CEMA_REAL, CEMA_NONE } CemaKind;
typedef enum { NORM_TIMESTEP, NORM_LAYER } NormKind;
typedef enum { ATTENTION_NORMALIZED, ATTENTION_STANDARD } AttentionKind;
typedef enum { TWO_HOPS, ONE_HOP } HopKind;

typedef struct {
    int num_layers, model_dim, z_dim, value_dim, num_heads, ffn_hidden_dim, cema_ndim, chunk_size;
    int vocab_size, norm_num_groups;
    int swiglu, rescale_nffn, scale_emb, share_emb, norm_affine; // booleans; ./train --help explains them
    double norm_eps, rope_base;
    double dropout, hidden_dropout, attention_dropout; // probabilities, in training only; see megalodon_dropout
    InitMode init_mode;
    CemaKind cema;
    NormKind timestep_norm;
    AttentionKind attention;
    HopKind two_hop;
} Config;

typedef struct {
    const char *name;
    Config config;
    int64_t num_parameters; // the sum of the parameter table's sizes, as a check
} Preset;

enum { NUM_PRESETS = 8 };
extern const Preset megalodon_presets[NUM_PRESETS]; // in plumbing/params.c

// ----------------------------------------------------------------------------
// parameters: one allocation in checkpoint order, and pointers into it

// One layer's parameters. Tensors that the configuration does not have are NULL: rmsnorm_weight, norm_weight and
// norm_bias without norm_affine, alpha without rescale_nffn, fc3 without swiglu.
typedef struct {
    real *gamma, *beta; // (2,Z) scale and shift of q (row 0) and k (row 1)
    real *timenorm_weight, *timenorm_bias;                                // (D)
    real *cema_alpha, *cema_delta, *cema_theta, *cema_gamma, *cema_omega; // (D,N) (D,N) (D) (D,N,2) (D)
    real *rmsnorm_weight;                                                 // (D)
    real *wv, *wv_bias, *wz, *wz_bias, *wr, *wr_bias, *wh1, *wh1_bias;    // (out,D) and (out)
    real *wh2;                                                            // (D,E), no bias
    real *alpha;                                                          // (D), rescale_nffn only
    real *norm_weight, *norm_bias;                                        // (D)
    real *fc1, *fc2, *fc3;                                                // (F,D) (D,F) (F,D), fc3 with swiglu only
} LayerParams;

typedef struct {
    real *embed;                               // (V,D)
    LayerParams *layers;                       // (num_layers)
    real *final_norm_weight, *final_norm_bias; // (D)
    real *output;                              // (V,D); embed itself with share_emb
} Params;

// Initial values. N(m, s) is a normal distribution with mean m and standard deviation s. All weights of norms, and
// gamma of q and k, are stored as an offset from one, so their initial value is 0.
typedef enum {
    INIT_ZERO,
    INIT_LINEAR,     // by init_mode: HE N(0, 1/sqrt(3 fan_in)), Kaiming normal with a = sqrt(5); XAVIER uniform in
                     // +-sqrt(6/(fan_in + fan_out)); BERT N(0, 0.02); GAUSSIAN N(0, 1) truncated at 3
    INIT_EMBED,      // N(0, 1/sqrt(D)) truncated at 3 deviations
    INIT_CEMA_LOGIT, // N(0, 0.2)
    INIT_CEMA_THETA, // ln(f/(1-f)), f = D^(-i/D), i = 1..D, in random order over the channels
    INIT_CEMA_GAMMA, // real part N(0,1), imaginary part 0
    INIT_CEMA_OMEGA, // N(0, 0.25) truncated to [-1, 1]
    INIT_NFFN_ALPHA, // 0.1 * 0.5^layer
} Init;

typedef enum { ALWAYS, IF_SWIGLU, IF_RESCALE, IF_AFFINE, IF_UNTIED } Condition; // when a tensor exists

typedef struct {
    const char *name;  // name in a checkpoint, without the "layers.i." that precedes it if per_layer
    int per_layer;     // 1: the pointer is in LayerParams, 0: in Params
    size_t field;      // offset of the pointer in that struct
    const char *shape; // for each dimension a letter (see the top of this file) or a digit
    Init init;
    Condition condition;
} ParamRow;

// clang-format off
#define IN_MODEL(f) 0, offsetof(Params, f)
#define IN_LAYER(f) 1, offsetof(LayerParams, f)
static const ParamRow megalodon_params[] = { // the parameter table, in checkpoint order
    {"embed.weight", IN_MODEL(embed), "VD", INIT_EMBED, ALWAYS},
    {"mega.gamma", IN_LAYER(gamma), "2Z", INIT_ZERO, ALWAYS},
    {"mega.beta", IN_LAYER(beta), "2Z", INIT_ZERO, ALWAYS},
    {"mega.timenorm.weight", IN_LAYER(timenorm_weight), "D", INIT_ZERO, ALWAYS},
    {"mega.timenorm.bias", IN_LAYER(timenorm_bias), "D", INIT_ZERO, ALWAYS},
    {"mega.cema.alpha", IN_LAYER(cema_alpha), "DN1", INIT_CEMA_LOGIT, ALWAYS},
    {"mega.cema.delta", IN_LAYER(cema_delta), "DN1", INIT_CEMA_LOGIT, ALWAYS},
    {"mega.cema.theta", IN_LAYER(cema_theta), "D11", INIT_CEMA_THETA, ALWAYS},
    {"mega.cema.gamma", IN_LAYER(cema_gamma), "DN2", INIT_CEMA_GAMMA, ALWAYS},
    {"mega.cema.omega", IN_LAYER(cema_omega), "D1", INIT_CEMA_OMEGA, ALWAYS},
    {"mega.rmsnorm.weight", IN_LAYER(rmsnorm_weight), "D", INIT_ZERO, IF_AFFINE},
    {"mega.wv.weight", IN_LAYER(wv), "ED", INIT_LINEAR, ALWAYS},
    {"mega.wv.bias", IN_LAYER(wv_bias), "E", INIT_ZERO, ALWAYS},
    {"mega.wz.weight", IN_LAYER(wz), "ZD", INIT_LINEAR, ALWAYS},
    {"mega.wz.bias", IN_LAYER(wz_bias), "Z", INIT_ZERO, ALWAYS},
    {"mega.wr.weight", IN_LAYER(wr), "ED", INIT_LINEAR, ALWAYS},
    {"mega.wr.bias", IN_LAYER(wr_bias), "E", INIT_ZERO, ALWAYS},
    {"mega.wh1.weight", IN_LAYER(wh1), "DD", INIT_LINEAR, ALWAYS},
    {"mega.wh1.bias", IN_LAYER(wh1_bias), "D", INIT_ZERO, ALWAYS},
    {"mega.wh2.weight", IN_LAYER(wh2), "DE", INIT_LINEAR, ALWAYS},
    {"nffn.alpha", IN_LAYER(alpha), "D", INIT_NFFN_ALPHA, IF_RESCALE},
    {"nffn.norm.weight", IN_LAYER(norm_weight), "D", INIT_ZERO, IF_AFFINE},
    {"nffn.norm.bias", IN_LAYER(norm_bias), "D", INIT_ZERO, IF_AFFINE},
    {"nffn.fc1.weight", IN_LAYER(fc1), "FD", INIT_LINEAR, ALWAYS},
    {"nffn.fc2.weight", IN_LAYER(fc2), "DF", INIT_LINEAR, ALWAYS},
    {"nffn.fc3.weight", IN_LAYER(fc3), "FD", INIT_LINEAR, IF_SWIGLU},
    {"output.final_norm.weight", IN_MODEL(final_norm_weight), "D", INIT_ZERO, ALWAYS},
    {"output.final_norm.bias", IN_MODEL(final_norm_bias), "D", INIT_ZERO, ALWAYS},
    {"output.output.weight", IN_MODEL(output), "VD", INIT_EMBED, IF_UNTIED},
};
// clang-format on
enum { NUM_PARAM_ROWS = sizeof megalodon_params / sizeof megalodon_params[0] };

// One tensor of a model: a row of the table, in one layer if it is per_layer.
typedef struct {
    char name[64];
    const ParamRow *row;
    int layer; // -1: not in a layer
    int ndim, shape[3];
    size_t offset, size; // in the allocation, in elements
} Tensor;

// The functions below that do not depend on the backend are in plumbing/params.c.
// Returns all tensors of a model in checkpoint order, to be freed by the caller, or NULL if out of memory. *count gets
// their number and *size the sum of their elements; either may be NULL.
Tensor *megalodon_tensors(const Config *config, int *count, size_t *size);

// Sets the pointers of params to the tensors in `memory`. The caller allocates params->layers. With share_emb, output
// is embed.
void megalodon_point(Params *params, real *memory, const Config *config, const Tensor *tensors, int count);

// Bytes of main memory for each of `processes` processes on this machine: the least of the machine's memory and the
// limits of cgroup and ulimit. Address space that is only `reserved` (bytes) counts, too. In plumbing/system.c.
size_t host_memory(int processes, size_t reserved);

// Index of this process on its machine as its MPI launcher numbers it, 0 without one. In plumbing/system.c.
int local_rank(void);

double seconds(void); // of a monotonic clock. In plumbing/system.c

// Operations of the matrix products in a forward pass over a sequence of L tokens, 2 for each multiply-add. In attention
// only the causal half of each chunk counts.
typedef struct {
    double projections; // by wz, wv, wr, wh1 and wh2
    double attention;   // queries by keys, probabilities by values
    double ffn, output;
} ForwardOperations;
ForwardOperations megalodon_forward_operations(const Config *config, int64_t L);
// The same of a forward and a backward pass together. The backward pass has twice as many as the forward pass.
double megalodon_step_operations(const Config *config, int64_t L);

// ----------------------------------------------------------------------------
// random numbers: Philox4x32-10 (Salmon et al., 2011), counter based, so that every backend and every rank draws
// the same: ten rounds of two 32x32 -> 64 bit products turn a counter, under the key `seed`, into four numbers

enum {               // the counter's first word: what the numbers are for
    STREAM_INIT = 0, // + row of the parameter table
    STREAM_DATA = 1000,
    STREAM_SAMPLE,
    STREAM_DROPOUT // + the place of the mask: DROP_EMBED, ... in plumbing/model.h
};

#ifdef __CUDACC__
__host__ __device__
#endif
    static inline void
    megalodon_philox(uint32_t out[4], uint64_t seed, uint32_t stream, uint32_t step, uint32_t layer, uint32_t element) {
    uint32_t c0 = stream, c1 = step, c2 = layer, c3 = element;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// A range of consecutive parameters. ZeRO-1: each rank updates some of these ranges, and only has the optimizer's
// moments of them.
typedef struct {
    size_t first, count;
} Shard;

// Returns the shards that rank `rank` of `ranks` updates, to be freed by the caller, or NULL if out of memory. The
// parameters are divided into buckets whose gradients are summed over the ranks together: the embedding, each layer,
// and the rest. Each bucket is divided into `ranks` nearly equal shards. Boundaries are rounded to 4 elements, so that
// float4 loads stay aligned. *count gets the number of shards: num_layers + 2, one for each bucket. With a single rank
// it is 1: all parameters.
Shard *megalodon_shards(const Config *config, int rank, int ranks, int *count);

// Fills values (tensor->size) with the tensor's initial values, see Init.
void megalodon_init(real *values, const Tensor *tensor, const Config *config, uint64_t seed);

// ----------------------------------------------------------------------------
// the model. Its memory belongs to the backend (host or device); the host accesses it by megalodon_read and _write.

typedef struct Model Model;

typedef enum {
    MEGALODON_INFER,     // no gradients; all layers share the memory of one layer's activations
    MEGALODON_TRAIN,     // gradients, moments, every layer's activations
    MEGALODON_RECOMPUTE, // as MEGALODON_TRAIN, but only block inputs are kept; backward runs each block's forward again
} Mode;

typedef struct {
    size_t params, grads, moments, activations, scratch;
} MemoryPlan; // bytes

// Sets which shards this rank updates. To be called before the two functions below. Default: rank 0 of 1.
void megalodon_set_shard(int rank, int ranks);

// Returns what a model for up to B sequences of L tokens will allocate.
MemoryPlan megalodon_memory(const Config *config, Mode mode, int B, int L);

// Returns NULL if out of memory. Parameters are zero until they are written. The configuration must be valid.
Model *megalodon_new(const Config *config, Mode mode, int B, int L);
void megalodon_free(Model *model);

// Copies the elements first .. first + n - 1 of a buffer that is laid out as megalodon_tensors() says. Moments outside
// of this rank's shards cannot be read, and writing them has no effect. On a GPU, src and dst may also be device
// memory.
typedef enum { PARAMS, GRADS, MOMENT1, MOMENT2 } Buffer;
void megalodon_read(Model *model, Buffer buffer, size_t first, size_t n, real *dst);
void megalodon_write(Model *model, Buffer buffer, size_t first, size_t n, const real *src);

// On a GPU only: address of PARAMS or GRADS in device memory. Stream 0 reads and writes them.
float *megalodon_device_ptr(Model *model, Buffer buffer);

// ----------------------------------------------------------------------------
// state: all that a model remembers of the tokens it has read. Its size does not depend on their number.

typedef struct {
    int B, layers, G;
    size_t modes;      // 2*N*D, elements of h for one layer and sequence
    size_t bytes;      // of memory
    void *memory;      // one allocation of the backend, which all of the following point into
    int64_t *count;    // (B) tokens read
    double *mean, *m2; // (num_layers+1, B, G) TimestepNorm's running mean and sum of squared deviations
    real *h;           // (num_layers, B, 2, N, D) CEMA's complex state: real parts, then imaginary parts
    real *k, *v;       // (num_layers, B, C, Z), (num_layers, B, C, E) rotated keys, and values, of the unfinished chunk
} State;

// whole_chunks: every call will end where a chunk ends. Then k and v are not needed, and are NULL.
size_t state_bytes(const Config *config, int B, int whole_chunks); // SIZE_MAX if they exceed SIZE_MAX / 2
// A state whose tensors lie in `memory` (state_bytes() long), one after another.
State state_point(void *memory, const Config *config, int B, int whole_chunks);

// Returns the state before the first token, or NULL if out of memory.
State *state_new(const Config *config, int B, int whole_chunks);
void state_free(State *state);
void state_reset(State *state, int row); // sets one row to the state before the first token
// Copy bytes first .. first + bytes - 1 of the state's memory. On a GPU, src and dst may also be device memory.
void state_read(const State *state, size_t first, size_t bytes, void *dst);
void state_write(State *state, size_t first, size_t bytes, const void *src);

// The gradient of the loss with respect to a state, for training on a sequence in segments (plumbing/segments.c). A
// segment reaches the loss of later segments only through its outgoing state, so all that its backward pass needs from
// them is this gradient. For CEMA it is dL/dh. For TimestepNorm it consists of three sums over all tokens t after the
// state, with n_t scalars in their moments (timestep_norm_backward in megalodon.c derives them):
//     U = sum dL/dmean_t / n_t,    V = sum dL/dvar_t / n_t,    W = sum dL/dvar_t mean_t / n_t
// With n scalars in the state's moments, dL/dM2 = V and dL/dmean = n (U - 2 (W - mean V)). The sums are double, since
// W and mean V are nearly equal where the mean is large.
typedef struct {
    int B;
    size_t bytes; // of memory
    void *memory; // one allocation of the backend, which both of the following point into
    double *sums; // (num_layers+1, B, G, 3) U, V, W of each TimestepNorm
    real *h;      // (num_layers, B, 2, N, D) dL/dh
} StateGrad;

size_t state_grad_bytes(const Config *config, int B);
// Returns zeros: the loss does not depend on the state. NULL if out of memory.
StateGrad *state_grad_new(const Config *config, int B);
void state_grad_free(StateGrad *grad);
void state_grad_zero(StateGrad *grad);

// ----------------------------------------------------------------------------
// running it

// Turns on dropout with the configuration's probabilities from the next forward pass on. NULL, the default, turns it
// off. A mask depends on these numbers and on the position in the whole step's batch (that of all ranks), on nothing
// else.
typedef struct {
    uint64_t seed;
    int64_t step;   // updates before this one
    int64_t row;    // index of the forward pass's first row in the step's batch
    int64_t start;  // index of the forward pass's first token in its sequence
    int64_t length; // tokens of a whole sequence; 0: the forward pass has whole sequences
} DropoutKey;
void megalodon_dropout(Model *model, const DropoutKey *key);

// Chunk parallelism: from the next forward pass on, this model has one part of each of its sequences, and the other
// ranks have the other parts. All ranks call the same functions with the same number of rows. Each rank reduces its
// part from a zero state; an all-gather exchanges the small results; each rank combines those of the ranks before it
// (in the backward pass, of the ranks after it). NULL, the default: this model has whole sequences. Returns 0 if out of
// memory.
typedef struct {
    int cp_rank, cp_size;   // this rank, and the number of ranks
    const int64_t *lengths; // (cp_size) tokens of each rank's part; whole chunks, except for the last rank. Copied
    // All-gather: all (cp_size, bytes) gets every rank's `mine` (bytes), in rank order. Both are in the backend's
    // memory; on a GPU the exchange is in the order of stream 0. context is the field below.
    void (*gather)(void *context, const void *mine, void *all, size_t bytes);
    void *context;
} ChunkParallel;
int megalodon_chunk_parallel(Model *model, const ChunkParallel *cp);

// Forward pass of tokens (B,L), each in 0..V-1, up to the final norm's output. With a state (of B rows), the sequences
// continue from it and it is updated. A sequence may be passed in one call, in several, or token by token: the results
// are equal up to rounding. Without a state the sequences start fresh. With chunk parallelism the state is that of the
// whole sequence.
void megalodon_forward(Model *model, State *state, const int32_t *tokens, int B, int L);

// Cross-entropy of the last forward pass's positions against targets (B,L); -1 means that a position is not counted.
// Returns the sum in nats. *counted gets the number of counted positions. losses (B,L), if not NULL, gets the loss of
// each position, 0 where it is not counted. Logits only exist for some rows at a time. grad_scale > 0 also computes the
// gradient of grad_scale * sum with respect to the final norm's output, where megalodon_backward begins.
double megalodon_loss(Model *model, const int32_t *targets, double grad_scale, int64_t *counted, real *losses);

// Adds the gradients of the last megalodon_loss with grad_scale > 0 to GRADS. After a forward pass with a state every
// row must have begun at the start of a chunk. dstate: in: the gradient with respect to the outgoing state; out: with
// respect to the incoming state. With chunk parallelism both are those of the whole sequence. NULL: no later tokens
// depend on the outgoing state, and the gradient stops at the incoming one (truncated backpropagation).
void megalodon_backward(Model *model, StateGrad *dstate);

// Sets a function that each backward pass calls when a bucket's gradients are complete: first for the last bucket, then
// for the layers from last to first, at the end for the embedding (bucket 0). On a GPU the kernels that complete them
// may still be running; work in stream 0 comes after them. NULL, the default: no calls.
void megalodon_on_grad_ready(Model *model, void (*callback)(Model *model, int bucket));

void megalodon_zero_grad(Model *model);
double megalodon_grad_norm(Model *model); // L2 norm of the gradients of this rank's shards

// One AdamW step. The gradients are multiplied by grad_scale first, for clipping. update is the number of steps before
// this one.
typedef struct {
    double beta1, beta2, eps, weight_decay;
} AdamW;
void megalodon_update(Model *model, const AdamW *adamw, double lr, double grad_scale, int64_t update);

// Writes the logits of `rows` of the last forward pass's B*L positions, from `first` on, to dst (rows,V).
void megalodon_logits(Model *model, size_t first, size_t rows, real *dst);

// Writes an activation of the last forward pass to dst (B,L,width); allowed after megalodon_backward, too. layer = -1
// with "final_norm": the final norm's output. dst NULL: only returns the width. Returns 0 if there is no such
// activation.
int megalodon_activation(Model *model, int layer, const char *name, real *dst);
const char *megalodon_activation_name(int i); // names of a layer's activations in data-flow order; NULL after the last
int megalodon_activation_width(const Config *config, const char *name); // elements per token; 0 if there is none

void megalodon_threads(int threads);              // number of threads that the backend uses; no effect on a GPU
int megalodon_on_gpu(void);                       // 1: models and states are in device memory, 0: in main memory
size_t megalodon_available_memory(int processes); // bytes of the backend's memory for each process on this machine
size_t megalodon_peak_memory(void);  // bytes of the backend's memory that this program has used at most so far
double megalodon_product_rate(void); // operations/s of a large matrix product, measured in about 0.1 s; 0: no memory
const char *megalodon_backend(void); // one line that names the backend, e.g. "CPU, float32, 2 threads, BLAS"

#endif
