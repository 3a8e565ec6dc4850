#pragma once

#include "linear.h"
#include "tensors.h"

namespace fd::binding {

inline std::vector<paddle::Tensor> run_linear(const paddle::Tensor& x, const paddle::Tensor& weights) {
  const PackedMatrix packed = matrix(weights);
  const int rows = extent(x, "linear: x").rows;
  const float* input = floats(x, static_cast<int64_t>(rows) * packed.inputs, "linear: x");
  paddle::Tensor out = float_output({rows, packed.outputs});
  Workspace& workspace = Workspace::fresh();
  const Activations activations = take_activations(workspace, rows, packed.inputs);
  LinearGroup group(workspace, 1, packed.inputs, rows);
  group.add({packed, 0, activations, Output::kStore, out.data<float>(), packed.outputs, {}});
  run_team([&](Team& team) {
    to_activations(team, input, activations);
    group.run(team);
  });
  return {out};
}

inline Shapes shape_linear(const Shape& x, const Shape&) { return {{x[0], -1}}; }
inline Types type_linear(paddle::DataType x, paddle::DataType) { return {x}; }

}  // namespace fd::binding

PD_BUILD_OP(fd_linear)
    .Inputs({"X", "Weights"})
    .Outputs({"Out"})
    .SetKernelFn(FD_KERNEL(run_linear))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_linear))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_linear));
