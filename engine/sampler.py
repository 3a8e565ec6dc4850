"""From logits to tokens.

The order is vLLM's: repetition penalty, frequency and presence penalty, stop tokens masked until `min_tokens`
are out, then (unless greedy) temperature, min_p, top_k, top_p on what is left, and one draw.

Each row is worked on alone and in an order fixed by token ids, and its random number depends on seed, choice
and position only: a text does not depend on which other texts are in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np

from .messages import Logprobs
from .philox import uniform
from .request import Sequence

#: How many of the most likely tokens a nucleus is looked for in first. It nearly always is that small, and
#: sorting a whole vocabulary costs more than all the rest of a draw.
_NUCLEUS_GUESS = 256


class Sampled(NamedTuple):
    token_id: int
    logprobs: Logprobs | None


def sample(logits: np.ndarray, sequences: Many[Sequence]) -> list[Sampled]:
    """Draws the next token of each sequence from its row of `logits` (float32 [rows, vocabulary]).

    Raises:
        FloatingPointError: a row holds NaN or nothing finite, which only a broken step produces.
    """
    return [_sample_row(row, sequence) for row, sequence in zip(logits, sequences, strict=True)]


def _sample_row(raw: np.ndarray, sequence: Sequence) -> Sampled:
    params = sequence.params
    row = _adjusted(raw, sequence)
    # The lowest id among equals; the place of the first NaN if there is one.
    best = int(row.argmax())
    if not math.isfinite(row[best]):
        raise FloatingPointError(f"logits of request {sequence.request_id} are not finite")
    token_id = best if params.temperature == 0 else _draw(row, float(row[best]), sequence)
    return Sampled(token_id, None if params.logprobs is None else _logprobs(raw, token_id, params.logprobs))


def _adjusted(raw: np.ndarray, sequence: Sequence) -> np.ndarray:
    """The row after penalties and masks; `raw` itself when there are none."""
    params = sequence.params
    outputs = sequence.output_token_ids
    masked = params.stop_token_ids if len(outputs) < params.min_tokens else ()
    counted = bool(outputs) and (params.frequency_penalty != 0 or params.presence_penalty != 0)
    if not masked and not counted and params.repetition_penalty == 1:
        return raw
    row = raw.astype(np.float64)
    if params.repetition_penalty != 1:
        seen = np.unique(np.array(sequence.prompt_token_ids + outputs))
        scores = row[seen]
        row[seen] = np.where(
            scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty
        )
    if counted:
        ids, counts = np.unique(np.array(outputs), return_counts=True)
        row[ids] -= counts * params.frequency_penalty + params.presence_penalty
    row[[token_id for token_id in masked if 0 <= token_id < len(row)]] = -np.inf
    return row


def _draw(row: np.ndarray, best: float, sequence: Sequence) -> int:
    """One token by inverse CDF over the candidates in ascending id order, in float64."""
    params = sequence.params
    row = row.astype(np.float64)
    # min_p and top_k both cut below a score; equals of the last one stay in, as in vLLM and transformers.
    threshold = -math.inf
    if params.min_p > 0:
        threshold = best + params.temperature * math.log(params.min_p)
    if 0 < params.top_k < len(row):
        threshold = max(threshold, _kth_largest(row, params.top_k))
    ids = None
    if threshold > -math.inf:
        ids = np.flatnonzero(row >= threshold)
        row = row[ids]
    with np.errstate(over="ignore", under="ignore"):
        # A tiny temperature may push all but the best to minus infinity: that is its meaning.
        weights = np.exp((row - best) / params.temperature)
    if params.top_p < 1:
        nucleus = _nucleus(weights, params.top_p)
        ids = nucleus if ids is None else ids[nucleus]
        weights = weights[nucleus]
    cumulative = np.cumsum(weights)
    point = uniform(params.seed, params.choice, sequence.num_tokens) * cumulative[-1]
    index = int(np.searchsorted(cumulative, point, side="right"))
    return index if ids is None else int(ids[index])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the fewest most likely tokens whose share reaches `top_p`; at least one."""
    goal = top_p * weights.sum()
    size = min(len(weights), _NUCLEUS_GUESS)
    while True:
        order = _largest(weights, size)
        mass = np.cumsum(weights[order])
        if mass[-1] >= goal or size == len(weights):
            return np.sort(order[: np.searchsorted(mass, goal) + 1])
        size = min(len(weights), 8 * size)


def _logprobs(raw: np.ndarray, token_id: int, count: int) -> Logprobs:
    row = raw.astype(np.float64)
    row -= row.max()
    row -= math.log(np.exp(row).sum())
    top = _largest(row, min(count, len(row)))[:count] if count > 0 else ()
    return Logprobs(token_id, float(row[token_id]), [(int(index), float(row[index])) for index in top])


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest and of all that equal the last of them; equals by ascending index.

    Because ties at the border stay in, the order is a prefix of the full order whatever `count` is.
    """
    indices = np.flatnonzero(values >= _kth_largest(values, count))
    return indices[np.argsort(-values[indices], kind="stable")]


def _kth_largest(values: np.ndarray, k: int) -> float:
    return float(np.partition(values, len(values) - k)[len(values) - k])
