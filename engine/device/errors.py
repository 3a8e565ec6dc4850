"""Errors of devices."""

from __future__ import annotations

from ..common.errors import FastDeployError


class DeviceBroken(FastDeployError):
    """The device failed and computes no more in this process; the process must end."""


class OutOfDeviceMemory(FastDeployError):
    """The memory of the device does not suffice. The message says what was wanted and what is free."""
