"""Reads and checks fd-router's configuration: command line, flags file, and the files that they name."""

from __future__ import annotations

import argparse
import ipaddress
import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ....common.addresses import addresses_of
from ....common.api_keys import ApiKeys
from ....common.cors import CorsPolicy
from ....common.errors import ConfigError
from ....common.file_limit import allow_open_files, open_files_limit
from ....common.tracing_config import tracing_config
from ..addresses import IPNetwork
from ..policy.policies import policy_named
from .flags import DEFAULT_MAX_CONNECTIONS, LEVELS, changed_flags, file_parser, fixed_flags, parser
from .flags_file import read_flags_file
from .settings import Settings

if TYPE_CHECKING:
    from .redis_address import RedisAddress

#: Descriptors: a client's connection and the one to its replica; duplicates of both on the fast path; others.
_FILES_PER_CONNECTION = 2
_FILES_PER_STREAM = 2
_OTHER_FILES = 512


@dataclass(frozen=True, slots=True)
class Configuration:
    settings: Settings
    #: Settings that cannot change while the router runs, by flag.
    fixed: Mapping[str, str]


def check_fixed(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raise ConfigError if a setting differs that cannot change while the router runs."""
    if names := changed_flags(before, after):
        raise ConfigError(f"{' and '.join(names)} cannot change while the router runs; restart it")


def read(words: Sequence[str] | None = None) -> Configuration:
    """Read the configuration of a command line, and raise the limit of open files as it requires.

    Args:
        words: the command line; by default this process's.

    Raises:
        ConfigError: the configuration is invalid.
    """
    arguments = parser().parse_args(words)
    fingerprint = None
    if arguments.flags_file is not None:
        file = read_flags_file(arguments.flags_file)
        try:
            file_parser().parse_args(file.words, arguments)
        except ConfigError as error:
            raise ConfigError(f"--flags-file {arguments.flags_file}: {error}") from None
        fingerprint = file.fingerprint
    settings = settings_of(arguments, fingerprint)
    streams = min(settings.max_connections, settings.max_in_flight)
    needed = settings.max_connections * _FILES_PER_CONNECTION + streams * _FILES_PER_STREAM + _OTHER_FILES
    allow_open_files(needed, f"--max-connections {settings.max_connections}")
    return Configuration(settings, fixed_flags(arguments))


def settings_of(arguments: argparse.Namespace, fingerprint: str | None = None) -> Settings:
    """Return the settings, with the content of the files that the arguments name.

    Args:
        fingerprint: the flags file's, if some of the arguments come from one.

    Raises:
        ConfigError: an argument or a file is invalid.
    """
    if arguments.splitwise:
        raise ConfigError("--splitwise: disaggregated prefill and decode is not supported; remove the flag")
    if arguments.config_path is not None:
        raise ConfigError("--config_path: FastDeploy's YAML is not supported; use flags (fd-router --help)")
    if arguments.log_level not in LEVELS:
        raise ConfigError(f"--log-level is {arguments.log_level!r}; it must be one of {', '.join(LEVELS)}")
    try:
        addresses = _addresses(arguments.host)
    except ValueError:
        raise ConfigError(
            f"--host is {arguments.host!r}; it must be an IP address, e.g. 127.0.0.1 or 0.0.0.0"
        ) from None
    return Settings(
        addresses=addresses,
        port=arguments.port,
        policy=policy_named(arguments.policy),
        workers=arguments.workers,
        max_connections=arguments.max_connections or _default_connections(),
        max_in_flight=arguments.max_in_flight,
        queue_size=arguments.queue_size,
        queue_timeout=arguments.queue_timeout_secs,
        request_timeout=arguments.request_timeout_secs,
        progress_timeout=arguments.progress_timeout_secs,
        max_body_bytes=arguments.max_body_bytes,
        client_timeout=arguments.client_timeout_secs,
        keep_alive=arguments.keep_alive_secs,
        keys=ApiKeys.read("--api-keys-file", arguments.api_keys_file, "FD_API_KEY"),
        register_keys=ApiKeys.read(
            "--register-keys-file", arguments.register_keys_file, "FD_ROUTER_REGISTER_KEY"
        ),
        admin_keys=ApiKeys.read("--admin-keys-file", arguments.admin_keys_file, "FD_ROUTER_ADMIN_KEY"),
        allow_hosts=tuple(_network(text) for text in arguments.allow_host),
        cors=CorsPolicy.parse("--cors-origins", arguments.cors_origins),
        page=arguments.page,
        registry_file=arguments.registry_file,
        admin_socket=arguments.admin_socket,
        graceful_timeout=arguments.graceful_timeout_secs,
        worker_timeout=arguments.worker_timeout_secs,
        health_interval=arguments.health_check_interval_secs,
        redis=_redis(arguments.board or os.environ.get("FD_ROUTER_BOARD_URL", "")),
        tls=_tls(arguments.certfile, arguments.keyfile),
        log_level=arguments.log_level.upper(),
        flags=fingerprint,
        tracing=tracing_config(arguments.otlp_traces_endpoint, arguments.trace_sample_ratio, os.environ),
    )


def _addresses(host: str) -> tuple[str, ...]:
    """Return the IP addresses of a host. Raises ValueError."""
    return addresses_of(host) if host == "localhost" else (str(ipaddress.ip_address(host)),)


def _tls(certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext | None:
    if certfile is None and keyfile is None:
        return None
    if certfile is None or keyfile is None:
        raise ConfigError("--certfile and --keyfile: TLS needs both; give both or neither")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without this OpenSSL asks for the password on the terminal.
        context.load_cert_chain(certfile, keyfile, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--certfile {certfile}, --keyfile {keyfile}: cannot be used ({reason})") from None
    return context


def _redis(url: str) -> RedisAddress | None:
    if not url:
        return None
    # An optional package, and slow to import.
    from .redis_address import RedisAddress

    return RedisAddress.parse(url)


def _default_connections() -> int:
    """Return the default for --max-connections: less where the limit of open files is low."""
    files_each = _FILES_PER_CONNECTION + _FILES_PER_STREAM
    return max(1, min(DEFAULT_MAX_CONNECTIONS, (open_files_limit() - _OTHER_FILES) // files_each))


def _network(text: str) -> IPNetwork:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ConfigError(
            f"--allow-host is {text!r}; it must be an address or a network, e.g. 10.0.0.0/24"
        ) from None
