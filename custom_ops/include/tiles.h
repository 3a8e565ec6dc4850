// Activations in the layout that the kernels read: a few rows side by side, 64 columns at a time.
//
// Rows are divided into tiles of nearly equal height, at most as many rows as the accumulators of a kernel
// hold. A tile of r rows is [ceil(width / 64)][r][64]: a kernel finds row i of a piece at the fixed distance
// 64 * i, and writing a row is copying pieces of 64. Which rows share a tile changes no result.
#pragma once

#include <cstdint>

namespace fd {

constexpr int kPiece = 64;

struct Tiles {
  float* data;
  int rows;
  int width;
  int max_height;

  static int64_t padded(int width) { return (width + kPiece - 1) / kPiece * static_cast<int64_t>(kPiece); }
  static int64_t size(int rows, int width) { return rows * padded(width); }

  int count() const { return (rows + max_height - 1) / max_height; }
  int height(int tile) const { return rows / count() + (tile < rows % count()); }
  int first_row(int tile) const {
    const int remainder = rows % count();
    return tile * (rows / count()) + (tile < remainder ? tile : remainder);
  }
  float* tile(int index) const { return data + first_row(index) * padded(width); }

  // The 64 columns of `row` that begin at 64 * piece.
  float* piece(int row, int piece) const {
    const int base = rows / count(), remainder = rows % count();
    const int tall = remainder * (base + 1);
    const int index = row < tall ? row / (base + 1) : remainder + (row - tall) / base;
    return tile(index) + (static_cast<int64_t>(piece) * height(index) + row - first_row(index)) * kPiece;
  }
};

}  // namespace fd
