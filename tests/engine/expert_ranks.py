"""Groups of workers for the tests of expert parallelism, and the expected texts."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastdeploy.common.messages import AddRequest, Ready
from fastdeploy.config import EngineConfig
from fastdeploy.expert_parallel.memory_file import group_directory

from .worker_api import CONFIG, Api, Ranks, Texts, request

#: Leads to steps of up to two collectives, prompts of several steps, and preemptions.
EXPERT_CONFIG = replace(CONFIG, max_num_batched_tokens=200, num_gpu_blocks_override=70)


def requests_of(seat: int, count: int = 4, tokens: int = 60) -> list[AddRequest]:
    """Return greedy and sampled requests with short and long prompts."""
    random = np.random.default_rng(seat)
    lengths = random.choice([1, 5, 40, 300], count)
    return [
        request(
            f"{seat}.{i}",
            random.integers(3, 500, length).tolist(),
            max_tokens=tokens,
            temperature=i % 2,
            seed=seat * 100 + i,
        )
        for i, length in enumerate(lengths.tolist())
    ]


def undisturbed(config: EngineConfig, logs: Path, requests: dict[int, list[AddRequest]]) -> dict[int, Texts]:
    """Return the texts of a single worker that has all experts."""
    api = Api(config, logs, forked=True)
    try:
        api.receive_until(Ready)
        return {seat: api.generate(asked) for seat, asked in requests.items()}
    finally:
        api.close()


@contextmanager
def ranks_of(count: int, logs: Path, config: EngineConfig = EXPERT_CONFIG) -> Iterator[Ranks]:
    """Workers of a new group, whose memory is removed afterwards."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    ranks = Ranks(config, count, name, logs, forked=True)
    try:
        yield ranks
    finally:
        ranks.close()
        shutil.rmtree(group_directory(name), ignore_errors=True)
