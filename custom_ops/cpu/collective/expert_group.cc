#include "expert_group.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <stdexcept>

#include "runtime/waiting.h"

namespace fd {
namespace {

// Interval at which a sleeping rank checks whether the ranks it waits for are alive; a death does not wake it.
constexpr int64_t kPollNanoseconds = 2'000'000;
// Granularity of memory allocation.
constexpr int64_t kGrowth = 64 << 10;
constexpr int kRankBits = 6;
constexpr const char* kStampFault = "its step number";
// The words of a row that carry (epoch, number) or an epoch; the other ranks wait for them.
constexpr std::atomic<uint64_t> RankRow::*kStamps[] = {&RankRow::arrived, &RankRow::begun, &RankRow::dispatched,
                                                        &RankRow::combined};

uint64_t bit(int rank) { return uint64_t{1} << rank; }

template <class F>
void for_each_rank(uint64_t ranks, F&& f) {
  for (; ranks != 0; ranks &= ranks - 1) f(__builtin_ctzll(ranks));
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value, int64_t nanoseconds) {
  const timespec timeout{nanoseconds / 1'000'000'000, nanoseconds % 1'000'000'000};
  // Not private: the word is shared by processes.
  syscall(SYS_futex, &word, FUTEX_WAIT, value, &timeout, nullptr, 0);
}

}  // namespace

ExpertGroup::ExpertGroup(const GroupShape& shape, void* memory, int file, OnStall on_stall, int64_t stall_after_ns,
                         int64_t stall_kill_ns)
    : shape_(shape),
      rank_(static_cast<int>(shape.rank)),
      memory_(static_cast<uint8_t*>(memory)),
      file_(file),
      on_stall_(on_stall),
      stall_after_ns_(stall_after_ns),
      stall_kill_ns_(stall_kill_ns) {}

void ExpertGroup::set_members(uint64_t epoch, uint64_t active, const uint64_t* expert_ranks, const int* pidfds,
                              int64_t spin_ns) {
  epoch_ = epoch;
  active_ = active;
  expert_ranks_ = expert_ranks;
  pidfds_ = pidfds;
  spin_ns_ = spin_ns;
  step_ = collective_ = 0;
  sent_tokens_ = received_rows_ = 0;
  lost_ = reported_ = killed_ = 0;
  faulty_ = -1;
  fault_ = "";
  status_ = kGoing;
  for (int i = 0; i < kNumStamps; ++i) published_[i] = (row(rank_).*kStamps[i]).load(std::memory_order_relaxed);
}

ExpertGroup::Status ExpertGroup::arrive() {
  set_phase(Phase::kArrive, 0);
  publish(&RankRow::arrived, epoch_);
  wait(&RankRow::arrived, epoch_);
  set_phase(Phase::kIdle, 0);
  return status_;
}

void ExpertGroup::announce(int tokens) {
  if (tokens > kMaxStepTokens) throw std::invalid_argument("expert group: more tokens than a step may have");
  set_phase(Phase::kBegin, 0);
  ++step_;
  row(rank_).step_tokens[step_ % 2].store(tokens, std::memory_order_relaxed);
  publish(&RankRow::begun, stamp(step_));
}

ExpertGroup::Status ExpertGroup::begin() {
  uint64_t most = 0;
  if (wait(&RankRow::begun, stamp(step_)) == kGoing) {
    for_each_rank(active_, [&](int rank) {
      const uint64_t tokens = row(rank).step_tokens[step_ % 2].load(std::memory_order_relaxed);
      if (tokens > kMaxStepTokens) record_fault(rank, "the token count of its step");
      most = std::max(most, tokens);
    });
    if (faulty() >= 0) {
      status_ = kFaulty;
      most = 0;
    }
    row(rank_).steps.fetch_add(most > 0, std::memory_order_relaxed);
  }
  rounds_ = static_cast<int>((most + shape_.max_tokens - 1) / shape_.max_tokens);
  set_phase(busy() ? Phase::kCompute : Phase::kIdle, 0);
  return status_;
}

void* ExpertGroup::token_rows(int tokens, int element) {
  if (tokens > shape_.max_tokens) throw std::invalid_argument("expert group: more tokens than it was made for");
  return ensure_capacity(shape_.tokens, int64_t{tokens} * shape_.hidden * element, shape_.results - shape_.tokens,
                         token_bytes_);
}

void ExpertGroup::route(int layer, const int32_t* topk_ids, int tokens) {
  int32_t* const dispatch_targets = part<int32_t>(rank_, shape_.dispatch_targets);
  const uint64_t* const expert_ranks = expert_ranks_ + layer * shape_.num_experts;
  const int64_t count = tokens * shape_.k;
  uint64_t remote = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t expert = topk_ids[i];
    if (expert < 0) {
      dispatch_targets[i] = -1;
      continue;
    }
    uint64_t ranks = expert_ranks[expert];
    int rank = rank_;
    if ((ranks & bit(rank_)) == 0) {
      // Spread the assignments over the replicas of the expert.
      for (int turn = static_cast<int>((i / shape_.k + rank_) % __builtin_popcountll(ranks)); turn > 0; --turn) {
        ranks &= ranks - 1;
      }
      rank = __builtin_ctzll(ranks);
      ++remote;
    }
    dispatch_targets[i] = expert << kRankBits | rank;
  }
  remote_assignments_ = remote;
}

