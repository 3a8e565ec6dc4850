// Attention over the paged cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"

namespace fd::cuda {

constexpr int kCacheBlock = 64;    // keys of a block of the cache: one tile
constexpr int kSegmentTiles = 4;   // numeric contract sm90-2: a new partial softmax every 256 keys
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
  const float* rotary_cos_sin;  // [tokens, head_dim]
  const void* qkv;  // bfloat16 [token][(heads + 2 kv_heads) head_dim]; rotated where a sequence has several tokens
  uint8_t* keys;
  uint8_t* values;
  uint8_t* out;  // activations [tokens, heads * head_dim]
  int heads;
  int kv_heads;
  float scale;     // factor of scores, including log2(e)
  float* partial;  // attention_partials(...) floats
  int* arrived;    // [kMaxSequences * kv_heads], zeros; left as zeros
};

// Floats of `partial` for this many segments of 512 keys over all decoding sequences.
constexpr int64_t attention_partials(int64_t segments, int kv_heads, int head_dim) {
  return segments * (8 / kSegmentTiles) * kv_heads * kMaxGroupHeads * (head_dim + 2);
}

// Sequences with several tokens in the step. rope() has rotated their queries and written their keys and values.
cudaError_t attend_prompts(const Attention& args, int head_dim, cudaStream_t stream);

// Sequences with one token, which this rotates and writes to the cache. Gives the bits of attend_prompts(). `early`: no
// kernel since the last copy in the stream has written to the cache blocks of these sequences, so that they can be read
// before the previous kernel has ended. `capacity`: upper bound of these sequences.
cudaError_t attend_decoding(const Attention& args, int head_dim, int capacity, bool early, cudaStream_t stream);

cudaError_t prepare_prompts();
cudaError_t prepare_decoding();

}  // namespace fd::cuda
