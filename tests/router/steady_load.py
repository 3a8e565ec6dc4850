"""Clients that send requests continuously and record every failure."""

from __future__ import annotations

import threading
import time

import requests

from .conftest import RouterProcess
from .fake_engine import EVENT_HEAD, Received, answers, events, wait_until


def streams_or_answers(received: Received) -> bool:
    """Answer with a stream that takes a moment, or at once if none is asked for."""
    if b'"stream": true' not in received.body:
        return answers(received)
    received.send(EVENT_HEAD)
    for event in events(received.body):
        received.send_chunk(event)
        time.sleep(0.01)
    received.send(b"0\r\n\r\n")
    return True


class Load:
    """Clients that send requests continuously: on one connection, on new ones, and for streams."""

    def __init__(self, router: RouterProcess, headers: dict[str, str] | None = None) -> None:
        self.answered = 0
        self.problems: list[str] = []
        self._url = f"{router.url}/v1/completions"
        self._headers = headers or {}
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=arguments)
            for arguments in [(True, False), (True, True), (False, False), (False, True)]
        ]

    def wait(self, more: int = 60) -> None:
        goal = self.answered + more
        wait_until(lambda: self.answered >= goal, "requests are answered")

    def _ask(self, keeps_connection: bool, streams: bool) -> None:
        with requests.Session() as session:
            while not self._over.is_set():
                ask = session.post if keeps_connection else requests.post
                try:
                    body = {"prompt": "x", "stream": streams}
                    answer = ask(self._url, json=body, headers=self._headers, timeout=20)
                    text = answer.text
                except requests.RequestException as error:
                    self.problems.append(repr(error))
                    continue
                if answer.status_code != 200 or (streams and not text.endswith("data: [DONE]\n\n")):
                    self.problems.append(f"{answer.status_code} {text[-100:]}")
                self.answered += 1

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)


def requests_counted(router: RouterProcess) -> int:
    lines = [line for line in router.metric("http_requests_total") if "/v1/completions" in line]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines))
