"""The network driven by hand: a model from a checkpoint directory, and sequences in scattered blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import paddle

from fastdeploy import custom_ops
from fastdeploy.common.request import Batch, SamplingParams, ScheduledSequence, Sequence
from fastdeploy.config import EngineConfig, ModelConfig
from fastdeploy.device.paddle_cpu import ModelRunner
from fastdeploy.device.paddle_weights import load_weights
from fastdeploy.models.ernie45 import Ernie45

from .cpu_library import LibraryRunner


class Network:
    def __init__(
        self,
        path: Path,
        *,
        weight_format: str = "float32",
        qkv_order: str = "plain",
        block_size: int = 16,
        num_blocks: int = 160,
        kernels: str = "paddle",
    ) -> None:
        """
        Args:
            kernels: see `cpu_library.PATHS`.
        """
        self.config = ModelConfig.from_directory(path)
        quantization = weight_format if weight_format.startswith("wint") else None
        dtype = "bfloat16" if quantization else weight_format
        engine = EngineConfig(
            model=path, block_size=block_size, dtype=dtype, quantization=quantization, qkv_order=qkv_order
        )
        self.runner = (
            LibraryRunner(engine, self.config, num_blocks)
            if kernels == "library"
            else self._through_paddle(engine, num_blocks)
        )
        self.block_size = block_size
        self.free_blocks = np.random.default_rng(3).permutation(num_blocks).tolist()

    def _through_paddle(self, engine: EngineConfig, num_blocks: int) -> ModelRunner:
        weights = load_weights(
            engine.model,
            self.config,
            weight_format=engine.weight_format,
            qkv_order=engine.qkv_order,
            progress=lambda fraction, stage: None,
        )
        return ModelRunner(Ernie45(self.config, weights), self.config, engine, num_blocks)

    def sequence(self, prompt: list[int], shared_blocks: list[int] | None = None) -> Sequence:
        """Allocate a sequence with room for 64 tokens after the prompt; `shared_blocks` come first."""
        blocks = list(shared_blocks or [])
        while len(blocks) * self.block_size < len(prompt) + 64:
            blocks.append(self.free_blocks.pop())
        return Sequence("test", list(prompt), SamplingParams(max_tokens=64), block_ids=blocks)

    def prefill(self, sequence: Sequence, *, start: int = 0, chunk: int = 1 << 20) -> np.ndarray:
        """Return the logits of every prompt position from `start` on, computing `chunk` tokens per step."""
        end = len(sequence.prompt_token_ids)
        steps = [
            Batch((ScheduledSequence(sequence, at, min(chunk, end - at), samples=False),))
            for at in range(start, end, chunk)
        ]
        return np.concatenate([self.runner.execute(step, every_position=True).numpy() for step in steps])

    def decode(self, sequence: Sequence, logits: np.ndarray, count: int) -> np.ndarray:
        """Append `count` greedy tokens, the first from `logits`; return the logits of each token."""
        rows = [logits]
        for _ in range(count):
            sequence.output_token_ids.append(int(rows[-1].argmax()))
            last = ScheduledSequence(sequence, sequence.num_tokens - 1, 1, samples=True)
            rows.append(self.runner.execute(Batch((last,))).numpy()[0])
        return np.stack(rows[:-1])


class Routes:
    """The experts that the steps of one sequence picked, layer by layer."""

    def __init__(self) -> None:
        self._calls: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, topk_ids: np.ndarray, weights: np.ndarray) -> None:
        self._calls.append((topk_ids, weights))

    def by_layer(self, layers: int) -> tuple[np.ndarray, np.ndarray]:
        """Return picks and weights, each [layers, tokens, k]."""
        topk_ids = [np.concatenate([p for p, _ in self._calls[i::layers]]) for i in range(layers)]
        weights = [np.concatenate([w for _, w in self._calls[i::layers]]) for i in range(layers)]
        return np.stack(topk_ids), np.stack(weights)


@contextmanager
def recorded_routes() -> Iterator[Routes]:
    routes, block = Routes(), custom_ops.moe_block

    def recording(*arguments: Any) -> tuple[paddle.Tensor, paddle.Tensor]:
        topk_ids, weights = block(*arguments)
        routes.add(topk_ids.numpy().copy(), weights.numpy().copy())
        return topk_ids, weights

    with mock.patch.object(custom_ops, "moe_block", recording):
        yield routes
