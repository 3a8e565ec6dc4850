// Attention of 64 rows per warpgroup against tiles of 64 keys. A row is one query head of one token.
//
// Decoding and prompts use one kernel, so that they give the same bits: S = Q K^T and O = P V by wgmma, online softmax
// in base 2 within segments of 512 keys, merged in order (numeric contract sm90-1). For prompts, a block processes all
// segments of its rows. For decoding, each block processes one segment, and the last block to finish merges.
#pragma once

#include "attention.h"
#include "hopper.cuh"
#include "step.cuh"

namespace fd::cuda {

template <int kHeadDim_, int kWarpgroups_, int kSlots_, bool kDecodes_>
struct AttentionShape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kSlots = kSlots_;  // slots of the ring: tiles of keys or values
  static constexpr bool kDecodes = kDecodes_;
  static constexpr int kHalves = kHeadDim / kBlockK;
  static constexpr int kRows = kWarpgroups * 64;
  static constexpr int kConsumers = kWarpgroups * 128;
  // Two consumer warpgroups take registers from the producer's, which works for whole warpgroups only.
  static constexpr bool kShiftsRegisters = kWarpgroups == 2;
  static constexpr int kThreads = kConsumers + (kShiftsRegisters ? 128 : 32);
  static constexpr int kTileBytes = kHalves * kBlockBytes;  // bytes of a tile of keys, or of values
  static constexpr int kMemory =
      1024 + (kWarpgroups + kSlots) * kTileBytes + kSlots * 16 + (kMaxSequences + 1) * 4 + 16;
};

// Work item of a block.
struct AttentionItem {
  int sequence;
  int head;       // kv head
  int first_row;  // among the rows of this sequence and head
  int rows;       // all rows of the sequence and head
  int first_tile;
  int last_tile;  // exclusive
  int segments;   // decoding: segments of the sequence
};

// Number of items of a sequence; 0 if the kernel of the other shape computes it.
template <class Shape>
__device__ __forceinline__ int items_of(const StepView& step, const Attention& args, int sequence) {
  const int length = step.length(sequence), context = step.start[sequence] + length;
  if (Shape::kDecodes != (length == 1)) return 0;
  const int parts = Shape::kDecodes ? ceil_div(context, kCacheBlock * kSegmentTiles)
                                    : ceil_div(length * (args.heads / args.kv_heads), Shape::kRows);
  return parts * args.kv_heads;
}

