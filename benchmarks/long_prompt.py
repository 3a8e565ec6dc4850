"""Effect of a long prompt on running streams: `python -m benchmarks.long_prompt`.

Eight streams decode while a prompt of 8192 tokens is computed in chunks, for several values of
--max-prefill-beside-decode. Reports the time between two tokens of a stream, without (the peer) and with the
prompt, and the time to the first token of the prompt.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from fastdeploy.config import ModelConfig

from .driver import WEIGHT_FORMATS, Driver, engine_config
from .random_model import random_model
from .rows import Row, report

STREAMS = 8
STREAM_PROMPT = 32
IDLE_STEPS = 200
#: Target: maximum ratio of the p99 with a long prompt to the p99 without one.
TARGET = 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=WEIGHT_FORMATS, default="bfloat16")
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 32, 48, 64, 128, 504])
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--prompts", type=int, default=2, help="number of consecutive prompts")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to test this script")
    arguments = parser.parse_args()
    rows: list[Row] = []
    model = random_model(tiny=arguments.tiny)
    for chunk in arguments.chunks:
        rows += measure(model, arguments.format, chunk, arguments.prompt, arguments.prompts)
    report(rows, "long_prompt")
    for row in rows:
        if row.peer is not None and "p99" in row.case:
            verdict = "met" if row.ours <= TARGET * row.peer else "MISSED"
            print(f"{row.case}: {row.ours / row.peer:.2f} times idle, at most {TARGET}: {verdict}")


def measure(model: Path, weight_format: str, chunk: int, prompt: int, prompts: int) -> list[Row]:
    # Chunks shrink as the context grows.
    slowdown = 1 + prompt / ModelConfig.from_directory(model).context_of_double_cost()
    steps = IDLE_STEPS + int(prompts * slowdown * prompt / chunk)
    config = engine_config(
        model,
        weight_format,
        max_num_seqs=STREAMS + 1,
        # The streams must outlive the prompts.
        max_model_len=max(prompt + 1, STREAM_PROMPT + 2 * steps),
        max_num_batched_tokens=512,
        max_prefill_beside_decode=chunk,
    )
    driver = Driver(config)
    for _ in range(STREAMS):
        driver.add(STREAM_PROMPT, config.max_model_len - STREAM_PROMPT)
    while len(driver.step()) < STREAMS:
        pass
    idle = [_step_seconds(driver) for _ in range(IDLE_STEPS)]
    beside: list[float] = []
    waits: list[float] = []
    for _ in range(prompts):
        request_id = driver.add(prompt, new=1)
        arrived = time.monotonic()
        answered = False
        while not answered:
            started = time.monotonic()
            outputs = driver.step()
            beside.append(time.monotonic() - started)
            answered = any(output.request_id == request_id for output in outputs)
            assert len(outputs) == STREAMS + answered, "a stream has ended, or was left out of a step"
        waits.append(time.monotonic() - arrived)
    found = []
    for percentile in (50, 99):
        alone, loaded = (1e3 * float(np.percentile(times, percentile)) for times in (idle, beside))
        found.append(Row(f"between_tokens_p{percentile}_chunk_{chunk}", "ms", loaded, alone, "no prompt"))
    return [*found, Row(f"first_token_chunk_{chunk}", "seconds", float(np.median(waits)))]


def _step_seconds(driver: Driver) -> float:
    started = time.monotonic()
    driver.step()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
