#include "route.h"

#include <cuda_bf16.h>

#include "hopper.cuh"
#include "launch.h"
#include "norm.cuh"

namespace fd::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kExpertsPerLane = kMaxExperts / 32;

// The order of these keys is that of the floats.
__device__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One value of a lane for each of its experts: lane i processes experts i, 32 + i, ...
using PerExpert = float[kExpertsPerLane];

__device__ void load_per_expert(const float* values, int experts, float missing, PerExpert& out) {
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    out[i] = missing;
    if (i * 32 < experts && i * 32 + threadIdx.x % 32 < experts) out[i] = values[i * 32 + threadIdx.x % 32];
  }
}

struct Pick {
  int expert;
  float weight;
};

// Run by one warp: returns pick i of a token to lane i. `logits` beyond the experts are -infinity.
__device__ Pick select(const Route& args, PerExpert& logits, const PerExpert& bias) {
  const int lane = threadIdx.x % 32;
  float highest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) highest = fmaxf(highest, logits[i]);
  for (int distance = 16; distance > 0; distance /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, distance));
  float probabilities[kExpertsPerLane];
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    if (i * 32 < args.experts && i * 32 + lane < args.experts) sum += probabilities[i] = __expf(logits[i] - highest);
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  // Zero: taken, or no expert.
  uint32_t keys[kExpertsPerLane];
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    keys[i] = 0;
    if (i * 32 >= args.experts || i * 32 + lane >= args.experts) continue;
    probabilities[i] = __fdiv_rn(probabilities[i], sum);
    const float score = probabilities[i] + bias[i];
    // NaN sorts last but remains a valid expert, so only the results of its token are wrong.
    keys[i] = ordered(score >= -INFINITY ? score : -INFINITY);
  }
  float picked_sum = 0.0f;
  Pick own{};
  for (int j = 0; j < args.k; ++j) {
    uint32_t key = 0;
    float probability = 0.0f;
    int expert = kMaxExperts;
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      if (i * 32 < args.experts && keys[i] > key) key = keys[i], expert = i * 32 + lane, probability = probabilities[i];
    }
    // Among equals, the lowest expert.
    const uint32_t best = __reduce_max_sync(~0u, key);
    expert = static_cast<int>(__reduce_min_sync(~0u, static_cast<uint32_t>(key == best ? expert : kMaxExperts)));
    probability = __shfl_sync(~0u, probability, expert % 32);
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      if (i * 32 + lane == expert) keys[i] = 0;
    }
    picked_sum += probability;
    if (lane == j) own = {expert, probability};
  }
  own.weight = __fdiv_rn(own.weight, fmaxf(picked_sum, args.norm_min));
  return own;
}

// One warp per token.
__global__ __launch_bounds__(kThreads) void route_kernel(const __grid_constant__ Route args) {
  let_successor_start();
  wait_for_predecessor();
  const int token = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= *args.count) return;
  PerExpert logits, bias;
  load_per_expert(args.logits + int64_t{token} * args.experts, args.experts, -INFINITY, logits);
  load_per_expert(args.bias, args.experts, 0.0f, bias);
  const Pick pick = select(args, logits, bias);
  if (lane < args.k) {
    const int64_t at = int64_t{token} * args.k + lane;
    args.topk_ids[at] = pick.expert;
    args.topk_weights[at] = pick.weight;
    args.rows_in_expert[at] = atomicAdd(args.counts + pick.expert, 1);
  }
}

// For few tokens: block p selects the experts of all tokens, like every other block, and then moves row p. That is
// faster than a second kernel that waits for the first one's counts.
constexpr int kFewThreads = 512, kFewWarps = kFewThreads / 32, kFewTokens = 32;
static_assert(kFewTokens * kMaxTopk <= kFewThreads && kMaxExperts <= kFewThreads);

