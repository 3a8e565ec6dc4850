"""supervisord that survives a full disk, a missing log directory and the removal of its socket.

fd-dp or systemd runs it as ``python -m fastdeploy.daemon.fd_supervisord -n -c FILE``. All programs
are its children and would end with it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

from supervisor import datatypes, loggers, options, supervisord
from supervisor.medusa import asyncore_25 as asyncore
from supervisor.states import SupervisorStates

from ..common.unix_listener import SocketPath, UnixListener
from .process.output_files import OutputFile

#: Maximum number of bytes written; the rest is dropped, because fd-dp keeps the file in memory.
_MAX_STDERR = 1 << 16
_SOCKET_MODE = 0o600


class Options(options.ServerOptions):
    """Options that record how each program ended."""

    def __init__(self) -> None:
        super().__init__()
        #: Program name -> "exit status 3", "terminated by SIGKILL".
        self.ends: dict[str, str] = {}

    def waitpid(self) -> tuple[int | None, int | None]:
        pid, status = super().waitpid()
        process = self.pidhistory.get(pid)
        if process is not None:
            self.ends[process.config.name] = options.decode_wait_status(status)[1]
        return pid, status


class Supervisor(supervisord.Supervisor):
    """supervisord that binds its socket again when the path is gone."""

    def runforever(self) -> None:
        self._listeners = [
            UnixListener(SocketPath(Path(config["file"]), _SOCKET_MODE, is_bound=True), server.socket)
            for config, server in self.options.httpservers
        ]
        self._problem = ""
        super().runforever()

    def tick(self, now: float | None = None) -> None:
        """Check the sockets. supervisor calls this at least once a second."""
        super().tick(now)
        for listener in self._listeners:
            if not listener.is_bound():
                self._bind_again(listener)

    def _bind_again(self, listener: UnixListener) -> None:
        try:
            listener.bind()
        except OSError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                self.options.logger.error(f"the socket was removed and cannot be bound again: {error}")
        else:
            self._problem = ""
            self.options.logger.warn("the socket was removed; bound it again")


class _Stderr(io.TextIOBase):
    """Output stream that drops what cannot be written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._left = _MAX_STDERR

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "replace")[: self._left]
        self._left -= len(data)
        try:
            os.write(self._descriptor, data)
        except OSError:
            return len(text)
        return len(text)


def main() -> None:
    sys.stdout = sys.stderr = _Stderr(2)
    # supervisor exits if there is no directory for temporary files, although it needs none here.
    tempfile.tempdir = "/"
    # supervisor has no settings for the class of its log files and for missing directories.
    loggers.RotatingFileHandler = OutputFile
    for module in (datatypes, options):
        module.existing_dirpath = module.existing_directory = os.path.expanduser
    first, running = True, True
    while running:
        chosen = Options()
        chosen.realize(None, doc=__doc__)
        chosen.first = first
        chosen.test = False
        with contextlib.suppress(asyncore.ExitNow):
            Supervisor(chosen).main()
        chosen.close_httpservers()
        chosen.close_logger()
        # SIGHUP restarts it.
        first, running = False, chosen.mood >= SupervisorStates.RESTARTING


if __name__ == "__main__":
    main()
