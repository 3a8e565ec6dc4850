// Two products of the same few tokens in one kernel: that of the shared experts and that of the selected ones.
//
// Each alone has too few tiles to occupy all multiprocessors evenly, and would wait for the end of the other.
#include "gemm_tiles.cuh"

namespace fd::cuda {
namespace {

// Tiles of `dense`, which has one group and at most one tile of tokens, come before those of `grouped`.
template <class Shape, Output kDense, Output kGrouped>
__global__ __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm) void pair_kernel(
    const __grid_constant__ Product dense, const __grid_constant__ Product grouped) {
  extern __shared__ uint8_t memory[];
  uint8_t* const stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + Shape::kStages * Shape::kStageBytes);
  uint64_t* const empty = full + Shape::kStages;
  const Groups groups(empty + Shape::kStages, grouped.groups);
  Ring<Shape> ring{stages, full, empty};

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_tile = blockIdx.x;
  const bool is_producer = warp == Shape::kConsumers / 32;
  const int dense_tiles = round_up(dense.outputs, kPanelOutputs) / Shape::kOutputs;
  const int dense_blocks = ceil_div(dense.inputs, kBlockK), grouped_blocks = ceil_div(grouped.inputs, kBlockK);
  const int rows = __ldcg(dense.counts);
  const auto dense_at = [&](int tile) { return TileAt{0, tile * Shape::kOutputs, 0, rows}; };
  const auto grouped_at = [&](int tile) { return tile_at<Shape>(grouped, groups, tile - dense_tiles); };

  int prefetched = 0;
  if (is_producer) {
    if (grouped.is_early) {
      find_groups<Shape>(grouped, groups, lane);
      __syncwarp();
    }
    if (lane == 0) {
      for (int i = 0; i < Shape::kStages; ++i) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, Shape::kWarpgroups);
      }
      barrier_init_fence();
      if (first_tile < dense_tiles) {
        prefetched = prefetch_tile(dense, ring, dense_at(first_tile), 0, dense_blocks);
      } else if (grouped.is_early && first_tile < dense_tiles + groups.first_tile[grouped.groups]) {
        prefetched = prefetch_tile(grouped, ring, grouped_at(first_tile), 0, grouped_blocks);
      }
    }
    __syncwarp();
  }
  wait_for_predecessor();
  let_successor_start();
  if (is_producer && !grouped.is_early) find_groups<Shape>(grouped, groups, lane);
  __syncthreads();

  const int tiles = dense_tiles + groups.first_tile[grouped.groups];
  if (is_producer) {
    if (lane > 0) return;
    for (int tile = first_tile; tile < tiles; tile += gridDim.x) {
      if (tile < dense_tiles) {
        produce_tile<Shape>(dense, ring, dense_at(tile), prefetched, 0, dense_blocks);
      } else {
        produce_tile<Shape>(grouped, ring, grouped_at(tile), prefetched, 0, grouped_blocks);
      }
    }
    return;
  }
  for (int tile = first_tile; tile < tiles; tile += gridDim.x) {
    if (tile < dense_tiles) {
      multiply_and_write<Shape, kDense>(dense, ring, 0, dense_at(tile));
    } else {
      multiply_and_write<Shape, kGrouped>(grouped, ring, 0, grouped_at(tile));
    }
  }
}

using Shape = FewTokens;
constexpr auto kGateUp = pair_kernel<Shape, Output::kSwiglu, Output::kSwiglu>;
constexpr auto kDown = pair_kernel<Shape, Output::kFloat, Output::kBfloat16>;

}  // namespace

bool is_pair(Output dense, Output grouped, int capacity, Tile tile) {
  return capacity <= Shape::kTokens && tile == Tile::k64x8 &&
         ((dense == Output::kSwiglu && grouped == Output::kSwiglu) ||
          (dense == Output::kFloat && grouped == Output::kBfloat16));
}

cudaError_t product_pair(const Product& dense, Output output, const Product& grouped, int capacity, cudaStream_t stream) {
  const int tiles = round_up(dense.outputs, kPanelOutputs) / Shape::kOutputs +
                    round_up(grouped.outputs, kPanelOutputs) / Shape::kOutputs * std::min(grouped.groups, capacity);
  const int blocks = std::min(tiles, multiprocessors() * Shape::kBlocksPerSm);
  return launch(output == Output::kSwiglu ? kGateUp : kDown, dim3(blocks), Shape::kThreads,
                product_memory<Shape>(grouped.groups), 1, stream, dense, grouped);
}

cudaError_t prepare_pairs() {
  const int memory = product_memory<Shape>(kMaxGroups);
  const cudaError_t error = prepare(reinterpret_cast<const void*>(kGateUp), memory);
  return error == cudaSuccess ? prepare(reinterpret_cast<const void*>(kDown), memory) : error;
}

}  // namespace fd::cuda
