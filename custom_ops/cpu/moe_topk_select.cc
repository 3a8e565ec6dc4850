#include "moe_topk_select.h"

#include <algorithm>

#include "kernels/kernels.h"

namespace fd {

void moe_topk_select(Team& team, const MoeTopkSelect& args) {
  const Kernels& isa = kernels();
  team.for_each(args.num_tokens, [&](int64_t token) {
    float* const probabilities = args.logits + token * args.num_experts;
    int32_t* const topk_ids = args.topk_ids + token * args.k;
    float* const topk_weights = args.topk_weights + token * args.k;
    isa.softmax(probabilities, args.num_experts);
    // Insertion into the sorted best k; a later equal stays after an earlier one.
    int found = 0;
    for (int expert = 0; expert < args.num_experts; ++expert) {
      const float score = probabilities[expert] + args.bias[expert];
      int slot = found;
      while (slot > 0 && score > probabilities[topk_ids[slot - 1]] + args.bias[topk_ids[slot - 1]]) --slot;
      if (slot == args.k) continue;
      if (found < args.k) ++found;
      std::copy_backward(topk_ids + slot, topk_ids + found - 1, topk_ids + found);
      topk_ids[slot] = expert;
    }
    float sum = 0.0f;
    for (int j = 0; j < args.k; ++j) sum += probabilities[topk_ids[j]];
    for (int j = 0; j < args.k; ++j) topk_weights[j] = probabilities[topk_ids[j]] / std::max(sum, args.norm_min);
  });
}

}  // namespace fd
