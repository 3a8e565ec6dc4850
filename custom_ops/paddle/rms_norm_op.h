#pragma once

#include <cstring>

#include "rms_norm.h"
#include "tensors.h"
#include "workspace.h"

namespace fd::binding {

inline std::vector<paddle::Tensor> run_rms_norm(const paddle::Tensor& x, const paddle::Tensor& weight,
                                                const paddle::optional<paddle::Tensor>& residual, float epsilon) {
  const auto [rows, width] = extent(x, "rms_norm: x");
  const int64_t count = static_cast<int64_t>(rows) * width;
  const float* input = floats(x, count, "rms_norm: x");
  const float* other = residual ? floats(*residual, count, "rms_norm: residual") : nullptr;
  paddle::Tensor out = float_output({rows, width}), sum = float_output({rows, width});
  float* total = sum.data<float>();
  for (int64_t i = 0; i < count; ++i) total[i] = other == nullptr ? input[i] : input[i] + other[i];
  const RmsNorm norm{total,   floats(weight, width, "rms_norm: weight"), epsilon, rows, width,
                     out.data<float>(), nullptr,                         nullptr};
  run_team([&](Team& team) { rms_norm(team, norm); });
  return {out, sum};
}

inline Shapes shape_rms_norm(const Shape& x, const Shape&, const paddle::optional<Shape>&) { return {x, x}; }
inline Types type_rms_norm(paddle::DataType x, paddle::DataType, const paddle::optional<paddle::DataType>&) {
  return {x, x};
}

}  // namespace fd::binding

PD_BUILD_OP(fd_rms_norm)
    .Inputs({"X", "Weight", paddle::Optional("Residual")})
    .Outputs({"Out", "Sum"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(FD_KERNEL(run_rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_rms_norm))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_rms_norm));
