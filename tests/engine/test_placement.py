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
from fastdeploy.expert_parallel.placement import ExpertReplica, Placement, TooFewSlots, plan


@dataclass(frozen=True)
class Case:
    """A layer and a group: the arguments of a plan without a previous placement."""

    num_experts: int
    ranks: tuple[int, ...]
    load: tuple[float, ...] | None
    redundant: int
    slots: int | None

    def plan(self, previous: Placement | None = None, rebalance: bool = False) -> Placement:
        return plan(
            self.num_experts,
            self.ranks,
            load=self.load,
            redundant=self.redundant,
            slots=self.slots,
            previous=previous,
            rebalance=rebalance,
        )

    @property
    def num_replicas(self) -> int:
        """Return the wanted number, limited by the slots and by one replica of an expert on each rank."""
        per_rank = self.num_experts if self.slots is None else min(self.slots, self.num_experts)
        return min(self.num_experts + self.redundant, per_rank * len(self.ranks))


def loads(num_experts: int) -> st.SearchStrategy[tuple[float, ...] | None]:
    # Small integers for ties, floats for rounding.
    one = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e9, allow_subnormal=False))
    return st.none() | st.lists(one, min_size=num_experts, max_size=num_experts).map(tuple)


def rank_sets(last: int = 63, most: int = 64) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, last), unique=True, min_size=1, max_size=most).map(tuple)


@st.composite
def cases(
    draw: st.DrawFn, ranks: st.SearchStrategy[tuple[int, ...]] | None = None, redundancy: int = 20
) -> Case:
    num_experts = draw(st.integers(1, 24))
    here = draw(ranks if ranks is not None else rank_sets(most=12))
    needed = math.ceil(num_experts / len(here))
    return Case(
        num_experts,
        here,
        draw(loads(num_experts)),
        draw(st.integers(0, redundancy)),
        draw(st.none() | st.integers(needed, needed + 3)),
    )


def counts(placement: Placement, ranks: Iterable[int]) -> list[int]:
    return [len(placement.experts_of(rank)) for rank in ranks]


def rank_loads(placement: Placement, load: Sequence[float] | None) -> dict[int, float]:
    """Return the load by rank; an expert's load is shared equally by its replicas."""
    shares: dict[int, list[float]] = {}
    for replicas, one in zip(placement.replicas, load or [1.0] * len(placement.replicas), strict=True):
        for replica in replicas:
            shares.setdefault(replica.rank, []).append(one / len(replicas))
    return {rank: math.fsum(of_rank) for rank, of_rank in shares.items()}


def check_valid(placement: Placement, case: Case) -> None:
    assert len(placement.replicas) == case.num_experts
    for replicas in placement.replicas:
        assert replicas, "every expert has a replica"
        assert list(replicas) == sorted(replicas)
        assert len({replica.rank for replica in replicas}) == len(replicas), "at most one replica per rank"
    every = [replica for replicas in placement.replicas for replica in replicas]
    assert {replica.rank for replica in every} <= set(case.ranks)
    assert len(set(every)) == len(every), "no slot is used twice"
    assert all(0 <= replica.slot < (case.slots or case.num_experts) for replica in every)
    assert len(every) == case.num_replicas
    assert max(counts(placement, case.ranks)) - min(counts(placement, case.ranks)) <= 1


def check_who_stays_keeps_the_slot(new: Placement, old: Placement, slots: int | None) -> None:
    for now, then in zip(new.replicas, old.replicas, strict=True):
        slot_of = {replica.rank: replica.slot for replica in then}
        for replica in now:
            slot = slot_of.get(replica.rank, replica.slot)
            assert replica.slot == slot or (slots is not None and slot >= slots)


def fewest_moves(old: Placement, ranks: Sequence[int]) -> int:
    """Return the fewest moves without redundancy, trying every choice of the ranks with one more expert."""
    num_experts = len(old.replicas)
    base, num_larger = divmod(num_experts, len(ranks))
    stay = [
        sum(min(len(old.experts_of(rank)), base + (rank in larger)) for rank in ranks)
        for larger in combinations(ranks, num_larger)
    ]
    return num_experts - max(stay)


def test_experts_are_spread_by_number_and_by_load() -> None:
    placement = plan(5, [7, 3], load=[1, 9, 4, 4, 0])
    assert placement.replicas == (
        (ExpertReplica(7, 0),),
        (ExpertReplica(3, 0),),
        (ExpertReplica(7, 1),),
        (ExpertReplica(7, 2),),
        (ExpertReplica(3, 1),),
    )
    assert placement.experts_of(3) == (1, 4)
    assert placement.experts_of(7) == (0, 2, 3)
    assert placement.experts_of(5) == ()


