"""The CPU as a device: Paddle's tensors, and the operations compiled for it."""

from __future__ import annotations

import ctypes

import numpy as np
import paddle
from numpy.typing import NDArray

from .. import custom_ops
from ..common.request import Batch
from ..config import EngineConfig, ModelConfig
from ..expert_parallel.group import ExpertGroup
from ..models.ernie45 import Ernie45
from .device import Progress, Results, TensorRunner
from .draws import Draw
from .paddle_cache import KVCache
from .paddle_weights import load_weights
from .step_buffer import StepBuffer


class PaddleDevice:
    """The CPU. Import Paddle with `import_paddle` before this module."""

    runs_ahead = False

    def __init__(self, config: EngineConfig, model_config: ModelConfig, threads: int) -> None:
        # A Paddle built for GPUs would otherwise place tensors there.
        paddle.device.set_device("cpu")
        self._config = config
        self._model_config = model_config
        self._threads = threads
        self._model: Ernie45 | None = None
        self._runner: ModelRunner | None = None

    @property
    def title(self) -> str:
        return f"{self._threads} threads on {custom_ops.instruction_set()}"

    @property
    def numeric_version(self) -> str:
        return custom_ops.numeric_version()

    @property
    def runner(self) -> ModelRunner:
        """Return the runner of steps, which exists once the cache is allocated."""
        assert self._runner is not None, "the cache is not allocated yet"
        return self._runner

    def load(self, progress: Progress) -> None:
        config = self._config
        weights = load_weights(
            config.model,
            self._model_config,
            weight_format=config.weight_format,
            qkv_order=config.qkv_order,
            progress=progress,
        )
        self._model = Ernie45(self._model_config, weights)

    def allocate_cache(self, progress: Progress) -> int:
        assert self._model is not None, "the weights come first"
        num_blocks = self._config.num_blocks(self._model_config)
        progress(1.0, f"allocating a cache of {num_blocks} blocks")
        self._runner = ModelRunner(self._model, self._model_config, self._config, num_blocks)
        return num_blocks

    def submit(self, batch: Batch, sampled: Draw | None, scored: Draw | None) -> Results:
        return self.runner.submit(batch, sampled, scored)

    def wait(self, ticket: Results) -> Results:
        return ticket

    def close(self) -> None:
        pass


class ModelRunner(TensorRunner):
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
        self._step_array: NDArray[np.int32] | None = None
        keep_freed_memory()

    def execute(self, batch: Batch, *, every_position: bool = False) -> paddle.Tensor:
        """Compute one step.

        Returns:
            float32 logits [sampling rows + scored positions, vocabulary]: first those of the sampling rows,
            then those of the scored positions, both in batch order. With `every_position`, those of all
            tokens.
        """
        with paddle.no_grad():
            step = self._encode(batch, every_position=every_position)
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
            hidden_states = paddle.empty([0, self.model.config.hidden_size])
            group.run_step(0, lambda: self.model.execute_dummy_batch(group, hidden_states))

    def _encode(self, batch: Batch, *, every_position: bool) -> paddle.Tensor:
        """Return the step as a tensor that is reused for each step."""
        array = self._step.write(batch, every_position=every_position)
        if array is not self._step_array:
            self._step_array = array
            # Shares the memory of the array.
            self._step_tensor = paddle.utils.dlpack.from_dlpack(array)
        return self._step_tensor


def keep_freed_memory() -> None:
    """Make glibc keep freed buffers (up to 32 MiB each, 1 GiB in total).

    By default they return to the kernel, and the next step has to fault the same pages in again.
    """
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, 1 << 30)
