"""The registry file: who was registered, so that a restarted router knows its replicas at once."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

from ...errors import ConfigError
from .board import Board
from .registration import AllowedAddresses, Instance, RegistrationError, from_fields

logger = logging.getLogger(__name__)


class RegistryFile:
    """JSON in the form of the registrations themselves. Without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()

    def load(self, allowed: AllowedAddresses) -> list[Instance]:
        """What was saved. A broken file costs one line in the log: replicas register again within seconds."""
        if self._path is None or not self._path.exists():
            return []
        try:
            entries = json.loads(self._path.read_text(encoding="utf-8"))["instances"]
            instances = [from_fields(entry) for entry in entries]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RegistrationError) as error:
            logger.warning("registry file %s ignored: %s: %s", self._path, type(error).__name__, error)
            return []
        return [instance for instance in instances if instance.host in allowed]

    def save(self, board: Board) -> None:
        """Writes the board as it is now; readers see the old file or the new one, never a part."""
        if self._path is None:
            return
        # The board is read under the lock: otherwise the older of two savers could write last.
        with self._lock:
            instances = [row.instance.registration() for row in board.status()]
            draft = self._path.with_name(self._path.name + ".new")
            try:
                draft.write_text(json.dumps({"instances": instances}, indent=2) + "\n", encoding="utf-8")
                os.replace(draft, self._path)
            except OSError as error:
                logger.error("registry file %s not written: %s", self._path, error)

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
