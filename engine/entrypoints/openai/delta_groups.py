"""Deltas of a stream joined into fewer events."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from .output import Delta

_NOTHING = Delta("", (), ())


class DeltaGroups:
    """Joins the deltas of each choice until they have enough tokens or the choice ends.

    The first delta of a choice is sent at once. Later ones wait for tokens, which are counted as they are
    drawn, from the last event on. A resumed stream begins after an event, so it has the same groups.

    Args:
        begun: choices of which another replica has sent tokens.
    """

    def __init__(self, size: int, begun: Iterable[int] = ()) -> None:
        self._size = size
        self._waiting: defaultdict[int, list[Delta]] = defaultdict(list)
        #: Drawn tokens since the last event, by choice.
        self._counts: dict[int, int] = dict.fromkeys(begun, 0)

    def add(self, index: int, delta: Delta, num_drawn: int) -> Delta:
        """Add the delta of a step; return what to send now, or an empty delta.

        Args:
            num_drawn: tokens of the step; the text of some may still be withheld from the delta.
        """
        parts = self._waiting[index]
        if delta:
            parts.append(delta)
        self._counts[index] = self._counts.get(index, self._size) + num_drawn
        if not parts or (self._counts[index] < self._size and delta.finish_reason is None):
            return _NOTHING
        self._counts[index] = 0
        del self._waiting[index]
        return parts[0] if len(parts) == 1 else Delta.joined(parts)
