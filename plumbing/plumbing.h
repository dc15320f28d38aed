// What the programs need besides the model: errors, options, configurations, data, checkpoints, sampling, tokenizers.
//
// Errors of the user and of files end the program: a message on stderr and exit status 1, or 2 for the command line.
// Functions with a parameter `err` (ST_ERR bytes) return false, 0 or NULL instead and put the message there.
//
// Layers: a file calls only files that stand before it in this list (tests/test_layering.sh checks it):
//     json safetensors terminal system params state megalodon outputs options config log split ranks tokenizer sampler data
//     layout checkpoint state_file dump segments memory run
// megalodon is the backend, megalodon.c or megalodon.cu. compare.c is a program of its own, which uses json and
// safetensors.
#pragma once
#include <stdbool.h> // defines: bool
#include <stdint.h>  // defines: int64_t, uint64_t
#include <stdio.h>   // defines: FILE, size_t
#include "../megalodon.h"
#include "safetensors.h"

// ----------------------------------------------------------------------------
// terminal.c: the terminal, if standard output is one

bool on_terminal(void);  // returns whether standard output is a terminal that can replace a line
void terminal_off(void); // from now on on_terminal() returns false
bool in_color(void);     // returns whether it is such a terminal and the environment variable NO_COLOR is not set
// Shows a line that the next call replaces, cut to the terminal's width. Does nothing elsewhere. Before anything else is
// printed, progress_end() must remove it; fatal() and usage_error() do. A signal handler may call progress_end().
void progress_line(const char *format, ...) __attribute__((format(printf, 1, 2)));
void progress_end(void);

// ----------------------------------------------------------------------------
// system.c: errors, memory, time, limits of the system, threads

// Prints "error: " and the message to stderr, removes what remove_if_refused() named, and ends the program.
void fatal(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));       // exit status 1
void usage_error(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2))); // exit status 2
// Where several processes run, fatal() and usage_error() call before() first, and end(status) instead of exit(status).
// NULL stands for nothing and for exit().
void set_failure_hooks(void (*before)(void), void (*end)(int status));
// Names a file or an empty directory that this command has created, to be removed if the command fails.
void remove_if_refused(const char *path);
void keep_created(void); // the command is accepted: nothing will be removed any more

// The first call of main. Opens closed standard streams on /dev/null, read-only, so that no file gets their numbers and
// receives messages. Makes a write beyond a limit on file sizes an error instead of a signal.
void guard_streams(void);
void *allocate(size_t count, size_t size);    // zeroed memory, never NULL; overflow and lack of memory are fatal
char *read_text(const char *path, char *err); // contents of a text file of at most 1 MiB; freed by the caller
double seconds(void);                         // of a monotonic clock

// Limits that this process's cgroup and its ancestors set (versions 1 and 2). root is "", or in tests a directory with
// proc/ and sys/.
size_t memory_limit(const char *root); // bytes; SIZE_MAX if there is no limit
int cpu_limit(const char *root);       // cores, rounded up; 0 if there is no limit
const char *host_memory_limit(void);   // for messages: " within ..." names the limit that host_memory() found last
int local_rank(void); // index of this process on its machine, from the MPI launcher's variables; 0 if none

// Unless the environment says otherwise: a waiting OpenMP thread sleeps after 1 ms, or after 0.03 ms on a busy machine;
// there are at most as many threads as the cgroup has cores; OpenBLAS starts none. These settings are environment
// variables that libraries read at the start of a program, so this function executes the program again.
void settle_threads(char **argv);

// Writes the executable's directory, "/" and name to path, for files that come with the programs.
void beside_executable(char *path, size_t size, const char *name);

// ----------------------------------------------------------------------------
// state.c: the tensors of a State. It also has state_bytes() and state_point() of megalodon.h.

enum { NUM_STATE_TENSORS = 6 };
typedef struct {
    const char *name;       // in a state file
    StType type;            // of its elements
    int ndim;               // dimensions
    int64_t shape[ST_DIMS]; // (B, ...) or (slices, B, ...)
    size_t element_size;    // bytes
    size_t pointer;         // offset of its pointer in State
    size_t offset;          // bytes from State.memory to its first element
    size_t slices;          // 0 if the state lacks this tensor
    size_t row_bytes;       // of one row of one slice; row b of slice s starts at offset + (s * B + b) * row_bytes
    size_t bytes;           // of all slices and rows
} StateTensor;

