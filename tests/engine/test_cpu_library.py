"""libfd_cpu.so: the bits of Paddle's path, the protocol of steps and graphs, and its errors."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from ctypes import byref, c_int32, c_uint64, c_void_p
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy.common.errors import CheckpointError, ConfigError
from fastdeploy.common.messages import AddRequest, Failed, Ready
from fastdeploy.common.request import Batch, FinishReason, SamplingParams, ScheduledSequence
from fastdeploy.config import EngineConfig, ModelConfig
from fastdeploy.core.engine import EngineCore
from fastdeploy.device.choice import choose_gpu
from fastdeploy.device.cuda_library import (
    ARENA_CACHE,
    ARENA_WORK,
    BEGIN_CAPTURE,
    END_CAPTURE,
    FLOAT16,
    FLOAT32,
    FORGET_ALL,
    LAUNCH,
    Buffer,
    CudaLibrary,
    EmbeddingArgs,
    OpenArgs,
    ProductArgs,
    RetileArgs,
)
from fastdeploy.device.errors import DeviceBroken, OutOfDeviceMemory

from ..checkpoints import LAYOUTS, config_json, draw_tensors, write_checkpoint
from ..cpu_library import LIBRARY, open_device
from ..network import Network
from ..random_traffic import MAX_MODEL_LEN, RandomModel
from .worker_api import CONFIG, DEADLINE_S, Api, request

# ---- the bits of the other path


@pytest.mark.parametrize("weight_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_have_the_bits_of_paddles_path(tmp_path: Path, layout: str, weight_format: str) -> None:
    """After chunks, and for a decoding sequence beside a chunk; for each layout and dtype of checkpoints."""
    config = config_json(use_bias=True, tie_word_embeddings=False, moe_intermediate_size=21, head_dim=20)
    for dtype in ("F32", "BF16", "F16"):
        path = tmp_path / dtype
        write_checkpoint(path, config, draw_tensors(config, 3), layout=layout, dtype=dtype)
        order = "grouped" if layout == "paddle-grouped" else "plain"
        found = [
            logits(Network(path, weight_format=weight_format, qkv_order=order, kernels=kernels))
            for kernels in ("paddle", "library")
        ]
        assert found[0].tobytes() == found[1].tobytes(), dtype


def logits(network: Network) -> np.ndarray:
    long, short = (network.sequence([7 + i * 5 % 80 for i in range(length)]) for length in (150, 9))
    rows = [network.prefill(short), network.prefill(long, chunk=70)]
    short.output_token_ids.append(11)
    step = Batch(
        (ScheduledSequence(short, 9, 1, samples=True), ScheduledSequence(long, 20, 60, samples=False))
    )
    rows.append(network.runner.execute(step).numpy())
    return np.concatenate(rows)


PARAMETERS: tuple[dict[str, Any], ...] = (
    {"logprobs": 3, "logit_bias": ((5, 4.0), (9, -100.0))},
    {"bad_words": ((7,), (3, 4)), "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"allowed_token_ids": (3, 5, 8, 13), "temperature": 0.0, "logprobs": 0},
    {"min_tokens": 6, "stop_token_ids": (2, 3, 4), "frequency_penalty": 0.7},
    {"top_p": 0.7, "top_k": 9, "min_p": 0.02, "prompt_logprobs": 2},
    {"temperature": 0.0},
)


def test_draws_are_those_of_paddles_path() -> None:
    """Also their log probabilities, for requests with all kinds of parameters in one batch."""
    assert answers(RandomModel(5, "float32")) == answers(RandomModel(5, "float32", "library"))


def answers(model: RandomModel) -> dict[str, list[Any]]:
    config = EngineConfig(model=Path("none"), dtype="float32", block_size=16, max_model_len=MAX_MODEL_LEN)
    engine = EngineCore(config, model.config, model.runner(config, 40), 40)
    found: dict[str, list[Any]] = {}
    for seed, changes in enumerate(PARAMETERS):
        values = {"max_tokens": 25, "temperature": 1.1, "seed": seed} | changes
        params = SamplingParams(**values)
        engine.add(AddRequest(f"r{seed}", [3 + seed, 4, 5, 6], params, arrival_time=0.0))
        found[f"r{seed}"] = []
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.finish_reason is not FinishReason.ERROR, output.message
            found[output.request_id] += output.token_ids
            found[output.request_id] += [*(output.logprobs or []), *(output.prompt_logprobs or [])]
    assert all(found.values())
    return found


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    config = config_json()
    tensors = draw_tensors(config, 3)
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = np.inf
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.self_attn\.v_proj\.weight holds"):
        open_device(EngineConfig(model=tmp_path), ModelConfig.from_directory(tmp_path), 8)


# ---- the choice


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization": "wint4"}, "--quantization wint4 is computed through Paddle only"),
        ({"enable_expert_parallel": True}, "--enable-expert-parallel is computed through Paddle only"),
    ],
)
def test_what_stays_on_paddles_path_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_checkpoint(tmp_path, config_json(), {})
    monkeypatch.setenv("FD_CUDA_LIBRARY", str(LIBRARY))
    with pytest.raises(ConfigError) as refused:
        choose_gpu(EngineConfig(model=tmp_path, **changes), ModelConfig.from_directory(tmp_path))
    assert str(refused.value) == f"{LIBRARY}: {reason}; without FD_CUDA_LIBRARY, --device cpu computes it"


def test_the_library_has_every_function_of_the_header() -> None:
    header = Path(__file__).parents[2] / "custom_ops/include/fd_device.h"
    names = set(re.findall(r"^[a-z].*\b(fd_\w+)\(", header.read_text(), re.MULTILINE))
    assert len(names) > 30
    library = ctypes.CDLL(str(LIBRARY))
    assert [name for name in sorted(names) if not hasattr(library, name)] == []


# ---- steps, graphs and memory

VOCABULARY, WIDTH, MOST = 50, 3, 8


class Device:
    """A device whose only operation is an embedding."""

    def __init__(self) -> None:
        self.library = CudaLibrary(LIBRARY)
        handle = c_void_p()
        self.library.call("fd_open", byref(OpenArgs(type=FLOAT32, block_size=16, threads=1)), byref(handle))
        self.handle = handle.value or 0
        self.stream = self.library.value("fd_stream", self.handle)
        self.plan, self.results = Buffer(), Buffer()
        sizes = 4096, 4 * MOST * WIDTH
        self.library.call("fd_steps", self.handle, *sizes, byref(self.plan), byref(self.results))
        self.table = np.arange(VOCABULARY * WIDTH, dtype=np.float32).reshape(VOCABULARY, WIDTH)

    def arena(self, kind: int, size: int) -> Buffer:
        buffer = Buffer()
        self.library.call("fd_arena", self.handle, kind, size, byref(buffer))
        return buffer

    def begin(self, *tokens: int) -> int:
        """Begin a step of one token for each sequence."""
        n, ticket = len(tokens), c_uint64()
        plan = np.array([n, n, 1, n, *range(n + 1), *[0] * 2 * n, *tokens, *range(n)], np.int32)
        self.library.call("fd_step_begin", self.handle, plan.ctypes.data, plan.nbytes, byref(ticket))
        return ticket.value

    def embed(self) -> None:
        arguments = EmbeddingArgs(
            step=self.plan.address,
            table=self.table.ctypes.data,
            vocabulary=VOCABULARY,
            width=WIDTH,
            hidden_states=self.results.address,
            capacity=MOST,
        )
        self.library.enqueue("fd_embedding", self.stream, arguments)

    def graph(self, verb: int, key: int = 0) -> None:
        self.library.call("fd_graph", self.handle, verb, key)

    def end(self, ticket: int) -> None:
        self.library.call("fd_step_end", self.handle, ticket)

    def wait(self, ticket: int, count: int) -> np.ndarray:
        results = c_void_p()
        self.library.call("fd_step_wait", self.handle, ticket, byref(results))
        values = np.ctypeslib.as_array((ctypes.c_float * (MOST * WIDTH)).from_address(results.value or 0))
        return values.reshape(MOST, WIDTH)[:count].copy()


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.library.close(device.handle)


def test_two_steps_may_be_in_progress(device: Device) -> None:
    tickets = []
    for tokens in ((3, 4, 5), (49,)):
        tickets.append(device.begin(*tokens))
        device.embed()
        device.end(tickets[-1])
    with pytest.raises(ValueError, match="CPU: two steps are in progress already"):
        device.begin(1)
    np.testing.assert_array_equal(device.wait(tickets[0], 3), device.table[3:6])
    np.testing.assert_array_equal(device.wait(tickets[1], 1), device.table[49:])
    assert device.begin(1) == 2


def test_a_step_without_an_end_has_no_results(device: Device) -> None:
    ticket = device.begin(1)
    with pytest.raises(ValueError, match="has not ended"):
        device.wait(ticket, 1)
    with pytest.raises(ValueError, match="no step of this ticket is in progress"):
        device.wait(ticket + 1, 1)


def test_one_graph_serves_every_batch(device: Device) -> None:
    with pytest.raises(ValueError, match="no graph of this key"):
        device.graph(LAUNCH, 7)
    device.graph(BEGIN_CAPTURE, 7)
    device.embed()
    device.graph(END_CAPTURE)
    for tokens in ((1,), (5, 6, 7, 8), (9, 2)):
        ticket = device.begin(*tokens)
        device.graph(LAUNCH, 7)
        device.end(ticket)
        np.testing.assert_array_equal(device.wait(ticket, len(tokens)), device.table[list(tokens)])
    device.graph(FORGET_ALL)
    with pytest.raises(ValueError, match="no graph of this key"):
        device.graph(LAUNCH, 7)


def test_a_fault_in_a_step_breaks_the_device(device: Device) -> None:
    ticket = device.begin(VOCABULARY)
    for call in (device.embed, device.embed, lambda: device.end(ticket), lambda: device.begin(1)):
        with pytest.raises(DeviceBroken) as broken:
            call()
        assert str(broken.value) == "CPU: a step: embedding: a token id outside of the vocabulary"


def test_an_arena_is_zeroed_and_there_once(device: Device) -> None:
    buffer = device.arena(ARENA_WORK, 10_000)
    assert bytes((ctypes.c_uint8 * 10_000).from_address(buffer.address)) == bytes(10_000)
    with pytest.raises(ValueError, match="the arena for work is there already"):
        device.arena(ARENA_WORK, 10)


def test_memory_that_cannot_be_had_is_refused(device: Device) -> None:
    with pytest.raises(
        OutOfDeviceMemory, match=r"arena for cache needs 1125899\.91 GB of memory; .* are free"
    ):
        device.arena(ARENA_CACHE, 2**50)
    assert device.arena(ARENA_CACHE, 4096).bytes == 4096


@pytest.mark.parametrize("rows", [[0, 1], [1, 0]])
def test_a_product_of_groups_writes_rows_where_they_belong(device: Device, rows: list[int]) -> None:
    """Two groups of one row, whose matrices are 1 and 10 times the identity."""
    size = device.library.value("fd_matrix_bytes", device.handle, 3, 3)
    weights = device.arena(ARENA_WORK, 2 * size)
    for index in range(2):
        values = np.eye(3, dtype=np.float32) * 10**index
        part = RetileArgs(
            source=values.ctypes.data, source_type=FLOAT32, row_stride=3, column_stride=1, rows=3, inputs=3,
            outputs=3, matrix=weights.address + index * size,
        )  # fmt: skip
        device.library.call("fd_upload_begin", device.handle)
        device.library.call("fd_upload", device.handle, byref(part), 1)
        device.library.call("fd_upload_finish", device.handle, byref(c_int32()))
    # Activations: groups of one row, each padded to 64 columns.
    tokens = np.zeros((2, 64), np.float32)
    tokens[:, :3] = [[1, 2, 3], [4, 5, 6]]
    places, counts, out = np.array(rows, np.int32), np.ones(2, np.int32), np.zeros((2, 3), np.float32)
    arguments = ProductArgs(
        weights=weights.address, tokens=tokens.ctypes.data, counts=counts.ctypes.data, groups=2, alignment=1,
        outputs=3, inputs=3, capacity=2, rows=places.ctypes.data, out=out.ctypes.data, out_stride=3,
    )  # fmt: skip
    device.library.enqueue("fd_product", device.stream, arguments)
    np.testing.assert_array_equal(out[rows], [[1, 2, 3], [40, 50, 60]])


def test_float16_is_read_exactly(device: Device) -> None:
    """Every finite half-precision number, as the inputs of one output."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.ascontiguousarray(halves[np.isfinite(halves)])
    count = len(halves)
    matrix = device.arena(ARENA_WORK, device.library.value("fd_matrix_bytes", device.handle, 1, count))
    part = RetileArgs(
        source=halves.ctypes.data, source_type=FLOAT16, row_stride=count, column_stride=1, rows=1,
        inputs=count, outputs=1, matrix=matrix.address,
    )  # fmt: skip
    device.library.call("fd_upload_begin", device.handle)
    device.library.call("fd_upload", device.handle, byref(part), 1)
    bad = c_int32()
    device.library.call("fd_upload_finish", device.handle, byref(bad))
    assert bad.value == 0
    # Behind 32 biases, each input has a value for 32 outputs.
    stored = np.ctypeslib.as_array((ctypes.c_float * (32 * (count + 1))).from_address(matrix.address))
    np.testing.assert_array_equal(stored.reshape(-1, 32)[1:, 0], halves.astype(np.float32))


