"""transformers and cuBLAS on a GPU, beside which `benchmarks.gpu` puts the engine.

    python3 -m benchmarks.cuda_transformers --out FILE --compile 1

The model has random weights, drawn on the device. A decode step is tried in several manners: with an
implementation of experts, launched from Python or captured as one CUDA graph, also after torch.compile. Its
KV cache is static and holds random values. FILE gets the seconds of each manner as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from .cuda_engine import LAYERS, PROMPT, config_json
from .cuda_product import read_bandwidth

#: Largest batch for batched_mm, which copies the weights of an expert for each of its tokens.
_MAX_BATCHED = 8
_STEPS = 10


def draw_model(config: dict[str, Any], device: str) -> PreTrainedModel:
    known = AutoConfig.for_model(**config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(known, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def filled_cache(model: PreTrainedModel, batch: int, context: int) -> StaticCache:
    """Return a cache whose first `context` positions are taken."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=context + 64)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    return cache


class DecodeStep:
    """A greedy decode step, which may be repeated."""

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], batch: int, context: int) -> None:
        self._forward = forward
        self._context = context
        self._cache = filled_cache(model, batch, context)
        self._tokens = torch.randint(3, model.config.vocab_size, (batch, 1), device=model.device)

    def rewind(self) -> None:
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._context)

    @torch.no_grad()
    def __call__(self) -> None:
        logits = self._forward(input_ids=self._tokens, past_key_values=self._cache, use_cache=True).logits
        self._tokens.copy_(logits[:, -1:].argmax(-1))


def seconds(run: Callable[[], None], count: int) -> float:
    """Return the median time of `run`."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def captured(step: DecodeStep) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


def decode_seconds(model: PreTrainedModel, batch: int, context: int, *, compiled: bool) -> dict[str, float]:
    """Return the seconds of a step in each manner that works."""
    found = {}
    for experts in ("eager", "grouped_mm", "batched_mm"):
        if experts == "batched_mm" and batch > _MAX_BATCHED:
            continue
        model.set_experts_implementation(experts)
        step = DecodeStep(model, model.forward, batch, context)
        step()
        found[experts] = seconds(step, 3)
        if experts == "eager":
            # It asks the device for the experts that are used, which a graph cannot.
            continue
        step.rewind()
        found[f"{experts}, graph"] = seconds(captured(step).replay, _STEPS)
    if compiled:
        model.set_experts_implementation("grouped_mm")
        step = DecodeStep(model, torch.compile(model.forward, fullgraph=True, dynamic=False), batch, context)
        started = time.perf_counter()
        found["grouped_mm, compiled, graph"] = seconds(captured(step).replay, _STEPS)
        print(f"compiled for batch {batch} in {time.perf_counter() - started:.0f} s", flush=True)
    return found


@torch.no_grad()
def prompt_seconds(model: PreTrainedModel, length: int) -> dict[str, float]:
    tokens = torch.randint(3, model.config.vocab_size, (1, length), device=model.device)

    def compute() -> None:
        model(tokens, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    found = {}
    for experts in ("eager", "grouped_mm"):
        model.set_experts_implementation(experts)
        compute()
        found[experts] = seconds(compute, 3)
    return found


def cublas_rate() -> float:
    """Return the FLOP/s of a bfloat16 product of random matrices of 8192 x 8192."""
    left, right = torch.randn(2, 8192, 8192, device="cuda").bfloat16().unbind(0)
    product = partial(torch.mm, left, right)
    for _ in range(3):
        product()
    return 2 * 8192**3 / seconds(product, _STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--compile", type=int, nargs="*", default=[], help="batches; slow with many layers")
    parser.add_argument("--context", type=int, default=2032)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"bandwidth": read_bandwidth(), "cublas": cublas_rate(), "decode": {}}
    model = draw_model(config_json(arguments.layers), "cuda")
    found["prompt"] = prompt_seconds(model, PROMPT)
    print(f"prompt of {PROMPT}: {found['prompt']}", flush=True)
    for batch in arguments.batch:
        compiled = batch in arguments.compile
        found["decode"][batch] = decode_seconds(model, batch, arguments.context, compiled=compiled)
        print(f"decode {batch}: {found['decode'][batch]}", flush=True)
        arguments.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
