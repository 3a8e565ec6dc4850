// Temporary memory of operations, reused between calls.
//
// New memory costs a page fault per 4 KiB, which takes longer than many operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fd {

class Workspace {
 public:
  // Returns the calling thread's workspace, emptied: memory taken from it before is no longer valid.
  static Workspace& fresh();

  // Returns uninitialised memory aligned to a cache line, valid until this thread's next `fresh`.
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(bytes(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  void* bytes(int64_t count);
  void add_chunk(int64_t size);

  std::vector<std::unique_ptr<std::byte, Free>> chunks_;
  int64_t size_ = 0;   // of the last chunk
  int64_t used_ = 0;   // of the last chunk
  int64_t total_ = 0;  // of all chunks
};

}  // namespace fd
