"""System commands that some tests need. Without the command a test is skipped, and names its package."""

from __future__ import annotations

import shutil

import pytest

_PACKAGES = {
    "chromedriver": "chromium-driver",
    "mandoc": "mandoc",
    "nginx": "nginx-light",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "redis-server": "redis-server",
    "systemd-analyze": "systemd",
}


def needs(command: str) -> pytest.MarkDecorator:
    """Mark a test that runs `command`."""
    package = _PACKAGES[command]
    return pytest.mark.skipif(
        shutil.which(command) is None, reason=f"{command} is not installed: apt-get install {package}"
    )
