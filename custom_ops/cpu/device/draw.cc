// Draws of tokens from logits.
#include <algorithm>

#include "device/enqueue.h"
#include "kernels/kernels.h"
#include "sample.h"
#include "workspace.h"

namespace fd {
namespace {

static_assert(sizeof(fd_sampling_row) == sizeof(SamplingRow));

void check_rows(const fd_device& device, const fd_draw_args& args) {
  const int64_t entries = device.plan.after(args.tokens) / static_cast<int64_t>(sizeof(TokenCount));
  for (const fd_sampling_row* row = args.rows; row < args.rows + *args.count; ++row) {
    require(row->first_token >= 0 && row->num_seen >= 0 && row->num_masked >= 0 && row->num_biased >= 0 &&
                row->num_mask_entries >= 0 &&
                int64_t{row->first_token} + row->num_seen + row->num_masked + row->num_biased +
                        row->num_mask_entries <=
                    entries,
            "draw: the tokens of a row reach beyond the end of the plan");
    require(row->logprobs < args.width, "draw: a row wants more log probabilities than the width has room for");
    require(row->given >= 0 && row->given <= args.vocabulary, "draw: a given token is not in the vocabulary");
  }
}

void run_draw(const fd_device& device, const fd_draw_args& args) {
  const int64_t count = *args.count, vocabulary = args.vocabulary;
  Workspace& workspace = Workspace::fresh();
  int64_t* const drawn = workspace.take<int64_t>(count);
  if (args.rows == nullptr) {
    const Argmax argmax_args{args.logits, count, vocabulary, drawn,
                             workspace.take<float>(num_threads() * token_blocks(vocabulary))};
    run_team([&](Team& team) { argmax(team, argmax_args); });
  } else {
    check_rows(device, args);
    const Sampling sampling{args.logits,
                            count,
                            vocabulary,
                            reinterpret_cast<const SamplingRow*>(args.rows),
                            reinterpret_cast<const TokenCount*>(args.tokens),
                            drawn,
                            args.top_tokens,
                            args.logprobs,
                            args.width,
                            workspace.take<std::byte>(num_threads() * sampling_scratch(vocabulary))};
    run_team([&](Team& team) { sample(team, sampling); });
  }
  std::copy(drawn, drawn + count, args.drawn);
}

}  // namespace
}  // namespace fd

using namespace fd;

extern "C" {

int64_t fd_draw_work_bytes(int32_t) { return 0; }

int fd_draw(void* stream, const fd_draw_args* args) {
  if (args->vocabulary < 1) return refuse("draw: a vocabulary of at least 1 token");
  return enqueue(stream, run_draw, *args);
}

}  // extern "C"