// Fills the list with the tensors of a state of B rows, in the order of their offsets.
void state_tensors(StateTensor list[NUM_STATE_TENSORS], const Config *config, int B, bool whole_chunks);

// ----------------------------------------------------------------------------
// outputs.c: no output overwrites an input, or a file that this program would not have written. A program first claims
// its inputs and its outputs, then does everything that can fail, and then calls keep_created().

enum { PATH_SIZE = 4096 };

// Returns the last component of a path; folder gets the directory before it, "." if there is none.
const char *split_path(const char *path, char folder[PATH_SIZE]);
// Returns whether two paths name the same file or directory, which need not exist yet.
bool same_file(const char *a, const char *b);
// Declares that --flag reads `path`. Usage error if it is claimed as an output.
void claim_input(const char *flag, const char *path);
// Returns the flag for which a file was claimed as an input, NULL if it was not.
const char *claimed_as_input(const char *path);
// Declares that --flag writes `path`. Usage error if it is claimed already.
void claim_name(const char *flag, const char *path);
// Declares that --flag writes `path`, and path.tmp meanwhile. Fails unless both can be written: the directory is
// writable, and `path` is new, or a writable regular file that is empty or for which is_ours() returns true. `what`
// names such files in messages, e.g. "a dump of ./train". Creates and changes nothing. Returns the path to write: that
// of the target if `path` is a symbolic link, so that the link stays.
const char *claim_output(const char *flag, const char *path, const char *what, bool (*is_ours)(const char *path));

// ----------------------------------------------------------------------------
// options.c: the command line

typedef enum {
    OPT_END,     // ends a table
    OPT_HEADING, // a line of --help; its `kept` holds for all options up to the next heading
    OPT_SWITCH,  // int; --name sets it to 1
    OPT_BOOL,    // int; --name sets it to 1, --no-name to 0
    OPT_CHOICE,  // int, or an enum: the index of the chosen word
    OPT_INT,     // int
    OPT_INT64,   // int64_t
    OPT_REAL,    // double
    OPT_TEXT,    // const char *
    OPT_PATH     // const char *, name of a file or directory: not empty, no line break
} OptionKind;

typedef struct {
    OptionKind kind;
    const char *name; // without the dashes
    void *value;      // points to the value, which holds the default at first
    double min, max;  // allowed range of a number, both ends included
    const char *arg;  // what --help calls the value of a text: FILE, NAME; the words of a choice, separated by spaces
    const char *help; // one line for --help; NULL for an option that only options.txt has
    bool kept;        // stored in the run's options.txt, from which --resume takes it
    bool given;       // occurs on the command line
} Option;

// Parses --name VALUE and --name=VALUE into the table's values; the last occurrence counts. --help and -h print `about`
// and the table with its defaults, and end the program.
void options_parse(Option *options, int argc, char **argv, const char *about);
// The option whose value lies at `value`, if it occurs on the command line; otherwise NULL.
const Option *option_given(const Option *options, const void *value);

// Writes the kept options, a line each: name, space, value. Paths become absolute.
void options_write(const Option *options, FILE *out);
// Usage error if the absolute path of a kept option has a line break, which options_read() could not read.
void options_refuse_lines(const Option *options);
// Sets options from such a text. The text is modified and must stay: values point into it.
bool options_read(Option *options, char *text, char *err);
void write_number(FILE *out, double value); // with as few digits as reproduce the value exactly

// ----------------------------------------------------------------------------
// config.c: configurations

// Limits that keep every product of sizes within 64 bits, and CEMA's modes of a strip of channels on the stack.
enum { MAX_LAYERS = 4096, MAX_DIM = 1 << 20, MAX_NDIM = 1024 };

// The choices of Config's fields, in the order of their enums.
#define INIT_MODES "he gaussian xavier bert"
#define CEMA_KINDS "complex real none"
#define NORM_KINDS "timestep layer"
#define ATTENTION_KINDS "normalized standard"
#define TWO_HOP_KINDS "on off"

const Config *find_preset(const char *name); // usage error that lists all names if there is none
Config config_defaults(void); // those of the released code; vocab_size is 0, as it has no default

