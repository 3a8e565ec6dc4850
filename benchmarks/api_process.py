"""Processor time of an API process per token of its streams, from outside."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from fastdeploy.common.ports import find_free

from .api_functions import tokens_of_text
from .api_inputs import RATE, STREAMS, conversation
from .process_cost import cpu_seconds
from .rows import ROOT

_SECONDS = 10
#: Tokens of a stream that is sent without a pause.
_FLOOD_TOKENS = 400


@dataclass(frozen=True, slots=True)
class Load:
    #: Of a core, while STREAMS streams get RATE tokens per second each.
    share: float
    tokens_per_second: float

    @property
    def microseconds_per_token(self) -> float:
        return self.share / self.tokens_per_second * 1e6


def ours() -> tuple[Load, float]:
    """Return the load at the steady rate, and the tokens per second that the process sends at most."""
    with tempfile.TemporaryDirectory(prefix="fd-bench-") as directory:
        tokens = Path(directory) / "tokens.json"
        tokens.write_text(json.dumps(tokens_of_text()))
        with _replica(RATE, tokens, Path(directory)) as (port, http):
            steady = _steady(port, http)
        with _replica(0, tokens, Path(directory)) as (port, _):
            most = _flood(port)
    return steady, most


def peer(command: Sequence[str]) -> tuple[Load, float]:
    """Do the same with a server that is started with two further arguments, port and tokens per second."""
    with _peer(command, RATE) as (port, pid):
        steady = _steady(port, pid)
    with _peer(command, 0) as (port, _):
        return steady, _flood(port)


@contextmanager
def _peer(command: Sequence[str], rate: int) -> Iterator[tuple[int, int]]:
    [port] = find_free(1)
    process = subprocess.Popen([*command, str(port), str(rate)], cwd=ROOT)
    try:
        _wait_ready(port, process)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _replica(rate: int, tokens: Path, directory: Path) -> Iterator[tuple[int, int]]:
    """Yield the port of the API and the process id of the HTTP process."""
    port, metrics_port = find_free(2)
    command = [sys.executable, "-m", "benchmarks.paced_replica", str(rate), str(tokens)]
    command += ["--model", "demo", "--port", str(port), "--metrics-port", str(metrics_port)]
    with (directory / "replica.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        _wait_ready(port, process)
        yield port, psutil.Process(process.pid).children()[0].pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"a server of the benchmark did not start: {process.args!r}")


def _steady(port: int, pid: int) -> Load:
    """Measure in the middle of the streams, when all have begun and none has ended."""

    async def run() -> Load:
        tokens = RATE * (_SECONDS + 4)
        counts = [0] * STREAMS
        readers = [asyncio.create_task(_read(port, tokens, counts, i)) for i in range(STREAMS)]
        while min(counts) < 2:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        began, spent, seen = time.monotonic(), cpu_seconds(pid)[pid], sum(counts)
        await asyncio.sleep(_SECONDS)
        seconds = time.monotonic() - began
        load = Load(
            share=(cpu_seconds(pid)[pid] - spent) / seconds,
            tokens_per_second=(sum(counts) - seen) / seconds,
        )
        assert not any(reader.done() for reader in readers), "a stream has ended during the measurement"
        await asyncio.gather(*readers)
        return load

    return asyncio.run(run())


def _flood(port: int) -> float:
    """Return the tokens per second of all streams together."""

    async def run() -> float:
        counts = [0] * STREAMS
        began = time.monotonic()
        await asyncio.gather(*(_read(port, _FLOOD_TOKENS, counts, i) for i in range(STREAMS)))
        return sum(counts) / (time.monotonic() - began)

    return asyncio.run(run())


async def _read(port: int, tokens: int, counts: list[int], index: int) -> None:
    """Read a stream; count its events in `counts[index]`."""
    body = json.dumps({**conversation(1), "max_tokens": tokens, "ignore_eos": True, "stop": None}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    head = await reader.readline()
    assert b" 200 " in head, head
    is_done = False
    async for line in reader:
        if line.startswith(b"data: {"):
            counts[index] += 1
        is_done |= line.startswith(b"data: [DONE]")
    assert is_done, "a stream broke"
    assert counts[index] >= tokens * 0.9, f"a stream had {counts[index]} events for {tokens} tokens"
    writer.close()
