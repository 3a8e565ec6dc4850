"""A replica as a rank of an expert-parallel group: what all of them must agree on, and how it joins."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..config import EngineConfig, ModelConfig
from ..cpu_share import CpuShare
from ..custom_ops import instruction_set
from ..models.ernie45 import MoEWeights, Weights
from ..weight_cache import Packing
from .group import ExpertGroup, GroupOptions, join
from .memory import Layout
from .residency import ExpertPages

#: Tokens of a rank in one collective. A step with more takes several: what travels must fit into the shared
#: memory that a container has, and for so many rows an expert's weights are well worth reading.
_ROUND_TOKENS = 128


def join_group(config: EngineConfig, model: ModelConfig, weights: Weights, share: CpuShare) -> ExpertGroup:
    """Joins the group that `config` names, as the rank that it names.

    Raises:
        ConfigError: see `group.join`.
    """
    pages = [
        ExpertPages((layer.mlp.experts.gate_up, layer.mlp.experts.down), model.moe_num_experts)
        for layer in weights.layers
        if isinstance(layer.mlp, MoEWeights)
    ]
    layout = Layout(
        num_seats=config.data_parallel_size,
        num_layers=model.num_moe_layers,
        num_experts=model.moe_num_experts,
        max_tokens=min(_ROUND_TOKENS, config.max_num_batched_tokens),
        k=model.moe_k,
        hidden=model.hidden_size,
    )

    def on_placement(mine: Sequence[frozenset[int]], taken: Sequence[frozenset[int]]) -> None:
        for layer, held, new in zip(pages, mine, taken, strict=True):
            layer.hold(held, new)

    options = GroupOptions(
        name=config.expert_parallel_group,
        seat=config.data_parallel_rank,
        redundant_experts=config.redundant_experts,
        rebalance=config.enable_eplb,
        stall_after=min(10.0, config.expert_parallel_stall_kill / 2),
        stall_kill=config.expert_parallel_stall_kill,
        spin=share.threads * config.data_parallel_size <= len(os.sched_getaffinity(0)),
    )
    return join(
        options,
        layout,
        _fingerprint(config),
        on_placement,
    )


def _fingerprint(config: EngineConfig) -> dict[str, object]:
    """What texts depend on."""
    packing = Packing(config.model, config.weight_format, config.qkv_order).metadata()
    return {
        "checkpoint": packing["checkpoint"],
        "weights": packing["source"][:16],
        "weight_format": config.weight_format,
        "qkv_order": config.qkv_order,
        "instruction_set": instruction_set(),
        "redundant_experts": config.redundant_experts,
    }
