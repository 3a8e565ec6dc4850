// Packed matrices times rows of activations.

struct Panel {
  const float* bias;
  const float* scales;  // null unless wint8
  const uint8_t* data;
};

FD_INLINE Panel panel_of(const PackedMatrix& matrix, const uint8_t* bytes) {
  const bool scaled = matrix.format == Format::kWint8;
  const float* bias = reinterpret_cast<const float*>(bytes);
  return {bias, scaled ? bias + kPanel : nullptr, bytes + (scaled ? 2 : 1) * kPanel * sizeof(float)};
}

// Applies scale and bias to one row of a panel (two halves of 16 sums) and writes the output.
FD_INLINE void finish(const Gemm& task, int panel, const Panel& parts, int row, V first, V second) {
  const V bias_first = load(parts.bias), bias_second = load(parts.bias + 16);
  if (parts.scales != nullptr) {
    first = fma(first, load(parts.scales), bias_first);
    second = fma(second, load(parts.scales + 16), bias_second);
  } else {
    first = add(first, bias_first);
    second = add(second, bias_second);
  }
  if (task.output == Output::kSwiglu) {
    const int column = panel * (kPanel / 2);
    const int count = task.activated.width - column;
    float* place = task.activated.piece(row, column / kPiece) + column % kPiece;
    const V activated = mul(silu(first), second);
    if (count >= 16) {
      store(place, activated);
    } else if (count > 0) {
      store_part(place, activated, count);
    }
    return;
  }
  float* place = task.out + row * task.out_stride + panel * kPanel;
  const int count = task.weights->outputs - panel * kPanel;
  if (count >= kPanel) {
    if (task.output == Output::kAdd) {
      first = add(load(place), first);
      second = add(load(place + 16), second);
    }
    store(place, first);
    store(place + 16, second);
    return;
  }
  const int count_first = count < 16 ? count : 16, count_second = count - count_first;
  if (task.output == Output::kAdd) {
    first = add(load_part(place, count_first), first);
    second = add(load_part(place + count_first, count_second), second);
  }
  store_part(place, first, count_first);
  store_part(place + count_first, second, count_second);
}

// P neighbouring panels times R rows. `data` of panel p is at data + p * stride.
template <class F, int R, int P>
void compute(const Gemm& task, int panel, const uint8_t* data, int64_t stride, int row) {
  Sums<R, P> sums;
  clear(sums);
  product(F{}, Rows{task.x.piece(row, 0), task.x.stride()}, data, stride, task.weights->inputs, sums);
  for (int p = 0; p < P; ++p) {
    const Panel parts = panel_of(*task.weights, task.weights->panel(task.matrix, panel + p));
    for (int r = 0; r < R; ++r) finish(task, panel + p, parts, row + r, sums.first[r][p], sums.second[r][p]);
  }
}

template <class F, int R>
void compute_panels(const Gemm& task, const uint8_t* data, int64_t stride, int row) {
  constexpr int P = panels_at_once(R);
  int i = 0;
  for (; i + P <= task.num_panels; i += P) {
    compute<F, R, P>(task, task.first_panel + i, data + i * stride, stride, row);
  }
  for (; i < task.num_panels; ++i) {
    compute<F, R, 1>(task, task.first_panel + i, data + i * stride, stride, row);
  }
}

// Splits the rows into parts of nearly equal height: 7 + 6 keeps the kernel busier than 12 + 1.
template <class F>
void compute_rows(const Gemm& task, const uint8_t* data, int64_t stride) {
  const int rows = task.last_row - task.first_row;
  const int parts = (rows + kMaxHeight - 1) / kMaxHeight;
  for (int part = 0; part < parts; ++part) {
    const int begin = rows * part / parts, end = rows * (part + 1) / parts;
    with_height(end - begin, [&](auto height) {
      compute_panels<F, height.value>(task, data, stride, task.first_row + begin);
    });
  }
}

// Converts the panels to float, to exactly the values that `product` computes with.
template <class F>
void expand(const Gemm& task, const uint8_t* data, int64_t stride) {
  const int inputs = task.weights->inputs;
  for (int p = 0; p < task.num_panels; ++p) {
    float* out = task.scratch + static_cast<int64_t>(p) * inputs * kPanel;
    for (int k = 0; k < inputs; ++k, out += kPanel) {
      V first, second;
      F::read(data + p * stride, k, first, second);
      store(out, first);
      store(out + 16, second);
    }
  }
}

void expand_bfloat16(const Gemm& task, const uint8_t* data, int64_t stride) {
  const int inputs = task.weights->inputs;
  for (int p = 0; p < task.num_panels; ++p) {
    float* out = task.scratch + static_cast<int64_t>(p) * inputs * kPanel;
    const uint8_t* place = data + p * stride;
    for (int k = 0; k < inputs; k += 2, place += kPanel * 4, out += 2 * kPanel) {
      V even_first, even_second, odd_first, odd_second;
      load_bf16(place, even_first, odd_first);
      load_bf16(place + 64, even_second, odd_second);
      store(out, even_first);
      store(out + 16, even_second);
      if (k + 1 == inputs) break;
      store(out + kPanel, odd_first);
      store(out + kPanel + 16, odd_second);
    }
  }
}

void expand_wint4(const Gemm& task, const uint8_t* data, int64_t stride) {
  const int inputs = task.weights->inputs;
  for (int p = 0; p < task.num_panels; ++p) {
    float* out = task.scratch + static_cast<int64_t>(p) * inputs * kPanel;
    for (int k = 0; k < inputs; ++k, out += kPanel) {
      const uint8_t* group = data + p * stride + k / kWint4Group * kWint4GroupBytes;
      const int i = k % kWint4Group;
      V scale_first, minimum_first, scale_second, minimum_second;
      load_bf16(group, scale_first, minimum_first);
      load_bf16(group + 64, scale_second, minimum_second);
      const Words words = load_words(group + kPanel * 4 + i / 4 * 64);
      store(out, fma(nibble(words, 8 * (i % 4)), scale_first, minimum_first));
      store(out + 16, fma(nibble(words, 8 * (i % 4) + 4), scale_second, minimum_second));
    }
  }
}

// Minimum rows for which converting a panel once is faster.
constexpr int kRowsToExpand = 2 * kMaxHeight + 1;
constexpr int kGemmRows = 128;

int64_t gemm_scratch(int, int inputs, int panels) { return static_cast<int64_t>(panels) * inputs * kPanel; }

void gemm(const Gemm& task) {
  const PackedMatrix& weights = *task.weights;
  const uint8_t* data = panel_of(weights, weights.panel(task.matrix, task.first_panel)).data;
  const int64_t stride = weights.panel_bytes;
  if (weights.format != Format::kFloat32 && task.last_row - task.first_row >= kRowsToExpand) {
    switch (weights.format) {
      case Format::kBfloat16: expand_bfloat16(task, data, stride); break;
      case Format::kWint8: expand<Wint8>(task, data, stride); break;
      default: expand_wint4(task, data, stride);
    }
    compute_rows<Float32>(task, reinterpret_cast<const uint8_t*>(task.scratch),
                          static_cast<int64_t>(weights.inputs) * kPanel * sizeof(float));
    return;
  }
  switch (weights.format) {
    case Format::kFloat32: return compute_rows<Float32>(task, data, stride);
    case Format::kBfloat16: return compute_rows<Bfloat16>(task, data, stride);
    case Format::kWint8: return compute_rows<Wint8>(task, data, stride);
    case Format::kWint4: return compute_rows<Wint4>(task, data, stride);
  }
}
