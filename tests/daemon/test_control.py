"""fdctl against a running daemon: operations, reload, and refusals."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading

from fastdeploy.daemon.control import protocol

from .conftest import Running, wait_until


def test_status_is_a_table_for_people_and_a_schema_for_programs(running: Running) -> None:
    running.start_and_wait()
    table = running.fdctl("status").stdout
    assert "2/2 replicas READY" in table
    status = running.status()
    assert set(status) == {"daemon", "router", "replicas"}
    assert status["daemon"]["state"] == "READY"
    assert status["daemon"]["ready"] == 2
    expected = {
        *("name", "state", "pid", "uptime", "restarts", "host", "port", "in_flight", "progress", "intent"),
        *("draining", "drain_confirmed", "last_exit", "cause", "metrics_port", "note"),
    }
    assert set(status["router"]) == expected
    assert set(status["replicas"][1]) == {"replica", *expected}


def test_stopped_replica_stays_down_across_daemon_restart_until_start(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    assert running.fdctl("stop", "1").returncode == protocol.OK
    assert running.programs()["replica1"]["state"] == "STOPPED"
    running.stop(signal.SIGKILL)
    running.start()
    wait_until(lambda: running.programs().get("replica0", {}).get("state") == "READY", "replica 0 adopted")
    assert running.programs()["replica1"]["state"] == "STOPPED"
    assert running.programs()["replica1"]["intent"] == "stopped"
    assert running.programs()["replica1"]["note"] == "stopped by the operator"
    assert running.fdctl("start", "1").returncode == protocol.OK
    assert running.ready()
    assert running.pids()["replica0"] == before["replica0"]


def test_restart_gives_one_replica_a_new_process(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    done = running.fdctl("restart", "replica0")
    assert (done.returncode, done.stderr) == (protocol.OK, "")
    after = running.pids()
    assert after["replica0"] != before["replica0"]
    assert {**after, "replica0": before["replica0"]} == before


def test_restart_all_is_rolling_and_leaves_the_router(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    done = running.fdctl("restart", "all")
    assert done.stdout.splitlines() == ["restart replica 0", "restart replica 1"]
    after = running.pids()
    assert after["router"] == before["router"]
    assert not {after["replica0"], after["replica1"]} & set(before.values())


def test_no_wait_returns_before_the_operation_ends(running: Running) -> None:
    running.start_and_wait()
    assert running.fdctl("stop", "1", "--no-wait").returncode == protocol.OK
    wait_until(lambda: running.programs()["replica1"]["state"] == "STOPPED", "replica 1 stopped")


def test_render_shows_what_the_running_daemon_runs(running: Running) -> None:
    running.start_and_wait()
    done = running.fdctl("render")
    assert done.returncode == protocol.OK
    assert "[program:replica1]" in done.stdout


def test_an_unknown_replica_is_a_usage_error_that_names_the_known(running: Running) -> None:
    running.start_and_wait()
    done = running.fdctl("restart", "7")
    assert done.returncode == protocol.USAGE
    assert done.stderr == "7: ERROR (no such replica; there are router, 0, 1, all)\n"


def test_reload_applies_a_change_to_the_programs_that_it_changes(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    running.write(extra_args=("--load-seconds", "0.2"))
    dry = running.fdctl("reload", "--dry-run")
    lines = dry.stdout.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["replace replica 0", "replace replica 1"]
    assert all("--load-seconds 0.2: added" in line for line in lines)
    # Ranks with different arguments might disagree.
    assert all("--expert-parallel-group: dp-" in line for line in lines)
    assert running.pids() == before
    assert running.fdctl("reload").returncode == protocol.OK
    assert running.ready()
    after = running.pids()
    assert after["router"] == before["router"]
    assert not {after["replica0"], after["replica1"]} & set(before.values())
    assert running.fdctl("reload").stdout == "no program changes\n"


def test_reload_replaces_one_replica_at_a_time(running: Running) -> None:
    running.start_and_wait()
    running.write(extra_args=("--load-seconds", "0.5"))
    down: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            states = [entry["state"] for entry in running.programs().values()]
            down.append(sum(state != "READY" for state in states))

    watcher = threading.Thread(target=look)
    watcher.start()
    assert running.fdctl("reload").returncode == protocol.OK
    over.set()
    watcher.join()
    assert max(down) == 1


def test_invalid_file_is_refused_and_all_programs_keep_running(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    running.config.write_text(running.config.read_text().replace("extra_args", "extra_arg"))
    done = running.fdctl("reload")
    assert done.returncode == protocol.BAD_CONFIG
    assert "engine.extra_arg: unknown key; did you mean 'extra_args'?" in done.stderr
    assert running.pids() == before


def test_a_configuration_with_which_a_replica_fails_is_rolled_back(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    running.write(extra_args=("--die-while-loading",))
    done = running.fdctl("reload")
    assert done.returncode == protocol.FAILED
    assert "exit status 3" in done.stderr
    assert "its last error: fake: ERROR (cannot load: no such checkpoint)" in done.stderr
    assert "the old configuration is restored" in done.stderr
    after = running.pids()
    assert running.ready()
    assert after["replica1"] == before["replica1"]
    # The old configuration stays in force: a replica that dies now restarts with it.
    os.kill(after["replica0"], signal.SIGKILL)
    running.wait_ready_again("replica0", after["replica0"])


def test_reload_adds_and_removes_replicas(running: Running) -> None:
    running.start_and_wait()
    running.write(replicas=3)
    assert running.fdctl("reload").returncode == protocol.OK
    assert sorted(running.pids()) == ["replica0", "replica1", "replica2", "router"]
    assert running.ready()
    running.write(replicas=1)
    done = running.fdctl("reload")
    steps = [line.split(" (")[0] for line in done.stdout.splitlines()]
    assert steps[:3] == ["replace replica 0", "remove replica 2", "remove replica 1"]
    assert sorted(running.pids()) == ["replica0", "router"]
    assert {process.program for process in running.left_over()} == {"replica0", "router"}


def test_reload_swaps_two_replicas_ports(running: Running) -> None:
    running.start_and_wait()
    running.ports[1], running.ports[2] = running.ports[2], running.ports[1]
    running.write()
    assert running.fdctl("reload").returncode == protocol.OK
    assert running.programs()["replica0"]["port"] == running.ports[1]
    assert running.ready()


def test_a_second_operation_is_refused_while_one_is_under_way(running: Running) -> None:
    running.start_and_wait()
    running.write(extra_args=("--load-seconds", "1"))
    assert running.fdctl("reload", "--no-wait").returncode == protocol.OK
    refused = running.fdctl("restart", "1")
    assert refused.returncode == protocol.BUSY
    wait_until(lambda: running.status()["daemon"]["state"] == "READY", "reload done")


def test_reload_applies_a_changed_stop_timeout(running: Running) -> None:
    running.start_and_wait()
    running.write(stop_timeout=20)
    dry = running.fdctl("reload", "--dry-run")
    assert dry.stdout.splitlines() == [
        f"replace {label} (stop_timeout: 30 -> 20)" for label in ("router", "replica 0", "replica 1")
    ]
    before = running.pids()
    assert running.fdctl("reload").returncode == protocol.OK
    assert not {*running.pids().values()} & {*before.values()}
    ini = (running.prefix / "run" / "supervisord.conf").read_text()
    assert ini.count("stopwaitsecs=20") == ini.count("stopwaitsecs=") == 3


def test_a_disk_that_cannot_be_written_fails_a_reload_and_nothing_else(running: Running) -> None:
    running.start_and_wait()
    before = running.pids()
    assert running.daemon is not None
    # A directory blocks the name of the draft.
    in_the_way = running.prefix / "state" / ".intents.json.new"
    in_the_way.mkdir(parents=True)
    done = running.fdctl("hold", "1")
    assert (done.returncode, done.stderr) == (protocol.OK, "")
    assert "intents.json: Is a directory; its content is kept in memory" in done.stdout
    assert (running.pids(), running.programs()["replica1"]["intent"]) == (before, "held")
    in_the_way.rmdir()
    running.do("release", "1")

    in_the_way = running.prefix / "run" / ".supervisord.conf.new"
    in_the_way.mkdir()
    running.write(extra_args=("--load-seconds", "0.1"))
    done = running.fdctl("reload")
    assert done.returncode == protocol.FAILED
    assert str(in_the_way) in done.stderr
    running.wait_ready_again("replica0", before["replica0"])
    assert running.pids()["replica1"] == before["replica1"]
    in_the_way.rmdir()
    assert running.fdctl("reload").returncode == protocol.OK
    assert running.ready()


def test_reload_completes_although_supervisord_is_killed_midway(
    running: Running,
) -> None:
    running.start_and_wait()
    before, supervisord = running.pids(), running.status()["daemon"]["supervisord"]
    running.write(extra_args=("--load-seconds", "1"))
    assert running.fdctl("reload").returncode == protocol.OK
    os.kill(supervisord, signal.SIGKILL)
    for name, pid in before.items():
        running.wait_ready_again(name, pid)
    wait_until(lambda: running.status()["daemon"]["state"] == "READY", "reload done")
    assert running.fdctl("reload", "--dry-run").stdout == "no program changes\n"


def test_logs_and_why_show_what_a_replica_printed(running: Running) -> None:
    running.start_and_wait()
    assert f"fake replica on port {running.ports[1]}" in running.fdctl("logs", "0").stdout
    os.kill(running.pids()["replica0"], signal.SIGKILL)
    wait_until(lambda: running.programs()["replica0"]["last_exit"], "exit noticed")
    told = running.fdctl("why", "0").stdout
    assert "last exit: terminated by SIGKILL" in told


def test_invalid_messages_on_the_socket_get_an_error_answer(running: Running) -> None:
    running.start_and_wait()
    path = str(protocol.socket_path(running.prefix / "run"))
    for nonsense in (
        b"\n",
        b"[]\n",
        b'{"do": "dance"}\n',
        b'{"do": []}\n',
        b"[" * 60_000 + b"\n",
        b"\xff\xfe\n",
        b"x" * 200_000,
    ):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.settimeout(20)
            try:
                client.sendall(nonsense)
                answer = json.loads(client.makefile("rb").readline())
            except (BrokenPipeError, ConnectionResetError):
                continue
        assert answer["code"] == protocol.USAGE
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(path)
        assert running.ready()


def test_the_sockets_and_launch_files_are_closed_to_others(running: Running) -> None:
    running.start_and_wait()
    run = running.prefix / "run"
    assert run.stat().st_mode & 0o777 == 0o700
    for name, mode in (("fd-dp.sock", 0o660), ("supervisor.sock", 0o600)):
        assert (run / name).stat().st_mode & 0o777 == mode
    for file in (run / "launch").glob("*.json"):
        assert file.stat().st_mode & 0o777 == 0o600


def test_the_daemon_stops_in_the_middle_of_a_reload(running: Running) -> None:
    running.start_and_wait()
    running.write(extra_args=("--load-seconds", "60"))
    assert running.fdctl("reload", "--no-wait").returncode == protocol.OK
    running.stop()
    assert running.left_over() == []