@given(case=cases())
@settings(deadline=None)
def test_every_expert_has_a_replica_and_every_rank_equally_many(case: Case) -> None:
    check_valid(case.plan(), case)


@pytest.mark.parametrize("num_ranks", range(1, 65))
def test_any_number_of_ranks_is_possible(num_ranks: int) -> None:
    ranks = tuple(random.Random(num_ranks).sample(range(64), num_ranks))
    for num_experts in (1, 6, 64, 67):
        for redundant in (0, 5):
            case = Case(num_experts, ranks, None, redundant, None)
            check_valid(case.plan(), case)


@given(case=cases(), before=cases(), rebalance=st.booleans(), order=st.randoms())
@settings(deadline=None)
def test_the_plan_does_not_depend_on_the_order_of_ranks(
    case: Case, before: Case, rebalance: bool, order: random.Random
) -> None:
    previous = replace(before, num_experts=case.num_experts, load=None, slots=None).plan()
    shuffled = tuple(order.sample(case.ranks, len(case.ranks)))
    assert replace(case, ranks=shuffled).plan(previous, rebalance) == case.plan(previous, rebalance)


@given(case=cases(redundancy=200))
@settings(deadline=None)
def test_redundant_replicas_go_to_the_heaviest_experts(case: Case) -> None:
    load = case.load if case.load and any(case.load) else (1.0,) * case.num_experts
    replicas = [len(replicas) for replicas in case.plan().replicas]
    for several, count in enumerate(replicas):
        for other, its_count in enumerate(replicas):
            # Its last replica was justified: no expert with room for one had a higher load per replica.
            if count > 1 and its_count < len(case.ranks):
                assert load[several] / (count - 1) >= load[other] / its_count


def test_equal_experts_get_their_second_replica_in_order() -> None:
    assert [len(replicas) for replicas in plan(4, range(3), redundant=2).replicas] == [2, 2, 1, 1]
    assert [len(replicas) for replicas in plan(3, range(4), load=[1, 5, 2], redundant=3).replicas] == [
        1,
        3,
        2,
    ]


def test_replicas_that_do_not_fit_are_left_out() -> None:
    assert [len(replicas) for replicas in plan(3, [0, 1], load=[9, 1, 2], redundant=2).replicas] == [2, 1, 2]
    assert [len(replicas) for replicas in plan(3, [0, 1], redundant=99).replicas] == [2, 2, 2]
    assert [len(replicas) for replicas in plan(3, [0, 1], redundant=99, slots=2).replicas] == [2, 1, 1]


def test_more_experts_than_slots_are_refused_with_the_numbers() -> None:
    with pytest.raises(TooFewSlots) as refusal:
        plan(64, [0, 2, 5], slots=20)
    assert str(refusal.value) == (
        "64 experts do not fit on 3 ranks of 20 slots each: at least 22 slots per rank are needed"
    )
    assert isinstance(refusal.value, FastDeployError)


@given(case=cases(), rebalance=st.booleans())
@settings(deadline=None)
def test_where_nothing_has_changed_nothing_moves(case: Case, rebalance: bool) -> None:
    first = case.plan()
    assert case.plan(first, rebalance) == first
    assert first.moves_from(first) == 0


@given(case=cases(rank_sets(most=9), redundancy=0), data=st.data())
@settings(deadline=None)
def test_when_a_rank_is_lost_only_its_experts_move(case: Case, data: st.DataObject) -> None:
    first = case.plan()
    lost = data.draw(st.sampled_from(case.ranks))
    rest = replace(case, ranks=tuple(rank for rank in case.ranks if rank != lost), slots=None)
    if rest.ranks:
        second = rest.plan(first)
        check_valid(second, rest)
        assert second.moves_from(first) == len(first.experts_of(lost))
        assert all(set(first.experts_of(rank)) <= set(second.experts_of(rank)) for rank in rest.ranks)
        check_who_stays_keeps_the_slot(second, first, rest.slots)


@given(case=cases(rank_sets(most=9), redundancy=0), data=st.data())
@settings(deadline=None)
def test_a_rank_that_joins_gets_its_share_and_nothing_else_moves(case: Case, data: st.DataObject) -> None:
    first = case.plan()
    joined = data.draw(st.integers(0, 63).filter(lambda rank: rank not in case.ranks))
    more = replace(case, ranks=(*case.ranks, joined))
    second = more.plan(first)
    check_valid(second, more)
    assert second.moves_from(first) == len(second.experts_of(joined))
    assert len(second.experts_of(joined)) == case.num_experts // len(more.ranks)
    check_who_stays_keeps_the_slot(second, first, more.slots)


