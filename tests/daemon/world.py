"""A fleet whose processes, probes and clock are controlled by a test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeploy.daemon.config.loader import parse
from fastdeploy.daemon.config.programs import Program, programs_of
from fastdeploy.daemon.process.supervisor_client import Process, Supervisor
from fastdeploy.daemon.process.supervisord_config import Layout
from fastdeploy.daemon.supervision.fleet import Fleet
from fastdeploy.daemon.supervision.probes import Probes, Reading
from fastdeploy.daemon.supervision.program_state import ProgramState
from fastdeploy.expert_parallel.snapshot import Snapshot

from ..ports import free_ports


class FakeSupervisor(Supervisor):
    """Starts no process; a program that is started runs until the test ends it."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.running: dict[str, Process] = {}
        #: The description of every exit.
        self.how = "ended"

    def how_it_ended(self, name: str) -> str:
        return self.how

    def processes(self) -> dict[str, Process]:
        return dict(self.running)

    def start(self, name: str) -> None:
        # A pid that no process has: those of the kernel are below 2**22.
        self.running[name] = Process(name, "RUNNING", (1 << 22) + len(self.running) + 1, 1)

    def stop(self, name: str) -> None:
        self.end(name)

    def replace(self, name: str, *, add: bool) -> None:
        pass

    def end(self, name: str) -> None:
        process = self.running[name]
        self.running[name] = Process(name, "EXITED", 0, process.started)


@dataclass
class Worker:
    """The progress that a replica reports of its worker."""

    steps: int = 0
    requests: int = 0
    #: Time of its last sign of progress, or of its first request after a rest.
    since: float = 0.0

    def tell(self, now: float) -> dict[str, float]:
        silent = now - self.since if self.requests else 0.0
        return {"pid": 1, "steps": self.steps, "requests": self.requests, "silent": silent}


class FakeProbes(Probes):
    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(lambda: None)
        self._clock = clock
        self.good: set[str] = set()
        #: Replicas that are healthy but generate no token.
        self.wordless: set[str] = set()
        #: Replicas that never answer a request for a token.
        self.silent: set[str] = set()
        self.workers: dict[str, Worker] = {}
        #: Number of token probes by replica.
        self.tokens: Counter[str] = Counter()
        self._waiting: list[Reading] = []

    def ask(self, program: Program, pid: int, token: bool) -> None:
        good = program.name in self.good
        if token:
            self.tokens[program.name] += 1
            if program.name in self.silent:
                return
            good &= program.name not in self.wordless
        worker = self.workers.get(program.name)
        health = {} if token or worker is None else {"worker": worker.tell(self._clock())}
        problem = "" if good else "no token" if token else "unwell"
        self._waiting.append(Reading(program.name, pid, good, token, True, health, problem))

    def take(self) -> list[Reading]:
        readings, self._waiting = self._waiting, []
        return readings


class World:
    """A fleet of fakes.

    Args:
        parallel: further lines of [parallel].
        look: returns the snapshot of an expert group.
    """

    def __init__(
        self,
        directory: Path,
        replicas: int,
        parallel: str = "expert_parallel = false",
        look: Callable[[str], Snapshot | None] = lambda name: None,
        **supervise: Any,
    ) -> None:
        ports = free_ports(1 + 3 * replicas)
        lines = [
            '[model]\npath = "demo"',
            f"[parallel]\ndata_parallel_size = {replicas}\n{parallel}",
            f"[router]\nport = {ports[0]}",
            f"[engine]\nports = {ports[1 : 1 + replicas]}",
            f"metrics_ports = {ports[1 + replicas : 1 + 2 * replicas]}",
            f"engine_worker_queue_ports = {ports[1 + 2 * replicas :]}",
            "[supervise]",
            *(f"{key} = {value}" for key, value in supervise.items()),
        ]
        config = parse("\n".join(lines), "dp.toml", directory, directory)
        self.now = 1000.0
        self.supervisor = FakeSupervisor(Layout(config.paths.run, config.paths.logs))
        self.probes = FakeProbes(lambda: self.now)
        self.fleet = Fleet(
            config,
            programs_of(config),
            self.supervisor,
            self.probes,
            watch=lambda pid: None,
            clock=lambda: self.now,
            rng=lambda: 1.0,
            read_snapshot=look,
        )
        self.fleet.adopt()

    def pass_time(self, seconds: float, step: float = 0.5) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            self.fleet.step()

    def become_ready(self, *names: str) -> None:
        self.probes.good |= set(names)
        self.pass_time(3.0)

    def work(self, name: str, requests: int = 1) -> None:
        """Let its worker finish a step, after which it has `requests` in hand."""
        worker = self.probes.workers.setdefault(name, Worker())
        worker.steps, worker.requests, worker.since = worker.steps + 1, requests, self.now

    def names(self, state: ProgramState) -> set[str]:
        return {name for name, replica in self.fleet.programs.items() if replica.state is state}
