"""Samples tokens from logits.

The order is that of vLLM: repetition penalty, frequency and presence penalty, mask of stop tokens until
`min_tokens`, then (unless greedy) temperature, min_p, top_k, top_p, and one draw. One operation does all this
for the whole batch (custom_ops/include/sample.h); this module prepares its arguments.

Rows are independent, and their random numbers depend only on seed, choice and position. A text therefore does
not depend on the other texts in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import paddle
from numpy.typing import NDArray

from .. import custom_ops
from ..common.messages import Logprobs
from ..common.request import SamplingParams, ScheduledSequence, Sequence
from .token_counts import TokenCounts

_MAX_INT32 = 2**31 - 1


class Sampled(NamedTuple):
    token_id: int
    logprobs: Logprobs | None


class Sampler:
    """Caches the sampling state of each live sequence.

    The state depends only on parameters and tokens, so preemption and failed steps do not affect it.
    """

    def __init__(self) -> None:
        self._recipes: WeakKeyDictionary[Sequence, _Recipe] = WeakKeyDictionary()

    def sample(self, logits: paddle.Tensor, sequences: Many[Sequence]) -> list[Sampled]:
        """Draw the next token of each sequence from its row of `logits` (float32 [rows, vocabulary]).

        Raises:
            FloatingPointError: a row holds NaN or no finite value.
        """
        if not sequences:
            return []
        recipes = [self._recipe(sequence) for sequence in sequences]
        if all(recipe.is_argmax for recipe in recipes):
            token_ids = custom_ops.argmax(logits).tolist()
            _check(token_ids, sequences)
            return [Sampled(token_id, None) for token_id in token_ids]
        rows, tokens = _stack(recipes, sequences)
        width = 1 + max(0, int(rows["logprobs"].max()))
        drawn, top_tokens, top_logprobs = custom_ops.sample(logits, rows, tokens, width)
        token_ids = drawn.tolist()
        _check(token_ids, sequences)
        sampled = [Sampled(token_id, None) for token_id in token_ids]
        requested = np.flatnonzero(rows["logprobs"] >= 0).tolist()
        if requested:
            ids, values = top_tokens.numpy(), top_logprobs.numpy()
            for index in requested:
                end = 1 + min(int(rows["logprobs"][index]), logits.shape[1])
                logprobs = _logprobs(ids[index, :end].tolist(), values[index, :end].tolist())
                sampled[index] = Sampled(token_ids[index], logprobs)
        return sampled

    def score(self, logits: paddle.Tensor, rows: Many[ScheduledSequence]) -> list[Logprobs]:
        """Return the log probabilities of prompt tokens, each from the logits of the preceding position.

        Args:
            logits: float32 [scored positions of `rows`, vocabulary].
            rows: the rows of a batch that have scored positions.

        Raises:
            FloatingPointError: a row holds NaN or no finite value.
        """
        owners = [row.sequence for row in rows for _ in row.scored]
        given = [i for row in rows for i in row.sequence.token_ids(row.scored.start + 1, row.scored.stop + 1)]
        wanted = np.zeros(len(given), custom_ops.SAMPLING_ROW)
        wanted["given"] = np.array(given) + 1
        wanted["logprobs"] = [owner.params.prompt_logprobs for owner in owners]
        width = 1 + int(wanted["logprobs"].max())
        token_ids, ids, values = custom_ops.sample(logits, wanted, np.zeros((1, 2), np.int32), width)
        _check(token_ids.tolist(), owners)
        ends = 1 + np.minimum(wanted["logprobs"], logits.shape[1])
        return [
            _logprobs(ids[:end], values[:end])
            for end, ids, values in zip(ends.tolist(), ids.tolist(), values.tolist(), strict=True)
        ]

    def _recipe(self, sequence: Sequence) -> _Recipe:
        recipe = self._recipes.get(sequence)
        if recipe is None:
            recipe = self._recipes[sequence] = _Recipe(sequence)
        return recipe


class _Recipe:
    """The sampling state of one sequence."""

    def __init__(self, sequence: Sequence) -> None:
        params = sequence.params
        self._counts: TokenCounts | None = None
        if params.repetition_penalty != 1:
            self._counts = TokenCounts(sequence.prompt_token_ids)
        elif params.frequency_penalty != 0 or params.presence_penalty != 0:
            self._counts = TokenCounts(())
        self._stops = np.array([(token_id, 0) for token_id in params.stop_token_ids], np.int32).reshape(-1, 2)
        #: True if the operation needs token counts or masks, at least at the beginning.
        self.has_tokens = self._counts is not None or (params.min_tokens > 0 and len(self._stops) > 0)
        self.is_argmax = params.temperature == 0 and not self.has_tokens and params.logprobs is None
        #: As bytes, because joining bytes is the fastest way to build the array of a batch.
        self.row = _row(params).tobytes()

    def tokens(self, sequence: Sequence) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return (token, count) of penalised tokens, and (token, 0) of currently masked tokens."""
        outputs = sequence.output_token_ids
        seen = self._stops[:0] if self._counts is None else self._counts.after(outputs)
        masked = self._stops if len(outputs) < sequence.params.min_tokens else self._stops[:0]
        return seen, masked


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


def _stack(recipes: Many[_Recipe], sequences: Many[Sequence]) -> tuple[np.ndarray, NDArray[np.int32]]:
    """Return the rows of a batch and the concatenated tokens that they refer to."""
    rows = np.frombuffer(bytearray().join([recipe.row for recipe in recipes]), custom_ops.SAMPLING_ROW)
    rows["position"] = [sequence.num_tokens for sequence in sequences]
    # One pair that no row uses: Paddle does not accept an empty array.
    parts = [np.zeros((1, 2), np.int32)]
    first = 1
    for index, recipe in enumerate(recipes):
        if recipe.has_tokens:
            seen, masked = recipe.tokens(sequences[index])
            row = rows[index]
            row["first_token"], row["num_seen"], row["num_masked"] = first, len(seen), len(masked)
            parts += [seen, masked]
            first += len(seen) + len(masked)
    return rows, parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check(token_ids: Many[int], sequences: Many[Sequence]) -> None:
    if custom_ops.BROKEN_ROW in token_ids:
        request_id = sequences[token_ids.index(custom_ops.BROKEN_ROW)].request_id
        raise FloatingPointError(f"logits of request {request_id} are not finite")


def _logprobs(ids: list[int], values: list[float]) -> Logprobs:
    return Logprobs(ids[0], values[0], list(zip(ids[1:], values[1:], strict=True)))
