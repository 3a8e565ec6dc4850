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

template <int kHeadDim_>
struct Shape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kSlots = 6 * 128 / kHeadDim;  // slots of the ring: tiles of keys or values, in turns
  static constexpr int kTileBytes = kHeadDim / kBlockK * kBlockBytes;
  static constexpr int kColumns = kHeadDim / kWarps;  // of a warp
  static constexpr int kQueryBytes = kHeadDim / kBlockK * kRows * 128;
};

template <class Shape>
struct Memory {
  alignas(1024) uint8_t slots[Shape::kSlots][Shape::kTileBytes];
  alignas(1024) uint8_t queries[Shape::kQueryBytes];
  alignas(16) __nv_bfloat16 weights[kRows][kWeightStride];
  float4 sums[kRows][4];          // of a row, by lane: shares of the four warps
  float maxima[kRows][kWarps];
  uint64_t full[Shape::kSlots];
  uint64_t empty[Shape::kSlots];
  int first_item[kMaxSequences + 1];
  int is_last;
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

// One side's view of the ring of tiles: k0 v0 k1 v1 ...
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
    int ahead = part.first_tile() + lane < part.last_tile() ? table[part.first_tile() + lane] : 0;
    for (int tile = part.first_tile(), i = 0; tile < part.last_tile(); ++tile, ++i) {
      const int block = __shfl_sync(~0u, ahead, i % 32);
      if (i % 32 == 31) ahead = tile + 1 + lane < part.last_tile() ? table[tile + 1 + lane] : 0;
      for (const uint8_t* const cache : {args.keys, args.values}) {
        if (lane == 0) {
          barrier_wait(memory.empty + ring.slot, ring.phase ^ 1);
          barrier_arrive_expect(memory.full + ring.slot, Shape::kTileBytes);
          bulk_copy(memory.slots[ring.slot], cache + in_cache(block, args.kv_heads, part.head, Shape::kHeadDim, 0, 0),
                    Shape::kTileBytes, memory.full + ring.slot);
        }
        ring.advance();
      }
    }
    first += part.last - part.first;
  }
}

__device__ __forceinline__ uint32_t rotate(uint32_t pair, float2 cos_sin) {
  const float2 x = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
  return pack_bfloat16(__fmaf_rn(x.x, cos_sin.x, -__fmul_rn(x.y, cos_sin.y)),
                       __fmaf_rn(x.y, cos_sin.x, __fmul_rn(x.x, cos_sin.y)));
}

// The newest key and value, which are not in the cache yet: two columns of one of them in each thread.
template <class Shape>
struct NewestKey {
  uint32_t pair;

  __device__ __forceinline__ static bool has_value() { return threadIdx.x >= Shape::kHeadDim / 2; }
  __device__ __forceinline__ static int column() { return threadIdx.x % (Shape::kHeadDim / 2) * 2; }

  __device__ __forceinline__ void load(const Attention& args, int token, int head) {
    if (threadIdx.x >= Shape::kHeadDim) return;
    const int64_t row = int64_t{token} * (args.heads + 2 * args.kv_heads) + args.heads + head;
    pair = *reinterpret_cast<const uint32_t*>(static_cast<const __nv_bfloat16*>(args.qkv) +
                                              (row + (has_value() ? args.kv_heads : 0)) * Shape::kHeadDim + column());
    if (has_value()) return;
    pair = rotate(pair, *reinterpret_cast<const float2*>(args.rotary_cos_sin + int64_t{token} * Shape::kHeadDim +
                                                         column()));
  }
  // Writes the key, or value, to the tile and to the cache.
  __device__ __forceinline__ void store(bool values, uint8_t* tile, int key, uint8_t* cache_tile) const {
    if (threadIdx.x >= Shape::kHeadDim || values != has_value()) return;
    const int at = column() / kBlockK * kBlockBytes + in_block(key, column() % kBlockK);
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
      const float4 low = *reinterpret_cast<const float4*>(turns + k), high = *reinterpret_cast<const float4*>(turns + k + 4);
      piece = {rotate(piece.x, {low.x, low.y}), rotate(piece.y, {low.z, low.w}), rotate(piece.z, {high.x, high.y}),
               rotate(piece.w, {high.z, high.w})};
    }
    *reinterpret_cast<uint4*>(queries + k / kBlockK * kRows * 128 + in_block(row, k % kBlockK)) = piece;
  }
}

// Partial result: [kRows][head_dim] values, then maximum and sum of each row.
template <class Shape>
__device__ __forceinline__ float* partial_at(const Attention& args, int segment) {
  return args.partial + int64_t{segment} * kRows * (Shape::kHeadDim + 2);
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
    float* const place = partial_at<Shape>(args, segment);
    each(args.heads / args.kv_heads, [&](int row, int column, float low, float high, int half) {
      *reinterpret_cast<float2*>(place + row * Shape::kHeadDim + column) = make_float2(low, high);
      if (column == 0) {
        *reinterpret_cast<float2*>(place + kRows * Shape::kHeadDim + row * 2) = make_float2(maximum[half], sum[half]);
      }
    });
  }
};

