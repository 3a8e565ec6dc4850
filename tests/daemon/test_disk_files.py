"""The files of supervisord and of the daemon, under each kind of disk error."""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from supervisor.loggers import LogRecord

from fastdeploy.common.errors import FastDeployError
from fastdeploy.common.unix_listener import SocketPath, UnixListener
from fastdeploy.daemon.process import proc, supervisord_config
from fastdeploy.daemon.process.output_files import OutputFile
from fastdeploy.daemon.process.supervisor_client import Supervisor, SupervisorError
from fastdeploy.daemon.process.supervisord_config import Layout
from fastdeploy.daemon.supervision.intents import DesiredState, Intent, Intents
from fastdeploy.daemon.troubles import Troubles
from fastdeploy.daemon.upkeep import Lock, write_problem

from .conftest import FDCTL, wait_until
from .small_disks import why_not
from .test_supervisor import program

_NOBODY = 65534
_SPAWN = multiprocessing.get_context("fork")


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A directory of root's that another user can only read."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(call: Callable[[], str]) -> str:
    """Return the result of `call` in a process that is subject to permission bits."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    receiver, sender = _SPAWN.Pipe(duplex=False)

    def run() -> None:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
        sender.send(call())

    child = _SPAWN.Process(target=run)
    child.start()
    try:
        assert receiver.poll(20), "the child has failed"
        answer: str = receiver.recv()
        return answer
    finally:
        child.join()


def answers(layout: Layout) -> bool:
    try:
        return Supervisor(layout).pid() > 0
    except SupervisorError:
        return False


def written(handler: OutputFile, text: str) -> None:
    handler.emit(LogRecord(20, text.encode()))


# ---- a log file of supervisord


def test_output_that_finds_no_room_is_counted_when_there_is_some(tmp_path: Path) -> None:
    file = tmp_path / "output.log"
    file.symlink_to("/dev/full")
    handler = OutputFile(str(file), maxBytes=1000, backupCount=1)
    written(handler, "one\n")
    written(handler, "two\n")
    file.unlink()
    written(handler, "three\n")
    note, line = file.read_text().splitlines()
    assert "WARNING supervisord 8 bytes of output were lost since 20" in note
    assert note.endswith(": No space left on device")
    assert line == "three"
    written(handler, "four\n")
    assert file.read_text().splitlines()[2:] == ["four"]


def test_removed_log_file_is_recreated_with_its_directory(tmp_path: Path) -> None:
    file = tmp_path / "replica0" / "output.log"
    handler = OutputFile(str(file), maxBytes=1000, backupCount=1)
    written(handler, "one\n")
    file.unlink()
    file.parent.rmdir()
    written(handler, "two\n")
    assert file.read_text() == "two\n"


def test_a_log_file_rotates(tmp_path: Path) -> None:
    file = tmp_path / "output.log"
    handler = OutputFile(str(file), maxBytes=4, backupCount=2)
    for text in ("one\n", "two\n", "three\n", "four\n"):
        written(handler, text)
    kept = [(tmp_path / name).read_text() for name in ("output.log", "output.log.1", "output.log.2")]
    assert kept == ["four\n", "three\n", "two\n"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_of_a_program_leaves_no_open_file_and_its_loss_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "output.log"
    for run in range(3):
        written(OutputFile(str(file)), f"{run}\n")
    assert [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()].count(
        str(file)
    ) == 1
    file.unlink()
    file.symlink_to("/dev/full")
    written(OutputFile(str(file)), "three\n")
    file.unlink()
    written(OutputFile(str(file)), "four\n")
    note, line = file.read_text().splitlines()
    assert "WARNING supervisord 6 bytes of output were lost since 20" in note
    assert line == "four"


def test_log_file_without_permission_loses_only_lines(forbidden: Path) -> None:
    def call() -> str:
        handler = OutputFile(str(forbidden / "x" / "output.log"))
        written(handler, "one\n")
        return handler._problem

    assert as_nobody(call) == "Permission denied"


# ---- directories, sockets, the lock


@pytest.mark.parametrize("missing", [False, True])
def test_a_directory_without_permission_is_named(forbidden: Path, missing: bool) -> None:
    directory = forbidden / "logs" if missing else forbidden
    assert as_nobody(lambda: write_problem(directory)) == f"cannot write {directory}: Permission denied"


def test_a_missing_directory_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    assert write_problem(tmp_path / "a" / "b") == ""
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_place_of_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    assert write_problem(tmp_path / "logs") == f"cannot write {tmp_path}/logs: File exists"


def test_a_listener_without_permission_keeps_its_old_socket(forbidden: Path) -> None:
    listener = UnixListener(SocketPath(forbidden / "x.sock", 0o600))
    listener.bind()
    (forbidden / "x.sock").unlink()

    def call() -> str:
        try:
            listener.bind()
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "bound"

    assert as_nobody(call) == "EACCES"
    assert not listener.is_bound()
    listener.bind()
    assert listener.is_bound()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(forbidden / "x.sock"))
        assert (forbidden / "x.sock").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in forbidden.iterdir()] == ["x.sock"]
    listener.close()
    assert list(forbidden.iterdir()) == []


def test_a_lock_without_permission_is_refused_in_one_line(forbidden: Path) -> None:
    def call() -> str:
        try:
            Lock(forbidden)
        except FastDeployError as error:
            return str(error)
        return "taken"

    assert as_nobody(call) == f"cannot write {forbidden}/fd-dp.lock: Permission denied"


def test_a_removed_lock_is_taken_again(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    (tmp_path / "fd-dp.lock").unlink()
    assert lock.keep() == ""
    with pytest.raises(FastDeployError, match=f"another fd-dp, pid {os.getpid()}, uses"):
        Lock(tmp_path)
    lock.release()


def test_intents_without_permission_are_kept_in_memory(forbidden: Path) -> None:
    def call() -> str:
        intents = Intents(forbidden)
        problem = intents.set("replica0", DesiredState(Intent.HELD))
        return f"{problem} {intents.of('replica0').intent}"

    told = as_nobody(call)
    assert told.startswith(f"cannot write {forbidden}/intents.json: Permission denied")
    assert told.endswith(" held")


# ---- the files that start programs


def test_files_that_are_in_place_are_not_written_again(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "run", tmp_path / "logs")
    supervisord_config.write_files(layout, [program()])
    before = {path: path.stat().st_ino for path in (tmp_path / "run").rglob("*")}
    supervisord_config.write_files(layout, [program()])
    assert {path: path.stat().st_ino for path in (tmp_path / "run").rglob("*")} == before
    assert supervisord_config.files_exist(layout, [program()])
    layout.ini.unlink()
    assert not supervisord_config.files_exist(layout, [program()])


def test_missing_run_directory_is_created_private(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "run", tmp_path / "logs")
    supervisord_config.write_files(layout, [program("replica0")])
    assert layout.run.stat().st_mode & 0o777 == 0o700
    assert layout.launch.stat().st_mode & 0o777 == 0o700


def test_half_a_file_is_not_left_behind(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "run", tmp_path / "logs")
    layout.ini.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        supervisord_config.write_files(layout, [])
    assert sorted(path.name for path in layout.run.iterdir()) == ["launch", "supervisord.conf"]


def test_a_program_that_cannot_be_started_is_named_with_the_reason(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "run", tmp_path / "logs")
    programs = [program(name="replica0"), program(name="replica1")]
    supervisord_config.write_files(layout, programs)
    layout.ini.write_text(
        supervisord_config.render(layout, programs).replace("command=", "command=/nowhere", 1)
    )
    # supervisor's own main, as an older fd-dp has started it.
    command = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(layout.ini)]
    with subprocess.Popen(command) as process:
        try:
            wait_until(lambda: answers(layout), "supervisord answers")
            client = Supervisor(layout)
            with pytest.raises(SupervisorError, match=r"startProcess replica0: NO_FILE: .*/nowhere"):
                client.start("replica0")
            layout.output("replica1").parent.rmdir()
            with pytest.raises(SupervisorError, match=r"cannot start replica1: .*dispatchers.*: ENOENT"):
                client.start("replica1")
        finally:
            process.terminate()


# ---- reports


def test_problem_is_reported_with_its_start_until_it_is_solved() -> None:
    now = 1e9
    troubles = Troubles(lambda: now)
    troubles.report("logs", "cannot write /logs: No space left on device")
    first = troubles.lines()
    assert first[0].startswith("cannot write /logs: No space left on device; since ")
    now += 3600
    troubles.report("logs", "cannot write /logs: Read-only file system")
    assert troubles.lines()[0].rpartition(";")[2] == first[0].rpartition(";")[2]
    troubles.report("logs", "")
    assert troubles.lines() == []


def test_a_fault_is_logged_once_with_its_stack_and_again_when_it_returns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    troubles = Troubles()
    for problem in ("internal error", "internal error", "", "internal error"):
        try:
            raise RuntimeError("injected")
        except RuntimeError as fault:
            troubles.report("metrics", problem, fault)
    assert caplog.text.count("RuntimeError: injected") == 2
    assert [line.partition(";")[0] for line in troubles.lines()] == ["internal error"]


def test_a_process_of_another_user_does_not_pass_for_supervisord(tmp_path: Path) -> None:
    ini = tmp_path / "supervisord.conf"
    words = [sys.executable, "-c", "input()", "fd_supervisord", "-c", str(ini)]
    own = subprocess.Popen(words, stdin=subprocess.PIPE)
    try:
        wait_until(lambda: proc.supervisord_of(ini) == own.pid, "the process")
        assert as_nobody(lambda: str(proc.supervisord_of(ini))) == "None"
    finally:
        own.kill()
        own.communicate()


def test_supervisord_needs_no_temporary_directory() -> None:
    if reason := why_not():
        pytest.skip(f"no file system can be mounted: {reason}")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        layout = Layout(Path(name, "run"), Path(name, "logs"))
        supervisord_config.write_files(layout, [program()])
        mounts = "for place in /tmp /var/tmp; do mount -t tmpfs -o ro tmpfs $place || exit; done"
        # The current directory is not writable either.
        command = ["unshare", "-m", "sh", "-c", f'{mounts}; cd /proc; exec "$@"', "sh", sys.executable]
        command += ["-m", "fastdeploy.daemon.fd_supervisord", "-n", "-c", str(layout.ini)]
        with subprocess.Popen(command) as process:
            try:
                wait_until(
                    lambda: answers(layout) or process.poll() is not None, "the daemon answers or ends"
                )
                assert Supervisor(layout).pid() == process.pid
            finally:
                process.terminate()


def test_render_that_cannot_write_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    (tmp_path / "dp.toml").write_text('[model]\npath = "demo"\n')
    command = [str(FDCTL), "--prefix", str(tmp_path), "render", "--write", str(tmp_path / "dp.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{tmp_path}/run" in done.stderr
