// Attention of sequences with one token in the step. A block of four warps processes the segments of its share one tile
// after the other: each warp computes the scores of 16 keys, then the values of a quarter of the columns.
#include "attention.cuh"
#include "launch.h"

namespace fd::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kConsumers = kWarps * 32;
constexpr int kThreads = kConsumers + 32;
constexpr int kRows = kMaxGroupHeads;
// Weights of a tile: rows of 64, padded so that eight rows begin in different banks.
constexpr int kWeightStride = kCacheBlock + 8;

template <int kHeadDim_, int kBlocksPerSm_>
struct Shape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;  // that fit
  static constexpr int kSlots = 12 / kBlocksPerSm * 128 / kHeadDim;  // slots of the ring: tiles of keys or values
  static constexpr int kTileBytes = kHeadDim / kBlockK * kBlockBytes;
  static constexpr int kColumns = kHeadDim / kWarps;  // of a warp
  static constexpr int kQueryBytes = kHeadDim / kBlockK * kRows * 128;
};

template <class Shape>
struct Memory {
  alignas(1024) uint8_t slots[Shape::kSlots][Shape::kTileBytes];
  alignas(1024) uint8_t queries[Shape::kQueryBytes];
  // Of the tiles in turns, so that one barrier a tile is enough.
  alignas(16) __nv_bfloat16 weights[2][kRows][kWeightStride];
  float4 sums[2][kRows][4];  // of a row, by lane: shares of the four warps
  float maxima[2][kRows][kWarps];
  uint64_t full[Shape::kSlots];
  uint64_t empty[Shape::kSlots];
  uint64_t gathered;
  int first_item[kMaxSequences + 1];
  int merged[2];
};

// The share of a block: segments [first, last) of all sequences and kv heads.
struct Share {
  int segments;
  int each;

  // Whole numbers of segments, so that few sequences are cut.
  __device__ Share(int segments, int blocks) : segments(segments), each(max(1, ceil_div(segments, blocks))) {}
  __device__ int first(int block) const { return min(segments, block * each); }
  __device__ int block_of(int segment) const { return segment / each; }
};

// Segments of one sequence and kv head that a block processes.
struct Part {
  int sequence;
  int head;
  int tiles;     // of the whole sequence
  int segments;  // of the whole sequence
  int first;     // first segment, counted from the begin of the sequence
  int last;      // exclusive
  int begin;     // index of segment 0 among all

  __device__ Part(const StepView& step, const Attention& args, const int* first_item, int index, int until)
      : sequence(sequence_of_item(first_item, step.num_sequences, index)) {
    tiles = step.start[sequence] / kCacheBlock + 1;
    segments = ceil_div(tiles, kSegmentTiles);
    head = (index - first_item[sequence]) / segments;
    begin = first_item[sequence] + head * segments;
    first = index - begin;
    last = min(segments, until - begin);
  }
  __device__ int first_tile() const { return first * kSegmentTiles; }
  __device__ int last_tile() const { return min(tiles, last * kSegmentTiles); }
};

// One side's view of the ring of tiles. Keys are one tile ahead of values: k0 k1 v0 k2 v1 ...
template <class Shape>
struct TileRing {
  Memory<Shape>& memory;
  int slot = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++slot == Shape::kSlots) slot = 0, phase ^= 1;
  }
  __device__ uint8_t* take() { return barrier_wait(memory.full + slot, phase), memory.slots[slot]; }
  // Every warp releases, after its last read.
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(memory.empty + slot);
    advance();
  }
};

// Run by one warp: streams the tiles of segments [first, last).
template <class Shape>
__device__ __forceinline__ void produce_tiles(const StepView& step, const Attention& args, Memory<Shape>& memory,
                                              int first, int last) {
  TileRing<Shape> ring{memory};
  const int lane = threadIdx.x % 32;
  while (first < last) {
    const Part part(step, args, memory.first_item, first, last);
    const int32_t* const table = step.block_tables + int64_t{part.sequence} * step.table_width;
    const int tiles = part.last_tile() - part.first_tile();
    const auto fetch = [&](const uint8_t* cache, int block) {
      if (lane == 0) {
        barrier_wait(memory.empty + ring.slot, ring.phase ^ 1);
        barrier_arrive_expect(memory.full + ring.slot, Shape::kTileBytes);
        bulk_copy(memory.slots[ring.slot], cache + in_cache(block, args.kv_heads, part.head, Shape::kHeadDim, 0, 0),
                  Shape::kTileBytes, memory.full + ring.slot);
      }
      ring.advance();
    };
    int blocks = 0, before = 0;
    for (int i = 0; i < tiles; ++i) {
      if (i % 32 == 0) blocks = i + lane < tiles ? table[part.first_tile() + i + lane] : 0;
      const int block = __shfl_sync(~0u, blocks, i % 32);
      fetch(args.keys, block);
      if (i > 0) fetch(args.values, before);
      before = block;
    }
    fetch(args.values, before);
    first += part.last - part.first;
  }
}

