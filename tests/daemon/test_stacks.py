"""Stack dumps of hung programs, with real processes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastdeploy.daemon.config.launch import MARKER
from fastdeploy.daemon.process.stacks import Dump

from ..waiting import wait_until

pytestmark = pytest.mark.processes

# Writes each line in two parts, as faulthandler does.
WRITER = """
import os, signal, sys, time
def dump(number, frame):
    for _ in range(20):
        os.write(1, sys.argv[1].encode())
        time.sleep(0.005)
        os.write(1, b"\\n")
signal.signal(signal.SIGUSR2, dump)
os.write(1, b"ready\\n")
while True:
    signal.pause()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    processes = []

    def start_one(name: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "output.log").open("ab") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", WRITER, name],
                    stdout=output,
                    env={**os.environ, MARKER: f"{tmp_path}#replica0"},
                )
            )
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()
        process.wait()


def test_processes_of_a_program_dump_one_after_the_other(
    start: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    output = tmp_path / "output.log"
    start("parent")
    child = start("child")
    wait_until(lambda: output.read_text() == "ready\n" * 2, "both processes run", deadline=30)
    child.send_signal(signal.SIGSTOP)
    dump = Dump(tmp_path, "replica0", arbiter=0, output=output, now=time.monotonic())
    wait_until(lambda: dump.is_done(time.monotonic()), "the dump", deadline=30, pause=0.1)
    lines = output.read_text().splitlines()[2:]
    blocks = [(name, len([*group])) for name, group in itertools.groupby(lines)]
    assert sorted(blocks) == [("child", 20), ("parent", 20)]
