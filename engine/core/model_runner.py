"""Runs the network on a batch and writes the KV cache."""

from __future__ import annotations

import ctypes

import paddle

from ..common.request import Batch
from ..config import EngineConfig, ModelConfig
from ..expert_parallel.group import ExpertGroup
from ..models.ernie45 import Ernie45
from ..models.kv_cache import KVCache
from .step_buffer import StepBuffer


class ModelRunner:
    """Owns the memory of the KV cache; the scheduler assigns its blocks to sequences."""

    def __init__(
        self, model: Ernie45, model_config: ModelConfig, engine_config: EngineConfig, num_blocks: int
    ) -> None:
        self.model = model
        #: The group of ranks that share the experts; None: all experts are local.
        self.group: ExpertGroup | None = None
        wide = engine_config.weight_format == "float32"
        self.caches = [
            KVCache.allocate(model_config, num_blocks, engine_config.block_size, wide=wide)
            for _ in range(model_config.num_hidden_layers)
        ]
        self._step = StepBuffer(engine_config.block_size)
        keep_freed_memory()

    def execute(self, batch: Batch, *, every_position: bool = False) -> paddle.Tensor:
        """Compute one step.

        Returns:
            float32 logits [sampling rows + scored positions, vocabulary]: first those of the sampling rows,
            then those of the scored positions, both in batch order. With `every_position`, those of all
            tokens.
        """
        with paddle.no_grad():
            step = self._step.write(batch, every_position=every_position)
            group = self.group
            if group is None:
                return self.model.logits(self.model.forward(step, self.caches), step)
            return group.run_step(
                batch.num_tokens,
                lambda: self.model.logits(self.model.forward(step, self.caches, group), step),
            )

    def execute_dummy_batch(self) -> None:
        """Take part in a step in which only other ranks have tokens, if there is one."""
        group = self.group
        assert group is not None, "only a rank of a group has dummy batches"
        with paddle.no_grad():
            group.run_step(0, lambda: self.model.execute_dummy_batch(group))


def keep_freed_memory() -> None:
    """Make glibc keep freed buffers (up to 32 MiB each, 1 GiB in total).

    By default they return to the kernel, and the next step has to fault the same pages in again.
    """
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, 1 << 30)
