"""`fdctl status` with notes that are longer than a line."""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from fastdeploy.daemon.control import protocol

from .conftest import FDCTL
from .scripted_daemon import scripted

LONG = "the worker has said: " + "very long words of a library " * 15
_SHOW = """
import json, sys
from fastdeploy.daemon.fdctl import table
table.show(lambda: json.loads(sys.argv[1]), table.of_status, watch=False)
"""


def program(number: int, state: str, note: str = "") -> dict[str, Any]:
    return {
        "name": f"replica{number}",
        "replica": number,
        "state": state,
        "note": note,
        "pid": 100000 + number,
        "uptime": 5,
        "restarts": 0,
        "port": 1811,
        "in_flight": 0,
        "last_exit": "",
        "progress": None,
        "intent": "run",
        "draining": False,
    }


STATUS: dict[str, Any] = {
    "daemon": {"url": "http://127.0.0.1:30000", "ready": 1, "replicas": 3, "state": "READY", "problems": []},
    "router": None,
    "replicas": [program(0, "READY"), program(1, "QUARANTINED", LONG), program(2, "BACKOFF", "a short note")],
}
COMMAND = [sys.executable, "-c", _SHOW, json.dumps(STATUS)]


def on_a_terminal(columns: int) -> list[str]:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    # These variables would override the width of the terminal.
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    shown = subprocess.Popen(COMMAND, stdout=theirs, env={**environment, "TERM": "xterm"})
    os.close(theirs)
    data = b""
    try:
        while piece := os.read(ours, 1 << 16):
            data += piece
    except OSError:
        pass  # a closed terminal raises this
    os.close(ours)
    assert shown.wait(60) == 0
    return re.sub(r"\x1b\[[\d;]*m", "", data.decode()).splitlines()


def in_a_pipe() -> list[str]:
    return subprocess.run(COMMAND, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()


def test_no_line_in_a_pipe_ends_in_spaces_or_is_very_long() -> None:
    lines = in_a_pipe()
    assert [line for line in lines if line != line.rstrip()] == []
    assert max(map(len, lines)) < 180
    [cut] = [line for line in lines if "QUARANTINED" in line]
    assert cut.endswith("...")
    assert LONG[:90] in cut
    assert any(line.endswith("a short note") for line in lines)


@pytest.mark.parametrize("columns", [100, 140])
def test_on_a_terminal_the_note_gets_the_rest_of_the_line(columns: int) -> None:
    lines = on_a_terminal(columns)
    [cut] = [line for line in lines if "QUARANTINED" in line]
    assert len(cut) == columns
    assert cut.endswith("…")
    assert LONG[:20] in cut
    # No program takes a second line: no other column is wrapped to make room for the note.
    assert len(lines) == 5
    assert any(line.endswith("a short note") for line in lines)


@pytest.mark.parametrize("words", [("status",), ("why",), ("why", "0")])
def test_a_daemon_without_problems_in_its_answer_is_an_older_one(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    one = program(0, "READY") | {
        "output": str(tmp_path / "output.log"),
        "argv": [],
        "for": 3.0,
        "waits_for": None,
    }
    daemon = {key: value for key, value in STATUS["daemon"].items() if key != "problems"}
    answers = {
        "status": {"status": {"daemon": daemon, "router": None, "replicas": [one]}},
        "why": {"why": one},
    }
    with scripted(tmp_path / "s", lambda command: [{"code": protocol.OK, **answers[command["do"]]}]):
        command = [str(FDCTL), "--socket", str(tmp_path / "s"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (protocol.OK, "")
    assert "READY" in done.stdout
