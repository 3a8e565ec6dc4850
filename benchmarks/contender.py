"""Engines under comparison, each in its own process and, if necessary, its own Python environment.

A contender loads a model, then reads requests as lines of JSON from standard input and writes the results to
standard output: {"do": "decode", "batch": 8, "prompt": 32, "new": 9} yields {"tokens": 64, "started": ...,
"ended": ...}. Contenders can thus take turns within one run without computing at the same time.

This file is imported in every environment, so it uses only the standard library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

_REQUESTS = ("prefill", "decode", "distinct_experts", "exchange", "operations", "copy")


@dataclass(frozen=True, slots=True)
class Timing:
    tokens: int
    #: CLOCK_MONOTONIC, comparable between processes.
    started: float
    ended: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (self.ended - self.started)


def answer_requests(start: Callable[[], object]) -> None:
    """Run the contender's side until end of input.

    Args:
        start: loads the model, and returns an object whose methods answer the requests. Every engine has
            `prefill(tokens)`, which computes a prompt of random tokens and its first new token, and
            `decode(batch, prompt, new)`, which decodes `batch` texts greedily and returns the time from their
            first new token to the last.
    """
    # Redirect output of libraries to standard error.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        contender = start()
        print(json.dumps("ready"), file=answers)
        for line in sys.stdin:
            request = json.loads(line)
            what = request.pop("do")
            if what not in _REQUESTS:
                raise ValueError(f"unknown request {what!r}; known are {', '.join(_REQUESTS)}")
            found = getattr(contender, what)(**request)
            print(json.dumps(asdict(found) if isinstance(found, Timing) else found), file=answers)


class ContenderProcess:
    """The benchmark's side; leaving the context ends the process."""

    def __init__(self, name: str, command: Sequence[str], cwd: str | os.PathLike[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, what: str, **arguments: int) -> Timing:
        return Timing(**self.call(what, **arguments))

    def call(self, what: str, **arguments: int) -> Any:
        self.ask(what, **arguments)
        return self.result()

    def wait_ready(self) -> None:
        if not self._ready:
            self._ready = self.result() == "ready"

    def ask(self, what: str, **arguments: int) -> None:
        self.wait_ready()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """Return the result of the last `ask`."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended with {self._process.wait()}; its words are above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
