// The fewest most likely tokens whose share reaches top_p.
#pragma once

#include <cstdint>

namespace fd {

// Sets all weights to zero but the largest of them that together reach `top_p` of the sum of all: as few as
// possible, at least one, the first ones among equals.
//
// `weights` (each 0..1) and `buffer` have room for whole blocks of 64, behind `count` weights are zero;
// `sums` are those of the blocks.
void keep_nucleus(double* weights, double* sums, int64_t count, double top_p, double* buffer);

}  // namespace fd
