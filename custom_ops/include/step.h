// What one step computes, as engine/core/model_runner.py writes it: a few integers per sequence.
#pragma once

#include <cstdint>

namespace fd {

// All arrays are views of one int32 buffer, in the order of the members:
//   num_sequences, num_tokens, table_width, num_logits,
//   first_token[num_sequences + 1], start[num_sequences], block_tables[num_sequences, table_width],
//   token_ids[num_tokens], logit_tokens[num_logits]
struct Step {
  int num_sequences;
  int num_tokens;
  int table_width;
  // Tokens whose logits are wanted.
  int num_logits;
  // Tokens first_token[s] .. first_token[s + 1] - 1 of the step belong to sequence s ...
  const int32_t* first_token;
  // ... and stand at its positions start[s] and following.
  const int32_t* start;
  // Row s: the blocks of sequence s, as far as its context goes.
  const int32_t* block_tables;
  const int32_t* token_ids;
  const int32_t* logit_tokens;

  // Throws std::invalid_argument if the buffer is shorter than its first four integers say, or if the tokens
  // of the sequences are not one behind the other. Block tables and token ids are not looked at.
  static Step view(const int32_t* buffer, int64_t count);

  int length(int sequence) const { return first_token[sequence + 1] - first_token[sequence]; }
  int context(int sequence) const { return start[sequence] + length(sequence); }
  const int32_t* blocks(int sequence) const {
    return block_tables + static_cast<int64_t>(sequence) * table_width;
  }
};

}  // namespace fd
