#include "gemm_tiles.cuh"

namespace fd::cuda {

ProductKernel float_product(Tile tile) { return product_kernel_of<Output::kFloat>(tile); }

}  // namespace fd::cuda
