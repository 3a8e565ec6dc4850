#include "decoder_layer.h"

#include "moe_topk_select.h"
#include "moe_unpermute.h"
#include "rms_norm.h"
#include "rope_and_cache.h"

namespace fd {
namespace {

// One product of row-major results.
class Product {
 public:
  Product(Workspace& workspace, const PackedMatrix& weights, const Activations& x, Output output, float* out)
      : group_(workspace, 1, weights.inputs, x.rows) {
    group_.add({weights, 0, x, output, out, weights.outputs, {}});
  }
  void run(Team& team) const { group_.run(team); }

 private:
  LinearGroup group_;
};

}  // namespace

void attention_block(const AttentionBlock& args) {
  Workspace& workspace = Workspace::fresh();
  const int tokens = args.step.num_tokens, hidden = args.hidden;
  const Activations x = take_activations(workspace, tokens, hidden);
  float* const qkv = workspace.take<float>(static_cast<int64_t>(tokens) * args.qkv.outputs);
  const Activations attended = take_activations(workspace, tokens, args.num_heads * args.cache.head_dim);
  float* const normed = workspace.take<float>(static_cast<int64_t>(tokens) * hidden);
  const RmsNorm norm{args.stream, args.norm, args.epsilon, tokens, hidden, normed, &x, nullptr};
  const Product to_qkv(workspace, args.qkv, x, Output::kStore, qkv);
  const RopeAndCache rope{args.step, qkv, args.rotation, args.num_heads, args.cache};
  const PagedAttention attention(workspace, {args.step, qkv, args.num_heads, args.cache, attended});
  const Product to_stream(workspace, args.output, attended, Output::kAdd, args.stream);
  run_team([&](Team& team) {
    rms_norm(team, norm);
    to_qkv.run(team);
    rope_and_cache(team, rope);
    attention.run(team);
    to_stream.run(team);
  });
}

void mlp_block(const MlpBlock& args) {
  Workspace& workspace = Workspace::fresh();
  const Activations x = take_activations(workspace, args.num_tokens, args.hidden);
  float* const normed = workspace.take<float>(static_cast<int64_t>(args.num_tokens) * args.hidden);
  const RmsNorm norm{args.stream, args.norm, args.epsilon, args.num_tokens, args.hidden, normed, &x, nullptr};
  const DenseMlp dense{args.mlp, x, Output::kAdd, args.stream};
  MoeGroupedGemm mlp(workspace, nullptr, nullptr, &dense);
  run_team([&](Team& team) {
    rms_norm(team, norm);
    mlp.run(team, nullptr, nullptr);
  });
}

void moe_block(const MoeBlock& args) {
  Workspace& workspace = Workspace::fresh();
  const int tokens = args.num_tokens, hidden = args.hidden, num_experts = args.router.outputs;
  const Activations x = take_activations(workspace, tokens, hidden);
  float* const normed = workspace.take<float>(static_cast<int64_t>(tokens) * hidden);
  float* const router_logits = workspace.take<float>(static_cast<int64_t>(tokens) * num_experts);
  float* const expert_rows = workspace.take<float>(static_cast<int64_t>(tokens) * args.k * hidden);
  float* const shared_rows =
      args.shared == nullptr ? nullptr : workspace.take<float>(static_cast<int64_t>(tokens) * hidden);
  const MoeOrder order = take_order(workspace, tokens, args.k, num_experts);
  const RmsNorm norm{args.stream, args.norm, args.epsilon, tokens, hidden, normed, &x, nullptr};
  const Product to_logits(workspace, args.router, x, Output::kStore, router_logits);
  const MoeTopkSelect select{router_logits, args.bias,  tokens,     num_experts, args.k,
                             args.norm_min, args.picks, args.weights};
  DenseMlp shared{};
  if (args.shared != nullptr) shared = {*args.shared, x, Output::kStore, shared_rows};
  MoeGroupedGemm experts(workspace, &args.experts, &order, args.shared == nullptr ? nullptr : &shared);
  const MoeUnpermute unpermute{order, expert_rows, args.weights, shared_rows, hidden, args.stream};
  run_team([&](Team& team) {
    rms_norm(team, norm);
    to_logits.run(team);
    moe_topk_select(team, select);
    moe_order(team, args.picks, order);
    experts.run(team, normed, expert_rows);
    moe_unpermute(team, unpermute);
  });
}

void logits(const Logits& args) {
  Workspace& workspace = Workspace::fresh();
  const Activations x = take_activations(workspace, args.rows, args.hidden);
  float* const normed = workspace.take<float>(static_cast<int64_t>(args.rows) * args.hidden);
  const RmsNorm norm{args.stream, args.norm, args.epsilon, args.rows, args.hidden, normed, &x, args.index};
  const Product to_logits(workspace, args.lm_head, x, Output::kStore, args.out);
  run_team([&](Team& team) {
    rms_norm(team, norm);
    to_logits.run(team);
  });
}

}  // namespace fd
