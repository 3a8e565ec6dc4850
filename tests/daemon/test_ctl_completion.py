"""Completion in real shells."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.fdctl.completion import SHELLS

from .conftest import FDCTL
from .scripted_daemon import scripted

FLAGS = ("-h", "--help", "--json")
COMPLETE = """
source <({fdctl} completion bash)
COMP_LINE={line!r} COMP_POINT={length} COMP_TYPE=9 COMP_WORDBREAKS=$' \\t\\n="'
COMP_WORDS=({line}) COMP_CWORD=$(({words} - 1))
_python_argcomplete {fdctl}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def completed(line: str) -> set[str]:
    """Return the completions that bash offers at the end of the line."""
    line = f"{FDCTL} {line}"
    script = COMPLETE.format(fdctl=FDCTL, line=line, length=len(line), words=len(line.split(" ")))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return {word.strip() for word in done.stdout.splitlines()}


def test_commands_flags_and_shells_are_completed(tmp_path: Path) -> None:
    assert completed("re") == {"reload", "release", "restart", "render"}
    assert completed("reload --dr") == {"--dry-run"}
    assert completed("completion ") == {*SHELLS, *FLAGS}


def test_replicas_are_completed_as_they_are_just_now(tmp_path: Path) -> None:
    status = {"replicas": [{"replica": 0}, {"replica": 3}]}
    socket = tmp_path / "s"
    with scripted(socket, lambda _: [{"code": protocol.OK, "status": status}]):
        assert completed(f"--socket {socket} why ") == {"0", "3", "all", "router", *FLAGS}
    # Without a daemon, the words that every configuration has are still offered.
    assert completed(f"--socket {socket} drain ") == {"all", "router", "--wait", "--no-wait", *FLAGS}


@pytest.mark.parametrize("shell", SHELLS)
def test_each_script_is_valid_for_its_shell(shell: str, tmp_path: Path) -> None:
    script = subprocess.run([FDCTL, "completion", shell], capture_output=True, text=True, check=True).stdout
    assert "fdctl" in script
    if found := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([found, "-n", str(tmp_path / "script")], check=True, timeout=60)
