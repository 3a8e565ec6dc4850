// Rows of the embedding for the tokens of a step.
#pragma once

#include "matrix.h"
#include "step.h"

namespace fd {

struct Embedding {
  Step step;
  const void* table;  // [vocabulary, width]
  Format format;      // kFloat32 or kBfloat16
  int vocabulary;
  int width;
  float* out;  // [num_tokens, width]
};

// Throws std::invalid_argument if a token id is outside of the vocabulary.
void embedding(const Embedding& args);

}  // namespace fd
