/* C interface of a device: memory, uploads, steps and operations.
 *
 * Operations only enqueue work: the caller provides a stream and all memory, and they never allocate or wait. Values
 * that vary from step to step (tokens, rows per expert) are read from device memory; `capacity` is their upper bound
 * and determines grid and tile. One captured graph therefore serves all batches up to its capacity. Functions that
 * return int return an fd_status.
 *
 * libfd_cuda.so implements it for GPUs, libfd_cpu.so for CPUs. Callers see matrices, activations and the KV cache only
 * as bytes: their layouts are those of custom_ops/cuda/layout.h on a GPU, and those of custom_ops/include/matrix.h,
 * activations.h and cpu/kernels/kernels.h on a CPU. "bfloat16" below is the device's type of values between operations:
 * bfloat16 on a GPU; on a CPU float, which is rounded only in weights and cache. */
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
  FD_BROKEN, /* the device or its context is unusable; the process must end */
  FD_NO_GRAPH,
} fd_status;

/* Returns one line about the last call of this thread that did not return FD_OK. */
const char* fd_last_error(void);

/* Returns what the library computes on: "GPU" or "CPU". */
const char* fd_platform(void);

/* Loads all kernels of the library into the current context, so that no step has to. */
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
  int32_t multiprocessors; /* of a GPU, or threads */
  int64_t bytes_free;
  int64_t bytes_total;
  int32_t value_bytes;        /* of a value of FD_OUT_BFLOAT16 */
  int32_t biases_in_matrices; /* nonzero: biases are uploaded as FD_BIAS, and fd_product_args.bias is NULL */
} fd_info_t;

typedef struct {
  int32_t ordinal;     /* of the GPUs visible to the process; it must be a Hopper GPU */
  int32_t type;        /* of matrices, embedding and cache: FD_BFLOAT16, or FD_FLOAT32 on a CPU */
  int32_t block_size;  /* tokens of a block of the cache: 64 on a GPU */
  int32_t threads;     /* of a CPU; all devices of the process share them */
  const int32_t* cpus; /* [threads]: CPU of each thread, -1: any; NULL: any */
} fd_open_args;

/* Not thread-safe. */
int fd_open(const fd_open_args* args, fd_device** device);
void fd_close(fd_device* device);
int fd_info(fd_device* device, fd_info_t* info);

/* Returns the CUDA stream of the device's steps, for the operations below. */
void* fd_stream(fd_device* device);

/* Returns a second stream. What is enqueued there between fork() and join() runs beside the first one. */
void* fd_side_stream(fd_device* device);
int fd_fork(fd_device* device);
int fd_join(fd_device* device);

/* Copies from the device once all enqueued work is done. For tests and diagnosis. */
int fd_fetch(fd_device* device, void* to, uint64_t from, int64_t bytes);

enum { FD_WEIGHTS, FD_CACHE, FD_WORK, FD_EXCHANGE };

/* Allocates zeroed memory of one kind; once per kind, before the first step. */
int fd_arena(fd_device* device, int32_t kind, int64_t bytes, fd_buffer* buffer);

/* A step: begin() copies the plan to the device, the caller enqueues operations or a graph of them, end() enqueues the
 * copy of the results, wait() returns them. Two steps may be in progress. They share one plan and one result buffer in
 * device memory, because the stream serialises them. */
int fd_steps(fd_device* device, int64_t plan_bytes, int64_t result_bytes, fd_buffer* plan, fd_buffer* results);
int fd_step_begin(fd_device* device, const void* plan, int64_t bytes, uint64_t* ticket);
int fd_step_end(fd_device* device, uint64_t ticket);
/* `results` points to host memory that is valid until the next step of the same slot begins. */
int fd_step_wait(fd_device* device, uint64_t ticket, const void** results);

enum { FD_BEGIN_CAPTURE, FD_END_CAPTURE, FD_LAUNCH, FD_FORGET_ALL };

/* Work enqueued between the first two verbs becomes the graph of `key`. FD_LAUNCH returns FD_NO_GRAPH without one. */
int fd_graph(fd_device* device, int32_t verb, uint64_t key);

/* ---- weights ---------------------------------------------------------------------------------------------------- */

/* Bytes of a matrix [outputs, inputs], of the matrix of a router, which is float32, and of activations [rows, width]. */
int64_t fd_matrix_bytes(const fd_device* device, int32_t outputs, int32_t inputs);
int64_t fd_router_bytes(int32_t experts, int32_t inputs);
int64_t fd_activation_bytes(int64_t rows, int32_t width);

enum { FD_FLOAT32, FD_FLOAT16, FD_BFLOAT16 };
enum { FD_PLAIN, FD_GATE, FD_UP, FD_ROUTER, FD_BIAS };

