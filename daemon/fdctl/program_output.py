"""Output of programs: `fdctl logs`, and the last lines for `fdctl why`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...common.errors import FastDeployError
from ..control import protocol
from . import client

_BYTES_PER_LINE = 400
_STACKS_TAIL = 1 << 18
_POLL = 0.2
#: First line of a thread's stack from Python's faulthandler.
_THREAD = re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]+ .*\(most recent call first\)")


@dataclass(frozen=True, slots=True)
class Stacks:
    """Thread stacks that a hung program has printed."""

    threads: int
    #: Number of lines from their first line to the end of the output.
    lines_ago: int


def logs(options: argparse.Namespace) -> int:
    found = client.explain(options, options.replica)
    file = Path(found["output"])
    lines, end = _tail(file, _BYTES_PER_LINE * max(options.lines, 1))
    for line in lines[-options.lines :] if options.lines > 0 else []:
        _show(line, options.json)
    if options.follow:
        for line in _follow(file, end):
            _show(line, options.json)
    return protocol.OK


def last_lines(file: Path, count: int) -> list[str]:
    """Return at most `count` last lines, fewer if they are long. Raises FastDeployError."""
    lines, _ = _tail(file, _BYTES_PER_LINE * max(count, 1))
    return lines[-count:] if count > 0 else []


def stacks_in(file: Path) -> Stacks | None:
    """Return the stacks near the end of the output, or None. Raises FastDeployError."""
    lines, _ = _tail(file, _STACKS_TAIL)
    threads = [number for number, line in enumerate(lines) if _THREAD.match(line)]
    return Stacks(len(threads), len(lines) - threads[0]) if threads else None


def _tail(file: Path, size: int) -> tuple[list[str], int]:
    """Return the lines in the last `size` bytes, and the position of their end."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - size))
            return stream.read().decode(errors="replace").splitlines(), stream.tell()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise FastDeployError(f"{file} cannot be read ({error.strerror})") from None


def _follow(file: Path, position: int) -> Iterator[str]:
    """Yield each line that is written to a file after `position`, also after rotations."""
    stream = None
    rest = b""
    while True:
        if stream is None and (stream := _opened(file)) is not None:
            stream.seek(position)
        if stream is not None:
            while data := stream.read(1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")
            if not _is_current(stream, file):
                stream.close()
                position = 0
                stream = _opened(file)
                continue
        time.sleep(_POLL)


def _opened(file: Path) -> IO[bytes] | None:
    try:
        return file.open("rb")
    except OSError:
        # The file is being rotated, or its directory was removed.
        return None


def _is_current(stream: IO[bytes], file: Path) -> bool:
    """Return whether the path still names this file."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except OSError:
        return False


def _show(line: str, as_json: bool) -> None:
    sys.stdout.write((json.dumps({"line": line}) if as_json else line) + "\n")
    sys.stdout.flush()
