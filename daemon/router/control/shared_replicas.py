"""Replicas that several routers share: registrations, drains and heartbeats.

A router compares three states: the shared state it saw last, the shared state now, and its own board. A
change of one side is applied to the other. The store may lose its data, so a missing entry means nothing and
older values are ignored; therefore deregistrations and removals are entries, too.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

from ....common.foreign_text import parse_json, printable
from ..addresses import AllowedAddresses
from ..board.board import FORGET_AFTER, Board, Status
from ..instance import Instance, RegistrationError
from .registration import from_fields

logger = logging.getLogger(__name__)

_HERE, _LEAVING, _REMOVED = "here", "leaving", "removed"
#: Minimum seconds by which a heartbeat must be newer to be published. Reading the store's clock over the
#: network may take a second. Without a minimum, each reading could make the same heartbeat look newer.
_NEWER = 2.0
#: Seconds by which a heartbeat may be older than the one before, because routers do not wait for each other.
_OLDER = 10.0
#: Seconds for which the entry of a replica that has gone is kept.
_KEEP_GONE = 2 * FORGET_AFTER
_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class SharedState:
    """State of replicas in the store, by shared name."""

    #: Registration and "here", "leaving" or "removed", as JSON.
    entries: Mapping[str, str] = field(default_factory=dict)
    #: "1" if the replica is drained, else "0".
    draining: Mapping[str, str] = field(default_factory=dict)
    #: Time of its last heartbeat, in seconds on the store's clock.
    heard: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.entries or self.draining or self.heard)

    def updated(self, more: SharedState) -> SharedState:
        return SharedState(
            {**self.entries, **more.entries},
            {**self.draining, **more.draining},
            {**self.heard, **more.heard},
        )


class SharedReplicas:
    """One router's view of the shared replicas. Not thread-safe."""

    def __init__(self, board: Board, allowed: AllowedAddresses, clock: Callable[[], float]) -> None:
        """`clock` must be the board's."""
        self._board = board
        self._allowed = allowed
        self._clock = clock
        self._shared = SharedState()
        #: Replicas with an entry "here" that do not belong on this board.
        self._ignored: set[str] = set()
        self._refused: set[str] = set()

    def apply(self, shared: SharedState, now: float) -> bool:
        """Apply the shared state to the board; True if that changed which replicas are on it.

        Args:
            now: time on the store's clock.
        """
        before, self._shared = self._shared, shared
        rows = self._rows()
        changed = set()
        for name, entry in shared.entries.items():
            if _heard(shared, name) < _heard(before, name) - _OLDER:
                continue
            is_changed = before.entries.get(name) != entry
            # A replica that this board has removed comes back with a heartbeat at another router.
            is_back = name not in rows and before.heard.get(name) != shared.heard.get(name)
            row = rows.get(name)
            if row is not None and self._heartbeat_at(row, now) >= _heard(shared, name) - _NEWER:
                if row.up and before.entries.get(name) != _entry(row.instance, _HERE):
                    continue  # it changed here as well and is up: this router's entry will replace the other
            elif row is not None and is_changed and self._is_gone(entry):
                # The board has this instance or an older one.
                changed |= {name} if self._board.remove(row.handle) else set()
                continue
            ago = max(0.0, now - _heard(shared, name))
            if (is_changed or is_back) and self._apply_entry(name, entry, row, ago):
                changed.add(name)
        for name, row in self._rows().items():
            if _heard(shared, name) < _heard(before, name) - _OLDER:
                continue
            draining = shared.draining.get(name)
            if draining is not None and (before.draining.get(name) != draining or name in changed):
                (self._board.drain if draining == "1" else self._board.undrain)(row.handle)
            if shared.entries.get(name) == _entry(row.instance, _HERE):
                self._board.record_heartbeat(row.handle, ago=max(0.0, now - _heard(shared, name)))
        return bool(changed)

    def updates(self, now: float) -> SharedState:
        """Return what is newer on this board than in the shared state."""
        rows, shared = self._rows(), self._shared
        entries, draining, heard = {}, {}, {}
        for name, row in rows.items():
            entry = _entry(row.instance, _LEAVING if row.leaving else _HERE)
            if shared.entries.get(name) != entry:
                entries[name] = entry
            if shared.draining.get(name, "0") != str(int(row.draining)):
                draining[name] = str(int(row.draining))
            if (at := self._heartbeat_at(row, now)) > _heard(shared, name) + _NEWER:
                heard[name] = f"{at:.3f}"
        for name, entry in shared.entries.items():
            if name in rows or name in self._ignored or _state(entry) != _HERE or not _is_reachable(name):
                continue
            instance = _instance(entry)
            if self._board.has_left(instance):
                entries[name] = _entry(instance, _LEAVING)
            elif now - _heard(shared, name) < FORGET_AFTER:
                entries[name] = _entry(instance, _REMOVED)
            else:
                self._ignored.add(name)  # removed here after a long silence; other routers may know more
        return SharedState(entries, draining, heard)

    def published(self, updates: SharedState) -> None:
        """Record that the updates are in the store."""
        self._shared = self._shared.updated(updates)

    def expired(self, now: float) -> list[str]:
        """Return the names of replicas whose entries can be deleted."""
        limits = {name: _KEEP_GONE for name, entry in self._shared.entries.items() if _state(entry) != _HERE}
        # A replica at a loopback address is known to its own machine only, which may be gone.
        limits |= {name: _DAY for name in self._shared.entries if not _is_reachable(name)}
        return [name for name, limit in limits.items() if now - _heard(self._shared, name) > limit]

    def _rows(self) -> dict[str, Status]:
        return {shared_name(row.instance): row for row in self._board.status()}

    def _is_gone(self, entry: str) -> bool:
        if _state(entry) != _HERE:
            return _state(entry) in (_LEAVING, _REMOVED)
        try:
            return self._board.has_left(_instance(entry))
        except RegistrationError:
            return False  # `_apply_entry` reports it

    def _heartbeat_at(self, row: Status, now: float) -> float:
        """Return the time of the board's last heartbeat on the store's clock."""
        return now - (self._clock() - row.heartbeat_at)

    def _apply_entry(self, name: str, entry: str, row: Status | None, ago: float) -> bool:
        """Apply one entry; True if that changed the board."""
        self._ignored.discard(name)
        if not _is_reachable(name):
            return False
        try:
            instance = _instance(entry)
            if shared_name(instance) != name:
                raise RegistrationError(f"it belongs to {instance.url}")
        except RegistrationError as error:
            logger.warning("the shared entry of replica %s is invalid: %s", printable(name), printable(error))
            self._ignored.add(name)
            return False
        if _state(entry) != _HERE:
            if row is None or row.instance.instance != instance.instance:
                return False
            if _state(entry) == _LEAVING:
                return self._board.deregister(instance.url, instance.instance)
            return self._board.remove(row.handle)
        if row is not None and _entry(row.instance, _HERE) == entry:
            return False
        return self._admit(name, instance, ago)

    def _admit(self, name: str, instance: Instance, ago: float) -> bool:
        if instance.host not in self._allowed:
            self._ignored.add(name)
            if name not in self._refused:
                self._refused.add(name)
                logger.warning(
                    "replica %s of another router is not on this machine; "
                    "start fd-router with --allow-host %s (or a network) to accept it",
                    *(instance.url, instance.host),
                )
            return False
        try:
            changed = self._board.admit(instance, up=False, ago=ago)
        except RegistrationError as error:
            logger.warning("replica %s of another router not admitted: %s", instance.url, error)
            changed = False
            self._ignored.add(name)
        return changed


