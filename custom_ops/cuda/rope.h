// Rotary positions, and keys and values into the cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fd::cuda {

// Once a step: cosine and sine of each pair of columns, and each token's place in the cache.
struct Rotation {
  const int32_t* step;
  float theta;
  int head_dim;
  float* turns;     // [tokens, head_dim]: cosine, sine, cosine, ...
  int32_t* places;  // [tokens]: block * 64 + key
};

// Turns queries in place, and writes turned keys and values into a layer's cache.
struct Rope {
  const int32_t* step;
  const float* turns;
  const int32_t* places;
  void* qkv;  // bfloat16 [tokens][(heads + 2 kv_heads) head_dim]
  int heads;
  int kv_heads;
  int head_dim;
  uint8_t* keys;
  uint8_t* values;
};

cudaError_t rotation(const Rotation& args, int capacity, cudaStream_t stream);
cudaError_t rope(const Rope& args, int capacity, cudaStream_t stream);
cudaError_t prepare_rope();

}  // namespace fd::cuda
