// Attention of prompts: two warpgroups of 64 rows each against tiles of 64 keys, all keys of a row in one block.
#include "attention.cuh"
#include "launch.h"

namespace fd::cuda {
namespace {

template <int kHeadDim_>
struct Shape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarpgroups = 2;
  static constexpr int kSlots = 8;  // slots of the ring: tiles of keys or values
  static constexpr int kRows = kWarpgroups * 64;
  static constexpr int kConsumers = kWarpgroups * 128;
  // The consumer warpgroups take registers from the producer's, which works for whole warpgroups only.
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kTileBytes = kHeadDim / kBlockK * kBlockBytes;  // bytes of a tile of keys, or of values
  static constexpr int kMemory = 1024 + (kWarpgroups + kSlots) * kTileBytes + kSlots * 16 + (kMaxSequences + 1) * 4;
};

// Work item of a block.
struct Item {
  int sequence;
  int head;       // kv head
  int first_row;  // among the rows of this sequence and head
  int rows;       // all rows of the sequence and head
  int last_tile;  // exclusive
};

__device__ __forceinline__ Item item_at(const StepView& step, const Attention& args, const int* first_item, int rows,
                                        int index) {
  const int sequence = sequence_of_item(first_item, step.num_sequences, index);
  const int group = args.heads / args.kv_heads, local = index - first_item[sequence];
  Item item{sequence, local % args.kv_heads, 0, step.length(sequence) * group, 0};
  // Longest contexts first, so that short ones balance the load at the end.
  item.first_row = (ceil_div(item.rows, rows) - 1 - local / args.kv_heads) * rows;
  const int last_row = min(item.rows, item.first_row + rows) - 1;
  item.last_tile = (step.start[sequence] + last_row / group) / kCacheBlock + 1;
  return item;
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

// Starts out = weights values of one tile, plus `out` if `accumulate`.
template <int kHeadDim>
__device__ __forceinline__ void start_values(float (&out)[kHeadDim / 2], const uint32_t (&weights)[4][4],
                                             const uint8_t* values, bool accumulate) {
  const uint64_t v = operand(values, kBlockBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    wgmma_transposed<kHeadDim>(out, weights[step], v + step * 128, step > 0 || accumulate);
  }
  wgmma_commit();
}

// Packs the rounded weights for wgmma. Apart from their computation, because registers that a wgmma reads must not be
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
    const Item item = item_at(step, args, first_item, Shape::kRows, index);
    const int32_t* const table = step.block_tables + int64_t{item.sequence} * step.table_width;
    const auto fetch = [&](const uint8_t* cache, int tile) {
      barrier_wait(ring.empty + ring.slot, ring.phase ^ 1);
      barrier_arrive_expect(ring.full + ring.slot, Shape::kTileBytes);
      bulk_copy(ring.tile(), cache + in_cache(table[tile], args.kv_heads, item.head, Shape::kHeadDim, 0, 0),
                Shape::kTileBytes, ring.full + ring.slot);
      ring.advance();
    };
    fetch(args.keys, 0);
    for (int tile = 0; tile < item.last_tile; ++tile) {
      if (tile + 1 < item.last_tile) fetch(args.keys, tile + 1);
      fetch(args.values, tile);
    }
  }
}

// Copies 64 rows of queries to shared memory; missing rows become zeros.
template <int kHeadDim>
__device__ __forceinline__ void fetch_queries(const StepView& step, const Attention& args, const Item& item,
                                              int first_row, uint8_t* queries) {
  const int group = args.heads / args.kv_heads, first_token = step.first_token[item.sequence];
  const int64_t stride = int64_t{args.heads + 2 * args.kv_heads} * kHeadDim;
  for (int i = threadIdx.x % 128; i < 64 * kHeadDim / 8; i += 128) {
    const int row = i / (kHeadDim / 8), k = i % (kHeadDim / 8) * 8;
    uint4 piece{};
    if (first_row + row < item.rows) {
      const int token = first_token + (first_row + row) / group, head = item.head * group + (first_row + row) % group;
      piece = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(args.qkv) + token * stride +
                                              head * kHeadDim + k);
    }
    *reinterpret_cast<uint4*>(queries + k / kBlockK * kBlockBytes + in_block(row, k % kBlockK)) = piece;
  }
}

