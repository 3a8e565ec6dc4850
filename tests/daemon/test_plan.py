"""The plan of a reload: the programs that change, the reasons, the actions, and their order."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.config.loader import parse
from fastdeploy.daemon.config.programs import ROUTER, Program, programs_of
from fastdeploy.daemon.operations.plan import Step, Verb, differences, plan

PREFIX = Path("/tmp/fd")


def program(name: str, port: int, *words: str, **env: str) -> Program:
    return Program(name, ("python", "-m", "x", *words), MappingProxyType(env), (port,))


def fleet(count: int, *words: str, base: int = 5000) -> list[Program]:
    return [program("router", 30000), *(program(f"replica{i}", base + i, *words) for i in range(count))]


def programs(
    replicas: int = 8, parallel: str = "expert_parallel = false", engine: str = "", router: str = ""
) -> list[Program]:
    text = (
        f'[model]\npath = "/m"\n[parallel]\ndata_parallel_size = {replicas}\n{parallel}\n'
        f"[engine]\n{engine}\n[router]\n{router}\n"
    )
    return programs_of(parse(text, "dp.toml", PREFIX, PREFIX))


def heads(steps: list[Step]) -> list[str]:
    return [str(step).partition(" (")[0] for step in steps]


# ---- dp.toml to dp.toml


def replaced(numbers: range, why: str) -> list[str]:
    return [f"replace replica {number} ({why})" for number in numbers]


#: Old and new settings, and the expected steps in order with their reasons.
CHANGES: dict[str, tuple[dict, dict, list[str]]] = {
    "nothing": ({}, {}, []),
    "an option of the engine": (
        {"replicas": 3},
        {"replicas": 3, "engine": "max_num_seqs = 16"},
        replaced(range(3), "--max-num-seqs: 8 -> 16"),
    ),
    "8 to 4": (
        {"replicas": 8},
        {"replicas": 4},
        [
            *replaced(range(4), "--data-parallel-size: 8 -> 4"),
            *(f"remove replica {number}" for number in (7, 6, 5, 4)),
        ],
    ),
    "4 to 8": (
        {"replicas": 4},
        {"replicas": 8},
        [
            *(f"add replica {number}" for number in (4, 5, 6, 7)),
            *replaced(range(4), "--data-parallel-size: 4 -> 8"),
        ],
    ),
    "one replica's port": (
        {"replicas": 2, "engine": "ports = [5000, 5001]"},
        {"replicas": 2, "engine": "ports = [5000, 5009]"},
        ["replace replica 1 (--port: 5001 -> 5009)"],
    ),
    "one replica's queue port": (
        {"replicas": 2, "engine": "engine_worker_queue_ports = [5000, 5001]"},
        {"replicas": 2, "engine": "engine_worker_queue_ports = [5000, 5009]"},
        ["replace replica 1 (--engine-worker-queue-port: 5001 -> 5009)"],
    ),
    "ports that move up, into one another": (
        {"replicas": 3, "engine": "ports = [5000, 5001, 5002]"},
        {"replicas": 3, "engine": "ports = [5001, 5002, 5003]"},
        [
            "replace replica 2 (--port: 5002 -> 5003)",
            "replace replica 1 (--port: 5001 -> 5002)",
            "replace replica 0 (--port: 5000 -> 5001)",
        ],
    ),
    "a port of one that goes for one that comes to be": (
        {"replicas": 3, "engine": "threads = 1\nports = [5000, 5001, 5002]"},
        {"replicas": 2, "engine": "threads = 1\nports = [5002, 5001]"},
        [
            "replace replica 1 (--data-parallel-size: 3 -> 2)",
            "remove replica 2",
            "replace replica 0 (--port: 5000 -> 5002; --data-parallel-size: 3 -> 2)",
        ],
    ),
    "what the router takes while it runs": (
        {"replicas": 2},
        {"replicas": 2, "router": 'policy = "session"\nworkers = 2'},
        ["reload router (--policy: cache_aware -> session; --workers: 1 -> 2)"],
    ),
    "flags of the router by hand": (
        {"replicas": 2, "router": 'extra_args = ["--queue-size", "5"]'},
        {"replicas": 2, "router": 'extra_args = ["--queue-size=7", "--log-level", "debug"]'},
        ["reload router (--queue-size: removed; --queue-size=7: added; --log-level debug: added)"],
    ),
    "the router's port": (
        {"replicas": 2},
        {"replicas": 2, "router": "port = 30009"},
        [
            "replace router (--port: 30000 -> 30009)",
            *replaced(range(2), "--router: 127.0.0.1:30000 -> 127.0.0.1:30009"),
        ],
    ),
    "the router's host, and that it has a certificate": (
        {"replicas": 1},
        {"replicas": 1, "router": 'host = "0.0.0.0"\nextra_args = ["--certfile", "c", "--keyfile", "k"]'},
        ["replace router (--host: 127.0.0.1 -> 0.0.0.0; --certfile c: added; --keyfile k: added)"],
    ),
    "another certificate": (
        {"replicas": 1, "router": 'extra_args = ["--certfile", "c", "--keyfile", "k"]'},
        {"replicas": 1, "router": 'extra_args = ["--certfile", "d", "--keyfile", "l"]'},
        ["reload router (--certfile: c -> d; --keyfile: k -> l)"],
    ),
    "the router's environment": (
        {"replicas": 1},
        {"replicas": 1, "router": 'env = { FD_API_KEY = "sesame" }'},
        ["replace router (environment FD_API_KEY: added)"],
    ),
}


@pytest.mark.parametrize(("old", "new", "steps"), CHANGES.values(), ids=CHANGES.keys())
def test_plan_for_each_kind_of_change_in_dp_toml(old: dict, new: dict, steps: list[str]) -> None:
    assert [str(step) for step in plan(programs(**old), programs(**new))] == steps


def test_ranks_of_an_expert_group_change_their_group_with_their_number() -> None:
    [first, *_] = plan(programs(4, parallel=""), programs(2, parallel=""))
    assert [reason.partition(":")[0] for reason in first.why] == [
        *("--data-parallel-size", "--expert-parallel-group")
    ]


# ---- the order


def test_replicas_that_are_down_are_replaced_before_running_ones() -> None:
    steps = plan(fleet(4), fleet(4, "--x"), down={"replica2", "replica3"})
    assert heads(steps) == [f"replace replica {number}" for number in (2, 3, 0, 1)]


def test_plan_order_is_router_additions_replacements_removals() -> None:
    old = [program("router", 1), *(program(f"replica{i}", 5000 + i) for i in (0, 1, 3))]
    new = [program("router", 2), *(program(f"replica{i}", 5000 + i, "--x") for i in (0, 2, 1))]
    assert heads(plan(old, new)) == [
        *("replace router", "add replica 2", "replace replica 0", "replace replica 1", "remove replica 3"),
    ]


def test_cyclic_port_swap_stops_one_holder_first_and_starts_it_next() -> None:
    old = [program("replica0", 1), program("replica1", 2), program("replica2", 3)]
    new = [program("replica0", 2), program("replica1", 1), program("replica2", 3, "--x")]
    assert [(step.program.name, step.clears) for step in plan(old, new)] == [
        *(("replica2", ()), ("replica0", ("replica1",)), ("replica1", ())),
    ]


# ---- reasons


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


def test_event_of_a_step_names_program_verb_and_reason() -> None:
    old, new = fleet(1)[1], fleet(1, "--x")[1]
    assert Step(old, None).program is old
    assert Step(old, new, ("--x: added",)).event() == {
        "program": "replica0",
        "label": "replica 0",
        "verb": "replace",
        "why": ["--x: added"],
    }


# ---- from any list to any other


@st.composite
def any_programs(draw: st.DrawFn, mixed_up: bool = True) -> list[Program]:
    """Draw a router and replicas without common ports; if not `mixed_up`, each program's port is fixed."""
    numbers = draw(st.lists(st.integers(0, 6), unique=True, max_size=6))
    ports = draw(st.permutations(range(1, 10)))
    found = []
    for index, name in enumerate([ROUTER, *(f"replica{number}" for number in numbers)]):
        own = 1 if name == ROUTER else 2 + int(name[-1])
        words = ("fd", draw(st.sampled_from(["", "--x", "--y"])))
        found.append(Program(name, words, MappingProxyType({}), (ports[index] if mixed_up else own,)))
    return found


