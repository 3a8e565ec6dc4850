#include "attention.cuh"

#include "launch.h"

namespace fd::cuda {
namespace {

template <class Shape>
cudaError_t start(const Attention& args, cudaStream_t stream) {
  const int blocks = multiprocessors() * (Shape::kDecodes ? 2 : 1);
  return launch(attention_kernel<Shape>, dim3(blocks), Shape::kThreads, Shape::kMemory, 1, stream, args);
}

template <class Shape>
cudaError_t prepare_shape() {
  return prepare(reinterpret_cast<const void*>(attention_kernel<Shape>), Shape::kMemory);
}

template <int kHeadDim>
using Decoding = AttentionShape<kHeadDim, 1, 5 * 128 / kHeadDim, true>;
template <int kHeadDim>
using Prompts = AttentionShape<kHeadDim, 2, 8, false>;

template <int kHeadDim>
cudaError_t start_both(const Attention& args, bool has_prompts, cudaStream_t stream) {
  if (has_prompts) {
    const cudaError_t error = start<Prompts<kHeadDim>>(args, stream);
    if (error != cudaSuccess) return error;
  }
  return start<Decoding<kHeadDim>>(args, stream);
}

}  // namespace

cudaError_t attention(const Attention& args, int head_dim, bool has_prompts, cudaStream_t stream) {
  return head_dim == 128 ? start_both<128>(args, has_prompts, stream) : start_both<64>(args, has_prompts, stream);
}

cudaError_t prepare_attention() {
  for (const auto each : {prepare_shape<Decoding<64>>, prepare_shape<Decoding<128>>, prepare_shape<Prompts<64>>,
                          prepare_shape<Prompts<128>>}) {
    const cudaError_t error = each();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fd::cuda
