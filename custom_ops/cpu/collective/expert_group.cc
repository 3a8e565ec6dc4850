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

// A sleeper looks so often whether those that it waits for are alive: their death wakes nobody.
constexpr int64_t kLookNanoseconds = 2'000'000;
// Memory is taken from the system in steps of this.
constexpr int64_t kGrowth = 64 << 10;
constexpr int kSeatBits = 6;

uint64_t bit(int seat) { return uint64_t{1} << seat; }

template <class F>
void for_each_seat(uint64_t seats, F&& f) {
  for (; seats != 0; seats &= seats - 1) f(__builtin_ctzll(seats));
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
      seat_(static_cast<int>(shape.seat)),
      memory_(static_cast<uint8_t*>(memory)),
      file_(file),
      on_stall_(on_stall),
      stall_after_ns_(stall_after_ns),
      stall_kill_ns_(stall_kill_ns) {}

void ExpertGroup::set_members(uint64_t epoch, uint64_t active, const uint64_t* homes, const int* pidfds,
                              int64_t spin_ns) {
  epoch_ = epoch;
  active_ = active;
  homes_ = homes;
  pidfds_ = pidfds;
  spin_ns_ = spin_ns;
  step_ = collective_ = 0;
  sent_tokens_ = received_rows_ = 0;
  lost_ = reported_ = killed_ = 0;
  faulty_ = -1;
  fault_ = "";
  status_ = kGoing;
}

ExpertGroup::Status ExpertGroup::arrive() {
  note(Phase::kArrive, 0);
  publish(&SeatRow::arrived, epoch_);
  wait(&SeatRow::arrived, epoch_);
  note(Phase::kIdle, 0);
  return status_;
}

void ExpertGroup::announce(int tokens) {
  if (tokens > kMostStepTokens) throw std::invalid_argument("expert group: more tokens than a step may have");
  note(Phase::kBegin, 0);
  ++step_;
  row(seat_).step_tokens[step_ % 2].store(tokens, std::memory_order_relaxed);
  publish(&SeatRow::begun, stamp(step_));
}

ExpertGroup::Status ExpertGroup::begin() {
  uint64_t most = 0;
  if (wait(&SeatRow::begun, stamp(step_)) == kGoing) {
    for_each_seat(active_, [&](int seat) {
      const uint64_t tokens = row(seat).step_tokens[step_ % 2].load(std::memory_order_relaxed);
      if (tokens > kMostStepTokens) blame(seat, "the token count of its step");
      most = std::max(most, tokens);
    });
    if (faulty() >= 0) {
      status_ = kFaulty;
      most = 0;
    }
    row(seat_).steps.fetch_add(most > 0, std::memory_order_relaxed);
  }
  rounds_ = static_cast<int>((most + shape_.max_tokens - 1) / shape_.max_tokens);
  note(busy() ? Phase::kCompute : Phase::kIdle, 0);
  return status_;
}

void* ExpertGroup::token_rows(int tokens, int element) {
  if (tokens > shape_.max_tokens) throw std::invalid_argument("expert group: more tokens than it was made for");
  return grown(shape_.tokens, int64_t{tokens} * shape_.hidden * element, shape_.results - shape_.tokens, token_bytes_);
}

void ExpertGroup::address(int layer, const int32_t* picks, int tokens) {
  int32_t* const targets = part<int32_t>(seat_, shape_.targets);
  const uint64_t* const homes = homes_ + layer * shape_.num_experts;
  const int64_t count = tokens * shape_.k;
  uint64_t remote = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t expert = picks[i];
    if (expert < 0) {
      targets[i] = -1;
      continue;
    }
    uint64_t seats = homes[expert];
    int seat = seat_;
    if ((seats & bit(seat_)) == 0) {
      // Replicas take turns.
      for (int turn = static_cast<int>((i / shape_.k + seat_) % __builtin_popcountll(seats)); turn > 0; --turn) {
        seats &= seats - 1;
      }
      seat = __builtin_ctzll(seats);
      ++remote;
    }
    targets[i] = expert << kSeatBits | seat;
  }
  remote_picks_ = remote;
}

