// Which experts a token takes, and with what weights.
#pragma once

#include "team.h"

namespace fd {

struct MoeTopkSelect {
  float* logits;      // [num_tokens, num_experts]; overwritten with their softmax
  const float* bias;  // [num_experts], added to the probabilities for the choice only
  int num_tokens;
  int num_experts;
  int k;
  float norm_min;   // floor of the sum that the picked probabilities are divided by
  int32_t* picks;   // [num_tokens, k], best first, the lower index first among equals
  float* weights;   // [num_tokens, k]
};

void moe_topk_select(Team& team, const MoeTopkSelect& args);

}  // namespace fd
