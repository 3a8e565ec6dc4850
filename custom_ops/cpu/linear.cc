#include "linear.h"

#include <algorithm>
#include <cstring>

namespace fd {
namespace {

// Maximum panels of an item.
constexpr int kMaxPanels = 8;
// Items per thread that suffice to balance the load.
constexpr int kItemsPerThread = 4;

}  // namespace

LinearGroup::LinearGroup(Workspace& workspace, int capacity, int max_inputs, int max_rows)
    : members_(workspace.take<Member>(capacity)),
      scratch_per_thread_(
          kernels().gemm_scratch(std::min(max_rows, kernels().gemm_rows), max_inputs, kMaxPanels)),
      threads_(num_threads()) {
  scratch_ = workspace.take<float>(threads_ * scratch_per_thread_);
}

void LinearGroup::add(const Linear& linear) {
  Member& member = members_[count_++];
  member.linear = linear;
  member.first_item = items_;
  const int panels = linear.weights.panels;
  // With few rows, a kernel computes four panels at once.
  const int wanted = panels / (threads_ * kItemsPerThread);
  member.panels_per_item = wanted >= kMaxPanels ? kMaxPanels : std::min(4, panels);
  member.row_ranges = (linear.x.rows + kernels().gemm_rows - 1) / kernels().gemm_rows;
  items_ += (panels + member.panels_per_item - 1) / member.panels_per_item * member.row_ranges;
}

void LinearGroup::run(Team& team) const {
  const Kernels& isa = kernels();
  const Member* const begin = members_;
  team.for_each(items_, [&](int64_t item) {
    const Member& member =
        *(std::upper_bound(begin, begin + count_, item, [](int64_t i, const Member& m) { return i < m.first_item; }) -
          1);
    const Linear& linear = member.linear;
    const int index = static_cast<int>(item) - member.first_item;
    const int panel = index / member.row_ranges * member.panels_per_item;
    const int range = index % member.row_ranges;
    const int64_t rows = linear.x.rows;
    Gemm gemm;
    gemm.weights = &linear.weights;
    gemm.matrix = linear.matrix;
    gemm.first_panel = panel;
    gemm.num_panels = std::min(member.panels_per_item, linear.weights.panels - panel);
    gemm.x = linear.x;
    gemm.first_row = static_cast<int>(rows * range / member.row_ranges);
    gemm.last_row = static_cast<int>(rows * (range + 1) / member.row_ranges);
    gemm.output = linear.output;
    gemm.out = linear.out;
    gemm.out_stride = linear.out_stride;
    gemm.activated = linear.activated;
    gemm.scratch = scratch_ + team.rank() * scratch_per_thread_;
    isa.gemm(gemm);
  });
}

void to_activations(Team& team, const float* x, const Activations& activations) {
  team.for_each(activations.rows, [&](int64_t row) {
    copy_row(x + row * activations.width, activations, static_cast<int>(row));
  });
}

void copy_row(const float* x, const Activations& activations, int row) {
  float* piece = activations.piece(row, 0);
  for (int column = 0; column < activations.width; column += kPiece, piece += activations.stride()) {
    std::memcpy(piece, x + column, std::min(kPiece, activations.width - column) * sizeof(float));
  }
}

}  // namespace fd
