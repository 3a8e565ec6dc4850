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
  require(1 <= k && k <= std::min(experts, kMaxTopk),
          "moe_topk_select: k must be 1..64 and at most the number of experts");
  Workspace& workspace = Workspace::fresh();
  const int64_t count = int64_t{tokens} * experts;
  float* probabilities = workspace.take<float>(count);
  std::copy_n(floats(logits, count, "moe_topk_select: logits"), count, probabilities);
  paddle::Tensor topk_ids = int_output({tokens, k}), topk_weights = float_output({tokens, k});
  const MoeTopkSelect args{probabilities,
                           floats(bias, experts, "moe_topk_select: bias"),
                           tokens,
                           experts,
                           k,
                           norm_min,
                           topk_ids.data<int32_t>(),
                           topk_weights.data<float>()};
  run_team([&](Team& team) { moe_topk_select(team, args); });
  return {topk_ids, topk_weights};
}

inline Shapes shape_topk(const Shape& logits, const Shape&, int k, float) {
  return {{logits[0], k}, {logits[0], k}};
}
inline Types type_topk(paddle::DataType logits, paddle::DataType) { return {paddle::DataType::INT32, logits}; }

// Returns the ids after a check of each, because kernels index memory with them.
inline const int32_t* checked_topk_ids(const paddle::Tensor& topk_ids, int num_experts) {
  const int32_t* values = int32s(topk_ids, topk_ids.numel(), "topk_ids must be int32");
  require(extent(topk_ids, "topk_ids").width <= kMaxTopk, "topk_ids: at most 64 per token");
  for (int64_t i = 0; i < topk_ids.numel(); ++i) {
    require(0 <= values[i] && values[i] < num_experts, "topk_ids: an expert that does not exist");
  }
  return values;
}

inline std::vector<paddle::Tensor> run_moe_permute(const paddle::Tensor& x, const paddle::Tensor& topk_ids,
                                                   int num_experts) {
  require(num_experts >= 1, "moe_permute: there must be an expert");
  const auto [tokens, k] = extent(topk_ids, "topk_ids");
  const int width = extent(x, "moe_permute: x").width;
  const int32_t* assigned = checked_topk_ids(topk_ids, num_experts);
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

inline Shapes shape_permute(const Shape& x, const Shape& topk_ids, int num_experts) {
  const int64_t rows = topk_ids[0] * topk_ids[1];
  return {{rows, x[1]}, {num_experts + 1}, {rows}};
}
inline Types type_permute(paddle::DataType x, paddle::DataType topk_ids) { return {x, topk_ids, topk_ids}; }

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
  // The rows are already permuted: treat each as a token with one expert.
  MoeOrder order = take_order(workspace, count, 1, num_experts);
  std::copy_n(begins, num_experts + 1, order.offsets);
  for (int i = 0; i < count; ++i) order.order[i] = order.row_of[i] = i;
  MoeGroupedGemm gemm(workspace, &experts, &order, nullptr);
  run_team([&](Team& team) { gemm.run(team, input, out.data<float>()); });
  return {out};
}

inline Shapes shape_grouped(const Shape& rows, const Shape&, const Shape&, const Shape&) { return {rows}; }
inline Types type_grouped(paddle::DataType rows, paddle::DataType, paddle::DataType, paddle::DataType) {
  return {rows};
}

inline std::vector<paddle::Tensor> run_moe_unpermute(const paddle::Tensor& rows, const paddle::Tensor& order,
                                                     const paddle::Tensor& topk_weights) {
  const auto [tokens, k] = extent(topk_weights, "moe_unpermute: topk_weights");
  const int width = extent(rows, "moe_unpermute: rows").width, count = tokens * k;
  require(k <= kMaxTopk, "moe_unpermute: at most 64 topk_ids per token");
  const int32_t* assignments = int32s(order, count, "moe_unpermute: order must hold tokens * k int32");
  MoeOrder moe = take_order(Workspace::fresh(), tokens, k, 1);
  std::fill_n(moe.row_of, count, -1);
  for (int row = 0; row < count; ++row) {
    require(0 <= assignments[row] && assignments[row] < count && moe.row_of[assignments[row]] < 0,
            "moe_unpermute: order is not a permutation");
    moe.row_of[assignments[row]] = row;
  }
  paddle::Tensor out = float_output({tokens, width});
  std::memset(out.data<float>(), 0, sizeof(float) * tokens * width);
  const MoeUnpermute args{moe,
                          floats(rows, static_cast<int64_t>(count) * width, "moe_unpermute: rows"),
                          floats(topk_weights, count, "moe_unpermute: topk_weights"),
                          nullptr,
                          width,
                          out.data<float>()};
  run_team([&](Team& team) { moe_unpermute(team, args); });
  return {out};
}

inline Shapes shape_unpermute(const Shape& rows, const Shape&, const Shape& topk_weights) {
  return {{topk_weights[0], rows[1]}};
}
inline Types type_unpermute(paddle::DataType rows, paddle::DataType, paddle::DataType) { return {rows}; }

inline std::vector<paddle::Tensor> run_fused_moe(const paddle::Tensor& x, const paddle::Tensor& topk_ids,
                                                 const paddle::Tensor& topk_weights, const paddle::Tensor& gate_up,
                                                 const paddle::Tensor& down) {
  const Mlp experts = mlp(gate_up, down);
  const auto [tokens, k] = extent(topk_ids, "topk_ids");
  const int hidden = experts.gate_up.inputs;
  const int32_t* assigned = checked_topk_ids(topk_ids, experts.down.count);
  const float* input = floats(x, static_cast<int64_t>(tokens) * hidden, "fused_moe: x");
  paddle::Tensor out = float_output({tokens, hidden});
  std::memset(out.data<float>(), 0, sizeof(float) * tokens * hidden);
  Workspace& workspace = Workspace::fresh();
  const MoeOrder order = take_order(workspace, tokens, k, experts.down.count);
  float* rows = workspace.take<float>(static_cast<int64_t>(tokens) * k * hidden);
  MoeGroupedGemm gemm(workspace, &experts, &order, nullptr);
  const MoeUnpermute unpermute{
      order,   rows,   floats(topk_weights, static_cast<int64_t>(tokens) * k, "fused_moe: topk_weights"),
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
    .Outputs({"TopkIds", "TopkWeights"})
    .Attrs({"k: int", "norm_min: float"})
    .SetKernelFn(FD_KERNEL(run_moe_topk_select))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_topk))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_topk));

PD_BUILD_OP(fd_moe_permute)
    .Inputs({"X", "TopkIds"})
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
    .Inputs({"Rows", "Order", "TopkWeights"})
    .Outputs({"Out"})
    .SetKernelFn(FD_KERNEL(run_moe_unpermute))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_unpermute))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_unpermute));

PD_BUILD_OP(fd_fused_moe)
    .Inputs({"X", "TopkIds", "TopkWeights", "GateUp", "Down"})
    .Outputs({"Out"})
    .SetKernelFn(FD_KERNEL(run_fused_moe))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_fused))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_fused));
