"""Steps of an expert-parallel group, as one of its ranks runs them.

A step is a transaction. If a member dies or the members change during a step, all ranks discard the step and
repeat it: none of it was visible, and all state of a request is on its own rank.

A group without work sleeps. A rank that gets work announces a step and wakes all others through their
doorbells (peers.py).
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ..common.errors import FastDeployError
from ..common.messages import ExpertParallelStats
from ..custom_ops.expert_group import GOING, NativeGroup
from .member import Member
from .membership import RankLost
from .options import GroupOptions

T = TypeVar("T")


class GroupChanged(FastDeployError):
    """The step cannot be finished, because members have joined, left or died. It has to be repeated."""


class ExpertGroup:
    """A rank in its group. `join.join` returns one; `close` ends it.

    Not thread-safe: it belongs to the compute thread.
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        self._native = member.native
        #: Epoch in which the last step had work; None if it had none.
        self._busy_epoch: int | None = None
        self._restarted_steps = self._steps = 0
        self._step_seconds = 0.0
        self._began = time.monotonic()

    @property
    def options(self) -> GroupOptions:
        return self._member.options

    @property
    def rank(self) -> int:
        return self._member.rank

    @property
    def handle(self) -> int:
        """Handle of the native group, for the operations `ep_*`."""
        return self._native.handle

    @property
    def native(self) -> NativeGroup:
        return self._native

    @property
    def wakeups(self) -> select.epoll:
        """An epoll that is readable when `handle_wakeups` has something to do."""
        return self._member.peers.wakeups

    @property
    def is_member(self) -> bool:
        return self._member.is_member

    @property
    def is_awaited(self) -> bool:
        """True if other ranks wait for this one to begin a step or to adopt an epoch."""
        return self._member.is_awaited

    @property
    def awake(self) -> bool:
        """True if the last step had work, so that the next one follows without wake-ups."""
        return self._busy_epoch == self._member.record.epoch

    # ---- steps

    def run_step(self, tokens: int, compute: Callable[[], T]) -> T | None:
        """Run `compute` as this rank's part of a step, and repeat it if the step has to be repeated.

        On return all ranks have begun the step, `compute` has passed all layers, and this rank has stayed a
        member.

        Args:
            tokens: number of this rank's tokens in the step; `compute` passes no more to any operation.
            compute: calls `check` after each layer. It is called again if `check` or an operation has raised
                because the members have changed.

        Returns:
            The result of `compute`; None if no rank has tokens, because there is no step then.

        Raises:
            RankLost: the others have continued without this rank, or it cannot get the memory that it needs.
        """
        while self._begin(tokens):
            try:
                result = compute()
                self._finish()
                return result
            except RankLost:
                raise
            except Exception:
                # An operation may notice a change before `check` does. Any other exception is an error of
                # this rank, while the others wait for it in the middle of the step.
                is_local = self._native.status == GOING
                self._member.recover()
                if is_local:
                    raise
                self._restarted_steps += 1
        return None

    def check(self) -> None:
        """Raise GroupChanged if the step cannot be finished. Call this after each layer."""
        if self._native.status != GOING:
            raise GroupChanged("the members of the expert group have changed")

    def _begin(self, tokens: int) -> bool:
        """Return True once all ranks have begun the step, False if no rank has tokens."""
        while True:
            self._member.adopt_epoch()
            if not self.is_member:
                if tokens:
                    raise RankLost(f"rank {self.rank} has left the expert group, but still has work")
                return False
            # The first rank to begin, with or without tokens, wakes those that sleep.
            is_first = not self.awake and not self.is_awaited
            self._native.announce(tokens)
            if is_first or (tokens and not self.awake):
                self._member.peers.wake(self._member.record.ranks)
            if self._native.begin() == GOING:
                busy = self._native.busy
                self._busy_epoch = self._member.record.epoch if busy else None
                self._began = time.monotonic()
                return busy
            self._member.recover()

    def _finish(self) -> None:
        """Confirm the step after its last layer, before its results become visible."""
        self._steps += 1
        self._step_seconds += time.monotonic() - self._began
        # A rank that was stopped for long may have read data of later steps.
        self._member.confirm()

    # ---- between steps

    def handle_wakeups(self) -> None:
        """Read wake-ups, remove dead members and adopt the newest epoch, when `wakeups` is readable."""
        self._member.handle_wakeups()
        self._member.adopt_epoch()

    def request_leave(self) -> None:
        """Ask to leave. Keep taking part until `is_member` is False, which happens between two steps."""
        self._member.request_leave()

    def close(self) -> None:
        """Free the rank. If it is still a member, the others treat it as lost."""
        self._member.close()

    def status(self) -> ExpertParallelStats:
        """Return the members and the counters of the group."""
        memory, record = self._member.memory, self._member.record
        header, counters = memory.header, self._native.counters
        return ExpertParallelStats(
            epoch=record.epoch,
            active_ranks=list(record.ranks),
            joins_total=header.joins,
            leaves_total=header.leaves,
            losses_total=header.losses,
            restarted_steps_total=self._restarted_steps,
            steps_total=self._steps,
            step_seconds_total=self._step_seconds,
            bytes_dispatched_total=counters.bytes_dispatched,
            bytes_combined_total=counters.bytes_combined,
            waited_seconds_total=[ns * 1e-9 for ns in counters.waited_ns[: memory.layout.num_ranks]],
            expert_tokens_total=self._expert_token_counts(),
        )

    def _expert_token_counts(self) -> list[int]:
        """Return the tokens that this rank has computed with each expert, summed over all layers."""
        memory = self._member.memory
        layout = memory.layout
        counts = np.frombuffer(
            memory.pages,
            np.uint64,
            layout.num_layers * layout.num_experts,
            layout.rank_offset(self.rank) + layout.expert_token_counts,
        )
        return counts.reshape(layout.num_layers, layout.num_experts).sum(axis=0).tolist()
