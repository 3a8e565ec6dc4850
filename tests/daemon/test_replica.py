"""The table of state transitions."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from fastdeploy.daemon.config.programs import Program
from fastdeploy.daemon.supervision.program_state import ALIVE, TRANSITIONS, ProgramState, SupervisedProgram


def replica(state: ProgramState) -> SupervisedProgram:
    return SupervisedProgram(
        Program("replica3", ("x",), MappingProxyType({}), (1,)), state=state, pid=7, kill_reason="x"
    )


def test_every_state_can_be_reached_and_left() -> None:
    assert set(TRANSITIONS) == set(ProgramState)
    assert set().union(*TRANSITIONS.values()) == set(ProgramState)
    assert all(TRANSITIONS.values())


@pytest.mark.parametrize("start", ProgramState)
@pytest.mark.parametrize("to", ProgramState)
def test_only_transitions_of_the_table_are_allowed(start: ProgramState, to: ProgramState) -> None:
    one = replica(start)
    if to not in TRANSITIONS[start]:
        with pytest.raises(AssertionError, match=f"replica 3: {start} -> {to}"):
            one.move(to, "why", 1.0)
        return
    one.move(to, "why", 1.0)
    assert (one.state, one.note, one.since) == (to, "why", 1.0)
    assert one.pid == (7 if to in ALIVE else 0)


def test_only_starting_or_unhealthy_programs_become_ready() -> None:
    assert {start for start in ProgramState if ProgramState.READY in TRANSITIONS[start]} == {
        ProgramState.STARTING,
        ProgramState.UNHEALTHY,
    }
