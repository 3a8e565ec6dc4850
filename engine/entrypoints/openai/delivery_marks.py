"""Marks of one response: the tokens that its events so far have covered. Format: common/resumption.py."""

from __future__ import annotations

from collections.abc import Sequence

from ...common.resumption import draft_lines, mark
from .output import ChoiceOutput, Delta

#: Approximate limit of tokens in one interim response; the router limits heads to 128 KiB. The rest is sent
#: with the next one.
_MAX_DRAFT_TOKENS = 8192


class DeliveryMarks:
    """Positions up to which the tokens of each choice have been marked.

    Args:
        outputs: one for each choice. Their present tokens count as marked.
        enabled: False if the router requests no marks; all methods then return b"".
    """

    def __init__(self, outputs: Sequence[ChoiceOutput], *, enabled: bool) -> None:
        self._outputs = outputs
        self._enabled = enabled
        self._num_marked = [output.num_tokens for output in outputs]
        #: Number of tokens before the last step of each finished choice.
        self._num_before_end: dict[int, int] = {}

    def finished(self, index: int, num_before_end: int) -> None:
        """Record that a choice has finished, and its number of tokens before the last step."""
        self._num_before_end[index] = num_before_end

    def opening(self, index: int) -> bytes:
        """Return the mark of an event that opens a choice and has no tokens."""
        return mark(index) if self._enabled else b""

    def event(self, index: int, delta: Delta) -> bytes:
        """Return the mark of the event that has this delta."""
        if not self._enabled:
            return b""
        token_ids = self._outputs[index].token_ids
        start, self._num_marked[index] = self._num_marked[index], len(token_ids)
        return mark(index, token_ids[start:], finished=delta.finish_reason is not None)

    def draft(self, created: int, response_id: str) -> bytes:
        """Return header lines with the tokens drawn since the last draft.

        The last step of a finished choice is left out: the replica that resumes the response draws it again,
        and so learns the finish reason.
        """
        if not self._enabled:
            return b""
        new: dict[int, list[int]] = {}
        room = _MAX_DRAFT_TOKENS
        for index, output in enumerate(self._outputs):
            start, end = self._num_marked[index], self._num_before_end.get(index, output.num_tokens)
            end = min(end, start + room)
            if end > start:
                room -= end - start
                self._num_marked[index] = end
                new[index] = output.token_ids[start:end]
        return draft_lines(created, response_id, new) if new else b""
