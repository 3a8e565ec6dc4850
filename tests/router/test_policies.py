"""Laws that the policies, which are pure functions, must satisfy."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.router.policy.policies import POLICIES, policy_named
from fastdeploy.daemon.router.policy.policy import Candidates, RequestFacts
from fastdeploy.daemon.router.policy.request_facts import BLOCK_ENDS, BYTES_PER_TOKEN


class Candidate(NamedTuple):
    """One row of the columns that policies receive."""

    in_flight: int
    last_pick: int
    tokens: int = 0
    weight: float = 1.0
    running: int = 0
    waiting: int = 0
    in_flight_at_poll: int = 0
    key: int = 0
    matched: int = 0


candidate = st.builds(
    Candidate,
    in_flight=st.integers(0, 50),
    last_pick=st.integers(0, 1000),
    tokens=st.integers(0, 100_000),
    weight=st.sampled_from([0.1, 0.5, 1.0]),
    running=st.integers(0, 50),
    waiting=st.integers(0, 50),
    key=st.integers(0, 2**64 - 1),
    matched=st.integers(0, len(BLOCK_ENDS)),
    in_flight_at_poll=st.integers(0, 50),
)
candidates = st.lists(candidate, min_size=1, max_size=16)
#: Replicas of equal speed, the usual case.
equally_fast = st.lists(candidate.map(lambda c: c._replace(weight=1.0)), min_size=1, max_size=16)
requests = st.builds(
    RequestFacts,
    draw=st.integers(0, 2**64 - 1),
    prompt_tokens=st.integers(0, 100_000),
    session=st.binary(max_size=8),
)
ANY = RequestFacts(0)


def index_of(name: str, rows: list[Candidate], facts: RequestFacts = ANY) -> int:
    return policy_named(name).choose(Candidates(*zip(*rows, strict=True)), facts)


def choose(name: str, rows: list[Candidate], facts: RequestFacts = ANY) -> Candidate:
    return rows[index_of(name, rows, facts)]


@dataclass
class Replicas:
    """The bookkeeping that a board does after each pick."""

    rows: list[Candidate]
    picks: list[int] = field(default_factory=list)

    def pick(self, name: str, facts: RequestFacts = ANY) -> int:
        index = index_of(name, self.rows, facts)
        row = self.rows[index]
        self.picks.append(index)
        self.rows[index] = row._replace(
            in_flight=row.in_flight + 1,
            tokens=row.tokens + facts.prompt_tokens,
            last_pick=len(self.picks),
        )
        return index


def idle(count: int, **fields: Any) -> Replicas:
    return Replicas([Candidate(0, 0, key=hash((7, i)) % 2**64, **fields) for i in range(count)])


@given(st.sampled_from(sorted(POLICIES)), candidates, requests)
def test_every_policy_picks_one_of_the_candidates_and_the_same_one_again(
    name: str, rows: list[Candidate], facts: RequestFacts
) -> None:
    index = index_of(name, rows, facts)
    assert 0 <= index < len(rows)
    assert index_of(name, rows, facts) == index


@given(equally_fast)
def test_request_num_picks_fewest_in_flight_then_least_recent(rows: list[Candidate]) -> None:
    chosen = choose("request_num", rows)
    assert (chosen.in_flight, chosen.last_pick) == min((row.in_flight, row.last_pick) for row in rows)


@pytest.mark.parametrize(
    "name", ["request_num", "round_robin", "process_tokens", "fd_metrics_score", "cache_aware", "session"]
)
@given(count=st.integers(1, 16), rounds=st.integers(1, 4))
def test_a_burst_of_equal_requests_spreads_exactly_evenly(name: str, count: int, rounds: int) -> None:
    replicas = idle(count)
    for _ in range(count * rounds):
        replicas.pick(name, RequestFacts(0, prompt_tokens=100))
    assert set(Counter(replicas.picks).values()) == {rounds}
    assert len(set(replicas.picks)) == count


def test_a_replica_of_half_the_speed_gets_half_the_requests() -> None:
    replicas = idle(3)
    replicas.rows[0] = replicas.rows[0]._replace(weight=0.5)
    for _ in range(100):
        replicas.pick("request_num")
    assert Counter(replicas.picks) == {0: 20, 1: 40, 2: 40}


@given(candidates)
def test_round_robin_picks_the_least_recent(rows: list[Candidate]) -> None:
    assert choose("round_robin", rows).last_pick == min(row.last_pick for row in rows)


@given(equally_fast, requests)
def test_power_of_two_never_picks_the_only_busiest_of_two(rows: list[Candidate], facts: RequestFacts) -> None:
    index = index_of("power_of_two", rows, facts)
    if len(rows) > 1:
        assert any(rows[index].in_flight <= row.in_flight for i, row in enumerate(rows) if i != index)


@pytest.mark.parametrize("name", ["random", "power_of_two"])
def test_chance_reaches_every_replica(name: str) -> None:
    rows = idle(8).rows
    # Spread over all 64 bits, like random draws.
    draws = [RequestFacts(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(800)]
    assert {index_of(name, rows, facts) for facts in draws} == set(range(8))


@given(equally_fast, requests)
def test_process_tokens_picks_the_fewest_prompt_tokens(rows: list[Candidate], facts: RequestFacts) -> None:
    chosen = choose("process_tokens", rows, facts)
    assert (chosen.tokens, chosen.in_flight, chosen.last_pick) == min(
        (row.tokens, row.in_flight, row.last_pick) for row in rows
    )


def test_fd_metrics_score_counts_requests_of_others() -> None:
    ours, theirs = Candidate(3, 0), Candidate(0, 0, running=3, waiting=2)
    assert choose("fd_metrics_score", [ours, theirs]) == ours


@given(st.integers(0, 30))
def test_fd_metrics_score_does_not_count_our_own_requests_twice(running: int) -> None:
    """The replica had some of this router's requests when it was polled, and they have ended since."""
    was_busy = Candidate(1, 0, running=running, waiting=0, in_flight_at_poll=running)
    assert choose("fd_metrics_score", [Candidate(2, 0), was_busy]) == was_busy


