#include "moe_permute.h"

#include <algorithm>
#include <cstring>

namespace fd {

MoeOrder take_order(Workspace& workspace, int num_tokens, int k, int num_experts) {
  const int64_t assignments = static_cast<int64_t>(num_tokens) * k;
  return {num_tokens,
          k,
          num_experts,
          workspace.take<int32_t>(num_experts + 1),
          workspace.take<int32_t>(assignments),
          workspace.take<int32_t>(assignments)};
}

void moe_order(Team& team, const int32_t* topk_ids, const MoeOrder& order) {
  if (team.rank() == 0) {
    const int assignments = order.num_tokens * order.k;
    // Counting sort. offsets[e + 1] first counts the rows of expert e, then is the position of its next row, and
    // finally the start of expert e + 1.
    std::fill_n(order.offsets, order.num_experts + 1, 0);
    for (int a = 0; a < assignments; ++a) ++order.offsets[topk_ids[a] + 1];
    int begin = 0;
    for (int expert = 0; expert < order.num_experts; ++expert) {
      const int count = order.offsets[expert + 1];
      order.offsets[expert + 1] = begin;
      begin += count;
    }
    for (int a = 0; a < assignments; ++a) {
      const int row = order.offsets[topk_ids[a] + 1]++;
      order.order[row] = a;
      order.row_of[a] = row;
    }
  }
  team.barrier();
}

void moe_permute(Team& team, const float* x, const MoeOrder& order, int width, float* rows) {
  team.for_each(static_cast<int64_t>(order.num_tokens) * order.k, [&](int64_t row) {
    std::memcpy(rows + row * width, x + static_cast<int64_t>(order.order[row] / order.k) * width,
                width * sizeof(float));
  });
}

}  // namespace fd
