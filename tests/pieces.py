"""Bytes cut into pieces, as a connection may deliver them."""

from __future__ import annotations

import itertools


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut `data` at each of `cuts`, each taken modulo the number of places."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]
