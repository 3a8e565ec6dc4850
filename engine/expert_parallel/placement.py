"""Which seats of an expert-parallel group hold which experts of one MoE layer. Pure: no clock, no I/O.

A seat is a rank's fixed number. Every seat makes the plan for itself, so it depends on nothing but the
arguments. Two balances are kept: of numbers, always (each seat holds as many replicas as any other, or one
more: that is what memory is sized for), and within it, of load.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import FastDeployError

#: An exchange has to lower the load of the heaviest seat by this share. Loads are measured, with noise, and
#: every expert that moves has to be read anew.
WORTHWHILE = 0.01

#: Less load than this in total is none. An average that decays while nothing happens ends in subnormal
#: numbers, whose hundredth is zero: trades could go on for ever.
NEGLIGIBLE = 1e-200


class NoRoom(FastDeployError):
    """The seats have together fewer slots than the layer has experts."""


@dataclass(frozen=True, slots=True, order=True)
class Home:
    """Where a replica of an expert lies: `slot` is the index into the seat's expert memory of this layer."""

    seat: int
    slot: int


@dataclass(frozen=True, slots=True)
class Placement:
    """`homes[e]`: where expert `e` can be computed; at least one, ascending by seat, at most one per seat."""

    homes: tuple[tuple[Home, ...], ...]

    def experts_of(self, seat: int) -> tuple[int, ...]:
        """What a seat holds, ascending."""
        return tuple(e for e, homes in enumerate(self.homes) if any(home.seat == seat for home in homes))

    def moves_from(self, old: Placement) -> int:
        """How many experts seats have to take over on the way from `old` to here."""
        return len(self._pairs() - old._pairs())

    def _pairs(self) -> set[tuple[int, int]]:
        return {(expert, home.seat) for expert, homes in enumerate(self.homes) for home in homes}


def plan(
    num_experts: int,
    seats: Sequence[int],
    *,
    load: Sequence[float] | None = None,
    redundant: int = 0,
    slots: int | None = None,
    previous: Placement | None = None,
    rebalance: bool = False,
) -> Placement:
    """Gives every expert a seat, and the heaviest ones more than one.

    Replicas are counted and dealt like in EPLB (https://github.com/deepseek-ai/EPLB, `replicate_experts` and
    `balanced_packing`): each redundant one goes to the expert with the highest load per replica, then the
    heaviest replica first to the least loaded seat that has room (longest processing time first, Graham
    1969). EPLB plans from nothing each time. Here experts stay where they are:

    - without `rebalance`, seats have come or gone. Only replicas that have no seat any more, are new or must
      make room for equal numbers are dealt; without redundant ones that is the least possible.
    - with `rebalance`, and in a first plan, the heaviest seat then trades with lighter ones as long as the
      maximum falls.

    Args:
        seats: those that are there, in any order, not necessarily consecutive.
        load: of each expert, in any unit; None or (next to) nothing: all are alike.
        redundant: replicas beyond one per expert; those that do not fit are left out.
        slots: of each seat; None: as many as there are experts.
        previous: what to depart from; it may know seats that have gone.
        rebalance: move for the sake of load, too. The heaviest seat is then never heavier than with
            `previous`, if that has as many replicas, in equal numbers, on these seats; should its choice of
            the experts that have several be the better one, all stays as it is.

    Raises:
        NoRoom: there are more experts than slots.
    """
    present = sorted(set(seats))
    assert present, "a plan is made by a seat, so there is at least one"
    assert load is None or len(load) == num_experts, "every expert has a load"
    assert previous is None or len(previous.homes) == num_experts, "a layer keeps its experts"
    room = num_experts if slots is None else slots
    if num_experts > room * len(present):
        raise NoRoom(
            f"{num_experts} experts do not fit on {len(present)} seats of {room} slots each: "
            f"at least {-(-num_experts // len(present))} slots per seat are needed"
        )
    if load is None or math.fsum(load) < NEGLIGIBLE:
        load = [1.0] * num_experts
    total = min(num_experts + redundant, min(num_experts, room) * len(present))
    replicas = _count_replicas(load, len(present), total)
    before: _Slots = {seat: {} for seat in present}
    for expert, homes in enumerate(previous.homes if previous else ()):
        for home in homes:
            if home.seat in before:
                before[home.seat][expert] = home.slot

    table = _Table(before, load, replicas)
    table.drop_unwanted()
    table.make_room()
    table.deal()
    if rebalance or previous is None:
        table.level()
    if rebalance and previous is not None and _fits(previous, before, total, room):
        as_it_was = _Table(before, load, [len(homes) for homes in previous.homes])
        # Possible only where other experts have several replicas than now would be chosen.
        if table.maximum() > as_it_was.maximum():
            return previous
    return _with_slots(num_experts, table.held, before, room)


