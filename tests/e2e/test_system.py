"""Eight replicas, a router and a daemon, real processes and real signals: the promises of architecture.md."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from .conftest import System, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def complete(system: System, text: str, **fields: object) -> requests.Response:
    body = {"prompt": text, "max_tokens": 16, "ignore_eos": True, **fields}
    return requests.post(f"{system.url}/v1/completions", json=body, timeout=120)


def test_a_question_through_the_router_is_answered(system: System) -> None:
    answer = complete(system, "hello world")
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 16


def test_all_replicas_share_the_load_of_32_parallel_requests(system: System) -> None:
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda i: complete(system, f"request {i}", max_tokens=64), range(32)))
    assert [answer.status_code for answer in answers] == [200] * 32
    assert len({answer.headers["X-FD-Replica"] for answer in answers}) == system.replicas


def test_the_same_request_gives_the_same_text_on_every_replica(system: System) -> None:
    texts = set()
    for port in system.ports:
        answer = requests.post(
            f"http://127.0.0.1:{port}/v1/completions",
            json={"prompt": "hello", "max_tokens": 24, "seed": 7, "temperature": 0.8, "ignore_eos": True},
            timeout=60,
        )
        texts.add(answer.json()["choices"][0]["text"])
    assert len(texts) == 1


@pytest.mark.parametrize("victim", ["worker_process", "http_process", "replica_process"])
def test_replica_goes_down_with_a_killed_process_and_comes_back(system: System, victim: str) -> None:
    others = {i: system.worker_process(i).pid for i in range(system.replicas) if i != 3}
    family = [system.replica_process(3), system.http_process(3), system.worker_process(3)]

    getattr(system, victim)(3).kill()

    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    assert complete(system, "meanwhile").status_code == 200
    system.wait_ready()
    assert {i: system.worker_process(i).pid for i in others} == others


@pytest.mark.parametrize("victim", ["worker_process", "http_process", "replica_process"])
def test_streams_survive_a_replica_death_before_the_first_token(system: System, victim: str) -> None:
    family = [system.replica_process(5), system.http_process(5), system.worker_process(5)]
    port = system.metrics_ports[5]
    before = _metric(port, "requests_number_total")
    # A suspended worker keeps its requests waiting for their first tokens.
    system.worker_process(5).suspend()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(complete, system, "one", stream=True, seed=7) for _ in range(16)]
        wait_until(lambda: _metric(port, "requests_number_total") > before, "replica 5 has its share")
        getattr(system, victim)(5).kill()
        streams = [_events(answer.result()) for answer in answers]

    assert {stream[-1]["choices"][0]["finish_reason"] for stream in streams} == {"length"}
    assert len({"".join(event["choices"][0]["text"] for event in stream) for stream in streams}) == 1
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    system.wait_ready()


def test_a_killed_router_comes_back_with_its_replicas(system: System) -> None:
    status = system.status()
    assert status is not None
    workers = [system.worker_process(i).pid for i in range(system.replicas)]

    router = psutil.Process(status["router"]["pid"])
    family = [router, *router.children()]
    router.kill()

    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    wait_until(
        lambda: _registered(system) == system.replicas, "the router answers and has all replicas again"
    )
    system.wait_ready()
    assert [system.worker_process(i).pid for i in range(system.replicas)] == workers


def test_workers_keep_running_after_a_daemon_kill_and_are_adopted(system: System) -> None:
    workers = [system.worker_process(i).pid for i in range(system.replicas)]
    system.daemon.kill()
    system.daemon.wait()
    assert complete(system, "without a daemon").status_code == 200

    system.start_daemon()

    system.wait_ready()
    assert [system.worker_process(i).pid for i in range(system.replicas)] == workers


def test_a_killed_supervisord_leaves_no_orphan_and_everything_comes_back(system: System) -> None:
    old = [process for process in system.processes() if process.pid != system.daemon.pid]
    assert len(old) > 3 * system.replicas

    system.supervisord().kill()

    _, alive = psutil.wait_procs(old, timeout=60)
    assert alive == []
    system.wait_ready()
    assert complete(system, "after supervisord").status_code == 200


def test_fdctl_reload_changes_only_what_the_file_changed(system: System) -> None:
    workers = [system.worker_process(i).pid for i in range(system.replicas)]
    text = system.config.read_text()
    system.config.write_text(text.replace("[router]", '[router]\npolicy = "round_robin"'))

    reloaded = system.fdctl("reload")

    assert reloaded.returncode == 0, reloaded.stderr
    assert "router" in reloaded.stdout
    system.wait_ready()
    assert [system.worker_process(i).pid for i in range(system.replicas)] == workers


def test_invalid_config_is_refused_with_its_key_and_changes_nothing(system: System) -> None:
    workers = [system.worker_process(i).pid for i in range(system.replicas)]
    text = system.config.read_text()
    try:
        system.config.write_text(text.replace("max_num_seqs", "max_num_sequences"))
        reloaded = system.fdctl("reload")
    finally:
        system.config.write_text(text)
    assert reloaded.returncode != 0
    assert "max_num_sequences" in reloaded.stderr
    assert "max_num_seqs" in reloaded.stderr
    assert [system.worker_process(i).pid for i in range(system.replicas)] == workers


def test_ctrl_c_stops_everything_and_leaves_no_process(tmp_path: Path) -> None:
    one = System(tmp_path, replicas=2)
    try:
        one.wait_ready()
        assert len(one.processes()) > 6
    finally:
        one.stop()


def test_a_client_that_leaves_frees_its_replica(system: System) -> None:
    names = ("requests_number_total", "request_success_total", "generation_tokens_total")
    began, answered, tokens = (_sum(system, name) for name in names)
    with requests.post(
        f"{system.url}/v1/completions",
        json={"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 16},
        stream=True,
        timeout=60,
    ) as answer:
        next(answer.iter_lines())
    wait_until(lambda: _sum(system, "num_requests_running") == 0, "no sequence is running", deadline=30)
    assert _sum(system, names[0]) == began + 1
    # Texts that were not aborted would have run to their end, and would be counted here.
    assert _sum(system, names[1]) == answered
    assert tokens < _sum(system, names[2]) < tokens + 16 * 500


def _registered(system: System) -> int:
    try:
        return int(requests.get(f"{system.url}/registered_number", timeout=5).json()["mixed"])
    except requests.ConnectionError:
        return 0


def _events(answer: requests.Response) -> list[dict[str, Any]]:
    """Return the events of a complete stream, without the final [DONE]."""
    assert answer.status_code == 200, answer.text
    *events, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def _metric(port: int, name: str) -> float:
    lines = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"fastdeploy:{name} "))


def _sum(system: System, metric: str) -> float:
    """Return the metric's sum over all replicas."""
    return sum(_metric(port, metric) for port in system.metrics_ports)
