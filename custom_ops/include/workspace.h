// Memory for what lives within one operation, kept from one call to the next.
//
// Fresh memory costs a page fault per 4 KiB, more than many an operation itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fd {

class Workspace {
 public:
  // Everything taken before is given up. Each thread that starts operations has a workspace of its own.
  static Workspace& fresh();

  // Uninitialised, aligned to a cache line; valid until the next `fresh` of this thread.
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
