"""Metrics of a replica's GPU, with a stand-in for NVIDIA's library where it would be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = Path(__file__).with_name("fake_nvml")
START = """
import logging, sys, time
from fastdeploy.common.messages import Ready
from fastdeploy.entrypoints.metrics import ReplicaMetrics
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="log: %(message)s")
def metrics_of(uuid):
    return ReplicaMetrics(lambda: None, lambda: Ready(8, 64, 512, uuid), 8)
def told(metrics):
    names = "fastdeploy:gpu_memory_", "fastdeploy:gpu_utilization_"
    return [line for line in metrics.render().decode().splitlines() if line.startswith(names)]
def wait_for(number, metrics):
    while len(told(metrics)) != number:
        time.sleep(0.05)
    return told(metrics)
metrics = metrics_of("GPU-1")
"""
FIGURES = [
    'fastdeploy:gpu_memory_used_bytes{gpu="GPU-1"} 4.5e+10',
    'fastdeploy:gpu_memory_total_bytes{gpu="GPU-1"} 1.5e+11',
    'fastdeploy:gpu_utilization_perc{gpu="GPU-1"} 0.37',
]


def lines_of(script: str, *, library: bool = True) -> list[str]:
    """Return what a process prints whose library is the fake, or that has none."""
    block = "" if library else "import sys; sys.modules['pynvml'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", block + START + script],
        env={**os.environ, "PYTHONPATH": str(FAKE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_metrics_show_memory_and_utilization_of_the_gpu() -> None:
    assert lines_of("print(*wait_for(3, metrics), sep='\\n')") == FIGURES


def test_the_library_is_asked_once_a_second_at_most() -> None:
    script = """
began = time.monotonic()
for _ in range(200):
    told(metrics)
import pynvml
print(pynvml.calls.count("nvmlDeviceGetMemoryInfo") <= 1 + (time.monotonic() - began))
print(pynvml.calls.count("nvmlInit"))
"""
    assert lines_of(script) == ["True", "1"]


def test_a_replica_on_a_cpu_does_not_load_the_library() -> None:
    script = "print(told(metrics_of('')), 'pynvml' in sys.modules)"
    assert lines_of(script) == ["[] False"]


def test_without_the_library_only_these_figures_are_missing() -> None:
    script = "print(told(metrics), b'max_gpu_block_num 8' in metrics.render())"
    hint = "log: no memory and utilisation of the GPU in the metrics: pip install 'fd-dp[gpu]'"
    assert lines_of(script, library=False) == [hint, "[] True"]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("no driver", "NVML Shared Library Not Found"),
        ("lost", "GPU is lost"),
        ("is another library", "module 'pynvml' has no attribute 'nvmlInit'"),
    ],
)
def test_a_failure_is_logged_once_and_figures_come_back(state: str, reason: str) -> None:
    script = f"""
import pynvml
pynvml.state = {state!r}
while pynvml.calls.count("nvmlInit") < 2:
    assert told(metrics) == []
    time.sleep(0.05)
pynvml.state = "works"
wait_for(3, metrics)
"""
    assert lines_of(script) == [f"log: no memory and utilisation of the GPU in the metrics: {reason}"]


def test_a_driver_that_hangs_costs_no_other_metric() -> None:
    script = """
import pynvml, threading
pynvml.state = "hangs"
for _ in range(50):
    assert told(metrics) == [] and b"max_gpu_block_num 8" in metrics.render()
print(pynvml.calls.count("nvmlDeviceGetMemoryInfo"), threading.active_count())
"""
    assert lines_of(script) == ["1 2"]


def test_a_part_of_a_gpu_has_memory_only() -> None:
    script = """
import pynvml
pynvml.state = "is partitioned"
print(*wait_for(2, metrics_of("GPU-2")), sep="\\n")
"""
    assert lines_of(script) == [line.replace("GPU-1", "GPU-2") for line in FIGURES[:2]]


def test_the_stand_in_has_the_names_of_the_library() -> None:
    library = pytest.importorskip("pynvml")
    names = ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMemoryInfo"]
    names += ["nvmlDeviceGetUtilizationRates", "NVMLError_NotFound", "NVMLError_NotSupported"]
    assert [name for name in names if not hasattr(library, name)] == []
