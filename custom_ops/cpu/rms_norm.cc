#include "rms_norm.h"

#include "linear.h"

namespace fd {

void rms_norm(Team& team, const RmsNorm& args) {
  const Kernels& isa = kernels();
  team.for_each(args.rows, [&](int64_t row) {
    const int64_t source = args.index == nullptr ? row : args.index[row];
    float* out = args.out + row * args.width;
    isa.rms_norm(args.x + source * args.width, args.weight, args.epsilon, out, args.width);
    if (args.activations != nullptr) copy_row(out, *args.activations, static_cast<int>(row));
  });
}

}  // namespace fd
