"""The wait queue of requests for busy replicas: order of service, and rejection."""

from __future__ import annotations

from dataclasses import dataclass

from fastdeploy.daemon.router.board.board import PickFailure
from fastdeploy.daemon.router.relay.wait_queue import WaitQueue, retry_after


class Place:
    """Replicas with room for a few. A waiter that gives up advances the queue, like a request that ends."""

    def __init__(self, queue: WaitQueue) -> None:
        self.queue = queue
        #: Number of free places; the last is at a replica that waiters with exclusions avoid.
        self.room = 0
        self.served: list[str] = []
        self.gone: list[str] = []


@dataclass(eq=False)
class Waiter:
    name: str
    place: Place
    deadline: float = 100.0
    #: Whether no replica can serve it.
    is_stranded: bool = False
    has_exclusions: bool = False

    def try_again(self, now: float) -> PickFailure | None:
        if self.is_stranded:
            return PickFailure.DOWN
        if not self.place.room or (self.has_exclusions and self.place.room < 2):
            return PickFailure.BUSY
        self.place.room -= 1
        self.place.served.append(self.name)
        return None

    def give_up(self) -> None:
        self.place.gone.append(self.name)
        self.place.queue.advance(self.deadline)


def new_place(longest: int = 100) -> Place:
    return Place(WaitQueue(longest))


def test_first_come_first_served() -> None:
    place = new_place()
    for name in "abc":
        assert place.queue.join(Waiter(name, place))
    place.queue.advance(0.0)
    assert place.served == []
    place.room = 2
    place.queue.advance(0.0)
    assert (place.served, len(place.queue)) == (["a", "b"], 1)


def test_a_pass_over_an_empty_queue_does_not_delay_the_next_one() -> None:
    place = new_place()
    place.queue.advance(0.0)
    place.queue.join(Waiter("first", place))
    place.room = 1
    assert not place.queue.has_others(0.01)
    assert place.served == ["first"]


def test_begun_requests_come_first_and_are_never_rejected() -> None:
    place = new_place(longest=1)
    assert place.queue.join(Waiter("a", place))
    assert not place.queue.join(Waiter("b", place))
    assert place.queue.join(Waiter("x", place), is_urgent=True)
    assert place.queue.join(Waiter("y", place), is_urgent=True)
    assert len(place.queue) == 3
    place.room = 3
    place.queue.advance(0.0)
    assert place.served == ["x", "y", "a"]


def test_request_without_a_possible_replica_keeps_its_place() -> None:
    place = new_place()
    stranded = Waiter("a", place, is_stranded=True)
    urgent = Waiter("x", place, is_stranded=True)
    place.queue.join(urgent, is_urgent=True)
    for waiter in (stranded, Waiter("b", place), Waiter("c", place)):
        place.queue.join(waiter)
    place.room = 1
    place.queue.advance(0.0)
    assert place.served == ["b"]
    stranded.is_stranded = urgent.is_stranded = False
    place.room = 3
    place.queue.advance(0.0)
    assert place.served == ["b", "x", "a", "c"]


def test_request_with_exclusions_does_not_block_others() -> None:
    place = new_place()
    for name in "abc":
        place.queue.join(Waiter(name, place, has_exclusions=name != "b"))
    place.room = 1
    place.queue.advance(0.0)
    assert place.served == ["b"]
    place.room = 2
    place.queue.advance(0.0)
    assert place.served == ["b", "a"]
    assert place.room == 1


def test_arrivals_do_not_retry_a_queue_without_replicas() -> None:
    place = new_place()
    tries = []

    class Stranded(Waiter):
        def try_again(self, now: float) -> PickFailure | None:
            tries.append(now)
            return super().try_again(now)

    waiters = [Stranded(name, place, is_stranded=True) for name in "ab"]
    place.queue.join(waiters[0])
    place.queue.join(waiters[1], is_urgent=True)
    for _ in range(10):
        place.queue.advance(1.0)
        assert not place.queue.has_others(1.0)
    assert tries == [1.0, 1.0]
    for waiter in waiters:
        waiter.is_stranded = False
    place.room = 2
    place.queue.advance(1.2)
    assert place.served == ["b", "a"]


def test_new_request_queues_only_behind_those_needing_the_same_replicas() -> None:
    place = new_place()
    assert not place.queue.has_others(0.0)
    stranded = Waiter("a", place, is_stranded=True)
    place.queue.join(stranded)
    place.queue.join(Waiter("b", place, has_exclusions=True))
    assert not place.queue.has_others(0.0)
    place.queue.join(Waiter("c", place))
    assert place.queue.has_others(0.0)
    place.room = 1
    assert not place.queue.has_others(0.0)
    assert place.served == ["c"]


def test_thousands_of_simultaneous_timeouts_are_each_reported_once() -> None:
    """Each waiter that gives up advances the queue from within a pass over it."""
    place = new_place(longest=3000)
    for number in range(3000):
        place.queue.join(Waiter(str(number), place, deadline=5.0 if number % 3 else 6.0))
    place.queue.advance(4.9)
    assert place.gone == []
    place.queue.advance(5.0)
    assert len(place.gone) == len(set(place.gone)) == len(place.queue) * 2 == 2000


def test_waiter_that_leaves_is_not_served() -> None:
    place = new_place()
    a, x = Waiter("a", place), Waiter("x", place)
    place.queue.join(a)
    place.queue.join(x, is_urgent=True)
    place.queue.leave(a)
    place.queue.leave(x)
    place.queue.leave(x)
    place.room = 1
    place.queue.advance(200.0)
    assert (place.served, place.gone, len(place.queue)) == ([], [], 0)


def test_retry_after_is_the_time_for_the_requests_ahead() -> None:
    assert retry_after(waiting=9, ended_per_second=2.0, limit=30.0) == 5
    assert retry_after(waiting=0, ended_per_second=1000.0, limit=30.0) == 1
    assert retry_after(waiting=1000, ended_per_second=1.0, limit=30.0) == 30
    assert retry_after(waiting=5, ended_per_second=0.0, limit=30.0) == 30