void ExpertGroup::publish_tokens(int tokens, int element) {
  ++collective_;
  ++counters_.collectives;
  const uint64_t bytes = (tokens == 0 ? 0 : remote_picks_) * shape_.hidden * element;
  counters_.bytes_dispatched += bytes;
  counters_.bytes_combined += bytes;
  sent_tokens_ = tokens;
  sent_element_ = element;
  row(seat_).tokens.store(static_cast<uint64_t>(tokens) << 8 | element, std::memory_order_relaxed);
  publish(&SeatRow::dispatched, stamp(collective_));
}

bool ExpertGroup::await_tokens() { return wait(&SeatRow::dispatched, stamp(collective_)) == kGoing; }

bool ExpertGroup::receive(Workspace& workspace, int layer, int element, Received& received) {
  // The caller's fault, not that of a rank.
  if (element != sent_element_) throw std::invalid_argument("expert group: elements of another size than were sent");
  const int64_t num_experts = shape_.num_experts, k = shape_.k;
  int64_t counts[kMostSeats], total = 0;
  for_each_seat(active_, [&](int seat) {
    const uint64_t word = row(seat).tokens.load(std::memory_order_relaxed);
    if ((word & 0xff) != static_cast<uint64_t>(element)) blame(seat, "the element size of its tokens");
    if (word >> 8 > static_cast<uint64_t>(shape_.max_tokens)) blame(seat, "its token count");
    counts[seat] = static_cast<int64_t>(word >> 8) * k;
    total += counts[seat];
  });
  if (faulty() >= 0) {
    status_ = kFaulty;
    return false;
  }
  // Counting sort, as in moe_permute.cc; it sorts a copy, which no other process can change meanwhile.
  struct Mine {
    int32_t pick, expert;
  };
  Mine* const mine = workspace.take<Mine>(total);
  int64_t ends[kMostSeats], found = 0;
  received.offsets = workspace.take<int32_t>(num_experts + 1);
  std::fill_n(received.offsets, num_experts + 1, 0);
  for_each_seat(active_, [&](int seat) {
    const int32_t* const targets = part<int32_t>(seat, shape_.targets);
    for (int64_t i = 0; i < counts[seat]; ++i) {
      const int32_t target = __atomic_load_n(targets + i, __ATOMIC_RELAXED);
      if (target < 0 || (target & (kMostSeats - 1)) != seat_) continue;
      const int32_t expert = target >> kSeatBits;
      if (expert >= num_experts) {
        blame(seat, "the target expert of a token");
        break;
      }
      ++received.offsets[expert + 1];
      mine[found++] = {static_cast<int32_t>(i), expert};
    }
    ends[seat] = found;
  });
  if (faulty() >= 0) {
    status_ = kFaulty;
    return false;
  }
  uint64_t* const served = part<uint64_t>(seat_, shape_.served) + layer * num_experts;
  int32_t begin = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int32_t count = received.offsets[expert + 1];
    served[expert] += count;
    received.offsets[expert + 1] = begin;
    begin += count;
  }
  received.rows = received_rows_ = begin;
  received.sources = workspace.take<const void*>(begin);
  received.origins = workspace.take<int32_t>(int64_t{begin} * 3);
  int32_t* const places = part<int32_t>(seat_, shape_.places);
  int64_t next = 0;
  for_each_seat(active_, [&](int seat) {
    for (; next < ends[seat]; ++next) {
      const int64_t i = mine[next].pick;
      const int32_t row = received.offsets[mine[next].expert + 1]++;
      const int64_t token = i / k;
      received.sources[row] = part<uint8_t>(seat, shape_.tokens) + token * shape_.hidden * element;
      received.origins[row * 3] = seat;
      received.origins[row * 3 + 1] = static_cast<int32_t>(token);
      received.origins[row * 3 + 2] = static_cast<int32_t>(i % k);
      places[seat * shape_.max_tokens * k + i] = row;
    }
  });
  return true;
}

