"""The daemon's /metrics, where dp.toml wants it: at another port after a reload, or nowhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ..common.metrics_server import MetricsServer
from .config.options import MetricsSection
from .config.programs import address

log = logging.getLogger("fd-dp")

_RETRY_SECONDS = 5.0


class MetricsPort:
    """A port that is taken is no reason not to serve models: it is said once, and tried again and again.

    Args:
        render: called in a thread, for each scrape.
    """

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._wanted: MetricsSection | None = None
        self._server: MetricsServer | None = None
        self._next_try = 0.0
        self._told = False

    def follow(self, wanted: MetricsSection) -> None:
        """In each turn of the loop."""
        if wanted != self._wanted:
            self.close()
            self._wanted, self._next_try, self._told = wanted, 0.0, False
        now = time.monotonic()
        if not wanted.port or self._server is not None or now < self._next_try:
            return
        where = address(wanted.host, wanted.port)
        try:
            self._server = MetricsServer([wanted.host], wanted.port, self._render)
            log.info("metrics: at http://%s/metrics", where)
        except OSError as error:
            self._next_try = now + _RETRY_SECONDS
            if not self._told:
                self._told = True
                log.error(
                    "metrics: ERROR (cannot listen on %s: %s; give dp.toml another [metrics] port); "
                    "everything else goes on, and this is tried again",
                    where,
                    error.strerror,
                )

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
