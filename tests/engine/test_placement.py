from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.common.errors import FastDeployError
from fastdeploy.expert_parallel.placement import Home, NoRoom, Placement, plan


@dataclass(frozen=True)
class Case:
    """A layer and a group: the arguments of a plan from nothing."""

    num_experts: int
    seats: tuple[int, ...]
    load: tuple[float, ...] | None
    redundant: int
    slots: int | None

    def plan(self, previous: Placement | None = None, rebalance: bool = False) -> Placement:
        return plan(
            self.num_experts,
            self.seats,
            load=self.load,
            redundant=self.redundant,
            slots=self.slots,
            previous=previous,
            rebalance=rebalance,
        )

    @property
    def num_replicas(self) -> int:
        """As many as are wanted, or as fit: once on each seat, and into its slots."""
        per_seat = self.num_experts if self.slots is None else min(self.slots, self.num_experts)
        return min(self.num_experts + self.redundant, per_seat * len(self.seats))


def loads(num_experts: int) -> st.SearchStrategy[tuple[float, ...] | None]:
    # Small integers for ties, floats for rounding.
    one = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e9, allow_subnormal=False))
    return st.none() | st.lists(one, min_size=num_experts, max_size=num_experts).map(tuple)


def seat_sets(last: int = 63, most: int = 64) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, last), unique=True, min_size=1, max_size=most).map(tuple)


@st.composite
def cases(
    draw: st.DrawFn, seats: st.SearchStrategy[tuple[int, ...]] | None = None, redundancy: int = 20
) -> Case:
    num_experts = draw(st.integers(1, 24))
    here = draw(seats if seats is not None else seat_sets(most=12))
    needed = math.ceil(num_experts / len(here))
    return Case(
        num_experts,
        here,
        draw(loads(num_experts)),
        draw(st.integers(0, redundancy)),
        draw(st.none() | st.integers(needed, needed + 3)),
    )


def counts(placement: Placement, seats: Iterable[int]) -> list[int]:
    return [len(placement.experts_of(seat)) for seat in seats]


def seat_loads(placement: Placement, load: Sequence[float] | None) -> dict[int, float]:
    """An expert's load is shared equally by its replicas."""
    shares: dict[int, list[float]] = {}
    for homes, one in zip(placement.homes, load or [1.0] * len(placement.homes), strict=True):
        for home in homes:
            shares.setdefault(home.seat, []).append(one / len(homes))
    return {seat: math.fsum(of_seat) for seat, of_seat in shares.items()}


def check_valid(placement: Placement, case: Case) -> None:
    assert len(placement.homes) == case.num_experts
    for homes in placement.homes:
        assert homes, "every expert has a home"
        assert list(homes) == sorted(homes)
        assert len({home.seat for home in homes}) == len(homes), "at most one replica per seat"
    every = [home for homes in placement.homes for home in homes]
    assert {home.seat for home in every} <= set(case.seats)
    assert len(set(every)) == len(every), "no slot is used twice"
    assert all(0 <= home.slot < (case.slots or case.num_experts) for home in every)
    assert len(every) == case.num_replicas
    assert max(counts(placement, case.seats)) - min(counts(placement, case.seats)) <= 1


def check_who_stays_keeps_the_slot(new: Placement, old: Placement, slots: int | None) -> None:
    for now, then in zip(new.homes, old.homes, strict=True):
        slot_of = {home.seat: home.slot for home in then}
        for home in now:
            slot = slot_of.get(home.seat, home.slot)
            assert home.slot == slot or (slots is not None and slot >= slots)


def fewest_moves(old: Placement, seats: Sequence[int]) -> int:
    """Without redundancy, by trying every choice of the seats that hold one expert more."""
    num_experts = len(old.homes)
    base, num_larger = divmod(num_experts, len(seats))
    stay = [
        sum(min(len(old.experts_of(seat)), base + (seat in larger)) for seat in seats)
        for larger in combinations(seats, num_larger)
    ]
    return num_experts - max(stay)


def test_experts_are_spread_by_number_and_by_load() -> None:
    placement = plan(5, [7, 3], load=[1, 9, 4, 4, 0])
    assert placement.homes == (
        (Home(7, 0),),
        (Home(3, 0),),
        (Home(7, 1),),
        (Home(7, 2),),
        (Home(3, 1),),
    )
    assert placement.experts_of(3) == (1, 4)
    assert placement.experts_of(7) == (0, 2, 3)
    assert placement.experts_of(5) == ()


