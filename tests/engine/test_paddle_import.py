"""The import of Paddle: what an engine loads of it, and what is loaded later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeploy.common.messages import Ready

from .worker_api import CONFIG, DEADLINE_S, Api, request

IMPORT = "from fastdeploy.common.paddle_import import DEFERRED, import_paddle; import_paddle()\n"
WORK = """
import sys
from fastdeploy.common.paddle_import import DEFERRED
from fastdeploy.core.worker import main

status = main()
print(status, "loaded:", *(name for name in DEFERRED if f"paddle.{name}" in sys.modules), file=sys.stderr)
"""
USE = """
import importlib, sys
import paddle
importlib.import_module(f"paddle.{sys.argv[1]}")
for name in DEFERRED:
    part = importlib.import_module(f"paddle.{name}")
    assert part is sys.modules[f"paddle.{name}"] and part.__spec__.origin == part.__file__, name
assert paddle.nn is sys.modules["paddle.nn"]
layer = paddle.nn.Linear(3, 4)
assert isinstance(layer, paddle.nn.Layer) and not isinstance(layer, paddle.DataParallel)
class Parallel(paddle.DataParallel): pass
assert issubclass(Parallel, paddle.distributed.parallel.DataParallel)
assert paddle.hann_window(4).shape == [4] and paddle.signal.stft is sys.modules["paddle.signal"].stft
layer(paddle.ones([2, 3])).sum().backward()
assert layer.weight.grad.shape == [3, 4]
"""


def run(program: str, *arguments: str, **env: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", IMPORT + program, *arguments]
    return subprocess.run(
        command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True, timeout=120
    ).stdout.strip()


def test_a_worker_that_generates_loads_no_deferred_part(tmp_path: Path) -> None:
    api = Api(CONFIG, tmp_path, "-c", WORK)
    try:
        api.receive_until(Ready)
        assert api.generate([request("one", [5, 6, 7], max_tokens=2)])["one"]
        api.process.terminate()
        assert api.process.wait(DEADLINE_S) == 0
        assert api.stderr().splitlines()[-1] == "0 loaded:"
    finally:
        api.close()


@pytest.mark.parametrize("first", ["nn", "utils.cpp_extension"])
def test_deferred_parts_are_there_when_they_are_used(first: str) -> None:
    run(USE, first)


@pytest.mark.parametrize(
    ("version", "loaded"),
    [
        pytest.param("full_version     = '3.3.1'\ncuda_version     = 'False'\n", False, id="known"),
        pytest.param("full_version     = '3.3.2'\ncuda_version     = 'False'\n", True, id="other release"),
        pytest.param("full_version     = '3.3.1'\ncuda_version     = '12.9'\n", True, id="other build"),
        pytest.param(None, True, id="no version"),
    ],
)
def test_only_the_known_paddle_is_imported_in_parts(
    tmp_path: Path, version: str | None, loaded: bool
) -> None:
    for name, text in {
        "paddle/__init__.py": "from . import nn\ndef disable_signal_handler(): pass\n",
        "paddle/nn/__init__.py": "",
        **({"paddle/version/__init__.py": version} if version is not None else {}),
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    program = "import sys; print('paddle.nn' in sys.modules)"
    assert run(program, PYTHONPATH=str(tmp_path)) == str(loaded)
