#include "rope.h"

#include "attention.h"
#include "hopper.cuh"
#include "launch.h"
#include "step.cuh"

namespace fd::cuda {
namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void rotary_embedding_kernel(const __grid_constant__ RotaryEmbedding args) {
  let_successor_start();
  wait_for_predecessor();
  const StepView step(args.step);
  for (int token = blockIdx.x; token < step.num_tokens; token += gridDim.x) {
    const int sequence = step.sequence_of(token), position = step.start[sequence] + token - step.first_token[sequence];
    if (threadIdx.x == 0) {
      const int block = step.block_tables[int64_t{sequence} * step.table_width + position / kCacheBlock];
      args.slot_mapping[token] = block * kCacheBlock + position % kCacheBlock;
    }
    for (int j = threadIdx.x; j < args.head_dim / 2; j += blockDim.x) {
      // Rounds like the CPU: frequency and angle in float, the rest in double.
      const float power = static_cast<float>(
          pow(static_cast<double>(args.theta), static_cast<double>(static_cast<float>(2 * j) / args.head_dim)));
      const double angle = static_cast<float>(position) * __fdiv_rn(1.0f, power);
      double sine, cosine;
      sincos(angle, &sine, &cosine);
      float* const cos_sin = args.rotary_cos_sin + int64_t{token} * args.head_dim + 2 * j;
      cos_sin[0] = static_cast<float>(cosine), cos_sin[1] = static_cast<float>(sine);
    }
  }
}

// One block per token; a thread processes two adjacent columns at a time. Sequences with one token are left to
// attend_decoding().
__global__ __launch_bounds__(kThreads) void rope_kernel(const __grid_constant__ Rope args) {
  let_successor_start();
  wait_for_predecessor();
  const StepView step(args.step);
  const int token = blockIdx.x;
  if (token >= step.num_tokens || step.length(step.sequence_of(token)) == 1) return;
  const int slot = args.slot_mapping[token], half_dim = args.head_dim / 2, all = args.heads + 2 * args.kv_heads;
  __nv_bfloat162* const row = static_cast<__nv_bfloat162*>(args.qkv) + int64_t{token} * all * half_dim;
  const float2* const rotary_cos_sin = reinterpret_cast<const float2*>(args.rotary_cos_sin) + int64_t{token} * half_dim;
  for (int i = threadIdx.x; i < all * half_dim; i += kThreads) {
    const int head = i / half_dim, pair = i % half_dim;
    __nv_bfloat162 value = row[i];
    if (head < args.heads + args.kv_heads) {
      const float2 x = __bfloat1622float2(value), cos_sin = rotary_cos_sin[pair];
      value = __floats2bfloat162_rn(__fmaf_rn(x.x, cos_sin.x, -__fmul_rn(x.y, cos_sin.y)),
                                    __fmaf_rn(x.y, cos_sin.x, __fmul_rn(x.x, cos_sin.y)));
    }
    if (head < args.heads) {
      row[i] = value;
      continue;
    }
    const bool is_key = head < args.heads + args.kv_heads;
    const int kv_head = head - args.heads - (is_key ? 0 : args.kv_heads);
    *reinterpret_cast<__nv_bfloat162*>(
        (is_key ? args.keys : args.values) +
        in_cache(slot / kCacheBlock, args.kv_heads, kv_head, args.head_dim, slot % kCacheBlock, 2 * pair)) = value;
  }
}

}  // namespace

cudaError_t rotary_embedding(const RotaryEmbedding& args, int capacity, cudaStream_t stream) {
  return launch(rotary_embedding_kernel, dim3(capacity), 64, 0, 1, stream, args);
}

cudaError_t rope(const Rope& args, int capacity, cudaStream_t stream) {
  return launch(rope_kernel, dim3(capacity), kThreads, 0, 1, stream, args);
}

cudaError_t prepare_rope() {
  const cudaError_t error = prepare(reinterpret_cast<const void*>(rotary_embedding_kernel), 0);
  return error == cudaSuccess ? prepare(reinterpret_cast<const void*>(rope_kernel), 0) : error;
}

}  // namespace fd::cuda
