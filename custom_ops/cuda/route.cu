#include "route.h"

#include <cuda_bf16.h>

#include "hopper.cuh"
#include "launch.h"
#include "norm.h"

namespace fd::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kExpertsPerLane = kMaxExperts / 32;

// One warp per token; lane i processes experts i, 32 + i, ...
__global__ __launch_bounds__(kThreads) void route_kernel(const __grid_constant__ Route args) {
  let_successor_start();
  wait_for_predecessor();
  const int token = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= *args.count) return;
  float probabilities[kExpertsPerLane], scores[kExpertsPerLane];
  float highest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    const int expert = i * 32 + lane;
    probabilities[i] = expert < args.experts ? args.logits[int64_t{token} * args.experts + expert] : -INFINITY;
    highest = fmaxf(highest, probabilities[i]);
  }
  for (int distance = 16; distance > 0; distance /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, distance));
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    if (i * 32 + lane < args.experts) sum += probabilities[i] = __expf(probabilities[i] - highest);
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    const int expert = i * 32 + lane;
    probabilities[i] = __fdiv_rn(probabilities[i], sum);
    scores[i] = expert < args.experts ? probabilities[i] + args.bias[expert] : 0.0f;
    // NaN sorts last but remains a valid expert, so only the results of its token are wrong.
    if (!(scores[i] >= -INFINITY)) scores[i] = -INFINITY;
  }
  uint32_t taken = 0;
  float picked_sum = 0.0f, own_probability = 0.0f;
  int own_pick = 0;
  for (int j = 0; j < args.k; ++j) {
    float best = 0.0f, probability = 0.0f;
    int best_expert = kMaxExperts;
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      const int expert = i * 32 + lane;
      if (expert >= args.experts || taken >> i & 1) continue;
      if (best_expert == kMaxExperts || scores[i] > best) {
        best = scores[i], best_expert = expert, probability = probabilities[i];
      }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(~0u, best, distance), other_p = __shfl_xor_sync(~0u, probability, distance);
      const int expert = __shfl_xor_sync(~0u, best_expert, distance);
      if (expert == kMaxExperts) continue;
      if (best_expert == kMaxExperts || other > best || (other == best && expert < best_expert)) {
        best = other, best_expert = expert, probability = other_p;
      }
    }
    if (best_expert % 32 == lane) taken |= 1u << best_expert / 32;
    picked_sum += probability;
    if (lane == j) own_pick = best_expert, own_probability = probability;
  }
  if (lane < args.k) {
    const int64_t at = int64_t{token} * args.k + lane;
    args.topk_ids[at] = own_pick;
    args.topk_weights[at] = __fdiv_rn(own_probability, fmaxf(picked_sum, args.norm_min));
    args.rows_in_expert[at] = atomicAdd(args.counts + own_pick, 1);
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

}  // namespace

cudaError_t route(const Route& args, int capacity, cudaStream_t stream) {
  return launch(route_kernel, dim3(ceil_div(capacity, kWarps)), kThreads, 0, 1, stream, args);
}

cudaError_t permute(const Permute& args, int capacity, cudaStream_t stream) {
  return launch(permute_kernel, dim3(capacity * args.k), kThreads, 0, 1, stream, args);
}

cudaError_t combine(const Combine& args, int capacity, cudaStream_t stream) {
  return launch(combine_kernel, dim3(ceil_div(args.width, kThreads * 2), capacity), kThreads, 0, 1, stream, args);
}

cudaError_t prepare_route() {
  for (const void* kernel : {reinterpret_cast<const void*>(route_kernel), reinterpret_cast<const void*>(permute_kernel),
                             reinterpret_cast<const void*>(combine_kernel)}) {
    const cudaError_t error = prepare(kernel, 0);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fd::cuda
