"""Compiler of the C++ programs of benchmarks: each is compiled on first use."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from .rows import CACHE

_FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra")


def program(name: str) -> Path:
    """Return the compiled NAME.cc of this folder; recompile it if it or a header has changed."""
    folder = Path(__file__).parent
    source = folder / f"{name}.cc"
    text = b"".join(file.read_bytes() for file in (source, *sorted(folder.glob("*.h"))))
    binary = CACHE / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}"
    if not binary.exists():
        if shutil.which("g++") is None:
            raise SystemExit(f"g++ is not installed; benchmarks/{name}.cc needs it: apt-get install g++")
        CACHE.mkdir(parents=True, exist_ok=True)
        part = binary.with_suffix(".part")
        subprocess.run(["g++", *_FLAGS, str(source), "-o", str(part)], check=True)
        part.rename(binary)
    return binary
