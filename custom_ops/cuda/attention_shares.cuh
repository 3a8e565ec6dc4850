// Shapes of the decoding kernel, and what each of its blocks computes.
#pragma once

#include "attention.cuh"

namespace fd::cuda {

constexpr int kWarps = 4;
constexpr int kConsumers = kWarps * 32;
constexpr int kThreads = kConsumers + 32;
constexpr int kRows = kMaxGroupHeads;
// Weights of a tile: rows of 64, padded so that eight rows begin in different banks.
constexpr int kWeightStride = kCacheBlock + 8;

template <int kHeadDim_, int kBlocksPerSm_>
struct Shape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;  // that fit
  static constexpr int kSlots = 12 / kBlocksPerSm * 128 / kHeadDim;  // slots of the ring: tiles of keys or values
  static constexpr int kTileBytes = kHeadDim / kBlockK * kBlockBytes;
  static constexpr int kColumns = kHeadDim / kWarps;  // of a warp
  static constexpr int kQueryBytes = kHeadDim / kBlockK * kRows * 128;
};

template <class Shape>
struct Memory {
  alignas(1024) uint8_t slots[Shape::kSlots][Shape::kTileBytes];
  alignas(1024) uint8_t queries[Shape::kQueryBytes];
  // Of the tiles in turns, so that one barrier a tile is enough.
  alignas(16) __nv_bfloat16 weights[2][kRows][kWeightStride];
  float4 sums[2][kRows][4];  // of a row, by lane: shares of the four warps
  float maxima[2][kRows][kWarps];
  uint64_t full[Shape::kSlots];
  uint64_t empty[Shape::kSlots];
  uint64_t gathered;
  int first_item[kMaxSequences + 1];
  int merged[2];
};

// The share of a block: segments [first, last) of all sequences and kv heads.
struct Share {
  int segments;
  int each;

  // Whole numbers of segments, so that few sequences are cut.
  __device__ Share(int segments, int blocks) : segments(segments), each(max(1, ceil_div(segments, blocks))) {}
  __device__ int first(int block) const { return min(segments, block * each); }
  __device__ int block_of(int segment) const { return segment / each; }
};

// Segments of one sequence and kv head that a block processes.
struct Part {
  int sequence;
  int head;
  int tiles;     // of the whole sequence
  int segments;  // of the whole sequence
  int first;     // first segment, counted from the begin of the sequence
  int last;      // exclusive
  int begin;     // index of segment 0 among all

  __device__ Part(const StepView& step, const Attention& args, const int* first_item, int index, int until)
      : sequence(sequence_of_item(first_item, step.num_sequences, index)) {
    tiles = step.start[sequence] / kCacheBlock + 1;
    segments = ceil_div(tiles, kSegmentTiles);
    head = (index - first_item[sequence]) / segments;
    begin = first_item[sequence] + head * segments;
    first = index - begin;
    last = min(segments, until - begin);
  }
  __device__ int first_tile() const { return first * kSegmentTiles; }
  __device__ int last_tile() const { return min(tiles, last * kSegmentTiles); }
};

}  // namespace fd::cuda
