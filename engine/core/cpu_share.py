"""Which part of the machine's CPUs a replica computes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config import EngineConfig

#: Paddle, NumPy and BLAS run nothing that is worth a second thread: the compiled operations have their own.
SINGLE_THREADED: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class CpuShare:
    threads: int
    #: The CPU of each thread; None leaves that to the kernel.
    pinned: tuple[int, ...] | None = None


def share_of(config: EngineConfig, cpus: Sequence[int]) -> CpuShare:
    """Divides `cpus`, those that this process may use, by the replicas; `config.threads` overrules.

    Threads are pinned only if they were asked to be and every replica has CPUs of its own: two replicas on
    one CPU with another one idle would be worse than any migration.
    """
    threads = config.threads or max(1, len(cpus) // config.data_parallel_size)
    if not config.pin_threads or threads * config.data_parallel_size > len(cpus):
        return CpuShare(threads)
    first = threads * config.data_parallel_rank
    return CpuShare(threads, tuple(cpus[first : first + threads]))
