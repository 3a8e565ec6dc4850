"""Adoption of the programs that a previous daemon started."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ...common.foreign_text import parse_json
from ..config.programs import Program
from ..process import proc, supervisor_client
from ..process.supervisor_client import Process, Supervisor, SupervisorError

log = logging.getLogger("fd-dp")

#: Seconds. A process started just before the previous daemon died may still execute fd-run.
_LAUNCH_TIMEOUT = 2.0
_END_TIMEOUT = 10.0


def running_programs(client: Supervisor, wanted: Iterable[Program]) -> dict[str, tuple[Process, Program]]:
    """Return the processes that supervisord runs, each with the configuration with which it was started.

    The environment of a process names its launch file. A process whose launch file is gone is killed, because
    its configuration is unknown. Flags are those in the flags file, which may have changed since the start.

    Raises SupervisorError.
    """
    known = {(program.name, program.hash): program for program in wanted}
    found = {}
    for process in client.processes().values():
        if process.state in supervisor_client.DOWN:
            continue
        hash_ = _hash_of(client, process)
        program = known.get((process.name, hash_)) or _read(client, f"{process.name}-{hash_}.json")
        if program is not None and program.flags_file:
            found[process.name] = process, replace(program, flags=_flags_of(program))
        elif program is not None:
            found[process.name] = process, program
        else:
            log.warning(
                "%s: pid %d runs with an unknown configuration; killing it", process.name, process.pid
            )
            _end(client, process)
    return found


def _flags_of(program: Program) -> tuple[str, ...]:
    """Return the flags in its flags file."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return tuple(map(str, parse_json(Path(program.flags_file).read_bytes())))
    return program.flags


def _hash_of(client: Supervisor, process: Process) -> str:
    deadline = time.monotonic() + _LAUNCH_TIMEOUT
    while True:
        hash_ = proc.running_hash(client.layout.run, process.pid)
        if hash_ is not None or time.monotonic() > deadline:
            return hash_ or ""
        time.sleep(0.02)


def _read(client: Supervisor, launch_name: str) -> Program | None:
    with contextlib.suppress(OSError, ValueError):
        return Program.from_launch_text((client.layout.launch / launch_name).read_text(encoding="utf-8"))
    return None


def _end(client: Supervisor, process: Process) -> None:
    deadline = time.monotonic() + _END_TIMEOUT
    while time.monotonic() < deadline:
        proc.kill_marked(client.layout.run, process.name)
        client.stop(process.name)
        if client.processes()[process.name].state in supervisor_client.DOWN:
            return
        time.sleep(0.05)
    raise SupervisorError(f"{process.name}: pid {process.pid} does not end; kill it manually")
