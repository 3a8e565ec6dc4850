"""Placement of the experts of one MoE layer on the ranks of a group. Pure: no clock, no I/O.

A plan depends only on its arguments, so every rank computes the same one. Numbers of replicas are always
balanced, because memory is sized for that: two ranks differ by at most one. Within this limit the load is
balanced.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import FastDeployError

#: A trade must lower the load of the heaviest rank by this fraction. Measured loads are noisy, and each
#: expert that moves must be read from the weight file.
MIN_GAIN = 0.01

#: A smaller total load counts as zero. Averages that decay without traffic become subnormal numbers, one
#: percent of which is zero, so that trades might never end.
NEGLIGIBLE = 1e-200


class TooFewSlots(FastDeployError):
    """All ranks together have fewer slots than the layer has experts."""


@dataclass(frozen=True, slots=True, order=True)
class ExpertReplica:
    """Location of one copy of an expert: `slot` is an index into the rank's expert memory of this layer."""

    rank: int
    slot: int


@dataclass(frozen=True, slots=True)
class Placement:
    """`replicas[e]`: the copies of expert `e`, ascending by rank; at least one, at most one per rank."""

    replicas: tuple[tuple[ExpertReplica, ...], ...]

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Return the experts on a rank, ascending."""
        return tuple(
            expert
            for expert, replicas in enumerate(self.replicas)
            if any(replica.rank == rank for replica in replicas)
        )

    def moves_from(self, old: Placement) -> int:
        """Return how many replicas change rank between `old` and this placement."""
        return len(self._pairs() - old._pairs())

    def _pairs(self) -> set[tuple[int, int]]:
        return {
            (expert, replica.rank) for expert, replicas in enumerate(self.replicas) for replica in replicas
        }


def plan(
    num_experts: int,
    ranks: Sequence[int],
    *,
    load: Sequence[float] | None = None,
    redundant: int = 0,
    slots: int | None = None,
    previous: Placement | None = None,
    rebalance: bool = False,
) -> Placement:
    """Place each expert on a rank, and the most used ones on several.

    The number of replicas and their assignment follow EPLB (https://github.com/deepseek-ai/EPLB,
    `replicate_experts` and `balanced_packing`): each redundant replica goes to the expert with the highest
    load per replica; then the heaviest replica goes first, to the least loaded rank that has room (longest
    processing time first, Graham 1969). EPLB plans from scratch each time. Here experts keep their ranks:

    - Without `rebalance`, ranks have joined or left. Only replicas that lost their rank, are new, or must
      move to keep the numbers equal are assigned. Without redundant experts this is the minimum of moves.
    - With `rebalance`, and in a first plan, the heaviest rank then trades with lighter ones while that lowers
      the maximum load.

    Args:
        ranks: the members, in any order, not necessarily consecutive.
        load: load of each expert, in any unit; None or a negligible sum: equal loads.
        redundant: replicas beyond one per expert; those that do not fit are omitted.
        slots: slots of each rank; None: as many as experts.
        previous: the placement in force; it may contain ranks that have left.
        rebalance: move experts to balance the load. The maximum load is never higher than with `previous`, if
            that has as many replicas, in equal numbers, on these ranks. If its choice of replicated experts
            is better, it is returned unchanged.

    Raises:
        TooFewSlots: there are more experts than slots.
    """
    present = sorted(set(ranks))
    assert present, "a rank makes the plan, so there is at least one"
    assert load is None or len(load) == num_experts, "every expert has a load"
    assert previous is None or len(previous.replicas) == num_experts, "a layer keeps its experts"
    room = num_experts if slots is None else slots
    if num_experts > room * len(present):
        raise TooFewSlots(
            f"{num_experts} experts do not fit on {len(present)} ranks of {room} slots each: "
            f"at least {-(-num_experts // len(present))} slots per rank are needed"
        )
    if load is None or math.fsum(load) < NEGLIGIBLE:
        load = [1.0] * num_experts
    total = min(num_experts + redundant, min(num_experts, room) * len(present))
    counts = _replica_counts(load, len(present), total)
    before: _Slots = {rank: {} for rank in present}
    for expert, replicas in enumerate(previous.replicas if previous else ()):
        for replica in replicas:
            if replica.rank in before:
                before[replica.rank][expert] = replica.slot

    table = _Table(before, load, counts)
    table.drop_surplus()
    table.even_out_numbers()
    table.assign_missing()
    if rebalance or previous is None:
        table.balance_load()
    if rebalance and previous is not None and _fits(previous, before, total, room):
        as_it_was = _Table(before, load, [len(replicas) for replicas in previous.replicas])
        # Possible only if `previous` replicates other experts than `counts` does.
        if table.maximum() > as_it_was.maximum():
            return previous
    return _with_slots(num_experts, table.held, before, room)


#: Rank -> expert on it -> slot.
_Slots = dict[int, dict[int, int]]


def _replica_counts(load: Sequence[float], limit: int, total: int) -> list[int]:
    """Distribute `total` replicas, at least one and at most `limit` per expert."""
    counts = [1] * len(load)
    heaviest = [(-one, expert) for expert, one in enumerate(load)]
    heapq.heapify(heaviest)
    for _ in range(total - len(load)):
        _, expert = heapq.heappop(heaviest)
        counts[expert] += 1
        if counts[expert] < limit:
            heapq.heappush(heaviest, (-load[expert] / counts[expert], expert))
    return counts


def _fits(placement: Placement, present: _Slots, total: int, room: int) -> bool:
    """Return True if all replicas are on present ranks, `total` of them, in equal numbers and valid slots."""
    counts = [len(experts) for experts in present.values()]
    return (
        sum(map(len, placement.replicas)) == sum(counts) == total
        and max(counts) - min(counts) <= 1
        and all(slot < room for experts in present.values() for slot in experts.values())
    )


def _with_slots(num_experts: int, held: dict[int, set[int]], before: _Slots, room: int) -> Placement:
    """Return the placement: experts that stay keep their slots, others get the lowest free ones."""
    replicas: list[list[ExpertReplica]] = [[] for _ in range(num_experts)]
    for rank, experts in held.items():
        kept = {e: slot for e, slot in before[rank].items() if e in experts and slot < room}
        free = iter(sorted(set(range(len(experts))).difference(kept.values())))
        for expert in sorted(experts):
            replicas[expert].append(ExpertReplica(rank, kept[expert] if expert in kept else next(free)))
    assert all(replicas), "every expert has a replica"
    return Placement(tuple(map(tuple, replicas)))


class _Table:
    """Experts on each rank while a plan is being made."""

    def __init__(self, before: _Slots, load: Sequence[float], counts: list[int]) -> None:
        """
        Args:
            before: the experts on each rank at the start, with ranks ascending.
            load: load of each expert, for all its replicas together.
            counts: number of replicas that each expert will have.
        """
        self._before = before
        self._counts = counts
        self._weights = [one / count for one, count in zip(load, counts, strict=True)]
        self._mean_load = math.fsum(load) / len(before)
        # Each rank will hold `base` replicas, and `num_larger` ranks one more.
        self._base, self._num_larger = divmod(sum(counts), len(before))
        self.held = {rank: set(experts) for rank, experts in before.items()}
        self._load = {rank: self._sum(experts) for rank, experts in self.held.items()}

    def maximum(self) -> float:
        return max(self._load.values())

    def drop_surplus(self) -> None:
        """Remove surplus replicas of each expert, from the fullest ranks."""
        for expert, wanted in enumerate(self._counts):
            holders = self._holders(expert)
            for _ in range(len(holders) - wanted):
                fullest = max(holders, key=lambda rank: (len(self.held[rank]), self._load[rank], rank))
                holders.remove(fullest)
                self._take(fullest, expert)

    def even_out_numbers(self) -> None:
        """Remove replicas from ranks that hold too many.

        Any rank above the base may be one of the larger ranks, which saves one move. All choices need equally
        many moves, so the lightest ranks are chosen, to balance the load.
        """
        above = [rank for rank, experts in self.held.items() if len(experts) > self._base]
        above.sort(key=lambda rank: (self._load[rank], rank))
        for index, rank in enumerate(above):
            quota = self._base + (index < self._num_larger)
            for left in range(len(self.held[rank]) - quota, 0, -1):
                # Not the heaviest ones: together they would overload a rank that has just joined.
                share = (self._load[rank] - self._mean_load) / left
                self._take(rank, min(self.held[rank], key=lambda e: (abs(self._weights[e] - share), e)))

    def assign_missing(self) -> None:
        """Assign missing replicas: the heaviest first, each to the lightest rank with room."""
        missing = [
            expert
            for expert, wanted in enumerate(self._counts)
            for _ in range(wanted - len(self._holders(expert)))
        ]
        for expert in sorted(missing, key=lambda e: (-self._weights[e], e)):
            with_room = self._ranks_with_room()
            ranks = [rank for rank in with_room if expert not in self.held[rank]]
            if ranks:
                self._put(self._lightest(ranks), expert)
            else:
                self._put_by_swap(self._lightest(with_room), expert)

    def balance_load(self) -> None:
        """Let the heaviest rank trade with others, and keep the trades up to the last fall of the maximum.

        A trade may leave the maximum unchanged if another rank is as heavy; later trades then lower that one
        too. The loop ends because each trade lowers the sum of the squared loads by a minimum.
        """
        best, lowest = self._copy(), self.maximum()
        while self._trade():
            if self.maximum() < lowest:
                best, lowest = self._copy(), self.maximum()
        self.held = best
        self._load = {rank: self._sum(experts) for rank, experts in best.items()}

    def _trade(self) -> bool:
        heaviest = max(self.held, key=lambda rank: (self._load[rank], rank))
        min_gain = MIN_GAIN * self._load[heaviest]
        for lighter in sorted(self.held, key=lambda rank: (self._load[rank], rank)):
            gap = self._load[heaviest] - self._load[lighter]
            if gap <= 2 * min_gain:
                return False
            mine, theirs = self.held[heaviest], self.held[lighter]
            gifts = [(self._weights[e], e) for e in mine - theirs]
            returns: list[tuple[float, tuple[int, ...]]] = [(self._weights[e], (e,)) for e in theirs - mine]
            if len(mine) > len(theirs):
                # A gift without a return only changes which of the two is a larger rank.
                returns.append((0.0, ()))
            # Moving half the gap would make the two equal.
            trades = (
                (abs(gap / 2 - gift + back), taken, given) for back, taken in returns for gift, given in gifts
            )
            off, taken, given = min(trades, default=(math.inf, (), 0))
            if off < gap / 2 - min_gain:
                for expert in taken:
                    self._move(expert, lighter, heaviest)
                self._move(given, heaviest, lighter)
                return True
        return False

    def _put_by_swap(self, rank: int, expert: int) -> None:
        """Place an expert that all ranks with room hold: another rank takes it and gives one to `rank`.

        Such a rank exists because no expert has more replicas than there are ranks. It has an expert to give
        because it holds more than `rank` does, and `rank` holds one that it does not: `expert`.
        """
        swaps = (
            (
                given in self._before[other],
                max(
                    self._load[other] + self._weights[expert] - self._weights[given],
                    self._load[rank] + self._weights[given],
                ),
                other,
                given,
            )
            for other in self.held
            if expert not in self.held[other]
            for given in self.held[other] - self.held[rank]
        )
        *_, other, given = min(swaps)
        self._move(given, other, rank)
        self._put(other, expert)

    def _holders(self, expert: int) -> list[int]:
        return [rank for rank, experts in self.held.items() if expert in experts]

    def _ranks_with_room(self) -> list[int]:
        num_larger = sum(len(experts) > self._base for experts in self.held.values())
        limit = self._base + (num_larger < self._num_larger)
        return [rank for rank, experts in self.held.items() if len(experts) < limit]

    def _lightest(self, ranks: list[int]) -> int:
        return min(ranks, key=lambda rank: (self._load[rank], len(self.held[rank]), rank))

    def _put(self, rank: int, expert: int) -> None:
        self.held[rank].add(expert)
        self._load[rank] = self._sum(self.held[rank])

    def _take(self, rank: int, expert: int) -> None:
        self.held[rank].remove(expert)
        self._load[rank] = self._sum(self.held[rank])

    def _move(self, expert: int, source: int, target: int) -> None:
        self._take(source, expert)
        self._put(target, expert)

    def _copy(self) -> dict[int, set[int]]:
        return {rank: set(experts) for rank, experts in self.held.items()}

    def _sum(self, experts: set[int]) -> float:
        # fsum is exact, so the result does not depend on the order of the set.
        return math.fsum(self._weights[expert] for expert in experts)
