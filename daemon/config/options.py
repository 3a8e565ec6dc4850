"""Declarations of all options of dp.toml: name, type, default, help, validator, unit.

loader.py reads the file, words its errors and writes docs/configuration.md from these declarations. An
option's default stands here only: programs.py passes every option on the command line.
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

#: Validator: takes a value of the right type, returns an error message or None.
Check = Callable[[Any], str | None]

#: Replica i listens on base + i * step where an option is one base port, as in FastDeploy's documentation.
PORT_STEPS = {"ports": 11, "metrics_ports": 100, "engine_worker_queue_ports": 10}
#: Variables that the daemon sets for every program.
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
    """Reject host names: a lookup would block the daemon's loop."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return "it must be an IP address, for example 127.0.0.1"
    return None


def environment_names(value: Mapping[str, str]) -> str | None:
    for name in value:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return f"{name!r} is not a valid name of an environment variable"
        if name in RESERVED_ENVIRONMENT:
            return f"{name} is set by the daemon; remove it"
    return None


def web_origins(values: tuple[str, ...]) -> str | None:
    return next((problem for value in values if (problem := cors.problem_of(value))), None)


def no_secret(words: tuple[str, ...]) -> str | None:
    found = masking.secret_in(words)
    if found is None:
        return None
    what = f"it must not contain {found}: every user of this machine can read command lines"
    is_api_key = "api-key".startswith(found.lstrip("-").replace("_", "-").lower())
    return f"{what}; write {'api_keys_file = FILE' if is_api_key else 'it into env'}"


