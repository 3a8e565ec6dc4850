"""Checkpoints packed once for all replicas of a machine; the command is `python -m fastdeploy.weight_cache`.

Below the model cache lies one file for each checkpoint and format. A replica maps it, or packs it first if it
is not there or was made from other files; whoever starts meanwhile waits for that one. The file appears
complete or not at all: it is made beside its place and renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import CheckpointError, FastDeployError
from ..common.foreign_text import printable
from ..common.paddle_import import import_paddle
from ..config import ModelConfig
from ..demo_model.model import model_cache
from .packed_file import check_header, read, write
from .stored_tensors import INDEX_FILE, StoredTensor, weight_files

_log = logging.getLogger("fastdeploy.weights.weight_cache")

Progress = Callable[[float, str], None]

#: packed_matrix.LAYOUT_VERSION, and after it the version of the set of tensors and their names. Written down
#: here, because whoever only maps a file has no need of what packs one.
VERSION = "2.2"

_DIRECTORY_NAME = "packed"
_POLL_SECONDS = 0.1
#: What the lock's file says of the packer; written at once, so that nobody reads half of it.
_NOTE_BYTES = 128


@dataclass(frozen=True, slots=True)
class Packing:
    """One checkpoint in one format."""

    checkpoint: Path
    weight_format: str
    qkv_order: str = "plain"

    @property
    def file(self) -> Path:
        """Where it is kept. The checkpoint's files are not part of the name: changed ones take its place."""
        path = self.checkpoint.resolve()
        form = self.weight_format if self.qkv_order == "plain" else f"{self.weight_format}-{self.qkv_order}"
        key = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
        return model_cache() / _DIRECTORY_NAME / f"{path.name}-{key}.{form}.safetensors"

    def metadata(self) -> dict[str, str]:
        """What tells whether a file is still what packing the checkpoint would give.

        Raises:
            CheckpointError: the checkpoint has no weights.
        """
        config = self.checkpoint / "config.json"
        try:
            digest = hashlib.sha256(config.read_bytes())
            for file in [*weight_files(self.checkpoint), self.checkpoint / INDEX_FILE]:
                if file.name == INDEX_FILE and not file.exists():
                    continue
                status = file.stat()
                digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from None
        return {
            "version": VERSION,
            "weight_format": self.weight_format,
            "qkv_order": self.qkv_order,
            "checkpoint": str(self.checkpoint.resolve()),
            "source": digest.hexdigest(),
        }


def packed_tensors(packing: Packing, config: ModelConfig, progress: Progress) -> dict[str, StoredTensor]:
    """The packed tensors of a checkpoint by name, mapped; packs them first if that has not been done.

    Args:
        progress: called with the fraction that is done and a word on what was, or on who is waited for. It
            may raise; nothing is left behind then.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        FastDeployError: the packed file cannot be written.
    """
    expected = packing.metadata()
    file = packing.file
    found = _find(file, expected)
    if isinstance(found, dict):
        return found
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock(file, progress) as report:
            # Meanwhile another process may have made it.
            found = _find(file, expected)
            if isinstance(found, str):
                _log.info("packing %s as %s: %s", packing.checkpoint, packing.weight_format, found)
                _pack(packing, config, expected, report)
                found = _find(file, expected)
    except OSError as error:
        raise FastDeployError(
            f"packed weights of {packing.checkpoint} cannot be written to {file.parent} "
            f"({error.strerror or error}); make room there, or set FD_MODEL_CACHE to another directory"
        ) from None
    if isinstance(found, str):
        raise CheckpointError(f"{file}: not usable though just written: {found}")
    return found


def _find(file: Path, expected: dict[str, str]) -> dict[str, StoredTensor] | str:
    """The tensors of `file`, or why they cannot be used."""
    if not os.path.exists(file):
        return "for the first time"
    try:
        stored = read(file)
    except CheckpointError as error:
        return f"what is there is damaged: {error}"
    if (version := stored.metadata.get("version")) != VERSION:
        return f"what is there has layout {version}, now it is {VERSION}"
    try:
        check_header(file, stored)
    except CheckpointError as error:
        return f"what is there is damaged: {error}"
    if any(stored.metadata.get(key) != value for key, value in expected.items()):
        return "the checkpoint has changed"
    return stored.tensors


@contextmanager
def _lock(file: Path, progress: Progress) -> Iterator[Progress]:
    """Waits until no other process packs `file`. What is reported then, those who wait report as well."""
    # The lock's file stays: removing it would let two processes lock two different files of one name.
    descriptor = os.open(file.with_name(f".{file.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                fraction, stage = _read_note(os.pread(descriptor, _NOTE_BYTES, 0))
                progress(fraction, f"waiting for {stage or 'another process'}")
                time.sleep(_POLL_SECONDS)

        def report(fraction: float, stage: str) -> None:
            note = f"{fraction:.4f} process {os.getpid()}, which is {stage}"
            os.pwrite(descriptor, note.encode().ljust(_NOTE_BYTES), 0)
            progress(fraction, stage)

        os.pwrite(descriptor, bytes(_NOTE_BYTES), 0)
        yield report
    finally:
        os.close(descriptor)


def _read_note(note: bytes) -> tuple[float, str]:
    """Return the fraction and the stage in a packer's note; 0 and "" if it is damaged."""
    first, _, stage = note.decode(errors="replace").strip(" \0").partition(" ")
    try:
        fraction = float(first or 0)
    except ValueError:
        return 0.0, ""
    return (fraction, printable(stage)) if 0 <= fraction <= 1 else (0.0, "")


def _pack(packing: Packing, config: ModelConfig, expected: dict[str, str], report: Progress) -> None:
    # Late, because it brings Paddle along: who only maps a file, or finds it there, can do without.
    import_paddle()
    from .checkpoint_matrices import read_directory
    from .packing import packed

    file = packing.file
    scratch = file.with_name(f".{file.name}.partial")
    # Left by a packer that was killed: the lock says that nobody is at it.
    scratch.unlink(missing_ok=True)
    try:
        source = read_directory(packing.checkpoint, config, packing.qkv_order)
        write(scratch, packed(source, packing.weight_format), expected, report)
        if packing.metadata() != expected:
            raise CheckpointError(f"{packing.checkpoint} was changed while it was packed; start again")
        scratch.rename(file)
    finally:
        scratch.unlink(missing_ok=True)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
