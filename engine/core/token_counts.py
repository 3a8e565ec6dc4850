"""Incremental counts of the tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Token counts of one text. The cost of a step does not depend on the length of the text."""

    def __init__(self, prompt_token_ids: Many[int]) -> None:
        #: Index of each token in `_pairs`.
        self._indices = {token: index for index, token in enumerate(dict.fromkeys(prompt_token_ids))}
        self._pairs = np.zeros((len(self._indices) + 64, 2), dtype=np.int32)
        self._pairs[: len(self._indices), 0] = list(self._indices)
        self._num_counted = 0

    def after(self, output_token_ids: Many[int]) -> NDArray[np.int32]:
        """Return (token, count in the output) for each token of prompt and output.

        The result is a view, valid until the next call. Count 0 means that only the prompt has the token.

        Args:
            output_token_ids: must begin with the output of the previous call.
        """
        for token in output_token_ids[self._num_counted :]:
            index = self._indices.setdefault(token, len(self._indices))
            if index == len(self._pairs):
                self._pairs = np.concatenate([self._pairs, np.zeros_like(self._pairs)])
            self._pairs[index, 0] = token
            self._pairs[index, 1] += 1
        self._num_counted = len(output_token_ids)
        return self._pairs[: len(self._indices)]