@given(case=cases())
@settings(deadline=None)
def test_every_expert_has_a_home_and_every_seat_equally_many(case: Case) -> None:
    check_valid(case.plan(), case)


@pytest.mark.parametrize("num_seats", range(1, 65))
def test_any_number_of_seats_will_do(num_seats: int) -> None:
    seats = tuple(random.Random(num_seats).sample(range(64), num_seats))
    for num_experts in (1, 6, 64, 67):
        for redundant in (0, 5):
            case = Case(num_experts, seats, None, redundant, None)
            check_valid(case.plan(), case)


@given(case=cases(), before=cases(), rebalance=st.booleans(), order=st.randoms())
@settings(deadline=None)
def test_every_seat_comes_to_the_same_plan_whatever_order_it_knows_the_others_in(
    case: Case, before: Case, rebalance: bool, order: random.Random
) -> None:
    previous = replace(before, num_experts=case.num_experts, load=None, slots=None).plan()
    shuffled = tuple(order.sample(case.seats, len(case.seats)))
    assert replace(case, seats=shuffled).plan(previous, rebalance) == case.plan(previous, rebalance)


@given(case=cases(redundancy=200))
@settings(deadline=None)
def test_redundant_replicas_go_to_the_heaviest_experts(case: Case) -> None:
    load = case.load if case.load and any(case.load) else (1.0,) * case.num_experts
    replicas = [len(homes) for homes in case.plan().homes]
    for several, count in enumerate(replicas):
        for other, its_count in enumerate(replicas):
            # When it was given its last replica, no expert that could have one had more load per replica.
            if count > 1 and its_count < len(case.seats):
                assert load[several] / (count - 1) >= load[other] / its_count


def test_equal_experts_get_their_second_replica_in_order() -> None:
    assert [len(homes) for homes in plan(4, range(3), redundant=2).homes] == [2, 2, 1, 1]
    assert [len(homes) for homes in plan(3, range(4), load=[1, 5, 2], redundant=3).homes] == [1, 3, 2]


def test_replicas_that_do_not_fit_are_left_out() -> None:
    assert [len(homes) for homes in plan(3, [0, 1], load=[9, 1, 2], redundant=2).homes] == [2, 1, 2]
    assert [len(homes) for homes in plan(3, [0, 1], redundant=99).homes] == [2, 2, 2]
    assert [len(homes) for homes in plan(3, [0, 1], redundant=99, slots=2).homes] == [2, 1, 1]


def test_more_experts_than_slots_are_refused_with_the_numbers() -> None:
    with pytest.raises(NoRoom) as refusal:
        plan(64, [0, 2, 5], slots=20)
    assert str(refusal.value) == (
        "64 experts do not fit on 3 seats of 20 slots each: at least 22 slots per seat are needed"
    )
    assert isinstance(refusal.value, FastDeployError)


@given(case=cases(), rebalance=st.booleans())
@settings(deadline=None)
def test_where_nothing_has_changed_nothing_moves(case: Case, rebalance: bool) -> None:
    first = case.plan()
    assert case.plan(first, rebalance) == first
    assert first.moves_from(first) == 0


@given(case=cases(seat_sets(most=9), redundancy=0), data=st.data())
@settings(deadline=None)
def test_when_a_seat_is_lost_only_its_experts_move(case: Case, data: st.DataObject) -> None:
    first = case.plan()
    lost = data.draw(st.sampled_from(case.seats))
    rest = replace(case, seats=tuple(seat for seat in case.seats if seat != lost), slots=None)
    if rest.seats:
        second = rest.plan(first)
        check_valid(second, rest)
        assert second.moves_from(first) == len(first.experts_of(lost))
        assert all(set(first.experts_of(seat)) <= set(second.experts_of(seat)) for seat in rest.seats)
        check_who_stays_keeps_the_slot(second, first, rest.slots)


@given(case=cases(seat_sets(most=9), redundancy=0), data=st.data())
@settings(deadline=None)
def test_a_seat_that_joins_gets_its_share_and_nothing_else_moves(case: Case, data: st.DataObject) -> None:
    first = case.plan()
    joined = data.draw(st.integers(0, 63).filter(lambda seat: seat not in case.seats))
    more = replace(case, seats=(*case.seats, joined))
    second = more.plan(first)
    check_valid(second, more)
    assert second.moves_from(first) == len(second.experts_of(joined))
    assert len(second.experts_of(joined)) == case.num_experts // len(more.seats)
    check_who_stays_keeps_the_slot(second, first, more.slots)


