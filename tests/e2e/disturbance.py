"""Disturbances of a system under load: reloads, and kills of processes."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import psutil

from .conftest import System, wait_until
from .steady_clients import Clients

#: Probability that a kill hits two replicas at once.
_TWO_AT_ONCE = 0.2
#: Longest pause in seconds before a kill that is allowed.
_PEACE = 1.0
#: Time in seconds after a kill during which the router may still send requests to the dead replica.
_NEWS = 0.2
#: The processes of a replica, each a child of the one before.
_PARTS = ("arbiters", "HTTP processes", "workers")


class Disturbance:
    def __init__(self, system: System, clients: Clients, chance: Random) -> None:
        self.done: Counter[str] = Counter()
        #: Duration by phase, summed over phases of the same name.
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.lowest_ready: dict[str, int] = {}
        self._system = system
        self._clients = clients
        self._chance = chance
        #: Pids of the arbiters of replicas that were hit.
        self._killed: set[int] = set()

    @property
    def kills(self) -> int:
        return sum(self.done[f"{part} killed"] for part in _PARTS)

    def reload(self, old: str, new: str) -> None:
        """Change `old` in dp.toml to `new` and reload; return when the reload is done."""
        config = self._system.config
        text = config.read_text(encoding="utf-8")
        assert text.count(old) == 1, text
        config.write_text(text.replace(old, new), encoding="utf-8")
        answer = self._system.fdctl("reload", "--wait", timeout=600)
        assert answer.returncode == 0, f"{answer.stdout}\n{answer.stderr}"
        self.done["reloads"] += 1

    def kill(self, count: int) -> None:
        """Kill `count` processes of replicas, at random moments, including replicas that load.

        Before the next kill, the requests that wait for the beginning of their answers must have got it, and
        half of the replicas must be in service, including one that survives: the router gives up a request if
        several replicas in a row die with it, and without replicas no request is answered.
        """
        while count > 0:
            at_once = min(count, 1 + (self._chance.random() < _TWO_AT_ONCE))
            time.sleep(self._chance.random() * _PEACE)
            for replica in wait_until(lambda: self._victims(at_once), "half of the replicas are in service"):  # noqa: B023
                self._killed.add(replica["pid"])
                count -= self._kill_part(replica)
            # Include requests that are sent before the router learns of the death.
            time.sleep(_NEWS)
            waiting = self._clients.unanswered()
            wait_until(lambda: not waiting & self._clients.unanswered(), "answers begin")  # noqa: B023

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the lowest number of READY replicas within the block, then wait for answered requests."""
        over = threading.Event()
        began = time.monotonic()

        def watch() -> None:
            while not over.wait(0.1):
                ready = self._status()["daemon"]["ready"]
                self.lowest_ready[name] = min(ready, self.lowest_ready.get(name, ready))

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            try:
                yield
            finally:
                over.set()
                watching.result()
        self.seconds[name] += time.monotonic() - began
        goal = self._clients.done["requests"] + self._clients.count
        wait_until(lambda: self._clients.done["requests"] > goal, f"requests are answered after: {name}")

    def report(self) -> str:
        counts = [f"{count} {what}" for what, count in self.done.items()]
        phases = [
            f"{name} {seconds:.0f} s, lowest READY {self.lowest_ready.get(name)}"
            for name, seconds in self.seconds.items()
        ]
        return "; ".join([*counts, *phases])

    def _kill_part(self, replica: dict[str, Any]) -> bool:
        """Kill a random process of the replica; return False if an earlier kill has already ended it."""
        depth, wanted = 0, self._chance.randrange(len(_PARTS))
        try:
            process = psutil.Process(replica["pid"])
            # A replica that loads may not have all of its processes yet.
            while depth < wanted and (children := process.children()):
                # The HTTP process may have short-lived children besides its worker, which is the oldest.
                process, depth = min(children, key=psutil.Process.create_time), depth + 1
            process.kill()
        except psutil.NoSuchProcess:
            return False
        self.done[f"{_PARTS[depth]} killed"] += 1
        return True

    def _victims(self, count: int) -> list[dict[str, Any]]:
        """Choose running replicas to kill; none while too few are in service."""
        alive = [replica for replica in self._status()["replicas"] if replica["pid"]]
        # The daemon notices a death, and the router a new replica, with a delay.
        serving = [
            replica
            for replica in alive
            if replica["state"] == "READY"
            and replica["in_flight"] is not None
            and replica["pid"] not in self._killed
        ]
        victims = self._chance.sample(alive, min(count, len(alive)))
        enough = 2 * len(serving) >= self._system.replicas
        return victims if enough and any(replica not in victims for replica in serving) else []

    def _status(self) -> dict[str, Any]:
        status = self._system.status()
        assert status is not None
        return status
