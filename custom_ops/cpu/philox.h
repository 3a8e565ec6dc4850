// Philox 4x32-10 (Salmon et al., SC 2011): a counter-based random number generator.
#pragma once

#include <array>
#include <cstdint>

namespace fd {

// Ten rounds over four 32-bit words, as specified.
inline std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = counter[0] * uint64_t{0xD2511F53};
    const uint64_t product1 = counter[2] * uint64_t{0xCD9E8D57};
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

// The random number in [0, 1) for the token at `position` of a text. There is no generator state, so a retried,
// preempted or migrated request draws the same numbers again.
inline double uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  const auto words = philox4x32({position, choice, 0, 0},
                                {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  // 53 random bits: the precision of a double.
  return static_cast<double>(uint64_t{words[0] >> 5} << 26 | words[1] >> 6) * 0x1p-53;
}

}  // namespace fd
