"""Start time, memory and throughput of the whole system: `make bench-serve`.

Starts fd-dp with a copy of etc/dp.toml on free ports. Measures the time until the eight replicas are READY,
their memory, and tokens/s through the router for one and for sixteen concurrent streams. The peer of the
eight replicas is one replica on all cores; the limit of one stream is that of the hardware (limits.py). Both
are measured in the same run.

With --model DIRECTORY --device gpu: one replica on a GPU behind the router, the time until the first token of
the system, and for 1, 16 and 64 concurrent streams the times to the first token and between tokens.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import requests
from tests.device.environment import make_environment

from fastdeploy.common.ports import find_free
from fastdeploy.config import ModelConfig
from fastdeploy.demo_model.model import resolve_model_path

from .limits import Machine, decode_work
from .rows import CACHE, ROOT, Row, report

BIN = Path(sys.executable).parent
NEW_TOKENS = 64
QUESTION = "Write a short story about a lighthouse keeper and the sea."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fd-bench-") as directory:
        if arguments.device == "gpu":
            report(measure_streams(Path(directory), arguments.model), "serve-gpu")
        else:
            report(measure_system(Path(directory)), "serve")


def measure_streams(prefix: Path, model: str) -> list[Row]:
    """Return rows of one replica on a GPU."""
    config, router_port = write_config(
        prefix,
        replicas=1,
        threads=0,
        path=model,
        device="gpu",
        expert_parallel=False,
        num_gpu_blocks_override=0,
    )
    vocabulary = ModelConfig.from_directory(resolve_model_path(model)).vocab_size
    rows = []

    def load(streams: int, new: int) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.stream_load", str(router_port), str(streams)]
        command += ["--new", str(new), "--vocabulary", str(vocabulary)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode != 0:
            raise SystemExit(f"{done.stderr.strip()}; see {prefix}")
        found: dict[str, float] = json.loads(done.stdout)
        return found

    started = time.monotonic()
    daemon = start_daemon(config, prefix)
    try:
        wait_ready(prefix, 1)
        rows.append(Row("start_to_ready", "seconds", time.monotonic() - started))
        load(1, 1)
        rows.append(Row("start_to_first_token", "seconds", time.monotonic() - started))
        for streams in (1, 16, 64):
            found = load(streams, 128)
            rows += [
                Row(f"{streams}_streams_first_token_p50", "ms", found["first_p50"] * 1e3),
                Row(f"{streams}_streams_first_token_max", "ms", found["first_max"] * 1e3),
                Row(f"{streams}_streams_between_tokens_p50", "ms", found["between_p50"] * 1e3),
                Row(f"{streams}_streams_between_tokens_p99", "ms", found["between_p99"] * 1e3),
                Row(f"{streams}_streams", "tokens/s", found["tokens_per_second"]),
            ]
    finally:
        stop_daemon(daemon)
    return rows


def measure_system(prefix: Path) -> list[Row]:
    replicas = 8
    config, router_port = write_config(prefix, replicas=replicas, threads=0)
    started = time.monotonic()
    daemon = start_daemon(config, prefix)
    try:
        wait_ready(prefix, replicas)
        ready_seconds = time.monotonic() - started
        rss, pss = memory_of_workers(daemon.pid)
        url = f"http://127.0.0.1:{router_port}"
        generate(url, 0)
        one = tokens_per_second(url, streams=1)
        sixteen = tokens_per_second(url, streams=16)
    finally:
        stop_seconds = stop_daemon(daemon)

    alone = prefix / "alone"
    alone.mkdir()
    config, router_port = write_config(alone, replicas=1, threads=os.cpu_count() or 1)
    daemon = start_daemon(config, alone)
    try:
        wait_ready(alone, 1)
        url = f"http://127.0.0.1:{router_port}"
        generate(url, 0)
        alone_one = tokens_per_second(url, streams=1)
        alone_sixteen = tokens_per_second(url, streams=16)
    finally:
        stop_daemon(daemon)

    peer = "one replica, all cores"
    demo = ModelConfig.from_directory(resolve_model_path("demo"))
    limit = 1 / Machine.measure().seconds(decode_work(demo, "bfloat16", batch=1, context=NEW_TOKENS))
    return [
        Row("start_to_8_ready", "seconds", ready_seconds),
        Row("stop", "seconds", stop_seconds),
        Row("worker_rss_mean", "MB", sum(rss) / len(rss) / 1e6),
        Row("worker_pss_mean", "MB", sum(pss) / len(pss) / 1e6),
        Row("decode_1_stream", "tokens/s", one, alone_one, peer, limit),
        Row("decode_16_streams", "tokens/s", sixteen, alone_sixteen, peer),
    ]


@cache
def commands() -> Path:
    """Return the folder of fd-dp's commands; where it is not installed, of an environment made for it."""
    return BIN if (BIN / "fd-dp").exists() else make_environment(CACHE / "environment")


