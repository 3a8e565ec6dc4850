"""The router survives full, read-only and removed files and directories, and repairs what it can."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import requests

from ..ports import free_ports
from ..small_disk import SmallDisk, unprivileged
from .conftest import FD_ROUTER, RouterProcess
from .fake_engine import FakeEngine, streams_for_ever, wait_until
from .raw_client import RawClient
from .steady_load import requests_counted
from .test_upgrade import upgraded


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


def order(path: Path, words: str) -> int | None:
    """Return the status of an order over the admin socket, or None if nothing listens there."""
    try:
        with RawClient(path) as client:
            client.send(f"POST /admin/replicas/{words} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            return int(client.answer().status)
    except OSError:
        return None


def lines(router: RouterProcess, *words: str) -> list[str]:
    """Return the lines of the log that contain all these words."""
    return [line for line in router.log.read_text().splitlines() if all(word in line for word in words)]


def saved(path: Path) -> list[bool]:
    """Return for each replica in the registry file whether it is draining."""
    try:
        return [entry.get("draining", False) for entry in json.loads(path.read_text())["instances"]]
    except FileNotFoundError:
        return []


# ---- counters, and gunicorn's files for its workers


def test_nothing_of_a_killed_router_stays_in_temporary_directories(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    shared = set(os.listdir("/dev/shm"))
    router = start_router(env={"TMPDIR": str(temporary)})
    router.add(new_engine())
    assert router.complete().status_code == 200
    assert list(temporary.iterdir()) == []
    [worker] = router.workers()
    for pid in (router.process.pid, worker.pid):
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
        assert [link for link in links if link.startswith(("/tmp/wgunicorn", "/dev/shm"))] == []
    router.process.kill()
    router.process.wait(20)
    assert list(temporary.iterdir()) == []
    assert set(os.listdir("/dev/shm")) <= shared


def test_removed_temporary_directories_cost_neither_counts_nor_workers(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    router = start_router(env={"TMPDIR": str(temporary)})
    router.add(new_engine())
    assert router.complete().status_code == 200
    wait_until(lambda: requests_counted(router) == 1, "the request is counted")
    shutil.rmtree(temporary)
    [old] = router.workers()
    old.kill()
    wait_until(lambda: [each for each in router.workers() if each.pid != old.pid], "there is a new worker")
    wait_until(lambda: requests_counted(router) == 1, "the new router has the old counts")
    router.process.send_signal(signal.SIGHUP)
    wait_until(lambda: lines(router, "reload: done"), "the reload is done")
    assert requests_counted(router) == 1


# ---- the admin socket


@pytest.mark.parametrize("removed", ["the socket", "its directory"])
def test_removed_admin_socket_is_recreated(
    start_router: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    tmp_path: Path,
    removed: str,
) -> None:
    admin = tmp_path / "run" / "router.sock"
    admin.parent.mkdir(mode=0o750)
    router = start_router("--workers", "2", "--admin-socket", str(admin))
    router.add(new_engine(replica=3))
    assert order(admin, "3/drain") == 200
    if removed == "the socket":
        admin.unlink()
    else:
        shutil.rmtree(admin.parent)
    wait_until(admin.exists, "the socket is there again")
    assert (admin.stat().st_mode & 0o777, admin.parent.stat().st_mode & 0o777) == (0o660, 0o750)
    # Enough connections to reach each worker.
    for _ in range(10):
        wait_until(lambda: order(admin, "3/undrain") == 200, "a worker answers")
    assert len(lines(router, "admin socket", "was missing")) == 1
    for worker in router.workers():
        worker.kill()
    wait_until(lambda: order(admin, "3/drain") == 200, "workers that start later have it")
    router.process.send_signal(signal.SIGTERM)
    assert router.process.wait(30) == 0
    assert not admin.exists()
    assert lines(router, "Traceback") == []


def test_router_without_its_admin_socket_stops_cleanly(
    start_router: Callable[..., RouterProcess], tmp_path: Path
) -> None:
    admin = tmp_path / "run" / "router.sock"
    admin.parent.mkdir()
    router = start_router("--admin-socket", str(admin), launcher=unprivileged())
    admin.unlink()
    admin.parent.chmod(0o500)
    wait_until(lambda: lines(router, "cannot be made (Permission denied)"), "the message is logged")
    router.process.send_signal(signal.SIGTERM)
    assert router.process.wait(30) == 0
    assert lines(router, "Traceback") == []


def test_admin_socket_is_created_when_its_disk_permits(
    start_router: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    tmp_path: Path,
    disk: SmallDisk,
) -> None:
    admin = tmp_path / "disk" / "router.sock"
    outside = disk.path / "router.sock"
    # The socket that a killed router leaves behind.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(outside))
    disk.make_read_only()
    router = start_router("--admin-socket", str(admin), launcher=disk.prefix)
    router.add(new_engine(replica=3))
    wait_until(lambda: lines(router, "cannot be made (Read-only file system)"), "the message is logged")
    disk.make_writable()
    wait_until(lambda: order(outside, "3/drain") == 200, "there is a socket again")
    outside.unlink()
    disk.use_up_inodes()
    wait_until(lambda: lines(router, "cannot be made (No space left on device)"), "the message is logged")
    assert router.complete().status_code == 503, "its one replica is drained"
    disk.make_room()
    wait_until(lambda: order(outside, "3/undrain") == 200, "there is a socket again")
    assert router.complete().status_code == 200
    assert len(lines(router, "cannot be made")) == 2


def test_admin_socket_taken_over_by_another_program_is_kept_by_it(
    start_router: Callable[..., RouterProcess], tmp_path: Path
) -> None:
    admin = tmp_path / "router.sock"
    first = start_router("--admin-socket", str(admin))
    # The second router takes over the path, as if from a dead router.
    second = RouterProcess(tmp_path, "--admin-socket", str(admin), env={"FD_LOG_DIR": str(tmp_path / "2")})
    try:
        wait_until(lambda: lines(first, "listens on admin socket"), "the message is logged")
        identity = admin.stat().st_ino
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(30) == 0
        assert admin.stat().st_ino == identity
        assert order(admin, "3/drain") == 404
    finally:
        second.stop()


def test_an_admin_socket_is_taken_back_from_a_program_that_was_killed(
    start_router: Callable[..., RouterProcess], tmp_path: Path
) -> None:
    admin = tmp_path / "router.sock"
    router = start_router("--admin-socket", str(admin))
    other = RouterProcess(tmp_path, "--admin-socket", str(admin), env={"FD_LOG_DIR": str(tmp_path / "2")})
    wait_until(lambda: lines(router, "another program", "listens on admin socket"), "the message is logged")
    other.stop(signal.SIGKILL)
    wait_until(lambda: order(admin, "3/drain") == 404, "the first router has the path again")
    assert len(lines(router, "another program", "listens on admin socket")) == 1


def seconds_runnable(pid: int) -> float:
    """Return the time that the process ran or waited for a processor, which other load does not hide."""
    running, waiting, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    return (int(running) + int(waiting)) / 1e9


def test_a_worker_that_drains_does_not_spin_for_a_new_admin_socket(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    admin = tmp_path / "router.sock"
    router = start_router("--admin-socket", str(admin))
    router.add(new_engine(behaviour=streams_for_ever))
    (old,) = router.workers()
    with router.complete(body={"stream": True}, stream=True) as stream:
        pieces = stream.iter_content(1)
        assert next(pieces)
        router.process.send_signal(signal.SIGHUP)
        wait_until(lambda: lines(router, "reload: done"), "a new worker serves")
        admin.unlink()
        wait_until(lambda: order(admin, "3/drain") == 404, "the new router has the admin socket")
        before = seconds_runnable(old.pid)
        time.sleep(1.0)
        assert seconds_runnable(old.pid) - before < 0.5
        assert old.is_running()


def test_removed_admin_socket_is_recreated_after_an_upgrade(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    admin = tmp_path / "router.sock"
    router = start_router("--admin-socket", str(admin))
    router.add(new_engine(replica=3))
    with upgraded(router):
        admin.unlink()
        router.process.send_signal(signal.SIGTERM)
        assert router.process.wait(30) == 0
        wait_until(lambda: order(admin, "3/drain") == 200, "the successor has made it again")


# ---- the registry file


@pytest.fixture
def start_with_registry(
    start_router: Callable[..., RouterProcess], tmp_path: Path
) -> Callable[..., RouterProcess]:
    """Starts a router with an admin key and this registry file, initially of two replicas."""
    keys = tmp_path / "keys"
    keys.write_text("alpha\n")

    def start(file: Path, prefix: Sequence[str] = ()) -> RouterProcess:
        flags = ["--registry-file", str(file), "--admin-keys-file", str(keys)]
        return start_router(*flags, "--health-check-interval-secs", "0.2", launcher=prefix)

    return start


def drain(router: RouterProcess, name: str) -> int:
    url, headers = f"{router.url}/admin/replicas/{name}/drain", {"Authorization": "Bearer alpha"}
    return requests.post(url, headers=headers, timeout=20).status_code


def test_registrations_on_a_full_disk_are_saved_later(
    start_with_registry: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    tmp_path: Path,
    disk: SmallDisk,
) -> None:
    router = start_with_registry(tmp_path / "disk" / "registry.json", disk.prefix)
    router.add(new_engine(replica=0), new_engine(replica=1))
    file = disk.path / "registry.json"
    wait_until(lambda: saved(file) == [False, False], "both are saved")
    disk.fill()
    assert drain(router, "0") == 200
    wait_until(
        lambda: lines(router, "registry file", "cannot be written (No space left"), "the message is logged"
    )
    assert saved(file) == [False, False], "readers see the old file or the new one"
    assert router.complete().headers["X-FD-Replica"] == "1"
    disk.make_room()
    wait_until(lambda: saved(file) == [True, False], "the drain is saved")
    wait_until(lambda: lines(router, "registry file", "is written again"), "the message is logged")
    assert len(lines(router, "registry file", "cannot be written")) == 1
    assert [each.name for each in disk.path.iterdir()] == ["registry.json"]


def test_registrations_on_a_read_only_disk_are_saved_later(
    start_with_registry: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    tmp_path: Path,
    disk: SmallDisk,
) -> None:
    """The disk may be read-only from the router's start."""
    disk.make_read_only()
    router = start_with_registry(tmp_path / "disk" / "state" / "registry.json", disk.prefix)
    router.add(new_engine(replica=0))
    assert drain(router, "0") == 200
    wait_until(
        lambda: lines(router, "registry file", "cannot be written (Read-only"), "the message is logged"
    )
    disk.make_writable()
    wait_until(lambda: saved(disk.path / "state" / "registry.json") == [True], "the registry is saved")


