#include "device/device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <new>
#include <stdexcept>
#include <system_error>

#include "kernels/kernels.h"
#include "team.h"

namespace fd {
namespace {

constexpr int kLayoutVersion = 1;
constexpr const char* kArenaNames[] = {"weights", "cache", "work", "exchange"};

thread_local std::string last_error;

std::string gigabytes(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GB", static_cast<double>(bytes) / 1e9);
  return text;
}

int64_t total_memory() { return int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE); }

// Returns the memory that Linux could give without swapping, the page cache included.
int64_t free_memory() {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    long long kibibytes = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %lld kB", &kibibytes) == 1) return kibibytes * 1024;
  }
  return int64_t{sysconf(_SC_AVPHYS_PAGES)} * sysconf(_SC_PAGESIZE);
}

}  // namespace

int fail(int status, std::string message) {
  last_error = std::move(message);
  return status;
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(bytes_));
}

bool Pages::allocate(int64_t bytes) {
  void* const memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return false;
  data_ = static_cast<uint8_t*>(memory), bytes_ = bytes;
  return true;
}

int64_t Pages::after(const void* place) const {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data_), at = reinterpret_cast<uintptr_t>(place);
  return at < begin || at >= begin + static_cast<uintptr_t>(bytes_) ? 0 : bytes_ - static_cast<int64_t>(at - begin);
}

}  // namespace fd

using fd::fail;

int fd_device::enqueue(std::function<void()> work) {
  if (is_capturing) {
    captured.push_back(std::move(work));
    return FD_OK;
  }
  return launch({std::move(work)});
}

int fd_device::launch(const Graph& graph) {
  if (!fault.empty()) return fail(FD_BROKEN, fault);
  try {
    for (const auto& work : graph) work();
  } catch (const std::invalid_argument& error) {
    fault = std::string("a step: ") + error.what();
  } catch (const std::bad_alloc&) {
    fault = "a step: no memory for the workspace of an operation";
  }
  return fault.empty() ? FD_OK : fail(FD_BROKEN, fault);
}

