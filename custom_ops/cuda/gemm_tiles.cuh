// The available tiles and their kernels. The instances are in several files, which compile in parallel.
#pragma once

#include <algorithm>

#include "gemm.cuh"
#include "launch.h"

namespace fd::cuda {

using FewTokens = TileShape<1, 8, 7, 3>;

struct ProductKernel {
  void (*kernel)(Product, bool);
  int outputs, tokens, threads, blocks_per_sm;
  int (*memory)(int groups);
};

template <class Shape, Output kOutput>
ProductKernel product_kernel_of() {
  return {product_kernel<Shape, kOutput>, Shape::kOutputs,      Shape::kTokens,
          Shape::kThreads,                Shape::kBlocksPerSm, product_memory<Shape>};
}

template <Output kOutput>
ProductKernel product_kernel_of(Tile tile) {
  switch (tile) {
    case Tile::k64x8: return product_kernel_of<FewTokens, kOutput>();
    case Tile::k64x16: return product_kernel_of<TileShape<1, 16, 7, 3>, kOutput>();
    case Tile::k64x32: return product_kernel_of<TileShape<1, 32, 6, 3>, kOutput>();
    case Tile::k64x64: return product_kernel_of<TileShape<1, 64, 6, 2>, kOutput>();
    case Tile::k128x128: return product_kernel_of<TileShape<2, 128, 6, 1>, kOutput>();
    case Tile::kCount: break;
  }
  return {};
}

ProductKernel bfloat16_product(Tile tile);
ProductKernel float_product(Tile tile);
ProductKernel add_product(Tile tile);
ProductKernel swiglu_product(Tile tile);

}  // namespace fd::cuda
