"""The model that this API process serves, and its admission of requests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer

from ...common.errors import ReplicaUnavailable
from ...common.tracing import start_tracing
from ...config import ModelConfig
from ...grammar.vocabulary import grammar_vocabulary
from ...parsers.formats import load_plugin, reasoning_format, tool_format
from ...tokenizer.tokenizer import Tokenizer
from ..metrics import ReplicaMetrics
from ..registration import Identity
from .engine_client import EngineClient, EngineState
from .errors import ApiError
from .open_requests import OpenRequests
from .options import ServeConfig
from .protocol import SamplingDefaults
from .seeds import Seeds
from .validation import WRONG_VALUE


class ServedModel:
    """Configuration, tokenizer, engine and metrics, shared by all threads of the process.

    Its mutable state is the number of open requests and `draining`.
    """

    def __init__(self, config: ServeConfig, engine: EngineClient) -> None:
        directory = config.engine.model
        self.config = config
        self.engine = engine
        self.identity = Identity(config.max_concurrency)
        self.model = ModelConfig.from_directory(directory)
        self.tokenizer = Tokenizer.from_directory(directory, config.chat_template)
        if config.tool_parser_plugin is not None:
            load_plugin(config.tool_parser_plugin)
        name, reasoning = config.tool_call_parser, config.reasoning_parser
        #: None: unknown.
        self.tool_format = None if name is None else tool_format(name)
        #: None: reasoning stays in the content.
        self.reasoning_format = None if reasoning is None else reasoning_format(reasoning)
        self.defaults = SamplingDefaults.from_directory(directory)
        self.metrics = ReplicaMetrics(lambda: engine.stats, lambda: engine.ready, config.engine.max_num_seqs)
        self.seeds = Seeds(config.seed)
        self.created = int(time.time())
        self.open_requests = OpenRequests()
        #: None where traces are off.
        self.tracing = start_tracing(
            config.tracing, "fd-replica", f"replica {config.engine.data_parallel_rank}"
        )
        #: True once the process is stopping: open requests continue, new ones are refused.
        self.draining = False
        self._changed = threading.Condition()
        self._in_flight = 0

    @cached_property
    def grammar_vocabulary(self) -> LLTokenizer:
        """The vocabulary for grammars that name special tokens."""
        return grammar_vocabulary(self.tokenizer, self.model.vocab_size)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold one of `max_concurrency` places for the duration of the block.

        Raises:
            ApiError: all places are taken.
            ReplicaUnavailable: the replica is loading, failed or draining.
        """
        if self.draining:
            raise ReplicaUnavailable("this replica is shutting down")
        self.engine.require_ready()
        limit = self.config.max_concurrency
        with self._changed:
            if self._in_flight >= limit:
                raise ApiError(
                    429, f"Too many requests, current max concurrency is {limit}", code="rate_limit_exceeded"
                )
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def wait_until_idle(self, timeout: float) -> bool:
        """Wait until no request is open; return False after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._in_flight == 0, timeout)

    def tokens_left(self, prompt: list[int], max_tokens: int | None, field: str) -> int:
        """Return how many tokens may follow `prompt`: `max_tokens`, limited by context and KV cache.

        Args:
            field: name of the prompt's field in the request, for errors.

        Raises:
            ApiError: the prompt is empty, has unknown token ids, or leaves no room for a requested token.
        """
        if not prompt:
            raise ApiError(
                400, f"{field} has no tokens; at least one is required", param=field, code=WRONG_VALUE
            )
        self.require_known(prompt, field)
        cache, context = self._limits
        limit = min(cache, context)
        if len(prompt) + (max_tokens != 0) > limit:
            # Clients such as litellm know this error by OpenAI's words.
            most = "the KV cache holds" if cache < context else "this model's maximum context length is"
            raise ApiError(
                400,
                f"{field} has {len(prompt)} tokens; {most} {limit}"
                + (", one of them for the output" if max_tokens != 0 else ""),
                param=field,
                code="context_length_exceeded",
            )
        left = limit - len(prompt)
        return left if max_tokens is None else min(max_tokens, left)

    def prompt_room(self, max_tokens: int | None) -> int:
        """Return how many tokens a prompt may have beside the output.

        An output that is not limited, or does not fit anyway, counts as one token.
        """
        limit = min(self._limits)
        return limit - (1 if max_tokens is None or max_tokens >= limit else max_tokens)

    @property
    def _limits(self) -> tuple[int, int]:
        """Numbers of tokens in the KV cache and in the context."""
        sizes = self.engine.ready
        assert sizes is not None, "requests are admitted after the worker is ready"
        return sizes.num_blocks * sizes.block_size, sizes.max_model_len

    def require_known(self, token_ids: list[int], field: str) -> None:
        """Raise ApiError (400) if the model does not have one of these token ids."""
        if max(token_ids, default=0) >= self.model.vocab_size:
            raise ApiError(
                400,
                f"{field} has token id {max(token_ids)}; this model's ids are below {self.model.vocab_size}",
                param=field,
                code=WRONG_VALUE,
            )

    @property
    def is_on_gpu(self) -> bool:
        return bool(self.engine.ready and self.engine.ready.gpu_uuid)

    @property
    def in_flight(self) -> int:
        """Number of open requests."""
        return self._in_flight

    def require_model(self, name: str | None) -> None:
        """Raise ApiError (404) if requests may not name this model."""
        if name is not None and not self.config.accepts_model(name):
            raise ApiError(
                404,
                f"The model {name[:100]!r} does not exist; this server has {self.config.served_model_name!r}",
                param="model",
                code="model_not_found",
            )

    def is_healthy(self) -> bool:
        return self.engine.status.state is EngineState.READY and not self.draining

    def health(self) -> tuple[int, dict[str, Any]]:
        """Return HTTP status and body of /health."""
        status = self.engine.status
        body: dict[str, Any] = {"status": "draining" if self.draining else str(status.state)}
        if status.state is EngineState.LOADING:
            body |= {"progress": round(status.progress, 3), "stage": status.stage}
        if status.message:
            body["message"] = status.message
        if status.state is EngineState.READY:
            progress = self.engine.progress
            body["worker"] = {
                "pid": progress.pid,
                "steps": progress.steps,
                "requests": progress.requests,
                "silent": round(progress.silent, 3),
            }
        if self.is_healthy():
            return 200, body | {"model": self.config.served_model_name}
        if os.environ.get("FD_COMPAT_HEALTH") == "1":
            # FastDeploy's codes: 304 when a worker is not alive, 404 for any other reason.
            return (304 if status.state is EngineState.FAILED else 404), body
        return 503, body
