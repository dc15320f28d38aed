// What the programs need besides the model: errors, options, configurations, data, checkpoints, sampling, tokenizers.
// Errors of users and files end the program here: a message on stderr and status 1, 2 for the command line.
#pragma once
#include <stdbool.h> // defines: bool
#include <stdint.h>  // defines: int64_t, uint64_t
#include <stdio.h>   // defines: FILE, size_t
#include "../megalodon.h"
#include "safetensors.h"

// ----------------------------------------------------------------------------
// system.c: errors, time, memory

void fatal(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));       // "error: ...", status 1
void usage_error(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2))); // the same, status 2
// main's first call: a closed standard stream is opened on /dev/null, to read only, or else the first file would get
// its number and messages would go there; a file that reaches a size limit is an error, not a signal.
void guard_streams(void);
void *allocate(size_t count, size_t size);    // zeroed; never NULL; overflow and lack of memory are fatal
char *read_text(const char *path, char *err); // a file of at most 1 MiB, freed by the caller; NULL and err
double seconds(void);                         // of a clock that never goes back

// What the model and `extra` more bytes will take; refused, with its MiB and with what would fit, if there is less room.
MemoryPlan check_memory(const Config *config, Mode mode, int B, int L, size_t extra);

// Limits that the cgroups of this process set, the least of all that contain it, versions 1 and 2: bytes, SIZE_MAX if
// there is none; cores, rounded up, 0 if there is none. root: "", or in tests a folder with proc/ and sys/.
size_t memory_limit(const char *root);
int cpu_limit(const char *root);

// Unless the environment says otherwise: OpenMP threads that wait sleep after some 50 microseconds, so that a busy
// core delays them and not all of them; there are no more of them than the cgroup's cores; OpenBLAS starts none. These
// are read when a program starts, so this starts it again.
void settle_threads(char **argv, int threads);

// Puts DIR of the running executable, then "/" and name, into path: files that come with the programs.
void beside_executable(char *path, size_t size, const char *name);

// ----------------------------------------------------------------------------
// ranks.c: processes that train one model together. Groups of them have different sequences of a batch (data parallel),
// the processes of a group have consecutive pieces of the same ones (chunk parallel). All have all parameters, and each
// updates its own range of them. ./train is linked with MPI if there is one; a process alone is one group of one piece,
// for which all of this is trivial. Unless something else is said, all processes call a function at the same point.

typedef struct {
    int size, rank, here; // processes, this one's number, those on this machine; number 0 prints and writes files
    bool started;         // by mpirun or its like
    int near, part;       // those that reach each other's memory (GPUs of a machine); what it updates (megalodon_shard)
    int groups, group, pieces, piece;
    int rows, row;            // sequences of a group; this group's first one in the batch
    int64_t start, *lengths;  // where this process's piece starts in a sequence; (pieces) tokens of each piece
    int64_t exchanges, bytes; // of steps and validations: that this process took part in, what it gave to them
} Ranks;
extern Ranks ranks;

void ranks_start(void); // main's second call; standard output of all but process 0 goes nowhere
// Who has what of B sequences of L tokens in chunks of C: every group as many sequences, every piece whole chunks, at
// least one. Where that is not possible it is a usage error.
void ranks_deal(int pieces, int B, int L, int C);

void ranks_wait(void); // called by one before it tells an error: what all find, process 0 shall tell, ending the others
void ranks_exit(int status) __attribute__((noreturn)); // called by one, ends all
bool ranks_agree(uint64_t number);                     // have all the same? If not, at least one of them learns it

void ranks_sum(double *values, int n);
void ranks_gather(void *context, const void *mine, void *all, size_t bytes); // in a group, for its model's Pieces
void ranks_fetch(void *dst, const void *mine, size_t bytes, int owner);      // the owner's mine to process 0's dst

// Before and after the following. Gradients: the sum, of what it updates, to each process; for megalodon_when_ready, so
// that a layer's are summed beside the backward pass of those below. Parameters: what each one updates to all.
void ranks_open(Model *model, const Config *config);
void ranks_close(void);
void ranks_sum_gradients(Model *model, int segment);
void ranks_share_params(Model *model);
// megalodon_read in process 0 of what is only right, or only there, where each one updates: gradients, moments.
void ranks_read(Model *model, Block block, size_t first, size_t n, real *dst);

// ----------------------------------------------------------------------------
// options.c: the command line

typedef enum {
    OPT_END,     // ends a table
    OPT_HEADING, // for --help; kept counts for all options under it
    OPT_SWITCH,  // int, --name sets it to 1
    OPT_BOOL,    // int, --name and --no-name
    OPT_INT,     // int
    OPT_INT64,   // int64_t
    OPT_REAL,    // double
    OPT_TEXT     // const char *
} OptionKind;

