"""What an operator does to a system under load, and what befalls it: reloads, and killed processes."""

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

from fastdeploy.daemon.control import protocol

from .conftest import System, wait_until
from .steady_clients import Clients

#: Of times that something is killed, so many are times for two replicas at once.
_TWO_AT_ONCE = 0.2
#: Seconds to the next kill, at most, once it may come.
_PEACE = 1.0
#: Seconds after a kill in which requests may still be sent to a replica that is dead.
_NEWS = 0.2
#: Each a child of the one before.
_PARTS = ("arbiters", "HTTP processes", "workers")


class Disturbance:
    def __init__(self, system: System, clients: Clients, chance: Random) -> None:
        self.done: Counter[str] = Counter()
        #: By phase, all of that name together.
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.lowest_ready: dict[str, int] = {}
        self._system = system
        self._clients = clients
        self._chance = chance
        #: By the pids of their arbiters.
        self._killed: set[int] = set()

    def reload(self, old: str, new: str) -> None:
        """With another dp.toml; returns when it is done."""
        config = self._system.config
        text = config.read_text(encoding="utf-8")
        assert text.count(old) == 1, text
        config.write_text(text.replace(old, new), encoding="utf-8")
        answer = self._system.fdctl("reload", "--wait", timeout=600)
        assert answer.returncode == 0, f"{answer.stdout}\n{answer.stderr}"
        self.done["reloads"] += 1

    def kill(self, count: int) -> None:
        """So many processes of replicas, at random moments, also while they load.

        The next falls when whatever waited for the beginning of its answer has got it, and half of the
        replicas are in service, one of them afterwards, too: the router gives a request up over which one
        replica after the other dies, and a fleet that is down answers nothing.
        """
        while count > 0:
            at_once = min(count, 1 + (self._chance.random() < _TWO_AT_ONCE))
            time.sleep(self._chance.random() * _PEACE)
            for replica in wait_until(lambda: self._victims(at_once), "half of the replicas are in service"):  # noqa: B023
                self._killed.add(replica["pid"])
                count -= self._kill_part(replica)
            # Also what is sent before the router knows.
            time.sleep(_NEWS)
            waiting = self._clients.unanswered()
            wait_until(lambda: not waiting & self._clients.unanswered(), "answers begin")  # noqa: B023

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Meanwhile READY replicas are counted, ten times a second. Requests are answered after it, too."""
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
        """False if it has ended by itself: of a death a moment ago."""
        depth, wanted = 0, self._chance.randrange(len(_PARTS))
        try:
            process = psutil.Process(replica["pid"])
            # One that loads may have got no further yet.
            while depth < wanted and (children := process.children()):
                # The HTTP process has other, passing, ones beside its worker.
                process, depth = min(children, key=psutil.Process.create_time), depth + 1
            process.kill()
        except psutil.NoSuchProcess:
            return False
        self.done[f"{_PARTS[depth]} killed"] += 1
        return True

    def _victims(self, count: int) -> list[dict[str, Any]]:
        """Any that run; none while too few are in service."""
        alive = [replica for replica in self._status()["replicas"] if replica["pid"]]
        # The daemon learns of a death a moment later, and the router of a new replica.
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
        """Without the second of CPU time that another fdctl takes."""
        path = protocol.socket_path(self._system.prefix / "run")
        *_, last = protocol.request(path, {"do": "status"}, timeout=60)
        status: dict[str, Any] = last["status"]
        return status