void ExpertGroup::publish_tokens(int tokens, int element) {
  ++collective_;
  ++counters_.collectives;
  const uint64_t bytes = (tokens == 0 ? 0 : remote_assignments_) * shape_.hidden * element;
  counters_.bytes_dispatched += bytes;
  counters_.bytes_combined += bytes;
  sent_tokens_ = tokens;
  sent_element_ = element;
  row(rank_).tokens.store(static_cast<uint64_t>(tokens) << 8 | element, std::memory_order_relaxed);
  publish(&RankRow::dispatched, stamp(collective_));
}

bool ExpertGroup::await_tokens() { return wait(&RankRow::dispatched, stamp(collective_)) == kGoing; }

bool ExpertGroup::receive(Workspace& workspace, int layer, int element, Received& received) {
  // An error of the caller, not of another rank.
  if (element != sent_element_) throw std::invalid_argument("expert group: elements of another size than were sent");
  const int64_t num_experts = shape_.num_experts, k = shape_.k;
  int64_t counts[kMaxRanks], total = 0;
  for_each_rank(active_, [&](int rank) {
    const uint64_t word = row(rank).tokens.load(std::memory_order_relaxed);
    if ((word & 0xff) != static_cast<uint64_t>(element)) record_fault(rank, "the element size of its tokens");
    if (word >> 8 > static_cast<uint64_t>(shape_.max_tokens)) record_fault(rank, "its token count");
    counts[rank] = static_cast<int64_t>(word >> 8) * k;
    total += counts[rank];
  });
  if (faulty() >= 0) {
    status_ = kFaulty;
    return false;
  }
  // Counting sort, as in moe_permute.cc, of a copy that other processes cannot change meanwhile.
  struct Mine {
    int32_t topk_index, expert;
  };
  Mine* const mine = workspace.take<Mine>(total);
  int64_t ends[kMaxRanks], found = 0;
  received.offsets = workspace.take<int32_t>(num_experts + 1);
  std::fill_n(received.offsets, num_experts + 1, 0);
  for_each_rank(active_, [&](int rank) {
    const int32_t* const dispatch_targets = part<int32_t>(rank, shape_.dispatch_targets);
    for (int64_t i = 0; i < counts[rank]; ++i) {
      const int32_t target = __atomic_load_n(dispatch_targets + i, __ATOMIC_RELAXED);
      if (target < 0 || (target & (kMaxRanks - 1)) != rank_) continue;
      const int32_t expert = target >> kRankBits;
      if (expert >= num_experts) {
        record_fault(rank, "the target expert of a token");
        break;
      }
      ++received.offsets[expert + 1];
      mine[found++] = {static_cast<int32_t>(i), expert};
    }
    ends[rank] = found;
  });
  if (faulty() >= 0) {
    status_ = kFaulty;
    return false;
  }
  uint64_t* const expert_token_counts = part<uint64_t>(rank_, shape_.expert_token_counts) + layer * num_experts;
  int32_t begin = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int32_t count = received.offsets[expert + 1];
    expert_token_counts[expert] += count;
    received.offsets[expert + 1] = begin;
    begin += count;
  }
  received.rows = received_rows_ = begin;
  received.sources = workspace.take<const void*>(begin);
  received.source_token_index = workspace.take<int32_t>(int64_t{begin} * 3);
  int32_t* const return_slots = part<int32_t>(rank_, shape_.return_slots);
  int64_t next = 0;
  for_each_rank(active_, [&](int rank) {
    for (; next < ends[rank]; ++next) {
      const int64_t i = mine[next].topk_index;
      const int32_t row = received.offsets[mine[next].expert + 1]++;
      const int64_t token = i / k;
      received.sources[row] = part<uint8_t>(rank, shape_.tokens) + token * shape_.hidden * element;
      received.source_token_index[row * 3] = rank;
      received.source_token_index[row * 3 + 1] = static_cast<int32_t>(token);
      received.source_token_index[row * 3 + 2] = static_cast<int32_t>(i % k);
      return_slots[rank * shape_.max_tokens * k + i] = row;
    }
  });
  return true;
}

