// Copies weights from host memory, such as the pages of a checkpoint, to the device and converts them there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "retile.h"

namespace fd::cuda {

// Two pinned buffers and their counterparts on the device: while one is filled by several threads, the other travels.
// Not thread-safe. Functions return an fd_status.
class Uploader {
 public:
  explicit Uploader(cudaStream_t stream) : stream_(stream) {}
  ~Uploader();
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;

  int open();

  // `part.source` is host memory, in which one of the strides is 1. The first value that is not finite sets the tag that
  // finish() returns.
  int matrix(const Retile& part, int tag);

  int copy(void* to, const void* from, int64_t bytes);

  // Waits for all uploads. `bad_tag` becomes 0 if all values were finite.
  int finish(int32_t* bad_tag);

 private:
  static constexpr int kBuffers = 2;
  static constexpr int64_t kBytes = int64_t{32} << 20;

  struct Buffer {
    void* pinned = nullptr;
    void* device = nullptr;
    cudaEvent_t done = nullptr;
  };

  // Returns the next buffer once its last use has ended.
  int take(Buffer** buffer);

  cudaStream_t stream_;
  Buffer buffers_[kBuffers];
  int next_ = 0;
  int32_t* bad_tag_ = nullptr;
};

}  // namespace fd::cuda
