"""Which experts' pages a rank keeps mapped: its own, and no others.

All weights are one file that every rank maps, so an expert can be computed anywhere at once. What counts is
which of its pages a process has in its tables: those of experts that came are faulted in before the next
step, all at once, and those of experts that went are given back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import paddle

from ..custom_ops.packed_matrix import HEADER_BYTES

_PAGE = 4096
_MADV_WILLNEED = 3
_MADV_DONTNEED = 4
_MADV_NOHUGEPAGE = 15
#: Linux 5.14; before it, the pages are read ahead and faulted in as they are needed.
_MADV_POPULATE_READ = 22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class ExpertPages:
    """The stacks of matrices of one layer's experts, as they are mapped."""

    stacks: tuple[paddle.Tensor, ...]
    num_experts: int

    def hold(self, experts: frozenset[int], taken: frozenset[int]) -> None:
        """Keeps the pages of `experts`, of which those in `taken` are new, and gives back all others."""
        for stack in self.stacks:
            size = (stack.size - HEADER_BYTES) // self.num_experts
            start = stack.data_ptr() + HEADER_BYTES
            # A huge page would bring many experts along.
            _libc.madvise(
                -(-start // _PAGE) * _PAGE, self.num_experts * size // _PAGE * _PAGE, _MADV_NOHUGEPAGE
            )
            for expert in taken:
                first = (start + expert * size) // _PAGE * _PAGE
                length = start + (expert + 1) * size - first
                if _libc.madvise(first, length, _MADV_POPULATE_READ) != 0:
                    _libc.madvise(first, length, _MADV_WILLNEED)
            # Not only what this rank has given away: the kernel maps pages around those that are asked for.
            for begin, end in _runs(set(range(self.num_experts)) - experts):
                # The pages at the ends are the neighbours' too.
                first = -(-(start + begin * size) // _PAGE) * _PAGE
                last = (start + end * size) // _PAGE * _PAGE
                if first < last:
                    _libc.madvise(first, last - first, _MADV_DONTNEED)


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """As ranges, each from its first number to behind its last."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
