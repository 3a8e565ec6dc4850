"""The worker as a real process, driven over its socket as the API process drives it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy.common.messages import (
    AbortRequests,
    Failed,
    Hello,
    LoadProgress,
    Ready,
    Shutdown,
    StepOutputs,
)
from fastdeploy.common.request import FinishReason
from fastdeploy.config import EngineConfig
from fastdeploy.custom_ops import numeric_version

from ..cpu_library import ENVIRONMENT, PATHS
from .worker_api import AS_MODULE, CONFIG, DEADLINE_S, FIXTURES, TOKEN, Api, request


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Api]]:
    started: list[Api] = []

    def start_one(config: EngineConfig = CONFIG, *arguments: str, forked: bool = False, **env: str) -> Api:
        started.append(Api(config, tmp_path / "log", *arguments, forked=forked, **env))
        return started[-1]

    yield start_one
    for api in started:
        api.close()


@pytest.fixture(params=PATHS)
def start_on_each(request: pytest.FixtureRequest, start: Callable[..., Api]) -> Callable[..., Api]:
    """Start workers that compute through Paddle, or through libfd_cpu.so."""

    def through_library(config: EngineConfig = CONFIG) -> Api:
        return start(replace(config, device="gpu"), **ENVIRONMENT)

    return start if request.param == "paddle" else through_library


def reference(number: int) -> tuple[list[int], list[int]]:
    arrays = np.load(FIXTURES / "tiny_reference.npz")
    return arrays[f"prompt_{number}"].tolist(), arrays[f"greedy_{number}"].tolist()


def test_a_worker_says_hello_loads_and_is_ready_in_this_order(start_on_each: Callable[..., Api]) -> None:
    api = start_on_each()
    assert api.receive() == Hello(TOKEN, api.process.pid)
    fractions = []
    while isinstance(message := api.receive(), LoadProgress):
        fractions.append(message.fraction)
    version = f"{numeric_version()}/{CONFIG.weight_format}"
    assert message == Ready(8 * 512 // 16, block_size=16, max_model_len=512, numeric_version=version)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert Path(f"/proc/{api.process.pid}/comm").read_text().strip() == "fd-worker-0"


def test_reference_texts_come_out_of_one_batch_and_sigterm_ends_with_0(
    start_on_each: Callable[..., Api],
) -> None:
    api = start_on_each()
    api.receive_until(Ready)
    references = [reference(number) for number in range(8)]
    # Run it twice: the second time, prompts are found in the prefix cache.
    for run in "ab":
        requests = [request(f"{run}{i}", prompt) for i, (prompt, _) in enumerate(references)]
        texts = api.generate(requests)
        assert [texts[one.request_id] for one in requests] == [greedy for _, greedy in references]
    resting = api.receive_stats_when(lambda message: message.stats.num_running == 0)
    assert resting.stats.prefix_cache_hit_tokens_total > 0
    assert resting.stats.num_free_blocks == resting.stats.num_blocks

    # The worker is idle, waiting for messages.
    api.process.terminate()
    assert api.process.wait(DEADLINE_S) == 0


def test_reference_texts_survive_preemption_and_any_chunks(start_on_each: Callable[..., Api]) -> None:
    api = start_on_each(replace(CONFIG, num_gpu_blocks_override=32, max_num_batched_tokens=37))
    api.receive_until(Ready)
    references = [reference(number) for number in range(8)]
    texts = api.generate([request(f"{i}", prompt) for i, (prompt, _) in enumerate(references)])
    assert list(texts.values()) == [greedy for _, greedy in references]
    resting = api.receive_stats_when(lambda message: message.stats.num_running == 0)
    assert resting.stats.preemptions_total > 0


def test_an_abort_frees_everything_and_says_so_at_once(start_on_each: Callable[..., Api]) -> None:
    api = start_on_each()
    api.receive_until(Ready)
    for name in ("one", "two"):
        api.send(request(name, [5, 6, 7], max_tokens=400))
    api.receive_stats_when(lambda message: message.stats.num_running == 2)
    api.send(AbortRequests(["one", "two", "unknown"]))
    # A step that was computed ahead may still end.
    last = api.receive_stats_when(
        lambda message: message.stats.num_running == message.stats.batch_tokens == 0
    )
    assert last.outputs == []
    assert last.stats.num_free_blocks == last.stats.num_blocks
    assert api.generate([request("three", [5, 6, 7], max_tokens=3)])["three"]

    # The worker is busy.
    api.send(request("four", [5, 6, 7], max_tokens=400))
    api.receive_until(StepOutputs)
    api.process.terminate()
    assert api.process.wait(DEADLINE_S) == 0


def test_request_aborted_before_its_first_step_is_acknowledged(
    start: Callable[..., Api],
) -> None:
    """Without an answer, a progress check would wait for a step forever."""
    api = start()
    api.receive_until(Ready)
    api.process.send_signal(signal.SIGSTOP)
    api.send(request("one", [5, 6, 7]))
    api.send(AbortRequests(["one"]))
    api.process.send_signal(signal.SIGCONT)
    word = api.receive_until(StepOutputs)
    assert (word.stats.num_running, word.stats.num_waiting) == (0, 0)


def test_shutdown_ends_with_0_also_while_loading(start: Callable[..., Api]) -> None:
    api = start()
    api.receive_until(Hello)
    api.send(Shutdown())
    assert api.process.wait(DEADLINE_S) == 0


def test_sigterm_while_loading_exits_0_and_sigint_is_ignored(
    start: Callable[..., Api],
) -> None:
    api = start()
    api.receive_until(LoadProgress)
    api.process.send_signal(signal.SIGINT)
    api.process.terminate()
    assert api.process.wait(DEADLINE_S) == 0
    assert "Traceback" not in api.log()


def test_the_death_of_its_parent_kills_it(start: Callable[..., Api]) -> None:
    # An intermediate process starts the worker, as the API process would, and is killed.
    parent = (
        "import os, subprocess, sys\n"
        "os.environ['FD_PARENT_PID'] = str(os.getpid())\n"
        "subprocess.run([sys.executable, *sys.argv[1:]])"
    )
    api = start(CONFIG, "-c", parent, *AS_MODULE)
    hello = api.receive_until(Hello)
    assert hello.pid != api.process.pid
    worker = os.pidfd_open(hello.pid)
    try:
        api.process.kill()
        assert select.select([worker], [], [], DEADLINE_S)[0], "the worker has outlived its parent"
    finally:
        os.close(worker)


def test_worker_is_killed_if_its_parent_died_during_startup(
    start: Callable[..., Api],
) -> None:
    # Not our pid: as if the parent had died and another process had adopted the worker.
    api = start(FD_PARENT_PID="1")
    assert api.process.wait(DEADLINE_S) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model": Path("/nonexistent")},
            "/nonexistent/config.json: no such file; a checkpoint directory needs it",
        ),
        (
            # Heads of 16 columns: refused where there is a GPU, too.
            {"device": "gpu"},
            "--device is 'gpu', but ",
        ),
    ],
)
def test_a_worker_that_cannot_start_says_why_in_one_line(
    start: Callable[..., Api], change: dict[str, Any], said: str
) -> None:
    api = start(replace(CONFIG, **change))
    while not isinstance(message := api.receive(), Failed):
        pass
    assert said in message.message
    assert "\n" not in message.message
    assert api.process.wait(DEADLINE_S) == 1
    assert "Traceback" not in api.log()


def test_worker_starts_without_a_writable_home_directory(start: Callable[..., Api], tmp_path: Path) -> None:
    # This also stops root: no directory can be created below a file.
    (tmp_path / ".cache").touch()
    api = start(HOME=str(tmp_path), TMPDIR="/nonexistent")
    api.receive_until(Ready)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == [".cache"]


def test_a_damaged_checkpoint_is_named(start: Callable[..., Api], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (FIXTURES / "tiny").iterdir():
        content = file.read_bytes()
        (model / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
    api = start(replace(CONFIG, model=model))
    while not isinstance(message := api.receive(), Failed):
        pass
    assert "model.safetensors" in message.message
    assert api.process.wait(DEADLINE_S) == 1


def test_a_warning_is_one_line(start: Callable[..., Api], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (FIXTURES / "tiny").iterdir():
        (model / file.name).symlink_to(file)
    (model / "config.json").unlink()
    raw = json.loads((FIXTURES / "tiny" / "config.json").read_text()) | {"max_position_embeddings": 256}
    (model / "config.json").write_text(json.dumps(raw))
    api = start(replace(CONFIG, model=model, data_parallel_rank=1, data_parallel_size=2))
    api.receive_until(Ready)
    (warning,) = [line for line in api.log().splitlines() if "WARNING" in line]
    assert " replica=1 " in warning
    assert "--max-model-len 512 exceeds max_position_embeddings 256" in warning


def test_sigusr2_shows_where_it_is_and_changes_nothing(start: Callable[..., Api]) -> None:
    api = start()
    api.receive_until(Ready)
    api.process.send_signal(signal.SIGUSR2)
    assert api.generate([request("one", [5, 6, 7], max_tokens=3)])["one"]
    assert "(most recent call first)" in api.stderr()
    assert "worker.py" in api.stderr()


def test_steps_that_keep_failing_end_the_worker_and_it_says_why(start: Callable[..., Api]) -> None:
    broken = (
        "import sys\n"
        "from fastdeploy.device.paddle_cpu import ModelRunner\n"
        "from fastdeploy.core.worker import main\n"
        "def execute(self, batch): raise RuntimeError('no such kernel')\n"
        "ModelRunner.execute = execute\n"
        "sys.exit(main())"
    )
    api = start(CONFIG, "-c", broken)
    api.receive_until(Ready)
    for name in ("one", "two"):
        api.send(request(name, [5, 6, 7]))
        (output,) = api.receive_stats_when(lambda message: bool(message.outputs)).outputs
        assert (output.request_id, output.finish_reason) == (name, FinishReason.ERROR)
    api.send(request("three", [5, 6, 7]))
    while not isinstance(message := api.receive(), Failed):
        pass
    assert message.message == "3 consecutive steps have failed, the last with RuntimeError('no such kernel')"
    assert api.process.wait(DEADLINE_S) == 1


def test_a_broken_device_ends_the_worker_with_a_status_of_its_own(start: Callable[..., Api]) -> None:
    broken = (
        "import sys\n"
        "from fastdeploy.device.errors import DeviceBroken\n"
        "from fastdeploy.device.paddle_cpu import ModelRunner\n"
        "from fastdeploy.core.worker import main\n"
        "def execute(self, batch): raise DeviceBroken('GPU: a step: unspecified launch failure')\n"
        "ModelRunner.execute = execute\n"
        "sys.exit(main())"
    )
    api = start(CONFIG, "-c", broken)
    api.receive_until(Ready)
    api.send(request("one", [5, 6, 7]))
    while not isinstance(message := api.receive(), Failed):
        pass
    assert message.message == "GPU: a step: unspecified launch failure"
    assert api.process.wait(DEADLINE_S) == 75


def test_worker_started_by_hand_names_its_launcher() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FD_")}
    done = subprocess.run(
        [sys.executable, "-m", "fastdeploy.core.worker"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "fastdeploy.core.worker: FD_ENGINE_CONFIG is not set; this process is started by the API server"
    )
