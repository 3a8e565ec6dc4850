// The kernels in plain C++, for any x86-64.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/kernels.h"

#define FD_NAMESPACE generic
#define FD_MAX_HEIGHT 2
#include "kernels/kernels.inl"
