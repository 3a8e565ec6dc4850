#include "nucleus.h"

#include <algorithm>
#include <cfloat>
#include <cstring>

#include "kernels/kernels.h"

namespace fd {
namespace {

// Between two looks at the weights one by one.
constexpr int kHalvings = 4;

// Numbers that are not negative have the order of their bits, and halving a range of bits is halving a range
// of exponents, which suits what exponentials give.
uint64_t bits_of(double weight) {
  uint64_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return bits;
}

double from_bits(uint64_t bits) {
  double weight;
  std::memcpy(&weight, &bits, sizeof weight);
  return weight;
}

// Copies the weights of [low, high) in their order, and zeros up to a whole block. Blocks which sum up to
// less than `low` are passed over; `to` may be `from` when there are no sums.
int64_t copy_between(const double* from, const double* sums, int64_t count, uint64_t low, uint64_t high,
                     double* to) {
  int64_t copied = 0;
  for (int64_t begin = 0; begin < count; begin += kTokenBlock) {
    if (sums != nullptr && sums[begin / kTokenBlock] < from_bits(low)) continue;
    const int64_t end = std::min(count, begin + kTokenBlock);
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t bits = bits_of(from[i]);
      to[copied] = from[i];
      copied += bits - low < high - low;
    }
  }
  std::fill(to + copied, to + token_blocks(copied) * kTokenBlock, 0.0);
  return copied;
}

}  // namespace

void keep_nucleus(double* weights, double* sums, int64_t count, double top_p, double* buffer) {
  const int64_t blocks = token_blocks(count);
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += sums[b];
  // Even top_p = 0 leaves one token.
  const double goal = std::max(top_p * total, DBL_MIN);

  // The weight of the last token that stays, in [low, high): from `low` on weights reach the goal, from
  // `high` on they do not. Below the first `low` all together are less than what may be missing.
  uint64_t low = bits_of(std::max(total - goal, 0.0) / (2.0 * static_cast<double>(count)));
  uint64_t high = bits_of(1.0) + 1;
  double above = 0;      // the mass of what has been taken out because it surely stays
  double from_high = 0;  // the mass of what is left from `high` on

  const double least = from_bits(low);
  const auto promising = std::count_if(sums, sums + blocks, [&](double sum) { return sum >= least; });
  // In few blocks there is little to copy, and nothing is gained from narrowing the range before.
  int halvings = promising * 4 < blocks ? 0 : kHalvings;
  const double* left = weights;
  int64_t size = count;
  while (high - low > 1) {
    for (int i = 0; i < halvings && high - low > 1; ++i) {
      const uint64_t middle = low + (high - low) / 2;
      const double mass = kernels().mass_from(left, size, from_bits(middle));
      if (above + mass >= goal) {
        low = middle;
      } else {
        high = middle;
        from_high = mass;
      }
    }
    const int64_t before = size;
    size = copy_between(left, left == weights ? sums : nullptr, size, low, high, buffer);
    left = buffer;
    above += from_high;
    from_high = 0;
    halvings = kHalvings;
    if (size > before / 4) {
      // They lie close together in that range, or are all equal.
      const auto [lowest, highest] = std::minmax_element(left, left + size);
      low = bits_of(*lowest);
      high = bits_of(*highest) + 1;
    }
  }

  // All that is left are equals of the last one. Those behind it have to go.
  const double last = from_bits(low);
  int64_t needed = 0;
  for (double mass = above; needed < size && mass < goal; ++needed) mass += last;
  if (needed < size) {
    int64_t i = 0;
    for (; needed > 0; ++i) needed -= weights[i] == last;
    for (; i < count; ++i) {
      if (weights[i] == last) weights[i] = 0;
    }
  }
  kernels().retain(weights, count, last, sums);
}

}  // namespace fd
