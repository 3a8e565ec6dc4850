#include "nucleus.h"

#include <algorithm>
#include <cfloat>
#include <cstring>

#include "kernels/kernels.h"

namespace fd {
namespace {

// Bisection steps between two compactions of the remaining weights.
constexpr int kHalvings = 4;

// Non-negative doubles are ordered like their bits. Bisecting the bits bisects the exponents, which suits weights that
// are exponentials.
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

// Copies the weights in [low, high) in order and pads them with zeros to a whole block. Skips blocks whose sum is less
// than `low`; without `sums`, `to` may equal `from`.
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
  // top_p = 0 also keeps one token.
  const double goal = std::max(top_p * total, DBL_MIN);

  // The smallest kept weight lies in [low, high): the weights >= low reach the goal, those >= high do not. The weights
  // below the initial `low` sum to less than total - goal.
  uint64_t low = bits_of(std::max(total - goal, 0.0) / (2.0 * static_cast<double>(count)));
  uint64_t high = bits_of(1.0) + 1;
  double above = 0;      // mass of the weights already removed because they are certainly kept
  double from_high = 0;  // mass of the remaining weights >= high

  const double least = from_bits(low);
  const auto promising = std::count_if(sums, sums + blocks, [&](double sum) { return sum >= least; });
  // With few blocks, copying is cheap and need not be preceded by bisection.
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
      // The weights are concentrated in the range, or all equal.
      const auto [lowest, highest] = std::minmax_element(left, left + size);
      low = bits_of(*lowest);
      high = bits_of(*highest) + 1;
    }
  }

  // The remaining weights are all equal: keep as many as needed and remove the later ones.
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
