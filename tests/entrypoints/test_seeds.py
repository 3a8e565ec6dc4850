"""Seeds of requests without one."""

from fastdeploy.entrypoints.openai.seeds import Seeds


def draw(base: int | None) -> list[int]:
    seeds = Seeds(base)
    return [seeds.draw() for _ in range(100)]


def test_seeds_follow_from_their_base() -> None:
    assert draw(5) == draw(5)
    assert set(draw(5)).isdisjoint(draw(6))


def test_seeds_without_a_base_are_random() -> None:
    assert set(draw(None)).isdisjoint(draw(None))


def test_seeds_differ_from_each_other_and_fit_the_engine() -> None:
    for base in (None, 0, -1, 2**70):
        assert len(set(draw(base))) == 100
        assert all(0 <= seed < 2**63 for seed in draw(base))
