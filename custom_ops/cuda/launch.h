// Kernel launches.
#pragma once

#include <cuda_runtime.h>

namespace fd::cuda {

// Number of multiprocessors of the current device.
int multiprocessors();

// Permits a kernel this much dynamic shared memory and loads it, so that no step has to.
cudaError_t prepare(const void* kernel, int memory);

// Launches a kernel that calls wait_for_predecessor(), so it may overlap the end of the previous one.
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
