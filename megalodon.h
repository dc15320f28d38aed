/*
megalodon.h: the contract. What a Megalodon model is (configuration, parameters, state) and the functions a
backend implements. megalodon.c implements them for the CPU; a program chooses its backend by what it is
linked with, and sees nothing of it but this file.

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

Letters used everywhere:
    B batch, L sequence length, V vocab_size, D model_dim, N cema_ndim, C chunk_size,
    H num_heads, Z z_dim (dz = Z/H), E value_dim (dv = E/H), F ffn_hidden_dim, G norm_num_groups (g = D/G)
*/
#ifndef MEGALODON_H
#define MEGALODON_H

#include <stddef.h>
#include <stdint.h>

#if SIZE_MAX < UINT64_MAX
#error "a 64-bit target is needed: sizes in bytes are kept in size_t, and models and data files exceed 4 GiB"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a little-endian target is needed: tensors and tokens are copied from files, which are little-endian"
#endif
#if defined __FAST_MATH__ || __FINITE_MATH_ONLY__
#error "-ffast-math and -Ofast cannot be used: NaN must be recognised, and sums be computed in the order written"
#endif

// Numbers as the host sees them. The double build (-DMEGALODON_DOUBLE) serves the gradient checks.
#ifdef MEGALODON_DOUBLE
typedef double real;
#else
typedef float real;
#endif

// ----------------------------------------------------------------------------
// configuration

typedef enum { HE, GAUSSIAN, XAVIER, BERT } InitMode; // how linear weights begin, see Init

typedef struct {
    int num_layers, model_dim, z_dim, value_dim, num_heads, ffn_hidden_dim, cema_ndim, chunk_size;
    int vocab_size, norm_num_groups;
    int swiglu, rescale_nffn, scale_emb, share_emb, norm_affine; // booleans
    double norm_eps, rope_base;
    double dropout, hidden_dropout, attention_dropout; // probabilities, in training only; see megalodon_dropout
    InitMode init_mode;
} Config;

typedef struct {
    const char *name;
    Config config;
    int64_t num_parameters; // what the parameter table below must add up to
} Preset;

// clang-format off
// layers D Z E H F N C | V G | swiglu rescale_nffn scale_emb share_emb norm_affine | norm_eps rope_base |
// dropout hidden_dropout attention_dropout init_mode
static const Preset megalodon_presets[] = {
    {"mega200M", {12, 1024, 256, 2048, 1, 2560, 16, 2048, 32000, 32, 0, 0, 0, 0, 1, 1e-5, 1e4, 0, 0, 0, HE}, 220627968},
    {"mega1.3B", {24, 2048, 512, 4096, 2, 4864, 16, 2048, 32000, 64, 0, 0, 0, 0, 1, 1e-5, 1e4, 0, 0, 0, HE}, 1342832640},
    {"mega1.3B_pg19", {24, 2048, 512, 4096, 2, 3584, 16, 2048, 32000, 64, 1, 0, 1, 1, 1, 1e-5, 1e4, 0, 0, 0, HE}, 1327628288},
    {"mega7.1B", {32, 4096, 1024, 8192, 4, 11264, 16, 2048, 32000, 64, 0, 0, 0, 0, 1, 1e-5, 1e4, 0, 0, 0, HE}, 7117381632},
    {"mega7.3B", {32, 4096, 1024, 8192, 4, 8192, 16, 2048, 32000, 64, 1, 0, 0, 0, 1, 1e-5, 1e4, 0, 0, 0, HE}, 7385817088},
    {"paper7B", {32, 4096, 1024, 8192, 4, 8192, 16, 4096, 32000, 64, 1, 0, 0, 0, 1, 1e-5, 1e5, 0, 0, 0, HE}, 7385817088},
    {"enwik8", {6, 384, 192, 384, 3, 1024, 8, 256, 256, 32, 1, 0, 0, 0, 1, 1e-5, 1e4, 0, 0, 0, HE}, 11359104},
    {"demo", {4, 128, 64, 256, 1, 256, 8, 64, 256, 16, 1, 0, 0, 0, 1, 1e-5, 1e4, 0, 0, 0, HE}, 974336},
};
// clang-format on
enum { NUM_PRESETS = sizeof megalodon_presets / sizeof megalodon_presets[0] };

