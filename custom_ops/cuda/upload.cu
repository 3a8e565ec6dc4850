#include "upload.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "status.h"

namespace fd::cuda {
namespace {

constexpr int kThreads = 8;
// Less than this is copied by one thread.
constexpr int64_t kLeastPerThread = 1 << 20;

int64_t size_of(Source type) { return type == Source::kFloat32 ? 4 : 2; }

// Copies `lines` lines of `bytes`, which are `stride` bytes apart in `from` and adjacent in `to`.
void gather(uint8_t* to, const uint8_t* from, int64_t lines, int64_t bytes, int64_t stride) {
  const auto some = [=](int64_t first, int64_t last) {
    if (stride == bytes) {
      std::memcpy(to + first * bytes, from + first * stride, static_cast<size_t>((last - first) * bytes));
      return;
    }
    for (int64_t line = first; line < last; ++line) {
      std::memcpy(to + line * bytes, from + line * stride, static_cast<size_t>(bytes));
    }
  };
  const int64_t useful = std::min<int64_t>(lines, lines * bytes / kLeastPerThread);
  const int threads = static_cast<int>(std::clamp<int64_t>(useful, 1, kThreads));
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) helpers.emplace_back(some, lines * i / threads, lines * (i + 1) / threads);
  some(0, lines / threads);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

Uploader::~Uploader() {
  for (Buffer& buffer : buffers_) {
    cudaFreeHost(buffer.pinned), cudaFree(buffer.device);
    if (buffer.done != nullptr) cudaEventDestroy(buffer.done);
  }
  cudaFree(bad_tag_);
}

int Uploader::open() {
  int result = status_of("memory for uploads", cudaMalloc(&bad_tag_, sizeof *bad_tag_));
  if (result == FD_OK) result = status_of("uploads", cudaMemsetAsync(bad_tag_, 0, sizeof *bad_tag_, stream_));
  for (Buffer& buffer : buffers_) {
    if (result == FD_OK) result = status_of("pinned memory for uploads", cudaMallocHost(&buffer.pinned, kBytes));
    if (result == FD_OK) result = status_of("memory for uploads", cudaMalloc(&buffer.device, kBytes));
    if (result == FD_OK) result = status_of("an event", cudaEventCreateWithFlags(&buffer.done, cudaEventDisableTiming));
  }
  return result;
}

int Uploader::take(Buffer** buffer) {
  *buffer = &buffers_[next_++ % kBuffers];
  return status_of("an upload", cudaEventSynchronize((*buffer)->done));
}

int Uploader::matrix(const Retile& part, int tag) {
  const int64_t size = size_of(part.type), row_bytes = part.inputs * size;
  if (row_bytes > kBytes) return fail(FD_BAD_ARGUMENT, "upload: a row of more than 32 MiB");
  const bool is_row_major = part.column_stride == 1;
  if (!is_row_major && part.row_stride != 1) return fail(FD_BAD_ARGUMENT, "upload: neither stride is 1");
  const int rows = static_cast<int>(std::min<int64_t>(part.rows, kBytes / row_bytes));
  const uint8_t* const source = static_cast<const uint8_t*>(part.source);
  for (int first = 0; first < part.rows; first += rows) {
    const int count = std::min(rows, part.rows - first);
    Buffer* buffer = nullptr;
    int result = take(&buffer);
    if (result != FD_OK) return result;
    uint8_t* const pinned = static_cast<uint8_t*>(buffer->pinned);
    Retile piece = part;
    piece.source = buffer->device, piece.rows = count, piece.first_row = part.first_row + first;
    piece.bad_tag = bad_tag_, piece.tag = tag;
    if (is_row_major) {
      gather(pinned, source + first * part.row_stride * size, count, row_bytes, part.row_stride * size);
      piece.row_stride = part.inputs;
    } else {
      gather(pinned, source + first * size, part.inputs, count * size, part.column_stride * size);
      piece.column_stride = count;
    }
    result = status_of("an upload", cudaMemcpyAsync(buffer->device, pinned, static_cast<size_t>(count * row_bytes),
                                                    cudaMemcpyHostToDevice, stream_));
    if (result == FD_OK) result = status_of("converting a matrix", retile(piece, stream_));
    if (result == FD_OK) result = status_of("an upload", cudaEventRecord(buffer->done, stream_));
    if (result != FD_OK) return result;
  }
  return FD_OK;
}

int Uploader::copy(void* to, const void* from, int64_t bytes) {
  for (int64_t first = 0; first < bytes; first += kBytes) {
    const int64_t count = std::min(kBytes, bytes - first);
    Buffer* buffer = nullptr;
    int result = take(&buffer);
    if (result != FD_OK) return result;
    uint8_t* const pinned = static_cast<uint8_t*>(buffer->pinned);
    // Lines of 64 KiB, so that threads share the work.
    constexpr int64_t kLine = 1 << 16;
    const int64_t lines = count / kLine, rest = count % kLine;
    const uint8_t* const source = static_cast<const uint8_t*>(from) + first;
    gather(pinned, source, lines, kLine, kLine);
    std::memcpy(pinned + lines * kLine, source + lines * kLine, static_cast<size_t>(rest));
    result = status_of("an upload", cudaMemcpyAsync(static_cast<uint8_t*>(to) + first, pinned,
                                                    static_cast<size_t>(count), cudaMemcpyHostToDevice, stream_));
    if (result == FD_OK) result = status_of("an upload", cudaEventRecord(buffer->done, stream_));
    if (result != FD_OK) return result;
  }
  return FD_OK;
}

int Uploader::finish(int32_t* bad_tag) {
  int result = status_of("an upload", cudaMemcpyAsync(bad_tag, bad_tag_, sizeof *bad_tag, cudaMemcpyDeviceToHost, stream_));
  if (result == FD_OK) result = status_of("uploads", cudaStreamSynchronize(stream_));
  return result;
}

}  // namespace fd::cuda
