"""Derives programs from a configuration: one router and N replicas. Pure: nothing is started or written."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...common.addresses import authority, is_wildcard
from ...common.cors import DEFAULT
from ...common.errors import ConfigError
from ...common.foreign_text import parse_json, printable
from ...common.tracing_config import ENDPOINT_FLAG, RATIO_FLAG
from ...expert_parallel.layout import PROTOCOL_VERSION
from ..router.config.flags import file_parser, fixed_flags
from ..router.config.flags_file import fingerprint
from .launch import HASH, MARKER
from .loader import Config
from .options import SuperviseSection

ROUTER = "router"

#: Seconds that in-flight requests get after SIGTERM; then their streams end with an error event. The router
#: forwards that event, so it gets more time than the replicas. Both are less than the daemon's shutdown grace
#: period (main.py). `extra_args` can override them.
_REPLICA_GRACE = 5
_ROUTER_GRACE = 8
_GROUP_FLAG = "--expert-parallel-group"
_NAME = re.compile(r"router|replica[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Program:
    """Supervised program: its command line, environment, ports and probes."""

    name: str
    argv: tuple[str, ...]
    #: Additions to the daemon's own environment.
    env: Mapping[str, str]
    #: All ports that it listens on; the first one answers GET /health.
    ports: tuple[int, ...]
    #: Address for the daemon's probes.
    host: str = "127.0.0.1"
    #: Model name in a readiness probe; empty: the replica's own.
    model: str = ""
    #: Seconds from SIGTERM to SIGKILL by supervisord. A change needs a restart.
    stop_timeout: float = SuperviseSection().stop_timeout
    #: File with more arguments, read at its start and at SIGHUP; empty: none.
    flags_file: str = ""
    #: Arguments in that file.
    flags: tuple[str, ...] = ()
    #: Settings among `flags` that SIGHUP cannot change.
    fixed: tuple[str, ...] = ()
    #: Hash of everything that needs a restart when it changes.
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        parts = [self.name, self.argv, dict(self.env), self.ports, self.host, self.stop_timeout]
        parts += [self.flags_file, self.fixed] if self.flags_file else []
        text = json.dumps(parts, sort_keys=True)
        object.__setattr__(self, "hash", hashlib.sha256(text.encode()).hexdigest()[:12])

    @property
    def replica(self) -> int | None:
        """The replica's number (DP rank, index into every port list), None for the router."""
        return None if self.name == ROUTER else int(self.name.removeprefix("replica"))

    @property
    def label(self) -> str:
        """Its name for people: "router", "replica 3"."""
        return ROUTER if self.replica is None else f"replica {self.replica}"

    @property
    def words(self) -> tuple[str, ...]:
        """Its command line, with the arguments in the flags file."""
        return (*self.argv, *self.flags)

    @property
    def flags_text(self) -> str:
        return json.dumps(self.flags)

    @property
    def flags_hash(self) -> str:
        """The hash that a process reports after it has read `flags_text`."""
        return fingerprint(self.flags_text.encode())

    def runs_as(self, other: Program) -> bool:
        """Return whether `other` differs neither in what needs a restart nor in its flags."""
        return (self.hash, self.flags) == (other.hash, other.flags)

    @property
    def launch_name(self) -> str:
        """Name of its launch file. Older launch files stay while their process runs."""
        return f"{self.name}-{self.hash}.json"

    def launch_text(self, run: Path) -> str:
        """Return the launch file for fd-run. The environment marks every process of the program."""
        content = {
            "name": self.name,
            "argv": self.argv,
            "env": {**self.env, MARKER: f"{run}#{self.name}", HASH: self.hash},
            "ports": self.ports,
            "host": self.host,
            "model": self.model,
            "stop_timeout": self.stop_timeout,
            "flags_file": self.flags_file,
            "fixed": self.fixed,
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_launch_text(cls, text: str) -> Program:
        """Return the program of a launch file, without `flags`, which change while it runs.

        Raises ValueError for a text that is not from `launch_text`.
        """
        content = parse_json(text)
        try:
            return cls._from_launch(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a launch file ({printable(repr(error))})") from None

    @classmethod
    def _from_launch(cls, content: Any) -> Program:
        # Do not convert numbers: 30 and 30.0 have different hashes.
        program = cls(
            name=_of(str, content["name"]),
            argv=tuple(_of(str, word) for word in content["argv"]),
            env=MappingProxyType(
                {k: _of(str, v) for k, v in content["env"].items() if k not in (MARKER, HASH)}
            ),
            ports=tuple(_of(int, port) for port in content["ports"]),
            host=_of(str, content["host"]),
            model=_of(str, content["model"]),
            stop_timeout=_of((int, float), content["stop_timeout"]),
            flags_file=_of(str, content["flags_file"]),
            fixed=tuple(_of(str, word) for word in content["fixed"]),
        )
        if not program.argv or not program.ports or not _NAME.fullmatch(program.name):
            raise TypeError("a name, arguments and ports are expected")
        return program


def _of(kind: Any, value: Any) -> Any:
    """Return `value` if it has this type. Raises TypeError."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} has the wrong type")
    return value


def programs_of(config: Config) -> list[Program]:
    """Return the router and the replicas in order."""
    return [
        _router(config),
        *(_replica(config, index) for index in range(config.parallel.data_parallel_size)),
    ]


def expert_group_of(config: Config) -> str:
    """Return the name of the expert-parallel group of the replicas.

    It is a hash of the deployment and of every setting that the ranks must agree on. During a reload the new
    replicas form a new group while the old one shrinks. FD_ISA is the only variable in it that changes
    results.
    """
    model, parallel, engine = config.model, config.parallel, config.engine
    parts = [
        *(PROTOCOL_VERSION, str(config.paths.run), model.path, engine.dtype, engine.quantization),
        *(parallel.data_parallel_size, parallel.redundant_experts),
        *(engine.extra_args, engine.env.get("FD_ISA")),
    ]
    return f"dp-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]}"


def admin_socket(run: Path) -> Path:
    """Return the path of the router's admin socket."""
    return run / "router.sock"


def expert_group_in(argv: Sequence[str]) -> str | None:
    """Return the name of the expert-parallel group in a replica's command line."""
    return flag_in(argv, _GROUP_FLAG)


def flag_in(argv: Sequence[str], name: str) -> str | None:
    """Return the last value of a flag, because `extra_args` may repeat it."""
    found = None
    for word, next_word in pairwise([*argv, ""]):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == name:
            found = value if equals else next_word
    return found


def connectable(host: str) -> str:
    """Return the address that reaches a listener on `host` from this machine."""
    if not host or is_wildcard(host):
        return "::1" if ":" in host else "127.0.0.1"
    return host


def address(host: str, port: int) -> str:
    """Return HOST:PORT, with brackets around an IPv6 address."""
    return authority(connectable(host), port)


def _router(config: Config) -> Program:
    router = config.router
    flags = ["--host", router.host, "--port", str(router.port), "--policy", router.policy]
    flags += ["--registry-file", str(config.paths.state / "replicas.json")]
    flags += ["--admin-socket", str(admin_socket(config.paths.run))]
    flags += ["--request-timeout-secs", f"{router.request_timeout:g}"]
    flags += ["--progress-timeout-secs", f"{router.progress_timeout:g}"]
    flags += ["--workers", str(router.workers)]
    flags += ["--graceful-timeout-secs", str(_ROUTER_GRACE)]
    if router.api_keys_file:
        flags += ["--api-keys-file", router.api_keys_file]
    if router.cors_origins != DEFAULT:
        flags += ["--cors-origins", ",".join(router.cors_origins)]
    flags += _tracing(config)
    if not router.page:
        flags.append("--no-page")
    flags += router.extra_args
    try:
        fixed = fixed_flags(file_parser().parse_args(flags))
    except ConfigError as error:
        raise ConfigError(f"[router] extra_args: {error}") from None
    flags_file = str(config.paths.run / "router-flags.json")
    return Program(
        name=ROUTER,
        argv=(str(Path(sys.executable).with_name("fd-router")), "--flags-file", flags_file),
        flags_file=flags_file,
        flags=tuple(flags),
        fixed=tuple(f"{flag} {value}" for flag, value in sorted(fixed.items())),
        env=MappingProxyType({**router.env, "FD_LOG_DIR": str(config.paths.logs / ROUTER)}),
        ports=(router.port,),
        host=connectable(router.host),
        stop_timeout=config.supervise.stop_timeout,
    )


def _replica(config: Config, index: int) -> Program:
    engine, parallel = config.engine, config.parallel
    name = f"replica{index}"
    argv = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server"]
    argv += ["--model", config.model.path]
    if config.model.served_name:
        argv += ["--served-model-name", config.model.served_name]
    argv += ["--host", engine.host, "--port", str(engine.ports[index])]
    argv += ["--metrics-port", str(engine.metrics_ports[index])]
    # Only this replica's port: a change of another one must not restart it.
    argv += ["--engine-worker-queue-port", str(engine.engine_worker_queue_ports[index])]
    argv += ["--local-data-parallel-id", str(index)]
    argv += ["--data-parallel-size", str(parallel.data_parallel_size)]
    argv += ["--tensor-parallel-size", str(parallel.tensor_parallel_size)]
    argv += ["--max-model-len", str(engine.max_model_len), "--max-num-seqs", str(engine.max_num_seqs)]
    if engine.num_gpu_blocks_override:
        argv += ["--num-gpu-blocks-override", str(engine.num_gpu_blocks_override)]
    argv += ["--device", engine.device, "--dtype", engine.dtype]
    if engine.device != "cpu":
        argv += ["--gpu-memory-utilization", f"{engine.gpu_memory_utilization:g}"]
    gpu = {}
    if engine.gpus:
        gpu = {"CUDA_VISIBLE_DEVICES": engine.gpus[index], "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        argv += ["--replicas-per-gpu", str(engine.gpus.count(engine.gpus[index]))]
    if engine.quantization:
        argv += ["--quantization", engine.quantization]
    if engine.threads:
        argv += ["--threads", str(engine.threads)]
    if engine.pin_threads:
        argv.append("--pin-threads")
    if parallel.expert_parallel:
        argv += ["--enable-expert-parallel", _GROUP_FLAG, expert_group_of(config)]
        if parallel.redundant_experts:
            argv += ["--redundant-experts", str(parallel.redundant_experts)]
        if parallel.balance_experts:
            argv.append("--enable-eplb")
        argv += ["--expert-parallel-stall-kill", f"{parallel.collective_timeout:g}"]
    if engine.api_keys_file:
        argv += ["--api-keys-file", engine.api_keys_file]
    argv += ["--router", address(config.router.host, config.router.port)]
    argv += ["--timeout-graceful-shutdown", str(_REPLICA_GRACE)]
    argv += _tracing(config)
    return Program(
        name=name,
        argv=(*argv, *engine.extra_args),
        env=MappingProxyType({**engine.env, **gpu, "FD_LOG_DIR": str(config.paths.logs / name)}),
        ports=(engine.ports[index], engine.metrics_ports[index], engine.engine_worker_queue_ports[index]),
        host=connectable(engine.host),
        model=config.model.served_name,
        stop_timeout=config.supervise.stop_timeout,
    )


def _tracing(config: Config) -> list[str]:
    tracing = config.tracing
    flags = [ENDPOINT_FLAG, tracing.endpoint] if tracing.endpoint else []
    return flags if tracing.sample_ratio == 1 else [*flags, RATIO_FLAG, f"{tracing.sample_ratio:g}"]
