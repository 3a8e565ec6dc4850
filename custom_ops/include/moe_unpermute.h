// Every token's expert outputs summed by weight, in the order of its picks.
#pragma once

#include "moe_permute.h"
#include "team.h"

namespace fd {

// Of one token; bindings refuse more.
constexpr int kMostPicks = 64;

struct MoeUnpermute {
  MoeOrder order;
  const float* rows;     // [num_tokens * k, width], in the order of moe_permute
  const float* weights;  // [num_tokens, k]
  const float* shared;   // null, or [num_tokens, width]: added to the sum of each token
  int width;
  float* out;  // [num_tokens, width], added to
};

void moe_unpermute(Team& team, const MoeUnpermute& args);

}  // namespace fd
