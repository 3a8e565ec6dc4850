"""Shell completion. The shell runs fdctl at each TAB, so current replicas are completed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os

from ...common.errors import FastDeployError
from ..control import protocol
from . import client

SHELLS = ("bash", "zsh", "fish")

#: Environment variable of argcomplete's calls.
_VARIABLE = "_ARGCOMPLETE"
#: Seconds that a TAB may take.
_TIMEOUT = 1.0


def completion(options: argparse.Namespace) -> int:
    import argcomplete

    script = argcomplete.shellcode(["fdctl"], shell=options.shell)
    print(json.dumps({"shell": options.shell, "script": script}) if options.json else script)
    return protocol.OK


def complete(parser: argparse.ArgumentParser) -> None:
    """Print completions and exit if the shell asks for them, else do nothing."""
    if _VARIABLE in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def replicas(*, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Completer for argcomplete. It must not raise."""
    found = ["all", "router"]
    with contextlib.suppress(FastDeployError):
        status = client.ask(parsed_args, {"do": "status"}, _TIMEOUT)["status"]
        found += [str(entry["replica"]) for entry in status["replicas"]]
    return found


def nothing(**_: object) -> list[str]:
    return []
