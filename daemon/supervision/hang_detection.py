"""Detection of hung replicas: their worker has unfinished requests and makes no progress.

A slow replica does not hang: a step may take long, and a long prompt takes many steps. When one rank of an
expert-parallel group hangs, all others stand still as well. So only the rank that the others wait for is
hung; the others are blocked. The memory of the group (`expert_parallel/snapshot.py`) shows which rank waits
for which others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...expert_parallel.snapshot import RankSnapshot, Snapshot

#: Seconds. Larger values are rejected as implausible.
_MAX_SILENCE = 1e9


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """Progress of a worker as reported by GET /health."""

    steps: int
    #: Unfinished sequences.
    requests: int
    #: Seconds since the last message of the worker while one is due; 0 if it has nothing to do.
    silent: float

    @classmethod
    def of(cls, health: Mapping[str, Any]) -> WorkerProgress | None:
        """Return None if the figures are missing or invalid, as while the replica is loading."""
        worker = health.get("worker")
        if not isinstance(worker, dict):
            return None
        steps, requests, silent = (worker.get(name) for name in ("steps", "requests", "silent"))
        if type(steps) is not int or type(requests) is not int or not isinstance(silent, int | float):
            return None
        # The range excludes NaN as well.
        return cls(steps, requests, float(silent)) if requests >= 0 and 0 <= silent < _MAX_SILENCE else None


@dataclass(slots=True)
class ProgressTracker:
    """Progress of one process over time. Times are on the daemon's clock."""

    last: WorkerProgress | None = None
    #: Time at which it last finished a step or was idle.
    last_progress: float = 0.0
    #: Time at which it last finished a step.
    last_step: float = 0.0
    #: Time since which an idle replica owes a probe its token; None if there is no such probe.
    token_due_since: float | None = None
    #: The last token probe got an error.
    token_failed: bool = False

    def update(self, progress: WorkerProgress | None, now: float) -> None:
        if progress is None:
            return
        if self.last is None or progress.steps != self.last.steps:
            self.last_progress = self.last_step = now
            if self.token_due_since is not None and not self.token_failed:
                # It works on other requests, and the probe waits behind them.
                self.token_due_since = now
        elif not progress.silent:
            self.last_progress = now
        self.last = progress

    def expect_token(self, now: float) -> None:
        """Record that a token probe of an idle replica has begun, unless one is under way."""
        if self.token_due_since is None:
            self.token_due_since = now

    def token_probed(self, ok: bool) -> None:
        """Record the result of a token probe."""
        self.token_failed = not ok
        if ok:
            self.token_due_since = None

    def stalled_for(self, now: float) -> float:
        """Return the seconds without progress on unfinished requests."""
        return min(self.last.silent, now - self.last_progress) if self.last else 0.0

    def idle_for(self, now: float) -> float:
        """Return the seconds without a step because there was nothing to do."""
        if self.last is None or self.last.requests or self.last.silent:
            return 0.0
        return now - self.last_step

    def token_overdue_for(self, now: float) -> float:
        """Return the seconds that a probe of an idle replica has waited for its token.

        0 if the worker itself owes a message; `stalled_for` measures that.
        """
        if self.token_due_since is None:
            return 0.0
        if self.last is not None and self.last.silent and not self.token_failed:
            return 0.0
        return now - self.token_due_since

    def compensate(self, seconds: float) -> None:
        """Ignore a time in which the daemon, and perhaps the whole machine, was suspended."""
        self.last_progress += seconds
        self.last_step += seconds
        if self.token_due_since is not None:
            self.token_due_since += seconds


@dataclass(frozen=True, slots=True)
class Stalled:
    """A replica that has made no progress for longer than `no_progress_timeout`."""

    name: str
    seconds: float
    requests: int
    #: Expert-parallel group and rank in it; None without expert parallelism.
    group: str | None
    rank: int


@dataclass(slots=True)
class HangReport:
    """Stalled replicas by name, each with the reason, for people."""

    #: To be killed.
    hung: dict[str, str] = field(default_factory=dict)
    #: Waiting for another rank, or slow.
    blocked: dict[str, str] = field(default_factory=dict)


def find_hung(
    stalled: Iterable[Stalled],
    groups: Mapping[str, Snapshot | None],
    members: Mapping[tuple[str, int], str],
    no_progress_timeout: float,
) -> HangReport:
    """Tell hung replicas from those that wait for a hung one.

    Args:
        groups: snapshots by group name; None for a group without members. Missing if it could not be read.
        members: (group, rank) -> name of the replica.
        no_progress_timeout: seconds without progress after which a rank is hung.
    """
    report = HangReport()
    for replica in stalled:
        what = f"no step for {replica.seconds:.0f} s, requests in flight: {replica.requests}"
        if replica.group is not None and replica.group not in groups:
            report.blocked[replica.name] = f"{what}; its expert group cannot be read"
            continue
        group = groups[replica.group] if replica.group is not None else None
        ranks = {rank.seat: rank for rank in group.seats} if group else {}
        if replica.rank not in ranks or replica.group is None:
            report.hung[replica.name] = what
            continue
        for blocker in root_blockers(ranks[replica.rank], ranks):
            name = members.get((replica.group, blocker.seat))
            _attribute(report, replica, what, blocker, name, no_progress_timeout)
    for name in report.hung:
        report.blocked.pop(name, None)
    return report


def root_blockers(rank: RankSnapshot, ranks: Mapping[int, RankSnapshot]) -> list[RankSnapshot]:
    """Return the ranks that wait for no other, found by following the waits from `rank`.

    If they wait in a cycle, return the rank that has waited longest. It is hung: the others have made
    progress since it began to wait, and so could it.
    """
    reached: dict[int, RankSnapshot] = {}
    ahead = [rank.seat]
    while ahead:
        number = ahead.pop()
        if number in ranks and number not in reached:
            reached[number] = ranks[number]
            ahead += ranks[number].waits_for
    ends = [rank for rank in reached.values() if not rank.waits_for]
    if not ends:
        ends = [max(reached.values(), key=lambda rank: (rank.seconds or 0.0, -rank.seat))]
    return sorted(ends, key=lambda rank: rank.seat)


def _attribute(
    report: HangReport,
    replica: Stalled,
    what: str,
    blocker: RankSnapshot,
    name: str | None,
    no_progress_timeout: float,
) -> None:
    """Enter a stalled replica and its blocker, which is replica `name`, into the report."""
    # A joining rank may have written no time yet; then that of the waiting rank counts.
    seconds = replica.seconds if blocker.seconds is None else blocker.seconds
    where = f"{blocker.phase or blocker.state}" + (
        f", layer {blocker.layer}" if blocker.layer is not None else ""
    )
    waits = f"{what}; waits for rank {blocker.seat} ({where})"
    if blocker.state == "dead":
        # The group notices by itself and continues without the dead rank.
        report.blocked[replica.name] = waits
    elif seconds < no_progress_timeout:
        is_itself = name == replica.name
        report.blocked[replica.name] = f"{what}; its step makes progress ({where})" if is_itself else waits
    elif name == replica.name:
        report.hung[name] = f"{what} ({where})"
    else:
        report.blocked[replica.name] = waits
        if name is not None:
            waited = f"other ranks have waited for it for {replica.seconds:.0f} s ({where})"
            report.hung.setdefault(name, waited)
