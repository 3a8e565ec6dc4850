"""Runs our engine inside the benchmark's process, by the calls that the worker makes, without sockets."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdeploy.common.messages import AddRequest, TokenOutput
from fastdeploy.common.paddle_import import import_paddle
from fastdeploy.common.request import Batch, SamplingParams
from fastdeploy.config import EngineConfig, ModelConfig
from fastdeploy.core.cpu_share import SINGLE_THREADED, share_of

from .contender import Timing

if TYPE_CHECKING:
    from fastdeploy.device.paddle_cpu import ModelRunner
    from fastdeploy.grammar.matchers import Grammars

WEIGHT_FORMATS = ("float32", "bfloat16", "wint8", "wint4")


class Driver:
    """An engine with random or given prompts."""

    def __init__(self, config: EngineConfig, grammars: Grammars | None = None) -> None:
        # Paddle reads these on import.
        os.environ.update(SINGLE_THREADED)
        import_paddle()

        from fastdeploy import custom_ops
        from fastdeploy.core.engine import EngineCore
        from fastdeploy.core.sampler import Sampler

        share = share_of(config, sorted(os.sched_getaffinity(0)))
        custom_ops.set_threads(share.threads, share.pinned)
        self.config = config
        self.model_config = ModelConfig.from_directory(config.model)
        self.runner = open_runner(config, self.model_config)
        num_blocks = config.num_blocks(self.model_config)
        self.core = EngineCore(config, self.model_config, self.runner, num_blocks, grammars)
        self._sampler = Sampler(self.model_config.vocab_size)
        self._random = np.random.default_rng(7)
        self._requests = 0
        # Like the worker: no garbage collection of the weights during a measurement.
        gc.collect()
        gc.freeze()

    def add(self, prompt_length: int, new: int, **sampling: Any) -> str:
        """Queue a random prompt that gets `new` tokens, greedy unless told; return its request id."""
        self._requests += 1
        request_id = str(self._requests)
        prompt = self._random.integers(3, self.model_config.vocab_size, prompt_length).tolist()
        params = SamplingParams(**({"max_tokens": new, "temperature": 0} | sampling))
        self.core.add(AddRequest(request_id, prompt, params, time.time()))
        return request_id

    def step(self) -> list[TokenOutput]:
        """
        Raises:
            RuntimeError: a request failed.
        """
        outputs = self.core.step().outputs
        for output in outputs:
            if output.message is not None:
                raise RuntimeError(output.message)
        return outputs

    def drain(self) -> None:
        while self.core.has_work:
            self.step()

    def compute(self, batch: Batch) -> None:
        """Compute a step outside of the scheduler."""
        logits = self.runner.execute(batch)
        self._sampler.sample(logits, [row.sequence for row in batch.rows if row.samples])

    # ---- requests of a contender

    def prefill(self, tokens: int) -> Timing:
        self.add(tokens, new=1)
        started = time.monotonic()
        self.drain()
        return Timing(tokens, started, time.monotonic())

    def decode(self, batch: int, prompt: int, new: int, **sampling: Any) -> Timing:
        for index in range(batch):
            self.add(prompt, new, **sampling, choice=index)
        first = self.step()
        assert len(first) == batch, "all prompts must fit into one step; raise max_num_batched_tokens"
        started = time.monotonic()
        self.drain()
        return Timing(batch * (new - 1), started, time.monotonic())


def engine_config(
    model: Path,
    weight_format: str,
    *,
    max_num_seqs: int,
    max_model_len: int,
    **settings: Any,
) -> EngineConfig:
    """Return a configuration with a cache for all sequences at full length, without prefix caching."""
    return EngineConfig(
        model=model,
        device="cpu",
        dtype="float32" if weight_format == "float32" else "bfloat16",
        quantization=weight_format if weight_format.startswith("wint") else None,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        enable_prefix_caching=False,
        num_gpu_blocks_override=max_num_seqs * -(-max_model_len // 64),
        block_size=64,
        **settings,
    )


def open_runner(config: EngineConfig, model_config: ModelConfig) -> ModelRunner:
    import_paddle()
    import paddle

    from fastdeploy.device.paddle_cpu import ModelRunner
    from fastdeploy.device.paddle_weights import load_weights
    from fastdeploy.models.ernie45 import Ernie45

    paddle.set_device("cpu")
    weights = load_weights(
        config.model,
        model_config,
        weight_format=config.weight_format,
        qkv_order=config.qkv_order,
        progress=lambda fraction, stage: None,
    )
    model = Ernie45(model_config, weights)
    return ModelRunner(model, model_config, config, config.num_blocks(model_config))


def fill_cache(runner: ModelRunner) -> None:
    """Write to the whole KV cache; until then the kernel backs it with one page of zeros."""
    for cache in runner.caches:
        for tensor in (cache.key, cache.value):
            # A small number as bfloat16 and as float32.
            ctypes.memset(tensor.data_ptr(), 0x3C, int(tensor.numel()) * tensor.element_size())
