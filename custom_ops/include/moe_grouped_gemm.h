// Gated MLPs, down(silu(gate(x)) * up(x)): many experts with a few rows each, and one that all tokens take.
#pragma once

#include "linear.h"
#include "moe_permute.h"

namespace fd {

struct Mlp {
  PackedMatrix gate_up;  // gate and up in turns of 16 outputs
  PackedMatrix down;
};

// An MLP that takes all rows: the shared experts, or the whole of a dense layer.
struct DenseMlp {
  Mlp weights;
  Activations x;
  Output output;  // kStore or kAdd
  float* out;     // [x.rows, hidden]
};

// Both kinds in two rounds of products (everybody's gate_up, then everybody's down).
class MoeGroupedGemm {
 public:
  // `experts` or `dense` may be null.
  MoeGroupedGemm(Workspace& workspace, const Mlp* experts, const MoeOrder* order, const DenseMlp* dense);

  // Rows of x, `source(i)` for row i of the permuted order, through their experts; out [num_tokens * k, hidden] in
  // that order. Null without experts.
  void run(Team& team, FunctionRef<const float*(int64_t)> source, float* out);
  // x [num_tokens, hidden], row-major, through the experts of each token.
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
