"""A replica as the router knows it: what it registered with, and its place on the board."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...common.addresses import authority
from ...common.errors import FastDeployError

ROLES = ("mixed", "prefill", "decode")


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


class RegistrationError(FastDeployError):
    """A registration that is refused. The text is the `msg` of the answer, FastDeploy's where it has one."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class ReplicaHandle:
    """A replica's place on the board. Once the replica has gone, nothing that is done with it has effect."""

    row: int
    #: No other seat of this board has it, nor ever had.
    generation: int
    instance: Instance = field(compare=False)
    # Of the instance, made once: every request wants them.
    name: str = field(init=False, compare=False)
    url: str = field(init=False, compare=False)
    authority: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        for what in ("name", "url", "authority"):
            object.__setattr__(self, what, getattr(self.instance, what))
