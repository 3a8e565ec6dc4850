// The C interface: checks arguments and turns errors into one line.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "../include/fd_device.h"
#include "attention.h"
#include "gemm.h"
#include "norm.h"
#include "retile.h"
#include "rope.h"
#include "route.h"
#include "sample.h"
#include "status.h"

namespace fd::cuda {
namespace {

thread_local std::string last_error;

}  // namespace

int fail(int status, std::string message) {
  last_error = std::move(message);
  return status;
}

int status_of(const std::string& operation, cudaError_t error) {
  if (error == cudaSuccess) return FD_OK;
  const int status = error == cudaErrorMemoryAllocation ? FD_NO_MEMORY
                     : error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration ||
                             error == cudaErrorInvalidDevice
                         ? FD_BAD_ARGUMENT
                         : FD_BROKEN;
  // Clear the error, or the next call would report it again.
  cudaGetLastError();
  return fail(status, operation + ": " + cudaGetErrorString(error));
}

namespace {

int refuse(const char* message) { return fail(FD_BAD_ARGUMENT, message); }

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

int checked(const fd_retile_args& args, Retile* part) {
  if (args.source_type < FD_FLOAT32 || args.source_type > FD_BFLOAT16) return refuse("retile: unknown type of source");
  if (args.turn < FD_PLAIN || args.turn > FD_UP) return refuse("retile: neither plain rows nor gate or up");
  const int rows = args.turn == FD_PLAIN ? args.outputs : args.outputs / 2;
  if (args.rows < 1 || args.inputs < 1 || args.first_row < 0 || args.first_row + args.rows > rows) {
    return refuse("retile: the part does not lie inside the matrix");
  }
  if (args.turn != FD_PLAIN && args.outputs % 16 != 0) return refuse("retile: gate and up need a multiple of 8 rows each");
  *part = {args.source, static_cast<Source>(args.source_type), args.row_stride, args.column_stride, args.rows,
           args.inputs, static_cast<uint8_t*>(args.matrix), args.outputs, args.first_row, static_cast<Turn>(args.turn)};
  return FD_OK;
}

int checked(const fd_product_args& args, Product* product) {
  const int tokens = args.tile < 0 || args.tile >= static_cast<int>(Tile::kCount) ? 0 : tile_tokens(static_cast<Tile>(args.tile));
  if (tokens == 0) return refuse("product: unknown tile");
  if (args.output < FD_OUT_BFLOAT16 || args.output > FD_OUT_SWIGLU) return refuse("product: unknown output");
  if (args.groups < 1 || args.groups > kMaxGroups) return refuse("product: between 1 and 256 groups");
  if (args.outputs < 2 || args.outputs % 2 != 0 || args.inputs < 1) return refuse("product: an even number of outputs");
  if (args.output == FD_OUT_SWIGLU && args.outputs % 16 != 0) return refuse("product: SwiGLU needs a multiple of 16 outputs");
  if (args.output == FD_OUT_BFLOAT16 && args.out_stride % 2 != 0) return refuse("product: an odd stride of bfloat16 rows");
  if (args.capacity < 1) return refuse("product: a capacity of at least 1");
  if (args.groups > 1 && (args.alignment > 64 || args.alignment % (tokens < 64 ? tokens : 64) != 0)) {
    return refuse("product: the tile does not fit the alignment of groups");
  }
  *product = {static_cast<const uint8_t*>(args.weights), args.slots, static_cast<const uint8_t*>(args.tokens), args.counts,
              args.is_early != 0, args.groups, args.alignment, args.outputs, args.inputs,
              k_segments(args.outputs, args.inputs), args.bias, args.rows, args.out, args.out_stride};
  return FD_OK;
}

}  // namespace fd::cuda

using namespace fd::cuda;

extern "C" {

const char* fd_last_error(void) { return last_error.c_str(); }
const char* fd_platform(void) { return "GPU"; }

int fd_prepare(void) {
  for (const auto prepare : {prepare_products, prepare_pairs, prepare_retile, prepare_norm, prepare_rope, prepare_prompts,
                             prepare_decoding, prepare_route, prepare_draw}) {
    const int result = status_of("loading kernels", prepare());
    if (result != FD_OK) return result;
  }
  return FD_OK;
}

int64_t fd_matrix_bytes(const fd_device*, int32_t outputs, int32_t inputs) { return matrix_bytes(outputs, inputs); }
int64_t fd_router_bytes(int32_t experts, int32_t inputs) { return int64_t{experts} * inputs * 4; }
int64_t fd_activation_bytes(int64_t rows, int32_t width) { return activation_bytes(rows, width); }

int fd_retile(void* stream, const fd_retile_args* args) {
  Retile part;
  const int result = checked(*args, &part);
  return result == FD_OK ? status_of("retile", retile(part, stream_of(stream))) : result;
}

int32_t fd_tiles(void) { return static_cast<int32_t>(Tile::kCount); }
int32_t fd_tile(int32_t capacity, int32_t groups) { return static_cast<int32_t>(choose_tile(capacity, groups)); }
int32_t fd_tile_tokens(int32_t tile) {
  return tile < 0 || tile >= fd_tiles() ? 0 : tile_tokens(static_cast<Tile>(tile));
}

int fd_product(void* stream, const fd_product_args* args) {
  Product one;
  const int result = checked(*args, &one);
  if (result != FD_OK) return result;
  return status_of("product", product(one, static_cast<Output>(args->output), args->capacity, static_cast<Tile>(args->tile),
                                      stream_of(stream)));
}

int fd_product_pair(void* stream, const fd_product_args* dense, const fd_product_args* grouped) {
  const auto output = static_cast<Output>(dense->output), grouped_output = static_cast<Output>(grouped->output);
  const bool is_one = dense->groups == 1 && dense->slots == nullptr && dense->rows == nullptr && dense->is_early != 0 &&
                      dense->tile == grouped->tile &&
                      is_pair(output, grouped_output, dense->capacity, static_cast<Tile>(dense->tile));
  if (!is_one) {
    const int result = fd_product(stream, dense);
    return result == FD_OK ? fd_product(stream, grouped) : result;
  }
  Product first, second;
  int result = checked(*dense, &first);
  if (result == FD_OK) result = checked(*grouped, &second);
  if (result != FD_OK) return result;
  return status_of("products", product_pair(first, output, second, grouped->capacity, stream_of(stream)));
}

int fd_embedding(void* stream, const fd_embedding_args* args) {
  if (args->capacity < 1 || args->vocabulary < 1) return refuse("embedding: a capacity and a vocabulary of at least 1");
  if (args->width % 2 != 0) return refuse("embedding: an even width");
  return status_of("embedding", embedding({args->step, args->table, args->vocabulary, args->width, args->hidden_states, args->drawn},
                                          args->capacity, stream_of(stream)));
}

int fd_norm(void* stream, const fd_norm_args* args) {
  if (args->capacity < 1) return refuse("norm: a capacity of at least 1");
  if (args->width < 4 || args->width > kMaxWidth || args->width % 4 != 0)
    return refuse("norm: a width that is a multiple of 4, up to 16384");
  const Norm norm_args{args->hidden_states,
                       args->weight,
                       args->epsilon,
                       args->width,
                       args->rows,
                       args->count,
                       static_cast<uint8_t*>(args->out)};
  if (args->router == nullptr) return status_of("norm", norm(norm_args, args->capacity, stream_of(stream)));
  if (args->experts < 1 || args->experts > kMaxExperts) return refuse("norm: between 1 and 256 experts");
  return status_of("norm", norm_and_router(norm_args, {static_cast<const float*>(args->router), args->experts, args->router_logits, args->expert_rows},
                                        args->capacity, stream_of(stream)));
}

int fd_rotation(void* stream, const fd_rotation_args* args) {
  if (args->capacity < 1) return refuse("rotation: a capacity of at least 1");
  return status_of("rotation",
                   rotary_embedding({args->step, args->theta, args->head_dim, args->rotary_cos_sin, args->slot_mapping},
                                    args->capacity, stream_of(stream)));
}

int64_t fd_cache_bytes(const fd_device*, int64_t blocks, int32_t kv_heads, int32_t head_dim) {
  return cache_bytes(blocks, kv_heads, head_dim);
}

int64_t fd_attention_work_bytes(int64_t segments, int32_t kv_heads, int32_t head_dim) {
  return int64_t{kMaxSequences} * kv_heads * 4 + attention_partials(segments, kv_heads, head_dim) * 4;
}

int fd_attention(void* stream, const fd_attention_args* args) {
  if (args->capacity < 1) return refuse("attention: a capacity of at least 1");
  if (args->head_dim != 64 && args->head_dim != 128) return refuse("attention: heads of 64 or 128 columns");
  if (args->kv_heads < 1 || args->heads % args->kv_heads != 0 || args->heads / args->kv_heads > kMaxGroupHeads) {
    return refuse("attention: at most 16 query heads for each of the kv heads, equally many");
  }
  const cudaStream_t to = stream_of(stream);
  int* const arrived = static_cast<int*>(args->work);
  const Attention attention_args{args->step,
                                 args->rotary_cos_sin,
                                 args->qkv,
                                 static_cast<uint8_t*>(args->keys),
                                 static_cast<uint8_t*>(args->values),
                                 static_cast<uint8_t*>(args->out),
                                 args->heads,
                                 args->kv_heads,
                                 1.4426950408889634f / sqrtf(static_cast<float>(args->head_dim)),
                                 reinterpret_cast<float*>(arrived + kMaxSequences * args->kv_heads),
                                 arrived};
  if (args->has_prompts != 0) {
    const int result = status_of("rope", rope({args->step, args->rotary_cos_sin, args->slot_mapping, args->qkv,
                                               args->heads, args->kv_heads, args->head_dim,
                                               static_cast<uint8_t*>(args->keys), static_cast<uint8_t*>(args->values)},
                                              args->capacity, to));
    if (result != FD_OK) return result;
    const int prompts = status_of("attention of prompts", attend_prompts(attention_args, args->head_dim, to));
    if (prompts != FD_OK) return prompts;
  }
  // A step without prompts writes only to the newest tiles, which this kernel writes itself.
  return status_of("attention", attend_decoding(attention_args, args->head_dim, args->capacity, args->has_prompts == 0, to));
}

int64_t fd_expert_rows(int32_t capacity, int32_t k, int32_t experts, int32_t alignment) {
  const int64_t rows = int64_t{capacity} * k;
  return rows + std::min<int64_t>(rows, experts) * (alignment - 1);
}

int fd_route(void* stream, const fd_route_args* args) {
  if (args->capacity < 1) return refuse("route: a capacity of at least 1");
  if (args->experts < 1 || args->experts > kMaxExperts) return refuse("route: between 1 and 256 experts");
  if (args->k < 1 || args->k > kMaxTopk || args->k > args->experts) return refuse("route: between 1 and 16 picks");
  const cudaStream_t to = stream_of(stream);
  const Route picks{args->logits,   args->bias,         args->norm_min, args->experts,       args->k, args->count,
                    args->topk_ids, args->topk_weights, args->counts,   args->rows_in_expert};
  const Permute move{static_cast<const uint8_t*>(args->x), args->topk_ids, args->rows_in_expert, args->counts, args->count,
                     args->experts, args->k, args->width, args->alignment, static_cast<uint8_t*>(args->rows),
                     args->assignments};
  return status_of("route", route_and_permute(picks, move, args->capacity, to));
}

int fd_combine(void* stream, const fd_combine_args* args) {
  if (args->capacity < 1 || args->width % 2 != 0) return refuse("combine: a capacity of at least 1 and an even width");
  const Combine sums{args->results, args->topk_weights, args->shared, args->count, args->k, args->width, args->hidden_states};
  const cudaStream_t to = stream_of(stream);
  if (args->norm == nullptr) return status_of("combine", combine(sums, args->capacity, to));
  if (args->width > kMaxWidth || args->width % 4 != 0) return refuse("combine: a norm of a multiple of 4 columns, up to 16384");
  const Norm norm{args->hidden_states, args->norm, args->epsilon, args->width, nullptr, args->count,
                  static_cast<uint8_t*>(args->normed)};
  return status_of("combine", combine_and_norm(sums, norm, args->capacity, to));
}

int64_t fd_draw_work_bytes(int32_t vocabulary) { return draw_work(vocabulary); }

int fd_draw(void* stream, const fd_draw_args* args) {
  if (args->capacity < 1) return refuse("draw: a capacity of at least 1");
  if (args->vocabulary < 1 || args->vocabulary > 1 << 20) return refuse("draw: a vocabulary of 1 to 1048576 tokens");
  return status_of("draw", draw({args->logits, args->vocabulary, args->count, args->rows, args->tokens, args->drawn,
                              args->top_tokens, args->logprobs, args->width, args->work},
                             args->capacity, stream_of(stream)));
}

}  // extern "C"
