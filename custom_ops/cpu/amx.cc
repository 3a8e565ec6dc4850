// Matrix products for processors with AMX; everything else is as on AVX-512.
//
// Activations are rounded to bfloat16 here, which the other instruction sets do not do. A row's results still
// depend on that row alone: each tile instruction adds 32 products to each sum in an order of its own, and the
// instructions follow each other in the order of the inputs. So that a token gets the same bits in any batch,
// a single row takes this way too.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

// After every header with code of its own: what those define is shared by the whole program and must run on
// processors without these instructions.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi2,amx-tile,amx-bf16")
#include <immintrin.h>

#define FD_AVX512
#define FD_MAX_HEIGHT 12

namespace fd::amx {
namespace {

#include "simd.h"

#include "product.inl"

#include "gemm.inl"

// Inputs of one tile instruction, and the bytes of so many inputs of one row, and of one panel.
constexpr int kStep = 32;
constexpr int kRowBytes = kStep * 2;
constexpr int kPanelBytes = kStep * kPanel * 2;
// Rows of one tile; two tiles of rows and two of outputs are worked on at a time.
constexpr int kTileRows = 16;
constexpr int kBlockRows = 2 * kTileRows;

int steps(int inputs) { return (inputs + kStep - 1) / kStep; }

// Rows in bfloat16, one expanded panel (or the slots for a part of it), and one block of results.
int64_t scratch_floats(int rows, int inputs, int panels) {
  const int64_t expanded = static_cast<int64_t>(steps(inputs) < 4 ? 4 : steps(inputs)) * kPanelBytes;
  const int64_t bytes = static_cast<int64_t>(steps(inputs)) * rows * kRowBytes + expanded;
  const int64_t own = bytes / 4 + kBlockRows * kPanel;
  const int64_t float32 = gemm_scratch(rows, inputs, panels);
  return own > float32 ? own : float32;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums of (upper, lower rows) x (first, second outputs). 4, 5: upper and lower rows. 6, 7: first
// and second outputs.
void configure(int upper, int lower) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.column_bytes[tile] = 64;
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(upper);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(lower < 1 ? 1 : lower);
  config.rows[6] = config.rows[7] = kStep / 2;
  _tile_loadconfig(&config);
}

// [steps][rows][32] in bfloat16; inputs behind the last are zero.
void round_rows(const Gemm& task, uint8_t* out) {
  const int rows = task.last_row - task.first_row, inputs = task.weights->inputs;
  for (int begin = 0; begin < inputs; begin += kStep) {
    for (int row = 0; row < rows; ++row, out += kRowBytes) {
      const float* x = task.x.piece(task.first_row + row, begin / kPiece) + begin % kPiece;
      V low, high;
      if (begin + kStep <= inputs) {
        low = load(x);
        high = load(x + 16);
      } else {
        const int left = inputs - begin;
        low = load_part(x, left < 16 ? left : 16);
        high = load_part(x + 16, left < 16 ? 0 : left - 16);
      }
      _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
    }
  }
}

// Where the multiplication gets a step's weights from: 16 words of two inputs each, for 32 outputs.

struct Bfloat16Steps {
  const uint8_t* data;
  bool cold;

  void begin() {}
  FD_INLINE const uint8_t* at(int step) {
    const uint8_t* place = data + static_cast<int64_t>(step) * kPanelBytes;
    // A tile load waits for each of its lines; what follows in memory is asked for well before.
    if (cold) {
#pragma GCC unroll 32
      for (int line = 0; line < kPanelBytes; line += 64) __builtin_prefetch(place + 4 * kPanelBytes + line, 0, 3);
    }
    return place;
  }
};

// The exact upper halves of integers: `even` in the low half of each word, `odd` in the high half.
FD_INLINE void store_integers(uint8_t* out, V even, V odd) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i low_half = _mm512_srli_epi32(_mm512_castps_si512(even.v), 16);
  _mm512_store_si512(out, _mm512_or_si512(low_half, _mm512_and_si512(_mm512_castps_si512(odd.v), high)));
}

// The same, rounded to the nearest bfloat16, ties to even.
FD_INLINE void store_rounded(uint8_t* out, V even, V odd) {
  alignas(64) static constexpr uint16_t kInterleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6, 22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v));
  _mm512_store_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), halves));
}

// One step of wint8, whose integers are bfloat16 without rounding.
FD_INLINE void expand_wint8_step(const uint8_t* data, int step, int inputs, uint8_t* out) {
  data += static_cast<int64_t>(step) * kStep * kPanel;
  const int count = inputs - step * kStep;
  for (int k = 0; k < kStep; k += 2, data += 2 * kPanel, out += 4 * kPanel) {
    __builtin_prefetch(data + 2048, 0, 3);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      // Behind the last input: zeros, which meet the zeros of `round_rows`.
      const V even = k < count ? load_int8(data + 16 * half) : zero();
      const V odd = k + 1 < count ? load_int8(data + kPanel + 16 * half) : zero();
      store_integers(out + 64 * half, even, odd);
    }
  }
}

