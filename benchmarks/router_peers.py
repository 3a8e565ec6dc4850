"""Other routers from PyPI in their own environment: `python -m benchmarks.router_peers`."""

from __future__ import annotations

from pathlib import Path

from . import environments

_PACKAGES = ("sglang-router==0.3.2", "vllm-router==0.1.17")


def installed(command: str) -> Path:
    """Return the path of `sglang-router` or `vllm-router`; install both in these versions if missing.

    Raises:
        NotInstalledError: pip failed; its output is on standard error.
    """
    return environments.installed("router-peers", _PACKAGES) / command


if __name__ == "__main__":
    print(installed("sglang-router"))
    print(installed("vllm-router"))
