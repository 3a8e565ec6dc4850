#pragma once

#include <algorithm>
#include <cstring>

#include "moe_grouped_gemm.h"
#include "moe_permute.h"
#include "moe_topk_select.h"
#include "moe_unpermute.h"
#include "tensors.h"

namespace fd::binding {

inline Mlp mlp(const paddle::Tensor& gate_up, const paddle::Tensor& down) {
  const Mlp mlp{matrix(gate_up), matrix(down)};
  require(mlp.gate_up.count == mlp.down.count && mlp.gate_up.inputs == mlp.down.outputs &&
              mlp.gate_up.outputs == 2 * ((mlp.down.inputs + 15) / 16 * 16),
          "gate_up and down are not of one gated MLP");
  return mlp;
}

inline std::vector<paddle::Tensor> run_moe_topk_select(const paddle::Tensor& logits, const paddle::Tensor& bias,
                                                       int k, float norm_min) {
  const auto [tokens, experts] = extent(logits, "moe_topk_select: logits");
  require(1 <= k && k <= std::min(experts, kMostPicks), "moe_topk_select: k must be 1..64 and at most the experts");
  Workspace& workspace = Workspace::fresh();
  const int64_t count = int64_t{tokens} * experts;
  float* probabilities = workspace.take<float>(count);
  std::copy_n(floats(logits, count, "moe_topk_select: logits"), count, probabilities);
  paddle::Tensor picks = int_output({tokens, k}), weights = float_output({tokens, k});
  const MoeTopkSelect args{probabilities, floats(bias, experts, "moe_topk_select: bias"), tokens, experts, k,
                           norm_min,      picks.data<int32_t>(), weights.data<float>()};
  run_team([&](Team& team) { moe_topk_select(team, args); });
  return {picks, weights};
}

inline Shapes shape_topk(const Shape& logits, const Shape&, int k, float) {
  return {{logits[0], k}, {logits[0], k}};
}
inline Types type_topk(paddle::DataType logits, paddle::DataType) { return {paddle::DataType::INT32, logits}; }

// Picks are indices into memory: one outside of the experts must not get through.
inline const int32_t* checked_picks(const paddle::Tensor& picks, int num_experts) {
  const int32_t* values = int32s(picks, picks.numel(), "picks must be int32");
  require(extent(picks, "picks").width <= kMostPicks, "picks: at most 64 of a token");
  for (int64_t i = 0; i < picks.numel(); ++i) {
    require(0 <= values[i] && values[i] < num_experts, "picks: an expert that does not exist");
  }
  return values;
}

inline std::vector<paddle::Tensor> run_moe_permute(const paddle::Tensor& x, const paddle::Tensor& picks,
                                                   int num_experts) {
  require(num_experts >= 1, "moe_permute: there must be an expert");
  const auto [tokens, k] = extent(picks, "picks");
  const int width = extent(x, "moe_permute: x").width;
  const int32_t* assigned = checked_picks(picks, num_experts);
  const float* input = floats(x, static_cast<int64_t>(tokens) * width, "moe_permute: x");
  paddle::Tensor rows = float_output({tokens * k, width});
  paddle::Tensor offsets = int_output({num_experts + 1}), order = int_output({tokens * k});
  MoeOrder moe = take_order(Workspace::fresh(), tokens, k, num_experts);
  run_team([&](Team& team) {
    moe_order(team, assigned, moe);
    moe_permute(team, input, moe, width, rows.data<float>());
  });
  std::copy_n(moe.offsets, num_experts + 1, offsets.data<int32_t>());
  std::copy_n(moe.order, tokens * k, order.data<int32_t>());
  return {rows, offsets, order};
}

inline Shapes shape_permute(const Shape& x, const Shape& picks, int num_experts) {
  const int64_t rows = picks[0] * picks[1];
  return {{rows, x[1]}, {num_experts + 1}, {rows}};
}
inline Types type_permute(paddle::DataType x, paddle::DataType picks) { return {x, picks, picks}; }

inline std::vector<paddle::Tensor> run_moe_grouped_gemm(const paddle::Tensor& rows, const paddle::Tensor& offsets,
                                                        const paddle::Tensor& gate_up, const paddle::Tensor& down) {
  const Mlp experts = mlp(gate_up, down);
  const int count = extent(rows, "moe_grouped_gemm: rows").rows, num_experts = experts.down.count;
  const int32_t* begins = int32s(offsets, num_experts + 1, "moe_grouped_gemm: offsets must hold experts + 1 int32");
  require(begins[0] == 0 && begins[num_experts] == count && std::is_sorted(begins, begins + num_experts + 1),
          "moe_grouped_gemm: offsets must ascend from 0 to the number of rows");
  const float* input = floats(rows, static_cast<int64_t>(count) * experts.gate_up.inputs, "moe_grouped_gemm: rows");
  paddle::Tensor out = float_output({count, experts.down.outputs});
  Workspace& workspace = Workspace::fresh();
  // The rows are in order already: each is a token of its own with one expert.
  MoeOrder order = take_order(workspace, count, 1, num_experts);
  std::copy_n(begins, num_experts + 1, order.offsets);
  for (int i = 0; i < count; ++i) order.order[i] = order.place[i] = i;
  MoeGroupedGemm gemm(workspace, &experts, &order, nullptr);
  run_team([&](Team& team) { gemm.run(team, input, out.data<float>()); });
  return {out};
}

inline Shapes shape_grouped(const Shape& rows, const Shape&, const Shape&, const Shape&) { return {rows}; }
inline Types type_grouped(paddle::DataType rows, paddle::DataType, paddle::DataType, paddle::DataType) {
  return {rows};
}

inline std::vector<paddle::Tensor> run_moe_unpermute(const paddle::Tensor& rows, const paddle::Tensor& order,
                                                     const paddle::Tensor& weights) {
  const auto [tokens, k] = extent(weights, "moe_unpermute: weights");
  const int width = extent(rows, "moe_unpermute: rows").width, count = tokens * k;
  require(k <= kMostPicks, "moe_unpermute: at most 64 picks of a token");
  const int32_t* assignments = int32s(order, count, "moe_unpermute: order must hold tokens * k int32");
  MoeOrder moe = take_order(Workspace::fresh(), tokens, k, 1);
  std::fill_n(moe.place, count, -1);
  for (int row = 0; row < count; ++row) {
    require(0 <= assignments[row] && assignments[row] < count && moe.place[assignments[row]] < 0,
            "moe_unpermute: order is not a permutation");
    moe.place[assignments[row]] = row;
  }
  paddle::Tensor out = float_output({tokens, width});
  std::memset(out.data<float>(), 0, sizeof(float) * tokens * width);
  const MoeUnpermute args{moe,
                          floats(rows, static_cast<int64_t>(count) * width, "moe_unpermute: rows"),
                          floats(weights, count, "moe_unpermute: weights"),
                          nullptr,
                          width,
                          out.data<float>()};
  run_team([&](Team& team) { moe_unpermute(team, args); });
  return {out};
}

inline Shapes shape_unpermute(const Shape& rows, const Shape&, const Shape& weights) {
  return {{weights[0], rows[1]}};
}
inline Types type_unpermute(paddle::DataType rows, paddle::DataType, paddle::DataType) { return {rows}; }

inline std::vector<paddle::Tensor> run_fused_moe(const paddle::Tensor& x, const paddle::Tensor& picks,
                                                 const paddle::Tensor& weights, const paddle::Tensor& gate_up,
                                                 const paddle::Tensor& down) {
  const Mlp experts = mlp(gate_up, down);
  const auto [tokens, k] = extent(picks, "picks");
  const int hidden = experts.gate_up.inputs;
  const int32_t* assigned = checked_picks(picks, experts.down.count);
  const float* input = floats(x, static_cast<int64_t>(tokens) * hidden, "fused_moe: x");
  paddle::Tensor out = float_output({tokens, hidden});
  std::memset(out.data<float>(), 0, sizeof(float) * tokens * hidden);
  Workspace& workspace = Workspace::fresh();
  const MoeOrder order = take_order(workspace, tokens, k, experts.down.count);
  float* rows = workspace.take<float>(static_cast<int64_t>(tokens) * k * hidden);
  MoeGroupedGemm gemm(workspace, &experts, &order, nullptr);
  const MoeUnpermute unpermute{order,   rows,  floats(weights, static_cast<int64_t>(tokens) * k, "fused_moe: weights"),
                               nullptr, hidden, out.data<float>()};
  run_team([&](Team& team) {
    moe_order(team, assigned, order);
    gemm.run(team, input, rows);
    moe_unpermute(team, unpermute);
  });
  return {out};
}

inline Shapes shape_fused(const Shape& x, const Shape&, const Shape&, const Shape&, const Shape&) { return {x}; }
inline Types type_fused(paddle::DataType x, paddle::DataType, paddle::DataType, paddle::DataType,
                        paddle::DataType) {
  return {x};
}

}  // namespace fd::binding

