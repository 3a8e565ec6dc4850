// One rank's view of an expert-parallel group: the memory that all ranks map, and the collectives on it.
//
// Each rank has a part of the memory that only its own process writes. Tokens and results stay in the sender's part and
// are read from there. A rank that was removed from the group therefore cannot disturb the others: they no longer read
// its part.
//
// A collective runs once per MoE layer of a step: publish tokens and their targets, wait for all ranks, compute,
// publish results, wait for all ranks, sum up. The two barriers make the buffers reusable: a rank that has seen all
// results of a collective knows that its tokens are no longer read, and a rank that has seen all tokens of the next one
// knows that its results are no longer read.
//
// Every published value carries (epoch, number). An epoch is a fixed set of members; the current one is a word that
// engine/expert_parallel/membership.py writes. A waiting rank watches that word, and learns from pidfds whether the
// missing ranks are alive. A wait ends when all ranks have arrived, the members have changed, or a rank has died.
//
// A value in the part of another rank is read once and checked, because its process may be faulty. A value out of range
// ends the collective with kFaulty and names the rank that wrote it. A rank also checks what it has published itself:
// if that is damaged, the rank at fault is itself and not one that has read it.
#pragma once

#include <atomic>
#include <cstdint>

#include "workspace.h"

namespace fd {

constexpr int kMaxRanks = 64;
// Maximum tokens of one rank in one step. It bounds the rounds of a step, in which all ranks take part.
constexpr int kMaxStepTokens = 1 << 20;

// What a rank is doing. Phases before kBegin are outside of a step.
enum class Phase : uint64_t {
  kIdle = 0,
  kArrive,        // waiting for the others to adopt an epoch
  kBegin,         // waiting for the others to begin a step
  kCompute,       // attention, norms, router: no exchange
  kHalfSent,      // tokens written, their targets not yet
  kSent,          // tokens published; waiting for those of the others
  kExperts,       // computing its experts
  kHalfReturned,  // results written, not yet published
  kReturned,      // results published; waiting for those of the others
  kCombine,
};

// State that one rank publishes; engine/expert_parallel/layout.py has the same fields in the same order.
struct alignas(64) RankRow {
  std::atomic<uint64_t> arrived;  // adopted epoch
  std::atomic<uint64_t> begun;    // last step begun: epoch << 40 | number
  // Tokens in the current step, indexed by the parity of its number: a step without work ends at once, and beginning
  // the next one must not overwrite a count that other ranks have yet to read.
  std::atomic<uint64_t> step_tokens[2];
  std::atomic<uint64_t> dispatched;  // last collective whose tokens are published: epoch << 40 | number
  std::atomic<uint64_t> tokens;      // number of those tokens << 8 | bytes of an element
  std::atomic<uint64_t> combined;    // last collective whose results are published: epoch << 40 | number
  // For diagnosis and stall detection: phase, layer, time of the last change of phase (CLOCK_MONOTONIC), and the ranks
  // waited for (one bit each).
  std::atomic<uint64_t> phase;
  std::atomic<uint64_t> layer;
  std::atomic<uint64_t> since_ns;
  std::atomic<uint64_t> waiting_for;
  std::atomic<uint64_t> steps;
};
static_assert(sizeof(RankRow) == 128);

// Words shared by the whole group.
struct GroupWords {
  alignas(64) std::atomic<uint64_t> epoch;
  // Futexes that change when waiters must check their condition. Results have one of their own, because ranks without
  // tokens do not wait for results.
  alignas(64) std::atomic<uint32_t> bell;
  std::atomic<uint32_t> results_bell;
  alignas(64) std::atomic<uint64_t> sleepers;
};
static_assert(sizeof(GroupWords) == 192);

// Sizes of the group and offsets into its memory, equal on all ranks; engine/expert_parallel/layout.py computes them.
struct GroupShape {
  int64_t rank;
  int64_t num_ranks;
  int64_t num_layers;  // MoE layers
  int64_t num_experts;
  int64_t max_tokens;  // per rank and collective
  int64_t k;
  int64_t hidden;
  int64_t words;              // offset of GroupWords
  int64_t first_rank_offset;  // offset of the part of rank 0
  int64_t rank_bytes;         // size of the part of a rank
  // Offsets within the part of a rank, which begins with its RankRow:
  int64_t expert_token_counts;  // u64 [num_layers, num_experts], tokens computed
  int64_t dispatch_targets;     // i32 [max_tokens, k], targets of its tokens
  int64_t return_slots;         // i32 [num_ranks, max_tokens, k], rows of results for the assignments of each rank
  int64_t tokens;               // [max_tokens, hidden] of 2 or 4 bytes; allocated on demand
  int64_t results;              // [rows, hidden] of 2 or 4 bytes; allocated on demand
};

// Rows received by a rank, grouped by expert and ordered by rank, token and top-k position within an expert.
struct Received {
  int rows;
  int32_t* offsets;             // [num_experts + 1]
  const void** sources;         // [rows], in the memory of the rank that sent it
  int32_t* source_token_index;  // [rows, 3]: rank, token, top-k position
};

class ExpertGroup {
 public:
  enum Status { kGoing = 0, kChanged = 1, kLost = 2, kFull = 3, kFaulty = 4 };

