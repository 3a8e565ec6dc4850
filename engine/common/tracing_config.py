"""Where traces go, from flags and OpenTelemetry's environment variables. Imports none of its packages."""

from __future__ import annotations

import argparse
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from .errors import ConfigError
from .foreign_text import printable

ENDPOINT_FLAG = "--otlp-traces-endpoint"
RATIO_FLAG = "--trace-sample-ratio"
MISSING_EXTRA = "tracing needs packages of OpenTelemetry that are not installed: pip install 'fd-dp[otel]'"

_TRACES_PATH = "/v1/traces"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"


@dataclass(frozen=True, slots=True)
class TracingConfig:
    #: URL to which spans are sent; empty: OpenTelemetry reads it from the environment.
    endpoint: str = ""
    #: Fraction of the requests without a trace of their own that are traced; None: as the environment says.
    sample_ratio: float | None = None
    #: Why no span can be sent; empty if nothing is known to prevent it.
    obstacle: str = ""


def add_tracing_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        ENDPOINT_FLAG,
        default="",
        metavar="URL",
        help="OTLP collector to which spans are sent over HTTP, such as http://127.0.0.1:4318 (default: "
        "OTEL_EXPORTER_OTLP_ENDPOINT; no traces without one); needs pip install 'fd-dp[otel]'",
    )
    parser.add_argument(
        RATIO_FLAG,
        type=float,
        metavar="RATIO",
        help="fraction of the requests without a trace of their own that are traced, 0..1 (default: "
        "OTEL_TRACES_SAMPLER, or all)",
    )


def tracing_config(
    endpoint: str, ratio: float | None, environment: Mapping[str, str]
) -> TracingConfig | None:
    """Return where traces go, or None if there are none.

    A flag that cannot work is an error. A variable that cannot work is an obstacle, which is logged and does
    not prevent the start: such variables are often set for all programs of a machine.

    Args:
        endpoint: value of --otlp-traces-endpoint; empty: not given.
        ratio: value of --trace-sample-ratio; None: not given.

    Raises:
        ConfigError: a flag is invalid, or its packages are not installed.
    """
    if ratio is not None and not 0 <= ratio <= 1:
        raise ConfigError(f"{RATIO_FLAG} is {ratio:g}; it must be 0..1")
    if endpoint and (problem := problem_of_endpoint(endpoint)):
        raise ConfigError(f"{ENDPOINT_FLAG}: {problem}")
    is_disabled = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_disabled or environment.get("OTEL_TRACES_EXPORTER", "").strip() == "none":
        return None
    if endpoint:
        if not _has_packages():
            raise ConfigError(f"{ENDPOINT_FLAG}: {MISSING_EXTRA}")
        return TracingConfig(_traces_url(endpoint), ratio)
    if not any(environment.get(name, "").strip() for name in _ENDPOINTS):
        return None
    return TracingConfig("", ratio, _obstacle(environment))


def problem_of_endpoint(endpoint: str) -> str | None:
    """Return what is wrong with the URL of a collector, or None. The message does not contain the URL."""
    try:
        parts = urllib.parse.urlsplit(endpoint)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid or not endpoint.isprintable() or " " in endpoint:
        return "it must be a URL such as http://127.0.0.1:4318"
    if "@" in parts.netloc or parts.query or parts.fragment:
        return (
            "it must not contain a password or a query, because every user of this machine can read command "
            "lines; set OTEL_EXPORTER_OTLP_HEADERS in the environment"
        )
    return None


def _obstacle(environment: Mapping[str, str]) -> str:
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip()
    if exporter not in ("", "otlp"):
        return f"OTEL_TRACES_EXPORTER is {printable(exporter)}; only otlp is supported"
    # The first that is set counts.
    for name in _PROTOCOLS:
        if protocol := environment.get(name, "").strip():
            if protocol != _PROTOCOL:
                return f"{name} is {printable(protocol)}; only {_PROTOCOL} is supported"
            break
    return "" if _has_packages() else MISSING_EXTRA


def _traces_url(endpoint: str) -> str:
    """Return the URL of the collector's traces: a URL without a path is the collector's base."""
    path = urllib.parse.urlsplit(endpoint).path
    return endpoint if path.strip("/") else f"{endpoint.rstrip('/')}{_TRACES_PATH}"


def _has_packages() -> bool:
    try:
        return all(find_spec(f"opentelemetry.{name}") for name in ("sdk", "exporter.otlp.proto.http"))
    except ImportError:
        return False
