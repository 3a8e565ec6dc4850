// Attention over the paged cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"

namespace fd::cuda {

constexpr int kCacheBlock = 64;    // keys of a block of the cache: one tile
constexpr int kSegmentTiles = 8;   // numeric contract sm90-1: a new partial softmax every 512 keys
constexpr int kMaxGroupHeads = 16;  // query heads of one kv head
constexpr int kMaxSequences = 1024;

// One layer's keys or values: [block][kv head][head_dim / 64] blocks of 64 keys.
FD_BOTH constexpr int64_t in_cache(int64_t block, int heads, int head, int head_dim, int key, int i) {
  return ((block * heads + head) * (head_dim / kBlockK) + i / kBlockK) * kBlockBytes + in_block(key, i % kBlockK);
}

FD_BOTH constexpr int64_t cache_bytes(int64_t blocks, int heads, int head_dim) {
  return blocks * heads * (head_dim / kBlockK) * kBlockBytes;
}

struct Attention {
  const int32_t* step;
  const void* qkv;  // bfloat16 [token][(heads + 2 kv_heads) head_dim], queries rotated
  const uint8_t* keys;
  const uint8_t* values;
  uint8_t* out;  // activations [tokens, heads * head_dim]
  int heads;
  int kv_heads;
  float scale;     // factor of scores, including log2(e)
  float* partial;  // attention_partials(...) floats
  int* arrived;    // [kMaxSequences * kv_heads], zeros; left as zeros
};

// Floats of `partial` for this many segments of 512 keys over all decoding sequences.
constexpr int64_t attention_partials(int64_t segments, int kv_heads, int head_dim) {
  return segments * kv_heads * kMaxGroupHeads * (head_dim + 2);
}

// Sequences with one token in the step use the decoding kernel, others the prompt kernel; both give the same bits.
// `has_prompts` must be true if there may be others.
cudaError_t attention(const Attention& args, int head_dim, bool has_prompts, cudaStream_t stream);
cudaError_t prepare_attention();

}  // namespace fd::cuda