// Run by one warp: writes first_item[s] for all sequences, and the total after them.
template <class Shape>
__device__ __forceinline__ void find_items(const StepView& step, const Attention& args, int* first_item, int lane) {
  int before = 0;
  for (int first = 0; first < step.num_sequences; first += 32) {
    const int sequence = first + lane;
    const int items = sequence < step.num_sequences ? items_of<Shape>(step, args, sequence) : 0;
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

template <class Shape>
__device__ __forceinline__ AttentionItem item_at(const StepView& step, const Attention& args, const int* first_item,
                                                 int index) {
  int low = 0;
  for (int high = step.num_sequences; high - low > 1;) {
    const int middle = (low + high) / 2;
    (first_item[middle] <= index ? low : high) = middle;
  }
  const int group = args.heads / args.kv_heads, length = step.length(low), local = index - first_item[low];
  AttentionItem item{low, local % args.kv_heads, 0, length * group, 0, 0, 0};
  const int part = local / args.kv_heads;
  if constexpr (Shape::kDecodes) {
    const int tiles = ceil_div(step.start[low] + 1, kCacheBlock);
    item.segments = ceil_div(tiles, kSegmentTiles);
    item.first_tile = part * kSegmentTiles;
    item.last_tile = min(tiles, item.first_tile + kSegmentTiles);
  } else {
    // Longest contexts first, so that short ones balance the load at the end.
    item.first_row = (ceil_div(item.rows, Shape::kRows) - 1 - part) * Shape::kRows;
    const int last_row = min(item.rows, item.first_row + Shape::kRows) - 1;
    item.last_tile = (step.start[low] + last_row / group) / kCacheBlock + 1;
  }
  return item;
}

// Unnormalised softmax over part of the keys, for rows r and r + 8 of each thread.
template <int kHeadDim>
struct Partial {
  float out[kHeadDim / 2];
  float maximum[2];
  float sum[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0f;
    for (int half = 0; half < 2; ++half) maximum[half] = -INFINITY, sum[half] = 0.0f;
  }
};

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

// Starts scores = queries keys^T of one tile.
template <int kHeadDim>
__device__ __forceinline__ void start_scores(float (&scores)[32], const uint8_t* queries, const uint8_t* keys) {
  const uint64_t q = operand(queries), k = operand(keys);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int at = step / 4 * (kBlockBytes / 16) + step % 4 * 2;
    wgmma<64>(scores, q + at, k + at, step > 0);
  }
  wgmma_commit();
}

// Starts out += weights values of one tile.
template <int kHeadDim>
__device__ __forceinline__ void start_values(float (&out)[kHeadDim / 2], const uint32_t (&weights)[4][4],
                                             const uint8_t* values) {
  const uint64_t v = operand(values, kBlockBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) wgmma_transposed<kHeadDim>(out, weights[step], v + step * 128, 1);
  wgmma_commit();
}

// Maxima and sums of this thread's two rows in the current segment. A sum is only this thread's share.
struct Softmax {
  float maximum[2];
  float sum[2];

  __device__ __forceinline__ void clear() {
    for (int half = 0; half < 2; ++half) maximum[half] = -INFINITY, sum[half] = 0.0f;
  }

  // Adds a tile: scores become weights, rounded to bfloat16; `factor` rescales the previous results.
  __device__ __forceinline__ void add(float (&scores)[32], float scale, float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 16; ++i) highest = fmaxf(highest, scores[i / 2 * 4 + half * 2 + i % 2]);
      const float now = fmaxf(maximum[half], __fmul_rn(row_maximum(highest), scale));
      const float base = now == -INFINITY ? 0.0f : now;
      factor[half] = exp2_fast(maximum[half] - base);
      maximum[half] = now;
      float added = 0.0f;
#pragma unroll
      for (int eight = 0; eight < 8; ++eight) {
        float &low = scores[eight * 4 + half * 2], &high = scores[eight * 4 + half * 2 + 1];
        const uint32_t pair =
            pack_bfloat16(exp2_fast(__fmaf_rn(low, scale, -base)), exp2_fast(__fmaf_rn(high, scale, -base)));
        low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000);
        // Sum the rounded weights, which are the ones that are multiplied.
        added += low;
        added += high;
      }
      sum[half] = __fmaf_rn(sum[half], factor[half], added);
    }
  }
};

// Packs the rounded weights for wgmma. Not part of Softmax::add, because registers that a wgmma reads must not be
// written while one is in progress.
__device__ __forceinline__ void pack_weights(const float (&rounded)[32], uint32_t (&weights)[4][4]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    weights[i / 4][i % 4] = __byte_perm(__float_as_uint(rounded[2 * i]), __float_as_uint(rounded[2 * i + 1]), 0x7632);
  }
}

// Masks the keys of a tile beyond the positions of this thread's two rows.
__device__ __forceinline__ void hide_keys(float (&scores)[32], int first_key, const int (&position)[2]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int key = first_key + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    if (key > position[i / 2 % 2]) scores[i] = -INFINITY;
  }
}

// One side's view of the ring of tiles. Keys are one tile ahead of values: k0 k1 v0 k2 v1 ...
template <class Shape>
struct TileRing {
  uint8_t* slots;
  uint64_t* full;
  uint64_t* empty;
  int slot = 0;
  uint32_t phase = 0;

  __device__ uint8_t* tile() const { return slots + slot * Shape::kTileBytes; }
  __device__ void advance() {
    if (++slot == Shape::kSlots) slot = 0, phase ^= 1;
  }
  // For consumers. Returns the slot; take() advances past it and release() returns it to the producer.
  __device__ int take() {
    barrier_wait(full + slot, phase);
    const int taken = slot;
    advance();
    return taken;
  }
  __device__ void release(int taken) const {
    if (threadIdx.x % 128 == 0) barrier_arrive(empty + taken);
  }
  __device__ const uint8_t* at(int taken) const { return slots + taken * Shape::kTileBytes; }
  // Products keep the warps of a warpgroup together; skipping needs a barrier. Without one, a warp could fall behind by
  // a whole ring and wait for a phase of its slot that began and ended meanwhile.
  __device__ void skip() {
    const int taken = take();
    named_barrier(1 + threadIdx.x / 128, 128);
    release(taken);
  }
};

