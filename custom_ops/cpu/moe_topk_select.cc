#include "moe_topk_select.h"

#include <algorithm>

#include "kernels/kernels.h"

namespace fd {

void moe_topk_select(Team& team, const MoeTopkSelect& args) {
  const Kernels& isa = kernels();
  team.for_each(args.num_tokens, [&](int64_t token) {
    float* const probabilities = args.logits + token * args.num_experts;
    int32_t* const picks = args.picks + token * args.k;
    float* const weights = args.weights + token * args.k;
    isa.softmax(probabilities, args.num_experts);
    // The best so far in order; what is equal to one of them and comes later stays behind it.
    int found = 0;
    for (int expert = 0; expert < args.num_experts; ++expert) {
      const float score = probabilities[expert] + args.bias[expert];
      int place = found;
      while (place > 0 && score > probabilities[picks[place - 1]] + args.bias[picks[place - 1]]) --place;
      if (place == args.k) continue;
      if (found < args.k) ++found;
      std::copy_backward(picks + place, picks + found - 1, picks + found);
      picks[place] = expert;
    }
    float sum = 0.0f;
    for (int j = 0; j < args.k; ++j) sum += probabilities[picks[j]];
    for (int j = 0; j < args.k; ++j) weights[j] = probabilities[picks[j]] / std::max(sum, args.norm_min);
  });
}

}  // namespace fd
