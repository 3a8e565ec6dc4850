// The two halves of a decoder layer. Each is one call, so its operations run without Python in between and the threads
// wake up once.
#pragma once

#include "expert_group.h"
#include "moe_grouped_gemm.h"
#include "paged_attention.h"

namespace fd {

// hidden_states += output(attention(qkv(norm(hidden_states))))
struct AttentionBlock {
  Step step;
  float* hidden_states;  // [num_tokens, hidden]
  int hidden;
  const float* norm;
  float epsilon;
  PackedMatrix qkv;
  PackedMatrix output;
  const float* rotary_cos_sin;
  int num_heads;
  Cache cache;
};

void attention_block(const AttentionBlock& args);

// hidden_states += mlp(norm(hidden_states))
struct MlpBlock {
  float* hidden_states;  // [num_tokens, hidden]
  int num_tokens;
  int hidden;
  const float* norm;
  float epsilon;
  Mlp mlp;
};

void mlp_block(const MlpBlock& args);

// hidden_states += (sum over the top k experts of a token of weight * expert(norm(hidden_states)))
//                  + shared(norm(hidden_states))
struct MoeBlock {
  float* hidden_states;  // [num_tokens, hidden]
  int num_tokens;
  int hidden;
  const float* norm;
  float epsilon;
  PackedMatrix router;
  const float* bias;  // [num_experts], see MoeTopkSelect
  int k;
  float norm_min;
  Mlp experts;
  const Mlp* shared;  // may be null
  int32_t* topk_ids;  // [num_tokens, k], out
  float* topk_weights;  // [num_tokens, k], out
};

void moe_block(const MoeBlock& args);

// moe_block with the experts spread over the ranks of a group. This rank computes its experts for all tokens of the
// group; its own tokens (possibly none) are computed on the ranks that hold their experts. Bit-identical to moe_block.
//
// Errors are reported by the group's status; hidden_states are then undefined. `layer` counts MoE layers only.
void ep_moe_block(const MoeBlock& args, ExpertGroup& group, int layer);

// lm_head(norm(hidden_states[index[i]])) for each i: [rows, lm_head.outputs].
struct Logits {
  const float* hidden_states;
  int hidden;
  const int32_t* index;
  int rows;
  const float* norm;
  float epsilon;
  PackedMatrix lm_head;
  float* out;
};

void logits(const Logits& args);

}  // namespace fd
