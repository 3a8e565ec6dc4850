"""Reserved ports for servers that start later: no other process gets them in the meantime."""

import random
import socket
from pathlib import Path

import pytest

from fastdeploy.common import ports


def test_ports_that_are_found_differ_and_can_be_listened_on() -> None:
    found = ports.find_free(50)
    assert len(set(found)) == 50
    for port in found:
        socket.create_server(("127.0.0.1", port)).close()


def test_reserved_ports_are_not_used_for_connections() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not [port for port in ports.find_free(50) if first <= port <= last]


def test_two_processes_with_the_same_seed_find_others() -> None:
    finds = []
    for _ in range(2):
        random.seed(1)
        finds.append(ports.find_free(50))
    assert finds[0] != finds[1]


def test_ephemeral_ports_are_used_if_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = tmp_path / "range"
    everything.write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "_RANGE", everything)
    assert len(set(ports.find_free(3))) == 3


def test_a_port_that_is_taken_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connections = tmp_path / "range"
    connections.write_text(f"{ports._LOWEST + 1} 65535\n")
    monkeypatch.setattr(ports, "_RANGE", connections)
    with socket.create_server(("127.0.0.1", ports._LOWEST)):
        assert ports.find_free(1) != [ports._LOWEST]
    assert ports.find_free(1) == [ports._LOWEST]
