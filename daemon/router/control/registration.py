"""Bodies of POST /register and /deregister: FastDeploy's InstanceInfo, validated with its error texts.

The fields are checked by hand to give FastDeploy's error texts, which msgspec cannot.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from ....common.foreign_text import parse_json, printable
from ..instance import ROLES, Instance, RegistrationError

_PROTOCOLS = ("ipc", "rdma")
#: Maximum length of each list; a registration must fit into a row of the board.
_MAX_ITEMS = 32
_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")


def parse(body: bytes) -> Instance:
    """Parse the body of POST /register.

    Raises:
        RegistrationError: the body is invalid; with FastDeploy's text.
    """
    return from_fields(_object(body))


def parse_deregistration(body: bytes) -> tuple[str, str]:
    """Parse the body of POST /deregister: return URL and instance id ("" if it has none).

    Raises:
        RegistrationError: the body is invalid.
    """
    fields = _object(body)
    try:
        gone = Instance(_host(fields.get("host_ip")), _port("port", fields.get("port")))
        return gone.url, _id("instance", fields.get("instance"))
    except ValueError as error:
        raise RegistrationError(f"invalid InstanceInfo format: {error}") from None


def from_fields(fields: dict[str, Any]) -> Instance:
    """Return the instance with these fields. Unknown ones are ignored, because newer engines send more."""
    try:
        role = _role(fields.get("role"))
        host = _host(fields.get("host_ip"))
        port = _port("port", fields.get("port"))
        metrics_port = fields.get("metrics_port")
        instance = Instance(
            host=host,
            port=port,
            replica=_replica(fields.get("replica")),
            metrics_port=str(port if metrics_port in (None, "") else _port("metrics_port", metrics_port)),
            connector_port=_text("connector_port", fields.get("connector_port")),
            engine_worker_queue_port=_text(
                "engine_worker_queue_port", fields.get("engine_worker_queue_port")
            ),
            transfer_protocol=_protocols(fields.get("transfer_protocol")),
            rdma_ports=_texts("rdma_ports", fields.get("rdma_ports")),
            device_ids=_texts("device_ids", fields.get("device_ids")),
            instance=_id("instance", fields.get("instance")),
            features=_texts("features", fields.get("features")),
            max_concurrency=_max_concurrency(fields.get("max_concurrency")),
            token=_token(fields.get("token")),
        )
    except ValueError as error:
        raise RegistrationError(f"invalid InstanceInfo format: {error}") from None
    if role != ROLES[0]:
        raise RegistrationError("only MIXED instances are allowed")
    return instance


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = parse_json(body)
    except ValueError as error:
        raise RegistrationError(f"Invalid InstanceInfo JSON format: {error}") from None
    if not isinstance(fields, dict):
        raise RegistrationError("Invalid InstanceInfo JSON format: a JSON object is expected")
    return fields


def _role(value: Any) -> str:
    if value is None or value == "":
        raise ValueError("role is required")
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(ROLES):
            raise ValueError(f"invalid role integer: {value}")
        return ROLES[value]
    if not isinstance(value, str) or value.lower() not in ROLES:
        raise ValueError(f"invalid role: {_short(value)}")
    return value.lower()


def _host(value: Any) -> str:
    """Return an IP address; loopback in place of the unspecified address."""
    if value is None or value == "":
        raise ValueError("host_ip is required")
    text = value if isinstance(value, str) else ""
    bare = text.removeprefix("http://").removeprefix("https://").removeprefix("[").removesuffix("]")
    try:
        # A scope id (fe80::1%eth0) would have to be quoted in URLs.
        ip = ipaddress.ip_address(bare if "%" not in bare else "")
    except ValueError:
        raise ValueError(f"invalid host_ip: {_short(value)}") from None
    if ip.is_unspecified:
        return "127.0.0.1" if ip.version == 4 else "::1"
    return str(ip)


def _port(name: str, value: Any) -> int:
    if value is None or value == "":
        raise ValueError(f"{name} is required")
    text = _scalar(name, value)
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise ValueError(f"invalid {name}: {_short(value)}")
    return int(text)


def _replica(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 16:
        raise ValueError(f"invalid replica: {_short(value)}")
    return value


def _id(name: str, value: Any) -> str:
    if value is None or value == "":
        return ""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ValueError(f"invalid {name}: {_short(value)}")
    return value


def _token(value: Any) -> str:
    try:
        return _id("token", value)
    except ValueError:
        raise ValueError("invalid token") from None  # without the value: the text is logged


def _max_concurrency(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise ValueError(f"invalid max_concurrency: {_short(value)}")
    return value


def _protocols(value: Any) -> tuple[str, ...]:
    protocols = _texts("transfer_protocol", value)
    for protocol in protocols:
        if protocol not in _PROTOCOLS:
            raise ValueError(f"invalid protocol: {_short(protocol)}")
    return protocols


def _text(name: str, value: Any) -> str:
    """Return a port of disaggregated serving as text. Older engines send a list with all ranks' ports."""
    if isinstance(value, list):
        return ",".join(_texts(name, value))
    return "" if value is None else _scalar(name, value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(items, list) or len(items) > _MAX_ITEMS:
        raise ValueError(f"invalid {name}: {_short(value)}")
    return tuple(_scalar(name, item) for item in items)


def _scalar(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"invalid {name}: {_short(value)}")
    text = str(value)
    if len(text) > 64 or not text.isprintable():
        raise ValueError(f"invalid {name}: {_short(value)}")
    return text


def _short(value: Any) -> str:
    try:
        return printable(value if isinstance(value, str) else repr(value), 77)
    except RecursionError:
        return "nested too deeply"
