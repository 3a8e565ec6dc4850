"""`fastdeploy`: the commands of FastDeploy's users.

A command's module is imported only when it runs, so that --help is quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from ... import __version__
from ...common.cli import nearest
from ...common.errors import ConfigError, FastDeployError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
#: Name -> (module with `main`, description).
_COMMANDS = {
    "serve": ("serve", "serve a model: OpenAI's HTTP API"),
    "chat": ("chat", "chat with the model of a running server"),
    "complete": ("complete", "continue texts with the model of a running server"),
    "bench": ("bench", "measure a running server with a load generator"),
    "run-batch": ("run_batch", "answer a file of requests in OpenAI's batch format"),
    "tokenizer": ("tokenizer", "encode and decode with a model's tokenizer"),
    "collect-env": ("collect_env", "print versions, hardware and settings for a bug report"),
}
_KEY_FLAG = "--api-key"


def main() -> int:
    words = sys.argv[1:]
    _hide_api_keys(words)
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name in ("-v", "--version"):
        print(f"fastdeploy (fd-dp) {__version__}")
        return 0
    if name not in _COMMANDS:
        return _fail(
            "", f"unknown command {name!r}{nearest(name, _COMMANDS)} (fastdeploy --help)", EXIT_USAGE
        )
    return _run(name, rest)


def _run(name: str, words: Sequence[str]) -> int:
    try:
        module = importlib.import_module(f".{_COMMANDS[name][0]}", __package__)
        status: int = module.main(words)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        return _fail(name, str(error), EXIT_USAGE)
    except FastDeployError as error:
        return _fail(name, str(error), EXIT_FAILED)
    except BrokenPipeError:
        # The reader of the pipe (head, less) has closed it; flushing at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        return _fail(name, str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _fail(name: str, message: str, status: int) -> int:
    print(f"fastdeploy{name and ' '}{name}: ERROR ({message})", file=sys.stderr)
    return status


def _help() -> str:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {help}" for name, (_, help) in _COMMANDS.items())
    return f"""\
usage: fastdeploy COMMAND [options]

Commands:
{commands}

fastdeploy COMMAND --help lists the options of a command; --version prints the version.

Exit codes:
  0    done
  1    failed; the line on stderr says why
  2    wrong usage
  130  Ctrl-C"""


def _hide_api_keys(words: list[str]) -> None:
    """Start this command again with the keys of its command line in the environment.

    All users of the machine see the command lines of processes.
    """
    kept, keys = [], []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") != _KEY_FLAG:
            kept.append(word)
            continue
        key = value if equals else next(rest, "")
        if not key or key.startswith("--"):
            # The command reports it.
            return
        keys.append(key)
    if keys:
        os.environ["FD_API_KEY"] = ",".join(keys)
        interpreter = sys.orig_argv[: len(sys.orig_argv) - len(words)]
        os.execv(sys.executable, [*interpreter, *kept])


if __name__ == "__main__":
    sys.exit(main())