/* One part [rows, inputs] of a matrix [outputs, inputs], in device memory. Strides are in elements, for both [out, in]
 * and [in, out]. Rows of gate and up are interleaved as the device wants; first_row counts rows of the same kind.
 *
 * fd_upload also accepts FD_ROUTER: rows of a router, FD_FLOAT32 and adjacent; and, where matrices hold their biases,
 * FD_BIAS: all biases of a matrix, FD_FLOAT32, those of gate and up in turns of 16 with zeros to a full turn. */
typedef struct {
  const void* source;
  int32_t source_type; /* FD_FLOAT32, FD_FLOAT16 or FD_BFLOAT16 */
  int32_t turn;        /* kind of the rows */
  int64_t row_stride;
  int64_t column_stride;
  int32_t rows;
  int32_t inputs;
  int32_t outputs;
  int32_t first_row;
  void* matrix;
} fd_retile_args;

int fd_retile(void* stream, const fd_retile_args* args);

/* Uploads weights from host memory, such as the pages of a checkpoint: begin(), any number of parts of matrices and of
 * plain bytes, finish(). In `args`, `source` is in host memory and one stride is 1. finish() frees the staging memory
 * (of a GPU: 64 MiB pinned, 64 MiB on the device) and sets `bad_tag` to the tag of a part with a value that is not
 * finite, or 0. */
int fd_upload_begin(fd_device* device);
int fd_upload(fd_device* device, const fd_retile_args* args, int32_t tag);
int fd_upload_bytes(fd_device* device, uint64_t to, const void* from, int64_t bytes);
int fd_upload_finish(fd_device* device, int32_t* bad_tag);

/* ---- products --------------------------------------------------------------------------------------------------- */

enum {
  FD_OUT_BFLOAT16, /* out: bfloat16 [row][out_stride] */
  FD_OUT_FLOAT,    /* out: float [row][out_stride] */
  FD_OUT_ADD,      /* float, added to `out` */
  FD_OUT_SWIGLU,   /* silu(gate) * up as activations; gate and up are interleaved */
};

/* A product with one matrix per group of rows; a dense product has one group. */
typedef struct {
  const void* weights;   /* matrices of fd_matrix_bytes each */
  const int32_t* slots;  /* [groups]: matrix of each group; NULL: the group's index */
  const void* tokens;    /* activations; the rows of each group begin at the next multiple of `alignment` */
  const int32_t* counts; /* [groups] rows, in device memory */
  int32_t groups;
  int32_t alignment;     /* a power of two from 8 to 64, at least min(tokens of the tile, 64) */
  int32_t outputs;       /* even */
  int32_t inputs;
  int32_t output;        /* FD_OUT_... */
  int32_t capacity;      /* upper bound of the total rows of all groups */
  int32_t tile;          /* from fd_tile, or any other: all give the same bits */
  int32_t is_early;      /* nonzero: counts and slots were written before the previous operation of the stream, which
                          * is a product, or before the step; then weights are fetched before that operation ends */
  const float* bias;   /* [outputs] or NULL; for dense products only */
  const int32_t* rows; /* row of `out` for row r of `tokens`; NULL: r */
  void* out;
  int64_t out_stride;
} fd_product_args;

int fd_product(void* stream, const fd_product_args* args);

/* Two independent products: a dense one and one with groups. With few tokens they are one kernel, if `dense->is_early`
 * and both have the smallest tile. */
int fd_product_pair(void* stream, const fd_product_args* dense, const fd_product_args* grouped);

/* The best tile for `capacity` rows in `groups` groups, and the tokens of a tile. Tiles are 0 to fd_tiles() - 1. */
int32_t fd_tiles(void);
int32_t fd_tile(int32_t capacity, int32_t groups);
int32_t fd_tile_tokens(int32_t tile);

/* ---- one step ---------------------------------------------------------------------------------------------------
 *
 * `step` is the buffer of custom_ops/include/step.h and `count` a number of rows, both in device memory and written
 * before the step. Weights must be complete by then, too: they are read before the previous operation ends. */

typedef struct {
  const int32_t* step;
  const void* table; /* [vocabulary, width] of the device's type */
  int32_t vocabulary;
  int32_t width;
  float* hidden_states; /* [tokens, width] */
  const int32_t* drawn; /* the tokens that the step before drew: id -1 - r of a step is drawn[r]; NULL: no such ids */
  int32_t capacity;
} fd_embedding_args;

int fd_embedding(void* stream, const fd_embedding_args* args);

