"""What a program has printed: `fdctl logs`, and the end of it for `fdctl why`."""

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
#: How Python's faulthandler begins what it tells of a thread.
_THREAD = re.compile(r"(?:Current thread|Thread) 0x[0-9a-f]+ .*\(most recent call first\)")


@dataclass(frozen=True, slots=True)
class Stacks:
    """What the threads of a program did when it was asked for it, because it hung."""

    threads: int
    #: So many lines before the end of the output they begin.
    lines_ago: int


def logs(options: argparse.Namespace) -> int:
    found = client.ask(options, {"do": "why", "name": options.replica})["why"]
    file = Path(found["output"])
    lines, end = _tail(file, _BYTES_PER_LINE * max(options.lines, 1))
    for line in lines[-options.lines :] if options.lines > 0 else []:
        _show(line, options.json)
    if options.follow:
        for line in _follow(file, end):
            _show(line, options.json)
    return protocol.OK


def last_lines(file: Path, count: int) -> list[str]:
    """Fewer if lines are long. Raises FastDeployError."""
    lines, _ = _tail(file, _BYTES_PER_LINE * max(count, 1))
    return lines[-count:] if count > 0 else []


def stacks_in(file: Path) -> Stacks | None:
    """Those near the end of the output, if there are any. Raises FastDeployError."""
    lines, _ = _tail(file, _STACKS_TAIL)
    threads = [number for number, line in enumerate(lines) if _THREAD.match(line)]
    return Stacks(len(threads), len(lines) - threads[0]) if threads else None


def _tail(file: Path, size: int) -> tuple[list[str], int]:
    """The lines of the last so many bytes, and where they end."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - size))
            return stream.read().decode(errors="replace").splitlines(), stream.tell()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise FastDeployError(f"{file} cannot be read ({error.strerror})") from None


def _follow(file: Path, position: int) -> Iterator[str]:
    """Each line that is written to a file beyond `position`, over its rotations."""
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
            if not _has_its_name(stream, file):
                stream.close()
                position = 0
                stream = _opened(file)
                continue
        time.sleep(_POLL)


def _opened(file: Path) -> IO[bytes] | None:
    try:
        return file.open("rb")
    except OSError:
        # Its rotation or the loss of its directory can come at any moment.
        return None


def _has_its_name(stream: IO[bytes], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except OSError:
        return False


def _show(line: str, as_json: bool) -> None:
    sys.stdout.write((json.dumps({"line": line}) if as_json else line) + "\n")
    sys.stdout.flush()