def test_fd_metrics_score_does_not_flood_a_replica_last_seen_idle() -> None:
    replicas = idle(4, running=0)
    replicas.rows[1:] = [row._replace(running=8) for row in replicas.rows[1:]]
    for _ in range(40):
        replicas.pick("fd_metrics_score")
    assert sorted(Counter(replicas.picks).values()) == [8, 8, 8, 16]


def blocks(tokens: int) -> int:
    return sum(end <= tokens * BYTES_PER_TOKEN for end in BLOCK_ENDS)


@given(equally_fast, requests)
def test_cache_aware_never_takes_a_shorter_prefix_on_a_busier_replica(
    rows: list[Candidate], facts: RequestFacts
) -> None:
    chosen = choose("cache_aware", rows, facts)
    assert not any(row.matched > chosen.matched and row.in_flight < chosen.in_flight for row in rows)


@given(candidates, requests)
def test_without_a_prefix_cache_aware_is_request_num(rows: list[Candidate], facts: RequestFacts) -> None:
    rows = [row._replace(matched=0) for row in rows]
    assert choose("cache_aware", rows, facts) == choose("request_num", rows, facts)


def test_cache_aware_weighs_a_prefix_against_the_waiting_requests() -> None:
    prompt = RequestFacts(0, prompt_tokens=4000)
    knows = Candidate(5, 0, matched=blocks(3800))
    assert choose("cache_aware", [Candidate(2, 0), knows], prompt) == knows
    assert choose("cache_aware", [Candidate(0, 0), knows], prompt).in_flight == 0
    # A short shared prefix is not worth waiting for.
    knows_little = Candidate(5, 0, matched=blocks(200))
    assert choose("cache_aware", [Candidate(4, 0), knows_little], prompt).in_flight == 4


def sessions(count: int) -> list[RequestFacts]:
    return [RequestFacts(0, session=b"user %d" % number) for number in range(count)]


@given(st.integers(2, 16), st.data())
def test_removed_replica_moves_only_its_own_sessions(count: int, data: st.DataObject) -> None:
    rows = idle(count).rows
    gone = data.draw(st.sampled_from(rows))
    rest = [row for row in rows if row is not gone]
    for facts in sessions(50):
        before = choose("session", rows, facts)
        if before != gone:
            assert choose("session", rest, facts) == before


@given(st.permutations(range(8)))
def test_sessions_do_not_depend_on_the_order_of_rows(order: list[int]) -> None:
    rows = idle(8).rows
    for facts in sessions(20):
        assert choose("session", [rows[i] for i in order], facts) == choose("session", rows, facts)


def test_sessions_are_spread_over_all_replicas() -> None:
    replicas = Counter(index_of("session", idle(8).rows, facts) for facts in sessions(800))
    assert len(replicas) == 8
    assert max(replicas.values()) < 150


def test_session_of_an_overloaded_replica_has_one_fixed_alternative() -> None:
    rows = idle(8).rows
    (facts,) = sessions(1)
    home = index_of("session", rows, facts)
    rows[home] = rows[home]._replace(in_flight=4)
    assert index_of("session", rows, facts) == home
    rows[home] = rows[home]._replace(in_flight=40)
    without_home = [row for row in rows if row is not rows[home]]
    assert choose("session", rows, facts) == choose("session", without_home, facts)


@given(candidates)
def test_no_session_goes_to_a_replica_with_far_more_than_its_share(rows: list[Candidate]) -> None:
    share = sum(row.in_flight for row in rows) / sum(row.weight for row in rows)
    for facts in sessions(5):
        chosen = choose("session", rows, facts)
        assert chosen.in_flight <= (1.5 * share + 4) * chosen.weight


@given(candidates)
def test_request_without_a_session_is_routed_by_request_num(rows: list[Candidate]) -> None:
    assert choose("session", rows) == choose("request_num", rows)


def test_an_unknown_policy_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"one of request_num, round_robin, .*, cache_aware, session$"):
        policy_named("fastest")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("remote_cache_aware", "cache_aware"), ("fd_remote_metrics_score", "fd_metrics_score")],
)
def test_fastdeploys_name_of_a_policy_gets_a_hint(theirs: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"FastDeploy's {theirs} is {ours} here"):
        policy_named(theirs)
