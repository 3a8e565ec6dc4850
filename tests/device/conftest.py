"""Tests of libfd_cuda.so, collected on a Hopper GPU only; torch provides memory and references."""

from __future__ import annotations


def _why_not() -> str | None:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"{torch.cuda.get_device_name()} is not a Hopper GPU"
    return None


_REASON = _why_not()


if _REASON is not None:
    collect_ignore_glob = ["test_*.py"]
