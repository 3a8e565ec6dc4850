"""Seeds of requests that have none."""

from __future__ import annotations

import hashlib
import itertools
import secrets


class Seeds:
    """An endless supply of 63-bit seeds: random, or the same sequence for the same base. Thread-safe."""

    def __init__(self, base: int | None = None) -> None:
        self._base = base
        self._numbers = itertools.count()

    def draw(self) -> int:
        return self.at(next(self._numbers))

    def at(self, number: int) -> int:
        """Return the seed with this number, counted from 0."""
        if self._base is None:
            return secrets.randbits(63)
        text = f"{self._base} {number}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
