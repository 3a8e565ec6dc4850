"""One choice on its way from token ids to text: detokenized, cut at stop strings, never taken back.

Pure: what comes out depends only on the tokens and their order, not on how they were grouped. The text of
all deltas joined is therefore the same with and without streaming.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from ...common.errors import FastDeployError
from ...common.messages import Logprobs, TokenOutput
from ...common.request import FinishReason


class Detokenizer(Protocol):
    """Holds back the bytes of a character that is not complete yet."""

    def push(self, token_ids: Iterable[int]) -> str: ...

    def flush(self) -> str: ...


class Contradiction(FastDeployError):
    """Tokens of an earlier run are none that this run could have drawn."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What a client may see now, of one choice."""

    text: str
    #: Tokens whose text begins within the text delivered so far, and the stop token that ended it.
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    finish_reason: FinishReason | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.token_ids or self.finish_reason)


class ChoiceOutput:
    """The text of one choice, and how much of it has been handed out.

    Text that may turn out to be the beginning of a stop string is withheld until that is decided. A stop
    string counts from where `min_tokens` was reached; of several the one that is complete first wins.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        tells_stop_token: bool = False,
    ) -> None:
        """
        Args:
            tells_stop_token: return log probabilities of a stop token although the text does not show it.
        """
        self._detokenizer = detokenizer
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tells_stop_token = tells_stop_token
        self._text = ""
        self._released = 0
        #: Stop strings begin at or after this offset.
        self._stop_from = 0
        self._pending: list[_Token] = []
        #: Those drawn, whether shown or not: what usage counts.
        self.token_ids: list[int] = []
        #: So many of the last are to be drawn again: their log probabilities are wanted, and not known.
        self.num_repeated = 0
        self.finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def replay(self, token_ids: list[int], *, with_logprobs: bool) -> Delta:
        """Takes the tokens that another run has drawn, and handed out as far as it could; returns that part.

        What that run has held back is held back here, too. Its log probabilities are lost, so `with_logprobs`
        wants the last `num_repeated` tokens once more.

        Raises:
            Contradiction: they end the choice.
        """
        delta = self.push(TokenOutput("", token_ids))
        if self.finish_reason is not None:
            raise Contradiction("its tokens hold a stop string")
        if with_logprobs:
            self.num_repeated = len(self._pending)
        return delta

    def push(self, output: TokenOutput) -> Delta:
        """Takes what one step drew. Nothing may follow once `finish_reason` is set."""
        assert self.finish_reason is None, "a finished choice got more tokens"
        for index, token_id in enumerate(output.token_ids):
            is_stop_token = output.finish_reason is FinishReason.STOP and index == len(output.token_ids) - 1
            logprobs = output.logprobs[index] if output.logprobs else None
            hidden = is_stop_token and not self._include_stop
            # The text shows no stop token, so neither do its log probabilities.
            if hidden and not self._tells_stop_token:
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
        return self._finish(output.finish_reason)

    def _repeat(self, token_id: int, logprobs: Logprobs | None) -> None:
        place = len(self._pending) - self.num_repeated
        token = self._pending[place]
        if token.token_id != token_id:
            raise Contradiction(f"token {token.token_id} was drawn before, and token {token_id} now")
        self._pending[place] = replace(token, logprobs=logprobs)
        self.num_repeated -= 1

    def _append(self, piece: str) -> bool:
        """True when `piece` completes a stop string; the text and its tokens are cut there."""
        searched = len(self._text)
        self._text += piece
        if len(self.token_ids) <= self._min_tokens:
            self._stop_from = len(self._text)
            return False
        begin = max(self._stop_from, searched - self._longest + 1)
        found = [(at + len(stop), at) for stop in self._stop if (at := self._text.find(stop, begin)) >= 0]
        if not found:
            return False
        end, start = min(found)
        cut = end if self._include_stop else start
        self._text = self._text[:cut]
        self._pending = [token for token in self._pending if token.start < cut]
        return True

    def _num_withheld(self) -> int:
        """Length of the longest end of the text with which a stop string could begin."""
        open_text = self._text[max(self._released, self._stop_from) :]
        for size in range(min(self._longest - 1, len(open_text)), 0, -1):
            if any(stop.startswith(open_text[-size:]) for stop in self._stop):
                return size
        return 0

    def _release(self, end: int) -> Delta:
        # A token without text of its own yet (part of a character) waits for the text that decides
        # whether it is shown; otherwise what a client sees would depend on the grouping.
        count = sum(token.start < end for token in self._pending)
        return self._hand_out(end, count, None)

    def _finish(self, reason: FinishReason) -> Delta:
        self.finish_reason = reason
        return self._hand_out(len(self._text), len(self._pending), reason)

    def _hand_out(self, end: int, count: int, reason: FinishReason | None) -> Delta:
        tokens, self._pending = self._pending[:count], self._pending[count:]
        text = self._text[self._released : end]
        self._released = end
        return Delta(
            text=text,
            token_ids=tuple(token.token_id for token in tokens),
            logprobs=tuple(token.logprobs for token in tokens if token.logprobs is not None),
            finish_reason=reason,
        )


@dataclass(frozen=True, slots=True)
class _Token:
    """A token that has not been handed out."""

    token_id: int
    #: Offset in the text where its own begins.
    start: int
    logprobs: Logprobs | None
