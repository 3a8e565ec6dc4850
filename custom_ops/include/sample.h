// From logits to tokens, for a whole batch.
//
// Each row is worked on alone, in an order fixed by token ids, in one thread, and its random number depends
// on seed, choice and position only: a token does not depend on other rows or on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "team.h"

namespace fd {

// How the token of one row is drawn; custom_ops/sampling.py has the same fields in the same order.
struct SamplingRow {
  double temperature;  // 0: the most likely token
  double top_p;
  double min_p;
  double repetition_penalty;
  double frequency_penalty;
  double presence_penalty;
  uint64_t seed;
  uint32_t choice;
  uint32_t position;
  int32_t top_k;     // 0: all tokens
  int32_t logprobs;  // -1: none; 0: of the drawn token; n: and of the n most likely ones
  // The row's part of Sampling::tokens: first those of the text, then those that must not be drawn.
  int32_t first_token;
  int32_t num_seen;
  int32_t num_masked;
  int32_t given;  // 0: draw a token; else 1 + the token to score instead
};

struct TokenCount {
  int32_t token;
  int32_t count;  // in the output; 0: in the prompt only
};

// The drawn token of a row that holds NaN or nothing finite.
constexpr int64_t kBrokenRow = -1;

struct Sampling {
  const float* logits;  // [rows][vocabulary]
  int64_t rows;
  int64_t vocabulary;
  const SamplingRow* params;  // [rows]
  const TokenCount* tokens;   // ids outside of the vocabulary are passed over
  int64_t* drawn;             // [rows]
  // [rows][width]: the drawn token and its log probability, then the most likely ones. What a row did not ask
  // for is left as it was. Probabilities are those of the logits as they came.
  int32_t* top_tokens;
  double* logprobs;
  int64_t width;
  std::byte* scratch;  // sampling_scratch(vocabulary) bytes for each thread, aligned to 64
};

int64_t sampling_scratch(int64_t vocabulary);

// Repetition penalty, frequency and presence penalty, masks; then, unless greedy, temperature, min_p, top_k,
// top_p on what is left, and one draw by inverse CDF over the candidates in ascending order of ids.
void sample(Team& team, const Sampling& args);

struct Argmax {
  const float* logits;  // [rows][vocabulary]
  int64_t rows;
  int64_t vocabulary;
  int64_t* drawn;  // [rows]
  float* maxima;   // scratch: token_blocks(vocabulary) for each thread
};

// The most likely token of each row, the lowest id among equals.
void argmax(Team& team, const Argmax& args);

}  // namespace fd
