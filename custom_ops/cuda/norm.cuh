// The RMS norm of one row by one thread block, for all kernels that contain it.
#pragma once

#include "hopper.cuh"
#include "norm.h"

namespace fd::cuda {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;
// Up to this width a row and its weights are held in registers, because a single row is bound by memory latency.
constexpr int kHeldFours = 4, kHeldWidth = kHeldFours * kNormThreads * 4;

__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Sums in the same tree for every row. `sums` has room for kNormWarps floats.
__device__ __forceinline__ float block_sum(float x, float* sums) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float all = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kNormWarps; ++warp) all += sums[warp];
  return all;
}

// This thread's part of a row: groups of four floats, kNormThreads apart. Beyond the row, zeros.
struct HeldRow {
  float4 fours[kHeldFours];
};

__device__ __forceinline__ HeldRow load_held(const float* row, int width) {
  HeldRow held;
#pragma unroll
  for (int j = 0; j < kHeldFours; ++j) {
    const int i = threadIdx.x + j * kNormThreads;
    held.fours[j] = i < width / 4 ? reinterpret_cast<const float4*>(row)[i] : float4{};
  }
  return held;
}

__device__ __forceinline__ float add_squares(float4 v, float squares) {
  return __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmaf_rn(v.x, v.x, squares))));
}

__device__ __forceinline__ uint2 scaled(float4 v, float factor, float4 weight) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(v.x * factor * weight.x, v.y * factor * weight.y),
                       high = __floats2bfloat162_rn(v.z * factor * weight.z, v.w * factor * weight.w);
  return {*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)};
}

// Normalises a row, zero-padded to whole blocks of K. Calls `write(column, four bfloat16)`. `held` and `weights` are
// what load_held returns for this row and for `weight`.
template <class Write>
__device__ __forceinline__ void normalise(const float* row, const float* weight, int width, float epsilon,
                                          const HeldRow& held, const HeldRow& weights, float* sums, Write write) {
  const float4* const x = reinterpret_cast<const float4*>(row);
  const int padded = round_up(width, kBlockK);
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kHeldFours; ++j) squares = add_squares(held.fours[j], squares);
  for (int i = threadIdx.x + kHeldFours * kNormThreads; i < width / 4; i += kNormThreads) squares = add_squares(x[i], squares);
  const float factor = rsqrtf(block_sum(squares, sums) / static_cast<float>(width) + epsilon);
#pragma unroll
  for (int j = 0; j < kHeldFours; ++j) {
    const int i = threadIdx.x + j * kNormThreads;
    if (i < padded / 4) write(4 * i, scaled(held.fours[j], factor, weights.fours[j]));
  }
  for (int i = threadIdx.x + kHeldFours * kNormThreads; i < padded / 4; i += kNormThreads) {
    const bool is_there = i < width / 4;
    write(4 * i, scaled(is_there ? x[i] : float4{}, factor,
                        is_there ? reinterpret_cast<const float4*>(weight)[i] : float4{}));
  }
}

}  // namespace fd::cuda
