"""A broken stream when no replica can resume it at once, or at all."""

import concurrent.futures
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from fastdeploy.common.resumption import RESUME_PATH
from fastdeploy.daemon.router.relay.suspicion import SUSPECT_AFTER

from .asking import Answered, ask, generation
from .conftest import RouterProcess
from .fake_engine import wait_until
from .generation import COMPLETIONS, DONE, Generation
from .replicas import Fleet

#: Seconds between signs of life, and of silence after which the router gives a replica up.
SIGNS = "--sign-every=0.1"
PATIENCE = 0.6
#: Deaths until the request is refused; at the last one it has the replica to itself.
MOST_DEATHS = SUSPECT_AFTER + 1
FLAGS = (
    *("--health-check-interval-secs", "0.2", "--progress-timeout-secs", str(PATIENCE)),
    *("--request-timeout-secs", "1", "--queue-timeout-secs", "4"),
)
#: Closes the connection after the client has received three events.
CUT = {"at": "event", "event": 2, "how": "close"}


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    router = RouterProcess(tmp_path_factory.mktemp("router"), *FLAGS)
    yield router
    router.stop()


@pytest.fixture
def start_fleet(router: RouterProcess) -> Iterator[Callable[..., Fleet]]:
    fleets: list[Fleet] = []

    def start(count: int, *flags: str, **options: str) -> Fleet:
        fleets.append(Fleet(router, count, *flags, **options))
        return fleets[-1].__enter__()

    yield start
    for fleet in fleets:
        fleet.__exit__()
    router.wait_idle()


def told_of_the_end(answer: Answered, events: int = 3) -> str:
    """Return the message of the error event that ends this stream, and check the events before it."""
    assert answer.status == 200
    assert answer.body.endswith(DONE)
    assert answer.error["code"] == "replica_lost"
    begun = b"".join(event + b"\n\n" for event in answer.body.split(b"\n\n")[:events])
    head = begun.partition(b'"id":"')[2].partition(b'"')[0].decode()
    created = int(begun.partition(b'"created":')[2].partition(b",")[0])
    assert answer.generation.stream(head, created).startswith(begun)
    assert answer.body.removeprefix(begun).count(b"data: ") == 2
    message: str = answer.error["message"]
    return message


# ---- deadly requests


