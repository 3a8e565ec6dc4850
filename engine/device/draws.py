"""Draws of tokens from the logits of a step: the request and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import custom_ops


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw from each of `count` adjacent rows of logits."""

    count: int
    #: SAMPLING_ROW [count], see `custom_ops.sample`; None: the most likely token of each row, nothing else.
    rows: np.ndarray | None = None
    #: int32 [n, 2]: the tokens and counts that rows refer to.
    tokens: NDArray[np.int32] | None = None
    #: Rows for which no token is possible, with the reason; what they draw means nothing.
    failed: Mapping[int, str] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """1 + the highest number of most likely tokens that a row requests."""
        return 1 if self.rows is None else 1 + max(0, int(self.rows["logprobs"].max()))

    def select(self, rows: list[int]) -> Draw:
        """Return the draw of these rows."""
        failed = {place: self.failed[row] for place, row in enumerate(rows) if row in self.failed}
        return Draw(len(rows), None if self.rows is None else self.rows[rows], self.tokens, failed)


class Drawn(NamedTuple):
    #: The rank of a token to be scored instead of a drawn token, and `custom_ops.BROKEN_ROW` for a row that
    #: holds NaN or no finite value.
    token_ids: list[int]
    #: Width of the logits, which limits the number of most likely tokens.
    vocab_size: int
    #: [count, width]: the drawn token and the most likely ones, undefined where a row did not request them;
    #: None if no row did.
    top_tokens: NDArray[np.int32] | None = None
    logprobs: NDArray[np.float64] | None = None

    def select(self, rows: list[int]) -> Drawn:
        """Return the results of these rows."""
        token_ids = [self.token_ids[row] for row in rows]
        if self.top_tokens is None or self.logprobs is None:
            return Drawn(token_ids, self.vocab_size)
        return Drawn(token_ids, self.vocab_size, self.top_tokens[rows], self.logprobs[rows])


def draw_from(logits: Any, draw: Draw) -> Drawn:
    """Draw from logits that are a tensor float32 [count, vocabulary] in host memory."""
    vocab_size: int = logits.shape[1]
    if draw.rows is None:
        return Drawn(custom_ops.argmax(logits).tolist(), vocab_size)
    assert draw.tokens is not None
    drawn, top_tokens, logprobs = custom_ops.sample(logits, draw.rows, draw.tokens, draw.width)
    if (draw.rows["logprobs"] < 0).all():
        return Drawn(drawn.tolist(), vocab_size)
    return Drawn(drawn.tolist(), vocab_size, top_tokens.numpy(), logprobs.numpy())
