"""One request: choose a replica, send, and when that fails try again or go on elsewhere.

choose --> attempt --> the answer, whole: over
  |          |
  |          +-> made way for a suspect, at a replica that is reserved for it: choose again and resume
  |          +-> refused (503, 502, 429 with Retry-After): choose again, within the retry budget
  |          +-> the replica is lost, nothing is known of its answer: choose again
  |          +-> the replica is lost, a part of its answer is known: choose again and resume, if it can be
  +-> all are full: wait in line
  +-> nobody is there: 503, or wait in line if some replica has had it or one was lost just now
  +-> it is suspected of killing replicas (suspicion.py): attempt, once it can be alone at one; or an error
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from ..board.board import Lease, PickFailure
from ..http import refusals
from ..http.fast_path import FastStream, Passed
from ..http.protocols import Client
from ..http.request import ClientRequest, RawHeaders, Refused
from ..http.responses import Response
from ..http.upstream import Fault, ReplicaConnection
from ..http.upstream_request import Forwarded, forwarded, lines_for, resuming
from ..instance import ReplicaHandle
from ..policy.policy import RequestFacts
from ..policy.request_facts import facts_of
from .attempts import Attempts
from .delivery import Delivery
from .guarded import entry
from .placement import Placement
from .retry import cannot_be_resumed, in_words, is_busy, is_death, is_overload

if TYPE_CHECKING:
    from .data_plane import DataPlane

logger = logging.getLogger(__name__)

#: Of a refusal that is kept while another replica is tried.
_MOST_KEPT = 64 << 10
#: A request waits this many times longer for a replica to come back, which may have to load its model, than
#: for a free place.
_TIMES_LONGER = 4
#: Seconds for which a stream that nobody could take up rests, before those that failed it are tried again.
_REST = 0.5


class Exchange:
    """Its callbacks come from the client's connection, the replica's, and the line."""

    __slots__ = (
        *("_began_at", "_connection", "_delivery", "_facts", "_fast", "_forwarded", "_id", "_is_doubtful"),
        *("_is_over", "_is_paused", "_is_reused", "_lease", "_name", "_past", "_plane", "_refusal"),
        *("_found", "_placement"),
        *("_request", "_stays", "_waits_since", "deadline"),
    )

    def __init__(self, plane: DataPlane, client: Client, request: ClientRequest) -> None:
        #: In the line; 0 before it joins for the first time, and whenever the answer has come further.
        self.deadline = 0.0
        self._waits_since = 0.0
        #: Why it waits: the result of the last attempt to place it.
        self._found: PickFailure | None = None
        self._plane = plane
        self._request = request
        self._id = request.id
        self._began_at = time.monotonic()
        self._delivery = Delivery(client, request, self._id)
        self._forwarded: Forwarded
        self._facts: RequestFacts
        # Of the attempt under way.
        self._lease: Lease | None = None
        self._connection: ReplicaConnection | None = None
        self._is_reused = False
        #: It ended without an answer on a kept connection, and is made again on a new one.
        self._is_doubtful = False
        self._refusal: list[bytes] | None = None
        #: The stream is on the fast path: it has both connections.
        self._fast: FastStream | None = None
        #: With the event loop: the fast path can do nothing for it.
        self._stays = False
        # Of all attempts.
        #: Of the latest one's replica.
        self._name = "-"
        self._past = Attempts()
        self._placement = Placement(plane, self._past)
        self._is_paused = False
        self._is_over = False

    @entry
    def start(self) -> None:
        plane, request = self._plane, self._request
        try:
            plane.admit(request)
            self._forwarded = forwarded(request, self._id)
        except Refused as refused:
            self._give(refused.answer)
            return
        plane.exchanges.add(self)
        plane.budget.deposit()
        draw = random.getrandbits(64)
        self._facts = facts_of(plane.settings.policy, request.headers, request.body, draw)
        if plane.line.has_others(self._began_at):
            self._wait(PickFailure.BUSY)
        else:
            self._choose()

    # ---- from the client

    @entry
    def client_gone(self) -> None:
        if not self._is_over:
            self._leave_fast_path()
            self._plane.line.leave(self)
            if not self._delivery.has_begun:
                self._delivery.status = 499
            self._end("client gone")

    @entry
    def pause(self) -> None:
        """The client does not read as fast as its answer comes."""
        self._is_paused = True
        if self._connection is not None:
            self._connection.pause()

    @entry
    def resume(self) -> None:
        self._is_paused = False
        if self._connection is not None:
            self._connection.resume()

    # ---- from the clock and the line

    @entry
    def pardon(self, now: float) -> None:
        """It is not known whether the replica was silent: nobody has listened."""
        if self._connection is not None:
            self._connection.heard_at = now

    @entry
    def watch(self, now: float) -> None:
        """Gives the replica up if it has been silent for too long."""
        connection = self._connection
        if connection is None or self._is_paused:
            return
        if self._fast is not None:
            connection.heard_at = max(connection.heard_at, self._fast.heard_at)
            self._progressed(self._fast.new_events())
        settings = self._plane.settings
        says_so = "progress" in connection.handle.instance.features
        patience = settings.progress_timeout if says_so else settings.request_timeout
        if now - connection.heard_at > patience:
            connection.cancel()
            self.failed(Fault.SILENT, f"for {patience:g} s")

    @entry
    def make_way(self, handles: Collection[ReplicaHandle]) -> None:
        """Continue elsewhere if the answer can be, and the replica is one of `seats`, reserved for others."""
        lease = self._lease
        if lease is None or self._connection is None or lease.handle not in handles:
            return
        if self._placement.is_reserved(lease.handle) or self._delivery.is_done:
            return
        self._leave_fast_path()
        resumption = self._delivery.resumption()
        if resumption is None:
            return
        self._drop_connection()
        self._delivery.drop_partial()
        name = lease.handle.name
        self._past.failed(f"replica {name}: reserved for another request", resumption)
        logger.info("request=%s replica=%s makes way for a suspect, continues elsewhere", self._id[:64], name)
        self._release()
        self._plane.metrics.resumed(name)
        self._choose()

    @property
    def is_choosy(self) -> bool:
        return bool(self._past.tried)

    @entry
    def try_again(self, now: float) -> PickFailure | None:
        if self._is_over:
            return None
        waits_for_replica = self._past.has_been_taken or self._found is PickFailure.DOWN
        if waits_for_replica and now - self._waits_since >= _REST:
            # Whoever failed may be well again by now; the deadline ends this, and too many deaths.
            self._past.forgive()
        nobody = self._attempt()
        if nobody is None:
            self._plane.metrics.waited(now - self._waits_since)
        else:
            if (
                nobody is PickFailure.DOWN
                and self._found is PickFailure.BUSY
                and self._is_one_coming_back(now)
            ):
                # The time for a replica begins now, but not again and again while replicas come and go.
                latest = self._waits_since + self._plane.settings.queue_timeout
                self.deadline = min(now, latest) + self._patience(nobody)
            self._found = nobody
        return nobody

    @entry
    def give_up(self) -> None:
        self._plane.metrics.waited(time.monotonic() - self._waits_since)
        if self._delivery.has_begun:
            self._break_off("no replica could go on with the answer in time")
        elif self._past.has_been_taken or self._found is PickFailure.DOWN:
            self._give(self._past.nobody())
        else:
            self._turn_away()

    # ---- from the pool

    @entry
    def connected(self, connection: ReplicaConnection) -> None:
        if self._lease is not None and self._lease.handle == connection.handle and self._connection is None:
            self._send(connection)
        else:
            self._plane.pool.keep(connection)

    @entry
    def unreachable(self, why: str) -> None:
        if self._lease is not None:
            self.failed(Fault.UNREACHABLE, why)

    # ---- from the replica

    @entry
    def informed(self, headers: RawHeaders) -> None:
        # It has the request: whether the kept connection was still good is no question any more.
        self._is_reused = False
        lease = self._lease
        assert lease is not None
        if "resume" in lease.instance.features:
            tokens = self._delivery.note_draft(headers)
            self._progressed(tokens)
            if tokens and self._past.resumption is not None:
                self._past.has_gone_on(lease.handle)

    @entry
    def began(self, connection: ReplicaConnection) -> None:
        status = connection.status
        lease = self._lease
        assert lease is not None
        if self._past.resumption is not None:
            is_stream = connection.content_type.startswith(b"text/event-stream")
            is_rest = status == 200 and (is_stream or not self._delivery.has_begun)
            self._refusal = None if is_rest else []
            if is_rest:
                self._past.has_gone_on(lease.handle)
        elif is_busy(status, connection.has_retry_after):
            self._refusal = []
        if self._refusal is None and not self._delivery.has_begun:
            has_marks = "resume" in lease.handle.instance.features
            self._delivery.expect(connection, len(self._past.problems), has_marks, self._past.resumed_by)
        self._stays = not self._delivery.has_marks

    @entry
    def received(self, body: bytes) -> None:
        if self._refusal is not None:
            if sum(map(len, self._refusal)) + len(body) <= _MOST_KEPT:
                self._refusal.append(body)
            return
        if self._delivery.receive(body):
            self._progressed(1)
            if not self._stays:
                # By then it has been sent.
                asyncio.get_running_loop().call_soon(self._take_fast_path)
        if problem := self._delivery.problem:
            self._drop_connection()
            self.failed(Fault.CUT, problem)

    @entry
    def ended(self) -> None:
        connection, lease = self._connection, self._lease
        assert connection is not None
        assert lease is not None
        self._connection = None
        if self._refusal is not None:
            self._refused(connection, lease, b"".join(self._refusal))
            return
        if self._delivery.is_open:
            self.failed(Fault.CUT, "the stream ended before its last event")
            return
        self._plane.board.succeeded(lease.handle)
        self._delivery.finish(self._past.resumed_by)
        self._end()

    @entry
    def failed(self, fault: Fault, why: str) -> None:
        lease = self._lease
        assert lease is not None
        # Where it may have fallen silent.
        self._leave_fast_path()
        self._connection = None
        if self._delivery.is_done:
            self._delivery.complete()
            self._delivery.finish(self._past.resumed_by)
            self._end()
            return
        self._delivery.drop_partial()
        if fault is Fault.UNANSWERED and self._is_reused:
            # A server may close a kept connection at the very moment it is used. Nothing was answered, so a
            # new connection to the same replica decides whether the replica is there.
            self._is_reused, self._is_doubtful = False, True
            self._plane.pool.connect(lease.handle, self)
            return
        problem = in_words(fault, why)
        self._report(lease, fault, problem)
        if fault is Fault.GARBLED:
            self._past.refusal = refusals.garbled(lease.handle.name, problem)
        is_patient = fault is Fault.SILENT and not self._delivery.has_begun
        if is_patient and "progress" not in lease.instance.features:
            # It may be busy with this very request, for all that is known.
            self._give(refusals.silent(lease.handle.name, problem))
        else:
            self._next(lease, problem)

    # ---- the fast path

    @entry
    def given_back(self) -> None:
        connection, passed = self._connection, self._leave_fast_path()
        assert connection is not None
        assert passed is not None
        # Or it would come and go with each event.
        self._stays = not passed.size
        if passed.unread:
            connection.data_received(passed.unread)

    @entry
    def _take_fast_path(self) -> None:
        connection = self._connection
        if connection is None or self._fast is not None or self._is_paused:
            return
        replica, client = connection.fast_transport, self._delivery.fast_transport
        if replica is not None and client is not None:
            self._fast = self._plane.fast_path.take(self, replica, client)
            self._stays = self._fast is None

    def _leave_fast_path(self) -> Passed | None:
        fast, self._fast = self._fast, None
        if fast is None:
            return None
        assert self._connection is not None
        self._connection.heard_at = max(self._connection.heard_at, fast.heard_at)
        passed = fast.take_back()
        self._delivery.add_passed(passed)
        self._progressed(passed.new_events)
        return passed

    def _progressed(self, events: int) -> None:
        """So many have gone to the client, or would have if its answer did not come whole."""
        if events and self._lease is not None:
            self._lease.count_tokens(events)
            self._past.came_further()
            self._placement.unreserve()
            self.deadline = 0.0

    # ---- choosing

    def _choose(self) -> None:
        nobody = self._attempt()
        if nobody is not None:
            self._wait(nobody)

    def _wait(self, nobody: PickFailure) -> None:
        """If there is something to wait for."""
        now = self._waits_since = time.monotonic()
        self._found = nobody
        if not self.deadline:
            self.deadline = now + self._patience(nobody)
        if self._past.has_been_taken:
            self._plane.line.join(self, is_urgent=True)
        elif nobody is PickFailure.DOWN and (self._past.refusal or not self._is_one_coming_back(now)):
            self._give(self._past.nobody())
        elif not self._plane.line.join(self):
            self._turn_away()

    def _patience(self, nobody: PickFailure) -> float:
        is_longer = self._past.has_been_taken or nobody is PickFailure.DOWN
        return self._plane.settings.queue_timeout * (_TIMES_LONGER if is_longer else 1)

    def _is_one_coming_back(self, now: float) -> bool:
        """Return True if fd-dp may still be starting a lost replica, which takes a limited time."""
        plane = self._plane
        return plane.settings.is_supervised and plane.board.has_lost_one_since(
            now - self._patience(PickFailure.DOWN)
        )

    def _attempt(self) -> PickFailure | None:
        """None if one is under way."""
        plane, past = self._plane, self._past
        picked = self._placement.pick(self._facts, has_begun=self._delivery.has_begun)
        if picked is None:
            self._end_deadly()
            return None
        if not isinstance(picked, Lease):
            return picked
        self._lease = picked
        if logger.isEnabledFor(logging.DEBUG):
            self._record_decision(picked)
        self._is_doubtful = False
        self._name = picked.handle.name
        past.tried.append(picked.handle)
        connection = plane.pool.take(picked.handle)
        if connection is not None:
            self._send(connection)
        else:
            plane.pool.connect(picked.handle, self)
        return None

    def _send(self, connection: ReplicaConnection) -> None:
        lease = self._lease
        assert lease is not None
        self._connection = connection
        self._is_reused = not connection.is_fresh
        self._refusal = None
        handle = lease.handle
        request = self._forwarded
        past = self._past
        if past.resumption is not None and "resume" in handle.instance.features:
            request = resuming(request, past.resumption, handle.instance.token)
        elif past.problems:
            past.begin_anew()
            self._delivery.forget_draft()
        elif not self._is_doubtful:
            self._plane.metrics.relayed(time.monotonic() - self._began_at)
        lines = lines_for(handle.authority, handle.instance.features)
        connection.send(request.to(lines), self, self._request.method == "HEAD")
        if self._is_paused:
            connection.pause()

    # ---- when it fails

    def _report(self, lease: Lease, fault: Fault, problem: str) -> None:
        # If nobody listens there any more, it was this request with which the kept connection ended.
        if is_death(fault) or self._is_doubtful:
            self._died(lease, problem)
        if fault is Fault.UNREACHABLE:
            self._plane.board.unreachable(lease.handle, problem)
        else:
            self._plane.board.failed(lease.handle, problem)

    def _died(self, lease: Lease, problem: str) -> None:
        handle = lease.handle
        alone = self._placement.is_reserved(handle)
        self._past.died(handle, alone, time.monotonic(), f"replica {handle.name}: {problem}")
        # What it has waited so far is not to be held against it.
        self.deadline = 0.0

    def _refused(self, connection: ReplicaConnection, lease: Lease, body: bytes) -> None:
        """The replica has said, and whole, that it does not take the request."""
        past = self._past
        if connection.has_lost_engine:
            # The same as no answer: the API process has outlived its worker for a moment.
            problem = "lost its engine"
            self._died(lease, problem)
            self._plane.board.failed(lease.handle, problem)
            self._next(lease, problem)
            return
        if connection.status == 503 and lease.instance.instance:
            # A replica of fd-dp that is ending: the request may have to wait for the next one.
            past.has_been_taken = True
        if past.resumption is not None:
            is_begun, status = self._delivery.has_begun, connection.status
            if is_begun and cannot_be_resumed(status):
                self._break_off(f"replica {lease.handle.name} cannot go on with this answer")
                return
            if not is_begun and status != 401 and not is_busy(status, connection.has_retry_after):
                # Nobody has seen anything of it. It is begun anew, and why not here.
                self._delivery.forget_draft()
                past.forgive(lease.handle)
        else:
            past.refusal = refusals.not_now(connection, lease.handle.name, body)
            is_load = is_overload(connection.status, bool(lease.instance.instance))
            if is_load and not self._plane.budget.withdraw(time.monotonic()):
                self._give(past.refusal)
                return
        self._next(lease, f"answered {connection.status}")

    def _next(self, lease: Lease, problem: str) -> None:
        """Another replica, if there is one."""
        name, past, delivery = lease.handle.name, self._past, self._delivery
        past.failed(f"replica {name}: {problem}", delivery.resumption())
        if delivery.has_begun and past.resumption is None:
            self._break_off(f"replica {name} was lost in the middle of the answer", problem)
            return
        self._release()
        logger.warning("request=%s replica=%s did not take it: %s", self._id[:64], name, problem)
        if past.resumption is not None:
            self._plane.metrics.resumed(name)
        else:
            self._plane.metrics.retried(name)
        self._choose()

    def _end_deadly(self) -> None:
        why = self._past.deadly()
        logger.error("request=%s %s", self._id[:64], why)
        if self._delivery.has_begun:
            self._break_off(f"request {self._id[:64]}: {why}", "deadly")
        else:
            self._give(refusals.deadly(why, self._id[:64]))

    # ---- the end

    def _turn_away(self) -> None:
        self._give(self._past.refusal or refusals.line_is_full(self._plane.retry_after()))

    def _give(self, answer: Response) -> None:
        self._delivery.give(answer)
        self._end()

    def _break_off(self, why: str, remark: str = "") -> None:
        self._plane.metrics.broken_off(self._name)
        self._delivery.break_off(why)
        self._end(remark or why)

    def crash(self) -> None:
        """End the request after an exception in the router's own code. Call it in the `except` clause."""
        logger.exception("request=%s failed in the router", self._id[:64])
        if self._is_over:
            return
        why = f"internal error of the router in request {self._id[:64]}; the router's log has the details"
        for step in (
            self._leave_fast_path,
            lambda: self._plane.line.leave(self),
            lambda: self._delivery.crash(refusals.router_failed(why), why),
            lambda: self._end("an exception in the router"),
        ):
            # A step may fail, too; the others must still give back what the request has.
            with contextlib.suppress(Exception):
                step()

    def _end(self, remark: str = "") -> None:
        if self._is_over:
            return
        self._is_over = True
        handle = self._lease.handle if self._lease is not None else None
        try:
            self._drop_connection()
        finally:
            try:
                self._release()
            finally:
                self._plane.over(
                    self, self._request, self._id, handle, self._delivery, self._began_at, remark
                )

    def _release(self) -> None:
        lease, self._lease = self._lease, None
        try:
            if lease is not None:
                lease.release()
        finally:
            self._placement.unreserve()

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.cancel()

    def _record_decision(self, lease: Lease) -> None:
        load = {row.instance.name: row.in_flight for row in self._plane.board.status() if row.up}
        logger.debug(
            "request=%s replica=%s chosen by %s, attempt=%d, tokens=%d, in flight, this one included: %s",
            *(self._id[:64], lease.handle.name, self._plane.settings.policy.name, len(self._past.tried)),
            *(self._facts.prompt_tokens, load),
        )
