// All bindings in one unit: Paddle's header takes longer to compile than everything of ours.
#include "attention_op.h"
#include "decoder_layer_op.h"
#include "linear_op.h"
#include "moe_op.h"
#include "rms_norm_op.h"
#include "sample_op.h"
#include "team.h"

// What is not an operation on tensors; custom_ops/__init__.py calls it through ctypes.
extern "C" {

void fd_set_threads(int count, const int* cpus) { fd::set_threads(count, cpus); }

const char* fd_isa() { return fd::kernels().name; }

}
