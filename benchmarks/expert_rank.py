"""A rank that only exchanges tokens with others, as a contender (contender.py)."""

from __future__ import annotations

import argparse
import atexit
import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastdeploy.common.paddle_import import import_paddle
from fastdeploy.core.cpu_share import SINGLE_THREADED

from .contender import Timing, answer_requests

HIDDEN, EXPERTS, TOP_K = 2560, 64, 6
ELEMENT_BYTES = 2  # bfloat16


class Rank:
    """One rank. All ranks of a group must receive the same requests at the same time."""

    def __init__(self, group: str, seat: int, num_seats: int, max_tokens: int) -> None:
        # Paddle reads these on import.
        os.environ.update(SINGLE_THREADED)
        import_paddle()
        import paddle

        from fastdeploy import custom_ops
        from fastdeploy.device.paddle_cpu import keep_freed_memory
        from fastdeploy.expert_parallel.join import join
        from fastdeploy.expert_parallel.layout import GroupLayout
        from fastdeploy.expert_parallel.options import GroupOptions

        keep_freed_memory()
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // num_seats)
        custom_ops.set_threads(threads)
        layout = GroupLayout(num_seats, 1, EXPERTS, max_tokens, TOP_K, HIDDEN)
        options = GroupOptions(group, seat, spin=threads * num_seats <= cores)
        self._group = join(options, layout, {}, lambda mine, taken: None)
        atexit.register(self._group.close)
        while len(self._group.status().active_ranks) < num_seats:
            self._group.wakeups.poll(0.1)
            self._group.handle_wakeups()
        random = np.random.default_rng(seat)
        topk_ids = np.argsort(random.random((max_tokens, EXPERTS)), axis=1)[:, :TOP_K]
        self._x = paddle.to_tensor(random.random((max_tokens, HIDDEN), np.float32)).astype("bfloat16")
        self._topk_ids = paddle.to_tensor(topk_ids.astype(np.int32))
        self._topk_weights = paddle.full([max_tokens, TOP_K], 1 / TOP_K, "float32")
        self._out = paddle.zeros([max_tokens, HIDDEN], "float32")
        self._num_seats = num_seats
        self._max_rows = num_seats * max_tokens * TOP_K

    def operations(self, tokens: int, rounds: int) -> Timing:
        """Dispatch and combine unchanged rows with Paddle's operations, `rounds` times."""
        from fastdeploy import custom_ops

        handle = self._group.handle
        x, topk_ids = self._x[:tokens], self._topk_ids[:tokens]
        topk_weights = self._topk_weights[:tokens]

        def operations() -> None:
            for _ in range(rounds):
                custom_ops.ep_dispatch_send(x, topk_ids, handle, 0)
                rows, _, _ = custom_ops.ep_dispatch_receive(x, handle, 0)
                custom_ops.ep_combine_send(rows, handle)
                custom_ops.ep_combine_receive(topk_weights, x, handle)

        return self._timed(tokens, rounds, operations)

    def exchange(self, tokens: int, rounds: int) -> Timing:
        """The same through the C++ interface. Rows are received where results belong."""
        native, x, topk_ids = self._group.native, self._x.data_ptr(), self._topk_ids.data_ptr()
        topk_weights, out = self._topk_weights.data_ptr(), self._out.data_ptr()
        rows = native.result_rows(self._max_rows, ELEMENT_BYTES)

        def functions() -> None:
            for _ in range(rounds):
                count = native.dispatch(0, x, topk_ids, tokens, ELEMENT_BYTES, rows)
                native.combine(rows, count, topk_weights, tokens, ELEMENT_BYTES, out)

        return self._timed(tokens, rounds, functions)

    def copy(self, tokens: int, rounds: int) -> Timing:
        """Copy, on all cores, the bytes that all ranks send and receive. Ask only one rank."""
        cores = len(os.sched_getaffinity(0))
        size = self._num_seats * tokens * TOP_K * HIDDEN * ELEMENT_BYTES
        source, target = (np.ones(size, np.uint8) for _ in range(2))
        starts = [size * core // cores for core in range(cores + 1)]

        def copy_part(core: int) -> None:
            start, end = starts[core], starts[core + 1]
            for _ in range(2 * rounds):
                # Releases the interpreter's lock.
                ctypes.memmove(target.ctypes.data + start, source.ctypes.data + start, end - start)

        with ThreadPoolExecutor(cores) as pool:
            started = time.monotonic()
            list(pool.map(copy_part, range(cores)))
            return Timing(tokens * rounds, started, time.monotonic())

    def _timed(self, tokens: int, rounds: int, work: Callable[[], None]) -> Timing:
        # Synchronises the ranks.
        self._group.run_step(1, lambda: None)
        started = time.monotonic()
        self._group.run_step(tokens, work)
        return Timing(tokens * rounds, started, time.monotonic())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", required=True)
    parser.add_argument("--seat", type=int, required=True)
    parser.add_argument("--num-seats", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    arguments = parser.parse_args()
    answer_requests(lambda: Rank(arguments.group, arguments.seat, arguments.num_seats, arguments.max_tokens))


if __name__ == "__main__":
    main()
