"""The engine on a GPU with a random ERNIE-4.5-21B-A3B: loading, decode steps, prompts, host time of a step.

A step alone is its graph, launched again and again. What a step takes beyond that is the visible time of the
host. The limit of a decode step is the time to read the weights of the expected experts and the KV cache
once. `make bench-gpu-engine` runs it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy.common.messages import AddRequest
from fastdeploy.common.request import SamplingParams
from fastdeploy.config import EngineConfig, ModelConfig
from fastdeploy.core.engine import EngineCore
from fastdeploy.device.choice import choose_gpu
from fastdeploy.device.cuda import CudaDevice

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2560, 28, 20, 4, 128, 103424
DENSE_WIDTH, EXPERTS, PICKS, EXPERT_WIDTH, SHARED = 12288, 64, 6, 1536, 2
#: Tokens of the measured prompt.
PROMPT = 4096
#: Tensors are windows of one random array: drawing tens of gigabytes would take longer than writing them.
_POOL = 64 << 20


def config_json(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": DENSE_WIDTH,
        "moe_num_experts": EXPERTS,
        "moe_k": PICKS,
        "moe_intermediate_size": EXPERT_WIDTH,
        "moe_num_shared_experts": SHARED,
        "moe_layer_start_index": 1,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of the checkpoint in Hugging Face's layout."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for index in range(layers):
        name = f"model.layers.{index}."
        yield f"{name}input_layernorm.weight", (HIDDEN,)
        yield f"{name}post_attention_layernorm.weight", (HIDDEN,)
        for part, outputs in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            yield f"{name}self_attn.{part}_proj.weight", (outputs * HEAD_DIM, HIDDEN)
        yield f"{name}self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)
        widths = {f"{name}mlp.": DENSE_WIDTH}
        if index > 0:
            yield f"{name}mlp.gate.weight", (EXPERTS, HIDDEN)
            widths = {f"{name}mlp.experts.{expert}.": EXPERT_WIDTH for expert in range(EXPERTS)}
            widths[f"{name}mlp.shared_experts."] = EXPERT_WIDTH * SHARED
        for prefix, width in widths.items():
            yield f"{prefix}gate_proj.weight", (width, HIDDEN)
            yield f"{prefix}up_proj.weight", (width, HIDDEN)
            yield f"{prefix}down_proj.weight", (HIDDEN, width)
    yield "model.norm.weight", (HIDDEN,)


def write_checkpoint(directory: Path, layers: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).standard_normal(_POOL, np.float32) * 0.02
    pool = (values.view(np.uint32) >> 16).astype(np.uint16)
    ones = np.full(HIDDEN, 0x3F80, np.uint16)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes(layers):
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        offset = 0
        for name, shape in shapes(layers):
            count, written = int(np.prod(shape)), 0
            if "norm" in name:
                file.write(ones.tobytes())
                continue
            # A prime, so that no two tensors are alike.
            offset = (offset + 1_000_003) % (_POOL // 2)
            while written < count:
                window = pool[offset : offset + count - written]
                file.write(window.data)
                written += len(window)
                offset = 0 if written < count else offset
    (directory / "config.json").write_text(json.dumps(config_json(layers)))


class Stopwatch:
    """Time that the engine spends waiting for the GPU, and the time of a graph alone."""

    def __init__(self, device: CudaDevice) -> None:
        self.waited = 0.0
        self._device = device
        self._call = device._library.call
        #: Arguments of the latest calls, by function.
        self._latest: dict[str, tuple[Any, ...]] = {}
        # Calls of the engine are timed in place: mypy forbids replacing a method.
        device._library.call = self._timed  # type: ignore[method-assign]

    def _timed(self, name: str, *arguments: Any) -> None:
        started = time.perf_counter()
        self._call(name, *arguments)
        self._latest[name] = arguments
        if name == "fd_step_wait":
            self.waited += time.perf_counter() - started

    def graph_alone(self, repetitions: int) -> float:
        """Return the seconds of the latest graph with its plan. Incomplete texts are wrong afterwards."""
        handle, plan, size, _ = self._latest["fd_step_begin"]
        ticket, results = ctypes.c_uint64(), ctypes.c_void_p()
        self._call("fd_step_begin", handle, plan, size, ctypes.byref(ticket))
        started = time.perf_counter()
        for _ in range(repetitions):
            self._call("fd_graph", *self._latest["fd_graph"])
        self._call("fd_step_end", handle, ticket)
        self._call("fd_step_wait", handle, ticket, ctypes.byref(results))
        return (time.perf_counter() - started) / repetitions


def limit(batch: int, context: int, layers: int, bandwidth: float) -> float:
    """Return the seconds to read what a decode step needs."""
    touched = EXPERTS * (1 - (1 - PICKS / EXPERTS) ** batch)
    attention = (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM * HIDDEN
    expert_layer = attention + 3 * HIDDEN * EXPERT_WIDTH * (touched + SHARED) + 2 * EXPERTS * HIDDEN
    weights = 2 * ((layers - 1) * expert_layer + attention + 3 * HIDDEN * DENSE_WIDTH + VOCABULARY * HIDDEN)
    return (weights + batch * context * layers * KV_HEADS * HEAD_DIM * 4) / bandwidth


def prompt_flops(length: int, layers: int) -> float:
    """Return the floating-point operations of a prompt; the head computes one row."""
    attention = (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM * HIDDEN
    expert_layer = attention + 3 * HIDDEN * EXPERT_WIDTH * (PICKS + SHARED) + EXPERTS * HIDDEN
    weights = (layers - 1) * expert_layer + attention + 3 * HIDDEN * DENSE_WIDTH
    # Half of the scores, and as many operations for the values.
    return 2 * length * weights + 2 * layers * length**2 * HEADS * HEAD_DIM


@dataclass(frozen=True, slots=True)
class Opening:
    """Seconds from nothing to the first token, without the API."""

    opened: float
    loaded: float
    #: Cache and graphs.
    prepared: float
    first_step: float


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a decode step."""

    mean: float
    #: The graph alone, launched again and again.
    alone: float
    #: Work of the host, which may run beside the GPU's.
    host: float


