"""Access log: one line for each finished request."""

from __future__ import annotations

import asyncio
import logging

from ....common.log import info_together

_log = logging.getLogger("fastdeploy.access")
_FLUSH_SECONDS = 0.02


class AccessLog:
    """Collects the lines of a few milliseconds and logs them together. Used by the event loop only."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        if not self._lines:
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)
        self._lines.append(line)

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        info_together(_log, lines)