__device__ __forceinline__ uint32_t rotate(uint32_t pair, float2 cos_sin) {
  const float2 x = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  return pack_bfloat16(__fmaf_rn(x.x, cos_sin.x, -__fmul_rn(x.y, cos_sin.y)),
                       __fmaf_rn(x.y, cos_sin.x, __fmul_rn(x.x, cos_sin.y)));
}

// The newest key and value, which are not in the cache yet. The warp of a key of the tile holds the key, each warp its
// columns of the value.
template <class Shape>
struct Newest {
  static constexpr int kPairs = Shape::kHeadDim / 64;
  uint32_t key[kPairs];
  uint32_t value;

  __device__ __forceinline__ static int column_of_key(int i) { return (i * 32 + threadIdx.x % 32) * 2; }
  __device__ __forceinline__ static int column_of_value() {
    return threadIdx.x / 32 * Shape::kColumns + threadIdx.x % (Shape::kColumns / 2) * 2;
  }
  __device__ __forceinline__ void load(const Attention& args, int token, int head) {
    const __nv_bfloat16* const row =
        static_cast<const __nv_bfloat16*>(args.qkv) +
        (int64_t{token} * (args.heads + 2 * args.kv_heads) + args.heads + head) * Shape::kHeadDim;
    value = *reinterpret_cast<const uint32_t*>(row + args.kv_heads * Shape::kHeadDim + column_of_value());
    const float* const cos_sin = args.rotary_cos_sin + int64_t{token} * Shape::kHeadDim;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      key[i] = rotate(*reinterpret_cast<const uint32_t*>(row + column_of_key(i)),
                      *reinterpret_cast<const float2*>(cos_sin + column_of_key(i)));
    }
  }
  // Both write to the tile, for this warp's products, and to the cache.
  __device__ __forceinline__ void store_key(int place, uint8_t* tile, uint8_t* cache_tile) const {
    if (threadIdx.x / 32 != place / 16) return;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) store(key[i], column_of_key(i), place, tile, cache_tile);
    __syncwarp();
  }
  __device__ __forceinline__ void store_value(int place, uint8_t* tile, uint8_t* cache_tile) const {
    if (threadIdx.x % 32 < Shape::kColumns / 2) store(value, column_of_value(), place, tile, cache_tile);
    __syncwarp();
  }
  __device__ __forceinline__ static void store(uint32_t pair, int column, int place, uint8_t* tile,
                                               uint8_t* cache_tile) {
    const int at = column / kBlockK * kBlockBytes + in_block(place, column % kBlockK);
    *reinterpret_cast<uint32_t*>(tile + at) = pair;
    *reinterpret_cast<uint32_t*>(cache_tile + at) = pair;
    // Before the copy engine overwrites the slot.
    shared_proxy_fence();
  }
};

// Rotates the queries into shared memory; missing rows become zeros.
template <class Shape>
__device__ __forceinline__ void fetch_queries(const Attention& args, int token, int head, uint8_t* queries) {
  const int group = args.heads / args.kv_heads;
  const __nv_bfloat16* const from =
      static_cast<const __nv_bfloat16*>(args.qkv) +
      (int64_t{token} * (args.heads + 2 * args.kv_heads) + head * group) * Shape::kHeadDim;
  const float* const turns = args.rotary_cos_sin + int64_t{token} * Shape::kHeadDim;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * Shape::kHeadDim / 8; i += kConsumers) {
    const int row = i / (Shape::kHeadDim / 8), k = i % (Shape::kHeadDim / 8) * 8;
    uint4 piece{};
    if (row < group) {
      piece = *reinterpret_cast<const uint4*>(from + row * Shape::kHeadDim + k);
      const float4 low = *reinterpret_cast<const float4*>(turns + k);
      const float4 high = *reinterpret_cast<const float4*>(turns + k + 4);
      piece = {rotate(piece.x, {low.x, low.y}), rotate(piece.y, {low.z, low.w}), rotate(piece.z, {high.x, high.y}),
               rotate(piece.w, {high.z, high.w})};
    }
    *reinterpret_cast<uint4*>(queries + k / kBlockK * kRows * 128 + in_block(row, k % kBlockK)) = piece;
  }
}

