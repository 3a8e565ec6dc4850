"""API keys: where they are read from, which keys are valid, and how a request's key is compared with them.

A key has printable ASCII characters only. HTTP libraries disagree on how to encode others in a header, so one
server would accept a key that another refuses. Such a key is refused where it is read. Keys come from files
and environment variables, because command lines are readable by all users.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import ConfigError
from .text_files import read_text

#: "credential:NAME" in place of a path is the credential NAME that systemd passes (LoadCredential=).
CREDENTIAL = "credential:"


class ApiKeys:
    """Set of valid keys. An empty set allows every request."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._keys = tuple(key.encode("ascii") for key in keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ApiKeys) and self._keys == other._keys

    def __hash__(self) -> int:
        return hash(self._keys)

    def allow(self, authorization: str) -> bool:
        """Return True if the value of an Authorization header is "Bearer KEY" with one of the keys.

        How long this takes does not reveal the keys.
        """
        if not self._keys:
            return True
        scheme, _, token = authorization.partition(" ")
        given = token.strip().encode("latin-1", "replace")
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(given, key)
        return found and scheme.lower() == "bearer"

    @classmethod
    def read(cls, flag: str, file: Path | None, variable: str) -> ApiKeys:
        """Return the keys in an environment variable and in the file that `flag` names.

        Raises:
            ConfigError: a key is invalid, or a source is given but has no key (it would disable the check).
        """
        keys = keys_in_variable(variable, os.environ)
        if file is not None:
            keys += keys_in(flag, file)
        return cls(keys)


def keys_in(flag: str, file: Path) -> list[str]:
    """Return the keys in `file`, one per line. Empty lines and lines that begin with # are skipped.

    Args:
        flag: the flag that `file` was given with, for errors.
        file: a path, or "credential:NAME".

    Raises:
        ConfigError: the file cannot be read, a key is invalid, or there is none (it would disable the check).
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
    """Return the comma-separated keys in an environment variable; none if it is unset or empty.

    Raises:
        ConfigError: a key is invalid, or the variable has only commas and spaces.
    """
    text = environment.get(name, "")
    keys = keys_of(name, text)
    if text and not keys:
        raise ConfigError(f"{name} is set but has no key in it; unset it to allow requests without a key")
    return keys


def keys_of(what: str, text: str) -> list[str]:
    """Return the keys in a comma-separated list. Raises ConfigError; `what` names the source in it."""
    return [_checked(f"{what}: key {number}", key) for number, key in enumerate(_split(text), start=1)]


def _split(text: str) -> Iterable[str]:
    return (key.strip() for key in text.split(",") if key.strip())


def _checked(what: str, key: str) -> str:
    if not (key.isascii() and key.isprintable()):
        # The message is logged, so it does not show the key.
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
            f"{flag} {file}: systemd passed no such credential; set LoadCredential={name}:FILE in the unit"
        )
    return Path(directory) / name
