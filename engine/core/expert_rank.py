"""A replica as a rank of an expert-parallel group."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from ..config import EngineConfig, ModelConfig
from ..device.paddle_cpu import ModelRunner, PaddleDevice
from ..expert_parallel.group import ExpertGroup
from ..expert_parallel.join import join
from ..expert_parallel.layout import GroupLayout
from ..expert_parallel.options import STALL_AFTER, GroupOptions
from ..expert_parallel.residency import ExpertPages
from ..models.ernie45 import MoEWeights
from ..weights.weight_cache import Packing
from .cpu_share import CpuShare

#: Maximum tokens of a rank in one collective; a larger step takes several. This keeps the exchange buffers
#: within the shared memory of a container, and is enough to amortise reading an expert's weights.
_ROUND_TOKENS = 128
#: Less than the time after which the API process kills a stopping worker.
_LEAVE_SECONDS = 3.0


class Rank:
    """Member of an expert group; takes part in steps of other ranks while it has no work of its own."""

    def __init__(self, group: ExpertGroup, runner: ModelRunner) -> None:
        self.group = group
        self._runner = runner

    @classmethod
    def join(cls, config: EngineConfig, model: ModelConfig, device: PaddleDevice, share: CpuShare) -> Rank:
        """Join the group that `config` names. From here on `device` computes with the other ranks.

        Raises:
            ConfigError: see `join.join`.
        """
        runner = device.runner
        pages = [
            ExpertPages((layer.mlp.experts.gate_up, layer.mlp.experts.down), model.moe_num_experts)
            for layer in runner.model.weights.layers
            if isinstance(layer.mlp, MoEWeights)
        ]

        def on_placement(held: Sequence[frozenset[int]], added: Sequence[frozenset[int]]) -> None:
            for layer, experts, new in zip(pages, held, added, strict=True):
                layer.hold(experts, new)

        runner.group = join(
            _options(config, share),
            _layout(config, model),
            _fingerprint(config, device.numeric_version),
            on_placement,
        )
        return cls(runner.group, runner)

    @property
    def is_wanted(self) -> bool:
        """True if a step of other ranks has begun or is about to begin."""
        return self.group.awake or self.group.is_awaited

    def execute_dummy_batch(self) -> None:
        """Take part in a step of other ranks, if there is one."""
        self.group.handle_wakeups()
        if self.is_wanted:
            self._runner.execute_dummy_batch()

    def leave(self) -> None:
        """Leave the group between two steps, so that the others take over this rank's experts."""
        self.group.request_leave()
        deadline = time.monotonic() + _LEAVE_SECONDS
        while self.group.is_member and time.monotonic() < deadline:
            if not self.is_wanted:
                self.group.wakeups.poll(0.1)
            self.execute_dummy_batch()
        self.group.close()


def _layout(config: EngineConfig, model: ModelConfig) -> GroupLayout:
    return GroupLayout(
        num_ranks=config.data_parallel_size,
        num_layers=model.num_moe_layers,
        num_experts=model.moe_num_experts,
        max_tokens=min(_ROUND_TOKENS, config.max_num_batched_tokens),
        k=model.moe_k,
        hidden=model.hidden_size,
    )


def _options(config: EngineConfig, share: CpuShare) -> GroupOptions:
    return GroupOptions(
        name=config.expert_parallel_group,
        rank=config.data_parallel_rank,
        redundant_experts=config.redundant_experts,
        rebalance=config.enable_eplb,
        stall_after=min(STALL_AFTER, config.expert_parallel_stall_kill / 2),
        stall_kill=config.expert_parallel_stall_kill,
        spin=share.threads * config.data_parallel_size <= len(os.sched_getaffinity(0)),
    )


def _fingerprint(config: EngineConfig, numeric_version: str) -> dict[str, object]:
    """Return the settings that affect the generated tokens; they must be equal on all ranks."""
    packing = Packing(config.model, config.weight_format, config.qkv_order).metadata()
    return {
        "checkpoint": packing["checkpoint"],
        "weights": packing["source"][:16],
        "weight_format": config.weight_format,
        "qkv_order": config.qkv_order,
        "numeric_version": numeric_version,
        "redundant_experts": config.redundant_experts,
    }
