"""The sampling operations, which process a whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .native import run

if TYPE_CHECKING:
    import paddle

#: Sampling parameters of one row; include/sample.h has the same fields in the same order.
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
        ("num_biased", np.int32),
        ("num_mask_entries", np.int32),
    ]
)

#: Result for a row that holds NaN or no finite value.
BROKEN_ROW = -1


def sample(
    logits: paddle.Tensor, rows: np.ndarray, tokens: NDArray[np.int32], width: int
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Draw one token per row: biases, penalties, masks, temperature, min_p, top_k, top_p, then inverse CDF.

    Args:
        logits: float32 [T, V].
        rows: SAMPLING_ROW [T]. Temperature 0 is greedy, top_k 0 keeps all tokens. `logprobs` is -1 for none,
            otherwise the number of most likely tokens to return. If `given` is not 0, no token is drawn and
            token `given - 1` is scored instead, together with its rank.
        tokens: int32 [n, 2], pairs of token id and count. For each row, `num_seen` pairs from `first_token`
            on are the tokens of its text with their counts in the output (0: only in the prompt); the
            following `num_masked` pairs are ids that must not be drawn; the following `num_biased` pairs are
            distinct ids with the bits of a float32 that is added to their logits. If `num_mask_entries` is
            not 0, the bits of so many further pairs, lowest first, say which tokens are allowed, and those
            without a bit are not.
        width: 1 + the highest `logprobs` of all rows.

    Returns:
        The tokens int64 [T], or the rank of a token to be scored (1: the most likely one), or `BROKEN_ROW` if
        a row holds NaN or no finite value; ids int32 [T, width] and
        log probabilities float64 [T, width] of the drawn token and then of the most likely ones, both from
        the unmodified logits, undefined where a row did not request them.
    """
    import paddle

    row_bytes = paddle.to_tensor(rows.view(np.uint8))
    drawn, top_tokens, logprobs = run("sample", logits, row_bytes, paddle.to_tensor(tokens), width)
    return drawn, top_tokens, logprobs


def argmax(logits: paddle.Tensor) -> paddle.Tensor:
    """Return the most likely token of each row [T, V] as int64 [T], ties by lowest id, or `BROKEN_ROW`."""
    return run("argmax", logits)[0]
