"""A log file that survives a full, read-only or missing disk: it drops lines instead of raising."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import time
from pathlib import Path

#: Seconds between two checks of the file's size and of whether it still exists under its name.
CHECK_SECONDS = 1.0


class SharedFile(logging.Handler):
    """A rotating log file that several processes may write to: one of them rotates it, the others reopen it.

    A removed file or directory is created again. Lines that cannot be written are dropped and counted; the
    count is logged when writing succeeds again.
    """

    def __init__(self, path: Path, max_bytes: int, kept: int, fallback: logging.Handler) -> None:
        """
        Args:
            max_bytes: size at which the file is rotated.
            kept: number of old files to keep.
            fallback: handles the reports that the file cannot be written, or can be written again.
        """
        super().__init__()
        self._path = path.absolute()
        self._max_bytes = max_bytes
        self._kept = kept
        self._fallback = fallback
        self._descriptor: int | None = None
        self._directory_mode = 0o777
        self._checked_at = 0.0
        self._cannot_rotate = False
        #: True if the last write was cut off within a line.
        self._is_torn = False
        self._pid = os.getpid()
        #: Lines dropped since the last successful write.
        self._lost = 0
        self._lost_since = self._reason = ""

    def open(self) -> None:
        """Open the file now instead of at the first `emit`, to report a wrong path. Raises OSError."""
        self._open()
        self._directory_mode = stat.S_IMODE(self._path.parent.stat().st_mode)

    def emit(self, record: logging.LogRecord) -> None:
        if self._pid != os.getpid():
            # In a forked child: the parent reports its own lost lines.
            self._pid, self._lost = os.getpid(), 0
        try:
            lines = self._lines_of(record)
        except Exception:
            self.handleError(record)
            return
        notice = b""
        try:
            descriptor = self._writable_file()
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
        """Write all lines. Raises OSError, after which a part of them may be written."""
        # Unbuffered: a buffer would retain lines that cannot be written.
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

    def _writable_file(self) -> int:
        """Return the descriptor to write to, after the periodic check. Raises OSError."""
        now = time.monotonic()
        if self._descriptor is None or now - self._checked_at >= CHECK_SECONDS:
            self._checked_at = now
            if self._descriptor is None or not self._has_its_name():
                self._open()
            elif os.fstat(self._descriptor).st_size >= self._max_bytes:
                self._rotate()
        assert self._descriptor is not None, "_open succeeded"
        return self._descriptor

    def _rotate(self) -> None:
        """Rotate the file. If that fails, lines go to the old file and the next check tries again."""
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
        # Shift only up to the first gap, which a failed rotation may have left.
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
            # Linux releases the descriptor even if close() fails; a retry could close another file.
            with contextlib.suppress(OSError):
                os.close(descriptor)
