"""One client request while the engine computes it, for any shape of response."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from ...common.errors import FastDeployError, RequestError
from ...common.messages import Logprobs, TokenOutput
from ...common.request import FinishReason
from ...common.resumption import Resumption
from ..client_watch import on_disconnect
from .access_log import AccessRecord
from .delivery_marks import DeliveryMarks
from .delta_groups import DeltaGroups
from .keep_alive import KeepAlive
from .output import Delta
from .protocol import GenerationRequest
from .sequence_plan import plan_sequences
from .served_model import ServedModel

# Two concurrent requests may carry the same client id; the engine's ids must differ.
_serial = itertools.count()
#: Yielded in place of a delta when a keep-alive is due.
NO_OUTPUT = Delta("", (), ())
#: Interval of drafts, which tell the router about a response that is not streamed.
_DRAFT_SECONDS = 1.0


class GenerationFailed(FastDeployError):
    """The engine gave up on a sequence; the client is not at fault."""


class Generation:
    """The choices of one request: n for each prompt, prompt by prompt. Always leave it (``with``).

    Args:
        marked: the router requests marks (common/resumption.py).
        resumption: tokens that another replica has drawn. `deltas` does not return them again.

    Raises:
        ApiError: see `plan_sequences`.
        ReplicaUnavailable: the engine is not ready.
    """

    def __init__(
        self,
        served: ServedModel,
        request: GenerationRequest,
        prompts: list[list[int]],
        *,
        record: AccessRecord,
        seed: int,
        created: int,
        client: socket.socket | None,
        marked: bool,
        keep_alive: KeepAlive | None,
        resumption: Resumption | None,
    ) -> None:
        self.served = served
        self.request = request
        self.prompts = prompts
        self.created = created
        self.id = request.response_id(record.request_id) if resumption is None else resumption.id
        choices = plan_sequences(
            served,
            request,
            prompts,
            resumption,
            engine_id=f"{record.request_id}.{next(_serial):x}",
            seed=seed,
            arrival_time=time.time(),
            traceparent="" if record.trace_context is None else record.trace_context.header,
        )
        #: By choice: the part that another replica has sent, or would have sent.
        self.delivered = {
            index: choice.delivered for index, choice in enumerate(choices) if choice.delivered is not None
        }
        #: By choice: the same in the steps in which it was emitted.
        self.steps = [choice.steps for choice in choices]
        #: Number of events that another replica has sent.
        self.num_sent_events = 0 if resumption is None else resumption.events
        self._outputs = [choice.output for choice in choices]
        self._groups: DeltaGroups | None = None
        if request.stream and request.tokens_per_event > 1:
            begun = [index for index, output in enumerate(self._outputs) if output.num_tokens]
            self._groups = DeltaGroups(request.tokens_per_event, begun)
        #: The router requests a sign of life while nothing else is sent.
        self.wants_keep_alives = keep_alive is not None
        self._marks = DeliveryMarks(self._outputs, enabled=marked)
        self._record = record
        self._keep_alive = keep_alive
        self._num_cached: dict[int, int] = {}
        #: By choice; set by its first output if the request asks for them.
        self._prompt_logprobs: dict[int, list[Logprobs]] = {}
        #: Time of each choice's latest token, in seconds since the request's arrival.
        self._last_drawn: dict[int, float] = {}
        self._closed = False
        record.prompt_tokens = sum(map(len, prompts))
        record.resumed_tokens = sum(output.num_tokens for output in self._outputs)
        if marked and keep_alive is not None and not request.stream:
            keep_alive.shorten_interval(_DRAFT_SECONDS)
        sequences = {index: choice.sequence for index, choice in enumerate(choices) if choice.sequence}
        self._indexes = {sequence.request_id: index for index, sequence in sequences.items()}
        if record.trace is not None:
            record.trace.submit(request, served.config.served_model_name, self.id, len(sequences))
        with ExitStack() as stack:
            self._tokens = stack.enter_context(
                served.engine.generate(
                    list(sequences.values()), None if keep_alive is None else keep_alive.wait_seconds
                )
            )
            if client is not None:
                stack.enter_context(on_disconnect(client, self._tokens.cancel))
            served.open_requests.add(self)
            stack.callback(served.open_requests.discard, self)
            self._resources = stack.pop_all()
        served.metrics.requests.inc()
        served.metrics.prompt_tokens.inc(record.prompt_tokens)
        served.metrics.max_tokens.observe(choices[-1].params.max_tokens)

    def deltas(self) -> Iterator[tuple[int, Delta]]:
        """Yield (choice index, delta) as output arrives. The last delta of a choice has a finish reason.

        In a stream with keep-alives, `NO_OUTPUT` means that one is due.

        Raises:
            GenerationFailed: the engine gave up on a sequence.
            RequestError: the engine refuses a sequence, or its constraints leave no token.
            ReplicaUnavailable: the engine has failed or is being stopped.
            ClientGone: the client has disconnected.
        """
        keep_alive, is_stream = self._keep_alive, self.request.stream
        has_begun = False
        for output in self._tokens:
            if output is not None:
                index = self._indexes[output.request_id]
                delta = self._push(index, output)
                if delta:
                    yield index, delta
                    if is_stream:
                        has_begun = True
                        if keep_alive is not None:
                            keep_alive.reset()
                        continue
            if keep_alive is not None and keep_alive.is_due():
                if has_begun:
                    yield 0, NO_OUTPUT
                    keep_alive.reset()
                else:
                    draft = b"" if is_stream else self._marks.draft(self.created, self.id)
                    keep_alive.send_interim_response(draft)

    def all_deltas(self) -> list[list[Delta]]:
        """Wait for the end; return all deltas of each choice, including those of another replica."""
        parts = [
            [self.delivered[index]] if index in self.delivered else [] for index in range(len(self._outputs))
        ]
        for index, delta in self.deltas():
            parts[index].append(delta)
        return parts

    def prompt_logprobs(self, index: int) -> list[Logprobs]:
        """Return the log probabilities of the prompt of a begun choice, from the second token on."""
        return self._prompt_logprobs[index]

    def token_ids(self, index: int) -> list[int]:
        """Return the tokens of a choice so far."""
        return self._outputs[index].token_ids

    def mark(self, index: int, delta: Delta | None = None) -> bytes:
        """Return the mark of the event with this delta, or of an event that opens the choice."""
        return self._marks.opening(index) if delta is None else self._marks.event(index, delta)

    def usage(self) -> dict[str, Any]:
        """Return the field `usage` for the whole request so far."""
        prompt = sum(map(len, self.prompts))
        completion = sum(output.num_tokens for output in self._outputs)
        # The choices of a prompt share it, so its cached tokens count once.
        cached = sum(self._num_cached.get(i * self.request.n, 0) for i in range(len(self.prompts)))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }

    def usage_so_far(self, index: int, *, has_begun: bool = True) -> dict[str, Any]:
        """Return the field `usage` for an event of this choice; empty unless the request asks for it.

        It has no counts of a replica's cache, so that a resumed stream continues with the same counts.

        Args:
            has_begun: False for an event without tokens that opens the choice.
        """
        if not self.request.continuous_usage:
            return {}
        prompt = len(self.prompts[index // self.request.n])
        completion = self._outputs[index].num_tokens if has_begun else 0
        return {
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
        }

    @property
    def ids(self) -> tuple[str, str]:
        return self.id, self._record.request_id

    @property
    def num_tokens(self) -> int:
        return sum(output.num_tokens for output in self._outputs)

    def abort(self) -> None:
        """End all choices with the text that they have. For any thread."""
        self._tokens.end()

    def close(self) -> None:
        """Abort unfinished sequences, and record the request in metrics and access log."""
        if self._closed:
            return
        self._closed = True
        self._resources.close()
        record, metrics = self._record, self.served.metrics
        record.output_tokens = sum(output.num_tokens for output in self._outputs) - record.resumed_tokens
        metrics.whole.observe(record.seconds)
        for prompt in self.prompts:
            metrics.prompt_length.observe(len(prompt))
        if len(record.finish_reasons) < len(self._indexes):
            if record.status == 200 and record.error is None:
                # The status had been sent before the client disconnected.
                record.status = 499
        else:
            metrics.successes.inc()
            for output in self._outputs:
                metrics.generation_length.observe(output.num_tokens)

    def _push(self, index: int, output: TokenOutput) -> Delta:
        if output.is_refused:
            raise RequestError(output.message or "the engine refuses this request")
        if output.finish_reason is FinishReason.ERROR:
            raise GenerationFailed(output.message or "the engine gave up on this request")
        if output.times is not None and self._record.trace is not None:
            is_last = output.finish_reason is not None
            self._record.trace.drawn(output.times, is_last=is_last, num_cached=output.num_cached)
        choice = self._outputs[index]
        if index not in self._num_cached:
            self._num_cached[index] = output.num_cached
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[index] = output.prompt_logprobs
        before = choice.num_tokens
        delta = choice.push(output)
        if choice.num_tokens > before:
            self._observe_tokens(index, choice.num_tokens - before)
        if choice.finish_reason is not None:
            self._marks.finished(index, before)
            # A stop string ends the choice, but the engine does not know stop strings.
            self._tokens.stop(output.request_id)
            self._record.finish_reasons.append(choice.finish_reason)
        if self._groups is not None:
            return self._groups.add(index, delta, choice.num_tokens - before)
        return delta

    def _observe_tokens(self, index: int, num_tokens: int) -> None:
        """Count the tokens of a step now, not when the request ends, which may be minutes later."""
        record, metrics = self._record, self.served.metrics
        seconds = record.seconds
        if record.first_token_seconds is None:
            record.first_token_seconds = seconds
            metrics.first_token.observe(seconds)
        if index in self._last_drawn:
            metrics.per_token.observe(seconds - self._last_drawn[index])
        self._last_drawn[index] = seconds
        metrics.generation_tokens.inc(num_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
