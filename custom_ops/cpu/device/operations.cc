// The operations of the C interface, computed by the CPU kernels.
#include <algorithm>
#include <cstring>

#include "device/enqueue.h"
#include "embedding.h"
#include "kernels/kernels.h"
#include "linear.h"
#include "moe_permute.h"
#include "moe_topk_select.h"
#include "moe_unpermute.h"
#include "paged_attention.h"
#include "rms_norm.h"
#include "rope_and_cache.h"

namespace fd {
namespace {

Step step_of(const fd_device& device, const int32_t* buffer) {
  return Step::view(buffer, device.plan.after(buffer) / static_cast<int64_t>(sizeof(int32_t)));
}

int round_up(int value, int step) { return (value + step - 1) / step * step; }

void run_embedding(const fd_device& device, const fd_embedding_args& args) {
  Step step = step_of(device, args.step);
  if (args.drawn != nullptr) {
    const int64_t drawn = device.results.after(args.drawn) / static_cast<int64_t>(sizeof(int32_t));
    int32_t* const token_ids = Workspace::fresh().take<int32_t>(step.num_tokens);
    for (int token = 0; token < step.num_tokens; ++token) {
      const int64_t id = step.token_ids[token];
      require(-1 - id < drawn, "embedding: a token of a row that the step before did not have");
      // A row without finite logits draws no token.
      token_ids[token] = id < 0 ? std::max(args.drawn[-1 - id], 0) : static_cast<int32_t>(id);
    }
    step.token_ids = token_ids;
  }
  embedding({step, args.table, device.format, args.vocabulary, args.width, args.hidden_states});
}

void run_norm(const fd_device&, const fd_norm_args& args) {
  const int rows = *args.count;
  if (rows == 0) return;
  Workspace& workspace = Workspace::fresh();
  const Activations x{static_cast<float*>(args.out), rows, args.width};
  float* const normed = workspace.take<float>(int64_t{rows} * args.width);
  const RmsNorm norm{args.hidden_states, args.weight, args.epsilon, rows, args.width, normed, &x, args.rows};
  LinearGroup to_logits(workspace, 1, args.width, rows);
  if (args.router != nullptr) {
    const PackedMatrix router = PackedMatrix::bare(Format::kFloat32, args.experts, args.width, 1, args.router);
    to_logits.add({router, 0, x, Output::kStore, args.router_logits, args.experts, {}});
  }
  run_team([&](Team& team) {
    rms_norm(team, norm);
    to_logits.run(team);
  });
}

void run_rotation(const fd_device& device, const fd_rotation_args& args) {
  const Step step = step_of(device, args.step);
  run_team([&](Team& team) { rotary_embedding(team, step, args.theta, args.head_dim, args.rotary_cos_sin); });
}

// A product of each group that has rows. Rows that go elsewhere are first stored in the order of the tokens.
void run_product(const fd_device& device, const fd_product_args& args) {
  const int32_t* const counts = args.counts;
  const int most = *std::max_element(counts, counts + args.groups);
  if (most == 0) return;
  Workspace& workspace = Workspace::fresh();
  // With slots, the number of matrices is unknown, and no kernel reads it.
  const PackedMatrix weights =
      PackedMatrix::bare(device.format, args.outputs, args.inputs, args.groups, args.weights);
  const bool is_swiglu = args.output == FD_OUT_SWIGLU, is_scattered = args.rows != nullptr && !is_swiglu;
  const Output output = is_swiglu ? Output::kSwiglu : args.output == FD_OUT_ADD ? Output::kAdd : Output::kStore;
  int32_t* const firsts = workspace.take<int32_t>(args.groups + 1);
  firsts[0] = 0;
  for (int g = 0; g < args.groups; ++g) firsts[g + 1] = round_up(firsts[g] + counts[g], args.alignment);
  float* const tokens = static_cast<float*>(const_cast<void*>(args.tokens));
  float* out = static_cast<float*>(args.out);
  int64_t stride = args.out_stride;
  if (is_scattered) {
    out = workspace.take<float>(int64_t{firsts[args.groups]} * args.outputs);
    stride = args.outputs;
  }
  LinearGroup products(workspace, args.groups, args.inputs, most);
  for (int g = 0; g < args.groups; ++g) {
    if (counts[g] == 0) continue;
    const int64_t first = firsts[g];
    const Activations x{tokens + first * Activations::padded(args.inputs), counts[g], args.inputs};
    const int matrix = args.slots == nullptr ? g : args.slots[g];
    if (is_swiglu) {
      const int width = args.outputs / 2;
      products.add({weights, matrix, x, output, nullptr, 0, {out + first * Activations::padded(width), counts[g], width}});
    } else {
      products.add({weights, matrix, x, output, out + first * stride, stride, {}});
    }
  }
  run_team([&](Team& team) {
    products.run(team);
    if (!is_scattered) return;
    team.for_each(args.groups, [&](int64_t g) {
      for (int row = firsts[g]; row < firsts[g] + counts[g]; ++row) {
        std::memcpy(static_cast<float*>(args.out) + args.rows[row] * args.out_stride, out + row * stride,
                    args.outputs * sizeof(float));
      }
    });
  });
}

Cache cache_of(const fd_device& device, int kv_heads, int head_dim, void* keys, void* values) {
  return {device.format == Format::kFloat32 ? CacheType::kFloat32 : CacheType::kBfloat16,
          static_cast<uint8_t*>(keys),
          static_cast<uint8_t*>(values),
          kv_heads,
          head_dim,
          device.block_size};
}

// Keys and values of a block have as many bytes, although one of them may need less.
int64_t block_bytes(const Cache& cache) {
  return cache.num_kv_heads * std::max(cache.key_panels() * cache.key_panel_bytes(),
                                       cache.value_panels() * cache.value_panel_bytes());
}

void check_blocks(const fd_device& device, const Step& step, const Cache& cache) {
  const Pages& arena = device.arenas[FD_CACHE];
  const int64_t blocks = std::min(arena.after(cache.keys), arena.after(cache.values)) / block_bytes(cache);
  for (int sequence = 0; sequence < step.num_sequences; ++sequence) {
    const int64_t count = (int64_t{step.context(sequence)} + cache.block_size - 1) / cache.block_size;
    const int32_t* const table = step.blocks(sequence);
    require(count <= step.table_width &&
                std::all_of(table, table + count, [&](int32_t block) { return 0 <= block && block < blocks; }),
            "attention: a position lies in a block outside of the cache");
  }
}

void run_attention(const fd_device& device, const fd_attention_args& args) {
  const Step step = step_of(device, args.step);
  const Cache cache = cache_of(device, args.kv_heads, args.head_dim, args.keys, args.values);
  check_blocks(device, step, cache);
  float* const qkv = static_cast<float*>(args.qkv);
  const Activations out{static_cast<float*>(args.out), step.num_tokens, args.heads * args.head_dim};
  const RopeAndCache rope{step, qkv, args.rotary_cos_sin, args.heads, cache};
  const PagedAttention attention(Workspace::fresh(), {step, qkv, args.heads, cache, out});
  run_team([&](Team& team) {
    rope_and_cache(team, rope);
    attention.run(team);
  });
}

void copy_activations(const Activations& from, int from_row, const Activations& to, int to_row) {
  for (int piece = 0; piece * kPiece < from.width; ++piece) {
    std::memcpy(to.piece(to_row, piece), from.piece(from_row, piece), kPiece * sizeof(float));
  }
}

void run_route(const fd_device&, const fd_route_args& args) {
  const int tokens = *args.count, experts = args.experts;
  Workspace& workspace = Workspace::fresh();
  // The selection replaces them by their softmax.
  float* const logits = workspace.take<float>(int64_t{tokens} * experts);
  std::memcpy(logits, args.logits, int64_t{tokens} * experts * sizeof(float));
  const MoeTopkSelect select{logits, args.bias,     tokens,        experts,
                             args.k, args.norm_min, args.topk_ids, args.topk_weights};
  const MoeOrder order = take_order(workspace, tokens, args.k, experts);
  const Activations x{static_cast<float*>(const_cast<void*>(args.x)), tokens, args.width};
  int32_t* const firsts = workspace.take<int32_t>(experts);
  run_team([&](Team& team) {
    moe_topk_select(team, select);
    moe_order(team, args.topk_ids, order);
    if (team.rank() == 0) {
      int first = 0;
      for (int expert = 0; expert < experts; ++expert) {
        firsts[expert] = first;
        args.counts[expert] = order.rows(expert);
        first = round_up(first + order.rows(expert), args.alignment);
      }
    }
    team.barrier();
    team.for_each(experts, [&](int64_t expert) {
      const int rows = order.rows(static_cast<int>(expert)), first = firsts[expert];
      const Activations group{static_cast<float*>(args.rows) + first * Activations::padded(args.width), rows, args.width};
      for (int row = 0; row < rows; ++row) {
        const int32_t assignment = order.order[order.offsets[expert] + row];
        args.assignments[first + row] = assignment;
        copy_activations(x, assignment / args.k, group, row);
      }
    });
  });
}

void run_combine(const fd_device&, const fd_combine_args& args) {
  const Kernels& isa = kernels();
  const float* const results = static_cast<const float*>(args.results);
  run_team([&](Team& team) {
    team.for_each(*args.count, [&](int64_t token) {
      const float* rows[kMaxTopk];
      for (int j = 0; j < args.k; ++j) rows[j] = results + (token * args.k + j) * args.width;
      isa.combine(args.hidden_states + token * args.width, rows, args.topk_weights + token * args.k, args.k,
                  args.shared == nullptr ? nullptr : args.shared + token * args.width, args.width);
    });
  });
}

}  // namespace
}  // namespace fd

