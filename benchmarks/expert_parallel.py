"""Expert parallelism: `python -m benchmarks.expert_parallel`.

Dispatch and combine against memcpy; two replicas that share experts against two that do not; memory of eight
replicas; and the time that a survivor waits for its next token when another rank is killed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.checkpoints import config_json, draw_tensors, write_checkpoint
from tests.engine.worker_api import Ranks, request

from fastdeploy.common.messages import AddRequest
from fastdeploy.config import EngineConfig
from fastdeploy.demo_model.model import resolve_model_path

from .eight_replicas import memory
from .expert_exchange import exchange_rows
from .rows import CACHE, Row, report

#: Number of experts, and experts per token, as in ERNIE-4.5-21B-A3B.
SHAPE = config_json(
    hidden_size=768,
    num_hidden_layers=8,
    vocab_size=16000,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=3072,
    moe_num_experts=64,
    moe_k=6,
    moe_intermediate_size=256,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    max_position_embeddings=4096,
)
PROMPT, NEW = 16, 64
#: Concurrent texts over both replicas.
STREAMS = (2, 16, 64)
KILLS = 50
PARTS = ("exchange", "throughput", "memory", "recovery")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="run only this part (repeatable)")
    arguments = parser.parse_args()
    parts = {
        "exchange": exchange_rows,
        "throughput": _throughput_rows,
        "memory": _memory_rows,
        "recovery": _recovery_rows,
    }
    rows: list[Row] = []
    for name in arguments.only or PARTS:
        print(f"measuring: {name}", flush=True)
        rows += parts[name]()
    report(rows, "expert_parallel")


def _throughput_rows() -> Iterator[Row]:
    model = _model_of_64_experts()
    for streams in STREAMS:
        rates = {}
        for shared in (True, False):
            with _ranks(model, 2, shared, max_num_seqs=max(1, streams // 2)) as ranks:
                _rate(ranks, streams, NEW // 4)
                rates[shared] = max(_rate(ranks, streams, NEW) for _ in range(3))
        yield Row(f"dp2_ep_{streams}_streams", "tokens/s", rates[True], rates[False], "without EP")


def _memory_rows() -> Iterator[Row]:
    for name, model in (("demo", resolve_model_path("demo")), ("64_experts", _model_of_64_experts())):
        found = {}
        for shared in (True, False):
            with _ranks(model, 8, shared, max_num_seqs=2) as ranks:
                # Touch all pages that are used in operation.
                for _ in range(3):
                    _rate(ranks, 16, NEW)
                found[shared] = memory(api.process.pid for api in ranks.all)
        for what in ("rss", "pss"):
            yield Row(
                f"{what}_of_8_{name}", "MB", found[True][what] / 1e6, found[False][what] / 1e6, "without EP"
            )


def _recovery_rows() -> Iterator[Row]:
    """Kill one of eight decoding ranks; compare a survivor's text with an undisturbed one."""
    with _ranks(resolve_model_path("demo"), 8, shared=True, max_num_seqs=2) as ranks:
        asked = {seat: _requests(seat, 1, 48) for seat in range(8)}
        expected = ranks.generate(asked)
        pauses, usual, changed = [], [], 0
        for kill in range(KILLS):
            victim = 1 + kill % 7
            watch = _Watch(ranks, victim)
            texts = ranks.generate(asked, watch.after, mortal=[victim], on_tokens=watch.on_tokens)
            pauses.append(watch.pause())
            usual.append(watch.usual())
            changed += sum(texts[seat] != expected[seat] for seat in texts)
            ranks.start(victim)
            ranks.wait_ready(victim)
    for quantile in (50, 99):
        ours, peer = (
            sorted(values)[min(KILLS - 1, KILLS * quantile // 100)] * 1e3 for values in (pauses, usual)
        )
        yield Row(f"pause_at_kill_p{quantile}", "ms", ours, peer, "between two tokens before it")
    yield Row("texts_of_survivors_changed", "texts", changed)


class _Watch:
    """Kill a rank in the middle of a text, and time the tokens of the others."""

    def __init__(self, ranks: Ranks, victim: int) -> None:
        self._ranks = ranks
        self._victim = victim
        self._killed = math.inf
        self._times: dict[int, list[float]] = {seat: [] for seat in range(8) if seat != victim}

    def on_tokens(self, seat: int) -> None:
        if seat != self._victim:
            self._times[seat].append(time.monotonic())

    def after(self, tokens: int) -> None:
        if tokens > 100 and self._killed == math.inf:
            self._killed = time.monotonic()
            self._ranks.apis[self._victim].process.kill()

    def pause(self) -> float:
        """Longest time between two tokens of a survivor around the kill and the recovery."""
        soon = self._killed + 0.2
        return max(end - start for start, end in self._gaps() if end > self._killed and start < soon)

    def usual(self) -> float:
        """Time between two tokens before the kill."""
        return statistics.median(end - start for start, end in self._gaps() if end < self._killed)

    def _gaps(self) -> Iterator[tuple[float, float]]:
        for times in self._times.values():
            yield from itertools.pairwise(times)


def _model_of_64_experts() -> Path:
    path = CACHE / "random-64-experts"
    if not path.exists():
        print("drawing a model with 64 experts", flush=True)
        part = path.with_suffix(".part")
        write_checkpoint(part, SHAPE, draw_tensors(SHAPE, seed=64), dtype="BF16")
        part.rename(path)
    return path


@contextmanager
def _ranks(model: Path, count: int, shared: bool, max_num_seqs: int) -> Iterator[Ranks]:
    config = EngineConfig(
        model=model,
        max_num_seqs=max_num_seqs,
        max_model_len=512,
        num_gpu_blocks_override=8 * max_num_seqs,
        enable_prefix_caching=False,
    )
    with tempfile.TemporaryDirectory(prefix="fd-bench-") as logs:
        ranks = Ranks(config, count, f"bench-{uuid.uuid4().hex[:8]}", Path(logs), shared=shared)
        try:
            ranks.start(*range(count))
            ranks.wait_ready()
            yield ranks
            ranks.stop()
        finally:
            ranks.close()


def _requests(seat: int, count: int, tokens: int) -> list[AddRequest]:
    return [
        request(
            f"{seat}.{i}", [3 + (7 * seat + 31 * i + 13 * j) % 997 for j in range(PROMPT)], max_tokens=tokens
        )
        for i in range(count)
    ]


def _rate(ranks: Ranks, streams: int, tokens: int) -> float:
    """Return the tokens per second of all ranks together, including prompts."""
    count = streams // len(ranks.apis)
    asked = {seat: _requests(seat, count, tokens) for seat in ranks.apis}
    started = time.monotonic()
    texts = ranks.generate(asked)
    seconds = time.monotonic() - started
    return sum(len(text) for of_seat in texts.values() for text in of_seat.values()) / seconds


if __name__ == "__main__":
    main()
