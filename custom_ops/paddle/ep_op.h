#pragma once

#include <algorithm>

#include "ep_exchange.h"
#include "expert_groups.h"
#include "moe_unpermute.h"
#include "tensors.h"

namespace fd::binding {

inline ExpertGroup& expert_group(int64_t handle, int layer) {
  ExpertGroup* const group = find_expert_group(handle);
  require(group != nullptr, "expert group: it is not open in this process");
  require(0 <= layer && layer < group->shape().num_layers, "expert group: no such layer");
  return *group;
}

// Returns the open group; throws GroupInterrupted unless its status is kGoing.
inline ExpertGroup& going(int64_t handle, int layer) {
  ExpertGroup& group = expert_group(handle, layer);
  if (group.status() != ExpertGroup::kGoing) throw GroupInterrupted();
  return group;
}

// Bytes per element of exchanged rows.
inline int element_of(const paddle::Tensor& rows) {
  if (rows.dtype() == paddle::DataType::FLOAT32) return 4;
  require(rows.dtype() == paddle::DataType::BFLOAT16, "expert group: rows must be float32 or bfloat16");
  return 2;
}

inline std::vector<paddle::Tensor> run_ep_dispatch_send(const paddle::Tensor& x, const paddle::Tensor& topk_ids,
                                                        int64_t handle, int layer) {
  ExpertGroup& group = going(handle, layer);
  const GroupShape& shape = group.shape();
  const auto [tokens, hidden] = extent(x, "ep_dispatch_send: x");
  const int element = element_of(x);
  require(hidden == shape.hidden, "ep_dispatch_send: x has another width than the group");
  const int64_t count = tokens * shape.k;
  const int32_t* const chosen = int32s(topk_ids, count, "ep_dispatch_send: topk_ids must be int32 [tokens, k]");
  require(
      std::all_of(chosen, chosen + count, [&](int32_t expert) { return -1 <= expert && expert < shape.num_experts; }),
      "ep_dispatch_send: topk_ids has an expert that does not exist");
  if (!ep_dispatch_send(group, layer, x.data(), chosen, tokens, element)) throw GroupInterrupted();
  paddle::Tensor dispatch_targets = int_output({tokens, shape.k});
  std::copy_n(group.dispatch_targets(), count, dispatch_targets.data<int32_t>());
  return {dispatch_targets};
}

inline Shapes shape_dispatch_send(const Shape&, const Shape& topk_ids, int64_t, int) { return {topk_ids}; }
inline Types type_dispatch_send(paddle::DataType, paddle::DataType topk_ids) { return {topk_ids}; }

inline std::vector<paddle::Tensor> run_ep_dispatch_receive(const paddle::Tensor& like, int64_t handle, int layer) {
  ExpertGroup& group = going(handle, layer);
  const int element = element_of(like);
  Received received;
  if (!ep_dispatch_receive(group, layer, element, Workspace::fresh(), received)) throw GroupInterrupted();
  const int64_t hidden = group.shape().hidden, num_experts = group.shape().num_experts;
  paddle::Tensor rows = paddle::empty({received.rows, hidden}, like.dtype(), paddle::CPUPlace());
  paddle::Tensor offsets = int_output({num_experts + 1}), source_token_index = int_output({received.rows, 3});
  ep_gather(group, received, element, rows.data());
  std::copy_n(received.offsets, num_experts + 1, offsets.data<int32_t>());
  std::copy_n(received.source_token_index, int64_t{received.rows} * 3, source_token_index.data<int32_t>());
  return {rows, offsets, source_token_index};
}

inline Shapes shape_dispatch_receive(const Shape& like, int64_t, int) { return {{-1, like[1]}, {-1}, {-1, 3}}; }
inline Types type_dispatch_receive(paddle::DataType like) {
  return {like, paddle::DataType::INT32, paddle::DataType::INT32};
}

inline std::vector<paddle::Tensor> run_ep_combine_send(const paddle::Tensor& rows, int64_t handle) {
  ExpertGroup& group = going(handle, 0);
  const auto [count, hidden] = extent(rows, "ep_combine_send: rows");
  const int element = element_of(rows);
  require(hidden == group.shape().hidden, "ep_combine_send: rows have another width than the group");
  require(count == group.received_rows(), "ep_combine_send: rows must be as many as were received");
  if (!ep_combine_send(group, rows.data(), count, element)) throw GroupInterrupted();
  paddle::Tensor sent = int_output({1});
  *sent.data<int32_t>() = count;
  return {sent};
}

inline Shapes shape_combine_send(const Shape&, int64_t) { return {{1}}; }
inline Types type_combine_send(paddle::DataType) { return {paddle::DataType::INT32}; }

inline std::vector<paddle::Tensor> run_ep_combine_receive(const paddle::Tensor& topk_weights,
                                                          const paddle::Tensor& like, int64_t handle) {
  ExpertGroup& group = going(handle, 0);
  const auto [tokens, k] = extent(topk_weights, "ep_combine_receive: topk_weights");
  const int64_t hidden = group.shape().hidden;
  require(k == group.shape().k && k <= kMaxTopk && tokens == group.sent_tokens(),
          "ep_combine_receive: topk_weights must be [tokens, k] of what was sent");
  const float* const factors = floats(topk_weights, int64_t{tokens} * k, "ep_combine_receive: topk_weights");
  const int element = element_of(like);
  paddle::Tensor out = float_output({tokens, hidden});
  if (!ep_combine_receive(group, factors, tokens, element, out.data<float>())) throw GroupInterrupted();
  return {out};
}

inline Shapes shape_combine_receive(const Shape& topk_weights, const Shape& like, int64_t) {
  return {{topk_weights[0], like[1]}};
}
inline Types type_combine_receive(paddle::DataType topk_weights, paddle::DataType) { return {topk_weights}; }

}  // namespace fd::binding

PD_BUILD_OP(fd_ep_dispatch_send)
    .Inputs({"X", "TopkIds"})
    .Outputs({"DispatchTargets"})
    .Attrs({"group: int64_t", "layer: int"})
    .SetKernelFn(FD_KERNEL(run_ep_dispatch_send))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_dispatch_send))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_dispatch_send));

PD_BUILD_OP(fd_ep_dispatch_receive)
    .Inputs({"Like"})
    .Outputs({"Rows", "Offsets", "SourceTokenIndex"})
    .Attrs({"group: int64_t", "layer: int"})
    .SetKernelFn(FD_KERNEL(run_ep_dispatch_receive))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_dispatch_receive))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_dispatch_receive));

PD_BUILD_OP(fd_ep_combine_send)
    .Inputs({"Rows"})
    .Outputs({"Sent"})
    .Attrs({"group: int64_t"})
    .SetKernelFn(FD_KERNEL(run_ep_combine_send))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_combine_send))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_combine_send));

PD_BUILD_OP(fd_ep_combine_receive)
    .Inputs({"TopkWeights", "Like"})
    .Outputs({"Out"})
    .Attrs({"group: int64_t"})
    .SetKernelFn(FD_KERNEL(run_ep_combine_receive))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_combine_receive))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_combine_receive));
