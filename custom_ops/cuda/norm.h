// From the stream to what a block multiplies: norm, router logits; and from tokens to the stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"

namespace fd::cuda {

// out[r] = stream[rows[r]] / sqrt(mean of squares + epsilon) * weight, in one rounding to bfloat16.
struct Norm {
  const float* stream;  // [tokens, width]
  const float* weight;  // [width]
  float epsilon;
  int width;
  const int32_t* rows;   // which rows of the stream; null: row r
  const int32_t* count;  // how many, in device memory
  uint8_t* out;          // activations
};

// The router of a layer with experts: logits[r, e] = out[r] . weights[e], in float.
struct Router {
  const float* weights;  // [experts, width]
  int experts;
  float* logits;    // [rows, experts]
  int32_t* counts;  // [experts]: set to zero, for route()
};

// stream[t] = table[token_ids[t]] of the step.
struct Embedding {
  const int32_t* step;
  const void* table;  // bfloat16 [vocabulary, width]
  int vocabulary;
  int width;
  float* stream;
};

constexpr int kMostExperts = 256;
constexpr int kWidestRow = 16384;

cudaError_t norm(const Norm& args, int capacity, cudaStream_t stream);
cudaError_t norm_and_router(const Norm& args, const Router& router, int capacity, cudaStream_t stream);
cudaError_t embedding(const Embedding& args, int capacity, cudaStream_t stream);
cudaError_t prepare_norm();

}  // namespace fd::cuda
