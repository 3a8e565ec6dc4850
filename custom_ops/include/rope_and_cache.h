// Rotary position embedding (Su et al., 2021) of interleaved pairs, and the write into the paged cache.
#pragma once

#include "kernels/kernels.h"
#include "step.h"
#include "team.h"

namespace fd {

// out [num_tokens, head_dim / 2, 2] = cos and sin of position * theta ** (-2j / head_dim), computed in float32 like the
// reference network. All layers of a step share it.
void rotary_embedding(Team& team, const Step& step, float theta, int head_dim, float* out);

struct RopeAndCache {
  Step step;
  float* qkv;  // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; queries are rotated in place
  const float* rotary_cos_sin;
  int num_heads;
  Cache cache;
};

void rope_and_cache(Team& team, const RopeAndCache& args);

}  // namespace fd
