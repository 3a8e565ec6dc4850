#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

namespace fd {
namespace {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// True if the processor has AMX and Linux permits it: because of the large tile state, a process must request it.
bool has_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Kernels& choose() {
  __builtin_cpu_init();
  const char* asked = std::getenv("FD_ISA");
  if (asked == nullptr || *asked == '\0') {
    if (has_amx()) return amx::table();
    return has_avx512() ? avx512::table : has_avx2() ? avx2::table : generic::table;
  }
  const std::string name = asked;
  if (name == "generic") return generic::table;
  if (name == "avx2" && has_avx2()) return avx2::table;
  if (name == "avx512" && has_avx512()) return avx512::table;
  if (name == "amx" && has_amx()) return amx::table();
  throw std::invalid_argument("FD_ISA is '" + name + "'; this processor has generic" +
                              (has_avx2() ? ", avx2" : "") + (has_avx512() ? ", avx512" : "") +
                              (has_amx() ? ", amx" : ""));
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fd
