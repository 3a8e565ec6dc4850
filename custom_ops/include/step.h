// The integers that describe one step; engine/device/step_buffer.py writes them.
#pragma once

#include <cstdint>

namespace fd {

// View of one int32 buffer with these contents, in order:
//   num_sequences, num_tokens, table_width, num_logits,
//   first_token[num_sequences + 1], start[num_sequences], block_tables[num_sequences, table_width],
//   token_ids[num_tokens], logit_tokens[num_logits]
// A token id -1 - r stands for what row r of the step before drew; only devices that run ahead get such ids.
struct Step {
  int num_sequences;
  int num_tokens;
  int table_width;
  // Number of tokens whose logits are computed.
  int num_logits;
  // Tokens first_token[s] .. first_token[s + 1] - 1 of the step belong to sequence s.
  const int32_t* first_token;
  // Position of the first of these tokens within sequence s.
  const int32_t* start;
  // Row s: cache blocks of sequence s, up to the end of its context.
  const int32_t* block_tables;
  const int32_t* token_ids;
  const int32_t* logit_tokens;

  // Throws std::invalid_argument if the buffer is shorter than its first four integers require, or if the token ranges
  // of the sequences are not consecutive. Does not check block tables and token ids.
  static Step view(const int32_t* buffer, int64_t count);

  int length(int sequence) const { return first_token[sequence + 1] - first_token[sequence]; }
  int context(int sequence) const { return start[sequence] + length(sequence); }
  const int32_t* blocks(int sequence) const {
    return block_tables + static_cast<int64_t>(sequence) * table_width;
  }
};

}  // namespace fd
