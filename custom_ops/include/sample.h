// Samples one token per row of logits.
//
// Each row is processed by one thread in ascending order of token ids, and its random number depends on seed, choice
// and position only. A token therefore does not depend on other rows or on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "team.h"

namespace fd {

// Sampling parameters of one row; custom_ops/sampling.py has the same fields in the same order.
struct SamplingRow {
  double temperature;  // 0: greedy
  double top_p;
  double min_p;
  double repetition_penalty;
  double frequency_penalty;
  double presence_penalty;
  uint64_t seed;
  uint32_t choice;
  uint32_t position;
  int32_t top_k;     // 0: all tokens
  int32_t logprobs;  // -1: none; 0: of the drawn token; n: also of the n most likely tokens
  // The row's entries of Sampling::tokens: first num_seen tokens of the text, then num_masked forbidden tokens, then
  // num_biased tokens with the bits of a float in place of a count, then a mask: if num_mask_entries is not 0, the bits
  // of these entries, lowest first, say which tokens are allowed, and those without a bit are forbidden.
  int32_t first_token;
  int32_t num_seen;
  int32_t num_masked;
  int32_t given;  // 0: draw a token; otherwise 1 + the token to score and to rank instead
  int32_t num_biased;
  int32_t num_mask_entries;
};

struct TokenCount {
  int32_t token;
  int32_t count;  // occurrences in the output; 0: in the prompt only
};

// Result for a row that holds NaN or no finite value.
constexpr int64_t kBrokenRow = -1;

struct Sampling {
  const float* logits;  // [rows][vocabulary]
  int64_t rows;
  int64_t vocabulary;
  const SamplingRow* params;  // [rows]
  const TokenCount* tokens;   // ids outside the vocabulary are ignored; each occurs once among the biased
  int64_t* drawn;             // [rows]; of a token to be scored its rank, see SamplingRow::given
  // [rows][width]: the drawn token and its log probability, then those of the most likely tokens, all of the unmodified
  // logits. Entries that a row did not request are not written.
  int32_t* top_tokens;
  double* logprobs;
  int64_t width;
  std::byte* scratch;  // sampling_scratch(vocabulary) bytes per thread, aligned to 64
};

int64_t sampling_scratch(int64_t vocabulary);

// Adds biases, applies repetition, frequency and presence penalties and masks; then, unless greedy, temperature,
// min_p, top_k and top_p, and draws by inverse CDF over the remaining tokens in ascending order of ids.
void sample(Team& team, const Sampling& args);

struct Argmax {
  const float* logits;  // [rows][vocabulary]
  int64_t rows;
  int64_t vocabulary;
  int64_t* drawn;  // [rows]
  float* maxima;   // scratch: token_blocks(vocabulary) per thread
};

// Finds the most likely token of each row; ties go to the lowest id.
void argmax(Team& team, const Argmax& args);

}  // namespace fd
