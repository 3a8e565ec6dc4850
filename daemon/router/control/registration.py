"""Bodies of POST /register and /deregister: FastDeploy's InstanceInfo, with its error texts.

msgspec's own texts would not be FastDeploy's, and would show a token.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, ValidationError

from ....common.foreign_text import parse_json, printable
from ..instance import ROLES, Instance, RegistrationError

_Port = Annotated[int, Meta(ge=1, le=65535)]
_Id = Annotated[str, Meta(pattern=r"\A[0-9A-Za-z_-]{0,64}\Z")]
_Text = Annotated[str, Meta(max_length=64)]
# A registration must fit into a row of the board.
_Texts = Annotated[tuple[_Text, ...], Meta(max_length=32)]
_Protocols = Annotated[tuple[Literal["ipc", "rdma"], ...], Meta(max_length=32)]


class _Deregistration(Struct, frozen=True, kw_only=True):
    host_ip: str
    port: _Port
    instance: _Id = ""


class _InstanceInfo(_Deregistration, frozen=True, kw_only=True):
    """Other fields are ignored, because newer engines send more."""

    role: Literal["mixed", "prefill", "decode"]
    replica: Annotated[int, Meta(ge=0, lt=1 << 16)] | None = None
    metrics_port: _Port | None = None
    # Ports of disaggregated serving. Older engines send a list with all ranks' ports.
    connector_port: _Text | _Texts = ""
    engine_worker_queue_port: _Text | _Texts = ""
    transfer_protocol: _Protocols = ()
    rdma_ports: _Texts = ()
    device_ids: _Texts = ()
    features: _Texts = ()
    max_concurrency: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    token: _Id = ""
    numeric_version: _Text = ""


_REQUIRED = ("role", "host_ip", "port")
#: Fields of texts, which may be numbers in JSON.
_TEXTS = ("connector_port", "engine_worker_queue_port")
#: Fields of lists, which may be texts with commas in JSON.
_LISTS = ("transfer_protocol", "rdma_ports", "device_ids", "features")
_Body = TypeVar("_Body", bound=_Deregistration)


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
    gone = _read(_Deregistration, _object(body))
    return Instance(gone.host_ip, gone.port).url, gone.instance


def from_fields(fields: dict[str, Any]) -> Instance:
    """Return the instance with these fields."""
    info = _read(_InstanceInfo, fields)
    if info.role != ROLES[0]:
        raise RegistrationError("only MIXED instances are allowed")
    return Instance(
        host=info.host_ip,
        port=info.port,
        replica=info.replica,
        metrics_port=str(info.metrics_port or info.port),
        connector_port=_joined(info.connector_port),
        engine_worker_queue_port=_joined(info.engine_worker_queue_port),
        transfer_protocol=info.transfer_protocol,
        rdma_ports=info.rdma_ports,
        device_ids=info.device_ids,
        instance=info.instance,
        features=info.features,
        max_concurrency=info.max_concurrency,
        token=info.token,
        numeric_version=info.numeric_version,
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = parse_json(body)
    except ValueError as error:
        raise RegistrationError(f"Invalid InstanceInfo JSON format: {error}") from None
    if not isinstance(fields, dict):
        raise RegistrationError("Invalid InstanceInfo JSON format: a JSON object is expected")
    return fields


def _read(body: type[_Body], fields: dict[str, Any]) -> _Body:
    names = body.__struct_fields__
    given = {name: fields[name] for name in names if fields.get(name) not in _absent(name)}
    try:
        for name in _REQUIRED:
            if name in names and name not in given:
                raise ValueError(f"{name} is required")
        values = {name: _normalized(name, value) for name, value in given.items()}
        try:
            return msgspec.convert(values, body)
        except ValidationError as error:
            raise ValueError(_complaint(given, values, str(error))) from None
    except ValueError as error:
        raise RegistrationError(f"invalid InstanceInfo format: {error}") from None


def _absent(name: str) -> tuple[str | None, ...]:
    """Return the values that stand for none: in FastDeploy also an empty text, except for numbers."""
    return (None,) if name in ("replica", "max_concurrency") else (None, "")


def _normalized(name: str, value: Any) -> Any:
    """Return the value in the form that the struct declares. Raises ValueError."""
    if name in _LISTS and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not text.isprintable():
            raise ValueError(_invalid(name, text))
    if name == "role":
        return _role(value)
    if name == "host_ip":
        return _host(value)
    if name in ("port", "metrics_port"):
        is_number = isinstance(value, str) and re.fullmatch("[0-9]{1,5}", value)
        return int(value) if is_number else value
    if name in (*_LISTS, *_TEXTS):
        return [_text(item) for item in value] if isinstance(value, list) else _text(value)
    return value


def _text(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _complaint(given: dict[str, Any], values: dict[str, Any], problem: str) -> str:
    """Say which value is wrong, from the path in msgspec's message."""
    found = re.search(r"`\$\.(\w+)(?:\[(\d+)\])?", problem)
    assert found is not None
    name, item = found.groups()
    if item is None:
        return _invalid("role integer" if name == "role" and type(given[name]) is int else name, given[name])
    return _invalid("protocol" if name == "transfer_protocol" else name, values[name][int(item)])


def _invalid(name: str, value: Any) -> str:
    # The text is logged, so that it must not contain a token.
    return f"invalid {name}" if name == "token" else f"invalid {name}: {_short(value)}"


def _joined(texts: str | tuple[str, ...]) -> str:
    return texts if isinstance(texts, str) else ",".join(texts)


def _role(value: Any) -> Any:
    if type(value) is int and 0 <= value < len(ROLES):
        return ROLES[value]
    return value.lower() if isinstance(value, str) else value


def _host(value: Any) -> str:
    """Return an IP address; loopback in place of the unspecified address."""
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


def _short(value: Any) -> str:
    try:
        return printable(value if isinstance(value, str) else repr(value), 77)
    except RecursionError:
        return "nested too deeply"
