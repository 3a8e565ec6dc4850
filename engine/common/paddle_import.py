"""The import of Paddle without its side effects."""

from __future__ import annotations

import os
import sys
import tempfile


def import_paddle() -> None:
    """Import Paddle without its directory for data sets and without its signal handlers.

    Paddle makes the directory in the home directory or in /tmp, and fails where it cannot: a full or
    read-only disk would keep replicas from starting. Its handlers print a stack trace of C++ at SIGTERM. Call
    this before other threads run and before signal handlers are set.
    """
    if "paddle" in sys.modules:
        return
    make, temporary = os.makedirs, tempfile.tempdir
    os.makedirs = lambda *_, **__: None
    # Otherwise the search for a writable directory fails in the same way.
    tempfile.tempdir = tempfile.tempdir or "/tmp"
    try:
        import paddle
    finally:
        os.makedirs, tempfile.tempdir = make, temporary
    paddle.disable_signal_handler()
