"""The mixture-of-experts layer: router, routed experts, and the shared experts that every token takes."""

from __future__ import annotations

from dataclasses import dataclass

import paddle

from ..custom_ops import MLPWeights, Projection, fused_moe, linear, moe_topk_select, swiglu_mlp


@dataclass(frozen=True, slots=True)
class MoEWeights:
    router: Projection
    #: [E], added to the router's probabilities for the choice of experts only.
    correction_bias: paddle.Tensor
    experts: tuple[MLPWeights, ...]
    #: All shared experts as one MLP of their joint width.
    shared: MLPWeights | None


def moe(h: paddle.Tensor, weights: MoEWeights, k: int, norm_min: float) -> paddle.Tensor:
    """h [T, H] -> [T, H]."""
    picks, scales = moe_topk_select(linear(h, weights.router), weights.correction_bias, k, norm_min)
    routed = fused_moe(h, picks, scales, weights.experts)
    return routed if weights.shared is None else routed + swiglu_mlp(h, weights.shared)
