"""Policies are functions: these are their laws."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.router.policies import POLICIES, Candidate, RequestFacts, policy_named
from fastdeploy.errors import ConfigError

candidates = st.lists(
    st.builds(Candidate, in_flight=st.integers(0, 50), last_pick=st.integers(0, 1000)),
    min_size=1,
    max_size=16,
)
draws = st.integers(0, 2**64 - 1)


def facts(draw: int = 0) -> RequestFacts:
    return RequestFacts("/v1/completions", b"{}", draw)


@given(st.sampled_from(sorted(POLICIES)), candidates, draws)
def test_every_policy_picks_one_of_the_candidates_and_the_same_one_again(name, rows, draw):
    policy = POLICIES[name]
    index = policy(rows, facts(draw))
    assert 0 <= index < len(rows)
    assert policy(rows, facts(draw)) == index


@given(candidates)
def test_request_num_picks_the_fewest_in_flight_and_of_those_the_least_recent(rows):
    chosen = rows[policy_named("request_num")(rows, facts())]
    least = [row for row in rows if row.in_flight == chosen.in_flight]
    assert chosen.in_flight == min(row.in_flight for row in rows)
    assert chosen.last_pick == min(row.last_pick for row in least)


@given(candidates, draws)
def test_power_of_two_never_picks_the_only_busiest_of_two(rows, draw):
    index = policy_named("power_of_two")(rows, facts(draw))
    if len(rows) > 1:
        assert any(rows[index].in_flight <= row.in_flight for i, row in enumerate(rows) if i != index)


@pytest.mark.parametrize("name", ["random", "power_of_two"])
def test_chance_reaches_every_replica(name):
    rows = [Candidate(0, 0)] * 8
    # Spread over all 64 bits, as random draws are.
    picks = Counter(policy_named(name)(rows, facts(i * 0x9E3779B97F4A7C15 % 2**64)) for i in range(800))
    assert sorted(picks) == list(range(8))


def test_an_unknown_policy_names_those_that_exist():
    with pytest.raises(ConfigError, match="request_num, round_robin, random, power_of_two"):
        policy_named("cache_aware")
