"""Joining an expert-parallel group."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError
from .group import ExpertGroup
from .layout import PROTOCOL_VERSION, GroupLayout
from .member import Member
from .membership import Membership, RankTaken, disagreement, planner
from .memory_file import SHARED_MEMORY, open_locked
from .options import GroupOptions, OnPlacement
from .processes import is_alive

_log = logging.getLogger(__name__)

#: Limit of the wait for the previous process of the rank to exit.
_TAKEOVER_SECONDS = 15.0
_TAKEOVER_POLL_SECONDS = 0.05


def join(
    options: GroupOptions,
    layout: GroupLayout,
    fingerprint: Mapping[str, Any],
    on_placement: OnPlacement,
    root: Path = SHARED_MEMORY,
) -> ExpertGroup:
    """Take a rank and return once it is a member and all others have adopted that.

    Args:
        fingerprint: what all ranks must have in common besides the layout.
        on_placement: called before each epoch with the experts of this rank.

    Raises:
        ConfigError: the ranks disagree, the rank is taken, or there is no shared memory.
    """
    deadline = time.monotonic() + _TAKEOVER_SECONDS
    while True:
        try:
            member = _register(options, layout, group_fingerprint(layout, fingerprint), on_placement, root)
            break
        except RankTaken:
            if time.monotonic() > deadline:
                raise
            time.sleep(_TAKEOVER_POLL_SECONDS)
    _log.info(
        "expert group %s: rank %d of %d; at most %d MB of %s for exchange buffers",
        *(options.name, options.rank, layout.num_ranks, -(-layout.rank_bytes >> 20), root),
    )
    member.wait_until_admitted()
    return ExpertGroup(member)


def _register(
    options: GroupOptions,
    layout: GroupLayout,
    fingerprint: Mapping[str, Any],
    on_placement: OnPlacement,
    root: Path,
) -> Member:
    with open_locked(options.name, layout, fingerprint, options.stall_kill, root) as memory:
        membership = Membership(memory, planner(layout.num_experts, options.redundant_experts))
        living = [(rank, slot.pid) for rank, slot in enumerate(memory.rank_slots) if is_alive(slot)]
        refusal = disagreement(options.rank, fingerprint, memory.read_fingerprint(), living)
        if refusal is not None:
            raise ConfigError(refusal)
        memory.allocate(options.rank)
        membership.register(options.rank, options.name)
        return Member(memory, membership, options, on_placement)


def group_fingerprint(layout: GroupLayout, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the complete fingerprint: protocol version, layout and `fingerprint`."""
    sizes = asdict(layout)
    # Protocol 2 has this name for it.
    sizes["num_seats"] = sizes.pop("num_ranks")
    return {"protocol": PROTOCOL_VERSION, **sizes, **fingerprint}
