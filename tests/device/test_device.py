"""The device behind the C interface: arenas, steps in two slots, captured graphs, errors in one line."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from ctypes import byref, c_int32, c_int64, c_uint64, c_void_p

import numpy as np
import pytest
import torch

from . import library as fd

BAD_ARGUMENT, NO_MEMORY, NO_GRAPH = 1, 2, 4
BEGIN, END, LAUNCH, FORGET = range(4)
VOCABULARY, WIDTH, CAPACITY = 500, 128, 64
RESULT_BYTES = 4 * CAPACITY


class Buffer(ctypes.Structure):
    _fields_ = [("address", c_uint64), ("bytes", c_int64)]


class Info(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char * 64),
        ("numeric_version", ctypes.c_char * 16),
        ("layout_version", c_int32),
        ("multiprocessors", c_int32),
        ("bytes_free", c_int64),
        ("bytes_total", c_int64),
        ("value_bytes", c_int32),
        ("biases_in_matrices", c_int32),
    ]


class Device:
    def __init__(self) -> None:
        self.library, self.handle = fd.library(), c_void_p()
        self.library.fd_stream.restype = c_void_p
        assert self.open(self.handle) == 0, self.error()

    def open(self, handle: c_void_p, ordinal: int = 0, type: int = 2, block_size: int = 64) -> int:
        args = fd.OpenArgs(ordinal=ordinal, type=type, block_size=block_size)
        return self.library.fd_open(byref(args), byref(handle))

    def error(self) -> str:
        return self.library.fd_last_error().decode()

    def arena(self, kind: int, size: int) -> tuple[int, Buffer]:
        buffer = Buffer()
        return self.library.fd_arena(self.handle, kind, c_int64(size), byref(buffer)), buffer

    def steps(self) -> None:
        self.plan, self.results = Buffer(), Buffer()
        sizes = c_int64(4096), c_int64(RESULT_BYTES)
        assert self.library.fd_steps(self.handle, *sizes, byref(self.plan), byref(self.results)) == 0

    def begin(self, plan: np.ndarray) -> tuple[int, int]:
        ticket = c_uint64()
        status = self.library.fd_step_begin(
            self.handle, c_void_p(plan.ctypes.data), c_int64(plan.nbytes), byref(ticket)
        )
        return status, ticket.value

    def graph(self, verb: int, key: int = 0) -> int:
        return self.library.fd_graph(self.handle, verb, c_uint64(key))

    def end(self, ticket: int) -> int:
        return self.library.fd_step_end(self.handle, c_uint64(ticket))

    def wait(self, ticket: int) -> np.ndarray:
        results = c_void_p()
        assert self.library.fd_step_wait(self.handle, c_uint64(ticket), byref(results)) == 0, self.error()
        return np.ctypeslib.as_array((c_int32 * CAPACITY).from_address(results.value or 0)).copy()

    def close(self) -> None:
        self.library.fd_close(self.handle)


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.close()


def plan(*tokens: int) -> np.ndarray:
    """Return a step of one token for each sequence."""
    n = len(tokens)
    header = [n, n, 1, n, *range(n + 1), *[0] * n, *[0] * n, *tokens, *range(n)]
    return np.array(header, dtype=np.int32)


class Network:
    """Embeds tokens; the result of each token is its best column."""

    def __init__(self, device: Device) -> None:
        torch.manual_seed(1)
        self.device = device
        self.table = torch.randn(VOCABULARY, WIDTH, device="cuda").bfloat16()
        self.best = self.table.float().argmax(1).tolist()
        _, work = device.arena(2, CAPACITY * WIDTH * 4)
        self.hidden_states = work.address
        torch.cuda.synchronize()

    def enqueue(self) -> None:
        stream = c_void_p(self.device.library.fd_stream(self.device.handle))
        args = fd.fill(
            fd.EmbeddingArgs, step=self.device.plan.address, table=self.table, vocabulary=VOCABULARY,
            width=WIDTH, hidden_states=self.hidden_states, drawn=self.device.results.address,
            capacity=CAPACITY,
        )  # fmt: skip
        assert self.device.library.fd_embedding(stream, byref(args)) == 0
        args = fd.fill(
            fd.DrawArgs, logits=self.hidden_states, count=self.device.plan.address,
            drawn=self.device.results.address, vocabulary=WIDTH, capacity=CAPACITY,
        )  # fmt: skip
        assert self.device.library.fd_draw(stream, byref(args)) == 0


def test_device_reports_its_properties(device: Device) -> None:
    info = Info()
    assert device.library.fd_info(device.handle, byref(info)) == 0
    assert info.numeric_version == b"sm90-2"
    assert info.name.decode() == torch.cuda.get_device_name()
    assert 0 < info.bytes_free <= info.bytes_total


def test_an_arena_is_zeroed_and_there_once(device: Device) -> None:
    device.steps()
    status, buffer = device.arena(2, CAPACITY * WIDTH * 4)
    assert status == 0
    # The best column of zeros is the first one; NaN would give -1.
    args = fd.fill(
        fd.DrawArgs, logits=buffer.address, count=device.plan.address, drawn=device.results.address,
        vocabulary=WIDTH, capacity=CAPACITY,
    )  # fmt: skip
    _, ticket = device.begin(plan(*[0] * CAPACITY))
    assert device.library.fd_draw(c_void_p(device.library.fd_stream(device.handle)), byref(args)) == 0
    assert device.end(ticket) == 0
    assert (device.wait(ticket) == 0).all()
    assert device.arena(2, 1000)[0] == BAD_ARGUMENT
    assert device.error() == "the arena for work is there already"


def test_too_much_memory_is_refused_in_one_line(device: Device) -> None:
    assert device.arena(0, 2**50)[0] == NO_MEMORY
    line = r"the arena for weights needs 1125899.91 GB of GPU memory; [\d.]+ GB of [\d.]+ GB are free"
    assert re.fullmatch(line, device.error())
    assert device.arena(0, 4096)[0] == 0


def test_two_steps_may_be_in_flight(device: Device) -> None:
    device.steps()
    network = Network(device)
    tickets = []
    for tokens in ((3, 4, 5), (499,)):
        status, ticket = device.begin(plan(*tokens))
        assert status == 0
        network.enqueue()
        assert device.end(ticket) == 0
        tickets.append(ticket)
    assert device.begin(plan(1))[0] == BAD_ARGUMENT
    assert device.error() == "two steps are under way already"
    assert device.wait(tickets[0])[:3].tolist() == [network.best[t] for t in (3, 4, 5)]
    assert device.wait(tickets[1])[0] == network.best[499]
    assert device.begin(plan(1))[0] == 0


def test_a_step_takes_tokens_that_the_step_before_draws(device: Device) -> None:
    device.steps()
    network = Network(device)
    tickets = []
    for tokens in ((3, 4, 5), (-3, 7, -1)):
        _, ticket = device.begin(plan(*tokens))
        network.enqueue()
        assert device.end(ticket) == 0
        tickets.append(ticket)
    first, second = (device.wait(ticket)[:3].tolist() for ticket in tickets)
    assert first == [network.best[t] for t in (3, 4, 5)]
    assert second == [network.best[t] for t in (first[2], 7, first[0])]


def test_one_graph_serves_every_batch(device: Device) -> None:
    device.steps()
    network = Network(device)
    assert device.graph(LAUNCH, 7) == NO_GRAPH
    assert device.graph(BEGIN, 7) == 0
    network.enqueue()
    assert device.graph(END) == 0
    generator = np.random.default_rng(1)
    for size in (1, CAPACITY, 17, 2):
        tokens = generator.integers(0, VOCABULARY, size).tolist()
        status, ticket = device.begin(plan(*tokens))
        assert status == 0
        assert device.graph(LAUNCH, 7) == 0
        assert device.end(ticket) == 0
        assert device.wait(ticket)[:size].tolist() == [network.best[t] for t in tokens]
    assert device.graph(FORGET) == 0
    assert device.graph(LAUNCH, 7) == NO_GRAPH


def test_a_gpu_that_is_not_there(device: Device) -> None:
    assert device.open(c_void_p(), ordinal=99) == BAD_ARGUMENT
    assert device.error() == "opening GPU 99: invalid device ordinal"


def test_what_a_gpu_does_not_compute_is_refused(device: Device) -> None:
    assert device.open(c_void_p(), type=0) == BAD_ARGUMENT
    assert device.error() == "GPUs compute in bfloat16 only"
    assert device.open(c_void_p(), block_size=16) == BAD_ARGUMENT
    assert device.error() == "on GPUs a block of the cache has 64 tokens"


def test_a_plan_that_does_not_fit(device: Device) -> None:
    device.steps()
    assert device.begin(np.zeros(2000, np.int32))[0] == BAD_ARGUMENT
    assert device.error() == "a plan of 8000 bytes; a slot has 4096"
