"""An expert-parallel group whose rank processes sleep, and whose rows a test writes."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from fastdeploy.expert_parallel import memory_file
from fastdeploy.expert_parallel.layout import PHASES, GroupLayout, RankSlotState
from fastdeploy.expert_parallel.membership import Membership, planner
from fastdeploy.expert_parallel.processes import start_time

LAYOUT = GroupLayout(num_ranks=4, num_layers=2, num_experts=8, max_tokens=16, k=2, hidden=64)


class QuietGroup:
    """Memory and sleeping ranks of a group. `close` ends the ranks and removes what is left in `root`.

    Without living ranks, a group in the common root is removed by any rank that starts elsewhere. `ranks`
    join before that is possible.
    """

    def __init__(self, name: str, *ranks: int, root: Path = memory_file.SHARED_MEMORY) -> None:
        self.name = name
        self.root = root
        self.processes: list[subprocess.Popen[bytes]] = []
        with memory_file.open_locked(name, LAYOUT, {}, patience=5.0, root=root) as self.memory:
            self._membership = Membership(self.memory, planner(LAYOUT.num_experts, redundant=0))
            if ranks:
                self.join(*ranks)

    def request(self, seat: int) -> None:
        process = subprocess.Popen(["sleep", "600"])
        self.processes.append(process)
        entry, started = self.memory.rank_slots[seat], start_time(process.pid)
        assert started is not None
        entry.pid, entry.start_time = process.pid, started
        self._membership.request(seat, RankSlotState.JOINING)

    def join(self, *ranks: int) -> None:
        for seat in ranks:
            self.request(seat)
        self._membership.apply_requests()

    def note(self, seat: int, phase: str, layer: int = 0, waits_for: int = 0, seconds: float = 0.0) -> None:
        """Write a seat's row; `waits_for` has a bit for each seat."""
        row = self.memory.rows[seat]
        row.phase, row.layer, row.waiting_for = PHASES.index(phase), layer, waits_for
        row.since_ns = time.monotonic_ns() - int(seconds * 1e9)

    def kill(self, index: int) -> None:
        self.processes[index].kill()
        self.processes[index].wait()

    def close(self) -> None:
        for index in range(len(self.processes)):
            self.kill(index)
        memory_file.remove(self.memory)
