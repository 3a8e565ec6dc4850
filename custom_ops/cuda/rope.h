// Rotary embedding, and the write of keys and values to the cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fd::cuda {

// Once per step: cosine and sine of each pair of columns, and the cache slot of each token.
struct RotaryEmbedding {
  const int32_t* step;
  float theta;
  int head_dim;
  float* rotary_cos_sin;  // [tokens, head_dim]: cosine, sine, cosine, ...
  int32_t* slot_mapping;  // [tokens]: block * 64 + key
};

// Rotates queries in place, and writes rotated keys and values to the cache of a layer.
struct Rope {
  const int32_t* step;
  const float* rotary_cos_sin;
  const int32_t* slot_mapping;
  void* qkv;  // bfloat16 [tokens][(heads + 2 kv_heads) head_dim]
  int heads;
  int kv_heads;
  int head_dim;
  uint8_t* keys;
  uint8_t* values;
};

cudaError_t rotary_embedding(const RotaryEmbedding& args, int capacity, cudaStream_t stream);
cudaError_t rope(const Rope& args, int capacity, cudaStream_t stream);
cudaError_t prepare_rope();

}  // namespace fd::cuda
