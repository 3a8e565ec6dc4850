"""Which replicas several routers know together: what one of them hears, the others learn.

A router compares what all of them said last, what they say now, and its own board. What has changed on one
side is taken over by the other. That nothing is said of a replica means nothing, and what is older than
before is no news: who keeps what is said may have lost its memory. So a farewell and a removal are said, too.
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
#: Seconds by which a heartbeat must be newer to be worth saying. The shared clock is read over a network, and
#: that may take a second; what is said again with each reading would never grow old.
_NEWER = 2.0
#: Seconds by which what is said may be older than what was said before: routers do not wait for each other.
_OLDER = 10.0
#: Seconds for which it is said that a replica has gone.
_SAY_GONE = 2 * FORGET_AFTER
_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Said:
    """What routers say of replicas, by the name that all of them have for one."""

    #: Its registration, and whether it is still there.
    entries: Mapping[str, str] = field(default_factory=dict)
    #: "1" if its operator wants nothing new there, else "0".
    draining: Mapping[str, str] = field(default_factory=dict)
    #: When its last heartbeat came, in seconds on a clock that all share.
    heard: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.entries or self.draining or self.heard)

    def then(self, more: Said) -> Said:
        return Said(
            {**self.entries, **more.entries},
            {**self.draining, **more.draining},
            {**self.heard, **more.heard},
        )


class SharedReplicas:
    """One router's side of it. Not thread-safe."""

    def __init__(self, board: Board, allowed: AllowedAddresses, clock: Callable[[], float]) -> None:
        """`clock`: the board's."""
        self._board = board
        self._allowed = allowed
        self._clock = clock
        self._said = Said()
        #: Replicas that are said to be here, and rightly are not on our board.
        self._not_ours: set[str] = set()
        self._refused: set[str] = set()

    def learn(self, said: Said, now: float) -> bool:
        """Brings the board up to date with what is said; `now` is on the shared clock.

        True if that changed who is on the board.
        """
        before, self._said = self._said, said
        rows = self._rows()
        changed = set()
        for name, entry in said.entries.items():
            if _heard(said, name) < _heard(before, name) - _OLDER:
                continue
            is_news = before.entries.get(name) != entry
            # One that we have forgotten, while others go on hearing of it, comes back with a heartbeat.
            is_back = name not in rows and before.heard.get(name) != said.heard.get(name)
            row = rows.get(name)
            if row is not None and self._heard_at(row, now) >= _heard(said, name) - _NEWER:
                if row.up and before.entries.get(name) != _entry(row.instance, _HERE):
                    continue  # it changed here as well, and works: the others will learn that from us
            elif row is not None and is_news and self._is_gone(entry):
                # Ours is an older start of it, or that one.
                changed |= {name} if self._board.remove(row.handle) else set()
                continue
            ago = max(0.0, now - _heard(said, name))
            if (is_news or is_back) and self._learn_entry(name, entry, row, ago):
                changed.add(name)
        for name, row in self._rows().items():
            if _heard(said, name) < _heard(before, name) - _OLDER:
                continue
            draining = said.draining.get(name)
            if draining is not None and (before.draining.get(name) != draining or name in changed):
                (self._board.drain if draining == "1" else self._board.undrain)(row.handle)
            if said.entries.get(name) == _entry(row.instance, _HERE):
                self._board.heard(row.handle, ago=max(0.0, now - _heard(said, name)))
        return bool(changed)

    def news(self, now: float) -> Said:
        """What our board knows better than what is said."""
        rows, said = self._rows(), self._said
        entries, draining, heard = {}, {}, {}
        for name, row in rows.items():
            entry = _entry(row.instance, _LEAVING if row.leaving else _HERE)
            if said.entries.get(name) != entry:
                entries[name] = entry
            if said.draining.get(name, "0") != str(int(row.draining)):
                draining[name] = str(int(row.draining))
            if (at := self._heard_at(row, now)) > _heard(said, name) + _NEWER:
                heard[name] = f"{at:.3f}"
        for name, entry in said.entries.items():
            if name in rows or name in self._not_ours or _state(entry) != _HERE or not _is_of_here(name):
                continue
            instance = _instance(entry)
            if self._board.has_left(instance):
                entries[name] = _entry(instance, _LEAVING)
            elif now - _heard(said, name) < FORGET_AFTER:
                entries[name] = _entry(instance, _REMOVED)
            else:
                self._not_ours.add(name)  # we have forgotten it; others may know it better
        return Said(entries, draining, heard)

    def agree(self, news: Said) -> None:
        """That news has been said."""
        self._said = self._said.then(news)

    def outdated(self, now: float) -> list[str]:
        """Names of which nothing need be said any more."""
        limits = {name: _SAY_GONE for name, entry in self._said.entries.items() if _state(entry) != _HERE}
        # Nobody else looks after those that only one machine could reach, if that is no more.
        limits |= {name: _DAY for name in self._said.entries if not _is_of_here(name)}
        return [name for name, limit in limits.items() if now - _heard(self._said, name) > limit]

    def _rows(self) -> dict[str, Status]:
        return {shared_name(row.instance): row for row in self._board.status()}

    def _is_gone(self, entry: str) -> bool:
        return _state(entry) in (_LEAVING, _REMOVED) or (
            _state(entry) == _HERE and self._board.has_left(_instance(entry))
        )

    def _heard_at(self, row: Status, now: float) -> float:
        """On the shared clock."""
        return now - (self._clock() - row.heard_at)

    def _learn_entry(self, name: str, entry: str, row: Status | None, ago: float) -> bool:
        """True if the board has changed."""
        self._not_ours.discard(name)
        if not _is_of_here(name):
            return False
        try:
            instance = _instance(entry)
            if shared_name(instance) != name:
                raise RegistrationError(f"it is of {instance.url}")
        except RegistrationError as error:
            logger.warning(
                "what is said of replica %s is not understood: %s", printable(name), printable(error)
            )
            self._not_ours.add(name)
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
            self._not_ours.add(name)
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
            self._not_ours.add(name)
        return changed


@lru_cache(maxsize=1024)
def shared_name(instance: Instance) -> str:
    """The URL, where it means the same everywhere; loopback is another machine for everybody."""
    if ipaddress.ip_address(instance.host).is_loopback:
        return f"{instance.url}@{_here()}"
    return instance.url


def _is_of_here(name: str) -> bool:
    _, at, place = name.partition("@")
    return not at or place == _here()


@cache
def _here() -> str:
    """What has a loopback of its own: a network namespace of a machine that has been started."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


@lru_cache(maxsize=1024)
def _entry(instance: Instance, state: str) -> str:
    return json.dumps({"registration": instance.registration(), "state": state}, sort_keys=True)


def _instance(entry: str) -> Instance:
    """Raises RegistrationError if it is not understood."""
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


def _heard(said: Said, name: str) -> float:
    try:
        heard = float(said.heard.get(name, 0))
    except ValueError:
        return 0.0
    return heard if math.isfinite(heard) else 0.0
