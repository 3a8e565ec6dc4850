// An expert-parallel group as one of its ranks sees it: memory that all of them map, and the collectives on it.
//
// A rank has a seat, and a seat has a part of the memory that its own process alone writes; the others read. Tokens
// are published where they are, and who holds their experts takes them from there; results likewise. So nothing that
// a rank writes late, after the others have gone on without it, can reach anybody: its part is not read any more.
//
// A collective (one for each MoE layer of a step) is: publish tokens and where each goes -> all have -> compute ->
// publish results -> all have -> add up. Both times everybody waits for everybody, and that is what lets each part
// be used again: whoever has seen all results of a collective knows that nobody reads its tokens any more, and whoever
// has seen all tokens of the next one that nobody reads its results.
//
// What is published carries (epoch, number). An epoch is a set of members that does not change; the word that says
// which one is in force is written by engine/expert_parallel/group.py. Who waits looks at it, and at the kernel's word
// on whether those it waits for are alive, so a wait ends in one of three ways: all have come, the members have
// changed, or some have died.
//
// Each value in the part of another seat is read once and checked there, because the process that wrote it may be
// faulty. A value out of range ends the collective with kFaulty and names the seat.
#pragma once

#include <atomic>
#include <cstdint>

#include "workspace.h"

namespace fd {

constexpr int kMostSeats = 64;
// Limit of the tokens of one rank in one step, and so of the rounds of the step, which all ranks take part in.
constexpr int kMostStepTokens = 1 << 20;

// Where a rank is. Those before kBegin are outside of a step.
enum class Phase : uint64_t {
  kIdle = 0,
  kArrive,       // waits for the others to adopt an epoch
  kBegin,        // waits for the others to begin a step
  kCompute,      // attention, norms, router: at home
  kHalfSent,     // its tokens are written, where they go is not
  kSent,         // its tokens are published; waits for those of the others
  kExperts,      // computes its experts
  kHalfReturned, // its results are written, not published
  kReturned,     // its results are published; waits for those of the others
  kCombine,
};

// What one seat says to the others; engine/expert_parallel/layout.py has the same fields in the same order.
struct alignas(64) SeatRow {
  std::atomic<uint64_t> arrived;     // the epoch it has adopted
  std::atomic<uint64_t> begun;       // of the step it has begun last: epoch << 40 | number
  // How many tokens it computes in the steps of even and of odd numbers: one that nobody has work for is over at once,
  // and who begins the next must not overwrite what others have yet to read of it.
  std::atomic<uint64_t> step_tokens[2];
  std::atomic<uint64_t> dispatched;  // of the collective whose tokens it has published last: epoch << 40 | number
  std::atomic<uint64_t> tokens;      // how many those are, << 8 | bytes of an element
  std::atomic<uint64_t> combined;    // of the collective whose results it has published last
  // For people, and to tell a stall: what it does, in which layer, since when (CLOCK_MONOTONIC), and for whom it
  // waits (a bit for each seat).
  std::atomic<uint64_t> phase;
  std::atomic<uint64_t> layer;
  std::atomic<uint64_t> since_ns;
  std::atomic<uint64_t> waiting_for;
  std::atomic<uint64_t> steps;
};
static_assert(sizeof(SeatRow) == 128);

// Words of the whole group.
struct GroupWords {
  alignas(64) std::atomic<uint64_t> epoch;
  // Futexes: change when somebody may have to go on, who waits for results, or for anything else. Apart, because a rank
  // without tokens waits for no results.
  alignas(64) std::atomic<uint32_t> bell;
  std::atomic<uint32_t> results_bell;
  alignas(64) std::atomic<uint64_t> sleepers;
};
static_assert(sizeof(GroupWords) == 192);

// Sizes of the group, and where in the memory what is; the same for all ranks. engine/expert_parallel/layout.py
// computes them.
struct GroupShape {
  int64_t seat;
  int64_t num_seats;
  int64_t num_layers;  // with experts
  int64_t num_experts;
  int64_t max_tokens;  // of one seat in one collective
  int64_t k;
  int64_t hidden;
  int64_t words;       // offset of GroupWords
  int64_t first_seat;  // offset of the part of seat 0
  int64_t seat_bytes;
  // Within the part of a seat, which begins with its row:
  int64_t served;   // u64 [num_layers, num_experts], tokens that it has computed
  int64_t targets;  // i32 [max_tokens, k], where the picks of its tokens go
  int64_t places;   // i32 [num_seats, max_tokens, k], the rows of its results
  int64_t tokens;   // [max_tokens, hidden] of 2 or 4 bytes; grows
  int64_t results;  // [rows, hidden] of 2 or 4 bytes; grows
};

// Rows that a seat got, those of one expert one behind the other; within an expert by seat, token and pick.
struct Received {
  int rows;
  int32_t* offsets;     // [num_experts + 1]
  const void** sources; // [rows], in the memory of the seat that sent it
  int32_t* origins;     // [rows, 3]: seat, token, pick
};

class ExpertGroup {
 public:
  enum Status { kGoing = 0, kChanged = 1, kLost = 2, kFull = 3, kFaulty = 4 };

  struct Counters {
    uint64_t waited_ns[kMostSeats];  // for the seat that came last
    uint64_t bytes_dispatched;       // to other seats
    uint64_t bytes_combined;         // from other seats
    uint64_t collectives;
  };

  // Called while a seat keeps others waiting: once after `stall_after_ns`, and when it is killed.
  using OnStall = void (*)(int seat, double seconds, int killed);

