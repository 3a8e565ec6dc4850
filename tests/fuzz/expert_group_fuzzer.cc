// libFuzzer target: one rank of an expert-parallel group, whose other ranks write arbitrary words at any moment.
//
// The input is a list of words that are written into the parts of the others. Whatever the rank under test reads, it
// must not access memory outside of the group, write into another part than its own, or wait forever.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "expert_group.h"

namespace {

constexpr int kRanks = 3, kExperts = 4, kMaxTokens = 4, kPicks = 2, kHidden = 8, kElement = 4, kTokens = 3;
constexpr int64_t kPage = 4096, kFirstRank = kPage, kRankBytes = 3 * kPage, kBytes = kFirstRank + kRanks * kRankBytes;
constexpr int64_t kServed = 128, kTargets = 192, kPlaces = 256, kTokenRows = kPage, kResults = 2 * kPage;
constexpr uint64_t kEpoch = 1, kStamp = kEpoch << 40 | 1;

const fd::GroupShape kShape{0,          kRanks,     1,       kExperts, kMaxTokens, kPicks,     kHidden, 0,
                            kFirstRank, kRankBytes, kServed, kTargets, kPlaces,    kTokenRows, kResults};

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

struct Memory {
  Memory() {
    file = memfd_create("group", MFD_CLOEXEC);
    require(file >= 0 && ftruncate(file, kBytes) == 0, "no memory for the group");
    // Inaccessible pages on both sides detect accesses beyond the ends.
    auto* const whole = static_cast<uint8_t*>(mmap(nullptr, kBytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    bytes = static_cast<uint8_t*>(mmap(whole + kPage, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0));
    int ends[2];
    require(bytes != MAP_FAILED && pipe(ends) == 0, "no memory for the group");
    close(ends[1]);
    // Readable like the pidfd of a dead process, so that no wait for the rank blocks.
    dead = ends[0];
  }

  uint8_t* part(int rank) const { return bytes + kFirstRank + rank * kRankBytes; }

  // Initially no rank has a fault.
  void reset() const {
    std::memset(bytes, 0, kBytes);
    reinterpret_cast<fd::GroupWords*>(bytes)->epoch = kEpoch;
    for (int rank = 1; rank < kRanks; ++rank) {
      auto& row = *reinterpret_cast<fd::RankRow*>(part(rank));
      row.arrived = kEpoch;
      row.begun = row.dispatched = row.combined = kStamp;
      row.step_tokens[1] = kTokens;
      row.tokens = kTokens << 8 | kElement;
      auto* const dispatch_targets = reinterpret_cast<int32_t*>(part(rank) + kTargets);
      for (int i = 0; i < kTokens * kPicks; ++i) dispatch_targets[i] = i % kExperts << 6 | i % kRanks;
    }
  }

  int file, dead;
  uint8_t* bytes;
};

struct Input {
  const uint8_t* data;
  size_t size;

  // Writes the next words of the input, up to one that ends this round.
  void corrupt(const Memory& memory) {
    while (size >= 11) {
      const int rank = 1 + data[0] % (kRanks - 1);
      const bool is_last = data[0] & 0x80;
      // A word of the row, the targets or the places.
      const int64_t offset = (data[1] | data[2] << 8) % kPage / 4 * 4;
      std::memcpy(memory.part(rank) + std::min<int64_t>(offset, kPage - 8), data + 3, 8);
      data += 11;
      size -= 11;
      if (is_last) return;
    }
  }
};

void run(const Memory& memory, Input input, int32_t picks_of) {
  const uint64_t expert_ranks[kExperts] = {1, 2, 4, 3};
  const int pidfds[kRanks] = {-1, memory.dead, memory.dead};
  fd::ExpertGroup group(kShape, memory.bytes, memory.file, [](int, double, int) {}, 1'000'000'000, 2'000'000'000);
  group.set_members(kEpoch, 0b111, expert_ranks, pidfds, 0);
  input.corrupt(memory);
  group.announce(kTokens);
  if (group.begin() != fd::ExpertGroup::kGoing) return;
  require(0 < group.rounds() && group.rounds() <= fd::kMaxStepTokens, "impossible number of rounds");
  require(group.token_rows(kTokens, kElement) != nullptr, "no room for tokens");
  int32_t topk_ids[kTokens * kPicks];
  for (int i = 0; i < kTokens * kPicks; ++i) topk_ids[i] = (picks_of >> 2 * i & 7) % (kExperts + 1) - 1;
  group.route(0, topk_ids, kTokens);
  group.publish_tokens(kTokens, kElement);
  input.corrupt(memory);
  if (!group.await_tokens()) return;
  std::vector<uint8_t> others(memory.part(1), memory.bytes + kBytes);
  fd::Received received;
  const bool is_whole = group.receive(fd::Workspace::fresh(), 0, kElement, received);
  require(std::memcmp(others.data(), memory.part(1), others.size()) == 0, "it has written into another rank's part");
  if (!is_whole) return;
  require(0 <= received.rows && received.rows <= kRanks * kMaxTokens * kPicks, "impossible number of rows");
  require(received.offsets[0] == 0 && received.offsets[kExperts] == received.rows, "invalid offsets");
  double sum = 0;
  for (int row = 0; row < received.rows; ++row) {
    for (int i = 0; i < kHidden; ++i) sum += static_cast<const float*>(received.sources[row])[i];
    require(0 <= received.source_token_index[row * 3] && received.source_token_index[row * 3] < kRanks,
            "a row of an unknown rank");
    require(0 <= received.source_token_index[row * 3 + 1] && received.source_token_index[row * 3 + 1] < kMaxTokens,
            "a row of an unknown token");
  }
  if (received.rows > 0) require(group.result_rows(received.rows, kElement) != nullptr, "no room for results");
  group.publish_results();
  input.corrupt(memory);
  if (!group.await_results()) return;
  for (int token = 0; token < kTokens; ++token) {
    for (int pick = 0; pick < kPicks; ++pick) {
      const auto* const row = static_cast<const float*>(group.result(token, pick, kElement));
      for (int i = 0; row != nullptr && i < kHidden; ++i) sum += row[i];
    }
  }
  volatile double keep = sum;
  (void)keep;
  if (!group.results_are_whole()) require(0 <= group.faulty() && group.faulty() < kRanks, "a fault of an unknown rank");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Memory memory;
  if (size < 4) return 0;
  int32_t topk_ids;
  std::memcpy(&topk_ids, data, 4);
  memory.reset();
  run(memory, {data + 4, size - 4}, topk_ids);
  return 0;
}
