"""Latency and throughput of the whole system under the public load generator aiperf."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from fastdeploy.demo_model.model import resolve_model_path

from .environments import NotInstalledError, installed
from .rows import Row
from .serve import start_daemon, stop_daemon, wait_ready, write_config

_PACKAGES = ("aiperf==0.13.0",)
_REPLICAS = 2
_PROMPT_TOKENS, _OUTPUT_TOKENS = 128, 64
#: Concurrent streams -> number of requests.
_LOADS = {1: 8, 8: 32, 32: 96}
#: Row -> name in the report of aiperf, and its statistic.
_METRICS = {
    ("time_to_first_token_p50", "ms"): ("time_to_first_token", "p50"),
    ("time_to_first_token_p99", "ms"): ("time_to_first_token", "p99"),
    ("time_between_tokens_p50", "ms"): ("inter_token_latency", "p50"),
    ("time_between_tokens_p99", "ms"): ("inter_token_latency", "p99"),
    ("throughput", "tokens/s"): ("output_token_throughput", "avg"),
}


def measure() -> list[Row]:
    """Start two replicas of the demo model and a router, and put them under load."""
    try:
        aiperf = installed("aiperf", _PACKAGES) / "aiperf"
    except NotInstalledError as error:
        print(f"no load: aiperf {error}", flush=True)
        return []
    rows = []
    with tempfile.TemporaryDirectory(prefix="fd-bench-") as directory:
        prefix = Path(directory)
        config, port = write_config(prefix, replicas=_REPLICAS, threads=0)
        daemon = start_daemon(config, prefix)
        try:
            wait_ready(prefix, _REPLICAS)
            for streams, requests in _LOADS.items():
                found = _profile(aiperf, port, streams, requests, prefix / f"aiperf-{streams}")
                rows += [
                    Row(f"{case}_{streams}_streams", unit, found[name][statistic])
                    for (case, unit), (name, statistic) in _METRICS.items()
                ]
        finally:
            stop_daemon(daemon)
    return rows


def _profile(aiperf: Path, port: int, streams: int, requests: int, directory: Path) -> dict[str, Any]:
    """Return aiperf's report: statistics by metric."""
    command = [
        *(str(aiperf), "profile", "--model", "demo", "--url", f"http://127.0.0.1:{port}"),
        *("--endpoint-type", "chat", "--streaming", "--tokenizer", str(resolve_model_path("demo"))),
        *("--concurrency", str(streams), "--request-count", str(requests), "--random-seed", "7"),
        *("--synthetic-input-tokens-mean", str(_PROMPT_TOKENS), "--synthetic-input-tokens-stddev", "0"),
        *("--output-tokens-mean", str(_OUTPUT_TOKENS), "--output-tokens-stddev", "0"),
        *("--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"),
        *("--ui", "none", "--artifact-dir", str(directory)),
    ]
    done = subprocess.run(command, cwd=directory.parent, capture_output=True, text=True, check=False)
    reports = list(directory.rglob("profile_export_aiperf.json"))
    if done.returncode != 0 or not reports:
        raise SystemExit(f"aiperf ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(reports[0].read_text())
    return report
