"""Logging of every process of the system: one event, one line, to stderr and to a file that rotates."""

from __future__ import annotations

import fcntl
import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from .errors import ConfigError

_FORMAT = "%(asctime)s %(levelname)s %(name)s{context} pid=%(process)d %(message)s"
_MAX_BYTES = 50 << 20
#: Seconds between two looks at the file's size and whether it still has its name.
_LOOK_SECONDS = 1.0
#: Attribute of a record that is many lines at once.
_LINES = "fd_lines"
#: And of the text that was made of them.
_TEXT = "fd_text"


def configure(context: str = "", file_name: str | None = None) -> None:
    """Sends log records to stderr and, with `file_name`, to `$FD_LOG_DIR/file_name` (default directory: log).

    Args:
        context: words that name this process in each line, e.g. ``replica=3``.

    Raises:
        ConfigError: the environment asks for files that cannot be.
    """
    level = logging.DEBUG if os.environ.get("FD_DEBUG") == "1" else logging.INFO
    formatter = _Formatter(_FORMAT.format(context=f" {context}" if context else ""))
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file_name is not None:
        handlers.append(_file(file_name))
    root = logging.getLogger()
    root.handlers.clear()
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    if _is_journal(sys.stderr):
        handlers[0].setFormatter(_JournalFormatter(formatter))
    root.setLevel(level)
    # Per-connection chatter of the client library would drown the lines that matter.
    logging.getLogger("urllib3").setLevel(logging.WARNING)


def info_together(logger: logging.Logger, messages: Sequence[str]) -> None:
    """Logs many messages as `logger.info` would, one line each, at a fraction of the cost."""
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
            # Both handlers want it.
            setattr(record, _TEXT, text)
        return text


class _JournalFormatter(logging.Formatter):
    """Begins each line as sd-daemon(3) says, so that `journalctl -p err` finds the errors."""

    _PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in self._PRIORITIES if record.levelno >= level), 7)
        return "\n".join([f"<{priority}>{line}" for line in self._inner.format(record).split("\n")])


class _SharedFile(logging.handlers.RotatingFileHandler):
    """Several processes may write to it: one of them rotates it, the others follow."""

    _looked_at = 0.0

    def shouldRollover(self, record: logging.LogRecord) -> int:
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return 0
        self._looked_at = now
        if not self._has_its_name():
            self._open_again()
        assert self.stream is not None, "opened when it was made, and again whenever it is closed"
        return os.fstat(self.stream.fileno()).st_size >= self.maxBytes

    def doRollover(self) -> None:
        directory = os.open(os.path.dirname(self.baseFilename), os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            if self._has_its_name():
                super().doRollover()
            else:
                self._open_again()
        finally:
            os.close(directory)

    def _has_its_name(self) -> bool:
        if self.stream is None:
            return False
        try:
            named = os.stat(self.baseFilename)
        except FileNotFoundError:
            return False
        own = os.fstat(self.stream.fileno())
        return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)

    def _open_again(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = self._open()


def _is_journal(stream: TextIO) -> bool:
    """systemd says which file the journal is; a child inherits the word, but perhaps another file."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _file(name: str) -> logging.Handler:
    directory = Path(os.environ.get("FD_LOG_DIR") or "log")
    kept = os.environ.get("FD_LOG_BACKUP_COUNT", "7")
    if not kept.isdecimal():
        raise ConfigError(f"FD_LOG_BACKUP_COUNT is {kept!r}; it must be the number of old logs to keep")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return _SharedFile(directory / name, maxBytes=_MAX_BYTES, backupCount=int(kept), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"FD_LOG_DIR is {str(directory)!r}; it must be a directory for logs ({error.strerror})"
        ) from None
