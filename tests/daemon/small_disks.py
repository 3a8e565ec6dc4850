"""The daemon with each of its directories on a small file system, which tests fill up or remove."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fastdeploy.daemon.process import proc

from .conftest import LAUNCHER, Running, wait_until

_MOUNT = """for name in state run logs; do
    mkdir -p "$1/$name"
    mount -t tmpfs -o size=512k,nr_inodes=128 tmpfs "$1/$name" || exit
done"""


class SmallDisks(Running):
    """After `start`, `prefix` is the directory as seen from the daemon's own mount namespace."""

    def __init__(self, prefix: Path) -> None:
        super().__init__(prefix)
        self.real = prefix

    def start(self, *words: str) -> None:
        script = f'{_MOUNT}; shift; exec "$@"'
        self._launch(["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", str(self.real)])

    def start_another(self, beside: int) -> None:
        """Start a daemon in the mount namespace of process `beside`."""
        self._launch(["nsenter", "-m", "-t", str(beside)])

    def _launch(self, prefix: list[str]) -> None:
        command = [*prefix, sys.executable, str(LAUNCHER), str(self.config), str(self.real)]
        # Not a pipe: it could fill up, as no test reads the output while it runs.
        with (self.real / "output").open("a") as output:
            self.daemon = subprocess.Popen(command, stdout=output, stderr=output, text=True)
        self.prefix = Path(f"/proc/{self.daemon.pid}/root{self.real}")

    def left_over(self) -> list[proc.Marked]:
        return proc.marked(self.real / "run")

    def log(self) -> str:
        """Return the daemon's output; its log file may be on a disk that fails."""
        return (self.real / "output").read_text()

    def problems(self) -> list[str]:
        found: list[str] = self.status()["daemon"].get("problems", [])
        return found

    @contextlib.contextmanager
    def full(self, name: str) -> Iterator[None]:
        """Fill one of the three disks to the last byte."""
        with (self.prefix / name / "filler").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(4096))
        yield
        # `self.prefix` has changed if the daemon was restarted in the meantime.
        (self.prefix / name / "filler").unlink()

    @contextlib.contextmanager
    def without_inodes(self, name: str) -> Iterator[None]:
        """Use up the inodes of one of the three disks."""
        fillers: list[Path] = []

        def fill() -> None:
            with contextlib.suppress(OSError):
                while True:
                    file = self.prefix / name / f"filler{len(fillers)}"
                    file.touch()
                    fillers.append(file)

        def is_full() -> bool:
            # Repeat it: the daemon's own check may have held the last inode during the first attempt.
            fill()
            return any(f"{self.real / name}: No space left" in line for line in self.problems())

        wait_until(is_full, "the daemon finds no room")
        yield
        for file in fillers:
            file.unlink()

    @contextlib.contextmanager
    def remounted_read_only(self, *names: str) -> Iterator[None]:
        """Remount some of the three disks read-only, with their content."""
        for name in names:
            path = str(self.real / name)
            self._inside("mount", "--bind", path, path)
            self._inside("mount", "-o", "remount,ro,bind", path)
        yield
        for name in names:
            self._inside("umount", str(self.real / name))

    @contextlib.contextmanager
    def read_only(self, name: str) -> Iterator[None]:
        """Mount an empty read-only file system over one of the three directories."""
        self._inside("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(self.real / name))
        yield
        self._inside("umount", str(self.real / name))

    def _inside(self, *command: str) -> None:
        assert self.daemon is not None
        subprocess.run(["nsenter", "-m", "-t", str(self.daemon.pid), *command], check=True)


@cache
def why_not() -> str:
    """Return the reason why no file system can be mounted here, or ""."""
    tried = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    return tried.stderr.strip() if tried.returncode else ""


@contextlib.contextmanager
def small_disks(directory: Path) -> Iterator[SmallDisks]:
    if reason := why_not():
        pytest.skip(f"no file system can be mounted: {reason}")
    system = SmallDisks(directory)
    system.write()
    system.start_and_wait()
    yield system
    assert system.daemon is not None
    system.daemon.terminate()
    system.daemon.wait(timeout=20)
    left = system.left_over()
    for process in left:
        os.kill(process.pid, 9)
    assert left == []


def heals(system: Running) -> None:
    """Wait until no problem is reported and everything is READY."""
    wait_until(lambda: system.ready() and not system.status()["daemon"]["problems"], "everything is well")
