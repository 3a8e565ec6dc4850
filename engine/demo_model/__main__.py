"""The command `python -m fastdeploy.demo_model`, which downloads and converts the demo model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..common.errors import FastDeployError
from .model import TITLE, cached_path, ensure


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastdeploy.demo_model",
        description=f"Downloads and converts the demo model: {TITLE}.",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="target directory (default: in the model cache)"
    )
    output = parser.parse_args().output
    target = output.absolute() if output else cached_path()
    try:
        ensure(target)
    except FastDeployError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
