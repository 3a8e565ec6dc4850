"""Config -> the programs that shall run: one router and N replicas. Pure: nothing is started or written."""

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
from ...expert_parallel.layout import PROTOCOL_VERSION
from ..router.config.flags import file_parser, fixed_flags
from ..router.config.flags_file import fingerprint
from .launch import HASH, MARKER
from .loader import Config

ROUTER = "router"

#: Open requests of a replica get so long after SIGTERM, then an error event. The worker needs a moment to end
#: and the clients one to read it; the router passes it on, so it lives longer. Together they stay below the
#: daemon's own patience at its end. `extra_args` may say otherwise.
_REPLICA_GRACE = 5
_ROUTER_GRACE = 8
_GROUP_FLAG = "--expert-parallel-group"
_NAME = re.compile(r"router|replica[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Program:
    """One supervised program: what is executed, and where it can be asked how it is."""

    name: str
    argv: tuple[str, ...]
    #: Added to the daemon's own environment.
    env: Mapping[str, str]
    #: Every port it listens on; the first one answers GET /health.
    ports: tuple[int, ...]
    #: Where the daemon's probes connect.
    host: str = "127.0.0.1"
    #: The model's name in a readiness probe; empty lets the replica choose its own.
    model: str = ""
    #: So many seconds after SIGTERM supervisord kills it. That, too, cannot be changed while it runs.
    stop_timeout: float = 30.0
    #: A file with more words, which it reads at its start and again at SIGHUP; empty: there is none.
    flags_file: str = ""
    #: Those words, and what they say that SIGHUP cannot change.
    flags: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    #: Changes whenever something changes that the running process would have to be restarted for.
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
        """How people are told about it: "router", "replica 3"."""
        return ROUTER if self.replica is None else f"replica {self.replica}"

    @property
    def words(self) -> tuple[str, ...]:
        """Its whole command line, wherever the words lie."""
        return (*self.argv, *self.flags)

    @property
    def flags_text(self) -> str:
        return json.dumps(self.flags)

    @property
    def flags_hash(self) -> str:
        """What a process answers that has read `flags_text`."""
        return fingerprint(self.flags_text.encode())

    def runs_as(self, other: Program) -> bool:
        """Whether a process of this program needs neither a restart nor SIGHUP to be one of `other`."""
        return (self.hash, self.flags) == (other.hash, other.flags)

    @property
    def launch_name(self) -> str:
        """Of its launch file. Older ones stay beside it for as long as something runs that they describe."""
        return f"{self.name}-{self.hash}.json"

    def launch_text(self, run: Path) -> str:
        """What fd-run reads: the program, and in its environment the marks that its processes carry."""
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
        """Without its `flags`: they lie elsewhere, and change while it runs.

        Raises ValueError for a text that `launch_text` did not write.
        """
        content = parse_json(text)
        try:
            return cls._from_launch(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a launch file ({printable(repr(error))})") from None

    @classmethod
    def _from_launch(cls, content: Any) -> Program:
        # No conversions: 30 and 30.0 have different hashes.
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
            raise TypeError("a name, words and ports are expected")
        return program


def _of(kind: Any, value: Any) -> Any:
    """Return `value` if it is of this kind. Raises TypeError."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} has the wrong type")
    return value


def programs_of(config: Config) -> list[Program]:
    """The router first, then the replicas in order."""
    return [
        _router(config),
        *(_replica(config, index) for index in range(config.parallel.data_parallel_size)),
    ]


def expert_group_of(config: Config) -> str:
    """The name of the expert-parallel group in which the replicas meet.

    It stands for this deployment, and for all of its configuration that ranks must, or may have to, agree on.
    So while a reload replaces one replica after the other, the new ones form a group of their own and the old
    group shrinks. Of the environment it has only what texts depend on: the name is no place for secrets.
    """
    model, parallel, engine = config.model, config.parallel, config.engine
    parts = [
        *(PROTOCOL_VERSION, str(config.paths.run), model.path, engine.dtype, engine.quantization),
        *(parallel.data_parallel_size, parallel.redundant_experts),
        *(engine.extra_args, engine.env.get("FD_ISA")),
    ]
    return f"dp-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]}"


def admin_socket(run: Path) -> Path:
    """On which the router takes orders."""
    return run / "router.sock"


def expert_group_in(argv: Sequence[str]) -> str | None:
    """The group that a replica with this command line joins."""
    return flag_in(argv, _GROUP_FLAG)


def flag_in(argv: Sequence[str], name: str) -> str | None:
    """The value of a flag: the last, as `extra_args` may add another."""
    found = None
    for word, next_word in pairwise([*argv, ""]):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") == name:
            found = value if equals else next_word
    return found


def connectable(host: str) -> str:
    """The address under which a listener on `host` is reached from this machine."""
    if not host or is_wildcard(host):
        return "::1" if ":" in host else "127.0.0.1"
    return host


def address(host: str, port: int) -> str:
    """HOST:PORT, with the brackets that an IPv6 address needs."""
    return authority(connectable(host), port)


def _router(config: Config) -> Program:
    router = config.router
    flags = ["--host", router.host, "--port", str(router.port), "--policy", router.policy]
    flags += ["--registry-file", str(config.paths.state / "replicas.json")]
    flags += ["--admin-socket", str(admin_socket(config.paths.run))]
    flags += ["--request-timeout-secs", f"{router.request_timeout:g}"]
    if router.workers != 1:
        flags += ["--workers", str(router.workers)]
    if router.progress_timeout != 90.0:
        flags += ["--progress-timeout-secs", f"{router.progress_timeout:g}"]
    flags += ["--graceful-timeout-secs", str(_ROUTER_GRACE)]
    if router.api_keys_file:
        flags += ["--api-keys-file", router.api_keys_file]
    if router.cors_origins != DEFAULT:
        flags += ["--cors-origins", ",".join(router.cors_origins)]
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
    # Its own alone: a change of another's is none of this one.
    argv += ["--engine-worker-queue-port", str(engine.engine_worker_queue_ports[index])]
    argv += ["--local-data-parallel-id", str(index)]
    argv += ["--data-parallel-size", str(parallel.data_parallel_size)]
    argv += ["--tensor-parallel-size", str(parallel.tensor_parallel_size)]
    argv += ["--max-model-len", str(engine.max_model_len), "--max-num-seqs", str(engine.max_num_seqs)]
    if engine.num_gpu_blocks_override:
        argv += ["--num-gpu-blocks-override", str(engine.num_gpu_blocks_override)]
    if engine.device != "auto":
        argv += ["--device", engine.device]
    if engine.dtype != "bfloat16":
        argv += ["--dtype", engine.dtype]
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
        if parallel.stall_kill != 60.0:
            argv += ["--expert-parallel-stall-kill", f"{parallel.stall_kill:g}"]
    if engine.api_keys_file:
        argv += ["--api-keys-file", engine.api_keys_file]
    argv += ["--router", address(config.router.host, config.router.port)]
    argv += ["--timeout-graceful-shutdown", str(_REPLICA_GRACE)]
    return Program(
        name=name,
        argv=(*argv, *engine.extra_args),
        env=MappingProxyType({**engine.env, "FD_LOG_DIR": str(config.paths.logs / name)}),
        ports=(engine.ports[index], engine.metrics_ports[index], engine.engine_worker_queue_ports[index]),
        host=connectable(engine.host),
        model=config.model.served_name,
        stop_timeout=config.supervise.stop_timeout,
    )
