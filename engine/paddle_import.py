"""Importing Paddle where the home directory or /tmp cannot be written."""

from __future__ import annotations

import os
import tempfile


def import_paddle() -> None:
    """Import Paddle without the directory for data sets that it makes in the home directory or in /tmp.

    Paddle fails where it cannot make the directory: a full or read-only disk would keep replicas from
    starting. Nothing here uses it. To be called before other threads run.
    """
    make, temporary = os.makedirs, tempfile.tempdir
    os.makedirs = lambda *_, **__: None
    # Otherwise the search for a directory that can be written fails in the same way.
    tempfile.tempdir = tempfile.tempdir or "/tmp"
    try:
        import paddle  # noqa: F401
    finally:
        os.makedirs, tempfile.tempdir = make, temporary
