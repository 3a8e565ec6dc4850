"""Logging of every process of the system: one event, one line, to stderr and to a file that rotates."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path

from .errors import ConfigError

_FORMAT = "%(asctime)s %(levelname)s %(name)s{context} pid=%(process)d %(message)s"


def configure(context: str = "", file_name: str | None = None) -> None:
    """Sends log records to stderr and, with `file_name`, to `$FD_LOG_DIR/file_name` (default directory: log).

    Args:
        context: words that name this process in each line, e.g. ``replica=3``.

    Raises:
        ConfigError: the environment asks for files that cannot be.
    """
    level = logging.DEBUG if os.environ.get("FD_DEBUG") == "1" else logging.INFO
    formatter = logging.Formatter(_FORMAT.format(context=f" {context}" if context else ""))
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file_name is not None:
        handlers.append(_file(file_name))
    root = logging.getLogger()
    root.handlers.clear()
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(level)
    # Per-connection chatter of the client library would drown the lines that matter.
    logging.getLogger("urllib3").setLevel(logging.WARNING)


def _file(name: str) -> logging.Handler:
    directory = Path(os.environ.get("FD_LOG_DIR") or "log")
    kept = os.environ.get("FD_LOG_BACKUP_COUNT", "7")
    if not kept.isdecimal():
        raise ConfigError(f"FD_LOG_BACKUP_COUNT is {kept!r}; it must be the number of old logs to keep")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return logging.handlers.RotatingFileHandler(
            directory / name, maxBytes=50 << 20, backupCount=int(kept), encoding="utf-8"
        )
    except OSError as error:
        raise ConfigError(
            f"FD_LOG_DIR is {str(directory)!r}; it must be a directory for logs ({error.strerror})"
        ) from None
