#include "gemm.h"

#include "gemm_tiles.cuh"

namespace fd::cuda {
namespace {

ProductKernel kernel_of(Output output, Tile tile) {
  switch (output) {
    case Output::kBfloat16: return bfloat16_product(tile);
    case Output::kFloat: return float_product(tile);
    case Output::kAdd: return add_product(tile);
    case Output::kSwiglu: return swiglu_product(tile);
  }
  return {};
}

}  // namespace

int tile_tokens(Tile tile) { return kernel_of(Output::kFloat, tile).tokens; }

Tile choose_tile(int capacity, int groups) {
  // Rows are spread unevenly over the groups; twice the mean suffices for most.
  const int rows = groups > 1 ? capacity * 2 / groups : capacity;
  if (rows <= 8) return Tile::k64x8;
  if (rows <= 16) return Tile::k64x16;
  if (rows <= 32) return Tile::k64x32;
  if (rows <= 64) return Tile::k64x64;
  return Tile::k128x128;
}

cudaError_t prepare_products() {
  for (const Output output : {Output::kBfloat16, Output::kFloat, Output::kAdd, Output::kSwiglu}) {
    for (int tile = 0; tile < static_cast<int>(Tile::kCount); ++tile) {
      const ProductKernel kernel = kernel_of(output, static_cast<Tile>(tile));
      const cudaError_t error = prepare(reinterpret_cast<const void*>(kernel.kernel), kernel.memory(kMaxGroups));
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t product(const Product& args, Output output, int capacity, Tile tile, cudaStream_t stream) {
  const ProductKernel kernel = kernel_of(output, tile);
  const int down = round_up(args.outputs, kPanelOutputs) / kernel.outputs, memory = kernel.memory(args.groups);
  const bool is_single = args.groups == 1 && capacity <= kernel.tokens;
  // The rows of each group may end within a tile.
  const int64_t across = ceil_div(capacity, kernel.tokens) + std::min(args.groups, capacity) - 1;
  // With few blocks of outputs and one tile of tokens, a cluster shares the segments, and each block has one tile.
  if (is_single && args.segments > 1) {
    return launch(kernel.kernel, dim3(down * args.segments), kernel.threads, memory, args.segments, stream, args, true);
  }
  const int64_t blocks = std::min<int64_t>(down * across, multiprocessors() * kernel.blocks_per_sm);
  return launch(kernel.kernel, dim3(static_cast<unsigned>(blocks)), kernel.threads, memory, 1, stream, args, is_single);
}

}  // namespace fd::cuda
