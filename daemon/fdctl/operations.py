"""Commands that change something: reload, restart, drain and so on. Ctrl-C detaches from them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..control import protocol
from . import client


def reload(options: argparse.Namespace) -> int:
    return _run(
        options, {"do": "reload", "dry_run": options.dry_run, "wait": options.wait or options.dry_run}
    )


def operate(options: argparse.Namespace) -> int:
    """Run restart, start, stop, drain, undrain, hold or release."""
    return _run(options, {"do": options.command, "name": options.replica, "wait": options.wait})


def _run(options: argparse.Namespace, command: dict[str, Any]) -> int:
    try:
        answer = _send(options, command)
    except KeyboardInterrupt:
        # The command continues in the daemon.
        what = f"detached; the {command['do']} continues: {client.command_line(options, 'status')}"
        if options.json:
            print(json.dumps({"code": protocol.DETACHED, "error": what}), flush=True)
        print(f"fdctl: {what}", file=sys.stderr)
        return protocol.DETACHED
    if answer["code"] != protocol.OK:
        return client.fail(answer["error"], answer["code"])
    return protocol.OK


def _send(options: argparse.Namespace, command: dict[str, Any]) -> dict[str, Any]:
    """Print the daemon's messages and return the result."""
    timeout = None if command["wait"] else client.TIMEOUT
    messages = protocol.request(client.socket(options), command, timeout)
    answer: dict[str, Any] = {}
    if options.json or not sys.stdout.isatty():
        for answer in messages:
            _show_json(answer) if options.json else _show_line(answer)
        return answer
    # Imported here because it is slow.
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
