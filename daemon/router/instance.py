"""A replica as the router knows it: what it registered with, and its place on the board."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...common.addresses import authority
from ...common.errors import FastDeployError

ROLES = ("mixed", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Instance:
    """Registration of one mixed instance, which is identified by its URL and, if it has one, its instance id.

    FastDeploy's own engines send neither `replica` nor the fields from `instance` on.
    """

    host: str
    port: int
    #: Number among the replicas of one system (data-parallel rank).
    replica: int | None = None
    metrics_port: str = ""
    connector_port: str = ""
    engine_worker_queue_port: str = ""
    transfer_protocol: tuple[str, ...] = ()
    rdma_ports: tuple[str, ...] = ()
    device_ids: tuple[str, ...] = ()
    #: Random id of this start of the replica: another id at the same URL is another process.
    instance: str = ""
    features: tuple[str, ...] = ()
    #: Maximum number of concurrent requests.
    max_concurrency: int | None = None
    #: Secret that /internal/resume requires, because it gives access to the responses of all clients.
    token: str = field(default="", repr=False)
    #: Version of its arithmetic: replicas with the same one generate the same text. Empty if unknown.
    numeric_version: str = ""

    @property
    def url(self) -> str:
        return f"http://{self.authority}"

    @property
    def authority(self) -> str:
        return authority(self.host, self.port)

    @property
    def name(self) -> str:
        """Name in logs, metrics and X-FD-Replica."""
        return self.authority if self.replica is None else str(self.replica)

    def wire(self) -> dict[str, Any]:
        """Return the fields that GET /registered shows."""
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
            "numeric_version": self.numeric_version,
        }

    def registration(self) -> dict[str, Any]:
        """Return the body of its registration, secrets included; `from_fields` reads it back."""
        fields = self.wire()
        del fields["url"], fields["worker_type"]
        own = {"role": ROLES[0], "host_ip": self.host, "port": str(self.port), "token": self.token}
        return {**own, **fields}


class RegistrationError(FastDeployError):
    """Rejected registration. Its text is the `msg` of the response, in FastDeploy's words if it has any."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class ReplicaHandle:
    """A replica's place on the board. Calls with it have no effect once the replica has gone."""

    row: int
    #: Unique over the lifetime of the board.
    generation: int
    instance: Instance = field(compare=False)
    # Copies of the instance's properties, which every request needs.
    name: str = field(init=False, compare=False)
    url: str = field(init=False, compare=False)
    authority: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("name", "url", "authority"):
            object.__setattr__(self, name, getattr(self.instance, name))
