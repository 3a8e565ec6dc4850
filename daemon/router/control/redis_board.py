"""Board shared with routers on other machines through Redis (--board redis://HOST:PORT/DB).

It does not slow down picks. Twenty times a second the leading worker writes its router's requests in flight
under a key that expires if the router dies, and adds up those of the other routers in the board's remote
counters. A router's own counts are exact; those of the others are a tenth of a second old.

    fd-router:routers           ids of all routers
    fd-router:counts:ROUTER     replica -> requests and prompt tokens in flight there; expires after 3 s
    fd-router:entries|draining|heard    state of each replica, see shared_replicas.py
    fd-router:changes           a new random value whenever one of those three changes

Without Redis each router continues with what it knows. The registrations contain the replicas' tokens, so
Redis must be closed to others. A database is for one set of replicas.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ....common.foreign_text import parse_json, printable
from ..addresses import AllowedAddresses
from ..board.board import Board
from ..config.redis_address import RedisAddress
from ..instance import ReplicaHandle
from .registry import RegistryFile
from .shared_replicas import SharedReplicas, SharedState, shared_name

logger = logging.getLogger(__name__)

#: Another router's count at one replica must be less.
_MAX_COUNT = 1 << 40
#: Seconds between two exchanges; while Redis is unavailable; and while another worker leads.
_INTERVAL, _RETRY_INTERVAL, _IDLE_INTERVAL = 0.05, 0.5, 1.0
#: Seconds for which a router's counts are valid.
COUNT_TTL = 3.0
_TIMEOUT = 1.0
_PREFIX = "fd-router:"


class RedisBoard:
    """Thread that exchanges with Redis while this process is the leader."""

    def __init__(
        self,
        board: Board,
        registry: RegistryFile,
        allowed: AllowedAddresses,
        address: RedisAddress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board = board
        self._registry = registry
        self._address = address
        self._clock = clock
        self._replicas = SharedReplicas(board, allowed, clock)
        self._changes: str | None = ""
        self._others: list[str] = []
        self._failing_since: float | None = None

    def start(self) -> None:
        """Start the thread. Call this after the fork."""
        threading.Thread(target=self._run, name="redis", daemon=True).start()

    def _run(self) -> None:
        while not self._board.try_lead():
            time.sleep(_IDLE_INTERVAL)
        # No retries by the client: they would be silent, and the next exchange follows soon.
        client = redis.Redis.from_url(
            self._address.url,
            decode_responses=True,
            socket_timeout=_TIMEOUT,
            socket_connect_timeout=_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
        while self._board.try_lead():
            try:
                self._exchange(client)
                self._on_success()
                time.sleep(_INTERVAL)
            except Exception as error:
                if not isinstance(error, redis.RedisError | OSError | UnicodeDecodeError):
                    # For example, another router has written an invalid value, which it may correct.
                    logger.exception("an exchange with %s failed", self._address)
                self._on_failure(error)
                time.sleep(_RETRY_INTERVAL)
        # The next leader may run without Redis.
        self._board.set_remote({})

    def _exchange(self, client: redis.Redis) -> None:
        rows = self._board.status()
        own = {
            shared_name(row.instance): (row.in_flight, row.tokens)
            for row in rows
            if row.in_flight or row.tokens
        }
        pipe = client.pipeline(transaction=False)
        pipe.sadd(f"{_PREFIX}routers", self._board.identity)
        pipe.set(self._key(self._board.identity), json.dumps(own), px=int(COUNT_TTL * 1000))
        pipe.smembers(f"{_PREFIX}routers")
        pipe.get(f"{_PREFIX}changes")
        pipe.time()
        # Counts of the routers known so far; a new router's follow in the next exchange.
        pipe.mget([self._key(self._board.identity), *map(self._key, self._others)])
        *_, routers, changes, (seconds, micros), counts = pipe.execute()
        handles = {shared_name(row.instance): row.handle for row in rows}
        self._board.set_remote(_sum([text for text in counts[1:] if text], handles))
        dead = [router for router, text in zip(self._others, counts[1:], strict=True) if text is None]
        if dead:
            client.srem(f"{_PREFIX}routers", *dead)
        self._others = sorted(routers - {self._board.identity, *dead})
        self._share(client, changes, seconds + micros / 1e6)

    def _share(self, client: redis.Redis, changes: str | None, now: float) -> None:
        if changes != self._changes:
            pipe = client.pipeline(transaction=True)
            for name in ("entries", "draining", "heard"):
                pipe.hgetall(_PREFIX + name)
            if self._replicas.apply(SharedState(*pipe.execute()), now):
                self._registry.save(self._board)
            self._changes = changes
        updates, expired = self._replicas.updates(now), self._replicas.expired(now)
        if not updates and not expired:
            return
        pipe = client.pipeline(transaction=True)
        for name in ("entries", "draining", "heard"):
            if fields := getattr(updates, name):
                pipe.hset(_PREFIX + name, mapping=fields)
            if expired:
                pipe.hdel(_PREFIX + name, *expired)
        # Not a count: a Redis that lost its data would repeat old numbers.
        pipe.set(f"{_PREFIX}changes", secrets.token_hex(8))
        pipe.execute()
        # The next exchange reads everything again, including what others wrote in between.
        self._replicas.published(updates)

    def _on_failure(self, error: Exception) -> None:
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
            logger.warning("%s cannot be reached (%s); continuing without it", self._address, _reason(error))
        if now - self._failing_since >= COUNT_TTL:
            self._board.set_remote({})

    def _on_success(self) -> None:
        if self._failing_since is not None:
            seconds = self._clock() - self._failing_since
            logger.info("%s can be reached again after %.0f s", self._address, seconds)
            self._failing_since = None

    def _key(self, router: str) -> str:
        return f"{_PREFIX}counts:{router}"


def _sum(counts: list[str], handles: dict[str, ReplicaHandle]) -> dict[ReplicaHandle, tuple[int, int]]:
    """Return the other routers' requests and prompt tokens at the replicas that this router knows."""
    requests: defaultdict[ReplicaHandle, int] = defaultdict(int)
    tokens: defaultdict[ReplicaHandle, int] = defaultdict(int)
    for text in counts:
        try:
            load = {name: (int(one), int(other)) for name, (one, other) in parse_json(text).items()}
        except (ValueError, TypeError, AttributeError, OverflowError):
            continue  # from another version
        if any(not 0 <= number < _MAX_COUNT for pair in load.values() for number in pair):
            continue
        for name, (in_flight, prompt) in load.items():
            if (handle := handles.get(name)) is not None:
                requests[handle] += in_flight
                tokens[handle] += prompt
    return {handle: (requests[handle], tokens[handle]) for handle in requests}


def _reason(error: Exception) -> str:
    return printable(error) or type(error).__name__
