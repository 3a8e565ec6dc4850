// Selects the top k experts of each token and their weights.
#pragma once

#include "team.h"

namespace fd {

struct MoeTopkSelect {
  float* logits;      // [num_tokens, num_experts]; overwritten with their softmax
  const float* bias;  // [num_experts], added to the probabilities for the selection only
  int num_tokens;
  int num_experts;
  int k;
  float norm_min;       // lower bound of the sum by which the selected probabilities are divided
  int32_t* topk_ids;    // [num_tokens, k], in descending order of score; ties by ascending index
  float* topk_weights;  // [num_tokens, k]
};

void moe_topk_select(Team& team, const MoeTopkSelect& args);

}  // namespace fd
