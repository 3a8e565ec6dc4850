"""A disk that can be full, read-only or out of inodes: a tmpfs in its own mount namespace."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

#: Drops root's privileges, so that a directory of mode 0500 is not writable.
UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


class SmallDisk:
    """A tmpfs at `directory` for programs started with `prefix`; other programs find it below `path`."""

    def __init__(self, directory: Path, size: str = "256k", inodes: int = 64) -> None:
        for tool in ("unshare", "nsenter", "mount"):
            if shutil.which(tool) is None:
                pytest.skip(f"no file system can be mounted here: there is no {tool}")
        directory.mkdir(exist_ok=True)
        mount = (
            f'mount -t tmpfs -o size={size},nr_inodes={inodes} tmpfs "$0" && echo mounted && exec sleep 1000'
        )
        self._holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", mount, str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != "mounted\n":
            pytest.skip(f"no file system can be mounted here: {self._holder.stderr.read().strip()}")
        self._directory = directory
        self.prefix = ["nsenter", "-t", str(self._holder.pid), "-m"]
        self.path = Path(f"/proc/{self._holder.pid}/root{directory}")

    def fill(self) -> None:
        """Leave no room for another byte."""
        with (self.path / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4096):
                pass

    def use_up_inodes(self) -> None:
        """Leave no room for another file."""
        with contextlib.suppress(OSError):
            for number in range(1_000_000):
                (self.path / f"filler{number}").touch()

    def make_room(self) -> None:
        for file in self.path.glob("filler*"):
            file.unlink()

    def make_read_only(self) -> None:
        """Mount it read-only from above: a remount fails while files are open for writing."""
        self._run("mount", "--bind", str(self._directory), str(self._directory))
        self._run("mount", "-o", "remount,ro,bind", str(self._directory))

    def make_writable(self) -> None:
        self._run("umount", str(self._directory))

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()

    def _run(self, *command: str) -> None:
        subprocess.run([*self.prefix, *command], check=True, timeout=20)


def unprivileged() -> Sequence[str]:
    """Return a command prefix that makes permission bits apply, even for root."""
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("permissions do not hold for root, and there is no setpriv to take its privileges")
    return UNPRIVILEGED if os.geteuid() == 0 else ()