  // `memory` is the whole file, mapped; `file` its descriptor, to grow it.
  ExpertGroup(const GroupShape& shape, void* memory, int file, OnStall on_stall, int64_t stall_after_ns,
              int64_t stall_kill_ns);

  // The members of `epoch`, this seat among them. homes[layer * num_experts + expert]: a bit for each seat that
  // computes the expert, members only and at least one. pidfds[seat] of each other member. Waits spin for `spin_ns`
  // before they sleep.
  void set_members(uint64_t epoch, uint64_t active, const uint64_t* homes, const int* pidfds, int64_t spin_ns);

  // Waits until all members have adopted the epoch. Until then no part may be written: those that were in a step
  // of the old one may still read.
  Status arrive();
  // Says that this seat begins a step of `tokens` tokens. Those that sleep outside of a step must be called then.
  void announce(int tokens);
  // Waits until all have announced it; `busy` tells then whether anybody has any tokens.
  Status begin();
  bool busy() const { return rounds_ > 0; }
  // This seat has no tokens in the step.
  bool assists() const { return row(seat_).step_tokens[step_ % 2].load(std::memory_order_relaxed) == 0; }
  // Collectives that each layer of the step takes: as many as the rank with the most tokens needs.
  int rounds() const { return rounds_; }

  // ---- one collective

  // Where this seat's tokens are to be written; null if the memory is full.
  void* token_rows(int tokens, int element);
  // Chooses a home for each pick, expert << 6 | seat; -1 stays -1. At home where that can be.
  void address(int layer, const int32_t* picks, int tokens);
  void publish_tokens(int tokens, int element);
  bool await_tokens();
  // Collects the tokens for this seat. False if the part of a seat is faulty; all elements must have this size.
  bool receive(Workspace& workspace, int layer, int element, Received& received);
  void* result_rows(int rows, int element);
  void publish_results();
  bool await_results();
  // After await_results: the result of a pick of a token of this seat; null for -1. On any thread. If the part of a
  // seat is faulty, the row is readable but meaningless, and `results_are_whole` returns false afterwards.
  const void* result(int token, int pick, int element) const;
  bool results_are_whole();

  // Of the collective under way: the tokens that this seat has published, the rows that it has received.
  int sent_tokens() const { return sent_tokens_; }
  int received_rows() const { return received_rows_; }

  Status status() const { return status_; }
  // The members that have died, after kLost.
  uint64_t lost() const { return lost_; }
  // What was missing, after kFull.
  int64_t missing_bytes() const { return missing_bytes_; }
  // After kFaulty: the seat whose part is faulty, and the value that is out of range.
  int faulty() const { return faulty_.load(std::memory_order_relaxed); }
  const char* fault() const { return fault_.load(std::memory_order_relaxed); }

  const GroupShape& shape() const { return shape_; }
  const Counters& counters() const { return counters_; }
  const int32_t* targets() const { return part<int32_t>(seat_, shape_.targets); }
  SeatRow& row(int seat) const { return *part<SeatRow>(seat, 0); }

  void note(Phase phase, int layer);
  // In the same layer as before.
  void note(Phase phase) { note(phase, static_cast<int>(row(seat_).layer.load(std::memory_order_relaxed))); }
  // Wakes all that wait.
  void ring();
  // For tests: sends itself `signal` when it comes to this phase of this layer for the nth time.
  void trap(Phase phase, int layer, int nth, int signal);

 private:
  using Word = std::atomic<uint64_t> SeatRow::*;

  template <class T>
  T* part(int seat, int64_t offset) const {
    return reinterpret_cast<T*>(memory_ + shape_.first_seat + seat * shape_.seat_bytes + offset);
  }
  GroupWords& words() const { return *reinterpret_cast<GroupWords*>(memory_ + shape_.words); }
  uint64_t stamp(uint64_t number) const { return epoch_ << 40 | number; }
  std::atomic<uint32_t>& bell_of(Word word) const;
  void ring(std::atomic<uint32_t>& bell);
  void publish(Word word, uint64_t value);
  Status wait(Word word, uint64_t value);
  uint64_t behind(Word word, uint64_t value, uint64_t seats) const;
  uint64_t dead(uint64_t seats) const;
  bool find_impossible(Word word, uint64_t value, uint64_t seats) const;
  // Keeps the first fault of a collective; later ones are ignored.
  void blame(int seat, const char* fault) const;
  void watch_stalls(uint64_t missing, int64_t waited);
  void* grown(int64_t offset, int64_t bytes, int64_t limit, int64_t& size);

  const GroupShape shape_;
  const int seat_;
  uint8_t* const memory_;
  const int file_;
  const OnStall on_stall_;
  const int64_t stall_after_ns_, stall_kill_ns_;

  Status status_ = kChanged;
  uint64_t epoch_ = 0, active_ = 0, lost_ = 0;
  int64_t missing_bytes_ = 0;
  mutable std::atomic<int> faulty_{-1};
  mutable std::atomic<const char*> fault_{""};
  const uint64_t* homes_ = nullptr;
  const int* pidfds_ = nullptr;
  int64_t spin_ns_ = 0;
  uint64_t step_ = 0, collective_ = 0;
  int sent_tokens_ = 0, sent_element_ = 0, received_rows_ = 0;
  uint64_t remote_picks_ = 0;  // of the tokens that were addressed last
  int rounds_ = 0;
  uint64_t reported_ = 0, killed_ = 0;
  int64_t token_bytes_ = 0, result_bytes_ = 0;
  Counters counters_{};

  Phase trap_phase_ = Phase::kIdle;
  int trap_layer_ = 0, trap_left_ = 0, trap_signal_ = 0;
};

}  // namespace fd
