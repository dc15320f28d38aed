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

// What the model will take. Refused, with the MiB and with what would fit, if there is less memory for the model and
// `states` (bytes, which lie where the model lies) and `host` (bytes of buffers, which lie in main memory).
MemoryPlan check_memory(const Config *config, Mode mode, int B, int L, size_t states, size_t host);

// Limits that the cgroups of this process set, the least of all that contain it, versions 1 and 2: bytes, SIZE_MAX if
// there is none; cores, rounded up, 0 if there is none. root: "", or in tests a folder with proc/ and sys/.
size_t memory_limit(const char *root);
int cpu_limit(const char *root);

// Unless the environment says otherwise: OpenMP threads that wait sleep after a millisecond, on a busy machine
// after 0.03, so that they leave the cores to those that they wait for; there are no more of them than the cgroup's
// cores; OpenBLAS starts none. These are read when a program starts, so this starts it again.
void settle_threads(char **argv);

// Puts DIR of the running executable, then "/" and name, into path: files that come with the programs.
void beside_executable(char *path, size_t size, const char *name);

// ----------------------------------------------------------------------------
// outputs.c: a refused command changes nothing, and no output overwrites an input or a file that is not ours. A program
// first claims its inputs, then its outputs, does all that can be refused, and then calls keep_created().

enum { PATH_SIZE = 4096 };

// The last name of a path; folder gets the directory before it, "." if there is none.
const char *split_path(const char *path, char folder[PATH_SIZE]);
// Do two paths name the same file or directory, or the same place for one that does not exist yet?
bool same_file(const char *a, const char *b);
// Declares that `path` is read for --flag. A file that is claimed as an output already is a usage error.
void claim_input(const char *flag, const char *path);
// The flag for which a file was claimed as an input, NULL if it is none.
const char *claimed_as_input(const char *path);
// Declares that `path` is written for --flag. A file that is claimed already is a usage error.
void claim_name(const char *flag, const char *path);
// Declares that `path` (and path.tmp meanwhile) will be written for --flag, and checks that it can be: it is no input
// and no other output, its directory can be written to, and if it exists it is a regular file, writable, and empty or
// is_ours(path); `what` names such files in the message, "a dump". Nothing is created or changed.
// Returns the file to write: `path`, or what it links to, so that a link stays one.
const char *claim_output(const char *flag, const char *path, const char *what, bool (*is_ours)(const char *path));

void remove_if_refused(const char *path); // a file or an empty directory that this command has created
void remove_created(void);                // does so; fatal() and usage_error() call it
void keep_created(void);                  // the command is accepted: nothing will be removed

// ----------------------------------------------------------------------------
// ranks.c: processes that train one model together. Groups of them have different sequences of a batch (data parallel),
// the processes of a group have consecutive pieces of the same ones (chunk parallel). All have all parameters, and each
// updates its own range of them. ./train is linked with MPI if there is one; a process alone is one group of one piece,
// for which all of this is trivial. Unless something else is said, all processes call a function at the same point.

typedef struct {
    int size, rank, here; // processes, this one's number, those on this machine; number 0 prints and writes files
    bool started;         // by mpirun or its like
    int near, part;       // those that reach each other's memory (GPUs of a machine); what it updates (megalodon_set_shard)
    int dp_size, dp_rank, cp_size, cp_rank;
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
void ranks_gather(void *context, const void *mine, void *all, size_t bytes); // in a group, for its model's ChunkParallel
void ranks_fetch(void *dst, const void *mine, size_t bytes, int owner);      // the owner's mine to process 0's dst

// Before and after the following. Gradients: the sum, of what it updates, to each process; for megalodon_on_grad_ready, so
// that a layer's are summed beside the backward pass of those below. Parameters: what each one updates to all.
void ranks_open(Model *model, const Config *config);
void ranks_close(void);
void ranks_sum_gradients(Model *model, int segment);
void ranks_share_params(Model *model);
// megalodon_read in process 0 of what is only right, or only there, where each one updates: gradients, moments.
void ranks_read(Model *model, Buffer buffer, size_t first, size_t n, real *dst);

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
    OPT_TEXT,    // const char *
    OPT_PATH     // the same, the name of a file or directory: not empty, no line break
} OptionKind;

typedef struct {
    OptionKind kind;
    const char *name; // without the dashes
    void *value;      // its default stands there already
    double min, max;  // of a number; both allowed
    const char *arg;  // what --help calls a text: FILE, NAME
    const char *help; // one line, with the unit; NULL: kept with a run, but not on the command line
    bool kept;        // belongs to a run: --resume takes it from there
    bool given;       // on the command line
} Option;

