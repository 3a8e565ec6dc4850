#include "sample.h"

#include <cfloat>

#include "hopper.cuh"
#include "launch.h"
#include "philox.cuh"

namespace fd::cuda {
namespace {

// One block per row. Each thread sums over a fixed stride, then one tree; the order is the same in every batch.
constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr double kLog2e = 1.4426950408889634;
// Ids that the inverse CDF processes at a time.
constexpr int kIdBlock = 1024;
constexpr int kMaxIdBlocks = 1024;

struct Best {
  float score;
  int id;
};

__device__ bool is_before(Best a, Best b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

struct Shared {
  Best best[kWarps];
  double sums[kWarps];
  int counts[kWarps];
  int histogram[256];
  double block_sums[kMaxIdBlocks];
  int chosen;
  int rest;
};

// The first (score, id) after `limit` in the order of is_before; its score is NaN if any score is NaN.
__device__ Best block_best(const float* scores, int count, Best limit, Shared& shared) {
  Best best{-INFINITY, count};
  bool is_sound = true;
#pragma unroll 8
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const Best each{scores[i], i};
    is_sound &= !isnan(each.score);
    if (is_before(limit, each) && is_before(each, best)) best = each;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    const Best other{__shfl_xor_sync(~0u, best.score, distance), __shfl_xor_sync(~0u, best.id, distance)};
    if (is_before(other, best)) best = other;
  }
  is_sound = __syncthreads_and(is_sound);
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = best;
  __syncthreads();
  best = shared.best[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    if (is_before(shared.best[warp], best)) best = shared.best[warp];
  }
  __syncthreads();
  return is_sound ? best : Best{NAN, count};
}

constexpr Best kNoLimit{INFINITY, -1};

__device__ double block_sum(double x, Shared& shared) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = x;
  __syncthreads();
  double all = 0;
  for (int warp = 0; warp < kWarps; ++warp) all += shared.sums[warp];
  __syncthreads();
  return all;
}

// 2^x for x <= 0: the polynomial of custom_ops/cpu/kernels/sampling.inl; exactly 1 at 0, never above 1, 0 below -1000.
__device__ double exp2_of(double x) {
  constexpr double kShift = 6755399441055744.0;
  if (!(x >= -1000.0)) return 0.0;
  const double magic = x + kShift, r = x - (magic - kShift);
  double p = fma(r, 7.070977866508138e-09, 1.0205905413765595e-07);
  p = fma(p, r, 1.3215451633221434e-06);
  p = fma(p, r, 1.5252672924850737e-05);
  p = fma(p, r, 0.00015403530424776529);
  p = fma(p, r, 0.0013333558200794592);
  p = fma(p, r, 0.009618129107618665);
  p = fma(p, r, 0.05550410866465167);
  p = fma(p, r, 0.24022650695910075);
  p = fma(p, r, 0.6931471805599462);
  p = fma(p, r, 1.0);
  return __longlong_as_double(__double_as_longlong(p) + (__double_as_longlong(magic) << 52));
}

// Maps floats to integers in the same order.
__device__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

__device__ float score_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffff : ~key); }

// Radix selection, eight bits of the key at a time. 1 <= k <= count.
__device__ float kth_largest(const float* scores, int count, int k, Shared& shared) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) shared.histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t key = key_of(scores[i]);
      if (shift == 24 || key >> (shift + 8) == prefix) atomicAdd(shared.histogram + (key >> shift & 255), 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      for (; shared.histogram[digit] < k; --digit) k -= shared.histogram[digit];
      shared.chosen = digit, shared.rest = k;
    }
    __syncthreads();
    prefix = prefix << 8 | shared.chosen;
    k = shared.rest;
    __syncthreads();
  }
  return score_of(prefix);
}

