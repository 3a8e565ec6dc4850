#include "expert_groups.h"

#include <map>
#include <memory>

#include "ep_exchange.h"

namespace fd {
namespace {

std::map<int64_t, std::unique_ptr<ExpertGroup>>& groups() {
  static std::map<int64_t, std::unique_ptr<ExpertGroup>> open;
  return open;
}

}  // namespace

ExpertGroup* find_expert_group(int64_t handle) {
  const auto found = groups().find(handle);
  return found == groups().end() ? nullptr : found->second.get();
}

}  // namespace fd

// Functions that are not tensor operations; custom_ops/expert_group.py calls them through ctypes, from one thread.
extern "C" {

int64_t fd_ep_open(const fd::GroupShape* shape, void* memory, int file, fd::ExpertGroup::OnStall on_stall,
                   int64_t stall_after_ns, int64_t stall_kill_ns) {
  static int64_t last = 0;
  fd::groups()[++last] =
      std::make_unique<fd::ExpertGroup>(*shape, memory, file, on_stall, stall_after_ns, stall_kill_ns);
  return last;
}

void fd_ep_close(int64_t handle) { fd::groups().erase(handle); }

void fd_ep_set_members(int64_t handle, uint64_t epoch, uint64_t active, const uint64_t* expert_ranks, const int* pidfds,
                       int64_t spin_ns) {
  fd::find_expert_group(handle)->set_members(epoch, active, expert_ranks, pidfds, spin_ns);
}

int fd_ep_arrive(int64_t handle) { return fd::find_expert_group(handle)->arrive(); }
void fd_ep_announce(int64_t handle, int tokens) { fd::find_expert_group(handle)->announce(tokens); }
int fd_ep_begin(int64_t handle) { return fd::find_expert_group(handle)->begin(); }
int fd_ep_busy(int64_t handle) { return fd::find_expert_group(handle)->busy(); }
int fd_ep_status(int64_t handle) { return fd::find_expert_group(handle)->status(); }
uint64_t fd_ep_lost(int64_t handle) { return fd::find_expert_group(handle)->lost(); }
int64_t fd_ep_missing_bytes(int64_t handle) { return fd::find_expert_group(handle)->missing_bytes(); }
int fd_ep_faulty(int64_t handle) { return fd::find_expert_group(handle)->faulty(); }
const char* fd_ep_fault(int64_t handle) { return fd::find_expert_group(handle)->fault(); }
void fd_ep_ring(int64_t handle) { fd::find_expert_group(handle)->wake_waiters(); }
const fd::ExpertGroup::Counters* fd_ep_counters(int64_t handle) { return &fd::find_expert_group(handle)->counters(); }

// A complete dispatch and a complete combine without Paddle, for benchmarks. `rows` must have room for the largest
// possible number of rows. Return the number of rows, or -1 if the group was interrupted.
int fd_ep_dispatch(int64_t handle, int layer, const void* x, const int32_t* topk_ids, int tokens, int element,
                   void* rows) {
  fd::ExpertGroup& group = *fd::find_expert_group(handle);
  fd::Received received;
  if (!fd::ep_dispatch_send(group, layer, x, topk_ids, tokens, element) ||
      !fd::ep_dispatch_receive(group, layer, element, fd::Workspace::fresh(), received)) {
    return -1;
  }
  fd::ep_gather(group, received, element, rows);
  return received.rows;
}

int fd_ep_combine(int64_t handle, const void* rows, int count, const float* topk_weights, int tokens, int element,
                  float* out) {
  fd::ExpertGroup& group = *fd::find_expert_group(handle);
  const bool whole = fd::ep_combine_send(group, rows, count, element) &&
                     fd::ep_combine_receive(group, topk_weights, tokens, element, out);
  return whole ? count : -1;
}

void* fd_ep_result_rows(int64_t handle, int rows, int element) {
  return fd::find_expert_group(handle)->result_rows(rows, element);
}

void fd_ep_trap(int64_t handle, int phase, int layer, int nth, int signal) {
  fd::find_expert_group(handle)->trap(static_cast<fd::Phase>(phase), layer, nth, signal);
}

}
