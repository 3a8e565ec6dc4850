// Gated MLPs, down(silu(gate(x)) * up(x)): routed experts with a few rows each, and one dense MLP for all tokens.
#pragma once

#include "linear.h"
#include "moe_permute.h"

namespace fd {

struct Mlp {
  PackedMatrix gate_up;  // gate and up interleaved 16 outputs at a time
  PackedMatrix down;
};

// An MLP applied to all rows: the shared experts, or the MLP of a dense layer.
struct DenseMlp {
  Mlp weights;
  Activations x;
  Output output;  // kStore or kAdd
  float* out;     // [x.rows, hidden]
};

// Runs both kinds in two groups of products: all gate_up, then all down.
class MoeGroupedGemm {
 public:
  // `experts` or `dense` may be null.
  MoeGroupedGemm(Workspace& workspace, const Mlp* experts, const MoeOrder* order, const DenseMlp* dense);

  // Applies the experts to rows `source(i)`, i in permuted order; out [num_tokens * k, hidden] has the same order. Both
  // are null if there are no routed experts.
  void run(Team& team, FunctionRef<const float*(int64_t)> source, float* out);
  // Applies the experts of each token to row-major x [num_tokens, hidden].
  void run(Team& team, const float* x, float* out);

 private:
  void plan(float* out);
  void add(const Mlp& mlp, int index, const Activations& x, const Activations& activations, Output output, float* out);
  Activations expert_rows_of(float* data, int expert, int width) const;

  const Mlp* experts_;
  const MoeOrder* order_;
  const DenseMlp* dense_;
  LinearGroup gate_up_;
  LinearGroup down_;
  float* gathered_ = nullptr;
  float* activations_ = nullptr;
  Activations dense_activations_{};
};

}  // namespace fd
