"""Dense and grouped products of ERNIE-4.5-21B-A3B against the read bandwidth and torch.

A captured graph uses more copies of the weights than fit into the L2 cache; the result is the median of its
replays. Run it from the repository root: python3 -m benchmarks.cuda_product
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from tests.device import library as fd

HIDDEN, EXPERTS, PICKS, WIDTH = 2560, 64, 6, 1536
DENSE = {
    "qkv": (3584, HIDDEN),
    "attention out": (HIDDEN, HIDDEN),
    "shared gate+up": (6144, HIDDEN),
    "shared down": (HIDDEN, 3072),
    "head": (103424, HIDDEN),
}
GROUPED = {
    "experts gate+up": ((2 * WIDTH, HIDDEN), fd.SWIGLU),
    "experts down": ((HIDDEN, WIDTH), fd.BFLOAT16),
}
TOKENS = (1, 8, 16, 32, 64, 128, 4096)


def seconds(enqueue: Callable[[], None], replays: int = 15) -> float:
    """Return the median time of a graph captured from `enqueue`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        enqueue()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            enqueue()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(replays):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Return bytes per second of a plain read of 8 GB."""
    reader = ctypes.CDLL(str(Path(fd.LIBRARY).with_name("libfd_bench.so").resolve()))
    data = torch.randint(0, 2**31 - 1, (2**31,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    size = ctypes.c_int64(data.numel() * 4)

    def enqueue() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        address, place = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(sink.data_ptr())
        assert reader.fd_bench_read(stream, address, size, place) == 0

    return data.numel() * 4 / seconds(enqueue)


def random_matrices(count: int, outputs: int, inputs: int) -> torch.Tensor:
    return torch.empty(count, outputs, inputs, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)


class Case:
    """One product at one number of rows, over all copies of its weights."""

    def __init__(self, weights: torch.Tensor, count: torch.Tensor, output: int) -> None:
        self.weights, self.count, self.output = weights, count, output
        self.outputs, self.inputs = weights.shape[-2:]
        self.tokens = int(count.sum())
        rows = int(((count + 63) // 64 * 64).sum())
        self.plain = torch.randn(self.tokens, self.inputs, device="cuda").bfloat16()
        self.x = fd.activations(torch.randn(rows, self.inputs, device="cuda").bfloat16())
        self.width = self.outputs // 2 if output == fd.SWIGLU else self.outputs
        self.out = torch.empty(rows, self.width, dtype=torch.bfloat16, device="cuda")
        self.chosen = fd.library().fd_tile(self.tokens, len(count))

    def bytes(self) -> int:
        read = int((self.count > 0).sum()) * self.outputs * self.inputs
        return 2 * (read + self.tokens * (self.inputs + self.width))

    def flops(self) -> int:
        return 2 * self.tokens * self.outputs * self.inputs

    def ours(self, tile: int) -> None:
        for copy in self.weights:
            fd.product(
                copy, self.x, self.count, self.out, self.outputs, self.inputs, self.output, self.tokens, tile
            )

    def cublas(self) -> None:
        out = self.out[: self.tokens]
        for copy in self.weights:
            torch.mm(self.plain, copy.T, out=out)

    def grouped_mm(self) -> None:
        ends = self.count.cumsum(0).int()
        for copy in self.weights:
            torch._grouped_mm(self.plain, copy.transpose(1, 2), offs=ends)

    def report(self, name: str, ceiling: float, tiles: Iterable[int], peer: Callable[[], None]) -> None:
        def cell(label: str, time: float) -> str:
            rate = self.flops() / time / 1e12
            return f"{label} {time * 1e6:.1f} us {self.bytes() / time / ceiling:.2f} {rate:.0f} TFLOP/s"

        copies, mean = len(self.weights), self.tokens / len(self.count)
        cells = []
        for tile in tiles or [self.chosen]:
            # Small tiles are not meant for many rows.
            if tile == self.chosen or mean <= 2 * fd.library().fd_tile_tokens(tile):
                time = seconds(partial(self.ours, tile)) / copies
                cells.append(cell(f"{'*' if tile == self.chosen else ''}tile {tile}:", time))
        cells.append(cell("torch:", seconds(peer) / copies))
        print(f"{name}: " + " | ".join(cells), flush=True)


def dense(name: str, ceiling: float, tiles: Iterable[int]) -> None:
    outputs, inputs = DENSE[name]
    weights = random_matrices(max(2, min(48, int(1e9 / (outputs * inputs * 2)))), outputs, inputs)
    for tokens in TOKENS:
        case = Case(weights, fd.counts(tokens), fd.BFLOAT16)
        case.report(f"{name} T={tokens}", ceiling, tiles, case.cublas)


def grouped(name: str, ceiling: float, tiles: Iterable[int]) -> None:
    (outputs, inputs), output = GROUPED[name]
    weights = random_matrices(3 * EXPERTS, outputs, inputs).view(3, EXPERTS, outputs, inputs)
    torch.manual_seed(0)
    for tokens in TOKENS:
        topk_ids = torch.rand(tokens, EXPERTS, device="cuda").topk(PICKS).indices
        count = torch.bincount(topk_ids.flatten(), minlength=EXPERTS).int()
        case = Case(weights, count, output)
        active = int((count > 0).sum())
        case.report(f"{name} T={tokens}, {active} experts", ceiling, tiles, case.grouped_mm)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--all-tiles", action="store_true", help="measure all tiles, not only the selected one"
    )
    args = parser.parse_args()
    ceiling = read_bandwidth()
    print(f"{torch.cuda.get_device_name()} reads {ceiling / 1e12:.3f} TB/s: times and ratios to that")
    tiles = range(fd.library().fd_tiles()) if args.all_tiles else ()
    for name in DENSE:
        dense(name, ceiling, tiles)
    for name in GROUPED:
        grouped(name, ceiling, tiles)


if __name__ == "__main__":
    main()