@given(case=cases(seat_sets(last=7), redundancy=0), changes=st.lists(seat_sets(last=7), max_size=4))
@settings(deadline=None)
def test_however_seats_come_and_go_as_few_experts_move_as_can(
    case: Case, changes: list[tuple[int, ...]]
) -> None:
    placement = case.plan()
    for seats in changes:
        case = replace(case, seats=seats, slots=None)
        after = case.plan(placement)
        check_valid(after, case)
        assert after.moves_from(placement) == fewest_moves(placement, seats)
        check_who_stays_keeps_the_slot(after, placement, case.slots)
        placement = after


@given(owner=st.lists(st.integers(0, 7), min_size=1, max_size=20), seats=seat_sets(last=7))
@settings(deadline=None)
def test_also_from_a_lopsided_start_as_few_experts_move_as_can(
    owner: list[int], seats: tuple[int, ...]
) -> None:
    previous = Placement(tuple((Home(seat, expert),) for expert, seat in enumerate(owner)))
    case = Case(len(owner), seats, None, 0, None)
    after = case.plan(previous)
    check_valid(after, case)
    assert after.moves_from(previous) == fewest_moves(previous, seats)


@given(before=cases(seat_sets(last=7)), after=cases(seat_sets(last=7)), rebalance=st.booleans())
@settings(deadline=None, max_examples=300)
def test_seats_loads_replicas_and_slots_may_all_change_at_once(
    before: Case, after: Case, rebalance: bool
) -> None:
    first = replace(before, num_experts=after.num_experts, load=None, slots=None).plan()
    second = after.plan(first, rebalance)
    check_valid(second, after)
    check_who_stays_keeps_the_slot(second, first, after.slots)


def test_an_expert_whose_slot_is_gone_stays_on_its_seat() -> None:
    previous = Placement(((Home(0, 5),), (Home(0, 1),), (Home(1, 0),)))
    assert plan(3, [0, 1], slots=2, previous=previous).homes == ((Home(0, 0),), (Home(0, 1),), (Home(1, 0),))


def test_an_orphan_takes_the_slot_that_has_become_free() -> None:
    first = plan(4, [0, 1])
    assert first.homes == ((Home(0, 0),), (Home(1, 0),), (Home(0, 1),), (Home(1, 1),))
    three = plan(4, [0, 1, 2], previous=first)
    assert three.homes == ((Home(0, 0),), (Home(2, 0),), (Home(0, 1),), (Home(1, 1),))
    assert plan(4, [0, 1], previous=three).homes == first.homes


def test_orphans_go_to_the_lightest_seats_the_heaviest_first() -> None:
    previous = Placement(((Home(0, 0),), (Home(1, 0),), (Home(2, 0),), (Home(2, 1),)))
    after = plan(4, [0, 1], load=[5, 4, 1, 3], previous=previous)
    assert after.homes == ((Home(0, 0),), (Home(1, 0),), (Home(0, 1),), (Home(1, 1),))


def test_a_seat_that_joins_is_not_given_all_the_heaviest() -> None:
    load = [8.0, 1.0, 1.0] * 3
    first = plan(9, [0, 1, 2], load=load)
    assert set(seat_loads(first, load).values()) == {10.0}
    joined = plan(9, [0, 1, 2, 3], load=load, previous=first)
    assert max(seat_loads(joined, load).values()) == 10.0


def test_a_replica_that_is_no_longer_wanted_is_dropped_by_the_fuller_seat() -> None:
    previous = Placement(((Home(0, 0), Home(1, 0)), (Home(0, 1),)))
    assert plan(2, [0, 1], previous=previous).homes == ((Home(1, 0),), (Home(0, 1),))


def test_where_the_seat_with_room_holds_the_expert_another_one_trades() -> None:
    # Seat 2 is full, seat 3 new; expert 0 is wanted on both.
    previous = Placement(((Home(0, 0), Home(1, 0)), (Home(2, 0),), (Home(2, 1),)))
    after = plan(3, [2, 3], load=[3, 1, 0], redundant=1, previous=previous)
    assert after.homes == ((Home(2, 0), Home(3, 0)), (Home(3, 1),), (Home(2, 1),))


