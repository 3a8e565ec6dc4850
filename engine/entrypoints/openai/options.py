"""The command line of `api_server`: FastDeploy's flags -> a frozen `ServeConfig`."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...common.api_keys import ApiKeys, keys_in, keys_in_variable, keys_of
from ...common.cli import CommandLine
from ...common.cors import DEFAULT as CORS_DEFAULT
from ...common.cors import CorsPolicy
from ...common.errors import ConfigError
from ...common.text_files import read_text
from ...config import EngineConfig
from ...demo_model.model import resolve_model_path
from ..registration import router_url

_log = logging.getLogger(__name__)

#: FastDeploy's flags that have no meaning here; taken, so that its documented commands run as they are.
# fmt: off
_WITHOUT_EFFECT = (
    "controller-port", "workers", "max-waiting-time", "timeout", "gpu-memory-utilization",
    "kv-cache-ratio", "swap-space", "cache-queue-port", "pd-comm-port", "rdma-comm-ports",
    "cache-transfer-protocol", "ips", "skip-port-check", "enable-chunked-prefill",
    "max-num-partial-prefills", "max-long-partial-prefills", "long-prefill-token-threshold",
    "scheduler-name", "scheduler-host", "scheduler-port", "scheduler-db", "scheduler-password",
    "scheduler-topic", "scheduler-ttl", "scheduler-min-load-score", "scheduler-load-shards-num",
    "load-choices", "reasoning-parser", "tool-call-parser", "tool-parser-plugin",
    "guided-decoding-backend", "guided-decoding-disable-any-whitespace", "enable-logprob",
    "max-logprobs", "eplb-config", "use-internode-ll-two-stage",
    "disable-sequence-parallel-moe", "use-cudagraph", "graph-optimization-config",
    "disable-custom-all-reduce", "use-warmup", "trust-remote-code", "tokenizer", "dynamic-load-weight",
)
# fmt: on

#: Threads beyond max_concurrency: they answer /health, and 429 to whom there is no room for.
_SPARE_THREADS = 32

#: Flags of which only one value is implemented -> that value, and what to tell who gave another.
_ONE_VALUE = {
    "splitwise-role": ("mixed", "this server both prefills and decodes"),
    "logprobs-mode": ("raw_logprobs", "log probabilities are those of the model, before temperature"),
}


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """What one replica's API process runs with."""

    engine: EngineConfig
    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    #: None serves /metrics on `port`.
    metrics_port: int | None = None
    #: 0 lets the kernel choose.
    engine_worker_queue_port: int = 0
    max_concurrency: int = 512
    #: Seconds that open requests have after SIGTERM.
    timeout_graceful_shutdown: int = 10
    #: The same as the router's.
    max_body_bytes: int = 10 << 20
    api_keys: ApiKeys = field(default_factory=ApiKeys)
    #: URL of the router that is told of this replica.
    router: str | None = None
    #: Web pages that may read answers of /v1.
    cors: CorsPolicy = field(default_factory=CorsPolicy)
    #: In place of the checkpoint's own.
    chat_template: str | None = None

    @property
    def threads(self) -> int:
        return self.max_concurrency + _SPARE_THREADS


