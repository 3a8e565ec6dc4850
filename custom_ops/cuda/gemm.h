// Matrix products of the engine: what the launcher takes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout.h"

namespace fd::cuda {

constexpr int kMostGroups = 256;

enum class Output {
  kBfloat16,  // out bfloat16 [row][out_stride]
  kFloat,     // out float [row][out_stride]
  kAdd,       // the same, added to what is there
  kSwiglu,    // gate and up in turns of eight outputs: silu(gate) * up goes to `out` as activations
};

// One matrix for each group of rows; a dense product is one group.
struct Product {
  const uint8_t* weights;  // matrices of matrix_bytes(outputs, inputs) each
  const int32_t* slots;    // [groups]: which matrix a group has; null: its own index
  const uint8_t* tokens;   // activations; a group's rows begin at a multiple of `alignment`
  const int32_t* counts;   // [groups] rows, in device memory
  int groups;
  int alignment;
  int outputs;
  int inputs;
  int segments;
  const float* bias;    // [outputs] or null
  const int32_t* rows;  // where row r of `tokens` goes in `out`; null: to row r
  void* out;
  int64_t out_stride;
};

// Tiles, outputs x tokens. They all give the same bits.
enum class Tile { k64x8, k64x16, k64x32, k64x64, k128x128, kCount };

// For a product of `capacity` rows at most, spread over `groups` groups.
Tile choose_tile(int capacity, int groups);
int tile_tokens(Tile tile);

cudaError_t prepare_products();

// Enqueues the product. `capacity` bounds the rows of all groups together; counts are read on the device. One launch
// overlaps the end of the kernel before it in the stream.
cudaError_t product(const Product& args, Output output, int capacity, Tile tile, cudaStream_t stream);

}  // namespace fd::cuda
