"""Times in the outputs of traced sequences."""

from __future__ import annotations

from fastdeploy.common.messages import AddRequest, TokenOutput
from fastdeploy.common.request import Batch, FinishReason, SamplingParams, ScheduledSequence, Sequence
from fastdeploy.core.sequence_times import SequenceTimes

CONTEXT = f"00-{'ab' * 16}-{'cd' * 8}-0"
PARAMS = SamplingParams(max_tokens=9)


def added(**traceparents: str) -> SequenceTimes:
    times = SequenceTimes()
    for name, traceparent in traceparents.items():
        times.add(AddRequest(name, [1], PARAMS, 0.0, traceparent=traceparent))
    return times


def batch(*names: str) -> Batch:
    return Batch(tuple(ScheduledSequence(Sequence(name, [1], PARAMS), 0, 1, True) for name in names))


def test_only_the_first_and_the_last_output_have_times() -> None:
    times = added(traced=f"{CONTEXT}1", untraced=f"{CONTEXT}0", odd="odd")
    times.begin_step(batch("traced", "untraced"))
    times.begin_step(batch("traced"))
    reasons = (None, None, FinishReason.STOP)
    (first,), (middle,), (last,) = [
        times.added_to([TokenOutput("traced", [1], reason)]) for reason in reasons
    ]
    assert first.times is not None
    assert last.times is not None
    assert middle.times is None
    assert 0 < first.times.scheduled == last.times.scheduled <= first.times.drawn <= last.times.drawn
    assert not times


def test_sequences_that_are_not_sampled_have_no_times() -> None:
    times = added(traced=f"{CONTEXT}1", untraced=f"{CONTEXT}0")
    (output,) = times.added_to([TokenOutput("untraced", [1])])
    assert output.times is None


def test_aborted_sequences_are_forgotten() -> None:
    times = added(traced=f"{CONTEXT}1", waiting=f"{CONTEXT}1")
    times.begin_step(batch("traced"))
    times.added_to([TokenOutput("traced", [1])])
    times.forget(["traced", "waiting", "unknown"])
    assert not times


def test_sequence_that_is_refused_before_its_first_step_has_no_start() -> None:
    times = added(refused=f"{CONTEXT}1")
    (output,) = times.added_to([TokenOutput("refused", [], FinishReason.ERROR)])
    assert output.times is not None
    assert output.times.scheduled == 0
    assert not times