// Sets the fields that a JSON object has, under the released code's names. Unknown fields are errors.
bool config_from_json(Config *config, const char *text, char *err);
void config_from_file(Config *config, const char *path); // the same for --config FILE.json; errors are fatal
char *config_to_json(const Config *config);              // freed by the caller
void config_write_replaced(FILE *out, const Config *config); // ", cema real" and the like; nothing for Megalodon itself
bool config_equal(const Config *a, const Config *b);
bool config_check(const Config *config, char *err); // returns whether the configuration is valid

// Overrides fields with the options that occur on the command line, whose values lie in `flags`. If the configuration
// belongs to a checkpoint, `owner` names it, and a different value is a usage error; otherwise owner is NULL.
void config_apply(Config *config, const Config *flags, const Option *options, const char *owner);

// ----------------------------------------------------------------------------
// log.c: the log of a run, a CSV file with a row for every step

typedef struct {
    int64_t step;
    double loss;         // nats, mean over the step's targets
    double grad_norm;    // L2 norm before clipping
    double lr;           // learning rate
    double seconds;      // duration of the step
    double tokens_per_s; // targets that are ignored included
    double val_loss;     // nats; NaN if the step had no validation
} LogRow;

bool is_log(const char *path); // returns whether the file starts with a log's header
// Opens path.tmp and copies from an existing log the rows up to `step`, those of earlier parts of the run. Errors are
// fatal.
FILE *log_open(const char *path, int64_t step);
void log_replace(const char *path); // renames path.tmp, which stays open, to path
bool log_write(FILE *file, const LogRow *row);

// ----------------------------------------------------------------------------
// split.c: how a sequence is divided into consecutive segments, and each segment among the chunk-parallel ranks

typedef struct {
    int64_t length;      // tokens of a sequence
    int64_t segment_len; // tokens of a segment, whole chunks; the last segment may have fewer
    int chunk_size;
    int cp_size, cp_rank; // number of chunk-parallel ranks, and the number of this one
} Split;

typedef struct {
    int64_t first, count; // index in the sequence of its first token, and number of tokens
} TokenRange;

Split split_none(int64_t length, int chunk_size); // one segment, one rank
int64_t split_segments(const Split *split);       // number of segments
// The tokens of a segment that chunk-parallel rank r has: whole chunks, apart from the end of the sequence.
TokenRange split_part(const Split *split, int64_t segment, int r);
// The tokens of a sequence that this rank has lie segment after segment: the number of those before a segment, and of
// all of them. A batch of B sequences is (segments, B, tokens of the segment), so that segment i of all of them starts
// at element B * split_offset(i).
int64_t split_offset(const Split *split, int64_t segment);
int64_t split_own(const Split *split);
// NULL if segment_len is valid: whole chunks, and at least one chunk of every segment for each rank. Otherwise a
// message.
const char *split_error(const Split *split);

// ----------------------------------------------------------------------------
// ranks.c: processes ("ranks") that train one model together, over MPI. Data-parallel ranks have different sequences of
// a batch. Chunk-parallel ranks share each sequence: every one has consecutive chunks of it. Every rank holds all
// parameters, and updates one shard of them (ZeRO-1), for which alone it holds AdamW's moments. A program without MPI,
// or not started by mpirun, is one rank, for which these functions do nothing or copy. Unless a comment says otherwise,
// all ranks must call a function at the same point.

typedef struct {
    bool started;        // by mpirun or another MPI launcher
    int size;            // number of ranks
    int rank;            // number of this rank; rank 0 prints and writes files
    int local_size;      // ranks on this machine
    int node_size;       // ranks of a node: GPUs of one machine that map each other's memory; 1 if they do not
    int shard;           // shard of the parameters that this rank updates, of `size`; see megalodon_set_shard
    int dp_size;         // number of data-parallel ranks
    int dp_rank;         // number of this one
    int cp_size;         // number of chunk-parallel ranks
    int cp_rank;         // number of this one
    int num_rows;        // sequences of a batch that this rank has
    int first_row;       // index of the first one in the batch
    int64_t collectives; // collective operations of steps and validations so far
    int64_t bytes_sent;  // bytes that this rank has contributed to them
} Ranks;
extern Ranks ranks;

