#include "norm.h"

#include <algorithm>

#include "hopper.cuh"
#include "launch.h"
#include "norm.cuh"
#include "step.cuh"

namespace fd::cuda {
namespace {

constexpr int kThreads = kNormThreads, kWarps = kNormWarps;

__device__ const float* row_of(const Norm& args, int row) {
  return args.hidden_states + int64_t{args.rows == nullptr ? row : args.rows[row]} * args.width;
}

__device__ auto writer(const Norm& args, int row) {
  return [place = args.out, row, k_blocks = ceil_div(args.width, kBlockK)](int column, uint2 four) {
    *reinterpret_cast<uint2*>(place + in_activations(row, column, k_blocks)) = four;
  };
}

__global__ __launch_bounds__(kThreads) void norm_kernel(const __grid_constant__ Norm args) {
  __shared__ float sums[kWarps];
  let_successor_start();
  const int row = blockIdx.x, count = __ldcg(args.count);
  const HeldRow weights = load_held(args.weight, args.width);
  wait_for_predecessor();
  if (row >= count) return;
  const float* const x = row_of(args, row);
  normalise(x, args.weight, args.width, args.epsilon, load_held(x, args.width), weights, sums, writer(args, row));
}

__device__ __forceinline__ float add_products(uint2 x, float4 weight, float dot) {
  const float2 low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&x.x)),
               high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&x.y));
  dot = __fmaf_rn(low.y, weight.y, __fmaf_rn(low.x, weight.x, dot));
  return __fmaf_rn(high.y, weight.w, __fmaf_rn(high.x, weight.z, dot));
}

// For few rows: a block processes one row and the experts of its warps. What does not depend on the previous kernel is
// loaded before it ends.
__global__ __launch_bounds__(kThreads, 2) void router_row_kernel(const __grid_constant__ Norm args, Router router) {
  // Groups of four weights that a lane loads early, and those for which it has registers only after the norm.
  constexpr int kEarly = 15, kLate = 5;
  extern __shared__ __align__(16) __nv_bfloat16 normed[];
  __shared__ float sums[kWarps];
  const int lane = threadIdx.x % 32, row = blockIdx.x, expert = blockIdx.y * kWarps + threadIdx.x / 32;
  let_successor_start();
  const int count = __ldcg(args.count);
  const bool is_there = expert < router.experts;
  const float* const weights = router.weights + int64_t{is_there ? expert : 0} * args.width;
  const HeldRow norm_weights = load_held(args.weight, args.width);
  const auto load = [&](int j) {
    const int k = lane * 4 + j * 128;
    return k < args.width ? *reinterpret_cast<const float4*>(weights + k) : float4{};
  };
  float4 early[kEarly];
#pragma unroll
  for (int j = 0; j < kEarly; ++j) early[j] = load(j);
  for (int k = kEarly * 128 + lane * 32; k < args.width; k += 1024) prefetch(weights + k);
  wait_for_predecessor();
  if (row == 0 && blockIdx.y == 0) {
    for (int i = threadIdx.x; i < router.experts; i += kThreads) router.counts[i] = 0;
  }
  if (row >= count) return;
  const float* const x = row_of(args, row);
  const auto write = writer(args, row);
  normalise(x, args.weight, args.width, args.epsilon, load_held(x, args.width), norm_weights, sums,
            [&](int column, uint2 four) {
              *reinterpret_cast<uint2*>(normed + column) = four;
              if (blockIdx.y == 0) write(column, four);
            });
  float4 late[kLate];
#pragma unroll
  for (int j = 0; j < kLate; ++j) late[j] = load(kEarly + j);
  __syncthreads();
  float dot = 0.0f;
#pragma unroll
  for (int j = 0; j < kEarly + kLate; ++j) {
    const int k = lane * 4 + j * 128;
    if (k < args.width) {
      dot = add_products(*reinterpret_cast<const uint2*>(normed + k), j < kEarly ? early[j] : late[j - kEarly], dot);
    }
  }
  for (int k = lane * 4 + (kEarly + kLate) * 128; k < args.width; k += 128) {
    dot = add_products(*reinterpret_cast<const uint2*>(normed + k), *reinterpret_cast<const float4*>(weights + k), dot);
  }
  dot = warp_sum(dot);
  if (lane == 0 && is_there) router.logits[int64_t{row} * router.experts + expert] = dot;
}

