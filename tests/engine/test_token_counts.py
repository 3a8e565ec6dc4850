from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.core.token_counts import TokenCounts

texts = st.lists(st.integers(0, 30) | st.integers(0, 10**6), max_size=300)


@given(texts, texts, st.lists(st.integers(0, 300), max_size=5))
def test_incremental_counts_equal_those_of_the_whole_text(
    prompt: list[int], outputs: list[int], stops: list[int]
) -> None:
    counts = TokenCounts(prompt)
    for stop in sorted(stops):
        counts.after(outputs[:stop])
    pairs = counts.after(outputs).tolist()
    assert dict(pairs) == dict.fromkeys(prompt, 0) | Counter(outputs)
    assert len(pairs) == len({*prompt, *outputs})


def test_asking_again_counts_nothing_twice() -> None:
    counts = TokenCounts([5])
    assert counts.after([5, 7]).tolist() == counts.after([5, 7]).tolist() == [[5, 1], [7, 1]]
