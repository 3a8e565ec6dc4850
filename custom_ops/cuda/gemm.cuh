// The product kernel: weights on wgmma's M side, tokens on its N side.
//
// One producer warp streams tiles of weights and tokens through a ring of stages in shared memory; one or two consumer
// warpgroups with 64 outputs each multiply them. Blocks are persistent. Either a block processes all segments of K, or
// the blocks of a cluster process one each and sum up; both give the same bits (layout.h).
#pragma once

#include "gemm.h"
#include "hopper.cuh"

namespace fd::cuda {

template <int kWarpgroups_, int kTokens_, int kStages_, int kBlocksPerSm_>
struct TileShape {
  static constexpr int kWarpgroups = kWarpgroups_;  // consumer warpgroups
  static constexpr int kOutputs = kWarpgroups * 64;
  static constexpr int kTokens = kTokens_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kConsumers = kWarpgroups * 128;
  // Two consumer warpgroups take registers from the producer's, which works for whole warpgroups only. All three
  // together must not exceed the registers at the start of the kernel, or the increase blocks forever.
  static constexpr bool kShiftsRegisters = kWarpgroups == 2;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
  static_assert(!kShiftsRegisters || kBlocksPerSm == 1);
  static constexpr int kThreads = kConsumers + (kShiftsRegisters ? 128 : 32);
  static constexpr int kWeightBytes = kWarpgroups * kBlockBytes;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes;
  // The blocks of a cluster send their sums to the first one. With larger tiles, all of them add up (there is no memory
  // left for what they would receive, so the memory of the stages is used once all blocks are done with it).
  static constexpr bool kSends = kTokens == 8;
  static constexpr int kSumBytes = kSends ? (kMaxSegments - 1) * kConsumers * 16 : 0;
  // Rows of a tile that lie in one block of activations.
  static constexpr int kPieceRows = kTokens < kBlockRows ? kTokens : kBlockRows;
  static constexpr int kPieces = kTokens / kPieceRows;
};

// First row and first tile of each group.
struct Groups {
  int* first_row;
  int* first_tile;
  int* count;

  __device__ Groups(void* memory, int groups)
      : first_row(static_cast<int*>(memory)), first_tile(first_row + groups), count(first_tile + groups + 1) {}
};

template <class Shape>
constexpr int product_memory(int groups) {
  return 1024 + Shape::kStages * (Shape::kStageBytes + 16) + Shape::kSumBytes + 8 + (3 * groups + 1) * 4;
}

struct TileAt {
  int matrix;
  int first_output;
  int first_row;  // in the activations
  int rows;       // remaining rows of the group; may exceed the tile
};

template <class Shape>
__device__ __forceinline__ TileAt tile_at(const Product& args, const Groups& groups, int tile) {
  int low = 0;
  for (int high = args.groups; high - low > 1;) {
    const int middle = (low + high) / 2;
    (groups.first_tile[middle] <= tile ? low : high) = middle;
  }
  // Tiles that share weights are adjacent, so that the second one hits the L2 cache.
  const int across = ceil_div(groups.count[low], Shape::kTokens), index = tile - groups.first_tile[low];
  const int begin = index % across * Shape::kTokens;
  return {args.slots == nullptr ? low : args.slots[low], index / across * Shape::kOutputs,
          groups.first_row[low] + begin, groups.count[low] - begin};
}

// Run by one warp: prefix sums of the rows and tiles of all groups.
template <class Shape>
__device__ __forceinline__ void find_groups(const Product& args, const Groups& groups, int lane) {
  const int down = round_up(args.outputs, kPanelOutputs) / Shape::kOutputs;
  int row = 0, tile = 0;
  for (int first = 0; first < args.groups; first += 32) {
    const int group = first + lane;
    // Not through the L1 cache, which may hold the counts of an earlier layer.
    const int count = group < args.groups ? __ldcg(args.counts + group) : 0;
    const int rows = round_up(count, args.alignment), tiles = ceil_div(count, Shape::kTokens) * down;
    int rows_until = rows, tiles_until = tiles;
    for (int step = 1; step < 32; step *= 2) {
      const int r = __shfl_up_sync(~0u, rows_until, step), t = __shfl_up_sync(~0u, tiles_until, step);
      if (lane >= step) rows_until += r, tiles_until += t;
    }
    if (group < args.groups) {
      groups.count[group] = count;
      groups.first_row[group] = row + rows_until - rows;
      groups.first_tile[group] = tile + tiles_until - tiles;
    }
    row += __shfl_sync(~0u, rows_until, 31);
    tile += __shfl_sync(~0u, tiles_until, 31);
  }
  if (lane == 0) groups.first_tile[args.groups] = tile;
}

// One side's view of the ring of stages.
template <class Shape>
struct Ring {
  uint8_t* stages;
  uint64_t* full;
  uint64_t* empty;
  int stage = 0;
  uint32_t phase = 0;