def row(default: Any, help: str, check: Check | None = None, unit: str = "", old_name: str = "") -> Any:
    """Declare an option.

    Args:
        default: `MISSING` if the option is required.
        help: one sentence.
        old_name: former name, which is still accepted.
    """
    metadata = {"help": help, "check": check, "unit": unit, "old_name": old_name}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: MappingProxyType(dict(default)), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """The model."""

    path: str = row(MISSING, "Directory of the checkpoint, or `demo` for the demo model.", not_empty)
    served_name: str = row("", "Model name that clients use; empty: the directory's name.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSection:
    """The replicas and how they share experts."""

    data_parallel_size: int = row(8, "Number of replicas.", between(1, 64))
    tensor_parallel_size: int = row(
        1, "Processes that share a replica's model; only 1 is supported.", one_of(1)
    )
    expert_parallel: bool = row(
        True, "All replicas form one expert-parallel group; each holds a part of the experts of every layer."
    )
    redundant_experts: int = row(0, "Extra copies of the most used experts in each layer.", at_least(0))
    balance_experts: bool = row(False, "Move experts between replicas once a minute to balance their load.")
    collective_timeout: float = row(
        90.0,
        "Time without progress after which waiting ranks kill the rank that they wait for.",
        at_least(1),
        "s",
        old_name="stall_kill",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSection:
    """Options of each replica. A port option is one base port, or a list with one port per replica."""

    device: str = row(
        "auto", "`cpu` or `auto`, which means `cpu` until GPUs are supported.", one_of("auto", "cpu")
    )
    host: str = row(
        "127.0.0.1",
        "Address to listen on, or a name of this machine for all addresses of that name; `0.0.0.0` makes the "
        "replicas reachable from the network.",
        not_empty,
    )
    ports: tuple[int, ...] = row(1811, "OpenAI API; a base b means b, b+11, b+22, ...")
    metrics_ports: tuple[int, ...] = row(3101, "Prometheus metrics; a base b means b, b+100, b+200, ...")
    engine_worker_queue_ports: tuple[int, ...] = row(
        25611, "API process to worker; a base b means b, b+10, b+20, ..."
    )
    dtype: str = row(
        "bfloat16",
        "Type of weights and KV cache: `bfloat16`, `float32`.",
        one_of("bfloat16", "float32"),
    )
    quantization: str = row(
        "", "Weight-only quantization: `wint8`, `wint4`; empty: none.", one_of("", "wint8", "wint4")
    )
    max_model_len: int = row(
        2048, "Maximum length of a sequence, prompt and output together.", at_least(1), "tokens"
    )
    max_num_seqs: int = row(8, "Maximum number of sequences in a batch.", at_least(1))
    num_gpu_blocks_override: int = row(
        0, "Size of the KV cache in blocks of 64 tokens; 0: as memory allows.", at_least(0), "blocks"
    )
    threads: int = row(0, "CPU threads of a replica; 0: cores divided by replicas.", at_least(0))
    pin_threads: bool = row(False, "Pin each thread to its own CPU, if there are enough for all replicas.")
    api_keys_file: str = row(
        "",
        "File with the API keys that replicas accept, one per line, or `credential:NAME` for a systemd "
        "credential; empty: no key is needed.",
    )
    extra_args: tuple[str, ...] = row((), "Additional command-line arguments of the replicas.", no_secret)
    env: Mapping[str, str] = row({}, "Additional environment variables of the replicas.", environment_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSection:
    """The router, the one address for clients."""

    host: str = row(
        "127.0.0.1",
        "Address to listen on; `0.0.0.0` makes the router reachable from the network.",
        not_empty,
    )
    port: int = row(30000, "Port to listen on.", between(1, 65535))
    policy: str = row("cache_aware", "Load-balancing policy: " + _POLICIES + ".", one_of(*POLICIES))
    workers: int = row(1, "Worker processes; one serves thousands of streams.", between(1, 16))
    request_timeout: float = row(
        1800.0,
        "Time without data from a replica that sends no keep-alives after which its request fails.",
        at_least(1),
        "s",
    )
    progress_timeout: float = row(
        90.0,
        "Time without data from a replica that sends keep-alives after which it counts as dead.",
        at_least(1),
        "s",
    )
    api_keys_file: str = row(
        "",
        "File with the API keys that clients must present, one per line, or `credential:NAME` for a systemd "
        "credential; empty: no key is needed.",
    )
    cors_origins: tuple[str, ...] = row(
        cors.DEFAULT,
        "Origins of web pages that may read responses, such as `https://app.example`; `loopback` for pages "
        "of this machine, `*` for all; an empty list: none.",
        web_origins,
    )
    extra_args: tuple[str, ...] = row((), "Additional command-line arguments of the router.", no_secret)
    env: Mapping[str, str] = row({}, "Additional environment variables of the router.", environment_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperviseSection:
    """Failure detection and restarts."""

    startup_timeout: float = row(
        600.0, "Time from start to first token after which a replica counts as failed.", at_least(1), "s"
    )
    parallel_starts: int = row(
        0, "Number of replicas that load at the same time; 0: one per core.", at_least(0)
    )
    start_slot: float = row(
        60.0, "Loading time after which a replica no longer delays the next one.", at_least(0), "s"
    )
    probe_interval: float = row(
        5.0, "Interval between health checks of a READY replica.", between(0.1, 3600), "s"
    )
    unhealthy_after: float = row(
        15.0,
        "Time without a successful health check after which a replica is UNHEALTHY.",
        at_least(1),
        "s",
        old_name="stall_after",
    )
    unhealthy_kill_after: float = row(
        60.0,
        "Time without a successful health check after which a replica is killed.",
        at_least(1),
        "s",
        old_name="stall_kill",
    )
    no_progress_timeout: float = row(
        60.0,
        "Time without a finished step after which a replica with requests is killed, unless it waits for "
        "another one.",
        at_least(0.5),
        "s",
        old_name="hang_after",
    )
    idle_probe: float = row(
        60.0, "Idle time after which a replica has to generate a token as a test; 0: never.", at_least(0), "s"
    )
    drain_timeout: float = row(
        30.0,
        "Time that requests get to finish before a planned stop; the router resumes the others on another "
        "replica.",
        between(0, 86400),
        "s",
    )
    stop_timeout: float = row(
        30.0,
        "Time from SIGTERM to SIGKILL; a change restarts every program.",
        between(1, 3600),
        "s",
    )
    backoff_first: float = row(
        1.0, "Delay before the first restart; it doubles with each failure.", at_least(0), "s"
    )
    backoff_max: float = row(60.0, "Maximum delay before a restart.", at_least(0), "s")
    stable_after: float = row(
        120.0, "Time in state READY after which earlier failures no longer count.", at_least(1), "s"
    )
    budget: int = row(
        10, "Number of failures within `budget_window` after which a replica is QUARANTINED.", at_least(1)
    )
    box_budget: int = row(
        40,
        "Number of failures of all replicas within `budget_window` after which each further one is paused.",
        at_least(1),
    )
    box_calm: float = row(
        60.0,
        "Time without a failure of any replica after which paused replicas start again, one at a time.",
        at_least(1),
        "s",
    )
    budget_window: float = row(600.0, "Time in which failures are counted.", at_least(1), "s")
    quarantine: float = row(600.0, "Interval between restarts of a quarantined replica.", at_least(1), "s")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSection:
    """Prometheus metrics of the daemon; router and replicas have their own."""

    host: str = row(
        "127.0.0.1", "Address to listen on; `0.0.0.0` makes it reachable from the network.", ip_address
    )
    port: int = row(30001, "Port of the daemon's `/metrics`; 0: none.", between(0, 65535))


@dataclass(frozen=True, slots=True, kw_only=True)
class PathsSection:
    """Directories. Empty: `state`, `run` and `logs` below `--prefix`, or the system's without a prefix."""

    state: Path = row("", "Files that survive a restart; without a prefix /var/lib/fd.")
    run: Path = row("", "Sockets and supervisord's files; without a prefix /run/fd.")
    logs: Path = row("", "Log files, one directory per program; without a prefix /var/log/fd.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Content of dp.toml, with every default filled in and every path absolute."""

    model: ModelSection
    parallel: ParallelSection
    engine: EngineSection
    router: RouterSection
    supervise: SuperviseSection
    metrics: MetricsSection
    paths: PathsSection
    #: One message for each old name of an option in the file.
    deprecations: tuple[str, ...] = ()


SECTIONS: dict[str, type] = {
    name: kind for name, kind in get_type_hints(Config).items() if name != "deprecations"
}
