"""The registry file: who was registered, so that a restarted router knows its replicas at once."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .board import Board, Status
from .registration import AllowedAddresses, Instance, RegistrationError, from_fields

logger = logging.getLogger(__name__)


class RegistryFile:
    """JSON in the form of the registrations themselves, secrets and all. Without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()

    def restore(self, board: Board, allowed: AllowedAddresses) -> None:
        """Seats what was saved; nobody has looked yet whether it is up.

        A broken file costs one line in the log: replicas register again within seconds.
        """
        for instance, is_draining in self._read():
            if instance.host in allowed:
                board.admit(instance, up=False)
                if is_draining and (seat := board.seat_of(instance.url)) is not None:
                    board.drain(seat)

    def save(self, board: Board) -> None:
        """Writes the board as it is now; readers see the old file or the new one, never a part."""
        if self._path is None:
            return
        try:
            with self._lock, _locked(self._path.parent):
                # Read under the lock: otherwise the older of two savers could write last.
                instances = [_entry(row.instance.registration(), row.draining) for row in _staying(board)]
                text = json.dumps({"instances": instances}, indent=2) + "\n"
                draft = self._path.with_name(self._path.name + ".new")
                draft.unlink(missing_ok=True)
                with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(text)
                os.replace(draft, self._path)
        except OSError as error:
            logger.error("registry file %s not written: %s", self._path, error)

    def _read(self) -> list[tuple[Instance, bool]]:
        if self._path is None or not self._path.exists():
            return []
        try:
            entries = json.loads(self._path.read_text(encoding="utf-8-sig"))["instances"]
            return [(from_fields(entry), entry.get("draining") is True) for entry in entries]
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            RegistrationError,
        ) as error:
            logger.warning("registry file %s ignored: %s: %s", self._path, type(error).__name__, error)
            return []

    def prepare(self) -> None:
        """Raises ConfigError if it could not be written later."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--registry-file {self._path}: {error.strerror}") from None
        if self._path.is_dir() or not os.access(self._path.parent, os.W_OK):
            raise ConfigError(
                f"--registry-file {self._path}: must be a file in a directory that can be written"
            )


def _staying(board: Board) -> list[Status]:
    """One that has left and is drained stays, for its flag's sake."""
    return [row for row in board.status() if not row.leaving or row.draining]


def _entry(registration: dict[str, Any], is_draining: bool) -> dict[str, Any]:
    return {**registration, "draining": True} if is_draining else registration


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Excludes other workers. It is the directory that is locked: the file is replaced each time."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
