// custom_ops/cpu/philox.h for the device, with bit-identical random numbers.
#pragma once

#include <cstdint>

namespace fd::cuda {

__device__ inline double uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  uint32_t counter[4] = {position, choice, 0, 0}, key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = counter[0] * uint64_t{0xD2511F53}, product1 = counter[2] * uint64_t{0xCD9E8D57};
    counter[0] = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0];
    counter[2] = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1];
    counter[1] = static_cast<uint32_t>(product1), counter[3] = static_cast<uint32_t>(product0);
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  return static_cast<double>(uint64_t{counter[0] >> 5} << 26 | counter[1] >> 6) * 0x1p-53;
}

}  // namespace fd::cuda