// For many rows: kRows rows share each loaded weight, and the kExperts experts of a warp share each row. blockIdx.y
// processes every gridDim.y-th group of experts.
template <int kRows, int kExperts>
__global__ __launch_bounds__(kThreads) void router_kernel(const __grid_constant__ Norm args, Router router) {
  constexpr int kGroup = kWarps * kExperts;
  extern __shared__ __align__(16) __nv_bfloat16 normed[];
  __shared__ float sums[kWarps];
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * kExperts;
  let_successor_start();
  wait_for_predecessor();
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = threadIdx.x; i < router.experts; i += kThreads) router.counts[i] = 0;
  }
  const int first = blockIdx.x * kRows, rows = min(kRows, *args.count - first), width = round_up(args.width, kBlockK);
  if (rows <= 0) return;
  const HeldRow norm_weights = load_held(args.weight, args.width);
  for (int i = 0; i < rows; ++i) {
    const float* const x = row_of(args, first + i);
    const auto write = writer(args, first + i);
    normalise(x, args.weight, args.width, args.epsilon, load_held(x, args.width), norm_weights, sums,
              [&](int column, uint2 four) {
                *reinterpret_cast<uint2*>(normed + i * width + column) = four;
                if (blockIdx.y == 0) write(column, four);
              });
  }
  __syncthreads();
  for (int expert = blockIdx.y * kGroup + own; expert < router.experts; expert += gridDim.y * kGroup) {
    const float* const weights = router.weights + int64_t{expert} * args.width;
    // With an odd number of experts, the last one is computed twice.
    const int64_t next = kExperts > 1 && expert + 1 < router.experts ? args.width : 0;
    float dots[kRows][kExperts] = {};
#pragma unroll 1
    for (int k = lane * 4; k < args.width; k += 128) {
      float4 weight[kExperts];
#pragma unroll
      for (int e = 0; e < kExperts; ++e) weight[e] = *reinterpret_cast<const float4*>(weights + e * next + k);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const uint2 four = *reinterpret_cast<const uint2*>(normed + i * width + k);
#pragma unroll
        for (int e = 0; e < kExperts; ++e) dots[i][e] = add_products(four, weight[e], dots[i][e]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
        const float dot = warp_sum(dots[i][e]);
        if (lane == 0 && i < rows && expert + e < router.experts) {
          router.logits[int64_t{first + i} * router.experts + expert + e] = dot;
        }
      }
    }
  }
}

__global__ __launch_bounds__(kThreads) void embedding_kernel(const __grid_constant__ Embedding args) {
  let_successor_start();
  wait_for_predecessor();
  const StepView step(args.step);
  for (int token = blockIdx.x; token < step.num_tokens; token += gridDim.x) {
    const int given = step.token_ids[token];
    const int id = min(max(given < 0 && args.drawn != nullptr ? args.drawn[-1 - given] : given, 0), args.vocabulary - 1);
    const __nv_bfloat16* const row = static_cast<const __nv_bfloat16*>(args.table) + int64_t{id} * args.width;
    for (int i = threadIdx.x * 2; i < args.width; i += kThreads * 2) {
      *reinterpret_cast<float2*>(args.hidden_states + int64_t{token} * args.width + i) =
          __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(row + i));
    }
  }
}

// From kManyRows rows on, eight rows share the loaded weights; fewer rows are spread over all multiprocessors instead.
constexpr int kManyRows = 128, kSharingRows = 8, kSharingExperts = 2;
constexpr int kMaxMemory = 227 * 1024 - 64;

}  // namespace

cudaError_t norm(const Norm& args, int capacity, cudaStream_t stream) {
  return launch(norm_kernel, dim3(capacity), kThreads, 0, 1, stream, args);
}

cudaError_t norm_and_router(const Norm& args, const Router& router, int capacity, cudaStream_t stream) {
  const int memory = round_up(args.width, kBlockK) * 2;
  if (capacity < kManyRows || memory * kSharingRows > kMaxMemory) {
    return launch(router_row_kernel, dim3(capacity, ceil_div(router.experts, kWarps)), kThreads, memory, 1, stream, args, router);
  }
  // Enough blocks of experts to occupy all multiprocessors.
  const int across = ceil_div(capacity, kSharingRows), groups = ceil_div(router.experts, kWarps * kSharingExperts);
  const int down = std::min(groups, ceil_div(multiprocessors(), across));
  return launch(router_kernel<kSharingRows, kSharingExperts>, dim3(across, down), kThreads, memory * kSharingRows, 1, stream, args, router);
}

cudaError_t embedding(const Embedding& args, int capacity, cudaStream_t stream) {
  return launch(embedding_kernel, dim3(capacity), kThreads, 0, 1, stream, args);
}

cudaError_t prepare_norm() {
  const int memory = kMaxWidth * 2;
  cudaError_t error = prepare(reinterpret_cast<const void*>(norm_kernel), 0);
  if (error == cudaSuccess) error = prepare(reinterpret_cast<const void*>(router_row_kernel), memory);
  if (error == cudaSuccess)
    error = prepare(reinterpret_cast<const void*>(router_kernel<kSharingRows, kSharingExperts>), kMaxMemory);
  if (error == cudaSuccess) error = prepare(reinterpret_cast<const void*>(embedding_kernel), 0);
  return error;
}

}  // namespace fd::cuda
