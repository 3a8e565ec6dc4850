// A CPU as a device behind the C interface of fd_device.h.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "fd_device.h"
#include "matrix.h"

namespace fd {

// Stores `message` for fd_last_error() and returns `status`.
int fail(int status, std::string message);

// Pages of zeros, which cost no memory before they are written.
class Pages {
 public:
  Pages() = default;
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  // Returns false if there is no memory.
  bool allocate(int64_t bytes);

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // Bytes from `place` to the end; 0 if it lies elsewhere.
  int64_t after(const void* place) const;

 private:
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace fd

// Enqueued work is done at once, by the calling thread and those of its team. An error in it breaks the device, as it
// would on a GPU: what it has written until then is undefined.
struct fd_device {
  struct Slot {
    fd::Pages results;
    bool is_taken = false;
    bool has_ended = false;
  };
  static constexpr int kSlots = 2;

  fd::Format format;
  int block_size;
  fd::Pages arenas[4];
  fd::Pages plan;
  fd::Pages results;
  Slot slots[kSlots];
  uint64_t next_ticket = 0;

  bool is_uploading = false;
  int bad_tag = 0;

  // A graph is the work of its capture, which is done again for each launch.
  using Graph = std::vector<std::function<void()>>;
  std::map<uint64_t, Graph> graphs;
  Graph captured;
  uint64_t captured_key = 0;
  bool is_capturing = false;

  // Empty until an error breaks the device.
  std::string fault;

  // Does the work, or adds it to the graph that is being captured.
  int enqueue(std::function<void()> work);
  int launch(const Graph& graph);

  Slot& slot_of(uint64_t ticket) { return slots[ticket % kSlots]; }
  bool is_in_progress(uint64_t ticket) {
    return ticket < next_ticket && next_ticket - ticket <= kSlots && slot_of(ticket).is_taken;
  }
};
