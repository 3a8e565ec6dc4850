// All bindings in one unit: Paddle's header takes longer to compile than everything of ours.
#include "attention_op.h"
#include "decoder_layer_op.h"
#include "linear_op.h"
#include "moe_op.h"
#include "rms_norm_op.h"
#include "sample_op.h"
#include "team.h"

#include <stdexcept>
#include <string>

// What is not an operation on tensors; custom_ops/__init__.py calls it through ctypes.
extern "C" {

void fd_set_threads(int count, const int* cpus) { fd::set_threads(count, cpus); }

// Why there are no kernels to run on, or null. To be asked first: the rest of these cannot throw into Python.
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

// Null if FD_ISA asks for what there is not.
const char* fd_isa() {
  try {
    return fd::kernels().name;
  } catch (const std::invalid_argument&) {
    return nullptr;
  }
}

}
