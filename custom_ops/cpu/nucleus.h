// Top-p (nucleus) filtering.
#pragma once

#include <cstdint>

namespace fd {

// Keeps the fewest largest weights that together reach `top_p` of the total, at least one, and sets the others to zero.
// Among equal weights the first ones are kept.
//
// `weights` (each 0..1, zero from index `count` on) and `buffer` have room for whole blocks of 64; `sums` holds the sum
// of each block and is updated.
void keep_nucleus(double* weights, double* sums, int64_t count, double top_p, double* buffer);

}  // namespace fd
