"""Processes of the programs in /proc: find, signal and reap them.

A process is found by the marker that fd-run puts into its environment, not by its parent. Children survive
their parents, move to other sessions and are adopted by other processes, but keep their environment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config.launch import HASH, MARKER

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Marked:
    """A living process of one of the programs."""

    pid: int
    program: str
    hash: str


def become_subreaper() -> None:
    """Make orphaned descendants children of this process, so that it can wait for their end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def marked(run: Path, program: str | None = None) -> list[Marked]:
    """Return all living processes of one or all programs of the daemon with this run directory."""
    own = os.getpid()
    found = (_read(run, pid) for pid in _pids() if pid != own)
    return [process for process in found if process and program in (None, process.program)]


def supervisord_of(ini: Path) -> int | None:
    """Return the pid of a living supervisord with this configuration file, or None.

    Only processes of the same user count: another user could fake the command line.
    """
    words = [b"-c", os.fsencode(ini)]
    for pid in _pids():
        try:
            if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
                continue
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_supervisord = any(word.endswith(b"supervisord") for word in argv)
        if is_supervisord and any(argv[at : at + 2] == words for at in range(len(argv))):
            return pid
    return None


def running_hash(run: Path, pid: int) -> str | None:
    """Return the hash of the launch file of process `pid`; None until fd-run has executed the program."""
    process = _read(run, pid)
    return process.hash if process else None


def started_at(pid: int) -> float | None:
    """Return the start of a process, Unix time to 10 ms; None if there is no such process.

    supervisord reports whole seconds, and a process may die and be restarted within one.
    """
    try:
        since_boot = int(stat_fields(pid)[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def stat_fields(pid: int) -> list[bytes]:
    """Return the fields from the third on of /proc/PID/stat. Raises OSError if there is no such process."""
    # The second field, the name in parentheses, may contain anything.
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


def kill_marked(run: Path, program: str | None = None, sig: int = signal.SIGKILL) -> list[Marked]:
    """Send a signal to the processes and return them. Call it again until none is left."""
    processes = marked(run, program)
    for process in processes:
        signal_if_still(run, process, sig)
    return processes


def end_marked(run: Path, deadline: float) -> list[Marked]:
    """Kill all processes and wait for their end until a monotonic deadline. Return those that are left."""
    while left := kill_marked(run):
        reap()
        if time.monotonic() > deadline:
            return left
        time.sleep(0.02)
    return []


def signal_if_still(run: Path, process: Marked, sig: int) -> None:
    """Signal a process through a pidfd, unless another process has its pid by now."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if _read(run, process.pid) == process:
            signal.pidfd_send_signal(descriptor, sig)
    except (ProcessLookupError, PermissionError):
        return
    finally:
        os.close(descriptor)


def reap(keep: int | None = None) -> dict[int, int]:
    """Reap dead children and return pid -> wait status.

    Once the child `keep` is dead, its owner has to reap it; until then some others may stay, too.
    """
    ended: dict[int, int] = {}
    while True:
        try:
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return ended
        if info is None or info.si_pid == keep:
            return ended
        pid, status = os.waitpid(info.si_pid, 0)
        ended[pid] = status


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _read(run: Path, pid: int) -> Marked | None:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    prefix = f"{MARKER}={run}#".encode(errors="surrogateescape")
    program = hash_ = None
    for entry in environ.split(b"\0"):
        if entry.startswith(prefix):
            program = os.fsdecode(entry[len(prefix) :])
        elif entry.startswith(f"{HASH}=".encode()):
            hash_ = os.fsdecode(entry[len(HASH) + 1 :])
    return Marked(pid, program, hash_ or "") if program else None
