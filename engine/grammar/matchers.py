"""Matchers: where each text stands in its grammar, and which tokens may follow."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import WeakValueDictionary

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray

from ..common.errors import FastDeployError, GrammarFailed, RequestError
from .validation import LIMITS

_log = logging.getLogger(__name__)

_MAX_RECENT = 32
_MAX_MESSAGE = 200
#: Fewer masks are not worth waking threads.
_MIN_PARALLEL = 4


class Matcher:
    """The state of a grammar after one text. It depends only on the text's tokens."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.native = matcher
        self._num_taken = 0

    def advance(self, output_token_ids: Sequence[int]) -> None:
        """Take the new tokens of a text.

        Args:
            output_token_ids: must begin with the output of the previous call.

        Raises:
            GrammarFailed: the text does not fit, or the grammar exceeds a limit.
        """
        if len(output_token_ids) > self._num_taken:
            self.native.consume_tokens(list(output_token_ids[self._num_taken :]))
            self._num_taken = len(output_token_ids)
        self.require_sound()

    def require_sound(self) -> None:
        """Raise GrammarFailed if the matcher has failed: its mask would end the text as if it were whole."""
        if self.native.is_error():
            raise GrammarFailed(f"the grammar of the output failed: {_one_line(self.native.get_error())}")


class Grammars:
    """Compiled grammars of a worker.

    The vocabulary is read and grammars are compiled in a thread, so that other requests need not wait.
    """

    def __init__(self, read_vocabulary: Callable[[], LLTokenizer], threads: int = 1) -> None:
        self._read_vocabulary = read_vocabulary
        self._num_threads = threads
        self._vocabulary: LLTokenizer | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None
        #: Grammars in use and recently used ones, by their text.
        self._compiled: WeakValueDictionary[str, Future[LLMatcher]] = WeakValueDictionary()
        self._recent: deque[Future[LLMatcher]] = deque(maxlen=_MAX_RECENT)

    def compile(self, grammar: str) -> Future[LLMatcher]:
        """Return the future initial state of a grammar. Keep it while the grammar is needed.

        It raises RequestError if the grammar is invalid, FastDeployError if the vocabulary cannot be used.
        """
        future = self._compiled.get(grammar)
        if future is None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "grammars")
            future = self._compiled[grammar] = self._thread.submit(self._compile, grammar)
            self._recent.append(future)
        return future

    def matcher(self, grammar: str) -> Matcher:
        """Return the state of a grammar before a text."""
        return Matcher(self.compile(grammar).result().deep_copy())

    def masks(self, matchers: Sequence[Matcher], num_words: int) -> NDArray[np.uint32]:
        """Return the tokens that may follow, as bits: uint32 [matchers, words]."""
        masks = np.empty((len(matchers), num_words), np.uint32)
        start, row_bytes = masks.ctypes.data, num_words * 4
        if self._num_threads > 1 and len(matchers) >= _MIN_PARALLEL:
            if self._executor is None:
                self._executor = LLExecutor(self._num_threads)
            natives = [(matcher.native, row) for row, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(natives, start, row_bytes, len(matchers))
        else:
            for row, matcher in enumerate(matchers):
                matcher.native.unsafe_compute_mask_ptr(start + row * row_bytes, row_bytes)
        return masks

    def _compile(self, grammar: str) -> LLMatcher:
        if self._vocabulary is None:
            try:
                self._vocabulary = self._read_vocabulary()
            except FastDeployError:
                raise
            # The library's own errors for a vocabulary that it cannot use.
            except Exception as error:
                _log.exception("the vocabulary cannot be used for grammars", exc_info=error)
                raise FastDeployError(
                    "this model's vocabulary cannot be used for grammars; the server's log has the details"
                ) from None
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise RequestError(f"the grammar is invalid: {_one_line(matcher.get_error())}")
        return matcher


def _one_line(message: str) -> str:
    line = message.partition("\n")[0][:_MAX_MESSAGE]
    if not line.startswith("panic"):
        return line
    _log.error("llguidance: %s", message)
    return "an internal error; the server's log has the details"