#: Seat → expert that it holds → slot.
_Slots = dict[int, dict[int, int]]


def _count_replicas(load: Sequence[float], most: int, total: int) -> list[int]:
    """Shares out `total` replicas, at least one and at most `most` for each expert."""
    replicas = [1] * len(load)
    heaviest = [(-one, expert) for expert, one in enumerate(load)]
    heapq.heapify(heaviest)
    for _ in range(total - len(load)):
        _, expert = heapq.heappop(heaviest)
        replicas[expert] += 1
        if replicas[expert] < most:
            heapq.heappush(heaviest, (-load[expert] / replicas[expert], expert))
    return replicas


def _fits(placement: Placement, present: _Slots, total: int, room: int) -> bool:
    """Whether all replicas are on seats present, as many as wanted, in equal numbers and valid slots."""
    counts = [len(experts) for experts in present.values()]
    return (
        sum(map(len, placement.homes)) == sum(counts) == total
        and max(counts) - min(counts) <= 1
        and all(slot < room for experts in present.values() for slot in experts.values())
    )


def _with_slots(num_experts: int, held: dict[int, set[int]], before: _Slots, room: int) -> Placement:
    """Who stays keeps the slot; newcomers get the lowest free ones."""
    homes: list[list[Home]] = [[] for _ in range(num_experts)]
    for seat, experts in held.items():
        kept = {e: slot for e, slot in before[seat].items() if e in experts and slot < room}
        free = iter(sorted(set(range(len(experts))).difference(kept.values())))
        for expert in sorted(experts):
            homes[expert].append(Home(seat, kept[expert] if expert in kept else next(free)))
    assert all(homes), "every expert has a home"
    return Placement(tuple(map(tuple, homes)))