// Floats of a partial result: [group][head_dim] values, then maximum and sum of each row.
template <class Shape>
__device__ __forceinline__ int partial_floats(const Attention& args) {
  return round_up(args.heads / args.kv_heads * (Shape::kHeadDim + 2), 4);
}

template <class Shape>
__device__ __forceinline__ float* partial_at(const Attention& args, int segment) {
  return args.partial + int64_t{segment} * partial_floats<Shape>(args);
}

// Result for rows lane / 4 and + 8: columns 8 e + lane % 4 * 2 and the next one of this warp's.
template <class Shape>
struct Result {
  float out[Shape::kColumns / 2];
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; ++i) out[i] = 0.0f;
    for (int half = 0; half < 2; ++half) maximum[half] = -INFINITY, sum[half] = 0.0f;
  }

  __device__ __forceinline__ void merge(const float (&later)[Shape::kColumns / 2], const RowSoftmax (&rows)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Merger merger(maximum[half], rows[half].maximum);
      maximum[half] = merger.maximum;
      sum[half] = merger(sum[half], row_sum(rows[half].sum));
#pragma unroll
      for (int i = 0; i < Shape::kColumns / 4; ++i) {
        const int at = i / 2 * 4 + half * 2 + i % 2;
        out[at] = merger(out[at], later[at]);
      }
    }
  }

  // Calls place(row, column, low, high) for two columns at a time of rows below `group`.
  template <class Place>
  __device__ __forceinline__ void each(int group, Place place) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8;
      if (row >= group) continue;
#pragma unroll
      for (int eight = 0; eight < Shape::kColumns / 8; ++eight) {
        place(row, threadIdx.x / 32 * Shape::kColumns + eight * 8 + lane % 4 * 2, out[eight * 4 + half * 2],
              out[eight * 4 + half * 2 + 1], half);
      }
    }
  }

  __device__ __forceinline__ void write(const Attention& args, int token, int head) const {
    const int group = args.heads / args.kv_heads;
    each(group, [&](int row, int column, float low, float high, int half) {
      *reinterpret_cast<uint32_t*>(out_place(args, Shape::kHeadDim, token, head * group + row, column)) =
          pack_bfloat16(__fdiv_rn(low, sum[half]), __fdiv_rn(high, sum[half]));
    });
  }

  __device__ __forceinline__ void save(const Attention& args, int segment) const {
    const int group = args.heads / args.kv_heads;
    float* const place = partial_at<Shape>(args, segment);
    each(group, [&](int row, int column, float low, float high, int half) {
      *reinterpret_cast<float2*>(place + row * Shape::kHeadDim + column) = make_float2(low, high);
      if (column == 0) {
        *reinterpret_cast<float2*>(place + group * Shape::kHeadDim + row * 2) = make_float2(maximum[half], sum[half]);
      }
    });
  }
};

