"""A GPU with a random ERNIE-4.5-21B-A3B: the engine beside transformers and the limits of the device.

`make bench-gpu` runs it, and writes bench-results/gpu.json. Read bandwidth and cuBLAS's rate are measured in
the same run. transformers' figure is that of its fastest manner (cuda_transformers.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .cuda_engine import LAYERS, PROMPT, VOCABULARY, Measured, limit, prompt_flops, write_checkpoint
from .random_tokenizer import write_tokenizer
from .rows import ROOT, Row, report

BATCHES = (1, 8, 32, 64)
CONTEXT = 2000
_STEPS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("/tmp/fd-dp-21b"), help="of the checkpoint")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--compile", type=int, nargs="*", default=[], help="batches; slow with many layers")
    arguments = parser.parse_args()
    prepare(arguments.directory, arguments.layers)
    peer = measure_transformers(arguments.layers, arguments.compile)
    report(measure_engine(arguments.directory, arguments.layers, peer), "gpu")


def prepare(directory: Path, layers: int) -> None:
    """Write the checkpoint if it is not there."""
    if (directory / "config.json").exists():
        return
    started = time.monotonic()
    write_checkpoint(directory, layers)
    write_tokenizer(directory, VOCABULARY)
    print(f"{directory}: written in {time.monotonic() - started:.1f} s", flush=True)


def measure_transformers(layers: int, compiled: list[int]) -> dict[str, Any]:
    """Run cuda_transformers in a process of its own, which gives the memory of the GPU back."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "found.json")
        command = [sys.executable, "-m", "benchmarks.cuda_transformers", "--out", str(out)]
        command += ["--layers", str(layers), "--batch", *map(str, BATCHES), "--context", str(CONTEXT)]
        subprocess.run([*command, "--compile", *map(str, compiled)], check=True, cwd=ROOT)
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def measure_engine(directory: Path, layers: int, peer: dict[str, Any]) -> list[Row]:
    engine = Measured(directory)
    opening = engine.opening
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    rows = [
        Row("read_bandwidth", "TB/s", peer["bandwidth"] / 1e12),
        Row("cublas", "TFLOP/s", peer["cublas"] / 1e12),
        Row("load", "seconds", opening.loaded),
        Row("load_rate", "GB/s", size / opening.loaded / 1e9),
        Row("open_to_first_token", "seconds", opening.opened + opening.loaded + opening.prepared),
    ]
    for batch in BATCHES:
        # The mean context of the measured steps is then CONTEXT.
        step = engine.decode(batch, CONTEXT - _STEPS // 2, _STEPS)
        manner, taken = fastest(peer["decode"][str(batch)])
        floor = limit(batch, CONTEXT, layers, peer["bandwidth"])
        rows += [
            Row(f"decode_{batch}", "tokens/s", batch / step.mean, batch / taken, manner, batch / floor),
            Row(f"decode_{batch}_beyond_kernels", "us", (step.mean - step.alone) * 1e6),
            Row(f"decode_{batch}_host", "us", step.host * 1e6),
        ]
    engine.prompt(PROMPT)
    manner, taken = fastest(peer["prompt"])
    floor = prompt_flops(PROMPT, layers) / peer["cublas"]
    rate = PROMPT / engine.prompt(PROMPT)
    rows.append(Row(f"prompt_{PROMPT}", "tokens/s", rate, PROMPT / taken, manner, PROMPT / floor))
    engine.device.close()
    return rows


def fastest(manners: dict[str, float]) -> tuple[str, float]:
    manner = min(manners, key=manners.__getitem__)
    return f"transformers, {manner}", manners[manner]


if __name__ == "__main__":
    main()
