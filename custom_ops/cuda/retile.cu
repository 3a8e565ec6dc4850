#include "retile.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper.cuh"
#include "launch.h"

namespace fd::cuda {
namespace {

constexpr int kThreads = 256;

template <class Element>
__device__ float read(const void* source, int64_t index) {
  return static_cast<float>(static_cast<const Element*>(source)[index]);
}

__device__ int destination(const Retile& args, int row) {
  const int plain = args.first_row + row;
  return args.turn == Turn::kPlain ? plain : args.turn == Turn::kGate ? gate_row(plain) : up_row(plain);
}

// One thread writes one piece of 16 bytes. Adjacent threads read adjacent elements of the source.
template <class Element>
__global__ void retile_kernel(Retile args, int rows) {
  wait_for_predecessor();
  const int pieces = round_up(args.inputs, kBlockK) / 8;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= int64_t{rows} * pieces) return;
  const bool along_rows = args.column_stride != 1;
  const int row = along_rows ? index % rows : index / pieces;
  const int piece = along_rows ? index / rows : index % pieces;
  __align__(16) __nv_bfloat16 values[8];
  bool is_finite = true;
  for (int i = 0; i < 8; ++i) {
    const int k = piece * 8 + i;
    const bool is_there = row < args.rows && k < args.inputs;
    const float value = is_there ? read<Element>(args.source, row * args.row_stride + k * args.column_stride) : 0.0f;
    is_finite &= isfinite(value);
    values[i] = __float2bfloat16_rn(value);
  }
  if (!is_finite && args.bad_tag != nullptr) atomicCAS(args.bad_tag, 0, args.tag);
  *reinterpret_cast<uint4*>(args.matrix + in_matrix(destination(args, row), piece * 8, pieces / 8)) =
      *reinterpret_cast<const uint4*>(values);
}

using Kernel = void (*)(Retile, int);

Kernel kernel_of(Source type) {
  switch (type) {
    case Source::kFloat32: return retile_kernel<float>;
    case Source::kFloat16: return retile_kernel<__half>;
    case Source::kBfloat16: return retile_kernel<__nv_bfloat16>;
  }
  return nullptr;
}

}  // namespace

cudaError_t retile(const Retile& args, cudaStream_t stream) {
  const int all = args.turn == Turn::kPlain ? args.outputs : args.outputs / 2;
  const int padded = args.turn == Turn::kPlain ? round_up(all, kPanelOutputs) : round_up(all, kPanelOutputs / 2);
  const int rows = args.first_row + args.rows == all ? padded - args.first_row : args.rows;
  const int64_t threads = int64_t{rows} * (round_up(args.inputs, kBlockK) / 8);
  return launch(kernel_of(args.type), dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads)), kThreads, 0, 1,
                stream, args, rows);
}

cudaError_t prepare_retile() {
  for (const Source type : {Source::kFloat32, Source::kFloat16, Source::kBfloat16}) {
    const cudaError_t error = prepare(reinterpret_cast<const void*>(kernel_of(type)), 0);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fd::cuda
