"""The command `python -m fastdeploy.weight_cache MODEL`, which packs a checkpoint in advance."""

from __future__ import annotations

import argparse
import logging
import sys

from .common.cli import CommandLine
from .common.errors import CheckpointError, FastDeployError
from .config import EngineConfig, ModelConfig
from .demo_model.model import resolve_model_path
from .weights.packed_file import verify
from .weights.weight_cache import Packing, packed_tensors

_log = logging.getLogger("fastdeploy.weight_cache")


def main() -> int:
    try:
        return _run(_parser().parse_args())
    # OSError: a damaged file on a read-only disk cannot be removed.
    except (FastDeployError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        prog="python -m fastdeploy.weight_cache",
        description="Packs the weights of a checkpoint in advance, so that the first replica starts quickly.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help='directory of an ERNIE-4.5 checkpoint, or "demo"')
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32")
    parser.add_argument("--quantization", help="wint8 or wint4: weights of 8 or 4 bits")
    parser.add_argument(
        "--qkv-order", default="plain", help="layout of fused qkv in Paddle checkpoints: plain or grouped"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare an existing packed file with its checksum"
    )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    # Imported here to keep error exits and --help fast.
    from rich.console import Console
    from rich.progress import Progress as Bar

    logging.basicConfig(format="weight cache: %(message)s", level=logging.INFO)
    engine = EngineConfig(
        model=resolve_model_path(arguments.model),
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        qkv_order=arguments.qkv_order,
    )
    packing = Packing(engine.model, engine.weight_format, engine.qkv_order)
    config = ModelConfig.from_directory(engine.model)
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def report(fraction: float, stage: str) -> None:
            bar.update(task, completed=fraction, description=stage)

        if arguments.verify and packing.file.exists():
            try:
                verify(packing.file, lambda fraction: report(fraction, "verifying"))
            except CheckpointError as error:
                _log.warning("%s; packing it again", error)
                packing.file.unlink(missing_ok=True)
        packed_tensors(packing, config, report)
    print(packing.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
