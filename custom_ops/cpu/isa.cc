#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fd {
namespace {

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Kernels& choose() {
  __builtin_cpu_init();
  const char* asked = std::getenv("FD_ISA");
  if (asked == nullptr || *asked == '\0') {
    return has_avx512() ? avx512::table : has_avx2() ? avx2::table : generic::table;
  }
  const std::string name = asked;
  if (name == "generic") return generic::table;
  if (name == "avx2" && has_avx2()) return avx2::table;
  if (name == "avx512" && has_avx512()) return avx512::table;
  throw std::invalid_argument("FD_ISA is '" + name + "'; this processor has generic" +
                              (has_avx2() ? ", avx2" : "") + (has_avx512() ? ", avx512" : ""));
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fd
