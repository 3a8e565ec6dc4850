"""Checks of a configuration before any process is started or stopped."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ...common import masking
from ...common.addresses import addresses_of
from ...common.api_keys import CREDENTIAL, keys_in, keys_in_variable
from ...common.errors import ConfigError
from ..router.config.flags import file_parser
from ..router.config.loader import settings_of
from .loader import Config
from .programs import Program, programs_of

_KEY_VARIABLES = ("FD_API_KEY", "FD_ROUTER_REGISTER_KEY", "FD_ROUTER_ADMIN_KEY")


def checked_programs_of(config: Config) -> list[Program]:
    """Return `programs_of(config)` after a check of addresses, keys, command lines and the checkpoint.

    Raises ConfigError if a process could not start with it.
    """
    _check_host("[engine] host", config.engine.host)
    _check_host("[router] host", config.router.host)
    _check_keys("[engine] api_keys_file", config.engine.api_keys_file)
    _check_keys("[router] api_keys_file", config.router.api_keys_file)
    for section, env in (("engine", config.engine.env), ("router", config.router.env)):
        for name in _KEY_VARIABLES:
            try:
                keys_in_variable(name, {**os.environ, **env})
            except ConfigError as error:
                raise ConfigError(f"[{section}] env: {error}") from None
    programs = programs_of(config)
    largest_body = _check_router(next(program for program in programs if program.replica is None))
    _check_replica(next(program for program in programs if program.replica is not None), largest_body)
    return programs


def exposed_secrets(file: Path, config: Config) -> str:
    """Return a warning if dp.toml contains secrets and every user can read it, or ""."""
    mode = file.stat().st_mode
    names = [name for section in (config.engine, config.router) for name in section.env]
    secrets = sorted({name for name in names if masking.is_secret(name)})
    if not mode & stat.S_IROTH or not secrets:
        return ""
    return (
        f"{file}: every user of this machine can read it (mode {stat.S_IMODE(mode):04o}), and it contains "
        f"{', '.join(secrets)}; chmod 640 it"
    )


def _check_host(option: str, host: str) -> None:
    try:
        addresses_of(host)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None


def _check_keys(option: str, file: str) -> None:
    """Check a key file. Credentials are skipped: only the programs' own systemd unit can read them."""
    if file and not file.startswith(CREDENTIAL):
        keys_in(option, Path(file))


def _check_router(program: Program) -> int:
    """Return the maximum size of a request body that the router forwards."""
    arguments = file_parser().parse_args(program.flags)
    # Keys may be credentials, which only the router's own systemd unit can read.
    arguments.api_keys_file = arguments.register_keys_file = arguments.admin_keys_file = None
    try:
        return settings_of(arguments).max_body_bytes
    except ConfigError as error:
        raise ConfigError(f"the router could not start: {error}") from None


def _check_replica(program: Program, largest_body: int) -> None:
    """Check one replica. The others differ only in their ports."""
    # The replicas may have another model cache than this process.
    if "FD_MODEL_CACHE" in program.env:
        return
    # Imported here, because only this check needs the engine's modules.
    from ...config import ModelConfig
    from ...entrypoints.openai.options import parse_arguments

    module = program.argv.index("-m") + 2
    try:
        config = parse_arguments(program.argv[module:])
        ModelConfig.from_directory(config.engine.model)
    except ConfigError as error:
        raise ConfigError(f"the replicas could not start: {error}") from None
    if config.max_body_bytes < largest_body:
        raise ConfigError(
            f"[engine] extra_args: --max-body-bytes is {config.max_body_bytes} for the replicas and "
            f"{largest_body} for the router; the replicas' limit must not be lower"
        )