// The logits after biases, penalties and masks.
__device__ const float* adjusted(const Draw& args, const fd_sampling_row& row, const float* logits, float* scores) {
  if ((row.num_seen | row.num_masked | row.num_biased | row.num_mask_entries) == 0) return logits;
  for (int i = threadIdx.x; i < args.vocabulary; i += kThreads) scores[i] = logits[i];
  __syncthreads();
  const int32_t* const seen = args.tokens + int64_t{row.first_token} * 2;
  const int32_t* const masked = seen + int64_t{row.num_seen} * 2;
  const int32_t* const biased = masked + int64_t{row.num_masked} * 2;
  for (int i = threadIdx.x; i < row.num_biased; i += kThreads) {
    const int token = biased[2 * i];
    if (token >= 0 && token < args.vocabulary) scores[token] += __int_as_float(biased[2 * i + 1]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < row.num_seen; i += kThreads) {
    const int token = seen[2 * i], count = seen[2 * i + 1];
    if (token < 0 || token >= args.vocabulary) continue;
    double score = scores[token];
    score = score > 0 ? score / row.repetition_penalty : score * row.repetition_penalty;
    if (count > 0) score -= count * row.frequency_penalty + row.presence_penalty;
    scores[token] = static_cast<float>(score);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < row.num_masked; i += kThreads) {
    const int token = masked[2 * i];
    if (token >= 0 && token < args.vocabulary) scores[token] = -INFINITY;
  }
  if (row.num_mask_entries > 0) {
    const int32_t* const mask = biased + int64_t{row.num_biased} * 2;
    for (int i = threadIdx.x; i < args.vocabulary; i += kThreads) {
      const bool is_allowed = i / 64 < row.num_mask_entries && mask[i / 32] >> i % 32 & 1;
      if (!is_allowed) scores[i] = -INFINITY;
    }
  }
  __syncthreads();
  return scores;
}

// The lowest score kept by min_p and top_k; ties with the k-th largest are kept.
__device__ float lowest_score(const fd_sampling_row& row, const float* scores, int count, float best, Shared& shared) {
  float lowest = -INFINITY;
  if (row.min_p > 0) {
    const double bound = best + row.temperature * log(row.min_p);
    lowest = __double2float_ru(fmax(bound, -static_cast<double>(FLT_MAX)));
  }
  if (row.top_k > 0 && row.top_k < count) lowest = fmaxf(lowest, kth_largest(scores, count, row.top_k, shared));
  return lowest;
}

__device__ double mass_from(const float* scores, const double* weights, int count, float cut, Shared& shared) {
  double mass = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    if (scores[i] >= cut) mass += weights[i];
  }
  return block_sum(mass, shared);
}

// Keeps the fewest most likely tokens that reach top_p of the mass; among equals, those with lower ids.
__device__ void keep_nucleus(const float* scores, double* weights, int count, float lowest, float best, double top_p,
                             Shared& shared) {
  const double goal = fmax(top_p * mass_from(scores, weights, count, lowest, shared), DBL_MIN);
  // The weights >= low reach the goal, those >= high do not.
  uint32_t low = key_of(lowest), high = key_of(best) + 1;
  double above = 0;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const double mass = mass_from(scores, weights, count, score_of(middle), shared);
    if (mass >= goal) {
      low = middle;
    } else {
      high = middle, above = mass;
    }
  }
  // Ties with the last one are counted in order of ids: each thread has adjacent ids.
  const float last = score_of(low);
  const int per_thread = (count + kThreads - 1) / kThreads, first = min(count, static_cast<int>(threadIdx.x) * per_thread);
  const int end = min(count, first + per_thread), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int equals = 0;
  double weight = 0;
  for (int i = first; i < end; ++i) {
    if (scores[i] == last) ++equals, weight = weights[i];
  }
  int until = equals;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, until, distance);
    if (lane >= distance) until += other;
  }
  if (lane == 31) shared.counts[warp] = until;
  __syncthreads();
  int before = until - equals;
  for (int other = 0; other < warp; ++other) before += shared.counts[other];
  const double needed = fmax(ceil((goal - above) / weight), 1.0);
  for (int i = first; i < end; ++i) {
    if (scores[i] < last || (scores[i] == last && before++ >= needed)) weights[i] = 0;
  }
  __syncthreads();
}

// The first id at which the running sum of weights exceeds `share` times the total.
__device__ int pick(const double* weights, int count, double share, Shared& shared) {
  const int blocks = (count + kIdBlock - 1) / kIdBlock, lane = threadIdx.x % 32;
  for (int block = threadIdx.x / 32; block < blocks; block += kWarps) {
    double sum = 0;
    for (int i = block * kIdBlock + lane; i < min(count, (block + 1) * kIdBlock); i += 32) sum += weights[i];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) shared.block_sums[block] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double mass = 0, below = 0;
    for (int block = 0; block < blocks; ++block) mass += shared.block_sums[block];
    const double point = share * mass;
    int block = 0;
    while (block + 1 < blocks && below + shared.block_sums[block] <= point) below += shared.block_sums[block++];
    int id = block * kIdBlock;
    const int end = min(count, id + kIdBlock);
    for (; id < end; ++id) {
      below += weights[id];
      if (below > point) break;
    }
    // Summed one by one, a block may yield slightly less than the tree.
    if (id == end) {
      do --id;
      while (id > 0 && weights[id] == 0);
    }
    shared.chosen = id;
  }
  __syncthreads();
  const int id = shared.chosen;
  __syncthreads();
  return id;
}

