"""Decode speed by context and batch: `make bench-context` writes docs/decode-speed.svg.

Decode tokens/s of the random model (random_model.py) for contexts of 128 to 8192 tokens and batches of 1 to
64, and the hardware limit. The largest point needs 7 GB of keys and values. There is no prefill, because the
cost of a step does not depend on the content of the cache, only on its memory being allocated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes

mpl.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from fastdeploy.common.request import Batch, SamplingParams, ScheduledSequence, Sequence

from .driver import WEIGHT_FORMATS, Driver, engine_config, fill_cache
from .limits import Machine, decode_work
from .random_model import random_model
from .rows import CORES, ROOT, Row, report

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
STEPS = 8
#: Lines of the plot.
SHOWN_BATCHES, SHOWN_CONTEXTS = (1, 4, 16, 64), (128, 1024, 4096, 8192)
PLOT = ROOT / "docs" / "decode-speed.svg"

#: tokens/s by context and batch.
Grid = Mapping[tuple[int, int], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=WEIGHT_FORMATS, default="bfloat16")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--out", type=Path, default=PLOT)
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, to test this script")
    arguments = parser.parse_args()
    config = engine_config(
        random_model(tiny=arguments.tiny),
        arguments.format,
        max_num_seqs=max(arguments.batches),
        max_model_len=max(arguments.contexts),
    )
    driver = Driver(config)
    fill_cache(driver.runner)
    machine = Machine.measure()
    speed = {
        (context, batch): batch / step_seconds(driver, context, batch)
        for context in arguments.contexts
        for batch in arguments.batches
    }
    machine = machine.better(Machine.measure())
    limits = {
        (context, batch): batch
        / machine.seconds(decode_work(driver.model_config, arguments.format, batch, context))
        for context, batch in speed
    }
    report(
        [
            Row(
                f"context_{context}_b{batch}", "tokens/s", speed[context, batch], limit=limits[context, batch]
            )
            for context, batch in speed
        ],
        "context",
    )
    draw(speed, limits, arguments.format, arguments.out)


def step_seconds(driver: Driver, context: int, batch: int) -> float:
    """Return the best of several steps in which `batch` texts add the token at position `context`."""
    blocks_each = driver.config.blocks_for(context)
    random = np.random.default_rng(context * 1000 + batch)
    # Scattered, as in a cache that has been in use.
    blocks = random.permutation(driver.config.num_blocks(driver.model_config))
    rows = []
    for index in range(batch):
        token_ids = random.integers(3, driver.model_config.vocab_size, context).tolist()
        own = blocks[index * blocks_each : (index + 1) * blocks_each].tolist()
        params = SamplingParams(max_tokens=1, temperature=0)
        sequence = Sequence(str(index), token_ids, params, block_ids=own, num_computed=context - 1)
        rows.append(ScheduledSequence(sequence, context - 1, 1, samples=True))
    best = float("inf")
    for _ in range(STEPS):
        started = time.monotonic()
        driver.compute(Batch(tuple(rows)))
        best = min(best, time.monotonic() - started)
    return best


def draw(speed: Grid, limits: Grid, weight_format: str, file: Path) -> None:
    """Plot tokens/s against the context by batch, and against the batch by context."""
    contexts = sorted({context for context, _ in speed})
    batches = sorted({batch for _, batch in speed})
    # Keep text as text, and make the file reproducible.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "decode-speed", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for batch in [b for b in batches if b in SHOWN_BATCHES]:
        points = [(context, batch) for context in contexts]
        _line(left, contexts, points, speed, limits, f"{batch} text{'s' * (batch > 1)}")
    for context in [c for c in contexts if c in SHOWN_CONTEXTS]:
        points = [(context, batch) for batch in batches]
        _line(right, batches, points, speed, limits, f"{context} tokens")
    for axes, ticks, label in ((left, contexts, "context, tokens"), (right, batches, "texts at once")):
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    left.set_ylabel("tokens/s, all texts together")
    figure.suptitle(
        f"Decode, 250M parameters in {weight_format}, {CORES} cores; dotted: the hardware's limit",
        fontsize=10,
    )
    figure.savefig(file, metadata={"Date": None})


def _line(
    axes: Axes, xs: list[int], points: list[tuple[int, int]], speed: Grid, limits: Grid, label: str
) -> None:
    (line,) = axes.plot(xs, [speed[point] for point in points], marker="o", markersize=3, label=label)
    axes.plot(xs, [limits[point] for point in points], color=line.get_color(), linestyle=":", linewidth=1)


if __name__ == "__main__":
    main()
