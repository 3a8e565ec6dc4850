"""A replica's /metrics, as health checks and the page read it."""

from __future__ import annotations

from ...common.http_client import HttpError, request
from .instance import Instance

_MAX_BYTES = 4 << 20


def read_metrics(instance: Instance, timeout: float) -> bytes | None:
    """Return the metrics in the text format of Prometheus; None if the replica does not return them."""
    server = instance.host, int(instance.metrics_port or instance.port)
    try:
        answer = request(server, "GET", "/metrics", timeout=timeout, limit=_MAX_BYTES)
    except HttpError:
        return None
    return answer.body if answer.status == 200 else None
