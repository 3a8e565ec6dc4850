"""A worker's statistics under their Prometheus names."""

from __future__ import annotations

import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from fastdeploy.config import EngineConfig
from fastdeploy.entrypoints.metrics import ReplicaMetrics
from fastdeploy.entrypoints.openai.engine_client import EngineClient

from .conftest import TINY, wait_until

SCRIPTED = Path(__file__).with_name("scripted_worker.py")


def samples_of(script: str) -> dict[str, float]:
    """Return the samples after the worker's first messages, by name with labels."""
    engine = EngineClient(EngineConfig(model=TINY), 0, print, [sys.executable, str(SCRIPTED), script])
    engine.start()
    try:
        wait_until(lambda: engine.ready and (engine.stats or script != "is a rank"), "ready")
        text = ReplicaMetrics(lambda: engine.stats, lambda: engine.ready, 8).render().decode()
    finally:
        engine.close(timeout=1)
    return {
        sample.name + "".join(f"[{key}={value}]" for key, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_of_a_rank_include_its_group() -> None:
    samples = samples_of("is a rank")
    assert {name: value for name, value in samples.items() if name.startswith("fastdeploy:ep_")} == {
        "fastdeploy:ep_epoch": 5,
        "fastdeploy:ep_active_seats": 2,
        "fastdeploy:ep_joins_total": 3,
        "fastdeploy:ep_leaves_total": 1,
        "fastdeploy:ep_losses_total": 2,
        "fastdeploy:ep_steps_total": 6,
        "fastdeploy:ep_step_seconds_total": 0.5,
        "fastdeploy:ep_restarted_steps_total": 4,
        "fastdeploy:ep_dispatched_bytes_total": 1024,
        "fastdeploy:ep_combined_bytes_total": 2048,
        "fastdeploy:ep_waited_seconds_total[seat=0]": 0,
        "fastdeploy:ep_waited_seconds_total[seat=1]": 0,
        "fastdeploy:ep_waited_seconds_total[seat=2]": 0.25,
        "fastdeploy:ep_expert_tokens_total[expert=0]": 7,
        "fastdeploy:ep_expert_tokens_total[expert=1]": 9,
    }
    assert samples["fastdeploy:max_gpu_block_num"] == 8


def test_metrics_without_a_group_omit_group_metrics() -> None:
    samples = samples_of("behaves")
    assert samples["fastdeploy:max_gpu_block_num"] == 8
    assert not any(name.startswith("fastdeploy:ep_") for name in samples)
