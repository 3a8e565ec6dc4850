"""Last lines of a program's output file, and the error in them that explains an exit."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from ...common.foreign_text import printable

#: Bytes.
_TAIL = 1 << 16
_MAX_ERROR = 300
#: Beginning of a log line of ours.
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:,\d{3})?")


def last_error(file: Path, since: float) -> str:
    """Return the last error line written after `since` (Unix time), or "". Long lines are cut."""
    start = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))},{int(since % 1 * 1000):03d}"
    errors = [
        line.strip()
        for line in tail(file).splitlines()
        if re.search(r"\bERROR\b", line)
        # A line without a time is the error message of a program that failed to start.
        and not ((stamp := _TIME.match(line)) and stamp[0] < start[: len(stamp[0])])
    ]
    # gunicorn reports that it ends; its reason is only useful if no other line gives one.
    own = [line for line in errors if "gunicorn.error" not in line]
    own = own or [line for line in errors if "Reason: " in line]
    return printable(own[-1], _MAX_ERROR) if own else ""


def matches(file: Path, pattern: str) -> bool:
    """Return whether one of the last lines matches the regular expression."""
    return re.search(pattern, tail(file), re.MULTILINE) is not None


def tail(file: Path) -> str:
    """Return the last 64 KiB of the file, or "" if it cannot be read."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""
