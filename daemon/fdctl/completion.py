"""Shell completion. The shell runs fdctl at each TAB, so replicas are completed as they are just now."""

from __future__ import annotations

import argparse
import contextlib
import json
import os

from ...common.errors import FastDeployError
from ..control import protocol
from . import client

SHELLS = ("bash", "zsh", "fish")

#: argcomplete sets it in its calls.
_ASKED = "_ARGCOMPLETE"
#: Nobody waits longer for a TAB.
_TIMEOUT = 1.0


def completion(options: argparse.Namespace) -> int:
    import argcomplete

    script = argcomplete.shellcode(["fdctl"], shell=options.shell)
    print(json.dumps({"shell": options.shell, "script": script}) if options.json else script)
    return protocol.OK


def answer_the_shell(parser: argparse.ArgumentParser) -> None:
    """Does nothing but in a call by the shell, and then it does not return."""
    if _ASKED in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def replicas(*, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """A completer as argcomplete calls them; it must never fail."""
    found = ["all", "router"]
    with contextlib.suppress(FastDeployError):
        status = client.ask(parsed_args, {"do": "status"}, _TIMEOUT)["status"]
        found += [str(entry["replica"]) for entry in status["replicas"]]
    return found


def nothing(**_: object) -> list[str]:
    return []
