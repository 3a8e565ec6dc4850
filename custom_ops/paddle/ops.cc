// All bindings in one translation unit: Paddle's header takes longer to compile than all of this project.
#include "attention_op.h"
#include "decoder_layer_op.h"
#include "ep_op.h"
#include "linear_op.h"
#include "moe_op.h"
#include "rms_norm_op.h"
#include "sample_op.h"
#include "team.h"

#include <stdexcept>
#include <string>
#include <system_error>

// Functions that are not tensor operations; custom_ops/native.py calls them through ctypes.
extern "C" {

// Returns null, or why the threads cannot be started.
const char* fd_set_threads(int count, const int* cpus) {
  static std::string error;
  try {
    fd::set_threads(count, cpus);
    return nullptr;
  } catch (const std::system_error& refused) {
    error = refused.what();
    return error.c_str();
  }
}

// Returns null, or why no kernels can run here. Must be called before fd_isa and any operation.
const char* fd_isa_error() {
  static const std::string error = [] {
    try {
      fd::kernels();
      return std::string();
    } catch (const std::invalid_argument& unfit) {
      return std::string(unfit.what());
    }
  }();
  return error.empty() ? nullptr : error.c_str();
}

const char* fd_isa() { return fd::kernels().name; }

int fd_numeric_version() { return fd::kNumericVersion; }

}
