"""libfd_cpu.so as a device: what runs on a GPU, computed by the CPU's kernels."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import paddle

from fastdeploy import custom_ops
from fastdeploy.common.request import Batch
from fastdeploy.config import EngineConfig, ModelConfig
from fastdeploy.device.choice import choose_gpu
from fastdeploy.device.cuda import CudaDevice
from fastdeploy.device.device import TensorRunner

LIBRARY = Path(custom_ops.__file__).with_name("libfd_cpu.so")
#: Environment in which a worker loads the library.
ENVIRONMENT = {"FD_CUDA_LIBRARY": str(LIBRARY)}
#: Parameters of tests that run on both paths: the operations of Paddle, and the library.
PATHS = ("paddle", "library")
_MOST_TOKENS = 1024


def open_device(config: EngineConfig, model: ModelConfig, num_blocks: int) -> CudaDevice:
    """Return a device with weights and cache, which is closed when nothing refers to it any more."""
    config = replace(config, device="gpu", num_gpu_blocks_override=num_blocks)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        gpu = choose_gpu(config, model)
        assert gpu is not None
        assert gpu.is_cpu
        device = CudaDevice(config, model, gpu, [-1] * max(1, config.threads))
    library, handle = device._library, device._handle
    weakref.finalize(device, library.close, handle)
    device.load(lambda fraction, stage: None)
    assert device.allocate_cache(lambda fraction, stage: None) == num_blocks
    return device


def poison(device: CudaDevice, num_blocks: int) -> None:
    """Fill the cache with NaN, so that a read of an unwritten slot shows in the logits."""
    model = device._model_config
    size = num_blocks * device._sizes.cache_block(model.num_key_value_heads, model.head_dim)
    for cache in device._caches:
        for address in (cache.key, cache.value):
            ctypes.memset(address, 0xFF, size)


def logits_of(device: CudaDevice, count: int) -> np.ndarray:
    """Return the logits of the first rows of the step that was submitted last."""
    logits = np.empty((count, device._model_config.vocab_size), np.float32)
    device._library.call(
        "fd_fetch", device._handle, logits.ctypes.data, device._work["logits"], logits.nbytes
    )
    return logits


class LibraryRunner(TensorRunner):
    """Does for a device of the library what `ModelRunner` does for Paddle."""

    def __init__(self, config: EngineConfig, model: ModelConfig, num_blocks: int) -> None:
        # So many rows of logits that each token of a step can have one.
        config = replace(config, max_num_seqs=_MOST_TOKENS, max_num_batched_tokens=_MOST_TOKENS)
        self._device = open_device(config, model, num_blocks)

    def execute(self, batch: Batch, *, every_position: bool = False) -> paddle.Tensor:
        logits = self._device.every_logit(batch)
        return paddle.to_tensor(logits if every_position else logits[_selected(batch)])


def _selected(batch: Batch) -> Sequence[int]:
    """Return the rows of the logits that a step returns: of sampling rows, then of scored positions."""
    sampling, scored, first = [], [], 0
    for row in batch.rows:
        if row.samples:
            sampling.append(first + row.num_tokens - 1)
        scored += [first + position - row.start for position in row.scored]
        first += row.num_tokens
    return sampling + scored
