"""Costs of the HTTP API: `make bench-api`.

* functions: microseconds for a request (validation, template, tokens) and for a token (detokenizing, event).
  The peers are the libraries that other servers use.
* process: share of a core that an API process uses while 64 streams get 20 tokens per second each, and the
  tokens per second that it sends at most. Its worker has no model. The peer is a server of FastAPI and
  uvicorn that writes the same events but neither detokenizes nor talks to a worker.
* load: time to the first token, time between tokens and tokens per second of the demo model through the
  router, measured with 1, 8 and 32 streams by the public load generator aiperf.

Options choose parts: `make bench-api ARGS="functions process"`. Only a run of all parts replaces the file of
results; a part has its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdeploy.demo_model.model import resolve_model_path
from fastdeploy.entrypoints.openai.api_description import openapi

from . import api_functions, api_load, api_process
from .api_inputs import RATE, STREAMS
from .environments import NotInstalledError, installed
from .rows import ROOT, Row, report

_PACKAGES = (
    *("transformers==5.24.0", "jinja2==3.1.6", "openai==3.57.0"),
    *("fastapi==0.165.0", "uvicorn==0.54.0", "uvloop==0.23.0", "httptools==0.9.0"),
)


def main() -> None:
    parts: dict[str, Callable[[], list[Row]]] = {"functions": _functions, "process": _process, "load": _load}
    parser = argparse.ArgumentParser(description="Measure the costs of the HTTP API.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; default: all")
    wanted = parser.parse_args().parts or list(parts)
    if unknown := set(wanted) - set(parts):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; parts are {', '.join(parts)}")
    rows = [row for name in parts if name in wanted for row in parts[name]()]
    report(rows, "api" if set(wanted) == set(parts) else "api_" + "_".join(sorted(wanted)))


def _functions() -> list[Row]:
    ours = api_functions.measure()
    found = _peer_functions()
    theirs: dict[str, float] = found.get("microseconds", {})
    versions: dict[str, str] = found.get("versions", {})

    def peer_of(case: str) -> str | None:
        libraries = {"validation": "pydantic", "sse": "pydantic", "detokenizing": "tokenizers"}
        library = libraries.get(case.partition("_")[0], "transformers")
        return f"{library} {versions[library]}" if case in theirs else None

    return [Row(case, "us", value, theirs.get(case), peer_of(case)) for case, value in ours.items()]


def _peer_functions() -> dict[str, Any]:
    python = _peers_python()
    if python is None:
        return {}
    command = [str(python), "-m", "benchmarks.api_peers", "functions", str(resolve_model_path("demo"))]
    output = subprocess.run(command, cwd=ROOT, input=openapi(), stdout=subprocess.PIPE, check=True).stdout
    found: dict[str, Any] = json.loads(output)
    return found


def _process() -> list[Row]:
    steady, most = api_process.ours()
    python = _peers_python()
    case, flood = f"{STREAMS}_streams_x_{RATE}_tokens_per_s", f"{STREAMS}_streams_at_most"
    ours = {
        (case, "% core"): 100 * steady.share,
        (case, "us/token"): steady.microseconds_per_token,
        (flood, "tokens/s"): most,
    }
    if python is None:
        return [Row(*key, value) for key, value in ours.items()]
    their_steady, their_most = api_process.peer([str(python), "-m", "benchmarks.api_peers", "server"])
    theirs = (100 * their_steady.share, their_steady.microseconds_per_token, their_most)
    return [
        Row(*key, value, other, "FastAPI, uvicorn")
        for (key, value), other in zip(ours.items(), theirs, strict=True)
    ]


def _load() -> list[Row]:
    return api_load.measure()


def _peers_python() -> Path | None:
    try:
        return installed("api-peers", _PACKAGES) / "python"
    except NotInstalledError as error:
        print(f"no peers: they {error}", flush=True)
        return None


if __name__ == "__main__":
    main()
