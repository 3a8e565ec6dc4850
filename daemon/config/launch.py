"""fd-run: executes the program that a launch file describes.

supervisord's ini syntax cannot express every argument and environment value: `%`, `;` and newlines have a
meaning of their own. So the ini contains only ``fd-run NAME HASH DIRECTORY``, and the command line and the
environment are in DIRECTORY/NAME-HASH.json, mode 0600.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

#: Environment variable of every process of a program, with the value RUN_DIRECTORY#NAME. Forks and new
#: sessions inherit it, so that proc.py can find leftover processes.
MARKER = "FD_DP_PROGRAM"
#: Environment variable with the hash of the launch file.
HASH = "FD_DP_HASH"
#: Variables that programs must not inherit: those through which the daemon and supervisord talk to systemd,
#: and settings of gunicorn and prometheus_client that are meant for other servers.
_NOT_INHERITED = (
    "GUNICORN_PID",
    "GUNICORN_FD",
    "PROMETHEUS_MULTIPROC_DIR",
    "prometheus_multiproc_dir",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
)

USAGE, NOT_STARTED = 2, 127


def main() -> int:
    if len(sys.argv) != 4:
        print("fd-run: usage: fd-run NAME HASH DIRECTORY (run by supervisord, see fd-dp)", file=sys.stderr)
        return USAGE
    name, hash_, directory = sys.argv[1:]
    file = Path(directory) / f"{name}-{hash_}.json"
    try:
        content = json.loads(file.read_text(encoding="ascii"))
        argv, env = content["argv"], content["env"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        print(f"fd-run: {file}: not a launch file ({error}); fdctl render --write writes it", file=sys.stderr)
        return NOT_STARTED
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in _NOT_INHERITED and not key.startswith("SUPERVISOR_")
    }
    try:
        os.execvpe(argv[0], argv, {**inherited, **env})
    except OSError as error:
        print(f"fd-run: {argv[0]}: cannot be executed ({error.strerror})", file=sys.stderr)
        return NOT_STARTED


if __name__ == "__main__":
    sys.exit(main())
