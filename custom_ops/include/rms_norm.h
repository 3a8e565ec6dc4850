// Root mean square normalisation (Zhang and Sennrich, 2019) of the rows of the residual stream.
#pragma once

#include "activations.h"
#include "team.h"

namespace fd {

struct RmsNorm {
  const float* x;       // [rows, width]
  const float* weight;  // [width]
  float epsilon;
  int rows;
  int width;
  float* out;            // [rows, width]
  const Activations* activations;  // null, or where the result goes too
  const int32_t* index;  // null, or which row of x becomes row i
};

void rms_norm(Team& team, const RmsNorm& args);

}  // namespace fd
