"""The ERNIE-4.5 network, dense or mixture of experts.

Shapes: T is the number of tokens in a step, H the hidden size, E the number of routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .. import custom_ops
from ..config import ModelConfig
from .operations import Buffer, Operations

if TYPE_CHECKING:
    from ..expert_parallel.group import ExpertGroup


@dataclass(frozen=True, slots=True)
class MLPWeights:
    """Packed matrices of down(silu(gate(x)) * up(x)); stacks of matrices for routed experts.

    gate and up are one matrix, interleaved 16 outputs at a time.
    """

    gate_up: Buffer
    down: Buffer


@dataclass(frozen=True, slots=True)
class MoEWeights:
    #: Packed, always float32: less precision would change the selected experts near ties.
    router: Buffer
    #: [E], added to the router's probabilities for the selection of experts only.
    correction_bias: Buffer
    experts: MLPWeights
    #: All shared experts as one MLP of their total width.
    shared: MLPWeights | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    #: [H]
    input_norm: Buffer
    #: Packed; outputs of q, k and v in this order.
    qkv: Buffer
    #: Packed.
    attention_output: Buffer
    #: [H]
    post_attention_norm: Buffer
    mlp: MLPWeights | MoEWeights


@dataclass(frozen=True, slots=True)
class Weights:
    #: [vocabulary, H], float32 or bfloat16.
    embedding: Buffer
    layers: tuple[LayerWeights, ...]
    #: [H]
    final_norm: Buffer
    #: Packed; a copy of the embedding if they are tied.
    lm_head: Buffer


class LayerCache(Protocol):
    """Keys and values of one layer, in the layout of the device."""

    @property
    def key(self) -> Buffer: ...
    @property
    def value(self) -> Buffer: ...


class Ernie45:
    """The network. It holds only weights; steps and caches are arguments."""

    def __init__(self, config: ModelConfig, weights: Weights, operations: Operations = custom_ops) -> None:
        self.config = config
        self.weights = weights
        self._operations = operations

    def forward(self, step: Buffer, caches: Sequence[LayerCache], group: ExpertGroup | None = None) -> Buffer:
        """Run all layers on the tokens of one step.

        Args:
            step: the batch, as the device has encoded it.
            caches: one per layer; receive the keys and values of the tokens.
            group: the ranks that share the experts, all of which take part in this step; None: all experts
                are local.

        Raises:
            GroupChanged: the members have changed. Repeating the step overwrites everything written so far.

        Returns:
            The hidden states float32 [T, H], for `logits`.
        """
        config, weights, operations = self.config, self.weights, self._operations
        epsilon = config.rms_norm_eps
        hidden_states = operations.embedding(weights.embedding, step)
        rotary_cos_sin = operations.rotary_embedding(step, config.rope_theta, config.head_dim)
        num_moe_layers = 0
        for layer, cache in zip(weights.layers, caches, strict=True):
            operations.attention_block(
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
                operations.mlp_block(hidden_states, norm, mlp.gate_up, mlp.down, epsilon)
            else:
                self._moe_block(hidden_states, norm, mlp, group, num_moe_layers)
                num_moe_layers += 1
        return hidden_states

    def logits(self, hidden_states: Buffer, step: Buffer) -> Buffer:
        """Return the logits, float32 [rows, vocabulary], of the rows that the step selects."""
        weights = self.weights
        return self._operations.logits(
            hidden_states, step, weights.final_norm, weights.lm_head, self.config.rms_norm_eps
        )

    def execute_dummy_batch(self, group: ExpertGroup, hidden_states: Buffer) -> None:
        """Take part in a step in which this rank has no tokens: compute its experts for the other ranks.

        Args:
            hidden_states: [0, H].

        Raises:
            GroupChanged: the members have changed.
        """
        layers = [layer for layer in self.weights.layers if isinstance(layer.mlp, MoEWeights)]
        for index, layer in enumerate(layers):
            assert isinstance(layer.mlp, MoEWeights)
            self._moe_block(hidden_states, layer.post_attention_norm, layer.mlp, group, index)

    def _moe_block(
        self,
        hidden_states: Buffer,
        norm: Buffer,
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
            self._operations.moe_block(*arguments)
        else:
            self._operations.ep_moe_block(*arguments, group.handle, layer)
            group.check()
