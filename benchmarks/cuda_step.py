"""Decode steps and prompts of a random ERNIE-4.5-21B-A3B against the memory bandwidth limit.

A decode step is one captured graph of all 28 layers, head and greedy draw. The limit is the time to read the
KV cache and the weights of the selected experts once, at the bandwidth measured in the same run. Run it from
the repository root: python3 -m benchmarks.cuda_step
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from tests.device import library as fd

from benchmarks.cuda_product import read_bandwidth, seconds

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 28, 2560, 20, 4, 128, 103424
DENSE_WIDTH, EXPERTS, PICKS, EXPERT_WIDTH, SHARED_WIDTH = 12288, 64, 6, 1536, 3072
QKV_WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM
BLOCK = 64
#: For these numbers of tokens, shared and selected experts are computed together, as in
#: engine/device/cuda_operations.py.
PAIRED = range(4, 9)


def matrix(outputs: int, inputs: int, count: int = 1) -> torch.Tensor:
    size = fd.library().fd_matrix_bytes(None, outputs, inputs) // 2
    return torch.empty(count, size, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)


def activations(rows: int, width: int) -> torch.Tensor:
    return torch.zeros(fd.round_up(rows, 64), width, dtype=torch.bfloat16, device="cuda")


class Model:
    """Random weights, different for each layer, so that the L2 cache does not help."""

    def __init__(self, layers: int) -> None:
        self.layers = [self._layer(i) for i in range(layers)]
        self.table = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, device="cuda").normal_()
        self.head = matrix(VOCABULARY, HIDDEN)
        self.ones = torch.ones(HIDDEN, device="cuda")

    @staticmethod
    def _layer(index: int) -> dict[str, torch.Tensor]:
        layer = {"qkv": matrix(QKV_WIDTH, HIDDEN), "out": matrix(HIDDEN, HEADS * HEAD_DIM)}
        if index == 0:
            return {**layer, "gate_up": matrix(2 * DENSE_WIDTH, HIDDEN), "down": matrix(HIDDEN, DENSE_WIDTH)}
        return {
            **layer,
            "router": torch.randn(EXPERTS, HIDDEN, device="cuda"),
            "bias": torch.zeros(EXPERTS, device="cuda"),
            "experts_gate_up": matrix(2 * EXPERT_WIDTH, HIDDEN, EXPERTS),
            "experts_down": matrix(HIDDEN, EXPERT_WIDTH, EXPERTS),
            "gate_up": matrix(2 * SHARED_WIDTH, HIDDEN),
            "down": matrix(HIDDEN, SHARED_WIDTH),
        }


class Step:
    """Buffers and launches of one step: `sequences` of `length` new tokens each, after `context` tokens."""

    def __init__(self, model: Model, sequences: int, length: int, context: int) -> None:
        self.model, self.tokens, self.sequences = model, sequences * length, sequences
        self.has_prompts = length > 1
        self.beside = torch.cuda.Stream()
        width = -(-(context + length) // BLOCK)
        first = [i * length for i in range(sequences + 1)]
        tables = torch.randperm(sequences * width).tolist()
        ids = torch.randint(0, VOCABULARY, (self.tokens,)).tolist()
        header = [sequences, self.tokens, width, sequences, *first, *[context] * sequences, *tables, *ids]
        last = [(i + 1) * length - 1 for i in range(sequences)]
        self.step = torch.tensor([*header, *last], dtype=torch.int32, device="cuda")
        self.last = torch.tensor(last, dtype=torch.int32, device="cuda")
        self.count, self.rows = fd.counts(self.tokens), fd.counts(sequences)
        cache = fd.library().fd_cache_bytes(None, sequences * width, KV_HEADS, HEAD_DIM)
        self.caches = [
            torch.empty(2, cache // 2, dtype=torch.bfloat16, device="cuda").normal_() for _ in model.layers
        ]
        self.cache_bytes = sequences * (context + length) * KV_HEADS * HEAD_DIM * 4 * len(model.layers)
        t, f32 = self.tokens, {"dtype": torch.float32, "device": "cuda"}
        self.hidden_states = torch.zeros(t, HIDDEN, **f32)
        self.cos_sin = torch.zeros(t, HEAD_DIM, **f32)
        self.slots = torch.zeros(t, dtype=torch.int32, device="cuda")
        self.x, self.attended = activations(t, HIDDEN), activations(t, HEADS * HEAD_DIM)
        self.qkv = torch.zeros(t, QKV_WIDTH, dtype=torch.bfloat16, device="cuda")
        segments = sequences * -(-width // 8)
        work = fd.library().fd_attention_work_bytes(segments, KV_HEADS, HEAD_DIM)
        self.work = torch.zeros(work, dtype=torch.uint8, device="cuda")
        self.tile = fd.library().fd_tile(t * PICKS, EXPERTS)
        self.alignment = min(64, fd.library().fd_tile_tokens(self.tile))
        most = fd.library().fd_expert_rows(t, PICKS, EXPERTS, self.alignment)
        self.router_logits = torch.zeros(t, EXPERTS, **f32)
        self.expert_counts = torch.zeros(len(model.layers), EXPERTS, dtype=torch.int32, device="cuda")
        shape = (2, t, PICKS)
        self.topk_ids, self.rows_in_expert = torch.zeros(*shape, dtype=torch.int32, device="cuda").unbind(0)
        self.topk_weights = torch.zeros(t, PICKS, **f32)
        self.expert_rows, self.expert_hidden = activations(most, HIDDEN), activations(most, EXPERT_WIDTH)
        self.assignments = torch.zeros(most, dtype=torch.int32, device="cuda")
        self.results = torch.zeros(t * PICKS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.hidden = activations(t, DENSE_WIDTH)
        self.shared = torch.zeros(t, HIDDEN, **f32)
        self.final = activations(sequences, HIDDEN)
        self.logits = torch.zeros(sequences, VOCABULARY, **f32)
        self.drawn = torch.zeros(sequences, dtype=torch.int32, device="cuda")

    def norm(self, out: torch.Tensor, **fields: Any) -> None:
        values = {"count": self.count, "capacity": self.tokens, **fields}
        args = fd.fill(
            fd.NormArgs,
            hidden_states=self.hidden_states,
            weight=self.model.ones,
            out=out,
            epsilon=1e-5,
            width=HIDDEN,
            **values,
        )
        fd.call("fd_norm", args)

    def dense(
        self, weights: torch.Tensor, x: torch.Tensor, out: torch.Tensor, n: int, k: int, kind: int
    ) -> None:
        fd.product(weights, x, self.count, out, n, k, kind, self.tokens, is_early=1)

    def attention(self, layer: dict[str, torch.Tensor], cache: torch.Tensor, *, is_normed: bool) -> None:
        if not is_normed:
            self.norm(self.x)
        self.dense(layer["qkv"], self.x, self.qkv, QKV_WIDTH, HIDDEN, fd.BFLOAT16)
        args = fd.fill(
            fd.AttentionArgs, step=self.step, rotary_cos_sin=self.cos_sin, slot_mapping=self.slots,
            qkv=self.qkv,
            keys=cache[0], values=cache[1], out=self.attended, work=self.work, work_bytes=self.work.numel(),
            heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, capacity=self.tokens,
            has_prompts=self.has_prompts,
        )  # fmt: skip
        fd.call("fd_attention", args)
        self.dense(layer["out"], self.attended, self.hidden_states, HIDDEN, HEADS * HEAD_DIM, fd.ADD)

    def mlp(self, layer: dict[str, torch.Tensor]) -> None:
        self.norm(self.x)
        self.dense(layer["gate_up"], self.x, self.hidden, 2 * DENSE_WIDTH, HIDDEN, fd.SWIGLU)
        self.dense(layer["down"], self.hidden, self.hidden_states, HIDDEN, DENSE_WIDTH, fd.ADD)

    def experts(self, layer: dict[str, torch.Tensor], counts: torch.Tensor) -> None:
        self.norm(
            self.x,
            router=layer["router"],
            router_logits=self.router_logits,
            expert_rows=counts,
            experts=EXPERTS,
        )
        t = self.tokens
        shared = (
            fd.product_args(
                layer["gate_up"], self.x, self.count, self.hidden, 2 * SHARED_WIDTH, HIDDEN, fd.SWIGLU, t,
                is_early=1,
            ),
            fd.product_args(
                layer["down"], self.hidden, self.count, self.shared, HIDDEN, SHARED_WIDTH, fd.FLOAT, t,
                is_early=1,
            ),
        )  # fmt: skip
        # The shared experts do not depend on the routing: they are computed beside it, or, with few tokens,
        # together with the selected experts.
        main, is_beside = torch.cuda.current_stream(), self.tokens not in PAIRED
        if is_beside:
            self.beside.wait_stream(main)
            with torch.cuda.stream(self.beside):
                for args in shared:
                    fd.call("fd_product", args)
        args = fd.fill(
            fd.RouteArgs, logits=self.router_logits, bias=layer["bias"], count=self.count, x=self.x,
            topk_ids=self.topk_ids, topk_weights=self.topk_weights, counts=counts,
            rows_in_expert=self.rows_in_expert,
            rows=self.expert_rows, assignments=self.assignments, norm_min=1e-12, experts=EXPERTS, k=PICKS,
            width=HIDDEN, alignment=self.alignment, capacity=self.tokens,
        )  # fmt: skip
        fd.call("fd_route", args)
        common: dict[str, Any] = {"tile": self.tile, "alignment": self.alignment}
        selected = (
            fd.product_args(
                layer["experts_gate_up"], self.expert_rows, counts, self.expert_hidden, 2 * EXPERT_WIDTH,
                HIDDEN, fd.SWIGLU, t * PICKS, **common,
            ),
            fd.product_args(
                layer["experts_down"], self.expert_hidden, counts, self.results, HIDDEN, EXPERT_WIDTH,
                fd.BFLOAT16, t * PICKS, rows=self.assignments, is_early=1, **common,
            ),
        )  # fmt: skip
        for dense, grouped in zip(shared, selected, strict=True):
            if is_beside:
                fd.call("fd_product", grouped)
            else:
                fd.product_pair(dense, grouped)
        if is_beside:
            main.wait_stream(self.beside)
        args = fd.fill(
            fd.CombineArgs, results=self.results, topk_weights=self.topk_weights, shared=self.shared,
            count=self.count, hidden_states=self.hidden_states, norm=self.model.ones, normed=self.x,
            epsilon=1e-5, k=PICKS, width=HIDDEN, capacity=self.tokens,
        )  # fmt: skip
        fd.call("fd_combine", args)

    def run(self) -> None:
        args = fd.fill(
            fd.EmbeddingArgs, step=self.step, table=self.model.table, vocabulary=VOCABULARY, width=HIDDEN,
            hidden_states=self.hidden_states, capacity=self.tokens,
        )  # fmt: skip
        fd.call("fd_embedding", args)
        args = fd.fill(
            fd.RotationArgs, step=self.step, rotary_cos_sin=self.cos_sin, slot_mapping=self.slots,
            theta=500000.0,
            head_dim=HEAD_DIM, capacity=self.tokens,
        )  # fmt: skip
        fd.call("fd_rotation", args)
        for index, (layer, cache) in enumerate(zip(self.model.layers, self.caches, strict=True)):
            # The experts' results were added and normalised by one operation.
            self.attention(layer, cache, is_normed=index > 0 and "router" in self.model.layers[index - 1])
            if "router" in layer:
                self.experts(layer, self.expert_counts[index])
            else:
                self.mlp(layer)
        self.norm(self.final, rows=self.last, count=self.rows, capacity=self.sequences)
        fd.product(
            self.model.head, self.final, self.rows, self.logits, VOCABULARY, HIDDEN, fd.FLOAT, self.sequences,
            is_early=1,
        )  # fmt: skip
        args = fd.fill(
            fd.DrawArgs, logits=self.logits, count=self.rows, drawn=self.drawn, vocabulary=VOCABULARY,
            capacity=self.sequences,
        )  # fmt: skip
        fd.call("fd_draw", args)

    def bytes(self) -> int:
        """Return the bytes read by the last step: selected experts, other weights, cache."""
        active = int((self.expert_counts > 0).sum())
        total = active * 3 * EXPERT_WIDTH * HIDDEN * 2 + self.model.head.numel() * 2 + self.cache_bytes
        for layer in self.model.layers:
            total += sum(w.numel() * w.element_size() for name, w in layer.items() if "experts" not in name)
        return total


def flops(tokens: int, context: int) -> float:
    """Return the operations of one prompt of `tokens` from position 0, without the head."""
    expert_layer = (QKV_WIDTH + HEADS * HEAD_DIM) * HIDDEN + 3 * HIDDEN * (
        PICKS * EXPERT_WIDTH + SHARED_WIDTH
    )
    dense_layer = (QKV_WIDTH + HEADS * HEAD_DIM) * HIDDEN + 3 * HIDDEN * DENSE_WIDTH
    products = 2 * tokens * (expert_layer * (LAYERS - 1) + dense_layer)
    return products + LAYERS * HEADS * HEAD_DIM * 2 * tokens * (tokens + 2 * context)


def print_timeline(step: Step, time: float) -> None:
    """Print start and end of the kernels of two layers in the middle of a step, in microseconds."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
    last = kernels[-len(kernels) // 3 :]
    span = last[-1].time_range.end - last[0].time_range.start
    print(f"profiled: {span:.0f} us; not profiled: {time * 1e6:.0f} us")
    middle = len(last) // 2
    ends = [event.time_range.end for event in last]
    for i in range(middle, min(len(last), middle + 26)):
        event = last[i]
        begin = event.time_range.start - last[middle].time_range.start
        times = f"{begin:8.1f} +{event.time_range.elapsed_us():6.1f}, end {ends[i] - ends[i - 1]:+6.1f}"
        print(f"{times}  {event.name[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 16, 32, 64, 128])
    parser.add_argument("--prompt", type=int, nargs="*", default=[4096])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--timeline", action="store_true", help="print the kernels of one layer")
    args = parser.parse_args()
    torch.manual_seed(0)
    ceiling = read_bandwidth()
    torch.cuda.empty_cache()
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / seconds(lambda: torch.mm(a, a))
    print(
        f"{torch.cuda.get_device_name()}: reads {ceiling / 1e12:.3f} TB/s, cuBLAS {peak / 1e12:.0f} TFLOP/s"
    )
    model = Model(args.layers)
    for batch in args.batch:
        step = Step(model, batch, 1, args.context - 1)
        time = seconds(step.run)
        limit = step.bytes() / ceiling
        print(
            f"decode {batch:4}: {time * 1e3:7.3f} ms, limit {limit * 1e3:.3f} ms, ratio {limit / time:.2f},"
            f" {batch / time:.0f} tok/s",
            flush=True,
        )
        if args.timeline:
            print_timeline(step, time)
        del step
        torch.cuda.empty_cache()
    for length in args.prompt:
        step = Step(model, 1, length, 0)
        times = []
        for _ in range(5):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step.run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        time, limit = statistics.median(times), flops(length, 0) / peak
        print(
            f"prompt {length}: {time * 1e3:.2f} ms, limit {limit * 1e3:.2f} ms, ratio {limit / time:.2f},"
            f" {length / time:.0f} tok/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