using namespace fd;

extern "C" {

int64_t fd_activation_bytes(int64_t rows, int32_t width) {
  return rows * Activations::padded(width) * static_cast<int64_t>(sizeof(float));
}

// There is one tile, of one token: the kernels divide the rows themselves.
int32_t fd_tiles(void) { return 1; }
int32_t fd_tile(int32_t, int32_t) { return 0; }
int32_t fd_tile_tokens(int32_t tile) { return tile == 0 ? 1 : 0; }

int fd_product(void* stream, const fd_product_args* args) {
  if (args->output < FD_OUT_BFLOAT16 || args->output > FD_OUT_SWIGLU) return refuse("product: unknown output");
  if (args->groups < 1 || args->alignment < 1) return refuse("product: at least one group, and an alignment");
  if (args->outputs < 1 || args->inputs < 1) return refuse("product: at least one output and one input");
  if (args->output == FD_OUT_SWIGLU && args->outputs % 2 != 0) return refuse("product: SwiGLU needs as many gates as ups");
  if (args->output == FD_OUT_ADD && args->rows != nullptr) return refuse("product: sums have no rows of their own");
  if (args->bias != nullptr) return refuse("product: on a CPU biases are part of the matrix");
  return enqueue(stream, run_product, *args);
}

int fd_product_pair(void* stream, const fd_product_args* dense, const fd_product_args* grouped) {
  const int result = fd_product(stream, dense);
  return result != FD_OK ? result : fd_product(stream, grouped);
}

int fd_embedding(void* stream, const fd_embedding_args* args) { return enqueue(stream, run_embedding, *args); }

int fd_norm(void* stream, const fd_norm_args* args) { return enqueue(stream, run_norm, *args); }

int fd_rotation(void* stream, const fd_rotation_args* args) {
  if (args->head_dim < 2 || args->head_dim % 2 != 0) return refuse("rotation: an even head_dim");
  return enqueue(stream, run_rotation, *args);
}

int64_t fd_cache_bytes(const fd_device* device, int64_t blocks, int32_t kv_heads, int32_t head_dim) {
  return blocks * block_bytes(cache_of(*device, kv_heads, head_dim, nullptr, nullptr));
}

int64_t fd_attention_work_bytes(int64_t, int32_t, int32_t) { return 0; }

int fd_attention(void* stream, const fd_attention_args* args) {
  if (args->kv_heads < 1 || args->heads % args->kv_heads != 0) {
    return refuse("attention: query heads must be a multiple of the kv heads");
  }
  if (args->head_dim < 2 || args->head_dim % 2 != 0) return refuse("attention: an even head_dim");
  return enqueue(stream, run_attention, *args);
}

int64_t fd_expert_rows(int32_t capacity, int32_t k, int32_t experts, int32_t alignment) {
  const int64_t rows = int64_t{capacity} * k;
  return rows + std::min<int64_t>(rows, experts) * (alignment - 1);
}

int fd_route(void* stream, const fd_route_args* args) {
  if (args->k < 1 || args->k > kMaxTopk || args->k > args->experts) return refuse("route: between 1 and 64 picks");
  if (args->alignment < 1) return refuse("route: an alignment of at least 1");
  return enqueue(stream, run_route, *args);
}

int fd_combine(void* stream, const fd_combine_args* args) {
  if (args->k < 1 || args->k > kMaxTopk) return refuse("combine: between 1 and 64 picks");
  const int result = enqueue(stream, run_combine, *args);
  if (result != FD_OK || args->norm == nullptr) return result;
  fd_norm_args norm{};
  norm.hidden_states = args->hidden_states;
  norm.weight = args->norm;
  norm.count = args->count;
  norm.out = args->normed;
  norm.epsilon = args->epsilon;
  norm.width = args->width;
  norm.capacity = args->capacity;
  return fd_norm(stream, &norm);
}

}  // extern "C"
