// The kernels for AVX512.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

// After every header with code of its own: what those define is shared by the whole program and must run on
// processors without these instructions.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#include <immintrin.h>

#define FD_NAMESPACE avx512
#define FD_AVX512
#define FD_MAX_HEIGHT 12
#include "kernels/kernels.inl"
