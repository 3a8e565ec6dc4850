"""A replica starts and answers while the disk of its logs is full."""

from __future__ import annotations

from pathlib import Path

from ..small_disk import SmallDisk
from .conftest import ApiServer, wait_until


def test_a_replica_starts_and_answers_without_room_for_its_logs(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "disk")
    logs = tmp_path / "disk" / "logs"
    file = disk.path / "logs" / "api_server.log"
    disk.use_up_inodes()
    try:
        with ApiServer(tmp_path, env={"FD_LOG_DIR": str(logs)}, launcher=disk.prefix) as replica:
            replica.wait_ready()

            def is_written() -> bool:
                assert replica.post("/v1/completions", {"prompt": "a", "max_tokens": 4})[0] == 200
                return file.exists() and "(No space left on device)" in file.read_text()

            assert not is_written()
            disk.make_room()
            wait_until(is_written, "what was lost is reported")
            assert replica.stop() == 0
            for name in ("api_server.log", "worker.log"):
                said = f"log file {logs}/{name} cannot be written (No space left on device)"
                assert replica.log().count(said) >= 1
    finally:
        disk.close()
