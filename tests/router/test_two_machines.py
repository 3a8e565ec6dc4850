"""Two routers on two machines, which are network namespaces, with one board behind Redis."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from ..waiting import wait_until
from .conftest import FD_ROUTER

ROOT = Path(__file__).resolve().parents[2]
KEY = "between-machines"


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


class Machine:
    """A namespace with one address, reachable from the test process."""

    def __init__(self, number: int, bridge: str, network: str, directory: Path) -> None:
        self.name = f"{bridge}-{number}"
        self.address = f"{network}.{number}"
        self.directory = directory / self.name
        self.directory.mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []
        link = f"{bridge}v{number}"
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        run("ip", "link", "set", link, "master", bridge, "up")
        run("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", self.name, "link", "set", device, "up")

    def start(self, *words: str, **env: str) -> subprocess.Popen[bytes]:
        self._processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", self.name, *words],
                cwd=ROOT,
                env={**os.environ, "FD_LOG_DIR": str(self.directory), **env},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return self._processes[-1]

    def start_router(self, redis: str, network: str, keys: Path) -> subprocess.Popen[bytes]:
        flags = ["--host", self.address, "--allow-host", f"{network}.0/24", "--register-keys-file", str(keys)]
        flags += ["--admin-socket", str(self.directory / "admin.sock"), "--health-check-interval-secs", "0.5"]
        return self.start(str(FD_ROUTER), *flags, FD_ROUTER_BOARD_URL=redis)

    @property
    def url(self) -> str:
        return f"http://{self.address}:30000"

    def up(self) -> set[str]:
        try:
            entries = requests.get(f"{self.url}/registered", timeout=5).json()["mixed"]
        except requests.ConnectionError:
            return set()
        return {entry["url"] for entry in entries if not entry["draining"]}

    def register(self, other: Machine, key: str = KEY) -> requests.Response:
        info = {"role": "mixed", "host_ip": other.address, "port": 8000}
        headers = {"Authorization": f"Bearer {key}"}
        return requests.post(f"{self.url}/register", json=info, headers=headers, timeout=10)

    def ask(self, seconds: float = 0.0) -> str:
        answer = requests.post(f"{self.url}/v1/completions", json={"seconds": seconds}, timeout=60)
        assert answer.status_code == 200, answer.text
        engine: str = answer.json()["engine"]
        return engine

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(20)
        # The namespace and its link end with its last process.
        run("ip", "netns", "del", self.name)


@pytest.fixture
def network() -> str:
    return f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 256}"


@pytest.fixture
def machines(network: str, tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    missing = [name for name in ("ip", "redis-server") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: apt-get install iproute2 redis-server")
    bridge = f"fd{uuid.uuid4().hex[:6]}"
    try:
        run("ip", "netns", "add", bridge)
        run("ip", "netns", "del", bridge)
        run("ip", "link", "add", bridge, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    with contextlib.ExitStack() as held:
        held.callback(run, "ip", "link", "del", bridge)
        run("ip", "addr", "add", f"{network}.254/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        both = []
        for number in (1, 2):
            both.append(Machine(number, bridge, network, tmp_path))
            held.callback(both[-1].end)
        yield both[0], both[1]


@pytest.mark.timeout(180)
def test_two_routers_share_state_and_counts_of_a_dead_router_expire(
    machines: tuple[Machine, Machine], network: str, tmp_path: Path
) -> None:
    one, two = machines
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    one.start("redis-server", "--bind", one.address, "--port", "6379", "--protected-mode", "no", "--save", "")
    redis = f"redis://{one.address}:6379/0"
    first = one.start_router(redis, network, keys)
    two.start_router(redis, network, keys)
    for machine in machines:
        machine.start(
            *(sys.executable, "-m", "tests.router.machine_engine", machine.address, "8000", machine.name)
        )
    urls = {machine.name: f"http://{machine.address}:8000" for machine in machines}

    # The test process is on a third machine, so it needs the key.
    wait_until(lambda: _status(one) == _status(two) == 200, "both routers answer", deadline=60)
    assert one.register(one, key="wrong").status_code == 401
    # Each replica registers with the router of its machine; both routers learn of both.
    wait_until(lambda: one.register(one).status_code == 200, "the first is registered", deadline=60)
    wait_until(lambda: two.register(two).status_code == 200, "the second is registered", deadline=60)
    for machine in machines:
        wait_until(lambda m=machine: m.up() == set(urls.values()), f"{machine.name} knows both", deadline=60)

    # An order applies to both routers, too.
    order(two, urls[two.name], "drain")
    wait_until(lambda: one.up() == {urls[one.name]}, "the drain has come to the other router", deadline=60)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        slow = [pool.submit(one.ask, 600.0) for _ in range(6)]
        wait_until(lambda: in_flight(one)[urls[one.name]] == 6, "six are at the first replica", deadline=60)
        order(two, urls[two.name], "undrain")
        wait_until(lambda: two.up() == set(urls.values()), "the second takes requests again", deadline=60)

        elsewhere = "in_flight_elsewhere"
        wait_until(lambda: in_flight(two, elsewhere)[urls[one.name]] == 6, "they are known", deadline=60)

        # The second router has sent the first replica nothing, but knows that it is busy.
        assert Counter(two.ask() for _ in range(6)) == {two.name: 6}

        first.send_signal(signal.SIGKILL)
        for each in slow:
            with pytest.raises(requests.ConnectionError):
                each.result(60)
    # The counts of the killed router expire.
    wait_until(lambda: {two.ask() for _ in range(4)} == set(urls), "its counts have expired", deadline=60)


def order(machine: Machine, url: str, what: str) -> None:
    """Give the order on the machine itself: /admin accepts no other clients."""
    name = url.removeprefix("http://")
    ended = subprocess.run(
        [
            *("ip", "netns", "exec", machine.name, "curl", "-s", "--fail", "--unix-socket"),
            *(str(machine.directory / "admin.sock"), "-X", "POST", f"http://x/admin/replicas/{name}/{what}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout


def in_flight(machine: Machine, which: str = "in_flight") -> dict[str, int]:
    found = requests.get(f"{machine.url}/registered", timeout=5).json()
    return {entry["url"]: entry[which] for entry in found["mixed"] + found["down"]}


def _status(machine: Machine) -> int:
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(f"{machine.url}/health", timeout=5).status_code
    return 0
