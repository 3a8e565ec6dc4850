"""Logging of every process of the system: one event, one line, to stderr and to a file that rotates."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s{context} pid=%(process)d %(message)s"


def configure(context: str = "", file_name: str | None = None) -> None:
    """Sends log records to stderr and, with `file_name`, to `$FD_LOG_DIR/file_name` (default directory: log).

    Args:
        context: words that name this process in each line, e.g. ``replica=3``.
    """
    level = logging.DEBUG if os.environ.get("FD_DEBUG") == "1" else logging.INFO
    formatter = logging.Formatter(_FORMAT.format(context=f" {context}" if context else ""))
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file_name is not None:
        directory = Path(os.environ.get("FD_LOG_DIR") or "log")
        directory.mkdir(parents=True, exist_ok=True)
        handlers.append(
            logging.handlers.RotatingFileHandler(
                directory / file_name,
                maxBytes=50 << 20,
                backupCount=int(os.environ.get("FD_LOG_BACKUP_COUNT", "7")),
                encoding="utf-8",
            )
        )
    root = logging.getLogger()
    root.handlers.clear()
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(level)
    # Per-connection chatter of the client library would drown the lines that matter.
    logging.getLogger("urllib3").setLevel(logging.WARNING)
