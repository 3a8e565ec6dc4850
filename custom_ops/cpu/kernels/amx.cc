// AMX products with bfloat16 matrices; everything else uses the AVX-512 kernels. So do quantised weights: converting
// them for tiles takes longer than reading less memory saves.
//
// Unlike the other instruction sets, AMX rounds activations to bfloat16. The results of a row still depend on that row
// alone: each tile instruction adds 32 products to a sum in a fixed order, and the instructions follow the order of the
// inputs. A few rows are computed in the same order without tiles.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

// Must follow all headers that define functions: the linker keeps one copy of those for the whole program, and it must
// run on processors without these instructions.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,bmi2,amx-tile,amx-bf16")
#include <immintrin.h>

#define FD_AVX512
#define FD_MAX_HEIGHT 12

namespace fd::amx {
namespace {

#include "kernels/simd.h"

#include "kernels/product.inl"

#include "kernels/gemm.inl"

// Inputs of one tile instruction, and their bytes in one row and in one panel.
constexpr int kStep = 32;
constexpr int kRowBytes = kStep * 2;
constexpr int kPanelBytes = kStep * kPanel * 2;
// Rows of one tile. A block is two tiles of rows times two tiles of outputs.
constexpr int kTileRows = 16;
constexpr int kBlockRows = 2 * kTileRows;

int steps(int inputs) { return (inputs + kStep - 1) / kStep; }

// Scratch for rows in bfloat16, and for one block of results or a few rows in float32.
int64_t scratch_floats(int rows, int inputs, int panels) {
  const int64_t width = static_cast<int64_t>(steps(inputs)) * kStep;
  const int64_t own = (rows + 1) / 2 * width + kBlockRows * kPanel + 2 * width;
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

// Tiles 0 to 3 are the sums of (upper, lower) rows times (first, second) outputs, 4 and 5 the upper and lower rows, 6
// and 7 the first and second outputs.
void configure(int upper, int lower) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.column_bytes[tile] = 64;
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(upper);
  config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(lower < 1 ? 1 : lower);
  config.rows[6] = config.rows[7] = kStep / 2;
  // GCC 12 assumes that the instruction reads only eight bytes and might omit the other writes.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// Writes rows as bfloat16 [steps][rows][32], padded with zeros.
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

// Prefetches well ahead, because a tile load stalls on each of its cache lines.
FD_INLINE void prefetch_step(const uint8_t* data) {
#pragma GCC unroll 32
  for (int line = 0; line < kPanelBytes; line += 64) __builtin_prefetch(data + 4 * kPanelBytes + line, 0, 3);
}

// sums [rows][32] = up to 16 rows, or with kBoth 17 to 32 rows, times the 32 outputs of a panel.
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

// Up to this many rows are computed without tiles, which loads the weights faster, from several panels at once. The
// result is bit-identical to the tile instruction (TDPBF16PS in Intel's manual): within a step of 32 inputs it
// accumulates the even and the odd inputs separately from zero, and adds their sum to the accumulator. Denormals are
// treated as zeros.
constexpr int kFewRows = 2;

class FlushToZero {
 public:
  FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

// sums = x * panels; x [R][x_stride] is rounded to bfloat16 and padded with zeros to whole steps.
template <int R, int P>
FD_INLINE void product_few(const float* x, int64_t x_stride, const uint8_t* data, int64_t stride, int count,
                           Sums<R, P>& sums) {
  const FlushToZero flush;
  clear(sums);
  for (int step = 0; step < count; ++step, x += kStep, data += kPanelBytes) {
    Sums<R, P> even, odd;
    clear(even);
    clear(odd);
    for (int i = 0; i < kStep; i += 2) {
      V even_first[P], even_second[P], odd_first[P], odd_second[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const uint8_t* source = data + p * stride + i * kPanel * 2;
        prefetch(source);
        prefetch(source + 64);
        load_bf16(source, even_first[p], odd_first[p]);
        load_bf16(source + 64, even_second[p], odd_second[p]);
      }
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const V x_even = broadcast(x[r * x_stride + i]), x_odd = broadcast(x[r * x_stride + i + 1]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          even.first[r][p] = fma(x_even, even_first[p], even.first[r][p]);
          even.second[r][p] = fma(x_even, even_second[p], even.second[r][p]);
          odd.first[r][p] = fma(x_odd, odd_first[p], odd.first[r][p]);
          odd.second[r][p] = fma(x_odd, odd_second[p], odd.second[r][p]);
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        sums.first[r][p] = add(add(even.first[r][p], odd.first[r][p]), sums.first[r][p]);
        sums.second[r][p] = add(add(even.second[r][p], odd.second[r][p]), sums.second[r][p]);
      }
    }
  }
}

template <int R, int P>
void compute_few(const Gemm& task, int panel, const float* x, int64_t x_stride) {
  const PackedMatrix& weights = *task.weights;
  const uint8_t* data = panel_of(weights, weights.panel(task.matrix, panel)).data;
  Sums<R, P> sums;
  product_few(x, x_stride, data, weights.panel_bytes, steps(weights.inputs), sums);
  for (int p = 0; p < P; ++p) {
    const Panel parts = panel_of(weights, weights.panel(task.matrix, panel + p));
    for (int r = 0; r < R; ++r) {
      finish(task, panel + p, parts, task.first_row + r, sums.first[r][p], sums.second[r][p]);
    }
  }
}

template <int R>
void gemm_few(const Gemm& task) {
  constexpr int P = R == 1 ? 4 : 2;
  const int count = steps(task.weights->inputs);
  const int64_t x_stride = static_cast<int64_t>(count) * kStep;
  uint8_t* const rounded = reinterpret_cast<uint8_t*>(task.scratch);
  round_rows(task, rounded);
  float* const x = task.scratch + R * x_stride / 2;
  for (int step = 0; step < count; ++step) {
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < kStep; ++i) {
        uint16_t half;
        std::memcpy(&half, rounded + ((step * R + r) * kStep + i) * 2, 2);
        const uint32_t word = static_cast<uint32_t>(half) << 16;
        std::memcpy(x + r * x_stride + step * kStep + i, &word, 4);
      }
    }
  }
  const int last = task.first_panel + task.num_panels;
  int panel = task.first_panel;
  for (; panel + P <= last; panel += P) compute_few<R, P>(task, panel, x, x_stride);
  for (; panel < last; ++panel) compute_few<R, 1>(task, panel, x, x_stride);
}

void gemm_amx(const Gemm& task) {
  const PackedMatrix& weights = *task.weights;
  if (weights.format != Format::kBfloat16) return gemm(task);
  const int rows = task.last_row - task.first_row, count = steps(weights.inputs);
  if (rows == 1) return gemm_few<1>(task);
  if (rows == kFewRows) return gemm_few<kFewRows>(task);
  const int64_t x_step = static_cast<int64_t>(rows) * kRowBytes;
  float* const sums = task.scratch;
  uint8_t* const x = reinterpret_cast<uint8_t*>(sums + kBlockRows * kPanel);
  round_rows(task, x);
  // GCC does not know either that tile loads read the rounded rows.
  asm volatile("" ::: "memory");
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
        const float* sum = sums + row * kPanel;
        finish(task, panel, parts, task.first_row + begin + row, load(sum), load(sum + 16));
      }
    }
  }
  // Otherwise Linux would save and restore the tiles at each context switch of this thread.
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
