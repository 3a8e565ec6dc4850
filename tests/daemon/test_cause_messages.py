"""The patterns of exit_cause.py match what programs really print: a changed message fails here."""

from __future__ import annotations

import ast
import errno
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fastdeploy.daemon.config import launch
from fastdeploy.daemon.diagnosis import exit_cause
from fastdeploy.daemon.diagnosis.exit_cause import Cause, Exit, explain, killed_worker
from fastdeploy.daemon.diagnosis.exit_diagnosis import ExitDiagnosis
from fastdeploy.daemon.process.supervisord_config import Layout

ROOT = Path(__file__).parents[2]
#: Messages of ours with values filled in, the file that prints each, and the cause.
MESSAGES = [
    (
        "engine/common/ports.py",
        "--port: port 1811 on 127.0.0.1 is taken by pid 3 (nc); choose a free one",
        "port",
    ),
    ("engine/common/ports.py", "--port: cannot listen on 10.0.0.9 port 1811: Permission denied", "port"),
    ("daemon/router/server/main.py", "cannot listen on 10.0.0.9 port 30000: in use", "port"),
    ("engine/core/worker.py", "not enough memory", "memory"),
    (
        "engine/expert_parallel/memory.py",
        "/dev/shm has no room for this rank's part of the expert group: 9 MB are needed (x); make it larger "
        "(docker: --shm-size)",
        "memory",
    ),
    (
        "engine/expert_parallel/member.py",
        "/dev/shm is full: 9 MB more are needed for the results of this rank's experts; make it larger "
        "(docker: --shm-size)",
        "memory",
    ),
    (
        "engine/device/cuda.py",
        "the KV cache gets 3 blocks of 7.3 MB, and one sequence of --max-model-len 4096 needs 64; 0.10 GB of "
        "141.00 GB of GPU memory are free: lower --max-model-len or raise --gpu-memory-utilization",
        "memory",
    ),
    (
        "engine/device/choice.py",
        "--device is 'gpu', but the driver shows no GPU; use --device cpu or auto to compute on the CPU",
        "flag",
    ),
    (
        "engine/weights/weight_cache.py",
        "packed weights of /m cannot be written to /c (x); make room there, or set FD_MODEL_CACHE to another "
        "directory",
        "disk",
    ),
    ("engine/weights/weight_cache.py", "/m was changed while it was packed; start again", "model"),
    ("engine/weights/stored_tensors.py", "/m: no weights; expected x or y", "model"),
    (
        "engine/weights/stored_tensors.py",
        "/m/x: tensor 'a' contains values that are not finite numbers",
        "model",
    ),
    ("engine/tokenizer/tokenizer.py", "/m: no tokenizer; one of tokenizer.json, x is needed", "model"),
    (
        "engine/demo_model/model.py",
        "model 'x' is not a directory; give a checkpoint's directory, or 'demo' for the demo model",
        "model",
    ),
    ("engine/entrypoints/openai/engine_client.py", "worker pid=12 exited with code 0", "operator"),
    ("engine/entrypoints/openai/engine_client.py", "worker pid=12 was killed by SIGKILL", "killed"),
    ("engine/entrypoints/openai/engine_client.py", "worker pid=12 was killed by SIGSEGV", "crash"),
]
#: Names of a checkpoint's files with which errors begin, and the modules that read them.
MODEL_FILES = {
    "config.json": "engine/config.py",
    "generation_config.json": "engine/config.py",
    "tokenizer_config.json": "engine/tokenizer/tokenizer.py",
    "special_tokens_map.json": "engine/tokenizer/tokenizer.py",
    "added_tokens.json": "engine/tokenizer/tokenizer.py",
    "tokenizer.json": "engine/tokenizer/tokenizer.py",
    "chat_template.jinja": "engine/tokenizer/tokenizer.py",
    "tokenizer.model": "engine/tokenizer/tokenizer.py",
    "spm.model": "engine/tokenizer/tokenizer.py",
    "model.safetensors": "engine/weights/stored_tensors.py",
}
#: Messages of the kernel, Python and C++.
FOREIGN = [
    *((os.strerror(code), "disk") for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)),
    (os.strerror(errno.EADDRINUSE), "port"),
    (os.strerror(errno.ENOMEM), "memory"),
    (repr(MemoryError()), "memory"),
    ("std::bad_alloc", "memory"),
]
_PLACEHOLDER = re.compile(r"%[-+0-9.]*[sdrgfi]")


