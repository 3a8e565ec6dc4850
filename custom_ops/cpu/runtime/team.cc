#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime/waiting.h"

namespace fd {
namespace {

// A waiting thread spins this long before it sleeps: long enough to bridge the Python code between two operations of a
// step. Threads sleep between steps and while other replicas need the core.
constexpr int64_t kSpinNanoseconds = 40'000;

// A counter that threads wait on. Advancing it costs a system call only if a thread sleeps.
class Signal {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void advance() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }
  }

  void wait_while(uint32_t old) {
    const int64_t deadline = now() + kSpinNanoseconds;
    while (value() == old) {
      for (int i = 0; i < 64; ++i) {
        if (value() != old) return;
        relax();
      }
      if (now() < deadline) continue;
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      if (value() == old) syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
};

}  // namespace

class ThreadPool {
 public:
  ThreadPool(int count, const int* cpus) : size_(count) {
    try {
      for (int rank = 1; rank < count; ++rank) {
        const int cpu = cpus == nullptr ? -1 : cpus[rank];
        threads_.emplace_back([this, rank, cpu] {
          if (cpu >= 0) pin(cpu);
          serve(rank);
        });
      }
    } catch (...) {
      end_threads();
      throw;
    }
    // Last, because new threads inherit the affinity of their creator.
    if (cpus != nullptr && cpus[0] >= 0) pin(cpus[0]);
  }

  ~ThreadPool() { end_threads(); }

  int size() const { return size_; }

  void run(FunctionRef<void(Team&)> body) {
    Team team(*this, 0, size_);
    if (size_ > 1) {
      body_ = &body;
      start_.advance();
    }
    body(team);
    // The caller owns `body`, so no thread may still run it when this returns.
    if (size_ > 1) barrier();
  }

  void barrier() {
    const uint32_t round = round_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      round_.advance();
    } else {
      round_.wait_while(round);
    }
  }

  int64_t next_item() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  static void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    // If the CPU is not available to this process, the thread stays unpinned.
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  }

  void end_threads() {
    body_ = nullptr;
    start_.advance();
    for (auto& thread : threads_) thread.join();
  }

  void serve(int rank) {
    uint32_t seen = 0;
    while (true) {
      start_.wait_while(seen);
      ++seen;
      if (body_ == nullptr) return;
      Team team(*this, rank, size_);
      (*body_)(team);
      barrier();
    }
  }

  const int size_;
  FunctionRef<void(Team&)>* body_ = nullptr;
  // On separate cache lines, so that threads that take items do not slow down waiting ones.
  alignas(64) Signal start_;
  alignas(64) Signal round_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  std::vector<std::thread> threads_;
};

void Team::barrier() {
  if (size_ > 1) pool_.barrier();
}

int64_t Team::next_item() { return pool_.next_item(); }

namespace {

std::mutex pool_mutex;
std::unique_ptr<ThreadPool> pool;

ThreadPool& the_pool() {
  if (!pool) pool = std::make_unique<ThreadPool>(1, nullptr);
  return *pool;
}

}  // namespace

void set_threads(int count, const int* cpus) {
  std::lock_guard lock(pool_mutex);
  pool.reset();
  pool = std::make_unique<ThreadPool>(count, cpus);
}

int num_threads() {
  std::lock_guard lock(pool_mutex);
  return the_pool().size();
}

void run_team(FunctionRef<void(Team&)> body) {
  std::lock_guard lock(pool_mutex);
  the_pool().run(body);
}

}  // namespace fd
