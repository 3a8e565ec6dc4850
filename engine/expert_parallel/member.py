"""One rank as a member of its expert-parallel group.

There is no coordinator. The kernel reports the death of a process (pidfd); the rank that notices it first
commits the group without the dead member (membership.py), and all adopt the new epoch. The remaining ranks
take over the experts of the dead one from the weight file, which all ranks have mapped.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

from ..custom_ops.expert_group import CHANGED, FAULTY, FULL, GOING, GroupShape, NativeGroup
from .layout import GroupLayout, RankSlotState, phase_name
from .membership import Membership, RankLost, Record
from .memory import Memory
from .memory_file import remove
from .options import GroupOptions, OnPlacement
from .peers import Peers

_log = logging.getLogger(__name__)

#: Time for which waits spin if every thread has its own CPU. This avoids two context switches.
_SPIN_SECONDS = 100e-6
_REBALANCE_SECONDS = 60.0
#: Interval at which a joining rank checks for a dead member that should have admitted it.
_JOIN_POLL_SECONDS = 0.2


class Member:
    """A rank's view of the group: the adopted epoch, and the means to change and recover it.

    Not thread-safe: it belongs to the compute thread.
    """

    def __init__(
        self, memory: Memory, membership: Membership, options: GroupOptions, on_placement: OnPlacement
    ) -> None:
        self.options = options
        self.rank = options.rank
        self.memory = memory
        self._membership = membership
        self._on_placement = on_placement
        self.native = NativeGroup(
            group_shape(memory.layout, options.rank),
            memory.address,
            memory.file,
            self._report_stall,
            options.stall_after,
            options.stall_kill,
        )
        #: The adopted record.
        self.record = Record(0, (), ())
        self.peers = Peers(memory, self.rank)
        #: Experts of this rank in each layer.
        self._experts: list[frozenset[int]] = [frozenset()] * memory.layout.num_layers
        self._rebalanced = time.monotonic()

    @property
    def is_member(self) -> bool:
        return self.rank in self.record.ranks

    @property
    def is_current(self) -> bool:
        """True if the adopted epoch is the newest one."""
        return self._membership.epoch == self.record.epoch

    @property
    def is_awaited(self) -> bool:
        """True if other ranks wait for this one to begin a step or to adopt an epoch."""
        if not self.is_current:
            return True
        begun = self.memory.rows[self.rank].begun
        epoch = self.record.epoch
        # A stamp of an older epoch counts as the beginning of this one.
        begun = begun if begun >> 40 == epoch else epoch << 40
        others = (self.memory.rows[rank].begun for rank in self.record.ranks)
        return any(other >> 40 == epoch and other > begun for other in others)

    def wait_until_admitted(self) -> None:
        """Return once this rank is a member and all members have adopted that epoch."""
        self._wake_all()
        while not self.is_member:
            with self.memory.locked():
                dead = self._membership.remove_dead()
                record = self._membership.read()
                # The first rank of a group admits itself.
                if not record.ranks:
                    record = self._membership.apply_requests()
            self._log_losses(dead)
            if self.rank in record.ranks:
                self.adopt_epoch()
            else:
                # Poll, because the rank that would admit this one may have died.
                self.peers.wait(_JOIN_POLL_SECONDS)
                self.peers.drain()

    def handle_wakeups(self) -> None:
        """Read the doorbell and remove dead members."""
        self.peers.ensure_doorbell()
        if self.peers.drain():
            with self.memory.locked():
                dead = self._membership.remove_dead()
            self._log_losses(dead)
            self._wake_all()

    def adopt_epoch(self) -> None:
        """Adopt the newest epoch and wait until all its members have.

        The lowest member first commits pending joins and leaves. This is between two of its steps, so that no
        step is lost.
        """
        while True:
            self._commit_pending()
            if self.is_current:
                return
            with self.memory.locked():
                record = self._membership.read()
            self._adopt(record)
            if not self.is_member:
                continue
            # The rank that committed the epoch may have died before it could wake the others.
            self.peers.wake(record.ranks)
            if self.native.arrive() != GOING:
                self.recover()

    def confirm(self) -> None:
        """Raise RankLost if the others have continued without this rank since the epoch was adopted."""
        if not self.is_current:
            with self.memory.locked():
                self._require_member(self._membership.read())

    def recover(self) -> None:
        """Commit an epoch after an interrupted collective: without dead or faulty ranks, or to repeat a step.

        Raises:
            RankLost: this rank is at fault, or cannot get memory.
        """
        status = self.native.status
        if status == FULL:
            raise RankLost(
                f"{self.memory.directory.parent} is full: {-(-self.native.missing_bytes >> 20)} MB more "
                "are needed for the results of this rank's experts; make it larger (docker: --shm-size)"
            )
        if status == CHANGED:
            return
        if status == FAULTY:
            self._expel(*self.native.fault)
            return
        with self.memory.locked():
            dead = self._membership.remove_dead()
            if not dead and status == GOING and self.is_current:
                # A local error: the other ranks wait for this one in the middle of the step.
                self._membership.restart_step()
        self._log_losses(dead)
        self._wake_all()

    def request_leave(self) -> None:
        """Request to leave; the lowest member commits it between two of its steps."""
        with self.memory.locked():
            self._membership.request(self.rank, RankSlotState.LEAVING)
        self._wake_all()

    def close(self) -> None:
        """Free the rank; the last one removes the group's files."""
        with self.memory.locked():
            if self._membership.release(self.rank):
                remove(self.memory)
        self.native.close()
        self.peers.close()

    def _commit_pending(self) -> None:
        if not self.record.ranks or self.record.ranks[0] != self.rank:
            return
        if self._membership.pending:
            with self.memory.locked():
                record = self._membership.apply_requests()
            _log.info("expert group %s: members change: ranks %s", self.options.name, _listed(record.ranks))
            self._wake_all()
        elif self.options.rebalance and time.monotonic() - self._rebalanced > _REBALANCE_SECONDS:
            self._rebalanced = time.monotonic()
            with self.memory.locked():
                changed = self._membership.rebalance()
            if changed:
                _log.info("expert group %s: experts are moved to balance their load", self.options.name)
                self._wake_all()

    def _adopt(self, record: Record) -> None:
        if self.is_member:
            self._require_member(record)
        before = self.record
        self.record = record
        self.peers.watch(record.ranks if self.is_member else ())
        if not self.is_member:
            return
        experts = [frozenset(placement.experts_of(self.rank)) for placement in record.placements]
        added = [new - old for new, old in zip(experts, self._experts, strict=True)]
        self._on_placement(experts, added)
        self._experts = experts
        expert_ranks = [
            sum(1 << replica.rank for replica in replicas)
            for placement in record.placements
            for replicas in placement.replicas
        ]
        spin = _SPIN_SECONDS if self.options.spin else 0.0
        self.native.set_members(record.epoch, record.bitmap, expert_ranks, self.peers.pidfds, spin)
        if record.ranks != before.ranks:
            _log.info(
                "expert group %s: epoch %d, ranks %s; this rank takes over %d experts",
                *(self.options.name, record.epoch, _listed(record.ranks), sum(map(len, added))),
            )

    def _require_member(self, record: Record) -> None:
        slot = self.memory.rank_slots[self.rank]
        # Another process may have taken the rank.
        if slot.pid == os.getpid() and (self.rank in record.ranks or slot.state == RankSlotState.LEAVING):
            return
        raise RankLost(
            f"the expert group has continued without rank {self.rank}: this process was stopped too long, "
            "or another rank found faulty data in its part of the memory; see the logs of the other ranks"
        )

    def _expel(self, rank: int, fault: str) -> None:
        """Continue without a rank whose part of the memory is faulty."""
        what = f"{fault} is out of range in its part of the shared memory"
        if rank == self.rank:
            raise RankLost(f"faulty data that this rank wrote for the expert group: {what}")
        with self.memory.locked():
            pid = self.memory.rank_slots[rank].pid
            # False if another rank has already committed.
            is_first = self.is_current
            if is_first:
                self._membership.expel(rank)
        if is_first:
            _log.error(
                "expert group %s: rank %d (pid %d) is removed: %s; the others continue",
                *(self.options.name, rank, pid, what),
            )
            # It may sleep, and `_wake_all` no longer includes it.
            self.peers.wake([rank])
        self._wake_all()

    def _wake_all(self) -> None:
        """Wake ranks in a collective and ranks that sleep, after a commit or a request."""
        self.native.wake_waiters()
        self.peers.wake_all()

    def _log_losses(self, dead: Sequence[tuple[int, int]]) -> None:
        for rank, pid in dead:
            _log.warning(
                "expert group %s: rank %d (pid %d) has died; the others continue",
                self.options.name,
                rank,
                pid,
            )

    def _report_stall(self, rank: int, seconds: float, killed: bool) -> None:
        # daemon/diagnosis/exit_diagnosis.py searches for this line.
        row = self.memory.rows[rank]
        _log.warning(
            "expert group %s: rank %d (pid %d) has made no progress for %.1f s (%s, layer %d)%s",
            *(self.options.name, rank, self.memory.rank_slots[rank].pid, seconds),
            *(phase_name(row.phase), row.layer, "; it is killed" if killed else ""),
        )


def group_shape(layout: GroupLayout, rank: int) -> GroupShape:
    """Return the layout for the compiled side, with values in the order of its fields."""
    return GroupShape(
        rank,
        layout.num_ranks,
        layout.num_layers,
        layout.num_experts,
        layout.max_tokens,
        layout.k,
        layout.hidden,
        layout.words,
        layout.first_rank_offset,
        layout.rank_bytes,
        layout.expert_token_counts,
        layout.dispatch_targets,
        layout.return_slots,
        layout.tokens,
        layout.results,
    )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) or "none"
