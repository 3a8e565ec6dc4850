"""The sizes for which steps are captured as graphs. Pure.

A graph serves every batch up to its capacity, because the kernels read the real numbers from the step. A step
takes the smallest graph into which it fits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_DECODE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_LEAST_PROMPT = 16


def row_capacities(most: int) -> list[int]:
    """Return capacities of one token per sequence, or of rows of logits; the last one is `most`."""
    return [*(capacity for capacity in _DECODE if capacity < most), most]


def prompt_capacities(most: int) -> list[int]:
    """Return capacities of the tokens of a step with prompts; the last one is `most`."""
    capacities, capacity = [], _LEAST_PROMPT
    while capacity < most:
        capacities.append(capacity)
        capacity *= 2
    return [*capacities, most]


def fitting(capacities: Sequence[int], count: int) -> int:
    """Return the smallest capacity that is at least `count`."""
    return capacities[bisect_left(capacities, count)]