// The second call of main. The standard output of all ranks but rank 0 goes to /dev/null. From here on fatal() ends all
// ranks; what several ranks find wrong is reported once, by rank 0.
void ranks_start(void);
// Divides B sequences of L tokens in chunks of C among dp_size = size / cp_size data-parallel and cp_size
// chunk-parallel ranks: equal numbers of sequences, and whole chunks, at least one for each rank. Usage error where
// that is impossible.
void ranks_split(int cp_size, int B, int64_t L, int C);
double ranks_min(double value);        // all-reduce: the minimum over all ranks
bool ranks_agree(uint64_t number);     // have all ranks the same number? If not, at least one rank gets false
void ranks_sum(double *values, int n); // all-reduce: the sum over all ranks
// All-gather among the chunk-parallel ranks of a sequence: all (cp_size, bytes) gets every rank's `local` (bytes). Both
// lie in the backend's memory. For ChunkParallel.gather.
void ranks_all_gather(void *context, const void *local, void *all, size_t bytes);
// Copies `bytes` bytes at src in rank `owner` to dst in rank 0, both in main memory.
void ranks_send_to_0(void *dst, const void *src, size_t bytes, int owner);

// Allocates what the following functions need for a model; ranks_close() frees it.
void ranks_open(Model *model, const Config *config);
void ranks_close(void);
// Reduce-scatter: adds up the gradients of one bucket over all ranks; each rank gets the sum for its shard. For
// megalodon_on_grad_ready, so that the sums overlap with the backward pass of the layers below.
void ranks_reduce_scatter_grads(Model *model, int bucket);
// All-gather: every rank gets the parameters that the others have updated.
void ranks_all_gather_params(Model *model);
// megalodon_read for gradients and moments, which are complete only in the ranks of their shards: dst in rank 0 gets n
// elements from element `first` on.
void ranks_read(Model *model, Buffer buffer, size_t first, size_t n, real *dst);

// ----------------------------------------------------------------------------
// tokenizer.c: llama2.c's tokenizer.bin, a SentencePiece BPE with byte fallback

typedef struct Tokenizer Tokenizer;

// Opens FILE of --tokenizer; errors are fatal. The model's vocabulary may be larger, by padding: see tokenizer_count.
Tokenizer *tokenizer_open(const char *path, int vocab_size);
// The same from memory, which must stay while the tokenizer is in use.
Tokenizer *tokenizer_read(const unsigned char *bytes, size_t size, int vocab_size, char *err);
void tokenizer_free(Tokenizer *tokenizer);
// In the next two functions tokenizer may be NULL: then tokens 0 to 255 are bytes and the others are special.
int tokenizer_count(const Tokenizer *tokenizer); // number of tokens; those from there on are padding
// The bytes of a token; *length gets their number, 0 for a special token. first: the token begins a text, so a leading
// space, which marks a word's start, is left out.
const unsigned char *tokenizer_piece(const Tokenizer *tokenizer, int32_t token, bool first, size_t *length);
// Encodes n bytes, which need not be UTF-8. Returns the tokens, freed by the caller; *count gets their number. No BOS
// or EOS is added. first: the text begins here, so that SentencePiece puts a space before it; otherwise it continues
// another text.
int32_t *tokenizer_encode(const Tokenizer *tokenizer, const unsigned char *text, size_t n, bool first, size_t *count);
size_t tokenizer_encode_bytes(size_t n); // upper bound of the memory that tokenizer_encode takes

// ----------------------------------------------------------------------------
// sampler.c: drawing a token from logits

typedef struct {
    double temperature; // 0: always the most likely token
    double top_p;       // 1: off
    double min_p;       // 0: off
    int top_k;          // 0: off
    int eot;            // a token at V or above that may be drawn too; 0: none
} Sampling;

double sample_uniform(uint64_t seed, int64_t position, int row); // in [0,1), from STREAM_SAMPLE
// Draws from softmax(logits / temperature), restricted first to the top_k most likely tokens, then to the fewest of
// these whose probabilities sum to top_p, then to those at least min_p times as likely as the most likely one. random
// is in [0,1). Of the logits from V on, which are the vocabulary's padding, only that of how->eot is read.
int sample_token(const real *logits, int V, const Sampling *how, double random);
size_t sample_bytes(int V); // memory that sample_token keeps allocated

// ----------------------------------------------------------------------------
// data.c: token files, mapped into memory, and the rows that training and validation read

