// Layouts of matrices, activations and the KV cache in device memory, for host and device code.
//
// All three consist of rows of 128 bytes (64 bfloat16 along K), eight rows to a kilobyte, in the 128-byte swizzle:
// 16-byte piece p of row r lies at place p ^ (r % 8). That is the image that wgmma reads from shared memory, so tiles
// are fetched by plain bulk copies, without tensor maps.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FD_BOTH __host__ __device__
#else
#define FD_BOTH
#endif

namespace fd::cuda {

constexpr int kBlockK = 64;         // elements of K in a row of a block
constexpr int kBlockRows = 64;      // rows of a block
constexpr int kBlockBytes = 8192;   // bytes of 64 rows
constexpr int kPanelOutputs = 128;  // outputs of a panel: two blocks side by side

FD_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
FD_BOTH constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Byte offset of element `k` of row `row` in a block.
FD_BOTH constexpr int in_block(int row, int k) { return row * 128 + ((k / 8 ^ row % 8) * 16) + k % 8 * 2; }

// A matrix [outputs, inputs]: panels of 128 outputs, each [inputs / 64][2] blocks. Edges are zeros.
FD_BOTH constexpr int64_t matrix_bytes(int outputs, int inputs) {
  return int64_t{round_up(outputs, kPanelOutputs)} / kBlockRows * ceil_div(inputs, kBlockK) * kBlockBytes;
}

FD_BOTH constexpr int64_t in_matrix(int output, int k, int k_blocks) {
  const int64_t block = (int64_t{output / kPanelOutputs} * k_blocks + k / kBlockK) * 2 + output / kBlockRows % 2;
  return block * kBlockBytes + in_block(output % kBlockRows, k % kBlockK);
}

// Activations [rows, width]: [rows / 64][width / 64] blocks. The last block is padded: columns with zeros, rows with
// arbitrary data.
FD_BOTH constexpr int64_t activation_bytes(int64_t rows, int width) {
  return (rows + kBlockRows - 1) / kBlockRows * ceil_div(width, kBlockK) * kBlockBytes;
}

FD_BOTH constexpr int64_t in_activations(int row, int k, int k_blocks) {
  return (int64_t{row / kBlockRows} * k_blocks + k / kBlockK) * kBlockBytes + in_block(row % kBlockRows, k % kBlockK);
}

// gate and up are interleaved eight outputs at a time, so that one thread's registers hold both factors of an
// activation.
FD_BOTH constexpr int gate_row(int i) { return i / 8 * 16 + i % 8; }
FD_BOTH constexpr int up_row(int i) { return gate_row(i) + 8; }

// Number of segments of K, whose sums are added in ascending order (numeric contract sm90-2). It depends only on the
// matrix, so the bits of a row do not depend on the batch. Matrices with few outputs get more segments, because they
// have too few blocks of 64 outputs to occupy all multiprocessors.
FD_BOTH constexpr int k_segments(int outputs, int inputs) {
  const int tiles = ceil_div(outputs, kBlockRows), blocks = ceil_div(inputs, kBlockK);
  return blocks < 16 || tiles > 128 ? 1 : tiles > 64 ? 2 : 4;
}

constexpr int kMaxSegments = 4;

// First block of K of segment `segment`.
FD_BOTH constexpr int segment_start(int segment, int segments, int k_blocks) { return segment * k_blocks / segments; }

}  // namespace fd::cuda