  struct Counters {
    uint64_t waited_ns[kMaxRanks];  // by rank waited for: those that arrived last
    uint64_t bytes_dispatched;      // to other ranks
    uint64_t bytes_combined;        // from other ranks
    uint64_t collectives;
  };

  // Called when a rank has delayed the others for `stall_after_ns`, and when it is killed.
  using OnStall = void (*)(int rank, double seconds, int killed);

  // `memory` is the mapping of the whole file, `file` its descriptor.
  ExpertGroup(const GroupShape& shape, void* memory, int file, OnStall on_stall, int64_t stall_after_ns,
              int64_t stall_kill_ns);

  // Sets the members of `epoch`, which include this rank. expert_ranks[layer * num_experts + expert] is the bitmap of
  // the members (at least one) that hold the expert; pidfds[rank] is set for each other member. Waits spin for
  // `spin_ns` before they sleep.
  void set_members(uint64_t epoch, uint64_t active, const uint64_t* expert_ranks, const int* pidfds, int64_t spin_ns);

  // Waits until all members have adopted the epoch. No part may be written before, because a rank in a step of the old
  // epoch may still read it.
  Status arrive();
  // Announces a step in which this rank has `tokens` tokens. The caller must wake ranks that sleep between steps.
  void announce(int tokens);
  // Waits until all ranks have announced the step; then `busy` is true if any rank has tokens.
  Status begin();
  bool busy() const { return rounds_ > 0; }
  // True if this rank has no tokens in the step.
  bool is_dummy_step() const { return row(rank_).step_tokens[step_ % 2].load(std::memory_order_relaxed) == 0; }
  // Collectives per layer in this step: as many as the rank with the most tokens needs.
  int rounds() const { return rounds_; }

  // ---- one collective

  // Buffer for the tokens of this rank; null if the memory is full.
  void* token_rows(int tokens, int element);
  // Writes the target of each assignment, expert << 6 | rank: this rank if it holds the expert; -1 stays -1.
  void route(int layer, const int32_t* topk_ids, int tokens);
  void publish_tokens(int tokens, int element);
  bool await_tokens();
  // Collects the tokens for this rank's experts. False if the part of a rank is faulty, for example if its elements
  // have another size.
  bool receive(Workspace& workspace, int layer, int element, Received& received);
  void* result_rows(int rows, int element);
  void publish_results();
  bool await_results();
  // After await_results: the result of the `topk_index`-th expert of a token of this rank; null if it was dropped.
  // Thread-safe. If the part of a rank is faulty, the row is readable but meaningless, and `results_are_whole` returns
  // false afterwards.
  const void* result(int token, int topk_index, int element) const;
  bool results_are_whole();

