// y = x W^T + bias with packed weights.
#pragma once

#include "kernels/kernels.h"
#include "team.h"
#include "workspace.h"

namespace fd {

struct Linear {
  PackedMatrix weights;
  int matrix;  // which of the stacked ones
  Activations x;
  Output output;
  float* out;  // kStore, kAdd
  int64_t out_stride;
  Activations activated;  // kSwiglu
};

// The products of several matrices at once, each with rows of its own: items of all are shared among all
// threads, so that an expert with one token does not keep anybody waiting.
class LinearGroup {
 public:
  // For up to `capacity` products of matrices with at most `max_inputs` inputs and `max_rows` rows.
  LinearGroup(Workspace& workspace, int capacity, int max_inputs, int max_rows);

  // One thread adds; a barrier must follow before the team runs.
  void clear() { count_ = items_ = 0; }
  void add(const Linear& linear);
  void run(Team& team) const;

 private:
  struct Member {
    Linear linear;
    int first_item;
    int panels_per_item;
    int row_ranges;
  };

  Member* members_;
  float* scratch_;
  int64_t scratch_per_thread_;
  int threads_;
  int count_ = 0;
  int items_ = 0;
};

// x [rows, width], row-major, into the layout of activations.
void to_activations(Team& team, const float* x, const Activations& activations);
void copy_row(const float* x, const Activations& activations, int row);

inline Activations take_activations(Workspace& workspace, int rows, int width) {
  return {workspace.take<float>(Activations::size(rows, width)), rows, width};
}

}  // namespace fd
