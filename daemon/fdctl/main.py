"""fdctl: the operator's command line. What it prints is for people; with --json, for programs."""

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
REPLICA is a number, or router. Without --prefix: $FD_PREFIX, else ./run if a daemon has been there, else the
system's daemon. --json: what it prints is JSON; an error is {"code": ..., "error": ...}.

Exit codes:
  0    done
  1    failed; the line on stderr says why
  2    wrong usage, or no such replica
  3    no daemon answers
  4    bad dp.toml; everything goes on as it was
  5    busy: another operation is under way
  6    no expert group
  7    not allowed: neither root, nor the daemon's user, nor a member of its group
  130  Ctrl-C; what was asked for goes on"""


def main() -> int:
    parser = _parser()
    completion.answer_the_shell(parser)
    options = parser.parse_args()
    try:
        return options.run(options)
    except client.Refused as error:
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
        # The reader of our output (head, less) has seen enough; not even the exit may write to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fdctl", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", type=Path, help="the daemon's --prefix")
    parser.add_argument("--socket", type=Path, help="the daemon's socket, where dp.toml sets [paths] run")
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

    _add_looks(command)
    _add_operations(command)
    found = command("check", configurations.check, "read a dp.toml and say what is wrong with it")
    found.add_argument("file", type=Path, metavar="FILE")
    found = command("render", configurations.render, "print what would run, before it runs")
    found.add_argument("file", type=Path, metavar="FILE", nargs="?", help="default: the daemon's")
    found.add_argument("--write", action="store_true", help="put supervisord's files in place instead")
    found = command("generate", generation.generate, "ask the model something")
    prompt = found.add_argument("prompt", metavar="PROMPT")
    prompt.completer = completion.nothing  # type: ignore[attr-defined]
    found.add_argument("--max-tokens", type=int, default=256, help="default: %(default)s")
    found = command("completion", completion.completion, "print a script that completes fdctl's words")
    found.add_argument("shell", choices=completion.SHELLS)
    return parser


def _add_looks(command: Callable[..., argparse.ArgumentParser]) -> None:
    _add_watch(command("status", status_commands.status, "show every replica and how it is"))
    found = command("top", top.top, "show what the replicas do just now, until q or Ctrl-C")
    found.add_argument("--once", action="store_true", help="one look, over a second")
    found = command("ep", status_commands.ep, "show the expert-parallel group, and who waits for whom")
    group = found.add_argument("group", metavar="GROUP", nargs="?", help="default: those of the daemon")
    group.completer = completion.nothing  # type: ignore[attr-defined]
    _add_watch(found)
    found = command(
        "why", why.why, "say how a program is and why, how it ended last, and what it printed last"
    )
    replica = found.add_argument(
        "replica", metavar="REPLICA|all", nargs="?", default="all", help="default: all that is not well"
    )
    replica.completer = completion.replicas  # type: ignore[attr-defined]
    found = command("logs", program_output.logs, "print the output of a program", "REPLICA")
    found.add_argument("-f", "--follow", action="store_true", help="go on as it grows")
    found.add_argument("-n", "--lines", type=int, default=_LOG_LINES, help="default: %(default)s")


def _add_operations(command: Callable[..., argparse.ArgumentParser]) -> None:
    found = command(
        "reload", operations.reload, "apply dp.toml to the programs that it changes, one at a time"
    )
    found.add_argument("--dry-run", action="store_true", help="only say what would change")
    _add_wait(found)
    for name, help in (
        ("restart", "end and start, one at a time"),
        ("stop", "end, and keep down until started"),
        ("start", "start what is down"),
        ("drain", "let the router give it nothing new"),
        ("undrain", "let the router use it again"),
        ("hold", "let nobody touch it: no restart, no kill, no reload"),
        ("release", "take a hold back"),
    ):
        _add_wait(command(name, operations.operate, help, "REPLICA|all"))


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-w", "--watch", action="store_true", help="again and again, until Ctrl-C")


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="until it is done, with the true result (default); Ctrl-C leaves it to go on by itself",
    )


if __name__ == "__main__":
    sys.exit(main())
