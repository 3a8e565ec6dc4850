// Threads that compute one operation together.
//
// Every operation of this folder is a collective: all threads of a team call it with the same arguments, and
// each works on what `for_each` hands to it. A Paddle binding is then one `run_team` around one or many
// operations, so that a whole layer costs one wake-up of the threads.
//
// No result depends on the number of threads or on who took which item: an item is computed wholly by one
// thread, in an order of its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace fd {

// A reference to a callable; lives no longer than the call it is passed to.
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

// One thread's view of the threads that run an operation.
class Team {
 public:
  int rank() const { return rank_; }
  int size() const { return size_; }

  // Waits for all threads of the team; what any of them wrote before is seen by all afterwards.
  void barrier();

  // Calls f(i) once for each i in [0, count), each on some thread of the team; a barrier is at the end.
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

// Sets how many threads operations use, the caller's among them, and, unless `cpus` is null, the CPU of each
// (`cpus[rank]`; -1: not pinned). To be called before the first operation; later calls replace the threads.
void set_threads(int count, const int* cpus);
int num_threads();

// Runs body(team) on every thread and returns when all have returned. The calling thread is rank 0. Calls from
// several threads at the same time take turns. `body` must not throw: nobody could tell the other threads.
void run_team(FunctionRef<void(Team&)> body);

}  // namespace fd