def write_config(prefix: Path, *, replicas: int, threads: int, **others: Any) -> tuple[Path, int]:
    """Write etc/dp.toml with other ports, so that a running system is not disturbed."""
    ports = find_free(3 * replicas + 1)
    text = (ROOT / "etc" / "dp.toml").read_text(encoding="utf-8")

    def put(key: str, value: Any) -> None:
        nonlocal text
        line = f"{key} = {json.dumps(value)}"
        text, found = re.subn(rf"(?m)^#?\s*{key}\s*=.*$", line, text, count=1)
        if not found:
            raise SystemExit(f"etc/dp.toml has no line for {key}")

    put("data_parallel_size", replicas)
    put("threads", threads)
    put("ports", ports[:replicas])
    put("metrics_ports", ports[replicas : 2 * replicas])
    put("engine_worker_queue_ports", ports[2 * replicas : 3 * replicas])
    put("port", ports[-1])
    for key, value in others.items():
        put(key, value)
    path = prefix / "dp.toml"
    path.write_text(text, encoding="utf-8")
    return path, ports[-1]


def start_daemon(config: Path, prefix: Path) -> subprocess.Popen[bytes]:
    log = (prefix / "bench.log").open("wb")
    return subprocess.Popen(
        [str(commands() / "fd-dp"), "--config", str(config), "--prefix", str(prefix)],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def stop_daemon(daemon: subprocess.Popen[bytes]) -> float:
    started = time.monotonic()
    daemon.send_signal(signal.SIGINT)
    daemon.wait(timeout=60)
    return time.monotonic() - started


def wait_ready(prefix: Path, replicas: int, deadline: float = 600.0) -> None:
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        answer = subprocess.run(
            [str(commands() / "fdctl"), "--prefix", str(prefix), "status", "--json"],
            capture_output=True,
            check=False,
        )
        if answer.returncode == 0:
            status = json.loads(answer.stdout)
            states = [replica["state"] for replica in status["replicas"]]
            # Also according to the daemon, because only then the router knows all replicas.
            if states == ["READY"] * replicas and status["daemon"]["state"] == "READY":
                return
        time.sleep(0.2)
    raise SystemExit(f"not ready after {deadline:.0f} s; see {prefix}")


def memory_of_workers(daemon_pid: int) -> tuple[list[int], list[int]]:
    """Return RSS and PSS in bytes of each Paddle process below the daemon."""
    rss, pss = [], []
    for process in psutil.Process(daemon_pid).children(recursive=True):
        if "fastdeploy.core.worker" in process.cmdline():
            memory = process.memory_full_info()
            rss.append(memory.rss)
            pss.append(memory.pss)
    return rss, pss


def generate(url: str, index: int) -> int:
    body = {
        "messages": [{"role": "user", "content": f"({index}) {QUESTION}"}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


def tokens_per_second(url: str, streams: int) -> float:
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        tokens = sum(pool.map(lambda index: generate(url, index), range(1, streams + 1)))
    return tokens / (time.monotonic() - started)


if __name__ == "__main__":
    main()
