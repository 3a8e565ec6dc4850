"""fd-run: becomes the program that a launch file describes.

supervisord's ini syntax cannot carry every argument and environment value (a `%`, a `;`, a newline change its
meaning), so the ini holds only ``fd-run NAME HASH DIRECTORY`` and the words of the user lie in
DIRECTORY/NAME-HASH.json, mode 0600.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

#: In the environment of every process of a program: RUN_DIRECTORY#NAME. Inherited over forks and sessions,
#: so that whatever a program leaves behind can be found again, see proc.py.
MARKER = "FD_DP_PROGRAM"
#: Beside it: which launch file the process was started from.
HASH = "FD_DP_HASH"
#: The daemon's own talk with systemd, and supervisord's; a program that used them would speak for the daemon.
#: And settings of gunicorn and prometheus_client, which can only be meant for other servers.
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
        print("fd-run: usage: fd-run NAME HASH DIRECTORY (supervisord runs it, see fd-dp)", file=sys.stderr)
        return USAGE
    name, hash_, directory = sys.argv[1:]
    file = Path(directory) / f"{name}-{hash_}.json"
    try:
        content = json.loads(file.read_text(encoding="ascii"))
        argv, env = content["argv"], content["env"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        print(f"fd-run: {file}: not a launch file ({error}); fdctl render --write makes it", file=sys.stderr)
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
