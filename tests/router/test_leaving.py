"""Clients leave at any moment: their requests are cancelled in every state, and counts return to zero."""

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from fastdeploy.common.resumption import RESUME_PATH

from .asking import ask, generation, request_bytes
from .conftest import RouterProcess
from .fake_engine import wait_until
from .generation import COMPLETIONS, Generation
from .replicas import Fleet

#: Closes the connection after three events.
CUT = {"at": "event", "event": 2, "how": "close"}
HANGS = {"at": "event", "event": 5, "how": "silence"}
HOW = pytest.mark.parametrize("how", ["close", "reset"])


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    router = RouterProcess(tmp_path_factory.mktemp("router"), "--health-check-interval-secs", "0.2")
    yield router
    assert "Traceback" not in router.log.read_text()
    router.stop()


@pytest.fixture
def start_fleet(router: RouterProcess) -> Iterator[Callable[..., Fleet]]:
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Fleet(router, *arguments, **options))


class Visitor:
    def __init__(self, router: RouterProcess, request: Generation, identity: str = "") -> None:
        self.bytes = request_bytes(request, identity)
        self.socket = socket.create_connection(("127.0.0.1", router.port), timeout=20)

    def ask(self, part: float = 1.0) -> None:
        self.socket.sendall(self.bytes[: int(part * len(self.bytes))])

    def read(self, events: int) -> None:
        seen = b""
        while seen.count(b"data: ") < events:
            seen += (piece := self.socket.recv(65536))
            assert piece, seen

    def leave(self, how: str) -> None:
        if how == "reset":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def nothing_is_left(router: RouterProcess, *fleets: Fleet) -> None:
    router.wait_idle()
    for fleet in fleets:
        for replica in fleet.replicas:
            if replica.is_alive:
                wait_until(lambda: not replica.state()["busy"], "its requests are cancelled")  # noqa: B023


@HOW
def test_in_the_middle_of_its_head_or_of_its_body(
    router: RouterProcess, start_fleet: Callable[..., Fleet], how: str
) -> None:
    fleet = start_fleet(1)
    for part in (0.1, 0.5, 0.99):
        visitor = Visitor(router, generation(prompt="x" * 1000))
        visitor.ask(part)
        visitor.leave(how)
    nothing_is_left(router, fleet)
    assert fleet[0].state()["received"] == []


@HOW
@pytest.mark.parametrize("stream", [True, False])
def test_while_it_waits_for_the_first_token(
    router: RouterProcess, start_fleet: Callable[..., Fleet], how: str, stream: bool
) -> None:
    fleet = start_fleet(1)
    visitor = Visitor(router, generation(stream=stream, delay=60))
    visitor.ask()
    wait_until(lambda: fleet[0].state()["busy"], "the replica has it")
    visitor.leave(how)
    nothing_is_left(router, fleet)
    assert fleet[0].state()["cancelled"] == 1


@HOW
def test_in_the_middle_of_a_stream(
    router: RouterProcess, start_fleet: Callable[..., Fleet], how: str
) -> None:
    fleet = start_fleet(1)
    visitor = Visitor(router, generation(max_tokens=20, faults=[HANGS]))
    visitor.ask()
    visitor.read(events=6)
    visitor.leave(how)
    nothing_is_left(router, fleet)
    assert fleet[0].state()["cancelled"] == 1


@HOW
def test_in_the_middle_of_a_stream_that_it_does_not_read(
    router: RouterProcess, start_fleet: Callable[..., Fleet], how: str
) -> None:
    """All buffers are full, and the router has stopped reading from the replica."""
    fleet = start_fleet(1)
    visitor = Visitor(router, generation(max_tokens=1000, pad=50_000))
    visitor.ask()
    visitor.read(events=1)
    wait_until(lambda: fleet[0].state()["is_held_up"], "the replica has to wait")
    visitor.leave(how)
    nothing_is_left(router, fleet)
    assert fleet[0].state()["cancelled"] == 1


@HOW
def test_after_its_stream_was_resumed_elsewhere(
    router: RouterProcess, start_fleet: Callable[..., Fleet], how: str
) -> None:
    fleet = start_fleet(2)
    visitor = Visitor(router, generation(max_tokens=20, faults=[CUT, HANGS]))
    visitor.ask()
    visitor.read(events=6)
    visitor.leave(how)
    nothing_is_left(router, fleet)
    assert sorted(replica.state()["cancelled"] for replica in fleet.replicas) == [0, 1]


@HOW
def test_while_it_waits_in_the_queue(
    router: RouterProcess, start_fleet: Callable[..., Fleet], how: str
) -> None:
    fleet = start_fleet(1, "--max-concurrency=1")
    first = Visitor(router, generation(stream=False, delay=60), "first")
    first.ask()
    wait_until(lambda: fleet[0].state()["busy"], "the replica is full")
    waiting = [Visitor(router, generation(), f"waiting-{how}-{number}") for number in range(5)]
    for visitor in waiting:
        visitor.ask()
    for visitor in waiting:
        visitor.leave(how)
    wait_until(
        lambda: router.log.read_text().count(f"request=waiting-{how}") == len(waiting), "they are over"
    )
    first.leave(how)
    nothing_is_left(router, fleet)
    ask(router.port, generation()).check()
    ids = [headers["x-request-id"] for headers in fleet[0].received(COMPLETIONS)]
    assert [each for each in ids if "waiting" in each] == []


@HOW
def test_while_its_stream_waits_for_a_replica(
    router: RouterProcess, start_fleet: Callable[..., Fleet], how: str
) -> None:
    fleet = start_fleet(1)
    fleet.keeps_alive = False
    visitor = Visitor(router, generation(max_tokens=20, faults=[{**CUT, "how": "kill"}]))
    visitor.ask()
    visitor.read(events=3)
    wait_until(lambda: not router.urls() & {fleet[0].url}, "the router knows")
    visitor.leave(how)
    router.wait_idle()
    fleet.keeps_alive = True
    fleet.wait_until_up()
    ask(router.port, generation()).check()
    assert fleet[0].received(RESUME_PATH) == []
    nothing_is_left(router, fleet)


@HOW
def test_while_another_replica_is_asked_to_resume(
    router: RouterProcess, start_fleet: Callable[..., Fleet], how: str
) -> None:
    fleet = start_fleet(2)
    visitor = Visitor(router, generation(max_tokens=20, faults=[CUT, {"at": "resume", "how": "silence"}]))
    visitor.ask()
    visitor.read(events=3)
    wait_until(
        lambda: any(replica.received(RESUME_PATH) for replica in fleet.replicas),
        "a replica is asked to resume",
    )
    visitor.leave(how)
    nothing_is_left(router, fleet)
    ask(router.port, generation()).check()
