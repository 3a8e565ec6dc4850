"""The options of dp.toml, each declared once, in one row: name, type, default, help, validator, unit.

These rows are the whole truth: config.py reads the file, words its errors and writes docs/configuration.md
from them.
"""

# ruff: noqa: RUF009 -- row() makes the field of a dataclass, as field() does.
from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from ...common import cors
from ..router.policy.policies import POLICIES
from . import masking
from .launch import HASH, MARKER

#: What a validator gets is a value of the right type; what it returns is the complaint, or None.
Check = Callable[[Any], str | None]

#: Port i of a list that is given as one base number is base + i * step, as in FastDeploy's documentation.
PORT_STEPS = {"ports": 11, "metrics_ports": 100, "engine_worker_queue_ports": 10}
#: Set for every program by the daemon itself.
RESERVED_ENVIRONMENT = ("FD_LOG_DIR", MARKER, HASH)
_POLICIES = ", ".join(f"`{name}`" for name in POLICIES)


def at_least(low: float) -> Check:
    return lambda value: None if value >= low else f"it must be at least {low}"


def between(low: float, high: float) -> Check:
    return lambda value: None if low <= value <= high else f"it must be between {low} and {high}"


def one_of(*values: str | int) -> Check:
    known = ("one of " if len(values) > 1 else "") + ", ".join(map(repr, values))
    return lambda value: None if value in values else f"it must be {known}"


def not_empty(value: str) -> str | None:
    return None if value else "it must not be empty"