  __device__ uint8_t* weights() const { return stages + stage * Shape::kStageBytes; }
  __device__ uint8_t* tokens() const { return weights() + Shape::kWeightBytes; }
  __device__ void advance() {
    if (++stage == Shape::kStages) stage = 0, phase ^= 1;
  }
};

template <class Shape>
__device__ __forceinline__ void fetch_weights(const Product& args, const Ring<Shape>& ring, const uint8_t* matrix,
                                              int first_output, int k_block) {
  const int64_t block = (int64_t{first_output / kPanelOutputs} * ceil_div(args.inputs, kBlockK) + k_block) * 2 +
                        first_output / kBlockRows % 2;
  bulk_copy(ring.weights(), matrix + block * kBlockBytes, Shape::kWeightBytes, ring.full + ring.stage);
}

template <class Shape>
__device__ __forceinline__ void fetch_tokens(const Product& args, const Ring<Shape>& ring, const TileAt& at,
                                             int k_block, int pieces) {
  const int k_blocks = ceil_div(args.inputs, kBlockK);
  for (int piece = 0; piece < pieces; ++piece) {
    const int row = at.first_row + piece * Shape::kPieceRows;
    const int64_t block = int64_t{row / kBlockRows} * k_blocks + k_block;
    bulk_copy(ring.tokens() + piece * Shape::kPieceRows * 128,
              args.tokens + block * kBlockBytes + row % kBlockRows * 128, Shape::kPieceRows * 128,
              ring.full + ring.stage);
  }
}

template <class Shape>
__device__ __forceinline__ int pieces_of(const TileAt& at) {
  return min(Shape::kPieces, ceil_div(at.rows, Shape::kPieceRows));
}

// Run by one thread: streams a tile. The weights of its first `prefetched` stages are on their way already.
template <class Shape>
__device__ __forceinline__ void produce_tile(const Product& args, Ring<Shape>& ring, const TileAt& at, int& prefetched,
                                             int first_block, int last_block) {
  const uint8_t* const matrix = args.weights + at.matrix * matrix_bytes(args.outputs, args.inputs);
  const int pieces = pieces_of<Shape>(at);
  const uint32_t token_bytes = pieces * Shape::kPieceRows * 128;
  for (int k = first_block; k < last_block; ++k, ring.advance()) {
    if (prefetched > 0) {
      --prefetched;
      barrier_arrive_expect(ring.full + ring.stage, token_bytes);
    } else {
      barrier_wait(ring.empty + ring.stage, ring.phase ^ 1);
      barrier_arrive_expect(ring.full + ring.stage, Shape::kWeightBytes + token_bytes);
      fetch_weights(args, ring, matrix, at.first_output, k);
    }
    fetch_tokens(args, ring, at, k, pieces);
  }
}

// Run by one thread: fetches weights of a tile into all stages, before tokens are there. Returns the number of stages.
template <class Shape>
__device__ __forceinline__ int prefetch_tile(const Product& args, Ring<Shape> ring, const TileAt& at, int first_block,
                                             int last_block) {
  const uint8_t* const matrix = args.weights + at.matrix * matrix_bytes(args.outputs, args.inputs);
  const int stages = min(last_block - first_block, Shape::kStages);
  for (int i = 0; i < stages; ++i, ring.advance()) {
    barrier_expect(ring.full + ring.stage, Shape::kWeightBytes);
    fetch_weights(args, ring, matrix, at.first_output, first_block + i);
  }
  return stages;
}

// Run by one thread: streams the tiles of this block. `first_block`, `last_block`: the blocks of K of this thread block.
template <class Shape>
__device__ void produce(const Product& args, const Groups& groups, Ring<Shape> ring, int first_tile, int tile_step,
                        int prefetched, int first_block, int last_block) {
  const int tiles = groups.first_tile[args.groups];
  if (first_tile >= tiles) {
    // No tokens: wait for pending copies, which would otherwise arrive in the memory of another block.
    for (int i = 0; i < prefetched; ++i, ring.advance()) {
      barrier_arrive(ring.full + ring.stage);
      barrier_wait(ring.full + ring.stage, ring.phase);
    }
    return;
  }
  for (int tile = first_tile; tile < tiles; tile += tile_step) {
    produce_tile<Shape>(args, ring, tile_at<Shape>(args, groups, tile), prefetched, first_block, last_block);
  }
}

// Multiplies blocks [first, last) of K as one chain of wgmma.
template <class Shape>
__device__ __forceinline__ void multiply(float (&sum)[Shape::kTokens / 2], Ring<Shape>& ring, int warpgroup, int first,
                                         int last) {
  uint64_t* before = nullptr;
  for (int k = first; k < last; ++k, ring.advance()) {
    barrier_wait(ring.full + ring.stage, ring.phase);
    const uint64_t a = operand(ring.weights() + warpgroup * kBlockBytes), b = operand(ring.tokens());
    wgmma_fence();
#pragma unroll
    // 16 elements of K are 32 bytes of a row, and addresses count 16 bytes.
    for (int step = 0; step < 4; ++step) wgmma<Shape::kTokens>(sum, a + 2 * step, b + 2 * step, k > first || step > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (before != nullptr && threadIdx.x % 128 == 0) barrier_arrive(before);
    before = ring.empty + ring.stage;
  }
  wgmma_wait<0>();
  if (before != nullptr && threadIdx.x % 128 == 0) barrier_arrive(before);
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// Writes eight tokens of outputs [first_output, + 64) of one warpgroup. Lane i of warp w holds outputs 16 w + i / 4 and
// eight further, for tokens 2 (i % 4) and the next one.
template <Output kOutput>
__device__ __forceinline__ void write_eight(const Product& args, const float (&x)[4], const TileAt& at,
                                            int first_output, int eight, int rows) {
  const int lane = threadIdx.x % 32, first = first_output + threadIdx.x / 32 % 4 * 16;
  const auto out_row = [&](int row) {
    return (args.rows == nullptr ? at.first_row + row : args.rows[at.first_row + row]) * args.out_stride;
  };
  float bias[2] = {};
  if (args.bias != nullptr) {
    for (int half = 0; half < 2; ++half) {
      const int output = first + lane / 4 + half * 8;
      if (output < args.outputs) bias[half] = args.bias[output];
    }
  }
  if constexpr (kOutput == Output::kFloat || kOutput == Output::kAdd) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = eight * 8 + lane % 4 * 2 + i % 2, output = first + lane / 4 + i / 2 * 8;
      if (row >= rows || output >= args.outputs) continue;
      float* const place = static_cast<float*>(args.out) + out_row(row) + output;
      const float value = x[i] + bias[i / 2];
      *place = kOutput == Output::kAdd ? *place + value : value;
    }
  } else {
    // After the transposition, a lane holds two adjacent outputs of token lane / 4.
    const int row = eight * 8 + lane / 4;
    if constexpr (kOutput == Output::kSwiglu) {
      const float low = silu(x[0] + bias[0]) * (x[2] + bias[1]), high = silu(x[1] + bias[0]) * (x[3] + bias[1]);
      const uint32_t pair = transpose_fragment(pack(low, high));
      const int column = first / 2 + lane % 4 * 2, width = round_up(args.outputs / 2, kBlockK);
      if (row >= rows || column >= width) return;
      *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(args.out) +
                                   in_activations(at.first_row + row, column, width / kBlockK)) = pair;
    } else {
      const uint32_t pairs[2] = {transpose_fragment(pack(x[0] + bias[0], x[1] + bias[0])),
                                 transpose_fragment(pack(x[2] + bias[1], x[3] + bias[1]))};
      if (row >= rows) return;
      for (int half = 0; half < 2; ++half) {
        const int output = first + half * 8 + lane % 4 * 2;
        // The launcher requires an even number of outputs.
        if (output >= args.outputs) continue;
        *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(args.out) + out_row(row) + output) = pairs[half];
      }
    }
  }
}

