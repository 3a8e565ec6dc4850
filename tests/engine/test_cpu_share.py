"""The CPUs that a replica gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.config import EngineConfig
from fastdeploy.core.cpu_share import share_of

CONFIG = EngineConfig(model=Path("m"), data_parallel_size=2, data_parallel_rank=1)


def test_replicas_divide_the_cpus() -> None:
    assert share_of(CONFIG, range(8)).threads == 4


def test_explicit_thread_count_is_used() -> None:
    assert share_of(replace(CONFIG, threads=3), range(8)).threads == 3


def test_more_replicas_than_cpus_get_one_thread_each_and_are_not_pinned() -> None:
    share = share_of(replace(CONFIG, data_parallel_size=8, pin_threads=True), range(2))
    assert (share.threads, share.pinned) == (1, None)


def test_threads_are_pinned_only_on_request() -> None:
    assert share_of(CONFIG, range(8)).pinned is None


@given(replicas=st.integers(1, 9), threads=st.integers(0, 4), cpus=st.sets(st.integers(0, 99), min_size=1))
def test_pinned_replicas_never_share_a_cpu(replicas: int, threads: int, cpus: set[int]) -> None:
    shares = [
        share_of(
            replace(
                CONFIG,
                threads=threads,
                pin_threads=True,
                data_parallel_size=replicas,
                data_parallel_rank=rank,
            ),
            sorted(cpus),
        )
        for rank in range(replicas)
    ]
    if any(share.pinned is None for share in shares):
        assert replicas * shares[0].threads > len(cpus)
        return
    used = [cpu for share in shares for cpu in share.pinned or ()]
    assert len(used) == len(set(used)) == replicas * shares[0].threads
    assert set(used) <= cpus
