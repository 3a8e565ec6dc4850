"""What a GPU gets, without a GPU: parts of matrices, sizes, graphs, and the choice of a device."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.common.errors import ConfigError
from fastdeploy.config import EngineConfig, ModelConfig
from fastdeploy.custom_ops import SAMPLING_ROW
from fastdeploy.device import choice, cuda_library
from fastdeploy.device.capacities import fitting, prompt_capacities, row_capacities
from fastdeploy.device.choice import Gpu, choose_gpu, deal
from fastdeploy.device.cuda_limits import unsupported
from fastdeploy.device.cuda_weights import weight_bytes
from fastdeploy.device.uploads import bias_of, is_interleaved, outputs_of, parts_of
from fastdeploy.device.work_memory import (
    SAMPLING_ROW_BYTES,
    KernelSizes,
    PlanLayout,
    ResultLayout,
    StepLimits,
    cache_blocks,
    offsets,
    work_buffers,
)
from fastdeploy.weights.checkpoint_matrices import MatrixStack, read_directory

from ..checkpoints import LAYOUTS, config_json, draw_tensors, write_checkpoint

CONFIG = EngineConfig(model=Path("none"))
HOPPER = Gpu(0, "NVIDIA H200", (9, 0))


def model_config(tmp_path: Path, **changes: object) -> ModelConfig:
    write_checkpoint(tmp_path, config_json(**({"head_dim": 64} | changes)), {})
    return ModelConfig.from_directory(tmp_path)


# ---- parts of matrices


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_hold_each_row_of_a_matrix_once(tmp_path: Path, layout: str) -> None:
    config = config_json(use_bias=True, tie_word_embeddings=False, head_dim=8)
    write_checkpoint(tmp_path, config, draw_tensors(config, 3), layout=layout)
    order = "grouped" if layout == "paddle-grouped" else "plain"
    stacks = read_directory(tmp_path, ModelConfig.from_directory(tmp_path), order)
    seen = 0
    for stack in stacks:
        if not isinstance(stack, MatrixStack) or stack.is_exact:
            continue
        interleaved = is_interleaved(stack)
        for matrix in stack.matrices:
            outputs = outputs_of(matrix)
            found = np.full((outputs, matrix.inputs), np.nan, np.float32)
            for part in parts_of(matrix, interleaved=interleaved):
                stored = part.tensor.data.view(np.float32)
                rows = np.arange(part.rows)[:, None] * part.row_stride
                columns = np.arange(matrix.inputs)[None, :] * part.column_stride
                kind = np.arange(part.first_row, part.first_row + part.rows)
                places = kind
                if part.turn != cuda_library.PLAIN:
                    places = kind // 8 * 16 + kind % 8 + (8 if part.turn == cuda_library.UP else 0)
                assert np.isnan(found[places]).all(), "a row twice"
                found[places] = stored[part.offset + rows + columns]
            expected, bias = matrix.rows(0, matrix.outputs), matrix.bias()
            if interleaved:
                # The CPU's rows take turns of 16, and are padded.
                half = expected.reshape(-1, 2, 16, matrix.inputs)
                gate, up = (half[:, i].reshape(-1, matrix.inputs)[: outputs // 2] for i in range(2))
                turns = [values.reshape(-1, 8, matrix.inputs) for values in (gate, up)]
                expected = np.stack(turns, axis=1).reshape(outputs, matrix.inputs)
                if bias is not None:
                    sides = bias.reshape(-1, 2, 16)
                    halves = [sides[:, i].reshape(-1)[: outputs // 2].reshape(-1, 8) for i in range(2)]
                    bias = np.stack(halves, axis=1).reshape(-1)
            assert found.tobytes() == expected.tobytes(), stack.name
            ours = bias_of(matrix, interleaved=interleaved)
            assert (ours is None) == (bias is None)
            assert ours is None or bias is None or ours.tobytes() == bias.tobytes()
            seen += 1
    assert seen > 20
    assert weight_bytes(stacks) % 256 == 0


# ---- graphs


@given(most=st.integers(1, 20_000), count=st.integers(1, 20_000))
def test_a_step_takes_the_smallest_graph_into_which_it_fits(most: int, count: int) -> None:
    for capacities in (row_capacities(most), prompt_capacities(most)):
        assert capacities == sorted(set(capacities))
        assert capacities[-1] == most
        if count <= most:
            fits = fitting(capacities, count)
            assert fits >= count
            assert all(other < count for other in capacities if other < fits)


# ---- memory


@given(
    sequences=st.integers(1, 1024),
    tokens=st.integers(1, 16384),
    length=st.integers(1, 131072),
    integers=st.integers(0, 100),
)
def test_a_plan_has_room_for_any_step(sequences: int, tokens: int, length: int, integers: int) -> None:
    config = replace(CONFIG, max_num_seqs=sequences, max_num_batched_tokens=tokens, max_model_len=length)
    limits = StepLimits.of(config, model_of_vocabulary(103424))
    plan, results = PlanLayout(limits), ResultLayout(limits.rows)
    assert plan.logit_tokens >= limits.rows * SAMPLING_ROW.itemsize
    assert plan.step >= plan.logit_tokens + 4 * limits.rows
    assert plan.step % 8 == 0
    used = limits.step_integers - min(integers, limits.step_integers)
    assert plan.token_counts(used) % 8 == 0
    assert plan.token_counts(used) >= plan.step + 4 * used
    assert plan.bytes >= plan.token_counts(used) + 8 * limits.token_counts
    assert results.logprobs % 8 == results.top_tokens % 4 == 0
    assert limits.decode_capacities[-1] == sequences
    assert limits.prompt_capacities[-1] == limits.tokens


def model_of_vocabulary(size: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=256,
        num_hidden_layers=2,
        vocab_size=size,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=True,
        use_bias=False,
        max_position_embeddings=4096,
        eos_token_ids=(2,),
        bos_token_id=1,
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=64,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
    )


def test_buffers_do_not_overlap() -> None:
    model = model_of_vocabulary(1000)
    sizes = KernelSizes(lambda *_: 1001, lambda tokens, k, experts: tokens * k + experts * 63, lambda _: 77)
    buffers = work_buffers(model, StepLimits.of(CONFIG, model), CONFIG.max_model_len, sizes)
    places, end = offsets(buffers)
    spans = sorted((start, start + buffers[name]) for name, start in places.items())
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert all(start % 256 == 0 for start, _ in spans)
    assert spans[-1][1] <= end


def test_the_cache_takes_the_share_of_the_replica() -> None:
    gigabyte = 10**9
    memory = {"total": 100 * gigabyte, "free": 80 * gigabyte, "own": 10 * gigabyte}
    assert cache_blocks(CONFIG, gigabyte, **memory, num_replicas=1) == 79
    assert cache_blocks(CONFIG, gigabyte, **memory, num_replicas=2) == 35
    assert cache_blocks(replace(CONFIG, gpu_memory_utilization=0.5), gigabyte, **memory, num_replicas=1) == 40
    assert cache_blocks(replace(CONFIG, gpu_memory_utilization=0.05), gigabyte, **memory, num_replicas=1) == 0
    assert cache_blocks(replace(CONFIG, num_gpu_blocks_override=7), gigabyte, **memory, num_replicas=1) == 7


# ---- the C interface


def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    names = {
        "fd_buffer": cuda_library.Buffer,
        "fd_info_t": cuda_library.Info,
        "fd_retile_args": cuda_library.RetileArgs,
        "fd_product_args": cuda_library.ProductArgs,
        "fd_embedding_args": cuda_library.EmbeddingArgs,
        "fd_norm_args": cuda_library.NormArgs,
        "fd_rotation_args": cuda_library.RotationArgs,
        "fd_attention_args": cuda_library.AttentionArgs,
        "fd_route_args": cuda_library.RouteArgs,
        "fd_combine_args": cuda_library.CombineArgs,
        "fd_draw_args": cuda_library.DrawArgs,
    }
    lines, expected = [], []
    for name, structure in names.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        expected.append(len(bytes(structure())))
        for field, *_ in structure._fields_:
            lines.append(f'printf("%zu\\n", offsetof({name}, {field}));')
            expected.append(getattr(structure, field).offset)
    lines.append('printf("%zu\\n", sizeof(fd_sampling_row));')
    expected.append(SAMPLING_ROW.itemsize)
    for field in SAMPLING_ROW.names or ():
        lines.append(f'printf("%zu\\n", offsetof(fd_sampling_row, {field}));')
        assert SAMPLING_ROW.fields is not None
        expected.append(SAMPLING_ROW.fields[field][1])
    header = Path(__file__).parents[2] / "custom_ops/include/fd_device.h"
    source = tmp_path / "sizes.c"
    includes = f'#include <stddef.h>\n#include <stdio.h>\n#include "{header}"\n'
    source.write_text(includes + "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n")
    subprocess.run(["cc", "-o", tmp_path / "sizes", source], check=True)
    done = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True)
    assert [int(line) for line in done.stdout.split()] == expected
    assert SAMPLING_ROW.itemsize == SAMPLING_ROW_BYTES


# ---- the choice

_DRIVER = """
#include <stdio.h>
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 70 + ordinal; return 0; }
int cuDeviceGetName(char* name, int size, int device) { return snprintf(name, size, "Card %d", device) < 0; }
int cuDeviceGetAttribute(int* value, int name, int device) { *value = name == 75 ? 9 : 0; return 0; }
int cuDeviceGetPCIBusId(char* id, int size, int device) {
  return snprintf(id, size, "0000:%d:00.0A", device) < 0;
}
#ifndef OLD
int cuDeviceGetUuid_v2(char* uuid, int device) { memset(uuid, device, 16); return 0; }
#endif
"""


@pytest.mark.parametrize("is_old", [False, True])
def test_the_driver_names_its_gpus(tmp_path: Path, is_old: bool) -> None:
    (tmp_path / "driver.c").write_text(_DRIVER)
    compiler = ["cc", "-shared", "-fPIC", "-o", "libcuda.so.1", "driver.c", *(["-DOLD"] if is_old else [])]
    subprocess.run(compiler, cwd=tmp_path, check=True)
    script = "from fastdeploy.device.choice import visible_gpus; print(*visible_gpus(), sep='\\n')"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    )
    expected = [
        Gpu(
            ordinal,
            f"Card {device}",
            (9, 0),
            uuid="" if is_old else f"GPU-{UUID(bytes=bytes([device] * 16))}",
            pci_address=f"0000:{device}:00.0a",
        )
        for ordinal, device in enumerate((70, 71))
    ]
    assert done.stdout.splitlines() == [str(gpu) for gpu in expected]


def test_replicas_are_dealt_over_the_visible_gpus() -> None:
    gpus = [replace(HOPPER, ordinal=i) for i in range(3)]
    dealt = [deal(replace(CONFIG, data_parallel_size=8, data_parallel_rank=rank), gpus) for rank in range(8)]
    assert [gpu.ordinal for gpu in dealt] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [gpu.num_replicas for gpu in dealt] == [3, 3, 2, 3, 3, 2, 3, 3]
    chosen = deal(replace(CONFIG, data_parallel_size=8, data_parallel_rank=5, replicas_per_gpu=4), gpus[:1])
    assert (chosen.ordinal, chosen.num_replicas) == (0, 4)


@pytest.mark.parametrize(
    ("changes", "model", "gpus", "built", "reason"),
    [
        ({"dtype": "float32"}, {}, [HOPPER], True, "--dtype float32 is computed on CPUs only"),
        ({"quantization": "wint8"}, {}, [HOPPER], True, "--quantization wint8 is computed on CPUs only"),
        ({"block_size": 16}, {}, [HOPPER], True, "--block-size is 16; on GPUs it must be 64"),
        ({"max_num_seqs": 2000}, {}, [HOPPER], True, "--max-num-seqs is 2000"),
        ({"enable_expert_parallel": True}, {}, [HOPPER], True, "--enable-expert-parallel works on CPUs only"),
        ({}, {"head_dim": 32}, [HOPPER], True, "head_dim is 32"),
        ({}, {"vocab_size": 97}, [HOPPER], True, "vocab_size is 97; on GPUs it must be even"),
        ({}, {"hidden_size": 46}, [HOPPER], True, "hidden_size is 46"),
        ({}, {"moe_intermediate_size": 20}, [HOPPER], True, "moe_intermediate_size is 20"),
        ({}, {}, [Gpu(0, "NVIDIA A100", (8, 0))], True, "is a NVIDIA A100 of compute capability 8.0"),
        ({}, {}, [HOPPER], False, "libfd_cuda.so is not built; run make gpu"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    changes: dict[str, object],
    model: dict[str, object],
    gpus: list[Gpu],
    built: bool,
    reason: str,
) -> None:
    monkeypatch.setattr(choice, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(choice, "find_library", lambda: Path("x") if built else None)
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    shape = model_config(tmp_path, **model)
    with caplog.at_level(logging.WARNING):
        assert choose_gpu(config, shape) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("--device auto computes on the CPU: ")
    assert reason in line
    with pytest.raises(ConfigError) as refused:
        choose_gpu(replace(config, device="gpu"), shape)
    assert reason in str(refused.value)
    assert choose_gpu(replace(config, device="cpu"), shape) is None


def test_auto_takes_a_gpu_or_silently_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    shape = model_config(tmp_path)
    assert unsupported(CONFIG, shape) is None
    monkeypatch.setattr(choice, "find_library", lambda: Path("x"))
    monkeypatch.setattr(choice, "visible_gpus", lambda: [HOPPER])
    assert choose_gpu(CONFIG, shape) == HOPPER
    monkeypatch.setattr(choice, "visible_gpus", list)
    assert choose_gpu(CONFIG, shape) is None
    assert caplog.records == []
    with pytest.raises(ConfigError, match="--device is 'gpu', but the driver shows no GPU"):
        choose_gpu(replace(CONFIG, device="gpu"), shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "--device is 'tpu'; it must be 'auto' or 'cpu' or 'gpu'"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization is 0; it must be more than 0"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization is 1.5; it must be more than 0"),
        ({"replicas_per_gpu": -1}, "--replicas-per-gpu is -1"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        replace(CONFIG, **changes)  # type: ignore[arg-type]
    assert str(refused.value).startswith(message)
