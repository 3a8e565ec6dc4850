"""The policy study simulates replicas correctly, and its runs are reproducible."""

import pytest

from benchmarks.router_settings import CONTENDERS, SETTINGS
from benchmarks.router_traffic import BLOCK, Turn, chat
from benchmarks.simulated_replica import CHUNK, MAX_TEXTS, STEP_SECONDS, Job, Replica, Timeline
from benchmarks.simulated_routers import Scene, Setting, figures_of, simulate
from fastdeploy.daemon.router.policy.policies import POLICIES
from fastdeploy.daemon.router.policy.policy import RequestFacts

SECONDS = 30.0


class Bench:
    """A simulated replica."""

    def __init__(self, cache_blocks: int = 1000) -> None:
        self.time = Timeline()
        self.replica = Replica(self.time, 1.0, cache_blocks)
        self.ended: list[Job] = []

    def ask(self, at: float, prompt: list[int], answer_tokens: int = 5) -> Job:
        """Submit a prompt of these blocks plus one more token."""
        turn = Turn(RequestFacts(0), len(prompt) * BLOCK + 1, answer_tokens, prompt, prompt, 0.0)
        job = Job(turn, at, began=lambda job: None, ended=self.ended.append)
        self.time.at(at, lambda: self.replica.submit(job))
        return job


def test_a_prompt_is_computed_once_while_the_cache_has_room() -> None:
    bench = Bench()
    first, second = bench.ask(0.0, [1, 2, 3]), bench.ask(10.0, [1, 2, 9])
    bench.time.run()
    assert (first.cached_tokens, second.cached_tokens) == (0, 2 * BLOCK)
    assert second.first_token_at - second.arrived < first.first_token_at - first.arrived


def test_full_cache_evicts_the_least_recently_used_text_from_its_end() -> None:
    bench = Bench(cache_blocks=4)
    bench.ask(0.0, [1, 2])
    bench.ask(10.0, [3, 4, 5])
    again = bench.ask(20.0, [1, 2])
    bench.time.run()
    assert again.cached_tokens == BLOCK


def test_arriving_text_joins_at_the_next_step() -> None:
    bench = Bench()
    long, short = bench.ask(0.0, [], answer_tokens=1000), bench.ask(1.0, [], answer_tokens=1)
    bench.time.run()
    assert bench.ended == [short, long]
    assert short.first_token_at - short.arrived < 3 * STEP_SECONDS


def test_long_prompt_takes_several_steps_and_excess_texts_wait() -> None:
    bench = Bench()
    long = bench.ask(0.0, list(range(3 * CHUNK // BLOCK)))
    others = [bench.ask(0.0, [], answer_tokens=200) for _ in range(MAX_TEXTS)]
    bench.time.run()
    assert long.first_token_at > 3 * STEP_SECONDS
    assert others[-1].first_token_at >= long.ended_at
    assert len(bench.ended) == MAX_TEXTS + 1


@pytest.mark.parametrize("name", SETTINGS)
def test_every_policy_gets_everything_answered_and_a_run_can_be_repeated(name: str) -> None:
    scene = Scene.of(SETTINGS[name], 1, SECONDS)
    for policy in CONTENDERS:
        jobs = simulate(scene, policy)
        assert all(job.arrived < job.first_token_at <= job.ended_at for job in jobs)
    assert figures_of(simulate(scene, policy)) == figures_of(jobs)


def test_policies_that_look_for_prefixes_find_more_of_them() -> None:
    scene = Scene.of(Setting({chat: 20.0}), 1, 2 * SECONDS)
    cached = {policy.name: figures_of(simulate(scene, policy)).cached for policy in POLICIES.values()}
    assert min(cached["cache_aware"], cached["session"]) > cached["request_num"] + 5
