"""The engine on a GPU: accuracy of the network, and texts that depend on nothing but their request."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("msgspec", reason="the engine needs its packages")

from fastdeploy.common.messages import AddRequest
from fastdeploy.common.request import Batch, FinishReason, SamplingParams, ScheduledSequence, Sequence
from fastdeploy.config import EngineConfig, ModelConfig
from fastdeploy.core.engine import EngineCore
from fastdeploy.device.choice import choose_gpu
from fastdeploy.device.cuda import CudaDevice
from fastdeploy.device.errors import OutOfDeviceMemory
from tests.checkpoints import LAYOUTS, config_json, draw_tensors, write_checkpoint
from tests.reference_network import (
    ReferenceNetwork,
    as_bfloat16_stores_them,
    bfloat16,
    relative_errors,
)

MODELS: dict[str, dict[str, Any]] = {
    "experts": {"hidden_size": 192, "vocab_size": 512, "moe_num_experts": 12, "moe_k": 3, "use_bias": True},
    "no shared experts": {"hidden_size": 128, "vocab_size": 320, "moe_num_shared_experts": 0},
    "dense": {"model_type": "ernie4_5", "hidden_size": 160, "vocab_size": 258, "intermediate_size": 232},
    "wide heads": {"hidden_size": 256, "vocab_size": 384, "head_dim": 128, "num_attention_heads": 8},
}
MAX_LEN = 1600


def model_json(name: str, **changes: Any) -> dict[str, Any]:
    return config_json(**{"head_dim": 64, "moe_intermediate_size": 40, **MODELS[name], **changes})


class Model:
    """A random checkpoint, and devices that run it."""

    def __init__(
        self,
        path: Path,
        model: str | dict[str, Any],
        layout: str = "huggingface",
        dtype: str = "BF16",
        seed: int = 7,
    ) -> None:
        """`model` is a name of MODELS, or a config.json."""
        self.json = model_json(model) if isinstance(model, str) else model
        self.tensors = draw_tensors(self.json, seed)
        write_checkpoint(path, self.json, self.tensors, layout=layout, dtype=dtype)
        self.path = path
        self.config = ModelConfig.from_directory(path)
        order = "grouped" if layout == "paddle-grouped" else "plain"
        self.engine_config = EngineConfig(
            model=path,
            device="gpu",
            max_model_len=MAX_LEN,
            max_num_batched_tokens=1024,
            num_gpu_blocks_override=128,
            qkv_order=order,
        )
        self._devices: list[CudaDevice] = []

    def device(self, **changes: Any) -> CudaDevice:
        config = replace(self.engine_config, **changes)
        gpu = choose_gpu(config, self.config)
        assert gpu is not None
        device = CudaDevice(config, self.config, gpu)
        self._devices.append(device)
        device.load(lambda fraction, stage: None)
        self.num_blocks = device.allocate_cache(lambda fraction, stage: None)
        return device

    def engine(self, **changes: Any) -> EngineCore:
        device = self.device(**changes)
        return EngineCore(replace(self.engine_config, **changes), self.config, device, self.num_blocks)

    def close(self) -> None:
        for device in self._devices:
            device.close()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with tempfile.TemporaryDirectory() as directory:
        model = Model(Path(directory), request.param)
        yield model
        model.close()


@pytest.fixture
def experts() -> Iterator[Model]:
    with tempfile.TemporaryDirectory() as directory:
        model = Model(Path(directory), "experts")
        yield model
        model.close()


def sequence(prompt: list[int], blocks: list[int]) -> Sequence:
    return Sequence("test", list(prompt), SamplingParams(max_tokens=64), block_ids=blocks)


def prompt_of(model: Model, length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, length).tolist()


def part(sequence: Sequence, start: int, stop: int) -> ScheduledSequence:
    return ScheduledSequence(sequence, start, stop - start, samples=stop == sequence.num_tokens)


def whole(device: CudaDevice, prompt: list[int], blocks: list[int]) -> np.ndarray:
    steps = range(0, len(prompt), 250)
    one = sequence(prompt, blocks)
    rows = [device.every_logit(Batch((part(one, at, min(at + 250, len(prompt))),))) for at in steps]
    return np.concatenate(rows)


def test_logits_are_as_close_to_float64_as_a_plain_bfloat16_implementation(model: Model) -> None:
    prompt = prompt_of(model, 600, seed=1)
    found = whole(model.device(), prompt, list(range(5, 20)))
    stored = as_bfloat16_stores_them(model.tensors)
    exact = ReferenceNetwork(model.json, stored).logits(prompt)
    plain = ReferenceNetwork(model.json, stored, bfloat16).logits(prompt)
    ours, theirs = relative_errors(found, exact), relative_errors(plain, exact)
    assert np.isfinite(found).all()
    # A token whose picks differ is far off in either.
    assert np.median(ours) < 1.1 * np.median(theirs), (np.median(ours), np.median(theirs))
    assert ours.mean() < 1.5 * theirs.mean(), (ours.mean(), theirs.mean())


def test_logits_do_not_depend_on_chunks_or_batch(model: Model) -> None:
    device = model.device()
    prompts = [prompt_of(model, length, seed=length) for length in (700, 130, 1, 64, 513)]
    blocks = np.random.default_rng(3).permutation(128).tolist()
    alone = [whole(device, prompt, blocks[:20]) for prompt in prompts]
    sequences = [sequence(prompt, [blocks.pop() for _ in range(12)]) for prompt in prompts]
    random = np.random.default_rng(4)
    done = [0] * len(prompts)
    while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
        rows, places, left = [], [], 250
        for index, one in enumerate(sequences):
            length = len(prompts[index]) - done[index]
            count = min(length, left, int(random.choice([1, 7, 90])))
            if count > 0:
                rows.append(part(one, done[index], done[index] + count))
                places.append((index, done[index], count))
                done[index] += count
                left -= count
        logits = device.every_logit(Batch(tuple(rows)))
        first = 0
        for index, start, count in places:
            found, expected = logits[first : first + count], alone[index][start : start + count]
            assert found.tobytes() == expected.tobytes(), f"prompt {index} at {start}"
            first += count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype_gives_the_same_logits(tmp_path: Path, layout: str) -> None:
    rows = []
    for index, (other, dtype) in enumerate([("huggingface", "BF16"), (layout, "BF16"), (layout, "F32")]):
        model = Model(tmp_path / str(index), "experts", other)
        if dtype == "F32":
            write_checkpoint(
                tmp_path / "2", model.json, as_bfloat16_stores_them(model.tensors), layout=other, dtype=dtype
            )
        rows.append(whole(model.device(), prompt_of(model, 100, seed=2), [3, 9]))
        model.close()
    assert rows[0].tobytes() == rows[1].tobytes() == rows[2].tobytes()


def requests(model: Model, count: int) -> list[AddRequest]:
    random = np.random.default_rng(11)
    beginning = prompt_of(model, 400, seed=5)
    made = []
    for index in range(count):
        common = int(random.integers(0, 200))
        prompt = beginning[:common] + prompt_of(model, int(random.integers(1, 150)), seed=index)
        params = SamplingParams(
            max_tokens=int(random.integers(1, 200)),
            min_tokens=int(random.integers(0, 3)),
            temperature=float(random.choice([0.0, 0.0, 0.8])),
            top_p=float(random.choice([1.0, 0.9])),
            top_k=int(random.choice([0, 5])),
            repetition_penalty=float(random.choice([1.0, 1.2])),
            seed=int(random.integers(2**63)),
            stop_token_ids=(2,) if index % 6 == 0 else (),
            logprobs=int(random.choice([0, 3])) if index % 4 == 0 else None,
            prompt_logprobs=2 if index % 5 == 0 else None,
        )
        made.append(AddRequest(f"r{index}", prompt, params, arrival_time=0.0))
    return made


Answers = dict[str, tuple[list[int], list[Any], list[Any]]]


def drain(engine: EngineCore, added: list[AddRequest], aborts: dict[str, int] | None = None) -> Answers:
    """Compute the requests; abort those in `aborts` when they have that many tokens."""
    answers: Answers = {request.request_id: ([], [], []) for request in added}
    for request in added:
        engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.finish_reason is not FinishReason.ERROR, output.message
            token_ids, logprobs, scores = answers[output.request_id]
            token_ids += output.token_ids
            logprobs += output.logprobs or []
            scores += output.prompt_logprobs or []
            if len(token_ids) == (aborts or {}).get(output.request_id):
                engine.abort([output.request_id])
    engine.on_idle()
    return answers


def test_texts_are_those_of_the_requests_alone(model: Model) -> None:
    added = requests(model, 24)
    alone_engine = model.engine(max_num_seqs=1, enable_prefix_caching=False)
    alone: Answers = {}
    for request in added:
        alone |= drain(alone_engine, [request])
    # So few blocks that sequences are preempted, chunks beside decoding ones, and hits in the prefix cache.
    engine = model.engine(num_gpu_blocks_override=11, max_num_seqs=7, max_num_batched_tokens=200)
    together = drain(engine, added)
    stats = engine.on_idle().stats
    assert stats.preemptions_total > 0
    assert stats.prefix_cache_hit_tokens_total > 0
    assert together == alone


def test_steps_ahead_change_no_text(experts: Model) -> None:
    random = np.random.default_rng(3)
    added, aborts = [], {}
    for index in range(40):
        params = SamplingParams(
            max_tokens=int(random.integers(1, 90)),
            temperature=float(random.choice([0.0, 0.9])),
            seed=index,
            stop_token_ids=tuple(range(2, 12)),
            logprobs=1 if index % 4 == 0 else None,
            repetition_penalty=1.2 if index == 20 else 1.0,
        )
        prompt = prompt_of(experts, int(random.integers(1, 100)), seed=index)
        added.append(AddRequest(f"r{index}", prompt, params, arrival_time=0.0))
        if index % 3 == 0:
            aborts[f"r{index}"] = int(random.integers(1, 30))
    found = []
    for runs_ahead in (False, True):
        device = experts.device(max_num_seqs=6, num_gpu_blocks_override=14)
        device.runs_ahead = runs_ahead
        config = replace(experts.engine_config, max_num_seqs=6)
        found.append(drain(EngineCore(config, experts.config, device, experts.num_blocks), added, aborts))
    assert found[0] == found[1]


def test_log_probabilities_are_those_of_the_reference(experts: Model) -> None:
    prompt = prompt_of(experts, 80, seed=8)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=3, prompt_logprobs=2)
    answers = drain(experts.engine(), [AddRequest("one", prompt, params, arrival_time=0.0)])
    _, (drawn,), scores = answers["one"]
    exact = ReferenceNetwork(experts.json, as_bfloat16_stores_them(experts.tensors)).logits(prompt)
    exact -= np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True)) + exact.max(
        1, keepdims=True
    )
    assert len(scores) == len(prompt) - 1
    wanted = exact[np.arange(len(prompt) - 1), prompt[1:]]
    found = np.array([score.logprob for score in scores])
    assert np.median(np.abs(found - wanted)) < 0.1
    assert [score.token_id for score in scores] == prompt[1:]
    assert abs(drawn.logprob - exact[-1, drawn.token_id]) < 0.5


def test_a_cache_that_does_not_fit_is_refused_with_the_options_to_change(experts: Model) -> None:
    with pytest.raises(OutOfDeviceMemory, match="lower --max-model-len or raise --gpu-memory-utilization"):
        experts.device(num_gpu_blocks_override=None, gpu_memory_utilization=0.00001)
    with pytest.raises(
        OutOfDeviceMemory, match=r"cache needs .* GB of GPU memory; .* --num-gpu-blocks-override"
    ):
        experts.device(num_gpu_blocks_override=2**30)


def test_a_fault_of_the_device_breaks_it_with_one_line(experts: Model, tmp_path: Path) -> None:
    # In a process of its own, because nothing can be computed afterwards.
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fastdeploy.device.errors import DeviceBroken\n"
        "from tests.device.test_engine import Batch, Model, part, sequence\n"
        "model = Model(Path(sys.argv[1]), 'experts')\n"
        "one = sequence([5, 6, 7], [2**30])\n"
        "try:\n"
        "    model.device().every_logit(Batch((part(one, 0, 3),)))\n"
        "except DeviceBroken as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    told = r"GPU: a step: an illegal memory access was encountered \(PCI [0-9a-f:.]+\)\n"
    assert re.fullmatch(told, done.stdout), done


def test_a_cache_takes_its_share_of_the_memory(experts: Model) -> None:
    experts.device(num_gpu_blocks_override=None, gpu_memory_utilization=0.3)
    layers, heads = experts.config.num_hidden_layers, experts.config.num_key_value_heads
    taken = experts.num_blocks * layers * heads * 8192 * 2
    info = experts._devices[-1]._info()
    assert 0.2 < taken / info.bytes_total < 0.3
