// A device: its memory, its stream, captured graphs, and two slots for steps in progress.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "../include/fd_device.h"
#include "status.h"
#include "upload.h"

using fd::cuda::fail;
using fd::cuda::status_of;

namespace {

constexpr int kSlots = 2;
constexpr int kLayoutVersion = 1;
constexpr const char* kNumericVersion = "sm90-2";
constexpr const char* kArenaNames[] = {"weights", "cache", "work", "exchange"};

std::string gigabytes(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f GB", static_cast<double>(bytes) / 1e9);
  return text;
}

}  // namespace

struct fd_device {
  int ordinal;
  cudaStream_t stream = nullptr;
  // Runs beside `stream` between fd_fork() and fd_join().
  cudaStream_t side = nullptr;
  cudaEvent_t forked = nullptr, joined = nullptr;
  std::unique_ptr<fd::cuda::Uploader> uploader;  // until the weights are complete
  fd_buffer arenas[4] = {};
  std::map<uint64_t, cudaGraphExec_t> graphs;
  uint64_t captured_key = 0;
  bool is_capturing = false;

  // Pinned host memory for the plan and the results of a step.
  struct Slot {
    void* plan = nullptr;
    void* results = nullptr;
    cudaEvent_t done = nullptr;
    bool is_taken = false;
  };
  Slot slots[kSlots];
  uint64_t next_ticket = 0;
  int64_t plan_bytes = 0, result_bytes = 0;
  void* plan = nullptr;  // in device memory, shared by all graphs
  void* results = nullptr;

  // Errors are ignored: a broken context frees its memory anyway.
  ~fd_device() {
    cudaSetDevice(ordinal);
    uploader.reset();
    for (cudaEvent_t event : {forked, joined}) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    if (side != nullptr) cudaStreamDestroy(side);
    for (auto& [key, graph] : graphs) cudaGraphExecDestroy(graph);
    for (Slot& slot : slots) {
      cudaFreeHost(slot.plan), cudaFreeHost(slot.results);
      if (slot.done != nullptr) cudaEventDestroy(slot.done);
    }
    cudaFree(plan), cudaFree(results);
    for (const fd_buffer& arena : arenas) cudaFree(reinterpret_cast<void*>(arena.address));
    if (stream != nullptr) cudaStreamDestroy(stream);
  }

  Slot& slot_of(uint64_t ticket) { return slots[ticket % kSlots]; }
  bool is_under_way(uint64_t ticket) {
    return ticket < next_ticket && next_ticket - ticket <= kSlots && slot_of(ticket).is_taken;
  }
};

extern "C" {

int fd_open(const fd_open_args* args, fd_device** opened) {
  *opened = nullptr;
  if (args->type != FD_BFLOAT16) return fail(FD_BAD_ARGUMENT, "GPUs compute in bfloat16 only");
  if (args->block_size != 64) return fail(FD_BAD_ARGUMENT, "on GPUs a block of the cache has 64 tokens");
  const int ordinal = args->ordinal;
  cudaDeviceProp properties;
  int result = status_of("opening GPU " + std::to_string(ordinal), cudaGetDeviceProperties(&properties, ordinal));
  if (result != FD_OK) return result;
  if (properties.major != 9 || properties.minor != 0) {
    return fail(FD_BAD_ARGUMENT, std::string(properties.name) + " has compute capability " +
                                     std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                                     "; the kernels need 9.0 (H100, H200, H20)");
  }
  auto device = std::make_unique<fd_device>();
  device->ordinal = ordinal;
  result = status_of("selecting the GPU", cudaSetDevice(ordinal));
  if (result == FD_OK) {
    result = status_of("making a stream", cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking));
  }
  if (result == FD_OK) {
    result = status_of("making a stream", cudaStreamCreateWithFlags(&device->side, cudaStreamNonBlocking));
  }
  for (cudaEvent_t* event : {&device->forked, &device->joined}) {
    if (result == FD_OK) result = status_of("an event", cudaEventCreateWithFlags(event, cudaEventDisableTiming));
  }
  if (result == FD_OK) result = fd_prepare();
  if (result == FD_OK) *opened = device.release();
  return result;
}

void fd_close(fd_device* device) { delete device; }

void* fd_stream(fd_device* device) { return device->stream; }
void* fd_side_stream(fd_device* device) { return device->side; }

int fd_fork(fd_device* device) {
  const int result = status_of("a fork", cudaEventRecord(device->forked, device->stream));
  return result == FD_OK ? status_of("a fork", cudaStreamWaitEvent(device->side, device->forked)) : result;
}

int fd_join(fd_device* device) {
  const int result = status_of("a join", cudaEventRecord(device->joined, device->side));
  return result == FD_OK ? status_of("a join", cudaStreamWaitEvent(device->stream, device->joined)) : result;
}