typedef enum {
    FORMAT_AUTO,  // a .bin file by its header, otherwise bytes; a file that looks like uint16 tokens is refused
    FORMAT_BYTES, // each byte is a token, whatever the file looks like
    FORMAT_UINT16 // little-endian uint16 tokens, with or without the header of a .bin file
} DataFormat;
bool find_data_format(const char *name, DataFormat *format); // auto, bytes, uint16; false for another name

typedef struct {
    const char *path;            // as passed to tokens_open; must stay
    const unsigned char *bytes;  // the first token, little-endian
    int width;                   // bytes of a token: 1 or 2
    size_t count;                // number of tokens
    size_t first;                // index of the first one in the file
    const unsigned char *memory; // the whole file, header included
    size_t size;                 // bytes of the whole file
    int file;                    // descriptor of the mapped file; -1 if memory is a copy
} Tokens;

// Opens a file of tokens and checks each against vocab_size. On file systems that cannot map files it is read into
// memory, with a warning. Errors are fatal; so is a truncation of the file while it is in use.
Tokens tokens_open_as(const char *path, int vocab_size, DataFormat format);
Tokens tokens_open(const char *path, int vocab_size); // FORMAT_AUTO
static inline int32_t token_at(const Tokens *t, size_t i) {
    return t->width == 1 ? t->bytes[i] : t->bytes[2 * i] | t->bytes[2 * i + 1] << 8;
}
Tokens tokens_part(const Tokens *t, size_t first, size_t count); // shares the memory

// Writes "254368 bytes, xxh64 0123456789abcdef", the size and XXH64 of the whole file. Reads all of it.
enum { FINGERPRINT_SIZE = 64 };
void tokens_fingerprint(const Tokens *t, char text[FINGERPRINT_SIZE]);

typedef struct {
    size_t start; // index of its first input
    size_t end;   // index of its last target
    size_t row;   // number of rows into which the documents before it are cut
} Document;
typedef struct {
    size_t start; // of the document
    size_t at;    // where the row of the current step starts
    size_t end;   // of the document
} Place;

// Rows of a step's batch: L inputs, each with the next token as target. A position without a target has -1. Everything
// is determined by (seed, step, row), so that ranks and resumed runs agree. There are four orders:
//   neither eot nor carry: row starts are drawn uniformly from all positions.
//   carry: positions are divided into `rows` streams of equal length. Row r reads stream r window by window, the last
//       one padded, and then starts again from its beginning, with a fresh state. The seed has no influence.
//   eot: documents are cut into rows of L, and each row is drawn uniformly from the rows of all documents, so that
//       every token is equally likely to be trained on. The last row of a document is padded.
//   eot and carry: a row reads a document from start to end and then takes the next document, in an order that is
//       shuffled for each pass over all documents. Each is read once before any is read again.
typedef struct {
    Tokens tokens;
    uint64_t seed;
    int rows;            // of a step, of all ranks together
    int64_t L;           // tokens of a row
    int eot;             // token that ends a document; -1: none
    bool carry;          // a row continues where it ended in the step before
    Document *documents; // (count) in order, or shuffled if eot and carry; each has 2 tokens or more
    size_t count;        // number of documents
    Place *places;       // (rows) of step - 1, if eot and carry
    int64_t step;        // next step of places
    int64_t pass;        // next pass over the documents
    size_t next;         // index of the document that is taken next
    // The part that this rank reads: rows first_row .. first_row + num_rows - 1 of every batch_size rows, and its tokens
    // of each of their segments.
    int batch_size, first_row, num_rows;
    Split split;
} Reader;

// Fatal if there are too few tokens for `purpose`, which messages name. The rank's part is everything at first; the
// caller may then set the last four fields.
Reader reader_new(const Tokens *t, const char *purpose, uint64_t seed, int rows, int64_t L, int eot, bool carry);
void reader_free(Reader *reader);
size_t reader_bytes(const Reader *reader); // memory that it has allocated, a copy of the file included
// Reads this rank's part of a step: inputs and targets (batches, segments, num_rows, its tokens of the segment). fresh
// (its rows): the row starts from a fresh state. With eot and carry, steps must not decrease.
void reader_step(Reader *reader, int64_t step, int32_t *inputs, int32_t *targets, bool *fresh);

