#include "gemm_tiles.cuh"

namespace fd::cuda {

ProductKernel bfloat16_product(Tile tile) { return product_kernel_of<Output::kBfloat16>(tile); }

}  // namespace fd::cuda
