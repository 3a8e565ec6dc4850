"""The operator's intents for a replica outlive daemons, routers and reloads."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.supervision.intents import DesiredState, Intent, Intents
from fastdeploy.daemon.supervision.program_state import ProgramState

from .conftest import Running, alive, wait_until
from .world import World

WISHES = st.dictionaries(
    st.text(max_size=8), st.builds(DesiredState, st.sampled_from(Intent), st.booleans()), max_size=4
)


# ---- the file


@given(WISHES)
def test_written_intents_are_read_back(tmp_path_factory: pytest.TempPathFactory, wishes: dict) -> None:
    state = tmp_path_factory.mktemp("state")
    intents = Intents(state)
    for name, wish in wishes.items():
        intents.set(name, wish)
    read = Intents(state)
    assert {name: read.of(name) for name in wishes} == wishes
    assert read.of("another") == DesiredState(Intent.RUN, draining=False)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"replica1": 5}', '{"replica1": {"intent": "dance", "draining": false}}', "\xff"]
)
def test_invalid_file_contains_no_intents(tmp_path: Path, text: str) -> None:
    (tmp_path / "intents.json").write_text(text, encoding="latin-1")
    assert Intents(tmp_path).of("replica1") == DesiredState()


def test_unreadable_file_is_a_problem_until_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "intents.json").write_text("{")
    intents = Intents(tmp_path)
    assert intents.save().startswith(f"{tmp_path}/intents.json: cannot be read (")
    assert intents.save().isprintable()
    assert (tmp_path / "intents.json").read_text() == "{"
    # Also an intent that is the same as before shows that the operator knows.
    assert intents.set("replica1", DesiredState()) == ""
    assert intents.save() == ""
    assert Intents(tmp_path).save() == ""


def test_intent_that_cannot_be_written_takes_effect_and_is_written_later(tmp_path: Path) -> None:
    intents = Intents(tmp_path)
    assert intents.set("replica1", DesiredState(Intent.HELD)) == ""
    (tmp_path / ".intents.json.new").mkdir()
    problem = intents.set("replica1", DesiredState(draining=True))
    assert problem.startswith(f"cannot write {tmp_path}/intents.json: ")
    assert intents.save() == problem
    # Setting the same intent again does not hide the problem.
    assert intents.set("replica1", DesiredState(draining=True)) == problem
    assert intents.of("replica1") == DesiredState(draining=True)
    assert Intents(tmp_path).of("replica1") == DesiredState(Intent.HELD)
    (tmp_path / ".intents.json.new").rmdir()
    assert intents.save() == ""
    assert Intents(tmp_path).of("replica1") == DesiredState(draining=True)


def test_a_removed_file_is_written_again(tmp_path: Path) -> None:
    intents = Intents(tmp_path)
    intents.set("replica1", DesiredState(Intent.HELD))
    (tmp_path / "intents.json").unlink()
    assert intents.save() == ""
    assert Intents(tmp_path).of("replica1") == DesiredState(Intent.HELD)


def test_removed_programs_have_no_intents(tmp_path: Path) -> None:
    intents = Intents(tmp_path)
    intents.set("replica1", DesiredState(Intent.STOPPED))
    intents.set("replica2", DesiredState(draining=True))
    intents.keep_only({"router", "replica1"})
    assert Intents(tmp_path).of("replica2") == DesiredState()
    assert Intents(tmp_path).of("replica1") == DesiredState(Intent.STOPPED)


def test_status_shows_that_the_file_could_not_be_read(lent: Running) -> None:
    def problems() -> list[str]:
        return lent.status()["daemon"]["problems"]

    lent.stop(signal.SIGKILL)
    (lent.prefix / "state" / "intents.json").write_text("[]")
    lent.start()
    wait_until(lent.ready, "everything adopted")
    wait_until(problems, "the problem is reported")
    assert problems()[0].startswith(f"{lent.prefix}/state/intents.json: cannot be read (")
    lent.do("undrain", "1")
    wait_until(lambda: not problems(), "the file is replaced")


# ---- drain


def test_drain_survives_restarts_of_replica_router_and_daemon(lent: Running) -> None:
    before = lent.pids()
    lent.set_in_flight(1, 1)
    lent.do("drain", "1", wait=False)
    wait_until(lambda: lent.drained() == {1}, "replica 1 is drained")
    assert lent.programs()["replica1"]["draining"]
    assert lent.programs()["replica1"]["state"] == "READY"

    lent.stop(signal.SIGKILL)
    lent.start()
    wait_until(lent.ready, "everything adopted")
    assert lent.drained() == {1}

    # Restart the router without its registry file, so that it has forgotten the drain.
    (lent.prefix / "state" / "replicas.json").unlink()
    os.kill(before["router"], signal.SIGKILL)
    lent.wait_ready_again("router", before["router"])
    wait_until(lambda: lent.drained() == {1}, "the message has arrived")

    lent.set_in_flight(1, 0)
    lent.do("restart", "1")
    assert lent.pids()["replica1"] != before["replica1"]
    assert lent.drained() == {1}
    lent.do("undrain", "1")
    wait_until(lambda: not lent.drained(), "replica 1 takes requests again")
    assert not lent.programs()["replica1"]["draining"]


def test_other_commands_work_while_a_drain_is_awaited(lent: Running) -> None:
    lent.set_in_flight(0, 2)
    lent.do("drain", "0", wait=False)
    wait_until(lambda: lent.drained() == {0}, "replica 0 is drained")
    lent.do("restart", "1")
    lent.set_in_flight(0, 0)
    told = lent.tell("drain", name="all")
    assert (told[0], told[-1]) == ({"line": "no replica takes requests now"}, {"code": protocol.OK})
    assert lent.drained() == {0, 1}


def test_only_replicas_can_be_drained(lent: Running) -> None:
    done = lent.fdctl("drain", "router")
    assert (done.returncode, done.stderr) == (
        protocol.FAILED,
        "fdctl: ERROR (router: only replicas can be drained)\n",
    )


# ---- hold


def test_a_held_replica_is_not_started_again_until_it_is_released(lent: Running) -> None:
    before = lent.pids()
    lent.do("hold", "1")
    assert lent.programs()["replica1"]["intent"] == "held"
    os.kill(before["replica1"], signal.SIGKILL)
    wait_until(lambda: lent.programs()["replica1"]["state"] == "STOPPED", "its end is seen")
    assert "held by the operator, so not started again" in lent.programs()["replica1"]["note"]

    lent.stop(signal.SIGKILL)
    lent.start()
    wait_until(lambda: lent.programs().get("replica0", {}).get("state") == "READY", "replica 0 adopted")
    assert lent.programs()["replica1"]["state"] == "STOPPED"
    assert lent.programs()["replica1"]["intent"] == "held"
    lent.do("restart", "all")
    assert lent.programs()["replica1"]["pid"] is None

    lent.do("release", "1")
    lent.wait_ready_again("replica1", before["replica1"])
    assert lent.programs()["replica1"]["intent"] == "run"


def test_a_reload_leaves_a_held_replica_as_it_is_until_it_is_released(lent: Running) -> None:
    before = lent.pids()
    lent.do("hold", "0")
    lent.write(env={"SOME_THING": "1"})
    done = lent.fdctl("reload")
    assert done.returncode == protocol.OK
    assert "postponed until it is released: replace replica 0 (environment SOME_THING: added)" in done.stdout
    after = lent.pids()
    assert after["replica0"] == before["replica0"]
    assert after["replica1"] != before["replica1"]
    lent.do("release", "0")
    lent.wait_ready_again("replica0", before["replica0"])
    wait_until(lambda: lent.status()["daemon"]["state"] == "READY", "done")
    assert lent.pids()["replica1"] == after["replica1"]
    assert lent.fdctl("reload", "--dry-run").stdout == "no program changes\n"


def test_a_reload_that_needs_a_port_of_a_held_replica_is_refused(lent: Running) -> None:
    before = lent.pids()
    lent.do("hold", "1")
    lent.ports[1], lent.ports[2] = lent.ports[2], lent.ports[1]
    lent.write()
    done = lent.fdctl("reload")
    assert done.returncode == protocol.BAD_CONFIG
    assert "replica 0 needs a port of replica 1, which is held; fdctl release replica1" in done.stderr
    assert lent.pids() == before


def test_stopped_replica_cannot_be_held(lent: Running) -> None:
    lent.do("stop", "1")
    done = lent.fdctl("hold", "1")
    assert done.returncode == protocol.FAILED
    assert "replica 1: it is stopped" in done.stderr
    assert not alive(lent.programs()["replica1"]["pid"] or 0)


def test_a_held_replica_is_not_killed_for_being_silent(tmp_path: Path) -> None:
    world = World(tmp_path, 1, unhealthy_after=30, unhealthy_kill_after=60)
    world.become_ready("router", "replica0")
    replica = world.fleet.replicas["replica0"]
    world.fleet.set_desired(replica, DesiredState(Intent.HELD))
    world.probes.good.discard("replica0")
    world.pass_time(1000.0)
    assert world.names(ProgramState.UNHEALTHY) == {"replica0"}
    world.fleet.set_desired(replica, DesiredState(Intent.RUN))
    world.pass_time(1.0)
    assert replica.state is ProgramState.STOPPING