// Merges the parts of a sequence and head in order: the first part's result, which is at its last segment, and the
// segments after it. A warp merges rows r and r + 4 at a time.
template <class Shape>
__device__ __forceinline__ void merge_parts(const Attention& args, const Part& part, int token, int merged) {
  constexpr int kAhead = 4, kEach = Shape::kHeadDim / 32;
  const int group = args.heads / args.kv_heads, column = threadIdx.x % 32 * kEach;
  for (int first_row = threadIdx.x / 32; first_row < group; first_row += 2 * kWarps) {
    float out[2][kEach] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    for (int first = merged - 1; first < part.segments; first += kAhead) {
      float later[kAhead][2][kEach];
      float2 softmax[kAhead][2];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float* const from = partial_at<Shape>(args, part.begin + min(first + i, part.segments - 1));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = min(first_row + half * kWarps, group - 1);
          // Written by other blocks, so bypass the L1 cache.
          if constexpr (kEach == 4) {
            const float4 x = __ldcg(reinterpret_cast<const float4*>(from + row * Shape::kHeadDim + column));
            later[i][half][0] = x.x, later[i][half][1] = x.y, later[i][half][2] = x.z, later[i][half][3] = x.w;
          } else {
            const float2 x = __ldcg(reinterpret_cast<const float2*>(from + row * Shape::kHeadDim + column));
            later[i][half][0] = x.x, later[i][half][1] = x.y;
          }
          softmax[i][half] = __ldcg(reinterpret_cast<const float2*>(from + kRows * Shape::kHeadDim + row * 2));
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= part.segments) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Merger merge(maximum[half], softmax[i][half].x);
#pragma unroll
          for (int j = 0; j < kEach; ++j) out[half][j] = merge(out[half][j], later[i][half][j]);
          sum[half] = merge(sum[half], softmax[i][half].y);
          maximum[half] = merge.maximum;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half * kWarps;
      if (row >= group) continue;
      uint32_t* const place =
          reinterpret_cast<uint32_t*>(out_place(args, Shape::kHeadDim, token, part.head * group + row, column));
#pragma unroll
      for (int j = 0; j < kEach; j += 2) {
        place[j / 2] = pack_bfloat16(__fdiv_rn(out[half][j], sum[half]), __fdiv_rn(out[half][j + 1], sum[half]));
      }
    }
  }
}

// Computes one tile: adds to `out` and `rows` of a segment, whose first tile overwrites them.
template <class Shape>
__device__ __forceinline__ void attend_tile(Memory<Shape>& memory, TileRing<Shape>& ring,
                                            const uint32_t (&queries)[Shape::kHeadDim / 16][4], float scale,
                                            int visible, bool begins, float (&out)[Shape::kColumns / 2],
                                            RowSoftmax (&rows)[2], const NewestKey<Shape>& newest,
                                            uint8_t* const (&cache_tiles)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint8_t* const keys = ring.take();
  if (visible < kCacheBlock || cache_tiles[0] != nullptr) {
    newest.store(false, keys, visible - 1, cache_tiles[0]);
    named_barrier(1, kConsumers);
  }
  float scores[8] = {};
  {
    const int row = warp * 16 + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int step = 0; step < Shape::kHeadDim / 16; ++step) {
      const int k = step * 16 + lane / 8 % 2 * 8;
      uint32_t b[4];
      load_fragments(b, keys + k / kBlockK * kBlockBytes + in_block(row, k % kBlockK));
      multiply_fragments(scores, queries[step], b[0], b[1]);
      multiply_fragments(scores + 4, queries[step], b[2], b[3]);
    }
  }
  ring.release();
  if (visible < kCacheBlock) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (warp * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2 >= visible) scores[i] = -INFINITY;
    }
  }
  const int row = lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float highest = row_maximum(fmaxf(fmaxf(scores[half * 2], scores[half * 2 + 1]),
                                            fmaxf(scores[4 + half * 2], scores[5 + half * 2])));
    if (lane % 4 == 0) memory.maxima[row + half * 8][warp] = highest;
  }
  named_barrier(1, kConsumers);
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 maxima = *reinterpret_cast<const float4*>(memory.maxima[row + half * 8]);
    if (begins) rows[half] = RowSoftmax();
    factor[half] = rows[half].raise(fmaxf(fmaxf(maxima.x, maxima.y), fmaxf(maxima.z, maxima.w)), scale);
    reinterpret_cast<float*>(&memory.sums[row + half * 8][lane % 4])[warp] =
        weigh_sixteen(scores, half, scale, rows[half].base());
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
      const uint32_t pair = __byte_perm(__float_as_uint(scores[eight * 4 + half * 2]),
                                        __float_as_uint(scores[eight * 4 + half * 2 + 1]), 0x7632);
      *reinterpret_cast<uint32_t*>(&memory.weights[row + half * 8][warp * 16 + eight * 8 + lane % 4 * 2]) = pair;
    }
  }