int fd_upload_begin(fd_device* device) {
  if (device->uploader != nullptr) return fail(FD_BAD_ARGUMENT, "an upload is under way already");
  auto uploader = std::make_unique<fd::cuda::Uploader>(device->stream);
  const int result = uploader->open();
  if (result == FD_OK) device->uploader = std::move(uploader);
  return result;
}

int fd_upload(fd_device* device, const fd_retile_args* args, int32_t tag) {
  if (device->uploader == nullptr) return fail(FD_BAD_ARGUMENT, "no upload is under way");
  if (args->turn == FD_ROUTER) {
    if (args->source_type != FD_FLOAT32 || args->column_stride != 1 || args->row_stride != args->inputs) {
      return fail(FD_BAD_ARGUMENT, "upload: the rows of a router must be float32 and adjacent");
    }
    const int64_t row_bytes = int64_t{args->inputs} * 4;
    uint8_t* const to = static_cast<uint8_t*>(args->matrix) + args->first_row * row_bytes;
    return device->uploader->copy(to, args->source, args->rows * row_bytes);
  }
  fd::cuda::Retile part;
  const int result = fd::cuda::checked(*args, &part);
  return result == FD_OK ? device->uploader->matrix(part, tag) : result;
}

int fd_upload_bytes(fd_device* device, uint64_t to, const void* from, int64_t bytes) {
  if (device->uploader == nullptr) return fail(FD_BAD_ARGUMENT, "no upload is under way");
  return device->uploader->copy(reinterpret_cast<void*>(to), from, bytes);
}

int fd_upload_finish(fd_device* device, int32_t* bad_tag) {
  if (device->uploader == nullptr) return fail(FD_BAD_ARGUMENT, "no upload is under way");
  const int result = device->uploader->finish(bad_tag);
  device->uploader.reset();
  return result;
}

int fd_fetch(fd_device* device, void* to, uint64_t from, int64_t bytes) {
  const int result = status_of("fetching", cudaMemcpyAsync(to, reinterpret_cast<void*>(from), static_cast<size_t>(bytes),
                                                          cudaMemcpyDeviceToHost, device->stream));
  return result == FD_OK ? status_of("fetching", cudaStreamSynchronize(device->stream)) : result;
}

int fd_info(fd_device* device, fd_info_t* info) {
  cudaDeviceProp properties;
  size_t free = 0, total = 0;
  int result = status_of("asking for the GPU's properties", cudaGetDeviceProperties(&properties, device->ordinal));
  if (result == FD_OK) result = status_of("asking for the GPU's memory", cudaMemGetInfo(&free, &total));
  if (result != FD_OK) return result;
  std::snprintf(info->name, sizeof info->name, "%.63s", properties.name);
  std::snprintf(info->numeric_version, sizeof info->numeric_version, "%s", kNumericVersion);
  info->layout_version = kLayoutVersion;
  info->multiprocessors = properties.multiProcessorCount;
  info->bytes_free = static_cast<int64_t>(free);
  info->bytes_total = static_cast<int64_t>(total);
  info->value_bytes = 2;
  info->biases_in_matrices = 0;
  return FD_OK;
}

int fd_arena(fd_device* device, int32_t kind, int64_t bytes, fd_buffer* buffer) {
  if (kind < FD_WEIGHTS || kind > FD_EXCHANGE) return fail(FD_BAD_ARGUMENT, "arena: unknown kind");
  const std::string name = kArenaNames[kind];
  fd_buffer& arena = device->arenas[kind];
  if (arena.bytes != 0) return fail(FD_BAD_ARGUMENT, "the arena for " + name + " is there already");
  if (bytes < 1) return fail(FD_BAD_ARGUMENT, "the arena for " + name + " needs at least one byte");
  size_t free = 0, total = 0;
  void* memory = nullptr;
  int result = status_of("asking for the GPU's memory", cudaMemGetInfo(&free, &total));
  if (result != FD_OK) return result;
  const cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return fail(FD_NO_MEMORY, "the arena for " + name + " needs " + gigabytes(static_cast<size_t>(bytes)) +
                                  " of GPU memory; " + gigabytes(free) + " of " + gigabytes(total) + " are free");
  }
  result = status_of("the arena for " + name, error);
  if (result == FD_OK) result = status_of("clearing the arena for " + name, cudaMemsetAsync(memory, 0, bytes, device->stream));
  if (result == FD_OK) result = status_of("clearing the arena for " + name, cudaStreamSynchronize(device->stream));
  if (result == FD_OK) {
    arena = {reinterpret_cast<uint64_t>(memory), bytes};
    *buffer = arena;
  } else {
    cudaFree(memory);
  }
  return result;
}

