"""Command line of `api_server`: FastDeploy's flags to a frozen `ServeConfig`."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...common.api_keys import ApiKeys, keys_in, keys_in_variable, keys_of
from ...common.cli import MAX_BODY_BYTES, CommandLine
from ...common.cors import DEFAULT as CORS_DEFAULT
from ...common.cors import CorsPolicy
from ...common.errors import ConfigError
from ...common.text_files import read_text
from ...common.tracing_config import TracingConfig, add_tracing_flags, tracing_config
from ...config import GPU_DEFAULTS, EngineConfig
from ...demo_model.model import resolve_model_path
from ...parsers.formats import reasoning_format, reasoning_format_names, tool_format, tool_format_names
from ..registration import router_url
from .foreign_flags import REFUSED, WITHOUT_EFFECT

_log = logging.getLogger(__name__)

API_SERVER = "python -m fastdeploy.entrypoints.openai.api_server"

#: Threads beyond max_concurrency, for /health and for 429 responses.
_SPARE_THREADS = 32

#: FastDeploy's names.
_GUIDED_DECODING = ("off", "auto", "guidance", "xgrammar")

#: Fields whose flags have a default of their own, of another type.
_OWN_DEFAULTS = ("metrics_port", "engine_worker_queue_port")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Configuration of one replica's API process."""

    engine: EngineConfig
    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    #: None: /metrics is on `port`.
    metrics_port: int | None = None
    #: 0: any free port.
    engine_worker_queue_port: int = 0
    max_concurrency: int = 512
    #: Seconds for open requests after SIGTERM.
    timeout_graceful_shutdown: int = 10
    max_body_bytes: int = MAX_BODY_BYTES
    #: Empty: no key is required.
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    #: URL of the router to register with.
    router: str | None = None
    #: Web pages that may read responses of /v1.
    cors: CorsPolicy = field(default_factory=CorsPolicy)
    #: Replaces the checkpoint's template.
    chat_template: str | None = None
    #: "off": no structured output. Each other value means the only engine for it.
    guided_decoding_backend: str = "auto"
    #: Names of formats (parsers/formats.py).
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    #: Python file with further formats of tool calls.
    tool_parser_plugin: Path | None = None
    #: False: requests may name any model.
    checks_model_name: bool = False
    #: Base of the seeds of requests without one; None: such requests get random seeds.
    seed: int | None = None
    #: Maximum number of most likely tokens at each position; -1: the whole vocabulary.
    max_logprobs: int = 20
    #: Where the spans of requests go; None: there are none.
    tracing: TracingConfig | None = None

    def accepts_model(self, name: str | None) -> bool:
        """Return True if a request may name this model; any if the operator gave none, as in FastDeploy."""
        return not self.checks_model_name or name in (None, "", "default", self.served_model_name)

    @property
    def threads(self) -> int:
        return self.max_concurrency + _SPARE_THREADS


