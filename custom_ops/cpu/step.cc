#include "step.h"

#include <stdexcept>

namespace fd {

Step Step::view(const int32_t* buffer, int64_t count) {
  if (count < 4) throw std::invalid_argument("step: the buffer is shorter than its header");
  Step step;
  step.num_sequences = buffer[0];
  step.num_tokens = buffer[1];
  step.table_width = buffer[2];
  step.num_logits = buffer[3];
  step.first_token = buffer + 4;
  step.start = step.first_token + step.num_sequences + 1;
  step.block_tables = step.start + step.num_sequences;
  step.token_ids = step.block_tables + static_cast<int64_t>(step.num_sequences) * step.table_width;
  step.logit_tokens = step.token_ids + step.num_tokens;
  if (step.logit_tokens + step.num_logits > buffer + count) {
    throw std::invalid_argument("step: the buffer is shorter than its header says");
  }
  return step;
}

}  // namespace fd
