"""The cases of the router comparison: load, contenders and metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from . import router_load
from .process_cost import pss_bytes
from .router_contenders import DIRECT, RunningRouter

#: Results of one measurement by metric: rps, cpu_us, ttft_p99_ms, ...
Figures = dict[str, float]

_ALL = (DIRECT, "ours", "sglang", "vllm", "nginx")
_CHUNKS = 100
#: Streams per reader. The second uses a used connection, like those of a client's pool: only there do small
#: packets that the system delays (no TCP_NODELAY) cost 40 ms.
_ROUNDS = 2
#: Streams with one event every five seconds.
IDLE_INTERVAL_MS = 5000


@dataclass(frozen=True, slots=True)
class UnaryCase:
    #: Number of connections.
    size: int
    contenders: tuple[str, ...] = _ALL
    kind: str = "unary"

    @property
    def name(self) -> str:
        return f"{self.kind}_c{self.size}"

    def measure(self, router: RunningRouter, seconds: float, directory: Path) -> Figures:
        return asdict(router_load.unary(router.port, router.pid, self.size, seconds, directory))


@dataclass(frozen=True, slots=True)
class StreamCase:
    #: Number of streams.
    size: int
    contenders: tuple[str, ...] = _ALL
    kind: str = "sse"

    @property
    def name(self) -> str:
        return f"{self.kind}_c{self.size}"

    def measure(self, router: RunningRouter, seconds: float, directory: Path) -> Figures:
        return asdict(router_load.streams(router.port, router.pid, self.size, _CHUNKS, _ROUNDS, directory))


@dataclass(frozen=True, slots=True)
class HeldCase:
    """Memory of a router with many idle streams, in front of its own engines."""

    size: int = 4096
    contenders: tuple[str, ...] = ("ours", "sglang", "vllm", "nginx")
    kind: str = "memory"

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.size}"

    def measure(self, router: RunningRouter, seconds: float, directory: Path) -> Figures:
        assert router.pid is not None
        found: list[float] = []

        def weigh() -> None:
            # After the second event of each stream.
            time.sleep(IDLE_INTERVAL_MS / 1000)
            assert router.pid is not None
            found.append(pss_bytes(router.pid) / 1e6)

        router_load.run_sse_load(
            router.port, directory, count=self.size, chunks=3, ramp_ms=4000, when_begun=weigh
        )
        return {"pss_mb": found[0]}


Case = UnaryCase | StreamCase | HeldCase

CASES: tuple[Case, ...] = (
    UnaryCase(1),
    UnaryCase(16),
    UnaryCase(64, (*_ALL, "sglang_quiet", "vllm_quiet")),
    UnaryCase(64, ("ours", "ours2"), kind="workers"),
    StreamCase(64),
    StreamCase(256),
    StreamCase(1024),
    HeldCase(),
)


def cases_named(prefixes: list[str]) -> list[Case]:
    """
    Raises:
        ValueError: no case has one of the prefixes; the message lists all cases.
    """
    for prefix in prefixes:
        if not any(case.name.startswith(prefix) for case in CASES):
            raise ValueError(f"--only {prefix}: it must begin one of {', '.join(_names())}")
    return [case for case in CASES if any(case.name.startswith(prefix) for prefix in prefixes)]


def _names() -> Iterator[str]:
    return (case.name for case in CASES)