def parse_arguments(argv: Sequence[str], prog: str = API_SERVER) -> ServeConfig:
    """Parse the command line; underscores in flags count as dashes.

    Args:
        prog: the command, for --help and for errors.

    Raises:
        ConfigError: a flag is unknown, missing or has a wrong value; one line that names it.
    """
    arguments = _parser(prog).parse_args([_dashed(word) for word in argv])
    _check_foreign(arguments)
    defaulted = tuple(name for name in GPU_DEFAULTS if getattr(arguments, name) is None)
    engine = EngineConfig(
        model=resolve_model_path(arguments.model),
        device=arguments.device,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        replicas_per_gpu=arguments.replicas_per_gpu,
        threads=arguments.threads,
        pin_threads=arguments.pin_threads,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        block_size=arguments.block_size,
        num_gpu_blocks_override=arguments.num_gpu_blocks_override,
        enable_prefix_caching=arguments.enable_prefix_caching,
        data_parallel_size=arguments.data_parallel_size,
        data_parallel_rank=arguments.data_parallel_rank,
        tensor_parallel_size=arguments.tensor_parallel_size,
        enable_expert_parallel=arguments.enable_expert_parallel,
        expert_parallel_group=arguments.expert_parallel_group,
        redundant_experts=arguments.redundant_experts,
        enable_eplb=arguments.enable_eplb,
        expert_parallel_stall_kill=arguments.expert_parallel_stall_kill,
        qkv_order=arguments.qkv_order,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        defaulted=defaulted,
        **{name: getattr(arguments, name) for name in GPU_DEFAULTS if name not in defaulted},
    )
    metrics_port: int = arguments.metrics_port
    return ServeConfig(
        engine=engine,
        served_model_name=arguments.served_model_name or engine.model.name,
        host=arguments.host,
        port=_port("--port", arguments.port),
        metrics_port=None if metrics_port == -1 else _port("--metrics-port", metrics_port),
        engine_worker_queue_port=_own_port(
            "--engine-worker-queue-port", arguments.engine_worker_queue_port, engine.data_parallel_rank
        ),
        max_concurrency=_at_least("--max-concurrency", 1, arguments.max_concurrency),
        timeout_graceful_shutdown=_at_least(
            "--timeout-graceful-shutdown", 0, arguments.timeout_graceful_shutdown
        ),
        max_body_bytes=_at_least("--max-body-bytes", 1, arguments.max_body_bytes),
        api_keys=_api_keys(arguments.api_key, arguments.api_keys_file),
        router=None if arguments.router is None else router_url(arguments.router),
        cors=CorsPolicy.parse("--cors-origins", arguments.cors_origins),
        chat_template=_chat_template(arguments.chat_template),
        checks_model_name=bool(arguments.served_model_name),
        guided_decoding_backend=arguments.guided_decoding_backend,
        seed=arguments.seed,
        max_logprobs=_at_least("--max-logprobs", -1, arguments.max_logprobs),
        tracing=tracing_config(arguments.otlp_traces_endpoint, arguments.trace_sample_ratio, os.environ),
        **_parsers(arguments),
    )


