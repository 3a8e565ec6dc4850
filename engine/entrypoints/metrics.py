"""Metrics of a replica, under FastDeploy's names."""

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
from .gpu_usage import GpuUsage, GpuUsageReader

# Creation times of counters would double the number of lines.
disable_created_metrics()
# Count in memory even if PROMETHEUS_MULTIPROC_DIR is set, as it is for FastDeploy.
values.ValueClass = values.MutexValue

# FastDeploy's first-token buckets end at 1 s, but a long prompt on a CPU takes a minute.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class ReplicaMetrics:
    """Counters and histograms of the API process, and gauges from the worker's statistics.

    Args:
        read_stats: returns the worker's latest statistics; None before the first step.
        read_sizes: returns the sizes of its cache; None before it is ready.
        max_num_seqs: maximum sequences in a batch.
        read_gpu: returns the usage of the GPU with this UUID, or None if it is unknown.
    """

    content_type = CONTENT_TYPE

    def __init__(
        self,
        read_stats: Callable[[], Stats | None],
        read_sizes: Callable[[], Ready | None],
        max_num_seqs: int,
        read_gpu: Callable[[str], GpuUsage | None] | None = None,
    ) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(f"fastdeploy:{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"fastdeploy:{name}", text, buckets=buckets, registry=registry)

        self.requests = counter("requests_number", "Requests sent to the engine")
        self.successes = counter("request_success", "Requests that were completed")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens")
        self.generation_tokens = counter("generation_tokens", "Generated tokens")
        self.first_token = histogram(
            "time_to_first_token_seconds",
            "Seconds from the arrival of a request to its first token",
            _FIRST_TOKEN,
        )
        self.per_token = histogram(
            "time_per_output_token_seconds", "Seconds from one token of a choice to the next", _PER_TOKEN
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "Seconds from the arrival of a request to its end", _WHOLE
        )
        self.prompt_length = histogram("request_prompt_tokens", "Tokens per prompt", _TOKENS)
        self.generation_length = histogram("request_generation_tokens", "Tokens per choice", _TOKENS)
        self.max_tokens = histogram("request_params_max_tokens", "max_tokens per request", _TOKENS)
        registry.register(_EngineCollector(read_stats, read_sizes, max_num_seqs))
        registry.register(_GpuCollector(read_sizes, read_gpu or GpuUsageReader().read))

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the worker's statistics at each scrape, so that steps have no overhead."""

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
            # Ready, but before the first step.
            stats = Stats(0, 0, sizes.num_blocks, sizes.num_blocks, 0, 0, 0, 0, 0, self._max_num_seqs)
        used = stats.num_blocks - stats.num_free_blocks
        queried = stats.prefix_cache_query_tokens_total
        hit = stats.prefix_cache_hit_tokens_total
        yield _gauge("num_requests_running", "Sequences in the batch", stats.num_running)
        yield _gauge("num_requests_waiting", "Sequences waiting for room in the batch", stats.num_waiting)
        yield _gauge("batch_size", "Tokens in the latest step", stats.batch_tokens)
        yield _gauge("max_batch_size", "Maximum number of sequences in the batch", stats.max_num_seqs)
        room = max(stats.max_num_seqs - stats.num_running, 0)
        yield _gauge("available_batch_size", "Sequences that can still join the batch", room)
        yield _gauge("max_gpu_block_num", "KV cache blocks", stats.num_blocks)
        yield _gauge("available_gpu_block_num", "Free KV cache blocks", stats.num_free_blocks)
        yield _gauge("free_gpu_block_num", "Free KV cache blocks", stats.num_free_blocks)
        yield _gauge(
            "gpu_cache_usage_perc", "Fraction of the KV cache blocks in use, 0..1", used / stats.num_blocks
        )
        yield _gauge(
            "hit_token_rate",
            "Fraction of prompt tokens found in the prefix cache, 0..1",
            hit / max(queried, 1),
        )
        yield _counter("request_preempted", "Preempted sequences", stats.preemptions_total)
        yield _counter("prefix_cache_token_num", "Prompt tokens found in the prefix cache", hit)
        yield _counter("prefix_cache_query_token_num", "Prompt tokens looked up in the prefix cache", queried)
        if stats.expert_parallel is not None:
            yield from _group_metrics(stats.expert_parallel)


class _GpuCollector(Collector):
    """Reads the usage of the replica's GPU at each scrape."""

    def __init__(
        self, read_sizes: Callable[[], Ready | None], read_gpu: Callable[[str], GpuUsage | None]
    ) -> None:
        self._read_sizes = read_sizes
        self._read_gpu = read_gpu

    def collect(self) -> Iterator[Metric]:
        ready = self._read_sizes()
        if ready is None or not ready.gpu_uuid:
            return
        usage = self._read_gpu(ready.gpu_uuid)
        if usage is None:
            return
        figures = [
            ("gpu_memory_used_bytes", "Memory of the GPU used by all its processes", usage.memory_used),
            ("gpu_memory_total_bytes", "Memory of the GPU", usage.memory_total),
            (
                "gpu_utilization_perc",
                "Fraction of the time in which the GPU computed, for any process, 0..1",
                usage.utilization,
            ),
        ]
        for name, text, value in figures:
            if value is not None:
                family = GaugeMetricFamily(f"fastdeploy:{name}", text, labels=("gpu",))
                family.add_metric((ready.gpu_uuid,), value)
                yield family


def _group_metrics(group: ExpertParallelStats) -> Iterator[Metric]:
    yield _gauge("ep_epoch", "Epoch of the expert group; increases when its members change", group.epoch)
    yield _gauge("ep_active_seats", "Ranks in the expert group", len(group.active_ranks))
    yield _counter("ep_joins", "Ranks that have joined; the same value at each rank", group.joins_total)
    yield _counter("ep_leaves", "Ranks that have left; the same value at each rank", group.leaves_total)
    yield _counter("ep_losses", "Ranks that have died; the same value at each rank", group.losses_total)
    yield _counter("ep_steps", "Steps of the group with this rank as a member", group.steps_total)
    yield _counter("ep_step_seconds", "Seconds that those steps took", group.step_seconds_total)
    yield _counter(
        "ep_restarted_steps",
        "Steps computed again, because members of the group changed",
        group.restarted_steps_total,
    )
    yield _counter("ep_dispatched_bytes", "Bytes of tokens sent to other ranks", group.bytes_dispatched_total)
    yield _counter(
        "ep_combined_bytes", "Bytes of results received from other ranks", group.bytes_combined_total
    )
    waited, computed = group.waited_seconds_total, group.expert_tokens_total
    yield _counters("ep_waited_seconds", "Seconds that this rank has waited for each rank", "seat", waited)
    yield _counters(
        "ep_expert_tokens", "Tokens that this rank has computed with each expert", "expert", computed
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fastdeploy:{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"fastdeploy:{name}", text, value=value)


def _counters(name: str, text: str, label: str, values: Iterable[float]) -> Metric:
    """Return a counter with one value per index, which becomes the label."""
    family = CounterMetricFamily(f"fastdeploy:{name}", text, labels=(label,))
    for index, value in enumerate(values):
        family.add_metric((str(index),), value)
    return family