@given(case=cases(rank_sets(last=7), redundancy=0), changes=st.lists(rank_sets(last=7), max_size=4))
@settings(deadline=None)
def test_fewest_experts_move_when_ranks_join_and_leave(case: Case, changes: list[tuple[int, ...]]) -> None:
    placement = case.plan()
    for ranks in changes:
        case = replace(case, ranks=ranks, slots=None)
        after = case.plan(placement)
        check_valid(after, case)
        assert after.moves_from(placement) == fewest_moves(placement, ranks)
        check_who_stays_keeps_the_slot(after, placement, case.slots)
        placement = after


@given(owner=st.lists(st.integers(0, 7), min_size=1, max_size=20), ranks=rank_sets(last=7))
@settings(deadline=None)
def test_fewest_experts_move_from_an_uneven_start(owner: list[int], ranks: tuple[int, ...]) -> None:
    previous = Placement(tuple((ExpertReplica(rank, expert),) for expert, rank in enumerate(owner)))
    case = Case(len(owner), ranks, None, 0, None)
    after = case.plan(previous)
    check_valid(after, case)
    assert after.moves_from(previous) == fewest_moves(previous, ranks)


@given(before=cases(rank_sets(last=7)), after=cases(rank_sets(last=7)), rebalance=st.booleans())
@settings(deadline=None, max_examples=300)
def test_ranks_loads_replicas_and_slots_may_all_change_at_once(
    before: Case, after: Case, rebalance: bool
) -> None:
    first = replace(before, num_experts=after.num_experts, load=None, slots=None).plan()
    second = after.plan(first, rebalance)
    check_valid(second, after)
    check_who_stays_keeps_the_slot(second, first, after.slots)


def test_an_expert_whose_slot_is_gone_stays_on_its_rank() -> None:
    previous = Placement(((ExpertReplica(0, 5),), (ExpertReplica(0, 1),), (ExpertReplica(1, 0),)))
    assert plan(3, [0, 1], slots=2, previous=previous).replicas == (
        (ExpertReplica(0, 0),),
        (ExpertReplica(0, 1),),
        (ExpertReplica(1, 0),),
    )


def test_an_orphan_takes_the_slot_that_has_become_free() -> None:
    first = plan(4, [0, 1])
    assert first.replicas == (
        (ExpertReplica(0, 0),),
        (ExpertReplica(1, 0),),
        (ExpertReplica(0, 1),),
        (ExpertReplica(1, 1),),
    )
    three = plan(4, [0, 1, 2], previous=first)
    assert three.replicas == (
        (ExpertReplica(0, 0),),
        (ExpertReplica(2, 0),),
        (ExpertReplica(0, 1),),
        (ExpertReplica(1, 1),),
    )
    assert plan(4, [0, 1], previous=three).replicas == first.replicas


def test_orphans_go_to_the_lightest_ranks_the_heaviest_first() -> None:
    previous = Placement(
        ((ExpertReplica(0, 0),), (ExpertReplica(1, 0),), (ExpertReplica(2, 0),), (ExpertReplica(2, 1),))
    )
    after = plan(4, [0, 1], load=[5, 4, 1, 3], previous=previous)
    assert after.replicas == (
        (ExpertReplica(0, 0),),
        (ExpertReplica(1, 0),),
        (ExpertReplica(0, 1),),
        (ExpertReplica(1, 1),),
    )


def test_a_rank_that_joins_is_not_given_all_the_heaviest() -> None:
    load = [8.0, 1.0, 1.0] * 3
    first = plan(9, [0, 1, 2], load=load)
    assert set(rank_loads(first, load).values()) == {10.0}
    joined = plan(9, [0, 1, 2, 3], load=load, previous=first)
    assert max(rank_loads(joined, load).values()) == 10.0


def test_surplus_copy_is_dropped_by_the_fuller_rank() -> None:
    previous = Placement(((ExpertReplica(0, 0), ExpertReplica(1, 0)), (ExpertReplica(0, 1),)))
    assert plan(2, [0, 1], previous=previous).replicas == ((ExpertReplica(1, 0),), (ExpertReplica(0, 1),))


def test_ranks_trade_if_the_one_with_room_holds_the_expert_already() -> None:
    # Rank 2 is full, rank 3 new; expert 0 is wanted on both.
    previous = Placement(
        ((ExpertReplica(0, 0), ExpertReplica(1, 0)), (ExpertReplica(2, 0),), (ExpertReplica(2, 1),))
    )
    after = plan(3, [2, 3], load=[3, 1, 0], redundant=1, previous=previous)
    assert after.replicas == (
        (ExpertReplica(2, 0), ExpertReplica(3, 0)),
        (ExpertReplica(3, 1),),
        (ExpertReplica(2, 1),),
    )


