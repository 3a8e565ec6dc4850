// The kernels for AVX-512.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

// Must follow all headers that define functions: the linker keeps one copy of those for the whole program, and it must
// run on processors without these instructions.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#include <immintrin.h>

#define FD_NAMESPACE avx512
#define FD_AVX512
#define FD_MAX_HEIGHT 12
#include "kernels/kernels.inl"