  // Tokens published and rows received by this rank in the current collective.
  int sent_tokens() const { return sent_tokens_; }
  int received_rows() const { return received_rows_; }

  Status status() const { return status_; }
  // After kLost: the members that died.
  uint64_t lost() const { return lost_; }
  // After kFull: the missing bytes.
  int64_t missing_bytes() const { return missing_bytes_; }
  // After kFaulty: the rank whose part is faulty, and a description of the value out of range.
  int faulty() const { return faulty_.load(std::memory_order_relaxed); }
  const char* fault() const { return fault_.load(std::memory_order_relaxed); }

  const GroupShape& shape() const { return shape_; }
  const Counters& counters() const { return counters_; }
  const int32_t* dispatch_targets() const { return part<int32_t>(rank_, shape_.dispatch_targets); }
  RankRow& row(int rank) const { return *part<RankRow>(rank, 0); }

  void set_phase(Phase phase, int layer);
  // Keeps the layer.
  void set_phase(Phase phase) { set_phase(phase, static_cast<int>(row(rank_).layer.load(std::memory_order_relaxed))); }
  // Wakes all waiting ranks.
  void wake_waiters();
  // For tests: raise `signal` when this phase of this layer is reached for the nth time.
  void trap(Phase phase, int layer, int nth, int signal);

 private:
  using Word = std::atomic<uint64_t> RankRow::*;

  template <class T>
  T* part(int rank, int64_t offset) const {
    return reinterpret_cast<T*>(memory_ + shape_.first_rank_offset + rank * shape_.rank_bytes + offset);
  }
  GroupWords& words() const { return *reinterpret_cast<GroupWords*>(memory_ + shape_.words); }
  uint64_t stamp(uint64_t number) const { return epoch_ << 40 | number; }
  std::atomic<uint32_t>& bell_of(Word word) const;
  void wake_waiters(std::atomic<uint32_t>& bell);
  void publish(Word word, uint64_t value);
  Status wait(Word word, uint64_t value);
  uint64_t lagging_ranks(Word word, uint64_t value, uint64_t ranks) const;
  uint64_t dead(uint64_t ranks) const;
  bool find_impossible(Word word, uint64_t value, uint64_t ranks) const;
  bool own_stamps_are_intact() const;
  // Records the first fault of a collective; later ones are ignored.
  void record_fault(int rank, const char* fault) const;
  void watch_stalls(uint64_t missing, int64_t waited);
  void* ensure_capacity(int64_t offset, int64_t bytes, int64_t limit, int64_t& size);

  const GroupShape shape_;
  const int rank_;
  uint8_t* const memory_;
  const int file_;
  const OnStall on_stall_;
  const int64_t stall_after_ns_, stall_kill_ns_;

  Status status_ = kChanged;
  uint64_t epoch_ = 0, active_ = 0, lost_ = 0;
  int64_t missing_bytes_ = 0;
  mutable std::atomic<int> faulty_{-1};
  mutable std::atomic<const char*> fault_{""};
  const uint64_t* expert_ranks_ = nullptr;
  const int* pidfds_ = nullptr;
  int64_t spin_ns_ = 0;
  uint64_t step_ = 0, collective_ = 0;
  int sent_tokens_ = 0, sent_element_ = 0, received_rows_ = 0;
  uint64_t remote_assignments_ = 0;  // of the tokens routed last
  int rounds_ = 0;
  uint64_t reported_ = 0, killed_ = 0;
  int64_t token_bytes_ = 0, result_bytes_ = 0;
  Counters counters_{};

  Phase trap_phase_ = Phase::kIdle;
  int trap_layer_ = 0, trap_left_ = 0, trap_signal_ = 0;

  // What this rank last published in each word that others wait for.
  static constexpr int kNumStamps = 4;
  uint64_t published_[kNumStamps] = {};
};

}  // namespace fd
