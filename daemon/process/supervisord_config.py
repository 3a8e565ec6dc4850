"""Files that supervisord and fd-run read: supervisord.conf, launch files and flags files.

Each program is a group of its own, because supervisord can replace a group while the others run. Programs
have `autorestart=false`: only the daemon restarts them. With `startsecs=0`, supervisord reports every end of
a process as EXITED with its exit code; otherwise an early end would be BACKOFF or FATAL, without the code.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...common.atomic_file import write_atomically
from ...common.errors import ConfigError
from ..config.loader import UNFIT_IN_INI
from ..config.programs import Program


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of the files of one supervisord."""

    run: Path
    logs: Path

    @property
    def socket(self) -> Path:
        return self.run / "supervisor.sock"

    @property
    def ini(self) -> Path:
        return self.run / "supervisord.conf"

    @property
    def launch(self) -> Path:
        return self.run / "launch"

    @property
    def log(self) -> Path:
        return self.logs / "supervisord.log"

    def output(self, name: str) -> Path:
        """Return the file with stdout and stderr of a program."""
        return self.logs / name / "output.log"


def render(layout: Layout, programs: Iterable[Program]) -> str:
    """Return the text of supervisord.conf.

    It contains only names chosen by fd-dp, and paths. Raises ConfigError for a path that it cannot contain.
    """
    lines = [
        "; Written by fd-dp. Edit dp.toml instead, then: fdctl reload",
        "[supervisord]",
        "nodaemon=true",
        "silent=true",
        f"logfile={layout.log}",
        "logfile_maxbytes=10MB",
        "logfile_backups=3",
        f"pidfile={layout.run / 'supervisord.pid'}",
        f"childlogdir={layout.run}",
        "nocleanup=true",
        "[unix_http_server]",
        f"file={layout.socket}",
        "chmod=0600",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
        "[rpcinterface:fd]",
        "supervisor.rpcinterface_factory=fastdeploy.daemon.process.exit_interface:make_ends_interface",
    ]
    fd_run = str(Path(sys.executable).with_name("fd-run"))
    if found := UNFIT_IN_INI.search(fd_run):
        raise ConfigError(
            f"{fd_run}: supervisord cannot run it from a path with {found[0]!r}; install elsewhere"
        )
    for program in programs:
        lines += [
            f"[program:{program.name}]",
            f"command={shlex.join([fd_run, program.name, program.hash, str(layout.launch)])}",
            "autostart=false",
            "autorestart=false",
            "startsecs=0",
            "startretries=0",
            "stopasgroup=true",
            "killasgroup=true",
            f"stopwaitsecs={max(1, round(program.stop_timeout))}",
            "redirect_stderr=true",
            f"stdout_logfile={layout.output(program.name)}",
            "stdout_logfile_maxbytes=20MB",
            "stdout_logfile_backups=3",
        ]
    return "\n".join(lines) + "\n"


def write_files(layout: Layout, programs: Iterable[Program]) -> None:
    """Write supervisord.conf, launch files and flags files, and make the log directories. Raises OSError.

    An unchanged file is not written again, so that programs can start on a full disk.
    """
    programs = list(programs)
    # Separate calls: `mode` does not apply to parents.
    layout.run.mkdir(mode=0o700, parents=True, exist_ok=True)
    layout.launch.mkdir(mode=0o700, exist_ok=True)
    make_log_directories(layout, programs)
    for file, text in _contents(layout, programs):
        content = text.encode("utf-8", "surrogateescape")
        if not _has_content(file, content):
            write_atomically(file, content)


def make_log_directories(layout: Layout, programs: Iterable[Program]) -> None:
    """Make the log directories of the programs. Errors are ignored: upkeep.py reports them."""
    for program in programs:
        with contextlib.suppress(OSError):
            layout.output(program.name).parent.mkdir(parents=True, exist_ok=True)


def files_exist(layout: Layout, programs: Iterable[Program]) -> bool:
    """Return whether every file of `write_files` can be read, whatever its content."""
    return all(os.access(file, os.R_OK) for file, _ in _contents(layout, list(programs)))


def remove_stale_launch_files(layout: Layout, programs: Iterable[Program]) -> None:
    keep = {program.launch_name for program in programs}
    for file in layout.launch.glob("*.json"):
        if file.name not in keep:
            file.unlink(missing_ok=True)


def _contents(layout: Layout, programs: list[Program]) -> Iterator[tuple[Path, str]]:
    for program in programs:
        yield layout.launch / program.launch_name, program.launch_text(layout.run)
        if program.flags_file:
            yield Path(program.flags_file), program.flags_text
    yield layout.ini, render(layout, programs)


def _has_content(file: Path, content: bytes) -> bool:
    try:
        return file.read_bytes() == content
    except OSError:
        return False
