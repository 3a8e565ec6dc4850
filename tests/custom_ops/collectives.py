"""Inputs and results of a group's collectives, shared by rank processes and their tests.

The ranks agree on nothing in advance. Whatever they need in common is drawn from the stamp of the step, which
they read from the group's memory. A step can therefore be checked with any members and after any restart.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from fastdeploy.expert_parallel.layout import GroupLayout
from fastdeploy.expert_parallel.memory import FILE, Memory, layout_of
from fastdeploy.expert_parallel.memory_file import group_directory

from .draws import bfloat16

#: Odd sizes, so that no dimension is a multiple of a tile or vector width.
HIDDEN, EXPERTS, LAYERS, K, MAX_TOKENS = 21, 7, 3, 3, 5


def layout(num_seats: int) -> GroupLayout:
    return GroupLayout(num_seats, LAYERS, EXPERTS, MAX_TOKENS, K, HIDDEN)


def mapped(name: str) -> Memory:
    """Map the memory of an existing group."""
    directory = group_directory(name)
    descriptor = os.open(directory / FILE, os.O_RDWR | os.O_CLOEXEC)
    return Memory(directory, descriptor, layout_of(descriptor, directory), patience=60.0)


class Plan(NamedTuple):
    """The parameters that the ranks of one step have in common."""

    wide: bool
    layers: tuple[int, ...]

    @classmethod
    def draw(cls, seed: int, stamp: int) -> Plan:
        random = np.random.default_rng([seed, stamp])
        return cls(
            bool(random.integers(2)), tuple(random.integers(LAYERS, size=random.integers(1, 3)).tolist())
        )


class Share(NamedTuple):
    """One rank's inputs of one collective: numbers that the tensor type holds exactly."""

    x: np.ndarray
    topk_ids: np.ndarray
    weights: np.ndarray

    @classmethod
    def draw(cls, seed: int, stamp: int, index: int, seat: int, tokens: int, wide: bool) -> Share:
        random = np.random.default_rng([seed, stamp, index, seat])
        x = random.standard_normal((tokens, HIDDEN)).astype(np.float32)
        # A token may pick an expert twice here: the router prevents that, not the collectives.
        topk_ids = random.integers(-1 if random.integers(2) else 0, EXPERTS, (tokens, K)).astype(np.int32)
        if not random.integers(8):
            topk_ids[:] = random.integers(EXPERTS)
        weights = random.standard_normal((tokens, K)).astype(np.float32)
        return cls(x if wide else bfloat16(x).astype(np.float32), topk_ids, weights)


def draw_tokens(seed: int, stamp: int, seat: int, number: int) -> int:
    """Draw the token count of a rank's step `number`, which follows the step with this stamp."""
    nobody_has_any = np.random.default_rng([seed, stamp, 1]).integers(8) == 0
    own = np.random.default_rng([seed, seat, number]).integers(-1, MAX_TOKENS + 1)
    return 0 if nobody_has_any else max(0, int(own))


def computed(rows: np.ndarray, offsets: np.ndarray, layer: int, wide: bool) -> np.ndarray:
    """Stand in for the experts: scale rows by a factor that differs per expert, with one rounding."""
    factors = np.repeat(np.arange(EXPERTS) + layer + 1, np.diff(offsets)).astype(np.float32)
    results = rows * factors[:, None]
    return results if wide else bfloat16(results).astype(np.float32)


class Seen(NamedTuple):
    """One collective as one rank saw it."""

    stamp: int
    number: int
    layer: int
    seat: int
    #: The members of the group as this rank knows them.
    members: tuple[int, ...]
    wide: bool
    dispatch_targets: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    source_token_index: np.ndarray
    sums: np.ndarray
