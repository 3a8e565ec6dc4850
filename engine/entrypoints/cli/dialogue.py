"""Common part of `chat` and `complete`: options, input line by line, answers printed as they arrive."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass

from ...common.api_client import DEFAULT_URL, ApiClient, api_key
from ...common.cli import CommandLine
from ...common.errors import FastDeployError

_DIM, _PLAIN = "\033[2m", "\033[0m"
#: Control characters could command the terminal.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of an answer."""

    text: str
    is_reasoning: bool = False


def dialogue_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = CommandLine(prog=f"fastdeploy {name}", description=description, allow_abbrev=False)
    parser.add_argument("--url", default=DEFAULT_URL, help="the server's API (default %(default)s)")
    parser.add_argument("--model-name", metavar="NAME", help="model (default: the server's first)")
    parser.add_argument("--api-key", metavar="KEY", help="also FD_API_KEY or OPENAI_API_KEY")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="limit of an answer (default: what fits)")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="print the answer to TEXT and exit")
    return parser


def client_of(options: argparse.Namespace) -> tuple[ApiClient, str]:
    """Return a client of the server and the model to ask. Raises FastDeployError."""
    client = ApiClient(options.url, api_key())
    return client, options.model_name or client.first_model()[0]


def converse(options: argparse.Namespace, answer: Callable[[str], Generator[Piece]], greeting: str) -> int:
    """Print the answer to --quick, or to each line of standard input.

    At a terminal Ctrl-C stops an answer; elsewhere, and before an answer, it ends the command.
    """
    if options.quick is not None:
        _print(answer(options.quick))
        return 0
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            # Importing it is enough: `input` then edits lines and recalls earlier ones.
            import readline  # noqa: F401
        print(greeting)
    while True:
        try:
            text = input("> " if is_terminal else "")
        except EOFError:
            return 0
        if not text.strip():
            continue
        try:
            _print(answer(text))
        except FastDeployError as error:
            if not is_terminal:
                raise
            print(f"ERROR ({error})", file=sys.stderr)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(_PLAIN if sys.stdout.isatty() else "")


def _print(pieces: Generator[Piece]) -> None:
    """Print an answer as it arrives; its reasoning only on a terminal."""
    is_terminal = sys.stdout.isatty()
    with contextlib.closing(pieces):
        for piece in pieces:
            text = piece.text.translate(_CONTROLS) if is_terminal else piece.text
            if piece.is_reasoning:
                text = f"{_DIM}{text}{_PLAIN}" if is_terminal and text else ""
            print(text, end="", flush=True)
    print()
