"""Sampling as an operation on a whole batch: what it takes, and how it is called."""

from __future__ import annotations

import numpy as np
import paddle
from numpy.typing import NDArray

from .native import run

#: How the token of one row is drawn; include/sample.h has the same fields in the same order.
SAMPLING_ROW = np.dtype(
    [
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition_penalty", np.float64),
        ("frequency_penalty", np.float64),
        ("presence_penalty", np.float64),
        ("seed", np.uint64),
        ("choice", np.uint32),
        ("position", np.uint32),
        ("top_k", np.int32),
        ("logprobs", np.int32),
        ("first_token", np.int32),
        ("num_seen", np.int32),
        ("num_masked", np.int32),
        ("given", np.int32),
    ]
)

#: The token drawn for a row that holds NaN or nothing finite.
BROKEN_ROW = -1


def sample(
    logits: paddle.Tensor, rows: np.ndarray, tokens: NDArray[np.int32], width: int
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Draws one token for each row: penalties, masks, temperature, min_p, top_k, top_p, inverse CDF.

    Args:
        logits: float32 [T, V].
        rows: SAMPLING_ROW [T]. A temperature of 0 means the most likely token, a top_k of 0 all tokens;
            logprobs is -1 for none, else how many of the most likely tokens are to be told of.
        tokens: [n, 2] of token id and count. A row's `num_seen` pairs from `first_token` on are the tokens of
            its text and how often the output has them (0: the prompt alone does); the `num_masked` pairs
            behind are ids that must not be drawn. Where `given` is not 0 nothing is drawn, and token
            `given - 1` is scored instead.
        width: 1 + the highest `logprobs` of all rows.

    Returns:
        The tokens int64 [T], `BROKEN_ROW` where a row holds NaN or nothing finite; ids int32 [T, width] and
        log probabilities float64 [T, width] of the drawn token and then of the most likely ones, both of the
        logits as they came, and undefined where a row did not ask for them.
    """
    row_bytes = paddle.to_tensor(rows.view(np.uint8))
    drawn, top_tokens, logprobs = run("sample", logits, row_bytes, paddle.to_tensor(tokens), width)
    return drawn, top_tokens, logprobs


def argmax(logits: paddle.Tensor) -> paddle.Tensor:
    """The most likely token of each row [T, V] as int64 [T], the lowest id among equals, or `BROKEN_ROW`."""
    return run("argmax", logits)[0]
