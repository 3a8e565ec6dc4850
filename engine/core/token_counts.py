"""How often each token stands in the output of a text, kept up to date as the text grows."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Of one text. A step adds one token, so it costs the same however long the text is."""

    def __init__(self, prompt_token_ids: Many[int]) -> None:
        #: Where the pair of each token is.
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_token_ids))}
        self._pairs = np.zeros((len(self._places) + 64, 2), dtype=np.int32)
        self._pairs[: len(self._places), 0] = list(self._places)
        self._num_counted = 0

    def after(self, output_token_ids: Many[int]) -> NDArray[np.int32]:
        """(token, count) of each token of prompt and output; outputs of earlier calls must lead this one.

        A view, valid until the next call. A count of 0 means that only the prompt has the token.
        """
        for token in output_token_ids[self._num_counted :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._pairs):
                self._pairs = np.concatenate([self._pairs, np.zeros_like(self._pairs)])
            self._pairs[place, 0] = token
            self._pairs[place, 1] += 1
        self._num_counted = len(output_token_ids)
        return self._pairs[: len(self._places)]
