"""Philox 4x32-10 (Salmon et al., SC 2011): random numbers as a pure function of where they are used."""

from __future__ import annotations

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number, in [0, 1), that draws the token at `position` of a text.

    There is no generator state: a retried, preempted or moved request draws the same numbers again.
    `seed` counts modulo 2**64, so that negative seeds work too.
    """
    key = (seed & _WORD, (seed >> 32) & _WORD)
    first, second, _, _ = philox4x32((position & _WORD, choice & _WORD, 0, 0), key)
    # 53 random bits, which is what a float64 below 1 can hold.
    return ((first >> 5) * (1 << 26) + (second >> 6)) / (1 << 53)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds over four 32-bit words, as specified; checked against the authors' known answers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0 = (k0 + _KEY_STEPS[0]) & _WORD
        k1 = (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3
