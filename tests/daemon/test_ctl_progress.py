"""The output of a reload on a terminal and without one."""

from __future__ import annotations

import io
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.fdctl.progress import Progress

from .conftest import FDCTL
from .scripted_daemon import Terminal, scripted

STAGES = ("drain", "stop", "start", "reload", "ready", "failed", "rollback", "a stage of a newer daemon")


def plan(**verbs: str) -> dict[str, Any]:
    steps = [
        {"program": name, "label": label(name), "verb": verb, "why": ["--x: 1 -> 2"]}
        for name, verb in verbs.items()
    ]
    return {"kind": "plan", "steps": steps}


def stage(name: str, stage: str, in_flight: int = 0, note: str = "") -> dict[str, Any]:
    place = {"index": 1, "of": 2, "in_flight": in_flight, "note": note}
    return {"kind": "stage", "program": name, "label": label(name), "stage": stage, **place}


def label(name: str) -> str:
    return re.sub(r"(\d)", r" \1", name)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def shown(progress: Progress) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(progress.render())
    assert isinstance(console.file, io.StringIO)
    return [re.sub(r" {2,}", "  ", line).strip() for line in console.file.getvalue().splitlines()]


def test_each_program_of_the_plan_has_a_line_and_all_have_a_bar() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.event(plan(replica0="replace", replica1="replace", replica2="remove"))
    progress.event(stage("replica0", "drain", in_flight=3))
    clock.now += 65
    one, two, three, bar = shown(progress)
    assert one.endswith("replica 0  replace  draining, 3 in flight  1m05s")
    assert (two, three) == ("·  replica 1  replace", "·  replica 2  remove")
    assert bar.endswith("0/3  1m05s")
    for each in ("stop", "start", "ready"):
        progress.event(stage("replica0", each))
    progress.event(stage("replica1", "start", note="62%"))
    one, two, _, bar = shown(progress)
    assert one == "✓  replica 0  replace  READY  1m05s"
    assert two.endswith("replica 1  replace  loading (62%)  0m00s")
    assert bar.endswith("1/3  1m05s")


def test_elapsed_time_stops_when_the_program_is_done() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.event(plan(replica0="replace", replica1="remove"))
    progress.event(stage("replica0", "ready"))
    progress.event(stage("replica1", "stop"))
    clock.now += 5
    progress.end(protocol.OK)
    clock.now += 60
    one, two, _ = shown(progress)
    assert (one, two) == ("✓  replica 0  replace  READY  0m00s", "✓  replica 1  remove  stopped  0m05s")


def test_programs_in_progress_at_a_failure_are_marked() -> None:
    progress = Progress(Clock())
    progress.event(plan(replica0="replace", replica1="replace"))
    progress.event(stage("replica0", "start"))
    progress.end(protocol.FAILED)
    one, two, bar = shown(progress)
    assert one == "✗  replica 0  replace  failed  0m00s"
    assert two == "·  replica 1  replace"
    assert bar.endswith("1/2  0m00s")


@given(
    st.lists(
        st.one_of(
            st.builds(stage, st.sampled_from(["replica0", "replica1", "router"]), st.sampled_from(STAGES)),
            st.just(plan(replica0="replace", replica1="add")),
            st.just({"kind": "of a newer daemon"}),
        ),
        max_size=12,
    )
)
def test_any_order_of_events_can_be_shown(events: list[dict[str, Any]]) -> None:
    progress = Progress()
    for event in events:
        progress.event(event)
        shown(progress)
    progress.end(protocol.OK)
    assert progress.done <= len(progress.rows)


MESSAGES: list[dict[str, Any]] = [
    {"line": "replace replica 0 ([bold]--x: 1 -> 2)"},
    {"event": plan(replica0="replace", replica1="replace")},
    *({"event": stage("replica0", each)} for each in ("drain", "stop", "start", "ready")),
    {"event": stage("replica1", "drain", in_flight=7)},
]


@pytest.fixture
def resumed() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_on_a_terminal_lines_scroll_above_the_program_table(tmp_path: Path, resumed: threading.Event) -> None:
    end: list[dict[str, Any]] = [{"event": stage("replica1", "ready")}, {"code": protocol.OK}]
    with scripted(tmp_path / "s", lambda _: [*MESSAGES, lambda: resumed.wait(60), *end]) as commands:
        terminal = Terminal("--socket", str(tmp_path / "s"), "reload")
        terminal.shows(r"replica 1 +replace +draining, 7 in flight")
        resumed.set()
        code, text = terminal.end()
    assert commands == [{"do": "reload", "dry_run": False, "wait": True}]
    assert code == protocol.OK
    assert "replace replica 0 ([bold]--x: 1 -> 2)" in text
    assert re.search(r"✓ +replica 0 +replace +READY", text)
    last = text.rstrip().splitlines()
    assert re.search(r"✓ +replica 1 +replace +READY", last[-2])
    assert "2/2" in last[-1]


def test_ctrl_c_on_a_terminal_detaches(tmp_path: Path, resumed: threading.Event) -> None:
    with scripted(tmp_path / "s", lambda _: [*MESSAGES, lambda: resumed.wait(60)]):
        terminal = Terminal("--socket", str(tmp_path / "s"), "reload")
        terminal.shows(r"draining, 7 in flight")
        terminal.type(b"\x03")
        code, text = terminal.end()
    assert code == protocol.DETACHED
    status = f"fdctl --socket {tmp_path / 's'} status"
    assert text.rstrip().endswith(f"fdctl: detached; the reload continues: {status}")


def test_without_a_terminal_there_are_only_the_lines(tmp_path: Path) -> None:
    end = {"code": protocol.FAILED, "error": "replica 1: exit status 3"}
    with scripted(tmp_path / "s", lambda _: [*MESSAGES, end]):
        command = [str(FDCTL), "--socket", str(tmp_path / "s"), "reload"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "replace replica 0 ([bold]--x: 1 -> 2)\n"
    assert (done.returncode, done.stderr) == (protocol.FAILED, "fdctl: ERROR (replica 1: exit status 3)\n")
