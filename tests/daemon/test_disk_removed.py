"""Files removed from the daemon's directories are created again, and no working program ends for it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal

from fastdeploy.daemon.control import protocol

from .conftest import Running, alive, wait_until


def test_a_replica_comes_back_without_its_log_directory(lent: Running) -> None:
    output = lent.prefix / "logs" / "replica0" / "output.log"
    shutil.rmtree(output.parent)
    lent.do("restart", "0")
    wait_until(lambda: "fake replica on port" in output.read_text(), "its output is written")


def test_a_replica_comes_back_without_any_logs(lent: Running) -> None:
    before = lent.pids()
    shutil.rmtree(lent.prefix / "logs")
    os.kill(before["replica1"], signal.SIGKILL)
    entry = lent.wait_ready_again("replica1", before["replica1"])
    assert (entry["last_exit"], entry["restarts"] > 0) == ("terminated by SIGKILL", True)
    wait_until((lent.prefix / "logs" / "supervisord.log").exists, "supervisord's log is made again")


def test_the_sockets_are_bound_again_and_no_program_ends(lent: Running) -> None:
    before, manager = lent.pids(), lent.supervisord()
    run = lent.prefix / "run"
    for name in ("supervisor.sock", "fd-dp.sock"):
        (run / name).unlink()
    wait_until(lambda: lent.pids() == before and lent.supervisord() == manager, "the daemon answers again")
    wait_until((run / "supervisor.sock").exists, "supervisord listens again")
    wait_until(lambda: not lent.status()["daemon"]["problems"], "nothing is missed any more")
    lent.do("restart", "0")
    assert {**lent.pids(), "replica0": before["replica0"]} == before
    assert lent.supervisord() == manager


def test_a_socket_that_was_replaced_by_a_file_is_bound_again(lent: Running) -> None:
    before = lent.pids()
    for name in ("supervisor.sock", "fd-dp.sock"):
        path = lent.prefix / "run" / name
        path.with_suffix(".new").touch()
        path.with_suffix(".new").rename(path)
    wait_until(lambda: lent.pids() == before, "the daemon answers again")
    wait_until(lambda: not lent.status()["daemon"]["problems"], "nothing is missed any more")
    lent.do("restart", "1")


def test_an_emptied_run_directory_is_filled_again(lent: Running) -> None:
    before, manager = lent.pids(), lent.supervisord()
    run = lent.prefix / "run"
    keep = {"router.sock"}  # the router's own
    for path in run.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.kill(before["replica0"], signal.SIGKILL)
    wait_until((run / "fd-dp.lock").exists, "the lock is made again")
    with (run / "fd-dp.lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        else:
            held = False
    assert held
    lent.wait_ready_again("replica0", before["replica0"])
    assert {**lent.pids(), "replica0": before["replica0"]} == before
    assert lent.supervisord() == manager
    assert (run / "supervisord.conf").exists()


def test_removed_state_directory_is_recreated_with_all_intents(lent: Running) -> None:
    file = lent.prefix / "state" / "intents.json"
    lent.tell("drain", name="1", wait=False)
    shutil.rmtree(file.parent)
    wait_until(file.exists, "the wishes are written again")
    assert json.loads(file.read_text()) == {"replica1": {"intent": "run", "draining": True}}
    shutil.rmtree(file.parent)
    lent.do("hold", "0")
    assert set(json.loads(file.read_text())) == {"replica0", "replica1"}
    wait_until(lambda: lent.drained() == {1}, "the router knows")
    assert lent.status()["daemon"]["problems"] == []


def test_a_supervisord_out_of_reach_is_reported_and_not_replaced(lent: Running) -> None:
    before, manager = lent.pids(), lent.supervisord()
    os.kill(manager, signal.SIGSTOP)
    try:
        (lent.prefix / "run" / "supervisor.sock").unlink()
        words = f"pid {manager} is alive and its programs keep running; since "
        wait_until(lambda: words in lent.fdctl("status").stdout, "status says so")
        assert words in lent.fdctl("why").stdout
    finally:
        os.kill(manager, signal.SIGCONT)
    wait_until(lambda: not lent.status()["daemon"]["problems"], "supervisord answers again")
    assert (lent.pids(), lent.supervisord()) == (before, manager)


def test_new_daemon_adopts_a_supervisord_without_its_socket(running: Running) -> None:
    running.start_and_wait()
    before, manager = running.pids(), running.supervisord()
    os.kill(manager, signal.SIGSTOP)
    running.stop(signal.SIGKILL)
    (running.prefix / "run" / "supervisor.sock").unlink()
    running.start()
    # By then the daemon has looked for the socket.
    wait_until(lambda: running.log().count("waiting for pid") == 1, "the daemon waits for supervisord")
    os.kill(manager, signal.SIGCONT)
    wait_until(running.ready, "everything READY")
    assert (running.pids(), running.supervisord()) == (before, manager)


def test_a_stop_without_the_socket_still_ends_everything(running: Running) -> None:
    running.start_and_wait()
    manager = running.supervisord()
    (running.prefix / "run" / "supervisor.sock").unlink()
    running.stop()
    assert not alive(manager)


def test_drain_that_does_not_reach_the_router_says_so(running: Running) -> None:
    running.start_and_wait()
    (running.prefix / "run" / "router.sock").unlink()
    done = running.fdctl("drain", "1", "--no-wait")
    assert done.returncode == protocol.OK
    path = protocol.socket_path(running.prefix / "run")
    told = next(protocol.request(path, {"do": "drain", "name": "1", "wait": True}, 20.0))
    assert "the router does not answer on " in told["line"]
    entry = running.programs()["replica1"]
    assert (entry["draining"], entry["drain_confirmed"]) == (True, False)
    words = f"the router does not answer on {running.prefix}/run/router.sock"
    wait_until(lambda: running.status()["daemon"]["problems"], "the problem is listed")
    shown = running.fdctl("status").stdout
    assert "READY to be drained" in shown
    assert words in shown
    assert "waits for: the router, which still sends it requests" in running.fdctl("why", "1").stdout


def test_fdctl_names_the_missing_directory_or_socket(lent: Running) -> None:
    assert lent.daemon is not None
    missing = lent.prefix / "nowhere"
    done = lent.fdctl("--prefix", str(missing), "status")
    assert done.stderr.startswith(
        f"fdctl: ERROR (no fd-dp listens on {missing}/run/fd-dp.sock: there is no directory "
    )
    os.kill(lent.daemon.pid, signal.SIGSTOP)
    try:
        (lent.prefix / "run" / "fd-dp.sock").unlink()
        done = lent.fdctl("status")
    finally:
        os.kill(lent.daemon.pid, signal.SIGCONT)
    assert f"run/fd-dp.sock, but fd-dp runs with pid {lent.daemon.pid}; " in done.stderr
    wait_until(lent.ready, "the daemon listens again")


def test_a_replica_without_its_files_waits_and_has_not_failed(lent: Running) -> None:
    assert lent.daemon is not None
    before, launch = lent.programs()["replica0"], lent.prefix / "run" / "launch"
    os.kill(lent.daemon.pid, signal.SIGSTOP)
    # A file blocks the name of the directory.
    shutil.rmtree(launch)
    launch.touch()
    os.kill(lent.daemon.pid, signal.SIGCONT)
    try:
        os.kill(before["pid"], signal.SIGKILL)
        wait_until(
            lambda: lent.programs()["replica0"]["note"].startswith("waits for its files: "), "it waits"
        )
        entry = lent.programs()["replica0"]
        assert (entry["state"], entry["restarts"]) == ("WAITING", before["restarts"] + 1)
        wait_until(lambda: lent.status()["daemon"]["problems"], "the problem is listed")
        problem = lent.status()["daemon"]["problems"][0]
        assert problem.startswith("cannot write the launch files of programs: ")
    finally:
        launch.unlink()
    lent.wait_ready_again("replica0", before["pid"])
