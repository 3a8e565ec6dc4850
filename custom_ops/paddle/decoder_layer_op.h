#pragma once

#include "decoder_layer.h"
#include "embedding.h"
#include "ep_op.h"
#include "moe_op.h"
#include "tensors.h"

namespace fd::binding {

inline std::vector<paddle::Tensor> run_embedding(const paddle::Tensor& table, const paddle::Tensor& buffer) {
  const Step plan = step(buffer);
  const auto [vocabulary, width] = extent(table, "embedding: table");
  const bool wide = table.dtype() == paddle::DataType::FLOAT32;
  require(wide || table.dtype() == paddle::DataType::BFLOAT16, "an embedding must be float32 or bfloat16");
  paddle::Tensor out = float_output({plan.num_tokens, width});
  embedding({plan, table.data(), wide ? Format::kFloat32 : Format::kBfloat16, vocabulary, width, out.data<float>()});
  return {out};
}

inline Shapes shape_embedding(const Shape& table, const Shape&) { return {{-1, table[1]}}; }
inline Types type_embedding(paddle::DataType, paddle::DataType) { return {paddle::DataType::FLOAT32}; }

inline void run_attention_block(paddle::Tensor& hidden_states, const paddle::Tensor& buffer, const paddle::Tensor& norm,
                                const paddle::Tensor& qkv, const paddle::Tensor& output,
                                const paddle::Tensor& rotary_cos_sin, const paddle::Tensor& keys,
                                const paddle::Tensor& values, float epsilon) {
  AttentionBlock block;
  block.step = step(buffer);
  block.hidden = extent(hidden_states, "attention_block: hidden_states").width;
  block.hidden_states = mutable_floats(hidden_states, static_cast<int64_t>(block.step.num_tokens) * block.hidden,
                                       "attention_block: hidden_states");
  block.norm = floats(norm, block.hidden, "attention_block: norm");
  block.epsilon = epsilon;
  block.qkv = matrix(qkv);
  block.output = matrix(output);
  block.cache = cache(keys, values, block.step);
  block.rotary_cos_sin = floats(rotary_cos_sin, static_cast<int64_t>(block.step.num_tokens) * block.cache.head_dim,
                                "attention_block: rotary_cos_sin");
  block.num_heads = query_heads(block.qkv.outputs, block.cache);
  require(block.qkv.inputs == block.hidden && block.output.outputs == block.hidden &&
              block.output.inputs == block.num_heads * block.cache.head_dim,
          "attention_block: the matrices do not fit hidden_states and the cache");
  attention_block(block);
}

inline Shapes shape_attention_block(const Shape& hidden_states, const Shape&, const Shape&, const Shape&, const Shape&,
                                    const Shape&, const Shape&, const Shape&, float) {
  return {hidden_states};
}
inline Types type_attention_block(paddle::DataType hidden_states, paddle::DataType, paddle::DataType, paddle::DataType,
                                  paddle::DataType, paddle::DataType, paddle::DataType, paddle::DataType) {
  return {hidden_states};
}

inline void run_mlp_block(paddle::Tensor& hidden_states, const paddle::Tensor& norm, const paddle::Tensor& gate_up,
                          const paddle::Tensor& down, float epsilon) {
  const auto [tokens, hidden] = extent(hidden_states, "mlp_block: hidden_states");
  const MlpBlock block{mutable_floats(hidden_states, hidden_states.numel(), "mlp_block: hidden_states"),
                       tokens,
                       hidden,
                       floats(norm, hidden, "mlp_block: norm"),
                       epsilon,
                       mlp(gate_up, down)};
  require(block.mlp.gate_up.inputs == hidden, "mlp_block: the matrices do not fit hidden_states");
  mlp_block(block);
}

inline Shapes shape_mlp_block(const Shape& hidden_states, const Shape&, const Shape&, const Shape&, float) {
  return {hidden_states};
}
inline Types type_mlp_block(paddle::DataType hidden_states, paddle::DataType, paddle::DataType, paddle::DataType) {
  return {hidden_states};
}

// A block and the data that it points to.
struct MoeCall {
  MoeBlock block;
  Mlp shared;
  paddle::Tensor topk_ids, topk_weights;
};

inline void fill(MoeCall& call, paddle::Tensor& hidden_states, const paddle::Tensor& norm, const paddle::Tensor& router,
                 const paddle::Tensor& bias, const paddle::Tensor& gate_up, const paddle::Tensor& down,
                 const paddle::optional<paddle::Tensor>& shared_gate_up,
                 const paddle::optional<paddle::Tensor>& shared_down, float epsilon, int k, float norm_min) {
  MoeBlock& block = call.block;
  const auto [tokens, hidden] = extent(hidden_states, "moe_block: hidden_states");
  block.num_tokens = tokens;
  block.hidden = hidden;
  block.hidden_states = mutable_floats(hidden_states, hidden_states.numel(), "moe_block: hidden_states");
  block.norm = floats(norm, block.hidden, "moe_block: norm");
  block.epsilon = epsilon;
  block.router = matrix(router);
  block.bias = floats(bias, block.router.outputs, "moe_block: bias");
  block.k = k;
  block.norm_min = norm_min;
  block.experts = mlp(gate_up, down);
  require(static_cast<bool>(shared_gate_up) == static_cast<bool>(shared_down),
          "moe_block: shared experts must have both of their matrices");
  if (shared_gate_up) call.shared = mlp(*shared_gate_up, *shared_down);
  block.shared = shared_gate_up ? &call.shared : nullptr;
  require(block.router.inputs == block.hidden && block.experts.gate_up.inputs == block.hidden &&
              block.experts.down.count == block.router.outputs &&
              (!shared_gate_up || call.shared.gate_up.inputs == block.hidden),
          "moe_block: the matrices do not fit each other");
  require(1 <= k && k <= std::min(block.router.outputs, kMaxTopk), "moe_block: k must be 1..64");
  call.topk_ids = int_output({block.num_tokens, k});
  call.topk_weights = float_output({block.num_tokens, k});
  block.topk_ids = call.topk_ids.data<int32_t>();
  block.topk_weights = call.topk_weights.data<float>();
}

inline std::vector<paddle::Tensor> run_moe_block(paddle::Tensor& hidden_states, const paddle::Tensor& norm,
                                                 const paddle::Tensor& router, const paddle::Tensor& bias,
                                                 const paddle::Tensor& gate_up, const paddle::Tensor& down,
                                                 const paddle::optional<paddle::Tensor>& shared_gate_up,
                                                 const paddle::optional<paddle::Tensor>& shared_down, float epsilon,
                                                 int k, float norm_min) {
  MoeCall call;
  fill(call, hidden_states, norm, router, bias, gate_up, down, shared_gate_up, shared_down, epsilon, k, norm_min);
  moe_block(call.block);
  return {call.topk_ids, call.topk_weights};
}

inline Shapes shape_moe_block(const Shape& hidden_states, const Shape&, const Shape&, const Shape&, const Shape&,
                              const Shape&, const paddle::optional<Shape>&, const paddle::optional<Shape>&, float,
                              int k, float) {
  return {hidden_states, {hidden_states[0], k}, {hidden_states[0], k}};
}
inline Types type_moe_block(paddle::DataType hidden_states, paddle::DataType, paddle::DataType, paddle::DataType,
                            paddle::DataType, paddle::DataType, const paddle::optional<paddle::DataType>&,
                            const paddle::optional<paddle::DataType>&) {
  return {hidden_states, paddle::DataType::INT32, hidden_states};
}

inline std::vector<paddle::Tensor> run_ep_moe_block(paddle::Tensor& hidden_states, const paddle::Tensor& norm,
                                                    const paddle::Tensor& router, const paddle::Tensor& bias,
                                                    const paddle::Tensor& gate_up, const paddle::Tensor& down,
                                                    const paddle::optional<paddle::Tensor>& shared_gate_up,
                                                    const paddle::optional<paddle::Tensor>& shared_down, float epsilon,
                                                    int k, float norm_min, int64_t handle, int layer) {
  ExpertGroup& group = expert_group(handle, layer);
  MoeCall call;
  fill(call, hidden_states, norm, router, bias, gate_up, down, shared_gate_up, shared_down, epsilon, k, norm_min);
  const GroupShape& shape = group.shape();
  require(shape.hidden == call.block.hidden && shape.k == k && shape.num_experts == call.block.router.outputs &&
              call.block.num_tokens <= group.rounds() * shape.max_tokens,
          "ep_moe_block: the group was made for another network, or the step was begun with fewer tokens");
  ep_moe_block(call.block, group, layer);
  return {call.topk_ids, call.topk_weights};
}

inline Shapes shape_ep_moe_block(const Shape& hidden_states, const Shape&, const Shape&, const Shape&, const Shape&,
                                 const Shape&, const paddle::optional<Shape>&, const paddle::optional<Shape>&, float,
                                 int k, float, int64_t, int) {
  return {hidden_states, {hidden_states[0], k}, {hidden_states[0], k}};
}

inline std::vector<paddle::Tensor> run_logits(const paddle::Tensor& hidden_states, const paddle::Tensor& buffer,
                                              const paddle::Tensor& norm, const paddle::Tensor& lm_head,
                                              float epsilon) {
  const Step plan = step(buffer);
  const PackedMatrix head = matrix(lm_head);
  const auto [rows, hidden] = extent(hidden_states, "logits: hidden_states");
  require(head.inputs == hidden, "logits: lm_head does not fit hidden_states");
  for (int i = 0; i < plan.num_logits; ++i) {
    require(0 <= plan.logit_tokens[i] && plan.logit_tokens[i] < rows, "logits: a row outside of hidden_states");
  }
  paddle::Tensor out = float_output({plan.num_logits, head.outputs});
  logits({floats(hidden_states, hidden_states.numel(), "logits: hidden_states"), hidden, plan.logit_tokens,
          plan.num_logits, floats(norm, hidden, "logits: norm"), epsilon, head, out.data<float>()});
  return {out};
}

inline Shapes shape_logits(const Shape&, const Shape&, const Shape&, const Shape&, float) { return {{-1, -1}}; }
inline Types type_logits(paddle::DataType hidden_states, paddle::DataType, paddle::DataType, paddle::DataType) {
  return {hidden_states};
}

}  // namespace fd::binding

