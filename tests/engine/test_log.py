"""Log files that several processes write and one of them rotates."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fastdeploy.common import log, log_file

from ..small_disk import SmallDisk, unprivileged


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


def test_only_the_journal_gets_priority_prefixes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_messages_logged_together_are_ordinary_lines(directory: Path) -> None:
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
    log._MAX_BYTES, log_file.CHECK_SECONDS = 20_000, 0.0
    log.configure(f"process={number}", "x.log")
    logger = logging.getLogger("test")
    for line in range(count):
        logger.info("line=%d", line)


def test_no_line_is_lost_when_several_processes_rotate_one_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Python's own handler, each process rotates the file that another has just begun."""
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
    # Files are nearly full: rotation does not split the log into many small ones.
    assert len(files) <= 2 * 4 * 500 * 90 // 20_000


class Writer:
    """A process that logs the lines it is given to `x.log` in its log directory."""

    _PROGRAM = (
        "import logging, sys\n"
        "from fastdeploy.common import log, log_file\n"
        "log_file.CHECK_SECONDS = 0.0\n"
        "log.configure('', 'x.log')\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    logging.getLogger('test').info('%s', line.rstrip())\n"
        "    print('logged', flush=True)\n"
    )

    def __init__(self, directory: Path, prefix: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-c", self._PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FD_LOG_DIR": str(directory), "FD_LOG_BACKUP_COUNT": "2"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", self._process.communicate()[1]

    def log(self, *lines: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for line in lines:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
            assert self._process.stdout.readline() == "logged\n"

    def end(self) -> list[str]:
        """Return what it has written to its standard error, without dates and the lines themselves."""
        _, errors = self._process.communicate(timeout=30)
        assert self._process.returncode == 0
        return [message(line) for line in errors.splitlines() if " INFO test " not in line]


def message(line: str) -> str:
    return re.sub(r"^.*? pid=\d+ ", "", line)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.mark.parametrize("removed", ["x.log", "."])
def test_removed_file_or_directory_is_recreated(tmp_path: Path, removed: str) -> None:
    logs = tmp_path / "logs"
    logs.mkdir(mode=0o750)
    writer = Writer(logs)
    writer.log("one")
    (logs / "x.log").unlink()
    if removed == ".":
        logs.rmdir()
    writer.log("two")
    assert message((logs / "x.log").read_text()) == "two\n"
    assert stat.S_IMODE(logs.stat().st_mode) == 0o750
    assert writer.end() == []


def test_lines_for_a_full_disk_are_dropped_and_counted(tmp_path: Path, disk: SmallDisk) -> None:
    logs = tmp_path / "disk" / "logs"
    writer = Writer(logs, disk.prefix)
    writer.log("before")
    disk.fill()
    # Some lines fit into the last page of the file.
    lines = [f"{number} " + "x" * 1000 for number in range(20)]
    writer.log(*lines)
    disk.make_room()
    writer.log("after", "last")
    written = (disk.path / "logs" / "x.log").read_text().splitlines()
    kept = [line for line in written if line.endswith("x" * 1000)]
    assert [message(line) for line in kept] == lines[: len(kept)]
    notice, *rest = [message(line) for line in written[-3:]]
    assert re.fullmatch(
        rf"lines lost since [-\d]+ [:\d]+: {20 - len(kept)} \(No space left on device\)", notice
    )
    assert rest == ["after", "last"]
    assert writer.end() == [
        f"log file {logs}/x.log cannot be written (No space left on device): lines are dropped until it can",
        f"log file {logs}/x.log is written again",
    ]


@pytest.mark.parametrize("is_removed", [False, True])
def test_read_only_disk_loses_only_lines(tmp_path: Path, disk: SmallDisk, is_removed: bool) -> None:
    """An open file can still be written; a removed one cannot be created again."""
    logs = tmp_path / "disk" / "logs"
    writer = Writer(logs, disk.prefix)
    writer.log("before")
    disk.make_read_only()
    file = disk.path / "logs" / "x.log"
    if is_removed:
        subprocess.run([*disk.prefix, "umount", str(tmp_path / "disk")], check=True)
        file.unlink()
        disk.make_read_only()
    writer.log("one", "two")
    disk.make_writable()
    writer.log("after")
    messages = [re.sub("since .*:", "since ...:", message(line)) for line in file.read_text().splitlines()]
    if is_removed:
        assert messages == ["lines lost since ...: 2 (Read-only file system)", "after"]
        assert len(writer.end()) == 2
    else:
        assert messages == ["before", "one", "two", "after"]
        assert writer.end() == []


def test_a_program_starts_without_a_log_on_a_full_or_read_only_disk(tmp_path: Path, disk: SmallDisk) -> None:
    disk.use_up_inodes()
    one = Writer(tmp_path / "disk" / "one", disk.prefix)
    one.log("lost")
    disk.make_room()
    disk.make_read_only()
    other = Writer(tmp_path / "disk" / "other", disk.prefix)
    other.log("lost")
    disk.make_writable()
    for name, writer in (("one", one), ("other", other)):
        writer.log("kept")
        lost, kept = (disk.path / name / "x.log").read_text().splitlines()
        assert re.match(r"lines lost since .*: 1 \(", message(lost))
        assert message(kept) == "kept"
        assert len(writer.end()) == 2


def test_a_directory_without_permission_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir(mode=0o500)
    program = (
        "import sys; from fastdeploy.common import log, errors\n"
        "try: log.configure('', 'x.log')\n"
        "except errors.ConfigError as error: sys.exit(str(error))"
    )
    ended = subprocess.run(
        [*unprivileged(), sys.executable, "-c", program],
        env={**os.environ, "FD_LOG_DIR": str(tmp_path / "logs")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr == (
        f"FD_LOG_DIR is '{tmp_path}/logs'; it must be a directory for logs (Permission denied)\n"
    )


def test_permission_lost_at_run_time_loses_only_lines(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    writer = Writer(logs, unprivileged())
    writer.log("before")
    (logs / "x.log").unlink()
    logs.chmod(0o500)
    writer.log("lost")
    logs.chmod(0o700)
    writer.log("after")
    lost, after = [message(line) for line in (logs / "x.log").read_text().splitlines()]
    assert lost.endswith(": 1 (Permission denied)")
    assert after == "after"
    assert len(writer.end()) == 2


def test_rotation_that_fails_halfway_is_completed_later(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "_MAX_BYTES", 200)
    monkeypatch.setattr(log_file, "CHECK_SECONDS", 0.0)
    monkeypatch.setenv("FD_LOG_BACKUP_COUNT", "3")
    log.configure("", "x.log")
    logger = logging.getLogger("test")
    (directory / "x.log.1").write_text("old")
    # No file can be renamed to a directory.
    (directory / "x.log.2").mkdir()
    (directory / "x.log.2" / "file").touch()
    (directory / "x.log.3").mkdir()
    (directory / "x.log.3" / "file").touch()
    for number in range(10):
        logger.info("line=%d", number)
    assert len((directory / "x.log").read_text().splitlines()) == 10
    assert capfd.readouterr().err.count("cannot be rotated") == 1
    for blocked in ("x.log.2", "x.log.3"):
        (directory / blocked / "file").unlink()
        (directory / blocked).rmdir()
    logger.info("line=10")
    assert (directory / "x.log.2").read_text() == "old"
    assert len((directory / "x.log.1").read_text().splitlines()) == 10
    assert (directory / "x.log").read_text().endswith("line=10\n")


def test_failing_close_loses_no_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel closes the descriptor nevertheless; its number may be that of another file by then."""
    monkeypatch.setattr(log_file, "CHECK_SECONDS", 0.0)
    log.configure("", "x.log")
    close = os.close

    def fail_to_close(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    (directory / "x.log").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", fail_to_close)
        logging.getLogger("test").info("one")
    assert message((directory / "x.log").read_text()) == "one\n"


def test_standard_error_on_a_full_disk_loses_only_lines(tmp_path: Path, disk: SmallDisk) -> None:
    redirected = ["sh", "-c", f'exec "$@" 2>>"{tmp_path}/disk/errors"', "sh"]
    writer = Writer(tmp_path / "logs", [*disk.prefix, *redirected])
    disk.fill()
    writer.log(*("x" * 1000 for _ in range(20)))
    file = disk.path / "errors"
    kept = file.read_text()
    disk.make_room()
    writer.log("after", "last")
    writer.end()
    # No line is kept for later, and none begins in the middle of another.
    assert [message(line) for line in file.read_text().removeprefix(kept).strip().splitlines()] == [
        "after",
        "last",
    ]
