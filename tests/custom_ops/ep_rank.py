"""A rank of an expert-parallel group without an engine, driven by the commands of `test_expert_group`.

Commands and answers are JSON. The rank writes what it saw in its steps to a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import paddle

from fastdeploy import custom_ops
from fastdeploy.common.process_control import die_with_parent
from fastdeploy.custom_ops import packed_matrix
from fastdeploy.expert_parallel import member
from fastdeploy.expert_parallel.group import ExpertGroup
from fastdeploy.expert_parallel.join import join
from fastdeploy.expert_parallel.membership import RankLost
from fastdeploy.expert_parallel.options import GroupOptions

from .collectives import HIDDEN, Plan, Seen, Share, computed, draw_tokens, layout, mapped

#: Points of a collective at which a rank can be stopped or killed.
PLACES = ("before it sends", "sent", "received", "returned", "added up")


@dataclass
class Rank:
    group: ExpertGroup
    seed: int
    #: Receives the records of each finished step.
    file: BinaryIO | None = None
    #: (step number, place, signal): sent to itself on first reaching the place in that step or a later one.
    trap: tuple[int, str, int] | None = None
    number: int = 0

    def __post_init__(self) -> None:
        self._row = mapped(self.group.options.name).rows[self.group.rank]

    @property
    def is_wanted(self) -> bool:
        return self.group.awake or self.group.is_awaited

    def step(self, tokens: int) -> None:
        seen = self.group.run_step(tokens, lambda: self._compute(tokens))
        if seen and self.file is not None:
            pickle.dump(seen, self.file)

    def drawn_step(self) -> None:
        self.number += 1
        self.step(draw_tokens(self.seed, self._row.begun, self.group.rank, self.number))

    def execute_dummy_step(self) -> None:
        """Join a step without tokens if one is wanted, like the worker."""
        self.group.handle_wakeups()
        if self.is_wanted:
            self.step(0)

    def wait_for(self, members: int) -> None:
        while len(self.group.status().active_ranks) < members:
            if not self.is_wanted:
                self.group.wakeups.poll()
            self.execute_dummy_step()

    def leave(self) -> None:
        self.group.request_leave()
        while self.group.is_member:
            if not self.is_wanted:
                self.group.wakeups.poll(0.1)
            self.execute_dummy_step()
        self.group.close()

    def _compute(self, tokens: int) -> list[Seen]:
        stamp = self._row.begun
        plan = Plan.draw(self.seed, stamp)
        try:
            return [
                self._collective(stamp, index, layer, tokens if index == 0 else min(tokens, index), plan.wide)
                for index, layer in enumerate(plan.layers)
            ]
        except RuntimeError:
            # The operation raised it, and cannot say whether the step has to restart.
            self.group.check()
            raise

    def _collective(self, stamp: int, index: int, layer: int, tokens: int, wide: bool) -> Seen:
        group, seat = self.group.handle, self.group.rank
        members = tuple(self.group.status().active_ranks)
        share = Share.draw(self.seed, stamp, index, seat, tokens, wide)
        self._come_to("before it sends")
        dispatch_targets = custom_ops.ep_dispatch_send(
            sent(share.x, wide), paddle.to_tensor(share.topk_ids), group, layer
        )
        self._come_to("sent")
        like = sent(np.empty((0, HIDDEN), np.float32), wide)
        rows, offsets, source_token_index = custom_ops.ep_dispatch_receive(like, group, layer)
        self._come_to("received")
        rows, offsets = plain(rows), offsets.numpy()
        custom_ops.ep_combine_send(sent(computed(rows, offsets, layer, wide), wide), group)
        self._come_to("returned")
        sums = custom_ops.ep_combine_receive(paddle.to_tensor(share.weights), like, group)
        self._come_to("added up")
        self.group.check()
        results = (dispatch_targets.numpy(), rows, offsets, source_token_index.numpy(), sums.numpy())
        return Seen(stamp, index, layer, seat, members, wide, *results)

    def _come_to(self, place: str) -> None:
        if self.trap is not None and self.trap[0] <= self.number and self.trap[1] == place:
            number = self.trap[2]
            self.trap = None
            os.kill(os.getpid(), number)


def sent(values: np.ndarray, wide: bool) -> paddle.Tensor:
    # Paddle reads uint16 as bfloat16.
    return paddle.to_tensor(values if wide else packed_matrix.to_bfloat16(values))


def plain(tensor: paddle.Tensor) -> np.ndarray:
    values = tensor.numpy()
    return values if values.dtype == np.float32 else packed_matrix.from_bfloat16(values)


# ---- commands


def steps(
    link: socket.socket,
    *,
    name: str,
    seat: int,
    num_seats: int,
    seed: int,
    file: str,
    lives: list[int | None],
    together: int = 0,
    redundant: int = 0,
    rebalance: bool = False,
    trap: tuple[int, str, int] | None = None,
) -> int:
    """Join, run a number of steps and leave, once for each entry of `lives`.

    Returns the number of restarted steps.

    Args:
        lives: steps of each membership; None runs until the order "enough".
        together: start once the group has this many members.
        rebalance: move experts by load many times a second.
    """
    member._REBALANCE_SECONDS = 0.02
    restarted = number = 0
    # Unbuffered: the process may be killed.
    with open(file, "wb", buffering=0) as seen:
        for count in lives:
            options = GroupOptions(name, seat, redundant_experts=redundant, rebalance=rebalance)
            rank = joined(options, num_seats, seed)
            rank.file, rank.number, rank.trap = seen, number, trap and (trap[0], trap[1], trap[2])
            try:
                rank.wait_for(together)
                if count is None:
                    while orders(link) != ["enough"]:
                        rank.drawn_step()
                for _ in range(count or 0):
                    rank.drawn_step()
                restarted += rank.group.status().restarted_steps_total
                rank.leave()
            except RankLost:
                rank.group.close()
                raise
            number = rank.number
    return restarted


def serve(link: socket.socket, *, name: str, seat: int, num_seats: int, seed: int) -> int:
    """Sleep until a token arrives, like the worker, and answer when it is computed.

    The answer to `end` is the number of steps that the rank took part in.
    """
    options = GroupOptions(name, seat)
    rank, tokens, left = joined(options, num_seats, seed), 0, list[str]()
    answer(link, "joined")
    poller = select.epoll()
    poller.register(link, select.EPOLLIN)
    poller.register(rank.group.wakeups, select.EPOLLIN)
    while True:
        if not tokens and not left and not rank.is_wanted:
            poller.poll()
        for order in orders(link):
            if order == "token":
                tokens += 1
            else:
                left.append(order)
        if tokens:
            rank.step(1)
            tokens -= 1
            answer(link, "done")
        elif not left:
            rank.execute_dummy_step()
        elif left[0] == "close":
            # The rank neither leaves the group nor ends.
            rank.group.close()
            return 0
        else:
            poller.unregister(rank.group.wakeups)
            steps = rank.group.status().steps_total
            rank.leave()
            if left.pop(0) == "end":
                return steps
            rank = joined(options, num_seats, seed)
            poller.register(rank.group.wakeups, select.EPOLLIN)
            answer(link, "joined")


def orders(link: socket.socket) -> list[str]:
    """Return the orders that have arrived."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(link.recv(64, socket.MSG_DONTWAIT).decode())
    return found


def joined(options: GroupOptions, num_seats: int, seed: int) -> Rank:
    return Rank(join(options, layout(num_seats), {}, lambda mine, taken: None), seed)


COMMANDS: dict[str, Callable[..., Any]] = {"steps": steps, "serve": serve}


def answer(link: socket.socket, what: Any) -> None:
    link.send(json.dumps({"answer": what}).encode())


def execute_commands(link: socket.socket) -> None:
    """Execute the commands that arrive on the socket until it is closed."""
    die_with_parent(os.getppid())
    paddle.set_device("cpu")
    answer(link, "ready")
    while message := link.recv(1 << 16):
        command = json.loads(message)
        try:
            answer(link, COMMANDS[command.pop("do")](link, **command))
        except Exception as error:
            traceback.print_exc()
            link.send(json.dumps({"error": type(error).__name__, "said": str(error)}).encode())
