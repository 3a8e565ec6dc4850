"""The operations of a device that the network is written in."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

#: Memory of a device, opaque to the network: a tensor of Paddle, or an address on a GPU.
Buffer: TypeAlias = Any


class Operations(Protocol):
    """One call per block of a layer; see `custom_ops` for what each computes.

    Hidden states are float32 [T, H], a "step" is what the device made of the batch, and matrices are in the
    device's own layout. An operation may only enqueue its work: the device knows when a step is done.
    """

    def embedding(self, table: Buffer, step: Buffer) -> Buffer:
        """Return the hidden states of the step's tokens."""
        ...

    def rotary_embedding(self, step: Buffer, theta: float, head_dim: int) -> Buffer:
        """Return cosine and sine of each position, which all layers share."""
        ...

    def attention_block(
        self,
        hidden_states: Buffer,
        step: Buffer,
        norm: Buffer,
        qkv: Buffer,
        output: Buffer,
        rotary_cos_sin: Buffer,
        keys: Buffer,
        values: Buffer,
        epsilon: float,
    ) -> None:
        """Add the attention of a layer to the hidden states; write keys and values to its cache."""
        ...

    def mlp_block(
        self, hidden_states: Buffer, norm: Buffer, gate_up: Buffer, down: Buffer, epsilon: float
    ) -> None:
        """Add the dense MLP of a layer to the hidden states."""
        ...

    def moe_block(
        self,
        hidden_states: Buffer,
        norm: Buffer,
        router: Buffer,
        bias: Buffer,
        gate_up: Buffer,
        down: Buffer,
        shared_gate_up: Buffer | None,
        shared_down: Buffer | None,
        epsilon: float,
        k: int,
        norm_min: float,
    ) -> object:
        """Add the routed and shared experts of a layer to the hidden states."""
        ...

    def ep_moe_block(
        self,
        hidden_states: Buffer,
        norm: Buffer,
        router: Buffer,
        bias: Buffer,
        gate_up: Buffer,
        down: Buffer,
        shared_gate_up: Buffer | None,
        shared_down: Buffer | None,
        epsilon: float,
        k: int,
        norm_min: float,
        group: int,
        layer: int,
    ) -> object:
        """Do the same as a collective of a group of ranks that share the experts."""
        ...

    def logits(
        self, hidden_states: Buffer, step: Buffer, norm: Buffer, lm_head: Buffer, epsilon: float
    ) -> Buffer:
        """Return the logits of the rows that the step selects."""
        ...