int fd_steps(fd_device* device, int64_t plan_bytes, int64_t result_bytes, fd_buffer* plan, fd_buffer* results) {
  if (device->plan != nullptr) return fail(FD_BAD_ARGUMENT, "the slots for steps are there already");
  if (plan_bytes < 1 || result_bytes < 1) return fail(FD_BAD_ARGUMENT, "a step's plan and results need bytes");
  int result = status_of("memory for a step's plan", cudaMalloc(&device->plan, plan_bytes));
  if (result == FD_OK) result = status_of("memory for a step's results", cudaMalloc(&device->results, result_bytes));
  for (fd_device::Slot& slot : device->slots) {
    if (result == FD_OK) result = status_of("pinned memory for a step", cudaMallocHost(&slot.plan, plan_bytes));
    if (result == FD_OK) result = status_of("pinned memory for a step", cudaMallocHost(&slot.results, result_bytes));
    if (result == FD_OK) {
      result = status_of("an event", cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming));
    }
  }
  if (result != FD_OK) return result;
  device->plan_bytes = plan_bytes, device->result_bytes = result_bytes;
  *plan = {reinterpret_cast<uint64_t>(device->plan), plan_bytes};
  *results = {reinterpret_cast<uint64_t>(device->results), result_bytes};
  return FD_OK;
}

int fd_step_begin(fd_device* device, const void* plan, int64_t bytes, uint64_t* ticket) {
  if (bytes < 0 || bytes > device->plan_bytes) {
    return fail(FD_BAD_ARGUMENT, "a plan of " + std::to_string(bytes) + " bytes; a slot has " +
                                     std::to_string(device->plan_bytes));
  }
  fd_device::Slot& slot = device->slot_of(device->next_ticket);
  if (slot.is_taken) return fail(FD_BAD_ARGUMENT, "two steps are under way already");
  std::memcpy(slot.plan, plan, static_cast<size_t>(bytes));
  const int result = status_of("sending a plan", cudaMemcpyAsync(device->plan, slot.plan, bytes, cudaMemcpyHostToDevice,
                                                                 device->stream));
  if (result != FD_OK) return result;
  slot.is_taken = true;
  *ticket = device->next_ticket++;
  return FD_OK;
}

int fd_graph(fd_device* device, int32_t verb, uint64_t key) {
  switch (verb) {
    case FD_BEGIN_CAPTURE: {
      if (device->is_capturing) return fail(FD_BAD_ARGUMENT, "a graph is being captured already");
      const int result = status_of("beginning a capture",
                                   cudaStreamBeginCapture(device->stream, cudaStreamCaptureModeThreadLocal));
      device->is_capturing = result == FD_OK, device->captured_key = key;
      return result;
    }
    case FD_END_CAPTURE: {
      if (!device->is_capturing) return fail(FD_BAD_ARGUMENT, "no graph is being captured");
      device->is_capturing = false;
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t executable = nullptr;
      int result = status_of("ending a capture", cudaStreamEndCapture(device->stream, &graph));
      if (result != FD_OK) return result;
      result = status_of("instantiating a graph", cudaGraphInstantiate(&executable, graph, 0));
      cudaGraphDestroy(graph);
      if (result == FD_OK) result = status_of("uploading a graph", cudaGraphUpload(executable, device->stream));
      if (result != FD_OK) return result;
      const auto before = device->graphs.find(device->captured_key);
      if (before != device->graphs.end()) cudaGraphExecDestroy(before->second);
      device->graphs[device->captured_key] = executable;
      return FD_OK;
    }
    case FD_LAUNCH: {
      const auto found = device->graphs.find(key);
      if (found == device->graphs.end()) return fail(FD_NO_GRAPH, "no graph of this key has been captured");
      return status_of("launching a graph", cudaGraphLaunch(found->second, device->stream));
    }
    case FD_FORGET_ALL:
      for (auto& [each, graph] : device->graphs) cudaGraphExecDestroy(graph);
      device->graphs.clear();
      return FD_OK;
    default: return fail(FD_BAD_ARGUMENT, "graph: unknown verb");
  }
}

int fd_step_end(fd_device* device, uint64_t ticket) {
  if (!device->is_under_way(ticket)) return fail(FD_BAD_ARGUMENT, "no step of this ticket is under way");
  fd_device::Slot& slot = device->slot_of(ticket);
  const int result = status_of("fetching results", cudaMemcpyAsync(slot.results, device->results, device->result_bytes,
                                                                   cudaMemcpyDeviceToHost, device->stream));
  return result == FD_OK ? status_of("recording an event", cudaEventRecord(slot.done, device->stream)) : result;
}

int fd_step_wait(fd_device* device, uint64_t ticket, const void** results) {
  if (!device->is_under_way(ticket)) return fail(FD_BAD_ARGUMENT, "no step of this ticket is under way");
  fd_device::Slot& slot = device->slot_of(ticket);
  // A step takes milliseconds, so polling costs less than a wake-up.
  cudaError_t error;
  while ((error = cudaEventQuery(slot.done)) == cudaErrorNotReady) {
  }
  slot.is_taken = false;
  *results = slot.results;
  return status_of("a step", error);
}

}  // extern "C"
