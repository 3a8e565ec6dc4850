// Measures the limits of this machine: prints {"read_bytes_per_second": ..., "fma_flops_per_second": ...}.
//
//   limits THREADS MEGABYTES
//
// Compiled by limits.py with -O3 -march=native -ffp-contract=fast, so that a * b + c is one instruction.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// Enough to cover latency (4 or 5 cycles on 2 ports), few enough for 16 registers.
constexpr int kAccumulators = 12;
constexpr int kRounds = 7;

using Floats = float __attribute__((vector_size(kVectorBytes)));
using Words = uint64_t __attribute__((vector_size(kVectorBytes)));

std::atomic<uint64_t> sink{0};

// Seconds for all threads to run `body(rank)` concurrently; the best of several rounds.
template <class Body>
double best_seconds(int threads, Body&& body) {
  double best = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    std::atomic<int> waiting{0};
    std::vector<std::chrono::steady_clock::time_point> started(threads), ended(threads);
    std::vector<std::thread> team;
    for (int rank = 0; rank < threads; ++rank) {
      team.emplace_back([&, rank] {
        cpu_set_t cpus;
        CPU_ZERO(&cpus);
        CPU_SET(rank, &cpus);
        // Fails if the available CPUs have other numbers; the thread stays unpinned then.
        sched_setaffinity(0, sizeof cpus, &cpus);
        ++waiting;
        while (waiting.load() < threads) {
        }
        started[rank] = std::chrono::steady_clock::now();
        body(rank);
        ended[rank] = std::chrono::steady_clock::now();
      });
    }
    for (auto& thread : team) thread.join();
    auto first = *std::min_element(started.begin(), started.end());
    auto last = *std::max_element(ended.begin(), ended.end());
    best = std::min(best, std::chrono::duration<double>(last - first).count());
  }
  return best;
}

void read(const Words* data, size_t count) {
  Words sums[8] = {};
  for (size_t i = 0; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] ^= data[i + j];
  }
  for (int j = 1; j < 8; ++j) sums[0] ^= sums[j];
  sink ^= sums[0][0];
}

void multiply_add(long count) {
  Floats sums[kAccumulators] = {}, factor, addend;
  for (int lane = 0; lane < kVectorBytes / 4; ++lane) factor[lane] = 0.5f, addend[lane] = 1.0f;
  // If the compiler knew the values, it would compute the sums in advance.
  asm volatile("" : "+x"(factor), "+x"(addend));
  for (long i = 0; i < count; ++i) {
    for (Floats& sum : sums) sum = sum * factor + addend;
  }
  Floats total = {};
  for (const Floats& sum : sums) total += sum;
  uint32_t bits;
  float value = total[0];
  std::memcpy(&bits, &value, sizeof bits);
  sink ^= bits;
}

double read_bytes_per_second(int threads, size_t megabytes) {
  size_t bytes = megabytes << 20;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("limits: mmap");
    std::exit(1);
  }
  // Huge pages avoid page walks, so that memory is the limit.
  madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 1, bytes);
  size_t share = bytes / kVectorBytes / threads;
  double seconds = best_seconds(
      threads, [&](int rank) { read(static_cast<const Words*>(memory) + rank * share, share); });
  munmap(memory, bytes);
  return static_cast<double>(share * threads * kVectorBytes) / seconds;
}

double fma_flops_per_second(int threads) {
  constexpr long kCount = 10'000'000;
  double seconds = best_seconds(threads, [](int) { multiply_add(kCount); });
  return 2.0 * kCount * kAccumulators * (kVectorBytes / 4) * threads / seconds;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: limits THREADS MEGABYTES\n");
    return 2;
  }
  int threads = std::atoi(argv[1]);
  size_t megabytes = std::strtoul(argv[2], nullptr, 10);
  std::printf("{\"read_bytes_per_second\": %.4g, \"fma_flops_per_second\": %.4g}\n",
              read_bytes_per_second(threads, megabytes), fma_flops_per_second(threads));
  return 0;
}
