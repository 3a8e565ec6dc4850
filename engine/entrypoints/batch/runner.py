"""Answers requests side by side and writes the results in the order of the requests."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from .files import OutputFile
from .requests import Request, problem_line
from .targets import Target

#: Requests that have begun and whose results are not written, for each one that is in progress: a long answer
#: delays the writing of those after it.
_WINDOW = 4


def run_batch(
    requests: Iterable[tuple[int, Request]],
    output: OutputFile,
    target: Target,
    concurrency: int,
    advance: Callable[[int], None],
) -> None:
    """Answer all requests.

    Args:
        requests: with their numbers; read as they are needed.
        concurrency: maximum number of requests in progress.
        advance: called with the number of results that have been written.

    Raises:
        FastDeployError: see `Target.answer`; the results before this request are written.
        OSError: the output cannot be written.
    """
    work: queue.SimpleQueue[tuple[Future[bytes], int, Request]] = queue.SimpleQueue()
    for _ in range(concurrency):
        # Daemons, because a request that waits for a server must not delay the end of the process.
        threading.Thread(target=_answer_all, args=(work, target), daemon=True).start()
    window: deque[Future[bytes]] = deque()

    def write_first() -> None:
        output.append(window[0].result())
        window.popleft()
        advance(1)

    for number, request in requests:
        future: Future[bytes] = Future()
        window.append(future)
        if request.problem:
            future.set_result(problem_line(request))
        else:
            work.put((future, number, request))
        while window and (window[0].done() or len(window) >= _WINDOW * concurrency):
            write_first()
    while window:
        write_first()


def _answer_all(work: queue.SimpleQueue[tuple[Future[bytes], int, Request]], target: Target) -> None:
    while True:
        future, number, request = work.get()
        try:
            future.set_result(target.answer(number, request))
        except BaseException as error:
            future.set_exception(error)
