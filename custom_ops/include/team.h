// A team of threads that computes operations together.
//
// Every operation in this folder is called by all threads of a team with the same arguments, and each thread processes
// the items that `for_each` assigns to it. A Paddle binding wraps one or more operations in a single `run_team`, so a
// whole layer wakes the threads once.
//
// Results do not depend on the number of threads or on the assignment of items: one thread computes an item entirely,
// in a fixed order.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace fd {

// A non-owning reference to a callable; valid only during the call it is passed to.
template <class Signature>
class FunctionRef;

template <class Result, class... Args>
class FunctionRef<Result(Args...)> {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, FunctionRef>>>
  FunctionRef(F&& f)
      : object_(const_cast<void*>(static_cast<const void*>(&f))), call_([](void* object, Args... args) -> Result {
          return (*static_cast<std::remove_reference_t<F>*>(object))(args...);
        }) {}
  Result operator()(Args... args) const { return call_(object_, args...); }

 private:
  void* object_;
  Result (*call_)(void*, Args...);
};

class ThreadPool;

// One thread's view of its team.
class Team {
 public:
  int rank() const { return rank_; }
  int size() const { return size_; }

  // Waits for all threads of the team; writes before the barrier are visible to all threads after it.
  void barrier();

  // Calls f(i) once for each i in [0, count), each on one thread of the team, then waits at a barrier.
  template <class F>
  void for_each(int64_t count, F&& f) {
    if (size_ == 1) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    for (int64_t i = next_item(); i < count; i = next_item()) f(i);
    barrier();
  }

 private:
  friend class ThreadPool;
  Team(ThreadPool& pool, int rank, int size) : pool_(pool), rank_(rank), size_(size) {}
  int64_t next_item();

  ThreadPool& pool_;
  int rank_;
  int size_;
};

// Sets the number of threads, including the caller, and their CPUs (`cpus[rank]`; -1: not pinned; null: none is
// pinned). Must be called before the first operation; later calls replace the threads.
void set_threads(int count, const int* cpus);
int num_threads();

// Runs body(team) on every thread, the caller as rank 0, and returns when all have finished. Concurrent calls are
// serialised. `body` must not throw: the other threads would wait for it at the next barrier.
void run_team(FunctionRef<void(Team&)> body);

}  // namespace fd
