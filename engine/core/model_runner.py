"""Runs the network on a batch: tokens of many sequences in, logits out, keys and values into the cache."""

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
    """Owns the KV cache. Which block belongs to whom is the scheduler's business."""

    def __init__(
        self, model: Ernie45, model_config: ModelConfig, engine_config: EngineConfig, num_blocks: int
    ) -> None:
        self.model = model
        #: The ranks that share the experts; None: all experts are computed here.
        self.group: ExpertGroup | None = None
        # As precise as the weights are.
        wide = engine_config.weight_format == "float32"
        self.caches = [
            KVCache.allocate(model_config, num_blocks, engine_config.block_size, wide=wide)
            for _ in range(model_config.num_hidden_layers)
        ]
        self._step = StepBuffer(engine_config.block_size)
        keep_freed_memory()

    def execute(self, batch: Batch, *, every_position: bool = False) -> paddle.Tensor:
        """Computes one step.

        Returns:
            float32 logits [rows that sample and scored positions, vocabulary]: of the rows that sample in the
            order of the batch, then of the scored positions row after row. With `every_position` of all
            tokens of all rows instead.
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

    def assist(self) -> None:
        """Takes part in a step that only other ranks have tokens for, if there is one."""
        group = self.group
        assert group is not None, "nobody calls a rank that is in no group"
        with paddle.no_grad():
            group.run_step(0, lambda: self.model.assist(group))


def keep_freed_memory() -> None:
    """Tells glibc to keep large buffers (to 32 MiB each, 1 GiB in all) when they are freed.

    By default each goes back to the kernel and the next step faults the same pages in again.
    """
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, 1 << 30)
