#include "gemm_tiles.cuh"

namespace fd::cuda {

ProductKernel swiglu_product(Tile tile) { return product_kernel_of<Output::kSwiglu>(tile); }

}  // namespace fd::cuda
