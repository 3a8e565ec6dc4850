// Groups tokens by expert.
#pragma once

#include "team.h"
#include "workspace.h"

namespace fd {

// Assignment a = token * k + j is the j-th expert of a token; permuted row i belongs to assignment order[i]. Rows
// offsets[e] .. offsets[e + 1] - 1 belong to expert e, ordered by token.
struct MoeOrder {
  int num_tokens;
  int k;
  int num_experts;
  int32_t* offsets;  // [num_experts + 1]
  int32_t* order;    // [num_tokens * k]
  int32_t* row_of;   // [num_tokens * k], row of each assignment: the inverse of `order`

  int rows(int expert) const { return offsets[expert + 1] - offsets[expert]; }
};

// Takes uninitialised memory for the arrays of an order.
MoeOrder take_order(Workspace& workspace, int num_tokens, int k, int num_experts);

// Fills the arrays of `order` from topk_ids [num_tokens, k]. One thread of the team sorts; the others wait.
void moe_order(Team& team, const int32_t* topk_ids, const MoeOrder& order);

// x [num_tokens, width] -> rows [num_tokens * k, width]
void moe_permute(Team& team, const float* x, const MoeOrder& order, int width, float* rows);

}  // namespace fd
