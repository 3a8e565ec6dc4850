"""The plan of a reload."""

from __future__ import annotations

from types import MappingProxyType

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.programs import Program
from fastdeploy.daemon.rollout import Step, differences, plan


def program(name: str, port: int, *words: str, **env: str) -> Program:
    return Program(name, ("python", "-m", "x", *words), MappingProxyType(env), (port,))


def fleet(count: int, *words: str, base: int = 5000) -> list[Program]:
    return [program("router", 30000), *(program(f"replica{i}", base + i, *words) for i in range(count))]


def test_nothing_changed_is_nothing_to_do() -> None:
    assert plan(fleet(8), fleet(8)) == []


def test_only_what_changed_is_replaced_in_order() -> None:
    steps = plan(fleet(3), fleet(3, "--max-num-seqs", "8"))
    assert [str(step) for step in steps] == [
        f"replace replica {i} (--max-num-seqs 8: added)" for i in range(3)
    ]


def test_replicas_are_removed_from_the_end_before_anything_is_replaced_and_added_last() -> None:
    down = plan(fleet(4), fleet(2, "--x"))
    assert [str(step).split(" (")[0] for step in down] == [
        *("remove replica 3", "remove replica 2", "replace replica 0", "replace replica 1"),
    ]
    up = plan(fleet(2), fleet(4))
    assert [str(step) for step in up] == ["add replica 2", "add replica 3"]


def test_the_router_is_replaced_first() -> None:
    old = fleet(1)
    new = [program("router", 30001), program("replica0", 5000, "--router", "127.0.0.1:30001")]
    assert [step.program.name for step in plan(old, new)] == ["router", "replica0"]


def test_a_program_that_holds_a_port_which_another_needs_ends_first() -> None:
    old = [program("replica0", 1), program("replica1", 2)]
    new = [program("replica0", 2), program("replica1", 1)]
    steps = plan(old, new)
    assert [(step.program.name, step.clears) for step in steps] == [
        ("replica0", ("replica1",)),
        ("replica1", ()),
    ]


def test_differences_name_flags_and_hide_the_values_of_the_environment() -> None:
    old = program("replica0", 1, "--a", "1", "--b", "x", "y", "--gone", KEY="secret", OLD="1")
    new = program("replica0", 1, "--a", "2", "--b", "x", "y", "--new", KEY="other", NEW="2")
    assert differences(old, new) == (
        "--a: 1 -> 2",
        "--gone: removed",
        "--new: added",
        "environment KEY: changed",
        "environment NEW: added",
        "environment OLD: removed",
    )


def test_differences_hide_the_values_of_flags_that_may_be_secrets() -> None:
    old = program("replica0", 1, "--hub-token", "a", "--old-secret=b")
    new = program("replica0", 1, "--hub-token", "c", "--new-key", "d", "--max-num-batched-tokens", "512")
    assert differences(old, new) == (
        "--hub-token: changed",
        "--old-secret=***: removed",
        "--new-key: added",
        "--max-num-batched-tokens 512: added",
    )


PROGRAMS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 9), st.sampled_from(["", "--x", "--y"])),
    unique_by=(lambda row: row[0], lambda row: row[1]),
).map(lambda rows: [program(f"replica{number}", port, word) for number, port, word in rows])


@given(PROGRAMS, PROGRAMS)
def test_a_plan_leads_from_one_list_to_the_other_without_two_programs_on_a_port(
    old: list[Program], new: list[Program]
) -> None:
    running = {one.name: one for one in old}
    current = dict(running)
    for step in plan(old, new):
        assert step.old == current.get(step.program.name)
        for name in (*step.clears, step.program.name):
            running.pop(name, None)
        current.pop(step.program.name, None)
        if step.new is not None:
            current[step.new.name] = running[step.new.name] = step.new
        ports = [port for one in running.values() for port in one.ports]
        assert len(ports) == len(set(ports))
    assert current == {one.name: one for one in new}
    # Whatever was ended for its port has been started again with its own step.
    assert running == current


def test_a_step_tells_its_program() -> None:
    old, new = fleet(1)[1], fleet(1, "--x")[1]
    assert Step(old, None).program is old
    assert Step(old, new).program is new