__global__ __launch_bounds__(kFewThreads) void route_few_kernel(const __grid_constant__ Route args,
                                                                const __grid_constant__ Permute move) {
  __shared__ int experts[kFewTokens * kMaxTopk], counts[kMaxExperts], row;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = blockIdx.x, own_token = own / args.k;
  const bool is_first = blockIdx.x == 0;
  let_successor_start();
  const int tokens = __ldcg(args.count), k_blocks = ceil_div(move.width, kBlockK);
  PerExpert bias;
  load_per_expert(args.bias, args.experts, 0.0f, bias);
  if (threadIdx.x < kMaxExperts) counts[threadIdx.x] = 0;
  if (threadIdx.x == 0) row = 0;
  wait_for_predecessor();
  if (!is_first && own_token >= tokens) return;
  const auto source = [&](int piece) {
    return *reinterpret_cast<const uint4*>(move.x + in_activations(own_token, piece * 8, k_blocks));
  };
  uint4 first_piece{};
  if (own_token < tokens && threadIdx.x < k_blocks * 8) first_piece = source(threadIdx.x);
  __syncthreads();
  for (int token = warp; token < tokens; token += kFewWarps) {
    PerExpert logits;
    load_per_expert(args.logits + int64_t{token} * args.experts, args.experts, -INFINITY, logits);
    const Pick pick = select(args, logits, bias);
    if (lane < args.k) {
      const int at = token * args.k + lane;
      experts[at] = pick.expert;
      atomicAdd(counts + pick.expert, 1);
      if (is_first) args.topk_ids[at] = pick.expert, args.topk_weights[at] = pick.weight;
    }
  }
  __syncthreads();
  if (is_first && threadIdx.x < args.experts) args.counts[threadIdx.x] = counts[threadIdx.x];
  if (own_token >= tokens) return;
  const int expert = experts[own];
  int before = threadIdx.x < expert ? round_up(counts[threadIdx.x], move.alignment) : 0;
  if (threadIdx.x < own && experts[threadIdx.x] == expert) ++before;
  before = __reduce_add_sync(~0u, before);
  if (lane == 0) atomicAdd(&row, before);
  __syncthreads();
  if (threadIdx.x == 0) move.assignments[row] = own;
  for (int piece = threadIdx.x; piece < k_blocks * 8; piece += kFewThreads) {
    *reinterpret_cast<uint4*>(move.rows + in_activations(row, piece * 8, k_blocks)) =
        piece < kFewThreads ? first_piece : source(piece);
  }
}

// One block per assignment.
__global__ __launch_bounds__(kThreads) void permute_kernel(const __grid_constant__ Permute args) {
  __shared__ int sums[kWarps];
  let_successor_start();
  wait_for_predecessor();
  const int num_assignments = *args.count * args.k, k_blocks = ceil_div(args.width, kBlockK);
  for (int pick = blockIdx.x; pick < num_assignments; pick += gridDim.x) {
    const int expert = args.topk_ids[pick];
    int before = 0;
    for (int other = threadIdx.x; other < expert; other += kThreads) before += round_up(args.counts[other], args.alignment);
    before = __reduce_add_sync(~0u, before);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = before;
    __syncthreads();
    int row = args.rows_in_expert[pick];
    for (int warp = 0; warp < kWarps; ++warp) row += sums[warp];
    if (threadIdx.x == 0) args.assignments[row] = pick;
    for (int piece = threadIdx.x; piece < k_blocks * 8; piece += kThreads) {
      *reinterpret_cast<uint4*>(args.rows + in_activations(row, piece * 8, k_blocks)) =
          *reinterpret_cast<const uint4*>(args.x + in_activations(pick / args.k, piece * 8, k_blocks));
    }
  }
}

// Each thread processes two adjacent columns of a token.
__global__ __launch_bounds__(kThreads) void combine_kernel(const __grid_constant__ Combine args) {
  let_successor_start();
  wait_for_predecessor();
  const int token = blockIdx.y, column = (blockIdx.x * kThreads + threadIdx.x) * 2;
  if (token >= *args.count || column >= args.width) return;
  float low = 0.0f, high = 0.0f;
  for (int j = 0; j < args.k; ++j) {
    const int64_t pick = int64_t{token} * args.k + j;
    const float2 row = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(
        static_cast<const __nv_bfloat16*>(args.results) + pick * args.width + column));
    low = __fmaf_rn(args.topk_weights[pick], row.x, low), high = __fmaf_rn(args.topk_weights[pick], row.y, high);
  }
  const int64_t at = int64_t{token} * args.width + column;
  if (args.shared != nullptr) low += args.shared[at], high += args.shared[at + 1];
  args.hidden_states[at] += low, args.hidden_states[at + 1] += high;
}

