"""A replica's metrics under FastDeploy's names: what was measured, and nothing that was not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..common.messages import ExpertParallelStats, Ready, Stats
from ..common.metrics_server import CONTENT_TYPE

# Half of the lines would be times at which counters were made.
disable_created_metrics()
# Counts begin at 0 with the process, even if PROMETHEUS_MULTIPROC_DIR is set, as FastDeploy's users do.
values.ValueClass = values.MutexValue

# Wider than FastDeploy's, whose first-token buckets end at 1 s: a long prompt on a CPU takes a minute.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class ReplicaMetrics:
    """`read_stats` and `read_sizes` give the worker's latest words, or None before it has spoken."""

    content_type = CONTENT_TYPE

    def __init__(
        self,
        read_stats: Callable[[], Stats | None],
        read_sizes: Callable[[], Ready | None],
        max_num_seqs: int,
    ) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(f"fastdeploy:{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"fastdeploy:{name}", text, buckets=buckets, registry=registry)

        self.requests = counter("requests_number", "Requests that were given to the engine")
        self.successes = counter("request_success", "Requests that were answered in full")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", _FIRST_TOKEN
        )
        self.per_token = histogram(
            "time_per_output_token_seconds", "From one token of a choice to the next", _PER_TOKEN
        )
        self.whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end", _WHOLE)
        self.prompt_length = histogram("request_prompt_tokens", "Tokens of one prompt", _TOKENS)
        self.generation_length = histogram("request_generation_tokens", "Tokens of one choice", _TOKENS)
        self.max_tokens = histogram("request_params_max_tokens", "max_tokens of one request", _TOKENS)
        registry.register(_EngineCollector(read_stats, read_sizes, max_num_seqs))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the worker's statistics when somebody scrapes: steps cost nothing."""

    def __init__(
        self,
        read_stats: Callable[[], Stats | None],
        read_sizes: Callable[[], Ready | None],
        max_num_seqs: int,
    ) -> None:
        self._read_stats = read_stats
        self._read_sizes = read_sizes
        self._max_num_seqs = max_num_seqs

    def collect(self) -> Iterator[Metric]:
        stats, sizes = self._read_stats(), self._read_sizes()
        if sizes is None:
            return
        if stats is None:
            # Ready, and nothing has been computed yet.
            stats = Stats(0, 0, sizes.num_blocks, sizes.num_blocks, 0, 0, 0, 0, 0, self._max_num_seqs)
        used = stats.num_blocks - stats.num_free_blocks
        queried = stats.prefix_cache_query_tokens_total
        hit = stats.prefix_cache_hit_tokens_total
        yield _gauge("num_requests_running", "Sequences in the batch", stats.num_running)
        yield _gauge("num_requests_waiting", "Sequences that wait for room in the batch", stats.num_waiting)
        yield _gauge("batch_size", "Tokens of the latest step", stats.batch_tokens)
        yield _gauge("max_batch_size", "Sequences that fit into the batch", stats.max_num_seqs)
        room = max(stats.max_num_seqs - stats.num_running, 0)
        yield _gauge("available_batch_size", "Sequences that may still join the batch", room)
        yield _gauge("max_gpu_block_num", "Blocks of the KV cache", stats.num_blocks)
        yield _gauge("available_gpu_block_num", "Blocks that no sequence holds", stats.num_free_blocks)
        yield _gauge("free_gpu_block_num", "Blocks that no sequence holds", stats.num_free_blocks)
        yield _gauge("gpu_cache_usage_perc", "Part of the blocks in use, 0..1", used / stats.num_blocks)
        yield _gauge("hit_token_rate", "Part of prompt tokens found cached, 0..1", hit / max(queried, 1))
        yield _counter("request_preempted", "Sequences put back to make room", stats.preemptions_total)
        yield _counter("prefix_cache_token_num", "Prompt tokens found in the prefix cache", hit)
        yield _counter("prefix_cache_query_token_num", "Prompt tokens looked up in the prefix cache", queried)
        if stats.expert_parallel is not None:
            yield from _of_group(stats.expert_parallel)


def _of_group(group: ExpertParallelStats) -> Iterator[Metric]:
    yield _gauge("ep_epoch", "Epoch of the expert group; rises when its members change", group.epoch)
    yield _gauge("ep_active_seats", "Ranks in the expert group", len(group.active_seats))
    yield _counter("ep_joins", "Ranks that have joined; every rank tells the same", group.joins_total)
    yield _counter("ep_leaves", "Ranks that have left; every rank tells the same", group.leaves_total)
    yield _counter("ep_losses", "Ranks that have died; every rank tells the same", group.losses_total)
    yield _counter("ep_steps", "Steps of the group that this rank took part in", group.steps_total)
    yield _counter("ep_step_seconds", "Time that those steps took", group.step_seconds_total)
    yield _counter("ep_restarted_steps", "Steps that were begun again", group.restarted_steps_total)
    yield _counter("ep_dispatched_bytes", "Tokens sent to other ranks", group.bytes_dispatched_total)
    yield _counter("ep_combined_bytes", "Results taken from other ranks", group.bytes_combined_total)
    waited, computed = group.waited_seconds_total, group.expert_tokens_total
    yield _counters("ep_waited_seconds", "Time that this rank has waited for others", "seat", waited)
    yield _counters("ep_expert_tokens", "Tokens that each expert has computed here", "expert", computed)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fastdeploy:{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"fastdeploy:{name}", text, value=value)


def _counters(name: str, text: str, label: str, values: Iterable[float]) -> Metric:
    """One for each index."""
    family = CounterMetricFamily(f"fastdeploy:{name}", text, labels=(label,))
    for index, value in enumerate(values):
        family.add_metric((str(index),), value)
    return family
