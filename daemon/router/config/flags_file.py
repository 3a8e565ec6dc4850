"""File with flags for fd-router, read when it starts and at SIGHUP."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ....common.errors import ConfigError

_MAX_BYTES = 1 << 20
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class FlagsFile:
    words: tuple[str, ...]
    #: Fingerprint of the content.
    fingerprint: str


def fingerprint(content: bytes) -> str:
    """Return the hash that GET /health shows for the flags of a worker."""
    return hashlib.sha256(content).hexdigest()[:12]


def read_flags_file(path: Path) -> FlagsFile:
    """Read a flags file. Other users must not be able to write it: it names files to read and addresses.

    Raises:
        ConfigError: the file cannot be read, is writable by others, or is not a JSON array of strings.
    """
    what = f"--flags-file {path}"
    try:
        # O_NONBLOCK: do not block if the path is a FIFO.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check(what, os.fstat(descriptor))
            content = os.read(descriptor, _MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{what}: cannot be read ({error.strerror})") from None
    return FlagsFile(_words(what, content), fingerprint(content))


def _check(what: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{what}: must be a regular file")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{what}: belongs to user {found.st_uid}; it must belong to root or to the user of the router"
        )
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise ConfigError(
            f"{what}: others may write to it (mode {stat.S_IMODE(found.st_mode):04o}); chmod 600 it"
        )


def _words(what: str, content: bytes) -> tuple[str, ...]:
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{what}: is larger than {_MAX_BYTES >> 20} MiB")
    try:
        words = json.loads(content)
        is_list_of_words = isinstance(words, list) and all(isinstance(word, str) for word in words)
    except (ValueError, RecursionError):
        is_list_of_words = False
    if not is_list_of_words:
        raise ConfigError(f'{what}: must be a JSON array of words, e.g. ["--policy", "session"]')
    for word in words:
        if not _is_possible(word):
            raise ConfigError(f"{what}: {word[:40]!r} cannot be a command-line argument")
    return tuple(words)


def _is_possible(word: str) -> bool:
    """Return False for a NUL or a lone surrogate, which no argument of a process can have."""
    return "\0" not in word and not any("\ud800" <= character <= "\udfff" for character in word)