void* ExpertGroup::result_rows(int rows, int element) {
  return ensure_capacity(shape_.results, int64_t{rows} * shape_.hidden * element, shape_.rank_bytes - shape_.results,
                         result_bytes_);
}

void ExpertGroup::publish_results() { publish(&RankRow::combined, stamp(collective_)); }

bool ExpertGroup::await_results() { return wait(&RankRow::combined, stamp(collective_)) == kGoing; }

const void* ExpertGroup::result(int token, int topk_index, int element) const {
  const int64_t i = token * shape_.k + topk_index, most = shape_.num_ranks * shape_.max_tokens * shape_.k;
  const int32_t target = __atomic_load_n(dispatch_targets() + i, __ATOMIC_RELAXED);
  if (target < 0) return nullptr;
  const int rank = target & (kMaxRanks - 1);
  int64_t slot = 0;
  if ((active_ & bit(rank)) == 0) {
    record_fault(rank_, "the target rank of a token");
  } else {
    slot = __atomic_load_n(part<int32_t>(rank, shape_.return_slots) + rank_ * shape_.max_tokens * shape_.k + i,
                           __ATOMIC_RELAXED);
    if (0 <= slot && slot < most) return part<uint8_t>(rank, shape_.results) + slot * shape_.hidden * element;
    record_fault(rank, "the return slot of a result");
  }
  // Always readable: this rank has written at least one token.
  return part<uint8_t>(rank_, shape_.tokens);
}

bool ExpertGroup::results_are_whole() {
  if (faulty() < 0) return true;
  status_ = kFaulty;
  return false;
}

void ExpertGroup::record_fault(int rank, const char* fault) const {
  int none = -1;
  if (faulty_.compare_exchange_strong(none, rank)) fault_ = fault;
}

void ExpertGroup::set_phase(Phase phase, int layer) {
  RankRow& mine = row(rank_);
  mine.phase.store(static_cast<uint64_t>(phase), std::memory_order_relaxed);
  mine.layer.store(layer, std::memory_order_relaxed);
  mine.since_ns.store(now(), std::memory_order_relaxed);
  if (trap_left_ > 0 && phase == trap_phase_ && layer == trap_layer_ && --trap_left_ == 0) raise(trap_signal_);
}

void ExpertGroup::trap(Phase phase, int layer, int nth, int signal) {
  trap_phase_ = phase;
  trap_layer_ = layer;
  trap_left_ = nth;
  trap_signal_ = signal;
}

