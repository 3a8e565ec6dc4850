"""Finds the daemon, sends it commands, and reports errors to people or, with --json, to programs."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...common.errors import FastDeployError
from ..control import protocol

#: Seconds. A daemon that hangs must not block fdctl forever.
TIMEOUT = 30.0

_SYSTEM_CONFIG = Path("/etc/fd/dp.toml")
_SYSTEM_RUN = Path("/run/fd")
#: Errors that begin with their subject, for example "7: ERROR (no such replica)".
_HAS_A_SUBJECT = re.compile(r"[^:(]+: ERROR \(")


class Rejected(FastDeployError):
    """The daemon rejected a command, or failed to carry it out. fdctl exits with `code`."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def prefix(options: argparse.Namespace) -> Path | None:
    given = options.prefix or os.environ.get("FD_PREFIX")
    return Path(given).absolute() if given else None


def socket(options: argparse.Namespace) -> Path:
    if options.socket:
        return options.socket
    below = prefix(options)
    if below is None and _is_there(protocol.socket_path(Path("run") / "run")):
        below = Path("run")
    return protocol.socket_path(below / "run" if below else _SYSTEM_RUN)


def ask(options: argparse.Namespace, command: dict[str, Any], timeout: float = TIMEOUT) -> dict[str, Any]:
    """Send a command that ends at once and return its result.

    Raises Rejected, DaemonUnreachable or NotAllowed.
    """
    *_, answer = protocol.request(socket(options), command, timeout)
    if answer["code"] != protocol.OK:
        raise Rejected(answer["error"], answer["code"])
    return answer


def status(options: argparse.Namespace, timeout: float = TIMEOUT) -> dict[str, Any]:
    found = ask(options, {"do": "status"}, timeout)["status"]
    # Daemons of older versions have no such field.
    found["daemon"].setdefault("problems", [])
    return found


def explain(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the result of the command `why` for one program."""
    return {"problems": [], **ask(options, {"do": "why", "name": name})["why"]}


def config_of_the_daemon(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the running daemon's dp.toml and prefix; the system's file if no daemon answers."""
    try:
        daemon = status(options)["daemon"]
    except (protocol.DaemonUnreachable, protocol.NotAllowed):
        return _SYSTEM_CONFIG, prefix(options)
    return Path(daemon["config"]), Path(daemon["prefix"]) if daemon["prefix"] else None


def command_line(options: argparse.Namespace, *words: str) -> str:
    """Return a command line of fdctl for the same daemon, quoted for the shell."""
    place = ["--prefix", str(options.prefix)] if options.prefix else []
    place += ["--socket", str(options.socket)] if options.socket else []
    return shlex.join(["fdctl", *place, *words])


def show_json(poll: Callable[[], dict[str, Any]], watch: bool) -> int:
    """Print one object, indented. With `watch`, print one per line each second."""
    while True:
        print(json.dumps(poll(), indent=None if watch else 2), flush=True)
        if not watch:
            return protocol.OK
        time.sleep(1.0)


def fail(what: str, code: int, *, as_json: bool = False) -> int:
    """Print an error and return the exit code."""
    if as_json:
        print(json.dumps({"code": code, "error": what}), flush=True)
    print(what if _HAS_A_SUBJECT.match(what) else f"fdctl: ERROR ({what})", file=sys.stderr)
    return code


def label(entry: dict[str, Any]) -> str:
    return f"replica {entry['replica']}" if "replica" in entry else entry["name"]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        # The connection will fail with a message.
        return True
