// RMS norm, router logits and embedding.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"

namespace fd::cuda {

// out[r] = hidden_states[rows[r]] / sqrt(mean of squares + epsilon) * weight, rounded once to bfloat16.
struct Norm {
  const float* hidden_states;  // [tokens, width]
  const float* weight;  // [width]
  float epsilon;
  int width;
  const int32_t* rows;   // row of hidden_states for output row r; null: r
  const int32_t* count;  // number of rows, in device memory
  uint8_t* out;          // activations
};

// The router of a MoE layer: logits[r, e] = out[r] . weights[e], in float.
struct Router {
  const float* weights;  // [experts, width]
  int experts;
  float* logits;    // [rows, experts]
  int32_t* counts;  // [experts]: set to zero, for route()
};

// hidden_states[t] = table[token_ids[t]] of the step; a token id -1 - r stands for drawn[r].
struct Embedding {
  const int32_t* step;
  const void* table;  // bfloat16 [vocabulary, width]
  int vocabulary;
  int width;
  float* hidden_states;
  const int32_t* drawn;  // may be null
};

constexpr int kMaxExperts = 256;
constexpr int kMaxWidth = 16384;

cudaError_t norm(const Norm& args, int capacity, cudaStream_t stream);
cudaError_t norm_and_router(const Norm& args, const Router& router, int capacity, cudaStream_t stream);
cudaError_t embedding(const Embedding& args, int capacity, cudaStream_t stream);
cudaError_t prepare_norm();

}  // namespace fd::cuda
