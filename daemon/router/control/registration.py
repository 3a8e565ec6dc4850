"""What an instance says about itself in POST /register: FastDeploy's InstanceInfo, checked."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ....common.addresses import authority
from ....common.errors import FastDeployError
from ....common.foreign_text import parse_json, printable

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

ROLES = ("mixed", "prefill", "decode")
_PROTOCOLS = ("ipc", "rdma")
#: Of each list; a registration must fit into a row of the board.
_MAX_ITEMS = 32
_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")


class RegistrationError(FastDeployError):
    """A registration that is refused. The text is the `msg` of the answer, FastDeploy's where it has one."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Instance:
    """One mixed instance. Its identity is the URL, and the id of this start of it if it sends one."""

    host: str
    port: int
    #: Its number among the replicas of one system (DP rank); FastDeploy's own engines do not send one.
    replica: int | None = None
    metrics_port: str = ""
    connector_port: str = ""
    engine_worker_queue_port: str = ""
    transfer_protocol: tuple[str, ...] = ()
    rdma_ports: tuple[str, ...] = ()
    device_ids: tuple[str, ...] = ()
    #: Drawn at each start of a replica: another one at the same URL is another process. FastDeploy's own
    #: engines do not send this, nor what follows.
    instance: str = ""
    features: tuple[str, ...] = ()
    #: Requests that it takes at a time.
    max_concurrency: int | None = None
    #: What /internal/resume asks for: whoever has it reads and writes other people's answers.
    token: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        return f"http://{self.authority}"

    @property
    def authority(self) -> str:
        return authority(self.host, self.port)

    @property
    def name(self) -> str:
        """Its name in logs, metrics and X-FD-Replica."""
        return self.authority if self.replica is None else str(self.replica)

    def wire(self) -> dict[str, Any]:
        """As GET /registered shows it."""
        return {
            "url": self.url,
            "worker_type": ROLES[0],
            "metrics_port": self.metrics_port,
            "connector_port": self.connector_port,
            "engine_worker_queue_port": self.engine_worker_queue_port,
            "transfer_protocol": list(self.transfer_protocol),
            "rdma_ports": list(self.rdma_ports),
            "device_ids": list(self.device_ids),
            "replica": self.replica,
            "instance": self.instance,
            "features": list(self.features),
            "max_concurrency": self.max_concurrency,
        }

    def registration(self) -> dict[str, Any]:
        """As it would register itself, secrets and all; `from_fields` reads it back."""
        fields = self.wire()
        del fields["url"], fields["worker_type"]
        own = {"role": ROLES[0], "host_ip": self.host, "port": str(self.port), "token": self.token}
        return {**own, **fields}


class AllowedAddresses:
    """Who may be a replica: this machine, and the networks that were named with --allow-host."""

    def __init__(self, networks: Iterable[IPNetwork] = ()) -> None:
        self._networks = tuple(networks)

    def __contains__(self, address: str) -> bool:
        ip = _ip(address)
        return ip is not None and (any(ip in network for network in self._networks) or self.is_own(address))

    def is_own(self, address: str) -> bool:
        """It is an IP address of this machine."""
        ip = _ip(address)
        return ip is not None and (ip.is_loopback or _is_own(ip))


def parse(body: bytes) -> Instance:
    """The body of POST /register.

    Raises:
        RegistrationError: with FastDeploy's text for that fault.
    """
    return from_fields(_object(body))


def parse_farewell(body: bytes) -> tuple[str, str]:
    """The body of POST /deregister: the URL, and the id of that start of the replica ("" if it has none).

    Raises:
        RegistrationError: it is wrong.
    """
    fields = _object(body)
    try:
        gone = Instance(_host(fields.get("host_ip")), _port("port", fields.get("port")))
        return gone.url, _id("instance", fields.get("instance"))
    except ValueError as error:
        raise RegistrationError(f"invalid InstanceInfo format: {error}") from None


def from_fields(fields: dict[str, Any]) -> Instance:
    """Keys that are not known are left alone: newer engines send more."""
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


def _ip(address: str) -> IPAddress | None:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def _is_own(ip: IPAddress) -> bool:
    """Whether this machine has the address: to such a one, and no other, it goes from that address itself."""
    with socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            # A datagram socket looks up the route and sends nothing. A bind would tell as much, except for
            # broadcast and multicast addresses, and where net.ipv4.ip_nonlocal_bind is set.
            probe.connect((str(ip), 9))
        except OSError:
            return False  # no route, or no address of one machine
        return bool(ipaddress.ip_address(probe.getsockname()[0]) == ip)


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
    """An IP address. The one that means "all interfaces" is reached by loopback."""
    if value is None or value == "":
        raise ValueError("host_ip is required")
    text = value if isinstance(value, str) else ""
    bare = text.removeprefix("http://").removeprefix("https://").removeprefix("[").removesuffix("]")
    try:
        # Scope ids (fe80::1%eth0) would need quoting wherever the URL goes.
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
        raise ValueError("invalid token") from None  # the log is no place for it, even for a wrong one


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
    """Ports that only disaggregated serving uses; older engines send the whole list of all ranks."""
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
        return "it is nested too deep"