typedef struct {
    OptionKind kind;
    const char *name; // without the dashes
    void *value;      // its default stands there already
    double min, max;  // of a number; both allowed
    const char *arg;  // what --help calls a text: FILE, NAME
    const char *help; // one line, with the unit
    bool kept;        // belongs to a run: --resume takes it from there
    bool given;       // on the command line
} Option;

// Reads --name VALUE and --name=VALUE into the table's values; the last one counts. --help and -h print
// `about` and the table with its defaults, and end the program.
void options_parse(Option *options, int argc, char **argv, const char *about);
const Option *option_given(const Option *options, const void *value); // by where its value lies; NULL if not

void options_write(const Option *options, FILE *out); // the kept ones, a line each: name, space, value
// Takes options from such a text, except those that were given. The text must stay: values point into it.
bool options_read(Option *options, char *text, char *err);
void write_number(FILE *out, double value); // with as many digits as bring the same number back

// ----------------------------------------------------------------------------
// config.c: configurations

// Limits that keep every product of sizes within 64 bits, and CEMA's modes of a strip of channels on the stack.
enum { MAX_LAYERS = 4096, MAX_DIM = 1 << 20, MAX_NDIM = 1024 };

const Config *find_preset(const char *name);           // usage error listing all if there is none of that name
bool find_init_mode(const char *name, InitMode *mode); // false if there is none of that name
Config config_defaults(void);                          // of the released configuration; vocab_size 0: it has none

// Sets the fields that the JSON text has, released names; refuses other keys and what is not supported.
bool config_from_json(Config *config, const char *text, char *err);
void config_from_file(Config *config, const char *path); // the same for --config FILE.json
char *config_to_json(const Config *config);              // freed by the caller
bool config_check(const Config *config, char *err);      // is it a model?
bool config_equal(const Config *a, const Config *b);

// Sets in *config what model flags say that were given; their options' values lie in *flags. If owner is not
// NULL, a file's name, *config is that file's and a flag that says otherwise is refused.
void config_apply(Config *config, const Config *flags, const Option *options, const char *owner);

// ----------------------------------------------------------------------------
// data.c: token files, mapped into memory as they are

typedef struct {
    const char *path;
    const unsigned char *bytes; // little-endian
    int width;                  // bytes a token: 1 raw, 2 from a .bin file
    size_t count, first;        // tokens here; place of the first one in the file
} Tokens;

// Opens a raw file, each byte a token, or a .bin token file. Every token is checked against vocab_size.
Tokens tokens_open(const char *path, int vocab_size);
static inline int32_t token_at(const Tokens *t, size_t i) {
    return t->width == 1 ? t->bytes[i] : t->bytes[2 * i] | t->bytes[2 * i + 1] << 8;
}
Tokens tokens_part(const Tokens *t, size_t first, size_t count); // shares the memory

typedef struct {
    size_t start, end; // of a document: its first token, and the last that is predicted
} Document;
typedef struct {
    int64_t next, drawn;   // the step it goes to next, the documents drawn so far
    size_t start, at, end; // of the document, of the piece
} Place;                   // of a row's stream of documents

// What a run reads: all rows of a step's batch, L tokens and after each the next one as target. Drawn from (seed,
// step, row) alone, so that ranks and resumed runs agree.
typedef struct {
    Tokens tokens;
    uint64_t seed;
    int rows, L;
    int eot;    // a row starts where a document starts; behind its end targets are -1. -1: no documents
    bool carry; // a row goes on where it ended the step before
    Document *documents;
    size_t count;  // of them
    Place *places; // (rows)
    // what this process has: of each `batch` rows `here` from `row` on, and of these `length` tokens from `from` on
    int batch, row, here, from, length;
} Reader;

// Refused if there are too few tokens for `purpose`. This process has all of it, until those fields say otherwise.
Reader reader_new(const Tokens *t, const char *purpose, uint64_t seed, int rows, int L, int eot, bool carry);
void reader_free(Reader *reader);
// fresh (rows): does the row begin without a past? Steps must not go back if it carries documents.
void reader_step(Reader *reader, int64_t step, int32_t *inputs, int32_t *targets, bool *fresh);

// Validation: up to B windows of L, one after another from the cursor (at first 0) on, each document's from its
// start. Without documents a last one that is not full is left out. Returns how many there were for all processes.
typedef struct {
    size_t document, piece;
} Cursor;
int read_windows(const Reader *reader, Cursor *cursor, int B, int32_t *inputs, int32_t *targets);

// input.tokens and input.targets (B,L) of a dump, allocated; every one is checked against vocab_size.
void read_batch(const char *path, int vocab_size, int *B, int *L, int32_t **inputs, int32_t **targets);