def parse_arguments(argv: Sequence[str]) -> ServeConfig:
    """Reads the command line; underscores in flags count as dashes.

    Raises:
        ConfigError: a flag is unknown or missing, or its value is wrong; one line that names it.
    """
    arguments = _parser().parse_args([_dashed(word) for word in argv])
    _refuse(arguments)
    ignored = [flag for flag in _WITHOUT_EFFECT if getattr(arguments, flag.replace("-", "_")) is not None]
    if ignored:
        _log.warning("no effect in this server: %s", " ".join(f"--{flag}" for flag in ignored))
    engine = EngineConfig(
        model=resolve_model_path(arguments.model),
        device=arguments.device,
        threads=arguments.threads,
        pin_threads=arguments.pin_threads,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        max_prefill_beside_decode=arguments.max_prefill_beside_decode,
        block_size=arguments.block_size,
        num_gpu_blocks_override=arguments.num_gpu_blocks_override,
        enable_prefix_caching=arguments.enable_prefix_caching,
        data_parallel_size=arguments.data_parallel_size,
        data_parallel_rank=arguments.local_data_parallel_id,
        tensor_parallel_size=arguments.tensor_parallel_size,
        enable_expert_parallel=arguments.enable_expert_parallel,
        expert_parallel_group=arguments.expert_parallel_group,
        redundant_experts=arguments.redundant_experts,
        enable_eplb=arguments.enable_eplb,
        expert_parallel_stall_kill=arguments.expert_parallel_stall_kill,
        qkv_order=arguments.qkv_order,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
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
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        prog="python -m fastdeploy.entrypoints.openai.api_server",
        description="One replica: OpenAI's HTTP API in front of one engine.",
        allow_abbrev=False,
    )
    serve = parser.add_argument_group("serving")
    serve.add_argument("--model", required=True, help='directory of an ERNIE-4.5 checkpoint, or "demo"')
    serve.add_argument("--served-model-name", help="default: the directory's name")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens it to the network")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--metrics-port", type=int, default=-1, help="-1: /metrics on --port")
    serve.add_argument(
        "--engine-worker-queue-port",
        default="0",
        help="a port, or a list of which replica i takes the i-th; 0: any free one",
    )
    serve.add_argument("--router", metavar="HOST:PORT", help="tell this router that the replica is here")
    serve.add_argument("--api-key", action="append", help="comma list; also FD_API_KEY. Only /v1 asks for it")
    serve.add_argument(
        "--api-keys-file", type=Path, metavar="FILE", help="keys, one a line, beside --api-key"
    )
    serve.add_argument(
        "--cors-origins",
        default=",".join(CORS_DEFAULT),
        metavar="LIST",
        help="web pages that may read answers of /v1: origins with commas between them, loopback for those "
        "of this machine, * for all, empty for none (default %(default)s)",
    )
    serve.add_argument("--chat-template", help="a file, or the template itself, in place of the model's own")
    serve.add_argument("--max-concurrency", type=int, default=512, help="requests beyond it are told 429")
    serve.add_argument("--max-body-bytes", type=int, default=10 << 20, help="larger bodies are told 413")
    serve.add_argument(
        "--timeout-graceful-shutdown", type=int, default=10, help="seconds for open requests after SIGTERM"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--device", default="auto", help="auto or cpu")
    engine.add_argument("--threads", type=int, default=0, help="CPU threads; 0: a share of the cores")
    engine.add_argument(
        "--pin-threads",
        action="store_true",
        help="keep each thread on a CPU of its own, if --data-parallel-size replicas find as many",
    )
    engine.add_argument("--max-model-len", type=int, default=2048)
    engine.add_argument("--max-num-seqs", type=int, default=8)
    engine.add_argument("--max-num-batched-tokens", type=int, default=512)
    engine.add_argument(
        "--max-prefill-beside-decode",
        type=int,
        default=32,
        help="prompt tokens a step computes while other texts are being written; fewer in a long context",
    )
    engine.add_argument("--block-size", type=int, default=64)
    engine.add_argument("--num-gpu-blocks-override", type=int)
    engine.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    engine.add_argument("--dtype", default="bfloat16", help="weights and KV cache: bfloat16 or float32")
    engine.add_argument("--quantization", help="wint8 or wint4: weights of 8 or 4 bits")
    engine.add_argument("--qkv-order", default="plain", help="plain or grouped, in fused Paddle checkpoints")
    parallel = parser.add_argument_group("parallel")
    parallel.add_argument("--data-parallel-size", type=int, default=1)
    parallel.add_argument("--local-data-parallel-id", type=int, default=0)
    parallel.add_argument("--tensor-parallel-size", type=int, default=1)
    parallel.add_argument(
        "--enable-expert-parallel", action="store_true", help="replicas share the experts, each holds a part"
    )
    parallel.add_argument(
        "--expert-parallel-group",
        default="default",
        metavar="NAME",
        help="which group of this machine; each deployment needs one of its own",
    )
    parallel.add_argument(
        "--expert-parallel-stall-kill",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="a rank that others wait for and that makes no progress for so long is killed",
    )
    parallel.add_argument(
        "--redundant-experts", type=int, default=0, metavar="N", help="extra copies of the most used experts"
    )
    parallel.add_argument(
        "--enable-eplb",
        action="store_true",
        help="move experts once a minute to even out their measured load",
    )
    for flag in (*_WITHOUT_EFFECT, *_ONE_VALUE):
        parser.add_argument(f"--{flag}", nargs="?", const="", help=argparse.SUPPRESS)
    return parser


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _refuse(arguments: argparse.Namespace) -> None:
    for flag, (value, reason) in _ONE_VALUE.items():
        given = getattr(arguments, flag.replace("-", "_"))
        if given not in (None, value):
            raise ConfigError(f"--{flag} is {given!r}; it can only be {value!r}: {reason}")


def _port(flag: str, port: int) -> int:
    if not 1 <= port <= 65535:
        raise ConfigError(f"{flag} is {port}; it must be between 1 and 65535")
    return port


def _own_port(flag: str, text: str, rank: int) -> int:
    """A single port is this replica's own; of a list, as FastDeploy gives it to all, its index decides."""
    try:
        ports = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} is {text!r}; it must be a port or a comma list of ports") from None
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
            raise ConfigError("--api-key is empty; leave it out to let everybody in")
    return ApiKeys(keys if file is None else keys + keys_in("--api-keys-file", file))


def _chat_template(text: str | None) -> str | None:
    """FastDeploy takes a path or the template itself."""
    if text is None or "{" in text:
        return text
    return read_text(Path(text), f"--chat-template {text}")
