// y = x W^T + bias with packed weights.
#pragma once

#include "kernels.h"
#include "team.h"
#include "workspace.h"

namespace fd {

struct Linear {
  PackedMatrix weights;
  int matrix;  // which of the stacked ones
  Tiles x;
  Output output;
  float* out;  // kStore, kAdd
  int64_t out_stride;
  Tiles tiles;  // kSwiglu
};

// The products of several matrices at once, each with rows of its own: items of all are shared among all
// threads, so that an expert with one token does not keep anybody waiting.
class LinearGroup {
 public:
  // For up to `capacity` products of matrices with at most `max_inputs` inputs.
  LinearGroup(Workspace& workspace, int capacity, int max_inputs);

  // One thread adds; a barrier must follow before the team runs.
  void clear() { count_ = items_ = 0; }
  void add(const Linear& linear);
  void run(Team& team) const;

 private:
  struct Member {
    Linear linear;
    int first_item;
    int panels_per_item;
    int tile_ranges;
  };

  Member* members_;
  float* scratch_;
  int64_t scratch_per_thread_;
  int threads_;
  int count_ = 0;
  int items_ = 0;
};

// x [rows, width], row-major, into tiles.
void to_tiles(Team& team, const float* x, Tiles tiles);
void copy_row(const float* x, const Tiles& tiles, int row);

inline Tiles take_tiles(Workspace& workspace, int rows, int width) {
  return {workspace.take<float>(Tiles::size(rows, width)), rows, width, kernels().max_height};
}

}  // namespace fd