// Merges the parts of a sequence and head in order: the first part's result, which is at its last segment, and the
// segments after it. The copy engine gathers them in the memory of the ring, which is unused by now.
template <class Shape>
__device__ __forceinline__ void merge_parts(const Attention& args, Memory<Shape>& memory, const Part& part, int token,
                                            int merged, uint32_t& phase) {
  constexpr int kRowsOfWarp = 2, kEach = Shape::kHeadDim / 32;
  struct alignas(kEach * 4) Columns {
    float x[kEach];
  };
  const int warp = threadIdx.x / 32, group = args.heads / args.kv_heads, column = threadIdx.x % 32 * kEach;
  const int size = partial_floats<Shape>(args), most = sizeof(memory.slots) / 4 / size;
  const float* const gathered = reinterpret_cast<const float*>(memory.slots);
  for (int first_row = warp; first_row - warp < group; first_row += kRowsOfWarp * kWarps) {
    float out[kRowsOfWarp][kEach] = {}, maximum[kRowsOfWarp], sum[kRowsOfWarp] = {};
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) maximum[i] = -INFINITY;
    for (int first = merged - 1; first < part.segments; first += most, phase ^= 1) {
      const int count = min(most, part.segments - first);
      named_barrier(1, kConsumers);
      if (threadIdx.x == 0) {
        proxy_fence();
        barrier_arrive_expect(&memory.gathered, count * size * 4);
        bulk_copy(memory.slots, partial_at<Shape>(args, part.begin + first), count * size * 4, &memory.gathered);
      }
      barrier_wait(&memory.gathered, phase);
#pragma unroll 1
      for (int segment = 0; segment < count; ++segment) {
        const float* const from = gathered + segment * size;
#pragma unroll
        for (int i = 0; i < kRowsOfWarp; ++i) {
          const int row = min(first_row + i * kWarps, group - 1);
          const float2 softmax = *reinterpret_cast<const float2*>(from + group * Shape::kHeadDim + row * 2);
          const Columns later = *reinterpret_cast<const Columns*>(from + row * Shape::kHeadDim + column);
          const Merger merge(maximum[i], softmax.x);
#pragma unroll
          for (int j = 0; j < kEach; ++j) out[i][j] = merge(out[i][j], later.x[j]);
          sum[i] = merge(sum[i], softmax.y);
          maximum[i] = merge.maximum;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int row = first_row + i * kWarps;
      if (row >= group) break;
      uint32_t* const place =
          reinterpret_cast<uint32_t*>(out_place(args, Shape::kHeadDim, token, part.head * group + row, column));
#pragma unroll
      for (int j = 0; j < kEach; j += 2) {
        place[j / 2] = pack_bfloat16(__fdiv_rn(out[i][j], sum[i]), __fdiv_rn(out[i][j + 1], sum[i]));
      }
    }
  }
}

// At the end of a block: its first and its last part may be shared with other blocks, and the last of them merges.
template <class Shape>
__device__ __forceinline__ void merge_shared_parts(const StepView& step, const Attention& args, Memory<Shape>& memory,
                                                   const Share& share) {
  const int first = share.first(blockIdx.x), until = share.first(blockIdx.x + 1);
  named_barrier(1, kConsumers);
  if (threadIdx.x == 0) {
    for (int end = 0; end < 2; ++end) {
      const Part part(step, args, memory.first_item, end == 0 ? first : until - 1, until);
      memory.merged[end] = 0;
      const bool is_whole = part.begin >= first && part.begin + part.segments <= until;
      if (is_whole || (end == 1 && part.begin <= first)) continue;
      const int first_block = share.block_of(part.begin);
      const int others = share.block_of(part.begin + part.segments - 1) - first_block;
      int* const arrived = args.arrived + part.sequence * args.kv_heads + part.head;
      if (count_arrival(arrived) != others) continue;
      *arrived = 0;
      memory.merged[end] = share.first(first_block + 1) - part.begin;
    }
  }
  named_barrier(1, kConsumers);
  uint32_t phase = 0;
  for (int end = 0; end < 2; ++end) {
    if (memory.merged[end] == 0) continue;
    const Part part(step, args, memory.first_item, end == 0 ? first : until - 1, until);
    merge_parts<Shape>(args, memory, part, step.first_token[part.sequence], memory.merged[end], phase);
  }
}

// Computes the scores of this warp's 16 keys of a tile. `newest`: place of the newest key, in the last tile only.
template <class Shape>
__device__ __forceinline__ void score(float (&scores)[8], const uint32_t (&queries)[Shape::kHeadDim / 16][4],
                                      const uint8_t* keys, int newest) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) scores[i] = 0.0f;
#pragma unroll
  for (int step = 0; step < Shape::kHeadDim / 16; ++step) {
    const int k = step * 16 + lane / 8 % 2 * 8;
    uint32_t b[4];
    load_fragments(b, keys + k / kBlockK * kBlockBytes + in_block(row, k % kBlockK));
    multiply_fragments(scores, queries[step], b[0], b[1]);
    multiply_fragments(scores + 4, queries[step], b[2], b[3]);
  }
  if (newest < kCacheBlock - 1) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (warp * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2 > newest) scores[i] = -INFINITY;
    }
  }
}

// Shares the maxima of this warp's scores with the other warps.
template <class Shape>
__device__ __forceinline__ void share_maxima(const float (&scores)[8], float (&maxima)[kRows][kWarps]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float highest = row_maximum(fmaxf(fmaxf(scores[half * 2], scores[half * 2 + 1]),
                                            fmaxf(scores[4 + half * 2], scores[5 + half * 2])));
    if (threadIdx.x % 4 == 0) maxima[threadIdx.x % 32 / 4 + half * 8][threadIdx.x / 32] = highest;
  }
}

