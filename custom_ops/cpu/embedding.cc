#include "embedding.h"

#include <cstring>
#include <stdexcept>

namespace fd {

void embedding(const Embedding& args) {
  const int width = args.width;
  for (int token = 0; token < args.step.num_tokens; ++token) {
    const int64_t id = args.step.token_ids[token];
    if (id < 0 || id >= args.vocabulary) throw std::invalid_argument("embedding: a token id outside of the vocabulary");
    float* const row = args.out + int64_t{token} * width;
    if (args.format == Format::kFloat32) {
      std::memcpy(row, static_cast<const float*>(args.table) + id * width, width * sizeof(float));
      continue;
    }
    const uint16_t* const source = static_cast<const uint16_t*>(args.table) + id * width;
    for (int i = 0; i < width; ++i) {
      const uint32_t bits = static_cast<uint32_t>(source[i]) << 16;
      std::memcpy(row + i, &bits, 4);
    }
  }
}

}  // namespace fd
