#include "matrix.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fd {
namespace {

constexpr char kMagic[8] = {'F', 'D', 'M', 'A', 'T', 'R', 'I', 'X'};
constexpr uint32_t kLayoutVersion = 2;
constexpr int64_t kHeaderBytes = 64;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t format;
  uint32_t outputs;
  uint32_t inputs;
  uint32_t count;
  uint32_t reserved;
  uint64_t panel_bytes;
  uint64_t matrix_bytes;
};

int64_t min_panel_bytes(Format format, int64_t inputs) {
  constexpr int64_t kBias = kPanel * 4;
  switch (format) {
    case Format::kFloat32:
      return kBias + inputs * kPanel * 4;
    case Format::kBfloat16:
      return kBias + (inputs + kBfloat16Step - 1) / kBfloat16Step * kBfloat16Step * kPanel * 2;
    case Format::kWint8:
      return kBias + kPanel * 4 + inputs * kPanel;
    case Format::kWint4:
      return kBias + (inputs + kWint4Group - 1) / kWint4Group * kWint4GroupBytes;
  }
  throw std::invalid_argument("packed matrix: unknown format " + std::to_string(static_cast<uint32_t>(format)));
}

}  // namespace

PackedMatrix PackedMatrix::view(const void* blob, int64_t bytes) {
  Header header;
  if (bytes < kHeaderBytes) throw std::invalid_argument("packed matrix: shorter than its header");
  std::memcpy(&header, blob, sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0 || header.version != kLayoutVersion) {
    throw std::invalid_argument("packed matrix: not a blob of layout version " + std::to_string(kLayoutVersion));
  }
  PackedMatrix matrix;
  matrix.format = static_cast<Format>(header.format);
  matrix.outputs = static_cast<int>(header.outputs);
  matrix.inputs = static_cast<int>(header.inputs);
  matrix.count = static_cast<int>(header.count);
  matrix.panels = (matrix.outputs - 1) / kPanel + 1;
  matrix.panel_bytes = static_cast<int64_t>(header.panel_bytes);
  matrix.matrix_bytes = static_cast<int64_t>(header.matrix_bytes);
  matrix.data = static_cast<const uint8_t*>(blob) + kHeaderBytes;
  if (std::min({matrix.outputs, matrix.inputs, matrix.count}) < 1) {
    throw std::invalid_argument("packed matrix: outputs, inputs and count must be 1..2147483647");
  }
  // Division cannot overflow, whatever the header holds.
  if (matrix.panel_bytes < min_panel_bytes(matrix.format, matrix.inputs) ||
      matrix.matrix_bytes / matrix.panel_bytes < matrix.panels ||
      (bytes - kHeaderBytes) / matrix.matrix_bytes < matrix.count) {
    throw std::invalid_argument("packed matrix: the blob is shorter than its header says");
  }
  return matrix;
}

PackedMatrix PackedMatrix::bare(Format format, int outputs, int inputs, int count, const void* data) {
  PackedMatrix matrix;
  matrix.format = format;
  matrix.outputs = outputs;
  matrix.inputs = inputs;
  matrix.count = count;
  matrix.panels = (outputs - 1) / kPanel + 1;
  matrix.panel_bytes = (min_panel_bytes(format, inputs) + 63) / 64 * 64;
  matrix.matrix_bytes = matrix.panels * matrix.panel_bytes;
  matrix.data = static_cast<const uint8_t*>(data);
  return matrix;
}

}  // namespace fd