@pytest.mark.parametrize("removed", ["the file", "its directory"])
def test_a_removed_registry_file_is_written_again(
    start_with_registry: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    tmp_path: Path,
    removed: str,
) -> None:
    file = tmp_path / "state" / "registry.json"
    router = start_with_registry(file)
    router.add(new_engine(replica=0))
    assert drain(router, "0") == 200
    wait_until(lambda: saved(file) == [True], "the registry is saved")
    if removed == "the file":
        file.unlink()
    else:
        shutil.rmtree(file.parent)
    wait_until(lambda: saved(file) == [True], "the registry is saved again")


def test_a_registry_file_without_permission_is_saved_when_it_has_one(
    start_with_registry: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    file = tmp_path / "state" / "registry.json"
    router = start_with_registry(file, unprivileged())
    file.parent.chmod(0o500)
    router.add(new_engine(replica=0))
    assert drain(router, "0") == 200
    wait_until(
        lambda: lines(router, "registry file", "cannot be written (Permission denied)"), "that is said"
    )
    file.parent.chmod(0o700)
    wait_until(lambda: saved(file) == [True], "the registry is saved")
    file.chmod(0)
    wait_until(lambda: file.stat().st_mode & 0o777 == 0o600, "one that cannot be read is replaced")


# ---- the log, and the start


def test_requests_are_served_while_the_log_disk_is_full(
    start_router: Callable[..., RouterProcess],
    new_engine: Callable[..., FakeEngine],
    tmp_path: Path,
    disk: SmallDisk,
) -> None:
    logs = tmp_path / "disk" / "logs"
    router = start_router("--workers", "2", env={"FD_LOG_DIR": str(logs)}, launcher=disk.prefix)
    router.log = disk.path / "logs" / "router.log"
    router.add(new_engine())
    disk.fill()
    for _ in range(40):
        assert router.complete().status_code == 200
    [old, _] = router.workers()
    old.kill()
    wait_until(lambda: len(router.workers()) == 2, "there is a new worker")
    disk.make_room()
    wait_until(
        lambda: router.complete().status_code == 200 and lines(router, "lines lost since"),
        "lines are written again, and it is said how many were lost",
    )


def refused(*flags: str, **env: str) -> tuple[int, str]:
    [port] = free_ports(1)
    ended = subprocess.run(
        [*unprivileged(), str(FD_ROUTER), "--port", str(port), *flags],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, **env},
    )
    return ended.returncode, ended.stderr


def test_a_directory_that_cannot_be_written_is_named_at_the_start(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir(mode=0o500)
    for flags, code, words in (
        (
            ["--registry-file", f"{directory}/registry.json"],
            2,
            f"--registry-file {directory}/registry.json: must be in a directory that can be written "
            "(Permission denied)",
        ),
        (
            ["--admin-socket", f"{directory}/socket"],
            5,
            f"--admin-socket {directory}/socket: cannot be made (permission denied); its directory "
            "must exist and be writable",
        ),
    ):
        assert refused(*flags, FD_LOG_DIR=str(tmp_path)) == (code, f"fd-router: {words}\n")
    assert refused(FD_LOG_DIR=str(directory)) == (
        2,
        f"fd-router: FD_LOG_DIR is '{directory}'; it must be a directory for logs (Permission denied)\n",
    )
