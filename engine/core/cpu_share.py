"""Divides the CPUs of the machine among the replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config import EngineConfig

#: Environment that keeps Paddle, NumPy and BLAS single-threaded; the compiled operations have their own
#: threads.
SINGLE_THREADED: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class CpuShare:
    threads: int
    #: CPU of each thread; None: not pinned.
    pinned: tuple[int, ...] | None = None


def share_of(config: EngineConfig, cpus: Sequence[int]) -> CpuShare:
    """Divide `cpus`, which this process may use, by the number of replicas, unless `config.threads` is set.

    Threads are pinned only if requested and if each replica has its own CPUs: two replicas pinned to one CPU
    while another is idle would be slower than any migration.
    """
    threads = config.threads or max(1, len(cpus) // config.data_parallel_size)
    if not config.pin_threads or threads * config.data_parallel_size > len(cpus):
        return CpuShare(threads)
    first = threads * config.data_parallel_rank
    return CpuShare(threads, tuple(cpus[first : first + threads]))