template <class Shape, Output kOutput>
__device__ __forceinline__ void write(const Product& args, const float (&sum)[Shape::kTokens / 2], const TileAt& at,
                                      int warpgroup) {
  const int rows = min(at.rows, Shape::kTokens);
#pragma unroll
  for (int eight = 0; eight < Shape::kTokens / 8; ++eight) {
    const float x[4] = {sum[4 * eight], sum[4 * eight + 1], sum[4 * eight + 2], sum[4 * eight + 3]};
    write_eight<kOutput>(args, x, at, at.first_output + warpgroup * 64, eight, rows);
  }
}

// Sums the segments of a cluster, one per block, in order. Block r sums the groups of eight tokens e with
// e % segments == r, so that the work is shared. For consumers; other threads call attend_cluster_barriers().
template <class Shape, Output kOutput>
__device__ __forceinline__ void add_up_and_write(const Product& args, const float (&sum)[Shape::kTokens / 2],
                                                 float4* parts, const TileAt& at) {
  // All stages have been multiplied and no copies are pending, so their memory can be reused.
  named_barrier(1, Shape::kConsumers);
#pragma unroll
  for (int eight = 0; eight < Shape::kTokens / 8; ++eight) {
    parts[eight * Shape::kConsumers + threadIdx.x] =
        make_float4(sum[4 * eight], sum[4 * eight + 1], sum[4 * eight + 2], sum[4 * eight + 3]);
  }
  __syncwarp();
  cluster_barrier();
  const int rows = min(at.rows, Shape::kTokens);
  for (int eight = cluster_rank(); eight * 8 < rows; eight += args.segments) {
    float4 part[kMaxSegments];
#pragma unroll
    for (int segment = 0; segment < kMaxSegments; ++segment) {
      if (segment < args.segments) part[segment] = read_remote(parts + eight * Shape::kConsumers + threadIdx.x, segment);
    }
    float x[4] = {part[0].x, part[0].y, part[0].z, part[0].w};
#pragma unroll
    for (int segment = 1; segment < kMaxSegments; ++segment) {
      if (segment >= args.segments) break;
      x[0] += part[segment].x, x[1] += part[segment].y, x[2] += part[segment].z, x[3] += part[segment].w;
    }
    write_eight<kOutput>(args, x, at, at.first_output + threadIdx.x / 128 * 64, eight, rows);
  }
  __syncwarp();
  // A block must not exit while others read its memory.
  cluster_barrier();
}

