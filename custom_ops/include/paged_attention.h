// Causal softmax attention over the paged cache; one call handles prefill chunks and decode rows.
#pragma once

#include "kernels/kernels.h"
#include "step.h"
#include "team.h"
#include "workspace.h"

namespace fd {

// A context is processed in segments that begin at fixed positions, so several threads can share a long one without
// changing the result.
constexpr int kSegmentKeys = 512;

struct Attention {
  Step step;
  const float* qkv;  // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; only the rotated queries are read
  int num_heads;     // query head h reads kv head h / (num_heads / num_kv_heads)
  Cache cache;
  Activations out;  // [num_tokens, num_heads * head_dim]
};

class PagedAttention {
 public:
  // Plans the work of one call of `run`.
  PagedAttention(Workspace& workspace, const Attention& args);
  void run(Team& team) const;

 private:
  // Queries that are computed together: `tokens` tokens of a sequence, and heads that share a kv head.
  struct Tile {
    int sequence;
    int first_token;  // within the sequence
    int tokens;
    int kv_head;
    int first_head;  // within the heads of the kv head
    int heads;
    int64_t partial;  // decode rows: index of the first segment's partial result
  };
  // Either all segments of `count` neighbouring tiles, or one segment of a single tile.
  struct Item {
    int first_tile;
    int count;
    int segment;  // -1: all segments, including the final normalisation
  };

  int segments(const Tile& tile) const;
  void attend(const Tile& tile, int segment, PartialSoftmax* state, float* out, float* scratch) const;
  void finish(const Tile& tile, const PartialSoftmax* state, const float* out) const;

  Attention args_;
  int segment_blocks_;
  int width_;     // floats of a row of partial results
  int64_t rows_;  // maximum rows of a tile
  Tile* tiles_;
  Item* items_;
  int num_tiles_ = 0;
  int num_items_ = 0;
  // Partial results of the segments of decode rows.
  PartialSoftmax* states_;
  float* outs_;
  PartialSoftmax* thread_states_;
  float* thread_outs_;
  float* scratch_;
  int64_t scratch_per_thread_;
};

}  // namespace fd
