// The tokens of one expert become neighbours.
#pragma once

#include "team.h"
#include "workspace.h"

namespace fd {

// Row i of the permuted rows is the token of assignment order[i]; assignment a = token * k + j is the j-th pick
// of a token. Rows offsets[e] .. offsets[e + 1] - 1 belong to expert e, tokens in ascending order.
struct MoeOrder {
  int num_tokens;
  int k;
  int num_experts;
  int32_t* offsets;  // [num_experts + 1]
  int32_t* order;    // [num_tokens * k]
  int32_t* place;    // [num_tokens * k], the row of an assignment: the inverse of `order`

  int rows(int expert) const { return offsets[expert + 1] - offsets[expert]; }
};

MoeOrder take_order(Workspace& workspace, int num_tokens, int k, int num_experts);

// One thread of the team orders; the others wait.
void moe_order(Team& team, const int32_t* picks, const MoeOrder& order);

// x [num_tokens, width] -> rows [num_tokens * k, width]
void moe_permute(Team& team, const float* x, const MoeOrder& order, int width, float* rows);

}  // namespace fd