// Validation: up to B consecutive windows of L tokens from the cursor on, which is zero at first; each document starts
// with its first window. Without documents an incomplete last window is left out. Returns the number of windows of all
// ranks. inputs and targets are one batch, as in reader_step.
typedef struct {
    size_t document; // index of the current document
    size_t window;   // index of the next window in it
} Cursor;
int read_windows(const Reader *reader, Cursor *cursor, int B, int32_t *inputs, int32_t *targets);

// Reads input.tokens and input.targets (B,L) of a dump, allocated for the caller, and checks each against vocab_size.
// Ignored targets, -1 and -100, stay as they are, so that a dump of the batch equals the file.
void read_batch(const char *path, int vocab_size, int *B, int *L, int32_t **inputs, int32_t **targets);

// ----------------------------------------------------------------------------
// checkpoint.c: model files and optimizer files

bool save_model(const char *path, Model *model, const Config *config, char *err);
bool load_model(StFile *file, Model *model, const Config *config, char *err);
void checkpoint_load(StFile *file, Model *model, const Config *config); // load_model; closes the file; errors are fatal
// Rank 0 saves the optimizer while the other ranks call send_optimizer.
bool save_optimizer(const char *path, Model *model, const Config *config, int64_t seed, int64_t step, double val_loss,
                    char *err);
void send_optimizer(Model *model, const Config *config);
// Refuses an optimizer of another seed or step.
bool load_optimizer(StFile *file, Model *model, const Config *config, int64_t seed, int64_t step, char *err);

// ----------------------------------------------------------------------------
// state_file.c: state files, and rows of states

enum { MAX_ROWS = 1 << 16 };
// A state file holds a state, the seed of its random numbers, and, unless logits is NULL, the logits (B,V) after the
// last token of each row. A file of another configuration or number of rows is refused.
bool save_state(const char *path, const State *state, const Config *config, int64_t seed, const real *logits,
                char *err);
bool load_state(const char *path, State *state, const Config *config, int64_t *seed, real *logits, char *err);
int state_rows(const char *path, char *err); // number of rows B in a state file; 0 with err if it is none
void state_counts(const State *state, const Config *config,
                  int64_t *counts); // counts (B): tokens that each row has read
// Copies row i of a state into row j of another; both have k and v, or neither.
void state_copy(const State *from, int i, State *to, int j, const Config *config);

// ----------------------------------------------------------------------------
// dump.c: --dump

// A dump in the making: inputs, activations, logits, loss and gradients of one step, of all ranks. Every rank calls
// these functions; rank 0 writes. After a failure the remaining calls write nothing, and dump_finish returns false.
typedef struct Dump Dump;
Dump *dump_new(const char *path, Model *model, const Config *config, const Split *split);
// After the backward pass of a segment: writes its rows of all activations. inputs, targets: of the segment.
void dump_segment(Dump *dump, int64_t segment, const int32_t *inputs, const int32_t *targets);
// Writes loss and gradients, and completes the file. Frees the dump.
bool dump_finish(Dump *dump, double loss, char *err);
double dump_bytes(const Config *config);           // memory that a dump takes
double dump_bytes_per_token(const Config *config); // and for each token of a segment, times this rank's sequences
bool is_dump(const char *path);                    // returns whether the file is a dump

// ----------------------------------------------------------------------------
// segments.c: forward and backward passes over sequences of any length, a segment at a time

typedef struct {
    Model *model;
    const Config *config;
    int B; // sequences of this rank
    Split split;
    int64_t num_segments;
    State *state;     // of the segment that runs; NULL with one segment
    StateGrad *grad;  // gradient w.r.t. its outgoing state; NULL with one segment, or without a backward pass
    char *kept;       // (num_segments, bytes of a state) in main memory: the state before each segment
    int64_t *lengths; // (cp_size) tokens of the present segment that each chunk-parallel rank has
    bool parallel;    // chunk parallelism is on, with these lengths
} Segments;

// Memory beside the model that a split needs: in the backend's memory, and in main memory.
double segments_device_bytes(const Config *config, Mode mode, int B, const Split *split);
double segments_host_bytes(const Config *config, Mode mode, int B, const Split *split);
void segments_open(Segments *s, Model *model, const Config *config, Mode mode, int B, const Split *split);
void segments_close(Segments *s);
void segments_pause_ranks(Segments *s); // turns chunk parallelism off until the next pass

