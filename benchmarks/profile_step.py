"""Profile of a decode step: `python -m benchmarks.profile_step`.

Shares of the compiled operations of the network, of scheduling, of sampling (including its operation), and of
the Python code around them, by batch size.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from .driver import WEIGHT_FORMATS, Driver, engine_config
from .random_model import random_model
from .rows import CORES

BATCHES = (1, 8, 32)
PROMPT, NEW = 32, 64


class Stopwatch:
    """Seconds by part, excluding nested parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._since = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **keywords: Any) -> Any:
            self._switch()
            self._parts.append(part)
            try:
                return function(*arguments, **keywords)
            finally:
                self._switch()
                self._parts.pop()

        return run

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=WEIGHT_FORMATS, default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to test this script")
    arguments = parser.parse_args()
    config = engine_config(
        random_model(tiny=arguments.tiny),
        arguments.format,
        max_num_seqs=max(BATCHES),
        max_model_len=PROMPT + NEW,
        max_num_batched_tokens=max(BATCHES) * PROMPT,
    )
    driver = Driver(config)
    parts = ("operations", "Python", "scheduling", "sampling")
    print(f"{arguments.format}, {CORES} threads; share of a decode step's time")
    print(f"{'batch':>5} {'ms/step':>8} " + " ".join(f"{part:>10}" for part in parts))
    for batch in BATCHES:
        driver.decode(batch, PROMPT, NEW)
        stopwatch = Stopwatch()
        with instrumented(stopwatch):
            driver.decode(batch, PROMPT, NEW)
        total = sum(stopwatch.seconds.values())
        shares = " ".join(f"{stopwatch.seconds[part] / total:10.1%}" for part in parts)
        print(f"{batch:>5} {1e3 * total / NEW:8.2f} {shares}")


@contextmanager
def instrumented(stopwatch: Stopwatch) -> Iterator[None]:
    """Wrap the parts of the engine with timers, at the names under which callers find them."""
    import paddle

    from fastdeploy.core.engine import EngineCore
    from fastdeploy.core.sampler import Sampler
    from fastdeploy.core.scheduler import Scheduler

    places = [
        (EngineCore, "step", "Python"),
        (Scheduler, "schedule", "scheduling"),
        (Scheduler, "commit", "scheduling"),
        (Sampler, "sample", "sampling"),
    ]
    run = paddle._C_ops._run_custom_op
    network = stopwatch.timed("operations", run)

    def operation(name: str, *arguments: Any) -> Any:
        # Sampling operations count as sampling.
        return (run if name in ("fd_argmax", "fd_sample") else network)(name, *arguments)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(paddle._C_ops, "_run_custom_op", operation))
        for owner, name, part in places:
            timed = stopwatch.timed(part, getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, timed))
        yield


if __name__ == "__main__":
    main()