// ----------------------------------------------------------------------------
// checkpoint.c: models, optimizers and dumps in safetensors files

// Opens a checkpoint FILE, or the newest in a run's DIR that opens. If it says its configuration, that goes,
// checked, into *config; otherwise *config stays and the result is false.
bool checkpoint_open(StFile *file, Config *config, const char *path);
// Fills the model's parameters from it and closes it. Anything wrong is fatal, with the tensor's name.
void checkpoint_load(StFile *file, Model *model, const Config *config);

// The same without ending the program, for run.c.
bool save_model(const char *path, Model *model, const Config *config, char *err);
bool load_model(StFile *file, Model *model, const Config *config, char *err);
bool save_optimizer(const char *path, Model *model, const Config *config, int64_t seed, int64_t step, double val_loss,
                    char *err);
void lend_optimizer(Model *model, const Config *config); // what other processes do while process 0 saves it
bool load_optimizer(StFile *file, Model *model, const Config *config, int64_t seed, int64_t step, char *err);

// Writes inputs, activations, logits, loss and gradients of the last forward and backward: of all processes, each of
// which gives its own B x L tokens.
void write_dump(const char *path, Model *model, const Config *config, const int32_t *inputs, const int32_t *targets,
                int B, int L, double loss);

// ----------------------------------------------------------------------------
// state.c: state files

// A state, the seed of its stream, and, unless NULL, the logits (B,V) after its last tokens, in one file. What does
// not fit the model is refused. state_rows says a file's B, 0 with err if it has none.
enum { MAX_ROWS = 1 << 16 };
bool save_state(const char *path, const State *state, const Config *config, int64_t seed, const real *logits,
                char *err);
bool load_state(const char *path, State *state, const Config *config, int64_t *seed, real *logits, char *err);
int state_rows(const char *path, char *err);
// Copies row i of a state into row j of another; both have k and v, or neither.
void state_copy(const State *from, int i, State *to, int j, const Config *config);

// ----------------------------------------------------------------------------
// run.c: a run's directory: lock, options.txt (the kept options), step-XXXXXXXX/{model,optimizer}.safetensors, and
// with --carry-state state-0.safetensors, ... there

enum { PATH_SIZE = 4096 };

// Makes and locks the directory. One with checkpoints is refused unless resume; overwrite deletes them.
void run_claim(const char *dir, const Option *options, bool resume, bool overwrite);
// Writes the checkpoint of `step` updates; val_loss NaN if unknown; states (num_states), those that a run carries on.
// Keeps the newest two and the best.
void run_save(const char *dir, Model *model, State *const *states, int num_states, const Config *config, int64_t seed,
              int64_t step, double val_loss);
// Options and configuration, for setting up; then parameters and moments from the newest checkpoint that
// loads: returns its step. Those that do not load are named on stderr.
void run_open(const char *dir, Option *options, Config *config);
int64_t run_load(const char *dir, Model *model, State *const *states, int num_states, const Config *config,
                 int64_t seed);
// The path of the model of a run's checkpoint i, 0 the newest; false if there are not as many.
bool run_model(char path[PATH_SIZE], const char *dir, int i);

// ----------------------------------------------------------------------------
// sampler.c

double sample_uniform(uint64_t seed, int64_t position, int row); // in [0,1), from STREAM_SAMPLE
// Draws from softmax(logits / temperature), cut to the top_k largest (0: all), then to the fewest whose
// probabilities sum to top_p (1: all), then to those at least min_p times as likely as the likeliest (0: all); random
// in [0,1). temperature 0: the largest.
typedef struct {
    double temperature, top_p, min_p;
    int top_k;
} Sampling;
int sample_token(const real *logits, int V, const Sampling *how, double random);

// ----------------------------------------------------------------------------
// tokenizer.c: llama2.c's tokenizer.bin, a SentencePiece BPE with byte fallback

typedef struct Tokenizer Tokenizer;

Tokenizer *tokenizer_open(const char *path, int vocab_size); // anything wrong is fatal
// The same from memory, which must stay; NULL and err if anything is wrong.
Tokenizer *tokenizer_read(const unsigned char *bytes, size_t size, int vocab_size, char *err);
void tokenizer_free(Tokenizer *tokenizer);
// Any bytes as tokens, allocated; *count gets their number. None is put before or behind them.
int32_t *tokenizer_encode(const Tokenizer *tokenizer, const unsigned char *text, size_t n, size_t *count);
// The bytes of a token, *length of them; first: the one that begins a text, whose leading space is not the text's.
const unsigned char *tokenizer_piece(const Tokenizer *tokenizer, int32_t token, bool first, size_t *length);
