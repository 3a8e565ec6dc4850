"""What can be known to be wrong with a configuration before any process is touched for it."""

from __future__ import annotations

import socket

from ..errors import ConfigError
from .config import Config
from .programs import Program, programs_of


def checked_programs_of(config: Config) -> list[Program]:
    """`programs_of`, after a look at addresses, at the replicas' command line and at the checkpoint.

    Raises:
        ConfigError: one of them is wrong, and every process started with it would fail.
    """
    _check_host("[engine] host", config.engine.host)
    _check_host("[router] host", config.router.host)
    programs = programs_of(config)
    _check_replica(next(program for program in programs if program.replica is not None))
    return programs


def _check_host(option: str, host: str) -> None:
    try:
        socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{option}: {host!r} is no address ({reason}); 127.0.0.1 and 0.0.0.0 are usual"
        ) from None


def _check_replica(program: Program) -> None:
    """One stands for all: they differ in their ports only."""
    # The demo model may be kept elsewhere for the replicas than for us.
    if "FD_MODEL_CACHE" in program.env:
        return
    # Only here: the daemon itself can do without what these bring along.
    from ..config import ModelConfig
    from ..entrypoints.openai.options import parse_arguments

    module = program.argv.index("-m") + 2
    try:
        ModelConfig.from_directory(parse_arguments(program.argv[module:]).engine.model)
    except ConfigError as error:
        raise ConfigError(f"the replicas could not start: {error}") from None