// Run by one thread: streams the tiles of all items of this block.
template <class Shape>
__device__ void produce_tiles(const StepView& step, const Attention& args, const int* first_item,
                              TileRing<Shape> ring) {
  const int items = first_item[step.num_sequences];
  for (int index = blockIdx.x; index < items; index += gridDim.x) {
    const AttentionItem item = item_at<Shape>(step, args, first_item, index);
    const int32_t* const table = step.block_tables + int64_t{item.sequence} * step.table_width;
    const auto fetch = [&](const uint8_t* cache, int tile) {
      barrier_wait(ring.empty + ring.slot, ring.phase ^ 1);
      barrier_arrive_expect(ring.full + ring.slot, Shape::kTileBytes);
      bulk_copy(ring.tile(), cache + in_cache(table[tile], args.kv_heads, item.head, Shape::kHeadDim, 0, 0),
                Shape::kTileBytes, ring.full + ring.slot);
      ring.advance();
    };
    fetch(args.keys, item.first_tile);
    for (int tile = item.first_tile; tile < item.last_tile; ++tile) {
      if (tile + 1 < item.last_tile) fetch(args.keys, tile + 1);
      fetch(args.values, tile);
    }
  }
}

// Copies 64 rows of queries to shared memory; missing rows become zeros.
template <class Shape>
__device__ __forceinline__ void fetch_queries(const StepView& step, const Attention& args, const AttentionItem& item,
                                              int first_row, uint8_t* queries) {
  const int group = args.heads / args.kv_heads, first_token = step.first_token[item.sequence];
  const int64_t stride = int64_t{args.heads + 2 * args.kv_heads} * Shape::kHeadDim;
  for (int i = threadIdx.x % 128; i < 64 * Shape::kHeadDim / 8; i += 128) {
    const int row = i / (Shape::kHeadDim / 8), k = i % (Shape::kHeadDim / 8) * 8;
    uint4 piece{};
    if (first_row + row < item.rows) {
      const int token = first_token + (first_row + row) / group, head = item.head * group + (first_row + row) % group;
      piece = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(args.qkv) + token * stride +
                                              head * Shape::kHeadDim + k);
    }
    *reinterpret_cast<uint4*>(queries + k / kBlockK * kBlockBytes + in_block(row, k % kBlockK)) = piece;
  }
}

template <class Shape>
__device__ __forceinline__ uint8_t* out_place(const Attention& args, int token, int head, int i) {
  const int width = args.heads * Shape::kHeadDim;
  return args.out + in_activations(token, head * Shape::kHeadDim + i, width / kBlockK);
}

template <class Shape>
__device__ __forceinline__ void write_rows(const StepView& step, const Attention& args, const AttentionItem& item,
                                           int first_row, const Partial<Shape::kHeadDim>& state) {
  const int group = args.heads / args.kv_heads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + half * 8;
    if (row >= item.rows) continue;
    const int token = step.first_token[item.sequence] + row / group, head = item.head * group + row % group;
#pragma unroll
    for (int eight = 0; eight < Shape::kHeadDim / 8; ++eight) {
      *reinterpret_cast<uint32_t*>(out_place<Shape>(args, token, head, eight * 8 + threadIdx.x % 4 * 2)) =
          pack_bfloat16(__fdiv_rn(state.out[eight * 4 + half * 2], state.sum[half]),
                        __fdiv_rn(state.out[eight * 4 + half * 2 + 1], state.sum[half]));
    }
  }
}

// Partial result of a segment: [kMaxGroupHeads][head_dim] values, then their maxima and sums.
template <class Shape>
__device__ __forceinline__ float* partial_at(const Attention& args, int item) {
  return args.partial + int64_t{item} * kMaxGroupHeads * (Shape::kHeadDim + 2);
}

template <class Shape>
__device__ __forceinline__ void save_partial(const Attention& args, const AttentionItem& item, int index,
                                             const Partial<Shape::kHeadDim>& state) {
  // Rows 0 to 15 belong to the first warp.
  if (threadIdx.x >= 32) return;
  float* const place = partial_at<Shape>(args, index);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = threadIdx.x / 4 + half * 8;
    if (row >= item.rows) continue;
#pragma unroll
    for (int eight = 0; eight < Shape::kHeadDim / 8; ++eight) {
      *reinterpret_cast<float2*>(place + row * Shape::kHeadDim + eight * 8 + threadIdx.x % 4 * 2) =
          make_float2(state.out[eight * 4 + half * 2], state.out[eight * 4 + half * 2 + 1]);
    }
    if (threadIdx.x % 4 == 0) {
      place[kMaxGroupHeads * Shape::kHeadDim + row] = state.maximum[half];
      place[kMaxGroupHeads * (Shape::kHeadDim + 1) + row] = state.sum[half];
    }
  }
}

