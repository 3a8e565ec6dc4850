"""The reference's generator. test_sample.py compares the compiled one with it."""

from __future__ import annotations

import numpy as np
import pytest

from fastdeploy.custom_ops.reference import philox4x32, uniform


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_authors_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox4x32(counter, key) == words


def test_seed_choice_and_position_each_change_the_number() -> None:
    base = uniform(1, 0, 0)
    assert base == uniform(1, 0, 0)
    assert len({base, uniform(2, 0, 0), uniform(1, 1, 0), uniform(1, 0, 1), uniform(1 + 2**32, 0, 0)}) == 5


def test_numbers_along_a_text_are_uniform() -> None:
    numbers = np.array([uniform(1234, 0, position) for position in range(20_000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    # Chi-square with 19 degrees of freedom; 43.8 is its 0.999 quantile, and the numbers are fixed.
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
