"""The gunicorn worker that runs the router: one thread for each request under way."""

from __future__ import annotations

import os
from typing import Any

from ...entrypoints.http_worker import HttpWorker


class RouterWorker(HttpWorker):
    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGINT and SIGQUIT: end now. Leaving as Python does would wait for every thread's request."""
        os._exit(0)
