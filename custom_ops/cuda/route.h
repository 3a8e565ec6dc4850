// Routing: selection of experts, permutation by expert, and combination of results.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "norm.h"

namespace fd::cuda {

constexpr int kMaxTopk = 16;

// Selection of the k experts of each token with the highest softmax probability + bias, and their weights.
struct Route {
  const float* logits;  // [tokens, experts]
  const float* bias;    // [experts]: for the selection only
  float norm_min;
  int experts;
  int k;
  const int32_t* count;  // tokens
  int32_t* topk_ids;     // [tokens, k]: best first, ties by lower expert
  float* topk_weights;   // [tokens, k]
  int32_t* counts;       // [experts]: zeros on entry, rows of each expert on return
  int32_t* rows_in_expert;  // [tokens, k]: index among the rows of the expert, in no particular order
};

// Rows of activations grouped by expert; the rows of each expert begin at a multiple of `alignment`.
struct Permute {
  const uint8_t* x;  // activations [tokens, width]
  const int32_t* topk_ids;
  const int32_t* rows_in_expert;
  const int32_t* counts;
  const int32_t* count;
  int experts;
  int k;
  int width;
  int alignment;
  uint8_t* rows;         // activations
  int32_t* assignments;  // token * k + top-k index of each row
};

// hidden_states[t] += (sum over j of topk_weights[t, j] * results[t, j]) + shared[t], in that order.
struct Combine {
  const void* results;  // bfloat16 [tokens, k, width]
  const float* topk_weights;
  const float* shared;  // [tokens, width] or null
  const int32_t* count;
  int k;
  int width;
  float* hidden_states;
};

cudaError_t route_and_permute(const Route& args, const Permute& move, int capacity, cudaStream_t stream);
cudaError_t combine(const Combine& args, int capacity, cudaStream_t stream);
// Combines, and normalises the new hidden states.
cudaError_t combine_and_norm(const Combine& args, const Norm& next, int capacity, cudaStream_t stream);
cudaError_t prepare_route();

}  // namespace fd::cuda
