"""client_watch: each closed socket causes one call of the right callback."""

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from fastdeploy.entrypoints.client_watch import DisconnectCallback, on_disconnect

WAIT = 10.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    return accepted, client


def test_the_callback_runs_when_the_peer_closes(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    gone = threading.Event()
    with on_disconnect(ours, gone.set):
        assert not gone.is_set()
        theirs.close()
        assert gone.wait(WAIT)


def test_reset_connection_counts_as_disconnected() -> None:
    ours, theirs = tcp_pair()
    gone = threading.Event()
    with ours, on_disconnect(ours.fileno(), gone.set):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        assert gone.wait(WAIT)


def test_a_client_that_left_before_the_watch_is_noticed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    gone = threading.Event()
    with on_disconnect(ours, gone.set):
        assert gone.wait(WAIT)


def test_bytes_of_a_living_client_do_not_count(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    calls: list[int] = []
    with on_disconnect(ours, lambda: calls.append(1)):
        theirs.sendall(b"x" * 1000)
        settle()
        assert calls == []
        assert len(ours.recv(2000)) == 1000


def test_the_callback_runs_once(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    calls: list[int] = []
    with on_disconnect(ours, lambda: calls.append(1)):
        theirs.close()
        settle()
        settle()
    assert calls == [1]


def test_a_closed_watch_stays_silent(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    calls: list[int] = []
    handle = on_disconnect(ours, lambda: calls.append(1))
    handle.close()
    handle.close()
    theirs.close()
    settle()
    assert calls == []


def test_close_waits_for_a_callback_that_is_running(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    entered, leave = threading.Event(), threading.Event()

    def callback() -> None:
        entered.set()
        leave.wait(WAIT)

    handle = on_disconnect(ours, callback)
    theirs.close()
    assert entered.wait(WAIT)
    closer = threading.Thread(target=handle.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    leave.set()
    closer.join(WAIT)
    assert not closer.is_alive()


def test_a_callback_may_close_its_own_watch(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    done = threading.Event()
    handles: list[DisconnectCallback] = []

    def callback() -> None:
        handles[0].close()
        done.set()

    handles.append(on_disconnect(ours, callback))
    theirs.close()
    assert done.wait(WAIT)


def test_a_failing_callback_does_not_stop_the_others(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with on_disconnect(ours, lambda: 1 / 0):
        theirs.close()
        settle()


def test_reused_descriptor_numbers_do_not_mix_clients_up() -> None:
    """Each connection reuses the last descriptor number; only peers that close while watched are reported."""
    wrong: list[int] = []
    right: list[int] = []
    for index in range(300):
        ours, theirs = socket.socketpair()
        if index % 2:
            with on_disconnect(ours, lambda: right.append(1)):
                theirs.close()
        else:
            with on_disconnect(ours, lambda: wrong.append(1)):
                pass
            theirs.close()
        ours.close()
    settle()
    assert wrong == []


def test_connection_closes_when_server_and_watch_release_it(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    with on_disconnect(ours, lambda: None):
        pass
    ours.close()
    assert theirs.recv(1) == b""


def test_a_forked_child_watches_with_a_thread_of_its_own(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    gone_here = threading.Event()
    with on_disconnect(ours, gone_here.set):
        settle()
        child = os.fork()
        if child == 0:
            mine, other = socket.socketpair()
            gone = threading.Event()
            on_disconnect(mine, gone.set)
            other.close()
            os._exit(0 if gone.wait(WAIT) and not gone_here.is_set() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        theirs.close()
        assert gone_here.wait(WAIT)


def settle() -> None:
    """Return after the watching thread has handled all earlier events."""
    ours, theirs = socket.socketpair()
    seen = threading.Event()
    with ours, on_disconnect(ours, seen.set):
        theirs.close()
        assert seen.wait(WAIT)
