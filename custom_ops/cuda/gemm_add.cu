#include "gemm_tiles.cuh"

namespace fd::cuda {

ProductKernel add_product(Tile tile) { return product_kernel_of<Output::kAdd>(tile); }

}  // namespace fd::cuda
