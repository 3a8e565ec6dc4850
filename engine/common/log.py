"""Logging setup of all processes: one line per event, to stderr and to a rotating file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from .errors import ConfigError, is_disk_condition
from .log_file import SharedFile

_FORMAT = "%(asctime)s %(levelname)s %(name)s{context} pid=%(process)d %(message)s"
_MAX_BYTES = 50 << 20
#: Record attribute with the messages of `info_together`.
_LINES = "fd_lines"
#: Record attribute that caches their formatted text.
_TEXT = "fd_text"


def configure(context: str = "", file_name: str | None = None) -> None:
    """Send log records to stderr and, with `file_name`, to `$FD_LOG_DIR/file_name` (default directory: log).

    Args:
        context: words that identify this process in each line, e.g. ``replica=3``.

    Raises:
        ConfigError: the log settings of the environment are invalid.
    """
    level = logging.DEBUG if os.environ.get("FD_DEBUG") == "1" else logging.INFO
    formatter = _Formatter(_FORMAT.format(context=f" {context}" if context else ""))
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file_name is not None:
        handlers.append(_file(file_name, fallback=handlers[0]))
    root = logging.getLogger()
    root.handlers.clear()
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    if _is_journal(sys.stderr):
        handlers[0].setFormatter(_JournalFormatter(formatter))
    root.setLevel(level)


def info_together(logger: logging.Logger, messages: Sequence[str]) -> None:
    """Log many messages like `logger.info`, one line each, at a fraction of the cost."""
    if messages and logger.isEnabledFor(logging.INFO):
        record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, "", (), None)
        setattr(record, _LINES, messages)
        logger.handle(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        messages: Sequence[str] | None = getattr(record, _LINES, None)
        if messages is None:
            return super().format(record)
        text: str | None = getattr(record, _TEXT, None)
        if text is None:
            prefix = super().format(record)
            text = prefix + f"\n{prefix}".join(messages)
            # For the other handler.
            setattr(record, _TEXT, text)
        return text


class _JournalFormatter(logging.Formatter):
    """Adds the priority prefix of sd-daemon(3) to each line, so that `journalctl -p err` finds errors."""

    _PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in self._PRIORITIES if record.levelno >= level), 7)
        return "\n".join([f"<{priority}>{line}" for line in self._inner.format(record).split("\n")])


def _is_journal(stream: TextIO) -> bool:
    """Return True if the stream is the journal. Children inherit JOURNAL_STREAM, so compare the file."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _file(name: str, fallback: logging.Handler) -> logging.Handler:
    directory = Path(os.environ.get("FD_LOG_DIR") or "log")
    kept = os.environ.get("FD_LOG_BACKUP_COUNT", "7")
    if not kept.isdecimal():
        raise ConfigError(f"FD_LOG_BACKUP_COUNT is {kept!r}; it must be the number of old log files to keep")
    handler = SharedFile(directory / name, _MAX_BYTES, int(kept), fallback)
    try:
        handler.open()
    except OSError as error:
        # A disk that is full or read-only must not prevent the start.
        if not is_disk_condition(error):
            if os.path.lexists(directory / name):
                raise ConfigError(
                    f"log file {directory / name}: cannot be written ({error.strerror})"
                ) from None
            raise ConfigError(
                f"FD_LOG_DIR is {str(directory)!r}; it must be a directory for logs ({error.strerror})"
            ) from None
    return handler
