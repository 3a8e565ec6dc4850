// The last error of a thread, in one line.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "../include/fd_device.h"

namespace fd::cuda {

// Returns `status` after it has kept `message` for fd_last_error().
int fail(int status, std::string message);

// What a CUDA call came to. An error that is not about arguments or memory leaves the context unusable.
int status_of(const std::string& operation, cudaError_t error);

}  // namespace fd::cuda
