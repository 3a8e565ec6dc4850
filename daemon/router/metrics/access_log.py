"""One line for each request that is over."""

from __future__ import annotations

import asyncio
import logging

from ....common.log import info_together

_log = logging.getLogger("fastdeploy.access")
_SECONDS = 0.02


class AccessLog:
    """Belongs to the event loop. What ends within a moment is logged together."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        if not self._lines:
            asyncio.get_running_loop().call_later(_SECONDS, self.flush)
        self._lines.append(line)

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        info_together(_log, lines)