def ip_address(value: str) -> str | None:
    """Where a name would be looked up in the loop, and nothing may keep it waiting."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return "it must be an IP address, as 127.0.0.1"
    return None


def environment_names(value: Mapping[str, str]) -> str | None:
    for name in value:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return f"{name!r} cannot be the name of an environment variable"
        if name in RESERVED_ENVIRONMENT:
            return f"{name} is set by the daemon itself; remove it"
    return None


def web_origins(values: tuple[str, ...]) -> str | None:
    return next((problem for value in values if (problem := cors.problem_of(value))), None)


def no_secret(words: tuple[str, ...]) -> str | None:
    found = masking.secret_in(words)
    if found is None:
        return None
    what = f"it must not hold {found}: every user of this machine can read command lines"
    is_api_key = "api-key".startswith(found.lstrip("-").replace("_", "-").lower())
    return f"{what}; write {'api_keys_file = FILE' if is_api_key else 'it into env'}"


def row(default: Any, help: str, check: Check | None = None, unit: str = "") -> Any:
    """One option: its default (`MISSING`: it must be given), one sentence of help, its validator and unit."""
    metadata = {"help": help, "check": check, "unit": unit}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: MappingProxyType(dict(default)), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """Which model is served."""

    path: str = row(MISSING, "Directory of the checkpoint, or the word `demo` for the demo model.", not_empty)
    served_name: str = row("", "Name under which clients ask for it; empty: the directory's name.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSection:
    """How many replicas there are, and what they share."""

    data_parallel_size: int = row(8, "Number of replicas.", between(1, 64))
    tensor_parallel_size: int = row(1, "Processes per replica's network; only 1 is implemented.", one_of(1))
    expert_parallel: bool = row(
        True, "Replicas share the experts of each layer as one group; each holds a part."
    )
    redundant_experts: int = row(0, "Extra copies of the most used experts in each layer.", at_least(0))
    balance_experts: bool = row(False, "Move experts once a minute to even out their measured load.")
    stall_kill: float = row(
        90.0,
        "A rank that others wait for and that makes no progress for so long is killed by them.",
        at_least(1),
        "s",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSection:
    """What each replica runs with. A port option is a list with one port per replica, or one base number."""

    device: str = row(
        "auto", "`cpu`, or `auto`: the same, until there are operations for GPUs.", one_of("auto", "cpu")
    )
    host: str = row(
        "127.0.0.1",
        "Address to listen on, or a name of this machine, which means all addresses of that name; `0.0.0.0` "
        "opens the replicas to the network.",
        not_empty,
    )
    ports: tuple[int, ...] = row(1811, "OpenAI API; a base b means b, b+11, b+22, ...")
    metrics_ports: tuple[int, ...] = row(3101, "Prometheus metrics; a base b means b, b+100, b+200, ...")
    engine_worker_queue_ports: tuple[int, ...] = row(25611, "API process to worker; b, b+10, b+20, ...")
    dtype: str = row(
        "bfloat16",
        "What weights and KV cache are kept in: `bfloat16`, `float32`.",
        one_of("bfloat16", "float32"),
    )
    quantization: str = row(
        "", "Weights of 8 or 4 bits: `wint8`, `wint4`; empty: none.", one_of("", "wint8", "wint4")
    )
    max_model_len: int = row(2048, "Longest sequence, prompt and answer together.", at_least(1), "tokens")
    max_num_seqs: int = row(8, "Sequences that a replica computes at the same time.", at_least(1))
    num_gpu_blocks_override: int = row(
        0, "KV cache in blocks of 64 tokens; 0: from memory.", at_least(0), "blocks"
    )
    threads: int = row(0, "CPU threads of a replica; 0: the cores divided by the replicas.", at_least(0))
    pin_threads: bool = row(
        False, "Keep each thread on a CPU of its own, if there are enough for all replicas."
    )
    api_keys_file: str = row(
        "",
        "File with the keys that replicas ask for, too, one a line, or `credential:NAME`; empty: none.",
    )
    extra_args: tuple[str, ...] = row((), "Further words for the replica's command line.", no_secret)
    env: Mapping[str, str] = row({}, "Further environment variables of the replicas.", environment_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSection:
    """The one address that clients talk to."""

    host: str = row("127.0.0.1", "Address to listen on; `0.0.0.0` opens it to the network.", not_empty)
    port: int = row(30000, "Port to listen on.", between(1, 65535))
    policy: str = row("cache_aware", "Which replica takes a request: " + _POLICIES + ".", one_of(*POLICIES))
    workers: int = row(1, "Processes that relay; one serves thousands of streams.", between(1, 16))
    request_timeout: float = row(
        1800.0,
        "Silence after which the answer of a replica that gives no signs of life is given up.",
        at_least(1),
        "s",
    )
    progress_timeout: float = row(
        90.0, "Silence after which a replica that gives them is taken for dead.", at_least(1), "s"
    )
    api_keys_file: str = row(
        "",
        "File with the keys that clients must show, one a line, or `credential:NAME` for one of systemd's; "
        "empty: none.",
    )
    cors_origins: tuple[str, ...] = row(
        cors.DEFAULT,
        "Origins of the web pages that may read answers, such as `https://app.example`; `loopback` for pages "
        "of this machine, `*` for all; an empty list: none.",
        web_origins,
    )
    extra_args: tuple[str, ...] = row((), "Further words for the router's command line.", no_secret)
    env: Mapping[str, str] = row({}, "Further environment variables of the router.", environment_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperviseSection:
    """When a program counts as failed, and when it is tried again."""

    startup_timeout: float = row(
        600.0, "From start to first token; longer counts as failed.", at_least(1), "s"
    )
    parallel_starts: int = row(0, "Replicas that load at the same time; 0: one per core.", at_least(0))
    start_slot: float = row(
        60.0, "A replica that loads longer does not hold back the next.", at_least(0), "s"
    )
    probe_interval: float = row(5.0, "Between two health checks of a READY replica.", between(0.1, 3600), "s")
    stall_after: float = row(15.0, "Without a good health check for so long: UNHEALTHY.", at_least(1), "s")
    stall_kill: float = row(60.0, "Without a good health check for so long: killed.", at_least(1), "s")
    hang_after: float = row(
        60.0,
        "A replica that has requests and finishes no step for so long, and waits for no other, is killed.",
        at_least(0.5),
        "s",
    )
    idle_probe: float = row(
        60.0,
        "A replica that has had nothing to do for so long is asked for a token; 0: never.",
        at_least(0),
        "s",
    )
    drain_timeout: float = row(
        30.0,
        "Before a planned stop, what a replica has in hand gets so long to end; the rest goes on elsewhere.",
        between(0, 86400),
        "s",
    )
    stop_timeout: float = row(
        30.0,
        "From being told to stop to being killed; changing it restarts every program.",
        between(1, 3600),
        "s",
    )
    backoff_first: float = row(1.0, "Before the first restart; doubles with each failure.", at_least(0), "s")
    backoff_max: float = row(60.0, "Longest time before a restart.", at_least(0), "s")
    stable_after: float = row(120.0, "READY for so long: earlier failures are forgotten.", at_least(1), "s")
    budget: int = row(10, "Failures within `budget_window` that put a replica into QUARANTINE.", at_least(1))
    box_budget: int = row(
        40,
        "Failures of all replicas within `budget_window` after which each further one is paused.",
        at_least(1),
    )
    box_calm: float = row(
        60.0,
        "Paused replicas start again, one at a time, after this time without a failure of any replica.",
        at_least(1),
        "s",
    )
    budget_window: float = row(600.0, "The time in which failures are counted.", at_least(1), "s")
    quarantine: float = row(600.0, "Between two tries of a replica in quarantine.", at_least(1), "s")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSection:
    """Where the daemon tells Prometheus what it sees and counts; router and replicas do so by themselves."""

    host: str = row("127.0.0.1", "Address to listen on; `0.0.0.0` opens it to the network.", ip_address)
    port: int = row(30001, "Port of the daemon's `/metrics`; 0: none.", between(0, 65535))


@dataclass(frozen=True, slots=True, kw_only=True)
class PathsSection:
    """Where things are kept; empty: `state`, `run`, `logs` below `--prefix`, without one the system's."""

    state: Path = row("", "What must survive a restart; without a prefix /var/lib/fd.")
    run: Path = row("", "Sockets and supervisord's files; without a prefix /run/fd.")
    logs: Path = row("", "One directory per program; without a prefix /var/log/fd.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of dp.toml, with every default filled in and every path absolute."""

    model: ModelSection
    parallel: ParallelSection
    engine: EngineSection
    router: RouterSection
    supervise: SuperviseSection
    metrics: MetricsSection
    paths: PathsSection


SECTIONS: dict[str, type] = dict(get_type_hints(Config))
