"""Dense and grouped products of ERNIE-4.5-21B-A3B against the read bandwidth of the card, beside torch's (cuBLAS).

Weights rotate over more copies than fit the L2 cache; a captured graph goes over all of them, and the median of its
replays counts. Run from the repository's root: python3 -m benchmarks.cuda_product
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable
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
SMALL = (1, 8, 16, 32, 64, 128)


def seconds(enqueue: Callable[[], None], replays: int = 15) -> float:
    """Return the median time of a captured graph of what `enqueue` enqueues."""
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
        assert (
            reader.fd_bench_read(
                stream, ctypes.c_void_p(data.data_ptr()), size, ctypes.c_void_p(sink.data_ptr())
            )
            == 0
        )

    return data.numel() * 4 / seconds(enqueue)


def random_tiles(count: int, outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(count, outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02


def dense(name: str, ceiling: float, tiles: list[int]) -> None:
    outputs, inputs = DENSE[name]
    size = outputs * inputs * 2
    copies = max(2, min(48, int(1e9 / size)))
    weights = random_tiles(copies, outputs, inputs)
    for tokens in (*SMALL, 4096):
        x = torch.randn(fd.round_up(tokens, 64), inputs, device="cuda").bfloat16()
        packed, plain = fd.activations(x), x[:tokens].contiguous()
        count = torch.tensor([tokens], dtype=torch.int32, device="cuda")
        out = torch.empty(tokens, outputs, dtype=torch.bfloat16, device="cuda")
        moved = size + tokens * (inputs + outputs) * 2
        chosen = fd.library().fd_tile(tokens, 1)
        best = {}
        for tile in tiles or [chosen]:
            # More than four tiles across is not what a small tile is for.
            if tokens > 2 * fd.library().fd_tile_tokens(tile) and tile != chosen:
                continue

            def enqueue(tile: int = tile) -> None:
                for copy in weights:
                    fd.product(copy, packed, count, out, outputs, inputs, fd.BFLOAT16, tokens, tile)

            best[tile] = seconds(enqueue) / copies

        def peer() -> None:
            for copy in weights:
                torch.mm(plain, copy.T, out=out)

        torch_time = seconds(peer) / copies
        flops = 2 * tokens * outputs * inputs
        row = "  ".join(
            f"{'*' if t == chosen else ''}{t}: {s * 1e6:.2f} us {moved / s / ceiling:.2f}"
            for t, s in best.items()
        )
        ours = best.get(chosen) or min(best.values(), default=float("nan"))
        print(
            f"{name:15} T={tokens:<5} {row} | torch {torch_time * 1e6:.2f} us {moved / torch_time / ceiling:.2f}"
            f" | chosen {flops / ours / 1e12:.0f} TFLOP/s, torch {flops / torch_time / 1e12:.0f}",
            flush=True,
        )
        del out, x, packed, plain


def grouped(name: str, ceiling: float, tiles: list[int]) -> None:
    outputs, inputs = (2 * WIDTH, HIDDEN) if name == "experts gate+up" else (HIDDEN, WIDTH)
    output = fd.SWIGLU if name == "experts gate+up" else fd.BFLOAT16
    copies = 3
    weights = random_tiles(copies * EXPERTS, outputs, inputs).view(copies, EXPERTS, outputs, inputs)
    torch.manual_seed(0)
    for tokens in (*SMALL, 4096):
        picks = torch.rand(tokens, EXPERTS, device="cuda").topk(PICKS).indices
        count = torch.bincount(picks.flatten(), minlength=EXPERTS).int()
        rows = int((((count + 63) // 64) * 64).sum())
        x = fd.activations(torch.randn(rows, inputs, device="cuda").bfloat16())
        out = torch.empty(
            rows, inputs if output == fd.BFLOAT16 else WIDTH, dtype=torch.bfloat16, device="cuda"
        )
        if output == fd.BFLOAT16:
            out = torch.empty(rows, outputs, dtype=torch.bfloat16, device="cuda")
        active = int((count > 0).sum())
        moved = active * outputs * inputs * 2 + tokens * PICKS * (inputs + out.shape[1]) * 2
        chosen = fd.library().fd_tile(tokens * PICKS, EXPERTS)
        best = {}
        for tile in tiles or [chosen]:
            if tokens * PICKS / EXPERTS > 4 * fd.library().fd_tile_tokens(tile) and tile != chosen:
                continue

            def enqueue(tile: int = tile) -> None:
                for copy in weights:
                    fd.product(copy, x, count, out, outputs, inputs, output, tokens * PICKS, tile)

            best[tile] = seconds(enqueue) / copies
        row = "  ".join(
            f"{'*' if t == chosen else ''}{t}: {s * 1e6:.1f} us {moved / s / ceiling:.2f}"
            for t, s in best.items()
        )
        flops = 2 * tokens * PICKS * outputs * inputs
        ours = best.get(chosen) or min(best.values(), default=float("nan"))
        line = f"{name:15} T={tokens:<5} {active} experts  {row} | chosen {flops / ours / 1e12:.0f} TFLOP/s"
        if hasattr(torch, "_grouped_mm"):
            ends = count.cumsum(0).int()
            plain = torch.randn(tokens * PICKS, inputs, device="cuda").bfloat16()

            def peer() -> None:
                for copy in weights:
                    torch._grouped_mm(plain, copy.transpose(1, 2), offs=ends)

            try:
                torch_time = seconds(peer) / copies
                line += f", torch._grouped_mm {torch_time * 1e6:.1f} us {moved / torch_time / ceiling:.2f}"
            except RuntimeError as problem:
                line += f", torch._grouped_mm: {str(problem).splitlines()[0][:60]}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--all-tiles", action="store_true", help="measure every tile, not only the chosen one"
    )
    parser.add_argument("--dense", action="store_true", help="leave out the experts")
    args = parser.parse_args()
    ceiling = read_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}: reads {ceiling / 1e12:.3f} TB/s; times are us, then the ratio to that"
    )
    tiles = list(range(fd.library().fd_tiles())) if args.all_tiles else []
    for name in DENSE:
        dense(name, ceiling, tiles)
    for name in () if args.dense else ("experts gate+up", "experts down"):
        grouped(name, ceiling, tiles)


if __name__ == "__main__":
    main()