def test_ranks_trade_an_expert_that_moves_anyway() -> None:
    # The second replica of expert 2 must go to rank 3, where expert 0 has been and expert 1 has just come.
    previous = Placement(
        ((ExpertReplica(2, 0), ExpertReplica(3, 0)), (ExpertReplica(0, 0),), (ExpertReplica(1, 0),))
    )
    after = plan(3, [1, 3], load=[0, 2, 3], redundant=1, previous=previous)
    assert after.replicas == (
        (ExpertReplica(3, 0),),
        (ExpertReplica(1, 1),),
        (ExpertReplica(1, 0), ExpertReplica(3, 1)),
    )


def test_without_rebalance_load_alone_moves_nothing() -> None:
    first = plan(4, [0, 1], load=[9, 1, 9, 1])
    assert plan(4, [0, 1], load=[0, 9, 9, 0], previous=first) == first


def test_a_rebalance_relieves_the_heaviest_rank_and_keeps_the_rest() -> None:
    previous = Placement(
        (
            (ExpertReplica(0, 0),),
            (ExpertReplica(0, 1),),
            (ExpertReplica(1, 0),),
            (ExpertReplica(1, 1),),
            (ExpertReplica(2, 0),),
        )
    )
    after = plan(5, [0, 1, 2], load=[10, 10, 1, 2, 11], previous=previous, rebalance=True)
    assert after.replicas == (
        (ExpertReplica(1, 0),),
        (ExpertReplica(0, 1),),
        (ExpertReplica(0, 0),),
        (ExpertReplica(1, 1),),
        (ExpertReplica(2, 0),),
    )
    assert after.moves_from(previous) == 2


def test_decayed_load_counts_as_zero() -> None:
    load = [5e-324 * (1 + expert % 7) for expert in range(40)]
    first = plan(40, range(6), load=load)
    assert first == plan(40, range(6))
    assert plan(40, range(6), load=load, previous=first, rebalance=True) == first


def test_a_rebalance_moves_nothing_for_a_gain_that_is_lost_in_the_noise() -> None:
    previous = Placement(
        ((ExpertReplica(0, 0),), (ExpertReplica(0, 1),), (ExpertReplica(1, 0),), (ExpertReplica(1, 1),))
    )
    assert plan(4, [0, 1], load=[1000, 1010, 1000, 1002], previous=previous, rebalance=True) == previous


def test_a_rebalance_moves_nothing_where_another_rank_stays_as_heavy() -> None:
    # Only rank 1 of the heaviest ranks, 0 and 1, could be relieved, which leaves the maximum unchanged.
    previous = Placement(
        ((ExpertReplica(0, 0),), (ExpertReplica(1, 0),), (ExpertReplica(1, 1),), (ExpertReplica(2, 0),))
    )
    assert plan(4, [0, 1, 2], load=[10, 5, 5, 0], previous=previous, rebalance=True) == previous


@given(case=cases(), data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_rebalance_never_makes_the_heaviest_rank_heavier(case: Case, data: st.DataObject) -> None:
    first = case.plan()
    load = data.draw(loads(case.num_experts))
    if load is not None and not any(load):
        load = None
    second = replace(case, load=load).plan(first, rebalance=True)
    check_valid(second, case)
    check_who_stays_keeps_the_slot(second, first, case.slots)
    assert max(rank_loads(second, load).values()) <= max(rank_loads(first, load).values())


def test_rebalance_keeps_expert_replicas_better_than_a_fresh_plan() -> None:
    first = plan(3, [0, 1], redundant=1)
    assert [len(replicas) for replicas in first.replicas] == [2, 1, 1]
    # A second replica of expert 1 would share a rank with expert 2: a load of 15 instead of 11.
    load = [1.0, 10.0, 10.0]
    assert plan(3, [0, 1], load=load, redundant=1, previous=first, rebalance=True) == first
    assert max(rank_loads(plan(3, [0, 1], load=load, redundant=1), load).values()) == 15.0


def test_rebalance_evens_skewed_load_nearly_as_well_as_a_fresh_plan() -> None:
    skewed = random.Random(0)
    for _ in range(20):
        first, second = ([skewed.paretovariate(2) for _ in range(64)] for _ in range(2))
        before = plan(64, range(8), load=first, redundant=8)
        after = plan(64, range(8), load=second, redundant=8, previous=before, rebalance=True)
        anew = plan(64, range(8), load=second, redundant=8)
        heaviest = max(rank_loads(after, second).values())
        assert heaviest <= 1.05 * max(rank_loads(anew, second).values())
        assert after.moves_from(before) < anew.moves_from(before) / 2


def test_moves_count_experts_taken_over_not_dropped() -> None:
    old = Placement(((ExpertReplica(0, 0), ExpertReplica(1, 0)), (ExpertReplica(1, 1),)))
    new = Placement(((ExpertReplica(0, 3),), (ExpertReplica(0, 1), ExpertReplica(2, 0))))
    assert new.moves_from(old) == 2
