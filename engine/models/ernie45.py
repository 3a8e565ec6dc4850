"""ERNIE-4.5, dense and mixture of experts: its weights, and what it computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import paddle

from .. import custom_ops
from ..config import ModelConfig
from .kv_cache import KVCache

if TYPE_CHECKING:
    from ..expert_parallel.group import ExpertGroup


@dataclass(frozen=True, slots=True)
class MLPWeights:
    """down(silu(gate(x)) * up(x)); packed, gate and up in turns of 16 outputs. Experts: stacks of them."""

    gate_up: paddle.Tensor
    down: paddle.Tensor


@dataclass(frozen=True, slots=True)
class MoEWeights:
    #: Packed, always float32: picks near ties would flip otherwise.
    router: paddle.Tensor
    #: [E], added to the router's probabilities for the choice of experts only.
    correction_bias: paddle.Tensor
    experts: MLPWeights
    #: All shared experts as one MLP of their joint width.
    shared: MLPWeights | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    #: [H]
    input_norm: paddle.Tensor
    #: Packed; the outputs of q, then of k, then of v.
    qkv: paddle.Tensor
    #: Packed.
    attention_output: paddle.Tensor
    #: [H]
    post_attention_norm: paddle.Tensor
    mlp: MLPWeights | MoEWeights


@dataclass(frozen=True, slots=True)
class Weights:
    #: [vocabulary, H], float32 or bfloat16.
    embedding: paddle.Tensor
    layers: tuple[LayerWeights, ...]
    #: [H]
    final_norm: paddle.Tensor
    #: Packed; a copy of the embedding when the two are tied.
    lm_head: paddle.Tensor


class Ernie45:
    """The network. It holds weights only: everything about a step or a sequence comes in as an argument."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights

    def forward(
        self, step: paddle.Tensor, caches: Sequence[KVCache], group: ExpertGroup | None = None
    ) -> paddle.Tensor:
        """Runs all layers over the tokens of one step.

        Args:
            step: int32, see `StepBuffer`.
            caches: one per layer; the tokens' keys and values are written there.
            group: the ranks that share the experts, all of which are in this step; None: all experts are
            here.

        Raises:
            GroupChanged: a rank was lost on the way. Whatever was written is written again by the next try.

        Returns:
            The residual stream [T, H], for `logits`.
        """
        config, weights = self.config, self.weights
        epsilon = config.rms_norm_eps
        stream = custom_ops.embedding(weights.embedding, step)
        turns = custom_ops.rotation(step, config.rope_theta, config.head_dim)
        num_moe_layers = 0
        for layer, cache in zip(weights.layers, caches, strict=True):
            custom_ops.attention_block(
                stream,
                step,
                layer.input_norm,
                layer.qkv,
                layer.attention_output,
                turns,
                cache.key,
                cache.value,
                epsilon,
            )
            norm, mlp = layer.post_attention_norm, layer.mlp
            if isinstance(mlp, MLPWeights):
                custom_ops.mlp_block(stream, norm, mlp.gate_up, mlp.down, epsilon)
            else:
                self._moe(stream, norm, mlp, group, num_moe_layers)
                num_moe_layers += 1
        return stream

    def logits(self, stream: paddle.Tensor, step: paddle.Tensor) -> paddle.Tensor:
        """Logits [rows, vocabulary] of those rows of the stream that the step wants."""
        weights = self.weights
        return custom_ops.logits(stream, step, weights.final_norm, weights.lm_head, self.config.rms_norm_eps)

    def assist(self, group: ExpertGroup) -> None:
        """Takes part in a step of the other ranks: no tokens, no attention, only this rank's experts.

        Raises:
            GroupChanged: a rank was lost on the way.
        """
        stream = paddle.empty([0, self.config.hidden_size])
        layers = [layer for layer in self.weights.layers if isinstance(layer.mlp, MoEWeights)]
        for index, layer in enumerate(layers):
            assert isinstance(layer.mlp, MoEWeights)
            self._moe(stream, layer.post_attention_norm, layer.mlp, group, index)

    def _moe(
        self,
        stream: paddle.Tensor,
        norm: paddle.Tensor,
        mlp: MoEWeights,
        group: ExpertGroup | None,
        layer: int,
    ) -> None:
        config, shared = self.config, mlp.shared
        arguments = (
            stream,
            norm,
            mlp.router,
            mlp.correction_bias,
            mlp.experts.gate_up,
            mlp.experts.down,
            None if shared is None else shared.gate_up,
            None if shared is None else shared.down,
            config.rms_norm_eps,
            config.moe_k,
            config.moe_norm_min,
        )
        if group is None:
            custom_ops.moe_block(*arguments)
        else:
            custom_ops.ep_moe_block(*arguments, group.handle, layer)
            group.check()
