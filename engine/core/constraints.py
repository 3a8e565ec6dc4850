"""The tokens that a sequence may draw next, by grammar, allowed ids, bad words and `min_tokens`."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..common.errors import GrammarFailed
from ..common.request import SamplingParams

if TYPE_CHECKING:
    from ..grammar.matchers import Matcher

Ids = NDArray[np.int64]
_NO_IDS: Ids = np.zeros(0, np.int64)
#: Tokens of an entry of a mask, and its words.
_ENTRY_TOKENS, _ENTRY_WORDS = 64, 2


class Constraint:
    """The constraints of one sequence. They depend only on its parameters and tokens."""

    def __init__(self, params: SamplingParams, vocab_size: int, matcher: Matcher | None) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self.matcher = matcher
        self._stops = _known(params.stop_token_ids, vocab_size)
        # With ignore_eos, only a grammar that allows nothing else ends a text.
        ignored = [each for each in params.end_token_ids if each not in params.stop_token_ids]
        self._ignored_ends = _known(ignored, vocab_size)
        self._bad_words = [word for word in params.bad_words if word]
        self._allowed: NDArray[np.uint32] | None = None
        if params.allowed_token_ids:
            self._allowed = np.zeros(num_words(vocab_size), np.uint32)
            _set(self._allowed, _known(params.allowed_token_ids, vocab_size))

    @property
    def has_mask(self) -> bool:
        return self.matcher is not None or self._allowed is not None

    def is_settled(self, num_outputs: int) -> bool:
        """Return True if the ids that may follow stay the same from this number of output tokens on."""
        are_stops_hidden = len(self._stops) > 0 and num_outputs < self._params.min_tokens
        return self.matcher is None and not self._bad_words and not are_stops_hidden

    def forbidden(self, outputs: Many[int]) -> Ids:
        """Return the ids that must not follow, for a sequence without a mask.

        Raises:
            GrammarFailed: no token is left.
        """
        ids = np.concatenate([self._hidden_stops(outputs), self._bad_ends(outputs)])
        if len(ids) >= self._vocab_size and len(np.unique(ids)) >= self._vocab_size:
            raise GrammarFailed("bad_words and min_tokens leave no token that may follow")
        return ids

    def mask(self, outputs: Many[int], grammar_mask: NDArray[np.uint32] | None) -> NDArray[np.uint32]:
        """Return the bits of the ids that may follow.

        Args:
            grammar_mask: what the matcher allows; it may be modified.

        Raises:
            GrammarFailed: no token is left.
        """
        if self.matcher is not None:
            self.matcher.require_sound()
        mask = grammar_mask if grammar_mask is not None else self._all_allowed()
        if self._allowed is not None and grammar_mask is not None:
            mask &= self._allowed
        _clear(mask, self._bad_ends(outputs))
        if not mask.any():
            raise GrammarFailed("no token may follow: grammar, allowed_token_ids and bad_words exclude all")
        rest = mask.copy()
        _clear(rest, self._hidden_stops(outputs))
        _clear(rest, self._ignored_ends)
        if rest.any():
            return rest
        if self.matcher is None:
            raise GrammarFailed("allowed_token_ids and min_tokens leave no token that may follow")
        return mask

    def _all_allowed(self) -> NDArray[np.uint32]:
        assert self._allowed is not None, "without a grammar, there are allowed ids"
        return self._allowed.copy()

    def _hidden_stops(self, outputs: Many[int]) -> Ids:
        return self._stops if len(outputs) < self._params.min_tokens else _NO_IDS

    def _bad_ends(self, outputs: Many[int]) -> Ids:
        """Return the last id of each bad word whose other ids are the end of the output."""
        ends = [
            word[-1]
            for word in self._bad_words
            if len(word) == 1 or tuple(outputs[1 - len(word) :]) == word[:-1]
        ]
        return _known(ends, self._vocab_size) if ends else _NO_IDS


def num_words(vocab_size: int) -> int:
    """Return the 32-bit words of a mask: whole entries of the sampling operation."""
    return -(-vocab_size // _ENTRY_TOKENS) * _ENTRY_WORDS


def _known(ids: Many[int], vocab_size: int) -> Ids:
    # Ids outside of the vocabulary can never be drawn.
    return np.array([each for each in ids if 0 <= each < vocab_size], np.int64)


def _set(mask: NDArray[np.uint32], ids: Ids) -> None:
    np.bitwise_or.at(mask, ids // 32, _bits(ids))


def _clear(mask: NDArray[np.uint32], ids: Ids) -> None:
    if len(ids):
        np.bitwise_and.at(mask, ids // 32, ~_bits(ids))


def _bits(ids: Ids) -> NDArray[np.uint32]:
    return np.left_shift(np.uint32(1), (ids % 32).astype(np.uint32))