void* ExpertGroup::result_rows(int rows, int element) {
  return grown(shape_.results, int64_t{rows} * shape_.hidden * element, shape_.seat_bytes - shape_.results,
               result_bytes_);
}

void ExpertGroup::publish_results() { publish(&SeatRow::combined, stamp(collective_)); }

bool ExpertGroup::await_results() { return wait(&SeatRow::combined, stamp(collective_)) == kGoing; }

const void* ExpertGroup::result(int token, int pick, int element) const {
  const int64_t i = token * shape_.k + pick, most = shape_.num_seats * shape_.max_tokens * shape_.k;
  const int32_t target = __atomic_load_n(targets() + i, __ATOMIC_RELAXED);
  if (target < 0) return nullptr;
  const int seat = target & (kMostSeats - 1);
  int64_t place = 0;
  if ((active_ & bit(seat)) == 0) {
    blame(seat_, "the target seat of a token");
  } else {
    place = __atomic_load_n(part<int32_t>(seat, shape_.places) + seat_ * shape_.max_tokens * shape_.k + i,
                            __ATOMIC_RELAXED);
    if (0 <= place && place < most) return part<uint8_t>(seat, shape_.results) + place * shape_.hidden * element;
    blame(seat, "the place of a result");
  }
  // Always readable: this seat has written at least one token.
  return part<uint8_t>(seat_, shape_.tokens);
}

bool ExpertGroup::results_are_whole() {
  if (faulty() < 0) return true;
  status_ = kFaulty;
  return false;
}

void ExpertGroup::blame(int seat, const char* fault) const {
  int none = -1;
  if (faulty_.compare_exchange_strong(none, seat)) fault_ = fault;
}

