/* A device as the engine sees it: memory, uploads, steps and operations, behind one C interface.
 *
 * Operations only enqueue: they take a stream and their memory from the caller, allocate nothing and never wait. What
 * varies from step to step (tokens, rows of an expert) is read from device memory; `capacity` bounds it and picks grid
 * and tile. So one captured graph serves every batch up to its capacity. Layouts of matrices, activations and the KV
 * cache: custom_ops/cuda/layout.h. Every function that returns an int returns an fd_status. */
#ifndef FD_DEVICE_H
#define FD_DEVICE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  FD_OK = 0,
  FD_BAD_ARGUMENT,
  FD_NO_MEMORY,
  FD_BROKEN, /* the device or its context cannot be used any more: the process must end */
  FD_NO_GRAPH,
} fd_status;

/* One line about the last call of this thread that did not return FD_OK. */
const char* fd_last_error(void);

/* Loads every kernel of the library into the current context, so that nothing is loaded inside a step. */
int fd_prepare(void);

/* ---- the device -------------------------------------------------------------------------------------------------- */

typedef struct fd_device fd_device;
typedef struct {
  uint64_t address;
  int64_t bytes;
} fd_buffer;

typedef struct {
  char name[64];
  char numeric_version[16];
  int32_t layout_version;
  int32_t multiprocessors;
  int64_t bytes_free;
  int64_t bytes_total;
} fd_info_t;

/* Opens GPU `ordinal` of those that the process sees, for one thread at a time. Another than a Hopper GPU is refused. */
int fd_open(int32_t ordinal, fd_device** device);
void fd_close(fd_device* device);
int fd_info(fd_device* device, fd_info_t* info);

/* Where the device's steps run, for the operations below. */
void* fd_stream(fd_device* device);

enum { FD_WEIGHTS, FD_CACHE, FD_WORK, FD_EXCHANGE };

/* Memory of one kind, zeroed; once each, before the first step. */
int fd_arena(fd_device* device, int32_t kind, int64_t bytes, fd_buffer* buffer);

/* A step: begin() copies the plan to the device, then the operations or a graph of them are enqueued, end() fetches the
 * results, wait() returns them. Two steps may be under way, and plan and results lie at one place in device memory for
 * all of them: the stream keeps their order. */
int fd_steps(fd_device* device, int64_t plan_bytes, int64_t result_bytes, fd_buffer* plan, fd_buffer* results);
int fd_step_begin(fd_device* device, const void* plan, int64_t bytes, uint64_t* ticket);
int fd_step_end(fd_device* device, uint64_t ticket);
/* `results` are the host's until the slot's next step begins. */
int fd_step_wait(fd_device* device, uint64_t ticket, const void** results);

enum { FD_BEGIN_CAPTURE, FD_END_CAPTURE, FD_LAUNCH, FD_FORGET_ALL };

/* What is enqueued between the first two verbs becomes the graph of `key`; FD_NO_GRAPH where there is none to launch. */
int fd_graph(fd_device* device, int32_t verb, uint64_t key);

/* ---- weights ---------------------------------------------------------------------------------------------------- */

/* Bytes of a matrix [outputs, inputs] of bfloat16, and of activations [rows, width]. */
int64_t fd_matrix_bytes(int32_t outputs, int32_t inputs);
int64_t fd_activation_bytes(int64_t rows, int32_t width);

enum { FD_FLOAT32, FD_FLOAT16, FD_BFLOAT16 };
enum { FD_PLAIN, FD_GATE, FD_UP };

/* One part [rows, inputs] of a matrix [outputs, inputs], in device memory. Strides are in elements: both [out, in] and
 * [in, out] can be read. Rows of gate and up take turns of eight; first_row counts among their own kind. */
typedef struct {
  const void* source;
  int32_t source_type;
  int32_t turn;
  int64_t row_stride;
  int64_t column_stride;
  int32_t rows;
  int32_t inputs;
  int32_t outputs;
  int32_t first_row;
  void* matrix;
} fd_retile_args;

int fd_retile(void* stream, const fd_retile_args* args);

/* ---- products --------------------------------------------------------------------------------------------------- */

enum {
  FD_OUT_BFLOAT16, /* out: bfloat16 [row][out_stride] */
  FD_OUT_FLOAT,    /* out: float [row][out_stride] */
  FD_OUT_ADD,      /* float, added to what is there */
  FD_OUT_SWIGLU,   /* gate and up in turns of eight outputs: silu(gate) * up, as activations */
};

/* One matrix for each group of rows; a dense product is one group. */
typedef struct {
  const void* weights;   /* matrices of fd_matrix_bytes each */
  const int32_t* slots;  /* [groups]: which matrix a group has; NULL: its own index */
  const void* tokens;    /* activations; each group's rows begin at the next multiple of `alignment` */
  const int32_t* counts; /* [groups] rows, in device memory */
  int32_t groups;
  int32_t alignment;     /* a power of two from 8 to 64, at least the tokens of the tile or 64 */
  int32_t outputs;       /* even */
  int32_t inputs;
  int32_t output;        /* FD_OUT_... */
  int32_t capacity;      /* rows of all groups together, at most */
  int32_t tile;          /* fd_tile's, or another one to force it: all give the same bits */
  int32_t reserved;
  const float* bias;     /* [outputs] or NULL; of dense products only */
  const int32_t* rows;   /* the row of `out` for row r of `tokens`; NULL: r */
  void* out;
  int64_t out_stride;
} fd_product_args;

int fd_product(void* stream, const fd_product_args* args);