// Turns the scores of a tile into weights in shared memory; `factor` rescales the previous results of the segment.
template <class Shape>
__device__ __forceinline__ void weigh(float (&scores)[8], Memory<Shape>& memory, int turn, float scale,
                                      RowSoftmax (&rows)[2], float (&factor)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    const float4 maxima = *reinterpret_cast<const float4*>(memory.maxima[turn][row]);
    factor[half] = rows[half].raise(fmaxf(fmaxf(maxima.x, maxima.y), fmaxf(maxima.z, maxima.w)), scale);
    reinterpret_cast<float*>(&memory.sums[turn][row][lane % 4])[warp] =
        weigh_sixteen(scores, half, scale, rows[half].base());
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      *reinterpret_cast<uint32_t*>(&memory.weights[turn][row][warp * 16 + eight * 8 + lane % 4 * 2]) =
          __byte_perm(__float_as_uint(scores[eight * 4 + half * 2]), __float_as_uint(scores[eight * 4 + half * 2 + 1]),
                      0x7632);
    }
  }
}

// Adds the values of a tile to this warp's columns.
template <class Shape>
__device__ __forceinline__ void add_values(float (&out)[Shape::kColumns / 2], const Memory<Shape>& memory, int turn,
                                           const uint8_t* values) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kCacheBlock / 16; ++step) {
    uint32_t a[4];
    load_fragments(a, &memory.weights[turn][lane % 16][step * 16 + lane / 16 * 8]);
    const int key = step * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int sixteen = 0; sixteen < Shape::kColumns / 16; ++sixteen) {
      const int column = warp * Shape::kColumns + sixteen * 16 + lane / 16 * 8;
      uint32_t b[4];
      load_transposed_fragments(b, values + column / kBlockK * kBlockBytes + in_block(key, column % kBlockK));
      multiply_fragments(out + sixteen * 8, a, b[0], b[1]);
      multiply_fragments(out + sixteen * 8 + 4, a, b[2], b[3]);
    }
  }
}