// Unnormalised results of rows r and r + 8 of each thread.
template <int kHeadDim>
struct Results {
  float out[kHeadDim / 2];
  float maximum[2];
  float sum[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = 0.0f;
    for (int half = 0; half < 2; ++half) maximum[half] = -INFINITY, sum[half] = 0.0f;
  }

  // Merges a segment.
  __device__ __forceinline__ void merge(const float (&later)[kHeadDim / 2], const RowSoftmax (&rows)[2]) {
    const Merger mergers[2] = {Merger(maximum[0], rows[0].maximum), Merger(maximum[1], rows[1].maximum)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[half] = mergers[half].maximum;
      sum[half] = mergers[half](sum[half], row_sum(rows[half].sum));
    }
    // A factor of 1 changes nothing, and maxima seldom rise.
    if (__any_sync(~0u, mergers[0].running != 1.0f || mergers[1].running != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] = __fmul_rn(out[i], mergers[i / 2 % 2].running);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) out[i] = __fmaf_rn(later[i], mergers[i / 2 % 2].later, out[i]);
  }
};

template <int kHeadDim>
__device__ __forceinline__ void write_rows(const StepView& step, const Attention& args, const Item& item, int first_row,
                                           const Results<kHeadDim>& results) {
  const int group = args.heads / args.kv_heads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + half * 8;
    if (row >= item.rows) continue;
    const int token = step.first_token[item.sequence] + row / group, head = item.head * group + row % group;
#pragma unroll
    for (int eight = 0; eight < kHeadDim / 8; ++eight) {
      *reinterpret_cast<uint32_t*>(out_place(args, kHeadDim, token, head, eight * 8 + threadIdx.x % 4 * 2)) =
          pack_bfloat16(__fdiv_rn(results.out[eight * 4 + half * 2], results.sum[half]),
                        __fdiv_rn(results.out[eight * 4 + half * 2 + 1], results.sum[half]));
    }
  }
}

// Computes attention of 64 rows to tiles [0, last), last > 0. Pipelined: while the softmax of a tile is computed, wgmma
// computes the scores of the next tile and the values of the previous one. `skips`: the ring holds tiles after `last`
// that only the other warpgroup uses.
template <class Shape>
__device__ __forceinline__ void attend(Results<Shape::kHeadDim>& results, TileRing<Shape>& ring, const uint8_t* queries,
                                       float scale, int last, const int (&position)[2], int first_position,
                                       bool skips) {
  constexpr int kHeadDim = Shape::kHeadDim;
  // Uninitialised: the first product of a chain overwrites them.
  float scores[32], out[kHeadDim / 2], factor[2];
  uint32_t weights[4][4];
  RowSoftmax rows[2];

  const auto weigh = [&](int tile) {
    if (tile * kCacheBlock + kCacheBlock - 1 > first_position) hide_keys(scores, tile * kCacheBlock, position);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int i = 0; i < 16; ++i) highest = fmaxf(highest, scores[i / 2 * 4 + half * 2 + i % 2]);
      factor[half] = rows[half].raise(row_maximum(highest), scale);
      float shares[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) shares[i] = weigh_sixteen(scores + i * 8, half, scale, rows[half].base());
      rows[half].add(factor[half], shares[0], shares[1], shares[2], shares[3]);
    }
  };

  int keys = ring.take();
  start_scores<kHeadDim>(scores, queries, ring.at(keys));
  wgmma_wait<0>();
  ring.release(keys);
  weigh(0);
  pack_weights(scores, weights);
  for (int tile = 0; tile + 1 < last; ++tile) {
    keys = ring.take();
    start_scores<kHeadDim>(scores, queries, ring.at(keys));
    const int values = ring.take();
    start_values<kHeadDim>(out, weights, ring.at(values), tile % kSegmentTiles != 0);
    wgmma_wait<1>();
    ring.release(keys);
    const bool ends = tile % kSegmentTiles == kSegmentTiles - 1;
    const RowSoftmax ended[2] = {rows[0], rows[1]};
    if (ends) rows[0] = RowSoftmax(), rows[1] = RowSoftmax();
    weigh(tile + 1);
    wgmma_wait<0>();
    ring.release(values);
    if (ends) {
      results.merge(out, ended);
    } else {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= factor[i / 2 % 2];
    }
    pack_weights(scores, weights);
  }
  if (skips) ring.skip();
  const int values = ring.take();
  start_values<kHeadDim>(out, weights, ring.at(values), (last - 1) % kSegmentTiles != 0);
  wgmma_wait<0>();
  ring.release(values);
  results.merge(out, rows);
}

