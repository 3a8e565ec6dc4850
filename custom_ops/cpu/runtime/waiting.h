// Helpers for loops that wait for other threads or processes.
#pragma once

#include <time.h>

#include <cstdint>

namespace fd {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// CLOCK_MONOTONIC in nanoseconds, comparable between processes of a machine.
inline int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

}  // namespace fd
