"""Commands that change something: sent, and waited for. Ctrl-C leaves them to go on by themselves."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from ..control import protocol
from . import client

#: What a message of the daemon is given to.
Show = Callable[[dict[str, Any]], None]


def reload(options: argparse.Namespace) -> int:
    return _carry_out(
        options, {"do": "reload", "dry_run": options.dry_run, "wait": options.wait or options.dry_run}
    )


def operate(options: argparse.Namespace) -> int:
    """restart, start, stop, drain, undrain, hold, release."""
    return _carry_out(options, {"do": options.command, "name": options.replica, "wait": options.wait})


def _carry_out(options: argparse.Namespace, command: dict[str, Any]) -> int:
    try:
        answer = _talk(options, command)
    except KeyboardInterrupt:
        # The daemon does not look whether somebody still waits.
        what = f"detached; the {command['do']} goes on: {client.command_line(options, 'status')}"
        if options.json:
            print(json.dumps({"code": protocol.DETACHED, "error": what}), flush=True)
        print(f"fdctl: {what}", file=sys.stderr)
        return protocol.DETACHED
    if answer["code"] != protocol.OK:
        return client.fail(answer["error"], answer["code"])
    return protocol.OK


def _talk(options: argparse.Namespace, command: dict[str, Any]) -> dict[str, Any]:
    """Shows what comes, and returns the result."""
    timeout = None if command["wait"] else client.TIMEOUT
    messages = protocol.request(client.socket(options), command, timeout)
    answer: dict[str, Any] = {}
    if options.json or not sys.stdout.isatty():
        for answer in messages:
            _show_json(answer) if options.json else _show_line(answer)
        return answer
    # Slow to import, and only for terminals.
    from .progress import Display

    with Display() as display:
        for answer in messages:
            display.take(answer)
    return answer


def _show_json(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _show_line(message: dict[str, Any]) -> None:
    if "line" in message:
        print(message["line"], flush=True)
