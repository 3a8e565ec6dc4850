"""Access to the daemon, and its protection from its clients."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.control import peer_credentials, protocol
from fastdeploy.daemon.control.peer_credentials import Peer
from fastdeploy.daemon.control.server import ControlServer, Conversation
from fastdeploy.daemon.fdctl import main

from .conftest import Running

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class Endpoint:
    """The daemon's end of the socket, in this process: `turn` is one turn of its loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.selector = selectors.DefaultSelector()
        self.commands: list[tuple[dict[str, Any], Conversation]] = []
        self.server = ControlServer(
            path, self.selector, lambda command, conversation: self.commands.append((command, conversation))
        )

    def turn(self, timeout: float = 0.0) -> int:
        ready = self.selector.select(timeout)
        for key, _ in ready:
            key.data()
        return len(ready)

    def settle(self) -> None:
        while self.turn():
            pass

    def client(self, sent: bytes = b"") -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        client.connect(str(self.path))
        if sent:
            client.sendall(sent)
        self.settle()
        return client


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    # Not below pytest's own directories, which other users cannot enter.
    directory = Path(tempfile.mkdtemp(prefix="fd-"))
    directory.chmod(0o755)
    found = Endpoint(directory / "fd-dp.sock")
    yield found
    found.server.close()
    shutil.rmtree(directory)


def read(client: socket.socket) -> list[dict[str, Any]]:
    """Return all messages until the daemon closes; a reset is possible if it left bytes unread."""
    messages = []
    with client, client.makefile("rb") as stream, contextlib.suppress(ConnectionResetError):
        for line in stream:
            messages.append(json.loads(line))
    return messages


