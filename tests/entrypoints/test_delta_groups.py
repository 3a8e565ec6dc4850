"""Joined deltas: nothing is lost, and a resumed stream has the same groups."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.request import FinishReason
from fastdeploy.entrypoints.openai.delta_groups import DeltaGroups
from fastdeploy.entrypoints.openai.output import Delta


@dataclass(frozen=True)
class Step:
    """A step of one choice. Its token may be withheld."""

    choice: int
    is_withheld: bool

    def delta(self, number: int, *, is_last: bool) -> Delta:
        if is_last:
            return Delta(f"{number}.", (number,), (), FinishReason.STOP, "x")
        return Delta("", (), ()) if self.is_withheld else Delta(f"{number} ", (number,), ())


steps = st.lists(st.builds(Step, st.integers(0, 2), st.booleans()), min_size=1, max_size=40)


def grouped(taken: list[Step], size: int, start: int = 0) -> list[tuple[int, int, Delta]]:
    """Return (number of the step, choice, delta) of each event."""
    groups = DeltaGroups(size, [0] if start else [])
    last = {step.choice: number for number, step in enumerate(taken)}
    events = []
    for number, step in enumerate(taken[start:], start):
        delta = step.delta(number, is_last=last[step.choice] == number)
        if sent := groups.add(step.choice, delta, 1):
            events.append((number, step.choice, sent))
    return events


@given(steps, st.integers(1, 6))
def test_nothing_is_lost_or_reordered(taken: list[Step], size: int) -> None:
    one_by_one = grouped(taken, 1)
    together = grouped(taken, size)
    for choice in {step.choice for step in taken}:
        parts = [delta for _, each, delta in one_by_one if each == choice]
        joined = [delta for _, each, delta in together if each == choice]
        assert "".join(delta.text for delta in joined) == "".join(delta.text for delta in parts)
        assert [i for delta in joined for i in delta.token_ids] == [
            i for delta in parts for i in delta.token_ids
        ]
        assert (joined[-1].finish_reason, joined[-1].stop_reason) == (FinishReason.STOP, "x")
        assert len(joined) <= len(parts)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 6), st.data())
def test_a_stream_that_is_resumed_after_an_event_has_the_same_groups(
    withheld: list[bool], size: int, data: st.DataObject
) -> None:
    taken = [Step(0, each) for each in withheld]
    events = grouped(taken, size)
    cut = data.draw(st.integers(0, len(events) - 1))
    start = events[cut - 1][0] + 1 if cut else 0
    assert grouped(taken, size, start) == events[cut:]


def test_an_event_has_as_many_tokens_as_requested() -> None:
    events = grouped([Step(0, False)] * 8, 3)
    assert [len(delta.token_ids) for _, _, delta in events] == [1, 3, 3, 1]