// Counterpart of the cluster sum for threads that do not multiply.
__device__ __forceinline__ void attend_cluster_barriers() {
  __syncwarp();
  cluster_barrier();
  cluster_barrier();
}

// Sums the segments of a cluster in order, in its first block. For consumers.
template <class Shape, Output kOutput>
__device__ __forceinline__ void send_or_write(const Product& args, const float (&sum)[Shape::kTokens / 2], float4* sums,
                                              uint64_t* received, const TileAt& at) {
  const int rank = cluster_rank();
  if (rank > 0) {
    write_remote(sums + (rank - 1) * Shape::kConsumers + threadIdx.x, make_float4(sum[0], sum[1], sum[2], sum[3]),
                 received, 0);
    return;
  }
  if (threadIdx.x == 0) barrier_arrive_expect(received, (args.segments - 1) * Shape::kConsumers * 16);
  barrier_wait(received, 0);
  float x[4] = {sum[0], sum[1], sum[2], sum[3]};
#pragma unroll
  for (int segment = 1; segment < kMaxSegments; ++segment) {
    if (segment >= args.segments) break;
    const float4 part = sums[(segment - 1) * Shape::kConsumers + threadIdx.x];
    x[0] += part.x, x[1] += part.y, x[2] += part.z, x[3] += part.w;
  }
  write_eight<kOutput>(args, x, at, at.first_output, 0, min(at.rows, Shape::kTokens));
}

// Multiplies a tile, over all segments of K.
template <class Shape, Output kOutput>
__device__ __forceinline__ void multiply_and_write(const Product& args, Ring<Shape>& ring, int warpgroup,
                                                   const TileAt& at) {
  const int k_blocks = ceil_div(args.inputs, kBlockK);
  // Uninitialised: the first wgmma of a chain overwrites it, and other writes would serialise all wgmma.
  float sum[Shape::kTokens / 2];
  multiply<Shape>(sum, ring, warpgroup, 0, segment_start(1, args.segments, k_blocks));
  for (int segment = 1; segment < args.segments; ++segment) {
    float part[Shape::kTokens / 2];
    multiply<Shape>(part, ring, warpgroup, segment_start(segment, args.segments, k_blocks),
                    segment_start(segment + 1, args.segments, k_blocks));
#pragma unroll
    for (int i = 0; i < Shape::kTokens / 2; ++i) sum[i] += part[i];
  }
  write<Shape, kOutput>(args, sum, at, warpgroup);
}

