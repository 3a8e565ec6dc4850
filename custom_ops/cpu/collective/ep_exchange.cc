#include "ep_exchange.h"

#include <algorithm>
#include <cstring>

#include "kernels/kernels.h"
#include "moe_unpermute.h"

namespace fd {
namespace {

// Rows per item.
constexpr int kRowsPerItem = 16;

template <class F>
void for_each_row(int64_t rows, F&& f) {
  run_team([&](Team& team) {
    team.for_each((rows + kRowsPerItem - 1) / kRowsPerItem, [&](int64_t item) {
      const int64_t last = std::min(rows, (item + 1) * kRowsPerItem);
      for (int64_t row = item * kRowsPerItem; row < last; ++row) f(row);
    });
  });
}

}  // namespace

bool ep_dispatch_send(ExpertGroup& group, int layer, const void* x, const int32_t* topk_ids, int tokens, int element) {
  auto* const rows = static_cast<uint8_t*>(group.token_rows(tokens, element));
  if (rows == nullptr) return false;
  const auto* const source = static_cast<const uint8_t*>(x);
  const int64_t width = group.shape().hidden * element;
  for_each_row(tokens, [&](int64_t token) { std::memcpy(rows + token * width, source + token * width, width); });
  group.set_phase(Phase::kHalfSent, layer);
  group.route(layer, topk_ids, tokens);
  group.publish_tokens(tokens, element);
  group.set_phase(Phase::kSent, layer);
  return true;
}

bool ep_dispatch_receive(ExpertGroup& group, int layer, int element, Workspace& workspace, Received& received) {
  if (!group.await_tokens()) return false;
  group.set_phase(Phase::kExperts, layer);
  return group.receive(workspace, layer, element, received);
}

void ep_gather(const ExpertGroup& group, const Received& received, int element, void* rows) {
  const int64_t width = group.shape().hidden * element;
  auto* const out = static_cast<uint8_t*>(rows);
  for_each_row(received.rows, [&](int64_t row) { std::memcpy(out + row * width, received.sources[row], width); });
}

bool ep_combine_send(ExpertGroup& group, const void* rows, int count, int element) {
  auto* const results = static_cast<uint8_t*>(group.result_rows(count, element));
  if (results == nullptr) return false;
  const auto* const source = static_cast<const uint8_t*>(rows);
  const int64_t width = group.shape().hidden * element;
  // The caller may have computed the results in place.
  if (source != results) {
    for_each_row(count, [&](int64_t row) { std::memcpy(results + row * width, source + row * width, width); });
  }
  group.set_phase(Phase::kHalfReturned);
  group.publish_results();
  group.set_phase(Phase::kReturned);
  return true;
}

bool ep_combine_receive(ExpertGroup& group, const float* topk_weights, int tokens, int element, float* out) {
  if (!group.await_results()) return false;
  group.set_phase(Phase::kCombine);
  const int k = static_cast<int>(group.shape().k), hidden = static_cast<int>(group.shape().hidden);
  const Kernels& isa = kernels();
  for_each_row(tokens, [&](int64_t token) {
    const void* rows[kMaxTopk];
    float used[kMaxTopk];
    int count = 0;
    for (int j = 0; j < k; ++j) {
      rows[count] = group.result(static_cast<int>(token), j, element);
      used[count] = topk_weights[token * k + j];
      if (rows[count] != nullptr) ++count;
    }
    float* const sum = out + token * hidden;
    std::fill_n(sum, hidden, 0.0f);
    if (element == 4) {
      isa.combine(sum, reinterpret_cast<const float* const*>(rows), used, count, nullptr, hidden);
    } else {
      isa.combine_bfloat16(sum, reinterpret_cast<const uint16_t* const*>(rows), used, count, hidden);
    }
  });
  return group.results_are_whole();
}

}  // namespace fd