def _parser(prog: str = API_SERVER) -> argparse.ArgumentParser:
    parser = CommandLine(
        prog=prog,
        description="Run one replica: OpenAI's HTTP API in front of one engine.",
        allow_abbrev=False,
    )
    serve = parser.add_argument_group("serving")
    serve.add_argument("--model", required=True, help='directory of an ERNIE-4.5 checkpoint, or "demo"')
    serve.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="name of the model, which requests must use then (default: the directory's name, and requests "
        "may use any name)",
    )
    serve.add_argument(
        "--host", help="address or name to listen on; 0.0.0.0: all networks (default %(default)s)"
    )
    serve.add_argument("--port", type=int, help="port of the API (default %(default)s)")
    serve.add_argument(
        "--metrics-port", type=int, default=-1, help="port of /metrics; -1: the same as --port"
    )
    serve.add_argument(
        "--engine-worker-queue-port",
        default="0",
        help="port to which the worker connects, or a list with the i-th for replica i; 0: any free port",
    )
    serve.add_argument("--router", metavar="HOST:PORT", help="register the replica with this router")
    serve.add_argument(
        "--api-key", action="append", help="keys, separated by commas, for /v1; also FD_API_KEY"
    )
    serve.add_argument("--api-keys-file", type=Path, metavar="FILE", help="more keys, one per line")
    serve.add_argument(
        *("--cors-origins", "--allow-origins"),
        default=",".join(CORS_DEFAULT),
        metavar="LIST",
        help="origins of web pages that may read responses of /v1, separated by commas; loopback: pages of "
        "this machine; *: all; empty: none (default %(default)s)",
    )
    serve.add_argument("--chat-template", help="file or text of a chat template that replaces the model's")
    serve.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="how the model writes tool calls: " + ", ".join(tool_format_names()),
    )
    serve.add_argument(
        "--reasoning-parser",
        metavar="NAME",
        help="how the model writes its reasoning: " + ", ".join(reasoning_format_names()),
    )
    serve.add_argument(
        "--tool-parser-plugin",
        type=Path,
        metavar="FILE",
        help="Python file with further names for --tool-call-parser",
    )
    serve.add_argument(
        "--guided-decoding-backend",
        choices=_GUIDED_DECODING,
        help="off: no structured output; the other names mean the same backend (default %(default)s)",
    )
    serve.add_argument(
        "--seed",
        type=int,
        help="base of the seeds of requests without one, which follow from it in the order of arrival; the "
        "router draws seeds itself (default: random seeds)",
    )
    serve.add_argument(
        "--max-logprobs",
        type=int,
        help="maximum number of most likely tokens at a position; -1: the whole vocabulary; at most 20 on a "
        "GPU (default %(default)s)",
    )
    serve.add_argument(
        "--max-concurrency", type=int, help="requests beyond this limit get 429 (default %(default)s)"
    )
    serve.add_argument("--max-body-bytes", type=int, help="larger bodies get 413 (default %(default)s)")
    serve.add_argument(
        "--timeout-graceful-shutdown",
        type=int,
        help="seconds for open requests after SIGTERM (default %(default)s)",
    )
    add_tracing_flags(serve)
    engine = parser.add_argument_group("engine")
    engine.add_argument("--device", help="auto (a GPU if there is one that can be used), cpu or gpu")
    engine.add_argument(
        "--gpu-memory-utilization", type=float, help="share of a GPU's memory for all replicas on it"
    )
    engine.add_argument(
        "--replicas-per-gpu",
        type=int,
        metavar="N",
        help="replicas that share the only visible GPU; 0: deal all replicas over the visible GPUs",
    )
    engine.add_argument("--threads", type=int, help="CPU threads; 0: this replica's share of the cores")
    engine.add_argument(
        "--pin-threads",
        action="store_true",
        help="bind each thread to its own CPU, if there are enough for --data-parallel-size replicas",
    )
    engine.add_argument(
        "--max-model-len", type=int, help="maximum tokens of prompt and output together (default %(default)s)"
    )
    engine.add_argument("--max-num-seqs", type=int, help="maximum sequences in a step (default %(default)s)")
    engine.add_argument(
        "--max-num-batched-tokens",
        type=int,
        help=f"maximum tokens in a step {_two_defaults('max_num_batched_tokens')}",
    )
    engine.add_argument(
        "--max-prefill-beside-decode",
        type=int,
        help="maximum prompt tokens in a step while other sequences decode; fewer in a long context "
        + _two_defaults("max_prefill_beside_decode"),
    )
    engine.add_argument("--block-size", type=int, help="tokens per KV cache block (default %(default)s)")
    engine.add_argument(
        "--num-gpu-blocks-override",
        type=int,
        help="KV cache blocks (default: enough for --max-num-seqs, limited to 1 GiB)",
    )
    engine.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="reuse KV cache blocks of prompts with the same beginning (default: on)",
    )
    engine.add_argument("--dtype", help="weights and KV cache: bfloat16 or float32 (default %(default)s)")
    engine.add_argument("--quantization", help="wint8 or wint4: weights with 8 or 4 bits")
    engine.add_argument(
        "--qkv-order",
        help="order of q, k and v in fused Paddle checkpoints: plain or grouped (default %(default)s)",
    )
    parallel = parser.add_argument_group("parallel")
    parallel.add_argument("--data-parallel-size", type=int, help="number of replicas (default %(default)s)")
    parallel.add_argument(
        "--local-data-parallel-id",
        dest="data_parallel_rank",
        type=int,
        metavar="N",
        help="number of this replica, from 0 (default %(default)s)",
    )
    parallel.add_argument("-tp", "--tensor-parallel-size", type=int, help="only 1 is supported")
    parallel.add_argument(
        "--enable-expert-parallel", action="store_true", help="distribute the experts over the replicas"
    )
    parallel.add_argument(
        "--expert-parallel-group",
        metavar="NAME",
        help="name of the group on this machine; each deployment needs its own (default %(default)s)",
    )
    parallel.add_argument(
        "--expert-parallel-stall-kill",
        type=float,
        metavar="SECONDS",
        help="kill a rank that others wait for after this time without progress (default %(default)g)",
    )
    parallel.add_argument(
        "--redundant-experts", type=int, metavar="N", help="extra copies of the most used experts"
    )
    parallel.add_argument(
        "--enable-eplb",
        action="store_true",
        help="move experts once a minute to even out their measured load",
    )
    for flag in (*WITHOUT_EFFECT, *REFUSED):
        parser.add_argument(f"--{flag}", nargs="*", dest=_destination(flag), help=argparse.SUPPRESS)
    parser.set_defaults(**_defaults())
    return parser


