"""A stream whose replica dies is resumed at another, and the client receives exactly the same bytes."""

import itertools
from typing import Any

import pytest

from fastdeploy.common.resumption import RESUME_PATH

from .asking import Answered, ask, generation
from .generation import CHAT, COMPLETIONS, Generation
from .replicas import Fleet

#: Two choices of different lengths, and a chunk that belongs to neither.
SEVERAL: dict[str, Any] = {"n": 2, "max_tokens": 9, "stream_options": {"include_usage": True}}


def faulty(at: str, how: int | str, *, event: int | str | None = None, **request: Any) -> Generation:
    times = request.pop("times", 1)
    return generation(faults=[{"at": at, "how": how, "event": event, "times": times}], **request)


def all_positions(at: str, how: str, **request: Any) -> list[Generation]:
    """Return one request per event. Their texts differ, because a text depends on the body."""
    requests = enumerate(faulty(at, how, event=event, **request) for event in itertools.count())
    return [
        each for _, each in itertools.takewhile(lambda pair: pair[0] < number_of_events(pair[1]), requests)
    ]


def number_of_events(request: Generation) -> int:
    return len(list(request.events("", 0)))


def undisturbed(fleet: Fleet, request: Generation, identity: str = "") -> Answered:
    answer = ask(fleet.router.port, request, identity)
    answer.check()
    # Two failures in a row would take a replica out of service; successes in between reset the count.
    for _ in fleet.replicas:
        ask(fleet.router.port, generation(stream=False, max_tokens=1)).check()
    return answer


# ---- places of the cut


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_undisturbed_stream_has_no_additions_and_no_marks(fleet: Fleet, path: str) -> None:
    answer = undisturbed(fleet, generation(path, **SEVERAL), "calm")
    assert answer.trailers == {}
    assert b"\n: fd" not in answer.body
    assert "x-fd-retries" not in answer.headers
    [headers] = [
        each
        for replica in fleet.replicas
        for each in replica.received(path)
        if each["x-request-id"] == "calm"
    ]
    assert (headers["x-fd-marks"], headers["x-fd-progress"]) == ("1", "5")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("at", ["half", "mark", "line", "frame", "event"])
def test_stream_cut_at_any_event_is_resumed_there(fleet: Fleet, path: str, at: str) -> None:
    """The cut is in the middle of the event, before its mark or its end, within a chunk, or after it."""
    for event, request in enumerate(all_positions(at, "close", path=path, **SEVERAL)):
        answer = undisturbed(fleet, request)
        # Before the first event the stream is retried from the start. After the last one nothing is missing.
        has_begun = event > 0 or at == "event"
        is_over = event == number_of_events(request) - 1 and at == "event"
        assert len(answer.resumed_by) == (has_begun and not is_over)
        assert answer.headers["x-fd-replica"] not in answer.resumed_by


@pytest.mark.parametrize("how", ["reset", "garbage", "ends", "reborn", "failed"])
def test_stream_is_resumed_after_every_kind_of_end(fleet: Fleet, how: str) -> None:
    """A reset, invalid HTTP, an early end, a restart of the replica, or a crash of its model."""
    for request in all_positions("event", how, n=2, max_tokens=7):
        assert len(undisturbed(fleet, request).resumed_by) == 1


def test_a_replica_that_is_killed(fleet: Fleet) -> None:
    for request in all_positions("event", "kill", max_tokens=3):
        assert len(undisturbed(fleet, request).resumed_by) == 1
        fleet.wait_until_up()


@pytest.mark.parametrize(
    ("at", "how"),
    [*itertools.product(["head", "begun"], ["close", "reset", "reborn"]), ("head", 503), ("begun", "failed")],
)
def test_stream_that_has_not_begun_is_restarted(fleet: Fleet, at: str, how: int | str) -> None:
    answer = undisturbed(fleet, faulty(at, how, **SEVERAL))
    assert answer.resumed_by == []
    # A kept connection that ends without an answer proves nothing: the same replica is asked again.
    assert answer.headers.get("x-fd-retries") == "1" or at == "head"


@pytest.mark.parametrize("at", ["done", "end"])
@pytest.mark.parametrize("how", ["close", "reset", "reborn"])
def test_what_happens_after_the_last_event_does_not_matter(fleet: Fleet, at: str, how: str) -> None:
    before = fleet.resumes()
    answer = undisturbed(fleet, faulty(at, how, **SEVERAL))
    assert answer.resumed_by == []
    assert fleet.resumes() == before


# ---- forms of the stream


@pytest.mark.parametrize("frame", [1, 3, 100, 1000])
def test_chunks_that_are_no_events(fleet: Fleet, frame: int) -> None:
    for request in all_positions("event", "close", frame=frame, max_tokens=6, n=2):
        undisturbed(fleet, request)


