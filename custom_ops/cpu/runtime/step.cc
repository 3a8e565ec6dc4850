#include "step.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace fd {

Step Step::view(const int32_t* buffer, int64_t count) {
  if (count < 4) throw std::invalid_argument("step: the buffer is shorter than its header");
  if (*std::min_element(buffer, buffer + 4) < 0) throw std::invalid_argument("step: a count is negative");
  Step step;
  step.num_sequences = buffer[0];
  step.num_tokens = buffer[1];
  step.table_width = buffer[2];
  step.num_logits = buffer[3];
  const int64_t sequences = step.num_sequences;
  if (4 + sequences + 1 + sequences + sequences * step.table_width + step.num_tokens + step.num_logits > count) {
    throw std::invalid_argument("step: the buffer is shorter than its header says");
  }
  step.first_token = buffer + 4;
  step.start = step.first_token + sequences + 1;
  step.block_tables = step.start + sequences;
  step.token_ids = step.block_tables + sequences * step.table_width;
  step.logit_tokens = step.token_ids + step.num_tokens;
  bool sound = step.first_token[0] == 0 && step.first_token[step.num_sequences] == step.num_tokens;
  for (int s = 0; s < step.num_sequences; ++s) {
    sound = sound && step.first_token[s] <= step.first_token[s + 1] && step.start[s] >= 0 &&
            step.start[s] <= std::numeric_limits<int32_t>::max() - step.length(s);
  }
  if (!sound) throw std::invalid_argument("step: tokens of the sequences are not consecutive");
  return step;
}

}  // namespace fd
