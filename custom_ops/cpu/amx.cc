// Products with bfloat16 matrices for processors with AMX; everything else is as on AVX-512. Quantised weights
// too: they are for reading less memory, and bringing them into tiles takes longer than that saves.
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

// Rows in bfloat16 and one block of results.
int64_t scratch_floats(int rows, int inputs, int panels) {
  const int64_t own = static_cast<int64_t>(steps(inputs)) * rows * kRowBytes / 4 + kBlockRows * kPanel;
  const int64_t others = gemm_scratch(rows, inputs, panels);
  return own > others ? own : others;
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

// A tile load waits for each of its lines; what follows in memory is asked for well before.
FD_INLINE void prefetch_step(const uint8_t* data) {
#pragma GCC unroll 32
  for (int line = 0; line < kPanelBytes; line += 64) __builtin_prefetch(data + 4 * kPanelBytes + line, 0, 3);
}

// Sums of up to 16 rows, or with kBoth of 16 and up to 16 more, with the 32 outputs of a panel: [rows][32].
template <bool kBoth>
void multiply(const uint8_t* x, int64_t x_step, const uint8_t* data, bool cold, int count, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kBoth) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < count; ++step, x += x_step, data += kPanelBytes) {
    if (cold) prefetch_step(data);
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

void gemm_amx(const Gemm& task) {
  const PackedMatrix& weights = *task.weights;
  if (weights.format != Format::kBfloat16) return gemm(task);
  const int rows = task.last_row - task.first_row, count = steps(weights.inputs);
  const int64_t x_step = static_cast<int64_t>(rows) * kRowBytes;
  float* const sums = task.scratch;
  uint8_t* const x = reinterpret_cast<uint8_t*>(sums + kBlockRows * kPanel);
  round_rows(task, x);
  int configured = 0;
  for (int i = 0; i < task.num_panels; ++i) {
    const int panel = task.first_panel + i;
    const Panel parts = panel_of(weights, weights.panel(task.matrix, panel));
    for (int begin = 0; begin < rows; begin += kBlockRows) {
      const int height = rows - begin < kBlockRows ? rows - begin : kBlockRows;
      if (configured != height) configure(height < kTileRows ? height : kTileRows, height - kTileRows);
      configured = height;
      const auto run = height > kTileRows ? multiply<true> : multiply<false>;
      run(x + begin * kRowBytes, x_step, parts.data, begin == 0, count, sums);
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
