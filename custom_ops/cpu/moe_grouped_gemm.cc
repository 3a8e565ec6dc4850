#include "moe_grouped_gemm.h"

#include <algorithm>

namespace fd {
namespace {

int members(const MoeOrder* order, const DenseMlp* dense) {
  return (order == nullptr ? 0 : order->num_experts) + (dense == nullptr ? 0 : 1);
}

// The ids are arbitrary input: all assignments may go to one expert.
int max_rows(const MoeOrder* order, const DenseMlp* dense) {
  return std::max(order == nullptr ? 0 : order->num_tokens * order->k, dense == nullptr ? 0 : dense->x.rows);
}

template <class Inputs>
int max_inputs(const Mlp* experts, const DenseMlp* dense, Inputs inputs) {
  return std::max(experts == nullptr ? 0 : inputs(*experts), dense == nullptr ? 0 : inputs(dense->weights));
}

}  // namespace

MoeGroupedGemm::MoeGroupedGemm(Workspace& workspace, const Mlp* experts, const MoeOrder* order, const DenseMlp* dense)
    : experts_(experts),
      order_(order),
      dense_(dense),
      gate_up_(workspace, members(order, dense),
               max_inputs(experts, dense, [](const Mlp& mlp) { return mlp.gate_up.inputs; }), max_rows(order, dense)),
      down_(workspace, members(order, dense),
            max_inputs(experts, dense, [](const Mlp& mlp) { return mlp.down.inputs; }), max_rows(order, dense)) {
  if (experts != nullptr) {
    const int rows = order->num_tokens * order->k;
    gathered_ = workspace.take<float>(Activations::size(rows, experts->gate_up.inputs));
    activations_ = workspace.take<float>(Activations::size(rows, experts->down.inputs));
  }
  if (dense != nullptr) dense_activations_ = take_activations(workspace, dense->x.rows, dense->weights.down.inputs);
}

void MoeGroupedGemm::run(Team& team, const float* x, float* out) {
  const auto source = [&](int64_t row) {
    return x + static_cast<int64_t>(order_->order[row] / order_->k) * experts_->gate_up.inputs;
  };
  run(team, source, out);
}

void MoeGroupedGemm::run(Team& team, FunctionRef<const float*(int64_t)> source, float* out) {
  if (team.rank() == 0) plan(out);
  team.barrier();
  if (experts_ != nullptr) {
    const int hidden = experts_->gate_up.inputs;
    team.for_each(static_cast<int64_t>(order_->num_tokens) * order_->k, [&](int64_t row) {
      const int32_t* const offsets = order_->offsets;
      const int expert =
          static_cast<int>(std::upper_bound(offsets, offsets + order_->num_experts + 1, row) - offsets) - 1;
      copy_row(source(row), expert_rows_of(gathered_, expert, hidden), static_cast<int>(row) - offsets[expert]);
    });
  }
  gate_up_.run(team);
  down_.run(team);
}

void MoeGroupedGemm::plan(float* out) {
  gate_up_.clear();
  down_.clear();
  if (dense_ != nullptr) {
    add(dense_->weights, 0, dense_->x, dense_activations_, dense_->output, dense_->out);
  }
  if (experts_ == nullptr) return;
  const int hidden = experts_->gate_up.inputs;
  for (int expert = 0; expert < order_->num_experts; ++expert) {
    if (order_->rows(expert) == 0) continue;
    add(*experts_, expert, expert_rows_of(gathered_, expert, hidden),
        expert_rows_of(activations_, expert, experts_->down.inputs), Output::kStore,
        out + static_cast<int64_t>(order_->offsets[expert]) * hidden);
  }
}

void MoeGroupedGemm::add(const Mlp& mlp, int index, const Activations& x, const Activations& activations, Output output,
                         float* out) {
  gate_up_.add({mlp.gate_up, index, x, Output::kSwiglu, nullptr, 0, activations});
  down_.add({mlp.down, index, activations, output, out, mlp.down.outputs, {}});
}

Activations MoeGroupedGemm::expert_rows_of(float* data, int expert, int width) const {
  return {data + order_->offsets[expert] * Activations::padded(width), order_->rows(expert), width};
}

}  // namespace fd
