#include "rope_and_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fd {
namespace {

// Rounds to nearest, ties to even.
uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Writes element `column` of 32 in a row of a panel.
void put(CacheType type, uint8_t* row, int column, float value) {
  if (type == CacheType::kFloat32) {
    std::memcpy(row + column * 4, &value, 4);
  } else {
    const uint16_t rounded = to_bfloat16(value);
    std::memcpy(row + (2 * (column % 16) + column / 16) * 2, &rounded, 2);
  }
}

void rotate(float* head, const float* cos_sin, int head_dim) {
  for (int j = 0; j < head_dim; j += 2) {
    const float a = head[j], b = head[j + 1], cosine = cos_sin[j], sine = cos_sin[j + 1];
    head[j] = a * cosine - b * sine;
    head[j + 1] = b * cosine + a * sine;
  }
}

int sequence_of(const Step& step, int token) {
  const int32_t* const begin = step.first_token;
  return static_cast<int>(std::upper_bound(begin, begin + step.num_sequences, token) - begin) - 1;
}

}  // namespace

void rotary_embedding(Team& team, const Step& step, float theta, int head_dim, float* out) {
  team.for_each(step.num_tokens, [&](int64_t token) {
    const int sequence = sequence_of(step, static_cast<int>(token));
    const float position =
        static_cast<float>(step.start[sequence] + static_cast<int>(token) - step.first_token[sequence]);
    float* row = out + token * head_dim;
    for (int j = 0; j < head_dim; j += 2) {
      const float frequency = 1.0f / std::pow(theta, static_cast<float>(j) / static_cast<float>(head_dim));
      const double angle = position * frequency;
      row[j] = static_cast<float>(std::cos(angle));
      row[j + 1] = static_cast<float>(std::sin(angle));
    }
  });
}

void rope_and_cache(Team& team, const RopeAndCache& args) {
  const Step& step = args.step;
  const Cache& cache = args.cache;
  const int head_dim = cache.head_dim;
  const int64_t width = static_cast<int64_t>(args.num_heads + 2 * cache.num_kv_heads) * head_dim;
  const int64_t row_bytes = cache.element() * kPanel;
  team.for_each(step.num_tokens, [&](int64_t token) {
    const int sequence = sequence_of(step, static_cast<int>(token));
    const int position = step.start[sequence] + static_cast<int>(token) - step.first_token[sequence];
    const int64_t block = step.blocks(sequence)[position / cache.block_size];
    const int slot = position % cache.block_size;
    const float* cos_sin = args.rotary_cos_sin + token * head_dim;
    float* row = args.qkv + token * width;
    for (int head = 0; head < args.num_heads + cache.num_kv_heads; ++head) {
      rotate(row + head * head_dim, cos_sin, head_dim);
    }
    const float* key = row + args.num_heads * head_dim;
    const float* value = key + cache.num_kv_heads * head_dim;
    for (int head = 0; head < cache.num_kv_heads; ++head, key += head_dim, value += head_dim) {
      uint8_t* keys = cache.key_panel(block, head, slot / kPanel);
      for (int i = 0; i < head_dim; ++i) put(cache.type, keys + i * row_bytes, slot % kPanel, key[i]);
      for (int i = 0; i < head_dim; ++i) {
        put(cache.type, cache.value_panel(block, head, i / kPanel) + slot * row_bytes, i % kPanel, value[i]);
      }
    }
  });
}

}  // namespace fd
