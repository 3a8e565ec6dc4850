"""The input and output files of a batch, read line by line, and where an interrupted batch continues."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from ...common.errors import ConfigError
from .requests import Request, read_request, read_result

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
#: Limit of a line of the output file: log probabilities of a long text are tens of MiB.
_MAX_RESULT = 256 << 20


class InputFile:
    """A file of requests.

    Args:
        max_line: longer lines are requests with a problem.

    Raises:
        ConfigError: it cannot be read.
    """

    def __init__(self, path: Path, max_line: int) -> None:
        self._path = path
        self._max_line = max_line
        #: Number of requests.
        self.length = sum(1 for _ in self._lines())

    def requests(self) -> Iterator[Request]:
        for line in self._lines():
            if len(line) > self._max_line:
                problem = f"the line has more than {self._max_line} bytes"
                yield Request(None, problem=problem, code="line_too_long")
            else:
                yield read_request(line)

    def _lines(self) -> Iterator[bytes]:
        """Yield the lines that are not blank; of a line that is too long only its beginning."""
        try:
            with self._path.open("rb") as file:
                is_first = True
                while line := file.readline(self._max_line + 1):
                    end = line
                    while len(end) and not end.endswith(b"\n"):
                        end = file.readline(_CHUNK)
                    stripped = (line.removeprefix(_BOM) if is_first else line).strip()
                    is_first = False
                    if stripped:
                        # A line that was cut must stay longer than the limit.
                        yield line if len(line) > self._max_line else stripped
        except OSError as error:
            raise ConfigError(f"-i {self._path}: cannot be read ({error.strerror})") from None


class OutputFile:
    """A file of results, one for each request in the order of the input; locked against a second batch.

    Raises:
        ConfigError: it cannot be written, or another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"-o {path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ConfigError(f"-o {path}: another run-batch writes this file") from None

    def resume(self, requests: Iterator[Request]) -> int:
        """Return the number of results in the file, and take as many requests.

        A last line without an end, left by a process that was killed, is cut off.

        Raises:
            ConfigError: the file is not the beginning of the results of these requests.
        """
        complete, number = 0, 0
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            while (line := file.readline(_MAX_RESULT)).endswith(b"\n"):
                number += 1
                self._check(line, number, next(requests, None))
                complete += len(line)
        if len(line) == _MAX_RESULT:
            raise self._foreign(number + 1, "is too long")
        os.ftruncate(self._descriptor, complete)
        os.lseek(self._descriptor, complete, os.SEEK_SET)
        return number

    def append(self, line: bytes) -> None:
        """Write a line. Raises OSError."""
        left = memoryview(line)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def _check(self, line: bytes, number: int, request: Request | None) -> None:
        try:
            custom_id = read_result(line)
        except ValueError:
            raise self._foreign(number, "is not a result") from None
        if request is None:
            raise self._foreign(number, "is beyond the last request")
        if custom_id != request.custom_id:
            raise self._foreign(number, "is for another request")

    def _foreign(self, number: int, what: str) -> ConfigError:
        return ConfigError(
            f"-o {self._path}: line {number} {what}, so the file belongs to another input; name a new one"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
