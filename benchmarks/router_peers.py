"""Other routers from PyPI in their own environment: `python -m benchmarks.router_peers`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .rows import ROOT

_PACKAGES = ("sglang-router==0.3.2", "vllm-router==0.1.17")
_HOME = ROOT / ".cache" / "router-peers-venv"


class NotInstalledError(Exception):
    """A peer cannot be installed; the message is one line."""


def installed(command: str) -> Path:
    """Return the path of `sglang-router` or `vllm-router`; install both in these versions if missing.

    Raises:
        NotInstalledError: pip failed; its output is on standard error.
    """
    stamp = _HOME / "installed"
    if not stamp.exists() or stamp.read_text().split() != list(_PACKAGES):
        print(f"installing {' and '.join(_PACKAGES)} into {_HOME}", flush=True)
        pip = [str(_HOME / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        try:
            subprocess.run([sys.executable, "-m", "venv", str(_HOME)], check=True)
            # Wheels only: building would need a Rust compiler and half an hour.
            subprocess.run([*pip, "--only-binary", ":all:", *_PACKAGES], check=True)
        except subprocess.CalledProcessError as error:
            raise NotInstalledError(f"could not be installed (pip ended with {error.returncode})") from None
        stamp.write_text("\n".join(_PACKAGES) + "\n")
    return _HOME / "bin" / command


if __name__ == "__main__":
    print(installed("sglang-router"))
    print(installed("vllm-router"))
