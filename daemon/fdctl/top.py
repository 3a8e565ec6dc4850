"""`fdctl top`: current activity of the replicas, from the programs' own /metrics."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from ..control import protocol
from . import client
from .scrapes import BackgroundCalls, History, Scrape, scrape

#: Seconds between two frames.
_INTERVAL = 1.0
#: Seconds that a frame waits for scrapes.
_SCRAPE_TIMEOUT = 0.6
#: Seconds after which a figure is shown as "-".
_STALE = 4.0
#: Seconds.
_DAEMON_TIMEOUT = 5.0
_DAEMON = "daemon"
_TOKENS = "fastdeploy:generation_tokens_total"


def top(options: argparse.Namespace) -> int:
    source = Source(lambda: client.status(options, _DAEMON_TIMEOUT))
    if options.json or options.once or not sys.stdout.isatty():
        source.frame()
        time.sleep(_INTERVAL)
        frame = source.frame()
        if options.json:
            print(json.dumps(frame, indent=2))
            return protocol.OK
        from . import table

        return table.show(lambda: frame, table.of_top, watch=False)
    return _live(source)


class Source:
    """Source of frames: dicts in a stable schema (docs/fdctl.md). Rates need two frames.

    Args:
        status: returns the daemon's status, or raises FastDeployError.
    """

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._poll = status
        # The first status says where to scrape.
        self._status = status()
        self._problem = ""
        self._calls = BackgroundCalls()
        self._histories: dict[Hashable, History] = {}
        self._cpu = _cpu_times()

    def frame(self) -> dict[str, Any]:
        entries = [entry for entry in (self._status["router"], *self._status["replicas"]) if entry]
        calls: dict[Hashable, Callable[[], Any]] = {_DAEMON: self._poll}
        for entry in entries:
            if entry["pid"]:
                calls[_key(entry)] = _scraper(entry)
        self._calls.start(calls)
        self._take(self._calls.take(_SCRAPE_TIMEOUT))
        # Forget processes that have been replaced.
        self._histories = {key: value for key, value in self._histories.items() if key in calls}
        daemon, router = self._status["daemon"], self._status["router"]
        return {
            "daemon": {key: daemon[key] for key in ("url", "state", "ready", "replicas")},
            "problem": self._problem or None,
            "router": self._router(router),
            "box": self._machine(),
            "replicas": [self._replica(entry) for entry in self._status["replicas"]],
        }

    def _take(self, results: dict[Hashable, Any]) -> None:
        for key, result in results.items():
            if key == _DAEMON:
                # While the daemon does not answer, its last status is shown with the problem.
                self._problem = str(result) if isinstance(result, Exception) else ""
                self._status = self._status if self._problem else result
            elif isinstance(result, Scrape):
                self._histories.setdefault(key, History()).add(result)

    def _history(self, entry: dict[str, Any] | None) -> History:
        """Return a program's history, or an empty one if its last scrape is too old."""
        history = self._histories.get(_key(entry)) if entry else None
        fresh = history is not None and time.monotonic() - history.scrapes[-1].at < _STALE
        return history if history is not None and fresh else History()

    def _router(self, entry: dict[str, Any] | None) -> dict[str, Any]:
        history = self._history(entry)
        return {
            "state": entry["state"] if entry else "-",
            "requests_per_second": _rate(history, "inference_requests_total"),
            "retries": _now(history, "fd_router_retries_total", 0.0),
            "resumes": _now(history, "fd_router_resumes_total", 0.0),
            "in_flight": _now(history, "fd_router_in_flight"),
        }

    def _replica(self, entry: dict[str, Any]) -> dict[str, Any]:
        history = self._history(entry)
        copied = ["replica", "state", "intent", "draining", "drain_confirmed"]
        copied += ["progress", "in_flight", "restarts"]
        return {key: entry[key] for key in copied} | {
            "running": _now(history, "fastdeploy:num_requests_running"),
            "queue": _now(history, "fastdeploy:num_requests_waiting"),
            "kv_use": _now(history, "fastdeploy:gpu_cache_usage_perc"),
            "tokens_per_second": history.rate(_TOKENS),
            "prompt_tokens_per_second": history.rate("fastdeploy:prompt_tokens_total"),
            "ttft": _mean(history, "time_to_first_token_seconds"),
            "itl": _mean(history, "time_per_output_token_seconds"),
            "ep_step": history.mean("fastdeploy:ep_step_seconds_total", "fastdeploy:ep_steps_total"),
            "gpu_use": _now(history, "fastdeploy:gpu_utilization_perc"),
            "gpu_memory_used": _now(history, "fastdeploy:gpu_memory_used_bytes"),
            "gpu_memory_total": _now(history, "fastdeploy:gpu_memory_total_bytes"),
        }

    def _machine(self) -> dict[str, Any]:
        before, self._cpu = self._cpu, _cpu_times()
        busy, total = (now - then for now, then in zip(self._cpu, before, strict=True))
        memory = _memory()
        return {
            "cores": os.cpu_count(),
            # The kernel's idle time can decrease by a tick.
            "cpu": min(1.0, max(0.0, busy / total)) if total > 0 else None,
            "memory_used": memory["MemTotal"] - memory["MemAvailable"],
            "memory_total": memory["MemTotal"],
        }


def _live(source: Source) -> int:
    from rich.live import Live

    from . import table

    try:
        with _keys() as pressed, Live(table.of_top(source.frame()), auto_refresh=False, screen=True) as live:
            while "q" not in pressed(_INTERVAL):
                live.update(table.of_top(source.frame()), refresh=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise BrokenPipeError("the terminal is gone") from None
    return protocol.OK


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that returns the keys pressed within some seconds; "q" for a closed terminal."""

    def sleep(seconds: float) -> str:
        time.sleep(seconds)
        return ""

    if not sys.stdin.isatty():
        yield sleep
        return
    terminal = sys.stdin.fileno()

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([terminal], [], [], seconds)
        return (os.read(terminal, 64).decode(errors="replace") or "q") if ready else ""

    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield pressed
    finally:
        with contextlib.suppress(termios.error):  # it may be gone
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _scraper(entry: dict[str, Any]) -> Callable[[], Scrape]:
    return lambda: scrape(entry["host"], entry["metrics_port"])


def _key(entry: dict[str, Any]) -> Hashable:
    """Return the key of a process: a restarted process has new counters."""
    return entry["name"], entry["pid"]


def _now(history: History, gauge: str, missing: float | None = None) -> float | None:
    """Return the last value of a gauge; `missing` if the program answers without it."""
    if not history.scrapes:
        return None
    value = history.scrapes[-1].total(gauge)
    return missing if value is None else value


def _rate(history: History, counter: str) -> float | None:
    """Return a counter's rate. A counter that does not exist yet counts as 0."""
    if len(history.scrapes) < 2:
        return None
    return history.rate(counter) or 0.0


def _mean(history: History, histogram: str) -> float | None:
    return history.mean(f"fastdeploy:{histogram}_sum", f"fastdeploy:{histogram}_count")


def _cpu_times() -> tuple[float, float]:
    """Return busy and total ticks of all cores."""
    times = [float(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    idle = times[3] + times[4]
    return sum(times) - idle, sum(times)


def _memory() -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {name.rstrip(":"): 1024 * int(value) for name, value, *_ in lines}
