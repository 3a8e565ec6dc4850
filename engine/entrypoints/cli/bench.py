"""`fastdeploy bench serve`: load on a running server, from the public load generator aiperf."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ...common.api_client import ApiClient
from ...common.cli import CommandLine, nearest
from ...common.errors import ConfigError
from ...demo_model.model import resolve_model_path

_GENERATOR = "aiperf"
#: Not localhost, which the resolver of aiperf does not always know.
_URL = "http://127.0.0.1:8000/v1"
_INSTALL = "python3 -m venv ~/aiperf && ~/aiperf/bin/pip install aiperf, and add ~/aiperf/bin to PATH"
#: --backend -> type of endpoint of aiperf.
_ENDPOINT_TYPES = {"openai-chat": "chat", "openai": "completions"}


def main(words: Sequence[str]) -> int:
    if words[:1] in (["-h"], ["--help"]):
        print(_parser().format_help(), end="")
        return 0
    if words[:1] != ["serve"]:
        given = words[0] if words else "nothing"
        raise ConfigError(
            f"bench {given}{nearest(given, ['serve'])}: only `fastdeploy bench serve` exists; other "
            "measurements are in benchmarks/ of the repository"
        )
    own, further = list(words[1:]), []
    if "--" in own:
        own, further = own[: own.index("--")], own[own.index("--") + 1 :]
    options = _parser().parse_args(own)
    command = [_generator(), *_arguments(options), *further]
    print("running:", " ".join(command), file=sys.stderr, flush=True)
    # In place of this process, so that Ctrl-C reaches it and its exit status counts.
    try:
        os.execv(command[0], command)
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be run ({error.strerror}); install it again") from None


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        prog="fastdeploy bench serve",
        description="Measures latencies and throughput of a running server with aiperf. Arguments after -- "
        "are passed to aiperf as they are.",
        allow_abbrev=False,
    )
    parser.add_argument("--base-url", "--url", default=_URL, help="the server's API (default %(default)s)")
    parser.add_argument("--model", help="model in requests (default: the server's first)")
    parser.add_argument(
        "--backend",
        choices=_ENDPOINT_TYPES,
        default="openai-chat",
        help="chats or completions (default %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        help='checkpoint, or "demo", to count tokens with (default: the server\'s, if it is on this machine)',
    )
    parser.add_argument(
        "--num-prompts", type=int, default=100, metavar="N", help="requests (default %(default)s)"
    )
    parser.add_argument(
        "--max-concurrency", type=int, default=8, metavar="N", help="requests at a time (default %(default)s)"
    )
    parser.add_argument(
        "--request-rate", type=float, metavar="R", help="requests per second (default: no limit)"
    )
    parser.add_argument(
        "--input-len", type=int, default=128, metavar="N", help="tokens of a prompt (default %(default)s)"
    )
    parser.add_argument(
        "--output-len", type=int, default=64, metavar="N", help="tokens of an answer (default %(default)s)"
    )
    for name in ("temperature", "top-p", "top-k"):
        parser.add_argument(
            f"--{name}", type=float, metavar="X", help=f"{name.replace('-', '_')} of the requests"
        )
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default %(default)s)")
    return parser


def _generator() -> str:
    beside = Path(sys.executable).with_name(_GENERATOR)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(_GENERATOR)
    if found is None:
        raise ConfigError(f"the load generator {_GENERATOR} is not installed: {_INSTALL}")
    return found


def _arguments(options: argparse.Namespace) -> list[str]:
    if os.environ.get("FD_API_KEY"):
        # aiperf takes a key only on its command line, where all users of the machine see it.
        raise ConfigError(
            "bench serve cannot send an API key; unset FD_API_KEY and measure a server without keys"
        )
    client = ApiClient(options.base_url)
    first, directory = client.first_model()
    model = options.model or first
    if options.tokenizer is not None:
        directory = resolve_model_path(options.tokenizer)
    sampling = {
        name: value
        for name in ("temperature", "top_p", "top_k")
        if (value := getattr(options, name)) is not None
    }
    return [
        *("profile", "--model", model, "--url", client.origin, "--streaming", "--ui", "simple"),
        *("--endpoint-type", _ENDPOINT_TYPES[options.backend], "--tokenizer", str(directory or "builtin")),
        *("--request-count", str(options.num_prompts), "--concurrency", str(options.max_concurrency)),
        *(() if options.request_rate is None else ("--request-rate", f"{options.request_rate:g}")),
        *("--synthetic-input-tokens-mean", str(options.input_len), "--synthetic-input-tokens-stddev", "0"),
        *("--output-tokens-mean", str(options.output_len), "--output-tokens-stddev", "0"),
        *("--random-seed", str(options.seed), "--extra-inputs", "ignore_eos:true"),
        *(word for name, value in sampling.items() for word in ("--extra-inputs", f"{name}:{value:g}")),
    ]
