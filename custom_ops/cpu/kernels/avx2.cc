// The kernels for AVX2.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

// After every header with code of its own: what those define is shared by the whole program and must run on
// processors without these instructions.
#pragma GCC target("avx2,fma,f16c,bmi2")
#include <immintrin.h>

#define FD_NAMESPACE avx2
#define FD_AVX2
#define FD_MAX_HEIGHT 3
#include "kernels/kernels.inl"