__device__ void write_logprobs(const Draw& args, int index, const fd_sampling_row& row, const float* logits, int drawn,
                               Best best, Shared& shared) {
  double mass = 0;
  for (int i = threadIdx.x; i < args.vocabulary; i += kThreads) {
    mass += exp2_of((static_cast<double>(logits[i]) - best.score) * kLog2e);
  }
  const double log_mass = log(block_sum(mass, shared));
  int32_t* const tokens = args.top_tokens + int64_t{index} * args.width;
  double* const logprobs = args.logprobs + int64_t{index} * args.width;
  Best each = kNoLimit;
  for (int i = 0; i <= min(row.logprobs, args.vocabulary); ++i) {
    if (i > 0) each = block_best(logits, args.vocabulary, each, shared);
    if (threadIdx.x == 0) {
      tokens[i] = i == 0 ? drawn : each.id;
      logprobs[i] = static_cast<double>(logits[tokens[i]]) - best.score - log_mass;
    }
  }
}

// The place of a token among all tokens, the most likely first and equals by id; 1 is the first.
__device__ int rank_of(const float* logits, int count, int token, Shared& shared) {
  const Best own{logits[token], token};
  int before = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) before += is_before(Best{logits[i], i}, own);
  return 1 + static_cast<int>(block_sum(before, shared));
}

__global__ __launch_bounds__(kThreads) void argmax_kernel(const __grid_constant__ Draw args) {
  __shared__ Shared shared;
  let_successor_start();
  wait_for_predecessor();
  const int index = blockIdx.x;
  if (index >= *args.count) return;
  const Best best = block_best(args.logits + int64_t{index} * args.vocabulary, args.vocabulary, kNoLimit, shared);
  if (threadIdx.x == 0) args.drawn[index] = isfinite(best.score) ? best.id : -1;
}

__global__ __launch_bounds__(kThreads) void sample_kernel(const __grid_constant__ Draw args) {
  __shared__ Shared shared;
  let_successor_start();
  wait_for_predecessor();
  const int index = blockIdx.x, count = args.vocabulary;
  if (index >= *args.count) return;
  const fd_sampling_row row = args.rows[index];
  const float* const logits = args.logits + int64_t{index} * count;
  if (row.given > 0) {
    // Scores this token. As on the CPU, a non-finite value is found only if the logits are read.
    int drawn = row.given - 1;
    if (row.logprobs >= 0) {
      const Best best = block_best(logits, count, kNoLimit, shared);
      if (isfinite(best.score)) {
        write_logprobs(args, index, row, logits, drawn, best, shared);
      } else {
        drawn = -1;
      }
    }
    if (drawn >= 0) drawn = rank_of(logits, count, drawn, shared);
    if (threadIdx.x == 0) args.drawn[index] = drawn;
    return;
  }
  double* const weights = reinterpret_cast<double*>(static_cast<uint8_t*>(args.work) + index * draw_work(count));
  const float* const scores = adjusted(args, row, logits, reinterpret_cast<float*>(weights + count));
  const Best best = block_best(scores, count, kNoLimit, shared);
  int drawn = isfinite(best.score) ? best.id : -1;
  if (drawn >= 0 && row.temperature != 0) {
    const float lowest = lowest_score(row, scores, count, best.score, shared);
    // A tiny temperature correctly reduces all weights but the best to zero.
    const double factor = fmin(kLog2e / row.temperature, DBL_MAX);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      weights[i] = scores[i] >= lowest ? exp2_of((static_cast<double>(scores[i]) - best.score) * factor) : 0.0;
    }
    __syncthreads();
    if (row.top_p < 1) keep_nucleus(scores, weights, count, lowest, best.score, row.top_p, shared);
    drawn = pick(weights, count, uniform(row.seed, row.choice, row.position), shared);
  }
  if (drawn >= 0 && row.logprobs >= 0) {
    // A mask may have hidden a non-finite value from the draw.
    const Best raw = block_best(logits, count, kNoLimit, shared);
    if (isfinite(raw.score)) {
      write_logprobs(args, index, row, logits, drawn, raw, shared);
    } else {
      drawn = -1;
    }
  }
  if (threadIdx.x == 0) args.drawn[index] = drawn;
}

}  // namespace

cudaError_t draw(const Draw& args, int capacity, cudaStream_t stream) {
  return launch(args.rows == nullptr ? argmax_kernel : sample_kernel, dim3(capacity), kThreads, 0, 1, stream, args);
}

cudaError_t prepare_draw() {
  const cudaError_t error = prepare(reinterpret_cast<const void*>(argmax_kernel), 0);
  return error == cudaSuccess ? prepare(reinterpret_cast<const void*>(sample_kernel), 0) : error;
}

}  // namespace fd::cuda
