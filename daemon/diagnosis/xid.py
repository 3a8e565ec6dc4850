"""Xid messages of NVIDIA's driver in the kernel's log. Without I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...common.foreign_text import printable

#: Seconds around an exit in which its Xid is expected; the kernel's own clock drifts.
BEFORE, AFTER = 300.0, 60.0
#: Maximum number of messages: one fault often causes several.
_MOST = 3
_MAX_TEXT = 300
_XID = re.compile(
    r"\bNVRM: (Xid \((?:PCI:)?([0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2})(?:\.[0-9a-fA-F])?[^)]*\): "
    r"([0-9]{1,6})\b.*)"
)
#: A replica's last words about its GPU, see cuda_library.py in engine/device.
_LOST_GPU = re.compile(r"\bGPU: .*\(PCI ([0-9a-fA-F:.]{1,32})\)")


@dataclass(frozen=True, slots=True)
class Xid:
    #: Unix time.
    at: float
    #: PCI address as the driver writes it, without the function: "0000:1b:00".
    gpu: str
    number: int
    #: The message from "Xid" on.
    text: str


def xid_of(at: float, message: str) -> Xid | None:
    """Return the Xid that a message of the kernel reports, or None."""
    found = _XID.search(message)
    return Xid(at, found[2].lower(), int(found[3]), printable(found[1], _MAX_TEXT)) if found else None


def around_exit(messages: Iterable[tuple[float, str]], exit_time: float, gpu: str) -> list[Xid]:
    """Return the last Xids of a GPU around an exit.

    Args:
        messages: time and text of messages of the kernel, in their order.
        gpu: its PCI address; empty for any GPU.
    """
    xids = [
        xid
        for at, message in messages
        if exit_time - BEFORE <= at <= exit_time + AFTER and (xid := xid_of(at, message))
    ]
    return [xid for xid in xids if not gpu or _place(xid.gpu) == _place(gpu)][-_MOST:]


def lost_gpu(output: str) -> str:
    """Return the PCI address of the GPU whose failure a replica has reported last, or ""."""
    found = _LOST_GPU.findall(output)
    return found[-1] if found else ""


def _place(address: str) -> list[str]:
    """Return domain, bus and device in a form that does not depend on leading zeros and the function."""
    return [part.lstrip("0").lower() for part in address.partition(".")[0].split(":")]
