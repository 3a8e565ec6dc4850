// Vectors of sixteen floats. Included once per instruction set, inside its namespace (see kernels.inl). All functions
// compute the same bits on AVX2 and AVX-512; plain C++ rounds between product and sum, so its last bits differ.

struct V {
#if defined(FD_AVX512)
  __m512 v;
#elif defined(FD_AVX2)
  __m256 lo, hi;
#else
  float v[16];
#endif
};

#define FD_INLINE inline __attribute__((always_inline))

#if defined(FD_AVX512)

FD_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
FD_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
FD_INLINE V broadcast(float a) { return {_mm512_set1_ps(a)}; }
FD_INLINE V zero() { return {_mm512_setzero_ps()}; }
FD_INLINE V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
FD_INLINE V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
FD_INLINE V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
FD_INLINE V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
FD_INLINE V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
FD_INLINE V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
// a * b + c
FD_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// value where a >= b, else 0
FD_INLINE V where_ge(V a, V b, V value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ), value.v)};
}
// The float whose bits are those of `a` plus (the integer in the low bits of `magic`) << 23.
FD_INLINE V scale_exponent(V a, V magic) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(magic.v), 23)))};
}
// 32 bfloat16: lane i of `first` is the low half of word i, of `second` its high half.
FD_INLINE void load_bf16(const uint8_t* p, V& first, V& second) {
  const __m512i words = _mm512_loadu_si512(p);
  first.v = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  second.v = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
FD_INLINE V load_int8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
using Words = __m512i;
FD_INLINE Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
// The four bits of each word starting at bit `shift`, as floats.
FD_INLINE V nibble(Words words, int shift) {
  // The table lookup ignores the other bits, so one instruction masks and converts.
  const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(words, shift), numbers)};
}

#elif defined(FD_AVX2)

FD_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FD_INLINE void store(float* p, V a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
FD_INLINE V broadcast(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
FD_INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FD_INLINE V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
FD_INLINE V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
FD_INLINE V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
FD_INLINE V div(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
FD_INLINE V max(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
FD_INLINE V min(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
FD_INLINE V fma(V a, V b, V c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
FD_INLINE V where_ge(V a, V b, V value) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), value.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ), value.hi)};
}
FD_INLINE __m256 scale_exponent(__m256 a, __m256 magic) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(magic), 23)));
}
FD_INLINE V scale_exponent(V a, V magic) {
  return {scale_exponent(a.lo, magic.lo), scale_exponent(a.hi, magic.hi)};
}
struct Words {
  __m256i lo, hi;
};
FD_INLINE Words load_words(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
FD_INLINE void load_bf16(const uint8_t* p, V& first, V& second) {
  const Words words = load_words(p);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(words.lo, 16)),
           _mm256_castsi256_ps(_mm256_slli_epi32(words.hi, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(words.lo, high)),
            _mm256_castsi256_ps(_mm256_and_si256(words.hi, high))};
}
FD_INLINE V load_int8(const uint8_t* p) {
  const __m128i lo = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i hi = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(lo)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(hi))};
}
FD_INLINE V nibble(Words words, int shift) {
  const __m256i mask = _mm256_set1_epi32(15);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words.lo, shift), mask)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(words.hi, shift), mask))};
}

#else

#define FD_LANES for (int i = 0; i < 16; ++i)

FD_INLINE V load(const float* p) {
  V a;
  FD_LANES a.v[i] = p[i];
  return a;
}
FD_INLINE void store(float* p, V a) { FD_LANES p[i] = a.v[i]; }
FD_INLINE V broadcast(float value) {
  V a;
  FD_LANES a.v[i] = value;
  return a;
}
FD_INLINE V zero() { return broadcast(0.0f); }
FD_INLINE V add(V a, V b) {
  FD_LANES a.v[i] += b.v[i];
  return a;
}
FD_INLINE V sub(V a, V b) {
  FD_LANES a.v[i] -= b.v[i];
  return a;
}
FD_INLINE V mul(V a, V b) {
  FD_LANES a.v[i] *= b.v[i];
  return a;
}
FD_INLINE V div(V a, V b) {
  FD_LANES a.v[i] /= b.v[i];
  return a;
}
FD_INLINE V max(V a, V b) {
  FD_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
FD_INLINE V min(V a, V b) {
  FD_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
FD_INLINE V fma(V a, V b, V c) {
  FD_LANES c.v[i] = a.v[i] * b.v[i] + c.v[i];
  return c;
}
FD_INLINE V where_ge(V a, V b, V value) {
  FD_LANES value.v[i] = a.v[i] >= b.v[i] ? value.v[i] : 0.0f;
  return value;
}
FD_INLINE uint32_t bits(float a) {
  uint32_t word;
  std::memcpy(&word, &a, 4);
  return word;
}
FD_INLINE float from_bits(uint32_t word) {
  float a;
  std::memcpy(&a, &word, 4);
  return a;
}
FD_INLINE V scale_exponent(V a, V magic) {
  FD_LANES a.v[i] = from_bits(bits(a.v[i]) + (bits(magic.v[i]) << 23));
  return a;
}
struct Words {
  uint32_t v[16];
};
FD_INLINE Words load_words(const uint8_t* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}
FD_INLINE void load_bf16(const uint8_t* p, V& first, V& second) {
  const Words words = load_words(p);
  FD_LANES first.v[i] = from_bits(words.v[i] << 16);
  FD_LANES second.v[i] = from_bits(words.v[i] & 0xffff0000u);
}
FD_INLINE V load_int8(const uint8_t* p) {
  V a;
  FD_LANES a.v[i] = static_cast<float>(static_cast<int8_t>(p[i]));
  return a;
}
FD_INLINE V nibble(Words words, int shift) {
  V a;
  FD_LANES a.v[i] = static_cast<float>((words.v[i] >> shift) & 15u);
  return a;
}

#endif

// Loads n of sixteen floats; the rest are zeros.
FD_INLINE V load_part(const float* p, int n) {
  float buffer[16] = {};
  std::memcpy(buffer, p, n * sizeof(float));
  return load(buffer);
}

FD_INLINE void store_part(float* p, V a, int n) {
  float buffer[16];
  store(buffer, a);
  std::memcpy(p, buffer, n * sizeof(float));
}

// Both reduce in a fixed tree, so that all instruction sets sum in the same order.
FD_INLINE float reduce_add(V a) {
  float b[16];
  store(b, a);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) b[i] += b[i + half];
  }
  return b[0];
}

FD_INLINE float reduce_max(V a) {
  float b[16];
  store(b, a);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) b[i] = b[i] > b[i + half] ? b[i] : b[i + half];
  }
  return b[0];
}

// e^x with an error below 2 ulp, exactly 1 at 0 and exactly 0 below -87; x must not exceed 88. The algorithm is Cephes'
// expf: x = n ln 2 + r, a polynomial in r, and n added to the exponent.
FD_INLINE V exponential(V x) {
  const V lowest = broadcast(-87.0f);
  const V clamped = max(x, lowest);
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const V shift = broadcast(12582912.0f);
  const V magic = add(mul(clamped, broadcast(1.44269504088896341f)), shift);
  const V n = sub(magic, shift);
  V r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  V p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, broadcast(1.0f)));
  return where_ge(x, lowest, scale_exponent(p, magic));
}

// x / (1 + e^-x)
FD_INLINE V silu(V x) {
  const V e = exponential(min(sub(zero(), x), broadcast(88.0f)));
  return div(x, add(broadcast(1.0f), e));
}
