// Conversion of Paddle tensors to the arguments of operations, with the checks that keep a wrong call from accessing
// memory out of bounds.
#pragma once

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "matrix.h"
#include "paddle/common/enforce.h"
#include "paddle/phi/api/all.h"
#include "step.h"

namespace fd::binding {

using Shape = std::vector<int64_t>;
using Shapes = std::vector<Shape>;
using Types = std::vector<paddle::DataType>;

// A collective of an expert-parallel group was interrupted; the group's status says why.
struct GroupInterrupted : std::runtime_error {
  GroupInterrupted() : std::runtime_error("the expert-parallel group was interrupted") {}
};

// Wraps an operation so that its exceptions reach Python as ValueError, RuntimeError or MemoryError. Paddle forwards
// only its own exceptions; any other ends the process.
template <auto Function>
struct Safe;

template <class Result, class... Args, Result (*Function)(Args...)>
struct Safe<Function> {
  static Result run(Args... args) {
    try {
      return Function(std::forward<Args>(args)...);
    } catch (const std::invalid_argument& error) {
      PADDLE_THROW(common::errors::InvalidArgument("%s", error.what()));
    } catch (const GroupInterrupted& interrupted) {
      PADDLE_THROW(common::errors::Unavailable("%s", interrupted.what()));
    } catch (const std::bad_alloc&) {
      PADDLE_THROW(common::errors::ResourceExhausted("no memory for the workspace of an operation"));
    }
  }
};

#define FD_KERNEL(function) PD_KERNEL(fd::binding::Safe<&fd::binding::function>::run)

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

struct Extent {
  int rows;
  int width;
};

inline Extent extent(const paddle::Tensor& tensor, const char* what) {
  if (tensor.dims().size() != 2) {
    throw std::invalid_argument(std::string(what) + " must have 2 dimensions, has " +
                                std::to_string(tensor.dims().size()));
  }
  return {static_cast<int>(tensor.dims()[0]), static_cast<int>(tensor.dims()[1])};
}

inline PackedMatrix matrix(const paddle::Tensor& blob) {
  require(blob.dtype() == paddle::DataType::UINT8, "a packed matrix must be a uint8 tensor");
  return PackedMatrix::view(blob.data(), blob.numel());
}

inline Step step(const paddle::Tensor& buffer) {
  require(buffer.dtype() == paddle::DataType::INT32, "a step must be an int32 tensor");
  return Step::view(buffer.data<int32_t>(), buffer.numel());
}

// Returns float32 data; `what` names the argument in errors.
inline const float* floats(const paddle::Tensor& tensor, int64_t count, const char* what) {
  if (tensor.dtype() != paddle::DataType::FLOAT32 || tensor.numel() != count) {
    throw std::invalid_argument(std::string(what) + " must hold " + std::to_string(count) + " float32, has " +
                                std::to_string(tensor.numel()));
  }
  return tensor.data<float>();
}

// Returns the data of an argument that the operation updates in place.
inline float* mutable_floats(const paddle::Tensor& tensor, int64_t count, const char* what) {
  return const_cast<float*>(floats(tensor, count, what));
}

inline const int32_t* int32s(const paddle::Tensor& tensor, int64_t count, const char* what) {
  require(tensor.dtype() == paddle::DataType::INT32 && tensor.numel() == count, what);
  return tensor.data<int32_t>();
}

// Checks keys [num_blocks, kv heads, key panels, head_dim, 32], values [num_blocks, kv heads, value panels, block size,
// 32], and that all positions of the step lie in blocks of the cache. Both are written although they are declared as
// inputs: as in-place outputs, each call would create new Tensor objects for them.
inline Cache cache(const paddle::Tensor& keys, const paddle::Tensor& values, const Step& step) {
  const bool wide = keys.dtype() == paddle::DataType::FLOAT32;
  require(wide || keys.dtype() == paddle::DataType::BFLOAT16, "a KV cache must be float32 or bfloat16");
  require(keys.dtype() == values.dtype() && keys.dims().size() == 5 && values.dims().size() == 5,
          "keys and values of a KV cache must have one type and five dimensions");
  Cache cache;
  cache.type = wide ? CacheType::kFloat32 : CacheType::kBfloat16;
  cache.keys = static_cast<uint8_t*>(const_cast<void*>(keys.data()));
  cache.values = static_cast<uint8_t*>(const_cast<void*>(values.data()));
  cache.num_kv_heads = static_cast<int>(keys.dims()[1]);
  cache.head_dim = static_cast<int>(keys.dims()[3]);
  cache.block_size = static_cast<int>(values.dims()[3]);
  require(cache.num_kv_heads > 0 && cache.head_dim > 0 && cache.head_dim % 2 == 0 && cache.block_size > 0,
          "a KV cache must have heads and blocks, and an even head_dim");
  require(keys.dims()[0] == values.dims()[0] && keys.dims()[2] == cache.key_panels() &&
              values.dims()[2] == cache.value_panels() && keys.dims()[4] == kPanel && values.dims()[4] == kPanel,
          "keys and values of a KV cache have different shapes");
  for (int sequence = 0; sequence < step.num_sequences; ++sequence) {
    const int64_t count = (int64_t{step.context(sequence)} + cache.block_size - 1) / cache.block_size;
    const int32_t* const blocks = step.blocks(sequence);
    require(
        count <= step.table_width &&
            std::all_of(blocks, blocks + count, [&](int32_t block) { return 0 <= block && block < keys.dims()[0]; }),
        "step: a position lies in a block outside of the cache");
  }
  return cache;
}

// Returns the number of query heads in a qkv matrix with `width` outputs.
inline int query_heads(int width, const Cache& cache) {
  const int heads = width / cache.head_dim - 2 * cache.num_kv_heads;
  require(width % cache.head_dim == 0 && heads > 0 && heads % cache.num_kv_heads == 0,
          "qkv: the query heads must be a whole multiple of the kv heads of the cache");
  return heads;
}

inline paddle::Tensor float_output(const Shape& shape) {
  return paddle::empty(shape, paddle::DataType::FLOAT32, paddle::CPUPlace());
}

inline paddle::Tensor int_output(const Shape& shape) {
  return paddle::empty(shape, paddle::DataType::INT32, paddle::CPUPlace());
}

}  // namespace fd::binding
