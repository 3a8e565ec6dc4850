// A weight matrix in the layout that the kernels stream, as custom_ops/packed_matrix.py writes it.
#pragma once

#include <cstdint>

namespace fd {

enum class Format : uint32_t { kFloat32 = 0, kBfloat16 = 1, kWint8 = 2, kWint4 = 3 };

// Outputs per panel.
constexpr int kPanel = 32;
// bfloat16 panels are padded with zeros to a multiple of this many inputs: one AMX multiplication.
constexpr int kBfloat16Step = 32;
// Inputs that share one scale and one minimum in wint4.
constexpr int kWint4Group = 32;
constexpr int kWint4GroupBytes = kPanel * 4 + kWint4Group * kPanel / 2;

// View of a blob with `count` matrices [outputs, inputs], each stored as panels of 32 outputs.
struct PackedMatrix {
  Format format;
  int outputs;
  int inputs;
  int count;
  int panels;
  int64_t panel_bytes;
  int64_t matrix_bytes;
  const uint8_t* data;

  // Throws std::invalid_argument if `blob` is not a packed matrix of this layout version.
  static PackedMatrix view(const void* blob, int64_t bytes);
  // `count` matrices without a header, one directly after the other.
  static PackedMatrix bare(Format format, int outputs, int inputs, int count, const void* data);

  const uint8_t* panel(int matrix, int index) const {
    return data + matrix * matrix_bytes + index * panel_bytes;
  }
};

}  // namespace fd