template <class Shape>
__global__ __launch_bounds__(Shape::kThreads, 1) void prompts_kernel(const __grid_constant__ Attention args) {
  extern __shared__ uint8_t memory[];
  uint8_t* const queries = memory + (1024 - shared_address(memory) % 1024) % 1024;
  uint8_t* const slots = queries + Shape::kWarpgroups * Shape::kTileBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(slots + Shape::kSlots * Shape::kTileBytes);
  uint64_t* const empty = full + Shape::kSlots;
  int* const first_item = reinterpret_cast<int*>(empty + Shape::kSlots);
  TileRing<Shape> ring{slots, full, empty};

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = args.heads / args.kv_heads;
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
    find_items(step, first_item, lane, [&](int sequence) {
      const int length = step.length(sequence);
      return length == 1 ? 0 : ceil_div(length * group, Shape::kRows) * args.kv_heads;
    });
  }
  __syncthreads();
  if (warp >= Shape::kConsumers / 32) {
    lower_registers<40>();
    if (is_producer && lane == 0) produce_tiles<Shape>(step, args, first_item, ring);
    return;
  }
  raise_registers<232>();

  const int warpgroup = warp / 4, items = first_item[step.num_sequences];
  uint8_t* const own_queries = queries + warpgroup * Shape::kTileBytes;
  for (int index = blockIdx.x; index < items; index += gridDim.x) {
    const Item item = item_at(step, args, first_item, Shape::kRows, index);
    const int first_row = item.first_row + warpgroup * 64, start = step.start[item.sequence];
    fetch_queries<Shape::kHeadDim>(step, args, item, first_row, own_queries);
    shared_proxy_fence();
    named_barrier(1 + warpgroup, 128);

    int position[2];
    for (int half = 0; half < 2; ++half) {
      position[half] = start + (first_row + warp % 4 * 16 + lane / 4 + half * 8) / group;
    }
    const int first_position = start + first_row / group;
    const int last_position = start + (min(item.rows, first_row + 64) - 1) / group;
    // The last tiles are invisible to a warpgroup with earlier rows.
    const int last = first_row < item.rows ? min(item.last_tile, last_position / kCacheBlock + 1) : 0;
    Results<Shape::kHeadDim> results;
    results.clear();
    if (last > 0) {
      attend<Shape>(results, ring, own_queries, args.scale, last, position, first_position, last < item.last_tile);
    } else {
      ring.skip();
    }
    for (int tile = last; tile < item.last_tile; ++tile) {
      if (tile + 1 < item.last_tile) ring.skip();
      ring.skip();
    }
    write_rows(step, args, item, first_row, results);
    // The queries of the next item overwrite these.
    named_barrier(1 + warpgroup, 128);
  }
}

}  // namespace

cudaError_t attend_prompts(const Attention& args, int head_dim, cudaStream_t stream) {
  return head_dim == 128 ? launch(prompts_kernel<Shape<128>>, dim3(multiprocessors()), Shape<128>::kThreads,
                                  Shape<128>::kMemory, 1, stream, args)
                         : launch(prompts_kernel<Shape<64>>, dim3(multiprocessors()), Shape<64>::kThreads,
                                  Shape<64>::kMemory, 1, stream, args);
}

cudaError_t prepare_prompts() {
  const cudaError_t error = prepare(reinterpret_cast<const void*>(prompts_kernel<Shape<64>>), Shape<64>::kMemory);
  return error == cudaSuccess ? prepare(reinterpret_cast<const void*>(prompts_kernel<Shape<128>>), Shape<128>::kMemory)
                              : error;
}

}  // namespace fd::cuda
