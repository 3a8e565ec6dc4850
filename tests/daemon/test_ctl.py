"""fdctl as docs/fdctl.md describes it: commands, exit codes and JSON; and a client that exits early."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.fdctl import main

from .conftest import FDCTL, Running, wait_until

GUIDE = (Path(__file__).parents[2] / "docs" / "fdctl.md").read_text()
TINY = Path(__file__).parent.parent / "fixtures" / "tiny"
#: The keys of a program, from the guide's table.
PROGRAM = re.search(r"^\| \(a program\) \| (.*) \|$", GUIDE, re.MULTILINE)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A daemon for all tests of this file; each test leaves it READY."""
    system = Running(tmp_path_factory.mktemp("standing"))
    system.write()
    (system.prefix / "good.toml").write_text(f'[model]\npath = "{TINY}"\n')
    system.start_and_wait()
    yield system
    system.stop()


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = main._parser()
    (action,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


def examples() -> list[str]:
    """Return the command lines in the guide."""
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [
        line.partition("#")[0].strip().removeprefix("fdctl ") for line in lines if line.startswith("fdctl ")
    ]


def words_in(row: str) -> set[str]:
    """Return the `names` in a row of the guide's table, except those within {}."""
    return set(re.findall(r"`(\w+)`", re.sub(r"\{.*?\}|\(.*?\)", "", row)))


# ---- the guide


def test_the_guide_names_every_command_and_no_other() -> None:
    assert {example.split()[0] for example in examples()} == {*commands()}


@pytest.mark.parametrize("example", examples())
def test_every_command_in_the_guide_works(example: str, standing: Running) -> None:
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example)]
    words = [str(standing.prefix / "good.toml") if word == "dp.toml" else word for word in words]
    done = standing.fdctl(*words)
    # The fake replicas are in no expert group, and their fake router relays nothing.
    expected = {"ep": protocol.NO_GROUP, "generate": protocol.FAILED}.get(words[0], protocol.OK)
    assert done.returncode == expected, done.stdout + done.stderr
    assert bool(done.stderr) == (expected != protocol.OK)


def test_guide_and_help_have_the_same_exit_codes() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", GUIDE, re.MULTILINE)
    told = re.findall(r"^  (\d+) +(.*)$", main._EPILOG, re.MULTILINE)
    assert rows == [(code, text.replace("the line", "one line")) for code, text in told]
    named = {
        protocol.OK,
        protocol.FAILED,
        protocol.USAGE,
        protocol.NO_DAEMON,
        protocol.BAD_CONFIG,
        protocol.BUSY,
    }
    named |= {protocol.NO_GROUP, protocol.DENIED, protocol.DETACHED}
    assert {int(code) for code, _ in rows} == named


# ---- JSON


def test_every_command_takes_json() -> None:
    assert [name for name, parser in commands().items() if "--json" not in parser.format_help()] == []


@pytest.mark.parametrize("command", ["status", "why 0", "why", "why router", "top", "check dp.toml"])
def test_json_fields_are_those_of_the_guide(command: str, standing: Running) -> None:
    assert PROGRAM
    done = standing.fdctl(*command.replace("dp.toml", str(standing.prefix / "good.toml")).split(), "--json")
    assert (done.returncode, done.stderr) == (protocol.OK, "")
    found = json.loads(done.stdout)
    row = next(
        line
        for line in GUIDE.splitlines()
        if line.startswith(f"| `{re.sub('[0-9]+|router', 'REPLICA', command).removesuffix(' dp.toml')}` ")
    )
    own = words_in(row.split(" | ", 1)[1])
    program = words_in(PROGRAM[1])
    if command == "status":
        assert set(found) == {"daemon", "router", "replicas"}
        assert set(found["replicas"][0]) == program
        assert set(found["router"]) == program - {"replica"}
    elif command.startswith("why "):
        left = set() if command == "why 0" else {"replica"}
        assert set(found) == (program | own) - left
    elif command == "why":
        assert [each["name"] for each in found["programs"]] == ["router", "replica0", "replica1"]
    else:
        assert set(found) == own


