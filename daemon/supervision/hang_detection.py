"""Which replicas hang: their workers have work, finish no step, and wait for nobody.

Slow is not dead: a step may take its time, and a long prompt is many steps. Ranks of an expert-parallel group
all stand still while one of them does, so there the one is to blame that the others wait for; they are left
alone. What a group waits for is seen in its memory (`expert_parallel/snapshot.py`), without asking anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...expert_parallel.snapshot import RankSnapshot, Snapshot

#: Seconds. A longer silence is not a plausible answer.
_FOREVER = 1e9


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """What /health tells of the worker."""

    steps: int
    #: Sequences that it has in hand.
    requests: int
    #: Seconds for which it has said nothing though it has something to do; 0 if it has nothing to do.
    silent: float

    @classmethod
    def of(cls, health: Mapping[str, Any]) -> WorkerProgress | None:
        """None if it tells nothing: it is loading, or it is no engine of ours."""
        worker = health.get("worker")
        if not isinstance(worker, dict):
            return None
        steps, requests, silent = (worker.get(name) for name in ("steps", "requests", "silent"))
        if type(steps) is not int or type(requests) is not int or not isinstance(silent, int | float):
            return None
        # The range excludes NaN as well.
        return cls(steps, requests, float(silent)) if requests >= 0 and 0 <= silent < _FOREVER else None


@dataclass(slots=True)
class ProgressTracker:
    """What has been seen of one process. Times are the daemon's own, so that it can be forgiving."""

    pulse: WorkerProgress | None = None
    #: When it was last seen to have finished a step, or to have nothing to do.
    moved: float = 0.0
    #: When it was last seen to have finished a step.
    stepped: float = 0.0
    #: Since when a token is awaited from it only because it was idle; None if none is.
    tested: float | None = None
    #: Instead of the token there has come an error.
    refused: bool = False

    def saw(self, pulse: WorkerProgress | None, now: float) -> None:
        if pulse is None:
            return
        if self.pulse is None or pulse.steps != self.pulse.steps:
            self.moved = self.stepped = now
            if self.tested is not None and not self.refused:
                # Others have come meanwhile, and it waits its turn.
                self.tested = now
        elif not pulse.silent:
            self.moved = now
        self.pulse = pulse

    def stuck(self, now: float) -> float:
        """For how many seconds it has made no progress with what it has in hand."""
        return min(self.pulse.silent, now - self.moved) if self.pulse else 0.0

    def idle(self, now: float) -> float:
        """For how many seconds it has computed nothing, as it had nothing to do."""
        if self.pulse is None or self.pulse.requests or self.pulse.silent:
            return 0.0
        return now - self.stepped

    def tested_for(self, now: float) -> float:
        """For how many seconds a token is awaited, if the worker does not owe it: that is told by `stuck`."""
        if self.tested is None or (self.pulse is not None and self.pulse.silent and not self.refused):
            return 0.0
        return now - self.tested

    def forgive(self, seconds: float) -> None:
        """The daemon was stopped for so long, and perhaps everybody else, too."""
        self.moved += seconds
        self.stepped += seconds
        if self.tested is not None:
            self.tested += seconds


@dataclass(frozen=True, slots=True)
class Stuck:
    """A replica whose worker has made no progress for long enough to ask why."""

    name: str
    seconds: float
    requests: int
    #: Where it is in an expert-parallel group, if it is to be in one.
    group: str | None
    seat: int


@dataclass(slots=True)
class Judgement:
    """Names of replicas, and why, for people."""

    guilty: dict[str, str] = field(default_factory=dict)
    excused: dict[str, str] = field(default_factory=dict)


def judge(
    stuck: Iterable[Stuck],
    groups: Mapping[str, Snapshot | None],
    members: Mapping[tuple[str, int], str],
    hang_after: float,
) -> Judgement:
    """Who hangs.

    Args:
        groups: as they are now; None for one that nobody is in. One that is missing could not be looked at.
        members: (group, seat) -> the replica that is to sit there.
    """
    judgement = Judgement()
    for one in stuck:
        what = f"no step for {one.seconds:.0f} s, {one.requests} in hand"
        if one.group is not None and one.group not in groups:
            judgement.excused[one.name] = f"{what}; its expert group cannot be looked at"
            continue
        group = groups[one.group] if one.group is not None else None
        seats = {seat.seat: seat for seat in group.seats} if group else {}
        if one.seat not in seats or one.group is None:
            judgement.guilty[one.name] = what
            continue
        for culprit in awaited_by(seats[one.seat], seats):
            _weigh(judgement, one, what, culprit, members.get((one.group, culprit.seat)), hang_after)
    for name in judgement.guilty:
        judgement.excused.pop(name, None)
    return judgement


def awaited_by(seat: RankSnapshot, seats: Mapping[int, RankSnapshot]) -> list[RankSnapshot]:
    """For whom it waits in the end, by way of others: those that wait for nobody. It may be one of them.

    Where they wait for each other, the one that has done so for longest: all others have gone on since, and
    it would have, had it looked.
    """
    seen: dict[int, RankSnapshot] = {}
    ahead = [seat.seat]
    while ahead:
        number = ahead.pop()
        if number in seats and number not in seen:
            seen[number] = seats[number]
            ahead += seats[number].waits_for
    ends = [one for one in seen.values() if not one.waits_for]
    if not ends:
        ends = [max(seen.values(), key=lambda one: (one.seconds or 0.0, -one.seat))]
    return sorted(ends, key=lambda one: one.seat)


def _weigh(
    judgement: Judgement, one: Stuck, what: str, culprit: RankSnapshot, name: str | None, hang_after: float
) -> None:
    # What a newcomer has not written yet is told by those who wait for it.
    seconds = one.seconds if culprit.seconds is None else culprit.seconds
    where = f"{culprit.phase or culprit.state}" + (
        f", layer {culprit.layer}" if culprit.layer is not None else ""
    )
    waits = f"{what}; waits for seat {culprit.seat} ({where})"
    if culprit.state == "dead":
        # The others will notice, and go on without it.
        judgement.excused[one.name] = waits
    elif seconds < hang_after:
        judgement.excused[one.name] = f"{what}; its step goes on ({where})" if name == one.name else waits
    elif name == one.name:
        judgement.guilty[name] = f"{what} ({where})"
    else:
        judgement.excused[one.name] = waits
        if name is not None:
            judgement.guilty.setdefault(name, f"in the way of others for {one.seconds:.0f} s ({where})")
