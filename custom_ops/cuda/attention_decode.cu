// Attention of sequences with one token in the step. A block of four warps processes the segments of its share one tile
// after the other: each warp computes the scores of 16 keys, then the values of a quarter of the columns.
#include "attention_results.cuh"
#include "launch.h"

namespace fd::cuda {
namespace {

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
  // Every thread releases, after its last read. One a warp would do, but racecheck would not see it for the others.
  __device__ void release() {
    __syncwarp();
    barrier_arrive(memory.empty + slot);
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
      barrier_init(memory.empty + i, kConsumers);
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