// Merges all segments in order; runs in the last block of a sequence and head to finish.
template <class Shape>
__device__ __forceinline__ void merge_segments(const StepView& step, const Attention& args, const AttentionItem& item,
                                               int first_index) {
  const int group = args.heads / args.kv_heads;
  for (int i = threadIdx.x * 2; i < item.rows * Shape::kHeadDim; i += 256) {
    const int row = i / Shape::kHeadDim, column = i % Shape::kHeadDim;
    float low = 0.0f, high = 0.0f, maximum = -INFINITY, sum = 0.0f;
    for (int segment = 0; segment < item.segments; ++segment) {
      const float* const part = partial_at<Shape>(args, first_index + segment * args.kv_heads);
      // Written by other blocks, so bypass the L1 cache.
      const float2 out = __ldcg(reinterpret_cast<const float2*>(part + row * Shape::kHeadDim + column));
      const Merger merge(maximum, __ldcg(part + kMaxGroupHeads * Shape::kHeadDim + row));
      low = merge(low, out.x), high = merge(high, out.y);
      sum = merge(sum, __ldcg(part + kMaxGroupHeads * (Shape::kHeadDim + 1) + row));
      maximum = merge.maximum;
    }
    *reinterpret_cast<uint32_t*>(out_place<Shape>(args, step.first_token[item.sequence], item.head * group + row,
                                                  column)) = pack_bfloat16(__fdiv_rn(low, sum), __fdiv_rn(high, sum));
  }
}

// Computes attention of 64 rows to tiles [first, last), last > first: part of the keys, or for prompts all of them,
// segment by segment. Pipelined: while the softmax of a tile is computed, wgmma computes the scores of the next tile
// and the values of the previous one. `skips`: the ring holds tiles after `last` that only the other warpgroup uses.
template <class Shape>
__device__ __forceinline__ void attend(Partial<Shape::kHeadDim>& result, TileRing<Shape>& ring, const uint8_t* queries,
                                       float scale, int first, int last, const int (&position)[2], int first_position,
                                       bool skips) {
  constexpr int kHeadDim = Shape::kHeadDim;
  float scores[32], out[kHeadDim / 2], factor[2];
  uint32_t weights[4][4];
  Softmax softmax;
  softmax.clear();
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0f;

  const auto weigh = [&](int tile) {
    if (tile * kCacheBlock + kCacheBlock - 1 > first_position) hide_keys(scores, tile * kCacheBlock, position);
    softmax.add(scores, scale, factor);
  };
  const auto merge = [&](const Softmax& ended) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (Shape::kDecodes) {
        // A single segment: the same result as merging it with an empty one.
        result.maximum[half] = ended.maximum[half], result.sum[half] = row_sum(ended.sum[half]);
#pragma unroll
        for (int i = 0; i < kHeadDim / 4; ++i) result.out[i / 2 * 4 + half * 2 + i % 2] = out[i / 2 * 4 + half * 2 + i % 2];
        continue;
      }
      const Merger merger(result.maximum[half], ended.maximum[half]);
      result.maximum[half] = merger.maximum;
      result.sum[half] = merger(result.sum[half], row_sum(ended.sum[half]));
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) {
        const int at = i / 2 * 4 + half * 2 + i % 2;
        result.out[at] = merger(result.out[at], out[at]);
      }
    }
  };

  int keys = ring.take();
  start_scores<kHeadDim>(scores, queries, ring.at(keys));
  wgmma_wait<0>();
  ring.release(keys);
  weigh(first);
  pack_weights(scores, weights);
  for (int tile = first; tile + 1 < last; ++tile) {
    keys = ring.take();
    start_scores<kHeadDim>(scores, queries, ring.at(keys));
    const int values = ring.take();
    start_values<kHeadDim>(out, weights, ring.at(values));
    wgmma_wait<1>();
    ring.release(keys);
    const bool ends = !Shape::kDecodes && tile % kSegmentTiles == kSegmentTiles - 1;
    const Softmax ended = softmax;
    if (ends) softmax.clear();
    weigh(tile + 1);
    wgmma_wait<0>();
    ring.release(values);
    if (ends) {
      merge(ended);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= factor[i / 2 % 2];
    }
    pack_weights(scores, weights);
  }
  if (skips) ring.skip();
  const int values = ring.take();
  start_values<kHeadDim>(out, weights, ring.at(values));
  wgmma_wait<0>();
  ring.release(values);
  merge(softmax);
}

