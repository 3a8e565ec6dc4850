// Results of the decoding kernel, and their merging across blocks.
#pragma once

#include "attention_shares.cuh"

namespace fd::cuda {

// Floats of a partial result: [group][head_dim] values, then maximum and sum of each row.
template <class Shape>
__device__ __forceinline__ int partial_floats(const Attention& args) {
  return round_up(args.heads / args.kv_heads * (Shape::kHeadDim + 2), 4);
}

template <class Shape>
__device__ __forceinline__ float* partial_at(const Attention& args, int segment) {
  return args.partial + int64_t{segment} * partial_floats<Shape>(args);
}

// Result for rows lane / 4 and + 8: columns 8 e + lane % 4 * 2 and the next one of this warp's.
template <class Shape>
struct Result {
  float out[Shape::kColumns / 2];
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; ++i) out[i] = 0.0f;
    for (int half = 0; half < 2; ++half) maximum[half] = -INFINITY, sum[half] = 0.0f;
  }

  __device__ __forceinline__ void merge(const float (&later)[Shape::kColumns / 2], const RowSoftmax (&rows)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Merger merger(maximum[half], rows[half].maximum);
      maximum[half] = merger.maximum;
      sum[half] = merger(sum[half], row_sum(rows[half].sum));
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 4; ++i) {
        const int at = i / 2 * 4 + half * 2 + i % 2;
        out[at] = merger(out[at], later[at]);
      }
    }
  }

  // Calls place(row, column, low, high) for two columns at a time of rows below `group`.
  template <class Place>
  __device__ __forceinline__ void each(int group, Place place) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8;
      if (row >= group) continue;
#pragma unroll
      for (int eight = 0; eight < Shape::kColumns / 8; ++eight) {
        place(row, threadIdx.x / 32 * Shape::kColumns + eight * 8 + lane % 4 * 2, out[eight * 4 + half * 2],
              out[eight * 4 + half * 2 + 1], half);
      }
    }
  }

  __device__ __forceinline__ void write(const Attention& args, int token, int head) const {
    const int group = args.heads / args.kv_heads;
    each(group, [&](int row, int column, float low, float high, int half) {
      *reinterpret_cast<uint32_t*>(out_place(args, Shape::kHeadDim, token, head * group + row, column)) =
          pack_bfloat16(__fdiv_rn(low, sum[half]), __fdiv_rn(high, sum[half]));
    });
  }

  __device__ __forceinline__ void save(const Attention& args, int segment) const {
    const int group = args.heads / args.kv_heads;
    float* const place = partial_at<Shape>(args, segment);
    each(group, [&](int row, int column, float low, float high, int half) {
      *reinterpret_cast<float2*>(place + row * Shape::kHeadDim + column) = make_float2(low, high);
      if (column == 0) {
        *reinterpret_cast<float2*>(place + group * Shape::kHeadDim + row * 2) = make_float2(maximum[half], sum[half]);
      }
    });
  }
};

// Merges the parts of a sequence and head in order: the first part's result, which is at its last segment, and the
// segments after it. The copy engine gathers them in the memory of the ring, which is unused by now.
template <class Shape>
__device__ __forceinline__ void merge_parts(const Attention& args, Memory<Shape>& memory, const Part& part, int token,
                                            int merged, uint32_t& phase) {
  constexpr int kRowsOfWarp = 2, kEach = Shape::kHeadDim / 32;
  struct alignas(kEach * 4) Columns {
    float x[kEach];
  };
  const int warp = threadIdx.x / 32, group = args.heads / args.kv_heads, column = threadIdx.x % 32 * kEach;
  const int size = partial_floats<Shape>(args), most = sizeof(memory.slots) / 4 / size;
  const float* const gathered = reinterpret_cast<const float*>(memory.slots);
  for (int first_row = warp; first_row - warp < group; first_row += kRowsOfWarp * kWarps) {
    float out[kRowsOfWarp][kEach] = {}, maximum[kRowsOfWarp], sum[kRowsOfWarp] = {};
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) maximum[i] = -INFINITY;
    for (int first = merged - 1; first < part.segments; first += most, phase ^= 1) {
      const int count = min(most, part.segments - first);
      named_barrier(1, kConsumers);
      if (threadIdx.x == 0) {
        proxy_fence();
        barrier_arrive_expect(&memory.gathered, count * size * 4);
        bulk_copy(memory.slots, partial_at<Shape>(args, part.begin + first), count * size * 4, &memory.gathered);
      }
      barrier_wait(&memory.gathered, phase);
#pragma unroll 1
      for (int segment = 0; segment < count; ++segment) {
        const float* const from = gathered + segment * size;
#pragma unroll
        for (int i = 0; i < kRowsOfWarp; ++i) {
          const int row = min(first_row + i * kWarps, group - 1);
          const float2 softmax = *reinterpret_cast<const float2*>(from + group * Shape::kHeadDim + row * 2);
          const Columns later = *reinterpret_cast<const Columns*>(from + row * Shape::kHeadDim + column);
          const Merger merge(maximum[i], softmax.x);
#pragma unroll
          for (int j = 0; j < kEach; ++j) out[i][j] = merge(out[i][j], later.x[j]);
          sum[i] = merge(sum[i], softmax.y);
          maximum[i] = merge.maximum;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int row = first_row + i * kWarps;
      if (row >= group) break;
      uint32_t* const place =
          reinterpret_cast<uint32_t*>(out_place(args, Shape::kHeadDim, token, part.head * group + row, column));
#pragma unroll
      for (int j = 0; j < kEach; j += 2) {
        place[j / 2] = pack_bfloat16(__fdiv_rn(out[i][j], sum[i]), __fdiv_rn(out[i][j + 1], sum[i]));
      }
    }
  }
}

// At the end of a block: its first and its last part may be shared with other blocks, and the last of them merges.
template <class Shape>
__device__ __forceinline__ void merge_shared_parts(const StepView& step, const Attention& args, Memory<Shape>& memory,
                                                   const Share& share) {
  const int first = share.first(blockIdx.x), until = share.first(blockIdx.x + 1);
  named_barrier(1, kConsumers);
  if (threadIdx.x == 0) {
    for (int end = 0; end < 2; ++end) {
      const Part part(step, args, memory.first_item, end == 0 ? first : until - 1, until);
      memory.merged[end] = 0;
      const bool is_whole = part.begin >= first && part.begin + part.segments <= until;
      if (is_whole || (end == 1 && part.begin <= first)) continue;
      const int first_block = share.block_of(part.begin);
      const int others = share.block_of(part.begin + part.segments - 1) - first_block;
      int* const arrived = args.arrived + part.sequence * args.kv_heads + part.head;
      if (count_arrival(arrived) != others) continue;
      *arrived = 0;
      memory.merged[end] = share.first(first_block + 1) - part.begin;
    }
  }
  named_barrier(1, kConsumers);
  uint32_t phase = 0;
  for (int end = 0; end < 2; ++end) {
    if (memory.merged[end] == 0) continue;
    const Part part(step, args, memory.first_item, end == 0 ? first : until - 1, until);
    merge_parts<Shape>(args, memory, part, step.first_token[part.sequence], memory.merged[end], phase);
  }
}

}  // namespace fd::cuda
