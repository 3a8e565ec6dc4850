// Activations in the layout that the kernels read: [ceil(width / 64)][rows][64].
//
// Within a piece of 64 columns, row r starts at offset 64 * r, so addressing a row is free and writing one copies
// pieces of 64 floats. Kernels process a few neighbouring rows at a time.
#pragma once

#include <cstdint>

namespace fd {

constexpr int kPiece = 64;

struct Activations {
  float* data;
  int rows;
  int width;

  static int64_t padded(int width) { return (width + kPiece - 1) / kPiece * static_cast<int64_t>(kPiece); }
  static int64_t size(int rows, int width) { return rows * padded(width); }

  // Floats from one piece of a row to the next.
  int64_t stride() const { return static_cast<int64_t>(rows) * kPiece; }
  // The 64 columns of `row` starting at column 64 * piece.
  float* piece(int row, int piece) const { return data + piece * stride() + static_cast<int64_t>(row) * kPiece; }
};

}  // namespace fd