class Measured:
    """The engine on the checkpoint in `directory`, and what is measured of it."""

    def __init__(self, directory: Path, *, runs_ahead: bool = True, temperature: float = 0.0) -> None:
        self._temperature = temperature
        self._random = np.random.default_rng(1)
        config = EngineConfig(
            model=directory,
            device="gpu",
            max_model_len=4608,
            max_num_seqs=64,
            max_num_batched_tokens=4096,
            max_prefill_beside_decode=4096,
            enable_prefix_caching=False,
        )
        model = ModelConfig.from_directory(directory)
        gpu = choose_gpu(config, model)
        assert gpu is not None
        times = [time.monotonic()]
        self.device = CudaDevice(config, model, gpu)
        times.append(time.monotonic())
        self.device.load(lambda fraction, stage: None)
        times.append(time.monotonic())
        self.num_blocks = self.device.allocate_cache(lambda fraction, stage: None)
        times.append(time.monotonic())
        self.device.runs_ahead = runs_ahead
        self._engine = EngineCore(config, model, self.device, self.num_blocks)
        self._add("first", 16, 1)
        self._step()
        times.append(time.monotonic())
        self.opening = Opening(*np.diff(times).tolist())
        # As in the worker: no garbage collection of the engine's objects during a measurement.
        gc.collect()
        gc.freeze()
        self._watch = Stopwatch(self.device)

    def decode(self, batch: int, context: int, steps: int = 64) -> Step:
        for index in range(batch):
            self._add(f"{batch}-{index}", context, 128)
        scheduler, watch = self._engine._scheduler, self._watch
        while scheduler.num_waiting or any(s.num_tokens - s.num_computed > 1 for s in scheduler._running):
            self._step()
        watch.waited, begun = 0.0, time.perf_counter()
        for _ in range(steps):
            self._step()
        mean = (time.perf_counter() - begun) / steps
        host = mean - watch.waited / steps
        # Submit no step ahead, because the graph alone needs an idle device.
        self.device.runs_ahead, ahead = False, self.device.runs_ahead
        self._step()
        found = Step(mean, watch.graph_alone(32), host)
        self.device.runs_ahead = ahead
        self._finish()
        return found

    def prompt(self, length: int) -> float:
        self._add("prompt", length, 1)
        begun = time.perf_counter()
        self._finish()
        return time.perf_counter() - begun

    def _add(self, name: str, length: int, new: int) -> None:
        prompt = self._random.integers(3, VOCABULARY, length).tolist()
        params = SamplingParams(max_tokens=new, temperature=self._temperature)
        self._engine.add(AddRequest(name, prompt, params, arrival_time=0.0))

    def _step(self) -> None:
        for output in self._engine.step().outputs:
            assert output.message is None, output.message

    def _finish(self) -> None:
        while self._engine.has_work:
            self._step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--wait", action="store_true", help="wait for each step before the next is prepared")
    parser.add_argument("--context", type=int, default=1984)
    parser.add_argument("--bandwidth", type=float, default=4.53, help="TB/s, from benchmarks.cuda_product")
    arguments = parser.parse_args()
    started = time.monotonic()
    if not (arguments.directory / "config.json").exists():
        write_checkpoint(arguments.directory, arguments.layers)
        print(f"checkpoint written in {time.monotonic() - started:.1f} s", flush=True)
    engine = Measured(arguments.directory, runs_ahead=not arguments.wait, temperature=arguments.temperature)
    opening = engine.opening
    size = (arguments.directory / "model.safetensors").stat().st_size / 1e9
    print(
        f"{engine.device.title}: open {opening.opened:.2f} s, load {opening.loaded:.2f} s ({size:.1f} GB, "
        f"{size / opening.loaded:.1f} GB/s), cache and graphs {opening.prepared:.2f} s, first step "
        f"{opening.first_step:.2f} s; {engine.num_blocks} blocks",
        flush=True,
    )
    for batch in arguments.batch:
        found = engine.decode(batch, arguments.context)
        floor = limit(batch, arguments.context + 48, arguments.layers, arguments.bandwidth * 1e12)
        print(
            f"decode {batch:3}: {found.mean * 1e3:7.3f} ms a step, {found.alone * 1e3:.3f} ms alone; the "
            f"host works {found.host * 1e6:.0f} us; limit {floor * 1e3:.3f} ms, "
            f"ratio {floor / found.mean:.2f}, "
            f"{batch / found.mean:.0f} tokens/s",
            flush=True,
        )
    for _ in range(2):
        taken = engine.prompt(PROMPT)
        print(f"prompt {PROMPT}: {taken * 1e3:.1f} ms, {PROMPT / taken:.0f} tokens/s", flush=True)
    engine.device.close()


if __name__ == "__main__":
    main()
