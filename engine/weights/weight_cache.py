"""The cache of packed checkpoints, shared by all replicas (command: `python -m fastdeploy.weight_cache`).

The model cache holds one file per checkpoint and format. A replica maps it. If it is missing or out of date,
the first replica packs it while the others wait. The file is written under another name and renamed, so it is
always complete.
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
from ..config import ModelConfig
from ..demo_model.model import model_cache
from .packed_file import check_header, read, write
from .stored_tensors import INDEX_FILE, StoredTensor, weight_files

_log = logging.getLogger("fastdeploy.weights.weight_cache")

Progress = Callable[[float, str], None]

#: packed_matrix.LAYOUT_VERSION, then the version of the tensors' names. Repeated here, because mapping a file
#: must not import the code that packs one.
VERSION = "2.2"

_DIRECTORY_NAME = "packed"
_POLL_SECONDS = 0.1
#: Size of the packer's progress note in the lock file; it is written at once, so readers see all of it.
_NOTE_BYTES = 128


@dataclass(frozen=True, slots=True)
class Packing:
    """One checkpoint in one format."""

    checkpoint: Path
    weight_format: str
    qkv_order: str = "plain"

    @property
    def file(self) -> Path:
        """Path of the packed file. It depends on the checkpoint's path, not on its content."""
        path = self.checkpoint.resolve()
        form = self.weight_format if self.qkv_order == "plain" else f"{self.weight_format}-{self.qkv_order}"
        key = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
        return model_cache() / _DIRECTORY_NAME / f"{path.name}-{key}.{form}.safetensors"

    def metadata(self) -> dict[str, str]:
        """Return the metadata of an up-to-date packed file.

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
    """Map the packed tensors of a checkpoint, by name, after packing them if necessary.

    Args:
        progress: called with the completed fraction and a description of the current stage. It may raise; no
            partial file remains then.

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
            # Another process may have packed it meanwhile.
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
        raise CheckpointError(f"{file}: was packed but cannot be used: {found}")
    return found


def _find(file: Path, expected: dict[str, str]) -> dict[str, StoredTensor] | str:
    """Return the tensors of `file`, or why they cannot be used."""
    if not os.path.exists(file):
        return "there is no packed file yet"
    try:
        stored = read(file)
    except CheckpointError as error:
        return f"the packed file is damaged: {error}"
    if (version := stored.metadata.get("version")) != VERSION:
        return f"the packed file has layout {version}, the current one is {VERSION}"
    try:
        check_header(file, stored)
    except CheckpointError as error:
        return f"the packed file is damaged: {error}"
    if any(stored.metadata.get(key) != value for key, value in expected.items()):
        return "the checkpoint has changed"
    return stored.tensors


@contextmanager
def _lock(file: Path, progress: Progress) -> Iterator[Progress]:
    """Lock `file` for packing; yield a progress callback that also informs the waiting processes."""
    # The lock file is never removed: otherwise two processes could lock different files of the same name.
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
    # Imported here, because mapping an existing file needs neither.
    from .checkpoint_matrices import read_directory
    from .packing import packed

    file = packing.file
    scratch = file.with_name(f".{file.name}.partial")
    # Remains of a packer that was killed; the lock excludes an active one.
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