void ExpertGroup::note(Phase phase, int layer) {
  SeatRow& mine = row(seat_);
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

void ExpertGroup::ring() {
  ring(words().bell);
  ring(words().results_bell);
}

void ExpertGroup::ring(std::atomic<uint32_t>& bell) {
  bell.fetch_add(1, std::memory_order_seq_cst);
  if (words().sleepers.load(std::memory_order_seq_cst) != 0) {
    syscall(SYS_futex, &bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

std::atomic<uint32_t>& ExpertGroup::bell_of(Word word) const {
  return word == &SeatRow::combined ? words().results_bell : words().bell;
}

// Whoever is the last to publish wakes the others, for whom there was nothing to do before. Each looks at all others
// after it has published: one of the last two sees that all have.
void ExpertGroup::publish(Word word, uint64_t value) {
  if (status_ != kGoing) return;
  (row(seat_).*word).store(value, std::memory_order_seq_cst);
  if (behind(word, value, active_) == 0) ring(bell_of(word));
}

uint64_t ExpertGroup::behind(Word word, uint64_t value, uint64_t seats) const {
  uint64_t missing = 0;
  for_each_seat(seats, [&](int seat) {
    const uint64_t theirs = (row(seat).*word).load(std::memory_order_seq_cst);
    // A seat may be one number ahead, but not two, because that step needs this seat. A later epoch counts as missing:
    // the others may have gone on without this seat, and overwrite what it is about to read.
    if (theirs - value > (word == &SeatRow::arrived ? 0 : 1)) missing |= bit(seat);
  });
  return missing;
}

// Finds a number of this epoch that no seat can have reached.
bool ExpertGroup::find_impossible(Word word, uint64_t value, uint64_t seats) const {
  if (word == &SeatRow::arrived) return false;
  for_each_seat(seats, [&](int seat) {
    const uint64_t theirs = (row(seat).*word).load(std::memory_order_relaxed);
    if (theirs >> 40 == epoch_ && theirs > value + 1) blame(seat, "its step number");
  });
  return faulty() >= 0;
}

ExpertGroup::Status ExpertGroup::wait(Word word, uint64_t value) {
  if (status_ != kGoing) return status_;
  GroupWords& group = words();
  SeatRow& mine = row(seat_);
  uint64_t missing = active_ & ~bit(seat_), last = 0;
  const int64_t began = now();
  int64_t looked = began;
  for (int spins = 0;; ++spins) {
    missing = behind(word, value, missing);
    if (missing == 0) break;
    last = missing;
    // Only if somebody is missing even now: when all have come, the step is whole whatever has changed since.
    if (group.epoch.load(std::memory_order_seq_cst) != epoch_) {
      if (behind(word, value, missing) != 0) status_ = kChanged;
      break;
    }
    relax();
    // The clock costs more than a look.
    if (spins % 16 != 0) continue;
    const int64_t time = now();
    if (time - began < spin_ns_) continue;
    if (time - looked >= kLookNanoseconds) {
      looked = time;
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
    group.sleepers.fetch_or(bit(seat_), std::memory_order_seq_cst);
    std::atomic<uint32_t>& bell = bell_of(word);
    const uint32_t heard = bell.load(std::memory_order_seq_cst);
    if (behind(word, value, missing) != 0 && group.epoch.load(std::memory_order_seq_cst) == epoch_) {
      sleep_while(bell, heard, kLookNanoseconds);
    }
    group.sleepers.fetch_and(~bit(seat_), std::memory_order_seq_cst);
    spins = -1;
  }
  mine.waiting_for.store(0, std::memory_order_relaxed);
  if (last != 0) {
    const int64_t share = (now() - began) / __builtin_popcountll(last);
    for_each_seat(last, [&](int seat) { counters_.waited_ns[seat] += share; });
  }
  return status_;
}

uint64_t ExpertGroup::dead(uint64_t seats) const {
  pollfd ends[kMostSeats];
  int owners[kMostSeats], count = 0;
  for_each_seat(seats, [&](int seat) {
    ends[count] = {pidfds_[seat], POLLIN, 0};
    owners[count++] = seat;
  });
  uint64_t found = 0;
  if (poll(ends, count, 0) > 0) {
    for (int i = 0; i < count; ++i) {
      if (ends[i].revents != 0) found |= bit(owners[i]);
    }
  }
  return found;
}

// A stall is work that waits and no progress. It is ended by SIGKILL: what was a guess is a fact then, which
// everybody learns from the kernel.
void ExpertGroup::watch_stalls(uint64_t missing, int64_t waited) {
  if (waited < stall_after_ns_) return;
  for_each_seat(missing, [&](int seat) {
    // A start time in the future does not excuse a seat.
    const uint64_t since = row(seat).since_ns.load(), time = now();
    const int64_t still = since > time ? waited : std::min(waited, static_cast<int64_t>(time - since));
    if (still >= stall_kill_ns_ && (killed_ & bit(seat)) == 0) {
      killed_ |= bit(seat);
      on_stall_(seat, still * 1e-9, 1);
      syscall(SYS_pidfd_send_signal, pidfds_[seat], SIGKILL, nullptr, 0);
    } else if (still >= stall_after_ns_ && (reported_ & bit(seat)) == 0) {
      reported_ |= bit(seat);
      on_stall_(seat, still * 1e-9, 0);
    }
  });
}

// The memory is a sparse file, and where there is no room for a page a write to it would be a SIGBUS.
void* ExpertGroup::grown(int64_t offset, int64_t bytes, int64_t limit, int64_t& size) {
  if (bytes > limit) throw std::invalid_argument("expert group: more rows than it was made for");
  if (bytes > size) {
    const auto in_steps = [&](int64_t count) { return std::min(limit, (count + kGrowth - 1) / kGrowth * kGrowth); };
    const auto take = [&](int64_t wanted) {
      int failed = 0;
      do {
        failed = fallocate(file_, 0, shape_.first_seat + seat_ * shape_.seat_bytes + offset, wanted);
      } while (failed != 0 && errno == EINTR);
      if (failed == 0) size = wanted;
      return failed == 0;
    };
    // Where there is no room for twice as much, what is needed now may still fit.
    if (!take(in_steps(std::max(bytes, size * 2))) && !take(in_steps(bytes))) {
      status_ = kFull;
      missing_bytes_ = in_steps(bytes) - size;
      return nullptr;
    }
  }
  return part<uint8_t>(seat_, offset);
}

}  // namespace fd
