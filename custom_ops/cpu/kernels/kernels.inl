#define FD_TEXT(name) #name
#define FD_NAME_OF(name) FD_TEXT(name)

// All kernels, compiled for the instruction set of the including file.
namespace fd::FD_NAMESPACE {
namespace {

#include "kernels/simd.h"

#include "kernels/product.inl"

#include "kernels/gemm.inl"

#include "kernels/attend.inl"

#include "kernels/rows.inl"

#include "kernels/sampling.inl"

}  // namespace

const Kernels table = {
    .name = FD_NAME_OF(FD_NAMESPACE),
    .attend_height = kMaxHeight,
    .gemm_rows = kGemmRows,
    .gemm_scratch = gemm_scratch,
    .gemm = gemm,
    .attend = attend,
    .merge = merge,
    .rms_norm = rms_norm,
    .softmax = softmax,
    .combine = combine,
    .combine_bfloat16 = combine_bfloat16,
    .block_maxima = block_maxima,
    .weigh = weigh,
    .mass_from = mass_from,
    .retain = retain,
};

}  // namespace fd::FD_NAMESPACE
