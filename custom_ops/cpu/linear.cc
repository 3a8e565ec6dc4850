#include "linear.h"

#include <algorithm>
#include <cstring>

namespace fd {
namespace {

constexpr int kMaxPanels = 8;
// Tiles of one item: enough to pay for converting its panels, few enough to give every thread some.
constexpr int kTilesPerItem = 11;
constexpr int kItemsPerThread = 4;

}  // namespace

LinearGroup::LinearGroup(Workspace& workspace, int capacity, int max_inputs)
    : members_(workspace.take<Member>(capacity)),
      scratch_per_thread_(static_cast<int64_t>(kMaxPanels) * max_inputs * kPanel),
      threads_(num_threads()) {
  scratch_ = workspace.take<float>(threads_ * scratch_per_thread_);
}

void LinearGroup::add(const Linear& linear) {
  Member& member = members_[count_++];
  member.linear = linear;
  member.first_item = items_;
  const int panels = linear.weights.panels;
  // Four panels are what a kernel takes at once when rows are few.
  const int wanted = panels / (threads_ * kItemsPerThread);
  member.panels_per_item = wanted >= kMaxPanels ? kMaxPanels : std::min(4, panels);
  member.tile_ranges = (linear.x.count() + kTilesPerItem - 1) / kTilesPerItem;
  items_ += (panels + member.panels_per_item - 1) / member.panels_per_item * member.tile_ranges;
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
    const int panel = index / member.tile_ranges * member.panels_per_item;
    const int range = index % member.tile_ranges;
    const int tiles = linear.x.count();
    Gemm gemm;
    gemm.weights = &linear.weights;
    gemm.matrix = linear.matrix;
    gemm.first_panel = panel;
    gemm.num_panels = std::min(member.panels_per_item, linear.weights.panels - panel);
    gemm.x = linear.x;
    gemm.first_tile = tiles * range / member.tile_ranges;
    gemm.last_tile = tiles * (range + 1) / member.tile_ranges;
    gemm.output = linear.output;
    gemm.out = linear.out;
    gemm.out_stride = linear.out_stride;
    gemm.tiles = linear.tiles;
    gemm.scratch = scratch_ + team.rank() * scratch_per_thread_;
    isa.gemm(gemm);
  });
}

void to_tiles(Team& team, const float* x, Tiles tiles) {
  team.for_each(tiles.rows, [&](int64_t row) { copy_row(x + row * tiles.width, tiles, static_cast<int>(row)); });
}

void copy_row(const float* x, const Tiles& tiles, int row) {
  float* piece = tiles.piece(row, 0);
  const Tiles& t = tiles;
  for (int column = 0; column < t.width; column += kPiece) {
    std::memcpy(piece, x + column, std::min(kPiece, t.width - column) * sizeof(float));
    if (column + kPiece < t.width) piece = t.piece(row, column / kPiece + 1);
  }
}

}  // namespace fd
