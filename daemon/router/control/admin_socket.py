"""The admin socket, which the arbiter binds again when its path has been removed."""

from __future__ import annotations

import logging
import socket
import stat
from pathlib import Path

from ....common.unix_listener import SocketPath, identity, listen

logger = logging.getLogger(__name__)

#: Permissions of the path: owner and group.
_MODE = 0o660


def bind(path: Path) -> socket.socket:
    """Return a socket that listens on `path`, in place of an old one. Raises OSError."""
    listener, _ = listen(path, _MODE)
    return listener


class AdminSocket:
    """The admin socket's path, which the arbiter keeps bound."""

    def __init__(self, path: Path) -> None:
        """Take a socket that answers at `path` for this program's own, just bound or inherited."""
        directory = path.parent
        self.path = path
        self._socket = SocketPath(
            path,
            _MODE,
            directory_mode=stat.S_IMODE(directory.stat().st_mode) if directory.is_dir() else 0o700,
            is_bound=_answers(path),
        )
        self._is_failing = False
        #: Identity of another program's socket that has taken the path.
        self._foreign: tuple[int, int] | None = None

    def bind_if_lost(self) -> socket.socket | None:
        """Return a new socket if the path no longer leads to the old one; None if it does, or on failure."""
        if self._socket.is_bound() or self._is_foreign():
            return None
        try:
            listener = self._socket.bind()
        except OSError as error:
            if not self._is_failing:
                logger.warning(
                    "admin socket %s is missing and cannot be made (%s); the router tries again every second",
                    *(self.path, error.strerror or error),
                )
            self._is_failing = True
            return None
        self._is_failing = False
        logger.warning("admin socket %s was missing and has been made again", self.path)
        return listener

    def remove(self) -> None:
        """Remove the path, unless it leads to another socket by now."""
        try:
            self._socket.remove()
        except OSError as error:
            logger.warning("admin socket %s cannot be removed: %s", self.path, error.strerror)

    def _is_foreign(self) -> bool:
        """Return True if another program listens on the path, and log that once for each socket."""
        if not _answers(self.path):
            return False
        found = identity(self.path)
        if found != self._foreign:
            logger.warning("another program now listens on admin socket %s; stop one of the two", self.path)
        self._foreign = found
        return True


def _answers(path: Path) -> bool:
    """Return True if a program listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True
