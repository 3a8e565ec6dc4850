// The kernels, compiled once per instruction set, and the selection at run time.
//
// A kernel computes one item of work on one thread. Operations (one header each in include/) divide their work into
// items and call kernels through the table of the selected instruction set.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "activations.h"

namespace fd {

// Raise it with each change of the kernels that changes the bits of a result, together with PROTOCOL_VERSION in
// expert_parallel/layout.py, so that fd-dp starts new replicas in a group of their own.
constexpr int kNumericVersion = 1;

enum class Output {
  kStore,   // out[row] = y
  kAdd,     // out[row] += y
  kSwiglu,  // y is gate and up interleaved 16 columns at a time; activated = silu(gate) * up
};

// Panels [first_panel, first_panel + num_panels) of one matrix times rows [first_row, last_row) of x.
struct Gemm {
  const PackedMatrix* weights;
  int matrix;
  int first_panel;
  int num_panels;
  Activations x;
  int first_row;
  int last_row;
  Output output;
  float* out;  // kStore, kAdd: the output of row r is at out + r * out_stride
  int64_t out_stride;
  Activations activated;  // kSwiglu: as many rows as x
  float* scratch;         // gemm_scratch(rows, inputs, panels) floats
};

// Elements of a KV cache: float32 with float32 weights, otherwise bfloat16.
enum class CacheType { kFloat32, kBfloat16 };

// The cache of one layer. Keys: [block][kv head][panel of 32 keys][head_dim][32]; values: [block][kv head][panel of 32
// columns][key][32]. Both are stored as panels, so that scores and the weighted sum of values are matrix products with
// the cache as weights. In bfloat16, word i of a row of 32 holds columns i and 16 + i.
struct Cache {
  CacheType type;
  uint8_t* keys;
  uint8_t* values;
  int num_kv_heads;
  int head_dim;
  int block_size;

  int64_t element() const { return type == CacheType::kFloat32 ? 4 : 2; }
  int key_panels() const { return (block_size + kPanel - 1) / kPanel; }
  int value_panels() const { return (head_dim + kPanel - 1) / kPanel; }
  int64_t key_panel_bytes() const { return element() * head_dim * kPanel; }
  int64_t value_panel_bytes() const { return element() * block_size * kPanel; }
  uint8_t* key_panel(int64_t block, int head, int panel) const {
    return keys + ((block * num_kv_heads + head) * key_panels() + panel) * key_panel_bytes();
  }
  uint8_t* value_panel(int64_t block, int head, int panel) const {
    return values + ((block * num_kv_heads + head) * value_panels() + panel) * value_panel_bytes();
  }
};

// State of an unnormalised softmax over part of a context: sum = sum of e^(s - maximum), out = sum of e^(s - maximum)
// v.
struct PartialSoftmax {
  float maximum;
  float sum;
};

// Queries of one sequence and one kv head against keys [first_block, last_block) of the sequence.
struct Attend {
  Cache cache;
  const int32_t* block_table;
  int first_block;
  int last_block;
  int head;
  int num_rows;              // at most attend_height of the instruction set
  const int32_t* positions;  // of each row
  const float* query;        // activations [num_rows, head_dim], scaled by head_dim ** -0.5
  PartialSoftmax* state;     // [num_rows], out
  float* out;                // [num_rows][value_panels * 32], out, not normalised
  float* scratch;            // attend_scratch(block_size, attend_height) floats
};

inline int64_t attend_scratch(int block_size, int attend_height) {
  return Activations::padded(block_size) * attend_height;
}

// Sampling processes the vocabulary in blocks of this many tokens.
constexpr int64_t kTokenBlock = 64;
inline int64_t token_blocks(int64_t count) { return (count + kTokenBlock - 1) / kTokenBlock; }

struct Kernels {
  const char* name;
  // Maximum rows of `attend`.
  int attend_height;
  // Maximum rows of an item of `gemm`: enough to amortise the work done once per panel.
  int gemm_rows;
  // Floats of scratch for an item with these rows, inputs and panels.
  int64_t (*gemm_scratch)(int rows, int inputs, int panels);
  void (*gemm)(const Gemm&);
  void (*attend)(const Attend&);
  // Merges the state and output of a later part of the context into those of an earlier part.
  void (*merge)(PartialSoftmax& state, float* out, const PartialSoftmax& later, const float* later_out, int width);
  // y = x / sqrt(mean(x^2) + epsilon) * weight
  void (*rms_norm)(const float* x, const float* weight, float epsilon, float* y, int width);
  // probabilities = softmax(logits), in place
  void (*softmax)(float* x, int count);
  // out += (sum over j of weights[j] * rows[j], in order of j) + last, which may be null; one addition to out
  void (*combine)(float* out, const float* const* rows, const float* weights, int count, const float* last,
                  int width);
  // The same for bfloat16 rows, without `last`
  void (*combine_bfloat16)(float* out, const uint16_t* const* rows, const float* weights, int count, int width);
  // maxima[b] = the highest score of block b; returns the highest of all, NaN if any score is NaN
  float (*block_maxima)(const float* scores, int64_t count, float* maxima);
  // weights[i] = 2^((scores[i] - best) * factor), padded with zeros to a whole block; sums[b] = sum of block b
  void (*weigh)(const float* scores, int64_t count, double best, double factor, double* weights, double* sums);
  // returns the sum of the weights >= cut > 0; the weights are padded with zeros to a whole block
  double (*mass_from)(const double* weights, int64_t count, double cut);
  // sets weights below `cut` to zero; sums[b] = sum of block b
  void (*retain)(double* weights, int64_t count, double cut, double* sums);
};

// The best kernels for this processor, or those that FD_ISA=generic|avx2|avx512|amx in the environment selects. Throws
// std::invalid_argument if the processor does not support those.
const Kernels& kernels();

namespace generic {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
// The AVX-512 kernels with other matrix products.
namespace amx {
const Kernels& table();
}

}  // namespace fd
