// Attention over the paged cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"

namespace fd::cuda {

constexpr int kCacheBlock = 64;    // keys of a block of the cache: one tile
constexpr int kSegmentTiles = 8;   // numeric contract sm90-1: partial softmax starts anew every 512 keys
constexpr int kMostGroupHeads = 16;  // query heads of one kv head
constexpr int kMostSequences = 1024;

// One layer's keys or values: [block][kv head][head_dim / 64] blocks of 64 keys.
FD_BOTH constexpr int64_t in_cache(int64_t block, int heads, int head, int head_dim, int key, int i) {
  return ((block * heads + head) * (head_dim / kBlockK) + i / kBlockK) * kBlockBytes + in_block(key, i % kBlockK);
}

FD_BOTH constexpr int64_t cache_bytes(int64_t blocks, int heads, int head_dim) {
  return blocks * heads * (head_dim / kBlockK) * kBlockBytes;
}

struct Attention {
  const int32_t* step;
  const void* qkv;  // bfloat16 [token][(heads + 2 kv_heads) head_dim], queries turned
  const uint8_t* keys;
  const uint8_t* values;
  uint8_t* out;  // activations [tokens, heads * head_dim]
  int heads;
  int kv_heads;
  float scale;     // of scores, times log2(e)
  float* partial;  // attention_work(...) bytes
  int* arrived;    // [kMostSequences * kv_heads], zeros; left as zeros
};

// Floats of `partial` for so many segments of 512 keys of all decoding sequences together.
constexpr int64_t attention_partials(int64_t segments, int kv_heads, int head_dim) {
  return segments * kv_heads * kMostGroupHeads * (head_dim + 2);
}

// Sequences with one token in the step go through the decoding kernel, the others through that for prompts; the same
// bits. `has_prompts` says whether there may be others.
cudaError_t attention(const Attention& args, int head_dim, bool has_prompts, cudaStream_t stream);
cudaError_t prepare_attention();

}  // namespace fd::cuda
