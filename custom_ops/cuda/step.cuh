// Device view of the step buffer of custom_ops/include/step.h.
#pragma once

#include <cstdint>

namespace fd::cuda {

struct StepView {
  int num_sequences;
  int num_tokens;
  int table_width;
  int num_logits;
  const int32_t* first_token;
  const int32_t* start;
  const int32_t* block_tables;
  const int32_t* token_ids;
  const int32_t* logit_tokens;

  __device__ explicit StepView(const int32_t* buffer)
      : num_sequences(buffer[0]),
        num_tokens(buffer[1]),
        table_width(buffer[2]),
        num_logits(buffer[3]),
        first_token(buffer + 4),
        start(first_token + num_sequences + 1),
        block_tables(start + num_sequences),
        token_ids(block_tables + int64_t{num_sequences} * table_width),
        logit_tokens(token_ids + num_tokens) {}

  __device__ int length(int sequence) const { return first_token[sequence + 1] - first_token[sequence]; }

  // The sequence of a token of the step.
  __device__ int sequence_of(int token) const {
    int low = 0;
    for (int high = num_sequences; high - low > 1;) {
      const int middle = (low + high) / 2;
      (first_token[middle] <= token ? low : high) = middle;
    }
    return low;
  }
};

}  // namespace fd::cuda
