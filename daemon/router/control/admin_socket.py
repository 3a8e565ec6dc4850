"""The unix socket for orders: bound at the start, and bound again when its path has been removed."""

from __future__ import annotations

import logging
import os
import socket
import stat
from pathlib import Path

logger = logging.getLogger(__name__)

_BACKLOG = 64


def bind(path: Path) -> socket.socket:
    """Return a socket that listens on `path`, and replaces an old file there. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        before = os.umask(0o117)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class AdminSocket:
    """The path of the admin socket: no error tells a listening socket that its path was removed."""

    def __init__(self, path: Path) -> None:
        """A socket that answers at `path` belongs to this program, which has just bound or inherited it."""
        self.path = path
        self._found = _identity(path) if _answers(path) else None
        self._directory_mode = stat.S_IMODE(path.parent.stat().st_mode) if path.parent.is_dir() else 0o700
        self._is_failing = False
        #: A socket of another program that has the path now.
        self._foreign: tuple[int, int] | None = None

    def bind_if_lost(self) -> socket.socket | None:
        """Return a new socket if the path no longer leads to the old one; None if it does, or on failure."""
        found = _identity(self.path)
        if found is not None and (found == self._found or self._belongs_to_another(found)):
            return None
        try:
            self.path.parent.mkdir(self._directory_mode, parents=True, exist_ok=True)
            listener = bind(self.path)
        except OSError as error:
            if not self._is_failing:
                logger.warning(
                    "admin socket %s is missing and cannot be made (%s); the router tries again every second",
                    *(self.path, error.strerror or error),
                )
            self._is_failing = True
            return None
        self._found, self._is_failing = _identity(self.path), False
        logger.warning("admin socket %s was missing and has been made again", self.path)
        return listener

    def _belongs_to_another(self, found: tuple[int, int]) -> bool:
        if not _answers(self.path):
            return False
        if found != self._foreign:
            logger.warning("another program now listens on admin socket %s; stop one of the two", self.path)
        self._foreign = found
        return True

    def remove(self) -> None:
        """Remove the path, unless it leads to another socket now."""
        if self._found is None or _identity(self.path) != self._found:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("admin socket %s cannot be removed: %s", self.path, error.strerror)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of the file at `path`; None if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


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
