// Products of a few rows with panels of 32 outputs; all matrix products reduce to these.
//
// Each sum is fma(x_k, w_k, sum) for k = 0, 1, ... in this order, regardless of the number of rows, the number of
// panels at once, and AVX2 or AVX-512. This makes the result of a row independent of its batch.

constexpr int kMaxHeight = FD_MAX_HEIGHT;

// Number of panels computed at once. With few rows, a single panel has too few independent sums to hide the latency of
// an fma; with many, there are no registers for a second panel.
constexpr int panels_at_once(int height) {
#if defined(FD_AVX512)
  return height <= 3 ? 4 : height <= 6 ? 2 : 1;
#else
  return height == 1 ? 2 : 1;
#endif
}

template <int R, int P>
struct Sums {
  V first[R][P];
  V second[R][P];
};

// Prefetch distance. With many rows, a kernel computes for long on each cache line, and the processor's own look-ahead
// reaches too few of the following lines.
constexpr int kPrefetchBytes = 2048;

FD_INLINE void prefetch(const uint8_t* place) { __builtin_prefetch(place + kPrefetchBytes, 0, 3); }

// Readers of the panel formats. `data` points past the bias (and the scales of wint8).

struct Float32 {
  static constexpr int kBytes = kPanel * 4;
  static FD_INLINE void read(const uint8_t* data, int64_t k, V& first, V& second) {
    const float* values = reinterpret_cast<const float*>(data) + k * kPanel;
    first = load(values);
    second = load(values + 16);
  }
};

// Rows of a KV cache in bfloat16: word i holds columns i and 16 + i.
struct CacheBfloat16 {
  static constexpr int kBytes = kPanel * 2;
  static FD_INLINE void read(const uint8_t* data, int64_t k, V& first, V& second) {
    load_bf16(data + k * kPanel * 2, first, second);
  }
};

struct Wint8 {
  static constexpr int kBytes = kPanel;
  static FD_INLINE void read(const uint8_t* data, int64_t k, V& first, V& second) {
    first = load_int8(data + k * kPanel);
    second = load_int8(data + k * kPanel + 16);
  }
};

struct Bfloat16 {};

struct Wint4 {};

template <int R, int P>
FD_INLINE void clear(Sums<R, P>& sums) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sums.first[r][p] = sums.second[r][p] = zero();
  }
}

// R neighbouring rows of activations: `x` is the first piece of the first row, `stride` the distance to its next piece.
struct Rows {
  const float* x;
  int64_t stride;
};

// sums += x * panels over `inputs` columns of R rows. Panel p is at data + p * stride.
template <class F, int R, int P>
FD_INLINE void product(Rows rows, const uint8_t* data, int64_t stride, int inputs, Sums<R, P>& sums) {
  const float* x = rows.x;
  for (int begin = 0; begin < inputs; begin += kPiece, x += rows.stride) {
    const int count = inputs - begin < kPiece ? inputs - begin : kPiece;
    for (int i = 0; i < count; ++i) {
      V first[P], second[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        prefetch(data + p * stride + (begin + i) * F::kBytes);
        if constexpr (F::kBytes > 64) prefetch(data + p * stride + (begin + i) * F::kBytes + 64);
        F::read(data + p * stride, begin + i, first[p], second[p]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V value = broadcast(x[r * kPiece + i]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          sums.first[r][p] = fma(value, first[p], sums.first[r][p]);
          sums.second[r][p] = fma(value, second[p], sums.second[r][p]);
        }
      }
    }
  }
}

// `product` for bfloat16: a word holds the weights of one output for two inputs, the even input in the low half.
template <int R, int P>
FD_INLINE void product_bfloat16(Rows rows, const uint8_t* data, int64_t stride, int inputs, Sums<R, P>& sums) {
  const float* x = rows.x;
  for (int begin = 0; begin < inputs; begin += kPiece, x += rows.stride, data += kPiece * kPanel * 2) {
    const int count = inputs - begin < kPiece ? inputs - begin : kPiece;
    for (int i = 0; i < count; i += 2) {
      V even_first[P], even_second[P], odd_first[P], odd_second[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const uint8_t* place = data + p * stride + i * kPanel * 2;
        prefetch(place);
        prefetch(place + 64);
        load_bf16(place, even_first[p], odd_first[p]);
        load_bf16(place + 64, even_second[p], odd_second[p]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V value = broadcast(x[r * kPiece + i]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          sums.first[r][p] = fma(value, even_first[p], sums.first[r][p]);
          sums.second[r][p] = fma(value, even_second[p], sums.second[r][p]);
        }
      }
      // After an odd last input, x is padding with arbitrary content.
      if (i + 1 == count) break;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V value = broadcast(x[r * kPiece + i + 1]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          sums.first[r][p] = fma(value, odd_first[p], sums.first[r][p]);
          sums.second[r][p] = fma(value, odd_second[p], sums.second[r][p]);
        }
      }
    }
  }
}

// `product` for wint4: each weight is fma(q, scale, minimum).
template <int R, int P>
FD_INLINE void product_wint4(Rows rows, const uint8_t* data, int64_t stride, int inputs, Sums<R, P>& sums) {
  for (int begin = 0; begin < inputs; begin += kWint4Group, data += kWint4GroupBytes) {
    V scale_first[P], scale_second[P], minimum_first[P], minimum_second[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      load_bf16(data + p * stride, scale_first[p], minimum_first[p]);
      load_bf16(data + p * stride + 64, scale_second[p], minimum_second[p]);
    }
    const float* column = rows.x + begin / kPiece * rows.stride + begin % kPiece;
    const int count = inputs - begin < kWint4Group ? inputs - begin : kWint4Group;
    for (int quad = 0; quad < count; quad += 4) {
      Words words[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        prefetch(data + p * stride + kPanel * 4 + quad * 16);
        words[p] = load_words(data + p * stride + kPanel * 4 + quad * 16);
      }
      // After the last input, x is padding with arbitrary content: skip those products.
      const int last = count - quad < 4 ? count - quad : 4;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (i >= last) break;
        V first[P], second[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          first[p] = fma(nibble(words[p], 8 * i), scale_first[p], minimum_first[p]);
          second[p] = fma(nibble(words[p], 8 * i + 4), scale_second[p], minimum_second[p]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const V value = broadcast(column[r * kPiece + quad + i]);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) {
            sums.first[r][p] = fma(value, first[p], sums.first[r][p]);
            sums.second[r][p] = fma(value, second[p], sums.second[r][p]);
          }
        }
      }
    }
  }
}

template <class F, int R, int P>
FD_INLINE void product(F, Rows rows, const uint8_t* data, int64_t stride, int inputs, Sums<R, P>& sums) {
  product<F>(rows, data, stride, inputs, sums);
}
template <int R, int P>
FD_INLINE void product(Bfloat16, Rows rows, const uint8_t* data, int64_t stride, int inputs, Sums<R, P>& sums) {
  product_bfloat16(rows, data, stride, inputs, sums);
}
template <int R, int P>
FD_INLINE void product(Wint4, Rows rows, const uint8_t* data, int64_t stride, int inputs, Sums<R, P>& sums) {
  product_wint4(rows, data, stride, inputs, sums);
}

// Calls f(Height<height>{}), which makes the number of rows a compile-time constant.
template <int R>
struct Height {
  static constexpr int value = R;
};

template <int R = kMaxHeight, class F>
FD_INLINE void with_height(int height, F&& f) {
  if constexpr (R == 1) {
    f(Height<1>{});
  } else if (height == R) {
    f(Height<R>{});
  } else {
    with_height<R - 1>(height, f);
  }
}