PD_BUILD_OP(fd_embedding)
    .Inputs({"Table", "Step"})
    .Outputs({"Out"})
    .SetKernelFn(FD_KERNEL(run_embedding))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_embedding))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_embedding));

PD_BUILD_OP(fd_attention_block)
    .Inputs({"HiddenStates", "Step", "Norm", "Qkv", "Output", "RotaryCosSin", "Keys", "Values"})
    .Outputs({"Out"})
    .Attrs({"epsilon: float"})
    .SetInplaceMap({{"HiddenStates", "Out"}})
    .SetKernelFn(FD_KERNEL(run_attention_block))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_attention_block))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_attention_block));

PD_BUILD_OP(fd_mlp_block)
    .Inputs({"HiddenStates", "Norm", "GateUp", "Down"})
    .Outputs({"Out"})
    .Attrs({"epsilon: float"})
    .SetInplaceMap({{"HiddenStates", "Out"}})
    .SetKernelFn(FD_KERNEL(run_mlp_block))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_mlp_block))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_mlp_block));

PD_BUILD_OP(fd_moe_block)
    .Inputs({"HiddenStates", "Norm", "Router", "Bias", "GateUp", "Down", paddle::Optional("SharedGateUp"),
             paddle::Optional("SharedDown")})
    .Outputs({"Out", "TopkIds", "TopkWeights"})
    .Attrs({"epsilon: float", "k: int", "norm_min: float"})
    .SetInplaceMap({{"HiddenStates", "Out"}})
    .SetKernelFn(FD_KERNEL(run_moe_block))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_moe_block))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_moe_block));

PD_BUILD_OP(fd_ep_moe_block)
    .Inputs({"HiddenStates", "Norm", "Router", "Bias", "GateUp", "Down", paddle::Optional("SharedGateUp"),
             paddle::Optional("SharedDown")})
    .Outputs({"Out", "TopkIds", "TopkWeights"})
    .Attrs({"epsilon: float", "k: int", "norm_min: float", "group: int64_t", "layer: int"})
    .SetInplaceMap({{"HiddenStates", "Out"}})
    .SetKernelFn(FD_KERNEL(run_ep_moe_block))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_ep_moe_block))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_moe_block));

PD_BUILD_OP(fd_logits)
    .Inputs({"HiddenStates", "Step", "Norm", "LmHead"})
    .Outputs({"Out"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(FD_KERNEL(run_logits))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_logits))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_logits));
