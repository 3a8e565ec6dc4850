"""fdctl: the operator's command line. What it prints is for people; with --json, for programs."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ConfigError, FastDeployError
from . import config as dp_toml
from . import control, masking, supervisor
from .control import BAD_CONFIG, FAILED, NO_DAEMON, NO_GROUP, OK, DaemonUnreachable
from .preflight import checked_programs_of
from .programs import Program, programs_of

_DEFAULT_CONFIG = Path("/etc/fd/dp.toml")
_TAIL_LINES = 50
_EPILOG = """\
REPLICA is a number, or router. Without --prefix: $FD_PREFIX, else ./run if a daemon has been there, else the
system's daemon. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no daemon answers, 4 bad dp.toml, 5 busy,
6 no expert group."""


def main() -> int:
    options = _parser().parse_args()
    try:
        return options.run(options)
    except DaemonUnreachable as error:
        return _error("fdctl", str(error), NO_DAEMON)
    except ConfigError as error:
        return _error("fdctl", str(error), BAD_CONFIG)
    except FastDeployError as error:
        return _error("fdctl", str(error), FAILED)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has seen enough; not even the exit may write to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def status(options: argparse.Namespace) -> int:
    def ask() -> dict[str, Any]:
        return _ask(options, {"do": "status"})["status"]

    if options.json:
        return _print_json(ask, options.watch)
    from . import table

    return table.show(ask, table.of_status, options.watch)


def ep(options: argparse.Namespace) -> int:
    """Needs no daemon: what it shows is wanted most when something hangs."""
    from . import expert_groups

    if options.group:
        names, user = [options.group], None
        nobody = f"nobody is in expert group {options.group}"
    else:
        run = _socket(options).parent
        names = expert_groups.names_of(run)
        # Also when root asks.
        user = run.stat().st_uid
        nobody = f"nobody is in an expert group of {run}: "
        if names:
            nobody += "replicas are loading or down (fdctl status), or their model has no experts"
        else:
            nobody += "[parallel] expert_parallel is off"

    def ask() -> dict[str, Any]:
        return expert_groups.groups(names, user)

    if not ask()["groups"]:
        return _error("fdctl", nobody, NO_GROUP)
    if options.json:
        return _print_json(ask, options.watch)
    from . import table

    return table.show(ask, table.of_groups, options.watch)


def reload(options: argparse.Namespace) -> int:
    return _do(options, {"do": "reload", "dry_run": options.dry_run, "wait": options.wait})


def operate(options: argparse.Namespace) -> int:
    return _do(options, {"do": options.command, "name": options.replica, "wait": options.wait})


def why(options: argparse.Namespace) -> int:
    found = _ask(options, {"do": "why", "name": options.replica})["why"]
    lines = _last_lines(Path(found["output"]), _TAIL_LINES)
    if options.json:
        print(json.dumps({**found, "lines": lines}, indent=2))
        return OK
    label = _label(found)
    print(f"{label}: {found['state']}" + (f" ({found['note']})" if found["note"] else ""))
    print(f"restarts: {found['restarts']}" + ("; held by the operator" if found["held"] else ""))
    if found["last_exit"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["last_exit_time"]))
        print(f"last exit: {found['last_exit']}, {when}")
    if found["next_try_in"] is not None:
        print(f"next try: in {found['next_try_in']} s")
    print(f"last lines of {found['output']}:")
    for line in lines:
        print(f"  {line}")
    return OK


def logs(options: argparse.Namespace) -> int:
    found = _ask(options, {"do": "why", "name": options.replica})["why"]
    file = Path(found["output"])
    for line in _last_lines(file, options.lines):
        print(line)
    if options.follow:
        for text in _follow(file):
            sys.stdout.write(text)
            sys.stdout.flush()
    return OK


def check(options: argparse.Namespace) -> int:
    config = dp_toml.load(options.file.absolute(), _prefix(options))
    checked_programs_of(config)
    print(f"{options.file}: good; {config.parallel.data_parallel_size} replicas")
    return OK


def render(options: argparse.Namespace) -> int:
    """What would run, or with --write the files from which supervisord runs it."""
    file, prefix = (options.file, _prefix(options)) if options.file else _of_the_daemon(options)
    config = dp_toml.load(file.absolute(), prefix)
    programs = programs_of(config)
    layout = supervisor.Layout(config.paths.run, config.paths.logs)
    if options.write:
        supervisor.write(layout, programs)
        return OK
    if options.json:
        print(json.dumps([_shown(program, layout.run) for program in programs], indent=2))
        return OK
    print(f"; {layout.ini}")
    print(supervisor.render(layout, programs))
    for program in programs:
        print(f"; {layout.launch / program.launch_name}")
        print(json.dumps(_shown(program, layout.run), indent=1))
    return OK


def generate(options: argparse.Namespace) -> int:
    """Asks the model through the router, and prints the answer as it comes."""
    found = _ask(options, {"do": "status"})["status"]
    host, port = found["router"]["host"], found["router"]["port"]
    body = {
        "messages": [{"role": "user", "content": options.prompt}],
        "stream": True,
        "max_tokens": options.max_tokens,
    }
    connection = http.client.HTTPConnection(host, port)
    try:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("FD_API_KEY"):
            headers["Authorization"] = f"Bearer {key.partition(',')[0]}"
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise FastDeployError(
                f"the router answered {response.status}: {_message(response.read(1 << 16))}"
            )
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise FastDeployError(f"the answer broke off: {_message(line[6:])}")
            for choice in event.get("choices", ()):
                print(choice.get("delta", {}).get("content") or "", end="", flush=True)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FastDeployError(f"the router at {host}:{port} does not answer ({error})") from None
    finally:
        connection.close()
    print()
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fdctl", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", type=Path, help="the daemon's --prefix")
    parser.add_argument("--socket", type=Path, help="the daemon's socket, where dp.toml sets [paths] run")
    parser.add_argument("--version", action="version", version=f"fdctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, replica: str = "") -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help, description=help)
        found.set_defaults(run=run)
        if replica:
            found.add_argument("replica", metavar=replica)
        return found

    found = command("status", status, "show every replica and how it is")
    found.add_argument("--json", action="store_true")
    found.add_argument("-w", "--watch", action="store_true", help="again and again, until Ctrl-C")
    found = command("ep", ep, "show the expert-parallel group, and who waits for whom")
    found.add_argument("group", metavar="GROUP", nargs="?", help="default: those of the daemon's replicas")
    found.add_argument("--json", action="store_true")
    found.add_argument("-w", "--watch", action="store_true", help="again and again, until Ctrl-C")
    found = command("reload", reload, "apply dp.toml to the programs that it changes, one at a time")
    found.add_argument("--dry-run", action="store_true", help="only say what would change")
    _add_wait(found)
    for name, help in (
        ("restart", "end and start, one at a time"),
        ("stop", "end, and keep down until started"),
        ("start", "start what is down"),
    ):
        found = command(name, operate, help, "REPLICA|all")
        _add_wait(found)
    found = command("logs", logs, "print the output of a program", "REPLICA")
    found.add_argument("-f", "--follow", action="store_true", help="go on as it grows")
    found.add_argument("-n", "--lines", type=int, default=_TAIL_LINES, help="default: %(default)s")
    found = command(
        "why", why, "say how a program ended last, its last lines, and when it is tried next", "REPLICA"
    )
    found.add_argument("--json", action="store_true")
    found = command("check", check, "read a dp.toml and say what is wrong with it")
    found.add_argument("file", type=Path, metavar="FILE")
    found = command("render", render, "print what would run, before it runs")
    found.add_argument("file", type=Path, metavar="FILE", nargs="?", help="default: the daemon's")
    found.add_argument("--write", action="store_true", help="put supervisord's files in place instead")
    found.add_argument("--json", action="store_true")
    found = command("generate", generate, "ask the model something")
    found.add_argument("prompt", metavar="PROMPT")
    found.add_argument("--max-tokens", type=int, default=256, help="default: %(default)s")
    return parser


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="until it is done, with the true result (default); Ctrl-C leaves it to go on by itself",
    )


def _prefix(options: argparse.Namespace) -> Path | None:
    given = options.prefix or os.environ.get("FD_PREFIX")
    return Path(given).absolute() if given else None


def _of_the_daemon(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The running daemon's dp.toml and prefix; the system's file if no daemon answers."""
    try:
        daemon = _ask(options, {"do": "status"})["status"]["daemon"]
    except DaemonUnreachable:
        return _DEFAULT_CONFIG, _prefix(options)
    return Path(daemon["config"]), Path(daemon["prefix"]) if daemon["prefix"] else None


