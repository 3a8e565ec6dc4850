#include "workspace.h"

#include <cstdlib>
#include <new>
#include <utility>

namespace fd {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kMinChunk = 1 << 20;

}  // namespace

void Workspace::Free::operator()(void* memory) const { std::free(memory); }

Workspace& Workspace::fresh() {
  static thread_local Workspace workspace;
  if (workspace.chunks_.size() > 1) {
    // Replace the chunks by one that is large enough for the whole last operation.
    const int64_t total = workspace.total_;
    workspace.chunks_.clear();
    // Before add_chunk, which may throw: the old chunks are gone.
    workspace.size_ = workspace.total_ = 0;
    workspace.add_chunk(total);
  }
  workspace.used_ = 0;
  return workspace;
}

void* Workspace::bytes(int64_t count) {
  count = (count + kLine - 1) / kLine * kLine;
  if (chunks_.empty() || used_ + count > size_) add_chunk(count > kMinChunk ? count : kMinChunk);
  void* memory = chunks_.back().get() + used_;
  used_ += count;
  return memory;
}

void Workspace::add_chunk(int64_t size) {
  std::unique_ptr<std::byte, Free> chunk(
      static_cast<std::byte*>(std::aligned_alloc(kLine, (size + kLine - 1) / kLine * kLine)));
  if (chunk == nullptr) throw std::bad_alloc();
  chunks_.push_back(std::move(chunk));
  size_ = size;
  used_ = 0;
  total_ += size;
}

}  // namespace fd
