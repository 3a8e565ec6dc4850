"""Python environments of peers, because their packages must not be installed beside ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .rows import ROOT


class NotInstalledError(Exception):
    """A peer cannot be installed; the message is one line."""


def installed(name: str, packages: Sequence[str]) -> Path:
    """Return the folder of the programs of `.cache/NAME-venv`; install exactly these packages if missing.

    Raises:
        NotInstalledError: pip failed; its output is on standard error.
    """
    home = ROOT / ".cache" / f"{name}-venv"
    stamp = home / "installed"
    if not stamp.exists() or stamp.read_text().split() != list(packages):
        print(f"installing {' and '.join(packages)} into {home}", flush=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            # Wheels only: building could need a Rust compiler and half an hour.
            subprocess.run([*pip, "--only-binary", ":all:", *packages], check=True)
        except subprocess.CalledProcessError as error:
            raise NotInstalledError(f"could not be installed (pip ended with {error.returncode})") from None
        stamp.write_text("\n".join(packages) + "\n")
    return home / "bin"
