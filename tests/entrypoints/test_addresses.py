"""A host with several addresses: servers listen on all of them, and the router gets one."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fastdeploy.common.addresses import addresses_of, authority, is_loopback, is_wildcard
from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.config.programs import address, connectable

from ..ports import free_ports
from ..router.conftest import RouterProcess
from .conftest import TINY, ApiServer, wait_until

HOSTS = """127.0.0.1 localhost
::1 localhost ip6-localhost
127.0.0.1 partly
203.0.113.9 partly foreign
"""
API_SERVER = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server", "--model", str(TINY)]
LAUNCHER = [sys.executable, "-m", "fastdeploy.entrypoints.openai.multi_api_server", "--num-servers", "1"]


@pytest.fixture(scope="module")
def with_hosts(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """A command prefix for processes that see the hosts file of these tests."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    file = tmp_path_factory.mktemp("hosts") / "hosts"
    file.write_text(HOSTS)
    launcher = ["unshare", "-m", "sh", "-c", f'mount --bind {file} /etc/hosts && exec "$@"', "sh"]
    tried = subprocess.run([*launcher, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no mount namespace of our own: {tried.stderr.strip()}")
    return launcher


def status_of(host: str, port: int, path: str) -> int:
    with urllib.request.urlopen(f"http://{authority(host, port)}{path}", timeout=20) as answer:
        return int(answer.status)


def test_a_name_is_served_on_all_of_its_addresses(tmp_path: Path, with_hosts: Sequence[str]) -> None:
    router = RouterProcess(tmp_path, "--host", "localhost", launcher=with_hosts)
    try:
        flags = ["--host", "localhost", "--router", f"localhost:{router.port}"]
        with ApiServer(tmp_path, *flags, launcher=with_hosts) as replica:
            wait_until(router.urls, "the router has the replica")
            for host in ("127.0.0.1", "::1"):
                assert status_of(host, router.port, "/v1/models") == 200
                assert status_of(host, replica.port, "/v1/models") == 200
                assert status_of(host, replica.metrics_port, "/metrics") == 200
            assert replica.stop() == 0
    finally:
        router.stop()


def test_a_replica_on_an_ipv6_literal_is_of_use_to_the_router(
    tmp_path: Path, with_hosts: Sequence[str]
) -> None:
    router = RouterProcess(tmp_path)
    try:
        with ApiServer(tmp_path, "--host", "::1", "--router", router.url) as replica:
            url = f"http://[::1]:{replica.port}"
            wait_until(lambda: url in router.urls(), "the router has the replica")
            assert router.get("/v1/models").status_code == 200
            replica.process.terminate()
            assert replica.process.wait(60) == 0
    finally:
        router.stop()


@pytest.mark.parametrize("command", [API_SERVER, LAUNCHER], ids=["api_server", "multi_api_server"])
def test_a_name_of_another_machine_is_refused_in_one_line(
    tmp_path: Path, with_hosts: Sequence[str], command: list[str]
) -> None:
    port = free_ports(1)[0]
    arguments = ["--host", "foreign", "--port", str(port)]
    if command is LAUNCHER:
        arguments = ["--ports", str(port), "--args", "--model", str(TINY), "--host", "foreign"]
    run = start_in_vain([*with_hosts, *command, *arguments], tmp_path)
    assert "'foreign' resolves to 203.0.113.9, which this machine does not have" in run


def test_a_port_that_is_taken_on_one_address_of_a_name_is_refused(
    tmp_path: Path, with_hosts: Sequence[str]
) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        run = start_in_vain([*with_hosts, *API_SERVER, "--host", "localhost", "--port", str(port)], tmp_path)
    assert f"--port: port {port} on ::1 is taken" in run


def start_in_vain(command: Sequence[str], directory: Path) -> str:
    """Run a command that refuses to start; return its last line."""
    run = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=60, env={"FD_LOG_DIR": str(directory)}
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr.splitlines()[-1]


def test_addresses_that_a_machine_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, 0, 0, "", (ip, 0, 0, 0)) for ip in ("2001:db8::9", "203.0.113.9", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert addresses_of("partly") == ("127.0.0.1",)


@pytest.mark.parametrize("host", ["", "[::1]", "no such name", "nowhere.invalid", "a" * 300])
def test_invalid_host_is_a_one_line_error(host: str) -> None:
    with pytest.raises(ConfigError, match=r"use for example 127\.0\.0\.1 or 0\.0\.0\.0") as refused:
        addresses_of(host)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("of", "yes", "no"),
    [
        (is_wildcard, ["0.0.0.0", "::", "0:0::0"], ["127.0.0.1", "localhost", "", "::1"]),
        (
            is_loopback,
            ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"],
            ["", "10.0.0.1", "::ffff:10.0.0.1"],
        ),
    ],
)
def test_kinds_of_addresses(of: Callable[[str], bool], yes: list[str], no: list[str]) -> None:
    assert [all(map(of, yes)), any(map(of, no))] == [True, False]


def test_a_wildcard_is_reached_by_loopback_of_its_family() -> None:
    assert [connectable(host) for host in ("0.0.0.0", "", "::", "0::0", "::1", "localhost")] == [
        *("127.0.0.1", "127.0.0.1", "::1", "::1", "::1", "localhost")
    ]
    assert address("::", 1) == "[::1]:1"
