"""One request from its arrival to its last byte: pick a replica, make an attempt, retry or resume elsewhere.

pick --> attempt --> the client has the complete response
  |        |
  |        +-> preempted, its replica is reserved for a suspect: pick again and resume
  |        +-> refused (503, 502, 429 with Retry-After): pick again, within the retry budget
  |        +-> replica lost, nothing known of its response: pick again
  |        +-> replica lost, part of its response known: pick again and resume, if that is possible
  +-> all replicas are busy: wait in the queue
  +-> no replica: 503, or wait in the queue if one has had the request or was lost recently
  +-> suspected of killing replicas (suspicion.py): attempt it alone on a replica, or return an error
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Collection

from ....common.trace_context import TraceContext, trace_label
from ..board.board import Lease, PickFailure
from ..http import refusals
from ..http.protocols import Client
from ..http.request import ClientRequest, Refused
from ..http.responses import Response
from ..http.upstream import Fault
from ..http.upstream_request import Forwarded, forwarded, lines_for, resuming
from ..instance import ReplicaHandle
from ..policy.policy import RequestFacts
from ..policy.request_facts import facts_of
from .attempt import Attempt, Refusal
from .delivery import Delivery
from .guarded import entry
from .placement import Placement
from .request_trace import RequestTrace
from .retry import cannot_be_resumed, describe, is_busy, is_death, is_overload
from .retry_state import RetryState
from .services import FinishedRequest, Services

logger = logging.getLogger(__name__)

#: Factor of the queue timeout while waiting for a replica to come back: it may have to load its model.
_RECOVERY_FACTOR = 4
#: Seconds that a request waits before the replicas that failed it are tried again.
_COOLDOWN = 0.5


class Exchange:
    """Driven by the client connection, the current attempt, the wait queue and the clock."""

    __slots__ = (
        *("_arrived_at", "_attempt", "_delivery", "_facts", "_forwarded", "_id", "_is_over", "_pick_failure"),
        *("_placement", "_queued_at", "_replica", "_request", "_retry", "_services", "_trace", "deadline"),
    )

    def __init__(self, services: Services, client: Client, request: ClientRequest) -> None:
        #: End of its time in the wait queue; 0 until first queued, reset on progress.
        self.deadline = 0.0
        self._queued_at = 0.0
        #: Why it waits; set by the last pick.
        self._pick_failure: PickFailure | None = None
        self._services = services
        self._request = request
        self._id = request.id
        self._arrived_at = time.monotonic()
        self._delivery = Delivery(client, request, self._id)
        self._forwarded: Forwarded
        self._facts: RequestFacts
        self._retry = RetryState()
        self._placement = Placement(services, self._retry)
        #: Holds a lease; None while no replica has the request.
        self._attempt: Attempt | None = None
        #: Name of the last replica tried.
        self._replica = "-"
        self._is_over = False
        #: None where traces are off.
        self._trace: RequestTrace | None = None

    @entry
    def start(self) -> None:
        services, request = self._services, self._request
        replaced: frozenset[bytes] = frozenset()
        if services.tracing is not None:
            self._trace = RequestTrace(services.tracing, request, self._id)
            replaced = self._trace.replaced
        try:
            services.admit(self, request)
            self._forwarded = forwarded(request, self._id, replaced)
        except Refused as refused:
            self._respond(refused.response)
            return
        services.budget.deposit()
        draw = random.getrandbits(64)
        self._facts = facts_of(services.settings.policy, request.headers, request.body, draw)
        if services.wait_queue.has_others(self._arrived_at):
            self._wait(PickFailure.BUSY)
        else:
            self._pick_or_wait()

    # ---- from the client

    @entry
    def client_gone(self) -> None:
        if not self._is_over:
            self._leave_fast_path()
            self._services.wait_queue.leave(self)
            if not self._delivery.has_begun:
                self._delivery.status = 499
            self._end("client gone")

    @entry
    def pause(self) -> None:
        """Stop reading from the replica: the client reads more slowly than its response arrives."""
        self._delivery.is_paused = True
        if self._attempt is not None:
            self._attempt.pause()

    @entry
    def resume(self) -> None:
        self._delivery.is_paused = False
        if self._attempt is not None:
            self._attempt.resume()

    # ---- from the clock and the wait queue

    @entry
    def reset_silence_timer(self, now: float) -> None:
        if self._attempt is not None:
            self._attempt.reset_silence_timer(now)

    @entry
    def watch(self, now: float) -> None:
        if self._attempt is not None:
            self._attempt.watch(now)

    @entry
    def make_way(self, handles: Collection[ReplicaHandle]) -> None:
        attempt = self._attempt
        if attempt is None or not attempt.has_connection or attempt.handle not in handles:
            return
        if self._placement.is_reserved(attempt.handle) or self._delivery.is_done:
            return
        passed = attempt.leave_fast_path()
        resumption = self._delivery.resumption()
        if resumption is None:
            attempt.parse_unread(passed)
            return
        attempt.cancel()
        self._delivery.drop_partial()
        name = attempt.handle.name
        self._retry.on_failure(f"replica {name}: reserved for another request", resumption, attempt.handle)
        logger.info(
            "request=%s replica=%s is reserved for another request, resuming elsewhere", self._ids, name
        )
        self._release()
        self._services.metrics.resumed(name)
        self._pick_or_wait()

    @property
    def has_exclusions(self) -> bool:
        return bool(self._retry.tried)

    @entry
    def try_again(self, now: float) -> PickFailure | None:
        if self._is_over:
            return None
        waits_for_replica = self._retry.was_dispatched or self._pick_failure is PickFailure.DOWN
        if waits_for_replica and now - self._queued_at >= _COOLDOWN:
            # Replicas that failed it may have recovered. The deadline and the limit of deaths end this.
            self._retry.tried.clear()
        failure = self._pick()
        if failure is None:
            self._services.metrics.waited(now - self._queued_at)
            return None
        lost_replicas = failure is PickFailure.DOWN and self._pick_failure is PickFailure.BUSY
        if lost_replicas and self._may_recover(now):
            # The time for a replica to recover starts now, but only once while replicas come and go.
            latest = self._queued_at + self._services.settings.queue_timeout
            self.deadline = min(now, latest) + self._patience(failure)
        self._pick_failure = failure
        return failure

    @entry
    def give_up(self) -> None:
        self._services.metrics.waited(time.monotonic() - self._queued_at)
        if self._delivery.has_begun:
            self._break_off("no replica could resume the response in time")
        elif self._retry.was_dispatched or self._pick_failure is PickFailure.DOWN:
            self._respond(self._retry.final_response())
        else:
            self._turn_away()

    # ---- from the attempt

    def request_bytes(self, attempt: Attempt) -> bytes:
        retry, handle, request = self._retry, attempt.handle, self._forwarded
        if retry.resumption is not None and "resume" in handle.instance.features:
            request = resuming(request, retry.resumption, handle.instance.token)
            if retry.rounds_differently(handle):
                logger.warning(
                    "request=%s replica=%s resumes a response of numeric version %s with %s: its text may "
                    "not be that of an undisturbed response",
                    *(self._ids, handle.name, retry.numeric_version, handle.instance.numeric_version),
                )
        elif retry.problems:
            retry.restart()
            self._delivery.forget_draft()
        elif not attempt.is_reconnect:
            self._services.metrics.relayed(time.monotonic() - self._arrived_at)
        lines = lines_for(handle.authority, handle.instance.features)
        return request.to(lines if self._trace is None else lines + self._trace.lines)

    def on_progress(self) -> None:
        self._retry.on_progress()
        self._placement.unreserve()
        self.deadline = 0.0

    def completed(self) -> None:
        self._delivery.finish(self._retry.resumed_by)
        self._end()

    def failed(self, attempt: Attempt, fault: Fault, why: str) -> None:
        handle, problem = attempt.handle, describe(fault, why)
        if self._trace is not None:
            self._trace.fail_attempt(fault)
        # If the reconnect failed too, the kept connection ended because of this request.
        if is_death(fault) or attempt.is_reconnect:
            self._record_death(handle, problem)
        if fault is Fault.UNREACHABLE:
            self._services.board.unreachable(handle, problem)
        else:
            self._services.board.failed(handle, problem)
        if fault is Fault.GARBLED:
            self._retry.refusal = refusals.garbled(handle.name, problem)
        is_timeout = fault is Fault.SILENT and not self._delivery.has_begun
        if is_timeout and "progress" not in handle.instance.features:
            # A replica that sends no keep-alives may still work on this request, so it is not sent twice.
            self._respond(refusals.silent(handle.name, problem))
        else:
            self._retry_elsewhere(handle, problem)

    def refused(self, attempt: Attempt, refusal: Refusal) -> None:
        connection, handle, retry = refusal.connection, attempt.handle, self._retry
        if self._trace is not None:
            self._trace.fail_attempt(connection.status)
        if connection.has_lost_engine:
            # As good as no response: the API process has outlived its worker for a moment.
            problem = "lost its engine"
            self._record_death(handle, problem)
            self._services.board.failed(handle, problem)
            self._retry_elsewhere(handle, problem)
            return
        if connection.status == 503 and handle.instance.instance:
            # A replica of fd-dp that is stopping: the request may have to wait for the next one.
            retry.was_dispatched = True
        if retry.resumption is not None:
            has_begun, status = self._delivery.has_begun, connection.status
            if has_begun and cannot_be_resumed(status):
                self._break_off(f"replica {handle.name} cannot resume this response")
                return
            if not has_begun and status != 401 and not is_busy(status, connection.has_retry_after):
                # The client has seen nothing yet, so the request starts over, possibly on the same replica.
                self._delivery.forget_draft()
                retry.tried.remove(handle)
        else:
            retry.refusal = refusals.not_now(connection, handle.name, refusal.body)
            is_load = is_overload(connection.status, bool(handle.instance.instance))
            if is_load and not self._services.budget.withdraw(time.monotonic()):
                self._respond(retry.refusal)
                return
        self._retry_elsewhere(handle, f"answered {connection.status}")

    def _record_death(self, handle: ReplicaHandle, problem: str) -> None:
        alone = self._placement.is_reserved(handle)
        self._retry.on_death(handle, alone, time.monotonic(), f"replica {handle.name}: {problem}")
        # Its next wait gets the full time.
        self.deadline = 0.0

    def _retry_elsewhere(self, handle: ReplicaHandle, problem: str) -> None:
        name, retry, delivery = handle.name, self._retry, self._delivery
        retry.on_failure(f"replica {name}: {problem}", delivery.resumption(), handle)
        if delivery.has_begun and retry.resumption is None:
            self._break_off(f"replica {name} was lost in the middle of the response", problem)
            return
        self._release()
        logger.warning("request=%s replica=%s failed, trying another: %s", self._ids, name, problem)
        if retry.resumption is not None:
            self._services.metrics.resumed(name)
        else:
            self._services.metrics.retried(name)
        self._pick_or_wait()

    # ---- picking a replica

    def _pick_or_wait(self) -> None:
        failure = self._pick()
        if failure is not None:
            self._wait(failure)

    def _pick(self) -> PickFailure | None:
        """Start an attempt and return None, or return why there is no replica for it."""
        picked = self._placement.pick(self._facts, has_begun=self._delivery.has_begun)
        if picked is None:
            self._end_poisonous()
            return None
        if not isinstance(picked, Lease):
            return picked
        attempt = Attempt(self, self._services, self._delivery, self._retry, picked)
        self._attempt = attempt
        if logger.isEnabledFor(logging.DEBUG):
            self._log_pick(picked.handle)
        self._replica = picked.handle.name
        self._retry.tried.append(picked.handle)
        if self._trace is not None:
            self._trace.attempt(picked.handle, is_resumption=self._retry.resumption is not None)
        attempt.start()
        return None

    def _wait(self, failure: PickFailure) -> None:
        """Join the wait queue, or respond if waiting is useless or the queue is full."""
        now = self._queued_at = time.monotonic()
        self._pick_failure = failure
        if not self.deadline:
            self.deadline = now + self._patience(failure)
        retry, wait_queue = self._retry, self._services.wait_queue
        if retry.was_dispatched:
            wait_queue.join(self, is_urgent=True)
        elif failure is PickFailure.DOWN and (retry.refusal or not self._may_recover(now)):
            self._respond(retry.final_response())
        elif not wait_queue.join(self):
            self._turn_away()
        if self._trace is not None and not self._is_over:
            self._trace.wait()

    def _patience(self, failure: PickFailure) -> float:
        """Return the seconds that it may spend in the wait queue."""
        is_longer = self._retry.was_dispatched or failure is PickFailure.DOWN
        return self._services.settings.queue_timeout * (_RECOVERY_FACTOR if is_longer else 1)

    def _may_recover(self, now: float) -> bool:
        """Return True if fd-dp may still be restarting a lost replica, which takes a limited time."""
        services = self._services
        return services.settings.is_supervised and services.board.has_lost_one_since(
            now - self._patience(PickFailure.DOWN)
        )

    def _log_pick(self, handle: ReplicaHandle) -> None:
        load = {row.instance.name: row.in_flight for row in self._services.board.status() if row.up}
        logger.debug(
            "request=%s replica=%s chosen by %s, attempt=%d, tokens=%d, in flight, this one included: %s",
            *(self._ids, handle.name, self._services.settings.policy.name, len(self._retry.tried)),
            *(self._facts.prompt_tokens, load),
        )

    # ---- the end

    def _end_poisonous(self) -> None:
        why = self._retry.poison_reason()
        logger.error("request=%s %s", self._ids, why)
        if self._delivery.has_begun:
            self._break_off(f"request {self._id[:64]}: {why}", "kills replicas")
        else:
            self._respond(refusals.poisonous(why, self._id[:64]))

    def _turn_away(self) -> None:
        self._respond(self._retry.refusal or refusals.queue_is_full(self._services.retry_after()))

    def _respond(self, response: Response) -> None:
        self._delivery.respond(response)
        self._end()

    def _break_off(self, why: str, remark: str = "") -> None:
        self._services.metrics.broken_off(self._replica)
        self._delivery.break_off(why)
        self._end(remark or why)

    def crash(self) -> None:
        """End the request after an exception in the router's own code. Call it in the `except` clause."""
        logger.exception("request=%s failed in the router", self._ids)
        if self._is_over:
            return
        why = f"internal error of the router in request {self._id[:64]}; the router's log has the details"
        for step in (
            self._leave_fast_path,
            lambda: self._services.wait_queue.leave(self),
            lambda: self._delivery.crash(refusals.router_failed(why), why),
            lambda: self._end("an exception in the router"),
        ):
            # If a step fails, the others must still give back what the request holds.
            with contextlib.suppress(Exception):
                step()

    def _end(self, remark: str = "") -> None:
        if self._is_over:
            return
        self._is_over = True
        attempt, handle = self._attempt, None
        try:
            if attempt is not None:
                handle = attempt.handle
                attempt.cancel()
        finally:
            try:
                self._release()
            finally:
                request, delivery, trace = self._request, self._delivery, self._trace
                is_traced = trace is not None or b"traceparent" in request.special
                record = FinishedRequest(
                    *(self._id, request.method, request.path, handle, delivery.status, delivery.size),
                    *(self._arrived_at, remark, self._context if is_traced else None),
                )
                self._services.finished(self, record)
                if trace is not None:
                    trace.end(delivery.status, delivery.size, is_broken=bool(remark))

    @property
    def _ids(self) -> str:
        """The ids of request and trace in log lines."""
        return self._id[:64] + trace_label(self._context)

    @property
    def _context(self) -> TraceContext | None:
        return self._request.trace_context if self._trace is None else self._trace.context

    def _leave_fast_path(self) -> None:
        if self._attempt is not None:
            self._attempt.leave_fast_path()

    def _release(self) -> None:
        attempt, self._attempt = self._attempt, None
        try:
            if attempt is not None:
                attempt.release()
        finally:
            self._placement.unreserve()
        if self._trace is not None:
            self._trace.end_attempt()
