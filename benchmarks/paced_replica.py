"""A replica whose API process is the real one and whose worker is paced_worker.py.

Usage: python -m benchmarks.paced_replica STEPS_PER_SECOND TOKENS_FILE, then the flags of api_server.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from fastdeploy.entrypoints.openai import api_server, serve

_WORKER = Path(__file__).with_name("paced_worker.py")


def main() -> int:
    pace, tokens, *flags = sys.argv[1:]
    command = [sys.executable, str(_WORKER), pace, tokens]
    # api_server has no option for another worker; mypy does not expect a class to be replaced.
    serve.EngineClient = functools.partial(serve.EngineClient, command=command)  # type: ignore[misc, assignment]
    return api_server.main(flags)


if __name__ == "__main__":
    sys.exit(main())
