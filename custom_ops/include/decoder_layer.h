// The two halves of a layer, each as one call: nothing but C++ between the operations, and one wake-up of the
// threads for all of them.
#pragma once

#include "expert_group.h"
#include "moe_grouped_gemm.h"
#include "paged_attention.h"

namespace fd {

// stream += output(attention(qkv(norm(stream))))
struct AttentionBlock {
  Step step;
  float* stream;  // [num_tokens, hidden]
  int hidden;
  const float* norm;
  float epsilon;
  PackedMatrix qkv;
  PackedMatrix output;
  const float* rotation;
  int num_heads;
  Cache cache;
};

void attention_block(const AttentionBlock& args);

// stream += mlp(norm(stream))
struct MlpBlock {
  float* stream;  // [num_tokens, hidden]
  int num_tokens;
  int hidden;
  const float* norm;
  float epsilon;
  Mlp mlp;
};

void mlp_block(const MlpBlock& args);

// stream += sum over a token's picks of weight * expert(norm(stream)), + shared(norm(stream))
struct MoeBlock {
  float* stream;  // [num_tokens, hidden]
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
  int32_t* picks;     // [num_tokens, k], out
  float* weights;     // [num_tokens, k], out
};

void moe_block(const MoeBlock& args);

// The same with the experts of a group: those of this seat compute for all tokens of the group, and the tokens of this
// seat, of which there may be none, are computed wherever their experts are. Bits as those of moe_block.
//
// What goes wrong stands in the group's status; the stream is not to be used then. `layer` counts those with experts.
void ep_moe_block(const MoeBlock& args, ExpertGroup& group, int layer);

// Logits of rows index[i] of the stream, normalised: [rows, lm_head.outputs].
struct Logits {
  const float* stream;
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
