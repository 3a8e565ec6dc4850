"""A log file on a disk that may be full, read-only or gone: lines are dropped, and nothing is raised."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import time
from pathlib import Path

#: Seconds between two looks at the file's size and whether it still has its name.
LOOK_SECONDS = 1.0


class SharedFile(logging.Handler):
    """Several processes may write to it: one of them rotates it, the others follow.

    A removed file or directory is created again. Lines that cannot be written are dropped; when writing
    succeeds again, one line tells how many.
    """

    def __init__(self, path: Path, max_bytes: int, kept: int, fallback: logging.Handler) -> None:
        """`fallback` handles the records that the file cannot be written, or can be written again."""
        super().__init__()
        self._path = path.absolute()
        self._max_bytes = max_bytes
        self._kept = kept
        self._fallback = fallback
        self._descriptor: int | None = None
        self._directory_mode = 0o777
        self._looked_at = 0.0
        self._cannot_rotate = False
        self._is_torn = False
        self._pid = os.getpid()
        self._lost = 0
        self._lost_since = self._reason = ""

    def open(self) -> None:
        """Open the file now, to report a wrong path at once; otherwise `emit` does it. Raises OSError."""
        self._open()
        self._directory_mode = stat.S_IMODE(self._path.parent.stat().st_mode)

    def emit(self, record: logging.LogRecord) -> None:
        if self._pid != os.getpid():
            # The parent reports the lines that it has lost.
            self._pid, self._lost = os.getpid(), 0
        try:
            lines = self._lines_of(record)
        except Exception:
            self.handleError(record)
            return
        notice = b""
        try:
            descriptor = self._look()
            if self._lost:
                lost = "lines lost since %s: %d (%s)"
                notice = self._lines_of(self._record(lost, self._lost_since, self._lost, self._reason))
            self._write(descriptor, notice + lines)
        except OSError as error:
            self._count_lost(lines.count(b"\n"), error)
            return
        if self._lost:
            self._fallback.handle(self._record("log file %s is written again", self._path))
            self._lost = 0

    def close(self) -> None:
        self._close()
        super().close()

    def _lines_of(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode("utf-8", "backslashreplace")

    def _write(self, descriptor: int, lines: bytes) -> None:
        """Write all lines. Raises OSError, after which a part may be written."""
        # Unbuffered: a buffer would keep what cannot be written.
        rest = b"\n" + lines if self._is_torn else lines
        while rest:
            written = os.write(descriptor, rest)
            rest = rest[written:]
            self._is_torn = bool(rest)

    def _count_lost(self, lines: int, error: OSError) -> None:
        if not self._lost:
            self._lost_since = time.strftime("%Y-%m-%d %H:%M:%S")
            self._reason = error.strerror or str(error)
            self._fallback.handle(
                self._record(
                    "log file %s cannot be written (%s): lines are dropped until it can",
                    self._path,
                    self._reason,
                )
            )
        self._lost += lines

    def _record(self, message: str, *arguments: object) -> logging.LogRecord:
        return logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, arguments, None)

    def _look(self) -> int:
        """Return the descriptor to write to. Raises OSError."""
        now = time.monotonic()
        if self._descriptor is None or now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            if self._descriptor is None or not self._has_its_name():
                self._open()
            elif os.fstat(self._descriptor).st_size >= self._max_bytes:
                self._rotate()
        assert self._descriptor is not None, "opened, or it has raised"
        return self._descriptor

    def _rotate(self) -> None:
        """Rotate the file. If that fails, lines go to the old file and the next look tries again."""
        try:
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX)
                if self._has_its_name():
                    self._rename()
                self._open()
            finally:
                os.close(directory)
        except OSError as error:
            if self._descriptor is None:
                raise
            if not self._cannot_rotate:
                self._fallback.handle(
                    self._record("log file %s cannot be rotated (%s)", self._path, error.strerror)
                )
            self._cannot_rotate = True
        else:
            self._cannot_rotate = False

    def _rename(self) -> None:
        if self._kept == 0:
            self._path.unlink()
            return
        old = [self._path.with_name(f"{self._path.name}.{number}") for number in range(1, self._kept + 1)]
        # Up to a gap, which a rotation that failed halfway has left: older files need not move.
        gap = next((number for number, file in enumerate(old) if not file.exists()), len(old) - 1)
        for number in range(gap, 0, -1):
            old[number - 1].replace(old[number])
        self._path.replace(old[0])

    def _has_its_name(self) -> bool:
        if self._descriptor is None:
            return False
        try:
            named = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            # The open file may still be usable.
            return True
        own = os.fstat(self._descriptor)
        return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)

    def _open(self) -> None:
        self._close()
        self._path.parent.mkdir(self._directory_mode, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o666)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # Closed even if this fails: the number may be another file's at once.
            with contextlib.suppress(OSError):
                os.close(descriptor)