def test_such_a_trade_is_made_with_an_expert_that_moves_anyway() -> None:
    # The second replica of expert 2 must go to seat 3, where expert 0 has been and expert 1 has just come.
    previous = Placement(((Home(2, 0), Home(3, 0)), (Home(0, 0),), (Home(1, 0),)))
    after = plan(3, [1, 3], load=[0, 2, 3], redundant=1, previous=previous)
    assert after.homes == ((Home(3, 0),), (Home(1, 1),), (Home(1, 0), Home(3, 1)))


def test_without_rebalance_load_alone_moves_nothing() -> None:
    first = plan(4, [0, 1], load=[9, 1, 9, 1])
    assert plan(4, [0, 1], load=[0, 9, 9, 0], previous=first) == first


def test_a_rebalance_trades_until_the_heaviest_seat_is_relieved_and_the_rest_stays() -> None:
    previous = Placement(((Home(0, 0),), (Home(0, 1),), (Home(1, 0),), (Home(1, 1),), (Home(2, 0),)))
    after = plan(5, [0, 1, 2], load=[10, 10, 1, 2, 11], previous=previous, rebalance=True)
    assert after.homes == ((Home(1, 0),), (Home(0, 1),), (Home(0, 0),), (Home(1, 1),), (Home(2, 0),))
    assert after.moves_from(previous) == 2


def test_a_load_that_has_decayed_to_almost_nothing_is_none() -> None:
    load = [5e-324 * (1 + expert % 7) for expert in range(40)]
    first = plan(40, range(6), load=load)
    assert first == plan(40, range(6))
    assert plan(40, range(6), load=load, previous=first, rebalance=True) == first


def test_a_rebalance_moves_nothing_for_a_gain_that_is_lost_in_the_noise() -> None:
    previous = Placement(((Home(0, 0),), (Home(0, 1),), (Home(1, 0),), (Home(1, 1),)))
    assert plan(4, [0, 1], load=[1000, 1010, 1000, 1002], previous=previous, rebalance=True) == previous


def test_a_rebalance_moves_nothing_where_another_seat_stays_as_heavy() -> None:
    # Of the heaviest, seats 0 and 1, only the latter could be relieved: that would not help anybody.
    previous = Placement(((Home(0, 0),), (Home(1, 0),), (Home(1, 1),), (Home(2, 0),)))
    assert plan(4, [0, 1, 2], load=[10, 5, 5, 0], previous=previous, rebalance=True) == previous


@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_rebalance_never_makes_the_heaviest_seat_heavier(case: Case, data: st.DataObject) -> None:
    first = case.plan()
    load = data.draw(loads(case.num_experts))
    if load is not None and not any(load):
        load = None
    second = replace(case, load=load).plan(first, rebalance=True)
    check_valid(second, case)
    check_who_stays_keeps_the_slot(second, first, case.slots)
    assert max(seat_loads(second, load).values()) <= max(seat_loads(first, load).values())


def test_a_rebalance_keeps_replicas_that_go_better_together_than_those_it_would_choose() -> None:
    first = plan(3, [0, 1], redundant=1)
    assert [len(homes) for homes in first.homes] == [2, 1, 1]
    # A second replica of expert 1 would be on a seat together with expert 2: 15 in place of 11.
    load = [1.0, 10.0, 10.0]
    assert plan(3, [0, 1], load=load, redundant=1, previous=first, rebalance=True) == first
    assert max(seat_loads(plan(3, [0, 1], load=load, redundant=1), load).values()) == 15.0


def test_a_rebalance_evens_out_a_skewed_load_about_as_well_as_a_plan_from_nothing() -> None:
    skewed = random.Random(0)
    for _ in range(20):
        first, second = ([skewed.paretovariate(2) for _ in range(64)] for _ in range(2))
        before = plan(64, range(8), load=first, redundant=8)
        after = plan(64, range(8), load=second, redundant=8, previous=before, rebalance=True)
        anew = plan(64, range(8), load=second, redundant=8)
        heaviest = max(seat_loads(after, second).values())
        assert heaviest <= 1.05 * max(seat_loads(anew, second).values())
        assert after.moves_from(before) < anew.moves_from(before) / 2


def test_moves_are_what_seats_take_over_not_what_they_drop() -> None:
    old = Placement(((Home(0, 0), Home(1, 0)), (Home(1, 1),)))
    new = Placement(((Home(0, 3),), (Home(0, 1), Home(2, 0))))
    assert new.moves_from(old) == 2
