"""Variables and files that configure libraries do not configure replica, router and daemon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from ..router.conftest import RouterProcess
from .conftest import ApiServer, wait_until

#: Each would stop the start of a server, break its answers, or redirect its requests.
HOSTILE = {
    "PROMETHEUS_MULTIPROC_DIR": "/nonexistent",
    "PROMETHEUS_DISABLE_CREATED_SERIES": "false",
    "WEB_CONCURRENCY": "auto",
    "FORWARDED_ALLOW_IPS": "nobody",
    "PORT": "80",
    "SENDFILE": "maybe",
    "SCRIPT_NAME": "/prefix",
    "GUNICORN_CMD_ARGS": "--bind 127.0.0.1:1 --limit-request-line 10",
    "GUNICORN_PID": "1",
    "GUNICORN_FD": "0",
    "LISTEN_FDS": "1",
    "FLASK_DEBUG": "1",
    "FLASK_APP": "nothing",
    "HTTP_PROXY": "http://127.0.0.1:1",
    "http_proxy": "http://127.0.0.1:1",
    "ALL_PROXY": "http://127.0.0.1:1",
    "REQUESTS_CA_BUNDLE": "/nonexistent",
}


def fill_with_configuration(directory: Path) -> None:
    (directory / "gunicorn.conf.py").write_text("raise SystemExit('read by mistake')\n")
    (directory / ".env").write_text("FLASK_DEBUG=1\n")
    (directory / ".flaskenv").write_text("FLASK_DEBUG=1\n")
    (directory / ".netrc").write_text("machine 127.0.0.1 login a password b\n")


def test_the_environment_changes_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_with_configuration(tmp_path)
    monkeypatch.chdir(tmp_path)
    hostile = {**HOSTILE, "HOME": str(tmp_path), "NETRC": str(tmp_path / ".netrc")}
    router = RouterProcess(tmp_path, env=hostile)
    try:
        with ApiServer(tmp_path, "--router", router.url, env=hostile) as replica:
            replica.wait_ready()
            wait_until(lambda: replica.url in router.urls(), "the replica is registered")
            for url in (replica.url, router.url):
                answer = requests.get(f"{url}/v1/models", timeout=20)
                assert (answer.status_code, answer.json()["object"]) == (200, "list")
                lost = requests.get(f"{url}/nowhere", timeout=20)
                assert (lost.status_code, lost.headers["Content-Type"]) == (404, "application/json")
            assert len(router.workers()) == 1
            assert replica.metric("requests_number_total") == 0.0
            assert (
                "fastdeploy:requests_number_created" not in replica.get("/metrics", replica.metrics_port)[1]
            )
            assert replica.stop() == 0
    finally:
        router.stop()


@pytest.mark.parametrize("name", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
def test_the_daemon_counts_in_its_own_memory(name: str) -> None:
    program = (
        "from fastdeploy.daemon.supervision.metrics import Metrics; print(Metrics().exposition().decode())"
    )
    environment = {**os.environ, name: "/nonexistent"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert 'fd_dp_reloads_total{result="done"} 0.0' in run.stdout
