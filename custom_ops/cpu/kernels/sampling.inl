// Passes over the scores or weights of one row in blocks of 64, for sample.cc.
//
// All instruction sets give the same bits: weights are doubles, products and sums are rounded separately, and every sum
// has eight partial sums regardless of the register width.

#if defined(FD_AVX512)
#define FD_VECTOR_BYTES 64
#elif defined(FD_AVX2)
#define FD_VECTOR_BYTES 32
#else
#define FD_VECTOR_BYTES 16
#endif

typedef double Doubles __attribute__((vector_size(FD_VECTOR_BYTES)));
typedef int64_t Longs __attribute__((vector_size(FD_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(FD_VECTOR_BYTES / 2)));

constexpr int kLanes = FD_VECTOR_BYTES / sizeof(double);
constexpr int kSums = 8 / kLanes;

FD_INLINE Doubles load_doubles(const double* p) {
  Doubles a;
  std::memcpy(&a, p, sizeof a);
  return a;
}

FD_INLINE Doubles widen(const float* p) {
  Floats a;
  std::memcpy(&a, p, sizeof a);
  return __builtin_convertvector(a, Doubles);
}

FD_INLINE double total(const Doubles* sums) {
  double s[8];
  std::memcpy(s, sums, sizeof s);
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// 2^x for x <= 0, with an error below 1e-15; exactly 1 at 0, at most 1, and exactly 0 below -1000.
FD_INLINE Doubles exp2_of(Doubles x) {
  const Doubles lowest = Doubles{} - 1000.0;
  const Doubles clamped = x > lowest ? x : lowest;
  // Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits.
  constexpr double kShift = 6755399441055744.0;
  const Doubles magic = clamped + kShift;
  const Doubles r = clamped - (magic - kShift);
  // Minimax polynomial of degree 10 with the constant term fixed at 1.
  Doubles p = r * 7.070977866508138e-09 + 1.0205905413765595e-07;
  p = p * r + 1.3215451633221434e-06;
  p = p * r + 1.5252672924850737e-05;
  p = p * r + 0.00015403530424776529;
  p = p * r + 0.0013333558200794592;
  p = p * r + 0.009618129107618665;
  p = p * r + 0.05550410866465167;
  p = p * r + 0.24022650695910075;
  p = p * r + 0.6931471805599462;
  p = p * r + 1.0;
  const Longs bits = reinterpret_cast<Longs>(p) + (reinterpret_cast<Longs>(magic) << 52);
  return reinterpret_cast<Doubles>(bits & (x >= lowest));
}

// The 64 scores of block b; a partial block is copied to `buffer` and padded with -infinity.
FD_INLINE const float* block_of(const float* scores, int64_t count, int64_t b, float* buffer) {
  const int64_t rest = count - b * kTokenBlock;
  if (rest >= kTokenBlock) return scores + b * kTokenBlock;
  for (int64_t i = 0; i < kTokenBlock; ++i) buffer[i] = i < rest ? scores[b * kTokenBlock + i] : -INFINITY;
  return buffer;
}

float block_maxima(const float* scores, int64_t count, float* maxima) {
  const V lowest = broadcast(-INFINITY), one = broadcast(1.0f);
  float buffer[kTokenBlock];
  float highest = -INFINITY;
  V sound = one;
  for (int64_t b = 0; b < token_blocks(count); ++b) {
    const float* x = block_of(scores, count, b, buffer);
    V a[4];
    for (int i = 0; i < 4; ++i) a[i] = load(x + 16 * i);
    // `max` ignores NaN, but NaN >= -infinity is false.
    for (int i = 0; i < 4; ++i) sound = min(sound, where_ge(a[i], lowest, one));
    maxima[b] = reduce_max(max(max(a[0], a[1]), max(a[2], a[3])));
    highest = maxima[b] > highest ? maxima[b] : highest;
  }
  float ones[16];
  store(ones, sound);
  for (int i = 0; i < 16; ++i) {
    if (ones[i] != 1.0f) return NAN;
  }
  return highest;
}

void weigh(const float* scores, int64_t count, double best, double factor, double* weights, double* sums) {
  float buffer[kTokenBlock];
  for (int64_t b = 0; b < token_blocks(count); ++b) {
    const float* x = block_of(scores, count, b, buffer);
    Doubles parts[kSums] = {};
    for (int i = 0; i < kTokenBlock; i += kLanes) {
      const Doubles w = exp2_of((widen(x + i) - best) * factor);
      std::memcpy(weights + b * kTokenBlock + i, &w, sizeof w);
      parts[i / kLanes % kSums] += w;
    }
    sums[b] = total(parts);
  }
}

double mass_from(const double* weights, int64_t count, double cut) {
  Doubles parts[kSums] = {};
  const Doubles low = Doubles{} + cut;
  for (int64_t i = 0; i < token_blocks(count) * kTokenBlock; i += 8) {
    for (int j = 0; j < kSums; ++j) {
      const Doubles w = load_doubles(weights + i + j * kLanes);
      parts[j] += reinterpret_cast<Doubles>((w >= low) & reinterpret_cast<Longs>(w));
    }
  }
  return total(parts);
}

void retain(double* weights, int64_t count, double cut, double* sums) {
  const Doubles low = Doubles{} + cut;
  for (int64_t b = 0; b < token_blocks(count); ++b) {
    Doubles parts[kSums] = {};
    for (int i = 0; i < kTokenBlock; i += kLanes) {
      double* place = weights + b * kTokenBlock + i;
      Doubles w = load_doubles(place);
      w = reinterpret_cast<Doubles>((w >= low) & reinterpret_cast<Longs>(w));
      std::memcpy(place, &w, sizeof w);
      parts[i / kLanes % kSums] += w;
    }
    sums[b] = total(parts);
  }
}
