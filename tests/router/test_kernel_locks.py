"""Locks shared by processes and threads, which the kernel releases when their holder ends."""

import mmap
import os
import threading
import time
from collections.abc import Iterator

import pytest

from fastdeploy.daemon.router.board.locks import KernelLocks

from .forked import Forked


@pytest.fixture
def descriptor() -> Iterator[int]:
    descriptor = os.memfd_create("locks")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    yield descriptor
    os.close(descriptor)


def nothing() -> None:
    pass


def test_threads_of_several_processes_exclude_each_other(descriptor: int) -> None:
    locks = KernelLocks(descriptor, nothing)
    count = memoryview(mmap.mmap(descriptor, mmap.PAGESIZE)).cast("q")

    def add() -> None:
        for _ in range(200):
            with locks:
                seen = count[0]
                time.sleep(0)
                count[0] = seen + 1

    def work(child: Forked) -> None:
        threads = [threading.Thread(target=add) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    children = [Forked(work) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert count[0] == 3 * 3 * 200
    locks.close()


def test_a_liveness_lock_shows_whether_its_holder_lives(descriptor: int) -> None:
    locks = KernelLocks(descriptor, nothing)

    def work(child: Forked) -> None:
        child.send([locks.take_liveness(3), locks.take_liveness(3), locks.is_held_elsewhere(4)])
        child.receive()

    child = Forked(work)
    assert child.receive() == [True, True, False]
    assert locks.is_held_elsewhere(3)
    assert not locks.take_liveness(3)
    child.kill()
    assert not locks.is_held_elsewhere(3)
    assert locks.take_liveness(3)
    locks.close()


def test_a_released_liveness_lock_is_free_for_others(descriptor: int) -> None:
    locks = KernelLocks(descriptor, nothing)
    assert locks.take_liveness(3)
    locks.release_liveness(3)

    def work(child: Forked) -> None:
        child.send(locks.take_liveness(3))
        child.receive()

    child = Forked(work)
    assert child.receive()
    assert not locks.take_liveness(3)
    child.kill()
    locks.close()


def test_a_child_neither_inherits_nor_keeps_its_parents_liveness_locks(descriptor: int) -> None:
    forked: list[int] = []
    locks = KernelLocks(descriptor, lambda: forked.append(os.getpid()))

    def child_of_it(grand: Forked) -> None:
        grand.send([locks.is_held_elsewhere(1), locks.take_liveness(1)])
        grand.receive()

    def parent(child: Forked) -> None:
        assert locks.take_liveness(1)
        grandchild = Forked(child_of_it)
        child.send([grandchild.receive(), len(forked)])
        child.receive()

    child = Forked(parent)
    assert child.receive() == [[True, False], 1]
    child.kill()
    assert not locks.is_held_elsewhere(1)
    assert forked == []
    locks.close()


def test_a_lock_does_not_outlive_an_error(descriptor: int) -> None:
    locks = KernelLocks(descriptor, nothing)
    with pytest.raises(LookupError), locks:
        raise LookupError
    with locks:
        pass
    locks.close()