// Reads --name VALUE and --name=VALUE into the table's values; the last one counts. --help and -h print
// `about` and the table with its defaults, and end the program.
void options_parse(Option *options, int argc, char **argv, const char *about);
const Option *option_given(const Option *options, const void *value); // by where its value lies; NULL if not

// The kept ones, a line each: name, space, value. Names of files become absolute.
void options_write(const Option *options, FILE *out);
void options_refuse_lines(const Option *options); // usage error if a kept path would have a line break
// Takes options from such a text. The text must stay: values point into it.
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
// data.c: token files, mapped into memory, and the rows that training and validation read

typedef enum {
    FORMAT_AUTO,  // a .bin file by its header, otherwise bytes; what looks like uint16 tokens is refused
    FORMAT_BYTES, // each byte a token, whatever the file looks like
    FORMAT_UINT16 // little-endian uint16 tokens, with the header of a .bin file or without
} DataFormat;
bool find_data_format(const char *name, DataFormat *format); // auto, bytes, uint16; false if it is none of these

typedef struct {
    const char *path;            // the caller's; must stay
    const unsigned char *bytes;  // of the first token, little-endian
    int width;                   // bytes per token, 1 or 2
    size_t count, first;         // number of tokens; index of the first one in the file
    const unsigned char *memory; // the whole file, header included
    size_t size;                 // bytes of the whole file
    int file;                    // descriptor, to notice a truncation; -1 if memory is a copy
} Tokens;

// Opens a file of tokens. Every token is checked against vocab_size. Where the file system cannot map files, it is read
// into memory, with a warning. A file that is truncated while it is read ends the program with a message.
Tokens tokens_open_as(const char *path, int vocab_size, DataFormat format);
Tokens tokens_open(const char *path, int vocab_size); // FORMAT_AUTO
static inline int32_t token_at(const Tokens *t, size_t i) {
    return t->width == 1 ? t->bytes[i] : t->bytes[2 * i] | t->bytes[2 * i + 1] << 8;
}
Tokens tokens_part(const Tokens *t, size_t first, size_t count); // shares the memory

// "254368 bytes, xxh64 0123456789abcdef": size and XXH64 of the whole file, of which t may be a part. Reads all of it.
enum { FINGERPRINT_SIZE = 64 };
void tokens_fingerprint(const Tokens *t, char text[FINGERPRINT_SIZE]);

typedef struct {
    size_t start, end; // index of its first input, and of its last target
    size_t row;        // number of rows that the documents before it are cut into
} Document;
typedef struct {
    size_t start, at, end; // of the document; `at` is where the row of this step starts
} Place;

// Rows of a step's batch: L inputs, each with the next token as target. A position without a target has -1. All is
// determined by (seed, step, row), so that ranks and resumed runs agree. Four orders:
//   neither eot nor carry: row starts are drawn uniformly from all positions.
//   carry: positions are divided into `rows` streams of equal length. Row r reads stream r window by window, the last
//       one padded, and then again from its start, fresh. The seed has no influence.
//   eot: documents are cut into rows of L, and each row is drawn uniformly from the rows of all documents, so that
//       every token is equally likely to be trained on. The rest of a document's last row is padded.
//   eot and carry: a row reads a document from its start to its end, and then takes the next one, in an order that is
//       shuffled anew for each pass over all documents. Each is read once before any is read again.
typedef struct {
    Tokens tokens;
    uint64_t seed;
    int rows, L;
    int eot;    // token that ends a document; -1: none
    bool carry; // a row goes on where it ended the step before
    // 24 bytes per document, in order; shuffled if eot and carry. A document has 2 tokens or more.
    Document *documents;
    size_t count;       // number of documents
    Place *places;      // (rows), if eot and carry, as of the step before `step`
    int64_t step, pass; // the next step of places, the next pass over the documents
    size_t next;        // document that is taken next
    // what this process has: of each `batch` rows `here` from `row` on, and of these `length` tokens from `from` on
    int batch, row, here, from, length;
} Reader;

// Refused if there are too few tokens for `purpose`. This process has all of it, until those fields say otherwise.
Reader reader_new(const Tokens *t, const char *purpose, uint64_t seed, int rows, int L, int eot, bool carry);
void reader_free(Reader *reader);
size_t reader_bytes(const Reader *reader); // memory that it has allocated, the copy of a file included
// fresh (rows): does the row begin from a fresh state? Steps must not go back if eot and carry.
void reader_step(Reader *reader, int64_t step, int32_t *inputs, int32_t *targets, bool *fresh);

// Validation: up to B windows of L, one after another from the cursor (at first 0) on, each document's from its
// start. Without documents a last one that is not full is left out. Returns how many there were for all processes.
typedef struct {
    size_t document, piece;
} Cursor;
int read_windows(const Reader *reader, Cursor *cursor, int B, int32_t *inputs, int32_t *targets);