# ---- workers


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Api]]:
    started: list[Api] = []

    def start_one(*arguments: str, **changes: Any) -> Api:
        config = replace(CONFIG, device="gpu", **changes)
        started.append(Api(config, tmp_path / "log", *arguments, FD_CUDA_LIBRARY=str(LIBRARY)))
        return started[-1]

    yield start_one
    for api in started:
        api.close()


def failure_of(api: Api) -> str:
    while not isinstance(message := api.receive(), Failed):
        pass
    return message.message


def test_a_fault_of_the_library_ends_the_worker_with_a_status_of_its_own(start: Callable[..., Api]) -> None:
    """As on a GPU, a block outside of the cache is found only by the device."""
    lost_block = (
        "import sys\n"
        "from fastdeploy.core.block_pool import BlockPool\n"
        "from fastdeploy.core.worker import main\n"
        "allocate = BlockPool.allocate\n"
        "BlockPool.allocate = lambda *args: [block + 2**20 for block in allocate(*args)]\n"
        "sys.exit(main())"
    )
    api = start("-c", lost_block)
    api.receive_until(Ready)
    api.send(request("one", [5, 6, 7]))
    assert failure_of(api) == "CPU: a step: attention: a position lies in a block outside of the cache"
    assert api.process.wait(DEADLINE_S) == 75
    assert "Traceback" not in api.log()


@pytest.mark.parametrize(
    ("changes", "arena", "options"),
    [
        (
            {"num_gpu_blocks_override": 2**31},
            "cache",
            "--max-num-seqs, --max-model-len or --num-gpu-blocks-override",
        ),
        (
            {"max_num_batched_tokens": 2**28},
            "work",
            "--max-num-batched-tokens, --max-num-seqs or --max-model-len",
        ),
    ],
)
def test_memory_that_cannot_be_had_is_named_with_the_options_to_change(
    start: Callable[..., Api], changes: dict[str, Any], arena: str, options: str
) -> None:
    api = start(**changes)
    line = failure_of(api)
    assert line.startswith(f"CPU: the arena for {arena} needs ")
    assert " GB of memory; " in line
    assert line.endswith(f" GB are free; it needs a lower {options}")
    assert api.process.wait(DEADLINE_S) == 1
    assert "Traceback" not in api.log()
