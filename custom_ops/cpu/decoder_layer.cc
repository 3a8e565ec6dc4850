#include "decoder_layer.h"

#include <algorithm>

#include "moe_topk_select.h"
#include "moe_unpermute.h"
#include "rms_norm.h"
#include "rope_and_cache.h"

namespace fd {
namespace {

// One matrix product with row-major output.
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
  const RmsNorm norm{args.hidden_states, args.norm, args.epsilon, tokens, hidden, normed, &x, nullptr};
  const Product to_qkv(workspace, args.qkv, x, Output::kStore, qkv);
  const RopeAndCache rope{args.step, qkv, args.rotary_cos_sin, args.num_heads, args.cache};
  const PagedAttention attention(workspace, {args.step, qkv, args.num_heads, args.cache, attended});
  const Product to_hidden_states(workspace, args.output, attended, Output::kAdd, args.hidden_states);
  run_team([&](Team& team) {
    rms_norm(team, norm);
    to_qkv.run(team);
    rope_and_cache(team, rope);
    attention.run(team);
    to_hidden_states.run(team);
  });
}

void mlp_block(const MlpBlock& args) {
  Workspace& workspace = Workspace::fresh();
  const Activations x = take_activations(workspace, args.num_tokens, args.hidden);
  float* const normed = workspace.take<float>(static_cast<int64_t>(args.num_tokens) * args.hidden);
  const RmsNorm norm{args.hidden_states, args.norm, args.epsilon, args.num_tokens, args.hidden, normed, &x, nullptr};
  const DenseMlp dense{args.mlp, x, Output::kAdd, args.hidden_states};
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
  const RmsNorm norm{args.hidden_states, args.norm, args.epsilon, tokens, hidden, normed, &x, nullptr};
  const Product to_logits(workspace, args.router, x, Output::kStore, router_logits);
  const MoeTopkSelect select{router_logits, args.bias,     tokens,        num_experts,
                             args.k,        args.norm_min, args.topk_ids, args.topk_weights};
  DenseMlp shared{};
  if (args.shared != nullptr) shared = {*args.shared, x, Output::kStore, shared_rows};
  MoeGroupedGemm experts(workspace, &args.experts, &order, args.shared == nullptr ? nullptr : &shared);
  const MoeUnpermute unpermute{order, expert_rows, args.topk_weights, shared_rows, hidden, args.hidden_states};
  run_team([&](Team& team) {
    rms_norm(team, norm);
    to_logits.run(team);
    moe_topk_select(team, select);
    moe_order(team, args.topk_ids, order);
    experts.run(team, normed, expert_rows);
    moe_unpermute(team, unpermute);
  });
}

namespace {

// One collective of ep_moe_block, with at most max_tokens tokens of each rank.
void ep_moe_round(const MoeBlock& args, ExpertGroup& group, int layer, bool is_last) {
  constexpr int kElement = sizeof(float);
  Workspace& workspace = Workspace::fresh();
  const int tokens = args.num_tokens, hidden = args.hidden, k = args.k;
  group.set_phase(Phase::kCompute, layer);
  float* const shared_rows =
      args.shared == nullptr ? nullptr : workspace.take<float>(static_cast<int64_t>(tokens) * hidden);
  const Activations x = take_activations(workspace, tokens, hidden);
  if (tokens > 0) {
    // The normalised rows are written directly to the memory that the other ranks read.
    auto* const normed = static_cast<float*>(group.token_rows(tokens, kElement));
    if (normed == nullptr) return;
    const int num_experts = args.router.outputs;
    float* const router_logits = workspace.take<float>(static_cast<int64_t>(tokens) * num_experts);
    const RmsNorm norm{args.hidden_states, args.norm, args.epsilon, tokens, hidden, normed, &x, nullptr};
    const Product to_logits(workspace, args.router, x, Output::kStore, router_logits);
    const MoeTopkSelect select{router_logits, args.bias,     tokens,           num_experts, k,
                               args.norm_min, args.topk_ids, args.topk_weights};
    run_team([&](Team& team) {
      rms_norm(team, norm);
      to_logits.run(team);
      moe_topk_select(team, select);
    });
    group.set_phase(Phase::kHalfSent, layer);
    group.route(layer, args.topk_ids, tokens);
  }
  group.publish_tokens(tokens, kElement);
  group.set_phase(Phase::kSent, layer);
  if (tokens > 0 && args.shared != nullptr) {
    // Overlaps with the dispatch of the other ranks.
    const DenseMlp shared{*args.shared, x, Output::kStore, shared_rows};
    MoeGroupedGemm mlp(workspace, nullptr, nullptr, &shared);
    run_team([&](Team& team) { mlp.run(team, nullptr, nullptr); });
  }
  if (!group.await_tokens()) return;
  group.set_phase(Phase::kExperts, layer);
  Received received;
  if (!group.receive(workspace, layer, kElement, received)) return;
  if (received.rows > 0) {
    auto* const results = static_cast<float*>(group.result_rows(received.rows, kElement));
    if (results == nullptr) return;
    const MoeOrder order{received.rows, 1, static_cast<int>(group.shape().num_experts), received.offsets, nullptr,
                         nullptr};
    MoeGroupedGemm experts(workspace, &args.experts, &order, nullptr);
    const auto source = [&](int64_t row) { return static_cast<const float*>(received.sources[row]); };
    run_team([&](Team& team) { experts.run(team, source, results); });
  }
  group.set_phase(Phase::kHalfReturned, layer);
  group.publish_results();
  group.set_phase(Phase::kReturned, layer);
  // A rank without tokens need not wait: it has nothing to sum up, and the others read none of its tokens. After the
  // last collective it waits too, because a rank that has finished the step may change the members of the group.
  if (group.is_dummy_step() && !is_last) return;
  if (!group.await_results()) return;
  group.set_phase(Phase::kCombine, layer);
  const Kernels& isa = kernels();
  run_team([&](Team& team) {
    team.for_each(tokens, [&](int64_t token) {
      const float* rows[kMaxTopk];
      for (int j = 0; j < k; ++j) {
        rows[j] = static_cast<const float*>(group.result(static_cast<int>(token), j, kElement));
      }
      isa.combine(args.hidden_states + token * hidden, rows, args.topk_weights + token * k, k,
                  shared_rows == nullptr ? nullptr : shared_rows + token * hidden, hidden);
    });
  });
  group.results_are_whole();
}

}  // namespace

void ep_moe_block(const MoeBlock& args, ExpertGroup& group, int layer) {
  const int most = static_cast<int>(group.shape().max_tokens);
  MoeBlock round = args;
  for (int i = 0; i < group.rounds() && group.status() == ExpertGroup::kGoing; ++i) {
    const int64_t first = std::min(int64_t{i} * most, int64_t{args.num_tokens});
    round.num_tokens = std::min(most, args.num_tokens - static_cast<int>(first));
    round.hidden_states = args.hidden_states + first * args.hidden;
    round.topk_ids = args.topk_ids + first * args.k;
    round.topk_weights = args.topk_weights + first * args.k;
    ep_moe_round(round, group, layer, layer + 1 == group.shape().num_layers && i + 1 == group.rounds());
  }
}

void logits(const Logits& args) {
  Workspace& workspace = Workspace::fresh();
  const Activations x = take_activations(workspace, args.rows, args.hidden);
  float* const normed = workspace.take<float>(static_cast<int64_t>(args.rows) * args.hidden);
  const RmsNorm norm{args.hidden_states, args.norm, args.epsilon, args.rows, args.hidden, normed, &x, args.index};
  const Product to_logits(workspace, args.lm_head, x, Output::kStore, args.out);
  run_team([&](Team& team) {
    rms_norm(team, norm);
    to_logits.run(team);
  });
}

}  // namespace fd
