// Experts' work: which token goes where, and back.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"

namespace fd::cuda {

constexpr int kMostPicks = 16;

struct Route {
  const float* logits;  // [tokens, experts]
  const float* bias;    // [experts]: for the choice alone
  float norm_min;
  int experts;
  int k;
  const int32_t* count;  // tokens
  int32_t* picks;        // [tokens, k]: best first, the lower expert first among equals
  float* weights;        // [tokens, k]
  int32_t* counts;       // [experts]: zeros before, rows of each expert afterwards
  int32_t* places;       // [tokens, k]: which of its expert's rows a pick is; in no particular order
};

// Rows of activations by expert; each expert's begin at a multiple of `alignment`.
struct Permute {
  const uint8_t* x;  // activations [tokens, width]
  const int32_t* picks;
  const int32_t* places;
  const int32_t* counts;
  const int32_t* count;
  int experts;
  int k;
  int width;
  int alignment;
  uint8_t* rows;         // activations
  int32_t* assignments;  // for each of those rows: token * k + pick
};

// stream[t] += (sum over j of weights[t, j] * results[t, j]) + shared[t], in that order.
struct Combine {
  const void* results;  // bfloat16 [tokens, k, width]
  const float* weights;
  const float* shared;  // [tokens, width] or null
  const int32_t* count;
  int k;
  int width;
  float* stream;
};

cudaError_t route(const Route& args, int capacity, cudaStream_t stream);
cudaError_t permute(const Permute& args, int capacity, cudaStream_t stream);
cudaError_t combine(const Combine& args, int capacity, cudaStream_t stream);
cudaError_t prepare_route();

}  // namespace fd::cuda
