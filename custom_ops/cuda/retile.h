// From a checkpoint's matrix to the device's layout.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"

namespace fd::cuda {

enum class Source { kFloat32, kFloat16, kBfloat16 };

// Where the rows of a part go: rows of gate and up take turns of eight.
enum class Turn { kPlain, kGate, kUp };

// One part [rows, inputs] of a matrix [outputs, inputs]. Strides are in elements, so that both [out, in] and Paddle's
// [in, out] can be read.
struct Retile {
  const void* source;
  Source type;
  int64_t row_stride;
  int64_t column_stride;
  int rows;
  int inputs;
  uint8_t* matrix;
  int outputs;
  int first_row;  // of the part among the plain rows, or among those of gate or up
  Turn turn;
};

// Enqueues it. The zeros that fill up edges are written as well, by the part that has the last row.
cudaError_t retile(const Retile& args, cudaStream_t stream);
cudaError_t prepare_retile();

}  // namespace fd::cuda