def test_lines_and_lists_as_json(standing: Running) -> None:
    lines = [json.loads(line) for line in standing.fdctl("logs", "0", "--json").stdout.splitlines()]
    assert {"line": f"fake replica on port {standing.ports[1]}"} in lines
    programs = json.loads(standing.fdctl("render", "--json").stdout)
    assert [program["name"] for program in programs] == ["router", "replica0", "replica1"]
    assert "--port" in programs[0]["flags"]
    script = json.loads(standing.fdctl("completion", "zsh", "--json").stdout)
    assert script["shell"] == "zsh"


def test_operation_progress_is_json_lines_with_the_result_last(standing: Running) -> None:
    done = standing.fdctl("restart", "1", "--json")
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert messages[-1] == {"code": protocol.OK}
    stages = [message["event"]["stage"] for message in messages if "event" in message]
    assert stages[-3:] == ["stop", "start", "ready"]
    plan = standing.fdctl("reload", "--dry-run", "--json").stdout.splitlines()
    assert json.loads(plan[-1]) == {"code": protocol.OK, "changes": 0}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("stop 7 --json", protocol.USAGE),
        ("why 7 --json", protocol.USAGE),
        ("ep --json", protocol.NO_GROUP),
        ("check /nowhere --json", protocol.BAD_CONFIG),
        ("generate x --json", protocol.FAILED),
        ("--prefix /nowhere status --json", protocol.NO_DAEMON),
    ],
)
def test_an_error_is_json_on_stdout_and_a_line_for_people_on_stderr(
    words: str, code: int, standing: Running
) -> None:
    done = standing.fdctl(*words.split())
    assert done.returncode == code
    error = json.loads(done.stdout.splitlines()[-1])
    assert error["code"] == code
    assert (done.stderr.count("\n"), error["error"] in done.stderr) == (1, True)


# ---- each exit code; 7 is in test_security.py


@pytest.mark.parametrize(
    "words", ["", "dance", "stop", "restart 7", "logs x", "completion tcsh", "status --x"]
)
def test_wrong_usage_is_2(words: str, standing: Running) -> None:
    assert standing.fdctl(*words.split()).returncode == protocol.USAGE