PD_BUILD_OP(fd_moe_topk_select)
    .Inputs({"Logits", "Bias"})
    .Outputs({"Picks", "Weights"})
    .Attrs({"k: int", "norm_min: float"})
    .SetKernelFn(FD_KERNEL(run_moe_topk_select))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_topk))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_topk));

PD_BUILD_OP(fd_moe_permute)
    .Inputs({"X", "Picks"})
    .Outputs({"Rows", "Offsets", "Order"})
    .Attrs({"num_experts: int"})
    .SetKernelFn(FD_KERNEL(run_moe_permute))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_permute))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_permute));

PD_BUILD_OP(fd_moe_grouped_gemm)
    .Inputs({"Rows", "Offsets", "GateUp", "Down"})
    .Outputs({"Out"})
    .SetKernelFn(FD_KERNEL(run_moe_grouped_gemm))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_grouped))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_grouped));

PD_BUILD_OP(fd_moe_unpermute)
    .Inputs({"Rows", "Order", "Weights"})
    .Outputs({"Out"})
    .SetKernelFn(FD_KERNEL(run_moe_unpermute))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_unpermute))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_unpermute));

PD_BUILD_OP(fd_fused_moe)
    .Inputs({"X", "Picks", "Weights", "GateUp", "Down"})
    .Outputs({"Out"})
    .SetKernelFn(FD_KERNEL(run_fused_moe))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_fused))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_fused));
