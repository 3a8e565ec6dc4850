// Conversion of a checkpoint's matrices to packed panels, and their upload.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "device/device.h"
#include "team.h"

namespace fd {
namespace {

constexpr int kTurn = kPanel / 2;
// Rows that one thread converts at a time.
constexpr int kRows = 32;

struct Place {
  int panel;
  int column;
};

Place place_of(int turn, int row) {
  if (turn == FD_GATE) return {row / kTurn, row % kTurn};
  if (turn == FD_UP) return {row / kTurn, kTurn + row % kTurn};
  return {row / kPanel, row % kPanel};
}

float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 0) {
    // A subnormal number, which is exact as a multiple of 2^-24.
    const float value = static_cast<float>(fraction) * 0x1p-24f;
    return sign == 0 ? value : -value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Reads element `index`; the source need not be aligned.
float read(const void* source, int type, int64_t index) {
  float value;
  if (type == FD_FLOAT32) {
    std::memcpy(&value, static_cast<const uint8_t*>(source) + index * 4, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, static_cast<const uint8_t*>(source) + index * 2, 2);
  if (type == FD_FLOAT16) return from_half(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint8_t* panel_of(const PackedMatrix& matrix, int index) { return const_cast<uint8_t*>(matrix.panel(0, index)); }

// Writes rows [first, last) of a part; returns false if a value is not finite.
bool pack_rows(const fd_retile_args& part, const PackedMatrix& matrix, int first, int last) {
  bool is_finite = true;
  for (int row = first; row < last; ++row) {
    const Place place = place_of(part.turn, part.first_row + row);
    uint8_t* const data = panel_of(matrix, place.panel) + kPanel * sizeof(float);
    for (int k = 0; k < part.inputs; ++k) {
      const float value = read(part.source, part.source_type, row * part.row_stride + k * part.column_stride);
      is_finite = is_finite && std::isfinite(value);
      if (matrix.format == Format::kFloat32) {
        std::memcpy(data + (int64_t{k} * kPanel + place.column) * 4, &value, 4);
      } else {
        const uint16_t bits = rounded(value);
        std::memcpy(data + ((int64_t{k} / 2 * kPanel + place.column) * 2 + k % 2) * 2, &bits, 2);
      }
    }
  }
  return is_finite;
}

bool pack(const fd_retile_args& part, const PackedMatrix& matrix) {
  std::atomic<bool> is_finite{true};
  run_team([&](Team& team) {
    team.for_each((part.rows + kRows - 1) / kRows, [&](int64_t index) {
      const int first = static_cast<int>(index) * kRows;
      if (!pack_rows(part, matrix, first, std::min(first + kRows, part.rows))) is_finite = false;
    });
  });
  return is_finite;
}

// Returns FD_OK, or why the part does not fit its matrix.
int check(const fd_retile_args& part) {
  if (part.source_type < FD_FLOAT32 || part.source_type > FD_BFLOAT16) {
    return fail(FD_BAD_ARGUMENT, "upload: unknown type of source");
  }
  if (part.turn < FD_PLAIN || part.turn > FD_BIAS) return fail(FD_BAD_ARGUMENT, "upload: unknown turn");
  if (part.inputs < 1 || part.outputs < 1 || part.rows < 1 || part.first_row < 0) {
    return fail(FD_BAD_ARGUMENT, "upload: the part has no rows or no inputs");
  }
  // Padding may get a bias, which is zero.
  const int64_t rows = part.turn == FD_GATE || part.turn == FD_UP ? part.outputs / 2
                       : part.turn == FD_BIAS ? (int64_t{part.outputs} + kPanel - 1) / kPanel * kPanel
                                              : part.outputs;
  if (int64_t{part.first_row} + part.rows > rows) {
    return fail(FD_BAD_ARGUMENT, "upload: the part does not lie inside the matrix");
  }
  return FD_OK;
}

// Writes a part of a matrix; returns an fd_status. `is_finite` becomes false if a value is not.
int pack_part(const fd_device& device, const fd_retile_args& part, bool* is_finite) {
  const int result = check(part);
  if (result != FD_OK) return result;
  const Format format = part.turn == FD_ROUTER ? Format::kFloat32 : device.format;
  const PackedMatrix matrix = PackedMatrix::bare(format, part.outputs, part.inputs, 1, part.matrix);
  if (part.turn != FD_BIAS) {
    *is_finite = pack(part, matrix);
    return FD_OK;
  }
  for (int row = 0; row < part.rows; ++row) {
    const Place place = place_of(FD_PLAIN, part.first_row + row);
    const float value = read(part.source, part.source_type, row);
    std::memcpy(panel_of(matrix, place.panel) + place.column * sizeof(float), &value, 4);
  }
  return FD_OK;
}

}  // namespace
}  // namespace fd

using fd::fail;

extern "C" {

int64_t fd_matrix_bytes(const fd_device* device, int32_t outputs, int32_t inputs) {
  return fd::PackedMatrix::bare(device->format, outputs, inputs, 1, nullptr).matrix_bytes;
}

int64_t fd_router_bytes(int32_t experts, int32_t inputs) {
  return fd::PackedMatrix::bare(fd::Format::kFloat32, experts, inputs, 1, nullptr).matrix_bytes;
}

int fd_retile(void* stream, const fd_retile_args* args) {
  bool is_finite = true;
  return fd::pack_part(*static_cast<const fd_device*>(stream), *args, &is_finite);
}

int fd_upload_begin(fd_device* device) {
  if (device->is_uploading) return fail(FD_BAD_ARGUMENT, "an upload is in progress already");
  device->is_uploading = true, device->bad_tag = 0;
  return FD_OK;
}

int fd_upload(fd_device* device, const fd_retile_args* args, int32_t tag) {
  if (!device->is_uploading) return fail(FD_BAD_ARGUMENT, "no upload is in progress");
  bool is_finite = true;
  const int result = fd::pack_part(*device, *args, &is_finite);
  if (!is_finite && device->bad_tag == 0) device->bad_tag = tag;
  return result;
}

int fd_upload_bytes(fd_device* device, uint64_t to, const void* from, int64_t bytes) {
  if (!device->is_uploading) return fail(FD_BAD_ARGUMENT, "no upload is in progress");
  std::memcpy(reinterpret_cast<void*>(to), from, static_cast<size_t>(bytes));
  return FD_OK;
}

int fd_upload_finish(fd_device* device, int32_t* bad_tag) {
  if (!device->is_uploading) return fail(FD_BAD_ARGUMENT, "no upload is in progress");
  device->is_uploading = false;
  *bad_tag = device->bad_tag;
  return FD_OK;
}

}  // extern "C"
