"""Options of dp.toml: name, type, constraints, default, help.

loader.py reads the file into these structs, and documentation.py writes docs/configuration.md from them.

programs.py passes every option on the command line, so that only these defaults count under fd-dp. Router and
engine have some of them as well, for their use without fd-dp. They are not taken from there, because `fdctl`
would have to import the engine and build the router's parser at each start; a test holds them equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

from msgspec import Meta, Struct

from ...common import cors
from ..router.policy.policies import POLICIES
from .checks import (
    collector_url,
    environment_names,
    gpu_names,
    ip_address,
    known_policy,
    no_secret,
    web_origins,
)
from .declaration import about

#: Replica i listens on base + i * step where an option is one base port, as in FastDeploy's documentation.
PORT_STEPS = {"ports": 11, "metrics_ports": 100, "engine_worker_queue_ports": 10}
_POLICIES = ", ".join(f"`{name}`" for name in POLICIES)

Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(extra={"unit": "s"})]


class ModelSection(Struct, frozen=True, kw_only=True):
    """The model."""

    path: Annotated[str, about("Directory of the checkpoint, or `demo` for the demo model.", min_length=1)]
    served_name: Annotated[
        str,
        about("Model name that requests must use; empty: the directory's name, and requests may use any."),
    ] = ""


class ParallelSection(Struct, frozen=True, kw_only=True):
    """The replicas and how they share experts."""

    data_parallel_size: Annotated[int, about("Number of replicas.", ge=1, le=64)] = 8
    tensor_parallel_size: Annotated[
        Literal[1], about("Processes that share a replica's model; only 1 is supported.")
    ] = 1
    expert_parallel: Annotated[
        bool,
        about(
            "All replicas form one expert-parallel group; each holds a part of the experts of every layer."
        ),
    ] = True
    redundant_experts: Annotated[int, about("Extra copies of the most used experts in each layer.", ge=0)] = 0
    balance_experts: Annotated[
        bool, about("Move experts between replicas once a minute to balance their load.")
    ] = False
    # Longer than no_progress_timeout, so that the daemon kills first, because it also writes the stacks. The
    # default of an engine that runs without a daemon is 60 s.
    collective_timeout: Annotated[
        Seconds,
        about(
            "Time without progress after which waiting ranks kill the rank that they wait for.",
            ge=1,
            old_name="stall_kill",
        ),
    ] = 90.0


class EngineSection(Struct, frozen=True, kw_only=True):
    """Options of each replica. A port option is one base port, or a list with one port per replica."""

    device: Annotated[
        Literal["auto", "cpu", "gpu"],
        about("Where replicas compute: `cpu`, `gpu`, or `auto`: a GPU if there is one that can be used."),
    ] = "auto"
    gpus: Annotated[
        tuple[str, ...],
        about(
            "Index or UUID of each replica's GPU; replicas with the same one share its memory. Empty: the "
            "replicas are dealt over all visible GPUs.",
            check=gpu_names,
        ),
    ] = ()
    gpu_memory_utilization: Annotated[
        float, about("Share of a GPU's memory for all replicas on it.", ge=0.01, le=1)
    ] = 0.9
    host: Annotated[
        str,
        about(
            "Address to listen on, or a name of this machine for all addresses of that name; `0.0.0.0` "
            "makes the replicas reachable from the network.",
            min_length=1,
        ),
    ] = "127.0.0.1"
    ports: Annotated[tuple[Port, ...], about("OpenAI API; a base b means b, b+11, b+22, ...", base=1811)]
    metrics_ports: Annotated[
        tuple[Port, ...], about("Prometheus metrics; a base b means b, b+100, b+200, ...", base=3101)
    ]
    engine_worker_queue_ports: Annotated[
        tuple[Port, ...], about("API process to worker; a base b means b, b+10, b+20, ...", base=25611)
    ]
    dtype: Annotated[
        Literal["bfloat16", "float32"], about("Type of weights and KV cache: `bfloat16`, `float32`.")
    ] = "bfloat16"
    quantization: Annotated[
        Literal["", "wint4", "wint8"], about("Weight-only quantization: `wint8`, `wint4`; empty: none.")
    ] = ""
    max_model_len: Annotated[
        int, about("Maximum length of a sequence, prompt and output together.", ge=1, unit="tokens")
    ] = 2048
    max_num_seqs: Annotated[int, about("Maximum number of sequences in a batch.", ge=1)] = 8
    num_gpu_blocks_override: Annotated[
        int, about("Size of the KV cache in blocks of 64 tokens; 0: as memory allows.", ge=0, unit="blocks")
    ] = 0
    threads: Annotated[int, about("CPU threads of a replica; 0: cores divided by replicas.", ge=0)] = 0
    pin_threads: Annotated[
        bool, about("Pin each thread to its own CPU, if there are enough for all replicas.")
    ] = False
    api_keys_file: Annotated[
        str,
        about(
            "File with the API keys that replicas accept, one per line, or `credential:NAME` for a "
            "systemd credential; empty: no key is needed."
        ),
    ] = ""
    extra_args: Annotated[
        tuple[str, ...], about("Additional command-line arguments of the replicas.", check=no_secret)
    ] = ()
    env: Annotated[
        Mapping[str, str], about("Additional environment variables of the replicas.", check=environment_names)
    ] = {}


class RouterSection(Struct, frozen=True, kw_only=True):
    """The router, the one address for clients."""

    host: Annotated[
        str,
        about("Address to listen on; `0.0.0.0` makes the router reachable from the network.", min_length=1),
    ] = "127.0.0.1"
    port: Annotated[int, about("Port to listen on.", ge=1, le=65535)] = 30000
    # fd-router's own default is request_num, FastDeploy's, because it also serves engines that others start;
    # the replicas of fd-dp have a prefix cache.
    policy: Annotated[str, about("Load-balancing policy: " + _POLICIES + ".", check=known_policy)] = (
        "cache_aware"
    )
    workers: Annotated[int, about("Worker processes; one serves thousands of streams.", ge=1, le=16)] = 1
    request_timeout: Annotated[
        Seconds,
        about("Time without data after which a request fails, for replicas that send no keep-alives.", ge=1),
    ] = 1800.0
    progress_timeout: Annotated[
        Seconds,
        about(
            "Time without data after which a replica counts as dead, for replicas that send keep-alives.",
            ge=1,
        ),
    ] = 90.0
    api_keys_file: Annotated[
        str,
        about(
            "File with the API keys that clients must present, one per line, or `credential:NAME` for a "
            "systemd credential; empty: no key is needed."
        ),
    ] = ""
    cors_origins: Annotated[
        tuple[str, ...],
        about(
            "Origins of web pages that may read responses, such as `https://app.example`; `loopback` for "
            "pages of this machine, `*` for all; an empty list: none.",
            check=web_origins,
        ),
    ] = cors.DEFAULT
    page: Annotated[bool, about("Serve a web page with the replicas and a chat at `/`.")] = True
    extra_args: Annotated[
        tuple[str, ...], about("Additional command-line arguments of the router.", check=no_secret)
    ] = ()
    env: Annotated[
        Mapping[str, str], about("Additional environment variables of the router.", check=environment_names)
    ] = {}


class SuperviseSection(Struct, frozen=True, kw_only=True):
    """Failure detection and restarts."""

    startup_timeout: Annotated[
        Seconds, about("Time from start to first token after which a replica counts as failed.", ge=1)
    ] = 600.0
    parallel_starts: Annotated[
        int, about("Number of replicas that load at the same time; 0: one per core.", ge=0)
    ] = 0
    start_slot: Annotated[
        Seconds, about("Loading time after which a replica no longer delays the next one.", ge=0)
    ] = 60.0
    probe_interval: Annotated[
        Seconds, about("Interval between health checks of a READY replica.", ge=0.1, le=3600)
    ] = 5.0
    unhealthy_after: Annotated[
        Seconds,
        about(
            "Time without a successful health check after which a replica is UNHEALTHY.",
            ge=1,
            old_name="stall_after",
        ),
    ] = 15.0
    unhealthy_kill_after: Annotated[
        Seconds,
        about(
            "Time without a successful health check after which a replica is killed.",
            ge=1,
            old_name="stall_kill",
        ),
    ] = 60.0
    no_progress_timeout: Annotated[
        Seconds,
        about(
            "Time without a finished step after which a replica with requests is killed, unless it waits "
            "for another one.",
            ge=0.5,
            old_name="hang_after",
        ),
    ] = 60.0
    idle_probe: Annotated[
        Seconds, about("Idle time after which a replica has to generate a token as a test; 0: never.", ge=0)
    ] = 60.0
    drain_timeout: Annotated[
        Seconds,
        about(
            "Time that requests get to finish before a planned stop; the router resumes the others on "
            "another replica.",
            ge=0,
            le=86400,
        ),
    ] = 30.0
    stop_timeout: Annotated[
        Seconds, about("Time from SIGTERM to SIGKILL; a change restarts every program.", ge=1, le=3600)
    ] = 30.0
    backoff_first: Annotated[
        Seconds, about("Delay before the first restart; it doubles with each failure.", ge=0)
    ] = 1.0
    backoff_max: Annotated[Seconds, about("Maximum delay before a restart.", ge=0)] = 60.0
    stable_after: Annotated[
        Seconds, about("Time in state READY after which earlier failures no longer count.", ge=1)
    ] = 120.0
    budget: Annotated[
        int, about("Number of failures within `budget_window` after which a replica is QUARANTINED.", ge=1)
    ] = 10
    box_budget: Annotated[
        int,
        about(
            "Number of failures of all replicas within `budget_window` after which each replica that "
            "fails is paused.",
            ge=1,
        ),
    ] = 40
    box_calm: Annotated[
        Seconds,
        about(
            "Time without a failure of any replica after which paused replicas start again, one at a time.",
            ge=1,
        ),
    ] = 60.0
    budget_window: Annotated[Seconds, about("Time in which failures are counted.", ge=1)] = 600.0
    quarantine: Annotated[Seconds, about("Interval between restarts of a quarantined replica.", ge=1)] = 600.0


class MetricsSection(Struct, frozen=True, kw_only=True):
    """Prometheus metrics of the daemon; router and replicas have their own."""

    host: Annotated[
        str, about("Address to listen on; `0.0.0.0` makes it reachable from the network.", check=ip_address)
    ] = "127.0.0.1"
    port: Annotated[int, about("Port of the daemon's `/metrics`; 0: none.", ge=0, le=65535)] = 30001


class TracingSection(Struct, frozen=True, kw_only=True):
    """Traces of requests through router and replicas; they need `pip install 'fd-dp[otel]'`."""

    endpoint: Annotated[
        str,
        about(
            "OTLP collector to which spans are sent over HTTP, such as `http://127.0.0.1:4318`; empty: as "
            "`OTEL_EXPORTER_OTLP_ENDPOINT` in the environment says, or no traces.",
            check=collector_url,
        ),
    ] = ""
    sample_ratio: Annotated[
        float, about("Fraction of the requests without a trace of their own that are traced.", ge=0, le=1)
    ] = 1.0


class PathsSection(Struct, frozen=True, kw_only=True):
    """Directories. Empty: `state`, `run` and `logs` below `--prefix`; without a prefix, those named below."""

    state: Annotated[Path, about("Files that survive a restart; without a prefix: /var/lib/fd.")] = Path()
    run: Annotated[Path, about("Sockets and supervisord's files; without a prefix: /run/fd.")] = Path()
    logs: Annotated[Path, about("Log files, one directory per program; without a prefix: /var/log/fd.")] = (
        Path()
    )


class Config(Struct, frozen=True, kw_only=True):
    """Content of dp.toml, with every default filled in and every path absolute."""

    model: ModelSection
    parallel: ParallelSection
    engine: EngineSection
    router: RouterSection
    supervise: SuperviseSection
    metrics: MetricsSection
    tracing: TracingSection
    paths: PathsSection
    #: One message for each old name of an option in the file.
    deprecations: tuple[str, ...] = ()


SECTIONS: dict[str, type] = {
    name: kind for name, kind in get_type_hints(Config).items() if name != "deprecations"
}
