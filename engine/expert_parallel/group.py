"""One rank's place in an expert-parallel group: it joins, takes part in steps, and goes on when others are
lost.

There is no coordinator. Ranks learn of a death from the kernel (pidfd), and whoever does so first commits
the group without the dead one (`membership.py`). A step that was under way then is dropped by all and begun
again: nothing of it was visible, and everything that a request owns is on its own rank. The experts of the
lost rank are taken over from the weights that all ranks have mapped.

A group sleeps when nobody has work. Who gets some announces a step and rings at the doors of all others: a
datagram to a socket, so that a call that comes while somebody is about to fall asleep is still there
afterwards.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..common.errors import ConfigError, FastDeployError
from ..common.messages import ExpertParallelStats
from ..custom_ops.expert_group import CHANGED, FAULTY, FULL, GOING, GroupShape, NativeGroup
from . import memory as shared
from .layout import PROTOCOL_VERSION, Layout, SeatState, phase_name
from .membership import Membership, RankLost, Record, SeatTaken, disagreement, planner
from .memory import Memory
from .peers import Peers

T = TypeVar("T")

_log = logging.getLogger(__name__)

#: A rank that is being replaced may take so long to die.
_SEAT_SECONDS = 15.0
#: Waits spin so long where every rank has CPUs of its own, which spares two context switches.
_SPIN_SECONDS = 100e-6
_REBALANCE_SECONDS = 60.0

#: Of each layer: the experts that this rank computes from now on, and which of them are new to it.
OnPlacement = Callable[[Sequence[frozenset[int]], Sequence[frozenset[int]]], None]


class GroupChanged(FastDeployError):
    """The step cannot be finished: members have come, gone or died. It is to be begun again."""


@dataclass(frozen=True, slots=True)
class GroupOptions:
    name: str
    seat: int
    #: Extra copies of the most used experts in each layer.
    redundant_experts: int = 0
    #: Experts are moved to where measured load is least, once a minute.
    rebalance: bool = False
    #: Seconds without progress after which a rank that others wait for is reported, and killed.
    stall_after: float = 10.0
    stall_kill: float = 60.0
    #: Every rank has a CPU for each of its threads.
    spin: bool = False


class ExpertGroup:
    """Not thread-safe: it belongs to the thread that computes. `join` returns one; `leave` ends it."""

    def __init__(
        self, memory: Memory, membership: Membership, options: GroupOptions, on_placement: OnPlacement
    ) -> None:
        self.options = options
        self.seat = options.seat
        self._memory = memory
        self._membership = membership
        self._on_placement = on_placement
        layout = memory.layout
        self._native = NativeGroup(
            GroupShape(
                rank=options.seat,
                num_ranks=layout.num_seats,
                num_layers=layout.num_layers,
                num_experts=layout.num_experts,
                max_tokens=layout.max_tokens,
                k=layout.k,
                hidden=layout.hidden,
                words=layout.words,
                first_rank_offset=layout.first_seat,
                rank_bytes=layout.seat_bytes,
                expert_token_counts=layout.expert_token_counts,
                dispatch_targets=layout.dispatch_targets,
                return_slots=layout.return_slots,
                tokens=layout.tokens,
                results=layout.results,
            ),
            memory.address,
            memory.file,
            self._report_stall,
            options.stall_after,
            options.stall_kill,
        )
        self._record = Record(0, (), ())
        self._peers = Peers(memory, self.seat)
        self._mine: list[frozenset[int]] = [frozenset()] * layout.num_layers
        #: The last step had work: the next one follows without anybody being called.
        self.awake = False
        self._restarted_steps = self._steps = 0
        self._step_seconds = 0.0
        self._began = self._rebalanced = time.monotonic()

    @property
    def handle(self) -> int:
        """What the operations `ep_*` are given."""
        return self._native.handle

    @property
    def wakeups(self) -> select.epoll:
        """Readable when there is something to `attend` to; for a poller of those who sleep."""
        return self._peers.wakeups

    @property
    def native(self) -> NativeGroup:
        return self._native

    @property
    def is_member(self) -> bool:
        return self.seat in self._record.seats

    # ---- steps

    def run_step(self, tokens: int, compute: Callable[[], T]) -> T | None:
        """Runs `compute` as this rank's part of a step: a transaction, which is begun again if it has to be.

        Returns when all ranks have begun the step, `compute` has gone through all layers, and this rank was
        a member all the time.

        Args:
            tokens: that this rank has in the step. The largest that `compute` passes to an operation.
            compute: calls `check` after each layer; may be called again when that or an operation has raised.

        Returns:
            What `compute` does; None if no rank has tokens: there is no step then.

        Raises:
            RankLost: the others have gone on without this rank, or it cannot get the memory that it needs.
        """
        while self._begin(tokens):
            try:
                result = compute()
                self._confirm()
                return result
            except RankLost:
                raise
            except Exception:
                # An operation may notice a change before `check` does. Anything else is a fault of this rank,
                # for which the others wait in the middle of the step.
                is_fault = self._native.status == GOING
                self._recover()
                if is_fault:
                    raise
                self._restarted_steps += 1
        return None

    def check(self) -> None:
        """After a layer: raises GroupChanged if the step cannot be finished."""
        if self._native.status != GOING:
            raise GroupChanged("the members of the expert group have changed")

    # ---- outside of steps

    @property
    def is_called(self) -> bool:
        """Somebody waits for this rank: to begin a step, or to adopt an epoch."""
        if self._membership.epoch != self._record.epoch:
            return True
        mine = self._memory.rows[self.seat].begun
        epoch = self._record.epoch
        # A number of an older epoch is left from before.
        mine = mine if mine >> 40 == epoch else epoch << 40
        rows = (self._memory.rows[seat].begun for seat in self._record.seats)
        return any(theirs >> 40 == epoch and theirs > mine for theirs in rows)

    def attend(self) -> None:
        """When `wakeups` is readable: takes calls, and buries the dead."""
        self._peers.keep_doorbell()
        if self._peers.answer():
            with self._memory.locked():
                dead = self._membership.remove_dead()
            self._log_losses(dead)
            self._wake_all()
        self._settle()

    def request_leave(self) -> None:
        """From here on this rank takes part until `is_member` is false: it becomes so between two steps."""
        with self._memory.locked():
            self._membership.request(self.seat, SeatState.LEAVING)
        self._wake_all()

    def close(self) -> None:
        """Gives the seat back. A member that does this is lost to the others."""
        with self._memory.locked():
            if self._membership.free(self.seat):
                shared.remove(self._memory)
        self._native.close()
        self._peers.close()

    def status(self) -> ExpertParallelStats:
        """What there is to be told about the group, by this rank."""
        header, counters = self._memory.header, self._native.counters
        return ExpertParallelStats(
            epoch=self._record.epoch,
            active_seats=list(self._record.seats),
            joins_total=header.joins,
            leaves_total=header.leaves,
            losses_total=header.losses,
            restarted_steps_total=self._restarted_steps,
            steps_total=self._steps,
            step_seconds_total=self._step_seconds,
            bytes_dispatched_total=counters.bytes_dispatched,
            bytes_combined_total=counters.bytes_combined,
            waited_seconds_total=[ns * 1e-9 for ns in counters.waited_ns[: self._memory.layout.num_seats]],
            expert_tokens_total=self._served(),
        )

    def _served(self) -> list[int]:
        """Tokens that each expert has computed on this rank, over all layers. Cheap enough for every step."""
        layout = self._memory.layout
        served = np.frombuffer(
            self._memory.pages,
            np.uint64,
            layout.num_layers * layout.num_experts,
            layout.seat(self.seat) + layout.expert_token_counts,
        )
        return served.reshape(layout.num_layers, layout.num_experts).sum(axis=0).tolist()

    # ---- the course of a step

    def _begin(self, tokens: int) -> bool:
        """True when all ranks have begun a step, False if none of them has tokens."""
        while True:
            self._settle()
            if not self.is_member:
                if tokens:
                    raise RankLost(f"seat {self.seat} has left the expert group, and still has work")
                return False
            # Those who sleep are called by whoever begins first, with tokens or without.
            is_first = not self.awake and not self.is_called
            self._native.announce(tokens)
            if is_first or (tokens and not self.awake):
                self._peers.call(self._record.seats)
            if self._native.begin() == GOING:
                self.awake = self._native.busy
                self._began = time.monotonic()
                return self.awake
            self._recover()

    def _confirm(self) -> None:
        """After the last layer, before anything of the step becomes visible."""
        self._steps += 1
        self._step_seconds += time.monotonic() - self._began
        if self._membership.epoch != self._record.epoch:
            # If this rank was stopped for long, what it has read may be of later steps of the others.
            with self._memory.locked():
                self._require_member(self._membership.read())

    def _recover(self) -> None:
        status = self._native.status
        if status == FULL:
            raise RankLost(
                f"{self._memory.directory.parent} is full: {-(-self._native.missing_bytes >> 20)} MB more "
                "are needed for the results of this rank's experts; make it larger (docker: --shm-size)"
            )
        if status == CHANGED:
            return
        if status == FAULTY:
            self._expel(*self._native.fault)
            return
        with self._memory.locked():
            dead = self._membership.remove_dead()
            if not dead and status == GOING and self._membership.epoch == self._record.epoch:
                # A fault of this rank alone, in the middle of a step in which the others wait for it.
                self._membership.restart_step()
        self._log_losses(dead)
        self._wake_all()

    def _expel(self, seat: int, fault: str) -> None:
        """Continue without a seat whose part of the memory is faulty."""
        what = f"{fault} is out of range in its part of the shared memory"
        if seat == self.seat:
            raise RankLost(f"faulty data that this rank wrote for the expert group: {what}")
        with self._memory.locked():
            pid = self._memory.entries[seat].pid
            # Another rank may have been faster.
            is_first = self._membership.epoch == self._record.epoch
            if is_first:
                self._membership.expel(seat)
        if is_first:
            _log.error(
                "expert group %s: seat %d (pid %d) is removed: %s; the others continue",
                *(self.options.name, seat, pid, what),
            )
            # It may sleep, and `_wake_all` no longer calls it.
            self._peers.call([seat])
        self._wake_all()

    # ---- membership

    def _join(self) -> None:
        self._wake_all()
        while not self.is_member:
            with self._memory.locked():
                dead = self._membership.remove_dead()
                record = self._membership.read()
                # Members that have not been admitted by others admit themselves.
                if not record.seats:
                    record = self._membership.grant()
            self._log_losses(dead)
            if self.seat in record.seats:
                self._settle()
            else:
                # Nobody calls if the one that would have admitted this rank has died.
                self._peers.wait(0.2)
                self._peers.answer()

    def _settle(self) -> None:
        """Adopts the newest epoch, and returns when all its members have."""
        while True:
            self._do_duties()
            if self._membership.epoch == self._record.epoch:
                return
            with self._memory.locked():
                record = self._membership.read()
            self._adopt(record)
            if not self.is_member:
                continue
            # Who has committed it may have been lost before it could call anybody.
            self._peers.call(record.seats)
            if self._native.arrive() != GOING:
                self._recover()

    def _do_duties(self) -> None:
        """The lowest seat speaks for all, between two of its steps: nobody's step is lost then."""
        if not self._record.seats or self._record.seats[0] != self.seat:
            return
        if self._membership.pending:
            with self._memory.locked():
                record = self._membership.grant()
            self._announce_members("members change", record)
        elif self.options.rebalance and time.monotonic() - self._rebalanced > _REBALANCE_SECONDS:
            self._rebalanced = time.monotonic()
            with self._memory.locked():
                changed = self._membership.rebalance()
            if changed:
                _log.info("experts are moved to even out their load")
                self._wake_all()

    def _adopt(self, record: Record) -> None:
        if self.is_member:
            self._require_member(record)
        before = self._record
        self._record = record
        self.awake = False
        self._peers.follow(record.seats if self.is_member else ())
        if not self.is_member:
            return
        mine = [frozenset(placement.experts_of(self.seat)) for placement in record.placements]
        taken = [new - old for new, old in zip(mine, self._mine, strict=True)]
        self._on_placement(mine, taken)
        self._mine = mine
        homes = [
            sum(1 << home.seat for home in homes)
            for placement in record.placements
            for homes in placement.homes
        ]
        spin = _SPIN_SECONDS if self.options.spin else 0.0
        self._native.set_members(record.epoch, record.bitmap, homes, self._peers.pidfds, spin)
        if record.seats != before.seats:
            _log.info(
                "expert group %s: epoch %d, seats %s; %d experts taken over here",
                *(self.options.name, record.epoch, _listed(record.seats), sum(map(len, taken))),
            )

    def _require_member(self, record: Record) -> None:
        entry = self._memory.entries[self.seat]
        # Another process may have the seat by now.
        if entry.pid == os.getpid() and (self.seat in record.seats or entry.state == SeatState.LEAVING):
            return
        raise RankLost(
            f"the expert group has gone on without seat {self.seat}: this process was stopped for too long, "
            "or another rank found faulty data in its part of the memory; see the log of that rank"
        )

    def _announce_members(self, what: str, record: Record) -> None:
        _log.info("expert group %s: %s: seats %s", self.options.name, what, _listed(record.seats))
        self._wake_all()

    def _log_losses(self, dead: Sequence[tuple[int, int]]) -> None:
        for seat, pid in dead:
            _log.warning(
                "expert group %s: seat %d (pid %d) has died; the others go on", self.options.name, seat, pid
            )

    def _report_stall(self, seat: int, seconds: float, killed: bool) -> None:
        row = self._memory.rows[seat]
        _log.warning(
            "expert group %s: seat %d (pid %d) has made no progress for %.1f s (%s, layer %d)%s",
            *(self.options.name, seat, self._memory.entries[seat].pid, seconds),
            *(phase_name(row.phase), row.layer, "; it is killed" if killed else ""),
        )

    # ---- waking others

    def _wake_all(self) -> None:
        """After a commit or a request: those in a collective, and those that sleep."""
        self._native.wake_waiters()
        self._peers.call_all()