template <class Shape>
__global__ __launch_bounds__(Shape::kThreads, Shape::kDecodes ? 2 : 1) void attention_kernel(
    const __grid_constant__ Attention args) {
  extern __shared__ uint8_t memory[];
  uint8_t* const queries = memory + (1024 - shared_address(memory) % 1024) % 1024;
  uint8_t* const slots = queries + Shape::kWarpgroups * Shape::kTileBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(slots + Shape::kSlots * Shape::kTileBytes);
  uint64_t* const empty = full + Shape::kSlots;
  int* const first_item = reinterpret_cast<int*>(empty + Shape::kSlots);
  int* const is_last = first_item + kMaxSequences + 1;
  TileRing<Shape> ring{slots, full, empty};

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool is_producer = warp == Shape::kConsumers / 32;
  let_successor_start();
  if (is_producer && lane == 0) {
    for (int i = 0; i < Shape::kSlots; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, Shape::kWarpgroups);
    }
    barrier_init_fence();
  }
  wait_for_predecessor();
  const StepView step(args.step);
  if (is_producer) {
    __syncwarp();
    find_items<Shape>(step, args, first_item, lane);
  }
  __syncthreads();
  if (warp >= Shape::kConsumers / 32) {
    if constexpr (Shape::kShiftsRegisters) lower_registers<40>();
    if (is_producer && lane == 0) produce_tiles<Shape>(step, args, first_item, ring);
    return;
  }
  if constexpr (Shape::kShiftsRegisters) raise_registers<232>();

  const int warpgroup = warp / 4, group = args.heads / args.kv_heads, items = first_item[step.num_sequences];
  uint8_t* const own_queries = queries + warpgroup * Shape::kTileBytes;
  for (int index = blockIdx.x; index < items; index += gridDim.x) {
    const AttentionItem item = item_at<Shape>(step, args, first_item, index);
    const int first_row = item.first_row + warpgroup * 64, start = step.start[item.sequence];
    fetch_queries<Shape>(step, args, item, first_row, own_queries);
    shared_proxy_fence();
    named_barrier(1 + warpgroup, 128);

    int position[2];
    for (int half = 0; half < 2; ++half) {
      position[half] = start + (first_row + warp % 4 * 16 + lane / 4 + half * 8) / group;
    }
    const int first_position = start + first_row / group;
    const int last_position = start + (min(item.rows, first_row + 64) - 1) / group;
    // The last tiles are invisible to a warpgroup with earlier rows.
    const int last = first_row < item.rows ? min(item.last_tile, last_position / kCacheBlock + 1) : item.first_tile;
    Partial<Shape::kHeadDim> result;
    result.clear();
    if (last > item.first_tile) {
      attend<Shape>(result, ring, own_queries, args.scale, item.first_tile, last, position, first_position,
                    last < item.last_tile);
    } else {
      ring.skip();
    }
    for (int tile = last; tile < item.last_tile; ++tile) {
      if (tile + 1 < item.last_tile) ring.skip();
      ring.skip();
    }
    if (!Shape::kDecodes || item.segments == 1) {
      write_rows<Shape>(step, args, item, first_row, result);
    } else {
      save_partial<Shape>(args, item, index, result);
      __threadfence();
      named_barrier(1, 128);
      int* const arrived = args.arrived + item.sequence * args.kv_heads + item.head;
      if (threadIdx.x == 0) {
        *is_last = atomicAdd(arrived, 1) == item.segments - 1;
        if (*is_last) *arrived = 0;
        __threadfence();
      }
      named_barrier(1, 128);
      if (*is_last) merge_segments<Shape>(step, args, item, first_item[item.sequence] + item.head);
    }
    // The queries of the next item overwrite these.
    named_barrier(1 + warpgroup, 128);
  }
}

}  // namespace fd::cuda
