"""No text of a user enters supervisord's configuration, and every argument reaches the program unchanged."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import xmlrpc.client
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from supervisor.options import ServerOptions

from fastdeploy.daemon.config.launch import HASH, MARKER, NOT_STARTED, USAGE
from fastdeploy.daemon.config.programs import Program
from fastdeploy.daemon.process import output_tail, supervisord_config
from fastdeploy.daemon.process.proc import Marked, kill_marked, marked, running_hash, started_at
from fastdeploy.daemon.process.supervisor_client import Supervisor, SupervisorLost
from fastdeploy.daemon.process.supervisord_config import Layout

from .conftest import wait_until

FD_RUN = Path(sys.executable).with_name("fd-run")
#: Any text that a command line or an environment can hold: all but NUL.
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
#: Texts that, written into an ini file, are cut, are expanded, or stop supervisord.
INJECTIONS = [
    *("100%", "%(ENV_HOME)s", "%%", "a ; b", "; comment", "# no", " # no", "0,1", '"', "'", '\\"', "$HOME"),
    *(
        "a\nautostart=true",
        "x\n[program:evil]\ncommand=/bin/false",
        "\r\n",
        "\t",
        " ",
        "",
        "`id`",
        "&& id",
        "é",
        "\\",
    ),
    *("[section]", "key=value", ":", "\x7f", "\u2028"),
]


def program(*words: str, name: str = "replica0", **env: str) -> Program:
    return Program(name, (sys.executable, "-c", "pass", *words), MappingProxyType(env), (5000,))


def parsed(file: Path) -> dict[str, Any]:
    """Return the options of each program by name, as supervisord reads them."""
    options = ServerOptions()
    options.realize(["-c", str(file)])
    return {config.name: config.process_configs[0] for config in options.process_group_configs}


@pytest.mark.parametrize("word", INJECTIONS)
def test_arguments_of_a_program_cannot_change_the_ini_file(word: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "run", tmp_path / "logs")
    hostile = program("--x", word, VARIABLE=word)
    harmless = program("--x", VARIABLE="")
    ini = supervisord_config.render(layout, [hostile])
    assert ini.replace(hostile.hash, "") == supervisord_config.render(layout, [harmless]).replace(
        harmless.hash, ""
    )


@pytest.mark.parametrize("name", ["with space", "comma,colon:", "$HOME", "é", "[x]", "a=b"])
def test_supervisord_understands_every_path_that_dp_toml_may_have(name: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / name / "run", tmp_path / name / "logs")
    one = program()
    supervisord_config.write_files(layout, [one])
    config = parsed(layout.ini)["replica0"]
    assert shlex.split(config.command) == [str(FD_RUN), "replica0", one.hash, str(layout.launch)]
    assert config.stdout_logfile == str(layout.output("replica0"))
    assert (config.autostart, config.autorestart, config.startsecs) == (False, False, 0)


@given(
    argv=st.lists(WORDS, max_size=4),
    env=st.dictionaries(st.from_regex(r"\A[A-Z_][A-Z0-9_]{0,9}\Z").map("X_".__add__), WORDS, max_size=4),
)
@example(argv=INJECTIONS, env={f"X_{number}": word for number, word in enumerate(INJECTIONS)})
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_argument_reaches_the_program_unchanged(
    argv: list[str], env: dict[str, str], tmp_path: Path
) -> None:
    tell = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], sys.stdout)"
    one = Program("replica0", (sys.executable, "-c", tell, *argv), MappingProxyType(env), (5000,))
    layout = Layout(tmp_path / "run", tmp_path / "logs")
    supervisord_config.write_files(layout, [one])
    command = shlex.split(parsed(layout.ini)["replica0"].command)
    inherited = {**os.environ, "NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "SUPERVISOR_ENABLED": "1"}
    told = subprocess.run(command, env=inherited, capture_output=True, check=True, text=True)
    got_argv, got_env = json.loads(told.stdout)
    assert got_argv == argv
    assert {name: got_env[name] for name in env} == env
    assert (got_env[MARKER], got_env[HASH]) == (f"{layout.run}#replica0", one.hash)
    assert not got_env.keys() & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "SUPERVISOR_ENABLED"}
    assert Program.from_launch_text((layout.launch / one.launch_name).read_text()) == one


def test_fd_run_fails_with_a_one_line_error(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([FD_RUN, *words], capture_output=True, text=True, check=False)

    assert run().returncode == USAGE
    missing = run("replica0", "abc", str(tmp_path))
    assert (missing.returncode, missing.stderr.count("\n")) == (NOT_STARTED, 1)
    layout = Layout(tmp_path / "run", tmp_path / "logs")
    one = Program("replica0", ("/nowhere/python",), MappingProxyType({}), (1,))
    supervisord_config.write_files(layout, [one])
    failed = run("replica0", one.hash, str(layout.launch))
    assert failed.returncode == NOT_STARTED
    assert failed.stderr == "fd-run: /nowhere/python: cannot be executed (No such file or directory)\n"


def test_absent_supervisord_counts_as_lost_and_silent_one_as_hung(tmp_path: Path) -> None:
    layout = Layout(tmp_path, tmp_path)
    with pytest.raises(SupervisorLost) as caught:
        Supervisor(layout).processes()
    assert not caught.value.hangs
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(layout.socket))
        silent.listen()
        with pytest.raises(SupervisorLost) as caught:
            Supervisor(layout).processes()
    assert caught.value.hangs


REFUSAL = xmlrpc.client.dumps(xmlrpc.client.Fault(6, "SHUTDOWN_STATE")).encode()


@pytest.mark.parametrize(
    ("answer", "hangs"),
    [(REFUSAL, True), (REFUSAL[:-20], False), (b"", False)],
    ids=["refusal", "cut", "empty"],
)
def test_a_supervisord_that_is_ending_is_lost(answer: bytes, hangs: bool, tmp_path: Path) -> None:
    layout = Layout(tmp_path, tmp_path)
    with socket.socket(socket.AF_UNIX) as ending:
        ending.bind(str(layout.socket))
        ending.listen()

        def serve() -> None:
            peer, _ = ending.accept()
            with peer:
                # Read it all: closing with unread bytes resets the connection, and the client would retry.
                request = b""
                while b"</methodCall>" not in request:
                    request += peer.recv(1 << 16)
                head = f"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: {len(REFUSAL)}\r\n\r\n"
                peer.sendall(head.encode() + answer)

        server = threading.Thread(target=serve)
        server.start()
        with pytest.raises(SupervisorLost) as caught:
            Supervisor(layout).processes()
        server.join()
    assert caught.value.hangs is hangs


def test_launch_files_of_no_program_are_removed(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "run", tmp_path / "logs")
    old, new = program("old"), program("new")
    supervisord_config.write_files(layout, [old])
    supervisord_config.write_files(layout, [new])
    supervisord_config.remove_stale_launch_files(layout, [new])
    assert [file.name for file in layout.launch.iterdir()] == [new.launch_name]


def test_marked_process_is_found_in_any_session_by_its_own_daemon_only(tmp_path: Path) -> None:
    run = tmp_path / "run"
    env = {**os.environ, MARKER: f"{run}#replica3", HASH: "abc"}
    child = subprocess.Popen(["sleep", "60"], env=env, start_new_session=True)
    try:
        wait_until(lambda: marked(run), "environment visible")
        assert marked(run) == [Marked(child.pid, "replica3", "abc")]
        assert marked(run, "replica2") == []
        assert marked(tmp_path) == []
        assert running_hash(run, child.pid) == "abc"
        assert kill_marked(run, "replica2") == []
        assert [process.pid for process in kill_marked(run, "replica3")] == [child.pid]
        assert child.wait(timeout=20) == -9
        assert marked(run) == []
    finally:
        child.kill()
        child.wait()


def test_last_error_ignores_previous_process_of_the_same_second(tmp_path: Path) -> None:
    output = tmp_path / "output.log"
    output.write_text(
        "2026-11-28 00:09:12,049 ERROR fastdeploy replica=0 pid=1 killed by SIGSEGV\n"
        "2026-11-28 00:09:12,410 INFO fastdeploy replica=0 pid=2 listening\n"
    )
    began = time.mktime((2026, 11, 28, 0, 9, 12, 0, 0, -1)) + 0.3
    assert output_tail.last_error(output, began) == ""
    with output.open("a") as out:
        out.write("2026-11-28 00:09:12,900 ERROR fastdeploy replica=0 pid=2 no room\n")
    assert output_tail.last_error(output, began).endswith("no room")


def test_when_a_process_was_started_is_known_to_a_fraction_of_a_second() -> None:
    earliest = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        latest = time.time()
        # The kernel counts in hundredths of a second.
        assert earliest - 0.02 <= (started_at(process.pid) or 0) <= latest + 0.02
        process.kill()
    assert started_at(process.pid) is None