// Sum of the losses in nats of the first `rows` sequences, from fresh states; *counted gets the number of targets that
// this rank has counted. inputs and targets are a batch as split_offset() describes it.
double segments_loss(Segments *s, const int32_t *inputs, const int32_t *targets, int rows, int64_t *counted);

// A forward and backward pass over B sequences.
typedef struct {
    const int32_t *inputs, *targets; // a batch as split_offset() describes it
    State *carried;    // the state from which the sequences continue, replaced by that after them; or NULL
    DropoutKey key;    // its last two fields are set here
    double grad_scale; // the gradient is that of grad_scale times the sum of the losses
    void (*on_grad_ready)(Model *model, int bucket); // or NULL; called in the last backward pass only
    Dump *dump;                                      // gets each segment after its backward pass; or NULL
} Pass;
// Adds the gradients to GRADS. Returns the sum of this rank's losses in nats.
double segments_train(Segments *s, const Pass *pass);

// ----------------------------------------------------------------------------
// memory.c: the memory plan

// What a program is going to allocate for a model.
typedef struct {
    const Config *config;
    Mode mode;
    int B;                  // sequences of this rank
    Split split;            // of each sequence; the model is allocated for one segment
    double states;          // bytes in the backend's memory beside the model and what segments need
    double host;            // bytes in main memory, likewise
    double batch_per_token; // bytes in main memory for each token of this rank's sequences
    double host_per_token;  // bytes in main memory for each token of a segment
    bool segments;          // the program has the option --segment-len
} Demand;

// Returns the plan for the model. Fatal, with the MiB needed and with what would fit, unless all of the demand fits in
// what is available. *extra, unless NULL, gets the bytes beside the model.
MemoryPlan check_memory(const Demand *demand, double *extra);
// The longest segment_len that fits, the length of a sequence if that fits; 0 if none does.
int64_t longest_segment(const Demand *demand);

// ----------------------------------------------------------------------------
// run.c: a run's directory, DIR. It has a file `lock`, the kept options in options.txt, and checkpoints step-XXXXXXXX/
// of model.safetensors, optimizer.safetensors and, with --carry-state, state-0.safetensors, state-1.safetensors, ...

// Returns the step of the newest intact checkpoint, -1 if there is none: one whose model and optimizer open. Damaged
// checkpoints are named on stderr. *is_run: there are checkpoints, intact or damaged.
int64_t run_newest(const char *dir, bool *is_run);
void run_model_path(char path[PATH_SIZE], const char *dir, int64_t step); // the model file of that checkpoint
// Opens a model file: `path` itself, that of a checkpoint directory, or that of the newest intact checkpoint of a run's
// directory. If the file has a configuration, *config gets it, checked; otherwise *config stays and the result is
// false. Errors are fatal.
bool run_open_model(StFile *file, Config *config, const char *path);
char *
run_read_options(const char *dir); // contents of options.txt, for options_read; NULL, with a warning, if unreadable
// Creates the directory if there is none, and locks it; changes nothing in it. Fatal if it holds a run (unless resume
// or overwrite), or other files but no run, or if another run has locked it.
void run_claim(const char *dir, bool resume, bool overwrite);
// Usage error if the output of --flag would be a checkpoint of the run, or would lie in one.
void run_refuse_inside(const char *dir, const char *flag, const char *path);
// Writes options.txt and removes what killed runs left; with overwrite, also the older run. For when the command has
// been accepted.
void run_begin(const char *dir, const Option *options, bool overwrite);
// Writes the checkpoint after `step` updates. val_loss is NaN if unknown. states (num_states): those of this rank's
// rows that --carry-state carries on. Keeps the newest two checkpoints and the best by validation loss. stopped: only a
// signal causes this checkpoint, and the next one replaces it.
void run_save(const char *dir, Model *model, State *const *states, int num_states, const Config *config, int64_t seed,
              int64_t step, double val_loss, bool stopped);
// Loads parameters, moments and states from the newest checkpoint that loads; returns its step.
int64_t run_load(const char *dir, Model *model, State *const *states, int num_states, const Config *config,
                 int64_t seed);
double run_state_bytes(const Config *config, int num_states); // memory of such states and of the copies made here
