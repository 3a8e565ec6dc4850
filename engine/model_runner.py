"""Runs the network on a batch: tokens of many sequences in, logits out, keys and values into the cache."""

from __future__ import annotations

import ctypes

import numpy as np
import paddle

from .config import EngineConfig, ModelConfig
from .layers.attention import AttentionStep, KVCache
from .models.ernie45 import Ernie45
from .request import Batch


class ModelRunner:
    """Owns the KV cache. Which block belongs to whom is the scheduler's business."""

    def __init__(
        self, model: Ernie45, model_config: ModelConfig, engine_config: EngineConfig, num_blocks: int
    ) -> None:
        self.model = model
        self.model_config = model_config
        self.block_size = engine_config.block_size
        self.caches = [
            KVCache.allocate(model_config, num_blocks, self.block_size)
            for _ in range(model_config.num_hidden_layers)
        ]
        if paddle.device.get_device() == "cpu":
            _keep_freed_memory()

    def execute(self, batch: Batch, *, every_position: bool = False) -> np.ndarray:
        """Computes one step.

        Returns:
            float32 logits [rows that sample, vocabulary] in the order of the batch; with `every_position`
            of all tokens of all rows instead, row after row.
        """
        with paddle.no_grad():
            step = AttentionStep.plan(batch.rows, self.model_config, self.block_size)
            token_ids: list[int] = []
            places = np.empty(len(batch.rows), dtype=np.int64)
            for i in step.row_order:
                row = batch.rows[i]
                places[i] = len(token_ids)
                token_ids += row.sequence.token_ids(row.start, row.end)
            hidden = self.model.forward(paddle.to_tensor(token_ids, dtype="int64"), step, self.caches)

            wanted: list[int] = []
            for place, row in zip(places.tolist(), batch.rows, strict=True):
                if every_position:
                    wanted += range(place, place + row.num_tokens)
                elif row.samples:
                    wanted.append(place + row.num_tokens - 1)
            if not wanted:
                return np.empty((0, self.model_config.vocab_size), dtype=np.float32)
            return self.model.logits(paddle.gather(hidden, paddle.to_tensor(wanted))).numpy()


def _keep_freed_memory() -> None:
    """Tells glibc to keep large buffers when they are freed, up to the most that a step has needed.

    By default each goes back to the kernel and the next layer faults the same pages in again, which made
    copies of a prefill step up to six times slower.
    """
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, 1 << 30)
