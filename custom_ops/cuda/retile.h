// Conversion of a checkpoint's matrix to the device layout.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../include/fd_device.h"
#include "layout.h"

namespace fd::cuda {

enum class Source { kFloat32, kFloat16, kBfloat16 };

// Kind of the rows of a part; rows of gate and up are interleaved eight at a time.
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
  int first_row;  // first row of the part, counted among rows of its kind
  Turn turn;
  int32_t* bad_tag = nullptr;  // becomes `tag` at the first value that is not finite, unless it is set already
  int tag = 0;
};

// Converts the arguments of the C interface; returns an fd_status.
int checked(const fd_retile_args& args, Retile* part);

// Enqueues the conversion. The part with the last row also writes the zero padding.
cudaError_t retile(const Retile& args, cudaStream_t stream);
cudaError_t prepare_retile();

}  // namespace fd::cuda