// ----------------------------------------------------------------------------
// parameters: all of them in one block of memory, in checkpoint order, and pointers into it

typedef struct {        // of one layer; norm_affine off: no rmsnorm_weight, norm_weight, norm_bias (NULL)
    real *gamma, *beta; // (2,Z) q's and k's affine
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

// Initial values. All weights of norms, and gamma of q and k, are stored as an offset from one.
typedef enum {
    INIT_ZERO,
    INIT_LINEAR,     // by init_mode: HE N(0, 1/sqrt(3 fan_in)), Kaiming normal with a = sqrt(5); XAVIER uniform below
                     // sqrt(6/(fan_in + fan_out)); BERT N(0, 0.02); GAUSSIAN N(0, 1) truncated at 3
    INIT_EMBED,      // N(0, 1/sqrt(D)) truncated at 3 deviations
    INIT_CEMA_LOGIT, // N(0, 0.2)
    INIT_CEMA_THETA, // ln(f/(1-f)), f = D^(-i/D), i = 1..D, in random order over the channels
    INIT_CEMA_GAMMA, // real part N(0,1), imaginary part 0
    INIT_CEMA_OMEGA, // N(0, 0.25) truncated to [-1, 1]
    INIT_NFFN_ALPHA, // 0.1 * 0.5^layer
} Init;

typedef enum { ALWAYS, IF_SWIGLU, IF_RESCALE, IF_AFFINE, IF_UNTIED } Condition; // when a tensor exists

typedef struct {
    const char *name;  // in a checkpoint; a layer's stand behind "layers.i."
    int per_layer;     // field lies in LayerParams, not in Params
    size_t field;      // offset of the pointer there
    const char *shape; // the letters above, or a digit for itself
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

typedef struct { // one tensor of a model: a row of the table in one layer
    char name[64];
    const ParamRow *row;
    int layer; // -1: not in a layer
    int ndim, shape[3];
    size_t offset, size; // place in the block, in elements
} Tensor;

// The functions below that do not depend on the backend are in plumbing/params.c.
// All tensors of a model in checkpoint order; *count gets their number, *size the elements of the block
// (either may be NULL). Freed by the caller; NULL when memory is out.
Tensor *megalodon_tensors(const Config *config, int *count, size_t *size);

// Points params (whose array of layers the caller has) into memory, with share_emb output at embed.
void megalodon_point(Params *params, real *memory, const Config *config, const Tensor *tensors, int count);

// Bytes of main memory for each of so many processes on this machine: the least of the machine's memory and the limits
// of cgroup and ulimit, where address space that is only `reserved` counts, too. In plumbing/system.c.
size_t host_memory(int processes, size_t reserved);

// ----------------------------------------------------------------------------
// random numbers: Philox4x32-10 (Salmon et al., 2011), counter based, so that every backend and every rank draws
// the same: ten rounds of two 32x32 -> 64 bit products turn a counter, under the key `seed`, into four numbers

enum {               // the counter's first word: what the numbers are for
    STREAM_INIT = 0, // + row of the parameter table
    STREAM_DATA = 1000,
    STREAM_SAMPLE,
    STREAM_DROPOUT // + where, see megalodon.c
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

// Consecutive elements of a block.
typedef struct {
    size_t first, count;
} Shard;

// What process `part` of `parts` updates. The block is cut into segments, the embedding, each layer and what is behind
// them, each of which is cut into parts of nearly as many elements. Cuts are at whole fours: the few elements before
// one belong to the segment before. *count gets the number of segments: num_layers + 2, but for one part 1, the whole
// block. Freed by the caller; NULL when memory is out.
Shard *megalodon_shards(const Config *config, int part, int parts, int *count);

// Fills values (tensor->size) with the tensor's initial values, see Init.
void megalodon_init(real *values, const Tensor *tensor, const Config *config, uint64_t seed);

// ----------------------------------------------------------------------------
// the model. Its memory belongs to the backend (host or device); the host reaches it by read and write.

typedef struct Model Model;

typedef enum {
    MEGALODON_INFER,     // no gradients, one layer's activations
    MEGALODON_TRAIN,     // gradients, optimizer, every layer's activations
    MEGALODON_RECOMPUTE, // as TRAIN, but only block inputs are kept: backward runs each block's forward again
} Mode;

typedef struct {
    size_t params, grads, moments, activations, scratch;
} MemoryPlan; // bytes

// Several processes train the same model: this one is `part` of `parts`, and updates no more than its range of every
// segment. Moments exist only there, and megalodon_grad_norm covers no more. Before the two functions below.
void megalodon_set_shard(int part, int parts);

// What a model for up to B sequences of L tokens will allocate.
MemoryPlan megalodon_memory(const Config *config, Mode mode, int B, int L);

// Parameters are zero until written. NULL when memory is out. The configuration must be valid.
Model *megalodon_new(const Config *config, Mode mode, int B, int L);
void megalodon_free(Model *model);

// Copies n elements from element `first` on of a block laid out as megalodon_tensors() says. Moments outside of this
// process's ranges cannot be read; writing them does nothing. On a GPU src and dst may be memory of the device, too.
typedef enum { PARAMS, GRADS, MOMENT1, MOMENT2 } Buffer;
void megalodon_read(Model *model, Buffer buffer, size_t first, size_t n, real *dst);
void megalodon_write(Model *model, Buffer buffer, size_t first, size_t n, const real *src);

// On a GPU only: where PARAMS or GRADS lie in the device's memory, whose stream 0 works on them.
float *megalodon_device_ptr(Model *model, Buffer buffer);

// ----------------------------------------------------------------------------
// state: all that a model remembers of the tokens it has read. Its size does not depend on how many.

typedef struct {
    int B, layers, G;
    size_t modes, bytes; // 2*N*D
    void *memory;        // one block, owned by the backend, behind all of these:
    int64_t *count;      // (B) tokens read: TimestepNorm's n is g*count, the place in the chunk count % C
    double *mean, *m2;   // (num_layers+1, B, G) TimestepNorm's running mean and sum of squared deviations
    real *h;             // (num_layers, B, 2, N, D) CEMA's complex h: real parts, then imaginary parts
    real *k, *v;         // (num_layers, B, C, Z), (num_layers, B, C, E) the unfinished chunk's, k rotated
} State;

// whole_chunks: every call will end where a chunk ends, so k and v are never needed and are NULL.
size_t state_bytes(const Config *config, int B, int whole_chunks); // SIZE_MAX if they exceed SIZE_MAX / 2
// A state whose tensors lie in `memory` (state_bytes() long), one after another.
State state_point(void *memory, const Config *config, int B, int whole_chunks);

// Allocates a fresh state: nothing read yet. NULL when memory is out.
State *state_new(const Config *config, int B, int whole_chunks);
void state_free(State *state);
void state_reset(State *state, int row); // makes one row fresh again
void state_read(const State *state, size_t first, size_t bytes, void *dst);
void state_write(State *state, size_t first, size_t bytes, const void *src);

// ----------------------------------------------------------------------------
// running it

// Dropout, with the configuration's probabilities, from the next forward on; NULL, as at first: none. A mask
// depends on these numbers and the place in the whole step's batch, that of all processes, alone.
typedef struct {
    uint64_t seed;
    int64_t step; // updates before this one
    int64_t row;  // of the step's batch, which the forward's first row is
} DropoutKey;
void megalodon_dropout(Model *model, const DropoutKey *draw);

// Chunk parallelism: from the next forward on this model has one piece of each of its sequences, and other processes
// have the others, which call the same functions with as many rows. A model reduces its piece as if nothing were
// around it; the small results are gathered, and it combines those of the pieces before it, in the backward pass
// those behind it. NULL, as at first: sequences are whole. Returns 0 when memory is out.
typedef struct {
    int cp_rank, cp_size;    // this rank and the number of ranks
    const int64_t *lengths; // (pieces) tokens of each, whole chunks but for the last; to stay while it is in use
    // all (pieces, bytes) gets what every process gives as mine, both in the backend's memory, on a GPU in the order of
    // stream 0; context is what stands here
    void (*gather)(void *context, const void *mine, void *all, size_t bytes);
    void *context;
} ChunkParallel;
int megalodon_chunk_parallel(Model *model, const ChunkParallel *pieces);

// Reads tokens (B,L), each in 0..V-1, up to the final norm's output. With a state (of B rows) the sequences
// continue where it stands and it moves on: whole, in pieces or token by token gives the same numbers to
// rounding. Without, they start fresh. Of pieces, the state before and after is that of the whole sequence.
void megalodon_forward(Model *model, State *state, const int32_t *tokens, int B, int L);

// Cross-entropy of the last forward's positions against targets (B,L), -1 = not counted: returns the sum in
// nats, *counted gets the number of positions; losses, if not NULL, gets each position's (0 where not counted).
// The logits exist in blocks of rows only. grad_scale > 0 also starts the backward pass, with the gradient
// of grad_scale * sum.
double megalodon_loss(Model *model, const int32_t *targets, double grad_scale, int64_t *counted, real *losses);

// Adds the gradients of the last megalodon_loss with grad_scale > 0 to GRADS. After a forward with a state they
// stop there (truncated backpropagation), and every row must have begun where a chunk begins.
void megalodon_backward(Model *model);

// From the next backward on `ready` is called as soon as nothing more will be added to a segment's gradients: first for
// the last one, then for the layers down, last for the embedding. On a GPU: in the order of stream 0. NULL, as at first:
// nobody is told.
void megalodon_on_grad_ready(Model *model, void (*ready)(Model *model, int segment));

void megalodon_zero_grad(Model *model);
double megalodon_grad_norm(Model *model); // one L2 norm over all gradients of this process's ranges

// One AdamW step: gradients times grad_scale first; update counts the steps before this one.
typedef struct {
    double beta1, beta2, eps, weight_decay;
} AdamW;
void megalodon_update(Model *model, const AdamW *adamw, double lr, double grad_scale, int64_t update);

// Logits of rows first.. of the last forward's B*L positions, to dst (rows, V).
void megalodon_logits(Model *model, size_t first, size_t rows, real *dst);

// An activation of the last forward, whole, to dst; after megalodon_backward, too. One of
// megalodon_activations with its layer, or layer = -1 for "final_norm" (B,L,D). dst NULL: nothing is done.
// Returns its width, 0 if unknown.
int megalodon_activation(Model *model, int layer, const char *name, real *dst);
static const char *const megalodon_activations[] = { // in data-flow order
    "mega.timenorm", "mega.cema", "mega.rmsnorm", "mega.q",    "mega.k",  "mega.v",
    "mega.r",        "mega.attn", "mega.out",     "nffn.norm", "nffn.out"};
enum { NUM_ACTIVATIONS = sizeof megalodon_activations / sizeof megalodon_activations[0] };

void megalodon_threads(int threads); // how many the backend uses, where that is a choice
int megalodon_on_gpu(void);          // 1: models and states lie in a device's memory, 0: in main memory
size_t megalodon_available_memory(int processes); // bytes of the backend's memory for each of so many processes on this machine
size_t megalodon_peak_memory(void);         // bytes of it that this program has taken at most so far
const char *megalodon_backend(void); // one line: what runs this, e.g. "CPU, float32, 2 threads, BLAS"

#endif