def test_many_signs_of_life_between_events(fleet: Fleet) -> None:
    for event, request in enumerate(all_positions("event", "close", signs=7, max_tokens=4)):
        undisturbed(fleet, request)
        undisturbed(fleet, generation(signs=event, frame=4000))


@pytest.mark.parametrize("step", [2, 5])
def test_several_tokens_at_a_time(fleet: Fleet, step: int) -> None:
    for request in all_positions("event", "close", step=step, max_tokens=16, n=3):
        undisturbed(fleet, request)


def test_a_long_stream_to_a_client_that_reads_slowly(fleet: Fleet) -> None:
    """The stream exceeds all buffers on the way: the replica has to wait, and dies after that."""
    request = faulty("event", "close", event=10_000, max_tokens=20_000)
    answer = ask(fleet.router.port, request, pause=0.5)
    answer.check()
    assert len(answer.resumed_by) == 1


# ---- repeated losses


def test_replica_that_lost_a_stream_may_resume_it_after_another_loss(fleet: Fleet) -> None:
    """There are three replicas and four are needed, but no request waits for a restart."""
    before = fleet.router.metric("fd_router_queue_seconds_count")
    faults = [{"at": "event", "event": event, "how": "close"} for event in (1, 2, 3)]
    answer = ask(fleet.router.port, generation(max_tokens=12, faults=faults))
    answer.check()
    assert answer.resumed_by[-1] == answer.headers["x-fd-replica"]
    assert fleet.router.metric("fd_router_queue_seconds_count") == before


@pytest.mark.parametrize("how", ["close", "reborn"])
def test_a_replica_is_lost_after_every_single_event(fleet: Fleet, how: str) -> None:
    request = faulty("event", how, event="any", times=1000, **SEVERAL)
    before = fleet.resumes()
    undisturbed(fleet, request)
    # The loss after the last event needs no resumption. A replica may resume the stream twice in a row.
    assert fleet.resumes() - before == number_of_events(request) - 1


def test_several_deaths_in_one_stream_some_of_them_on_the_way_to_the_next(fleet: Fleet) -> None:
    faults = [
        {"at": "head", "how": "close"},
        {"at": "event", "event": 2, "how": "kill"},
        {"at": "resume", "how": "reset"},
        {"at": "half", "event": 5, "how": "kill"},
        {"at": "line", "event": 7, "how": "close"},
        {"at": "resume", "how": 503, "times": 1},
    ]
    answer = undisturbed(fleet, generation(CHAT, faults=faults, **SEVERAL), "several")
    assert len(answer.resumed_by) >= 3
    fleet.wait_until_up()


@pytest.mark.parametrize(("stream", "at"), [(True, "begun"), (False, "body")])
def test_taken_request_waits_for_a_replica_to_return_when_all_are_lost(
    fleet: Fleet, stream: bool, at: str
) -> None:
    faults = [{"at": at, "how": "kill", "times": 2}, {"at": "head", "how": 503}]
    before = fleet.router.metric("fd_router_queue_seconds_count")
    answer = ask(fleet.router.port, generation(stream=stream, faults=faults))
    answer.check()
    assert answer.headers["x-fd-retries"] == str(len(fleet.replicas))
    assert fleet.router.metric("fd_router_queue_seconds_count") != before
    fleet.wait_until_up()


# ---- headers and metrics


def test_trailer_and_metric_report_a_resumption(fleet: Fleet) -> None:
    before = fleet.resumes()
    answer = undisturbed(fleet, faulty("event", "close", event=1), "told")
    [name] = answer.resumed_by
    assert name != answer.headers["x-fd-replica"]
    assert fleet.resumes() == before + 1


def test_the_other_replica_gets_the_same_request_and_its_own_token(fleet: Fleet) -> None:
    request = faulty("event", "close", event=1, seed=77)
    [name] = undisturbed(fleet, request, "again").resumed_by
    [headers] = [each for each in fleet[int(name)].received(RESUME_PATH) if each["x-request-id"] == "again"]
    assert headers["x-fd-seed"] == "77"
    assert headers["content-type"] == "application/msgpack"
    assert headers["x-fd-marks"] == "1"
    # The token is a secret of the router and this replica.
    token = headers["x-fd-token"]
    assert len(token) == 32
    for replica in fleet.replicas:
        assert all("x-fd-token" not in each for each in replica.received(COMPLETIONS))
    router = fleet.router
    seen = [router.get(path).text for path in ("/registered", "/metrics")]
    seen += [file.read_text() for file in router.directory.glob("*.log*")]
    assert not any(token in text for text in seen)