def _socket(options: argparse.Namespace) -> Path:
    if options.socket:
        return options.socket
    prefix = _prefix(options)
    if prefix is None:
        here = Path("run")
        prefix = here if control.socket_path(here / "run").exists() else None
    return control.socket_path(prefix / "run" if prefix else Path("/run/fd"))


def _ask(options: argparse.Namespace, command: dict[str, Any]) -> dict[str, Any]:
    """The result of a command that needs no waiting. Ends the program if it is an error."""
    *_, answer = control.request(_socket(options), command, timeout=30.0)
    if answer["code"] != OK:
        sys.exit(_error("fdctl", answer["error"], answer["code"]))
    return answer


def _do(options: argparse.Namespace, command: dict[str, Any]) -> int:
    code = FAILED
    for message in control.request(_socket(options), command, timeout=None):
        if "line" in message:
            print(message["line"], flush=True)
            continue
        code = message["code"]
        if code != OK:
            _error("fdctl", message["error"], code)
    return code


def _print_json(ask: Callable[[], dict[str, Any]], watch: bool) -> int:
    while True:
        print(json.dumps(ask(), indent=None if watch else 2), flush=True)
        if not watch:
            return OK
        time.sleep(1.0)


def _error(who: str, what: str, code: int) -> int:
    print(what if "ERROR (" in what else f"{who}: ERROR ({what})", file=sys.stderr)
    return code


def _shown(program: Program, run: Path) -> dict[str, Any]:
    """A launch file as people may see it."""
    content = json.loads(program.launch_text(run))
    return {**content, "argv": masking.argv(content["argv"]), "env": masking.env(content["env"])}


def _label(found: dict[str, Any]) -> str:
    return f"replica {found['replica']}" if "replica" in found else found["name"]


def _message(body: bytes) -> str:
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:300]


def _last_lines(file: Path, count: int) -> list[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 400 * max(count, 1)))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return lines[-count:] if count > 0 else []


def _follow(file: Path) -> Iterator[str]:
    """What is written to a file from now on, over its rotations."""
    stream = None
    while True:
        if stream is None and file.exists():
            stream = file.open("rb")
            stream.seek(0, os.SEEK_END)
        if stream is not None:
            while data := stream.read(1 << 16):
                yield data.decode(errors="replace")
            if not file.exists() or not os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                stream.close()
                stream = file.open("rb") if file.exists() else None
                continue
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
