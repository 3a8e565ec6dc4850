"""The kernel's messages from the journal, or else from its own buffer."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator

from ...common.foreign_text import printable
from ..diagnosis.xid import AFTER, BEFORE, Xid, around_exit

#: Time (Unix) and text.
Message = tuple[float, str]

_DEVICE = "/dev/kmsg"
#: Bytes: the kernel refuses to write a message into a smaller buffer.
_RECORD = 8192
_MAX_MESSAGES = 100_000
_JOURNAL_SECONDS = 5.0
_JOURNAL_LINE = re.compile(r"([0-9]{1,12}\.[0-9]+) \S+ kernel: (.*)")
_KERNEL_RECORD = re.compile(rb"[0-9]+,[0-9]+,([0-9]{1,18}),[^;\n]*;([^\n]*)")


def xids(exit_time: float, gpu: str) -> tuple[list[Xid], str]:
    """Return the Xids of a GPU around an exit, and why the log cannot be read, or "".

    Args:
        gpu: its PCI address; empty for any GPU.
    """
    problems = []
    sources: list[Callable[[float, float], list[Message]]] = [_journal, _buffer]
    for read in sources:
        try:
            found = around_exit(read(exit_time - BEFORE, exit_time + AFTER), exit_time, gpu)
        except OSError as error:
            problems.append(str(error))
            continue
        if found:
            return found, ""
    return [], "" if len(problems) < len(sources) else "; ".join(problems)


def parse_journal(text: str) -> list[Message]:
    """Parse the output of journalctl -o short-unix."""
    found = map(_JOURNAL_LINE.fullmatch, text.splitlines())
    return [(float(line[1]), line[2]) for line in found if line]


def parse_record(record: bytes, boot: float) -> Message | None:
    """Parse one record of /dev/kmsg; `boot` is the Unix time at which its clock was 0."""
    found = _KERNEL_RECORD.match(record)
    return (boot + int(found[1]) / 1e6, found[2].decode(errors="replace")) if found else None


def _journal(since: float, until: float) -> list[Message]:
    command = ["journalctl", "_TRANSPORT=kernel", "--no-pager", "-o", "short-unix"]
    command += [f"--lines={_MAX_MESSAGES}", f"--since=@{int(since)}", f"--until=@{int(until) + 1}"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_JOURNAL_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise OSError("journalctl: not found") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"journalctl: no answer within {_JOURNAL_SECONDS:g} s") from None
    found = parse_journal(done.stdout.decode(errors="replace"))
    if not found and (hints := done.stderr.decode(errors="replace").split("\n")[0]):
        # journalctl exits with 0 if it lacks permission; only its stderr gives the reason.
        raise OSError(f"journalctl: {printable(hints.removeprefix('Hint: '))}")
    return found


def _buffer(since: float, until: float) -> list[Message]:
    boot = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    try:
        return [message for record in _records() if (message := parse_record(record, boot))]
    except OSError as error:
        raise OSError(f"{_DEVICE}: {error.strerror}") from None


def _records() -> Iterator[bytes]:
    device = os.open(_DEVICE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MAX_MESSAGES):
                try:
                    yield os.read(device, _RECORD)
                except OSError as error:
                    # EPIPE: the kernel has overwritten the next messages.
                    if error.errno != errno.EPIPE:
                        raise
    finally:
        os.close(device)
