"""gunicorn's base classes, imported without the environment variables that change its behaviour.

gunicorn reads some variables on import and fails with a stack trace on unexpected values
(``WEB_CONCURRENCY=auto``). It reads SCRIPT_NAME at each request and rejects all paths without that prefix.
Container images and hosting platforms set these variables for other programs. Router and replica are
configured by their command lines only, so import gunicorn's arbiter, application and logger from here.
"""

# ruff: noqa: E402 -- the variables must be removed before the import.
from __future__ import annotations

import os

for _name in ("WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "SCRIPT_NAME"):
    os.environ.pop(_name, None)

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.glogging import Logger

__all__ = ["Arbiter", "BaseApplication", "HaltServer", "Logger", "forget_inherited_sockets"]

#: Variables of gunicorn's binary upgrade and of systemd's socket activation.
_SOCKETS = ("GUNICORN_PID", "GUNICORN_FD", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def forget_inherited_sockets() -> None:
    """Make the arbiter open its own sockets, even if a parent process left these variables."""
    for name in _SOCKETS:
        os.environ.pop(name, None)
