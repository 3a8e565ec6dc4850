"""Listening unix sockets, with a check that their path still leads to them.

Other programs may remove or replace the path, and the kernel does not report that to the socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

Identity = tuple[int, int]


def listen(
    path: Path, mode: int, *, group: int | None = None, backlog: int = 64
) -> tuple[socket.socket, Identity | None]:
    """Return a new socket that listens on `path`, in place of whatever is there, and the path's identity.

    Args:
        mode: permission bits of the path.
        group: its group; by default the group that new files get in that directory.

    Raises:
        OSError: the socket cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        bound = identity(path)
        # No client can connect before `listen`, so the permissions are never too wide.
        if group is not None:
            os.chown(path, -1, group)
        path.chmod(mode)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener, bound


class SocketPath:
    """Path of a listening socket.

    Args:
        mode, group, backlog: see `listen`.
        directory_mode: permission bits of its directory, if that has to be created.
        is_bound: True if the caller already has a socket that listens there.
    """

    def __init__(
        self,
        path: Path,
        mode: int,
        *,
        group: int | None = None,
        backlog: int = 64,
        directory_mode: int = 0o700,
        is_bound: bool = False,
    ) -> None:
        self.path = path
        self._mode = mode
        self._group = group
        self._backlog = backlog
        self._directory_mode = directory_mode
        self._bound = identity(path) if is_bound else None

    def is_bound(self) -> bool:
        """Return True if the path leads to the socket of the last `bind`."""
        try:
            return self._bound is not None and identity(self.path) == self._bound
        except OSError:
            # The path cannot be checked, which does not mean that it is gone.
            return True

    def bind(self) -> socket.socket:
        """Return a new socket that listens on the path; create a missing directory. Raises OSError."""
        self.path.parent.mkdir(self._directory_mode, parents=True, exist_ok=True)
        listener, self._bound = listen(self.path, self._mode, group=self._group, backlog=self._backlog)
        return listener

    def remove(self) -> None:
        """Remove the path if it still leads to the socket of the last `bind`. Raises OSError."""
        if self.is_bound():
            self.path.unlink(missing_ok=True)


class UnixListener:
    """Socket that keeps its descriptor's number when it is bound again.

    Args:
        listening: a socket that already listens on the path; None: a new one, which `bind` binds.
    """

    def __init__(self, path: SocketPath, listening: socket.socket | None = None) -> None:
        self.socket = listening or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self._path = path

    def is_bound(self) -> bool:
        return self._path.is_bound()

    def bind(self) -> None:
        """Listen on the path, in place of whatever is there. Raises OSError.

        Register the descriptor again with epoll afterwards: the kernel has removed it.
        """
        with self._path.bind() as fresh:
            fresh.setblocking(False)
            os.dup2(fresh.fileno(), self.socket.fileno(), inheritable=False)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._path.remove()
        self.socket.close()


def identity(path: Path) -> Identity | None:
    """Return device and inode of the file at `path`; None if there is none. Raises OSError."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino
