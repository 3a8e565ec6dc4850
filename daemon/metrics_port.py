"""The daemon's /metrics on the port of dp.toml, which a reload can change."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .config.options import MetricsSection
from .config.programs import address

if TYPE_CHECKING:
    from ..common.metrics_server import MetricsServer

log = logging.getLogger("fd-dp")

_RETRY_SECONDS = 5.0


class MetricsPort:
    """Server of the daemon's metrics. A port that is in use is logged once and retried.

    Args:
        render: returns the metrics; called in a thread for each scrape.
    """

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._wanted: MetricsSection | None = None
        self._server: MetricsServer | None = None
        self._next_try = 0.0
        self._is_logged = False

    def follow(self, wanted: MetricsSection) -> None:
        """Listen on the configured port. Call this in each turn of the loop."""
        if wanted != self._wanted:
            self.close()
            self._wanted, self._next_try, self._is_logged = wanted, 0.0, False
        now = time.monotonic()
        if not wanted.port or self._server is not None or now < self._next_try:
            return
        # Imported here, because asyncio is slow to import and fd-dp --version does not need it.
        from ..common.metrics_server import MetricsServer

        where = address(wanted.host, wanted.port)
        try:
            self._server = MetricsServer([wanted.host], wanted.port, self._render)
            log.info("metrics: at http://%s/metrics", where)
        except OSError as error:
            self._next_try = now + _RETRY_SECONDS
            if not self._is_logged:
                self._is_logged = True
                log.error(
                    "metrics: ERROR (cannot listen on %s: %s; set another [metrics] port in dp.toml); "
                    "trying again, everything else works",
                    where,
                    error.strerror,
                )

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
