"""`fastdeploy run-batch`: answer a file of requests in OpenAI's batch format."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...common.api_client import ApiClient, api_key
from ...common.cli import MAX_BODY_BYTES, CommandLine
from ...common.errors import ConfigError, FastDeployError
from ..batch.files import InputFile, OutputFile
from ..batch.requests import PATHS
from ..batch.runner import run_batch
from ..batch.targets import OfflineTarget, ServerTarget, Target
from ..progress import progress_bar

#: Requests in progress for each sequence of a step: the next ones are ready when some end.
_PER_SEQUENCE = 2
_SERVER_CONCURRENCY, _MAX_CONCURRENCY = 32, 512


def main(words: Sequence[str]) -> int:
    parser = _parser()
    options, further = parser.parse_known_args(words)
    if options.url is not None and further:
        # The flags of an engine have no effect on a running server; this reports them.
        parser.parse_args(words)
    for flag, path in (("-i", options.input_file), ("-o", options.output_file)):
        if path.startswith(("http:", "https:")):
            raise ConfigError(f"{flag} is a URL; use a file, and move it with curl before or after")
    source = InputFile(Path(options.input_file), MAX_BODY_BYTES)
    requests = source.requests()
    with OutputFile(Path(options.output_file)) as output:
        done = output.resume(requests)
        if done:
            print(
                f"{done} of {source.length} requests have results in {options.output_file}", file=sys.stderr
            )
        if done == source.length:
            return 0
        written = done
        with (
            _target(options, further) as (target, concurrency),
            progress_bar("Requests", source.length, done) as bar,
        ):

            def advance(number: int) -> None:
                nonlocal written
                written += number
                bar(number)

            try:
                run_batch(enumerate(requests, start=done), output, target, concurrency, advance)
            except (FastDeployError, OSError, KeyboardInterrupt) as error:
                rest = f"{written} of {source.length} requests have results; run this again to continue"
                if isinstance(error, KeyboardInterrupt):
                    print(rest, file=sys.stderr)
                    raise
                raise FastDeployError(f"{error}; {rest}") from None
    print(f"{written} of {source.length} requests have results in {options.output_file}", file=sys.stderr)
    return 0


@contextmanager
def _target(options: argparse.Namespace, flags: list[str]) -> Iterator[tuple[Target, int]]:
    """Start what answers the requests; return it and the number of requests in progress."""
    if (options.url is None) == (options.model is None):
        raise ConfigError("give either --model, a checkpoint, or --url, a running server (run-batch --help)")
    limit: int | None = options.max_concurrency
    if limit is not None and not 1 <= limit <= _MAX_CONCURRENCY:
        raise ConfigError(f"--max-concurrency is {limit}; it must be between 1 and {_MAX_CONCURRENCY}")
    if options.url is not None:
        key = api_key()
        # Report at once a server that is not there.
        ApiClient(options.url, key).first_model()
        yield ServerTarget(options.url, key), limit or _SERVER_CONCURRENCY
        return
    # Imported here, because a running server needs none of it.
    from ..llm.offline_engine import OfflineEngine
    from ..openai.options import parse_arguments

    config = parse_arguments(["--model", options.model, *flags], "fastdeploy serve")
    concurrency = min(_PER_SEQUENCE * config.engine.max_num_seqs, limit or _MAX_CONCURRENCY)
    with OfflineEngine(config) as engine:
        engine.wait_ready()
        yield OfflineTarget(engine, config.seed), concurrency


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        prog="fastdeploy run-batch",
        description=f"Answers a file of requests in OpenAI's batch format, to {', '.join(PATHS)}. The same "
        "command continues a batch that was interrupted.",
        epilog="With --model, further options are those of fastdeploy serve, such as --max-num-seqs.",
        allow_abbrev=False,
    )
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE", help="one request in a line")
    parser.add_argument(
        "-o", "--output-file", required=True, metavar="FILE", help="one result in a line, in the same order"
    )
    parser.add_argument("--model", metavar="MODEL", help='checkpoint to load, or "demo"')
    parser.add_argument("--url", metavar="URL", help="running server, in place of a model")
    parser.add_argument("--api-key", metavar="KEY", help="also FD_API_KEY or OPENAI_API_KEY")
    parser.add_argument(
        "--max-concurrency",
        type=int,
        metavar="N",
        help=f"limit of requests in progress (default: {_SERVER_CONCURRENCY}; with a model twice "
        "--max-num-seqs)",
    )
    return parser
