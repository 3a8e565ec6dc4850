// Causal softmax attention over the paged cache, prefill chunks and decode rows in one call.
#pragma once

#include "kernels/kernels.h"
#include "step.h"
#include "team.h"
#include "workspace.h"

namespace fd {

// A context is worked on in segments that begin at fixed positions, whatever the step: several threads can
// share a long one, and the results are the same as if one had done it all.
constexpr int kSegmentKeys = 512;

struct Attention {
  Step step;
  const float* qkv;  // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; of it the rotated queries
  int num_heads;     // query head h reads kv head h / (num_heads / num_kv_heads)
  Cache cache;
  Activations out;  // [num_tokens, num_heads * head_dim]
};

class PagedAttention {
 public:
  // Plans the work: which thread may take what. For one call of `run` by a team.
  PagedAttention(Workspace& workspace, const Attention& args);
  void run(Team& team) const;

 private:
  // Queries that are computed together: `tokens` tokens of a sequence, some heads that share keys.
  struct Tile {
    int sequence;
    int first_token;  // within the sequence
    int tokens;
    int kv_head;
    int first_head;  // within those of the kv head
    int heads;
    int64_t partial;  // index of its first segment's results, for decode rows
  };
  // Either all segments of `count` neighbouring tiles, or one segment of a single tile.
  struct Item {
    int first_tile;
    int count;
    int segment;  // -1: all, and the result is finished
  };

  int segments(const Tile& tile) const;
  void attend(const Tile& tile, int segment, PartialSoftmax* state, float* out, float* scratch) const;
  void finish(const Tile& tile, const PartialSoftmax* state, const float* out) const;

  Attention args_;
  int segment_blocks_;
  int width_;  // of a row of partial results
  int64_t rows_;
  Tile* tiles_;
  Item* items_;
  int num_tiles_ = 0;
  int num_items_ = 0;
  PartialSoftmax* states_;
  float* outs_;
  PartialSoftmax* thread_states_;
  float* thread_outs_;
  float* scratch_;
  int64_t scratch_per_thread_;
};

}  // namespace fd