void ExpertGroup::wake_waiters() {
  wake_waiters(words().bell);
  wake_waiters(words().results_bell);
}

void ExpertGroup::wake_waiters(std::atomic<uint32_t>& bell) {
  bell.fetch_add(1, std::memory_order_seq_cst);
  if (words().sleepers.load(std::memory_order_seq_cst) != 0) {
    syscall(SYS_futex, &bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

std::atomic<uint32_t>& ExpertGroup::bell_of(Word word) const {
  return word == &RankRow::combined ? words().results_bell : words().bell;
}

// The last rank to publish wakes the others, which could not proceed before. Each rank checks all others after its own
// store, so at least one of the last two sees that all have published.
void ExpertGroup::publish(Word word, uint64_t value) {
  if (status_ != kGoing) return;
  if (!own_stamps_are_intact()) {
    // After a change of members the old stamps do not matter any more.
    if (words().epoch.load(std::memory_order_seq_cst) == epoch_) record_fault(rank_, kStampFault);
    status_ = faulty() >= 0 ? kFaulty : kChanged;
    return;
  }
  for (int i = 0; i < kNumStamps; ++i) {
    if (word == kStamps[i]) published_[i] = value;
  }
  (row(rank_).*word).store(value, std::memory_order_seq_cst);
  if (lagging_ranks(word, value, active_) == 0) wake_waiters(bell_of(word));
}

uint64_t ExpertGroup::lagging_ranks(Word word, uint64_t value, uint64_t ranks) const {
  uint64_t missing = 0;
  for_each_rank(ranks, [&](int rank) {
    const uint64_t theirs = (row(rank).*word).load(std::memory_order_seq_cst);
    // A rank may be one number ahead, but not two, because that step needs this rank. A later epoch counts as missing:
    // the others may have continued without this rank and may overwrite what it is about to read.
    if (theirs - value > (word == &RankRow::arrived ? 0 : 1)) missing |= bit(rank);
  });
  return missing;
}

// A damaged stamp of this rank misleads healthy ranks: they may run ahead of it or wait for it forever.
bool ExpertGroup::own_stamps_are_intact() const {
  for (int i = 0; i < kNumStamps; ++i) {
    if ((row(rank_).*kStamps[i]).load(std::memory_order_relaxed) != published_[i]) return false;
  }
  return true;
}

// Finds a number of this epoch that no rank can have reached. Accuses another rank only if this one has not misled it.
bool ExpertGroup::find_impossible(Word word, uint64_t value, uint64_t ranks) const {
  if (!own_stamps_are_intact()) {
    record_fault(rank_, kStampFault);
    return true;
  }
  if (word == &RankRow::arrived) return false;
  for_each_rank(ranks, [&](int rank) {
    const uint64_t theirs = (row(rank).*word).load(std::memory_order_relaxed);
    if (theirs >> 40 == epoch_ && theirs > value + 1) record_fault(rank, kStampFault);
  });
  return faulty() >= 0;
}

ExpertGroup::Status ExpertGroup::wait(Word word, uint64_t value) {
  if (status_ != kGoing) return status_;
  GroupWords& group = words();
  RankRow& mine = row(rank_);
  uint64_t missing = active_ & ~bit(rank_), last = 0;
  const int64_t began = now();
  int64_t checked = began;
  for (int spins = 0;; ++spins) {
    missing = lagging_ranks(word, value, missing);
    if (missing == 0) break;
    last = missing;
    // Check once more: if all have arrived by now, the step is complete despite the new epoch.
    if (group.epoch.load(std::memory_order_seq_cst) != epoch_) {
      if (lagging_ranks(word, value, missing) != 0) status_ = kChanged;
      break;
    }
    relax();
    // Reading the clock costs more than checking the ranks.
    if (spins % 16 != 0) continue;
    const int64_t time = now();
    if (time - began < spin_ns_) continue;
    if (time - checked >= kPollNanoseconds) {
      checked = time;
      if ((lost_ = dead(missing)) != 0) {
        status_ = kLost;
        break;
      }
      if (find_impossible(word, value, missing)) {
        status_ = kFaulty;
        break;
      }
      watch_stalls(missing, time - began);
    }
    mine.waiting_for.store(missing, std::memory_order_relaxed);
    group.sleepers.fetch_or(bit(rank_), std::memory_order_seq_cst);
    std::atomic<uint32_t>& bell = bell_of(word);
    const uint32_t heard = bell.load(std::memory_order_seq_cst);
    if (lagging_ranks(word, value, missing) != 0 && group.epoch.load(std::memory_order_seq_cst) == epoch_) {
      sleep_while(bell, heard, kPollNanoseconds);
    }
    group.sleepers.fetch_and(~bit(rank_), std::memory_order_seq_cst);
    spins = -1;
  }
  mine.waiting_for.store(0, std::memory_order_relaxed);
  if (last != 0) {
    const int64_t share = (now() - began) / __builtin_popcountll(last);
    for_each_rank(last, [&](int rank) { counters_.waited_ns[rank] += share; });
  }
  return status_;
}

uint64_t ExpertGroup::dead(uint64_t ranks) const {
  pollfd ends[kMaxRanks];
  int owners[kMaxRanks], count = 0;
  for_each_rank(ranks, [&](int rank) {
    ends[count] = {pidfds_[rank], POLLIN, 0};
    owners[count++] = rank;
  });
  uint64_t found = 0;
  if (poll(ends, count, 0) > 0) {
    for (int i = 0; i < count; ++i) {
      if (ends[i].revents != 0) found |= bit(owners[i]);
    }
  }
  return found;
}

// A rank is stalled if others wait for it and its phase does not change. SIGKILL turns that suspicion into a fact that
// all ranks learn from the kernel.
void ExpertGroup::watch_stalls(uint64_t missing, int64_t waited) {
  if (waited < stall_after_ns_) return;
  for_each_rank(missing, [&](int rank) {
    // A time in the future must not hide a stall.
    const uint64_t since = row(rank).since_ns.load(), time = now();
    const int64_t still = since > time ? waited : std::min(waited, static_cast<int64_t>(time - since));
    if (still >= stall_kill_ns_ && (killed_ & bit(rank)) == 0) {
      killed_ |= bit(rank);
      on_stall_(rank, still * 1e-9, 1);
      syscall(SYS_pidfd_send_signal, pidfds_[rank], SIGKILL, nullptr, 0);
    } else if (still >= stall_after_ns_ && (reported_ & bit(rank)) == 0) {
      reported_ |= bit(rank);
      on_stall_(rank, still * 1e-9, 0);
    }
  });
}

// The memory is a sparse file: writing to a page that the file system has no room for would raise SIGBUS.
void* ExpertGroup::ensure_capacity(int64_t offset, int64_t bytes, int64_t limit, int64_t& size) {
  if (bytes > limit) throw std::invalid_argument("expert group: more rows than it was made for");
  if (bytes > size) {
    const auto in_steps = [&](int64_t count) { return std::min(limit, (count + kGrowth - 1) / kGrowth * kGrowth); };
    const auto take = [&](int64_t wanted) {
      int failed = 0;
      do {
        failed = fallocate(file_, 0, shape_.first_rank_offset + rank_ * shape_.rank_bytes + offset, wanted);
      } while (failed != 0 && errno == EINTR);
      if (failed == 0) size = wanted;
      return failed == 0;
    };
    // If there is no room for twice as much, the current need may still fit.
    if (!take(in_steps(std::max(bytes, size * 2))) && !take(in_steps(bytes))) {
      status_ = kFull;
      missing_bytes_ = in_steps(bytes) - size;
      return nullptr;
    }
  }
  return part<uint8_t>(rank_, offset);
}

}  // namespace fd