def _two_defaults(name: str) -> str:
    cpu = next(config_field.default for config_field in fields(EngineConfig) if config_field.name == name)
    return f"(default {cpu}; {GPU_DEFAULTS[name]} on a GPU)"


def _defaults() -> dict[str, Any]:
    """Return the defaults of all flags with the name of a field of `EngineConfig` or `ServeConfig`.

    The flags of `GPU_DEFAULTS` have none, because the device is not known yet.
    """
    return {
        config_field.name: config_field.default
        for config in (EngineConfig, ServeConfig)
        for config_field in fields(config)
        if config_field.default is not MISSING and config_field.name not in (*_OWN_DEFAULTS, *GPU_DEFAULTS)
    }


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _check_foreign(arguments: argparse.Namespace) -> None:
    """Refuse FastDeploy's flags that are not supported, and log which of the others have no effect."""
    ignored = []
    for flag in sorted({*WITHOUT_EFFECT, *REFUSED}):
        words = getattr(arguments, _destination(flag))
        if words is None:
            continue
        value = " ".join(words)
        if flag in REFUSED and (flag, value) != ("tokenizer", arguments.model):
            REFUSED[flag].check(flag, value)
        ignored.append(f"--{flag}")
    if ignored:
        _log.warning("flags without effect in this server: %s", " ".join(ignored))


def _destination(flag: str) -> str:
    return f"foreign_{flag.replace('-', '_')}"


def _port(flag: str, port: int) -> int:
    if not 1 <= port <= 65535:
        raise ConfigError(f"{flag} is {port}; it must be between 1 and 65535")
    return port


def _own_port(flag: str, text: str, rank: int) -> int:
    """Return this replica's port: the only one, or the one at index `rank` of FastDeploy's list for all."""
    try:
        ports = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{flag} is {text!r}; it must be a port or a comma-separated list of ports"
        ) from None
    if len(ports) == 1:
        return 0 if ports == [0] else _port(flag, ports[0])
    if rank >= len(ports):
        raise ConfigError(
            f"{flag} lists {len(ports)} ports; --local-data-parallel-id {rank} needs at least {rank + 1}"
        )
    return _port(flag, ports[rank])


def _at_least(flag: str, low: int, value: int) -> int:
    if value < low:
        raise ConfigError(f"{flag} is {value}; it must be at least {low}")
    return value


def _api_keys(flags: list[str] | None, file: Path | None) -> ApiKeys:
    if flags is None:
        keys = keys_in_variable("FD_API_KEY", os.environ)
    else:
        keys = [key for text in flags for key in keys_of("--api-key", text)]
        if not keys:
            raise ConfigError("--api-key is empty; omit it to require no key")
    return ApiKeys(keys if file is None else keys + keys_in("--api-keys-file", file))


def _parsers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields for parsers; their names are valid unless a plugin has to add them."""
    plugin, tools, reasoning = (
        arguments.tool_parser_plugin,
        arguments.tool_call_parser or None,
        arguments.reasoning_parser or None,
    )
    if plugin is not None and not plugin.is_file():
        raise ConfigError(f"--tool-parser-plugin is {str(plugin)!r}; there is no such file")
    if tools is not None and plugin is None:
        tool_format(tools)
    if reasoning is not None:
        reasoning_format(reasoning)
    return {"tool_call_parser": tools, "reasoning_parser": reasoning, "tool_parser_plugin": plugin}


def _chat_template(text: str | None) -> str | None:
    """Return the template; as in FastDeploy, `text` is a path or the template itself."""
    if text is None or "{" in text:
        return text
    return read_text(Path(text), f"--chat-template {text}")