/* The tile for so many rows in so many groups, and the tokens of a tile. Tiles are numbered from 0 to fd_tiles() - 1. */
int32_t fd_tiles(void);
int32_t fd_tile(int32_t capacity, int32_t groups);
int32_t fd_tile_tokens(int32_t tile);

/* ---- one step ---------------------------------------------------------------------------------------------------
 *
 * `step` is the buffer of custom_ops/include/step.h in device memory, `count` the number of rows there. */

typedef struct {
  const int32_t* step;
  const void* table; /* bfloat16 [vocabulary, width] */
  int32_t vocabulary;
  int32_t width;
  float* stream; /* [tokens, width] */
  int32_t capacity;
} fd_embedding_args;

int fd_embedding(void* stream, const fd_embedding_args* args);

/* Activations out of rows of the stream; with `router`, the logits of a layer's router as well. */
typedef struct {
  const float* stream;
  const float* weight;
  const int32_t* rows; /* which rows of the stream; NULL: row r */
  const int32_t* count;
  void* out;
  const float* router;   /* [experts, width] or NULL */
  float* router_logits;  /* [rows, experts] */
  int32_t* expert_rows;  /* [experts]: set to zero, for fd_route */
  float epsilon;
  int32_t width;
  int32_t experts;
  int32_t capacity;
} fd_norm_args;

int fd_norm(void* stream, const fd_norm_args* args);

/* Once a step: cosine and sine of each pair of columns, and each token's place in the cache. */
typedef struct {
  const int32_t* step;
  float* turns;    /* [tokens, head_dim] */
  int32_t* places; /* [tokens] */
  float theta;
  int32_t head_dim; /* 64 or 128 */
  int32_t capacity;
} fd_rotation_args;

int fd_rotation(void* stream, const fd_rotation_args* args);

/* Bytes of one layer's keys, or values, in blocks of 64 tokens. The cache must be zeros at first. */
int64_t fd_cache_bytes(int64_t blocks, int32_t kv_heads, int32_t head_dim);

/* Turns queries and keys, writes keys and values to the cache, and attends. */
typedef struct {
  const int32_t* step;
  const float* turns;
  const int32_t* places;
  void* qkv; /* bfloat16 [tokens][(heads + 2 kv_heads) head_dim] */
  void* keys;
  void* values;
  void* out; /* activations [tokens, heads * head_dim] */
  void* work;
  int64_t work_bytes; /* fd_attention_work_bytes; its first part must be zeros at first */
  int32_t heads;
  int32_t kv_heads; /* heads / kv_heads <= 16 */
  int32_t head_dim;
  int32_t capacity;
  int32_t has_prompts; /* whether any sequence may have more than one token in the step */
  int32_t reserved;
} fd_attention_args;

/* `segments`: of 512 keys, of all sequences of a step together. */
int64_t fd_attention_work_bytes(int64_t segments, int32_t kv_heads, int32_t head_dim);
int fd_attention(void* stream, const fd_attention_args* args);

/* ---- experts ---------------------------------------------------------------------------------------------------- */

/* Picks, and the rows of `x` in the order of experts, as fd_product takes them. */
typedef struct {
  const float* logits; /* [tokens, experts] */
  const float* bias;   /* [experts]: for the choice alone */
  const int32_t* count;
  const void* x;      /* activations [tokens, width] */
  int32_t* picks;     /* [tokens, k]: best first, the lower expert first among equals */
  float* weights;     /* [tokens, k] */
  int32_t* counts;    /* [experts]: zeros before, rows of each expert afterwards */
  int32_t* places;    /* [tokens, k] scratch */
  void* rows;         /* activations [fd_expert_rows, width] */
  int32_t* assignments; /* [fd_expert_rows]: token * k + pick of each of those rows */
  float norm_min;
  int32_t experts;
  int32_t k;
  int32_t width;
  int32_t alignment;
  int32_t capacity;
} fd_route_args;

int64_t fd_expert_rows(int32_t capacity, int32_t k, int32_t experts, int32_t alignment);
int fd_route(void* stream, const fd_route_args* args);

/* stream[t] += (sum over j of weights[t, j] * results[t, j]) + shared[t], in that order. */
typedef struct {
  const void* results; /* bfloat16 [tokens, k, width] */
  const float* weights;
  const float* shared; /* [tokens, width] or NULL */
  const int32_t* count;
  float* stream;
  int32_t k;
  int32_t width;
  int32_t capacity;
} fd_combine_args;

int fd_combine(void* stream, const fd_combine_args* args);

/* ---- draws ------------------------------------------------------------------------------------------------------ */

/* The fields of SamplingRow in custom_ops/include/sample.h. */
typedef struct {
  double temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty;
  uint64_t seed;
  uint32_t choice, position;
  int32_t top_k, logprobs, first_token, num_seen, num_masked, reserved;
} fd_sampling_row;

typedef struct {
  const float* logits; /* [rows, vocabulary] */
  const int32_t* count;
  const fd_sampling_row* rows; /* NULL: the most likely token of each row */
  const int32_t* tokens;       /* pairs of token and count */
  int32_t* drawn;              /* [rows]; -1 for a row that holds NaN or nothing finite */
  int32_t* top_tokens;         /* [rows, width] */
  double* logprobs;            /* [rows, width] */
  void* work;                  /* fd_draw_work_bytes for each row; not for greedy draws */
  int32_t vocabulary;
  int32_t width;
  int32_t capacity;
} fd_draw_args;

int64_t fd_draw_work_bytes(int32_t vocabulary);
int fd_draw(void* stream, const fd_draw_args* args);

#ifdef __cplusplus
}
#endif
#endif
