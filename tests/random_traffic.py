"""Random models and requests, and engines that keep every logit they compute.

They test one law: the network's result for a position depends on the text before it and on nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from fastdeploy import custom_ops
from fastdeploy.common.messages import AddRequest, Stats, StepOutputs
from fastdeploy.common.request import Batch, FinishReason, SamplingParams
from fastdeploy.config import EngineConfig, ModelConfig
from fastdeploy.core.engine import EngineCore
from fastdeploy.device.cuda import CudaDevice
from fastdeploy.device.device import Results, TensorRunner, Ticket
from fastdeploy.device.draws import Draw
from fastdeploy.device.paddle_cache import KVCache
from fastdeploy.device.paddle_cpu import ModelRunner
from fastdeploy.device.paddle_weights import load_weights
from fastdeploy.models.ernie45 import Ernie45

from .checkpoints import config_json, draw_tensors, write_checkpoint
from .cpu_library import logits_of, open_device, poison
from .running_ahead import RunningAhead

WEIGHT_FORMATS = ("float32", "bfloat16", "wint8", "wint4")
#: Kernels and formats: Paddle computes all, libfd_cpu.so those that have no scales.
KERNELS = (*(("paddle", name) for name in WEIGHT_FORMATS), ("library", "float32"), ("library", "bfloat16"))
MAX_MODEL_LEN = 768


def draw_config(random: np.random.Generator) -> dict[str, Any]:
    """Draw a dense or mixture-of-experts configuration with odd widths and random options."""
    keys, experts = int(random.integers(1, 4)), int(random.integers(2, 9))
    return config_json(
        model_type=str(random.choice(["ernie4_5_moe", "ernie4_5_moe", "ernie4_5"])),
        hidden_size=int(random.integers(9, 90)),
        num_hidden_layers=int(random.integers(1, 4)),
        vocab_size=int(random.integers(20, 150)),
        head_dim=2 * int(random.integers(4, 33)),
        num_key_value_heads=keys,
        num_attention_heads=keys * int(random.integers(1, 7)),
        intermediate_size=int(random.integers(5, 90)),
        moe_intermediate_size=int(random.integers(5, 50)),
        moe_num_experts=experts,
        moe_k=int(random.integers(1, experts + 1)),
        moe_num_shared_experts=int(random.integers(0, 3)),
        moe_layer_start_index=int(random.integers(0, 2)),
        tie_word_embeddings=bool(random.integers(2)),
        use_bias=bool(random.integers(2)),
    )


class RandomModel:
    def __init__(self, seed: int, weight_format: str, kernels: str = "paddle") -> None:
        """
        Args:
            kernels: of its engines, see `cpu_library.PATHS`; `Alone` is always computed through Paddle.
        """
        config = draw_config(np.random.default_rng(seed))
        self.weight_format = weight_format
        self.kernels = kernels
        self._directory = tempfile.TemporaryDirectory()
        path = Path(self._directory.name)
        write_checkpoint(path, config, draw_tensors(config, seed % 2**32))
        self.config = ModelConfig.from_directory(path)
        weights = load_weights(
            path,
            self.config,
            weight_format=weight_format,
            qkv_order="plain",
            progress=lambda fraction, stage: None,
        )
        self.network = Ernie45(self.config, weights)

    def runner(self, config: EngineConfig, num_blocks: int) -> ModelRunner | CudaDevice:
        """Return a runner on the kernels of this model."""
        if self.kernels == "paddle":
            return ModelRunner(self.network, self.config, config, num_blocks)
        return open_device(replace(config, model=Path(self._directory.name)), self.config, num_blocks)

    def engine(
        self,
        *,
        num_blocks: int,
        every_position: bool,
        ahead: int | None = None,
        kernels: str | None = None,
        **changes: object,
    ) -> RecordedEngine:
        """Build an engine; with `ahead`, the seed of a `RunningAhead`, on a runner that runs ahead."""
        quantization = self.weight_format if self.weight_format.startswith("wint") else None
        values: dict[str, object] = {
            "model": Path("none"),
            "max_model_len": MAX_MODEL_LEN,
            "dtype": "bfloat16" if quantization else self.weight_format,
            "quantization": quantization,
        }
        config = EngineConfig(**(values | changes))  # type: ignore[arg-type]
        if (kernels or self.kernels) == "library":
            config = replace(config, model=Path(self._directory.name))
            device = _RecordedDevice(open_device(config, self.config, num_blocks), num_blocks)
            return RecordedEngine(device, config, self.config, num_blocks)
        runner = ModelRunner(self.network, self.config, config, num_blocks)
        recorder = _Recorder(runner, every_position=every_position)
        return RecordedEngine(recorder, config, self.config, num_blocks, ahead=ahead)


#: Logits as bytes, by request id and position.
Logits = dict[tuple[str, int], bytes]


class _Recorder(TensorRunner):
    """A runner on a cache full of NaN, so that a read of an unwritten slot shows in the logits."""

    def __init__(self, runner: ModelRunner, *, every_position: bool) -> None:
        self._runner = runner
        self._every_position = every_position
        runner.caches = [KVCache(*map(_poisoned, (cache.key, cache.value))) for cache in runner.caches]
        self.logits: Logits = {}

    def execute(self, batch: Batch) -> paddle.Tensor:
        logits = self._runner.execute(batch, every_position=self._every_position)
        rows, sampling = iter(logits.numpy()), []
        count = 0
        for row in batch.rows:
            for position in self._positions(row.start, row.end, row.samples):
                place, found = (row.sequence.request_id, position), next(rows).tobytes()
                assert self.logits.setdefault(place, found) == found, f"computed again, {place} differs"
                count += 1
            if row.samples:
                sampling.append(count - 1)
        return logits[sampling] if self._every_position and sampling else logits[: len(sampling)]

    def _positions(self, start: int, end: int, samples: bool) -> range:
        return range(start if self._every_position else end - samples, end)


class _RecordedDevice:
    """A device of libfd_cpu.so, also on a cache full of NaN, and the logits that tokens are drawn from."""

    runs_ahead = True

    def __init__(self, device: CudaDevice, num_blocks: int) -> None:
        self._device = device
        poison(device, num_blocks)
        self.logits: Logits = {}

    def submit(self, batch: Batch, sampled: Draw | None, scored: Draw | None) -> Ticket:
        ticket = self._device.submit(batch, sampled, scored)
        sampling = [row for row in batch.rows if row.samples]
        for row, found in zip(sampling, logits_of(self._device, len(sampling)), strict=True):
            place = (row.sequence.request_id, row.end - 1)
            assert self.logits.setdefault(place, found.tobytes()) == found.tobytes(), f"{place} differs"
        return ticket

    def wait(self, ticket: Ticket) -> Results:
        return self._device.wait(ticket)


class RecordedEngine:
    """An engine, the texts that it has returned so far, and the logits that they were drawn from."""

    def __init__(
        self,
        recorder: _Recorder | _RecordedDevice,
        config: EngineConfig,
        model_config: ModelConfig,
        num_blocks: int,
        *,
        ahead: int | None = None,
    ) -> None:
        self._recorder = recorder
        self.ahead = None
        if ahead is not None:
            assert isinstance(recorder, _Recorder)
            self.ahead = RunningAhead(recorder, ahead)
        self._engine = EngineCore(config, model_config, self.ahead or recorder, num_blocks)
        self.runs_ahead = (self.ahead or recorder).runs_ahead
        self.texts: dict[str, list[int]] = {}
        self.ended: dict[str, FinishReason] = {}
        self.stats: Stats | None = None

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    @property
    def logits(self) -> Logits:
        return self._recorder.logits

    def add(self, request: AddRequest) -> None:
        self.texts[request.request_id] = []
        self._engine.add(request)

    def abort(self, request_id: str) -> None:
        self._engine.abort([request_id])

    def step(self) -> None:
        self._take(self._engine.step())

    def drain(self) -> None:
        while self._engine.has_work:
            self.step()
        self._take(self._engine.on_idle())

    def _take(self, step: StepOutputs) -> None:
        self.stats = step.stats
        for output in step.outputs:
            assert output.finish_reason is not FinishReason.ERROR, output.message
            assert output.request_id not in self.ended, "nothing follows the end of a text"
            self.texts[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self.ended[output.request_id] = output.finish_reason


@dataclass(frozen=True)
class Alone:
    """A request computed by itself: in one chunk, on one thread, without a prefix cache."""

    token_ids: list[int]
    logits: Logits

    @classmethod
    def compute(cls, model: RandomModel, request: AddRequest, block_size: int) -> Alone:
        custom_ops.set_threads(1)
        engine = model.engine(
            kernels="paddle",
            num_blocks=-(-MAX_MODEL_LEN // block_size),
            every_position=True,
            block_size=block_size,
            max_num_seqs=1,
            max_num_batched_tokens=MAX_MODEL_LEN,
            enable_prefix_caching=False,
        )
        engine.add(request)
        engine.drain()
        return cls(engine.texts[request.request_id], engine.logits)


def assert_as_if_alone(
    engine: RecordedEngine, requests: Iterable[AddRequest], alone: dict[str, Alone]
) -> None:
    """Compare every logit to the bit and every token; aborted requests as far as they got."""
    for name in (request.request_id for request in requests):
        text, expected = engine.texts[name], alone[name].token_ids
        assert text == expected[: len(text)], f"{name}: {text} rather than {expected}"
        assert name not in engine.ended or len(text) == len(expected)
    for (name, position), row in engine.logits.items():
        logits = alone[name].logits
        if engine.runs_ahead and (name, position) not in logits:
            # Computed ahead and thrown away, because the text had ended.
            assert (name, position - 1) in logits
            continue
        assert row == logits[name, position], f"{name}: logits at {position} differ"


def draw_requests(random: np.random.Generator, vocab_size: int, count: int) -> list[AddRequest]:
    """Draw requests. Some prompts share a prefix, and some traffic has a few beyond a segment (512 keys).

    Half of the traffic has penalties: with them, no step can be submitted ahead.
    """
    penalties = (1.2, 0.4) if random.random() < 0.5 else (1.0, 0.0)
    longer, most_tokens = random.choice([0, 0, 0, 0.3]), random.choice([10, 70])
    beginning = random.integers(0, vocab_size, 600).tolist()
    requests = []
    for index in range(count):
        length = int(random.integers(490, 600) if random.random() < longer else random.integers(1, 60))
        common = int(random.integers(0, length)) if random.random() < 0.6 else 0
        prompt = beginning[:common] + random.integers(0, vocab_size, length - common).tolist()
        params = SamplingParams(
            max_tokens=int(random.integers(1, most_tokens)),
            min_tokens=int(random.integers(0, 3)),
            temperature=float(random.choice([0.0, 0.8, 1.3])),
            top_p=float(random.choice([1.0, 0.9])),
            top_k=int(random.choice([0, 5])),
            min_p=float(random.choice([0.0, 0.05])),
            repetition_penalty=float(random.choice([1.0, penalties[0]])),
            frequency_penalty=float(random.choice([0.0, penalties[1]])),
            seed=int(random.integers(2**63)),
            stop_token_ids=(2,),
        )
        requests.append(AddRequest(f"r{index}", prompt, params, arrival_time=0.0))
    return requests


def _poisoned(cache: paddle.Tensor) -> paddle.Tensor:
    return paddle.full(cache.shape, float("nan"), cache.dtype)
