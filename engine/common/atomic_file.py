"""Replacing a file atomically."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(file: Path, content: bytes, *, mode: int = 0o600, fsync: bool = False) -> None:
    """Replace `file` by `content`; a reader sees the old content or the new one, never a part.

    Callers serialise their writes to one file, because all writes use the same draft, `.NAME.new`. The next
    write therefore replaces the draft of a killed one.

    Args:
        mode: permissions of the new file, before the umask.
        fsync: also keep this promise if the machine loses power. Slow.

    Raises:
        OSError: the file cannot be written; it is unchanged then.
    """
    draft = file.with_name(f".{file.name}.new")
    # A leftover draft may have other permissions or be a link, so it is not written to.
    draft.unlink(missing_ok=True)
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            if fsync:
                os.fsync(stream.fileno())
        draft.replace(file)
    except OSError:
        # On a full disk the next try needs the space.
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    if fsync:
        _sync_directory(file.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
