// Starting kernels.
#pragma once

#include <cuda_runtime.h>

namespace fd::cuda {

// Multiprocessors of the current device.
int multiprocessors();

// Lets a kernel have this much dynamic shared memory, and loads it: nothing is left to be loaded inside a step.
cudaError_t prepare(const void* kernel, int memory);

// Starts a kernel that calls wait_for_predecessor() and so may overlap the end of the one before it.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int memory, int cluster, cudaStream_t stream,
                   Arguments... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = memory;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace fd::cuda
