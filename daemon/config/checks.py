"""Checks of options beyond type and range.

Each takes a value of the right type, and returns an error message or None.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

from ...common import cors, masking
from ...common.tracing_config import problem_of_endpoint
from ..router.policy.policies import POLICIES
from .launch import HASH, MARKER

#: Variables that the daemon sets for every program.
RESERVED_ENVIRONMENT = ("FD_LOG_DIR", MARKER, HASH)


def known_policy(value: str) -> str | None:
    return None if value in POLICIES else f"it must be one of {', '.join(map(repr, POLICIES))}"


def ip_address(value: str) -> str | None:
    """Reject host names: a lookup would block the daemon's loop."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return "it must be an IP address, for example 127.0.0.1"
    return None


def environment_names(value: Mapping[str, str]) -> str | None:
    for name in value:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            return f"{name!r} is not a valid name of an environment variable"
        if name in RESERVED_ENVIRONMENT:
            return f"{name} is set by the daemon; remove it"
    return None


def gpu_names(values: tuple[str, ...]) -> str | None:
    """Accept what CUDA_VISIBLE_DEVICES does: indices, UUIDs, and MIG instances."""
    wrong = next(
        (value for value in values if not re.fullmatch(r"[0-9]+|(GPU|MIG)-[0-9A-Za-z/-]+", value)), None
    )
    return None if wrong is None else f'{wrong!r} is neither an index like "0" nor a UUID like "GPU-..."'


def web_origins(values: tuple[str, ...]) -> str | None:
    return next((problem for value in values if (problem := cors.problem_of(value))), None)


def collector_url(value: str) -> str | None:
    return problem_of_endpoint(value) if value else None


def no_secret(words: tuple[str, ...]) -> str | None:
    found = masking.secret_in(words)
    if found is None:
        return None
    what = f"it must not contain {found}: every user of this machine can read command lines"
    is_api_key = "api-key".startswith(found.lstrip("-").replace("_", "-").lower())
    return f"{what}; write {'api_keys_file = FILE' if is_api_key else 'it into env'}"
