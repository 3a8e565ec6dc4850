#pragma once

#include "sample.h"
#include "tensors.h"
#include "workspace.h"

namespace fd::binding {

// Checks that there is one SamplingRow per row of logits and that its tokens exist.
inline const SamplingRow* sampling_rows(const paddle::Tensor& rows, int64_t count, int64_t vocabulary,
                                        const paddle::Tensor& tokens, int width) {
  require(rows.dtype() == paddle::DataType::UINT8 && rows.numel() == count * int64_t{sizeof(SamplingRow)},
          "sample: rows must hold the bytes of one SamplingRow for each row of logits");
  require(tokens.dtype() == paddle::DataType::INT32, "sample: tokens must be int32");
  const auto* params = reinterpret_cast<const SamplingRow*>(rows.data<uint8_t>());
  for (const SamplingRow* row = params; row < params + count; ++row) {
    require(row->first_token >= 0 && row->num_seen >= 0 && row->num_masked >= 0 && row->num_biased >= 0 &&
                row->num_mask_entries >= 0 &&
                int64_t{row->first_token} + row->num_seen + row->num_masked + row->num_biased +
                        row->num_mask_entries <=
                    tokens.numel() / 2,
            "sample: the tokens of a row reach beyond the end");
    require(row->logprobs < width, "sample: a row wants more log probabilities than the width has room for");
    require(row->given >= 0 && row->given <= vocabulary, "sample: a given token is not in the vocabulary");
  }
  return params;
}

inline std::vector<paddle::Tensor> run_sample(const paddle::Tensor& logits, const paddle::Tensor& rows,
                                              const paddle::Tensor& tokens, int width) {
  const int64_t count = logits.dims()[0], vocabulary = logits.dims()[1];
  const paddle::CPUPlace cpu;
  paddle::Tensor drawn = paddle::empty({count}, paddle::DataType::INT64, cpu);
  paddle::Tensor top_tokens = paddle::empty({count, width}, paddle::DataType::INT32, cpu);
  paddle::Tensor logprobs = paddle::empty({count, width}, paddle::DataType::FLOAT64, cpu);
  const Sampling args{
      .logits = floats(logits, count * vocabulary, "sample: logits"),
      .rows = count,
      .vocabulary = vocabulary,
      .params = sampling_rows(rows, count, vocabulary, tokens, width),
      .tokens = reinterpret_cast<const TokenCount*>(tokens.data<int32_t>()),
      .drawn = drawn.data<int64_t>(),
      .top_tokens = top_tokens.data<int32_t>(),
      .logprobs = logprobs.data<double>(),
      .width = width,
      .scratch = Workspace::fresh().take<std::byte>(num_threads() * sampling_scratch(vocabulary)),
  };
  run_team([&](Team& team) { sample(team, args); });
  return {drawn, top_tokens, logprobs};
}

inline Shapes shape_sample(const Shape& logits, const Shape&, const Shape&, int width) {
  return {{logits[0]}, {logits[0], width}, {logits[0], width}};
}
inline Types type_sample(paddle::DataType, paddle::DataType, paddle::DataType) {
  return {paddle::DataType::INT64, paddle::DataType::INT32, paddle::DataType::FLOAT64};
}

inline std::vector<paddle::Tensor> run_argmax(const paddle::Tensor& logits) {
  const int64_t count = logits.dims()[0], vocabulary = logits.dims()[1];
  paddle::Tensor drawn = paddle::empty({count}, paddle::DataType::INT64, paddle::CPUPlace());
  const Argmax args{floats(logits, count * vocabulary, "argmax: logits"), count, vocabulary,
                    drawn.data<int64_t>(),
                    Workspace::fresh().take<float>(num_threads() * token_blocks(vocabulary))};
  run_team([&](Team& team) { argmax(team, args); });
  return {drawn};
}

inline Shapes shape_argmax(const Shape& logits) { return {{logits[0]}}; }
inline Types type_argmax(paddle::DataType) { return {paddle::DataType::INT64}; }

}  // namespace fd::binding

PD_BUILD_OP(fd_sample)
    .Inputs({"Logits", "Rows", "Tokens"})
    .Outputs({"Drawn", "TopTokens", "Logprobs"})
    .Attrs({"width: int"})
    .SetKernelFn(FD_KERNEL(run_sample))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_sample))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_sample));

PD_BUILD_OP(fd_argmax)
    .Inputs({"Logits"})
    .Outputs({"Drawn"})
    .SetKernelFn(FD_KERNEL(run_argmax))
    .SetInferShapeFn(PD_INFER_SHAPE(fd::binding::shape_argmax))
    .SetInferDtypeFn(PD_INFER_DTYPE(fd::binding::type_argmax));
