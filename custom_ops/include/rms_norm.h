// Root mean square normalisation (Zhang and Sennrich, 2019) of rows.
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
  const Activations* activations;  // a second output, or null
  const int32_t* index;            // row of x for output row i; null: i
};

void rms_norm(Team& team, const RmsNorm& args);

}  // namespace fd
