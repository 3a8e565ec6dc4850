"""fdctl: the operator's command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ... import __version__
from ...common.errors import ConfigError, FastDeployError
from ..control.protocol import BAD_CONFIG, DENIED, DETACHED, FAILED, NO_DAEMON, DaemonUnreachable, NotAllowed
from . import (
    client,
    completion,
    configurations,
    generation,
    operations,
    program_output,
    status_commands,
    top,
    why,
)

_LOG_LINES = 50
_EPILOG = """\
REPLICA is a number or router. Default of --prefix: $FD_PREFIX, else ./run if a daemon has used it, else the
system's daemon. With --json, output is JSON; an error is {"code": ..., "error": ...}.

Exit codes:
  0    done
  1    failed; the line on stderr says why
  2    wrong usage, or no such replica
  3    no daemon answers
  4    invalid dp.toml; nothing has changed
  5    busy: another operation is in progress
  6    no expert group
  7    not allowed: neither root, nor the daemon's user, nor a member of its group
  130  Ctrl-C; the command continues"""


def main() -> int:
    parser = _parser()
    completion.complete(parser)
    options = parser.parse_args()
    try:
        return options.run(options)
    except client.Rejected as error:
        return client.fail(str(error), error.code, as_json=options.json)
    except DaemonUnreachable as error:
        return client.fail(str(error), NO_DAEMON, as_json=options.json)
    except NotAllowed as error:
        return client.fail(str(error), DENIED, as_json=options.json)
    except ConfigError as error:
        return client.fail(str(error), BAD_CONFIG, as_json=options.json)
    except FastDeployError as error:
        return client.fail(str(error), FAILED, as_json=options.json)
    except KeyboardInterrupt:
        return DETACHED
    except BrokenPipeError:
        # The reader of the pipe (head, less) has closed it; flushing at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fdctl", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", type=Path, metavar="DIRECTORY", help="the daemon's --prefix")
    parser.add_argument(
        "--socket", type=Path, metavar="FILE", help="the daemon's socket, if dp.toml sets [paths] run"
    )
    parser.add_argument("--version", action="version", version=f"fdctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str, replica: str = ""
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help, description=help)
        found.set_defaults(run=run)
        if replica:
            argument = found.add_argument("replica", metavar=replica)
            argument.completer = completion.replicas  # type: ignore[attr-defined]
        found.add_argument("--json", action="store_true", help="print JSON: docs/fdctl.md")
        return found

    _add_queries(command)
    _add_operations(command)
    found = command("check", configurations.check, "check a dp.toml")
    found.add_argument("file", type=Path, metavar="FILE")
    found = command("render", configurations.render, "print the programs that a dp.toml describes")
    found.add_argument("file", type=Path, metavar="FILE", nargs="?", help="default: the daemon's")
    found.add_argument("--write", action="store_true", help="write supervisord's files instead")
    found = command("generate", generation.generate, "generate a completion of a prompt")
    prompt = found.add_argument("prompt", metavar="PROMPT")
    prompt.completer = completion.nothing  # type: ignore[attr-defined]
    found.add_argument("--max-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    found = command("completion", completion.completion, "print a shell completion script")
    found.add_argument("shell", choices=completion.SHELLS)
    return parser


def _add_queries(command: Callable[..., argparse.ArgumentParser]) -> None:
    _add_watch(command("status", status_commands.status, "show the state of every program"))
    found = command("top", top.top, "show the activity of the replicas until q or Ctrl-C")
    found.add_argument("--once", action="store_true", help="print one frame, measured over a second")
    found = command(
        "ep", status_commands.ep, "show the expert-parallel groups and which ranks wait for which others"
    )
    group = found.add_argument("group", metavar="GROUP", nargs="?", help="default: the daemon's groups")
    group.completer = completion.nothing  # type: ignore[attr-defined]
    _add_watch(found)
    found = command("why", why.why, "explain the state of a program, with its last exit and its last output")
    replica = found.add_argument(
        "replica",
        metavar="REPLICA|all",
        nargs="?",
        default="all",
        help="default: all programs that are not READY",
    )
    replica.completer = completion.replicas  # type: ignore[attr-defined]
    found = command("logs", program_output.logs, "print the output of a program", "REPLICA")
    found.add_argument("-f", "--follow", action="store_true", help="print new lines until Ctrl-C")
    found.add_argument(
        "-n", "--lines", type=int, default=_LOG_LINES, metavar="N", help="default: %(default)s"
    )


def _add_operations(command: Callable[..., argparse.ArgumentParser]) -> None:
    found = command(
        "reload", operations.reload, "apply dp.toml: restart or reload changed programs, one at a time"
    )
    found.add_argument("--dry-run", action="store_true", help="only print the changes")
    _add_wait(found)
    for name, help in (
        ("restart", "stop and start programs, one at a time"),
        ("stop", "stop programs and keep them down until start"),
        ("start", "start programs that are down"),
        ("drain", "send no new requests to a replica until undrain"),
        ("undrain", "send requests to a replica again"),
        ("hold", "exclude a program from restarts, kills and reloads until release"),
        ("release", "end a hold"),
    ):
        _add_wait(command(name, operations.operate, help, "REPLICA|all"))


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-w", "--watch", action="store_true", help="refresh each second until Ctrl-C")


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wait for the end and return the result (default); Ctrl-C detaches",
    )


if __name__ == "__main__":
    sys.exit(main())
