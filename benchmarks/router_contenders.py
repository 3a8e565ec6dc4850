"""The compared routers, each started according to its manual, in front of the same engines."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from fastdeploy.common.ports import find_free

from .environments import NotInstalledError
from .mock_engines import Heartbeat, MockEngines
from .router_peers import installed

_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_BODY = {"model": "mock", "messages": [{"role": "user", "content": "hello"}]}

_NGINX = """
worker_processes auto;
worker_rlimit_nofile 20000;
daemon off;
pid nginx.pid;
error_log stderr error;
events { worker_connections 10000; }
http {
    client_body_temp_path client_body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    access_log off;
    upstream replicas {
        zone replicas 256k;
        least_conn;
        SERVERS
        keepalive 1024;
    }
    server {
        listen 127.0.0.1:PORT backlog=4096;
        keepalive_requests 100000000;
        client_body_buffer_size 64k;
        location / {
            proxy_pass http://replicas;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 1h;
        }
    }
}
"""


class ContenderError(Exception):
    """A router cannot be started or does not serve; the message is one line."""


@dataclass(frozen=True, slots=True)
class Place:
    """Ports of a router and its engines."""

    port: int
    directory: Path
    engines: MockEngines
    #: The fd-router under test.
    fd_router: Path


def _ours(place: Place) -> list[str]:
    return [str(place.fd_router), "--port", str(place.port)]


def _two_workers(place: Place) -> list[str]:
    return [*_ours(place), "--workers", "2"]


def _sglang(place: Place) -> list[str]:
    return [str(installed("sglang-router")), "launch", *_rust_flags(place)]


def _sglang_quiet(place: Place) -> list[str]:
    """Disable its log of two lines per request."""
    return [*_sglang(place), "--log-level", "warn"]


def _vllm(place: Place) -> list[str]:
    return [str(installed("vllm-router")), *_rust_flags(place)]


def _vllm_quiet(place: Place) -> list[str]:
    return [*_vllm(place), "--log-level", "warning"]


def _rust_flags(place: Place) -> list[str]:
    return [
        *("--host", "127.0.0.1", "--port", str(place.port)),
        *("--prometheus-port", str(find_free(1)[0]), "--policy", "power_of_two"),
        *("--worker-urls", *place.engines.urls),
    ]


def _nginx(place: Place) -> list[str]:
    path = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        raise ContenderError("nginx is not installed: apt-get install nginx-light")
    servers = "\n".join(f"server 127.0.0.1:{port} max_fails=0;" for port in place.engines.ports)
    config = place.directory / "nginx.conf"
    config.write_text(_NGINX.replace("SERVERS", servers).replace("PORT", str(place.port)))
    return [path, "-p", str(place.directory), "-e", "stderr", "-c", str(config)]


COMMANDS: dict[str, Callable[[Place], list[str]]] = {
    "ours": _ours,
    "ours2": _two_workers,
    "sglang": _sglang,
    "sglang_quiet": _sglang_quiet,
    "vllm": _vllm,
    "vllm_quiet": _vllm_quiet,
    "nginx": _nginx,
}
#: No router: the speed of engines and load generator, and the baseline of added latency.
DIRECT = "direct"


class RunningRouter:
    """A router that serves, with all engines known to it. `direct` is the first engine itself.

    Raises:
        ContenderError: the router does not start.
    """

    def __init__(self, name: str, engines: MockEngines, directory: Path, fd_router: Path) -> None:
        self.name = name
        self._engines = engines
        self._process: subprocess.Popen[bytes] | None = None
        self._heartbeat: Heartbeat | None = None
        self._log = directory / "output.log"
        if name == DIRECT:
            self.port = engines.ports[0]
            return
        self.port = find_free(1)[0]
        try:
            command = COMMANDS[name](Place(self.port, directory, engines, fd_router))
        except NotInstalledError as error:
            raise ContenderError(str(error)) from None
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=directory,
                env={**os.environ, "FD_LOG_DIR": str(directory)},
                start_new_session=True,
            )
        try:
            self._wait_until_it_serves()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int | None:
        """Pid of the root process; None for `direct`."""
        return self._process.pid if self._process else None

    def require_alive(self) -> None:
        """
        Raises:
            ContenderError: the router has ended.
        """
        if self._process is not None and self._process.poll() is not None:
            raise ContenderError(f"ended with {self._process.returncode}: {self._last_words()}")

    def stop(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                print(f"{self.name} does not end within {_STOP_SECONDS:g} s of SIGTERM: killed", flush=True)
        # Kill the rest of its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait_until_it_serves(self) -> None:
        """Wait until as many consecutive requests as there are engines have succeeded."""
        url = f"http://127.0.0.1:{self.port}"
        end = time.monotonic() + _START_SECONDS
        in_a_row, last = 0, "nothing has been heard"
        with requests.Session() as session:
            while in_a_row < len(self._engines.ports):
                self.require_alive()
                if time.monotonic() > end:
                    raise ContenderError(f"does not serve after {_START_SECONDS:g} s ({last})")
                try:
                    if self.name.startswith("ours"):
                        self._register(url)
                    answer = session.post(f"{url}/v1/chat/completions", json=_BODY, timeout=5)
                    last = f"{answer.status_code} {answer.text[:200]}"
                    if answer.status_code == 200:
                        in_a_row += 1
                        continue
                except requests.RequestException as error:
                    last = str(error)
                in_a_row = 0
                time.sleep(0.1)

    def _register(self, url: str) -> None:
        if self._heartbeat is None:
            self._engines.register_with(url)
            self._heartbeat = Heartbeat(self._engines, url)

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "without a word"


def default_fd_router() -> Path:
    return Path(sys.executable).with_name("fd-router")
