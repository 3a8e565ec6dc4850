"""A listening unix socket that can be bound again after its path was removed."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


class UnixListener:
    """Socket that listens on a path.

    Args:
        mode: permission bits of the path.
        listening: a socket that listens on the path already; by default a new one, which `bind` binds.
    """

    def __init__(
        self, path: Path, mode: int, *, backlog: int = 64, listening: socket.socket | None = None
    ) -> None:
        self.socket = listening or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self._path = path
        self._mode = mode
        self._backlog = backlog
        self._bound = _identity(path) if listening else None

    def is_bound(self) -> bool:
        """Return whether the path leads to this socket."""
        try:
            return self._bound is not None and _identity(self._path) == self._bound
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            # The path cannot be checked, which does not mean that it is gone.
            return True

    def bind(self) -> None:
        """Listen on the path, in place of whatever is there. The descriptor's number stays the same.

        An epoll object forgets the descriptor; it has to be registered again. Raises OSError.
        """
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        aside.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as fresh:
            fresh.setblocking(False)
            try:
                fresh.bind(str(aside))
                # No client connects before `listen`, so the mode is never too wide.
                # A directory with the setgid bit would have given it another group.
                os.chown(aside, -1, os.getegid())
                aside.chmod(self._mode)
                fresh.listen(self._backlog)
                bound = _identity(aside)
                aside.rename(self._path)
            except OSError:
                with contextlib.suppress(OSError):
                    aside.unlink()
                raise
            os.dup2(fresh.fileno(), self.socket.fileno(), inheritable=False)
        self._bound = bound

    def close(self) -> None:
        if self.is_bound():
            with contextlib.suppress(OSError):
                self._path.unlink()
        self.socket.close()


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
