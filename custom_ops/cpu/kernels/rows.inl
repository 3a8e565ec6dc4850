// Operations on single rows.

void rms_norm(const float* x, const float* weight, float epsilon, float* y, int width) {
  V squares = zero();
  int i = 0;
  for (; i + 16 <= width; i += 16) squares = fma(load(x + i), load(x + i), squares);
  if (i < width) {
    const V rest = load_part(x + i, width - i);
    squares = fma(rest, rest, squares);
  }
  const V factor = broadcast(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(width) + epsilon));
  for (i = 0; i + 16 <= width; i += 16) store(y + i, mul(mul(load(x + i), factor), load(weight + i)));
  if (i < width) {
    store_part(y + i, mul(mul(load_part(x + i, width - i), factor), load_part(weight + i, width - i)), width - i);
  }
}

void softmax(float* x, int count) {
  float highest = x[0];
  for (int i = 1; i < count; ++i) highest = x[i] > highest ? x[i] : highest;
  V sum = zero();
  for (int i = 0; i < count; i += 16) {
    const int n = count - i < 16 ? count - i : 16;
    store_part(x + i, exponential(sub(load_part(x + i, n), broadcast(highest))), n);
    sum = add(sum, load_part(x + i, n));
  }
  const V total = broadcast(reduce_add(sum));
  for (int i = 0; i < count; i += 16) {
    const int n = count - i < 16 ? count - i : 16;
    store_part(x + i, div(load_part(x + i, n), total), n);
  }
}

FD_INLINE V load_part(const uint16_t* p, int count) {
  uint32_t words[16] = {};
  if (count == 16) {
    for (int i = 0; i < 16; ++i) words[i] = static_cast<uint32_t>(p[i]) << 16;
  } else {
    for (int i = 0; i < count; ++i) words[i] = static_cast<uint32_t>(p[i]) << 16;
  }
  float values[16];
  std::memcpy(values, words, sizeof values);
  return load(values);
}

template <class Element>
FD_INLINE void combine_rows(float* out, const Element* const* rows, const float* weights, int count, const float* last,
                            int width) {
  for (int i = 0; i < width; i += 16) {
    const int n = width - i < 16 ? width - i : 16;
    V sum = zero();
    for (int j = 0; j < count; ++j) sum = fma(broadcast(weights[j]), load_part(rows[j] + i, n), sum);
    if (last != nullptr) sum = add(sum, load_part(last + i, n));
    store_part(out + i, add(load_part(out + i, n), sum), n);
  }
}

void combine(float* out, const float* const* rows, const float* weights, int count, const float* last, int width) {
  combine_rows(out, rows, weights, count, last, width);
}

void combine_bfloat16(float* out, const uint16_t* const* rows, const float* weights, int count, int width) {
  combine_rows(out, rows, weights, count, nullptr, width);
}
