#include "sample.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "kernels/kernels.h"
#include "nucleus.h"
#include "philox.h"

namespace fd {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// log(x) for x > 0. The last bit of std::log differs between versions of the C library.
double natural_log(double x) {
  int exponent;
  double mantissa = std::frexp(x, &exponent);
  if (mantissa < 0.7071067811865476) {
    mantissa *= 2;
    --exponent;
  }
  // ln m = 2 artanh((m - 1) / (m + 1)), and here |z| < 0.1716.
  const double z = (mantissa - 1) / (mantissa + 1), square = z * z;
  double series = 0;
  for (int k = 21; k > 0; k -= 2) series = series * square + 1.0 / k;
  return exponent * kLn2 + 2 * z * series;
}

// One thread's memory for one row.
struct Scratch {
  float* scores;      // after penalties
  float* few_scores;  // of the tokens in `ids`
  float* some;        // scratch for selecting the k-th largest
  float* maxima;      // by block of scores
  int32_t* ids;
  double* weights;
  double* few_weights;
  double* sums;  // by block of weights

  // Lays out the arrays in `memory` unless it is null. Returns the bytes needed.
  int64_t lay_out(std::byte* memory, int64_t vocabulary) {
    const int64_t blocks = token_blocks(vocabulary), tokens = blocks * kTokenBlock;
    int64_t used = 0;
    const auto take = [&](auto*& array, int64_t count) {
      if (memory != nullptr) array = reinterpret_cast<std::decay_t<decltype(array)>>(memory + used);
      used += (count * static_cast<int64_t>(sizeof *array) + 63) / 64 * 64;
    };
    take(scores, tokens);
    take(few_scores, tokens);
    take(some, tokens);
    take(maxima, blocks);
    take(ids, tokens);
    take(weights, tokens);
    take(few_weights, tokens);
    take(sums, blocks);
    return used;
  }
};

// The scores of a row with the maximum of each block, which lets searches skip blocks.
struct Row {
  const float* scores;
  int64_t count;
  const float* maxima;
  float best;

  static Row of(const float* scores, int64_t count, float* maxima) {
    const float best = kernels().block_maxima(scores, count, maxima);
    return {scores, count, maxima, best};
  }

  int64_t first_best() const {
    const int64_t block = std::find(maxima, maxima + token_blocks(count), best) - maxima;
    return std::find(scores + block * kTokenBlock, scores + count, best) - scores;
  }

  // Writes the ids of all scores >= low, ascending, and returns their number; `ids` has room for all tokens.
  int64_t ids_from(float low, int32_t* ids) const {
    int64_t found = 0;
    for (int64_t b = 0; b < token_blocks(count); ++b) {
      if (!(maxima[b] >= low)) continue;
      const int64_t end = std::min(count, (b + 1) * kTokenBlock);
      for (int64_t i = b * kTokenBlock; i < end; ++i) {
        ids[found] = static_cast<int32_t>(i);
        found += scores[i] >= low;
      }
    }
    return found;
  }