__device__ void add(const HeldRow& other, HeldRow& row) {
#pragma unroll
  for (int i = 0; i < kHeldFours; ++i) {
    row.fours[i].x += other.fours[i].x, row.fours[i].y += other.fours[i].y;
    row.fours[i].z += other.fours[i].z, row.fours[i].w += other.fours[i].w;
  }
}

// One block per token, which it also normalises. A row of up to kHeldWidth columns, a multiple of 4.
__global__ __launch_bounds__(kNormThreads) void combine_and_norm_kernel(const __grid_constant__ Combine args,
                                                                        const __grid_constant__ Norm norm) {
  __shared__ float sums[kNormWarps];
  const int token = blockIdx.x, k_blocks = ceil_div(args.width, kBlockK);
  let_successor_start();
  const int count = __ldcg(args.count);
  const HeldRow weights = load_held(norm.weight, args.width);
  wait_for_predecessor();
  if (token >= count) return;
  float* const hidden_states = args.hidden_states + int64_t{token} * args.width;
  HeldRow row = load_held(hidden_states, args.width), shared{}, sum{};
  if (args.shared != nullptr) shared = load_held(args.shared + int64_t{token} * args.width, args.width);
#pragma unroll 4
  for (int j = 0; j < args.k; ++j) {
    const int64_t pick = int64_t{token} * args.k + j;
    const float weight = args.topk_weights[pick];
    const uint2* const result =
        reinterpret_cast<const uint2*>(static_cast<const __nv_bfloat16*>(args.results) + pick * args.width);
#pragma unroll
    for (int i = 0; i < kHeldFours; ++i) {
      const int four = threadIdx.x + i * kNormThreads;
      if (four >= args.width / 4) continue;
      const uint2 x = result[four];
      const float2 low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&x.x)),
                   high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&x.y));
      sum.fours[i].x = __fmaf_rn(weight, low.x, sum.fours[i].x), sum.fours[i].y = __fmaf_rn(weight, low.y, sum.fours[i].y);
      sum.fours[i].z = __fmaf_rn(weight, high.x, sum.fours[i].z), sum.fours[i].w = __fmaf_rn(weight, high.y, sum.fours[i].w);
    }
  }
  if (args.shared != nullptr) add(shared, sum);
  add(sum, row);
#pragma unroll
  for (int i = 0; i < kHeldFours; ++i) {
    const int four = threadIdx.x + i * kNormThreads;
    if (four < args.width / 4) reinterpret_cast<float4*>(hidden_states)[four] = row.fours[i];
  }
  normalise(nullptr, nullptr, args.width, norm.epsilon, row, weights, sums, [&](int column, uint2 four) {
    *reinterpret_cast<uint2*>(norm.out + in_activations(token, column, k_blocks)) = four;
  });
}

}  // namespace

cudaError_t route_and_permute(const Route& args, const Permute& move, int capacity, cudaStream_t stream) {
  if (capacity <= kFewTokens) {
    return launch(route_few_kernel, dim3(capacity * args.k), kFewThreads, 0, 1, stream, args, move);
  }
  const cudaError_t error = launch(route_kernel, dim3(ceil_div(capacity, kWarps)), kThreads, 0, 1, stream, args);
  if (error != cudaSuccess) return error;
  return launch(permute_kernel, dim3(capacity * args.k), kThreads, 0, 1, stream, move);
}

cudaError_t combine(const Combine& args, int capacity, cudaStream_t stream) {
  return launch(combine_kernel, dim3(ceil_div(args.width, kThreads * 2), capacity), kThreads, 0, 1, stream, args);
}

cudaError_t combine_and_norm(const Combine& args, const Norm& next, int capacity, cudaStream_t stream) {
  if (args.width <= kHeldWidth) {
    return launch(combine_and_norm_kernel, dim3(capacity), kNormThreads, 0, 1, stream, args, next);
  }
  const cudaError_t error = combine(args, capacity, stream);
  return error == cudaSuccess ? norm(next, capacity, stream) : error;
}

cudaError_t prepare_route() {
  for (const void* kernel :
       {reinterpret_cast<const void*>(route_kernel), reinterpret_cast<const void*>(route_few_kernel),
        reinterpret_cast<const void*>(permute_kernel), reinterpret_cast<const void*>(combine_kernel),
        reinterpret_cast<const void*>(combine_and_norm_kernel)}) {
    const cudaError_t error = prepare(kernel, 0);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fd::cuda
