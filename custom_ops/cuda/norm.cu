#include "norm.h"

#include <algorithm>

#include "hopper.cuh"
#include "launch.h"
#include "step.cuh"

namespace fd::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Sums in the same tree for every row. `sums` has room for kWarps floats.
__device__ float block_sum(float x, float* sums) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float all = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) all += sums[warp];
  return all;
}

// Normalises a row into `normed` (bfloat16, zero-padded to whole blocks).
__device__ void normalise(const Norm& args, int row, __nv_bfloat16* normed, float* sums) {
  const float4* const x = reinterpret_cast<const float4*>(
      args.hidden_states + int64_t{args.rows == nullptr ? row : args.rows[row]} * args.width);
  const float4* const weight = reinterpret_cast<const float4*>(args.weight);
  const int fours = args.width / 4;
  float squares = 0.0f;
  // A single row is bound by memory latency: issue several loads at once.
#pragma unroll 4
  for (int i = threadIdx.x; i < fours; i += kThreads) {
    const float4 v = x[i];
    squares = __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmaf_rn(v.x, v.x, squares))));
  }
  const float factor = rsqrtf(block_sum(squares, sums) / static_cast<float>(args.width) + args.epsilon);
#pragma unroll 4
  for (int i = threadIdx.x; i < round_up(args.width, kBlockK) / 4; i += kThreads) {
    const bool is_there = i < fours;
    const float4 v = is_there ? x[i] : float4{}, w = is_there ? weight[i] : float4{};
    __nv_bfloat162* const place = reinterpret_cast<__nv_bfloat162*>(normed) + 2 * i;
    place[0] = __floats2bfloat162_rn(v.x * factor * w.x, v.y * factor * w.y);
    place[1] = __floats2bfloat162_rn(v.z * factor * w.z, v.w * factor * w.w);
  }
  __syncthreads();
}

__device__ void write_row(const Norm& args, int row, const __nv_bfloat16* normed) {
  const int k_blocks = ceil_div(args.width, kBlockK);
  for (int piece = threadIdx.x; piece < k_blocks * 8; piece += kThreads) {
    *reinterpret_cast<uint4*>(args.out + in_activations(row, piece * 8, k_blocks)) =
        *reinterpret_cast<const uint4*>(normed + piece * 8);
  }
}

__global__ __launch_bounds__(kThreads) void norm_kernel(const __grid_constant__ Norm args) {
  extern __shared__ __align__(16) __nv_bfloat16 normed[];
  __shared__ float sums[kWarps];
  let_successor_start();
  wait_for_predecessor();
  const int count = *args.count;
  for (int row = blockIdx.x; row < count; row += gridDim.x) {
    normalise(args, row, normed, sums);
    write_row(args, row, normed);
    __syncthreads();
  }
}

// kRows rows share each loaded weight, and the kExperts experts of a warp share each row. blockIdx.y processes every
// gridDim.y-th group of experts.
template <int kRows, int kExperts>
__global__ __launch_bounds__(kThreads) void router_kernel(const __grid_constant__ Norm args, Router router) {
  constexpr int kGroup = kWarps * kExperts;
  extern __shared__ __align__(16) __nv_bfloat16 normed[];
  __shared__ float sums[kWarps];
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * kExperts;
  let_successor_start();
  if (kRows == 1) {
    // A single row is bound by memory latency, and the weights do not depend on the previous kernel.
    const int expert = blockIdx.y * kGroup + own;
    for (int k = lane * 32; expert < router.experts && k < args.width; k += 1024) {
      prefetch(router.weights + int64_t{expert} * args.width + k);
    }
  }
  wait_for_predecessor();
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    for (int i = threadIdx.x; i < router.experts; i += kThreads) router.counts[i] = 0;
  }
  const int first = blockIdx.x * kRows, rows = min(kRows, *args.count - first), width = round_up(args.width, kBlockK);
  if (rows <= 0) return;
  for (int i = 0; i < rows; ++i) {
    normalise(args, first + i, normed + i * width, sums);
    if (blockIdx.y == 0) write_row(args, first + i, normed + i * width);
  }
  for (int expert = blockIdx.y * kGroup + own; expert < router.experts; expert += gridDim.y * kGroup) {
    const float* const weights = router.weights + int64_t{expert} * args.width;
    // With an odd number of experts, the last one is computed twice.
    const int64_t next = kExperts > 1 && expert + 1 < router.experts ? args.width : 0;
    float dots[kRows][kExperts] = {};
#pragma unroll(kRows == 1 ? 10 : 1)
    for (int k = lane * 4; k < args.width; k += 128) {
      float4 weight[kExperts];
#pragma unroll
      for (int e = 0; e < kExperts; ++e) weight[e] = *reinterpret_cast<const float4*>(weights + e * next + k);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const __nv_bfloat162* const x = reinterpret_cast<const __nv_bfloat162*>(normed + i * width + k);
        const float2 low = __bfloat1622float2(x[0]), high = __bfloat1622float2(x[1]);
#pragma unroll
        for (int e = 0; e < kExperts; ++e) {
          float& dot = dots[i][e];
          dot = __fmaf_rn(low.y, weight[e].y, __fmaf_rn(low.x, weight[e].x, dot));
          dot = __fmaf_rn(high.y, weight[e].w, __fmaf_rn(high.x, weight[e].z, dot));
        }
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
  const int memory = round_up(args.width, kBlockK) * 2;
  return launch(norm_kernel, dim3(capacity), kThreads, memory, 1, stream, args);
}

cudaError_t norm_and_router(const Norm& args, const Router& router, int capacity, cudaStream_t stream) {
  const int memory = round_up(args.width, kBlockK) * 2;
  if (capacity < kManyRows || memory * kSharingRows > kMaxMemory) {
    return launch(router_kernel<1, 1>, dim3(capacity, ceil_div(router.experts, kWarps)), kThreads, memory, 1, stream, args, router);
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
  cudaError_t error = prepare(reinterpret_cast<const void*>(norm_kernel), memory);
  if (error == cudaSuccess) error = prepare(reinterpret_cast<const void*>(router_kernel<1, 1>), memory);
  if (error == cudaSuccess)
    error = prepare(reinterpret_cast<const void*>(router_kernel<kSharingRows, kSharingExperts>), kMaxMemory);
  if (error == cudaSuccess) error = prepare(reinterpret_cast<const void*>(embedding_kernel), 0);
  return error;
}

}  // namespace fd::cuda