#pragma unroll
  for (int i = 0; i < Shape::kColumns / 2; ++i) out[i] = begins ? 0.0f : out[i] * factor[i / 2 % 2];
  uint8_t* const values = ring.take();
  if (cache_tiles[1] != nullptr) newest.store(true, values, visible - 1, cache_tiles[1]);
  named_barrier(1, kConsumers);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 shares = memory.sums[row + half * 8][lane % 4];
    rows[half].add(factor[half], shares.x, shares.y, shares.z, shares.w);
  }
#pragma unroll
  for (int step = 0; step < kCacheBlock / 16; ++step) {
    uint32_t a[4];
    load_fragments(a, &memory.weights[lane % 16][step * 16 + lane / 16 * 8]);
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
  ring.release();
}

template <class Shape>
__global__ __launch_bounds__(kThreads, 2) void decode_kernel(const __grid_constant__ Attention args, bool early) {
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
  wait_for_predecessor();

  TileRing<Shape> ring{memory};
  while (first < until) {
    const Part part(step, args, memory.first_item, first, until);
    const int token = step.first_token[part.sequence], position = step.start[part.sequence];
    NewestKey<Shape> newest;
    const bool has_newest = part.last == part.segments;
    if (has_newest) newest.load(args, token, part.head);
    const int64_t newest_tile =
        has_newest ? in_cache(step.block_tables[int64_t{part.sequence} * step.table_width + part.tiles - 1],
                              args.kv_heads, part.head, Shape::kHeadDim, 0, 0)
                   : 0;
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
    float out[Shape::kColumns / 2];
    RowSoftmax rows[2];
    for (int tile = part.first_tile(); tile < part.last_tile(); ++tile) {
      const bool is_newest = tile == part.tiles - 1;
      uint8_t* const cache_tiles[2] = {is_newest ? args.keys + newest_tile : nullptr,
                                       is_newest ? args.values + newest_tile : nullptr};
      attend_tile<Shape>(memory, ring, queries, args.scale, is_newest ? position % kCacheBlock + 1 : kCacheBlock,
                         tile % kSegmentTiles == 0, out, rows, newest, cache_tiles);
      if (tile % kSegmentTiles != kSegmentTiles - 1 && !is_newest) continue;
      result.merge(out, rows);
      if (part.first == 0) continue;
      result.save(args, part.begin + tile / kSegmentTiles);
      result.clear();
    }
    first += part.last - part.first;
    if (part.last - part.first == part.segments) {
      result.write(args, token, part.head);
    } else {
      if (part.first == 0) result.save(args, part.begin + part.last - 1);
      named_barrier(1, kConsumers);
      if (threadIdx.x == 0) {
        const int first_block = share.block_of(part.begin);
        const int parts = share.block_of(part.begin + part.segments - 1) - first_block + 1;
        int* const arrived = args.arrived + part.sequence * args.kv_heads + part.head;
        __threadfence();
        memory.is_last = atomicAdd(arrived, 1) == parts - 1 ? share.first(first_block + 1) - part.begin : 0;
        if (memory.is_last) *arrived = 0;
        __threadfence();
      }
      named_barrier(1, kConsumers);
      if (memory.is_last) merge_parts<Shape>(args, part, token, memory.is_last);
    }
    // The queries of the next part overwrite these.
    named_barrier(1, kConsumers);
  }
}

template <class Shape>
constexpr int kMemory = 1024 + sizeof(Memory<Shape>);

template <class Shape>
cudaError_t start(const Attention& args, bool early, cudaStream_t stream) {
  return launch(decode_kernel<Shape>, dim3(multiprocessors() * 2), kThreads, kMemory<Shape>, 1, stream, args, early);
}

template <class Shape>
cudaError_t prepare_shape() {
  return prepare(reinterpret_cast<const void*>(decode_kernel<Shape>), kMemory<Shape>);
}

}  // namespace

cudaError_t attend_decoding(const Attention& args, int head_dim, bool early, cudaStream_t stream) {
  return head_dim == 128 ? start<Shape<128>>(args, early, stream) : start<Shape<64>>(args, early, stream);
}

cudaError_t prepare_decoding() {
  const cudaError_t error = prepare_shape<Shape<64>>();
  return error == cudaSuccess ? prepare_shape<Shape<128>>() : error;
}

}  // namespace fd::cuda
