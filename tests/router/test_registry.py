"""The registry file, from which a restarted router knows its replicas."""

import json
import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from fastdeploy.common.errors import ConfigError
from fastdeploy.daemon.router.addresses import AllowedAddresses
from fastdeploy.daemon.router.board.board import Board, ReplicaState
from fastdeploy.daemon.router.control.registry import RegistryFile
from fastdeploy.daemon.router.instance import Instance

from .forked import Forked

NOBODY_ELSE = AllowedAddresses()


def instance(number: int) -> Instance:
    return Instance(
        *("127.0.0.1", 1000 + number),
        replica=number,
        metrics_port="3100",
        instance=f"start-{number}",
        features=("resume",),
        token=f"secret-{number}",
    )


@pytest.fixture
def boards() -> Iterator[list[Board]]:
    boards = [Board.create(), Board.create()]
    yield boards
    for board in boards:
        board.close()


def test_saved_replicas_are_restored_with_tokens_and_drains(tmp_path: Path, boards: list[Board]) -> None:
    before, after = boards
    file = RegistryFile(tmp_path / "registry.json")
    for number in range(4):
        before.admit(instance(number))
    handles = before.handles()
    before.drain(handles[1])
    before.unreachable(handles[2], "refused")
    before.open_counters()
    before.deregister(instance(3).url, "start-3")
    file.save(before)
    file.restore(after, NOBODY_ELSE)
    assert [row.instance for row in after.status()] == [instance(number) for number in range(3)]
    assert [row.draining for row in after.status()] == [False, True, False]
    assert {row.state for row in after.status()} == {ReplicaState.DOWN}


def test_registry_file_is_private(tmp_path: Path, boards: list[Board]) -> None:
    path = tmp_path / "registry.json"
    path.write_text("{}")
    path.chmod(0o644)
    old = os.umask(0)
    try:
        boards[0].admit(instance(0))
        RegistryFile(path).save(boards[0])
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "secret-0" in path.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["registry.json"]


def test_addresses_that_are_not_allowed_any_more_are_left_out(tmp_path: Path, boards: list[Board]) -> None:
    path = tmp_path / "registry.json"
    path.write_text(json.dumps({"instances": [{"role": "mixed", "host_ip": "10.1.2.3", "port": 1}]}))
    RegistryFile(path).restore(boards[0], NOBODY_ELSE)
    assert boards[0].status() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"instances": 5}', '{"instances": [{}]}', "\udcff"])
def test_broken_file_is_logged_in_one_line(
    tmp_path: Path, boards: list[Board], caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "registry.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    RegistryFile(path).restore(boards[0], NOBODY_ELSE)
    assert boards[0].status() == []
    assert len(caplog.records) == 1
    assert "ignored" in caplog.text


def test_workers_that_save_at_the_same_time_leave_a_whole_file(tmp_path: Path, boards: list[Board]) -> None:
    board = boards[0]
    path = tmp_path / "registry.json"

    def work(child: Forked, number: int) -> None:
        for round_ in range(20):
            board.admit(Instance("127.0.0.1", 1000 + number, instance=f"{round_}"))
            RegistryFile(path).save(board)

    children = [Forked(partial(work, number=number)) for number in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    saved = json.loads(path.read_text())["instances"]
    assert sorted((entry["port"], entry["instance"]) for entry in saved) == [
        (str(1000 + number), "19") for number in range(3)
    ]


def test_without_a_path_nothing_is_kept(boards: list[Board]) -> None:
    RegistryFile(None).save(boards[0])
    RegistryFile(None).restore(boards[0], NOBODY_ELSE)


def test_a_file_that_could_not_be_written_is_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a file; it is a directory"):
        RegistryFile(tmp_path).prepare()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--registry-file"):
        RegistryFile(tmp_path / "file" / "registry.json").prepare()
    RegistryFile(tmp_path / "new" / "registry.json").prepare()
    assert (tmp_path / "new").is_dir()
