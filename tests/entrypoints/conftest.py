"""A real replica of the tiny checkpoint: arbiter, HTTP process and worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from fastdeploy.common.process_control import die_with_parent

from ..ports import free_ports
from ..waiting import wait_until as _wait_until

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny"
#: The tiny checkpoint has no template.
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
MAX_MODEL_LEN = 512


wait_until = partial(_wait_until, deadline=60.0)


class ApiServer:
    """One api_server process and its children."""

    def __init__(
        self, logs: Path, *flags: str, env: dict[str, str] | None = None, launcher: Sequence[str] = ()
    ) -> None:
        """`launcher` is a command prefix that executes the command after it."""
        self.port, self.metrics_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = logs / "out"
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [
                    *launcher,
                    *(sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server"),
                    *(
                        "--model",
                        str(TINY),
                        "--port",
                        str(self.port),
                        "--metrics-port",
                        str(self.metrics_port),
                    ),
                    *("--max-model-len", str(MAX_MODEL_LEN), "--num-gpu-blocks-override", "32"),
                    *("--chat-template", CHAT_TEMPLATE, "--threads", "1", *flags),
                ],
                stdout=out,
                stderr=out,
                env={**os.environ, "FD_LOG_DIR": str(logs), **(env or {})},
                start_new_session=True,
                # The server must die even if the tests themselves are killed.
                preexec_fn=partial(die_with_parent, os.getpid()),
            )

    def wait_ready(self) -> ApiServer:
        wait_until(lambda: self.process.poll() is not None or self.health()[0] == 200, "ready")
        assert self.process.poll() is None, self.log()
        return self

    def health(self, timeout: float = 30) -> tuple[int, dict[str, Any]]:
        """Return status and body; status 0 without an answer in `timeout` seconds."""
        status, body = self.get("/health", timeout=timeout)
        return status, json.loads(body) if body else {}

    def get(self, path: str, port: int | None = None, timeout: float = 30) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port or self.port}{path}", timeout=timeout
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        """Send `body`, as JSON unless it is bytes; return status and answer."""
        request = urllib.request.Request(
            self.url + path,
            body if isinstance(body, bytes) else json.dumps(body).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def metric(self, name: str) -> float:
        status, text = self.get("/metrics", self.metrics_port)
        assert status == 200
        values = [line.split()[1] for line in text.splitlines() if line.startswith(f"fastdeploy:{name} ")]
        assert values, f"no metric fastdeploy:{name}"
        return float(values[0])

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def children(self) -> list[psutil.Process]:
        """Return the HTTP process, then its worker."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> ApiServer:
        return self

    def __exit__(self, *_: object) -> None:
        children = self.children() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        alive = psutil.wait_procs(children, timeout=30)[1]
        assert not alive, f"left behind: {alive}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("server"), "--served-model-name", "tiny") as running:
        yield running.wait_ready()