  // 1 <= k <= count.
  float kth_largest(int64_t k, const Scratch& scratch) const {
    float* some = scratch.some;
    int64_t size = token_blocks(count);
    if (k <= size) {
      // The k-th largest block maximum is a lower bound of the k-th largest score.
      std::copy(maxima, maxima + size, some);
      std::nth_element(some, some + k - 1, some + size, std::greater<>());
      size = ids_from(some[k - 1], scratch.ids);
      for (int64_t i = 0; i < size; ++i) some[i] = scores[scratch.ids[i]];
    } else {
      size = count;
      std::copy(scores, scores + count, some);
    }
    std::nth_element(some, some + k - 1, some + size, std::greater<>());
    return some[k - 1];
  }
};

// Forbids the tokens without a bit in the mask. The bits of most masks are equal in long runs.
void apply_mask(float* scores, int64_t vocabulary, const TokenCount* mask, int64_t entries) {
  for (int64_t first = 0; first < vocabulary; first += 64) {
    uint64_t bits = 0;
    if (first / 64 < entries) std::memcpy(&bits, mask + first / 64, sizeof bits);
    if (bits == ~uint64_t{0}) continue;
    const int64_t end = std::min(vocabulary, first + 64);
    for (int64_t i = first; i < end; ++i, bits >>= 1) {
      scores[i] = bits & 1 ? scores[i] : -INFINITY;
    }
  }
}

// The logits after biases, penalties and masks, rounded to float; without any, the logits themselves.
const float* adjusted(const float* logits, int64_t vocabulary, const SamplingRow& params,
                      const TokenCount* tokens, const Scratch& scratch) {
  if ((params.num_seen | params.num_masked | params.num_biased | params.num_mask_entries) == 0) return logits;
  float* scores = scratch.scores;
  std::copy(logits, logits + vocabulary, scores);
  const TokenCount* seen = tokens + params.first_token;
  const TokenCount* masked = seen + params.num_seen;
  const TokenCount* biased = masked + params.num_masked;
  for (int i = 0; i < params.num_biased; ++i) {
    if (biased[i].token < 0 || biased[i].token >= vocabulary) continue;
    float bias;
    std::memcpy(&bias, &biased[i].count, sizeof bias);
    scores[biased[i].token] += bias;
  }
  for (; seen < masked; ++seen) {
    if (seen->token < 0 || seen->token >= vocabulary) continue;
    double score = scores[seen->token];
    score = score > 0 ? score / params.repetition_penalty : score * params.repetition_penalty;
    if (seen->count > 0) score -= seen->count * params.frequency_penalty + params.presence_penalty;
    scores[seen->token] = static_cast<float>(score);
  }
  for (int i = 0; i < params.num_masked; ++i) {
    if (masked[i].token >= 0 && masked[i].token < vocabulary) scores[masked[i].token] = -INFINITY;
  }
  if (params.num_mask_entries > 0) {
    apply_mask(scores, vocabulary, biased + params.num_biased, params.num_mask_entries);
  }
  return scores;
}

// The lowest score kept by min_p and top_k; -infinity keeps all. Ties with the k-th largest are kept, as in vLLM and
// transformers.
float lowest_score(const Row& row, const SamplingRow& params, const Scratch& scratch) {
  float lowest = -INFINITY;
  if (params.min_p > 0) {
    const double bound = row.best + params.temperature * natural_log(params.min_p);
    lowest = static_cast<float>(std::max<double>(bound, -FLT_MAX));
    if (lowest < bound) lowest = std::nextafter(lowest, INFINITY);
  }
  if (params.top_k > 0 && params.top_k < row.count) {
    lowest = std::max(lowest, row.kth_largest(params.top_k, scratch));
  }
  return lowest;
}

// Returns the first index at which the running sum of weights exceeds `uniform` times the total.
int64_t pick(const double* weights, const double* sums, int64_t count, double uniform) {
  const int64_t blocks = token_blocks(count);
  double mass = 0;
  for (int64_t b = 0; b < blocks; ++b) mass += sums[b];
  const double point = uniform * mass;
  double below = 0;
  int64_t block = 0;
  while (block + 1 < blocks && below + sums[block] <= point) below += sums[block++];
  int64_t i = block * kTokenBlock;
  for (const int64_t end = std::min(count, i + kTokenBlock); i < end; ++i) {
    below += weights[i];
    if (below > point) return i;
  }
  // Summed one by one, a block may yield slightly less than its eight partial sums.
  do --i;
  while (weights[i] == 0);
  return i;
}

int64_t draw(const Row& row, const SamplingRow& params, const Scratch& scratch) {
  const float* scores = row.scores;
  int64_t count = row.count;
  const float lowest = lowest_score(row, params, scratch);
  const bool few = lowest > -INFINITY;
  if (few) {
    count = row.ids_from(lowest, scratch.ids);
    for (int64_t i = 0; i < count; ++i) scratch.few_scores[i] = row.scores[scratch.ids[i]];
    scores = scratch.few_scores;
  }
  // A tiny temperature correctly reduces all weights but the best to zero.
  const double factor = std::min(kLog2e / params.temperature, DBL_MAX);
  double* weights = scratch.weights;
  double* sums = scratch.sums;
  kernels().weigh(scores, count, row.best, factor, weights, sums);
  if (params.top_p < 1) keep_nucleus(weights, sums, count, params.top_p, scratch.few_weights);
  const int64_t index = pick(weights, sums, count, uniform(params.seed, params.choice, params.position));
  return few ? scratch.ids[index] : index;
}

void write_logprobs(const Sampling& args, int64_t index, const Scratch& scratch) {
  const Row row = Row::of(args.logits + index * args.vocabulary, args.vocabulary, scratch.maxima);
  // A mask may have hidden a non-finite value from the draw, and NaN cannot be sorted.
  if (!std::isfinite(row.best)) {
    args.drawn[index] = kBrokenRow;
    return;
  }
  kernels().weigh(row.scores, row.count, row.best, kLog2e, scratch.weights, scratch.sums);
  double mass = 0;
  for (int64_t b = 0; b < token_blocks(row.count); ++b) mass += scratch.sums[b];
  const double log_mass = natural_log(mass);

  int32_t* tokens = args.top_tokens + index * args.width;
  double* logprobs = args.logprobs + index * args.width;
  tokens[0] = static_cast<int32_t>(args.drawn[index]);
  const int64_t top = std::min<int64_t>(args.params[index].logprobs, row.count);
  if (top > 0) {
    int32_t* ids = scratch.ids;
    const int64_t found = row.ids_from(row.kth_largest(top, scratch), ids);
    std::partial_sort(ids, ids + top, ids + found, [&](int32_t a, int32_t b) {
      return row.scores[a] != row.scores[b] ? row.scores[a] > row.scores[b] : a < b;
    });
    std::copy(ids, ids + top, tokens + 1);
  }
  for (int64_t i = 0; i <= top; ++i) {
    logprobs[i] = static_cast<double>(row.scores[tokens[i]]) - row.best - log_mass;
  }
}

// The place of a token among all tokens, the most likely first and equals by id; 1 is the first.
int64_t rank_of(const float* logits, int64_t vocabulary, int64_t token) {
  const float own = logits[token];
  int64_t before = 0;
  for (int64_t i = 0; i < vocabulary; ++i) before += logits[i] > own || (logits[i] == own && i < token);
  return before + 1;
}

void sample_row(const Sampling& args, int64_t index, const Scratch& scratch) {
  const SamplingRow& params = args.params[index];
  const float* logits = args.logits + index * args.vocabulary;
  if (params.given > 0) {
    args.drawn[index] = params.given - 1;
    if (params.logprobs >= 0) write_logprobs(args, index, scratch);
    if (args.drawn[index] != kBrokenRow) args.drawn[index] = rank_of(logits, args.vocabulary, params.given - 1);
    return;
  }
  const Row row = Row::of(adjusted(logits, args.vocabulary, params, args.tokens, scratch), args.vocabulary,
                          scratch.maxima);
  if (!std::isfinite(row.best)) {
    args.drawn[index] = kBrokenRow;
    return;
  }
  args.drawn[index] = params.temperature == 0 ? row.first_best() : draw(row, params, scratch);
  if (params.logprobs >= 0) write_logprobs(args, index, scratch);
}

}  // namespace

int64_t sampling_scratch(int64_t vocabulary) { return Scratch().lay_out(nullptr, vocabulary); }

void sample(Team& team, const Sampling& args) {
  Scratch scratch;
  scratch.lay_out(args.scratch + team.rank() * sampling_scratch(args.vocabulary), args.vocabulary);
  team.for_each(args.rows, [&](int64_t index) { sample_row(args, index, scratch); });
}

void argmax(Team& team, const Argmax& args) {
  float* const maxima = args.maxima + team.rank() * token_blocks(args.vocabulary);
  team.for_each(args.rows, [&](int64_t index) {
    const Row row = Row::of(args.logits + index * args.vocabulary, args.vocabulary, maxima);
    args.drawn[index] = std::isfinite(row.best) ? row.first_best() : kBrokenRow;
  });
}

}  // namespace fd