/* RMS norm of rows of hidden_states as activations; with `router`, also the router logits of a layer. */
typedef struct {
  const float* hidden_states;
  const float* weight;
  const int32_t* rows; /* row of hidden_states for output row r; NULL: r */
  const int32_t* count;
  void* out;
  const void* router;    /* fd_router_bytes, or NULL */
  float* router_logits;  /* [rows, experts] */
  int32_t* expert_rows;  /* [experts]: set to zero, for fd_route */
  float epsilon;
  int32_t width;
  int32_t experts;
  int32_t capacity;
} fd_norm_args;

int fd_norm(void* stream, const fd_norm_args* args);

/* Once per step: cosine and sine of each pair of columns, and the cache slot of each token. */
typedef struct {
  const int32_t* step;
  float* rotary_cos_sin; /* [tokens, head_dim] */
  int32_t* slot_mapping; /* [tokens] */
  float theta;
  int32_t head_dim; /* 64 or 128 on a GPU */
  int32_t capacity;
} fd_rotation_args;

int fd_rotation(void* stream, const fd_rotation_args* args);

/* Bytes of the keys, or of the values, of one layer. The cache must be zero-initialised. */
int64_t fd_cache_bytes(const fd_device* device, int64_t blocks, int32_t kv_heads, int32_t head_dim);

/* Applies the rotary embedding, writes keys and values to the cache, and computes attention. May change `qkv`. Without
 * prompts, the plan and the cache of earlier steps may be read before the previous kernel in the stream has ended, so
 * a copy has to lie between the steps; fd_step_begin makes one. */
typedef struct {
  const int32_t* step;
  const float* rotary_cos_sin;
  const int32_t* slot_mapping;
  void* qkv; /* bfloat16 [tokens][(heads + 2 kv_heads) head_dim] */
  void* keys;
  void* values;
  void* out; /* activations [tokens, heads * head_dim] */
  void* work;
  int64_t work_bytes; /* fd_attention_work_bytes; zero-initialised */
  int32_t heads;
  int32_t kv_heads; /* heads / kv_heads <= 16 on a GPU */
  int32_t head_dim;
  int32_t capacity;
  int32_t has_prompts; /* nonzero if a sequence may have more than one token in the step */
  int32_t reserved;
} fd_attention_args;

/* `segments`: number of segments of 512 keys over all sequences of a step. */
int64_t fd_attention_work_bytes(int64_t segments, int32_t kv_heads, int32_t head_dim);
int fd_attention(void* stream, const fd_attention_args* args);

/* ---- experts ---------------------------------------------------------------------------------------------------- */

/* Selects the experts of each token, and groups the rows of `x` by expert for fd_product. */
typedef struct {
  const float* logits; /* [tokens, experts] */
  const float* bias;   /* [experts]: for the selection only */
  const int32_t* count;
  const void* x;      /* activations [tokens, width] */
  int32_t* topk_ids;  /* [tokens, k]: best first, ties by lower expert */
  float* topk_weights;     /* [tokens, k] */
  int32_t* counts;         /* [experts]: zeros on entry, rows of each expert on return */
  int32_t* rows_in_expert; /* [tokens, k] scratch */
  void* rows;         /* activations [fd_expert_rows, width] */
  int32_t* assignments; /* [fd_expert_rows]: token * k + top-k index of each row */
  float norm_min;
  int32_t experts;
  int32_t k;
  int32_t width;
  int32_t alignment;
  int32_t capacity;
} fd_route_args;

int64_t fd_expert_rows(int32_t capacity, int32_t k, int32_t experts, int32_t alignment);
int fd_route(void* stream, const fd_route_args* args);

/* hidden_states[t] += (sum over j of topk_weights[t, j] * results[t, j]) + shared[t], in that order. With `norm`, also
 * the RMS norm of the result as activations, like fd_norm. */
typedef struct {
  const void* results; /* bfloat16 [tokens, k, width] */
  const float* topk_weights;
  const float* shared; /* [tokens, width] or NULL */
  const int32_t* count;
  float* hidden_states;
  const float* norm; /* [width] or NULL */
  void* normed;
  float epsilon;
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
  int32_t top_k, logprobs, first_token, num_seen, num_masked, given, num_biased, num_mask_entries;
} fd_sampling_row;

typedef struct {
  const float* logits; /* [rows, vocabulary] */
  const int32_t* count;
  const fd_sampling_row* rows; /* NULL: greedy */
  const int32_t* tokens;       /* pairs of token and count, see custom_ops/include/sample.h */
  int32_t* drawn;              /* [rows]; -1 for a row that holds NaN or no finite value */
  int32_t* top_tokens;         /* [rows, width] */
  double* logprobs;            /* [rows, width] */
  void* work;                  /* fd_draw_work_bytes per row; unused for greedy draws */
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
