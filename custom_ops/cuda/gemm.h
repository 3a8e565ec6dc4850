// Launcher of matrix products.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"

namespace fd::cuda {

constexpr int kMaxGroups = 256;

enum class Output {
  kBfloat16,  // out bfloat16 [row][out_stride]
  kFloat,     // out float [row][out_stride]
  kAdd,       // float, added to `out`
  kSwiglu,    // out = silu(gate) * up as activations; gate and up are interleaved eight outputs at a time
};

// A product with one matrix per group of rows; a dense product has one group.
struct Product {
  const uint8_t* weights;  // matrices of matrix_bytes(outputs, inputs) each
  const int32_t* slots;    // [groups]: matrix of each group; null: the group's index
  const uint8_t* tokens;   // activations; the rows of each group begin at a multiple of `alignment`
  const int32_t* counts;   // [groups] rows, in device memory
  bool is_early;           // counts and slots are not results of the previous kernel, so weights can be prefetched
  int groups;
  int alignment;
  int outputs;
  int inputs;
  int segments;
  const float* bias;    // [outputs] or null
  const int32_t* rows;  // row of `out` for row r of `tokens`; null: r
  void* out;
  int64_t out_stride;
};

// Tiles (outputs x tokens). All give the same bits.
enum class Tile { k64x8, k64x16, k64x32, k64x64, k128x128, kCount };

// Returns the best tile for up to `capacity` rows in `groups` groups.
Tile choose_tile(int capacity, int groups);
int tile_tokens(Tile tile);

cudaError_t prepare_products();

// Enqueues the product. `capacity` is an upper bound of the rows of all groups; counts are read on the device. The
// launch may overlap the end of the previous kernel in the stream.
cudaError_t product(const Product& args, Output output, int capacity, Tile tile, cudaStream_t stream);

// Whether product_pair() computes these products. `capacity` is an upper bound of the tokens.
bool is_pair(Output dense, Output grouped, int capacity, Tile tile);

// Enqueues two independent products as one kernel. `dense` has one group, without slots or rows; its count must be
// early. `capacity` is an upper bound of the rows of all groups of `grouped`.
cudaError_t product_pair(const Product& dense, Output output, const Product& grouped, int capacity, cudaStream_t stream);
cudaError_t prepare_pairs();

}  // namespace fd::cuda
