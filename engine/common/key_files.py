"""API keys from files and environment variables. Command lines are readable by all users.

A key has printable ASCII characters only. HTTP libraries disagree on how to encode others in a header, so one
server would accept a key that another refuses. Such a key is refused where it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import ConfigError
from .text_files import read_text

#: In place of a file's path: what follows is the name of a credential, as systemd's LoadCredential= gives it.
CREDENTIAL = "credential:"


def keys_in(flag: str, file: Path) -> list[str]:
    """The keys in the file of that flag, one a line; # begins a comment. `file` may be "credential:NAME".

    Raises:
        ConfigError: it cannot be read or holds no key. An empty file must not open the door.
    """
    lines = enumerate(read_text(_path(flag, file), f"{flag} {file}").split("\n"), start=1)
    keys = [
        _checked(f"{flag} {file}: the key in line {number}", line.strip())
        for number, line in lines
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not keys:
        raise ConfigError(f"{flag} {file}: has no key in it; write one key a line")
    return keys


def keys_in_variable(name: str, environment: Mapping[str, str]) -> list[str]:
    """Return the keys in an environment variable, separated by commas; none if it is not set or empty.

    Raises:
        ConfigError: a key is invalid, or the variable is set without a key, which must not disable the check.
    """
    text = environment.get(name, "")
    keys = keys_of(name, text)
    if text and not keys:
        raise ConfigError(f"{name} is set and has no key in it; unset it to let everybody in")
    return keys


def keys_of(what: str, text: str) -> list[str]:
    """Return the keys in a list with commas. Raises ConfigError, in which `what` names the source."""
    return [_checked(f"{what}: key {number}", key) for number, key in enumerate(_split(text), start=1)]


def _split(text: str) -> Iterable[str]:
    return (key.strip() for key in text.split(",") if key.strip())


def _checked(what: str, key: str) -> str:
    if not (key.isascii() and key.isprintable()):
        # Without the key: the line goes to a log.
        raise ConfigError(f"{what} has a character that is not printable ASCII; use letters and digits")
    return key


def _path(flag: str, file: Path) -> Path:
    name = str(file)
    if not name.startswith(CREDENTIAL):
        return file
    name = name.removeprefix(CREDENTIAL)
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory is None or not (Path(directory) / name).is_file():
        raise ConfigError(
            f"{flag} {file}: systemd has given no such credential; set LoadCredential={name}:FILE in the unit"
        )
    return Path(directory) / name
