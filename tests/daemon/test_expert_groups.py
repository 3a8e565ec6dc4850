"""`fdctl ep`: the members of a deployment's group and their waits, read without the daemon."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastdeploy.daemon.config import loader as dp_toml
from fastdeploy.daemon.config.programs import expert_group_of, programs_of
from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.process import supervisord_config

from ..quiet_group import QuietGroup
from .conftest import FDCTL

Fdctl = Callable[..., "subprocess.CompletedProcess[str]"]
NewGroup = Callable[..., QuietGroup]


@pytest.fixture
def fdctl(tmp_path: Path) -> Fdctl:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(FDCTL), "--prefix", str(tmp_path), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    return run


def launched(prefix: Path, parallel: str = "") -> str:
    """Write the files that a daemon would write; return the name of the replicas' group."""
    text = f'[model]\npath = "demo"\n[parallel]\ndata_parallel_size = 4\n{parallel}\n'
    config = dp_toml.parse(text, "dp.toml", prefix, prefix)
    supervisord_config.write_files(
        supervisord_config.Layout(config.paths.run, config.paths.logs), programs_of(config)
    )
    return expert_group_of(config)


@pytest.fixture
def new_group() -> Iterator[NewGroup]:
    made: list[QuietGroup] = []

    def make(name: str, *ranks: int) -> QuietGroup:
        made.append(QuietGroup(name, *ranks))
        return made[-1]

    yield make
    for group in made:
        group.close()


def test_every_seat_has_a_row_and_the_most_awaited_is_named(
    fdctl: Fdctl, tmp_path: Path, new_group: NewGroup
) -> None:
    group = new_group(launched(tmp_path), 0, 1, 3)
    group.note(0, "experts", layer=1, seconds=90)
    group.note(1, "sent", layer=1, waits_for=0b1, seconds=20)
    group.note(3, "idle")
    done = fdctl("ep")
    assert (done.returncode, done.stderr) == (protocol.OK, "")
    title, head, *rows, last = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert title == f"{group.name} epoch 1 active ranks 0,1,3 joins 3 leaves 0 losses 0"
    assert head == "rank pid state epoch steps phase layer for tokens waits for"
    pids = [process.pid for process in group.processes]
    assert rows[0].startswith(f"0 {pids[0]} active 0 0 experts 1 1m3")
    assert rows[1].startswith(f"1 {pids[1]} active 0 0 sent 1 2")
    assert rows[1].endswith("s 0 0")
    assert rows[2] == "2 - free"
    assert rows[3].startswith(f"3 {pids[2]} active 0 0 idle - ")
    assert last.startswith("most waited for: rank 0, by 1, 2")


def test_json_has_a_schema_and_a_group_can_be_named(
    fdctl: Fdctl, new_group: NewGroup, tmp_path: Path
) -> None:
    # A name as multi_api_server chooses it: there is no daemon, so there are no files.
    group = new_group(f"port-{tmp_path.parent.name}", 2)
    (found,) = json.loads(fdctl("ep", "--json", group.name).stdout)["groups"]
    assert set(found) == {
        *("name", "epoch", "active", "joins", "leaves", "losses", "num_seats", "seats", "awaited"),
    }
    (seat,) = found["seats"]
    assert set(seat) == {
        *("seat", "pid", "state", "epoch", "steps", "phase", "layer", "seconds", "tokens", "waits_for"),
    }
    assert (found["active"], found["awaited"], seat["pid"]) == ([2], None, group.processes[0].pid)


def test_in_a_reload_the_old_group_and_the_new_one_are_shown(
    fdctl: Fdctl, tmp_path: Path, new_group: NewGroup
) -> None:
    names = [launched(tmp_path), launched(tmp_path, "redundant_experts = 1")]
    for name, seats in zip(names, [(1, 2, 3), (0,)], strict=True):
        new_group(name, *seats)
    groups = json.loads(fdctl("ep", "--json").stdout)["groups"]
    assert {group["name"]: group["active"] for group in groups} == {names[0]: [1, 2, 3], names[1]: [0]}


def test_missing_expert_group_has_its_own_exit_code_and_one_line_reason(
    fdctl: Fdctl, tmp_path: Path, new_group: NewGroup
) -> None:
    done = fdctl("ep")
    assert done.returncode == protocol.NO_DAEMON
    assert f"no fd-dp has used {tmp_path}/run" in done.stderr

    launched(tmp_path, "expert_parallel = false")
    done = fdctl("ep")
    assert (done.returncode, done.stdout) == (protocol.NO_GROUP, "")
    assert done.stderr.endswith("[parallel] expert_parallel is off)\n")

    group = new_group(launched(tmp_path), 0)
    group.kill(0)
    done = fdctl("ep", "--json")
    assert done.returncode == protocol.NO_GROUP
    assert json.loads(done.stdout)["code"] == protocol.NO_GROUP
    assert re.search(r"replicas are loading or down \(fdctl --prefix \S+ status\)", done.stderr)
    assert done.stderr.count("\n") == 1
    assert fdctl("ep", "no such").returncode == protocol.FAILED
    assert "6    no expert group" in fdctl("--help").stdout


def test_watch_mode_refreshes(tmp_path: Path, new_group: NewGroup) -> None:
    group = new_group(launched(tmp_path), 0, 1)
    command = [str(FDCTL), "--prefix", str(tmp_path), "ep", "--watch", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        states = []
        deadline = time.monotonic() + 30
        while "dead" not in states:
            (found,) = json.loads(watching.stdout.readline())["groups"]
            states = [seat["state"] for seat in found["seats"]]
            if states == ["active", "active"]:
                group.kill(1)
            assert time.monotonic() < deadline
        watching.terminate()


def test_neither_the_daemon_nor_fdctl_imports_paddle_or_numpy(tmp_path: Path, new_group: NewGroup) -> None:
    new_group(launched(tmp_path)).join(0)
    program = (
        "import sys, fastdeploy.daemon.main\n"
        "from fastdeploy.daemon.fdctl import main\n"
        f"sys.argv = ['fdctl', '--prefix', {str(tmp_path)!r}, 'ep']\n"
        "code = main.main()\n"
        "print(code, *{'paddle', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
