"""Routers that share their knowledge of replicas without Redis: a board each, and a hub in its place."""

from __future__ import annotations

import ipaddress

from fastdeploy.daemon.router.addresses import AllowedAddresses
from fastdeploy.daemon.router.board.board import Board
from fastdeploy.daemon.router.board.view import Status
from fastdeploy.daemon.router.control.shared_replicas import SharedReplicas, SharedState
from fastdeploy.daemon.router.instance import Instance

from .boards import Clock

LAN = AllowedAddresses([ipaddress.ip_network("10.0.0.0/8")])


class Hub:
    """Keeps shared state as Redis does. Its clock differs from the routers'."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.said = SharedState()

    def now(self) -> float:
        return 1.7e9 + self.clock.now


class Router:
    def __init__(self, hub: Hub, allowed: AllowedAddresses = LAN) -> None:
        self.hub = hub
        self.board = Board.create(hub.clock)
        self.board.open_counters()
        self.shared = SharedReplicas(self.board, allowed, hub.clock)

    def turn(self) -> None:
        hub = self.hub
        self.shared.apply(hub.said, hub.now())
        updates, expired = self.shared.updates(hub.now()), self.shared.expired(hub.now())
        said = hub.said.updated(updates)
        hub.said = SharedState(
            *(
                {name: value for name, value in part.items() if name not in expired}
                for part in (said.entries, said.draining, said.heard)
            )
        )
        self.shared.published(updates)

    def hears(self, instance: Instance) -> None:
        """Admit the instance, as for a registration or heartbeat after a passed health check."""
        self.board.admit(instance)

    def checks_health(self) -> None:
        for handle in self.board.handles():
            self.board.healthy(handle, self.hub.clock.now)

    def knows(self) -> list[str]:
        return [row.instance.instance for row in self.board.status()]

    def row(self, number: int = 0) -> Status:
        return self.board.status()[number]


def replica(start: str = "a", number: int = 0, host: str = "10.0.0.1") -> Instance:
    port = 8000 + number
    return Instance(host, port, number, metrics_port=str(port), instance=start, token=f"token-{start}")


def turns(*routers: Router) -> None:
    for _ in range(2):
        for router in routers:
            router.turn()
