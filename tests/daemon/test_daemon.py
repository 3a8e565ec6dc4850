"""fd-dp with a real supervisord and fake replicas: dead processes are restarted, live ones are left alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeploy.daemon.control import protocol

from .conftest import Running, alive, wait_until


def test_everything_becomes_ready_and_a_signal_leaves_no_process(running: Running) -> None:
    running.start_and_wait()
    status = running.status()
    assert [entry["replica"] for entry in status["replicas"]] == [0, 1]
    supervisord = status["daemon"]["supervisord"]
    # The daemon prints the command once the router knows all replicas.
    wait_until(lambda: running.status()["daemon"]["state"] == "READY", "the daemon READY")
    output = running.stop(signal.SIGINT)
    assert running.daemon is not None
    assert running.daemon.returncode == 0
    assert running.left_over() == []
    assert not alive(supervisord)
    assert f"curl http://127.0.0.1:{running.ports[0]}/v1/chat/completions" in output


def test_printed_command_works_when_copied(tmp_path: Path) -> None:
    running = Running(tmp_path / "$1 & b")
    running.prefix.mkdir()
    running.write()
    try:
        running.start_and_wait()
        assert running.daemon is not None
        assert running.daemon.stdout is not None
        printed = iter(running.daemon.stdout.readline, "Ctrl-C stops everything.\n")
        lines = [line.strip() for line in printed]
        [curl] = [line for line in lines if line.startswith("curl ")]
        [status] = [line for line in lines if line.endswith(" status")]
        shown = subprocess.run(["/bin/sh", "-c", status], capture_output=True, text=True, timeout=60)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "2/2 replicas READY" in shown.stdout
        assert json.loads(shlex.split(curl)[-1])["messages"]
    finally:
        running.stop()


def test_the_router_starts_before_the_replicas(running: Running) -> None:
    running.start_and_wait()
    log = running.log()
    assert log.index("router: READY") < log.index("replica 0: started")


def test_killed_replica_restarts_alone_and_the_log_says_how_it_ended(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    os.kill(before["replica1"], signal.SIGKILL)
    entry = running.wait_ready_again("replica1", before["replica1"])
    assert entry["restarts"] == 1
    assert entry["last_exit"] == "terminated by SIGKILL"
    assert {**running.pids(), "replica1": before["replica1"]} == before
    line = next(line for line in running.log().splitlines() if "replica 1: ERROR" in line)
    assert f"pid {before['replica1']}: terminated by SIGKILL" in line
    assert "its last error" not in line


def test_leftover_processes_of_a_replica_are_killed_before_its_restart(
    running: Running,
) -> None:
    running.write(extra_args=("--grandchild",))
    running.start_and_wait()
    before = running.pids()
    family = {process.pid for process in running.left_over() if process.program == "replica0"}
    assert len(family) == 2
    os.kill(before["replica0"], signal.SIGKILL)
    running.wait_ready_again("replica0", before["replica0"])
    assert not any(alive(pid) for pid in family)


def test_after_supervisord_is_killed_no_orphan_lives_and_all_come_back(running: Running) -> None:
    running.write(extra_args=("--grandchild",))
    running.start_and_wait()
    before = running.pids()
    orphans = [process.pid for process in running.left_over()]
    os.kill(running.status()["daemon"]["supervisord"], signal.SIGKILL)
    for name, pid in before.items():
        running.wait_ready_again(name, pid)
    assert not any(alive(pid) for pid in orphans)


def test_supervisord_stopped_by_sigterm_is_replaced_and_all_return(running: Running) -> None:
    running.write(extra_args=("--grandchild",))
    running.start_and_wait()
    before = running.pids()
    orphans = [process.pid for process in running.left_over()]
    os.kill(running.status()["daemon"]["supervisord"], signal.SIGTERM)
    for name, pid in before.items():
        running.wait_ready_again(name, pid)
    assert not any(alive(pid) for pid in orphans)


def test_supervisord_may_be_killed_again_and_again(running: Running) -> None:
    running.start_and_wait()
    before, pids = running.pids(), _supervisords(running)
    for count in range(1, 6):
        os.kill(pids[-1], signal.SIGKILL)
        wait_until(lambda: len(_supervisords(running)) > count, "another supervisord")  # noqa: B023
        pids = _supervisords(running)
        if count % 2:
            # Let every other supervisord answer before it is killed.
            wait_until(lambda: running.status()["daemon"]["supervisord"] == pids[-1], "its first answer")  # noqa: B023
    for name, pid in before.items():
        running.wait_ready_again(name, pid)
    assert len(running.left_over()) == len(before)


def test_supervisord_start_is_retried_after_a_disk_failure(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    assert running.daemon is not None
    in_the_way = running.prefix / "run" / ".supervisord.conf.new"
    in_the_way.mkdir()
    (running.prefix / "run" / "supervisord.conf").unlink()
    os.kill(running.status()["daemon"]["supervisord"], signal.SIGKILL)
    wait_until(lambda: f"{in_the_way}'; next try in" in running.log(), "failure noticed")
    in_the_way.rmdir()
    for name, pid in before.items():
        running.wait_ready_again(name, pid)


def test_the_end_of_the_terminal_stops_everything(running: Running) -> None:
    running.start_and_wait()
    running.stop(signal.SIGHUP)
    assert running.daemon is not None
    assert running.daemon.returncode == 0


def test_under_nohup_the_end_of_the_terminal_changes_nothing(running: Running) -> None:
    # The child inherits the ignored signal, as from nohup.
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        running.start()
    finally:
        signal.signal(signal.SIGHUP, old)
    wait_until(running.ready, "everything READY")
    before = running.pids()
    assert running.daemon is not None
    running.daemon.send_signal(signal.SIGHUP)
    assert running.ready()
    assert running.pids() == before


def test_an_open_stream_is_given_its_last_event_before_everything_ends(running: Running) -> None:
    running.start_and_wait()
    client = http.client.HTTPConnection("127.0.0.1", running.ports[1], timeout=20)
    client.request("POST", "/v1/completions", json.dumps({"stream": True}))
    with client.getresponse() as response:
        assert response.readline() == b"data: {}\n"
        running.stop()
        assert b'{"error": {"message": "the replica stops"}}' in response.read()
    client.close()
    assert "replica 0: stopped (exit status 0)" in running.log()


def test_the_health_check_shows_the_key_that_the_replicas_ask_for(running: Running) -> None:
    running.write(env={"FD_API_KEY": "sesame"})
    running.start_and_wait()


def test_next_daemon_carries_out_a_stop_recorded_before_a_kill(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    running.stop(signal.SIGKILL)
    (running.prefix / "state").mkdir(exist_ok=True)
    wishes = {"replica1": {"intent": "stopped", "draining": False}}
    (running.prefix / "state" / "intents.json").write_text(json.dumps(wishes))
    running.start()
    wait_until(lambda: running.programs().get("replica1", {}).get("state") == "STOPPED", "replica 1 stopped")
    assert running.programs()["replica1"]["intent"] == "stopped"
    assert not alive(before["replica1"])
    wait_until(lambda: running.programs()["replica0"]["state"] == "READY", "replica 0 READY")
    assert running.pids()["replica0"] == before["replica0"]


def test_replicas_outlive_a_killed_daemon_and_are_adopted_by_the_next(running: Running) -> None:
    running.start_and_wait()
    before = running.pids(), running.status()["daemon"]["supervisord"]
    running.stop(signal.SIGKILL)
    assert all(alive(pid) for pid in before[0].values())
    assert running.fdctl("status").returncode == protocol.NO_DAEMON
    running.start_and_wait()
    assert (running.pids(), running.status()["daemon"]["supervisord"]) == before
    assert {entry["restarts"] for entry in running.programs().values()} == {0}
    # An adopted replica was started under another daemon; this one restarts it nevertheless.
    os.kill(before[0]["replica0"], signal.SIGKILL)
    running.wait_ready_again("replica0", before[0]["replica0"])


def test_new_daemon_replaces_only_programs_whose_configuration_differs(
    running: Running,
) -> None:
    running.start_and_wait()
    before = running.pids()
    running.stop(signal.SIGKILL)
    running.write(extra_args=("--load-seconds", "0.1"))
    running.start()
    for name in ("replica0", "replica1"):
        running.wait_ready_again(name, before[name])
    assert running.pids()["router"] == before["router"]


def test_orphans_of_dead_daemon_and_supervisord_end_before_new_programs(running: Running) -> None:
    running.start_and_wait()
    before, supervisord = running.pids(), running.status()["daemon"]["supervisord"]
    running.stop(signal.SIGKILL)
    os.kill(supervisord, signal.SIGKILL)
    wait_until(lambda: not alive(supervisord), "supervisord dead")
    assert all(alive(pid) for pid in before.values())
    running.start_and_wait()
    assert not any(alive(pid) for pid in before.values())


def test_programs_that_ignore_sigterm_are_killed_within_the_promised_time(running: Running) -> None:
    running.write(extra_args=("--ignore-term", "--grandchild"))
    running.start_and_wait()
    running.stop()
    assert running.left_over() == []


def test_a_second_daemon_on_the_same_prefix_is_refused_in_one_line(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    first = running.daemon
    assert first is not None
    running.start()
    second, running.daemon = running.daemon, first
    assert second is not None
    output, _ = second.communicate(timeout=20)
    assert second.returncode == 1
    assert output.count("\n") == 1
    assert f"another fd-dp, pid {first.pid}, uses" in output
    assert running.pids() == before


def test_stale_sockets_do_not_prevent_a_start(running: Running) -> None:
    run = running.prefix / "run"
    run.mkdir()
    for name in ("supervisor.sock", "fd-dp.sock"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(run / name))
    running.start_and_wait()


def test_replica_names_holder_of_its_port_and_starts_once_it_is_free(running: Running) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", running.ports[2]))
        taken.listen()
        running.start()
        wait_until(
            lambda: running.programs().get("replica1", {}).get("state") == "BACKOFF", "replica 1 in BACKOFF"
        )
        note = running.programs()["replica1"]["note"]
        assert f"port {running.ports[2]}" in note
        assert f"pid {os.getpid()}" in note
    wait_until(running.ready, "everything READY")


def test_a_replica_that_cannot_load_is_quarantined_and_the_others_serve(running: Running) -> None:
    running.write(extra_args=("--die-while-loading",), budget=3)
    running.start()
    wait_until(
        lambda: {running.programs().get(f"replica{i}", {}).get("state") for i in (0, 1)} == {"QUARANTINED"},
        "both replicas QUARANTINED",
    )
    entry = json.loads(running.fdctl("why", "0", "--json").stdout)
    assert entry["last_exit"] == "exit status 3"
    assert entry["lines"][-1] == "fake: ERROR (cannot load: no such checkpoint)"
    assert 400 < entry["next_try_in"] <= 600
    assert running.programs()["router"]["state"] == "READY"


def test_a_replica_that_generates_no_token_is_not_ready(running: Running) -> None:
    running.write(extra_args=("--no-word",), startup_timeout=4)
    running.start()
    wait_until(lambda: "ERROR (not READY within 4 s" in _log(running), "replica given up")
    assert "token probe failed: the network returns NaN" in running.log()


def test_a_replica_that_stops_answering_is_killed_and_started_again(running: Running, tmp_path: Path) -> None:
    hang = tmp_path / "hang"
    running.write(extra_args=("--hang-file", str(hang)), unhealthy_after=1, unhealthy_kill_after=2)
    running.start_and_wait()
    before = running.pids()
    hang.touch()
    wait_until(lambda: not alive(before["replica0"]), "hanging replica 0 killed")
    hang.unlink()
    running.wait_ready_again("replica0", before["replica0"])
    assert "no successful health check for 2 s" in running.log()


def test_sd_notify_reports_status_ready_and_stopping_and_children_cannot(running: Running) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(running.prefix / "notify"))
        systemd.settimeout(20)
        running.start_and_wait()
        wait_until(lambda: running.status()["daemon"]["state"] == "READY", "the router knows all replicas")
        environ = Path(f"/proc/{running.pids()['replica0']}/environ").read_bytes()
        assert b"NOTIFY_SOCKET=" not in environ
        running.stop()
        messages: list[str] = []
        while not messages or messages[-1] != "STOPPING=1":
            messages.append(systemd.recv(4096).decode())
    # The unit's start timeout is extended while replicas load, as loading may take any time.
    assert messages.index("EXTEND_TIMEOUT_USEC=30000000") < messages.index("READY=1")
    assert "STATUS=2/2 ready" in messages


@pytest.mark.parametrize("words", [("--config", "/nowhere/dp.toml"), ("--prefix",), ("--frobnicate",)])
def test_a_wrong_command_line_ends_in_one_line_and_an_exit_code(words: tuple[str, ...]) -> None:
    command = [str(Path(sys.executable).with_name("fd-dp")), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode in (2, 78)
    assert "Traceback" not in ended.stderr


def _supervisords(running: Running) -> list[int]:
    """Return the pids of all supervisords that the daemon has started, the latest last."""
    return [int(pid) for pid in re.findall(r"started supervisord, pid (\d+)", running.log())]


def _log(running: Running) -> str:
    file = running.prefix / "logs" / "fd-dp.log"
    return file.read_text() if file.exists() else ""
