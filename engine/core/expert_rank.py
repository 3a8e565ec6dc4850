"""A replica as a rank of an expert-parallel group."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from ..config import EngineConfig, ModelConfig
from ..custom_ops import instruction_set
from ..expert_parallel.group import ExpertGroup, GroupOptions, join
from ..expert_parallel.layout import Layout
from ..expert_parallel.residency import ExpertPages
from ..models.ernie45 import MoEWeights
from ..weights.weight_cache import Packing
from .cpu_share import CpuShare
from .model_runner import ModelRunner

#: Maximum tokens of a rank in one collective; a step with more takes several. The exchange buffers must fit
#: into the shared memory of a container, and 128 rows are enough to amortise reading the weights of an
#: expert.
_ROUND_TOKENS = 128
#: Less than the time that the API process gives a worker to end.
_LEAVE_SECONDS = 3.0


class Rank:
    """A member of the group and its work for the other ranks."""

    def __init__(self, group: ExpertGroup, runner: ModelRunner) -> None:
        self.group = group
        self._runner = runner

    @classmethod
    def join(cls, config: EngineConfig, model: ModelConfig, runner: ModelRunner, share: CpuShare) -> Rank:
        """Join the group named by `config`; `runner` then computes together with the other ranks.

        Raises:
            ConfigError: see `group.join`.
        """
        pages = [
            ExpertPages((layer.mlp.experts.gate_up, layer.mlp.experts.down), model.moe_num_experts)
            for layer in runner.model.weights.layers
            if isinstance(layer.mlp, MoEWeights)
        ]

        def on_placement(mine: Sequence[frozenset[int]], taken: Sequence[frozenset[int]]) -> None:
            for layer, held, new in zip(pages, mine, taken, strict=True):
                layer.hold(held, new)

        runner.group = join(
            _options(config, share), _layout(config, model), _fingerprint(config), on_placement
        )
        return cls(runner.group, runner)

    @property
    def is_wanted(self) -> bool:
        """True if another rank has begun a step or is about to."""
        return self.group.awake or self.group.is_called

    def execute_dummy_batch(self) -> None:
        """Take part in a step of the other ranks, if there is one."""
        self.group.attend()
        if self.is_wanted:
            self._runner.execute_dummy_batch()

    def leave(self) -> None:
        """Leave the group between two steps; the other ranks take over this rank's experts."""
        self.group.request_leave()
        deadline = time.monotonic() + _LEAVE_SECONDS
        while self.group.is_member and time.monotonic() < deadline:
            if not self.is_wanted:
                self.group.wakeups.poll(0.1)
            self.execute_dummy_batch()
        self.group.close()


def _layout(config: EngineConfig, model: ModelConfig) -> Layout:
    return Layout(
        num_seats=config.data_parallel_size,
        num_layers=model.num_moe_layers,
        num_experts=model.moe_num_experts,
        max_tokens=min(_ROUND_TOKENS, config.max_num_batched_tokens),
        k=model.moe_k,
        hidden=model.hidden_size,
    )


def _options(config: EngineConfig, share: CpuShare) -> GroupOptions:
    return GroupOptions(
        name=config.expert_parallel_group,
        seat=config.data_parallel_rank,
        redundant_experts=config.redundant_experts,
        rebalance=config.enable_eplb,
        stall_after=min(10.0, config.expert_parallel_stall_kill / 2),
        stall_kill=config.expert_parallel_stall_kill,
        spin=share.threads * config.data_parallel_size <= len(os.sched_getaffinity(0)),
    )


def _fingerprint(config: EngineConfig) -> dict[str, object]:
    """Return everything that the generated texts depend on; all ranks must agree on it."""
    packing = Packing(config.model, config.weight_format, config.qkv_order).metadata()
    return {
        "checkpoint": packing["checkpoint"],
        "weights": packing["source"][:16],
        "weight_format": config.weight_format,
        "qkv_order": config.qkv_order,
        "instruction_set": instruction_set(),
        "redundant_experts": config.redundant_experts,
    }