template <class Shape>
__global__ __launch_bounds__(kThreads, Shape::kBlocksPerSm) void decode_kernel(const __grid_constant__ Attention args, bool early) {
  extern __shared__ uint8_t unaligned[];
  Memory<Shape>& memory =
      *reinterpret_cast<Memory<Shape>*>(unaligned + (1024 - shared_address(unaligned) % 1024) % 1024);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  let_successor_start();
  if (threadIdx.x == kConsumers) {
    for (int i = 0; i < Shape::kSlots; ++i) {
      barrier_init(memory.full + i, 1);
      barrier_init(memory.empty + i, kWarps);
    }
    barrier_init(&memory.gathered, 1);
    barrier_init_fence();
  }
  if (!early) wait_for_predecessor();
  const StepView step(args.step);
  if (warp == kWarps) {
    __syncwarp();
    find_items(step, memory.first_item, lane, [&](int sequence) {
      if (step.length(sequence) != 1) return 0;
      return ceil_div(step.start[sequence] / kCacheBlock + 1, kSegmentTiles) * args.kv_heads;
    });
  }
  __syncthreads();
  const Share share(memory.first_item[step.num_sequences], gridDim.x);
  int first = share.first(blockIdx.x);
  const int until = share.first(blockIdx.x + 1);
  if (warp == kWarps) {
    produce_tiles<Shape>(step, args, memory, first, until);
    return;
  }
  TileRing<Shape> ring{memory};
  while (first < until) {
    const Part part(step, args, memory.first_item, first, until);
    const int token = step.first_token[part.sequence], newest_place = step.start[part.sequence] % kCacheBlock;
    const bool has_newest = part.last == part.segments;
    const int32_t* const table = step.block_tables + int64_t{part.sequence} * step.table_width;
    const int64_t newest_tile =
        in_cache(has_newest ? table[part.tiles - 1] : 0, args.kv_heads, part.head, Shape::kHeadDim, 0, 0);
    wait_for_predecessor();
    Newest<Shape> newest;
    if (has_newest) newest.load(args, token, part.head);
    fetch_queries<Shape>(args, token, part.head, memory.queries);
    named_barrier(1, kConsumers);
    uint32_t queries[Shape::kHeadDim / 16][4];
#pragma unroll
    for (int k_step = 0; k_step < Shape::kHeadDim / 16; ++k_step) {
      const int k = k_step * 16 + lane / 16 * 8;
      load_fragments(queries[k_step], memory.queries + k / kBlockK * kRows * 128 + in_block(lane % 16, k % kBlockK));
    }

    Result<Shape> result;
    result.clear();
    float scores[8], out[Shape::kColumns / 2];
    RowSoftmax rows[2];
    const bool is_cut = part.last - part.first < part.segments;
    // Scores are computed one tile ahead. The loop begins before the first tile, so that its code exists only once: at
    // a single sequence, much of the time is spent on fetching instructions.
    for (int tile = part.first_tile() - 1; tile < part.last_tile(); ++tile) {
      const int turn = tile & 1;
      const bool is_first = tile < part.first_tile(), is_newest = tile == part.tiles - 1;
      float factor[2];
      if (!is_first) {
        const bool begins = tile % kSegmentTiles == 0;
        if (begins) rows[0] = RowSoftmax(), rows[1] = RowSoftmax();
        weigh<Shape>(scores, memory, turn, args.scale, rows, factor);
#pragma unroll
        for (int i = 0; i < Shape::kColumns / 2; ++i) out[i] = begins ? 0.0f : out[i] * factor[i / 2 % 2];
      }
      if (tile + 1 < part.last_tile()) {
        uint8_t* const keys = ring.take();
        const bool is_newest_next = tile + 1 == part.tiles - 1;
        if (is_newest_next) newest.store_key(newest_place, keys, args.keys + newest_tile);
        score<Shape>(scores, queries, keys, is_newest_next ? newest_place : kCacheBlock);
        ring.release();
        share_maxima<Shape>(scores, memory.maxima[turn ^ 1]);
      }
      named_barrier(1, kConsumers);
      if (is_first) continue;
      uint8_t* const values = ring.take();
      if (is_newest) newest.store_value(newest_place, values, args.values + newest_tile);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 shares = memory.sums[turn][lane / 4 + half * 8][lane % 4];
        rows[half].add(factor[half], shares.x, shares.y, shares.z, shares.w);
      }
      add_values<Shape>(out, memory, turn, values);
      ring.release();
      const bool is_last = tile + 1 == part.last_tile();
      if (tile % kSegmentTiles != kSegmentTiles - 1 && !is_last) continue;
      result.merge(out, rows);
      if (part.first == 0 && !(is_last && is_cut)) continue;
      result.save(args, part.begin + tile / kSegmentTiles);
      result.clear();
    }
    first += part.last - part.first;
    if (!is_cut) result.write(args, token, part.head);
  }
  wait_for_predecessor();
  if (share.first(blockIdx.x) < until) merge_shared_parts<Shape>(step, args, memory, share);
}

template <class Shape>
constexpr int kMemory = 1024 + sizeof(Memory<Shape>);

template <class Shape>
cudaError_t start(const Attention& args, int blocks_per_sm, bool early, cudaStream_t stream) {
  static_assert((kMemory<Shape> + 1024) * Shape::kBlocksPerSm <= 228 * 1024);
  return launch(decode_kernel<Shape>, dim3(multiprocessors() * blocks_per_sm), kThreads, kMemory<Shape>, 1, stream,
                args, early);
}

template <int kHeadDim>
cudaError_t choose(const Attention& args, int capacity, bool early, cudaStream_t stream) {
  const int heads = capacity * args.kv_heads;
  // With many segments a multiprocessor, one block with a long ring is best; with some, two blocks. With few, one block
  // that fits beside those of the previous kernel.
  if (heads >= 128) return start<Shape<kHeadDim, 1>>(args, 1, early, stream);
  return start<Shape<kHeadDim, 2>>(args, heads > 16 ? 2 : 1, early, stream);
}

template <class Shape>
cudaError_t prepare_shape() {
  return prepare(reinterpret_cast<const void*>(decode_kernel<Shape>), kMemory<Shape>);
}

}  // namespace

cudaError_t attend_decoding(const Attention& args, int head_dim, int capacity, bool early, cudaStream_t stream) {
  return head_dim == 128 ? choose<128>(args, capacity, early, stream) : choose<64>(args, capacity, early, stream);
}

cudaError_t prepare_decoding() {
  for (const auto each : {prepare_shape<Shape<64, 1>>, prepare_shape<Shape<64, 2>>, prepare_shape<Shape<128, 1>>,
                          prepare_shape<Shape<128, 2>>}) {
    const cudaError_t error = each();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fd::cuda
