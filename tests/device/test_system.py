"""fd-dp with two replicas on one GPU: workers are killed and replicas replaced under streams."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from random import Random

import pytest

pytest.importorskip("msgspec", reason="the engine needs its packages")

from tests.checkpoints import config_json, draw_tensors, write_checkpoint
from tests.e2e.asks import TEMPLATE, draw_requests
from tests.e2e.conftest import TINY_MODEL, System, wait_until
from tests.e2e.disturbance import Disturbance
from tests.e2e.steady_clients import Clients

from .environment import make_environment

pytestmark = pytest.mark.timeout(120)

MOST_KILLS = 5
#: Enough layers that a stream takes a second.
SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "vocab_size": 512,
    "head_dim": 64,
    "num_attention_heads": 8,
    "moe_num_experts": 16,
    "moe_k": 4,
    "moe_intermediate_size": 128,
    "intermediate_size": 512,
}


class OnGpu(System):
    """A system with the packages of this process, where fd-dp need not be installed."""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("fd")
    OnGpu.scripts = make_environment(directory / "environment")
    config, model = config_json(**SHAPE), directory / "model"
    write_checkpoint(model, config, draw_tensors(config, 1), dtype="BF16")
    for file in TINY_MODEL.glob("token*.json"):
        shutil.copy(file, model)
    running = OnGpu(
        directory,
        replicas=2,
        model=model,
        engine=f'device = "gpu"\nextra_args = {json.dumps(["--chat-template", TEMPLATE])}',
        supervise="backoff_first = 0.2\nbackoff_max = 1\nbudget = 1000\nbox_budget = 1000",
    )
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


def gpu_memory(system: System) -> list[tuple[int, int]]:
    """Return used bytes and all bytes of the GPU of each replica, as far as they are known."""
    replicas = json.loads(system.fdctl("top", "--once", "--json").stdout)["replicas"]
    return [(entry["gpu_memory_used"] or 0, entry["gpu_memory_total"] or 0) for entry in replicas]


def test_fdctl_shows_both_replicas_on_the_gpu(system: System) -> None:
    status = system.fdctl("status")
    assert status.returncode == 0, status
    assert status.stdout.count("READY") >= 2, status.stdout
    # The first look only starts reading the GPU's figures.
    wait_until(
        lambda: all(0 < used < total for used, total in gpu_memory(system)), "memory of the GPU is shown"
    )
    assert "GPU memory" in system.fdctl("top", "--once").stdout


def test_no_request_fails_and_no_text_changes_under_kills_and_a_reload(system: System) -> None:
    clients = Clients(system.router_port, 16)
    disturbance = Disturbance(system, clients, Random(1))
    clients.learn(draw_requests(Random(6), 16, (60, 200)))
    with clients.at_work():
        with disturbance.phase("reload"):
            disturbance.reload("max_num_seqs = 16\n", "max_num_seqs = 24\n")
        with disturbance.phase("kills"):
            for number in range(MOST_KILLS):
                system.worker_process(number % 2).kill()
                wait_until(lambda: not system.is_ready(), "the death is noticed")
                system.wait_ready()
                # A kill may hit no stream that has begun.
                if clients.done["resumed"]:
                    break
    assert clients.done["resumed"] > 0, clients.report()
    assert disturbance.lowest_ready["reload"] == 1