class _Table:
    """Who holds what while a plan is being made."""

    def __init__(self, before: _Slots, load: Sequence[float], replicas: list[int]) -> None:
        """
        Args:
            before: seat → what it holds at the start. Ascending, as is everything that is derived from it.
            load: of each expert, all its replicas together.
            replicas: of each expert, that there will be.
        """
        self._before = before
        self._replicas = replicas
        self._weights = [one / count for one, count in zip(load, replicas, strict=True)]
        self._mean_load = math.fsum(load) / len(before)
        # Each seat is to hold the base, and so many of them one more.
        self._base, self._num_larger = divmod(sum(replicas), len(before))
        self.held = {seat: set(experts) for seat, experts in before.items()}
        self._load = {seat: self._sum(experts) for seat, experts in self.held.items()}

    def maximum(self) -> float:
        return max(self._load.values())

    def drop_unwanted(self) -> None:
        """Takes away the replicas that an expert has beyond those wanted, from the fullest seats."""
        for expert, wanted in enumerate(self._replicas):
            holders = self._holders(expert)
            for _ in range(len(holders) - wanted):
                fullest = max(holders, key=lambda seat: (len(self.held[seat]), self._load[seat], seat))
                holders.remove(fullest)
                self._take(fullest, expert)

    def make_room(self) -> None:
        """Takes what is too many from each seat.

        Any seat above the base keeps one expert more by being one of the larger seats, so all are equally
        good for the number of moves, and the choice is free for the load: the lightest.
        """
        above = [seat for seat, experts in self.held.items() if len(experts) > self._base]
        above.sort(key=lambda seat: (self._load[seat], seat))
        for index, seat in enumerate(above):
            quota = self._base + (index < self._num_larger)
            for left in range(len(self.held[seat]) - quota, 0, -1):
                # Not simply the heaviest: together they would be too much for the seat that has just joined.
                share = (self._load[seat] - self._mean_load) / left
                self._take(seat, min(self.held[seat], key=lambda e: (abs(self._weights[e] - share), e)))

    def deal(self) -> None:
        """Gives out what nobody holds: the heaviest replica first, each to the lightest seat with room."""
        missing = [
            expert
            for expert, wanted in enumerate(self._replicas)
            for _ in range(wanted - len(self._holders(expert)))
        ]
        for expert in sorted(missing, key=lambda e: (-self._weights[e], e)):
            open_to_any = self._seats_with_room()
            seats = [seat for seat in open_to_any if expert not in self.held[seat]]
            if seats:
                self._put(self._lightest(seats), expert)
            else:
                self._put_by_swap(self._lightest(open_to_any), expert)

    def level(self) -> None:
        """Lets the heaviest seat trade with others, and keeps the trades up to the last fall of the maximum.

        A trade may leave the maximum as it is, because another seat is as heavy: then it has to fall as well.
        It ends because each trade lowers the sum of the squared loads by a minimum.
        """
        best, lowest = self._copy(), self.maximum()
        while self._trade():
            if self.maximum() < lowest:
                best, lowest = self._copy(), self.maximum()
        self.held = best
        self._load = {seat: self._sum(experts) for seat, experts in best.items()}

    def _trade(self) -> bool:
        heaviest = max(self.held, key=lambda seat: (self._load[seat], seat))
        worthwhile = WORTHWHILE * self._load[heaviest]
        for lighter in sorted(self.held, key=lambda seat: (self._load[seat], seat)):
            gap = self._load[heaviest] - self._load[lighter]
            if gap <= 2 * worthwhile:
                return False
            mine, theirs = self.held[heaviest], self.held[lighter]
            gifts = [(self._weights[e], e) for e in mine - theirs]
            returns: list[tuple[float, tuple[int, ...]]] = [(self._weights[e], (e,)) for e in theirs - mine]
            if len(mine) > len(theirs):
                # Nothing in return: that only exchanges who is one of the larger seats.
                returns.append((0.0, ()))
            # Half the gap is what would make the two equal.
            trades = (
                (abs(gap / 2 - gift + back), taken, given) for back, taken in returns for gift, given in gifts
            )
            off, taken, given = min(trades, default=(math.inf, (), 0))
            if off < gap / 2 - worthwhile:
                for expert in taken:
                    self._move(expert, lighter, heaviest)
                self._move(given, heaviest, lighter)
                return True
        return False

    def _put_by_swap(self, seat: int, expert: int) -> None:
        """Places an expert that all seats with room hold: another seat takes it and gives one to `seat`.

        That seat exists since no expert has more replicas than there are seats, and has one to give since it
        holds more than `seat` does, which in turn holds something it does not: the expert.
        """
        swaps = (
            (
                given in self._before[other],
                max(
                    self._load[other] + self._weights[expert] - self._weights[given],
                    self._load[seat] + self._weights[given],
                ),
                other,
                given,
            )
            for other in self.held
            if expert not in self.held[other]
            for given in self.held[other] - self.held[seat]
        )
        *_, other, given = min(swaps)
        self._move(given, other, seat)
        self._put(other, expert)

    def _holders(self, expert: int) -> list[int]:
        return [seat for seat, experts in self.held.items() if expert in experts]

    def _seats_with_room(self) -> list[int]:
        num_larger = sum(len(experts) > self._base for experts in self.held.values())
        limit = self._base + (num_larger < self._num_larger)
        return [seat for seat, experts in self.held.items() if len(experts) < limit]

    def _lightest(self, seats: list[int]) -> int:
        return min(seats, key=lambda seat: (self._load[seat], len(self.held[seat]), seat))

    def _put(self, seat: int, expert: int) -> None:
        self.held[seat].add(expert)
        self._load[seat] = self._sum(self.held[seat])

    def _take(self, seat: int, expert: int) -> None:
        self.held[seat].remove(expert)
        self._load[seat] = self._sum(self.held[seat])

    def _move(self, expert: int, source: int, target: int) -> None:
        self._take(source, expert)
        self._put(target, expert)

    def _copy(self) -> dict[int, set[int]]:
        return {seat: set(experts) for seat, experts in self.held.items()}

    def _sum(self, experts: set[int]) -> float:
        # Exact, hence the same for any order and any history of a set.
        return math.fsum(self._weights[expert] for expert in experts)