def test_stream_ends_with_an_error_after_several_deaths_in_a_row(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    fleet = start_fleet(MOST_DEATHS + 1)
    faults = [CUT, {"at": "resume", "how": "close", "times": 99}]
    message = told_of_the_end(ask(router.port, generation(max_tokens=9, faults=faults)))
    assert f"{MOST_DEATHS} replicas in a row were lost while serving this request" in message
    # The first replica, and those that were to resume the stream.
    begun = sum(len(replica.received(COMPLETIONS)) for replica in fleet.replicas)
    resumed = sum(len(replica.received(RESUME_PATH)) for replica in fleet.replicas)
    assert (begun, resumed) == (1, MOST_DEATHS - 1)


@pytest.mark.parametrize("stream", [True, False])
def test_deadly_request_gets_a_clear_error_before_all_replicas_are_dead(
    router: RouterProcess, start_fleet: Callable[..., Fleet], stream: bool
) -> None:
    fleet = start_fleet(MOST_DEATHS + 2)
    # The requests leave kept connections. The end of one may be chance; a refused new one is not.
    for _ in fleet.replicas:
        ask(router.port, generation()).check()
    fault = {"at": "head", "how": "kill", "times": 99}
    answer = ask(router.port, generation(stream=stream, faults=[fault]), f"killer-{stream}")
    assert (answer.status, answer.error["code"]) == (500, "replicas_lost")
    assert answer.headers["x-should-retry"] == "false"
    identity = answer.headers["x-request-id"]
    message = f"request {identity}: {MOST_DEATHS} replicas in a row were lost while serving this request, "
    assert answer.error["message"].startswith(message)
    assert len(list(router.directory.glob(f"killer-{stream}-*"))) == MOST_DEATHS


def test_error_of_every_replica_reaches_the_client(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    start_fleet(MOST_DEATHS)
    answer = ask(router.port, generation(faults=[{"at": "begun", "how": "failed", "times": 99}]))
    assert (answer.status, answer.error["code"]) == (500, "replicas_lost")
    assert "the engine has failed" in answer.error["message"]
    faults = [{**CUT, "how": "failed"}, {"at": "resumed", "how": "failed", "times": 99}]
    message = told_of_the_end(ask(router.port, generation(max_tokens=9, faults=faults)))
    assert "the engine has failed" in message


# ---- streams that cannot be resumed


def test_refused_resumption_ends_the_stream_with_an_error(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    start_fleet(2)
    faults = [CUT, {"at": "resume", "how": 409, "times": 99}]
    message = told_of_the_end(ask(router.port, generation(max_tokens=9, faults=faults)))
    assert "cannot resume this response" in message


@pytest.mark.parametrize("features", ["", "progress"])
def test_a_stream_of_a_plain_engine_ends_with_an_error(
    router: RouterProcess, start_fleet: Callable[..., Fleet], features: str
) -> None:
    start_fleet(2, features=features)
    message = told_of_the_end(ask(router.port, generation(max_tokens=9, faults=[CUT])))
    assert "was lost in the middle of the response" in message


def test_stream_is_never_resumed_at_a_plain_engine(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    plain = start_fleet(2, features="")
    start_fleet(1)
    answers = [ask(router.port, generation(max_tokens=9, faults=[CUT], seed=seed)) for seed in range(6)]
    assert any(answer.resumed_by for answer in answers)
    assert not any(replica.received(RESUME_PATH) for replica in plain.replicas)


# ---- replicas that round differently


def test_stream_is_resumed_with_the_same_numeric_version(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    start_fleet(2, "--numeric-version=cpu-1-amx/bfloat16")
    start_fleet(2, "--numeric-version=sm90-2/bfloat16")
    registered = router.get("/registered").json()["mixed"]
    assert sorted(row["numeric_version"] for row in registered) == 2 * ["cpu-1-amx/bfloat16"] + 2 * [
        "sm90-2/bfloat16"
    ]
    for seed in range(12):
        answer = ask(router.port, generation(max_tokens=9, faults=[CUT], seed=seed), f"equal-{seed}")
        answer.check()
        assert len(answer.resumed_by) == 1
        # Two failures in a row would take a replica out of service; successes in between reset the count.
        for _ in registered:
            ask(router.port, generation(stream=False, max_tokens=1)).check()
    assert told_of_rounding(router, "equal-") == []


def test_stream_of_the_last_replica_of_a_version_is_resumed_and_logged(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    start_fleet(1, "--numeric-version=cpu-1-amx/bfloat16").keeps_alive = False
    others = start_fleet(1, "--numeric-version=sm90-2/bfloat16")
    others.keeps_alive = False
    answer = ask(router.port, generation(max_tokens=9, faults=[{**CUT, "how": "kill"}]), "mixed")
    answer.check()
    assert len(answer.resumed_by) == 1
    [line] = told_of_rounding(router, "mixed")
    assert re.search("numeric version (cpu-1-amx/bfloat16 with sm90-2|sm90-2/bfloat16 with cpu-1-amx)/", line)


def test_unknown_numeric_versions_are_no_difference(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    start_fleet(1).keeps_alive = False
    start_fleet(1, "--numeric-version=sm90-2/bfloat16").keeps_alive = False
    answer = ask(router.port, generation(max_tokens=9, faults=[{**CUT, "how": "kill"}]), "unknown")
    answer.check()
    assert len(answer.resumed_by) == 1
    assert told_of_rounding(router, "unknown") == []


def told_of_rounding(router: RouterProcess, identity: str) -> list[str]:
    lines = router.log.read_text().splitlines()
    return [line for line in lines if f"request={identity}" in line and "numeric version" in line]


# ---- no replica for now


def test_the_only_replica_dies_and_comes_back(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    fleet = start_fleet(1)
    faults = [{"at": "event", "event": event, "how": "kill"} for event in (2, 4)]
    answer = ask(router.port, generation(max_tokens=20, faults=faults))
    answer.check()
    assert answer.resumed_by == ["0", "0"]
    assert fleet[0].starts == 3


def test_the_only_replica_loses_the_connection_and_lives(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    start_fleet(1)
    answer = ask(router.port, generation(max_tokens=9, faults=[CUT]))
    answer.check()
    assert answer.resumed_by == ["0"]


def test_stream_ends_with_an_error_if_no_replica_returns_in_time(
    start_router: Callable[..., RouterProcess],
) -> None:
    router = start_router("--queue-timeout-secs", "0.5")
    with Fleet(router, 1) as fleet:
        fleet.keeps_alive = False
        request = generation(max_tokens=9, faults=[{**CUT, "how": "kill"}])
        assert "in time" in told_of_the_end(ask(router.port, request))
        assert router.metric("fd_router_broken_off_total") == ['fd_router_broken_off_total{replica="0"} 1.0']
        router.wait_idle()


def test_busy_replicas_are_asked_again_later(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    start_fleet(2)
    refusals = [{"at": "resume", "how": how} for how in (401, 429, 500, 503, "garbage")]
    ask(router.port, generation(max_tokens=9, faults=[CUT, *refusals])).check()


def test_begun_streams_take_precedence_over_waiting_requests(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    fleet = start_fleet(2, "--max-concurrency=1")
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        # The stream is cut while the other requests wait.
        first = pool.submit(ask, router.port, generation(max_tokens=9, interval=0.1, faults=[CUT]))
        wait_until(lambda: any(router.in_flight().values()), "the request is in flight")
        others = [
            pool.submit(ask, router.port, generation(stream=False, delay=0.2, seed=seed)) for seed in range(8)
        ]
        for answer in (first, *others):
            answer.result().check()
        [name] = first.result().resumed_by
    paths = [each["path"] for each in fleet[int(name)].state()["received"]]
    assert paths.index(RESUME_PATH) < len(paths) - 2


# ---- silence


@pytest.mark.parametrize(
    ("place", "stream"),
    [(CUT, True), ({"at": "begun"}, True), ({"at": "head"}, True), ({"at": "head"}, False)],
)
def test_hung_replica_is_detected(
    router: RouterProcess,
    start_fleet: Callable[..., Fleet],
    place: dict[str, int | str] | dict[str, str],
    stream: bool,
) -> None:
    start_fleet(2, SIGNS)
    request = generation(stream=stream, max_tokens=9, faults=[{**place, "how": "stop"}])
    answer = ask(router.port, request)
    answer.check()
    assert bool(answer.resumed_by) == (place is CUT)
    assert "timed out: no data for" in router.log.read_text()


@pytest.mark.parametrize(
    "slow",
    [
        {"stream": True, "interval": 1.5 * PATIENCE},
        {"stream": True, "delay": 2 * PATIENCE},
        {"stream": False, "delay": 2 * PATIENCE},
    ],
)
def test_slow_replica_with_keep_alives_is_kept(
    router: RouterProcess, start_fleet: Callable[..., Fleet], slow: dict[str, Any]
) -> None:
    start_fleet(2, SIGNS)
    answer = ask(router.port, generation(max_tokens=2, **slow))
    answer.check()
    assert answer.resumed_by == []
    assert "x-fd-retries" not in answer.headers


def test_stream_of_a_silent_replica_without_signs_of_life_is_resumed(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    start_fleet(2, features="resume")
    answer = ask(router.port, generation(max_tokens=9, faults=[{**CUT, "how": "silence"}]))
    answer.check()
    assert len(answer.resumed_by) == 1


def test_unread_data_does_not_count_as_silence_of_the_replica(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    """The router does not read the signs of life while the client's buffers are full."""
    start_fleet(2, SIGNS)
    answer = ask(router.port, generation(max_tokens=1000, pad=20_000), pause=3 * PATIENCE)
    answer.check()
    assert answer.resumed_by == []


def test_resumed_router_takes_no_replica_for_dead(
    router: RouterProcess, start_fleet: Callable[..., Fleet]
) -> None:
    """The router has not yet read what arrived while it was stopped."""
    start_fleet(2, SIGNS)
    [worker] = psutil.Process(router.process.pid).children()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        streams = [
            pool.submit(ask, router.port, generation(max_tokens=40, interval=0.1, seed=seed))
            for seed in range(8)
        ]
        wait_until(lambda: sum(router.in_flight().values()) == 8, "the requests are in flight")
        worker.suspend()
        time.sleep(5 * PATIENCE)
        worker.resume()
        for stream in streams:
            stream.result().check()
            assert stream.result().resumed_by == []


# ---- many requests at once


def test_requests_of_a_replica_with_crashing_model_go_to_the_others(
    start_router: Callable[..., RouterProcess],
) -> None:
    """There are more retries than the retry budget permits: that budget is for replicas that are too busy."""
    # The default timeout, so that neither of two failing replicas is also taken for silent.
    router = start_router()

    def one(seed: int) -> Answered:
        return ask(router.port, crashing(seed))

    def crashing(seed: int) -> Generation:
        return generation(stream=False, seed=seed, faults=[{"at": "head", "how": 503}])

    with Fleet(router, 2), concurrent.futures.ThreadPoolExecutor(16) as pool:
        for answer in pool.map(one, range(250)):
            answer.check()
