// Status codes of the C interface, and the last error of each thread as one line.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "../include/fd_device.h"

namespace fd::cuda {

// Stores `message` for fd_last_error() and returns `status`.
int fail(int status, std::string message);

// Converts the result of a CUDA call. Errors other than bad arguments or memory leave the context unusable.
int status_of(const std::string& operation, cudaError_t error);

}  // namespace fd::cuda
