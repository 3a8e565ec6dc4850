"""Resident pages of experts: a rank keeps those of its own experts in memory, and no others.

Every rank maps the whole weight file, so any rank can compute any expert at once. When experts move, the
pages of new ones are faulted in before the next step, and the pages of others are released.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..custom_ops.packed_matrix import HEADER_BYTES

if TYPE_CHECKING:
    import paddle

_PAGE = 4096
_MADV_WILLNEED = 3
_MADV_DONTNEED = 4
_MADV_NOHUGEPAGE = 15
#: Linux 5.14; older kernels read ahead and fault in pages on demand.
_MADV_POPULATE_READ = 22

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class ExpertPages:
    """Mapped weight matrices of one layer; each tensor has those of all experts, one after another."""

    stacks: tuple[paddle.Tensor, ...]
    num_experts: int

    def hold(self, experts: frozenset[int], added: frozenset[int]) -> None:
        """Keep the pages of `experts` and release all others.

        Args:
            added: experts whose pages are not resident yet.
        """
        for stack in self.stacks:
            size = (stack.size - HEADER_BYTES) // self.num_experts
            start = stack.data_ptr() + HEADER_BYTES
            # A huge page would contain many experts.
            _libc.madvise(
                -(-start // _PAGE) * _PAGE, self.num_experts * size // _PAGE * _PAGE, _MADV_NOHUGEPAGE
            )
            for expert in added:
                first = (start + expert * size) // _PAGE * _PAGE
                length = start + (expert + 1) * size - first
                if _libc.madvise(first, length, _MADV_POPULATE_READ) != 0:
                    _libc.madvise(first, length, _MADV_WILLNEED)
            # All other experts, not only removed ones: the kernel also maps pages around a fault.
            for begin, end in _runs(set(range(self.num_experts)) - experts):
                # Pages at the ends are shared with the neighbours.
                first = -(-(start + begin * size) // _PAGE) * _PAGE
                last = (start + end * size) // _PAGE * _PAGE
                if first < last:
                    _libc.madvise(first, last - first, _MADV_DONTNEED)


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return half-open ranges of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
