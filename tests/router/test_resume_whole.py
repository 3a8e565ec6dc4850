"""An answer that is not streamed is resumed at another replica from its last draft, unseen by the client."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from .asking import ask, generation, request_bytes
from .conftest import RouterProcess
from .fake_engine import wait_until
from .generation import COMPLETIONS
from .raw_client import RawClient
from .replicas import Fleet
from .test_resume import SEVERAL, faulty, undisturbed

#: Choices of different lengths.
WHOLE: dict[str, Any] = {"stream": False, "n": 2, "max_tokens": 40, "drafts": 4}


@pytest.mark.parametrize(
    ("at", "how"),
    [*itertools.product(["head", "body"], ["close", "reset", "reborn", "kill", "garbage"]), ("head", 503)],
)
def test_answer_without_a_draft_is_restarted(fleet: Fleet, at: str, how: int | str) -> None:
    answer = undisturbed(fleet, faulty(at, how, stream=False, **SEVERAL))
    assert answer.headers.get("x-fd-retries") == "1" or at == "head"
    assert answer.resumed_by == []
    fleet.wait_until_up()


@pytest.mark.parametrize("how", ["close", "reset", "reborn", "kill", "garbage", 503])
def test_answer_with_a_draft_is_resumed_from_it(fleet: Fleet, how: int | str) -> None:
    before = fleet.resumes()
    for event in range(4):
        answer = undisturbed(fleet, faulty("draft", how, event=event, **WHOLE), f"draft-{how}-{event}")
        assert answer.headers["x-fd-retries"] == "1"
        assert answer.resumed_by == [answer.headers["x-fd-replica"]]
        # The other replica computes only the rest.
        [name] = answer.resumed_by
        assert fleet[int(name)].delivered(f"draft-{how}-{event}") == [39 * (event + 1) // 4]
        fleet.wait_until_up()
    assert fleet.resumes() == before + 4


def test_whole_answer_lost_in_its_body_resumes_from_its_last_draft(fleet: Fleet) -> None:
    for how in ("close", "reset", "reborn", "garbage"):
        answer = undisturbed(fleet, faulty("body", how, **WHOLE), f"body-{how}")
        [name] = answer.resumed_by
        assert fleet[int(name)].delivered(f"body-{how}") == [39]


@pytest.mark.parametrize("how", ["close", "reborn"])
def test_answer_is_resumed_after_each_of_its_drafts(fleet: Fleet, how: str) -> None:
    """Each draft is progress, so the answer is resumed more often than a request may fail."""
    answer = undisturbed(fleet, faulty("draft", how, event="any", times=1000, **{**WHOLE, "drafts": 7}))
    assert len(answer.resumed_by) == 7


def test_answer_with_a_draft_waits_for_a_replica(fleet: Fleet) -> None:
    """The request waits for a replica, as a broken stream does, so that its drafts are not computed again."""
    faults = [
        {"at": "draft", "event": 1, "how": "kill"},
        {"at": "resume", "how": "kill"},
        {"at": "resume", "how": 503},
    ]
    answer = undisturbed(fleet, generation(faults=faults, **WHOLE), "for a while")
    assert len(answer.resumed_by) == 1
    assert answer.headers["x-fd-retries"] == "3"
    fleet.wait_until_up()


# ---- restarted from the beginning


@pytest.mark.parametrize("refusal", [400, 409, 500])
def test_refused_resumption_restarts_the_answer(fleet: Fleet, refusal: int) -> None:
    faults = [{"at": "draft", "event": 1, "how": "close"}, {"at": "resume", "how": refusal, "times": 1000}]
    before = relayed(fleet.router)
    answer = undisturbed(fleet, generation(faults=faults, **WHOLE))
    assert answer.resumed_by == []
    # This request, and those with which `undisturbed` resets the failure counts.
    assert relayed(fleet.router) == before + 1 + len(fleet.replicas)


def test_restarted_answer_names_no_resuming_replica(fleet: Fleet) -> None:
    faults = [
        {"at": "draft", "event": 0, "how": "close"},
        {"at": "draft", "event": 2, "how": "close"},
        {"at": "resume", "event": 29, "how": 409, "times": 1000},
    ]
    answer = undisturbed(fleet, generation(faults=faults, **WHOLE), "thrown away")
    # Some replica had resumed the answer before its drafts were discarded.
    assert sum(len(replica.delivered("thrown away")) for replica in fleet.replicas) > 1
    assert answer.resumed_by == []


@pytest.mark.parametrize(
    "lines",
    [
        "X: y",
        "X-FD-Mark: 0 1",
        "X-FD-Draft: x y\r\nX-FD-Mark: 0 1",
        f"X-FD-Draft: {'1' * 5000} y\r\nX-FD-Mark: 0 1",
        f"X-FD-Draft: {1 << 64} y\r\nX-FD-Mark: 0 1",
        "X-FD-Draft: 1 y\r\nX-FD-Mark: 0 x",
        "X-FD-Draft: 1 y\r\nX-FD-Mark: 0 -1",
        "X-FD-Draft: 1 y\r\nX-FD-Mark: -1 1",
        f"X-FD-Draft: 1 y\r\nX-FD-Mark: {1 << 64} 1",
    ],
    ids=["other", "no head", "no time", "long", "late", "no token", "token -1", "choice -1", "choice"],
)
def test_invalid_draft_restarts_the_answer(fleet: Fleet, lines: str) -> None:
    answer = undisturbed(fleet, faulty("draft", "close", event=3, interim=lines, **WHOLE))
    assert answer.resumed_by == []


def test_whole_answer_lost_repeatedly_without_progress_ends_in_an_error(fleet: Fleet) -> None:
    """Drafts of a restarted answer are no progress: the request would otherwise go through all replicas."""
    faults = [{"at": "draft", "event": 1, "how": "close", "times": 1000}]
    faults += [{"at": "resume", "how": 409, "times": 1000}]
    answer = ask(fleet.router.port, generation(faults=faults, **WHOLE), "poison")
    assert answer.status == 500
    assert "3 replicas in a row" in answer.error["message"]
    attempts = [each for replica in fleet.replicas for each in replica.received(COMPLETIONS)]
    assert sum(each["x-request-id"] == "poison" for each in attempts) <= 4
    fleet.renew()


def test_connection_that_ends_after_a_keep_alive_was_not_stale(fleet: Fleet) -> None:
    for _ in fleet.replicas:
        ask(fleet.router.port, generation(stream=False, max_tokens=1)).check()
    answer = undisturbed(fleet, faulty("draft", "close", event=0, drafts=1, interim="X: y", stream=False))
    assert answer.headers["x-fd-retries"] == "1"


def test_large_resumed_answer_names_its_replica_in_the_head(fleet: Fleet) -> None:
    """A large answer is forwarded before it is complete, and has no trailer."""
    answer = undisturbed(fleet, faulty("draft", "close", event=3, pad=6 << 20, **WHOLE))
    assert answer.resumed_by == [answer.headers["x-fd-replica"]]


# ---- full replicas


@pytest.fixture
def small_fleet(start_router: Callable[..., RouterProcess]) -> Iterator[Callable[[int], Fleet]]:
    """Starts replicas that take one request at a time."""
    with ExitStack() as stack:

        def start(count: int) -> Fleet:
            router = start_router("--health-check-interval-secs", "0.2", "--queue-timeout-secs", "3")
            return stack.enter_context(Fleet(router, count, "--max-concurrency=1"))

        yield start


@pytest.mark.parametrize("kind", ["restarted", "resumed", "a stream"])
def test_replica_that_lost_a_request_is_retried_while_others_are_full(
    small_fleet: Callable[[int], Fleet], kind: str
) -> None:
    fleet = small_fleet(2)
    request = {
        "restarted": faulty("body", "close", stream=False),
        "resumed": faulty("draft", "close", event=2, **WHOLE),
        "a stream": faulty("event", "close", event=2),
    }[kind]
    with RawClient(fleet.router.port) as other:
        other.send(request_bytes(generation(stream=False, delay=60.0)))
        wait_until(lambda: not all(replica.is_idle() for replica in fleet.replicas), "one of them is full")
        ask(fleet.router.port, request).check()


def test_queue_timeout_restarts_when_a_taken_request_is_lost(small_fleet: Callable[[int], Fleet]) -> None:
    fleet = small_fleet(1)
    first = threading.Thread(target=ask, args=(fleet.router.port, generation(stream=False, delay=0.5)))
    first.start()
    wait_until(lambda: not all(replica.is_idle() for replica in fleet.replicas), "the request is in flight")
    # The request is lost after more than the three seconds of the queue timeout.
    ask(fleet.router.port, faulty("body", "kill", stream=False, delay=3.2)).check()
    first.join()


def relayed(router: RouterProcess) -> float:
    [line] = router.metric("fd_router_relay_seconds_count")
    return float(line.rpartition(" ")[2])
