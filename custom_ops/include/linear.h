// y = x W^T + bias with packed weights.
#pragma once

#include "kernels/kernels.h"
#include "team.h"
#include "workspace.h"

namespace fd {

struct Linear {
  PackedMatrix weights;
  int matrix;  // index within the stack
  Activations x;
  Output output;
  float* out;  // kStore, kAdd
  int64_t out_stride;
  Activations activated;  // kSwiglu
};

// Products of several matrices, each with its own rows. The items of all products are shared among all threads, so an
// expert with one token does not leave threads idle.
class LinearGroup {
 public:
  // Up to `capacity` products with at most `max_inputs` inputs and `max_rows` rows each.
  LinearGroup(Workspace& workspace, int capacity, int max_inputs, int max_rows);

  // Called by one thread; a barrier must follow before `run`.
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

// Copies row-major x [rows, width] into the layout of activations.
void to_activations(Team& team, const float* x, const Activations& activations);
void copy_row(const float* x, const Activations& activations, int row);

inline Activations take_activations(Workspace& workspace, int rows, int width) {
  return {workspace.take<float>(Activations::size(rows, width)), rows, width};
}

}  // namespace fd