def join(
    options: GroupOptions,
    layout: Layout,
    fingerprint: Mapping[str, Any],
    on_placement: OnPlacement,
    root: Path = shared.SHARED_MEMORY,
) -> ExpertGroup:
    """Takes a seat; returns as soon as this rank is a member and the others have agreed to it.

    Args:
        fingerprint: what all ranks must have in common besides the layout.
        on_placement: called before each epoch with what changes for this rank.

    Raises:
        ConfigError: the ranks disagree, the seat is taken, or there is no shared memory.
    """
    seat = options.seat
    deadline = time.monotonic() + _SEAT_SECONDS
    fingerprint = {"protocol": PROTOCOL_VERSION, **asdict(layout), **fingerprint}
    while True:
        try:
            with shared.opened(options.name, layout, fingerprint, options.stall_kill, root) as memory:
                membership = Membership(memory, planner(layout.num_experts, options.redundant_experts))
                living = [
                    (other, entry.pid) for other, entry in enumerate(memory.entries) if shared.is_alive(entry)
                ]
                refusal = disagreement(seat, fingerprint, memory.read_fingerprint(), living)
                if refusal is not None:
                    raise ConfigError(refusal)
                memory.take_part(seat)
                membership.register(seat, options.name)
                group = ExpertGroup(memory, membership, options, on_placement)
            break
        except SeatTaken:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    _log.info(
        "expert group %s: seat %d of %d; %d MB of %s for what travels, at most",
        *(options.name, seat, layout.num_seats, -(-layout.seat_bytes >> 20), root),
    )
    group._join()
    return group


def _listed(seats: Sequence[int]) -> str:
    return ", ".join(map(str, seats)) or "none"