@lru_cache(maxsize=1024)
def shared_name(instance: Instance) -> str:
    """Return the URL, with the machine if the address is loopback, which differs between machines."""
    if ipaddress.ip_address(instance.host).is_loopback:
        return f"{instance.url}@{_here()}"
    return instance.url


def _is_reachable(name: str) -> bool:
    _, at, place = name.partition("@")
    return not at or place == _here()


@cache
def _here() -> str:
    """Return an id of this network namespace, which has a loopback of its own, and of the machine's boot."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


@lru_cache(maxsize=1024)
def _entry(instance: Instance, state: str) -> str:
    return json.dumps({"registration": instance.registration(), "state": state}, sort_keys=True)


def _instance(entry: str) -> Instance:
    """Return the instance of an entry. Raises RegistrationError if the entry is invalid."""
    try:
        return from_fields(parse_json(entry)["registration"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RegistrationError(f"{type(error).__name__}: {printable(error)}") from None


@lru_cache(maxsize=1024)
def _state(entry: str) -> str:
    try:
        return str(parse_json(entry)["state"])
    except (ValueError, TypeError, KeyError):
        return ""


def _heard(shared: SharedState, name: str) -> float:
    try:
        heard = float(shared.heard.get(name, 0))
    except ValueError:
        return 0.0
    return heard if math.isfinite(heard) else 0.0