extern "C" {

const char* fd_last_error(void) { return fd::last_error.c_str(); }
const char* fd_platform(void) { return "CPU"; }

int fd_prepare(void) {
  try {
    fd::kernels();
    return FD_OK;
  } catch (const std::invalid_argument& error) {
    return fail(FD_BAD_ARGUMENT, error.what());
  }
}

int fd_open(const fd_open_args* args, fd_device** opened) {
  *opened = nullptr;
  if (args->ordinal != 0) return fail(FD_BAD_ARGUMENT, "opening CPU " + std::to_string(args->ordinal) + ": there is only CPU 0");
  if (args->type != FD_FLOAT32 && args->type != FD_BFLOAT16) {
    return fail(FD_BAD_ARGUMENT, "open: matrices can be float32 or bfloat16");
  }
  if (args->block_size < 1) return fail(FD_BAD_ARGUMENT, "open: a block of the cache needs at least one token");
  if (args->threads < 1) return fail(FD_BAD_ARGUMENT, "open: at least one thread");
  const int result = fd_prepare();
  if (result != FD_OK) return result;
  try {
    fd::set_threads(args->threads, args->cpus);
  } catch (const std::system_error& error) {
    return fail(FD_BAD_ARGUMENT,
                "cannot start " + std::to_string(args->threads) + " threads (" + error.what() + ")");
  }
  auto device = std::make_unique<fd_device>();
  device->format = args->type == FD_FLOAT32 ? fd::Format::kFloat32 : fd::Format::kBfloat16;
  device->block_size = args->block_size;
  *opened = device.release();
  return FD_OK;
}

void fd_close(fd_device* device) { delete device; }

int fd_info(fd_device*, fd_info_t* info) {
  std::snprintf(info->name, sizeof info->name, "%d threads on %s", fd::num_threads(), fd::kernels().name);
  std::snprintf(info->numeric_version, sizeof info->numeric_version, "cpu-%d-%.8s", fd::kNumericVersion,
                fd::kernels().name);
  info->layout_version = fd::kLayoutVersion;
  info->multiprocessors = fd::num_threads();
  info->bytes_free = fd::free_memory();
  info->bytes_total = fd::total_memory();
  info->value_bytes = sizeof(float);
  info->biases_in_matrices = 1;
  return FD_OK;
}

void* fd_stream(fd_device* device) { return device; }
void* fd_side_stream(fd_device* device) { return device; }
// Work is done in the order in which it is enqueued, which is one of those that a second stream permits.
int fd_fork(fd_device*) { return FD_OK; }
int fd_join(fd_device*) { return FD_OK; }

int fd_fetch(fd_device* device, void* to, uint64_t from, int64_t bytes) {
  if (!device->fault.empty()) return fail(FD_BROKEN, device->fault);
  std::memcpy(to, reinterpret_cast<const void*>(from), static_cast<size_t>(bytes));
  return FD_OK;
}

int fd_arena(fd_device* device, int32_t kind, int64_t bytes, fd_buffer* buffer) {
  if (kind < FD_WEIGHTS || kind > FD_EXCHANGE) return fail(FD_BAD_ARGUMENT, "arena: unknown kind");
  const std::string name = fd::kArenaNames[kind];
  fd::Pages& arena = device->arenas[kind];
  if (arena.bytes() != 0) return fail(FD_BAD_ARGUMENT, "the arena for " + name + " is there already");
  if (bytes < 1) return fail(FD_BAD_ARGUMENT, "the arena for " + name + " needs at least one byte");
  // Linux promises more than it has, and kills the process that writes it.
  const int64_t free = fd::free_memory();
  if (bytes > free || !arena.allocate(bytes)) {
    return fail(FD_NO_MEMORY, "the arena for " + name + " needs " + fd::gigabytes(bytes) + " of memory; " +
                                  fd::gigabytes(free) + " of " + fd::gigabytes(fd::total_memory()) + " are free");
  }
  *buffer = {reinterpret_cast<uint64_t>(arena.data()), bytes};
  return FD_OK;
}

int fd_steps(fd_device* device, int64_t plan_bytes, int64_t result_bytes, fd_buffer* plan, fd_buffer* results) {
  if (device->plan.bytes() != 0) return fail(FD_BAD_ARGUMENT, "the slots for steps are there already");
  if (plan_bytes < 1 || result_bytes < 1) return fail(FD_BAD_ARGUMENT, "a step's plan and results need bytes");
  bool is_there = device->plan.allocate(plan_bytes) && device->results.allocate(result_bytes);
  for (fd_device::Slot& slot : device->slots) is_there = is_there && slot.results.allocate(result_bytes);
  if (!is_there) return fail(FD_NO_MEMORY, "memory for a step's plan and results: out of memory");
  *plan = {reinterpret_cast<uint64_t>(device->plan.data()), plan_bytes};
  *results = {reinterpret_cast<uint64_t>(device->results.data()), result_bytes};
  return FD_OK;
}

int fd_step_begin(fd_device* device, const void* plan, int64_t bytes, uint64_t* ticket) {
  if (!device->fault.empty()) return fail(FD_BROKEN, device->fault);
  if (bytes < 0 || bytes > device->plan.bytes()) {
    return fail(FD_BAD_ARGUMENT, "a plan of " + std::to_string(bytes) + " bytes; a slot has " +
                                     std::to_string(device->plan.bytes()));
  }
  fd_device::Slot& slot = device->slot_of(device->next_ticket);
  if (slot.is_taken) return fail(FD_BAD_ARGUMENT, "two steps are in progress already");
  std::memcpy(device->plan.data(), plan, static_cast<size_t>(bytes));
  slot.is_taken = true, slot.has_ended = false;
  *ticket = device->next_ticket++;
  return FD_OK;
}

int fd_step_end(fd_device* device, uint64_t ticket) {
  if (!device->is_in_progress(ticket)) return fail(FD_BAD_ARGUMENT, "no step of this ticket is in progress");
  if (!device->fault.empty()) return fail(FD_BROKEN, device->fault);
  fd_device::Slot& slot = device->slot_of(ticket);
  std::memcpy(slot.results.data(), device->results.data(), static_cast<size_t>(device->results.bytes()));
  slot.has_ended = true;
  return FD_OK;
}

int fd_step_wait(fd_device* device, uint64_t ticket, const void** results) {
  if (!device->is_in_progress(ticket)) return fail(FD_BAD_ARGUMENT, "no step of this ticket is in progress");
  fd_device::Slot& slot = device->slot_of(ticket);
  if (!device->fault.empty()) return fail(FD_BROKEN, device->fault);
  if (!slot.has_ended) return fail(FD_BAD_ARGUMENT, "the step of this ticket has not ended");
  slot.is_taken = false;
  *results = slot.results.data();
  return FD_OK;
}

int fd_graph(fd_device* device, int32_t verb, uint64_t key) {
  switch (verb) {
    case FD_BEGIN_CAPTURE:
      if (device->is_capturing) return fail(FD_BAD_ARGUMENT, "a graph is being captured already");
      device->is_capturing = true, device->captured_key = key;
      return FD_OK;
    case FD_END_CAPTURE:
      if (!device->is_capturing) return fail(FD_BAD_ARGUMENT, "no graph is being captured");
      device->is_capturing = false;
      device->graphs[device->captured_key] = std::exchange(device->captured, {});
      return FD_OK;
    case FD_LAUNCH: {
      const auto found = device->graphs.find(key);
      if (found == device->graphs.end()) return fail(FD_NO_GRAPH, "no graph of this key has been captured");
      return device->launch(found->second);
    }
    case FD_FORGET_ALL: device->graphs.clear(); return FD_OK;
    default: return fail(FD_BAD_ARGUMENT, "graph: unknown verb");
  }
}

}  // extern "C"