@cache
def templates(file: str) -> list[tuple[str, re.Pattern[str]]]:
    """Return the texts in a Python file: their fixed parts, and a pattern of what they may become."""
    found = []
    tree = ast.parse((ROOT / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = [*_split(node.value)]
        else:
            continue
        fixed = "".join(part for part in parts if part)
        pattern = "".join(".*" if part is None else re.escape(part) for part in parts)
        found.append((fixed, re.compile(pattern)))
    return found


def _split(text: str) -> list[str | None]:
    """Return the fixed parts of a %-format, with None for each placeholder."""
    pieces = _PLACEHOLDER.split(text)
    return [part for piece in pieces for part in (piece, None)][:-1]


def is_printed(file: str, message: str) -> bool:
    """Return True if a text of the file, not one that is nearly all placeholders, may become the message."""
    return any(
        pattern.fullmatch(message) and len(fixed.replace(" ", "")) * 3 >= len(message.replace(" ", ""))
        for fixed, pattern in templates(file)
    )


@pytest.mark.parametrize(
    ("file", "message", "cause"), MESSAGES, ids=[message[:30] for _, message, _ in MESSAGES]
)
def test_a_message_of_ours_is_printed_and_has_its_cause(file: str, message: str, cause: str) -> None:
    assert is_printed(file, message), f"{file} has no such message any more"
    assert explain(Exit("exit status 3", message)).cause == cause


def test_a_fault_of_the_gpu_begins_with_the_name_that_its_library_gives() -> None:
    assert '* fd_platform(void) { return "GPU"; }' in (ROOT / "custom_ops/cuda/capi.cu").read_text()
    assert explain(Exit("exit status 75", "GPU: is lost")).cause is Cause.GPU


def test_the_end_of_a_worker_is_described_by_its_api_process() -> None:
    file = "engine/entrypoints/openai/worker_process.py"
    assert is_printed(file, "exited with code 0")
    assert is_printed(file, "was killed by SIGKILL")
    assert killed_worker("worker pid=12 was killed by SIGKILL") == 12


@pytest.mark.parametrize("name", MODEL_FILES)
def test_an_error_that_begins_with_a_file_of_the_model_is_its_fault(name: str) -> None:
    assert any(fixed == name for fixed, _ in templates(MODEL_FILES[name]))
    assert explain(Exit("exit status 2", f"/m/{name}: x")).cause is Cause.MODEL


@pytest.mark.parametrize(("message", "cause"), FOREIGN)
def test_a_message_of_the_system_has_its_cause(message: str, cause: str) -> None:
    assert explain(Exit("exit status 3", message)).cause == cause


def test_an_array_that_numpy_cannot_allocate_is_a_lack_of_memory() -> None:
    with pytest.raises(MemoryError) as caught:
        np.empty(1 << 62, np.int8)
    assert explain(Exit("exit status 3", str(caught.value))).cause is Cause.MEMORY


def test_a_rank_that_kills_another_prints_what_is_searched_for(tmp_path: Path) -> None:
    line = (
        "expert group dp: rank 0 (pid 12) has made no progress for 90.1 s (computing, layer 3); it is killed"
    )
    file = "engine/expert_parallel/member.py"
    assert is_printed(file, line)
    assert any(fixed == "; it is killed" for fixed, _ in templates(file))
    layout = Layout(tmp_path, tmp_path)
    layout.output("replica1").parent.mkdir()
    layout.output("replica1").write_text(f"{line}\n")
    assert ExitDiagnosis(layout)._has_killed("replica1", 12)


def test_exit_codes_of_fd_run_and_of_wrong_flags_are_known() -> None:
    assert "fd-run" in explain(Exit(f"exit status {launch.NOT_STARTED}")).words
    assert explain(Exit(f"exit status {launch.USAGE}", "x")).cause is Cause.FLAG


@pytest.mark.parametrize("name", ["_PORT", "_MEMORY", "_DISK", "_MODEL"])
def test_every_alternative_of_a_pattern_matches_a_message(name: str) -> None:
    pattern: re.Pattern[str] = getattr(exit_cause, name)
    messages = [message for _, message, _ in MESSAGES] + [message for message, _ in FOREIGN]
    messages += [f"/m/{file}: x" for file in MODEL_FILES] + ["Unable to allocate 3 GiB"]
    unused = [
        alternative
        for alternative in alternatives(pattern.pattern)
        if not any(re.search(alternative, message, pattern.flags) for message in messages)
    ]
    assert unused == []


def alternatives(pattern: str) -> list[str]:
    """Return the parts of a regular expression between | outside of parentheses."""
    found, depth = [""], 0
    for char in pattern:
        depth += (char == "(") - (char == ")")
        if char == "|" and not depth:
            found.append("")
        else:
            found[-1] += char
    return found
