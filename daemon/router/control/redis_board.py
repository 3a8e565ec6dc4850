"""Shares a board with those of routers on other machines, through Redis (--board redis://HOST:PORT/DB).

It adds nothing to a pick. Twenty times a second the worker that leads writes what its router has in flight,
under a key that expires when the router is dead, and adds up what the others have written: the sum goes to a
column of the board. So a router knows of another's requests a tenth of a second late, and of its own exactly.

    fd-router:routers           the names of all routers
    fd-router:counts:ROUTER     replica -> requests and prompt tokens in flight there; expires after 3 s
    fd-router:entries|draining|heard    what is said of each replica, see shared_replicas.py
    fd-router:changes           another one whenever one of those three changes

While Redis is away each router goes on with what it has. The registrations hold the replicas' tokens, so that
Redis must not be open to others. A database is for one fleet.
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
from .shared_replicas import Said, SharedReplicas, shared_name

logger = logging.getLogger(__name__)

#: More requests or prompt tokens of one router at one replica than this are not believed.
_MOST_ELSEWHERE = 1 << 40
#: Seconds between two turns; while Redis is away, and while another worker leads.
_EVERY, _RETRY, _IDLE = 0.05, 0.5, 1.0
#: Seconds for which a router's counts hold.
COUNT_TTL = 3.0
_TIMEOUT = 1.0
_PREFIX = "fd-router:"


class RedisBoard:
    """The thread that shares, as long as this process leads."""

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
        self._away_since: float | None = None

    def start(self) -> None:
        """After the fork."""
        threading.Thread(target=self._run, name="redis", daemon=True).start()

    def _run(self) -> None:
        while not self._board.lead():
            time.sleep(_IDLE)
        # No retries of its own: they would be silent, and the next turn comes soon.
        client = redis.Redis.from_url(
            self._address.url,
            decode_responses=True,
            socket_timeout=_TIMEOUT,
            socket_connect_timeout=_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
        while self._board.lead():
            try:
                self._turn(client)
                self._is_back()
                time.sleep(_EVERY)
            except Exception as error:
                if not isinstance(error, redis.RedisError | OSError | UnicodeDecodeError):
                    # For example, another router has written nonsense; it may be corrected by the next turn.
                    logger.exception("an exchange with %s failed", self._address)
                self._is_away(error)
                time.sleep(_RETRY)
        # Whoever leads next may have no Redis to ask.
        self._board.set_remote({})

    def _turn(self, client: redis.Redis) -> None:
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
        # Those that were there last time: a new one is heard in the next turn.
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
            if self._replicas.learn(Said(*pipe.execute()), now):
                self._registry.save(self._board)
            self._changes = changes
        news, outdated = self._replicas.news(now), self._replicas.outdated(now)
        if not news and not outdated:
            return
        pipe = client.pipeline(transaction=True)
        for name in ("entries", "draining", "heard"):
            if fields := getattr(news, name):
                pipe.hset(_PREFIX + name, mapping=fields)
            if outdated:
                pipe.hdel(_PREFIX + name, *outdated)
        # No count: a Redis that has lost its memory would come by the old numbers again.
        pipe.set(f"{_PREFIX}changes", secrets.token_hex(8))
        pipe.execute()
        # The next turn reads it all again, and with it what others have said in between.
        self._replicas.agree(news)

    def _is_away(self, error: Exception) -> None:
        now = self._clock()
        if self._away_since is None:
            self._away_since = now
            logger.warning("%s is away (%s); going on alone", self._address, _reason(error))
        if now - self._away_since >= COUNT_TTL:
            self._board.set_remote({})

    def _is_back(self) -> None:
        if self._away_since is not None:
            logger.info("%s is back after %.0f s", self._address, self._clock() - self._away_since)
            self._away_since = None

    def _key(self, router: str) -> str:
        return f"{_PREFIX}counts:{router}"


def _sum(counts: list[str], handles: dict[str, ReplicaHandle]) -> dict[ReplicaHandle, tuple[int, int]]:
    """What the other routers have at the replicas that we know."""
    requests: defaultdict[ReplicaHandle, int] = defaultdict(int)
    tokens: defaultdict[ReplicaHandle, int] = defaultdict(int)
    for text in counts:
        try:
            load = {name: (int(one), int(other)) for name, (one, other) in parse_json(text).items()}
        except (ValueError, TypeError, AttributeError, OverflowError):
            continue  # of another version
        if any(not 0 <= number < _MOST_ELSEWHERE for pair in load.values() for number in pair):
            continue
        for name, (in_flight, prompt) in load.items():
            if (handle := handles.get(name)) is not None:
                requests[handle] += in_flight
                tokens[handle] += prompt
    return {handle: (requests[handle], tokens[handle]) for handle in requests}


def _reason(error: Exception) -> str:
    return printable(error) or type(error).__name__
