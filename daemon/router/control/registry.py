"""Registry file: the registered replicas, so that a restarted router knows them at once."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ....common.atomic_file import write_atomically
from ....common.errors import ConfigError, is_disk_condition
from ....common.foreign_text import parse_json, printable
from ..addresses import AllowedAddresses
from ..board.board import Board, Status
from ..instance import Instance, RegistrationError
from .registration import from_fields

logger = logging.getLogger(__name__)


class RegistryFile:
    """JSON file with the registrations, secrets included. Without a path nothing is stored.

    `keep` writes the file again after it was removed or could not be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._is_failing = False

    def restore(self, board: Board, allowed: AllowedAddresses) -> None:
        """Admit the saved replicas, as down until they are checked.

        An invalid file is logged and ignored: replicas register again within seconds.
        """
        for instance, is_draining in self._read():
            if instance.host in allowed:
                board.admit(instance, up=False)
                if is_draining and (handle := board.handle_of(instance.url)) is not None:
                    board.drain(handle)

    def save(self, board: Board) -> None:
        """Write the board atomically, if possible."""
        # `keep` reports the failure and tries again.
        with suppress(OSError):
            self._write(board)

    def keep(self, board: Board) -> None:
        """Write the board unless the file is current. The leader calls this at regular intervals."""
        if self._path is None:
            return
        try:
            if not self._is_current(board):
                self._write(board)
        except OSError as error:
            if not self._is_failing:
                logger.warning(
                    "registry file %s cannot be written (%s): registrations and drains stay in memory until "
                    "it can be; a router that starts meanwhile waits for its replicas to register",
                    *(self._path, error.strerror or error),
                )
            self._is_failing = True
            return
        if self._is_failing:
            logger.warning("registry file %s is written again", self._path)
        self._is_failing = False

    def _is_current(self, board: Board) -> bool:
        assert self._path is not None, "asked for a file"
        try:
            return self._path.read_bytes() == _content(board)
        except (FileNotFoundError, PermissionError):
            # A file that cannot be read can be replaced if its directory allows it.
            return False

    def _write(self, board: Board) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, _locked(self._path.parent):
            # Read under the lock: otherwise the older of two savers could write last.
            write_atomically(self._path, _content(board))

    def _read(self) -> list[tuple[Instance, bool]]:
        if self._path is None:
            return []
        try:
            entries = parse_json(self._path.read_text(encoding="utf-8-sig"))["instances"]
            return [(from_fields(entry), entry.get("draining") is True) for entry in entries]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RegistrationError) as error:
            logger.warning(
                "registry file %s ignored: %s: %s", self._path, type(error).__name__, printable(error)
            )
            return []

    def prepare(self) -> None:
        """Raise ConfigError if the file could not be written later.

        A full or read-only disk does not prevent the start, because that may change.
        """
        if self._path is None:
            return
        probe = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            probe.unlink()
        except OSError as error:
            if not is_disk_condition(error):
                raise ConfigError(
                    f"--registry-file {self._path}: must be in a directory that can be written "
                    f"({error.strerror})"
                ) from None
        if self._path.is_dir():
            raise ConfigError(f"--registry-file {self._path}: must be a file; it is a directory")


def _content(board: Board) -> bytes:
    """Return the content of the file for the current board."""
    instances = [_entry(row.instance.registration(), row.draining) for row in _saved(board)]
    return (json.dumps({"instances": instances}, indent=2) + "\n").encode()


def _saved(board: Board) -> list[Status]:
    """Return the replicas to save. One that is leaving is saved if it is drained, to keep that flag."""
    return [row for row in board.status() if not row.leaving or row.draining]


def _entry(registration: dict[str, Any], is_draining: bool) -> dict[str, Any]:
    return {**registration, "draining": True} if is_draining else registration


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock the directory against other workers; the file itself is replaced each time."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
