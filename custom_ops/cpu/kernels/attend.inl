// Attention of a few queries over part of one sequence's context, block by block with a running maximum (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018).
//
// The result of a row depends only on its own keys, in order of position. Keys visible only to other rows of the tile
// have weight zero, and adding zeros changes no bit as long as the values are finite.

template <int R>
FD_INLINE void scale_rows(float* out, int width, const float* factors) {
  for (int r = 0; r < R; ++r) {
    const V factor = broadcast(factors[r]);
    for (int i = 0; i < width; i += 16) store(out + r * width + i, mul(load(out + r * width + i), factor));
  }
}

// Scores of one block: [pieces of the block][R][64].
template <class F, int R>
FD_INLINE void scores_of(const Attend& task, int64_t block, float* scores) {
  const Cache& cache = task.cache;
  for (int panel = 0; panel < cache.key_panels(); ++panel) {
    Sums<R, 1> sums;
    clear(sums);
    product<F>(Rows{task.query, R * kPiece}, cache.key_panel(block, task.head, panel), 0, cache.head_dim, sums);
    const int column = panel * kPanel;
    float* place = scores + column / kPiece * R * kPiece + column % kPiece;
    for (int r = 0; r < R; ++r) {
      store(place + r * kPiece, sums.first[r][0]);
      store(place + r * kPiece + 16, sums.second[r][0]);
    }
  }
}

// Turns the first `visible` scores of a row into weights e^(s - maximum), and the rest into zeros.
template <int R>
FD_INLINE float weights_of(float* row, int visible, int padded, PartialSoftmax& state) {
  float lanes[16];
  V highest = broadcast(-INFINITY);
  for (int i = 0; i < padded; i += 16) {
    float* place = row + i / kPiece * R * kPiece + i % kPiece;
    if (i + 16 > visible) {
      store(lanes, load(place));
      for (int lane = visible > i ? visible - i : 0; lane < 16; ++lane) lanes[lane] = -INFINITY;
      store(place, load(lanes));
    }
    highest = max(load(place), highest);
  }
  const float former = state.maximum;
  const float block_maximum = reduce_max(highest);
  state.maximum = former > block_maximum ? former : block_maximum;
  const V maximum = broadcast(state.maximum);
  V sum = zero();
  for (int i = 0; i < padded; i += 16) {
    float* place = row + i / kPiece * R * kPiece + i % kPiece;
    const V weight = exponential(sub(load(place), maximum));
    store(place, weight);
    sum = add(sum, weight);
  }
  float factor[16];
  store(factor, exponential(broadcast(former - state.maximum)));
  state.sum = state.sum * factor[0] + reduce_add(sum);
  return factor[0];
}

template <class F, int R>
void attend_rows(const Attend& task) {
  const Cache& cache = task.cache;
  const int width = cache.value_panels() * kPanel;
  const int padded = static_cast<int>(Activations::padded(cache.block_size));
  float* scores = task.scratch;
  // The padding of the last piece is not scored; the mask hides it like all invisible keys.
  for (int i = 0; i < padded * R; ++i) scores[i] = 0.0f;
  for (int r = 0; r < R; ++r) task.state[r] = {-INFINITY, 0.0f};
  for (int i = 0; i < R * width; ++i) task.out[i] = 0.0f;

  for (int index = task.first_block; index < task.last_block; ++index) {
    const int64_t block = task.block_table[index];
    const int first_key = index * cache.block_size;
    int visible[R], most = 0;
    for (int r = 0; r < R; ++r) {
      const int count = task.positions[r] + 1 - first_key;
      visible[r] = count < 0 ? 0 : count > cache.block_size ? cache.block_size : count;
      most = visible[r] > most ? visible[r] : most;
    }
    if (most == 0) break;
    scores_of<F, R>(task, block, scores);
    float factors[R];
    for (int r = 0; r < R; ++r) {
      // The row sees no key of this block: keep its maximum, which must not become NaN.
      if (visible[r] == 0) {
        factors[r] = 1.0f;
        for (int i = 0; i < padded; i += 16) {
          store(scores + i / kPiece * R * kPiece + r * kPiece + i % kPiece, zero());
        }
      } else {
        factors[r] = weights_of<R>(scores + r * kPiece, visible[r], padded, task.state[r]);
      }
    }
    scale_rows<R>(task.out, width, factors);
    // Skip keys beyond the last visible one: they may belong to another sequence.
    for (int panel = 0; panel < cache.value_panels(); ++panel) {
      float* out = task.out + panel * kPanel;
      Sums<R, 1> sums;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        sums.first[r][0] = load(out + r * width);
        sums.second[r][0] = load(out + r * width + 16);
      }
      product<F>(Rows{scores, R * kPiece}, cache.value_panel(block, task.head, panel), 0, most, sums);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        store(out + r * width, sums.first[r][0]);
        store(out + r * width + 16, sums.second[r][0]);
      }
    }
  }
}

void attend(const Attend& task) {
  with_height(task.num_rows, [&](auto height) {
    if (task.cache.type == CacheType::kFloat32) {
      attend_rows<Float32, height.value>(task);
    } else {
      attend_rows<CacheBfloat16, height.value>(task);
    }
  });
}

void merge(PartialSoftmax& state, float* out, const PartialSoftmax& later, const float* later_out, int width) {
  const float maximum = state.maximum > later.maximum ? state.maximum : later.maximum;
  float factors[16] = {state.maximum - maximum, later.maximum - maximum};
  store(factors, exponential(load(factors)));
  state = {maximum, state.sum * factors[0] + later.sum * factors[1]};
  const V former_factor = broadcast(factors[0]), later_factor = broadcast(factors[1]);
  for (int i = 0; i < width; i += 16) {
    store(out + i, fma(load(later_out + i), later_factor, mul(load(out + i), former_factor)));
  }
}
