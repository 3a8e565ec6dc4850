"""Log files that several processes write and one of them rotates."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy import log


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path))
    yield tmp_path
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)


def test_the_journal_is_told_how_bad_each_line_is_and_other_files_are_not(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, is_journal in (("journal", True), ("pipe", False)):
        with (directory / name).open("w") as stream:
            found = os.fstat(stream.fileno())
            monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino if is_journal else 0}")
            monkeypatch.setattr(sys, "stderr", stream)
            log.configure(file_name="x.log")
            logging.getLogger("fastdeploy").error("lost")
            log.info_together(logging.getLogger("fastdeploy"), ["one", "two"])
        lines = (directory / name).read_text().splitlines()
        assert [re.sub(r"\d{4}.* ", "", line) for line in lines] == (
            ["<3>lost", "<6>one", "<6>two"] if is_journal else ["lost", "one", "two"]
        )
    assert "<" not in (directory / "x.log").read_text()


def test_many_messages_logged_together_are_lines_like_any_other(directory: Path) -> None:
    log.configure("replica=3", "x.log")
    logger = logging.getLogger("fastdeploy.access")
    logger.info("alone")
    log.info_together(logger, ["one", "two"])
    log.info_together(logger, [])
    alone, one, two = (directory / "x.log").read_text().splitlines()
    shape = r"\d{4}-\d\d-\d\d [\d:,]+ INFO fastdeploy\.access replica=3 pid=\d+ "
    assert re.fullmatch(shape + "alone", alone)
    assert re.fullmatch(shape + "one", one)
    assert re.fullmatch(shape + "two", two)


def test_messages_below_the_level_are_not_logged_together_either(directory: Path) -> None:
    log.configure("", "x.log")
    logging.getLogger().setLevel(logging.WARNING)
    log.info_together(logging.getLogger("fastdeploy.access"), ["one"])
    assert (directory / "x.log").read_text() == ""


def write(number: int, count: int) -> None:
    log._MAX_BYTES, log._LOOK_SECONDS = 20_000, 0.0
    log.configure(f"process={number}", "x.log")
    logger = logging.getLogger("test")
    for line in range(count):
        logger.info("line=%d", line)


def test_no_line_is_lost_when_several_processes_rotate_one_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own handler lets each process rotate what another has just begun."""
    monkeypatch.setenv("FD_LOG_BACKUP_COUNT", "100")
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(number, 500)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    files = sorted(directory.iterdir())
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert {(f"process={n}", f"line={i}") for n in range(4) for i in range(500)} == {
        (line.split()[4], line.split()[-1]) for line in lines
    }
    assert len(lines) == 4 * 500
    # Each is about as large as it may be, and not cut into many small ones.
    assert len(files) <= 2 * 4 * 500 * 90 // 20_000
