#include "moe_unpermute.h"

#include "kernels/kernels.h"

namespace fd {

void moe_unpermute(Team& team, const MoeUnpermute& args) {
  const Kernels& isa = kernels();
  const int k = args.order.k;
  team.for_each(args.order.num_tokens, [&](int64_t token) {
    const float* rows[kMaxTopk];
    for (int j = 0; j < k; ++j) {
      rows[j] = args.rows + static_cast<int64_t>(args.order.row_of[token * k + j]) * args.width;
    }
    isa.combine(args.out + token * args.width, rows, args.topk_weights + token * k, k,
                args.shared == nullptr ? nullptr : args.shared + token * args.width, args.width);
  });
}

}  // namespace fd
