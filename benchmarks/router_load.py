"""Load generators and measurements for routers: requests by wrk and our event streams."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .native import program
from .process_cost import cpu_seconds, spent

UNARY_BODY_BYTES = 600


class LoadError(Exception):
    """A load that failed because a request was not served; the message is one line."""


@dataclass(frozen=True, slots=True)
class UnaryFigures:
    rps: float
    p50_ms: float
    p99_ms: float
    #: CPU microseconds of the router's processes per request.
    cpu_us: float


@dataclass(frozen=True, slots=True)
class StreamFigures:
    chunks_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    #: From the engine's send of an event until the client has read it.
    delay_p50_ms: float
    delay_p99_ms: float
    #: Time between two events of a stream.
    gap_p99_ms: float
    #: CPU microseconds of the router's processes per chunk.
    cpu_us: float


@dataclass(frozen=True, slots=True)
class HeldStreams:
    pss_mb: float


def unary(port: int, pid: int | None, connections: int, seconds: float, directory: Path) -> UnaryFigures:
    """Send consecutive POST requests of 600 bytes on each connection.

    Raises:
        LoadError: one of them was refused or got lost.
    """
    body = _body_file(directory, {})
    command = [
        *(require_wrk(), "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"),
        *("-s", str(Path(__file__).with_name("unary.lua")), f"http://127.0.0.1:{port}", "--", str(body)),
    ]
    before = cpu_seconds(pid) if pid else {}
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    after = cpu_seconds(pid) if pid else {}
    if output.returncode != 0:
        raise LoadError(f"wrk ended with {output.returncode}: {output.stderr.strip()}")
    found = json.loads(output.stdout.splitlines()[-1])
    if found["refused"] or found["broken"] or not found["requests"]:
        raise LoadError(
            f"of {found['requests']} requests {found['refused']} were refused, {found['broken']} broken"
        )
    return UnaryFigures(
        rps=found["requests"] / found["seconds"],
        p50_ms=found["p50_ms"],
        p99_ms=found["p99_ms"],
        cpu_us=spent(before, after) / found["requests"] * 1e6,
    )


def streams(
    port: int, pid: int | None, count: int, chunks: int, rounds: int, directory: Path
) -> StreamFigures:
    """Run `count` readers, each with consecutive streams, all started within a second.

    Raises:
        LoadError: a stream was refused, ended early, or lacked an event.
    """
    before = cpu_seconds(pid) if pid else {}
    found = run_sse_load(port, directory, count=count, chunks=chunks, rounds=rounds, ramp_ms=1000)
    after = cpu_seconds(pid) if pid else {}
    return StreamFigures(
        chunks_per_s=found["chunks"] / found["seconds"],
        ttft_p50_ms=found["ttft_ms"]["p50"],
        ttft_p99_ms=found["ttft_ms"]["p99"],
        delay_p50_ms=found["delay_ms"]["p50"],
        delay_p99_ms=found["delay_ms"]["p99"],
        gap_p99_ms=found["gap_ms"]["p99"],
        cpu_us=spent(before, after) / found["chunks"] * 1e6,
    )


def run_sse_load(
    port: int,
    directory: Path,
    *,
    count: int,
    chunks: int,
    rounds: int = 1,
    ramp_ms: int = 0,
    limit_s: int = 60,
    when_begun: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the report of sse_load.cc. `when_begun` is called when each reader has had an event.

    Raises:
        LoadError: a stream was refused, ended early, or lacked an event.
    """
    body = _body_file(directory, {"stream": True, "max_tokens": chunks})
    numbers = (port, body, count, chunks, rounds, ramp_ms, limit_s)
    with subprocess.Popen(
        [program("sse_load"), *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as load:
        assert load.stdout is not None
        assert load.stderr is not None
        line = load.stdout.readline()
        if line == "begun\n":
            when_begun()
            line = load.stdout.readline()
        if not line:
            raise LoadError(f"the readers have ended: {load.stderr.read().strip()}")
    found: dict[str, Any] = json.loads(line)
    if found["errors"]:
        raise LoadError(f"{found['errors']} of {count} readers were let down; the first: {found['why']}")
    return found


def require_wrk() -> str:
    path = shutil.which("wrk")
    if path is None:
        raise SystemExit("wrk is not installed; requests are made with it: apt-get install wrk")
    return path


def _body_file(directory: Path, fields: dict[str, Any]) -> Path:
    """Return the file of a chat request of 600 bytes."""
    request = {"model": "mock", "messages": [{"role": "user", "content": ""}], **fields}
    request["messages"][0]["content"] = "x" * (UNARY_BODY_BYTES - len(json.dumps(request)))
    path = directory / f"body-{len(fields)}.json"
    path.write_text(json.dumps(request))
    return path
