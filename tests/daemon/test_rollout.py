"""The execution of a reload: one replica at a time, the first as a canary, all or nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.supervision.router_client import Flags, flags

from .conftest import FDCTL, Running, wait_until
from .test_drain import nobody_is_drained, stages

SLOWER = ("--load-seconds", "0.2")


@contextmanager
def watched(running: Running) -> Iterator[list[int]]:
    """Sample continuously the number of replicas that are READY and take requests."""
    seen: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            # A replica is in service before the next is drained, so a replica counts if the router uses it
            # before or after its state is read.
            before = running.rows().keys() - running.drained()
            ready = {entry["replica"] for entry in running.status()["replicas"] if entry["state"] == "READY"}
            seen.append(len(ready & (before | (running.rows().keys() - running.drained()))))
            time.sleep(0.02)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def router_flags(running: Running) -> Flags:
    return flags(running.prefix / "run" / "router.sock")


def words_in_flags_file(running: Running) -> list[str]:
    words: list[str] = json.loads((running.prefix / "run" / "router-flags.json").read_text())
    return words


# ---- replicas


def test_reload_reports_its_plan_and_stages(lent: Running) -> None:
    lent.write(env={"SOME_THING": "1"}, router_args=("--queue-size", "7"))
    told = lent.tell("reload")
    assert told[-1] == {"code": protocol.OK}
    plan = next(message["event"] for message in told if message.get("event", {}).get("kind") == "plan")
    assert plan["steps"] == [
        {
            "program": "router",
            "label": "router",
            "verb": "reload",
            "why": ["--queue-size 7: added"],
        },
        *(
            {
                "program": f"replica{number}",
                "label": f"replica {number}",
                "verb": "replace",
                "why": ["environment SOME_THING: added"],
            }
            for number in (0, 1)
        ),
    ]
    assert list(dict.fromkeys(stages(told))) == [
        *(("router", stage) for stage in ("reload", "ready")),
        *((f"replica{n}", stage) for n in (0, 1) for stage in ("drain", "stop", "start", "ready")),
    ]
    nobody_is_drained(lent)


def test_a_change_of_their_number_keeps_as_many_in_service_as_can_be(running: Running) -> None:
    running.write(replicas=2)
    running.start_and_wait()
    running.write(replicas=4)
    with watched(running) as in_service:
        done = running.fdctl("reload")
    assert done.returncode == protocol.OK
    steps = [line.partition(" (")[0] for line in done.stdout.splitlines()][:4]
    assert steps == ["add replica 2", "add replica 3", "replace replica 0", "replace replica 1"]
    assert min(in_service) >= 2
    running.write(replicas=2)
    with watched(running) as in_service:
        done = running.fdctl("reload")
    steps = [line.partition(" (")[0] for line in done.stdout.splitlines()][:4]
    assert steps == ["replace replica 0", "replace replica 1", "remove replica 3", "remove replica 2"]
    assert min(in_service) >= 2
    assert sorted(running.pids()) == ["replica0", "replica1", "router"]
    nobody_is_drained(running)


def test_canary_failure_rolls_back_and_leaves_other_replicas_untouched(lent: Running) -> None:
    before = lent.pids()
    lent.write(extra_args=("--die-while-loading",), router_args=("--queue-size", "7"))
    told = lent.tell("reload")
    assert told[-1]["code"] == protocol.FAILED
    assert told[-1]["error"].startswith("replica 0, the canary: pid ")
    assert told[-1]["error"].endswith("; the old configuration is restored")
    assert [stage for stage in stages(told) if stage[1] in ("failed", "rollback")] == [
        *(("replica0", "failed"), ("replica0", "rollback"), ("router", "rollback")),
    ]
    assert lent.ready()
    assert {**lent.pids(), "replica0": 0} == {**before, "replica0": 0}
    # The router has its old flags as well, and no replica is left drained.
    assert "--queue-size" not in words_in_flags_file(lent)
    nobody_is_drained(lent)


def test_a_later_failure_gives_all_their_old_configuration_back(lent: Running) -> None:
    ports = {entry["name"]: entry["port"] for entry in lent.status()["replicas"]}
    lent.ports[1], lent.ports[2] = lent.ports[5], lent.ports[6]
    lent.write()
    with socket.create_server(("127.0.0.1", lent.ports[2])):
        done = lent.fdctl("reload")
    assert done.returncode == protocol.FAILED
    assert f"ERROR (replica 1: dp.toml: port {lent.ports[2]}" in done.stderr
    assert {entry["name"]: entry["port"] for entry in lent.status()["replicas"]} == ports
    assert lent.ready()
    wait_until(lambda: lent.drained() == set(), "no replica is drained")


def test_reload_interrupted_by_a_kill_is_finished_by_the_next_daemon(lent: Running) -> None:
    before = lent.pids()
    lent.write(extra_args=("--load-seconds", "1"))
    lent.do("reload", wait=False)
    wait_until(lambda: lent.programs()["replica0"]["state"] == "STARTING", "the reload is under way")
    lent.stop(signal.SIGKILL)
    lent.start()
    for name in ("replica0", "replica1"):
        lent.wait_ready_again(name, before[name])
    wait_until(lambda: lent.status()["daemon"]["state"] == "READY", "done")
    assert lent.pids()["router"] == before["router"]
    assert lent.fdctl("reload", "--dry-run").stdout == "no program changes\n"
    nobody_is_drained(lent)


def test_reload_continues_after_its_client_detaches(lent: Running) -> None:
    before = lent.pids()
    lent.write(extra_args=SLOWER)
    lent.set_in_flight(0, 1)
    with subprocess.Popen(
        [str(FDCTL), "--prefix", str(lent.prefix), "reload"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as waiting:
        wait_until(lambda: lent.drained() == {0}, "the reload is under way")
        # A second client learns which operation is in progress.
        refused = lent.fdctl("reload")
        assert refused.returncode == protocol.BUSY
        assert "(reload, 1 of 2: replica 0, drain)" in refused.stderr
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(20) == 130
    lent.set_in_flight(0, 0)
    lent.wait_ready_again("replica1", before["replica1"])
    wait_until(lambda: lent.status()["daemon"]["state"] == "READY", "done")
    assert lent.fdctl("reload", "--dry-run").stdout == "no program changes\n"


# ---- the router


def test_router_takes_new_flags_live_and_next_daemon_sees_no_change(lent: Running) -> None:
    before, old = lent.pids(), router_flags(lent)
    lent.write(router_args=("--queue-size", "7"))
    done = lent.fdctl("reload")
    assert (done.returncode, done.stdout.splitlines()[0]) == (
        protocol.OK,
        "reload router (--queue-size 7: added)",
    )
    new = router_flags(lent)
    assert (new.number, new.hash != old.hash) == (old.number + 1, True)
    assert words_in_flags_file(lent)[-2:] == ["--queue-size", "7"]
    assert lent.pids() == before
    lent.stop(signal.SIGKILL)
    lent.start()
    wait_until(lent.ready, "everything adopted")
    assert lent.fdctl("reload", "--dry-run").stdout == "no program changes\n"
    assert lent.pids() == before
    assert router_flags(lent) == new
    # A router that dies restarts with the new flags.
    os.kill(before["router"], signal.SIGKILL)
    lent.wait_ready_again("router", before["router"])
    assert router_flags(lent).hash == new.hash


def test_reload_makes_the_router_reread_a_changed_keys_file(lent: Running) -> None:
    keys = lent.prefix / "keys"
    keys.write_text("sesame\n")
    lent.config.write_text(lent.config.read_text().replace("[router]", '[router]\napi_keys_file = "keys"'))
    lent.do("reload")
    before, pids = router_flags(lent).number, lent.pids()
    keys.write_text("tahini\n")
    assert lent.fdctl("reload").stdout == "no program changes\n"
    wait_until(lambda: router_flags(lent).number == before + 1, "the router is told")
    assert lent.pids() == pids


def test_flags_that_the_router_refuses_are_taken_back(lent: Running) -> None:
    before, old = lent.pids(), router_flags(lent)
    lent.write(router_args=("--queue-size", "-1"))
    done = lent.fdctl("reload")
    assert done.returncode == protocol.FAILED
    assert "router: rejected its new flags; " in done.stderr
    assert "router.log says why; the old configuration is restored" in done.stderr
    assert lent.pids() == before
    wait_until(lambda: router_flags(lent).outcome == "done", "the old ones are read again")
    assert router_flags(lent).hash == old.hash


def test_next_daemon_signals_a_router_that_missed_its_new_flags(lent: Running) -> None:
    """The daemon was killed after it had written the flags file and before it signalled the router."""
    before, old = lent.pids(), router_flags(lent)
    lent.stop(signal.SIGKILL)
    lent.write(router_args=("--queue-size", "7"))
    assert lent.fdctl("render", "--write", str(lent.config)).returncode == protocol.OK
    lent.start()
    wait_until(lambda: router_flags(lent).number == old.number + 1, "the router is told")
    wait_until(lent.ready, "everything adopted")
    assert router_flags(lent).hash != old.hash
    assert lent.pids() == before


def test_new_port_restarts_the_router(lent: Running) -> None:
    before = lent.pids()
    lent.ports[0] = lent.ports[7]
    lent.write()
    lent.do("reload")
    assert lent.programs()["router"]["port"] == lent.ports[7]
    assert not {*lent.pids().values()} & {*before.values()}
    nobody_is_drained(lent)
