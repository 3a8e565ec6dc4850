"""Replicas that hang and replicas that are merely busy, with real engines and real signals."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from ..checkpoints import config_json, draw_tensors, write_checkpoint
from .conftest import TINY_MODEL, System, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

#: In seconds; a chunk of the long prompt takes a tenth of it, the whole prompt several times as long.
NO_PROGRESS_TIMEOUT = 3.0
SUPERVISE = f"""
backoff_first = 0.2
budget = 100
no_progress_timeout = {NO_PROGRESS_TIMEOUT}
idle_probe = 2
probe_interval = 0.5
unhealthy_after = 3
unhealthy_kill_after = 6
"""
LONG_PROMPT = """
extra_args = ["--max-model-len=12288", "--num-gpu-blocks-override=256", "--max-num-batched-tokens=64"]
"""


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for which a prompt of 8k tokens takes a while."""
    model = tmp_path_factory.mktemp("slow") / "model"
    config = config_json(
        model_type="ernie4_5",
        hidden_size=256,
        num_hidden_layers=6,
        vocab_size=json.loads((TINY_MODEL / "config.json").read_text())["vocab_size"],
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        intermediate_size=1024,
        max_position_embeddings=16384,
    )
    write_checkpoint(model, config, draw_tensors(config, seed=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, model / name)
    return model


@pytest.fixture(scope="module")
def system(model_cache: None, slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    running = System(
        tmp_path_factory.mktemp("fd"), replicas=2, model=slow_model, engine=LONG_PROMPT, supervise=SUPERVISE
    )
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


def entry(system: System, replica: int) -> dict[str, Any]:
    status = system.status()
    assert status is not None
    return status["replicas"][replica]


def output(system: System, replica: int) -> str:
    return (system.prefix / "logs" / f"replica{replica}" / "output.log").read_text(errors="replace")


def log(system: System) -> str:
    return (system.prefix / "logs" / "fd-dp.log").read_text()


def wait_back(system: System, replica: int, old: psutil.Process) -> dict[str, Any]:
    """Wait until the old process is gone and another is READY in its place; return its status entry."""
    wait_until(lambda: not old.is_running(), f"replica {replica} killed")
    system.wait_ready()
    return entry(system, replica)


def test_long_prompt_is_not_a_hang(system: System) -> None:
    before = [system.replica_process(i).pid for i in range(2)]
    began = time.monotonic()
    body = {"prompt": [5 + i % 50 for i in range(8192)], "max_tokens": 1, "ignore_eos": True}
    seen = set()
    with requests.Session() as session:
        answer: list[requests.Response] = []
        asking = threading.Thread(
            target=lambda: answer.append(
                session.post(f"http://127.0.0.1:{system.ports[0]}/v1/completions", json=body, timeout=300)
            )
        )
        asking.start()
        while asking.is_alive():
            health = requests.get(f"http://127.0.0.1:{system.ports[0]}/health", timeout=60).json()["worker"]
            if health["requests"]:
                seen.add(health["steps"])
            asking.join(0.2)
    assert answer[0].status_code == 200, answer[0].text
    assert time.monotonic() - began > NO_PROGRESS_TIMEOUT, "the prompt was too short to tell anything"
    assert len(seen) > 5, "progress is told chunk by chunk"
    assert [system.replica_process(i).pid for i in range(2)] == before
    assert "hangs" not in log(system)


def test_worker_stopped_under_load_logs_its_stacks_and_comes_back(system: System) -> None:
    body = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True, "seed": 7}
    with requests.post(f"{system.url}/v1/completions", json=body, stream=True, timeout=120) as stream:
        victim = int(stream.headers["X-FD-Replica"])
        arbiter, worker = system.replica_process(victim), system.worker_process(victim)
        lines = stream.iter_lines()
        assert next(lines)
        worker.send_signal(signal.SIGSTOP)
        events = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
    # The router resumed the stream at the other replica.
    assert events[-1] == b"[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"

    after = wait_back(system, victim, arbiter)
    assert (after["cause"], after["restarts"]) == ("hang", 1)
    # The daemon's probe may be in flight as well.
    assert re.search(
        rf"replica {victim}: ERROR \(hangs: no step for \d+ s, requests in flight: [12]\)", log(system)
    )
    told = output(system, victim)
    assert re.search(r'File ".*/worker\.py", line \d+ in serve$', told, re.MULTILINE), "the worker's stacks"
    assert re.search(r'File ".*/engine_client\.py", line \d+ in _run$', told, re.MULTILINE), (
        "and its parent's"
    )


def test_an_idle_worker_that_is_stopped_is_found_by_asking_it_for_a_token(system: System) -> None:
    arbiter = system.replica_process(1)
    system.worker_process(1).send_signal(signal.SIGSTOP)
    assert wait_back(system, 1, arbiter)["cause"] == "hang"


def test_an_http_process_that_is_stopped_is_found_by_its_silence(system: System) -> None:
    arbiter, http = system.replica_process(0), system.http_process(0)
    before = output(system, 0).count("in select")
    http.send_signal(signal.SIGSTOP)
    assert wait_back(system, 0, arbiter)["cause"] == "hang"
    # Either check may detect it first.
    assert re.search(
        r"replica 0: ERROR \((no successful health check for 6 s|idle, but no token)", log(system)
    )
    assert output(system, 0).count("in select") > before, "its loop's stack"


@pytest.mark.parametrize(
    "ends",
    [
        [("worker_process", signal.SIGSEGV, "crash"), ("worker_process", signal.SIGTERM, "operator")],
        [("http_process", signal.SIGKILL, "killed"), ("replica_process", signal.SIGTERM, "operator")],
    ],
)
def test_cause_of_the_exit_is_reported(system: System, ends: list[tuple[str, signal.Signals, str]]) -> None:
    arbiters = [system.replica_process(i) for i in range(2)]
    for replica, (victim, number, _) in enumerate(ends):
        getattr(system, victim)(replica).send_signal(number)
    for replica, (_, _, cause) in enumerate(ends):
        assert wait_back(system, replica, arbiters[replica])["cause"] == cause


def test_only_the_rank_that_the_others_wait_for_is_killed(model_cache: None, tmp_path: Path) -> None:
    parallel = "expert_parallel = true\ncollective_timeout = 120"
    supervise = "backoff_first = 0.2\nno_progress_timeout = 2\nidle_probe = 0\nprobe_interval = 0.5"
    system = System(tmp_path, replicas=2, parallel=parallel, supervise=supervise)
    try:
        system.wait_ready()
        arbiters = [system.replica_process(i) for i in range(2)]
        # The stopped replica has no requests itself, but the other needs its experts.
        system.worker_process(1).send_signal(signal.SIGSTOP)
        body = {"prompt": "hello", "max_tokens": 8, "ignore_eos": True}
        answer = requests.post(f"http://127.0.0.1:{system.ports[0]}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200
        assert wait_back(system, 1, arbiters[1])["cause"] == "hang"
        assert system.replica_process(0).pid == arbiters[0].pid
        assert "replica 1: ERROR (hangs: other ranks have waited" in log(system)
    finally:
        system.stop()
