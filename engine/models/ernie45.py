"""The ERNIE-4.5 network, dense or mixture of experts.

Shapes: T is the number of tokens in a step, H the hidden size, E the number of routed experts.
"""

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
    """Packed matrices of down(silu(gate(x)) * up(x)); stacks of matrices for routed experts.

    gate and up are one matrix, interleaved 16 outputs at a time.
    """

    gate_up: paddle.Tensor
    down: paddle.Tensor


@dataclass(frozen=True, slots=True)
class MoEWeights:
    #: Packed, always float32: less precision would change the selected experts near ties.
    router: paddle.Tensor
    #: [E], added to the router's probabilities for the selection of experts only.
    correction_bias: paddle.Tensor
    experts: MLPWeights
    #: All shared experts as one MLP of their total width.
    shared: MLPWeights | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    #: [H]
    input_norm: paddle.Tensor
    #: Packed; outputs of q, k and v in this order.
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
    #: Packed; a copy of the embedding if they are tied.
    lm_head: paddle.Tensor


class Ernie45:
    """The network. It holds only weights; steps and caches are arguments."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights

    def forward(
        self, step: paddle.Tensor, caches: Sequence[KVCache], group: ExpertGroup | None = None
    ) -> paddle.Tensor:
        """Run all layers on the tokens of one step.

        Args:
            step: int32, see `StepBuffer`.
            caches: one per layer; receive the keys and values of the tokens.
            group: the ranks that share the experts, all of which take part in this step; None: all experts
                are local.

        Raises:
            GroupChanged: the members have changed. Repeating the step overwrites everything written so far.

        Returns:
            The hidden states float32 [T, H], for `logits`.
        """
        config, weights = self.config, self.weights
        epsilon = config.rms_norm_eps
        hidden_states = custom_ops.embedding(weights.embedding, step)
        rotary_cos_sin = custom_ops.rotary_embedding(step, config.rope_theta, config.head_dim)
        num_moe_layers = 0
        for layer, cache in zip(weights.layers, caches, strict=True):
            custom_ops.attention_block(
                hidden_states,
                step,
                layer.input_norm,
                layer.qkv,
                layer.attention_output,
                rotary_cos_sin,
                cache.key,
                cache.value,
                epsilon,
            )
            norm, mlp = layer.post_attention_norm, layer.mlp
            if isinstance(mlp, MLPWeights):
                custom_ops.mlp_block(hidden_states, norm, mlp.gate_up, mlp.down, epsilon)
            else:
                self._moe_block(hidden_states, norm, mlp, group, num_moe_layers)
                num_moe_layers += 1
        return hidden_states

    def logits(self, hidden_states: paddle.Tensor, step: paddle.Tensor) -> paddle.Tensor:
        """Return the logits, float32 [rows, vocabulary], of the rows that the step selects."""
        weights = self.weights
        return custom_ops.logits(
            hidden_states, step, weights.final_norm, weights.lm_head, self.config.rms_norm_eps
        )

    def execute_dummy_batch(self, group: ExpertGroup) -> None:
        """Take part in a step in which this rank has no tokens: compute its experts for the other ranks.

        Raises:
            GroupChanged: the members have changed.
        """
        hidden_states = paddle.empty([0, self.config.hidden_size])
        layers = [layer for layer in self.weights.layers if isinstance(layer.mlp, MoEWeights)]
        for index, layer in enumerate(layers):
            assert isinstance(layer.mlp, MoEWeights)
            self._moe_block(hidden_states, layer.post_attention_norm, layer.mlp, group, index)

    def _moe_block(
        self,
        hidden_states: paddle.Tensor,
        norm: paddle.Tensor,
        mlp: MoEWeights,
        group: ExpertGroup | None,
        layer: int,
    ) -> None:
        config, shared = self.config, mlp.shared
        arguments = (
            hidden_states,
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