def test_a_socket_path_that_is_too_long_is_one_line_with_length_and_limit() -> None:
    path = "/" + "x" * 107
    command = [str(FDCTL), "--socket", path, "status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == protocol.NO_DAEMON
    assert done.stderr == (
        f"fdctl: ERROR ({path} has 108 bytes, but the path of a socket may have at most 107; "
        "use a shorter --prefix or --socket)\n"
    )


def test_no_daemon_is_3_even_if_a_listener_closes_the_connection(tmp_path: Path) -> None:
    path = tmp_path / "s"

    def fdctl() -> subprocess.CompletedProcess[str]:
        command = [str(FDCTL), "--socket", str(path), "status"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert fdctl().returncode == protocol.NO_DAEMON
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def hang_up() -> None:
            peer, _ = listener.accept()
            peer.recv(1000)
            peer.close()

        server = threading.Thread(target=hang_up)
        server.start()
        done = fdctl()
        server.join()
    assert (done.returncode, done.stderr.count("\n")) == (protocol.NO_DAEMON, 1)
    assert "closed the connection without an answer" in done.stderr


def test_unreadable_output_is_one_line_and_why_shows_the_rest(standing: Running, tmp_path: Path) -> None:
    output = standing.prefix / "logs" / "replica1" / "output.log"
    aside = tmp_path / "output.log"
    output.rename(aside)
    output.mkdir()
    try:
        logs = standing.fdctl("logs", "1")
        told = standing.fdctl("why", "1")
    finally:
        output.rmdir()
        aside.rename(output)
    assert (logs.returncode, logs.stderr.count("\n")) == (protocol.FAILED, 1)
    assert "cannot be read (Is a directory)" in logs.stderr
    assert told.returncode == protocol.OK
    assert "replica 1: READY" in told.stdout


def test_a_log_is_followed_over_its_rotation(standing: Running) -> None:
    output = standing.prefix / "logs" / "router" / "output.log"
    content = output.read_text()
    command = [str(FDCTL), "--prefix", str(standing.prefix), "logs", "-f", "-n", "1", "router", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None

        def next_line() -> Any:
            assert follower.stdout is not None
            return json.loads(follower.stdout.readline())["line"]

        assert next_line() == content.splitlines()[-1]
        with output.open("a") as stream:
            stream.write("before it\n")
        assert next_line() == "before it"
        output.rename(output.with_suffix(".1"))
        output.write_text("after it\n")
        assert next_line() == "after it"
        follower.send_signal(signal.SIGINT)
        assert follower.wait(timeout=30) == protocol.DETACHED
    output.with_suffix(".1").rename(output)


def test_a_bad_dp_toml_is_4_and_changes_nothing(standing: Running) -> None:
    before, text = standing.pids(), standing.config.read_text()
    standing.config.write_text(text.replace("[router]", "[router]\nprot = 1"))
    done = standing.fdctl("reload")
    standing.config.write_text(text)
    assert done.returncode == protocol.BAD_CONFIG
    assert "router.prot: unknown key; did you mean 'port'?" in done.stderr
    assert standing.pids() == before


def test_an_old_name_of_an_option_is_one_line_of_check_and_of_the_log(standing: Running) -> None:
    before, text = standing.pids(), standing.config.read_text()
    standing.config.write_text(text.replace("[supervise]", "[supervise]\nstall_after = 14"))
    line = text.split("\n").index("[supervise]") + 2
    notice = f"{standing.config}:{line}: supervise.stall_after: is the old name of unhealthy_after; rename it"
    good = standing.prefix / "old.toml"
    good.write_text((standing.prefix / "good.toml").read_text() + "[supervise]\nstall_after = 14\n")
    checked = standing.fdctl("check", str(good))
    reloaded = standing.fdctl("reload")
    standing.config.write_text(text)
    assert (checked.returncode, reloaded.returncode) == (protocol.OK, protocol.OK)
    assert checked.stderr == f"fdctl: warning: {notice}\n".replace(f"{standing.config}:{line}", f"{good}:4")
    assert standing.log().count(notice) == 1
    assert standing.pids() == before


def test_reload_exits_1_with_the_reason_if_a_replica_cannot_start(standing: Running) -> None:
    standing.write(extra_args=("--die-while-loading",))
    done = standing.fdctl("reload")
    standing.write()
    assert done.returncode == protocol.FAILED
    (line,) = done.stderr.splitlines()
    assert line.startswith("fdctl: ERROR (replica 0")
    assert "no such checkpoint" in line
    assert standing.ready()


def test_ctrl_c_exits_130_and_the_operation_continues(standing: Running) -> None:
    before = standing.pids()
    standing.write(extra_args=("--load-seconds", "0.5"))
    command = [str(FDCTL), "--prefix", str(standing.prefix), "reload"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as fdctl:
        assert fdctl.stdout is not None
        assert fdctl.stdout.readline().startswith("replace replica 0 (")
        fdctl.send_signal(signal.SIGINT)
        _, told = fdctl.communicate(timeout=30)
    assert fdctl.returncode == protocol.DETACHED
    status = shlex.join(["fdctl", "--prefix", str(standing.prefix), "status"])
    assert told == f"fdctl: detached; the reload continues: {status}\n"
    busy = standing.fdctl("restart", "0")
    assert busy.returncode == protocol.BUSY
    assert "another operation is in progress" in busy.stderr
    wait_until(lambda: standing.status()["daemon"]["state"] == "READY", "the reload is done")
    assert not {standing.pids()[name] for name in ("replica0", "replica1")} & {*before.values()}
    assert "no program changes" in standing.fdctl("reload", "--dry-run").stdout
