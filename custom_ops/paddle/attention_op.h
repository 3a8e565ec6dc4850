#pragma once

#include <algorithm>

#include "linear.h"
#include "paged_attention.h"
#include "rope_and_cache.h"
#include "tensors.h"

namespace fd::binding {

inline std::vector<paddle::Tensor> run_rotary_embedding(const paddle::Tensor& buffer, float theta, int head_dim) {
  const Step plan = step(buffer);
  require(head_dim > 0 && head_dim % 2 == 0, "rotary_embedding: head_dim must be even and positive");
  paddle::Tensor out = float_output({plan.num_tokens, head_dim});
  run_team([&](Team& team) { rotary_embedding(team, plan, theta, head_dim, out.data<float>()); });
  return {out};
}

inline Shapes shape_rotary_embedding(const Shape&, float, int head_dim) { return {{-1, head_dim}}; }
inline Types type_rotary_embedding(paddle::DataType) { return {paddle::DataType::FLOAT32}; }

inline void run_rope_and_cache(paddle::Tensor& qkv, const paddle::Tensor& buffer, const paddle::Tensor& rotary_cos_sin,
                               const paddle::Tensor& keys, const paddle::Tensor& values) {
  const Step plan = step(buffer);
  const Cache paged = cache(keys, values, plan);
  const int64_t width = extent(qkv, "rope_and_cache: qkv").width;
  const RopeAndCache args{
      plan, mutable_floats(qkv, plan.num_tokens * width, "rope_and_cache: qkv"),
      floats(rotary_cos_sin, static_cast<int64_t>(plan.num_tokens) * paged.head_dim, "rope_and_cache: rotary_cos_sin"),
      query_heads(static_cast<int>(width), paged), paged};
  run_team([&](Team& team) { rope_and_cache(team, args); });
}

inline Shapes shape_rope(const Shape& qkv, const Shape&, const Shape&, const Shape&, const Shape&) { return {qkv}; }
inline Types type_rope(paddle::DataType qkv, paddle::DataType, paddle::DataType, paddle::DataType,
                       paddle::DataType) {
  return {qkv};
}

inline std::vector<paddle::Tensor> run_paged_attention(const paddle::Tensor& qkv, const paddle::Tensor& buffer,
                                                       const paddle::Tensor& keys, const paddle::Tensor& values) {
  const Step plan = step(buffer);
  const Cache paged = cache(keys, values, plan);
  const int qkv_width = extent(qkv, "paged_attention: qkv").width;
  const int heads = query_heads(qkv_width, paged), width = heads * paged.head_dim;
  paddle::Tensor out = float_output({plan.num_tokens, width});
  Workspace& workspace = Workspace::fresh();
  const Activations activations = take_activations(workspace, plan.num_tokens, width);
  const PagedAttention attention(
      workspace, {plan, floats(qkv, int64_t{plan.num_tokens} * qkv_width, "paged_attention: qkv"), heads, paged, activations});
  run_team([&](Team& team) { attention.run(team); });
  float* rows = out.data<float>();
  for (int row = 0; row < plan.num_tokens; ++row) {
    for (int column = 0; column < width; column += kPiece) {
      std::copy_n(activations.piece(row, column / kPiece), std::min(kPiece, width - column),
                  rows + static_cast<int64_t>(row) * width + column);
    }
  }
  return {out};
}

inline Shapes shape_attention(const Shape& qkv, const Shape&, const Shape&, const Shape&) {
  return {{qkv[0], -1}};
}
inline Types type_attention(paddle::DataType qkv, paddle::DataType, paddle::DataType, paddle::DataType) {
  return {qkv};
}

}  // namespace fd::binding

PD_BUILD_OP(fd_rotation)
    .Inputs({"Step"})
    .Outputs({"Out"})
    .Attrs({"theta: float", "head_dim: int"})
    .SetKernelFn(FD_KERNEL(run_rotary_embedding))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_rotary_embedding))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_rotary_embedding));

PD_BUILD_OP(fd_rope_and_cache)
    .Inputs({"Qkv", "Step", "RotaryCosSin", "Keys", "Values"})
    .Outputs({"Out"})
    .SetInplaceMap({{"Qkv", "Out"}})
    .SetKernelFn(FD_KERNEL(run_rope_and_cache))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_rope))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_rope));

PD_BUILD_OP(fd_paged_attention)
    .Inputs({"Qkv", "Step", "Keys", "Values"})
    .Outputs({"Out"})
    .SetKernelFn(FD_KERNEL(run_paged_attention))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_attention))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_attention));