def as_nobody(endpoint: Endpoint, do: Callable[[], int], *groups: int) -> int:
    """Run `do` as another user while the daemon's loop turns; return its result."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setgroups(groups)
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            code = do()
        finally:
            os._exit(code)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        endpoint.turn(0.02)


# ---- access


@given(st.integers(1, 9), st.integers(1, 9), st.frozensets(st.integers(1, 9)))
def test_commands_are_allowed_to_root_daemon_user_and_its_group(
    uid: int, gid: int, groups: frozenset[int]
) -> None:
    assert peer_credentials.may_command(Peer(1, 0, groups), uid, gid)
    assert peer_credentials.may_command(Peer(1, uid, groups), uid, gid)
    assert peer_credentials.may_command(Peer(1, uid + 1, groups), uid, gid) == (gid in groups)


def test_peer_identity_comes_from_the_kernel(endpoint: Endpoint) -> None:
    here, there = socket.socketpair()
    with here, there:
        peer = peer_credentials.peer_of(here)
    assert (peer.pid, peer.uid) == (os.getpid(), os.geteuid())
    assert peer.groups == {os.getegid(), *os.getgroups()}
    assert f"(uid {os.geteuid()}, pid {os.getpid()})" in str(peer)


def test_the_socket_is_for_user_and_group_only(endpoint: Endpoint) -> None:
    found = endpoint.path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o660
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())


@needs_root
def test_socket_does_not_inherit_the_group_of_its_directory(endpoint: Endpoint) -> None:
    endpoint.path.parent.chmod(0o2775)
    os.chown(endpoint.path.parent, 0, NOBODY)
    # chown clears the set-group-ID bit.
    endpoint.path.parent.chmod(0o2775)
    other = Endpoint(endpoint.path.with_name("other.sock"))
    assert other.path.stat().st_gid == os.getegid()
    other.server.close()


@needs_root
def test_other_user_learns_only_which_users_are_allowed(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["fdctl", "--socket", str(endpoint.path), "stop", "all"])
    # The socket's mode keeps other users out.
    assert as_nobody(endpoint, main.main) == protocol.DENIED
    # If the mode has been relaxed, the daemon asks the kernel for the client's user.
    endpoint.path.chmod(0o666)
    assert as_nobody(endpoint, main.main) == protocol.DENIED
    assert endpoint.commands == []
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"rejected a connection of nobody (uid {NOBODY}, pid ")
    assert line.endswith(f"only {peer_credentials.permitted_here()} may talk to fd-dp")


@needs_root
def test_fdctl_reports_a_forbidden_socket_in_one_line(endpoint: Endpoint) -> None:
    def refused() -> int:
        try:
            list(protocol.request(endpoint.path, {"do": "status"}, 10.0))
        except protocol.NotAllowed as error:
            told = str(error)
        return 0 if f"nobody has no access to fd-dp on {endpoint.path}: only root and members" in told else 1

    assert as_nobody(endpoint, refused) == 0


@needs_root
def test_a_member_of_the_daemons_group_may(endpoint: Endpoint) -> None:
    def ask() -> int:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(endpoint.path))
            client.sendall(b'{"do": "stop"}\n')
            return 0

    assert as_nobody(endpoint, ask, os.getegid()) == 0
    endpoint.settle()
    ((command, conversation),) = endpoint.commands
    assert command == {"do": "stop"}
    assert conversation.peer.uid == NOBODY


@needs_root
def test_user_in_hundreds_of_groups_is_judged_by_account_groups(
    endpoint: Endpoint,
) -> None:
    endpoint.path.chmod(0o666)

    def ask() -> int:
        answer = list(protocol.request(endpoint.path, {"do": "stop"}, 10.0))[-1]
        return int(answer["code"])

    assert as_nobody(endpoint, ask, *range(1000, 1400)) == protocol.DENIED


def test_log_names_the_user_of_a_change_but_not_of_a_query(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for command in ({"do": "status"}, {"do": "why", "name": "3"}, {"do": "stop", "name": "3\nERROR x"}):
        endpoint.client(json.dumps(command).encode() + b"\n").close()
    (line,) = [record.getMessage() for record in caplog.records]
    who = f"{peer_credentials.user_name(os.geteuid())} (uid {os.geteuid()}, pid {os.getpid()})"
    assert line == f'{who} asks for {{"do": "stop", "name": "3\\nERROR x"}}'


# ---- misbehaving clients


def test_slow_reading_client_blocks_no_other_and_gets_every_message(endpoint: Endpoint) -> None:
    client = endpoint.client(b'{"do": "reload"}\n')
    ((_, conversation),) = endpoint.commands
    told = [f"{number} " + "x" * 500 for number in range(1000)]
    for line in told:
        conversation.line(line)
    conversation.end(protocol.OK)
    assert not conversation.is_over
    received = b""
    while chunk := client.recv(1 << 16):
        received += chunk
        endpoint.settle()
    client.close()
    messages = [json.loads(line) for line in received.splitlines()]
    assert messages == [*({"line": line} for line in told), {"code": protocol.OK}]
    assert conversation.is_over


def test_a_client_that_never_reads_is_given_up(endpoint: Endpoint) -> None:
    client = endpoint.client(b'{"do": "reload"}\n')
    ((_, conversation),) = endpoint.commands
    for _ in range(5000):
        conversation.line("x" * 500)
    assert conversation.is_over
    client.close()


def test_disconnect_ends_a_conversation_but_half_close_is_answered(
    endpoint: Endpoint,
) -> None:
    endpoint.client(b'{"do": "reload"}\n').close()
    endpoint.settle()
    quiet = endpoint.client(b'{"do": "reload"}\n')
    quiet.shutdown(socket.SHUT_WR)
    endpoint.settle()
    left, stays = (conversation for _, conversation in endpoint.commands)
    assert left.is_over
    left.line("to nobody")
    stays.end(protocol.OK)
    assert read(quiet) == [{"code": protocol.OK}]


def test_silent_clients_are_displaced_when_there_are_too_many(endpoint: Endpoint) -> None:
    silent = [endpoint.client(b"{"[: number % 2]) for number in range(100)]
    assert endpoint.client(b'{"do": "status"}\n').fileno() > 0
    ((_, conversation),) = endpoint.commands
    assert not conversation.is_over
    assert silent[0].recv(1) == b""
    silent[-1].setblocking(False)
    with pytest.raises(BlockingIOError):
        silent[-1].recv(1)
    for client in silent:
        client.close()


def test_clients_waiting_for_an_operation_are_not_displaced(endpoint: Endpoint) -> None:
    waiting = [endpoint.client(b'{"do": "reload"}\n') for _ in range(64)]
    (answer,) = read(endpoint.client(b'{"do": "status"}\n'))
    assert answer["code"] == protocol.BUSY
    assert not any(conversation.is_over for _, conversation in endpoint.commands)
    for client in waiting:
        client.close()


def test_daemon_keeps_working_while_clients_misbehave(running: Running) -> None:
    running.start_and_wait()
    path = str(protocol.socket_path(running.prefix / "run"))
    clients = []
    for number in range(300):
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        with contextlib.suppress(OSError):
            client.sendall((b"", b"{", b'{"do": "status"}\n', b"\xff\n")[number % 4])
        clients.append(client)
    assert running.ready()
    assert running.fdctl("status").returncode == protocol.OK
    for client in clients:
        client.close()
