"""Log file handler of supervisord that survives a full disk and removed files.

supervisor's own handler writes to stderr when a write fails, closes the output of the program for good when
that fails as well, and never opens a removed file again.
"""

from __future__ import annotations

import contextlib
import os
import time

from supervisor import loggers

#: Seconds between a failure to open or rotate the file and the next try.
_RETRY_SECONDS = 1.0
_TIME = "%Y-%m-%d %H:%M:%S"


class OutputFile(loggers.RotatingFileHandler):
    """Rotating log file. Output that cannot be written is dropped, and its size is logged later."""

    def __init__(self, filename: str, mode: str = "ab", maxBytes: int = 0, backupCount: int = 0) -> None:
        loggers.Handler.__init__(self)
        self.baseFilename = filename
        self.maxBytes = maxBytes
        self.backupCount = backupCount
        self._descriptor: int | None = None
        self._size = 0
        self._next_try = 0.0
        self._mid_line = False
        self._lost = 0
        self._lost_since = ""
        self._problem = ""
        self._replace(_latest.get(filename))
        _latest[filename] = self

    def emit(self, record: loggers.LogRecord) -> None:
        output = self._text(record)
        pending = self._loss_report() + output
        try:
            self._check_file()
            while pending:
                pending = pending[self._write(pending) :]
        except OSError as error:
            self._problem = error.strerror or str(error)
            self._lost_since = self._lost_since or time.strftime(_TIME)
            # The report comes first: it is written once no more than the output is pending.
            is_reported = len(pending) <= len(output)
            self._lost = len(pending) if is_reported else self._lost + len(output)
        else:
            self._lost, self._lost_since = 0, ""

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def reopen(self) -> None:
        self.close()
        self._next_try = 0.0

    def remove(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            os.remove(self.baseFilename)

    def _replace(self, previous: OutputFile | None) -> None:
        """Close the file of the program's previous run, and take over its report of lost output."""
        if previous is not None:
            previous.close()
            self._lost, self._lost_since = previous._lost, previous._lost_since
            self._problem = previous._problem

    def _text(self, record: loggers.LogRecord) -> bytes:
        # The output of programs arrives as bytes.
        if isinstance(record.msg, bytes):
            return record.msg
        return (self.fmt % record.asdict()).encode("utf-8", "replace")

    def _check_file(self) -> None:
        """Open the file if it is not open or was removed; rotate it if it is large."""
        is_in_place = self._is_in_place()
        if is_in_place and (not self.maxBytes or self._size < self.maxBytes):
            return
        if time.monotonic() < self._next_try:
            if not is_in_place:
                raise OSError(0, self._problem)
            return
        self._next_try = time.monotonic() + _RETRY_SECONDS
        if is_in_place:
            self._rotate()
        else:
            self._open()

    def _is_in_place(self) -> bool:
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.stat(self.baseFilename), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False
        except OSError:
            # It cannot be checked, and the open file can be written.
            return True

    def _open(self) -> None:
        os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.baseFilename, flags, 0o666)
        self.close()
        self._descriptor = descriptor
        self._next_try = 0.0
        self._size = os.fstat(descriptor).st_size
        self._mid_line = False

    def _rotate(self) -> None:
        # The file grows until a later try succeeds.
        with contextlib.suppress(OSError):
            for number in range(self.backupCount - 1, -1, -1):
                older = f"{self.baseFilename}.{number}" if number else self.baseFilename
                with contextlib.suppress(FileNotFoundError):
                    os.replace(older, f"{self.baseFilename}.{number + 1}")
            self._open()

    def _write(self, data: bytes) -> int:
        assert self._descriptor is not None, "opened by _check_file"
        written = os.write(self._descriptor, data)
        self._size += written
        self._mid_line = data[written - 1] != ord("\n")
        return written

    def _loss_report(self) -> bytes:
        """Return a log line about lost output, or b""."""
        if not self._lost:
            return b""
        line_end = "\n" if self._mid_line else ""
        note = f"{self._lost} bytes of output were lost since {self._lost_since}: {self._problem}"
        return f"{line_end}{time.strftime(_TIME)} WARNING supervisord {note}\n".encode("utf-8", "replace")


#: File name -> newest handler. supervisor makes one for each run of a program and never closes it.
_latest: dict[str, OutputFile] = {}
