#include "paged_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "linear.h"

namespace fd {
namespace {

// Maximum tiles of one item; each segment of keys and values is read once for all of them.
constexpr int kTilesPerItem = 8;

int divide_up(int a, int b) { return (a + b - 1) / b; }

}  // namespace

PagedAttention::PagedAttention(Workspace& workspace, const Attention& args) : args_(args) {
  const Step& step = args.step;
  const Cache& cache = args.cache;
  const int height = kernels().attend_height;
  const int group = args.num_heads / cache.num_kv_heads;
  // A tile has `tokens` tokens times `heads` query heads of one kv head. If these heads are more than `height`, they
  // are split evenly into `parts`.
  const int parts = divide_up(group, height);
  const int heads = divide_up(group, parts);
  const int tokens = std::max(1, height / heads);
  segment_blocks_ = std::max(1, kSegmentKeys / cache.block_size);
  width_ = cache.value_panels() * kPanel;
  rows_ = height;

  int64_t num_tiles = 0;
  for (int s = 0; s < step.num_sequences; ++s) {
    num_tiles += static_cast<int64_t>(divide_up(step.length(s), tokens)) * cache.num_kv_heads * parts;
  }
  tiles_ = workspace.take<Tile>(num_tiles);
  int64_t partials = 0;
  for (int s = 0; s < step.num_sequences; ++s) {
    for (int kv_head = 0; kv_head < cache.num_kv_heads; ++kv_head) {
      for (int first_head = 0; first_head < group; first_head += heads) {
        for (int token = 0; token < step.length(s); token += tokens) {
          Tile& tile = tiles_[num_tiles_++];
          tile = {s, token, std::min(tokens, step.length(s) - token), kv_head, first_head,
                  std::min(heads, group - first_head), -1};
          if (step.length(s) <= tokens) {
            tile.partial = partials;
            partials += segments(tile);
          }
        }
      }
    }
  }
  items_ = workspace.take<Item>(num_tiles_ + partials);
  for (int i = 0; i < num_tiles_;) {
    const Tile& tile = tiles_[i];
    if (tile.partial >= 0) {
      for (int segment = 0; segment < segments(tile); ++segment) items_[num_items_++] = {i, 1, segment};
      ++i;
      continue;
    }
    int count = 1;
    while (count < kTilesPerItem && i + count < num_tiles_ && tiles_[i + count].sequence == tile.sequence &&
           tiles_[i + count].kv_head == tile.kv_head && tiles_[i + count].first_head == tile.first_head) {
      ++count;
    }
    items_[num_items_++] = {i, count, -1};
    i += count;
  }
  // Longest items first, so that threads finish at about the same time. Late tiles of a chunk see the most keys.
  std::stable_sort(items_, items_ + num_items_, [&](const Item& a, const Item& b) {
    const auto work = [&](const Item& item) { return item.segment >= 0 ? 1 : item.count * segments(tiles_[item.first_tile]); };
    return work(a) > work(b);
  });

  const int64_t threads = num_threads();
  states_ = workspace.take<PartialSoftmax>(partials * rows_);
  outs_ = workspace.take<float>(partials * rows_ * width_);
  // Running results of the tiles of an item, and one more for the current segment.
  thread_states_ = workspace.take<PartialSoftmax>(threads * (kTilesPerItem + 1) * rows_);
  thread_outs_ = workspace.take<float>(threads * (kTilesPerItem + 1) * rows_ * width_);
  scratch_per_thread_ =
      attend_scratch(cache.block_size, height) + Activations::padded(cache.head_dim) * height;
  scratch_ = workspace.take<float>(threads * scratch_per_thread_);
}

void PagedAttention::run(Team& team) const {
  const Kernels& isa = kernels();
  const int64_t row_floats = rows_ * width_;
  float* const scratch = scratch_ + team.rank() * scratch_per_thread_;
  PartialSoftmax* const states = thread_states_ + team.rank() * (kTilesPerItem + 1) * rows_;
  float* const outs = thread_outs_ + team.rank() * (kTilesPerItem + 1) * row_floats;
  const auto merge_rows = [&](const Tile& tile, PartialSoftmax* state, float* out, const PartialSoftmax* later,
                              const float* later_out) {
    for (int r = 0; r < tile.tokens * tile.heads; ++r) {
      isa.merge(state[r], out + r * width_, later[r], later_out + r * width_, width_);
    }
  };

  team.for_each(num_items_, [&](int64_t index) {
    const Item& item = items_[index];
    const Tile* const tiles = tiles_ + item.first_tile;
    if (item.segment >= 0) {
      const int64_t partial = tiles->partial + item.segment;
      attend(*tiles, item.segment, states_ + partial * rows_, outs_ + partial * row_floats, scratch);
      return;
    }
    const int last_segment = segments(tiles[item.count - 1]);
    for (int segment = 0; segment < last_segment; ++segment) {
      for (int i = 0; i < item.count; ++i) {
        if (segment >= segments(tiles[i])) continue;
        PartialSoftmax* const state = states + i * rows_;
        float* const out = outs + i * row_floats;
        if (segment == 0) {
          attend(tiles[i], 0, state, out, scratch);
        } else {
          PartialSoftmax* const later = states + kTilesPerItem * rows_;
          float* const later_out = outs + kTilesPerItem * row_floats;
          attend(tiles[i], segment, later, later_out, scratch);
          merge_rows(tiles[i], state, out, later, later_out);
        }
      }
    }
    for (int i = 0; i < item.count; ++i) finish(tiles[i], states + i * rows_, outs + i * row_floats);
  });

  team.for_each(num_tiles_, [&](int64_t index) {
    const Tile& tile = tiles_[index];
    if (tile.partial < 0) return;
    PartialSoftmax* const state = states_ + tile.partial * rows_;
    float* const out = outs_ + tile.partial * row_floats;
    for (int segment = 1; segment < segments(tile); ++segment) {
      merge_rows(tile, state, out, state + segment * rows_, out + segment * row_floats);
    }
    finish(tile, state, out);
  });
}

int PagedAttention::segments(const Tile& tile) const {
  const int context = args_.step.start[tile.sequence] + tile.first_token + tile.tokens;
  return divide_up(context, segment_blocks_ * args_.cache.block_size);
}

void PagedAttention::attend(const Tile& tile, int segment, PartialSoftmax* state, float* out,
                            float* scratch) const {
  const Step& step = args_.step;
  const Cache& cache = args_.cache;
  const int head_dim = cache.head_dim, rows = tile.tokens * tile.heads;
  const int64_t width = static_cast<int64_t>(args_.num_heads + 2 * cache.num_kv_heads) * head_dim;
  const int group = args_.num_heads / cache.num_kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  const int context = step.start[tile.sequence] + tile.first_token + tile.tokens;

  float* const query = scratch + attend_scratch(cache.block_size, static_cast<int>(rows_));
  int32_t positions[64];
  for (int token = 0; token < tile.tokens; ++token) {
    const int64_t index = step.first_token[tile.sequence] + tile.first_token + token;
    for (int head = 0; head < tile.heads; ++head) {
      const int r = token * tile.heads + head;
      positions[r] = step.start[tile.sequence] + tile.first_token + token;
      const float* source =
          args_.qkv + index * width + (tile.kv_head * group + tile.first_head + head) * head_dim;
      for (int i = 0; i < head_dim; ++i) query[(i / kPiece * rows + r) * kPiece + i % kPiece] = source[i] * scale;
    }
  }
  Attend task;
  task.cache = cache;
  task.block_table = step.blocks(tile.sequence);
  task.first_block = segment * segment_blocks_;
  task.last_block = std::min((segment + 1) * segment_blocks_, divide_up(context, cache.block_size));
  task.head = tile.kv_head;
  task.num_rows = rows;
  task.positions = positions;
  task.query = query;
  task.state = state;
  task.out = out;
  task.scratch = scratch;
  kernels().attend(task);
}

void PagedAttention::finish(const Tile& tile, const PartialSoftmax* state, const float* out) const {
  const Cache& cache = args_.cache;
  const int head_dim = cache.head_dim, group = args_.num_heads / cache.num_kv_heads;
  for (int token = 0; token < tile.tokens; ++token) {
    const int row = args_.step.first_token[tile.sequence] + tile.first_token + token;
    for (int head = 0; head < tile.heads; ++head) {
      const int r = token * tile.heads + head;
      const float factor = 1.0f / state[r].sum;
      const int first = (tile.kv_head * group + tile.first_head + head) * head_dim;
      for (int i = 0; i < head_dim;) {
        const int column = first + i;
        const int count = std::min(head_dim - i, kPiece - column % kPiece);
        float* target = args_.out.piece(row, column / kPiece) + column % kPiece;
        for (int j = 0; j < count; ++j) target[j] = out[r * width_ + i + j] * factor;
        i += count;
      }
    }
  }
}

}  // namespace fd
