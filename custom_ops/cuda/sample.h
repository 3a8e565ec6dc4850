// Sampling of tokens from logits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../include/fd_device.h"
#include "layout.h"

namespace fd::cuda {

// One token per row of logits.
struct Draw {
  const float* logits;  // [rows, vocabulary]
  int vocabulary;
  const int32_t* count;         // rows, in device memory
  const fd_sampling_row* rows;  // null: greedy
  const int32_t* tokens;        // pairs of token and count, see custom_ops/include/sample.h
  int32_t* drawn;               // [rows]; a rank if a token is given; -1 for a row that holds NaN or no finite value
  int32_t* top_tokens;          // [rows, width]
  double* logprobs;             // [rows, width]
  int width;
  void* work;  // draw_work(vocabulary) bytes per row
};

// Bytes for the scores and weights of a row.
FD_BOTH constexpr int64_t draw_work(int vocabulary) { return (int64_t{vocabulary} * 12 + 15) / 16 * 16; }

cudaError_t draw(const Draw& args, int capacity, cudaStream_t stream);
cudaError_t prepare_draw();

}  // namespace fd::cuda