// `is_single`: there is one group and one tile of tokens, so the first tile is known without the number of tokens.
template <class Shape, Output kOutput>
__global__ __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm) void product_kernel(
    const __grid_constant__ Product args, bool is_single) {
  extern __shared__ uint8_t memory[];
  uint8_t* const stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
  float4* const sums = reinterpret_cast<float4*>(stages + Shape::kStages * Shape::kStageBytes);
  uint64_t* const full = reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(sums) + Shape::kSumBytes);
  uint64_t* const empty = full + Shape::kStages;
  uint64_t* const received = empty + Shape::kStages;
  const Groups groups(received + 1, args.groups);
  Ring<Shape> ring{stages, full, empty};

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool is_producer = warp == Shape::kConsumers / 32, is_consumer = warp < Shape::kConsumers / 32;
  const int blocks = cluster_size(), rank = cluster_rank();
  const int k_blocks = ceil_div(args.inputs, kBlockK);
  const int first_block = blocks > 1 ? segment_start(rank, args.segments, k_blocks) : 0;
  const int last_block = blocks > 1 ? segment_start(rank + 1, args.segments, k_blocks) : k_blocks;
  const int first_tile = blockIdx.x / blocks, tile_step = gridDim.x / blocks;

  int prefetched = 0;
  if (is_producer) {
    if (args.is_early) {
      find_groups<Shape>(args, groups, lane);
      __syncwarp();
    }
    if (lane == 0) {
      for (int i = 0; i < Shape::kStages; ++i) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, Shape::kWarpgroups);
      }
      barrier_init(received, 1);
      barrier_init_fence();
      TileAt at{args.slots == nullptr || !is_single ? 0 : args.slots[0], first_tile * Shape::kOutputs, 0, 0};
      bool is_known = is_single;
      if (args.is_early && first_tile < groups.first_tile[args.groups]) {
        at = tile_at<Shape>(args, groups, first_tile), is_known = true;
      }
      if (is_known) prefetched = prefetch_tile(args, ring, at, first_block, last_block);
    }
    __syncwarp();
  }
  if (Shape::kSends && blocks > 1) cluster_barrier();
  wait_for_predecessor();
  // Not earlier: a product that comes next may then rely on what was complete when this one began.
  let_successor_start();
  if (is_producer && !args.is_early) find_groups<Shape>(args, groups, lane);
  __syncthreads();

  const int tiles = groups.first_tile[args.groups];
  if (!is_consumer) {
    if constexpr (Shape::kShiftsRegisters) lower_registers<Shape::kProducerRegisters>();
    if (is_producer && lane == 0) {
      produce<Shape>(args, groups, ring, first_tile, tile_step, prefetched, first_block, last_block);
    }
    if (!Shape::kSends && blocks > 1) attend_cluster_barriers();
    return;
  }
  if constexpr (Shape::kShiftsRegisters) raise_registers<Shape::kConsumerRegisters>();
  const int warpgroup = warp / 4;
  if (blocks > 1) {
    // Here, a cluster has one tile.
    if (Shape::kSends && first_tile >= tiles) return;
    TileAt at{};
    float sum[Shape::kTokens / 2];
    if (first_tile < tiles) {
      multiply<Shape>(sum, ring, warpgroup, first_block, last_block);
      at = tile_at<Shape>(args, groups, first_tile);
    }
    if constexpr (Shape::kSends) {
      send_or_write<Shape, kOutput>(args, sum, sums, received, at);
    } else {
      add_up_and_write<Shape, kOutput>(args, sum, reinterpret_cast<float4*>(stages), at);
    }
    return;
  }
  for (int tile = first_tile; tile < tiles; tile += tile_step) {
    multiply_and_write<Shape, kOutput>(args, ring, warpgroup, tile_at<Shape>(args, groups, tile));
  }
}

}  // namespace fd::cuda
