// Sums the expert outputs of each token by weight, in top-k order.
#pragma once

#include "moe_permute.h"
#include "team.h"

namespace fd {

// Maximum experts per token; bindings reject more.
constexpr int kMaxTopk = 64;

struct MoeUnpermute {
  MoeOrder order;
  const float* rows;     // [num_tokens * k, width], in the order of moe_permute
  const float* topk_weights;  // [num_tokens, k]
  const float* shared;   // null, or [num_tokens, width]: added to the sum of each token
  int width;
  float* out;  // [num_tokens, width], added to
};

void moe_unpermute(Team& team, const MoeUnpermute& args);

}  // namespace fd