// input.tokens and input.targets (B,L) of a dump, allocated; every one is checked against vocab_size. Targets of -1 and
// -100 are ignored; they stay as they are, so that a dump of the batch equals the file.
void read_batch(const char *path, int vocab_size, int *B, int *L, int32_t **inputs, int32_t **targets);

// ----------------------------------------------------------------------------
// checkpoint.c: models, optimizers and dumps in safetensors files

// Opens a checkpoint FILE, or the newest whole one in a run's DIR. If it says its configuration, that goes,
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
// which gives its own B x L tokens. False, with err, if it cannot be written.
bool write_dump(const char *path, Model *model, const Config *config, const int32_t *inputs, const int32_t *targets,
                int B, int L, double loss, char *err);
size_t dump_bytes(const Config *config, int B, int L); // of memory that write_dump takes
bool is_dump(const char *path);                        // does such a file lie there?

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

// The step of the newest whole checkpoint, -1 if there is none: one whose model and optimizer open. Damaged ones are
// named on stderr. is_run: are there any, whole or damaged?
int64_t run_newest(const char *dir, bool *is_run);
void run_model(char path[PATH_SIZE], const char *dir, int64_t step); // the path of that checkpoint's model
char *run_read_options(const char *dir);                             // text for options_read; NULL, with a warning
// Makes the directory, if there is none, and locks it. Nothing in it changes. Refused: a directory that holds a run
// (unless resume or overwrite), one that holds other files and no run, one that another run has locked.
void run_claim(const char *dir, bool resume, bool overwrite);
// Refuses an output in the run's directory that would be, or lie in, a checkpoint: DIR/step-...
void run_refuse_inside(const char *dir, const char *flag, const char *path);
// Once nothing can be refused any more: writes options.txt and removes what killed runs left; overwrite: the older run.
void run_begin(const char *dir, const Option *options, bool overwrite);
// Writes the checkpoint of `step` updates; val_loss NaN if unknown; states (num_states), those that a run carries on.
// Keeps the newest two and the best. stopped: only a signal causes this checkpoint, and the next one replaces it.
void run_save(const char *dir, Model *model, State *const *states, int num_states, const Config *config, int64_t seed,
              int64_t step, double val_loss, bool stopped);
// Parameters, moments and states from the newest checkpoint that loads; returns its step.
int64_t run_load(const char *dir, Model *model, State *const *states, int num_states, const Config *config,
                 int64_t seed);

// ----------------------------------------------------------------------------
// sampler.c

double sample_uniform(uint64_t seed, int64_t position, int row); // in [0,1), from STREAM_SAMPLE
// Draws from softmax(logits / temperature), cut to the top_k largest (0: all), then to the fewest whose
// probabilities sum to top_p (1: all), then to those at least min_p times as likely as the likeliest (0: all); random
// in [0,1). temperature 0: the largest.
typedef struct {
    double temperature, top_p, min_p;
    int top_k;
    int eot; // one more token that may be drawn, if it is V or above; 0: none
} Sampling;
// The logits beyond V, padding of the vocabulary for instance, are not looked at, but for that of how->eot.
int sample_token(const real *logits, int V, const Sampling *how, double random);
size_t sample_bytes(int V); // of memory that sample_token keeps

// ----------------------------------------------------------------------------
// tokenizer.c: llama2.c's tokenizer.bin, a SentencePiece BPE with byte fallback

typedef struct Tokenizer Tokenizer;

// Anything wrong is fatal. The model's vocabulary may be larger, by padding: see tokenizer_count.
Tokenizer *tokenizer_open(const char *path, int vocab_size);
// The same from memory, which must stay; NULL and err if anything is wrong.
Tokenizer *tokenizer_read(const unsigned char *bytes, size_t size, int vocab_size, char *err);
void tokenizer_free(Tokenizer *tokenizer);
// Of the following two, tokenizer may be NULL: tokens are bytes then, and those from 256 on are special.
int tokenizer_count(const Tokenizer *tokenizer); // tokens from here on have no text: do not draw them
// The bytes of a token, *length of them, 0 if it has no text; first: the text begins with it, so that a leading space
// of the token is not the text's.
const unsigned char *tokenizer_piece(const Tokenizer *tokenizer, int32_t token, bool first, size_t *length);
// Any bytes as tokens, allocated; *count gets their number. No other token is put before or after them. first: the text
// begins here, and SentencePiece puts a space before it; otherwise it goes on, within a word perhaps.
int32_t *tokenizer_encode(const Tokenizer *tokenizer, const unsigned char *text, size_t n, bool first, size_t *count);
size_t tokenizer_encode_bytes(size_t n); // of memory that tokenizer_encode takes at most
