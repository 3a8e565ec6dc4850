"""Replicas that share the experts, as an operator runs them: the others survive the end of any replica, and
every text is the same as that of a replica with all experts.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from fastdeploy.daemon.config import loader as dp_toml
from fastdeploy.daemon.config.programs import expert_group_of
from fastdeploy.expert_parallel.memory_file import group_directory
from fastdeploy.expert_parallel.snapshot import Snapshot, read_snapshot

from ..checkpoints import config_json, draw_tensors, write_checkpoint
from ..ports import free_ports
from .conftest import BIN, MARKER, TINY_MODEL, System, marked_processes, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SEATS = (0, 1, 2)
PARALLEL = """
expert_parallel = true
collective_timeout = 6
"""
#: Tokens of texts that are still in progress at a kill, and of short texts.
LONG, SHORT = 300, 16
NUMBERS = range(12)
WITHOUT_A_WORD = "broken off without a word"

#: Texts by request number and number of tokens.
Expected = dict[tuple[int, int], str]


class Asked:
    """A request in a thread of its own; the answer so far can be read at any time."""

    def __init__(self, url: str, number: int, tokens: int, *, stream: bool) -> None:
        self.key = number, tokens
        self.stream = stream
        self.text = ""
        #: Reason why `text` is incomplete; empty if it is complete.
        self.problem = "not answered yet"
        self.replica: int | None = None
        self._url = f"{url}/v1/completions"
        # Greedy and sampled requests, with prompts of one block and of several.
        self._body = {
            "prompt": f"{number} " + ("hello world", "hello " * 30, "the sea")[number % 3],
            "max_tokens": tokens,
            "temperature": 0.8 * (number % 2),
            "seed": number,
            "ignore_eos": True,
            "stream": stream,
        }
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Asked:
        self._thread.join(120)
        assert self.ended, "an answer does not end"
        return self

    def _run(self) -> None:
        try:
            with requests.post(self._url, json=self._body, stream=True, timeout=120) as answer:
                self.replica = int(answer.headers.get("X-FD-Replica", -1))
                if answer.status_code != 200:
                    self.problem = f"status {answer.status_code}: {answer.text}"
                elif self.stream:
                    self._read_events(answer)
                else:
                    self.text = answer.json()["choices"][0]["text"]
                    self.problem = ""
        except requests.RequestException as error:
            self.problem = f"{WITHOUT_A_WORD}: {error!r}"

    def _read_events(self, answer: requests.Response) -> None:
        self.problem = WITHOUT_A_WORD
        error = ""
        for line in answer.iter_lines():
            data = line.removeprefix(b"data: ")
            if data == b"[DONE]":
                self.problem = error
            elif data:
                event = json.loads(data)
                if "error" in event:
                    self.problem = error = event["error"]["message"]
                else:
                    self.text += event["choices"][0]["text"]


class Command:
    """A server that is started by hand, with all of its descendants marked."""

    def __init__(self, log: Path, ports: list[int], module: str, *words: object) -> None:
        self.log = log
        self.ports = ports
        self.run = uuid.uuid4().hex
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"fastdeploy.entrypoints.openai.{module}", *map(str, words)],
                env={**os.environ, MARKER: self.run, "FD_LOG_DIR": str(log.with_suffix(""))},
                stdout=output,
                stderr=output,
            )

    @property
    def port(self) -> int:
        return self.ports[0]

    def wait_ready(self) -> None:
        wait_until(self.is_ready, f"servers on ports {self.ports} are ready")

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            answers = [requests.get(f"http://127.0.0.1:{port}/health", timeout=5) for port in self.ports]
        except requests.RequestException:
            return False
        return all(answer.status_code == 200 for answer in answers)

    def reason(self) -> str:
        """Return the line in which a server that ends by itself gives the reason."""
        assert self.process.wait(120) == 3
        (line,) = [line for line in self.log.read_text().splitlines() if "replica stops: " in line]
        return line

    def terminate(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0, self.log.read_text()
        assert marked_processes(self.run) == []

    def close(self) -> None:
        for process in marked_processes(self.run):
            process.kill()
        self.process.wait()


Start = Callable[..., Command]


@contextmanager
def commands(directory: Path, *groups: str) -> Iterator[Start]:
    """Yield a function that starts servers; finally kill those left and remove the groups."""
    started: list[Command] = []

    def start(ports: list[int], module: str, *words: object) -> Command:
        started.append(Command(directory / f"{len(started)}.log", ports, module, *words))
        return started[-1]

    try:
        yield start
    finally:
        for command in started:
            command.close()
        remove(*groups)


@pytest.fixture(scope="module")
def expected(model_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """Undisturbed texts of a replica that has all experts."""
    with commands(tmp_path_factory.mktemp("alone")) as start:
        ports = free_ports(1)
        server = start(ports, "api_server", "--model", TINY_MODEL, "--port", ports[0], "--max-num-seqs", 16)
        server.wait_ready()
        asked = [ask(server.port, number, tokens) for number in NUMBERS for tokens in (LONG, SHORT)]
        return {one.wait().key: one.text for one in asked}


@pytest.fixture(scope="module")
def system(model_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(tmp_path_factory.mktemp("fd"), len(SEATS), parallel=PARALLEL)
    groups = {group_of(running)}
    try:
        running.wait_ready()
        yield running
    finally:
        groups.add(group_of(running))
        try:
            running.stop()
        finally:
            remove(*groups)


def group_of(system: System) -> str:
    """Return the name of the expert group of the current dp.toml."""
    return expert_group_of(dp_toml.load(system.config, system.prefix))


def snapshot(group: str) -> Snapshot:
    found = read_snapshot(group)
    assert found is not None
    return found


def active(group: str) -> tuple[int, ...]:
    found = read_snapshot(group)
    return () if found is None else found.active


def workers(group: str) -> dict[int, int]:
    """Return the pid by seat."""
    return {seat.seat: seat.pid for seat in snapshot(group).seats}


def remove(*groups: str) -> None:
    """Remove groups whose ranks were all killed, so that no rank removed the memory."""
    for group in groups:
        shutil.rmtree(group_directory(group), ignore_errors=True)


def ask(port: int, number: int, tokens: int, *, stream: bool = False) -> Asked:
    return Asked(f"http://127.0.0.1:{port}", number, tokens, stream=stream)


def assert_right(asked: Iterable[Asked], expected: Expected) -> None:
    """Assert that each answer ended properly, with the undisturbed text."""
    done = [one.wait() for one in asked]
    assert {one.key: one.problem for one in done if one.problem} == {}
    wrong = [one for one in done if one.text != expected[one.key]]
    assert wrong == [], (wrong[0].text, expected[wrong[0].key])


def assert_right_so_far(one: Asked, expected: Expected) -> None:
    """Accept an answer that broke off with an error, if its text is correct so far."""
    if one.wait().problem:
        assert not one.problem.startswith(WITHOUT_A_WORD)
        assert expected[one.key].startswith(one.text)
    else:
        assert one.text == expected[one.key]


def metrics(port: int, prefix: str) -> dict[str, float]:
    lines = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text.splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line.startswith(prefix))
    return {name: float(value) for name, value in samples}


def retries(system: System, replica: int) -> float:
    """Return how many requests were retried at another replica after this one had failed."""
    name = f'fd_router_retries_total{{replica="{replica}"}}'
    return metrics(system.router_port, name).get(name, 0)


def resumes(system: System, replica: int) -> float:
    """Return how many streams another replica resumed after this one was lost."""
    name = f'fd_router_resumes_total{{replica="{replica}"}}'
    return metrics(system.router_port, name).get(name, 0)


def wait_replaced(system: System, group: str, seat: int, pid: int) -> None:
    """Wait until the daemon has restarted the replica, and it has taken its seat."""
    wait_until(
        lambda: active(group) == SEATS and workers(group)[seat] != pid, f"somebody else is in seat {seat}"
    )
    system.wait_ready()


def test_replicas_in_an_expert_group_generate_the_text_of_a_single_one(
    system: System, expected: Expected
) -> None:
    answer = system.fdctl("ep", "--json")
    assert answer.returncode == 0, answer.stderr
    (group,) = json.loads(answer.stdout)["groups"]
    assert (group["name"], group["active"], group["losses"]) == (group_of(system), list(SEATS), 0)
    assert [(seat["seat"], seat["state"]) for seat in group["seats"]] == [(seat, "active") for seat in SEATS]
    name = "fastdeploy:ep_active_seats"
    for port in system.metrics_ports:
        wait_until(lambda port=port: metrics(port, name) == {name: len(SEATS)}, "every replica tells of all")

    asked = [Asked(system.url, n, tokens, stream=n % 4 < 2) for n in NUMBERS for tokens in (LONG, SHORT)]
    assert_right(asked, expected)
    assert {one.replica for one in asked} == set(SEATS)
    # Each replica also computes alone, while the others have no work of their own.
    for seat in SEATS:
        assert_right([ask(system.ports[seat], seat, SHORT)], expected)


def load(system: System) -> list[Asked]:
    """Send work for all replicas; streams and whole answers alternate, so that each replica gets both."""
    return [Asked(system.url, n, LONG, stream=stream) for n in NUMBERS for stream in (True, False)]


def begun(asked: list[Asked]) -> bool:
    return all(one.text for one in asked if one.stream)


def kill_under_load(system: System, victim: int, expected: Expected) -> None:
    """SIGKILL the worker in a seat under load; other replicas must resume its streams."""
    asked = load(system)
    wait_until(lambda: begun(asked), "all streams have begun")
    victims = [one for one in asked if one.stream and one.replica == victim and not one.ended]
    os.kill(workers(group_of(system))[victim], signal.SIGKILL)
    assert victims
    assert_right(asked, expected)


def test_killed_worker_changes_no_text(system: System, expected: Expected) -> None:
    group, victim = group_of(system), 1
    pid, before = workers(group)[victim], snapshot(group)
    tried, resumed = retries(system, victim), resumes(system, victim)
    kill_under_load(system, victim, expected)
    assert retries(system, victim) > tried
    assert resumes(system, victim) > resumed
    wait_replaced(system, group, victim, pid)
    after = snapshot(group)
    assert (after.losses, after.joins) == (before.losses + 1, before.joins + 1)
    assert_right([Asked(system.url, n, SHORT, stream=False) for n in NUMBERS], expected)


def test_hanging_worker_is_killed_by_waiting_ranks_and_requests_survive(
    system: System, expected: Expected
) -> None:
    group, victim = group_of(system), 2
    pid, losses, tried = workers(group)[victim], snapshot(group).losses, retries(system, victim)
    os.kill(pid, signal.SIGSTOP)
    # No replica can finish a step without the stopped one, so its streams have no token when it is killed.
    asked = load(system)
    assert_right(asked, expected)
    assert victim not in {one.replica for one in asked}
    # At least its share; more if the router has not noticed yet that another replica is back.
    assert retries(system, victim) - tried >= len(asked) // len(SEATS)
    wait_replaced(system, group, victim, pid)
    assert snapshot(group).losses == losses + 1
    # The daemon's own timeout is longer; it knows that a waiting rank sent the signal 9.
    status = system.status()
    assert status is not None
    assert status["replicas"][victim]["cause"] == "hang"


def test_replica_lost_without_a_daemon_is_restored_by_the_next_daemon(
    system: System, expected: Expected
) -> None:
    group, victim = group_of(system), 0
    before, losses = workers(group), snapshot(group).losses
    asked = load(system)
    wait_until(lambda: begun(asked), "all streams have begun")
    system.daemon.kill()
    system.daemon.wait()
    assert_right(asked, expected)

    kill_under_load(system, victim, expected)
    wait_until(lambda: active(group) == SEATS[1:], "the dead rank is removed")
    assert_right([Asked(system.url, n, SHORT, stream=n % 2 == 0) for n in NUMBERS], expected)

    system.start_daemon()
    wait_replaced(system, group, victim, before[victim])
    after = workers(group)
    assert {seat: after[seat] for seat in SEATS[1:]} == {seat: before[seat] for seat in SEATS[1:]}
    assert snapshot(group).losses == losses + 1
    assert_right([Asked(system.url, n, SHORT, stream=False) for n in NUMBERS], expected)


def test_reload_moves_replicas_one_by_one_to_a_new_group_without_errors(
    system: System, expected: Expected
) -> None:
    old = group_of(system)
    system.config.write_text(system.config.read_text().replace("[engine]", "redundant_experts = 2\n[engine]"))
    new = group_of(system)
    losses = {snapshot(old).losses}
    asked: list[Asked] = []
    seen = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reload = pool.submit(system.fdctl, "reload")
        while not reload.done():
            # Limit the load, so that a replica finishes its requests within its grace period.
            if sum(not one.ended for one in asked) < len(SEATS):
                asked.append(Asked(system.url, len(asked) % len(NUMBERS), SHORT, stream=len(asked) % 2 == 0))
            if found := read_snapshot(old):
                losses.add(found.losses)
            if (now := (active(old), active(new))) not in seen:
                seen.append(now)
            time.sleep(0.01)
    assert reload.result().returncode == 0, reload.result().stderr
    assert_right(asked, expected)

    # One replica leaves the old group, loads and joins the new one; then the next.
    steps = [(SEATS[left:], SEATS[:came]) for came in range(len(SEATS)) for left in (came, came + 1)]
    steps.append(((), SEATS))
    assert seen == [step for step in steps if step in seen]
    # The other steps may be too short to be observed.
    assert set(steps[1::2]) <= set(seen)
    assert (len(losses), snapshot(new).losses) == (1, 0)
    assert not group_directory(old).exists()


def test_sigterm_ends_all_and_leaves_nothing_in_shared_memory(system: System, expected: Expected) -> None:
    """Stops the system, so it must be the last test that uses it."""
    asked = load(system)
    wait_until(lambda: begun(asked), "all streams have begun")
    system.stop(signal.SIGTERM)
    assert not group_directory(group_of(system)).exists()
    for one in asked:
        assert_right_so_far(one, expected)


class ByHand:
    """Servers of one group with three seats, each started by hand."""

    def __init__(self, start: Start, group: str) -> None:
        self.group = group
        self._start = start
        self.first = self.start(0)
        self.first.wait_ready()
        self.members = [self.first]
        # A second server for the same seat waits some seconds for the first one to end.
        self.second_for_a_seat = self.start(0)

    def start(self, seat: int, model: Path = TINY_MODEL) -> Command:
        ports = free_ports(1)
        words = ["--model", model, "--port", ports[0], "--data-parallel-size", 3]
        words += ["--local-data-parallel-id", seat]
        words += ["--enable-expert-parallel", "--expert-parallel-group", self.group]
        return self._start(ports, "api_server", *words)


@pytest.fixture(scope="module")
def by_hand(model_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByHand]:
    group = f"e2e-{uuid.uuid4().hex[:8]}"
    with commands(tmp_path_factory.mktemp("by-hand"), group) as start:
        yield ByHand(start, group)


def test_servers_that_are_started_by_hand_join_one_after_the_other(
    by_hand: ByHand, expected: Expected
) -> None:
    assert active(by_hand.group) == (0,)
    assert_right([ask(by_hand.first.port, n, SHORT) for n in NUMBERS], expected)
    by_hand.members += [by_hand.start(2), by_hand.start(1)]
    while not all(server.is_ready() for server in by_hand.members):
        # The others join while the first one generates.
        assert_right([ask(by_hand.first.port, n, SHORT) for n in NUMBERS], expected)
    assert active(by_hand.group) == (0, 1, 2)
    assert_right([ask(server.port, n, SHORT) for server in by_hand.members for n in NUMBERS], expected)


def test_servers_of_one_launcher_form_a_group_and_leave_nothing(tmp_path: Path, expected: Expected) -> None:
    ports = free_ports(2)
    group = f"port-{ports[0]}"
    with commands(tmp_path, group) as start:
        words = ("--args", "--model", TINY_MODEL, "--enable-expert-parallel")
        launcher = start(
            ports, "multi_api_server", "--num-servers", 2, "--ports", ",".join(map(str, ports)), *words
        )
        launcher.wait_ready()
        shown = subprocess.run(
            [BIN / "fdctl", "ep", group, "--json"], capture_output=True, text=True, check=True
        )
        assert [found["active"] for found in json.loads(shown.stdout)["groups"]] == [[0, 1]]
        assert_right([ask(port, n, SHORT) for port in ports for n in NUMBERS], expected)
        launcher.terminate()
        assert not group_directory(group).exists()


def test_server_that_cannot_join_its_group_says_why_and_group_continues(
    by_hand: ByHand, expected: Expected, tmp_path: Path
) -> None:
    config = config_json(vocab_size=512, moe_num_experts=4)
    write_checkpoint(tmp_path, config, draw_tensors(config, seed=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, tmp_path)
    before, holder = snapshot(by_hand.group), workers(by_hand.group)[0]

    line = by_hand.start(1, model=tmp_path).reason()
    assert "replica stops: rank 1 (pid " in line
    assert f"cannot join the expert group of rank 0 (pid {holder})" in line
    assert f"checkpoint is '{tmp_path}' here and '{TINY_MODEL}' there" in line
    assert "num_experts is 4 here and 8 there" in line
    line = by_hand.second_for_a_seat.reason()
    assert f"rank 0 of expert group {by_hand.group} is held by pid {holder}" in line

    after = snapshot(by_hand.group)
    assert (after.epoch, after.active, after.losses) == (before.epoch, before.active, 0)
    assert_right([ask(server.port, n, SHORT) for server in by_hand.members for n in NUMBERS], expected)


def test_servers_that_end_leave_the_group_and_the_last_one_leaves_nothing(
    by_hand: ByHand, expected: Expected
) -> None:
    by_hand.second_for_a_seat.close()
    while by_hand.members:
        last = by_hand.members.pop()
        last.terminate()
        assert_right([ask(server.port, n, SHORT) for server in by_hand.members for n in NUMBERS], expected)
    assert not group_directory(by_hand.group).exists()
