"""Text of one choice from its token ids: detokenized, cut at stop strings, never retracted.

Pure: the output depends only on the tokens and their order, not on how they were grouped. The joined text of
all deltas is therefore the same with and without streaming.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from ...common.errors import FastDeployError
from ...common.messages import Logprobs, TokenOutput
from ...common.request import FinishReason


class Detokenizer(Protocol):
    """Incremental decoder; withholds the bytes of an incomplete character."""

    def push(self, token_ids: Iterable[int]) -> str: ...

    def flush(self) -> str: ...


class ReplayMismatch(FastDeployError):
    """Tokens of an earlier run could not have been drawn in this run."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of one choice that may be sent to the client."""

    text: str
    #: Tokens whose text begins within the text delivered so far, and a final stop token.
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    finish_reason: FinishReason | None = None
    #: The stop string or stop token of the request that has ended the choice.
    stop_reason: str | int | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.token_ids or self.finish_reason)

    @classmethod
    def joined(cls, deltas: Iterable[Delta]) -> Delta:
        """Return consecutive deltas of a choice as one."""
        deltas = list(deltas)
        return cls(
            text="".join(each.text for each in deltas),
            token_ids=tuple(token_id for each in deltas for token_id in each.token_ids),
            logprobs=tuple(entry for each in deltas for entry in each.logprobs),
            finish_reason=deltas[-1].finish_reason if deltas else None,
            stop_reason=deltas[-1].stop_reason if deltas else None,
        )


class ChoiceOutput:
    """Text of one choice, and how much of it has been emitted.

    Text that could be the beginning of a stop string is withheld until that is decided. Stop strings count
    from where `min_tokens` was reached; the first complete one ends the choice.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        stop_token_ids: tuple[int, ...] = (),
        stop_token_logprobs: bool = False,
    ) -> None:
        """
        Args:
            stop: stop strings.
            include_stop: keep a stop string or stop token in the text.
            min_tokens: number of tokens before which stop strings have no effect.
            stop_token_ids: those that the request names.
            stop_token_logprobs: return log probabilities of a stop token although the text omits it.
        """
        self._detokenizer = detokenizer
        self._stop = stop
        self._max_stop_length = max(map(len, stop), default=0)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self._stop_token_logprobs = stop_token_logprobs
        self._text = ""
        #: Length of the text that has been emitted.
        self._released = 0
        #: Stop strings begin at or after this offset.
        self._stop_from = 0
        self._pending: list[_Token] = []
        #: All drawn tokens, shown or not; `usage` counts them.
        self.token_ids: list[int] = []
        #: Number of last tokens to be drawn again, because their log probabilities are requested but unknown.
        self.num_repeated = 0
        self.finish_reason: FinishReason | None = None
        self._stop_reason: str | int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def replay(self, token_ids: list[int], *, with_logprobs: bool) -> list[Delta]:
        """Continue after tokens that another run has drawn. Return the deltas that it has emitted.

        Text that the other run withheld is withheld here too.

        Args:
            with_logprobs: log probabilities are requested. Those of withheld tokens were lost with the other
                run, so the last `num_repeated` tokens have to be drawn again.

        Raises:
            ReplayMismatch: a stop string in these tokens ends the choice.
        """
        deltas = []
        for token_id in token_ids:
            # One at a time, as they were drawn.
            if delta := self.push(TokenOutput("", [token_id])):
                deltas.append(delta)
            if self.finish_reason is not None:
                raise ReplayMismatch("its tokens contain a stop string")
        if with_logprobs:
            self.num_repeated = len(self._pending)
        return deltas

    def push(self, output: TokenOutput) -> Delta:
        """Add the output of one step. Do not call this again once `finish_reason` is set."""
        assert self.finish_reason is None, "a finished choice got more tokens"
        for index, token_id in enumerate(output.token_ids):
            is_stop_token = output.finish_reason is FinishReason.STOP and index == len(output.token_ids) - 1
            logprobs = output.logprobs[index] if output.logprobs else None
            hidden = is_stop_token and not self._include_stop
            # The text omits a stop token, so the log probabilities do too.
            if hidden and not self._stop_token_logprobs:
                logprobs = None
            if self.num_repeated:
                self._repeat(token_id, logprobs)
                continue
            self._pending.append(_Token(token_id, len(self._text), logprobs))
            self.token_ids.append(token_id)
            if not hidden and self._append(self._detokenizer.push((token_id,))):
                return self._finish(FinishReason.STOP)
        if output.finish_reason is None:
            return self._release(len(self._text) - self._num_withheld())
        if self._append(self._detokenizer.flush()):
            return self._finish(FinishReason.STOP)
        if output.finish_reason is FinishReason.STOP and self.token_ids[-1] in self._stop_token_ids:
            self._stop_reason = self.token_ids[-1]
        return self._finish(output.finish_reason)

    def _repeat(self, token_id: int, logprobs: Logprobs | None) -> None:
        place = len(self._pending) - self.num_repeated
        token = self._pending[place]
        if token.token_id != token_id:
            raise ReplayMismatch(f"token {token.token_id} was drawn before, and token {token_id} now")
        self._pending[place] = replace(token, logprobs=logprobs)
        self.num_repeated -= 1

    def _append(self, piece: str) -> bool:
        """Append text. Return True if it completes a stop string; text and tokens are then cut there."""
        searched = len(self._text)
        self._text += piece
        if len(self.token_ids) <= self._min_tokens:
            self._stop_from = len(self._text)
            return False
        begin = max(self._stop_from, searched - self._max_stop_length + 1)
        found = [
            (at + len(stop), at, stop) for stop in self._stop if (at := self._text.find(stop, begin)) >= 0
        ]
        if not found:
            return False
        end, start, self._stop_reason = min(found)
        cut = end if self._include_stop else start
        self._text = self._text[:cut]
        self._pending = [token for token in self._pending if token.start < cut]
        return True

    def _num_withheld(self) -> int:
        """Return the length of the longest suffix that could begin a stop string."""
        open_text = self._text[max(self._released, self._stop_from) :]
        for size in range(min(self._max_stop_length - 1, len(open_text)), 0, -1):
            if any(stop.startswith(open_text[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, end: int) -> Delta:
        # A token inside an incomplete character is withheld until the character is complete, because the
        # character may belong to a stop string. Otherwise the output would depend on the grouping.
        count = sum(token.start < end for token in self._pending)
        return self._emit(end, count, None)

    def _finish(self, reason: FinishReason) -> Delta:
        self.finish_reason = reason
        return self._emit(len(self._text), len(self._pending), reason)

    def _emit(self, end: int, count: int, reason: FinishReason | None) -> Delta:
        tokens, self._pending = self._pending[:count], self._pending[count:]
        text = self._text[self._released : end]
        self._released = end
        return Delta(
            text=text,
            token_ids=tuple(token.token_id for token in tokens),
            logprobs=tuple(token.logprobs for token in tokens if token.logprobs is not None),
            finish_reason=reason,
            stop_reason=self._stop_reason,
        )


@dataclass(frozen=True, slots=True)
class _Token:
    """A token that has not been emitted."""

    token_id: int
    #: Offset of its text in the choice's text.
    start: int
    logprobs: Logprobs | None
