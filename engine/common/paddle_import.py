"""Import of Paddle without its side effects."""

from __future__ import annotations

import os
import sys
import tempfile


def import_paddle() -> None:
    """Import Paddle without creating its data set directory and without its signal handlers.

    Paddle creates the directory in the home directory or in /tmp and fails if it cannot, so a full or
    read-only disk would prevent the start of replicas. Its signal handlers print a C++ stack trace on
    SIGTERM. Call this before starting threads and before setting signal handlers.
    """
    if "paddle" in sys.modules:
        return
    make, temporary = os.makedirs, tempfile.tempdir
    os.makedirs = lambda *_, **__: None
    # Paddle's own search for a writable directory would fail as well.
    tempfile.tempdir = tempfile.tempdir or "/tmp"
    try:
        import paddle
    finally:
        os.makedirs, tempfile.tempdir = make, temporary
    paddle.disable_signal_handler()
