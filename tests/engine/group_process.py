"""A separate process that does one thing with an expert group's memory and prints a line about it.

    python -m tests.engine.group_process lock DIRECTORY PATIENCE SECONDS
    python -m tests.engine.group_process rank DIRECTORY RANK SECONDS

`lock` waits for the lock and holds it for SECONDS; `rank` registers a rank and exits after SECONDS. If
SECONDS is "stop", the process stops itself (SIGSTOP) instead.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from fastdeploy.expert_parallel.membership import Membership, planner
from fastdeploy.expert_parallel.memory import FILE, Memory, layout_of


def main(what: str, directory: str, argument: str, seconds: str) -> None:
    group = Path(directory)
    descriptor = os.open(group / FILE, os.O_RDWR | os.O_CLOEXEC)
    patience = float(argument) if what == "lock" else 60.0
    memory = Memory(group, descriptor, layout_of(descriptor, group), patience)
    if what == "lock":
        with memory.locked():
            print("locked", flush=True)
            wait(seconds)
        print("unlocked", flush=True)
    else:
        with memory.locked():
            Membership(memory, planner(memory.layout.num_experts, 0)).register(int(argument), group.name)
        print("registered", flush=True)
        wait(seconds)


def wait(seconds: str) -> None:
    if seconds == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