def goes_in_a_circle(old: list[Program], new: list[Program]) -> bool:
    """Return whether programs that change form a cycle in which each wants the port of the next."""
    before = {one.name: one for one in old}
    holders = {port: one.name for one in old for port in one.ports}
    waits = {
        one.name: {holders[port] for port in one.ports if port in holders} - {one.name}
        for one in new
        if one.name not in before or not before[one.name].runs_as(one)
    }
    try:
        TopologicalSorter(waits).prepare()
    except CycleError:
        return True
    return False


@given(any_programs(), any_programs())
def test_every_plan_ends_with_the_new_list_without_two_programs_on_a_port(
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
    # A program that was stopped for its port has been started again by its own step.
    assert running == current


@given(any_programs(), any_programs())
def test_plan_stops_two_programs_at_once_only_for_a_cycle_of_ports(
    old: list[Program], new: list[Program]
) -> None:
    circle = goes_in_a_circle(old, new)
    before = {one.name for one in old}
    down: set[str] = set()
    for step in plan(old, new):
        name = step.program.name
        if step.verb is not Verb.RELOAD:
            down |= {name, *step.clears} & before
        assert len(down) <= (2 if circle else 1)
        down.discard(name)
        before.discard(name if step.new is None else "")
    assert not down


@given(any_programs(mixed_up=False), any_programs(mixed_up=False))
def test_no_plan_leaves_fewer_than_it_has_to(old: list[Program], new: list[Program]) -> None:
    """No fewer programs run than the smaller list has, except for one that is being replaced."""
    up = {one.name for one in old}
    for step in plan(old, new):
        assert not step.clears
        up.discard(step.program.name)
        assert len(up) >= min(len(old), len(new)) - (step.verb is Verb.REPLACE)
        if step.new is not None:
            up.add(step.new.name)