// One step of wint4: one of its groups. What is behind the last input meets zeros.
FD_INLINE void expand_wint4_step(const uint8_t* data, int step, int, uint8_t* out) {
  static_assert(kWint4Group == kStep);
  data += static_cast<int64_t>(step) * kWint4GroupBytes;
  V scale[2], minimum[2];
  load_bf16(data, scale[0], minimum[0]);
  load_bf16(data + 64, scale[1], minimum[1]);
  data += kPanel * 4;
  for (int quad = 0; quad < kWint4Group; quad += 4, data += 64, out += 8 * kPanel) {
    __builtin_prefetch(data + 2048, 0, 3);
    const Words words = load_words(data);
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const V even = fma(nibble(words, 8 * i + 4 * half), scale[half], minimum[half]);
        const V odd = fma(nibble(words, 8 * i + 8 + 4 * half), scale[half], minimum[half]);
        store_rounded(out + 2 * kPanel * i + 64 * half, even, odd);
      }
    }
  }
}

// Expands two steps ahead of the multiplication, so that both are under way at the same time.
template <void (*kExpand)(const uint8_t*, int, int, uint8_t*)>
struct ExpandedSteps {
  static constexpr int kAhead = 2, kSlots = 4;
  const uint8_t* data;
  int inputs;
  uint8_t* slots;

  uint8_t* slot(int step) { return slots + step % kSlots * kPanelBytes; }
  void expand(int step) {
    if (step < steps(inputs)) kExpand(data, step, inputs, slot(step));
  }
  void begin() {
    for (int step = 0; step < kAhead; ++step) expand(step);
  }
  FD_INLINE const uint8_t* at(int step) {
    expand(step + kAhead);
    return slot(step);
  }
};

// Sums of up to 16 rows, or with kBoth of 16 and up to 16 more, with the 32 outputs of a panel: [rows][32].
template <bool kBoth, class Steps>
FD_INLINE void multiply(const uint8_t* x, int64_t x_step, Steps source, int count, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kBoth) {
    _tile_zero(2);
    _tile_zero(3);
  }
  source.begin();
  for (int step = 0; step < count; ++step, x += x_step) {
    const uint8_t* data = source.at(step);
    _tile_loadd(6, data, 2 * 64);
    _tile_loadd(7, data + 64, 2 * 64);
    _tile_loadd(4, x, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBoth) {
      _tile_loadd(5, x + kTileRows * kRowBytes, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int kStride = kPanel * sizeof(float);
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + 16, kStride);
  if constexpr (kBoth) {
    _tile_stored(2, sums + kTileRows * kPanel, kStride);
    _tile_stored(3, sums + kTileRows * kPanel + 16, kStride);
  }
}

template <class Steps>
void multiply_block(int height, const uint8_t* x, int64_t x_step, Steps source, int count, float* sums) {
  if (height > kTileRows) {
    multiply<true>(x, x_step, source, count, sums);
  } else {
    multiply<false>(x, x_step, source, count, sums);
  }
}

template <void (*kExpand)(const uint8_t*, int, int, uint8_t*)>
void expand_panel(const uint8_t* data, int inputs, uint8_t* out) {
  for (int step = 0; step < steps(inputs); ++step, out += kPanelBytes) kExpand(data, step, inputs, out);
}

void gemm_amx(const Gemm& task) {
  const PackedMatrix& weights = *task.weights;
  if (weights.format == Format::kFloat32) return gemm(task);
  const int rows = task.last_row - task.first_row, inputs = weights.inputs, count = steps(inputs);
  const int64_t x_step = static_cast<int64_t>(rows) * kRowBytes;
  float* const sums = task.scratch;
  uint8_t* const x = reinterpret_cast<uint8_t*>(sums + kBlockRows * kPanel);
  uint8_t* const expanded = x + count * x_step;
  round_rows(task, x);
  int configured = 0;
  for (int i = 0; i < task.num_panels; ++i) {
    const int panel = task.first_panel + i;
    const Panel parts = panel_of(weights, weights.panel(task.matrix, panel));
    const bool once = rows <= kBlockRows;
    if (!once && weights.format == Format::kWint8) expand_panel<expand_wint8_step>(parts.data, inputs, expanded);
    if (!once && weights.format == Format::kWint4) expand_panel<expand_wint4_step>(parts.data, inputs, expanded);
    for (int begin = 0; begin < rows; begin += kBlockRows) {
      const int height = rows - begin < kBlockRows ? rows - begin : kBlockRows;
      if (configured != height) configure(height < kTileRows ? height : kTileRows, height - kTileRows);
      configured = height;
      const uint8_t* block = x + begin * kRowBytes;
      if (weights.format == Format::kBfloat16) {
        multiply_block(height, block, x_step, Bfloat16Steps{parts.data, begin == 0}, count, sums);
      } else if (!once) {
        multiply_block(height, block, x_step, Bfloat16Steps{expanded, false}, count, sums);
      } else if (weights.format == Format::kWint8) {
        multiply_block(height, block, x_step, ExpandedSteps<expand_wint8_step>{parts.data, inputs, expanded},
                       count, sums);
      } else {
        multiply_block(height, block, x_step, ExpandedSteps<expand_wint4_step>{parts.data, inputs, expanded},
                       count, sums);
      }
      for (int row = 0; row < height; ++row) {
        const float* place = sums + row * kPanel;
        finish(task, panel, parts, task.first_row + begin + row, load(place), load(place + 16));
      }
    }
  }
  // Otherwise the kernel would save and restore tiles whenever this thread is interrupted.
  _tile_release();
}

}  // namespace

const Kernels& table() {
  static const Kernels kernels = [] {
    Kernels own = avx512::table;
    own.name = "amx";
    own.gemm_rows = 256;
    own.gemm_scratch = scratch_floats;
    own.gemm = gemm_amx;
    return own;
  }();
  return kernels;
}

}  // namespace fd::amx
