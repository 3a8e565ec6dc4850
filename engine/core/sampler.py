"""Samples tokens from logits.

The order is that of vLLM: bias, repetition penalty, frequency and presence penalty, masks (grammar, allowed
ids, bad words, stop tokens until `min_tokens`), then (unless greedy) temperature, min_p, top_k, top_p, and a
draw. One operation does all this for the whole batch (custom_ops/include/sample.h); this module prepares its
arguments and reads its results, on any device.

Rows are independent, and their random numbers depend only on seed, choice and position. A text therefore does
not depend on the other texts in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from .. import custom_ops
from ..common.errors import GrammarFailed
from ..common.messages import Logprobs
from ..common.request import SamplingParams, ScheduledSequence, Sequence
from ..device.draws import Draw, Drawn, draw_from
from .constraints import Constraint, num_words
from .token_counts import TokenCounts

if TYPE_CHECKING:
    from ..grammar.matchers import Grammars, Matcher

_MAX_INT32 = 2**31 - 1


class Sampled(NamedTuple):
    token_id: int
    logprobs: Logprobs | None
    #: Why no token could be drawn; the other fields mean nothing then.
    error: str | None = None


class Sampler:
    """Caches the sampling state of each live sequence.

    The state depends only on parameters and tokens, so preemption and failed steps do not affect it.
    """

    def __init__(self, vocab_size: int, grammars: Grammars | None = None) -> None:
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._recipes: WeakKeyDictionary[Sequence, _Recipe] = WeakKeyDictionary()

    def draws_ahead(self, sequence: Sequence) -> bool:
        """Return True if a draw can be prepared before the token before it is known."""
        return self._recipe(sequence).draws_ahead(len(sequence.output_token_ids))

    def draw(self, sequences: Many[Sequence], *, ahead: bool = False) -> Draw:
        """Return the draw of the next token of each of at least one sequence.

        Args:
            ahead: draw the next but one token instead; `draws_ahead` must be true for each sequence.
        """
        recipes = [self._recipe(sequence) for sequence in sequences]
        if all(recipe.is_argmax for recipe in recipes):
            return Draw(len(sequences))
        entries, failed = self._entries(recipes, sequences)
        rows, tokens = _stack(recipes, entries)
        rows["position"] = [sequence.num_tokens + ahead for sequence in sequences]
        return Draw(len(sequences), rows, tokens, failed)

    def sampled(self, draw: Draw, drawn: Drawn, sequences: Many[Sequence]) -> list[Sampled]:
        """Return what `draw` has drawn.

        Raises:
            FloatingPointError: a row of the logits holds NaN or no finite value.
        """
        token_ids = drawn.token_ids
        _check(token_ids, sequences)
        sampled = [Sampled(token_id, None) for token_id in token_ids]
        if draw.rows is None or drawn.top_tokens is None or drawn.logprobs is None:
            return _with_failures(sampled, draw)
        for index in np.flatnonzero(draw.rows["logprobs"] >= 0).tolist():
            end = 1 + min(int(draw.rows["logprobs"][index]), drawn.vocab_size)
            ids, values = drawn.top_tokens[index, :end].tolist(), drawn.logprobs[index, :end].tolist()
            sampled[index] = Sampled(token_ids[index], _logprobs(ids, values))
        return _with_failures(sampled, draw)

    def scores(self, rows: Many[ScheduledSequence]) -> Draw:
        """Return the draw that scores prompt tokens, each from the logits of the preceding position.

        Args:
            rows: the rows of a batch that have scored positions.
        """
        given = [i for row in rows for i in row.sequence.token_ids(row.scored.start + 1, row.scored.stop + 1)]
        wanted = np.zeros(len(given), custom_ops.SAMPLING_ROW)
        wanted["given"] = np.array(given) + 1
        wanted["logprobs"] = [owner.params.prompt_logprobs for owner in _owners(rows)]
        return Draw(len(given), wanted, np.zeros((1, 2), np.int32))

    def scored(self, draw: Draw, drawn: Drawn, rows: Many[ScheduledSequence]) -> list[Logprobs]:
        """Return the log probabilities of the prompt tokens that `draw` has scored.

        Raises:
            FloatingPointError: a row of the logits holds NaN or no finite value.
        """
        _check(drawn.token_ids, _owners(rows))
        assert draw.rows is not None
        assert drawn.top_tokens is not None
        assert drawn.logprobs is not None
        ends = 1 + np.minimum(draw.rows["logprobs"], drawn.vocab_size)
        return [
            _logprobs(ids[:end], values[:end], rank)
            for end, ids, values, rank in zip(
                ends.tolist(),
                drawn.top_tokens.tolist(),
                drawn.logprobs.tolist(),
                drawn.token_ids,
                strict=True,
            )
        ]

    def sample(self, logits: Any, sequences: Many[Sequence]) -> list[Sampled]:
        """Draw the next token of each sequence from its row of a tensor float32 [rows, vocabulary].

        Raises:
            FloatingPointError: a row holds NaN or no finite value.
        """
        if not sequences:
            return []
        draw = self.draw(sequences)
        return self.sampled(draw, draw_from(logits, draw), sequences)

    def _recipe(self, sequence: Sequence) -> _Recipe:
        recipe = self._recipes.get(sequence)
        if recipe is None:
            recipe = self._recipes[sequence] = _Recipe(sequence, self._constraint(sequence.params))
        return recipe

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        has_stops = params.min_tokens > 0 and len(params.stop_token_ids) > 0
        if params.grammar is None:
            if not has_stops and not params.bad_words and not params.allowed_token_ids:
                return None
            return Constraint(params, self._vocab_size, None)
        assert self._grammars is not None, "the engine refuses grammars without a vocabulary"
        return Constraint(params, self._vocab_size, self._grammars.matcher(params.grammar))

    def _entries(
        self, recipes: Many[_Recipe], sequences: Many[Sequence]
    ) -> tuple[dict[int, _Entries], dict[int, str]]:
        """Return the tokens of each row that has some, and the rows that failed, with the reason.

        A row whose constraint leaves no token is drawn without it, and the result is replaced.
        """
        failed: dict[int, str] = {}
        indexes = [index for index, recipe in enumerate(recipes) if recipe.has_tokens]
        masks = self._grammar_masks(indexes, recipes, sequences, failed)
        entries = {}
        for index in indexes:
            if index not in failed:
                outputs = sequences[index].output_token_ids
                try:
                    entries[index] = recipes[index].entries(outputs, masks.get(index))
                except GrammarFailed as error:
                    failed[index] = str(error)
        return entries, failed

    def _grammar_masks(
        self,
        indexes: Many[int],
        recipes: Many[_Recipe],
        sequences: Many[Sequence],
        failed: dict[int, str],
    ) -> dict[int, NDArray[np.uint32]]:
        """Return the masks of grammars by row; add rows whose grammar fails to `failed`."""
        matchers: dict[int, Matcher] = {}
        for index in indexes:
            matcher = recipes[index].matcher
            if matcher is not None:
                try:
                    matcher.advance(sequences[index].output_token_ids)
                except GrammarFailed as error:
                    failed[index] = str(error)
                else:
                    matchers[index] = matcher
        if not matchers:
            return {}
        assert self._grammars is not None
        masks = self._grammars.masks(list(matchers.values()), num_words(self._vocab_size))
        return dict(zip(matchers, masks, strict=True))


class _Entries(NamedTuple):
    """The entries of one row in the tokens of a batch (see `custom_ops.sample`), each int32 [n, 2]."""

    seen: NDArray[np.int32]
    masked: NDArray[np.int32]
    biased: NDArray[np.int32]
    mask: NDArray[np.int32]


_NO_ENTRIES = np.zeros((0, 2), np.int32)


class _Recipe:
    """The sampling state of one sequence."""

    def __init__(self, sequence: Sequence, constraint: Constraint | None) -> None:
        params = sequence.params
        self._counts: TokenCounts | None = None
        if params.repetition_penalty != 1:
            self._counts = TokenCounts(sequence.prompt_token_ids)
        elif params.frequency_penalty != 0 or params.presence_penalty != 0:
            self._counts = TokenCounts(())
        self._constraint = constraint
        self._biased = _NO_ENTRIES
        if params.logit_bias:
            self._biased = np.array([(token_id, 0) for token_id, _ in params.logit_bias], np.int32)
            self._biased[:, 1] = np.array([bias for _, bias in params.logit_bias], np.float32).view(np.int32)
        #: True if the operation needs token counts, biases or masks, at least at the beginning.
        self.has_tokens = self._counts is not None or constraint is not None or len(self._biased) > 0
        self.is_argmax = params.temperature == 0 and not self.has_tokens and params.logprobs is None
        #: As bytes, because joining bytes is the fastest way to build the array of a batch.
        self.row = _row(params).tobytes()

    def draws_ahead(self, num_outputs: int) -> bool:
        """Return True if the entries of the row stay the same from this number of output tokens on."""
        if not self.has_tokens:
            return True
        is_settled = self._constraint is None or self._constraint.is_settled(num_outputs)
        return self._counts is None and is_settled

    @property
    def matcher(self) -> Matcher | None:
        return None if self._constraint is None else self._constraint.matcher

    def entries(self, outputs: list[int], grammar_mask: NDArray[np.uint32] | None) -> _Entries:
        """Return the entries of the row that follows these output tokens.

        Raises:
            GrammarFailed: no token may follow.
        """
        seen = _NO_ENTRIES if self._counts is None else self._counts.after(outputs)
        constraint = self._constraint
        masked = mask = _NO_ENTRIES
        if constraint is not None and constraint.has_mask:
            mask = constraint.mask(outputs, grammar_mask).view(np.int32).reshape(-1, 2)
        elif constraint is not None:
            forbidden = constraint.forbidden(outputs)
            masked = np.zeros((len(forbidden), 2), np.int32)
            masked[:, 0] = forbidden
        return _Entries(seen, masked, self._biased, mask)


def _row(params: SamplingParams) -> np.ndarray:
    row = np.zeros(1, dtype=custom_ops.SAMPLING_ROW)
    for name in ("temperature", "top_p", "min_p", "choice"):
        row[name] = getattr(params, name)
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        row[name] = getattr(params, name)
    # Negative seeds are taken modulo 2**64.
    row["seed"] = params.seed % 2**64
    row["top_k"] = min(params.top_k, _MAX_INT32)
    row["logprobs"] = -1 if params.logprobs is None else params.logprobs
    return row


def _stack(recipes: Many[_Recipe], entries: dict[int, _Entries]) -> tuple[np.ndarray, NDArray[np.int32]]:
    """Return the rows of a batch, without positions, and the concatenated tokens that they refer to."""
    rows = np.frombuffer(bytearray().join([recipe.row for recipe in recipes]), custom_ops.SAMPLING_ROW)
    # One pair that no row uses: Paddle does not accept an empty array.
    parts = [np.zeros((1, 2), np.int32)]
    first = 1
    for index, each in entries.items():
        row = rows[index]
        row["first_token"], row["num_seen"], row["num_masked"] = first, len(each.seen), len(each.masked)
        row["num_biased"], row["num_mask_entries"] = len(each.biased), len(each.mask)
        parts += each
        first += sum(map(len, each))
    return rows, parts[0] if len(parts) == 1 else np.concatenate(parts)


def _with_failures(sampled: list[Sampled], draw: Draw) -> list[Sampled]:
    for index, error in draw.failed.items():
        sampled[index] = sampled[index]._replace(error=error)
    return sampled


def _owners(rows: Many[ScheduledSequence]) -> list[Sequence]:
    return [row.sequence for row in rows for _ in row.scored]


def _check(token_ids: Many[int], sequences: Many[Sequence]) -> None:
    if custom_ops.BROKEN_ROW in token_ids:
        request_id = sequences[token_ids.index(custom_ops.BROKEN_ROW)].request_id
        raise FloatingPointError(f"logits of request {request_id} are not finite")


def _logprobs(ids: list[int], values: list[float], rank: int = 0) -> Logprobs:
    return Logprobs(ids[0], values[0], list(zip(ids[1:], values[1:], strict=True)), rank)
