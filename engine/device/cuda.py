"""A Hopper GPU as a device, through libfd_cuda.so; or the CPU, through libfd_cpu.so. Without Paddle.

A step is a plan that is sent to the GPU, captured graphs, and results that are fetched. A step in which each
sequence has one token is one graph. A step with prompts is two: layers for a capacity of tokens, then head
and draw for a capacity of rows. All are captured before the first request, from the one description of the
network in models/ernie45.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ..common.errors import ConfigError
from ..common.request import Batch
from ..config import EngineConfig, ModelConfig
from ..custom_ops import SAMPLING_ROW
from ..models.ernie45 import Ernie45
from ..weights.checkpoint_matrices import read_directory
from .capacities import fitting
from .choice import Gpu
from .cuda_library import (
    ARENA_CACHE,
    ARENA_WEIGHTS,
    ARENA_WORK,
    BEGIN_CAPTURE,
    BFLOAT16,
    END_CAPTURE,
    FLOAT32,
    LAUNCH,
    NOT_BUILT,
    Buffer,
    CudaLibrary,
    Info,
    OpenArgs,
    find_library,
)
from .cuda_operations import CudaOperations, CudaStep, HiddenStates
from .cuda_weights import CudaMatrix, upload, weight_bytes, weights_of
from .device import Progress, Results
from .draws import Draw, Drawn
from .errors import OutOfDeviceMemory
from .kernel_sizes import aligned, sizes_of
from .step_buffer import StepBuffer
from .work_memory import (
    DRAW_WIDTH,
    PlanLayout,
    ResultLayout,
    StepLimits,
    cache_blocks,
    offsets,
    work_buffers,
)

#: Kinds of graphs; the low half of a key is the capacity.
_DECODE_GREEDY, _DECODE_SAMPLED, _PROMPTS, _GREEDY, _SAMPLED = (kind << 32 for kind in range(1, 6))


class _Submitted(NamedTuple):
    ticket: int
    sampled: Draw | None
    scored: Draw | None


class CudaDevice:
    runs_ahead = True

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, gpu: Gpu, cpus: Sequence[int] = (-1,)
    ) -> None:
        """
        Args:
            cpus: the CPU of each thread, -1 for any; for a library that computes on the CPU.

        Raises:
            ConfigError: the library is missing, or refuses the GPU.
        """
        path = find_library()
        if path is None:
            raise ConfigError(NOT_BUILT)
        self._config = config
        self._model_config = model_config
        self._gpu = gpu
        self._library = CudaLibrary(path, gpu.pci_address)
        self._is_gpu = self._library.platform == "GPU"
        handle = ctypes.c_void_p()
        numbers = (ctypes.c_int32 * len(cpus))(*cpus)
        arguments = OpenArgs(
            ordinal=gpu.ordinal,
            type=FLOAT32 if config.weight_format == "float32" else BFLOAT16,
            block_size=config.block_size,
            threads=len(cpus),
            cpus=ctypes.addressof(numbers),
        )
        try:
            self._library.call("fd_open", ctypes.byref(arguments), ctypes.byref(handle))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._handle = handle.value or 0
        self._sizes = sizes_of(self._library, self._handle, config.weight_format)
        #: Bytes in arenas. What other processes take meanwhile must not count.
        self._own_bytes = 0
        self._limits = StepLimits.of(config, model_config)
        self._plan = PlanLayout(self._limits)
        self._results = ResultLayout(self._limits.rows)
        self._placed: dict[str, CudaMatrix | int] = {}

    @property
    def title(self) -> str:
        name = self._info().name.decode(errors="replace")
        return f"{self._library.platform} {self._gpu.ordinal}, {name}, {self.numeric_version}"

    @property
    def numeric_version(self) -> str:
        return self._info().numeric_version.decode()

    def load(self, progress: Progress) -> None:
        config = self._config
        progress(0.0, "reading the checkpoint")
        tensors = read_directory(config.model, self._model_config, config.qkv_order)
        arena = self._arena(
            ARENA_WEIGHTS,
            weight_bytes(tensors, self._sizes),
            f"a {'GPU' if self._is_gpu else 'machine'} with more memory, or fewer replicas on this one",
        )
        self._placed = upload(self._library, self._handle, arena, tensors, self._sizes, progress)

    def allocate_cache(self, progress: Progress) -> int:
        progress(1.0, "allocating working memory")
        self._allocate_work()
        info, model, config = self._info(), self._model_config, self._config
        layer_bytes = self._sizes.cache_block(model.num_key_value_heads, model.head_dim)
        block_bytes = 2 * model.num_hidden_layers * layer_bytes
        if self._is_gpu:
            num_blocks = cache_blocks(
                config,
                block_bytes,
                total=info.bytes_total,
                free=info.bytes_free,
                own=self._own_bytes,
                num_replicas=self._gpu.num_replicas,
            )
        else:
            # Other programs need memory, too.
            num_blocks = config.num_blocks(model)
        needed = config.blocks_for(config.max_model_len)
        if config.num_gpu_blocks_override is None and num_blocks < needed:
            raise OutOfDeviceMemory(
                f"the KV cache gets {num_blocks} blocks of {block_bytes / 1e6:.1f} MB, and one sequence of "
                f"--max-model-len {config.max_model_len} needs {needed}; {info.bytes_free / 1e9:.2f} GB of "
                f"{info.bytes_total / 1e9:.2f} GB of GPU memory are free: lower --max-model-len or raise "
                "--gpu-memory-utilization"
            )
        progress(1.0, f"allocating a cache of {num_blocks} blocks")
        cache = self._arena(
            ARENA_CACHE,
            num_blocks * block_bytes,
            "a lower --gpu-memory-utilization or --num-gpu-blocks-override"
            if self._is_gpu
            else "a lower --max-num-seqs, --max-model-len or --num-gpu-blocks-override",
        )
        size = num_blocks * layer_bytes
        self._caches = [
            _LayerCache(cache + 2 * index * size, cache + (2 * index + 1) * size)
            for index in range(model.num_hidden_layers)
        ]
        progress(1.0, "capturing graphs")
        self._capture_all()
        return num_blocks

    def submit(self, batch: Batch, sampled: Draw | None, scored: Draw | None) -> _Submitted:
        draws = [draw for draw in (sampled, scored) if draw is not None]
        return _Submitted(self._begin(batch, draws), sampled, scored)

    def wait(self, ticket: _Submitted) -> Results:
        results = self._end(ticket.ticket)
        sampled, scored = ticket.sampled, ticket.scored
        # Scored rows come after the sampling ones.
        first = 0 if sampled is None else sampled.count
        return (
            None if sampled is None else self._drawn(results, 0, sampled),
            None if scored is None else self._drawn(results, first, scored),
        )

    def every_logit(self, batch: Batch) -> np.ndarray:
        """Compute a step and return the logits of all its tokens, float32 [T, vocabulary]. For tests."""
        self._end(self._begin(batch, [], every_position=True))
        logits = np.empty((batch.num_tokens, self._model_config.vocab_size), np.float32)
        self._library.call("fd_fetch", self._handle, logits.ctypes.data, self._work["logits"], logits.nbytes)
        return logits

    def close(self) -> None:
        self._library.close(self._handle)

    # ---- a step

    def _begin(self, batch: Batch, draws: list[Draw], *, every_position: bool = False) -> int:
        """Send a plan, launch its graphs, and return the ticket of the step."""
        library, limits = self._library, self._limits
        step = self._step_buffer.write(batch, every_position=every_position)
        sequences, tokens, width, rows = step[:4].tolist()
        end = 4 + (sequences + 1) + sequences * (1 + width) + tokens
        self._logit_tokens[:rows] = step[end : end + rows]
        is_greedy = all(draw.rows is None for draw in draws)
        size = self._write_draws([] if is_greedy else draws, end + rows)
        ticket = ctypes.c_uint64()
        library.call("fd_step_begin", self._handle, self._plan_memory.ctypes.data, size, ctypes.byref(ticket))
        if tokens == sequences:
            # A chunk of a single token draws nothing, or is scored.
            kind, capacity = _DECODE_GREEDY if is_greedy else _DECODE_SAMPLED, limits.decode_capacities
            library.call("fd_graph", self._handle, LAUNCH, kind | fitting(capacity, tokens))
        else:
            library.call(
                "fd_graph", self._handle, LAUNCH, _PROMPTS | fitting(limits.prompt_capacities, tokens)
            )
            if rows:
                kind, capacity = _GREEDY if is_greedy else _SAMPLED, limits.logits_capacities
                library.call("fd_graph", self._handle, LAUNCH, kind | fitting(capacity, rows))
        library.call("fd_step_end", self._handle, ticket)
        return ticket.value

    def _end(self, ticket: int) -> np.ndarray:
        """Wait for a step and return its results, valid until the next but one begins."""
        results = ctypes.c_void_p()
        # Gives Python's lock back while it waits.
        self._library.call("fd_step_wait", self._handle, ticket, ctypes.byref(results))
        return np.ctypeslib.as_array((ctypes.c_uint8 * self._results.bytes).from_address(results.value or 0))

    def _write_draws(self, draws: list[Draw], step_integers: int) -> int:
        """Write sampling rows and token counts to the plan; return the bytes of the plan."""
        end = self._plan.token_counts(step_integers)
        first = 0
        for draw in draws:
            rows = self._sampling_rows[first : first + draw.count]
            first += draw.count
            if draw.rows is None:
                rows[:] = _ARGMAX
                continue
            rows[:] = draw.rows
            if draw.tokens is None:
                continue
            rows["first_token"] += end // 8
            stop = end + draw.tokens.nbytes
            if stop > self._plan.bytes:
                raise ValueError(
                    f"penalties and masks of one step refer to {len(draw.tokens)} tokens; "
                    f"{self._limits.token_counts} fit: lower --max-num-seqs"
                )
            self._plan_memory[end:stop] = draw.tokens.reshape(-1).view(np.uint8)
            end = stop
        return end

    def _drawn(self, results: np.ndarray, first: int, draw: Draw) -> Drawn:
        rows, layout = self._limits.rows, self._results
        vocab_size, last = self._model_config.vocab_size, first + draw.count
        drawn = results[: 4 * rows].view(np.int32)[first:last].tolist()
        if draw.rows is None or (draw.rows["logprobs"] < 0).all():
            return Drawn(drawn, vocab_size)
        size = rows * DRAW_WIDTH
        top = results[layout.top_tokens :][: 4 * size].view(np.int32).reshape(rows, DRAW_WIDTH)
        logprobs = results[layout.logprobs :][: 8 * size].view(np.float64).reshape(rows, DRAW_WIDTH)
        return Drawn(drawn, vocab_size, top[first:last], logprobs[first:last])

    # ---- memory and graphs

    def _allocate_work(self) -> None:
        library, model, limits = self._library, self._model_config, self._limits
        places, size = offsets(work_buffers(model, limits, self._config.max_model_len, self._sizes))
        start = self._arena(
            ARENA_WORK, size, "a lower --max-num-batched-tokens, --max-num-seqs or --max-model-len"
        )
        self._work = {name: start + offset for name, offset in places.items()}
        plan, results = Buffer(), Buffer()
        plan_bytes = aligned(self._plan.bytes)
        library.call(
            "fd_steps",
            self._handle,
            plan_bytes,
            self._results.bytes,
            ctypes.byref(plan),
            ctypes.byref(results),
        )
        self._plan_memory = np.zeros(plan_bytes, np.uint8)
        memory, layout = self._plan_memory, self._plan
        self._sampling_rows = memory[: layout.logit_tokens].view(SAMPLING_ROW)
        self._logit_tokens = memory[layout.logit_tokens :][: 4 * limits.rows].view(np.int32)
        integers = memory[layout.step :][: 4 * limits.step_integers].view(np.int32)
        self._step_buffer = StepBuffer(self._config.block_size, integers)
        self._operations = CudaOperations(
            library,
            self._handle,
            model,
            self._work,
            (plan.address, layout),
            (results.address, self._results),
        )

    def _capture_all(self) -> None:
        limits, operations = self._limits, self._operations
        network = Ernie45(self._model_config, weights_of(self._model_config, self._placed), operations)
        for capacity in limits.decode_capacities:
            step = CudaStep(capacity, has_prompts=False, rows=capacity)
            for kind in (_DECODE_GREEDY, _DECODE_SAMPLED):
                enqueue = partial(self._enqueue_decode, network, step, greedy=kind == _DECODE_GREEDY)
                self._capture(kind | capacity, enqueue)
        for capacity in limits.prompt_capacities:
            step = CudaStep(capacity, has_prompts=True, rows=0)
            self._capture(_PROMPTS | capacity, partial(network.forward, step, self._caches))
        for capacity in limits.logits_capacities:
            step = CudaStep(0, has_prompts=False, rows=capacity)
            for kind in (_GREEDY, _SAMPLED):
                enqueue = partial(self._enqueue_draw, network, step, greedy=kind == _GREEDY)
                self._capture(kind | capacity, enqueue)

    def _enqueue_decode(self, network: Ernie45, step: CudaStep, *, greedy: bool) -> None:
        network.forward(step, self._caches)
        self._enqueue_draw(network, step, greedy=greedy)

    def _enqueue_draw(self, network: Ernie45, step: CudaStep, *, greedy: bool) -> None:
        logits = network.logits(HiddenStates(self._work["hidden_states"], step), step)
        self._operations.draw(logits, step, greedy=greedy)

    def _capture(self, key: int, enqueue: Callable[[], object]) -> None:
        self._library.call("fd_graph", self._handle, BEGIN_CAPTURE, key)
        enqueue()
        self._operations.finish()
        self._library.call("fd_graph", self._handle, END_CAPTURE, key)

    def _arena(self, kind: int, size: int, remedy: str) -> int:
        buffer = Buffer()
        try:
            self._library.call("fd_arena", self._handle, kind, size, ctypes.byref(buffer))
        except OutOfDeviceMemory as error:
            raise OutOfDeviceMemory(f"{error}; it needs {remedy}") from None
        self._own_bytes += size
        return int(buffer.address)

    def _info(self) -> Info:
        info = Info()
        self._library.call("fd_info", self._handle, ctypes.byref(info))
        return info


class _LayerCache:
    """Addresses of the keys and values of one layer."""

    def __init__(self, key: int, value: int) -> None:
        self.key = key
        self.value = value


_ARGMAX = np.zeros((), SAMPLING_ROW)
_ARGMAX["logprobs"] = -1
