// What both attention kernels have in common, so that they give the same bits (numeric contract sm90-2).
//
// A tile is 64 keys, a segment four tiles, counted from position 0. Within a segment: S = Q K^T and O = P V in chains of
// products of 16 columns, online softmax in base 2 with weights P rounded to bfloat16. The results of the segments are
// merged in ascending order. A row is one query head of one token.
#pragma once

#include "attention.h"
#include "hopper.cuh"
#include "step.cuh"

namespace fd::cuda {

// Weights for merging a running result with a later part. A part without visible keys has maximum -infinity.
struct Merger {
  float maximum, running, later;

  __device__ __forceinline__ Merger(float running_maximum, float later_maximum)
      : maximum(fmaxf(running_maximum, later_maximum)) {
    const float base = maximum == -INFINITY ? 0.0f : maximum;
    running = exp2_fast(running_maximum - base);
    later = exp2_fast(later_maximum - base);
  }
  __device__ __forceinline__ float operator()(float a, float b) const {
    return __fmaf_rn(b, later, __fmul_rn(a, running));
  }
};

// The sum over the four threads that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float row_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Scores of two rows and 16 keys become weights, rounded to bfloat16: a thread holds scores [key group of 8][row][2].
// Returns this thread's share of the sum of the rounded weights, which are the ones that are multiplied.
__device__ __forceinline__ float weigh_sixteen(float* scores, int row, float scale, float base) {
  float sum = 0.0f;
#pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
    float &low = scores[eight * 4 + row * 2], &high = scores[eight * 4 + row * 2 + 1];
    const uint32_t pair =
        pack_bfloat16(exp2_fast(__fmaf_rn(low, scale, -base)), exp2_fast(__fmaf_rn(high, scale, -base)));
    low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000);
    sum = eight == 0 ? low + high : sum + (low + high);
  }
  return sum;
}

// Maximum and sum of a row in the current segment. The sum is only this thread's share.
struct RowSoftmax {
  float maximum = -INFINITY;
  float sum = 0.0f;

  // Raises the maximum to that of a tile; returns the factor that rescales the previous results.
  __device__ __forceinline__ float raise(float highest, float scale) {
    const float before = maximum;
    maximum = fmaxf(maximum, __fmul_rn(highest, scale));
    return exp2_fast(before - base());
  }
  __device__ __forceinline__ float base() const { return maximum == -INFINITY ? 0.0f : maximum; }

  // Adds the shares of the four times 16 keys of a tile.
  __device__ __forceinline__ void add(float factor, float a, float b, float c, float d) {
    sum = __fmaf_rn(sum, factor, (a + b) + (c + d));
  }
};

__device__ __forceinline__ uint8_t* out_place(const Attention& args, int head_dim, int token, int head, int i) {
  return args.out + in_activations(token, head * head_dim + i, args.heads * head_dim / kBlockK);
}

// Run by one warp: writes the number of items before each sequence, and their total.
template <class ItemsOf>
__device__ __forceinline__ void find_items(const StepView& step, int* first_item, int lane, ItemsOf items_of) {
  int before = 0;
  for (int first = 0; first < step.num_sequences; first += 32) {
    const int sequence = first + lane;
    const int items = sequence < step.num_sequences ? items_of(sequence) : 0;
    int until = items;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, until, distance);
      if (lane >= distance) until += other;
    }
    if (sequence < step.num_sequences) first_item[sequence] = before + until - items;
    before += __shfl_sync(~0u, until, 31);
  }
  if (lane == 0) first_item[step.num_sequences] = before;
}

// The sequence of an item; one without items is never found.
__device__ __forceinline__ int sequence_of_item(const int* first_item, int num_sequences, int item) {
  int low = 0;
  for (int high = num_sequences; high - low > 1;) {
    const int middle = (low + high) / 2;
    (first_item[middle] <= item ? low : high) = middle;
  }
  return low;
}

}  // namespace fd::cuda
