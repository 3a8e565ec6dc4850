"""Eight engines against one on the same cores: `python -m benchmarks.eight_replicas`.

Eight concurrent workers, each with its share of the cores and two streams, against one worker with all cores
and sixteen streams: tokens/s, the hardware limits, and memory. Also the time of a replica from its start to
its first token, with packed weights.

The limits differ: a step of the single worker reads the weights for sixteen tokens, a step of each of the
eight workers for two. They ignore CPU caches, into which the weights do not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastdeploy.common.ports import find_free
from fastdeploy.config import ModelConfig
from fastdeploy.demo_model.model import resolve_model_path

from .contender import ContenderProcess, Timing
from .driver import WEIGHT_FORMATS
from .limits import Machine, Work, decode_work
from .rows import ROOT, Row, report

REPLICAS, STREAMS = 8, 16
PROMPT, NEW = 32, 128
#: Fields of smaps_rollup and their names in the table. Replicas share file pages that they all map.
MEMORY = {"Rss": "rss", "Pss": "pss", "Pss_File": "pss_file", "Pss_Anon": "pss_anonymous"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a checkpoint directory, or demo")
    parser.add_argument("--format", choices=WEIGHT_FORMATS, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, weight_format = resolve_model_path(arguments.model), arguments.format

    # Packs the weights.
    seconds = [first_token_seconds(model, weight_format) for _ in range(3)]
    machine = Machine.measure()
    with workers(model, weight_format, 1) as one:
        alone = max(tokens_per_second(one) for _ in range(arguments.rounds))
        memory_of_one = memory(process.pid for process in one)
    with workers(model, weight_format, REPLICAS) as eight:
        together = max(tokens_per_second(eight) for _ in range(arguments.rounds))
        memory_of_eight = memory(process.pid for process in eight)
    machine = machine.better(Machine.measure())

    config = ModelConfig.from_directory(model)
    rate_of_one, rate_of_eight = (
        STREAMS / machine.seconds(step_work(config, weight_format, replicas)) for replicas in (1, REPLICAS)
    )
    rows = [
        Row("one_worker_16_streams", "tokens/s", alone, limit=rate_of_one),
        Row("eight_workers_2_streams_each", "tokens/s", together, alone, "one worker", rate_of_eight),
    ]
    rows += [
        Row(
            f"eight_workers_{name}",
            "MB",
            memory_of_eight[name] / 1e6,
            memory_of_one[name] / 1e6,
            "one worker",
        )
        for name in MEMORY.values()
    ]
    rows.append(Row("replica_start_to_first_token", "seconds", min(seconds)))
    report(rows, "eight_replicas")


@contextmanager
def workers(model: Path, weight_format: str, count: int) -> Iterator[list[ContenderProcess]]:
    """Workers that share the cores and the streams."""
    settings = {
        "model": model,
        "format": weight_format,
        "max-num-seqs": STREAMS // count,
        "max-model-len": PROMPT + NEW,
        "max-num-batched-tokens": PROMPT * STREAMS // count,
        "data-parallel-size": count,
    }
    command = [sys.executable, "-m", "benchmarks.our_engine"]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    with ExitStack() as processes:
        started = [
            processes.enter_context(
                ContenderProcess(f"worker {rank}", [*command, "--data-parallel-rank", str(rank)], ROOT)
            )
            for rank in range(count)
        ]
        for process in started:
            process.wait_ready()
        yield started


def tokens_per_second(processes: Sequence[ContenderProcess]) -> float:
    """Run all workers concurrently; time from the first start to the last end."""
    for process in processes:
        process.ask("decode", batch=STREAMS // len(processes), prompt=PROMPT, new=NEW)
    timings = [Timing(**process.result()) for process in processes]
    started, ended = min(t.started for t in timings), max(t.ended for t in timings)
    return sum(timing.tokens for timing in timings) / (ended - started)


def step_work(config: ModelConfig, weight_format: str, replicas: int) -> Work:
    """Return the total work of all replicas for one token per stream."""
    one = decode_work(config, weight_format, STREAMS // replicas, PROMPT + NEW / 2)
    return Work(replicas * one.bytes_read, replicas * one.flops)


def memory(pids: Iterable[int]) -> dict[str, int]:
    """Return the sums over the processes, in bytes."""
    total = dict.fromkeys(MEMORY.values(), 0)
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            field, _, rest = line.partition(":")
            if field in MEMORY:
                total[MEMORY[field]] += int(rest.split()[0]) << 10
    return total


def first_token_seconds(model: Path, weight_format: str, deadline: float = 600.0) -> float:
    """Return the seconds from the start of a replica until its first token."""
    port, queue_port = find_free(2)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(port), "--engine-worker-queue-port", str(queue_port)]
    command += ["--quantization", weight_format] if weight_format.startswith("wint") else []
    command += ["--dtype", "float32"] if weight_format == "float32" else []
    with tempfile.TemporaryDirectory(prefix="fd-bench-") as logs:
        environment = os.environ | {"FD_LOG_DIR": logs}
        started = time.monotonic()
        with (Path(logs) / "output").open("wb") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            while not _answers(url):
                if server.poll() is not None or time.monotonic() - started > deadline:
                    raise SystemExit((Path(logs) / "output").read_text()[-2000:])
                time.sleep(0.01)
            return time.monotonic() - started
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


def _answers(url: str) -> bool:
    """Return True if the replica can complete one token."""
    body = json.dumps({"prompt": "The sea", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        # Check the health first, because a completion might wait for the model.
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
        urllib.request.urlopen(request, timeout=60).close()
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


if __name__ == "__main__":
    main()
