"""A disk that is full or read-only: no program ends, the problem is reported and heals."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator

import pytest

from fastdeploy.daemon.control import protocol

from .conftest import alive, wait_until
from .small_disks import SmallDisks, heals, small_disks


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisks]:
    with small_disks(tmp_path_factory.mktemp("disks")) as found:
        yield found


@pytest.mark.parametrize("disk", ["logs", "run", "state"])
def test_a_replica_comes_back_on_a_full_disk(system: SmallDisks, disk: str) -> None:
    before, manager = system.pids(), system.supervisord()
    with system.full(disk):
        wait_until(system.problems, "the full disk is reported")
        words = f"cannot write {system.real / disk}: No space left on device; since "
        assert system.problems()[0].startswith(words)
        if disk == "logs":
            for command in ("status", "why", "why 1"):
                assert words in system.fdctl(*command.split()).stdout
        os.kill(before["replica0"], signal.SIGKILL)
        entry = system.wait_ready_again("replica0", before["replica0"])
        assert entry["last_exit"] == "terminated by SIGKILL"
        assert {**system.pids(), "replica0": before["replica0"]} == before
        assert system.supervisord() == manager
    heals(system)


def test_supervisord_logs_again_when_there_is_room(system: SmallDisks) -> None:
    log = system.prefix / "logs" / "supervisord.log"
    with log.open("a") as stream:
        # Fill the log's last block.
        stream.write("x" * (4096 - log.stat().st_size % 4096))
    with system.full("logs"):
        system.do("restart", "0")
    system.do("restart", "0")
    assert re.search(
        r"WARNING supervisord \d+ bytes of output were lost since .*: No space left", log.read_text()
    )
    heals(system)


def test_a_drain_on_a_full_state_disk_holds_and_is_written_later(system: SmallDisks) -> None:
    file = system.prefix / "state" / "intents.json"
    with system.full("state"):
        done = system.fdctl("drain", "1", "--no-wait")
        assert (done.returncode, done.stderr) == (0, "")
        assert "No space left on device; its content is kept in memory" in done.stdout
        wait_until(lambda: system.drained() == {1}, "the router knows")
        assert not file.exists()
    wait_until(file.exists, "the file is written")
    wait_until(lambda: "replica1" in json.loads(file.read_text()), "the wish is written")
    system.do("undrain", "1")
    heals(system)


def test_a_dead_supervisord_is_replaced_on_full_disks(system: SmallDisks) -> None:
    before, manager = system.pids(), system.supervisord()
    with system.full("logs"), system.full("run"), system.full("state"):
        os.kill(manager, signal.SIGKILL)
        for name, pid in before.items():
            system.wait_ready_again(name, pid)
        assert not any(alive(pid) for pid in before.values())
    heals(system)


def test_a_replica_comes_back_on_a_read_only_disk_of_logs(system: SmallDisks) -> None:
    before, manager = system.pids(), system.supervisord()
    with system.read_only("logs"):
        words = f"cannot write {system.real}/logs: Read-only file system; since "
        wait_until(
            lambda: [line for line in system.problems() if line.startswith(words)], "the problem is reported"
        )
        os.kill(before["replica0"], signal.SIGKILL)
        system.wait_ready_again("replica0", before["replica0"])
        assert {**system.pids(), "replica0": before["replica0"]} == before
        assert system.supervisord() == manager
    heals(system)


def test_nothing_ends_while_the_run_directory_is_read_only(system: SmallDisks) -> None:
    before, manager = system.pids(), system.supervisord()
    with system.read_only("run"):
        wait_until(lambda: "supervisord does not answer" in system.log(), "supervisord is missed")
        wait_until(lambda: f"cannot listen on {system.real}" in system.log(), "its own socket is missed")
        assert all(alive(pid) for pid in [*before.values(), manager])
    wait_until(lambda: system.pids() == before, "everything is as before")
    assert system.supervisord() == manager
    heals(system)


def test_read_only_remount_affects_only_writes(system: SmallDisks) -> None:
    before, manager = system.pids(), system.supervisord()
    file = system.prefix / "state" / "intents.json"
    system.tell("drain", name="0", wait=False)
    with system.remounted_read_only("state", "run"):
        for disk in ("state", "run"):
            words = f"cannot write {system.real / disk}: Read-only file system; since "
            wait_until(lambda words=words: words in str(system.problems()), "the problem is reported")
        done = system.fdctl("drain", "1", "--no-wait")
        assert (done.returncode, done.stderr) == (0, "")
        assert "Read-only file system; its content is kept in memory" in done.stdout
        wait_until(lambda: system.drained() == {0, 1}, "the router knows")
        assert set(json.loads(file.read_text())) == {"replica0"}
        os.kill(before["replica0"], signal.SIGKILL)
        system.wait_ready_again("replica0", before["replica0"])
        system.write(extra_args=("--load-seconds", "0.1"))
        assert "Read-only file system" in system.tell("reload")[-1]["error"]
        wait_until(system.ready, "the replicas have their old configuration")
        assert system.supervisord() == manager
    wait_until(lambda: set(json.loads(file.read_text())) == {"replica0", "replica1"}, "the file is written")
    system.write()
    for replica in ("0", "1"):
        system.do("undrain", replica)
    heals(system)


def test_sockets_are_bound_as_soon_as_the_disk_has_room_for_them(system: SmallDisks) -> None:
    assert system.daemon is not None
    before, manager, run = system.pids(), system.supervisord(), system.prefix / "run"
    with system.without_inodes("run"):
        # Rename rather than remove: a removed socket would free its inode for another.
        (run / "supervisor.sock").rename(run / "old1.sock")
        (run / "fd-dp.sock").rename(run / "old2.sock")

        def problems() -> str:
            [answer] = protocol.request(run / "old2.sock", {"do": "status"}, 20.0)
            return str(answer["status"]["daemon"]["problems"])

        for words in (
            f"cannot listen on {system.real}/run/fd-dp.sock: No space left on device; since ",
            f"pid {manager} is alive and its programs keep running; since ",
        ):
            wait_until(lambda words=words: words in problems(), "the problem is reported")
        told = system.fdctl("status").stderr
        assert f"run/fd-dp.sock, but fd-dp runs with pid {system.daemon.pid}; " in told
        assert told.count("\n") == 1
    for name, old in (("supervisor.sock", "old1.sock"), ("fd-dp.sock", "old2.sock")):
        wait_until((run / name).exists, "the socket is bound")
        (run / old).unlink()
    heals(system)
    assert (system.pids(), system.supervisord()) == (before, manager)


def test_a_new_daemon_adopts_everything_on_full_disks(system: SmallDisks) -> None:
    before, manager = system.pids(), system.supervisord()
    with system.full("logs"), system.full("run"), system.full("state"):
        assert system.daemon is not None
        system.daemon.kill()
        system.daemon.wait()
        system.start_another(manager)
        wait_until(system.ready, "everything is adopted")
        assert (system.pids(), system.supervisord()) == (before, manager)
    heals(system)
