"""The API keys that clients of /v1 must show, if any are set."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from ....common.key_files import keys_in, keys_in_variable


class ApiKeys:
    """A set of keys; an empty one lets everybody in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def allow(self, authorization: str) -> bool:
        """Whether an Authorization header shows one of the keys; the time it takes gives nothing away."""
        if not self._keys:
            return True
        scheme, _, token = authorization.partition(" ")
        shown = token.strip().encode("latin-1", "replace")
        found = False
        for key in self._keys:
            found |= hmac.compare_digest(shown, key)
        return found and scheme.lower() == "bearer"


def read_keys(flag: str, file: Path | None, variable: str) -> ApiKeys:
    """Read keys from the file of that flag (one a line, # begins a comment) and from a variable (by commas).

    `file` may be "credential:NAME".

    Raises:
        ConfigError: a key is malformed, or a source exists and holds no key: an empty file must not let
            all clients in.
    """
    keys = keys_in_variable(variable, os.environ)
    if file is not None:
        keys += keys_in(flag, file)
    return ApiKeys(keys)
